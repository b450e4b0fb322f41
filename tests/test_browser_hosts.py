"""The studio where and how people read it: Notebook 7, VS Code's widget manager, no widgets at all; both themes, narrow and wide; without a mouse; after a reload. `make test-ui` runs it."""
import json
import os
import time
from pathlib import Path

import pytest
from browsing import CUT, FOCUS, MARK, PALE, VSCODE, begin, browser, field, fill, lab, look_at_data, open_lab, press, says, sessions, shot, theme, turn, unfold, voila
from conftest import ROOT

pytestmark = pytest.mark.slow
PAGES = dict(Data="数据", Convert="转换", Plan="规划", Train="训练", Chat="对话", Evaluate="评测", Profile="性能分析", Doctor="环境检查")


def _errand(page, name="notes"):
    "A file becomes tokens, by pointing."
    turn(page, "Data")
    look_at_data(page)
    unfold(page, "Make tokens")
    fill(page, "output_prefix", name)
    press(page, "Start preprocessing")
    says(page, "preprocess: finished", 120)


def _wrong_value(page):
    "A form says why, and takes it back."
    turn(page, "Train")
    fill(page, "train_iters", "zero")
    says(page, "expected a int")
    fill(page, "train_iters", "20")
    page.locator("text=/expected a int/").locator("visible=true").first.wait_for(state="hidden")


def _other_language(page):
    page.locator("button:visible", has_text="中文").first.click()
    turn(page, "训练")
    says(page, "开始训练")
    assert not page.locator(".lm-TabBar-tab:visible", has_text="Train").count()


def _all_of_it(page):
    for name in PAGES: turn(page, name)
    _errand(page)
    _wrong_value(page)
    _other_language(page)


def test_notebook_7(desk):
    "Its cell is run with Shift+Enter; pages open, a form answers, an errand ends, the language changes."
    pytest.importorskip("notebook", reason="no Notebook 7: make dev")
    with lab(desk, "/npu7/", "notebook") as (root, token, _), browser() as (page, afar):
        open_lab(page, root, token, where="notebooks")
        page.complaints.clear()  # Notebook 7.6's own, before a cell has run
        page.locator(".jp-CodeCell .cm-content").first.click()
        page.keyboard.press("Shift+Enter")
        says(page, "kernel alive")
        _all_of_it(page)
        assert list(desk.glob("notes*.bin")) and not afar and not page.complaints


def test_the_widget_manager_of_vs_code(desk):
    "VS Code cannot be had here, but what its notebook draws widgets with can: its own manager, in a browser, on a real kernel."
    bundle = Path(os.environ.get("ASCEND_NB_VSCODE_WIDGETS", "-"))
    if not bundle.is_file(): pytest.skip("no widget manager of VS Code: npm pack @vscode/jupyter-ipywidgets8, unpack it, ASCEND_NB_VSCODE_WIDGETS=package/dist/ipywidgets.js")
    with lab(desk) as (root, token, _), browser() as (page, afar):
        page.route("**/vscode-widgets.js", lambda route: route.fulfill(path=bundle, content_type="text/javascript"))
        open_lab(page, root, token)
        assert page.evaluate(VSCODE, f"{root}vscode-widgets.js") == []
        says(page, "kernel alive")
        assert page.locator("#vscode .jupyter-widgets").count() > 20 and not page.locator(".jp-OutputArea-output").count()
        _all_of_it(page)
        assert list(desk.glob("notes*.bin")) and not afar


def test_where_widgets_are_missing_it_is_html_and_text(desk):
    "The notebook run without any front end, and its file read by a browser that runs no script."
    import nbformat
    from nbclient import NotebookClient
    from nbconvert import HTMLExporter
    book = nbformat.read(desk / "studio.ipynb", 4)
    book.cells[0].source += "\n"
    NotebookClient(book, timeout=120, resources=dict(metadata=dict(path=str(desk)))).execute()
    data = book.cells[0].outputs[-1].data
    assert "Look at it" in data["text/plain"] and "<summary>Train</summary>" in data["text/html"]
    del data["application/vnd.jupyter.widget-view+json"]  # as a host without widgets sees it
    (desk / "studio.html").write_text(HTMLExporter(template_name="basic").from_notebook_node(book)[0])
    with browser(java_script_enabled=False) as (page, afar):
        page.goto(f"file://{desk}/studio.html")
        for words in ("ascend_nb studio", "Find out what a file is", "Look at it", "Doctor"): assert page.get_by_text(words).first.is_visible()
        assert not afar


def _model(folder):
    "A model that can say something, and no more."
    from ascend_nb.config import ModelConfig
    from ascend_nb.hf_format import save_model
    from ascend_nb.model import Decoder
    from ascend_nb.tokenizers import load_tokenizer
    tok = load_tokenizer(ROOT / "data_samples/tokenizer")
    save_model(Decoder(ModelConfig(vocab_size=tok.vocab_size, hidden_size=32, num_hidden_layers=1, num_attention_heads=2, max_position_embeddings=512)).init_weights(1), folder, tok)


LONG = "一个很长的目录名/" * 6 + "a_folder_whose_name_goes_on_and_on_without_a_blank_" * 3 + "结束"


def _fill_all(page):
    "Something on every page: results, a reason in red, a long path, Chinese."
    turn(page, "Data")
    look_at_data(page)
    turn(page, "Convert")
    fill(page, "checkpoint", "model")
    press(page, "Show its tensors")
    says(page, "tensors,")
    unfold(page, "New layout")
    press(page, "Dry run")
    says(page, "save_dir missing")
    turn(page, "Plan")
    says(page, "layouts fit")
    turn(page, "Train")
    fill(page, "data_path", LONG)
    fill(page, "train_iters", "很多")
    says(page, "expected a int")
    turn(page, "Chat")
    fill(page, "model or run", "model")
    press(page, "Load")
    says(page, "nothing said yet", 90)
    fill(page, "message", "你好，Mira 养什么宠物？" * 8)
    press(page, "Send")
    says(page, "tokens/s", 90)
    turn(page, "Evaluate")
    fill(page, "models", LONG)
    fill(page, "data folder", LONG)
    turn(page, "Profile")
    fill(page, "recording", "npu_profile")
    press(page, "Read the recording")
    page.locator("img:visible").first.wait_for()
    turn(page, "Doctor")
    press(page, "Check this machine")
    says(page, "Report as text", 90)


def test_every_page_can_be_read(desk):
    "Both themes and languages at 900, 1000 (1500 at 150 %), 1400 and 1600 pixels: no text too pale, none cut off, nothing beyond the edge."
    _model(desk / "model")
    bad, looked = [], 0
    with lab(desk) as (root, token, _), browser() as (page, afar):
        begin(page, root, token)
        _fill_all(page)
        for zh in (False, True):
            if zh: page.locator("button:visible", has_text="中文").first.click(); says(page, "内核存活"); page.locator("h3", has_text="环境检查").first.wait_for(); time.sleep(3)
            for dark in (False, True):
                theme(page, dark)
                for wide in (900, 1000, 1400, 1600):
                    page.set_viewport_size(dict(width=wide, height=1200))
                    for name in PAGES:
                        turn(page, PAGES[name] if zh else name)
                        n, pale = page.evaluate(PALE)
                        looked += n
                        bad += [(name, zh, dark, wide, b) for b in pale + page.evaluate(CUT)]
                        if wide in (900, 1400): shot(page, f"{name}_{'zh' if zh else 'en'}_{'dark' if dark else 'light'}_{wide}", "ASCEND_NB_LOOKS")
        assert looked > 5000 and not bad, bad[:12]
        assert not afar and not page.complaints


def test_voila_can_be_read_in_the_dark(desk):
    with voila(desk) as root, browser() as (page, afar):
        page.goto(f"{root}?theme=dark", wait_until="commit")
        says(page, "kernel alive", 90)
        for name in ("Data", "Train", "Profile"):
            turn(page, name)
            assert page.evaluate(PALE)[1] == [] and page.evaluate(CUT) == []
        assert not afar and not page.complaints


def test_without_a_mouse(desk):
    "Tab reaches every control of every page, in order, with a ring to be seen; the arrows and Enter change pages; the space bar opens a section; Enter starts."
    with lab(desk) as (root, token, _), browser() as (page, afar):
        begin(page, root, token)
        for i, name in enumerate(PAGES):
            here = page.locator(".ascend-nb .lm-TabBar-tab.lm-mod-current").first
            here.focus()
            if i: page.keyboard.press("ArrowRight"); page.keyboard.press("Enter")
            page.locator("h3:visible", has_text=name).wait_for()
            if name in ("Plan", "Train"): time.sleep(2)  # the planner answers, runs are looked for
            page.locator(".ascend-nb .lm-TabBar-tab.lm-mod-current").first.focus()
            n, at = page.evaluate(MARK), []
            for _ in range(n + 5):
                page.keyboard.press("Tab")
                f = page.evaluate(FOCUS)
                if not f["inside"]: break
                assert f["ring"], (name, f)
                if f["at"] is not None: at.append(f["at"])
            assert at == list(range(n)), (name, n, at)
            page.evaluate("() => document.querySelectorAll('[data-walk]').forEach(e => delete e.dataset.walk)")
        turn(page, "Train")
        head = page.locator("button.ascend-nb-fold:visible", has_text="Presets and files").first
        head.focus()
        page.keyboard.press(" ")
        says(page, "begin with")
        page.keyboard.press("Enter")
        page.locator("text=/begin with/").first.wait_for(state="hidden")
        assert not afar and not page.complaints


def test_a_reload_and_two_tabs_in_the_middle_of_an_errand(desk):
    "The page is loaded again while an errand runs, beside a second one on the same kernel: both find it and see its end."
    rows = json.loads((desk / "instruct.json").read_text())
    (desk / "instruct.json").write_text(json.dumps(rows * 300, ensure_ascii=False))
    with lab(desk) as (root, token, _), browser() as (page, afar):
        begin(page, root, token)
        look_at_data(page)
        unfold(page, "Make tokens")
        fill(page, "output_prefix", "notes")
        press(page, "Start preprocessing")
        says(page, "preprocess: running", 60)
        other = page.context.new_page()
        for p in (page, other):
            begin(p, root, token)
            says(p, "preprocess: (running|finished)", 60)
        assert len(sessions(root, token)) == 1
        for p in (page, other): says(p, "Train on the result", 120)
        other.locator("button:visible", has_text="中文").first.click()
        for p in (page, other): says(p, "用结果训练")  # one kernel, one language
        assert list(desk.glob("notes*.bin")) and not afar and not page.complaints


def test_a_server_that_is_started_again(desk):
    "A training outlives the server, its kernels and the page; the next server's page is attached to it, and stops it."
    with lab(desk) as (root, token, _), browser() as (page, _):
        begin(page, root, token)
        _errand(page)
        press(page, "Train on the result")
        says(page, "data_path")  # the page that was handed to comes along
        press(page, "New model")
        for name, n in dict(hidden_size=32, intermediate_size=64, num_hidden_layers=1, num_attention_heads=2).items(): fill(page, name, str(n))
        press(page, "Basics")
        for name, n in dict(train_iters=100000, seq_length=128).items(): fill(page, name, str(n))
        field(page, "stage").select_option("sft")
        press(page, "Start")
        says(page, r"step \d+ of 100000, loss", 120)
    with lab(desk) as (root, token, _), browser() as (page, afar):
        begin(page, root, token)
        turn(page, "Train")
        says(page, "1 still going: attached to", 60)
        says(page, r"step \d+ of 100000, loss", 60)
        press(page, "Stop")
        says(page, "stopped", 60)
        assert not afar and not page.complaints
