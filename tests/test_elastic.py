"""A run that goes on with fewer hosts, and with more again: the same steps, the same samples, each once."""
import json
import os
import signal
import socket
import subprocess
import sys
import time
from dataclasses import replace

import psutil
import pytest
from conftest import ROOT
from test_bad_worlds import alive

from ascend_nb.checkpoint import RunDir
from ascend_nb.config import DataConfig, ModelConfig, ParallelConfig, RunConfig, TrainConfig
from ascend_nb.core import UserError
from ascend_nb.datasets import Loader
from ascend_nb.guarding import GuardConfig
from ascend_nb.mesh import launch
from ascend_nb.schema import dump_yaml
from ascend_nb.spread import with_copies
from ascend_nb.training import find_resume


def steps(world, micro, total, consumed=0, n=3):
    "The sample numbers of each of n steps, of all processes of a data parallel group together."
    loaders = [Loader(range(1000), micro, list, consumed, r, world) for r in range(world)]
    return [sorted(i for x in loaders for _ in range(total // (micro * world)) for i in next(x)) for _ in range(n)], loaders[0].state_dict()["consumed"]


@pytest.mark.parametrize("worlds", [(4, 2, 1), (2, 4, 2), (1, 4, 1)])
def test_each_sample_once_whatever_the_number_of_processes(worlds):
    out, consumed = [], 0
    for world in worlds:
        some, consumed = steps(world, 2, 8, consumed)
        out += some
    assert out == [list(range(8 * i, 8 * i + 8)) for i in range(9)]


SPY = """
import json, os, sys
from ascend_nb.cli import main
from ascend_nb.datasets import Loader
from ascend_nb.parallel_trainer import ParallelTrainer
read, step, ids = Loader.__next__, ParallelTrainer.one_step, []

class Seen:
    def __init__(self, data): self.data = data
    def __len__(self): return len(self.data)
    def __getattr__(self, name): return getattr(self.data, name)
    def __getitem__(self, i): ids.append(i); return self.data[i]

def spied(self):
    if not isinstance(self.dataset, Seen): self.dataset = Seen(self.dataset)
    return read(self)

def logged(self):
    ids.clear()
    step(self)
    if self.mesh.tp == 0:
        with open(FILE, "a") as f: f.write(json.dumps([self.step, self.mesh.sizes.data, ids]) + "\\n")

Loader.__next__, ParallelTrainer.one_step = spied, logged
if code := main(["train", *WORDS]): os._exit(code)
"""


@pytest.mark.slow
def test_the_samples_of_each_step_are_the_same_whatever_the_number_of_processes(tmp_path, samples):
    "Real runs: four data parallel processes until step 4, one with half a model in each of two until 8, one alone until 12. The numbers of the samples are written down where they are read."
    def go(save, n, *flags):
        words = ["--data-path", samples / "tales.jsonl", "--tokenizer-name-or-path", samples / "tokenizer", "--data-cache-path", tmp_path / "cache", "--seq-length", "64", "--split", "100,0,0", "--hidden-size", "48",
                 "--num-hidden-layers", "2", "--num-attention-heads", "2", "--num-key-value-heads", "2", "--train-iters", "12", "--micro-batch-size", "2", "--global-batch-size", "8", "--lr", "3e-3", "--device", "cpu", "--save", tmp_path / save, *flags]
        outs = launch(SPY.replace("FILE", repr(str(tmp_path / f"{save}.jsonl"))).replace("WORDS", repr([str(w) for w in words])), n, 240)
        assert RunDir(tmp_path / save).steps(), outs
    go("calm", 1)
    go("spread", 4, "--inject", "term:rank=2,step=4")
    go("spread", 2, "--tensor-model-parallel-size", "2", "--inject", "term:rank=0,step=8")
    go("spread", 1)
    seen, worlds = {}, {}
    for name in ("calm", "spread"):
        for step, world, ids in map(json.loads, (tmp_path / f"{name}.jsonl").read_text().splitlines()):
            seen.setdefault((name, step), []).extend(ids)
            worlds.setdefault(name, {})[step] = world
    assert list(worlds["spread"].values()) == [4] * 4 + [1] * 8 and set(worlds["calm"].values()) == {1}
    a, b = ([sorted(seen[name, step]) for step in range(1, 13)] for name in ("calm", "spread"))
    assert a == b and sorted(i for x in b for i in x) == list(range(96)), "each of 12 x 8 samples once, in its step"
    x, y = ([r["loss"] for r in RunDir(tmp_path / name).rows() if "loss" in r] for name in ("calm", "spread"))
    assert len(x) == len(y) == 12 and max(abs(p - q) for p, q in zip(x, y, strict=True)) < 1e-5


def test_a_batch_that_fits_no_more_is_refused(tmp_path, samples):
    "8 samples in a step, 2 at once: 4 data parallel processes or fewer, but not 3."
    t = TrainConfig(micro_batch_size=2, global_batch_size=8)
    assert [t.accumulation(dp) for dp in (4, 2, 1)] == [1, 2, 4]
    with pytest.raises(UserError, match="Found global_batch_size=8; expected a multiple of micro_batch_size x data parallel size = 6"): t.accumulation(3)


def test_a_step_without_a_global_batch_size_depends_on_the_processes(tmp_path, monkeypatch):
    "Then fewer processes would be another training; the sentence says so before anything happens."
    from ascend_nb.checkpoint import save_step
    from ascend_nb.schema import save_yaml
    import torch
    cfg, run = RunConfig(train=TrainConfig(save=str(tmp_path), micro_batch_size=2)), RunDir(tmp_path)
    monkeypatch.setenv("RANK", "0"); monkeypatch.setenv("WORLD_SIZE", "4")
    save_yaml(replace(cfg, train=replace(cfg.train, global_batch_size=8)), run.config_path)
    save_step(run.step_path(3), {"model.w": torch.zeros(2)}, dict(step=3))
    assert find_resume(run, cfg) == 3
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(UserError, match="samples in a step: 8 -> 4"): find_resume(run, cfg)


def test_two_copies_of_everything_or_a_sentence(monkeypatch):
    two = GuardConfig(replicate_optimizer=True)
    assert with_copies(two, ParallelConfig(), 8).fsdp_size == 4 and with_copies(two, ParallelConfig(fsdp_size=2), 8).fsdp_size == 2
    assert with_copies(two, ParallelConfig(zero_stage=0), 3) == ParallelConfig(zero_stage=0)
    for p, world in ((ParallelConfig(), 5), (ParallelConfig(), 1), (ParallelConfig(fsdp_size=4), 4), (ParallelConfig(tensor_model_parallel_size=2), 2)):
        with pytest.raises(UserError, match="expected an even number of them, or an fsdp_size that leaves two groups"): with_copies(two, p, world)
    monkeypatch.setenv("TORCHELASTIC_RESTART_COUNT", "1")
    assert with_copies(two, ParallelConfig(), 1) == ParallelConfig()  # all but one have died: go on


class Host:
    "An agent of torchrun with two workers, as on a machine of its own. Where hosts may join later, torchrun must not share its store with them (torch 2.13: the newcomer waits for an address that nobody writes)."
    def __init__(self, port, config, mark, first=False):
        words = [sys.executable, "-m", "torch.distributed.run", "--nnodes", "1:2", "--nproc-per-node", "2", "--rdzv-backend", "c10d", "--rdzv-endpoint", f"localhost:{port}", "--rdzv-id", "elastic",
                 "--rdzv-conf", f"is_host={int(first)},last_call_timeout=3,keep_alive_interval=1,keep_alive_max_attempt=3", "--max-restarts", "3", "-m", "ascend_nb.cli", "train", "--config", str(config), "--json"]
        self.log = open(str(config) + f".{time.monotonic_ns()}.log", "w+")  # noqa: SIM115
        self.job = subprocess.Popen(words, stdout=self.log, stderr=self.log, start_new_session=True, env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT), "ASCEND_NB_LANG": "en", "TORCH_DISABLE_SHARE_RDZV_TCP_STORE": "1", **dict([mark.split("=")])})

    def vanish(self):
        "The machine loses its power."
        everyone = [psutil.Process(self.job.pid), *psutil.Process(self.job.pid).children(recursive=True)]
        for p in everyone: p.send_signal(signal.SIGKILL)
        self.job.wait()

    def text(self):
        self.log.flush()
        with open(self.log.name) as f: return f.read()


def until(what, host, seconds=180):
    end = time.monotonic() + seconds
    while not what() and time.monotonic() < end and host.job.poll() is None: time.sleep(.1)
    assert what(), host.text()[-4000:]


@pytest.mark.slow
def test_a_host_is_lost_and_another_one_comes(tmp_path, samples):
    "DP2 x TP2 on two hosts, TP2 on the one that is left, DP2 x TP2 again: the losses are those of a run that nobody disturbed."
    data = DataConfig(data_path=[str(samples / "tales.jsonl")], handler_name="GeneralPretrainHandler", tokenizer_name_or_path=str(samples / "tokenizer"), seq_length=64, split="100,0,0", data_cache_path=str(tmp_path / "cache"))
    train = TrainConfig(save=str(tmp_path / "run"), train_iters=60, micro_batch_size=2, global_batch_size=4, lr=3e-3, device="cpu")
    cfg = RunConfig(ModelConfig(hidden_size=48, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2), data, train=train, parallel=ParallelConfig(tensor_model_parallel_size=2),
                    guard=GuardConfig(replicate_optimizer=True, inject="slow:rank=0,seconds=0.4"))
    (tmp_path / "run.yaml").write_text(dump_yaml(cfg))
    calm = replace(cfg, train=replace(train, save=str(tmp_path / "calm")), parallel=ParallelConfig(), guard=GuardConfig())
    from ascend_nb import training
    training.run(calm, json=True)
    run, mark = RunDir(train.save), f"ASCEND_NB_TEST_WORLD={os.getpid()}-{time.monotonic_ns()}"
    at = lambda: max([r["step"] for r in run.rows() if "loss" in r], default=0)
    began = lambda: [(r["event"], r["step"]) for r in run.rows() if "event" in r]
    with socket.socket() as s: s.bind(("127.0.0.1", 0)); port = s.getsockname()[1]
    first, third = Host(port, tmp_path / "run.yaml", mark, first=True), None
    time.sleep(1)
    second = Host(port, tmp_path / "run.yaml", mark)
    try:
        until(lambda: at() >= 5, first)
        second.vanish()
        gone = at()
        until(lambda: len(began()) == 2 and at() > gone + 3, first)
        third = Host(port, tmp_path / "run.yaml", mark)
        until(lambda: len(began()) == 3, first)
        assert first.job.wait(180) == 0, first.text()[-4000:]
        assert third.job.wait(30) == 0, third.text()[-4000:]
    finally:
        left = alive(mark)
        for pid in left: os.kill(pid, signal.SIGKILL)
    assert not left
    text = first.text()
    assert text.count("grid      tp=2 dp=2") + third.text().count("grid      tp=2 dp=2") == 2 and "is put together from what 2 of 4 processes wrote" in text
    got, want = ([(r["step"], r["consumed_samples"], r["loss"]) for r in RunDir(d).rows() if "loss" in r] for d in (train.save, calm.train.save))
    assert [x[:2] for x in got] == [x[:2] for x in want] == [(i, 4 * i) for i in range(1, 61)]
    assert max(abs(a[2] - b[2]) for a, b in zip(got, want, strict=True)) < 1e-5
