"""Our NPU kernels through torch_npu's own operator schemas, with the documented formulas standing in for the card.

The dispatcher checks every call against the schema that torch_npu registers: names, types, defaults. The formulas below are written from torch_npu's
documentation and know nothing of our code; they run on CPU tensors, so values and gradients of the NPU path can be compared with the torch path.
Not shown here: rounding, speed and memory of the hardware.
"""
import importlib.util
import os

import pytest
import torch

if not (importlib.util.find_spec("torch_npu") and "cann_stand_ins" in os.environ.get("LD_LIBRARY_PATH", "")):
    pytest.skip("needs torch_npu in an environment of its own: make test-npu-schema", allow_module_level=True)
import torch_npu  # noqa: E402, F401
from ascend_nb.npu_kernels import KERNELS  # noqa: E402

LIB = torch.library.Library("npu", "IMPL")
SCALE = {"rms_norm": 1.0}  # a test turns this to show that a wrong formula is noticed


def rms_norm(self, gamma, epsilon=1e-6):
    rstd = (self.float().pow(2).mean(-1, keepdim=True) + epsilon).rsqrt()
    return (self * rstd * gamma * SCALE["rms_norm"]).to(self.dtype), rstd


def rotary_mul(self, r1, r2, rotary_mode="half", rotate=None):
    a, b = self.chunk(2, -1)
    return self * r1 + torch.cat((-b, a), -1) * r2


def swiglu(self, dim=-1):
    a, b = self.chunk(2, dim)
    return a * torch.sigmoid(a) * b


def cross_entropy(self, target, weight=None, reduction="mean", ignore_index=-100, label_smoothing=0.0, lse_square_scale_for_zloss=0.0, return_zloss=False):
    logp = self.log_softmax(-1)
    loss = torch.nn.functional.nll_loss(logp, target, weight, reduction=reduction, ignore_index=ignore_index)
    return loss.reshape(-1), logp, loss.new_zeros(0), loss.new_zeros(0)


def hidden(sq, sk, mask, sparse_mode, pre, nxt):
    "True where a key is not attended to, by the documented modes; None: full attention."
    if mask is None: return None
    i, j = torch.arange(sq)[:, None], torch.arange(sk)
    if sparse_mode == 0: return mask
    assert tuple(mask.shape) == (2048, 2048) and bool(mask[0, 1]) and not bool(mask[1, 1]), "modes 2, 3, 4 want the fixed triangle"
    if sparse_mode == 2: return j > i
    if sparse_mode == 3: return j > i + sk - sq
    if sparse_mode == 4: return (j > i + sk - sq + nxt) | (j < i + sk - sq - pre)
    raise AssertionError(f"sparse_mode {sparse_mode}")


def one_attention(q, k, v, scale, drop):  # (B,N,S,D), k and v not repeated
    k, v = (t.repeat_interleave(q.shape[1] // t.shape[1], 1) for t in (k, v))
    s = scale * q @ k.transpose(2, 3)
    return (s if drop is None else s.masked_fill(drop, -torch.inf)).softmax(-1) @ v


def fusion_attention(query, key, value, head_num, input_layout, pse=None, padding_mask=None, atten_mask=None, scale=1.0, keep_prob=1.0,
                     pre_tockens=2147483647, next_tockens=2147483647, inner_precise=0, prefix=None, actual_seq_qlen=None, actual_seq_kvlen=None,
                     sparse_mode=0, *rest, **kw):
    assert keep_prob == 1.0 and pse is None
    if input_layout == "BNSD":
        assert query.shape[1] == head_num
        out = one_attention(query, key, value, scale, hidden(query.shape[2], key.shape[2], atten_mask, sparse_mode, pre_tockens, next_tockens))
    else:
        assert input_layout == "TND" and query.shape[1] == head_num and actual_seq_qlen[0] != 0, "cumulative ends, no leading zero"
        parts, a, c = [], 0, 0
        for b, d in zip(actual_seq_qlen, actual_seq_kvlen, strict=True):
            q, k, v = (t.transpose(0, 1)[None] for t in (query[a:b], key[c:d], value[c:d]))
            parts.append(one_attention(q, k, v, scale, hidden(b - a, d - c, atten_mask, sparse_mode, pre_tockens, next_tockens))[0].transpose(0, 1))
            a, c = b, d
        assert a == len(query), "the last end is the number of tokens"
        out = torch.cat(parts)
    e = out.new_zeros(0)
    return out, e, e, e, 0, 0, 0


def apply_adam_w(beta1_power, beta2_power, lr, weight_decay, beta1, beta2, epsilon, grad, max_grad_norm, amsgrad, maximize, *, out):
    var, m, v = out
    m.mul_(beta1).add_(grad, alpha=1 - beta1); v.mul_(beta2).addcmul_(grad, grad, value=1 - beta2)
    step = (m / (1 - beta1_power * beta1)) / ((v / (1 - beta2_power * beta2)).sqrt() + epsilon)
    var.sub_(lr * step + lr * weight_decay * var)
    return out


for name, fn, key in (("npu_rms_norm", rms_norm, "AutogradCPU"), ("npu_rotary_mul", rotary_mul, "AutogradCPU"), ("npu_swiglu", swiglu, "AutogradCPU"),
                      ("npu_cross_entropy_loss", cross_entropy, "AutogradCPU"), ("npu_fusion_attention", fusion_attention, "AutogradCPU"),
                      ("npu_apply_adam_w.out", apply_adam_w, "CPU")): LIB.impl(name, fn, key)


def both(op, *args, tensors):
    "(values, gradients) of the NPU path and of the torch path on the same inputs."
    res = []
    for column in ("npu", "torch"):
        xs = [t.clone().requires_grad_() for t in tensors]
        out = KERNELS[op][column](*xs, *args)
        out = torch.cat([o.flatten() for o in (out if isinstance(out, tuple) else (out,))])
        g = torch.autograd.grad((out * torch.linspace(-1, 1, out.numel())).sum(), xs)
        res.append([out.detach(), *g])
    return res


def off(op, *args, tensors): return max((a - b).abs().max().item() for a, b in zip(*both(op, *args, tensors=tensors), strict=True))


R = lambda *s: torch.randn(*s, generator=torch.Generator().manual_seed(sum(s)))


def test_rms_norm(): assert off("rms_norm", 1e-6, tensors=[R(2, 7, 16), R(16)]) < 1e-5


def test_rotary():
    a = torch.arange(6.)[:, None] * torch.tensor([1., .3, .1, .01])
    cos, sin = (t.repeat(1, 2)[None, None] for t in (a.cos(), a.sin()))
    assert off("rotary", cos, sin, tensors=[R(2, 4, 6, 8), R(2, 2, 6, 8)]) < 1e-5


def test_swiglu(): assert off("swiglu", tensors=[R(2, 5, 8), R(2, 5, 8) + 1]) < 1e-5


def test_cross_entropy():
    y = torch.tensor([1, -100, 3, 0, 9])
    assert off("cross_entropy", y, tensors=[R(5, 10)]) < 1e-5


@pytest.mark.parametrize("S,Sk,window,cu", [(12, 12, None, None), (12, 12, 5, None), (1, 12, None, None), (1, 12, 5, None), (4, 12, None, None), (4, 12, 5, None),
                                            (12, 12, None, [0, 5, 12, 20, 24]), (12, 12, 4, [0, 5, 24])],
                         ids=["causal", "window", "decode", "decode-window", "chunk", "chunk-window", "packed", "packed-window"])
def test_attention(S, Sk, window, cu):
    cu = None if cu is None else torch.tensor(cu, dtype=torch.int32)
    assert off("attention", True, window, cu, 8 ** -.5, tensors=[R(2, 4, S, 8), R(2, 2, Sk, 8), R(2, 2, Sk, 8) + 1]) < 1e-5


@pytest.mark.parametrize("cu", [None, [0, 5, 12]])
def test_attention_with_small_values(cu): # latent attention
    cu = None if cu is None else torch.tensor(cu, dtype=torch.int32)
    assert off("attention", True, None, cu, 8 ** -.5, tensors=[R(1, 4, 12, 8), R(1, 4, 12, 8), R(1, 4, 12, 6) + 1]) < 1e-5


def test_adamw():
    ps = [torch.nn.Parameter(R(6)) for _ in range(2)]
    opts = [KERNELS["adamw"][c]([dict(params=[p], weight_decay=.1)], lr=.01, betas=(.9, .95), eps=1e-8) for c, p in zip(("npu", "torch"), ps, strict=True)]
    for t in range(5):
        for p, o in zip(ps, opts, strict=True): p.grad = R(6) * (t + 1); o.step()
    assert (ps[0] - ps[1]).abs().max() < 1e-6


def test_a_wrong_formula_is_noticed(monkeypatch):
    monkeypatch.setitem(SCALE, "rms_norm", 1.01)
    assert off("rms_norm", 1e-6, tensors=[R(2, 7, 16), R(16)]) > 1e-3


def test_a_wrong_argument_is_refused():
    "The schema is torch_npu's: a misspelt keyword does not pass."
    with pytest.raises(RuntimeError, match="epsilon|keyword"): torch.ops.npu.npu_rms_norm(R(2, 4), R(4), eps=1e-6)
    with pytest.raises(RuntimeError, match="sparse|keyword"): torch.ops.npu.npu_fusion_attention(R(1, 1, 2, 4), R(1, 1, 2, 4), R(1, 1, 2, 4), 1, "BNSD", sparse=3)


@pytest.mark.parametrize("op", ["npu_rms_norm", "npu_rotary_mul", "npu_swiglu", "npu_fusion_attention", "npu_cross_entropy_loss"])
def test_torch_npu_has_a_gradient_for_what_we_train_with(op):
    assert torch._C._dispatch_has_kernel_for_dispatch_key(f"npu::{op}", "AutogradPrivateUse1")


def test_shapes_agree_with_torch_npu():
    "torch_npu's own shape functions, on meta tensors (the one of npu_fusion_attention wants a device)."
    m = lambda *s: torch.empty(*s, device="meta", dtype=torch.bfloat16)
    y, rstd = torch.ops.npu.npu_rms_norm(m(2, 5, 16), m(16), epsilon=1e-6)
    assert y.shape == (2, 5, 16) and y.dtype == torch.bfloat16 and rstd.dtype == torch.float32
    assert torch.ops.npu.npu_swiglu(m(2, 5, 16), dim=-1).shape == (2, 5, 8)
    assert torch.ops.npu.npu_rotary_mul(m(2, 4, 6, 8), m(1, 1, 6, 8), m(1, 1, 6, 8)).shape == (2, 4, 6, 8)
