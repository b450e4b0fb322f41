"""Training from raw files: preprocessed once, by one process, and never from an old file."""
import json
import os
import subprocess
import sys
from dataclasses import replace

import numpy as np
import pytest
from worlds import JOIN, world

from ascend_nb.blends import build_datasets
from ascend_nb.config import DataConfig, ModelConfig, PreprocessConfig, RunConfig, TrainConfig
from ascend_nb.core import UserError
from ascend_nb.indexed import IndexedReader
from ascend_nb.prepared import is_raw, prepared
from ascend_nb.preprocess import run
from ascend_nb.training import build, loaders, resolve


@pytest.fixture(scope="module")
def tok(tmp_path_factory):
    "A small tokenizer with a chat template: loaded in no time."
    from tokenizers import Tokenizer, models, pre_tokenizers, trainers
    words, folder = Tokenizer(models.BPE()), tmp_path_factory.mktemp("tok")
    words.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    specials = ["<eos>", "<|im_start|>", "<|im_end|>"]
    words.train_from_iterator(["the answer is here"], trainers.BpeTrainer(special_tokens=specials, initial_alphabet=pre_tokenizers.ByteLevel.alphabet()))
    words.save(str(folder / "tokenizer.json"))
    template = "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
    (folder / "tokenizer_config.json").write_text(json.dumps(dict(eos_token="<eos>", chat_template=template)))
    return str(folder)


@pytest.fixture
def raw(shared_data, tmp_path):
    "The first rows of a real chat file."
    rows = json.loads((shared_data / "instruct" / "alpaca_en_demo.json").read_text(encoding="utf-8"))[:8]
    path = tmp_path / "chats.jsonl"
    path.write_text("\n".join(map(json.dumps, rows)), encoding="utf-8")
    return path


def config(tmp_path, tok, *path, **kw):
    return DataConfig(data_path=[str(p) for p in path], tokenizer_name_or_path=tok, split="1", seq_length=4096, data_cache_path=str(tmp_path / "cache"), **kw)


def notes(tmp_path): return sorted((tmp_path / "cache" / "prepared").glob("*.json"))


def test_the_tokens_are_those_of_preprocess(tmp_path, tok, raw):
    [prefix] = prepared(config(tmp_path, tok, raw), "sft").data_path
    run(PreprocessConfig(input=str(raw), output_prefix=str(tmp_path / "by_hand"), tokenizer_name_or_path=tok), json=True)
    for f in ("input_ids", "attention_mask", "labels"):
        for ext in (".bin", ".idx"):
            a, b = (open(f"{p}_packed_{f}_document{ext}", "rb").read() for p in (prefix, tmp_path / "by_hand"))
            assert a == b and a


def test_once_and_never_old(tmp_path, tok, raw, capsys):
    data = config(tmp_path, tok, raw)
    first = prepared(data, "sft")
    assert "Preprocessing" in capsys.readouterr().err
    assert prepared(data, "sft") == first and "Preprocessing" not in capsys.readouterr().err
    for other in (replace(data, prompt_type="chatml"), replace(data, max_samples=5), replace(data, mask_history=True), replace(data, on_bad_row="skip")):
        assert prepared(other, "sft").data_path != first.data_path
    raw.write_text(raw.read_text().replace("the", "THE"))
    changed = prepared(data, "sft")
    assert changed.data_path != first.data_path
    assert not np.array_equal(*(IndexedReader(f"{d.data_path[0]}_packed_input_ids_document").tokens for d in (first, changed)))
    for broken in (lambda p: os.truncate(f"{p}_packed_labels_document.bin", 40), lambda p: os.unlink(f"{p}_packed_labels_document.idx"), lambda p: open(f"{p}.json", "w").close()):
        broken(changed.data_path[0])
        assert prepared(data, "sft") == changed and len(build_datasets(changed, "sft", dict(train=8), 1)["train"]) >= 8


def test_another_tokenizer_is_another_key(tmp_path, tok, raw):
    import shutil
    shutil.copytree(tok, tmp_path / "tok", copy_function=shutil.copyfile)
    os.chmod(tmp_path / "tok", 0o755)
    data = config(tmp_path, str(tmp_path / "tok"), raw)
    first = prepared(data, "sft")
    assert prepared(config(tmp_path, tok, raw), "sft") == replace(first, tokenizer_name_or_path=tok), "the same files in another place"
    settings = tmp_path / "tok" / "tokenizer_config.json"
    settings.write_text(settings.read_text().replace("<|im_start|>{{ m.role }}", "<|im_start|>({{ m.role }})"))
    assert prepared(data, "sft").data_path != first.data_path


@pytest.mark.parametrize("stage, name, kw", [
    ("pretrain", "pretrain/lunyu.json", dict(json_keys=["paragraphs"])), ("pretrain", "pretrain/c4.parquet", {}), ("pretrain", "pretrain/TruthfulQA.csv", dict(json_keys=["Question"])),
    ("sft", "instruct/identity.json", {}), ("sft", "instruct/v1_sft_demo.jsonl", {}), ("pair", "instruct/dpo_zh_demo.json", {}), ("pair", "instruct/oaast_rm_zh.json", {}),
])
def test_real_files_of_every_stage(shared_data, tmp_path, tok, stage, name, kw):
    data = config(tmp_path, tok, shared_data / name, max_samples=40, append_eod=stage == "pretrain", **kw)
    ds = build_datasets(prepared(replace(data, seq_length=256 if stage == "pretrain" else 4096), stage), stage, dict(train=20), 1, 200_000)["train"]
    first = ds[0][0] if stage == "pair" else ds[0]
    assert len(ds) >= 20 and (first.labels != -100).any()


def test_names_of_a_registry_and_several_sources(shared_data, tmp_path, tok):
    names = json.loads((shared_data / "instruct" / "dataset_info.json").read_text(encoding="utf-8"))
    assert {"identity", "alpaca_en_demo"} <= set(names)
    data = config(tmp_path, tok, "0.5", "identity", "0.5", "alpaca_en_demo", dataset_dir=str(shared_data / "instruct"), max_samples=30)
    new = prepared(data, "sft")
    assert new.data_path[::2] == ["0.5", "0.5"] and len(notes(tmp_path)) == 2
    assert len(build_datasets(new, "sft", dict(train=40), 1)["train"]) >= 40
    assert len(prepared(replace(data, data_path=["identity,alpaca_en_demo"]), "sft").data_path) == 1


def test_prefixes_stay_as_they_are(shared_data, tmp_path, tok, raw):
    web = str(shared_data / "megatron" / "meg-gpt2-openwebtext_text_document")
    data = config(tmp_path, "", web)
    assert prepared(data, "pretrain") == data and not (tmp_path / "cache").exists()
    mixed = DataConfig(train_data_path=[str(raw)], valid_data_path=[prepared(config(tmp_path, tok, raw), "sft").data_path[0]], tokenizer_name_or_path=tok,
                       data_cache_path=str(tmp_path / "cache"))
    new = prepared(mixed, "sft")
    assert new.train_data_path == new.valid_data_path == mixed.valid_data_path and not new.data_path
    assert not is_raw(web, data) and is_raw(str(raw), data) and not is_raw("/nowhere/at_all", data)
    os.mkdir(tmp_path / "old"); run(PreprocessConfig(input=str(raw), output_prefix=str(tmp_path / "old"), tokenizer_name_or_path=tok), json=True)
    assert not is_raw(str(tmp_path / "old"), data), "a folder beside a pair of the same name is the pair's"


def test_mistakes(tmp_path, tok, raw):
    with pytest.raises(UserError, match="chat data in .* which is for stage=sft"): prepared(config(tmp_path, tok, raw), "pretrain")
    with pytest.raises(UserError, match="--tokenizer-name-or-path"): prepared(config(tmp_path, "", raw), "sft")
    with pytest.raises(UserError, match="two|one column"): prepared(config(tmp_path, tok, raw, json_keys=["instruction", "output"], handler_name="GeneralPretrainHandler"), "pretrain")
    raw.write_text(raw.read_text() + "\n{broken")
    with pytest.raises(UserError, match="chats.jsonl"): prepared(config(tmp_path, tok, raw), "sft")
    assert not notes(tmp_path)


def test_two_runs_at_the_same_moment(tmp_path, tok, raw):
    "Neither knows of the other; one preprocesses, both get the same."
    code = f"""
from ascend_nb.config import DataConfig
from ascend_nb.prepared import prepared
print(*prepared(DataConfig(data_path=[{str(raw)!r}], tokenizer_name_or_path={tok!r}, data_cache_path={str(tmp_path / "cache")!r}), "sft").data_path)
"""
    jobs = [subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) for _ in range(2)]
    outs = [j.communicate(timeout=100) for j in jobs]
    assert [j.returncode for j in jobs] == [0, 0], outs
    assert outs[0][0] == outs[1][0] and sum("Preprocessing" in err for _, err in outs) == 1


@pytest.mark.slow
def test_the_processes_of_one_run(tmp_path, tok, raw):
    "Four over gloo: the first preprocesses, then all build the same data set; a broken row ends all of them."
    code = JOIN + f"""
import sys
from ascend_nb.blends import build_datasets
from ascend_nb.config import DataConfig
from ascend_nb.core import UserError
from ascend_nb.prepared import prepared
data = DataConfig(data_path=[{str(raw)!r}], tokenizer_name_or_path={tok!r}, data_cache_path={str(tmp_path / "cache")!r}, split="1", seq_length=4096)
try: ds = build_datasets(prepared(data, "sft"), "sft", dict(train=30), 1)["train"]
except UserError as e: print(e.key); sys.exit(2)
print(int(sum(ds[i].ids.sum() for i in range(30))))
dist.destroy_process_group()
"""
    out = world(code, 4)
    assert [o[0] for o in out] == [0] * 4 and len({o[1] for o in out}) == 1, out
    assert ["Preprocessing" in o[2] for o in out] == [True, False, False, False]
    raw.write_text(raw.read_text() + "\n{broken")
    out = world(code, 2)
    assert [o[0] for o in out] == [2, 2] and out[1][1] == "cache_failed\n", out


def whole(tmp_path, tok, raw):
    return RunConfig(ModelConfig(hidden_size=16, num_hidden_layers=1, num_attention_heads=2, max_position_embeddings=2048),
                     replace(config(tmp_path, tok, raw, packing=True), split="80,20", seq_length=2048),
                     train=TrainConfig(stage="sft", save=str(tmp_path / "run"), train_iters=2, micro_batch_size=1, eval_interval=1, eval_iters=1, device="cpu"))


def test_training_reads_a_raw_file(tmp_path, tok, raw):
    "Training's own functions: packing and validation included."
    both = loaders(*resolve(whole(tmp_path, tok, raw)))
    batch = next(both["train"])
    assert set(both) == {"train", "valid"} and batch.cu_seqlens is not None and batch.num_targets > 0


@pytest.mark.slow
def test_a_run_trains_from_a_raw_file(tmp_path, tok, raw):
    job = build(whole(tmp_path, tok, raw))
    assert job.cfg.data.data_path == [str(raw)], "the config keeps the raw name"
    assert np.isfinite(job.trainer.fit().rows[-1]["loss"])
