"""Adapters of peft and of Megatron's ranks: merged by us as by peft and by a rank's own product, written so that peft opens them, and refused where they belong elsewhere."""
import json
import shutil
from dataclasses import replace
from zlib import crc32

import numpy as np
import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from test_converters import family_shape, go, llama, make
from transformers import AutoConfig, AutoModelForCausalLM

from ascend_nb import converters
from ascend_nb.convert import as_model
from ascend_nb.core import UserError
from ascend_nb.lora import TILE, Low, Merged, read_adapter, read_peft, write_peft
from ascend_nb.megatron_source import open_hf

IDS = torch.arange(24).reshape(2, 12) * 7 % 61
BIASED = dict(llama(), model_type="qwen2", architectures=["Qwen2ForCausalLM"])
MODELS = {"llama": llama(), "tied": llama(tie_word_embeddings=True), "qwen2": BIASED}


def base(folder): return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)


def small_bases(root):
    "Folders of small random models, in fp32, whose logits are of ordinary size."
    for name, hf in MODELS.items():
        make(root / name, hf, torch.float32)
        f = root / name / "model.safetensors"
        save_file({k: v * 0.2 if v.ndim > 1 else v for k, v in load_file(f).items()}, f, {"format": "pt"})
    return root


@pytest.fixture(scope="module")
def homes(tmp_path_factory): return small_bases(tmp_path_factory.mktemp("bases"))


def far(a, b): return float(((a - b).abs().max() / b.abs().max()).detach())


def scores(source):
    with torch.no_grad(): return as_model(source)(IDS)


def train(folder, out, dtype=torch.float32, **kw):
    "An adapter that peft made, with random numbers in A and B; returns peft's own scores after its own merge."
    torch.manual_seed(3)
    model = get_peft_model(base(folder), LoraConfig(**kw))
    for n, p in model.named_parameters():
        if "lora_" in n or "modules_to_save" in n: p.data = (torch.randn_like(p) * 0.1).to(dtype).float()
    model.save_pretrained(out)
    if dtype != torch.float32: save_file({k: v.to(dtype) for k, v in load_file(out / "adapter_model.safetensors").items()}, out / "adapter_model.safetensors", {"format": "pt"})
    with torch.no_grad(): return model.merge_and_unload()(IDS).logits


KINDS = {
    "plain": dict(r=4, lora_alpha=8, target_modules=["q_proj", "v_proj"]),
    "everywhere": dict(r=4, lora_alpha=2, target_modules="all-linear"),
    "rslora": dict(r=9, lora_alpha=3, use_rslora=True, target_modules=["o_proj", "gate_proj", "up_proj", "down_proj"]),
    "patterns": dict(r=4, lora_alpha=8, target_modules=["k_proj", "down_proj"], rank_pattern={"down_proj": 2, r"layers\.1\..*k_proj": 3}, alpha_pattern={"layers.2.self_attn.k_proj": 5}),
    "regex": dict(r=4, lora_alpha=8, target_modules=r".*layers\.[13]\.mlp\.\w+_proj"),
    "some layers": dict(r=4, lora_alpha=8, target_modules=["q_proj"], layers_to_transform=[0, 2]),
    "but": dict(r=4, lora_alpha=8, target_modules=["q_proj", "up_proj"], exclude_modules=["model.layers.1.mlp.up_proj"]),
    "embedding": dict(r=4, lora_alpha=8, target_modules=["embed_tokens", "q_proj"]),
    "head": dict(r=4, lora_alpha=8, target_modules=["lm_head", "q_proj"]),
    "whole": dict(r=4, lora_alpha=8, target_modules=["q_proj"], modules_to_save=["lm_head", "embed_tokens"]),
}


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("model", ["llama", "qwen2"])
def test_merged_as_peft_merges(homes, tmp_path, model, kind):
    want = train(homes / model, tmp_path / "a", **KINDS[kind])
    source = open_hf(homes / model)
    merged = Merged(source, read_peft(tmp_path / "a", source.cfg))
    assert far(scores(merged), want) < 1e-5 < 1e-3 < far(scores(source), want)


FUSED = { # families that store several matrices as one, or turned: transformers' own small models
    "gpt2": (dict(n_embd=32, n_layer=2, n_head=4, n_positions=64, n_inner=128), ["c_attn", "c_proj", "c_fc"], dict(num_key_value_heads=4, intermediate_size=128)),
    "bloom": (dict(hidden_size=32, n_layer=2, n_head=4), ["query_key_value", "dense", "dense_h_to_4h"], dict(num_key_value_heads=4, intermediate_size=128)),
    "phi3": (dict(hidden_size=32, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2, intermediate_size=48, tie_word_embeddings=False), ["qkv_proj", "o_proj", "gate_up_proj", "down_proj"], {}),
}


@pytest.mark.parametrize("name", FUSED)
def test_fused_and_turned_matrices(tmp_path, name):
    "Merged through canonical parameters and written back in the family's own packing; and the adapter itself, there and back."
    hf, targets, ours = FUSED[name]
    torch.manual_seed(0)
    config = AutoConfig.for_model(name, vocab_size=61, pad_token_id=0, bos_token_id=1, eos_token_id=2, **hf)
    AutoModelForCausalLM.from_config(config).save_pretrained(tmp_path / "hf")
    want = train(tmp_path / "hf", tmp_path / "a", r=4, lora_alpha=6, target_modules=targets, rank_pattern={targets[0]: 3})
    source = open_hf(tmp_path / "hf", replace(family_shape(name), num_hidden_layers=2, **ours))
    adapter = read_peft(tmp_path / "a", source.cfg)
    texts = {p.name: p for p in (tmp_path / "hf").glob("*.json")}
    converters.run(Merged(source, adapter), converters.hf_target(source, tmp_path / "out", texts, converters.hf_files(tmp_path / "hf")), quiet=True)
    with torch.no_grad(): got = base(tmp_path / "out")(IDS).logits
    write_peft(adapter, source.cfg, tmp_path / "again")
    conf = json.loads((tmp_path / "again/adapter_config.json").read_text())
    assert conf["fan_in_fan_out"] == (name == "gpt2") and set(conf["target_modules"]) == set(targets)
    with torch.no_grad(): again, plain = PeftModel.from_pretrained(base(tmp_path / "hf"), tmp_path / "again")(IDS).logits, base(tmp_path / "hf")(IDS).logits
    assert far(got, want) < 1e-5 and far(again, want) < 1e-5 and far(plain, want) > 1e-3


@pytest.mark.parametrize("to", ["hf", "mcore --tp 2 --pp 2", "legacy --num-layers-per-virtual-pipeline-stage 1 --pp 2"])
def test_merged_on_the_way(homes, tmp_path, to):
    want = train(homes / "llama", tmp_path / "a", **KINDS["everywhere"])
    paper = go(homes / "llama", tmp_path / "out", "--to", to, "--verify --lora-load", tmp_path / "a")
    assert paper["verified"]["logits"] == "equal" and "with a PEFT adapter" in paper["source"]["kind"]
    assert any("adapter_model" in f for f in paper["source"]["files"])
    if to != "hf": go(tmp_path / "out", tmp_path / "home", "--to hf --hf-config", homes / "llama")
    with torch.no_grad(): got = base(tmp_path / ("out" if to == "hf" else "home"))(IDS).logits
    assert far(got, want) < 1e-5


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_sums_in_fp32_are_rounded_once(homes, tmp_path, dtype):
    make(tmp_path / "half", llama(), dtype)
    train(homes / "llama", tmp_path / "a", dtype, **KINDS["plain"])
    go(tmp_path / "half", tmp_path / "out", "--to hf --lora-load", tmp_path / "a")
    old, new, ab = (load_file(tmp_path / p) for p in ("half/model.safetensors", "out/model.safetensors", "a/adapter_model.safetensors"))
    changed = 0
    for k, w in old.items():
        a = ab.get(f"base_model.model.{k.removesuffix('.weight')}.lora_A.weight")
        if a is None: assert torch.equal(w, new[k]); continue
        b = ab[f"base_model.model.{k.removesuffix('.weight')}.lora_B.weight"]
        exact = w.double() + 2 * b.double() @ a.double()
        assert float((new[k] != exact.to(dtype)).double().mean()) < 0.01 # a tie apart
        changed += 1
    assert changed == 8


def test_old_files_open_too(homes, tmp_path):
    "adapter_model.bin, and names that carry the adapter's own."
    want = train(homes / "llama", tmp_path / "a", **KINDS["plain"])
    tensors = load_file(tmp_path / "a/adapter_model.safetensors")
    (tmp_path / "a/adapter_model.safetensors").unlink()
    torch.save({k.replace(".weight", ".default.weight"): v for k, v in tensors.items()}, tmp_path / "a/adapter_model.bin")
    source = open_hf(homes / "llama")
    assert far(scores(Merged(source, read_peft(tmp_path / "a", source.cfg))), want) < 1e-5


def test_any_rectangle_has_the_same_bits():
    g = np.random.default_rng(1)
    low = Low(*(g.normal(size=s).astype(np.float32) for s in ((5, 2 * TILE[1] + 37), (3 * TILE[0] + 11, 5))), 0.7)
    whole = low.at(*((0, n) for n in low.size))
    np.testing.assert_allclose(whole, 0.7 * low.b.astype(float) @ low.a.astype(float), atol=1e-5)
    for _ in range(50):
        r, c = (sorted(g.choice(n + 1, 2, replace=False)) for n in low.size)
        assert np.array_equal(low.at(tuple(r), tuple(c)), whole[slice(*r), slice(*c)])


# --- Megatron's ranks -----------------------------------------------------------------------------------------------

WORDS = dict(legacy=["query_key_value", "dense", "dense_h_to_4h", "dense_4h_to_h"], mcore=["linear_qkv", "linear_proj", "linear_fc1", "linear_fc2"])


def ranks(folder): return sorted(folder.rglob("model_optim_rng.pt"))


def chunks(d, legacy): # the flat dicts that hold the layers of each chunk
    return [v["language_model"]["encoder"] if legacy else v for k, v in sorted(d.items()) if k.startswith("model")]


def train_ranks(mg, lora, merged, style, r=4, alpha=8, alone=False):
    "Adapters beside the matrices of a checkpoint, as a rank's own training leaves them; and each rank's own merge."
    shutil.copytree(mg, lora)
    shutil.copytree(mg, merged)
    for p, q in zip(ranks(lora), ranks(merged), strict=True):
        d, m, t = torch.load(p, weights_only=False), torch.load(q, weights_only=False), int(p.parent.name.split("_")[2])
        for v, (one, two) in enumerate(zip(chunks(d, style == "legacy"), chunks(m, style == "legacy"), strict=True)):
            for k in [k for k in one if k.split(".")[-2] in WORDS[style] and k.endswith("weight")]:
                w, row, place = one[k], k.split(".")[-2] in (WORDS[style][1], WORDS[style][3]), f"{p.parent.name.split('_', 3)[3:]}{v}{k}"
                draw = lambda seed, *s: torch.randn(*s, generator=torch.Generator().manual_seed(seed % 2**31)) * 0.1
                mine, alike = crc32(place.encode()) + t + 1, crc32(place.encode())
                a, b = draw(mine if row else alike, r, w.shape[1]), draw((alike if row else mine) + 77, w.shape[0], r)
                two[k] = w + alpha / r * b @ a
                stem = k.removesuffix("weight")
                one |= {f"{stem}base_layer.weight": one.pop(k), f"{stem}lora_A.default.weight": a, f"{stem}lora_B.default.weight": b}
            if alone: # a legacy checkpoint keeps nothing else
                for k in [k for k in one if "lora" not in k]: del one[k]
        if alone: d["model"]["language_model"] = {"encoder": d["model"]["language_model"]["encoder"]}
        torch.save(d, p)
        torch.save(m, q)


def weights(folder): return load_file(folder / "model.safetensors")


CASES = [("legacy", "--tp 2", True), ("legacy", "--tp 2 --pp 2", False), ("mcore", "--tp 2 --pp 2", False), ("mcore", "--pp 2 --num-layers-per-virtual-pipeline-stage 1", False), ("legacy", "", True),
         ("mcore", "--pp 2 --noop-layers 0,5", False)]


@pytest.mark.parametrize(("style", "flags", "alone"), CASES)
def test_ranks_merged_as_each_rank_would(homes, tmp_path, style, flags, alone):
    go(homes / "qwen2", tmp_path / "mg", "--to", style, flags)
    train_ranks(tmp_path / "mg", tmp_path / "lora", tmp_path / "merged", style, alone=alone)
    go(tmp_path / "merged", tmp_path / "want", "--to hf --hf-config", homes / "qwen2")
    words = "--to hf --lora-r 4 --lora-alpha 8 --lora-target-modules", *WORDS[style], "--hf-config", homes / "qwen2", "--lora-load", tmp_path / "lora"
    go(tmp_path / "mg", tmp_path / "one", "--verify", *words)
    go(homes / "qwen2", tmp_path / "two", *words) # the base may come from elsewhere
    want, old = weights(tmp_path / "want"), weights(homes / "qwen2")
    for got in (weights(tmp_path / "one"), weights(tmp_path / "two")):
        assert all(torch.allclose(got[k], want[k], atol=1e-6) for k in want)
    assert sum(not torch.equal(want[k], old[k]) for k in want) == 4 * 7


@pytest.mark.parametrize(("style", "flags", "alone"), CASES[:4])
def test_ranks_written_for_peft(homes, tmp_path, style, flags, alone):
    go(homes / "llama", tmp_path / "mg", "--to", style, flags)
    train_ranks(tmp_path / "mg", tmp_path / "lora", tmp_path / "merged", style, alone=alone)
    lora = tmp_path / ("lora" if alone else "mg")
    paper = go(lora if not alone else tmp_path / "mg", tmp_path / "peft", "--to hf --save-lora-to-hf --lora-r 4 --lora-alpha 8 --lora-load", tmp_path / "lora", "--hf-config", homes / "llama")
    assert paper["matrices"] == 28 and paper["ranks"] == [4]
    go(tmp_path / "merged", tmp_path / "want", "--to hf --hf-config", homes / "llama")
    conf = json.loads((tmp_path / "peft/adapter_config.json").read_text())
    assert (conf["r"], conf["lora_alpha"], conf["rank_pattern"]) == (4, 8, {}) and len(conf["target_modules"]) == 7
    ab = load_file(tmp_path / "peft/adapter_model.safetensors")
    a = {x: ab[f"base_model.model.model.layers.0.self_attn.{x}_proj.lora_A.weight"] for x in "qkv"}
    assert torch.equal(a["q"], a["k"]) and torch.equal(a["q"], a["v"])
    with torch.no_grad():
        got = PeftModel.from_pretrained(base(homes / "llama"), tmp_path / "peft")(IDS).logits
        want = base(tmp_path / "want")(IDS).logits
    assert far(got, want) < 1e-5


def test_adapter_inside_a_checkpoint(homes, tmp_path):
    "A core checkpoint saves both; what becomes of the adapter has to be said."
    go(homes / "llama", tmp_path / "mg", "--to mcore --tp 2")
    train_ranks(tmp_path / "mg", tmp_path / "lora", tmp_path / "merged", "mcore", r=16, alpha=32)
    home = "--to hf --hf-config", homes / "llama"
    with pytest.raises(UserError, match="--lora-load none"): go(tmp_path / "lora", tmp_path / "x", *home)
    go(tmp_path / "lora", tmp_path / "without", *home, "--lora-load none")
    assert all(torch.equal(v, weights(homes / "llama")[k]) for k, v in weights(tmp_path / "without").items())
    go(tmp_path / "lora", tmp_path / "with", *home, "--lora-load", tmp_path / "lora")
    go(tmp_path / "merged", tmp_path / "want", *home)
    assert all(torch.allclose(v, weights(tmp_path / "want")[k], atol=1e-6) for k, v in weights(tmp_path / "with").items())
    assert go(tmp_path / "lora", tmp_path / "peft", "--to hf --save-lora-to-hf")["matrices"] == 28


def test_three_adapters_in_one_fused_matrix(homes, tmp_path):
    "Queries and keys with adapters of their own on a family that stores them as one: the sum has twice the rank and the same effect."
    from ascend_nb.lora import Piece, join
    g = np.random.default_rng(0)
    low = lambda n, scale: Low(g.normal(size=(3, 8)).astype(np.float32), g.normal(size=(n, 3)).astype(np.float32), scale)
    q, k = low(6, 2.0), low(4, 0.5)
    both = join([Piece((0, 6), (0, 8), q), Piece((6, 10), (0, 8), k)], (10, 8))
    assert both.rank == 6
    np.testing.assert_allclose(both.scale * both.b @ both.a, np.concatenate([2 * q.b @ q.a, 0.5 * k.b @ k.a]), atol=1e-5)


# --- what is refused ------------------------------------------------------------------------------------------------

def edit(folder, tensors=lambda d: None, **conf):
    d = load_file(folder / "adapter_model.safetensors")
    tensors(d)
    save_file(d, folder / "adapter_model.safetensors", {"format": "pt"})
    f = folder / "adapter_config.json"
    f.write_text(json.dumps(json.loads(f.read_text()) | conf))


FIRST = "base_model.model.model.layers.0.self_attn.q_proj."
REFUSALS = {
    "lost B": (lambda f: edit(f, lambda d: d.pop(FIRST + "lora_B.weight")), "lora_lost", "layers.0.self_attn.q_proj"),
    "lost layer": (lambda f: edit(f, lambda d: [d.pop(FIRST + f"lora_{x}.weight") for x in "AB"]), "lora_lost", "layers.0.self_attn.q_proj"),
    "unknown": (lambda f: edit(f, lambda d: d.update({"base_model.model.model.layers.9.self_attn.q_proj.lora_A.weight": torch.ones(4, 32), "base_model.model.model.layers.9.self_attn.q_proj.lora_B.weight": torch.ones(32, 4)})), "lora_names", "layers.9"),
    "wrong width": (lambda f: edit(f, lambda d: d.update({FIRST + "lora_A.weight": torch.ones(4, 48)})), "lora_shape", r"A \(4, 48\) and B \(32, 4\) for a matrix of 32 x 32"),
    "odd ranks": (lambda f: edit(f, lambda d: d.update({FIRST + "lora_B.weight": torch.ones(32, 5)})), "lora_shape", r"B \(32, 5\)"),
    "other rank": (lambda f: edit(f, r=8), "lora_rank", "rank 4"),
    "dora": (lambda f: edit(f, use_dora=True), "lora_kind", "DoRA"),
    "biases": (lambda f: edit(f, bias="all"), "lora_kind", "bias=all"),
    "ia3": (lambda f: edit(f, peft_type="IA3"), "lora_kind", "IA3"),
    "pissa": (lambda f: edit(f, init_lora_weights="pissa_niter_16"), "lora_kind", "pissa"),
    "no config": (lambda f: (f / "adapter_config.json").unlink(), "not_found", "adapter_config.json"),
    "no weights": (lambda f: (f / "adapter_model.safetensors").unlink(), "not_found", "adapter_model.safetensors"),
    "cut": (lambda f: (f / "adapter_model.safetensors").write_bytes((f / "adapter_model.safetensors").read_bytes()[:-9]), "bad_tensors", "adapter_model"),
}


@pytest.fixture(scope="module")
def adapter(homes, tmp_path_factory):
    folder = tmp_path_factory.mktemp("adapter") / "a"
    train(homes / "llama", folder, **KINDS["plain"])
    return folder


@pytest.mark.parametrize("what", REFUSALS)
def test_refused_before_anything_is_written(homes, adapter, tmp_path, what):
    change, key, words = REFUSALS[what]
    shutil.copytree(adapter, tmp_path / "a")
    change(tmp_path / "a")
    with pytest.raises(UserError, match=words) as e: go(homes / "llama", tmp_path / "out", "--to mcore --lora-load", tmp_path / "a")
    assert e.value.key == key and [p.name for p in tmp_path.iterdir()] == ["a"]


def test_adapter_of_another_model(homes, adapter, tmp_path):
    make(tmp_path / "wide", llama(hidden_size=64, head_dim=16))
    with pytest.raises(UserError, match=r"q_proj.lora_A.weight with A \(4, 32\) and B \(32, 4\) for a matrix of 64 x 64 in the llama model"):
        go(tmp_path / "wide", tmp_path / "out", "--to mcore --lora-load", adapter)
    train(homes / "llama", tmp_path / "head", **KINDS["head"])
    with pytest.raises(UserError, match="tied"): go(homes / "tied", tmp_path / "out", "--to mcore --lora-load", tmp_path / "head")


def test_ranks_refused(homes, tmp_path):
    go(homes / "llama", tmp_path / "mg", "--to mcore --tp 2")
    train_ranks(tmp_path / "mg", tmp_path / "lora", tmp_path / "merged", "mcore")
    run = lambda *flags: go(tmp_path / "mg", tmp_path / "out", "--to legacy --lora-load", tmp_path / "lora", *flags)
    with pytest.raises(UserError, match="rank 4.*16.*--lora-r"): run()
    with pytest.raises(UserError, match="linear_fc1.*expected those of linear_qkv"): run("--lora-r 4 --lora-alpha 8 --lora-target-modules linear_qkv")
    with pytest.raises(UserError, match="no lora_A"): go(tmp_path / "mg", tmp_path / "out", "--to legacy --lora-load", tmp_path / "merged")
    with pytest.raises(UserError, match="nowhere"): go(tmp_path / "mg", tmp_path / "out", "--to legacy --lora-load /nowhere")
    make(tmp_path / "wide", llama(hidden_size=64, head_dim=16))
    with pytest.raises(UserError, match=r"linear_.*lora_A.*for a matrix of"): go(tmp_path / "wide", tmp_path / "out", "--to legacy --lora-r 4 --lora-load", tmp_path / "lora")
    p = ranks(tmp_path / "lora")[1]
    d = torch.load(p, weights_only=False)
    d["model"]["decoder.layers.2.self_attention.linear_proj.lora_B.default.weight"][0, 0] += 1
    torch.save(d, p)
    with pytest.raises(UserError, match="o_proj.*same step"): run("--lora-r 4 --lora-alpha 8")
    p.unlink()
    with pytest.raises(UserError): run("--lora-r 4 --lora-alpha 8")
    assert not (tmp_path / "out").exists()


def test_the_checkpoint_knows_its_own_strength(homes, tmp_path):
    go(homes / "llama", tmp_path / "mg", "--to mcore")
    train_ranks(tmp_path / "mg", tmp_path / "lora", tmp_path / "merged", "mcore")
    for p in ranks(tmp_path / "lora"):
        d = torch.load(p, weights_only=False)
        d["args"].lora_r, d["args"].lora_alpha = 4, 6
        torch.save(d, p)
    cfg = type("C", (), dict(lora_load=str(tmp_path / "lora"), lora_r=16, lora_alpha=32, lora_target_modules=[], load_dir=""))
    assert {x.scale for x in read_adapter(open_hf(homes / "llama"), cfg).changes.values()} == {1.5}
