"""A training's steps as a source and a target: written by one process and by several, whole and damaged, and a run that begins from them."""
import json
import shutil
import subprocess
import sys

import pytest
import torch
from conftest import ROOT
from safetensors.torch import load_file
from test_converters import go, llama, make, same_weights

from ascend_nb import preprocess, training
from ascend_nb.checkpoint import check_step, read_tensors, write_tensors
from ascend_nb.config import DataConfig, PreprocessConfig, RunConfig, TrainConfig
from ascend_nb.convert import as_model
from ascend_nb.core import UserError
from ascend_nb.dcp_format import find_step, open_step, slice_blocks
from ascend_nb.families import config_from_hf
from ascend_nb.hf_format import load_model, save_model
from ascend_nb.model import Decoder


@pytest.fixture(scope="module")
def home(tmp_path_factory):
    folder = tmp_path_factory.mktemp("hf") / "llama"
    make(folder, llama())
    return folder


@pytest.mark.parametrize("dtype", ["", "fp32"])
def test_there_and_back(home, tmp_path, dtype):
    go(home, tmp_path / "run", "--to dcp --verify", f"--params-dtype {dtype}" if dtype else "")
    assert check_step(tmp_path / "run/step_0000000") == ""
    want = load_file(home / "model.safetensors")
    got = {f"model.{k}": torch.empty_like(v, dtype=torch.float32 if dtype else v.dtype) for k, v in want.items()}
    read_tensors(tmp_path / "run/step_0000000", got) # torch.distributed.checkpoint's own reader
    assert all(torch.equal(got[f"model.{k}"], v.to(got[f"model.{k}"].dtype)) for k, v in want.items())
    if dtype: return
    go(tmp_path / "run", tmp_path / "mg", "--to mcore --tp 2 --pp 2 --verify")
    go(tmp_path / "mg", tmp_path / "run2", "--to dcp --hf-config", home)
    go(tmp_path / "run2/step_0000000", tmp_path / "home", "--to hf --hf-config", home)
    same_weights(home, tmp_path / "home")


WRITE = """
import sys, torch, torch.distributed as dist, torch.multiprocessing as mp
from safetensors.torch import load_file
from torch.distributed.tensor import Shard, Replicate, distribute_tensor
from ascend_nb.checkpoint import write_tensors
def work(rank, meet, weights, out):
    dist.init_process_group("gloo", init_method=f"file://{meet}", rank=rank, world_size=2)
    mesh = dist.device_mesh.init_device_mesh("cpu", (2,))
    place = lambda k, t: [Shard(1)] if "o_proj" in k or "down_proj" in k else [Replicate()] if "norm" in k else [Shard(0)]
    tensors = {f"model.{k}": distribute_tensor(t, mesh, place(k, t)) for k, t in load_file(weights).items()}
    tensors |= {f"optim.exp_avg.{k[6:]}": t.clone() for k, t in tensors.items() if "norm" in k}
    write_tensors(out, tensors)
    dist.barrier()
    __import__("os")._exit(0)
if __name__ == "__main__": mp.spawn(work, tuple(sys.argv[1:]), 2)
"""


def test_slices_of_several_processes(home, tmp_path):
    "Written by two processes over torch's DTensors: rows, columns, copies."
    (tmp_path / "run").mkdir()
    step = tmp_path / "run/step_0000007"
    step.mkdir()
    (tmp_path / "write.py").write_text(WRITE)
    r = subprocess.run([sys.executable, tmp_path / "write.py", tmp_path / "meet", home / "model.safetensors", step], capture_output=True, text=True, stdin=subprocess.DEVNULL, timeout=200, cwd=ROOT, env={**__import__("os").environ, "PYTHONPATH": str(ROOT)})
    assert r.returncode == 0, r.stderr[-2000:]
    assert len(list(step.glob("*.safetensors"))) > 1
    (step / "manifest.json").write_text(json.dumps(dict(files={p.name: dict(bytes=p.stat().st_size) for p in step.iterdir()})))
    source = open_step(tmp_path / "run", config_from_hf(home))
    assert any(b.rows[0] for p in source.stored for b in p.blocks) and any(b.cols[0] for p in source.stored for b in p.blocks)
    go(step, tmp_path / "home", "--to hf --verify --hf-config", home)
    same_weights(home, tmp_path / "home")


def test_slices_of_stacked_experts():
    "Against torch's own indexing."
    whole = torch.randn(4, 6, 10)
    begin, size = (1, 2, 5), (2, 3, 4)
    piece = whole[tuple(slice(b, b + n) for b, n in zip(begin, size, strict=True))]
    for b in slice_blocks("x", begin, size):
        stored = piece.reshape(-1, 4)[b.at[0]:b.at[0] + 3]
        assert torch.equal(stored, whole[b.part[1], slice(*b.rows), slice(*b.cols)])


def test_the_newest_whole_step_is_taken(home, tmp_path):
    go(home, tmp_path / "run", "--to dcp")
    shutil.copytree(tmp_path / "run/step_0000000", tmp_path / "run/step_0000005")
    shutil.copytree(tmp_path / "run/step_0000000", tmp_path / "run/step_0000009")
    next((tmp_path / "run/step_0000009").glob("*.safetensors")).write_bytes(b"short")
    assert find_step(tmp_path / "run").name == "step_0000005"
    with pytest.raises(UserError, match="step_0000009 lacks model-00001"): go(tmp_path / "run/step_0000009", tmp_path / "out", "--to mcore --hf-config", home)
    make(tmp_path / "wide", llama(intermediate_size=80))
    with pytest.raises(UserError, match=r"down_proj.weight \[32, 48\], by the config \[32, 80\]"): go(tmp_path / "run", tmp_path / "out", "--to mcore --hf-config", tmp_path / "wide")
    write_tensors(tmp_path, {"model.model.norm.weight": torch.ones(32)})
    (tmp_path / "manifest.json").write_text(json.dumps(dict(files={})))
    with pytest.raises(UserError, match="without the whole of"): open_step(tmp_path, config_from_hf(home))


def test_training_begins_from_a_step(samples, tmp_path):
    "From a converted step the first loss is that of the Hugging Face folder; and a run's own steps are weights too."
    preprocess.run(PreprocessConfig(input=str(samples / "tales.jsonl"), output_prefix=f"{tmp_path}/tales", append_eod=True, tokenizer_name_or_path=str(samples / "tokenizer")), json=True)
    from ascend_nb.tokenizers import load_tokenizer
    tok = load_tokenizer(str(samples / "tokenizer"))
    cfg = config_from_hf({**llama(), "vocab_size": tok.vocab_size})
    save_model(Decoder(cfg).init_weights(5), tmp_path / "hf", tok)
    go(tmp_path / "hf", tmp_path / "start", "--to dcp")

    def train(load, save): return training.run(RunConfig(data=DataConfig(data_path=[f"{tmp_path}/tales_text_document"], seq_length=32, split="90,10,0"),
                                                         train=TrainConfig(load=str(tmp_path / load), save=str(tmp_path / save), train_iters=2, save_interval=2, micro_batch_size=2, global_batch_size=2, device="cpu", eval_interval=0)), json=True)
    a, b = train("hf", "one"), train("start", "two")
    assert a["first_loss"] == b["first_loss"] and a["loss"] == b["loss"]
    go(tmp_path / "one", tmp_path / "trained", "--to hf --hf-config", tmp_path / "hf")
    ids = torch.arange(10)[None]
    with torch.no_grad(): assert torch.equal(load_model(tmp_path / "trained")(ids), load_model(tmp_path / "one/hf")(ids))
    with torch.no_grad(): assert torch.equal(as_model(open_step(tmp_path / "two", cfg))(ids), load_model(tmp_path / "one/hf")(ids))
    assert train("one", "three")["first_loss"] < a["first_loss"]
