"""The planner's arithmetic against transformers' parameters, against what autograd keeps, and against published runs."""
import csv
import json
import warnings

import numpy as np
import pytest
import torch

from ascend_nb.agree import fetches
from ascend_nb.cli import main
from ascend_nb.config import MemoryConfig, RunConfig, TrainConfig
from ascend_nb.core import UserError
from ascend_nb.costs import Layout, count, held, in_flight, layer_kept, states
from ascend_nb.flops import flops_per_token
from ascend_nb.families import config_from_hf
from ascend_nb.goodput import best_interval, daly, goodput, simulate, young
from ascend_nb.hardware import DEVICES
from ascend_nb.layouts import allowed, broken_rules, measure_all, spread_choices
from ascend_nb.memory import save_memory
from ascend_nb.mesh import check
from ascend_nb.model import Decoder
from ascend_nb.parallel import CUTS
from ascend_nb.published import NEEDED, cross_validate, fit_rates, predict, read_runs, run_layout, run_model, summary
from ascend_nb.schema import load_yaml
from ascend_nb.shapes import ModelConfig
from ascend_nb.step_time import RATES, gathered, step_time
from ascend_nb.trainer import Weights

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


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_states_are_the_tensors_of_our_trainer(one_thread, dtype):
    cfg = ModelConfig(**SMALL)
    w = Weights(model := Decoder(cfg).init_weights(), TrainConfig(), torch.device("cpu"), dtype)
    model.hidden(torch.randint(0, 256, (1, 16))).float().sum().backward()
    w.clip(1.)
    grads = sum(p.grad.nbytes for p in w.named.values() if p.grad is not None)
    w.optimizer.step()
    P, B = cfg.num_params(), 4 if dtype == torch.float32 else 2
    moments = sum(t.nbytes for s in w.optimizer.state.values() for t in s.values() if t.dim())
    copy = 0 if dtype == torch.float32 else sum(p.nbytes for p in w.named.values())
    ours = states(P, 0, Layout(bytes=B))
    assert ours["weights"] == sum(p.nbytes for p in model.parameters())
    assert ours["gradients"] == pytest.approx(grads, rel=.02)
    assert ours["optimizer"] == pytest.approx(moments + copy, rel=.02)


def test_flops_are_those_that_torch_counts(one_thread):
    from torch.utils.flop_counter import FlopCounterMode
    cfg, S = ModelConfig(**{**SMALL, "tie_word_embeddings": False}), 16
    model = Decoder(cfg).init_weights()
    with FlopCounterMode(display=False) as counter: model(torch.randint(0, 256, (1, S))).sum().backward()
    scores = 12 * 3 * 8 * 32 * S * S
    assert counter.get_total_flops() - flops_per_token(cfg, S) * S == pytest.approx(0, abs=scores), "torch counts the blocks that it computes, we the causal half"


LLAMA = dict(model_type="llama", vocab_size=32000, hidden_size=4096, intermediate_size=11008, num_hidden_layers=32, num_attention_heads=32, num_key_value_heads=32, max_position_embeddings=4096)


@pytest.fixture
def config(tmp_path):
    (tmp_path / "config.json").write_text(json.dumps(LLAMA))
    return tmp_path / "config.json"


def plan(capsys, *args):
    code = main(["plan", *map(str, args), "--json"])
    out, err = capsys.readouterr()
    return code, json.loads(out) if out.strip() else None, err


def test_many_short_stages_gather_their_weights_again():
    "What the time of a step counts is what torch's schedule does, on average over the short stages."
    for pp, vpp, batches in ((4, 2, 32), (4, 3, 32), (4, 4, 4), (4, 4, 8), (4, 5, 32), (16, 5, 64), (4, 8, 64)):
        each = [sum(fetches(pp, vpp, batches, s)) / vpp for s in range(pp)]
        assert float(gathered(Layout(pp=pp, vpp=vpp, batches=batches))) == pytest.approx(np.mean(each), rel=.01)


def test_plan_writes_what_train_takes(capsys, tmp_path, config):
    out = tmp_path / "run.yaml"
    code, got, _ = plan(capsys, "--model", config, "--devices", 64, "--seq", 4096, "--global-batch", 512, "--out", out)
    assert code == 0 and got["fit"] > 0 and got["best"][0]["memory"] < 64 * 2**30
    run = load_yaml(RunConfig, out)
    assert run.model.num_params() == 6738415616
    p = run.parallel
    sizes = check(p, 64, model=run.model, seq_length=run.data.seq_length, micro_batches=run.train.accumulation(p.data_parallel_size(64)))
    assert (sizes.tp, sizes.pp, sizes.cp) == tuple(got["best"][0]["layout"][k] for k in ("tp", "pp", "cp"))
    capsys.readouterr()
    assert main(["train", "--config", str(out), "--print-config"]) == 0


def test_no_layout_was_forgotten():
    "Against every product of small sizes, asked one by one."
    cfg, n, batch = ModelConfig(vocab_size=512, hidden_size=128, intermediate_size=384, num_hidden_layers=4, num_attention_heads=4), 8, 16
    have = {(x.tp, x.pp, x.cp, x.vpp, x.micro, x.ring) for x in allowed(cfg, n, 256, batch, DEVICES["atlas-a2"])}
    want = set()
    for tp in range(1, 9):
        for pp in range(1, 9):
            for cp in range(1, 9):
                for vpp in range(1, 5):
                    for micro in (1, 2, 4, 8):
                        for ring in (False, True):
                            if n % (tp * pp * cp) or batch % (n // (tp * pp * cp) * micro) or 4 % (pp * vpp) or ring and cp == 1 or vpp > 1 and pp == 1: continue
                            dp = n // (tp * pp * cp)
                            x = Layout(tp=tp, pp=pp, cp=cp, vpp=vpp, dp=dp, micro=micro, batches=batch // (dp * micro), seq=256, ring=ring)
                            if not broken_rules(cfg, x): want.add((tp, pp, cp, vpp, micro, ring))
    assert have == want and len(want) > 20


def test_search_over_ten_thousand_devices_takes_seconds(capsys, shared_data):
    folder = shared_data / "configs" / "meta-llama--Meta-Llama-3.1-70B"
    code, got, _ = plan(capsys, "--model", folder, "--devices", 10000, "--seq", 8192, "--global-batch", 10000, "--out", "")
    assert code == 0 and got["searched"] > 10000 and got["seconds"] < 20


def test_together_or_alone_is_the_same():
    cfg, d = ModelConfig(**{**EXPERTS, "num_hidden_layers": 4}), DEVICES["atlas-a2"]
    rows = spread_choices(allowed(cfg, 16, 256, 32, d))
    m = measure_all(cfg, rows, d)
    for i in range(0, len(rows), max(1, len(rows) // 40)):
        assert m["seconds"][i] == pytest.approx(float(step_time(cfg, rows[i], d)["seconds"]))
        assert m["memory"][i] == pytest.approx(measure_all(cfg, [rows[i]], d)["memory"][0])


def test_what_does_not_fit_says_why_and_what_helps(capsys, config):
    fixed = ("--model", config, "--devices", 8, "--global-batch", 64, "--tp", 1, "--pp", 1, "--cp", 1, "--micro", 4, "--recompute", "none", "--zero", 1, "--out", "")
    code, got, _ = plan(capsys, *fixed)
    assert code == 2 and not got["best"] and "Stage 0 holds" in got["tight"]["why"] and got["tight"]["changes"]
    change = got["tight"]["changes"][0]["layout"]
    assert not broken_rules(ModelConfig(**LLAMA), Layout(**change)) and got["tight"]["changes"][0]["memory"] < 64 * 2**30 * .95


BAD = {
    "seven devices": (["--devices", "7"], "7 devices"),
    "unknown device": (["--device", "atlas-a9"], "To add one"),
    "tp beyond the heads": (["--tp", "64", "--devices", "64"], "num_attention_heads"),
    "no such file": (["--device-file", "/nowhere.yaml", "--device", "mine"], "/nowhere.yaml"),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_plans_are_one_sentence(capsys, config, case):
    args, said = BAD[case]
    code, got, err = plan(capsys, "--model", config, "--global-batch", 512, "--out", "", *args)
    assert code == 2 and got is None and said in err and len(err.strip().splitlines()) == 1


@pytest.mark.parametrize("key", ["hidden_size", "num_hidden_layers", "num_attention_heads", "vocab_size", "intermediate_size"])
def test_missing_sizes_are_named(capsys, tmp_path, key):
    (tmp_path / "config.json").write_text(json.dumps({k: v for k, v in LLAMA.items() if k != key}))
    code, _, err = plan(capsys, "--model", tmp_path, "--out", "")
    assert code == 2 and key in err


def test_a_batch_that_goes_with_the_devices_is_named(capsys, config):
    "Ten thousand devices hold a factor of 625 that no sample of 512 has; what is named works, and for a prime too."
    for devices, batches in ((10_000, (625,)), (7, (511, 518))):
        code, _, err = plan(capsys, "--model", config, "--devices", devices, "--global-batch", 512, "--seq", 8192, "--out", "")
        assert code == 2 and f"global batches work: {', '.join(map(str, batches))}." in err, err
        code, out, _ = plan(capsys, "--model", config, "--devices", devices, "--global-batch", batches[0], "--seq", 8192, "--out", "")
        assert out["searched"] > 0
    (config.parent / "huge.json").write_text(json.dumps(LLAMA | dict(hidden_size=10**9)))
    code, _, err = plan(capsys, "--model", config.parent / "huge.json", "--out", "")
    assert code == 2 and "hidden_size=1000000000" in err, "products of such sizes are no whole numbers of 64 bits any more"


def test_validate_takes_any_file_and_fits_nothing(capsys, tmp_path, runs):
    rows = read_runs(runs)
    halved = tmp_path / "half.csv"
    with open(halved, "w", newline="") as f:
        w = csv.DictWriter(f, list(rows[0])); w.writeheader()
        w.writerows({**r, "tok_p_s_per_npu": float(r["tok_p_s_per_npu"]) / 2, "mfu_flag": "impossible" if i == 0 else ""} for i, r in enumerate(rows))
    code, whole, _ = plan(capsys, "--validate", runs)
    assert code == 0 and list(whole) == ["rows", "median_error", "p90_error", "by_row"] and whole["rows"] == len(rows) == len(whole["by_row"]) and all(b["predicted"] for b in whole["by_row"])
    code, got, _ = plan(capsys, "--validate", halved)
    assert got["rows"] == len(rows) - 1 == len(got["by_row"]) - 1
    assert [b["predicted"] for b in got["by_row"]] == [b["predicted"] for b in whole["by_row"]], "predictions do not look at what was published"
    few = tmp_path / "few.csv"
    keep = [k for k in reversed(rows[0]) if k in NEEDED] # in another order, without what a run may lack
    def write(columns, end="\r\n"): few.write_bytes(b"\xef\xbb\xbf" + end.join([",".join(columns), *(",".join(r[k] for k in columns) for r in rows[:2])]).encode())
    write(keep)
    code, got, err = plan(capsys, "--validate", few)
    assert code == 0 and got["rows"] == 2 and "has no column" in err and "mla" in err and "recompute_effective" in err
    assert [b["predicted"] for b in got["by_row"]] == [round(predict({k: r[k] for k in keep})["tokens_per_s"], 1) for r in rows[:2]]
    write([k for k in keep if k != "tp"])
    code, _, err = plan(capsys, "--validate", few)
    assert code == 2 and "columns: tp" in err


SPELLED = dict(seq_length="4K", hidden_size="4,096", ffn_hidden_size=" 11008 ", padded_vocab_size="32000.0", world_size="8", swiglu="True", gated_mlp="yes", tok_p_s_per_npu="2884 tok/s", normalization="rmsnorm", mfu_flag=None)
STRANGE = {  # cells -> part of what is said of their row; none: it is predicted
    "as it is": ({}, None), "as people write": (SPELLED, None), "columns of its own": (dict(colour="red"), None), "a100": (dict(device="a100"), None), "A3": (dict(device="atlas-a3"), None), "another family": (dict(model="Yi", size=""), None),
    "device": (dict(device="tpu-v5"), "To add one"), "no size": (dict(hidden_size=""), "hidden_size=''"), "not published": (dict(tok_p_s_per_npu=""), "tok_p_s_per_npu=''"), "unit": (dict(tok_p_s_per_npu="3 tok/min"), "tok/min"), "zero": (dict(tok_p_s_per_npu="0"), "above 0"),
    "words": (dict(tp="eight"), "'eight'"), "negative": (dict(num_layers="-32"), "'-32'"), "endless": (dict(num_layers="1e8"), "at most"), "half": (dict(tp="2.5"), "whole number"), "nan": (dict(world_size="nan"), "'nan'"),
    "too few": (dict(pp="16"), "8 devices"), "too small a batch": (dict(global_batch_size="1", world_size="64"), "micro-batch"), "a flag": (dict(mla="七"), "'七'"), "no such heads": (dict(num_query_groups="5"), "num_key_value_heads"),
}


def test_rows_that_cannot_be_predicted_are_named_and_counted(capsys, tmp_path, runs):
    "A table of strangers: each row is predicted or says why not, and the rest is as before."
    llama = next(r for r in read_runs(runs) if (r["model"], r["size"]) == ("LLaMA2", "7B"))
    strange = tmp_path / "strange.csv"
    with open(strange, "w", newline="", encoding="utf-8-sig") as f:
        w = csv.DictWriter(f, [*llama, "device", "colour"], restval=""); w.writeheader()
        w.writerows({**llama, **cells} for cells, _ in STRANGE.values())
    code, got, err = plan(capsys, "--validate", strange)
    bad = sum(said is not None for _, said in STRANGE.values())
    assert code == 0 and not err and got["rows"] == len(STRANGE) - bad and len(got["by_row"]) == len(STRANGE)
    for (name, (_, said)), b in zip(STRANGE.items(), got["by_row"], strict=True): assert (b["error"] is None and said in b["why"]) if said else (b["error"] is not None and "why" not in b), (name, b)
    assert got["by_row"][0]["predicted"] == got["by_row"][1]["predicted"] != got["by_row"][3]["predicted"] and got["by_row"][1]["published"] == 2884
    assert sum(b["predicted"] is None for b in got["by_row"]) == bad - 3, "what is predicted and has no figure of its own is told too"
    assert main(["plan", "--validate", str(strange)]) == 0 and f"{bad} rows are not counted" in capsys.readouterr().out
    with open(strange, "w", newline="") as f: w = csv.DictWriter(f, list(llama)); w.writeheader(); w.writerow({**llama, "tp": ""})
    code, got, _ = plan(capsys, "--validate", strange)
    assert code == 2 and got["rows"] == 0 and got["median_error"] is None


@pytest.mark.parametrize("save, between", [(60., 12000.), (0., 12000.), (1e-9, 1e4), (60., 1e-3), (1e6, 1e3), (5., 1e12), (300., 600.)])
def test_the_best_interval_at_extremes(save, between):
    "No interval of a fine search beats it; near Young's and Daly's where a save is short, never above the mean time between failures."
    best, tried = best_interval(save, between), between * np.geomspace(1e-9, 3, 3000)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert 0 <= best <= between and float(goodput(best, save, between, 600.)) >= goodput(tried, save, between, 600.).max() * (1 - 1e-9)
    if save < between / 100: assert best == pytest.approx(daly(save, between), rel=1e-4) and best == pytest.approx(young(save, between), rel=.1)
    if save >= 2 * between: assert best == pytest.approx(daly(save, between), rel=.2), "Daly's own limit"


def test_a_run_that_would_never_end_is_refused():
    with pytest.raises(UserError, match="come too seldom"): simulate(60., 60., 1., 600., 3600.)


@pytest.mark.parametrize("save, between, restart", [(60., 12000., 600.), (5., 1800., 60.), (300., 3600., 900.)])
def test_goodput_formula_against_drawn_failures(save, between, restart):
    every = best_interval(save, between)
    drawn = np.mean([simulate(every, save, between, restart, 400 * between, seed=s)["goodput"] for s in range(5)])
    assert drawn == pytest.approx(float(goodput(every, save, between, restart)), abs=.015)
    for other in (every / 4, every * 4): assert simulate(other, save, between, restart, 400 * between)["goodput"] < drawn
    assert daly(save, between) == pytest.approx(every, rel=.05) and young(save, between) == pytest.approx(every, rel=.5)
