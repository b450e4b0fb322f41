"""Faults made on purpose: each happens once, in the process and step that were asked for, and the run ends as the one that nobody disturbed."""
import json
import os
import re
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from conftest import ROOT
from safetensors import safe_open

from ascend_nb.checkpoint import RunDir
from ascend_nb.faults import KINDS, incidents, parse_faults, timeline

STEPS, SAVES = 12, 4
MODEL = ["--hidden-size", "48", "--num-hidden-layers", "2", "--num-attention-heads", "2", "--num-key-value-heads", "2"]
FLAGS = [*MODEL, "--seq-length", "64", "--split", "90,10,0", "--train-iters", str(STEPS), "--micro-batch-size", "2", "--global-batch-size", "8", "--lr", "3e-3", "--device", "cpu",
         "--save-interval", str(SAVES), "--keep-last", "9", "--json"]
PROGRAM = "import sys; from ascend_nb.cli import main; sys.exit(main())"


@pytest.fixture(scope="session")
def tales(samples, tmp_path_factory):
    "Flags that name the data; they are prepared once."
    cache = tmp_path_factory.mktemp("cache")
    return ["--data-path", str(samples / "tales.jsonl"), "--data-cache-path", str(cache), "--tokenizer-name-or-path", str(samples / "tokenizer")]


class Run:
    "Start `ascend_nb train` in n processes and wait for its end."
    def __init__(self, folder, data, n=1): self.run, self.data, self.n = RunDir(folder), data, n

    def __call__(self, *flags, timeout=240):
        grid = ["--tensor-model-parallel-size", "2"] if self.n == 4 else []
        words = ["train", *FLAGS, *self.data, *grid, "--save", str(self.run.path), *flags]
        many = ["-m", "torch.distributed.run", "--nproc-per-node", str(self.n), "--rdzv-backend", "c10d", "--rdzv-endpoint", "localhost:0"]
        what = [sys.executable, "-c", PROGRAM, *words] if self.n == 1 else [sys.executable, *many, "-m", "ascend_nb.cli", *words]
        job = subprocess.Popen(what, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env={**os.environ, "OMP_NUM_THREADS": "1"}, cwd=ROOT, start_new_session=True)
        try: out, err = job.communicate(timeout=timeout)
        finally: self.left = ours(str(self.run.path))
        if job.poll() is None: os.killpg(job.pid, signal.SIGKILL)
        return job.returncode, json.loads(out) if out.strip() else None, err

    def until_done(self, *flags, most=4):
        "Exit codes of the same command until one is 0."
        codes = []
        while 0 not in codes and len(codes) < most:
            code, self.out, self.err = self(*flags)
            codes.append(code)
        return codes


def ours(word):
    "Processes that have this word on their command line."
    found = []
    for p in Path("/proc").glob("[0-9]*/cmdline"):
        try: text = p.read_bytes().decode(errors="replace")
        except OSError: continue
        if word in text: found.append((p.parent.name, text.replace("\0", " ")))
    return found


def tensors(folder):
    "Every tensor of a saved step."
    out = {}
    for f in sorted(Path(folder).glob("*.safetensors")):
        with safe_open(f, "pt") as g: out |= {k: g.get_tensor(k) for k in g.keys()}  # noqa: SIM118
    return out


def curve(run): return [(r["step"], r["loss"], r["grad_norm"], r["lr"], r["consumed_samples"]) for r in run.rows() if "loss" in r]


def same(a, b):
    "Two runs agree in every bit: the last step's tensors, and each row."
    x, y = tensors(a.step_path(STEPS)), tensors(b.step_path(STEPS))
    assert x.keys() == y.keys() and len(x) > 30 and [k for k in x if not torch.equal(x[k], y[k])] == []
    assert curve(a) == curve(b) and [r[0] for r in curve(b)] == list(range(1, STEPS + 1))


@pytest.fixture(scope="session")
def calm(tales, tmp_path_factory):
    "Runs that nobody disturbs, by number of processes."
    made = {}
    def get(n):
        if n not in made:
            made[n] = Run(tmp_path_factory.mktemp("calm") / "run", tales, n)
            code, _, err = made[n]()
            assert code == 0, err
        return made[n].run
    return get


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
    from ascend_nb.core import UserError
    with pytest.raises(UserError) as e: parse_faults(text, 4, STEPS)
    assert re.search(says, str(e.value)) and "\n" not in str(e.value), str(e.value)


def test_the_sentence_of_the_task_is_understood():
    text = "kill:rank=1,step=7; nan:step=9; disk_full:step=12; truncate_ckpt:step=10; hang:rank=0,step=5; slow:rank=2"
    assert [(f.kind, f.rank, f.step) for f in parse_faults(text, 4, STEPS)] == [
        ("kill", 1, 7), ("nan", 0, 9), ("disk_full", 0, 12), ("truncate_ckpt", 0, 10), ("hang", 0, 5), ("slow", 2, 0)]
    assert parse_faults("") == [] and parse_faults(" ; ") == [] and len(KINDS) >= 12


def test_a_slip_ends_the_command_before_anything_is_written(tales, tmp_path):
    job = Run(tmp_path / "run", tales)
    code, out, err = job("--inject", "kill:step=99")
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
