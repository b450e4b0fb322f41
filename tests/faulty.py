"""Whole runs of the command line that may be disturbed, in one process or in four, and what they have to agree in at the end."""
import contextlib
import io
import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from conftest import ROOT
from safetensors import safe_open

from ascend_nb.checkpoint import RunDir
from ascend_nb.cli import main

STEPS, SAVES = 12, 4
MODEL = ["--hidden-size", "48", "--num-hidden-layers", "2", "--num-attention-heads", "2", "--num-key-value-heads", "2"]
FLAGS = [*MODEL, "--seq-length", "64", "--split", "90,10,0", "--train-iters", str(STEPS), "--micro-batch-size", "2", "--global-batch-size", "8", "--lr", "3e-3", "--device", "cpu",
         "--save-interval", str(SAVES), "--keep-last", "9", "--json"]
PROGRAM = "import sys; from ascend_nb.cli import main; sys.exit(main())"


@pytest.fixture(scope="session")
def tales(samples, tmp_path_factory):
    "Flags that name the data; they are prepared once."
    cache = tmp_path_factory.mktemp("cache")
    return ["--data-path", str(samples / "tales.jsonl"), "--data-cache-path", str(cache), "--tokenizer-name-or-path", str(samples / "tokenizer")]


class Run:
    "Start `ascend_nb train` in n processes and wait for its end."
    def __init__(self, folder, data, n=1): self.run, self.data, self.n, self.left = RunDir(folder), data, n, []

    def __call__(self, *flags, timeout=240):
        grid = ["--tensor-model-parallel-size", "2"] if self.n == 4 else []
        words = ["train", *FLAGS, *self.data, *grid, "--save", str(self.run.path), *flags]
        many = ["-m", "torch.distributed.run", "--nproc-per-node", str(self.n), "--rdzv-backend", "c10d", "--rdzv-endpoint", "localhost:0"]
        if self.n == 1 and not any(deadly in " ".join(flags) for deadly in ("kill", "hang")): return inside(words)
        what = [sys.executable, "-c", PROGRAM, *words] if self.n == 1 else [sys.executable, *many, "-m", "ascend_nb.cli", *words]
        job = subprocess.Popen(what, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env={**os.environ, "OMP_NUM_THREADS": "1"}, cwd=ROOT, start_new_session=True)
        try: out, err = job.communicate(timeout=timeout)
        finally: self.left = ours(str(self.run.path))
        if job.poll() is None: os.killpg(job.pid, signal.SIGKILL)
        return job.returncode, json.loads(out) if out.strip() else None, err

    def until_done(self, *flags, most=4):
        "Exit codes of the same command until one is 0."
        codes = []
        while 0 not in codes and len(codes) < most:
            code, self.out, self.err = self(*flags)
            codes.append(code)
        return codes


def inside(words):
    "The same command in this process: what costs most of a short run is importing torch."
    n, err, out = torch.get_num_threads(), io.StringIO(), io.StringIO()
    torch.set_num_threads(1)
    with contextlib.redirect_stderr(err), contextlib.redirect_stdout(out): code = main(words)
    torch.set_num_threads(n)
    return code, json.loads(out.getvalue()) if out.getvalue().strip() else None, err.getvalue()


def ours(word):
    "Processes that have this word on their command line."
    found = []
    for p in Path("/proc").glob("[0-9]*/cmdline"):
        try: text = p.read_bytes().decode(errors="replace")
        except OSError: continue
        if word in text: found.append((p.parent.name, text.replace("\0", " ")))
    return found


def tensors(folder):
    "Every tensor of a saved step."
    out = {}
    for f in sorted(Path(folder).glob("*.safetensors")):
        with safe_open(f, "pt") as g: out |= {k: g.get_tensor(k) for k in g.keys()}  # noqa: SIM118
    return out


def curve(run): return [(r["step"], r["loss"], r["grad_norm"], r["lr"], r["consumed_samples"]) for r in run.rows() if "loss" in r]


def same(a, b):
    "Two runs agree in every bit: the last step's tensors, and each row."
    x, y = tensors(a.step_path(STEPS)), tensors(b.step_path(STEPS))
    assert x.keys() == y.keys() and len(x) > 30 and [k for k in x if not torch.equal(x[k], y[k])] == []
    assert curve(a) == curve(b) and [r[0] for r in curve(b)] == list(range(1, STEPS + 1))


@pytest.fixture(scope="session")
def calm(tales, tmp_path_factory):
    "Runs that nobody disturbs, by number of processes."
    made = {}
    def get(n):
        if n not in made:
            made[n] = Run(tmp_path_factory.mktemp("calm") / "run", tales, n)
            code, _, err = made[n]()
            assert code == 0, err
        return made[n].run
    return get
