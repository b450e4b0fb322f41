"""The loss mask against transformers' own, on published templates and a real tokenizer."""
import json
import re

import pytest
from test_tokenizers import CHAT, GENERATION, SYSTEM, TOOLS, hf, templates

from ascend_nb.core import UserError
from ascend_nb.handlers import Record, chat
from ascend_nb.templates import PROMPT_TYPES, encode_prompt, encode_sft, encode_sft_many, jinja_of, pick_template, prompt_name, show_tokens
from ascend_nb.tokenizers import load_tokenizer

# what each published template makes of an answer and of the last one, read off the templates by eye. Without an end-of-turn token the line
# break behind an answer is all that ends it; in chatqa and falcon it belongs to the next question, but not where a token holds both (".\n\n")
ANSWERS = {
    "alpaca": "{}</s>", "amberchat": " {}\n", "chatml": "{}<|im_end|>", "chatqa": (" {}\n\n", " {}"), "falcon-instruct": (" {}\n\n", " {}"),
    "gemma-it": "{}<end_of_turn>", "granite-3.0-instruct": "{}<|end_of_text|>", "llama-2-chat": " {} </s>", "llama-3-instruct": "{}<|eot_id|>",
    "mistral-instruct": " {}</s>", "openchat-3.5": " {}<|end_of_turn|>", "phi-3-small": "{}<|end|>", "phi-3": "{}<|end|>",
    "qwen2.5-instruct": "{}<|im_end|>", "saiga": "{}</s>", "solar-instruct": "{}\n\n", "vicuna": " {}</s>", "zephyr": "{}</s>"}
MARKS = ["<|eot_id|>", "<|start_header_id|>", "<|end_header_id|>", "<start_of_turn>", "<end_of_turn>", "<|end|>", "<|user|>", "<|assistant|>", "<|system|>",
         "<|end_of_turn|>", "<|end_of_text|>", "<|start_of_role|>", "<|end_of_role|>"]


@pytest.fixture(scope="module")
def qwen(shared_data): return shared_data / "tokenizers" / "qwen2"


@pytest.fixture(scope="module")
def ends(qwen, tmp_path_factory):
    "The real vocabulary, with a bos and an eos token of its own."
    folder = tmp_path_factory.mktemp("ends")
    (folder / "tokenizer.json").symlink_to(qwen / "tokenizer.json")
    (folder / "tokenizer_config.json").write_text(json.dumps(dict(tokenizer_class="PreTrainedTokenizerFast", bos_token="<s>", eos_token="</s>", extra_special_tokens=MARKS)))
    return load_tokenizer(folder)


def published(file):
    "As the collection says to read them: indentation and line ends outside the strings are for people."
    text = file.read_text(encoding="utf-8")
    return text if "{%-" in text else text.replace("    ", "").replace("\n", "")


@pytest.fixture(scope="module")
def ends_hf(ends): return hf(ends.path)


def learned(tokens, tok):
    "The learned text, a string for each run of learned ids."
    runs, on = [], False
    for i, m in zip(tokens.ids, tokens.loss_mask, strict=True):
        if m: runs[-1:] = [(runs[-1] if on else []) + [i]] if on else runs[-1:] + [[i]]
        on = bool(m)
    return [tok.decode(r, skip_special=False) for r in runs]


@pytest.mark.parametrize("file", templates(), ids=lambda p: p.stem if p else "none")
def test_published_templates(file, shared_data, ends):
    "Ids are those of the whole chat; learned is each answer with what ends it, and not a character more."
    ends.chat_template = published(file)
    for messages in (CHAT, SYSTEM + CHAT):
        tokens = encode_sft(Record(messages), ends)
        assert tokens.ids == ends.apply_chat(messages)
        form = ANSWERS[file.stem] if isinstance(ANSWERS[file.stem], tuple) else [ANSWERS[file.stem]] * 2
        want = [f.format(m["content"]) for f, m in zip(form, CHAT[1::2], strict=True)]
        assert learned(tokens, ends) == want


MARKED = {
    "llama-3-instruct": ("{{ '<|start_header_id|>' + message['role'] + '<|end_header_id|>\\n\\n' + message['content'] | trim + '<|eot_id|>' }}",
                         "{{ '<|start_header_id|>' + message['role'] + '<|end_header_id|>\\n\\n' }}{% if message['role'] == 'assistant' %}{% generation %}"
                         "{{ message['content'] | trim + '<|eot_id|>' }}{% endgeneration %}{% else %}{{ message['content'] | trim + '<|eot_id|>' }}{% endif %}"),
    "mistral-instruct": ("{{ ' ' + message['content'] | trim + eos_token }}", "{% generation %}{{ ' ' + message['content'] | trim + eos_token }}{% endgeneration %}"),
    "vicuna": ("{{ 'ASSISTANT: ' + message['content'] | trim + eos_token + '\\n' }}",
               "{{ 'ASSISTANT:' }}{% generation %}{{ ' ' + message['content'] | trim + eos_token }}{% endgeneration %}{{ '\\n' }}"),
}


@pytest.mark.parametrize("name", MARKED)
def test_mask_equals_transformers(name, shared_data, ends, ends_hf):
    "The same template with its answers marked by hand: transformers' mask is ours, with marks and without."
    plain = published(shared_data / "chat_templates" / f"{name}.jinja")
    assert MARKED[name][0] in plain
    marked, theirs = plain.replace(*MARKED[name]), ends_hf
    for messages in (CHAT, SYSTEM + CHAT, CHAT[:2]):
        want = theirs.apply_chat_template(messages, chat_template=marked, return_dict=True, return_assistant_tokens_mask=True)
        for template in (plain, marked):
            ends.chat_template = template
            got = encode_sft(Record(messages), ends)
            assert (got.ids, got.loss_mask) == (want["input_ids"], want["assistant_masks"])


def test_qwen3_rewrites_earlier_turns(qwen):
    "A template that drops earlier thoughts: still every answer is learned, in the form in which it is written."
    tok = load_tokenizer(qwen)
    think = "<think>\nhm\n</think>\n\n"
    rec = chat([("q1", think + "a1 <|im_end|> b "), ("q2", "a2"), ("q3", think + "a3")], "s")
    assert learned(encode_sft(rec, tok), tok) == ["a1 <|im_end|> b <|im_end|>", "a2<|im_end|>", think + "a3<|im_end|>"]
    assert learned(encode_sft(chat([("q1", "a1"), ("q2", "a2")]), tok), tok) == ["a1<|im_end|>", "<think>\n\n</think>\n\na2<|im_end|>"]


def test_template_for_tools(ends):
    "A template named tool_use is taken for a chat with tools, in training and in chat alike."
    ends.templates = {"default": "{% for m in messages %}{{ m.content }}|{% endfor %}", "tool_use": "T{% for m in messages %}{{ m.content }}|{% endfor %}"}
    assert encode_sft(Record(CHAT, TOOLS), ends).ids == ends.apply_chat(CHAT, tools=TOOLS) != ends.apply_chat(CHAT) == encode_sft(Record(CHAT), ends).ids
    assert encode_prompt(CHAT[:1], ends, tools=TOOLS) == ends.apply_chat(CHAT[:1], True, TOOLS)
    ends.templates = {"rag": "x"}
    with pytest.raises(UserError, match="no chat template named 'default'"): encode_sft(Record(CHAT), ends)


def test_tools_are_read_not_learned(qwen):
    tok = load_tokenizer(qwen)
    rec = Record(CHAT, TOOLS)
    tokens = encode_sft(rec, tok)
    assert tokens.ids == tok.apply_chat(CHAT, tools=TOOLS) and "Adds" in tok.decode(tokens.ids)
    assert "Adds" not in "".join(learned(tokens, tok)) and learned(tokens, tok)[0].startswith("It is 4.")


@pytest.mark.parametrize("prompt", [None, *PROMPT_TYPES])
def test_prompt_for_inference_is_what_was_trained(ends, prompt):
    "The ids in front of the answer are exactly those that chat will send for the same question, also where the answer begins with a line break."
    ends.chat_template = GENERATION + "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
    for answer in ("It is 4.", "\n4", " 4", "\n\n 4", "...4", "4"):
        for said in ([], SYSTEM):
            ask = said + CHAT[:1]
            tokens = encode_sft(Record([*ask, dict(role="assistant", content=answer)]), ends, prompt)
            ids = encode_prompt(ask, ends, prompt)
            assert tokens.ids[:len(ids)] == ids and tokens.loss_mask.index(1) == len(ids) and sum(tokens.loss_mask[:len(ids)]) == 0
    assert encode_prompt(CHAT[:3], ends) == ends.apply_chat(CHAT[:3], add_generation_prompt=True) and prompt_name(ends, prompt) == prompt
    ends.templates = {}
    assert prompt_name(ends) == "alpaca" and encode_prompt(CHAT[:1], ends) == encode_prompt(CHAT[:1], ends, "alpaca")


@pytest.mark.parametrize("name, text", [
    ("alpaca", "Below is an instruction that describes a task. Write a response that appropriately completes the request.\n\n"
               "### Instruction:\nq1\n\n### Response:\na1</s>\n\n### Instruction:\nq2\n\n### Response:\na2</s>"),
    ("chatml", "<|im_start|>user\nq1<|im_end|>\n<|im_start|>assistant\na1</s>\n<|im_start|>user\nq2<|im_end|>\n<|im_start|>assistant\na2</s>"),
    ("default", "Human: q1\nAssistant:a1</s>\nHuman: q2\nAssistant:a2</s>"), ("empty", "q1a1q2a2")])
def test_prompt_types(name, text, ends, ends_hf):
    rec = chat([("q1", "a1"), ("q2", "a2")])
    template = pick_template(ends, name)
    assert ends.render_chat(rec.messages, chat_template=template) == text == ends_hf.apply_chat_template(rec.messages, chat_template=template, tokenize=False)
    eos = "</s>" * PROMPT_TYPES[name].eos
    assert learned(encode_sft(rec, ends, name), ends) == [f"a1{eos}", f"a2{eos}"]
    with_system = ends.render_chat(chat([("q1", "a1")], "S'\"{}\\").messages, chat_template=template)
    assert with_system.count("S'\"{}\\") == 1 and "Below" not in with_system
    assert ends.render_chat(rec.messages[:3], add_generation_prompt=True, chat_template=template) == text[:-len(f"a2{eos}")]


def test_own_template_first_then_alpaca(ends):
    ends.chat_template = GENERATION
    assert pick_template(ends) == GENERATION and pick_template(ends, "default") == jinja_of("default")
    ends.templates = {}
    assert pick_template(ends) == jinja_of("alpaca")
    with pytest.raises(UserError, match="prompt_type='alpca'.*Did you mean alpaca"): pick_template(ends, "alpca")


def test_sentencepiece_offsets(shared_data):
    "A llama vocabulary, where a word carries its space: the first word of the answer is learned, the header is not."
    tok = load_tokenizer(shared_data / "tokenizers" / "llama2.model")
    tok.chat_template = published(shared_data / "chat_templates" / "llama-2-chat.jinja")
    tokens = encode_sft(Record(SYSTEM + CHAT), tok)
    assert tokens.ids == tok.apply_chat(SYSTEM + CHAT)
    assert [t.strip() for t in learned(tokens, tok)] == ["It is 4. </s>", "四 <4> & \"four\" </s>"]
    n = tokens.loss_mask.index(1)
    assert tokens.ids[:n] == tok.apply_chat(SYSTEM + CHAT[:1])


def test_batch_equals_one_by_one(ends, shared_data):
    ends.chat_template = GENERATION
    rows = json.loads((shared_data / "instruct" / "identity.json").read_text(encoding="utf-8"))[:40]
    records = [chat([(r["instruction"], r["output"])]) for r in rows]
    assert encode_sft_many(records, ends) == [encode_sft(r, ends) for r in records]
    for r, t in zip(records, encode_sft_many(records, ends), strict=True):
        assert learned(t, ends) == [r.messages[1]["content"] + "<|im_end|>"]
        assert t.labels.dtype == "int32" and [x for x in t.labels if x != -100] == [i for i, m in zip(t.ids, t.loss_mask, strict=True) if m]


@pytest.mark.parametrize("template, messages, says", [
    ("{% for m in messages %}{{ m.content }}{% endfor %}", CHAT[:1], "nobody answers"),
    ("{% for m in messages if m.role == 'user' %}{{ m.content }}{% endfor %}", CHAT, "leaves the answer out"),
    ("{{ messages | length }}{% for m in messages %}{{ m.content }}{% endfor %}", CHAT, "cannot be found"),
    ("{% for m in messages[::-1] %}{{ m.content }}\n{% endfor %}", CHAT, "cannot be found")])
def test_what_cannot_be_learned_is_an_error(template, messages, says, ends):
    ends.chat_template = template
    with pytest.raises(UserError, match=says): encode_sft(Record(messages), ends)


def test_view(ends):
    ends.chat_template = GENERATION
    view = show_tokens(encode_sft(Record([dict(role="user", content="<b>"), dict(role="assistant", content="y\nz")]), ends), ends)
    assert "&lt;" in view._repr_html_() and "<b>" not in view._repr_html_()
    green = "".join(re.findall(r"\x1b\[32m(.*?)\x1b\[0m", str(view), re.S))
    assert green == "y⏎\nz<|im_end|>"
