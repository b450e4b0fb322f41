"""Level one: whole steps on fake tensors of device npu: torch_npu's schemas, shape functions and autograd, no numbers and no memory. A call that does not fit a
schema, a type or a shape stops here, forward or backward; so does a parameter that no gradient reaches."""
import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from worlds import ALWAYS, CU, WORLDS, config, forget

from ascend_nb.model import Decoder, KVCache
from ascend_nb.npu_kernels import KERNELS, cross_entropy, make_adamw


class Ends(list):
    "Where documents end, as plain numbers: a Batch keeps them on the host."
    def tolist(self): return list(self)


class Names(TorchDispatchMode):
    def __init__(self): super().__init__(); self.seen = set()
    def __torch_dispatch__(self, op, types, args=(), kwargs=None):
        self.seen.add(op._schema.name.split("::")[1])
        return op(*args, **(kwargs or {}))


def built(cfg, dtype):
    "A model made in its dtype: modules of fake tensors cannot be converted."
    torch.set_default_dtype(dtype)
    try:
        with torch.device("npu"): return Decoder(cfg)
    finally: torch.set_default_dtype(torch.float32)


def step(name, dtype=torch.bfloat16, steps=2):
    "Forward, loss, backward, clipping and AdamW; the names of all operators."
    shape, packed, _ = WORLDS[name]
    forget()
    with FakeTensorMode(), Names() as names:
        model = built(config(shape), dtype)
        opt = make_adamw([dict(params=list(model.parameters()), weight_decay=0.1)], lr=1e-3)
        ids = torch.zeros(2, 12, dtype=torch.long, device="npu")
        for _ in range(steps):
            logits = model(ids, cu_seqlens=Ends(CU.tolist()) if packed else None)
            loss = cross_entropy(logits.flatten(0, 1), ids.flatten())
            assert logits.shape == (2, 12, 64) and logits.dtype == dtype and loss.device.type == "npu"
            loss.backward()
            lost = [n for n, p in model.named_parameters() if p.grad is None or p.grad.shape != p.shape or p.grad.dtype != p.dtype]
            assert not lost, f"no gradient reaches {lost}"
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0); opt.step(); opt.zero_grad()
    forget()
    return names.seen


@pytest.mark.parametrize("name,dtype", [*((n, torch.bfloat16) for n in WORLDS), ("dense", torch.float32), ("moe", torch.float32)], ids=lambda x: str(x))
def test_training_step(name, dtype):
    seen = step(name, dtype)
    assert not (ALWAYS | WORLDS[name][2] | {"npu_cross_entropy_loss", "npu_cross_entropy_loss_backward"}) - seen


@pytest.mark.parametrize("name", ["dense", "dense, window", "moe", "latent attention"])
def test_prompt_and_decode_step(name):
    cfg = config(WORLDS[name][0]); forget()
    with FakeTensorMode(), Names() as names, torch.no_grad():
        model, cache = built(cfg, torch.bfloat16), KVCache(cfg, 2, 16, dtype=torch.bfloat16, device="npu")
        assert model(torch.zeros(2, 6, dtype=torch.long, device="npu"), cache=cache).shape == (2, 6, 64)
        assert model(torch.zeros(2, 1, dtype=torch.long, device="npu"), cache=cache).shape == (2, 1, 64)
    assert "npu_prompt_flash_attention" in names.seen and ("npu_incre_flash_attention" in names.seen or name == "latent attention")
    forget()


def raw(x, w, ends): return torch.ops.npu.npu_grouped_matmul([x], [w.transpose(1, 2)], group_list=ends, split_item=2, group_type=0)[0]


BROKEN = {  # what is broken -> (row, its NPU way, what is said)
    "renamed argument": ("rms_norm", lambda x, w, eps: torch.ops.npu.npu_rms_norm(x, w, eps=eps)[0], (RuntimeError, "eps")),
    "wrong type": ("swiglu", lambda g, u: torch.ops.npu.npu_swiglu(torch.cat((g, u), -1), dim="last"), (RuntimeError, "int")),
    "a result too many": ("swiglu", lambda g, u: torch.ops.npu.npu_swiglu(torch.cat((g, u), -1))[0], ((RuntimeError, IndexError), "")),
    "wrong axis": ("swiglu", lambda g, u: torch.ops.npu.npu_swiglu(torch.cat((g, u), -1), dim=0), (RuntimeError, "")),
    "forgotten backward": ("grouped_linear", raw, (AssertionError, "no gradient reaches")),
}


@pytest.mark.parametrize("what", BROKEN)
def test_broken_calls_are_noticed(what, monkeypatch):
    op, way, (error, text) = BROKEN[what]
    monkeypatch.setitem(KERNELS[op], "npu", way)
    with pytest.raises(error, match=text): step("moe")


def test_products_with_communication():
    "Shapes and gradients of the three pairs; two ranks that are not there."
    from ascend_nb import npu_fused
    calls = dict(matmul_all_reduce=((8, 6), (10, 6), (8, 10)), all_gather_matmul=((4, 6), (10, 6), (8, 10)), matmul_reduce_scatter=((8, 6), (10, 6), (4, 10)))
    with pytest.MonkeyPatch.context() as m, FakeTensorMode(), Names() as names, torch.device("npu"):
        m.setattr(npu_fused, "_size", lambda group: 2); m.setattr(npu_fused, "_hcom", lambda group: "group")
        for name, (x, w, y) in calls.items():
            x, w = (torch.empty(s, dtype=torch.bfloat16, requires_grad=True) for s in (x, w))
            out = getattr(npu_fused, name)(x, w)
            assert out.shape == y
            out.sum().backward()
            assert x.grad.shape == x.shape and w.grad.shape == w.shape
    assert names.seen >= {"npu_mm_all_reduce_base", "npu_all_gather_base_mm", "npu_mm_reduce_scatter_base"}
