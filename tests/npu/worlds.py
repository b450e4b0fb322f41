"""Small models and batches for whole steps on the pretend card: a dense one, one of experts, latent attention, packed documents."""
import torch
import torch_npu  # noqa: F401  adds the device

from ascend_nb import npu_kernels
from ascend_nb.config import TrainConfig
from ascend_nb.datasets import Batch
from ascend_nb.losses import causal_lm_loss
from ascend_nb.model import Decoder
from ascend_nb.shapes import ModelConfig
from ascend_nb.trainer import Trainer

DENSE = dict(hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2, head_dim=8, vocab_size=64, initializer_range=0.1)
MOE = DENSE | dict(num_experts=4, num_experts_per_tok=2, moe_intermediate_size=16, norm_topk_prob=True)
MLA = DENSE | dict(kv_lora_rank=16, q_lora_rank=16, qk_nope_head_dim=8, qk_rope_head_dim=4, v_head_dim=6, num_key_value_heads=4, head_dim=None)
WORLDS = {  # name -> (shape, packed, operators that a step must call besides those of every step)
    "dense": (DENSE, False, {"npu_swiglu", "npu_swiglu_backward"}),
    "dense, window": (DENSE | dict(sliding_window=5), False, set()),
    "moe": (MOE, False, {"npu_grouped_matmul", "npu_moe_token_permute", "npu_moe_token_permute_grad_v2", "_npu_moe_token_unpermute", "npu_moe_token_unpermute_grad_v2"}),
    "latent attention": (MLA, False, set()),
    "packed": (DENSE, True, set()),
}
ALWAYS = {"npu_rms_norm", "npu_rms_norm_backward", "npu_rotary_mul", "npu_rotary_mul_backward", "npu_fusion_attention", "npu_fusion_attention_grad", "npu_apply_adam_w"}
CU = torch.tensor([0, 5, 12, 19, 24], dtype=torch.int32)


def config(shape): return ModelConfig(**{k: v for k, v in shape.items() if v is not None})


def forget():
    "Masks of another mode or of a broken test are not kept."
    getattr(npu_kernels._mask_2048, "cache_clear", lambda: None)()


def batches(packed, n=5, pad=True):
    "The same every time; a quarter of the labels is not trained."
    g = torch.Generator().manual_seed(5)
    for _ in range(n):
        ids = torch.randint(0, 64, (2, 12), generator=g)
        labels = ids.roll(-1, 1).clone()
        if pad: labels[:, ::4] = -100
        extra = dict(cu_seqlens=CU, position_ids=torch.tensor([*range(5), *range(7), *range(7), *range(5)]).view(2, 12)) if packed else {}
        yield Batch(ids, labels, **extra)


class Feed:
    "A loader of those batches."
    consumed = 0
    def __init__(self, packed): self.items = batches(packed)
    def __next__(self): return next(self.items)
    def state_dict(self): return {}
    def load_state_dict(self, state): pass


def train(shape, packed, device, steps=5):
    """Parameters, their last gradients and losses after whole steps of the project's own trainer. Adam's eps stands above the rounding of a gradient: below it
    an element whose gradient is nothing but rounding is moved by all of lr, whichever sign the rounding has."""
    forget()
    model, grads = Decoder(config(shape)).init_weights(3), {}
    t = Trainer(model, TrainConfig(device=device, dtype="fp32", train_iters=steps, lr=2e-3, lr_decay_style="constant", micro_batch_size=2, adam_eps=1e-6), Feed(packed), causal_lm_loss)
    t.callbacks = [type("Look", (), dict(before_update=lambda self, t: grads.update({n: p.grad.detach().cpu().clone() for n, p in model.named_parameters() if p.grad is not None})))()]
    t.fit()
    return {n: p.detach().cpu() for n, p in model.named_parameters()}, grads, [r["loss"] for r in t.rows]


def apart(a, b): return max((a[n] - b[n]).abs().max().item() for n in b)
