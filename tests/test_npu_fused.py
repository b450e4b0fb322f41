"""Products with their communication on two gloo processes: values and gradients are those of the uncut product."""
import socket

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp

from ascend_nb.core import UserError
from ascend_nb.npu_fused import all_gather_matmul, matmul_all_reduce, matmul_reduce_scatter

N = 2


def work(rank, port, queue):
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"tcp://127.0.0.1:{port}", rank=rank, world_size=N)
    g = torch.Generator().manual_seed(0)
    x, w, dy = (torch.randn(*s, generator=g, dtype=torch.double) for s in ((6, 4), (8, 4), (6, 8)))
    x.requires_grad_(); w.requires_grad_()
    want = (x @ w.t(), *torch.autograd.grad(x @ w.t(), (x, w), dy))
    rows, cols = lambda t: t.chunk(N)[rank], lambda t: t.chunk(N, 1)[rank]
    parts = {  # function -> cut of x, w, dy = cut of the result; cuts of the gradients are those of x and w
        matmul_all_reduce: (cols, cols, lambda t: t), all_gather_matmul: (rows, rows, cols), matmul_reduce_scatter: (cols, cols, rows)}
    off = {}
    for f, (cx, cw, cy) in parts.items():
        a, b = (cut(t.detach()).clone().requires_grad_() for cut, t in ((cx, x), (cw, w)))
        y = f(a, b)
        got, right = (y, *torch.autograd.grad(y, (a, b), cy(dy).contiguous())), (cy(want[0]), cx(want[1]), cw(want[2]))
        off[f.__name__] = max((p - q).abs().max().item() for p, q in zip(got, right, strict=True))
    try: matmul_reduce_scatter(a[:5], b)
    except UserError as e: off["refused"] = str(e)
    queue.put(off)
    dist.barrier(); dist.destroy_process_group()


def test_two_processes_equal_one():
    with socket.socket() as s: s.bind(("127.0.0.1", 0)); port = s.getsockname()[1]
    ctx = mp.get_context("spawn"); queue = ctx.Queue()
    procs = [ctx.Process(target=work, args=(r, port, queue)) for r in range(N)]
    for p in procs: p.start()
    results = [queue.get(timeout=120) for _ in procs]
    for p in procs: p.join(60)
    assert [p.exitcode for p in procs] == [0] * N
    for off in results:
        assert off.pop("refused").startswith("Found 5 rows for 2 ranks")
        assert len(off) == 3 and max(off.values()) == pytest.approx(0, abs=1e-12)
