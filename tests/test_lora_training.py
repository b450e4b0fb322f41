"""Adapters through `train`: every grid gives the numbers of one process, one process gives peft's; what is saved goes on, opens in peft, and is refused where it does not belong."""
import json
import shutil
import sys
from dataclasses import replace

import pytest
import torch
import yaml
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file
from test_converters import go
from test_lora import WORDS, train_ranks
from test_parallel import case, run, same
from test_spread_generate import run as run_words
from test_spread_generate import same as same_words
from torch.nn import functional as F
from transformers import AutoModelForCausalLM
from transformers.integrations.neftune import neftune_post_forward_hook

from ascend_nb import chat, cli, preprocess, training
from ascend_nb.adapter_files import load_adapter
from ascend_nb.adapter_runs import base_model, write_base
from ascend_nb.adapters import LoraSpec, pairs
from ascend_nb.config import ChatConfig, DataConfig, ModelConfig, PreprocessConfig, RunConfig, TrainConfig, TuneConfig
from ascend_nb.core import UserError
from ascend_nb.hf_format import load_model, save_model
from ascend_nb.many_devices import open_model
from ascend_nb.mesh import launch
from ascend_nb.model import Decoder
from ascend_nb.neftune import add_noise
from ascend_nb.schema import save_yaml, to_dict
from ascend_nb.tokenizers import load_tokenizer
from ascend_nb.trainer import lr_at

ALL, SOME = dict(lora_target_modules=["all-linear"], lora_r=4), dict(lora_target_modules=["query_key_value", "down_proj"], lora_r=4)


def lora(tune, *args, **kw): return dict(case(*args, **kw), tune=tune)


def test_a_few_grids_in_two_processes(tmp_path):
    "Gradients, then ten steps; and a run that goes on in another grid."
    same(run([lora(ALL, "dense", tp=2, sp=True), lora(dict(ALL, use_dora=True), "llama", tp=2), lora(ALL, "moe", ep=2), lora(dict(ALL, lora_modules_to_save=["embed_tokens"]), "dense", pp=2, tp=1),
              lora(ALL, "mla", zero=2), lora(ALL, "dense", packed="ragged", tp=2, sp=True), lora(ALL, "dense", packed="ragged", pp=2), *(lora(dict(SOME, loraplus_lr_ratio=4.), "dense", kind="curve", steps=10, **kw) for kw in (dict(tp=2), dict(), dict(pp=2))),
              *(lora(dict(neftune_noise_alpha=9.), "dense", kind="curve", steps=4, **kw) for kw in (dict(tp=2, sp=True), dict(pp=2)))], 2))


MATRIX = {
    "cut": [lora(ALL, s, tp=2, sp=True) for s in ("llama", "gpt2", "gemma", "bloom", "moe", "mla")],
    "dora": [lora(dict(ALL, use_dora=True), s, **kw) for s, kw in (("dense", dict(tp=2, sp=True)), ("llama", dict(tp=2, zero=3)), ("dense", dict(tp=2, pp=2)), ("gpt2", dict(zero=3)))],
    "whole": [lora(dict(SOME, lora_modules_to_save=w), s, **kw) for w, s, kw in ((["embed_tokens"], "dense", dict(tp=2, pp=2)), (["lm_head", "embed_tokens"], "llama", dict(tp=2, sp=True, zero=3)), (["lm_head"], "llama", dict(pp=4)))],
    "experts": [lora(ALL, "moe", **kw) for kw in (dict(ep=4, zero=3), dict(ep=2, tp=2, sp=True), dict(ep=2, factor=.7), dict(pp=2, zero=1))] + [lora(ALL, "mla", ep=2, pp=2), lora(ALL, "moe", cp=2, ep=2)],
    "lines": [lora(ALL, "dense", pp=4), lora(ALL, "llama", pp=2, vp=1, schedule="interleaved-zb"), lora(ALL, "llama", pp=2, schedule="zbv"), lora(ALL, "llama", pp=2, vp=1, tp=2), lora(ALL, "dense", pp=4, schedule="gpipe")],
    "parts": [lora(ALL, s, zero=z) for s, z in (("dense", 0), ("moe", 2), ("mla", 3), ("gpt2", 1))] + [lora(ALL, "dense", packed=True, cp=4), lora(ALL, "mla", cp=2, tp=2), lora(ALL, "dense", host=True, zero=2)],
    "again": [lora(ALL, "dense", recompute="full", tp=2, sp=True, zero=3), lora(ALL, "moe", recompute="selective", act=True, ep=2), lora(ALL, "dense", recompute="full", pp=2, swap=True)],
    "curves": [lora(dict(SOME, loraplus_lr_ratio=4.), s, kind="curve", steps=10, **kw) for s, kw in (("dense", dict(tp=2)), ("dense", dict(tp=2, pp=2)), ("llama", dict(zero=3)), ("moe", dict(ep=2, tp=2)), ("dense", dict(off=True, tp=2)))] + [lora(ALL, "mla", kind="curve", steps=10, tp=2)],
    "ragged": [lora(ALL, "llama", packed="ragged", **kw) for kw in (dict(tp=2, sp=True), dict(pp=2, tp=2), dict(pp=2, vp=1), dict(zero=3), dict(cp=2), dict(cp=2, algo="megatron_cp_algo"))] + [case("mla", packed="ragged", ep=2, tp=2), case("bloom", packed="ragged", tp=2), case("dense", packed="ragged", pp=4)],
    "16 bits": [lora(ALL, s, kind="curve", steps=5, dtype=d, **kw) for d in ("bf16", "fp16") for s, kw in (("dense", dict(tp=2, pp=2, sp=True)), ("mla", dict(zero=3)))],
}


@pytest.mark.slow
@pytest.mark.parametrize("name", MATRIX)
def test_matrix(name): same(run(MATRIX[name], 4))


@pytest.fixture(scope="module")
def home(tmp_path_factory, samples):
    "A small model with the samples' tokenizer, and their questions as token files."
    out = tmp_path_factory.mktemp("home")
    tokenizer = load_tokenizer(samples / "tokenizer")
    shape = dict(vocab_size=tokenizer.vocab_size, hidden_size=48, num_hidden_layers=4, num_attention_heads=4, num_key_value_heads=2, max_position_embeddings=512, eos_token_id=[tokenizer.eos_token_id])
    for name, seed, kw in (("base", 3, {}), ("other", 3, dict(hidden_size=64)), ("twin", 4, {})): save_model(Decoder(ModelConfig(**{**shape, **kw})).init_weights(seed), out / name, tokenizer)
    preprocess.run(PreprocessConfig(input=str(samples / "instruct.json"), output_prefix=str(out / "instruct"), handler_name="AlpacaStyleInstructionHandler",
                                    tokenizer_name_or_path=str(samples / "tokenizer")), json=True)
    return out


def asks(home, save, tune=None, model="base", **train):
    t = dict(stage="sft", load=str(home / model), save=str(save), train_iters=10, micro_batch_size=2, global_batch_size=4, lr=1e-2, lr_decay_style="constant", device="cpu", dtype="fp32", weight_decay=.1)
    return RunConfig(data=DataConfig(data_path=[str(home / "instruct")], seq_length=256, split="90,10,0"), train=TrainConfig(**{**t, **train}),
                     tune=TuneConfig(**(tune or dict(lora_target_modules=["q_proj", "linear_fc2"], lora_r=4, lora_alpha=8.))))


def rows(save): return [json.loads(x) for x in (save / "metrics.jsonl").read_text().splitlines() if '"loss"' in x]


def test_noise_on_embeddings_is_the_papers(home, tmp_path):
    "transformers' hook, which trl calls, on the same draws; in a packed row every document as if it stood alone; none in a validation."
    torch.manual_seed(5)
    ours, ids = load_model(home / "base").train(), torch.randint(0, 90, (3, 20))
    words, plain = torch.nn.Embedding.from_pretrained(ours.model.embed_tokens.weight.detach()).train(), ours.model.embed_tokens(ids).detach()
    words.neftune_noise_alpha = 7.
    words.register_forward_hook(neftune_post_forward_hook)
    torch.manual_seed(6)
    want = words(ids) - plain
    torch.manual_seed(6)
    add_noise(ours, 7.)
    assert (ours.model.embed(ids, 0, None) - plain - want).abs().max() < 1e-6 * want.abs().max() + 1e-7
    torch.manual_seed(6)
    packed = ours.model.embed(ids, 0, torch.cat((torch.arange(5), torch.arange(15))).repeat(3, 1)) - plain
    assert torch.allclose(packed[:, :5], want[:, :5] * 2, atol=1e-6) and torch.allclose(packed[:, 5:], want[:, 5:] * (20 / 15) ** .5, atol=1e-6)
    with torch.no_grad(): assert torch.equal(ours.model.embed(ids, 0, None), plain)


def test_a_run_with_noise_learns_and_goes_on(home, tmp_path):
    "Its losses are not those without; two runs with one seed have the same."
    losses = {}
    for name, noise in (("plain", 0.), ("noisy", 9.), ("again", 9.)):
        training.run(asks(home, tmp_path / name, dict(neftune_noise_alpha=noise), train_iters=4, lr=1e-3), json=True)
        losses[name] = [r["loss"] for r in rows(tmp_path / name)]
    assert losses["noisy"] == losses["again"] and losses["noisy"][0] != losses["plain"][0] and abs(losses["noisy"][0] - losses["plain"][0]) < .1


KINDS = {"lora": {}, "rslora": dict(use_rslora=True), "dora": dict(use_dora=True), "lora+": dict(loraplus_lr_ratio=4.), "head": dict(lora_modules_to_save=["embed_tokens", "lm_head"])}


@pytest.mark.parametrize("kind", KINDS)
def test_ten_steps_are_those_of_peft_and_its_files_open_there(home, tmp_path, kind):
    "The same batches, the same beginning of A: peft beside transformers and a loop of plain torch."
    knobs = dict(dict(lora_target_modules=["q_proj", "linear_fc2"], lora_r=4, lora_alpha=8.), **KINDS[kind])
    cfg = asks(home, tmp_path / "run", knobs)
    job = training.build(cfg)
    theirs = get_peft_model(AutoModelForCausalLM.from_pretrained(home / "base", dtype=torch.float32), LoraConfig(r=4, lora_alpha=8, target_modules=["q_proj", "down_proj"], use_rslora="use_rslora" in knobs,
        use_dora="use_dora" in knobs, modules_to_save=knobs.get("lora_modules_to_save"), ensure_weight_tying="lora_modules_to_save" in knobs))
    named = dict(theirs.named_parameters())
    with torch.no_grad():
        for p, pair in pairs(job.trainer.model, "default").items(): named[f"base_model.model.{p.removesuffix('.weight')}.lora_A.default.weight"].copy_(pair.A)
    learn = {n: p for n, p in named.items() if p.requires_grad}
    assert len(learn) == len(job.trainer.weights.named)
    fast, t = lambda n: knobs.get("loraplus_lr_ratio", 1.) if "lora_B" in n else 1., cfg.train
    groups = [dict(params=[p], weight_decay=t.weight_decay if p.dim() > 1 else 0., rate=fast(n)) for n, p in learn.items()]
    opt, loader, losses = torch.optim.AdamW(groups, lr=t.lr, betas=(t.adam_beta1, t.adam_beta2), eps=t.adam_eps), training.loaders(job.cfg, job.tokenizer)["train"], []
    for step in range(10):
        batches = [next(loader) for _ in range(2)]
        n, total = sum(b.num_targets for b in batches), 0.
        for b in batches:
            assert b.cu_seqlens is None
            loss = F.cross_entropy(theirs(b.input_ids).logits.flatten(0, 1), b.labels.flatten(), ignore_index=-100, reduction="sum") / n
            loss.backward()
            total += loss.item()
        torch.nn.utils.clip_grad_norm_(learn.values(), t.clip_grad)
        for g in opt.param_groups: g["lr"] = lr_at(step, t) * g["rate"]
        opt.step()
        opt.zero_grad()
        losses.append(total)
    done = training.run(cfg, json=True)
    mine = [r["loss"] for r in rows(tmp_path / "run")]
    assert max(abs(a - b) for a, b in zip(mine, losses, strict=True)) < 1e-5 and max(mine) - min(mine) > .02, (mine, losses)
    ids = torch.arange(40).reshape(2, 20) * 7 % 90
    with torch.no_grad():
        want = theirs.eval()(ids).logits
        opened = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(home / "base", dtype=torch.float32), tmp_path / "run/adapter").eval()(ids).logits
        merged = AutoModelForCausalLM.from_pretrained(done["hf"], dtype=torch.float32)(ids).logits
        again = base_model(tmp_path / "run/step_0000010")(ids)
    for got in (opened, merged, again): assert (got - want).abs().max() < 1e-4 * want.abs().max()
    stored = {k for f in (tmp_path / "run/step_0000010").glob("*.safetensors") for k in load_file(f) if k.startswith("model.")}
    assert stored == {f"model.{n}" for n in job.trainer.weights.named}, "a step holds the adapter alone"


def contents(folder): return {k: v for f in sorted(folder.glob("*.safetensors")) for k, v in load_file(f).items()}


def test_going_on_gives_the_same_bits(home, tmp_path):
    "With dropout, whose draws go on too: six steps, four more in another run of the program, against ten at once."
    knobs = dict(lora_target_modules=["all-linear"], lora_r=2, lora_dropout=.2, loraplus_lr_ratio=2.)
    training.run(asks(home, tmp_path / "one", knobs), json=True)
    part = asks(home, tmp_path / "two", knobs, save_interval=6)
    job = training.build(part)
    job.trainer.callbacks.append(type("Stop", (), dict(after_step=lambda self, t: t.stop("test") if t.step == 6 else None))())
    with job.run.lock():
        save_yaml(job.cfg, job.run.config_path)
        write_base(job.run.path, job.plan, job.cfg.train.load)
        job.trainer.fit()
    assert (tmp_path / "two/step_0000006").is_dir()
    training.run(part, json=True)
    a, b = (contents(tmp_path / x / "step_0000010") for x in ("one", "two"))
    assert a.keys() == b.keys() and all(torch.equal(v, b[k]) for k, v in a.items())
    a, b = (contents(tmp_path / x / "adapter") for x in ("one", "two"))
    assert all(torch.equal(v, b[k]) for k, v in a.items())


def test_an_adapter_goes_on_and_a_run_is_a_model(home, tmp_path):
    "lora_load begins where the file ends; a run of an adapter is what another run begins with."
    training.run(asks(home, tmp_path / "one"), json=True)
    last = rows(tmp_path / "one")[-1]["loss"]
    training.run(asks(home, tmp_path / "two", dict(lora_load=str(tmp_path / "one/adapter"))), json=True)
    first = rows(tmp_path / "two")[0]["loss"]
    assert first < rows(tmp_path / "one")[0]["loss"] - .5 * (rows(tmp_path / "one")[0]["loss"] - last)
    assert json.loads((tmp_path / "two/adapter/adapter_config.json").read_text())["r"] == 4
    shutil.rmtree(tmp_path / "one/step_0000010"), shutil.rmtree(tmp_path / "two/hf")
    again = training.run(asks(home, tmp_path / "two", dict(lora_load=str(tmp_path / "one/adapter"))), json=True)
    assert again["hf"] and (tmp_path / "two/hf/model.safetensors").is_file(), "the finished run exports what is missing"
    training.run(asks(home, tmp_path / "three", dict(), train_iters=1, lr=0., load=str(tmp_path / "two")), json=True)
    ids = torch.arange(40).reshape(2, 20) * 7 % 90
    with torch.no_grad(): assert torch.allclose(load_model(tmp_path / "three/hf")(ids), load_model(tmp_path / "two/hf")(ids), atol=1e-6)


@pytest.mark.parametrize(("style", "flags", "alone"), [("legacy", "--tp 2 --pp 2", True), ("mcore", "--tp 2", False)])
def test_an_adapter_in_megatrons_ranks_goes_on_as_its_peft_form(home, tmp_path, style, flags, alone, capfd):
    "The same logits as peft's, the same losses as a run from peft's folder; another rank is one sentence."
    go(home / "base", tmp_path / "mg", "--to", style, flags)
    train_ranks(tmp_path / "mg", tmp_path / "lora", tmp_path / "merged", style, alone=alone)
    go(tmp_path / "mg", tmp_path / "peft", "--to hf --save-lora-to-hf --lora-r 4 --lora-alpha 8 --lora-load", tmp_path / "lora", "--hf-config", home / "base")
    ids = torch.arange(40).reshape(2, 20) * 7 % 90
    with torch.no_grad():
        theirs = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(home / "base", dtype=torch.float32), tmp_path / "peft").eval()(ids).logits
        ours = load_model(home / "base")
        plain = ours(ids)
        load_adapter(ours, tmp_path / "lora", spec=LoraSpec(r=4, alpha=8))
        assert (ours(ids) - theirs).abs().max() < 1e-5 * theirs.abs().max() < 1e-3 * (plain - theirs).abs().max()
    told = dict(lora_r=4, lora_alpha=8., lora_target_modules=WORDS[style])
    for name in ("lora", "peft"): training.run(asks(home, tmp_path / f"from {name}", dict(told, lora_load=str(tmp_path / name)), train_iters=3), json=True)
    a, b = ([r["loss"] for r in rows(tmp_path / f"from {name}")] for name in ("lora", "peft"))
    assert max(abs(x - y) for x, y in zip(a, b, strict=True)) < 1e-5 and a[0] != a[2]
    with pytest.raises(UserError, match=r"Found rank 4 for .*lora_A.* expected 8"): training.run(asks(home, tmp_path / "x", dict(told, lora_r=8, lora_load=str(tmp_path / "lora")), train_iters=3), json=True)


BAD = {
    "a word that means nothing": (dict(tune=dict(lora_target_modules=["q_prj"])), "Found target 'q_prj'", "Did you mean q_proj"),
    "the head": (dict(tune=dict(lora_target_modules=["lm_head"])), "Found lm_head among the targets", "--lora-modules-to-save lm_head"),
    "no base": (dict(load=""), "without a model to adapt", "--load"),
    "another rank": (dict(tune=dict(lora_load="ADAPTER", lora_r=8)), "lora_r=4", "lora_r=8"),
    "other targets": (dict(tune=dict(lora_load="ADAPTER", lora_target_modules=["v_proj"])), "lora_target_modules=", "v_proj"),
    "another base": (dict(model="twin", tune=dict(lora_load="ADAPTER")), "that was trained on", "Load that base"),
    "another shape": (dict(model="other", tune=dict(lora_load="ADAPTER")), "made for another model", ""),
    "no adapter there": (dict(tune=dict(lora_load="nowhere")), "adapter_config.json", "nowhere"),
    "a rank of nothing": (dict(tune=dict(lora_target_modules=["q_proj"], lora_dropout=1.)), "dropout", ""),
}


@pytest.fixture(scope="module")
def finished(home):
    training.run(asks(home, home / "finished", train_iters=2), json=True)
    return home / "finished"


@pytest.mark.parametrize("name", BAD)
def test_mistakes_are_one_sentence_and_write_nothing(home, finished, tmp_path, name, capfd):
    kw, *words = BAD[name]
    kw = {**kw, "tune": {k: str(finished / "adapter") if v == "ADAPTER" else v for k, v in kw.get("tune", {}).items()}}
    cfg = asks(home, tmp_path / "run", kw.pop("tune"), **kw)
    if name == "no base": cfg = replace(cfg, model=ModelConfig(hidden_size=48, num_attention_heads=4), data=replace(cfg.data, tokenizer_name_or_path=str(home / "base")))
    (tmp_path / "run.yaml").write_text(yaml.safe_dump(to_dict(cfg, changed=True)))
    assert cli.main(["train", "--config", str(tmp_path / "run.yaml"), "--json"]) == 2
    err = capfd.readouterr().err.strip()
    assert all(w in err for w in words) and "Traceback" not in err and err.count("\n") == 0, err
    assert not (tmp_path / "run").exists()


def test_another_base_is_told_when_a_run_goes_on(home, finished, tmp_path, capfd):
    shutil.copytree(home / "base", tmp_path / "base"), shutil.copytree(finished, tmp_path / "run")
    more = lambda: replace(asks(home, tmp_path / "run", train_iters=4, resume="must"), train=replace(asks(home, tmp_path / "run").train, train_iters=4, resume="must", load=str(tmp_path / "base")))
    assert training.run(more(), json=True)["steps"] == 4, "the same weights elsewhere are the same base"
    save_model(load_model(home / "base").init_weights(4), tmp_path / "base", load_tokenizer(home / "base"))
    before = sorted(p.name for p in (tmp_path / "run").iterdir())
    with pytest.raises(UserError, match="Found another base in"): training.run(replace(more(), train=replace(more().train, train_iters=6)), json=True)
    assert sorted(p.name for p in (tmp_path / "run").iterdir()) == before


def test_idle_knobs_are_told(home, tmp_path, capfd):
    out = training.run(asks(home, tmp_path / "run", dict(lora_r=8, use_dora=True), train_iters=1), json=True)
    err = capfd.readouterr().err
    assert out["steps"] == 1 and "lora_r has no effect without lora_target_modules" in err and "use_dora has no effect" in err


def test_a_step_of_an_adapter_speaks_as_the_merged_model(home, finished, samples, tmp_path, capfd):
    "In one process, in two that share every matrix, and in two that share the layers; what cannot read it says so."
    shutil.copytree(finished, tmp_path / "run"), shutil.rmtree(tmp_path / "run/hf")
    ids = torch.arange(40).reshape(2, 20) * 7 % 90
    with torch.no_grad(): assert torch.allclose(open_model(tmp_path / "run")(ids), load_model(finished / "hf")(ids), atol=1e-5)
    same_words(run_words([dict(folder=tmp_path / "run", ask=["words"], **g) for g in (dict(tp=2), dict(pp=2))], 2, samples))
    assert cli.main(["convert", "--load-dir", str(tmp_path / "run"), "--save-dir", str(tmp_path / "out"), "--save-model-type", "hf"]) == 2
    assert "Found an adapter in" in capfd.readouterr().err and not (tmp_path / "out").exists()


@pytest.fixture(scope="module")
def two(home):
    "Two runs that learned so fast that their models say other things."
    for name, seed in (("poems", 1), ("laws", 2)): training.run(asks(home, home / name, dict(lora_target_modules=["all-linear"], lora_r=4), train_iters=6, lr=5e-2, seed=seed), json=True)
    return home / "poems", home / "laws"


def test_generate_takes_an_adapter(home, two, capfd):
    "PEFT's folder beside the base says what the merged model says; in two processes too."
    how = ["--prompt", "The miller said", "--max-new-tokens", "12", "--device", "cpu", "--json"]
    def say(*words):
        assert cli.main(["generate", *map(str, words), *how]) == 0
        return json.loads(capfd.readouterr().out)["text"]
    plain, merged, beside = say("--model", home / "base"), say("--model", two[0] / "hf"), say("--model", home / "base", "--lora-load", two[0] / "adapter")
    assert merged == beside != plain and say("--model", home / "base", "--lora-load", two[0], two[1]) == beside, "a run is as good as its folder; the first of several is at work"
    outs = launch(["-m", "ascend_nb.cli", "generate", "--model", str(home / "base"), "--lora-load", str(two[0]), "--tensor-model-parallel-size", "2", *how], 2, 120)
    assert json.loads(outs[0][1])["text"] == merged, outs
    assert cli.main(["generate", "--model", str(home / "base"), "--lora-load", str(home / "base"), *how]) == 2
    err = capfd.readouterr().err
    assert "adapter_config.json" in err and "Traceback" not in err
    assert cli.main(["generate", "--model", str(home / "twin"), "--lora-load", str(two[0]), *how]) == 2
    assert "that was trained on" in capfd.readouterr().err


@pytest.mark.parametrize("lang", ["en", "zh"])
def test_a_chat_switches_adapters(home, two, lang, monkeypatch, capfd):
    "Each answer is that of the model with that adapter merged; what was said stays; a name that is not there is told."
    monkeypatch.setenv("ASCEND_NB_LANG", lang)
    cfg = ChatConfig(model=str(home / "base"), lora_load=[str(t) for t in two], max_new_tokens=8, device="cpu", history_turns=0)
    lines = iter(["Who are you?", "/adapter laws", "Who are you?", "/adapter", "/adapter nobody", "/adapter none", "Who are you?", "q"])
    monkeypatch.setattr("ascend_nb.chat._listen", lambda: next(lines))
    got = [t["answer"] for t in chat.run(cfg, json=True)["turns"]]
    err = capfd.readouterr().err
    want = []
    for folder in (two[0] / "hf", two[1] / "hf", home / "base"):
        want.append(str(chat.Chat(load_model(folder), load_tokenizer(home / "base"), replace(cfg, lora_load=[])).ask("Who are you?", sys.stderr)))
    assert got == want and len({*want}) == 3
    assert ("adapters: poems, laws; at work: laws" if lang == "en" else "适配器：poems, laws；正在使用：laws") in err and "nobody" in err
