"""The loss against transformers' own, on the same weights, labels and masks."""
import pytest
import torch
from ascend_nb.config import ModelConfig
from ascend_nb.datasets import Batch
from ascend_nb.losses import causal_lm_loss
from ascend_nb.model import Decoder


@pytest.fixture(scope="module")
def pair():
    "Our decoder and transformers' Llama with the same weights."
    from transformers import LlamaConfig, LlamaForCausalLM
    cfg = ModelConfig(vocab_size=96, hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2,
                      tie_word_embeddings=False)
    ours = Decoder(cfg).init_weights(3)
    peer = LlamaForCausalLM(LlamaConfig(vocab_size=96, hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4,
                                        num_key_value_heads=2, rms_norm_eps=cfg.rms_norm_eps, rope_theta=1e4, tie_word_embeddings=False))
    peer.load_state_dict(ours.state_dict())
    return ours, peer


def batch(masked: bool, seed=0):
    g = torch.Generator().manual_seed(seed)
    ids = torch.randint(0, 96, (3, 20), generator=g)
    labels = ids.masked_fill(torch.rand(ids.shape, generator=g) < .6, -100) if masked else ids.clone()
    shifted = torch.cat([labels[:, 1:], labels.new_full((3, 1), -100)], 1)
    return ids, labels, Batch(ids, shifted)


@pytest.mark.parametrize("masked", [False, True], ids=["pretrain", "sft"])
def test_loss_and_gradients_equal_transformers(pair, masked):
    ours, peer = pair
    ids, labels, b = batch(masked)
    ours.zero_grad(); peer.zero_grad()
    total, n = causal_lm_loss(ours, b)
    (total / n).backward()
    want = peer(ids, labels=labels).loss
    want.backward()
    assert n == int((labels[:, 1:] != -100).sum())
    assert abs((total / n - want).item()) < 1e-5
    grads = dict(peer.named_parameters())
    for name, p in ours.named_parameters():
        assert torch.allclose(p.grad, grads[name].grad, atol=1e-6, rtol=1e-4), name


def test_a_masked_token_has_no_say(pair):
    "Changing what a masked position was asked for changes nothing."
    ours, _ = pair
    ids, _, b = batch(True)
    total, n = causal_lm_loss(ours, b)
    assert 0 < n < ids.numel()
    again, _ = causal_lm_loss(ours, Batch(ids, torch.where(b.labels == -100, -100, b.labels)))
    assert torch.equal(total, again)
    other, _ = causal_lm_loss(ours, Batch(ids, torch.where(b.labels == -100, -100, (b.labels + 1) % 96)))
    assert not torch.equal(total, other)
