"""What a user without a clone gets: the wheel and the sdist, installed into an environment of its own."""
import json
import os
import shutil
import subprocess
import sys
import tarfile
import zipfile
from email import message_from_string
from pathlib import Path

import pytest
from conftest import ROOT
from packaging.requirements import Requirement
from packaging.specifiers import SpecifierSet

pytestmark = pytest.mark.slow
BUILT_FROM = ["ascend_nb", "data_samples", "settings.ini", "setup.py", "pyproject.toml", "MANIFEST.in", "README.md", "README_zh.md", "LICENSE"]


def run(*args, **kw):
    "A program that has to succeed; what it printed."
    done = subprocess.run([str(a) for a in args], capture_output=True, text=True, **kw)
    assert done.returncode == 0, f"{args}\n{done.stdout[-3000:]}\n{done.stderr[-3000:]}"
    return done.stdout


@pytest.fixture(scope="module")
def dist(tmp_path_factory):
    "dist/ of a copy: the sdist from the tree, the wheel from the sdist."
    tmp = tmp_path_factory.mktemp("package")
    for name in BUILT_FROM:
        src = ROOT / name
        if src.is_dir(): shutil.copytree(src, tmp / name, ignore=shutil.ignore_patterns("__pycache__"))
        else: shutil.copy(src, tmp / name)
    run(sys.executable, "-m", "build", "-q", cwd=tmp)
    return tmp / "dist"


@pytest.fixture(scope="module")
def place(dist, tmp_path_factory):
    "A fresh environment with the wheel, the pinned set, and what opens a notebook."
    venv = tmp_path_factory.mktemp("fresh")
    run(sys.executable, "-m", "venv", venv)
    wheel = next(dist.glob("*.whl"))
    run(venv / "bin/python", "-m", "pip", "install", "-q", "-c", ROOT / "constraints.txt", wheel, "nbclient", "ipykernel")
    return venv


def metadata(dist):
    with zipfile.ZipFile(next(dist.glob("*.whl"))) as z:
        name = next(n for n in z.namelist() if n.endswith("METADATA"))
        return message_from_string(z.read(name).decode()), z.namelist(), z.read(name.replace("METADATA", "WHEEL")).decode()


def test_the_wheel_suits_every_python_and_machine(dist):
    meta, names, wheel = metadata(dist)
    assert next(dist.glob("*.whl")).name.endswith("-py3-none-any.whl") and "Root-Is-Purelib: true" in wheel
    assert all(SpecifierSet(meta["Requires-Python"]).contains(v) for v in ("3.10", "3.11", "3.12", "3.13"))
    assert set(meta.get_all("Provides-Extra")) >= {"npu", "dev", "docs", "eval", "serve", "ui"}
    npu = {r.name: str(r.specifier) for r in map(Requirement, meta.get_all("Requires-Dist")) if r.marker and r.marker.evaluate({"extra": "npu"}) and not r.marker.evaluate({"extra": ""})}
    assert npu["torch"] == npu["torch_npu"]


def test_both_hold_every_module_and_its_data(dist):
    _, names, _ = metadata(dist)
    tracked = {str(p.relative_to(ROOT)) for p in (ROOT / "ascend_nb").rglob("*") if p.suffix in (".py", ".yaml")}
    samples = {f"ascend_nb/{p.relative_to(ROOT)}" for p in (ROOT / "data_samples").rglob("*") if p.is_file() and p.name != "make_samples.py" and "__pycache__" not in p.parts}
    assert tracked | samples <= set(names)
    with tarfile.open(next(dist.glob("*.tar.gz"))) as t: inside = {n.partition("/")[2] for n in t.getnames()}
    assert tracked <= inside and {"settings.ini", "LICENSE", "README.md"} <= inside
    assert not [n for n in names if n.startswith(("nbs/", "tests/", "docs/"))]


def test_quickstart_runs_from_the_wheel(place, tmp_path):
    "Away from the repository: nothing of it may be found by chance."
    env = {k: v for k, v in os.environ.items() if k != "PYTHONPATH"} | {"PATH": f"{place}/bin:{os.environ['PATH']}"}
    where = run(place / "bin/python", "-c", "import ascend_nb; print(ascend_nb.__file__)", cwd=tmp_path, env=env)
    assert Path(where.strip()).is_relative_to(place)
    result = json.loads(run(place / "bin/ascend_nb", "quickstart", "--out", "out", "--json", cwd=tmp_path, env=env))
    assert (tmp_path / "out").is_dir() and result
    assert json.loads(run(place / "bin/ascend_nb", "doctor", "--json", cwd=tmp_path, env=env))


def test_the_studio_opens_from_the_wheel(place, tmp_path):
    "`ascend_nb studio --app none` writes the notebook; a kernel of the fresh environment runs it."
    env = {k: v for k, v in os.environ.items() if k != "PYTHONPATH"} | {"PATH": f"{place}/bin:{os.environ['PATH']}"}
    run(place / "bin/ascend_nb", "studio", tmp_path, "--app", "none", cwd=tmp_path, env=env)
    code = ("import nbformat, sys; from nbclient import NotebookClient; nb = nbformat.read('studio.ipynb', 4); NotebookClient(nb, timeout=120).execute();"
            "data = [o.data for c in nb.cells for o in c.get('outputs', []) if 'data' in o]; print('application/vnd.jupyter.widget-view+json' in data[-1]); print(data[-1]['text/plain'])")
    shown = run(place / "bin/python", "-c", code, cwd=tmp_path, env=env)
    assert shown.startswith("True\n") and "studio" in shown


def test_the_decoders_program_travels_and_says_what_it_lacks(place, tmp_path):
    "It is C, compiled where it runs: with a compiler it loads, without one a sentence says so."
    code = "from ascend_nb.native import library; lib, why = library(); print(lib is not None, why)"
    env = {k: v for k, v in os.environ.items() if k not in ("PYTHONPATH", "CC")} | {"XDG_CACHE_HOME": str(tmp_path), "ASCEND_NB_LANG": "en"}
    assert run(place / "bin/python", "-c", code, cwd=tmp_path, env=env | {"PATH": str(tmp_path)}).strip() == "False no C compiler was found (cc, gcc or clang)"
    if shutil.which("cc"): assert run(place / "bin/python", "-c", code, cwd=tmp_path, env=env).strip() == "True"
