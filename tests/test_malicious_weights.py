"""Weights of strangers: whatever their pickles name, none of it runs, in whichever file and by whichever door."""
import argparse
import builtins
import importlib
import io
import json
import os
import pickle
import shutil
import subprocess
import zipfile

import pytest
import torch
from test_converters import go, llama, make

from ascend_nb.core import UserError
from ascend_nb.hf_format import load_model
from ascend_nb.megatron_format import read_pt


class Reduce:
    "A pickle that calls what it names."
    def __init__(self, f, *args): self.f, self.args = f, args
    def __reduce__(self): return self.f, self.args


class Sub(argparse.Namespace):
    "A Namespace that runs code when its state is set."
    def __setstate__(self, state): os.system(state["cmd"])


def attacks(mark):
    "Name -> an object whose unpickling by a trusting reader makes the file `mark`."
    touch, code = f"touch {mark}", f"open({str(mark)!r}, 'w')"
    return {
        "os.system": Reduce(os.system, touch),
        "eval": Reduce(builtins.eval, code),
        "exec": Reduce(builtins.exec, code),
        "subprocess": Reduce(subprocess.call, ["touch", str(mark)]),
        "import": Reduce(importlib.import_module, "antigravity"),
        "getattr": Reduce(builtins.getattr, "text", "upper"),
        "nested in args": argparse.Namespace(num_layers=4, hook=Reduce(os.system, touch)),
        "in a dict's key": {"model": {Reduce(builtins.eval, f"str({code})"): 1}},
        "unpickle again": Reduce(pickle.loads, pickle.dumps(Reduce(os.system, touch))),
        "torch.load": Reduce(torch.load, str(mark)),
        "torch.hub": Reduce(torch.hub.load, "x", "y"),
        "torch.utils": Reduce(torch.utils.collect_env.run, touch),
        "torch.Tensor": Reduce(torch.Tensor.__class__, "T", (), {}),
        "Namespace subclass": Sub(cmd=touch),
    }


KINDS = list(attacks("x"))


def raw(kind, mark):
    "Opcodes that no pickler writes: megatron's own names, dotted to reach something else."
    if kind == "dotted": return b"\x80\x04" + b"\x8c\x08megatron\x8c\x09os.system\x93" + pickle.dumps((f"touch {mark}",), 4)[2:-1] + b"R."
    if kind == "inert called": return pickle.GLOBAL + b"numpy\nload\n(V" + str(mark).encode() + b"\ntR."
    return pickle.GLOBAL + b"torch._utils\n_rebuild_tensor_v2\n(c__builtin__\neval\n(V" + f"open({str(mark)!r}, 'w')".encode() + b"\ntRI0\n(t(tI00\n(dtR." # eval inside a tensor's arguments


def zipped(path, data):
    with zipfile.ZipFile(path, "w", zipfile.ZIP_STORED) as z:
        z.writestr("model_optim_rng/data.pkl", data)
        z.writestr("model_optim_rng/version", "3\n")


@pytest.fixture(scope="module")
def home(tmp_path_factory):
    root = tmp_path_factory.mktemp("home")
    make(root / "hf", llama())
    make(root / "bin", llama(), kind="bin")
    go(root / "hf", root / "mg", "--to mcore --tp 2")
    return root


def test_the_attacks_are_real(tmp_path):
    "A trusting reader would have run them."
    for kind in ("os.system", "eval", "nested in args", "Namespace subclass", "in a dict's key"):
        mark = tmp_path / kind.replace(" ", "_").replace("'", "")
        pickle.loads(pickle.dumps(attacks(mark)[kind]))
        assert mark.exists(), kind


@pytest.mark.parametrize("kind", [*KINDS, "dotted", "inert called", "inside a tensor"])
def test_read_pt_runs_nothing(tmp_path, kind):
    mark = tmp_path / "mark"
    zipped(tmp_path / "x.pt", raw(kind, mark) if kind not in KINDS else pickle.dumps({"model": {}, "args": attacks(mark)[kind]}))
    try: found = str(read_pt(tmp_path / "x.pt")) # an inert class is an empty shell
    except UserError as e:
        assert e.key in ("pickle_code", "bad_tensors")
        found = str(e)
    assert not mark.exists() and found


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("door", ["mg", "bin", "lora", "lora of ranks"])
def test_no_door_of_the_converter_runs_it(home, tmp_path, kind, door):
    mark = tmp_path / "mark"
    evil = attacks(mark)[kind]
    if door == "mg":
        shutil.copytree(home / "mg", tmp_path / "in")
        p = next((tmp_path / "in").rglob("mp_rank_01/*.pt"))
        torch.save({**torch.load(p, weights_only=False), "optimizer": evil}, p)
        words = [tmp_path / "in", "--hf-config", home / "hf", "--to hf"]
    elif door == "bin":
        shutil.copytree(home / "bin", tmp_path / "in")
        p = tmp_path / "in/pytorch_model.bin"
        torch.save({**torch.load(p), "more": evil}, p)
        words = [tmp_path / "in", "--to mcore"]
    else:
        (tmp_path / "in").mkdir()
        if door == "lora":
            (tmp_path / "in/adapter_config.json").write_text(json.dumps(dict(peft_type="LORA", r=4, target_modules=["q_proj"])))
            torch.save({"base_model.model.model.layers.0.self_attn.q_proj.lora_A.weight": torch.ones(4, 32), "more": evil}, tmp_path / "in/adapter_model.bin")
        else:
            (tmp_path / "in/mp_rank_00").mkdir()
            torch.save({"model": {"decoder.layers.0.mlp.linear_fc1.lora_A.default.weight": torch.ones(4, 32), "more": evil}}, tmp_path / "in/mp_rank_00/model_optim_rng.pt")
        words = [home / "hf", "--to mcore --lora-load", tmp_path / "in"]
    with pytest.raises(UserError) as e: go(*words[:1], tmp_path / "out", *words[1:])
    assert e.value.key == "pickle_code", str(e.value)
    assert not mark.exists() and not (tmp_path / "out").exists()


@pytest.mark.parametrize("kind", KINDS)
def test_loading_a_model_runs_nothing(home, tmp_path, kind):
    shutil.copytree(home / "bin", tmp_path / "in")
    p = tmp_path / "in/pytorch_model.bin"
    torch.save({**torch.load(p), "more": attacks(tmp_path / "mark")[kind]}, p)
    with pytest.raises(UserError): load_model(tmp_path / "in")
    assert not (tmp_path / "mark").exists()


def test_a_pickle_that_never_ends_is_no_zip(tmp_path):
    "A bare pickle, as torch wrote before 1.6, is not opened at all."
    f = io.BytesIO()
    pickle.dump(Reduce(os.system, f"touch {tmp_path}/mark"), f)
    (tmp_path / "x.pt").write_bytes(f.getvalue())
    with pytest.raises(UserError, match="no zip"): read_pt(tmp_path / "x.pt")
    assert not (tmp_path / "mark").exists()
