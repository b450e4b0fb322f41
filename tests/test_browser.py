"""The studio in a real browser: JupyterLab 4 and voila, driven by what is written on the page. `make test-ui` runs all of it."""
import os
import time

import pytest
from browsing import begin, browser, field, fill, lab, press, says, sessions, shot, tab, theme, unfold, voila

browsing = pytest.mark.slow  # by `make test-ui`


@browsing
def test_first_run_by_clicking(desk):
    "Data, mask, training, a dead kernel, a new one that finds the run, stop, chat, score, profile; behind a base URL, as a reverse proxy has it."
    with lab(desk, "/npu7/") as (root, token, _), browser() as (page, afar):
        begin(page, root, token)
        _data(page)
        _train(page, desk)
        _dies_and_is_found(page, root, token)
        _chat(page)
        _evaluate(page)
        _profile(page)
        assert not afar and not page.complaints


def test_voila_shows_the_studio_and_changes_its_language(desk):
    "No code, no network; a language is one click."
    with voila(desk) as root, browser() as (page, afar):
        page.goto(root, wait_until="commit")
        says(page, "kernel alive", 90)
        assert page.locator("text=from ascend_nb").count() == 0
        page.locator("button:visible", has_text="中文").first.click()
        says(page, "环境检查")
        tab(page, "训练")
        says(page, "开始训练")
        assert page.locator(".lm-TabBar-tab:visible", has_text="Train").count() == 0
        shot(page, "studio_voila_zh")
        assert not afar and not page.complaints


def _data(page):
    fill(page, "data", "instruct.json")
    fill(page, "tokenizer", "tokenizer")
    page.locator("button:visible", has_text="Look at it").first.focus()
    page.keyboard.press("Enter")  # no mouse is needed
    says(page, "AlpacaStyleInstructionHandler")
    says(page, "read, not learned")
    page.locator("button.ascend-nb-fold:visible", has_text="Make tokens").first.evaluate("e => e.scrollIntoView({block: 'end'})")
    shot(page, "studio_data")
    unfold(page, "Make tokens")
    fill(page, "output_prefix", "notes")
    press(page, "Start preprocessing")
    says(page, "preprocess: finished", 120)
    press(page, "Train on the result")


def _train(page, desk):
    says(page, "data_path")
    assert field(page, "data_path").input_value().endswith("notes")
    press(page, "New model")
    for name, n in dict(hidden_size=48, intermediate_size=96, num_hidden_layers=2, num_attention_heads=2).items(): fill(page, name, str(n))
    press(page, "Basics")
    fill(page, "train_iters", "zero")
    says(page, "expected a int")
    shot(page, "studio_wrong_value")
    for name, n in dict(train_iters=4000, seq_length=256, save_interval=50, lr=0.002).items(): fill(page, name, str(n))
    field(page, "stage").select_option("sft")
    press(page, "Start")
    says(page, r"step \d+ of 4000, loss", 120)


def _dies_and_is_found(page, root, token):
    for k in sessions(root, token): os.kill(_pid(k["id"]), 9)
    time.sleep(1)
    begin(page, root, token)
    tab(page, "Train")
    says(page, "1 still going: attached to", 60)
    says(page, r"step \d+ of 4000, loss", 60)
    shot(page, "studio")
    press(page, "Stop")
    says(page, "stopped", 60)


def _chat(page):
    tab(page, "Chat")
    fill(page, "model or run", "runs/run")
    press(page, "Load")
    says(page, "nothing said yet", 90)
    fill(page, "message", "What pet does Mira keep?")
    press(page, "Send")
    says(page, "tokens/s, ended", 90)
    shot(page, "studio_chat")


def _evaluate(page):
    tab(page, "Evaluate")
    fill(page, "models", "runs/run")
    page.locator(".widget-checkbox:visible", has_text="mmlu").first.locator("input").check()
    for folder, words in (("town_quiz", "Did you mean town_quiz.test"), ("town_quiz/test", "evaluate: finished")):  # the files lie one deeper, and the page says so
        fill(page, "data folder", folder)
        press(page, "Start evaluating")
        says(page, words, 180)
    page.locator("button.ascend-nb-fold:visible", has_text="Questions and answers").first.evaluate("e => e.scrollIntoView({block: 'end'})")
    shot(page, "studio_evaluate")


def _profile(page):
    tab(page, "Profile")
    fill(page, "recording", "npu_profile")
    press(page, "Read the recording")
    page.locator("img:visible").first.wait_for()
    page.locator("button.ascend-nb-fold:visible", has_text="Two recordings").first.evaluate("e => e.scrollIntoView({block: 'end'})")
    shot(page, "studio_profile")
    theme(page, dark=True)
    tab(page, "Train")
    says(page, "Basics")
    shot(page, "studio_dark")


def _pid(kernel):
    import psutil
    return next(p.pid for p in psutil.process_iter(["cmdline"]) if any(kernel in w for w in p.info["cmdline"] or []))
