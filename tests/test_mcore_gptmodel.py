"""megatron-core's own GPTModel is the judge: it loads what we write, scores like transformers, and we read what it saves."""
import os
import subprocess
import sys
from importlib.metadata import version
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


CASES = { # the processes of a group read their checkpoints one after the other: importing Megatron takes longer than all of them
    "one": [(n, "") for n in MODELS] + [("mixtral", "--moe-grouped-gemm"), ("llama", "--make-vocab-size-divisible-by 40")],
    "two": [("llama", "--tp 2"), ("qwen2", "--tp 2"), ("tied", "--pp 2"), ("mixtral", "--pp 2"), ("mixtral", "--ep 2"), ("mixtral", "--ep 2 --moe-grouped-gemm")],
    "four": [("qwen2", "--tp 2 --pp 2")],
    "older": [("llama", ""), ("qwen2", ""), ("mixtral", ""), ("mixtral", "--moe-grouped-gemm")],
}
SLOW = ("two", "four") # half a minute of processor for each process


@pytest.fixture(scope="module")
def judged(homes, request):
    "GPTModel's answers for all checkpoints of a group: {(name, flags): folder with logits.pt and what it saved}."
    root, done = homes[0], {}

    def get(group):
        if group in done: return done[group]
        paths = [request.getfixturevalue("older"), ROOT] if group == "older" else [ROOT]
        env = {**os.environ, "PYTHONPATH": os.pathsep.join(str(p) for p in paths), "CUDA_DEVICE_MAX_CONNECTIONS": "1", "OMP_NUM_THREADS": "1"}
        words, done[group] = [], {}
        for i, (name, flags) in enumerate(CASES[group]):
            go(root / name, root / f"{group}{i}", "--to mcore --verify", flags)
            words += [root / f"{group}{i}", root / f"{group}{i}-theirs"]
            done[group][name, flags] = words[-1]
        r = subprocess.run([sys.executable, ROOT / "tests/megatron_peer.py", *words], env=env, capture_output=True, text=True, stdin=subprocess.DEVNULL, timeout=600)
        assert r.returncode == 0, r.stderr[-3000:]
        assert ("core " + (OLD if group == "older" else version("megatron-core"))) in r.stdout
        return done[group]
    return get


@pytest.mark.parametrize(("group", "name", "flags"), [pytest.param(g, *c, marks=[pytest.mark.slow] if g in SLOW else []) for g, cs in CASES.items() for c in cs])
def test_gptmodel_scores_like_transformers_and_saves_what_we_read(homes, judged, tmp_path, group, name, flags):
    root, scores = homes
    theirs = judged(group)[name, flags]
    got = torch.load(theirs / "logits.pt")[..., :96]
    assert float(scores[name].std()) > 0.5 and float((got - scores[name]).abs().max()) < 1e-4
    go(theirs, tmp_path / "home", "--to hf --verify --hf-config", root / name)
    one, two = (load_file(d / "model.safetensors") for d in (root / name, tmp_path / "home"))
    assert one.keys() == two.keys() and all(torch.equal(v, two[k]) for k, v in one.items())
