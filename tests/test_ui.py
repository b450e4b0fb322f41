"""Forms and run views, driven as a person would: by setting widgets and by looking at what they say."""
import json
import re
import time

import ipywidgets as W
import nbformat
import pytest
import yaml
from ascend_nb.config import (
    ChatConfig,
    EvalConfig,
    FetchConfig,
    GenerateConfig,
    ModelLinkConvertConfig,
    PlanConfig,
    PreprocessConfig,
    QuickstartConfig,
    RunConfig,
    SampleConfig,
    TrainConfig,
)
from ascend_nb.core import MESSAGES, UserError
from ascend_nb.families import config_from_hf
from ascend_nb.planner import plan, shape_of_plan
from ascend_nb.schema import from_dict, knobs, load_yaml, parse_args, save_yaml
from ascend_nb.ui.bilingual import switch
from ascend_nb.ui.forms import CodeView, command_line, form, python_cell
from ascend_nb.prices import price, run_price, speaking_bytes
from ascend_nb.ui.looks import Folds
from ascend_nb.ui.presets import differences, preset, presets, with_presets
from ascend_nb.ui.run_view import Tail, draw, show_run, summary
from conftest import ROOT
from pointing import shut

WHOLE = [RunConfig(), TrainConfig(), QuickstartConfig(), SampleConfig(), PreprocessConfig(input="a", output_prefix="b", tokenizer_name_or_path="c"), EvalConfig("m", "d"), FetchConfig("hf:a/b", "x"),
         GenerateConfig(model="m", stop=["a b", "c"]), GenerateConfig(model="it's", stop=["'", '"', "\\", "", "-", "a\nb", "中文"], logit_bias={"5": -1.5}), ChatConfig(model="m"), RunConfig(train=TrainConfig(lr=1e-3, dtype="bf16"))]


@pytest.mark.parametrize("cfg", WHOLE, ids=lambda c: type(c).__name__)
def test_a_form_gives_back_what_it_was_given(cfg):
    f = form(cfg)
    assert f.value == cfg and not f.errors
    assert {path[-1] for path in f.fields} == {k.name for k in knobs(type(cfg))}
    for field in f.fields.values(): assert field.control.tooltip == field.knob.help != ""


@pytest.mark.parametrize("cfg", WHOLE, ids=lambda c: type(c).__name__)
def test_shown_code_makes_the_same_config(cfg):
    "Pasted: the Python cell's config, the YAML and the command line are the same config."
    names = {}
    exec("\n".join(x for x in python_cell(cfg).split("\n") if not x.endswith("(cfg)")), names)
    assert names["cfg"] == cfg
    from ascend_nb.schema import dump_yaml
    assert from_dict(type(cfg), yaml.safe_load(dump_yaml(cfg, changed=True)) or {}) == cfg
    import shlex
    assert parse_args(type(cfg), shlex.split(command_line(cfg))[2:]) == cfg


@pytest.mark.parametrize("name,text,words", [
    ("lr", "fast", "expected a float"), ("lr", "-1", "from 0"), ("train_iters", "2.5", "expected a int"), ("train_iters", "", "Found no train_iters"),
    ("lr_warmup_fraction", "2", "from 0 to 1"),
])
def test_a_wrong_value_is_told_under_its_field(name, text, words):
    f = form(TrainConfig())
    seen = []
    f.on_change(lambda form: seen.append(dict(form.errors)))
    field = f.fields[name,]
    assert field.note.layout.display == "none"
    field.control.value = text
    assert words in field.note.value and field.note.layout.display == "block" and f.code.button.disabled and seen[-1]
    with pytest.raises(UserError, match=words): f.value
    field.control.value = str(getattr(TrainConfig(), name))
    assert field.note.layout.display == "none" and f.value == TrainConfig() and not f.code.button.disabled


def test_advanced_fields_are_folded():
    f = form(TrainConfig())
    folded = next(c for c in f.children if isinstance(c, Folds))
    assert folded.selected_index is None
    assert {id(c) for c in folded.pages[0].children} == {id(x.box) for x in f.fields.values() if x.knob.advanced}


def test_show_me_the_code_opens_and_closes():
    f = form(TrainConfig(lr=1e-3))
    assert isinstance(f.code, CodeView) and f.code.text.layout.display == "none"
    f.code.button.click()
    assert f.code.text.layout.display == "block" and "lr: 0.001" in f.code.text.value and "ascend_nb train --lr 0.001" in f.code.text.value
    f.code.button.click()
    assert f.code.text.layout.display == "none"


def test_callbacks_are_quick():
    f = form(RunConfig())
    f.fields["train", "lr"].control.value = "1e-3"  # the first call reads the sources' comments
    t = time.perf_counter()
    f.fields["train", "lr"].control.value = "2e-3"
    assert time.perf_counter() - t < .1


def test_labels_in_both_languages(monkeypatch):
    keys = [k for k in MESSAGES if k.startswith(("ui_", "run_", "plot_"))]
    assert len(keys) > 12 and all(re.search(r"[\u4e00-\u9fff]", MESSAGES[k][1]) for k in keys)
    monkeypatch.setenv("ASCEND_NB_LANG", "zh")
    f = form(TrainConfig())
    assert f.code.button.description == "显示代码" and "所有值均有效" in f.status.value


def rows(n, total=20, start=None):
    t = time.time() - 10 if start is None else start
    return [dict(event="start", step=0, time=t, total_steps=total), *(dict(step=s, time=t + s / 10, loss=3 / s, tokens_per_s=5000.) for s in range(1, n + 1))]


def write(path, items):
    with open(path, "a", encoding="utf-8") as f: f.writelines(json.dumps(r) + "\n" for r in items)


def test_a_view_follows_a_run_that_begins_later(tmp_path):
    view = show_run(tmp_path / "run")
    assert view.state == "run_waiting" and not view.image.value
    (tmp_path / "run").mkdir()
    write(tmp_path / "run/metrics.jsonl", rows(10))
    deadline = time.time() + 10
    while view.state != "run_going" and time.time() < deadline: time.sleep(.05)
    assert view.state == "run_going" and bytes(view.image.value[:4]) == b"\x89PNG" and "step 10 of 20" in view.line.value
    write(tmp_path / "run/metrics.jsonl", rows(20)[11:])
    view.thread.join(10)
    assert view.state == "run_done" and not view.thread.is_alive()


def test_stop_ends_the_watching(tmp_path):
    view = show_run(tmp_path)
    view.stop(); view.thread.join(5)
    assert not view.thread.is_alive()


def test_half_a_line_and_a_shorter_file(tmp_path):
    p = tmp_path / "metrics.jsonl"
    write(p, rows(5))
    tail = Tail(p)
    assert tail.read() == 6 and tail.read() == 0
    with open(p, "a") as f: f.write('{"step": 6, "ti')
    assert tail.read() == 0
    p.write_text("\n".join(json.dumps(r) for r in rows(3)) + "\n")
    assert tail.read() == 4 and len(tail.rows) == 4


def test_damaged_lines_hide_no_others(tmp_path):
    "A disk that was full, a host that lost power: what can be read is told, by every reader of rows."
    from ascend_nb.jobs import Job
    run = tmp_path / "run"
    run.mkdir()
    row = lambda i: json.dumps(dict(step=i, loss=1. / i, time=float(i), tokens_per_s=1.))
    (run / "metrics.jsonl").write_bytes("\n".join([row(1), '{"step": 2, "lo' + row(3), "null", "[1]", row(4), ""]).encode() + b"\xff\x00\n" + row(5).encode() + b'\n{"st')
    view = show_run(run)
    assert [r["step"] for r in view.tail.rows] == [1, 4, 5] and "5 of 5 steps" in repr(view) and view.image.value
    assert Job(run).row()["step"] == 5
    shut(view)


def test_time_to_go_after_a_resume():
    first, again = rows(10, start=0.), dict(event="resume", step=10, time=100., total_steps=20)
    later = [dict(step=s, time=100. + (s - 10), loss=.1, tokens_per_s=1.) for s in range(11, 16)]
    key, text = summary([*first, again, *later], "r", now=106.)
    assert key == "run_going" and "0:05 so far, 0:05 to go" in text


def test_a_plot_in_chinese_has_no_boxes(monkeypatch, recwarn):
    monkeypatch.setenv("ASCEND_NB_LANG", "zh")
    assert draw(rows(5))[:4] == b"\x89PNG"
    assert not [w for w in recwarn if "missing from" in str(w.message)], "a glyph has no font"


def test_without_a_chinese_font_there_are_no_boxes_either(monkeypatch, recwarn):
    "A label falls back to English; a run that has a Chinese name is told by the numbers of its letters."
    from matplotlib import font_manager
    monkeypatch.setenv("ASCEND_NB_LANG", "zh")
    monkeypatch.setattr(font_manager.fontManager, "ttflist", [f for f in font_manager.fontManager.ttflist if f.name == "DejaVu Sans"])
    rows = [dict(step=i, loss=1. / i, tokens_per_s=1.) for i in range(1, 4)]
    assert draw({"第一次": rows, "b": rows})[:4] == b"\x89PNG"
    assert not [w for w in recwarn if "Glyph" in str(w.message)]


def test_in_a_real_kernel():
    "The form's widget view and its text both reach the notebook."
    from nbclient import NotebookClient
    code = "from ascend_nb.ui.forms import form\nfrom ascend_nb.config import TrainConfig\nf = form(TrainConfig())\nf.fields['lr',].control.value='1e-3'\nf"
    nb = nbformat.v4.new_notebook(cells=[nbformat.v4.new_code_cell(code)])
    NotebookClient(nb, timeout=60, kernel_name="python3", resources={"metadata": {"path": str(ROOT)}}).execute()
    data = nb.cells[0].outputs[-1]["data"]
    assert "application/vnd.jupyter.widget-view+json" in data and "0.0003" not in data["text/plain"] and "1e-3" in data["text/plain"]


@pytest.mark.parametrize("cfg,name,unit", [(TrainConfig(), "train_iters", "steps"), (TrainConfig(), "micro_batch_size", "samples"), (SampleConfig(), "max_new_tokens", "tokens"),
    (PlanConfig(), "save_gb_s", "GB/s"), (PlanConfig(), "restart_minutes", "minutes"), (TrainConfig(), "lr", ""), (TrainConfig(), "load", "")])
def test_a_number_has_its_unit(cfg, name, unit):
    box = form(cfg).fields[name,].box
    said = [w.value for row in box.children for w in getattr(row, "children", ()) if isinstance(w, W.Label)]
    assert said == [unit] * bool(unit)


def test_a_form_takes_another_config():
    f = form(TrainConfig())
    seen = []
    f.on_change(lambda f: seen.append(f.errors))
    f.fill(TrainConfig(lr=1e-5, stage="sft", deterministic=True, load="m"))
    assert f.value == TrainConfig(lr=1e-5, stage="sft", deterministic=True, load="m") and seen == [{}]


def test_an_open_form_follows_the_language(monkeypatch):
    monkeypatch.setenv("ASCEND_NB_LANG", "en")
    f = form(TrainConfig())
    f.code.button.click()
    folded = next(c for c in f.children if isinstance(c, Folds))
    words = lambda: (f.status.value, f.code.button.description, folded.get_title(0), f.code.text.value)
    english = words()
    switch("zh")
    assert all(re.search(r"[\u4e00-\u9fff]", w) for w in words())
    switch("en")
    assert words() == english and not any(re.search(r"[\u4e00-\u9fff]", w) for w in english)


@pytest.mark.parametrize("name", presets())
def test_a_preset_is_a_run_that_fits(name):
    row, cfg = presets()[name], preset(name)
    p = run_price(cfg, shape_of_plan(row["shape"]), row["devices"], row["device"])
    assert 0 < p["memory"] < p["room"] and p["minutes"] > 0
    assert re.search(r"[\u4e00-\u9fff]", row["title"][1] + row["about"][1]) and row["title"][0] and row["about"][0]


def test_a_price_is_the_planners():
    cfg = preset("full-eight-cards")
    c = shape_of_plan("qwen2-7b")
    want = plan(PlanConfig(model="qwen2-7b", devices=8, seq=4096, global_batch=64, tp=1, pp=1, cp=1, micro=1, zero=3, recompute="none")).best[0]
    got = run_price(cfg, c, 8)
    assert abs(got["memory"] * 2**30 - want["memory"]) < 1 and abs(got["minutes"] * 60 / cfg.train.train_iters - want["seconds"]) < 1e-6
    lora, whole = preset("lora-one-card"), preset("lora-one-card")
    whole.tune.lora_target_modules = []
    a, b = run_price(lora, c), run_price(whole, c)
    assert a["memory"] < b["memory"] - 10 * c.num_params() / 2**30 # neither moments, nor fp32 copies, nor gradients of what does not learn


COMMANDS_WITH_PRESETS = [PreprocessConfig(input=str(ROOT / "data_samples/tales.jsonl"), output_prefix="out/x", tokenizer_name_or_path=str(ROOT / "data_samples/tokenizer")), ChatConfig(model=""),
                         EvalConfig(model=[], data_path=["d"]), PlanConfig(model="qwen2-7b"), ModelLinkConvertConfig(load_dir="nowhere", save_dir="x")]


@pytest.mark.parametrize("now", COMMANDS_WITH_PRESETS, ids=lambda c: type(c).__name__)
def test_every_command_begins_somewhere(now, monkeypatch):
    "Its presets are configs of it, keep its folders, and have a price in both languages, or the reason why there is none."
    for name, row in presets(type(now)).items():
        cfg = preset(name, now)
        assert not {"input", "output_prefix", "load_dir", "save_dir", "model", "data_path"} & {d["knob"] for d in differences(now, cfg)} and row["title"][0] and re.search(r"[\u4e00-\u9fff]", row["title"][1] + row["about"][1])
        said = []
        for language in ("en", "zh"):
            monkeypatch.setenv("ASCEND_NB_LANG", language)
            try: said.append(price(cfg, row)[0])
            except UserError as e: said.append(e.text())
        assert (said == ["", ""]) if isinstance(now, PlanConfig) else re.search(r"\d|^Found ", said[0]) and re.search(r"[\u4e00-\u9fff]", said[1]) and "predicted" not in said[1], said


def test_what_a_talk_holds_is_what_transformers_holds():
    "Weights and the cache of a whole context, against a model and a cache that transformers has made."
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM
    hf = LlamaConfig(vocab_size=128, hidden_size=64, intermediate_size=96, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2, max_position_embeddings=32, tie_word_embeddings=False)
    model = LlamaForCausalLM(hf)
    past = model(torch.zeros(3, 32, dtype=torch.long), use_cache=True).past_key_values
    told = speaking_bytes(config_from_hf(hf.to_dict()), "fp32", texts=3)
    assert told["weights"] == sum(p.numel() * 4 for p in model.parameters())
    assert told["contexts"] == sum(t.numel() * 4 for layer in past.layers for t in (layer.keys, layer.values))


def test_a_wrong_value_does_not_lose_the_folders(begun):
    bar, f = begun.bar, begun.children[1]
    f.fields["train", "lr"].control.value = "fast"
    assert text_of(begun).count("GiB") == 0, "a price of what stood there before"
    bar.pick.value = "lora-one-card"
    assert f.value.train.load == "models/mine" and f.value.train.save == "runs/mine" and "GiB" in text_of(begun)


@pytest.fixture
def begun(tmp_path, monkeypatch):
    monkeypatch.setenv("ASCEND_NB_LANG", "en")
    page = with_presets(form(RunConfig(train=TrainConfig(load="models/mine", save="runs/mine")), only=("train.lr", "train.stage", "train.train_iters")), str(tmp_path / "run.yaml"))
    page.bar.thread.join()
    yield page
    shut(page)


def text_of(page):
    from ascend_nb.ui.static import as_text
    page.bar.thread.join()
    return as_text(page.bar)


def test_a_form_begins_with_a_preset_and_tells_what_differs(begun):
    bar, f = begun.bar, begun.children[1]
    bar.pick.value = "lora-one-card"
    assert f.value == preset("lora-one-card", RunConfig(train=TrainConfig(load="models/mine", save="runs/mine"))) and f.value.train.load == "models/mine"
    assert "nothing differs" in text_of(begun) and "GiB on 1 x atlas-a2" in text_of(begun) and "upper bound" in text_of(begun)
    f.fields["train", "lr"].control.value = "5e-05"
    assert differences(preset("lora-one-card", f.value), f.value) == [dict(knob="train.lr", was="0.0001", now="5e-05")]
    assert "train.lr  0.0001  5e-05" in text_of(begun)
    switch("zh")
    assert "单卡 LoRA" in text_of(begun) and "当前" in text_of(begun) and bar.pick.value == "lora-one-card"


def test_yaml_goes_there_and_back(begun, tmp_path):
    bar, f = begun.bar, begun.children[1]
    bar.pick.value = "full-eight-cards"
    bar.save.click()
    assert load_yaml(RunConfig, tmp_path / "run.yaml") == f.value and "Saved to" in text_of(begun) and [p.name for p in tmp_path.iterdir()] == ["run.yaml"]
    save_yaml(RunConfig(train=TrainConfig(lr=1.0, save="x")), tmp_path / "run.yaml")
    bar.read.click()
    assert f.value.train.lr == 1.0 and f.value.train.save == "x"
    (tmp_path / "run.yaml").write_text("train: {lerning_rate: 1}")
    bar.read.click()
    assert "unknown" not in text_of(begun) and "Found the key 'lerning_rate'" in text_of(begun) and f.value.train.lr == 1.0
    f.fields["train", "lr"].control.value = "fast"
    bar.save.click()
    assert "expected a float" in text_of(begun) and "lerning" in (tmp_path / "run.yaml").read_text()
