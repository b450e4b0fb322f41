"""Chats and pairs as samples, packing, and that packing changes no loss."""
import json
import os

import numpy as np
import pytest
import torch
from token_files import write_pairs, write_sft

from ascend_nb.config import ModelConfig, PreprocessConfig
from ascend_nb.core import UserError
from ascend_nb.datasets import Sample, collate_sft
from ascend_nb.indexed import IndexedReader, IndexedWriter, write_together
from ascend_nb.instruct_sets import FIELDS, PackedDataset, PairDataset, SFTDataset, collate_pairs, join, share_out
from ascend_nb.losses import causal_lm_loss
from ascend_nb.model import Decoder
from ascend_nb.preprocess import run
from ascend_nb.sample_index import epoch_order

# Instructions -------------------------------------------------------------------------------------

def test_sft_samples(tmp_path):
    prefix = write_sft(tmp_path / "x", [(3, 2), (2, 5), (1, 1)])
    ds = SFTDataset(prefix, 100)
    by_length = {len(s.ids): s for s in (ds[i] for i in range(3))}
    assert by_length[5].ids.tolist() == [1, 2, 3, 4, 5] and by_length[5].labels.tolist() == [-100, -100, 4, 5, -100]
    assert by_length[2].labels.tolist() == [2, -100]
    cut = SFTDataset(prefix, 4)
    assert {tuple(cut[i].labels.tolist()) for i in range(3)} == {(-100, -100, 4, -100), (-100, 3, 4, -100), (2, -100)}


def test_sft_order_is_epoch_by_epoch(tmp_path):
    prefix = write_sft(tmp_path / "x", [(2, 3)] * 20)
    rng = np.random.RandomState(9)
    want = [rng.permutation(range(4, 15)) for _ in range(3)]
    assert np.array_equal(SFTDataset(prefix, 16, 25, 9, (4, 15)).index, np.concatenate(want))
    assert len(epoch_order((0, 10), [], None, 1)) == 10


def test_sft_samples_without_an_answer_are_left_out(tmp_path, capsys):
    prefix = write_sft(tmp_path / "x", [(3, 5), (9, 4), (7, 4), (8, 1)])
    ds = SFTDataset(prefix, 8, num_samples=8)
    assert set(ds.index.tolist()) == {0, 2} and len(ds) >= 8
    assert "longer than seq_length=8, which are cut on the right: 3 of 4" in (err := capsys.readouterr().err) and "left out: 2." in err and "13 tokens" in err
    with pytest.raises(UserError, match="longest sample has 13"): SFTDataset(prefix, 3)


def test_sft_files_that_do_not_fit_together(tmp_path):
    prefix = write_sft(tmp_path / "x", [(3, 5), (2, 4)])
    with IndexedWriter(f"{prefix}_packed_labels_document") as w: w.add_many([[1] * 8])
    with pytest.raises(UserError, match="not of one run"): SFTDataset(prefix, 8)
    os.unlink(f"{prefix}_packed_labels_document.idx")
    with pytest.raises(UserError, match="copy both"): SFTDataset(prefix, 8)


def test_samples_that_are_masked_from_end_to_end_are_left_out(tmp_path, capsys):
    "A label at position 0 has nothing before it; pairs need both sides; where nothing is left, it is no run."
    def write(prefix, fields, *labels):
        with write_together(*(f"{prefix}_packed_{f}_document" for f in fields)) as ws:
            for w, f in zip(ws, fields, strict=True): w.add_many(labels[f.startswith("rejected")] if f.endswith("labels") else [np.ones(len(x), int) for x in labels[0]])
        return str(prefix)
    N = -100
    rows = [[N, 1, N], [N, N, N], [1, N, N], [], [1], [N, N, 1]]
    ds = SFTDataset(write(tmp_path / "x", FIELDS, rows), 8)
    assert sorted(ds.index.tolist()) == [0, 5] and "left out: 4 of 6" in capsys.readouterr().err
    assert sorted(int(i) for k in range(len(PackedDataset(ds))) for i in PackedDataset(ds).members(k)) == [0, 5]
    assert sorted(SFTDataset(f"{tmp_path}/x", 8, documents=(1, 6)).index.tolist()) == [5]
    with pytest.raises(UserError, match="no answer token"): SFTDataset(f"{tmp_path}/x", 8, documents=(1, 5))
    other = [[N, 1, 1], [N, N, 1], [N, N, 1], [], [N], [N, N, N]]
    assert PairDataset(write(tmp_path / "p", PairDataset.FIELDS, rows, other), 8).index.tolist() == [0]


@pytest.mark.parametrize("wrong", [50, -1, -101])
@pytest.mark.parametrize("stage", ["sft", "pair"])
def test_a_label_outside_the_vocabulary_is_found_on_opening(tmp_path, stage, wrong):
    prefix, field = (write_sft(tmp_path / "x", [(2, 3)] * 9), "labels") if stage == "sft" else (write_pairs(tmp_path / "x", [(2, 3, 2)] * 9), "rejected_labels")
    make = dict(sft=SFTDataset, pair=PairDataset)[stage]
    name = f"{prefix}_packed_{field}_document"
    rows = [r.tolist() for r in IndexedReader(name)[:]]
    rows[7][-1] = wrong
    make(prefix, 8, vocab_size=200)
    with IndexedWriter(name) as w: w.add_many(rows)
    with pytest.raises(UserError, match=f"token id {wrong} in .*{field}_document; expected ids from 0 to 49"): make(prefix, 8, vocab_size=50)


@pytest.mark.parametrize("multiple, fixed, width", [(1, None, 7), (8, None, 8), (16, None, 16), (8, 32, 32)])
def test_collate_sft(tmp_path, multiple, fixed, width):
    ds = SFTDataset(write_sft(tmp_path / "x", [(3, 2), (2, 5)]), 32)
    b = collate_sft(99, multiple, fixed)([ds[0], ds[1]])
    assert b.input_ids.shape == b.labels.shape == (2, width) and b.input_ids.dtype == b.labels.dtype == torch.int64
    assert b.num_targets == 7 == int((b.labels != -100).sum()) and b.position_ids is None and b.cu_seqlens is None
    for row, s in zip(range(2), (ds[0], ds[1]), strict=True):
        n = len(s.ids)
        assert b.input_ids[row, :n].tolist() == s.ids.tolist() and (b.input_ids[row, n:] == 99).all() and (b.labels[row, n:] == -100).all()
    assert b.to("cpu").num_targets == 7


def test_padding_does_not_change_what_is_learnt(tmp_path):
    "The loss of transformers' own model, padded with our collate, is the loss of the samples one by one."
    from transformers import LlamaConfig, LlamaForCausalLM
    torch.manual_seed(0)
    model = LlamaForCausalLM(LlamaConfig(vocab_size=64, hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=2)).eval()
    ds = SFTDataset(write_sft(tmp_path / "x", [(3, 2), (2, 9), (5, 6)]), 32)
    def loss(batch):
        with torch.no_grad(): logits = model(batch.input_ids).logits
        return torch.nn.functional.cross_entropy(logits.flatten(0, 1), batch.labels.flatten(), reduction="sum")
    pad = collate_sft(0, 8)
    together, apart = loss(pad([ds[0], ds[1], ds[2]])), sum(loss(pad([ds[i]])) for i in range(3))
    assert torch.allclose(together, apart, rtol=1e-5)
    # transformers shifts by itself: the labels in the file, unshifted, give the same mean
    ids, labels = torch.from_numpy(ds.readers["input_ids"][1].astype(np.int64))[None], torch.from_numpy(ds.readers["labels"][1].astype(np.int64))[None]
    one = pad([ds[ds.index.tolist().index(1)]])
    with torch.no_grad(): theirs = model(ids, labels=labels).loss
    assert torch.allclose(loss(one) / one.num_targets, theirs, rtol=1e-5)


@pytest.mark.parametrize("shuffle, full", [(True, False), (False, False), (True, True), (False, True)])
def test_orders(tmp_path, shuffle, full):
    "By hand: epochs shuffled one by one, or in file order, or all together."
    ds = SFTDataset(write_sft(tmp_path / "x", [(2, 3)] * 20), 16, 45, 9, (2, 19), shuffle=shuffle, full_shuffle=full)
    rng = np.random.RandomState(9)
    want = np.concatenate([rng.permutation(np.arange(2, 19)) if shuffle else np.arange(2, 19) for _ in range(3)])
    if full: rng.shuffle(want)
    assert np.array_equal(ds.index, want) and np.array_equal(np.bincount(ds.index)[2:], [3] * 17)


# Packing ------------------------------------------------------------------------------------------

def decoder(vocab=64, **kw):
    return Decoder(ModelConfig(**{**dict(vocab_size=vocab, hidden_size=32, num_hidden_layers=1, num_attention_heads=4, num_key_value_heads=2, initializer_range=.2), **kw})).init_weights(1)


def loss_of(model, batches):
    "Sum of losses, targets and the gradient's length over some batches."
    model.zero_grad()
    total, n = 0., 0
    for b in batches:
        loss, k = causal_lm_loss(model, b)
        loss.backward()
        assert k == b.num_targets
        total, n = total + loss.item(), n + k
    return total, n, torch.nn.utils.get_total_norm([p.grad for p in model.parameters()]).item()


def chats(tmp_path, n=16, top=20):
    rng = np.random.default_rng(3)
    prefix, ids = tmp_path / "chats", [rng.integers(1, 64, rng.integers(3, top)) for _ in range(n)]
    with write_together(*(f"{prefix}_packed_{f}_document" for f in FIELDS)) as (i, m, lab):
        i.add_many(ids); m.add_many([np.ones_like(x) for x in ids])
        lab.add_many([np.where((np.arange(len(x)) < rng.integers(0, 3)) | (rng.random(len(x)) < .2) & (np.arange(len(x)) < len(x) - 1), -100, x) for x in ids])
    return str(prefix)


@pytest.mark.parametrize("seq_length, window", [(20, None), (32, 5), (13, None)])
def test_packing_changes_no_loss_and_no_gradient(tmp_path, seq_length, window):
    "One epoch in bins against the conversations one by one; several masked turns, some answers cut, some learnt from the first token on."
    data = SFTDataset(chats(tmp_path), seq_length)
    packed, model = PackedDataset(data), decoder(sliding_window=window)
    assert len(packed) < len(data)
    bins = [packed[i] for i in range(len(packed))]
    together = loss_of(model, [collate_sft(0, 8)(bins[i:i + 3]) for i in range(0, len(bins), 3)])
    apart = loss_of(model, [collate_sft(0, 1)([data[i]]) for i in range(len(data))])
    assert together[1] == apart[1]
    np.testing.assert_allclose(together, apart, rtol=1e-5)
    crossing = loss_of(model, [collate_sft(0, 1)([Sample(b.ids, b.labels)]) for b in bins])
    assert not np.allclose(crossing, apart, rtol=1e-3), "if they saw each other it would be another"


KINDS = dict(plain={}, window=dict(sliding_window=5), alibi=dict(position_embedding="alibi", norm_type="layernorm", mlp_gated=False, num_key_value_heads=4), learned=dict(position_embedding="learned"),
             capped=dict(attn_logit_softcapping=5.), stretched=dict(rope_scaling=dict(rope_type="dynamic", factor=4.), max_position_embeddings=16))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("packed", [False, True])
def test_rows_without_their_padding_have_the_same_loss_and_gradient(tmp_path, kind, packed):
    "A step of rows end to end against the padded batch, of single conversations and of bins; fewer positions are computed."
    data, model = SFTDataset(chats(tmp_path), 32), decoder(**KINDS[kind])
    if packed: data = PackedDataset(data)
    batches = [collate_sft(0, 1 if kind == "stretched" else 4, joins=True)([data[i] for i in range(a, min(a + 4, len(data)))]) for a in range(0, len(data), 4)]
    joined = [b.joined() for b in batches]
    np.testing.assert_allclose(loss_of(model, joined), loss_of(model, batches), rtol=2e-5)
    assert all(j.input_ids.shape == (1, b.positions) and j.cu_seqlens[-1] == b.positions for b, j in zip(batches, joined, strict=True) if j is not b)
    assert any(b.positions < b.input_ids.numel() for b in batches) and collate_sft(0, 4)([data[0], data[1]]).joined().input_ids.shape[0] == 2, "only where it was asked for"


def test_every_epoch_holds_every_conversation_once_and_in_other_bins(tmp_path):
    data = SFTDataset(chats(tmp_path, 200), 32)
    a, b = PackedDataset(data, 500), PackedDataset(data, 500)
    assert len(a) >= 500 and len(a) % a.per_epoch == 0
    epochs = [[tuple(a.members(i)) for i in range(e * a.per_epoch, (e + 1) * a.per_epoch)] for e in range(3)]
    for e in epochs:
        assert sorted(d for m in e for d in m) == list(range(200))
        assert all(sum(len(data.readers["input_ids"][int(d)]) for d in m) <= 32 for m in e)
    assert len({frozenset(e) for e in epochs}) == 3
    for i in (2 * a.per_epoch + 3, 1, a.per_epoch): assert tuple(b.members(i)) == epochs[i // a.per_epoch][i % a.per_epoch], "any order of reading"
    fill = data.readers["input_ids"].num_tokens / (a.per_epoch * 32)
    assert fill > .95
    still = PackedDataset(SFTDataset(data.prefix, 32, shuffle=False), 500)
    assert tuple(still.members(0)) == tuple(still.members(still.per_epoch)) and still.members(0)[0] == 0


def test_join_keeps_what_is_packed_already():
    one = Sample(np.array([1, 2, 3]), np.array([2, -100, -100]), np.array([0, 1, 0]), np.array([2, 3]))
    got = join([one, Sample(np.array([4, 5]), np.array([5, -100]))])
    assert got.position_ids.tolist() == [0, 1, 0, 0, 1] and got.ends.tolist() == [2, 3, 5] and got.ids.tolist() == [1, 2, 3, 4, 5]


def preprocessed(shared_data, folder, name, **kw):
    "The first rows of the real Alpaca data through the real tokenizer."
    rows = json.loads((shared_data / "instruct" / "alpaca_en_demo.json").read_text(encoding="utf-8"))[:24]
    (folder / "rows.json").write_text(json.dumps(rows))
    run(PreprocessConfig(input=str(folder / "rows.json"), output_prefix=str(folder / name), tokenizer_name_or_path=str(shared_data / "tokenizers" / "qwen2"),
                         handler_name="AlpacaStyleInstructionHandler", seq_length=256, **kw), json=True)
    return str(folder / name)


def test_neat_packed_files_have_the_loss_of_unpacked_ones(shared_data, tmp_path):
    "What `preprocess --neat-pack` wrote of real chats, against the same chats unpacked; padding and the crossing of conversations teach nothing."
    plain, neat = (SFTDataset(preprocessed(shared_data, tmp_path, n, **kw), 256) for n, kw in (("plain", {}), ("neat", dict(neat_pack=True))))
    model = decoder()
    def small(s): return Sample(s.ids % 64, np.where(s.labels < 0, s.labels, s.labels % 64), s.position_ids, s.ends) # 64 words are enough to compare
    assert len(neat) < len(plain) / 1.5 and max(len(neat[i].ends) for i in range(len(neat))) > 2
    together = loss_of(model, [collate_sft(0)([small(neat[i])]) for i in range(len(neat))])
    apart = loss_of(model, [collate_sft(0)([small(plain[i])]) for i in range(len(plain))])
    assert together[1] == apart[1]
    np.testing.assert_allclose(together, apart, rtol=1e-5)
    assert all(s.position_ids[0] == 0 and (s.labels[s.ends - 1] == -100).all() for s in (neat[i] for i in range(len(neat))))
    np.testing.assert_allclose(loss_of(model, [collate_sft(0)([small(b[i])]) for b in [PackedDataset(neat)] for i in range(len(b))]), apart, rtol=1e-5)


def test_a_neat_packed_file_cut_short(tmp_path):
    with write_together(*(f"{tmp_path}/x_packed_{f}_document" for f in FIELDS)) as (i, m, lab):
        i.add([5, 6, 7, 8, 9, 0]); m.add([1, 1, 2, 2, 2, 0]); lab.add([5, 6, 7, 8, 9, -100])
    s, cut = (SFTDataset(f"{tmp_path}/x", S)[0] for S in (8, 4))
    assert s.labels.tolist() == [6, -100, 8, 9, -100, -100] and s.ends.tolist() == [2, 5, 6] and s.position_ids.tolist() == [0, 1, 0, 1, 2, 0]
    assert cut.labels.tolist() == [6, -100, 8, -100] and cut.ends.tolist() == [2, 4]


def test_a_plainly_packed_file_is_one_text(tmp_path):
    "As ModelLink trains on it: the mask is 1 throughout, and what was laid together sees each other."
    with write_together(*(f"{tmp_path}/x_packed_{f}_document" for f in FIELDS)) as (i, m, lab):
        i.add([5, 6, 7, 8]); m.add([1, 1, 1, 1]); lab.add([-100, 6, -100, 8])
    s = SFTDataset(f"{tmp_path}/x", 8)[0]
    assert s.ends is None and s.position_ids is None and s.labels.tolist() == [6, -100, 8, -100]


# Pairs --------------------------------------------------------------------------------------------

def test_pairs(tmp_path):
    ds = PairDataset(write_pairs(tmp_path / "p", [(3, 4, 2), (2, 1, 6), (5, 2, 2)]), 32, shuffle=False)
    batch = collate_pairs(0, 4)([ds[0], ds[1]])
    assert batch.input_ids.shape == (4, 8) and batch.num_targets == 4 + 1 + 2 + 6
    for row, (k, side) in enumerate([(0, 0), (1, 0), (0, 1), (1, 1)]):
        ids, labels = (ds.readers[f"{('chosen', 'rejected')[side]}_{f}"][k] for f in ("input_ids", "labels"))
        assert batch.input_ids[row, :len(ids)].tolist() == ids.tolist() and batch.labels[row, :len(ids) - 1].tolist() == labels[1:].tolist()
        assert (batch.input_ids[row, len(ids):] == 0).all() and (batch.labels[row, len(ids) - 1:] == -100).all()


@pytest.mark.parametrize("seq_length", [6, 9, 14, 20, 31, 64])
def test_long_pairs_give_in_proportion(tmp_path, seq_length):
    "ModelLink's three cases, from their description; both answers are cut alike and the question stays the same on both sides."
    rows = [(3, 40, 10), (30, 6, 2), (20, 20, 25), (2, 2, 2)]
    ds = PairDataset(write_pairs(tmp_path / "p", rows), seq_length, shuffle=False)
    for k, (q, a, b) in enumerate(rows):
        longer = max(a, b)
        if q + longer <= seq_length: keep_q, keep_a = q, longer
        elif 2 * longer < seq_length: keep_q, keep_a = seq_length - longer, longer
        elif 2 * q < seq_length: keep_q, keep_a = q, seq_length - q
        else: keep_a = int(seq_length * (longer / (q + longer))); keep_q = min(q, seq_length - keep_a)
        assert share_out(q, longer, seq_length) == (keep_q, keep_a)
        chosen, rejected = ds[k]
        assert (len(chosen.ids), len(rejected.ids)) == (keep_q + min(a, keep_a), keep_q + min(b, keep_a)) and max(len(chosen.ids), len(rejected.ids)) <= seq_length
        assert np.array_equal(chosen.ids[:keep_q], rejected.ids[:keep_q])
        for s, n, side in ((chosen, a, "chosen"), (rejected, b, "rejected")):
            assert np.array_equal(s.ids[keep_q:], ds.readers[f"{side}_input_ids"][k][q:q + min(n, keep_a)])
            assert (s.labels != -100).sum() == min(n, keep_a)


def test_real_pairs(shared_data, tmp_path):
    "What `preprocess` wrote of real pairs: every pair has one question, and both answers are learnt to the end."
    rows = json.loads((shared_data / "instruct" / "dpo_en_demo.json").read_text(encoding="utf-8"))[:40]
    (tmp_path / "rows.json").write_text(json.dumps(rows))
    run(PreprocessConfig(input=str(tmp_path / "rows.json"), output_prefix=str(tmp_path / "p"), tokenizer_name_or_path=str(shared_data / "tokenizers" / "qwen2"),
                         handler_name="SharegptStylePairwiseHandler"), json=True)
    ds = PairDataset(tmp_path / "p", 4096)
    assert len(ds) == 40
    for i in range(40):
        c, r = ds[i]
        q = int(np.argmax(c.labels != -100))
        assert q == int(np.argmax(r.labels != -100)) and np.array_equal(c.ids[:q + 1], r.ids[:q + 1]) and not np.array_equal(c.ids, r.ids)
    assert len(collate_pairs(0)([ds[0], ds[1]]).input_ids) == 4


@pytest.mark.slow
def test_a_batch_of_pairs_is_trls(tmp_path):
    "The collator of trl's DPO trainer on the same pairs: the same rows in the same order, learnt at the same places."
    trl = pytest.importorskip("trl.trainer.dpo_trainer", reason="trl is absent: pip install \"ascend_nb[dev]\" brings it")
    rows = [(3, 4, 2), (2, 1, 6), (5, 2, 2)]
    ds = PairDataset(write_pairs(tmp_path / "p", rows), 32, shuffle=False)
    ours = collate_pairs(0, 1)([ds[i] for i in range(3)])
    parts = [{f"{side}_ids": ds.readers[f"{side}_input_ids"][i][q:].tolist() for side in ("chosen", "rejected")}
             | {"prompt_ids": ds.readers["chosen_input_ids"][i][:q].tolist()} for i, (q, *_) in enumerate(rows)]
    theirs = trl.DataCollatorForPreference(pad_token_id=0)(parts)
    assert torch.equal(ours.input_ids, theirs["input_ids"])
    assert torch.equal((ours.labels != -100)[:, :-1], theirs["completion_mask"][:, 1:].bool())
