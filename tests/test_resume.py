"""Preprocessing that is killed, refused, starved and shared: the bytes are those of a calm run, or there is one sentence and nothing else."""
import collections
import json
import os
import random
import signal
import subprocess
import sys
import time

import numpy as np
import pytest
from test_indexed import both
from test_packing import knapsack

from ascend_nb.config import PreprocessConfig
from ascend_nb.core import UserError
from ascend_nb.indexed import IndexedReader
from ascend_nb.preprocess import run

DRIVER = '''
import json, os, sys
from ascend_nb import indexed, parts, preprocess, rows
from ascend_nb.config import PreprocessConfig
from ascend_nb.core import UserError
job = json.loads(sys.argv[1])
parts.Part.every_s, rows.CHUNK = job.get("every_s", 0), job.get("chunk", rows.CHUNK)
if "limit" in job:
    import resource, signal
    signal.signal(signal.SIGXFSZ, signal.SIG_IGN); resource.setrlimit(resource.RLIMIT_FSIZE, (job["limit"], resource.RLIM_INFINITY))
if "die" in job: # at the n-th call of a function
    owner, name, n = eval(job["die"][0]), *job["die"][1:]
    real, calls = getattr(owner, name), 0
    def wrapped(*a, **kw):
        global calls
        calls += 1
        if calls == n: os.kill(os.getpid(), 9)
        return real(*a, **kw)
    setattr(owner, name, wrapped)
try: print(json.dumps(preprocess.run(PreprocessConfig(**job["cfg"]), json=True)))
except UserError as e: print(e.text("en"), file=sys.stderr); sys.exit(2)
'''


def start(cfg, **job): return subprocess.Popen([sys.executable, "-c", DRIVER, json.dumps(dict(job, cfg=cfg))], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def finish(p):
    out, err = p.communicate(timeout=120)
    assert p.returncode == 0, err
    return json.loads(out)


def outputs(folder): return {p.name: p.read_bytes() for p in folder.iterdir() if p.name.startswith("out")}


@pytest.fixture(scope="module")
def tok(tmp_path_factory, shared_data):
    folder = tmp_path_factory.mktemp("tok")
    (folder / "tokenizer.json").symlink_to(shared_data / "tokenizers" / "qwen2" / "tokenizer.json")
    chatml = "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|im_end|>\n{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
    (folder / "tokenizer_config.json").write_text(json.dumps(dict(tokenizer_class="PreTrainedTokenizerFast", eos_token="<|im_end|>", pad_token="<|endoftext|>", chat_template=chatml)))
    return str(folder)


@pytest.fixture(scope="module")
def web(tmp_path_factory, shared_data):
    "Real documents, 2.5 MB: two columns, some empty, a tenth of them twice, some lines that are no rows."
    rng, path = random.Random(0), tmp_path_factory.mktemp("web") / "web.jsonl"
    docs = [json.loads(x)["text"] for x in (shared_data / "pretrain" / "c4_demo.jsonl").read_text(encoding="utf-8").splitlines()]
    docs += [json.loads(x)["text"] for x in (shared_data / "pretrain" / "c4_demo.jsonl").read_text(encoding="utf-8").replace("the", "teh").splitlines()]
    with open(path, "w", encoding="utf-8") as f:
        size, n = 0, 0
        while size < 2_500_000:
            t = rng.choice(docs) if rng.random() < .1 else f"{n} {rng.choice(docs)}"
            row = json.dumps(dict(text=t if rng.random() > .02 else "", title=t[:40] if rng.random() > .3 else ""), ensure_ascii=False)
            size += f.write((row if rng.random() > .01 else "no row") + "\n"); n += 1
    return str(path)


@pytest.fixture(scope="module")
def chats(tmp_path_factory, shared_data):
    "The two Alpaca files as lines, one and a half MB."
    path = tmp_path_factory.mktemp("chats") / "chats.jsonl"
    rows = [r for n in ("alpaca_en_demo.json", "alpaca_zh_demo.json", "oaast_sft_zh.json") for r in json.loads((shared_data / "instruct" / n).read_text(encoding="utf-8"))]
    path.write_text("".join(json.dumps(r, ensure_ascii=False) + "\n" for r in rows), encoding="utf-8")
    return str(path)


def kinds(web, chats, shared_data, tok, out):
    "Configurations of every kind of work."
    base = dict(output_prefix=str(out), tokenizer_name_or_path=tok, append_eod=True)
    text = dict(base, input=web, json_keys=["text", "title"], on_bad_row="report")
    sft = dict(base, input=chats, handler_name="AlpacaStyleInstructionHandler", seq_length=512)
    return dict(text=dict(text, dedup=True, min_tokens=8, max_tokens=900), pack=dict(sft, pack=True, dedup=True), neat=dict(sft, neat_pack=True),
                pair=dict(base, input=str(shared_data / "instruct" / "dpo_zh_demo.json"), handler_name="SharegptStylePairwiseHandler", max_tokens=700))


# Killed --------------------------------------------------------------------------------------------

MOMENTS = [("parts.Part", "put", 1), ("parts.Part", "put", 3), ("parts.Part", "_save", 1), ("parts.Part", "_save", 2), ("preprocess", "pack_rows", 1),
           ("indexed.IndexedWriter", "finish", 2), ("preprocess", "commit_all", 1)]


@pytest.fixture(scope="module")
def calm(web, chats, shared_data, tok, tmp_path_factory):
    "What an undisturbed run of each kind writes, and says."
    made = {}
    for kind in ("text", "pack", "neat", "pair"):
        folder = tmp_path_factory.mktemp(kind)
        said = run(PreprocessConfig(**kinds(web, chats, shared_data, tok, folder / "out")[kind]), json=True)
        made[kind] = outputs(folder), {k: v for k, v in said.items() if isinstance(v, int) and k not in ("parts", "resumed")}
    return made


def same(calm, kind, folder, said):
    want, counts = calm[kind]
    assert outputs(folder) == want and {k: said[k] for k in counts} == counts
    assert not [p for p in os.listdir(folder) if p.startswith(".")]


@pytest.mark.parametrize("kind", [pytest.param("text", marks=pytest.mark.slow), "pack"])
def test_killed_at_every_step(web, chats, shared_data, tok, calm, tmp_path, kind):
    "SIGKILL in the middle of a piece, of a mark, of packing, of finishing; one run after another, each going on with what it finds."
    cfg = kinds(web, chats, shared_data, tok, tmp_path / "out")[kind]
    died = 0
    for moment in MOMENTS:
        p = start(cfg, die=moment, chunk=1 << 18)
        p.communicate(timeout=120)
        assert p.returncode in (0, -9)
        if p.returncode == 0: # that step is not part of this work
            for f in outputs(tmp_path): os.unlink(tmp_path / f)
            continue
        died += 1
        assert not outputs(tmp_path), f"a file under a final name after {moment}"
    assert died >= 5
    same(calm, kind, tmp_path, finish(start(cfg, chunk=1 << 18)))


@pytest.mark.slow
def test_killed_between_any_two_renames(chats, tok, calm, web, shared_data, tmp_path):
    "The process dies at its n-th rename, for every n: never a readable half, and the next run mends it."
    cfg, want = kinds(web, chats, shared_data, tok, tmp_path / "out")["neat"], calm["neat"][0]
    for n in range(1, 40):
        p = start(cfg, die=("os", "replace", n), every_s=60)
        p.communicate(timeout=120)
        if p.returncode == 0: break
        now = outputs(tmp_path)
        assert all(now[name] == want[name] for name in now if name.endswith(".idx")) # an index that can be seen is whole
        assert all(f"{name[:-4]}.bin" in now for name in now if name.endswith(".idx"))
    assert 8 < n < 39
    same(calm, "neat", tmp_path, finish(start(cfg)))


@pytest.mark.slow
@pytest.mark.parametrize("n_subs", [1, 3])
def test_killed_at_random_moments(web, chats, shared_data, tok, calm, tmp_path, n_subs):
    "From outside, again and again, until a run gets through; with parts, all of them die."
    cfg, rng, kills = dict(kinds(web, chats, shared_data, tok, tmp_path / "out")["text"], n_subs=n_subs), random.Random(n_subs), 0
    while True:
        p = start(cfg)
        try: p.wait((.5 if n_subs == 1 else 1.2) + rng.random() * .4 + .3 * kills)
        except subprocess.TimeoutExpired: p.send_signal(signal.SIGKILL); p.wait(); kills += 1
        else: break
        assert kills < 30
    assert kills > 0
    same(calm, "text", tmp_path, finish(p))


@pytest.mark.slow
def test_a_killed_part_ends_the_run_and_its_work_is_kept(web, chats, shared_data, tok, calm, tmp_path):
    cfg = dict(kinds(web, chats, shared_data, tok, tmp_path / "out")["text"], n_subs=2)
    p = start(cfg)
    state, until = tmp_path / ".out.work/000/state.json", time.time() + 60
    while not state.exists() and time.time() < until: time.sleep(.01)
    children = [int(x) for x in open(f"/proc/{p.pid}/task/{p.pid}/children").read().split()]
    os.kill(children[1], signal.SIGKILL)
    _, err = p.communicate(timeout=60)
    assert p.returncode == 2 and "Part 1 of 2 ended without a result (signal 9)" in err and "kept in" in err and not outputs(tmp_path)
    said = finish(start(cfg))
    assert said["resumed"]
    same(calm, "text", tmp_path, said)


# Shared --------------------------------------------------------------------------------------------

@pytest.mark.parametrize("kind, n_subs, workers", [("text", 1, 1), ("text", 3, 1), ("pack", 2, 2), pytest.param("neat", 3, 1, marks=pytest.mark.slow),
                                                   pytest.param("pair", 2, 2, marks=pytest.mark.slow)])
def test_any_number_of_processes_and_threads_makes_the_same_bytes(web, chats, shared_data, tok, calm, tmp_path, kind, n_subs, workers):
    cfg = dict(kinds(web, chats, shared_data, tok, tmp_path / "out")[kind], n_subs=n_subs, workers=workers)
    said = finish(start(cfg))
    assert said["parts"] == n_subs
    same(calm, kind, tmp_path, said)


def test_what_the_text_run_wrote_is_what_a_plain_loop_writes(web, tok, calm):
    "Rows, duplicates, filters and bad rows, told apart by a loop that shares nothing with the room."
    import tokenizers
    rust, counts, seen, want, bad = tokenizers.Tokenizer.from_file(f"{tok}/tokenizer.json"), collections.Counter(), set(), dict(text=[], title=[]), 0
    eos = rust.token_to_id("<|im_end|>")
    for line in open(web, encoding="utf-8"):
        if line == "no row\n": bad += 1; continue
        row = json.loads(line)
        key = row["text"], row["title"]
        if key == ("", ""): counts["skipped_empty"] += 1; continue
        if key in seen: counts["duplicates"] += 1; continue
        seen.add(key)
        kept = []
        for name in want:
            ids = [*rust.encode(row[name]).ids, eos] if row[name] else []
            if 8 <= len(ids) <= 900: want[name].append(ids); kept.append(name)
        counts["documents" if kept else "filtered"] += 1
    outs, said = calm["text"]
    for name, docs in want.items(): assert np.array_equal(np.frombuffer(outs[f"out_{name}_document.bin"], np.int32), np.concatenate(docs))
    assert said["bad_rows"] == bad == outs["out_bad_rows.jsonl"].count(b"\n") and min(bad, *counts.values()) > 3
    assert {k: said[k] for k in counts} == counts and said["tokens"] == sum(len(d) for docs in want.values() for d in docs)


@pytest.mark.parametrize("kind", ["pack", "neat"])
def test_packed_rows_hold_every_sample_once(chats, tok, calm, tmp_path, kind):
    "Rows are taken apart again and compared with an unpacked run; there are no more of them than ModelLink's knapsack makes."
    cfg = dict(input=chats, output_prefix=str(tmp_path / "flat"), tokenizer_name_or_path=tok, append_eod=True, handler_name="AlpacaStyleInstructionHandler", seq_length=512, dedup=kind == "pack")
    run(PreprocessConfig(**cfg), json=True)
    ids, labels = (IndexedReader(tmp_path / f"flat_packed_{k}_document") for k in ("input_ids", "labels"))
    left = collections.Counter((tuple(i.tolist()), tuple(x.tolist())) for i, x in zip(ids[:], labels[:], strict=True))
    rows = [np.frombuffer(calm[kind][0][f"out_packed_{k}_document.bin"], np.int32).reshape(-1, 512) for k in ("input_ids", "attention_mask", "labels")]
    pad, begins = 151643, {t for t, _ in left}
    for i, m, x in zip(*rows, strict=True):
        at = 0
        while at < 512 and (i[at] != pad or x[at:].max() > 0):
            if kind == "neat": n = int((m == m[at]).sum())
            else: n = next(n for n in range(1, 513 - at) if tuple(i[at:at + n].tolist()) in begins)
            sample = tuple(i[at:at + n].tolist()), tuple(x[at:at + n].tolist())
            left[sample] -= 1
            assert left[sample] >= 0
            at += n
        assert (i[at:] == pad).all() and (x[at:] == -100).all() and (m[at:] == (kind == "pack")).all()
        if kind == "neat": assert m[:at].tolist() == sorted(m[:at].tolist()) and set(m[:at].tolist()) == set(range(1, m[:at].max() + 1))
        else: assert (m == 1).all()
    assert not +left and len(rows[0]) <= knapsack(ids.lengths.tolist(), 511)


# Refused, starved ----------------------------------------------------------------------------------

def test_two_runs_on_one_prefix(web, chats, shared_data, tok, calm, tmp_path):
    cfg = kinds(web, chats, shared_data, tok, tmp_path / "out")["text"]
    first = start(cfg)
    until = time.time() + 60
    lock = tmp_path / ".out.work/lock"
    while not (lock.exists() and lock.read_text().strip()) and time.time() < until: time.sleep(.002)
    first.send_signal(signal.SIGSTOP)  # it holds the lock for as long as we look
    try:
        with pytest.raises(UserError, match=f"process {first.pid} on"): run(PreprocessConfig(**cfg), json=True)
    finally: first.send_signal(signal.SIGCONT)
    same(calm, "text", tmp_path, finish(first))


def test_a_full_disk_is_one_sentence_and_the_work_goes_on_later(web, chats, shared_data, tok, calm, tmp_path):
    cfg = kinds(web, chats, shared_data, tok, tmp_path / "out")["text"]
    p = start(cfg, limit=500_000)
    _, err = p.communicate(timeout=60)
    assert p.returncode == 2 and "Cannot write" in err and "File too large" in err and "kept in" in err and "Traceback" not in err
    assert not outputs(tmp_path) and os.listdir(tmp_path) == [".out.work"]
    said = finish(start(cfg))
    assert said["resumed"]
    same(calm, "text", tmp_path, said)


@pytest.mark.slow
@pytest.mark.parametrize("n_subs", [1, 2])
def test_a_disk_that_is_full_anywhere(tok, tmp_path, n_subs):
    "Every size at which the disk may refuse, over an older set of files: one sentence and the old set, or the whole new one; then the same command mends it."
    chat = dict(instruction="q " * 40, input="", output="a " * 60)
    rows = [json.dumps(chat)] * 40 + ["no row " * 40] * 60 # the list of bad rows is the longest file
    (tmp_path / "x.jsonl").write_text("\n".join(rows))
    cfg = dict(input=str(tmp_path / "x.jsonl"), output_prefix=str(tmp_path / "out"), tokenizer_name_or_path=tok, handler_name="AlpacaStyleInstructionHandler", on_bad_row="report", n_subs=n_subs)
    new = {k: v for k, v in (finish(start(cfg)), outputs(tmp_path))[1].items() if not k.endswith(".jsonl")}
    (tmp_path / "old.jsonl").write_text(json.dumps(dict(instruction="old", input="", output="one")))
    finish(start(dict(cfg, input=str(tmp_path / "old.jsonl"))))
    old, ended = outputs(tmp_path), []
    sizes = sorted({0, 30, 300, 900, *(len(v) + d for v in new.values() for d in (-1, 0)), 10**6})
    for limit in sizes:
        p = start(cfg, limit=limit)
        _, err = p.communicate(timeout=60)
        now = {k: v for k, v in outputs(tmp_path).items() if not k.endswith(".jsonl")}
        assert p.returncode in (0, 2) and "Traceback" not in err, (limit, err)
        if p.returncode: assert "Cannot write" in err and err.strip().count("Cannot write") == 1, (limit, err)
        assert now == (old if p.returncode and now == old else new), limit
        ended.append(p.returncode)
    assert ended[0] == 2 and ended[-1] == 0
    finish(start(cfg))
    assert {k: v for k, v in outputs(tmp_path).items() if not k.endswith(".jsonl")} == new and not [f for f in os.listdir(tmp_path) if f.startswith(".")]


@pytest.mark.slow
def test_another_command_or_other_data_starts_over(tok, tmp_path):
    (tmp_path / "x.txt").write_text("one two three\n" * 20_000)
    cfg = dict(input=str(tmp_path / "x.txt"), output_prefix=str(tmp_path / "out"), tokenizer_name_or_path=tok)
    for change in (dict(append_eod=True), "data", dict(resume=False)):
        p = start(cfg, die=("parts.Part", "put", 3), chunk=1 << 16); p.communicate(timeout=60)
        assert p.returncode == -9
        if change == "data": (tmp_path / "x.txt").write_text("one two four\n" * 20_000)
        assert not finish(start({**cfg, **(change if isinstance(change, dict) else {})}, chunk=1 << 16))["resumed"]
    p = start(cfg, die=("parts.Part", "put", 3), chunk=1 << 16); p.communicate(timeout=60)
    assert finish(start(dict(cfg, workers=1, log_interval=7), chunk=1 << 16))["resumed"] # threads decide no bytes


def test_ctrl_c_keeps_what_was_marked(web, chats, shared_data, tok, calm, tmp_path):
    cfg = kinds(web, chats, shared_data, tok, tmp_path / "out")["text"]
    p, until = start(cfg, chunk=1 << 17), time.time() + 60
    while not (tmp_path / ".out.work/000/state.json").exists() and time.time() < until: time.sleep(.01)
    p.send_signal(signal.SIGINT)
    _, err = p.communicate(timeout=60)
    assert p.returncode != 0 and "kept in" in err and not outputs(tmp_path)
    said = finish(start(cfg, chunk=1 << 17))
    assert said["resumed"]
    same(calm, "text", tmp_path, said)


# Bad rows ------------------------------------------------------------------------------------------

@pytest.mark.parametrize("policy", ["fail", "skip", "report"])
def test_rows_that_cannot_be_used(tok, tmp_path, policy):
    "Not UTF-8, not JSON, not an object, a wrong column, a chat that nobody answers: named by their line, or left out."
    good = [dict(instruction=f"q{i}", input="", output=f"a{i}") for i in range(8)]
    lines = [json.dumps(r).encode() for r in good]
    lines[1:1] = [b'{"instruction": "\xff"}', b'{"instruction": ', b"[1]", b'{"question": "x"}', json.dumps(dict(instruction=5, output="x")).encode()]
    (tmp_path / "x.jsonl").write_bytes(b"\n".join(lines))
    cfg = PreprocessConfig(input=str(tmp_path / "x.jsonl"), output_prefix=str(tmp_path / "out"), tokenizer_name_or_path=tok, handler_name="AlpacaStyleInstructionHandler", on_bad_row=policy)
    if policy == "fail":
        with pytest.raises(UserError, match="line 2 holds the byte 0xff"): run(cfg, json=True)
        assert not outputs(tmp_path)
        return
    said = run(cfg, json=True)
    assert said["documents"] == 8 and said["bad_rows"] == 5 and [b["row"] for b in said["bad_examples"]] == [f"row {i} of x.jsonl" for i in range(2, 7)]
    (tmp_path / "good.jsonl").write_text("\n".join(map(json.dumps, good)))
    run(PreprocessConfig(**{**vars(cfg), "input": str(tmp_path / "good.jsonl"), "output_prefix": str(tmp_path / "fine")}), json=True)
    for k in ("input_ids", "attention_mask", "labels"): assert both(tmp_path / f"out_packed_{k}_document") == both(tmp_path / f"fine_packed_{k}_document")
    file = tmp_path / "out_bad_rows.jsonl"
    assert file.exists() == (policy == "report")
    if policy == "report": assert [json.loads(x)["row"] for x in file.read_text(encoding="utf-8").splitlines()] == [f"row {i} of x.jsonl" for i in range(2, 7)]


def test_a_chat_that_the_template_refuses_is_a_bad_row(tok, tmp_path):
    rows = [dict(messages=[dict(role="user", content="q"), dict(role="assistant", content="a")]), dict(messages=[dict(role="user", content="q")] * 2 + [dict(role="assistant", content="a")])]
    (tmp_path / "x.jsonl").write_text("\n".join(map(json.dumps, rows)))
    cfg = dict(input=str(tmp_path / "x.jsonl"), output_prefix=str(tmp_path / "out"), tokenizer_name_or_path=tok, handler_name="OpenAIInstructionHandler", prompt_type="qwen")
    with pytest.raises(UserError): run(PreprocessConfig(**cfg), json=True)
    said = run(PreprocessConfig(**cfg, on_bad_row="skip"), json=True)
    assert said["documents"] == said["bad_rows"] == 1 and said["bad_examples"][0]["row"] == "row 2 of x.jsonl"


def test_a_pair_that_lacks_a_side_is_a_bad_row_and_left_out_of_all_four_files(tok, tmp_path):
    pair = dict(instruction="q", input="", chosen="good", rejected="bad")
    (tmp_path / "x.jsonl").write_text("\n".join(json.dumps(r) for r in (pair, dict(pair, rejected=""), {k: v for k, v in pair.items() if k != "chosen"}, dict(pair, chosen=5), pair)))
    cfg = dict(input=str(tmp_path / "x.jsonl"), output_prefix=str(tmp_path / "out"), tokenizer_name_or_path=tok, handler_name="AlpacaStylePairwiseHandler")
    with pytest.raises(UserError, match="row 2 of x.jsonl"): run(PreprocessConfig(**cfg), json=True)
    said = run(PreprocessConfig(**cfg, on_bad_row="skip"), json=True)
    assert (said["documents"], said["skipped_empty"], said["bad_rows"]) == (2, 0, 3) and {len(IndexedReader(f)) for f in said["files"]} == {2}


def test_nothing_to_learn_is_left_out_and_counted(tok, tmp_path):
    rows = [dict(messages=[dict(role="user", content="q"), dict(role="assistant", content="a", loss_weight=w)]) for w in (1, 0)]
    (tmp_path / "x.jsonl").write_text("\n".join(map(json.dumps, rows)))
    said = run(PreprocessConfig(input=str(tmp_path / "x.jsonl"), output_prefix=str(tmp_path / "out"), tokenizer_name_or_path=tok, handler_name="OpenAIInstructionHandler", on_bad_row="skip"), json=True)
    assert said["documents"] == 1 and said["skipped_masked"] + said["bad_rows"] == 1


def test_nothing_left_says_why(tok, tmp_path):
    (tmp_path / "x.txt").write_text("one\n\none\n")
    cfg = PreprocessConfig(input=str(tmp_path / "x.txt"), output_prefix=str(tmp_path / "out"), tokenizer_name_or_path=tok, min_tokens=9, dedup=True)
    with pytest.raises(UserError, match="of 3 rows, 1 empty, 1 below --min-tokens, 1 duplicates"): run(cfg, json=True)
    assert os.listdir(tmp_path) == ["x.txt"]


def test_pack_needs_chats_and_a_length(chats, tok, tmp_path):
    (tmp_path / "x.txt").write_text("one\n")
    for cfg in (dict(input=str(tmp_path / "x.txt"), seq_length=9), dict(input=chats)):
        with pytest.raises(UserError, match="expected instruction data and --seq-length"): run(PreprocessConfig(**cfg, output_prefix=str(tmp_path / "out"), tokenizer_name_or_path=tok, pack=True), json=True)


# Memory --------------------------------------------------------------------------------------------

@pytest.mark.slow
def test_memory_of_200_mb(shared_data, tok, tmp_path):
    text = (shared_data / "pretrain" / "c4_demo.jsonl").read_text(encoding="utf-8")
    with open(tmp_path / "x.jsonl", "w", encoding="utf-8") as f:
        while f.tell() < 200e6: f.write(text)
    p = start(dict(input=str(tmp_path / "x.jsonl"), output_prefix=str(tmp_path / "out"), tokenizer_name_or_path=tok, dedup=False), every_s=5)
    peak = 0
    while p.poll() is None:
        try: peak = max(peak, next(int(x.split()[1]) for x in open(f"/proc/{p.pid}/status") if x.startswith("VmHWM")))
        except (OSError, StopIteration): pass
        time.sleep(.2)
    assert finish(p)["documents"] > 1000 and peak < 600 << 10
