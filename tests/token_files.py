"""Small files of tokens for the tests of data sets."""
import numpy as np

from ascend_nb.indexed import write_together
from ascend_nb.instruct_sets import FIELDS, PairDataset


def write_sft(prefix, rows):
    "Rows of (question tokens, answer tokens)."
    ids = [np.arange(1, q + a + 1) for q, a in rows]
    with write_together(*(f"{prefix}_packed_{f}_document" for f in FIELDS)) as (i, m, lab):
        i.add_many(ids); m.add_many([np.ones_like(x) for x in ids])
        lab.add_many([np.where(x <= q, -100, x) for x, (q, _) in zip(ids, rows, strict=True)])
    return str(prefix)


def write_pairs(prefix, rows):
    "Rows of (question tokens, tokens of the better answer, tokens of the worse one); the two answers have ids of their own."
    with write_together(*(f"{prefix}_packed_{f}_document" for f in PairDataset.FIELDS)) as writers:
        for n, (q, *answers) in enumerate(rows):
            question = [100 + (n + k) % 50 for k in range(q)]
            for k, (size, (w, lab)) in enumerate(zip(answers, (writers[:2], writers[2:]), strict=True)):
                answer = [10 + 20 * k + (n + t) % 20 for t in range(size)]
                w.add_many([question + answer]); lab.add_many([[-100] * q + answer])
    return str(prefix)
