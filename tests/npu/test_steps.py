"""Level three (with level two inside): whole training steps of the project's trainer on the pretend card, under torch_npu's own autograd and through its own
host code, against the same steps on the CPU's rows."""
import pytest
import torch
from emulation import Emulation
from formulas import DOUBT, FORMULAS
from worlds import ALWAYS, WORLDS, apart, config, forget, train

from ascend_nb.model import Decoder, KVCache

CPU = {}


def cpu(name):
    if name not in CPU: CPU[name] = train(*WORLDS[name][:2], "cpu")
    return CPU[name]


@pytest.mark.parametrize("name", WORLDS)
def test_five_adamw_steps_are_those_of_a_cpu(name):
    shape, packed, more = WORLDS[name]
    with Emulation(check=True) as e: params, grads, losses = train(shape, packed, "npu")
    want, want_grads, want_losses = cpu(name)
    assert grads.keys() == want_grads.keys() == params.keys(), "a parameter without a gradient"
    assert apart(params, want) < 1e-5 and apart(grads, want_grads) < 1e-5
    assert max(abs(a - b) for a, b in zip(losses, want_losses, strict=True)) < 1e-5
    assert losses[-1] != losses[0] and not (ALWAYS | more) - e.calls.keys()
    assert e.passed.keys() >= ALWAYS, "torch_npu's host code saw every operator"


OPS = sorted(ALWAYS | set().union(*(w[2] for w in WORLDS.values())))


@pytest.mark.parametrize("op", OPS)
def test_a_formula_that_is_one_per_cent_off_moves_the_weights(op):
    "Each of these steps does depend on each operator: none is called and thrown away."
    name = "moe" if "moe" in op or "grouped" in op else "dense"
    DOUBT.add(op)
    try:
        with Emulation(): params, grads, _ = train(*WORLDS[name][:2], "npu")
    finally: DOUBT.discard(op)
    want, want_grads, _ = cpu(name)
    assert apart(params, want) > 1e-4 or apart(grads, want_grads) > 1e-4


@pytest.mark.parametrize("name", ["dense", "dense, window", "moe", "latent attention"])
@pytest.mark.parametrize("dtype,tol", [(torch.float32, 1e-5), (torch.bfloat16, 0.1)], ids=["fp32", "bf16"])
def test_prompt_and_decode_steps_are_those_of_a_cpu(name, dtype, tol):
    forget()
    cfg = config(WORLDS[name][0])
    ids, out = torch.randint(0, 64, (2, 9), generator=torch.Generator().manual_seed(1)), {}

    def generate(device):
        model = Decoder(cfg).init_weights(3).to(dtype).eval().to(device)
        cache = KVCache(cfg, 2, 16, dtype=dtype, device=device)
        with torch.no_grad():
            logits = [model(ids[:, :6].to(device), cache=cache)] + [model(ids[:, i:i + 1].to(device), cache=cache) for i in range(6, 9)]
        return torch.cat([x.cpu().float() for x in logits], 1)

    with Emulation(check=True) as e: out = generate("npu")
    assert (out - generate("cpu")).abs().max() < tol * max(1.0, out.abs().max().item())
    if dtype == torch.bfloat16: assert e.passed["npu_prompt_flash_attention"] and (e.passed["npu_incre_flash_attention"] or name == "latent attention")
    forget()


def test_every_formula_is_somebodys():
    assert FORMULAS.keys() >= set(OPS)
