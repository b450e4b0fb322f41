"""A real server in a process of its own, and the real `openai` client: many at once, those who leave, those who send nonsense."""
import asyncio
import json
import os
import queue
import re
import signal
import socket
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from conftest import ROOT

from ascend_nb.config import ModelConfig, SampleConfig
from ascend_nb.generate import prompt_ids, stream
from ascend_nb.hf_format import load_model, save_model
from ascend_nb.model import Decoder
from ascend_nb.serve import _body
from ascend_nb.speaker import End, Speaker
from ascend_nb.tokenizers import load_tokenizer
from ascend_nb.wire import Refused

openai = pytest.importorskip("openai", reason="the openai package comes with ascend_nb[dev]")
import httpx  # noqa: E402

COMMAND = [sys.executable, "-m", "ascend_nb.cli", "serve"]


@pytest.fixture(scope="module")
def folder(samples, tmp_path_factory):
    tok = load_tokenizer(samples / "tokenizer")
    model = Decoder(ModelConfig(vocab_size=tok.vocab_size, hidden_size=64, num_hidden_layers=2, num_attention_heads=4, max_position_embeddings=512, eos_token_id=[tok.eos_token_id])).eval()
    model.init_weights(3)
    return save_model(model, tmp_path_factory.mktemp("serve") / "tales", tok)


@pytest.fixture(scope="module")
def server(folder, tmp_path_factory):
    "The address of a running server, and its process."
    log = open(tmp_path_factory.mktemp("log") / "log.txt", "w+")
    p = subprocess.Popen([*COMMAND, "--model", str(folder), "--port", "0", "--slots", "4", "--queue", "16", "--max-body-mb", "0.1", "--timeout-s", "60"], cwd=ROOT,
                         env={**os.environ, "ASCEND_NB_API_KEY": "secret"}, stdout=log, stderr=log)
    end, found = time.monotonic() + 60, None
    while not found and time.monotonic() < end and p.poll() is None:
        time.sleep(.1)
        found = re.search(r"http://\S+/v1", open(log.name).read())
    assert found, open(log.name).read()
    yield found[0], p
    p.send_signal(signal.SIGTERM)
    assert p.wait(20) == 0, open(log.name).read()
    assert "Traceback" not in open(log.name).read()


@pytest.fixture
def client(server): return openai.OpenAI(base_url=server[0], api_key="secret", max_retries=0, timeout=60)


@pytest.fixture
def raw(server): return httpx.Client(base_url=server[0].removesuffix("/v1"), headers={"Authorization": "Bearer secret"}, timeout=60)


def until_idle(raw):
    end = time.monotonic() + 20
    while (h := raw.get("/health").json())["running"] + h["waiting"] and time.monotonic() < end: time.sleep(.05)
    assert h["running"] == h["waiting"] == 0 and h["status"] == "ok"


def test_sixteen_who_stream_get_what_each_would_get_alone(client, raw, folder):
    model, tok = load_model(folder).eval(), load_tokenizer(folder)
    prompts = [f"Once there was a fox who had {n} apples" for n in range(16)]

    def one(p):
        made = client.completions.create(model="tales", prompt=p, max_tokens=20, temperature=0, stream=True, stream_options={"include_usage": True})
        parts = list(made)
        return "".join(c.choices[0].text for c in parts if c.choices), parts[-1].usage.completion_tokens
    with ThreadPoolExecutor(16) as pool: got = list(pool.map(one, prompts))
    alone = [stream(model, tok, prompt_ids(tok, p), SampleConfig(max_new_tokens=20)) for p in prompts]
    assert got == [("".join(s), len(s.ids)) for s in alone]
    until_idle(raw)


def test_chat_whole_and_in_pieces(client):
    ask = dict(model="tales", messages=[{"role": "system", "content": "You tell tales."}, {"role": "user", "content": "Of a fox?"}], max_tokens=16, seed=7)
    one = client.chat.completions.create(**ask)
    parts = list(client.chat.completions.create(**ask, stream=True))
    assert "".join(c.choices[0].delta.content or "" for c in parts) == one.choices[0].message.content
    assert parts[0].choices[0].delta.role == "assistant" and parts[-1].choices[0].finish_reason == one.choices[0].finish_reason
    assert one.usage.total_tokens == one.usage.prompt_tokens + one.usage.completion_tokens
    two = client.chat.completions.create(**{**ask, "seed": 7, "n": 2, "temperature": 1.5})
    assert [c.index for c in two.choices] == [0, 1] and two.choices[0].message.content != two.choices[1].message.content


def test_log_probabilities_are_those_of_transformers(client, folder):
    from transformers import AutoModelForCausalLM
    tok, hf = load_tokenizer(folder), AutoModelForCausalLM.from_pretrained(folder).eval()
    ask = dict(model="tales", prompt="A fox and a 狐", max_tokens=6, temperature=0, logprobs=3)
    one = client.completions.create(**ask).choices[0]
    ids = prompt_ids(tok, ask["prompt"])
    out = stream(load_model(folder).eval(), tok, ids, SampleConfig(max_new_tokens=6))
    assert "".join(out) == one.text
    with torch.inference_mode(): p = hf(torch.tensor([ids + out.ids])).logits[0, len(ids) - 1:-1].log_softmax(-1)
    assert one.logprobs.token_logprobs == pytest.approx([float(row[t]) for row, t in zip(p, out.ids, strict=True)], abs=1e-4)
    assert [sorted(t.values(), reverse=True)[0] for t in one.logprobs.top_logprobs] == pytest.approx([float(row.max()) for row in p], abs=1e-4)
    assert one.logprobs.text_offset[0] == 0 and len(one.logprobs.tokens) == 6
    parts = [c.choices[0].logprobs for c in client.completions.create(**ask, stream=True) if c.choices]
    assert [p.token_logprobs[0] for p in parts if p] == one.logprobs.token_logprobs
    talk = dict(model="tales", messages=[{"role": "user", "content": "Of a 狐?"}], max_tokens=6, temperature=0, logprobs=True, top_logprobs=2)
    told, text = (c := client.chat.completions.create(**talk).choices[0]).logprobs.content, c.message.content
    assert all(len(t.top_logprobs) == 2 and t.top_logprobs[0].logprob == t.logprob for t in told)
    assert bytes(b for t in told for b in t.bytes).decode(errors="ignore").startswith(text)


def test_an_answer_of_a_given_form(client):
    pytest.importorskip("llguidance")
    shape = dict(type="object", properties=dict(legs=dict(type="integer", minimum=1, maximum=9), wings=dict(type="boolean")), required=["legs", "wings"], additionalProperties=False)
    ask = dict(model="tales", messages=[{"role": "user", "content": "Of a fox?"}], max_tokens=60)
    for i in range(3):
        made = json.loads(client.chat.completions.create(**ask, seed=i, response_format=dict(type="json_schema", json_schema=dict(name="beast", schema=shape))).choices[0].message.content)
        assert made["legs"] in range(1, 10) and made["wings"] in (True, False) and len(made) == 2
    assert re.fullmatch("[ab]{3}c", client.chat.completions.create(**ask, extra_body=dict(guided_regex="[ab]{3}c")).choices[0].message.content)
    with pytest.raises(openai.BadRequestError, match="cannot be used"): client.chat.completions.create(**ask, response_format=dict(type="json_schema", json_schema=dict(name="x", schema=dict(type="wizard"))))


def test_a_stop_word_ends_and_is_not_shown(client):
    whole = client.completions.create(model="tales", prompt="A fox", max_tokens=24, temperature=0).choices[0].text
    word = whole[len(whole) // 2:][:3]
    cut = client.completions.create(model="tales", prompt="A fox", max_tokens=24, temperature=0, stop=word).choices[0]
    assert cut.text == whole[:whole.index(word)] and cut.finish_reason == "stop"


def test_whoever_leaves_frees_the_slot(client, raw):
    for _ in range(6):
        made = client.completions.create(model="tales", prompt="A fox", max_tokens=450, stream=True)
        next(iter(made))
        made.close()
    with pytest.raises(httpx.ReadTimeout): raw.post("/v1/completions", json={"prompt": "A fox", "max_tokens": 490, "n": 16}, timeout=.05)
    until_idle(raw)


def test_a_full_line_turns_away_with_429_and_nobody_else_notices(client, raw):
    def one(i):
        try: return client.completions.create(model="tales", prompt="A fox", max_tokens=60, temperature=0).usage.completion_tokens
        except openai.RateLimitError as e: return e.response.headers["retry-after"]
    with ThreadPoolExecutor(40) as pool: got = list(pool.map(one, range(40)))
    assert "1" in got and len([n for n in got if n != "1"]) >= 16 and len({n for n in got if n != "1"}) == 1, got
    until_idle(raw)


@pytest.mark.parametrize("path,body,status,words", [
    ("/v1/chat/completions", b"{", 400, "no JSON object"), ("/v1/chat/completions", b"[1]", 400, "no JSON object"), ("/v1/chat/completions", b"[" * 50000, 400, "no JSON object"),
    ("/v1/chat/completions", {}, 400, "at least one message"), ("/v1/chat/completions", {"messages": "hello"}, 400, "at least one message"),
    ("/v1/chat/completions", {"messages": [{"role": "wizard", "content": "x"}]}, 400, "wizard"), ("/v1/chat/completions", {"messages": [7]}, 400, "role and content"),
    ("/v1/completions", {"prompt": "x" * 200_000}, 413, "more than 0.1 MB"), ("/v1/completions", {"prompt": {"a": 1}}, 400, "a text, a list of ids"),
    ("/v1/completions", {"prompt": [10**9]}, 400, "Use the tokenizer that belongs to the model"), ("/v1/completions", {"prompt": "word " * 2000}, 400, "Shorten the prompt"),
    ("/v1/completions", {"prompt": "x", "temperature": 9}, 400, "from 0 to 2"), ("/v1/completions", {"prompt": "x", "max_tokens": 0}, 400, "from 1 to"),
    ("/v1/completions", {"prompt": "x", "max_tokens": True}, 400, "from 1 to"), ("/v1/completions", {"prompt": "x", "n": 99}, 400, "from 1 to 16"), ("/v1/completions", {"prompt": "x", "n": 0}, 400, "from 1 to 16"), ("/v1/completions", {"prompt": "x", "echo": True}, 400, "Found echo"),
    ("/v1/chat/completions", {"messages": [{"role": "user", "content": "x"}], "tools": 5}, 400, "a list of objects"), ("/v1/completions", {"prompt": "x", "stream": "yes"}, 400, "true or false"),
    ("/v1/completions", {"prompt": "x", "model": "gpt-9"}, 404, "expected 'tales'"), ("/v1/completions", {"prompt": "x", "audio": {"voice": "alto"}}, 400, "cannot do"),
    ("/v1/completions", {"prompt": "x", "logprobs": 99}, 400, "from 0 to 20"), ("/v1/chat/completions", {"messages": [{"role": "user", "content": "x"}], "logprobs": "yes"}, 400, "true or false"),
    ("/v1/completions", {"prompt": "x", "response_format": {"type": "xml"}}, 400, "json_object"), ("/v1/completions", {"prompt": "x", "logit_bias": {"5": 1000}}, 400, "from -100 to 100"),
    ("/v1/completions", {"prompt": "x", "logit_bias": {"wolf": 1}}, 400, "a number each"),
])
def test_nonsense_is_answered_in_the_clients_terms(raw, path, body, status, words):
    out = raw.post(path, content=body) if isinstance(body, bytes) else raw.post(path, json=body)
    assert out.status_code == status and words in out.json()["error"]["message"], out.text
    assert set(out.json()["error"]) == {"message", "type", "param", "code"}
    assert raw.get("/health").json()["status"] == "ok"


def test_who_may_come_in(server, raw):
    with pytest.raises(openai.AuthenticationError): openai.OpenAI(base_url=server[0], api_key="guess", max_retries=0).models.list()
    assert raw.get("/v1/models", headers={"Authorization": ""}).status_code == 401 and raw.get("/v1/models", headers={"Authorization": "bearer secret"}).status_code == 200
    assert raw.get("/health", headers={"Host": "evil.example"}).status_code == 400  # a page that points its own name at 127.0.0.1
    assert raw.get("/v1/nothing").status_code == 404 and raw.get("/v1/chat/completions").status_code == 405


def test_what_is_no_http_hurts_nobody(server, raw):
    port = int(server[0].split(":")[2].split("/")[0])
    for junk in (b"\x16\x03\x01\x02\x00\x01\x00", b"GET / HTTP/9.9\r\n\r\n", b"POST /v1/completions HTTP/1.1\r\nHost: 127.0.0.1\r\nContent-Length: 50\r\nAuthorization: Bearer secret\r\n\r\n{"):
        with socket.create_connection(("127.0.0.1", port), 10) as s: s.sendall(junk)
    assert raw.get("/health").json()["status"] == "ok"
    until_idle(raw)


def test_a_client_that_does_not_read_holds_up_nobody(server, client):
    port = int(server[0].split(":")[2].split("/")[0])
    body = json.dumps({"prompt": "A fox", "max_tokens": 400, "stream": True}).encode()
    with socket.socket() as s:
        s.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 1024)
        s.connect(("127.0.0.1", port))
        s.sendall(b"POST /v1/completions HTTP/1.1\r\nHost: 127.0.0.1\r\nAuthorization: Bearer secret\r\nContent-Length: %d\r\n\r\n" % len(body) + body)
        assert client.completions.create(model="tales", prompt="A fox", max_tokens=20).usage.completion_tokens == 20


@pytest.mark.parametrize("args,words", [
    (["--host", "0.0.0.0", "--port", "0"], "without a token"), (["--port", "TAKEN"], "Choose another --port"), (["--host", "no.such.host.example", "--port", "0", "--api-key", "x"], "cannot be used"),
])
def test_a_server_that_cannot_start_says_why(folder, args, words):
    with socket.create_server(("127.0.0.1", 0)) as s:
        args = [str(s.getsockname()[1]) if a == "TAKEN" else a for a in args]
        out = subprocess.run([*COMMAND, "--model", str(folder), *args], cwd=ROOT, capture_output=True, text=True, env={k: v for k, v in os.environ.items() if k != "ASCEND_NB_API_KEY"})
    assert out.returncode == 2 and words in out.stderr and "Traceback" not in out.stderr, out.stderr


def test_a_body_that_trickles_in_is_given_up():
    class Slow:
        async def stream(self):
            yield b'{"prompt":'
            await asyncio.sleep(5)
    with pytest.raises(Refused) as e: asyncio.run(_body(Slow(), 1, .05))
    assert e.value.status == 408 and "did not come within 0.05 s" in str(e.value)


def test_an_answer_that_takes_too_long_ends(folder):
    speaker, ends = Speaker(load_model(folder).eval(), load_tokenizer(folder), slots=1, seconds=.2), queue.SimpleQueue()
    for _ in range(2): speaker.ask([5, 6], SampleConfig(max_new_tokens=500, logit_bias={"2": -1000}), lambda e: ends.put(e) if isinstance(e, End) else None)
    one, other = ends.get(timeout=20), ends.get(timeout=20)  # the second one waited for the first
    assert one.why == other.why == "timeout" and one.answer > other.answer == 0
    speaker.close()
