"""Bins against a naive best fit and against ModelLink's greedy knapsack, on real and random lengths; the numbers of a report against numpy."""
import json
import time

import numpy as np
import pytest

from ascend_nb.core import UserError
from ascend_nb.packing import bin_members, length_report, pack_bins, plot_lengths


def random_lengths(seed, n, capacity):
    rng = np.random.default_rng(seed)
    kind = seed % 4
    if kind == 0: return rng.integers(1, capacity + 1, n)
    if kind == 1: return np.clip(rng.lognormal(np.log(capacity / 8), 1, n).astype(int), 1, capacity)
    if kind == 2: return rng.choice([1, capacity // 3, capacity // 2, capacity], n)
    return rng.integers(0, max(capacity // 5, 2), n)


def naive_best_fit(lengths, capacity):
    "One sample at a time, looking at every bin."
    rooms = []
    for n in sorted(lengths, reverse=True):
        fits = [(r, i) for i, r in enumerate(rooms) if r >= n]
        if fits: rooms[min(fits)[1]] -= n
        else: rooms.append(capacity - n)
    return len(rooms)


def knapsack(lengths, capacity):
    "ModelLink's way: fill one bin with the largest that fits until nothing fits, then the next."
    left, bins = sorted(lengths), 0
    while left:
        room = capacity
        while (fits := [i for i, n in enumerate(left) if n <= room]): room -= left.pop(fits[-1])
        bins += 1
    return bins


@pytest.mark.parametrize("seed", range(40))
def test_bins_are_whole_full_and_no_more_than_the_others_make(seed):
    capacity = [7, 64, 1000][seed % 3]
    lengths = random_lengths(seed, 250, capacity)
    bins = pack_bins(lengths, capacity)
    assert np.bincount(bins, lengths).max() <= capacity and len(bins) == len(lengths)
    assert bins.max() + 1 <= naive_best_fit(lengths, capacity) and bins.max() + 1 <= knapsack(lengths.tolist(), capacity)
    firsts = [m[0] for m in bin_members(bins)]
    assert firsts == sorted(firsts) and np.array_equal(np.sort(np.concatenate(bin_members(bins))), np.arange(len(lengths)))
    assert all((bins[m] == b).all() and (np.diff(m) > 0).all() for b, m in enumerate(bin_members(bins)))
    assert np.array_equal(pack_bins(lengths.tolist(), capacity), bins)


def test_real_chats_fill_rows_better_than_modellink(shared_data):
    "Lengths of real answers in characters; ModelLink's rows hold one token less than seq_length."
    rows = json.loads((shared_data / "instruct" / "alpaca_en_demo.json").read_text(encoding="utf-8"))
    lengths = [n for r in rows if 0 < (n := len(r["instruction"] + r["input"] + r["output"]) // 4) < 512]
    ours, theirs = pack_bins(lengths, 512).max() + 1, knapsack(lengths, 511)
    assert ours <= theirs and sum(lengths) / (ours * 512) > .99


def test_a_million_samples_in_seconds():
    lengths = random_lengths(1, 10**6, 4096)
    began = time.perf_counter()
    bins = pack_bins(lengths, 4096)
    assert time.perf_counter() - began < 20 # takes under one; the limit only tells n log n from n²
    assert np.bincount(bins, lengths).max() <= 4096 and (bins.max() + 1) * 4096 < lengths.sum() * 1.01


def test_edges():
    assert pack_bins([], 5).tolist() == [] and bin_members(pack_bins([], 5)) == []
    assert pack_bins([5, 5], 5).tolist() == [0, 1] and pack_bins([0, 5, 0], 5).tolist() in ([0, 0, 0], [0, 1, 0])
    with pytest.raises(UserError, match="sample of 6 tokens"): pack_bins([1, 6], 5)


def test_report_numbers():
    lengths = random_lengths(1, 5000, 2048)
    r = length_report(lengths, 1024)
    assert json.loads(json.dumps(r)) == r and sum(r["histogram"]["counts"]) == 5000
    assert (r["tokens"], r["min"], r["max"], r["median"]) == (lengths.sum(), lengths.min(), lengths.max(), np.median(lengths))
    assert r["too_long"] == (lengths >= 1024).sum() and r["packed_rows"] == pack_bins(lengths[lengths < 1024], 1024).max() + 1
    assert length_report([]) == dict(sequences=0, tokens=0) and length_report([3, 3])["histogram"]["counts"] == [2]
    assert length_report([0, 9], 4)["packed_rows"] == 1


def test_the_picture_is_drawn(tmp_path):
    plot_lengths(length_report(random_lengths(1, 500, 64), 32), "lengths").savefig(tmp_path / "x.png")
    assert (tmp_path / "x.png").read_bytes()[:4] == b"\x89PNG"
