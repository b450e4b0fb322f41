"""The pages for scores and for recordings, driven as a person would, with real results and the small recording of data_samples/."""
import re
import json
import shutil
from pathlib import Path

import pandas as pd
import pytest
from ascend_nb.config import ProfileConfig
from ascend_nb.evaluator import Log
from ascend_nb.keeper import JOB, write_json
from ascend_nb.kept import Errand
from ascend_nb.measuring import EvalConfig
from ascend_nb.profile_plots import PLOTS
from ascend_nb.schema import parse_args, save_yaml
from ascend_nb.ui.bilingual import switch
from ascend_nb.ui.evaluate_panel import EvaluatePanel, Growing, question_html, score_rows
from ascend_nb.ui.profile_panel import ProfilePanel
from ascend_nb.ui.static import as_text
from conftest import ROOT
from pointing import opened, settle, shut, widgets

RECORDING = ROOT / "data_samples/npu_profile"


def sample(i, right, subject="people", **more):
    return dict(subject=subject, doc_id=i, doc={}, prompt=f"Question {i}?", choices=["yes", "no"], logprobs=[-1.0, -2.0], prediction=0, gold=0 if right else 1, correct=right, acc=float(right), **more)


@pytest.fixture
def page(tmp_path):
    with opened(EvaluatePanel, under=tmp_path / "errands") as p: yield p


def an_errand(tmp_path, cfg):
    "The folder of an evaluation that was begun and whose keeper is gone."
    folder = tmp_path / "errands/20260101-000000-000001-evaluate"
    folder.mkdir(parents=True)
    save_yaml(cfg, folder / "config.yaml")
    write_json(folder / JOB, dict(command=[], errand="evaluate", env={}, cwd=str(tmp_path)))
    return Errand(folder)


# -- scores

def test_the_evaluate_page_is_light_and_its_code_is_what_the_controls_say(page):
    assert widgets(page) < 60
    page.models.value, page.data.value = "a\nb\n", "eval"
    page.tasks["boolq"].value = True
    page.own.value = "mine.yaml"
    page.form.fields["limit",].control.value = "7"
    cfg = page.form.value
    assert (cfg.model, cfg.data_path, cfg.task, cfg.limit) == (["a", "b"], ["eval"], ["mmlu", "boolq", "mine.yaml"], 7)
    import shlex
    shown = re.split("<pre[^>]*>", page.form.code.text.value)[3].split("</pre>")[0]
    assert parse_args(EvalConfig, shlex.split(shown)[2:]) == cfg
    page.every.value = True # all knobs; what was filled in stays
    assert page.form.value == cfg and ("batch_size",) in page.form.fields
    page.form.fields["batch_size",].control.value = "none of them"
    assert page.start.disabled


def test_a_new_model_is_filled_in_and_joins_the_others(page):
    page.on_new_model("runs/first/hf")
    assert page.form.value.model == ["runs/first/hf"]
    page.add.click()
    page.on_new_model("runs/second/hf"); page.add.click()
    assert page.form.value.model == ["runs/first/hf", "runs/second/hf"]


@pytest.mark.parametrize("model,data,words", [("", "x", "model"), ("m", "", "data folder")])
def test_what_is_lacking_is_told(page, model, data, words):
    page.model.value, page.data.value = model, data
    page.start.click(); settle(page)
    assert f"Found no {words}" in as_text(page.trouble) and page.job.kept is None
    switch("zh")
    try: assert "请在上方填写" in as_text(page.trouble)
    finally: switch("en")


def test_scores_grow_while_the_evaluator_writes(tmp_path):
    "The file is written by the evaluator's own log."
    log, g = Log(tmp_path / "samples_quiz.jsonl.part", dict(model="m")), Growing(tmp_path / "samples_quiz.jsonl")
    assert g.read() == {}
    log.add([sample(0, True), sample(1, False)])
    assert g.read() == {"people": [1.0, 0.0]}
    log.add([sample(0, True, "places")])
    assert g.read() == {"people": [1.0, 0.0], "places": [1.0]}
    assert Growing(tmp_path / "samples_quiz.jsonl", since=4e9).read() == {} # of a run that was killed before
    shutil.move(tmp_path / "samples_quiz.jsonl.part", tmp_path / "samples_quiz.jsonl")
    assert g.read() == {"people": [1.0, 0.0], "places": [1.0]} # the whole file, from its start
    assert Growing(tmp_path / "samples_quiz.jsonl", since=4e9).read() == {} # another run's


def test_intervals_are_scipys():
    from scipy.stats import binomtest
    row, = score_rows({("m", "t"): {"": [1.0] * 7 + [0.0] * 13}})
    want = binomtest(7, 20).proportion_ci(method="wilson")
    assert (row["n"], row["mean"]) == (20, .35) and (row["low"], row["high"]) == pytest.approx((want.low, want.high), abs=1e-6)
    parts = score_rows({("m", "needle"): {"en": [.25, 1.0]}})
    assert parts[0]["low"] is None # no share of right answers


def test_a_page_opened_later_shows_the_live_table_and_the_answers(tmp_path):
    cfg = EvalConfig(model="runs/m/hf", data_path="d", task="mmlu", output=str(tmp_path / "out/result.json"))
    (tmp_path / "out").mkdir()
    e = an_errand(tmp_path, cfg)
    log = Log(tmp_path / "out/samples_mmlu.jsonl.part", dict(model="m"))
    log.add([sample(i, i % 3 == 0, ["people", "places"][i % 2]) for i in range(12)])
    p = EvaluatePanel(under=tmp_path / "errands")
    assert p.job.kept.folder == e.folder
    rows = [line.split("  ") for line in as_text(p.table).split("\n")]
    assert ["runs/m/hf", "mmlu", "people", "6", "0.3333"] == rows[1][:5] and rows[3][2:5] == ["all", "12", "0.3333"]
    p.more.selected_index = 1; settle(p)
    assert p.pager.n == 12 and "Question 0?" in as_text(p.question) and "right" in as_text(p.question)
    p.only.value = True
    assert p.pager.n == 8 and "wrong" in as_text(p.question)
    p.holds.value = "11"
    assert p.pager.n == 1 and "Question 11?" in as_text(p.question)
    log.add([sample(12, True, "people")]); p.job.refresh()
    assert "  13  " in as_text(p.table)
    switch("zh")
    try: assert "合计" in as_text(p.table) and "只看错题" in as_text(p)
    finally: switch("en")
    shut(p)


def test_written_answers_show_what_was_read_out_of_them():
    text = as_text(question_html(dict(subject="", doc_id=1, prompt="1 + 1 =", output="That is 2 <b>.", extracted="2", gold="2", correct=True)))
    assert "That is 2 <b>." in text and "extracted" in text and "right answer" in text


def write_result(folder, rights):
    folder.mkdir(parents=True)
    (folder / "samples_quiz.jsonl").write_text("".join(json.dumps(sample(i, r)) + "\n" for i, r in enumerate(rights)))
    (folder / "result.json").write_text(json.dumps(dict(samples_files=dict(quiz="samples_quiz.jsonl"), protocol=dict(quiz="lm-eval"))))
    return folder / "result.json"


def test_results_are_compared_with_their_significance(page, tmp_path):
    from scipy.stats import binomtest
    a, b = [i % 4 == 0 for i in range(40)], [i % 4 == 0 or i % 5 == 0 for i in range(40)]
    paths = [write_result(tmp_path / n, x) for n, x in (("base", a), ("tuned", b))]
    page.more.selected_index = 0
    page.results.value = "\n".join(map(str, paths))
    page.go.click(); settle(page)
    only = sum(y and not x for x, y in zip(a, b, strict=True))
    text = as_text(page.comparison)
    p = page.compared["tasks"]["quiz"]["rows"][1]["p"]
    assert p == pytest.approx(binomtest(only, only).pvalue)
    assert f"{only} : 0" in text and f"{p:.4f}" in text and "+0.1500" in text and "data:image/png" in page.comparison.value
    page.results.value = str(paths[0])
    page.go.click(); settle(page)
    assert "at least two" in as_text(page.trouble)
    page.results.value = f"{paths[0]}\n{tmp_path}/none.json"
    page.go.click(); settle(page)
    assert "none.json" in as_text(page.trouble)


# -- recordings

@pytest.fixture
def profile():
    p = ProfilePanel(ProfileConfig(path=str(RECORDING)))
    yield p
    shut(p)


def test_findings_have_their_evidence(profile):
    assert widgets(profile) < 60
    profile.read.click(); settle(profile)
    text = as_text(profile.told)
    steps = pd.concat(pd.read_csv(f) for f in RECORDING.rglob("step_trace_time.csv"))
    share = (steps["Communication(Not Overlapped)"] / steps["Stage"]).mean() # by the files themselves
    assert f"{share:.1%} {share:.0%} of the step" in text and "4 of 4 rows" in text and "What was not recorded" in text


@pytest.mark.parametrize("names", [["waits", "bubble", "memory"], pytest.param(list(PLOTS), marks=pytest.mark.slow)], ids=["some", "all"])
def test_a_plot_is_drawn_when_it_is_chosen(profile, names):
    profile.read.click(); settle(profile)
    for name in names:
        profile.which.value = name; settle(profile)
        assert profile.trouble.error is None and ("<table" in profile.picture.value or "nothing of it" in profile.picture.value), name
    profile.which.value = "steps"; settle(profile)
    assert profile.picture.value.count("<img") == 1 and "alt='Where the time of a step goes'" in profile.picture.value
    switch("zh")
    try:
        settle(profile)
        assert "每步时间构成" in as_text(profile) and profile.which.value == "steps" and "alt='每步时间构成'" in profile.picture.value
    finally: switch("en"); settle(profile)


def test_two_recordings(profile):
    profile.read.click(); settle(profile)
    profile.more.selected_index = 1
    assert "name a second recording" in as_text(profile.change)
    profile.path.value, profile.before.value = str(RECORDING / "rank1_ascend_pt"), str(RECORDING / "rank0_ascend_pt")
    profile.read.click(); settle(profile)
    assert "a step takes 2.58 ms" in as_text(profile.change) and "MatMulV3" in as_text(profile.change) and "<img" in profile.change.value


@pytest.mark.slow
def test_a_report_is_written(profile, tmp_path):
    profile.before.value = str(RECORDING / "rank0_ascend_pt")
    profile.more.selected_index = 2
    profile.out.value = str(tmp_path / "report")
    profile.export.click(); settle(profile)
    assert profile.trouble.error is None and "findings.md" in as_text(profile.wrote)
    assert {p.name for p in (tmp_path / "report").iterdir()} >= {"findings.md", "comparison.png", "steps.csv", "steps.png"}


def test_logs_of_several_runs_lie_over_each_other(profile, tmp_path):
    for name, start in (("one", 4.), ("two", 3.)):
        (tmp_path / name).mkdir()
        (tmp_path / name / "metrics.jsonl").write_text("".join(json.dumps(dict(step=i, loss=start / i, tokens_per_s=10. * i)) + "\n" for i in range(1, 6)))
    profile.files.value, profile.old.value = f"{tmp_path / 'two'}\n{tmp_path / 'one'}", str(tmp_path / "one")
    profile.go.click(); settle(profile)
    text = as_text(profile.curves)
    assert "3.0000  0.6000" in text and "4.0000  0.8000" in text and "OUTSIDE" in text and "<img" in profile.curves.value
    assert "plot-log" in profile.logs_code.text.value
    profile.files.value = ""
    profile.go.click(); settle(profile)
    assert "Found no log" in as_text(profile.trouble)


def test_a_folder_that_is_no_recording(profile):
    profile.path.value = str(Path(ROOT, "data_samples/tokenizer"))
    profile.read.click(); settle(profile)
    assert "Found no profile" in as_text(profile.trouble)
