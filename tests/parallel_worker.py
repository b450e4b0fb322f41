"""One of many processes of tests/test_parallel.py: every case against one process with the whole model, in the same program."""
import json
import os
import sys
import zlib
from dataclasses import replace

import numpy as np
import torch

from ascend_nb.adapter_runs import fits, plan_adapter, put_plan, rates
from ascend_nb.callbacks import Checkpointer
from ascend_nb.checkpoint import RunDir
from ascend_nb.config import ModelConfig, ParallelConfig, RunConfig, TrainConfig, TuneConfig
from ascend_nb.core import UserError
from ascend_nb.datasets import Batch, Loader, Sample, collate_gpt
from ascend_nb.engine import Engine, build_stages
from ascend_nb.losses import causal_lm_loss
from ascend_nb.mesh import Mesh, Sizes, check, join, leave
from ascend_nb.neftune import add_noise
from ascend_nb.parallel_trainer import ParallelTrainer

V = 96
DTYPES = dict(fp32="float32", bf16="bfloat16", fp16="float16")
BASE = dict(vocab_size=V, hidden_size=64, num_hidden_layers=4, num_attention_heads=4, num_key_value_heads=2, intermediate_size=96)
SHAPES = dict(
    dense=dict(BASE, qk_norm=True, attention_bias=True),
    llama=dict(BASE, tie_word_embeddings=False),
    gpt2=dict(BASE, norm_type="layernorm", mlp_gated=False, hidden_act="gelu_pytorch_tanh", position_embedding="learned", mlp_bias=True, attention_bias=True,
              attention_out_bias=True, num_key_value_heads=4, max_position_embeddings=64),
    gemma=dict(BASE, norm_plus_one=True, post_norms=True, hidden_act="gelu_pytorch_tanh", final_logit_softcapping=10., embedding_multiplier=8.),
    bloom=dict(BASE, norm_type="layernorm", position_embedding="alibi", embed_norm=True, mlp_gated=False, hidden_act="gelu_pytorch_tanh", num_key_value_heads=4),
    moe=dict(BASE, num_experts=4, num_experts_per_tok=2, moe_intermediate_size=32, shared_expert_intermediate_size=32, shared_expert_gate=True),
    mla=dict(BASE, num_key_value_heads=4, kv_lora_rank=16, q_lora_rank=24, qk_nope_head_dim=8, qk_rope_head_dim=8, v_head_dim=12, tie_word_embeddings=False,
             num_experts=4, num_experts_per_tok=2, moe_intermediate_size=32, shared_expert_intermediate_size=32, first_k_dense_replace=1,
             scoring_func="sigmoid", topk_method="noaux_tc", n_group=2, topk_group=1, norm_topk_prob=True),
)


def batches(n, packed, masked=True):
    "Real widths of a step: n micro-batches of two rows; packed: documents in them; ragged: the second row is short, and a step may leave its padding out."
    g, out = torch.Generator().manual_seed(0), []
    for _ in range(n):
        ids = torch.randint(0, V, (2, 16), generator=g)
        labels = ids.roll(-1, 1).masked_fill(torch.rand(2, 16, generator=g) < .2, -100) if masked else ids.roll(-1, 1)
        if packed == "ragged":
            short = 9 + len(out) % 3
            labels[1, short:] = -100
            out.append(Batch(ids, labels, lengths=(16, short), unit=8))
            continue
        where = torch.cat((torch.arange(6), torch.arange(10))).repeat(2, 1)
        out.append(Batch(ids, labels, where, torch.tensor([0, 6, 16, 22, 32], dtype=torch.int32)) if packed else Batch(ids, labels))
    return out


def make(cfg, mesh, p, dtype=torch.float32, tune=None, fresh=True):
    "An engine of new weights; tune: with an adapter, fresh or as after some training."
    plan = plan_adapter(RunConfig(model=cfg, train=TrainConfig(load="anything"), tune=TuneConfig(**tune))) if tune else None
    if plan: fits(plan, RunConfig(model=cfg, parallel=p), mesh.sizes.pp * mesh.sizes.vpp)
    def fill(m):
        m.init_weights()
        if not plan: return
        put_plan(m, plan)
        with torch.no_grad():
            for n, w in m.named_parameters():
                if n.endswith(".B") and not fresh: w.copy_(.05 * torch.randn(w.shape, generator=torch.Generator().manual_seed(zlib.crc32(n.encode()))))
    stages = build_stages(cfg, fill, mesh, p, "cpu", dtype)
    for m in stages.values() if tune and "neftune_noise_alpha" in tune else (): add_noise(m, tune["neftune_noise_alpha"], mesh)
    return Engine(stages, mesh, p, dtype)


def mesh_of(p, cfg, world, micro):
    degree = {"ulysses_cp_algo": 0, "megatron_cp_algo": 1, "hybrid_cp_algo": p.ulysses_degree_in_cp}[p.context_parallel_algo]
    return Mesh(check(p, world, model=cfg, seq_length=16, micro_batches=micro if p.pipeline_model_parallel_size > 1 else None), ulysses=degree)


def parity(case, world):
    "Loss, every gradient, the gradient's length, the validation's loss: the largest relative distance of each."
    cfg, p = ModelConfig(**{**SHAPES[case["shape"]], **case.get("model", {})}), ParallelConfig(**case["parallel"])
    data = batches(8, case.get("packed", False))
    targets = sum(b.num_targets for b in data)
    alone = ParallelConfig(**{k: v for k, v in case["parallel"].items() if k.startswith("moe_")})
    tune = case.get("tune")
    one = make(cfg, Mesh(Sizes()), alone, tune=tune, fresh=False)
    want = float(sum(one.step([replace(b, lengths=()) for b in data], causal_lm_loss, targets, "cpu")))
    grads = one.gradients()
    length = float(one.length(grads))
    mesh = mesh_of(p, cfg, world, 8 // p.data_parallel_size(world))
    many = make(cfg, mesh, p, tune=tune, fresh=False)
    mine = data[mesh.data::mesh.sizes.data]
    loss = float(many.total([float(sum(many.step(mine, causal_lm_loss, targets, "cpu")))])[0])
    got = many.gradients()
    norm = float(many.length(got))
    whole = {n: many.pieces[n].whole(g) for n, g in got.items()}
    size = {n: float(g.abs().max()) for n, g in grads.items()}
    least = 1e-3 * max(size.values())  # a gradient that is zero by mathematics (a bias of keys without rotary positions) is compared with what others have
    far = {n: float((g.full_tensor() if hasattr(g, "full_tensor") else g).sub(grads[n]).abs().max()) / max(size[n], least) for n, g in sorted(whole.items())}
    missing = [n for n in many.pieces if n not in got]
    worst = max(far, key=far.get)
    with torch.no_grad():
        one.train(False), many.train(False)
        valid = sum(float(one.forward(b, causal_lm_loss, "cpu")) for b in data)
        out = float(many.total([sum(float(many.forward(b, causal_lm_loss, "cpu")) for b in mine)])[0])
    return dict(loss=abs(loss / want - 1), grad=far[worst], at=worst, norm=abs(norm / length - 1), valid=abs(out / valid - 1), missing=missing)


def curve(case, world):
    "The loss of optimizer steps, in one process and in many."
    cfg, p, rng = ModelConfig(**SHAPES[case["shape"]]), ParallelConfig(**case["parallel"]), np.random.RandomState(0)
    data = [Sample(x[:-1], x[1:]) for x in (rng.randint(0, V, 17) for _ in range(200))]
    dtype = case.get("dtype", "fp32")
    t = TrainConfig(train_iters=case.get("steps", 20), lr=2e-3, micro_batch_size=2, global_batch_size=8, device="cpu", dtype=dtype)
    rows = []
    for mesh, how in ((Mesh(Sizes()), ParallelConfig()), (mesh_of(p, cfg, world, 4 // p.data_parallel_size(world)), p)):
        torch.manual_seed(0)  # dropout and noise
        engine = make(cfg, mesh, how, getattr(torch, DTYPES[dtype]), case.get("tune"))
        tr = ParallelTrainer(engine, t, Loader(data, 2, collate_gpt, rank=mesh.data, world=mesh.sizes.data), causal_lm_loss, rates=rates(TuneConfig(**case.get("tune") or {}))).fit()
        rows.append(np.array([[r["loss"], r["grad_norm"], r["tokens"], r["trained_tokens"]] for r in tr.rows]))
    far = np.abs(rows[1] - rows[0])
    return dict(loss=float(far[:, 0].max()), norm=float((far[:, 1] / rows[0][:, 1]).max()), tokens=float(far[:, 2:].max()))


def resume(case, world):
    "A run that is saved half-way in one grid and goes on in another, against the one that stayed."
    cfg, there, here, rng = ModelConfig(**SHAPES[case["shape"]]), ParallelConfig(**case["parallel"]), ParallelConfig(**case["to"]), np.random.RandomState(0)
    data = [Sample(x[:-1], x[1:]) for x in (rng.randint(0, V, 17) for _ in range(200))]
    t = TrainConfig(train_iters=8, lr=2e-3, micro_batch_size=2, global_batch_size=8, device="cpu", save_interval=4, keep_last=9, async_save=case["async"])
    def trainer(p, callbacks=()):
        mesh = Mesh(Sizes()) if p is None else mesh_of(p, cfg, world, 4 // p.data_parallel_size(world))
        loader = Loader(data, 2, collate_gpt, rank=mesh.data, world=mesh.sizes.data)
        return ParallelTrainer(make(cfg, mesh, p or ParallelConfig(), tune=case.get("tune")), t, loader, causal_lm_loss, callbacks)
    run = RunDir(case["folder"])
    stayed = trainer(there, [Checkpointer(run)]).fit()
    gone = trainer(None if case["alone"] else here)
    gone.restore(run, 4)
    gone.fit()
    a, b = ([(r["loss"], r["grad_norm"], r["consumed_samples"]) for r in tr.rows][-4:] for tr in (stayed, gone))
    return dict(steps=len(gone.rows), loss=max(abs(x[0] - y[0]) for x, y in zip(a, b, strict=True)), norm=max(abs(x[1] / y[1] - 1) for x, y in zip(a, b, strict=True)),
                samples=[x[2] for x in a] == [y[2] for y in b], moved=abs(stayed.rows[0]["loss"] - stayed.rows[-1]["loss"]))


if __name__ == "__main__":
    r, torch_threads = join(), torch.set_num_threads(1)
    for case in json.loads(sys.argv[1]):
        torch.manual_seed(0)
        try: out = {"parity": parity, "curve": curve, "resume": resume}[case.get("kind", "parity")](case, r.world_size)
        except UserError as e: out = dict(error=e.text("en"))
        print(json.dumps(dict(case=case, **out)), flush=True)
    leave()
    os._exit(0)  # gloo's threads sometimes abort an interpreter that is done
