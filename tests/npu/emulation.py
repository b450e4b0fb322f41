"""Numbers on a pretend card. Below torch_npu's autograd every operator of torch runs on the CPU over the same bytes, and every `npu::` operator runs the
formula of its documentation; what is kept for backward, and which backward operator gets it with which arguments, is torch_npu's own doing."""
import re
from collections import Counter

import torch
import torch_npu  # noqa: F401  adds the device
from formulas import FORMULAS
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map

ON_CARD = {"empty", "empty_strided", "empty_like", "new_empty", "new_empty_strided", "resize_", "set_", "record_stream"}  # memory alone: the card has it


def on_host(t):
    "The bytes of a tensor on the card, as a CPU tensor."
    if not t.numel(): return torch.empty(t.shape, dtype=t.dtype)
    mem = t.untyped_storage()
    host = torch._C._construct_storage_from_data_pointer(mem.data_ptr(), torch.device("cpu"), mem.nbytes())
    return torch.empty(0, dtype=t.dtype).set_(host, t.storage_offset(), t.size(), t.stride())


def to_card(t):
    out = torch.empty_strided(t.size(), t.stride(), dtype=t.dtype, device="npu")
    if t.numel(): on_host(out).copy_(t)
    return out


def matmul_backward(g, a, b, mask):  # torch_npu's autograd asks for this one; the CPU has none
    da = (g @ b.transpose(-1, -2)).sum_to_size(a.shape) if mask[0] else None
    return da, (a.transpose(-1, -2) @ g).sum_to_size(b.shape) if mask[1] else None


def linear_backward(x, dy, w, mask):
    x2, d2 = x.flatten(0, -2), dy.flatten(0, -2)
    return dy @ w if mask[0] else None, d2.t() @ x2 if mask[1] else None, d2.sum(0) if mask[2] else None


def gather_backward(dy, size, dim, index, sparse_grad=False): return dy.new_zeros(size).scatter_add_(dim, index, dy)


OTHERS = {"npu::npu_gather_backward": gather_backward, "aten::matmul_backward": matmul_backward, "aten::linear_backward": linear_backward, "npu::get_npu_format": lambda x: 2}


REFUSED = re.compile("not in libopapi|507899|in aclop only support")  # what a call says that torch_npu's host code let through to a card without kernels; without libopapi it turns to the old ones, which know less
NO_HOST_CODE = {"npu_grouped_matmul"}  # asks for CANN's version before it looks at its arguments


class Emulation(TorchDispatchMode):
    """`with Emulation() as e:` tensors on device npu compute; `e.calls` counts operators. With `check`, torch_npu's own host code sees every `npu::` call first:
    it must come as far as the missing kernel; `e.passed` counts these, anything else it says is raised."""
    def __init__(self, check=False): super().__init__(); self.calls, self.passed, self.check = Counter(), Counter(), check

    def host(self, op, args, kwargs):
        "Let torch_npu look at a call."
        try: op(*args, **kwargs)
        except RuntimeError as e:
            if not REFUSED.search(str(e)): raise
            self.passed[op._schema.name.split("::")[1]] += 1
        else: raise AssertionError(f"{op} gave a result on a card that has no kernels")

    def __torch_dispatch__(self, op, types, args=(), kwargs=None):
        kwargs, (space, name) = dict(kwargs or {}), op._schema.name.split("::")
        self.calls[name] += 1
        card = [x for x in tree_leaves((args, kwargs)) if isinstance(x, torch.Tensor) and x.device.type == "npu"]
        asked = torch.device(kwargs["device"]).type if kwargs.get("device") is not None else None
        if op.is_view or space == "aten" and name in ON_CARD or not card and asked != "npu": return op(*args, **kwargs)
        if self.check and space == "npu" and name not in NO_HOST_CODE and op._schema.name not in OTHERS: self.host(op, args, kwargs)
        came, keep = {}, []

        def down(x):
            if isinstance(x, torch.device): return torch.device("cpu")
            if not isinstance(x, torch.Tensor) or x.device.type != "npu": return x
            keep.append(on_host(x)); came[id(keep[-1])] = x
            return keep[-1]

        a, kw = tree_map(down, (args, kwargs))
        other = OTHERS.get(op._schema.name)
        out = other(*a, **kw) if other else FORMULAS[name](*a, **kw) if space == "npu" else op(*a, **kw)
        if asked == "cpu": return out

        def up(x):
            if not isinstance(x, torch.Tensor): return x
            return came[id(x)] if id(x) in came else to_card(x)

        return tree_map(up, out)
