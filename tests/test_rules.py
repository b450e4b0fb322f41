"""Answers of a given form: whatever a model holds likely, they match the pattern or the schema. Python's `re` and the `jsonschema` package are the judges."""
import json
import re
import subprocess
import sys

import pytest
from conftest import ROOT

from ascend_nb.batches import Batch
from ascend_nb.beams import search
from ascend_nb.config import ModelConfig, SampleConfig
from ascend_nb.core import UserError
from ascend_nb.generate import several, stream
from ascend_nb.hf_format import save_model
from ascend_nb.model import Decoder
from ascend_nb.reading import Lookup
from ascend_nb.rules import rules_for
from ascend_nb.tokenizers import load_tokenizer

llguidance = pytest.importorskip("llguidance", reason="the extra ascend_nb[constrained]")
jsonschema = pytest.importorskip("jsonschema")
PATTERNS = [r"[a-z]{2,9}@[a-z]{2,5}\.(com|org)", r"(yes|no|perhaps)", r"-?[0-9]{1,3}(\.[0-9]{1,2})?", r"[^\n]{1,20}", r"狐{2,3}|fox"]
SCHEMAS = [
    dict(type="object", properties=dict(name=dict(type="string", maxLength=12), age=dict(type="integer", minimum=0, maximum=150), tags=dict(type="array", items=dict(enum=["a", "b"]), maxItems=3)), required=["name", "age"], additionalProperties=False),
    dict(type="array", items=dict(type="boolean"), minItems=2, maxItems=5), dict(anyOf=[dict(const="left"), dict(type="null")]),
    {"$defs": {"leaf": dict(type="string", pattern="^[xy]{1,4}$")}, "type": "object", "properties": {"l": {"$ref": "#/$defs/leaf"}}, "required": ["l"], "additionalProperties": False},
]


@pytest.fixture(scope="module")
def tales(samples):
    "A random model that likes every token the same, nearly."
    tok = load_tokenizer(samples / "tokenizer")
    model = Decoder(ModelConfig(vocab_size=tok.vocab_size + 24, hidden_size=32, num_hidden_layers=1, num_attention_heads=2, max_position_embeddings=512, eos_token_id=[tok.eos_token_id])).eval()
    return model.init_weights(3), tok


def fits(text, pattern=None, schema=None):
    if pattern: return re.fullmatch(pattern, text) is not None
    jsonschema.validate(json.loads(text), schema)
    return True


@pytest.mark.parametrize("rule", [*[dict(pattern=p) for p in PATTERNS], *[dict(schema=s) for s in SCHEMAS]], ids=str)
def test_every_answer_has_the_form(tales, rule):
    model, tok = tales
    how = dict(regex=rule["pattern"]) if "pattern" in rule else dict(json_schema=json.dumps(rule["schema"]))
    for seed in range(4):
        cfg = SampleConfig(task="do_sample" if seed else "greedy", temperature=1.5, top_k=0, top_p=1., seed=seed, max_new_tokens=200, repetition_penalty=1.2, **how)
        out = stream(model, tok, tok.encode("A fox"), cfg, guess=None if seed else Lookup())
        assert fits("".join(out), **rule) and out.stopped_by in ("stop", "eos"), out.text
    texts = several(model, tok, tok.encode("A fox"), SampleConfig(task="do_sample", temperature=1.5, top_k=0, top_p=1., num_return_sequences=3, max_new_tokens=200, **how))
    assert len(texts) == 3 and all(fits(t["text"], **rule) for t in texts)


def test_rows_with_and_without_rules_stand_side_by_side(tales):
    model, tok = tales
    cfg = SampleConfig(max_new_tokens=12)
    alone = list(stream(model, tok, tok.encode("A fox"), cfg)), stream(model, tok, tok.encode("A fox"), cfg).ids
    batch, made = Batch(model, slots=2), {}
    ruled = batch.add(tok.encode("A fox"), cfg, rules=rules_for(SampleConfig(regex="[0-9]{4}"), tok, {tok.eos_token_id}))
    free = batch.add(tok.encode("A fox"), cfg)
    while batch.rows:
        for m in batch.step(): made.setdefault(m.key, []).append(m.id)
    plain = stream(model, tok, tok.encode("A fox"), cfg)
    assert "".join(alone[0]) == "".join(plain) and made[free][:len(plain.ids)] == plain.ids and re.fullmatch("[0-9]{4}", tok.decode(made[ruled]))


def test_what_is_no_rule_is_told(tales, monkeypatch):
    model, tok = tales
    for how, words in ((dict(regex="a(b"), "regular expression"), (dict(json_schema='{"type": 7}'), "JSON schema"), (dict(json_schema="no/such.json"), "neither JSON nor the name"), (dict(regex="a", json_schema="{}"), "one of them")):
        with pytest.raises(UserError, match=words): stream(model, tok, [5], SampleConfig(**how))
    with pytest.raises(UserError, match="beside beams"): search(model, [5], SampleConfig(task="beam_search", regex="a"))
    monkeypatch.setitem(sys.modules, "llguidance", None)
    with pytest.raises(UserError, match=r"ascend_nb\[constrained\]"): stream(model, tok, [5], SampleConfig(regex="a"))


@pytest.mark.slow
def test_the_command_keeps_a_schema_of_a_file(tales, tmp_path):
    folder, schema = save_model(tales[0], tmp_path / "model", tales[1]), tmp_path / "schema.json"
    schema.write_text(json.dumps(SCHEMAS[0]))
    command = [sys.executable, "-m", "ascend_nb.cli", "generate", "--model", str(folder), "--prompt", "A fox", "--device", "cpu", "--max-new-tokens", "200"]
    out = subprocess.run([*command, "--json-schema", str(schema)], cwd=ROOT, capture_output=True, text=True)
    assert out.returncode == 0 and fits(out.stdout[:-1], schema=SCHEMAS[0]), out.stderr
    out = subprocess.run([*command, "--regex", "a(b"], cwd=ROOT, capture_output=True, text=True)
    assert out.returncode == 2 and "unclosed group" in out.stderr and "Traceback" not in out.stderr
