"""The main job end to end, through the command line and from an installed wheel."""
import json
import os
import subprocess
import sys
import zipfile

import pytest
from conftest import ROOT

CODE = "import sys; from ascend_nb.cli import main; sys.exit(main())"


def quickstart(folder, *flags, env=None):
    return subprocess.run([sys.executable, "-c", CODE, "quickstart", *flags], cwd=folder, capture_output=True, text=True, env=env)


@pytest.fixture(scope="session")
def wheel(tmp_path_factory):
    "The wheel, built from this checkout and unpacked."
    out = tmp_path_factory.mktemp("wheel")
    subprocess.run([sys.executable, "-m", "pip", "wheel", "-q", "--no-deps", "-w", out, ROOT], check=True, capture_output=True)
    with zipfile.ZipFile(next(out.glob("*.whl"))) as z: z.extractall(out / "site")
    return out / "site"


def test_wheel_holds_samples_and_every_module(wheel):
    assert {p.name for p in (wheel / "ascend_nb/data_samples").iterdir()} >= {"tales.jsonl", "instruct.json", "town_quiz", "tokenizer"}
    mine = {str(p.relative_to(ROOT)) for p in (ROOT / "ascend_nb").rglob("*.py")}
    assert mine <= {str(p.relative_to(wheel)) for p in wheel.rglob("*.py")}
    meta = next(wheel.glob("*.dist-info/METADATA")).read_text(encoding="utf-8")
    assert "Provides-Extra: npu" in meta and "ascend_nb=ascend_nb.cli:main" in next(wheel.glob("*.dist-info/entry_points.txt")).read_text().replace(" ", "")


@pytest.fixture(scope="session")
def done(wheel, tmp_path_factory):
    "(an empty folder where the wheel's quickstart ran, what it printed)"
    folder = tmp_path_factory.mktemp("empty")
    out = quickstart(folder, "--pretrain-iters", "12", "--sft-iters", "3", "--json", env={**os.environ, "PYTHONPATH": str(wheel)})
    assert out.returncode == 0, out.stderr
    return folder, json.loads(out.stdout)


def test_quickstart_from_the_wheel_in_an_empty_folder(done):
    folder, got = done
    assert got["runs"]["pretrain"]["loss"] < got["runs"]["pretrain"]["first_loss"] - 1
    made = folder / "quickstart_run"
    assert (made / "loss.png").read_bytes()[:4] == b"\x89PNG"
    assert {p.name for p in (made / "data").iterdir()} >= {f"tales_text_document.{e}" for e in ("bin", "idx")} | {
        f"instruct_packed_{k}_document.{e}" for k in ("input_ids", "attention_mask", "labels") for e in ("bin", "idx")}
    score = json.loads((made / "score_sft.json").read_text(encoding="utf-8"))
    assert set(score["results"]) >= {"mmlu_continuation"} and 0 <= score["results"]["mmlu_continuation"]["acc,none"] <= 1


def test_transformers_opens_what_quickstart_made(done):
    import torch
    from ascend_nb.hf_format import load_model
    from transformers import AutoModelForCausalLM, AutoTokenizer
    folder = done[0] / done[1]["runs"]["sft"]["hf"]
    tok, peer, ours = AutoTokenizer.from_pretrained(folder), AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval(), load_model(folder)
    ids = tok.apply_chat_template([{"role": "user", "content": "What pet does Mira keep?"}], add_generation_prompt=True, return_tensors="pt", return_dict=True)["input_ids"]
    with torch.no_grad(): assert (peer(ids).logits - ours(ids)).abs().max() < 1e-5


@pytest.mark.slow
def test_quickstart_learns(tmp_path):
    "The real thing: memorised text, a right answer, a score far above chance, twice the same."
    runs = []
    for name in ("a", "b"):
        out = quickstart(tmp_path, "--out", name, "--json")
        assert out.returncode == 0, out.stderr
        runs.append(json.loads(out.stdout))
    a, b = runs
    assert a["memorised"][0] == a["memorised"][1] and "parrot" in a["answer"] and a["acc"]["sft"] > .6
    assert (a["story"], a["answer"], a["acc"]) == (b["story"], b["answer"], b["acc"])
    assert a["runs"]["sft"]["loss"] == b["runs"]["sft"]["loss"]
