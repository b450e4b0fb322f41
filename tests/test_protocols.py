"""The table of benchmarks against lm-evaluation-harness: every prompt, every rule that looks for an answer, every way a file of one's own can be wrong."""
import csv
import json
import re
from pathlib import Path

import pytest

from ascend_nb.core import UserError
from ascend_nb.evaluator import choose
from ascend_nb.marking import extract, mark
from ascend_nb.task_rows import read_rows
from ascend_nb.tasks import PROTOCOLS, TASKS, get_task, known_defects, load_task

ROWS = [dict(question="  1+1 等于“几”？ ", A="1", B=" 2", C="{三}", D="四, 五", answer="B"), dict(question="哪个最大\n？", A="1", B="2", C="3", D="4", answer="D"),
        dict(question="q3", A="a", B="b", C="c", D="d", answer="A")]


def lm_tasks():
    import lm_eval

    return Path(lm_eval.__file__).parent / "tasks"


def lm_yaml(path):
    from lm_eval.tasks._yaml_loader import load_yaml

    return load_yaml(lm_tasks() / path)


def peer(path, splits, **more):
    "lm-eval's own task over rows of ours."
    from datasets import Dataset
    from lm_eval.api.task import ConfigurableTask

    cfg = {k: v for k, v in lm_yaml(path).items() if k not in ("tag", "dataset_name", "dataset_path")}
    data = {k: Dataset.from_list(v) for k, v in splits.items()}
    return ConfigurableTask(config={**cfg, "custom_dataset": lambda **kw: data, **more})


def context(task, doc, n):
    out = task.fewshot_context(doc, n)
    return out if isinstance(out, str) else out[0] if isinstance(out, (list, tuple)) else str(out)


# -- prompts

@pytest.mark.parametrize("name, head, column, yaml", [("ceval", "id,question,A,B,C,D,answer,explanation", "question", "ceval/ceval-valid_{}.yaml"),
                                                      ("cmmlu", ",Question,A,B,C,D,Answer", "Question", "cmmlu/cmmlu_{}.yaml")])
def test_prompts_of_all_chinese_subjects_are_lm_evals(name, head, column, yaml, tmp_path):
    task, columns = get_task(name), head.split(",")
    test, dev = (tmp_path / p for p in (("val", "dev") if name == "ceval" else ("test", "dev")))
    for folder in (test, dev):
        folder.mkdir()
        for s in task.topics:
            file = folder / (f"{s}_{folder.name}.csv" if name == "ceval" else f"{s}.csv")
            with open(file, "w", encoding="utf-8", newline="") as f:
                w = csv.writer(f); w.writerow(columns)
                for i, r in enumerate(ROWS[:2] if folder is dev else ROWS): w.writerow([i, *r.values(), *["x,\ny"] * (len(columns) - 7)])
    items, hub = load_task(name, test, 2), [{**{c: r[c] for c in "ABCD"}, column: r["question"], column.replace("uestion", "").replace("Q", "A").replace("q", "a") + "nswer": r["answer"]} for r in ROWS]
    known = {re.sub(r"^(ceval-valid|cmmlu)_", "", p.stem) for p in (lm_tasks() / name).glob("c*.yaml")}
    assert set(task.topics) == known and len(items) == 3 * len(known)
    for subject in list(known)[:6] + ["logic" if name == "ceval" else "logical"]:
        theirs = peer(yaml.format(subject), {"val": hub, "test": hub, "dev": hub[:2]})
        assert [i.prompt for i in items if i.subject == subject] == [context(theirs, d, 2) for d in hub]
        assert theirs.config.task == task.subtask.format(subject=subject) and theirs.config.metadata["version"] == task.version
    for subject in known: # the description says the subject in Chinese
        assert lm_yaml(yaml.format(subject))["description"] == task.description.format(topic=task.topics[subject])


def test_bbh_asks_as_lm_eval_asks(tmp_path, shared_data):
    task = get_task("bbh")
    known = {p.stem for p in (lm_tasks() / "bbh/fewshot").glob("[a-z]*.yaml")}
    assert set(task.topics) == known and len(known) == 27
    for s in known: assert lm_yaml(f"bbh/fewshot/{s}.yaml")["description"] == task.description.format(topic=task.topics[s])
    rows = json.loads((shared_data / "eval/bbh/date_understanding.json").read_text())["examples"]
    theirs = peer("bbh/fewshot/date_understanding.yaml", {"test": rows}, fewshot_config=dict(sampler="first_n", samples=rows[:3]))
    ours = [i for i in load_task("bbh", shared_data / "eval", limit=4) if i.subject == "date_understanding"]
    assert [i.prompt for i in ours] == [context(theirs, d, 3) for d in rows[3:7]] and [i.doc_id for i in ours] == [3, 4, 5, 6]
    assert (list(task.stop), task.version) == (theirs.config.generation_kwargs["until"], theirs.config.metadata["version"])


def test_bbhs_own_examples_are_read_where_they_lie_beside(tmp_path):
    (tmp_path / "bbh").mkdir(); (tmp_path / "cot-prompts").mkdir()
    cfg = lm_yaml("bbh/cot_fewshot/boolean_expressions.yaml")
    shots = cfg["fewshot_config"]["samples"]
    text = "canary\n-----\n" + cfg["description"].strip() + "".join(f"\n\nQ: {s['input']}\nA: {s['target']}" for s in shots) # as the data set publishes it
    (tmp_path / "cot-prompts/boolean_expressions.txt").write_text(text + "\n")
    (tmp_path / "bbh/boolean_expressions.json").write_text(json.dumps(dict(examples=[dict(input="True is", target="True")])))
    plain = lm_yaml("bbh/fewshot/boolean_expressions.yaml")
    theirs = peer("bbh/fewshot/boolean_expressions.yaml", {"test": [dict(input="True is", target="True")]})
    assert [s["input"] for s in shots] == [s["input"] for s in plain["fewshot_config"]["samples"]]
    assert [i.prompt for i in load_task("bbh", tmp_path / "bbh")] == [context(theirs, dict(input="True is", target="True"), 3)]


def test_gsm8k_asks_as_lm_eval_asks(tmp_path, shared_data):
    rows = [json.loads(x) for x in (shared_data / "eval/gsm8k/test.jsonl").read_text(encoding="utf-8").splitlines()]
    for name, some in (("train", rows[:7]), ("test", rows[7:12])): (tmp_path / f"{name}.jsonl").write_text("\n".join(map(json.dumps, some)))
    theirs = peer("gsm8k/gsm8k.yaml", {"train": rows[:7], "test": rows[7:12]}, fewshot_config=dict(sampler="first_n"))
    assert [i.prompt for i in load_task("gsm8k", tmp_path)] == [context(theirs, d, 5) for d in rows[7:12]]
    own = load_task("gsm8k", shared_data / "eval", protocol="modellink", limit=2)
    assert [i.doc_id for i in own] == [3, 4] and own[0].prompt.count("The answer is") == 3 and own[0].prompt.endswith("\n\n" + rows[3]["question"])


HELLASWAG = [dict(activity_label="Roof shingle removal", ctx_a="A man is sitting on a roof.", ctx_b="he", endings=["is using wrap  to wrap skis.", "is ripping level tiles [step] off."], label=1),
             dict(activity_label="Home", ctx_a="[header] How to fix [title] Look.", ctx_b="", endings=["a [substeps] b", " c"], label="0")]


def test_hellaswag_asks_as_lm_eval_asks(tmp_path):
    import importlib

    clean = importlib.import_module("lm_eval.tasks.hellaswag.utils").preprocess
    (tmp_path / "hellaswag_val.jsonl").write_text("\n".join(map(json.dumps, HELLASWAG)))
    items = load_task("hellaswag", tmp_path)
    assert [i.prompt for i in items] == [clean(d["activity_label"] + ": " + d["ctx_a"] + " " + d["ctx_b"].capitalize()) for d in HELLASWAG]
    assert [list(i.choices) for i in items] == [[clean(e) for e in d["endings"]] for d in HELLASWAG] and [i.gold for i in items] == [1, 0]
    (tmp_path / "plain").mkdir()
    (tmp_path / "plain/hellaswag.jsonl").write_text(json.dumps(dict(query="q", choices=["a", "b"], gold=1)))
    assert [(i.prompt, i.choices, i.gold) for i in load_task("hellaswag", tmp_path / "plain")] == [("q", ("a", "b"), 1)]


def test_agieval_scores_as_lm_eval_scores(shared_data):
    import importlib

    theirs = importlib.import_module("lm_eval.tasks.agieval.utils").process_results_mcqa
    items, lps = load_task("agieval", shared_data / "eval", limit=20), [[-3.0, -2.0, -9.0, -2.5, -8.0], [-1.0, -40.0, -2.0, -2.0, -1.5]]
    assert {i.subject for i in items} == {"logiqa-zh", "lsat-ar", "sat-math"}
    for i in items:
        for lp in (x[:len(i.choices)] for x in lps):
            got = {m: float(choose(m, lp, i.choices) == i.gold) for m in ("acc", "acc_norm")}
            assert got == theirs(dict(choices=list(i.choices), gold=[i.gold]), [(x, False) for x in lp])


# -- rules

OUTPUTS = [" 5 + 5 = 10\n#### 10", "#### 1,234", "#### $1,234.", "#### -7.50", "so 18 and 19", "the price is $1,000.00.", "nothing", "", "#### ", " 42", "12 .", "#### 18 #### 19", "-3"]


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
@pytest.mark.parametrize("answer", ["He has 18.\n#### 18", "#### 1,234", "#### -7.50", "#### 10"])
def test_gsm8ks_marks_are_lm_evals(answer):
    from lm_eval.api.instance import Instance

    doc = dict(question="q", answer=answer)
    theirs, task = peer("gsm8k/gsm8k.yaml", {"train": [doc], "test": [doc]}), get_task("gsm8k")
    for said in OUTPUTS:
        one = Instance("generate_until", doc, ("q", {}), 0)
        one.resps = [said]; theirs._instances = [one]; theirs.apply_filters()
        for m, steps in task.marks.items():
            want = theirs.process_results(doc, [one.filtered_resps[m.partition(",")[2]]])["exact_match"]
            assert mark(extract(said, steps), answer, both=task.both) == float(want), (m, said)


def test_bbhs_marks_are_lm_evals_and_the_space_is_forgiven():
    doc = dict(input="x", target="(B)")
    theirs, task = peer("bbh/fewshot/date_understanding.yaml", {"test": [doc]}), get_task("bbh")
    for said in (" (B)", "(B)", "(b)", "B", ""):
        assert mark(extract(said, task.marks["exact_match,none"]), "(B)") == float(theirs.process_results(doc, [said])["exact_match"])
    assert mark(extract(" (B)", task.marks["exact_match,stripped"]), "(B)") == 1


MODELLINK = [ # task, what was written, what is taken, with a row; by the published rules
    ("mmlu", " B", {}, "B"), ("mmlu", "It is C. x", {}, "C"), ("mmlu", " so", {}, "[invalid]"), ("ceval", " D", {}, "D"), ("ceval", "D。", {}, "D。"),
    ("bbh", " (A)\nQ: x", {}, "A"), ("bbh", "valid", {}, "valid"), ("agieval", " $(C)$\nnext", {}, "C"), ("gsm8k", "so 9*2. The answer is $1,800.50. Q: x", {}, "1800.50"),
    ("gsm8k", "The answer is 7", {}, "7"), ("cmmlu", "答案是B", {}, "B"), ("hellaswag", "A", {}, "A")]


@pytest.mark.parametrize("name, said, doc, found", MODELLINK)
def test_modellinks_rules(name, said, doc, found):
    task = get_task(name, "modellink")
    assert extract(said, next(iter(task.marks.values())), doc) == found


def test_defects_are_off_until_they_are_asked_for(tmp_path):
    (tmp_path / "bbh").mkdir()
    for s in ("word_sorting", "logical_deduction_three_objects"): (tmp_path / f"bbh/{s}.json").write_text(json.dumps(dict(examples=[dict(input=str(i), target="x") for i in range(5)])))
    assert len(load_task("bbh", tmp_path, protocol="modellink")) == 4
    assert {i.subject for i in load_task(get_task("bbh", "modellink", ["bbh_objects_left_out"]), tmp_path)} == {"word_sorting"}
    point = get_task("gsm8k", "modellink", ["all"])
    assert point.defects == ("gsm8k_point_is_blank",) and extract("The answer is 7.50 .", point.marks["acc"]) == "7"
    assert get_task("bbh", "lm-eval", ["all"]).defects == ()
    assert {t for t, _, _ in known_defects().values()} <= {*TASKS, "all"}
    with pytest.raises(UserError, match="which is not known. Name one of these: bbh_objects"): get_task("bbh", "modellink", ["x"])


def test_every_task_has_a_protocol_and_every_field_its_meaning():
    assert set(TASKS) == {"mmlu", "mmlu_continuation", "mmlu_ppl", "ceval", "cmmlu", "agieval", "bbh", "boolq", "gsm8k", "human_eval", "hellaswag", "needlebench"}
    for name in TASKS:
        for p in PROTOCOLS:
            t = get_task(name, p)
            assert t.choices or t.marks, name
            assert not (t.choices and t.marks), name


# -- files that are wrong

WRONG = {"shifted": ("ceval", "val/logic_val.csv", "id,question,A,B,C,D,answer\n0,q,1,2,3,4,A\n1,q, with a comma,1,2,3,4,B\n", r"Found 8 columns in row 3 of .*logic_val.csv; expected 7 as in its first line"),
         "no answers": ("ceval", "val/logic_val.csv", "id,question,A,B,C,D\n0,q,1,2,3,4\n", "expected answer. Check that it is the file with the answers"),
         "moved answer": ("cmmlu", "test/arts.csv", ",Question,A,B,C,D,Answer\n0,q,1,2,3,B,4\n", "Found the answer '4' in row 2"),
         "empty file": ("cmmlu", "test/arts.csv", "", "Found no rows in"),
         "not examples": ("bbh", "word_sorting.json", "[1]", "expected BBH's JSON"),
         "option beyond": ("agieval", "sat-math.jsonl", json.dumps(dict(question="q", options=["(A)1"], label="C")), "letters of its options"),
         "no prompt": ("human_eval", "human-eval.jsonl", json.dumps(dict(task_id="x", test="t", entry_point="f")), "Found task_id, test, entry_point in line 1 .* expected a JSON object with task_id, prompt, test and entry_point"),
         "no label": ("hellaswag", "hellaswag_val.jsonl", json.dumps(HELLASWAG[0] | dict(label="")), r"label \(a number\)"),
         "empty folder": ("gsm8k", "readme.md", "", "Found readme.md in")}


@pytest.mark.parametrize("case", WRONG)
def test_a_wrong_file_is_named(case, tmp_path):
    name, file, text, sentence = WRONG[case]
    (tmp_path / file).parent.mkdir(parents=True, exist_ok=True)
    (tmp_path / file).write_text(text)
    with pytest.raises(UserError, match=re.compile(sentence, re.S)): load_task(name, (tmp_path / file).parent, 0)


def test_too_few_examples(tmp_path):
    for part in ("val", "dev"):
        (tmp_path / part).mkdir()
        (tmp_path / part / f"logic_{part}.csv").write_text("id,question,A,B,C,D,answer\n0,q,1,2,3,4,A\n")
    with pytest.raises(UserError, match="Found 1 worked examples in .*logic_dev.csv; expected at least 5. Pass --num-fewshot 1"): load_task("ceval", tmp_path / "val")
    (tmp_path / "test.jsonl").write_text(json.dumps(dict(question="q", answer="#### 1")) + "\n")
    with pytest.raises(UserError, match="Found 0 worked examples in .*test.jsonl"): load_task("gsm8k", tmp_path)


def test_real_files_equal_pandas(shared_data):
    pd = pytest.importorskip("pandas")
    for name, file in (("ceval", "ceval/val/logic_val.csv"), ("cmmlu", "cmmlu/test/arts.csv")):
        frame, rows = pd.read_csv(shared_data / "eval" / file, dtype=str, keep_default_na=False), read_rows(shared_data / "eval" / file, get_task(name).rows)
        assert [[r[c] for c in "ABCD"] + [r["answer"]] for r in rows] == frame.loc[:, "A":].iloc[:, :5].values.tolist() and len(rows) > 20
