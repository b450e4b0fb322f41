"""Looking at data: the real files, the commands that `sniff` prints, and views against what transformers decodes."""
import json
import re
import shlex
import shutil
import subprocess
import sys
from html.parser import HTMLParser

import numpy as np
import pytest
from conftest import DATA

from ascend_nb.cli import main
from ascend_nb.config import RowsConfig
from ascend_nb.core import UserError
from ascend_nb.indexed import IndexedReader, IndexedWriter
from ascend_nb.inspect_data import report, sample_tokenizer, show_sample, sniff
from ascend_nb.tokenizers import load_tokenizer
from ascend_nb.turns import Pair, Record
from ascend_nb.views import find_pairs, token_texts

FILES = sorted([*(DATA / "instruct").glob("*"), *(DATA / "pretrain").glob("*"), DATA / "pretrain/arrow_trec/train"]) or [None]
SLOW = ("alpaca_en_demo.json", "dpo_en_demo.json", "glaive_toolcall_en_demo.json", "oaast_sft_zh.json", "c4_demo.jsonl", "tinyshakespeare.txt", "wiki_demo.txt") # like others, but larger
FORMS = {"alpaca_en_demo.json": ("AlpacaStyleInstructionHandler", "chat", 999), "alpaca_zh_demo.json": ("AlpacaStyleInstructionHandler", "chat", 1000),
         "glaive_toolcall_en_demo.json": ("SharegptStyleInstructionHandler", "chat", 300), "dpo_en_demo.json": ("SharegptStylePairwiseHandler", "pair", 300),
         "oaast_sft_zh.json": ("AlpacaStyleInstructionHandler", "chat", 689), "oaast_rm_zh.json": ("AlpacaStylePairwiseHandler", "pair", 775),
         "v1_sft_demo.jsonl": ("OpenAIInstructionHandler", "chat", 500), "v1_dpo_demo.jsonl": ("SharegptStylePairwiseHandler", "pair", 10),
         "identity.json": ("AlpacaStyleInstructionHandler", "chat", 91), "TruthfulQA.csv": ("AlpacaStyleInstructionHandler", "chat", 817),
         "c4_demo.jsonl": ("GeneralPretrainHandler", "text", 300), "c4.parquet": ("GeneralPretrainHandler", "text", 200), "lunyu.json": ("GeneralPretrainHandler", "text", 20),
         "wiki_demo.txt": ("GeneralPretrainHandler", "text", 30), "tinyshakespeare.txt": ("GeneralPretrainHandler", "text", 40000), "train": ("GeneralPretrainHandler", "text", 600)}


BAD = {"oaast_rm_zh.json": 3} # pairs whose two answers are the same


@pytest.fixture(scope="module")
def qwen(shared_data): return load_tokenizer(shared_data / "tokenizers/qwen2")


def answer(text): return [f"<think>\n\n</think>\n\n{text}<|im_end|>"]  # as Qwen3's template writes a last answer


@pytest.mark.parametrize("file", [pytest.param(p, id=p.name if p else "none", marks=[pytest.mark.slow] if p and p.name in SLOW else []) for p in FILES])
def test_the_printed_command_runs(file, shared_data, qwen, tmp_path, monkeypatch, capsys):
    "Every real file: what it is, and the command as printed; the files that it writes hold what sniff counted."
    monkeypatch.chdir(tmp_path)
    found = sniff(file, qwen, rows=1)
    assert str(found).splitlines()[-1] == found.command and found.exit_code == (2 if file.name in BAD else 0) and found.facts.get("bad", 0) == BAD.get(file.name, 0)
    if file.name in FORMS: assert (found.facts["handler"], found.facts["kind"], found.facts["rows"]) == FORMS[file.name]
    assert main(shlex.split(found.command)[1:]) == 0, capsys.readouterr().err
    facts = found.facts.get("first", found.facts)
    pairs = {re.sub(r"^.*?_packed_|_document$", "", p.stem): IndexedReader(p.with_suffix("")) for p in tmp_path.glob("*.idx")}
    ids = [r for k, r in pairs.items() if not k.endswith(("labels", "mask"))]
    assert ids and all(len(r) == facts["usable"] for r in ids)
    made = sum(r.num_tokens for r in ids)
    assert made == facts["tokens"] if facts["kind"] != "text" else abs(facts["tokens"] / made - 1) < .05


@pytest.mark.parametrize("name", ["instruct/glaive_toolcall_zh_demo.json", *(pytest.param(n, marks=pytest.mark.slow) for n in (
    "instruct/oaast_rm_zh.json", "pretrain/lunyu.json", "instruct/dataset_info.json"))])
def test_it_runs_without_a_tokenizer_too(shared_data, name, tmp_path):
    "As a user does it: two processes, the last line of the first is the second."
    out = subprocess.run(["ascend_nb", "data", "sniff", shared_data / name], capture_output=True, text=True, cwd=tmp_path, env=on_path())
    assert out.returncode == (2 if name.split("/")[1] in BAD else 0) and "sample one" in out.stdout, out.stderr
    run = subprocess.run(out.stdout.splitlines()[-1], shell=True, capture_output=True, text=True, cwd=tmp_path, env=on_path())
    assert run.returncode == 0 and list(tmp_path.glob("*.idx")), run.stderr


def on_path():
    import os
    from pathlib import Path
    return {**os.environ, "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"}


BROKEN = ['{"instruction": "a", "output": "A"}', "", '{"instruction": "b", "output": 7}', "not JSON", '["a", "list"]', '{"instruction": "c"}', '{"instruction": "", "output": "C"}',
          '{"instruction": "d \\ud83d", "output": "D"}', '{"instruction": "a", "output": "A"}']


def test_bad_rows_are_counted_and_named(tmp_path, capsys):
    (tmp_path / "b.jsonl").write_text("\n".join(BROKEN) + "\n", encoding="utf-8")
    found = sniff(tmp_path / "b.jsonl", rows=1)
    rows = sorted(int(re.match(r"row (\d+) of b.jsonl", b["row"])[1]) for b in found.bad_rows)
    assert rows == [3, 4, 5, 6, 8] and found.facts["bad"] == 5, "the numbers of the lines in the file"
    assert (found.facts["rows"], found.facts["usable"], found.facts["empty"], found.facts["duplicates"]) == (8, 2, 1, 1) and found.exit_code == 2
    for word in ("int in column 'output'", "is not JSON", "list", "no column 'output'", "half a character"): assert any(word in b["why"] for b in found.bad_rows), word
    assert main(["data", "sniff", str(tmp_path / "b.jsonl")]) == 2
    command = capsys.readouterr().out.splitlines()[-1]
    assert "--on-bad-row skip" in command
    assert main([*shlex.split(command)[1:], "--output-prefix", str(tmp_path / "out")]) == 0
    assert len(IndexedReader(tmp_path / "out_packed_input_ids_document")) == 2


def test_all_bad_rows_are_counted_twenty_are_listed(tmp_path):
    (tmp_path / "many.jsonl").write_text('{"instruction": "a", "output": "A"}\n' + '{"instruction": 1, "output": "A"}\n' * 3000, encoding="utf-8")
    found = sniff(tmp_path / "many.jsonl")
    assert found.facts["bad"] == 3000 and len(found.bad_rows) == 20 and found.bad_rows[-1]["row"] == "row 21 of many.jsonl"
    assert sniff(tmp_path / "many.jsonl", limit=5).facts["bad"] == 4


def test_a_chat_that_the_template_refuses_is_a_bad_row(tmp_path, qwen):
    "Roles that the handler lets pass and Llama's template does not."
    llama = tmp_path / "llama"
    qwen.save(llama)
    strict = "{% for m in messages %}{% if (m.role == 'user') != (loop.index0 % 2 == 0) %}{{ raise_exception('roles must alternate') }}{% endif %}{{ m.role }}:{{ m.content }}<|im_end|>{% endfor %}"
    (llama / "chat_template.jinja").write_text(strict)
    chats = [[("user", "a"), ("assistant", "A")], [("system", "s"), ("user", "b"), ("assistant", "B")]]
    (tmp_path / "c.jsonl").write_text("".join(json.dumps({"messages": [dict(role=r, content=c) for r, c in said]}) + "\n" for said in chats))
    found = sniff(tmp_path / "c.jsonl", llama, rows=0)
    assert [b["row"] for b in found.bad_rows] == ["row 2 of c.jsonl"] and "roles must alternate" in found.bad_rows[0]["why"]
    assert sniff(tmp_path / "c.jsonl", qwen).facts["bad"] == 0


def test_a_file_that_breaks_off_keeps_what_was_seen(tmp_path):
    rows = json.dumps([dict(instruction=f"question {i}", output="x" * 5000) for i in range(600)])
    (tmp_path / "cut.json").write_text(rows[:-500])
    found = sniff(tmp_path / "cut.json")
    assert "ends too early" in found.facts["broken"] and found.command == "" and found.exit_code == 2 and found.facts["usable"] > 100


@pytest.mark.parametrize("path, says", [("nothing.json", "Check the path"), ("image.png", "Found no data in"), ("empty.jsonl", "Found no rows")])
def test_what_cannot_be_read_is_one_sentence(tmp_path, path, says, capsys):
    (tmp_path / "image.png").write_bytes(b"\x89PNG")
    (tmp_path / "empty.jsonl").write_text("")
    assert main(["data", "sniff", str(tmp_path / path)]) == 2
    out = capsys.readouterr()
    assert says in out.err and "Traceback" not in out.err and out.out == ""


def test_columns_of_no_known_form(tmp_path):
    "Columns that sound right are taken, and said; columns without texts are refused with their names."
    def of(name, row):
        (tmp_path / name).write_text(json.dumps([row] * 3))
        return sniff(tmp_path / name)
    asked = of("a.json", {"客户问题": "在吗", "客服回答": "在的"})
    flags = shlex.split(asked.command)
    assert asked.facts["handler"] == "AlpacaStyleInstructionHandler" and json.loads(flags[flags.index("--map-keys") + 1]) == {"prompt": "客户问题", "response": "客服回答"}
    beside = {"question_id": "q1", "prompt_type": "open", "the_prompt": "Who?", "answer_url": "http://x", "model_reply": "Me."}
    assert json.dumps(dict(prompt="the_prompt", response="model_reply")) in of("d.json", beside).command
    assert of("b.json", {"title": "t", "body": "a long text, much longer", "n": 3}).facts["why"].count("body")
    with pytest.raises(UserError, match="Found the columns x, y"): of("c.json", {"x": 1, "y": [2]})


def test_several_files_and_folders(tmp_path, qwen):
    (tmp_path / "parts").mkdir()
    for k in range(3): (tmp_path / f"parts/{k}.jsonl").write_text(json.dumps(dict(text=f"document {k}")) + "\n")
    found = sniff(tmp_path / "parts", qwen)
    assert (found.facts["files"], found.facts["rows"]) == (3, 3) and "3 files" in str(found)
    both = sniff(f"{tmp_path}/parts/0.jsonl,{tmp_path}/parts/1.jsonl", qwen)
    assert both.facts["rows"] == 2 and main([*shlex.split(both.command)[1:], "--output-prefix", str(tmp_path / "both")]) == 0


def test_json_and_chinese(shared_data, tmp_path, capsys, monkeypatch):
    file = str(shared_data / "instruct/identity.json")
    assert main(["data", "sniff", file, "--json", "--rows", "2"]) == 0
    out = json.loads(capsys.readouterr().out)
    assert (out["format"], out["rows"], out["usable"], out["placeholders"], len(out["shown"])) == ("JSON", 91, 91, 85, 2) and out["command"].startswith("ascend_nb preprocess")
    monkeypatch.setenv("ASCEND_NB_LANG", "zh")
    assert main(["data", "sniff", file]) == 0
    assert "处理器" in capsys.readouterr().out


TEXT = "It is 四川 😀 e\u0301, café.\n\n  two  spaces <|im_end|> end"


@pytest.mark.parametrize("name", ["qwen2", "llama2.model", "mistral_v1.model"])
def test_token_texts_join_to_the_text(shared_data, name):
    tok = load_tokenizer(shared_data / "tokenizers" / name)
    lines = [TEXT, *(shared_data / "pretrain/lunyu.json").read_text(encoding="utf-8").split("\n")[:60], " leading", "\ttab", "𠮷野家"]
    for text in lines:
        ids = tok.encode(text)
        pieces = token_texts(ids, tok)
        assert "".join(t for t, _ in pieces) == tok.decode(ids, skip_special=False) and sum(n for _, n in pieces) == len(ids)
        assert all(n == 1 or len(t) <= 2 for t, n in pieces), "only tokens that make a character together are together"


def test_views_agree_with_transformers_mask(shared_data):
    "The learned text is what transformers marks as the assistant's in a template that marks its answers."
    from transformers import AutoTokenizer
    theirs = AutoTokenizer.from_pretrained(str(shared_data / "tokenizers/qwen2"), local_files_only=True)
    marked = ("{% for m in messages %}{{ '<|im_start|>' + m['role'] + '\n' }}{% if m['role'] == 'assistant' %}{% generation %}{{ m['content'] }}<|im_end|>"
              "{% endgeneration %}{% else %}{{ m['content'] }}<|im_end|>{% endif %}{{ '\n' }}{% endfor %}")
    said = [dict(role="system", content="Be brief."), dict(role="user", content="你好？"), dict(role="assistant", content="你好 😀"), dict(role="user", content="Bye"), dict(role="assistant", content="再见")]
    want = theirs.apply_chat_template(said, chat_template=marked, return_assistant_tokens_mask=True, return_dict=True)
    ours = load_tokenizer(shared_data / "tokenizers/qwen2")
    ours.chat_template = re.sub(r"{% (end)?generation %}", "", marked) + "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
    view = show_sample(Record(said), tokenizer=ours).views[0]
    assert view.text == theirs.decode(want["input_ids"]) and view.count(1) == sum(want["assistant_masks"])
    assert view.learned == ["你好 😀<|im_end|>", "再见<|im_end|>"]


@pytest.fixture(scope="module")
def made(shared_data, qwen, tmp_path_factory):
    "Prefixes of real chats, packed chats, pairs and documents."
    room, tok = tmp_path_factory.mktemp("made"), str(shared_data / "tokenizers/qwen2")
    for name, flags in dict(chats=["instruct/alpaca_zh_demo.json"], packed=["instruct/alpaca_zh_demo.json", "--neat-pack", "--pack", "--seq-length", "600"],
                            pairs=["instruct/dpo_zh_demo.json"], docs=["pretrain/lunyu.json", "--json-keys", "paragraphs", "--append-eod"]).items():
        assert main(["preprocess", "--input", str(shared_data / flags[0]), "--output-prefix", str(room / name), "--tokenizer-name-or-path", tok, *flags[1:]]) == 0
    return room


def test_a_row_its_file_and_its_data_set_show_the_same(shared_data, made, qwen):
    from ascend_nb.instruct_sets import SFTDataset
    raw, rows = shared_data / "instruct/alpaca_zh_demo.json", json.loads((shared_data / "instruct/alpaca_zh_demo.json").read_text(encoding="utf-8"))
    data = SFTDataset(str(made / "chats"), 4096, shuffle=False)
    for i in (0, 7, 999):
        a, b, c = (show_sample(x, i, qwen).views[0] for x in (raw, made / "chats", data))
        assert a.learned == b.learned == c.learned == answer(rows[i]["output"])
        assert a.text == b.text and a.text.startswith(c.text.rstrip("\n")), "the data set has no label for the line break at the end"


def test_packed_rows_show_their_documents(made, qwen):
    view = show_sample(made / "packed", 0, qwen).views[0]
    reader = {k: IndexedReader(made / f"packed_packed_{k}_document") for k in ("input_ids", "attention_mask", "labels")}
    assert len(view.begins) + 1 == reader["attention_mask"][0].max() and view.padding == (reader["attention_mask"][0] == 0).sum()
    assert len(view.learned) == len(view.begins) + 1 and sum(view.sizes) + view.padding == 600


def test_pairs_and_documents(shared_data, made, qwen):
    rows = json.loads((shared_data / "instruct/dpo_zh_demo.json").read_text(encoding="utf-8"))
    for source in (made / "pairs", shared_data / "instruct/dpo_zh_demo.json"):
        chosen, rejected = show_sample(source, 2, qwen).views
        assert chosen.learned == answer(rows[2]["chosen"]["value"]) and rejected.learned == answer(rows[2]["rejected"]["value"])
    one = Pair(*(Record([dict(role="user", content="q"), dict(role="assistant", content=a)]) for a in "ab"))
    assert [v.learned for v in show_sample(one, tokenizer=qwen).views] == [answer("a"), answer("b")]
    text = "\n".join(json.loads((shared_data / "pretrain/lunyu.json").read_text(encoding="utf-8"))[4]["paragraphs"])
    assert show_sample(made / "docs", 4, qwen).views[0].text == text + qwen.eos_token
    assert show_sample(shared_data / "pretrain/lunyu.json", 4, qwen, cfg=RowsConfig(json_keys=["paragraphs"])).views[0].text == text


def test_data_sets_of_the_trainer_show_what_it_reads(made, qwen):
    "Documents cut into samples, packed conversations, pairs: the decoded ids of each sample, and as much learned as it has labels."
    from ascend_nb.datasets import GPTDataset
    from ascend_nb.instruct_sets import PackedDataset, PairDataset, SFTDataset
    gpt = GPTDataset(IndexedReader(made / "docs_paragraphs_document"), 64)
    view, sample = show_sample(gpt, 3, qwen).views[0], gpt[3]
    assert view.text == qwen.decode([*sample.ids, sample.labels[-1]], skip_special=False) and view.count(1) == len(sample.labels)
    packed = PackedDataset(SFTDataset(str(made / "chats"), 512))
    view, sample = show_sample(packed, 2, qwen).views[0], packed[2]
    assert len(view.learned) == len(view.begins) + 1 == len(sample.ends) > 1 and view.count(1) == (sample.labels != -100).sum()
    pairs = PairDataset(str(made / "pairs"), 4096, shuffle=False)
    assert [v.learned for v in show_sample(pairs, 2, qwen).views] == [v.learned for v in show_sample(made / "pairs", 2, qwen).views]
    with pytest.raises(UserError, match="Choose a smaller --index"): show_sample(gpt, len(gpt), qwen)


def test_the_wrong_tokenizer_is_told(made):
    with pytest.raises(UserError, match="made with this tokenizer"): show_sample(made / "chats", 0, sample_tokenizer())


class Tags(HTMLParser):
    "Which tags are open; none may be a script."
    def __init__(self, page): super().__init__(); self.open = []; self.feed(page)
    def handle_starttag(self, tag, attrs): assert tag not in ("script", "weird"); self.open += [tag] * (tag != "hr")
    def handle_endtag(self, tag): assert self.open.pop() == tag


def test_views_are_whole_html(made, qwen, tmp_path):
    "Every tag is closed, and what a row says cannot become a tag."
    evil = "<script>alert(1)</script> & <b>"
    (tmp_path / "e.jsonl").write_text(json.dumps(dict(instruction=evil, output=evil, **{"<weird>": 1})) + "\n" + json.dumps(dict(instruction=evil, output=3)) + "\n")
    for view in (show_sample(tmp_path / "e.jsonl", 0, qwen, seq_length=12), show_sample(made / "packed", 0, qwen), sniff(tmp_path / "e.jsonl", qwen), sniff(tmp_path / "e.jsonl"), report(made / "chats")):
        assert Tags(view._repr_html_()).open == []


def test_the_cut_is_marked(made, qwen):
    whole, cut = show_sample(made / "chats", 3, qwen).views[0], show_sample(made / "chats", 3, qwen, seq_length=50)
    assert cut.views[0].count(2) == sum(whole.sizes) - 50 and cut.plain.count("✂") == 1 and "\033[9;31m" in str(cut) and "line-through" in cut._repr_html_()


def test_report_counts_what_numpy_counts(made, tmp_path):
    r, labels = IndexedReader(made / "chats_packed_input_ids_document"), IndexedReader(made / "chats_packed_labels_document")
    got = report(made / "chats", seq_length=256).numbers["input_ids"]
    assert (got["sequences"], got["tokens"], got["max"], got["median"]) == (len(r), r.lengths.sum(), r.lengths.max(), np.median(r.lengths))
    assert got["learned"] == sum(int((x != -100).sum()) for x in labels) and got["too_long"] == (r.lengths >= 256).sum() and sum(got["histogram"]["counts"]) == len(r)
    assert list(report(made / "pairs").numbers) == ["chosen_input_ids", "rejected_input_ids"] and list(report(made / "docs").numbers) == ["paragraphs"]
    assert main(["data", "report", str(made / "chats"), "--out", str(tmp_path / "out"), "--json"]) == 0
    saved = json.loads((tmp_path / "out/report.json").read_text())
    assert saved["input_ids"]["tokens"] == got["tokens"] and (tmp_path / "out/lengths.png").read_bytes()[:4] == b"\x89PNG"


def test_labels_of_another_run_are_noticed(made, qwen, tmp_path):
    "One pair of a set is exchanged for a longer one: show and report name both files."
    pairs = find_pairs(made / "chats")
    for k, p in pairs.items():
        for ext in (".bin", ".idx"): shutil.copy(p + ext, tmp_path / f"x_packed_{k}_document{ext}")
    with IndexedWriter(tmp_path / "x_packed_labels_document") as w:
        w.add_many([r.tolist() for r in IndexedReader(pairs["labels"])[:]] + [[1, 2]])
    for look in (lambda: report(tmp_path / "x"), lambda: show_sample(tmp_path / "x", 0, qwen)):
        with pytest.raises(UserError, match="x_packed_labels_document; expected those of .*x_packed_input_ids_document"): look()


@pytest.mark.parametrize("name", ["chats", "chats_packed_input_ids_document", "chats_packed_labels_document.bin", "chats_packed_attention_mask_document.idx"])
def test_any_name_of_a_prefix_will_do(made, name):
    assert sorted(find_pairs(made / name)) == ["attention_mask", "input_ids", "labels"]


def test_show_prints_brackets_into_a_file_and_json(made, qwen, capsys):
    flags = ["data", "show", str(made / "chats"), "--index", "7", "--tokenizer-name-or-path", str(qwen.path)]
    assert main(flags) == 0
    plain = capsys.readouterr().out
    assert "⟦" in plain and "\033" not in plain, "colours are for terminals"
    assert main([*flags, "--json"]) == 0
    out = json.loads(capsys.readouterr().out)["sequences"][0]
    assert out["learned_texts"] == show_sample(made / "chats", 7, qwen).views[0].learned and f"{out['tokens']} tokens, {out['learned']} learned" in plain


def test_prefixes_can_be_sniffed(made, qwen, capsys):
    for name in ("chats", "pairs", "docs_paragraphs_document"):
        assert main(["data", "sniff", str(made / name), "--tokenizer-name-or-path", str(qwen.path)]) == 0
        assert main(shlex.split(capsys.readouterr().out.splitlines()[-1])[1:]) == 0
        assert "sequences" in capsys.readouterr().out


@pytest.mark.parametrize("args, says", [
    (["show", "nothing", "--tokenizer-name-or-path", "TOK"], "Check the path"), (["show", "chats", "--tokenizer-name-or-path", "TOK", "--index", "5000"], "Choose a smaller --index"),
    (["show", "chats"], "Pass --tokenizer-name-or-path"), (["report", "nothing"], "Check the path"), (["report", "chat"], "There is"), (["report", "RAW"], "data sniff")])
def test_mistakes_of_show_and_report(made, shared_data, args, says, capsys, monkeypatch):
    monkeypatch.chdir(made)
    real = {"TOK": str(shared_data / "tokenizers/qwen2"), "RAW": str(shared_data / "instruct/identity.json")}
    assert main(["data", *(real.get(a, a) for a in args)]) == 2
    out = capsys.readouterr()
    assert says in out.err and out.out == ""


def test_megatron_file(shared_data):
    "A pair of files from elsewhere."
    got = report(shared_data / "megatron/meg-gpt2-openwebtext_text_document").numbers["meg-gpt2-openwebtext_text_document"]
    assert got["tokens"] == 1_361_845 and got["sequences"] == 1000


def test_the_sample_tokenizer_is_there(): assert load_tokenizer(sample_tokenizer()).chat_template


@pytest.mark.slow
def test_memory_does_not_hold_the_file(tmp_path):
    "Ten times the rows, not ten times the memory."
    row, peaks = json.dumps(dict(text="word " * 400)), []
    for n in (2_000, 20_000):
        (tmp_path / f"{n}.jsonl").write_text(f"{row}\n" * n)
        code = f"import sys\nfrom ascend_nb.inspect_data import sniff\nsniff({str(tmp_path / f'{n}.jsonl')!r})\nprint(int(open('/proc/self/status').read().split('VmHWM:')[1].split()[0]))"
        peaks.append(int(subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.splitlines()[-1]) / 1024)
    assert peaks[1] < peaks[0] + 60, peaks


def test_writer_is_used(tmp_path):
    "An unnamed pair: the name is the key."
    with IndexedWriter(tmp_path / "plain") as w: w.add([1, 2, 3]); w.end_document()
    assert find_pairs(tmp_path / "plain") == {"plain": str(tmp_path / "plain")} and report(tmp_path / "plain").numbers["plain"]["tokens"] == 3
