"""Decoding at batch 1 in fp32, the shape of SmolLM2-135M: one JSON line.

    python bench/bench_generate.py [--rounds 6] [--tokens 32]

  ours      ascend_nb.generate.stream: greedy, KV cache, text handed out as it comes
  peer      transformers' generate with its own KV cache, greedy, ids handed out as they come
  memory    one pass over as many bytes as the model's weights, summed by torch: what reading alone costs

The three take turns, round after round. A step is the time between two tokens, so the prompt is not in it; speeds come from the median
step of all rounds, the ratio is the median of the rounds' ratios. bandwidth_share: bytes of the weights x tokens/s / the memory's speed.
ASCEND_NB_SMOLLM2 names a folder with the real weights (`ascend_nb fetch smollm2-135m --to DIR`); without it they are random.
"""
import argparse
import json
import os
import statistics
import sys
import time
from pathlib import Path

os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
import torch
from transformers import AutoConfig, AutoModelForCausalLM, GenerationConfig, LlamaConfig
from transformers.generation.streamers import BaseStreamer

from ascend_nb.config import ModelConfig, SampleConfig
from ascend_nb.families import config_to_hf
from ascend_nb.generate import stream
from ascend_nb.hf_format import load_model
from ascend_nb.model import Decoder
from ascend_nb.tokenizers import load_tokenizer

ROOT = Path(__file__).resolve().parent.parent
SHAPE = ModelConfig(vocab_size=49152, hidden_size=576, intermediate_size=1536, num_hidden_layers=30, num_attention_heads=9,
                    num_key_value_heads=3, max_position_embeddings=8192, rope_theta=100000., tie_word_embeddings=True)


class Clock(BaseStreamer):
    "Notes when each token arrives. The first call brings the prompt."
    def __init__(self): self.times = []
    def put(self, value): self.times.append(time.perf_counter())
    def end(self): pass


def models():
    "(what the weights are, our model, theirs, tokenizer)"
    folder = os.environ.get("ASCEND_NB_SMOLLM2")
    model = load_model(folder) if folder else Decoder(SHAPE).init_weights(0).eval()
    config = AutoConfig.from_pretrained(folder) if folder else LlamaConfig(**{k: v for k, v in config_to_hf(SHAPE).items() if "dtype" not in k})
    theirs = AutoModelForCausalLM.from_config(config).eval()
    theirs.load_state_dict(model.state_dict(), strict=False)
    model.cfg.eos_token_id = []  # every turn has the same number of tokens
    theirs.generation_config = GenerationConfig(do_sample=False, use_cache=True, pad_token_id=0)
    what = "SmolLM2-135M" if folder else "random, in the shape of SmolLM2-135M"
    return what, model, theirs, load_tokenizer(folder or ROOT / "data_samples" / "tokenizer")


def steps(times): return [b - a for a, b in zip(times, times[1:], strict=False)]


def main():
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--rounds", type=int, default=6, help="turns of each, after one to warm up")
    p.add_argument("--tokens", type=int, default=32, help="new tokens in a turn")
    a = p.parse_args()
    out, sys.stdout = sys.stdout, sys.stderr  # the one line of the result, whatever a library prints
    what, model, theirs, tok = models()
    tok.special = {**tok.special, "eos_token": None}
    ids, got = torch.randint(0, 1000, (32,), generator=torch.Generator().manual_seed(0)).tolist(), {}
    weights = sum(x.numel() * x.element_size() for x in model.parameters())
    block = torch.ones(weights // 4)

    def ours():
        s = stream(model, tok, ids, SampleConfig(max_new_tokens=a.tokens))
        for _ in s: pass
        got["ours"] = s.ids
        return steps(s.times[1:])

    def peer():
        x, clock = torch.tensor([ids]), Clock()
        got["peer"] = theirs.generate(x, attention_mask=torch.ones_like(x), max_new_tokens=a.tokens, streamer=clock)[0, len(ids):].tolist()
        return steps(clock.times[1:])

    def memory():
        times = [time.perf_counter() for _ in range(4) if block.sum()]
        return steps(times)

    turns = [{f.__name__: f() for f in (ours, peer, memory)} for _ in range(a.rounds + 1)][1:]
    step = {k: statistics.median(x for t in turns for x in t[k]) for k in turns[0]}
    tps, gb_s = {k: 1 / v for k, v in step.items()}, weights / min(x for t in turns for x in t["memory"]) / 1e9
    ratio = statistics.median(statistics.median(t["peer"]) / statistics.median(t["ours"]) for t in turns)
    print(json.dumps(dict(
        name="generate", ratio=round(ratio, 3), ours=round(tps["ours"], 1), peer=round(tps["peer"], 1), unit="tokens/s", claim="ratio >= 1.6",
        ms_per_token={k: round(1e3 * step[k], 2) for k in ("ours", "peer")}, bandwidth_gb_s=round(gb_s, 1),
        bandwidth_share={k: round(weights * tps[k] / 1e9 / gb_s, 3) for k in ("ours", "peer")}, same_ids=got["ours"] == got["peer"],
        weights=what, weight_bytes=weights, rounds=a.rounds, tokens=a.tokens, threads=torch.get_num_threads())), file=out)


if __name__ == "__main__": main()
