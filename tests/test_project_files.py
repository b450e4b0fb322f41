"""settings.ini, pyproject.toml, constraints.txt, the package and its samples say the same."""
import re
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


@pytest.mark.parametrize("key", ["requirements", "dev_requirements", "tb_requirements"])
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
