"""Choosing, beams and batches against transformers: its processors, its beams, one text at a time."""
import json
import random

import pytest
import torch
from test_generate import TINY, command, folder, one_thread, our_ids, pair, their_ids  # noqa: F401

from ascend_nb.batches import Batch
from ascend_nb.beams import search
from ascend_nb.config import GenerateConfig, SampleConfig
from ascend_nb.core import UserError
from ascend_nb.decoder import Fast
from ascend_nb.generate import run, several, stream
from ascend_nb.hf_format import load_model
from ascend_nb.reading import Memory, next_ids
from ascend_nb.sampling import Chooser, penalise, warp
from ascend_nb.tokenizers import load_tokenizer

OPEN = dict(temperature=1., top_k=0, top_p=1.)


@pytest.mark.parametrize("knobs", [dict(min_p=.1), dict(min_p=1.), dict(min_p=.02, top_k=30, top_p=.9, temperature=1.5), dict(min_p=.3, temperature=.5)])
def test_min_p_is_transformers(knobs):
    from transformers.generation import MinPLogitsWarper, TemperatureLogitsWarper, TopKLogitsWarper, TopPLogitsWarper
    cfg, g = SampleConfig(**{**OPEN, **knobs}), torch.Generator().manual_seed(3)
    for scale in (.5, 3., 20.):
        z = torch.randn(1, 2000, generator=g) * scale
        want = TemperatureLogitsWarper(cfg.temperature)(None, z)
        if cfg.top_k: want = TopKLogitsWarper(cfg.top_k)(None, want)
        if cfg.top_p < 1: want = TopPLogitsWarper(cfg.top_p)(None, want)
        torch.testing.assert_close(warp(z[0], cfg), MinPLogitsWarper(cfg.min_p)(None, want)[0], rtol=0, atol=0)


def test_repetition_and_bias_are_transformers():
    from transformers.generation import RepetitionPenaltyLogitsProcessor, SequenceBiasLogitsProcessor
    z, r = torch.randn(1, 300, generator=torch.Generator().manual_seed(1)) * 4, random.Random(0)
    for p in (.7, 1.2, 5.):
        prompt, answer = r.choices(range(300), k=20), r.choices(range(300), k=30)
        bias = {3: 2.5, 299: -100., answer[0]: -1.}
        want = SequenceBiasLogitsProcessor([[[i], b] for i, b in bias.items()])(torch.tensor([prompt + answer]), z.clone())
        want = RepetitionPenaltyLogitsProcessor(p)(torch.tensor([prompt + answer]), want)[0]
        got = penalise(z[0], SampleConfig(repetition_penalty=p, logit_bias={str(i): b for i, b in bias.items()}), prompt, answer)
        torch.testing.assert_close(got, want)


def test_frequency_and_presence_count_the_answer():
    z = torch.zeros(10)
    got = penalise(z, SampleConfig(frequency_penalty=.5, presence_penalty=.25), [1, 1, 1], [2, 3, 3, 3])
    assert got.tolist() == [0, 0, -.75, -1.75, *[0] * 6] and z.sum() == 0  # OpenAI: mu[j] - c[j]·frequency - (c[j] > 0)·presence


@pytest.mark.parametrize("sample, more", [(False, dict(repetition_penalty=1.4)), (True, dict(repetition_penalty=1.4, min_p=.05))])
def test_whole_texts_with_penalties(sample, more, tmp_path):
    hf, model = pair(tmp_path, "llama")
    ids = [4, 8, 15, 16, 23]
    torch.manual_seed(5)
    want = their_ids(hf, ids, 40, do_sample=sample, **more, **(OPEN if sample else {}))
    assert our_ids(Fast(model), ids, 40, seed=5, task="do_sample" if sample else "greedy", **OPEN, **more) == want != our_ids(Fast(model), ids, 40)


def test_log_probabilities_are_the_models_own(tmp_path):
    hf, model = pair(tmp_path, "qwen2")
    cfg, ids = SampleConfig(task="return_output_log_probs", temperature=.6, top_k=7), [3, 1, 4, 1, 5]
    chooser = Chooser(cfg, ids, score=True)
    out = list(next_ids(Fast(model), ids, cfg, 30, Memory(model), chooser=chooser))
    with torch.no_grad(): lp = hf(torch.tensor([ids + out])).logits[0].log_softmax(-1)
    assert chooser.scores == pytest.approx([float(lp[len(ids) - 1 + i, t]) for i, t in enumerate(out)], abs=1e-4)


@pytest.mark.parametrize("compiled", [True, False])
@pytest.mark.parametrize("family", ["llama", "mistral"])
def test_beams_are_those_of_transformers(family, compiled, tmp_path):
    hf, model = pair(tmp_path, family)
    twin, different = Fast(model, compiled=compiled), 0
    for seed in range(3):
        ids = random.Random(seed).choices(range(300), k=4 + 9 * seed)
        for beams, power, ends, back in ((2, 1., [], 1), (4, 1., [7, 9], 4), (3, -1., list(range(40)), 2), (5, 2., list(range(90, 120)), 5), (4, 0., list(range(60)), 1)):
            x = torch.tensor([ids])
            theirs = hf.generate(x, attention_mask=torch.ones_like(x), max_new_tokens=24, pad_token_id=0, eos_token_id=ends or None, do_sample=False, num_beams=beams, length_penalty=power,
                                 num_return_sequences=back, return_dict_in_generate=True, output_scores=True)
            want = [(row[len(ids):].tolist(), float(s)) for row, s in zip(theirs.sequences, theirs.sequences_scores, strict=True)]
            ours = search(twin, ids, SampleConfig(task="beam_search", num_beams=beams, length_penalty=power, num_return_sequences=back, max_new_tokens=24), set(ends))
            assert [b.score for b in ours] == pytest.approx([s for _, s in want], abs=1e-4)
            for b, (row, _) in zip(ours, want, strict=True): assert row[:len(b.ids)] == b.ids and set(row[len(b.ids):]) <= {0, *ends[:1]}  # what fills the row
            different += ours[0].ids != our_ids(twin, ids, 24)[:len(ours[0].ids)]
    assert different > 3  # beams find other texts than greedy


def test_beams_that_are_drawn(tmp_path):
    hf, model = pair(tmp_path, "llama")
    for seed in range(4):
        ids = random.Random(seed).choices(range(300), k=5)
        x = torch.tensor([ids])
        torch.manual_seed(seed)
        want = hf.generate(x, attention_mask=torch.ones_like(x), max_new_tokens=16, pad_token_id=0, do_sample=True, num_beams=3, temperature=1.3, top_k=50, top_p=1.)[0, 5:].tolist()
        got = search(Fast(model), ids, SampleConfig(task="beam_search_with_sampling", num_beams=3, temperature=1.3, top_k=50, top_p=1., max_new_tokens=16, seed=seed))
        assert got[0].ids == want


# ---- batches

def drive(batch, requests, r):
    "Requests come at random times; who is cancelled is cut off."
    texts, names, line = {n: [] for n in requests}, {}, list(requests)
    while line or batch.rows:
        while line and batch.free and r.random() < .7:
            n = line.pop(0)
            names[batch.add(*requests[n][:2], ends=requests[n][2])] = n
        for m in batch.step(): texts[names[m.key]].append(m.id)
    return texts


@pytest.mark.parametrize("family", ["llama", "mistral", "qwen3"])
@pytest.mark.parametrize("how", [dict(), dict(compiled=False), dict(cache="int8")])
def test_a_batch_says_what_each_says_alone(family, how, tmp_path):
    _, model = pair(tmp_path, family)
    model, r = Fast(model, **how), random.Random(7)
    start = r.choices(range(300), k=30)
    requests = {}
    for i in range(14):
        ids = (start[:r.randint(1, 30)] if i % 2 else []) + r.choices(range(300), k=r.randint(1, 40))
        kw = dict(task="do_sample", temperature=1.1) if i % 3 == 0 else dict(repetition_penalty=1.2) if i % 3 == 1 else {}
        requests[i] = ids, SampleConfig(max_new_tokens=r.randint(1, 25), seed=i, **kw), set(range(20)) if i % 5 == 4 else set()
    got = drive(Batch(model, slots=4, piece=16), requests, r)
    for i, (ids, cfg, ends) in requests.items():
        want = list(next_ids(model, ids, cfg, cfg.max_new_tokens, Memory(model)))
        cut = next((n + 1 for n, t in enumerate(want) if t in ends), len(want))
        assert got[i] == want[:cut], i


def test_why_a_row_leaves_and_how_likely_it_was(tmp_path):
    hf, model = pair(tmp_path, "llama")
    batch, ids = Batch(Fast(model), slots=3), [1, 2, 3]
    alone = our_ids(Fast(model), ids, 12)
    keys = [batch.add(ids, SampleConfig(max_new_tokens=5), scores=True), batch.add(ids, SampleConfig(max_new_tokens=500), ends={alone[7]}), batch.add(list(range(120)), SampleConfig(max_new_tokens=50))]
    said = {k: [] for k in keys}
    while batch.rows:
        for m in batch.step(): said[m.key].append(m)
    assert [said[k][-1].why for k in keys] == ["length", "eos", "context"] and batch.free == 3
    assert [m.why for k in keys for m in said[k][:-1]] == [None] * (sum(map(len, said.values())) - 3)
    assert [m.id for m in said[keys[0]]] == alone[:5] and len(said[keys[2]]) == 8 and said[keys[1]][0].logprob is None
    with torch.no_grad(): lp = hf(torch.tensor([ids + alone[:5]])).logits[0].log_softmax(-1)
    assert [m.logprob for m in said[keys[0]]] == pytest.approx([float(lp[2 + i, t]) for i, t in enumerate(alone[:5])], abs=1e-4)


def test_a_beginning_is_read_once(tmp_path):
    _, model = pair(tmp_path, "llama")
    read = []
    class Seen(Fast):
        def hidden(self, ids, *a, **kw): read.append(ids.shape[1]); return super().hidden(ids, *a, **kw)
    batch, start = Batch(Seen(model), slots=3), list(range(60))
    for tail in ([61], [70, 71], [80, 81, 82]): batch.add(start + tail, SampleConfig(max_new_tokens=30)); batch.step()
    assert sum(read) == 61 + 2 + 3
    for key in list(batch.rows): batch.cancel(key)
    batch.add(start + [61, 5], SampleConfig(max_new_tokens=2)); batch.step()
    assert sum(read) <= 61 + 2 + 3 + 2 and batch.free == 2
    with pytest.raises(UserError, match="too long by 73"): batch.add([1] * 200)
    with pytest.raises(UserError, match="ids below 300"): batch.add([300])
    assert batch.free == 2


# ---- the command

def test_the_five_tasks(folder):  # noqa: F811
    ask = dict(model=str(folder), prompt="The ferry", max_new_tokens=12)
    model, tok = load_model(folder), load_tokenizer(folder)
    ids = tok.encode("The ferry")
    texts = {t: run(GenerateConfig(**ask, task=t, num_beams=3), json=True) for t in ("greedy", "do_sample", "beam_search", "beam_search_with_sampling", "return_output_log_probs")}
    assert texts["greedy"]["text"] == "".join(stream(model, tok, ids, SampleConfig(max_new_tokens=12)))
    best = search(Fast(model), ids, SampleConfig(task="beam_search", num_beams=3, max_new_tokens=12), {0})[0]
    assert texts["beam_search"]["score"] == pytest.approx(best.score, abs=1e-4) and texts["beam_search"]["tokens"] == len(best.ids)
    assert texts["return_output_log_probs"]["text"] == texts["do_sample"]["text"] and all(x <= 0 for x in texts["return_output_log_probs"]["logprobs"])
    out = command("--model", folder, "--prompt", "The ferry", "--max-new-tokens", 6, "--task", "do_sample", "--num-return-sequences", 3, "--temperature", 1)
    parts = out.stdout.rstrip("\n").split("\n---\n")
    assert out.returncode == 0 and len(parts) == 3 and "text 3:" in out.stderr
    assert parts[1] == several(Fast(model), tok, ids, SampleConfig(task="do_sample", max_new_tokens=6, num_return_sequences=3, temperature=1.))[1]["text"]
    for draft in ("lookup", folder):
        assert json.loads(command("--model", folder, "--prompt", "The ferry", "--max-new-tokens", 12, "--draft", draft, "--json").stdout)["text"] == texts["greedy"]["text"]


def test_a_stop_word_ends_each_of_several_texts(folder):  # noqa: F811
    model, tok = load_model(folder), load_tokenizer(folder)
    ids, ask = tok.encode("The ferry"), dict(max_new_tokens=30, num_return_sequences=3, temperature=1., num_beams=3)
    for task in ("do_sample", "beam_search"):
        free = several(Fast(model), tok, ids, SampleConfig(task=task, **ask))
        word = free[0]["text"][8:10]
        for one, cut in zip(free, several(Fast(model), tok, ids, SampleConfig(task=task, stop=["", word], **ask)), strict=True):
            assert cut["text"] == one["text"].split(word)[0] and (cut["stopped_by"] == "stop") == (word in one["text"]) and (cut["tokens"] < one["tokens"]) >= (word in one["text"])


def test_numbers_at_the_edge(folder):  # noqa: F811
    ask = ("--model", folder, "--prompt", "The ferry", "--max-new-tokens", 5)
    greedy = command(*ask).stdout
    for knobs in (("--temperature", "1e-45"), ("--temperature", 0), ("--top-k", 1), ("--top-p", 0.), ("--min-p", 1)): assert command(*ask, "--task", "do_sample", *knobs).stdout == greedy, knobs
    assert command(*ask, "--task", "do_sample", "--top-k", 10**9, "--top-p", 1., "--seed", -10**30).returncode == 0
    for flag, got in (("--temperature", "nan"), ("--top-p", "nan"), ("--top-p", 1.5), ("--max-new-tokens", 0)):
        out = command(*ask, "--task", "do_sample", flag, got)
        assert out.returncode == 2 and f"Found {flag[2:].replace('-', '_')}=" in out.stderr and f"{got}" in out.stderr
    out = command(*ask, "--task", "return_output_log_probs")
    assert out.stdout == command(*ask, "--task", "do_sample").stdout and "log-probabilities: -" in out.stderr


def test_a_prompt_that_is_too_long(folder):  # noqa: F811
    long = "The ferry was late. " * 20
    out = command("--model", folder, "--prompt", long)
    n = len(load_tokenizer(folder).encode(long))
    assert out.returncode == 2 and f"too long by {n - 63}" in out.stderr and "--truncate" in out.stderr
    out = command("--model", folder, "--prompt", long, "--truncate", "--max-new-tokens", 10, "--json")
    got = json.loads(out.stdout)
    model, tok = load_model(folder), load_tokenizer(folder)
    assert f"{n - 54} tokens left out" in out.stderr and got["text"] == "".join(stream(model, tok, tok.encode(long)[-54:], SampleConfig(max_new_tokens=10)))


def test_templates(folder, tmp_path):  # noqa: F811
    from ascend_nb.templates import encode_prompt
    model, tok = load_model(folder), load_tokenizer(folder)
    ids = encode_prompt([dict(role="user", content="Hi")], tok, "alpaca")
    got = json.loads(command("--model", folder, "--prompt", "Hi", "--prompt-type", "alpaca", "--truncate", "--max-new-tokens", 5, "--json").stdout)
    assert got["text"] == "".join(stream(model, tok, ids[-59:], SampleConfig(max_new_tokens=5), fresh=True))
    out = command("--model", folder, "--prompt", "Hi", "--prompt-type", "nobody")
    assert out.returncode == 2 and "nobody" in out.stderr and "Traceback" not in out.stderr
