"""Intervals and significance against scipy; several tasks and models; a run that is killed goes on; tasks of one's own."""
import json
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from test_evaluator import save_bpe, save_tiny
from test_tasks import AWKWARD, write_mmlu

from ascend_nb.chances import mcnemar, paired_bootstrap, wilson
from ascend_nb.comparing import compare, read_result
from ascend_nb.config import EvalConfig
from ascend_nb.core import UserError
from ascend_nb.evaluator import run

CLI = [sys.executable, "-c", "from ascend_nb.cli import main; raise SystemExit(main())"]


def ascend_nb(*args, **kw):
    return subprocess.run([*CLI, *map(str, args)], capture_output=True, text=True, **kw)


def test_wilson_and_mcnemar_are_scipys():
    from scipy.stats import binomtest

    for k, n in ((0, 5), (3, 7), (50, 100), (100, 100), (999, 2000)):
        ci = binomtest(k, n).proportion_ci(method="wilson")
        assert wilson(k, n) == pytest.approx((ci.low, ci.high), abs=1e-6)
    rng = random.Random(3)
    for n in (10, 60, 400, 3000, 40000):
        a, b = ([int(rng.random() < p) for _ in range(n)] for p in (.4, .5))
        only_a, only_b, p = mcnemar(a, b)
        assert only_a == sum(x and not y for x, y in zip(a, b, strict=True)) and p == pytest.approx(binomtest(only_b, only_a + only_b).pvalue, rel=1e-9)
    assert mcnemar([1, 0], [1, 0]) == (0, 0, 1.0)


def test_the_bootstraps_interval_is_scipys():
    import numpy as np
    from scipy.stats import bootstrap

    rng = random.Random(5)
    a, b = ([rng.random() ** e for _ in range(120)] for e in (1, .8))
    d = np.array(b) - np.array(a)
    ci = bootstrap((d,), np.mean, method="percentile", n_resamples=4000, rng=np.random.default_rng(1)).confidence_interval
    assert paired_bootstrap(a, b) == pytest.approx((ci.low, ci.high), abs=0.01)
    assert paired_bootstrap(a, b) == paired_bootstrap(a, b)


@pytest.fixture(scope="module")
def room(tmp_path_factory):
    "Two models and two benchmarks below one folder."
    import torch
    from safetensors.torch import load_file, save_file

    root = tmp_path_factory.mktemp("compare")
    save_bpe(save_tiny(root / "base", 420), bos=True)
    save_bpe(save_tiny(root / "tuned", 420), bos=True)
    weights = load_file(root / "tuned/model.safetensors")
    save_file({k: v + 0.1 * torch.randn(v.shape, generator=torch.Generator().manual_seed(1)) for k, v in weights.items()}, root / "tuned/model.safetensors", {"format": "pt"})
    write_mmlu(root / "eval/mmlu", ["anatomy", "virology"])
    (root / "eval/boolq").mkdir()
    (root / "eval/boolq/dev.jsonl").write_text("".join(json.dumps(dict(question=f"is {i} even", passage=f"{i} is a number.", answer=i % 2 == 0)) + "\n" for i in range(9)))
    return root


def test_two_models_on_two_tasks(room, tmp_path):
    done = ascend_nb("evaluate", "--model", room / "base", "--model", room / "tuned", "--data-path", room / "eval", "--tasks", "mmlu,boolq", "--num-fewshot", 0, "--device", "cpu", "--output", tmp_path / "both.json")
    assert done.returncode == 0, done.stderr
    found = json.loads((tmp_path / "both.json").read_text())
    assert found["models"] == ["base", "tuned"] and list(found["tasks"]) == ["mmlu", "boolq"] and (tmp_path / "both.png").read_bytes()[:4] == b"\x89PNG"
    a, b = (read_result(tmp_path / f"{n}/both.json") for n in ("1_base", "2_tuned"))
    for t in ("mmlu", "boolq"):
        row, wins = found["tasks"][t]["rows"][1], [(x["acc"], y["acc"]) for x, y in zip(a["samples"][t], b["samples"][t], strict=True)]
        assert (row["only_base"], row["only_this"]) == (sum(x > y for x, y in wins), sum(x < y for x, y in wins)) and row["n"] == len(wins)
        assert row["score"] == pytest.approx(b["results"][t]["acc,none"])
    again = ascend_nb("compare", tmp_path / "1_base/both.json", tmp_path / "2_tuned/both.json", "--plot", tmp_path / "bars.svg", "--json")
    def numbers(f): return {t: [{k: v for k, v in r.items() if k != "model"} for r in x["rows"]] for t, x in f["tasks"].items()}
    assert numbers(json.loads(again.stdout)) == numbers(found) and "<svg" in (tmp_path / "bars.svg").read_text()
    assert "better : worse" in done.stdout and done.stdout.count("(lm-eval)") == 6


def test_other_questions_are_not_compared(room, tmp_path):
    for name, limit in (("a", 2), ("b", 3)): run(EvalConfig(str(room / "base"), str(room / "eval"), "boolq", limit=limit, output=str(tmp_path / name / "r.json"), device="cpu"), json=True)
    done = ascend_nb("compare", tmp_path / "a/r.json", tmp_path / "b/r.json")
    assert done.returncode == 2 and "Found 2 questions of boolq in the first result and 3 for b, 2 of them the same" in done.stderr
    assert ascend_nb("compare", tmp_path / "a/r.json").returncode == 2
    (tmp_path / "a/samples_boolq.jsonl").unlink()
    with pytest.raises(UserError, match="is no result of `ascend_nb evaluate`"): read_result(tmp_path / "a/r.json")
    with pytest.raises(UserError, match="Name the results of two models"): compare({"a": {}})


@pytest.mark.parametrize("protocol", ["lm-eval", "modellink"])
def test_a_killed_run_goes_on(room, tmp_path, protocol):
    "SIGKILL in the middle: the second run asks what is left, and the result is that of a run that was left alone."
    out, slow = tmp_path / "r.json", "import ascend_nb.evaluator as e, time; e.TOGETHER = e.WRITTEN = 2; add = e.Log.add\ndef patient(self, s): add(self, s); time.sleep(0.3)\ne.Log.add = patient\n"
    args = ["evaluate", "--model", str(room / "base"), "--data-path", str(room / "eval"), "--task", "mmlu", "--protocol", protocol, "--num-fewshot", "1", "--device", "cpu", "--output", str(out)]
    child = subprocess.Popen([sys.executable, "-c", slow + f"from ascend_nb.cli import main; raise SystemExit(main({args!r}))"], stderr=subprocess.DEVNULL, stdout=subprocess.DEVNULL)
    part, end = tmp_path / "samples_mmlu.jsonl.part", time.time() + 120
    while time.time() < end and not (part.exists() and part.read_text().count("\n") >= 5): time.sleep(0.05)
    os.kill(child.pid, signal.SIGKILL); child.wait()
    known = part.read_text().count("\n") - 1
    assert 4 <= known < 12 and not out.exists()
    with open(part, "a") as f: f.write('{"subject": "anat') # the line it was in
    done = ascend_nb(*args)
    assert done.returncode == 0 and f"{known} questions were answered before" in done.stderr
    one = run(EvalConfig(str(room / "base"), str(room / "eval"), "mmlu", protocol, num_fewshot=1, device="cpu", output=str(tmp_path / "alone/r.json")), json=True)
    assert json.loads(out.read_text())["results"] == one["results"]
    lines = [[json.loads(x) for x in p.read_text().splitlines()] for p in (tmp_path / "samples_mmlu.jsonl", tmp_path / "alone/samples_mmlu.jsonl")]
    assert [(x["prompt"], x["correct"]) for x in lines[0]] == [(x["prompt"], x["correct"]) for x in lines[1]] and not part.exists()


def test_another_question_starts_anew(room, tmp_path, capsys):
    cfg = dict(model=str(room / "base"), data_path=str(room / "eval"), task="boolq", device="cpu", output=str(tmp_path / "r.json"))
    from ascend_nb.evaluator import Log
    Log(tmp_path / "samples_boolq.jsonl.part", dict(of="another")).add([dict(subject="", doc_id=0, acc=1.0)])
    run(EvalConfig(**cfg), json=True)
    assert "answered before" not in capsys.readouterr().err and len((tmp_path / "samples_boolq.jsonl").read_text().splitlines()) == 9


def test_own_tasks(room, tmp_path):
    (tmp_path / "q.jsonl").write_text("".join(json.dumps(dict(q=f"What is {i}?", options=["A", "B"], gold=i % 2, answer=str(i))) + "\n" for i in range(4)))
    (tmp_path / "choice.yaml").write_text("files: q.jsonl\ntext: 'Question: {q}\\nAnswer:'\nchoices: options\nshots: own\nnum_fewshot: 1\nmetrics: [acc, acc_norm]\n")
    (tmp_path / "write.yaml").write_text("name: numbers\nfiles: q.jsonl\nrows: {columns: [q], answer: {text: answer}}\ntext: '{q}'\nmax_new_tokens: 3\nmarks: {acc: [{regex: '([0-9]+)'}]}\n")
    out = run(EvalConfig(str(room / "base"), "anywhere", f"{tmp_path}/choice.yaml, {tmp_path}/write.yaml", device="cpu", output=str(tmp_path / "r.json")), json=True)
    assert out["protocol"] == {"choice": "own", "numbers": "own"} and out["results"]["choice"]["sample_len"] == 3 and out["results"]["numbers"]["sample_len"] == 4
    line = json.loads((tmp_path / "samples_numbers.jsonl").read_text().splitlines()[1])
    assert {"prompt", "output", "extracted", "gold", "correct"} <= set(line) and line["gold"] == "1"
    done = ascend_nb("evaluate", "--model", room / "base", "--data-path", tmp_path, "--task", tmp_path / "none.yaml")
    assert done.returncode == 2 and "expected a YAML file that describes a task" in done.stderr


QUESTION, CODE = dict(question="q {}", answer="It is 1+1=<<1+1=2>>2.\n#### 2"), dict(task_id="x/0", prompt="def f(a):\n", entry_point="f", test="def check(f): assert f(1) == 1\n")
EVERY = { # task -> files, as the benchmark lays them out
    "ceval": {f"ceval/{p}/logic_{p}.csv": "id,question,A,B,C,D,answer\n0,q1,1,2,3,4,A\n1,q2,1,2,3,4,D\n" for p in ("val", "dev")},
    "cmmlu": {f"cmmlu/{p}/arts.csv": ",Question,A,B,C,D,Answer\n0,q1,1,2,3,4,A\n1,q2,1,2,3,4,D\n" for p in ("test", "dev")},
    "agieval": {"agieval/sat-math.jsonl": "".join(json.dumps(dict(passage=None, question=f"q{i}", options=["(A)1", "(B)2"], label="AB"[i % 2])) + "\n" for i in range(4))},
    "bbh": {"bbh/word_sorting.json": json.dumps(dict(examples=[dict(input=f"b a {i}", target="a b") for i in range(5)]))},
    "gsm8k": {"gsm8k/test.jsonl": "".join(json.dumps(QUESTION | dict(question=f"q {i}")) + "\n" for i in range(8))},
    "human_eval": {"human_eval/human-eval.jsonl": json.dumps(CODE) + "\n"},
    "hellaswag": {"hellaswag/hellaswag_val.jsonl": json.dumps(dict(activity_label="Home", ctx_a="A man", ctx_b="he", endings=["a b", "c", "d e f", "g"], label=2)) + "\n"},
    "needlebench": {"needlebench/needles.jsonl": json.dumps(dict(needle="Gold is in Mill Lane.", retrieval_question="Where is it?", arg2="Mill Lane", language="English")) + "\n",
                    "needlebench/PaulGrahamEssays.jsonl": json.dumps(dict(text="The boat is old. " * 99)) + "\n"}}


@pytest.fixture(scope="module")
def every(room):
    for files in EVERY.values():
        for name, text in files.items():
            (room / "every" / name).parent.mkdir(parents=True, exist_ok=True)
            (room / "every" / name).write_text(text)
    for name in ("mmlu", "boolq"): (room / "every" / name).symlink_to(room / "eval" / name)
    return room / "every"


@pytest.mark.parametrize("protocol", ["lm-eval", "modellink"])
def test_every_task_by_every_protocol_from_the_files_to_the_log(room, every, tmp_path, protocol):
    from ascend_nb.tasks import TASKS, get_task

    names = [n for n in TASKS if get_task(n, protocol).protocol == protocol]
    assert main("evaluate", "--model", room / "base", "--data-path", every, "--tasks", ",".join(names), "--protocol", protocol, "--num-fewshot", 0, "--limit", 2, "--max-new-tokens", 4, "--needle-length", 500,
                "--device", "cpu", "--output", tmp_path / "r.json") == 0
    saved = json.loads((tmp_path / "r.json").read_text())
    assert list(saved["protocol"]) == names and set(saved["protocol"].values()) == {protocol} and len(names) >= 9
    for n in names:
        lines, task = [json.loads(x) for x in (tmp_path / f"samples_{n}.jsonl").read_text().splitlines()], get_task(n, protocol)
        assert lines and all({"prompt", "gold", "correct", *(("choices", "logprobs", "prediction") if task.choices else ("output", "extracted"))} <= set(s) for s in lines), n
        first = next(iter(task.metrics if task.choices else task.marks))
        row = saved["results"][task.group or n]
        assert row[first if "," in first else first + ",none"] == pytest.approx(sum(s[first] for s in lines) / len(lines)) and row["sample_len"] == len(lines), n


ROWS_OF = {"none": '{"question": "q", "options": ["1", "2"], "answer": 1}', "far": '{"question": "q", "options": ["1", "2"], "answer": 5}', "plain": '{"question": "q", "options": "12", "answer": 1}'}
ODD_TASKS = {("files: 5\ntext: q", "none"): "Found files=5", ("files: q.jsonl\ntext: q\nchoices: options\nmetrics: accc", "none"): "Did you mean acc?", ("files: q.jsonl\ntext: q\nstop: 3", "none"): "Found stop=3",
             ("files: q.jsonl\ntext: q\nrows: {answer: answer}", "none"): "does not say where", ("files: q.jsonl\ntext: q\nrows: {answer: {txt: a}}", "none"): "Did you mean text?",
             ("files: q.jsonl\ntext: q\nchoices: options\nrows: {format: xlsx}", "none"): "expected one of jsonl, csv", ("files: q.jsonl\ntext: q\nrows: 3", "none"): "Found rows=3",
             ("files: q.jsonl\ntext: q\nrows: {column: [a]}\nchoices: options", "none"): "Did you mean columns?", ("files: q.jsonl\ntext: q\nrows: {answer: {text: question}}\ncompare: fuzzy", "none"): "expected one of equal, needle, code",
             ("files: q.jsonl\ntext: '{question:99999999999}'\nchoices: options", "none"): "{question:99999999999}", ("files: q.jsonl\ntext: '{question.__class__}'\nchoices: options", "none"): "{question.__class__}",
             ("files: q.jsonl\ntext: q\nchoices: option", "none"): "expected a list in the column option", ("files: q.jsonl\ntext: q\nchoices: options", "plain"): "Found 12 as the options",
             ("files: q.jsonl\ntext: q\nchoices: options", "far"): "Found the answer 5 to a question of own with 2 options (q)", ("files: q.jsonl\ntext: q\nchoices: options\nshots: q.jsonl\nnum_fewshot: 1", "far"): "Found the answer 5"}


@pytest.mark.parametrize("yaml, rows", ODD_TASKS)
def test_an_own_task_that_is_none_says_why(tmp_path, yaml, rows):
    from ascend_nb.core import UserError
    from ascend_nb.evaluator import _places

    (tmp_path / "own.yaml").write_text(yaml)
    (tmp_path / "q.jsonl").write_text(ROWS_OF[rows])
    with pytest.raises(UserError) as e: _places(EvalConfig("m", str(tmp_path), str(tmp_path / "own.yaml")))
    assert ODD_TASKS[yaml, rows] in str(e.value)


def test_hellaswag_without_its_columns_is_named(tmp_path):
    from ascend_nb.core import UserError
    from ascend_nb.tasks import load_task

    for row, words in ((dict(ctx_a="a", ctx_b="b", endings=["x"], label=0), "KeyError 'activity_label'"), (dict(query="a", choices=["x", "y"], gold=2), "expected a number from 0 to 1"), (dict(query="a", choices=[], gold=0), "expected a list in the column endings")):
        (tmp_path / "hellaswag_val.jsonl").write_text(json.dumps(row))
        with pytest.raises(UserError) as e: load_task("hellaswag", tmp_path)
        assert words in str(e.value)


BAD = {("--task", ","): "Found no task", ("--task", "boolq", "--output", "own.txt/r.json"): "Cannot write own.txt/r.json", ("--task", "mmlo"): "Did you mean mmlu?", ("--tasks", "mmlu,ceval"): "for the task ceval", ("--task", "mmlu", "--defects", "x", "--protocol", "modellink"): "which is not known",
       ("--task", "mmlu", "--num-fewshot", "9"): "Found 6 worked examples", ("--protocol", "lmeval"): "Did you mean lm-eval?", ("--task", "bbh"): "expected *.json for the task bbh"}


@pytest.mark.parametrize("args", BAD, ids=" ".join)
def test_a_mistake_is_one_sentence_and_exit_code_2(room, args, capsys, monkeypatch):
    from ascend_nb.cli import main

    (room / "own.txt").write_text("not a folder")
    monkeypatch.chdir(room)
    code = main(["evaluate", "--model", str(room / "base"), "--data-path", str(room / "eval"), "--device", "cpu", *args])
    err = capsys.readouterr().err.strip()
    assert code == 2 and BAD[args] in err and err.count("ascend_nb: ") == 1


def test_a_task_with_one_protocol_says_so(room, capsys):
    out = run(EvalConfig(str(room / "base"), str(room / "eval"), "mmlu_continuation", "modellink", num_fewshot=0, limit=1, device="cpu"), json=True)
    assert out["protocol"] == {"mmlu_continuation": "lm-eval"} and "mmlu_continuation has the protocol lm-eval only" in capsys.readouterr().err


def main(*args):
    from ascend_nb.cli import main as cli

    return cli([str(a) for a in args])


@pytest.fixture
def asked(room, tmp_path):
    "A folder like base with other files in it -> `evaluate` on it."
    import shutil

    def ask(*args, positions=None, template=None, tokenizer=None, task="boolq"):
        to = tmp_path / "other"
        shutil.copytree(room / "base", to, dirs_exist_ok=True)
        if positions: (to / "config.json").write_text(json.dumps(json.loads((to / "config.json").read_text()) | dict(max_position_embeddings=positions)))
        if template: (to / "chat_template.jinja").write_text(template)
        if tokenizer: (to / "tokenizer.json").write_text(tokenizer((to / "tokenizer.json").read_text()))
        return main("evaluate", "--model", to, "--data-path", room / "eval", "--task", task, "--limit", 3, "--device", "cpu", "--output", tmp_path / "r.json", *args)

    return ask


def other_ids(text): # the same pieces, with other numbers: the tokenizer of another model
    d = json.loads(text)
    d["model"]["vocab"] = {k: 0 if v == 0 else v + 500 for k, v in d["model"]["vocab"].items()}
    return json.dumps(d)


NOBODY = "{% for m in messages if m.role == 'user' %}{{ m.content }}{% endfor %}"
REFUSES = "{% for m in messages %}{% if m.role != 'user' %}{{ raise_exception('users only') }}{% endif %}{{ m.content }}{% endfor %}"
ODD = {"too long": (dict(positions=16), (), "Found 3 of 3 prompts that are too long: the longest (question 0) has"), "answer too long": (dict(positions=30, task="mmlu"), ("--protocol", "modellink", "--num-fewshot", 1), "with its answer; expected at most 30, the model's length: it is too long by"),
       "foreign tokenizer": (dict(tokenizer=other_ids), (), "rows of the model's embedding. Use the tokenizer that the model was trained with"),
       "foreign tokenizer, written": (dict(tokenizer=other_ids, task="mmlu"), ("--protocol", "modellink", "--num-fewshot", 1), "rows of the model's embedding. Use the tokenizer that belongs to the model"),
       "no assistant": (dict(template=NOBODY), ("--chat", "true"), "expected a place for the role assistant"), "assistant refused": (dict(template=REFUSES), ("--protocol", "modellink"), "expected a place for the role assistant"),
       "unknown prompt type": ({}, ("--prompt-type", "chatm"), "Did you mean"), "no special tokens for it": ({}, ("--prompt-type", "qwen"), "in the vocabulary of")}


@pytest.mark.parametrize("case", ODD)
def test_a_model_that_does_not_fit_is_one_sentence_and_exit_code_2(asked, case, capsys, tmp_path):
    how, args, sentence = ODD[case]
    assert asked(*args, **how) == 2
    err = capsys.readouterr().err.strip()
    assert sentence in err and err.count("ascend_nb: ") == 1 and not (tmp_path / "r.json").exists()


def test_truncate_asks_all_the_same(asked, capsys, tmp_path):
    assert asked("--truncate", "true", positions=16) == 0
    assert "cut from the left" in capsys.readouterr().err and len((tmp_path / "samples_boolq.jsonl").read_text().splitlines()) == 3


def test_worked_examples_become_turns(room, tmp_path):
    from ascend_nb.asking import context
    from ascend_nb.tasks import load_task
    from ascend_nb.tokenizers import load_tokenizer

    item, tok = load_task("mmlu", room / "eval", 1, protocol="modellink")[1], load_tokenizer(room / "base")
    head, question = "The following are multiple choice questions (with answers) about  anatomy.\n\n", "{}\nA. {}\nB. {}\nC. {}\nD. {}\nAnswer:"
    shot, ask = (question.format(r[0].strip(), *r[1:5]) for r in (AWKWARD[-1], AWKWARD[1]))
    want = f"Below is an instruction that describes a task. Write a response that appropriately completes the request.\n\n### Instruction:\n{head}{shot}\n\n### Response:\n{AWKWARD[-1][5]}\n\n### Instruction:\n{ask}\n\n### Response:\n" # as Alpaca publishes its form
    assert tok.decode(context(tok, item, dict(prompt_type="alpaca")), skip_special=True) == want
    assert "".join([item.turns[0], " ", item.turns[1], "\n\n", item.turns[2]]) == item.prompt


def test_megatron_checkpoints_and_adapters_are_asked_too(room, tmp_path):
    "A checkpoint for two ranks scores as the model it came from; an adapter of peft's as the model that peft merged it into."
    import torch
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM

    assert main("convert", room / "base", tmp_path / "mg", "--to", "mcore", "--tp", 2) == 0
    torch.manual_seed(0)
    peft = get_peft_model(AutoModelForCausalLM.from_pretrained(room / "base", dtype=torch.float32), LoraConfig(r=4, target_modules=["q_proj", "v_proj"], init_lora_weights=False))
    peft.save_pretrained(tmp_path / "lora")
    peft.merge_and_unload().save_pretrained(tmp_path / "merged")
    save_bpe(tmp_path / "merged", bos=True)

    def scores(name, *args):
        assert main("evaluate", "--data-path", room / "eval", "--task", "boolq", "--device", "cpu", "--output", tmp_path / f"{name}/r.json", *args) == 0
        return [json.loads(x)["logprobs"] for x in (tmp_path / f"{name}/samples_boolq.jsonl").read_text().splitlines()]

    base = scores("a", "--model", room / "base")
    assert scores("b", "--model", tmp_path / "mg", "--tokenizer-name-or-path", room / "base") == [pytest.approx(x, abs=1e-4) for x in base]
    tuned = scores("c", "--model", room / "base", "--lora-load", tmp_path / "lora")
    assert tuned == [pytest.approx(x, abs=1e-4) for x in scores("d", "--model", tmp_path / "merged")] and tuned[0] != pytest.approx(base[0], abs=1e-2)
    assert main("evaluate", "--data-path", room / "eval", "--task", "boolq", "--model", tmp_path / "mg", "--device", "cpu") == 2


def test_modellink_asks_in_the_template_and_names_its_defects(asked, capsys, tmp_path):
    template = "{% for m in messages %}[{{ m.role }}]{{ m.content }}{% endfor %}[assistant]"
    for protocol, chat in (("modellink", True), ("lm-eval", False)):
        assert asked("--protocol", protocol, "--num-fewshot", 0, template=template, task="mmlu") == 0
        saved = json.loads((tmp_path / "r.json").read_text())
        assert saved["chat"] == {"mmlu": chat} and saved["protocol"] == {"mmlu": protocol}
        assert {n: d["repeated"] for n, d in saved["defects"]["mmlu"].items()} == ({"mmlu_bar_is_letter": False, "mmlu_random_shots": False, "errors_are_logged": False, "path_by_substring": False} if chat else {})
        assert ("of its known defects none repeated" in (err := capsys.readouterr().err)) == chat and "found 2 of 57 subjects" in err
    assert asked("--protocol", "modellink", "--num-fewshot", 0, "--chat", "false", "--defects", "mmlu_bar_is_letter", template=template, task="mmlu") == 0
    saved = json.loads((tmp_path / "r.json").read_text())
    assert saved["chat"] == {"mmlu": False} and saved["defects"]["mmlu"]["mmlu_bar_is_letter"]["repeated"] and "mmlu_bar_is_letter repeated" in capsys.readouterr().err


def test_chat_puts_each_prompt_into_the_template(room, tmp_path):
    import shutil

    shutil.copytree(room / "base", tmp_path / "chat")
    (tmp_path / "chat/chat_template.jinja").write_text("{% for m in messages %}[{{ m.role }}]{{ m.content }}{% endfor %}[assistant]")
    plain, chat = (run(EvalConfig(str(tmp_path / "chat"), str(room / "eval"), "boolq", chat=c, limit=3, device="cpu", output=str(tmp_path / str(c) / "r.json")), json=True) for c in (False, True))
    a, b = ([json.loads(x)["logprobs"] for x in Path(tmp_path / str(c) / "samples_boolq.jsonl").read_text().splitlines()] for c in (False, True))
    assert a != b and plain["config"]["chat"] is False and chat["config"]["chat"] is True
    from ascend_nb.hf_format import load_model
    from ascend_nb.likelihood import loglikelihoods
    from ascend_nb.tasks import load_task
    from ascend_nb.tokenizers import load_tokenizer
    item, tok = load_task("boolq", room / "eval", limit=1)[0], load_tokenizer(tmp_path / "chat")
    ids = tok.encode(f"[user]{item.prompt}[assistant]")
    want = loglikelihoods(load_model(tmp_path / "chat"), tok, [(tuple(ids), tuple(tok.encode(c))) for c in item.choices])
    assert b[0] == pytest.approx([x for x, _ in want], abs=1e-4)
