"""Accidents within a run: a step that is done again, left out or caught by its copies; the end is that of the run that nobody disturbed."""
import json
import re

import pytest
import torch
from faulty import SAVES, STEPS, Run, calm, curve, same, tales, tensors  # noqa: F401

from ascend_nb.core import UserError
from ascend_nb.faults import incidents, timeline
from ascend_nb.retry import MEMORY, memory_error
from ascend_nb.spikes import LEAST, spike_limit

# ruff: noqa: F811
FIVE = "nan:step=3; bad_batch:step=5; memory:step=8; nan:step=8; slow:rank=0,seconds=0.01"


def whats(run): return [(r["what"], r["step"]) for r in incidents(run) if r["what"] not in ("step", "start", "end")]


def test_five_accidents_in_one_process_leave_no_trace_in_the_weights(calm, tales, tmp_path):
    job = Run(tmp_path / "run", tales)
    code, out, err = job("--inject", FIVE, "--step-retries", "2")
    assert code == 0, err
    same(calm(1), job.run)
    assert [x for x in whats(job.run) if x[0] == "retry"] == [("retry", 3), ("retry", 5), ("retry", 8), ("retry", 8)], "two accidents in one step"
    assert "step 3 is done again (1 of 2): a gradient norm of nan" in err and "step 8 is done again (2 of 2): a gradient norm of nan" in err and "UCE ERROR" in err
    assert all(r["recovered_s"] >= 0 for r in timeline(job.run) if r["what"] != "slow") and not job.left
    assert [r["retries"] for r in job.run.rows() if "retries" in r] == [1, 1, 2]


@pytest.mark.parametrize(("fault", "flags", "says"), [
    ("nan:step=3", [], r"gradient norm of step 3 is nan"),
    ("memory:step=3", ["--step-retries", "2", "--step-copy", "false"], r"UCE ERROR\) at step 3 in rank 0, and there is no copy"),
], ids=["nan", "memory"])
def test_what_is_not_repeated_ends_with_one_sentence_and_goes_on_by_the_same_command(calm, tales, tmp_path, fault, flags, says):
    job = Run(tmp_path / "run", tales)
    code, _, err = job("--inject", fault, *flags)
    last = err.strip().splitlines()[-1]
    assert code == 2 and re.search(says, last) and "Traceback" not in err, err
    assert job.until_done("--inject", fault, *flags) == [0], job.err
    same(calm(1), job.run)


def test_a_spike_is_left_out_and_decided_alike_after_a_stop(tales, tmp_path):
    "24 steps with a spike at 20: at once, and stopped after step 18, whose state holds what is known of earlier losses."
    flags = ["--train-iters", "24", "--save-interval", "8", "--spike-factor", "6"]
    whole, broken = Run(tmp_path / "whole", tales), Run(tmp_path / "broken", tales)
    assert whole.until_done(*flags, "--inject", "spike:step=20") == [0], whole.err
    assert broken.until_done(*flags, "--inject", "term:step=18; spike:step=20") == [143, 0], broken.err
    assert "step 20 is left out" in whole.err and curve(whole.run) == curve(broken.run)
    a, b = (tensors(r.run.step_path(24)) for r in (whole, broken))
    assert all(torch.equal(a[k], b[k]) for k in a)
    left = [x for r in whole.run.rows() for x in r.get("left_out", [])]
    assert [(x["step"], x["samples"]) for x in left] == [(20, "152 to 159")]
    state = json.loads((whole.run.step_path(24) / "state.json").read_text())
    assert state["skipped"] == 1 and len(state["notes"]["losses"]) == 23


def test_there_is_room_for_two_checkpoints_and_the_model(tales, tmp_path, monkeypatch):
    "Weights and two moments in fp32, twice, and the finished model; without preflight once."
    from ascend_nb import training
    asked = []
    monkeypatch.setattr(training, "check_space", lambda path, need: asked.append(need))
    for flags in ([], ["--preflight", "false"]): assert Run(tmp_path / "run", tales)("--train-iters", "1", "--resume", "auto", "--save", str(tmp_path / str(len(flags))), *flags)[0] == 0
    n = sum(t.numel() for k, t in tensors(tmp_path / "0" / "step_0000001").items() if k.startswith("model."))
    assert asked == [28 * n, 16 * n]


def test_a_limit_is_that_of_a_normal_deviation():
    losses = torch.randn(64, generator=torch.Generator().manual_seed(0)).mul(.2).add(3).tolist()
    assert spike_limit(losses, 5) == pytest.approx(float(torch.tensor(losses[-16:]).median()) + 5 * .2, rel=.1)
    assert spike_limit(losses[:LEAST - 1], 5) == float("inf") and spike_limit([2.] * 64, 5) == pytest.approx(2.1)


def test_only_errors_of_the_memory_are_taken_for_such():
    assert [memory_error(RuntimeError(f"[ERROR] 2026 {m}, device 0")) for m in MEMORY] == list(MEMORY)
    assert not memory_error(RuntimeError("Connection closed by peer")) and not memory_error(ValueError("UCE ERROR")) and not memory_error(UserError("no_valid"))


@pytest.mark.slow
def test_accidents_in_four_processes(calm, tales, tmp_path):
    "A gradient of rank 1 and a batch of rank 2: all four go back together. A slow rank is only slow."
    job = Run(tmp_path / "run", tales, 4)
    code, out, err = job("--inject", "nan:rank=1,step=3; bad_batch:rank=2,step=5; nan:rank=3,step=5; slow:rank=2,seconds=0.5", "--step-retries", "2")
    assert code == 0, err
    same(calm(4), job.run)
    assert [x for x in whats(job.run) if x[0] == "retry"] == [("retry", 3), ("retry", 5), ("retry", 5)] and "a damaged batch in rank 2" in err and not job.left
    assert re.search(r"links     tp [\d.]+ GB/s, fsdp [\d.]+ GB/s; measured in [01]\.\d s", err), "before the first step"
    named = [r.get("slow_ranks") for r in job.run.rows() if "loss" in r]
    assert named.count([2]) >= STEPS - 2 and "rank 2 keeps the others waiting: 0.5" in err and all(len(r["rank_s"]) == 4 for r in job.run.rows() if "loss" in r)


@pytest.mark.slow
@pytest.mark.parametrize(("fault", "says"), [("memory:rank=1,step=7", "UCE ERROR"), ("disk_full:rank=0,step=8", "Could not use"), ("disk_full:rank=3,step=8", "Could not use")], ids=["memory", "disk0", "disk3"])
def test_four_processes_end_and_go_on(calm, tales, tmp_path, fault, says):
    "What cannot be repeated in place ends all four with one sentence; the same command goes on."
    job = Run(tmp_path / "run", tales, 4)
    code, _, err = job("--inject", fault, "--step-retries", "2")
    assert code and says in err and not job.left, err
    assert job.until_done("--inject", fault, "--step-retries", "2") == [0], job.err
    same(calm(4), job.run)
    assert [r["recovered_s"] > 0 for r in timeline(job.run)][:1] == [True]


@pytest.mark.slow
@pytest.mark.parametrize("zero", [0, 1])
def test_a_flipped_bit_is_found_where_there_is_a_copy(tales, tmp_path, zero):
    "zero_stage=0: data parallel ranks 1 and 3 hold copies of the same part. With zero_stage=1 the bit lies in one process alone, and the log says how much is compared."
    flags = ["--zero-stage", str(zero), "--corruption-interval", "1", "--inject", "flip:rank=1,step=6"]
    job, quiet = Run(tmp_path / "run", tales, 4), Run(tmp_path / "quiet", tales, 4)
    code, _, err = job(*flags)
    if zero:
        assert code == 0 and "are compared" in err, err
        return
    assert "100% of this process's weights have a copy" in err and code and "in ranks 1, 3 differ in their bits after step 6" in err and "goes on from step 4" in err, err
    assert job.run.steps() == [SAVES], "nothing was saved after the flip"
    assert job.until_done(*flags) == [0], job.err
    assert quiet.until_done("--zero-stage", "0") == [0], quiet.err
    same(quiet.run, job.run)
