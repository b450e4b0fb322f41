"""Copies of traces for a viewer: nothing is lost, nothing moves, nothing crosses; what Perfetto's importer would do is done here by a few lines of its rules."""
import json
import os

import pytest
from ascend_nb.profile_files import open_profile
from ascend_nb.trace_copies import ask_perfetto, check_trace, perfetto_copy, sublanes
from ascend_nb.trace_files import nanoseconds, read_events, trace_tables

OUT = "ASCEND_PROFILER_OUTPUT"


@pytest.fixture(scope="module")
def traces(profiles):
    return [profiles / f"vision_level1/rank{r}_ascend_pt" / OUT / "trace_view.json" for r in (0, 1)]


def nested(events):
    "As a viewer nests them, who reads doubles of microseconds and counts whole nanoseconds: how many events get cut, because they end behind what they lie in."
    lanes, cut = {}, 0
    ns = lambda us: round(float(us) * 1000)
    for e in sorted((e for e in events if e["ph"] == "X"), key=lambda e: (ns(e["ts"]), -ns(e["dur"]))):
        stack = lanes.setdefault((e["pid"], e["tid"]), [])
        a, b = ns(e["ts"]), ns(e["ts"]) + ns(e["dur"])
        while stack and stack[-1] <= a: stack.pop()
        cut += bool(stack) and b > stack[-1]
        stack.append(b)
    return cut


def test_a_real_trace_becomes_clean(traces, tmp_path):
    for i, source in enumerate(traces):
        before, count = check_trace(source), perfetto_copy(source, tmp_path / f"{i}.json.gz")
        after = check_trace(tmp_path / f"{i}.json.gz")
        assert before["texts"] > 9000 and before["crossing"] > 100 and before["far"] > 9000
        assert {k: after[k] for k in ("texts", "far", "wide", "crossing", "loose")} == dict(texts=0, far=0, wide=0, crossing=0, loose=0)
        assert after["lasting"] == before["lasting"] and count["moved"] >= before["crossing"] > 0
        assert nested(read_events(source)) > 50 and nested(read_events(tmp_path / f"{i}.json.gz")) == 0
        a, b = trace_tables(source)["steps"], trace_tables(tmp_path / f"{i}.json.gz")["steps"]
        assert (a - b).abs().max().max() < 1e-6


def test_every_event_keeps_its_time_and_its_facts(traces, tmp_path):
    perfetto_copy(traces[0], tmp_path / "t.json.gz")
    old, new = ([e for e in read_events(p) if e["ph"] in "XC"] for p in (traces[0], tmp_path / "t.json.gz"))
    zero = min(nanoseconds(e["ts"]) for e in old)
    assert len(old) == len(new)
    for a, b in zip(old, new, strict=True):
        assert (a["name"], a.get("args"), nanoseconds(a["ts"]) - zero, nanoseconds(a.get("dur", 0))) == (b["name"], b.get("args"), nanoseconds(b["ts"]), nanoseconds(b.get("dur", 0)))


def test_a_window_holds_its_step_and_no_other(samples, tmp_path):
    source = samples / "npu_profile/rank0_ascend_pt" / OUT / "trace_view.json"
    perfetto_copy(source, tmp_path / "w.json.gz", [6])
    got = trace_tables(tmp_path / "w.json.gz")
    whole = open_profile(samples / "npu_profile/rank0_ascend_pt").table("kernels")
    assert got["steps"].step.tolist() == [6] and len(got["kernels"]) == (whole.step == 6).sum()


def test_torchs_own_trace_too(tmp_path):
    import torch
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as p: torch.randn(32, 32) @ torch.randn(32, 32)
    p.export_chrome_trace(str(tmp_path / "t.json"))
    perfetto_copy(tmp_path / "t.json", tmp_path / "u.json.gz")
    assert check_trace(tmp_path / "u.json.gz")["crossing"] == 0
    assert all(isinstance(e["pid"], int) and isinstance(e["tid"], int) for e in read_events(tmp_path / "u.json.gz"))


def test_lanes_against_a_search():
    "Any two events of one lane contain each other or are apart."
    import numpy as np
    r = np.random.RandomState(0)
    for _ in range(50):
        a, n = r.randint(0, 60, 40), r.randint(1, 25, 40)
        lane = sublanes(a, n)
        for i in range(40):
            for j in range(i):
                if lane[i] == lane[j]:
                    (p, q), (s, t) = sorted([(a[i], -a[i] - n[i]), (a[j], -a[j] - n[j])])
                    assert s >= -q or -t <= -q, (p, -q, s, -t)


def test_perfetto_reads_the_copy(traces, tmp_path):
    "With Perfetto's own program: every event is a slice, and nothing is dropped."
    pytest.importorskip("perfetto", reason="the extra `profile` is not installed")
    if not os.environ.get("TRACE_PROCESSOR"): pytest.skip("TRACE_PROCESSOR does not name Perfetto's program, which is fetched from the network")
    perfetto_copy(traces[0], tmp_path / "t.json.gz")
    found = ask_perfetto(tmp_path / "t.json.gz")
    assert found["slices"] == check_trace(tmp_path / "t.json.gz")["lasting"] and not found["errors"]
    json.dumps(found)
