"""Faults made on purpose: each happens once, in the process and step that were asked for, and the run ends as the one that nobody disturbed."""
import re

import pytest
from faulty import STEPS, Run, calm, same, tales  # noqa: F401

from ascend_nb.core import UserError
from ascend_nb.faults import KINDS, incidents, parse_faults, timeline

# ruff: noqa: F811


@pytest.mark.parametrize(("text", "says"), [
    ("kil:step=7", r"Found inject='kil'; expected one of kill.*Did you mean kill\?"),
    ("kill", r"the fault 'kill' without step; expected step=NUMBER"),
    ("kill:", r"Found '' in the fault 'kill:'"),
    ("kill:step", r"Found 'step' in the fault 'kill:step'"),
    ("kill:step=", r"Found 'step='"),
    ("kill:step=7,rank=one", r"Found 'rank=one'"),
    ("kill:step=0", r"Found 'step=0'.*a step from 1"),
    ("kill:rank=-1,step=3", r"Found 'rank=-1'"),
    ("kill:step=7 nan:step=9", r"Found 'step=7 nan:step=9'"),
    ("kill:rank=4,step=7", r"Found rank=4 in the fault kill:rank=4,step=7; expected at most rank 3"),
    ("kill:step=13", r"Found step=13.*at most step 12"),
    ("slow:step=2", r"without rank"),
    ("nan:step=2; nan:rank=0,step=2", r"nan:rank=0,step=2 twice"),
    ("hang:step=1e9", r"Found 'step=1e9'"),
    ("; ;kill:step=1,,", r"Found '' in the fault"),
])
def test_a_slip_in_the_language_is_one_sentence(text, says):
    with pytest.raises(UserError) as e: parse_faults(text, 4, STEPS)
    assert re.search(says, str(e.value)) and "\n" not in str(e.value), str(e.value)


def test_the_sentence_of_the_task_is_understood():
    text = "kill:rank=1,step=7; nan:step=9; disk_full:step=12; truncate_ckpt:step=10; hang:rank=0,step=5; slow:rank=2"
    assert [(f.kind, f.rank, f.step) for f in parse_faults(text, 4, STEPS)] == [
        ("kill", 1, 7), ("nan", 0, 9), ("disk_full", 0, 12), ("truncate_ckpt", 0, 10), ("hang", 0, 5), ("slow", 2, 0)]
    assert parse_faults("") == [] and parse_faults(" ; ") == [] and len(KINDS) >= 12


def test_a_slip_ends_the_command_before_anything_is_written(tales, tmp_path):
    job = Run(tmp_path / "run", tales)
    code, out, err = job("--inject", "nan:step=99")
    assert code == 2 and out is None and not job.run.path.exists() and "Traceback" not in err and "at most step 12" in err.strip().splitlines()[-1]


@pytest.mark.parametrize(("faults", "codes"), [("kill:step=7; truncate_ckpt:step=4", [-9, 0]), ("disk_full:step=8", [2, 0])], ids=["kill", "disk_full"])
def test_one_process_is_disturbed_and_ends_as_if_it_had_not_been(calm, tales, tmp_path, faults, codes):
    job = Run(tmp_path / "run", tales)
    assert job.until_done("--inject", faults) == codes, job.err
    same(calm(1), job.run)
    story = timeline(job.run)
    assert [str(f) for f in parse_faults(faults)] == sorted((r["fault"] for r in story), key=lambda f: f.startswith("trunc"))
    assert all(r["recovered_s"] > 0 for r in story) and f"{story[0]['fault']}: " in job.err, "the time to recover is printed"
    assert not job.left and not list(job.run.path.glob(".*.tmp-*"))
    assert [r["what"] for r in incidents(job.run) if r["what"] in ("start", "end")] == ["start", "start", "end"]
