"""Our readers against `datasets`, and what they say of broken files."""
import json
import subprocess
import sys
from pathlib import Path

import pytest

from ascend_nb.core import UserError
from ascend_nb.handlers import CHUNK, HANDLERS, READERS, Record, column, convert, get_handler, read_rows

REAL = ["c4.parquet", "TruthfulQA.csv", "lunyu.json", "c4_demo.jsonl", "wiki_demo.txt", "tinyshakespeare.txt", "arrow_trec/train"]


@pytest.mark.parametrize("name", REAL)
def test_same_rows_as_datasets(shared_data, tmp_path, name):
    "Each format of real data: the rows that Hugging Face's loader gives."
    import datasets
    path = shared_data / "pretrain" / name
    form = {".jsonl": "json", ".txt": "text", "": "arrow"}.get(path.suffix, path.suffix[1:])
    file = path / "data-00000-of-00001.arrow" if path.is_dir() else path
    theirs = datasets.load_dataset(form, data_files=str(file), split="train", cache_dir=str(tmp_path))
    ours = list(read_rows(path))
    assert len(ours) == len(theirs) and list(ours[0]) == theirs.column_names
    for a, b in zip(ours, theirs, strict=True):
        assert a == {k: "" if v is None and form == "csv" else v for k, v in b.items()}


@pytest.fixture
def records():
    "Rows with everything that trips a parser up, larger than two pieces."
    hard = ['"quotes" \\ and \\u00e9', "a,b\n\nc\r\nd", "敏捷的狐狸 😀", "", " ] [ } { ", "\u2028\x1f line", "x" * (CHUNK // 2)]
    return [dict(id=i, text=hard[i % len(hard)] + str(i)) for i in range(40)]


def write(folder, form, rows):
    "The same rows in one of the formats, by libraries other than ours."
    import pandas as pd
    import pyarrow as pa
    frame, file = pd.DataFrame(rows), folder / f"data{form}"
    table = pa.Table.from_pandas(frame)
    if form == ".parquet": frame.to_parquet(file, row_group_size=7)
    elif form == ".csv": frame.to_csv(file, index=False)
    elif form == ".json": file.write_text(json.dumps(rows, indent=1), encoding="utf-8")
    elif form == ".jsonl": frame.to_json(file, orient="records", lines=True, force_ascii=False)
    elif form == ".arrow":
        with pa.OSFile(str(file), "wb") as f, pa.ipc.new_stream(f, table.schema) as w: w.write_table(table, max_chunksize=9)
    else:
        with pa.OSFile(str(file), "wb") as f, pa.ipc.new_file(f, table.schema) as w: w.write_table(table, max_chunksize=9)
    return file


@pytest.mark.parametrize("form", [".parquet", ".csv", ".json", ".jsonl", ".arrow", "footer.arrow"])
def test_rows_larger_than_a_piece(tmp_path, records, form):
    file = write(tmp_path, form, records)
    rows = read_rows(file)
    pieces = list(rows.pieces())
    assert [str(r["text"]) for p in pieces for r in p] == [r["text"] for r in records]
    assert [int(r["id"]) for p in pieces for r in p] == list(range(40))
    assert len(pieces) > 2 and max(sum(len(r["text"]) for r in p) for p in pieces) < 3 * CHUNK
    assert rows.done_bytes == rows.total_bytes == file.stat().st_size


@pytest.mark.parametrize("text", ['[{"a": 1},\n{"a": 2}]', '[\n{"a":1}\n,{"a":2}\n]\n', '{"a": 1}\n{"a": 2}', '{\n"a": 1\n}\n\n{"a": 2}\n', '\ufeff[{"a": 1}, {"a": 2}] '])
@pytest.mark.parametrize("step", [1, 2, 3, 7, 1 << 20])
def test_json_cut_anywhere(tmp_path, monkeypatch, text, step):
    "Whatever the size of the buffer, the rows are json's."
    monkeypatch.setattr("ascend_nb.handlers.CHUNK", step)
    (tmp_path / "x.json").write_text(text, encoding="utf-8")
    assert list(read_rows(tmp_path / "x.json")) == [{"a": 1}, {"a": 2}]


def test_json_with_hard_values_cut_anywhere(tmp_path, monkeypatch):
    monkeypatch.setattr("ascend_nb.handlers.CHUNK", 5)
    rows = [dict(t='\\"\\\\', u="é😀", n=-1.5e-7, b=[True, None, {"x": []}], d={"y": "]}"}), {}, dict(t="\ud83d\ude00 \t")]
    (tmp_path / "x.json").write_text(json.dumps(rows, indent=2))
    assert list(read_rows(tmp_path / "x.json")) == json.loads(json.dumps(rows))


def test_text_lines(tmp_path):
    "Every line is a row: empty ones, Windows' endings, no ending at the end."
    (tmp_path / "x.txt").write_bytes("\ufeffone\r\n\r\n\n三\nend".encode())
    assert [r["text"] for r in read_rows(tmp_path / "x.txt")] == ["one", "", "", "三", "end"]


def test_folders(shared_data, tmp_path):
    "Files in the order of their names; what save_to_disk writes beside them is no data; a mixture is refused."
    import datasets
    datasets.Dataset.from_dict({"text": ["a", "b", "c"]}).save_to_disk(tmp_path / "saved", num_shards=2)
    rows = read_rows(tmp_path / "saved")
    assert [r["text"] for r in rows] == ["a", "b", "c"] and [p.suffix for p in rows.files] == [".arrow"] * 2
    for name, text in (("b.txt", "B"), ("a.txt", "A"), ("README.md", "no data"), (".hidden.txt", "h")): (tmp_path / name).write_text(text)
    assert [r["text"] for r in read_rows(tmp_path)] == ["A", "B"]
    with pytest.raises(UserError, match=r"9 \.json, 2 \.jsonl"): read_rows(shared_data / "instruct")
    assert len(list(read_rows(shared_data / "pretrain" / "arrow_trec" / "train" / "data-00000-of-00001.arrow"))) == len(list(read_rows(shared_data / "pretrain" / "arrow_trec" / "train")))
    with pytest.raises(UserError, match=r"holds: LICENSE, more/"):
        (tmp_path / "odd" / "more").mkdir(parents=True); (tmp_path / "odd" / "LICENSE").touch()
        read_rows(tmp_path / "odd")


BROKEN = [
    ("a.jsonl", b'{"text": "a"}\n\n{"text": }\n', "Line 3 of .*Expecting value at column 10"),
    ("a.jsonl", b'{"text": "a"}\n[1]\n', "Found a list as row 2 of a.jsonl"),
    ("a.json", b'[{"text": "a"},\n{"text": "b" "c"},\n{"text": "d"}' + b" " * 99 + b"]", "Line 2 of .*Expecting ',' delimiter"),
    ("a.json", b'[{"text": "a"},\n{"text": "b"},', "Line 2 of .*ends too early"),
    ("a.json", b'[{"text": "a"},\n{"text": b}]', "Line 2 of .*Expecting value"), ("a.json", b'{"text": "a"}\n{"text": 1', "Line 2 of .*too early"),
    ("a.json", b"[1, 2]", "Found a int as row 1"), ("a.json", b"", "no rows"), ("a.json", b"[ ]", "no rows"), ("a.json", b"\n", "no rows"),
    ("a.txt", b"", "no rows"), ("a.csv", b"text,n\n", "no rows"), ("a.jsonl", b"\n\n", "no rows"),
    ("a.txt", b"fine\nfine\nnot \xb0 fine\n", "line 3 holds the byte 0xb0"), ("a.txt", "half 好".encode()[:-1], "line 1 holds"),
    ("a.csv", b"text\n\xff\n", "line 2 holds the byte 0xff"), ("a.jsonl", b'{"text": "\xff"}', "line 1 holds"),
    ("a.csv", b'text,n\n"a,1\nb,2\n', "Line 2 of .*unexpected end of data"), ("a.csv", b"text,n\na,1\nb,2,3\n", "Line 3 .*3 cells under 2 names"),
    ("a.parquet", b"PAR1 no more", "cannot be read as Parquet"), ("a.arrow", b"ARROW1 no more", "cannot be read as Arrow"), ("a.arrow", b"", "cannot be read as Arrow"),
    ("a.pdf", b"x", r"expected files of one of .parquet"),
]


@pytest.mark.parametrize("name, data, says", BROKEN)
def test_broken_files_say_what_is_wrong(tmp_path, name, data, says):
    (tmp_path / name).write_bytes(data)
    with pytest.raises(UserError, match=says): list(read_rows(tmp_path / name))


@pytest.mark.parametrize("form", [".parquet", ".arrow", "footer.arrow", ".json"])
@pytest.mark.parametrize("share", [.3, .9, .999])
def test_cut_off_files(tmp_path, records, form, share):
    "A download that stopped early is never taken for a whole file."
    file = write(tmp_path, form, records)
    data = file.read_bytes()
    file.write_bytes(data[:int(len(data) * share)])
    with pytest.raises(UserError, match="cannot be read|is not JSON|no rows"): list(read_rows(file))


def test_alpaca_history_stays_in_order(shared_data):
    rows = read_rows(shared_data / "instruct" / "oaast_sft_zh.json")
    raw = json.loads((shared_data / "instruct" / "oaast_sft_zh.json").read_text(encoding="utf-8"))
    made = [r for piece in rows.pieces() for r in convert(piece, get_handler("AlpacaStyleInstructionHandler"), rows)]
    assert len(made) == len(raw) == 689 and any(len(r["history"]) > 1 for r in raw)
    for row, rec in zip(raw, made, strict=True):
        said = [m["content"] for m in rec.messages]
        assert said == [x for turn in row["history"] for x in turn] + [row["instruction"] + ("\n" + row["input"]) * bool(row["input"]), row["output"]]
        assert [m["role"] for m in rec.messages] == ["user", "assistant"] * (len(said) // 2)


def alpaca(**row): return HANDLERS["AlpacaStyleInstructionHandler"].make(dict(instruction="", output="a") | row)


def test_alpaca_corners():
    assert alpaca(instruction="q", system="s") == Record([dict(role="system", content="s"), dict(role="user", content="q"), dict(role="assistant", content="a")])
    assert alpaca(input="only input").messages[0]["content"] == "only input"
    assert alpaca() is None and alpaca(instruction="q", output="") is None and alpaca(instruction="q", output=None) is None
    assert alpaca(instruction="q", history=None) == alpaca(instruction="q", history=[]) == alpaca(instruction="q", input=None)


@pytest.mark.parametrize("row, says", [
    (dict(instructions="q", output="a"), "no column 'instruction' in row 2 of x.jsonl, which has instructions, output; Alpaca.* Did you mean instructions"),
    (dict(instruction="q", output=["a", "b"]), "Found a list in column 'output' of row 2 .*expected text"),
    (dict(instruction="q", output="a", history=["x"]), "column 'history' of row 2 .*list of")])
def test_wrong_rows_are_named(tmp_path, row, says):
    (tmp_path / "x.jsonl").write_text("\n".join(map(json.dumps, (dict(instruction="q", output="a"), row))))
    rows = read_rows(tmp_path / "x.jsonl")
    with pytest.raises(UserError, match=says):
        for piece in rows.pieces(): convert(piece, get_handler("AlpacaStyleInstructionHandler"), rows)


def test_half_a_character_is_named(tmp_path):
    "A \\ud83d alone is valid JSON and no text: crawled data has it, and no tokenizer takes it."
    (tmp_path / "x.jsonl").write_text('{"text": "ok \\ud83d\\ude00", "instruction": "q", "output": "a"}\n{"text": "cut \\ud83d", "instruction": "q", "output": "\\ude00"}')
    rows = read_rows(tmp_path / "x.jsonl")
    piece = next(rows.pieces())
    with pytest.raises(UserError, match="half a character .* in column 'text' of row 2 of x.jsonl"): column(piece, "text", rows)
    with pytest.raises(UserError, match="half a character .* of row 2 of x.jsonl"): convert(piece, get_handler("AlpacaStyleInstructionHandler"), rows)
    assert column(piece[:1], "text", rows) == ["ok 😀"]


@pytest.mark.parametrize("row, says", [(dict(txt="a"), "no column 'text' in row 2 of x.jsonl, which has txt; .* Did you mean txt"),
                                       (dict(text=7), "Found a int in column 'text' of row 2"), (dict(text=["a"]), "Found a list in column 'text' of row 2")])
def test_wrong_text_columns_are_named(tmp_path, row, says):
    (tmp_path / "x.jsonl").write_text("\n".join(map(json.dumps, (dict(text=None), row))))
    rows = read_rows(tmp_path / "x.jsonl")
    with pytest.raises(UserError, match=says):
        for piece in rows.pieces(): column(piece, "text", rows)
    assert column([dict(text=None), dict(text="a")], "text", rows) == ["", "a"]


MEMORY = """
import re, sys
from ascend_nb.handlers import read_rows
n = sum(len(r["text"]) for r in read_rows(sys.argv[1]))
print(n, re.search(r"VmHWM:\\s+(\\d+)", open("/proc/self/status").read())[1])
"""


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="peak memory is read from /proc")
@pytest.mark.parametrize("form", sorted(READERS))
def test_memory_does_not_grow_with_the_file(tmp_path, form):
    "Eight times the file, at most a piece or two more memory (in KiB)."
    import pyarrow as pa
    import pyarrow.parquet
    used = {}
    for n in (20_000, 160_000):
        texts, file = [f"{i} the quick brown fox 敏捷 " * 8 for i in range(n)], tmp_path / f"{n}{form}"
        table = pa.table({"text": texts})
        if form == ".parquet": pyarrow.parquet.write_table(table, file, row_group_size=10_000)
        elif form == ".arrow":
            with pa.ipc.new_stream(str(file), table.schema) as w: w.write_table(table, max_chunksize=1000)
        elif form == ".json": file.write_text(json.dumps([dict(text=t) for t in texts]))
        elif form == ".jsonl": file.write_text("\n".join(json.dumps(dict(text=t)) for t in texts))
        elif form == ".csv": file.write_text("text\n" + "\n".join(texts), encoding="utf-8")
        else: file.write_text("\n".join(texts), encoding="utf-8")
        count, peak = subprocess.run([sys.executable, "-c", MEMORY, str(file)], capture_output=True, text=True, check=True).stdout.split()
        assert int(count) == sum(map(len, texts))
        used[n] = int(peak)
    assert used[160_000] - used[20_000] < 12 * 1024, used
