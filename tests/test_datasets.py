"""Samples, their order and their blend: against Megatron-LM itself, against slow loops, and on real files."""
import hashlib
import importlib
import json
import os
import time

import numpy as np
import pytest
import torch

from ascend_nb.config import DataConfig
from ascend_nb.core import UserError
from ascend_nb.datasets import (
    FIELDS,
    BlendedDataset,
    GPTDataset,
    Loader,
    SFTDataset,
    build_datasets,
    collate_gpt,
    collate_sft,
    parse_blend,
)
from ascend_nb.indexed import IndexedReader, IndexedWriter, write_together
from ascend_nb.sample_index import SPLITS, blend_step, epoch_order, gpt_index, plan_epochs, split_bounds

MCORE = "megatron-core is absent: pip install --no-deps --target DIR megatron-core==0.6.0, then put DIR on PYTHONPATH"


@pytest.fixture(scope="module")
def gpt(): return pytest.importorskip("megatron.core.datasets.gpt_dataset", reason=MCORE)


@pytest.fixture(scope="module")
def helpers(gpt):
    "The compiled helper: `helpers` in 0.6, `helpers_cpp` later."
    core = "megatron.core.datasets."
    try: return importlib.import_module(core + "helpers_cpp")
    except ImportError: return importlib.import_module(core + "helpers")


@pytest.fixture(scope="module")
def web(shared_data): return str(shared_data / "megatron" / "meg-gpt2-openwebtext_text_document")


@pytest.fixture
def numbers(tmp_path):
    "Documents of 1 to 30 tokens, some of them empty; token 100·d + t is token t of document d."
    rng = np.random.default_rng(0)
    lengths = np.where(rng.random(60) < .1, 0, rng.integers(1, 30, 60)).astype(np.int32)
    with IndexedWriter(tmp_path / "numbers_text_document") as w: w.add_many([np.arange(100 * d, 100 * d + n) for d, n in enumerate(lengths)])
    return str(tmp_path / "numbers_text_document")


def write_sft(prefix, rows):
    "Rows of (question tokens, answer tokens)."
    ids = [np.arange(1, q + a + 1) for q, a in rows]
    with write_together(*(f"{prefix}_packed_{f}_document" for f in FIELDS)) as (i, m, lab):
        i.add_many(ids); m.add_many([np.ones_like(x) for x in ids])
        lab.add_many([np.where(x <= q, -100, x) for x, (q, _) in zip(ids, rows, strict=True)])
    return str(prefix)


# Megatron-LM itself -------------------------------------------------------------------------------

class Tokenizer:
    "What Megatron's data set asks of a tokenizer."
    eod, vocab_size, unique_identifiers = 0, 50_257, {}
    def __init__(self): self.pad = -1


def megatron(gpt, prefixes, weights, split, seq_length, sizes, seed, cache):
    "The data sets of Megatron core 0.6 or later: a blend was a flat list at first, then a pair of lists."
    from importlib.metadata import version

    from megatron.core.datasets.blended_megatron_dataset_builder import BlendedMegatronDatasetBuilder
    flat = [str(x) for pair in zip(weights, prefixes, strict=True) for x in pair] if weights else prefixes
    cfg = gpt.GPTDatasetConfig(random_seed=seed, sequence_length=seq_length, split=split, path_to_cache=cache and str(cache), tokenizer=Tokenizer(),
                               blend=flat if version("megatron-core").startswith("0.6") else (prefixes, weights),
                               reset_position_ids=False, reset_attention_mask=False, eod_mask_loss=False, create_attention_mask=False)
    return BlendedMegatronDatasetBuilder(gpt.GPTDataset, sizes, lambda: True, cfg).build()


ARRAYS = ("document_index", "sample_index", "shuffle_index")


def digest(ds):
    "Eight hex digits of the three arrays."
    return hashlib.md5(b"".join(np.ascontiguousarray(getattr(ds, a), np.int64).tobytes() for a in ARRAYS)).hexdigest()[:8]


# seq_length, samples per split, seed, split, and the digests of what megatron-core 0.6.0 made of them
CASES = [
    (1024, (100, 20, 0), 1234, "969,30,1", "1db2eec1 77a09d96"), # less than one epoch
    (1024, (1330, 40, 0), 1234, "969,30,1", "53a343f8 a29bd9e1"), # a little more than one
    (512, (7000, 500, 100), 1, "949,50,1", "b0861332 56465f3f 727de7bf"), # several epochs, the last one apart
    (512, (7600, 500, 100), 2, "949,50,1", "3908ad98 c87dba54 f995d8ce"), # several epochs together
    (128, (20_000, 100, 10), 7, "100,0,0", "f6f555f8"), # no validation
    (4096, (900, 30, 30), 42, "8,1,1", "7a8e3c11 790993d5 dc2376db"), # samples of many documents
    (64, (21_000, 3, 3), 0, "98,1,1", "c3785446 f92fd64c 0472935e"),
]


def ours_for(web, seq_length, sizes, seed, split):
    return build_datasets(DataConfig([web], split=split, seq_length=seq_length), "pretrain", dict(zip(SPLITS, sizes, strict=True)), seed, 50_257)


@pytest.mark.parametrize("seq_length, sizes, seed, split, digests", CASES)
def test_the_three_arrays_are_those_that_megatron_made(web, seq_length, sizes, seed, split, digests):
    "Recorded from megatron-core 0.6.0; the next test runs it."
    ours = ours_for(web, seq_length, sizes, seed, split)
    assert " ".join(digest(d) for d in ours.values()) == digests


@pytest.mark.parametrize("seq_length, sizes, seed, split, digests", CASES)
def test_the_three_arrays_and_the_samples_are_megatrons(gpt, web, tmp_path, seq_length, sizes, seed, split, digests):
    theirs = dict(zip(SPLITS, megatron(gpt, [web], None, split, seq_length, sizes, seed, tmp_path), strict=True))
    ours = ours_for(web, seq_length, sizes, seed, split)
    assert list(ours) == [k for k, n in zip(SPLITS, sizes, strict=True) if theirs[k] is not None and n]
    assert " ".join(digest(theirs[k]) for k in ours) == digests
    for name, o in ours.items():
        t = theirs[name]
        for a in ARRAYS:
            assert np.array_equal(getattr(o, a), getattr(t, a)), (name, a)
            assert getattr(o, a).dtype == np.int64
        for i in range(0, len(o), max(1, len(o) // 50)):
            assert np.array_equal(o[i].ids, t[i]["tokens"]) and np.array_equal(o[i].labels, t[i]["labels"])


def test_both_rules_of_the_last_epoch_are_covered(web):
    "The cases above hold a last epoch that stays apart and one that does not."
    r = IndexedReader(web)
    plans = [plan_epochs(int(r.lengths[slice(*split_bounds(split, len(r))["train"])].sum()), sizes[0], S) for S, sizes, _, split, _ in CASES]
    assert any(e > 1 and first for e, first in plans) and any(e > 1 and first is None for e, first in plans)


@pytest.mark.parametrize("weights", [[.7, .3], [.5, .3, .2], [1 / 3] * 3, [.1] * 10, [1.0], [.999, .001], [.25, .25, .5]])
def test_the_blend_is_megatrons(helpers, weights):
    n = 20_000
    w = np.array(weights) / np.sum(weights)
    which, nth = np.zeros(n, np.int16), np.zeros(n, np.int64)
    helpers.build_blending_indices(which, nth, w, len(w), n, False)
    used, ours = [0] * len(w), []
    for start, k in ((0, 1), (1, 4999), (5000, 15_000)): ours.append(blend_step(w.tolist(), used, start, k))
    assert np.array_equal(which, np.concatenate([a for a, _ in ours])) and np.array_equal(nth, np.concatenate([b for _, b in ours]))


def test_a_blended_run_reads_what_megatron_reads(gpt, web, tmp_path):
    "Two sources: the same tokens, sample after sample, and in 0.6, whose margin this is, as many."
    r = IndexedReader(web)
    for name, part in (("a", r[:300]), ("b", r[300:])):
        with IndexedWriter(tmp_path / name, np.uint16) as w: w.add_many(part)
    a, b = str(tmp_path / "a"), str(tmp_path / "b")
    theirs, *_ = megatron(gpt, [a, b], [.3, .7], "100,0,0", 256, (1000, 0, 0), 5, None)
    ours = build_datasets(DataConfig([".3", a, ".7", b], split="100,0,0", seq_length=256), "pretrain", dict(train=1000), 5)["train"]
    assert len(theirs) <= len(ours) <= len(theirs) + 6
    for i in range(0, len(theirs), 7): assert np.array_equal(ours[i].ids, theirs[i]["tokens"])


# Slow oracles: the same from the description alone -------------------------------------------------

def walk(lengths, docs, seq_length):
    "Cut the stream token by token."
    place = [(j, t) for j, d in enumerate(docs) for t in range(lengths[d])]
    cuts = [place[i] for i in range(0, len(place), seq_length)]
    return [(0, 0), *cuts[1:(len(place) - 1) // seq_length + 1]]


@pytest.mark.parametrize("seed", range(6))
@pytest.mark.parametrize("seq_length", [1, 2, 7, 64])
def test_cuts_are_where_a_walk_finds_them(numbers, seed, seq_length):
    lengths = IndexedReader(numbers).lengths
    docs, cuts, shuffle = gpt_index(lengths, (3, 50), seq_length, 3, None, seed)
    assert cuts.tolist() == [list(c) for c in walk(lengths, docs, seq_length)]
    assert sorted(shuffle) == list(range(len(cuts) - 1)) and np.array_equal(np.bincount(docs, minlength=50)[3:], np.full(47, 3))


@pytest.mark.parametrize("seq_length", [1, 5, 16, 100])
def test_samples_tile_the_stream_and_overlap_by_one(numbers, seq_length):
    r = IndexedReader(numbers)
    ds = GPTDataset(r, seq_length, seed=3)
    stream = np.concatenate([r[int(d)] for d in ds.document_index])
    for i in range(len(ds)): assert np.array_equal(ds.tokens(i), stream[i * seq_length:i * seq_length + seq_length + 1])
    assert sorted(ds.shuffle_index) == list(range((len(stream) - 1) // seq_length))
    s = ds[0]
    assert np.array_equal(s.ids[1:], s.labels[:-1]) and len(s.ids) == seq_length


def test_epochs_by_counting_up():
    "The rule as it is told: add epochs until there are tokens enough."
    for tokens in (10, 99, 1000):
        for seq in (1, 7, 9):
            for n in range(1, 200, 3):
                epochs = 1
                while (epochs * tokens - 1) // seq < n: epochs += 1
                assert plan_epochs(tokens, n, seq)[0] == epochs


@pytest.mark.parametrize("split, n, want", [
    ("969,30,1", 1000, {"train": (0, 969), "valid": (969, 999), "test": (999, 1000)}),
    ("949, 50, 1", 1000, {"train": (0, 949), "valid": (949, 999), "test": (999, 1000)}),
    ("100,0,0", 7, {"train": (0, 7)}), ("1", 7, {"train": (0, 7)}), ("0.5;0.5", 4, {"train": (0, 2), "valid": (2, 4)}), ("0,1,0", 5, {"valid": (0, 5)}),
])
def test_split(split, n, want):
    assert split_bounds(split, n) == want == split_bounds(split, n, "sft")


def test_sft_splits_round_each_share():
    "8:1:1 of 37: 30 + 4 + 4 is one too many, so every edge moves by one; the running sum rounds otherwise."
    assert split_bounds("8,1,1", 37, "sft") == {"train": (0, 29), "valid": (29, 33), "test": (33, 37)}
    assert split_bounds("8,1,1", 37) == {"train": (0, 30), "valid": (30, 33), "test": (33, 37)}


@pytest.mark.parametrize("split", ["", "a,b", "0,0,0", "1,2,3,4", "1.2.3,4"])
def test_bad_split(split):
    with pytest.raises(UserError, match="969,30,1"): split_bounds(split, 10)


def test_no_overflow_beyond_32_bits():
    "Two documents of 2^31 - 1 tokens, three epochs: offsets that do not fit into Megatron's int32."
    lengths = np.full(2, 2**31 - 1, np.int32)
    docs, cuts, _ = gpt_index(lengths, (0, 2), 2**20, 3, None, 0)
    at = np.concatenate([[0], np.cumsum(lengths[docs], dtype=np.int64)])[cuts[:, 0]] + cuts[:, 1]
    assert np.array_equal(at, np.arange(len(cuts)) * 2**20) and cuts.min() >= 0 and at[-1] > 2**32


# The index on disk --------------------------------------------------------------------------------

def test_cache_is_used_and_never_stale(numbers, tmp_path):
    def make(seed=1, n=50): return GPTDataset(IndexedReader(numbers), 8, n, seed, cache=str(tmp_path / "cache"))
    a, b = make(), make()
    assert isinstance(b.sample_index, np.memmap) and not isinstance(a.sample_index, np.memmap)
    assert all(np.array_equal(getattr(a, k), getattr(b, k)) for k in ("document_index", "sample_index", "shuffle_index"))
    assert not isinstance(make(seed=2).sample_index, np.memmap)
    assert np.array_equal(a[3].ids, b[3].ids)
    time.sleep(.01)
    with IndexedWriter(numbers) as w: w.add_many(list(reversed(IndexedReader(numbers)[:])))
    assert not isinstance(make().sample_index, np.memmap), "the file changed"


def test_a_damaged_cache_is_made_anew(numbers, tmp_path):
    def make(): return GPTDataset(IndexedReader(numbers), 8, cache=str(tmp_path / "cache"))
    good = make()
    for f in (tmp_path / "cache").glob("*.npy"): os.truncate(f, 100)
    assert np.array_equal(make().sample_index, good.sample_index)
    assert isinstance(make().sample_index, np.memmap)


# Instructions -------------------------------------------------------------------------------------

def test_sft_samples(tmp_path):
    prefix = write_sft(tmp_path / "x", [(3, 2), (2, 5), (1, 1)])
    ds = SFTDataset(prefix, 100)
    by_length = {len(s.ids): s for s in (ds[i] for i in range(3))}
    assert by_length[5].ids.tolist() == [1, 2, 3, 4, 5] and by_length[5].labels.tolist() == [-100, -100, 4, 5, -100]
    assert by_length[2].labels.tolist() == [2, -100]
    cut = SFTDataset(prefix, 4)
    assert {tuple(cut[i].labels.tolist()) for i in range(3)} == {(-100, -100, 4, -100), (-100, 3, 4, -100), (2, -100)}


def test_sft_order_is_epoch_by_epoch(tmp_path):
    prefix = write_sft(tmp_path / "x", [(2, 3)] * 20)
    rng = np.random.RandomState(9)
    want = [rng.permutation(range(4, 15)) for _ in range(3)]
    assert np.array_equal(SFTDataset(prefix, 16, 25, 9, (4, 15)).index, np.concatenate(want))
    assert len(epoch_order((0, 10), [], None, 1)) == 10


def test_sft_samples_without_an_answer_are_left_out(tmp_path, capsys):
    prefix = write_sft(tmp_path / "x", [(3, 5), (9, 4), (7, 4), (8, 1)])
    ds = SFTDataset(prefix, 8, num_samples=8)
    assert set(ds.index.tolist()) == {0, 2} and len(ds) >= 8
    assert "3 of 4 samples are longer than seq_length=8" in (err := capsys.readouterr().err) and "2 have no answer" in err and "13 tokens" in err
    with pytest.raises(UserError, match="longest sample has 13"): SFTDataset(prefix, 3)


def test_sft_files_that_do_not_fit_together(tmp_path):
    prefix = write_sft(tmp_path / "x", [(3, 5), (2, 4)])
    with IndexedWriter(f"{prefix}_packed_labels_document") as w: w.add_many([[1] * 8])
    with pytest.raises(UserError, match="not of one run"): SFTDataset(prefix, 8)
    os.unlink(f"{prefix}_packed_labels_document.idx")
    with pytest.raises(UserError, match="copy both"): SFTDataset(prefix, 8)


def test_neat_packed_files_are_not_read_as_plain_ones(tmp_path):
    with write_together(*(f"{tmp_path}/x_packed_{f}_document" for f in FIELDS)) as (i, m, lab):
        i.add([5, 6, 7, 8]); m.add([1, 1, 2, 2]); lab.add([5, 6, 7, 8])
    with pytest.raises(UserError, match="without packing"): SFTDataset(f"{tmp_path}/x", 8)[0]


@pytest.mark.parametrize("multiple, fixed, width", [(1, None, 7), (8, None, 8), (16, None, 16), (8, 32, 32)])
def test_collate_sft(tmp_path, multiple, fixed, width):
    ds = SFTDataset(write_sft(tmp_path / "x", [(3, 2), (2, 5)]), 32)
    b = collate_sft(99, multiple, fixed)([ds[0], ds[1]])
    assert b.input_ids.shape == b.labels.shape == (2, width) and b.input_ids.dtype == b.labels.dtype == torch.int64
    assert b.num_targets == 7 == int((b.labels != -100).sum()) and b.position_ids is None and b.cu_seqlens is None
    for row, s in zip(range(2), (ds[0], ds[1]), strict=True):
        n = len(s.ids)
        assert b.input_ids[row, :n].tolist() == s.ids.tolist() and (b.input_ids[row, n:] == 99).all() and (b.labels[row, n:] == -100).all()
    assert b.to("cpu").num_targets == 7


def test_padding_does_not_change_what_is_learnt(tmp_path):
    "The loss of transformers' own model, padded with our collate, is the loss of the samples one by one."
    from transformers import LlamaConfig, LlamaForCausalLM
    torch.manual_seed(0)
    model = LlamaForCausalLM(LlamaConfig(vocab_size=64, hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=2)).eval()
    ds = SFTDataset(write_sft(tmp_path / "x", [(3, 2), (2, 9), (5, 6)]), 32)
    def loss(batch):
        with torch.no_grad(): logits = model(batch.input_ids).logits
        return torch.nn.functional.cross_entropy(logits.flatten(0, 1), batch.labels.flatten(), reduction="sum")
    pad = collate_sft(0, 8)
    together, apart = loss(pad([ds[0], ds[1], ds[2]])), sum(loss(pad([ds[i]])) for i in range(3))
    assert torch.allclose(together, apart, rtol=1e-5)
    # transformers shifts by itself: the labels in the file, unshifted, give the same mean
    ids, labels = torch.from_numpy(ds.ids[1].astype(np.int64))[None], torch.from_numpy(ds.labels[1].astype(np.int64))[None]
    one = pad([ds[ds.index.tolist().index(1)]])
    with torch.no_grad(): theirs = model(ids, labels=labels).loss
    assert torch.allclose(loss(one) / one.num_targets, theirs, rtol=1e-5)


# The loader ---------------------------------------------------------------------------------------

def same(a, b): return torch.equal(a.input_ids, b.input_ids) and torch.equal(a.labels, b.labels)


@pytest.mark.parametrize("stop", [0, 1, 7, 40])
def test_resume_is_bit_for_bit(web, stop):
    def make(): return Loader(GPTDataset(IndexedReader(web), 128, 100, 3), 3, collate_gpt)
    straight, first, second = make(), make(), make()
    for _ in range(stop): next(straight); next(first)
    state = json.loads(json.dumps(first.state_dict()))
    assert state["consumed"] == 3 * stop
    second.load_state_dict(state)
    for _ in range(20): assert same(next(straight), next(second))


@pytest.mark.parametrize("world", [1, 2, 4])
def test_processes_share_each_micro_batch(web, world):
    ds = GPTDataset(IndexedReader(web), 64, 100)
    one = Loader(ds, 4 * world, collate_gpt)
    many = [Loader(ds, 4, collate_gpt, rank=r, world=world) for r in range(world)]
    for _ in range(5):
        assert torch.equal(next(one).input_ids, torch.cat([next(m).input_ids for m in many]))
        assert {m.consumed for m in many} == {one.consumed}


def test_loader_starts_over_at_the_end(numbers):
    ds = GPTDataset(IndexedReader(numbers), 16)
    loader = Loader(ds, len(ds), collate_gpt)
    assert same(next(loader), next(loader))


def test_resume_on_other_data_is_said(numbers, capsys):
    def make(seed): return Loader(GPTDataset(IndexedReader(numbers), 8, seed=seed), 2, collate_gpt)
    state = make(1).state_dict()
    make(1).load_state_dict(state)
    assert not capsys.readouterr().err
    make(2).load_state_dict(state)
    assert "another order" in capsys.readouterr().err


def test_more_steps_in_the_same_epoch_do_not_change_the_order(web):
    "So that a run may be lengthened: 100 and 600 samples are both less than one epoch."
    a, b = (Loader(GPTDataset(IndexedReader(web), 1024, n), 2, collate_gpt) for n in (100, 600))
    assert a.state_dict() == b.state_dict() and same(next(a), next(b))


def test_batches_own_their_memory(web):
    b = next(Loader(GPTDataset(IndexedReader(web), 32), 2, collate_gpt))
    b.input_ids.add_(1); b.labels.zero_()
    assert b.input_ids.is_contiguous() and b.labels.is_contiguous()


# Blends -------------------------------------------------------------------------------------------

def test_blend_reads_each_source_in_its_own_order(numbers):
    parts = [GPTDataset(IndexedReader(numbers), 8, seed=s) for s in (1, 2)]
    blend = BlendedDataset(parts, [3, 1], 40)
    seen = [0, 0]
    for i in range(40):
        k, n = blend.source(i)
        assert n == seen[k] and np.array_equal(blend[i].ids, parts[k][n].ids)
        seen[k] += 1
    assert seen == [30, 10]


def test_blend_can_be_read_anywhere(numbers):
    parts = [GPTDataset(IndexedReader(numbers), 8, seed=s) for s in (1, 2, 3)]
    far, walked = (BlendedDataset(parts, [.5, .3, .2], 10**6) for _ in range(2))
    far.PIECE = walked.PIECE = 100
    assert far.source(1234) == [walked.source(i) for i in range(1235)][-1]
    assert len(far) == 10**6
    with pytest.raises(IndexError): far[10**6]


def test_blends_of_instructions(tmp_path):
    "ModelLink silently takes the first data path of several; here they are blended like any other."
    a, b = write_sft(tmp_path / "a", [(2, 3)] * 10), write_sft(tmp_path / "b", [(2, 7)] * 10)
    ds = build_datasets(DataConfig(["1", a, "1", b], split="1", seq_length=32), "sft", dict(train=40), 1, 100)["train"]
    assert sorted(len(ds[i].ids) for i in range(40)) == [5] * 20 + [9] * 20


@pytest.mark.parametrize("path", [[], ["a", "b"], ["0.3", "a", "0.7"], ["-1", "a", "2", "b"], ["0", "a", "0", "b"], ["a", "0.3", "b", "0.7"]])
def test_bad_blends(path):
    with pytest.raises(UserError, match="0.7 a 0.3 b"): parse_blend(path)


# What a user gets wrong ---------------------------------------------------------------------------

def build(path, stage="pretrain", vocab=None, **kw):
    return build_datasets(DataConfig([str(path)], **{"split": "1", "seq_length": 8, **kw}), stage, dict(train=4, valid=4, test=0), 1, vocab)


def test_splits_that_are_not_asked_for_or_empty_are_absent(numbers):
    assert list(build(numbers)) == ["train"]
    assert list(build(numbers, split="1,1,1")) == ["train", "valid"]
    assert list(build(numbers, split="0,1")) == ["valid"]


def test_vocabulary_mismatch(numbers, tmp_path):
    top = int(IndexedReader(numbers).tokens.max())
    assert build(numbers, vocab=top + 1)
    with pytest.raises(UserError, match=f"token id {top} .*tokenizer/vocab mismatch.*at least {top + 1}"): build(numbers, vocab=top)
    with IndexedWriter(tmp_path / "labels") as w: w.add([-100] * 9 + [5] * 9)
    with pytest.raises(UserError, match="token id -100"): build(tmp_path / "labels", vocab=100)


def test_an_id_that_the_sampling_misses_is_found_when_it_is_read(tmp_path):
    tokens = np.ones(2_000_000, np.uint16)
    tokens[7000] = 500
    with IndexedWriter(tmp_path / "x", np.uint16) as w: w.add(tokens)
    ds = build(tmp_path / "x", vocab=500, seq_length=100_000)["train"]
    with pytest.raises(UserError, match="token id 500"): [ds[i] for i in range(len(ds))]


def test_too_short(numbers):
    n = IndexedReader(numbers).num_tokens
    assert build(numbers, seq_length=n - 1)
    with pytest.raises(UserError, match=f"Found {n} tokens for train.*at least {n + 1}"): build(numbers, seq_length=n)
    with pytest.raises(UserError, match="tokens for valid.*another split"): build(numbers, split="999,1", seq_length=64)


def test_files_of_the_other_stage(numbers, tmp_path):
    chats = write_sft(tmp_path / "chats", [(2, 3)] * 4)
    assert build(chats, "sft")
    with pytest.raises(UserError, match="chats_packed_input_ids_document, which is for stage=sft"): build(chats)
    with pytest.raises(UserError, match="which is for stage=sft"): build(f"{chats}_packed_labels_document")
    with pytest.raises(UserError, match="Pass .*chats\\.$"): build(f"{chats}_packed_input_ids_document", "sft")
    with pytest.raises(UserError, match="numbers_text_document, which is for stage=pretrain"): build(tmp_path / "numbers", "sft")
    with pytest.raises(UserError, match="numbers_text_document, which is for stage=pretrain"): build(numbers, "sft")
    with pytest.raises(UserError, match="Did you mean .*numbers_text_document"): build(tmp_path / "numbers")
    with pytest.raises(UserError, match="Check the path"): build(tmp_path / "nothing", "sft")
    with pytest.raises(UserError, match="Did you mean sft"): build(numbers, "sfd")
