"""Which tokens a step of `train` learns, taken from the loss while it runs: transformers' own mask of answers, in every turn or the last one, calls of tools among them."""
import json
import re

import pytest
import yaml
from transformers import AutoTokenizer

from ascend_nb import cli, stages
from ascend_nb.hf_format import save_model
from ascend_nb.model import Decoder
from ascend_nb.shapes import ModelConfig
from ascend_nb.tokenizers import load_tokenizer

MARKED = ("{% if tools %}<|im_start|>system\n{% for t in tools %}{{ t | tojson }}\n{% endfor %}<|im_end|>\n{% endif %}{% for m in messages %}{{ '<|im_start|>' + m['role'] + '\n' }}"
          "{% if m['role'] == 'assistant' %}{% generation %}{% if m.tool_calls %}{% for c in m.tool_calls %}{{ '<call>' + (c.function | tojson) + '</call>' }}{% endfor %}"
          "{% else %}{{ m['content'] }}{% endif %}{{ '<|im_end|>' }}{% endgeneration %}{% else %}{{ m['content'] + '<|im_end|>' }}{% endif %}{{ '\n' }}{% endfor %}"
          "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}")
ROLES = dict(human="user", gpt="assistant", observation="tool", function_call="assistant")
TOOL = dict(name="add", description="Adds two numbers", parameters=dict(type="object", properties=dict(a=dict(type="number"), b=dict(type="number"))))
CALL = dict(name="add", arguments=dict(a=2, b=3))
ROWS = [
    dict(conversations=[{"from": "human", "value": "Who lives in the mill?"}, {"from": "gpt", "value": "A miller."}, {"from": "human", "value": "And who else?"}, {"from": "gpt", "value": "His cat, and seven mice."}], tools=""),
    dict(conversations=[{"from": "human", "value": "Tell me of the sea."}, {"from": "gpt", "value": "The sea is wide. It was there before the tales, and it is there now."}], tools=""),
    dict(conversations=[{"from": "human", "value": "What is two and three?"}, {"from": "function_call", "value": json.dumps(CALL)}, {"from": "observation", "value": "5"},
                        {"from": "gpt", "value": "It is five."}, {"from": "human", "value": "Thank you."}, {"from": "gpt", "value": "You are welcome."}], tools=json.dumps([TOOL])),
    dict(conversations=[{"from": "human", "value": "Good day"}, {"from": "gpt", "value": "Good day to you."}] * 3, tools=""),
]


@pytest.fixture(scope="module")
def home(tmp_path_factory, samples):
    "A tokenizer whose template knows tools, a base model, and the rows as a file; transformers' tokenizer beside them."
    out = tmp_path_factory.mktemp("home")
    for f in (samples / "tokenizer").iterdir(): (out / f.name).write_bytes(f.read_bytes())
    conf = json.loads((out / "tokenizer_config.json").read_text())
    (out / "tokenizer_config.json").write_text(json.dumps(conf | dict(chat_template=re.sub(r"{% (end)?generation %}", "", MARKED))))
    tok = load_tokenizer(out)
    save_model(Decoder(ModelConfig(vocab_size=tok.vocab_size, hidden_size=32, num_hidden_layers=1, num_attention_heads=2, num_key_value_heads=1, max_position_embeddings=512, eos_token_id=[tok.eos_token_id])).init_weights(1), out / "base", tok)
    (out / "rows.json").write_text(json.dumps(ROWS))
    return out, AutoTokenizer.from_pretrained(out)


def wanted(theirs, last_only):
    "Each chat's ids, and what should follow each of them where it is learned: transformers' ids and mask."
    out = []
    for row in ROWS:
        said = [dict(role=ROLES[t["from"]], content="" if t["from"] == "function_call" else t["value"], **(dict(tool_calls=[dict(type="function", function=json.loads(t["value"]))]) if t["from"] == "function_call" else {}))
                for t in row["conversations"]]
        tools = [dict(type="function", function=t) for t in json.loads(row["tools"])] if row["tools"] else None
        got = theirs.apply_chat_template(said, tools=tools, chat_template=MARKED, return_dict=True, return_assistant_tokens_mask=True)
        ids, mask = got["input_ids"], list(got["assistant_masks"])
        assert sum(1 for a, b in zip([0, *mask], mask, strict=False) if b > a) == sum(m["role"] == "assistant" for m in said)
        begin = max(i for i, m in enumerate(mask) if m and not mask[i - 1]) # of the last answer
        if last_only: mask[:begin] = [0] * begin
        out.append((ids, [t if m else -100 for t, m in zip(ids[1:], mask[1:], strict=True)] + [-100]))
    return sorted(out)


@pytest.mark.parametrize("last_only, packing, tune", [(False, False, dict(lora_target_modules=["all-linear"], lora_r=2)), (True, True, dict(lora_target_modules=["q_proj"], lora_r=2)), (True, False, {}), (False, True, {})])
def test_what_a_step_learns_is_what_transformers_says(home, tmp_path, monkeypatch, capfd, last_only, packing, tune):
    "Count and positions, of chats in rows, end to end, or packed; by an adapter or by all weights."
    folder, theirs = home
    want, seen, loss = wanted(theirs, last_only), [], stages.causal_lm_loss
    def listening(model, batch):
        ids, labels, ends = batch.input_ids.flatten().tolist(), batch.labels.flatten().tolist(), batch.cu_seqlens.tolist()
        seen.extend((ids[a:b], labels[a:b]) for a, b in zip(ends, ends[1:], strict=False))
        total, n = loss(model, batch)
        assert n == sum(x != -100 for x in labels)
        return total, n
    monkeypatch.setattr(stages, "causal_lm_loss", listening)
    cfg = dict(data=dict(data_path=[str(folder / "rows.json")], data_cache_path=str(tmp_path / "cache"), split="100,0,0", seq_length=512, shuffle=False, mask_history=last_only, packing=packing),
               train=dict(stage="sft", load=str(folder / "base"), save=str(tmp_path / "run"), train_iters=1, micro_batch_size=1 if packing else 4, device="cpu", eval_interval=0), tune=tune)
    (tmp_path / "run.yaml").write_text(yaml.safe_dump(cfg))
    assert cli.main(["train", "--config", str(tmp_path / "run.yaml"), "--json"]) == 0, capfd.readouterr().err
    chats = sorted((ids, labels) for ids, labels in seen if any(x != -100 for x in labels))
    assert chats == want
    row = next(r for r in map(json.loads, (tmp_path / "run/metrics.jsonl").read_text().splitlines()) if "loss" in r)
    assert row["trained_tokens"] == sum(x != -100 for _, labels in want for x in labels)
