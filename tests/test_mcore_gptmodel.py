"""megatron-core's own GPTModel is the judge: it loads what we write, scores like transformers, and we read what it saves."""
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from conftest import ROOT
from safetensors.torch import load_file
from test_converters import go
from transformers import AutoConfig, AutoModelForCausalLM

OLD = "0.12.1" # of the time of MindSpeed's core_v0.12; the environment has a newer one
pytest.importorskip("megatron.core", reason="megatron-core is not installed: pip install -c constraints.txt -e .[dev]")
IDS = torch.arange(2 * 20).reshape(2, 20) * 13 % 96


@pytest.fixture(scope="session")
def older():
    "A folder with an older megatron-core and nothing else; made once."
    folder = Path(os.environ.get("XDG_CACHE_HOME", Path.home() / ".cache")) / "ascend_nb" / f"megatron-core-{OLD}"
    if not (folder / "megatron/core/models").is_dir():
        r = subprocess.run([sys.executable, "-m", "pip", "install", "-q", "--no-deps", "--target", folder, f"megatron-core=={OLD}", "einops==0.8.2"], capture_output=True, text=True)
        if r.returncode: pytest.skip(f"megatron-core {OLD} cannot be installed here: {r.stderr.strip().splitlines()[-1]}")
    return folder


SMALL = dict(vocab_size=96, hidden_size=64, intermediate_size=80, num_hidden_layers=4, num_attention_heads=8, num_key_value_heads=4, max_position_embeddings=64, rope_theta=5e5, rms_norm_eps=1e-5)
MODELS = {
    "llama": ("llama", dict(tie_word_embeddings=False)),
    "tied": ("llama", dict(tie_word_embeddings=True, head_dim=16)),
    "qwen2": ("qwen2", dict(tie_word_embeddings=False)),
    "qwen3": ("qwen3", dict(tie_word_embeddings=True, head_dim=16)),
    "mixtral": ("mixtral", dict(num_local_experts=4, num_experts_per_tok=2, tie_word_embeddings=False)),
}


@pytest.fixture(scope="module")
def homes(tmp_path_factory):
    "transformers' own models with random weights, and their scores."
    root, scores = tmp_path_factory.mktemp("gptmodel"), {}
    torch.save(IDS, root / "ids.pt")
    for name, (family, kw) in MODELS.items():
        torch.manual_seed(1)
        model = AutoModelForCausalLM.from_config(AutoConfig.for_model(family, **{**SMALL, **kw})).eval()
        for n, p in model.named_parameters(): torch.nn.init.normal_(p, std=0.3) if p.ndim > 1 or n.endswith("bias") else torch.nn.init.uniform_(p, 0.5, 1.5)
        model.save_pretrained(root / name)
        with torch.no_grad(): scores[name] = model(IDS).logits
    return root, scores


def peer(ckpt, out, path=None):
    "Run GPTModel in processes of its own."
    env = {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, [path and str(path), str(ROOT)])), "CUDA_DEVICE_MAX_CONNECTIONS": "1", "OMP_NUM_THREADS": "1"}
    r = subprocess.run([sys.executable, ROOT / "tests/megatron_peer.py", ckpt, out], env=env, capture_output=True, text=True, stdin=subprocess.DEVNULL, timeout=300)
    assert r.returncode == 0, r.stderr[-3000:]
    return torch.load(out / "logits.pt")


def judge(homes, tmp_path, name, flags, path=None):
    root, scores = homes
    go(root / name, root / f"{tmp_path.name}", "--to mcore", flags) # beside ids.pt
    got = peer(root / tmp_path.name, tmp_path / "theirs", path)[..., :96]
    assert float(scores[name].std()) > 0.5 and float((got - scores[name]).abs().max()) < 1e-4
    go(tmp_path / "theirs", tmp_path / "home", "--to hf --hf-config", root / name)
    one, two = (load_file(d / "model.safetensors") for d in (root / name, tmp_path / "home"))
    assert one.keys() == two.keys() and all(torch.equal(v, two[k]) for k, v in one.items())


@pytest.mark.parametrize("name", MODELS)
def test_gptmodel_scores_like_transformers(homes, tmp_path, name): judge(homes, tmp_path, name, "")


@pytest.mark.parametrize(("name", "flags"), [("mixtral", "--moe-grouped-gemm"), ("llama", "--make-vocab-size-divisible-by 40"), ("llama", "--tp 2"), ("qwen2", "--tp 2 --pp 2"), ("tied", "--pp 2"), ("mixtral", "--ep 2"), ("mixtral", "--ep 2 --moe-grouped-gemm")])
def test_gptmodel_over_ranks(homes, tmp_path, name, flags): judge(homes, tmp_path, name, flags)


@pytest.mark.parametrize(("name", "flags"), [("llama", ""), ("qwen2", "--tp 2"), ("mixtral", ""), ("mixtral", "--moe-grouped-gemm")])
def test_an_older_gptmodel(homes, tmp_path, older, name, flags): judge(homes, tmp_path, name, flags, older)
