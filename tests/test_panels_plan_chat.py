"""The pages for plans and for talks, driven as a person would: sliders, buttons, messages; and what they say."""
import gc
import json
import os
import re
import time
import weakref
from pathlib import Path

import pytest
import torch

from ascend_nb.adapter_files import save_adapter
from ascend_nb.adapters import LoraSpec, add_adapter, pairs
from ascend_nb.chat import Chat
from ascend_nb.config import ChatConfig, ModelConfig, PlanConfig, RunConfig
from ascend_nb.generate import load
from ascend_nb.hf_format import save_model
from ascend_nb.model import Decoder
from ascend_nb.planner import GIB, named_shapes, plan, shape_of_plan
from ascend_nb.schema import load_yaml
from ascend_nb.tokenizers import load_tokenizer
from ascend_nb.ui.bilingual import switch
from ascend_nb.ui.chat_panel import ChatPanel, bubbles
from ascend_nb.ui.plan_panel import PARTS, PlanPanel, memory_bars
from ascend_nb.ui.static import as_text
from here import ascend
from pointing import shut


@pytest.fixture(autouse=True)
def english(monkeypatch): monkeypatch.setenv("ASCEND_NB_LANG", "en")


def settled(page, seconds=30):
    "Wait until a page has answered."
    end = time.time() + seconds
    while page.busy and time.time() < end: time.sleep(.01)
    assert not page.busy
    page.thread.join(10)
    return page


@pytest.fixture
def page(tmp_path):
    page = settled(PlanPanel(PlanConfig(model="qwen2-7b", devices=8, global_batch=64, out=str(tmp_path / "run.yaml")), wait_s=.01))
    yield page
    shut(settled(page))


def test_a_page_says_what_the_command_says(page):
    want = plan(page.config())
    assert [r["layout"] for r in page.plan.best] == [r["layout"] for r in want.best]
    text = as_text(page)
    assert f"{want.best[0]['tokens_per_s']:,.0f} tokens/s a device" in text and f"{want.fit} of {want.searched} layouts fit" in text
    assert all(n in text for n in want.notes)


def test_bars_add_up_and_turn_red(page):
    want = plan(PlanConfig(model="qwen2-7b", devices=8, global_batch=64, tp=1, pp=2, micro=8, recompute="none")).tight
    room = page.plan.room
    html, text = memory_bars(want["parts"], room), as_text(memory_bars(want["parts"], room))
    for i, stage in enumerate(want["parts"]):
        assert abs(sum(stage[k] for k in PARTS) - stage["total"]) < 1 # every part has a colour
        over = stage["total"] > room
        line = text.splitlines()[i]
        assert f"stage {i}" in line and f"{stage['total'] / GIB:.1f} of {room / GIB:.1f} GiB" in line and ("too much by" in line) == over
    assert html.count("error-color") == 2 * sum(s["total"] > room for s in want["parts"]) > 0
    assert "error-color" not in memory_bars(page.plan.best[0]["parts"], room)


def test_make_it_fit_applies_the_cheapest_change(page):
    for name, v in dict(tp=1, pp=1, cp=1, micro=4, recompute="none", zero=3).items(): page.sliders[name].value = v
    settled(page)
    assert not page.plan.best and page.write.disabled and page.hand.disabled and not page.fit.disabled and "too much by" in as_text(page.bars)
    change = page.plan.tight["changes"][0]
    page.fit.click(); settled(page)
    assert page.plan.best[0]["memory"] <= page.plan.room and page.fit.disabled and not page.write.disabled
    assert f"Changed: {change['change']}" in as_text(page) and page.sliders["recompute"].value != "none"
    got, want = page.plan.best[0]["layout"], change["layout"]
    assert (got.tp, got.pp, got.micro, got.zero, got.again, got.mlp_again) == (want.tp, want.pp, want.micro, want.zero, want.again, want.mlp_again)
    page.loosen.click(); settled(page)
    assert all(s.value == s.free for s in page.sliders.values())


def test_where_no_change_helps_all_is_left_to_the_planner(page):
    page.model.value = "llama3.1-70b"
    for name, v in dict(tp=1, pp=1, cp=1, micro=8, recompute="none", zero=1).items(): page.sliders[name].value = v
    settled(page)
    assert not page.plan.best and not page.plan.tight["changes"]
    page.fit.click(); settled(page)
    assert "all is left to the planner" in as_text(page) and page.sliders["tp"].value == 0


def test_what_is_written_is_what_train_takes(page, tmp_path):
    got = []
    assert page.hand.layout.display == "none" # nobody to hand over to
    page.on_run = got.append
    page.pick.value = 1
    page.write.click(); page.hand.click()
    cfg = load_yaml(RunConfig, tmp_path / "run.yaml")
    assert cfg == got[0] and cfg.model == shape_of_plan("qwen2-7b") and cfg.parallel.context_parallel_size == page.plan.best[1]["layout"].cp
    assert "torchrun --nproc-per-node 8" in as_text(page)
    out = ascend("plan", "qwen2-7b", "--global-batch", 64, "--out", tmp_path / "cli.yaml", "--json")
    page.pick.value = 0; page.write.click()
    assert out.returncode == 0 and (tmp_path / "cli.yaml").read_text() == (tmp_path / "run.yaml").read_text()


def test_many_changes_are_one_question(page):
    before = page.thread
    for n in (16, 32, 64): page.controls["devices"].value = n
    settled(page)
    assert page.plan.best[0]["layout"].world == 64 and page.thread is not before


def test_a_callback_returns_at_once(page):
    t = time.perf_counter()
    page.controls["seq"].value = 2048
    assert time.perf_counter() - t < .1
    settled(page)


@pytest.mark.parametrize("language,words", [("en", "These numbers of devices work"), ("zh", "可用的设备数")])
def test_wrong_input_is_told(page, language, words):
    switch(language); settled(page)
    page.controls["devices"].value = 7; page.sliders["tp"].take(2); settled(page)
    assert words in as_text(page.trouble) and page.write.disabled and not as_text(page.bars)
    page.controls["devices"].value = 8; settled(page)
    assert not as_text(page.trouble) and not page.write.disabled
    page.model.value = "no/such/folder"; settled(page)
    assert "no/such/folder" in as_text(page.trouble)


def test_both_languages_have_the_same_numbers(page):
    english = as_text(page.figures)
    switch("zh"); settled(page)
    text = as_text(page)
    assert "规划" in text and "自动" in text and "阶段 0" in text and "写出 YAML" in text
    numbers = lambda t: re.findall(r"\d[\d.,]*\d", t)
    assert numbers(english) == numbers(as_text(page.figures))
    switch("en"); settled(page)
    assert as_text(page.figures) == english


def test_named_shapes_are_those_that_were_published(shared_data):
    from ascend_nb.families import config_from_hf
    same = {"qwen2-7b": "qwen2_7b", "llama3.1-70b": "meta-llama--Meta-Llama-3.1-70B", "deepseek-v3": "deepseek-ai--DeepSeek-V3", "mixtral-8x7b": "mistralai--Mixtral-8x7B-v0.1", "qwen3-30b-a3b": "Qwen--Qwen3-30B-A3B", "gemma2-9b": "gemma2_9b"}
    for name, folder in same.items():
        d = json.loads((shared_data / "configs" / folder / "config.json").read_text())
        assert shape_of_plan(name) == config_from_hf({k: v for k, v in d.items() if k != "quantization_config"}), name


@pytest.mark.parametrize("name", named_shapes())
def test_every_named_shape_can_be_planned(name):
    assert plan(PlanConfig(model=name, devices=8, tp=1, pp=1, cp=1, micro=1, recompute="full", zero=3)).searched


@pytest.fixture(scope="module")
def folder(samples, tmp_path_factory):
    "A random model that never ends by itself, 2,000 positions long, with the sample tokenizer and its chat template; and an adapter of it."
    path, tok = tmp_path_factory.mktemp("talk"), load_tokenizer(samples / "tokenizer")
    model = Decoder(ModelConfig(vocab_size=tok.vocab_size, hidden_size=64, num_hidden_layers=2, num_attention_heads=4, max_position_embeddings=2000, tie_word_embeddings=False)).init_weights(1).eval()
    with torch.no_grad(): model.lm_head.weight[tok.eos_token_id] = 0
    save_model(model, path / "m", tok)
    add_adapter(model, LoraSpec(4, 8.), "tuned")
    with torch.no_grad():
        for p in pairs(model, "tuned").values(): p.B.normal_(0, .5, generator=torch.Generator().manual_seed(5))
    save_adapter(model, path / "tuned", base=str(path / "m"))
    return path


def done(page, seconds=60):
    page.thread.join(seconds)
    assert not page.thread.is_alive()
    return page


@pytest.fixture
def talk(folder, one_thread):
    page = ChatPanel(ChatConfig(model=str(folder / "m"), max_new_tokens=8))
    page.load.click()
    yield done(page)
    done(page).free(); shut(page)


def say(page, text, wait=True):
    page.text.value = text
    page.go.click()
    return done(page) if wait else page


def answers(cfg, *questions, adapter=None):
    "The same, without a page."
    chat = Chat(*load(cfg), cfg)
    if cfg.lora_load: chat.adapter(adapter)
    return [(q, "".join(chat.stream(q))) for q in questions]


def test_a_page_answers_as_a_chat_does(talk, folder):
    say(say(talk, "One?"), "Two?")
    c, = talk.columns
    assert c.chat.history == answers(ChatConfig(model=str(folder / "m"), max_new_tokens=8), "One?", "Two?")
    text = as_text(talk)
    assert "You: One?" in text and "8 tokens, " in text and "tokens/s, ended by max_new_tokens" in text and not talk.text.value
    talk.clear.click()
    assert not c.chat.history and "nothing said yet" in as_text(talk)


def test_enter_sends(talk):
    talk.text.value = "One?"
    talk.text._handle_custom_msg(dict(event="submit"), [])
    assert len(done(talk).columns[0].chat.history) == 1


def test_stop_keeps_what_was_said(talk):
    talk.form.fields["max_new_tokens",].control.value = "1900"
    c, = talk.columns
    drawn, start = [], time.time()
    c.talk.observe(drawn.append, "value")
    say(talk, "Tell me all.", wait=False)
    while len(drawn) < 4 and time.time() < start + 30: time.sleep(.02)
    assert not talk.stop.disabled and talk.go.disabled and talk.load.disabled
    talk.stop.click(); done(talk)
    (question, answer), = c.chat.history
    assert question == "Tell me all." and answer and len(c.chat.last.ids) < 1900 and answer in c.talk.value.replace("&lt;", "<").replace("&gt;", ">").replace("&amp;", "&").replace("&quot;", '"').replace("&#x27;", "'")
    assert "stopped by you" in as_text(c.foot) and talk.stop.disabled and not talk.go.disabled
    assert len(drawn) <= 10 * (time.time() - start) + 4 # ten times a second
    talk.form.fields["max_new_tokens",].control.value = "4"
    assert len(say(talk, "And now?").columns[0].chat.history) == 2


def test_adapters_answer_beside_the_model(folder, one_thread):
    cfg = ChatConfig(model=str(folder / "m"), lora_load=[str(folder / "tuned")], max_new_tokens=8)
    page = ChatPanel(cfg)
    assert page.more.value == str(folder / "tuned")
    page.load.click(); say(say(done(page), "One?"), "Two?")
    assert [c.adapter for c in page.columns] == [None, "tuned"]
    for c in page.columns: assert c.chat.history == answers(cfg, "One?", "Two?", adapter=c.adapter)
    assert page.columns[0].chat.history != page.columns[1].chat.history
    assert page.columns[0].chat.history == answers(ChatConfig(model=str(folder / "m"), max_new_tokens=8), "One?", "Two?")
    assert "m · without adapter" in as_text(page) and "m · tuned" in as_text(page)
    page.free(); shut(page)


def test_models_stand_beside_each_other_and_old_ones_are_given_up(talk, folder):
    old = weakref.ref(talk.columns[0].chat.model)
    talk.beside.value = str(folder / "m")
    talk.load.click(); say(done(talk), "One?")
    one, two = talk.columns
    assert one.chat.history == two.chat.history and one.chat.model is not two.chat.model
    gc.collect()
    assert old() is None
    talk.beside.value = str(folder / "nothing")
    talk.load.click(); done(talk)
    assert "Found nothing at" in as_text(talk.trouble) and not talk.columns
    say(talk, "One?", wait=False)
    assert "no model that is loaded" in as_text(talk.trouble) and talk.text.value == "One?"


@pytest.mark.parametrize("language,words", [("en", "expected at most 1999"), ("zh", "最多读取 2000 个")])
def test_a_message_that_is_too_long(talk, language, words):
    switch(language)
    say(talk, "late " * 2500)
    assert words in as_text(talk.trouble) and talk.text.value.startswith("late late") and not talk.columns[0].chat.history
    say(talk, "One?")
    assert not as_text(talk.trouble) and len(talk.columns[0].chat.history) == 1


def test_a_model_without_a_template_says_what_is_used(folder, tmp_path, one_thread):
    import shutil
    shutil.copytree(folder / "m", tmp_path / "bare")
    for name in ("chat_template.jinja",): (tmp_path / "bare" / name).unlink(missing_ok=True)
    path = tmp_path / "bare/tokenizer_config.json"
    path.write_text(json.dumps({k: v for k, v in json.loads(path.read_text()).items() if k != "chat_template"}))
    page = ChatPanel(ChatConfig(model=str(tmp_path / "bare"), max_new_tokens=4))
    page.load.click(); done(page)
    assert "no chat template: the alpaca form is used" in as_text(page.said)
    say(say(page, "One?"), "Two?")
    assert as_text(page.said).count("alpaca") == 1
    page.free(); shut(page)


def test_knobs_hold_from_the_next_answer_on(talk):
    talk.form.fields["max_new_tokens",].control.value = "3"
    assert len(say(talk, "One?").columns[0].chat.last.ids) == 3
    talk.form.fields["temperature",].control.value = "warm"
    say(talk, "Two?")
    assert "expected a float" in as_text(talk.trouble) and talk.text.value == "Two?" and len(talk.columns[0].chat.history) == 1
    talk.form.fields["temperature",].control.value = "0.5"
    talk.form.fields["task",].control.value = "do_sample"
    talk.form.code.button.click()
    assert all(x in talk.form.code.text.value for x in ("ascend_nb chat --task do_sample", "--temperature 0.5", f"--model {talk.model.value}"))
    assert say(talk, "Two?").columns[0].chat.history[0][0] == "One?" # what was said stays
    talk.form.fields["task",].control.value = "beam_search"
    say(talk, "Three?")
    assert "task=beam_search in a chat" in as_text(talk.trouble)


def test_what_was_said_is_escaped():
    html = bubbles([("<script>x</script>", "<img src=x onerror=y> & so on")])
    assert "<script>" not in html and "<img" not in html and "<img src=x onerror=y> & so on" in as_text(html)


def test_a_talk_in_chinese(talk):
    say(talk, "One?")
    switch("zh")
    text = as_text(talk)
    assert "您: One?" in text and "个词元" in text and "发送" in text and "清空" in text and "停止" in text
    switch("en")
    assert "You: One?" in as_text(talk)


@pytest.mark.slow
def test_smollm2_on_the_page():
    path = os.environ.get("ASCEND_NB_SMOLLM2")
    if not path or not (Path(path) / "model.safetensors").is_file(): pytest.skip("ASCEND_NB_SMOLLM2 does not name a folder (ascend_nb fetch smollm2-135m --to DIR)")
    page = ChatPanel(ChatConfig(model=path, max_new_tokens=24))
    page.load.click(); say(done(page, 120), "What is the capital of France?")
    assert "Paris" in page.columns[0].chat.history[0][1]
