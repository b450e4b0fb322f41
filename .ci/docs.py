"""The documentation site, from the notebooks: no network, no Quarto, nothing executed but the notebooks that show widgets.

    python .ci/docs.py build      _docs/: lessons, API pages, recipes, the floor map, search; a broken link ends it
    python .ci/docs.py serve      the site on this machine alone, http://127.0.0.1:8008 (serve PORT: another one)
    python .ci/docs.py sidebar    nbs/sidebar.yml, for those who build with Quarto

Pages are written to _proc/site, and only when they changed, so that the second build is quick.
"""
import hashlib
import html
import importlib
import inspect
import json
import os
import re
import shutil
import sys
import textwrap
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from urllib.parse import unquote, urlsplit

ROOT = Path(__file__).resolve().parent.parent
NBS, DOCS, WORK, OUT = ROOT / "nbs", ROOT / "docs", ROOT / "_proc", ROOT / "_docs"
SITE = WORK / "site"
MARKS = ("slow", "npu", "net", "data")
WIDGETS = "jupyter-js-widgets/extension.js"  # in the wheel widgetsnbextension, which ipywidgets brings
FLOORS_ZH = {"ground": "地基", "data": "数据", "model": "模型", "keep": "保存", "train": "训练", "use": "使用", "face": "界面", "recipes": "食谱"}


def floors():
    "[(first, last, name, what it may know)] from the table in CONTRIBUTING.md."
    rows = re.findall(r"^\| (\d\d)–(\d\d) (\w+) \| .*? \| (.*?) \|$", (ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8"), re.M)
    return [(int(a), int(b), name, knows) for a, b, name, knows in rows]


def read(path):
    import nbformat
    nb = nbformat.read(path, as_version=4)
    code = "\n".join(c.source for c in nb.cells if c.cell_type == "code")
    exp = re.search(r"^#\|\s*default_exp\s+(\S+)", code, re.M)
    title, line = re.match(r"# (.+)\n\n> (.+)", nb.cells[0].source).groups()
    return nb, dict(name=path.stem, module=exp and exp[1], title=title, line=line)


def rooms(): return sorted(NBS.glob("[0-9]*.ipynb"))


def write(path, text, made):
    "A page, touched only when it changed; `made` collects what this build wants."
    made.add(path)
    if path.exists() and path.read_text(encoding="utf-8") == text: return
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text, encoding="utf-8")


# links between files of the repository, as links between pages
def page_of(target, here):
    "Where a link of a notebook leads on the site; None: nowhere."
    path, _, anchor = target.partition("#")
    stem = Path(path).stem
    found = {"README": "index", "README_zh": "zh", "index": "index", "index_zh": "zh", "CONTRIBUTING": "contributing"}.get(stem)
    if path.endswith(".ipynb") and not found and (NBS / f"{stem}.ipynb").exists(): found = f"rooms/{stem}"
    if not found: return None
    return os.path.relpath(found, Path(here).parent) + (".md" if found == "contributing" else ".ipynb") + ("#" + anchor if anchor else "")


def relink(text, here, bad):
    "Markdown whose links fit the site. Code is left alone."
    def one(m):
        if re.match(r"[a-z]+:|#", m[2]): return m[0]
        if m[2].startswith("docs/images/") and (ROOT / m[2]).exists(): return f"{m[1]}({os.path.relpath('images', Path(here).parent)}/{Path(m[2]).name})"
        page = page_of(m[2], here)
        if page is None: bad.append(f"{here}: {m[2]}"); return m[0]
        return f"{m[1]}({page})"
    parts = re.split(r"(```.*?```|`[^`\n]*`)", text, flags=re.S)
    return "".join(p if i % 2 else re.sub(r"(\])\(([^)\s]+)\)", one, p) for i, p in enumerate(parts))


# lessons
def lesson(path, bad):
    "A notebook as the site shows it: without hidden cells and directives, exported cells marked."
    import nbformat.v4 as v4
    nb, about = read(path)
    name = path.stem.partition("-")[0]  # of an executed copy too
    here = {"index": "index", "index_zh": "zh", "widgets": "widgets"}.get(name, f"rooms/{name}")
    kept = []
    for cell in nb.cells:
        marks = re.findall(r"^#\|\s*(\S+)", cell.source, re.M) if cell.cell_type == "code" else []
        if "hide" in marks or "default_exp" in marks: continue
        if cell.cell_type == "markdown": cell.source = relink(cell.source, here, bad)
        else:
            body = re.sub(r"^#\|.*\n?", "", cell.source, flags=re.M).strip()
            said = [f"# {m}: runs only where asked for" for m in marks if m in MARKS]
            cell.source, cell.metadata = "\n".join([*said, body]), {"tags": ["exported"] if {"export", "exporti"} & set(marks) else []}
            for out in cell.outputs: out.get("data", {}).pop("application/javascript", None)
        kept.append(cell)
    nb.cells = kept
    if about["module"]: nb.cells[1:1] = [v4.new_markdown_cell(f"`ascend_nb.{about['module']}` · [API](../api/{about['module']}.md) · nbs/{name}.ipynb", id="api-link")]
    return nb


def executed(path):
    "A notebook of widgets with its widgets' state. Run again only when it or a module under ui changed."
    import nbformat
    from nbclient import NotebookClient
    from nbclient.exceptions import CellExecutionError
    sources = [path, *sorted((ROOT / "ascend_nb/ui").glob("*.py"))]
    key = hashlib.sha256(b"".join(p.read_bytes() for p in sources)).hexdigest()[:16]
    kept = WORK / "run" / f"{path.stem}-{key}.ipynb"
    if kept.exists(): return kept
    nb = nbformat.read(path, as_version=4)
    skip = re.compile(rf"^\s*#\|\s*({'|'.join(MARKS)}|eval:\s*false)", re.M)
    nb.cells = [c for c in nb.cells if c.cell_type != "code" or not (skip.search(c.source) or "nbdev_export()" in c.source)]
    try: NotebookClient(nb, timeout=300, kernel_name="python3", resources={"metadata": {"path": str(NBS)}}, store_widget_state=True,
                        extra_arguments=["--log-level=ERROR"]).execute()
    except CellExecutionError as e: sys.exit(f"{path.name} does not run: {e}")
    kept.parent.mkdir(parents=True, exist_ok=True)
    for old in kept.parent.glob(f"{path.stem}-*.ipynb"): old.unlink()
    nbformat.write(nb, kept)
    return kept


# API pages
def signature(name, obj):
    "`name(a, b=1)`: the types stand in the table below it."
    try: sig = inspect.signature(obj)
    except (ValueError, TypeError): return f"{name}(…)"
    shown = [p.replace(annotation=p.empty, default=p.default if p.default is p.empty or len(repr(p.default)) < 40 else ...) for p in sig.parameters.values()]
    text = f"{name}{sig.replace(parameters=[p for p in shown if p.name != 'self'], return_annotation=sig.empty)}".replace("Ellipsis", "…")
    return "\n".join(textwrap.wrap(text, 96, subsequent_indent="    ", break_long_words=False, break_on_hyphens=False))


def entry(name, obj, level=2):
    "One name: nbdev's show_doc, and the table of its parameters."
    from nbdev.showdoc import DocmentTbl, show_doc
    head = f"<a id=\"{name}\"></a>\n\n{'#' * level} `{name}`\n\n"
    if not (inspect.isclass(obj) or inspect.isroutine(obj)): return f"{head}```python\n{name} = {repr(obj)[:300]}\n```"
    text = show_doc(obj, name=name)._repr_markdown_().partition("```\n")[2].strip()  # the docstring
    try: table = str(DocmentTbl(obj))
    except (ValueError, TypeError, AttributeError, OSError, SyntaxError): table = ""
    table = re.sub(r"\n\| \*\*Returns.*", lambda m: "" if "**None** |  |" in m[0] else m[0].replace("**", ""), table)
    return f"{head}```python\n{signature(name, obj)}\n```\n\n{text}\n\n{table}".rstrip()


def methods(cls):
    "The public methods that a class defines itself."
    for n, f in vars(cls).items():
        f = f.__func__ if isinstance(f, (staticmethod, classmethod)) else f
        if not n.startswith("_") and inspect.isfunction(f): yield n, f


def api(about):
    "(page, {name: first sentence of its docstring}) of a module."
    module = importlib.import_module(f"ascend_nb.{about['module']}")
    parts = [f"---\norphan: true\n---\n# ascend_nb.{about['module']}\n\n> {about['line']}\n\n[The lesson](../rooms/{about['name']}.ipynb)"]
    names = {}
    for name in module.__all__:
        obj = getattr(module, name)
        names[name] = first_line(obj)
        parts.append(entry(name, obj))
        if inspect.isclass(obj) and obj.__module__ == module.__name__: parts += [entry(f"{name}.{m}", f, 3) for m, f in methods(obj)]
    return "\n\n".join(parts) + "\n", names


def first_line(obj):
    return (inspect.getdoc(obj) or "").partition("\n")[0] if inspect.isclass(obj) or inspect.isroutine(obj) else ""


# pages that are only lists
def api_index(about, names):
    "Every export, by module."
    parts = ["# API\n\n> Every name that a module exports, by floor; each leads to its signature and the table of its parameters."]
    for a, b, floor, _ in floors():
        mine = [r for r in about if r["module"] and a <= int(r["name"][:2]) <= b]
        if mine: parts.append(f"## {a:02d}–{b:02d} {floor}")
        for r in mine:
            rows = [f"| [`{n}`](api/{r['module']}.md#{n}) | {line.replace('|', '&#124;')} |" for n, line in names[r["module"]].items()]
            parts.append(f"### [{r['module']}](api/{r['module']}.md)\n\n{r['line']}\n\n| name | |\n|---|---|\n" + "\n".join(rows))
    return "\n\n".join(parts) + "\n"


def floor_map(about):
    "The table of floors, and every room with its one line."
    parts = ["# The floor map\n\n> A notebook's number is its floor; a module imports only from lower numbers."]
    for a, b, floor, knows in floors():
        parts.append(f"## {a:02d}–{b:02d} {floor} {FLOORS_ZH[floor]}\n\nWhat it may know: {knows}.\n\n| room | |\n|---|---|\n" + "\n".join(
            f"| [{r['name']}](rooms/{r['name']}.ipynb) | {r['line'].replace('|', '&#124;')} |" for r in about if a <= int(r["name"][:2]) <= b))
    return "\n\n".join(parts) + "\n"


def toctrees(about):
    "The sidebar: pages, then the floors in order."
    tree = lambda caption, pages: f"```{{toctree}}\n:hidden:\n:caption: {caption}\n\n" + "\n".join(pages) + "\n```"
    parts = [tree("ascend_nb", ["English <self>", "中文 <zh>", "Widgets 控件 <widgets>", "Floor map 楼层图 <floors>", "API <api_index>", "Contributing 参与开发 <contributing>"])]
    for a, b, floor, _ in [*floors()[-1:], *floors()[:-1]]:  # what a person does comes first
        parts.append(tree(f"{a:02d}–{b:02d} {floor} {FLOORS_ZH[floor]}", [f"{r['name']} <rooms/{r['name']}>" for r in about if a <= int(r["name"][:2]) <= b]))
    return "\n\n".join(parts)


def sidebar():
    "Quarto's sidebar."
    import yaml
    contents = [dict(section=f"{a:02d}–{b:02d} {floor}", contents=[p.name for p in rooms() if a <= int(p.name[:2]) <= b]) for a, b, floor, _ in floors()]
    return yaml.safe_dump({"website": {"sidebar": {"contents": ["index.ipynb", "index_zh.ipynb", *contents]}}}, allow_unicode=True, sort_keys=False)


# the build
def stage():
    "Write every page that Sphinx reads."
    import nbformat
    import nbformat.v4 as v4
    made, bad, about, names = set(), [], [read(p)[1] for p in rooms()], {}
    with ThreadPoolExecutor(2) as pool:  # each runs in a kernel, which is a process
        shown = {p: pool.submit(executed, p) for p, r in zip(rooms(), about, strict=True) if (r["module"] or "").startswith("ui.")}
        gallery = pool.submit(executed, DOCS / "widgets.ipynb")
        for r in (r for r in about if r["module"]):
            page, names[r["module"]] = api(r)
            write(SITE / f"api/{r['module']}.md", page, made)
    for p in rooms(): write(SITE / f"rooms/{p.stem}.ipynb", nbformat.writes(lesson(shown[p].result() if p in shown else p, bad)), made)
    gallery = lesson(gallery.result(), bad)
    home = lesson(NBS / "index.ipynb", bad)
    home.cells.append(v4.new_markdown_cell(toctrees(about), id="sidebar"))
    for name, nb in (("index", home), ("zh", lesson(NBS / "index_zh.ipynb", bad)), ("widgets", gallery)): write(SITE / f"{name}.ipynb", nbformat.writes(nb), made)
    write(SITE / "floors.md", floor_map(about), made)
    write(SITE / "api_index.md", api_index(about, names), made)
    write(SITE / "contributing.md", relink((ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8"), "contributing", bad), made)
    for image in (DOCS / "images").glob("*.png"): copy(image, SITE / "images" / image.name, made)
    for old in set(p for p in SITE.rglob("*") if p.is_file()) - made: old.unlink()
    write(WORK / "names.json", json.dumps(unique(names)), set())
    copy(widget_script(), WORK / "widgets/ipywidgets.js", set())
    if bad: sys.exit("links that lead nowhere:\n  " + "\n  ".join(bad))


def unique(names):
    "{name: (page, anchor)} of the names that one module alone exports."
    count = {}
    for module, mine in names.items():
        for n in mine: count.setdefault(n, []).append((f"api/{module}", n))
    return {n: where[0] for n, where in sorted(count.items()) if len(where) == 1}


def copy(src, dst, made):
    made.add(dst)
    dst.parent.mkdir(parents=True, exist_ok=True)
    if not dst.exists() or dst.read_bytes() != src.read_bytes(): shutil.copyfile(src, dst)


def widget_script():
    from jupyter_core.paths import jupyter_path
    found = [p for p in (Path(d) / WIDGETS for d in jupyter_path("nbextensions")) if p.exists()]
    if not found: sys.exit(f"found no {WIDGETS}; expected it from the wheel widgetsnbextension; do this: make dev")
    return found[0]


def check(out=OUT):
    "(broken links, external addresses) of the built pages: every relative href and src, with its anchor."
    pages = {p: p.read_text(encoding="utf-8") for p in out.rglob("*.html")}
    ids = {p: set(re.findall(r"\sid=[\"']([^\"']+)", text)) for p, text in pages.items()}
    bad, away = set(), set()
    for p, text in pages.items():
        text = re.sub(r"<script.*?</script>", lambda m: re.match(r"<script[^>]*>", m[0])[0], text, flags=re.S)
        for target in set(map(html.unescape, re.findall(r"<(?:a|link|img|script|iframe)\b[^>]*?\s(?:href|src)=\"([^\"]*)\"", text))):
            url = urlsplit(target)
            if url.scheme in ("http", "https"): away.add(target)
            if url.scheme or target.startswith("//"): continue
            to = (p.parent / unquote(url.path)).resolve() if url.path else p
            if to.is_dir(): to = to / "index.html"
            if not to.exists() or url.fragment and to in ids and unquote(url.fragment) not in ids[to]: bad.add(f"{p.relative_to(out)}: {target}")
    return sorted(bad), sorted(away)


def build():
    from sphinx.cmd.build import build_main
    os.environ.setdefault("PYTHONHASHSEED", "0")
    stage()
    built = WORK / "html"
    if not (built / "searchindex.js").exists(): shutil.rmtree(WORK / "doctrees", ignore_errors=True)  # a build that was cut short
    for page in [*built.glob("rooms/*.html"), *built.glob("api/*.html")]:  # Sphinx leaves pages whose source went
        source = SITE / page.relative_to(built)
        if not (source.with_suffix(".ipynb").exists() or source.with_suffix(".md").exists()): page.unlink()
    code = build_main(["-q", "-T", "-j", "2", "-c", str(DOCS), "-d", str(WORK / "doctrees"), "-w", str(WORK / "warnings.txt"), "-b", "html", str(SITE), str(built)])  # MyST-NB lays its pictures beside the output
    said = (WORK / "warnings.txt").read_text(encoding="utf-8")
    if code: sys.exit(said or "Sphinx ended with an error, see above")
    shutil.rmtree(OUT, ignore_errors=True)
    shutil.copytree(built, OUT, ignore=shutil.ignore_patterns(".buildinfo"))
    bad, away = check()
    (OUT / "external_links.txt").write_text("\n".join(away) + "\n", encoding="utf-8")
    if said or bad: sys.exit("\n".join([said, "broken links:", *bad]))
    print(f"{len(list(OUT.rglob('*.html')))} pages in {OUT.relative_to(ROOT)}/; no broken link; {len(away)} external addresses in external_links.txt, not fetched")


def serve(port="8008"):
    from functools import partial
    from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
    if not (OUT / "index.html").exists(): sys.exit("found no _docs/index.html; do this: make docs")
    print(f"http://127.0.0.1:{port} (Ctrl-C ends it)", flush=True)
    ThreadingHTTPServer(("127.0.0.1", int(port)), partial(SimpleHTTPRequestHandler, directory=str(OUT))).serve_forever()


COMMANDS = {"build": build, "serve": serve, "sidebar": lambda: (NBS / "sidebar.yml").write_text(sidebar(), encoding="utf-8")}

if __name__ == "__main__":
    if len(sys.argv) < 2 or sys.argv[1] not in COMMANDS: sys.exit(__doc__)
    COMMANDS[sys.argv[1]](*sys.argv[2:])
