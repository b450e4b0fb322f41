"""Every family through every layout and home again, bit for bit; what a rank holds compared with torch's own slicing; damage named, nothing half-written."""
import json
import os
import shutil
import subprocess
import sys
from argparse import Namespace

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from ascend_nb import converters
from ascend_nb.config import ModelLinkConvertConfig
from ascend_nb.convert import run
from ascend_nb.core import UserError
from ascend_nb.families import config_from_hf
from ascend_nb.megatron_names import Naming, hf_placed
from ascend_nb.megatron_format import Word
from ascend_nb.megatron_layout import Layout, config_from_args, megatron_args
from ascend_nb.megatron_source import open_hf, open_megatron
from ascend_nb.family_table import FAMILIES
from ascend_nb.names import canonical_shapes
from ascend_nb.schema import parse_args
from ascend_nb.shapes import ModelConfig

BASE = dict(vocab_size=61, hidden_size=32, intermediate_size=48, num_hidden_layers=4, num_attention_heads=4, num_key_value_heads=2, head_dim=8, max_position_embeddings=64)


def go(*words, **kw):
    "One run of the command."
    return run(parse_args(ModelLinkConvertConfig, [str(w) for x in words for w in (x.split() if isinstance(x, str) else [x])]), json=True, **kw)


def make(folder, hf, dtype=torch.bfloat16, shards=0, kind="safetensors"):
    "A model folder with random weights, written by the libraries."
    folder.mkdir(parents=True)
    cfg = config_from_hf(hf)
    (folder / "config.json").write_text(json.dumps({**hf, "torch_dtype": str(dtype)[6:]}))
    (folder / "tokenizer.json").write_text("{}")
    g = torch.Generator().manual_seed(7)
    tensors = {p.stored.name: torch.randn(p.stored.shape, generator=g).to(dtype) for p in hf_placed(cfg)}
    if kind == "bin": torch.save(tensors, folder / "pytorch_model.bin")
    elif not shards: save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    else:
        names = list(tensors)
        part = lambda i: f"model-{i + 1:05d}-of-{shards:05d}.safetensors"
        for i in range(shards): save_file({k: tensors[k] for k in names[i::shards]}, folder / part(i), {"format": "pt", "odd": "é"})
        index = dict(metadata=dict(total_size=1), weight_map={k: part(j % shards) for j, k in enumerate(names)})
        (folder / "model.safetensors.index.json").write_text(json.dumps(index, indent=2))
    return cfg


def same_weights(a, b):
    "Byte for byte: every weights file and index of a."
    files = [p.name for p in a.iterdir() if p.suffix in (".safetensors", ".bin") or p.name.endswith(".index.json")]
    assert files
    for f in files: assert (a / f).read_bytes() == (b / f).read_bytes(), f


def llama(**kw): return dict(BASE, model_type="llama", architectures=["LlamaForCausalLM"], tie_word_embeddings=False) | kw


@pytest.fixture(scope="module")
def home(tmp_path_factory):
    folder = tmp_path_factory.mktemp("hf") / "llama"
    make(folder, llama(), shards=2)
    return folder


LAYOUTS = ["", "--tp 2", "--pp 2", "--tp 2 --pp 4", "--pp 2 --num-layers-per-virtual-pipeline-stage 1", "--pp 3 --num-layer-list 1,2,1",
           "--pp 2 --noop-layers 0,5", "--tp 2 --make-vocab-size-divisible-by 16", "--pp 3 --noop-layers 0,3 --tp 2"]


@pytest.mark.parametrize("flags", LAYOUTS)
@pytest.mark.parametrize("to", ["legacy", "mcore", "mcore --transformer-impl transformer_engine"])
def test_there_and_back(home, tmp_path, to, flags):
    paper = go(home, tmp_path / "mg", "--to", to, flags, "--verify")
    assert paper["verified"]["bitwise_equal"] == len(canonical_shapes(config_from_hf(home))) and paper["verified"]["logits"] == "equal"
    go(tmp_path / "mg", tmp_path / "home", "--to hf --hf-config", home)
    same_weights(home, tmp_path / "home")
    assert (tmp_path / "home/tokenizer.json").read_text() == "{}"


@pytest.mark.parametrize("chain", [["legacy --tp 2", "mcore --pp 4 --transformer-impl transformer_engine", "legacy --pp 2 --num-layers-per-virtual-pipeline-stage 1"],
                                   ["mcore --tp 2 --pp 2", "mcore --pp 2 --noop-layers 1,2", "mcore --tp 2"]])
@pytest.mark.parametrize("tied", [True, False])
def test_from_any_to_any(tmp_path, chain, tied):
    make(tmp_path / "hf", llama(tie_word_embeddings=tied))
    at = tmp_path / "hf"
    for i, to in enumerate(chain):
        go(at, tmp_path / str(i), "--to", to, "--verify")
        at = tmp_path / str(i)
    go(at, tmp_path / "home", "--to hf --hf-config", tmp_path / "hf")
    same_weights(tmp_path / "hf", tmp_path / "home")


def test_what_a_rank_holds(home, tmp_path):
    "Against torch's reshape, chunk and cat on the original matrices, as Megatron's own loaders cut them."
    go(home, tmp_path / "mg", "--to mcore --tp 2 --pp 2 --make-vocab-size-divisible-by 8")
    hf = {k: v for f in home.glob("*.safetensors") for k, v in load_file(f).items()}
    N, K, D, H = 4, 2, 8, 32
    for t in range(2):
        for p in range(2):
            got = torch.load(tmp_path / f"mg/iter_0000001/mp_rank_{t:02d}_{p:03d}/model_optim_rng.pt", weights_only=False)
            m = got["model"]
            assert (got["checkpoint_version"], got["iteration"]) == (3.0, 1) and isinstance(got["args"], Namespace)
            for i in range(2):
                a, b = f"model.layers.{2 * p + i}.", f"decoder.layers.{i}."
                q, k, v = (hf[f"{a}self_attn.{x}_proj.weight"] for x in "qkv")
                qkv = torch.cat([q.reshape(K, D * N // K, H), k.reshape(K, D, H), v.reshape(K, D, H)], 1).reshape(-1, H)
                assert torch.equal(m[f"{b}self_attention.linear_qkv.weight"], qkv.chunk(2)[t])
                assert torch.equal(m[f"{b}self_attention.linear_proj.weight"], hf[f"{a}self_attn.o_proj.weight"].chunk(2, 1)[t])
                gate, up = (hf[f"{a}mlp.{x}_proj.weight"].chunk(2)[t] for x in ("gate", "up"))
                assert torch.equal(m[f"{b}mlp.linear_fc1.weight"], torch.cat([gate, up]))
                assert torch.equal(m[f"{b}mlp.linear_fc2.weight"], hf[f"{a}mlp.down_proj.weight"].chunk(2, 1)[t])
            if p: assert torch.equal(m["decoder.final_layernorm.weight"], hf["model.norm.weight"])
            word = m["output_layer.weight"] if p else m["embedding.word_embeddings.weight"]
            full = hf["lm_head.weight"] if p else hf["model.embed_tokens.weight"]
            assert torch.equal(word, torch.cat([full, full[-1:].expand(3, H)]).chunk(2)[t]) # 61 -> 64 rows
            assert len(m) == 2 * 6 + 1 + p
    assert (tmp_path / "mg/latest_checkpointed_iteration.txt").read_text() == "1"


def test_args_are_those_that_megatron_reads(home, tmp_path):
    go(home, tmp_path / "mg", "--to mcore --pp 2 --num-layers-per-virtual-pipeline-stage 1")
    got = torch.load(tmp_path / "mg/iter_0000001/mp_rank_00_001/model_optim_rng.pt", weights_only=False)
    a = vars(got["args"])
    want = """num_layers hidden_size ffn_hidden_size seq_length num_attention_heads num_query_groups group_query_attention kv_channels max_position_embeddings position_embedding_type
        add_position_embedding use_rotary_position_embeddings rotary_percent rotary_interleaved add_bias_linear add_qkv_bias swiglu untie_embeddings_and_output_weights apply_layernorm_1p normalization
        tokenizer_type padded_vocab_size apply_query_key_layer_scaling tensor_model_parallel_size pipeline_model_parallel_size virtual_pipeline_model_parallel_size num_layers_per_virtual_pipeline_stage
        num_layer_list post_norm num_experts sequence_parallel n_shared_experts qk_layernorm moe_intermediate_size first_k_dense_replace moe_layer_freq multi_head_latent_attention qk_rope_head_dim
        qk_nope_head_dim q_lora_rank kv_lora_rank v_head_dim shared_expert_gate expert_model_parallel_size consumed_train_samples consumed_valid_samples""".split()
    assert not set(want) - set(a)
    assert (a["num_layers"], a["padded_vocab_size"], a["virtual_pipeline_model_parallel_size"], a["params_dtype"]) == (4, 61, 2, torch.bfloat16)
    assert set(got) == {"args", "checkpoint_version", "iteration", "model0", "model1"}


def test_a_checkpoint_of_megatron_itself(home, tmp_path):
    "Args without our key, an optimizer and random states beside the weights, iteration 500, tracker file; then without any args."
    go(home, tmp_path / "mg", "--to mcore --tp 2")
    (tmp_path / "mg/latest_checkpointed_iteration.txt").write_text("500")
    (tmp_path / "mg/iter_0000001").rename(tmp_path / "mg/iter_0000500")
    for p in (tmp_path / "mg").rglob("*.pt"):
        d = torch.load(p, weights_only=False)
        del d["args"].ascend_nb
        d |= dict(optimizer=dict(state={0: dict(exp_avg=torch.ones(3))}), rng_state=[dict(torch_rng_state=torch.get_rng_state(), np_rng_state=np.random.get_state())])
        d["model"]["decoder.layers.0.self_attention.linear_qkv._extra_state"] = torch.zeros(1)
        torch.save(d, p)
    source = open_megatron(tmp_path / "mg")
    assert (source.iteration, source.layout.tp, source.cfg.vocab_size) == ("500", 2, 62)
    go(tmp_path / "mg", tmp_path / "home", "--to hf --hf-config", home)
    same_weights(home, tmp_path / "home")
    go(tmp_path / "mg", tmp_path / "one", "--to legacy --verify")
    for p in (tmp_path / "mg").rglob("*.pt"):
        d = torch.load(p, weights_only=False)
        del d["args"]
        torch.save(d, p)
    go(tmp_path / "mg", tmp_path / "again", "--to hf --hf-config", home)
    same_weights(home, tmp_path / "again")
    with pytest.raises(UserError, match="no args"): go(tmp_path / "mg", tmp_path / "x", "--to legacy")


def test_modellinks_flags(home, tmp_path):
    shutil.copytree(home, tmp_path / "hf")
    go("--model-type GPT --loader llama2_hf --saver megatron --target-tensor-parallel-size 2 --target-pipeline-parallel-size 2 --num-layer-list 3,1 --params-dtype bf16",
       "--load-dir", tmp_path / "hf", "--save-dir", tmp_path / "legacy", "--tokenizer-model None")
    m = torch.load(tmp_path / "legacy/iter_0000001/mp_rank_01_000/model_optim_rng.pt", weights_only=False)["model"]["language_model"]
    assert set(m) == {"embedding", "encoder"} and "layers.2.self_attention.query_key_value.weight" in m["encoder"]
    go("--model-type GPT --load-model-type mg --save-model-type mg --use-mcore-models --load-from-legacy --target-expert-parallel-size 1", "--load-dir", tmp_path / "legacy", "--save-dir", tmp_path / "mcore")
    go("--model-type GPT --load-model-type mg --save-model-type mg --use-mcore-models --save-to-legacy --load-dir", tmp_path / "mcore", "--save-dir", tmp_path / "legacy2")
    assert open_megatron(tmp_path / "legacy2").naming.style == "legacy" and open_megatron(tmp_path / "mcore").naming.style == "core"
    go("--model-type GPT --loader megatron --saver megatron --save-model-type save_huggingface_llama --target-tensor-parallel-size 1 --target-pipeline-parallel-size 1 --load-dir", tmp_path / "legacy2", "--save-dir", tmp_path / "hf")
    same_weights(home, tmp_path / "hf/mg2hf")
    same_weights(home, tmp_path / "hf")


@pytest.mark.parametrize("kind", ["bin", "safetensors"])
@pytest.mark.parametrize("dtype", ["fp16", "fp32", "bf16"])
def test_number_formats_and_bin(tmp_path, kind, dtype):
    make(tmp_path / "hf", llama(), torch.float32, kind=kind)
    go(tmp_path / "hf", tmp_path / "mg", "--to mcore --tp 2 --params-dtype", dtype)
    go(tmp_path / "mg", tmp_path / "home", "--to hf --params-dtype", dtype, "--hf-config", tmp_path / "hf")
    one = torch.load(tmp_path / "hf/pytorch_model.bin") if kind == "bin" else load_file(tmp_path / "hf/model.safetensors")
    two, want = load_file(tmp_path / "home/model.safetensors"), dict(fp16=torch.float16, fp32=torch.float32, bf16=torch.bfloat16)[dtype]
    assert one.keys() == two.keys() and all(torch.equal(one[k].to(want), two[k]) for k in one)
    assert json.loads((tmp_path / "home/config.json").read_text())["torch_dtype"] == str(want)[6:]


def test_extra_tensors_come_home(tmp_path):
    "A tied head and rotary frequencies in the file mean nothing to Megatron and are there again afterwards."
    make(tmp_path / "hf", llama(tie_word_embeddings=True))
    f = tmp_path / "hf/model.safetensors"
    tensors = load_file(f)
    tensors |= {"lm_head.weight": tensors["model.embed_tokens.weight"].clone(), "model.layers.0.self_attn.rotary_emb.inv_freq": torch.arange(4.)}
    save_file(tensors, f, {"format": "pt"})
    go(tmp_path / "hf", tmp_path / "mg", "--to mcore --tp 2 --pp 2")
    go(tmp_path / "mg", tmp_path / "home", "--to hf --verify --hf-config", tmp_path / "hf")
    same_weights(tmp_path / "hf", tmp_path / "home")
    tensors["lm_head.weight"][3] += 1
    save_file(tensors, f, {"format": "pt"})
    with pytest.raises(UserError) as e: go(tmp_path / "hf", tmp_path / "x", "--to mcore")
    assert e.value.key == "copies_differ" and "lm_head" in str(e.value)


def test_transformers_opens_what_came_home(tmp_path):
    "Shards by transformers; home again with nothing but a config.json at hand, as one file and as shards of ours."
    transformers = pytest.importorskip("transformers")
    model = transformers.AutoModelForCausalLM.from_config(transformers.LlamaConfig(**{k: v for k, v in llama().items() if k not in ("architectures", "model_type")}), dtype=torch.bfloat16)
    model.save_pretrained(tmp_path / "hf", max_shard_size="20KB")
    assert len(list((tmp_path / "hf").glob("*.safetensors"))) > 3
    go(tmp_path / "hf", tmp_path / "mg", "--to mcore --tp 2 --pp 2 --verify")
    go(tmp_path / "mg", tmp_path / "same", "--to hf --hf-config", tmp_path / "hf")
    same_weights(tmp_path / "hf", tmp_path / "same")
    (tmp_path / "config").mkdir()
    shutil.copy(tmp_path / "hf/config.json", tmp_path / "config")
    go(tmp_path / "mg", tmp_path / "one", "--to hf --hf-config", tmp_path / "config")
    source = open_megatron(tmp_path / "mg")
    converters.run(source, converters.hf_target(source, tmp_path / "shards", {"config.json": tmp_path / "hf/config.json"}, most=20_000), quiet=True)
    assert len(list((tmp_path / "shards").glob("*.safetensors"))) > 3
    for name in ("one", "shards"):
        back = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / name, dtype=torch.bfloat16).state_dict()
        assert all(torch.equal(v, back[k]) for k, v in model.state_dict().items())


def test_from_hugging_face_to_itself(home, tmp_path):
    go(home, tmp_path / "copy", "--to hf --verify")
    same_weights(home, tmp_path / "copy")
    go(home, tmp_path / "wide", "--to hf --params-dtype fp32")
    one, two = ({k: v for f in d.glob("*.safetensors") for k, v in load_file(f).items()} for d in (home, tmp_path / "wide"))
    assert all(torch.equal(v.float(), two[k]) for k, v in one.items())


def test_vocabulary_filled_up_for_others_is_cut(home, tmp_path):
    go(home, tmp_path / "a", "--to mcore --tp 2 --padded-vocab-size 96")
    go(tmp_path / "a", tmp_path / "b", "--to mcore")
    assert torch.load(tmp_path / "b/iter_0000001/mp_rank_00/model_optim_rng.pt", weights_only=False)["model"]["output_layer.weight"].shape[0] == 61
    go(home, tmp_path / "c", "--to mcore --true-vocab-size 40 --verify")
    assert torch.load(tmp_path / "c/iter_0000001/mp_rank_00/model_optim_rng.pt", weights_only=False)["model"]["output_layer.weight"].shape[0] == 40


def test_killed_and_taken_up_again(home, tmp_path, monkeypatch):
    args = home, tmp_path / "mg", "--to mcore --tp 2 --pp 2"
    real, calls = converters._one, []

    def dies(source, out, *a):
        calls.append(out.name)
        if len(calls) == 3: raise KeyboardInterrupt
        return real(source, out, *a)
    monkeypatch.setattr(converters, "_one", dies)
    with pytest.raises(KeyboardInterrupt): go(*args)
    assert not (tmp_path / "mg").exists()
    monkeypatch.setattr(converters, "_one", real)
    assert go(*args)["resumed_files"] == 2
    go(home, tmp_path / "whole", "--to mcore --tp 2 --pp 2")
    one, two = ({p.relative_to(d): p.read_bytes() for p in sorted(d.rglob("*.pt"))} for d in (tmp_path / "mg", tmp_path / "whole"))
    assert one == two and sorted(p.name for p in tmp_path.iterdir()) == ["mg", "whole"]


def test_another_plan_does_not_take_up_old_files(home, tmp_path, monkeypatch):
    real = converters._one

    def dies(source, out, *a):
        if "001" in out.name.split("/")[1]: raise KeyboardInterrupt
        return real(source, out, *a)
    monkeypatch.setattr(converters, "_one", dies)
    with pytest.raises(KeyboardInterrupt): go(home, tmp_path / "mg", "--to mcore --pp 2")
    monkeypatch.setattr(converters, "_one", real)
    assert go(home, tmp_path / "mg", "--to mcore --pp 4")["resumed_files"] == 0
    assert len(list((tmp_path / "mg").rglob("*.pt"))) == 4


def test_the_source_is_left_alone(home, tmp_path):
    before = {p: (p.stat().st_mtime_ns, p.read_bytes()) for p in home.iterdir()}
    go(home, tmp_path / "mg", "--to legacy --tp 2 --verify")
    assert before == {p: (p.stat().st_mtime_ns, p.read_bytes()) for p in home.iterdir()}


def test_a_wrong_byte_is_found(home, tmp_path, monkeypatch):
    "The disk that stores something else: --verify refuses to give the folder its name."
    real = os.pwrite
    monkeypatch.setattr(converters.os, "pwrite", lambda fd, raw, at: real(fd, bytes(len(raw)) if len(raw) == 48 * 32 * 2 // 2 else raw, at))
    go(home, tmp_path / "blind", "--to mcore --tp 2")
    with pytest.raises(UserError, match="differs from"): go(home, tmp_path / "mg", "--to mcore --tp 2 --verify")
    assert [p.name for p in tmp_path.iterdir()] == ["blind"]


def test_a_full_disk_leaves_nothing(home, tmp_path, monkeypatch):
    def full(fd, raw, at): raise OSError(28, "No space left on device")
    monkeypatch.setattr(converters.os, "pwrite", full)
    with pytest.raises(OSError, match="No space"): go(home, tmp_path / "mg", "--to mcore --tp 2")
    assert not list(tmp_path.iterdir())


def test_older_names(home, tmp_path):
    "Megatron of 2021: transformer, attention, input_layernorm."
    go(home, tmp_path / "mg", "--to legacy --tp 2")
    for p in (tmp_path / "mg").rglob("*.pt"):
        d = torch.load(p, weights_only=False)
        m = d["model"]["language_model"]
        old = lambda k: k.replace("self_attention", "attention").replace("input_norm", "input_layernorm").replace("attention_norm", "attention_layernorm").replace("final_norm", "final_layernorm")
        m["transformer"] = {old(k): v for k, v in m.pop("encoder").items()}
        torch.save(d, p)
    go(tmp_path / "mg", tmp_path / "home", "--to hf --hf-config", home)
    same_weights(home, tmp_path / "home")


def damaged(home, tmp_path, change):
    shutil.copytree(home, tmp_path / "hf")
    change(tmp_path / "hf")
    return tmp_path / "hf"


SHARD = "model-00002-of-00002.safetensors"
DAMAGE = {
    "shard": (lambda d: (d / SHARD).unlink(), "names model-00002"),
    "cut": (lambda d: (d / SHARD).write_bytes((d / SHARD).read_bytes()[:-7]), "model-00002-of-00002.safetensors"),
    "tensor": (lambda d: save_file({k: v for k, v in load_file(d / SHARD).items() if "layers.1.mlp.up" not in k and "layers.0.mlp.up" not in k}, d / SHARD), "up_proj"),
    "extra": (lambda d: save_file(load_file(d / SHARD) | {"model.layers.9.x": torch.ones(1)}, d / SHARD), "Unexpected: model.layers.9.x"),
    "shape": (lambda d: (d / "config.json").write_text(json.dumps(json.loads((d / "config.json").read_text()) | dict(intermediate_size=40))), "Wrong shape"),
    "vocab": (lambda d: (d / "config.json").write_text(json.dumps(json.loads((d / "config.json").read_text()) | dict(vocab_size=60))), "embed_tokens.weight .61, 32., expected .60, 32."),
    "family": (lambda d: (d / "config.json").write_text(json.dumps(json.loads((d / "config.json").read_text()) | dict(model_type="elephant"))), "elephant"),
    "config": (lambda d: (d / "config.json").write_text("nonsense"), "not JSON"),
}


@pytest.mark.parametrize("what", DAMAGE)
def test_damaged_sources_are_named(home, tmp_path, what):
    change, words = DAMAGE[what]
    with pytest.raises(UserError, match=words): go(damaged(home, tmp_path, change), tmp_path / "out", "--to mcore")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["hf"]


def test_no_index_leads_out_of_its_folder(home, tmp_path):
    "Neither is read what lies beside the folder, nor written beside the target, whichever folder the index belongs to."
    go(home, tmp_path / "mg", "--to mcore")
    evil = damaged(home, tmp_path, lambda d: (d / SHARD).rename(d.parent / "x.safetensors"))
    index = evil / "model.safetensors.index.json"
    index.write_text(index.read_text().replace(SHARD, "../x.safetensors"))
    before = sorted(tmp_path.rglob("*"))
    for command in ((evil, tmp_path / "out/in", "--to mcore"), (tmp_path / "mg", tmp_path / "out/in", "--to hf --hf-config", evil)):
        with pytest.raises(UserError, match=r"names \.\./x\.safetensors; expected names of files in the same folder"): go(*command)
    assert sorted(p for p in tmp_path.rglob("*") if p.name != "out") == before


WRONG = {
    "--to mcore --tp 4": "2 key/value heads", "--to mcore --tp 3": "tensor parallel size 3", "--to mcore --pp 3": "4 layers for pp 3", "--to mcore --pp 2 --num-layer-list 1,2": "add up to 4",
    "--to mcore --pp 2 --num-layer-list 2,2 --num-layers-per-virtual-pipeline-stage 1": "both", "--to mcore --noop-layers 9": "noop", "--to mcore --ep 2": "expert parallel size 2",
    "--to mcore --load-model-type mg": "expected mg", "--to mcore --model-type-hf bloom": "this is a llama", "--to mcore --model-type-hf lama2": "Did you mean llama2", "--to mcore --post-norm": "post_norms=False",
    "": "--to hf", "--to hf --hf-config /nowhere": "nowhere", "--to mcore --tp 2 --padded-vocab-size 61": "rows of the vocabulary", "--to mcore --tokenizer-model /nowhere/tokenizer.model": "nowhere",
}


@pytest.mark.parametrize("flags", WRONG)
def test_wrong_flags_are_named(home, tmp_path, flags):
    with pytest.raises(UserError, match=WRONG[flags]): go(home, tmp_path / "out", flags)
    assert not list(tmp_path.iterdir())


def test_damaged_checkpoints_are_named(home, tmp_path):
    go(home, tmp_path / "mg", "--to mcore --tp 2 --pp 2")
    one = tmp_path / "mg/iter_0000001/mp_rank_01_001"
    one.rename(tmp_path / "aside")
    with pytest.raises(UserError, match="2 x 2 x 1"): go(tmp_path / "mg", tmp_path / "out", "--to legacy")
    (tmp_path / "aside").rename(one)
    d = torch.load(one / "model_optim_rng.pt", weights_only=False)
    d["model"].pop("decoder.layers.0.mlp.linear_fc2.weight")
    torch.save(d, one / "model_optim_rng.pt")
    with pytest.raises(UserError, match="Missing: model/decoder.layers.0.mlp.linear_fc2.weight"): go(tmp_path / "mg", tmp_path / "out", "--to legacy")
    (tmp_path / "mg/latest_checkpointed_iteration.txt").write_text("7")
    with pytest.raises(UserError, match="iter_0000007"): go(tmp_path / "mg", tmp_path / "out", "--to legacy")
    (tmp_path / "text").mkdir()
    (tmp_path / "text/readme.txt").write_text("hello")
    with pytest.raises(UserError, match="no checkpoint"): go(tmp_path / "text", tmp_path / "out", "--to legacy")


def test_ranks_that_should_agree(home, tmp_path):
    go(home, tmp_path / "mg", "--to mcore --tp 2")
    p = tmp_path / "mg/iter_0000001/mp_rank_01/model_optim_rng.pt"
    d = torch.load(p, weights_only=False)
    d["model"]["decoder.final_layernorm.weight"][0] += 1
    torch.save(d, p)
    with pytest.raises(UserError, match="final_layernorm"): go(tmp_path / "mg", tmp_path / "out", "--to legacy")


def test_other_models_config_on_the_way_home(home, tmp_path):
    make(tmp_path / "other", llama(vocab_size=80))
    make(tmp_path / "deeper", llama(num_hidden_layers=5))
    go(home, tmp_path / "mg", "--to mcore")
    with pytest.raises(UserError, match="61 rows"): go(tmp_path / "mg", tmp_path / "out", "--to hf --hf-config", tmp_path / "other")
    with pytest.raises(UserError, match="expected 5"): go(tmp_path / "mg", tmp_path / "out", "--to hf --hf-config", tmp_path / "deeper")
    with pytest.raises(UserError, match="--hf-config"): go(tmp_path / "mg", tmp_path / "out", "--to hf")


def test_dry_run_writes_nothing(home, tmp_path, capsys):
    assert go(home, tmp_path / "mg", "--to mcore --tp 2 --dry-run") == {}
    out = capsys.readouterr().out
    assert "tp 1: q2 q3 k1 v1" in out and "linear_fc1.weight [48, 32] bf16 <- model.layers.0.mlp.gate_proj.weight[0:24, 0:32] + model.layers.0.mlp.up_proj.weight[0:24, 0:32]" in out
    assert not list(tmp_path.iterdir())


def test_memory_stays_bounded(tmp_path):
    "A tensor of 64 MB passes through with less than a third of that above what the program itself takes."
    code = "import sys; from ascend_nb.cli import main; main(['convert', *sys.argv[1:]]); print(open('/proc/self/status').read().split('VmHWM:')[1].split()[0])"
    rss = []
    if not os.path.exists("/proc/self/status"): pytest.skip("no /proc here to read the peak of memory from")
    for rows in (16, 16384):
        make(tmp_path / f"hf{rows}", llama(hidden_size=2048, head_dim=512, num_hidden_layers=1, vocab_size=rows))
        r = subprocess.run([sys.executable, "-c", code, str(tmp_path / f"hf{rows}"), str(tmp_path / f"mg{rows}"), "--to", "mcore", "--tp", "2"], capture_output=True, text=True, check=True)
        rss.append(int(r.stdout.split()[-1]) // 1024)
    assert rss[1] - rss[0] < 20, rss


def test_no_torch_is_needed():
    r = subprocess.run([sys.executable, "-c", "import ascend_nb.convert, sys; print('torch' in sys.modules)"], capture_output=True, text=True, check=True)
    assert r.stdout.strip() == "False"


MOE = dict(num_experts=4, num_experts_per_tok=2, moe_intermediate_size=24)
MLA = dict(kv_lora_rank=16, qk_nope_head_dim=8, qk_rope_head_dim=4, v_head_dim=8, num_key_value_heads=4, head_dim=4)
SHAPES = { # what differs between families, without the families' names
    "biases": dict(attention_bias=True, attention_out_bias=True, mlp_bias=True, tie_word_embeddings=False),
    "gpt2": dict(norm_type="layernorm", mlp_gated=False, position_embedding="learned", attention_bias=True, attention_out_bias=True, mlp_bias=True, hidden_act="gelu", num_key_value_heads=4),
    "bloom": dict(norm_type="layernorm", mlp_gated=False, position_embedding="alibi", embed_norm=True, attention_bias=True, attention_out_bias=True, mlp_bias=True, hidden_act="gelu", num_key_value_heads=4),
    "gemma2": dict(post_norms=True, norm_plus_one=True, hidden_act="gelu_pytorch_tanh"),
    "qwen3": dict(qk_norm=True, tie_word_embeddings=False),
    "mixtral": dict(MOE, tie_word_embeddings=False),
    "qwen2_moe": dict(MOE, tie_word_embeddings=False, shared_expert_intermediate_size=40, shared_expert_gate=True, attention_bias=True, mlp_only_layers=[1]),
    "deepseek_v2": dict(MOE, **MLA, tie_word_embeddings=False, q_lora_rank=20, shared_expert_intermediate_size=48, first_k_dense_replace=1),
    "deepseek_v2_lite": dict(MOE, **MLA, tie_word_embeddings=False, shared_expert_intermediate_size=48, first_k_dense_replace=1),
    "deepseek_v3": dict(MOE, **MLA, tie_word_embeddings=False, q_lora_rank=20, shared_expert_intermediate_size=48, first_k_dense_replace=2, topk_method="noaux_tc", scoring_func="sigmoid"),
}
NAMINGS = [Naming("legacy"), Naming("core"), Naming("core", grouped=True), Naming("core", "mindspeed", True), Naming("engine", "megatron"), Naming("core", "megatron")]


def shaped(tmp_path, kw):
    "Random weights of a shape, named as canonical parameters are in a Hugging Face folder."
    cfg = ModelConfig(**{**BASE, **kw}) if isinstance(kw, dict) else kw
    g = np.random.default_rng(3)
    tensors = {p.stored.name: torch.from_numpy(g.standard_normal(p.stored.shape).astype(np.float32)).bfloat16() for p in hf_placed(cfg)}
    (tmp_path / "hf").mkdir()
    save_file(tensors, tmp_path / "hf/model.safetensors", {"format": "pt"})
    return cfg, open_hf(tmp_path / "hf", cfg), tensors


@pytest.mark.parametrize("naming", NAMINGS, ids=lambda n: "-".join(map(str, n)))
@pytest.mark.parametrize("name", SHAPES)
def test_shapes_of_all_families(tmp_path, name, naming):
    cfg, source, _ = shaped(tmp_path, SHAPES[name])
    moe, shared = bool(cfg.num_experts), bool(cfg.kv_lora_rank) and (not cfg.q_lora_rank) and naming.dialect != "megatron"
    for i, (tp, pp, ep, more) in enumerate([(1, 1, 1, {}), (2, 2, 1, {}), (1, 2, 2, dict(per_chunk=1)), (2, 1, 4, {}), (2, 3, 2, dict(noop=(0, 3)))]):
        if ep > 1 and not moe: ep = 1
        if shared: tp = 1
        target = converters.megatron_target(source, tmp_path / f"mg{i}", Layout(4, tp, pp, ep, **more), naming, vocab=64)
        target.reopen = lambda d: open_megatron(d, cfg)
        paper = converters.run(source, target, verify=True, quiet=True)
        assert paper["verified"]["bitwise_equal"] == len(source.parts())
        back = open_megatron(tmp_path / f"mg{i}")
        assert canonical_shapes(back.cfg) == canonical_shapes(cfg) and back.naming.style == naming.style
        converters.run(back, converters.hf_target(back, tmp_path / f"home{i}", {}, {"model.safetensors": converters.hf_files(tmp_path / "hf")["model.safetensors"]}), quiet=True)
        same_weights(tmp_path / "hf", tmp_path / f"home{i}")


@pytest.mark.parametrize("name", SHAPES)
def test_the_model_is_known_from_megatrons_args_alone(name):
    cfg = ModelConfig(**{**BASE, **SHAPES[name]})
    args = megatron_args(cfg, Layout(4, pp=2, noop=(1, 4)), 61, Word("torch", "bfloat16"))
    del args.ascend_nb
    assert canonical_shapes(config_from_args(args, 61)) == canonical_shapes(cfg)


def family_shape(name):
    "A small model of a family, with what its row says that it always has."
    row = FAMILIES[name]
    kw = dict(BASE, model_type=name, **row.fixed)
    if "{e}" in row.names: kw |= MOE | (dict(shared_expert_intermediate_size=40) if "shared" in row.names else {}) | (dict(shared_expert_gate=True) if "shared_expert_gate" in row.names else {})
    if "kv_a_proj" in row.names: kw |= MLA | dict(q_lora_rank=20, first_k_dense_replace=1)
    if name in ("qwen2_moe",): kw["mlp_only_layers"] = [1]
    return ModelConfig(**{**kw, "tie_word_embeddings": name in ("gemma", "gemma2", "bloom", "gpt2", "minicpm"), **row.fixed})


@pytest.mark.parametrize("name", FAMILIES)
def test_every_family_comes_home(tmp_path, name):
    "In the family's own names and packings: legacy, core, Transformer Engine, tensor and pipeline ranks."
    cfg = family_shape(name)
    source = shaped(tmp_path, cfg)[1]
    assert {p for b in source.stored for p in [x.part[0] for x in b.blocks]} == set(canonical_shapes(cfg))
    at = source
    for i, (naming, tp, pp) in enumerate([(Naming("legacy"), 2, 2), (Naming("core", grouped=True), 1, 4), (Naming("engine", "megatron"), 2, 1)]):
        target = converters.megatron_target(at, tmp_path / str(i), Layout(4, tp, pp), naming)
        target.reopen = lambda d: open_megatron(d, cfg)
        converters.run(at, target, verify=True, quiet=True)
        at = open_megatron(tmp_path / str(i), cfg)
    like = {"model.safetensors": converters.hf_files(tmp_path / "hf")["model.safetensors"]}
    target = converters.hf_target(at, tmp_path / "home", {}, like)
    target.reopen = lambda d: open_hf(d, cfg)
    converters.run(at, target, verify=True, quiet=True)
    same_weights(tmp_path / "hf", tmp_path / "home")


@pytest.mark.parametrize("name", [k for k, f in FAMILIES.items() if f.prefix])
def test_names_without_their_beginning(tmp_path, name):
    "The first GPT-2 and Bloom: no `transformer.`, masks beside the weights."
    cfg = family_shape(name)
    tensors = {k.removeprefix(FAMILIES[name].prefix): v for k, v in shaped(tmp_path, cfg)[2].items()}
    if name == "gpt2": tensors["h.0.attn.bias"] = torch.ones(1, 1, 8, 8)
    save_file(tensors, tmp_path / "hf/model.safetensors", {"format": "pt"})
    source = open_hf(tmp_path / "hf", cfg)
    converters.run(source, converters.megatron_target(source, tmp_path / "mg", Layout(4, tp=2), Naming()), quiet=True)
    back = open_megatron(tmp_path / "mg", cfg)
    converters.run(back, converters.hf_target(back, tmp_path / "home", {}, converters.hf_files(tmp_path / "hf")), quiet=True)
    same_weights(tmp_path / "hf", tmp_path / "home")


def load(folder, *rank): return torch.load(folder / f"iter_0000001/{rank[0]}/model_optim_rng.pt", weights_only=False)["model"]


def test_grouped_experts_are_views_of_transposed_matrices(tmp_path):
    "weight1 and weight2 as Megatron's GroupedMLP looks at them."
    cfg, source, hf = shaped(tmp_path, SHAPES["mixtral"])
    converters.run(source, converters.megatron_target(source, tmp_path / "mg", Layout(4, ep=2), Naming(grouped=True)), quiet=True)
    gate, up, down = (hf[f"model.layers.2.mlp.experts.{x}_proj"] for x in ("gate", "up", "down"))
    for e in range(2):
        m = load(tmp_path / "mg", f"mp_rank_00_{e:03d}")
        w1, w2 = m["decoder.layers.2.mlp.experts.weight1"], m["decoder.layers.2.mlp.experts.weight2"]
        assert w1.shape == (32, 2 * 48) and w2.shape == (2 * 24, 32)
        for j, (a, b) in enumerate(zip(w1.view(2, 32, 48), w2.view(2, 24, 32), strict=True)):
            assert torch.equal(a, torch.cat([gate[2 * e + j], up[2 * e + j]]).T) and torch.equal(b, down[2 * e + j].T)
        assert torch.equal(m["decoder.layers.2.mlp.router.weight"], hf["model.layers.2.mlp.router.weight"])


def test_experts_one_by_one_on_tensor_ranks(tmp_path):
    cfg, source, hf = shaped(tmp_path, SHAPES["qwen2_moe"])
    converters.run(source, converters.megatron_target(source, tmp_path / "mg", Layout(4, tp=2, ep=2), Naming()), quiet=True)
    m = load(tmp_path / "mg", "mp_rank_01_001")
    at = "decoder.layers.0.mlp.experts.local_experts.1."
    gate, up, down = (hf[f"model.layers.0.mlp.experts.{x}_proj"][3] for x in ("gate", "up", "down"))
    assert torch.equal(m[at + "linear_fc1.weight"], torch.cat([gate.chunk(2)[1], up.chunk(2)[1]])) and torch.equal(m[at + "linear_fc2.weight"], down.chunk(2, 1)[1])
    assert torch.equal(m["decoder.layers.0.mlp.shared_expert_gate.weight"], hf["model.layers.0.mlp.shared_expert_gate.weight"])
    assert torch.equal(m["decoder.layers.0.mlp.shared_experts.linear_fc2.weight"], hf["model.layers.0.mlp.shared_expert.down_proj.weight"].chunk(2, 1)[1])
    assert "decoder.layers.1.mlp.linear_fc1.weight" in m and "decoder.layers.1.mlp.router.weight" not in m


@pytest.mark.parametrize("dialect", ["modellink", "mindspeed", "megatron"])
def test_latent_attention_in_three_dialects(tmp_path, dialect):
    cfg, source, hf = shaped(tmp_path, SHAPES["deepseek_v3"])
    converters.run(source, converters.megatron_target(source, tmp_path / "mg", Layout(4, tp=2), Naming("core", dialect)), quiet=True)
    m, a, at = load(tmp_path / "mg", "mp_rank_01"), "model.layers.3.self_attn.", "decoder.layers.3.self_attention."
    names = {k.removeprefix(at) for k in m if k.startswith(at)}
    fused = torch.cat([hf[f"{a}q_a_proj.weight"], hf[f"{a}kv_a_proj_with_mqa.weight"]])
    want = dict(modellink={"linear_qkv.weight", "linear_qb.weight", "linear_kvb.weight", "q_layernorm.weight", "k_layernorm.weight", "linear_proj.weight"},
                mindspeed={"linear_qkv.weight", "linear_q_up_proj.weight", "linear_kv_up_proj.weight", "q_layernorm.weight", "kv_layernorm.weight", "linear_proj.weight"},
                megatron={"linear_q_down_proj.weight", "linear_kv_down_proj.weight", "linear_q_up_proj.weight", "linear_kv_up_proj.weight", "q_layernorm.weight", "kv_layernorm.weight", "linear_proj.weight"})
    assert names == want[dialect]
    if dialect != "megatron": assert torch.equal(m[at + "linear_qkv.weight"], fused)
    up = "linear_qb.weight" if dialect == "modellink" else "linear_q_up_proj.weight"
    assert torch.equal(m[at + up], hf[f"{a}q_b_proj.weight"].chunk(2)[1])
    assert torch.equal(m["decoder.layers.3.mlp.router.expert_bias"], hf["model.layers.3.mlp.router.e_score_correction_bias"])


def test_latent_attention_that_cannot_be_cut(tmp_path):
    cfg, source, _ = shaped(tmp_path, SHAPES["deepseek_v2_lite"])
    with pytest.raises(UserError, match="expected 1"): converters.megatron_target(source, tmp_path / "mg", Layout(4, tp=2), Naming())


def test_nothing_is_dropped(tmp_path):
    "A plan without the experts does not add up."
    cfg, source, _ = shaped(tmp_path, SHAPES["mixtral"])
    target = converters.megatron_target(source, tmp_path / "mg", Layout(4), Naming())
    for f in target.files:
        f.placed = {k: p for k, p in f.placed.items() if "local_experts" not in k}
        f.layout.tensors = [t for t in f.layout.tensors if "local_experts" not in t.name]
    with pytest.raises(UserError, match="Not used: .*experts"): converters.run(source, target)
    assert [p.name for p in tmp_path.iterdir()] == ["hf"]


SMALL = dict(vocab_size=64, hidden_size=32, intermediate_size=48, num_hidden_layers=4, num_attention_heads=4, num_key_value_heads=2, max_position_embeddings=64, pad_token_id=0, bos_token_id=1, eos_token_id=2)
EXPERTS = dict(num_experts=4, num_experts_per_tok=2, moe_intermediate_size=24)
LATENT = dict(n_routed_experts=4, num_experts_per_tok=2, moe_intermediate_size=24, n_shared_experts=2, first_k_dense_replace=1, kv_lora_rank=16, q_lora_rank=20, qk_nope_head_dim=8,
              qk_rope_head_dim=4, v_head_dim=8, n_group=1, topk_group=1, num_key_value_heads=4)
TINY = { # model_type -> what transformers' config takes
    "mistral": SMALL, "qwen2": SMALL | dict(tie_word_embeddings=True), "qwen3": SMALL | dict(head_dim=8), "gemma": SMALL | dict(head_dim=8), "gemma2": SMALL | dict(head_dim=8, query_pre_attn_scalar=8),
    "phi3": SMALL, "glm": SMALL | dict(head_dim=8), "glm4": SMALL | dict(head_dim=8), "bloom": dict(vocab_size=64, hidden_size=32, n_layer=4, n_head=4), "gpt2": dict(vocab_size=64, n_embd=32, n_layer=4, n_head=4, n_positions=64),
    "mixtral": SMALL | dict(num_local_experts=4), "qwen2_moe": SMALL | EXPERTS | dict(shared_expert_intermediate_size=40), "qwen3_moe": SMALL | EXPERTS | dict(head_dim=8),
    "deepseek_v2": SMALL | LATENT, "deepseek_v3": SMALL | LATENT}


def runs(folder):
    "Does the decoder on this branch know the family already?"
    from ascend_nb.hf_format import load_model
    try: load_model(folder)
    except Exception: return False
    return True


@pytest.mark.parametrize("name", [k for k in TINY if k in FAMILIES])
def test_folders_of_transformers(tmp_path, name):
    "Written by transformers in shards, converted by the command, home again byte for byte."
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    model = transformers.AutoModelForCausalLM.from_config(transformers.AutoConfig.for_model(name, **TINY[name]), dtype=torch.float32)
    model.save_pretrained(tmp_path / "hf", max_shard_size="60KB")
    verify = "--verify" if runs(tmp_path / "hf") else ""
    for to in ("legacy --tp 2 --pp 2", "mcore --moe-grouped-gemm --pp 2", "mcore --tp 2 --transformer-impl transformer_engine --dialect megatron"):
        go(tmp_path / "hf", tmp_path / "mg", "--to", to, verify)
        go(tmp_path / "mg", tmp_path / "home", "--to hf --hf-config", tmp_path / "hf", verify)
        same_weights(tmp_path / "hf", tmp_path / "home")
        shutil.rmtree(tmp_path / "mg")
        shutil.rmtree(tmp_path / "home")
