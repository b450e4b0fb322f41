"""Deterministic mode: the same bits twice, and after a stop in the middle; refused where it would come too late."""
import os
from dataclasses import replace

import pytest
import torch
import torch.distributed as dist
from safetensors.torch import load_file
from test_training import config, data  # noqa: F401  fixtures: tiny runs on the samples

from ascend_nb import training
from ascend_nb.checkpoint import RunDir
from ascend_nb.config import RunConfig
from ascend_nb.core import DETERMINISTIC, UserError, make_deterministic
from ascend_nb.mesh import launch
from ascend_nb.schema import parse_args
from ascend_nb.trainer import Callback

MOE = dict(model_type="mixtral", norm_topk_prob=True, num_experts=4, num_experts_per_tok=2, intermediate_size=32, moe_intermediate_size=32)


@pytest.fixture(autouse=True)
def as_before(monkeypatch):
    for name in DETERMINISTIC: monkeypatch.delenv(name, raising=False)
    yield
    torch.use_deterministic_algorithms(False)
    for name in DETERMINISTIC: os.environ.pop(name, None)


class StopAt(Callback):
    def __init__(self, step): self.step = step
    def after_step(self, t):
        if t.step == self.step: t.stop("enough")


def weights(cfg):
    "The bytes of every tensor of the newest step."
    folder = RunDir(cfg.train.save).step_path(cfg.train.train_iters)
    return {n: t.numpy().tobytes() for p in sorted(folder.glob("*.safetensors")) for n, t in load_file(p).items()}


@pytest.mark.parametrize("model", [{}, MOE], ids=["dense", "experts"])
def test_two_runs_and_a_resumed_one_have_the_same_bits(config, model):  # noqa: F811
    runs = [config(name, train_iters=8, save_interval=4, deterministic=True, model=model) for name in ("a", "b", "c")]
    for cfg in runs[:2]: training.run(cfg, json=True)
    job = training.build(runs[2], callbacks=[StopAt(4)])
    with job.run.lock():
        training.save_yaml(job.cfg, job.run.config_path)
        job.trainer.fit()
    torch.manual_seed(99)  # what a new process would not know
    training.run(runs[2], json=True)
    a, b, c = map(weights, runs)
    assert torch.are_deterministic_algorithms_enabled() and a and a == b == c


def bits(run, step):
    "The bytes of every tensor in every file of a step: of weights, moments, generators."
    folder = RunDir(run).step_path(step)
    return {(p.name, n): t.numpy().tobytes() for p in sorted(folder.glob("*.safetensors")) for n, t in load_file(p).items()}


@pytest.mark.parametrize("model", [[], pytest.param(["--model-type", "mixtral", "--norm-topk-prob", "--num-experts", "4", "--num-experts-per-tok", "2", "--intermediate-size", "32",
                                                     "--moe-intermediate-size", "32"], marks=pytest.mark.slow)], ids=["dense", "experts"])
def test_two_processes_have_the_same_bits_twice_and_after_a_stop(data, samples, tmp_path, model):  # noqa: F811
    def train(save, steps, *more):
        flags = ["--data-path", data / "tales_text_document", "--tokenizer-name-or-path", samples / "tokenizer", "--hidden-size", "48", "--num-hidden-layers", "2", "--num-attention-heads", "4",
                 "--num-key-value-heads", "2", "--seq-length", "32", "--micro-batch-size", "2", "--global-batch-size", "4", "--lr", "3e-3", "--lr-decay-iters", "6", "--save-interval", "3",
                 "--tensor-model-parallel-size", "2", "--sequence-parallel", "--deterministic", "--device", "cpu", *model]
        outs = launch(["-m", "ascend_nb.cli", "train", *flags, "--train-iters", steps, "--save", tmp_path / save, *more], 2)
        assert [code for code, *_ in outs] == [0, 0], outs
    train("a", 6)
    train("b", 3)
    a, b = bits(tmp_path / "a", 3), bits(tmp_path / "b", 3)
    assert len({name for name, _ in a}) == 2 and any(n.startswith("optim.") for _, n in a) and a == b
    train("b", 6, "--resume", "must")
    a, b = bits(tmp_path / "a", 6), bits(tmp_path / "b", 6)
    assert a and a == b


def test_another_seed_has_other_bits(config):  # noqa: F811
    a, b = (config(f"seed{s}", train_iters=2, save_interval=2, deterministic=True, seed=s) for s in (1, 2))
    for cfg in (a, b): training.run(cfg, json=True)
    assert weights(a) != weights(b)


def test_the_variables_are_set_before_a_process_group_and_refused_after(tmp_path):
    dist.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    try:
        with pytest.raises(UserError, match="process group that was made without HCCL_DETERMINISTIC"): make_deterministic()
        assert not torch.are_deterministic_algorithms_enabled()
        os.environ["HCCL_DETERMINISTIC"] = "true"
        make_deterministic()
    finally: dist.destroy_process_group()
    assert all(os.environ[k] == v for k, v in DETERMINISTIC.items())


@pytest.mark.parametrize("flag", ["--deterministic", "--use-deter-comp", "--npu-deterministic"])
def test_flags(flag):
    out = parse_args(RunConfig, [flag], "ascend_nb train")
    cfg = out if isinstance(out, RunConfig) else out[0]
    assert cfg.train.deterministic and not replace(cfg.train, deterministic=False).deterministic
