"""Configs in and out: YAML, dict and command line agree; each wrong input is one sentence."""
from dataclasses import MISSING

import pytest
from ascend_nb.config import DataConfig, EvalConfig, FetchConfig, GenerateConfig, ModelConfig, PreprocessConfig, RunConfig, TrainConfig
from ascend_nb.core import UserError
from ascend_nb.schema import from_dict, knobs, load_yaml, parse_args, plain_type, save_yaml, to_args, to_dict

ALL = [EvalConfig, FetchConfig, GenerateConfig, ModelConfig, PreprocessConfig, RunConfig, TrainConfig]


@pytest.mark.parametrize("cls", ALL, ids=lambda c: c.__name__)
def test_every_knob_is_explained(cls):
    for k in knobs(cls): assert k.help, f"{cls.__name__}.{k.name} has no comment"


@pytest.mark.parametrize("cls", [RunConfig, TrainConfig, PreprocessConfig, EvalConfig, GenerateConfig], ids=lambda c: c.__name__)
def test_flags_are_unique(cls):
    names = [k.name for k in knobs(cls)]
    assert len(names) == len(set(names)), "a flag must reach one knob"


@pytest.mark.parametrize("cls", [RunConfig, PreprocessConfig, EvalConfig, GenerateConfig], ids=lambda c: c.__name__)
def test_other_spellings_of_a_switch_stand_alone(cls):
    for k in knobs(cls):
        for alias in k.flags if plain_type(k.type) is bool else ():
            name = alias.split("=")[0]
            got = parse_args(cls, [name, *(w for m in knobs(cls) if m.default is MISSING for w in (m.flag, "x"))])
            assert getattr(getattr(got, k.path[0]) if k.path else got, k.name) is True, name


ARGS = ["--lr", "0.001", "--data-path", "0.3", "a", "0.7", "b", "--hidden-size", "64", "--eos-token-id", "1", "2", "--no-tie-word-embeddings",
        "--rope-scaling", '{"rope_type": "linear", "factor": 2.0}', "--save", "runs/ x", "--fp16"]


def test_round_trips(tmp_path):
    cfg = parse_args(RunConfig, ARGS)
    assert cfg.train.dtype == "fp16" and cfg.model.eos_token_id == [1, 2] and cfg.model.rope_scaling["factor"] == 2.0
    assert parse_args(RunConfig, to_args(cfg)) == cfg
    assert from_dict(RunConfig, to_dict(cfg)) == cfg
    save_yaml(cfg, tmp_path / "c.yaml")
    assert load_yaml(RunConfig, tmp_path / "c.yaml") == cfg
    assert parse_args(RunConfig, ["--config", str(tmp_path / "c.yaml"), "--lr", "1"]).train.lr == 1.0


@pytest.mark.parametrize("cfg", [GenerateConfig(model="-m", prompt="--help", stop=["---", "-x y", "a", ""]), EvalConfig(model=["-a", "b"], data_path=["--lr"]), GenerateConfig(model="m", logit_bias={"5": -1}),
                                 RunConfig(data=DataConfig(data_path=["a", "-1", "--packing"]))], ids=["words", "positions", "mapping", "section"])
def test_a_word_may_begin_with_a_dash(cfg):
    assert parse_args(type(cfg), to_args(cfg)) == cfg


def test_the_last_of_two_lists_counts():
    assert parse_args(RunConfig, ["--data-path", "a", "b", "--lr", "1", "--data-path", "c"]).data.data_path == ["c"]


@pytest.mark.parametrize("words,value", [(["--append-eod"], True), (["--append_eod", "false"], False), (["--append-eod", "--workers", "2"], True),
                                         (["--no-append-eod"], False), (["--append-eod=no"], False)])
def test_switches(words, value):
    base = ["--input", "a", "--output-prefix", "b", "--tokenizer-name-or-path", "c"]
    assert parse_args(PreprocessConfig, [*base, *words]).append_eod is value


def test_a_switch_does_not_eat_the_next_word():
    assert parse_args(GenerateConfig, ["--chat", "--model", "m"]).model == "m"


@pytest.mark.parametrize("d,words", [
    ({"trian": {}}, "Did you mean train"), ({"train": {"lrr": 1}}, "section train"), ({"train": {"lr": "x"}}, "expected a float"), ({"train": {"lr": "nan"}}, "expected a float"), ({"train": {"clip_grad": float("inf")}}, "expected a float"), ({"model": {"rope_scaling": '{"factor": NaN}'}}, "expected a dict"),
    ({"train": {"micro_batch_size": 2.5}}, "expected a int"), ({"train": {"stage": "sfd"}}, "Did you mean sft"), ({"train": 3}, "mapping"),
    ({"train": {"clip_grad": -1}}, "from 0"), ({"data": {"seq_length": None}}, "expected a int"), ([1], "mapping"),
])
def test_wrong_input(d, words):
    with pytest.raises(UserError, match=words): from_dict(RunConfig, d, "run.yaml")


def test_bad_yaml_names_the_line(tmp_path):
    (tmp_path / "c.yaml").write_text("train:\n  lr: [1\n", encoding="utf-8")
    with pytest.raises(UserError, match="line 3"): load_yaml(RunConfig, tmp_path / "c.yaml")


def test_a_derived_value_is_derived_anew(tmp_path):
    "hidden_size from a file, overridden by a flag: head_dim follows."
    (tmp_path / "c.yaml").write_text("model: {hidden_size: 256, num_attention_heads: 4}\n", encoding="utf-8")
    cfg = parse_args(RunConfig, ["--config", str(tmp_path / "c.yaml"), "--hidden-size", "512"])
    assert cfg.model.head_dim == 128 and "head_dim" not in to_dict(cfg, changed=True)["model"]
    assert to_args(cfg) == ["--hidden-size", "512"]
