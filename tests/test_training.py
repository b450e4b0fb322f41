"""Whole runs through the command line: the promise of resuming, the finished model, and every mistake before anything is written."""
import json
import os
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import yaml
from here import ascend
from safetensors import safe_open
from transformers import AutoModelForCausalLM, AutoTokenizer

from ascend_nb import preprocess, training
from ascend_nb.callbacks import shown
from ascend_nb.checkpoint import RunDir
from ascend_nb.config import DataConfig, ModelConfig, ParallelConfig, PreprocessConfig, RunConfig, TrainConfig
from ascend_nb.core import UserError
from ascend_nb.schema import dump_yaml, from_dict
from ascend_nb.tokenizers import load_tokenizer
from ascend_nb.trainer import Callback

STEPS = 60


pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(scope="module")
def data(samples, tmp_path_factory):
    "The samples as token files."
    out, job = tmp_path_factory.mktemp("data"), dict(tokenizer_name_or_path=str(samples / "tokenizer"))
    preprocess.run(PreprocessConfig(input=str(samples / "tales.jsonl"), output_prefix=f"{out}/tales", append_eod=True, **job), json=True)
    preprocess.run(PreprocessConfig(input=str(samples / "instruct.json"), output_prefix=f"{out}/instruct",
                                    handler_name="AlpacaStyleInstructionHandler", **job), json=True)
    return out


@pytest.fixture
def config(data, samples, tmp_path):
    "Make a RunConfig: config('run', stage='sft', lr=…)."
    def make(save="run", stage="pretrain", model=None, data_=None, **train):
        shape = dict(hidden_size=48, num_hidden_layers=2, num_attention_heads=2, num_key_value_heads=1, max_position_embeddings=256)
        prefix = f"{data}/tales_text_document" if stage == "pretrain" else f"{data}/instruct"
        d = dict(data_path=[prefix], tokenizer_name_or_path=str(samples / "tokenizer"), seq_length=64 if stage == "pretrain" else 256, split="90,10,0")
        t = dict(save=str(tmp_path / save), stage=stage, train_iters=STEPS, micro_batch_size=2, global_batch_size=4, lr=3e-3, lr_warmup_fraction=.1, device="cpu")
        return RunConfig(ModelConfig(**{**shape, **(model or {})}), DataConfig(**{**d, **(data_ or {})}), train=TrainConfig(**{**t, **train}))
    return make


def start(cfg, path):
    "`ascend_nb train` in a process of its own, with one thread so that two machines' worth of tests agree."
    path.write_text(dump_yaml(cfg))
    env = {**os.environ, "OMP_NUM_THREADS": "1"}
    return subprocess.Popen([sys.executable, "-c", "import sys; from ascend_nb.cli import main; sys.exit(main())", "train", "--config", str(path), "--json"], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=env)


def finish(p):
    out, err = p.communicate(timeout=300)
    return p.returncode, json.loads(out) if out.strip() else None, err


def wait_for(p, run, step):
    "Until the run has logged this step."
    while not any(r.get("step", 0) >= step and "loss" in r for r in run.rows()):
        assert p.poll() is None, p.stderr.read()
        time.sleep(.005)


def contents(folder):
    "Every tensor of a folder of safetensors, and its JSON state."
    out = {}
    for f in sorted(Path(folder).glob("*.safetensors")):
        with safe_open(f, "pt") as g: out |= {k: g.get_tensor(k) for k in g.keys()}  # noqa: SIM118
    state = Path(folder) / "state.json"
    return out, json.loads(state.read_text()) if state.exists() else None


def equal(a, b):
    (x, sx), (y, sy) = contents(a), contents(b)
    assert x.keys() == y.keys() and sx == sy
    assert [k for k in x if not torch.equal(x[k], y[k])] == []
    return len(x)


def rows(run): return [{k: r[k] for k in ("step", "loss", "lr", "grad_norm", "trained_tokens", "consumed_samples")} for r in run.rows() if "loss" in r]


def disturb(run, cfg, path, at, sig):
    "Start, send a signal after step `at`, and check what the process left."
    p = start(cfg, path)
    wait_for(p, run, at)
    p.send_signal(sig)
    code, out, err = finish(p)
    if sig == signal.SIGKILL:
        assert code == -9 and run.latest() % cfg.train.save_interval == 0 and run.latest() > at - 2 * cfg.train.save_interval
    else:
        assert code == 128 + sig and out["stopped"] == sig.name and out["hf"] is None and f"{sig.name}: finishing step" in err, err
        assert at <= out["steps"] < STEPS and run.latest() == out["steps"] and not run.hf_path.exists()


def same_runs(a, b, resumed):
    "Two finished runs agree in every bit: last step, exported model, metrics."
    assert equal(a.step_path(STEPS), b.step_path(STEPS)) > 50 and equal(a.hf_path, b.hf_path) > 10
    assert rows(a) == rows(b) and [r["step"] for r in rows(b)] == list(range(1, STEPS + 1))
    events = [r for r in b.rows() if "event" in r]
    assert [e["event"] for e in events] == ["start", *["resume"] * resumed] and events[0]["total_steps"] == STEPS
    assert len(b.steps()) == 2 and not list(b.path.glob(".*.tmp-*"))


@pytest.mark.parametrize(("stage", "signals"), [("pretrain", [(8, signal.SIGINT), (30, signal.SIGKILL)]), ("sft", [(20, signal.SIGTERM)])])
def test_interrupted_and_resumed_is_uninterrupted(config, tmp_path, stage, signals):
    "Each part in a process of its own, with micro-batches: at the end the run is bit for bit the one that nobody disturbed."
    cfg, cfg2 = config("whole", stage, save_interval=20), config("broken", stage, save_interval=7)
    out = training.run(cfg, json=True)
    assert out["steps"] == STEPS and out["loss"] < out["first_loss"] - .5
    for at, sig in signals: disturb(RunDir(cfg2.train.save), cfg2, tmp_path / "broken.yaml", at, sig)
    training.run(cfg2, json=True)
    same_runs(RunDir(cfg.train.save), RunDir(cfg2.train.save), len(signals))


@pytest.mark.slow
@pytest.mark.parametrize("stage", ["pretrain", "sft"])
@pytest.mark.parametrize("kw", [dict(), dict(dtype="bf16"), dict(dtype="fp16")], ids=["fp32", "bf16", "fp16"])
def test_three_interruptions_by_the_command_line_alone(config, tmp_path, stage, kw):
    "SIGINT, SIGTERM and kill -9 in a row; the undisturbed run is a process as well."
    cfg, cfg2 = config("whole", stage, save_interval=20, **kw), config("broken", stage, save_interval=7, **kw)
    assert finish(start(cfg, tmp_path / "whole.yaml"))[0] == 0
    for at, sig in ((8, signal.SIGINT), (22, signal.SIGTERM), (37, signal.SIGKILL)): disturb(RunDir(cfg2.train.save), cfg2, tmp_path / "broken.yaml", at, sig)
    code, out, err = finish(start(cfg2, tmp_path / "broken.yaml"))
    assert code == 0 and "going on from step" in err, err
    same_runs(RunDir(cfg.train.save), RunDir(cfg2.train.save), 3)


def test_the_finished_model_opens_in_transformers(config, samples):
    "RUN/hf: transformers computes the loss that was logged, with the tokenizer and its chat template beside it."
    cfg = config(train_iters=3, eval_interval=3, eval_iters=2)
    out = training.run(cfg, json=True)
    assert set(out) >= {"run", "steps", "loss", "first_loss", "valid_loss", "hf", "tokens_per_s"} and out["steps"] == 3
    hf, tok = AutoModelForCausalLM.from_pretrained(out["hf"]), AutoTokenizer.from_pretrained(out["hf"])
    resolved, ours = training.resolve(cfg)
    valid, total, n = training.loaders(resolved, ours)["valid"], 0., 0
    for _ in range(2):
        b = next(valid)
        with torch.no_grad(): logits = hf(b.input_ids).logits
        total += float(torch.nn.functional.cross_entropy(logits.flatten(0, 1), b.labels.flatten(), reduction="sum"))
        n += b.num_targets
    assert out["valid_loss"] == pytest.approx(total / n, rel=1e-5)
    chat = [dict(role="user", content="Who keeps a cat?")]
    want = AutoTokenizer.from_pretrained(samples / "tokenizer").apply_chat_template(chat, tokenize=False)
    assert tok.apply_chat_template(chat, tokenize=False) == want and hf.config.eos_token_id == tok.eos_token_id


def test_sft_starts_from_a_folder_and_trains_answers_only(config, samples):
    "The first loss is transformers' loss over assistant tokens alone, on the model that `load` names."
    base = training.run(config("base", train_iters=2), json=True)["hf"]
    cfg = config("sft", "sft", load=base, train_iters=1, model=dict(hidden_size=48))
    cfg = replace(cfg, model=ModelConfig(), data=replace(cfg.data, tokenizer_name_or_path=""))
    out = training.run(cfg, json=True)
    hf, (resolved, tok) = AutoModelForCausalLM.from_pretrained(base), training.resolve(cfg)
    loader, total, n = training.loaders(resolved, tok)["train"], 0., 0
    for _ in range(2):
        b = next(loader)
        with torch.no_grad(): logits = hf(b.input_ids).logits
        total += float(torch.nn.functional.cross_entropy(logits.flatten(0, 1), b.labels.flatten(), ignore_index=-100, reduction="sum"))
        n += b.num_targets
    assert out["first_loss"] == pytest.approx(total / n, rel=1e-5) and 0 < n < b.input_ids.numel() * 2
    text = shown(b.input_ids[0].tolist(), b.labels[0].tolist(), tok)
    asked, answered = text.split("⟦")[0], text.split("⟦")[1].split("⟧")[0]
    assert "user" in asked and "user" not in answered and text.count("⟦") == 1
    assert resolved.model.hidden_size == 48, "the shape is that of the folder"


def test_a_broken_newest_step_is_passed_over(config, capfd):
    cfg = config(train_iters=8, save_interval=4, keep_last=3)
    training.run(cfg, json=True)
    run = RunDir(cfg.train.save)
    before = contents(run.step_path(8))[0]
    (run.step_path(8) / "state.json").write_text("{}")
    out = training.run(cfg, json=True)
    assert "step_0000008 is passed over: state.json" in capfd.readouterr().err
    assert out["steps"] == 8 and run.latest() == 8 and all(torch.equal(v, before[k]) for k, v in contents(run.step_path(8))[0].items())


def test_resume_auto_never_must(config, capfd):
    cfg = config(train_iters=4)
    with pytest.raises(UserError, match="resume=must"): training.run(replace(cfg, train=replace(cfg.train, resume="must")), json=True)
    first = training.run(cfg, json=True)
    assert training.run(cfg, json=True)["loss"] == first["loss"] and "finished already" in capfd.readouterr().err
    with pytest.raises(UserError, match="resume=never"): training.run(replace(cfg, train=replace(cfg.train, resume="never")), json=True)
    other = replace(cfg, train=replace(cfg.train, train_iters=6, weight_decay=0.))
    with pytest.raises(UserError, match=r"train.train_iters: 4 -> 6.*train.weight_decay: 0.1 -> 0.0|train.weight_decay: 0.1 -> 0.0.*train.train_iters: 4 -> 6"): training.run(other, json=True)
    with pytest.raises(UserError, match="samples in a step: 4 -> 8"): training.run(replace(cfg, train=replace(cfg.train, global_batch_size=8)), json=True)
    assert training.run(replace(other, train=replace(other.train, resume="must")), json=True)["steps"] == 6
    assert "train.train_iters: 4 -> 6" in capfd.readouterr().err


def test_smaller_micro_batches_may_go_on(config):
    "After an out-of-memory the same step in smaller pieces continues the run."
    cfg = config(train_iters=6, save_interval=3, global_batch_size=4, micro_batch_size=4)
    whole = training.run(cfg, json=True)
    part = config("part", train_iters=6, save_interval=3, global_batch_size=4, micro_batch_size=4)
    job = training.build(part)
    job.trainer.callbacks.append(StopAt(3))
    with job.run.lock():
        training.save_yaml(job.cfg, job.run.config_path)
        job.trainer.fit()
    assert job.run.latest() == 3
    out = training.run(replace(part, train=replace(part.train, micro_batch_size=1)), json=True)
    assert out["steps"] == 6 and out["loss"] == pytest.approx(whole["loss"], rel=1e-4)


class StopAt(Callback):
    "Ends a run early."
    order = 1
    def __init__(self, step): self.step = step
    def after_step(self, t):
        if t.step == self.step: t.stop("enough")


def mistakes(data, samples, tmp_path):
    empty, text = tmp_path / "empty", f"{data}/tales_text_document"
    (empty.with_suffix(".bin")).touch()
    (empty.with_suffix(".idx")).touch()
    return [
        (dict(data_=dict(data_path=[])), "ascend_nb preprocess"),
        (dict(data_=dict(data_path=[f"{data}/nothing"])), "nothing"),
        (dict(data_=dict(data_path=[str(empty)])), "empty"),
        (dict(data_=dict(seq_length=300)), "300"),
        (dict(data_=dict(seq_length=256, split="100,1,0"), eval_interval=5), "valid"),
        (dict(data_=dict(split="100,0,0"), eval_interval=5), "no valid samples"),
        (dict(data_=dict(split="0,100,0")), "no train samples"),
        (dict(data_=dict(tokenizer_name_or_path=str(tmp_path / "no_tokenizer"))), "no_tokenizer"),
        (dict(model=dict(vocab_size=900)), "900"),
        (dict(model=dict(vocab_size=100), data_=dict(tokenizer_name_or_path="")), "vocabulary"),
        (dict(data_=dict(tokenizer_name_or_path="")), "neither a tokenizer nor a vocab_size"),
        (dict(load=str(tmp_path / "no_model")), "no_model"),
        (dict(stage="sft", data_=dict(data_path=[text])), "stage"),
        (dict(data_=dict(data_path=[f"{data}/instruct"])), "stage"),
        (dict(lr_warmup_iters=STEPS), "Lower lr_warmup_iters"),
        (dict(global_batch_size=3), "global_batch_size=3"),
        (dict(device="npu"), "npu"),
        (dict(device="cuda:9"), "cuda"),
    ]


def test_a_mistake_is_one_sentence_and_nothing_is_written(config, data, samples, tmp_path):
    for kw, word in mistakes(data, samples, tmp_path):
        cfg = config("mistake", **kw)
        with pytest.raises(UserError) as e: training.run(cfg, json=True)
        assert word in str(e.value) and "\n" not in str(e.value), (kw, str(e.value))
        assert not Path(cfg.train.save).exists(), kw


def test_a_grid_that_does_not_fit_is_refused_clearly(config):
    cfg = replace(config(), parallel=ParallelConfig(pipeline_model_parallel_size=2))
    with pytest.raises(UserError, match="1 processes; expected a multiple of tp x pp x cp = 2"): training.run(cfg, json=True)


def test_another_shape_than_that_of_load_is_refused(config):
    base = training.run(config("base", train_iters=1), json=True)["hf"]
    with pytest.raises(UserError, match=r"hidden_size=64 \(there 48\)"): training.run(config("other", load=base, model=dict(hidden_size=64)), json=True)


def test_a_config_that_was_written_down_takes_the_shape_of_load_too(config):
    "Sizes that a config derived stand in its YAML as if they had been asked for: a job that is launched reads such a file."
    base = training.run(config("base", train_iters=1), json=True)["hf"]
    cfg = replace(config("other", load=base), model=ModelConfig())
    for model in (ModelConfig(), ModelConfig(hidden_size=48, num_attention_heads=2)):
        cfg = replace(cfg, model=model)
        written = from_dict(RunConfig, yaml.safe_load(dump_yaml(cfg)))
        assert written.model.intermediate_size and training.resolve(written)[0].model == training.resolve(cfg)[0].model
    with pytest.raises(UserError, match=r"intermediate_size=704"): training.resolve(replace(cfg, model=ModelConfig(hidden_size=48, num_attention_heads=2, intermediate_size=704)))


def test_the_command_line_says_what_it_chose_and_prints_the_result_alone(config, tmp_path):
    cfg = config(train_iters=3)
    p = start(cfg, tmp_path / "c.yaml")
    code, out, err = finish(p)
    assert code == 0 and out["steps"] == 3
    for line in ("device    cpu (asked for)", "dtype     torch.float32 (CPUs are slow in bf16)", "new weights, seed 1234", "2 samples x 2 micro-batches = 4", "3 steps, 12 samples, 768 tokens"):
        assert line in err, err
    bad = replace(cfg, data=replace(cfg.data, seq_length=999), train=replace(cfg.train, save=str(tmp_path / "bad")))
    (tmp_path / "c.yaml").write_text(dump_yaml(bad))
    out = ascend("train", "--config", tmp_path / "c.yaml", "--json")
    assert out.returncode == 2 and len(out.stderr.strip().splitlines()) == 1 and not out.stdout and not (tmp_path / "bad").exists()


def test_two_trainings_do_not_share_a_folder(config):
    cfg = config(train_iters=2)
    with RunDir(cfg.train.save).lock(), pytest.raises(UserError, match="only one"): training.run(cfg, json=True)


def test_data_without_a_learned_token_are_refused_on_opening(config, data, tmp_path):
    "Every answer cut off by a mask: one sentence, before anything is written."
    from ascend_nb.indexed import IndexedReader, IndexedWriter
    for field in ("input_ids", "attention_mask", "labels"):
        r = IndexedReader(f"{data}/instruct_packed_{field}_document")
        with IndexedWriter(f"{tmp_path}/masked_packed_{field}_document") as w:
            for i in range(20):
                w.add([-100] * len(r[i]) if field == "labels" else r[i])
                w.end_document()
    cfg = config("masked", "sft", data_=dict(data_path=[f"{tmp_path}/masked"], split="100,0,0"))
    with pytest.raises(UserError) as e: training.run(cfg, json=True)
    assert e.value.key == "nothing_to_learn" and "no answer token" in str(e.value)
    assert not Path(cfg.train.save).exists()


def test_the_tokenizer_of_the_samples_is_the_one_that_is_saved(config, samples):
    out = training.run(config(train_iters=1), json=True)
    a, b = load_tokenizer(samples / "tokenizer"), load_tokenizer(out["hf"])
    assert a.encode("The lighthouse of Larkhaven 灯塔 🙂") == b.encode("The lighthouse of Larkhaven 灯塔 🙂") and a.chat_template == b.chat_template
