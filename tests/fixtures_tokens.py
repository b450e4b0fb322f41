"""Fixtures for the tests of data sets: a real file of tokens, and a made one whose tokens say where they stand."""
import numpy as np
import pytest

from ascend_nb.indexed import IndexedWriter


@pytest.fixture(scope="module")
def web(shared_data): return str(shared_data / "megatron" / "meg-gpt2-openwebtext_text_document")


@pytest.fixture
def numbers(tmp_path):
    "Documents of 1 to 30 tokens, some of them empty; token 100·d + t is token t of document d."
    rng = np.random.default_rng(0)
    lengths = np.where(rng.random(60) < .1, 0, rng.integers(1, 30, 60)).astype(np.int32)
    with IndexedWriter(tmp_path / "numbers_text_document") as w: w.add_many([np.arange(100 * d, 100 * d + n) for d, n in enumerate(lengths)])
    return str(tmp_path / "numbers_text_document")
