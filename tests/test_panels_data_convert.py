"""The pages for data and for conversion, driven as a person would: paths typed, buttons clicked, and what the page then says."""
import json
from pathlib import Path

import pytest
from ascend_nb.contents import contents
from ascend_nb.core import UserError
from ascend_nb.indexed import IndexedReader
from ascend_nb.tokenizers import load_tokenizer
from ascend_nb.ui.bilingual import switch
from ascend_nb.ui.convert_panel import ConvertPanel
from ascend_nb.ui.data_panel import DataPanel
from ascend_nb.ui.paths import PathBox
from ascend_nb.ui.static import as_text
from conftest import ROOT
from pointing import opened, settle, shut, widgets
from safetensors import safe_open
from test_converters import BASE, go, make

CHATS, TALES = ROOT / "data_samples/instruct.json", ROOT / "data_samples/tales.jsonl"


@pytest.fixture
def page(tmp_path):
    with opened(DataPanel, under=tmp_path / "errands") as p: yield p


def look(page, path):
    page.path.value = str(path)
    page.look.click()
    settle(page)
    assert page.trouble.error is None, as_text(page.trouble)
    return as_text(page)


def test_the_data_page_is_light_and_says_nothing_before_it_is_asked(page):
    assert widgets(page) < 60 and "Look at it" in as_text(page) and page.more.layout.display == "none"


def test_a_row_is_shown_as_the_tokens_that_it_is(page):
    text = look(page, CHATS)
    assert "137 read: 137 usable" in text and "AlpacaStyleInstructionHandler (chat)" in text
    page.pager.on.click(); page.pager.on.click(); settle(page)
    want = json.loads(CHATS.read_text())[2]
    text = as_text(page.sample)
    assert want["instruction"] in text and want["output"] in text and "row 3 of instruct.json" in text
    view = page.row[1].views[0]
    assert view.learned == [want["output"] + "<|im_end|>"] # by eye: only the answer and its end are learned
    assert sum(view.sizes) == len(load_tokenizer(page.tokenizer.value).encode(view.text))
    page.cut.value = 10; settle(page)
    assert "behind the cut" in page.row[1].views[0].line and "line-through" in page.sample.value


def test_quick_clicks_end_at_the_last_row(page):
    look(page, TALES)
    for _ in range(5): page.pager.on.click()
    settle(page)
    assert page.pager.index == 5 and "row 6 of tales.jsonl" in as_text(page.sample)


def test_lengths_are_a_picture_and_its_numbers(page):
    look(page, TALES)
    page.more.selected_index = 1; settle(page)
    html = page.more.pages[1].children[0].value
    chars = sorted(len(json.loads(x)["text"]) for x in TALES.read_text().splitlines())
    assert "data:image/png" in html and f"shortest {chars[0]:,}" in html and f"longest {chars[-1]:,}" in html


def test_preprocessing_goes_on_without_the_page_and_is_found_again(page, tmp_path):
    look(page, CHATS)
    page.more.selected_index = 2
    field = page.form.fields["seq_length",].control
    field.value = "many"
    assert page.start.disabled and "expected a int" in as_text(page.form)
    field.value = "64"
    assert not page.start.disabled
    page.form.fields["output_prefix",].control.value = str(tmp_path / "chats")
    page.start.click(); settle(page)
    assert page.job.errand.wait(60) == "finished"
    other = DataPanel(under=tmp_path / "errands") # a browser that was closed
    assert "103 chats" in as_text(other.made) and other.give.layout.display != "none"
    given = []
    other.give.click()
    assert f"--data-path {tmp_path / 'chats'}" in as_text(other.trouble)
    other.on_data = lambda *what: given.append(what)
    other.give.click()
    assert given == [(str(tmp_path / "chats"), page.tokenizer.value)] and other.trouble.error is None
    other.see.click(); settle(other)
    reader = IndexedReader(tmp_path / "chats_packed_input_ids_document")
    assert len(reader) == other.pager.n == 103 and f"103 sequences, {len(reader.tokens):,} tokens" in as_text(other.told)
    assert other.row[0] is None and "sample 1 of 103" in as_text(other.sample)


def test_bad_rows_have_their_reason(page, tmp_path):
    bad = tmp_path / "bad.jsonl"
    bad.write_text('{"instruction": "a", "output": "b"}\n{"instruction": "a"}\nnothing\n')
    text = look(page, bad)
    assert "1 usable" in text and "2 bad" in text and "Found no column 'output' in row 2" in text and "Line 3" in text
    assert page.pager.n == 1 and "--on-bad-row skip" in text


@pytest.mark.parametrize("path,words", [("", "没有给出数据路径"), ("nowhere.json", "nowhere.json 处既没有数据文件")])
def test_a_wrong_path_is_told_in_the_readers_language(page, chinese, path, words):
    page.path.value = path
    page.look.click(); settle(page)
    assert words in as_text(page.trouble)
    switch("en")
    assert words not in as_text(page.trouble) and "Found" in as_text(page.trouble)


def test_what_was_found_is_told_again_in_chinese(page):
    look(page, CHATS)
    switch("zh")
    try:
        settle(page)
        text = as_text(page)
        assert "共读取 137 行" in text and "查看数据" in text and "参与学习的词元" in text and "usable" not in as_text(page.told)
    finally: switch("en")


def test_a_registry_shows_its_first_data_set_and_is_not_trained_on_as_it_is(page, tmp_path):
    (tmp_path / "chats.json").write_text(json.dumps(json.loads(CHATS.read_text())[:5]))
    (tmp_path / "dataset_info.json").write_text(json.dumps(dict(town=dict(file_name="chats.json"))))
    text = look(page, tmp_path)
    assert "town: chat" in text and page.pager.n == 5 and page.row[0] is not None
    given = []
    page.on_data = lambda *what: given.append(what)
    page.take.click()
    assert "names of data sets" in as_text(page.trouble) and not given
    look(page, tmp_path / "chats.json")
    page.take.click()
    assert given == [(str(tmp_path / "chats.json"), page.tokenizer.value)]


def test_a_path_is_found_by_walking(tmp_path):
    for n in ("a/deep/x.jsonl", "a/y.jsonl"): (tmp_path / n).parent.mkdir(parents=True, exist_ok=True); (tmp_path / n).write_text("{}")
    box, seen = PathBox(str(tmp_path)), []
    box.on_change(lambda b: seen.append(b.value))
    box.find.value = True
    assert box.list.options == ("..", "a/")
    for name in ("a/", "deep/"): box.list.value = name; box.enter.click()
    assert box.list.options == ("..", "x.jsonl")
    box.list.value = "x.jsonl"
    assert Path(box.value).samefile(tmp_path / "a/deep/x.jsonl") and "a file of 2 B" in as_text(box) and seen[-1] == box.value
    box.list.value = ".."; box.enter.click()
    assert Path(box.value).samefile(tmp_path / "a") and box.list.options == ("..", "deep/", "y.jsonl")
    assert as_text(PathBox(str(tmp_path), kind="folder")).count("entries") == 1


# -- weights

@pytest.fixture
def model(tmp_path):
    make(tmp_path / "hf", dict(model_type="llama", **BASE), shards=3)
    return tmp_path / "hf"


@pytest.fixture
def converting(tmp_path, model):
    p = ConvertPanel(str(model), under=tmp_path / "errands")
    p.look.click(); settle(p)
    yield p
    shut(p)


def test_tensors_are_those_that_safetensors_finds(converting, model):
    theirs = {}
    for f in model.glob("*.safetensors"):
        with safe_open(f, "np") as s: theirs |= {k: (f.name, s.get_slice(k).get_shape(), s.get_slice(k).get_dtype()) for k in s.keys()}
    ours = {t.name: (f, list(t.shape), t.dtype.upper()) for f, t in converting.found.find()}
    assert ours == theirs and f"{len(theirs)} tensors in 3 files" in as_text(converting)
    converting.filter.value = "layers.2 mlp"
    text = as_text(converting.rows)
    assert text.count("model.layers.2.mlp.") == 3 and "3 of 3 tensors" in text and "48 × 32" in text
    converting.filter.value = "no such"
    assert "0 of 0 tensors" in as_text(converting.rows)


def test_other_kinds_of_checkpoints_are_read_without_their_numbers(model, tmp_path):
    go(f"{model} {tmp_path / 'mg'} --to mcore --tp 2"); go(f"{model} {tmp_path / 'run'} --to dcp")
    whole = contents(model).nbytes
    mg, step = contents(tmp_path / "mg"), contents(tmp_path / "run")
    assert (mg.kind, len(mg.files)) == ("mg", 2) and mg.nbytes > whole # norms lie on both ranks, the vocabulary is filled up
    assert step.kind == "step" and sum(t.nbytes for _, t in step.find("model.")) == whole
    assert contents(model / "model-00001-of-00003.safetensors").kind == "file"
    with pytest.raises(UserError, match="no weights"): contents(tmp_path / "errands")
    (model / "model-00002-of-00003.safetensors").write_bytes(b"cut off")
    with pytest.raises(UserError, match="model-00002-of-00003"): contents(model)


def test_a_conversion_is_rehearsed(converting, model, tmp_path):
    converting.steps.selected_index = 1
    fields = converting.form.fields
    assert converting.form.value.load_dir == str(model) and "dry_run" not in {p[-1] for p in fields}
    fields["target_tensor_parallel_size",].control.value = "3"
    fields["save_dir",].control.value = str(tmp_path / "mg")
    converting.dry.click(); settle(converting)
    assert "key/value heads" in as_text(converting.trouble)
    fields["target_tensor_parallel_size",].control.value = "zero"
    assert converting.start.disabled and converting.dry.disabled
    fields["target_tensor_parallel_size",].control.value = "2"
    converting.dry.click(); settle(converting)
    assert "mp_rank_01/model_optim_rng.pt" in as_text(converting.journey) and converting.trouble.error is None and not (tmp_path / "mg").exists()


@pytest.mark.slow # the lesson of the page does it too
def test_a_conversion_is_done_proven_and_found_again(converting, tmp_path):
    converting.steps.selected_index = 1
    converting.form.fields["save_dir",].control.value = str(tmp_path / "mg")
    converting.form.fields["target_tensor_parallel_size",].control.value = "2"
    converting.start.click(); settle(converting)
    assert converting.job.errand.wait(100) == "finished"
    other = ConvertPanel(under=tmp_path / "errands") # opened later
    paper, text = json.loads((tmp_path / "mg/conversion.json").read_text()), as_text(other.certificate)
    assert f"{paper['verified']['bitwise_equal']} parameters equal to the last bit" in text and "missing 0, unused 0, twice 0" in text
    name, crc = next(iter(paper["verified"]["source_crc32"].items()))
    assert name in text and crc in text
    switch("zh")
    try: assert "逐位相同" in as_text(other.certificate) and "转换证明" in as_text(other.certificate)
    finally: switch("en")
    for p in (tmp_path / "mg").rglob("*.pt"): assert contents(p).tensors
    shut(other)


def test_a_page_without_weights_says_so(tmp_path):
    p = ConvertPanel(str(tmp_path), under=tmp_path / "errands")
    assert widgets(p) < 60
    p.look.click(); settle(p)
    assert "Found no weights" in as_text(p.trouble) and "contents_none" == p.trouble.error.key
    shut(p)
