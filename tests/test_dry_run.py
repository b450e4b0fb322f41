"""A rank that is played: the planner beside it, and a real process's allocator beside both."""
import itertools
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import torch.distributed as dist

from ascend_nb.agree import agreement, farthest, fetches
from ascend_nb.cli import main
from ascend_nb.config import DataConfig, ModelConfig, ParallelConfig, RunConfig, TrainConfig
from ascend_nb.core import UserError
from ascend_nb.dry_run import dry_run
from ascend_nb.mesh import launch
from ascend_nb.npu_kernels import KERNELS, _hidden

T, P, C, E = "tensor_model_parallel_size", "pipeline_model_parallel_size", "context_parallel_size", "expert_model_parallel_size"
SP, RING, V = dict(sequence_parallel=True), dict(context_parallel_algo="megatron_cp_algo"), "num_layers_per_virtual_pipeline_stage"
DENSE = dict(vocab_size=4096, hidden_size=512, intermediate_size=1408, num_hidden_layers=4, num_attention_heads=8, num_key_value_heads=4, tie_word_embeddings=False)
SHAPES = {"dense": DENSE, "experts": dict(DENSE, num_experts=4, num_experts_per_tok=2, moe_intermediate_size=704, router_aux_loss_coef=.01),
    "latent": dict(DENSE, num_key_value_heads=8, kv_lora_rank=64, q_lora_rank=96, qk_nope_head_dim=32, qk_rope_head_dim=16, v_head_dim=32), "tied": dict(DENSE, tie_word_embeddings=True)}
LAYOUTS = {  # processes, rank, micro-batches, ParallelConfig
    "one": (1, 0, 1, {}), "two micro-batches": (1, 0, 2, {}), "all again": (1, 0, 2, dict(recompute_granularity="full")), "attention again": (1, 0, 2, dict(recompute_granularity="selective")), "mlp again": (1, 0, 2, dict(recompute_activation_function=True)),
    "block again": (1, 0, 2, dict(recompute_granularity="full", recompute_method="block", recompute_num_layers=2)), "tp": (2, 1, 1, {T: 2}), "tp sp": (4, 0, 2, {T: 4, **SP}), "tp sp again": (2, 0, 2, {T: 2, **SP, "recompute_granularity": "full"}),
    "zero 0": (4, 0, 2, dict(zero_stage=0)), "zero 1": (4, 0, 1, {}), "zero 1, two": (4, 1, 2, {}), "zero 2": (4, 3, 2, dict(zero_stage=2)), "zero 3": (4, 0, 2, dict(zero_stage=3)), "zero 3 again": (4, 0, 1, dict(zero_stage=3, recompute_granularity="full")),
    "pp first": (4, 0, 6, {P: 4}), "pp middle": (4, 2, 6, {P: 4}), "pp last": (4, 3, 6, {P: 4}), "vpp": (2, 0, 4, {P: 2, V: 1}), "tp pp dp": (8, 7, 4, {T: 2, P: 2, **SP}), "pp zero 3": (4, 0, 4, {P: 2, "zero_stage": 3}),
    "vpp dp": (4, 3, 4, {P: 2, V: 2}), "vpp 4, dp": (4, 0, 4, {P: 2, V: 1}), "vpp 4, dp, last": (4, 3, 8, {P: 2, V: 1}), "vpp 4, zero 3": (4, 3, 6, {P: 2, V: 1, "zero_stage": 3}), # many short stages: the schedule drops weights and gathers them again
    "ulysses": (2, 0, 1, {C: 2}), "ring": (2, 1, 2, {C: 2, **RING}), "tp cp dp": (8, 0, 1, {T: 2, C: 2, **SP}),
}
OF_EXPERTS = {"ep": (4, 2, 1, {E: 4}), "ep, two": (2, 0, 2, {E: 2}), "ep dp": (4, 0, 1, {E: 2}), "ep tp": (4, 0, 2, {E: 2, T: 2, **SP}), "ep pp": (4, 3, 4, {E: 2, P: 2}), "ep zero 3": (2, 0, 1, {E: 2, "zero_stage": 3}), "ep again": (2, 0, 1, {E: 2, "recompute_granularity": "full"})}
QUICK = [("dense", "tp pp dp"), ("experts", "ep dp")]
REST = [(s, k) for s in SHAPES for k in {**LAYOUTS, **(OF_EXPERTS if s == "experts" else {})} if (s, k) not in QUICK]


def config(shape, world, batches, parallel, seq=1024, dtype="bf16", micro=1):
    p = ParallelConfig(**parallel)
    return RunConfig(model=ModelConfig(**shape), data=DataConfig(seq_length=seq), parallel=p, train=TrainConfig(micro_batch_size=micro, global_batch_size=micro * batches * p.data_parallel_size(world), dtype=dtype))


def check(shape, layout, layers=None, **kw):
    layers = layers or (8 if layout.startswith("vpp ") else 4)
    world, rank, batches, parallel = {**LAYOUTS, **OF_EXPERTS}[layout]
    cfg = config(dict(SHAPES[shape], num_hidden_layers=layers), world, batches, parallel, **kw)
    a = agreement(cfg, dry_run(cfg, rank, world))
    assert farthest(a) < .05, (a["memory"], [r for r in a["sends"] if r["count"] != r["played"] or abs(r["bytes"] - r["played_bytes"]) > .02 * r["bytes"]])


@pytest.mark.parametrize("shape, layout", QUICK)
def test_planner_and_dry_run_agree(one_thread, shape, layout): check(shape, layout, layers=2, seq=256)


@pytest.mark.slow
@pytest.mark.parametrize("shape, layout", REST)
def test_planner_and_dry_run_agree_everywhere(one_thread, shape, layout): check(shape, layout)


def test_weights_are_gathered_as_torchs_schedule_says():
    "Its own list of actions, for every process of pipelines of all kinds."
    from torch.distributed.pipelining import schedules
    for pp, vpp, batches in itertools.product((2, 3, 4, 8), (2, 3, 4, 5, 8), (2, 3, 4, 8, 12, 24)):
        per = batches // (rounds := max(1, batches // pp))
        if batches % rounds: continue
        for rank in range(pp):
            warm = schedules._get_warmup_ops(rank, vpp, per, pp, batches, multiply_factor=2)
            both = batches * vpp - warm
            turn = lambda at, back=False, vpp=vpp, per=per, pp=pp, rank=rank: abs((vpp - 1) * back - at // per % vpp) * pp + rank
            ops = schedules._get_1f1b_rank_ops(vpp, pp, warm, both, warm, rank, turn, lambda at, turn=turn, warm=warm: turn(at - warm, True))
            gathered = [a.stage_index // pp for a in schedules._add_unshard_reshard(ops) if a.computation_type == schedules.UNSHARD]
            assert fetches(pp, vpp, batches, rank) == [gathered.count(k) for k in range(vpp)], (pp, vpp, batches, rank)


def test_nothing_is_left_behind(one_thread):
    "After a dry run, and after one that failed, this process is what it was."
    before, resize, row = dict(os.environ), torch.UntypedStorage.resize_, dict(KERNELS["attention"])
    small = dict(DENSE, hidden_size=64, intermediate_size=128, num_hidden_layers=1, vocab_size=128, num_attention_heads=2, num_key_value_heads=1)
    dry_run(config(dict(small, sliding_window=8), 2, 1, {}, seq=32), 1, 2)
    with pytest.raises(UserError, match="expected 0 to 1"): dry_run(config(small, 2, 1, {}, seq=32), 2, 2)
    with pytest.raises(UserError, match="multiple of tp x pp x cp"): dry_run(RunConfig(model=ModelConfig(**small), parallel=ParallelConfig(tensor_model_parallel_size=2)), 0, 3)
    with pytest.raises(UserError, match="one memory"): dry_run(config(small, 1, 1, dict(optimizer_offload=True), seq=32))
    assert dict(os.environ) == before and torch.UntypedStorage.resize_ is resize and KERNELS["attention"] == row and not dist.is_initialized() and _hidden.cache_info().currsize == 0


@pytest.mark.slow
def test_seventy_billion_on_a_thousand_ranks(tmp_path):
    "Under two minutes and four GB, in a process of its own."
    script = """
import json, sys
from ascend_nb.config import DataConfig, ModelConfig, ParallelConfig, RunConfig, TrainConfig
from ascend_nb.agree import agreement, farthest
from ascend_nb.dry_run import dry_run
c = ModelConfig(vocab_size=32000, hidden_size=8192, intermediate_size=28672, num_hidden_layers=80, num_attention_heads=64, num_key_value_heads=8, tie_word_embeddings=False)
p = ParallelConfig(tensor_model_parallel_size=8, pipeline_model_parallel_size=16, sequence_parallel=True, num_layers_per_virtual_pipeline_stage=int(sys.argv[2]) or None)
cfg = RunConfig(model=c, data=DataConfig(seq_length=4096), parallel=p, train=TrainConfig(micro_batch_size=1, global_batch_size=128, dtype="bf16"))
d = dry_run(cfg, int(sys.argv[1]), 1024)
print(json.dumps(d.to_dict() | dict(far=farthest(agreement(cfg, d)))))
"""
    for rank, layers in ((0, 0), (1023, 0), (517, 1), (1023, 1)): # layers of a short stage
        out = json.loads(subprocess.run([sys.executable, "-c", script, str(rank), str(layers)], check=True, capture_output=True, text=True).stdout.splitlines()[-1])
        print(f"rank {rank}, stage {out['stage']}: {out['seconds']:.1f} s, {out['rss'] / 1e9:.2f} GB, farthest {out['far']:.2%}")
        assert out["seconds"] < 120 and out["rss"] < 4e9 and out["far"] < .05
        gathers = next(r for r in out["sends"] if (r["axis"], r["kind"]) == ("tp", "all-gather"))
        assert gathers["count"] == 16 * (5 * 4 + (rank in (0, 1023))), "five layers enter two blocks forward and leave two backward; and one end of the model"


MEASURED = {  # processes, micro-batches, ParallelConfig
    "one": (1, 1, {}), "one, two micro-batches": (1, 2, {}), "one, again": (1, 2, dict(recompute_granularity="full")), "tp": (2, 1, {T: 2, **SP}), "zero 1": (2, 2, {}), "zero 2": (2, 2, dict(zero_stage=2)), "zero 3": (2, 1, dict(zero_stage=3)),
    "pp": (2, 4, {P: 2}), "vpp": (2, 4, {P: 2, V: 1}), "cp": (2, 1, {C: 2}), "ring": (2, 1, {C: 2, **RING}), "tp pp": (4, 4, {T: 2, P: 2}), "dp tp": (4, 1, {T: 2, **SP}), "pp dp": (4, 4, {P: 2}),
}
OF_EXPERTS_MEASURED = {"ep": (2, 1, {E: 2}), "ep zero 3": (2, 2, {E: 2, "zero_stage": 3}), "ep tp": (4, 1, {E: 2, T: 2, **SP}), "ep dp": (4, 2, {E: 2})}


@pytest.mark.slow
@pytest.mark.parametrize("shape, layout", [(s, k) for s in ("dense", "experts", "latent", "tied") for k in {**MEASURED, **(OF_EXPERTS_MEASURED if s == "experts" else {})} if s in ("dense", "experts") or k in ("one", "pp", "tp", "pp dp")])
def test_real_memory_of_small_runs(tmp_path, shape, layout):
    "What the allocator of each process really gave out, against what was played and what was foretold."
    world, batches, parallel = {**MEASURED, **OF_EXPERTS_MEASURED}[layout]
    model = dict(SHAPES[shape], hidden_size=256, intermediate_size=704) | (dict(moe_intermediate_size=352) if shape == "experts" else {})
    cfg = config(model, world, batches, parallel, seq=512, dtype="fp32")
    spec = json.dumps(dict(shape=model, parallel=parallel, seq=512, batches=batches))
    outs = launch([Path(__file__).with_name("memory_worker.py"), spec], world)
    assert all(code == 0 for code, _, _ in outs), [e[-800:] for _, _, e in outs]
    real = {o["rank"]: o["peak"] for _, out, _ in outs for o in map(json.loads, filter(lambda s: s.startswith("{"), out.splitlines()))}
    assert set(real) == set(range(world))
    for rank in {0, world - 1}:
        d = dry_run(cfg, rank, world)
        told = agreement(cfg, d)["memory"]["foretold"]
        print(f"{shape}, {layout}, rank {rank}: measured {real[rank] / 2**20:.1f} MiB, played {d.peak / real[rank]:.3f}, foretold {told / real[rank]:.3f}")
        assert d.peak == pytest.approx(real[rank], rel=.1) and told == pytest.approx(real[rank], rel=.1)


def test_plan_plays_a_run(capsys, tmp_path):
    "What `plan` wrote is played as it stands; a rank that is not there is one sentence."
    small = dict(DENSE, hidden_size=64, intermediate_size=128, num_hidden_layers=2, vocab_size=256, num_attention_heads=2, num_key_value_heads=2)
    (tmp_path / "config.json").write_text(json.dumps(dict(small, model_type="llama")))
    out = tmp_path / "run.yaml"
    assert main(["plan", str(tmp_path), "--devices", "4", "--seq", "64", "--global-batch", "4", "--tp", "2", "--pp", "2", "--out", str(out), "--json"]) == 0
    capsys.readouterr()
    assert main(["plan", "--run", str(out), "--devices", "4", "--dry-run", "3", "--json"]) == 0
    got = json.loads(capsys.readouterr().out)
    assert (got["rank"], got["world"], got["grid"]) == (3, 4, "tp=2 pp=2") and all(r["count"] == r["played"] for r in got["agreement"]["sends"])
    assert main(["plan", "--run", str(out), "--devices", "4", "--dry-run", "4"]) == 2
    assert "expected 0 to 3" in capsys.readouterr().err
    assert main(["plan", str(tmp_path), "--devices", "4", "--seq", "64", "--global-batch", "4", "--dry-run", "99"]) == 2
    said = capsys.readouterr()
    assert "expected 0 to 3" in said.err and not said.out, "refused before anything is searched for"
