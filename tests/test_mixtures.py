"""Mixtures against `datasets`: the same draws, the same rows; LLaMA-Factory's registry; shares, resumption, identity."""
import importlib
import importlib.util
import json
import logging
import os
import pickle
import random
import re
import subprocess
import sys
import types
from dataclasses import replace
from pathlib import Path

import pytest

from ascend_nb.config import RowsConfig
from ascend_nb.core import UserError
from ascend_nb.handlers import HANDLERS, handler
from ascend_nb.mixtures import LoadedRows, open_source
from ascend_nb.rows import BadRows
from ascend_nb.turns import BadCell, Pair, Record


def write(folder, lengths, row=lambda s, i: dict(text=f"{s}.{i}")):
    "A jsonl file for each length; the names, with commas between."
    files = []
    for s, n in enumerate(lengths):
        files.append(folder / f"{s}.jsonl")
        files[-1].write_text("".join(json.dumps(row(s, i)) + "\n" for i in range(n)))
    return ",".join(map(str, files))


def texts(source): return [x["text"] for x in source]


LENGTHS = [[3, 4, 5], [5, 1], [2, 7, 7, 1], [40, 300], [3, 3]]
PROBS = [None, "even", "odd"]


@pytest.mark.parametrize("lengths", LENGTHS, ids=str)
@pytest.mark.parametrize("probs", PROBS)
@pytest.mark.parametrize("strategy", ["concat", "interleave_under", "interleave_over"])
@pytest.mark.parametrize("seed", [1234, 7])
def test_draws_are_those_of_datasets(tmp_path, lengths, probs, strategy, seed):
    from datasets import Dataset, concatenate_datasets, interleave_datasets
    n = len(lengths)
    chance = {None: None, "even": [1 / n] * n, "odd": [.9] + [.1 / (n - 1)] * (n - 1)}[probs]
    theirs = [Dataset.from_list([dict(text=f"{s}.{i}") for i in range(k)]) for s, k in enumerate(lengths)]
    stop = dict(interleave_under="first_exhausted", interleave_over="all_exhausted")
    want = concatenate_datasets(theirs) if strategy == "concat" else interleave_datasets(theirs, probabilities=chance, seed=seed, stopping_strategy=stop[strategy])
    cfg = RowsConfig(mix_strategy=strategy, interleave_probs=[] if strategy == "concat" else chance or [])
    assert texts(open_source(cfg, write(tmp_path, lengths), seed=seed)) == want["text"][:]


@pytest.mark.parametrize("stop", ["under", "over"])
@pytest.mark.parametrize("probs", [[], [.4, .6]])
@pytest.mark.parametrize("step", [300, 1 << 20])
def test_a_draw_is_a_usable_row(tmp_path, monkeypatch, stop, probs, step):
    "Bad and empty rows take no draw from their part: the draws are those of `datasets` over the rows that can be used; each bad row is told once, though rows come again."
    from datasets import Dataset, interleave_datasets
    monkeypatch.setattr("ascend_nb.rows.CHUNK", step)
    monkeypatch.setattr("ascend_nb.mixtures.CHUNK", step)
    rows = [[dict(text="" if (i + s) % 3 == 0 else f"{s}.{i}") if i % 5 else dict(text=7) for i in range(20 + 9 * s)] for s in range(2)]
    usable = [Dataset.from_list([r for r in one if r["text"] not in ("", 7)]) for one in rows]
    theirs = interleave_datasets(usable, probabilities=probs or None, seed=3, stopping_strategy=dict(under="first_exhausted", over="all_exhausted")[stop])
    names, cfg = write(tmp_path, [20, 29], lambda s, i: rows[s][i]), RowsConfig(mix_strategy=f"interleave_{stop}", interleave_probs=probs, on_bad_row="report")
    source = open_source(cfg, names, seed=3)
    pieces = [(p.items, p.left_out, source.bad.count) for p in source.pieces()]
    assert [x["text"] for items, *_ in pieces for x in items] == theirs["text"][:]
    told = [x["row"] for x in source.bad.examples]
    assert len(set(told)) == len(told) == source.bad.count and set(told) <= {f"row {i + 1} of {s}.jsonl" for s in range(2) for i in range(0, len(rows[s]), 5)}
    if stop == "over": assert len(told) == 4 + 6 and sum(n for _, n, _ in pieces) == sum(r["text"] == "" for one in rows for r in one)
    for start in range(len(pieces)):
        again = open_source(cfg, names, seed=3)
        assert [p.items for p in again.pieces(start)] == [items for items, *_ in pieces[start:]] and again.bad.count == source.bad.count - (pieces[start - 1][2] if start else 0)


@pytest.mark.parametrize("loaded", [False, True])
def test_max_samples_and_bad_rows_of_a_resumed_run(tmp_path, monkeypatch, loaded):
    "Rows that are no rows, and rows that the handler refuses: a run that goes on at any piece tells each once. The same through datasets.load_dataset, which takes no broken lines."
    monkeypatch.setattr("ascend_nb.rows.CHUNK", 400)
    lines = [json.dumps(dict(text=f"{i}" if i % 7 else "", n=None if i % 5 else "x", list=None if i % 11 else ["a"])) for i in range(600)]
    if not loaded: lines[3::20] = ["not JSON"] * len(lines[3::20])
    (tmp_path / "a.jsonl").write_text("\n".join(lines))
    (tmp_path / "args.json").write_text(json.dumps(dict(path="json", data_files=str(tmp_path / "a.jsonl"), cache_dir=str(tmp_path / "cache"))))
    cfg = RowsConfig(max_samples=550 if loaded else 333, on_bad_row="report", handler_name="OddTest", hf_datasets_params=str(tmp_path / "args.json") if loaded else None)

    def read(start=0):
        source = open_source(cfg, str(tmp_path / "a.jsonl"))
        return [(source.index, p.items, p.rows_read, p.left_out, [x["row"] for x in source.bad.examples]) for p in source.pieces(start)], source

    whole, source = read()
    assert sum(p[2] for p in whole) == cfg.max_samples and len(whole) > 1 and [p[0] for p in whole] == list(range(len(whole))) and source.bad.count > 20
    for start in range(1, len(whole)):
        rest, again = read(start)
        before = whole[start - 1][4]
        assert [p[:4] for p in rest] == [p[:4] for p in whole[start:]] and [p[4] for p in rest] == [p[4][len(before):] for p in whole[start:]]
        assert again.bad.count == source.bad.count - len(before)


@handler("OddTest", "text", ("text",))
def odd_test(row):
    "a text that is not divisible by 9"
    if row["text"].isdigit() and int(row["text"]) % 9 == 0: raise BadCell("text", row["text"], "another number")
    return dict(text=row["text"]) if row["text"] else None


def test_small_pieces_change_nothing(tmp_path, monkeypatch):
    names, cfg = write(tmp_path, [40, 300]), RowsConfig(mix_strategy="interleave_over", interleave_probs=[.5, .5])
    whole = texts(open_source(cfg, names))
    monkeypatch.setattr("ascend_nb.rows.CHUNK", 99)
    monkeypatch.setattr("ascend_nb.mixtures.CHUNK", 999)
    source = open_source(cfg, names)
    pieces = [(source.index, p) for p in source.pieces()]
    assert [x["text"] for _, p in pieces for x in p.items] == whole and len(pieces) > 5 and [n for n, _ in pieces] == list(range(len(pieces)))
    for start in (1, 4, len(pieces)): assert [p.items for p in open_source(cfg, names).pieces(start)] == [p.items for _, p in pieces[start:]]
    where = [p.place.where(i) for _, p in pieces for i in range(len(p.items))]
    assert where == [f"row {int(t[2:]) + 1} of {t[0]}.jsonl" for t in whole]


@pytest.fixture
def mess(tmp_path):
    "Three files of chats with bad, empty and good rows."
    def row(s, i): return dict(instruction=f"{s}.{i}", output=["", None, 5, "a", "b", "c"][(i * 7 + s) % 6])
    names = write(tmp_path, [50, 3, 120], row)
    for s in (0, 2): (tmp_path / f"{s}.jsonl").write_text((tmp_path / f"{s}.jsonl").read_text().replace('.20"', ".20'") + "\n\nnot JSON\n")
    return names


def read(names, start=0, **kw):
    "(number, items, where each comes from, rows read, left out, bad rows so far) of each piece."
    bad = BadRows("report")
    source = open_source(RowsConfig(on_bad_row="report", handler_name="AlpacaStyleInstructionHandler"), names, bad, **kw)
    out = [(source.index, p.items, [p.place.where(i) for i in range(len(p.items))], p.rows_read, p.left_out, len(bad.examples)) for p in source.pieces(start)]
    assert bad.count == len(bad.examples) == (out[-1][-1] if out else 0), "no bad row is heard of after the last piece"
    return out, bad


def test_shares_and_resumption(mess, monkeypatch):
    "Any number of readers, and a reader that starts at any piece: the same items, the same bad rows, each in its piece."
    monkeypatch.setattr("ascend_nb.rows.CHUNK", 300)
    whole, bad = read(mess)
    assert len(whole) > 20 and [w[0] for w in whole] == list(range(len(whole))) and bad.count > 30
    assert sum(w[4] for w in whole) + bad.count + sum(len(w[1]) for w in whole) == 50 + 3 + 120 + 2
    for n in (2, 5):
        shares = [read(mess, part=(k, n)) for k in range(n)]
        assert sorted((p[:5] for out, _ in shares for p in out), key=lambda p: p[0]) == [w[:5] for w in whole]
        assert sorted(x["row"] for _, b in shares for x in b.examples) == sorted(x["row"] for x in bad.examples)
    for start in (1, 7, len(whole)):
        out, rest = read(mess, start)
        assert [p[:5] for p in out] == [w[:5] for w in whole[start:]]
        assert rest.examples == bad.examples[whole[start - 1][-1]:], "those before are not told again"


def test_max_samples(tmp_path, monkeypatch):
    names = write(tmp_path, [50, 3, 120])
    monkeypatch.setattr("ascend_nb.rows.CHUNK", 100)
    source = open_source(RowsConfig(max_samples=20), names)
    pieces = [(source.index, p.items) for p in source.pieces()]
    assert [x["text"] for _, p in pieces for x in p] == [f"{s}.{i}" for s, n in enumerate([20, 3, 20]) for i in range(n)] and not source.splittable
    assert [n for n, _ in pieces] == list(range(len(pieces)))
    for start in range(len(pieces)):
        assert [p.items for p in open_source(RowsConfig(max_samples=20), names).pieces(start)] == [p for _, p in pieces[start:]]


REGISTRY = [("identity", "chat", 91), ("alpaca_en_demo", "chat", 999), ("alpaca_zh_demo", "chat", 1000), ("glaive_toolcall_en_demo", "chat", 300), ("glaive_toolcall_zh_demo", "chat", 300),
            ("dpo_en_demo", "pair", 300), ("dpo_zh_demo", "pair", 300)]


@pytest.mark.parametrize("name, kind, n", REGISTRY)
def test_registry(shared_data, name, kind, n):
    "Each entry whose file is here, by name, is what its file is by guess."
    folder = shared_data / "instruct"
    source = open_source(RowsConfig(dataset_dir=str(folder)), f"./data/{name}")
    items = list(source)
    assert (source.kind, len(items)) == (kind, n) and items == list(open_source(RowsConfig(), str(folder / f"{name}.json")))
    assert all(isinstance(x, Pair if kind == "pair" else Record) for x in items)


@pytest.fixture
def llamafactory(monkeypatch):
    "Its parser and converters, without the rest of the package, which imports audio, pictures and training."
    spec = importlib.util.find_spec("llamafactory")
    if not spec: pytest.skip("llamafactory is not installed: pip install --no-deps --target DIR llamafactory, and PYTHONPATH=DIR")
    for name in ("", ".data", ".extras", ".v1", ".v1.utils", ".v1.plugins", ".v1.plugins.data_plugins"):
        package = types.ModuleType(f"llamafactory{name}")
        package.__path__ = [str(Path(spec.submodule_search_locations[0], *name.split(".")))]
        monkeypatch.setitem(sys.modules, package.__name__, package)
    def load(name): return importlib.import_module(f"llamafactory.{name}")
    return load("data.parser").get_dataset_list, load("data.converter").DATASET_CONVERTERS, load("v1.plugins.data_plugins.converter")


def in_their_words(messages):
    return [("function", m["tool_calls"][0]["function"]) if "tool_calls" in m else (m["role"], m["content"]) for m in messages]


def in_our_words(out):
    "Their system, prompt and answers; None where they drop the row."
    said = [("system", out["_system"])] if out["_system"] else []
    for m in out["_prompt"] + out["_response"]: said.append((dict(observation="tool").get(m["role"], m["role"]), json.loads(m["content"]) if m["role"] == "function" else m["content"]))
    return said if out["_response"] else None


@pytest.mark.parametrize("name, kind, n", REGISTRY)
def test_llamafactory_makes_the_same(shared_data, llamafactory, name, kind, n):
    get_dataset_list, converters, _ = llamafactory
    folder = str(shared_data / "instruct")
    attr, = get_dataset_list([name], folder)
    convert, rows = converters[attr.formatting](attr, None), json.loads((shared_data / "instruct" / attr.dataset_name).read_text(encoding="utf-8"))
    for row, item in zip(rows, open_source(RowsConfig(dataset_dir=folder), name), strict=True):
        theirs, tools = in_our_words(out := convert(row)), out["_tools"]
        if kind == "pair": assert theirs == in_their_words(item.chosen.messages) + in_their_words(item.rejected.messages[-1:]) and len(item.chosen.messages) == len(item.rejected.messages)
        else: assert theirs == in_their_words(item.messages) and json.loads(tools or "[]") == [t["function"] for t in item.tools or []]


def test_llamafactory_refuses_the_same(shared_data, llamafactory):
    "Chats with turns dropped, added, renamed: what they drop is a bad row here, what they keep comes out the same."
    get_dataset_list, converters, v1 = llamafactory
    attr, = get_dataset_list(["glaive_toolcall_en_demo"], str(shared_data / "instruct"))
    convert, ours, rng = converters["sharegpt"](attr, None), HANDLERS["SharegptStyleInstructionHandler"], random.Random(0)
    rows = json.loads((shared_data / "instruct" / attr.dataset_name).read_text(encoding="utf-8"))
    for row in rows: assert HANDLERS["OpenAIInstructionHandler"](v1.sharegpt_converter(row)) == ours(row), "their newer form with parts and loss_weight"
    logging.disable(logging.CRITICAL)
    refused = 0
    for row in rng.choices(rows, k=1000):
        talk = list(row["conversations"])
        for _ in range(rng.randint(0, 2)):
            k, new = rng.randrange(len(talk) + 1), {"from": rng.choice(["human", "gpt", "system", "observation", "bot"]), "value": "x"}
            talk[k:k + rng.randint(0, 1)] = [new] * rng.randint(0, 1)
        row = dict(row, conversations=talk)
        try: made = (record := ours(row)) and in_their_words(record.messages) # None: left out, because nobody speaks
        except BadCell: made = None
        assert made == in_our_words(convert(row))
        refused += made is None
    logging.disable(logging.NOTSET)
    assert 300 < refused < 900


def test_registry_mixture(shared_data):
    folder = shared_data / "instruct"
    cfg = RowsConfig(dataset_dir=str(folder), handler_name="LlamaFactoryInstructionHandler", mix_strategy="interleave_over", max_samples=60)
    got = list(open_source(cfg, "identity, glaive_toolcall_en_demo"))
    ours = [list(open_source(RowsConfig(), str(folder / f"{n}.json")))[:60] for n in ("identity", "glaive_toolcall_en_demo")]
    assert got == [x for pair in zip(*ours, strict=True) for x in pair]


def test_registry_entries(shared_data, tmp_path):
    "Columns, tags, ranking, folders and documents, from an info file like LLaMA-Factory's."
    info = {"docs": dict(file_name="d", subset="en", folder="x", columns=dict(prompt="content")), "plain": dict(file_name="d/en/x/a.jsonl", columns=dict(prompt="text")),
            "only": dict(file_name="o.json", columns=dict(prompt="q", response="a")), "all": dict(file_name="o2.json"),
            "talk": dict(file_name="t.json", formatting="sharegpt", columns=dict(messages="m"), tags=dict(role_tag="role", content_tag="content", user_tag="user", assistant_tag="assistant")),
            "open": dict(file_name="t2.json", formatting="openai"), "rank": dict(file_name="r.json", ranking=True, columns=dict(prompt="q", chosen="c", rejected="r"))}
    (tmp_path / "d/en/x").mkdir(parents=True)
    (tmp_path / "d/en/x/a.jsonl").write_text('{"content": "hello", "text": "other"}\n')
    for name, row in (("o", dict(q="q", a="a", input="not named, not read", history=[["x", "y"]], system="s")), ("o2", dict(instruction="q", input="i", output="a", history=[["x", "y"]])),
                      ("t", dict(m=[dict(role="user", content="q"), dict(role="assistant", content="a")], system="not named")), ("t2", dict(messages=[dict(role="user", content="q"), dict(role="assistant", content="a")])),
                      ("r", dict(q="q", c="good", r="bad"))): (tmp_path / f"{name}.json").write_text(json.dumps([row]))
    (tmp_path / "dataset_info.json").write_text(json.dumps(info))
    one = {n: next(iter(open_source(RowsConfig(dataset_dir=str(tmp_path)), n))) for n in info}
    said = {n: [m["content"] for m in r.messages] for n, r in one.items() if isinstance(r, Record)}
    assert one["docs"] == dict(text="hello") and one["plain"] == dict(text="other")
    assert said == dict(only=["q", "a"], all=["x", "y", "q\ni", "a"], talk=["q", "a"], open=["q", "a"])
    assert [m["content"] for m in one["rank"].rejected.messages] == ["q", "bad"]


@pytest.mark.parametrize("name, says", [("mllm_demo", "Found images in the entry mllm_demo"), ("kto_en_demo", "Found kto_tag"), ("alpaca_en", "only hf_hub_url=llamafactory/alpaca_en"),
                                        ("idenity", "no data set idenity .* Did you mean identity"), ("wiki_demo", "Found nothing at .*wiki_demo.txt"), ("identity,dpo_en_demo", "chat, pair in one mixture .*identity.json: Alpaca")])
def test_registry_mistakes(shared_data, name, says):
    with pytest.raises(UserError, match=says): open_source(RowsConfig(dataset_dir=str(shared_data / "instruct")), name)


def test_mistakes(tmp_path):
    names = write(tmp_path, [2, 2])
    def bad(says, names=names, **cfg):
        with pytest.raises(UserError, match=says): list(open_source(RowsConfig(**cfg), names))
    bad("expected 2 numbers above 0", mix_strategy="interleave_under", interleave_probs=[1])
    bad("expected 2 numbers above 0", mix_strategy="interleave_over", interleave_probs=[1, 0])
    for probs in ([.5, .6], [1.5, -.5], [0, 0], [float("nan"), 1], [.2, .3, .5], [.5]): bad("numbers above 0 that add up to 1", mix_strategy="interleave_over", interleave_probs=probs)
    bad("interleave_probs=.* with mix_strategy=concat; expected several data sets", interleave_probs=[.5, .5])
    bad("interleave_probs=.* with one data set; expected several data sets", f"{tmp_path}/0.jsonl", interleave_probs=[1], mix_strategy="interleave_over")
    bad("without --dataset-dir", handler_name="LlamaFactoryInstructionHandler")
    bad("Found handler_name='AlpacaStyleInstructionHandler'", dataset_dir=str(tmp_path), handler_name="AlpacaStyleInstructionHandler")
    bad("Found nothing at .*dataset_info.json", dataset_dir=str(tmp_path))
    bad("Found nothing at .*no.txt", f"{tmp_path}/no.txt")
    bad("Found nothing at .*no.txt", f"{tmp_path}/0.jsonl,{tmp_path}/no.txt")
    bad("no column 'question' in .*0.jsonl, which has text; map_keys calls prompt so", map_keys={"prompt": "question"})
    (tmp_path / "more").mkdir()
    bad("expected those of a known form", write(tmp_path / "more", [1], lambda s, i: dict(n=i)))
    for text, says in (("{", "is not a registry"), ("[]", "it holds a list"), ('{"a": "a.json"}', "a is a str"), ('{"a": {"file_name": "x", "columns": ["q"]}}', "a.columns is a list"), ("[" * 99_999, "is not a registry")):
        (tmp_path / "dataset_info.json").write_text(text)
        bad(says, "a", dataset_dir=str(tmp_path))
    (tmp_path / "empty.jsonl").write_text("no\n")
    bad("Found no usable row in .*empty.jsonl; .* The first: Line 1", f"{tmp_path}/1.jsonl,{tmp_path}/empty.jsonl", mix_strategy="interleave_over", on_bad_row="skip", handler_name="GeneralPretrainHandler")
    with pytest.raises(ValueError, match="splittable"): open_source(RowsConfig(max_samples=1), names, part=(0, 2))


def test_a_path_with_a_comma(tmp_path):
    (tmp_path / "a,b.txt").write_text("one\n")
    assert texts(open_source(RowsConfig(), str(tmp_path / "a,b.txt"))) == ["one"]


def test_rows_of_load_dataset(shared_data, tmp_path):
    "Arguments in a JSON file: a slice of a CSV, and the same file as we read it."
    file = shared_data / "pretrain" / "TruthfulQA.csv"
    args = tmp_path / "args.json"
    args.write_text(json.dumps(dict(path="csv", data_files=str(file), split="train[10:700]")))
    cfg = RowsConfig(hf_datasets_params=str(args), json_keys=["Question", "Source"])
    object.__setattr__(cfg, "cache_dir", str(tmp_path / "cache"))
    source = open_source(cfg, "")
    pieces = list(source.pieces())
    ours = list(open_source(RowsConfig(json_keys=["Question", "Source"]), str(file)))[10:700]
    assert [x for p in pieces for x in p.items] == ours and not source.splittable and source.done_bytes == source.total_bytes > 0
    assert len(pieces) == 2 and pieces[1].place.where(0) == "row 513 of args.json" and source.identity()["parts"][0]["loaded"]
    assert [p.items for p in source.pieces(1)] == [pieces[1].items]
    args.write_text(json.dumps(dict(path="csv", data_files=str(file), streaming=True)))
    assert len(list(open_source(cfg, ""))) == 817
    args.write_text(json.dumps(dict(path="csv", data_files="absent.csv")))
    with pytest.raises(UserError, match="load_dataset could not use .*FileNotFound"): LoadedRows(args)
    with pytest.raises(UserError, match="Found nothing at"): LoadedRows(tmp_path / "absent.json")
    (tmp_path / "head.csv").write_text("text,n\n")
    args.write_text(json.dumps(dict(path="csv", data_files=str(tmp_path / "head.csv"), streaming=True)))
    with pytest.raises(UserError, match="Found no rows in .*args.json"): list(LoadedRows(args).pieces())
    (tmp_path / "cut.jsonl").write_text('{"text": "a"}\n{"text": \n')
    args.write_text(json.dumps(dict(path="json", data_files=str(tmp_path / "cut.jsonl"), streaming=True)))
    with pytest.raises(UserError, match="cannot read on behind row 0|could not use"): list(open_source(cfg, ""))


def test_identity(tmp_path):
    "What changes the items changes the identity; what does not, does not."
    names, cfg = write(tmp_path, [3, 3]), RowsConfig(mix_strategy="interleave_under")
    def who(cfg=cfg, names=names, **kw): return json.dumps(open_source(cfg, names, **kw).identity())
    first = who()
    assert who() == who(replace(cfg, on_bad_row="skip", append_eod=True, prompt_type="chatml")) == first
    os.chdir(tmp_path)
    assert who(names="0.jsonl,1.jsonl") == first, "a file is a file"
    others = [who(replace(cfg, mix_strategy="interleave_over")), who(seed=1), who(replace(cfg, interleave_probs=[.5, .5])), who(replace(cfg, max_samples=2)), who(names="1.jsonl,0.jsonl"),
              who(names="0.jsonl"), who(replace(cfg, handler_name="ParagraphTest"))]
    os.utime(tmp_path / "0.jsonl", ns=(1, 1))
    others.append(who())
    assert len({first, *others}) == 9
    assert who(names="0.jsonl") == who(replace(cfg, mix_strategy="concat"), names="0.jsonl"), "one data set is not mixed"


@handler("ParagraphTest", "text", ("text",))
def paragraph_test(row):
    "letters"
    return [dict(text=c) for c in row["text"]]


def test_an_item_names_its_row_also_in_another_process(tmp_path):
    source = open_source(RowsConfig(handler_name="ParagraphTest"), write(tmp_path, [2]))
    piece, = source.pieces()
    assert [x["text"] for x in piece.items] == list("0.00.1") and piece.rows_read == 2
    again = pickle.loads(pickle.dumps(piece))
    assert again.items == piece.items and [again.place.where(i) for i in (2, 3)] == ["row 1 of 0.jsonl", "row 2 of 0.jsonl"]


def test_identity_sees_what_is_read_and_how(tmp_path):
    "Columns that an entry leaves out are not read, a handler that was rewritten is another one."
    (tmp_path / "a.json").write_text('[{"q": "q", "input": "i", "a": "a"}]')
    names = dict(prompt="q", response="a")
    (tmp_path / "dataset_info.json").write_text(json.dumps(dict(a=dict(file_name="a.json", columns=names))))
    entry, plain = open_source(RowsConfig(dataset_dir=str(tmp_path)), "a"), open_source(RowsConfig(map_keys=names), str(tmp_path / "a.json"))
    assert list(entry) != list(plain) and entry.identity() != plain.identity()
    cfg, seen = RowsConfig(handler_name="RewrittenTest"), []
    for n, line in enumerate(("return dict(text=row['q'])", "return dict(text=row['a'])", "return dict(text=row['a'])")):
        (tmp_path / f"mine{n}.py").write_text(f"from ascend_nb.handlers import handler\n\n@handler('RewrittenTest', 'text')\ndef mine(row):\n    {line}\n")
        sys.path.insert(0, str(tmp_path))
        __import__(f"mine{n}")
        seen.append(open_source(cfg, str(tmp_path / "a.json")).identity())
    assert seen[0] != seen[1] == seen[2]


def load_file(path, name="loose"):
    "As importlib's documentation loads a file: the module is in nobody's list."
    spec = importlib.util.spec_from_file_location(name, path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_identity_of_handlers_from_anywhere(tmp_path):
    "From a file that is no module's, typed into an interpreter, a partial, an object: an identity, which a rewrite changes, also one of what the handler calls."
    (tmp_path / "a.json").write_text('[{"q": "q", "a": "a"}]')
    def identity(): return open_source(RowsConfig(handler_name="LooseTest"), str(tmp_path / "a.json")).identity()
    mine = "from ascend_nb.handlers import handler\nfrom helper_of_loose import clean\n@handler('LooseTest', 'text')\ndef mine(row):\n    'mine'\n    return dict(text=clean(row['{}']))\n"
    seen = []
    for column, word in (("q", "strip"), ("a", "strip"), ("a", "lower"), ("a", "lower")):
        (tmp_path / "helper.py").write_text(f"def clean(x): return x.{word}()\n")
        sys.modules["helper_of_loose"] = load_file(tmp_path / "helper.py", "helper_of_loose")
        (tmp_path / "loose.py").write_text(mine.format(column))
        load_file(tmp_path / "loose.py")
        seen.append(identity())
    del sys.modules["helper_of_loose"]
    assert seen[0] != seen[1] != seen[2] == seen[3]
    typed = []
    for word, least in (("q", 1), ("a", 1), ("a", 2), ("a", 2)):
        exec(f"def typed(row):\n    'typed'\n    return dict(text=row['{word}'] * least if row['{word}'] in {{'q', 'a', 'b'}} else '')", scope := dict(least=least))
        handler("LooseTest", "text")(scope["typed"])
        typed.append(identity())
    assert typed[0] != typed[1] != typed[2] == typed[3]
    from functools import partial
    for made in (partial(lambda by, row: dict(text=row["q"] * by), 2), type("Made", (), dict(__call__=lambda self, row: dict(text=row["q"])))()):
        made.__doc__ = "made"
        handler("LooseTest", "text")(made)
        assert identity() == identity() and identity() not in (*seen, *typed)
    del HANDLERS["LooseTest"]


def test_identity_of_loaded_rows(tmp_path):
    "The data behind the arguments counts, not the arguments alone."
    seen = []
    for streaming in (False, True):
        (tmp_path / "args.json").write_text(json.dumps(dict(path="json", data_files=str(tmp_path / "a.jsonl"), streaming=streaming, cache_dir=str(tmp_path / "cache"))))
        for text in ("a", "b"):
            (tmp_path / "a.jsonl").write_text(json.dumps(dict(text=text)))
            def identity(): return open_source(RowsConfig(hf_datasets_params=str(tmp_path / "args.json")), "").identity()
            assert identity() == identity() not in seen
            seen.append(identity())


def test_prompt_types(tmp_path):
    names = write(tmp_path, [1, 1], lambda s, i: dict(instruction="q", output="a"))
    assert open_source(RowsConfig(handler_name="GeneralInstructionHandler"), names).prompt_type == "modellink_alpaca"
    assert open_source(RowsConfig(), names).prompt_type is None


def test_list_of_handlers_is_complete():
    modellink = ["GeneralPretrainHandler", "AlpacaPretrainHandler", "StackOverflowPythonPretrainHandler", "SharegptPretrainHandler", "GeneralInstructionHandler", "AlpacaStyleInstructionHandler",
                 "SharegptStyleInstructionHandler", "OpenAIInstructionHandler", "LlamaFactoryInstructionHandler", "BelleMultiTurnInstructionHandler", "MOSSInstructionHandler", "MOSSMultiTurnHandler",
                 "LeetcodePythonInstructionHandler", "AlpacaStylePairwiseHandler", "SharegptStylePairwiseHandler"]
    assert set(modellink) <= set(HANDLERS)


@pytest.mark.parametrize("name, data, cfg", [
    ("none.jsonl", None, {}), ("a.pdf", b"x", {}), ("a.csv", b"a,a\n1,2\n", {}), ("a.csv", b"text\na,b\n", {}), ("a.json", b'[{"text": "a"', {}), ("a.json", b'[{"text": "\xff"}]', {}), ("a.jsonl", b'{"text": }\n', {}),
    ("a.jsonl", b"[1]\n", {}), ("a.parquet", b"PAR1", {}), ("a.jsonl", b'{"n": 1}\n', {}), ("a.jsonl", b'{"text": "a"}\n', dict(interleave_probs=[.5, .5])), ("a.jsonl", b'{"text": "a"}\n', dict(map_keys=dict(prompt="q"))),
    ("a.jsonl", b'{"text": "a"}\n', dict(dataset_dir=".")), ("a.jsonl", b'{"text": "a"}\n', dict(hf_datasets_params="none.json")), ("a.jsonl", b'{"text": "a"}\n', dict(json_keys=["n"], handler_name="GeneralPretrainHandler"))])
def test_what_is_wrong_is_said_in_chinese(tmp_path, monkeypatch, name, data, cfg):
    "All of the sentence, but for names, values and what other libraries say."
    monkeypatch.setenv("ASCEND_NB_LANG", "zh")
    monkeypatch.chdir(tmp_path)
    if data is not None: Path(name).write_bytes(data)
    with pytest.raises(UserError) as e: list(open_source(RowsConfig(**cfg), name))
    prose = re.sub(r"（[^（）]*）" if name in ("a.parquet",) or b"}" in (data or b"")[-3:] else r"\x00", "", str(e.value))
    assert re.search("[\u4e00-\u9fff]", prose) and not re.search(r"\b(expected|a file|folder|Check|the|found|nothing|with|names|early|cells|registry|arguments)\b", prose), prose


MEMORY = """
import re, sys
from ascend_nb.config import RowsConfig
from ascend_nb.mixtures import open_source
cfg = RowsConfig(mix_strategy="interleave_over", interleave_probs=[.5, .5])
n = sum(1 for _ in open_source(cfg, sys.argv[1]))
print(n, re.search(r"VmHWM:\\s+(\\d+)", open("/proc/self/status").read())[1])
"""


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="peak memory is read from /proc")
def test_memory_of_a_mixture(tmp_path):
    "Eight times the rows, no more memory (KiB) than a few pieces."
    used = []
    for n in (10_000, 80_000):
        names = write(tmp_path, [n, n // 2], lambda s, i: dict(instruction=f"{i} the quick brown fox 敏捷 " * 9, output="jumps " * 9))
        count, peak = subprocess.run([sys.executable, "-c", MEMORY, names], capture_output=True, text=True, check=True).stdout.split()
        assert int(count) > 1.9 * n
        used.append(int(peak))
    assert used[1] - used[0] < 16 * 1024, used
