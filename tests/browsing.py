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


@contextlib.contextmanager
def lab(folder, base="/"):
    "(address with token, process) of a JupyterLab 4 in a folder, behind a base URL."
    port, token = free_port(), "ascendnbtests"
    quiet = folder / ".lab/@jupyterlab/apputils-extension/notification.jupyterlab-settings"
    quiet.parent.mkdir(parents=True, exist_ok=True)
    quiet.write_text('{"fetchNews": "false", "checkForUpdates": false}')
    words = ["-m", "jupyterlab", "--no-browser", f"--ServerApp.port={port}", "--ServerApp.ip=127.0.0.1", f"--IdentityProvider.token={token}", f"--ServerApp.base_url={base}", "--allow-root",
             f"--ServerApp.root_dir={folder}", "--LabApp.expose_app_in_browser=True", "--ServerApp.port_retries=0"]
    root = f"http://127.0.0.1:{port}{base}"
    with serving(words, f"{root}api", folder) as p: yield root, token, p


@contextlib.contextmanager
def voila(folder):
    "The address of a voila that shows the studio."
    port = free_port()
    words = ["-m", "ascend_nb.cli", "studio", str(folder), "--app", "voila", "--port", str(port)]
    with serving(words, f"http://127.0.0.1:{port}/voila/static/none", folder, 60): yield f"http://127.0.0.1:{port}/"


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
        try: yield page, afar
        except BaseException:
            with contextlib.suppress(Exception): page.screenshot(path=Path(tempfile.gettempdir(), "ascend_nb_failed.png"))
            raise
        finally: chrome.close()


def open_lab(page, root, token, notebook="studio.ipynb"):
    "Open a notebook and wait until its kernel is there."
    page.goto(f"{root}lab/tree/{notebook}?token={token}&reset")
    page.wait_for_selector(".jp-NotebookPanel", timeout=90_000)
    page.wait_for_function("""async () => { const a = window.jupyterapp, w = a && a.shell.currentWidget;
        if (!w || !w.sessionContext) return false; await w.sessionContext.ready; return !!w.sessionContext.session?.kernel }""", timeout=90_000)


def run_all(page):
    "Every cell, through the command that the menu calls; the list of files makes room."
    page.evaluate("async () => { if (!window.jupyterapp.shell.leftCollapsed) await window.jupyterapp.commands.execute('application:toggle-left-area') }")
    page.evaluate("async () => { await window.jupyterapp.commands.execute('notebook:run-all-cells') }")


def field(page, name):
    "The control with a label."
    return page.locator(f".jupyter-widgets:visible:has(> .widget-label:text-is('{name}'))").locator("input, select, textarea").first


def fill(page, name, text):
    "Type into a control, as a person does: what was there is replaced, and the control is left."
    f = field(page, name)
    f.fill(text); f.press("Tab")


def press(page, words): page.locator("button:visible", has_text=words).first.click()


def tab(page, words): page.locator(".lm-TabBar-tab:visible", has_text=re.compile(f"^{words}$")).last.click()


def says(page, words, seconds=60):
    "Wait until the page shows some words."
    page.locator(f"text=/{words}/").locator("visible=true").first.wait_for(timeout=seconds * 1000)


def sessions(root, token):
    "Kernels of a server."
    return json.load(urllib.request.urlopen(f"{root}api/kernels?token={token}", timeout=10))


def shot(page, name):
    "A picture for the docs; where ASCEND_NB_SHOTS names a folder it is kept."
    folder = os.environ.get("ASCEND_NB_SHOTS")
    if folder: os.makedirs(folder, exist_ok=True); page.screenshot(path=f"{folder}/{name}.png")
