"""llama.cpp as a process of its own, for bench_generate.py: a line of JSON comes in, a line goes out. Runs in any Python that has `llama_cpp`.

    {"do": "about"}                                                   -> {"version": ..., "system": ...}
    {"do": "quantize", "source": FILE, "to": FILE, "kind": "q8_0"}    -> {}
    {"do": "load", "name": "q8_0", "file": FILE, "threads": 2, "room": 1024} -> {}
    {"do": "speak", "name": "q8_0", "ids": [...], "n": 32}            -> {"first": seconds, "steps": [seconds], "ids": [...]}; greedy
    {"do": "follow", "name": "q8_0", "ids": [...], "text": [...]}     -> {"ids": [...]}: what it would say after every beginning of the text

Nothing but llama.cpp's own `llama_decode` and one argmax stands between two tokens: no sampler, no text, no copy of the logits.
"""
import json
import os
import sys
import time

import llama_cpp as c
import numpy as np

KINDS = {"q4_0": 2, "q8_0": 7}  # llama.h, enum llama_ftype
loaded, quiet = {}, c.llama_log_callback(lambda *_: None)


def about(): return dict(version=c.__version__, system=c.llama_print_system_info().decode().strip())


def quantize(source, to, kind):
    how = c.llama_model_quantize_default_params()
    how.ftype, how.nthread = KINDS[kind], os.cpu_count()
    if c.llama_model_quantize(source.encode(), to.encode(), how): raise SystemExit(f"llama.cpp could not write {to}")
    return {}


def load(name, file, threads, room):
    model = c.llama_model_load_from_file(file.encode(), c.llama_model_default_params())
    how = c.llama_context_default_params()
    how.n_ctx = how.n_batch = how.n_ubatch = room
    how.n_threads = how.n_threads_batch = threads
    how.no_perf = True
    loaded[name] = model, c.llama_init_from_model(model, how), c.llama_vocab_n_tokens(c.llama_model_get_vocab(model))
    return {}


def read(name, ids):
    "The likeliest next id."
    _, context, size = loaded[name]
    room = (c.llama_token * len(ids))(*ids)
    if c.llama_decode(context, c.llama_batch_get_one(room, len(ids))): raise SystemExit("llama_decode failed")
    return int(np.ctypeslib.as_array(c.llama_get_logits_ith(context, -1), (size,)).argmax())


def begin(name): c.llama_memory_clear(c.llama_get_memory(loaded[name][1]), True)


def speak(name, ids, n):
    begin(name)
    times, out = [time.perf_counter()], [read(name, ids)]
    times.append(time.perf_counter())
    while len(out) < n:
        out.append(read(name, out[-1:]))
        times.append(time.perf_counter())
    steps = [b - a for a, b in zip(times, times[1:], strict=False)]
    return dict(first=steps[0], steps=steps[1:], ids=out)


def follow(name, ids, text):
    begin(name)
    return dict(ids=[read(name, ids), *(read(name, [t]) for t in text[:-1])])


if __name__ == "__main__":
    c.llama_log_set(quiet, None)
    for line in sys.stdin:
        asked = json.loads(line)
        print(json.dumps(globals()[asked.pop("do")](**asked)), flush=True)
