"""The pages for training and for the machine, and the studio around all pages, driven as a person would."""
import json
import time
from dataclasses import replace

import pytest
from ascend_nb import jobs
from ascend_nb.config import DataConfig, ModelConfig, PreprocessConfig, RunConfig, TrainConfig
from ascend_nb.preprocess import run as preprocess
from ascend_nb.schema import load_yaml
from ascend_nb.ui.bilingual import switch
from ascend_nb.ui.doctor_panel import DoctorPanel
from ascend_nb.ui.static import as_html, as_text
from ascend_nb.ui.studio import PAGES, studio
from ascend_nb.ui.train_panel import TrainPanel
from conftest import ROOT
from pointing import settle, shut, widgets

SAMPLES = ROOT / "data_samples"


@pytest.fixture
def here(tmp_path, monkeypatch):
    "A folder to work in, with tokens to train on."
    monkeypatch.chdir(tmp_path)
    preprocess(PreprocessConfig(input=str(SAMPLES / "tales.jsonl"), output_prefix="tales", tokenizer_name_or_path=str(SAMPLES / "tokenizer")), json=True)
    return tmp_path


def small(save="runs/first", steps=3000):
    return RunConfig(ModelConfig(hidden_size=32, intermediate_size=64, num_hidden_layers=1, num_attention_heads=2),
                     DataConfig(data_path=["tales_text_document"], tokenizer_name_or_path=str(SAMPLES / "tokenizer"), seq_length=64),
                     train=TrainConfig(train_iters=steps, save=save, device="cpu", save_interval=1000))


def until(true, seconds=60):
    end = time.monotonic() + seconds
    while not true():
        assert time.monotonic() < end
        time.sleep(.05)


def test_a_training_is_started_found_again_and_stopped(here):
    page = TrainPanel(small())
    assert "no run yet" in as_text(page)
    page.start().join()
    job = page.live.job
    until(lambda: job.row().get("step", 0) > 5)
    assert load_yaml(RunConfig, here / "runs/first/job/run.yaml") == small()

    other = TrainPanel()  # another kernel sees the same folder and nothing else
    assert other.live.job.run.path == job.run.path and "1 still going: attached to" in as_text(other)
    assert other.go.disabled and "No data_path" in as_text(other)  # its own form is still empty
    path = other.pages.form.fields["data", "data_path"].control
    path.value = "nowhere"
    assert other.go.disabled and "Found neither data nor a .bin/.idx pair at nowhere" in as_text(other)
    path.value = "tales_text_document"
    assert other.go.disabled and "No tokenizer_name_or_path" in as_text(other)
    other.pages.form.fields["data", "tokenizer_name_or_path"].control.value = str(SAMPLES / "tokenizer")
    assert not other.go.disabled

    page.start().join()  # the folder is in use
    assert "Found a job that is" in as_text(page.trouble)
    page.live.kept.halt.click()
    until(lambda: job.state == "stopped")
    page.live.kept.refresh()
    until(lambda: "none is going" in as_text(page.found))
    assert "stopped" in as_text(page.live.kept) and job.row()["step"] < 3000
    assert (here / "runs/first" / f"step_{job.row()['step']:07d}").is_dir(), "stopped without saving"
    for p in (page, other): shut(p)


def test_a_page_that_is_left_is_put_away(here):
    "Topics that were opened and left cost nothing: not a widget, not a word at the next switch."
    from ascend_nb.ui.bilingual import _TOLD
    page = TrainPanel(small())
    counts = []
    for _ in range(3):
        for key in ("tr_lora", "tr_basics"): page.pages.chosen.value = key
        switch("zh"); switch("en")
        counts.append(len(_TOLD))
    assert counts[0] == counts[-1], counts
    shut(page)


def test_a_failure_is_lifted_out_of_the_log(here):
    (here / "broken_text_document.bin").write_bytes(b"")
    (here / "broken_text_document.idx").write_bytes(b"no index")
    page = TrainPanel(replace(small("runs/bad"), data=DataConfig(data_path=["broken_text_document"], tokenizer_name_or_path=str(SAMPLES / "tokenizer"))))
    page.start().join()
    page.live.job.wait(60)
    page.live.kept.refresh()
    said = as_text(page.live.kept).split("\n")
    assert "failed" in said[0] and said[1].startswith("ascend_nb: ") and "broken_text_document" in said[1]
    page.more.selected_index = 1
    settle(page)
    report = page.more.pages[1].children[0].value
    assert "python" in report and "broken_text_document" in report and "hidden_size: 32" in report
    shut(page)


def test_a_wrong_value_closes_the_start(here):
    page = TrainPanel(small())
    control = page.pages.form.fields["train", "train_iters"].control
    control.value = "many"
    assert page.go.disabled and "expected a int" in as_text(page)
    page.pages.chosen.value = "tr_lora"  # a page with a mistake is left: what was wrong is not kept
    assert not page.go.disabled and page.pages.value.train.train_iters == 3000
    shut(page)


def test_the_code_of_a_training_tells_its_processes(here):
    page = TrainPanel(small())
    page.nproc.value = 2
    page.pages.chosen.value = "tr_spread"
    page.pages.form.code.button.click()
    said = as_text(page.pages.form.code)
    assert "torchrun --nproc-per-node 2" in said and "-m ascend_nb.cli train --hidden-size 32" in said and "launch(cfg, nproc=2)" in said
    assert "ascend_nb train --hidden-size 32" not in said, "one process is another run"
    page.cards.value = "4, 5"
    said = as_text(page.pages.form.code)
    assert "launch(cfg, nproc=2, cards=[4, 5])" in said and "env ASCEND_RT_VISIBLE_DEVICES=4,5 torchrun" in said
    page.cards.value = "four"
    assert page.go.disabled and "Found cards=['four']" in as_text(page.need)
    page.cards.value, page.nproc.value = "", 1
    said = as_text(page.pages.form.code)
    assert "ascend_nb train --hidden-size 32" in said and "from ascend_nb.training import run" in said and said.count("run(cfg)") == 1 and not page.go.disabled
    shut(page)


def test_a_page_without_a_run_cannot_go_on(here):
    page = TrainPanel(small())
    page.again.click()
    assert "Found no run to go on with" in as_text(page.trouble) and not page.again.disabled
    shut(page)


def test_curves_of_several_runs_lie_over_each_other(here):
    for name, first in (("a", 4.), ("b", 3.)):
        (here / "runs" / name).mkdir(parents=True)
        (here / "runs" / name / "metrics.jsonl").write_text("".join(json.dumps(dict(step=s, time=s, loss=first / s, tokens_per_s=10)) + "\n" for s in (1, 2, 3)))
    page = TrainPanel()
    page.more.selected_index = 0
    pick, rows, image = page.more.pages[0].children
    assert set(pick.value) == {"a", "b"} and bytes(image.value[:4]) == b"\x89PNG"
    assert "1.3333" in as_text(rows) and "1.0000" in as_text(rows)
    both = image.value
    pick.value = ("a",)
    assert image.value != both and "1.0000" not in as_text(rows)
    shut(page)


def test_the_doctor_tells_what_the_command_tells():
    from ascend_nb import doctor
    page = DoctorPanel()
    page.check().join()
    facts = doctor.gather()
    names = [c.name for c in doctor.checks(facts)]
    assert [line.split()[1] for line in page.text.value.split("\n")[:len(names)] if not line.startswith(" ")][:2] == names[:2]
    assert all(n in as_text(page) for n in names)
    shut(page)


def test_the_studio_is_light_and_makes_its_pages_when_they_are_opened(here):
    desk = studio()
    assert [*desk.panels] == ["panel_data"] and widgets(desk) < 90
    for i, key in enumerate(PAGES):
        desk.tab.selected_index = i
        assert desk.tab.children[i].children, "a click is answered at once"
        if i: desk.opening.join()
        assert key in desk.panels, as_text(desk)
    html = as_html(desk)
    assert "<script" not in html and "http" not in html.replace("http://www.w3.org", "")
    desk.beat.stop(); shut(desk)


def test_what_a_page_has_made_is_in_the_fields_of_the_next(here):
    desk = studio()
    desk.panels["panel_data"].on_data("tales_text_document", "tok")
    form = desk.panels["panel_train"].pages.form
    assert form.value.data.data_path == ["tales_text_document"] and form.value.data.tokenizer_name_or_path == "tok"
    desk.page("panel_plan").on_run(small())
    assert desk.panels["panel_train"].pages.value == small()
    desk.beat.stop(); shut(desk)


WORDS = ("description", "placeholder", "tooltip")


def _words(w, seen):
    for attr in WORDS:
        text = getattr(w, attr, None)
        if isinstance(text, str) and text.strip(): seen.append((type(w).__name__, attr, text))
    for i, child in enumerate(getattr(w, "children", ())):
        if hasattr(w, "get_title") and not hasattr(w, "boxes") and w.get_title(i): seen.append((type(w).__name__, "title", w.get_title(i)))
        _words(child, seen)
    for i, box in enumerate(getattr(w, "boxes", ())):  # sections, also those that nobody opened
        seen.append((type(w).__name__, "title", w.get_title(i)))
        if box not in w.children: _words(box, seen)
    return seen


def test_every_label_of_the_studio_has_both_languages(here):
    "All pages opened: what is written on a control and is not a knob's name has another text in Chinese."
    from ascend_nb import config
    from ascend_nb.schema import knobs
    from ascend_nb.tasks import TASKS
    names = {k.name for c in vars(config).values() if isinstance(c, type) and hasattr(c, "__dataclass_fields__") for k in knobs(c)}
    names |= {*TASKS}
    desk = studio()
    for key in PAGES: desk.page(key)
    en = _words(desk, [])
    switch("zh")
    try: zh = _words(desk, [])
    finally: switch("en")
    assert len(en) == len(zh) and en == _words(desk, []), "a switch there and back changes nothing"
    same = [e for e, z in zip(en, zh, strict=True) if e == z and any(c.isalpha() for c in e[2]) and e[2].strip() not in names and e[2] not in ("English", "中文")]
    assert not same, same
    desk.beat.stop(); shut(desk)


def test_the_languages_of_a_page_change_without_losing_what_was_typed(here):
    page = TrainPanel(small())
    page.pages.chosen.value = "tr_lora"
    page.pages.chosen.value = "tr_basics"
    page.pages.form.fields["train", "lr"].control.value = "0.5"
    switch("zh")
    try: assert page.go.description == "开始训练" and page.pages.form.fields["train", "lr"].control.value == "0.5" and page.pages.chosen.value == "tr_basics"
    finally: switch("en")
    assert page.go.description == "Start"
    page.pages.chosen.value = "tr_lora"
    switch("zh"); switch("en")
    assert page.pages.chosen.value == "tr_lora" and ("tune", "lora_r") in page.pages.form.fields, "the open page stays open"
    shut(page)


def test_a_finished_run_is_the_next_pages_model(here):
    desk = studio()
    desk.page("panel_train").on_model("runs/first")
    assert "runs/first" in as_text(desk.page("panel_chat")) and "runs/first" in as_text(desk.page("panel_evaluate"))
    desk.beat.stop(); shut(desk)


def test_a_preset_fills_the_form_and_tells_its_price(here):
    page = TrainPanel()
    page.presets.selected_index = 0
    presets, = page.presets.pages[0].children
    other = [name for _, name in presets.pick.options if name != presets.pick.value][0]
    before = page.pages.value
    presets.pick.value = other
    if presets.thread: presets.thread.join(60)
    assert page.pages.value != before and any(c.isdigit() for c in as_text(presets.price)), as_text(presets)
    assert "nothing differs from it" in as_text(presets.changed)
    page.pages.form.fields["train", "lr"].control.value = "0.123"
    assert "train.lr" in as_text(presets.changed) and "0.123" in as_text(presets.changed), "told while one types"
    shut(page)


def test_what_cannot_be_written_is_told(here):
    page = TrainPanel()
    page.presets.selected_index = 0
    bar = page.presets.bar
    (here / "a_file").write_text("")
    bar.path.value = "a_file/run.yaml"
    bar.save.click()
    assert "Cannot write a_file/run.yaml" in as_text(bar.trouble)
    for nowhere in ("", "\0"):
        bar.path.value = nowhere
        bar.save.click()
        assert "no file can have this name" in as_text(bar.trouble) and "Traceback" not in as_text(bar.trouble)
    bar.path.value = "new/run.yaml"
    bar.save.click()
    assert not bar.trouble.error and load_yaml(RunConfig, here / "new/run.yaml") == page.pages.value
    shut(page)


def test_the_command_writes_a_notebook_or_says_why_not(here):
    from here import ascend
    (here / "a_file").write_text("")
    assert json.loads(ascend("studio", "desk", "--app", "none", "--json").stdout)["notebook"] == "desk/studio.ipynb" and (here / "desk/studio.ipynb").is_file()
    for words, said in ((["a_file"], "Cannot write a_file/studio.ipynb"), (["desk", "--page", "panel_trian"], "Did you mean panel_train"), (["desk", "--app", "voila", "--host", "0.0.0.0"], "lets in everyone")):
        r = ascend("studio", *words)
        assert r.returncode == 2 and not r.stdout and said in r.stderr


def test_a_damaged_folder_closes_no_page_and_a_page_that_fails_says_why(here, monkeypatch):
    for name in (".ascend_nb/errands/torn/job.json", "runs/torn/job/job.json"):
        (here / name).parent.mkdir(parents=True)
        (here / name).write_text("{half")
    desk = studio()
    for key in ("panel_data", "panel_train", "panel_evaluate", "panel_convert"): assert desk.page(key), as_text(desk)
    assert "torn: no step yet" in as_text(desk.panels["panel_train"])
    monkeypatch.setattr("ascend_nb.ui.plan_panel.PlanPanel.__init__", lambda self: open("nowhere/at/all"))
    assert desk.page("panel_plan") is None
    desk.page("panel_doctor")
    desk.tab.selected_index = [*PAGES].index("panel_plan")
    assert "The system refused: No such file or directory nowhere/at/all" in as_text(desk), "another page's success does not hide it"
    shut(desk)


def test_a_folder_that_is_removed_under_a_page(here):
    import shutil
    page = TrainPanel(small(steps=2))
    page.start().join()
    page.live.job.wait(60)
    shutil.rmtree(here / "runs")
    page.live.kept.refresh(); page.live.view.refresh()
    page.more.selected_index = 0
    page.search()
    assert not page.trouble.error and "no run yet" in as_text(page.found)
    page.again.click()
    settle(page)
    assert "mistake of ours" not in as_text(page)
    shut(page)


def test_a_job_that_runs_is_not_started_by_looking(here):
    TrainPanel()
    assert jobs.list_jobs("runs") == []


def test_no_page_takes_a_name_of_ipywidgets():
    "A page with an `open` of its own would never reach the browser."
    import importlib

    import ipywidgets as W
    for room, name in PAGES.values():
        own = vars(getattr(importlib.import_module(f"ascend_nb.ui.{room}"), name))
        taken = [n for n in own if callable(getattr(W.VBox, n, None)) and not n.startswith("__") and n != "_repr_mimebundle_"]
        assert not taken, f"{name}: {taken}"


def test_a_switch_of_the_language_leaves_the_open_topic_and_what_was_typed(here):
    page = TrainPanel()
    page.pages.chosen.index = 2
    form = page.pages.form
    next(iter(form.fields.values())).control.value = "q_proj"
    try: switch("zh"); assert page.pages.chosen.index == 2 and page.pages.form is form and next(iter(form.fields.values())).control.value == "q_proj"
    finally: switch("en")
    shut(page)
