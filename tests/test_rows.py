"""Our readers against `datasets`: the same rows, in pieces that several processes share; and what they say of broken files."""
import json
import pickle
import random
import re
import subprocess
import sys
from pathlib import Path

import pytest

from ascend_nb.core import UserError
from ascend_nb.rows import CHUNK, READERS, BadRows, read_rows

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
    monkeypatch.setattr("ascend_nb.rows.CHUNK", step)
    (tmp_path / "x.json").write_text(text, encoding="utf-8")
    assert list(read_rows(tmp_path / "x.json")) == [{"a": 1}, {"a": 2}]


def test_json_with_hard_values_cut_anywhere(tmp_path, monkeypatch):
    monkeypatch.setattr("ascend_nb.rows.CHUNK", 5)
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
    ("a.csv", b'text,n\n"a,1\nb,2\n', "Line 2 of .*unexpected end of data"), ("a.csv", b"text,n\na,1\nb,2,3\n", "Line 3 .*3 cells where the header names 2"),
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


@pytest.mark.parametrize("text", ["a\rb\r\nc\r\r\nd\n\n", "\r", "\n", "a\n\rb", "x\r\n", "\u2028 \x0b \x0c \x85 one line\n"])
def test_line_ends_as_datasets_sees_them(tmp_path, text):
    import datasets
    file = tmp_path / "x.txt"
    file.write_bytes(text.encode())
    theirs = datasets.load_dataset("text", data_files=str(file), split="train", cache_dir=str(tmp_path))
    assert [r["text"] for r in read_rows(file)] == theirs["text"][:]


def shares(path, n, bad=None):
    "All pieces, read by n readers: (number, rows, the place of the first and last)."
    out = []
    for k in range(n):
        rows = read_rows(path, bad, (k, n))
        for piece in rows.pieces(): out.append((rows.index, piece, rows.place()))
    return sorted(out, key=lambda x: x[0])


@pytest.mark.parametrize("name", REAL)
@pytest.mark.parametrize("step", [3001, 50_000])
def test_shares_are_the_file(shared_data, monkeypatch, name, step):
    "Whatever the number of readers: the same pieces, and the same name for each row."
    monkeypatch.setattr("ascend_nb.rows.CHUNK", step)
    path = shared_data / "pretrain" / name
    whole = shares(path, 1)
    assert [r for _, piece, _ in whole for r in piece] == list(read_rows(path))
    assert [n for n, *_ in whole] == list(range(len(whole)))
    ends = lambda pieces: [[p.where(0), p.where(len(piece) // 2), p.where(len(piece) - 1)] for _, piece, p in pieces if piece]  # noqa: E731
    named = ends(whole)
    for n in (2, 3, 7):
        mine = shares(path, n)
        assert [x[:2] for x in mine] == [x[:2] for x in whole]
        assert ends(mine[::-1]) == named[::-1]
    if step > 9999: return
    for start in (1, len(whole) // 2, len(whole) - 1, len(whole)):
        rows = read_rows(path)
        assert [(rows.index, p, rows.where(0) if p else "") for p in rows.pieces(start)] == [(n, p, pl.where(0) if p else "") for n, p, pl in whole[start:]]


@pytest.mark.parametrize("form", [".parquet", ".csv", ".json", ".jsonl", ".arrow", "footer.arrow"])
def test_shares_of_every_format(tmp_path, records, form):
    file = write(tmp_path, form, records)
    whole = shares(file, 1)
    for n in (2, 5): assert [x[:2] for x in shares(file, n)] == [x[:2] for x in whole]
    (tmp_path / "more").mkdir()
    for part in "ab": (tmp_path / "more" / f"{part}{file.suffix}").write_bytes(file.read_bytes())
    pieces = shares(tmp_path / "more", 3)
    assert [p for _, p, _ in pieces] == [p for _, p, _ in whole] * 2 and [n for n, *_ in pieces] == list(range(2 * len(whole)))
    assert pieces[-1][2].where(0) == whole[-1][2].where(0).replace(file.name, f"b{file.suffix}")


def test_other_shares_are_not_decoded(tmp_path, monkeypatch):
    "A byte that is no UTF-8 and a line that is no JSON disturb their own share alone, and a reader that starts behind them not at all."
    monkeypatch.setattr("ascend_nb.rows.CHUNK", 64)
    lines = [b'{"n": %d, "pad": "................................"}' % i for i in range(9)]
    lines[3], lines[5] = b'{"n": "\xff ................................................"}', b"{'n': 5, 'pad': '..................................'}"
    (tmp_path / "x.jsonl").write_bytes(b"\n".join(lines))
    whole = BadRows("skip")
    numbers = []
    rows = read_rows(tmp_path / "x.jsonl", whole)
    for piece in rows.pieces(): numbers.append((rows.index, [r["n"] for r in piece]))
    assert sum((p for _, p in numbers), []) == [0, 1, 2, 4, 6, 7, 8] and whole.count == 2
    ends = [k for k in range(3) if not _raises(lambda k=k: list(read_rows(tmp_path / "x.jsonl", part=(k, 3))))]
    assert ends == [k for k in range(3) if k not in {_block(lines, 3) % 3, _block(lines, 5) % 3}]
    assert [r["n"] for p in read_rows(tmp_path / "x.jsonl").pieces(start=_block(lines, 5) + 1) for r in p][-2:] == [7, 8]


def _block(lines, i): return sum(len(x) + 1 for x in lines[:i]) // 64

def _raises(f):
    try: f()
    except UserError: return True


def test_a_line_longer_than_many_blocks(tmp_path, monkeypatch):
    monkeypatch.setattr("ascend_nb.rows.CHUNK", 10)
    lines = ["short", "x" * 95, "", "y" * 9, "z" * 10, "end"]
    (tmp_path / "x.txt").write_text("\n".join(lines))
    for n in (1, 2, 3, 20):
        pieces = shares(tmp_path / "x.txt", n)
        assert [r["text"] for _, p, _ in pieces for r in p] == lines
        assert [pl.where(i) for _, p, pl in pieces for i in range(len(p))] == [f"row {i} of x.txt" for i in range(1, 7)]
        assert len(pieces) == -(-sum(map(len, lines), 5) // 10)


BAD_LINES = [b'{"text": "fine"}', b'{"text": "cut', b"", b"[1]", b'{"text": "\xff"}', b"7", b'{"text": "fine too"}', b"[" * 100_000, b'{"n": ' + b"9" * 5000 + b"}"]


def test_bad_lines_are_left_out_and_named():
    "Every bad line with its number; a blank line is none, but counts."
    from tempfile import TemporaryDirectory
    with TemporaryDirectory() as folder:
        file = Path(folder) / "x.jsonl"
        file.write_bytes(b"\n".join(BAD_LINES))
        bad = BadRows("report")
        rows = read_rows(file, bad)
        piece, = rows.pieces()
        assert [r["text"] for r in piece] == ["fine", "fine too"] and [rows.where(i) for i in (0, 1)] == ["row 1 of x.jsonl", "row 7 of x.jsonl"]
    assert [x["row"] for x in bad.examples] == [f"row {n} of x.jsonl" for n in (2, 4, 5, 6, 8, 9)] and bad.count == 6
    reasons = ("Line 2 .*Unterminated string", "Found a list as row 4", "line 5 holds the byte 0xff", "Found a int as row 6", "Line 8 .*recursion", "Line 9 .*digits")
    for x, says in zip(bad.examples, reasons, strict=True):
        assert re.search(says, x["why"]), x
    assert bad.summary().startswith("Rows that could not be used: 6. The first: Line 2")


def test_policies(tmp_path):
    (tmp_path / "x.jsonl").write_text("no\n" * 9 + '{"text": "a"}')
    with pytest.raises(UserError, match="Line 1"): list(read_rows(tmp_path / "x.jsonl"))
    for policy, kept in (("skip", 5), ("report", 9)):
        bad = BadRows(policy)
        assert list(read_rows(tmp_path / "x.jsonl", bad)) == [{"text": "a"}] and (bad.count, len(bad.examples)) == (9, kept)
    (tmp_path / "y.jsonl").write_text("no\n")
    assert list(read_rows(tmp_path / "y.jsonl", BadRows("skip"))) == []
    (tmp_path / "a.json").write_text('[{"a": 1}, 2, {"a": 3}]')
    bad = BadRows("report")
    rows = read_rows(tmp_path / "a.json", bad)
    assert next(rows.pieces()) == [{"a": 1}, {"a": 3}] and rows.where(1) == "row 3 of a.json" and bad.examples[0]["row"] == "row 2 of a.json"


def test_utf8_lines_of_text(tmp_path):
    (tmp_path / "x.txt").write_bytes("好\n".encode() + "坏\n".encode("gb18030") + "也好".encode())
    bad = BadRows("report")
    assert [r["text"] for r in read_rows(tmp_path / "x.txt", bad)] == ["好", "也好"]
    assert "line 2 holds the byte 0xbb" in bad.examples[0]["why"]


GB = "坏".encode("gb18030")


@pytest.mark.parametrize("step", [7, 60, 1 << 20])
@pytest.mark.parametrize("name, text, says", [
    ("x.csv", b"text,n\nfine,1\nbad " + GB + b",2\n\n\"two\nlines\",3\n\"bad\n" + GB + b"\",4\na,b,c\nend,6\n", ["line 3 holds the byte 0xbb", "line 8 holds the byte 0xbb", "Line 9 .*3 cells where the header names 2"]),
    ("x.json", b'\xef\xbb\xbf[{"text": "fine"},\r\n {"text": "bad ' + GB + b'"}, {"text": "two\\nlines"},\n{"' + GB + b'": 1}, 7, {"text": "end"}]', [
        "row 2 of x.json: 0xbb, byte 39 of the file, in line 2", "row 4 of x.json: 0xbb, byte 71 of the file, in line 3", "Found a int as row 5"])])
def test_bytes_that_are_not_utf8_cost_their_row(tmp_path, monkeypatch, name, text, says, step):
    "As in .txt and .jsonl: the row is left out with its number, those behind it keep theirs, however many readers there are."
    monkeypatch.setattr("ascend_nb.rows.CHUNK", step)
    file = tmp_path / name
    file.write_bytes(text)
    if name == "x.json": assert [text[i - 1] for i in (39, 71)] == [0xbb] * 2
    bad = BadRows("report")
    pieces = shares(file, 1, bad)
    assert [r["text"] for _, p, _ in pieces for r in p] == ["fine", "two\nlines", "end"]
    assert [where.where(i) for _, p, where in pieces for i in range(len(p))] == [f"row {n} of {name}" for n in (1, 3, 6)]
    assert [x["row"] for x in bad.examples] == [f"row {n} of {name}" for n in (2, 4, 5)]
    for x, want in zip(bad.examples, says, strict=True): assert re.search(want, x["why"]), x
    for n in (2, 3):
        more = BadRows("report")
        assert [x[:2] for x in shares(file, n, more)] == [x[:2] for x in pieces]
        assert sorted(x["why"] for x in more.examples) == sorted(x["why"] for x in bad.examples)
    with pytest.raises(UserError, match=says[0]): list(read_rows(file))


@pytest.mark.parametrize("name, data, says", [
    ("x.csv", b"text," + GB + b"\na,b\n", "line 1 holds the byte 0xbb"), ("x.csv", b'text\n"a' + GB, "line 2 holds the byte 0xbb"),
    ("x.json", '[{"text": "好"}]'.encode("utf-16"), "row 1 of x.json: 0xff, byte 1 of the file, in line 1"), ("x.json", b'[{"a": 1},\n{"a" ' + GB + b': 2}]', "row 2 of x.json: 0xbb, byte 17 of the file, in line 2")])
def test_bytes_that_break_the_file(tmp_path, name, data, says):
    "Where no row can be told from the next, the file ends in a sentence, whatever is asked of bad rows."
    (tmp_path / name).write_bytes(data)
    with pytest.raises(UserError, match=says): list(read_rows(tmp_path / name, BadRows("skip")))


@pytest.mark.parametrize("form", [".parquet", ".arrow"])
def test_text_that_is_not_utf8_in_a_table(tmp_path, form):
    "A table is read whole, so it ends; the sentence names the row."
    import pyarrow as pa
    import pyarrow.parquet
    rows = [b"fine"] * 30 + [GB] + [b"fine"] * 5
    table = pa.table({"n": range(36), "text": pa.array(rows, pa.binary()).view(pa.string())})
    if form == ".parquet": pa.parquet.write_table(table, tmp_path / "x.parquet", row_group_size=20)
    else:
        with pa.OSFile(str(tmp_path / "x.arrow"), "wb") as f, pa.ipc.new_stream(f, table.schema) as w: w.write_table(table, max_chunksize=9)
    with pytest.raises(UserError, match=f"x{form} cannot be read as .*row 31: .*UTF8"): list(read_rows(tmp_path / f"x{form}", BadRows("skip")))


def test_a_file_of_bad_rows_is_not_empty(tmp_path, monkeypatch):
    "Whoever reads may begin to count anew after every piece: a file behind it that holds bad rows alone is still no empty file."
    monkeypatch.setattr("ascend_nb.rows.CHUNK", 12)
    for name, text in (("a", "no\nno\nno\nno\n{}\n"), ("b", "no\nno\n")): (tmp_path / f"{name}.jsonl").write_text(text)
    bad, told = BadRows("skip"), 0
    for _ in read_rows(tmp_path, bad).pieces(): told += bad.count; bad.forget()
    assert told == 6


def test_places_travel(tmp_path, monkeypatch):
    "A place names its rows after the reader went on, and in another process."
    monkeypatch.setattr("ascend_nb.rows.CHUNK", 20)
    (tmp_path / "x.txt").write_text("".join(f"line {i}\n" for i in range(1, 51)))
    rows = read_rows(tmp_path / "x.txt")
    places = [(rows.place(), piece) for piece in rows.pieces()]
    for place, piece in [*places, *pickle.loads(pickle.dumps(places))]:
        assert [place.where(i) for i in range(len(piece))] == [f"row {r['text'].split()[1]} of x.txt" for r in piece]


def test_a_column_name_twice(tmp_path):
    (tmp_path / "x.csv").write_text("text,n,text\na,1,b\n")
    with pytest.raises(UserError, match="Line 1 .*names 'text' twice"): list(read_rows(tmp_path / "x.csv"))


def test_long_cells_of_two_files_at_once(tmp_path):
    "csv's limit of 128 KiB is one for the whole process: two readers must not take it from each other."
    import csv
    for name, n in (("a", 3), ("b", 9)): (tmp_path / f"{name}.csv").write_text("text\n" + "".join(f"{i}{'x' * 600_000}\n" for i in range(n)))
    a, b = read_rows(tmp_path / "a.csv").pieces(), read_rows(tmp_path / "b.csv").pieces()
    texts = [[r["text"] for r in next(b)]]
    assert sum(len(p) for p in a) == 3
    texts += [[r["text"] for r in p] for p in b]
    assert [t[0] for p in texts for t in p] == list("012345678") and csv.field_size_limit() == 131072


@pytest.mark.parametrize("text, rows", [("\n\ntext\n\na\n\n", [dict(text="a")]), ("text,n\na\n", [dict(text="a", n="")]), ('text\r\n"a\r\nb"\r\n', [dict(text="a\r\nb")])])
def test_csv_corners(tmp_path, text, rows):
    (tmp_path / "x.csv").write_bytes(text.encode())
    assert list(read_rows(tmp_path / "x.csv")) == rows


@pytest.mark.parametrize("form", [".parquet", ".csv", ".json", ".jsonl", ".txt", ".arrow"])
def test_damaged_files_end_in_a_sentence(tmp_path, monkeypatch, form):
    "Bytes lost, added, changed: rows or a UserError, never another error; and three readers find what one finds."
    rows, rng = [dict(text=f'行 {i} "q", x\ny 😀', n=i) for i in range(40)], random.Random(form)
    if form == ".txt": (tmp_path / "data.txt").write_text("\n".join(r["text"] for r in rows))
    whole, file = (tmp_path / "data.txt" if form == ".txt" else write(tmp_path, form, rows)).read_bytes(), tmp_path / f"x{form}"
    odd = [b"\n", b"\r", b'"', b"[", b"{", b"]", b",", b"\\", b"[1]", b"\0", b"\xff", b""]
    refused = 0
    for _ in range(60):
        data, k = bytearray(whole), rng.randint(1, 3)
        for i in (rng.randrange(len(data)) for _ in range(k)): data[i:i + rng.choice([0, 1, 1, 9])] = rng.choice([*odd, bytes([rng.randrange(256)])])
        file.write_bytes(bytes(data[:rng.choice([len(data), len(data), rng.randrange(len(data))])]))
        monkeypatch.setattr("ascend_nb.rows.CHUNK", rng.choice([7, 50, 333, 1 << 20]))
        for bad in (BadRows(), BadRows("skip")):
            try: made = shares(file, 1, bad)
            except UserError: made, refused = None, refused + 1
        if made is not None: assert [x[:2] for x in shares(file, 3, BadRows("skip"))] == [x[:2] for x in made]
    assert refused > 5


MEMORY = """
import re, sys
from ascend_nb.rows import read_rows
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
