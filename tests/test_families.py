"Configs of real models and of transformers' own writing: read as transformers reads them, written as it opens them."
import json
import os
import warnings

import pytest
import torch
from ascend_nb.config import ModelConfig
from ascend_nb.core import UserError
from ascend_nb.families import (FAMILIES, check_length, check_vocab, config_from_hf, config_to_hf, max_length,
                                read_config)
from ascend_nb.model import Decoder

os.environ["HF_HUB_OFFLINE"] = "1"
KNOWN = """llama2_7b llama2_70b llama3_1_8b meta-llama--Meta-Llama-3.1-70B mistral_7b qwen2_7b qwen2.5_3b qwen3_1.7b gemma_2b gemma2_9b phi-3_5""".split()
REMOTE = dict(baichuan=7_505_973_248, chatglm=6_243_584_000, internlm2=7_737_708_544, qwen=1_836_828_672) # published parameters
NATIVE = [k for k, f in FAMILIES.items() if f.in_transformers]
LLAMA = dict(architectures=["LlamaForCausalLM"], model_type="llama", vocab_size=96, hidden_size=32, intermediate_size=48, num_hidden_layers=2,
             num_attention_heads=4, num_key_value_heads=2, max_position_embeddings=64)


def hf_config(path):
    "transformers' reading of a folder or of a dict."
    from transformers import AutoConfig

    return AutoConfig.for_model(**path) if isinstance(path, dict) else AutoConfig.from_pretrained(path)


def hf_count(config):
    "Parameters of transformers' model, built without memory; tied ones once."
    from transformers import AutoModelForCausalLM

    with torch.device("meta"): return sum(p.numel() for p in AutoModelForCausalLM.from_config(config).parameters())


def our_count(cfg):
    with torch.device("meta"): return sum(p.numel() for p in Decoder(cfg).parameters())


SAME = {"vocab_size", "hidden_size", "num_hidden_layers", "num_attention_heads", "tie_word_embeddings", "initializer_range", "bos_token_id", "pad_token_id"}


def same_reading(cfg, theirs):
    "Does our reading agree with transformers' object, field by field?"
    for k in ("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads",
              "max_position_embeddings", "rms_norm_eps", "tie_word_embeddings", "initializer_range", "bos_token_id", "pad_token_id"):
        if k in SAME or hasattr(theirs, k): assert getattr(cfg, k) == getattr(theirs, k), k
    if hasattr(theirs, "layer_norm_epsilon"): assert cfg.rms_norm_eps == theirs.layer_norm_epsilon
    eos = theirs.eos_token_id
    assert cfg.eos_token_id == ([] if eos is None else eos if isinstance(eos, list) else [eos])
    if cfg.position_embedding != "rope": return
    rope = getattr(theirs, "rope_parameters", None) or {"rope_theta": theirs.rope_theta, **(theirs.rope_scaling or {"rope_type": "default"})}
    assert cfg.partial_rotary_factor == rope.get("partial_rotary_factor", 1.0)
    assert cfg.rope_theta == rope["rope_theta"]
    assert (cfg.rope_scaling or {"rope_type": "default"})["rope_type"] == rope["rope_type"]
    for k, v in (cfg.rope_scaling or {}).items(): assert rope[k] == v, k
    assert cfg.head_dim == (getattr(theirs, "head_dim", None) or theirs.hidden_size // theirs.num_attention_heads)
    kinds = getattr(theirs, "layer_types", None) or ["sliding_attention"] * cfg.num_hidden_layers
    windows = [getattr(theirs, "sliding_window", None) if k == "sliding_attention" else None for k in kinds]
    ours = [cfg.sliding_window if k == "sliding_attention" else None for k in cfg.layer_types or ["sliding_attention"] * cfg.num_hidden_layers]
    assert ours == windows


@pytest.mark.parametrize("name", KNOWN)
def test_real_config_reads_as_in_transformers(shared_data, tmp_path, name):
    folder = shared_data / "configs" / name
    cfg, theirs = config_from_hf(folder), hf_config(folder)
    same_reading(cfg, theirs)
    assert cfg.num_params() == our_count(cfg) == hf_count(theirs)
    (tmp_path / "config.json").write_text(json.dumps(config_to_hf(cfg, read_config(folder))))
    again = hf_config(tmp_path)
    same_reading(cfg, again)
    assert hf_count(again) == cfg.num_params() and config_from_hf(tmp_path) == cfg


def test_every_other_real_config_is_refused_by_name(shared_data):
    others = [p for p in sorted((shared_data / "configs").iterdir()) if p.is_dir() and read_config(p)["model_type"] not in FAMILIES]
    for folder in others:
        with pytest.raises(UserError) as e: config_from_hf(folder)
        assert e.value.key == "unknown_family", folder.name
        assert repr(read_config(folder)["model_type"]) in str(e.value) and all(f in str(e.value) for f in FAMILIES)


@pytest.mark.parametrize("name", REMOTE)
def test_real_config_of_a_family_with_code_of_its_own(shared_data, name):
    folder = shared_data / "configs" / name
    cfg = config_from_hf(folder)
    assert cfg.num_params() == our_count(cfg) == REMOTE[name]
    assert config_from_hf(config_to_hf(cfg, read_config(folder))) == cfg == config_from_hf(config_to_hf(cfg))


def test_real_minicpm(shared_data):
    "The published 2B has 122,753 tokens and a tied head; this config pads the one and unties the other."
    from dataclasses import replace

    cfg = config_from_hf(shared_data / "configs" / "minicpm_2b")
    assert replace(cfg, tie_word_embeddings=True, vocab_size=122753).num_params() == 2_724_880_896
    assert (cfg.embedding_multiplier, cfg.logits_multiplier * cfg.hidden_size, cfg.residual_multiplier * 40 ** 0.5) == (12, 256, pytest.approx(1.4))
    assert config_from_hf(config_to_hf(cfg)) == cfg


SIZES = [ # model_type, its published shape, its published parameters
    ("qwen", dict(hidden_size=4096, num_hidden_layers=32, intermediate_size=22016, vocab_size=151936), 7_721_324_544),
    ("qwen", dict(hidden_size=5120, num_hidden_layers=40, num_attention_heads=40, intermediate_size=27392, vocab_size=152064), 14_167_290_880),
    ("baichuan", dict(vocab_size=64000), 7_000_559_616),
    ("baichuan", dict(hidden_size=5120, num_hidden_layers=40, num_attention_heads=40, intermediate_size=13696, vocab_size=64000), 13_264_901_120),
    ("baichuan", dict(hidden_size=5120, num_hidden_layers=40, num_attention_heads=40, intermediate_size=13696, vocab_size=125696), 13_896_668_160),
    ("chatglm", dict(num_layers=40, padded_vocab_size=151552, add_qkv_bias=True, multi_query_attention=True, multi_query_group_num=2, rope_ratio=500), 9_399_951_360),
    ("internlm2", dict(vocab_size=92544, hidden_size=6144, num_hidden_layers=48, num_attention_heads=48, num_key_value_heads=8, intermediate_size=16384, bias=False),
     19_861_149_696),
    ("internlm", dict(vocab_size=103168), 7_321_948_160), ("aquila", {}, 7_295_537_152),
    ("bloom", dict(n_embed=1024, n_layer=24, num_attention_heads=16), 559_214_592), ("bloom", dict(n_embed=4096, n_layer=30, num_attention_heads=32), 7_069_016_064),
    ("gpt2", {}, 124_439_808), ("gpt2", dict(n_embd=1600, n_layer=48, n_head=25), 1_557_611_200),
]


@pytest.mark.parametrize("kind, shape, n", SIZES)
def test_published_sizes(kind, shape, n):
    cfg = config_from_hf(dict(model_type=kind, **shape))
    assert cfg.num_params() == our_count(cfg) == n
    assert config_from_hf(config_to_hf(cfg)) == cfg


def test_rules_of_thumb_of_baichuan():
    read = lambda **kw: config_from_hf(dict(model_type="baichuan", num_attention_heads=40, **kw))
    assert [read(hidden_size=h).position_embedding for h in (4000, 5120)] == ["rope", "alibi"]
    assert [read(vocab_size=v, hidden_size=80).norm_head for v in (64000, 125696)] == [False, True]
    small = read(hidden_size=80, position_embedding="alibi", norm_head=True)
    d = config_to_hf(small)
    assert (d["position_embedding"], d["norm_head"], d["model_max_length"]) == ("alibi", True, 4096) and config_from_hf(d) == small
    assert config_to_hf(read(hidden_size=5120))["position_embedding"] is None


@pytest.mark.parametrize("change, part", [
    (dict(model_type="gpt2", scale_attn_by_inverse_layer_idx=True), "scale_attn_by_inverse_layer_idx"),
    (dict(model_type="bloom", apply_residual_connection_post_layernorm=True), "apply_residual"), (dict(model_type="gemma", hidden_act="relu"), "relu"),
    (dict(model_type="chatglm", add_bias_linear=True), "add_bias_linear"), (dict(model_type="gemma2", use_bidirectional_attention=True), "use_bidirectional"),
    (dict(model_type="phi3", rope_scaling={"type": "longrope", "long_factor": [1.0]}), "missing keys: short_factor"),
    (dict(model_type="minicpm", num_experts=8), "experts"), (dict(model_type="gpt2", n_embd=100, n_head=12), "head size"),
    (dict(model_type="gemma", hidden_size="wide"), "cannot be used"),
])
def test_twists_that_are_not_computed_are_refused(change, part):
    with pytest.raises(UserError) as e: config_from_hf(change)
    assert part in str(e.value), str(e.value)


@pytest.mark.parametrize("family", NATIVE)
def test_defaults_are_those_of_transformers(family):
    cfg = config_from_hf(dict(model_type=family))
    theirs = hf_config(dict(model_type=family))
    same_reading(cfg, theirs)
    assert hf_count(theirs) == our_count(cfg) == cfg.num_params()


ROPES = [None, dict(rope_type="linear", factor=2.0), dict(rope_type="dynamic", factor=4.0),
         dict(rope_type="llama3", factor=8.0, low_freq_factor=1.0, high_freq_factor=4.0, original_max_position_embeddings=16),
         dict(rope_type="yarn", factor=4.0, original_max_position_embeddings=16, beta_fast=24.0)]


@pytest.mark.parametrize("rope", ROPES, ids=lambda r: r["rope_type"] if r else "default")
def test_both_spellings_are_one_config(tmp_path, rope):
    four = dict(LLAMA, rope_theta=5e5, rope_scaling=rope, torch_dtype="bfloat16")
    five = dict(LLAMA, rope_parameters=dict(rope or {"rope_type": "default"}, rope_theta=5e5), dtype="bfloat16")
    assert config_from_hf(four) == config_from_hf(five)
    (tmp_path / "config.json").write_text(json.dumps(four))
    theirs = hf_config(tmp_path)
    same_reading(config_from_hf(four), theirs)
    theirs.save_pretrained(tmp_path) # whatever the installed transformers writes
    assert config_from_hf(tmp_path) == config_from_hf(four)


def test_old_rope_type_and_missing_original_length():
    old = config_from_hf(dict(LLAMA, rope_scaling=dict(type="linear", factor=2.0)))
    assert old.rope_scaling == dict(rope_type="linear", factor=2.0)
    yarn = config_from_hf(dict(LLAMA, rope_scaling=dict(rope_type="yarn", factor=2.0)))
    assert yarn.rope_scaling["original_max_position_embeddings"] == 64


def test_eos_from_generation_config(tmp_path):
    (tmp_path / "config.json").write_text(json.dumps(dict(LLAMA, eos_token_id=7)))
    assert config_from_hf(tmp_path).eos_token_id == [7]
    (tmp_path / "generation_config.json").write_text(json.dumps(dict(eos_token_id=[7, 9], temperature=0.6)))
    assert config_from_hf(tmp_path).eos_token_id == [7, 9]
    assert config_to_hf(config_from_hf(tmp_path))["eos_token_id"] == [7, 9]


@pytest.mark.parametrize("change, part", [
    (dict(attention_dropout=0.1), "attention_dropout=0.1"), (dict(logit_scale=2.0), "logit_scale=2.0"),
    (dict(quantization_config={"quant_method": "gptq"}), "quantization_config="), (dict(hidden_act="relu"), "hidden_act"),
    (dict(partial_rotary_factor=0.5), "partial_rotary_factor=0.5"), (dict(sliding_window=8), "sliding_window=8"),
    (dict(rope_parameters={"rope_type": "default", "partial_rotary_factor": 0.5}), "partial_rotary_factor"),
    (dict(rope_scaling={"rope_type": "longrope", "factor": 2.0}), "longrope"), (dict(rope_scaling={"rope_type": "proportional"}), "proportional"), (dict(rope_scaling={"rope_type": "linear"}), "missing keys: factor"),
    (dict(rope_parameters={"full_attention": {"rope_type": "default"}}), "full_attention"),
    (dict(architectures=["LlamaForSequenceClassification"]), "LlamaForSequenceClassification"),
    (dict(num_key_value_heads=3), "multiple"), (dict(hidden_size="wide"), "hidden_size"), (dict(model_type=None), "model_type=None"),
])
def test_what_would_change_the_numbers_is_refused(change, part):
    with pytest.raises(UserError) as e: config_from_hf({**LLAMA, **change})
    assert part in str(e.value)


def test_harmless_keys_pass():
    more = dict(_name_or_path="x", _attn_implementation_autoset=True, transformers_version="4.40.0", use_cache=False, pretraining_tp=1, rope_interleaved=False,
                attention_dropout=0.0, is_llama_config=True, unsloth_version="2025.1", sliding_window=None)
    assert config_from_hf({**LLAMA, **more}) == config_from_hf(LLAMA)
    mistral = dict(LLAMA, model_type="mistral", architectures=["MistralForCausalLM"])
    assert config_from_hf({**mistral, "attention_bias": False}) == config_from_hf(mistral)
    with pytest.raises(UserError, match="attention_bias=True"): config_from_hf({**mistral, "attention_bias": True})


@pytest.mark.parametrize("text", ["{", "[1]", ""])
def test_broken_config_file(tmp_path, text):
    (tmp_path / "config.json").write_text(text)
    with pytest.raises(UserError, match="config.json"): config_from_hf(tmp_path)


@pytest.mark.parametrize("kw, field", [
    (dict(model_type="qwen2"), "attention_bias"), (dict(model_type="qwen3"), "qk_norm"), (dict(attention_bias=True), "attention_out_bias|attention_bias"),
    (dict(model_type="mistral", mlp_bias=True), "mlp_bias"), (dict(sliding_window=8), "sliding_window"),
    (dict(rope_scaling={"type": "linear", "factor": 2.0}), "rope_scaling"),
    (dict(model_type="mistral", sliding_window=8, layer_types=["full_attention", "sliding_attention"]), "sliding_window|layer_types"),
])
def test_a_config_that_no_family_holds_is_not_written(kw, field):
    with pytest.raises(UserError, match=f"Found ({field})="): config_to_hf(ModelConfig(vocab_size=96, num_hidden_layers=2, **kw))


def test_window_patterns_survive(tmp_path):
    for kinds in (["full_attention", "sliding_attention", "sliding_attention"], ["sliding_attention", "full_attention", "sliding_attention"]):
        cfg = ModelConfig(model_type="qwen2", vocab_size=96, num_hidden_layers=3, attention_bias=True, sliding_window=8, layer_types=kinds)
        (tmp_path / "config.json").write_text(json.dumps(config_to_hf(cfg)))
        same_reading(cfg, hf_config(tmp_path))
        assert config_from_hf(tmp_path) == cfg
    assert config_to_hf(ModelConfig(model_type="mistral", vocab_size=96))["sliding_window"] is None


def test_written_config_opens_without_complaint(tmp_path):
    cfg = config_from_hf(dict(LLAMA, rope_scaling=ROPES[3]))
    (tmp_path / "config.json").write_text(json.dumps(config_to_hf(cfg, dict(LLAMA, my_note=None, use_cache=False), "bfloat16")))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        theirs = hf_config(tmp_path)
    assert (getattr(theirs, "dtype", None) or theirs.torch_dtype) == torch.bfloat16


def test_limits():
    cfg = ModelConfig(vocab_size=100, max_position_embeddings=64, rope_scaling=dict(rope_type="yarn", factor=4.0, original_max_position_embeddings=32))
    assert max_length(cfg) == 128
    check_length(cfg, 128)
    check_vocab(cfg, 100)
    with pytest.raises(UserError, match="129 tokens; expected at most 128"): check_length(cfg, 129)
    with pytest.raises(UserError, match="101 tokens; expected at most 100"): check_vocab(cfg, 101)
