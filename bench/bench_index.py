"""Building the index of a large corpus: 10^9 tokens in 10^6 documents, against Megatron-LM's own builder in the same run.

Prints one JSON line; ratio is theirs / ours, so above 1 is faster. Megatron's C++ helper is used where it is compiled, else its Python loop.
"""
import importlib
import json
import statistics
import time

import numpy as np

from ascend_nb.sample_index import gpt_index, plan_epochs

DOCUMENTS, SEQ, SEED, ROUNDS = 1_000_000, 4096, 1234, 5


def megatron():
    "Megatron's three builders and the helper that cuts, or None where the package is absent."
    try: gpt = importlib.import_module("megatron.core.datasets.gpt_dataset")
    except ImportError: return None
    core = "megatron.core.datasets."
    for name in ("helpers_cpp", "helpers"):
        try: helpers = importlib.import_module(core + name)
        except ImportError: continue
        cut = getattr(helpers, "build_sample_idx_int32", None) or getattr(helpers, "build_sample_idx", None)
        if cut: break
    else: return None
    def build(lengths, seq, epochs):
        rng, tokens = np.random.RandomState(SEED), int(lengths.sum(dtype=np.int64))
        docs = gpt._build_document_index(np.arange(len(lengths), dtype=np.int32), epochs, rng, False)
        try: cuts = cut(lengths, docs, seq, epochs, tokens, True, 1)
        except TypeError: cuts = cut(lengths, docs, seq, epochs, tokens)
        return docs, cuts, gpt._build_shuffle_index(len(cuts) - 1, len(cuts) - 1, rng)
    return build, helpers.__name__.rsplit(".", 1)[1]


def timed(f):
    t = time.perf_counter()
    out = f()
    return time.perf_counter() - t, out


def main():
    lengths = np.random.default_rng(0).integers(100, 1900, DOCUMENTS).astype(np.int32)
    tokens, peer = int(lengths.sum(dtype=np.int64)), megatron()
    epochs, first = plan_epochs(tokens, None, SEQ)
    ours, theirs = [], []
    for _ in range(ROUNDS):
        t, mine = timed(lambda: gpt_index(lengths, (0, DOCUMENTS), SEQ, epochs, first, SEED))
        ours.append(t)
        if peer:
            t, other = timed(lambda: peer[0](lengths, SEQ, epochs))
            theirs.append(t)
    same = peer and all(np.array_equal(a, b) for a, b in zip(mine, other, strict=True))
    a, b = statistics.median(ours), statistics.median(theirs) if theirs else None
    print(json.dumps(dict(name="index of 10^9 tokens in 10^6 documents", ratio=b and round(b / a, 3), ours=round(a, 3), peer=b and round(b, 3), unit="s",
                          tokens=tokens, documents=DOCUMENTS, samples=len(mine[2]), seq_length=SEQ, same_arrays=same,
                          versus=f"megatron-core, {peer[1]}" if peer else "megatron-core is absent")))


if __name__ == "__main__": main()
