"""SmolLM2-135M on real questions: lm-evaluation-harness and ours give the same answer to every one, and the answers stand in a table.

The table (golden/smollm2_answers.json) was written by lm-eval: `python tests/test_same_answers.py [CASE ...]` writes it anew. HellaSwag, of which no file lies
here, is asked in its own layout about the tales of data_samples.
"""
import json
import logging
import os
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest
import torch

GOLDEN = Path(__file__).parent / "golden/smollm2_answers.json"
SMOL = Path(os.environ.get("ASCEND_NB_SMOLLM2", "/tmp/smollm2"))
CASES = {"mmlu 5-shot": ("mmlu", 5, 2), "mmlu_continuation 0-shot": ("mmlu_continuation", 0, 2), "ceval 0-shot": ("ceval", 0, 3), "cmmlu 0-shot": ("cmmlu", 0, 4), "agieval 0-shot": ("agieval", 0, 2),
         "boolq 0-shot": ("boolq", 0, 8), "hellaswag 0-shot": ("hellaswag", 0, 6)} # task, worked examples, questions of each subject
WRITTEN = {"gsm8k 1-shot": ("gsm8k", 1, 3, 64), "bbh 3-shot": ("bbh", 3, 3, 12), "human_eval 0-shot": ("human_eval", 0, 3, 64)} # and tokens


def scored_by_lm_eval(lm, items):
    "lm-eval's choice for each item, from its own log-likelihoods."
    from lm_eval.api.instance import Instance

    got = iter(lm.loglikelihood([Instance("loglikelihood", {}, p, 0) for i in items for p in i.pairs()], disable_tqdm=True))
    return [[next(got)[0] for _ in i.choices] for i in items]


def first(items, limit):
    from ascend_nb.evaluator import _first

    return _first(items, limit)


def hellaswag(folder):
    "Which sentence follows in a tale? The three others are from other tales."
    tales = [json.loads(x)["text"].split(". ") for x in (Path(__file__).parent.parent / "data_samples/tales.jsonl").read_text(encoding="utf-8").splitlines()]
    tales = [t for t in tales if len(t) > 3][:24]
    rows = [dict(activity_label="A tale", ctx_a=t[0] + ". " + t[1] + ".", ctx_b="", endings=[tales[(i + k) % len(tales)][2] + "." for k in (4 - i % 4, 5, 6, 7)], label=i % 4) for i, t in enumerate(tales)]
    for i, r in enumerate(rows): r["endings"][0], r["endings"][i % 4] = r["endings"][i % 4], tales[i][2] + "."
    (folder / "hellaswag_val.jsonl").write_text("\n".join(map(json.dumps, rows)), encoding="utf-8")
    return folder


def items_of(data, case):
    from ascend_nb.tasks import load_task

    name, shots, limit, *_ = {**CASES, **WRITTEN}[case]
    if name != "hellaswag": return first(load_task(name, data / "eval", shots), limit)
    with tempfile.TemporaryDirectory() as d: return first(load_task(name, hellaswag(Path(d)), shots), limit)


def written_by_lm_eval(lm, items, task, most):
    from lm_eval.api.instance import Instance

    return lm.generate_until([Instance("generate_until", {}, (i.prompt, dict(until=list(task.stop), max_gen_toks=most, do_sample=False)), 0) for i in items], disable_tqdm=True)


def marked_by_lm_eval(items, texts, name):
    "Each metric of lm-eval's own task for each text; of programs, which lm-eval marks with a download, what Python says of them."
    if name == "human_eval": return [{"pass@1,create_test": float(plain_python(f"{i.doc['prompt']}{t}\n{i.doc['test']}\ncheck({i.doc['entry_point']})"))} for i, t in zip(items, texts, strict=True)]
    from lm_eval.api.instance import Instance
    from test_protocols import peer

    out = []
    for i, t in zip(items, texts, strict=True):
        doc = {k: v for k, v in i.doc.items() if k in ("question", "answer", "input", "target")}
        task = peer("gsm8k/gsm8k.yaml" if name == "gsm8k" else f"bbh/fewshot/{i.subject}.yaml", {"train": [doc], "test": [doc]} if name == "gsm8k" else {"test": [doc]})
        one = Instance("generate_until", doc, ("q", {}), 0)
        one.resps = [t]; task._instances = [one]; task.apply_filters()
        out.append({f"exact_match,{f}": float(task.process_results(doc, [r])["exact_match"]) for f, r in one.filtered_resps.items()})
    return out


def plain_python(program):
    try: return subprocess.run([sys.executable, "-I", "-c", program], capture_output=True, timeout=20, cwd=tempfile.gettempdir()).returncode == 0
    except subprocess.TimeoutExpired: return False


def hflm(folder):
    from lm_eval.models.huggingface import HFLM
    from transformers import AutoModelForCausalLM, AutoTokenizer

    logging.getLogger("lm_eval").setLevel("ERROR")
    return HFLM(pretrained=AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32), tokenizer=AutoTokenizer.from_pretrained(folder), batch_size=8, device="cpu")


@pytest.fixture(scope="module")
def smol():
    if not (SMOL / "model.safetensors").is_file(): pytest.skip(f"no SmolLM2 at {SMOL}: ascend_nb fetch smollm2-135m --to DIR, and set ASCEND_NB_SMOLLM2")
    from ascend_nb.hf_format import load_model
    from ascend_nb.tokenizers import load_tokenizer

    return load_model(SMOL), load_tokenizer(SMOL)


def answers(logprobs): return [max(range(len(lp)), key=lp.__getitem__) for lp in logprobs]


def same(ours, theirs, why=""):
    "The same choice, or a tie within fp32: the two best of one side lie closer than the sides differ."
    for n, (a, b) in enumerate(zip(ours, theirs, strict=True)):
        assert max(abs(x - y) for x, y in zip(a, b, strict=True)) < 2e-3, (why, n)
        x, y = answers([a, b])
        assert x == y or abs(b[x] - b[y]) < 1e-3, (why, n, a, b)


@pytest.mark.parametrize("case", CASES)
def test_answers_are_those_of_the_table(smol, shared_data, case, one_thread):
    "Two questions of each subject; the whole table is slow."
    from ascend_nb.evaluator import score_items

    table, items = json.loads(GOLDEN.read_text())[case], items_of(shared_data, case)
    assert [f"{i.subject}/{i.doc_id}" for i in items] == table["questions"] and [i.gold for i in items] == table["gold"]
    some = [n for n, i in enumerate(items) if i.doc_id < 1] or [0]
    ours = score_items(*smol, [items[n] for n in some], quiet=True)
    same([s["logprobs"] for s in ours], [table["logprobs"][n] for n in some], case)


@pytest.mark.slow
@pytest.mark.parametrize("case", CASES)
def test_every_answer_and_the_accuracy_are_lm_evals(smol, shared_data, case):
    from ascend_nb.evaluator import score_items

    table, items = json.loads(GOLDEN.read_text())[case], items_of(shared_data, case)
    ours, theirs = score_items(*smol, items, quiet=True), scored_by_lm_eval(hflm(SMOL), items)
    same([s["logprobs"] for s in ours], theirs, case)
    assert answers(theirs) == answers(table["logprobs"]) == table["answers"]
    assert sum(s["correct"] for s in ours) / len(ours) == table["accuracy"]


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore::DeprecationWarning")
@pytest.mark.parametrize("case", WRITTEN)
def test_what_is_written_and_its_marks_are_lm_evals(smol, shared_data, case):
    from ascend_nb.evaluator import write_items
    from ascend_nb.tasks import get_task

    name, _, _, most = WRITTEN[case]
    task, items, table = get_task(name), items_of(shared_data, case), json.loads(GOLDEN.read_text())[case]
    ours = write_items(*smol, items, task, most, quiet=True)
    texts = written_by_lm_eval(hflm(SMOL), items, task, most)
    assert [s["output"] for s in ours] == texts == table["outputs"]
    for s, want in zip(ours, table["scores"], strict=True): assert want and {k: s[k] for k in want} == want
    assert marked_by_lm_eval(items, texts, name) == table["scores"]


def main(*only):
    from ascend_nb.tasks import get_task

    data = Path(os.environ["ASCEND_NB_DATA"])
    lm, out = hflm(SMOL), json.loads(GOLDEN.read_text()) if only else {}
    for case in only or (*CASES, *WRITTEN):
        items = items_of(data, case)
        row = dict(questions=[f"{i.subject}/{i.doc_id}" for i in items], gold=[i.gold for i in items])
        if case in WRITTEN:
            name, _, _, most = WRITTEN[case]
            texts = written_by_lm_eval(lm, items, get_task(name), most)
            scores = marked_by_lm_eval(items, texts, name)
            out[case] = row | dict(outputs=texts, scores=scores)
            print(case, len(items), [sum(s[k] for s in scores) / len(items) for k in scores[0]], flush=True)
        else:
            lps = scored_by_lm_eval(lm, items)
            best = answers(lps)
            out[case] = row | dict(answers=best, accuracy=sum(a == i.gold for a, i in zip(best, items, strict=True)) / len(items), logprobs=[[round(x, 4) for x in lp] for lp in lps])
            print(case, len(items), out[case]["accuracy"], flush=True)
        GOLDEN.write_text("{\n" + ",\n".join(f"{json.dumps(c)}: {{\n" + ",\n".join(f"  {json.dumps(k)}: {json.dumps(v, ensure_ascii=False)}" for k, v in row.items()) + "}" for c, row in out.items()) + "}\n")


if __name__ == "__main__": main(*sys.argv[1:])
