"""Ids and loss masks against transformers' own, on published templates, real rows and a real tokenizer."""
import importlib.util
import json
import os
import re
from pathlib import Path

import pytest
from test_tokenizers import CHAT, GENERATION, SYSTEM, TOOLS, hf, templates

from ascend_nb import templates as room
from ascend_nb.answers import Reader
from ascend_nb.core import UserError
from ascend_nb.prompt_types import PROMPT_TYPES, get_prompt_type, jinja_of, load_prompt_types
from ascend_nb.templates import encode_pairs, encode_prompt, encode_sft, encode_sft_many, pick_template, prompt_name, show_tokens
from ascend_nb.tokenizers import load_tokenizer
from ascend_nb.turns import Pair, Record, chat

# what each published template makes of an answer and of the last one, read off the templates by eye. Without an end-of-turn token the line
# break behind an answer is all that ends it; in chatqa and falcon it belongs to the next question, but not where a token holds both (".\n\n")
ANSWERS = {
    "alpaca": "{}</s>", "amberchat": " {}\n", "chatml": "{}<|im_end|>", "chatqa": (" {}\n\n", " {}"), "falcon-instruct": (" {}\n\n", " {}"),
    "gemma-it": "{}<end_of_turn>", "granite-3.0-instruct": "{}<|end_of_text|>", "llama-2-chat": " {} </s>", "llama-3-instruct": "{}<|eot_id|>",
    "mistral-instruct": " {}</s>", "openchat-3.5": " {}<|end_of_turn|>", "phi-3-small": "{}<|end|>", "phi-3": "{}<|end|>",
    "qwen2.5-instruct": "{}<|im_end|>", "saiga": "{}</s>", "solar-instruct": "{}\n\n", "vicuna": " {}</s>", "zephyr": "{}</s>"}
MARKS = ["<|eot_id|>", "<|start_header_id|>", "<|end_header_id|>", "<start_of_turn>", "<end_of_turn>", "<|end|>", "<|user|>", "<|assistant|>", "<|system|>",
         "<|end_of_turn|>", "<|end_of_text|>", "<|start_of_role|>", "<|end_of_role|>", "<|observation|>", "[gMASK]", "sop", "<sop>",
         "<｜User｜>", "<｜Assistant｜>", "<reserved_106>", "<reserved_107>"]


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


def incremental(theirs, messages, template, tools=None, **kw):
    """The definition of the mask, without our code: an answer is what transformers' rendering gains by it, without what the prompt gave and
    without line breaks behind an end-of-turn token; a token that overlaps it is learned. None: the template rewrites what it wrote."""
    def text_of(said, prompt=False):
        return theirs.apply_chat_template(said, tools=tools, chat_template=template, tokenize=False, add_generation_prompt=prompt, **kw)
    text, spans, special = text_of(messages), [], tuple(t.content for t in theirs.added_tokens_decoder.values() if t.special)
    for i in (i for i, m in enumerate(messages) if m["role"] == "assistant"):
        before, upto = text_of(messages[:i], True), text_of(messages[:i + 1])
        if not text.startswith(upto): return None
        a = len(os.path.commonprefix([text, before]))
        bare = upto[a:].rstrip()
        spans.append((a, a + (len(bare) if bare.endswith(special) else len(upto) - a)))
    where = theirs(text, add_special_tokens=False, return_offsets_mapping=True)["offset_mapping"]
    return [int(any(s < b and e > a for a, b in spans)) for s, e in where]


def alpaca_rows(shared_data, name, n):
    "Real rows as chats, with their history."
    rows = [r for r in json.loads((shared_data / "instruct" / name).read_text(encoding="utf-8")) if r["instruction"] and r["output"]][:n]
    return [chat([*(r.get("history") or []), ("\n".join(filter(None, (r["instruction"], r.get("input")))), r["output"])]) for r in rows]


def tool_rows(shared_data, n, lang="en"):
    "Real chats with calls of tools; the file is read here, not by a handler."
    records, roles = [], dict(human="user", gpt="assistant", observation="tool")
    for row in json.loads((shared_data / "instruct" / f"glaive_toolcall_{lang}_demo.json").read_text(encoding="utf-8"))[:n]:
        said = []
        for turn in row["conversations"]:
            if turn["from"] != "function_call": said.append(dict(role=roles[turn["from"]], content=turn["value"])); continue
            calls = json.loads(turn["value"])
            calls = [dict(type="function", function=c) for c in (calls if isinstance(calls, list) else [calls])]
            said.append(dict(role="assistant", content="", tool_calls=calls))
        records.append(Record(said, [dict(type="function", function=t) for t in json.loads(row["tools"] or "[]")] or None))
    return records


@pytest.mark.parametrize("file", templates(), ids=lambda p: p.stem if p else "none")
def test_published_templates_on_real_rows(file, shared_data, ends, ends_hf):
    "Long chats in Chinese and English: transformers' ids, and the mask of its own prefix renders, by two renders a chat or fewer."
    ends.chat_template = template = published(file)
    records = alpaca_rows(shared_data, "oaast_sft_zh.json", 25) + alpaca_rows(shared_data, "alpaca_en_demo.json", 15)
    for record, got in zip(records, encode_sft_many(records, ends), strict=True):
        assert got.ids == ends_hf.apply_chat_template(record.messages, chat_template=template, return_dict=False)
        assert got.loss_mask == incremental(ends_hf, record.messages, template)


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
    if prompt == "cpm": ends.rust.add_special_tokens(["<用户>", "<AI>"])
    for answer in ("It is 4.", "\n4", " 4", "\n\n 4", "...4", "4"):
        for said in ([], SYSTEM):
            ask = said + CHAT[:1]
            tokens = encode_sft(Record([*ask, dict(role="assistant", content=answer)]), ends, prompt)
            ids = encode_prompt(ask, ends, prompt)
            assert tokens.ids[:len(ids)] == ids and tokens.loss_mask.index(1) == len(ids) and sum(tokens.loss_mask[:len(ids)]) == 0
    assert encode_prompt(CHAT[:3], ends) == ends.apply_chat(CHAT[:3], add_generation_prompt=True) and prompt_name(ends, prompt) == prompt
    ends.templates = {}
    assert prompt_name(ends) == "alpaca" and encode_prompt(CHAT[:1], ends) == encode_prompt(CHAT[:1], ends, "alpaca")


def trl(name):
    "A chat template as it was published with its model; the package trl carries copies."
    spec = importlib.util.find_spec("trl")
    file = spec and Path(spec.submodule_search_locations[0]) / "chat_templates" / f"{name}.jinja"
    if not file or not file.is_file(): pytest.skip("trl, which carries published chat templates, is not installed")
    return file.read_text(encoding="utf-8")


FAMILIES = { # prompt type -> where its family's own template is, and what that one has more or less
    "qwen3": ("qwen2 tokenizer", {}), "chatml": ("chatml", dict(bos_token="")), "llama2": ("llama-2-chat", {}), "mistral": ("mistral-instruct", {}),
    "mixtral": ("mistral-instruct", {}), "gemma": ("gemma-it", {}), "llama3": ("llama-3-instruct", {}), "intern2": ("chatml", {}),
    "qwen": ("chatml", dict(bos_token=""))}


@pytest.mark.parametrize("name", FAMILIES)
def test_prompt_types_are_their_families(name, shared_data, ends, ends_hf, qwen):
    "The text, the ids and the mask of the template that the family published, on real rows with and without a system message."
    where, kw = FAMILIES[name]
    template = load_tokenizer(qwen).chat_template if name == "qwen3" else published(shared_data / "chat_templates" / f"{where}.jinja")
    if name == "gemma": template = "{{ bos_token }}" + template # the collection leaves it to the tokenizer
    for record in alpaca_rows(shared_data, "oaast_sft_zh.json", 12) + alpaca_rows(shared_data, "alpaca_zh_demo.json", 8):
        said = [{**m, "content": m["content"].strip()} for m in record.messages] # ChatML's copy in the collection trims, others do not
        for messages in (said, SYSTEM + said):
            if name == "qwen" and messages is said: continue # its default system text is ModelLink's
            got, want = encode_sft(Record(messages), ends, name), ends_hf.apply_chat_template(messages, chat_template=template, return_dict=False, **kw)
            assert got.ids == want
            mask = incremental(ends_hf, messages, template, **kw)
            if mask is None: assert name == "qwen3"; ends.chat_template = template; mask = encode_sft(Record(messages), ends).loss_mask
            assert got.loss_mask == mask
        assert encode_prompt(said[:-1], ends, name) == ends_hf.apply_chat_template(said[:-1], chat_template=template, add_generation_prompt=True, return_dict=False, **kw) or name == "qwen"


@pytest.mark.parametrize("name, file", [("qwen3", "qwen3"), ("llama3", "llama3"), ("gemma", "gemma"), ("deepseek3", "deepseekv3"), ("qwen3", "qwen3_training"),
                                        ("llama3", "llama3_training"), ("gemma", "gemma_training")])
def test_prompt_types_are_those_of_the_hub(name, file, shared_data, ends, ends_hf):
    "Ids of the published template; where trl marks its answers, its mask too, but for the line break behind an end-of-turn token."
    template = trl(file).replace("<｜end▁of▁sentence｜>", "</s>") # the eos of this tokenizer
    for record in alpaca_rows(shared_data, "oaast_sft_zh.json", 20):
        if file == "qwen3_training": record.messages = record.messages[-2:] # there every answer has a thought, in Qwen's own only the last
        want = ends_hf.apply_chat_template(record.messages, chat_template=template, return_dict=True, return_assistant_tokens_mask="training" in file)
        got = encode_sft(record, ends, name)
        assert got.ids == want["input_ids"]
        if "training" in file:
            extra = [i for i, (a, b) in enumerate(zip(got.loss_mask, want["assistant_masks"], strict=True)) if a != b]
            assert all(ends.decode([got.ids[i]]) == "\n" and want["assistant_masks"][i] for i in extra) and len(extra) <= len(record.messages) // 2


@pytest.fixture(scope="module")
def hub(qwen, tmp_path_factory):
    "The templates that trl carries, and the real vocabulary with all their special tokens: (files, our tokenizer, transformers')."
    trl("qwen3")
    files = sorted(Path(importlib.util.find_spec("trl").submodule_search_locations[0], "chat_templates").glob("*.jinja"))
    marks = {m for f in files for m in re.findall(r"<[|｜][^<>|｜\s]+[|｜]>|<(?:start|end)_of_turn>|<\|[a-z_]+>|<[a-z_]+\|>", f.read_text(encoding="utf-8"))}
    folder = tmp_path_factory.mktemp("hub")
    (folder / "tokenizer.json").symlink_to(qwen / "tokenizer.json")
    (folder / "tokenizer_config.json").write_text(json.dumps(dict(tokenizer_class="PreTrainedTokenizerFast", bos_token="<s>", eos_token="</s>", extra_special_tokens=sorted(marks))))
    return files, load_tokenizer(folder), hf(folder)


def test_every_template_of_the_hub(hub):
    "Every published and every marked template that trl carries: ids and mask are transformers'; where one template refuses or loses something, so do we."
    files, ends, ends_hf = hub
    thought = [dict(role="user", content="q1"), dict(role="assistant", content="<think>\nhm\n</think>\n\na1"), *CHAT[2:]]
    call = [CHAT[0], dict(role="assistant", content="", tool_calls=[dict(type="function", function=dict(name="add", arguments=dict(a=2, b="数")))]),
            dict(role="tool", content='{"sum": 4}', name="add"), CHAT[1]]
    count = dict(marked=0, plain=0, rewriting=0, lost=0)
    for file in files:
        ends.chat_template = template = file.read_text(encoding="utf-8")
        marked = bool(re.search(r"{%-?\s*generation", template))
        for messages, tools in ((CHAT, None), (SYSTEM + CHAT, None), (CHAT[:2], None), (thought, None), (call, TOOLS), (CHAT, TOOLS)):
            try: want = ends_hf.apply_chat_template(messages, tools=tools, chat_template=template, return_dict=True, return_assistant_tokens_mask=marked)
            except Exception: want = None
            try: got = encode_sft(Record(messages, tools), ends)
            except UserError as e: assert want is None or "does not write" in str(e); count["lost"] += 1; continue
            if want is None: assert messages is call; continue # arguments as text, which we try as well
            if got.ids != want["input_ids"]: # "<think>\n" was promised, and the template's own "\n\n" would reach across
                assert learned(got, ends)[-1].startswith("\n</think>\n\n") and ends.decode(got.ids, False) == ends.decode(want["input_ids"], False)
                continue
            mask = want["assistant_masks"] if marked else incremental(ends_hf, messages, template, tools)
            count["marked" if marked else "plain" if mask else "rewriting"] += 1
            assert mask is None or got.loss_mask == mask, file.name
    assert count["marked"] > 150 and count["plain"] > 120 and count["rewriting"] > 20, count


@pytest.mark.parametrize("name, text", [
    ("alpaca", "Below is an instruction that describes a task. Write a response that appropriately completes the request.\n\n"
               "### Instruction:\nq1\n\n### Response:\na1</s>\n\n### Instruction:\nq2\n\n### Response:\na2</s>"),
    ("default", "Human: q1\nAssistant:a1</s>\nHuman: q2\nAssistant:a2</s>"), ("empty", "q1a1q2a2"), ("trl", "<s>q1a1q2a2"),
    ("deepseek2", "<s>User: q1\n\nAssistant: a1</s>User: q2\n\nAssistant: a2</s>"), ("baichuan2", "<reserved_106>q1<reserved_107>a1<reserved_106>q2<reserved_107>a2</s>"),
    ("glm4", "[gMASK]<sop><|user|>\nq1<|assistant|>\na1<|user|>\nq2<|assistant|>\na2</s>"),
    ("chatglm2", "[gMASK]sop[Round 1]\n\n问：q1\n\n答：a1\n\n[Round 2]\n\n问：q2\n\n答：a2</s>")])
def test_prompt_types(name, text, ends, ends_hf):
    "The text, the same for transformers; learned are the answers and what ends them."
    rec = chat([("q1", "a1"), ("q2", "a2")])
    template = pick_template(ends, name)
    assert ends.render_chat(rec.messages, chat_template=template) == text == ends_hf.apply_chat_template(rec.messages, chat_template=template, tokenize=False)
    p, tokens = PROMPT_TYPES[name], encode_sft(rec, ends, name)
    assert ends.decode(tokens.ids, False) == text and (tokens.ids == ends.encode(text) or name == "default") # there ":a" would reach across
    ends_with = [t for t in ("</s>",) if "{{eos_token}}" in p.answer] or ([{"glm4": "<|user|>", "chatglm2": "\n\n", "baichuan2": "<reserved_106>"}[name], "</s>"] if p.efficient_eos else [""])
    assert [t.strip(" \n") for t in learned(tokens, ends)] == [("a1" + ends_with[0]).strip(), "a2" + ends_with[-1]]
    if p.efficient_eos: # ModelLink: the eos is the label where the next question begins, and stands behind the last answer
        at = [i for i, (a, b) in enumerate(zip(tokens.ids, tokens.labels, strict=True)) if b not in (-100, a)]
        assert [ends.decode([i]) for i in tokens.labels[at]] == [""] and tokens.labels[at[0]] == ends.eos_token_id == tokens.ids[-1] and len(at) == 1
        assert ends.decode(tokens.ids[:at[0]], False).endswith("a1")
    with_system = ends.render_chat(chat([("q1", "a1")], "S'\"{}\\").messages, chat_template=template)
    assert with_system.count("S'\"{}\\") == 1 and "Below" not in with_system
    assert ends.render_chat(rec.messages[:3], add_generation_prompt=True, chat_template=template) == text[:text.rindex(PROMPT_TYPES[name].answer.split("{{content}}")[0] + "a2")]


def by_slots(entry, pairs, bos, eos):
    "ModelLink's assembly of slots, for a plain chat: prefix, system, then question and answer by turns, a separator before each later question."
    def fill(slots, content=""): return "".join(s.replace("{{content}}", content) if isinstance(s, str) else s["token"] if isinstance(s, dict) else {"bos_token": bos, "eos_token": eos}[s[0]] for s in slots)
    def part(key, default): return (entry.get(f"format_{key}") or {}).get("slots", default)
    if entry.get("replace_eos"): eos = entry["stop_words"][0]
    answer = part("assistant", ["{{content}}"] + [["eos_token"]] * (not entry.get("efficient_eos")))
    system = fill(part("system", ["{{content}}"]), entry["default_system"]) if entry.get("default_system") else ""
    merged = entry.get("template_class") == "Llama2Template"
    text = fill(part("prefix", [])) + system * (not merged)
    for i, (q, a) in enumerate(pairs):
        text += fill(part("separator", [])) * bool(i) + fill(part("user", None), system * (merged and not i) + q) + fill(answer, a)
    return text + eos * bool(entry.get("efficient_eos"))


MODELLINK = [ # in the form of ModelLink's templates.json
    dict(name="pirate", format_user=dict(slots=[["bos_token"], "Sailor: {{content}}\nPirate:"]), format_separator=dict(slots=["\n"])),
    dict(name="glm", format_user=dict(slots=[dict(token="<|user|>"), "\n", "{{content}}", dict(token="<|assistant|>")]), format_assistant=dict(slots=["\n", "{{content}}"]),
         format_prefix=dict(slots=[dict(token="[gMASK]"), dict(token="sop")]), format_tools=dict(tool_format="glm4"), stop_words=["<|user|>", "<|observation|>"], efficient_eos=True,
         format_function=dict(slots=["{{name}}\n{{arguments}}"], tool_format="glm4"), format_observation=dict(slots=[dict(token="<|observation|>"), "\n{{content}}", dict(token="<|assistant|>")])),
    dict(name="chatml", format_user=dict(slots=["<|im_start|>user\n{{content}}<|im_end|>\n<|im_start|>assistant\n"]), format_separator=dict(slots=["\n"]),
         format_system=dict(slots=["<|im_start|>system\n{{content}}<|im_end|>\n"]), default_system=["Du bist ", "kurz."], stop_words=["<|im_end|>"], replace_eos=True, force_system=False),
    dict(name="two", format_user=dict(slots=[["bos_token"], "[INST] {{content}} [/INST]"]), format_system=dict(slots=["<<SYS>>\n{{content}}\n<</SYS>>\n\n"]),
         default_system="Arr.", template_class="Llama2Template"),
    dict(name="thinker", format_user=dict(slots=["<|im_start|>user\n{{content}}<|im_end|>\n<|im_start|>assistant\n"]), format_assistant=dict(slots=["{{content}}<|im_end|>\n"]),
         format_function=dict(slots=["{{content}}<|im_end|>\n"], tool_format="qwen"), format_tools=dict(tool_format="qwen"), stop_words=["<|im_end|>"],
         replace_eos=True, template_class="ReasoningTemplate"),
    dict(name="other", format_user=dict(slots=["{{content}}"]), template_class="DeepSeek4Template")]


def test_modellinks_own_file(ends, tmp_path):
    "templates.json as it is: the text is that of its slots; one entry that we cannot read does not spoil the others."
    file = tmp_path / "templates.json"
    file.write_text(json.dumps(MODELLINK, ensure_ascii=False), encoding="utf-8")
    types, pairs = load_prompt_types(file), [("q1", "a1"), (" q2", "a2\n")]
    for entry in MODELLINK[:4]:
        entry = {**entry, "default_system": "".join(entry.get("default_system", ""))}
        got = encode_sft(chat(pairs), ends, entry["name"], prompt_types=types)
        assert ends.decode(got.ids, False) == by_slots(entry, pairs, "<s>", "</s>"), entry["name"]
    assert get_prompt_type("chatml", types) is types["chatml"] and types["thinker"].thinking and get_prompt_type("qwen", types) is PROMPT_TYPES["qwen"]
    assert {"[gMASK]", "sop"} < {*types["glm"].required} and types["glm"].call == "{{name}}\n{{arguments}}"
    with pytest.raises(UserError, match="template_class DeepSeek4Template"): types["other"]
    with pytest.raises(UserError, match="Did you mean pirate"): encode_sft(chat(pairs), ends, "pirat", prompt_types=types)
    assert len(PROMPT_TYPES) == 28 and all(PROMPT_TYPES[n].jinja for n in PROMPT_TYPES)


@pytest.mark.parametrize("text, says", [("a: [", "cannot be read"), ("- x", "found list"), ("a: {user: 'Q'}", "would be lost"), ("a: {user: 'Q {{text}}'}", "Found {{text}}"),
                                        ("a: {user: 3}", "expected text"), ("a: {thinking: 'yes'}", "expected true or false"), ("a: {like: chatmll}", "Did you mean chatml"),
                                        ("a: {tool_format: qwin}", "Did you mean qwen"), ("a: {users: x}", "the key users"), ("", "found NoneType"),
                                        ("a: {like: b}\nb: {like: c}\nc: {like: b}", "like going round: a → b → c → b"), ("a: {like: a}", "Found like='a'"), ("a: {like: 5}", "Found like=5"),
                                        ("b: 5\na: {like: chatml}", "the entry b is a int"), ("5: {user: x}", "the entry 5 is a dict"), ("a: {5: x}", "the key 5"), ("a: {stop_words: end}", "expected a list of texts"),
                                        ("a: {stop_words: [1]}", "expected a list of texts"), ("a: {needs: 5}", "expected a list of texts"), ("a: {user: [{tok: x}]}", "expected text, or a list of texts"),
                                        ("a: {user: [5]}", "expected text, or a list of texts"), ("a: {user: [[]]}", "expected text, or a list"), ("a: {user: {slots: 5}}", "expected text, or a list"),
                                        ("a: {user: '{{content}}', replace_eos: true}", "replace_eos without stop_words"), ("a: {tool_format: x}\ntool_formats: {x: 5}", "expected a mapping"),
                                        ("tool_formats: 5", "the entry tool_formats is a int"), ("a: {template_class: [x]}", "template_class x"), ("a: {tool_format: [x]}", "tool_format='x'"),
                                        ("[" * 3000, "cannot be read"), ("a: !!python/name:os.system x", "cannot be read"), ("{}", "found dict"), ("- {name: a}\n- {user: x}", "item 2 has no name")])
def test_prompt_type_files_that_are_wrong(text, says, tmp_path, ends):
    (tmp_path / "p.yaml").write_text(text)
    with pytest.raises(UserError, match=re.escape(says)): encode_sft(chat([("q", "a")]), ends, "a", prompt_types=load_prompt_types(tmp_path / "p.yaml"))


@pytest.mark.parametrize("lang", ["en", "zh"])
def test_prompt_type_paths_that_are_wrong(lang, tmp_path, monkeypatch):
    "A folder, a cut JSON file, bytes that are no text, nothing: a sentence in the reader's language."
    monkeypatch.setenv("ASCEND_NB_LANG", lang)
    (tmp_path / "cut.json").write_text('[{"name": ')
    (tmp_path / "gb.yaml").write_bytes("坏: {user: x}".encode("gb18030"))
    zh = lang == "zh"
    for name, says in ((".", "这是一个目录" if zh else "it is a folder"), ("cut.json", "Expecting value"), ("gb.yaml", "utf-8"), ("none.yaml", "prompt type 文件" if zh else "a file of prompt types")):
        with pytest.raises(UserError, match=says) as e: load_prompt_types(tmp_path / name)
        assert zh == bool(re.search("[\u4e00-\u9fff]", str(e.value).replace("坏", ""))), e.value


ODD = [None, 5, True, "x", "", [], {}, [5], [[]], [{}], ["bos_token"], [["bos_token"]], [{"token": 5}], {"slots": 5}, {"slots": [[5]]}, {"slots": ["x"], "tool_format": 7}, {"tool_format": ["qwen"]}, 1.5]


def test_any_file_of_prompt_types_is_one_or_a_sentence(tmp_path):
    "Whatever stands in a file: prompt types whose template compiles, or UserError."
    import random

    from ascend_nb.answers import noted_template
    rng, made = random.Random(0), 0
    keys = ["user", "format_user", "assistant", "system", "function", "observation", "prefix", "separator", "default_system", "stop_words", "efficient_eos", "replace_eos", "merge_system", "thinking",
            "trim", "call", "tools", "between", "needs", "like", "tool_format", "template_class", "format_tools", "force_system", "odd"]
    for _ in range(800):
        entry = {k: rng.choice([*ODD, "chatml", "{{content}}", ["x"]]) for k in rng.sample(keys, rng.randint(0, 4))}
        d = rng.choice([{"a": entry, "b": {"like": "a"}}, [{"name": "a", **entry}, {"name": "b", "like": "a"}], {"a": entry, "b": rng.choice(ODD)}, {"a": entry, "tool_formats": rng.choice(ODD)}])
        (tmp_path / "p.json").write_text(json.dumps(d))
        try:
            types = load_prompt_types(tmp_path / "p.json")
            for name in ("a", "b"): noted_template(types[name].jinja); made += 1
        except UserError: pass
        except KeyError as e: assert e.args == ("b",)
    assert made > 50


def test_missing_vocabulary_is_named(qwen, tmp_path):
    with pytest.raises(UserError, match="Found no '.gMASK.' in the vocabulary.*prompt type glm4") as e: encode_sft(chat([("q", "a")]), load_tokenizer(qwen), "glm4")
    assert "qwen3" in str(e.value) and "baichuan2" not in str(e.value)
    with pytest.raises(UserError, match="Found nothing at"): load_prompt_types(tmp_path / "none.yaml")


@pytest.mark.parametrize("lang", ["en", "zh"])
def test_real_tool_calls_by_the_tokenizers_template(lang, qwen, shared_data):
    "Calls, results and tools of real chats through Qwen's own template: transformers' ids; learned is what the assistant says or calls, no result."
    tok, theirs = load_tokenizer(qwen), hf(qwen)
    records = tool_rows(shared_data, 60, lang)
    assert sum(bool(m.get("tool_calls")) for r in records for m in r.messages) > 40
    for record, got in zip(records, encode_sft_many(records, tok), strict=True):
        assert got.ids == theirs.apply_chat_template(record.messages, tools=record.tools, return_dict=False)
        spoken = [m for m in record.messages if m["role"] == "assistant"]
        parts = learned(got, tok)
        assert len(parts) == len(spoken)
        for part, m in zip(parts, spoken, strict=True):
            called = [c["function"] for c in m.get("tool_calls") or []]
            calls = "\n".join(f'<tool_call>\n{{"name": "{c["name"]}", "arguments": {json.dumps(c["arguments"], ensure_ascii=False)}}}\n</tool_call>' for c in called)
            thoughtful = part.startswith("<think>\n\n</think>\n\n") # the last answer
            assert part.removeprefix("<think>\n\n</think>\n\n") == (calls or (m["content"].lstrip("\n") if thoughtful else m["content"])) + "<|im_end|>"


@pytest.mark.parametrize("name", ["qwen3", "glm4", "default", "chatglm3", "llama3", "gemma"])
def test_real_tool_calls_by_prompt_types(name, ends, qwen, shared_data):
    "Every call is learned, no result is, tools are listed and not learned. qwen3 is Qwen's own template to the id."
    own = load_tokenizer(qwen).chat_template
    for record in tool_rows(shared_data, 25) + tool_rows(shared_data, 25, "zh"):
        got = encode_sft(record, ends, name)
        text, said = ends.decode(got.ids, False), "".join(learned(got, ends))
        for m in record.messages:
            for c in m.get("tool_calls") or []: assert c["function"]["name"] in said and json.dumps(c["function"]["arguments"], ensure_ascii=False) in said
            assert m["content"].strip() in text and (m["role"] != "tool" or len(m["content"]) < 30 or m["content"] not in said)
        for t in record.tools or []: assert t["function"]["description"] in text
        if name == "qwen3":
            ends.chat_template = own
            assert got == encode_sft(record, ends)


def test_results_in_a_row_and_calls_with_words(ends, ends_hf, qwen):
    "Two calls in one answer, two results: Qwen's template joins the results in one turn, and so does the prompt type."
    calls = [dict(type="function", function=dict(name=n, arguments=dict(x=1))) for n in ("f", "g")]
    said = [CHAT[0], dict(role="assistant", content="Let me see.", tool_calls=calls), dict(role="tool", content="1"), dict(role="tool", content="2"), CHAT[1], *CHAT[2:]]
    own = load_tokenizer(qwen).chat_template
    got = encode_sft(Record(said, TOOLS), ends, "qwen3")
    assert got.ids == ends_hf.apply_chat_template(said, tools=TOOLS, chat_template=own, return_dict=False)
    assert "1\n</tool_response>\n<tool_response>\n2" in ends.decode(got.ids, False)
    plain = [{k: v for k, v in m.items() if k != "tool_calls"} for m in said]
    spelled = [{**m, "tool_calls": [dict(type="function", function=dict(name=c["function"]["name"], arguments=json.dumps(c["function"]["arguments"]))) for c in m["tool_calls"]]} if "tool_calls" in m else m for m in said]
    assert encode_sft(Record(spelled, TOOLS), ends, "qwen3") == got != encode_sft(Record(plain, TOOLS), ends, "qwen3")
    assert encode_sft(Record(said, [t["function"] for t in TOOLS]), ends, "default").ids == encode_sft(Record(said, TOOLS), ends, "default").ids


def test_what_a_template_does_not_write_is_an_error(ends, shared_data):
    "A template without tools would teach an empty answer."
    ends.chat_template = published(shared_data / "chat_templates" / "llama-3-instruct.jinja")
    call = dict(role="assistant", content="", tool_calls=[dict(type="function", function=dict(name="add", arguments={}))])
    with pytest.raises(UserError, match="does not write the call of 'add'"): encode_sft(Record([CHAT[0], call]), ends)
    ends.chat_template = "{% for m in messages if m.role != 'tool' %}{{ m.role }}: {{ m.content }}\n{% endfor %}"
    with pytest.raises(UserError, match="does not write what a tool returned"): encode_sft(Record([*CHAT[:2], dict(role="tool", content="21.5"), CHAT[3]]), ends)
    ends.chat_template = "{% for m in messages %}{{ m.role }}: {{ m.content.split('</think>')[-1] }}\n{% endfor %}"
    thought = [CHAT[0], dict(role="assistant", content="4", reasoning_content="two and two")]
    with pytest.raises(UserError, match="does not write the thought"): encode_sft(Record(thought), ends)
    assert learned(encode_sft(Record(thought), ends, enable_thinking="false"), ends) == ["assistant: 4\n"]


@pytest.mark.parametrize("name", [None, "qwen3", "chatml", "default"])
def test_an_answer_that_only_thinks(name, ends, qwen):
    "The thought is learned; where thoughts are left out there is nothing to learn, and that is said."
    ends.chat_template = load_tokenizer(qwen).chat_template
    for m in (dict(role="assistant", content="", reasoning_content="hm"), dict(role="assistant", content="<think>\nhm\n</think>")):
        record = Record([CHAT[0], m])
        assert "<think>\nhm\n</think>" in learned(encode_sft(record, ends, name), ends)[0]
        with pytest.raises(UserError, match="nothing but a thought"): encode_sft(record, ends, name, enable_thinking="false")
    call = [dict(type="function", function=dict(name="f", arguments=dict(x=1)))]
    said = [CHAT[0], dict(role="assistant", content="", reasoning_content="hm", tool_calls=call), dict(role="tool", content="4"), dict(role="assistant", content="4")]
    if name != "chatml": assert '"x": 1' in "".join(learned(encode_sft(Record(said, TOOLS), ends, name, enable_thinking="false"), ends)), "a call is something to learn"


THOUGHT = [dict(role="user", content="q1"), dict(role="assistant", content="a1", reasoning_content="hm 1"),
           dict(role="user", content="q2"), dict(role="assistant", content="<think>\nhm 2\n</think>\n\na2")]


@pytest.mark.parametrize("name", [None, "qwen3", "chatml"])
def test_thoughts(name, ends, qwen):
    "none, true, false: through Qwen's own template, the prompt type, and one that knows no thoughts."
    ends.chat_template = load_tokenizer(qwen).chat_template
    think, empty = "<think>\nhm {}\n</think>\n\n", "<think>\n\n</think>\n\n"
    def told(said, mode): return [t.removesuffix("<|im_end|>") for t in learned(encode_sft(Record(said), ends, name, enable_thinking=mode), ends)]
    plain = chat([("q1", "a1"), ("q2", "a2")]).messages
    knows = name != "chatml"
    for mode in ("none", "true"): assert told(THOUGHT, mode) == (["a1", think.format(2) + "a2"] if knows else [think.format(1) + "a1", think.format(2) + "a2"])
    assert told(plain, "none") == (["a1", empty + "a2"] if knows else ["a1", "a2"])
    assert told(plain, "true") == (["a1", empty + "a2"] if knows else [empty + "a1", empty + "a2"])
    for said in (THOUGHT, plain): assert told(said, "false") == ["a1", "a2"]
    prompt = encode_prompt(THOUGHT[:3], ends, name, enable_thinking="false")
    tokens = encode_sft(Record(THOUGHT), ends, name, enable_thinking="false")
    assert tokens.ids[:len(prompt)] == prompt and ends.decode(prompt, False).endswith("<|im_start|>assistant\n" + empty * knows)
    with pytest.raises(UserError, match="enable_thinking"): encode_sft(Record(plain), ends, enable_thinking="yes")


def test_which_answers_are_learned(ends):
    "mask_history, and loss False on an answer: the ids stay, the mask goes."
    ends.chat_template = GENERATION
    said = [*CHAT, *CHAT[:2]]
    whole = encode_sft(Record(said), ends)
    for name in (None, "chatml", "glm4"):
        whole, last = encode_sft(Record(said), ends, name), encode_sft(Record(said), ends, name, mask_history=True)
        some = encode_sft(Record([*said[:3], {**said[3], "loss": False}, *said[4:]]), ends, name)
        assert last.ids == some.ids == whole.ids and len(learned(whole, ends)) == 3 and len(learned(last, ends)) == 1
        assert learned(last, ends)[0] == learned(whole, ends)[2] and [learned(whole, ends)[i] for i in (0, 2)] == learned(some, ends)
        assert len(last.swaps) == 0 and len(some.swaps) == (1 if name == "glm4" else 0)
    with pytest.raises(UserError, match="marked as not learned"): encode_sft(Record([*said[:1], {**said[1], "loss": False}]), ends)


def test_pairs(qwen, shared_data):
    "Real pairs: the same prompt on both sides, the ids of encode_prompt; the last answer alone is learned."
    tok = load_tokenizer(qwen)
    rows = [r for r in json.loads((shared_data / "instruct" / "oaast_rm_zh.json").read_text(encoding="utf-8")) if all(r["output"][:2])][:60]
    pairs = [Pair(*(chat([*r["history"], (r["instruction"], answer)]) for answer in r["output"][:2])) for r in rows]
    for pair, (good, bad) in zip(pairs, encode_pairs(pairs, tok), strict=True):
        prompt = encode_prompt(pair.chosen.messages[:-1], tok)
        for tokens, record in ((good, pair.chosen), (bad, pair.rejected)):
            assert tokens.ids[:len(prompt)] == prompt and not any(tokens.loss_mask[:len(prompt)]) and tokens.ids == tok.apply_chat(record.messages)
            assert learned(tokens, tok) == ["<think>\n\n</think>\n\n" + record.messages[-1]["content"].lstrip("\n") + "<|im_end|>"]
    odd = Pair(pairs[0].chosen, Record(pairs[0].rejected.messages[:-1]))
    got = encode_pairs([pairs[0], odd], tok, errors="return")
    assert isinstance(got[0], tuple) and isinstance(got[1], UserError)


def test_errors_of_single_chats(ends):
    "A bad chat costs its own place, whatever is bad about it; a template that fits none of them is raised at once."
    ends.chat_template = GENERATION
    good = Record(CHAT)
    bads = [Record(CHAT[:1]), Record([dict(role="assistant", content=3)]), Record([CHAT[0], dict(role="assistant", content="a\ud800")]), Record([]),
            Record([CHAT[0], CHAT[0], CHAT[1]]), Record([CHAT[1], CHAT[0]])]
    got = encode_sft_many([bads[0], good, *bads[1:], good], ends, "chatml", errors="return")
    assert [isinstance(g, UserError) for g in got] == [True, False] + [True] * 5 + [False] and got[1] == got[-1] == encode_sft(good, ends, "chatml")
    assert "half a character" in str(got[3]) and "a question where an answer is due" in str(got[5])
    with pytest.raises(UserError, match="prompt_type='x'"): encode_sft_many([good], ends, "x", errors="return")
    ends.chat_template = "{% for %}"
    with pytest.raises(UserError, match="broken"): encode_sft_many([good], ends, errors="return")


def test_the_short_way_is_the_long_way(qwen, shared_data, monkeypatch):
    "Masks from the few looked-up places equal those from looking at every token, on real chats."
    tok = load_tokenizer(qwen)
    records = alpaca_rows(shared_data, "oaast_sft_zh.json", 150) + tool_rows(shared_data, 40)
    for name in (None, "default", "empty", "chatml"):
        quick = encode_sft_many(records, tok, name)
        with monkeypatch.context() as m:
            m.setattr(room, "_cover", lambda *a: None)
            assert encode_sft_many(records, tok, name) == quick


def test_few_renders(ends, shared_data, monkeypatch):
    "A chat costs one render, its header one for all."
    count = []
    render = Reader.render
    monkeypatch.setattr(Reader, "render", lambda *a, **k: count.append(1) or render(*a, **k))
    records = alpaca_rows(shared_data, "oaast_sft_zh.json", 50)
    for stem in ("llama-3-instruct", "gemma-it", "zephyr", "qwen2.5-instruct"):
        ends.chat_template, count[:] = published(shared_data / "chat_templates" / f"{stem}.jinja"), []
        encode_sft_many(records, ends)
        assert len(count) == len(records) + 1


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
    ("{{ messages | length }}{% for i in range(messages | length) %}{{ messages[i].content }}{% endfor %}", CHAT, "cannot be found"),
    ("{{ messages | map(attribute='content') | reverse | join('|') }}", CHAT, "cannot be found")])
def test_what_cannot_be_learned_is_an_error(template, messages, says, ends):
    ends.chat_template = template
    with pytest.raises(UserError, match=says): encode_sft(Record(messages), ends)


def test_view(ends):
    ends.chat_template = GENERATION
    view = show_tokens(encode_sft(Record([dict(role="user", content="<b>"), dict(role="assistant", content="y\nz")]), ends), ends)
    assert "&lt;" in view._repr_html_() and "<b>" not in view._repr_html_()
    green = "".join(re.findall(r"\x1b\[32m(.*?)\x1b\[0m", str(view), re.S))
    assert green == "y⏎\nz<|im_end|>"
