"""Shared fixtures: where the real data lies, and what to say when it does not."""
import os
import signal
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
DATA = Path(os.environ.get("ASCEND_NB_DATA", ROOT.parent / "shared" / "data"))
os.environ.setdefault("HF_HUB_OFFLINE", "1")
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN: signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell starts `pytest &` deaf to Ctrl-C, and what the tests start with it


@pytest.fixture(scope="session")
def root() -> Path:
    "The repository."
    return ROOT


@pytest.fixture(scope="session")
def shared_data() -> Path:
    "The folder of real public data; a test that needs it is skipped where it is absent."
    if not DATA.is_dir(): pytest.skip(f"no real data at {DATA}; point ASCEND_NB_DATA at it")
    return DATA


@pytest.fixture(scope="session")
def profiles(shared_data) -> Path:
    "Real recordings of torch_npu's profiler."
    if not (shared_data / "ascend_profiler").is_dir(): pytest.skip(f"no profiles at {shared_data}/ascend_profiler")
    return shared_data / "ascend_profiler"


@pytest.fixture(scope="session")
def llm(profiles):
    "One of a language model, four ranks, as text and as database."
    from ascend_nb.profile_files import open_profile
    return open_profile(profiles / "qwen3_0.6b_tp1pp2dp2")


@pytest.fixture(scope="session")
def samples(root) -> Path:
    "The small samples that ship with the project."
    return root / "data_samples"


@pytest.fixture
def one_thread():
    "For models so small that a second thread only waits."
    import torch
    n = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(n)


@pytest.fixture
def chinese():
    "The page's language is Chinese."
    from ascend_nb.ui.bilingual import switch
    switch("zh")
    yield
    switch("en")


@pytest.fixture
def desk(tmp_path):
    "A folder to work in a browser: data, a tokenizer, a quiz, a recording, the studio's notebook."
    import shutil

    from ascend_nb.ui.app import write_notebook
    from browsing import chromium
    chromium()
    samples = ROOT / "data_samples"
    shutil.copy(samples / "instruct.json", tmp_path / "instruct.json")
    for folder in ("tokenizer", "town_quiz", "npu_profile"): shutil.copytree(samples / folder, tmp_path / folder)
    write_notebook(tmp_path)
    return tmp_path
