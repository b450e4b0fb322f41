"""Parity is the specification: whatever the grid, loss and every gradient are those of one process."""
import json
import subprocess
import sys

import numpy as np
import pytest
import torch
from conftest import ROOT
from parallel_worker import SHAPES, V, make

from ascend_nb.config import ModelConfig, ParallelConfig, TrainConfig
from ascend_nb.core import UserError, pick_device
from ascend_nb.datasets import Loader, Sample, collate_gpt
from ascend_nb.losses import causal_lm_loss
from ascend_nb.mesh import Mesh, Sizes, check, free_port, launch
from ascend_nb.parallel_trainer import ParallelTrainer

NAMES = dict(tp="tensor_model_parallel_size", pp="pipeline_model_parallel_size", cp="context_parallel_size", ep="expert_model_parallel_size", sp="sequence_parallel",
             zero="zero_stage", fsdp="fsdp_size", vp="num_layers_per_virtual_pipeline_stage", algo="context_parallel_algo", degree="ulysses_degree_in_cp",
             schedule="pipeline_schedule", layers="num_layer_list", factor="moe_expert_capacity_factor", pad="moe_pad_expert_input_to_capacity", z="moe_z_loss_coeff",
             drop="moe_token_drop_policy", recompute="recompute_granularity", act="recompute_activation_function", method="recompute_method", n="recompute_num_layers", swap="swap_attention", off="optimizer_offload", host="cpu_offload")
DYNAMIC = dict(max_position_embeddings=8, rope_scaling=dict(rope_type="dynamic", factor=2.))  # frequencies depend on the length of the whole text
LONG = dict(max_position_embeddings=32, rope_scaling=dict(rope_type="longrope", short_factor=[1.] * 8, long_factor=[1.5] * 8, original_max_position_embeddings=14))
RING, HYBRID = dict(algo="megatron_cp_algo"), dict(algo="hybrid_cp_algo", degree=2)


def case(shape, packed=False, kind="parity", steps=20, model=None, dtype="fp32", **kw):
    return dict(shape=shape, packed=packed, kind=kind, steps=steps, model=model or {}, dtype=dtype, parallel={NAMES[k]: v for k, v in kw.items()})


def run(cases, n, timeout=900):
    "Every case in one world of n processes; what each process found."
    outs = launch([ROOT / "tests" / "parallel_worker.py", json.dumps(cases)], n, timeout)
    assert all(code == 0 for code, *_ in outs), "\n".join(err[-2500:] for code, _, err in outs if code)
    rows = [[json.loads(x) for x in out.splitlines() if x.startswith("{")] for _, out, _ in outs]
    assert all(len(r) == len(cases) for r in rows)
    return rows


def same(rows):
    for of_rank in rows:
        for r in of_rank:
            assert "error" not in r, r
            if r["case"]["kind"] == "curve": assert r["loss"] < (1e-4 if r["case"]["dtype"] == "fp32" else 3e-3) and r["norm"] < (1e-3 if r["case"]["dtype"] == "fp32" else 1e-2) and r["tokens"] == 0, r
            else: assert max(r["loss"], r["grad"], r["norm"], r["valid"]) < 1e-5 and not r["missing"], r


def test_the_useful_products_in_four_processes():
    same(run([case("moe", tp=2, pp=2, vp=1, z=.001, model=dict(router_aux_loss_coef=.1)), case("dense", tp=2, sp=True, pp=2), case("dense", cp=2, packed=True, zero=3, **RING), case("moe", tp=2, ep=2, sp=True),
              case("mla", tp=2, cp=2), case("dense", kind="curve", tp=2, steps=20)], 4))


MATRIX = {
    "tp": (4, [case(s, tp=2, sp=sp) for s in ("llama", "gpt2", "gemma", "bloom", "moe", "mla") for sp in (False, True)] + [case("gpt2", tp=4, sp=True)]),
    "fsdp": (4, [case(s, zero=z) for s, z in (("dense", 0), ("dense", 1), ("moe", 2), ("mla", 3))] + [case("llama", fsdp=2, zero=3), case("dense", tp=2, zero=2)]),
    "pp": (4, [case("dense", pp=4), case("dense", pp=2, layers="1,3", tp=2), case("llama", pp=2, vp=1, tp=2, sp=True), case("llama", pp=2, vp=1, schedule="interleaved-zb"),
               case("llama", pp=2, schedule="zbv"), case("dense", pp=4, schedule="gpipe"), case("moe", pp=2, zero=1), case("moe", pp=4, z=.01, model=dict(router_aux_loss_coef=.1)), case("mla", pp=2, packed=True),
               case("mla", pp=2, cp=2, z=.001, model=dict(router_aux_loss_coef=.1)), case("mla", pp=2, vp=1, ep=2, schedule="interleaved-zb", z=.001, model=dict(router_aux_loss_coef=.1)),
               case("moe", pp=2, schedule="zbv", z=.001, model=dict(router_aux_loss_coef=.1, tie_word_embeddings=False)), case("gemma", pp=2, tp=2)]),
    "cp": (4, [case("dense", cp=4, packed=k, **a) for k in (False, True) for a in ({}, RING, HYBRID)] + [case("moe", cp=2, **RING), case("mla", cp=4, **RING),
               case("dense", cp=2, pp=2, packed=True), case("mla", cp=4, packed=True), case("dense", cp=2, model=dict(sliding_window=5), **RING), case("llama", cp=2, pp=2, model=DYNAMIC), case("llama", cp=4, model=LONG, **RING)]),
    "ep": (4, [case("moe", ep=4, zero=3, z=.001, model=dict(router_aux_loss_coef=.01)), case("moe", ep=2, tp=2, z=.001, model=dict(router_aux_loss_coef=.01)),
               case("moe", ep=2, cp=2, z=.001, model=dict(router_aux_loss_coef=.01)), case("moe", ep=2, factor=.7), case("moe", ep=4, factor=.7, pad=True, drop="position"),
               case("mla", ep=2, pp=2), case("mla", ep=4)]),
    "memory": (4, [case("dense", recompute="full", tp=2, sp=True, zero=3), case("moe", recompute="selective", act=True, ep=2, model=dict(router_aux_loss_coef=.01)), case("dense", recompute="full", pp=2, swap=True),
                   case("llama", recompute="full", method="block", n=1, act=True, tp=2, sp=True, zero=2), case("dense", recompute="full", n=2, tp=2, pp=2),
                   case("moe", act=True, swap=True, tp=2, ep=2, zero=1), case("mla", recompute="selective", swap=True, cp=2, **RING),
                   *(case("dense", host=True, act=True, zero=z) for z in (1, 2, 3)), case("moe", host=True, ep=2, fsdp=2, zero=3)]),
    "curves": (4, [case(s, kind="curve", **kw) for s, kw in (("dense", dict(tp=2, sp=True, zero=3)), ("dense", dict(pp=2, tp=2)), ("moe", dict(ep=2, tp=2)), ("mla", dict(cp=2, pp=2)), ("moe", dict(off=True, tp=2, zero=2)), ("dense", dict(host=True, zero=3)))]),
    "16 bits": (4, [case(s, kind="curve", steps=5, dtype=d, **kw) for d in ("bf16", "fp16") for s, kw in (("dense", dict(tp=2, pp=2, sp=True)), ("moe", dict(ep=2, tp=2)), ("mla", dict(cp=2, zero=3)))]),
    "eight": (8, [case("llama", tp=2, pp=2, cp=2, sp=True, vp=1), case("moe", tp=2, cp=2, ep=4, zero=3, **RING), case("mla", tp=2, pp=2, ep=2, sp=True), case("dense", tp=2, fsdp=2, zero=3)]),
}


@pytest.mark.slow
@pytest.mark.parametrize("name", MATRIX)
def test_matrix(name):
    n, cases = MATRIX[name]
    same(run(cases, n))


def moved(folder, number, shape, there, here, later=False):
    "A case of `resume`: saved in one grid, gone on in another; `here` None: in one process."
    names = lambda kw: {NAMES[k]: v for k, v in (kw or {}).items()}
    return dict(shape=shape, kind="resume", folder=str(folder / f"run{number}"), parallel=names(there), to=names(here), alone=here is None, **{"async": later})


def goes_on(rows):
    for of_rank in rows:
        for r in of_rank:
            assert "error" not in r, r
            assert r["steps"] == 4 and r["samples"] and r["moved"] > .01 and r["loss"] < 1e-5 and r["norm"] < 1e-4, r


TP, PP, ZERO, EP = dict(tp=2), dict(pp=2), dict(zero=3), dict(ep=2)


def test_a_run_goes_on_in_another_grid(tmp_path):
    goes_on(run([moved(tmp_path, i, *c) for i, c in enumerate([("dense", TP, PP), ("dense", ZERO, dict(tp=2, sp=True), True), ("moe", EP, TP, True), ("mla", PP, None)])], 2))


@pytest.mark.slow
def test_larger_grids_go_on_in_others(tmp_path):
    both = dict(tp=2, pp=2)
    cases = [("dense", both, None), ("dense", both, ZERO, True), ("dense", dict(pp=4), dict(tp=2, zero=2)), ("moe", dict(ep=4, zero=3), dict(tp=2, ep=2)), ("moe", dict(tp=2, ep=2), None, True),
             ("moe", dict(ep=2, pp=2), dict(ep=4)), ("mla", dict(tp=2, cp=2), dict(pp=2, ep=2)), ("mla", dict(tp=4), ZERO, True), ("llama", dict(pp=2, vp=1, tp=2), dict(cp=2, fsdp=2, zero=3))]
    goes_on(run([moved(tmp_path, i, *c) for i, c in enumerate(cases)], 4))


def test_what_does_not_fit_is_one_sentence():
    m = ModelConfig(vocab_size=97, hidden_size=48, num_attention_heads=6, num_key_value_heads=3, num_hidden_layers=5, num_experts=3, num_experts_per_tok=1, moe_intermediate_size=10)
    for kw, world, words in ((dict(tp=2), 2, ("num_key_value_heads = 3", "vocab_size = 97")), (dict(pp=2), 2, ("num_hidden_layers = 5",)), (dict(ep=2), 2, ("num_experts = 3",)),
                             (dict(cp=4), 4, ("num_attention_heads = 6", "seq_length = 30")), (dict(cp=2, **RING), 2, ("seq_length = 30 is not divisible by 2 x cp = 4",)),
                             (dict(pp=2, layers="2,2"), 2, ("num_layer_list has 2 stages of 4 layers",)), (dict(vp=1), 1, ("need pipeline_model_parallel_size above 1",)), (dict(schedule="zbv"), 1, ("need pipeline_model_parallel_size above 1",)), (dict(host=True), 1, ("use optimizer_offload",)), (dict(ep=4), 2, ("expert_model_parallel_size = 4",))):
        with pytest.raises(UserError) as e: check(ParallelConfig(**{NAMES[k]: v for k, v in kw.items()}), world, model=m, seq_length=30)
        assert all(w in str(e.value) for w in words) and "\n" not in str(e.value), str(e.value)


@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
def test_an_optimizer_in_the_hosts_memory_gives_the_same_numbers(dtype):
    cfg, rng = ModelConfig(**SHAPES["moe"]), np.random.RandomState(0)
    data = [Sample(x[:-1], x[1:]) for x in (rng.randint(0, V, 17) for _ in range(40))]
    t = TrainConfig(train_iters=4, lr=2e-3, micro_batch_size=2, global_batch_size=4, device="cpu", dtype=dtype)
    runs = [ParallelTrainer(make(cfg, Mesh(Sizes()), ParallelConfig(optimizer_offload=off)), t, Loader(data, 2, collate_gpt), causal_lm_loss).fit() for off in (False, True)]
    assert [r["loss"] for r in runs[0].rows] == [r["loss"] for r in runs[1].rows]
    for (n, a), b in zip(runs[0].model.named_parameters(), runs[1].model.parameters(), strict=True): assert torch.equal(a, b), n


@pytest.fixture(scope="module")
def shapes(tmp_path_factory, samples):
    "A small run's files: raw text and its flags."
    folder = tmp_path_factory.mktemp("run")
    text = folder / "text.jsonl"
    text.write_text("\n".join(json.dumps({"text": f"Line {i} tells of {i * i} and {i % 7} things that no one has counted before." * 3}) for i in range(200)))
    return folder, text


def command(folder, text, tokenizer, *more):
    return ["-m", "ascend_nb.cli", "train", "--data-path", text, "--tokenizer-name-or-path", tokenizer, "--handler-name", "GeneralPretrainHandler", "--hidden-size", "32", "--num-hidden-layers", "2",
            "--num-attention-heads", "4", "--num-key-value-heads", "2", "--seq-length", "32", "--micro-batch-size", "2", "--global-batch-size", "8", "--lr", "1e-3", "--device", "cpu",
            "--data-cache-path", folder / "cache", "--json", *more]


@pytest.mark.slow
def test_torchrun_trains_saves_and_another_grid_goes_on(shapes, samples):
    folder, text = shapes
    tokenizer = samples / "tokenizer"

    def train(n, save, *flags):
        launcher = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", str(n), "--master-port", "0", "--rdzv-backend", "c10d", "--rdzv-endpoint", "localhost:0"] if n > 1 else [sys.executable]
        done = subprocess.run([str(x) for x in (*launcher, *command(folder, text, tokenizer, "--save", folder / save, *flags))], capture_output=True, text=True, timeout=600, cwd=ROOT)
        assert done.returncode == 0, done.stderr[-3000:]
        return [r for r in map(json.loads, (folder / save / "metrics.jsonl").read_text().splitlines()) if "loss" in r]
    one = train(1, "one", "--train-iters", "8")
    train(4, "four", "--train-iters", "4", "--lr-decay-iters", "8", "--tensor-model-parallel-size", "2", "--pipeline-model-parallel-size", "2", "--sequence-parallel")
    assert (folder / "four" / "hf" / "model.safetensors").exists()
    both = train(2, "four", "--train-iters", "8", "--resume", "must", "--lr-decay-iters", "8", "--zero-stage", "3")
    assert [r["step"] for r in both] == list(range(1, 9))
    assert max(abs(a["loss"] - b["loss"]) for a, b in zip(one, both, strict=True)) < 1e-4


@pytest.mark.slow
def test_two_launchers_are_two_hosts(shapes, samples):
    folder, text = shapes
    flags = command(folder, text, samples / "tokenizer", "--save", folder / "hosts", "--train-iters", "2", "--tensor-model-parallel-size", "2")
    start = [sys.executable, "-m", "torch.distributed.run", "--nnodes", "2", "--nproc-per-node", "2", "--master-addr", "127.0.0.1", "--master-port", str(free_port())]
    hosts = [subprocess.Popen([str(x) for x in (*start, "--node-rank", str(n), *flags)], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, cwd=ROOT) for n in range(2)]
    ends = [(h.communicate(timeout=300), h.returncode) for h in hosts]
    assert [code for _, code in ends] == [0, 0], ends
    assert json.loads(ends[0][0][0])["steps"] == 2 and ends[1][0][0] == ""  # the first host tells, the other is quiet


def test_every_process_of_a_host_has_a_card_of_its_own(monkeypatch):
    monkeypatch.setattr("torch.cuda.device_count", lambda: 2)
    assert str(pick_device("cuda").value) == "cuda"
    for k, v in dict(RANK="5", LOCAL_RANK="1", WORLD_SIZE="8").items(): monkeypatch.setenv(k, v)
    assert [str(pick_device(d).value) for d in ("cuda", "cuda:0", "cpu")] == ["cuda:1", "cuda:0", "cpu"]
    monkeypatch.setenv("LOCAL_RANK", "2")
    with pytest.raises(UserError, match="Found no cuda device"): pick_device("cuda")
