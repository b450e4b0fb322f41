"""The run folder against what happens to it: kill -9, a full disk, a flipped bit, another number of processes."""
import json
import resource
import shutil
import signal
import subprocess
import sys
import time

import pytest
import torch
from safetensors import safe_open

from ascend_nb.checkpoint import (
    RunDir,
    check_step,
    load_step,
    optim_tensors,
    read_optim,
    read_tensors,
    save_step,
    stored,
    write_tensors,
)
from ascend_nb.core import UserError


def some(scale=1.):
    torch.manual_seed(0)
    return {"model.a": torch.randn(64, 32) * scale, "model.b": torch.randn(7).bfloat16(), "optim.step.a": torch.tensor(3.),
            "empty": torch.empty(0), "rng.0.torch": torch.get_rng_state(), "count": torch.arange(5)}


def same(a, b): return a.keys() == b.keys() and all(torch.equal(a[k], b[k]) and a[k].dtype == b[k].dtype for k in a)


def run_python(code, *args, **kw):
    return subprocess.Popen([sys.executable, "-W", "ignore", "-c", code, *map(str, args)], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, **kw)


SAVER = """
import sys, torch
from ascend_nb import checkpoint as c
c.FILE_BYTES = 2**22
run = c.RunDir(sys.argv[1])
small = {"model.a": torch.arange(6.)}
c.save_step(run.step_path(1), small, dict(step=1))
print("one", flush=True)
big = {f"model.{i}": torch.full((2**20,), float(i)) for i in range(100)}
c.save_step(run.step_path(2), big, dict(step=2))
print("two", flush=True)
"""


def test_kill_9_in_the_middle_of_a_save_leaves_older_steps(tmp_path):
    run = RunDir(tmp_path / "run")
    p = run_python(SAVER, run.path)
    try:
        assert p.stdout.readline().strip() == "one"
        while not (half := [x for d in run.path.glob(".step_0000002.tmp-*") for x in d.glob("*.safetensors")]):
            assert p.poll() is None, p.stderr.read()
            time.sleep(.001)
    finally: p.kill()
    p.wait()
    assert half and p.returncode == -signal.SIGKILL and "two" not in p.stdout.read()
    assert run.steps() == [1] == list(run.folders()) and run.latest() == 1
    got = {"model.a": torch.zeros(6)}
    assert load_step(run, 1, got) == {"step": 1} and got["model.a"].tolist() == [0, 1, 2, 3, 4, 5]
    assert len(run.sweep()) == 1 and sorted(x.name for x in run.path.iterdir()) == ["step_0000001"]


DISK_FULL = """
import resource, signal, sys, torch
from ascend_nb import checkpoint as c
from ascend_nb.core import UserError
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
resource.setrlimit(resource.RLIMIT_FSIZE, (2**20, 2**20))
try: c.save_step(c.RunDir(sys.argv[1]).step_path(2), {"model.a": torch.zeros(2**20)}, dict(step=2))
except UserError as e: print(e.key, e)
"""


@pytest.mark.skipif(not hasattr(resource, "RLIMIT_FSIZE"), reason="the system cannot limit the size of files")
def test_a_disk_that_refuses_leaves_nothing_behind(tmp_path):
    run = RunDir(tmp_path)
    save_step(run.step_path(1), some(), dict(step=1))
    out, err = run_python(DISK_FULL, run.path).communicate()
    assert out.startswith("step_io") and "older steps are untouched" in out, err
    assert [x.name for x in run.path.iterdir()] == ["step_0000001"] and run.latest() == 1


def test_no_room_is_said_before_anything_is_written(tmp_path, monkeypatch):
    monkeypatch.setattr(shutil, "disk_usage", lambda p: shutil._ntuple_diskusage(10, 9, 1))
    with pytest.raises(UserError, match="expected at least"): save_step(tmp_path / "step_0000001", some(), {})
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("name", ["shard-00001-model-00001-of-00001.safetensors", "state.json", "manifest.json"])
@pytest.mark.parametrize("harm", ["missing", "short", "flipped"])
def test_each_kind_of_damage_is_found_and_named(tmp_path, name, harm):
    run = RunDir(tmp_path)
    for s in (1, 2): save_step(run.step_path(s), some(s), dict(step=s))
    path = run.step_path(2) / name
    data = bytearray(path.read_bytes())
    if harm == "flipped": data[len(data) // 2] ^= 4
    if harm == "missing": path.unlink()
    else: path.write_bytes(data[:-3] if harm == "short" else data)
    said = []
    assert run.latest(said.append) == 1
    assert "step_0000002" in said[0] and (name in said[0] or (name, harm) == ("manifest.json", "flipped"))
    with pytest.raises(UserError, match="Whole steps in this run: 1"): load_step(run, 2, {})


def test_nothing_in_a_step_is_a_pickle(tmp_path):
    "A step is safetensors and JSON: plain safetensors reads it, and reading it makes no object of a foreign class."
    folder = save_step(tmp_path / "step_0000001", some(), dict(step=1))
    assert {p.suffix for p in folder.iterdir()} == {".safetensors", ".json"}
    with safe_open(next(folder.glob("*.safetensors")), "pt") as f: plain = {k: f.get_tensor(k) for k in f.keys()}  # noqa: SIM118
    assert same({k: plain[k] for k in some()}, some())
    code = """
import sys, torch
from ascend_nb.checkpoint import RunDir, load_step
def watch(event, args):
    if event == "pickle.find_class": sys.exit(f"unpickled {args}")
sys.addaudithook(watch)
print(load_step(RunDir(sys.argv[1]), 1, {"model.a": torch.zeros(64, 32)}))
"""
    out, err = run_python(code, tmp_path).communicate()
    assert out.strip() == "{'step': 1}", err


def test_many_files_and_one_give_the_same(tmp_path, monkeypatch):
    tensors = {f"t{i}": torch.randn(50, 7) for i in range(20)}
    monkeypatch.setattr("ascend_nb.checkpoint.FILE_BYTES", 3000)
    write_tensors(tmp_path, tensors)
    assert len(list(tmp_path.glob("*.safetensors"))) == 10
    got = {k: torch.zeros_like(v) for k, v in tensors.items()}
    read_tensors(tmp_path, got)
    assert same(got, tensors) and stored(tmp_path)["t3"] == ((50, 7), torch.float32)


def test_moments_follow_names_not_positions(tmp_path):
    "The optimizer that reads has its parameters in another order and in other groups; its next step is the same, bit for bit."
    def make(flip):
        torch.manual_seed(0)
        m = torch.nn.Sequential(torch.nn.Linear(8, 8), torch.nn.LayerNorm(8), torch.nn.Linear(8, 3))
        ps = list(m.parameters())
        groups = [dict(params=ps[::-1][:2]), dict(params=ps[::-1][2:])] if flip else ps
        return m, torch.optim.AdamW(groups, lr=.1, fused=flip), {p: n for n, p in m.named_parameters()}

    def step(m, o):
        torch.manual_seed(5)
        m(torch.randn(4, 8)).pow(2).sum().backward()
        o.step()
        o.zero_grad()

    m, o, names = make(False)
    for _ in range(3): step(m, o)
    write_tensors(tmp_path, {n: p.detach() for n, p in m.named_parameters()} | optim_tensors(o, names))
    m2, o2, names2 = make(True)
    read_tensors(tmp_path, {n: p.detach() for n, p in m2.named_parameters()})
    read_optim(tmp_path, o2, names2)
    assert same(dict(sorted(optim_tensors(o2, names2).items())), dict(sorted(optim_tensors(o, names).items())))
    step(m, o)
    step(m2, o2)
    for a, b in zip(m.parameters(), m2.parameters(), strict=True): torch.testing.assert_close(a, b, rtol=1e-6, atol=1e-7)


def test_a_second_process_may_not_write_into_the_run(tmp_path):
    code = "import sys; from ascend_nb.checkpoint import RunDir\nwith RunDir(sys.argv[1]).lock(): print('in', flush=True); sys.stdin.read()"
    p = run_python(code, tmp_path, stdin=subprocess.PIPE)
    try:
        assert p.stdout.readline().strip() == "in"
        with pytest.raises(UserError, match="only one"), RunDir(tmp_path).lock(): pass
    finally: p.kill()
    p.wait()
    with RunDir(tmp_path).lock(): pass  # the lock died with its process


def test_a_broken_step_may_be_replaced_and_a_whole_one_not(tmp_path):
    folder = save_step(tmp_path / "step_0000003", some(), dict(step=3))
    with pytest.raises(UserError, match="expected a new or an empty one"): save_step(folder, some(), dict(step=3))
    (folder / "state.json").unlink()
    save_step(folder, some(2.), dict(step=3), replace=bool(check_step(folder)))
    assert not check_step(folder) and json.loads((folder / "state.json").read_text()) == {"step": 3}


RESHARD = """
import sys, torch, torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import Replicate, Shard, distribute_tensor
from ascend_nb.checkpoint import read_tensors, write_tensors
rank, folder, out, port = int(sys.argv[1]), *sys.argv[2:]
dist.init_process_group("gloo", rank=rank, world_size=2, init_method=f"tcp://127.0.0.1:{port}")
mesh = init_device_mesh("cpu", (2,))
full = {"rows": torch.arange(35.).view(7, 5), "columns": torch.arange(24.).view(4, 6) + 100, "both": torch.arange(6.)}
how = {"rows": Shard(0), "columns": Shard(1), "both": Replicate()}
mine = {k: distribute_tensor(torch.zeros_like(v), mesh, [how[k]]) for k, v in full.items()}
read_tensors(folder, mine)
ok = all(torch.equal(mine[k].full_tensor(), full[k]) for k in full)
write_tensors(out, {k: distribute_tensor(v, mesh, [how[k]]) for k, v in full.items()})
dist.barrier()
print(ok, mine["rows"].to_local().shape[0], flush=True)
dist.destroy_process_group()
"""


@pytest.mark.slow
def test_one_process_and_two_read_each_other(tmp_path):
    "The layout on disk is not the layout of the run: written by one and read cut in two, and the other way round."
    full = {"rows": torch.arange(35.).view(7, 5), "columns": torch.arange(24.).view(4, 6) + 100, "both": torch.arange(6.)}
    for d in ("one", "two"): (tmp_path / d).mkdir()
    write_tensors(tmp_path / "one", full)
    import socket
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        port = s.getsockname()[1]
    ps = [run_python(RESHARD, r, tmp_path / "one", tmp_path / "two", port) for r in (0, 1)]
    said = [p.communicate(timeout=120) for p in ps]
    assert [o.split() for o, _ in said] == [["True", "4"], ["True", "3"]], said
    got = {k: torch.zeros_like(v) for k, v in full.items()}
    read_tensors(tmp_path / "two", got)
    assert same(got, full)
