"""The page of findings on real recordings: each sentence's number against a sum made here."""
import json
import shutil
import subprocess

import pandas as pd
import pytest
from ascend_nb.cli import main
from ascend_nb.config import ProfileConfig
from ascend_nb.core import MESSAGES
from ascend_nb.findings import FUSED, RULES, find_all
from ascend_nb.hardware import find_device
from ascend_nb.profile_files import open_profile
from ascend_nb.profile_report import ask_msprof, run

OUT = "ASCEND_PROFILER_OUTPUT"


def test_findings_of_the_llm(profiles):
    p = open_profile(profiles / "qwen3_0.6b_tp1pp2dp2")
    found = {}
    for f in find_all(p, find_device("atlas-a2")): found.setdefault(f.rule, []).append(f)
    csvs = [pd.read_csv(x) for x in sorted(profiles.glob("qwen3*/level2/*/" + OUT + "/step_trace_time.csv"))]
    shares = [float((c["Communication(Not Overlapped)"] / c["Stage"]).iloc[0]) for c in csvs]
    assert found["exposed"][0].facts["share"] == pytest.approx(sum(shares) / 4)
    assert {(f.facts["rank"], f.facts["other"]) for f in found["waits"]} == {(0, 2), (1, 3), (2, 0), (3, 1)}
    assert found["casts"][0].facts["share"] > .01 and "family" not in found  # this model has fused operators
    assert all(len(f.evidence) for fs in found.values() for f in fs)


def unfused(folder, tmp_path): # a recording with an RMSNorm of parts: 28 % of time in operators of 6 us
    out = shutil.copytree(folder, tmp_path / "x_ascend_pt" / OUT)
    rows = [("MatMulV3", "AI_CORE", 100.)] * 72 + [("Pows", "AI_VECTOR_CORE", 6.), ("ReduceMean", "AI_VECTOR_CORE", 6.), ("Rsqrt", "AI_VECTOR_CORE", 6.), ("Mul", "AI_VECTOR_CORE", 7.), ("Mul", "AI_VECTOR_CORE", 3.)] * 100
    at, lines = 10.**9, ["Step Id,Name,Type,Accelerator Core,Start Time(us),Duration(us)"]
    for n, core, us in rows: lines.append(f"5,aclnn{n},{n},{core},{at:.3f}\t,{us}"); at += us
    (out / "kernel_details.csv").write_text("\n".join(lines) + "\n")
    (out / "step_trace_time.csv").write_text("Step,Computing,Communication(Not Overlapped),Overlapped,Communication,Free,Stage\n5,10000,0,0,0,0,10000\n")
    for p in out.iterdir():
        if p.name not in ("kernel_details.csv", "step_trace_time.csv"): p.unlink()
    return out.parent


def test_small_operators_that_are_an_rmsnorm(samples, tmp_path):
    p = open_profile(unfused(samples / "npu_profile/rank0_ascend_pt" / OUT, tmp_path))
    found = {f.rule: f for f in find_all(p)}
    assert str(found["small"]).startswith("28% of time is in operators shorter than 20 us") and str(found["small"]).endswith("try fused RMSNorm")
    assert found["family"].facts["what"] == "RMSNorm" and found["family"].cost == pytest.approx(.28)
    assert set(found["family"].evidence.type) <= set(FUSED["RMSNorm"])


def test_every_rule_has_its_sentence_in_both_languages():
    assert all(MESSAGES[f"finding_{r}"][0] and MESSAGES[f"finding_{r}"][1] for r in RULES)


def test_the_command_writes_what_it_says(samples, tmp_path, capsys):
    code = main(["profile", str(samples / "npu_profile/rank1_ascend_pt"), "--baseline", str(samples / "npu_profile/rank0_ascend_pt"), "--perfetto", str(tmp_path / "t"), "--steps", "6", "6", "--out", str(tmp_path / "out"), "--json"])
    d = json.loads(capsys.readouterr().out)
    assert code == 0
    assert d["ranks"] == [1] and d["steps"] == [5, 6] and d["level"] == "Level1" and any("MatMulV3: 0.66" in c for c in d["changes"])
    assert (tmp_path / "t/rank1.json.gz").is_file() and d["findings"][0]["evidence"]
    numbers = pd.read_csv(tmp_path / "out/comparison_operators.csv", index_col=0)
    assert (numbers.ms_after - numbers.ms_before - numbers.change_ms).abs().max() < 1e-6
    assert {f.stem for f in (tmp_path / "out").glob("*.png")} - {f.stem for f in (tmp_path / "out").glob("*.csv")} == {"comparison"}, "each picture has its numbers"


@pytest.mark.slow
def test_msprof_analyze_where_it_is_installed(profiles, tmp_path):
    if not shutil.which("msprof-analyze"): pytest.skip("msprof-analyze is not installed (extra `profile`)")
    files = ask_msprof(profiles / "vision_level1/rank0_ascend_pt", tmp_path / "advice")
    assert any(f.endswith(".html") for f in files)
    subprocess.run(["msprof-analyze", "cluster", "-m", "all", "-d", str(profiles / "vision_level1"), "-o", str(tmp_path / "cluster")], check=True, capture_output=True)
    theirs = pd.read_csv(next((tmp_path / "cluster").rglob("cluster_step_trace_time.csv")))
    ours = open_profile(profiles / "vision_level1").table("steps").set_index("rank")
    for _, r in theirs[theirs.Type == "rank"].iterrows():
        for a, b in (("computing", "Computing"), ("exposed", "Communication(Not Overlapped)"), ("free", "Free")): assert ours[a][int(r["Index"])] == pytest.approx(r[b], abs=.01)


def test_the_real_ones_in_a_run(profiles, tmp_path):
    out = run(ProfileConfig(path=str(profiles / "vision_level1")), json=True)
    assert out["ranks"] == [0, 1] and out["missing"] == [] and [f["rule"] for f in out["findings"]][:2] == ["exposed", "vector"]
