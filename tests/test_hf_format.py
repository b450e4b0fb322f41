"Folders on disk: read and written as safetensors and transformers do, and refused in a sentence when something is wrong."
import json
import os
import shutil
import subprocess
import sys

import pytest
import torch
from ascend_nb import hf_format
from ascend_nb.config import ModelConfig
from ascend_nb.core import UserError
from ascend_nb.hf_format import load_model, open_weights, save_model, write_safetensors
from ascend_nb.model import Decoder
from safetensors.torch import load_file, save_file

os.environ["HF_HUB_OFFLINE"] = "1"
CFG = dict(vocab_size=96, hidden_size=32, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2, bos_token_id=1, eos_token_id=[2, 5])
X = torch.arange(20).view(2, 10)
HEAD, EMBED, NORM = "lm_head.weight", "model.embed_tokens.weight", "model.norm.weight"


def small(**kw): return Decoder(ModelConfig(**{**CFG, **kw})).init_weights(3).eval()


@pytest.fixture
def folder(tmp_path):
    "An untied model on disk."
    return save_model(small(tie_word_embeddings=False), tmp_path / "model")


def change(folder, fn):
    "Rewrite the weights with the library."
    tensors = load_file(folder / "model.safetensors")
    fn(tensors)
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})


def edit(path, **kw): path.write_text(json.dumps({**json.loads(path.read_text()), **kw}))


def refused(folder, *parts, key=None):
    "Loading raises one sentence with all `parts`."
    with pytest.raises(UserError) as e: load_model(folder)
    for part in parts: assert part in str(e.value), f"{part!r} is not in: {e.value}"
    assert "\n" not in str(e.value) and (key is None or e.value.key == key)


DTYPES = [torch.float32, torch.bfloat16, torch.float16, torch.float64, torch.int64, torch.int32, torch.uint8, torch.bool, torch.float8_e4m3fn]


def test_bytes_are_those_of_the_library(tmp_path):
    torch.manual_seed(0)
    tensors = {f"t{i}.重": (torch.randn(3, i + 1) * 9).to(d) for i, d in enumerate(DTYPES)}
    tensors |= {"scalar": torch.tensor(2.5), "empty": torch.empty(0, 4), "view": torch.randn(4, 6).t()[1:3]}
    write_safetensors(tmp_path / "ours", tensors)
    save_file({k: t.contiguous() for k, t in tensors.items()}, tmp_path / "theirs", {"format": "pt"})
    assert (tmp_path / "ours").read_bytes() == (tmp_path / "theirs").read_bytes()
    (tmp_path / "theirs").rename(tmp_path / "model.safetensors")
    weights = open_weights(tmp_path)
    assert set(weights) == set(tensors) and len(weights) == len(tensors)
    for k, t in tensors.items():
        assert weights.shape(k) == tuple(t.shape) and weights[k].dtype == t.dtype
        assert torch.equal(weights[k].contiguous().flatten().view(torch.uint8), t.contiguous().flatten().view(torch.uint8)), k


@pytest.mark.parametrize("shard", [None, 20_000])
@pytest.mark.parametrize("tied", [True, False])
def test_round_trip(tmp_path, tied, shard):
    model = small(tie_word_embeddings=tied)
    save_model(model, tmp_path / "m", **({"max_shard_bytes": shard} if shard else {}))
    names = {p.name for p in (tmp_path / "m").iterdir()}
    assert ("model.safetensors.index.json" in names) == bool(shard) and ("model.safetensors" in names) == (not shard)
    again, weights = load_model(tmp_path / "m"), open_weights(tmp_path / "m")
    assert torch.equal(again(X), model(X)) and again.cfg == model.cfg and not again.training
    assert all(p.requires_grad for p in again.parameters()) and (HEAD in weights) == (not tied)
    assert json.loads((tmp_path / "m" / "generation_config.json").read_text()) == dict(bos_token_id=1, eos_token_id=[2, 5])
    if shard:
        index = json.loads((tmp_path / "m" / "model.safetensors.index.json").read_text())
        assert index["metadata"]["total_size"] == sum(p.numel() * 4 for p in model.parameters())
        for name in set(index["weight_map"].values()):
            part = load_file(tmp_path / "m" / name)
            assert {k for k, v in index["weight_map"].items() if v == name} == set(part)
            assert sum(t.numel() * 4 for t in part.values()) <= shard or len(part) == 1


def test_names_and_shapes_on_both_sides(folder):
    def spoil(t):
        del t[NORM]
        t["model.extra.weight"], t[EMBED] = torch.ones(2), torch.ones(80, 32)
    change(folder, spoil)
    refused(folder, f"Missing: {NORM}.", "Unexpected: model.extra.weight.", f"Wrong shape: {EMBED} [80, 32], by the config [96, 32]", key="weights_mismatch")


def test_config_of_another_vocabulary(folder):
    edit(folder / "config.json", vocab_size=100)
    refused(folder, "lm_head.weight [96, 32], by the config [100, 32]", EMBED, key="weights_mismatch")


def test_config_of_another_depth_names_some_and_counts_the_rest(folder):
    edit(folder / "config.json", num_hidden_layers=4)
    refused(folder, "Missing: model.layers.2.", "and 10 more")


def test_tied_head(tmp_path):
    folder = save_model(small(), tmp_path / "m")
    change(folder, lambda t: t.update({HEAD: t[EMBED].clone()}))
    assert load_model(folder).lm_head is None
    change(folder, lambda t: t.update({HEAD: t[EMBED] + 1}))
    refused(folder, "tie_word_embeddings", key="tied_differs")
    edit(folder / "config.json", tie_word_embeddings=False)
    assert load_model(folder).lm_head is not None
    change(folder, lambda t: t.pop(HEAD))
    refused(folder, f"Missing: {HEAD}.")


def test_stored_rotary_frequencies_are_let_pass(folder):
    want = load_model(folder)(X)
    change(folder, lambda t: t.update({"model.layers.0.self_attn.rotary_emb.inv_freq": torch.ones(4)}))
    assert torch.equal(load_model(folder)(X), want)


@pytest.mark.parametrize("keep", [0, 4, 200, -1])
def test_truncated_file(folder, keep):
    path = folder / "model.safetensors"
    path.write_bytes(path.read_bytes()[:keep])
    refused(folder, "model.safetensors", "Expected a whole weights file", key="bad_weights")


def test_corrupt_header(folder):
    path, raw = folder / "model.safetensors", bytearray((folder / "model.safetensors").read_bytes())
    raw[10:20] = b"\xff" * 10
    path.write_bytes(raw)
    refused(folder, "Expected a whole weights file", key="bad_weights")


def test_file_cut_while_it_is_open(folder):
    weights = open_weights(folder)
    os.truncate(folder / "model.safetensors", 9000)
    with pytest.raises(UserError, match="ends within"): [weights[k] for k in weights]


def test_shards_and_index(tmp_path):
    folder = save_model(small(), tmp_path / "m", max_shard_bytes=20_000)
    index = folder / "model.safetensors.index.json"
    full = json.loads(index.read_text())
    edit(index, weight_map={**full["weight_map"], "model.ghost": "model-00001-of-00007.safetensors"})
    refused(folder, "model.ghost", "index.json", key="lost_shard")
    edit(index, weight_map={**full["weight_map"], "model.ghost": "model-00009.safetensors"})
    refused(folder, "model-00009.safetensors", key="lost_shard")
    for name in ("../" + folder.name + "/model-00001-of-00007.safetensors", str(folder / "model-00001-of-00007.safetensors"), "..", "a\\b", 7, None):
        edit(index, weight_map={**full["weight_map"], "model.ghost": name})
        refused(folder, str(name), "in the same folder", key="shard_outside")
    index.write_text("{}")
    refused(folder, "weight_map")
    index.write_text("{")
    refused(folder, "not JSON")
    index.unlink()
    refused(folder, "expected model.safetensors or pytorch_model.bin", key="not_found")


def test_no_folder(tmp_path): refused(tmp_path / "none", "config.json", key="not_found")


@pytest.mark.parametrize("zipped", [True, False])
def test_bin_holds_tensors(folder, zipped):
    want = load_model(folder)(X)
    torch.save(load_file(folder / "model.safetensors"), folder / "pytorch_model.bin", _use_new_zipfile_serialization=zipped)
    (folder / "model.safetensors").unlink()
    model = load_model(folder)
    (folder / "pytorch_model.bin").write_bytes(b"") # nothing may still point into the file
    assert torch.equal(model(X), want)
    refused(folder, "pytorch_model.bin", key="bad_weights")


class Evil:
    def __reduce__(self): return (os.system, (f"touch {os.environ['EVIL_MARK']}",))


def test_bin_never_runs_code(folder, tmp_path, monkeypatch):
    monkeypatch.setenv("EVIL_MARK", str(tmp_path / "ran"))
    torch.save({"x": Evil()}, folder / "pytorch_model.bin")
    (folder / "model.safetensors").unlink()
    refused(folder, "pytorch_model.bin", key="bad_weights")
    assert not (tmp_path / "ran").exists()
    torch.save({"state_dict": load_model(save_model(small(), tmp_path / "m")).state_dict()}, folder / "pytorch_model.bin")
    refused(folder, "something else than named tensors")


def test_saving_is_all_or_nothing(folder, monkeypatch):
    before = {p.name: p.read_bytes() for p in folder.iterdir()}

    class Full:
        def save(self, where): raise OSError("disk full")

    with pytest.raises(OSError): save_model(small(), folder, Full())
    assert {p.name: p.read_bytes() for p in folder.iterdir()} == before and [p.name for p in folder.parent.iterdir()] == ["model"]
    real = shutil.disk_usage(folder)
    monkeypatch.setattr(shutil, "disk_usage", lambda p: real._replace(free=1000))
    with pytest.raises(UserError, match="1000 B free"): save_model(small(), folder)
    assert {p.name: p.read_bytes() for p in folder.iterdir()} == before


def test_saving_replaces_a_model_and_nothing_else(folder):
    save_model(small(), folder)
    assert load_model(folder).cfg.tie_word_embeddings
    (folder / "thesis.tex").write_text("x")
    with pytest.raises(UserError, match="Found thesis.tex"): save_model(small(), folder)
    with pytest.raises(UserError, match="Found thesis.tex"): save_model(small(), folder / "thesis.tex")
    assert (folder / "thesis.tex").read_text() == "x"


def test_base_config_keeps_other_keys(folder, tmp_path):
    edit(folder / "config.json", _name_or_path="org/base", pretraining_tp=1)
    save_model(load_model(folder), tmp_path / "new", base_config=folder)
    d = json.loads((tmp_path / "new" / "config.json").read_text())
    assert d["_name_or_path"] == "org/base" and d["torch_dtype"] == "float32"


def test_dtype_is_written_and_kept(tmp_path):
    save_model(small().bfloat16(), tmp_path / "m")
    assert json.loads((tmp_path / "m" / "config.json").read_text())["torch_dtype"] == "bfloat16"
    assert {open_weights(tmp_path / "m")[k].dtype for k in open_weights(tmp_path / "m")} == {torch.bfloat16}
    from transformers import AutoModelForCausalLM

    assert AutoModelForCausalLM.from_pretrained(tmp_path / "m", dtype="auto").dtype == torch.bfloat16


def test_tokenizer_and_generation_config_in_transformers(tmp_path, shared_data):
    from ascend_nb.tokenizers import load_tokenizer
    from transformers import AutoModelForCausalLM, AutoTokenizer, GenerationConfig

    source = next(p.parent for p in sorted((shared_data / "tokenizers").rglob("tokenizer.json")))
    tok = load_tokenizer(source)
    model = small(vocab_size=tok.vocab_size, hidden_size=16)
    save_model(model, tmp_path / "m", tok)
    theirs = AutoTokenizer.from_pretrained(tmp_path / "m")
    text = "Rain falls on 3 hills. 山上下雨。"
    assert theirs(text, add_special_tokens=False)["input_ids"] == tok.encode(text)
    assert GenerationConfig.from_pretrained(tmp_path / "m").eos_token_id == [2, 5]
    x = torch.tensor([tok.encode(text)])
    out = AutoModelForCausalLM.from_pretrained(tmp_path / "m").generate(x, max_new_tokens=3, do_sample=False)
    assert out[0, x.shape[1]] == model(x)[0, -1].argmax()


MEMORY = """
import sys, torch
from ascend_nb.hf_format import load_model, save_model
peak = lambda: next(int(line.split()[1]) for line in open("/proc/self/status") if line.startswith("VmHWM")) / 1024
load_model(sys.argv[3]) # whatever is imported at the first use
start = peak(); model = load_model(sys.argv[1]); loaded = peak(); save_model(model, sys.argv[2]); print(start, loaded, peak())
"""


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_one_copy_in_memory(tmp_path):
    model = small(hidden_size=512, num_hidden_layers=6, vocab_size=8000)
    size = sum(p.numel() * 4 for p in model.parameters()) / 2**20
    assert size > 80
    save_model(model, tmp_path / "m")
    tiny = save_model(small(), tmp_path / "tiny")
    out = subprocess.run([sys.executable, "-c", MEMORY, tmp_path / "m", tmp_path / "again", tiny], capture_output=True, text=True, check=True)
    start, loaded, saved = map(float, out.stdout.split())
    assert loaded - start < 1.35 * size, f"{loaded - start:.0f} MiB to load {size:.0f} MiB"
    assert saved - loaded < 0.35 * size, f"{saved - loaded:.0f} MiB more to save {size:.0f} MiB"
    assert (tmp_path / "m" / hf_format.SAFE).read_bytes() == (tmp_path / "again" / hf_format.SAFE).read_bytes()
