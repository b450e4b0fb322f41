"""Every knob has its comment in Chinese, none is left over, and both say the same numbers and names."""
import importlib
import inspect
import re

import yaml

from ascend_nb.cli import COMMANDS
from ascend_nb.config import TrainConfig
from ascend_nb.schema import chinese, declared, knobs
from ascend_nb.ui.bilingual import switch
from ascend_nb.ui.forms import COMMAND_OF, form
from conftest import ROOT
from here import ascend

CONFIG = importlib.import_module("ascend_nb.config")
NAMES = sorted({c.config for c in COMMANDS.values()} | set(COMMAND_OF))


def english():
    "Key -> comment or docstring, of all that a command or a form can show."
    out = {}
    for name in NAMES:
        cls = getattr(CONFIG, name)
        out[name] = inspect.getdoc(cls)
        for k in knobs(cls):
            out[f"{declared(k.owner, k.name).__name__}.{k.name}"] = k.comment
            out[k.owner.__name__] = inspect.getdoc(k.owner)
    return out


def test_no_knob_lacks_chinese_and_none_is_left_over():
    mine, theirs = english(), chinese()
    lacking, stale = sorted(mine.keys() - theirs.keys()), sorted(theirs.keys() - mine.keys())
    assert not lacking, f"ascend_nb/knobs_zh.yaml lacks {lacking}: write them"
    assert not stale, f"ascend_nb/knobs_zh.yaml has {stale}, which no command knows: remove them"


def facts(text):
    "Numbers, flags and files: what may not differ between two languages."
    return sorted(re.findall(r"--[a-z-]+|\d[\d.,/]*\d|\d|[\w-]+\.(?:json|jsonl|yaml|png|py|idx|bin|txt|csv|md)\b", text))


def test_both_languages_say_the_same():
    en, zh = english(), chinese()
    bad = [f"{k}: {facts(en[k])} in English, {facts(zh[k])} in Chinese" for k in en if facts(en[k]) != facts(zh[k])]
    bad += [f"{k}: {zh[k]!r}" for k in en if not re.search(r"[\u4e00-\u9fff]", zh[k]) and re.search(r"[a-z]{4,} [a-z]{2,}", en[k])] # "auto, npu, npu:1" has nothing to translate
    assert all(en.values()) and not bad, "\n".join(bad)


def test_no_class_is_there_twice():
    "YAML would keep the last one silently."
    tops = re.findall(r"^(\w+):", (ROOT / "ascend_nb/knobs_zh.yaml").read_text(encoding="utf-8"), re.M)
    assert len(tops) == len(set(tops)) == len(yaml.safe_load((ROOT / "ascend_nb/knobs_zh.yaml").read_text(encoding="utf-8")))


def test_a_form_and_a_help_page_speak_the_readers_language(monkeypatch):
    monkeypatch.setenv("ASCEND_NB_LANG", "en")
    f = form(TrainConfig())
    control = f.fields["lr",].control
    assert control.tooltip == control.placeholder == "peak learning rate"
    switch("zh")
    assert control.tooltip == control.placeholder == "学习率峰值"
    control.value = "fast"
    assert "学习率峰值" in f.fields["lr",].note.value
    assert "学习率峰值" in ascend("train", "--help", env=dict(ASCEND_NB_LANG="zh")).stdout
    out = ascend("train", "--help", env=dict(ASCEND_NB_LANG="en")).stdout
    assert "peak learning rate" in out and not re.search(r"[\u4e00-\u9fff]", out)
    switch("en")
    assert "expected a float (peak learning rate)" in f.fields["lr",].note.value
