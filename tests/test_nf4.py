"""Matrices in four bits: bitsandbytes' codes, scales and numbers to the bit; adapters that learn beside them."""
import json
import math
import re

import pytest
import torch
from test_lora_training import asks, home, rows  # noqa: F401
from torch.nn import functional as F

from ascend_nb import training
from ascend_nb.adapter_files import load_adapter
from ascend_nb.adapter_runs import base_model
from ascend_nb.adapters import LoraSpec, add_adapter, pairs
from ascend_nb.config import ModelConfig
from ascend_nb.core import UserError
from ascend_nb.hf_format import load_model
from ascend_nb.model import Decoder
from ascend_nb.nf4 import LEVELS, Nf4, levels_of_8_bits, pack, packed_size, unpack

BNB = "the peer: pip install bitsandbytes"


def weights(shape, seed=0):
    "Normal numbers, with outliers, a block of zeros and numbers that lie on levels and between two of them."
    g = torch.Generator().manual_seed(seed)
    w = torch.randn(shape, generator=g) * .03
    flat = w.view(-1)
    flat[5], flat[64:128] = 1.5, 0.
    if len(flat) > 512:
        flat[256:272] = torch.tensor(LEVELS)
        flat[320:335] = (torch.tensor(LEVELS)[1:] + torch.tensor(LEVELS)[:-1]) / 2
        flat[335] = 1.
    return w


@pytest.mark.parametrize("shape", [(96, 64), (37, 50), (7, 9), (256, 520)], ids=str)
@pytest.mark.parametrize("double", [False, True])
def test_bits_are_those_of_bitsandbytes(shape, double):
    bnb = pytest.importorskip("bitsandbytes.functional", reason=BNB)
    w = weights(shape)
    codes, state = bnb.quantize_4bit(w, blocksize=64, quant_type="nf4", compress_statistics=double)
    ours = Nf4(w, double)
    assert torch.equal(ours.held["codes"], codes.flatten())
    assert torch.equal(torch.tensor(LEVELS), state.code)
    if double:
        assert torch.equal(levels_of_8_bits(), state.state2.code) and torch.equal(ours.held["outer"], state.state2.absmax) and torch.equal(ours.held["offset"], state.offset)
        apart = (ours.held["scales"].int() - state.absmax.int()).abs()  # their CPU kernel rounds through a coarser table: now and then a neighbour, never more
        assert len(apart) == 1 or apart.max() <= 1 and (apart > 0).sum() <= max(2, .005 * len(apart))  # one scale alone is its own mean: nothing is left to keep
        ours.held["scales"] = state.absmax
    assert torch.equal(ours.held["scales"], state.absmax)
    assert torch.equal(ours.dense(), bnb.dequantize_4bit(codes, state).view(shape)), "what is read back is theirs to the bit"


def test_levels_are_quantiles_of_a_normal_distribution():
    "How the paper makes them: halves of 8 and 9 quantiles that share zero, from the offset 0.9677083 on, over the largest."
    d, end = torch.distributions.Normal(0., 1.), .9677083
    q = lambda n: d.icdf(torch.linspace(end, .5, n, dtype=torch.float64)[:-1])
    levels = torch.cat((-q(8), torch.zeros(1, dtype=torch.float64), q(9))).sort().values
    assert (levels / levels.max() - torch.tensor(LEVELS, dtype=torch.float64)).abs().max() < 2e-6


def test_a_product_and_its_gradient():
    w, g = weights((96, 64)), torch.Generator().manual_seed(1)
    x, bias, nf4 = torch.randn(3, 5, 64, generator=g, requires_grad=True), torch.randn(96, generator=g), Nf4(w)
    y = nf4.product(x, bias)
    want = x.detach().clone().requires_grad_()
    z = F.linear(want, nf4.dense(), bias)
    for t in (y, z): t.square().sum().backward()
    assert torch.equal(y, z) and torch.allclose(x.grad, want.grad, rtol=1e-5)
    assert 4.12 < 8 * nf4.nbytes / w.numel() < 4.2 and 8 * Nf4(w, False).nbytes / w.numel() == 4.5


def test_a_packed_model_computes_as_its_dense_twin():
    "Adapters of all kinds beside it; another number format; back to ordinary matrices."
    cfg = ModelConfig(vocab_size=80, hidden_size=64, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2, attention_bias=True)
    ids, model, twin = torch.arange(30).view(2, 15), Decoder(cfg).init_weights(), Decoder(cfg).init_weights()
    pack(model)
    with torch.no_grad():
        for n, m in model.named_modules():
            if hasattr(m, "nf4"): twin.get_submodule(n).weight.copy_(m.nf4.dense())
    for i, dora in enumerate((False, True)):
        for m in (model, twin):
            add_adapter(m, LoraSpec(r=4, dora=dora), f"a{i}")
            for n, p in m.named_parameters():
                if n.endswith("B") and p.requires_grad: torch.nn.init.constant_(p, .03)
        a, b = model(ids), twin(ids)
        for t in (a, b): t.square().mean().backward()
        assert torch.allclose(a, b, atol=1e-6)
        for p, q in zip(pairs(model, f"a{i}").values(), pairs(twin, f"a{i}").values(), strict=True): assert torch.allclose(p.A.grad, q.A.grad, atol=1e-6) and torch.allclose(p.B.grad, q.B.grad, atol=1e-6)
    numbers, size = packed_size([model])
    assert numbers == sum(math.prod(m.nf4.shape) for m in model.modules() if hasattr(m, "nf4")) and size < .14 * 4 * numbers
    half = model.bfloat16()
    assert half(ids).dtype == torch.bfloat16 and packed_size([half])[1] == size, "the format of codes and scales does not follow"
    unpack(model.float())
    assert set(model.state_dict()) == set(twin.state_dict())


def test_a_run_on_four_bits_learns_as_one_on_32(home, tmp_path, capfd):  # noqa: F811
    "Its curve is near the other's; the step, going on and the merged model know that the base lies in four bits."
    knobs = dict(lora_target_modules=["all-linear"], lora_r=4, lora_alpha=8.)
    training.run(asks(home, tmp_path / "full", knobs, lr=3e-3, train_iters=20), json=True)
    done = training.run(asks(home, tmp_path / "four", dict(knobs, qlora_nf4=True), lr=3e-3, train_iters=20, save_interval=10), json=True)
    said = re.search(r"base +([\d,]+) numbers of this process in (\d\.\d\d) bits", capfd.readouterr().err)
    a, b = ([r["loss"] for r in rows(tmp_path / x)] for x in ("full", "four"))
    assert said and float(said[2]) < 4.3 and a != b and max(abs(x - y) for x, y in zip(a, b, strict=True)) < .02 and json.loads((tmp_path / "four/base.json").read_text())["nf4"]
    ids = torch.arange(40).view(2, 20) * 7 % 90
    merged, step = load_model(done["hf"]), base_model(tmp_path / "four")
    fresh = load_model(home / "base")
    pack(fresh)
    load_adapter(fresh, tmp_path / "four/adapter")
    with torch.no_grad():
        want = fresh(ids)
        for m in (merged, step): assert torch.allclose(m(ids), want, atol=1e-4)


def test_what_four_bits_cannot_do_is_one_sentence(home, tmp_path):  # noqa: F811
    with pytest.raises(UserError, match="Found qlora_nf4 without lora_target_modules"): training.run(asks(home, tmp_path / "run", dict(qlora_nf4=True)), json=True)
    assert not (tmp_path / "run").exists()
    with pytest.raises(UserError, match="whose experts lie in stacks"):
        pack(Decoder(ModelConfig(vocab_size=16, hidden_size=32, num_attention_heads=4, num_hidden_layers=1, num_experts=2, num_experts_per_tok=1)))
