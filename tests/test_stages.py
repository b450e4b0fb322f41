"""The stages that learn from pairs, through `train`: losses and steps of trl, the reference's file, going on bit for bit, reward models in transformers, mistakes."""
import gc
import json
import os
import random
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from here import ascend
from safetensors.numpy import load_file
from test_training import StopAt, contents, equal

from ascend_nb import stages, training
from ascend_nb.checkpoint import RunDir
from ascend_nb.config import DataConfig, ModelConfig, ParallelConfig, RunConfig, TrainConfig
from ascend_nb.core import UserError
from ascend_nb.families import FAMILIES
from ascend_nb.model import Decoder
from ascend_nb.preference import METRICS
from ascend_nb.profiling import USED
from ascend_nb.reference import read_reference
from ascend_nb.reward import WITHOUT, check_reward
from ascend_nb.schema import dump_yaml
from ascend_nb.tuning import TuneConfig

os.environ.setdefault("TRL_EXPERIMENTAL_SILENCE", "1")
pytestmark = pytest.mark.usefixtures("one_thread")
SHAPE = dict(hidden_size=32, num_hidden_layers=2, num_attention_heads=2, num_key_value_heads=1, max_position_embeddings=256, initializer_range=.1)
STEPS = 12


@pytest.fixture(scope="module")
def pairs(tmp_path_factory):
    "A raw file: where somebody lives, and where not."
    rng, rows = random.Random(0), []
    for i in range(48):
        who, where, other = rng.choice(["Jonas", "Viktor", "Mara"]), *rng.sample(["in Net Alley", "at the old bridge", "behind the mill, up the hill"], 2)
        rows.append(dict(instruction=f"Where does {who} live ({i})?", chosen=f"{who} lives {where}.", rejected=f"I think {other}, or somewhere else."))
    path = tmp_path_factory.mktemp("pairs") / "homes.json"
    path.write_text(json.dumps(rows))
    return path


@pytest.fixture
def config(pairs, samples, tmp_path):
    "Make a RunConfig: config('run', 'dpo', dict(dpo_beta=.5), lr=…)."
    def make(save="run", stage="dpo", tune=None, model=None, data=None, **train):
        d = dict(data_path=[str(pairs)], data_cache_path=str(pairs.parent / "cache"), tokenizer_name_or_path=str(samples / "tokenizer"), seq_length=128, split="75,25,0")
        t = dict(save=str(tmp_path / save), stage=stage, train_iters=STEPS, micro_batch_size=2, global_batch_size=4, lr=2e-3, device="cpu", save_interval=4, eval_interval=4, eval_iters=3)
        return RunConfig(ModelConfig(**{**SHAPE, **(model or {})}), DataConfig(**{**d, **(data or {})}), train=TrainConfig(**{**t, **train}), tune=TuneConfig(**(tune or {})))
    return make


def rows(cfg): return [r for r in RunDir(cfg.train.save).rows() if "loss" in r]


def broken_off(cfg, step):
    "A run that was stopped."
    job = training.build(cfg, callbacks=[StopAt(step)])
    with job.run.lock():
        training.save_yaml(job.cfg, job.run.config_path)
        if job.plan: training.write_base(job.run.path, job.plan, job.cfg.train.load)
        training._fit(job)
    assert job.run.latest() == step
    return job


# Runs ---------------------------------------------------------------------------------------------

@pytest.mark.parametrize("stage", ["dpo", "simpo", "orpo", "rm"])
def test_a_stage_learns_and_says_so(config, stage):
    cfg = config(stage=stage, tune=dict(dpo_beta=.5))
    out = training.run(cfg, json=True)
    first, last = rows(cfg)[0], rows(cfg)[-1]
    if stage == "dpo": assert first["loss"] == pytest.approx(np.log(2), abs=1e-5) and first["margin"] == pytest.approx(0, abs=1e-4)
    assert last["margin"] > first["margin"] + .05 and last["valid_accuracy"] > .9 and out["valid_loss"] < first["loss"]
    assert {k: out[k] for k in METRICS} == {k: last[k] for k in METRICS} and out["valid_margin"] == last["valid_margin"]
    assert last["trained_tokens"] == 4 and last["consumed_samples"] == 4 * STEPS
    assert (RunDir(cfg.train.save).path / "reference.safetensors").exists() == (stage == "dpo")


@pytest.mark.parametrize(("stage", "tune"), [("dpo", dict(pref_ftx=.3, dpo_label_smoothing=.1)), ("rm", {})])
def test_stopped_and_gone_on_is_undisturbed(config, stage, tune, monkeypatch):
    a, b = config("a", stage, tune), config("b", stage, tune)
    training.run(a, json=True)
    broken_off(b, 7)
    monkeypatch.setattr(training, "ask_reference", lambda *args: pytest.fail("asked again"))
    torch.manual_seed(99)
    training.run(b, json=True)
    assert equal(RunDir(a.train.save).step_path(STEPS), RunDir(b.train.save).step_path(STEPS)) > 20
    assert equal(RunDir(a.train.save).hf_path, RunDir(b.train.save).hf_path) > 10
    kept = lambda cfg: [{k: v for k, v in r.items() if k not in ("time", "tokens_per_s", *USED)} for r in rows(cfg)]  # noqa: E731
    assert kept(a) == kept(b) and len(kept(a)) == STEPS


def test_rows_tell_the_means_of_all_pairs_since_the_last_one(config):
    a, b = config("a"), config("b", log_interval=4)
    for cfg in (a, b): training.run(cfg, json=True)
    for i, r in enumerate(rows(b)):
        for k in METRICS: assert r[k] == pytest.approx(np.mean([x[k] for x in rows(a)[4 * i:4 * i + 4]]), abs=1e-6)
    assert len(rows(b)) == 3


# The reference ------------------------------------------------------------------------------------

def test_a_lost_file_is_made_again_from_the_model_that_the_run_began_with(config):
    a, b = config("a"), config("b")
    training.run(a, json=True)
    broken_off(b, 5)
    path = RunDir(b.train.save).path / "reference.safetensors"
    old = path.read_bytes()
    path.unlink()
    training.run(b, json=True)
    assert path.read_bytes() == old and [r["loss"] for r in rows(a)] == [r["loss"] for r in rows(b)]


def test_a_file_of_another_model_is_refused_when_a_run_goes_on_and_passed_over_when_it_begins(config):
    base, more = (training.run(config(n, stage="simpo", seed=s, train_iters=1), json=True)["hf"] for n, s in (("base", 1), ("more", 2)))
    cfg, other = config(load=base, model=dict(hidden_size=32)), config("other", load=more)
    broken_off(cfg, 5)
    mine = RunDir(cfg.train.save).path / "reference.safetensors"
    training.run(other, json=True)
    theirs = RunDir(other.train.save).path / "reference.safetensors"
    good = mine.read_bytes()
    mine.write_bytes(theirs.read_bytes())
    with pytest.raises(UserError, match="made with other model;"): training.run(cfg, json=True)
    mine.write_bytes(good[:-7])
    with pytest.raises(UserError, match="cannot be read as reference numbers"): training.run(cfg, json=True)
    mine.write_bytes(good)
    assert training.run(cfg, json=True)["steps"] == STEPS
    fresh = config("fresh", load=base)
    Path(fresh.train.save).mkdir()
    (Path(fresh.train.save) / "reference.safetensors").write_bytes(theirs.read_bytes())
    assert training.run(fresh, json=True)["first_loss"] == pytest.approx(np.log(2), abs=1e-5)
    assert (Path(fresh.train.save) / "reference.safetensors").read_bytes() == good


def test_another_validation_asks_about_the_pairs_that_are_new(config):
    cfg = config(eval_iters=1)
    broken_off(cfg, 5)
    more = replace(cfg, train=replace(cfg.train, eval_iters=3))
    training.run(more, json=True)
    whole = config("whole", eval_iters=3)
    training.run(whole, json=True)
    assert rows(more)[-1]["valid_loss"] == rows(whole)[-1]["valid_loss"]


def test_ref_model_is_the_reference(config):
    "The first loss is that of the two models' numbers, which transformers computes."
    from transformers import AutoModelForCausalLM
    base, ref = (training.run(config(n, stage="simpo", seed=s, train_iters=1), json=True)["hf"] for n, s in (("base", 1), ("ref", 2)))
    cfg = config(load=base, tune=dict(ref_model=ref, dpo_beta=.3), train_iters=1, eval_interval=0)
    got = training.run(cfg, json=True)["first_loss"]
    resolved, tok = training.resolve(cfg)
    loader, models, losses = training.loaders(resolved, tok)["train"], [AutoModelForCausalLM.from_pretrained(x) for x in (base, ref)], []
    for _ in range(2):
        b, sums = next(loader), []
        for m in models:
            with torch.no_grad(): logps = m(b.input_ids).logits.log_softmax(-1)
            keep = b.labels != -100
            sums.append((logps.gather(-1, b.labels.clamp(min=0)[..., None])[..., 0] * keep).sum(1).view(2, -1))
        d = sums[0] - sums[1]
        losses.append(-torch.nn.functional.logsigmoid(.3 * (d[0] - d[1])))
    assert got == pytest.approx(torch.cat(losses).mean().item(), abs=1e-5) and abs(got - np.log(2)) > .01


def test_lora_needs_no_second_model(config):
    "A new adapter changes nothing: the numbers are those of the model alone. One to go on with is part of what the run begins with, as trl copies it; `ref_model` names the model without it."
    base = training.run(config("base", stage="simpo", train_iters=1), json=True)["hf"]
    full, lora = config("full", load=base, train_iters=1), config("lora", load=base, tune=dict(lora_target_modules=["all-linear"], lora_r=4, dpo_beta=.5), lr=1e-2)
    for cfg in (full, lora): training.run(cfg, json=True)
    a, b = (RunDir(c.train.save).path for c in (full, lora))
    few, many = (read_reference(p / "reference.safetensors", {}, {}) is not None and load_file(p / "reference.safetensors") for p in (a, b))
    at = np.isin(many["train.0.pairs"], few["train.0.pairs"])
    assert np.array_equal(many["train.0.logps"][at], few["train.0.logps"]) and at.sum() == 4
    assert rows(lora)[0]["loss"] == pytest.approx(np.log(2), abs=1e-5) and rows(lora)[-1]["margin"] > .1
    more = config("more", load=base, tune=dict(lora_load=str(b / "adapter"), dpo_beta=.5), train_iters=1)
    assert training.run(more, json=True)["first_loss"] == pytest.approx(np.log(2), abs=1e-5)
    apart = config("apart", load=base, tune=dict(lora_load=str(b / "adapter"), ref_model=base, dpo_beta=.5), train_iters=1)
    assert training.run(apart, json=True)["margin"] > .1


class CountModels:
    "How many decoders there are at each step that were not there before."
    order = 90
    def __init__(self): self.old, self.seen = self.all(), []
    def all(self): gc.collect(); return [x for x in gc.get_objects() if issubclass(type(x), Decoder)]
    def after_update(self, t): self.seen.append(sum(not any(m is o for o in self.old) for m in self.all()))


@pytest.mark.parametrize("kind", ["lora", "ref_model"])
def test_one_model_is_in_memory_while_training(config, kind):
    "With an adapter, and where another model was the reference: it has been asked and is gone."
    base = training.run(config("base", stage="simpo", train_iters=1), json=True)["hf"]
    tune = dict(lora_target_modules=["all-linear"], lora_r=4) if kind == "lora" else dict(ref_model=base)
    count = CountModels()
    job = training.build(config(load=base, tune=tune, train_iters=3), callbacks=[count])
    with job.run.lock(): training._fit(job)
    assert count.seen == [1, 1, 1] and (job.run.path / "reference.safetensors").exists()


def test_lora_goes_on_with_the_file_too(config):
    tune = dict(lora_target_modules=["q_proj", "v_proj"], lora_r=4, lora_dropout=.2)
    base = training.run(config("base", stage="simpo", train_iters=1), json=True)["hf"]
    a, b = config("a", load=base, tune=tune), config("b", load=base, tune=tune)
    training.run(a, json=True)
    broken_off(b, 5)
    (RunDir(b.train.save).path / "reference.safetensors").unlink()
    training.run(b, json=True)
    assert [(r["loss"], r["margin"]) for r in rows(a)] == [(r["loss"], r["margin"]) for r in rows(b)]


def test_the_file_is_read_by_name_alone(config):
    cfg = config(train_iters=1)
    training.run(cfg, json=True)
    path = RunDir(cfg.train.save).path / "reference.safetensors"
    assert read_reference(path.parent / "nothing", {}, {}) is None and read_reference(path, {}, {}) == {}


# trl ----------------------------------------------------------------------------------------------

def trl_trainer(folder, ref, tmp, rows_, tokenizer, **kw):
    "trl's DPOTrainer on a folder of ours, its pairs as ids in our order."
    from datasets import Dataset
    from transformers import AutoModelForCausalLM, AutoTokenizer
    from trl import DPOConfig, DPOTrainer
    args = DPOConfig(output_dir=str(tmp), use_cpu=True, bf16=False, report_to=[], disable_tqdm=True, gradient_checkpointing=False, max_length=None, save_strategy="no", **kw)
    texts = Dataset.from_list([dict(prompt="a", chosen=" b", rejected=" c")] * len(rows_))
    load = lambda f: AutoModelForCausalLM.from_pretrained(f, attn_implementation="eager")  # noqa: E731
    trainer = DPOTrainer(load(folder), load(ref), args, train_dataset=texts, processing_class=AutoTokenizer.from_pretrained(tokenizer))
    trainer.train_dataset = Dataset.from_list(rows_)
    return trainer


def as_rows(batch):
    "Our batch as rows of trl's: a question and two answers, in ids."
    def side(i):
        labels, ids = batch.labels[i].tolist(), batch.input_ids[i].tolist()
        at = [k for k, y in enumerate(labels) if y != -100]
        return ids[:at[0] + 1], [labels[k] for k in at]
    n = batch.num_targets
    return [dict(prompt_ids=side(i)[0], chosen_ids=side(i)[1], rejected_ids=side(n + i)[1]) for i in range(n)]


@pytest.fixture
def two_models(config):
    "Folders of a model to train and of its reference."
    return tuple(training.run(config(n, stage="simpo", seed=s, train_iters=1, eval_interval=0), json=True)["hf"] for n, s in (("base", 1), ("ref", 2)))


@pytest.mark.parametrize("kind", ["sigmoid", "hinge", "ipo"])
def test_the_loss_of_a_run_equals_trl(config, two_models, samples, tmp_path, kind):
    base, ref = two_models
    cfg = config(load=base, tune=dict(ref_model=ref, dpo_loss_type=kind, dpo_beta=.3), train_iters=1, micro_batch_size=4, eval_interval=0)
    got = training.run(cfg, json=True)
    batch = next(training.loaders(*training.resolve(cfg))["train"])
    them = trl_trainer(base, ref, tmp_path / "trl", as_rows(batch), samples / "tokenizer", loss_type=[kind], beta=.3)
    them.model.train()
    want = them.compute_loss(them.model, them.data_collator(as_rows(batch)))
    m = {k: v[-1] for k, v in them._metrics["train"].items()}
    assert abs(got["first_loss"] - want.item()) < 1e-5
    for name, theirs in (("chosen_reward", "rewards/chosen"), ("rejected_reward", "rewards/rejected"), ("margin", "rewards/margins"), ("accuracy", "rewards/accuracies")):
        assert abs(got[name] - m[theirs]) < 1e-4, name


@pytest.mark.parametrize("stage", ["simpo", "orpo", "dpo"])
def test_losses_without_a_trainer_of_their_own_equal_trl(config, two_models, stage):
    "SimPO and ORPO without reference, DPO with label smoothing: trl's formulas on transformers' numbers."
    from types import SimpleNamespace

    from transformers import AutoModelForCausalLM
    from trl.experimental.cpo import CPOTrainer
    from trl.experimental.orpo import ORPOTrainer
    base, ref = two_models
    tune = dict(simpo=dict(simpo_beta=1.5, gamma_beta_ratio=.4, simpo_label_smoothing=.2), orpo=dict(orpo_beta=.4), dpo=dict(dpo_beta=.7, dpo_label_smoothing=.2, ref_model=ref, pref_ftx=.5))[stage]
    cfg = config(stage=stage, load=base, tune=tune, train_iters=1, micro_batch_size=4, eval_interval=0)
    got = training.run(cfg, json=True)["first_loss"]
    b = next(training.loaders(*training.resolve(cfg))["train"])
    def sums(folder):
        with torch.no_grad(): logps = AutoModelForCausalLM.from_pretrained(folder)(b.input_ids).logits.log_softmax(-1)
        keep = b.labels != -100
        return (logps.gather(-1, b.labels.clamp(min=0)[..., None])[..., 0] * keep).sum(1), keep.sum(1)
    (s, n), four = sums(base), 4
    c, r = s[:four], s[four:]
    them = SimpleNamespace(alpha=0., loss_type="sigmoid" if stage == "dpo" else "simpo", label_smoothing=.2, beta=dict(dpo=.7, simpo=1.5, orpo=.4)[stage], simpo_gamma=.6, accelerator=SimpleNamespace(device="cpu"))
    if stage == "orpo":
        ratio = ORPOTrainer.odds_ratio_loss(them, c / n[:four], r / n[four:])[0]
        want = (-c / n[:four]).mean() - ratio.mean()
    elif stage == "simpo": want = CPOTrainer.cpo_loss(them, c / n[:four], r / n[four:])[0].mean()
    else:
        d = s - sums(ref)[0]
        want = CPOTrainer.cpo_loss(them, d[:four], d[four:])[0].mean() - .5 * (c / n[:four]).mean()
    assert abs(got - want.item()) < 1e-5


def test_five_steps_of_trls_trainer(config, two_models, samples, tmp_path):
    "The same pairs in the same order, the same AdamW and schedule: loss and rewards of every step."
    base, ref = two_models
    cfg = config(load=base, tune=dict(ref_model=ref, dpo_beta=.3), train_iters=5, micro_batch_size=4, eval_interval=0, lr=1e-3, lr_decay_style="linear", weight_decay=0.,
                 adam_beta2=.999, data=dict(shuffle=False))
    training.run(cfg, json=True)
    loader = training.loaders(*training.resolve(cfg))["train"]
    data = [row for _ in range(5) for row in as_rows(next(loader))]
    them = trl_trainer(base, ref, tmp_path / "trl", data, samples / "tokenizer", loss_type=["sigmoid"], beta=.3, per_device_train_batch_size=4, max_steps=5, learning_rate=1e-3,
                       lr_scheduler_type="linear", warmup_steps=0, weight_decay=0., adam_beta1=.9, adam_beta2=.999, max_grad_norm=1., logging_steps=1, optim="adamw_torch", train_sampling_strategy="sequential")
    them.train()
    log, mine = [r for r in them.state.log_history if "rewards/chosen" in r], rows(cfg)
    assert len(log) == len(mine) == 5 and abs(log[0]["loss"] - log[-1]["loss"]) > .05
    for ours, theirs in zip(mine, log, strict=True):
        assert abs(ours["lr"] - theirs["learning_rate"]) < 1e-9
        for name, k in (("loss", "loss"), ("chosen_reward", "rewards/chosen"), ("rejected_reward", "rewards/rejected"), ("margin", "rewards/margins")):
            assert abs(ours[name] - theirs[k]) < 1e-4 * max(1, abs(theirs[k])), (ours["step"], name)


# Reward models ------------------------------------------------------------------------------------

@pytest.mark.parametrize("family", [dict(), dict(model_type="qwen2", attention_bias=True), dict(model_type="gpt2", norm_type="layernorm", mlp_gated=False, hidden_act="gelu_pytorch_tanh", position_embedding="learned",
                                                mlp_bias=True, attention_bias=True, attention_out_bias=True, num_key_value_heads=2)], ids=lambda d: d.get("model_type", "llama"))
def test_transformers_opens_the_reward_model_with_the_same_scores(config, family):
    from transformers import AutoModelForSequenceClassification
    cfg = config(stage="rm", model=family, train_iters=3, eval_interval=3, eval_iters=2)
    out = training.run(cfg, json=True)
    model = AutoModelForSequenceClassification.from_pretrained(out["hf"])
    assert model.config.num_labels == 1 and model.training is False
    resolved, tok = training.resolve(cfg)
    loader, scores = training.loaders(resolved, tok)["valid"], []
    for _ in range(2):
        with torch.no_grad(): scores.append(model(next(loader).input_ids).logits[:, 0].view(2, -1))
    c, r = torch.cat(scores, 1)
    assert out["valid_loss"] == pytest.approx(-torch.nn.functional.logsigmoid(c - r).mean().item(), abs=1e-5)
    assert out["valid_chosen_reward"] == pytest.approx(c.mean().item(), abs=1e-5) and out["valid_rejected_reward"] == pytest.approx(r.mean().item(), abs=1e-5)
    assert "score.weight" in contents(out["hf"])[0] and abs(c - r).min() > 1e-4


def test_the_families_without_a_class_are_those_of_transformers():
    from transformers.models.auto.modeling_auto import MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING_NAMES as NAMES
    assert [k for k in FAMILIES if k not in NAMES] == WITHOUT
    from ascend_nb.reward import _class
    for k in FAMILIES:
        if k in WITHOUT: continue
        assert _class(ModelConfig(model_type=k)) == NAMES[k]
    with pytest.raises(UserError, match="chatglm"): check_reward(ModelConfig(model_type="chatglm"))


# Mistakes -----------------------------------------------------------------------------------------

def test_a_mistake_is_one_sentence_and_nothing_is_written(config, pairs, samples, tmp_path):
    alone = tmp_path / "alone.json"
    alone.write_text(json.dumps([dict(instruction="a", chosen="b", rejected="c")] * 3 + [dict(instruction="a", chosen="b")]))
    for kw, word in [
        (dict(data=dict(data_path=[str(alone)])), "Found no answer in column 'rejected' of row 4 of alone.json"),
        (dict(stage="sft"), "which is for stage=dpo|simpo|orpo|rm; you asked for stage=sft"),
        (dict(data=dict(data_path=[str(samples / "instruct.json")])), "which is for stage=sft; you asked for stage=dpo"),
        (dict(data=dict(packing=True)), "packing with stage=dpo"),
        (dict(tune=dict(dpo_beta=0)), "beta=0"),
        (dict(tune=dict(dpo_loss_type="hinge", dpo_label_smoothing=.1)), "label_smoothing=0.1 with loss=hinge"),
        (dict(tune=dict(ref_model=str(tmp_path / "nowhere"))), "nowhere"),
        (dict(stage="rm", tune=dict(lora_target_modules=["q_proj"])), "lora_target_modules with stage=rm"),
        (dict(stage="rm", model=dict(model_type="baichuan", num_key_value_heads=2)), "sequence classification"),
    ]:
        cfg = config("mistake", **kw)
        with pytest.raises(UserError) as e: training.run(cfg, json=True)
        assert word in str(e.value) and "\n" not in str(e.value), (kw, str(e.value))
        assert not Path(cfg.train.save).exists(), kw
    for kw, word in [(dict(parallel=ParallelConfig(context_parallel_size=2)), "context_parallel_size=2 with stage=rm"), (dict(parallel=ParallelConfig(pipeline_model_parallel_size=2)), "pipeline_model_parallel_size=2 with stage=rm")]:
        with pytest.raises(UserError, match=word): stages.check_stage(replace(config(stage="rm"), **kw))


def test_the_command_line_exits_with_2_and_names_idle_knobs(config, tmp_path):
    (tmp_path / "c.yaml").write_text(dump_yaml(config(train_iters=1, tune=dict(gamma_beta_ratio=.5))))
    said = ascend("train", "--config", tmp_path / "c.yaml", "--json")
    assert said.returncode == 0 and json.loads(said.stdout)["accuracy"] is not None, said.stderr
    assert all(w in said.stderr for w in ("note      gamma_beta_ratio has no effect with stage=dpo", "Reference", "pairs of answers of at most 128 tokens")), said.stderr
    (tmp_path / "c.yaml").write_text(dump_yaml(config("bad", data=dict(packing=True))))
    bad = ascend("train", "--config", tmp_path / "c.yaml", "--json")
    assert bad.returncode == 2 and len(bad.stderr.strip().splitlines()) == 1 and not bad.stdout and not (tmp_path / "bad").exists()


def test_a_step_that_is_not_finite_names_its_pair(config):
    "The guards look at pairs one by one."
    cfg = config(train_iters=3)
    job = training.build(cfg)
    job.reference.ready or stages.ask_reference(job.reference, cfg, job.trainer, training.weights)
    bad = int(job.trainer.loader.dataset.index[1])
    job.trainer.loader.dataset.numbers[bad] = np.nan
    with pytest.raises(UserError, match="in samples 1;") as e: job.trainer.fit()
    kept = [json.loads(x) for x in next((Path(cfg.train.save) / "bad_batch").iterdir()).read_text().splitlines()]
    assert [r["sample"] for r in kept] == [0, 1, 0, 1] and "loss" in str(e.value)
