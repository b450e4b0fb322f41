"""Preprocessing against its peers: prints one JSON line for each claim.

    python bench/bench_preprocess.py [--rounds 3] [--megabytes 20] [--big 200]

Ours: the command `ascend_nb preprocess` as a process of its own, from start to the .bin/.idx pair on disk.
bare: a process that imports tokenizers, loads tokenizer.json, reads the file's documents and calls `encode_batch_fast` on batches of
1,000,000 characters; it keeps nothing and writes nothing.
datasets: `load_dataset` and `map(batched=True)` with transformers' fast tokenizer, as ModelLink does it, in one process and in one for
each core (the faster counts); what it makes is not even written as .bin/.idx.
datatrove: JsonlReader and MegatronDocumentTokenizer, which write the same pair. Looked for on PYTHONPATH and in DATATROVE
(pip install --target DIR --no-deps datatrove loguru humanize orjson); where it is absent the line says so.

All run by turns, the fastest of all rounds counts. The text is the real data of ASCEND_NB_DATA (or ../shared/data), each document
repeated with a number of its own, in a shuffled order; without it, generated text and a small tokenizer trained on it.
"""
import argparse
import json
import os
import random
import resource
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
DATA = Path(os.environ.get("ASCEND_NB_DATA", ROOT.parent / "shared" / "data"))

BARE = """
import json, sys
from tokenizers import Tokenizer
tokenizer, batch, size, n = Tokenizer.from_file(sys.argv[1]), [], 0, 0
for line in open(sys.argv[2], encoding="utf-8"):
    text = json.loads(line)["text"]
    batch.append(text); size += len(text)
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
DATASETS = """
import os, sys
from datasets import disable_progress_bars, load_dataset
from transformers import AutoTokenizer
disable_progress_bars()
tokenizer = AutoTokenizer.from_pretrained(sys.argv[1])
rows = load_dataset("json", data_files=sys.argv[2], split="train", cache_dir=sys.argv[3])
made = rows.map(lambda b: {"input_ids": tokenizer(b["text"])["input_ids"]}, batched=True, num_proc=int(sys.argv[4]), remove_columns=rows.column_names)
print(sum(sum(map(len, b["input_ids"])) for b in made.iter(1000)))
"""
DATATROVE = """
import os, sys
sys.path += [p for p in [os.environ.get("DATATROVE")] if p]
from datatrove.executor.local import LocalPipelineExecutor
from datatrove.pipeline.readers import JsonlReader
from datatrove.pipeline.tokens.megatron_tokenizer import MegatronDocumentTokenizer
file, out = sys.argv[2], sys.argv[3]
read = JsonlReader(os.path.dirname(file), glob_pattern=os.path.basename(file))
LocalPipelineExecutor([read, MegatronDocumentTokenizer(output_folder=out, tokenizer_name_or_path=sys.argv[1], eos_token=None)], tasks=1, logging_dir=out + "/log").run()
print(os.path.getsize(out + "/00000_tokens.bin") // 4)
"""


def documents():
    "Real documents of one line each, or made-up ones."
    if not DATA.is_dir():
        rng, words = random.Random(0), ["".join(random.Random(i).choices("abcdefghijklmnop", k=3 + i % 7)) for i in range(3000)]
        return [" ".join(rng.choices(words, k=rng.randint(20, 600))) for _ in range(400)]
    docs = [json.loads(x)["text"] for x in (DATA / "pretrain/c4_demo.jsonl").read_text(encoding="utf-8").splitlines()]
    docs += (DATA / "pretrain/wiki_demo.txt").read_text(encoding="utf-8").splitlines()
    return docs + [x for x in (DATA / "pretrain/tinyshakespeare.txt").read_text(encoding="utf-8").split("\n\n")]


def write(path, docs, megabytes):
    "A JSON-lines file of that size."
    rng, left = random.Random(megabytes), megabytes * 10**6
    with open(path, "w", encoding="utf-8") as f:
        while left > 0:
            for doc in rng.sample(docs, len(docs)):
                left -= len((line := json.dumps(dict(text=f"{rng.randint(0, 10**9)} {doc}"), ensure_ascii=False) + "\n").encode())
                f.write(line)
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
    "Seconds, CPU seconds, stdout and stderr of a process."
    env, began, cpu = {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")]))}, time.perf_counter(), children_cpu()
    p = subprocess.run([sys.executable, "-c", code, *map(str, args)], env=env, capture_output=True, text=True, check=False)
    if p.returncode: raise RuntimeError(p.stderr)
    return time.perf_counter() - began, children_cpu() - cpu, p.stdout, p.stderr


def children_cpu():
    "CPU seconds of all processes that have ended."
    r = resource.getrusage(resource.RUSAGE_CHILDREN)
    return r.ru_utime + r.ru_stime


def say(name, **kw): print(json.dumps(dict(name=f"preprocess_{name}", **kw)), flush=True)


class Bench:
    "Files and programs."
    def __init__(self, room, tok): self.room, self.tok, self.seconds, self.tokens = room, tok, {}, {}

    def ours(self, mb):
        "The command on a file of that size."
        flags = ["--input", self.room / f"{mb}.jsonl", "--tokenizer-name-or-path", self.tok, "--output-prefix", self.room / "out", "--handler-name", "GeneralPretrainHandler", "--json"]
        took, cpu, out, err = timed(OURS, "preprocess", *flags)
        return took, cpu, json.loads(out)["tokens"], int(err.rsplit("peak", 1)[1]) / 1024

    def peer(self, who, mb):
        "Seconds and tokens of a peer."
        file, work = self.room / f"{mb}.jsonl", self.room / "work"
        code, folder, more = dict(bare=(BARE, self.tok / "tokenizer.json", []), datatrove=(DATATROVE, self.tok / "tokenizer.json", [work]), datasets=(DATASETS, self.tok, [work, 1]),
                                  datasets_all=(DATASETS, self.tok, [work, os.cpu_count()]))[who]
        took, _, out, _ = timed(code, folder, file, *more)
        shutil.rmtree(work, ignore_errors=True)
        return took, int(out.split()[-1])

    def round(self, peers, mb):
        "Everyone once, on one file."
        took, _, tokens, _ = self.ours(mb)
        self.seconds.setdefault(("ours", mb), []).append(took)
        for who in peers:
            took, n = self.peer(who, mb)
            if n != tokens: raise RuntimeError(f"{who} made {n} tokens of {mb} MB, we made {tokens}")
            self.seconds.setdefault((who, mb), []).append(took)

    def best(self, who, mb): return min(self.seconds[who, mb])

    def compare(self, name, who, mb, **kw):
        "A line that compares the fastest rounds."
        a, b = self.best("ours", mb), self.best(who, mb)
        say(name, ratio=round(b / a, 3), ours=round(a, 2), peer=round(b, 2), unit=f"s for {mb} MB, start-up included", peer_name=who, tokenizer=self.tok.name,
            all_ours=[round(x, 2) for x in self.seconds["ours", mb]], all_peer=[round(x, 2) for x in self.seconds[who, mb]], **kw)


def main():
    cli = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    cli.add_argument("--rounds", type=int, default=3, help="how often each is timed")
    cli.add_argument("--megabytes", type=int, default=20, help="size of the input")
    cli.add_argument("--big", type=int, default=200, help="size of the input whose peak memory is taken")
    args = cli.parse_args()
    big, small = args.megabytes, max(args.megabytes // 4, 1)
    with tempfile.TemporaryDirectory() as d:
        docs = documents()
        bench = Bench(Path(d), tokenizer_folder(Path(d), docs))
        for mb in {small, big, args.big}: write(bench.room / f"{mb}.jsonl", docs, mb)
        (bench.room / "0.jsonl").write_text('{"text": "one"}\n')
        others, absent = ["datasets", "datasets_all", "datatrove"], {}
        for who in list(others):
            try: bench.peer(who, small) # also fills the disk cache
            except RuntimeError as e: others.remove(who); absent[who] = str(e).strip().splitlines()[-1]
        for _ in range(args.rounds):
            bench.round(["bare"], small)
            bench.round(["bare", *others], big)
        bench.compare("end_to_end", "bare", big)
        slope = {who: (bench.best(who, big) - bench.best(who, small)) / (big - small) for who in ("ours", "bare")}
        say("marginal", ratio=round(slope["bare"] / slope["ours"], 3), ours=round(slope["ours"], 4), peer=round(slope["bare"], 4), peer_name="bare",
            unit=f"s per MB between {small} and {big} MB: start-up falls out")
        for name in ("datasets", "datatrove"):
            here = [w for w in others if w.startswith(name)]
            if here: bench.compare(f"vs_{name}", min(here, key=lambda w: bench.best(w, big)), big)
            else: say(f"vs_{name}", absent=absent[name])
        start = [bench.ours(0) for _ in range(args.rounds)]
        say("start_up", ours=round(min(s[1] for s in start), 2), unit="CPU s for one row", seconds=round(min(s[0] for s in start), 2))
        peak = {mb: bench.ours(mb)[3] for mb in (small, big, args.big)}
        say("peak_memory", ours=round(peak[args.big]), unit=f"MiB at {args.big} MB (VmHWM)", growth=round(peak[args.big] / peak[small], 3), mib={f"{mb} MB": round(p) for mb, p in peak.items()})


if __name__ == "__main__": main()
