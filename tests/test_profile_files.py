"""Profiles as torch_npu and torch write them: real recordings where they lie, the sample everywhere; forms, levels and ranks against each other."""
import gzip
import json
import re
import shutil
import sqlite3

import numpy as np
import pandas as pd
import pytest
from ascend_nb.core import UserError
from ascend_nb.findings import find_all
from ascend_nb.profile_files import TABLES, open_profile
from ascend_nb.profile_views import memory_curve, operators, peak_owners
from ascend_nb.trace_copies import perfetto_copy
from ascend_nb.trace_files import covered, trace_tables

OUT = "ASCEND_PROFILER_OUTPUT"


def test_text_and_database_tell_the_same(llm, profiles):
    "torch_npu wrote both: the sums and collectives of all four ranks are equal; ends of a step may be rounded."
    other = open_profile(profiles / "qwen3_0.6b_tp1pp2dp2", form="db")
    assert sorted(llm.ranks) == sorted(other.ranks) == [0, 1, 2, 3]
    for name, rows in (("steps", 4), ("talks", 76), ("bandwidth", 98), ("links", 325)):
        a, b = llm.table(name), other.table(name)
        for t in (a, b): t["source"], t["target"] = (t[c].astype(int) if c in t else 0 for c in ("source", "target"))
        key = [c for c in ("rank", "step", "kind", "op", "group", "transport", "source", "target") if c in a]
        both = a.merge(b, on=key, suffixes=("", "_db"), validate="one_to_one")
        assert len(a) == len(b) == len(both) == rows
        for c in set(a) - set(key): assert np.allclose(both[c].astype(float), both[c + "_db"].astype(float), rtol=0, atol=.2 if c in ("stage", "preparing") else 1e-6), (name, c)


def test_kernels_add_up_to_the_official_sums(llm, profiles):
    "kernel_details.csv and step_trace_time.csv are written apart from each other."
    for p in (llm, open_profile(profiles / "vision_level1")):
        k, steps = p.table("kernels"), p.table("steps").set_index("rank")
        talk = k.core.isin(["COMMUNICATION", "HCCL"])
        for rank in k["rank"].unique():
            mine = k["rank"] == rank
            for what, column in ((mine & ~talk, "computing"), (mine & talk, "communication")):
                n = covered(k.start_ns[what], (k.duration[what] * 1000).round().astype(np.int64)) / 1000
                assert abs(n - steps[column][rank]) < .05, (rank, column)


def test_operators_are_the_sums_of_kernels(llm):
    k = llm.table("kernels").groupby(["rank", "type", "core"]).duration.agg(["sum", "size"])
    ops = llm.table("operators").set_index(["rank", "type", "core"])
    assert len(ops) == 81
    for key, r in ops.iterrows(): assert abs(k["sum"][key] - r.total) < .1 and k["size"][key] == r["count"], key


def test_a_trace_alone_tells_the_official_split(profiles):
    for rank in (0, 1):
        out = profiles / f"vision_level1/rank{rank}_ascend_pt" / OUT
        ours, theirs = trace_tables(out / "trace_view.json")["steps"].iloc[0], pd.read_csv(out / "step_trace_time.csv").iloc[0]
        for a, b in (("computing", "Computing"), ("exposed", "Communication(Not Overlapped)"), ("overlapped", "Overlapped"), ("free", "Free"), ("stage", "Stage")):
            assert abs(ours[a] - theirs[b]) < .2, a


def test_levels_ranks_and_missing_files_are_named(llm, profiles):
    vision = open_profile(profiles / "vision_level1")
    assert [llm.ranks[0].level, vision.ranks[1].level] == ["Level2", "Level1"]
    assert vision.missing == [] and all(len(vision.table(n)) for n in TABLES)
    assert "rank 3: no kernel_details.csv" in "\n".join(llm.missing) and not any("communication.json" in m for m in llm.missing)
    assert llm.ranks[2].groups["5862276093215481612"] == ("default_group", (0, 1, 2, 3))


def write_db(out, text):
    "The database of torch_npu's documented columns that says what a rank's text form says."
    db, words = sqlite3.connect(out / "ascend_pytorch_profiler_0.db"), {}
    word = lambda s: words.setdefault(s, len(words))
    db.executescript("""CREATE TABLE STRING_IDS (id INTEGER, value TEXT); CREATE TABLE STEP_TIME (id INTEGER, startNs INTEGER, endNs INTEGER);
        CREATE TABLE TASK (startNs INTEGER, endNs INTEGER, deviceId INTEGER, globalTaskId INTEGER); CREATE TABLE COMPUTE_TASK_INFO (name INTEGER, globalTaskId INTEGER, taskType INTEGER, opType INTEGER, inputShapes INTEGER);
        CREATE TABLE COMMUNICATION_OP (opName INTEGER, opType INTEGER, startNs INTEGER, endNs INTEGER); CREATE TABLE MEMORY_RECORD (component INTEGER, timestamp INTEGER, totalAllocated INTEGER, totalReserved INTEGER, totalActive INTEGER);
        CREATE TABLE OP_MEMORY (name INTEGER, size INTEGER, allocationTime INTEGER, releaseTime INTEGER, allocationTotalAllocated INTEGER, allocationTotalReserved INTEGER);""")
    k = text.table("kernels")
    for step, g in k.groupby("step"): db.execute("INSERT INTO STEP_TIME VALUES (?, ?, ?)", (int(step), int(g.start_ns.min()) - 9, int(g.start_ns.max()) + 9))
    for i, r in enumerate(k.itertuples()):
        a = int(r.start_ns); b = a + round(r.duration * 1000)
        if r.core == "COMMUNICATION": db.execute("INSERT INTO COMMUNICATION_OP VALUES (?, ?, ?, ?)", (word(r.name), word(r.type), a, b)); continue
        db.execute("INSERT INTO TASK VALUES (?, ?, 0, ?)", (a, b, i)); db.execute("INSERT INTO COMPUTE_TASK_INFO VALUES (?, ?, ?, ?, ?)", (word(r.name), i, word(r.core), word(r.type), word(r.shapes)))
    mb = lambda x: round(x * 2**20)
    for r in text.table("memory").itertuples(): db.execute("INSERT INTO MEMORY_RECORD VALUES (?, ?, ?, ?, ?)", (word(r.component), int(r.time_ns), mb(r.allocated), mb(r.reserved), mb(r.active)))
    for r in text.table("blocks").itertuples(): db.execute("INSERT INTO OP_MEMORY VALUES (?, ?, ?, ?, ?, ?)", (word(r.name), round(r.kb * 1024), int(r.start_ns), None if pd.isna(r.end_ns) else int(r.end_ns), mb(r.allocated), mb(r.reserved)))
    db.executemany("INSERT INTO STRING_IDS VALUES (?, ?)", [(i, s) for s, i in words.items()]); db.commit(); db.close()


def test_the_large_database_says_what_text_says(samples, tmp_path):
    "Columns and units as torch_npu documents them; the values are those of the sample's text form."
    text = open_profile(samples / "npu_profile/rank0_ascend_pt")
    write_db(tmp_path, text)
    db = open_profile(tmp_path)
    assert db.ranks[0].form == "db"
    for name in ("kernels", "operators", "memory", "blocks"):
        a, b = text.table(name), db.table(name)
        a = a.sort_values(a.columns[2 if name != "kernels" else 5], kind="stable").reset_index(drop=True); b = b.sort_values(b.columns[2 if name != "kernels" else 5], kind="stable").reset_index(drop=True)
        if name == "operators": a, b = (t.sort_values(["type", "core"]).reset_index(drop=True) for t in (a, b))
        assert len(a) == len(b)
        for c in set(a) & set(b):
            same = a[c].astype(float).sub(b[c].astype(float)).abs().fillna(0).max() < 1e-3 if c not in ("name", "type", "core", "component", "shapes") else (a[c].fillna("N/A") == b[c]).all()
            assert same, (name, c)
    assert any("step_trace_time.csv (analysis.db)" in m for m in db.missing)


def test_level_0_has_times_and_no_more(samples, tmp_path):
    out = shutil.copytree(samples / "npu_profile/rank0_ascend_pt" / OUT, tmp_path / "x_ascend_pt" / OUT)
    for p in out.iterdir():
        if p.name not in ("step_trace_time.csv", "kernel_details.csv"): p.unlink()
    k = pd.read_csv(out / "kernel_details.csv")
    k[["Device_id", "Name", "Type", "Accelerator Core", "Start Time(us)", "Duration(us)"]].to_csv(out / "kernel_details.csv", index=False)
    p = open_profile(tmp_path)
    assert len(p.table("kernels")) == len(k) and "shapes" not in p.table("kernels")
    assert len(p.missing) == 11 and all(any(f in m for m in p.missing) for f in ("trace_view.json", "profiler_info*.json", "profiler_metadata.json", "operator_details.csv")), p.missing
    k[["Name", "Start Time(us)", "Duration(us)"]].to_csv(out / "kernel_details.csv", index=False)
    assert operators(open_profile(tmp_path)).type.isin(k.Name).all(), "without a type a kernel has its name"


def test_a_column_without_which_rows_say_nothing_is_named(samples, tmp_path):
    out = shutil.copytree(samples / "npu_profile/rank0_ascend_pt", tmp_path / "x_ascend_pt") / OUT
    n = 0
    for name, t in TABLES.items():
        if not (out / t.file).is_file() or not t.columns: continue
        whole = (out / t.file).read_text()
        for head in (h for h, c in t.columns.items() if c in t.needs.split()):
            pd.read_csv(out / t.file, dtype=str).drop(columns=head).to_csv(out / t.file, index=False)
            with pytest.raises(UserError, match=re.escape(head)): open_profile(tmp_path).table(name)
            (out / t.file).write_text(whole); n += 1
    assert n == 21, "each of them"
    (out / "memory_record.csv").write_text("Component,Timestamp(us),Total Allocated(MB),Total Reserved(MB)\nPTA,,,\n")
    p = open_profile(tmp_path)
    assert memory_curve(p, 0).empty and peak_owners(p, 0).empty
    for name in ("profiler_info_0.json", "profiler_metadata.json"):
        kept = (out.parent / name).read_text()
        for text in ("[]", "null", "{"):
            (out.parent / name).write_text(text)
            with pytest.raises(UserError, match=name): open_profile(tmp_path)
        (out.parent / name).write_text('{"config": [], "parallel_group_info": {"a": {"global_ranks": null}}, "distributed_args": null}')
        assert open_profile(tmp_path).ranks[0].level in ("", "Level1") and open_profile(tmp_path).ranks[0].groups is not None
        (out.parent / name).write_text(kept)


@pytest.mark.parametrize("name, table", [("kernel_details.csv", "kernels"), ("memory_record.csv", "memory"), ("communication.json", "talks"), ("communication_matrix.json", "links"), ("step_trace_time.csv", "steps"), ("trace_view.json", None)])
def test_files_cut_anywhere_are_one_sentence(samples, tmp_path, name, table):
    "At every tenth of the file: a UserError that names it, never a shorter table."
    source = samples / "npu_profile/rank0_ascend_pt" / OUT / name
    data = source.read_bytes()
    for n in range(1, 10):
        cut = data[: len(data) * n // 10]
        if cut.endswith(b"\n"): cut = cut[:-1]
        (tmp_path / OUT).mkdir(exist_ok=True)
        (tmp_path / OUT / name).write_bytes(cut)
        with pytest.raises(UserError, match=name):
            if table: open_profile(tmp_path).table(table)
            else: trace_tables(tmp_path / OUT / name)


def test_a_packed_trace_that_is_cut(samples, tmp_path):
    data = gzip.compress((samples / "npu_profile/rank0_ascend_pt" / OUT / "trace_view.json").read_bytes())
    (tmp_path / "t.trace.json.gz").write_bytes(data)
    assert len(open_profile(tmp_path).table("kernels")) > 50
    (tmp_path / "t.trace.json.gz").write_bytes(data[: len(data) // 2])
    with pytest.raises(UserError, match="whole events"): open_profile(tmp_path)


GOOD = dict(ph="X", name="a", cat="cpu_op", pid=1, tid=1, ts=1.5, dur=2.0)
BAD = {"a number": 3, "none": None, "no name": {k: v for k, v in GOOD.items() if k != "name"}, "no time": {k: v for k, v in GOOD.items() if k != "ts"}, "a word for a time": GOOD | dict(ts="noon"), "an endless time": GOOD | dict(ts=1e30), "no number": GOOD | dict(dur=float("nan")),
    "a list for a process": GOOD | dict(pid=[1]), "a nameless process": dict(ph="M", name="process_name", pid=1), "memory of nobody": dict(ph="i", name="[memory]", ts=1), "an arrow from nowhere": dict(ph="s", cat="ac2g", ts=1)}


def test_events_that_are_none_are_one_sentence(tmp_path):
    path = tmp_path / "x.trace.json"
    for what, e in BAD.items():
        path.write_text(json.dumps([GOOD, e]))
        with pytest.raises(UserError, match="x.trace.json has an event"): open_profile(path); pytest.fail(what)
        if what not in ("no name", "no time", "a nameless process", "memory of nobody", "an arrow from nowhere"):
            with pytest.raises(UserError, match="has an event"): perfetto_copy(path, tmp_path / "y.json.gz"); pytest.fail(what)
    for e in (GOOD | dict(name=None, cat=None), GOOD | dict(dur=-5), {}, dict(ph=None), GOOD | dict(name="ProfilerStep#" + "9" * 30), dict(ph="i", name="[memory]", ts=1, args={})):
        path.write_text(json.dumps([GOOD, e]))
        assert (p := open_profile(path)).table("kernels").duration.min() >= 0 and find_all(p) is not None and perfetto_copy(path, tmp_path / "y.json.gz")["events"] >= 1
    assert sorted(p.name for p in tmp_path.iterdir()) == ["x.trace.json", "y.json.gz"]
    with pytest.raises(UserError, match="Cannot write"): perfetto_copy(path, path / "y.json.gz")
