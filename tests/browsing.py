"""What the browser tests need: a JupyterLab and a voila of their own, a Chromium, and hands that find things by the words on them."""
import contextlib
import json
import os
import re
import shutil
import socket
import subprocess
import sys
import tempfile
import time
import urllib.error
import urllib.request
from pathlib import Path

import pytest
from conftest import ROOT

BROWSERS = ("chromium", "chromium-browser", "google-chrome", "chrome")


def chromium():
    "The browser's path; without one the test is skipped, and says what to do."
    pytest.importorskip("playwright.sync_api", reason="no playwright: make dev")
    found = os.environ.get("ASCEND_NB_CHROMIUM") or next(filter(None, map(shutil.which, BROWSERS)), None)
    if not found: pytest.skip("no Chromium: apt-get install chromium, or ASCEND_NB_CHROMIUM=/path/to/it")
    return found


def free_port():
    with socket.socket() as s: s.bind(("127.0.0.1", 0)); return s.getsockname()[1]


@contextlib.contextmanager
def serving(words, url, folder, seconds=90):
    "A server of ours, ended by its process group."
    log = open(folder / "server.log", "ab")
    env = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "ASCEND_NB_LANG": "en", "JUPYTER_CONFIG_DIR": str(folder / ".jupyter"), "JUPYTERLAB_SETTINGS_DIR": str(folder / ".lab"),
           "JUPYTERLAB_WORKSPACES_DIR": str(folder / ".workspaces"), "IPYTHONDIR": str(folder / ".ipython")}
    p = subprocess.Popen([sys.executable, *words], cwd=folder, env=env, stdout=log, stderr=log, start_new_session=True)
    try:
        end = time.monotonic() + seconds
        while time.monotonic() < end and p.poll() is None:
            try: urllib.request.urlopen(url, timeout=5).read(); break
            except urllib.error.HTTPError: break  # it answers
            except OSError: time.sleep(.2)
        else: pytest.fail(f"{words[1]} did not answer: {(folder / 'server.log').read_text()[-2000:]}")
        yield p
    finally:
        with contextlib.suppress(ProcessLookupError): os.killpg(p.pid, 15)
        try: p.wait(20)
        except subprocess.TimeoutExpired: os.killpg(p.pid, 9)


APPS = dict(jupyterlab="LabApp", notebook="JupyterNotebookApp")  # module -> the class that has its settings


@contextlib.contextmanager
def lab(folder, base="/", app="jupyterlab"):
    "(address, token, process) of a JupyterLab 4 or a Notebook 7 in a folder, behind a base URL."
    port, token = free_port(), "ascendnbtests"
    quiet = folder / ".lab/@jupyterlab/apputils-extension/notification.jupyterlab-settings"
    quiet.parent.mkdir(parents=True, exist_ok=True)
    quiet.write_text('{"fetchNews": "false", "checkForUpdates": false}')
    words = ["-m", app, "--no-browser", f"--ServerApp.port={port}", "--ServerApp.ip=127.0.0.1", f"--IdentityProvider.token={token}", f"--ServerApp.base_url={base}", "--allow-root",
             f"--ServerApp.root_dir={folder}", f"--{APPS[app]}.expose_app_in_browser=True", "--ServerApp.port_retries=0"]
    root = f"http://127.0.0.1:{port}{base}"
    with serving(words, f"{root}api", folder) as p: yield root, token, p


@contextlib.contextmanager
def voila(folder):
    "The address of a voila that shows the studio."
    port = free_port()
    words = ["-m", "ascend_nb.cli", "studio", str(folder), "--app", "voila", "--port", str(port)]
    with serving(words, f"http://127.0.0.1:{port}/voila/static/none", folder, 60): yield f"http://127.0.0.1:{port}/"


SAID = ("widget model not found", "Yjs was already imported", "getter for the shared module")  # of the hosts: an output of a kernel that is gone; two managers on one page (a test's doing); JupyterLab's extensions under voila


def complaints(page):
    "What the console reports as an error from now on; what is known of the hosts is left out."
    said = []
    page.on("console", lambda m: said.append(m.text) if m.type == "error" and not any(w in m.text for w in SAID) else None)
    page.on("pageerror", lambda e: said.append(str(e)))
    return said


@contextlib.contextmanager
def browser(**kw):
    "(page, addresses that were asked for outside this machine): nothing from afar may be needed, so it is refused."
    from playwright.sync_api import sync_playwright
    path = chromium()
    with sync_playwright() as play:
        chrome = play.chromium.launch(executable_path=path, args=["--no-sandbox", "--disable-dev-shm-usage", "--disable-gpu"])
        context = chrome.new_context(viewport=dict(width=1500, height=980), **kw)
        afar = []
        def refuse(route): afar.append(route.request.url); route.abort()
        context.route(re.compile(r"^https?://(?!127\.0\.0\.1|localhost)"), refuse)
        page = context.new_page()
        page.set_default_timeout(60_000)
        page.complaints = complaints(page)
        try: yield page, afar
        except BaseException:
            with contextlib.suppress(Exception): page.screenshot(path=Path(tempfile.gettempdir(), "ascend_nb_failed.png"))
            raise
        finally: chrome.close()


def open_lab(page, root, token, notebook="studio.ipynb", where="lab/tree"):
    "Open a notebook and wait until its kernel is there."
    page.goto(f"{root}{where}/{notebook}?token={token}&reset")
    page.wait_for_selector(".jp-NotebookPanel", timeout=90_000)
    page.wait_for_function("""async () => { const a = window.jupyterapp, w = a && a.shell.currentWidget;
        if (!w || !w.sessionContext) return false; await w.sessionContext.ready; return !!w.sessionContext.session?.kernel }""", timeout=90_000)


def run_all(page):
    "Every cell, through the command that the menu calls; the list of files makes room."
    page.evaluate("async () => { if (!window.jupyterapp.shell.leftCollapsed) await window.jupyterapp.commands.execute('application:toggle-left-area') }")
    page.evaluate("async () => { await window.jupyterapp.commands.execute('notebook:run-all-cells') }")


def begin(page, root, token):
    "The studio's notebook in JupyterLab, run until it is there."
    open_lab(page, root, token)
    run_all(page)
    says(page, "kernel alive")


def look_at_data(page):
    "The first thing that a person does: which rows are there, and what is learned of them."
    fill(page, "data", "instruct.json")
    fill(page, "tokenizer", "tokenizer")
    press(page, "Look at it")
    says(page, "read, not learned")


def theme(page, dark):
    "JupyterLab's theme."
    page.evaluate("async t => { await window.jupyterapp.commands.execute('apputils:change-theme', {theme: t}) }", f"JupyterLab {'Dark' if dark else 'Light'}")
    page.wait_for_selector(f"body[data-jp-theme-light={str(not dark).lower()}]", state="attached")


def field(page, name):
    "The control with a label."
    return page.locator(f".jupyter-widgets:visible:has(> .widget-label:text-is('{name}'))").locator("input, select, textarea").first


def fill(page, name, text):
    "Type into a control, as a person does: what was there is replaced, and the control is left."
    f = field(page, name)
    f.fill(text); f.press("Tab")


def press(page, words): page.locator("button:visible", has_text=words).first.click()


def tab(page, words): page.locator(".lm-TabBar-tab:visible", has_text=re.compile(f"^{words}$")).last.click()


def unfold(page, words):
    "Open a section."
    page.locator("button.ascend-nb-fold:visible", has_text=words).first.click()


def turn(page, words, title=None):
    "A tab, and wait until its page is there: its title is the tab's."
    tab(page, words)
    page.locator("h3:visible", has_text=re.compile(f"^{title or words}$")).wait_for()


def says(page, words, seconds=60):
    "Wait until the page shows some words."
    page.locator(f"text=/{words}/").locator("visible=true").first.wait_for(timeout=seconds * 1000)


def sessions(root, token):
    "Kernels of a server."
    return json.load(urllib.request.urlopen(f"{root}api/kernels?token={token}", timeout=10))


def shot(page, name, where="ASCEND_NB_SHOTS"):
    "A picture, for the docs or (ASCEND_NB_LOOKS) to look at; where the variable names a folder it is kept."
    folder = os.environ.get(where)
    if folder: os.makedirs(folder, exist_ok=True); page.screenshot(path=f"{folder}/{name}.png")


# What is measured in the page. Text: WCAG 2.1, 1.4.3: 4.5 : 1, large text 3 : 1; controls that are closed are exempt.
PALE = """() => {
  const parse = c => { const m = c.match(/[\\d.]+/g).map(Number), s = c.startsWith('color(') ? 255 : 1; return [m[0] * s, m[1] * s, m[2] * s, m[3] ?? 1] };
  const light = c => { const f = v => { v /= 255; return v <= .04045 ? v / 12.92 : ((v + .055) / 1.055) ** 2.4 }; return .2126 * f(c[0]) + .7152 * f(c[1]) + .0722 * f(c[2]) };
  const over = (a, b) => [0, 1, 2].map(i => a[i] * a[3] + b[i] * (1 - a[3])).concat(1);
  const root = document.querySelector('.ascend-nb'), bad = []; let n = 0;
  const seen = e => { const r = e.getBoundingClientRect(); return r.width > 0 && r.height > 0 && getComputedStyle(e).visibility != 'hidden' };
  const look = (e, text, ink, faint = 1) => {
    const up = []; for (let x = e; x; x = x.parentElement) up.unshift(getComputedStyle(x));
    const ground = up.reduce((g, s) => over(parse(s.backgroundColor), g), [255, 255, 255, 1]), s = up.at(-1);
    const c = parse(ink ?? s.color); c[3] *= faint * up.reduce((o, s) => o * s.opacity, 1);
    const [a, b] = [light(over(c, ground)) + .05, light(ground) + .05], ratio = Math.max(a, b) / Math.min(a, b), px = parseFloat(s.fontSize);
    n++; if (ratio < (px >= 24 || (px >= 18.66 && s.fontWeight >= 700) ? 3 : 4.5)) bad.push(`${ratio.toFixed(2)} ${e.tagName} ${text.slice(0, 40)}`);
  };
  const walk = document.createTreeWalker(root, NodeFilter.SHOW_TEXT);
  while (walk.nextNode()) { const e = walk.currentNode.parentElement, t = walk.currentNode.data.trim(); if (t && seen(e) && !e.closest('style,option,:disabled')) look(e, t) }
  for (const e of root.querySelectorAll('input:not([type=checkbox]),textarea,select')) if (seen(e) && !e.disabled) {
    if (e.value || !e.placeholder) look(e, e.value); else { const p = getComputedStyle(e, '::placeholder'); look(e, e.placeholder, p.color, p.opacity) } }
  return [n, bad] }"""
CUT = """() => { const root = document.querySelector('.ascend-nb'), wall = root.getBoundingClientRect().right, bad = [];
  const rolls = e => { for (; e && e != root; e = e.parentElement) if (['auto', 'scroll'].includes(getComputedStyle(e).overflowX)) return e; };
  for (const e of root.querySelectorAll('*')) { const r = e.getBoundingClientRect(), s = getComputedStyle(e), text = e.textContent.trim().slice(0, 50); if (!r.width || !r.height || e.closest('style')) continue;
    const roll = rolls(e);
    if (['hidden', 'clip'].includes(s.overflowX) && e.scrollWidth > e.clientWidth + 1 && !['INPUT', 'SELECT', 'TEXTAREA'].includes(e.tagName)) bad.push(`cut ${e.className}: ${text}`);
    if (r.right > wall + 2 && !roll) bad.push(`beyond ${e.className}: ${text}`);
    if (e === roll && e.scrollWidth > e.clientWidth + 1 && e.querySelector('input,button,select')) bad.push(`rolls ${e.className}: ${text}`); }
  return bad }"""
# The keyboard: marks every control that can be used, and tells of the one that has the focus.
MARK = """() => { const root = document.querySelector('.ascend-nb'), seen = e => { const r = e.getBoundingClientRect(); return r.width > 0 && r.height > 0 && getComputedStyle(e).visibility != 'hidden' };
  const all = [...root.querySelectorAll('.lm-TabPanel-stackedPanel :is(button,input,select,textarea,summary,[role=slider])')].filter(e => seen(e) && !e.disabled);
  all.forEach((e, i) => e.dataset.walk = i); return all.length }"""
FOCUS = """() => { const e = document.activeElement, s = getComputedStyle(e); return {at: e.dataset.walk === undefined ? null : +e.dataset.walk, inside: !!e.closest('.ascend-nb'), name: e.tagName + ' ' + (e.innerText || e.value || e.placeholder || '').slice(0, 30),
  ring: s.outlineStyle != 'none' && parseFloat(s.outlineWidth) >= 2} }"""
MISSED = "() => [...document.querySelectorAll('[data-walk]')].filter(e => !e.dataset.done).map(e => e.outerHTML.slice(0, 150))"
# VS Code's own widget manager beside JupyterLab's, on the same kernel. It looks for requirejs; a table is enough.
VSCODE = """async url => {
  const known = {}; window.define = (name, make) => known[name] = make(); window.requirejs = (names, then) => then(...names.map(n => known[n]));
  (await import(url)).activate(); window.vscIPyWidgets8.load();
  const here = window.jupyterapp.shell.currentWidget.sessionContext.session.kernel, kernel = window.jupyterapp.serviceManager.kernels.connectTo({model: here.model, handleComms: true});
  await kernel.info;
  const box = document.createElement('div'); box.id = 'vscode'; box.style = 'position:fixed;inset:0;background:white;z-index:99999;overflow:auto'; document.body.append(box);
  const lost = [], loader = {widgetsRegisteredInRequireJs: new Set(Object.keys(known)), successHandler: () => 0, errorHandler: (...w) => lost.push(w.join(' ')), loadWidgetScript: async name => lost.push('script ' + name)};
  const manager = new window.vscIPyWidgets.WidgetManager(kernel, box, loader, () => 0), run = kernel.requestExecute({code: window.jupyterapp.shell.currentWidget.content.widgets[0].model.sharedModel.source});
  let id; run.onIOPub = m => id ??= m.content?.data?.['application/vnd.jupyter.widget-view+json']?.model_id;
  await run.done;
  await manager.display_view({}, await manager.create_view(await manager.get_model(id)), {node: box});
  return lost }"""
