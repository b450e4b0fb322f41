"The sparse families: experts, latent attention and whole models against transformers, with the same weights."
import importlib
import json
import math
import os
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from ascend_nb.config import SampleConfig, TrainConfig
from ascend_nb.core import UserError
from ascend_nb.datasets import Loader, Sample, collate_gpt
from ascend_nb.experts import MoE, balance_loss, expert_load, load_balancing_loss
from ascend_nb.families import config_from_hf, config_to_hf
from ascend_nb.generate import Memory, next_ids
from ascend_nb.hf_format import load_model, open_weights, save_model
from ascend_nb.layers import Rope
from ascend_nb.losses import causal_lm_loss
from ascend_nb.mla import MLA
from ascend_nb.model import Decoder, KVCache
from ascend_nb.names import canonical_shapes, hf_entries, hf_shape
from ascend_nb.sampling import choose
from ascend_nb.shapes import ModelConfig
from ascend_nb.trainer import Trainer

os.environ["HF_HUB_OFFLINE"] = "1"


def close(a, b, limit, what):
    "Is the largest difference below `limit`? The figure is printed for a failure's reader."
    d = (a - b).abs().max().item()
    assert d < limit, f"{what}: {d:.2e}"
    return d


def hf_class(family, name):
    "A class of transformers' modelling file."
    return getattr(importlib.import_module(f"transformers.models.{family}.modeling_{family}"), name)


def hf_config(family, **kw):
    from transformers import AutoConfig

    return AutoConfig.for_model(family, **kw)


def randomised(module):
    "Every parameter and buffer random; matrices keep the scale of what they read."
    torch.manual_seed(0)
    with torch.no_grad():
        for p in module.parameters(): p.normal_(1.0 if p.dim() == 1 else 0.0, 0.2 if p.dim() == 1 else p.shape[-1] ** -0.5)
        for name, b in module.named_buffers():
            if name.endswith("e_score_correction_bias"): b.normal_(0, 0.2)
    return module


# --- one layer of experts -------------------------------------------------------------------------------------------------------

EXPERTS = dict(num_experts=8, num_experts_per_tok=3, moe_intermediate_size=24)
DEEPSEEK = dict(n_routed_experts=8, num_experts_per_tok=3, moe_intermediate_size=24, n_shared_experts=2, hidden_size=32)
V2 = dict(EXPERTS, shared_expert_intermediate_size=48)
V3 = dict(V2, scoring_func="sigmoid", topk_method="noaux_tc", routed_scaling_factor=2.5)
MOE = {  # name -> (family, class, transformers' config, ours)
    "mixtral": ("mixtral", "MixtralSparseMoeBlock", dict(hidden_size=32, intermediate_size=24, num_local_experts=8, num_experts_per_tok=2),
                dict(EXPERTS, num_experts_per_tok=2, norm_topk_prob=True)),
    "mixtral-gelu": ("mixtral", "MixtralSparseMoeBlock", dict(hidden_size=32, intermediate_size=24, num_local_experts=4, num_experts_per_tok=1, hidden_act="gelu"),
                     dict(EXPERTS, num_experts=4, num_experts_per_tok=1, norm_topk_prob=True, hidden_act="gelu")),
    "qwen2_moe": ("qwen2_moe", "Qwen2MoeSparseMoeBlock", dict(EXPERTS, hidden_size=32, shared_expert_intermediate_size=40, norm_topk_prob=False),
                  dict(EXPERTS, shared_expert_intermediate_size=40, shared_expert_gate=True)),
    "qwen3_moe": ("qwen3_moe", "Qwen3MoeSparseMoeBlock", dict(EXPERTS, hidden_size=32, norm_topk_prob=True), dict(EXPERTS, norm_topk_prob=True)),
    "deepseek_v2-greedy": ("deepseek_v2", "DeepseekV2Moe", dict(DEEPSEEK, topk_method="greedy"), V2),
    "deepseek_v2-groups": ("deepseek_v2", "DeepseekV2Moe", dict(DEEPSEEK, topk_method="group_limited_greedy", n_group=4, topk_group=2, routed_scaling_factor=16.0),
                           dict(V2, topk_method="group_limited_greedy", n_group=4, topk_group=2, routed_scaling_factor=16.0)),
    "deepseek_v3-groups": ("deepseek_v3", "DeepseekV3MoE", dict(DEEPSEEK, n_group=4, topk_group=2, norm_topk_prob=True), dict(V3, n_group=4, topk_group=2, norm_topk_prob=True)),
    "deepseek_v3-plain": ("deepseek_v3", "DeepseekV3MoE", dict(DEEPSEEK, n_group=1, topk_group=1, norm_topk_prob=False), V3),
}
EXPERT_NAMES = {"gate.": "router.", "shared_experts.": "shared_expert.", "shared_expert_gate.": "shared_expert_gate."}


def our_name(name):
    "The name that an expert layer's tensor of transformers' module has here."
    return next((new + name[len(old):] for old, new in EXPERT_NAMES.items() if name.startswith(old)), name)


def in_our_layout(tensors):
    "A dict of transformers' tensors of an expert layer, in our names; gate_up_proj becomes gate_proj and up_proj."
    out = {our_name(k): v for k, v in tensors.items() if k != "experts.gate_up_proj"}
    gate, up = tensors["experts.gate_up_proj"].chunk(2, 1)
    return out | {"experts.gate_proj": gate, "experts.up_proj": up}


@pytest.mark.parametrize("case", MOE)
@pytest.mark.parametrize("tokens", [1, 3, 70])
def test_experts(case, tokens):
    family, cls, theirs_kw, ours_kw = MOE[case]
    config = hf_config(family, **theirs_kw)
    config._experts_implementation = "eager"
    theirs, ours = randomised(hf_class(family, cls)(config)), MoE(ModelConfig(hidden_size=32, num_attention_heads=2, **ours_kw))
    ours.load_state_dict(in_our_layout(theirs.state_dict()))
    x = torch.randn(2, tokens, 32)
    results = []
    for m in (theirs, ours):
        xi = x.clone().requires_grad_()
        y = m(xi)
        (y * torch.linspace(-1, 1, y.numel()).view(y.shape)).sum().backward()
        results.append((y.detach(), xi.grad))
    (want, dx), (got, mine) = results
    assert want.std() > 0.1, "too small to compare"
    close(got, want, 1e-5 * max(1, want.abs().max().item()), "output")
    close(mine, dx, 1e-4, "gradient of the input")
    grads = in_our_layout({k: p.grad for k, p in theirs.named_parameters()})
    assert set(grads) == {k for k, _ in ours.named_parameters()}
    for k, p in ours.named_parameters(): close(p.grad, grads[k], 1e-4 * max(1, grads[k].abs().max().item()), k)


def test_an_idle_expert_gets_a_gradient_of_zeros():
    layer = MoE(ModelConfig(hidden_size=16, num_attention_heads=2, num_experts=6, num_experts_per_tok=1, moe_intermediate_size=8))
    with torch.no_grad(): layer.router.weight.zero_()[2].fill_(1)
    layer(torch.rand(5, 16)).sum().backward()
    used = layer.experts.down_proj.grad.flatten(1).abs().amax(1) > 0
    assert used.tolist() == [False, False, True, False, False, False]


def test_balancing_loss_is_transformers_and_megatrons():
    theirs = hf_class("mixtral", "load_balancing_loss_func")
    logits = [torch.randn(50, 8, generator=torch.Generator().manual_seed(i)) + torch.arange(8) * 0.3 for i in range(3)]
    chosen = [z.softmax(-1).topk(2, -1).indices for z in logits]
    loads = [expert_load(z, c) for z, c in zip(logits, chosen, strict=True)]
    close(load_balancing_loss(loads), theirs(tuple(logits), 8, 2), 1e-6, "all layers together")
    megatron = importlib.import_module("megatron.core.transformer.moe.moe_utils").switch_load_balancing_loss_func
    for z, c, load in zip(logits, chosen, loads, strict=True):
        want = megatron(z.softmax(-1), torch.bincount(c.flatten(), minlength=8), 50, 2, 8, 1.0)
        close(load_balancing_loss([load]) / 2, want, 1e-6, "one layer, Megatron's divided by k")


def test_balance_loss_reaches_the_router_and_is_noted_in_training_only():
    layer = MoE(ModelConfig(hidden_size=16, num_attention_heads=2, router_aux_loss_coef=0.5, norm_topk_prob=True, **EXPERTS))
    x = torch.randn(40, 16)
    layer.eval()(x)
    assert balance_loss(layer) == 0.0
    layer.train()(x)
    loss = balance_loss(layer)
    loss.backward()
    logits = (x @ layer.router.weight.t()).detach()
    close(loss, 0.5 * hf_class("mixtral", "load_balancing_loss_func")((logits,), 8, 3), 1e-6, "the loss")
    assert layer.router.weight.grad.abs().max() > 0 and layer.experts.down_proj.grad is None


def test_scores_are_made_in_fp32():
    layer, x = randomised(MoE(ModelConfig(hidden_size=64, num_attention_heads=2, **EXPERTS))).bfloat16(), torch.randn(200, 64).bfloat16()
    weights, chosen, logits = layer.router(x)
    want = (x.float() @ layer.router.weight.float().t()).softmax(-1).topk(3, -1)
    assert logits.dtype == weights.dtype == torch.float32 and torch.equal(chosen, want.indices)
    assert layer(x).dtype == torch.bfloat16


def test_the_choosing_bias_keeps_its_precision():
    cfg = ModelConfig(hidden_size=32, num_attention_heads=2, topk_method="noaux_tc", scoring_func="sigmoid", **EXPERTS)
    layer = randomised(MoE(cfg))
    want = layer.router.e_score_correction_bias.clone()
    assert torch.equal(layer.bfloat16().router.e_score_correction_bias, want) and layer.router.weight.dtype == torch.bfloat16
    with torch.device("meta"): empty = MoE(cfg)
    assert empty.to_empty(device="cpu").router.e_score_correction_bias.device.type == "cpu"


# --- latent attention -----------------------------------------------------------------------------------------------------------

SHAPE = dict(hidden_size=64, num_attention_heads=4, num_key_value_heads=4, kv_lora_rank=24, qk_nope_head_dim=12, qk_rope_head_dim=8, v_head_dim=10)
YARN = dict(rope_type="yarn", factor=8.0, original_max_position_embeddings=16, mscale=0.707, mscale_all_dim=0.707, beta_fast=32.0, beta_slow=1.0)
MLAS = {  # name -> (family, class, what differs)
    "v2-lite": ("deepseek_v2", "DeepseekV2Attention", dict(q_lora_rank=None)),
    "v2": ("deepseek_v2", "DeepseekV2Attention", dict(q_lora_rank=20)),
    "v2-yarn-bias": ("deepseek_v2", "DeepseekV2Attention", dict(q_lora_rank=20, rope_scaling=YARN, attention_bias=True)),
    "v3": ("deepseek_v3", "DeepseekV3Attention", dict(q_lora_rank=20)),
    "v3-yarn": ("deepseek_v3", "DeepseekV3Attention", dict(q_lora_rank=20, rope_scaling=dict(YARN, mscale=1.0, mscale_all_dim=1.0))),
    "v3-yarn-unlike": ("deepseek_v3", "DeepseekV3Attention", dict(q_lora_rank=None, rope_scaling=dict(YARN, mscale=1.0, mscale_all_dim=0.5))),
    "v3-long-value": ("deepseek_v3", "DeepseekV3Attention", dict(q_lora_rank=20, v_head_dim=32)),
}


def mla_pair(case):
    "(transformers' attention, ours with its weights, our config, position embeddings of n tokens as transformers makes them)"
    family, cls, change = MLAS[case]
    kw = {**SHAPE, "max_position_embeddings": 128, **change}
    config = hf_config(family, **kw)
    config._attn_implementation = "eager"
    theirs = randomised(hf_class(family, cls)(config, 0))
    bias = kw.pop("attention_bias", False)
    cfg = ModelConfig(**{**kw, "q_lora_rank": kw["q_lora_rank"] or 0}, attention_bias=bias, attention_out_bias=bias)
    ours = MLA(cfg)
    ours.load_state_dict(theirs.state_dict())
    rope = hf_class(family, cls.replace("Attention", "RotaryEmbedding"))(config)
    return theirs, ours, cfg, lambda x: rope(x, torch.arange(x.shape[1])[None])


@pytest.mark.parametrize("case", MLAS)
def test_latent_attention(case):
    theirs, ours, cfg, where = mla_pair(case)
    x = torch.randn(2, 40, 64)
    hidden = torch.full((40, 40), float("-inf")).triu(1)[None, None]
    runs = (theirs, lambda m, xi: m(xi, attention_mask=hidden, position_embeddings=where(xi))[0]), (ours, lambda m, xi: m(xi, *Rope(cfg)(xi)))
    results = []
    for m, call in runs:
        xi = x.clone().requires_grad_()
        y = call(m, xi)
        (y * torch.linspace(-1, 1, y.numel()).view(y.shape)).sum().backward()
        results.append((y.detach(), xi.grad))
    (want, dx), (got, mine) = results
    assert want.std() > 0.1, "too small to compare"
    close(got, want, 1e-5, "output")
    close(mine, dx, 1e-4, "gradient of the input")
    grads = {k: p.grad for k, p in theirs.named_parameters()}
    assert set(grads) == {k for k, _ in ours.named_parameters()}
    for k, p in ours.named_parameters(): close(p.grad, grads[k], 1e-4 * max(1, grads[k].abs().max().item()), k)


class Rooms:
    "What a layer needs of a cache, for one layer."
    def __init__(self): self.kept = None

    def update(self, slot, *new):
        self.kept = new if self.kept is None else tuple(torch.cat(pair, 2) for pair in zip(self.kept, new, strict=True))
        return self.kept


@pytest.mark.parametrize("case", ["v2-lite", "v3-yarn"])
def test_latent_cache_steps(case):
    _, ours, cfg, _ = mla_pair(case)
    x, rope, cache, got, at = torch.randn(2, 20, 64), Rope(cfg), Rooms(), [], 0
    with torch.no_grad():
        want = ours(x, *rope(x))
        for n in (7, 1, 1, 6, 5): got.append(ours(x[:, at:at + n], *rope(x[:, at:at + n], at), cache=cache)); at += n
    close(torch.cat(got, 1), want, 1e-5, "steps of 7, 1, 1, 6 and 5 tokens")
    assert sum(t.shape[-1] for t in cache.kept) == cfg.kv_lora_rank + cfg.qk_rope_head_dim and cache.kept[0].shape[1] == 1


def test_an_adapter_on_kv_b_is_not_passed_by():
    "Absorbing reads a plain weight; where something else stands in its place, one token takes the expanded way."
    _, ours, cfg, _ = mla_pair("v3")

    class Doubled(torch.nn.Module):
        def __init__(self, base):
            super().__init__()
            self.base, self.weight = base, base.weight

        def forward(self, x): return 2 * self.base(x)

    ours.kv_b_proj = Doubled(ours.kv_b_proj)
    x, rope, cache = torch.randn(1, 6, 64), Rope(cfg), Rooms()
    with torch.no_grad():
        want = ours(x, *rope(x))
        ours(x[:, :5], *rope(x[:, :5]), cache=cache)
        close(ours(x[:, 5:], *rope(x[:, 5:], 5), cache=cache), want[:, 5:], 1e-5, "the last token")


# --- whole models ---------------------------------------------------------------------------------------------------------------

BASE = dict(vocab_size=96, hidden_size=64, intermediate_size=96, num_hidden_layers=3, num_attention_heads=4, num_key_value_heads=2, max_position_embeddings=128)
QWEN = dict(num_experts=8, num_experts_per_tok=3, moe_intermediate_size=24)
SEEK = dict(num_key_value_heads=4, kv_lora_rank=24, q_lora_rank=20, qk_nope_head_dim=12, qk_rope_head_dim=8, v_head_dim=10, n_routed_experts=8,
            num_experts_per_tok=3, moe_intermediate_size=24, n_shared_experts=2, first_k_dense_replace=1)
MODELS = {  # name -> (model_type, what differs from BASE)
    "mixtral": ("mixtral", dict(num_local_experts=4, rope_theta=1e6)),
    "mixtral-window-tied": ("mixtral", dict(num_local_experts=4, num_experts_per_tok=1, sliding_window=8, tie_word_embeddings=True, head_dim=24)),
    "qwen2_moe": ("qwen2_moe", dict(QWEN, shared_expert_intermediate_size=40, rope_theta=1e6)),
    "qwen2_moe-mixed": ("qwen2_moe", dict(QWEN, shared_expert_intermediate_size=40, norm_topk_prob=True, qkv_bias=False, mlp_only_layers=[0], decoder_sparse_step=1)),
    "qwen3_moe": ("qwen3_moe", dict(QWEN, head_dim=32, norm_topk_prob=True)),
    "qwen3_moe-step": ("qwen3_moe", dict(QWEN, head_dim=16, attention_bias=True, decoder_sparse_step=2, num_hidden_layers=4, tie_word_embeddings=True)),
    "deepseek_v2-lite": ("deepseek_v2", dict(SEEK, q_lora_rank=None, rope_scaling=YARN)),
    "deepseek_v2": ("deepseek_v2", dict(SEEK, topk_method="group_limited_greedy", n_group=4, topk_group=2, routed_scaling_factor=16.0, attention_bias=True)),
    "deepseek_v3": ("deepseek_v3", dict(SEEK, n_group=4, topk_group=2, rope_scaling=dict(YARN, mscale=1.0, mscale_all_dim=1.0))),
    "deepseek_v3-plain": ("deepseek_v3", dict(SEEK, q_lora_rank=None, n_group=1, topk_group=1, norm_topk_prob=False, first_k_dense_replace=0, rope_theta=5e5)),
}


def ids(n=48, vocab=96): return torch.randint(0, vocab, (2, n), generator=torch.Generator().manual_seed(1))


def theirs_of(case):
    "A transformers model whose every parameter is random; the router's loss is on."
    from transformers import AutoModelForCausalLM

    kind, change = MODELS[case]
    config = hf_config(kind, **{**BASE, **change})
    config.output_router_logits = not kind.startswith("deepseek")  # transformers has no such loss for DeepSeek
    return randomised(AutoModelForCausalLM.from_config(config, attn_implementation="eager", experts_implementation="eager").eval())


@pytest.fixture(params=MODELS)
def pair(request, tmp_path):
    "(transformers' model, ours from its folder, the folder)"
    theirs = theirs_of(request.param)
    theirs.save_pretrained(tmp_path / "theirs")
    return theirs, load_model(tmp_path / "theirs"), tmp_path


def test_logits(pair):
    theirs, ours, _ = pair
    with torch.no_grad(): want = theirs(ids()).logits
    assert want.std() > 0.5, "logits too small to compare"
    with torch.no_grad(): close(ours(ids()), want, 1e-5, "logits")
    assert ours.cfg.num_params() == sum(p.numel() for p in theirs.parameters()) == sum(p.numel() for p in ours.parameters())


def test_loss_and_gradients(pair):
    theirs, ours, _ = pair
    x = ids()
    out = theirs(x, labels=x)
    out.loss.backward()
    labels = torch.cat((x[:, 1:], torch.full((2, 1), -100)), 1)
    total, n = causal_lm_loss(ours.train(), SimpleNamespace(input_ids=x, labels=labels, position_ids=None, cu_seqlens=None))
    (total / n).backward()
    close(total / n, out.loss, 1e-5, "loss, the router's included")
    grads, want = {k: p.grad for k, p in ours.named_parameters()}, {k: p.grad for k, p in theirs.named_parameters()}
    assert sum(g.numel() for g in grads.values()) == sum(g.numel() for g in want.values())
    for k, g in want.items():
        for name, part in our_parts(k, g).items(): close(grads[name], part, 1e-4 * max(1.0, part.abs().max().item()), name)


def our_parts(name, g):
    "Our names and parts of a tensor of transformers' whole model (whose experts are fused)."
    head, sep, inner = name.partition(".mlp.")
    if not sep: return {name: g}
    if inner == "experts.gate_up_proj": return dict(zip((f"{head}.mlp.experts.gate_proj", f"{head}.mlp.experts.up_proj"), g.chunk(2, 1), strict=True))
    return {f"{head}.mlp.{our_name(inner)}": g}


def test_saved_folder_opens_in_transformers(pair):
    from transformers import AutoModelForCausalLM

    theirs, ours, tmp = pair
    save_model(ours, tmp / "ours", max_shard_bytes=100_000)
    assert (tmp / "ours" / "model.safetensors.index.json").is_file()
    again, info = AutoModelForCausalLM.from_pretrained(tmp / "ours", output_loading_info=True, attn_implementation="eager", experts_implementation="eager")
    assert not any(info[k] for k in ("missing_keys", "unexpected_keys", "mismatched_keys")), info
    assert again.dtype == torch.float32 and type(again) is type(theirs)
    with torch.no_grad(): assert torch.equal(again(ids()).logits, theirs(ids()).logits)
    back = load_model(tmp / "ours").state_dict()
    assert all(torch.equal(back[k], t) for k, t in ours.state_dict().items())


def test_cached_steps(pair):
    theirs, ours, _ = pair
    x = ids(24)
    with torch.no_grad():
        want, cache = theirs(x).logits, KVCache(ours.cfg, 2, 24)
        got = torch.cat([ours(x[:, a:b], cache=cache) for a, b in ((0, 10), (10, 11), (11, 20), (20, 23), (23, 24))], 1)
    close(got, want, 1e-5, "logits with a cache")


def test_packed_documents(pair):
    _, ours, _ = pair
    x, cut = ids(20)[:1], torch.tensor([0, 8, 20], dtype=torch.int32)
    places = torch.cat((torch.arange(8), torch.arange(12)))[None]
    with torch.no_grad(): together, alone = ours(x, places, cut)[:, 8:], ours(x[:, 8:])
    close(together, alone, 1e-5, "the second document")


# --- published sizes ------------------------------------------------------------------------------------------------------------

PUBLISHED = {  # folder of the real config -> parameters
    "Qwen--Qwen3-30B-A3B": 30_532_122_624, "mistralai--Mixtral-8x7B-v0.1": 46_702_792_704, "deepseek-ai--DeepSeek-V3": 671_026_404_352,
    "deepseek_v2_lite": 15_706_484_224, "qwen2moe": 14_315_784_192,
}


@pytest.mark.parametrize("name", PUBLISHED)
def test_real_configs(name, shared_data):
    from transformers import AutoConfig, AutoModelForCausalLM

    d = json.loads((shared_data / "configs" / name / "config.json").read_text())
    d.pop("quantization_config", None)  # DeepSeek-V3 as it is after its fp8 weights were widened
    d.pop("auto_map", None)
    if name == "deepseek_v2_lite": d["q_lora_rank"] = None  # V2-Lite has none; this copy of its config lost the null, and the default is 1536
    cfg, kind = config_from_hf(d), d.pop("model_type")
    with torch.device("meta"): theirs = AutoModelForCausalLM.from_config(AutoConfig.for_model(kind, **d))
    assert cfg.num_params() == sum(p.numel() for p in theirs.parameters()) == PUBLISHED[name]
    entries, shapes = hf_entries(cfg), canonical_shapes(cfg)
    assert sum(math.prod(hf_shape(e, cfg, shapes)) for e in entries) == PUBLISHED[name] + (cfg.topk_method == "noaux_tc") * cfg.num_experts * sum(
        cfg.is_moe(i) for i in range(cfg.num_hidden_layers))
    assert config_from_hf(config_to_hf(cfg)) == cfg
    with torch.device("meta"): ours = Decoder(replace(cfg, num_hidden_layers=cfg.first_k_dense_replace + 1))  # a whole one has thousands of modules
    shapes = canonical_shapes(ours.cfg)
    assert {k: tuple(t.shape) for k, t in ours.state_dict().items()} == shapes


def test_quantised_weights_are_refused(shared_data):
    with pytest.raises(UserError, match="quantization_config"): config_from_hf(shared_data / "configs/deepseek-ai--DeepSeek-V3")


# --- Grok-1: no class of transformers -------------------------------------------------------------------------------------------

GROK = dict(model_type="grok-1", hidden_size=64, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2, vocab_size=96,
            num_local_experts=4, num_experts_per_tok=2, tie_word_embeddings=True)


def test_grok_size():
    "xAI gives 314B: 64 layers of 8 experts and of attention with 48 query and 8 key heads, without the embedding of 131,072 tokens."
    cfg = config_from_hf(dict(model_type="grok-1", tie_word_embeddings=True))
    layer = 8 * 3 * 6144 * 32768 + 6144 * 8 + 2 * 6144 * 128 * (48 + 8) + 4 * 6144
    assert cfg.num_params() == 64 * layer + 6144 + 131072 * 6144
    assert cfg.num_params() - 131072 * 6144 == pytest.approx(314e9, rel=0.004)
    assert config_from_hf(config_to_hf(cfg)) == cfg


def grok_by_formula(w, x, cfg):
    "Grok-1 written out from xAI's JAX model: norms before and behind both parts, scores capped at 30, the two best of a softmax over all experts."
    norm = lambda t, name: t * (t.pow(2).mean(-1, keepdim=True) + 1e-5).rsqrt() * w[name]
    turn = lambda t: torch.cat((-t[..., t.shape[-1] // 2:], t[..., :t.shape[-1] // 2]), -1)
    S, D, N, K = x.shape[1], 16, 4, 2
    angle = (torch.arange(S)[:, None] / 10000 ** (torch.arange(0, D, 2) / D)).repeat(1, 2)
    rope = lambda t: t * angle.cos() + turn(t) * angle.sin()
    h = w["model.embed_tokens.weight"][x] * 78.38367176906169
    for i in range(2):
        at, n = f"model.layers.{i}.", norm(h, f"model.layers.{i}.pre_attn_norm.scale")
        q, k, v = ((n @ w[f"{at}attn.{p}_proj.weight"].t()).unflatten(-1, (-1, D)).transpose(1, 2) for p in "qkv")
        q, k, v = rope(q), rope(k).repeat_interleave(N // K, 1), v.repeat_interleave(N // K, 1)
        s = 30 * torch.tanh(q @ k.transpose(2, 3) * 0.08838834764831845 / 30)
        o = s.masked_fill(torch.ones(S, S).triu(1).bool(), float("-inf")).softmax(-1) @ v
        h = h + norm(o.transpose(1, 2).flatten(2) @ w[f"{at}attn.o_proj.weight"].t(), f"{at}post_attn_norm.scale")
        n = norm(h, f"{at}pre_moe_norm.scale")
        best = (n @ w[f"{at}moe_block.gate.weight"].t()).softmax(-1).topk(2, -1)
        y = torch.zeros_like(n)
        for e in range(4):
            part = [n @ w[f"{at}moe_block.experts.{e}.{p}.weight"].t() for p in ("linear", "linear_v")]
            out = (torch.nn.functional.gelu(part[0], approximate="tanh") * part[1]) @ w[f"{at}moe_block.experts.{e}.linear_1.weight"].t()
            y = y + out * (best.values * (best.indices == e)).sum(-1, keepdim=True)
        h = h + norm(y, f"{at}post_moe_norm.scale")
    return norm(h, "model.norm.scale") @ w["model.embed_tokens.weight"].t() * 0.5773502691896257


def test_grok_logits(tmp_path):
    ours = randomised(Decoder(config_from_hf(GROK)).eval())
    with torch.no_grad(): ours.model.embed_tokens.weight.mul_(0.5)
    save_model(ours, tmp_path / "grok")
    weights = dict(open_weights(tmp_path / "grok"))
    with torch.no_grad(): got, want = load_model(tmp_path / "grok")(ids(20)), grok_by_formula(weights, ids(20), ours.cfg)
    assert want.std() > 0.3, "too small to compare"
    close(got, want, 1e-4, "logits")
    with torch.no_grad(): assert torch.equal(got, ours(ids(20)))


# --- training and generation ----------------------------------------------------------------------------------------------------

def tiny(kind):
    "A new model of a family, from transformers' keys."
    return Decoder(config_from_hf({"model_type": kind, **BASE, **MODELS[kind][1], "num_hidden_layers": 2})).init_weights(0)


@pytest.mark.parametrize("kind", ["mixtral", "deepseek_v3"])
def test_training_lowers_the_loss(kind):
    r = np.random.RandomState(0)
    rows = [np.arange(33) * r.randint(1, 5) % 96 for _ in range(16)]  # something to learn: counting in steps
    cfg = TrainConfig(train_iters=20, lr=5e-3, micro_batch_size=4, device="cpu", lr_warmup_iters=2, log_interval=1)
    t = Trainer(tiny(kind), cfg, Loader([Sample(x[:-1], x[1:].copy()) for x in rows], 4, collate_gpt), causal_lm_loss)
    t.fit()
    losses = [row["loss"] for row in t.rows]
    assert losses[-1] < losses[0] - 1, losses
    assert all(p.grad is None or p.grad.isfinite().all() for p in t.model.parameters())


@pytest.mark.parametrize("kind", ["mixtral", "qwen2_moe", "deepseek_v2", "deepseek_v3"])
def test_generation_with_a_cache_is_generation_without(kind):
    model, prompt = randomised(tiny(kind)).eval(), ids(12)[0].tolist()
    cfg, draws = SampleConfig(task="do_sample", temperature=1.0, top_k=0, top_p=1.0), [torch.Generator().manual_seed(5) for _ in range(2)]
    got = list(next_ids(model, prompt, cfg, 12, Memory(model), draws[0]))
    plain = list(prompt)
    with torch.no_grad():
        for _ in range(12): plain.append(choose(model(torch.tensor([plain]))[0, -1], cfg, draws[1]))
    assert got == plain[12:] and len(set(got)) > 4, got


def test_experts_begin_alike_whoever_holds_them():
    "Each expert is drawn from its own name: a process that holds two of eight makes the same two."
    cfg = config_from_hf({"model_type": "qwen3_moe", **BASE, **QWEN, "initializer_range": 0.02})
    whole = Decoder(cfg).init_weights(3).model.layers["1"].mlp.experts
    part = Decoder(cfg)
    for name in ("gate_proj", "up_proj", "down_proj"):
        for layer in part.model.layers.values():
            layer.mlp.experts.register_parameter(name, torch.nn.Parameter(getattr(layer.mlp.experts, name).detach()[:2].clone()))
    part = part.init_weights(3).model.layers["1"].mlp.experts
    assert torch.equal(part.down_proj, whole.down_proj[:2]) and torch.equal(part.up_proj, whole.up_proj[:2])
    assert not torch.equal(whole.up_proj[0], whole.up_proj[1])
    close(whole.up_proj.std(), torch.tensor(0.02), 0.001, "deviation of a matrix")
    close(whole.down_proj.std(), torch.tensor(0.02 / 6 ** 0.5), 0.001, "deviation of a matrix that writes into the stream")
