"""The rules of the house that a machine can check: floors, who may import what, the shape of a notebook."""
import ast
import importlib
import json
import re
import string

import pytest
from conftest import ROOT

NOTEBOOKS = sorted(p for p in (ROOT / "nbs").glob("*.ipynb"))
HEAVY = {"torch", "transformers", "datasets", "ipywidgets", "torch_npu", "matplotlib", "pandas"}


def cells(path, kind="code"):
    "The sources of a notebook's cells."
    nb = json.loads(path.read_text(encoding="utf-8"))
    return ["".join(c["source"]) for c in nb["cells"] if c["cell_type"] == kind]


def exported(path):
    "The sources of a notebook's exported cells."
    return [s for s in cells(path) if re.match(r"\s*#\|\s*export\b", s)]


def module(path):
    "`ascend_nb.core` for nbs/00_core.ipynb; None for a recipe."
    m = re.search(r"^#\|\s*default_exp\s+(\S+)", "\n".join(cells(path)), re.M)
    return m and f"ascend_nb.{m[1]}"


def number(path):
    "The floor and room: 00, 02, 02a …"
    return re.match(r"\d+[a-z]?", path.stem)[0]


ROOMS = {module(p): p for p in NOTEBOOKS if re.match(r"\d", p.stem) and module(p)}


def imports(source):
    "Every module name that a piece of code imports, inside functions too."
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import): yield from (a.name for a in node.names)
        if isinstance(node, ast.ImportFrom):
            assert not node.level, "relative imports hide the floor"
            yield node.module
            yield from (f"{node.module}.{a.name}" for a in node.names if node.module.split(".")[0] == "ascend_nb")


@pytest.mark.parametrize("name", ROOMS)
def test_imports_go_down(name):
    mine = number(ROOMS[name])
    for cell in exported(ROOMS[name]):
        for other in imports(cell):
            if other in ROOMS: assert number(ROOMS[other]) < mine, f"{name} ({mine}) imports {other} ({number(ROOMS[other])}) above it"


def test_torch_npu_has_one_door():
    users = [n for n, p in ROOMS.items() if any(i.split(".")[0] == "torch_npu" for c in exported(p) for i in imports(c))]
    assert users == ["ascend_nb.core"]


def test_widgets_live_in_ui():
    users = [n for n, p in ROOMS.items() if any(i.split(".")[0] == "ipywidgets" for c in exported(p) for i in imports(c))]
    assert users and all(u.startswith("ascend_nb.ui.") for u in users), users


def test_no_import_of_heavy_packages_on_the_ground_floor():
    for name in ("ascend_nb.core", "ascend_nb.schema", "ascend_nb.config", "ascend_nb.cli", "ascend_nb.tokenizers", "ascend_nb.preprocess"):
        for cell in exported(ROOMS[name]):
            top = ast.Module([n for n in ast.parse(cell).body if isinstance(n, (ast.Import, ast.ImportFrom))], [])
            found = {i.split(".")[0] for i in imports(ast.unparse(top))} & HEAVY
            assert not found, f"{name} imports {found} at module level"


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda p: p.stem)
def test_notebook_opens_as_a_lesson(path):
    first = "".join(json.loads(path.read_text(encoding="utf-8"))["cells"][0]["source"]) # the index reads its second line
    assert re.match(r"# .+\n\n> .+", first), f"{path.name} opens with {first[:60]!r}; expected '# title' and '> one line'"
    nb = json.loads(path.read_text(encoding="utf-8"))
    errors = [o for c in nb["cells"] for o in c.get("outputs", []) if o["output_type"] == "error"]
    assert not errors, "a committed output is a traceback"
    if module(path): assert any(c.get("outputs") for c in nb["cells"]), "no output is committed: make nb-run"


@pytest.mark.parametrize("name", ROOMS)
def test_notebook_stays_small(name):
    sources = exported(ROOMS[name])
    lines = [[ln for ln in s.splitlines() if ln.strip()] for s in sources]
    assert sum(map(len, lines)) <= 350, f"{sum(map(len, lines))} exported lines: two rooms or a table"
    longest = max(len(s.strip().splitlines()) for s in sources)
    assert longest <= 40, f"an export cell of {longest} lines"
    for s in sources:
        for f in ast.walk(ast.parse(s)):
            if isinstance(f, (ast.FunctionDef, ast.AsyncFunctionDef)):
                assert f.end_lineno - f.lineno < 42, f"{name}.{f.name} has {f.end_lineno - f.lineno + 1} lines"


def inherits(name, cls, f):
    "Does a base class document this method already?"
    return any(f in vars(b) for b in getattr(importlib.import_module(name), cls).__mro__[1:-1])


def public_functions(name, path):
    "(function node, source lines) of what a user may call; a method that overrides a documented one inherits its comments."
    for s in exported(path):
        for node in ast.parse(s).body:
            if isinstance(node, ast.FunctionDef) and not node.name.startswith("_"): yield node, s.splitlines()
            if isinstance(node, ast.ClassDef) and not node.name.startswith("_"):
                assert ast.get_docstring(node), f"class {node.name} has no docstring"
                mine = [f for f in node.body if isinstance(f, ast.FunctionDef) and not f.name.startswith("_")]
                yield from ((f, s.splitlines()) for f in mine if not inherits(name, node.name, f.name))


@pytest.mark.parametrize("name", ROOMS)
def test_public_functions_are_documented(name):
    bad = []
    for f, lines in public_functions(name, ROOMS[name]):
        args = [*f.args.posonlyargs, *f.args.args, *f.args.kwonlyargs]
        args = [a for a in args if a.arg not in ("self", "cls")]
        if any("property" in ast.unparse(d) or "overload" in ast.unparse(d) for d in f.decorator_list): continue
        if not ast.get_docstring(f) and len(f.body) > 2: bad.append(f"{f.name}: no docstring")
        bad += [f"{f.name}({a.arg}): no comment" for a in args if "#" not in lines[a.lineno - 1] and "#" not in lines[(a.end_lineno or a.lineno) - 1]]
    assert not bad, "; ".join(bad)


def test_every_message_has_both_languages():
    for name in ROOMS: importlib.import_module(name)
    from ascend_nb.core import MESSAGES
    assert len(MESSAGES) > 20
    names = lambda text: {f for _, f, _, _ in string.Formatter().parse(text) if f}
    for key, (en, zh) in MESSAGES.items():
        assert re.search(r"[\u4e00-\u9fff]", zh) or key == "bad_config", f"{key} has no Chinese"
        assert {n.split("!")[0] for n in names(en)} == {n.split("!")[0] for n in names(zh)}, f"{key}: other placeholders in Chinese"


def prose(source):
    "What a reader reads of a markdown cell: no code, no tables, no headings, no links' targets."
    text = re.sub(r"```.*?```", "", source, flags=re.S)
    lines = [ln for ln in text.splitlines() if not re.match(r"#+ |\|", ln)]
    return re.sub(r"`[^`]*`|\]\([^)]*\)", "", "\n".join(lines))


RECIPES = [p for p in NOTEBOOKS if re.match(r"[89]\d_", p.stem)]


@pytest.mark.parametrize("path", RECIPES, ids=lambda p: p.stem)
def test_recipes_are_written_twice(path):
    "Every markdown cell with an English sentence says it in Chinese too: a character for about three letters; less than one for nine is a paragraph that was forgotten."
    for cell in cells(path, "markdown"):
        text = prose(cell)
        letters, signs = len(re.findall(r"[A-Za-z]", text)), len(re.findall(r"[\u4e00-\u9fff]", text))
        assert letters < 12 or signs * 9 >= letters, f"{path.name}: {letters} letters and {signs} Chinese characters in {cell[:80]!r}"
