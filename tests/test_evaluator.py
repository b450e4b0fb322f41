"""Scores against lm-evaluation-harness itself: its own task files over the same rows, its own HFLM over the same weights."""
import json
import logging
import math
import os
import random
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from test_tasks import AWKWARD, write_mmlu

from ascend_nb.config import EvalConfig, ModelConfig
from ascend_nb.core import UserError
from ascend_nb.chances import mean_stderr, pooled_stderr
from ascend_nb.evaluator import evaluate, run, table
from ascend_nb.likelihood import Past, loglikelihoods
from ascend_nb.hf_format import load_model
from ascend_nb.model import Decoder
from ascend_nb.tasks import get_task, load_task, task_files
from ascend_nb.tokenizers import load_tokenizer

SMOL = Path(os.environ.get("ASCEND_NB_SMOLLM2", "/tmp/smollm2"))
YAML = {"mmlu": "mmlu/default/mmlu_{}.yaml", "mmlu_continuation": "mmlu/continuation/mmlu_{}.yaml", "boolq": "super_glue/boolq/default.yaml"}
BOOLQ = [dict(question="is ice cold", passage="Ice is  frozen water. ", answer=True, title="Ice"), dict(question="能飞吗", passage="企鹅 🐧 不会飞。", answer=False, title="")]


# -- the peer: lm-eval's own yaml, pointed at local files

def rows_as_on_the_hub(name, docs):
    if name == "boolq": return [dict(question=d["question"], passage=d["passage"], label=d["gold"]) for d in docs]
    return [dict(question=d["question"], choices=[d[c] for c in "ABCD"], answer=d["gold"]) for d in docs]


def peer_task(name, subject, file, shots):
    import lm_eval
    from datasets import Dataset
    from lm_eval.api.task import ConfigurableTask
    from lm_eval.tasks._yaml_loader import load_yaml

    row, cfg = get_task(name), load_yaml(Path(lm_eval.__file__).parent / "tasks" / YAML[name].format(subject))
    for key in ("tag", "dataset_name", "training_split"): cfg.pop(key, None)
    parts = {cfg.get("test_split") or cfg["validation_split"]: file}
    if row.shots: parts["dev"] = file.parent / row.shots.format(subject=subject)
    data = {split: Dataset.from_list(rows_as_on_the_hub(name, row.read(source))) for split, source in parts.items()}
    return ConfigurableTask(config={**cfg, "custom_dataset": lambda **kw: data, "num_fewshot": shots})


def lm_eval_scores(lm, name, path, shots, limit):
    from lm_eval.api.group import Group
    from lm_eval.evaluator import evaluate as lm_evaluate

    logging.getLogger("lm_eval").setLevel("ERROR")
    tasks = [peer_task(name, subject, file, shots) for subject, file in task_files(get_task(name), path).items()]
    groups = {}
    if get_task(name).subtask:
        groups[name] = Group.from_config(dict(group=name, aggregate_metric_list=[dict(metric=m, weight_by_size=True) for m in get_task(name).metrics],
                                              metadata=dict(version=get_task(name).group_version)))
        for t in tasks: groups[name].add(t)
    return lm_evaluate(lm, {"tasks": {t.task_name: t for t in tasks}, "groups": groups}, limit=limit or None)


def compare(ours, theirs, name):
    "Every prompt, continuation and log-likelihood, every number of the result. Returns the largest difference of a log-likelihood."
    mine, worst = {}, 0.0
    for s in ours["samples"]: mine.setdefault(get_task(name).subtask.format(subject=s["subject"]) or name, []).append(s)
    assert list(mine) == list(theirs["samples"])
    for key, samples in theirs["samples"].items():
        for a, b in zip(sorted(samples, key=lambda s: s["doc_id"]), mine[key], strict=True):
            assert (a["doc_id"], a["target"]) == (b["doc_id"], b["gold"])
            assert [tuple(x) for x in a["arguments"]] == [(b["prompt"], " " + c) for c in b["choices"]]
            assert {m: a[m] for m in get_task(name).metrics} == {m: b[m] for m in get_task(name).metrics}
            worst = max(worst, *(abs(r[0] - lp) for r, lp in zip(a["filtered_resps"], b["logprobs"], strict=True)))
    for key, row in theirs["results"].items():
        assert {k for k in row if "," in k} | {"alias"} <= set(ours["results"][key])
        for k in (k for k in row if "," in k): assert ours["results"][key][k] == (pytest.approx(row[k], abs=1e-12) if row[k] != "N/A" else "N/A"), (key, k)
    for part in ("n-samples", "n-shot", "versions", "higher_is_better"): assert ours[part] == theirs[part], part
    assert ("groups" in ours) == ("groups" in theirs)
    assert worst < 1e-4
    return worst


# -- tiny models with weights that transformers made

def save_tiny(folder, vocab_size, positions=1024):
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    LlamaForCausalLM(LlamaConfig(vocab_size=vocab_size, hidden_size=64, intermediate_size=96, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2,
                                 max_position_embeddings=positions, initializer_range=0.3, bos_token_id=0, eos_token_id=0)).save_pretrained(folder)
    return folder


def save_bpe(folder, bos: bool):
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers

    t = Tokenizer(models.BPE())
    t.pre_tokenizer, t.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    text = [f"{r[0]} A. {r[1]} B. {r[2]} C. {r[3]} D. {r[4]}\nAnswer: A Answer: B Answer: C Answer: D Question: yes no" for r in AWKWARD]
    t.train_from_iterator(text, trainers.BpeTrainer(vocab_size=420, special_tokens=["<s>"], initial_alphabet=pre_tokenizers.ByteLevel.alphabet(), show_progress=False))
    if bos: t.post_processor = processors.TemplateProcessing(single="<s> $A", pair="<s> $A $B", special_tokens=[("<s>", 0)])
    t.save(str(folder / "tokenizer.json"))
    (folder / "tokenizer_config.json").write_text(json.dumps(dict(tokenizer_class="PreTrainedTokenizerFast", bos_token="<s>", eos_token="<s>")))


def pair_of(folder, batch_size=4):
    "The same weights and tokenizer, on both sides."
    from lm_eval.models.huggingface import HFLM
    from transformers import AutoModelForCausalLM, AutoTokenizer

    hf = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    return load_model(folder), load_tokenizer(folder), HFLM(pretrained=hf, tokenizer=AutoTokenizer.from_pretrained(folder), batch_size=batch_size, device="cpu")


@pytest.fixture(scope="module", params=["bos", "plain"])
def tiny(request, tmp_path_factory):
    folder = save_tiny(tmp_path_factory.mktemp(request.param), 420)
    save_bpe(folder, request.param == "bos")
    return pair_of(folder)


@pytest.fixture
def files(tmp_path):
    (tmp_path / "dev.jsonl").write_text("".join(json.dumps(d) + "\n" for d in BOOLQ))
    return dict(mmlu=write_mmlu(tmp_path / "m", ["anatomy", "high_school_world_history"]), boolq=tmp_path / "dev.jsonl")


@pytest.mark.filterwarnings("ignore:divide by zero:RuntimeWarning") # lm-eval's own, for an option without characters
@pytest.mark.parametrize("name, shots", [("mmlu", 0), ("mmlu", 5), ("mmlu_continuation", 3), ("boolq", 0)])
def test_every_score_is_lm_evals(tiny, files, name, shots):
    model, tok, lm = tiny
    path = files[name.split("_")[0]]
    ours = evaluate(model, tok, name, path, shots, batch_size=3, quiet=True)
    compare(ours, lm_eval_scores(lm, name, path, shots, 0), name)


PAIRS = [("", "Answer"), ("", "<s> A"), ("Question:", " A"), ("Question: \n ", "A"), ("<s>Question:", " B"), ("多行问题 🙂", " 一, 🙂"), ("a", "b" * 40),
         ("Answer: A Answer:", " B Answer: C"), ("Answer: A Answer:", " B Answer: D"), ("Answer: A Answer:", " B"), ("Answer: A Answer:", " B")]


def hflm(lm, pairs):
    from lm_eval.api.instance import Instance

    return lm.loglikelihood([Instance("loglikelihood", {}, p, i) for i, p in enumerate(pairs)], disable_tqdm=True)


def agree(ours, theirs):
    return all(abs(a[0] - b[0]) < 1e-4 and a[1] == b[1] for a, b in zip(ours, theirs, strict=True))


def test_awkward_pairs_as_hflm_scores_them(tiny):
    model, tok, lm = tiny
    assert agree(loglikelihoods(model, tok, PAIRS), hflm(lm, PAIRS))


def test_what_greedy_decoding_writes_is_greedy(tiny):
    model, tok, lm = tiny
    ids = tok.encode("Question: What is 7?", special=True)
    best = tok.decode([int(model(torch.tensor([ids]))[0, -1].argmax())])
    pairs = [("Question: What is 7?", best), ("Question: What is 7?", " A")]
    ours = loglikelihoods(model, tok, pairs)
    assert agree(ours, hflm(lm, pairs)) and [g for _, g in ours] == [True, False]


def test_too_long_is_cut_from_the_left(tmp_path, files, capsys):
    folder = save_tiny(tmp_path / "model", 420, positions=64)
    save_bpe(folder, bos=True)
    model, tok, lm = pair_of(folder)
    pairs = [p for i in load_task("mmlu_continuation", files["mmlu"], 2) + load_task("mmlu", files["mmlu"], 0) for p in i.pairs()]
    assert agree(loglikelihoods(model, tok, pairs), hflm(lm, pairs))
    assert "longer than the model's 64 tokens: cut from the left" in capsys.readouterr().err
    with pytest.raises(UserError, match="Found an answer of 65 tokens; expected at most 64"): loglikelihoods(model, tok, [("Answer:", "\x00" * 65)])


def test_neither_batch_size_nor_order_changes_a_score(tiny, files):
    model, tok, _ = tiny
    pairs = [p for i in load_task("mmlu_continuation", files["mmlu"], 1, 3) for p in i.pairs()]
    alone = [loglikelihoods(model, tok, [p])[0] for p in pairs]
    order = random.Random(0).sample(range(len(pairs)), len(pairs))
    for size in (1, 5):
        mixed = loglikelihoods(model, tok, [pairs[i] for i in order], size)
        assert agree(mixed, [alone[i] for i in order])


def test_the_cost_of_an_accelerators_pass_changes_the_plan_only(tiny, files, monkeypatch):
    model, tok, _ = tiny
    pairs = [p for i in load_task("mmlu_continuation", files["mmlu"], 3) for p in i.pairs()]
    shared, calls = loglikelihoods(model, tok, pairs), []
    monkeypatch.setattr("ascend_nb.likelihood.WORTH", {})
    monkeypatch.setattr("ascend_nb.likelihood.start_of", lambda model, longest, worth: Past(model, (), worth)) # no pages there
    hidden = model.hidden
    monkeypatch.setattr(model, "hidden", lambda ids, cache=None: calls.append(ids.shape) or hidden(ids, cache=cache))
    assert agree(shared, loglikelihoods(model, tok, pairs))
    assert calls and sum(b == 1 for b, _ in calls) <= 2, "questions were read one by one"


@pytest.mark.parametrize("pages", [True, False])
def test_texts_beyond_the_trained_length_share_no_beginning(tmp_path, monkeypatch, pages):
    "longrope: the same first tokens are turned otherwise in a longer text. Each score is that of the text read alone."
    save_bpe(tmp_path, bos=True)
    tok = load_tokenizer(tmp_path)
    rope = dict(rope_type="longrope", short_factor=[1.] * 8, long_factor=[3.] * 8, original_max_position_embeddings=100)
    model = Decoder(ModelConfig(vocab_size=420, hidden_size=64, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2, max_position_embeddings=400, rope_scaling=rope, initializer_range=.2)).init_weights(3).eval()
    if not pages: monkeypatch.setattr("ascend_nb.likelihood.start_of", lambda model, longest, worth: Past(model, (), worth))
    begin = list(range(5, 75))
    pairs = [(begin + [80 + i] * n, [9 + i, 7]) for i, n in enumerate((3, 8, 60, 130, 131, 4, 25))]
    alone = []
    for c, k in pairs:
        with torch.no_grad(): logp = model(torch.tensor([c + k]))[0].log_softmax(-1)
        alone.append(sum(float(logp[len(c) + j - 1, t]) for j, t in enumerate(k)))
    assert [lp for lp, _ in loglikelihoods(model, tok, pairs)] == pytest.approx(alone, abs=1e-4)


@pytest.mark.parametrize("slots", [1, 3, 8])
def test_answers_side_by_side_are_those_of_one_by_one(tiny, slots):
    "Prompts of 3 to 700 tokens, answers of 1 to 24: each text is what the model writes when it is asked nothing else."
    from ascend_nb.config import SampleConfig
    from ascend_nb.generate import generate, prompt_ids
    from ascend_nb.writing import batch_for, write_answers

    model, tok, _ = tiny
    text = " ".join(" ".join(r) for r in AWKWARD)
    prompts, stop = ["多行\n问题 " * (i % 3) + text[:n] for i, n in enumerate((3, 300, 40, 700, 41, 302, 9, 160, 5, 80))], ("e", "\n", "\ufffd\ufffd")
    alone = [generate(model, tok, p, SampleConfig(max_new_tokens=24, stop=list(stop))) for p in prompts]
    seen = []
    batch = batch_for(model, slots)
    count, batch.step = batch.step, lambda: seen.append(len(batch.rows)) or count()
    together = write_answers(model, tok, [prompt_ids(tok, p) for p in prompts], 24, stop, batch=batch)
    assert together == alone and min(slots, 5) <= max(seen) <= slots and len(set(map(len, alone))) > 3


def test_stderrs_are_lm_evals():
    from lm_eval.api import metrics

    rng = random.Random(1)
    groups = [[float(rng.random() < .4) for _ in range(n)] for n in (2, 7, 31, 100)]
    errs = [mean_stderr(g) for g in groups]
    assert errs == pytest.approx([metrics.mean_stderr(g) for g in groups])
    assert pooled_stderr(errs, [len(g) for g in groups]) == pytest.approx(float(metrics.pooled_sample_stderr(errs, [len(g) for g in groups])))
    assert mean_stderr([1.0]) == "N/A" == pooled_stderr([0.1, "N/A"], [5, 1])


# -- the command

@pytest.fixture
def folder(tmp_path):
    save_bpe(save_tiny(tmp_path / "model", 420), bos=True)
    return tmp_path / "model"


def test_command_writes_json_and_samples(folder, files, tmp_path):
    cmd = ["evaluate", "--task", "mmlu", "--data-path", files["mmlu"], "--model", folder, "--output", tmp_path / "out/result.json", "--num_fewshot", "2", "--json"]
    done = subprocess.run([sys.executable, "-c", "from ascend_nb.cli import main; raise SystemExit(main())", *map(str, cmd)], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    saved = json.loads((tmp_path / "out/result.json").read_text())
    assert json.loads(done.stdout) == saved and set(saved["results"]) == {"mmlu", "mmlu_anatomy", "mmlu_high_school_world_history"}
    lines = [json.loads(x) for x in (tmp_path / "out/samples_mmlu.jsonl").read_text().splitlines()]
    hits = [s["correct"] for s in lines]
    assert len(lines) == 2 * len(AWKWARD) and saved["results"]["mmlu"]["acc,none"] == sum(hits) / len(hits)
    assert set(lines[0]) >= {"doc", "prompt", "choices", "logprobs", "prediction", "gold", "correct"}
    assert not {p.name for p in (tmp_path / "out").iterdir()} - {"result.json", "samples_mmlu.jsonl"}


def test_the_table_is_all_of_stdout(folder, files, capsys):
    result = run(EvalConfig(model=str(folder), data_path=str(files["mmlu"]), num_fewshot=0, limit=2, device="cpu"))
    out = capsys.readouterr().out
    assert out == table(result) + "\n" and out.split("\n")[-2].split()[:2] == ["total", "4"]
    assert result["n-samples"]["mmlu_anatomy"] == dict(original=len(AWKWARD), effective=2)


def test_nothing_is_left_when_the_model_computes_nan(folder, files, tmp_path):
    from safetensors.torch import load_file, save_file

    weights = load_file(folder / "model.safetensors")
    weights["model.norm.weight"][:] = math.nan
    save_file(weights, folder / "model.safetensors", {"format": "pt"})
    cfg = EvalConfig(model=str(folder), data_path=str(files["boolq"]), task="boolq", output=str(tmp_path / "out/result.json"), device="cpu")
    with pytest.raises(UserError, match="Found 4 of 4 scores that are not a number"): run(cfg)
    assert not (tmp_path / "out").exists()


def test_mistakes_come_before_the_model_is_loaded(files, tmp_path):
    with pytest.raises(UserError, match="Pass the folder that holds them"): run(EvalConfig(model="/nowhere", data_path=str(tmp_path / "m")))
    with pytest.raises(UserError, match="/nowhere"): run(EvalConfig(model="/nowhere", data_path=str(files["mmlu"])))
    with pytest.raises(UserError, match="result.json"): run(EvalConfig(model="/nowhere", data_path=str(files["mmlu"]), output=str(tmp_path)))


# -- real questions

@pytest.mark.parametrize("name, shots, limit", [("mmlu", 5, 2), ("mmlu_continuation", 0, 3), ("boolq", 0, 12)])
def test_real_questions_with_llamas_tokenizer(shared_data, name, shots, limit, tmp_path):
    folder = save_tiny(tmp_path / "model", 32000, positions=2048)
    (folder / "tokenizer.model").write_bytes((shared_data / "tokenizers/llama2.model").read_bytes())
    (folder / "tokenizer_config.json").write_text(json.dumps(dict(tokenizer_class="LlamaTokenizer", add_bos_token=True, bos_token="<s>", eos_token="</s>", unk_token="<unk>")))
    model, tok, lm = pair_of(folder)
    assert tok.encode("x", special=True)[0] == tok.bos_token_id == 1
    path = shared_data / ("eval/boolq/dev.jsonl" if name == "boolq" else "eval/mmlu/test")
    compare(evaluate(model, tok, name, path, shots, limit, 4, quiet=True), lm_eval_scores(lm, name, path, shots, limit), name)


@pytest.mark.slow
@pytest.mark.parametrize("name, shots, limit", [("mmlu", 0, 5), ("mmlu", 5, 2), ("mmlu_continuation", 5, 1), ("boolq", 0, 20)])
def test_smollm2_scores_as_in_lm_eval(shared_data, name, shots, limit):
    if not (SMOL / "model.safetensors").is_file(): pytest.skip(f"no SmolLM2 at {SMOL}: ascend_nb fetch smollm2-135m --to DIR, and set ASCEND_NB_SMOLLM2")
    model, tok, lm = pair_of(SMOL, 8)
    path = shared_data / ("eval/boolq/dev.jsonl" if name == "boolq" else "eval/mmlu/test")
    ours = evaluate(model, tok, name, path, shots, limit, 8, quiet=True)
    print(name, shots, compare(ours, lm_eval_scores(lm, name, path, shots, limit), name))
