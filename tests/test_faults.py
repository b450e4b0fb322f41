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
import torch
from conftest import ROOT
from faulty import tensors
from test_bad_worlds import alive

from ascend_nb.checkpoint import RunDir, read_state
from ascend_nb.config import DataConfig, ModelConfig, ParallelConfig, RunConfig, TrainConfig
from ascend_nb.faults import parse_faults
from ascend_nb.guarding import GuardConfig
from ascend_nb.schema import dump_yaml

STEPS, EVERY = 12, 5
FAULTS = {  # name -> (faults in rank {r}, what the guard needs, steps done again after a restart: {processes: number}; empty: it went on; None: it ended properly)
    "kill": ("kill:rank={r},step=8", {}, {1: 7 - 5, 4: 0}),
    "hang": ("hang:rank={r},step=8", dict(step_timeout=4), {1: 0, 4: 0}),
    "error": ("error:rank={r},step=8", {}, {1: 0, 4: 0}),
    "SIGTERM": ("term:rank={r},step=8", {}, None),
    "disk full": ("disk_full:rank={r},step=10", {}, {1: 10 - 5, 4: 0}),
    "truncated checkpoint": ("truncate_ckpt:step=10; kill:rank={r},step=11", {}, {1: 10 - 5, 4: 0}),
    "nan": ("nan:rank={r},step=9", dict(step_retries=2), {}),
    "slow": ("slow:rank={r},step=3,seconds=0.3", {}, {}),
}
SENTENCE = "kill:rank=1,step=7; nan:step=9; disk_full:step=12; truncate_ckpt:step=10; hang:rank=0,step=5; slow:rank=2"


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
        run = RunDir(cfg.train.save)
        run.path.mkdir(parents=True, exist_ok=True)
        (run.path.with_suffix(".yaml")).write_text(dump_yaml(cfg))
        mark = f"ASCEND_NB_TEST_WORLD={os.getpid()}-{time.monotonic_ns()}"
        env = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT), "ASCEND_NB_LANG": "en", **dict([mark.split("=")])}
        job = subprocess.Popen([sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", str(n), "--rdzv-backend", "c10d", "--rdzv-endpoint", "localhost:0", "--max-restarts", str(restarts),
                                "-m", "ascend_nb.cli", "train", "--config", str(run.path.with_suffix(".yaml")), "--json", *(["--inject", fault] if fault else [])], env=env, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, start_new_session=True)
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
        self.cost = dict(re.findall(r"^(\w+:rank=\d+(?:,step=\d+)?): ([\d.]+) s until the run had done a step that it had not done before", self.err, re.M))

    def well(self, whole, again=None, faults=""):
        "It ended as the undisturbed run, bit for bit, alone, and said how long it took, for each fault; so many steps were done twice at each restart."
        last = max(whole.losses)
        assert self.code == 0 and self.result["steps"] == last, self.err[-3000:]
        assert self.losses == whole.losses and not self.orphans and not (self.run.path / "breath").exists() and not list(self.run.path.glob(".*.tmp-*"))
        assert read_state(self.run.step_path(last)) == read_state(whole.run.step_path(last))
        a, b = tensors(self.run.step_path(last)), tensors(whole.run.step_path(last))
        assert a.keys() == b.keys() and [k for k in a if not torch.equal(a[k], b[k])] == []
        print(self.back, self.cost)
        if again is not None: assert [int(n) for *_, n in self.back] == again, self.err[-3000:]
        assert self.cost.keys() == {str(f) for f in parse_faults(faults, 99) if f.kind != "slow"}, self.err[-3000:]
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
    run.well(calm, None if again is None else [again[n]] if again else [], faults.format(r=n - 1))
    if "truncate" in faults: assert re.search(r"step_0000010 is passed over: \S+ has \d+ bytes, its manifest says \d+", run.err)
    if again is None: assert "Stopped by SIGTERM and saved at step 8" in run.err
    if name == "nan": assert "step 9 is done again (1 of 2): a gradient norm of nan" in run.err
    if name == "slow" and n > 1: assert f"rank {n - 1} keeps the others waiting" in run.err


@pytest.mark.slow
def test_without_copies_the_checkpoint_interval_is_lost_and_said(make, whole):
    parallel = dict(tensor_model_parallel_size=2)
    calm = whole("no copies", 4, parallel, {})
    run = Run(make("no copies kill", parallel), 4, "kill:rank=1,step=8").well(calm, [7 - 5], "kill:rank=1,step=8")
    assert re.search(r"step_0000007\.\w+ is left out: 25% of the numbers were in rank 1 alone, .*replicate_optimizer keeps everything twice", run.err), run.err[-3000:]


@pytest.mark.slow
@pytest.mark.parametrize("stage", [0, 3])
def test_every_shard_lives_twice(make, whole, stage):
    "Four data parallel processes: without ZeRO each has everything; with it two groups of two do."
    parallel, guard = dict(zero_stage=stage), dict(replicate_optimizer=True)
    calm = Run(make(f"dp4 {stage}", parallel, guard, micro_batch_size=1), 4)
    run = Run(make(f"dp4 {stage} kill", parallel, guard, micro_batch_size=1), 4, "kill:rank=2,step=8").well(calm, [0], "kill:rank=2,step=8")
    assert "step 7 is put together from what 3 of 4 processes wrote" in run.err


@pytest.mark.slow
def test_six_faults_in_one_run(make):
    "Four processes, DP2 x TP2: one hangs, one is killed, a gradient is spoiled, a checkpoint is cut, a disk is full, one is slow all the time. No step is done again, and the end is that of a calm run."
    parallel, guard = dict(tensor_model_parallel_size=2), dict(replicate_optimizer=True)
    calm = Run(make("calm sixteen", parallel, guard, train_iters=16), 4)
    run = Run(make("six", parallel, {**guard, "step_timeout": 4, "step_retries": 2}, train_iters=16), 4, SENTENCE, restarts=3, timeout=400).well(calm, [0, 0, 0], SENTENCE)
    assert "step 9 is done again (1 of 2)" in run.err and "step_0000010 is passed over" in run.err and "rank 2 keeps the others waiting" in run.err


MOE = dict(num_hidden_layers=2, hidden_size=48, num_attention_heads=4, num_key_value_heads=2, model_type="qwen3_moe", qk_norm=True, num_experts=4, num_experts_per_tok=2, moe_intermediate_size=32, router_aux_loss_coef=.01)
TWICE = dict(replicate_optimizer=True)
PLACES = {  # name -> (parallel, guard, model, fault, steps done again)
    "a stage dies, the other group has it": (dict(pipeline_model_parallel_size=2), TWICE, None, "kill:rank=3,step=8", 0),
    "the first process of a pipeline dies": (dict(pipeline_model_parallel_size=2), TWICE, None, "kill:rank=0,step=8", 0),
    "a stage dies that nobody else has": (dict(pipeline_model_parallel_size=2, tensor_model_parallel_size=2), {}, None, "kill:rank=3,step=8", 7 - 5),
    "an error in stages and parts": (dict(pipeline_model_parallel_size=2, tensor_model_parallel_size=2), {}, None, "error:rank=2,step=8", 0),
    "an error in parts of parts": (dict(zero_stage=3, tensor_model_parallel_size=2), {}, None, "error:rank=1,step=8", 0),
    "experts die, the other group has them": (dict(expert_model_parallel_size=2), TWICE, MOE, "kill:rank=2,step=8", 0),
    "experts die that nobody else has": (dict(expert_model_parallel_size=2), {}, MOE, "kill:rank=2,step=8", 7 - 5),
    "an error among experts": (dict(expert_model_parallel_size=2, tensor_model_parallel_size=2), {}, MOE, "error:rank=3,step=8", 0),
}


@pytest.mark.slow
@pytest.mark.parametrize("place", PLACES)
def test_stages_and_experts(make, place):
    parallel, guard, model, fault, again = PLACES[place]
    shape = ModelConfig(**(model or dict(hidden_size=48, num_hidden_layers=4, num_attention_heads=4, num_key_value_heads=2)))
    calm, run = (replace(make(f"{place} {what}", parallel, guard, micro_batch_size=1), model=shape) for what in ("calm", "hurt"))
    calm = Run(calm, 4)
    assert calm.code == 0, calm.err[-3000:]
    run = Run(run, 4, fault).well(calm, [again], fault)
    if again: assert re.search(r"step_0000007\.\w+ is left out: (nobody has stage|\d+% of the numbers were in rank)", run.err), run.err[-3000:]
    else: assert "step 7 is put together from what" in run.err
