"""Real jobs: they outlive their kernel, are found again, end as asked, and leave nobody behind."""
import os
import shlex
import signal
import socket
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
from ascend_nb.keeper import family, living
from ascend_nb.preprocess import run as preprocess
from ascend_nb.schema import parse_args, save_yaml


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


def gone(processes):
    "None of them is left."
    return not [p for p in processes if p.is_running() and p.status() != psutil.STATUS_ZOMBIE]


def ask(client, code):
    "What a cell prints in a Jupyter kernel."
    said = []
    reply = client.execute_interactive(code, timeout=120, store_history=False, output_hook=lambda m: said.append(m["content"].get("text", "")))
    assert reply["content"]["status"] == "ok", reply["content"]
    return "".join(said).strip()


HERE = "from dataclasses import replace\nfrom ascend_nb import jobs\nfrom ascend_nb.config import RunConfig\nfrom ascend_nb.schema import load_yaml\n"


@pytest.mark.slow
def test_two_jupyter_kernels(config, tmp_path):
    "Launched in one, which is killed; found, stopped and resumed in another."
    from jupyter_client.manager import start_new_kernel
    cfg = config("kernels", 3000)
    save_yaml(cfg, tmp_path / "run.yaml")
    first, client = start_new_kernel(kernel_name="python3", cwd=str(ROOT))
    ask(client, HERE + f"job = jobs.launch(load_yaml(RunConfig, {str(tmp_path / 'run.yaml')!r}), nproc=2)")
    assert ask(client, "import psutil; print(len(psutil.Process().children()))") == "0", "the cell has returned, and the kernel is nobody's parent"
    job = jobs.attach(cfg.train.save)
    until(lambda: job.state == "running")
    os.kill(first.provisioner.process.pid, signal.SIGKILL)
    client.stop_channels()
    at = job.steps()[0]
    until(lambda: job.steps()[0] > at + 5)
    second, client = start_new_kernel(kernel_name="python3", cwd=str(ROOT))
    try:
        found = ask(client, HERE + f"job = jobs.attach({cfg.train.save!r})\nprint(job.state, len(job.tail().splitlines()) > 3, [j.run.path.name for j in jobs.list({str(job.run.path.parent)!r}) if j.state == 'running'])")
        assert found == "running True ['kernels']"
        assert ask(client, "print(job.stop(), job.wait(60))") == "stopping stopped" and job.steps()[0] in job.run.steps()
        stood = job.steps()[0]
        more = f"cfg = load_yaml(RunConfig, job.folder / 'run.yaml')\nagain = job.resume(replace(cfg, train=replace(cfg.train, train_iters={stood + 3}, resume='must')))\nprint(again.wait(90), again.steps())"
        assert ask(client, more) == f"finished ({stood + 3}, {stood + 3})"
    finally:
        client.stop_channels()
        second.shutdown_kernel(now=True)
    assert [r["step"] for r in job.run.rows() if "loss" in r] == [*range(1, stood + 4)]


@pytest.mark.slow
def test_a_job_that_hangs_is_ended_by_the_second_stop_even_without_its_keeper(config):
    cfg = config("hangs", 3000)
    job = jobs.launch(replace(cfg, guard=replace(cfg.guard, inject="hang:rank=1,step=4")), nproc=2, max_restarts=3)
    until(lambda: job.steps()[0] == 3)
    everyone = family(job.started["keeper"])
    living(job.started["keeper"]).kill()
    assert job.stop() == "stopping" and job.wait(3) == "stopping"
    assert job.stop() == "died" and len(everyone) == 3 and gone(everyone)
    with pytest.raises(UserError, match="died.*expected one that stop"): job.stop()


@pytest.mark.slow
@pytest.mark.parametrize("nproc", [1, 2])
def test_torchrun_is_killed_and_leaves_nobody_behind(config, nproc):
    "Its processes notice, keep the last step and end; the next one goes on behind it."
    cfg = config(f"launcher_{nproc}", 3000)
    job = jobs.launch(cfg, nproc=nproc)
    until(lambda: job.steps()[0] > 5)
    everyone, torchrun = family(job.started["keeper"]), living(job.started["command"])
    torchrun.kill()
    _, left = psutil.wait_procs(everyone, 30)
    assert not left and job.wait(10) == "failed" and "torchrun, which has started this process, is gone" in (job.folder / "log.txt").read_text(), job.tail(60)
    at = job.steps()[0]
    again = job.resume(replace(cfg, train=replace(cfg.train, train_iters=at + 3, resume="must")))
    assert again.wait(90) == "finished" and again.steps()[0] == at + 3, again.tail(60)
    assert [r["again"] for r in again.run.rows() if r.get("what") == "recovered"] == [0] and sorted(losses(again)) == [*range(1, at + 4)]


@pytest.mark.slow
def test_of_two_launches_at_once_one_is_refused(config, tmp_path):
    cfg = config("twice", 3000)
    save_yaml(cfg, tmp_path / "run.yaml")
    code = KERNEL.replace("os.kill(os.getpid(), signal.SIGKILL)", "")
    kernels = [subprocess.Popen([sys.executable, "-c", code, str(tmp_path / "run.yaml")], cwd=ROOT, stderr=subprocess.PIPE, text=True) for _ in range(2)]
    said = [k.communicate(timeout=120)[1] for k in kernels]
    assert sorted(k.returncode for k in kernels) == [0, 1] and "expected a run folder that nobody uses" in "".join(said), said
    job = jobs.attach(cfg.train.save)
    job.stop()
    job.stop()
    assert job.wait(30) == "stopped"


HOLDER = "import socket, time; s = socket.create_server(('127.0.0.1', 0)); print(s.getsockname()[1], flush=True); time.sleep(600)"
SMI = """#!/bin/sh
cat <<END
| 0     910B3               | OK            | 98.1        45                0    / 0             |
| 0                         | 0000:C1:00.0  | 12          0    / 0          31877/ 65536         |
| 1     910B3               | OK            | 98.1        45                0    / 0             |
| 1                         | 0000:C2:00.0  | 12          0    / 0          3187/ 65536          |
| NPU     Chip              | Process id    | Process name             | Process memory(MB)      |
| 1       0                 | PID           | python3.1                | 197                     |
END
"""


def test_who_is_in_the_way_is_named_and_left_alone(config, tmp_path, monkeypatch):
    holder = subprocess.Popen([sys.executable, "-c", HOLDER], stdout=subprocess.PIPE, text=True)
    port, cfg = int(holder.stdout.readline()), config("in_the_way", 5)
    with pytest.raises(UserError, match=rf"Port {port} is held by python\S* \(process {holder.pid}\)"): jobs.launch(cfg, nnodes=2, master=f"127.0.0.1:{port}")
    (tmp_path / "npu-smi").write_text(SMI.replace("PID", str(holder.pid)))
    (tmp_path / "npu-smi").chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path), prepend=os.pathsep)
    cards = rf"Cards 1 are in use \(1: python3.1 \(process {holder.pid}, 197 MB\)\)"
    for device in ("npu", "auto"):
        with pytest.raises(UserError, match=cards): jobs.launch(replace(cfg, train=replace(cfg.train, device=device)), nproc=2)
    with pytest.raises(UserError, match=cards): jobs.launch(cfg, cards=[1])
    monkeypatch.setenv("ASCEND_RT_VISIBLE_DEVICES", "1,0")
    with pytest.raises(UserError, match=cards): jobs.launch(replace(cfg, train=replace(cfg.train, device="npu")), nproc=1)
    assert holder.poll() is None and not (jobs.RunDir(cfg.train.save).path / "job").exists()
    holder.kill()


@pytest.mark.parametrize(("start", "says"), [
    (dict(nproc=0), "nproc=0; expected 1 or more"), (dict(nnodes=0), "nnodes=0"), (dict(max_restarts=-1), "max_restarts=-1; expected 0 or more"), (dict(nproc=2, cards=[3, 3]), "2 processes for the cards 3, 3"),
    (dict(nnodes=2), "expected HOST:PORT"), (dict(nnodes=2, master="h:99999"), "expected HOST:PORT"), (dict(nnodes=2, master=":29500"), "expected HOST:PORT"), (dict(nnodes=2, node_rank=2, master="h:29500"), "node_rank=2; expected 0 to 1")])
def test_a_start_that_cannot_be(config, start, says):
    cfg = config("cannot", 5)
    with pytest.raises(UserError, match=says): jobs.launch(cfg, **start)
    assert not jobs.RunDir(cfg.train.save).path.exists()


def test_a_folder_that_a_run_without_a_job_uses(config):
    cfg = config("locked", 5)
    with jobs.RunDir(cfg.train.save).lock(), pytest.raises(UserError, match="another process writing to"): jobs.launch(cfg)


@pytest.mark.slow
@pytest.mark.parametrize("shared", [True, False])
def test_the_printed_line_starts_the_other_host(config, tmp_path, shared):
    "Two hosts, played by this one: the second is given what `commands` says, in a shell, elsewhere. Without shared storage the line needs no file of the first host's."
    with socket.create_server(("127.0.0.1", 0)) as s: port = s.getsockname()[1]
    cfg = config(f"hosts_{shared}", 6)
    cfg = replace(cfg, data=replace(cfg.data, no_shared_storage=not shared))
    job = jobs.launch(cfg, nnodes=2, master=f"127.0.0.1:{port}")
    line = job.commands()[1]
    words = shlex.split(line)
    if not shared: assert str(job.folder) not in line and parse_args(RunConfig, words[words.index("train") + 1:]) == cfg
    other = subprocess.run(["bash", "-c", line], cwd=tmp_path, capture_output=True, text=True, timeout=120, env={**os.environ, "PATH": f"{os.path.dirname(sys.executable)}:{os.environ['PATH']}"})
    assert other.returncode == 0 and job.wait(60) == "finished", other.stderr[-2000:] + job.tail(40)
    assert "grid      fsdp=2" in job.tail(60), job.tail(60)
