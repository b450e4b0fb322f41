"The sparse families: experts, latent attention and whole models against transformers, with the same weights."
import importlib
import os

import pytest
import torch
from ascend_nb.experts import MoE, balance_loss, expert_load, load_balancing_loss
from ascend_nb.layers import Rope
from ascend_nb.mla import MLA
from ascend_nb.shapes import ModelConfig

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
    loads = [expert_load(z, c) for z, c in zip(logits, chosen)]
    close(load_balancing_loss(loads), theirs(tuple(logits), 8, 2), 1e-6, "all layers together")
    megatron = importlib.import_module("megatron.core.transformer.moe.moe_utils").switch_load_balancing_loss_func
    for z, c, load in zip(logits, chosen, loads):
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
        self.kept = new if self.kept is None else tuple(torch.cat(pair, 2) for pair in zip(self.kept, new))
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
