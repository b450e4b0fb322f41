"""Families whose code lies beside their weights: a file in their layout, written by hand here, gives what a transformers model with the same mathematics gives.

Each case builds a file from plain tensors (the layout is stated in the test, by loops and slices), and arranges the same tensors into a Llama, Qwen2 or GLM of
transformers: scales folded into matrices, a normalised head stored normalised, ALiBi as an additive mask over a Llama whose every token stands at position 0.
"""
import json
import math

import pytest
import torch
from ascend_nb.hf_format import load_model, open_weights, save_model
from ascend_nb.losses import causal_lm_loss
from ascend_nb.model import KVCache
from safetensors.torch import save_file

H, N, K, D, I, V, L = 48, 6, 2, 8, 80, 96, 2
PLAIN = dict(vocab_size=V, hidden_size=H, intermediate_size=I, num_hidden_layers=L, num_attention_heads=N, rms_norm_eps=1e-6)


class Draw:
    "Random tensors, the same for the same seed; matrices keep the scale of what they read."
    def __init__(self): self.g = torch.Generator().manual_seed(0)
    def __call__(self, *shape):
        t = torch.empty(shape).normal_(generator=self.g)
        return t * shape[-1] ** -0.5 if len(shape) == 2 else t * 0.2 + 1


def llama_state(kv=K, qkv_bias=False, out_bias=False):
    "Tensors of a decoder in the names of a Llama in transformers."
    w = Draw()
    state = {"model.embed_tokens.weight": w(V, H) * 4}
    for i in range(L):
        at = f"model.layers.{i}."
        for name, rows in (("q", N), ("k", kv), ("v", kv)):
            state[f"{at}self_attn.{name}_proj.weight"] = w(rows * D, H)
            if qkv_bias: state[f"{at}self_attn.{name}_proj.bias"] = w(rows * D) - 1
        state[f"{at}self_attn.o_proj.weight"] = w(H, N * D)
        if out_bias: state[f"{at}self_attn.o_proj.bias"] = w(H) - 1
        state |= {f"{at}mlp.gate_proj.weight": w(I, H), f"{at}mlp.up_proj.weight": w(I, H), f"{at}mlp.down_proj.weight": w(H, I)}
        state |= {f"{at}input_layernorm.weight": w(H), f"{at}post_attention_layernorm.weight": w(H)}
    return state | {"model.norm.weight": w(H), "lm_head.weight": w(V, H)}


def reference(kind, state, **kw):
    "A transformers model that holds exactly these tensors."
    from transformers import AutoConfig, AutoModelForCausalLM

    config = AutoConfig.for_model(kind, **{**PLAIN, "num_key_value_heads": K, "tie_word_embeddings": False, "pad_token_id": None, **kw})
    model = AutoModelForCausalLM.from_config(config, attn_implementation="eager").eval()
    missing, unexpected = model.load_state_dict(state, strict=False)
    assert not missing and not unexpected
    return model


def renamed(state, *pairs):
    "Names with pieces exchanged."
    out = {}
    for k, t in state.items():
        for a, b in pairs: k = k.replace(a, b)
        out[k] = t
    return out


def packed(state, name, pack, end=".weight"):
    "q, k and v of every layer replaced by one tensor."
    out = dict(state)
    for i in range(L):
        q, k, v = (out.pop(f"model.layers.{i}.self_attn.{x}_proj{end}") for x in "qkv")
        out[f"model.layers.{i}.{name}{end}"] = pack(q, k, v)
    return out


def by_group(q, k, v):
    "InternLM2's rows: for each key head its query heads, then it, then its value head."
    rows = []
    for g in range(K): rows += [q[(g * N // K + j) * D:(g * N // K + j + 1) * D] for j in range(N // K)] + [k[g * D:(g + 1) * D], v[g * D:(g + 1) * D]]
    return torch.cat(rows)


def rows(q, k, v): return torch.cat([q, k, v])


def aquila():
    state = llama_state()
    return dict(PLAIN, model_type="aquila", num_key_value_heads=K), state, reference("llama", state), {}


def qwen():
    state = llama_state(kv=N, qkv_bias=True)
    theirs = packed(packed(state, "attn.c_attn", rows), "attn.c_attn", rows, ".bias")
    theirs = renamed(theirs, ("model.layers", "transformer.h"), ("model.embed_tokens", "transformer.wte"), ("model.norm", "transformer.ln_f"), ("self_attn.o_proj", "attn.c_proj"),
                     ("mlp.gate_proj", "mlp.w2"), ("mlp.up_proj", "mlp.w1"), ("mlp.down_proj", "mlp.c_proj"), ("input_layernorm", "ln_1"), ("post_attention_layernorm", "ln_2"))
    config = dict(model_type="qwen", vocab_size=V, hidden_size=H, intermediate_size=2 * I, num_hidden_layers=L, num_attention_heads=N, kv_channels=D, layer_norm_epsilon=1e-6,
                  seq_length=64, rotary_emb_base=10000, no_bias=True, use_dynamic_ntk=True, use_logn_attn=True)
    return config, theirs, reference("qwen2", state, num_key_value_heads=N, use_sliding_window=False), {}


def baichuan(alibi=False, norm_head=False):
    state = llama_state(kv=N)
    config = dict(PLAIN, model_type="baichuan", position_embedding="alibi" if alibi else "rope", norm_head=norm_head)
    how = {}
    if alibi: # slopes of 6 heads: those of 4, then the 1st and the 3rd of 8 (Press et al. 2022)
        slopes = torch.tensor([2 ** -2, 2 ** -4, 2 ** -6, 2 ** -8, 2 ** -1, 2 ** -3])
        how = lambda n: dict(position_ids=torch.zeros(2, n, dtype=torch.long), attention_mask=torch.stack([torch.stack([torch.stack([torch.tensor(
            [-s * (i - j) if j <= i else -math.inf for j in range(n)]) for i in range(n)]) for s in slopes])] * 2))
    lengths = state["lm_head.weight"].pow(2).sum(1, keepdim=True).sqrt()
    return config, packed(state, "self_attn.W_pack", rows), reference("llama", state | ({"lm_head.weight": state["lm_head.weight"] / lengths} if norm_head else {}),
                                                                      num_key_value_heads=N), how


def chatglm():
    state = llama_state(qkv_bias=True)
    theirs = packed(packed(state, "self_attention.query_key_value", rows), "self_attention.query_key_value", rows, ".bias")
    glm = dict(state)
    for i in range(L):
        gate, up = (glm.pop(f"model.layers.{i}.mlp.{n}_proj.weight") for n in ("gate", "up"))
        for n in ("gate", "up"): del theirs[f"model.layers.{i}.mlp.{n}_proj.weight"]
        glm[f"model.layers.{i}.mlp.gate_up_proj.weight"] = theirs[f"model.layers.{i}.mlp.dense_h_to_4h.weight"] = torch.cat([gate, up])
    theirs = renamed(theirs, ("model.layers", "transformer.encoder.layers"), ("model.embed_tokens", "transformer.embedding.word_embeddings"), ("mlp.down_proj", "mlp.dense_4h_to_h"),
                     ("model.norm", "transformer.encoder.final_layernorm"), ("lm_head", "transformer.output_layer"), ("self_attn.o_proj", "self_attention.dense"))
    theirs["transformer.rotary_pos_emb.inv_freq"] = torch.ones(D // 4) # published files have it; it says nothing
    config = dict(model_type="chatglm", padded_vocab_size=V, hidden_size=H, ffn_hidden_size=I, num_layers=L, num_attention_heads=N, kv_channels=D, multi_query_attention=True,
                  multi_query_group_num=K, add_qkv_bias=True, layernorm_epsilon=1e-6, seq_length=64, rope_ratio=50, original_rope=True)
    return config, theirs, reference("glm", glm, head_dim=D, eos_token_id=None, rope_parameters=dict(rope_type="default", rope_theta=500000.0, partial_rotary_factor=0.5)), {}


def internlm():
    state = llama_state(kv=N, qkv_bias=True, out_bias=True)
    return dict(PLAIN, model_type="internlm", bias=True, rotary=dict(base=20000, type="dynamic")), state, reference(
        "llama", state, num_key_value_heads=N, attention_bias=True, rope_theta=20000.0), {}


def internlm2():
    state = llama_state()
    theirs = renamed(packed(state, "attention.wqkv", by_group), ("model.embed_tokens", "model.tok_embeddings"), ("lm_head", "output"), ("self_attn.o_proj", "attention.wo"),
                     ("mlp.gate_proj", "feed_forward.w1"), ("mlp.up_proj", "feed_forward.w3"), ("mlp.down_proj", "feed_forward.w2"), ("input_layernorm", "attention_norm"),
                     ("post_attention_layernorm", "ffn_norm"))
    return dict(PLAIN, model_type="internlm2", num_key_value_heads=K, bias=False, rope_theta=1e6), theirs, reference("llama", state, rope_theta=1e6), {}


def minicpm():
    "The factors, folded: the embedding times 12, both outputs of a layer times 1.4/√L, the head times dim_model_base/H."
    state = {k: t for k, t in llama_state().items() if k != "lm_head.weight"}
    fold = {k: t * 1.4 / math.sqrt(L) if k.endswith(("o_proj.weight", "down_proj.weight")) else t for k, t in state.items()}
    fold |= {"model.embed_tokens.weight": state["model.embed_tokens.weight"] * 12, "lm_head.weight": state["model.embed_tokens.weight"] * 16 / H}
    return dict(PLAIN, model_type="minicpm", num_key_value_heads=K, scale_emb=12, dim_model_base=16, scale_depth=1.4, rope_theta=10000.0), state, reference("llama", fold), {}


CASES = dict(aquila=aquila, qwen=qwen, baichuan=baichuan, baichuan_13b=lambda: baichuan(alibi=True), baichuan2=lambda: baichuan(norm_head=True),
             baichuan2_13b=lambda: baichuan(True, True), chatglm=chatglm, internlm=internlm, internlm2=internlm2, minicpm=minicpm)


@pytest.fixture(params=CASES)
def case(request, tmp_path):
    "(our model from the folder, transformers' logits of some tokens, the tokens, the folder)"
    config, tensors, theirs, how = CASES[request.param]()
    (tmp_path / "m").mkdir()
    (tmp_path / "m" / "config.json").write_text(json.dumps(config))
    save_file({k: t.clone() for k, t in tensors.items()}, tmp_path / "m" / "model.safetensors", {"format": "pt"})
    x = torch.randint(0, V, (2, 30), generator=torch.Generator().manual_seed(1))
    def logits(x): return theirs(x, **(how(x.shape[1]) if how else {})).logits
    logits.model = theirs
    return load_model(tmp_path / "m"), logits, x, tmp_path / "m"


def close(a, b, limit=1e-5): assert (a - b).abs().max().item() < limit, (a - b).abs().max().item()


def test_logits_and_loss(case):
    from types import SimpleNamespace

    ours, theirs, x, _ = case
    with torch.no_grad(): want = theirs(x)
    assert want.std() > 0.1
    with torch.no_grad(): close(ours(x), want, 1e-5 * max(1.0, want.abs().max().item() / 4))
    labels = torch.cat((x[:, 1:], torch.full((2, 1), -100)), 1)
    total, n = causal_lm_loss(ours, SimpleNamespace(input_ids=x, labels=labels, position_ids=None, cu_seqlens=None))
    close(total / n, torch.nn.functional.cross_entropy(want[:, :-1].flatten(0, 1), x[:, 1:].flatten()))


def test_gradient_of_the_first_norm(case):
    "What arrives at the far end has passed through every layer and both heads of the comparison."
    ours, theirs, x, _ = case
    first = "model.layers.0.input_layernorm.weight"
    mine, want = (torch.autograd.grad(f(x)[..., :5].logsumexp(-1).sum(), model.get_parameter(first))[0] for f, model in ((ours, ours), (theirs, theirs.model)))
    close(mine, want, 1e-4 * max(1.0, want.abs().max().item()))


def test_cached_steps_and_packed_documents(case):
    ours, theirs, x, _ = case
    with torch.no_grad(): want, cache = theirs(x), KVCache(ours.cfg, 2, 30)
    with torch.no_grad(): got = torch.cat([ours(x[:, a:b], cache=cache) for a, b in ((0, 11), (11, 12), (12, 30))], 1)
    limit = 1e-5 * max(1.0, want.abs().max().item() / 4)
    close(got, want, limit)
    both = x[:, :14].reshape(1, 28) # two documents of 14 tokens in one row
    with torch.no_grad(): packed_ = ours(both, torch.arange(14).repeat(2)[None], torch.tensor([0, 14, 28], dtype=torch.int32))
    close(packed_.view(2, 14, V), want[:, :14], limit)


def test_saved_folder_has_the_same_tensors(case, tmp_path):
    ours, _, x, folder = case
    save_model(ours, tmp_path / "again", base_config=folder)
    a, b = open_weights(folder), open_weights(tmp_path / "again")
    assert set(a) - set(b) <= {"transformer.rotary_pos_emb.inv_freq"} and not set(b) - set(a)
    assert all(torch.equal(a[k], b[k]) for k in b)
    again = load_model(tmp_path / "again")
    assert again.cfg == ours.cfg
    with torch.no_grad(): assert torch.equal(again(x), ours(x))
