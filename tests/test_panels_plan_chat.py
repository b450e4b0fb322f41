"""The pages for plans and for talks, driven as a person would: sliders, buttons, messages; and what they say."""
import json
import re
import time

import pytest

from ascend_nb.config import PlanConfig, RunConfig
from ascend_nb.planner import GIB, named_shapes, plan, shape_of_plan
from ascend_nb.schema import load_yaml
from ascend_nb.ui.bilingual import switch
from ascend_nb.ui.plan_panel import PARTS, PlanPanel, memory_bars
from ascend_nb.ui.static import as_text
from here import ascend


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
    return settled(PlanPanel(PlanConfig(model="qwen2-7b", devices=8, global_batch=64, out=str(tmp_path / "run.yaml")), wait_s=.01))


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
    assert "规划" in text and "由规划器选择" in text and "阶段 0" in text and "写出 YAML" in text
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
