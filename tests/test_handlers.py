"""Every handler on every real file: counts, digests, records; trl as a second reader; and what is said of rows that cannot be used."""
import copy
import hashlib
import json
import random
import re
from dataclasses import asdict
from pathlib import Path

import pytest

from ascend_nb.config import RowsConfig
from ascend_nb.core import UserError
from ascend_nb.handlers import HANDLERS, Handler, bind, convert, get_handler, guess_handler
from ascend_nb.mixtures import open_source
from ascend_nb.rows import BadRows, Place, read_rows
from ascend_nb.turns import SHAREGPT, BadCell, Pair, Record, chat

HERE = Path("x.jsonl")


def column(piece, key, rows):
    "One column of documents."
    return [(x or {key: ""})[key] for x in convert(piece, HANDLERS["GeneralPretrainHandler"], rows, keys=(key,))]


def digest(items):
    "Of everything that was made, so that a change is noticed without copying the data here."
    text = json.dumps([x if isinstance(x, dict) else asdict(x) for x in items], ensure_ascii=False, sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()[:12]


def made(path, **cfg):
    source = open_source(RowsConfig(**cfg), str(path))
    pieces = list(source.pieces())
    return source, [x for p in pieces for x in p.items], sum(p.rows_read for p in pieces), sum(p.left_out for p in pieces)


REAL = [ # file, configuration, handler, rows, items, digest
    ("instruct/identity.json", {}, "AlpacaStyleInstructionHandler", 91, 91, "c222a4e21d8a"),
    ("instruct/alpaca_en_demo.json", {}, "AlpacaStyleInstructionHandler", 999, 999, "350ad13e0ea6"),
    ("instruct/alpaca_zh_demo.json", {}, "AlpacaStyleInstructionHandler", 1000, 1000, "f7829916d887"),
    ("instruct/oaast_sft_zh.json", {}, "AlpacaStyleInstructionHandler", 689, 689, "81912856ba6a"),
    ("instruct/alpaca_en_demo.json", dict(handler_name="GeneralInstructionHandler"), "GeneralInstructionHandler", 999, 999, "8a0d9dd5a32a"),
    ("instruct/alpaca_en_demo.json", dict(handler_name="AlpacaPretrainHandler"), "AlpacaPretrainHandler", 999, 999, "8b303fc1c7e8"),
    ("instruct/glaive_toolcall_en_demo.json", {}, "SharegptStyleInstructionHandler", 300, 300, "7b4a3035e815"),
    ("instruct/glaive_toolcall_zh_demo.json", {}, "SharegptStyleInstructionHandler", 300, 300, "08097c949e6d"),
    ("instruct/glaive_toolcall_en_demo.json", dict(handler_name="SharegptPretrainHandler"), "SharegptPretrainHandler", 300, 300, "985954f67712"),
    ("instruct/v1_sft_demo.jsonl", {}, "OpenAIInstructionHandler", 500, 500, "7f2515426a75"),
    ("instruct/dpo_en_demo.json", {}, "SharegptStylePairwiseHandler", 300, 300, "690f05630782"),
    ("instruct/dpo_zh_demo.json", {}, "SharegptStylePairwiseHandler", 300, 300, "6f793ea9cf4e"),
    ("instruct/v1_dpo_demo.jsonl", {}, "SharegptStylePairwiseHandler", 10, 10, "da1352eeb8aa"),
    ("instruct/oaast_rm_zh.json", dict(on_bad_row="skip"), "AlpacaStylePairwiseHandler", 775, 772, "0743478b4c1f"), # three times the same answer on both sides
    ("pretrain/tinyshakespeare.txt", {}, "GeneralPretrainHandler", 40000, 32777, "7e040020db1f"),
    ("pretrain/wiki_demo.txt", {}, "GeneralPretrainHandler", 30, 30, "ab260f716cc0"),
    ("pretrain/c4_demo.jsonl", {}, "GeneralPretrainHandler", 300, 300, "16fa752a1ab3"),
    ("pretrain/c4.parquet", {}, "GeneralPretrainHandler", 200, 200, "2f976734651a"),
    ("pretrain/arrow_trec/train", {}, "GeneralPretrainHandler", 600, 600, "b0afeb154527"),
    ("pretrain/TruthfulQA.csv", dict(json_keys=["Question", "Best Answer"]), "GeneralPretrainHandler", 817, 817, "b2215a3a0530"),
    ("pretrain/TruthfulQA.csv", dict(map_keys={"prompt": "Question", "response": "Best Answer"}), "AlpacaStyleInstructionHandler", 817, 817, "091ea291d48f"),
    ("pretrain/lunyu.json", dict(json_keys=["paragraphs"]), "GeneralPretrainHandler", 20, 20, "a7994f005495"),
]


@pytest.mark.parametrize("name, cfg, handler, rows, items, sha", REAL, ids=lambda x: x if isinstance(x, str) and "/" in x else "")
def test_real_files(shared_data, name, cfg, handler, rows, items, sha):
    source, got, read, left_out = made(shared_data / name, **cfg)
    bad = 3 if "oaast_rm" in name else 0
    assert (source.handler.name, read, len(got), left_out, source.bad.count) == (handler, rows, items, rows - items - bad, bad)
    assert digest(got) == sha
    assert all(isinstance(x, {"text": dict, "chat": Record, "pair": Pair}[source.kind]) for x in got)


def raw(shared_data, name):
    text = (shared_data / "instruct" / name).read_text(encoding="utf-8")
    return json.loads(text) if name.endswith(".json") else [json.loads(x) for x in text.splitlines()]


@pytest.mark.parametrize("name", ["identity.json", "alpaca_en_demo.json", "alpaca_zh_demo.json", "oaast_sft_zh.json"])
def test_alpaca_is_the_row(shared_data, name):
    "Nothing added, nothing lost: history in order, then instruction and input, then output."
    rows, (_, got, *_) = raw(shared_data, name), made(shared_data / "instruct" / name)
    for row, rec in zip(rows, got, strict=True):
        said = [m["content"] for m in rec.messages]
        assert said == [x for t in row.get("history", []) for x in t] + [row["instruction"] + ("\n" + row["input"]) * bool(row["input"]), row["output"]]
        assert [m["role"] for m in rec.messages] == ["user", "assistant"] * (len(said) // 2) and rec.tools is None
    if "oaast" in name: assert max(len(r.messages) for r in got) == 6 and sum(len(r.messages) > 2 for r in got) == sum(bool(r["history"]) for r in rows) > 200


def test_a_record_of_each(shared_data):
    first = lambda name, i=0, **cfg: made(shared_data / "instruct" / name, **cfg)[1][i]  # noqa: E731
    assert first("identity.json", 3) == chat([("What is your name?", "You may refer to me as {{name}}, an AI assistant developed by {{author}}.")])
    call = first("glaive_toolcall_zh_demo.json")
    assert [m["role"] for m in call.messages] == ["user", "assistant", "tool", "assistant"]
    assert call.messages[1] == dict(role="assistant", content="", tool_calls=[dict(type="function", function=dict(name="generate_invoice", arguments={
        "customer_name": "约翰·多伊", "items": [{"name": "苹果", "quantity": 2, "price": 1}, {"name": "香蕉", "quantity": 3, "price": 0.5}]}))])
    assert [t["function"]["name"] for t in call.tools] == ["generate_invoice", "generate_password"]
    pair = first("v1_dpo_demo.jsonl")
    assert [m["role"] for m in pair.chosen.messages] == ["system", "user", "assistant"] and pair.chosen.messages[:2] == pair.rejected.messages[:2]
    assert pair.rejected.messages[2]["content"].startswith(" Abdulah Hasanagic is the proud owner of AS Company, a small town")
    assert first("v1_sft_demo.jsonl") == chat([("hi", "Hello! I am {{name}}, an AI assistant developed by {{author}}. How can I assist you today?")])
    text = made(shared_data / "pretrain" / "lunyu.json", json_keys=["paragraphs"])[1][0]["paragraphs"]
    assert text.split("\n")[:2][1].startswith("有子曰") and text.count("\n") == 15


@pytest.mark.parametrize("lang, calls, none", [("en", 211, 109), ("zh", 216, 100)])
def test_tool_calls_are_the_rows(shared_data, lang, calls, none):
    rows, (_, got, *_) = raw(shared_data, f"glaive_toolcall_{lang}_demo.json"), made(shared_data / "instruct" / f"glaive_toolcall_{lang}_demo.json")
    roles = dict(human="user", gpt="assistant", function_call="assistant", observation="tool")
    for row, rec in zip(rows, got, strict=True):
        assert [m["role"] for m in rec.messages] == [roles[t["from"]] for t in row["conversations"]]
        for t, m in zip(row["conversations"], rec.messages, strict=True):
            if t["from"] == "function_call": assert m["tool_calls"][0]["function"] == json.loads(t["value"]) and m["content"] == ""
            else: assert m["content"] == t["value"] and "tool_calls" not in m
        assert [t["function"] for t in rec.tools or []] == json.loads(row["tools"])
    assert sum("tool_calls" in m for r in got for m in r.messages) == calls and sum(r.tools is None for r in got) == none


def plain(messages): return [(m["role"], m["content"] if isinstance(m["content"], str) else "".join(p["value"] for p in m["content"])) for m in messages]


@pytest.mark.slow
def test_trl_reads_the_same(shared_data):
    "Hugging Face's trl turns ShareGPT into messages, and pairs into a common prompt and two answers."
    data_utils = pytest.importorskip("trl.data_utils", reason="trl is the second reader")
    for row, rec in zip(raw(shared_data, "glaive_toolcall_en_demo.json"), made(shared_data / "instruct" / "glaive_toolcall_en_demo.json")[1], strict=True):
        if any(t["from"] == "function_call" for t in row["conversations"]): continue # trl leaves calls as text
        theirs = data_utils.maybe_convert_to_chatml({"conversations": row["conversations"]})["messages"]
        assert plain(rec.messages) == [(dict(human="user", gpt="assistant")[who], text) for who, text in plain(theirs)]
    for row, pair in zip(raw(shared_data, "v1_dpo_demo.jsonl"), made(shared_data / "instruct" / "v1_dpo_demo.jsonl")[1], strict=True):
        both = {k: [dict(role=m["role"], content=m["content"][0]["value"]) for m in row[f"{k}_messages"]] for k in ("chosen", "rejected")}
        theirs = data_utils.maybe_extract_prompt(dict(both))
        assert (plain(pair.chosen.messages[:-1]), plain(pair.chosen.messages[-1:]), plain(pair.rejected.messages[-1:])) == tuple(plain(theirs[k]) for k in ("prompt", "chosen", "rejected"))
        assert HANDLERS["SharegptStylePairwiseHandler"](both) == HANDLERS["SharegptStylePairwiseHandler"](theirs) == pair


def test_pairs_are_the_rows(shared_data):
    for name in ("dpo_en_demo.json", "dpo_zh_demo.json"):
        for row, pair in zip(raw(shared_data, name), made(shared_data / "instruct" / name)[1], strict=True):
            said = [t["value"] for t in row["conversations"]]
            for rec, answer in ((pair.chosen, row["chosen"]), (pair.rejected, row["rejected"])):
                assert [m["content"] for m in rec.messages] == [*said, answer["value"]] and rec.messages[-1]["role"] == "assistant"
            assert (pair.chosen.messages[0]["role"] == "system") == (row["conversations"][0]["from"] == "system")
    rows = raw(shared_data, "oaast_rm_zh.json")
    source, pairs, *_ = made(shared_data / "instruct" / "oaast_rm_zh.json", on_bad_row="report")
    same = [i for i, row in enumerate(rows) if row["output"][0] == row["output"][1]]
    assert [(x["row"], "the same answer as the chosen one" in x["why"]) for x in source.bad.examples] == [(f"row {i + 1} of oaast_rm_zh.json", True) for i in same] and len(same) == 3
    for row, pair in zip([row for i, row in enumerate(rows) if i not in same], pairs, strict=True):
        assert [pair.chosen.messages[-1]["content"], pair.rejected.messages[-1]["content"]] == row["output"][:2]
        assert len(pair.chosen.messages) == 2 * len(row["history"]) + 2 and pair.chosen.messages[:-1] == pair.rejected.messages[:-1]


def use(name, **row): return HANDLERS[name](row)


def test_alpaca_corners():
    alpaca = lambda **row: use("AlpacaStyleInstructionHandler", **dict(instruction="", output="a") | row)  # noqa: E731
    assert alpaca(instruction="q", system="s") == Record([dict(role="system", content="s"), dict(role="user", content="q"), dict(role="assistant", content="a")])
    assert alpaca(input="only input").messages[0]["content"] == "only input"
    assert alpaca() is None and alpaca(instruction="q", output="") is None and alpaca(instruction="q", output=None) is None and alpaca(instruction=" ") is None
    assert alpaca(instruction="q", history=None) == alpaca(instruction="q", history=[]) == alpaca(instruction="q", input=None)
    assert alpaca(instruction="q", history=[["", "b"]]) is None


def test_texts_that_modellink_writes():
    vicuna = ("A chat between a curious user and an artificial intelligence assistant. The assistant gives helpful, detailed, and polite answers to the user's questions."
              "USER: Below is an instruction that describes a task. Write a response that appropriately completes the request.\n\n### Instruction:\nDo\n\n")
    assert use("AlpacaPretrainHandler", instruction="Do", input="it", output="Done") == {"text": vicuna + "### Input:\nit\n\n### Response: ASSISTANT: Done"}
    assert use("AlpacaPretrainHandler", instruction="Do", output="Done") == {"text": vicuna + "### Response: ASSISTANT: Done"}
    assert use("StackOverflowPythonPretrainHandler", title="sort", question_body="How?", answer_body="sorted(x)") == {
        "text": "In python, sort\n### Question:\nHow?\n### Response:\nsorted(x)\n"}
    assert use("SharegptPretrainHandler", conversations=[{"from": "human", "value": "a"}, {"role": "x", "content": "b"}])["text"] == "a\nb"
    turns = [{"value": "a"}, {"value": "b"}]
    assert convert([dict(talk=turns)], HANDLERS["SharegptPretrainHandler"], Place(HERE), keys=("talk",)) == [{"talk": "a\nb"}]
    assert use("GeneralInstructionHandler", instruction="q", input="", output="a") == chat([("q\n", "a")])
    assert use("GeneralInstructionHandler", instruction="q", input="i", output="a") == chat([("q\ni", "a")])
    leet = dict(code_with_problem="# Two sum\n\nFind it.\n\n```python\nx\n```\n more ``` ", code_only="x", explanation_only="Because.")
    assert use("LeetcodePythonInstructionHandler", **leet) == chat([("# Two sum\n\nFind it.", "x\nBecause.")])
    assert {n: h.prompt_type for n, h in HANDLERS.items() if h.prompt_type} == dict.fromkeys(
        ["GeneralInstructionHandler", "LeetcodePythonInstructionHandler", "BelleMultiTurnInstructionHandler", "MOSSInstructionHandler"], "modellink_alpaca") | {"MOSSMultiTurnHandler": "baichuan2"}


def test_belle():
    belle = lambda text, **more: use("BelleMultiTurnInstructionHandler", instruction=text, output=" end ", **more)  # noqa: E731
    turns = [dict(role="user", content="a"), dict(role="assistant", content="b", loss=False), dict(role="user", content="c Human: d"), dict(role="assistant", content="end")]
    assert belle("Human: a\nAssistant:b\n\nHuman:c Human: d\nAssistant:\n").messages == turns == belle("Human：a\nAssistant：b\nHuman:c Human: d").messages
    assert belle("Human:a\nAssistant:", input="i") == chat([("a\ni", "end")])
    for wrong in ("a", "Human:a\nHuman:b", "Assistant:a\nHuman:b", "Human:a\nAssistant:b", "Hi\nHuman:a\nAssistant:", "Assistant:"):
        with pytest.raises(BadCell): belle(wrong)
    assert belle("Human:\nAssistant:") is None


def test_moss():
    def turn(q, a, **more): return dict(Human=f"<|Human|>: {q}<eoh>\n", MOSS=f"<|MOSS|>: {a}<eom>\n", Commands="<|Commands|>: None<eoc>\n") | more
    shuffled = {f"turn_{n}": turn(f"q{n}", f"a{n}") for n in (10, 2, 1, 12, 11)}
    assert use("MOSSMultiTurnHandler", chat=shuffled) == chat([(f"q{n}", f"a{n}") for n in (1, 2, 10, 11, 12)]), "by number, not in the order of the file"
    row = dict(chat={"turn_1": turn("a", "b"), "turn_2": None, "turn_3": turn("", "x"), "turn_4": turn("c", "d")})
    assert use("MOSSMultiTurnHandler", **row) == chat([("a", "b"), ("c", "d")])
    one, two = use("MOSSInstructionHandler", **row)
    assert one == chat([("a", "b")]) and [m.get("loss") for m in two.messages] == [None, False, None, None]
    assert convert([row, dict(chat={}), dict(chat="no")], HANDLERS["MOSSInstructionHandler"], Place(HERE), BadRows("skip")) == [[one, two], None, ()]
    assert use("MOSSMultiTurnHandler", chat={}) is None


def share(*turns, **more): return dict(conversations=[{"from": w, "value": v} for w, v in turns], **more)


def test_sharegpt_corners():
    use = HANDLERS["SharegptStyleInstructionHandler"]
    said = [dict(role="system", content="s"), dict(role="user", content="q"), dict(role="assistant", content="a")]
    assert use(share(("human", "q"), ("gpt", "a"), system="s")).messages == use(share(("system", "s"), ("human", "q"), ("gpt", "a"), system="other")).messages == said
    assert use(dict(conversations=[])) is use(dict(conversations=[], system="s")) is None
    assert use(share(("human", "q"), ("gpt", ""))) is None and use(share(("human", " "), ("gpt", "a"))) is None
    two = '[{"name": "f", "arguments": {}}, {"name": "g", "arguments": "{\\"x\\": 1}"}]'
    calls = use(share(("human", "q"), ("function_call", two), ("observation", ""), ("gpt", "a"))).messages[1]["tool_calls"]
    assert [c["function"] for c in calls] == [dict(name="f", arguments={}), dict(name="g", arguments={"x": 1})]
    assert use(share(("human", "q"), ("gpt", "a"), tools="")).tools is use(share(("human", "q"), ("gpt", "a"), tools="[]")).tools is None
    assert use(share(("human", "q"), ("gpt", "a"), tools=[{"name": "f"}])).tools == [dict(type="function", function={"name": "f"})]


def test_tags():
    names = {"messages": "messages", "tags": dict(role_tag="role", content_tag="content", user_tag="user", assistant_tag="assistant")}
    mine = bind(get_handler("SharegptStyleInstructionHandler"), names)
    row = dict(messages=[dict(role="system", content="s"), dict(role="user", content="q"), dict(role="assistant", content="a")], conversations="not read")
    assert mine(row) == chat([("q", "a")], "s") and mine.needs == ("messages",) and mine.map_keys == names
    other = bind(HANDLERS["SharegptStyleInstructionHandler"], {"tags": {"user_tag": "gpt", "assistant_tag": "human"}})
    assert other(share(("gpt", "q"), ("human", "a"))) == chat([("q", "a")])
    swap = bind(HANDLERS["SharegptStyleInstructionHandler"], {"tags": {"user_tag": "system"}})
    assert swap(share(("system", "q"), ("gpt", "a"))) == chat([("q", "a")]), "a given name wins over a default"
    assert bind(HANDLERS["SharegptStyleInstructionHandler"], None) is bind(HANDLERS["SharegptStyleInstructionHandler"], {}) is HANDLERS["SharegptStyleInstructionHandler"]
    assert set(SHAREGPT) == {"role_tag", "content_tag", "user_tag", "assistant_tag", "observation_tag", "function_tag", "system_tag"}


def test_openai():
    use = HANDLERS["OpenAIInstructionHandler"]
    m = [dict(role="developer", content="s"), dict(role="user", content=[dict(type="text", text="q"), dict(type="text", value="?")], loss_weight=0.0),
         dict(role="assistant", content=None, tool_calls=[dict(id="c1", type="function", function=dict(name="f", arguments='{"x": 1}'))], reasoning_content="hm", name=None),
         dict(role="tool", content="1", tool_call_id="c1", name="f"), dict(role="tool", content="2"), dict(role="assistant", content="a", loss_weight=0)]
    rec = use(dict(messages=m, tools='[{"type": "function", "function": {"name": "f"}}]', system="not this"))
    assert rec.messages == [dict(role="system", content="s"), dict(role="user", content="q?"),
        dict(role="assistant", content="", tool_calls=[dict(id="c1", type="function", function=dict(name="f", arguments={"x": 1}))], reasoning_content="hm"),
        dict(role="tool", content="1", tool_call_id="c1", name="f"), dict(role="tool", content="2"), dict(role="assistant", content="a", loss=False)]
    assert rec.tools == [dict(type="function", function=dict(name="f"))]
    for thought in (dict(content="", reasoning_content="hm"), dict(content=None, reasoning_content="hm"), dict(content=[dict(type="reasoning", value="hm")])):
        assert use(dict(messages=[m[1], dict(role="assistant", **thought)])).messages[1] == dict(role="assistant", content="", reasoning_content="hm"), "an answer that only thinks"
    assert use(dict(messages=[m[1], dict(role="assistant", content=" ", reasoning_content=" ")])) is None
    for thought in (dict(reasoning="hm", content="a"), dict(thinking="hm", content="a"), dict(content=[dict(type="thinking", thinking="hm", signature="x"), dict(type="text", text="a")])):
        assert use(dict(messages=[m[1], dict(role="assistant", **thought)])).messages[1] == dict(role="assistant", content="a", reasoning_content="hm"), "other names of a thought"
    for none in ({}, dict(arguments=None), dict(arguments=""), dict(arguments={}), dict(arguments="{}")):
        said = use(dict(messages=[m[1], dict(role="assistant", content=None, tool_calls=[dict(function=dict(name="f", **none))])]))
        assert said.messages[1]["tool_calls"][0]["function"] == dict(name="f", arguments={}), "a call without arguments"
    old = [m[1], dict(role="assistant", content=None, function_call=dict(name="f", arguments="{}")), dict(role="function", name="f", content="1"), dict(role="assistant", content="a")]
    assert use(dict(messages=old, system="s")).messages[2]["tool_calls"][0]["function"] == dict(name="f", arguments={})
    parts = [dict(type="reasoning", value="hm"), dict(type="text", value="a"), dict(type="tool_call", value='{"name": "f", "arguments": {}}')]
    v1 = use(dict(messages=[m[1], dict(role="assistant", content=parts), dict(role="tool", content="1"), dict(role="assistant", content="b")])).messages[1]
    assert v1 == dict(role="assistant", content="a", tool_calls=[dict(type="function", function=dict(name="f", arguments={}))], reasoning_content="hm")


def test_pairs_in_other_dress():
    alpaca = lambda **row: use("AlpacaStylePairwiseHandler", instruction="q", **row)  # noqa: E731
    pair = Pair(chat([("q", "good")]), chat([("q", "bad")]))
    assert alpaca(chosen="good", rejected="bad") == alpaca(chosen=["good"], rejected=["bad"]) == alpaca(output=["good", "bad"]) == alpaca(output=["good", "bad", "worse"]) == pair
    assert alpaca(chosen="", rejected="") is None and alpaca(chosen=None) is None
    assert alpaca(chosen="good", rejected="bad", history=[["x", "y"]], system="s").rejected == chat([("x", "y"), ("q", "bad")], "s")
    talk = HANDLERS["SharegptStylePairwiseHandler"]
    assert talk(share(("human", "q"), chosen="good", rejected="bad")) == talk(share(("human", "q"), chosen={"from": "gpt", "value": "good"}, rejected={"from": "gpt", "value": "bad"})) == pair
    call = talk(share(("human", "q"), chosen={"from": "function_call", "value": '{"name": "f", "arguments": {}}'}, rejected="bad", tools='[{"name": "f"}]'))
    assert call.chosen.messages[-1]["tool_calls"] and call.rejected.tools == call.chosen.tools == [dict(type="function", function=dict(name="f"))]
    named = bind(get_handler("AlpacaStylePairwiseHandler"), {"prompt": "question", "chosen": "good", "rejected": "bad"})
    assert named(dict(question="q", good="good", bad="bad")) == pair


WRONG = [ # handler, row, what is said
    ("AlpacaStyleInstructionHandler", dict(instructions="q", output="a"), "no column 'instruction' in row 2 of x.jsonl, which has instructions, output; Alpaca.* Did you mean instructions"),
    ("AlpacaStyleInstructionHandler", dict(instruction="q", output=["a", "b"]), "Found a list in column 'output' of row 2 .*expected text"),
    ("AlpacaStyleInstructionHandler", dict(instruction="q", output="a", history=["x"]), "column 'history' of row 2 .*list of"),
    ("AlpacaStyleInstructionHandler", dict(instruction="q", output=4), "Found a int in column 'output' of row 2"),
    ("SharegptStyleInstructionHandler", share(("gpt", "a"), ("human", "q")), "'gpt' in turn 1 in column 'conversations' of row 2 of x.jsonl; expected 'human' or 'observation'"),
    ("SharegptStyleInstructionHandler", share(("human", "q"), ("human", "q")), "'human' in turn 2 .*expected 'gpt' or 'function_call'"),
    ("SharegptStyleInstructionHandler", share(("human", "q"), ("gpt", "a"), ("human", "q")), "'human' last in column .*expected 'gpt' or 'function_call' last"),
    ("SharegptStyleInstructionHandler", dict(conversations="talk"), "Found 'talk' in column 'conversations' .*a list of turns"),
    ("SharegptStyleInstructionHandler", dict(conversations=[{"from": "human"}]), "in turn 1 .*expected text under 'value'"),
    ("SharegptStyleInstructionHandler", share(("human", "q"), ("function_call", "{cut")), "{cut' in turn 2 .*a JSON object"),
    ("SharegptStyleInstructionHandler", share(("human", "q"), ("function_call", '{"name": "f", "arguments": [1]}')), "in turn 2 .*calls like"),
    ("SharegptStyleInstructionHandler", share(("human", "q"), ("gpt", "a"), tools="{"), "column 'tools' of row 2 .*JSON list"),
    ("SharegptStyleInstructionHandler", dict(conversations=[{"from": ["human"], "value": "q"}]), "in turn 1 .*expected 'human'"),
    ("SharegptStyleInstructionHandler", share(("system", "s"), ("human", "q"), ("human", "q")), "'human' in turn 3 .*expected 'gpt'"),
    ("SharegptStyleInstructionHandler", dict(conversations=[{"from": "system", "value": 7}]), "in turn 1 .*expected text under 'value'"),
    ("OpenAIInstructionHandler", dict(messages=[dict(role={}, content="a")]), "in turn 1 .*expected 'system'"),
    ("OpenAIInstructionHandler", dict(messages=[]), "no turns in column 'messages'"),
    ("OpenAIInstructionHandler", dict(messages=[dict(role="user", content="q"), dict(role="assistant", content="a", reasoning_content=7)]), "'7' in turn 2 in column 'messages' .*text under 'reasoning_content'"),
    ("OpenAIInstructionHandler", dict(messages=[dict(role="user", content=[dict(type="text", text=7)])]), "in turn 1 .*text under 'text'"),
    ("OpenAIInstructionHandler", dict(messages=[dict(role="user", content=7)]), "'7' in turn 1 .*list of parts"),
    ("OpenAIInstructionHandler", dict(messages=[dict(role="user", content="q"), dict(role="assistant", content="", tool_calls="{")]), "in turn 2 .*JSON object"),
    ("OpenAIInstructionHandler", dict(messages=[dict(role="bot", content="a")]), "'bot' in turn 1 .*expected 'system', 'developer', 'user', 'assistant', 'tool' or 'function'"),
    ("OpenAIInstructionHandler", dict(messages=[dict(role="assistant", content="a")]), "'assistant' first .*expected 'user' first"),
    ("OpenAIInstructionHandler", dict(messages=[dict(role="user", content="q")]), "'user' last .*expected 'assistant' last"),
    ("OpenAIInstructionHandler", dict(messages=[dict(role="user", content="q"), dict(role="tool", content="1"), dict(role="assistant", content="a")]), "'tool' behind 'user'"),
    ("OpenAIInstructionHandler", dict(messages=[dict(role="user", content=[dict(type="image_url")]), dict(role="assistant", content="a")]), "type 'image_url' in turn 1 .*pictures"),
    ("OpenAIInstructionHandler", dict(messages=[dict(role="user", content="q"), dict(role="assistant", content="a", loss_weight=.5)]), "loss_weight 0.5 in turn 2"),
    ("BelleMultiTurnInstructionHandler", dict(instruction="Human:a\nHuman:b", output="c"), "Found Human, Human in column 'instruction' of row 2"),
    ("MOSSMultiTurnHandler", dict(chat=[1]), "Found a list in column 'chat' of row 2"),
    ("MOSSInstructionHandler", dict(chat={"turn_1": dict(Human="a", MOSS="b"), "turn_2": "c"}), "Found a str under 'turn_2' in column 'chat' of row 2"),
    ("MOSSInstructionHandler", dict(chat={"turn_1": dict(Human="a", MOSS=7)}), "Found a int in column 'MOSS' of row 2"),
    ("AlpacaStylePairwiseHandler", dict(instruction="q", output=["a", "a"]), "Found the same answer as the chosen one in column 'output' of row 2 .*expected another one"),
    *(("AlpacaStylePairwiseHandler", dict(instruction="q", **row), rf"Found no answer in column '{key}' of row 2 .*both answers") for key, row in
      (("rejected", dict(chosen="a", rejected="")), ("rejected", dict(chosen="a", rejected=None)), ("rejected", dict(chosen="a")), ("chosen", dict(chosen="", rejected="b")), ("output", dict(output=["a", ""])))),
    ("SharegptStylePairwiseHandler", share(("human", "q"), chosen="a", rejected=" "), "no answer in column 'rejected'"),
    ("AlpacaStylePairwiseHandler", dict(instruction="q", chosen=["a"], rejected="a"), "Found the same answer as the chosen one in column 'rejected' of row 2"),
    ("SharegptStylePairwiseHandler", share(("human", "q"), chosen={"from": "gpt", "value": "a"}, rejected="a"), "the same answer .*column 'rejected'"),
    ("SharegptStylePairwiseHandler", dict(chosen_messages=[dict(role="user", content="q"), dict(role="assistant", content="a")],
                                          rejected_messages=[dict(role="user", content="q"), dict(role="assistant", content="a")]), "the same answer .*column 'rejected_messages'"),
    ("AlpacaStylePairwiseHandler", dict(instruction="q", output=["a"]), "column 'output' .*better, worse"),
    ("SharegptStylePairwiseHandler", share(("human", "q"), ("gpt", "a"), chosen="a", rejected="b"), "'gpt' last in column .*expected 'human' or 'observation' last"),
    ("SharegptStylePairwiseHandler", share(("human", "q"), chosen="a"), "no answer in column 'rejected' of row 2"),
    ("SharegptStylePairwiseHandler", dict(chosen=[dict(role="user", content="q"), dict(role="assistant", content="a")],
                                          rejected=[dict(role="user", content="other"), dict(role="assistant", content="a")]), "other messages than in chosen in column 'rejected'"),
]


@pytest.mark.parametrize("name, row, says", WRONG)
def test_wrong_rows_are_named(name, row, says):
    with pytest.raises(UserError, match=says): convert([row], get_handler(name), Place(HERE, 2))
    bad = BadRows("report")
    assert convert([row], get_handler(name), Place(HERE, 2), bad) == [()] and bad.examples[0]["row"] == "row 2 of x.jsonl"


ODD = [None, "", 7, True, "text", [], {}, ["a"], [1], [None], {"a": 1}, [[]], [["a", "b"]], "{", "[1]", "[{}]", "\ud83d", "Human:a\nAssistant:", {"turn_1": {"Human": "a", "MOSS": "b"}}, {"turn_1": 5},
       {"from": "gpt", "value": "x"}, [{"from": "human", "value": "q"}, {"from": "gpt", "value": "a"}], [{"role": "user", "content": "q"}, {"role": "assistant", "content": "a", "tool_calls": [{"function": 7}]}],
       [{"role": "user", "content": [{"type": "text", "value": "q"}]}, {"role": "assistant", "content": [{"type": "tool_call", "value": "{}"}]}], [{"from": "human", "value": "q"}, {"from": "function_call", "value": "[{}]"}]]


def test_any_row_is_an_item_or_a_sentence():
    "Whatever stands in the columns, and wherever something is exchanged for something else: no other error than UserError."
    ours = [h for h in HANDLERS.values() if h.make.__module__.startswith("ascend_nb.")]
    rng, columns = random.Random(0), sorted({c for h in ours for c in (*h.needs, *h.columns.values())} | {"prompt", "text", "chosen_messages", "rejected_messages"})

    def disturbed(v):
        v = copy.deepcopy(v)
        inside = list(range(len(v))) if isinstance(v, list) else list(v) if isinstance(v, dict) else []
        if not inside or rng.random() < .2: return rng.choice(ODD)
        k = rng.choice(inside)
        v[k] = disturbed(v[k])
        return v

    used = 0
    for _ in range(1500):
        row = {k: disturbed(rng.choice(ODD)) if rng.random() < .4 else rng.choice(ODD) for k in rng.sample(columns, rng.randint(0, 12))}
        for h in ours:
            try: used += h.name != "LlamaFactoryInstructionHandler" and convert([row], h, Place(HERE), keys=("text",) if h.kind == "text" else ())[0] is not None
            except UserError: pass
        try: guess_handler([row])
        except UserError: pass
    assert used > 200


def test_half_a_character_is_named(tmp_path):
    "A \\ud83d alone is valid JSON and no text: crawled data has it, and no tokenizer takes it."
    (tmp_path / "x.jsonl").write_text('{"text": "ok \\ud83d\\ude00", "instruction": "q", "output": "a"}\n{"text": "cut \\ud83d", "instruction": "q", "output": "\\ude00"}')
    rows = read_rows(tmp_path / "x.jsonl")
    piece = next(rows.pieces())
    with pytest.raises(UserError, match="half a character .* in column 'text' of row 2 of x.jsonl"): column(piece, "text", rows)
    with pytest.raises(UserError, match="half a character .* of row 2 of x.jsonl"): convert(piece, get_handler("AlpacaStyleInstructionHandler"), rows)
    assert column(piece[:1], "text", rows) == ["ok 😀"]
    call = share(("human", "q"), ("function_call", '{"name": "f", "arguments": {"x": "\\ud83d"}}'))
    with pytest.raises(UserError, match="half a character"): convert([call], get_handler("SharegptStyleInstructionHandler"), rows)


@pytest.mark.parametrize("row, says", [(dict(txt="a"), "no column 'text' in row 2 of x.jsonl, which has txt; .* Did you mean txt"), (dict(text=7), "Found a int in column 'text' of row 2"),
                                       (dict(text=["a", 7]), "a list that holds a int in column 'text' of row 2"), (dict(text={}), "Found a dict in column 'text' of row 2")])
def test_wrong_text_columns_are_named(tmp_path, row, says):
    (tmp_path / "x.jsonl").write_text("\n".join(map(json.dumps, (dict(text=None), row))))
    rows = read_rows(tmp_path / "x.jsonl")
    with pytest.raises(UserError, match=says):
        for piece in rows.pieces(): column(piece, "text", rows)
    assert column([dict(text=None), dict(text="a"), dict(text=["b", "c"]), dict(text=[])], "text", rows) == ["", "a", "b\nc", ""]


@pytest.mark.parametrize("rows, name, keys", [
    ([dict(prompt="q", response="a")], "AlpacaStyleInstructionHandler", {"prompt": "prompt", "response": "response"}),
    ([dict(instruction="q", output=None), dict(instruction="q", output="a", text="whole")], "AlpacaStyleInstructionHandler", {}),
    ([dict(instruction="Human:a\nAssistant:", output="b")], "BelleMultiTurnInstructionHandler", {}),
    ([dict(prompt="q", chosen="a", rejected="b")], "AlpacaStylePairwiseHandler", {"prompt": "prompt"}),
    ([dict(instruction="q", chosen="a", rejected="b")], "AlpacaStylePairwiseHandler", {}),
    ([dict(prompt="q", chosen=[dict(role="user", content="q"), dict(role="assistant", content="a")], rejected=[])], "SharegptStylePairwiseHandler", {}),
    ([dict(messages=[{"from": "human", "value": "q"}, {"from": "gpt", "value": "a"}])], "SharegptStyleInstructionHandler", {"messages": "messages"}),
    ([dict(title="t", question_body="q", answer_body="a")], "StackOverflowPythonPretrainHandler", {}),
    ([dict(code_with_problem="p", code_only="c", explanation_only="e")], "LeetcodePythonInstructionHandler", {}),
    ([dict(chat={"turn_1": {}})], "MOSSMultiTurnHandler", {}),
    ([dict(text="a", input="b")], "GeneralPretrainHandler", {})])
def test_guesses(rows, name, keys):
    handler, why = guess_handler(rows)
    assert (handler.name, handler.map_keys) == (name, keys) and "columns" in why
    if name != "MOSSMultiTurnHandler" and rows[-1].get("rejected") != []: convert(rows[-1:], handler, Place(HERE), keys=("text",) if handler.kind == "text" else ())


def test_named_keys_win():
    row = dict(instruction="q", output="a", text="t", paragraphs=["a", "b"], talk=[{"value": "a"}], n=1)
    assert guess_handler([row])[0].name == "AlpacaStyleInstructionHandler"
    assert guess_handler([row], ["output", "paragraphs"])[0].name == "GeneralPretrainHandler" and guess_handler([row], ["talk"])[0].name == "SharegptPretrainHandler"
    with pytest.raises(UserError, match="json_keys=txet; .*Did you mean text"): guess_handler([row], ["txet"])
    with pytest.raises(UserError, match="json_keys=n; expected those of a known form. Pass"): guess_handler([row], ["n"])
    with pytest.raises(UserError, match="Did you mean Text"): guess_handler([dict(Text="a")])


def test_guess_of_turns_with_openais_names():
    row = dict(conversations=[dict(role="user", content="q"), dict(role="assistant", content="a")])
    handler, _ = guess_handler([row])
    assert handler(row) == chat([("q", "a")]) and bind(HANDLERS[handler.name], handler.map_keys)(row) == handler(row)
    call = [dict(type="function", function=dict(name="f", arguments=dict(x=1)))]
    rich = dict(conversations=[dict(role="user", content="q"), dict(role="assistant", content=None, tool_calls=call, reasoning_content="hm"), dict(role="tool", content="1"), dict(role="assistant", content="a")])
    assert guess_handler([rich])[0](rich).messages[1] == dict(role="assistant", content="", tool_calls=call, reasoning_content="hm"), "calls and thoughts survive"


@pytest.mark.parametrize("lang, more", [("en", r"k0, k1, .*k11, … \(60,000 in all\)"), ("zh", r"k0, k1, .*k11 …（共 60,000 个）")])
def test_a_lone_object_is_not_told_name_by_name(monkeypatch, tmp_path, lang, more):
    "A vocab.json is valid JSON, and one row with a column for every token."
    monkeypatch.setenv("ASCEND_NB_LANG", lang)
    vocab = {f"k{i}": i for i in range(60_000)}
    (tmp_path / "vocab.json").write_text(json.dumps(vocab))
    for ask in (lambda: open_source(RowsConfig(), str(tmp_path / "vocab.json")), lambda: list(open_source(RowsConfig(handler_name="GeneralPretrainHandler"), str(tmp_path / "vocab.json"))),
                lambda: list(open_source(RowsConfig(handler_name="AlpacaStyleInstructionHandler"), str(tmp_path / "vocab.json"))), lambda: open_source(RowsConfig(map_keys={"prompt": "q"}), str(tmp_path / "vocab.json"))):
        with pytest.raises(UserError, match=more) as e: ask()
        assert len(str(e.value)) < 1000
    assert len(guess_handler([dict.fromkeys(vocab, "x") | dict(text="a")])[1]) < 300


def test_names(capsys):
    assert get_handler("HunyuanInstructionHandler").name == "SharegptStyleInstructionHandler"
    for name in ("R1AlpacaStyleInstructionHandler", "PPOAlpacaStyleInstructionHandler"):
        with pytest.raises(UserError, match="reinforcement learning.* Use AlpacaStyleInstructionHandler"): get_handler(name)
    with pytest.raises(UserError, match="Did you mean GeneralPretrainHandler"): get_handler("GeneralPretrainHandle")
    with pytest.raises(UserError, match="'promt' in map_keys; AlpacaStyleInstructionHandler knows prompt, query, response, history, system, tools. Did you mean prompt"):
        bind(get_handler("AlpacaStyleInstructionHandler"), {"promt": "q"})
    with pytest.raises(UserError, match="'user' in map_keys.*Did you mean user_tag"): bind(get_handler("SharegptStyleInstructionHandler"), {"tags": {"user": "q"}})
    with pytest.raises(UserError, match="7 as the name of 'prompt'"): bind(get_handler("AlpacaStyleInstructionHandler"), {"prompt": 7})
    with pytest.raises(UserError, match="'user_tag' in map_keys; OpenAI.* knows messages, system, tools"): bind(get_handler("OpenAIInstructionHandler"), {"tags": {"user_tag": "q"}})
    assert all(isinstance(h, Handler) and h.kind in ("text", "chat", "pair") and h.about for h in HANDLERS.values())


def test_english_and_chinese(monkeypatch):
    "Every bad cell is a sentence in Chinese too, but for names and values."
    monkeypatch.setenv("ASCEND_NB_LANG", "zh")
    for name, row, _ in WRONG:
        with pytest.raises(UserError, match="x.jsonl 第 2 行.*(应为|中没有列)") as e: convert([row], get_handler(name), Place(HERE, 2))
        prose = re.sub(r"'[^']*'|\"[^\"]*\"|\[.*?\]|\w+ 类型|含有 \w+ 的", "", str(e.value))
        assert not re.search(r"\b(turn|text|list|last|first|expected|object|answer|calls|or|behind)\b", prose), prose


def test_sharegpts_keys_with_openais_speakers():
    "And a thought beside an answer, which stays."
    for key in ("conversations", "messages"):
        row = {key: [{"from": "user", "value": "q"}, {"from": "assistant", "value": "a", "reasoning_content": "hm"}]}
        made, _ = guess_handler([row])
        want = [dict(role="user", content="q"), dict(role="assistant", content="a", reasoning_content="hm")]
        assert made(row).messages == want == bind(get_handler(made.name), made.map_keys)(row).messages
    assert guess_handler([share(("human", "q"), ("gpt", "a"))])[0] is HANDLERS["SharegptStyleInstructionHandler"]


def test_one_table_of_names():
    "The second guess of `data sniff` looks for the words that the first guess knows as whole names."
    from ascend_nb.handlers import ASKS, TELLS
    from ascend_nb.scan import second_guess
    for ask in ASKS:
        for tell in TELLS:
            if (ask, tell) != ("input", "output"): assert guess_handler([{ask: "q", tell: "a"}])[0].name == "AlpacaStyleInstructionHandler"
            cfg, _ = second_guess(RowsConfig(), [{f"{tell}_id": "7", f"my_{tell}": "a", f"my_{ask}": "q"}])
            assert cfg.map_keys == dict(prompt=f"my_{ask}", response=f"my_{tell}")


def test_why_in_chinese(monkeypatch, shared_data, tmp_path):
    "Why a handler was taken is said in Chinese as well: columns, json_keys, map_keys, a registry, a handler that was asked for."
    monkeypatch.setenv("ASCEND_NB_LANG", "zh")
    folder = shared_data / "instruct"
    (tmp_path / "a.txt").write_text("x")
    (tmp_path / "dataset_info.json").write_text(json.dumps(dict(a=dict(file_name="a.txt", columns=dict(prompt="text")))))
    said = [open_source(cfg, path).reason for cfg, path in (
        (RowsConfig(), folder / "identity.json"), (RowsConfig(json_keys=["instruction"]), folder / "identity.json"), (RowsConfig(map_keys=dict(prompt="instruction")), folder / "identity.json"),
        (RowsConfig(dataset_dir=str(folder)), "identity"), (RowsConfig(handler_name="AlpacaPretrainHandler"), folder / "identity.json"), (RowsConfig(dataset_dir=str(tmp_path)), "a"))]
    for text in said: assert re.search("[\u4e00-\u9fff]", text) and not re.search(r"\b(columns|names|in|asked|alone)\b", text), text
