"""Pictures in two languages: each label has both, and no glyph is a box."""
import re
import warnings

import matplotlib
import pandas as pd
import pytest
from ascend_nb import pictures, training_logs
from ascend_nb.comparing import bars
from ascend_nb.core import UserError
from ascend_nb.goodput import plot_goodput
from ascend_nb.hardware import find_device
from ascend_nb.packing import length_report, plot_lengths
from ascend_nb.pictures import cjk_font, new_figure, save_figure, with_fonts
from ascend_nb.profile_files import open_profile
from ascend_nb.profile_plots import PLOTS, plot_comparison
from ascend_nb.published import plot_errors
from conftest import ROOT
from matplotlib.text import Text

HAN = re.compile(r"[\u4e00-\u9fff]")
DATA = re.compile(r"[\w/.+@ -]*(, [\w.-]+)*|\([\w ]+\)") # names of operators, groups, modules, files
LOGS = {"a.log": pd.DataFrame(dict(step=[1, 2], loss=[3., 2.], grad_norm=[1., 1.], tflops=[9., 9.], valid_loss=[3., 2.])), "b.log": pd.DataFrame(dict(step=[1, 2], loss=[3., 2.], tokens_per_s=[9., 9.]))}
ROWS = [dict(model="a", size="7B", published=100., predicted=p, error=abs(p / 100 - 1)) for p in (90., 140.)]
COMPARED = dict(models=["m"], tasks=dict(mmlu=dict(protocol="letters", rows=[dict(score=.5, low=.4, high=.6)])))


@pytest.fixture(scope="module")
def recorded():
    return open_profile(ROOT / "data_samples/npu_profile")


def words(fig):
    "Drawn without a warning: all its texts, those of the ticks too."
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        fig.canvas.draw()
    return [t.get_text() for t in fig.findobj(Text) if re.search(r"[^\W\d]", re.sub(r"\\(mathdefault|times)", "", t.get_text()))] # a power of ten is no word


def figures(p):
    d = find_device("atlas-a2")
    yield from ((name, draw(p, d, t)) for name, (numbers, draw) in PLOTS.items() if draw and len(t := numbers(p, d)))
    yield from dict(comparison=plot_comparison(p, p), logs=training_logs.plot_logs(LOGS), lengths=plot_lengths(length_report([3, 4, 9], 8)), scores=bars(COMPARED), goodput=plot_goodput([(60, 600)]), errors=plot_errors(ROWS)).items()


UNITS = {"ms", "MB", "GB/s", "a.log", "b.log", "m", "a-7B"}


def test_every_label_has_both_languages(recorded, monkeypatch):
    if not cjk_font(): pytest.skip("no font with Chinese here")
    told = {}
    for language in ("en", "zh"):
        monkeypatch.setenv("ASCEND_NB_LANG", language)
        told[language] = {name: words(fig) for name, fig in figures(recorded)}
    assert len(told["zh"]) >= 15 and told["zh"].keys() == told["en"].keys()
    for name, zh in told["zh"].items():
        en = told["en"][name]
        assert len(en) == len(zh) and not any(HAN.search(t) for t in en), name
        left = {t for t in en if t in zh} - UNITS # what did not change must be a name in the recording
        assert any(map(HAN.search, zh)) or name == "modules", name
        names = set(pd.concat([recorded.table(k).get(c, pd.Series(dtype=str)) for k, c in (("kernels", "type"), ("blocks", "name"), ("operators", "type"))]).astype(str))
        own = {t for t in left if t not in names and not re.match(r"\(|[\w.]+, (p2p|collective)|(Group|LM|Embedding|Decoder|[A-Z])\w*_\d+$|mmlu", t)}
        assert not own or name == "modules", (name, own)


def test_without_a_font_the_labels_are_english(recorded, monkeypatch):
    monkeypatch.setattr(pictures, "cjk_font", lambda: None)
    monkeypatch.setenv("ASCEND_NB_LANG", "zh")
    for name, fig in figures(recorded): assert not any(map(HAN.search, words(fig))), name


def test_a_file_with_a_chinese_name_has_no_boxes_in_an_english_picture(monkeypatch):
    if not cjk_font(): pytest.skip("no font with Chinese here")
    monkeypatch.setenv("ASCEND_NB_LANG", "en")
    assert "日志.log" in words(training_logs.plot_logs({"日志.log": LOGS["a.log"]}))
    fig = new_figure(3, 2)
    fig.subplots().barh(["算子", "Mul"], [1, 2]) # ticks that do not exist yet
    assert "算子" in words(with_fonts(fig))


def test_a_picture_is_whole_or_not_there(tmp_path):
    fig = new_figure(2, 1)
    for bad in ("a.doc", "a"):
        with pytest.raises(UserError, match="no kind of picture"): save_figure(fig, tmp_path / bad)
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="Cannot write"): save_figure(fig, tmp_path / "file" / "a.png")
    save_figure(fig, tmp_path / "b.SVG")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["b.SVG", "file"] and matplotlib.get_backend()
