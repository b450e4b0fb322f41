"""Locks, marks and parts as real processes that are killed, against a writer that nobody disturbs."""
import json
import os
import random
import signal
import subprocess
import sys
import time

import numpy as np
import pytest

from ascend_nb.core import UserError
from ascend_nb.indexed import IndexedReader, IndexedWriter, write_together
from ascend_nb.packing import bin_members, pack_bins
from ascend_nb.parts import ITEM, Part, Seen, forget_marks, merge_parts, pack_rows, work_folder

PIECES = '''
import sys, time, numpy as np
from ascend_nb.parts import Part
def piece(i):
    rng = np.random.default_rng(i)
    lengths = rng.integers(0, 50, rng.integers(0, 40)).astype(np.int32)
    return rng.integers(0, 9999, lengths.sum()).astype(np.int32), lengths, None
'''


def script(code, *args): return [sys.executable, "-c", PIECES + code, *map(str, args)]


def both(prefix): return [open(f"{prefix}{e}", "rb").read() for e in (".bin", ".idx")]


# The lock ------------------------------------------------------------------------------------------

HOLD = '''
from ascend_nb.parts import work_folder
with work_folder(sys.argv[1], {}): print("in", flush=True); time.sleep(60)
'''


def test_the_lock_is_held_by_a_living_process_only(tmp_path):
    p = subprocess.Popen(script(HOLD, tmp_path / "x"), stdout=subprocess.PIPE, text=True)
    assert p.stdout.readline() == "in\n"
    with pytest.raises(UserError, match=f"process {p.pid} on .* writes .*x"), work_folder(tmp_path / "x", {}): pass
    with work_folder(tmp_path / "y", {}): pass
    p.send_signal(signal.SIGKILL); p.wait()
    with work_folder(tmp_path / "x", {}) as (folder, _): assert sorted(os.listdir(folder)) == ["lock", "plan.json"]
    assert os.listdir(tmp_path) == []


def test_a_race_of_four_has_one_winner_at_a_time(tmp_path):
    "Processes that take and leave the lock as fast as they can: never two inside."
    code = '''
import os
from ascend_nb.core import UserError
from ascend_nb.parts import work_folder
n, until = 0, time.time() + 1.5
while time.time() < until:
    try:
        with work_folder(sys.argv[1], {}) as (folder, _):
            os.mkdir(sys.argv[1] + ".inside"); n += 1; os.rmdir(sys.argv[1] + ".inside") # FileExistsError where another is inside
    except UserError as e: assert e.key == "taken", e
print(n)
'''
    ps = [subprocess.Popen(script(code, tmp_path / "x"), stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) for _ in range(4)]
    done = [p.communicate(timeout=60) for p in ps]
    assert all(p.returncode == 0 for p in ps), [e for _, e in done]
    assert sum(int(n) for n, _ in done) > 4


def test_work_is_kept_for_the_same_plan_only(tmp_path, capsys):
    def begin(plan, mark, **kw):
        with pytest.raises(ZeroDivisionError), work_folder(tmp_path / "x", plan, **kw) as (folder, _):
            had = sorted(p.name for p in folder.iterdir())
            if mark: (folder / "000").mkdir(exist_ok=True); (folder / "000/state.json").write_text("{}")
            1 / 0
        return had, (tmp_path / ".x.work").exists()
    assert begin(dict(a=(1, 2)), False) == (["lock", "plan.json"], False)
    assert begin(dict(a=(1, 2)), True) == (["lock", "plan.json"], True)
    assert begin(dict(a=[1, 2]), False) == (["000", "lock", "plan.json"], True)
    assert "Going on" in capsys.readouterr().err
    assert begin(dict(a=3), True, also=[dict(a=[1, 2])]) == (["000", "lock", "plan.json"], True)
    assert begin(dict(a=3), True, resume=False) == (["lock", "plan.json"], True)
    assert begin(dict(a=4), False) == (["lock", "plan.json"], False)
    assert "starting anew" in capsys.readouterr().err
    with work_folder(tmp_path / "x", {}) as (folder, _):
        (folder / "000").mkdir(); (folder / "000/state.json").write_text("{}"); forget_marks(folder)
    assert os.listdir(tmp_path) == []


# Marks ---------------------------------------------------------------------------------------------

WRITE = '''
Part.every_s = 0
with Part(sys.argv[1], [sys.argv[2]]) as part:
    print("from", part.next, flush=True)
    for i in range(part.next, int(sys.argv[3])): part.put(i, [piece(i)], dict(pieces=1), bad=[dict(row=str(i), why="x")] if i % 7 == 0 else []); time.sleep(.004)
    part.mark(done=True)
'''


@pytest.mark.parametrize("seed", range(2))
def test_killed_again_and_again(tmp_path, seed):
    "A part is killed at random moments until it gets through; nothing is lost and nothing is there twice."
    rng, n, began = random.Random(seed), 150, []
    for _ in range(60):
        p = subprocess.Popen(script(WRITE, tmp_path / "p", tmp_path / "x", n), stdout=subprocess.PIPE, text=True)
        began.append(int(p.stdout.readline().split()[1]))
        try: p.wait(.03 + rng.random() * .2 + .02 * len(began)) # a busy machine needs longer
        except subprocess.TimeoutExpired: p.send_signal(signal.SIGKILL); p.wait()
        else: break
    else: pytest.fail(f"never got through: {began}")
    assert len(began) > 2 and began == sorted(began) and began[-1] > 0
    with Part(tmp_path / "p", [tmp_path / "x"]) as part:
        assert part.done and part.next == n and part.counts["pieces"] == n
        assert [b["row"] for b in part.bad_rows()] == [str(i) for i in range(0, n, 7)]
        part.writers[0].commit()
    exec(PIECES, calm := {})
    with IndexedWriter(tmp_path / "calm") as w:
        for i in range(n): w.add_many(*calm["piece"](i))
    assert both(tmp_path / "x") == both(tmp_path / "calm")


@pytest.mark.parametrize("name", ["0/new.bin", "0/lengths", "0/bounds", "pieces", "bad"])
def test_files_shorter_than_their_mark_start_the_part_over(tmp_path, name):
    with Part(tmp_path / "p", [tmp_path / "x"]) as part:
        part.put(0, [(np.arange(5, dtype=np.int32), [2, 3], None)], dict(n=1), bad=[dict(row="r", why="y")]); part.mark(done=True)
    os.truncate(tmp_path / "p" / name, os.path.getsize(tmp_path / "p" / name) - 1)
    with Part(tmp_path / "p", [tmp_path / "x"]) as part: assert (part.next, part.done, part.counts, len(part.writers[0])) == (0, False, {}, 0)


def test_half_a_state_is_no_state(tmp_path):
    with Part(tmp_path / "p", [tmp_path / "x"]) as part: part.put(0, [(np.arange(5, dtype=np.int32), [5], None)], {}); part.mark(done=True)
    text = (tmp_path / "p/state.json").read_text()
    (tmp_path / "p/state.json").write_text(text[:20])
    with Part(tmp_path / "p", [tmp_path / "x"]) as part: assert part.next == 0


# Seen, merging, packing ----------------------------------------------------------------------------

def test_seen_is_a_set():
    rng, seen, known = np.random.default_rng(0), Seen(), set()
    for _ in range(60):
        batch = [int(x).to_bytes(2, "big").rjust(16, b"x") for x in rng.integers(0, 3000, rng.integers(0, 200))]
        want = []
        for b in batch: want.append(b not in known); known.add(b)
        assert seen.fresh(np.array(batch, "S16")).tolist() == want
    assert sum(map(len, seen.sorted)) == len(known) and len(seen.sorted) < 12


def documents(rng, n):
    "Documents of 1 to 3 sequences, some with the content of another."
    pool = [[rng.integers(0, 99, rng.integers(1, 6)).astype(np.int32) for _ in range(rng.integers(1, 4))] for _ in range(25)]
    return [(k, pool[k]) for k in rng.integers(0, 25, n)]


@pytest.mark.parametrize("n_parts", [1, 2, 5])
def test_parts_merge_to_what_one_process_writes(tmp_path, n_parts):
    "Two files, documents of several sequences, duplicates across parts, some items in one file only, some filtered out."
    rng = np.random.default_rng(3)
    pieces = [documents(rng, rng.integers(0, 9)) for _ in range(30)]
    outcome = {k: int(rng.integers(0, 4) == 0) for k in range(25)}
    files = {k: int(rng.integers(1, 4)) for k in range(25)}
    folders = [tmp_path / str(k) for k in range(n_parts)]
    parts, seen = [Part(f, [tmp_path / "x", tmp_path / "y"]) for f in folders], [Seen() for _ in folders]
    for i, docs in enumerate(pieces):
        k = i % n_parts
        new = seen[k].fresh(np.array([f"{d:016}" for d, _ in docs], "S16"))
        mine = [d for d, ok in zip(docs, new, strict=False) if ok]
        items, batches = np.zeros(len(mine), ITEM), []
        counts = dict(duplicates=int((~new).sum()), short=sum(outcome[d] for d, _ in mine), documents=sum(not outcome[d] for d, _ in mine), tokens=0)
        for j, (d, seqs) in enumerate(mine):
            bits = 0 if outcome[d] else files[d]
            size = sum(map(len, seqs)) * bits.bit_count()
            items[j] = f"{d:016}".encode(), outcome[d], bits, size, 0
            counts["tokens"] += size
        for f in (0, 1):
            has = [s for d, s in mine if not outcome[d] and files[d] >> f & 1]
            flat = [x for s in has for x in s]
            batches.append((np.concatenate(flat) if flat else np.zeros(0, np.int32), list(map(len, flat)), [len(s) for s in has]))
        parts[k].put(i, batches, counts, items)
    for p in parts: p.mark(done=True); p.close()
    with write_together(tmp_path / "x", tmp_path / "y") as ws: fix = merge_parts(folders, ws, ["documents", "short"])
    got = sum((p.counts for p in parts), start=type(fix)()); got.update(fix)
    known, want = set(), dict(duplicates=0, short=0, documents=0, tokens=0)
    with write_together(tmp_path / "a", tmp_path / "b") as ws:
        for d, seqs in (d for docs in pieces for d in docs):
            what = "duplicates" if d in known else "short" if outcome[d] else "documents"
            known.add(d); want[what] += 1
            for f, w in enumerate(ws):
                if what == "documents" and files[d] >> f & 1:
                    for s in seqs: w.add(s); want["tokens"] += len(s)
                    w.end_document()
    assert both(tmp_path / "x") == both(tmp_path / "a") and both(tmp_path / "y") == both(tmp_path / "b")
    assert {k: got[k] for k in want} == want


@pytest.mark.parametrize("neat", [False, True])
def test_packed_rows_against_a_plain_rewriting(tmp_path, neat):
    rng, L, pad = np.random.default_rng(1), 64, 7
    samples = [(ids := rng.integers(10, 99, n), np.where(rng.random(n) < .5, -100, ids)) for n in rng.integers(1, 64, 300)]
    with Part(tmp_path / "p", [tmp_path / "x"] * 3) as part:
        for i in range(0, 300, 50):
            some, sizes = samples[i:i + 50], [len(s[0]) for s in samples[i:i + 50]]
            ids, labels = (np.concatenate(x).astype(np.int32) for x in zip(*some, strict=False))
            part.put(i, [(ids, sizes, None), (np.ones_like(ids), sizes, None), (labels, sizes, None)], {})
        part.mark(done=True)
    names = [tmp_path / k for k in ("ids", "mask", "labels")]
    with write_together(*names) as ws: n = pack_rows(tmp_path / "p", ws, L, neat, pad)
    members = bin_members(pack_bins([len(s[0]) for s in samples], L))
    assert n == len(members) and sorted(i for m in members for i in m) == list(range(300))
    got = [[r.tolist() for r in IndexedReader(p)[:]] for p in names]
    for row, m in enumerate(members):
        want = [], [], []
        for number, i in enumerate(m, 1):
            want[0].extend(samples[i][0].tolist()); want[1].extend([number if neat else 1] * len(samples[i][0]))
            want[2].extend([-100, *samples[i][1].tolist()[1:]])
        for w, fill in zip(want, (pad, 0 if neat else 1, -100), strict=False): w.extend([fill] * (L - len(w)))
        assert [g[row] for g in got] == list(want)


# Processes -----------------------------------------------------------------------------------------

def test_parts_end_with_the_process_that_started_them(tmp_path):
    code = '''
from ascend_nb.parts import start_parts, work_folder
with work_folder(sys.argv[1], {}) as (_, lock):
    start_parts("import os, time; from ascend_nb.parts import part_job\\nwith part_job() as (job, report): report(pid=os.getpid()); time.sleep(60)", [{}, {}], lock, {},
                lambda reports: all(reports) and print([r["pid"] for r in reports], flush=True))
'''
    p = subprocess.Popen(script(code, tmp_path / "x"), stdout=subprocess.PIPE, text=True)
    pids = json.loads(p.stdout.readline())
    assert len(set(pids)) == 2 and all(os.path.exists(f"/proc/{x}") for x in pids)
    p.send_signal(signal.SIGKILL); p.wait()
    with work_folder(tmp_path / "x", {}): pass # waits for the last of them
    until = time.time() + 5
    while time.time() < until and any(os.path.exists(f"/proc/{x}/fd/0") for x in pids): time.sleep(.05)
    assert not any(os.path.exists(f"/proc/{x}/fd/0") for x in pids)
