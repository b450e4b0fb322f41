"""Levels two and three, operator by operator: torch_npu's host code lets every call pass, and its value and gradients, under torch_npu's own autograd with the
documented formulas below it, are those of the CPU's row. Not shown here: rounding, speed and memory of the hardware."""
import pytest
import torch
from cases import CASES, INFER, off
from emulation import Emulation
from formulas import DOUBT, FORMULAS

from ascend_nb import npu_kernels
from ascend_nb.npu_experts import grouped_linear
from ascend_nb.npu_kernels import KERNELS

TOL, TOL16 = 1e-5, 2e-2
ALL = [*((n, *c, {}) for n, c in CASES.items()), *((n, *c, dict(train=False, dtype=torch.bfloat16)) for n, c in INFER.items())]


@pytest.fixture(autouse=True)
def no_stale_mask():
    npu_kernels._mask_2048.cache_clear()
    yield
    npu_kernels._mask_2048.cache_clear()


def differs(name): n, f, xs, kw = next(c for c in ALL if c[0] == name); return off(f, xs, **kw)


@pytest.mark.parametrize("name,f,tensors,kw", ALL, ids=[c[0] for c in ALL])
def test_call(name, f, tensors, kw):
    with Emulation(check=True) as e: assert off(f, tensors, **kw) < (TOL16 if kw else TOL)
    if name != "linear_cross_entropy" and "grouped" not in name: assert e.passed, "no npu operator was called"


def test_adamw():
    ps = [torch.nn.Parameter(torch.linspace(-1, 1, 6)), None]
    with Emulation(check=True) as e:
        ps[1] = torch.nn.Parameter(ps[0].detach().to("npu"))
        opts = [npu_kernels.make_adamw([dict(params=[p], weight_decay=0.1)], lr=0.01, betas=(0.9, 0.95)) for p in ps]
        for t in range(5):
            for p, o in zip(ps, opts, strict=True): p.grad = (torch.linspace(1, 2, 6) * (t - 2)).to(p.device); o.step()
        assert (ps[0] - ps[1].cpu()).abs().max() < 1e-6
    assert e.passed["npu_apply_adam_w"] == 5


def used():
    "operator -> the cases that call it."
    out = {}
    for name, f, xs, kw in ALL:
        with Emulation() as e: off(f, xs, **kw)
        for op in e.calls.keys() & FORMULAS.keys(): out.setdefault(op, []).append(name)
    return out


def test_each_formula_that_is_one_per_cent_off_is_noticed():
    by = used()
    assert FORMULAS.keys() - by.keys() <= {"npu_apply_adam_w", "npu_moe_token_unpermute"}, "formulas that no case calls"
    blind = []
    for op, names in by.items():
        DOUBT.add(op)
        try:
            with Emulation(): worst = max(differs(n) for n in names)
        finally: DOUBT.discard(op)
        if worst < 2e-3: blind.append(op)
    assert not blind


def test_a_renamed_argument_is_noticed(monkeypatch):
    monkeypatch.setitem(KERNELS["rms_norm"], "npu", lambda x, w, eps: torch.ops.npu.npu_rms_norm(x, w, eps=eps)[0])
    with Emulation(), pytest.raises(RuntimeError, match="eps"): differs("rms_norm")


def test_a_forgotten_argument_is_noticed(monkeypatch):
    "epsilon has a default, so only numbers show it."
    monkeypatch.setitem(KERNELS["rms_norm"], "npu", lambda x, w, eps: torch.ops.npu.npu_rms_norm(x, w)[0])
    with Emulation(): assert differs("rms_norm") > 10 * TOL


def test_an_inverted_mask_is_noticed(monkeypatch):
    right = npu_kernels._mask_2048
    monkeypatch.setattr(npu_kernels, "_mask_2048", lambda device: ~right(device))
    monkeypatch.setattr(npu_kernels._mask_2048, "cache_clear", lambda: None, raising=False)
    with Emulation(), pytest.raises(AssertionError, match="triangle above the diagonal"): differs("attention")


def test_a_missing_scale_is_noticed(monkeypatch):
    row = KERNELS["attention"]["npu"]
    monkeypatch.setitem(KERNELS["attention"], "npu", lambda q, k, v, causal, window, cu, scale: row(q, k, v, causal, window, cu, 1.0))
    with Emulation(): assert differs("attention") > 10 * TOL and differs("prompt") > 2 * TOL16


def test_a_wrong_mode_is_noticed(monkeypatch):
    "2 counts from the top left: the same for whole sequences, another thing behind a cache."
    view = npu_kernels._view
    monkeypatch.setattr(npu_kernels, "_view", lambda *a: {k: 2 if k == "sparse_mode" else x for k, x in view(*a).items()})
    with Emulation(): assert differs("attention, chunk") > 10 * TOL


def test_a_leading_zero_is_noticed(monkeypatch):
    ends = npu_kernels._ends
    monkeypatch.setattr(npu_kernels, "_ends", lambda *a: [0, *ends(*a)])
    f, xs = CASES["attention, packed"]
    from cases import values
    with Emulation(), pytest.raises(AssertionError, match="without a leading zero"): values(f, xs, "npu")


def test_a_forgotten_backward_is_noticed(monkeypatch):
    raw = lambda x, w, ends: torch.ops.npu.npu_grouped_matmul([x], [w.transpose(1, 2)], group_list=torch.as_tensor(ends, device=x.device), split_item=2, group_type=0)[0]
    monkeypatch.setitem(KERNELS["grouped_linear"], "npu", raw)
    with Emulation(), pytest.raises((AssertionError, RuntimeError), match="no gradient|does not require grad"): differs("grouped_linear, ends as a list")


def npu(*s): return torch.zeros(*s, dtype=torch.bfloat16).to("npu")


@pytest.mark.parametrize("why,call", {
    "layout": lambda fa: fa(npu(1, 2, 4, 8), npu(1, 2, 4, 8), npu(1, 2, 4, 8), 2, "XYZ"),
    "keep_prob": lambda fa: fa(npu(1, 2, 4, 8), npu(1, 2, 4, 8), npu(1, 2, 4, 8), 2, "BNSD", keep_prob=2.0),
    "dim": lambda fa: fa(npu(4, 8), npu(4, 8), npu(4, 8), 2, "BSH"),
}.items(), ids=lambda x: x if isinstance(x, str) else "")
def test_host_code_does_check(why, call):
    "The second level would notice: what it lets pass is not just anything."
    with Emulation(check=True), pytest.raises(RuntimeError) as e: call(torch.ops.npu.npu_fusion_attention)
    assert "507899" not in str(e.value) and "libopapi" not in str(e.value)


def test_every_row_of_the_table_is_called_here():
    with_npu = {op for op, row in KERNELS.items() if "npu" in row} - {"mm_all_reduce", "gather_mm", "mm_scatter", "adamw"}  # tests of their own
    text = open(__file__).read() + open(__file__.replace("test_calls", "cases")).read()
    assert not [op for op in with_npu if op not in text] and grouped_linear
