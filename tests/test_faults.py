"""Faults made on purpose, under the real torchrun: the run starts again by itself, ends with the loss of an undisturbed one, and leaves nobody behind."""
import json
import os
import re
import signal
import subprocess
import sys
import time
from dataclasses import replace

import pytest
from conftest import ROOT
from test_bad_worlds import alive

from ascend_nb.checkpoint import RunDir, read_state
from ascend_nb.config import DataConfig, ModelConfig, ParallelConfig, RunConfig, TrainConfig
from ascend_nb.guarding import GuardConfig
from ascend_nb.schema import dump_yaml

STEPS, EVERY = 12, 5
FAULTS = {  # name -> (faults in rank {r}, what the guard needs, steps done again: {processes: number}; None: it ended properly)
    "kill": ("kill:rank={r},step=8", {}, {1: 7 - 5, 4: 0}),
    "hang": ("hang:rank={r},step=8", dict(step_timeout=4), {1: 0, 4: 0}),
    "error": ("error:rank={r},step=8", {}, {1: 0, 4: 0}),
    "SIGTERM": ("term:rank={r},step=8", {}, None),
    "disk full": ("disk_full:rank={r},step=10", {}, {1: 10 - 5, 4: 0}),
    "truncated checkpoint": ("truncate_ckpt:step=10; kill:rank={r},step=11", {}, {1: 10 - 5, 4: 0}),
}


@pytest.fixture(scope="module")
def make(samples, tmp_path_factory):
    "(name, parallel, guard) -> RunConfig of a run of 12 steps that saves each fifth."
    folder = tmp_path_factory.mktemp("faults")
    def config(name, parallel=None, guard=None, **train):
        data = DataConfig(data_path=[str(samples / "tales.jsonl")], handler_name="GeneralPretrainHandler", tokenizer_name_or_path=str(samples / "tokenizer"), seq_length=64, split="100,0,0",
                          data_cache_path=str(folder / "cache"))
        model = ModelConfig(hidden_size=48, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2)
        t = TrainConfig(**{**dict(save=str(folder / name.replace(" ", "_")), train_iters=STEPS, micro_batch_size=2, global_batch_size=4, lr=3e-3, device="cpu", save_interval=EVERY, deterministic=True), **train})
        return RunConfig(model, data, train=t, parallel=ParallelConfig(**(parallel or {})), guard=GuardConfig(**(guard or {})))
    return config


class Run:
    "What torchrun left of a training."
    def __init__(self, cfg, n, fault="", restarts=1, timeout=240):
        run, cfg = RunDir(cfg.train.save), replace(cfg, guard=replace(cfg.guard, inject=fault))
        run.path.mkdir(parents=True, exist_ok=True)
        (run.path.with_suffix(".yaml")).write_text(dump_yaml(cfg))
        mark = f"ASCEND_NB_TEST_WORLD={os.getpid()}-{time.monotonic_ns()}"
        env = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT), "ASCEND_NB_LANG": "en", **dict([mark.split("=")])}
        job = subprocess.Popen([sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", str(n), "--rdzv-backend", "c10d", "--rdzv-endpoint", "localhost:0", "--max-restarts", str(restarts),
                                "-m", "ascend_nb.cli", "train", "--config", str(run.path.with_suffix(".yaml")), "--json"], env=env, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, start_new_session=True)
        try: self.out, self.err = job.communicate(timeout=timeout)
        except subprocess.TimeoutExpired:
            os.killpg(job.pid, signal.SIGKILL)
            self.out, self.err = job.communicate()
        self.code, self.run = job.returncode, run
        until = time.monotonic() + 5
        while (left := alive(mark)) and time.monotonic() < until: time.sleep(.1)
        for pid in left: os.kill(pid, signal.SIGKILL)
        self.orphans, self.result = left, json.loads(self.out.strip().splitlines()[-1]) if self.code == 0 else None
        self.losses = {r["step"]: r["loss"] for r in run.rows() if "loss" in r}
        self.began = [r["step"] for r in run.rows() if r.get("event") in ("start", "resume")]
        self.back = re.findall(r"recovered ([\d.]+) s after.* at step (\d+); (\d+) steps were done again", self.err)

    def well(self, whole, again=None):
        "It ended as the undisturbed run, bit for bit, alone, and said how long it took; so many steps were done twice."
        assert self.code == 0 and self.result["steps"] == STEPS, self.err[-3000:]
        assert self.losses == whole.losses and not self.orphans and not (self.run.path / "breath").exists()
        assert read_state(self.run.step_path(STEPS)) == read_state(whole.run.step_path(STEPS))
        if again is not None:
            print(self.back)
            assert [int(n) for *_, n in self.back] == [again], self.err[-3000:]
        return self


GRIDS = {  # name -> (processes, parallel, guard)
    "one process": (1, {}, {}),
    "DP2 x TP2": (4, dict(tensor_model_parallel_size=2), dict(replicate_optimizer=True)),
}


@pytest.fixture(scope="module")
def whole(make):
    "grid -> its undisturbed run, made once."
    made = {}
    def get(grid, n, parallel, guard):
        if grid not in made: made[grid] = Run(make(f"whole {grid}", parallel, guard), n)
        assert made[grid].code == 0 and len(made[grid].losses) == STEPS, made[grid].err[-3000:]
        return made[grid]
    return get


CASES = [pytest.param(name, grid, marks=() if (name, n) == ("error", 1) else pytest.mark.slow) for grid, (n, *_) in GRIDS.items() for name in FAULTS]


@pytest.mark.parametrize(("name", "grid"), CASES)
def test_the_run_ends_as_if_nothing_had_happened(make, whole, name, grid):
    n, parallel, guard = GRIDS[grid]
    faults, more, again = FAULTS[name]
    calm = whole(grid, n, parallel, guard)
    run = Run(make(f"{name} {grid}", parallel, {**guard, **more}), n, faults.format(r=n - 1))
    run.well(calm, again and again[n])
    if "truncate" in faults: assert re.search(r"step_0000010 is passed over: \S+ has \d+ bytes, its manifest says \d+", run.err)
    if again is None: assert "Stopped by SIGTERM and saved at step 8" in run.err


@pytest.mark.slow
def test_without_copies_the_checkpoint_interval_is_lost_and_said(make, whole):
    parallel = dict(tensor_model_parallel_size=2)
    calm = whole("no copies", 4, parallel, {})
    run = Run(make("no copies kill", parallel), 4, "kill:rank=1,step=8").well(calm, 7 - 5)
    assert re.search(r"step_0000007\.\w+ is left out: 25% of the numbers were in rank 1 alone, .*replicate_optimizer keeps everything twice", run.err), run.err[-3000:]


@pytest.mark.slow
@pytest.mark.parametrize("stage", [0, 3])
def test_every_shard_lives_twice(make, whole, stage):
    "Four data parallel processes: without ZeRO each has everything; with it two groups of two do."
    parallel, guard = dict(zero_stage=stage), dict(replicate_optimizer=True)
    calm = Run(make(f"dp4 {stage}", parallel, guard, micro_batch_size=1), 4)
    run = Run(make(f"dp4 {stage} kill", parallel, guard, micro_batch_size=1), 4, "kill:rank=2,step=8").well(calm, 0)
    assert "step 7 is put together from what 3 of 4 processes wrote" in run.err
