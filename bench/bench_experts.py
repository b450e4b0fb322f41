"""A layer of experts on a CPU (fp32, random weights) against transformers' Qwen3-MoE block: one JSON line.

Both hold the same weights and take turns, round after round. Transformers has several ways to compute experts; the peer is the fastest of them in the same rounds.
The claim is a training step (forward and backward) of the layer; the forward pass of many tokens and of one stand beside it. Outputs are compared.
"""
import argparse
import json
import os
import statistics
import time

os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
import torch
from transformers import Qwen3MoeConfig
from transformers.models.qwen3_moe.modeling_qwen3_moe import Qwen3MoeSparseMoeBlock

from ascend_nb.experts import MoE
from ascend_nb.shapes import ModelConfig

SHAPE = dict(hidden_size=512, num_experts=32, num_experts_per_tok=4, moe_intermediate_size=256, norm_topk_prob=True)
CASES = {"train 1024 tokens": (1024, True), "forward 1024 tokens": (1024, False), "forward 1 token": (1, False)}


def layers():
    "name -> layer, all with the same weights."
    torch.manual_seed(0)
    ours = MoE(ModelConfig(num_attention_heads=4, **SHAPE))
    with torch.no_grad():
        for p in ours.parameters(): p.normal_(0, p.shape[-1] ** -0.5)
    e, out = ours.experts, {"ours": ours}
    for way in ("eager", "grouped_mm"):
        config = Qwen3MoeConfig(**SHAPE)
        config._experts_implementation = way
        out[way] = block = Qwen3MoeSparseMoeBlock(config)
        with torch.no_grad():
            block.gate.weight.copy_(ours.router.weight)
            block.experts.gate_up_proj.copy_(torch.cat((e.gate_proj, e.up_proj), 1))
            block.experts.down_proj.copy_(e.down_proj)
    return out


def once(layer, x, train):
    "Seconds of one pass, and its output."
    began = time.perf_counter()
    with torch.set_grad_enabled(train): y = layer(x)
    if train:
        y.sum().backward()
        layer.zero_grad(set_to_none=True)
    return time.perf_counter() - began, y.detach()


def main():
    cli = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    cli.add_argument("--rounds", type=int, default=7, help="how often each is timed")
    args = cli.parse_args()
    models, took, worst = layers(), {case: {} for case in CASES}, 0.0
    for r in range(args.rounds + 1):  # the first warms up
        for case, (tokens, train) in CASES.items():
            x, outputs = torch.randn(1, tokens, 512, requires_grad=train), {}
            for name, layer in models.items():
                seconds, outputs[name] = once(layer, x, train)
                if r: took[case].setdefault(name, []).append(seconds)
            worst = max(worst, *((outputs["ours"] - y).abs().max().item() for y in outputs.values()))
    rows = {}
    for case, by in took.items():
        peer = min((n for n in by if n != "ours"), key=lambda n: statistics.median(by[n]))
        rows[case] = dict(ratio=round(statistics.median(p / o for p, o in zip(by[peer], by["ours"], strict=True)), 2),
                          ours=round(statistics.median(by["ours"]) * 1e3, 2), peer=round(statistics.median(by[peer]) * 1e3, 2), peer_way=peer)
    claim = next(iter(CASES))
    print(json.dumps(dict(name="experts", **rows[claim], unit=f"ms, {claim}", peer_name="transformers Qwen3MoeSparseMoeBlock", largest_difference=worst,
                          rounds=args.rounds, threads=torch.get_num_threads(), cases=rows)))


if __name__ == "__main__": main()
