"""The compiled twin against the model and against transformers: families, int8, rows side by side, what it leaves to the model."""
import os
import random
import shutil
import subprocess
import sys

import pytest
import torch
from conftest import ROOT
from test_generate import FAMILIES, one_thread, our_ids, pair, their_ids  # noqa: F401

from ascend_nb import native, pages
from ascend_nb.config import ModelConfig, SampleConfig
from ascend_nb.core import UserError
from ascend_nb.decoder import Fast, SmallCache, shrink, squeeze, widen
from ascend_nb.model import Decoder, KVCache
from ascend_nb.reading import Draft, Lookup, Memory, next_ids

BASE = dict(vocab_size=128, hidden_size=72, num_hidden_layers=3, num_attention_heads=6, num_key_value_heads=2, intermediate_size=100, max_position_embeddings=256, initializer_range=.15)
SHAPES = {
    "llama": {}, "window": dict(sliding_window=7), "alternating": dict(sliding_window=7, layer_types=["sliding_attention", "full_attention"] * 1 + ["sliding_attention"]),
    "biases": dict(attention_bias=True, attention_out_bias=True, mlp_bias=True), "wide heads": dict(head_dim=40), "qk norm": dict(qk_norm=True, head_dim=16),
    "gemma": dict(norm_plus_one=True, post_norms=True, hidden_act="gelu_pytorch_tanh", attn_logit_softcapping=5., final_logit_softcapping=6., embedding_multiplier=8., attention_scale=.2),
    "granite": dict(residual_multiplier=.3, logits_multiplier=.5, embedding_multiplier=3.), "part": dict(partial_rotary_factor=.5, head_dim=16), "gelu": dict(hidden_act="gelu"),
    "yarn": dict(rope_scaling=dict(rope_type="yarn", factor=4., original_max_position_embeddings=64)), "dynamic": dict(max_position_embeddings=40, rope_scaling=dict(rope_type="dynamic", factor=2.)),
    "head of its own": dict(tie_word_embeddings=False), "norm head": dict(tie_word_embeddings=False, norm_head=True),
}
needs_cc = pytest.mark.skipif(not any(map(shutil.which, ("cc", "gcc", "clang"))), reason="no C compiler")


def new(shape, **kw):
    model = Decoder(ModelConfig(**{**BASE, **SHAPES[shape], **kw})).init_weights(3)
    with torch.no_grad():
        for p in model.parameters():
            if p.dim() == 1: p.add_(torch.linspace(-.2, .3, len(p)))  # norms and biases that show
    return model.eval()


@needs_cc
@pytest.mark.parametrize("shape", SHAPES)
@torch.inference_mode()
def test_the_program_says_what_the_model_says(shape):
    model = new(shape)
    twin, ids = Fast(model), torch.randint(0, 128, (1, 60), generator=torch.Generator().manual_seed(4))
    assert twin.why == "" and native.library()[0]
    want, cache, one = [], twin.new_cache(1, 80), KVCache(model.cfg, 1, 80)
    want.append(model(ids[:, :20], cache=one)[0])
    for t in range(20, 60): want.append(model(ids[:, t:t + 1], cache=one)[0])
    cuts = [0, 20, 21, 22, 25, 32, 33, 49, 60] if shape != "dynamic" else [0, 20, *range(21, 61)]
    got = [twin(ids[:, a:b], cache=cache)[0] for a, b in zip(cuts, cuts[1:], strict=False)]
    torch.testing.assert_close(torch.cat(got), torch.cat(want), rtol=1e-3, atol=1e-3)
    assert cache.length == one.length == 60 and torch.cat(want).std() > .05


@pytest.mark.skipif(not pages.library()[0], reason="no AVX-512, or no C compiler")
@pytest.mark.parametrize("shape", SHAPES)
@torch.inference_mode()
def test_a_page_says_what_the_model_says(shape):
    model = new(shape)
    twin, ids = Fast(model), torch.randint(0, 128, (2, 230), generator=torch.Generator().manual_seed(4))
    caches = KVCache(model.cfg, 2, 240), twin.new_cache(2, 240), twin.new_cache(2, 240)
    cuts = [0, 230] if shape == "dynamic" else [0, 40, 73, 230]
    want = torch.cat([model.hidden(ids[:, a:b], cache=caches[0]) for a, b in zip(cuts, cuts[1:], strict=False)], 1)
    got = torch.cat([twin.hidden(ids[:, a:b], cache=caches[1]) for a, b in zip(cuts, cuts[1:], strict=False)], 1)
    torch.testing.assert_close(got, want, rtol=1e-3, atol=1e-3)
    for one, other in zip(caches[0].kv, caches[1].kv, strict=True):
        for a, b in zip(one, other, strict=True): torch.testing.assert_close(a[:, :, :230], b[:, :, :230], rtol=1e-3, atol=1e-3)
    for a, b in zip(cuts, cuts[1:], strict=False): end = twin.hidden(ids[:, a:b], cache=caches[2], last=True)
    assert end.shape == (2, 1, 72) and end[:, 0].equal(got[:, -1]) and want.std() > .05


@pytest.mark.skipif(not pages.library()[0], reason="no AVX-512, or no C compiler")
@pytest.mark.parametrize("shape", [s for s in SHAPES if s != "dynamic"])
@torch.inference_mode()
def test_texts_beside_each_other_say_what_each_says_alone(shape):
    "Behind nothing, behind what they share, and over the end of a page."
    model, r = new(shape), random.Random(3)
    twin = Fast(model)
    assert twin.besides != any(l.self_attn.window for l in model.model.layers.values())
    for shared, sizes in ((0, (40, 1, 33)), (37, (5, 64, 2, 31, 90)), (70, (300, 7, 260, 1))) if twin.besides else ():
        begin, texts = r.choices(range(128), k=shared), [r.choices(range(128), k=n) for n in sizes]
        cache = twin.new_cache(1, shared + sum(sizes))
        if shared: twin.hidden(torch.tensor([begin]), cache=cache)
        got = twin.beside(texts, cache)
        want = torch.cat([model.hidden(torch.tensor([begin + t]))[0, shared:] for t in texts])
        torch.testing.assert_close(got, want, rtol=1e-3, atol=1e-3)
        assert cache.length == shared and want.std() > .05


@pytest.mark.skipif(not pages.library()[0], reason="no AVX-512, or no C compiler")
@torch.inference_mode()
def test_a_page_is_the_same_on_any_number_of_threads(monkeypatch):
    twin, ids = Fast(new("llama")), torch.randint(0, 128, (1, 200), generator=torch.Generator().manual_seed(4))
    out = []
    for n in (1, 3):
        monkeypatch.setattr(torch, "get_num_threads", lambda n=n: n)
        out.append(twin.hidden(ids, cache=twin.new_cache(1, 200)))
    assert out[0].equal(out[1])


@needs_cc
@torch.inference_mode()
def test_rows_have_the_bits_they_have_alone():
    model, r = Fast(new("llama")), random.Random(0)
    texts = [r.choices(range(128), k=n) for n in (1, 9, 33, 50, 17, 4, 80, 3, 60)]
    def read(ids): c = model.new_cache(1, 100); model.hidden(torch.tensor([ids]), cache=c); return c
    alone = [model.hidden(torch.tensor([[7]]), cache=read(ids))[0, 0] for ids in texts]
    for n in (2, 3, 4, 9):
        side = model.step([(7, read(ids)) for ids in texts[:n]])
        assert all(torch.equal(a, b) for a, b in zip(side, alone, strict=False)), n
    z = model.logits(torch.stack(alone))
    assert all(torch.equal(model.logits(h[None])[0], row) for h, row in zip(alone, z, strict=True))
    cache = read(texts[3])  # tokens of one text that follow each other, and threads
    together = model.hidden(torch.tensor([[7, 8, 9, 10, 11]]), cache=cache)[0]
    cache.truncate(50)
    assert torch.equal(together, torch.cat([model.hidden(torch.tensor([[t]]), cache=cache)[0] for t in (7, 8, 9, 10, 11)]))
    cache.truncate(50)
    torch.set_num_threads(2)
    assert torch.equal(together, model.hidden(torch.tensor([[7, 8, 9, 10, 11]]), cache=cache)[0])


@pytest.mark.parametrize("family", FAMILIES)
def test_ids_are_those_of_transformers(family, tmp_path):
    hf, model = pair(tmp_path, family)
    twin = Fast(model)
    for seed in range(2):
        ids = random.Random(seed).choices(range(300), k=3 + 9 * seed)
        torch.manual_seed(seed)
        assert our_ids(twin, ids, 60) == their_ids(hf, ids, 60, do_sample=False)
        torch.manual_seed(seed)
        want = their_ids(hf, ids, 60, do_sample=True, temperature=.8, top_k=30, top_p=.9)
        assert our_ids(twin, ids, 60, task="do_sample", temperature=.8, top_k=30, top_p=.9, seed=seed) == want


@pytest.mark.parametrize("compiled", [True, False])
@torch.inference_mode()
def test_int8_weights_and_cache_are_near(compiled):
    ids = torch.randint(0, 128, (1, 50), generator=torch.Generator().manual_seed(4))
    want = new("biases")(ids)[0]
    for how, most in ((dict(weights="int8"), .05), (dict(cache="int8"), .03), (dict(weights="int8", cache="int8"), .06)):
        twin = Fast(new("biases"), **how, compiled=compiled)
        cache = twin.new_cache(1, 64)
        got = torch.cat([twin(ids[:, a:b], cache=cache)[0] for a, b in ((0, 35), (35, 36), (36, 50))])
        assert isinstance(cache, SmallCache) == ("cache" in how)
        assert (got - want).std() < most * want.std(), (how, float((got - want).std() / want.std()))


@torch.inference_mode()
def test_int8_the_program_and_torch_agree():
    ids = torch.randint(0, 128, (1, 50), generator=torch.Generator().manual_seed(4))
    how = dict(weights="int8", cache="int8")
    a, b = (Fast(new("biases"), **how, compiled=c) for c in (True, False))
    ca, cb = a.new_cache(1, 64), b.new_cache(1, 64)
    for s, e in ((0, 35), (35, 36), (36, 50)): torch.testing.assert_close(a(ids[:, s:e], cache=ca), b(ids[:, s:e], cache=cb), rtol=.02, atol=.02)


def test_int8_loses_half_a_step_at_most():
    w = torch.randn(33, 150) * torch.logspace(-3, 2, 33)[:, None]
    w[3] = 0
    q, scale = squeeze(w)
    assert q.dtype == torch.int8 and scale.shape == (33, 3)
    assert ((widen(q, scale) - w).abs() <= scale.repeat_interleave(64, 1)[:, :150] * .5001).all()
    model = new("llama")
    before = sum(p.numel() for p in model.parameters())
    small = sum(t.numel() * t.element_size() for t in shrink(model).state_dict().values())
    assert small < 1.4 * before  # 8.5 bits and the norms


def test_what_the_program_does_not_know_is_left_to_the_model():
    odd = dict(latent=dict(kv_lora_rank=16, q_lora_rank=24, qk_nope_head_dim=8, qk_rope_head_dim=8, v_head_dim=12, num_key_value_heads=6),
               alibi=dict(position_embedding="alibi"), layernorm=dict(norm_type="layernorm"), plain=dict(mlp_gated=False, hidden_act="gelu"), pairs=dict(rope_interleaved=True),
               experts=dict(num_experts=4, num_experts_per_tok=2, moe_intermediate_size=16))
    ids = list(range(9))
    for name, kw in odd.items():
        model = Decoder(ModelConfig(**{**BASE, **kw})).init_weights(1).eval()
        want = our_ids(model, ids, 12)
        twin = Fast(model)
        assert twin.why and our_ids(twin, ids, 12) == want, name
    assert Fast(new("llama").to(torch.bfloat16)).why


def test_without_a_compiler_the_text_is_the_same():
    code = ("import torch; from test_decoder import *; twin = Fast(new('llama')); "
            "print(bool(twin.why), our_ids(twin, [5, 6, 7], 20))")
    said = {}
    for name, env in (("with", {}), ("without", {"ASCEND_NB_NATIVE": "0"}), ("broken", {"CC": "/bin/false", "XDG_CACHE_HOME": "/nonexistent"})):
        out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT / "tests", env={**os.environ, "PYTHONPATH": f"{ROOT}{os.pathsep}{ROOT / 'tests'}", **env})
        assert out.returncode == 0, out.stderr
        said[name] = out.stdout.split(" ", 1)
    assert said["without"][0] == said["broken"][0] == "True"
    assert said["with"][1] == said["without"][1] == said["broken"][1]


def test_a_full_cache_and_a_weight_that_changes():
    model = new("llama")
    twin = Fast(model)
    with torch.inference_mode():
        cache = twin.new_cache(1, 8)
        twin.hidden(torch.arange(6)[None], cache=cache)
        with pytest.raises(UserError, match="at most 8"): twin.hidden(torch.arange(3)[None], cache=cache)
        with pytest.raises(UserError, match="at most 8"): twin.step([(1, cache), (2, cache), (3, cache)])
        assert cache.length == 6
        before = twin(torch.tensor([[1]]), cache=cache)
    with torch.no_grad(): model.model.layers["0"].mlp.down_proj.weight.mul_(2)  # the weights are the model's own
    with torch.inference_mode():
        cache.truncate(6)
        after = twin(torch.tensor([[1]]), cache=cache)
        one = KVCache(model.cfg, 1, 8)
        assert not torch.allclose(before, after)
    assert Fast(model).layers[0].q.w == twin.layers[0].q.w and one.length == 0  # a second twin moves nothing


def loop(n):  # a text that repeats itself, and breaks off
    return [i % 11 + 20 for i in range(n)]


@pytest.mark.parametrize("task", [dict(), dict(task="do_sample", temperature=1., top_k=0, top_p=1.), dict(repetition_penalty=1.3, frequency_penalty=.4)])
def test_guesses_never_change_a_text(task, tmp_path):
    hf, plain = pair(tmp_path, "mistral")
    model = Fast(plain)
    small = Fast(Decoder(plain.cfg).init_weights(9).eval())
    for ids in (loop(30), [1, 2, 3], random.Random(2).choices(range(300), k=25)):
        want = our_ids(model, ids, 60, **task)
        if not task: assert want == their_ids(hf, ids, 60, do_sample=False)
        for guess in (Lookup(), Draft(small, model), Draft(model, model)):
            cfg = SampleConfig(max_new_tokens=60, **task)
            assert list(next_ids(model, ids, cfg, 60, Memory(model), torch.Generator().manual_seed(cfg.seed), guess)) == want


def test_a_good_guess_saves_steps():
    model, calls = Fast(new("llama")), []
    class Seen:
        cfg, head_weight, logits, new_cache = model.cfg, model.head_weight, model.logits, model.new_cache
        def hidden(self, ids, cache): calls.append(ids.shape[1]); return model.hidden(ids, cache=cache)
    def run(guess): calls.clear(); m = Seen(); return list(next_ids(m, [5, 6], SampleConfig(), 100, Memory(m), guess=guess)), len(calls)
    want, n = run(None)
    got, fewer = run(Draft(model, model))
    assert got == want and n == 100 and fewer < 30


@pytest.mark.slow
def test_smollm2_int8_agrees_on_nearly_every_token():
    folder = os.environ.get("ASCEND_NB_SMOLLM2")
    if not folder: pytest.skip("ASCEND_NB_SMOLLM2 does not name a folder (ascend_nb fetch smollm2-135m --to DIR)")
    from ascend_nb.hf_format import load_model
    from ascend_nb.tokenizers import load_tokenizer
    full, small, tok = Fast(load_model(folder)), Fast(load_model(folder), weights="int8"), load_tokenizer(folder)
    same = total = 0
    for text in ("The capital of France is", "def fibonacci(n):", "Once upon a time, in a small village by the sea,", "The three most important laws of physics are"):
        ids = tok.encode(text, special=True)
        out = our_ids(full, ids, 64)
        with torch.inference_mode(): z = small.model(torch.tensor([ids + out]))[0].argmax(-1).tolist()[len(ids) - 1:-1]
        same, total = same + sum(a == b for a, b in zip(z, out, strict=True)), total + len(out)
    assert same / total >= .95, same / total
