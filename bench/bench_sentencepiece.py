"""Encoding with a sentencepiece model against sentencepiece itself: prints one JSON line.

    python bench/bench_sentencepiece.py [--rounds 5] [--megabytes 20]

Ours: `load_tokenizer(MODEL).encode_batch(texts)` of ascend_nb, which looks for special tokens first and returns the same ids.
Bare: `SentencePieceProcessor(MODEL).encode(texts, num_threads=cores)`.

ratio       bare seconds / our seconds on the same batches of 1,000,000 characters: 1 is as fast as bare
startup_s   CPU seconds of a process that opens the model and encodes one text, import included; bare_startup_s the same for sentencepiece alone
rust_s      seconds of the same model as a `tokenizers` BPE (what transformers' fast tokenizer runs), on a quarter of the text, scaled

The two go by turns batch by batch, each first every other time; the fastest round of a batch counts, and the batches are summed up. The text is the real data of ASCEND_NB_DATA (or ../shared/data), each document
repeated with a number of its own; without it a small model is trained on generated text.
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
sys.path.insert(0, str(ROOT))
DATA = Path(os.environ.get("ASCEND_NB_DATA", ROOT.parent / "shared" / "data"))
START = {"ours": "from ascend_nb.tokenizers import load_tokenizer\nload_tokenizer(sys.argv[1]).encode_batch(['hello'])",
         "bare": "import sentencepiece\nsentencepiece.SentencePieceProcessor(sys.argv[1]).encode(['hello'])"}


def documents():
    "Real documents in English and Chinese, or made-up ones."
    if not DATA.is_dir():
        rng, words = random.Random(0), ["".join(random.Random(i).choices("abcdefghijklmnop", k=3 + i % 7)) for i in range(3000)]
        return [" ".join(rng.choices(words, k=rng.randint(20, 600))) for _ in range(400)]
    docs = [json.loads(x)["text"] for x in (DATA / "pretrain/c4_demo.jsonl").read_text(encoding="utf-8").splitlines()]
    docs += (DATA / "pretrain/wiki_demo.txt").read_text(encoding="utf-8").splitlines()
    docs += (DATA / "pretrain/tinyshakespeare.txt").read_text(encoding="utf-8").split("\n\n")
    return docs + ["\n".join(x["paragraphs"]) for x in json.loads((DATA / "pretrain/lunyu.json").read_text(encoding="utf-8"))]


def batches(docs, megabytes):
    "Lists of texts of about a million characters each."
    rng, left, out = random.Random(megabytes), megabytes * 10**6, [[]]
    while left > 0:
        for doc in rng.sample(docs, len(docs)):
            out[-1].append(f"{rng.randint(0, 10**9)} {doc}")
            left -= len(doc.encode())
            if sum(map(len, out[-1][-50:])) and sum(map(len, out[-1])) > 10**6: out.append([])
            if left <= 0: break
    return out


def model_file(room, docs):
    if (DATA / "tokenizers/llama2.model").is_file(): return DATA / "tokenizers/llama2.model"
    import sentencepiece
    sentencepiece.SentencePieceTrainer.train(sentence_iterator=iter(docs), model_prefix=str(room / "tokenizer"), vocab_size=2000, model_type="bpe",
                                             byte_fallback=True, normalization_rule_name="identity", remove_extra_whitespaces=False, minloglevel=2)
    return room / "tokenizer.model"


def startup(code, file):
    "CPU seconds of a process and its children's."
    lines = f"import sys\n{code}\nimport resource\nu = resource.getrusage(resource.RUSAGE_SELF)\nprint(u.ru_utime + u.ru_stime)"
    env = {**os.environ, "PYTHONPATH": str(ROOT)}
    return float(subprocess.run([sys.executable, "-c", lines, str(file)], env=env, capture_output=True, text=True, check=True).stdout)


def timed(f, *args):
    began = time.perf_counter()
    out = f(*args)
    return time.perf_counter() - began, out


def main():
    cli = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    cli.add_argument("--rounds", type=int, default=5, help="how often each is timed")
    cli.add_argument("--megabytes", type=int, default=20, help="size of the text")
    args = cli.parse_args()
    import sentencepiece

    from ascend_nb.tokenizers import load_tokenizer
    with tempfile.TemporaryDirectory() as d:
        docs = documents()
        file, texts = model_file(Path(d), docs), batches(docs, args.megabytes)
        sp, ours, cores = sentencepiece.SentencePieceProcessor(str(file)), load_tokenizer(file), os.cpu_count()
        ways = {"ours": ours.encode_batch, "bare": lambda t: sp.encode(t, num_threads=cores)}
        same = all(ours.encode_batch(t) == sp.encode(t) for t in texts[:3])
        seconds, tokens = {"ours": [[] for _ in texts], "bare": [[] for _ in texts]}, 0
        for r in range(args.rounds):
            tokens = 0
            for i, batch in enumerate(texts):
                for who in ("ours", "bare") if (i + r) % 2 else ("bare", "ours"):
                    took, out = timed(ways[who], batch)
                    seconds[who][i].append(took)
                tokens += sum(map(len, out))
        part = texts[::4]
        rust = sum(timed(lambda t: [e.ids for e in ours.rust.encode_batch_fast(t, add_special_tokens=False)], t)[0] for t in part) * len(texts) / len(part)
        starts = {who: min(startup(code, file) for _ in range(3)) for who, code in START.items()}
    best = {who: sum(map(min, v)) for who, v in seconds.items()}
    print(json.dumps(dict(
        name="sentencepiece", ratio=round(best["bare"] / best["ours"], 3), ours=round(best["ours"], 3), peer=round(best["bare"], 3),
        unit=f"s for {args.megabytes} MB", tokens=tokens, tokens_per_s=round(tokens / best["ours"]), same_ids=same,
        startup_s=round(starts["ours"], 2), bare_startup_s=round(starts["bare"], 2), rust_s=round(rust, 2), rounds=args.rounds,
        model=file.name, peer_name=f"sentencepiece {sentencepiece.__version__}, num_threads={cores}",
        seconds={k: [round(sum(b[r] for b in v), 2) for r in range(args.rounds)] for k, v in seconds.items()})))


if __name__ == "__main__": main()
