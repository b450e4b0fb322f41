"""Making text on a CPU in the shape of SmolLM2-135M, against transformers: one JSON line for each case.

    python bench/bench_generate.py [--rounds 6] [--tokens 32] [--only decode int8 batch first guess llama]

  decode  batch 1, fp32: a token by the compiled twin; the peer is transformers' generate with its own KV cache, greedy, ids handed out as they come
  int8    the same with int8 weights (and with an int8 cache too), against the same fp32 peer; agree: tokens of the fp32 text that the int8 model chooses after the same beginning
  batch   eight prompts of unequal length at a time, against transformers with the same prompts padded to one length
  first   the first token of a prompt of 512 tokens; gemm: the share of the peer's time that its matrix products alone need
  guess   decode with prompt-lookup, on a text that repeats itself, against decode without; same text
  llama   llama.cpp (if `llama_cpp` and files are there: ASCEND_NB_GGUF names them, commas between), tokens/s beside ours in the same run

The sides take turns, round after round; every ratio is the median of the rounds' ratios, so that what else the machine does hits both. Steps are the time between two tokens, so the prompt is not in them.
memory is one pass of torch's sum over as many bytes as the model's weights, in large pages: what reading alone costs. bandwidth_share: bytes of the weights x tokens/s / that speed.
ASCEND_NB_SMOLLM2 names a folder with the real weights (`ascend_nb fetch smollm2-135m --to DIR`); without it they are random.
"""
import argparse
import copy
import json
import os
import statistics
import sys
import time
from pathlib import Path

os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
import numpy as np
import torch
from torch.nn import functional as F
from transformers import AutoConfig, AutoModelForCausalLM, GenerationConfig, LlamaConfig
from transformers.generation.streamers import BaseStreamer

from ascend_nb.batches import Batch
from ascend_nb.config import ModelConfig, SampleConfig
from ascend_nb.decoder import Fast
from ascend_nb.families import config_to_hf
from ascend_nb.generate import stream
from ascend_nb.hf_format import load_model
from ascend_nb.model import Decoder
from ascend_nb.reading import Lookup, Memory
from ascend_nb.tokenizers import load_tokenizer

ROOT = Path(__file__).resolve().parent.parent
SHAPE = ModelConfig(vocab_size=49152, hidden_size=576, intermediate_size=1536, num_hidden_layers=30, num_attention_heads=9,
                    num_key_value_heads=3, max_position_embeddings=8192, rope_theta=100000., tie_word_embeddings=True)
median = statistics.median


class Clock(BaseStreamer):
    "Notes when each token arrives. The first call brings the prompt."
    def __init__(self): self.times = []
    def put(self, value): self.times.append(time.perf_counter())
    def end(self): pass


class Peer:
    "transformers, with the same weights."
    def __init__(self, model, folder):
        config = AutoConfig.from_pretrained(folder) if folder else LlamaConfig(**{k: v for k, v in config_to_hf(SHAPE).items() if "dtype" not in k})
        self.model = AutoModelForCausalLM.from_config(config).eval()
        self.model.load_state_dict(model.state_dict(), strict=False)
        self.model.generation_config = GenerationConfig(do_sample=False, use_cache=True, pad_token_id=0)

    def steps(self, ids, n):
        x, clock = torch.tensor([ids]), Clock()
        out = self.model.generate(x, attention_mask=torch.ones_like(x), max_new_tokens=n, streamer=clock)[0, len(ids):].tolist()
        return diffs(clock.times[1:]), out


def diffs(times): return [b - a for a, b in zip(times, times[1:], strict=False)]


def ours(model, tok, ids, n, guess=None):
    s = stream(model, tok, ids, SampleConfig(max_new_tokens=n), guess=guess)
    for _ in s: pass
    return diffs(s.times[1:]), s.ids


class Bench:
    def __init__(self, a):
        folder = os.environ.get("ASCEND_NB_SMOLLM2")
        model = load_model(folder) if folder else Decoder(SHAPE).init_weights(0).eval()
        self.a, self.what = a, "SmolLM2-135M" if folder else "random, in the shape of SmolLM2-135M"
        self.peer = Peer(model, folder)
        model.cfg.eos_token_id = []  # every turn has the same number of tokens
        self.small = None if not {"int8"} & set(a.only) else Fast(copy.deepcopy(model), weights="int8", cache="int8")
        self.fast = Fast(model)
        self.tok = load_tokenizer(folder or ROOT / "data_samples" / "tokenizer")
        self.tok.special = {**self.tok.special, "eos_token": None}
        self.weights = sum(x.numel() * x.element_size() for x in model.parameters())
        self.block, self.ids = torch.from_numpy(np.ones(self.weights // 4, dtype=np.float32)), torch.randint(0, 1000, (32,), generator=torch.Generator().manual_seed(0)).tolist()
        if folder: self.ids = self.tok.encode("Once upon a time, in a small village by the sea, there lived an old fisherman who", special=True)

    def turns(self, **sides):
        "Each side in turn, a round to warm up first: side -> [result of each round]."
        rounds = [{k: f() for k, f in sides.items()} for _ in range(self.a.rounds + 1)][1:]
        return {k: [r[k] for r in rounds] for k in sides}

    def memory(self): return diffs([time.perf_counter() for _ in range(4) if self.block.sum()])

    def told(self, name, slow, fast, claim, **more):
        "slow, fast: seconds of each round."
        ratio = median(s / f for s, f in zip(slow, fast, strict=True))
        return dict(name=f"generate {name}", ratio=round(ratio, 3), claim=claim, **more, weights=self.what, rounds=self.a.rounds, threads=torch.get_num_threads())

    def decode(self):
        t, n = self.turns(ours=lambda: ours(self.fast, self.tok, self.ids, n), peer=lambda: self.peer.steps(self.ids, n), memory=self.memory) if (n := self.a.tokens) else None, self.a.tokens
        step = {k: [median(s) for s, _ in t[k]] for k in ("ours", "peer")}
        gb_s = self.weights / min(min(m) for m in t["memory"]) / 1e9
        return self.told("decode", step["peer"], step["ours"], "ratio >= 1.9", ours=round(1 / median(step["ours"]), 1), peer=round(1 / median(step["peer"]), 1), unit="tokens/s",
                         best_ms={k: round(1e3 * min(min(s) for s, _ in t[k]), 2) for k in step}, bandwidth_gb_s=round(gb_s, 1),
                         bandwidth_share={k: round(self.weights / median(step[k]) / 1e9 / gb_s, 3) for k in step}, same_ids=t["ours"][0][1] == t["peer"][0][1], compiled=not self.fast.why, tokens=n)

    def int8(self):
        n = self.a.tokens
        t = self.turns(ours=lambda: ours(self.small, self.tok, self.ids, n), peer=lambda: self.peer.steps(self.ids, n))
        step = {k: [median(s) for s, _ in t[k]] for k in t}
        want = ours(self.fast, self.tok, self.ids, 256)[1]
        with torch.inference_mode(): z = self.small.model(torch.tensor([self.ids + want]))[0].argmax(-1).tolist()[len(self.ids) - 1:-1]
        agree = sum(a == b for a, b in zip(z, want, strict=True)) / len(want)
        return self.told("int8", step["peer"], step["ours"], "ratio >= 3 and agree >= 0.95", ours=round(1 / median(step["ours"]), 1), peer=round(1 / median(step["peer"]), 1), unit="tokens/s",
                         best_ms={k: round(1e3 * min(min(s) for s, _ in t[k]), 2) for k in step}, agree=round(agree, 3), tokens=n)

    def batch(self):
        n, lengths = self.a.tokens, [5, 9, 14, 20, 24, 28, 30, 32]
        prompts = [torch.randint(0, 1000, (k,), generator=torch.Generator().manual_seed(k)).tolist() for k in lengths]
        x = torch.tensor([[0] * (32 - len(p)) + p for p in prompts])
        mask = torch.tensor([[0] * (32 - len(p)) + [1] * len(p) for p in prompts])

        def mine():
            b, times = Batch(self.fast, slots=8), []
            for p in prompts: b.add(p, SampleConfig(max_new_tokens=n + 8))
            while len(times) < n:  # steps in which all eight write: a prompt is read in each of the first ones
                made = len(b.step())
                if made == 8: times.append(time.perf_counter())
            return median(diffs(times))

        def theirs():
            clock = Clock()
            clock.put = lambda _: clock.times.append(time.perf_counter())
            cache, ids, m, times = None, x, mask, []
            with torch.inference_mode():
                for _ in range(n):
                    place = (m.cumsum(1) - 1).clamp_min(0)[:, -ids.shape[1]:]
                    out = self.peer.model(ids, attention_mask=m, position_ids=place, past_key_values=cache, use_cache=True, logits_to_keep=1)
                    cache, ids = out.past_key_values, out.logits[:, -1].argmax(-1, keepdim=True)
                    m = torch.cat([m, torch.ones(8, 1, dtype=m.dtype)], 1)
                    times.append(time.perf_counter())
            return median(diffs(times))

        t = self.turns(ours=mine, peer=theirs)
        return self.told("batch 8", t["peer"], t["ours"], "ratio >= 1.7", ours=round(8 / median(t["ours"]), 1), peer=round(8 / median(t["peer"]), 1), unit="tokens/s", tokens=n)

    def first(self):
        ids = torch.randint(0, 1000, (512,), generator=torch.Generator().manual_seed(1)).tolist()
        c = self.fast.cfg
        shapes = [(c.num_attention_heads * c.head_dim, c.hidden_size), (2 * c.num_key_value_heads * c.head_dim, c.hidden_size), (c.hidden_size, c.num_attention_heads * c.head_dim),
                  (2 * c.intermediate_size, c.hidden_size), (c.hidden_size, c.intermediate_size)]
        mats = [(torch.randn(s), torch.randn(512, s[1])) for s in shapes]

        def timed(f):
            t = time.perf_counter()
            f()
            return time.perf_counter() - t
        @torch.inference_mode()
        def gemm():
            for _ in range(c.num_hidden_layers):
                for w, x in mats: F.linear(x, w)
        def mine(): m = Memory(self.fast); next(iter(stream(self.fast, self.tok, ids, SampleConfig(max_new_tokens=1), m)), None)
        t = self.turns(ours=lambda: timed(mine), peer=lambda: timed(lambda: self.peer.steps(ids, 1)), gemm=lambda: timed(gemm))
        return self.told("first token of 512", t["peer"], t["ours"], "our time <= 0.7 of the peer's: ratio >= 1.43", ours_ms=round(1e3 * median(t["ours"])), peer_ms=round(1e3 * median(t["peer"])),
                         gemm_share=round(median(g / p for g, p in zip(t["gemm"], t["peer"], strict=True)), 3))

    def guess(self):
        ids = self.tok.encode("def add(a, b):\n    return a + b\n\ndef sub(a, b):\n    return a - b\n\ndef mul(a, b):\n    return a * b\n\n" * 3 + "def", special=True)
        n, same = 4 * self.a.tokens, []

        def run(guess):
            steps, out = ours(self.fast, self.tok, ids, n, guess)
            same.append(out)
            return sum(steps) / len(steps)
        t = self.turns(plain=lambda: run(None), guessed=lambda: run(Lookup()))
        return self.told("guess", t["plain"], t["guessed"], "ratio >= 1.5, same text", ours=round(1 / median(t["guessed"]), 1), peer=round(1 / median(t["plain"]), 1), unit="tokens/s", same_ids=all(s == same[0] for s in same))

    def llama(self):
        files = [f for f in os.environ.get("ASCEND_NB_GGUF", "").split(",") if f]
        try: from llama_cpp import Llama
        except ImportError: return dict(name="generate llama", note="llama_cpp is not installed: pip install llama-cpp-python builds it")
        if not files: return dict(name="generate llama", note="ASCEND_NB_GGUF names no file")
        got, n = {}, self.a.tokens

        def run(model):
            times = []
            model.reset()
            for t in model.generate(self.ids, temp=0.0):
                times.append(time.perf_counter())
                if len(times) > n or t is None: return median(diffs(times))
        models = {Path(f).name: Llama(f, n_ctx=512, n_threads=torch.get_num_threads(), verbose=False) for f in files}
        t = self.turns(ours=lambda: median(ours(self.fast, self.tok, self.ids, n)[0]), **{k: (lambda m=m: run(m)) for k, m in models.items()})
        for k in t: got[k] = round(1 / median(t[k]), 1)
        return dict(name="generate llama", tokens_per_s=got, weights=self.what, rounds=self.a.rounds, threads=torch.get_num_threads())


CASES = "decode", "int8", "batch", "first", "guess", "llama"


def main():
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--rounds", type=int, default=6, help="turns of each, after one to warm up")
    p.add_argument("--tokens", type=int, default=32, help="new tokens in a turn")
    p.add_argument("--only", nargs="*", default=list(CASES), choices=CASES, help="cases")
    a = p.parse_args()
    out, sys.stdout = sys.stdout, sys.stderr  # the lines of the result, whatever a library prints
    bench = Bench(a)
    for case in a.only: print(json.dumps(getattr(bench, case)()), file=out, flush=True)


if __name__ == "__main__": main()
