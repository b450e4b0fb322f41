"""Real jobs: they outlive their kernel, are found again, end as asked, and leave nobody behind."""
import signal
import subprocess
import sys
import time
from dataclasses import replace

import psutil
import pytest
from conftest import ROOT

from ascend_nb import jobs
from ascend_nb.config import DataConfig, ModelConfig, PreprocessConfig, RunConfig, TrainConfig
from ascend_nb.core import UserError
from ascend_nb.keeper import family
from ascend_nb.preprocess import run as preprocess
from ascend_nb.schema import save_yaml


@pytest.fixture(scope="module")
def config(samples, tmp_path_factory):
    "(name, steps, more) -> RunConfig of a small run."
    folder = tmp_path_factory.mktemp("jobs")
    preprocess(PreprocessConfig(input=str(samples / "tales.jsonl"), output_prefix=str(folder / "tales"), tokenizer_name_or_path=str(samples / "tokenizer")), json=True)
    model = ModelConfig(hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4)
    data = DataConfig(data_path=[str(folder / "tales_text_document")], tokenizer_name_or_path=str(samples / "tokenizer"), seq_length=32, split="100,0,0")
    return lambda name, steps, **kw: RunConfig(model=model, data=data, train=TrainConfig(
        **{**dict(train_iters=steps, lr_decay_iters=50, micro_batch_size=2, global_batch_size=4, save=str(folder / name), eval_interval=0, save_interval=0, device="cpu"), **kw}))


def until(what, seconds=60):
    end = time.monotonic() + seconds
    while not what() and time.monotonic() < end: time.sleep(.05)
    assert what()


def losses(job): return {r["step"]: r["loss"] for r in job.run.rows() if "loss" in r}


KERNEL = """
import os, signal, sys
from ascend_nb import jobs
from ascend_nb.config import RunConfig
from ascend_nb.schema import load_yaml
jobs.launch(load_yaml(RunConfig, sys.argv[1]), nproc=2)
os.kill(os.getpid(), signal.SIGKILL)
"""


def test_a_killed_kernel_leaves_the_run_going(config, tmp_path):
    cfg = config("survivor", 2000)
    save_yaml(cfg, tmp_path / "run.yaml")
    kernel = subprocess.Popen([sys.executable, "-c", KERNEL, str(tmp_path / "run.yaml")], cwd=ROOT)
    assert kernel.wait(60) == -signal.SIGKILL
    job = jobs.attach(cfg.train.save)
    until(lambda: job.state == "running")
    with pytest.raises(UserError, match="expected a run folder that nobody uses"): jobs.launch(cfg, nproc=2)
    everyone = family(job.started["keeper"])
    assert len(everyone) == 3  # torchrun and two workers
    assert job.stop() == "stopping"
    assert job.stop() in ("stopping", "stopped")  # asked twice: its processes are ended
    assert job.wait(30) == "stopped"
    assert not [p for p in everyone if p.is_running() and p.status() != psutil.STATUS_ZOMBIE]
    with pytest.raises(UserError, match="expected one that stop means something to"): job.stop()


@pytest.mark.slow
def test_a_worker_that_is_killed_starts_again_from_the_newest_step(config):
    whole = jobs.launch(config("whole", 200, save_interval=20, lr_decay_iters=200, log_interval=10))
    assert whole.wait(60) == "finished", whole.tail()
    job = jobs.launch(config("hurt", 200, save_interval=20, lr_decay_iters=200, log_interval=10), max_restarts=1)
    until(lambda: job.run.steps())
    worker = next(p for p in family(job.started["keeper"]) if "ascend_nb.cli" in p.cmdline() and "torch.distributed.run" not in p.cmdline())
    worker.send_signal(signal.SIGKILL)
    assert job.wait(90) == "finished", job.tail()
    assert losses(job) == losses(whole)


def test_what_went_wrong_is_in_the_last_lines(config):
    cfg = config("wrong", 3)
    cfg = replace(cfg, data=replace(cfg.data, data_path=[str(ROOT / "no_such_file")]))
    job = jobs.launch(cfg)
    assert job.wait(60) == "failed"
    assert "no_such_file" in job.tail(60)


def test_a_job_that_vanished_says_so_and_goes_on(config):
    cfg = config("vanished", 3000, save_interval=5, log_interval=5)
    job = jobs.launch(cfg)
    until(lambda: job.run.steps())
    keeper = psutil.Process(job.started["keeper"]["pid"])
    everyone = [keeper, *keeper.children(recursive=True)]
    for p in everyone: p.send_signal(signal.SIGKILL)
    psutil.wait_procs(everyone, 20)
    until(lambda: job.state == "died")
    saved = job.run.latest()
    last = saved + 2
    cfg.train.train_iters, cfg.train.resume = last, "must"
    again = job.resume(cfg)
    assert again.wait(90) == "finished" and again.steps()[0] == last
