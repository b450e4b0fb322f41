"""Which steps a run records: those that were named, counted here from the trace's own operators, also in a run that goes on."""
import gzip
import json
import subprocess
import sys

import numpy as np
import pytest
import yaml
from ascend_nb.callbacks import Checkpointer
from ascend_nb.checkpoint import RunDir
from ascend_nb.config import ModelConfig, ProfilingConfig, TrainConfig
from ascend_nb.datasets import Loader, Sample, collate_gpt
from ascend_nb.losses import causal_lm_loss
from ascend_nb.model import Decoder
from ascend_nb.recording import Recorder
from ascend_nb.trainer import Callback, Trainer


class Marks(Callback):
    "Writes each step's number into the trace, by another way than the profiler's own counter."
    order = 5

    def before_step(self, t):
        import torch
        with torch.profiler.record_function(f"truly step {t.step + 1}"): pass


def trainer(callbacks, **kw):
    rows = np.random.RandomState(0).randint(0, 64, (64, 17))
    cfg = TrainConfig(**{**dict(train_iters=8, micro_batch_size=2, global_batch_size=4, device="cpu", save_interval=3), **kw})
    model = Decoder(ModelConfig(vocab_size=64, hidden_size=32, num_hidden_layers=2, num_attention_heads=2)).init_weights(0)
    return Trainer(model, cfg, Loader([Sample(r[:-1], r[1:]) for r in rows], 2, collate_gpt), causal_lm_loss, [*callbacks, Marks()])


def events(folder):
    path, = folder.glob("*.gz")
    with gzip.open(path) as f: return json.load(f)["traceEvents"]


def recorded(folder):
    found = events(folder)
    mine = sorted(int(e["name"].split("#")[1]) for e in found if e["name"].startswith("ProfilerStep#"))
    truly = sorted(int(e["name"].split()[-1]) for e in found if e["name"].startswith("truly step"))
    return mine, truly


@pytest.mark.parametrize("start, end, want", [(1, 3, [1, 2]), (4, 5, [4]), (7, 20, [7, 8])])
def test_the_named_steps_are_recorded(tmp_path, start, end, want):
    trainer([Recorder(ProfilingConfig(profile=True, profile_step_start=start, profile_step_end=end), tmp_path)]).fit()
    mine, truly = recorded(tmp_path)
    assert mine == truly == want
    assert sum(e["name"] == "aten::embedding" for e in events(tmp_path)) == 2 * len(want)  # two micro-batches a step


@pytest.mark.parametrize("start, want", [(5, [5, 6]), (4, [4, 5]), (2, [])])
def test_after_a_resume_the_numbers_are_those_of_the_log(tmp_path, start, want):
    "The run goes on from step 3: its fourth step is recorded as the fourth. Steps that are past are not."
    run = RunDir(tmp_path / "run")
    trainer([Checkpointer(run)], train_iters=3).fit()
    t = trainer([Recorder(ProfilingConfig(profile=True, profile_step_start=start, profile_step_end=start + 2), tmp_path / "p")])
    t.restore(run, 3)
    t.fit()
    assert t.step == 8
    if want: assert recorded(tmp_path / "p") == (want, want)
    else: assert not (tmp_path / "p").exists()


def test_an_error_keeps_what_was_recorded(tmp_path):
    class Fails(Callback):
        def before_update(self, t):
            if t.step == 4: raise RuntimeError("on purpose")

    with pytest.raises(RuntimeError, match="on purpose"):
        trainer([Recorder(ProfilingConfig(profile=True, profile_step_start=4, profile_step_end=9), tmp_path), Fails()]).fit()
    assert recorded(tmp_path)[1] == [4, 5]


def test_stack_shapes_and_memory_are_recorded_where_asked(tmp_path):
    for on in (False, True):
        trainer([Recorder(ProfilingConfig(profile=True, profile_step_start=2, profile_step_end=3, profile_with_stack=on, profile_with_memory=on, profile_record_shapes=on), tmp_path / str(on))]).fit()
    few, all_ = events(tmp_path / "False"), events(tmp_path / "True")
    for there in (lambda e: e.get("cat") == "python_function" and e["name"].startswith("nn.Module: "), lambda e: e["name"] == "[memory]", lambda e: e.get("args", {}).get("Input Dims")):
        assert not any(map(there, few)) and any(map(there, all_))


def test_the_run_is_the_same_with_and_without(tmp_path):
    a, b = trainer([]), trainer([Recorder(ProfilingConfig(profile=True, profile_step_start=3, profile_step_end=5), tmp_path)])
    a.fit(); b.fit()
    assert [r["loss"] for r in a.rows] == [r["loss"] for r in b.rows]


@pytest.mark.slow
def test_train_takes_modellinks_flags(tmp_path, samples):
    "A command line with every flag of ModelLink's, a run that is continued, and the command that reads the recording."
    words = [sys.executable, "-m", "ascend_nb.cli"]
    base = ["train", "--hidden-size", "32", "--num-hidden-layers", "1", "--num-attention-heads", "2", "--data-path", str(samples / "tales.jsonl"), "--tokenizer-name-or-path", str(samples / "tokenizer"),
            "--seq-length", "64", "--micro-batch-size", "2", "--device", "cpu", "--save", str(tmp_path / "run"), "--save-interval", "4", "--data-cache-path", str(tmp_path / "cache")]
    flags = ["--profile", "--profile-step-start", "6", "--profile-step-end", "8", "--profile-ranks", "0", "--profile-level", "level1", "--profile-with-cpu", "--profile-with-stack", "--profile-with-memory",
             "--profile-record-shapes", "--profile-save-path", str(tmp_path / "prof"), "--profile-export-type", "text"]
    for more in (["--train-iters", "4"], ["--train-iters", "9", *flags, "--resume", "must"]):
        out = subprocess.run([*words, *base, *more], capture_output=True, text=True)
        assert out.returncode == 0, out.stderr
    assert recorded(tmp_path / "prof")[0] == [6, 7]
    assert yaml.safe_load((tmp_path / "run/config.yaml").read_text())["profiling"]["profile_level"] == "level1"


def test_who_holds_memory_in_torchs_trace(tmp_path):
    "The largest sum of live pieces is what torch's own counter says at that moment."
    from ascend_nb.profile_files import open_profile
    from ascend_nb.profile_views import memory_curve, peak_owners
    trainer([Recorder(ProfilingConfig(profile=True, profile_step_start=2, profile_step_end=3, profile_with_memory=True), tmp_path)]).fit()
    p = open_profile(tmp_path)
    totals = [e["args"]["Total Allocated"] for e in events(tmp_path) if e["name"] == "[memory]"]
    assert memory_curve(p, 0).allocated.max() == pytest.approx(max(totals) / 2**20)
    assert peak_owners(p, 0, 1000).mb.sum() == pytest.approx(max(totals) / 2**20) and p.table("steps").step.tolist() == [2]
