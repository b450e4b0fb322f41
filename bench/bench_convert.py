"""Converting a model of 1.5 billion parameters in bf16 (3 GB) to Megatron core, tp 2 x pp 2, and home again: against copying the bytes, and against loading the whole model.

One JSON line for each claim; ratio is theirs / ours, so above 1 is faster or smaller. Every run is a process of its own, begun with the input's pages dropped from the page cache where the system lets
us (posix_fadvise after sync), and ended by a sync; both sides are treated alike and take turns. ROUNDS, LAYERS and BENCH_DIR may be set. LITGPT: a folder of `pip install --target`, whose converter then runs too.
"""
import json
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np

from ascend_nb.megatron_format import Stored, safetensors_bytes
from ascend_nb.megatron_names import hf_placed
from ascend_nb.shapes import ModelConfig

ROUNDS, LAYERS = int(os.environ.get("ROUNDS", 3)), int(os.environ.get("LAYERS", 28))
ROOT = Path(__file__).resolve().parent.parent
SHAPE = dict(vocab_size=32000, hidden_size=2048, intermediate_size=5632, num_attention_heads=16, num_key_value_heads=16, head_dim=128, max_position_embeddings=4096)
OURS = "import sys; from ascend_nb.cli import main; sys.exit(main(['convert', *sys.argv[1:]]))"
WHOLE = """
import sys, torch
from pathlib import Path
from transformers import AutoModelForCausalLM
src, out = sys.argv[1:]
m = AutoModelForCausalLM.from_pretrained(src, dtype=torch.bfloat16).state_dict()
L, K, H = 1 + max(int(k.split('.')[2]) for k in m if '.layers.' in k), 16, 2048
for p in range(2):
    for t in range(2):
        d = {}
        if p == 0: d['embedding.word_embeddings.weight'] = m['model.embed_tokens.weight'].chunk(2)[t].clone()
        for i in range(L // 2):
            a, b = f'model.layers.{p * L // 2 + i}.', f'decoder.layers.{i}.'
            q, k, v = (m[a + f'self_attn.{x}_proj.weight'].reshape(K, -1, H) for x in 'qkv')
            d[b + 'self_attention.linear_qkv.weight'] = torch.cat([q, k, v], 1).reshape(-1, H).chunk(2)[t].clone()
            d[b + 'self_attention.linear_proj.weight'] = m[a + 'self_attn.o_proj.weight'].chunk(2, 1)[t].clone()
            d[b + 'mlp.linear_fc1.weight'] = torch.cat([m[a + f'mlp.{x}_proj.weight'].chunk(2)[t] for x in ('gate', 'up')])
            d[b + 'mlp.linear_fc2.weight'] = m[a + 'mlp.down_proj.weight'].chunk(2, 1)[t].clone()
            d[b + 'input_layernorm.weight'], d[b + 'pre_mlp_layernorm.weight'] = m[a + 'input_layernorm.weight'], m[a + 'post_attention_layernorm.weight']
        if p: d['decoder.final_layernorm.weight'], d['output_layer.weight'] = m['model.norm.weight'], m['lm_head.weight'].chunk(2)[t].clone()
        f = Path(out) / f'iter_0000001/mp_rank_{t:02d}_{p:03d}'; f.mkdir(parents=True)
        torch.save(dict(checkpoint_version=3.0, iteration=1, model=d), f / 'model_optim_rng.pt')
"""
LITGPT = "import sys, torch; from pathlib import Path; from litgpt.scripts.convert_hf_checkpoint import convert_hf_checkpoint as f; f(Path(sys.argv[1]), model_name=sys.argv[2])"


def make(folder, layers, shape=SHAPE):
    "A model folder in one safetensors file, with random bits that are finite numbers."
    folder.mkdir(parents=True)
    cfg = ModelConfig(model_type="llama", num_hidden_layers=layers, tie_word_embeddings=False, **shape)
    (folder / "config.json").write_text(json.dumps(dict(shape, num_hidden_layers=layers, model_type="llama", architectures=["LlamaForCausalLM"], torch_dtype="bfloat16", tie_word_embeddings=False)))
    raw, where = safetensors_bytes([Stored(p.stored.name, p.stored.shape, "bf16") for p in hf_placed(cfg)])
    rng = np.random.default_rng(0)
    with open(folder / "model.safetensors", "wb") as f:
        f.write(raw)
        for t in where: f.write(rng.integers(0x3C00, 0x3D00, t.numel, dtype=np.uint16).tobytes())
    return sum(t.numel for t in where)


def cold(folder):
    "Drop a folder's pages: both sides read from the disk."
    os.sync()
    for p in Path(folder).rglob("*"):
        if p.is_file():
            fd = os.open(p, os.O_RDONLY)
            os.posix_fadvise(fd, 0, 0, os.POSIX_FADV_DONTNEED)
            os.close(fd)


def timed(words, source, out, keep=False):
    "Seconds until it is on the disk, and peak memory in MB."
    shutil.rmtree(out, ignore_errors=True)
    cold(source)
    begun = time.perf_counter()
    child = subprocess.Popen([str(w) for w in words], stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, cwd=ROOT, env={**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, [str(ROOT), os.environ.get("LITGPT")]))})
    err = child.stderr.read()
    _, status, usage = os.wait4(child.pid, 0)
    child.returncode = os.waitstatus_to_exitcode(status)
    if child.returncode: raise RuntimeError(err.decode()[-1500:])
    fd = os.open(out, os.O_RDONLY)
    os.sync()
    os.close(fd)
    seconds = time.perf_counter() - begun
    if not keep: shutil.rmtree(out)
    return seconds, usage.ru_maxrss / 1024


def say(name, theirs, ours, unit, **more): print(json.dumps(dict(name=name, ratio=theirs and round(theirs / ours, 3), ours=round(ours, 3), peer=theirs and round(theirs, 3), unit=unit, **more)), flush=True)


def main():
    tmp = Path(tempfile.mkdtemp(dir=os.environ.get("BENCH_DIR")))
    try: measure(tmp)
    finally: shutil.rmtree(tmp, ignore_errors=True)


def litgpt(hf, out):
    "litgpt's converter writes beside the weights, so it works on a folder of links."
    out.mkdir()
    for p in hf.iterdir(): (out / p.name).symlink_to(p)


def measure(tmp):
    hf, mg, home, py = tmp / "hf", tmp / "mg", tmp / "home", sys.executable
    params = make(hf, LAYERS)
    there, back = [py, "-c", OURS, hf, mg, "--to", "mcore", "--tp", 2, "--pp", 2], [py, "-c", OURS, mg, home, "--to", "hf", "--hf-config", hf]
    runs = {k: [] for k in ("there", "back", "copy", "whole")}
    for _ in range(ROUNDS):
        runs["copy"].append(timed(["cp", "-r", hf, tmp / "copy"], hf, tmp / "copy"))
        runs["there"].append(timed(there, hf, mg, keep=True))
        runs["back"].append(timed(back, mg, home))
        runs["whole"].append(timed([py, "-c", WHOLE, hf, tmp / "whole"], hf, tmp / "whole"))
    s = {k: statistics.median(t for t, _ in v) for k, v in runs.items()}
    rss = {k: max(m for _, m in v) for k, v in runs.items()}
    size = dict(parameters=params, bytes=2 * params, rounds=ROUNDS)
    say("HF to Megatron core tp 2 pp 2, beside cp of the bytes", s["copy"], s["there"], "s", **size)
    say("Megatron core tp 2 pp 2 to HF, beside cp of the bytes", s["copy"], s["back"], "s", **size)
    say("HF to Megatron core, beside loading the whole model, slicing and torch.save", s["whole"], s["there"], "s", **size, versus="transformers + torch, as ModelLink's converter goes about it")
    say("peak memory of the same", rss["whole"], rss["there"], "MB", **size)
    shutil.rmtree(mg)
    peer(tmp, hf, s["there"], rss["there"], size)
    shutil.rmtree(hf)
    twice = make(tmp / "twice", 2 * LAYERS)
    _, more = timed([py, "-c", OURS, tmp / "twice", mg, "--to", "mcore", "--tp", 2, "--pp", 2], tmp / "twice", mg)
    say("peak memory at twice the size, beside that at once", rss["there"], more, "MB", parameters=twice)
    shutil.rmtree(tmp / "twice")
    small(tmp, py)


def peer(tmp, hf, seconds, memory, size):
    "litgpt, where LITGPT names it."
    if not os.environ.get("LITGPT"): return print(json.dumps(dict(name="litgpt's converter", ratio=None, why="LITGPT is not set")))
    lit, found = tmp / "lit", []
    for _ in range(ROUNDS):
        shutil.rmtree(lit, ignore_errors=True)
        shutil.rmtree(tmp / "litlinks", ignore_errors=True)
        litgpt(hf, tmp / "litlinks")
        shutil.move(tmp / "litlinks", lit)
        cold(hf)
        begun = time.perf_counter()
        code = f"import sys; sys.argv = ['x', {str(lit)!r}, 'tiny-llama-1.1b']\n" + LITGPT.replace("; f(", "\nimport resource\nf(") + "\nprint(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss)"
        r = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env={**os.environ, "PYTHONPATH": os.environ["LITGPT"]})
        os.sync()
        if r.returncode: return print(json.dumps(dict(name="litgpt's converter", ratio=None, why=r.stderr.strip().splitlines()[-1][:300])))
        found.append((time.perf_counter() - begun, int(r.stdout.split()[-1]) / 1024))
    say("HF to Megatron core, beside litgpt's converter of the same weights to its own format", statistics.median(t for t, _ in found), seconds, "s", **size)
    say("peak memory of the same", max(m for _, m in found), memory, "MB", **size)


def small(tmp, py):
    "A small model, start-up included."
    make(tmp / "small", 2, dict(vocab_size=512, hidden_size=64, intermediate_size=128, num_attention_heads=4, num_key_value_heads=4, head_dim=16, max_position_embeddings=64))
    t = statistics.median(timed([py, "-c", OURS, tmp / "small", tmp / "out", "--to", "mcore", "--tp", 2], tmp / "small", tmp / "out")[0] for _ in range(ROUNDS))
    say("a small model, start-up included, beside two seconds", 2.0, t, "s")


if __name__ == "__main__": main()
