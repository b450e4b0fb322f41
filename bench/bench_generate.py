"""Making text on a CPU in the shape of SmolLM2-135M, against transformers: one JSON line for each case.

    python bench/bench_generate.py [--rounds 6] [--tokens 32] [--only decode int8 batch first guess llama]

  decode  batch 1, fp32: a token by the compiled twin; the peer is transformers' generate with its own KV cache, greedy, ids handed out as they come
  int8    the same with int8 weights (and with an int8 cache too), against the same fp32 peer; agree: tokens of the fp32 text that the int8 model chooses after the same beginning
  batch   eight prompts of unequal length at a time, against transformers with the same prompts padded to one length
  first   the first token of a prompt of 512 tokens; gemm: the share of the peer's time that its matrix products alone need
  guess   decode with prompt-lookup, on a text that repeats itself, against decode without; same text
  llama   llama.cpp with the same weights as f16, q8_0 and q4_0, in a process of its own with as many threads: decode and the first token of 512 against transformers, and ours beside them;
          agree: as above. ASCEND_NB_LLAMA names a Python that has llama_cpp; the line `skipped` tells how to build one

The sides take turns, round after round; every ratio is the median of the rounds' ratios, so that what else the machine does hits both. Steps are the time between two tokens, so the prompt is not in them.
memory is one pass of torch's sum over as many bytes as the model's weights, in large pages: what reading alone costs. bandwidth_share: bytes of the weights x tokens/s / that speed.
ASCEND_NB_SMOLLM2 names a folder with the real weights (`ascend_nb fetch smollm2-135m --to DIR`); without it they are random.
"""
import argparse
import copy
import json
import os
import statistics
import subprocess
import sys
import tempfile
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
HOW = "python -m venv L && CMAKE_ARGS=-DGGML_NATIVE=ON L/bin/pip install llama-cpp-python && ASCEND_NB_LLAMA=L/bin/python python bench/bench_generate.py --only llama"
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


def timed(f):
    t = time.perf_counter()
    f()
    return time.perf_counter() - t


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
        self.small = None if not {"int8", "llama"} & set(a.only) else Fast(copy.deepcopy(model), weights="int8", cache="int8")
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

    def read(self, ids): next(iter(stream(self.fast, self.tok, ids, SampleConfig(max_new_tokens=1), Memory(self.fast))), None)

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

        @torch.inference_mode()
        def gemm():
            for _ in range(c.num_hidden_layers):
                for w, x in mats: F.linear(x, w)
        t = self.turns(ours=lambda: timed(lambda: self.read(ids)), peer=lambda: timed(lambda: self.peer.steps(ids, 1)), gemm=lambda: timed(gemm))
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
        "A row for each kind of file: tokens/s and the first token against transformers, and ours beside it."
        if not (python := os.environ.get("ASCEND_NB_LLAMA")): return dict(name="generate llama.cpp", skipped="not installed", do=HOW)
        with tempfile.TemporaryDirectory() as d, Llama(python) as peer:
            if not (about := peer.ask("about")): return dict(name="generate llama.cpp", skipped=f"{python} has no llama_cpp", do=HOW)
            size = peer.load(self.fast.model, d)
            n, prompt, want = self.a.tokens, torch.randint(0, 1000, (512,), generator=torch.Generator().manual_seed(1)).tolist(), ours(self.fast, self.tok, self.ids, 256)[1]
            mine = {"fp32": lambda: ours(self.fast, self.tok, self.ids, n)[0], "int8": lambda: ours(self.small, self.tok, self.ids, n)[0], "peer": lambda: self.peer.steps(self.ids, n)[0]}
            t = self.turns(**mine, **{k: (lambda k=k: peer.ask("speak", name=k, ids=self.ids, n=n)["steps"]) for k in size})
            first = self.turns(fp32=lambda: timed(lambda: self.read(prompt)), peer=lambda: timed(lambda: self.peer.steps(prompt, 1)), **{k: (lambda k=k: peer.ask("speak", name=k, ids=prompt, n=1)["first"]) for k in size})
            agree = {k: sum(a == b for a, b in zip(peer.ask("follow", name=k, ids=self.ids, text=want)["ids"], want, strict=True)) / len(want) for k in size}
        step = {k: [median(s) for s in t[k]] for k in t}
        over = lambda times, a, b: round(median(x / y for x, y in zip(times[a], times[b], strict=True)), 3)
        speed = lambda k: round(1 / median(step[k]), 1)
        return [self.told(f"llama.cpp {k}", step["peer"], step[k], "stands beside", llama=speed(k), peer=speed("peer"), unit="tokens/s", ours={x: speed(x) for x in ("fp32", "int8")},
                          ours_over_llama={x: over(step, k, x) for x in ("fp32", "int8")}, agree=round(agree[k], 3), first_ratio=over(first, "peer", k), first_ms={x: round(1e3 * median(first[x])) for x in (k, "fp32", "peer")},
                          first_ours_over_llama=over(first, k, "fp32"), mb=size[k], tokens=n, llama_cpp_python=about["version"]) for k in size]


class Llama:
    "llama.cpp in its own process, see llama_peer.py."
    def __init__(self, python): self.process = subprocess.Popen([python, str(ROOT / "bench/llama_peer.py")], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env={**os.environ, "PYTHONPATH": ""})
    def __enter__(self): return self
    def __exit__(self, *_): self.process.communicate(timeout=30)

    def ask(self, do, **what):
        "None: the process has ended."
        try: self.process.stdin.write(json.dumps(dict(do=do, **what)) + "\n"); self.process.stdin.flush()
        except BrokenPipeError: return None
        return json.loads(self.process.stdout.readline() or "null")

    def load(self, model, folder):
        "Files of the same weights: kind -> MB."
        for kind in (kinds := ("f16", "q8_0", "q4_0")):
            if kind == "f16": write_gguf(model, f"{folder}/f16.gguf")
            else: self.ask("quantize", source=f"{folder}/f16.gguf", to=f"{folder}/{kind}.gguf", kind=kind)
            self.ask("load", name=kind, file=f"{folder}/{kind}.gguf", threads=torch.get_num_threads(), room=1024)
        return {k: round(os.path.getsize(f"{folder}/{k}.gguf") / 1e6) for k in kinds}


def write_gguf(model, file):
    "The weights as fp16 in llama.cpp's own format, its names and its order of rotary pairs (https://github.com/ggml-org/ggml/blob/master/docs/gguf.md); ids go in and out, so it needs no vocabulary."
    import gguf
    c, w = model.cfg, gguf.GGUFWriter(file, "llama")
    w.add_block_count(c.num_hidden_layers); w.add_context_length(c.max_position_embeddings); w.add_embedding_length(c.hidden_size); w.add_feed_forward_length(c.intermediate_size)
    w.add_head_count(c.num_attention_heads); w.add_head_count_kv(c.num_key_value_heads); w.add_rope_freq_base(c.rope_theta); w.add_rope_dimension_count(c.head_dim)
    w.add_layer_norm_rms_eps(c.rms_norm_eps); w.add_vocab_size(c.vocab_size); w.add_file_type(gguf.LlamaFileType.MOSTLY_F16); w.add_tokenizer_model("none")
    name = gguf.get_tensor_name_map(gguf.MODEL_ARCH.LLAMA, c.num_hidden_layers).get_name
    for key, t in model.state_dict().items():
        if key == "lm_head.weight" and c.tie_word_embeddings: continue
        if "q_proj" in key or "k_proj" in key: t = t.view(-1, 2, c.head_dim // 2, t.shape[1]).transpose(1, 2).reshape(t.shape)
        w.add_tensor(name(key, try_suffixes=(".weight",)), (t.half() if t.ndim > 1 else t).contiguous().numpy())
    w.write_header_to_file(); w.write_kv_data_to_file(); w.write_tensors_to_file(); w.close()


CASES = "decode", "int8", "batch", "first", "guess", "llama"


def main():
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--rounds", type=int, default=6, help="turns of each, after one to warm up")
    p.add_argument("--tokens", type=int, default=32, help="new tokens in a turn")
    p.add_argument("--only", nargs="*", default=list(CASES), choices=CASES, help="cases")
    a = p.parse_args()
    out, sys.stdout = sys.stdout, sys.stderr  # the lines of the result, whatever a library prints
    bench = Bench(a)
    for case in a.only:
        rows = getattr(bench, case)()
        for row in rows if isinstance(rows, list) else [rows]: print(json.dumps(row), file=out, flush=True)


if __name__ == "__main__": main()
