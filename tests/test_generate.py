"""Generation against transformers: the choice of tokens, whole greedy and drawn texts, streamed characters, the command."""
import json
import os
import random
import re

import pytest
import torch
from here import ascend

from ascend_nb.config import SampleConfig
from ascend_nb.core import UserError
from ascend_nb.generate import Detokenizer, Memory, StopWords, end_ids, generate, next_ids, stream
from ascend_nb.hf_format import load_model, save_model
from ascend_nb.sampling import warp
from ascend_nb.tokenizers import load_tokenizer

TINY = dict(vocab_size=300, hidden_size=48, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2,
            max_position_embeddings=128, initializer_range=0.3, bos_token_id=None, eos_token_id=None, pad_token_id=None)
LLAMA3 = dict(rope_type="llama3", factor=4.0, low_freq_factor=1.0, high_freq_factor=4.0, original_max_position_embeddings=32, rope_theta=1e4)
FAMILIES = {
    "llama": ("Llama", {}), "llama3": ("Llama", dict(rope_parameters=LLAMA3)), "mistral": ("Mistral", dict(sliding_window=8, head_dim=12)),
    "qwen2": ("Qwen2", dict(tie_word_embeddings=True)), "qwen3": ("Qwen3", dict(head_dim=16)),
}
EN_ZH = ["Hello, 你好，世界！ naïve café — ½ of 3°", "👩‍👩‍👧‍👦 family, 👋🏽 wave, 🇨🇳 flag, ❤️‍🔥", "  two spaces\n\n\ttab 　ideographic", "𠮷野家で牛丼を食べる",
         "한국어 텍스트 𝔘𝔫𝔦", "a", "", " ", "<0x41> is not a byte \ufffd nor is this"]


@pytest.fixture(autouse=True)
def one_thread(request):
    "Models of a few kilobytes: more threads only wait for each other."
    n = torch.get_num_threads()
    if "slow" not in request.keywords: torch.set_num_threads(1)
    yield
    torch.set_num_threads(n)


def pair(folder, family):
    "A tiny random model in transformers, and the same one in ours, read from the folder that transformers wrote."
    import transformers
    cls, more = FAMILIES[family]
    torch.manual_seed(0)
    config = getattr(transformers, f"{cls}Config")(**{**TINY, **more})
    hf = getattr(transformers, f"{cls}ForCausalLM")(config).eval()
    hf.save_pretrained(folder)
    return hf, load_model(folder)


def their_ids(hf, ids, n, **kw):
    x = torch.tensor([ids])
    return hf.generate(x, attention_mask=torch.ones_like(x), max_new_tokens=n, pad_token_id=0, **kw)[0, len(ids):].tolist()


def our_ids(model, ids, n, **kw):
    cfg = SampleConfig(max_new_tokens=n, **kw)
    return list(next_ids(model, ids, cfg, n, Memory(model), torch.Generator().manual_seed(cfg.seed)))


@pytest.mark.parametrize("knobs", [dict(temperature=.7), dict(top_k=1), dict(top_k=5), dict(top_p=.9), dict(top_p=.05), dict(top_p=0.),
                                   dict(temperature=1.7, top_k=40, top_p=.6), dict(top_k=10 ** 6, top_p=1.)])
def test_warp_is_transformers(knobs):
    from transformers.generation import TemperatureLogitsWarper, TopKLogitsWarper, TopPLogitsWarper
    cfg = SampleConfig(**{**dict(temperature=1., top_k=0, top_p=1.), **knobs})
    g = torch.Generator().manual_seed(3)
    for scale in (.5, 3., 20.):
        z = torch.randn(1, 2000, generator=g) * scale
        want = TemperatureLogitsWarper(cfg.temperature)(None, z) if cfg.temperature != 1 else z
        if cfg.top_k: want = TopKLogitsWarper(cfg.top_k)(None, want)
        if cfg.top_p < 1: want = TopPLogitsWarper(cfg.top_p)(None, want)
        torch.testing.assert_close(warp(z[0], cfg), want[0], rtol=0, atol=0)


@pytest.mark.parametrize("family", FAMILIES)
def test_ids_are_those_of_transformers(family, tmp_path):
    hf, model = pair(tmp_path, family)
    for seed in range(3):
        ids = random.Random(seed).choices(range(300), k=3 + 9 * seed)
        assert our_ids(model, ids, 60) == their_ids(hf, ids, 60, do_sample=False)
        torch.manual_seed(seed)
        want = their_ids(hf, ids, 60, do_sample=True, temperature=.8, top_k=30, top_p=.9)
        assert our_ids(model, ids, 60, task="do_sample", temperature=.8, top_k=30, top_p=.9, seed=seed) == want
        assert len(set(want)) > 5 # a text that varies


@pytest.mark.parametrize("twin", [True, False])
def test_a_text_that_outgrows_the_trained_length(tmp_path, twin):
    "longrope: the first token beyond it turns all those before it anew. Greedy, beams, side by side, and behind what was remembered: as transformers."
    import transformers
    from ascend_nb.batches import Batch
    from ascend_nb.beams import search
    from ascend_nb.decoder import Fast
    rope = dict(rope_type="longrope", short_factor=[1., 1.2, 1.5, 2., 2.5, 3.], long_factor=[1., 2., 4., 7., 11., 20.], rope_theta=1e4)
    torch.manual_seed(3)
    hf = transformers.Phi3ForCausalLM(transformers.Phi3Config(**TINY, rope_parameters=rope, original_max_position_embeddings=40)).eval()
    hf.save_pretrained(tmp_path)
    model = Fast(load_model(tmp_path), compiled=twin)
    memory, r = Memory(model), random.Random(1)
    for n in (30, 35, 39, 40, 41, 60, 20):
        ids = [*range(20), *r.choices(range(300), k=n - 20)]
        want = their_ids(hf, ids, 16, do_sample=False)
        cfg = SampleConfig(max_new_tokens=16)
        assert our_ids(model, ids, 16) == want and list(next_ids(model, ids, cfg, 16, memory)) == want
        batch = Batch(model, 2, piece=16)
        keys, texts = [batch.add(ids, cfg), batch.add([5, *ids], cfg)], {}
        while batch.rows:
            for m in batch.step(): texts.setdefault(m.key, []).append(m.id)
        assert [texts[k] for k in keys] == [want, their_ids(hf, [5, *ids], 16, do_sample=False)]
        if n != 41: assert search(model, ids, SampleConfig(task="beam_search", max_new_tokens=16, num_beams=1))[0].ids == want


def test_memory_changes_nothing(tmp_path):
    _, model = pair(tmp_path, "mistral")
    memory, r, calls = Memory(model), random.Random(1), 0
    base = r.choices(range(300), k=20)
    for _ in range(12):
        ids = base[:r.randint(1, 20)] + r.choices(range(300), k=r.randint(0, 6))
        cfg, n = SampleConfig(), r.randint(1, 12)
        running = next_ids(model, ids, cfg, n, memory, torch.Generator())
        got = [t for t, _ in zip(running, range(r.randint(1, n)), strict=False)] # some are abandoned half-way
        assert got == our_ids(model, ids, n)[:len(got)]
        calls += len(memory.ids) - memory.kv.length <= 1
    assert calls == 12


@pytest.mark.parametrize("family", FAMILIES)
def test_training_goes_on_after_generation(family, tmp_path):
    "Tables and masks that generation leaves behind serve training too."
    _, model = pair(tmp_path, family)
    cfg, memory = SampleConfig(), Memory(model)
    for ids in ([1, 2, 3], list(range(40))): list(next_ids(model, ids, cfg, 20, memory, torch.Generator()))
    model(torch.arange(60)[None]).sum().backward()
    assert model.head_weight.grad is not None


# ---- characters

def pieces(tok, ids, before=()):
    d = Detokenizer(tok, list(before))
    return [*(d.add(i) for i in ids), d.end()]


@pytest.fixture(scope="module", params=["qwen2", "llama2.model", "mistral_v1.model"])
def tok(request, shared_data): return load_tokenizer(shared_data / "tokenizers" / request.param)


def byte_ids(tok):
    "Ids of single bytes: what broken text is made of."
    if tok.id("<0x41>") is not None: return [tok.id(f"<0x{b:02X}>") for b in range(256)]
    from tokenizers.pre_tokenizers import ByteLevel
    return [tok.id(c) for c in ByteLevel.alphabet()]


def test_real_text_in_whole_characters(tok):
    for text in EN_ZH:
        ids = tok.encode(text)
        got = pieces(tok, ids)
        assert "".join(got) == tok.decode(ids)
        assert "\ufffd" in text or not any("\ufffd" in p for p in got)


def test_any_ids_join_to_their_text(tok):
    r, bytes_ = random.Random(0), byte_ids(tok)
    specials = [tok.id(t) for t in tok.special_tokens] + [tok.vocab_size + 5] # a row without an entry, too
    real = [tok.encode(t) for t in EN_ZH if t]
    def some():
        return r.choice([lambda: [r.randrange(tok.vocab_size)], lambda: r.choices(bytes_, k=r.randint(1, 4)), lambda: r.choice(real),
                         lambda: [r.choice(specials)], lambda: [r.choice(r.choice(real))]])()
    for _ in range(400):
        ids = [i for _ in range(r.randint(0, 30)) for i in some()]
        assert "".join(pieces(tok, ids)) == tok.decode(ids), ids
        cut, whole = r.randint(0, len(ids)), tok.decode(ids)
        if tok.decode(ids[:cut]).endswith("\ufffd"): continue # a prompt is text: it does not end inside a character
        assert "".join(pieces(tok, ids[cut:], ids[:cut])) == whole[len(tok.decode(ids[:cut])):], (ids, cut)


def test_work_for_each_id_is_bounded(tok):
    "5,000 ids, of text and of nothing but broken bytes: few ids are decoded for each, however long the text is."
    work = []
    class Counted:
        rust, special_tokens = tok.rust, tok.special_tokens
        def decode(self, ids): work.append(len(ids)); return tok.decode(ids)
    bytes_, r = byte_ids(tok), random.Random(2)
    for ids in (tok.encode(" ".join(EN_ZH)) * 60, [bytes_[0x80]] * 5000, r.choices(bytes_, k=5000), tok.encode("好" * 700)):
        work.clear()
        assert "".join(pieces(Counted(), ids)) == tok.decode(ids)
        assert sum(work) < 80 * len(ids) + 100


def test_half_a_character_is_left_out_for_people(tok):
    for text, keep in (("好", ""), ("abc 👋", "abc "), ("好好", "好")):
        ids = tok.encode(text)
        for drop in (1, 2):
            d = Detokenizer(tok)
            got = "".join([*(d.add(i) for i in ids[:-drop]), d.end(whole=True)])
            if "\ufffd" in tok.decode(ids[:-drop]): assert got.rstrip() == keep.rstrip()
            else: assert got == tok.decode(ids[:-drop])


def test_stop_words_never_show():
    r = random.Random(5)
    for _ in range(3000):
        words = ["".join(r.choices("ab", k=r.randint(1, 4))) for _ in range(r.randint(0, 3))]
        text, stop, shown, fed = "".join(r.choices("abc", k=25)), StopWords(words), "", 0
        while fed < len(text) and not stop.found:
            n = r.randint(1, 5)
            shown += stop.add(text[fed:fed + n]); fed += n
            held = text[len(shown):fed]
            if not stop.found: assert held == "" or any(w.startswith(held) for w in words) # never holds back without a reason
        if not stop.found: shown += stop.end()
        first = min((text.find(w) + len(w) for w in words if w in text), default=None)
        assert bool(stop.found) == (first is not None)
        assert not any(w in shown for w in words)
        assert text.startswith(shown + (stop.found or "")) and (stop.found or shown == text)




# ---- the command, with a model of a few kilobytes

@pytest.fixture(scope="module")
def folder(samples, tmp_path_factory):
    "A random model with the sample tokenizer."
    path = tmp_path_factory.mktemp("tiny")
    tok = load_tokenizer(samples / "tokenizer")
    import transformers
    torch.manual_seed(1)
    config = transformers.LlamaConfig(**{**TINY, "vocab_size": tok.vocab_size, "max_position_embeddings": 64, "eos_token_id": 0})
    transformers.LlamaForCausalLM(config).save_pretrained(path / "m")
    tok.save(path / "m")
    return path / "m"


def command(*args, stdin="", lang="en"):
    return ascend("generate", *args, stdin=stdin, env={"ASCEND_NB_LANG": lang})


def test_the_command_prints_the_continuation_alone(folder):
    model, tok = load_model(folder), load_tokenizer(folder)
    want = generate(model, tok, "The ferry", SampleConfig(max_new_tokens=12))
    args = ("--model", folder, "--max_new_tokens", 12, "--task", "greedy")
    out = command(*args, "--prompt", "The ferry")
    assert (out.returncode, out.stdout) == (0, want + "\n"), out.stderr
    assert re.search(r"12 tokens, [\d.]+ tokens/s, ended by length", out.stderr)
    assert command(*args, stdin="The ferry").stdout == want + "\n"
    got = json.loads(command(*args, "--prompt", "The ferry", "--json").stdout)
    assert got.pop("tokens_per_s") > 0 and got == dict(text=want, tokens=12, stopped_by="length")


def test_the_end_of_the_context_is_said(folder):
    out = command("--model", folder, "--prompt", "The ferry", "--max-new-tokens", 1000, "--json")
    got, tok = json.loads(out.stdout), load_tokenizer(folder)
    assert (got["stopped_by"], got["tokens"]) == ("context", 64 - len(tok.encode("The ferry"))) and "all 64 positions" in out.stderr


def test_mistakes_of_the_user(folder, tmp_path):
    for args, words in [(("--prompt", "late " * 90), "at most 63"), ((), "empty prompt"), (("--prompt", "x", "--top-p", "2"), "top_p=2.0"),
                        (("--prompt", "x", "--task", "beam"), "greedy, do_sample")]:
        out = command("--model", folder, *args)
        assert out.returncode == 2 and words in out.stderr and not out.stdout, (args, out.stderr)
    assert re.search("提示", command("--model", folder, lang="zh").stderr)


def test_where_a_text_ends(folder):
    model, tok = load_model(folder), load_tokenizer(folder)
    full = our_ids(model, tok.encode("The ferry"), 40)
    for at in (3, 9): # any id may be an end, if the files say so
        path, ids = folder / "generation_config.json", tok.encode("The ferry")
        before = path.read_text()
        path.write_text(json.dumps(dict(eos_token_id=[full[at], 1])))
        s = stream(load_model(folder), tok, ids, SampleConfig(max_new_tokens=40))
        list(s); path.write_text(before)
        assert (s.stopped_by, s.ids) == ("eos", full[:full.index(full[at]) + 1])
    assert tok.eos_token_id in end_ids(model, tok) and tok.id("<|im_start|>") in end_ids(model, tok, ["<|im_start|>"])
    text = generate(model, tok, "The ferry", SampleConfig(max_new_tokens=40))
    word = text[10:16]
    s = stream(model, tok, tok.encode("The ferry"), SampleConfig(max_new_tokens=40, stop=[word]))
    assert "".join(s) == text[:text.index(word)] and s.stopped_by == "stop"


def test_an_empty_prompt_starts_from_the_beginning_token(shared_data, tmp_path):
    tok = load_tokenizer(shared_data / "tokenizers" / "llama2.model")
    from ascend_nb.config import ModelConfig
    from ascend_nb.model import Decoder
    model = Decoder(ModelConfig(vocab_size=tok.vocab_size, hidden_size=16, num_hidden_layers=1, num_attention_heads=2)).init_weights(0).eval()
    save_model(model, tmp_path / "m", tok)
    s = stream(model, tok, [tok.bos_token_id], SampleConfig(max_new_tokens=8))
    assert generate(model, tok, "", SampleConfig(max_new_tokens=8)) == "".join(s)
    with pytest.raises(UserError, match="below 32000"): stream(model, tok, [32000])


@pytest.mark.slow
def test_smollm2_says_what_it_says_in_transformers():
    folder = os.environ.get("ASCEND_NB_SMOLLM2")
    if not folder: pytest.skip("ASCEND_NB_SMOLLM2 does not name a folder (ascend_nb fetch smollm2-135m --to DIR)")
    import transformers
    hf, their_tok = transformers.AutoModelForCausalLM.from_pretrained(folder).eval(), transformers.AutoTokenizer.from_pretrained(folder)
    model, tok = load_model(folder), load_tokenizer(folder)
    for text in ("The capital of France is", "def fibonacci(n):", "你好，请介绍一下北京"):
        for ids in (tok.encode(text, special=True), tok.apply_chat([dict(role="user", content=text)], add_generation_prompt=True)):
            want = their_ids(hf, ids, 48, do_sample=False)
            s = stream(model, tok, ids, SampleConfig(max_new_tokens=48), fresh=True)
            text_out = "".join(s)
            assert s.ids == want
            assert text_out == their_tok.decode(want, skip_special_tokens=True).removesuffix("\ufffd")
