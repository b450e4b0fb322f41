"""Preference losses, their gradients and metrics against trl's own trainers on the same weights and pairs; the file of reference numbers; a run of the trainer."""
import os
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from token_files import write_pairs

from ascend_nb import reference
from ascend_nb.config import ModelConfig, TrainConfig
from ascend_nb.core import UserError
from ascend_nb.datasets import Batch, Loader, Sample
from ascend_nb.instruct_sets import PairDataset, collate_pairs
from ascend_nb.model import Decoder
from ascend_nb.preference import LOSSES, METRICS, Preference, PreferenceLoss, Scores, collate_preference, pair_scores, preference_metrics, token_logps
from ascend_nb.reference import reference_logps
from ascend_nb.reward import reward_model
from ascend_nb.trainer import Trainer

os.environ.setdefault("TRL_EXPERIMENTAL_SILENCE", "1")
V = 96
CFG = ModelConfig(vocab_size=V, hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2,
                  tie_word_embeddings=False, initializer_range=.15)
SHAPE = dict(vocab_size=V, hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2,
             rms_norm_eps=CFG.rms_norm_eps, rope_theta=1e4, tie_word_embeddings=False, pad_token_id=0, attn_implementation="eager")
TEXTS = [dict(prompt="w1 w2", chosen=" w3", rejected=" w4")] * 2


def drawn(sizes, seed=0):
    "Pairs of (question, better, worse) as lists of ids."
    rng = np.random.RandomState(seed)
    return [[rng.randint(4, V, n).tolist() for n in three] for three in sizes]


def as_sample(question, answer):
    ids, labels = np.array(question + answer), np.array([-100] * len(question) + answer)
    return Sample(ids, np.append(labels[1:], -100))


def as_pairs(rows): return [(as_sample(q, a), as_sample(q, b)) for q, a, b in rows]


PAIRS, SHORT = drawn([(5, 4, 7), (3, 6, 2), (8, 5, 5)]), drawn([(1, 4, 7), (1, 6, 2), (1, 5, 3)], 1)


@pytest.fixture(scope="module")
def tokenizer():
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast
    t = Tokenizer(models.WordLevel({"<pad>": 0, "<s>": 1, "</s>": 2, "<unk>": 3} | {f"w{i}": i for i in range(4, V)}, unk_token="<unk>"))
    t.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(tokenizer_object=t, pad_token="<pad>", bos_token="<s>", eos_token="</s>", unk_token="<unk>")


def llama(decoder):
    from transformers import LlamaConfig, LlamaForCausalLM
    peer = LlamaForCausalLM(LlamaConfig(**SHAPE))
    peer.load_state_dict(decoder.state_dict())
    return peer


def ours(seed=3): return Decoder(CFG).init_weights(seed)


def settings(tmp, **kw): return dict(output_dir=str(tmp), use_cpu=True, bf16=False, report_to=[], disable_tqdm=True, gradient_checkpointing=False, **kw)


@pytest.fixture(scope="module")
def dpo(tokenizer, tmp_path_factory):
    "trl's DPOTrainer with our weights in it, and another model as its reference."
    from datasets import Dataset
    from trl import DPOConfig, DPOTrainer
    args = DPOConfig(**settings(tmp_path_factory.mktemp("dpo"), max_length=None))
    return DPOTrainer(llama(ours()), llama(ours(4)), args, train_dataset=Dataset.from_list(TEXTS), processing_class=tokenizer)


def trl_dpo(trainer, rows):
    "Loss of trl's trainer on pairs of ours."
    batch = trainer.data_collator([dict(prompt_ids=q, chosen_ids=a, rejected_ids=b) for q, a, b in rows])
    return trainer.compute_loss(trainer.model, batch)


def same_gradients(model, peer):
    grads, seen = dict(peer.named_parameters()), 0
    for name, p in model.named_parameters():
        if p.grad is None: continue
        assert torch.allclose(p.grad, grads[name].grad, atol=1e-5, rtol=1e-4), name
        seen += bool(p.grad.abs().max() > 1e-4)
    assert seen > 10


def seen(loss):
    "The means of what a loss saw in training."
    *sums, n = loss.take().tolist()
    return {name: x / n for name, x in zip(METRICS, sums, strict=True)}


def go(knobs, rows, packed=False):
    "Our mean loss with gradients on, the model and the loss object."
    model, loss, pairs = ours(), PreferenceLoss(knobs), as_pairs(rows)
    collate = collate_preference(0, packed=packed)
    data = reference_logps(ours(4), pairs, collate, quiet=True)
    total, n = loss(model, collate([data[i] for i in range(len(data))]))
    assert n == len(rows)
    (total / n).backward()
    return (total / n).item(), model, loss


# trl ----------------------------------------------------------------------------------------------

@pytest.mark.parametrize("packed", [False, True], ids=["padded", "packed"])
@pytest.mark.parametrize("kind", ["sigmoid", "hinge", "ipo"])
def test_losses_with_a_reference_equal_trl(dpo, kind, packed):
    beta = .3
    dpo.loss_types, dpo.loss_weights, dpo.beta = [kind], [1.], beta
    dpo._metrics["train"].clear(); dpo.model.zero_grad(); dpo.model.train()
    want = trl_dpo(dpo, PAIRS)
    want.backward()
    got, model, loss = go(Preference(kind, beta), PAIRS, packed)
    assert abs(got - want.item()) < 1e-5
    same_gradients(model, dpo.model)
    m, mine = {k: v[-1] for k, v in dpo._metrics["train"].items()}, seen(loss)
    for name, theirs in (("chosen_reward", "rewards/chosen"), ("rejected_reward", "rewards/rejected"), ("margin", "rewards/margins"), ("accuracy", "rewards/accuracies")):
        assert abs(mine[name] - m[theirs]) < 1e-5, name


def test_pref_ftx_equals_trls_sft_term(dpo):
    "trl weighs by tokens within a batch, ModelLink by pairs: batches of one pair have no difference."
    dpo.loss_types, dpo.loss_weights, dpo.beta = ["sigmoid", "sft"], [1., .7], .1
    dpo.model.zero_grad()
    want = sum(trl_dpo(dpo, [row]) for row in PAIRS) / len(PAIRS)
    want.backward()
    got, model, _ = go(Preference(pref_ftx=.7), PAIRS)
    assert abs(got - want.item()) < 1e-5
    assert abs(got - go(Preference(), PAIRS)[0]) > .1
    same_gradients(model, dpo.model)


@pytest.mark.parametrize("kind", ["sigmoid", "simpo"])
def test_label_smoothing_equals_trl(kind):
    from trl.experimental.cpo import CPOTrainer
    g = torch.Generator().manual_seed(0)
    c, r, c0, r0 = (torch.randn(6, generator=g).mul(3).requires_grad_() for _ in range(4))
    them = SimpleNamespace(alpha=0., beta=.7, label_smoothing=.2, loss_type=kind, simpo_gamma=.4, accelerator=SimpleNamespace(device="cpu"))
    one = torch.ones(6)
    s = Scores(c, r, one, one, *((c0, r0) if kind == "sigmoid" else ()))
    want, *rewards = CPOTrainer.cpo_loss(them, *((c - c0, r - r0) if kind == "sigmoid" else (c, r)))
    k = Preference(kind, .7, label_smoothing=.2, gamma=.4)
    got = LOSSES[kind].per_pair(s, k)
    assert torch.allclose(got, want, atol=1e-6)
    for a, b in zip(*(torch.autograd.grad(x.sum(), (c, r)) for x in (got, want)), strict=True): assert torch.allclose(a, b, atol=1e-5)
    assert torch.allclose(torch.stack(LOSSES[kind].reward(s, .7)), torch.stack(rewards), atol=1e-6)


def unshifted(rows):
    "The batch that trl's CPO and ORPO trainers take."
    out = {}
    for side, answers in (("chosen", [a for _, a, _ in rows]), ("rejected", [b for _, _, b in rows])):
        both = [(q + a, [-100] * len(q) + a) for (q, _, _), a in zip(rows, answers, strict=True)]
        width = max(len(x) for x, _ in both)
        out[f"{side}_input_ids"] = torch.tensor([x + [0] * (width - len(x)) for x, _ in both])
        out[f"{side}_labels"] = torch.tensor([y + [-100] * (width - len(y)) for _, y in both])
        out[f"{side}_attention_mask"] = torch.tensor([[1] * len(x) + [0] * (width - len(x)) for x, _ in both])
    return out


def without_reference(kind, tokenizer, tmp):
    "A real trainer of trl for SimPO or ORPO."
    from datasets import Dataset
    from trl.experimental.cpo import CPOConfig, CPOTrainer
    from trl.experimental.orpo import ORPOConfig, ORPOTrainer
    if kind == "orpo": return ORPOTrainer(llama(ours()), ORPOConfig(**settings(tmp, beta=.4)), train_dataset=Dataset.from_list(TEXTS), processing_class=tokenizer)
    args = CPOConfig(**settings(tmp, loss_type="simpo", cpo_alpha=0., beta=1.5, simpo_gamma=.6))
    return CPOTrainer(llama(ours()), args, train_dataset=Dataset.from_list(TEXTS), processing_class=tokenizer)


def test_simpo_equals_trl(tokenizer, tmp_path):
    them = without_reference("simpo", tokenizer, tmp_path)
    want, metrics = them.get_batch_loss_metrics(them.model, unshifted(PAIRS))
    want.backward()
    got, model, loss = go(Preference("simpo", 1.5, gamma=.6), PAIRS)
    assert abs(got - want.item()) < 1e-5
    same_gradients(model, them.model)
    assert abs(seen(loss)["margin"] - metrics["rewards/margins"]) < 1e-5


def test_orpo_equals_trl(tokenizer, tmp_path):
    "trl's own term of the better answer goes over the question too: with one token of it, which nothing precedes, both are the same."
    them = without_reference("orpo", tokenizer, tmp_path)
    want = sum(them.get_batch_loss_metrics(them.model, unshifted([row]))[0] for row in SHORT) / len(SHORT)
    want.backward()
    got, model, _ = go(Preference("orpo", .4), SHORT)
    assert abs(got - want.item()) < 1e-5
    same_gradients(model, them.model)


def test_reward_model_equals_trl(tokenizer, tmp_path):
    from datasets import Dataset
    from transformers import LlamaConfig, LlamaForSequenceClassification
    from trl import RewardConfig, RewardTrainer
    torch.manual_seed(0)
    model = reward_model(ours()).train()
    peer = LlamaForSequenceClassification(LlamaConfig(**SHAPE, num_labels=1))
    peer.load_state_dict(model.state_dict())
    data = Dataset.from_list([dict(chosen="w4 w5", rejected="w4 w6")] * 2)
    them = RewardTrainer(peer, RewardConfig(**settings(tmp_path, max_length=None)), train_dataset=data, processing_class=tokenizer)
    want = them.compute_loss(them.model, dict(them.data_collator([dict(chosen_ids=q + a, rejected_ids=q + b) for q, a, b in PAIRS])))
    want.backward()
    for packed in (False, True):
        loss = PreferenceLoss(Preference("reward"))
        model.zero_grad()
        total, n = loss(model, collate_preference(0, packed=packed)(as_pairs(PAIRS)))
        (total / n).backward()
        assert abs((total / n - want).item()) < 1e-5
        same_gradients(model, them.model)
        mine = seen(loss)
        assert abs(mine["margin"] - them._metrics["train"]["margin"][-1]) < 1e-5 and abs(mine["accuracy"] - them._metrics["train"]["accuracy"][-1]) < 1e-6


# Numbers ------------------------------------------------------------------------------------------

def test_log_probabilities_equal_transformers():
    model, batch = ours(), collate_pairs(0)(as_pairs(PAIRS))
    with torch.no_grad(): logps = llama(model)(batch.input_ids).logits.log_softmax(-1)
    keep = batch.labels != -100
    want = (logps.gather(-1, batch.labels.clamp(min=0)[..., None])[..., 0] * keep).sum(1)
    s = pair_scores(model, batch)
    assert torch.allclose(torch.cat(s[:2]), want, atol=1e-5)
    assert torch.equal(torch.cat(s[2:4]), keep.sum(1).float())


@pytest.mark.parametrize("cap", [None, 2.])
def test_all_logits_are_never_held(cap):
    g = torch.Generator().manual_seed(0)
    hidden, weight = (torch.randn(n, 16, generator=g, requires_grad=True) for n in (300, 500))
    labels, factor = torch.randint(0, 500, (300,), generator=g), torch.randn(300, generator=g)
    def saved(f): # numbers that autograd keeps until the backward pass
        kept = {}
        with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.update({t.data_ptr(): t}) or t, lambda t: t): return f(), sum(t.numel() for t in kept.values())
    got, few = saved(lambda: token_logps(hidden, weight, labels, rows=64, cap=cap))
    _, many = saved(lambda: (hidden @ weight.t()).log_softmax(-1).gather(1, labels[:, None]))
    assert few <= 300 * 18 + 500 * 16 < 300 * 500 <= many
    z = hidden @ weight.t()
    want = (z if cap is None else torch.tanh(z / cap) * cap).log_softmax(-1).gather(1, labels[:, None])[:, 0]
    assert torch.allclose(got, want, atol=1e-5)
    for a, b in zip(*(torch.autograd.grad((x * factor).sum(), (hidden, weight)) for x in (got, want)), strict=True): assert torch.allclose(a, b, atol=1e-4)


def test_orpo_of_a_certain_answer_is_finite():
    c, r = torch.zeros(1, requires_grad=True), torch.tensor([-3.], requires_grad=True)
    loss = LOSSES["orpo"].per_pair(Scores(c, r, torch.ones(1), torch.ones(1)), Preference("orpo")).sum()
    loss.backward()
    assert all(torch.isfinite(x).all() for x in (loss, c.grad, r.grad))


def test_pairs_with_half_an_answer_are_refused():
    good, bare = as_pairs(PAIRS), Sample(np.arange(4), np.full(4, -100))
    with pytest.raises(UserError, match="pair 1 of 2 without a trained token in its rejected answer"): collate_preference(0)([good[0], (good[1][0], None)])
    with pytest.raises(UserError, match="pair 2 of 3 without a trained token in its chosen answer"):
        pair_scores(ours(), collate_preference(0, packed=True)([good[0], good[1], (bare, good[2][1])]))
    with pytest.raises(UserError, match="3 answers in a batch"): pair_scores(ours(), Batch(torch.ones(3, 4).long(), torch.ones(3, 4).long()))


@pytest.mark.parametrize("knobs", [dict(loss="dpo"), dict(beta=0), dict(label_smoothing=.5), dict(loss="ipo", label_smoothing=.1), dict(pref_ftx=-1), dict(loss="reward", pref_ftx=1)],
                         ids=lambda d: " ".join(d))
def test_knobs_that_do_not_go_together(knobs):
    with pytest.raises(UserError, match="; expected"): Preference(**knobs)


# The file -----------------------------------------------------------------------------------------

def test_reference_is_asked_once_and_never_stale(tmp_path, monkeypatch):
    model, pairs, collate, path = ours(), as_pairs(PAIRS), collate_preference(0), tmp_path / "new" / "reference.safetensors"
    first = reference_logps(model, pairs, collate, path, quiet=True).numbers
    assert np.allclose(first.T.flatten(), torch.cat(pair_scores(model, collate(pairs))[:2]).detach().numpy(), atol=1e-5)
    monkeypatch.setattr(reference.Reference, "ask", lambda *a, **kw: pytest.fail("asked again"))
    assert np.array_equal(reference_logps(ours(), pairs, collate, path, quiet=True).numbers, first)
    relabelled = [*pairs[:2], (pairs[2][0], pairs[2][1]._replace(labels=np.where(pairs[2][1].labels == -100, -100, 5)))] # of the same lengths
    moved = ours()
    with torch.no_grad(): moved.model.norm.weight[0] += 1e-6
    for m, data, what in ((moved, pairs, "model"), (model, relabelled, "data"), (model, pairs[:2], "data"), (ours().double(), pairs, "model"), (moved, relabelled, "model, data")):
        with pytest.raises(UserError, match=f"made with other {what};"): reference_logps(m, data, collate, path, quiet=True)
    whole = path.read_bytes()
    for broken in (b"", whole[:40], whole[:-3]):
        path.write_bytes(broken)
        with pytest.raises(UserError, match="Remove it; it is computed again"): reference_logps(ours(), pairs, collate, path, quiet=True)


def test_a_failed_pass_leaves_no_file(tmp_path):
    pairs, path = as_pairs(PAIRS), tmp_path / "reference.safetensors"
    def collate(items): raise OSError("gone")
    with pytest.raises(OSError): reference_logps(ours(), pairs, collate, path, quiet=True)
    assert not path.exists()


def test_each_pair_of_a_shuffled_data_set_gets_its_own_numbers(tmp_path):
    "Two epochs, and a pair that is left out because nothing of its answers remains."
    prefix = write_pairs(tmp_path / "x", [(3, 4, 2), (40, 1, 0), (2, 3, 5), (4, 1, 1), (2, 6, 3)])
    cfg = ModelConfig(vocab_size=256, hidden_size=16, num_hidden_layers=1, num_attention_heads=2, initializer_range=.2)
    model, data, collate = Decoder(cfg).init_weights(0), PairDataset(prefix, 16, num_samples=8, vocab_size=256), collate_preference(0)
    assert data.usable.tolist() == [0, 2, 3, 4] and len(data) == 8
    pairs = reference_logps(model, data, collate, tmp_path / "r.safetensors", pairs=3, quiet=True)
    assert np.isnan(pairs.numbers[1]).all() and len(pairs.numbers) == 5
    for i in range(8):
        s = pair_scores(model, collate([pairs[i]]))
        assert torch.allclose(torch.cat(s[:2]), torch.cat(s[4:]), atol=1e-5), i
    assert len({tuple(pairs[i][2]) for i in range(8)}) == 4


def test_only_pairs_that_a_run_draws_are_asked_about(tmp_path):
    data = PairDataset(write_pairs(tmp_path / "x", [(3, 4, 2), (2, 3, 5), (4, 1, 1), (2, 6, 3)]), 16, num_samples=40)
    pairs = reference.Referenced(data, drawn=2)
    assert pairs.which.tolist() == sorted(data.index[:2].tolist()) and len(pairs) == 40


# The trainer --------------------------------------------------------------------------------------

def run(tmp_path, micro):
    prefix = write_pairs(tmp_path / "x", [(3, 4, 2), (2, 3, 5), (4, 2, 1), (2, 6, 3)])
    cfg = ModelConfig(vocab_size=256, hidden_size=16, num_hidden_layers=1, num_attention_heads=2)
    model, data, collate = Decoder(cfg).init_weights(0), PairDataset(prefix, 16, num_samples=40), collate_preference(0)
    data = reference_logps(model, data, collate, tmp_path / "r.safetensors", quiet=True)
    loss = PreferenceLoss(Preference(beta=.5))
    t = Trainer(model, TrainConfig(train_iters=10, micro_batch_size=micro, global_batch_size=4, lr=5e-3, lr_warmup_iters=0, log_interval=1, device="cpu"),
                Loader(data, micro, collate), loss, [loss], Loader(data, 4, collate))
    return t.fit()


def test_trainer_learns_the_pairs_and_logs_it(tmp_path):
    t = run(tmp_path, 4)
    first, last = t.rows[0], t.rows[-1]
    assert abs(first["loss"] - np.log(2)) < 1e-5 and first["margin"] == pytest.approx(0, abs=1e-4)
    assert last["accuracy"] == 1 and last["margin"] > 1 and last["loss"] < .3 and last["trained_tokens"] == 4
    t.cfg.eval_iters = 1
    assert t.evaluate() < last["loss"] and True not in t.loss_fn.seen


def test_micro_batches_change_nothing(tmp_path):
    a, b = ([(r["loss"], r["grad_norm"], r["margin"], r["accuracy"]) for r in run(tmp_path / str(m), m).rows] for m in (4, 1))
    assert len(a) == 10 and np.allclose(a, b, atol=1e-4)


def test_metrics_carry_no_graph():
    s = pair_scores(ours(), collate_pairs(0)(as_pairs(PAIRS)))
    assert all(isinstance(x, torch.Tensor) and x.dim() == 0 and not x.requires_grad for x in preference_metrics(s, Preference("simpo")).values())
