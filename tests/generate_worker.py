"""One of many processes of tests/test_spread_generate.py: a model that lies in all of them against the same model in one."""
import json
import os
import sys

import torch

from ascend_nb.config import ParallelConfig, SampleConfig
from ascend_nb.core import UserError
from ascend_nb.evaluator import evaluate
from ascend_nb.generate import Memory, next_ids
from ascend_nb.many_devices import open_model, shape_of
from ascend_nb.mesh import Mesh, check, join, leave
from ascend_nb.tokenizers import load_tokenizer

BASE = dict(vocab_size=4096, hidden_size=64, num_hidden_layers=4, num_attention_heads=4, num_key_value_heads=2, intermediate_size=96, max_position_embeddings=512, initializer_range=.2)
SHAPES = dict(
    dense=dict(BASE, model_type="qwen2", attention_bias=True),
    tied=dict(BASE, model_type="llama", tie_word_embeddings=True),
    moe=dict(BASE, model_type="qwen2_moe", attention_bias=True, num_experts=4, num_experts_per_tok=2, moe_intermediate_size=32, shared_expert_intermediate_size=32, shared_expert_gate=True,
             tie_word_embeddings=False),
    mla=dict(BASE, model_type="deepseek_v3", num_key_value_heads=4, kv_lora_rank=16, q_lora_rank=24, qk_nope_head_dim=8, qk_rope_head_dim=8, v_head_dim=12, tie_word_embeddings=False,
             num_experts=4, num_experts_per_tok=2, moe_intermediate_size=32, shared_expert_intermediate_size=32, first_k_dense_replace=1, scoring_func="sigmoid", topk_method="noaux_tc",
             n_group=2, topk_group=1, norm_topk_prob=True, routed_scaling_factor=1.5),
    gpt2=dict(BASE, model_type="gpt2", norm_type="layernorm", mlp_gated=False, hidden_act="gelu_pytorch_tanh", position_embedding="learned", mlp_bias=True, attention_bias=True,
              attention_out_bias=True, num_key_value_heads=4, intermediate_size=256),
    bloom=dict(BASE, model_type="bloom", norm_type="layernorm", position_embedding="alibi", embed_norm=True, mlp_gated=False, hidden_act="gelu_pytorch_tanh", mlp_bias=True,
               attention_bias=True, attention_out_bias=True, num_key_value_heads=4, intermediate_size=256),
    gemma=dict(BASE, model_type="gemma2", norm_plus_one=True, post_norms=True, hidden_act="gelu_pytorch_tanh", final_logit_softcapping=10., attn_logit_softcapping=20., embedding_multiplier=8.,
               attention_scale=16**-.5, sliding_window=8, layer_types=["sliding_attention", "full_attention"] * 2, tie_word_embeddings=True),
)
PROMPTS = [[5, 6, 7], list(range(40, 61)), [*range(40, 52), 9]]  # the last begins like the one before: its beginning is not read again


def words(model, **how):
    "Token ids behind every prompt, one memory for all."
    cfg, memory = SampleConfig(max_new_tokens=10, **how), Memory(model)
    g = torch.Generator().manual_seed(cfg.seed)
    return [list(next_ids(model, ids, cfg, 10, memory, g)) for ids in PROMPTS]


def case(row, world, tok):
    one = open_model(row["folder"])
    p = ParallelConfig(tensor_model_parallel_size=row.get("tp", 1), pipeline_model_parallel_size=row.get("pp", 1))
    mesh = Mesh(check(p, world, model=shape_of(row["folder"])))
    many = open_model(row["folder"], mesh=mesh)
    out = dict(held=sum(t.numel() for t in many.stage.state_dict().values()) / sum(t.numel() for t in one.state_dict().values()))
    drawn = dict(task="do_sample", temperature=1., top_k=40, top_p=.95)
    if "words" in row["ask"]: out["words"] = [words(m, **how) for how in ({}, drawn) for m in (one, many)]
    if "scores" in row["ask"]:
        a, b = (evaluate(m, tok, "mmlu_continuation", row["quiz"], 0, 4, quiet=True) for m in (one, many))
        far = max(abs(x - y) for s, t in zip(a["samples"], b["samples"], strict=True) for x, y in zip(s["logprobs"], t["logprobs"], strict=True))
        out |= dict(far=far, results=[r["results"] for r in (a, b)], questions=len(b["samples"]))
    return out


if __name__ == "__main__":
    r, _ = join(), torch.set_num_threads(1)
    tok = load_tokenizer(sys.argv[2])
    for row in json.loads(sys.argv[1]):
        try: out = case(row, r.world_size, tok)
        except UserError as e: out = dict(error=e.text("en"))
        print(json.dumps(dict(row=row, **out)), flush=True)
    leave()
    os._exit(0)  # gloo's threads sometimes abort an interpreter that is done
