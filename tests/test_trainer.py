"""The loop against loops that others wrote: transformers' schedules, model and decay rule, torch's AdamW, one big batch."""
import math
import os
import signal

import numpy as np
import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM, get_scheduler
from transformers import Trainer as HFTrainer

from ascend_nb.callbacks import Checkpointer, Guards, ProgressBar, StopOnSignal, Validation
from ascend_nb.checkpoint import RunDir
from ascend_nb.config import ModelConfig, TrainConfig
from ascend_nb.core import UserError, seed_all
from ascend_nb.datasets import Loader, Sample, collate_gpt, collate_sft
from ascend_nb.last_breath import StepWatch
from ascend_nb.losses import causal_lm_loss
from ascend_nb.model import Decoder
from ascend_nb.trainer import Callback, Trainer, Weights, lr_at, make_optimizer

V = 64


pytestmark = pytest.mark.usefixtures("one_thread")


def samples(n=64, seq=24, seed=0, ragged=False):
    "Random text; ragged: lengths and masks differ much from sample to sample, as in instruction data."
    r, out = np.random.RandomState(seed), []
    for _ in range(n):
        length = r.randint(4, seq + 1) if ragged else seq
        ids = r.randint(0, V, length + 1)
        labels = ids[1:].copy()
        if ragged: labels[:r.randint(0, length)] = -100
        out.append(Sample(ids[:-1], labels))
    return out


def model(seed=0, **kw):
    shape = dict(vocab_size=V, hidden_size=32, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2, intermediate_size=48)
    return Decoder(ModelConfig(**{**shape, **kw})).init_weights(seed)


def trainer(callbacks=(), data=None, collate=collate_gpt, net=None, valid=None, **kw):
    cfg = TrainConfig(**{**dict(train_iters=8, lr=1e-2, micro_batch_size=4, device="cpu", lr_warmup_iters=2), **kw})
    return Trainer(net or model(), cfg, Loader(data or samples(), cfg.micro_batch_size, collate), causal_lm_loss, callbacks, valid)


def named(t): return {n: p.detach().clone() for n, p in t.weights.named.items()}
def losses(t): return [r["loss"] for r in t.rows]


def everything(t):
    "All that a checkpoint holds, but for the generators."
    tensors, state = t.snapshot()
    return {k: v.clone() for k, v in tensors.items() if not k.startswith("rng.")}, state


def same(a, b): return a.keys() == b.keys() and all(torch.equal(v, b[k]) for k, v in a.items())


# ---- the learning rate

def hf_lrs(name, cfg, n, **kw):
    opt = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=cfg.lr)
    sched, out = get_scheduler(name, opt, cfg.lr_warmup_iters, cfg.train_iters, scheduler_specific_kwargs=kw or None), []
    for _ in range(n):
        out.append(opt.param_groups[0]["lr"])
        opt.step()
        sched.step()
    return out


@pytest.mark.parametrize("warm", [0, 1, 10])
@pytest.mark.parametrize(("ours", "theirs", "kw", "low"), [
    ("cosine", "cosine", {}, 0.), ("cosine", "cosine_with_min_lr", dict(min_lr=1e-4), 1e-4), ("linear", "linear", {}, 0.),
    ("constant", "constant_with_warmup", {}, 0.)])
def test_schedules_are_those_of_transformers(ours, theirs, kw, low, warm):
    cfg = TrainConfig(train_iters=50, lr=1e-3, min_lr=low, lr_decay_style=ours, lr_warmup_iters=warm)
    np.testing.assert_allclose([lr_at(s, cfg) for s in range(50)], hf_lrs(theirs, cfg, 50, **kw), rtol=1e-12, atol=1e-18)


def test_inverse_square_root_is_that_of_transformers():
    cfg = TrainConfig(train_iters=50, lr=1e-3, lr_decay_style="inverse-square-root", lr_warmup_iters=10)
    np.testing.assert_allclose([lr_at(s, cfg) for s in range(50)], hf_lrs("inverse_sqrt", cfg, 50), rtol=1e-12)


@pytest.mark.parametrize("style", ["cosine", "linear", "constant", "inverse-square-root"])
@pytest.mark.parametrize("more", [dict(lr_warmup_iters=7), dict(lr_warmup_fraction=.03), {}, dict(lr_decay_iters=30, lr_warmup_fraction=.1)])
def test_schedules_are_those_of_megatron(style, more):
    core = pytest.importorskip("megatron.core.optimizer_param_scheduler", reason="megatron-core is not installed")
    cfg, gbs = TrainConfig(train_iters=50, lr=1e-3, min_lr=1e-5, lr_decay_style=style, global_batch_size=16, **more), 16
    decay = (cfg.lr_decay_iters or cfg.train_iters) * gbs
    warm = cfg.lr_warmup_iters * gbs or cfg.lr_warmup_fraction * decay
    opt = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=cfg.lr)
    sched = core.OptimizerParamScheduler(opt, 0., cfg.lr, cfg.min_lr, warm, decay, style, 0., 0., 1, "constant", False)
    for step in range(60):
        assert math.isclose(opt.param_groups[0]["lr"], lr_at(step, cfg), rel_tol=1e-12), step
        sched.step(gbs)


def test_the_logged_rate_is_the_one_that_was_used():
    class Watch(Callback):
        used = []
        def after_update(self, t): self.used.append(t.weights.optimizer.param_groups[0]["lr"])
    t = trainer([w := Watch()]).fit()
    assert w.used == [r["lr"] for r in t.rows] == [lr_at(s, t.cfg) for s in range(8)] and w.used[0] == 0


# ---- the step

def test_decay_groups_are_those_of_transformers():
    "Biases and norms without decay, everything else with, the embedding too."
    net = model(attention_bias=True, tie_word_embeddings=False)
    hf = LlamaForCausalLM(LlamaConfig(vocab_size=V, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
                                      num_key_value_heads=2, attention_bias=True, tie_word_embeddings=False))
    theirs = set(HFTrainer.get_decay_parameter_names(None, hf))
    name = {p: n for n, p in net.named_parameters()}
    opt = make_optimizer(dict(net.named_parameters()), TrainConfig(weight_decay=.1))
    ours = {name[p] for g in opt.param_groups if g["weight_decay"] for p in g["params"]}
    assert ours == {n for n in theirs if n in set(name.values())} and "model.embed_tokens.weight" in ours
    assert sum(len(g["params"]) for g in opt.param_groups) == len(name)


def test_a_run_is_that_of_a_loop_written_with_transformers_and_torch():
    "Same weights, same batches: transformers' Llama, torch's AdamW and clipping, transformers' schedule, mean loss over all labels."
    net = model()
    hf = LlamaForCausalLM(LlamaConfig(vocab_size=V, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
                                      num_key_value_heads=2, tie_word_embeddings=True, rms_norm_eps=1e-5, attn_implementation="eager"))
    hf.load_state_dict(net.state_dict(), strict=False)
    t = trainer(net=net, train_iters=12, clip_grad=.3, weight_decay=.1).fit()
    decay = [p for p in hf.parameters() if p.dim() > 1]
    opt = torch.optim.AdamW([dict(params=decay), dict(params=[p for p in hf.parameters() if p.dim() == 1], weight_decay=0.)],
                            lr=1e-2, betas=(.9, .95), eps=1e-8, weight_decay=.1)
    sched, loader, seen, norms = get_scheduler("cosine", opt, 2, 12), Loader(samples(), 4, collate_gpt), [], []
    for _ in range(12):
        b = next(loader)
        loss = torch.nn.functional.cross_entropy(hf(b.input_ids).logits.flatten(0, 1), b.labels.flatten())
        loss.backward()
        norms.append(float(torch.nn.utils.clip_grad_norm_(hf.parameters(), .3)))
        opt.step()
        sched.step()
        opt.zero_grad()
        seen.append(loss.item())
    np.testing.assert_allclose(losses(t), seen, rtol=2e-5)
    np.testing.assert_allclose([r["grad_norm"] for r in t.rows], norms, rtol=2e-4)
    assert max(norms) > .3 and abs(seen[-1] - seen[0]) > .01


@pytest.mark.parametrize("micro", [1, 2, 6])
def test_micro_batches_add_up_to_the_big_batch(micro):
    "With answers of very different length, N micro-batches are one batch: loss, length and every entry of the gradient to 1e-6."
    data = samples(ragged=True)
    kw = dict(data=data, collate=collate_sft(0, 1), global_batch_size=12, lr_warmup_iters=0, clip_grad=0)
    one, many = (trainer(micro_batch_size=m, train_iters=1, **kw).fit() for m in (12, micro))
    for key in ("loss", "grad_norm"): assert many.rows[0][key] == pytest.approx(one.rows[0][key], rel=1e-6)
    for n in one.weights.named: # after one step AdamW's first moment is a tenth of the gradient
        x, y = (t.weights.optimizer.state[t.weights.named[n]]["exp_avg"] * 10 for t in (one, many))
        assert (x - y).abs().max() <= 1e-6 * max(1., float(x.abs().max())), n
    longer = [trainer(micro_batch_size=m, train_iters=6, **kw).fit() for m in (12, micro)]
    np.testing.assert_allclose(losses(longer[0]), losses(longer[1]), rtol=1e-5)
    counts = [sum(int((s.labels != -100).sum()) for s in data[i:i + micro]) for i in range(0, 12, micro)]
    assert len(set(counts)) > 1, "micro-batches with equal counts would not show the difference"


def test_the_mean_of_means_would_be_another_number():
    "What this guards against: averaging micro-batches' means gives another loss on this data."
    data, net = samples(ragged=True), model()
    t = trainer(data=data, collate=collate_sft(0, 1), net=net, train_iters=1, global_batch_size=12, micro_batch_size=2, lr_warmup_iters=0, lr=0.).fit()
    loader = Loader(data, 2, collate_sft(0, 1))
    with torch.no_grad(): pairs = [causal_lm_loss(net, b) for b in (next(loader) for _ in range(6))]
    right = float(sum(x for x, _ in pairs)) / sum(n for _, n in pairs)
    means = float(np.mean([float(x) / n for x, n in pairs if n]))
    assert abs(losses(t)[0] - right) < 1e-6 and abs(means - right) > 1e-4


def test_clip_grad_0_measures_and_does_not_clip():
    free, tight = trainer(clip_grad=0, train_iters=1, lr_warmup_iters=0).fit(), trainer(clip_grad=.01, train_iters=1, lr_warmup_iters=0).fit()
    assert free.rows[0]["grad_norm"] == pytest.approx(tight.rows[0]["grad_norm"], rel=1e-6) and free.rows[0]["grad_norm"] > .1
    m = lambda t: torch.cat([t.weights.optimizer.state[w]["exp_avg"].flatten() for w in t.weights.named.values()]).norm() / .1
    assert float(m(free)) == pytest.approx(free.rows[0]["grad_norm"], rel=1e-4) and float(m(tight)) == pytest.approx(.01, rel=1e-3)


def test_rows_of_several_steps_weigh_them_by_tokens():
    kw = dict(data=samples(ragged=True), collate=collate_sft(0, 1))
    each, some = trainer(**kw).fit(), trainer(**kw, log_interval=3).fit()
    assert [r["step"] for r in some.rows] == [3, 6, 8]
    rows = list(each.rows)
    for row, part in zip(some.rows, (rows[:3], rows[3:6], rows[6:]), strict=True):
        n = sum(r["trained_tokens"] for r in part)
        assert row["trained_tokens"] == n and row["tokens"] == sum(r["tokens"] for r in part)
        assert row["loss"] == pytest.approx(sum(r["loss"] * r["trained_tokens"] for r in part) / n, rel=1e-12)


# ---- number formats

def test_bf16_trains_an_fp32_copy():
    "The optimizer's fp32 copy takes AdamW's exact step on the summed gradients; the model is that copy, rounded."
    net = model()
    ws = Weights(net, TrainConfig(lr=1e-3, clip_grad=0), torch.device("cpu"), torch.bfloat16)
    want = {n: w.detach().clone().requires_grad_() for n, w in ws.named.items()}
    opt = torch.optim.AdamW([dict(params=[w for w in want.values() if w.dim() > 1], weight_decay=.1),
                             dict(params=[w for w in want.values() if w.dim() == 1], weight_decay=0.)], lr=1e-3, betas=(.9, .95), fused=True)
    loader = Loader(samples(), 4, collate_gpt)
    for _ in range(3):
        batches = [next(loader) for _ in range(2)]
        for w in want.values(): w.grad = torch.zeros_like(w)
        for b in batches:
            plain = model().to(torch.bfloat16)
            plain.load_state_dict(net.state_dict())
            (causal_lm_loss(plain, b)[0] / 192).backward()
            for n, p in plain.named_parameters(): want[n].grad += p.grad.float()
            (causal_lm_loss(net, b)[0] / 192).backward()
        opt.step()
        ws.clip(0)
        assert ws.update(1e-3)
        for n, p in net.named_parameters():
            assert p.dtype == torch.bfloat16 and torch.equal(p, ws.named[n].to(torch.bfloat16)) and torch.equal(ws.named[n], want[n]), n


def test_bf16_keeps_updates_that_16_bits_cannot_hold():
    t = trainer(dtype="bf16", lr=1e-6, train_iters=4, lr_warmup_iters=0, lr_decay_style="constant", weight_decay=0.)
    norm, before = t.weights.live["model.norm.weight"], t.weights.named["model.norm.weight"].detach().clone()
    t.fit()
    assert torch.equal(norm, torch.ones_like(norm)) and (t.weights.named["model.norm.weight"] - before).abs().max() > 2e-6


@pytest.mark.parametrize("dtype", ["bf16", "fp16"])
def test_16_bits_learn_what_fp32_learns(dtype):
    full, half = trainer(train_iters=20).fit(), trainer(train_iters=20, dtype=dtype, initial_loss_scale=1024.).fit()
    np.testing.assert_allclose(losses(half), losses(full), atol=.05)
    assert losses(half) != losses(full) and {p.dtype for p in half.model.parameters()} == {getattr(torch, {"bf16": "bfloat16", "fp16": "float16"}[dtype])}


def test_fp16_overflow_skips_the_step_and_halves_the_scale():
    t = trainer(dtype="fp16", initial_loss_scale=2.**40, train_iters=50, callbacks=[Guards()], data=samples(8))
    before, first = named(t), None
    class Watch(Callback):
        def after_update(self, t):
            nonlocal first
            if t.now.updated and first is None: first = t.step
            if first is None: assert same(named(t), before)
    t.callbacks.append(Watch())
    t.fit()
    rows = list(t.rows)
    assert 10 < first <= t.skipped + 1 and rows[0]["loss_scale"] == 2.**39 and rows[0]["grad_norm"] is None
    assert rows[first - 1]["lr"] == 0 and rows[first]["lr"] == lr_at(1, t.cfg), "the schedule waits for the first real step, as Megatron's does"
    assert rows[-1]["loss"] < rows[0]["loss"] - .05


# ---- going on

@pytest.mark.parametrize("kw", [dict(), dict(dtype="bf16"), dict(dtype="fp16", initial_loss_scale=2.**18), dict(global_batch_size=8, lr_decay_style="linear")],
                         ids=["fp32", "bf16", "fp16", "accumulation"])
@pytest.mark.parametrize("k", [1, 5])
def test_k_steps_and_the_rest_are_all_the_steps(tmp_path, kw, k):
    "Bit for bit: weights, moments, generators, rows. The data here draws from torch's generator, so that must be restored as well."
    class Noise(Callback):
        "A training that uses random numbers."
        def before_update(self, t):
            for w in t.weights.named.values(): w.grad += torch.randn_like(w) * 1e-3
    class StopAt(Callback):
        def after_step(self, t):
            if t.step == k: t.stop("enough")
    run = RunDir(tmp_path)
    seed_all(7)
    whole = trainer([Noise()], **kw).fit()
    seed_all(7)
    first = trainer([Noise(), Checkpointer(run), StopAt()], **kw).fit()
    assert first.step == k and run.steps() == [k]
    seed_all(99)
    rest = trainer([Noise()], net=model(seed=3), **kw)
    rest.restore(run, k)
    rest.fit()
    (a, sa), (b, sb) = everything(whole), everything(rest)
    assert same(a, b) and sa == sb and torch.equal(whole.snapshot()[0]["rng.0.torch"], rest.snapshot()[0]["rng.0.torch"])
    keep = ("step", "loss", "lr", "grad_norm", "consumed_samples", "loss_scale")
    rows = lambda t: [{x: r.get(x) for x in keep} for r in t.rows]
    assert rows(first) + rows(rest) == rows(whole)


def test_a_step_of_another_model_is_refused(tmp_path):
    run = RunDir(tmp_path)
    trainer([Checkpointer(run)], train_iters=1, lr_warmup_iters=0).fit()
    with pytest.raises(UserError, match="expected"): trainer(net=model(hidden_size=64)).restore(run, 1)
    with pytest.raises(UserError, match="lacks"): trainer(net=model(num_hidden_layers=3)).restore(run, 1)


def test_validation_does_not_touch_the_training():
    valid = lambda: Loader(samples(seed=5), 4, collate_gpt)
    plain = trainer().fit()
    with_valid = trainer([Validation()], valid=valid(), eval_interval=2, eval_iters=3).fit()
    assert same(named(plain), named(with_valid)) and losses(plain) == losses(with_valid)
    seen = [r["valid_loss"] for r in with_valid.rows if "valid_loss" in r]
    loader = valid()
    with torch.no_grad(): pairs = [causal_lm_loss(with_valid.model, next(loader)) for _ in range(3)]
    assert len(seen) == 4 and seen[-1] == pytest.approx(float(sum(x for x, _ in pairs)) / sum(n for _, n in pairs), rel=1e-6)


# ---- stopping

def test_a_mistake_found_before_the_first_step_is_the_one_that_is_told():
    "The bar and the watch behind the check have not begun: there is nothing of them to end."
    with pytest.raises(UserError, match="no trained token to validate on"): trainer([Validation(), ProgressBar(), StepWatch(60)], eval_interval=2).fit()


def test_the_second_ctrl_c_stops_at_once(tmp_path):
    class Twice(Callback):
        def before_update(self, t):
            if t.step == 3:
                os.kill(os.getpid(), signal.SIGINT)
                assert t.stopped == "SIGINT"
                os.kill(os.getpid(), signal.SIGTERM)
                raise AssertionError("still running")
    run, before = RunDir(tmp_path), signal.getsignal(signal.SIGINT)
    t = trainer([StopOnSignal(), Checkpointer(run), Twice()], save_interval=2)
    with pytest.raises(KeyboardInterrupt): t.fit()
    assert t.step == 3 and run.steps() == [2] and signal.getsignal(signal.SIGINT) is before


@pytest.mark.parametrize("log_interval", [1, 4])
def test_a_nan_stops_before_the_weights_change(tmp_path, log_interval):
    data = samples()
    def loss(net, batch):
        total, n = causal_lm_loss(net, batch)
        hit = (batch.input_ids[:, :4] == torch.from_numpy(data[13].ids[:4])).all(1).any()
        return total * float("inf") if hit else total, n
    t = trainer([Guards(RunDir(tmp_path))], data=data, global_batch_size=8, log_interval=log_interval)
    t.loss_fn = loss
    with pytest.raises(UserError, match="loss of step 2 is inf in samples 13;"): t.fit()
    assert t.step == 1 and (tmp_path / "bad_batch/step_0000002.jsonl").read_text().count("\n") == 4
    assert all(torch.isfinite(w).all() for w in t.weights.named.values())


def test_a_gradient_that_is_nan_behind_a_finite_loss_is_found():
    data = samples()
    class Break(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x): return x.clone()
        @staticmethod
        def backward(ctx, g): return g * float("nan")
    def loss(net, batch):
        total, n = causal_lm_loss(net, batch)
        hit = (batch.input_ids[:, :4] == torch.from_numpy(data[6].ids[:4])).all(1).any()
        return Break.apply(total) if hit else total, n
    t = trainer([Guards()], data=data)
    t.loss_fn = loss
    with pytest.raises(UserError, match="gradient norm of step 2 is nan in samples 6;"): t.fit()


def test_the_guards_read_a_late_row_again(tmp_path):
    "Where checks wait for the row (an accelerator with a large log_interval), the first bad step is named and its samples kept."
    data = samples()
    data[9] = Sample(data[9].ids, data[9].labels)
    class Late(Guards):
        def before_update(self, t):
            if t.logs_at(t.step + 1): self.check(t)
    def loss(net, batch):
        total, n = causal_lm_loss(net, batch)
        return total * (float("nan") if (batch.input_ids[:, :4] == torch.from_numpy(data[9].ids[:4])).all(1).any() else 1.), n
    t = trainer([Late(RunDir(tmp_path))], data=data, log_interval=4)
    t.loss_fn = loss
    with pytest.raises(UserError, match="loss of step 3 is nan in samples 8 to 11;"): t.fit()
    kept = (tmp_path / "bad_batch/step_0000003.jsonl").read_text().splitlines()
    assert f'"input_ids": {data[9].ids.tolist()}' in kept[1]


def test_one_transfer_for_each_row(monkeypatch):
    "Between rows nothing is fetched from the device by the loop."
    calls, real = [], torch.Tensor.tolist
    t = trainer(log_interval=4)
    monkeypatch.setattr(torch.Tensor, "tolist", lambda x: calls.append(t.step) or real(x))
    for name in ("item", "__float__", "__bool__"):
        monkeypatch.setattr(torch.Tensor, name, (lambda old: lambda x: calls.append((old.__name__, t.step)) or old(x))(getattr(torch.Tensor, name)))
    t.loss_fn = lambda net, b: (net(b.input_ids).logsumexp(-1).sum(), b.num_targets)
    t.fit()
    assert calls == [4, 8]
