"""Steps that are written while training goes on are the steps that would have been written at once; a write that is cut off leaves nothing."""
import json
import os
import signal
import subprocess
import sys
import threading
import time

import pytest
from async_worker import Disk, same, train
from conftest import ROOT
from test_trainer import samples as texts
from test_trainer import trainer

from ascend_nb import checkpoint, training
from ascend_nb.callbacks import Checkpointer
from ascend_nb.checkpoint import RunDir
from ascend_nb.config import DataConfig, ModelConfig, ParallelConfig, RunConfig, TrainConfig
from ascend_nb.core import UserError
from ascend_nb.mesh import Mesh, Sizes, launch
from ascend_nb.schema import dump_yaml
from ascend_nb.trainer import Callback

STEPS = "step_0000003", "step_0000006", "step_0000008"


pytestmark = pytest.mark.usefixtures("one_thread")


def one_at_a_time(log):
    "Writes begin and end by turns, and the run was two steps further, or over, when each ended."
    assert [row[0] for row in log] == ["begin", "end"] * 3 and [row[1] for row in log[1::2]] == [3, 6, 8], log
    assert [row[2] >= min(row[1] + 2, 8) for row in log[1::2]] == [True] * 3, log


def test_a_step_is_what_it_was_when_it_was_begun(tmp_path):
    "Weights change while they are written; the files do not."
    disk = Disk()
    train(tmp_path / "sync", Mesh(Sizes()), ParallelConfig())
    train(tmp_path / "async", Mesh(Sizes()), ParallelConfig(), [disk], async_save=True)
    one_at_a_time(disk.log)
    assert all(same(tmp_path / "sync" / s, tmp_path / "async" / s) > 50 for s in STEPS)


@pytest.mark.parametrize("grid", [dict(tensor_model_parallel_size=2), pytest.param(dict(zero_stage=3), marks=pytest.mark.slow),
                                  pytest.param(dict(pipeline_model_parallel_size=2), marks=pytest.mark.slow)])
def test_many_processes_write_together(tmp_path, grid):
    outs = launch([ROOT / "tests" / "async_worker.py", tmp_path, json.dumps(grid)], 2, 300)
    assert all(code == 0 for code, *_ in outs), "\n".join(err[-2500:] for code, _, err in outs if code)
    for row in (json.loads(out) for _, out, _ in outs):
        one_at_a_time(row["log"])
        assert min(row["same"]) > 50
        key, text = row["error"]  # one process's disk was full: both are told, and what was whole stays
        assert key == "step_io" and "No space left on device" in text and row["left"] == ["step_0000003"], row


class At(Callback):
    "Do something after a step."
    order = 90
    def __init__(self, step, do): self.step, self.do = step, do
    def after_step(self, t):
        if t.step == self.step: self.do(t)


def slow(monkeypatch, seconds, fails=()):
    "A disk that takes its time; writes of these numbers fail."
    real, n = checkpoint.write_tensors, []
    def write(*args):
        n.append(threading.current_thread() is threading.main_thread())
        time.sleep(seconds)
        if len(n) in fails: raise UserError("step_io", path=args[0], why="No space left on device")
        real(*args)
    monkeypatch.setattr(checkpoint, "write_tensors", write)
    return n


def test_a_stop_and_an_error_wait_for_the_step_on_its_way(tmp_path, monkeypatch):
    slow(monkeypatch, .5)
    t = trainer([Checkpointer(RunDir(tmp_path / "stop")), At(4, lambda t: t.stop("SIGTERM"))], save_interval=3, async_save=True).fit()
    assert t.step == 4 and RunDir(tmp_path / "stop").steps() == [3, 4]
    def break_down(t): raise UserError("no_valid")
    with pytest.raises(UserError, match="no trained token"): trainer([Checkpointer(RunDir(tmp_path / "error")), At(4, break_down)], save_interval=3, async_save=True).fit()
    assert RunDir(tmp_path / "error").steps() == [3]


def test_old_steps_go_when_the_new_one_is_whole(tmp_path, monkeypatch):
    run, seen = RunDir(tmp_path), {}
    main = slow(monkeypatch, .3)
    watch = [At(n, lambda t: seen.update({t.step: run.steps()})) for n in (1, 2, 4)]
    trainer([Checkpointer(run), *watch], save_interval=2, keep_last=1, train_iters=5, async_save=True, data=texts(64)).fit()
    assert seen == {1: [], 2: [], 4: [2]} and run.steps() == [5] and main == [False] * 3


def test_a_failed_write_is_told_at_the_next_step(tmp_path, monkeypatch):
    run, reached = RunDir(tmp_path), []
    slow(monkeypatch, 0, fails=[2])
    wait = [At(n, lambda t: (reached.append(t.step), time.sleep(.2))) for n in range(1, 9)]
    with pytest.raises(UserError, match="No space left on device"): trainer([Checkpointer(run), *wait], save_interval=2, async_save=True).fit()
    assert reached == [1, 2, 3, 4] and run.steps() == [2] and not list(tmp_path.glob(".step_*"))


DRIVER = '''
import sys, time, os
from ascend_nb import checkpoint
from ascend_nb.cli import main
real, n = checkpoint.write_tensors, []
def write(*args):
    real(*args)
    n.append(1)
    if len(n) == 2: open(sys.argv[2] + "-" + os.environ.get("RANK", "0"), "w").close(); time.sleep(600) # all is on the disk but the manifest
checkpoint.write_tensors = write
sys.exit(main(["train", "--config", sys.argv[1], "--json"]))
'''


@pytest.fixture
def config(samples, tmp_path):
    def make(save, **train):
        more = dict(save=str(tmp_path / save), train_iters=12, micro_batch_size=2, global_batch_size=4, lr=3e-3, device="cpu", save_interval=3)
        return RunConfig(ModelConfig(hidden_size=48, num_hidden_layers=2, num_attention_heads=2, num_key_value_heads=2),
                         DataConfig(data_path=[str(samples / "tales.jsonl")], handler_name="GeneralPretrainHandler", tokenizer_name_or_path=str(samples / "tokenizer"), seq_length=64, split="90,10,0",
                                    data_cache_path=str(tmp_path / "cache")), train=TrainConfig(**{**more, **train}))
    return make


def killed_in_a_write(cfg, path, n):
    "Start n processes, and kill all of them without a word while the second step is written."
    path.write_text(dump_yaml(cfg))
    env = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    if n > 1: env |= dict(WORLD_SIZE=str(n), MASTER_ADDR="127.0.0.1", MASTER_PORT=str(__import__("ascend_nb.mesh").mesh.free_port()))
    jobs = [subprocess.Popen([sys.executable, "-c", DRIVER, str(path), str(path) + ".dying"], env={**env, **(dict(RANK=str(r), LOCAL_RANK=str(r)) if n > 1 else {})},
                             stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) for r in range(n)]
    end = time.monotonic() + 120
    while not all((path.parent / f"{path.name}.dying-{r}").exists() for r in range(n)) and time.monotonic() < end:
        assert all(j.poll() is None for j in jobs), jobs[0].stderr.read()
        time.sleep(.02)
    time.sleep(.3)  # training goes on in the meantime
    for j in jobs: j.send_signal(signal.SIGKILL)
    for j in jobs: j.communicate()


@pytest.mark.parametrize("n", [1, pytest.param(2, marks=pytest.mark.slow)])
def test_killed_in_the_background_nothing_has_the_final_name(config, tmp_path, n):
    whole = training.run(config("whole"), json=True)
    cfg = config("killed", async_save=True)
    killed_in_a_write(cfg, tmp_path / "run.yaml", n)
    run = RunDir(cfg.train.save)
    assert list(run.folders()) == [3] and run.latest() == 3 and len(list(run.path.glob(".step_0000006.tmp-*"))) == 1
    assert max(r["step"] for r in run.rows() if "loss" in r) > 6  # the loop had not waited
    again = training.run(cfg, json=True)
    assert again["steps"] == 12 and abs(again["loss"] - whole["loss"]) < 1e-5 and not list(run.path.glob(".*.tmp-*"))
    if n == 1: assert same(run.step_path(12), RunDir(str(tmp_path / "whole")).step_path(12)) > 50
