"""Notebook chores for people who edit without a browser: new, open, close, run, sync.

    python .ci/nb.py new 22_model "the decoder"    a notebook that has the four opening cells
    python .ci/nb.py open 22_model                 nbs/22_model.ipynb -> .nbtext/22_model.py (jupytext py:percent)
    python .ci/nb.py close 22_model                back again: cell ids and outputs kept, cleaned, exported
    python .ci/nb.py run 22_model                  execute in a real kernel and store the outputs
    python .ci/nb.py sync                          fail unless notebooks, modules and README agree with each other
    python .ci/nb.py readme                        README.md and README_zh.md from the index notebooks
    python .ci/nb.py aliases                       nbdev_test beside nbdev-test, in this environment
"""
import os
import re
import subprocess
import sys
from contextlib import contextmanager
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
NBS, LIB, TEXT = ROOT / "nbs", ROOT / "ascend_nb", ROOT / ".nbtext"
KERNEL = {"display_name": "python3", "language": "python", "name": "python3"}
NOISE = re.compile(r"^(.*(it/s|s/it)\]?.*|.*IProgress not found.*)\n?", re.M)
PATHS = re.compile(r"/tmp/tmp\w{8}")  # another one at every run


@contextmanager
def locked():
    "Only one export at a time: two would race for _modidx.py."
    import fcntl

    TEXT.mkdir(exist_ok=True)
    with open(TEXT / ".lock", "w") as f:
        fcntl.flock(f, fcntl.LOCK_EX)
        yield


def tool(*args, **kw):
    "Run a program of this environment from the repository's root."
    env = {**os.environ, "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"}
    return subprocess.run([str(a) for a in args], cwd=ROOT, env=env, **{"check": True, **kw})


def nb_path(name): return NBS / f"{name.removesuffix('.ipynb').removeprefix('nbs/')}.ipynb"


def new(name, line="what this room is for"):
    import nbformat.v4 as v4

    module = re.sub(r"^\d+[a-z]?_", "", name)
    cells = [v4.new_markdown_cell(f"# {module}\n\n> {line}"), v4.new_code_cell(f"#| default_exp {module}"),
             v4.new_code_cell("#| export\nfrom ascend_nb.core import UserError"),
             v4.new_code_cell("#| hide\nfrom fastcore.test import test_eq, test_close, expect_fail"),
             v4.new_code_cell("#| hide\nimport nbdev; nbdev.nbdev_export()")]
    path = nb_path(name)
    if path.exists(): sys.exit(f"{path} exists already")
    write(path, v4.new_notebook(cells=cells, metadata={"kernelspec": KERNEL}))


def write(path, nb):
    import nbformat

    nbformat.validate(nb)
    tmp = path.with_suffix(".tmp-nb")
    nbformat.write(nb, tmp)
    os.replace(tmp, path)


def open_text(name):
    TEXT.mkdir(exist_ok=True)
    out = TEXT / f"{nb_path(name).stem}.py"
    tool("jupytext", "--quiet", "--to", "py:percent", "-o", out, nb_path(name))
    print(out.relative_to(ROOT))


def close_text(name):
    path, text = nb_path(name), TEXT / f"{nb_path(name).stem}.py"
    if not text.exists(): sys.exit(f"{text} is not open: make nb-open {path.stem}")
    update = ["--update"] if path.exists() else []
    tool("jupytext", "--quiet", *update, "--to", "ipynb", "-o", path, text)
    clean(path)
    export(path)


def clean(path):
    import nbformat

    nb = nbformat.read(path, as_version=4)
    nb.metadata = {"kernelspec": KERNEL}
    for cell in nb.cells:
        cell.metadata = {}
        if cell.cell_type != "code": continue
        cell.execution_count = None
        cell.outputs = merged(o for o in map(clean_output, cell.outputs) if o)
    write(path, nb)
    tool("nbdev-clean", "--fname", path)


def merged(outputs):
    "Pieces of one stream as one output: how a text was flushed teaches nothing."
    whole = []
    for out in outputs:
        last = whole[-1] if whole else {}
        if out.output_type == "stream" and last.get("output_type") == "stream" and last.name == out.name: last.text += out.text
        else: whole.append(out)
    return whole


def clean_output(out):
    "Drop what differs at every run and teaches nothing: widget models, progress lines, counters."
    data = out.get("data", {})
    data.pop("application/vnd.jupyter.widget-view+json", None)
    for box, key in ((out, "text"), (data, "text/plain"), (data, "text/html")):
        if isinstance(box.get(key), str): box[key] = PATHS.sub("/tmp/run", box[key].replace(str(ROOT), "."))
    if "execution_count" in out: out["execution_count"] = None
    if out.output_type == "stream":
        out.text = NOISE.sub("", re.sub(r"[^\n]*\r(?!\n)", "", out.text))
        return out if out.text.strip() else None
    return out if out.output_type == "error" or data else None


def export(path):
    from nbdev.export import nb_export

    os.chdir(ROOT)
    with locked():
        if "#| default_exp" in path.read_text(encoding="utf-8"): nb_export(path, LIB)


def run(name, timeout=3600):
    import nbformat
    from nbclient import NotebookClient

    path = nb_path(name)
    nb = nbformat.read(path, as_version=4)
    skip = re.compile(r"^\s*#\|\s*eval:\s*false", re.M)
    kept = [c for c in nb.cells if c.cell_type != "code" or not skip.search(c.source)]
    os.environ.setdefault("PYTHONHASHSEED", "0")
    view = nbformat.NotebookNode({**nb})  # shares its cells with nb: outputs land in both
    view.cells = kept
    NotebookClient(view, timeout=timeout, kernel_name="python3", resources={"metadata": {"path": str(NBS)}},
                   store_widget_state=False, extra_arguments=["--log-level=ERROR"]).execute()
    write(path, nb)
    clean(path)


def sync():
    "Notebooks are cleaned, modules are exported, and no module outlives its notebook."
    before = snapshot()
    for path in sorted(NBS.glob("*.ipynb")): clean(path)
    with locked(): tool("nbdev-export")
    readme()
    bad = [p for p, text in snapshot().items() if before.get(p) != text]
    for py in LIB.rglob("*.py"):
        m = re.search(r"File to edit: \.\./+(?:\.\./)*(nbs/\S+\.ipynb)", py.read_text(encoding="utf-8"))
        if m and not (ROOT / m[1]).exists(): bad.append(f"{py.relative_to(ROOT)} has lost its notebook {m[1]}")
    if bad: sys.exit("not in step (run make sync and commit):\n  " + "\n  ".join(map(str, bad)))
    print("in step: notebooks are clean, modules are exported, each module has its notebook")


def snapshot():
    files = [ROOT / "README.md", ROOT / "README_zh.md", *NBS.glob("*.ipynb"), *LIB.rglob("*.py")]
    return {str(p.relative_to(ROOT)): p.read_bytes() for p in files}


def aliases():
    "nbdev 3 spells its programs with dashes; fingers and older guides type nbdev_test. Both work here."
    here = Path(sys.executable).parent
    for src in here.glob("nbdev-*"):
        dst = here / src.name.replace("-", "_")
        dst.write_bytes(src.read_bytes())
        dst.chmod(0o755)


def readme():
    "README.md from nbs/index.ipynb, README_zh.md from nbs/index_zh.ipynb: prose, code and text outputs."
    for nb, md in (("index", "README.md"), ("index_zh", "README_zh.md")): (ROOT / md).write_text(markdown(NBS / f"{nb}.ipynb"), encoding="utf-8")


def markdown(path):
    import nbformat

    parts = []
    for cell in nbformat.read(path, as_version=4).cells:
        if cell.cell_type == "markdown": parts.append(cell.source)
        elif cell.cell_type == "code" and not re.match(r"\s*#\|\s*hide", cell.source):
            parts.append(f"```python\n{cell.source.strip()}\n```")
            text = "".join(o.get("text", "") or "".join(o.get("data", {}).get("text/plain", "")) for o in cell.outputs)
            if text.strip(): parts.append(f"```text\n{text.rstrip()}\n```")
    return "<!-- Written by `make readme` from " + f"nbs/{path.name}; edit the notebook. -->\n\n" + "\n\n".join(parts) + "\n"


COMMANDS = {"aliases": aliases, "readme": readme, "new": new, "open": open_text, "close": close_text, "run": run, "sync": sync}

if __name__ == "__main__":
    if len(sys.argv) < 2 or sys.argv[1] not in COMMANDS: sys.exit(__doc__)
    COMMANDS[sys.argv[1]](*sys.argv[2:])
