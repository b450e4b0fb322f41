"""How a run says that it uses its device: the formula against torch's counter and against the planner's, the rows of a real run."""
import json
import subprocess
import sys

import pytest
import torch
from ascend_nb.config import ModelConfig
from ascend_nb.costs import Layout, attention_products, mlp_products
from ascend_nb.flops import flops_per_token, multiplied
from ascend_nb.model import Decoder
from torch.utils.flop_counter import FlopCounterMode

SHAPES = {
    "dense": dict(vocab_size=512, hidden_size=64, intermediate_size=160, num_hidden_layers=3, num_attention_heads=4, num_key_value_heads=2),
    "tied, window": dict(vocab_size=512, hidden_size=64, intermediate_size=160, num_hidden_layers=2, num_attention_heads=4, sliding_window=16, tie_word_embeddings=True),
    "latent": dict(vocab_size=512, hidden_size=64, intermediate_size=160, num_hidden_layers=2, num_attention_heads=4, kv_lora_rank=32, q_lora_rank=48, qk_nope_head_dim=16, qk_rope_head_dim=8, v_head_dim=16),
    "experts": dict(vocab_size=512, hidden_size=64, intermediate_size=160, num_hidden_layers=3, num_attention_heads=4, num_experts=8, num_experts_per_tok=2, moe_intermediate_size=96, first_k_dense_replace=1),
}


@pytest.mark.parametrize("name", SHAPES)
def test_the_planners_products_are_the_same(name):
    "The planner lists a layer's products for its times; their sizes are those of the formula, forward and backward."
    c, x = ModelConfig(**SHAPES[name]), Layout(seq=128)
    size = lambda rows: sum(2 * n * r * k * i for n, r, k, i in rows) / x.tokens
    listed = sum(size(attention_products(c, x)) + size(mlp_products(c, x, c.is_moe(i))) for i in range(c.num_hidden_layers)) + 2 * c.vocab_size * c.hidden_size
    assert 6 * multiplied(c) == pytest.approx(3 * listed, rel=1e-9)


def test_torchs_counter_sees_the_same_products():
    "Forward alone: two operations for each number that a token is multiplied with."
    c = ModelConfig(**SHAPES["dense"])
    model, ids = Decoder(c).init_weights(0), torch.randint(0, 512, (2, 32))
    with torch.no_grad(), FlopCounterMode(display=False) as f: model(ids)
    products = sum(n for op, n in f.get_flop_counts()["Global"].items() if "attention" not in str(op) and "bmm" not in str(op))
    assert products == 2 * multiplied(c) * ids.numel()


@pytest.mark.slow
def test_every_row_and_tensorboard_say_it(tmp_path, samples):
    words = [sys.executable, "-m", "ascend_nb.cli", "train", "--hidden-size", "32", "--num-hidden-layers", "1", "--num-attention-heads", "2", "--data-path", str(samples / "tales.jsonl"), "--tokenizer-name-or-path", str(samples / "tokenizer"),
             "--seq-length", "64", "--micro-batch-size", "2", "--device", "cpu", "--save", str(tmp_path / "run"), "--train-iters", "4", "--log-interval", "2", "--data-cache-path", str(tmp_path / "cache")]
    out = subprocess.run(words, capture_output=True, text=True)
    assert out.returncode == 0 and "MFU" in out.stderr and "TFLOP/s a device" in out.stderr and "data wait" in out.stderr, out.stderr
    rows = [r for r in map(json.loads, (tmp_path / "run/metrics.jsonl").read_text().splitlines()) if "loss" in r]
    c = ModelConfig(vocab_size=1024, hidden_size=32, num_hidden_layers=1, num_attention_heads=2)
    for r in rows:
        assert r["tflops"] == pytest.approx(r["tokens_per_s"] * flops_per_token(c, 64) / 1e12, rel=.01)
        assert r["tokens_per_s_device"] == r["tokens_per_s"] and 0 < r["mfu"] < 1 and r["memory_mb"] > 100 and 0 <= r["data_wait"] < 1
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
    tags = EventAccumulator(str(tmp_path / "run")).Reload().Tags()["scalars"]
    assert {"train/mfu", "train/tflops", "train/tokens_per_s_device", "train/data_wait", "train/memory_mb"} <= set(tags)
