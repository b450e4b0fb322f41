"""Prompts against lm-evaluation-harness's own task files, and every way a folder of questions can be wrong."""
import csv
import json
import re
from pathlib import Path

import pytest

from ascend_nb.core import UserError
from ascend_nb.tasks import get_task, load_task, task_files

AWKWARD = [("  Is {this} \"quoted\", and so on? ", "a {b}", " two", "{{three}}", "4", "A"), ("多行\n问题 🙂?", "一", "二, 三", "", "'四'", "C"),
           ("What is 7?", "1", "2", "3", "7", "D"), ("What is 8?", "8", "2", "3", "4", "A"), ("Pick \\n or tab\t", "x", "y", "z", "w", "B"),
           ("What is 9?", "1", "9", "3", "4", "B")]


def write_mmlu(root: Path, subjects, rows=AWKWARD) -> Path:
    for part, some in (("test", rows), ("dev", rows[::-1])):
        (root / part).mkdir(parents=True, exist_ok=True)
        for s in subjects:
            with open(root / part / f"{s}_{part}.csv", "w", encoding="utf-8", newline="") as f: csv.writer(f).writerows(some)
    return root / "test"


def lm_eval_yaml(kind: str) -> dict:
    "subject -> one of lm-eval's task files, its `include` resolved."
    import lm_eval
    from lm_eval.tasks._yaml_loader import load_yaml

    folder = Path(lm_eval.__file__).parent / "tasks" / "mmlu" / kind
    return {c["dataset_name"]: c for c in map(load_yaml, sorted(folder.glob("mmlu_*.yaml")))}


@pytest.mark.parametrize("name, kind", [("mmlu", "default"), ("mmlu_continuation", "continuation")])
def test_prompts_of_all_57_subjects_are_lm_evals(name, kind, tmp_path):
    from lm_eval.utils import apply_template

    theirs = lm_eval_yaml(kind)
    assert len(theirs) == 57
    items = load_task(name, write_mmlu(tmp_path, theirs), num_fewshot=5)
    for subject, cfg in theirs.items():
        assert cfg["task"] == get_task(name).subtask.format(subject=subject) and cfg["metadata"]["version"] == get_task(name).version

        def text(row, cfg=cfg): return apply_template(cfg["doc_to_text"], dict(question=row[0], choices=list(row[1:5])))

        def options(row, cfg=cfg): return cfg["doc_to_choice"] if isinstance(cfg["doc_to_choice"], list) else list(row[1:5])

        shots = "".join(f"{text(r)} {options(r)['ABCD'.index(r[5])]}\n\n" for r in AWKWARD[::-1][:5])
        mine = [i for i in items if i.subject == subject]
        assert [i.prompt for i in mine] == [cfg["description"] + shots + text(r) for r in AWKWARD]
        assert [list(i.choices) for i in mine] == [options(r) for r in AWKWARD]
        assert [i.gold for i in mine] == ["ABCD".index(r[5]) for r in AWKWARD]


def test_boolq_is_lm_evals(shared_data):
    import lm_eval
    from lm_eval.tasks._yaml_loader import load_yaml
    from lm_eval.utils import apply_template

    cfg = load_yaml(Path(lm_eval.__file__).parent / "tasks" / "super_glue" / "boolq" / "default.yaml")
    rows = [json.loads(x) for x in (shared_data / "eval/boolq/dev.jsonl").read_text(encoding="utf-8").splitlines()]
    items = load_task("boolq", shared_data / "eval/boolq")
    assert [i.prompt for i in items] == [apply_template(cfg["doc_to_text"], r) for r in rows]
    assert {i.choices for i in items} == {tuple(cfg["doc_to_choice"])} and [i.gold for i in items] == [int(r["answer"]) for r in rows]
    assert cfg["metadata"]["version"] == get_task("boolq").version and len(items) == 800


def test_real_mmlu_rows_equal_pandas(shared_data):
    pd = pytest.importorskip("pandas")
    for subject, file in task_files(get_task("mmlu"), shared_data / "eval/mmlu/test").items():
        frame = pd.read_csv(file, header=None, dtype=str, keep_default_na=False)
        items = [i for i in load_task("mmlu", file, num_fewshot=0)]
        assert [i.subject for i in items] == [subject] * len(frame)
        assert [[i.doc[c] for c in "ABCD"] + [i.doc["answer"]] for i in items] == frame.iloc[:, 1:].values.tolist()
        assert [i.doc["question"] for i in items] == frame[0].str.strip().tolist()


def test_supergluess_copy_of_boolq_is_read(tmp_path):
    (tmp_path / "val.jsonl").write_text('{"question": "q", "passage": "T -- p", "idx": 0, "label": false}\n', encoding="utf-8-sig")
    assert [(i.prompt, i.gold) for i in load_task("boolq", tmp_path / "val.jsonl")] == [("T -- p\nQuestion: q?\nAnswer:", 0)]


GOOD = "q,1,2,3,4,A\n"
MMLU_WRONG = { # what the folder holds -> what the sentence must say
    "seven columns": ({"test/x_test.csv": GOOD + "q,1,2,3,4,5,A\n"}, r"Found 7 columns in row 2 of .*x_test.csv; expected 6"),
    "header": ({"test/x_test.csv": "question,A,B,C,D,answer\n" + GOOD}, r"Found the answer 'answer' in row 1 .*remove a header line"),
    "no letter": ({"test/x_test.csv": "q,1,2,3,4,E\n"}, r"Found the answer 'E' in row 1"),
    "two letters": ({"test/x_test.csv": "q,1,2,3,4,AB\n"}, r"Found the answer 'AB' in row 1"),
    "no answer": ({"test/x_test.csv": "q,1,2,3,4,\n"}, r"Found the answer '' in row 1"),
    "open quote": ({"test/x_test.csv": '"q,1,2,3,4,A\n'}, r"Found 1 columns in row 1"),
    "open quote, large": ({"test/x_test.csv": '"q,1,2,3,4,A\n' + GOOD * 20000}, r"is not csv: field larger .*quote that is never closed"),
    "empty": ({"test/x_test.csv": ""}, r"Found no rows in .*x_test.csv; expected at least one question"),
    "gb18030": ({"test/x_test.csv": "问题,1,2,3,4,A\n".encode("gb18030")}, r"not UTF-8 at offset 0 of .*iconv"),
    "other files": ({"test/x.csv": GOOD, "test/y.json": "{}"}, r"Found x.csv, y.json in .*; expected \*_test.csv"),
    "nothing": ({"test/deep/a.txt": ""}, r"Found deep/ in "),
}


@pytest.mark.parametrize("case", MMLU_WRONG)
def test_wrong_mmlu_says_what_was_found(case, tmp_path):
    files, sentence = MMLU_WRONG[case]
    for name, text in files.items():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_bytes(text if isinstance(text, bytes) else text.encode())
    with pytest.raises(UserError, match=re.compile(sentence, re.S)): load_task("mmlu", tmp_path / "test", num_fewshot=0)


BOOLQ_WRONG = {"not json": ("{'question': 1}\n", r"Found \{'question': 1\} in line 1"), "no passage": ('\n{"question": "q", "answer": true}\n', r"Found question, answer in line 2"),
               "words": ('{"question": "q", "passage": "p", "answer": "yes"}\n', r"answer \(true or false\)"), "a list": ("[1]\n", r"Found \[1\] in line 1"),
               "empty": ("\n", r"Found no rows")}


@pytest.mark.parametrize("case", BOOLQ_WRONG)
def test_wrong_boolq_says_what_was_found(case, tmp_path):
    text, sentence = BOOLQ_WRONG[case]
    (tmp_path / "dev.jsonl").write_text(text)
    with pytest.raises(UserError, match=sentence): load_task("boolq", tmp_path)


def test_few_shot_needs_its_folder(tmp_path):
    test = write_mmlu(tmp_path, ["x"])
    with pytest.raises(UserError, match=r"Found 6 worked examples in .*x_dev.csv; expected at least 7. Pass --num-fewshot 6"): load_task("mmlu", test, 7)
    (tmp_path / "dev/x_dev.csv").unlink()
    with pytest.raises(UserError, match=r"no .*dev/x_dev.csv.*Pass --num-fewshot 0, or put dev/ beside"): load_task("mmlu", test)
    (tmp_path / "dev.jsonl").write_text('{"question": "q", "passage": "p", "answer": true}\n')
    with pytest.raises(UserError, match="expected 0, because this task has no worked examples"): load_task("boolq", tmp_path, 1)
    with pytest.raises(UserError, match="Found nothing at .*nowhere"): load_task("mmlu", tmp_path / "nowhere")


def test_relative_paths_and_links_find_the_sibling(tmp_path, monkeypatch):
    test = write_mmlu(tmp_path, ["x"])
    monkeypatch.chdir(test)
    assert load_task("mmlu", ".")[0].prompt == load_task("mmlu", test / "x_test.csv")[0].prompt


def test_a_row_may_have_a_column_of_any_name(tmp_path):
    "Columns that are called as the words of a template are: the row's own count; the answer's column is what a worked example ends with."
    (tmp_path / "q.jsonl").write_text("".join(json.dumps(dict(name=n, topic="t", berth=b)) + "\n" for n, b in (("Ada", "1"), ("Hugo", "2"))))
    (tmp_path / "q.yaml").write_text('files: q.jsonl\nrows: {columns: [name], answer: {text: berth}}\ntext: "{name} ({topic}) has berth"\nshots: own\nnum_fewshot: 1\n')
    one, = load_task(str(tmp_path / "q.yaml"), tmp_path)
    assert one.prompt == "Ada (t) has berth 1\n\nHugo (t) has berth" and one.gold == "2"
