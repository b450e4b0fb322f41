"""The site of `make docs`: what goes into it, and (slow) the whole of it, looked at with a browser."""
import functools
import importlib.util
import json
import re
import shutil
import subprocess
import sys
import threading
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer

import pytest
import yaml
from conftest import ROOT

spec = importlib.util.spec_from_file_location("site_docs", ROOT / ".ci/docs.py")
docs = importlib.util.module_from_spec(spec)
spec.loader.exec_module(docs)
room = lambda module: next(p for p in sorted((ROOT / "nbs").glob("[0-9]*.ipynb")) if docs.read(p)[1]["module"] == module)
NOTEBOOKS = sorted(p.stem for p in (ROOT / "nbs").glob("[0-9]*.ipynb"))


def test_the_sidebar_has_every_notebook_once():
    about = [dict(name=n) for n in NOTEBOOKS]
    assert sorted(re.findall(r"<rooms/(\S+)>", docs.toctrees(about))) == NOTEBOOKS
    assert {f[2] for f in docs.floors()} == set(docs.FLOORS_ZH), "a floor of CONTRIBUTING.md has no Chinese name"


def test_quartos_sidebar_is_in_step():
    assert (ROOT / "nbs/sidebar.yml").read_text(encoding="utf-8") == docs.sidebar(), "do this: python .ci/docs.py sidebar"
    assert yaml.safe_load((ROOT / "nbs/_quarto.yml").read_text(encoding="utf-8"))["metadata-files"] == ["sidebar.yml"]


def test_a_lesson_keeps_what_a_reader_needs():
    bad = []
    nb = docs.lesson(room("ui.forms"), bad)
    code = [c for c in nb.cells if c.cell_type == "code"]
    assert not bad and any("exported" in c.metadata.tags for c in code) and any(c.outputs for c in code)
    assert not any(line.startswith("#|") for c in code for line in c.source.splitlines())
    assert "nbdev_export" not in "".join(c.source for c in code), "a hidden cell is shown"
    assert "(../api/ui.forms.md)" in nb.cells[1].source


def test_links_of_notebooks_become_links_of_pages():
    bad = []
    text = "[a](nbs/24_mesh.ipynb) [b](24_mesh.ipynb#x) [c](README_zh.md) [d](https://example.org) `[e](f.py)`"
    assert docs.relink(text, "rooms/80_first_run", bad) == "[a](24_mesh.ipynb) [b](24_mesh.ipynb#x) [c](../zh.ipynb) [d](https://example.org) `[e](f.py)`"
    docs.relink("[g](nowhere.md)", "index", bad)
    assert bad == ["index: nowhere.md"]


@pytest.mark.parametrize("module", ["core", "config", "ui.forms"])
def test_every_export_has_an_api_entry(module):
    page, names = docs.api(docs.read(room(module))[1])
    assert list(names) == importlib.import_module(f"ascend_nb.{module}").__all__
    assert [n for n in re.findall(r'<a id="([^".]+)"', page)] == list(names)


def test_an_entry_has_signature_docstring_and_table():
    from ascend_nb.core import atomic_file
    text = docs.entry("atomic_file", atomic_file)
    assert "atomic_file(path, mode='w')" in text and "*A file object" in text
    assert re.search(r"\| mode \| str \| w \| \"w\" \(UTF-8 text\) or \"wb\" \|", text)


def test_broken_links_are_found(tmp_path):
    (tmp_path / "a.html").write_text("<h1 id='top'></h1><a href=\"b.html#there\">x</a><a href=\"#top\">y</a><a href=\"https://example.org/\">z</a><img src=\"no.png\">")
    (tmp_path / "b.html").write_text('<a id="here" href="a.html#nowhere">x</a><script>"<a href=\\"c.html\\">"</script>')
    bad, away = docs.check(tmp_path)
    assert bad == ["a.html: b.html#there", "a.html: no.png", "b.html: a.html#nowhere"] and away == ["https://example.org/"]


def test_words_are_split_alike_by_the_index_and_by_the_page(monkeypatch):
    pytest.importorskip("furo")
    conf = conf_module(monkeypatch)
    text = "Look at 检查点 and 数据 with lr_decay_style, 第3步 é"
    mine = conf.SearchBoth({}).split(text)
    assert {"检查", "查点", "数据", "第", "步", "lr_decay_style", "3", "é"} <= set(mine)
    node = shutil.which("node") or pytest.skip("no node to run the page's half")
    js = f"{conf.SearchBoth.js_splitter_code}; console.log(JSON.stringify(splitQuery({json.dumps(text)})))"
    theirs = json.loads(subprocess.run([node, "-e", js], capture_output=True, text=True, check=True).stdout)
    assert set(theirs) <= set(mine) and {"查点", "lr_decay_style", "第", "3", "é"} <= set(theirs)


def conf_module(monkeypatch):
    spec = importlib.util.spec_from_file_location("site_conf", ROOT / "docs/conf.py")
    conf = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(conf)
    return conf


def test_workflows_name_their_actions_by_major_version():
    for path in (ROOT / ".github/workflows").glob("*.yml"):
        uses = re.findall(r"uses: (\S+)", path.read_text(encoding="utf-8"))
        assert uses and all(re.fullmatch(r"actions/[\w-]+@v\d+", u) for u in uses), f"{path.name}: {uses}"
        jobs = yaml.safe_load(path.read_text(encoding="utf-8"))["jobs"]
        for run in (s["run"] for j in jobs.values() for s in j["steps"] if "run" in s):
            if run.startswith("make "): assert re.search(rf"^{run[5:]}:", (ROOT / "Makefile").read_text(), re.M), f"the Makefile has no {run[5:]}"


@pytest.fixture(scope="module")
def site():
    "The built site, on this machine's own address."
    pytest.importorskip("furo")
    done = subprocess.run([sys.executable, ROOT / ".ci/docs.py", "build"], capture_output=True, text=True)
    assert done.returncode == 0 and "no broken link" in done.stdout, done.stdout + done.stderr
    class Quiet(SimpleHTTPRequestHandler):
        def log_message(self, *args): pass
    server = ThreadingHTTPServer(("127.0.0.1", 0), functools.partial(Quiet, directory=str(ROOT / "_docs")))
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_port}"
    server.shutdown()


@pytest.fixture(scope="module")
def browser():
    sync = pytest.importorskip("playwright.sync_api")
    path = shutil.which("chromium") or shutil.which("chromium-browser") or pytest.skip("no Chromium on this machine")
    with sync.sync_playwright() as p:
        b = p.chromium.launch(executable_path=path, args=["--no-sandbox"])
        yield b
        b.close()


@pytest.mark.slow
def test_every_notebook_and_every_export_has_its_place(site):
    assert sorted(p.stem for p in (ROOT / "_docs/rooms").glob("*.html")) == NOTEBOOKS
    missing = []
    for n in NOTEBOOKS:
        module = docs.read(ROOT / f"nbs/{n}.ipynb")[1]["module"]
        if not module: continue
        ids = set(re.findall(r'<a id="([^"]+)"', (ROOT / f"_docs/api/{module}.html").read_text(encoding="utf-8")))
        missing += [f"{module}.{x}" for x in importlib.import_module(f"ascend_nb.{module}").__all__ if x not in ids]
    assert not missing


@pytest.mark.slow
def test_nothing_is_fetched_and_widgets_are_drawn(site, browser):
    page, asked, wrong = browser.new_page(), set(), []
    page.on("request", lambda r: asked.add(r.url))
    page.on("pageerror", lambda e: wrong.append(str(e)))
    for name in ("index", "zh", "floors", "rooms/40a_preference", "api/core", "widgets"): page.goto(f"{site}/{name}.html")
    page.wait_for_function("document.documentElement.dataset.widgets == 'drawn'", timeout=20000)
    assert not wrong and {u for u in asked if not u.startswith((site, "data:", "blob:"))} == set()
    assert page.locator(".widget-host .widget-text input").count() > 10 and page.locator(".widget-host img").count() == 1
    form = page.locator(".widget-host").nth(1)  # after the studio
    label = form.get_by_text("lr_decay_iters")
    assert not label.is_visible()
    form.locator(".jupyter-widget-Collapse-header").first.click()
    label.wait_for(state="visible", timeout=5000)


@pytest.mark.slow
@pytest.mark.parametrize("words, page_title", [("atomic_file", "ascend_nb.core"), ("检查点", "ascend_nb"), ("spike", "spikes")])
def test_search_finds_both_languages(site, browser, words, page_title):
    page = browser.new_page()
    page.goto(f"{site}/search.html?q={words}")
    page.wait_for_selector("#search-results li a", timeout=20000)
    page.wait_for_timeout(1000)
    assert any(page_title in t for t in page.locator("#search-results li a").all_inner_texts())
