"""Several sources as one, and the data sets of a whole run: against Megatron-LM, and across real processes."""
import collections
import itertools
import json

import numpy as np
import pytest
from token_files import write_pairs, write_sft

from ascend_nb.blends import BlendedDataset, build_datasets, collate_for, parse_blend
from ascend_nb.config import DataConfig
from ascend_nb.core import UserError
from ascend_nb.datasets import GPTDataset, Loader
from ascend_nb.indexed import IndexedReader, IndexedWriter, write_together
from ascend_nb.instruct_sets import FIELDS, PackedDataset, PairDataset
from ascend_nb.sample_index import blend_step

pytest_plugins = ("fixtures_megatron", "fixtures_tokens")

@pytest.mark.parametrize("weights", [[.7, .3], [.5, .3, .2], [1 / 3] * 3, [.1] * 10, [1.0], [.999, .001], [.25, .25, .5]])
def test_the_blend_is_megatrons(helpers, weights):
    n = 20_000
    w = np.array(weights) / np.sum(weights)
    which, nth = np.zeros(n, np.int16), np.zeros(n, np.int64)
    helpers.build_blending_indices(which, nth, w, len(w), n, False)
    used, ours = [0] * len(w), []
    for start, k in ((0, 1), (1, 4999), (5000, 15_000)): ours.append(blend_step(w.tolist(), used, start, k))
    assert np.array_equal(which, np.concatenate([a for a, _ in ours])) and np.array_equal(nth, np.concatenate([b for _, b in ours]))


def test_a_blended_run_reads_what_megatron_reads(megatron, web, tmp_path):
    "Two sources: the same tokens, sample after sample, and in 0.6, whose margin this is, as many."
    r = IndexedReader(web)
    for name, part in (("a", r[:300]), ("b", r[300:])):
        with IndexedWriter(tmp_path / name, np.uint16) as w: w.add_many(part)
    a, b = str(tmp_path / "a"), str(tmp_path / "b")
    theirs, *_ = megatron([a, b], [.3, .7], "100,0,0", 256, (1000, 0, 0), 5, None)
    ours = build_datasets(DataConfig(data_path=[".3", a, ".7", b], split="100,0,0", seq_length=256), "pretrain", dict(train=1000), 5)["train"]
    assert len(theirs) <= len(ours) <= len(theirs) + 6
    for i in range(0, len(theirs), 7): assert np.array_equal(ours[i].ids, theirs[i]["tokens"])


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
    assert len(far) == 10**6 and len(far._kept) <= 4 >= len(walked._kept)
    with pytest.raises(IndexError): far[10**6]


def test_a_far_place_is_found_without_the_way_there(numbers, monkeypatch):
    "A blend that was resumed works out one piece, however far it is."
    import ascend_nb.blends as module
    parts = [GPTDataset(IndexedReader(numbers), 8, seed=s) for s in (1, 2, 3)]
    first, second = (Loader(BlendedDataset(parts, [.5, .3, .2], 10**6), 4, list, consumed=c) for c in (300_000, 0))
    state = json.loads(json.dumps(first.state_dict()))
    steps = []
    monkeypatch.setattr(module, "blend_step", lambda *a: (steps.append(a), blend_step(*a))[1])
    second.load_state_dict(state)
    for _ in range(3): assert all(np.array_equal(a.ids, b.ids) for a, b in zip(next(first), next(second), strict=True))
    assert [a[2] for a in steps] == [300_000 // BlendedDataset.PIECE * BlendedDataset.PIECE]
    assert second.dataset.source(5) == first.dataset.source(5), "and backwards it still knows the beginning"


def test_blends_of_instructions(tmp_path):
    "ModelLink silently takes the first data path of several; here they are blended like any other."
    a, b = write_sft(tmp_path / "a", [(2, 3)] * 10), write_sft(tmp_path / "b", [(2, 7)] * 10)
    ds = build_datasets(DataConfig(data_path=["1", a, "1", b], split="1", seq_length=32), "sft", dict(train=40), 1, 100)["train"]
    assert sorted(len(ds[i].ids) for i in range(40)) == [5] * 20 + [9] * 20


@pytest.mark.parametrize("path", [[], ["a", "b"], ["0.3", "a", "0.7"], ["-1", "a", "2", "b"], ["0", "a", "0", "b"], ["a", "0.3", "b", "0.7"]])
def test_bad_blends(path):
    with pytest.raises(UserError, match="0.7 a 0.3 b"): parse_blend(path)


# A path for each part -----------------------------------------------------------------------------

def halves(web, tmp_path):
    r = IndexedReader(web)
    for name, part in (("a", r[:300]), ("b", r[300:])):
        with IndexedWriter(tmp_path / name, np.uint16) as w: w.add_many(part)
    return str(tmp_path / "a"), str(tmp_path / "b")


def test_a_path_for_each_part_is_megatrons(megatron, web, tmp_path):
    "Training from a blend, validation from one file, no test."
    a, b = halves(web, tmp_path)
    theirs = megatron(None, None, None, 256, (1000, 90, 0), 5, None, [([a, b], [.3, .7]), ([b], None), None])
    data = DataConfig(train_data_path=[".3", a, ".7", b], valid_data_path=[b], split="1,1,1", seq_length=256)
    ours = build_datasets(data, "pretrain", dict(train=1000, valid=90, test=10), 5)
    assert list(ours) == ["train", "valid"] and theirs[2] is None
    for name, t in zip(ours, theirs, strict=False):
        n = min(len(ours[name]), len(t))
        assert n >= (1000 if name == "train" else 90)
        for i in range(0, n, 7): assert np.array_equal(ours[name][i].ids, t[i]["tokens"])


def test_every_kind_of_file_can_have_paths_of_its_own(tmp_path):
    a, b = write_sft(tmp_path / "a", [(2, 3)] * 10), write_sft(tmp_path / "b", [(2, 7)] * 10)
    ds = build_datasets(DataConfig(train_data_path=[a], valid_data_path=[b], seq_length=32), "sft", dict(train=4, valid=4), 1, 100)
    assert {len(ds["train"][i].ids) for i in range(4)} == {5} and {len(ds["valid"][i].ids) for i in range(4)} == {9}


# Every stage --------------------------------------------------------------------------------------

def test_blends_of_pairs_and_of_bins(tmp_path):
    p, q = write_pairs(tmp_path / "p", [(3, 4, 2)] * 9), write_pairs(tmp_path / "q", [(3, 1, 1)] * 9)
    data = DataConfig(data_path=["2", p, "1", q], split="1", seq_length=32)
    ds = build_datasets(data, "pair", dict(train=30), 1, 200)["train"]
    assert sorted(len(ds[i][0].ids) for i in range(30)) == [4] * 10 + [7] * 20
    batch = next(Loader(ds, 3, collate_for(data, "pair", 0)))
    assert len(batch.input_ids) == 6 and batch.cu_seqlens is None
    a, b = write_sft(tmp_path / "a", [(2, 3)] * 12), write_sft(tmp_path / "b", [(2, 7)] * 12)
    data = DataConfig(data_path=["1", a, "1", b], split="1", seq_length=20, packing=True)
    ds = build_datasets(data, "sft", dict(train=12), 1, 100)["train"]
    assert all(isinstance(d, PackedDataset) for d in ds.datasets) and sorted(len(ds[i].ends) for i in range(12)) == [2] * 6 + [4] * 6
    batch = next(Loader(ds, 3, collate_for(data, "sft", 0)))
    assert batch.position_ids is not None and batch.cu_seqlens[-1] == batch.input_ids.numel()


@pytest.mark.parametrize("kind", ["gpt", "blend", "sft", "packed", "pair"])
def test_resume_of_every_kind_at_another_size(kind, numbers, tmp_path):
    "A checkpoint of two processes, read by one and by four in freshly built data sets: the samples go on where they stopped."
    p = write_sft(tmp_path / "a", [(2, 1 + k % 9) for k in range(40)])
    path = dict(gpt=[numbers], blend=["1", numbers, "2", numbers], sft=[p], packed=[p], pair=[write_pairs(tmp_path / "p", [(3, 1 + k % 7, 2) for k in range(40)])])[kind]
    stage = {"gpt": "pretrain", "blend": "pretrain", "packed": "sft"}.get(kind, kind)
    data = DataConfig(data_path=path, split="1", seq_length=16, packing=kind == "packed", variable_seq_lengths=False)
    def team(world, state=None):
        loaders = [Loader(build_datasets(data, stage, dict(train=200), 7)["train"], 2, collate_for(data, stage, 0), rank=r, world=world) for r in range(world)]
        for loader in loaders if state else (): loader.load_state_dict(state)
        return loaders
    def rows(loaders, n):
        k = 2 if stage == "pair" else 1
        batches = [next(loader) for _ in range(n) for loader in loaders]
        return [b.input_ids.view(k, -1, 16)[:, i].tolist() for b in batches for i in range(2)]
    straight = rows(team(1), 24)
    first = team(2)
    begun = rows(first, 4)
    assert begun == straight[:16]
    for world in (1, 2, 4): assert rows(team(world, first[1].state_dict()), 8 // world) == straight[16:32], world


@pytest.mark.parametrize("kind", ["gpt", "sft", "packed", "pair"])
def test_a_run_whose_size_changes_reads_each_sample_once_an_epoch(kind, tmp_path):
    "1, 4, 2, 3 and 1 processes in turn, each from the state of the one before as JSON: after three epochs every answer was learnt three times, every cut of a stream once."
    N, S = 24, 16 # samples of the file; every sample has tokens of its own
    begins = [10 + 20 * k for k in range(N)]
    if kind == "gpt":
        with IndexedWriter(tmp_path / "x") as w: w.add_many([np.arange(N * S + 1)])
        prefix = str(tmp_path / "x")
    else:
        names = {"pair": PairDataset.FIELDS}.get(kind, FIELDS)
        with write_together(*(f"{tmp_path}/x_packed_{f}_document" for f in names)) as ws:
            for w, f in zip(ws, names, strict=True):
                rows = [np.arange(b, b + 4 + b % 7) + 1000 * f.startswith("rejected") for b in begins]
                w.add_many([np.ones(len(r), int) if "mask" in f else np.where(np.arange(len(r)) < 2, -100, r) if "labels" in f else r for r in rows])
        prefix, ids = f"{tmp_path}/x", {b + t for b in begins for t in range(2, 4 + b % 7)}
        if kind == "pair": ids |= {i + 1000 for i in ids}
    stage = {"gpt": "pretrain", "packed": "sft"}.get(kind, kind)
    data = DataConfig(data_path=[prefix], split="1", seq_length=S, packing=kind == "packed", variable_seq_lengths=False)
    per_epoch = len(build_datasets(data, stage, dict(train=1), 7)["train"])
    read, state, sizes, left = collections.Counter(), None, itertools.cycle((1, 4, 2, 3, 1)), 3 * per_epoch
    while left:
        size = next(s for s in sizes if s <= left)
        team = [Loader(build_datasets(data, stage, dict(train=3 * per_epoch), 7)["train"], 1, collate_for(data, stage, 0), rank=r, world=size) for r in range(size)]
        for loader in team:
            if state: loader.load_state_dict(json.loads(json.dumps(state)))
            read.update(next(loader).labels.flatten().tolist())
        state, left = team[0].state_dict(), left - size
    del read[-100]
    stream = build_datasets(data, stage, dict(train=3 * per_epoch), 7)["train"]
    if kind == "gpt": want = collections.Counter(int(t) for i in range(len(stream)) for t in stream.tokens(i)[1:])
    else: want = dict.fromkeys(ids, 3)
    assert len(stream) == 3 * per_epoch > 9 and read == want


# What a user gets wrong ---------------------------------------------------------------------------

def build(path, stage="pretrain", vocab=None, **kw):
    return build_datasets(DataConfig(data_path=[str(path)], **{"split": "1", "seq_length": 8, **kw}), stage, dict(train=4, valid=4, test=0), 1, vocab)


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


def test_marks_need_a_token_that_ends_documents(numbers, tmp_path):
    with IndexedWriter(tmp_path / "ended") as w: w.add_many([np.append(np.arange(2, 9), 1) for _ in range(30)])
    def make(path, eod, **kw): return build_datasets(DataConfig(data_path=[str(path)], split="1", seq_length=8, **kw), "pretrain", dict(train=4), 1, eod=eod)["train"]
    assert make(tmp_path / "ended", 1).marks is None and make(tmp_path / "ended", 1)[0].ends is None
    assert len(make(tmp_path / "ended", 1, reset_attention_mask=True)[0].ends) in (1, 2)
    with pytest.raises(UserError, match="reset_attention_mask without a tokenizer"): make(tmp_path / "ended", None, reset_attention_mask=True)
    with pytest.raises(UserError, match="--append-eod"): make(numbers, 5901, eod_mask_loss=True)


def test_pairs_where_chats_are_wanted(tmp_path):
    p, c = write_pairs(tmp_path / "p", [(3, 4, 2)] * 4), write_sft(tmp_path / "c", [(2, 3)] * 4)
    with pytest.raises(UserError, match="which is for stage=dpo.simpo.orpo.rm; you asked for stage=sft"): build(p, "sft")
    with pytest.raises(UserError, match="which is for stage=sft; you asked for stage=pair"): build(c, "pair")
    with pytest.raises(UserError, match="which is for stage=dpo.simpo.orpo.rm; you asked for stage=pretrain"): build(f"{p}_packed_rejected_labels_document")
    with pytest.raises(UserError, match="stage=pair expects the bare prefix"): build(f"{p}_packed_chosen_input_ids_document", "pair")
    with pytest.raises(UserError, match="packing with stage=pair"): build(p, "pair", packing=True)
    with pytest.raises(UserError, match="Leave one of them out"): build(c, "sft", valid_data_path=[c])
