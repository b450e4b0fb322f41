"""The planner's arithmetic against transformers' parameters, against what autograd keeps, and against published runs."""
import csv
import json

import numpy as np
import pytest
import torch

from ascend_nb.config import MemoryConfig
from ascend_nb.costs import Layout, count, held, in_flight, layer_kept
from ascend_nb.families import config_from_hf
from ascend_nb.memory import save_memory
from ascend_nb.model import Decoder
from ascend_nb.parallel import CUTS
from ascend_nb.published import cross_validate, fit_rates, predict, read_runs, run_layout, run_model, summary
from ascend_nb.shapes import ModelConfig
from ascend_nb.step_time import RATES

MODELS = ["llama2_70b", "gemma2_9b", "Qwen--Qwen3-30B-A3B", "mistralai--Mixtral-8x7B-v0.1", "deepseek-ai--DeepSeek-V3", "deepseek_v2_lite", "qwen2moe", "phi-3_5", "qwen2.5_3b"]


@pytest.fixture(scope="module")
def runs(shared_data):
    return shared_data / "throughput" / "modellink_published.csv"


def shape(folder):
    "A published shape; how its weights are stored is not asked."
    return config_from_hf({k: v for k, v in json.loads((folder / "config.json").read_text()).items() if k != "quantization_config"})


@pytest.mark.parametrize("name", MODELS)
def test_parameters_are_those_of_transformers(shared_data, name):
    from transformers import AutoConfig, AutoModelForCausalLM
    folder = shared_data / "configs" / name
    with torch.device("meta"): theirs = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(folder))
    want = sum(p.numel() for n, p in theirs.named_parameters())
    n = count(shape(folder))
    assert n.ends + n.layers[-1] + n.experts[-1] == want


@pytest.mark.parametrize("name", ["llama2_70b", "deepseek-ai--DeepSeek-V3", "gemma2_9b"])
def test_stages_together_hold_the_model(shared_data, name):
    cfg = shape(shared_data / "configs" / name)
    n, stages = count(cfg), np.arange(4)
    dense, experts = held(cfg, n, Layout(pp=4, ep=8), stages)
    twice = n.words if cfg.tie_word_embeddings else 0
    assert dense.sum() + experts.sum() * 8 == n.ends + n.layers[-1] + n.experts[-1] + twice
    cut, cut_experts = held(cfg, n, Layout(tp=8), 0)
    with torch.device("meta"): model = Decoder(cfg)
    parts = {m: [n for n in name.split(".") if n in CUTS or n == "experts"] for name, m in model.named_modules()}
    want = sum(p.numel() / (8 if parts[m] and not (p.dim() == 1 and CUTS.get(parts[m][-1])) else 1) for m in model.modules() for p in m._parameters.values() if p is not None)
    assert cut + cut_experts == pytest.approx(want, rel=2e-4), "what tensor parallel cuts, and what it leaves whole"


SMALL = dict(vocab_size=256, hidden_size=256, intermediate_size=704, num_hidden_layers=3, num_attention_heads=8, num_key_value_heads=4)
LATENT = dict(SMALL, num_key_value_heads=8, kv_lora_rank=64, q_lora_rank=96, qk_nope_head_dim=32, qk_rope_head_dim=16, v_head_dim=32)
EXPERTS = dict(SMALL, num_experts=8, num_experts_per_tok=2, moe_intermediate_size=160, shared_expert_intermediate_size=128)
SHAPES = {"llama": SMALL, "wide heads, qk_norm": dict(SMALL, head_dim=64, qk_norm=True), "gelu": dict(SMALL, hidden_act="gelu_pytorch_tanh"), "plain": dict(SMALL, mlp_gated=False, hidden_act="gelu"),
    "post norms": dict(SMALL, post_norms=True), "latent": LATENT, "experts": EXPERTS}
WAYS = {"all": ({}, {}), "full": (dict(recompute_granularity="full"), dict(again=1.)), "block": (dict(recompute_granularity="full", recompute_method="block", recompute_num_layers=1), dict(again=1 / 3)),
    "selective": (dict(recompute_granularity="selective"), dict(attention_again=True)), "mlp": (dict(recompute_activation_function=True), dict(mlp_again=True))}


def kept(model, vocab, B=2, S=256):
    "Bytes that autograd holds between forward and backward, parameters and the tokens themselves left out."
    held_, mine = {}, {p.untyped_storage().data_ptr() for p in model.parameters()}
    def pack(t):
        s = t.untyped_storage()
        if s.data_ptr() not in mine: held_[s.data_ptr()] = (t, s.nbytes())
        return t
    ids = torch.randint(0, vocab, (B, S))
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t): out = model.hidden(ids)
    del out
    return sum(n for _, n in held_.values())


def measured(shape, memory, layers):
    "The layers' part: what a model of twice as many keeps more."
    sizes = []
    for L in (layers, 2 * layers):
        torch.manual_seed(0)
        model = Decoder(ModelConfig(**{**shape, "num_hidden_layers": L})).init_weights()
        m = MemoryConfig(**memory)
        if m.recompute_method == "block": m.recompute_num_layers = L // 3
        sizes.append(kept(save_memory(model, m), shape["vocab_size"]))
    return sizes[1] - sizes[0]


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("way", WAYS)
def test_activations_are_what_autograd_keeps(one_thread, shape, way):
    cfg, (memory, ours) = ModelConfig(**SHAPES[shape]), WAYS[way]
    want = measured(SHAPES[shape], memory, 3)
    got = 3 * float(layer_kept(cfg, Layout(micro=2, seq=256, bytes=4, **ours), cfg.is_moe(0), "cpu"))
    assert got == pytest.approx(want, rel=.1)


def test_1f1b_in_flight_is_a_simulation():
    "Run the order and count: a stage goes forward as soon as it may, and backward before forward."
    for pp, m in ((4, 8), (4, 2), (8, 64)):
        for stage in range(pp):
            order = ["F"] * min(pp - stage - 1, m)
            while order.count("F") < m or order.count("B") < m:
                if order.count("F") < m: order.append("F")
                if order.count("B") < m: order.append("B")
            live = np.cumsum([1 if o == "F" else -1 for o in order])
            assert live.max() == in_flight(Layout(pp=pp, batches=m), stage)


def test_published_runs_left_out_by_family(runs):
    rows = read_runs(runs)
    s = summary(rows, cross_validate(rows))
    assert s["rows"] == len(rows) and s["median_error"] <= .10 and s["p90_error"] <= .25


def test_rates_are_the_fit(runs):
    "What stands in the table is what the fit gives, so that nobody turns a knob by hand."
    fitted = fit_rates([r for r in read_runs(runs) if not r["mfu_flag"]])
    for k, v in fitted.items(): assert RATES[k][0] == pytest.approx(v, rel=.01)


def test_fit_finds_rates_that_made_the_data(runs):
    "Runs made by known rates: the fit finds them, so it is a fit of what it says."
    other = dict(matmul=1.1, softmax=1.2, memory=1.2, loss=1.5, dispatch=1.5, links=.9, launch=1.1)
    truth = {k: v[1] * other.get(k, 1.) for k, v in RATES.items()}
    rows = [{**r, "tok_p_s_per_npu": str(predict(r, rate=truth)["tokens_per_s"])} for r in read_runs(runs)]
    fitted = fit_rates(rows, trust=1e-4)
    for k in truth: assert fitted[k] == pytest.approx(truth[k], rel=.03), k


def test_parameters_of_published_rows(runs):
    "The table has its own count, of which ours knows nothing."
    for r in read_runs(runs):
        cfg = run_model(r)
        if cfg.num_experts and not cfg.mlp_gated: continue # our experts have a gate
        assert cfg.num_params() == pytest.approx(float(r["params_total"]), rel=.002), r["model"]
        assert run_layout(r).world == pytest.approx(float(r["world_size"]))


def test_scaling_curve(shared_data, runs):
    gpt = next(r for r in read_runs(runs) if r["model"] == "GPT3")
    speed = lambda n: predict({**gpt, "world_size": n, "global_batch_size": 1024 * n / 128, "distributed_optimizer": "1"})["tokens_per_s"]
    with open(shared_data / "throughput" / "gpt3_scaling.csv") as f:
        for r in csv.DictReader(f): assert abs(speed(int(r["npus"])) / speed(128) - float(r["linearity"])) < .03


