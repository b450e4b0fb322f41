"""Training speed in the shape of SmolLM2-135M (sequence 256, batch 4, fp32, random weights): one JSON line.

Four loops take turns for a few steps, round after round, so that whatever else the machine does meets all of them:
  ours        ascend_nb's Trainer with the callbacks of every run (metrics each step, TensorBoard, guards, progress, …)
  bare        the same model, loss and optimizer in a bare PyTorch loop
  hf_trainer  transformers' Trainer on transformers' Llama
  hf_bare     transformers' Llama in a bare PyTorch loop
All clip the gradient and use a fused AdamW. A ratio is the median of the rounds' ratios; tokens/s come from the median step.
peak_share: 6 FLOP x parameters x tokens (attention's own products, 4 % here, left out) against a 4096-cube torch.matmul measured in the same rounds.
"""
import argparse
import json
import os
import statistics
import sys
import tempfile
import time

os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
import numpy as np
import torch
from transformers import LlamaConfig, LlamaForCausalLM, TrainerCallback, TrainingArguments, get_scheduler
from transformers import Trainer as HFTrainer

from ascend_nb.callbacks import usual
from ascend_nb.checkpoint import RunDir
from ascend_nb.config import ModelConfig, TrainConfig
from ascend_nb.datasets import Loader, Sample, collate_gpt
from ascend_nb.families import config_to_hf
from ascend_nb.losses import causal_lm_loss
from ascend_nb.model import Decoder
from ascend_nb.trainer import Trainer

B, S = 4, 256
SMOLLM2 = ModelConfig(vocab_size=49152, hidden_size=576, intermediate_size=1536, num_hidden_layers=30, num_attention_heads=9,
                      num_key_value_heads=3, max_position_embeddings=8192, rope_theta=100000., tie_word_embeddings=True)


def samples():
    r = np.random.RandomState(0)
    return [Sample(x[:-1], x[1:]) for x in r.randint(0, SMOLLM2.vocab_size, (64, S + 1))]


class Clock(TrainerCallback):
    "When each step of HF's Trainer ended."
    def __init__(self): self.ends = []
    def on_step_end(self, *a, **kw): self.ends.append(time.perf_counter())


def timed(step, n):
    out = []
    for _ in range(n):
        t = time.perf_counter()
        step()
        out.append(time.perf_counter() - t)
    return out


def ours(folder):
    cfg = TrainConfig(train_iters=10_000, micro_batch_size=B, lr=1e-4, lr_warmup_iters=100, device="cpu", save=folder)
    t = Trainer(Decoder(SMOLLM2).init_weights(), cfg, Loader(samples(), B, collate_gpt), causal_lm_loss, usual(RunDir(folder)))
    t.call("before_fit")
    return t, lambda n: timed(t.one_step, n)


def bare(t):
    "The same weights and optimizer object, without the Trainer around them."
    loader, opt = Loader(samples(), B, collate_gpt), t.weights.optimizer
    def step():
        total, n = causal_lm_loss(t.model, next(loader))
        (total / n).backward()
        torch.nn.utils.clip_grad_norm_(t.model.parameters(), 1.)
        opt.step()
        opt.zero_grad()
    return lambda n: timed(step, n)


def hf_trainer(model, folder):
    data, clock = [dict(input_ids=torch.from_numpy(s.ids), labels=torch.from_numpy(s.ids)) for s in samples()], Clock()
    args = dict(output_dir=folder, per_device_train_batch_size=B, learning_rate=1e-4, max_grad_norm=1., lr_scheduler_type="cosine",
                report_to="none", save_strategy="no", disable_tqdm=True, use_cpu=True, optim="adamw_torch_fused", weight_decay=.1)
    def run(n):
        clock.ends.clear()
        HFTrainer(model, TrainingArguments(max_steps=n + 1, **args), train_dataset=data, callbacks=[clock]).train()
        return list(np.diff(clock.ends))
    return run


def hf_bare(model):
    loader, opt = Loader(samples(), B, collate_gpt), torch.optim.AdamW(model.parameters(), lr=1e-4, weight_decay=.1, fused=True)
    sched = get_scheduler("cosine", opt, 100, 10_000)
    def step():
        b = next(loader)
        model(input_ids=b.input_ids, labels=b.input_ids).loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.)
        opt.step()
        sched.step()
        opt.zero_grad()
    return lambda n: timed(step, n)


def matmul(n=4096):
    a, b, c = torch.randn(n, n), torch.randn(n, n), torch.empty(n, n)
    return lambda _: [2 * n**3 / t / 1e9 for t in timed(lambda: torch.matmul(a, b, out=c), 2)]


def main():
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--rounds", type=int, default=6, help="times that all take a turn, after one to warm up")
    p.add_argument("--steps", type=int, default=2, help="steps in a turn")
    a = p.parse_args()
    out, sys.stdout = sys.stdout, sys.stderr  # the one line of the result, whatever a library prints
    with tempfile.TemporaryDirectory() as d:
        trainer, run_ours = ours(f"{d}/run")
        hf = LlamaForCausalLM(LlamaConfig(**{k: v for k, v in config_to_hf(SMOLLM2).items() if k not in ("architectures", "torch_dtype", "dtype")}))
        loops = dict(ours=run_ours, bare=bare(trainer), hf_trainer=hf_trainer(hf, f"{d}/hf"), hf_bare=hf_bare(hf), gflops=matmul())
        rounds = [{name: loop(a.steps) for name, loop in loops.items()} for _ in range(a.rounds + 1)][1:]
        trainer.call("on_error", KeyboardInterrupt())  # close its files; nothing is saved
    turn = {k: [statistics.fmean(r[k]) for r in rounds] for k in loops}
    step = {k: statistics.median(x for r in rounds for x in r[k]) for k in loops}
    tps = {k: round(B * S / v, 1) for k, v in step.items() if k != "gflops"}
    ratio = lambda k: round(statistics.median(x / y for x, y in zip(turn[k], turn["ours"], strict=True)), 3)
    peak, n = max(x for r in rounds for x in r["gflops"]), SMOLLM2.num_params()
    share = {k: round(6 * n * v / 1e9 / peak, 3) for k, v in tps.items()}
    print(json.dumps(dict(
        name="train", ratio=ratio("bare"), ours=tps["ours"], peer=tps["bare"], unit="tokens/s", claim="ratio >= 0.97 of a bare loop over the same model",
        hf_trainer=dict(ratio=ratio("hf_trainer"), ours=tps["ours"], peer=tps["hf_trainer"], claim="ratio >= 1.15"),
        hf_bare=dict(ratio=ratio("hf_bare"), ours=tps["ours"], peer=tps["hf_bare"]), peak_share=share, matmul_gflops=round(peak, 1),
        flop_formula="6 * parameters * tokens", parameters=n, rounds=a.rounds, threads=torch.get_num_threads())), file=out)


if __name__ == "__main__": main()
