"""A model in several processes says what it says in one: words, draws, scores, and what a user is told."""
import json
import os
import subprocess
import sys

import pytest
import torch
from conftest import ROOT
from generate_worker import SHAPES

from ascend_nb.checkpoint import RunDir, save_step
from ascend_nb.config import DataConfig, EvalConfig, GenerateConfig, ModelConfig, RunConfig
from ascend_nb.convert import as_model
from ascend_nb.core import UserError
from ascend_nb.dcp_format import open_step
from ascend_nb.evaluator import run as run_evaluate
from ascend_nb.generate import run as run_generate
from ascend_nb.hf_format import SafeFile, load_state, save_model
from ascend_nb.many_devices import open_model, shape_of
from ascend_nb.mesh import launch
from ascend_nb.model import Decoder
from ascend_nb.schema import save_yaml
from ascend_nb.tokenizers import load_tokenizer

WORDS, SCORES = ["words"], ["scores"]


@pytest.fixture(scope="module")
def models(tmp_path_factory, samples):
    "A Hugging Face folder of every shape, and a run folder."
    home, tok = tmp_path_factory.mktemp("models"), load_tokenizer(samples / "tokenizer")
    for name, shape in SHAPES.items(): save_model(Decoder(ModelConfig(**shape)).init_weights(), home / name, tok)
    return home


def save_run(folder, cfg, tokenizer):
    "What `train` leaves before it is done: a config and a step."
    model = Decoder(cfg).init_weights(7)
    for n, b in model.named_buffers(): b.copy_(torch.linspace(-.5, .5, b.numel())) if n.endswith("bias") else None
    run = RunDir(folder)
    run.path.mkdir()
    save_yaml(RunConfig(model=cfg, data=DataConfig(tokenizer_name_or_path=str(tokenizer))), run.config_path)
    save_step(run.step_path(3), {f"model.{n}": p.detach() for n, p in model.named_parameters()} | {f"buffer.{n}": b for n, b in model.named_buffers()}, dict(step=3))
    return model.eval()


def run(rows, n, samples):
    "Every case in one world of n processes; the rows that each process wrote."
    quiz = str(samples / "town_quiz" / "test")
    outs = launch([ROOT / "tests" / "generate_worker.py", json.dumps([dict(quiz=quiz, **{**r, "folder": str(r["folder"])}) for r in rows]), samples / "tokenizer"], n, 600)
    assert all(code == 0 for code, *_ in outs), "\n".join(err[-2500:] for code, _, err in outs if code)
    found = [[json.loads(x) for x in out.splitlines() if x.startswith("{")] for _, out, _ in outs]
    assert all(len(f) == len(rows) for f in found)
    return found


def same(found):
    for of_ranks in zip(*found, strict=True):
        for r in of_ranks:
            assert "error" not in r, r
            if "words" in r:
                one, many, one_drawn, many_drawn = r["words"]
                assert one == many and one_drawn == many_drawn and one != one_drawn, (r["row"], r["words"])
                assert r["words"] == of_ranks[0]["words"], "processes disagree"
            if "results" in r:
                assert r["far"] < 1e-4 and r["questions"] > 5, (r["row"], r["far"])
                assert r["results"][0] == r["results"][1] == of_ranks[0]["results"][0]
        row = of_ranks[0]["row"]  # a share of the numbers, and of what must be whole the norms alone
        if "tp" in row: assert all(r["held"] < 1 / row["tp"] + .06 for r in of_ranks), (row, [r["held"] for r in of_ranks])


def test_words_and_scores_in_two_processes(models, samples, tmp_path):
    save_run(tmp_path / "run", ModelConfig(**SHAPES["mla"]), samples / "tokenizer")
    grids = dict(tp=2), dict(pp=2)
    rows = [dict(folder=models / s, ask=WORDS, **g) for s in ("dense", "moe", "mla") for g in grids]
    rows += [dict(folder=models / "moe", ask=SCORES, tp=2), dict(folder=models / "dense", ask=SCORES, pp=2), dict(folder=models / "tied", ask=SCORES)] # the last one: two copies
    rows += [dict(folder=tmp_path / "run", ask=WORDS, **g) for g in grids]
    same(run(rows, 2, samples))


@pytest.mark.slow
def test_every_shape_and_product_in_four_processes(models, samples):
    rows = [dict(folder=models / s, ask=[*WORDS, *SCORES], tp=2, pp=2) for s in SHAPES]
    rows += [dict(folder=models / s, ask=SCORES, **g) for s in ("dense", "mla") for g in (dict(tp=2), dict(pp=2), {})]
    rows += [dict(folder=models / s, ask=WORDS, tp=4) for s in ("gpt2", "bloom", "mla")] + [dict(folder=models / "moe", ask=WORDS, pp=4)]
    same(run(rows, 4, samples))


def test_a_run_folder_is_read_by_one_process(tmp_path, samples):
    model = save_run(tmp_path / "run", ModelConfig(**SHAPES["mla"]), samples / "tokenizer")
    x = torch.arange(12)[None]
    for path in (tmp_path / "run", tmp_path / "run" / "step_0000003"):
        assert torch.equal(open_model(path)(x), model(x))
    assert torch.equal(as_model(open_step(tmp_path / "run", shape_of(tmp_path / "run")))(x), model(x)) # the converter's way
    assert run_generate(GenerateConfig(model=str(tmp_path / "run"), prompt="The town", max_new_tokens=4, device="cpu"), json=True)["tokens"] == 4


def command(name, folder, *more): return ["-m", "ascend_nb.cli", name, "--model", folder, "--device", "cpu", *more]


def test_the_first_process_speaks(models):
    more = "--prompt", "The town of", "--max-new-tokens", "8"
    (code, out, err), (other, nothing, silence) = launch(command("generate", models / "dense", *more, "--tensor-model-parallel-size", "2"), 2)
    assert (code, other, nothing, silence) == (0, 0, "", "")
    want = run_generate(GenerateConfig(model=str(models / "dense"), prompt="The town of", max_new_tokens=8, device="cpu"), json=True)
    assert out == want["text"] + "\n" and "8 tokens" in err


def test_copies_share_the_questions(models, samples, tmp_path):
    quiz = samples / "town_quiz" / "test"
    outs = launch(command("evaluate", models / "dense", "--data-path", quiz, "--num-fewshot", "2", "--output", tmp_path / "r.json"), 2)
    assert [code for code, *_ in outs] == [0, 0] and outs[1][1] == "" and "total" in outs[0][1]
    one = run_evaluate(EvalConfig(model=str(models / "dense"), data_path=str(quiz), num_fewshot=2, device="cpu"), json=True)
    many = json.loads((tmp_path / "r.json").read_text())
    assert many["results"] == json.loads(json.dumps(one["results"])) and many["n-samples"] == one["n-samples"]
    assert len((tmp_path / "samples_mmlu.jsonl").read_text().splitlines()) == sum(n["effective"] for n in one["n-samples"].values())


@pytest.mark.parametrize("name, words", [("odd", "num_key_value_heads = 3 is not divisible by tp = 2"), ("gone", "Found nothing at")])
def test_a_misfit_is_told_once_and_ends_all(tmp_path, samples, name, words):
    save_model(Decoder(ModelConfig(vocab_size=1024, hidden_size=48, num_hidden_layers=3, num_attention_heads=3, num_key_value_heads=3)).init_weights(), tmp_path / "odd",
               load_tokenizer(samples / "tokenizer"))
    outs = launch(command("generate", tmp_path / name, "--prompt", "a", "--tensor-model-parallel-size", "2"), 2)
    assert [code for code, *_ in outs] == [2, 2]
    said = "".join(err for *_, err in outs)
    assert said.count("ascend_nb:") == 1 and words in said and "Traceback" not in said, said


def test_a_number_of_processes_that_does_not_fit(models):
    for size in ("tensor_model_parallel_size", "pipeline_model_parallel_size"):
        with pytest.raises(UserError, match="Found 1 processes; expected tp x pp = 2"): run_generate(GenerateConfig(model=str(models / "dense"), prompt="a", **{size: 2}))
        with pytest.raises(UserError, match="Found 1 processes; expected a multiple of"): run_evaluate(EvalConfig(model=str(models / "dense"), data_path="x", **{size: 2}))


@pytest.mark.slow
def test_a_talk_under_torchrun(models):
    "The user speaks to the first process; all of them hear it."
    flags = "--max-new-tokens", "6", "--tensor-model-parallel-size", "2", "--json"
    start = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2", "--rdzv-backend", "c10d", "--rdzv-endpoint", "localhost:0", *command("chat", models / "dense", *flags)]
    done = subprocess.run([str(x) for x in start], input="Where is the harbour?\nclear\nAnd the ferry?\nq\n", capture_output=True, text=True, timeout=300, env={**os.environ, "OMP_NUM_THREADS": "1"})
    assert done.returncode == 0, done.stderr[-3000:]
    alone = subprocess.run([str(x) for x in (sys.executable, *command("chat", models / "dense", "--max-new-tokens", "6", "--json"))], input="Where is the harbour?\nclear\nAnd the ferry?\nq\n",
                           capture_output=True, text=True, timeout=300)
    turns, want = (json.loads(x.stdout)["turns"] for x in (done, alone))
    assert [t["answer"] for t in turns] == [t["answer"] for t in want] and len(turns) == 2


def test_a_part_of_a_folder_is_read_alone(models, monkeypatch):
    "What a process does not hold is not read."
    asked, read = [], SafeFile.read
    monkeypatch.setattr(SafeFile, "read", lambda self, name: asked.append(name) or read(self, name))
    got = load_state(models / "moe", shape_of(models / "moe"), keep={"model.norm.weight": None})
    assert list(got) == ["model.norm.weight"] == asked
