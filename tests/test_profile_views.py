"""Questions asked of real recordings: against sums that torch_npu wrote itself, or that are added up here in another way."""
import csv
import json

import matplotlib
import pytest
from ascend_nb.hardware import find_device
from ascend_nb.profile_files import open_profile
from ascend_nb.profile_plots import PLOTS, draw_all
from ascend_nb.profile_views import bubble, by_group, memory_curve, module_tree, operators, peak_owners, step_split, unit_share, waits

OUT = "ASCEND_PROFILER_OUTPUT"


def rows(folder, rank, name):
    with open(next(folder.glob(f"level2/rank_{rank}_ascend_pt")) / OUT / name, encoding="utf-8") as f: return list(csv.DictReader(f))


def test_the_split_is_the_official_one(llm, profiles):
    t = step_split(llm).set_index("rank")
    for rank in range(4):
        official = rows(profiles / "qwen3_0.6b_tp1pp2dp2", rank, "step_trace_time.csv")[0]
        for ours, theirs in (("computing", "Computing"), ("exposed", "Communication(Not Overlapped)"), ("free", "Free"), ("stage", "Stage")):
            assert abs(t[ours][rank] - float(official[theirs]) / 1000) < 1e-6
        assert abs(t.loc[rank, ["computing_share", "exposed_share", "free_share"]].sum() - 1) < 1e-3


def test_operators_have_the_official_ratios(llm, profiles):
    "op_statistic.csv gives each operator's share in percent; ours come from the kernels."
    mine = operators(llm).set_index(["rank", "type", "unit"])
    for rank in (0, 2):
        for r in rows(profiles / "qwen3_0.6b_tp1pp2dp2", rank, "op_statistic.csv"):
            unit = {"AI_CORE": "cube", "MIX_AIC": "cube"}.get(r["Core Type"], "vector")
            same = [x for x in rows(profiles / "qwen3_0.6b_tp1pp2dp2", rank, "op_statistic.csv") if x["OP Type"] == r["OP Type"] and ({"AI_CORE": "cube", "MIX_AIC": "cube"}.get(x["Core Type"], "vector") == unit)]
            assert abs(100 * mine.share[rank, r["OP Type"], unit] - sum(float(x["Ratio(%)"]) for x in same)) < .01
    assert abs(unit_share(llm).sum(axis=1) - 1).max() < 1e-9


def test_the_owners_of_the_peak_fill_it(llm, profiles):
    "What is alive at the peak, and what was there before, is what the allocator says; that remainder is the curve's first value."
    for rank in (0, 2):
        curve, owners = memory_curve(llm, rank), peak_owners(llm, rank, 100)
        official = max(float(r["Total Allocated(MB)"]) for r in rows(profiles / "qwen3_0.6b_tp1pp2dp2", rank, "memory_record.csv") if r["Component"] == "PTA")
        assert abs(owners.mb.sum() - official) < .01 and abs(curve.allocated.max() - official) < 1e-6
        before = owners.set_index("name").mb["(held before the recording)"]
        assert abs(before - curve.allocated.iloc[0]) < .05 * official and before > 0


def test_bandwidth_is_bytes_over_time(llm, profiles):
    "Against a sum over communication.json made here."
    t = by_group(llm, find_device("atlas-a2"))
    path = profiles / "qwen3_0.6b_tp1pp2dp2/level2/rank_1_ascend_pt" / OUT / "communication.json"
    mb = ms = 0.
    for name, known in json.loads(path.read_text())["step13"]["collective"].items():
        if name.endswith("@5862276114690318097"): h = known["Communication Bandwidth Info"]["HCCS"]; mb += h["Transit Size(MB)"]; ms += h["Transit Time(ms)"]
    mine = t[(t["rank"] == 1) & (t.transport == "HCCS") & (t.mb == mb)]
    assert len(mine) == 1 and abs(mine.gb_s.iloc[0] - mb / ms) < 1e-9
    assert mine.best_gb_s.iloc[0] == 28 and .6 < mine.share.iloc[0] < .75


def test_waiting_is_what_the_last_one_did_not(llm):
    "In the group of ranks 1 and 3, added up by hand from communication.json: 0 is the length of the one that came last."
    w = waits(llm).set_index(["rank", "waits_for"])
    t = llm.table("talks")
    pair = t[t["rank"].isin([1, 3])].groupby(["group", "op"]).filter(lambda g: len(g) == 2 and g["rank"].nunique() == 2)
    lengths = pair.pivot(index=["group", "op"], columns="rank", values="elapse")
    everybody = t.groupby(["group", "op"])["rank"].nunique()
    lengths = lengths[everybody.reindex(lengths.index) == 2]
    assert len(lengths) == 7
    alone = (lengths[1] - lengths[3]).clip(lower=0).sum() / 1000
    assert alone <= w.ms[1, 3] < alone + 3 and .4 < w.share[1, 3] < .42
    assert bubble(llm).set_index("rank").share[1] > .35


def test_modules_add_up_to_the_device(profiles):
    "Each kernel belongs to one module: the tree's roots are the official computing time."
    p = open_profile(profiles / "vision_level1")
    for r in (0, 1):
        t = module_tree(p.ranks[r])
        official = p.table("steps").set_index("rank").computing[r] / 1000
        assert abs(t[t.depth == 1].total.sum() / official - 1) < .002 and abs(t.own.sum() / official - 1) < .002
    net = t.set_index("path").loc["DistributedDataParallel_0/AlexNet_0"]
    assert net.backward > net.forward > 2.


@pytest.mark.slow
def test_every_picture_of_the_real_ones(llm, profiles, tmp_path):
    for name, p in (("llm", llm), ("vision", open_profile(profiles / "vision_level1"))):
        done = draw_all(p, tmp_path / name, find_device("atlas-a2"))
        assert {"steps", "operators_by_time", "memory", "groups", "waits", "slow_ranks"} <= set(done)
        assert ("bubble" in done) == (name == "llm") and ("modules" in done) == (name == "vision")
        for png in (tmp_path / name).glob("*.png"): assert matplotlib.image.imread(png).std() > .05, png
    assert set(PLOTS) >= set(done)
