"""Preprocessing against bare `tokenizers`: prints one JSON line.

    python bench/bench_preprocess.py [--rounds 3] [--megabytes 20]

Ours: the command `ascend_nb preprocess` as a process of its own, from start to the .bin/.idx pair on disk.
Bare: a process that imports tokenizers, loads tokenizer.json, reads the file's lines and calls `encode_batch_fast` on batches of
1,000,000 characters; it keeps nothing and writes nothing.

ratio           bare seconds / our seconds on the whole input: 1 is as fast as bare
marginal_ratio  the same for the megabytes between a quarter of the input and all of it: start-up falls out
peak_growth     our peak memory on 40 MB / on 5 MB (VmHWM, MiB)

The two run by turns, the fastest of all rounds counts. The text is the real data of ASCEND_NB_DATA (or ../shared/data), each document
repeated with a number of its own, in a shuffled order; without it, generated text and a small tokenizer trained on it.
"""
import argparse
import json
import os
import random
import subprocess
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
DATA = Path(os.environ.get("ASCEND_NB_DATA", ROOT.parent / "shared" / "data"))

BARE = """
import sys
from tokenizers import Tokenizer
tokenizer, batch, size, n = Tokenizer.from_file(sys.argv[1]), [], 0, 0
for line in open(sys.argv[2], encoding="utf-8").read().split("\\n"):
    batch.append(line); size += len(line)
    if size > 1_000_000: n += sum(map(len, tokenizer.encode_batch_fast(batch))); batch, size = [], 0
print(n + sum(map(len, tokenizer.encode_batch_fast(batch))))
"""
OURS = """
import re, sys
from ascend_nb.cli import main
code = main(sys.argv[1:])
print("peak", re.search(r"VmHWM:\\s+(\\d+)", open("/proc/self/status").read())[1], file=sys.stderr)
sys.exit(code)
"""


def documents():
    "Real documents of one line each, or made-up ones."
    if not DATA.is_dir():
        rng, words = random.Random(0), ["".join(random.Random(i).choices("abcdefghijklmnop", k=3 + i % 7)) for i in range(3000)]
        return [" ".join(rng.choices(words, k=rng.randint(20, 600))) for _ in range(400)]
    docs = [json.loads(x)["text"].replace("\n", " ") for x in (DATA / "pretrain/c4_demo.jsonl").read_text(encoding="utf-8").splitlines()]
    docs += (DATA / "pretrain/wiki_demo.txt").read_text(encoding="utf-8").splitlines()
    return docs + [x.replace("\n", " ") for x in (DATA / "pretrain/tinyshakespeare.txt").read_text(encoding="utf-8").split("\n\n")]


def write(path, docs, megabytes):
    "A text file of that size, a document a line."
    rng, left = random.Random(megabytes), megabytes * 10**6
    with open(path, "w", encoding="utf-8") as f:
        while left > 0:
            for doc in rng.sample(docs, len(docs)):
                left -= f.write(f"{rng.randint(0, 10**9)} {doc}\n")
                if left <= 0: break


def tokenizer_folder(room, docs):
    if (DATA / "tokenizers/qwen2").is_dir(): return DATA / "tokenizers/qwen2"
    from tokenizers import Tokenizer, models, pre_tokenizers, trainers
    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.train_from_iterator(docs, trainers.BpeTrainer(vocab_size=8000, show_progress=False, initial_alphabet=pre_tokenizers.ByteLevel.alphabet()))
    (room / "tok").mkdir()
    bpe.save(str(room / "tok/tokenizer.json"))
    return room / "tok"


def timed(code, *args):
    "Seconds, stdout and stderr of a process."
    env, began = {**os.environ, "PYTHONPATH": str(ROOT)}, time.perf_counter()
    p = subprocess.run([sys.executable, "-c", code, *map(str, args)], env=env, capture_output=True, text=True, check=False)
    if p.returncode: sys.exit(p.stderr)
    return time.perf_counter() - began, p.stdout, p.stderr


def main():
    cli = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    cli.add_argument("--rounds", type=int, default=3, help="how often each is timed")
    cli.add_argument("--megabytes", type=int, default=20, help="size of the whole input")
    args = cli.parse_args()
    big, small = args.megabytes, max(args.megabytes // 4, 1)
    with tempfile.TemporaryDirectory() as d:
        room, docs = Path(d), documents()
        tok = tokenizer_folder(room, docs)
        for mb in {5, 40, small, big}: write(room / f"{mb}.txt", docs, mb)

        def ours(mb):
            flags = ["--input", room / f"{mb}.txt", "--tokenizer-name-or-path", tok, "--output-prefix", room / "out", "--json"]
            return timed(OURS, "preprocess", *flags)

        seconds = {}
        for _ in range(args.rounds):
            for mb in (small, big):
                b, o = timed(BARE, tok / "tokenizer.json", room / f"{mb}.txt"), ours(mb)
                assert int(b[1]) == json.loads(o[1])["tokens"], "the two made different numbers of tokens"
                for who, took in (("bare", b[0]), ("ours", o[0])): seconds.setdefault((who, mb), []).append(took)
        peak = {mb: int(ours(mb)[2].rsplit("peak", 1)[1]) / 1024 for mb in (5, 40)}
    best = {k: min(v) for k, v in seconds.items()}
    slope = {who: (best[who, big] - best[who, small]) / (big - small) for who in ("ours", "bare")}
    print(json.dumps(dict(
        name="preprocess", ratio=round(best["bare", big] / best["ours", big], 3), ours=round(best["ours", big], 2), peer=round(best["bare", big], 2),
        unit=f"s for {big} MB, start-up included", marginal_ratio=round(slope["bare"] / slope["ours"], 3),
        marginal_ours=round(slope["ours"], 4), marginal_peer=round(slope["bare"], 4), marginal_unit="s per MB",
        peak_growth=round(peak[40] / peak[5], 3), peak_5_mb=round(peak[5]), peak_40_mb=round(peak[40]), peak_unit="MiB", rounds=args.rounds,
        tokenizer=tok.name, peer_name="tokenizers.encode_batch_fast", seconds={f"{w} {m} MB": [round(x, 2) for x in v] for (w, m), v in seconds.items()})))


if __name__ == "__main__": main()
