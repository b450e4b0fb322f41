"""What a machine without a card cannot show: `make npu-smoke` on a machine with one (two for the last part). Prints a report to paste into an issue.

    python .ci/npu_smoke.py                every kernel against its reference on the device, a short training run, a run on two cards
    python .ci/npu_smoke.py --device cpu   the script itself, anywhere: the report says that it is no proof

No part of this has been run on an NPU by the people who wrote it; a report is welcome, whether it passes or not.
"""
import argparse
import os
import platform
import subprocess
import sys
import tempfile
import time
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import torch

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
from ascend_nb import npu_experts, npu_fused, npu_kernels  # noqa: E402
from ascend_nb.core import UserError, load_npu, make_deterministic, npu_count, pick_device, seed_all  # noqa: E402
from ascend_nb.npu_kernels import KERNELS  # noqa: E402

LIMIT = {torch.float32: 2e-3, torch.bfloat16: 5e-2}  # matrix units may round fp32 inputs; relative to the largest number
R = lambda *s: torch.randn(*s, generator=torch.Generator().manual_seed(sum(s)))


def cases():
    "(name, function of tensors, tensors, with gradient). Heads of 64 and lengths that are no multiple of a block."
    angle = torch.arange(130.0)[:, None] * torch.logspace(0, -3, 32)
    cs = [t.repeat(1, 2)[None, None] for t in (angle.cos(), angle.sin())]
    qkv = lambda sq, sk=130, dv=64: [R(2, 8, sq, 64), R(2, 2, sk, 64), R(2, 2, sk, dv)]
    cu, who = torch.tensor([0, 50, 130, 200, 260], dtype=torch.int32), torch.randint(0, 8, (96, 2), generator=torch.Generator().manual_seed(1))
    att = lambda **kw: lambda *t: npu_kernels.attention(*t, **kw)
    turn = lambda pairs: lambda q, k: npu_kernels.rotary(q, k, *(t.to(q.device) for t in cs), interleaved=pairs)

    def experts(x, up, down, w):
        rows, place, ends = npu_experts.permute(x, who.to(x.device), 8)
        return npu_experts.unpermute(npu_experts.grouped_linear(npu_experts.grouped_linear(rows, up, ends).tanh(), down, ends), place, w)

    yield "rms_norm", npu_kernels.rms_norm, [R(4, 130, 256), R(256)], True
    yield "add_rms_norm", npu_fused.add_rms_norm, [R(4, 130, 256), R(130, 4, 256).transpose(0, 1).contiguous(), R(256)], True
    for pairs in (False, True): yield f"rotary, {'neighbours' if pairs else 'halves'}", turn(pairs), [R(2, 8, 130, 64), R(2, 2, 130, 64)], True
    yield "swiglu", npu_kernels.swiglu, [R(4, 130, 256), R(4, 130, 256) + 1], True
    for how in ("tanh", "none"): yield f"geglu, {how}", lambda g, u, how=how: npu_fused.geglu(g, u, how), [R(4, 130, 256), R(4, 130, 256) + 1], True
    for grad in (True, False):
        for name, kw, t in (("causal", {}, qkv(130)), ("both ways", dict(causal=False), qkv(130)), ("window", dict(window=40), qkv(130)), ("chunk", {}, qkv(30)),
                            ("one token", {}, qkv(1)), ("packed", dict(cu_seqlens=cu), qkv(130)), ("small values", {}, qkv(130, 130, 48))):
            yield f"attention, {name}{'' if grad else ', inference'}", att(**kw), t, grad
    yield "experts", experts, [R(96, 64), R(8, 128, 64) / 8, R(8, 64, 128) / 11, R(96, 2).abs()], True
    labels = torch.randint(0, 1000, (64,), generator=torch.Generator().manual_seed(2)); labels[::5] = -100
    yield "cross_entropy", lambda z: npu_kernels.cross_entropy(z, labels.to(z.device)), [R(64, 1000)], True
    yield "linear_cross_entropy", lambda h, w: npu_kernels.linear_cross_entropy(h, w, labels.to(h.device))[0], [R(64, 128), R(1000, 128)], True


def measure(f, tensors, device, dtype, grad):
    xs = [t.to(device, dtype).requires_grad_(grad) for t in tensors]
    with torch.set_grad_enabled(grad):
        out = f(*xs); out = torch.cat([o.float().flatten() for o in (out if isinstance(out, tuple) else (out,))])
        g = torch.autograd.grad((out * torch.linspace(-1, 1, out.numel()).to(out.device)).sum(), xs) if grad else []
    return [t.detach().float().cpu() for t in (out, *g)]


def line(name, ok, text): print(f"{'ok  ' if ok else 'FAIL'} {name:<44} {text}", flush=True); return ok


def kernels(device):
    "Every kernel on the device against the CPU's row in fp32, on inputs rounded to the device's dtype."
    good = True
    for dtype in (torch.float32, torch.bfloat16):
        for name, f, tensors, grad in cases():
            rounded, what = [t.to(dtype).float() for t in tensors], f"{name}, {str(dtype)[6:]}"
            try:
                pairs = zip(measure(f, rounded, device, dtype, grad), measure(f, rounded, "cpu", torch.float32, grad), strict=True)
                off = max(((a - b).abs().max() / b.abs().max().clamp(min=1e-3)).item() for a, b in pairs)
                good &= line(what, off < LIMIT[dtype], f"largest difference {off:.1e}")
            except Exception as e: good = line(what, False, f"{type(e).__name__}: {str(e).splitlines()[0][:150]}") and good
    return good


def adamw(device):
    ps = [torch.nn.Parameter(R(1000).to(d)) for d in (device, "cpu")]
    opts = [npu_kernels.make_adamw([dict(params=[p], weight_decay=0.1)], lr=0.01) for p in ps]
    for t in range(5):
        for p, o in zip(ps, opts, strict=True): p.grad = (R(1000) * (t + 1)).to(p.device); o.step()
    off = (ps[0].detach().cpu() - ps[1].detach()).abs().max().item()
    return line("adamw, five steps", off < 1e-5, f"largest difference {off:.1e}")


def training(device, folder):
    "Twenty steps in deterministic mode, twice: the loss falls, and both runs have the same numbers."
    job = [sys.executable, "-c", "import sys; from ascend_nb.cli import main; sys.exit(main())", "train", "--data-path", ROOT / "data_samples/tales.jsonl", "--tokenizer-name-or-path", ROOT / "data_samples/tokenizer",
           "--hidden-size", 128, "--num-hidden-layers", 2, "--num-attention-heads", 4, "--num-key-value-heads", 2, "--seq-length", 128, "--train-iters", 20,
           "--lr", 3e-3, "--split", "100,0,0", "--device", device, "--deterministic", "true", "--data-cache-path", f"{folder}/cache", "--json"]
    losses, began = [], time.time()
    for i in range(2):
        p = subprocess.run([*map(str, job), "--save", f"{folder}/run{i}"], capture_output=True, text=True, cwd=ROOT, env=os.environ | {"PYTHONPATH": str(ROOT)}, timeout=900)
        if p.returncode: return line("training", False, (p.stderr.strip().splitlines() or ["no message"])[-1][:200])
        import json
        out = json.loads(p.stdout); losses.append((out["first_loss"], out["loss"]))
    ok = losses[0][1] < losses[0][0] and losses[0] == losses[1]
    return line("training, 20 steps twice", ok, f"loss {losses[0][0]:.4f} -> {losses[0][1]:.4f}, again {losses[1][1]:.4f}, {time.time() - began:.0f} s")


def rank(device):
    "One of two processes: products with their communication against the uncut product."
    import torch.distributed as dist
    make_deterministic()
    r = int(os.environ["RANK"]); where = torch.device(device, r) if device != "cpu" else torch.device("cpu")
    if device == "npu": load_npu(); torch.npu.set_device(where)
    dist.init_process_group("hccl" if device == "npu" else "gloo")
    dtype = torch.bfloat16 if device == "npu" else torch.float32
    x, w = R(64, 512), R(256, 512) / 512 ** 0.5
    rows, cols = lambda t: t.chunk(2)[r], lambda t: t.chunk(2, 1)[r]
    for f, cx, cw, cy in ((npu_fused.matmul_all_reduce, cols, cols, lambda t: t), (npu_fused.all_gather_matmul, rows, rows, cols), (npu_fused.matmul_reduce_scatter, cols, cols, rows)):
        a, b = (t.to(where, dtype).contiguous().requires_grad_() for t in (cx(x), cw(w)))
        y = f(a, b); y.float().sum().backward()
        off = (y.detach().float().cpu() - cy(x @ w.t())).abs().max().item() / 4
        ok = off < LIMIT[torch.bfloat16] and a.grad is not None and b.grad is not None
        if r == 0 or not ok: line(f"{f.__name__}, two processes, rank {r}", ok, f"largest difference {off:.1e}")
        if not ok: sys.exit(1)
    dist.barrier(); dist.destroy_process_group()


def two(device):
    cards = npu_count() if device == "npu" else 2
    if cards < 2: return line("two cards", True, f"left out: {cards} card is visible")
    p = subprocess.run([sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", __file__, "--device", device, "--rank"], capture_output=True, text=True, timeout=600)
    print(p.stdout, end="")
    return not p.returncode or line("two processes", False, (p.stderr.strip().splitlines() or [""])[-1][:200])


def head(device):
    "What the report is about."
    def of(name):
        try: return version(name)
        except PackageNotFoundError: return "absent"
    card = torch.npu.get_device_name(0) if device == "npu" else f"none: device {device}, so this proves the script and nothing about an NPU"
    commit = subprocess.run(["git", "rev-parse", "--short", "HEAD"], cwd=ROOT, capture_output=True, text=True).stdout.strip()
    cann = next((p.read_text().strip().replace("\n", " ")[:120] for p in Path(os.environ.get("ASCEND_HOME_PATH", "/nowhere")).glob("*/ascend_toolkit_install.info")), "not found")
    print(f"ascend_nb {of('ascend_nb')} ({commit}), torch {torch.__version__}, torch_npu {of('torch_npu')}, CANN {cann}\n{platform.machine()}, Python {platform.python_version()}, card: {card}")
    print("operators: " + ", ".join(op for op, row in KERNELS.items() if device in row))


def main():
    cli = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    cli.add_argument("--device", default="npu", choices=("npu", "cpu"), help="what to run on")
    cli.add_argument("--rank", action="store_true", help="this is one of the two processes")
    args = cli.parse_args()
    try: pick_device(args.device)
    except UserError as e: sys.exit(str(e))
    if args.rank: return rank(args.device)
    seed_all(1234); print("----- paste from here -----"); head(args.device)
    with tempfile.TemporaryDirectory() as folder:
        good = [kernels(args.device), adamw(args.device), training(args.device, folder), two(args.device)]
    print(f"----- to here: {'all passed' if all(good) else 'SOMETHING FAILED'} -----")
    sys.exit(not all(good))


if __name__ == "__main__": main()
