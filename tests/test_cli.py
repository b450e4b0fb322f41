"""The command line's promises: what it says, how it ends, how long it takes to start."""
import json
import subprocess
import sys
import time

import pytest
from here import ascend

CODE = "import sys; from ascend_nb.cli import main; sys.exit(main())"




def best_of(n, *cmd):
    "The quickest of n runs, in seconds: the others waited for the machine."
    times = []
    for _ in range(n):
        t = time.perf_counter()
        subprocess.run(cmd, check=True, capture_output=True)
        times.append(time.perf_counter() - t)
    return min(times)


def test_import_is_light():
    code = "import sys, ascend_nb, ascend_nb.cli; print(*sorted({'torch','transformers','torch_npu','ipywidgets','numpy'} & set(sys.modules)))"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.strip() == ""


def test_start_is_quick():
    bare = best_of(3, sys.executable, "-c", "pass")
    assert best_of(3, sys.executable, "-c", "import ascend_nb") - bare < .3
    assert best_of(3, sys.executable, "-c", CODE, "--help") < .5 + bare


def test_overview_names_every_command():
    from ascend_nb.cli import COMMANDS
    out = ascend("--help")
    assert out.returncode == 0 and all(c.split()[0] in out.stdout for c in COMMANDS)
    assert out.stdout.count("\n  data ") == out.stdout.count("\n  jobs ") == 1, "a group is one line"


@pytest.mark.parametrize("args", [["data"], ["data", "--help"], ["data", "-h"], ["data", "help"]])
def test_a_group_lists_its_commands(args):
    from ascend_nb.cli import COMMANDS
    out, words = ascend(*args), [c.split()[1] for c in COMMANDS if c.startswith("data ")]
    assert out.returncode == 0 and words == ["sniff", "show", "report"] and all(f"\n  {w} " in out.stdout for w in words)
    assert "train" not in out.stdout.split("\n\n")[1]


COMMAND_NAMES = ["quickstart", "doctor", "fetch", "preprocess", "data sniff", "data show", "data report", "plan", "profile", "plot-log", "train",
                 "jobs launch", "jobs list", "jobs show", "jobs wait", "jobs stop", "jobs resume", "import-script", "convert", "generate", "chat", "studio", "serve", "evaluate", "compare"]


@pytest.mark.parametrize("name", COMMAND_NAMES)
def test_every_command_has_help_and_a_run(name):
    import importlib

    from ascend_nb.cli import COMMANDS
    assert [*COMMANDS] == COMMAND_NAMES
    assert callable(getattr(importlib.import_module(f"ascend_nb.{COMMANDS[name].module}"), COMMANDS[name].run))
    out = ascend(*name.split(), "--help").stdout
    assert "--config FILE.yaml" in out and out.startswith(f"usage: ascend_nb {name} ")


def test_two_words_take_the_same_switches(tmp_path):
    "--print-config and --config, --json and exit codes work behind two words as behind one."
    out = ascend("data", "sniff", "some.json", "--rows", "7", "--print-config")
    assert out.returncode == 0 and "rows: 7" in out.stdout and "path: some.json" in out.stdout
    (tmp_path / "sniff.yaml").write_text(out.stdout, encoding="utf-8")
    (tmp_path / "some.json").write_text('[{"text": "one"}, {"text": "two"}]', encoding="utf-8")
    out = ascend("data", "sniff", "--config", "sniff.yaml", "--json", cwd=tmp_path)
    assert out.returncode == 0 and json.loads(out.stdout)["rows"] == 2
    (tmp_path / "some.json").write_text('[{"text": "one"}, {"text": 2}]', encoding="utf-8")
    out = ascend("data", "sniff", "--config", "sniff.yaml", "--json", cwd=tmp_path)
    assert out.returncode == 2 and json.loads(out.stdout)["bad"] == 1, "a bad row is something to mend"


@pytest.mark.parametrize("args,words", [
    (["evalute"], "Did you mean evaluate"),
    (["data", "snif", "x.json"], "Did you mean data sniff"),
    (["data", "xyz"], "expected one of: data sniff, data show, data report."),
    (["sniff", "x.json"], "Did you mean data sniff"),
    (["dta", "sniff"], "Did you mean data"),
    (["data", "sniff", "x.json", "--tokeniser-name-or-path", "y"], "Did you mean --tokenizer-name-or-path"),
    (["data", "sniff"], "Found no path"),
    (["data", "sniff", "no_such.json"], "no_such.json"),
    (["data", "report", "no_such"], "no_such"),
    (["train", "--train-itres", "3"], "Did you mean --train-iters"),
    (["jobs", "lanch"], "Did you mean jobs launch"),
    (["jobs", "launch", "--nprocs", "3"], "Did you mean --nproc"),
    (["jobs", "stop", "no_such"], "expected a run folder that `jobs.launch` has made"),
    (["jobs", "resume", "no_such"], "expected a run folder that `jobs.launch` has made"),
    (["train", "--lr", "fast"], "expected a float"),
    (["train", "--config", "no_such.yaml"], "no_such.yaml"),
    (["generate", "--prompt", "Once"], "Pass --model"),
    (["generate", "--model", "no_such_folder", "--prompt", "Once"], "no_such_folder"),
    (["evaluate", "--model", "no_such_folder", "--data-path", "no_such"], "no_such"),
    (["preprocess", "--input", "no_such.txt", "--output-prefix", "x", "--tokenizer-name-or-path", "no_such_tok"], "no_such"),
])
def test_a_mistake_is_one_sentence_and_exit_code_2(args, words, tmp_path):
    out = ascend(*args, cwd=tmp_path)
    assert out.returncode == 2 and words in out.stderr and "Traceback" not in out.stderr, out.stderr
    assert out.stdout == "" and not list(tmp_path.iterdir()), "something was left behind"


def test_chinese_errors():
    out = ascend("evalute", env={**__import__("os").environ, "ASCEND_NB_LANG": "zh"})
    assert out.returncode == 2 and "未知命令" in out.stderr


def test_our_mistake_is_exit_code_1():
    code = "import sys, ascend_nb.cli as c, ascend_nb.doctor as d\nd.run = lambda *a, **k: 1 / 0\nsys.exit(c.main(['doctor']))"
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert out.returncode == 1 and "ZeroDivisionError" in out.stderr


def test_yaml_and_flags_and_spellings(tmp_path):
    (tmp_path / "run.yaml").write_text("train: {lr: 1e-4, micro_batch_size: 2}\ndata: {seq-length: 64}\n", encoding="utf-8")
    out = ascend("train", "--config", tmp_path / "run.yaml", "--micro_batch_size=8", "--bf16", "--print-config")
    import yaml
    cfg = yaml.safe_load(out.stdout)
    assert (cfg["train"]["lr"], cfg["train"]["micro_batch_size"], cfg["train"]["dtype"], cfg["data"]["seq_length"]) == (1e-4, 8, "bf16", 64)


def test_doctor_json():
    out = ascend("doctor", "--json")
    assert out.returncode == 0 and isinstance(json.loads(out.stdout), dict)
