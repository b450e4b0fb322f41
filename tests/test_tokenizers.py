"""Our tokenizer against transformers, tokenizers and sentencepiece, on real files."""
import json
import shutil
import subprocess
import sys

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
