"""What `Show me the code` shows, pasted: the cell, the YAML and the command lines do the same work."""
import html
import json
import os
import re
import shlex
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import yaml
from ascend_nb.commands import COMMAND_OF
from ascend_nb.config import (
    ChatConfig,
    CompareConfig,
    DataConfig,
    DoctorConfig,
    EvalConfig,
    ModelConfig,
    ModelLinkConvertConfig,
    PlanConfig,
    PlotLogConfig,
    PreprocessConfig,
    ProfileConfig,
    RunConfig,
    SniffConfig,
    TrainConfig,
)
from ascend_nb.quickstart import samples_dir
from ascend_nb.ui.forms import CodeView
from conftest import ROOT
from here import ascend

SAMPLES = ROOT / "data_samples"
TOKENS = PreprocessConfig(input=str(SAMPLES / "tales.jsonl"), output_prefix="out/it's tokens", tokenizer_name_or_path=str(SAMPLES / "tokenizer"), append_eod=True)
RUN = RunConfig(ModelConfig(hidden_size=32, intermediate_size=64, num_hidden_layers=1, num_attention_heads=2),
                DataConfig(data_path=["tokens_text_document"], tokenizer_name_or_path=str(SAMPLES / "tokenizer"), seq_length=32), train=TrainConfig(train_iters=2, save="out", device="cpu"))


def shown(cfg, **start):
    "Title -> text, as a person copies it."
    view = CodeView()
    view.start = start
    view.show(cfg)
    return {k: html.unescape(t) for k, t in re.findall(r"<b>(.*?)</b><pre[^>]*>(.*?)</pre>", view.text.value, re.S)}


def cell(text):
    "A cell, as a kernel runs it: the last line is what it shows."
    *lines, last = text.split("\n")
    names = {}
    exec("\n".join(lines), names)
    return eval(last, names)


def ways(cfg, folder):
    "Way -> what was returned, each in a folder of its own that is named alike."
    code, command = shown(cfg), COMMAND_OF[type(cfg).__name__]
    (folder / "cfg.yaml").write_text(code["YAML"] if yaml.safe_load(code["YAML"]) else "", encoding="utf-8")
    def at(way, do):
        place = folder / way
        place.mkdir()
        for p in folder.glob("tokens*"): (place / p.name).symlink_to(p)
        os.chdir(place)
        return do()
    def line(*words):
        said = ascend(*words, "--json")
        assert said.returncode == 0, said.stderr
        return json.loads(said.stdout) if said.stdout.startswith("{") else {}
    return {"cell": at("cell", lambda: cell(code["Python"])), "yaml": at("yaml", lambda: line(*command.split(), "--config", "../cfg.yaml")),
            "line": at("line", lambda: line(*shlex.split(code["Command line"])[1:]))}


def files(folder):
    "Name -> bytes of what lies there."
    return {str(p.relative_to(folder)): p.read_bytes() for p in sorted(Path(folder).rglob("*")) if p.is_file() and not p.is_symlink()}


@pytest.fixture
def here(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("ASCEND_NB_LANG", "en")
    return tmp_path


@pytest.mark.parametrize("cfg,same", [
    (TOKENS, "*.bin"), (TOKENS, "*.idx"),
    (PlanConfig(model="qwen2-7b", devices=8, global_batch=64, out="out/run.yaml"), "out/*.yaml"),
    (SniffConfig(path=str(SAMPLES / "instruct.json"), rows=0), ""),
    pytest.param(ProfileConfig(path=str(SAMPLES / "npu_profile/rank0_ascend_pt"), out="out"), "out/*.csv", marks=pytest.mark.slow), pytest.param(DoctorConfig(device="cpu"), "", marks=pytest.mark.slow),
], ids=["preprocess", "index", "plan", "sniff", "profile", "doctor"])
def test_pasted_they_do_the_same(here, cfg, same):
    found = ways(cfg, here)
    made = {way: {k: v for k, v in files(here / way).items() if Path(k).match(same)} if same else {} for way in found}
    assert made["cell"] == made["yaml"] == made["line"] and bool(same) == bool(made["cell"])
    assert {frozenset(out) - {"seconds"} for out in found.values()} == {frozenset(found["cell"]) - {"seconds"}}


def losses(place): return [(r["step"], r["loss"]) for r in map(json.loads, (Path(place) / "out/metrics.jsonl").read_text().splitlines()) if "loss" in r]


def test_a_training_is_the_same_training(here):
    ascend("preprocess", "--input", SAMPLES / "tales.jsonl", "--output-prefix", "tokens", "--tokenizer-name-or-path", SAMPLES / "tokenizer")
    for p in here.glob("out*"): p.unlink()
    ways(RUN, here)
    assert losses(here / "cell") == losses(here / "yaml") == losses(here / "line") and len(losses(here / "cell")) == 2


@pytest.mark.slow
def test_several_processes_are_the_same_job_and_the_same_torchrun(here):
    from ascend_nb import jobs
    ascend("preprocess", "--input", SAMPLES / "tales.jsonl", "--output-prefix", "tokens", "--tokenizer-name-or-path", SAMPLES / "tokenizer")
    code = shown(replace(RUN, train=replace(RUN.train, save="job/out")), nproc=2)
    assert "Command line" not in code
    job = cell(code["Python"])
    assert isinstance(job, jobs.Job) and job.wait(120) == "finished", job.tail()
    (here / "shell").mkdir()
    env = {**os.environ, "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}", "PYTHONPATH": str(ROOT)}
    words = shown(replace(RUN, train=replace(RUN.train, save="shell/out")), nproc=2)["Several processes"]
    subprocess.run(["bash", "-c", words], check=True, capture_output=True, env=env, timeout=200)
    assert losses("job") == losses("shell")


def test_the_rest_parses_to_what_was_shown(here):
    "Commands that talk, need a model, or compare: the config is the same, the call is the command's."
    for cfg, call in ((ChatConfig(model="m'x", system="--be brief", stop=["---", "a b"]), "ascend_nb.chat import run"), (EvalConfig(model=["-a", "b"], data_path=["d"], task=["mmlu", "own.yaml"]), "ascend_nb.evaluator import run"),
                      (CompareConfig(results=["a.json", "-b.json"]), "ascend_nb.comparing import run"), (ModelLinkConvertConfig(load_dir="a", save_dir="b c", to="hf"), "ascend_nb.convert import run"),
                      (PlotLogConfig(files=["x"], out=""), "ascend_nb.training_logs import run")):
        code = shown(cfg)
        assert call in code["Python"] and code["Python"].endswith("run(cfg)")
        (here / "c.yaml").write_text(code["YAML"])
        command = COMMAND_OF[type(cfg).__name__].split()
        for words in ([*command, "--config", "c.yaml"], shlex.split(code["Command line"])[1:]):
            said = ascend(*words, "--print-config")
            names = {}
            exec("\n".join(code["Python"].split("\n")[:-1]), names)
            assert type(cfg)(**yaml.safe_load(said.stdout)) == cfg == names["cfg"], said.stderr


def test_the_samples_are_the_packages():
    assert samples_dir().samefile(SAMPLES)
