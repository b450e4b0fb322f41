"""Adapters that are trained here, beside peft's own: the same scores and gradients, the same files; into the matrices and out again; errors that name the cause."""
import json
from dataclasses import replace

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from peft.optimizers import create_loraplus_optimizer
from safetensors.torch import load_file, save_file
from test_converters import family_shape
from test_lora import IDS, MODELS, base, far, small_bases
from torch.nn import functional as F
from transformers import AutoConfig, AutoModelForCausalLM

from ascend_nb.adapter_files import load_adapter, save_adapter
from ascend_nb.adapters import LoraSpec, add_adapter, book, disabled, find_targets, merge_adapter, pairs, remove_adapter, unmerge_adapter, use_adapter, wholes
from ascend_nb.adapter_runs import rates
from ascend_nb.config import TrainConfig
from ascend_nb.core import UserError
from ascend_nb.hf_format import load_model, save_model
from ascend_nb.model import Decoder
from ascend_nb.trainer import make_optimizer
from ascend_nb.tuning import LoraConfig as LoraKnobs

@pytest.fixture(scope="module")
def homes(tmp_path_factory): return small_bases(tmp_path_factory.mktemp("bases"))


def shake(model, size=0.05, seed=3):
    "Numbers for whatever learns, as after some training."
    g = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for _, p in sorted(model.named_parameters()):
            if p.requires_grad: p.add_(torch.randn(p.shape, generator=g) * size)


def learning(model): return {n: p for n, p in model.named_parameters() if p.requires_grad}


def loss_of(logits): return F.cross_entropy(logits[:, :-1].flatten(0, 1), IDS[:, 1:].flatten())


def theirs(folder, out, **kw):
    "An adapter that peft made and saved."
    torch.manual_seed(3)
    model = get_peft_model(base(folder), LoraConfig(**{"r": 4, "lora_alpha": 6, **kw}))
    shake(model)
    model.save_pretrained(out)
    return model.eval()


ALL = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
KINDS = {
    "lora": dict(target_modules="all-linear"),
    "rslora": dict(r=9, use_rslora=True, target_modules=["q_proj", "v_proj", "down_proj"]),
    "dora": dict(use_dora=True, target_modules=ALL),
    "dora rslora": dict(use_dora=True, use_rslora=True, target_modules=["k_proj", "up_proj"]),
    "patterns": dict(target_modules=["k_proj", "down_proj"], rank_pattern={"down_proj": 2}, alpha_pattern={"layers.2.self_attn.k_proj": 5}),
    "whole": dict(target_modules=["q_proj"], modules_to_save=["lm_head", "embed_tokens"]),
}


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("model", ["llama", "qwen2"])
def test_scores_and_gradients_of_peft(homes, tmp_path, model, kind):
    "Their file in ours: the same logits, the same gradient of every A, B, length and whole matrix; our file in theirs again."
    peft = theirs(homes / model, tmp_path / "a", **KINDS[kind])
    ours = load_model(homes / model)
    with torch.no_grad(): plain = ours(IDS)
    spec = load_adapter(ours, tmp_path / "a")
    want, got = peft(IDS).logits, ours(IDS)
    assert far(got, want) < 1e-5 and far(plain, want) > 1e-3
    loss_of(want).backward()
    loss_of(got).backward()
    grads, seen = {n: p.grad for n, p in peft.named_parameters() if p.requires_grad}, set()
    for p, pair in pairs(ours, "default").items():
        at = f"base_model.model.{p.removesuffix('.weight')}.lora_"
        for key, mine in ((f"{at}A.default.weight", pair.A), (f"{at}B.default.weight", pair.B), (f"{at}magnitude_vector.default.weight", pair.magnitude)):
            if mine is None: continue
            assert far(mine.grad, grads[key]) < 1e-4, key
            seen.add(key)
    for p, own in wholes(ours, "default").items():
        key = f"base_model.model.{p.removesuffix('.weight')}.modules_to_save.default.weight"
        assert far(own.grad, grads[key]) < 1e-4, key
        seen.add(key)
    assert seen == set(grads) and {id(p) for p in ours.parameters() if p.requires_grad} == {id(p) for p in ours.parameters() if p.grad is not None}
    assert (spec.dora, spec.rslora) == (bool(KINDS[kind].get("use_dora")), bool(KINDS[kind].get("use_rslora")))
    save_adapter(ours, tmp_path / "b", base=str(homes / model))
    one, two = (load_file(tmp_path / x / "adapter_model.safetensors") for x in "ab")
    assert {k: v.shape for k, v in one.items()} == {k: v.shape for k, v in two.items()} and all(torch.equal(v, two[k]) for k, v in one.items())
    with torch.no_grad(): assert far(PeftModel.from_pretrained(base(homes / model), tmp_path / "b")(IDS).logits, want) < 1e-5
    old, new = (json.loads((tmp_path / x / "adapter_config.json").read_text()) for x in "ab")
    for k in ("peft_type", "r", "lora_alpha", "use_dora", "use_rslora", "lora_dropout", "bias"): assert old[k] == new[k], k


@pytest.mark.parametrize("model", MODELS)
def test_made_here_opens_there(homes, tmp_path, model):
    ours = load_model(homes / model)
    add_adapter(ours, LoraSpec(4, 8, ["query_key_value", "dense_4h_to_h"], dora=True, whole=("embed_tokens", "lm_head")))
    shake(ours)
    save_adapter(ours, tmp_path / "a")
    with torch.no_grad():
        want, got = ours(IDS), PeftModel.from_pretrained(base(homes / model), tmp_path / "a")(IDS).logits
        assert far(got, want) < 1e-5
        again = load_model(homes / model)
        load_adapter(again, tmp_path / "a", "x")
        assert torch.equal(again(IDS), want)


FUSED = { # families that store several matrices as one, or turned
    "gpt2": (dict(n_embd=32, n_layer=2, n_head=4, n_positions=64, n_inner=128), ["c_attn", "c_proj", "c_fc"], dict(num_key_value_heads=4, intermediate_size=128)),
    "bloom": (dict(hidden_size=32, n_layer=2, n_head=4), ["query_key_value", "dense", "dense_h_to_4h"], dict(num_key_value_heads=4, intermediate_size=128)),
    "phi3": (dict(hidden_size=32, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2, intermediate_size=48, tie_word_embeddings=False), ["qkv_proj", "o_proj", "gate_up_proj"], {}),
}


@pytest.mark.parametrize("dora", [False, True])
@pytest.mark.parametrize("name", FUSED)
def test_fused_and_turned_matrices(tmp_path, name, dora):
    "Their adapter of one fused matrix is ours of several, and one again in the file."
    hf, targets, _ = FUSED[name]
    torch.manual_seed(0)
    config = AutoConfig.for_model(name, vocab_size=61, pad_token_id=0, bos_token_id=1, eos_token_id=2, **hf)
    AutoModelForCausalLM.from_config(config).save_pretrained(tmp_path / "hf")
    with torch.no_grad(): want = theirs(tmp_path / "hf", tmp_path / "a", target_modules=targets, use_dora=dora, fan_in_fan_out=name == "gpt2")(IDS).logits
    ours = load_model(tmp_path / "hf")
    with torch.no_grad(): plain = ours(IDS)
    load_adapter(ours, tmp_path / "a")
    save_adapter(ours, tmp_path / "b")
    assert set(find_targets(ours, targets)) == set(pairs(ours, "default"))
    with torch.no_grad():
        assert far(ours(IDS), want) < 1e-5 and far(plain, want) > 1e-3
        assert far(PeftModel.from_pretrained(base(tmp_path / "hf"), tmp_path / "b")(IDS).logits, want) < 1e-5


@pytest.mark.parametrize("kind", [dict(), dict(rslora=True), dict(dora=True), dict(whole=("lm_head",))])
def test_merged_is_the_same_and_comes_out_bit_for_bit(homes, tmp_path, kind):
    ours = load_model(homes / "llama")
    before = {k: v.clone() for k, v in ours.state_dict().items()}
    add_adapter(ours, LoraSpec(4, 8, **kind))
    shake(ours)
    with torch.no_grad(): want = ours(IDS)
    moved = merge_adapter(ours, IDS)
    with torch.no_grad(): got = ours(IDS)
    assert far(got, want) < 1e-5 and abs(moved.largest - float((got - want).abs().max())) < 1e-7 and moved.same == 1
    save_model(ours, tmp_path / "merged")
    with torch.no_grad(): assert far(base(tmp_path / "merged")(IDS).logits, want) < 1e-5
    with pytest.raises(UserError, match="unmerge_adapter"): use_adapter(ours)
    unmerge_adapter(ours, IDS)
    with torch.no_grad(): assert torch.equal(ours(IDS), want)
    assert all(torch.equal(ours.state_dict()[k], v) for k, v in before.items())
    remove_adapter(ours, "default")
    assert set(ours.state_dict()) == set(before) and all(p.requires_grad for p in ours.parameters())


@pytest.mark.parametrize("kind", [dict(), dict(rslora=True, dropout=0.1), dict(dora=True, dropout=0.1), dict(whole=("embed_tokens",))])
def test_training_lowers_the_loss_and_leaves_the_base(homes, kind):
    torch.manual_seed(0)
    ours = load_model(homes / "tied").train()
    before = {k: v.clone() for k, v in ours.state_dict().items()}
    add_adapter(ours, LoraSpec(4, 8, **kind))
    optimizer = make_optimizer(learning(ours), TrainConfig(lr=1e-3), rates(LoraKnobs(lora_target_modules=["all-linear"], loraplus_lr_ratio=4)))
    losses = []
    for _ in range(10):
        loss = loss_of(ours(IDS))
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    assert losses[-1] < losses[0] - 0.1, losses
    assert all(torch.equal(ours.state_dict()[k], v) for k, v in before.items())


def test_dropout_is_that_of_peft(homes, tmp_path):
    "The same random numbers: one layer, one adapter."
    for kind in (dict(), dict(use_dora=True)):
        out = tmp_path / f"a{len(kind)}"
        peft = theirs(homes / "llama", out, target_modules=["model.layers.0.self_attn.q_proj"], lora_dropout=0.3, **kind)
        ours = load_model(homes / "llama")
        load_adapter(ours, out)
        with torch.no_grad():
            quiet = peft(IDS).logits
            torch.manual_seed(1)
            want = peft.train()(IDS).logits
            torch.manual_seed(1)
            got = ours.train()(IDS)
        assert far(got, want) < 1e-5 and far(quiet, want) > 1e-4


def test_several_side_by_side(homes, tmp_path):
    peft = {n: theirs(homes / "llama", tmp_path / n, **KINDS[k]) for n, k in (("a", "lora"), ("b", "dora"), ("c", "whole"))}
    ours = load_model(homes / "llama")
    with torch.no_grad(): plain = ours(IDS)
    for n in peft: load_adapter(ours, tmp_path / n, n)
    with torch.no_grad():
        for n in "bcab":
            use_adapter(ours, n)
            assert far(ours(IDS), peft[n](IDS).logits) < 1e-5
            with disabled(ours): assert torch.equal(ours(IDS), plain)
        remove_adapter(ours, "b")
        assert torch.equal(ours(IDS), plain) and sorted(book(ours).specs) == ["a", "c"]
        use_adapter(ours, "c")
        assert far(ours(IDS), peft["c"](IDS).logits) < 1e-5


def test_groups_of_lora_plus_are_those_of_peft(homes, tmp_path):
    peft = theirs(homes / "llama", tmp_path / "a", **KINDS["dora"])
    ours = load_model(homes / "llama")
    load_adapter(ours, tmp_path / "a")
    want = create_loraplus_optimizer(peft, torch.optim.AdamW, lr=1e-4, loraplus_lr_ratio=16, loraplus_weight_decay=0.1).param_groups
    rate = lambda groups, pick: {round(g["lr"], 9) for g in groups for p in g["params"] if any(p is q for q in pick)}
    knobs = LoraKnobs(lora_target_modules=["all-linear"], loraplus_lr_ratio=16)
    got = make_optimizer(learning(ours), TrainConfig(lr=1e-4, weight_decay=0.1), rates(knobs)).param_groups
    for g in got: g["lr"] *= g["rate"]  # as `Weights.update` does at every step
    for side in ("A", "B"):
        mine = [getattr(p, side) for p in pairs(ours, "default").values()]
        them = [p for n, p in peft.named_parameters() if f"lora_{side}." in n]
        assert rate(got, mine) == rate(want, them) and len(rate(got, mine)) == 1
    assert rate(got, [p.magnitude for p in pairs(ours, "default").values()]) == {1.6e-3}


@pytest.mark.parametrize("name", ["mixtral", "qwen2_moe", "deepseek_v2"])
def test_experts(tmp_path, name):
    "Each expert's own change: the same as a model whose stacks were changed by hand; saved and read."
    torch.manual_seed(0)
    cfg = replace(family_shape(name), num_hidden_layers=2)
    ours, ids = Decoder(cfg).init_weights(0).eval(), IDS
    plain = Decoder(cfg).eval()
    plain.load_state_dict(ours.state_dict())
    add_adapter(ours, LoraSpec(3, 6, "all-linear"))
    shake(ours)
    mine = pairs(ours, "default")
    assert any(p.A.dim() == 3 for p in mine.values())
    with torch.no_grad():
        for n, p in plain.named_parameters():
            if n in mine: p += 2 * torch.stack([b @ a for a, b in zip(mine[n].A, mine[n].B, strict=True)]) if p.dim() == 3 else 2 * mine[n].B @ mine[n].A
    got, want = ours(ids), plain(ids)
    assert far(got, want) < 1e-5
    loss_of(got).backward()
    loss_of(want).backward()
    grads = {n: p.grad for n, p in plain.named_parameters()}
    for n, p in mine.items(): assert far(p.A.grad, 2 * p.B.transpose(-1, -2) @ grads[n]) < 1e-4 and far(p.B.grad, 2 * grads[n] @ p.A.transpose(-1, -2)) < 1e-4
    save_adapter(ours, tmp_path / "a")
    assert set(find_targets(ours, ["linear_fc1"])) >= {n for n in mine if n.endswith(("experts.gate_proj", "experts.up_proj"))}
    with torch.no_grad():
        merge_adapter(ours, ids)
        assert far(ours(ids), want) < 1e-5
        unmerge_adapter(ours)
        load_adapter(ours, tmp_path / "a", "again")
        assert far(ours(ids), got) < 1e-6
    with pytest.raises(UserError, match="DoRA on the experts"): add_adapter(ours, LoraSpec(dora=True), "x")


BAD = {
    "Did you mean q_proj": lambda m, a: add_adapter(m, LoraSpec(targets=["q_porj"])),
    "--lora-modules-to-save embed_tokens": lambda m, a: add_adapter(m, LoraSpec(targets=["q_proj", "embed_tokens"])),
    "target 'nothing', which": lambda m, a: add_adapter(m, LoraSpec(targets="nothing")),
    "target 'gate', which": lambda m, a: add_adapter(m, LoraSpec(whole=("gate",))),
    "a rank of at least 1": lambda m, a: add_adapter(m, LoraSpec(r=0)),
    "adapter name 'x.y'": lambda m, a: add_adapter(m, name="x.y"),
    "rank 4 in .* expected rank 8": lambda m, a: load_adapter(m, a, spec=LoraSpec(r=8)),
    "no adapter at work": lambda m, a: merge_adapter(m),
    "nothing is merged": lambda m, a: unmerge_adapter(m),
    "Found adapter='y'": lambda m, a: use_adapter(m, "y"),
    "made for another model": lambda m, a: load_adapter(Decoder(replace(m.cfg, num_hidden_layers=2)), a),
    "64 x 48 in the llama model": lambda m, a: load_adapter(Decoder(replace(m.cfg, hidden_size=64, head_dim=16)), a),
}


@pytest.mark.parametrize("sentence", BAD)
def test_one_sentence(homes, tmp_path, sentence):
    theirs(homes / "llama", tmp_path / "a", **KINDS["rslora"] | dict(r=4))
    ours = load_model(homes / "llama")
    with pytest.raises(UserError, match=sentence): BAD[sentence](ours, tmp_path / "a")
    assert not book(ours).specs and all(p.requires_grad for p in ours.parameters())


def test_damaged_files(homes, tmp_path):
    "Of other sizes, without a matrix, of a kind that is not known: nothing is put on."
    theirs(homes / "llama", tmp_path / "a", **KINDS["dora"])
    f, c = tmp_path / "a/adapter_model.safetensors", tmp_path / "a/adapter_config.json"
    whole, conf, ours = load_file(f), json.loads(c.read_text()), load_model(homes / "llama")
    for drop, sentence in (("lora_B", "no change of"), ("magnitude", "no change of")):
        key = next(k for k in whole if drop in k)
        save_file({k: v for k, v in whole.items() if k != key}, f)
        with pytest.raises(UserError, match=sentence): load_adapter(ours, tmp_path / "a")
    save_file(whole, f)
    for change, sentence in ((dict(r=5), "expected 5"), (dict(peft_type="LOHA"), "LOHA"), (dict(lora_bias=True), "biases of the adapter's own"), (dict(use_dora=False), "magnitude")):
        c.write_text(json.dumps(conf | change))
        with pytest.raises(UserError, match=sentence): load_adapter(ours, tmp_path / "a")
    assert not book(ours).specs


def test_save_refuses_a_taken_folder_and_keeps_it(homes, tmp_path):
    ours = load_model(homes / "llama")
    add_adapter(ours, LoraSpec(2, 4))
    save_adapter(ours, tmp_path / "a")
    before = (tmp_path / "a/adapter_model.safetensors").read_bytes()
    shake(ours)
    with pytest.raises(UserError, match="dir|folder"): save_adapter(ours, tmp_path / "a")
    assert (tmp_path / "a/adapter_model.safetensors").read_bytes() == before and [p.name for p in tmp_path.iterdir()] == ["a"]
