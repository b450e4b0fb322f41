"""Samples, their order and the loader: against Megatron-LM itself, against slow loops, and on real files."""
import hashlib
import itertools
import json
import os
import shutil
import struct
import subprocess
import sys

import numpy as np
import pytest
import torch
from worlds import JOIN, free_port, world

from ascend_nb.blends import build_datasets
from ascend_nb.config import DataConfig, ModelConfig
from ascend_nb.core import UserError
from ascend_nb.datasets import Batch, GPTDataset, Loader, Marks, collate_gpt
from ascend_nb.indexed import IndexedReader, IndexedWriter
from ascend_nb.losses import causal_lm_loss
from ascend_nb.model import Decoder
from ascend_nb.sample_index import SPLITS, content_key, gpt_index, plan_epochs, split_bounds

pytest_plugins = ("fixtures_megatron", "fixtures_tokens")

# Megatron-LM itself -------------------------------------------------------------------------------

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
    return build_datasets(DataConfig(data_path=[web], split=split, seq_length=seq_length), "pretrain", dict(zip(SPLITS, sizes, strict=True)), seed, 50_257)


@pytest.mark.parametrize("seq_length, sizes, seed, split, digests", CASES)
def test_the_three_arrays_are_those_that_megatron_made(web, seq_length, sizes, seed, split, digests):
    "Recorded from megatron-core 0.6.0; the next test runs it."
    ours = ours_for(web, seq_length, sizes, seed, split)
    assert " ".join(digest(d) for d in ours.values()) == digests


@pytest.mark.parametrize("seq_length, sizes, seed, split, digests", CASES)
def test_the_three_arrays_and_the_samples_are_megatrons(megatron, web, tmp_path, seq_length, sizes, seed, split, digests):
    theirs = dict(zip(SPLITS, megatron([web], None, split, seq_length, sizes, seed, tmp_path), strict=True))
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

def keys(folder): return {f.name[:32] for f in folder.glob("*-description.txt")}


def test_cache_is_used_and_never_stale(numbers, tmp_path):
    cache = tmp_path / "cache"
    def make(seed=1, n=50): return GPTDataset(IndexedReader(numbers), 8, n, seed, cache=str(cache))
    a = make()
    written = {f: f.stat().st_mtime_ns for f in cache.iterdir()}
    b = make()
    assert isinstance(b.sample_index, np.memmap) and written == {f: f.stat().st_mtime_ns for f in cache.iterdir()}
    plain = GPTDataset(IndexedReader(numbers), 8, 50, 1)
    for k in ARRAYS: assert np.array_equal(getattr(a, k), getattr(plain, k)) and np.array_equal(getattr(b, k), getattr(plain, k))
    make(seed=2)
    assert len(keys(cache)) == 2
    times = os.stat(f"{numbers}.idx"), os.stat(f"{numbers}.bin")
    sequences = list(IndexedReader(numbers)[:])
    with IndexedWriter(numbers) as w: w.add_many(sequences[::-1])
    for ext, t in zip((".idx", ".bin"), times, strict=True): os.utime(numbers + ext, ns=(t.st_atime_ns, t.st_mtime_ns))
    assert os.stat(f"{numbers}.idx").st_size == times[0].st_size and os.stat(f"{numbers}.idx").st_mtime_ns == times[0].st_mtime_ns
    c = make()
    assert len(keys(cache)) == 3, "another order of the same sequences, under the same name, size and time"
    fresh = GPTDataset(IndexedReader(numbers), 8, 50, 1)
    assert all(np.array_equal(c[i].ids, fresh[i].ids) for i in range(len(fresh)))


def test_a_file_that_was_moved_keeps_its_index(numbers, tmp_path):
    GPTDataset(IndexedReader(numbers), 8, cache=str(tmp_path / "cache"))
    for ext in (".bin", ".idx"): shutil.copy(numbers + ext, tmp_path / f"moved{ext}")
    GPTDataset(IndexedReader(tmp_path / "moved"), 8, cache=str(tmp_path / "cache"))
    assert len(keys(tmp_path / "cache")) == 1 and content_key(numbers) == content_key(tmp_path / "moved")


def test_a_cache_folder_that_may_only_be_read(numbers, tmp_path):
    "A finished cache is used where nothing can be written; where something must be written, the sentence says so."
    cache = tmp_path / "cache"
    good = GPTDataset(IndexedReader(numbers), 8, cache=str(cache))
    (cache / ".lock").unlink(); (cache / ".lock").mkdir() # root may write anywhere, but not into this
    assert np.array_equal(GPTDataset(IndexedReader(numbers), 8, cache=str(cache)).sample_index, good.sample_index)
    with pytest.raises(UserError, match="Choose another data_cache_path"): GPTDataset(IndexedReader(numbers), 8, seed=9, cache=str(cache))


def test_a_damaged_cache_is_made_anew(numbers, tmp_path):
    def make(): return GPTDataset(IndexedReader(numbers), 8, cache=str(tmp_path / "cache"))
    good = np.array(make().sample_index)
    for damage in (100, 0, -8):
        for f in (tmp_path / "cache").glob("*.npy"): os.truncate(f, damage if damage >= 0 else f.stat().st_size + damage)
        assert np.array_equal(make().sample_index, good)
    for f in (tmp_path / "cache").glob("*sample_index.npy"): np.save(f, good[:-1])
    assert np.array_equal(make().sample_index, good), "another shape than the description says"
    assert isinstance(make().sample_index, np.memmap)


# Where one text ends ------------------------------------------------------------------------------

FLAGS = [tuple(map(bool, f)) for f in itertools.product((0, 1), repeat=3)]


@pytest.mark.parametrize("flags", FLAGS)
def test_positions_masks_and_losses_are_megatrons(gpt, web, flags):
    "Megatron's own function on real samples and on made ones, with the token first, last and twice in a row."
    real = GPTDataset(IndexedReader(web), 1024)
    rows = [real.tokens(i) for i in range(12)] + [np.array(r) for r in ([0, 5, 0, 0, 3, 4, 0], [5, 5, 5, 5], [0, 0, 0, 0], [1, 2, 3, 0, 9])]
    for row, eod in [(r, 4999 if len(r) > 99 else 0) for r in rows]:
        sample = Marks(eod, *flags).sample(row)
        mask, loss, pos = gpt._get_ltor_masks_and_position_ids(torch.from_numpy(row[:-1]), eod, *flags, True)
        n = len(row) - 1
        which = np.searchsorted(sample.ends, np.arange(n), side="right") if sample.ends is not None else np.zeros(n)
        assert np.array_equal((which[:, None] == which) & np.tri(n, dtype=bool), ~mask[0].numpy())
        assert np.array_equal(np.arange(n) if sample.position_ids is None else sample.position_ids, pos)
        assert np.array_equal(sample.labels != -100, loss.numpy() == 1) and np.array_equal(sample.labels[sample.labels != -100], row[1:][loss.numpy() == 1])
    if flags[1]: assert any(len(Marks(4999, *flags).sample(r).ends) > 1 for r in rows[:12]), "a real sample crosses documents"


def decoder(vocab=64, **kw):
    return Decoder(ModelConfig(vocab_size=vocab, hidden_size=32, num_hidden_layers=1, num_attention_heads=4, num_key_value_heads=2,
                               initializer_range=.2, **kw)).init_weights(1).eval()


@pytest.mark.parametrize("positions", [True, False])
def test_reset_attention_mask_gives_each_document_its_own_loss(positions):
    "Rows of several documents in one batch, against every document alone."
    rng = np.random.default_rng(0)
    rows = [np.where(rng.random(65) < .1, 0, rng.integers(1, 64, 65)) for _ in range(3)]
    model = decoder()
    batch = collate_gpt([Marks(0, positions, True).sample(r) for r in rows])
    with torch.no_grad():
        together, n = causal_lm_loss(model, batch)
        apart, m = 0., 0
        for r in rows:
            cuts = [0, *(np.flatnonzero(r[:-1] == 0) + 1).tolist(), 64]
            for a, b in zip(cuts, cuts[1:], strict=False):
                if a < b:
                    one, k = causal_lm_loss(model, Batch(torch.from_numpy(r[None, a:b]), torch.from_numpy(r[None, a + 1:b + 1])))
                    apart, m = apart + one, m + k
        crossing, _ = causal_lm_loss(model, collate_gpt([Marks(0).sample(r) for r in rows]))
    assert n == m == 192 and len(batch.cu_seqlens) > 10
    torch.testing.assert_close(together, apart, rtol=1e-5, atol=0)
    assert abs(crossing - apart) > 1e-3 * abs(apart), "without it the loss is another"


# Far out ------------------------------------------------------------------------------------------

def test_samples_beyond_two_billion_tokens(tmp_path):
    "A real file of more than 2^31 tokens, sparse on the disk: samples before, across and behind the border are read from the right place."
    n, per, S = 3, 2**30 - 7, 1000
    head = struct.pack("<9sQBQQ", b"MMIDIDX\0\0", 1, 8, n, n + 1)
    (tmp_path / "big.idx").write_bytes(head + np.full(n, per, "<i4").tobytes() + (np.arange(n) * per * 2).astype("<i8").tobytes() + np.arange(n + 1).astype("<i8").tobytes())
    with open(tmp_path / "big.bin", "wb") as f:
        f.truncate(n * per * 2)
        for at in (0, 2**31 - 500, 2**31 + 500, n * per - 4000):
            f.seek(at * 2); f.write(np.arange(1, 2001, dtype=np.uint16).tobytes())
    r = IndexedReader(tmp_path / "big")
    assert r.num_tokens > 2**31
    ds = GPTDataset(r, S)
    assert np.array_equal(np.sort(ds.shuffle_index), np.arange((n * per - 1) // S))
    ends = np.cumsum(r.lengths[ds.document_index], dtype=np.int64)
    for i in (0, (2**31) // S - 1, 2**31 // S, 2**31 // S + 1, len(ds) - 4, len(ds) - 1):
        place = np.arange(i * S, i * S + S + 1)
        d = np.searchsorted(ends, place, side="right")
        at = ds.document_index[d] * per + place - (ends[d] - per)
        assert np.array_equal(ds.tokens(i), r.tokens[at]), i


def test_a_run_of_more_than_two_billion_samples():
    "The loader's position is a plain number."
    data = Numbers(range(1000))
    loader = Loader(data, 3, list, consumed=2**31 - 4, rank=1, world=2)
    assert next(loader) == [(2**31 - 1 + k) % 1000 for k in range(3)] and loader.state_dict()["consumed"] == 2**31 + 2


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


class Numbers(list):
    "Samples that are their own numbers."
    order = "0, 1, 2, …"


@pytest.mark.parametrize("path", list(itertools.permutations((1, 2, 4))) + [(4, 1, 4), (2, 4, 2)])
def test_resume_at_another_data_parallel_size(path):
    "A step is 8 samples whatever the number of processes: nothing is lost, nothing read twice, and each step reads the same samples."
    data, state, steps = Numbers(range(1000)), None, []
    for size in path:
        team = [Loader(data, 2, list, rank=r, world=size) for r in range(size)]
        for loader in team:
            if state: loader.load_state_dict(json.loads(json.dumps(state)))
        for _ in range(3): steps.append(sorted(i for _ in range(8 // (2 * size)) for loader in team for i in next(loader)))
        assert all(loader.state_dict() == team[0].state_dict() for loader in team)
        state = team[0].state_dict()
    assert steps == [list(range(8 * k, 8 * k + 8)) for k in range(9)]


# Many processes -----------------------------------------------------------------------------------

def test_processes_that_do_not_know_each_other_build_once(tmp_path):
    "No torch.distributed: three processes at the same moment, and a lock."
    code = f"""
import time
from pathlib import Path
from ascend_nb.sample_index import once
note = Path({str(tmp_path / "cache" / "note")!r})
def find(): return note.read_text() if note.exists() else None
def build():
    time.sleep(.5)
    with open({str(tmp_path / "built")!r}, "a") as f: f.write("built ")
    note.write_text("made")
print(once(note.parent, find, build))
"""
    assert [o[:2] for o in world(code, 3)] == [(0, "made\n")] * 3
    assert (tmp_path / "built").read_text() == "built "


RUN = JOIN + """
import hashlib, os, sys
import numpy as np
import ascend_nb.datasets as d
from ascend_nb.core import UserError
from ascend_nb.indexed import IndexedReader
real = d.gpt_index
def counted(*a):
    with open(os.environ["BUILT"], "a") as f: f.write(os.environ["RANK"])
    return real(*a)
d.gpt_index = counted
try: ds = d.GPTDataset(IndexedReader(os.environ["DATA"]), 64, 5000, cache=os.environ["CACHE"], shared=os.environ["SHARED"] == "1")
except UserError as e: print(e.key); print(e, file=sys.stderr); sys.exit(2)
print(hashlib.md5(b"".join(np.ascontiguousarray(getattr(ds, a)).tobytes() for a in ("document_index", "sample_index", "shuffle_index"))).hexdigest()[:8],
      type(ds.sample_index).__name__)
dist.destroy_process_group()
"""


def hosts(tmp_path, web, n, caches, shared=1, local_ranks=None):
    "Processes whose cache folders are given one by one."
    return world(RUN, n, local_ranks, lambda rank: dict(DATA=web, CACHE=str(tmp_path / caches[rank]), BUILT=str(tmp_path / "built"), SHARED=str(shared)))


def test_two_processes_build_once(web, tmp_path):
    out = hosts(tmp_path, web, 2, ["c", "c"])
    assert [o[:2] for o in out] == [(0, f"{digest(GPTDataset(IndexedReader(web), 64, 5000))} memmap\n")] * 2, out
    assert (tmp_path / "built").read_text() == "0"


@pytest.mark.slow
def test_hosts_with_disks_of_their_own(web, tmp_path):
    "Two hosts of two processes. Sharing is assumed: an error in all that names the flag. With the flag: the first of each host builds."
    caches, ranks = ["a", "a", "b", "b"], [0, 1, 0, 1]
    out = hosts(tmp_path, web, 4, caches, 1, ranks)
    assert [o[:2] for o in out] == [(2, "cache_unseen\n")] * 4, out
    assert all("--no-shared-storage" in o[2] for o in out) and (tmp_path / "built").read_text() == "0"
    (tmp_path / "built").unlink(); shutil.rmtree(tmp_path / "a")
    out = hosts(tmp_path, web, 4, caches, 0, ranks)
    assert [o[:2] for o in out] == [(0, f"{digest(GPTDataset(IndexedReader(web), 64, 5000))} memmap\n")] * 4, out
    assert sorted((tmp_path / "built").read_text()) == ["0", "2"]


@pytest.mark.slow
def test_when_the_builder_fails_nobody_waits(web, tmp_path):
    (tmp_path / "c").write_text("a file where the folder should be")
    out = hosts(tmp_path, web, 3, ["c"] * 3)
    assert [o[:2] for o in out] == [(2, "cache_write\n"), (2, "cache_failed\n"), (2, "cache_failed\n")], out


@pytest.mark.slow
def test_under_torchrun(web, tmp_path):
    (tmp_path / "job.py").write_text(RUN)
    env = {**os.environ, "DATA": web, "CACHE": str(tmp_path / "c"), "BUILT": str(tmp_path / "built"), "SHARED": "1", "OMP_NUM_THREADS": "1"}
    out = subprocess.run([sys.executable, "-m", "torch.distributed.run", "--nproc-per-node=4", "--master-port", str(free_port()), str(tmp_path / "job.py")],
                         env=env, capture_output=True, text=True, timeout=200)
    assert out.returncode == 0 and out.stdout.count(f"{digest(GPTDataset(IndexedReader(web), 64, 5000))} memmap") == 4, out
    assert (tmp_path / "built").read_text() == "0"
