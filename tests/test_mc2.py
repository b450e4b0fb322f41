"""Products that contain their communication: loss, gradients and curves stay those of one process."""
from test_parallel import case, run, same


def joined(*args, **kw):
    c = case(*args, **kw)
    c["parallel"]["use_ascend_mc2"] = True
    return c


def test_doors_inside_the_products():
    same(run([joined(shape, tp=2, sp=sp) for shape in ("dense", "gpt2", "moe", "mla") for sp in (False, True)] +
             [joined("dense", tp=2, sp=True, recompute="full"), joined("dense", kind="curve", tp=2, sp=True, steps=5)], 2))
