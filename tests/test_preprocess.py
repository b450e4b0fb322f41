"""The command end to end: against transformers, `datasets` and Megatron on real data, and what it leaves behind when it fails."""
import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from test_indexed import both, mcore  # noqa: F401 - a fixture
from test_templates import published
from test_tokenizers import hf

from ascend_nb.config import PreprocessConfig
from ascend_nb.core import UserError
from ascend_nb.indexed import IndexedReader
from ascend_nb.preprocess import output_prefixes, run

FORMS = {"c4.parquet": "parquet", "c4_demo.jsonl": "json", "wiki_demo.txt": "text", "TruthfulQA.csv": "csv", "arrow_trec/train": "arrow", "lunyu.json": "json"}
KEYS = {"TruthfulQA.csv": ["Question", "Best Answer", "Source"], "lunyu.json": ["chapter"]}


def config(source, tok, out, **kw): return PreprocessConfig(input=str(source), tokenizer_name_or_path=str(tok), output_prefix=str(out), **kw)


@pytest.fixture(scope="module")
def toks(shared_data, tmp_path_factory):
    "qwen2 as it is; llama2 with a config that asks for <s> in front of every text."
    llama = tmp_path_factory.mktemp("llama2")
    (llama / "tokenizer.model").symlink_to(shared_data / "tokenizers" / "llama2.model")
    (llama / "tokenizer_config.json").write_text(json.dumps(dict(tokenizer_class="LlamaTokenizer", add_bos_token=True, bos_token="<s>", eos_token="</s>", unk_token="<unk>")))
    return dict(qwen2=shared_data / "tokenizers" / "qwen2", llama2=llama)


@pytest.fixture(scope="module")
def theirs(toks): return {name: hf(folder) for name, folder in toks.items()}


@pytest.fixture(scope="module")
def read(shared_data, tmp_path_factory):
    "The rows of a real file, read by `datasets`."
    import datasets
    def rows(name):
        path = shared_data / "pretrain" / name
        file = path / "data-00000-of-00001.arrow" if path.is_dir() else path
        return datasets.load_dataset(FORMS[name], data_files=str(file), split="train", cache_dir=str(tmp_path_factory.getbasetemp() / "hf"))
    return rows


def documents(rows, key, theirs, eod):
    "What ModelLink's GeneralPretrainHandler makes: a tokenizer call for each text that is not empty, the eos id behind it."
    return [theirs(t).input_ids + [theirs.eos_token_id] * eod for t in rows[key] if t]


@pytest.mark.parametrize("tokenizer", ["qwen2", "llama2"])
@pytest.mark.parametrize("name", FORMS)
def test_pretraining_files(shared_data, toks, theirs, read, tmp_path, name, tokenizer):
    "Every format of real data: the ids of transformers for the rows of `datasets`, under ModelLink's names."
    eod, keys = name != "c4.parquet", KEYS.get(name, ["text"])
    cfg = config(shared_data / "pretrain" / name, toks[tokenizer], tmp_path / "out" / "wiki", json_keys=keys, append_eod=eod)
    out, rows = run(cfg, json=True), read(name)
    want = {k: documents(rows, k, theirs[tokenizer], eod) for k in keys}
    assert sorted(os.listdir(tmp_path / "out")) == sorted(f"wiki_{k}_document.{e}" for k in keys for e in ("bin", "idx"))
    for key in keys:
        pair = IndexedReader(tmp_path / "out" / f"wiki_{key}_document")
        assert pair.dtype == np.int32 and [x.tolist() for x in pair[:]] == want[key]
        assert pair.document_indices.tolist() == list(range(len(pair) + 1))
    if tokenizer == "llama2": assert all(x[0] == 1 for x in pair[:])
    assert out["tokens"] == sum(len(d) for w in want.values() for d in w) and out["documents"] == max(map(len, want.values()))
    assert out["documents"] + out["skipped"] == len(rows) and out["data_path"] == out["files"][0] == str(tmp_path / "out" / f"wiki_{keys[0]}_document")


@pytest.mark.parametrize("name", ["c4_demo.jsonl", "TruthfulQA.csv"])
def test_bytes_are_megatrons(mcore, shared_data, toks, theirs, read, tmp_path, name):  # noqa: F811
    "The pair that Megatron's own builder writes for the same documents."
    key = KEYS.get(name, ["text"])[0]
    run(config(shared_data / "pretrain" / name, toks["qwen2"], tmp_path / "ours", json_keys=[key], append_eod=True), json=True)
    builder = mcore.IndexedDatasetBuilder(str(tmp_path / "theirs.bin"), dtype=np.int32)
    import torch
    for ids in documents(read(name), key, theirs["qwen2"], True): builder.add_item(torch.IntTensor(ids)); builder.end_document()
    builder.finalize(str(tmp_path / "theirs.idx"))
    assert both(tmp_path / f"ours_{key}_document") == both(tmp_path / "theirs")


def test_folder_is_the_files_one_after_another(toks, theirs, tmp_path):
    for name, text in (("b", "three\n"), ("a", "one\n\ntwo\n")): (tmp_path / f"{name}.txt").write_text(text)
    run(config(tmp_path, toks["qwen2"], tmp_path / "x"), json=True)
    assert [theirs["qwen2"].decode(x) for x in IndexedReader(tmp_path / "x_text_document")] == ["one", "two", "three"]


def test_threads_do_not_change_the_bytes(shared_data, toks, tmp_path):
    "As a command, with one thread and with all; stdout holds the JSON object alone."
    made = {}
    for workers in (1, 0):
        argv = ["preprocess", "--input", shared_data / "pretrain" / "c4_demo.jsonl", "--tokenizer-name-or-path", toks["qwen2"], "--tokenizer-type", "PretrainedFromHF",
                "--handler-name", "GeneralPretrainHandler", "--output_prefix", tmp_path / str(workers), "--json-keys", "text", "--workers", workers,
                "--log-interval", "100", "--append-eod", "--json"]
        p = subprocess.run([sys.executable, "-c", "import sys; from ascend_nb.cli import main; sys.exit(main())", *map(str, argv)], capture_output=True, text=True)
        assert p.returncode == 0, p.stderr
        made[workers] = json.loads(p.stdout)["tokens"], both(tmp_path / f"{workers}_text_document")
        assert "documents" in p.stderr
    assert made[0] == made[1]


# Instruction data ---------------------------------------------------------------------------------

CHATML = ("{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|im_end|>\n{% endfor %}"
          "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}")


@pytest.fixture
def chatml(shared_data, tmp_path):
    folder = tmp_path / "tok"; folder.mkdir()
    (folder / "tokenizer.json").symlink_to(shared_data / "tokenizers" / "qwen2" / "tokenizer.json")
    (folder / "tokenizer_config.json").write_text(json.dumps(dict(tokenizer_class="PreTrainedTokenizerFast", eos_token="<|im_end|>", pad_token="<|endoftext|>", chat_template=CHATML)))
    return folder


@pytest.mark.parametrize("name, eod", [("alpaca_en_demo.json", True), ("alpaca_zh_demo.json", False), ("oaast_sft_zh.json", False)])
def test_instruction_files(shared_data, chatml, tmp_path, name, eod):
    "Three pairs: transformers' ids of the whole chat, ones, and labels where transformers' mask of the marked template says so."
    marked = CHATML.replace("{{ m['role'] }}\n{{ m['content'] }}<|im_end|>\n", "{{ m['role'] + '\n' }}{% if m['role'] == 'assistant' %}{% generation %}{{ m['content'] + '<|im_end|>' }}"
                            "{% endgeneration %}{% else %}{{ m['content'] + '<|im_end|>' }}{% endif %}{{ '\n' }}")
    path, theirs = shared_data / "instruct" / name, hf(chatml)
    out = run(config(path, chatml, tmp_path / "alpaca", handler_name="AlpacaStyleInstructionHandler", append_eod=eod), json=True)
    ids, mask, labels = (IndexedReader(tmp_path / f"alpaca_packed_{k}_document") for k in ("input_ids", "attention_mask", "labels"))
    rows = [r for r in json.loads(path.read_text(encoding="utf-8")) if (r["instruction"] or r["input"]) and r["output"]]
    assert len(ids) == len(rows) == out["documents"] and out["data_path"] == str(tmp_path / "alpaca") and out["skipped_long"] == 0
    tail = [theirs.eos_token_id] * eod
    for i, r in enumerate(rows):
        turns = [*r.get("history", []), ["\n".join(filter(None, (r["instruction"], r["input"]))), r["output"]]]
        said = [dict(role=role, content=c) for t in turns for role, c in zip(("user", "assistant"), t, strict=True)]
        want = theirs.apply_chat_template(said, chat_template=marked, return_dict=True, return_assistant_tokens_mask=True)
        got = ids[i].tolist(), labels[i].tolist(), mask[i].tolist()
        if r["output"].startswith("\n"): continue # "\n\n" of header and answer would be one token: encoded apart, see test_templates
        assert got[0] == want["input_ids"] + tail and got[2] == [1] * len(got[0])
        assert got[1] == [t if m else -100 for t, m in zip(want["input_ids"], want["assistant_masks"], strict=True)] + tail
    assert out["trained_tokens"] == sum(int((x != -100).sum()) for x in labels) and out["tokens"] == ids.num_tokens == mask.num_tokens


def test_seq_length_leaves_long_samples_out_and_says_so(shared_data, chatml, tmp_path, capsys):
    source = shared_data / "instruct" / "alpaca_en_demo.json"
    kw = dict(handler_name="AlpacaStyleInstructionHandler")
    run(config(source, chatml, tmp_path / "all", **kw), json=True)
    lengths = IndexedReader(tmp_path / "all_packed_labels_document").lengths
    cut = int(np.median(lengths))
    assert (lengths == cut).any()
    out = run(config(source, chatml, tmp_path / "cut", seq_length=cut, **kw))
    assert IndexedReader(tmp_path / "cut_packed_labels_document").lengths.tolist() == [n for n in lengths if n < cut]
    assert out["skipped_long"] == (lengths >= cut).sum() and f"{out['skipped_long']} too long" in capsys.readouterr().out


@pytest.mark.parametrize("prompt, text", [(None, "### Instruction:\nhi\n\n### Response:\n"), ("default", "Human: hi\nAssistant:")])
def test_prompt_type_where_the_tokenizer_has_no_template(shared_data, tmp_path, prompt, text):
    file = tmp_path / "x.json"
    file.write_text(json.dumps([dict(instruction="hi", input="", output="Hello!")]))
    run(config(file, shared_data / "tokenizers" / "llama2.model", tmp_path / "x", handler_name="AlpacaStyleInstructionHandler", prompt_type=prompt), json=True)
    from ascend_nb.tokenizers import load_tokenizer
    tok = load_tokenizer(shared_data / "tokenizers" / "llama2.model")
    ids, labels = (IndexedReader(tmp_path / f"x_packed_{k}_document")[0] for k in ("input_ids", "labels"))
    assert text in tok.decode(ids) and tok.decode(labels[labels != -100], skip_special=False).strip() == "Hello!</s>"
    assert (tmp_path / "x_packed_attention_mask_document.idx").is_file()


def test_published_template_through_the_whole_run(shared_data, chatml, tmp_path):
    "A llama-2 template and vocabulary: what is learned is the answers and what ends them."
    folder = tmp_path / "llama"; folder.mkdir()
    (folder / "tokenizer.model").symlink_to(shared_data / "tokenizers" / "llama2.model")
    (folder / "chat_template.jinja").write_text(published(shared_data / "chat_templates" / "llama-2-chat.jinja"), encoding="utf-8")
    out = run(config(shared_data / "instruct" / "oaast_sft_zh.json", folder, tmp_path / "y", handler_name="AlpacaStyleInstructionHandler"), json=True)
    rows, labels = json.loads((shared_data / "instruct" / "oaast_sft_zh.json").read_text(encoding="utf-8")), IndexedReader(out["files"][2])
    eos = {2}
    for i in range(0, len(rows), 7): # one end of turn for each answer
        assert sum(int(t in eos) for t in labels[i]) == len(rows[i]["history"]) + 1


@pytest.mark.parametrize("name", ["dpo_en_demo.json", "oaast_rm_zh.json"])
def test_pairs(shared_data, chatml, tmp_path, name):
    "Four files: transformers' ids of both chats, labels where the last answer stands."
    path, theirs = shared_data / "instruct" / name, hf(chatml)
    out = run(config(path, chatml, tmp_path / "p", append_eod=False, on_bad_row="skip"), json=True) # three pairs are one answer twice
    keys = ("chosen_input_ids", "chosen_labels", "rejected_input_ids", "rejected_labels")
    assert out["files"] == [str(tmp_path / f"p_packed_{k}_document") for k in keys] and out["data_path"] == str(tmp_path / "p") and out["kind"] == "pair"
    files = [IndexedReader(f)[:] for f in out["files"]]
    rows = json.loads(path.read_text(encoding="utf-8"))
    if "conversations" in rows[0]:
        roles = dict(human="user", gpt="assistant", system="system")
        rows = [([dict(role=roles[t["from"]], content=t["value"]) for t in r["conversations"]], r["chosen"]["value"], r["rejected"]["value"]) for r in rows]
    else:
        rows = [(sum(([dict(role="user", content=q), dict(role="assistant", content=a)] for q, a in r["history"]), []) +
                 [dict(role="user", content="\n".join(filter(None, (r["instruction"], r["input"]))))], *r["output"][:2]) for r in rows]
    rows = [r for r in rows if r[1] and r[2] and r[1] != r[2]]
    assert len(rows) == out["documents"] == len(files[0]) and out["bad_rows"] == (3 if "oaast" in name else 0)
    for i, (asked, *answers) in list(enumerate(rows))[::6]:
        head = theirs.apply_chat_template(asked, add_generation_prompt=True, return_dict=True)["input_ids"]
        for answer, ids, labels in zip(answers, (files[0][i], files[2][i]), (files[1][i], files[3][i]), strict=True):
            if answer.startswith("\n"): continue # encoded apart, see test_templates
            want = theirs.apply_chat_template([*asked, dict(role="assistant", content=answer)], return_dict=True)["input_ids"]
            assert ids.tolist() == want and (labels[len(head):-1] == ids[len(head):-1]).all() and labels[-1] == -100 # behind the last is a line break
            assert (labels[:len(head)] == -100).all() # earlier answers are part of the question, as in ModelLink


def test_a_handlers_own_template_where_the_tokenizer_has_none(shared_data, tmp_path):
    (tmp_path / "x.json").write_text(json.dumps([dict(instruction="hi", input="", output="Hello!")]))
    run(config(tmp_path / "x.json", shared_data / "tokenizers" / "llama2.model", tmp_path / "x", handler_name="GeneralInstructionHandler"), json=True)
    from ascend_nb.tokenizers import load_tokenizer
    text = load_tokenizer(shared_data / "tokenizers" / "llama2.model").decode(IndexedReader(tmp_path / "x_packed_input_ids_document")[0])
    assert "### Instruction:\nhi\n" in text and "Below is an instruction" in text and text.rstrip().endswith("Hello!")


OWN = """
from ascend_nb.handlers import handler
from ascend_nb.config import PreprocessConfig
from ascend_nb.preprocess import run
@handler("ShoutHandler", "text", needs=("text",))
def shout(row):
    "upper case"
    return {"text": row["text"].upper()}
"""


LOOSE = """
import importlib.util, sys
from ascend_nb.config import PreprocessConfig
from ascend_nb.preprocess import run
spec = importlib.util.spec_from_file_location("mine", "elsewhere/mine.py")
module = importlib.util.module_from_spec(spec)
spec.loader.exec_module(module)
"""


@pytest.mark.parametrize("where", ["module", "__main__", "loose", "loose, registered"])
def test_ones_own_handler_in_two_processes(shared_data, toks, tmp_path, where):
    "By its module; from a script that is all there is, or from a file that is on no path, in one process."
    (tmp_path / "x.jsonl").write_text((shared_data / "pretrain" / "c4_demo.jsonl").read_text(encoding="utf-8") * 3, encoding="utf-8")
    home = tmp_path / ("elsewhere" if "loose" in where else "")
    home.mkdir(exist_ok=True)
    (home / "mine.py").write_text(OWN)
    call = f"print(run(PreprocessConfig(input={str(tmp_path / 'x.jsonl')!r}, tokenizer_name_or_path={str(toks['qwen2'])!r}, output_prefix={str(tmp_path / 'out')!r}, handler_name='ShoutHandler', n_subs=2), json=True)['parts'])"
    begin = {"module": "from mine import *\n", "__main__": OWN, "loose": LOOSE, "loose, registered": LOOSE + "sys.modules['mine'] = module\n"}
    (tmp_path / "script.py").write_text(begin[where] + call)
    p = subprocess.run([sys.executable, "script.py"], cwd=tmp_path, capture_output=True, text=True)
    assert p.stdout.strip() == ("2" if where == "module" else "1"), p.stderr
    from ascend_nb.tokenizers import load_tokenizer
    text = load_tokenizer(toks["qwen2"]).decode(IndexedReader(tmp_path / "out_text_document")[0])
    assert text == text.upper() and len(text) > 99


def test_a_mixture_keeps_to_one_process(shared_data, chatml, tmp_path, capsys):
    "Two sources by turns, the second one short; the same rows in the same order as `datasets` draws them."
    import datasets
    files = [shared_data / "instruct" / f"alpaca_{x}_demo.json" for x in ("en", "zh")]
    out = run(config(",".join(map(str, files)), chatml, tmp_path / "x", handler_name="AlpacaStyleInstructionHandler", mix_strategy="interleave_under", max_samples=50, n_subs=2), json=True)
    assert out["parts"] == 1 and "One process instead of 2" in capsys.readouterr().err
    both_sets = [datasets.Dataset.from_list([dict(q=r["instruction"], i=r["input"]) for r in json.loads(f.read_text(encoding="utf-8"))[:50]]) for f in files]
    want = ["\n".join(filter(None, (r["q"], r["i"]))) for r in datasets.interleave_datasets(both_sets, seed=1234)]
    theirs = hf(chatml)
    got = [theirs.decode(x) for x in IndexedReader(tmp_path / "x_packed_input_ids_document")[:]]
    assert len(got) == 100 and all(f"user\n{w}<|im_end|>" in g for w, g in zip(want, got, strict=True))


def test_a_report(shared_data, chatml, tmp_path):
    out = run(config(shared_data / "instruct" / "alpaca_zh_demo.json", chatml, tmp_path / "x", handler_name="AlpacaStyleInstructionHandler", seq_length=256, pack=True, report=str(tmp_path / "r")), json=True)
    made = json.loads((tmp_path / "r" / "report.json").read_text(encoding="utf-8"))
    assert made == json.loads(json.dumps(out)) and made["lengths"]["sequences"] == made["documents"] and made["lengths"]["packed_rows"] == made["rows"] == len(IndexedReader(tmp_path / "x_packed_labels_document"))
    assert (tmp_path / "r" / "lengths.png").read_bytes()[:4] == b"\x89PNG"


# Failing ------------------------------------------------------------------------------------------

def leftovers(folder): return sorted(p.name for p in folder.iterdir() if p.name.startswith((".", "out")))


def test_an_error_late_in_the_file_leaves_nothing(shared_data, toks, tmp_path):
    "The bad row lies behind several pieces; an older pair under the same name stays as it was."
    good, bad = json.dumps(dict(text="word " * 1000)), json.dumps(dict(txt="x"))
    (tmp_path / "x.jsonl").write_text("\n".join([good] * 450 + [bad]))
    with pytest.raises(UserError, match="no column 'text' in row 451 of x.jsonl"): run(config(tmp_path / "x.jsonl", toks["qwen2"], tmp_path / "out"), json=True)
    assert leftovers(tmp_path) == []
    (tmp_path / "y.jsonl").write_text(good)
    run(config(tmp_path / "y.jsonl", toks["qwen2"], tmp_path / "out"), json=True)
    before = both(tmp_path / "out_text_document")
    with pytest.raises(UserError): run(config(tmp_path / "x.jsonl", toks["qwen2"], tmp_path / "out"), json=True)
    assert both(tmp_path / "out_text_document") == before and leftovers(tmp_path) == ["out_text_document.bin", "out_text_document.idx"]


def test_ctrl_c_before_the_first_mark_leaves_nothing(toks, tmp_path):
    (tmp_path / "x.txt").write_text("\n".join(f"{i} the quick brown fox jumps over the lazy dog" for i in range(400_000)))
    code = ("import sys; from ascend_nb.preprocess import run; from ascend_nb.config import PreprocessConfig as C;"
            "run(C(input=sys.argv[1], tokenizer_name_or_path=sys.argv[2], output_prefix=sys.argv[3], log_interval=1), json=True)")
    p = subprocess.Popen([sys.executable, "-c", code, str(tmp_path / "x.txt"), str(toks["qwen2"]), str(tmp_path / "out")], stderr=subprocess.PIPE, text=True)
    while "documents" not in p.stderr.readline(): pass # it has begun to write
    assert leftovers(tmp_path) == [".out.work"]
    p.send_signal(signal.SIGINT)
    assert "KeyboardInterrupt" in p.communicate(timeout=60)[1] and p.returncode != 0
    assert leftovers(tmp_path) == []


@pytest.mark.parametrize("change, says", [
    (dict(input="nowhere.txt"), "Found nothing at"), (dict(tokenizer_name_or_path="nowhere"), "tokenizer's folder"), (dict(handler_name="GeneralHandler"), "Did you mean General"),
    (dict(json_keys=["txet"], handler_name="GeneralPretrainHandler"), "Did you mean text"), (dict(handler_name="AlpacaStyleInstructionHandler"), "no column 'instruction'"),
    (dict(append_eod=True, tokenizer_name_or_path="bare.json"), "names no eos token"), (dict(handler_name="AlpacaStyleInstructionHandler", prompt_type="qwen9"), "no column|qwen9")])
def test_mistakes(shared_data, toks, tmp_path, change, says):
    (tmp_path / "x.jsonl").write_text('{"text": "a"}')
    (tmp_path / "bare.json").symlink_to(shared_data / "tokenizers" / "qwen2" / "tokenizer.json")
    change = {k: str(tmp_path / v) if k in ("input", "tokenizer_name_or_path") else v for k, v in change.items()}
    with pytest.raises(UserError, match=says): run(PreprocessConfig(**{**vars(config(tmp_path / "x.jsonl", toks["qwen2"], tmp_path / "out")), **change}), json=True)
    assert leftovers(tmp_path) == []


def test_only_empty_rows(toks, tmp_path):
    (tmp_path / "x.txt").write_text("\n\n\n")
    with pytest.raises(UserError, match="no sequence"): run(config(tmp_path / "x.txt", toks["qwen2"], tmp_path / "out"), json=True)
    assert leftovers(tmp_path) == []


def test_unwritable_folder(toks, tmp_path):
    (tmp_path / "x.txt").write_text("a")
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="Cannot write|folder"): run(config(tmp_path / "x.txt", toks["qwen2"], tmp_path / "file" / "out"), json=True)


def test_names():
    cfg = config("x", "t", "d/alpaca", json_keys=["text", "title"], handler_name="GeneralPretrainHandler")
    assert list(output_prefixes(cfg).values()) == ["d/alpaca_text_document", "d/alpaca_title_document"]
    cfg.handler_name = "AlpacaStyleInstructionHandler"
    assert list(output_prefixes(cfg).values()) == [f"d/alpaca_packed_{k}_document" for k in ("input_ids", "attention_mask", "labels")]
    cfg.handler_name = "SharegptStylePairwiseHandler"
    assert list(output_prefixes(cfg).values()) == [f"d/alpaca_packed_{k}_document" for k in ("chosen_input_ids", "chosen_labels", "rejected_input_ids", "rejected_labels")]
    assert output_prefixes(config("x", "t", "d/a", split_sentences=True, handler_name="GeneralPretrainHandler")) == {"text": "d/a_text_sentence"}


# Speed's conditions -------------------------------------------------------------------------------

RUN = ("import re, sys; from ascend_nb.preprocess import run; from ascend_nb.config import PreprocessConfig as C;"
       "run(C(input=sys.argv[1], tokenizer_name_or_path=sys.argv[2], output_prefix=sys.argv[3]), json=True);"
       "print([m for m in ('torch', 'transformers', 'datasets', 'pyarrow', 'jinja2', 'pandas', 'IPython') if m in sys.modules]);"
       "print(re.search(r'VmHWM:\\s+(\\d+)', open('/proc/self/status').read())[1])")


def test_nothing_slow_is_imported(shared_data, toks, tmp_path):
    p = subprocess.run([sys.executable, "-c", RUN, str(shared_data / "pretrain" / "c4_demo.jsonl"), str(toks["qwen2"]), str(tmp_path / "x")], capture_output=True, text=True)
    assert p.stdout.splitlines()[0] == "[]", p.stderr


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="peak memory is read from /proc")
def test_memory_does_not_grow_with_the_input(shared_data, toks, tmp_path):
    "5 MB and 40 MB: the same peak within 10 %."
    text, peak = (shared_data / "pretrain" / "c4_demo.jsonl").read_text(encoding="utf-8"), {}
    for n in (7, 56):
        (tmp_path / f"{n}.jsonl").write_text(text * n)
        p = subprocess.run([sys.executable, "-c", RUN, str(tmp_path / f"{n}.jsonl"), str(toks["qwen2"]), str(tmp_path / "x")], capture_output=True, text=True, check=True)
        peak[n] = int(p.stdout.splitlines()[1])
    assert peak[56] < 1.1 * peak[7], peak
