"""The .bin/.idx pair: against a real file, against Megatron-LM itself, and against everything that can break."""
import os
import shutil
import struct
import subprocess
import sys
import time
from contextlib import nullcontext
from pathlib import Path

import numpy as np
import pytest

from ascend_nb.core import UserError
from ascend_nb.indexed import DTYPES, JOURNAL, IndexedReader, IndexedWriter, best_dtype, commit_all, pairs_like, write_together
from ascend_nb.parts import work_folder

MCORE = "megatron-core is absent: pip install --no-deps --target DIR megatron-core==0.6.0, then put DIR on PYTHONPATH"


@pytest.fixture(scope="module")
def mcore():
    return pytest.importorskip("megatron.core.datasets.indexed_dataset", reason=MCORE)


@pytest.fixture(scope="module")
def web(shared_data): return str(shared_data / "megatron" / "meg-gpt2-openwebtext_text_document")


def both(prefix): return [open(f"{prefix}{e}", "rb").read() for e in (".bin", ".idx")]


def random_docs(seed, dtype, n=200):
    "Documents of 0 to 4 sequences of 0 to 40 tokens, over the whole range of the type."
    rng, info = np.random.default_rng(seed), np.iinfo(dtype)
    return [[rng.integers(info.min, info.max, rng.integers(0, 40), endpoint=True, dtype=dtype) for _ in range(rng.integers(1, 5))] for _ in range(n)]


# A real file --------------------------------------------------------------------------------------

def test_real_pair_reads(web):
    r = IndexedReader(web)
    assert (len(r), r.num_tokens, r.dtype, len(r.document_indices)) == (1000, 1_361_845, np.uint16, 1001)
    raw = np.fromfile(web + ".bin", np.uint16)
    assert np.array_equal(np.concatenate(r[:]), raw)
    assert np.array_equal(r.get(500, 7, 20), r[500][7:27])
    assert r[999].base is not None and not r[999].flags.writeable


@pytest.mark.parametrize("how", ["add", "lists", "arrays", "flat", "wide"])
def test_real_pair_rewritten_is_the_same_bytes(web, tmp_path, how):
    r = IndexedReader(web)
    with IndexedWriter(tmp_path / "again", r.dtype) as w:
        if how == "add":
            for s in r[:]: w.add(s); w.end_document()
        elif how == "lists":
            for a in range(0, 1000, 64): w.add_many([s.tolist() for s in r[a:a + 64]])
        elif how == "flat": w.add_many(r.tokens, r.lengths)
        else: w.add_many([s.astype(np.int64) if how == "wide" else s for s in r[:]])
    assert both(tmp_path / "again") == both(web)


# Megatron-LM itself -------------------------------------------------------------------------------

@pytest.mark.parametrize("dtype", [np.uint16, np.int32, np.int64, np.uint8])
def test_we_write_what_megatron_writes(mcore, tmp_path, dtype):
    import torch
    docs = random_docs(1, dtype)
    theirs = mcore.IndexedDatasetBuilder(str(tmp_path / "theirs.bin"), dtype=dtype)
    with IndexedWriter(tmp_path / "ours", dtype) as ours:
        for doc in docs:
            for s in doc:
                theirs.add_item(torch.from_numpy(s.astype(np.int64)))
                ours.add(s)
            theirs.end_document(); ours.end_document()
    theirs.finalize(str(tmp_path / "theirs.idx"))
    assert both(tmp_path / "ours") == both(tmp_path / "theirs")


def test_we_write_many_documents_as_megatron_does(mcore, tmp_path):
    docs = [s for d in random_docs(2, np.int32) for s in d]
    theirs = mcore.IndexedDatasetBuilder(str(tmp_path / "theirs.bin"), dtype=np.int32)
    for s in docs: theirs.add_document(s, [len(s)])
    theirs.finalize(str(tmp_path / "theirs.idx"))
    with IndexedWriter(tmp_path / "ours") as ours: ours.add_many(docs)
    assert both(tmp_path / "ours") == both(tmp_path / "theirs")


def test_megatron_reads_what_we_write(mcore, tmp_path):
    docs = random_docs(3, np.int32)
    with IndexedWriter(tmp_path / "ours") as w:
        for doc in docs:
            for s in doc: w.add(s)
            w.end_document()
    theirs, ours = mcore.IndexedDataset(str(tmp_path / "ours"), mmap=True), IndexedReader(tmp_path / "ours")
    assert len(theirs) == len(ours) == sum(map(len, docs))
    assert np.array_equal(theirs.document_indices, ours.document_indices)
    for i in range(len(ours)): assert np.array_equal(theirs[i], ours[i])
    i = int(np.argmax(ours.lengths))
    assert np.array_equal(theirs.get(i, offset=3, length=5), ours.get(i, 3, 5))
    assert np.array_equal(theirs.get(i, offset=3), ours.get(i, 3))
    for a, b in zip(theirs[10:20], ours[10:20], strict=True): assert np.array_equal(a, b)


@pytest.mark.parametrize("vocab", [256, 65_499, 65_500, 151_936])
def test_best_dtype_is_megatrons(mcore, vocab): assert best_dtype(vocab) is mcore.DType.optimal_dtype(vocab)


def test_type_codes_are_megatrons(mcore): assert {c: t.__name__ for c, t in DTYPES.items()} == {d.value: d.name for d in mcore.DType}


@pytest.mark.net
@pytest.mark.slow
@pytest.mark.parametrize("version", ["0.6.0", "0.12.1"]) # what ModelLink was built on, and what MindSpeed-LLM uses
def test_with_megatron_installed_for_the_occasion(root, tmp_path, version):
    "Fetch megatron-core and run every comparison with it; nothing may be skipped for its absence."
    pip = [sys.executable, "-m", "pip", "install", "-q", "--no-deps", "--target", str(tmp_path), f"megatron-core=={version}"]
    subprocess.run(pip, check=True)
    run = subprocess.run([sys.executable, "-m", "pytest", "-rs", "-m", "not net", "tests/test_indexed.py", "tests/test_datasets.py"],
                         cwd=root, capture_output=True, text=True, env={**os.environ, "PYTHONPATH": str(tmp_path)})
    assert run.returncode == 0, run.stdout[-3000:]
    assert "megatron-core is absent" not in run.stdout


# Writing: both files or none ----------------------------------------------------------------------

def test_nothing_appears_on_an_exception(tmp_path):
    with pytest.raises(RuntimeError), IndexedWriter(tmp_path / "x") as w:
        w.add([1, 2, 3]); raise RuntimeError
    assert not os.listdir(tmp_path)


def test_an_old_pair_survives_a_failed_rewrite(tmp_path):
    with IndexedWriter(tmp_path / "x") as w: w.add([1, 2, 3])
    before = both(tmp_path / "x")
    with pytest.raises(UserError, match="no sequence"), IndexedWriter(tmp_path / "x"): pass
    assert both(tmp_path / "x") == before and len(os.listdir(tmp_path)) == 2


def test_an_old_pair_is_replaced(tmp_path):
    for ids in ([1, 2, 3], [4]):
        with IndexedWriter(tmp_path / "x") as w: w.add(ids)
    assert IndexedReader(tmp_path / "x")[0].tolist() == [4] and len(os.listdir(tmp_path)) == 2


def test_finish_and_commit_are_apart(tmp_path):
    w = IndexedWriter(tmp_path / "x")
    w.add([1, 2]); w.finish()
    assert not pairs_like(tmp_path / "x")
    w.commit(); w.commit()
    assert pairs_like(tmp_path / "x") == [""]


@pytest.mark.parametrize("blocked", ["c.idx", "c.bin", "a.idx"])
def test_a_commit_that_fails_midway_is_undone(tmp_path, blocked):
    "A folder stands where a file should go, so that one rename of six fails; what was there before is there again."
    with write_together(tmp_path / "a", tmp_path / "b") as ws:
        for w in ws: w.add([1])
    if blocked == "a.idx": (tmp_path / "a.idx").unlink()
    (tmp_path / blocked).mkdir(); (tmp_path / blocked / "mine").touch()
    before = {f.name: f.read_bytes() for f in tmp_path.iterdir() if f.is_file()}
    with pytest.raises(UserError, match="Cannot write"), write_together(*(tmp_path / p for p in "abc")) as ws:
        for w in ws: w.add([2])
    assert {f.name: f.read_bytes() for f in tmp_path.iterdir() if f.is_file()} == before
    assert (tmp_path / blocked / "mine").exists()
    assert not [f for f in os.listdir(tmp_path) if f.startswith(".")]


def test_a_full_disk_is_one_sentence_and_leaves_nothing(tmp_path):
    "A limit on the size of files is the nearest thing to a full disk that needs no rights."
    code = f"""
import resource, signal, numpy as np
from ascend_nb.core import UserError
from ascend_nb.indexed import IndexedWriter
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
resource.setrlimit(resource.RLIMIT_FSIZE, (3 << 20, 3 << 20))
try:
    with IndexedWriter({str(tmp_path / "x")!r}) as w:
        for _ in range(10): w.add(np.zeros(1 << 18, np.int32))
except UserError as e: print(e.text("en"))
"""
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    assert out.startswith("Cannot write") and "File too large" in out
    assert not os.listdir(tmp_path)


def killed_at(k, job):
    "Run `job` in a forked process that dies as by SIGKILL at its k-th change of the folder; was it killed?"
    pid = os.fork()
    if pid: return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 9
    left = [k]
    def deadly(f):
        def call(*args, **kw):
            left[0] -= 1
            if left[0] < 0: os._exit(9)
            return f(*args, **kw)
        return call
    try:
        for name in ("replace", "unlink", "rmdir"): setattr(os, name, deadly(getattr(os, name)))
        job()
        os._exit(0)
    finally: os._exit(1)


def state(names):
    "What a reader finds: the tokens of every pair, or None where one is refused."
    try: return [IndexedReader(n).tokens.tolist() for n in names]
    except UserError: return None


@pytest.mark.parametrize("kept", [pytest.param(False, marks=pytest.mark.slow), True])
def test_killed_between_the_final_names_over_an_older_set(tmp_path, kept):
    "Old, new or refused, never a mixture; the next run makes it whole, whatever it was."
    def write(ids):
        names = [tmp_path / n for n in ("a", "b", "c")]
        def job():
            with work_folder(tmp_path / "out", dict(ids=ids)) if kept else nullcontext([None]) as (folder, *_):
                writers = [IndexedWriter(n, work=folder and folder / n.name) for n in names]
                for w in writers: w.add_many([ids, ids])
                commit_all(*writers)
        return job
    names, old, new = [tmp_path / n for n in ("a", "b", "c")], [[1, 2, 1, 2]] * 3, [[7, 8, 9, 7, 8, 9]] * 3
    seen = set()
    for k in range(100):
        for p in tmp_path.iterdir(): shutil.rmtree(p) if p.is_dir() else p.unlink()
        write([1, 2])()
        died = killed_at(k, write([7, 8, 9]))
        found = state(names)
        assert found in (old, new, None)
        seen.add(str(found))
        left = list(tmp_path.glob(f".*/**/{JOURNAL}"))
        if found is None: assert left and "run it again" in str(pytest.raises(UserError, IndexedReader, next(n for n in names if not Path(f"{n}.idx").exists())).value)
        if kept:
            with work_folder(tmp_path / "out", {}): pass # the next run, whatever it is, even before it writes
            assert state(names) == (new if left else found)
        write([7, 8, 9])()
        assert state(names) == new and not list(tmp_path.glob(f".*/**/{JOURNAL}"))
        if not died: break
    assert not died and len(seen) == 3


def test_two_processes_on_one_set_take_turns(tmp_path):
    "Both finish the same three names again and again at one moment; each commit succeeds, and what is there is one's or the other's."
    def write(ids, until):
        real = os.replace
        def slow(*names): time.sleep(.001); real(*names)
        os.replace = slow
        while time.time() < until:
            with write_together(*(tmp_path / n for n in "abc")) as ws:
                for w in ws: w.add_many([ids] * 3)
    until, pids = time.time() + 1, []
    for k in (0, 1):
        if not (pid := os.fork()):
            try: write([k] * (k + 1), until); os._exit(0)
            finally: os._exit(1)
        pids.append(pid)
    assert [os.waitpid(pid, 0)[1] for pid in pids] == [0, 0]
    assert state([tmp_path / n for n in "abc"]) in ([[0] * 3] * 3, [[1] * 6] * 3) and not list(tmp_path.glob(".*"))


def test_a_bin_longer_than_its_index_is_of_another_run(pair):
    with open(f"{pair}.bin", "ab") as f: f.write(bytes(4))
    with pytest.raises(UserError, match="28 bytes in .*x.bin; expected 24, all that .*x.idx speaks of"): IndexedReader(pair)


def test_commit_all_needs_every_pair_finished(tmp_path):
    a, b = IndexedWriter(tmp_path / "a"), IndexedWriter(tmp_path / "b")
    a.add([1])
    with pytest.raises(UserError, match="no sequence"): commit_all(a, b)
    a.discard(); b.discard()
    assert not os.listdir(tmp_path)


@pytest.mark.parametrize("ids, dtype", [([65_536], np.uint16), ([-100], np.uint16), (np.array([2**31]), np.int32), ([256], np.uint8)])
def test_ids_that_do_not_fit(tmp_path, ids, dtype):
    for put in ("add", "add_many"):
        with pytest.raises(UserError, match=f"token id {ids[0]} "), IndexedWriter(tmp_path / "x", dtype) as w:
            getattr(w, put)(ids if put == "add" else [ids])
    assert not os.listdir(tmp_path)


def test_more_writing_mistakes(tmp_path):
    with pytest.raises(UserError, match="add up to 5"), IndexedWriter(tmp_path / "x") as w: w.add_many(np.arange(6), [2, 3])
    with pytest.raises(UserError, match="Did you mean int32|one of"): IndexedWriter(tmp_path / "x", np.float32)
    (tmp_path / "file").touch()
    with pytest.raises(UserError, match="Cannot write"): IndexedWriter(tmp_path / "file" / "x")
    assert os.listdir(tmp_path) == ["file"]


def test_empty_sequences_and_open_documents(tmp_path):
    with IndexedWriter(tmp_path / "x") as w:
        w.add([]); w.add([1]); w.add_many([[], [2, 3]]); w.add([4])
    r = IndexedReader(tmp_path / "x")
    assert [s.tolist() for s in r[:]] == [[], [1], [], [2, 3], [4]] and r.document_indices.tolist() == [0, 2, 3, 4, 5]
    with IndexedWriter(tmp_path / "void") as w: w.add([])
    assert IndexedReader(tmp_path / "void")[0].size == 0


# Reading: what can be broken ----------------------------------------------------------------------

@pytest.fixture
def pair(tmp_path):
    with IndexedWriter(tmp_path / "x", np.int32) as w: w.add_many([[1, 2, 3], [4, 5], [6]])
    return tmp_path / "x"


def patch_idx(pair, at, data):
    with open(f"{pair}.idx", "r+b") as f: f.seek(at); f.write(data)


@pytest.mark.parametrize("at, data, says", [
    (0, b"TNTIDX\0\0\0", "no Megatron index"),
    (9, struct.pack("<Q", 2), "version 2"),
    (17, b"\x09", "number type code 9"),
    (18, struct.pack("<Q", 9), "cut off"),
    (18, struct.pack("<Q", 2**63), "cut off"),
    (34, struct.pack("<i", -1), "length -1"),
    (34 + 12 + 8, struct.pack("<q", 13), "inside a token"),
    (34 + 12 + 16, struct.pack("<q", 24), "x.bin"),
    (34 + 36 + 24, struct.pack("<q", 2), "last document boundary of 2"),
])
def test_damaged_index(pair, at, data, says):
    patch_idx(pair, at, data)
    with pytest.raises(UserError, match=says): IndexedReader(pair)


@pytest.mark.parametrize("ext, keep", [(".idx", 0), (".idx", 20), (".idx", 34), (".idx", 101), (".bin", 0), (".bin", 23)])
def test_truncated(pair, ext, keep):
    os.truncate(f"{pair}{ext}", keep)
    with pytest.raises(UserError, match="cut off"): IndexedReader(pair)


def test_missing(pair, tmp_path):
    (tmp_path / "y_text_document.bin").touch(); (tmp_path / "y_text_document.idx").touch()
    with pytest.raises(UserError, match="Did you mean .*y_text_document"): IndexedReader(tmp_path / "y")
    with pytest.raises(UserError, match="Leave out the ending"): IndexedReader(f"{pair}.bin")
    with pytest.raises(UserError, match="Check the path"): IndexedReader(tmp_path / "nowhere" / "x")
    os.unlink(f"{pair}.bin")
    with pytest.raises(UserError, match="copy both"): IndexedReader(pair)


def test_no_torch():
    code = "import sys, ascend_nb.indexed; print('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.strip() == "False"


def test_memory_does_not_grow_with_the_tokens(tmp_path):
    "200 MB of tokens through a process whose peak grows by less than 30 MB."
    code = f"""
import resource, numpy as np
from ascend_nb.indexed import IndexedWriter, IndexedReader
peak = lambda: resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
chunk = np.zeros(1 << 20, np.int32)
w = IndexedWriter({str(tmp_path / "x")!r}); w.add_many(chunk, [1 << 20]); before = peak()
for _ in range(50): w.add_many(chunk, [1 << 10] * (1 << 10))
w.commit(); print(peak() - before)
"""
    grown_kib = int(subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout)
    assert grown_kib < 30 << 10
