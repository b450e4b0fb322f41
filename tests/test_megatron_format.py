"""Reading and laying out .pt and safetensors without torch, compared with torch and with the library."""
import enum
import os
import pickle
import struct
import subprocess
import zipfile
import zlib
from argparse import Namespace
from collections import OrderedDict

import numpy as np
import pytest
import safetensors.torch
import torch

from ascend_nb.core import UserError
from ascend_nb.megatron_format import (NUMBERS, PtLayout, Stored, Word, forget, from_float, leaves, numpy_type, read_pt, read_safetensors,
                                       safetensors_bytes, safetensors_header, to_float)


@pytest.fixture(autouse=True)
def unmapped():
    yield
    forget()


def write(path, tree, fill):
    "A .pt of ours, each tensor filled with fill(name) -> array."
    layout, crcs = PtLayout(tree), []
    for t in layout.begin(path):
        raw = np.ascontiguousarray(fill(t.name)).astype(numpy_type(t.dtype)).tobytes()
        assert len(raw) == t.nbytes
        with open(path, "r+b") as f: os.pwrite(f.fileno(), raw, t.offset)
        crcs.append(zlib.crc32(raw))
    layout.finish(path, crcs)
    return layout


@pytest.mark.parametrize("dtype", NUMBERS)
def test_torch_opens_what_we_wrote(tmp_path, dtype):
    tree = {"args": Namespace(num_layers=2, params_dtype=Word("torch", "bfloat16"), note=None, lists=[1, (2.5, True)]), "iteration": 3,
            "model": {"a": Stored("a", (3, 4), dtype), "nested": OrderedDict(b=Stored("b", (5,), dtype)), "none": Stored("c", (0, 4), dtype)}}
    write(tmp_path / "x.pt", tree, lambda n: np.arange(dict(a=12, b=5, c=0)[n]) % 2)
    assert zipfile.ZipFile(tmp_path / "x.pt").testzip() is None
    for mmap in (False, True):
        got = torch.load(tmp_path / "x.pt", weights_only=False, mmap=mmap)
        want = getattr(torch, NUMBERS[dtype].torch)
        assert got["model"]["a"].dtype == want and got["model"]["a"].shape == (3, 4) and got["model"]["none"].shape == (0, 4)
        if dtype != "bf16": assert got["model"]["nested"]["b"].tolist() == [0, 1, 0, 1, 0]
        assert got["args"].params_dtype is torch.bfloat16 and got["args"].lists == [1, (2.5, True)] and type(got["model"]["nested"]) is OrderedDict
        assert got["model"]["a"].data_ptr() % 64 == 0 or not mmap
    with torch.serialization.safe_globals([Namespace]): torch.load(tmp_path / "x.pt", weights_only=True)


def test_we_open_what_torch_wrote(tmp_path):
    big = torch.randn(4, 6)
    tree = {"model": OrderedDict(whole=big, view=big[1:, 2:5], turned=big.T, half=big.half(), bf=big.bfloat16(), number=torch.tensor(7), par=torch.nn.Parameter(big)),
            "opt": [{"step": torch.tensor([1])}], "args": Namespace(a=1), 5: "key"}
    torch.save(tree, tmp_path / "t.pt")
    got = read_pt(tmp_path / "t.pt")
    for k, t in tree["model"].items():
        t = t.detach()
        assert np.array_equal(got["model"][k].array(), (t.view(torch.uint16) if t.dtype == torch.bfloat16 else t).numpy()), k
    assert got["args"] == Namespace(a=1) and got[5] == "key" and got["opt"][0]["step"].array().tolist() == [1]
    assert len(leaves(got)) == 8
    whole = got["model"]["half"]
    assert whole.crc == zlib.crc32(big.half().numpy().tobytes())


def test_tensors_with_attributes(tmp_path):
    "Megatron marks its parameters; torch then writes them in another way."
    w, p = torch.arange(3.), torch.nn.Parameter(torch.ones(2))
    w.tensor_model_parallel, p.shared, p.allreduce = True, True, False
    torch.save({"model": {"w": w, "p": p}, "args": Namespace(device=torch.device("cpu"))}, tmp_path / "x.pt")
    got = read_pt(tmp_path / "x.pt")["model"]
    assert got["w"].array().tolist() == [0, 1, 2] and got["p"].array().tolist() == [1, 1]


class Kind(enum.Enum):
    one = 1


Kind.__module__, Kind.__qualname__ = "megatron.core.enums", "Kind"


def test_settings_of_megatron_become_inert(tmp_path, monkeypatch):
    import sys
    import types
    fake = types.ModuleType("megatron.core.enums")
    fake.Kind = Kind
    for name in ("megatron", "megatron.core"): monkeypatch.setitem(sys.modules, name, types.ModuleType(name))
    monkeypatch.setitem(sys.modules, "megatron.core.enums", fake)
    rng = dict(np_rng_state=np.random.get_state(), torch_rng_state=torch.get_rng_state())
    torch.save({"args": Namespace(kind=Kind.one, n=2), "model": {"w": torch.ones(2)}, "rng_state": [rng]}, tmp_path / "m.pt")
    got = read_pt(tmp_path / "m.pt")
    assert "megatron.core.enums.Kind" in repr(got["args"].kind) and got["args"].n == 2 and got["model"]["w"].array().tolist() == [1, 1]


class Call:
    def __init__(self, f, *args): self.call = f, args
    def __reduce__(self): return self.call


@pytest.mark.parametrize("what", ["system", "eval", "getattr", "open", "popen"])
def test_a_pickle_runs_nothing(tmp_path, what):
    mark = tmp_path / "mark"
    bad = dict(system=Call(os.system, f"touch {mark}"), eval=Call(eval, f"open({str(mark)!r}, 'w')"), getattr=Call(getattr, os, "system"),
               open=Call(open, str(mark), "w"), popen=Call(subprocess.Popen, ["touch", str(mark)]))[what]
    torch.save({"model": {"w": torch.ones(1), "deep": [{"x": bad}]}}, tmp_path / "bad.pt") if what != "getattr" else _raw_getattr(tmp_path / "bad.pt")
    mark.unlink(missing_ok=True)
    with pytest.raises(UserError) as e: read_pt(tmp_path / "bad.pt")
    assert e.value.key == "pickle_code" and not mark.exists()


def _raw_getattr(path): # a module cannot be pickled: written by hand
    body = b"\x80\x02" + b"cbuiltins\ngetattr\n" + b"(cposix\nsystem\nX\x01\x00\x00\x00xtR."
    with zipfile.ZipFile(path, "w") as z: z.writestr("x/data.pkl", body); z.writestr("x/version", "3\n")


@pytest.mark.parametrize("size,stride,offset", [((4,), (1,), 1), ((2, 3), (3, 1), 0), ((2,), (-1,), 3), ((10**9,), (1,), 0)])
def test_a_tensor_beyond_its_storage_is_refused(tmp_path, size, stride, offset):
    pid = ("storage", Word("torch", "FloatStorage"), "0", "cpu", 4)
    from io import BytesIO

    from ascend_nb.megatron_format import _Writer
    f = BytesIO()
    w = _Writer(f)
    w.write(b"\x80\x02")
    w.save(Word("torch._utils", "_rebuild_tensor_v2"))
    w.write(pickle.MARK); w.save(pid); w.write(pickle.BINPERSID)
    for x in (offset, size, stride, False, OrderedDict()): w.save(x)
    w.write(pickle.TUPLE + pickle.REDUCE + pickle.STOP)
    with zipfile.ZipFile(tmp_path / "x.pt", "w") as z: z.writestr("x/data.pkl", f.getvalue()); z.writestr("x/data/0", bytes(16))
    with pytest.raises(UserError, match="beyond its storage"): read_pt(tmp_path / "x.pt")


def test_files_above_four_gigabytes(tmp_path):
    "Sparse: it takes no room."
    tree = {"model": {"big": Stored("big", (5 * 2**30,), "u8"), "small": Stored("small", (4,), "fp32")}}
    layout = PtLayout(tree)
    big, small = layout.begin(tmp_path / "x.pt")
    with open(tmp_path / "x.pt", "r+b") as f: os.pwrite(f.fileno(), b"\1", big.offset + 5 * 2**30 - 1); os.pwrite(f.fileno(), struct.pack("<4f", 1, 2, 3, 4), small.offset)
    layout.finish(tmp_path / "x.pt", [0, zlib.crc32(struct.pack("<4f", 1, 2, 3, 4))])
    infos = {i.filename.split("/", 1)[1]: i for i in zipfile.ZipFile(tmp_path / "x.pt").infolist()}
    assert infos["data/0"].file_size == 5 * 2**30 and infos["data/1"].header_offset > 4 * 2**30
    assert read_pt(tmp_path / "x.pt")["model"]["small"].array().tolist() == [1, 2, 3, 4]
    got = torch.load(tmp_path / "x.pt", mmap=True, weights_only=True)
    assert got["model"]["small"].tolist() == [1, 2, 3, 4] and got["model"]["big"][-1] == 1


def test_safetensors_like_the_library(tmp_path):
    tensors = {"z": torch.ones(3), "a": torch.arange(4), "b": torch.ones(2, 2).bfloat16(), "é": torch.ones(1).half(), "empty": torch.ones(0, 3)}
    safetensors.torch.save_file(tensors, tmp_path / "x.safetensors", metadata={"format": "pt"})
    found = read_safetensors(tmp_path / "x.safetensors")
    assert {t.name: t.shape for t in found} == {k: tuple(v.shape) for k, v in tensors.items()}
    raw, again = safetensors_bytes(found)
    assert raw == safetensors_header(tmp_path / "x.safetensors")[0] and sorted(again, key=lambda t: t.name) == [
        Stored(t.name, t.shape, t.dtype, t.path, t.offset) for t in sorted(found, key=lambda t: t.name)]
    assert np.array_equal({t.name: t for t in found}["b"].array(), tensors["b"].view(torch.uint16).numpy())


@pytest.mark.parametrize("damage", ["cut", "header", "json", "empty", "text"])
def test_damaged_safetensors_are_named(tmp_path, damage):
    p = tmp_path / "x.safetensors"
    safetensors.torch.save_file({"a": torch.ones(100)}, p)
    raw = p.read_bytes()
    p.write_bytes(dict(cut=raw[:-1], header=raw[:20], json=raw[:8] + b"{" * (len(raw) - 8), empty=b"", text=b"hello, world, this is text")[damage])
    with pytest.raises(UserError, match="x.safetensors"): read_safetensors(p)


@pytest.mark.parametrize("damage", ["cut", "zeros", "old", "compressed"])
def test_damaged_pt_is_named(tmp_path, damage):
    p = tmp_path / "x.pt"
    torch.save({"a": torch.ones(100)}, p, _use_new_zipfile_serialization=damage != "old")
    if damage == "cut": p.write_bytes(p.read_bytes()[:-20])
    if damage == "zeros": p.write_bytes(bytes(1000))
    if damage == "compressed":
        with zipfile.ZipFile(p) as z: data = {n: z.read(n) for n in z.namelist()}
        with zipfile.ZipFile(p, "w", zipfile.ZIP_DEFLATED) as z: [z.writestr(n, d) for n, d in data.items()]
    with pytest.raises(UserError, match="x.pt"): read_pt(p)


def test_rounding_is_torchs():
    bits = torch.randint(-2**31, 2**31 - 1, (100_000,), dtype=torch.int32)
    x = bits.view(torch.float32)
    x = x[~x.isnan()]
    assert np.array_equal(from_float(x.numpy(), "bf16"), x.bfloat16().view(torch.uint16).numpy())
    assert np.isnan(to_float(from_float(np.float32([np.nan]), "bf16"), "bf16")).all()
    with np.errstate(over="ignore"): assert np.array_equal(from_float(x.numpy(), "fp16").view(np.uint16), x.half().view(torch.uint16).numpy())
    h = x.half()
    assert np.array_equal(to_float(h.numpy(), "fp16"), h.float().numpy(), equal_nan=True)
    b = torch.arange(2**16, dtype=torch.int32).to(torch.uint16).view(torch.bfloat16)
    assert np.array_equal(to_float(b.view(torch.uint16).numpy(), "bf16").view(np.uint32), b.float().view(torch.uint32).numpy())
