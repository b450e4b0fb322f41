"""Megatron-LM's own data sets, where the package is installed."""
import importlib
from functools import partial

import pytest

MCORE = "megatron-core is absent: pip install \"ascend_nb[dev]\" brings it, or pip install --no-deps --target DIR megatron-core==0.6.0 with DIR on PYTHONPATH"


@pytest.fixture(scope="module")
def gpt(): return pytest.importorskip("megatron.core.datasets.gpt_dataset", reason=MCORE)


@pytest.fixture(scope="module")
def helpers(gpt):
    "The compiled helper: `helpers` in 0.6, `helpers_cpp` later."
    core = "megatron.core.datasets."
    try: return importlib.import_module(core + "helpers_cpp")
    except ImportError: return importlib.import_module(core + "helpers")


class Tokenizer:
    "What Megatron's data set asks of a tokenizer."
    eod, vocab_size, unique_identifiers = 0, 50_257, {}
    def __init__(self): self.pad = -1


def _build(gpt, prefixes, weights, split, seq_length, sizes, seed, cache, apart=None):
    "The data sets of Megatron core 0.6 or later: a blend was a flat list at first, then a pair of lists. apart: one (prefixes, weights) for each split instead."
    from importlib.metadata import version

    from megatron.core.datasets.blended_megatron_dataset_builder import BlendedMegatronDatasetBuilder
    old = version("megatron-core").startswith("0.6")
    def form(p, w): return ([str(x) for pair in zip(w, p, strict=True) for x in pair] if w else p) if old else (p, w)
    blend = dict(blend_per_split=[a and form(*a) for a in apart]) if apart else dict(blend=form(prefixes, weights), split=split)
    cfg = gpt.GPTDatasetConfig(random_seed=seed, sequence_length=seq_length, path_to_cache=cache and str(cache), tokenizer=Tokenizer(),
                               **blend,
                               reset_position_ids=False, reset_attention_mask=False, eod_mask_loss=False, create_attention_mask=False)
    return BlendedMegatronDatasetBuilder(gpt.GPTDataset, sizes, lambda: True, cfg).build()


@pytest.fixture(scope="module")
def megatron(gpt):
    "Builds Megatron's data sets: (prefixes, weights, split, seq_length, sizes, seed, cache folder, apart=None) -> one for each split."
    return partial(_build, gpt)
