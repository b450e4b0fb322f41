"""Chat: what the model is shown, what is kept, and the command as a real process, interrupts included."""
import copy
import json
import os
import signal
import subprocess
import sys
import time

import pytest
import torch
from test_generate import TINY, one_thread  # noqa: F401

from ascend_nb.chat import Answer, Chat, converse
from ascend_nb.config import ChatConfig, SampleConfig
from ascend_nb.core import UserError
from ascend_nb.generate import stream
from ascend_nb.hf_format import load_model
from ascend_nb.tokenizers import load_tokenizer

CODE = "import sys; from ascend_nb.cli import main; sys.exit(main(['chat', *sys.argv[1:]]))"


@pytest.fixture(scope="module")
def folder(samples, tmp_path_factory):
    "A random model that never ends by itself, 4,000 positions long, with the sample tokenizer and its chat template."
    import transformers
    path, tok = tmp_path_factory.mktemp("chat") / "m", load_tokenizer(samples / "tokenizer")
    torch.manual_seed(1)
    config = transformers.LlamaConfig(**{**TINY, "vocab_size": tok.vocab_size, "max_position_embeddings": 4000, "eos_token_id": None})
    model = transformers.LlamaForCausalLM(config)
    with torch.no_grad(): model.lm_head.weight[tok.eos_token_id] = 0
    model.save_pretrained(path)
    tok.save(path)
    return path


@pytest.fixture(scope="module")
def both(folder): return load_model(folder), load_tokenizer(folder)


def new(both, **kw): return Chat(*both, ChatConfig(**{**dict(model="", max_new_tokens=8), **kw}))


def test_the_oldest_turns_go_first(both, folder):
    from transformers import AutoTokenizer
    chat, theirs = new(both, history_turns=2, system="Be brief."), AutoTokenizer.from_pretrained(folder)
    said = []
    for i in range(5):
        seen = [dict(role=r, content=c) for q, a in said[-2:] for r, c in (("user", q), ("assistant", a))]
        want = [dict(role="system", content="Be brief."), *seen, dict(role="user", content=f"Question {i}?")]
        assert chat.prompt(f"Question {i}?") == theirs.apply_chat_template(want, add_generation_prompt=True, return_dict=False)
        said.append((f"Question {i}?", "".join(chat.stream(f"Question {i}?"))))
    assert chat.history == said
    assert not any(f"Question {i}?" in both[1].decode(new(both, history_turns=0).prompt("Now?")) for i in range(5))


def test_answers_do_not_depend_on_what_is_remembered(both):
    "The memory saves work and changes nothing."
    model, tok = both
    chat = new(both, max_new_tokens=12)
    for i in range(4):
        ids = chat.prompt(f"Question {i}?")
        known = chat.memory.ids[:chat.memory.kv.length] if chat.memory.kv else []
        want = "".join(stream(model, tok, ids, SampleConfig(max_new_tokens=12), fresh=True))
        assert "".join(chat.stream(f"Question {i}?")) == want
        if i in (1, 2): assert os.path.commonprefix([known, ids]) # the beginning is there to be used


def test_too_long_a_talk_loses_its_oldest_part(both, capsys):
    chat = new(both, history_turns=50, max_new_tokens=100)
    for i in range(12): chat.history.append((f"{i} " + "late " * 400, "as ever"))
    ids = chat.prompt("Now?")
    text = both[1].decode(ids)
    assert len(ids) <= 3900 and "\n11 " in text and "\n0 late" not in text
    assert "oldest questions left out" in capsys.readouterr().err
    with pytest.raises(UserError, match="at most 3999"): list(chat.stream("late " * 4500))
    assert len(chat.history) == 12


def test_whoever_stops_listening_keeps_what_was_said(both):
    chat = new(both, max_new_tokens=60)
    pieces = chat.stream("Hello?")
    heard = "".join(piece for piece, _ in zip(pieces, range(6), strict=False))
    pieces.close()
    assert len(chat.history) == 1 and chat.history[0][1].startswith(heard) and len(chat.last.ids) < 60
    list(chat.stream("And?"))
    assert len(chat.history) == 2
    chat.clear()
    assert chat.history == [] and "".join(chat.stream("Hello?")).startswith(heard)


def test_draws_go_on_and_begin_again(both):
    chat = new(both, task="do_sample", temperature=1.5, history_turns=0)
    a, b = ["".join(chat.stream("Hello?")) for _ in range(2)]
    chat.clear()
    assert a != b and "".join(chat.stream("Hello?")) == a


def test_without_a_template_the_training_form_is_used(both, capsys, shared_data):
    model, _ = both
    tok = load_tokenizer(shared_data / "tokenizers" / "llama2.model")
    chat = Chat(model, tok, ChatConfig(model=""))
    assert "alpaca" in capsys.readouterr().err and "### Instruction:" in chat.cfg.stop
    assert tok.decode(chat.prompt("Hi")).endswith("### Instruction:\nHi\n\n### Response:\n")


def test_a_notebook_sees_an_answer_once(both):
    chat = new(both)
    with open(os.devnull, "w") as f: answer = chat.ask("Hello?", f)
    assert isinstance(answer, str) and answer == chat.history[0][1]
    from IPython.core.formatters import DisplayFormatter
    assert DisplayFormatter().format(Answer("x")) == ({}, {})
    assert f"**Model** {answer}" in chat._repr_markdown_()


def test_commands(both, capsys):
    lines = iter(["Hello?", "   ", "NEW", "Again?", "quit", "never"])
    chat = new(both)
    turns = converse(chat, sys.stdout, lambda: next(lines, None))
    assert [t["question"] for t in turns] == ["Hello?", "Again?"] and len(chat.history) == 1
    assert capsys.readouterr().out.splitlines() == [x for t in turns for x in t["answer"].splitlines()]


def test_adapters_that_are_not_there_and_a_question_that_is_too_long(both, capsys):
    lines = iter(["/adapter none", "/adapter poems", "late " * 4500, "Hello?"])
    turns = converse(new(both, truncate=True), sys.stdout, lambda: next(lines, None))
    err = capsys.readouterr().err
    assert len(turns) == 2 and err.count("adapters: -; at work: none") == 2 and "tokens left out at the beginning of the prompt" in err
    with pytest.raises(UserError, match="neither JSON nor the name of a file"): new(both, json_schema="none.json")


# ---- as a process

def start(folder, *args):
    env = {**os.environ, "ASCEND_NB_LANG": "en", "OMP_NUM_THREADS": "1", "PYTHONUNBUFFERED": "1"}
    pipe = subprocess.PIPE
    return subprocess.Popen([sys.executable, "-c", CODE, "--model", str(folder), *args], stdin=pipe, stdout=pipe, stderr=pipe, env=env, encoding="utf-8")


def test_questions_in_answers_out(folder):
    p = start(folder, "--max-new-tokens", "5")
    out, err = p.communicate("Hello?\n\nclear\n你好？\nexit\nnever\n", timeout=120)
    model, tok = load_model(folder), load_tokenizer(folder)
    want = []
    for q in ("Hello?", "你好？"):
        ids = tok.apply_chat([dict(role="user", content=q)], add_generation_prompt=True)
        want.append("".join(stream(model, tok, ids, SampleConfig(max_new_tokens=5), fresh=True)))
    assert (p.returncode, out) == (0, "\n".join(want) + "\n"), err
    assert err.count("You >> ") == 5 and "forgotten" in err
    p = start(folder, "--max-new-tokens", "5", "--json")
    out, err = p.communicate("Hello?\n", timeout=120)  # the end of the input ends the talk
    got = json.loads(out)["turns"]
    assert p.returncode == 0 and [t["answer"] for t in got] == want[:1] and want[0] in err and got[0]["stopped_by"] == "length"


@pytest.mark.skipif(sys.platform == "win32", reason="signals")
def test_ctrl_c_stops_the_answer_and_not_the_chat(folder):
    p = start(folder, "--max-new-tokens", "3500")
    p.stdin.write("Tell me all\n"); p.stdin.flush()
    first = p.stdout.read(1)  # it speaks
    assert first
    p.send_signal(signal.SIGINT)
    err = ""
    while "answer stopped" not in err:
        err += p.stderr.readline()
        assert p.poll() is None, err
    t0 = time.time()
    p.stdin.write("q\n"); p.stdin.flush()
    out, rest = p.communicate(timeout=60)
    assert p.returncode == 0, err + rest
    assert out.endswith("\n") and time.time() - t0 < 30


@pytest.mark.skipif(sys.platform == "win32", reason="signals")
def test_ctrl_c_twice_at_the_prompt_leaves(folder):
    p = start(folder)
    err = ""
    def press():  # a person's moment later: a signal between the prompt and the wait for a line is seen with the line only
        time.sleep(.5)
        p.send_signal(signal.SIGINT)
    while "You >> " not in err: err += p.stderr.read(1)
    press()
    while "Ctrl-C again" not in err: err += p.stderr.read(1)
    while not err.endswith("You >> "): err += p.stderr.read(1)
    press()
    out, rest = p.communicate(timeout=60)
    assert p.returncode == 0 and out == "", rest


@pytest.mark.parametrize("template,words", [
    ("{% for m in messages %}{% if m['role'] == 'user' %}{{ m['content'] }}\n{% endif %}{% endfor %}", "leaves out what the assistant said"),
    ("{% for m in messages %}{% if m['role'] != 'user' %}{{ raise_exception('only users may speak') }}{% endif %}{{ m['content'] }}{% endfor %}", "only users may speak"),
])
def test_a_template_without_an_assistant_is_told(both, template, words):
    model, tok = both
    deaf = copy.copy(tok)
    deaf.chat_template = template
    with pytest.raises(UserError, match=words): Chat(model, deaf, ChatConfig(model=""))
    if "leaves" in words: assert Chat(model, deaf, ChatConfig(model="", history_turns=0)).prompt("Who?")
