"""What torch_npu's operators compute, from its documentation and in plain torch: forward and backward, written without looking at our own code.

`FORMULAS[name]` takes and gives what the operator's schema says, on CPU tensors. `DOUBT` names one formula whose first result is multiplied by 1.01:
a suite that still passes then does not look at that operator.
"""
from concurrent.futures import ThreadPoolExecutor

import torch

FORMULAS, DOUBT = {}, set()
INF = float("-inf")


def formula(*names):
    "Enter a formula under the names of its operators; a doubted one is off by one per cent."
    def enter(f):
        def doubted(name, *a, **kw):
            out = f(*a, **kw)
            if name not in DOUBT: return out
            if name == "npu_apply_adam_w": return [t.mul_(1.01) if i == 0 else t for i, t in enumerate(out)]
            head = [t * 1.01 for t in out[0]] if isinstance(out, tuple) and isinstance(out[0], list) else None
            if head: return head, *out[1:]
            if isinstance(out, list): return [t * 1.01 for t in out]
            return (out[0] * 1.01, *out[1:]) if isinstance(out, tuple) else out * 1.01
        for n in names: FORMULAS[n] = lambda *a, _n=n, **kw: doubted(_n, *a, **kw)
        return f
    return enter


ASIDE = ThreadPoolExecutor(1)  # a thread of its own: below the dispatcher's autograd layer, where formulas are called, autograd is switched off


def grad(f, inputs, dy):
    "Gradients of f at the inputs, by torch's own autograd on plain formulas; fp32 inside."
    def work():
        xs = [t.detach().float().requires_grad_() for t in inputs]
        return [g.to(t.dtype) for g, t in zip(torch.autograd.grad(f(*xs), xs, dy.float()), inputs, strict=True)]
    return ASIDE.submit(work).result()


# ---- norms, rotation, gates
def norm(x, gamma, eps): return x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + eps) * gamma
@formula("npu_rms_norm")
def _(x, gamma, epsilon=1e-6):
    wide = x.float()
    return norm(wide, gamma.float(), epsilon).to(x.dtype), torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + epsilon)
@formula("npu_add_rms_norm")
def _(x1, x2, gamma, epsilon=1e-6):
    x = x1 + x2
    return norm(x.float(), gamma.float(), epsilon).to(x.dtype), torch.rsqrt(x.float().pow(2).mean(-1, keepdim=True) + epsilon), x
@formula("npu_rms_norm_backward")
def _(dy, x, gamma, rstd):
    h = x.float() * rstd; d = dy.float() * gamma.float()
    return (rstd * (d - h * (d * h).mean(-1, keepdim=True))).to(x.dtype), (dy.float() * h).flatten(0, -2).sum(0)  # the second in fp32


def swap(x, mode):
    if mode == "half": a, b = x.chunk(2, -1); return torch.cat((-b, a), -1)
    assert mode == "interleave", mode
    return torch.stack((-x[..., 1::2], x[..., 0::2]), -1).flatten(-2)
@formula("npu_rotary_mul")
def _(x, r1, r2, rotary_mode="half", rotate=None): return x * r1 + swap(x, rotary_mode) * r2
@formula("npu_rotary_mul_backward")
def _(dy, x, r1, r2, rotary_mode="half"): return tuple(grad(lambda x, a, b: x * a + swap(x, rotary_mode) * b, (x, r1, r2), dy))


def swish_gate(x, dim=-1): a, b = x.chunk(2, dim); return a * torch.sigmoid(a) * b
@formula("npu_swiglu")
def _(x, dim=-1): return swish_gate(x.float(), dim).to(x.dtype)
@formula("npu_swiglu_backward")
def _(dy, x, dim=-1): return grad(lambda x: swish_gate(x, dim), (x,), dy)[0]


def gelu(x, approximate): return torch.nn.functional.gelu(x, approximate="tanh" if approximate else "none")
def gelu_gate(x, dim, approximate, left):
    a, b = x.chunk(2, dim)
    if left: a, b = b, a  # activate_left: the first half is the gate; else the second one
    return a * gelu(b, approximate)
@formula("npu_geglu")
def _(x, dim=-1, approximate=1, activate_left=False):
    a, b = x.chunk(2, dim)
    return gelu_gate(x, dim, approximate, activate_left), gelu(a if activate_left else b, approximate)
@formula("npu_geglu_grad")
def _(dy, x, gelu_out, dim=-1, approximate=1, activate_left=False): return grad(lambda x: gelu_gate(x, dim, approximate, activate_left), (x,), dy)[0]


# ---- attention
def hidden(sq, sk, mask, mode, pre, nxt):
    "True where a key is not attended to, by the documented modes; None: all is seen."
    if mask is None: return None  # whatever the mode says
    i, j = torch.arange(sq)[:, None], torch.arange(sk)
    if mode in (0, 1): return mask.bool()
    assert tuple(mask.shape) == (2048, 2048) and bool(mask[0, 1]) and not bool(mask[1, 0]) and not bool(mask[1, 1]), f"mode {mode} wants the triangle above the diagonal"
    if mode == 2: return j > i
    if mode == 3: return j > i + sk - sq
    if mode == 4: return (j > i + sk - sq + nxt) | (j < i + sk - sq - pre)
    raise AssertionError(f"sparse_mode {mode}")
def soft(q, k, v, scale, gone):  # (B, N, S, D); k and v have their own number of heads
    k, v = (t.repeat_interleave(q.shape[1] // t.shape[1], 1) for t in (k, v))
    s = scale * q @ k.transpose(-1, -2)
    return (s if gone is None else s.masked_fill(gone, INF)).softmax(-1) @ v
def documents(q, k, ends_q, ends_k):
    assert ends_q[0] and ends_k[0] and ends_q[-1] == len(q) and ends_k[-1] == len(k), "cumulative ends without a leading zero"
    yield from zip(zip([0, *ends_q], ends_q, strict=False), zip([0, *ends_k], ends_k, strict=False), strict=True)
def fused(q, k, v, heads, layout, scale, mask, mode, pre, nxt, ends_q, ends_k):
    if layout == "BNSD":
        assert q.shape[1] == heads
        return soft(q, k, v, scale, hidden(q.shape[2], k.shape[2], mask, mode, pre, nxt))
    assert layout == "TND" and q.shape[1] == heads
    rows = lambda t, a, b: t[a:b].transpose(0, 1)[None]
    return torch.cat([soft(rows(q, a, b), rows(k, c, d), rows(v, c, d), scale, hidden(b - a, d - c, mask, mode, pre, nxt))[0].transpose(0, 1)
                      for (a, b), (c, d) in documents(q, k, ends_q, ends_k)])
@formula("npu_fusion_attention")
def _(q, k, v, head_num, input_layout, pse=None, padding_mask=None, atten_mask=None, scale=1.0, keep_prob=1.0, pre_tockens=2**31 - 1, next_tockens=2**31 - 1,
      inner_precise=0, prefix=None, actual_seq_qlen=None, actual_seq_kvlen=None, sparse_mode=0, *rest, **kw):
    assert keep_prob == 1 and pse is None
    out = fused(q.float(), k.float(), v.float(), head_num, input_layout, scale, atten_mask, sparse_mode, pre_tockens, next_tockens, actual_seq_qlen, actual_seq_kvlen)
    stat = torch.zeros(*((len(q), head_num) if input_layout == "TND" else q.shape[:3]), 8)  # row maxima and sums: our gradient formula makes them again
    return out.to(q.dtype).contiguous(), stat, stat.clone(), q.new_empty(0), 0, 0, 0
@formula("npu_fusion_attention_grad")
def _(q, k, v, dy, head_num, input_layout, *, atten_mask=None, scale_value=1.0, pre_tockens=2**31 - 1, next_tockens=2**31 - 1, actual_seq_qlen=None,
      actual_seq_kvlen=None, sparse_mode=0, **kw):
    f = lambda q, k, v: fused(q, k, v, head_num, input_layout, scale_value, atten_mask, sparse_mode, pre_tockens, next_tockens, actual_seq_qlen, actual_seq_kvlen)
    return (*grad(f, (q, k, v), dy), q.new_empty(0), q.new_empty(0))
@formula("npu_prompt_flash_attention")
def _(q, k, v, *, atten_mask=None, num_heads=1, scale_value=1.0, pre_tokens=2**31 - 1, next_tokens=0, input_layout="BSH", num_key_value_heads=0, sparse_mode=0, **kw):
    assert num_key_value_heads in (0, k.shape[1]) and q.dtype in (torch.float16, torch.bfloat16), "half precision only"
    return fused(q.float(), k.float(), v.float(), num_heads, input_layout, scale_value, atten_mask, sparse_mode, pre_tokens, next_tokens, None, None).to(q.dtype)
@formula("npu_incre_flash_attention")
def _(q, k, v, *, atten_mask=None, num_heads=1, scale_value=1.0, input_layout="BSH", num_key_value_heads=0, **kw):
    assert q.shape[2] == 1 and num_key_value_heads in (0, k.shape[1]) and q.dtype in (torch.float16, torch.bfloat16)
    return fused(q.float(), k.float(), v.float(), num_heads, input_layout, scale_value, None, 0, 0, 0, None, None).to(q.dtype)


# ---- experts
@formula("npu_grouped_matmul")
def _(x, weight, *, group_list=None, split_item=0, group_type=None, group_list_type=0, **kw):
    (x,), (w,) = x, weight
    counts = group_list if group_list_type == 1 else torch.diff(group_list, prepend=group_list.new_zeros(1))
    ends = counts.cumsum(0).tolist(); spans = list(zip([0, *ends], ends, strict=False))
    assert split_item in (2, 3), "one result"
    if group_type == 0: return [torch.cat([x[a:b] @ w[e] for e, (a, b) in enumerate(spans)])]
    assert group_type == 2 and x.dim() == w.dim() == 2, "rows of both are summed over"
    return [torch.stack([x[:, a:b] @ w[a:b] for a, b in spans])]  # x comes transposed
@formula("npu_moe_token_permute")
def _(tokens, indices, num_out_tokens=None, padded_mode=False):
    order = indices.flatten().argsort(stable=True); k = 1 if indices.dim() == 1 else indices.shape[1]
    return tokens[order // k], order.argsort().int()
@formula("npu_moe_token_permute_grad_v2")
def _(grad_permuted, sorted_indices, tokens, dtype, k, padded_mode=False): return grad_permuted[sorted_indices.long()].view(tokens, k, -1).sum(1).to(dtype)
def unpermute(rows, back, probs):
    y = rows[back.long()]
    return y if probs is None else (y.view(*probs.shape, -1) * probs[..., None]).sum(1)
@formula("npu_moe_token_unpermute")  # without gradient
def _(rows, back, probs=None, padded_mode=False, restore_shape=None): return unpermute(rows, back, probs)
@formula("_npu_moe_token_unpermute")  # with
def _(rows, back, probs=None, padded_mode=False, restore_shape=None): return unpermute(rows, back, probs), rows.clone()
@formula("npu_moe_token_unpermute_grad_v2")
def _(dy, back, n, dtype, probs=None, padded_mode=False, restore_shape=None, permuted_tokens=None):
    return tuple(grad(lambda r, p: unpermute(r, back, p), (permuted_tokens, probs), dy))


# ---- loss and optimizer
@formula("npu_cross_entropy_loss")
def _(x, target, weight=None, reduction="mean", ignore_index=-100, label_smoothing=0.0, lse_square_scale_for_zloss=0.0, return_zloss=False):
    logp = x.log_softmax(-1); loss = torch.nn.functional.nll_loss(logp, target, weight, reduction=reduction, ignore_index=ignore_index)
    return loss.reshape(-1), logp, x.new_zeros(0), x.new_zeros(0)
@formula("npu_cross_entropy_loss_backward")
def _(dy, logp, target, weight=None, grad_zloss=None, lse_for_zloss=None, reduction="mean", ignore_index=-100, label_smoothing=0.0, lse_square_scale_for_zloss=0.0):
    f = lambda z: torch.nn.functional.cross_entropy(z, target, weight, reduction=reduction, ignore_index=ignore_index).reshape(-1)
    return grad(f, (logp,), dy)[0]  # the gradient is the same at x and at log softmax(x)
@formula("npu_apply_adam_w")
def _(beta1_power, beta2_power, lr, weight_decay, beta1, beta2, epsilon, g, max_grad_norm, amsgrad, maximize, *, out):
    var, m, v = out
    m.mul_(beta1).add_(g, alpha=1 - beta1); v.mul_(beta2).addcmul_(g, g, value=1 - beta2)
    step = (m / (1 - beta1_power * beta1)) / ((v / (1 - beta2_power * beta2)).sqrt() + epsilon)
    var.sub_(lr * step + lr * weight_decay * var)
    return out
