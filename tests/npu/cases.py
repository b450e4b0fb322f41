"""Every way in which the package calls an NPU operator: one row a call, with the inputs that get gradients. Shared by the levels of the suite."""
import torch
import torch_npu  # noqa: F401  adds the device

from ascend_nb import npu_experts, npu_fused, npu_kernels

R = lambda *s: torch.randn(*s, generator=torch.Generator().manual_seed(sum(s) + len(s)))
ANGLE = torch.arange(6.0)[:, None] * torch.tensor([1.0, 0.3, 0.1, 0.01])
COS, SIN = (t.repeat(1, 2)[None, None] for t in (ANGLE.cos(), ANGLE.sin()))
CHOSEN = torch.tensor([[2, 0], [0, 3], [2, 3], [0, 2], [3, 2]])  # expert 1 gets nothing
CU = torch.tensor([0, 5, 12, 20, 24], dtype=torch.int32)


def att(**kw): return lambda q, k, v: npu_kernels.attention(q, k, v, **kw)
def experts(x, up, down, w):
    rows, place, ends = npu_experts.permute(x, CHOSEN.to(x.device), 4)
    return npu_experts.unpermute(npu_experts.grouped_linear(npu_experts.grouped_linear(rows, up, ends).tanh(), down, ends), place, w)
def listed(x, w): return npu_experts.grouped_linear(x, w, [3, 3, 7])
def move(f, *consts): return lambda *xs: f(*xs, *(c.to(xs[0].device) for c in consts))


QKV = lambda sq, sk, dv=8, b=2: [R(b, 4, sq, 8), R(b, 2, sk, 8), R(b, 2, sk, dv) + 1]
CASES = {  # name -> (function of the tensors, tensors)
    "rms_norm": (lambda x, w: npu_kernels.rms_norm(x, w, 1e-3), [R(2, 7, 16), R(16)]),
    "add_rms_norm": (lambda x, y, w: npu_fused.add_rms_norm(x, y, w, 1e-3), [R(2, 7, 16), R(7, 2, 16).transpose(0, 1).contiguous(), R(16)]),
    "rotary": (move(npu_kernels.rotary, COS, SIN), [R(2, 4, 6, 8), R(2, 2, 6, 8)]),
    "rotary neighbours": (lambda q, k: npu_kernels.rotary(q, k, COS.to(q.device), SIN.to(q.device), interleaved=True), [R(2, 4, 6, 8), R(2, 2, 6, 8)]),
    "swiglu": (npu_kernels.swiglu, [R(2, 5, 8), R(2, 5, 8) + 1]),
    "geglu tanh": (lambda g, u: npu_fused.geglu(g, u, "tanh"), [R(2, 5, 8), R(2, 5, 8) + 1]),
    "geglu exact": (lambda g, u: npu_fused.geglu(g, u, "none"), [R(2, 5, 8), R(2, 5, 8) + 1]),
    "attention": (att(), QKV(12, 12)), "attention, own scale": (att(scale=0.7), QKV(12, 12)), "attention, both ways": (att(causal=False), QKV(12, 12)),
    "attention, window": (att(window=5), QKV(12, 12)), "attention, chunk": (att(), QKV(4, 12)), "attention, chunk and window": (att(window=5), QKV(4, 12)),
    "attention, one token": (att(), QKV(1, 12)), "attention, one token and window": (att(window=5), QKV(1, 12)),
    "attention, packed": (att(cu_seqlens=CU), QKV(12, 12)), "attention, packed and window": (att(cu_seqlens=CU, window=4), QKV(12, 12)),
    "attention, small values": (att(), QKV(12, 12, 6)), "attention, packed, small values": (att(cu_seqlens=CU), QKV(12, 12, 6)),
    "experts": (experts, [R(5, 6), R(4, 8, 6), R(4, 6, 8), R(5, 2).abs()]),
    "grouped_linear, ends as a list": (listed, [R(7, 6), R(3, 4, 6)]),
    "cross_entropy": (move(npu_kernels.cross_entropy, torch.tensor([1, -100, 3, 0, 9])), [R(5, 10)]),
    "linear_cross_entropy": (lambda h, w: npu_kernels.linear_cross_entropy(h, w, torch.tensor([1, -100, 3, 0, 9]).to(h.device), rows=2)[0], [R(5, 6), R(10, 6)]),
}
INFER = {  # in 16 bits and without gradient, other operators
    "prompt": (att(), QKV(12, 12)), "prompt, both ways": (att(causal=False), QKV(12, 12)), "prompt, window": (att(window=5), QKV(12, 12)),
    "prompt behind a cache": (att(), QKV(4, 12)), "one token": (att(), QKV(1, 12)), "one token, window": (att(window=5), QKV(1, 12)),
    "prompt, small values": (att(), QKV(12, 12, 6)),
}


def flat(out): return torch.cat([o.flatten() for o in (out if isinstance(out, tuple) else (out,))])


def values(f, tensors, device, train=True, dtype=torch.float32):
    "Value and gradients on a device, as CPU tensors."
    xs = [t.to(device=device, dtype=dtype, copy=True).requires_grad_(train) for t in tensors]
    with torch.set_grad_enabled(train):
        out = flat(f(*xs))
        grads = torch.autograd.grad((out * torch.linspace(-1, 1, out.numel()).to(out)).sum(), xs, allow_unused=True) if train else []
    missing = [i for i, g in enumerate(grads) if g is None]
    assert not missing, f"no gradient reaches input {missing}"
    return [t.detach().cpu().float() for t in (out, *grads)]


def off(f, tensors, **kw):
    "Largest difference between the pretend card and the CPU, relative to the CPU's largest number."
    card, cpu = (values(f, tensors, d, **kw) for d in ("npu", "cpu"))
    return max(((a - b).abs().max() / b.abs().max().clamp(min=1e-3)).item() for a, b in zip(card, cpu, strict=True))
