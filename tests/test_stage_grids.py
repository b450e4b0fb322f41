"""The preference stages over many processes: losses, rewards and reference numbers of one process, whatever the grid."""
import json
from dataclasses import replace

import numpy as np
import pytest
from safetensors.numpy import load_file
from test_parallel import NAMES
from test_stages import config, pairs, rows  # noqa: F401 - fixtures

from ascend_nb import training
from ascend_nb.checkpoint import RunDir
from ascend_nb.config import ParallelConfig
from ascend_nb.mesh import launch
from ascend_nb.preference import METRICS
from ascend_nb.schema import dump_yaml

MODEL = dict(num_hidden_layers=4, num_attention_heads=4, num_key_value_heads=2, hidden_size=64)
MOE = dict(MODEL, model_type="qwen3_moe", qk_norm=True, num_experts=4, num_experts_per_tok=2, moe_intermediate_size=32, router_aux_loss_coef=.01)


def spread(cfg, n, tmp_path, fail=0, **grid):
    "`ascend_nb train` in n processes; its result, or what the first one said."
    cfg = replace(cfg, parallel=ParallelConfig(**{NAMES[k]: v for k, v in grid.items()}))
    path = tmp_path / f"{len(list(tmp_path.iterdir()))}.yaml"
    path.write_text(dump_yaml(cfg))
    outs = launch(["-m", "ascend_nb.cli", "train", "--config", path, "--json"], n, 300)
    assert [code for code, *_ in outs] == [fail] * n, "\n".join(err[-1500:] for _, _, err in outs)
    return outs[0][2] if fail else json.loads(outs[0][1])


def same(one, many):
    "Two runs have the same curves, and the same numbers of the reference. Adam's first step is as long for a gradient that is a rounding error as for any other, so norms part sooner than losses; without steps (lr 1e-9) those of pairs over experts stay within 1e-4."
    a, b = rows(one), rows(many)
    keys = ["loss", "lr", "trained_tokens", "consumed_samples", *METRICS[:3]]
    assert len(a) == len(b) == one.train.train_iters
    for x, y in zip(a, b, strict=True):
        for k in [*keys, *(["valid_loss", *(f"valid_{m}" for m in METRICS[:3])] if "valid_loss" in x else [])]: assert abs(x[k] - y[k]) < 1e-4 * max(1, abs(x[k])), (x["step"], k, x[k], y[k])
        assert abs(x["grad_norm"] - y["grad_norm"]) < (1e-4 if x["step"] == 1 else 3e-3) * max(1, x["grad_norm"]), (x["step"], x["grad_norm"], y["grad_norm"])
    assert a[-1]["accuracy"] == b[-1]["accuracy"] # in the first step margins are rounding errors
    refs = [RunDir(c.train.save).path / "reference.safetensors" for c in (one, many)]
    assert refs[0].exists() == refs[1].exists()
    if not refs[0].exists(): return
    p, q = map(load_file, refs)
    assert p.keys() == q.keys() and all(np.allclose(p[k], q[k], atol=1e-4) for k in p)


def both(config, n, tmp_path, stage="dpo", tune=None, model=MODEL, dtype="fp32", **grid):  # noqa: F811
    data = n // (grid.get("tp", 1) * grid.get("pp", 1)) # so many processes read a validation's pairs together
    kw = dict(train_iters=10, eval_interval=5, global_batch_size=8, dtype=dtype)
    if "lora_target_modules" in (tune or {}): kw["load"] = training.run(config("base", "simpo", model=model, train_iters=1), json=True)["hf"] # an adapter is a change of something
    one, many = (config(name, stage, tune, model, eval_iters=k, **kw) for name, k in (("one", 4), ("many", 4 // data)))
    training.run(one, json=True)
    out = spread(many, n, tmp_path, **grid)
    same(one, many)
    assert rows(one)[0]["loss"] - rows(one)[-1]["loss"] > .02
    return one, many, out


@pytest.mark.parametrize(("stage", "tune", "grid"), [("dpo", dict(dpo_beta=.5, pref_ftx=.2), dict(tp=2, sp=True)), pytest.param("dpo", dict(dpo_beta=.5), dict(pp=2), marks=pytest.mark.slow), ("rm", None, dict(zero=3))], ids=["tp", "pp", "rm"])
def test_two_processes_do_what_one_does(config, tmp_path, stage, tune, grid):  # noqa: F811
    one, many, out = both(config, 2, tmp_path, stage, tune, **grid)
    (a, b) = (load_file(next(RunDir(c.train.save).hf_path.glob("*.safetensors"))) for c in (one, many))
    assert a.keys() == b.keys() and all(np.allclose(a[k], b[k], atol=1e-3) for k in a) and out["accuracy"] is not None


def test_what_cannot_be_spread_is_refused_before_anything_is_written(config, tmp_path):  # noqa: F811
    cfg = config(model=MODEL)
    err = spread(cfg, 2, tmp_path, fail=2, cp=2)
    assert "context_parallel_size=2 with stage=dpo; expected 1" in err and not RunDir(cfg.train.save).path.exists()


CASES = {
    "tp4": (4, dict(tp=4, sp=True), dict(model=dict(MODEL, num_key_value_heads=4))), "tp pp": (4, dict(tp=2, pp=2, sp=True), {}), "dp tp": (4, dict(tp=2), {}), "zero0": (4, dict(zero=0), {}), "zero2": (4, dict(zero=2), {}), "zero3": (4, dict(zero=3, tp=2), {}),
    "interleaved": (2, dict(pp=2, vp=1), {}), "zero bubble": (2, dict(pp=2, vp=1, schedule="interleaved-zb"), {}), "zbv": (2, dict(pp=2, schedule="zbv"), dict(model=dict(MODEL, tie_word_embeddings=False))),
    "experts": (4, dict(ep=2, tp=2), dict(model=MOE)), "experts pp": (2, dict(pp=2), dict(model=MOE)), "recompute": (2, dict(tp=2, recompute="full"), {}),
    "simpo": (4, dict(tp=2, pp=2), dict(stage="simpo")), "orpo": (4, dict(tp=2), dict(stage="orpo")), "ipo": (2, dict(pp=2), dict(tune=dict(dpo_loss_type="ipo"))),
    "rm tp": (4, dict(tp=2, sp=True), dict(stage="rm")), "rm tp4": (4, dict(tp=4), dict(stage="rm", model=dict(MODEL, num_key_value_heads=4))), "rm experts": (4, dict(ep=2, tp=2), dict(stage="rm", model=MOE)),
    "lora": (4, dict(tp=2, pp=2), dict(tune=dict(lora_target_modules=["all-linear"], lora_r=4, dpo_beta=.5))), "lora zero3": (2, dict(zero=3), dict(tune=dict(lora_target_modules=["all-linear"], lora_r=4, dpo_beta=.5))),
}


@pytest.mark.slow
@pytest.mark.parametrize("name", CASES)
def test_matrix(config, tmp_path, name):  # noqa: F811
    n, grid, kw = CASES[name]
    both(config, n, tmp_path, **kw, **grid)


@pytest.mark.slow
def test_a_run_goes_on_in_another_grid_with_the_file_of_the_first(config, tmp_path):  # noqa: F811
    one, many = (config(name, model=MODEL, tune=dict(dpo_beta=.5), train_iters=10, eval_interval=5, global_batch_size=8, save_interval=5) for name in ("one", "many"))
    training.run(one, json=True)
    broken = replace(many, train=replace(many.train, train_iters=10))
    from test_stages import broken_off
    broken_off(broken, 5)
    before = (RunDir(many.train.save).path / "reference.safetensors").read_bytes()
    spread(broken, 2, tmp_path, tp=2)
    same(one, many)
    assert (RunDir(many.train.save).path / "reference.safetensors").read_bytes() == before


@pytest.mark.slow
def test_ref_model_is_spread_too(config, tmp_path):  # noqa: F811
    base, ref = (training.run(config(n, stage="simpo", seed=s, train_iters=1, model=MODEL), json=True)["hf"] for n, s in (("base", 1), ("ref", 2)))
    one, many = (config(name, model={}, tune=dict(ref_model=ref, dpo_beta=.5), load=base, train_iters=10, eval_interval=5, global_batch_size=8) for name in ("one", "many"))
    from ascend_nb.config import ModelConfig
    one, many = (replace(c, model=ModelConfig()) for c in (one, many))
    training.run(one, json=True)
    spread(many, 4, tmp_path, tp=2, pp=2)
    same(one, many)
