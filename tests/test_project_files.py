"""settings.ini, pyproject.toml, constraints.txt, the package and its samples say the same."""
import json
import re
import shlex
import subprocess
import sys
from configparser import ConfigParser

import ascend_nb
import pytest
from conftest import ROOT
from packaging.requirements import Requirement

try: import tomllib
except ImportError: import tomli as tomllib  # Python 3.10

CFG = ConfigParser(delimiters=["="])
CFG.read(ROOT / "settings.ini", encoding="utf-8")
META = CFG["DEFAULT"]
PYPROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
PINS = dict(re.findall(r"^([A-Za-z0-9._-]+)==([^\s;]+)(?:; python_version >= .3\.11.)?$", (ROOT / "constraints.txt").read_text(encoding="utf-8"), re.M))
norm = lambda name: re.sub(r"[-_.]+", "-", name).lower()


def test_versions_and_paths_agree():
    tool = PYPROJECT["tool"]["nbdev"]
    assert META["version"] == ascend_nb.__version__
    assert (META["lib_name"], META["lib_path"], META["nbs_path"]) == (tool["lib_name"], tool["lib_path"], tool["nbs_path"])
    assert "project" not in PYPROJECT, "a [project] table would take the metadata away from settings.ini"


@pytest.mark.parametrize("key", ["requirements", "dev_requirements", "tb_requirements", "docs_requirements", "ui_requirements", "eval_requirements", "serve_requirements"])
def test_the_pinned_set_lies_in_the_tested_ranges(key):
    pins = {norm(k): v for k, v in PINS.items()}
    for r in map(Requirement, META[key].split()):
        assert norm(r.name) in pins, f"{r.name} is not pinned in constraints.txt"
        assert r.specifier.contains(pins[norm(r.name)]), f"{r} does not admit the pinned {pins[norm(r.name)]}"


def test_npu_extra_pins_torch_to_torch_npu():
    reqs = {norm(r.name): str(r.specifier) for r in map(Requirement, META["npu_requirements"].split())}
    assert reqs["torch"] == reqs["torch-npu"], "torch_npu needs the torch of its own minor version"


def test_base_install_is_small():
    base = {norm(Requirement(r).name) for r in META["requirements"].split()}
    assert base == {"torch", "numpy", "safetensors", "transformers", "datasets", "sentencepiece", "huggingface-hub", "matplotlib",
                    "ipywidgets", "fastcore", "pyyaml", "psutil"}


def test_every_extra_that_a_sentence_names_is_one():
    "need(package, extra, …) and ascend_nb[extra], wherever they are written."
    import ast
    extras, named = {k[: -len("_requirements")] for k in META if k.endswith("_requirements")}, set()
    texts = {p: p.read_text(encoding="utf-8") for p in [*(ROOT / "ascend_nb").rglob("*.py"), *ROOT.glob("*.md"), *(ROOT / "nbs").glob("*.ipynb")]}
    for path, text in texts.items():
        named |= {(e, path.name) for found in re.findall(r"ascend_nb\[([a-z,]+)\]", text) for e in found.split(",")}
        if path.suffix != ".py": continue
        calls = (n for n in ast.walk(ast.parse(text)) if isinstance(n, ast.Call) and getattr(n.func, "id", "") == "need" and len(n.args) == 3)
        named |= {(c.args[1].value, path.name) for c in calls if isinstance(c.args[1], ast.Constant)}
    assert len(named) > 8 and {e for e, _ in named} <= extras | {"extra"}, sorted((e, f) for e, f in named if e not in extras)


def test_the_pins_leave_one_version_for_each_python():
    "A package is pinned once for 3.10 and once for the rest, or once for all."
    for python in ("3.10", "3.11", "3.12", "3.13"):
        lines = [Requirement(ln) for ln in (ROOT / "constraints.txt").read_text(encoding="utf-8").splitlines() if ln and not ln.startswith("#")]
        names = [norm(r.name) for r in lines if not r.marker or r.marker.evaluate({"python_version": python})]
        assert len(names) == len(set(names)), sorted(n for n in set(names) if names.count(n) > 1)


def shape(readme):
    "What both languages must have alike: headings by level, rows of tables, commands, pictures, links into the repository."
    text = (ROOT / readme).read_text(encoding="utf-8")
    commands = [re.split(r"  +#", ln)[0] for block in re.findall(r"```bash\n(.*?)```", text, re.S) for ln in block.splitlines()]
    links = [ln for ln in re.findall(r"\]\(([^)]+)\)", text) if not ln.startswith("README") and "tour" not in ln]
    return dict(headings=re.findall(r"^(#+) ", text, re.M), rows=[ln.count("|") for ln in text.splitlines() if ln.startswith("|")], commands=commands, links=links,
                words=re.findall(r"`(make [\w-]+|ascend_nb [\w-]+|pip install [^`]+)`", text))


def test_both_readmes_are_one_screen_and_in_step():
    en, zh = shape("README.md"), shape("README_zh.md")
    for part in en: assert en[part] == zh[part], part
    assert len(en["rows"]) > 10 and len(en["commands"]) == 2 and len((ROOT / "README.md").read_text(encoding="utf-8").splitlines()) < 80
    for link in en["links"]: assert (ROOT / link).exists(), link


def test_no_module_outlives_its_notebook():
    for py in (ROOT / "ascend_nb").rglob("*.py"):
        m = re.search(r"File to edit: (?:\.\./)+(nbs/\S+\.ipynb)", py.read_text(encoding="utf-8"))
        if m: assert (ROOT / m[1]).exists(), f"{py.name} has lost {m[1]}"


def test_samples_are_reproducible(tmp_path):
    "The generator writes exactly what is committed."
    out = tmp_path / "data_samples"
    out.mkdir()
    (out / "make_samples.py").write_bytes((ROOT / "data_samples/make_samples.py").read_bytes())
    subprocess.run([sys.executable, out / "make_samples.py"], check=True)
    made = {p.relative_to(out): p.read_bytes() for p in out.rglob("*") if p.is_file()}
    assert len(made) > 6
    for name, data in made.items(): assert (ROOT / "data_samples" / name).read_bytes() == data, name


def test_nbdev_old_spelling_works():
    "`nbdev_test --help` and `nbdev-test --help` are the same program."
    from pathlib import Path
    bin_ = Path(sys.executable).parent
    if not (bin_ / "nbdev_test").exists(): pytest.skip("not the environment of make dev")
    out = [subprocess.run([bin_ / name, "--help"], capture_output=True, text=True).stdout for name in ("nbdev_test", "nbdev-test")]
    assert out[0] and out[0].replace("nbdev_test", "nbdev-test") == out[1]


def typed():
    "(file, words) of every ascend_nb command that the READMEs and notebooks tell a reader to type."
    texts = {p.name: p.read_text(encoding="utf-8") for p in ROOT.glob("README*.md")}
    for p in sorted((ROOT / "nbs").glob("*.ipynb")):
        texts[p.name] = "\n".join("".join(c["source"]) for c in json.loads(p.read_text(encoding="utf-8"))["cells"] if c["cell_type"] == "markdown")
    for name, text in texts.items():
        for line in "\n".join(re.findall(r"```(?:bash|sh)\n(.*?)```", text, re.S)).replace("\\\n", " ").split("\n"):
            found = re.search(r"(?:^|\s)(?:ascend_nb|-m ascend_nb\.cli) (.*)", re.split(r"\s#\s", line)[0])
            words = shlex.split(re.split(r" [>|&]", found[1])[0].replace("…", "")) if found else []
            if "--config" in words: i = words.index("--config"); del words[i:i + 2]  # a file of the reader's
            if words[:2] not in ([], ["data"], ["jobs"]): yield name, words


def test_every_command_that_is_told_can_be_typed():
    from here import ascend
    told = [*typed()]
    assert len(told) > 50
    for name, words in told:
        said = ascend(*words, "--print-config")
        assert said.returncode == 0, f"{name}: {shlex.join(words)}: {said.stderr}"
