"""megatron-core's own GPTModel on this machine's processors: reads a checkpoint, scores a prompt, and saves what it holds. A program of its own, because it bends torch.cuda to run without one.

    python tests/megatron_peer.py CHECKPOINT OUT [CHECKPOINT OUT …]     # OUT: logits.pt, and a checkpoint as Megatron lays it out; all for one number of processes
"""
import contextlib
import os
import sys
import types
from pathlib import Path

import torch
import torch.distributed as dist
import torch.multiprocessing as mp


def bend():
    "What GPTModel asks of a GPU although it is told to begin on the CPU."
    torch.cuda.current_device = lambda: "cpu"
    gmm = types.ModuleType("grouped_gemm") # the definition of its one operator; the real one needs CUDA
    gmm.ops = types.SimpleNamespace(gmm=lambda a, b, sizes, trans_b=False: torch.cat([x @ (w.T if trans_b else w) for x, w in zip(a.split(sizes.tolist()), b, strict=True)]))
    sys.modules["grouped_gemm"] = gmm
    from megatron.core.tensor_parallel import random
    from megatron.core.transformer.moe import moe_utils
    vars(moe_utils).setdefault("te_general_gemm", None) # 0.16 names it only where Transformer Engine is
    random.CudaRNGStatesTracker.fork = lambda self, *a, **kw: contextlib.nullcontext()


def build(a, first, last):
    "The model that the checkpoint's args describe, as Megatron's pretrain_gpt.py would."
    from megatron.core.models.gpt.gpt_layer_specs import get_gpt_layer_local_spec
    from megatron.core.models.gpt.gpt_model import GPTModel
    from megatron.core.transformer.transformer_config import TransformerConfig
    grouped = bool(a.num_experts and a.peer_grouped)
    moe = dict(num_moe_experts=a.num_experts, moe_router_topk=a.moe_router_topk, moe_ffn_hidden_size=a.moe_intermediate_size or a.ffn_hidden_size, moe_token_dispatcher_type="alltoall" if a.expert_model_parallel_size > 1 else "allgather",
               moe_router_load_balancing_type="none", moe_aux_loss_coeff=0.0, moe_grouped_gemm=grouped) if a.num_experts else {}
    cfg = TransformerConfig(num_layers=a.num_layers, hidden_size=a.hidden_size, ffn_hidden_size=a.ffn_hidden_size, num_attention_heads=a.num_attention_heads, num_query_groups=a.num_query_groups,
                            kv_channels=a.kv_channels, normalization=a.normalization, layernorm_epsilon=a.norm_epsilon, gated_linear_unit=a.swiglu, activation_func=torch.nn.functional.silu,
                            add_bias_linear=a.add_bias_linear, add_qkv_bias=a.add_qkv_bias, rotary_interleaved=False, hidden_dropout=0.0, attention_dropout=0.0, use_cpu_initialization=True, perform_initialization=False,
                            params_dtype=torch.float32, pipeline_dtype=torch.float32, tensor_model_parallel_size=a.tensor_model_parallel_size, pipeline_model_parallel_size=a.pipeline_model_parallel_size,
                            expert_model_parallel_size=a.expert_model_parallel_size, bias_activation_fusion=False, bias_dropout_fusion=False, apply_rope_fusion=False, masked_softmax_fusion=False, gradient_accumulation_fusion=False, **moe)
    spec = get_gpt_layer_local_spec(a.num_experts or None, grouped, a.qk_layernorm, normalization="RMSNorm")
    return GPTModel(cfg, spec, a.padded_vocab_size, a.max_position_embeddings, first, last, parallel_output=False, share_embeddings_and_output_weights=not a.untie_embeddings_and_output_weights,
                    position_embedding_type="rope", rotary_percent=1.0, rotary_base=a.rotary_base).eval()


def one(ckpt, out):
    "Load, score, save; this rank's part."
    from megatron.core import parallel_state as ps
    t, p, e = ps.get_tensor_model_parallel_rank(), ps.get_pipeline_model_parallel_rank(), ps.get_expert_model_parallel_rank()
    _, pp, ep = sizes(ckpt)
    name = f"mp_rank_{t:02d}" + (f"_{p:03d}" if pp > 1 else "") + (f"_{e:03d}" if ep > 1 else "")
    saved = torch.load(ckpt / f"iter_0000001/{name}/model_optim_rng.pt", weights_only=False)
    a, first, last = saved["args"], p == 0, p == pp - 1
    a.peer_grouped = any("experts.weight1" in k for k in saved["model"])
    model = build(a, first, last)
    model.config.bf16 = a.peer_grouped # 0.16's grouped experts insist on the word; the numbers stay fp32
    missing, extra = model.load_state_dict(saved["model"], strict=False)
    assert not extra and all(k.endswith("_extra_state") for k in missing), (missing, extra)
    ids = torch.load(ckpt.parent / "ids.pt")
    B, S = ids.shape
    with torch.no_grad():
        if not first:
            hidden = torch.empty(S, B, a.hidden_size)
            dist.recv(hidden, ps.get_pipeline_model_parallel_prev_rank())
            model.set_input_tensor(hidden)
        mask = torch.ones(S, S, dtype=torch.bool).triu(1)[None, None] # True: may not be seen
        y = model(ids, torch.arange(S).expand(B, S), mask)
        if not last: dist.send(y.contiguous(), ps.get_pipeline_model_parallel_next_rank())
    folder = out / f"iter_0000001/{name}"
    folder.mkdir(parents=True)
    if last and t == 0 and e == 0: torch.save(y, out / "logits.pt")
    if folder.name.startswith("mp_rank_00"): (out / "latest_checkpointed_iteration.txt").write_text("1")
    del a.ascend_nb, a.peer_grouped
    torch.save(dict(args=a, checkpoint_version=3.0, iteration=1, model=model.state_dict()), folder / "model_optim_rng.pt")


def sizes(ckpt):
    "Tensor, pipeline and expert ranks of a checkpoint."
    a = torch.load(next(ckpt.rglob("model_optim_rng.pt")), weights_only=False)["args"]
    return a.tensor_model_parallel_size, a.pipeline_model_parallel_size, a.expert_model_parallel_size


def work(rank, world, jobs):
    "One process: its part of every checkpoint."
    torch.set_num_threads(1)
    bend()
    dist.init_process_group("gloo", init_method=f"file://{jobs[0][1]}.meet", rank=rank, world_size=world)
    from megatron.core import __version__
    from megatron.core import parallel_state as ps
    if not rank: print("core", __version__)
    for ckpt, out in jobs:
        tp, pp, ep = sizes(ckpt)
        ps.initialize_model_parallel(tp, pp, expert_model_parallel_size=ep, **(dict(expert_tensor_parallel_size=tp) if ep > 1 else {}))
        one(ckpt, out)
        dist.barrier()
        ps.destroy_model_parallel()
    if world > 1: os._exit(0) # gloo's many groups wait for each other when an interpreter ends


def main():
    paths = [Path(p) for p in sys.argv[1:]]
    jobs = list(zip(paths[::2], paths[1::2], strict=True))
    (world,) = {pp * max(tp, ep) for tp, pp, ep in (sizes(c) for c, _ in jobs)}
    if world == 1: work(0, 1, jobs)
    else: mp.spawn(work, (world, jobs), world)


if __name__ == "__main__": main()
