"""What parallel code costs, and what a chunked loss saves (CPU, fp32, random weights): three JSON lines, one a claim.

  step  a training step in the shape of SmolLM2-135M in one process (few tokens, so that every overhead shows): ParallelTrainer over an Engine,
        against a bare PyTorch loop over the same Decoder that never met the parallel code; transformers' Llama in a bare loop stands beside them.
  tp    forward and backward of a Llama cut over two gloo processes, against the column and row parallel pair written by hand as Megatron-LM does
        (Shoeybi et al. 2019): local matrices, one all-reduce a block in each direction, a vocabulary cut in the embedding and in the loss.
  loss  the peak of memory of a training step with the chunked cross-entropy, against the same model whose logits exist as a whole.

Sides take turns, round after round, with the same weights and the same batch; a ratio is the median of the rounds' ratios, and losses are compared.
"""
import argparse
import json
import os
import re
import statistics
import subprocess
import sys
import time
from functools import partial

os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
import numpy as np
import torch
import torch.distributed as dist
from torch import nn
from torch.nn import functional as F

from ascend_nb.config import ModelConfig, ParallelConfig, TrainConfig
from ascend_nb.datasets import Batch, Loader, Sample, collate_gpt
from ascend_nb.engine import Engine, build_stages
from ascend_nb.families import config_to_hf
from ascend_nb.losses import causal_lm_loss
from ascend_nb.mesh import Mesh, Sizes, join, launch, leave
from ascend_nb.model import Decoder
from ascend_nb.parallel_trainer import ParallelTrainer

SMOLLM2 = ModelConfig(vocab_size=49152, hidden_size=576, intermediate_size=1536, num_hidden_layers=30, num_attention_heads=9,
                      num_key_value_heads=3, max_position_embeddings=8192, rope_theta=100000., tie_word_embeddings=True)
CUT = ModelConfig(vocab_size=16384, hidden_size=512, intermediate_size=1408, num_hidden_layers=6, num_attention_heads=8, num_key_value_heads=4, head_dim=64, tie_word_embeddings=False)
WIDE = ModelConfig(vocab_size=49152, hidden_size=256, intermediate_size=512, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=4, tie_word_embeddings=True)
B, S = 2, 64


def timed(f):
    "Seconds, and what f returns."
    began = time.perf_counter()
    out = f()
    return time.perf_counter() - began, out


def turns(sides, rounds, before=lambda: None):
    "name -> seconds of each round; the order turns too. The first round warms up. Results of the last one."
    took, last = {k: [] for k in sides}, {}
    for r in range(rounds + 1):
        for name in list(sides)[r % len(sides):] + list(sides)[:r % len(sides)]:
            before()
            seconds, last[name] = timed(sides[name])
            if r: took[name].append(seconds)
    return took, last


def ratio(took, ours, peer): return round(statistics.median(a / b for a, b in zip(took[ours], took[peer], strict=True)), 3)


def ms(x): return round(statistics.median(x) * 1e3, 1)


# ---- step: one process ----

def samples():
    r = np.random.RandomState(0)
    return [Sample(x[:-1], x[1:]) for x in r.randint(0, SMOLLM2.vocab_size, (64, S + 1))]


def adamw(model):
    "As the trainer makes it: matrices decay, vectors do not."
    groups = [dict(params=[p for p in model.parameters() if (p.dim() > 1) == wide], weight_decay=.1 if wide else 0.) for wide in (True, False)]
    return torch.optim.AdamW(groups, lr=1e-4, betas=(.9, .95), eps=1e-8, fused=True)


def parallel_step():
    cfg = TrainConfig(train_iters=10_000, micro_batch_size=B, lr=1e-4, lr_decay_style="constant", device="cpu")
    mesh = Mesh(Sizes())
    models = build_stages(SMOLLM2, lambda m: m.init_weights(), mesh, ParallelConfig(), "cpu")
    trainer = ParallelTrainer(Engine(models, mesh, ParallelConfig()), cfg, Loader(samples(), B, collate_gpt), causal_lm_loss)
    trainer.call("before_fit")
    return trainer.one_step


def plain_step():
    model = Decoder(SMOLLM2).init_weights()
    loader, opt = Loader(samples(), B, collate_gpt), adamw(model)
    def step():
        total, n = causal_lm_loss(model, next(loader))
        (total / n).backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.)
        opt.step()
        opt.zero_grad()
    return step


def hf_step():
    from transformers import LlamaConfig, LlamaForCausalLM
    model = LlamaForCausalLM(LlamaConfig(**{k: v for k, v in config_to_hf(SMOLLM2).items() if k not in ("architectures", "torch_dtype", "dtype")}))
    loader, opt = Loader(samples(), B, collate_gpt), adamw(model)
    def step():
        b = next(loader)
        model(input_ids=b.input_ids, labels=b.input_ids).loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.)
        opt.step()
        opt.zero_grad()
    return step


def bench_step(rounds):
    took, _ = turns(dict(ours=parallel_step(), plain=plain_step(), hf=hf_step()), rounds)
    return dict(name="parallel_step", ratio=ratio(took, "ours", "plain"), ours=ms(took["ours"]), peer=ms(took["plain"]), unit="ms a step", peer_name="a bare loop over the same Decoder",
                claim="ratio <= 1.03", hf=dict(ratio=ratio(took, "ours", "hf"), ours=ms(took["ours"]), peer=ms(took["hf"])),
                tokens=B * S, parameters=SMOLLM2.num_params(), rounds=rounds, threads=torch.get_num_threads())


# ---- tp: the pair by hand ----

class Copy(torch.autograd.Function):
    "Into a block: the same in all processes; gradients are summands."
    @staticmethod
    def forward(ctx, x): return x.view_as(x)
    @staticmethod
    def backward(ctx, g):
        g = g.contiguous()
        dist.all_reduce(g)
        return g


class Reduce(torch.autograd.Function):
    "Out of a block: the sum; the gradient is the same in all processes."
    @staticmethod
    def forward(ctx, x):
        dist.all_reduce(x)
        return x
    @staticmethod
    def backward(ctx, g): return g


class VocabLoss(torch.autograd.Function):
    "Sum of -log p, each process with its part of the logits."
    @staticmethod
    def forward(ctx, logits, labels):
        n = logits.shape[1]
        top = logits.amax(-1)
        dist.all_reduce(top, dist.ReduceOp.MAX)
        logits = logits - top[:, None]
        at = labels - dist.get_rank() * n
        away = (at < 0) | (at >= n)
        at = at.masked_fill(away, 0)
        rows = torch.arange(len(at))
        picked = logits[rows, at].masked_fill(away, 0.)
        dist.all_reduce(picked)
        p = logits.exp_()
        total = p.sum(-1)
        dist.all_reduce(total)
        ctx.save_for_backward(p.div_(total[:, None]), at, away)
        return (total.log() - picked).sum()

    @staticmethod
    def backward(ctx, g):
        p, at, away = ctx.saved_tensors
        p[torch.arange(len(at)), at] -= (~away).to(p.dtype)
        return p.mul_(g), None


class ByHand(nn.Module):
    "A Llama of local matrices: what Megatron's layers do, without anything around them."
    def __init__(self, pieces, cfg):
        super().__init__()
        self.cfg, n = cfg, cfg.num_hidden_layers
        own = lambda name: nn.Parameter(pieces[name].local.clone())
        names = ("input_layernorm", *(f"self_attn.{x}_proj" for x in "qkvo"), "post_attention_layernorm", *(f"mlp.{x}_proj" for x in ("gate", "up", "down")))
        self.words, self.norm, self.head = own("model.embed_tokens.weight"), own("model.norm.weight"), own("lm_head.weight")
        self.layers = nn.ModuleList(nn.ParameterList([own(f"model.layers.{i}.{x}.weight") for x in names]) for i in range(n))
        freq = 1 / cfg.rope_theta ** (torch.arange(0, cfg.head_dim, 2).float() / cfg.head_dim)
        angle = (torch.arange(1024).float()[:, None] * freq).repeat(1, 2)
        self.cos, self.sin = angle.cos(), angle.sin()

    def turn(self, x):
        a, b = x.chunk(2, -1)
        return x * self.cos[:x.shape[2]] + torch.cat((-b, a), -1) * self.sin[:x.shape[2]]

    def forward(self, ids, labels):
        D, eps, n = self.cfg.head_dim, self.cfg.rms_norm_eps, len(self.words)
        norm = lambda x, w: F.rms_norm(x, w.shape, w, eps)
        at = ids - dist.get_rank() * n
        away = (at < 0) | (at >= n)
        x = Reduce.apply(F.embedding(at.masked_fill(away, 0), self.words).masked_fill(away[..., None], 0.))
        for first, q, k, v, o, second, gate, up, down in self.layers:
            h = Copy.apply(norm(x, first))
            heads = lambda w, h=h: F.linear(h, w).unflatten(-1, (-1, D)).transpose(1, 2)
            a = F.scaled_dot_product_attention(self.turn(heads(q)), self.turn(heads(k)), heads(v), is_causal=True, enable_gqa=True)
            x = x + Reduce.apply(F.linear(a.transpose(1, 2).flatten(2), o))
            h = Copy.apply(norm(x, second))
            x = x + Reduce.apply(F.linear(F.silu(F.linear(h, gate)) * F.linear(h, up), down))
        x = Copy.apply(norm(x, self.norm))
        return VocabLoss.apply(F.linear(x, self.head).flatten(0, 1), labels.flatten())


def tp_ours(engine, batch): return float(sum(engine.step([batch], causal_lm_loss, batch.num_targets, "cpu"))), engine.gradients()


def tp_hand(model, batch):
    model.zero_grad()
    total = model(batch.input_ids, batch.labels)
    (total / batch.num_targets).backward()
    return float(total.detach()), None


def work_tp(rounds):
    "One of two processes."
    join()
    torch.set_num_threads(1)
    mesh, p = Mesh(Sizes(tp=2)), ParallelConfig(tensor_model_parallel_size=2)
    engine = Engine(build_stages(CUT, lambda m: m.init_weights(), mesh, p, "cpu"), mesh, p)
    hand = ByHand(engine.pieces, CUT)
    rows = {}
    for tokens in (1024, 256):
        ids = torch.randint(0, CUT.vocab_size, (4, tokens // 4 + 1), generator=torch.Generator().manual_seed(0))
        batch = Batch(ids[:, :-1].contiguous(), ids[:, 1:].contiguous())
        took, last = turns(dict(ours=partial(tp_ours, engine, batch), hand=partial(tp_hand, hand, batch)), rounds, dist.barrier)
        g, h = last["ours"][1]["model.layers.0.self_attn.q_proj.weight"], hand.layers[0][1].grad
        rows[tokens] = dict(ratio=ratio(took, "ours", "hand"), ours=ms(took["ours"]), peer=ms(took["hand"]), rounds=[round(a / b, 3) for a, b in zip(*took.values(), strict=True)],
                            loss_difference=abs(last["ours"][0] / last["hand"][0] - 1), gradient_difference=float((g - h).abs().max() / h.abs().max()))
    if mesh.main:
        print(json.dumps(dict(name="parallel_tp", **{k: rows[1024][k] for k in ("ratio", "ours", "peer")}, unit="ms, forward and backward of 1024 tokens",
                              peer_name="column and row parallel by hand, as Megatron-LM", claim="ratio <= 1.0 within noise", tokens=rows, processes=2)))
    leave()


def bench_tp(rounds):
    outs = launch([__file__, "--worker", "tp", "--rounds", rounds], 2, 170)
    if any(code for code, *_ in outs): sys.exit("\n".join(err[-2000:] for *_, err in outs))
    return json.loads(outs[0][1])


# ---- loss: the peak of memory ----

def high():
    "Bytes at this process's peak. getrusage would begin with the peak of the process that started it."
    return int(re.search(r"VmHWM:\s+(\d+)", open("/proc/self/status").read())[1]) * 1024


def work_loss(chunked):
    "One process: bytes that a training step adds to the peak, and its loss."
    torch.manual_seed(0)
    model = Decoder(WIDE).init_weights()
    for p in model.parameters(): p.grad = torch.zeros_like(p)
    ids = torch.randint(0, WIDE.vocab_size, (4, 513))
    batch = Batch(ids[:, :-1].contiguous(), ids[:, 1:].contiguous())
    small = Batch(ids[:1, :8].contiguous(), ids[:1, 1:9].contiguous())
    def whole(model, b):
        logits = model(b.input_ids).flatten(0, 1)
        return F.cross_entropy(logits, b.labels.flatten(), reduction="sum"), b.num_targets
    loss = causal_lm_loss if chunked else whole
    loss(model, small)[0].backward() # what is loaded and built once
    base = high()
    total, n = loss(model, batch)
    total.backward()
    print(json.dumps(dict(peak=high() - base, loss=total.item() / n, logits=ids[:, 1:].numel() * WIDE.vocab_size * 4)))


def bench_loss(rounds):
    run = lambda *a: json.loads(subprocess.run([sys.executable, __file__, "--worker", *a], check=True, capture_output=True, text=True).stdout)
    rows = [(run("chunked"), run("whole")) for _ in range(max(1, rounds // 3))]
    saved = statistics.median(w["peak"] - c["peak"] for c, w in rows)
    c, w = rows[0]
    return dict(name="parallel_loss", ratio=round(saved / c["logits"], 2), ours=round(statistics.median(c["peak"] for c, _ in rows) / 2**20, 1), peer=round(statistics.median(w["peak"] for _, w in rows) / 2**20, 1),
                unit="MiB that a step adds to the peak", peer_name="F.cross_entropy over the whole logits", claim="ratio (saved / the logits' bytes) >= 1", logits_mib=c["logits"] / 2**20,
                loss_difference=abs(c["loss"] / w["loss"] - 1), rounds=len(rows))


PARTS = dict(step=bench_step, tp=bench_tp, loss=bench_loss)


def main():
    cli = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    cli.add_argument("--part", choices=list(PARTS), help="one claim alone; none: all")
    cli.add_argument("--rounds", type=int, default=9, help="how often each side takes a turn, after one to warm up")
    cli.add_argument("--worker", choices=("tp", "chunked", "whole"), help=argparse.SUPPRESS)
    a = cli.parse_args()
    if a.worker == "tp": return work_tp(a.rounds)
    if a.worker: return work_loss(a.worker == "chunked")
    for name, part in PARTS.items():
        if a.part in (None, name): print(json.dumps(part(a.rounds)), flush=True)


if __name__ == "__main__": main()
