"""Our tokenizer against transformers, tokenizers and sentencepiece, on real files."""
import json
import random
import shutil
import subprocess
import sys
import unicodedata

import pytest

from ascend_nb.core import UserError
from ascend_nb.tokenizers import load_tokenizer

TEXTS = ["Hello world", "", " lead", "  two  spaces\n\n\tnew 12345 x=3.14;", "敏捷的狐狸 jumps 😀🏳️‍🌈 é e\u0301 ﬁ Ⅷ", "a  2024  b",
         "<|im_start|>user\nhi<|im_end|>\n", "<s>[INST] hi [/INST] ok </s><s>[INST] again [/INST]", "\u200b\ufeff\x00z", "don't WON'T I'll", "\r\n \r\n"]
CHAT = [dict(role="user", content="What is 2 + 2?"), dict(role="assistant", content="It is 4."),
        dict(role="user", content=" 再说一遍\n"), dict(role="assistant", content="四 <4> & \"four\"")]
SYSTEM = [dict(role="system", content="You are brief.")]
TOOLS = [dict(type="function", function=dict(name="add", description="Adds 数 <&>", parameters=dict(type="object", properties=dict(
    a=dict(type="number", description="first")), required=["a"])))]


def same(ours, theirs, texts=TEXTS):
    "Ids with and without special tokens, one by one and in a batch, decoding, and the special ids."
    for special in (False, True):
        want = [theirs(t, add_special_tokens=special).input_ids for t in texts]
        assert [ours.encode(t, special) for t in texts] == want
        assert ours.encode_batch(texts, special) == want
    for ids in want:
        for skip in (False, True):
            assert ours.decode(ids, skip) == theirs.decode(ids, skip_special_tokens=skip, clean_up_tokenization_spaces=False)
    assert ours.vocab_size == max(theirs.get_vocab().values()) + 1
    for name in ("bos", "eos", "pad"):
        assert getattr(ours, f"{name}_token") == getattr(theirs, f"{name}_token")
        assert getattr(ours, f"{name}_token_id") == getattr(theirs, f"{name}_token_id")


def hf(folder):
    from transformers import AutoTokenizer
    return AutoTokenizer.from_pretrained(str(folder), local_files_only=True)


@pytest.fixture(scope="module")
def qwen(shared_data): return shared_data / "tokenizers" / "qwen2"


@pytest.fixture(scope="module")
def qwen_hf(qwen): return hf(qwen)


@pytest.fixture(scope="module")
def qwen_ours(qwen): return load_tokenizer(qwen)


@pytest.fixture(scope="module")
def real_text(shared_data):
    "Lines of English, Chinese and web text."
    pre = shared_data / "pretrain"
    lines = (pre / "wiki_demo.txt").read_text(encoding="utf-8").splitlines()[::12] + (pre / "tinyshakespeare.txt").read_text().splitlines()[::200]
    return lines + ["".join(x["paragraphs"]) for x in json.loads((pre / "lunyu.json").read_text(encoding="utf-8"))][:5]


def test_qwen2_as_published(qwen_ours, qwen_hf, real_text):
    ours = qwen_ours
    assert ours.reason.startswith("tokenizer.json")
    same(ours, qwen_hf, TEXTS + real_text)


def test_qwen2_chat(qwen_ours, qwen_hf):
    ours, theirs = qwen_ours, qwen_hf
    for messages in (CHAT, SYSTEM + CHAT, CHAT[:1]):
        for kw in ({}, dict(add_generation_prompt=True), dict(tools=TOOLS), dict(tools=TOOLS, enable_thinking=False, add_generation_prompt=True)):
            assert ours.apply_chat(messages, **kw) == theirs.apply_chat_template(messages, return_dict=False, **kw)


def test_file_and_folder_are_the_same_tokenizer(qwen, tmp_path):
    assert load_tokenizer(qwen / "tokenizer.json").apply_chat(CHAT) == load_tokenizer(qwen).apply_chat(CHAT)
    bare = load_tokenizer(shutil.copy(qwen / "tokenizer.json", tmp_path / "other.json"))
    assert bare.encode("Hello 世界") == load_tokenizer(qwen).encode("Hello 世界") and bare.chat_template is None


@pytest.mark.parametrize("model", ["llama2.model", "mistral_v1.model"])
def test_bare_sentencepiece(shared_data, tmp_path, model, real_text):
    "A .model file alone: sentencepiece's own ids, and what AutoTokenizer makes of a folder that holds it."
    import sentencepiece
    file = shared_data / "tokenizers" / model
    ours, sp = load_tokenizer(file), sentencepiece.SentencePieceProcessor(str(file))
    plain = [t for t in TEXTS + real_text if "<s>" not in t and "\x00" not in t]
    assert ours.encode_batch(plain) == [sp.encode(t) for t in plain]
    assert (ours.bos_token_id, ours.eos_token_id, ours.vocab_size) == (sp.bos_id(), sp.eos_id(), sp.vocab_size())
    shutil.copy(file, tmp_path / "tokenizer.model")
    same(load_tokenizer(tmp_path), hf(tmp_path), TEXTS + real_text)
    ours.save(tmp_path / "saved")
    same(load_tokenizer(tmp_path / "saved"), hf(tmp_path / "saved"), TEXTS + real_text)
    assert load_tokenizer(tmp_path / "saved").encode_batch(plain) == [sp.encode(t) for t in plain]
    assert (tmp_path / "saved" / "tokenizer.model").read_bytes() == file.read_bytes()


@pytest.mark.parametrize("config", [dict(add_bos_token=True, add_eos_token=False, legacy=False), dict(add_bos_token=True, add_eos_token=True), {}])
def test_sentencepiece_with_llama_config(shared_data, tmp_path, config):
    "add_bos_token and add_eos_token count where there is no tokenizer.json; in the saved folder its post_processor says the same."
    shutil.copy(shared_data / "tokenizers" / "llama2.model", tmp_path / "tokenizer.model")
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(dict(tokenizer_class="LlamaTokenizer", pad_token="<unk>", **config)))
    ours, theirs = load_tokenizer(tmp_path), hf(tmp_path)
    same(ours, theirs)
    assert len(ours.encode("a", special=True)) - len(ours.encode("a")) == sum(config.get(f"add_{x}_token", False) for x in ("bos", "eos"))
    ours.save(tmp_path / "saved")
    same(load_tokenizer(tmp_path / "saved"), theirs)
    same(load_tokenizer(tmp_path / "saved"), hf(tmp_path / "saved"))


def test_published_json_of_llama2_keeps_sentencepiece_ids(shared_data, tmp_path):
    "The tokenizer.json that Meta published prepends ▁ in a normalizer; rebuilding it by class name loses leading spaces, reading it does not."
    import sentencepiece
    from tokenizers import normalizers
    file = shared_data / "tokenizers" / "llama2.model"
    rust = load_tokenizer(file).rust
    rust.pre_tokenizer = None
    rust.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    rust.save(str(tmp_path / "tokenizer.json"))
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(dict(tokenizer_class="LlamaTokenizer", bos_token="<s>", eos_token="</s>", unk_token="<unk>")))
    sp, ours = sentencepiece.SentencePieceProcessor(str(file)), load_tokenizer(tmp_path)
    plain = [t for t in TEXTS if t and "<s>" not in t and "\x00" not in t]
    assert [ours.encode(t) for t in plain] == [sp.encode(t) for t in plain]
    assert [ours.encode(t) for t in plain] == [rust.encode(t, add_special_tokens=False).ids for t in plain]


def test_gpt2_vocab_and_merges(shared_data, tmp_path):
    for name in ("vocab.json", "merges.txt"): shutil.copy(shared_data / "megatron" / f"gpt2-tiny-{name}", tmp_path / name)
    guessed = load_tokenizer(tmp_path)
    (tmp_path / "tokenizer_config.json").write_text('{"tokenizer_class": "GPT2Tokenizer"}')
    same(load_tokenizer(tmp_path), hf(tmp_path))
    assert guessed.encode_batch(TEXTS) == load_tokenizer(tmp_path).encode_batch(TEXTS)
    guessed.save(tmp_path / "saved")
    same(load_tokenizer(tmp_path / "saved"), hf(tmp_path / "saved"))


def test_megatron_documents_decode(shared_data, tmp_path):
    "A real Megatron data set decodes to English with its vocabulary, and encodes back to the same ids."
    import numpy as np
    for name in ("vocab.json", "merges.txt"): shutil.copy(shared_data / "megatron" / f"gpt2-tiny-{name}", tmp_path / name)
    ids = np.fromfile(shared_data / "megatron" / "meg-gpt2-openwebtext_text_document.bin", dtype=np.uint16, count=700)
    tok = load_tokenizer(tmp_path)
    text = tok.decode(ids[:list(ids).index(tok.eos_token_id)] if tok.eos_token_id in ids else ids)
    assert " the " in text and tok.encode(text) == list(ids[:len(tok.encode(text))])


def strings(x):
    "Every string in a JSON value."
    if isinstance(x, str): yield x
    elif isinstance(x, dict): yield from (t for v in x.values() for t in strings(v))
    elif isinstance(x, list): yield from (t for v in x for t in strings(v))


@pytest.fixture(scope="module")
def all_text(shared_data):
    "Every text of the real data: pretraining lines, rows, and all that is said in instruction sets."
    import pyarrow.parquet as pq
    pre, out = shared_data / "pretrain", []
    for name in ("wiki_demo.txt", "tinyshakespeare.txt"): out += (pre / name).read_text(encoding="utf-8").split("\n\n")
    out += (pre / "wiki_demo.txt").read_text(encoding="utf-8").splitlines() + [(pre / "TruthfulQA.csv").read_text(encoding="utf-8")]
    out += pq.read_table(pre / "c4.parquet")["text"].to_pylist()
    for f in [pre / "c4_demo.jsonl", pre / "lunyu.json", *(shared_data / "instruct").glob("*.json*")]:
        text = f.read_text(encoding="utf-8")
        out += [t for x in (map(json.loads, text.splitlines()) if f.suffix == ".jsonl" else [json.loads(text)]) for t in strings(x)]
    assert len(out) > 30_000
    return out


def spm_folder(folder, file, **config):
    "A folder with a sentencepiece model, and a config where there is one."
    shutil.copy(file, folder / "tokenizer.model")
    if config: (folder / "tokenizer_config.json").write_text(json.dumps(config))
    return folder


@pytest.mark.parametrize("model, cls", [("llama2.model", None), ("mistral_v1.model", "LlamaTokenizer")])
def test_sentencepiece_ids_on_real_text(shared_data, tmp_path, all_text, model, cls):
    "What AutoTokenizer makes of the folder, id by id; sentencepiece encodes, the Rust form is not even made unless a text asks for it."
    folder = spm_folder(tmp_path, shared_data / "tokenizers" / model, **({"tokenizer_class": cls, "legacy": False} if cls else {}))
    ours, rust, texts = load_tokenizer(folder), hf(folder).backend_tokenizer, all_text[::8]
    assert ours.reason == "tokenizer.model, by sentencepiece"
    assert ours.encode_batch(texts) == [e.ids for e in rust.encode_batch_fast(texts, add_special_tokens=False)]
    plain = ["no marks", "here"]
    assert load_tokenizer(folder).encode_batch(plain) == ours.encode_batch(plain)
    fresh = load_tokenizer(folder)
    fresh.encode_batch(plain); fresh.bulk(plain); assert (fresh.vocab_size, fresh.eos_token_id) == (32000, 2)
    assert "rust" not in vars(fresh)


@pytest.mark.slow
@pytest.mark.parametrize("model", ["llama2.model", "mistral_v1.model"])
def test_sentencepiece_ids_on_all_real_text(shared_data, tmp_path, all_text, model):
    import sentencepiece
    folder = spm_folder(tmp_path, shared_data / "tokenizers" / model)
    want = [e.ids for e in hf(folder).backend_tokenizer.encode_batch_fast(all_text, add_special_tokens=False)]
    assert load_tokenizer(folder).encode_batch(all_text) == want
    marks = ("<s>", "</s>", "<unk>")
    sp = sentencepiece.SentencePieceProcessor(str(folder / "tokenizer.model"))
    assert [w for w, t in zip(want, all_text, strict=True) if not any(m in t for m in marks)] == sp.encode([t for t in all_text if not any(m in t for m in marks)])


def flags(content, **kw): return dict(content=content, lstrip=False, rstrip=False, normalized=False, single_word=False, special=True) | kw


BASE = {str(i): flags(t) for i, t in enumerate(("<unk>", "<s>", "</s>"))}
SPM_CONFIGS = {
    "nothing": {}, "bos": dict(add_bos_token=True, legacy=False),
    "published": dict(added_tokens_decoder=BASE, add_bos_token=True, add_eos_token=False, legacy=False, pad_token="<unk>"),
    "normalized": dict(added_tokens_decoder={k: v | dict(normalized=True) for k, v in BASE.items()}, legacy=None, pad_token=None),
    "more": dict(added_tokens_decoder=BASE | {"32000": flags("<|im_end|>"), "32001": flags("<x>", normalized=True, special=False)}),
    "stripping": dict(added_tokens_decoder=BASE | {"32000": flags("<x>", lstrip=True, rstrip=True)}),
    "extra": dict(extra_special_tokens=["<x>"], legacy=True), "other_eos": dict(eos_token="<|im_end|>", add_eos_token=True),
    "no_prefix": dict(add_prefix_space=False), "split": dict(split_special_tokens=True)}


@pytest.mark.parametrize("cls, config", [*((None, c) for c in SPM_CONFIGS), *(("LlamaTokenizer", c) for c in ("published", "normalized", "more", "extra", "no_prefix"))])
def test_sentencepiece_folders_of_every_shape(shared_data, tmp_path, cls, config):
    "Special tokens, blanks and both together, in the folders that models are published in: the ids of AutoTokenizer."
    pytest.importorskip("transformers", "5", reason="transformers 4 builds these folders otherwise")
    folder = spm_folder(tmp_path, shared_data / "tokenizers" / "llama2.model", **SPM_CONFIGS[config], **({"tokenizer_class": cls} if cls else {}))
    parts, rng = [" ", "  ", "<s>", "</s>", "<x>", "the", " dog", "▁", "<|im_end|>", "<pad>", "<unk>", "\n", "狐"], random.Random(0)
    same(load_tokenizer(folder), hf(folder), TEXTS + ["".join(rng.choices(parts, k=10)) for _ in range(60)])


@pytest.mark.parametrize("model", ["llama2.model", pytest.param("mistral_v1.model", marks=pytest.mark.slow)])
def test_rust_form_is_transformers_own(shared_data, tmp_path, model):
    "Not only the ids: the whole tokenizer.json, every merge in its place."
    pytest.importorskip("transformers", "5", reason="transformers 4 builds these folders otherwise")
    for config in ({}, dict(add_bos_token=True, legacy=False), dict(tokenizer_class="LlamaTokenizer"), dict(tokenizer_class="LlamaTokenizer", legacy=True, add_eos_token=True)):
        folder = spm_folder(tmp_path, shared_data / "tokenizers" / model, **config)
        assert json.loads(load_tokenizer(folder).rust.to_str()) == json.loads(hf(folder).backend_tokenizer.to_str())


def test_other_sentencepiece_models_go_to_transformers(tmp_path):
    "A unigram model, one that normalises text, one with user-defined pieces: none is read by Llama's rules."
    import sentencepiece

    from ascend_nb.vocab_files import open_llama_model
    text = ["the quick brown fox jumps over the lazy dog", "敏捷的狐狸 jumps again", "one two three four"] * 30
    base = dict(vocab_size=330, model_type="bpe", byte_fallback=True, normalization_rule_name="identity", remove_extra_whitespaces=False, minloglevel=2)
    def train(name, **kw):
        sentencepiece.SentencePieceTrainer.train(sentence_iterator=iter(text), model_prefix=str(tmp_path / name), **base | kw)
        return open_llama_model(tmp_path / f"{name}.model")
    assert train("llama") is not None
    others = dict(unigram=dict(model_type="unigram", vocab_size=293), nfkc=dict(normalization_rule_name="nmt_nfkc"), squeezed=dict(remove_extra_whitespaces=True),
                  user=dict(user_defined_symbols=["<sep>"]), no_bytes=dict(byte_fallback=False, vocab_size=70), no_prefix=dict(add_dummy_prefix=False), ids=dict(unk_id=2, bos_id=0, eos_id=1))
    assert [name for name, kw in others.items() if train(name, **kw) is not None] == []


def test_texts_in_nfc_skip_the_normalizer(qwen_ours):
    "Python's check and Rust's normalizer agree, also where a mark follows a special token; the twin's ids are the whole tokenizer's."
    rng, special = random.Random(0), list(qwen_ours.special_tokens)
    pieces = [unicodedata.decomposition(chr(c)).split() for c in range(0x30000) if not unicodedata.decomposition(chr(c)).startswith(("<", " "))]
    pairs = [p for p in pieces if len(p) == 2]
    starters, marks = ([chr(int(p[i], 16)) for p in pairs] for i in (0, 1))
    texts = [rng.choice(starters) + "".join(rng.choices(marks, k=rng.randint(1, 3))) + rng.choice(special) + rng.choice(["", "\u0338"]) for _ in range(20000)]
    texts += [unicodedata.normalize("NFC", t) for t in texts]
    assert 20000 <= sum(unicodedata.is_normalized("NFC", t) for t in texts) < 40000 and qwen_ours.twin is not None
    assert [qwen_ours.encode(t) for t in texts] == [e.ids for e in qwen_ours.rust.encode_batch(texts, add_special_tokens=False)]


def test_half_a_character_is_named(qwen_ours, shared_data):
    for tok in (qwen_ours, load_tokenizer(shared_data / "tokenizers" / "llama2.model")):
        with pytest.raises(UserError, match="half a character") as e: tok.bulk(["fine", "also fine", "a \ud83d b"])
        assert e.value.facts["number"] == 2


def test_fingerprint(shared_data, tmp_path, qwen):
    prints = {load_tokenizer(p).fingerprint() for p in (qwen, shared_data / "tokenizers/llama2.model", shared_data / "tokenizers/mistral_v1.model")}
    assert len(prints) == 3 and load_tokenizer(qwen).fingerprint() in prints
    shutil.copytree(qwen, tmp_path / "moved")
    moved = load_tokenizer(tmp_path / "moved")
    assert moved.fingerprint() in prints, "a copy elsewhere is the same tokenizer"
    moved.chat_template = "{{ messages }}"
    assert moved.fingerprint() not in prints


def test_no_transformers_on_the_sentencepiece_path(shared_data):
    code = (f"import sys; from ascend_nb.tokenizers import load_tokenizer; t = load_tokenizer({str(shared_data / 'tokenizers/llama2.model')!r});"
            "t.bulk(['x', '<s> y']); t.encode_offsets('z'); t.decode([5, 6]); t.vocab_size; print([m for m in ('transformers', 'torch', 'google.protobuf') if m in sys.modules])")
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.strip() == "[]"


def test_gpt2_kind(shared_data, tmp_path, real_text):
    "Megatron's GPT2BPETokenizer: transformers' ids, except that a special token's text is plain letters."
    from transformers import GPT2Tokenizer
    files = [shared_data / "megatron" / f"gpt2-tiny-{n}" for n in ("vocab.json", "merges.txt")]
    ours, theirs = load_tokenizer("", "GPT2BPETokenizer", *files), GPT2Tokenizer(*map(str, files))
    texts = TEXTS + real_text
    assert ours.encode_batch(texts, special=True) == [theirs.encode(t) for t in texts]
    assert ours.eos_token_id == json.loads(files[0].read_text())["<|endoftext|>"] and ours.vocab_size == len(json.loads(files[0].read_text()))
    assert ours.eos_token_id not in ours.encode("a<|endoftext|>b") and ours.eos_token_id in theirs.encode("a<|endoftext|>b")
    assert ours.decode(ours.encode("a<|endoftext|>b")) == "a<|endoftext|>b"


@pytest.mark.parametrize("kind, lower", [("BertWordPieceLowerCase", True), ("BertWordPieceCase", False)])
def test_bert_kinds(tmp_path, real_text, kind, lower):
    "The word pieces of transformers' Python BertTokenizer, which is Google's code plus NFC; [BOS] and [EOS] follow the vocabulary as in Megatron."
    from tokenizers import BertWordPieceTokenizer
    bert = pytest.importorskip("transformers.models.bert.tokenization_bert_legacy")
    maker = BertWordPieceTokenizer(lowercase=lower)
    maker.train_from_iterator(real_text, vocab_size=900, show_progress=False)
    vocab = [t for t, _ in sorted(maker.get_vocab().items(), key=lambda kv: kv[1])]
    (tmp_path / "vocab.txt").write_text("\n".join(vocab), encoding="utf-8")
    ours, theirs = load_tokenizer("", kind, tmp_path / "vocab.txt"), bert.BertTokenizerLegacy(str(tmp_path / "vocab.txt"), do_lower_case=lower, never_split=[])
    texts = [unicodedata.normalize("NFC", t) for t in TEXTS if "\u200b" not in t] + real_text
    assert ours.encode_batch(texts, special=True) == [theirs.convert_tokens_to_ids(theirs._tokenize(t)) for t in texts]
    assert (ours.bos_token_id, ours.eos_token_id, ours.vocab_size) == (len(vocab), len(vocab) + 1, len(vocab) + 2)


@pytest.mark.parametrize("args, says", [
    (("GPT2BPETokenizer",), "Pass --vocab-file"), (("GPT2BPETokenizer", __file__), "Pass --merge-file"), (("BertWordPieceCase",), "Pass --vocab-file"),
    (("GPT2BPETokenizer", "no_such.json", "no_such.txt"), "Found nothing at no_such.json"), (("BertWordPieceCase", __file__), "a BERT vocabulary has it"),
    (("GPT2BPETokenizer", __file__, __file__), "cannot be read as vocab.json"), (("GPT2BPE",), "Did you mean GPT2BPETokenizer")])
def test_kinds_name_what_is_missing(args, says):
    with pytest.raises(UserError, match=says): load_tokenizer("", *args)


@pytest.fixture
def digits(tmp_path):
    "A folder shaped like SmolLM2's: the file splits digits, the config names the class GPT2Tokenizer, which knows nothing of it."
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    t = Tokenizer(models.BPE())
    t.pre_tokenizer = pre_tokenizers.Sequence([pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)])
    t.decoder = decoders.ByteLevel()
    t.train_from_iterator(["the year  2024 and  1999, for i in range(10):\n    x += 1\n"] * 50, trainers.BpeTrainer(
        vocab_size=330, special_tokens=["<|endoftext|>", "<|im_start|>", "<|im_end|>"], initial_alphabet=pre_tokenizers.ByteLevel.alphabet()))
    t.save(str(tmp_path / "tokenizer.json"))
    return tmp_path, t


@pytest.mark.parametrize("cls", ["PreTrainedTokenizerFast", "TokenizersBackend", None])
def test_custom_bpe_equals_transformers(digits, cls):
    folder, _ = digits
    names = dict(eos_token="<|im_end|>", bos_token="<|im_start|>", pad_token="<pad>", unk_token="<|endoftext|>", extra_special_tokens=["<tool>"])
    (folder / "tokenizer_config.json").write_text(json.dumps(names | ({"tokenizer_class": cls} if cls else {})))
    same(load_tokenizer(folder), hf(folder), TEXTS + ["a<pad>b<tool>c"])


def test_digit_splitting_survives_the_class_name(digits):
    "What the file says holds, whatever class the config names: the published behaviour of SmolLM2."
    folder, published = digits
    (folder / "tokenizer_config.json").write_text(json.dumps(dict(tokenizer_class="GPT2Tokenizer", eos_token="<|im_end|>")))
    assert load_tokenizer(folder).encode_batch(TEXTS) == [published.encode(t).ids for t in TEXTS]


@pytest.mark.parametrize("form", ["added_tokens_decoder", "special_tokens_map", "dicts"])
def test_special_tokens_of_every_age(digits, form):
    "Named in the config's decoder table with flags, in special_tokens_map.json, or as dicts."
    folder, _ = digits
    flags = dict(lstrip=False, rstrip=True, normalized=False, single_word=False)
    config = dict(tokenizer_class="PreTrainedTokenizerFast")
    if form == "added_tokens_decoder":
        config |= dict(eos_token="<|im_end|>", added_tokens_decoder={"2": dict(content="<|im_end|>", special=True, **flags), "330": dict(content="<x>", special=False, **flags)})
    elif form == "special_tokens_map":
        (folder / "special_tokens_map.json").write_text(json.dumps(dict(eos_token=dict(content="<|im_end|>", **flags), pad_token="<pad>", additional_special_tokens=["<y>"])))
    else: config |= dict(eos_token={"__type": "AddedToken", "content": "<|im_end|>", "special": True, **flags})
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    same(load_tokenizer(folder), hf(folder), TEXTS + ["a<|im_end|>  b<x>  c<y> d<pad>"])


def templates():
    from conftest import DATA
    return sorted((DATA / "chat_templates").glob("*.jinja")) or [None]


@pytest.mark.parametrize("file", templates(), ids=lambda p: p.stem if p else "none")
def test_chat_templates(file, shared_data, qwen, qwen_hf, tmp_path):
    "18 published templates render what transformers renders, or refuse where it refuses."
    from tokenizers import Tokenizer, models
    Tokenizer(models.BPE({"a": 0}, [])).save(str(tmp_path / "tokenizer.json")) # ids do not matter here
    shutil.copy(qwen / "tokenizer_config.json", tmp_path)
    shutil.copy(file, tmp_path / "chat_template.jinja")
    ours, theirs, ends = load_tokenizer(tmp_path), qwen_hf, dict(bos_token="<s>", eos_token="</s>")
    assert ours.chat_template == file.read_text(encoding="utf-8")
    rendered = 0
    for messages in (CHAT, CHAT[:1], SYSTEM + CHAT, SYSTEM + CHAT[:1], CHAT[1:], CHAT[:1] * 2, [dict(role="user", content="x", name=None)]):
        for kw in ({}, ends, dict(tools=TOOLS, **ends), dict(add_generation_prompt=True, **ends)):
            try: want = theirs.apply_chat_template(messages, chat_template=ours.chat_template, tokenize=False, **kw)
            except Exception:
                with pytest.raises(UserError, match="refuses"): ours.render_chat(messages, **kw)
            else:
                rendered += 1
                assert ours.render_chat(messages, **kw) == want
                assert ours.chat_spans(messages, **{k: v for k, v in kw.items() if k != "add_generation_prompt"})[1] == []
    assert rendered >= 12


GENERATION = ("{% for m in messages %}{{ '<|im_start|>' + m['role'] + '\n' }}{% if m['role'] == 'assistant' %}{% generation %}{{ m['content'] }}<|im_end|>"
              "{% endgeneration %}{% else %}{{ m['content'] }}<|im_end|>{% endif %}{{ '\n' }}{% endfor %}")


def test_generation_tag(qwen_ours, qwen_hf):
    ours, theirs = qwen_ours, qwen_hf
    want = theirs.apply_chat_template(SYSTEM + CHAT, chat_template=GENERATION, return_assistant_tokens_mask=True, return_dict=True)
    text, spans = ours.chat_spans(SYSTEM + CHAT, chat_template=GENERATION)
    ids, offsets = ours.encode_offsets(text)
    assert ids == want["input_ids"] and text == theirs.apply_chat_template(SYSTEM + CHAT, chat_template=GENERATION, tokenize=False)
    assert [int(any(a < e and b > s for s, e in spans)) for a, b in offsets] == want["assistant_masks"]


DIALECT = {
    "tojson": "{{ tools | tojson(indent=2) }}{{ messages[0] | tojson }}",
    "loopcontrols": "{% for m in messages %}{% if loop.index > 1 %}{% break %}{% endif %}{{ m.content }}{% endfor %}",
    "strftime": "{{ strftime_now('%Y') }}",
    "blocks": "{% for m in messages %}\n    {% if m.role == 'user' %}\n  U {{ m.content }}\n    {% endif %}\n{% endfor %}\n",
    "namespace": "{% set ns = namespace(n=0) %}{% for m in messages %}{% set ns.n = ns.n + 1 %}{% endfor %}{{ ns.n }}{{ dict(a=1).a }}",
    "undefined": "{{ bos_token }}|{{ nothing }}|{{ documents is none }}|{{ tools is defined }}|{{ eos_token }}|{{ pad_token }}",
    "reasoning": "{% for m in messages %}{{ m.reasoning_content or '-' }}{{ m.thinking or '-' }}{% endfor %}",
}


@pytest.mark.parametrize("name", DIALECT)
def test_dialect(qwen_ours, qwen_hf, name):
    ours, theirs = qwen_ours, qwen_hf
    messages = CHAT + [dict(role="assistant", content="x", thinking="because", tool_calls=None)]
    for tools in (TOOLS, None):
        assert ours.render_chat(messages, tools=tools, chat_template=DIALECT[name]) == theirs.apply_chat_template(
            messages, tools=tools, chat_template=DIALECT[name], tokenize=False)


@pytest.mark.parametrize("escape", ["{{ ''.__class__.__mro__ }}", "{{ messages.append(1) }}", "{{ messages.__init__.__globals__ }}"])
def test_the_sandbox_holds(qwen_ours, escape):
    with pytest.raises(UserError, match="refuses"): qwen_ours.render_chat(CHAT, chat_template=escape)


def test_named_templates(digits):
    "A list of templates in the config: `tool_use` is taken when tools are given, as transformers does."
    tmp_path, _ = digits
    both = [dict(name="default", template="D{{ messages[0].content }}"), dict(name="tool_use", template="T{{ tools[0].type }}"), dict(name="rag", template="R")]
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(dict(tokenizer_class="PreTrainedTokenizerFast", chat_template=both)))
    for folder in (tmp_path, tmp_path / "saved"):
        ours, theirs = load_tokenizer(folder), hf(folder)
        for kw in ({}, dict(tools=TOOLS), dict(chat_template="rag")):
            assert ours.render_chat(CHAT, **kw) == theirs.apply_chat_template(CHAT, tokenize=False, **kw)
        ours.save(tmp_path / "saved")


def test_saved_folder_opens_in_transformers(qwen, tmp_path):
    ours = load_tokenizer(qwen)
    ours.chat_template = GENERATION
    ours.save(tmp_path)
    theirs = hf(tmp_path)
    same(load_tokenizer(tmp_path), theirs)
    assert theirs.chat_template == GENERATION == json.loads((tmp_path / "tokenizer_config.json").read_text(encoding="utf-8"))["chat_template"]
    assert (tmp_path / "tokenizer.json").read_bytes() == (qwen / "tokenizer.json").read_bytes()


@pytest.mark.parametrize("name, text, says", [
    ("tokenizer.json", "{", "cannot be read as a tokenizer"), ("tokenizer_config.json", "{", "cannot be read as JSON"),
    ("tokenizer_config.json", "[1]", "cannot be read as JSON"), ("tokenizer.model", "not sentencepiece", "transformers cannot open"),
    ("weights.bin", "", "it holds: weights.bin")])
def test_broken_folders(qwen, tmp_path, name, text, says):
    if name == "tokenizer_config.json": (tmp_path / "tokenizer.json").symlink_to(qwen / "tokenizer.json")
    (tmp_path / name).write_text(text)
    with pytest.raises(UserError, match=says): load_tokenizer(tmp_path)


def test_no_transformers_on_the_fast_path(qwen):
    code = (f"import sys; from ascend_nb.tokenizers import load_tokenizer; t = load_tokenizer({str(qwen)!r}); t.apply_chat([dict(role='user', content='x')]);"
            "print([m for m in ('transformers', 'torch', 'datasets', 'huggingface_hub.hf_api', 'pandas', 'pyarrow') if m in sys.modules])")
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    assert out.strip() == "[]"
