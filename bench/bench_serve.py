"""A server in a process of its own and many who ask at once: one JSON line.

    python bench/bench_serve.py [--clients 16] [--tokens 48] [--rounds 2]

  serve  tokens/s that all streaming clients get together, against one client alone; both with the real `openai` client, greedy, no two prompts the same
  lost: answers that did not come whole. starved: the slowest answer's time divided by the fastest one's. alike: every text of the crowd is what the same client gets alone

The sides take turns; the ratio is the median of the rounds' ratios. ASCEND_NB_SMOLLM2 names a folder with the real weights; without it they are random, in the same shape.
"""
import argparse
import json
import os
import re
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import torch
from openai import OpenAI

from ascend_nb.config import ModelConfig
from ascend_nb.hf_format import save_model
from ascend_nb.model import Decoder
from ascend_nb.tokenizers import load_tokenizer

ROOT = Path(__file__).resolve().parent.parent
SHAPE = ModelConfig(vocab_size=49152, hidden_size=576, intermediate_size=1536, num_hidden_layers=30, num_attention_heads=9,
                    num_key_value_heads=3, max_position_embeddings=8192, rope_theta=100000., tie_word_embeddings=True, eos_token_id=[])
median = statistics.median


class Server:
    "`ascend_nb serve` as a person starts it."
    def __init__(self, folder, slots):
        self.log = tempfile.NamedTemporaryFile("w+", suffix=".log")
        command = [sys.executable, "-m", "ascend_nb.cli", "serve", "--model", str(folder), "--port", "0", "--name", "bench", "--slots", str(slots), "--device", "cpu", "--dtype", "fp32"]
        self.process = subprocess.Popen(command, cwd=ROOT, stdout=self.log, stderr=self.log)

    def __enter__(self):
        end = time.monotonic() + 120
        while not (found := re.search(r"http://\S+/v1", Path(self.log.name).read_text())):
            if self.process.poll() is not None or time.monotonic() > end: sys.exit(Path(self.log.name).read_text())
            time.sleep(.1)
        return found[0]

    def __exit__(self, *_):
        self.process.send_signal(signal.SIGTERM)
        self.process.wait(30)


def one(url, i, n):
    "A client: (seconds, tokens, text, seconds to the first piece)."
    client, began, text, first = OpenAI(base_url=url, api_key="none", max_retries=0, timeout=600), time.perf_counter(), "", None
    for c in client.completions.create(model="bench", prompt=f"Once upon a time there were {i + 2} foxes who", max_tokens=n, temperature=0, stream=True, stream_options={"include_usage": True},
                                       extra_body={"logit_bias": {"0": -100, "2": -100}}):  # no end of text: every answer has the same number of tokens
        if c.choices: text, first = text + c.choices[0].text, first or time.perf_counter() - began
        if c.usage: used = c.usage.completion_tokens
    return time.perf_counter() - began, used, text, first


def crowd(url, clients, n):
    "All at once: (tokens/s together, their answers)."
    began = time.perf_counter()
    with ThreadPoolExecutor(clients) as pool: got = list(pool.map(lambda i: one(url, i, n), range(clients)))
    return sum(g[1] for g in got) / (time.perf_counter() - began), got


def main():
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--clients", type=int, default=16, help="who ask at once")
    p.add_argument("--tokens", type=int, default=48, help="of each answer")
    p.add_argument("--rounds", type=int, default=2, help="turns of each side, after one answer to warm up")
    a = p.parse_args()
    folder, home = os.environ.get("ASCEND_NB_SMOLLM2"), tempfile.TemporaryDirectory()
    if not folder: folder = save_model(Decoder(SHAPE).init_weights(0), Path(home.name) / "m", load_tokenizer(ROOT / "data_samples" / "tokenizer"))
    with Server(folder, a.clients) as url:
        one(url, 0, 4)
        rounds = [(crowd(url, 1, a.tokens), crowd(url, a.clients, a.tokens)) for _ in range(a.rounds)]
        alone = one(url, a.clients - 1, a.tokens)[2]
    crowds = [got for _, (_, got) in rounds]
    lost = sum(g[1] != a.tokens for got in crowds for g in got)
    print(json.dumps(dict(name=f"serve {a.clients} clients", ratio=round(median(many / single for (single, _), (many, _) in rounds), 2), claim="ratio >= 3, lost 0, starved <= 1.5",
                          one=round(median(s for (s, _), _ in rounds), 1), all=round(median(m for _, (m, _) in rounds), 1), unit="tokens/s", lost=lost,
                          starved=round(max(max(g[0] for g in got) / min(g[0] for g in got) for got in crowds), 2), first_s=round(max(g[3] for got in crowds for g in got), 2),
                          alike=all(got[-1][2] == alone for got in crowds), tokens=a.tokens, rounds=a.rounds, weights="SmolLM2-135M" if os.environ.get("ASCEND_NB_SMOLLM2") else "random, in the shape of SmolLM2-135M",
                          threads=torch.get_num_threads())))


if __name__ == "__main__": main()
