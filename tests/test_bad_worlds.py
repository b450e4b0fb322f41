"""A world that cannot work, under the real torchrun: one sentence, every rank leaves with the same exit code, and no process remains."""
import contextlib
import json
import os
import re
import signal
import socket
import subprocess
import sys
import threading
import time
from datetime import timedelta
from pathlib import Path

import pytest
from conftest import ROOT
from worlds import world

from ascend_nb.core import UserError, rank_info
from ascend_nb.mesh import reach

MODEL = ["--hidden-size", "32", "--num-hidden-layers", "2", "--num-attention-heads", "4", "--num-key-value-heads", "2"]
# name -> (flags, what the one sentence has to say); `vocab` and `heads` and the like break one rule each
CASES = {
    "world": (["--tensor-model-parallel-size", "3"], r"Found 2 processes; expected a multiple of tp x pp x cp = 3\."),
    "heads": (["--tensor-model-parallel-size", "2", "--num-attention-heads", "3", "--num-key-value-heads", "3", "--hidden-size", "48"], r"num_attention_heads = 3 is not divisible by tp = 2"),
    "sequence": (["--context-parallel-size", "2", "--context-parallel-algo", "megatron_cp_algo", "--seq-length", "30"], r"seq_length = 30 is not divisible by 2 x cp = 4"),
    "experts": (["--expert-model-parallel-size", "2", "--model-type", "mixtral", "--num-experts", "3", "--num-experts-per-tok", "1", "--moe-intermediate-size", "96", "--norm-topk-prob"],
                r"num_experts = 3 is not divisible by ep = 2"),
    "layers": (["--pipeline-model-parallel-size", "2", "--num-hidden-layers", "3"], r"num_hidden_layers = 3 is not divisible by pp x vpp = 2"),
    "layer list": (["--pipeline-model-parallel-size", "2", "--num-layer-list", "1,2"], r"num_layer_list has 2 stages of 3 layers; pp x vpp = 2, num_hidden_layers = 2"),
    "layer text": (["--pipeline-model-parallel-size", "2", "--num-layer-list", "1;1"], r"Found num_layer_list='1;1'; expected the number of layers of each stage"),
    "vpp alone": (["--num-layers-per-virtual-pipeline-stage", "1"], r"need pipeline_model_parallel_size above 1"),
    "schedule": (["--pipeline-model-parallel-size", "2", "--num-hidden-layers", "4", "--num-layers-per-virtual-pipeline-stage", "1", "--pipeline-schedule", "1f1b"],
                 r"Found pipeline_schedule=1f1b with 2 stages in each process"),
    "micro-batches": (["--pipeline-model-parallel-size", "2", "--global-batch-size", "2"], r"a step has 1 micro-batches, fewer than pp = 2 stages"),
    "dense experts": (["--expert-model-parallel-size", "2"], r"expert_model_parallel_size is above 1, but the model has no experts"),
    "fsdp": (["--fsdp-size", "3"], r"Found fsdp_size=3; expected a divisor of the 2 data parallel processes"),
    "batch": (["--global-batch-size", "3"], r"Found global_batch_size=3; expected a multiple of micro_batch_size x data parallel size = 4"),
    "sequence parallel": (["--tensor-model-parallel-size", "2", "--sequence-parallel", "--seq-length", "31"], r"seq_length / cp = 31 is not divisible by tp \(sequence_parallel\) = 2"),
    "zbv": (["--pipeline-model-parallel-size", "2", "--pipeline-schedule", "zbv", "--tie-word-embeddings"], r"pipeline_schedule=zbv with tied embeddings"),
    "flag": (["--tensor-model-parallel-sise", "2"], r"--tensor-model-parallel-sise.*--tensor-model-parallel-size"),
    "no data": (["--data-path", "nothing_here"], r"nothing_here"),
}
FAST = {"world", "flag"}  # the others take the same way; their sentences are tested in test_parallel.py too


def alive(key):
    "Processes that carry a mark in their environment: whatever was started, whoever its parent is now."
    found = []
    for p in Path("/proc").glob("[0-9]*"):
        try:
            if key.encode() in (p / "environ").read_bytes() and (p / "stat").read_text().rsplit(")", 1)[1].split()[0] != "Z": found.append(int(p.name))
        except OSError: continue
    return found


class World:
    "What torchrun and its ranks left."
    def __init__(self, tmp_path, program, flags, n=2, timeout=150, torchrun=(), env=()):
        mark = f"ASCEND_NB_TEST_WORLD={os.getpid()}-{time.monotonic_ns()}"
        launcher = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", str(n), "--redirects", "3", "--log-dir", str(tmp_path / "logs"), *torchrun]
        if not torchrun: launcher += ["--rdzv-backend", "c10d", "--rdzv-endpoint", "localhost:0"]
        job = subprocess.Popen([*launcher, *map(str, program), *map(str, flags)], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, cwd=tmp_path, start_new_session=True,
                               env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT), "ASCEND_NB_LANG": "en", **dict([mark.split("=")]), **dict(env)})
        try: self.out, self.torchrun = job.communicate(timeout=timeout)
        except subprocess.TimeoutExpired:
            os.killpg(job.pid, signal.SIGKILL)
            self.torchrun = "timed out\n" + job.communicate()[1]
        self.code = job.returncode
        until = time.monotonic() + 5
        while (left := alive(mark)) and time.monotonic() < until: time.sleep(.1)
        for pid in left: os.kill(pid, signal.SIGKILL)
        self.orphans = left
        logs = sorted((tmp_path / "logs").rglob("stderr.log"), key=lambda p: int(p.parent.name))
        self.said = [p.read_text() for p in logs]
        self.codes = {int(r): int(c) for c, r in re.findall(r"exitcode: (-?\d+)\) local_rank: (\d+)", self.torchrun)}
        self.codes |= {int(r): int(c) for r, c in re.findall(r"rank\s*: (\d+) \(local_rank: \d+\)\s+exitcode\s*: (-?\d+)", self.torchrun)}

    def told_once(self, pattern, codes=None):
        "The sentence, once; every rank with exit code 2; nothing else and nobody is left."
        lines = [line for text in self.said for line in text.splitlines()]
        assert len(lines) == 1 and lines[0].startswith("ascend_nb: ") and re.search(pattern, lines[0]), (lines, self.torchrun)
        assert self.codes == (codes or {i: 2 for i in range(len(self.said))}), self.torchrun
        assert self.code != 0 and not self.orphans


@pytest.fixture(scope="module")
def text(tmp_path_factory):
    "Raw text to train on."
    path = tmp_path_factory.mktemp("bad") / "text.jsonl"
    path.write_text("\n".join(json.dumps({"text": f"Line {i} tells of {i * i} things that no one has counted before." * 3}) for i in range(50)))
    return path


def train(text, tmp_path, samples):
    return ["--data-path", text, "--tokenizer-name-or-path", samples / "tokenizer", "--handler-name", "GeneralPretrainHandler", *MODEL, "--seq-length", "32", "--micro-batch-size", "2",
            "--global-batch-size", "8", "--train-iters", "2", "--device", "cpu", "--data-cache-path", tmp_path / "cache", "--save", tmp_path / "run", "--eval-interval", "0"]


@pytest.mark.parametrize("name", [n if n in FAST else pytest.param(n, marks=pytest.mark.slow) for n in CASES])
def test_what_does_not_fit(name, text, tmp_path, samples):
    flags, pattern = CASES[name]
    World(tmp_path, ["-m", "ascend_nb.cli", "train"], [*train(text, tmp_path, samples), *flags]).told_once(pattern)
    assert not (tmp_path / "run").exists(), "a run that cannot begin writes nothing"


# a program that torchrun starts, in which one rank does something else before the command line runs
ODD = """
import os, sys, time
sys.argv[0] = "ascend_nb"
{odd}
from ascend_nb.cli import main
sys.exit(main(["train", *sys.argv[1:]]))
"""


def odd_rank(tmp_path, odd):
    (tmp_path / "odd.py").write_text(ODD.format(odd=odd))
    return [tmp_path / "odd.py"]


def test_ranks_that_disagree(text, tmp_path, samples):
    program = odd_rank(tmp_path, "if os.environ['RANK'] == '1': sys.argv += ['--seed', '7']")
    World(tmp_path, program, train(text, tmp_path, samples)).told_once(r"Ranks 1 were started with other settings than rank 0 \(rank 1: train\.seed: 1234 there, 7 here\)")


@pytest.mark.slow
def test_one_rank_alone_is_wrong(text, tmp_path, samples):
    program = odd_rank(tmp_path, "if os.environ['RANK'] == '1': sys.argv += ['--lrr', '7']")
    World(tmp_path, program, train(text, tmp_path, samples)).told_once(r"^ascend_nb: \[rank 1\] .*--lrr")


SLOW = """
import ascend_nb.last_breath
keep = ascend_nb.last_breath.write_breath
def slowly(*a, **kw): time.sleep(5); return keep(*a, **kw)
ascend_nb.last_breath.write_breath = slowly
"""


@pytest.mark.parametrize("slow", ["", pytest.param(SLOW, marks=pytest.mark.slow)], ids=["", "slow disk"])
def test_a_mistake_of_one_rank_wakes_the_others_in_the_middle_of_a_step(text, tmp_path, samples, slow):
    "Its sentence is told however long it takes to keep the last step."
    program = odd_rank(tmp_path, slow + """
import torch
from ascend_nb.core import UserError
from ascend_nb.parallel_trainer import ParallelTrainer
read = ParallelTrainer.read_batches
def fail(self):
    if self.step == 1 and os.environ['RANK'] == '1': raise UserError("no_space", path="/data", free="1 B", need="2 B")
    return read(self)
ParallelTrainer.read_batches = fail""")
    w = World(tmp_path, program, train(text, tmp_path, samples))
    lines = [line for said in w.said for line in said.splitlines() if line.startswith("ascend_nb: ")]
    assert lines == ["ascend_nb: [rank 1] Found 1 B free at /data; expected at least 2 B. Free some space or choose another folder."], w.said
    assert "Traceback" not in "".join(w.said) and w.codes == {0: 2, 1: 2} and not w.orphans, (w.said, w.torchrun)


@pytest.mark.slow
def test_a_host_that_does_not_see_the_run_folder(text, tmp_path, samples):
    "A folder of the same name on another disk: told before the first step, not at the first save."
    program = odd_rank(tmp_path, f"if os.environ['RANK'] == '1': os.makedirs({str(tmp_path / 'elsewhere')!r}); os.chdir({str(tmp_path / 'elsewhere')!r})")
    flags = [x if x != tmp_path / "run" else "run" for x in train(text, tmp_path, samples)]
    w = World(tmp_path, program, [*flags, "--no-shared-storage"])
    lines = [line for said in w.said for line in said.splitlines() if line.startswith("ascend_nb: ")]
    assert len(lines) == 1 and re.search(r"The hosts \S+ do not see run; expected a folder that all hosts share.*--no-shared-storage is about the caches of data alone", lines[0]), w.said
    assert "Traceback" not in "".join(w.said) and w.codes == {0: 2, 1: 2} and not w.orphans, (w.said, w.torchrun)
    assert not list((tmp_path / "run").glob("step_*")) and not list((tmp_path / "run").glob(".seen*"))


@pytest.mark.slow
def test_a_program_error_of_one_rank_has_one_traceback(text, tmp_path, samples):
    program = odd_rank(tmp_path, """
from ascend_nb.parallel_trainer import ParallelTrainer
def fail(self): 1 / 0 if os.environ['RANK'] == '1' else time.sleep(60)
ParallelTrainer.read_batches = fail""")
    w = World(tmp_path, program, train(text, tmp_path, samples))
    assert "ZeroDivisionError" in w.said[1] and "Traceback" not in w.said[0] and w.codes == {0: 1, 1: 1} and not w.orphans, (w.said, w.torchrun)


def test_a_rank_that_does_not_come_is_named(text, tmp_path, samples):
    program = odd_rank(tmp_path, "if os.environ['RANK'] == '1': time.sleep(600)")
    w = World(tmp_path, program, [*train(text, tmp_path, samples), "--distributed-timeout-minutes", "0.05"])
    w.told_once(r"Rank 1 of 2 did not come within 3 s\. Start every process", codes={0: 2, 1: -15})  # torchrun ends the one that sleeps


def test_torch_npu_of_another_minor(text, tmp_path, samples):
    site = tmp_path / "site" / "torch_npu-1.11.0.dist-info"
    site.mkdir(parents=True)
    (site / "METADATA").write_text("Metadata-Version: 2.1\nName: torch_npu\nVersion: 1.11.0\n")
    (site / "entry_points.txt").write_text("[torch.backends]\ntorch_npu = torch_npu:_autoload\n")
    (site.parent / "torch_npu.py").write_text("raise ImportError('undefined symbol: of another torch')\n")
    program = odd_rank(tmp_path, f"os.environ['TORCH_DEVICE_BACKEND_AUTOLOAD'] = '1'; sys.path.insert(0, {str(site.parent)!r})")  # torchrun itself needs a torch that loads
    w = World(tmp_path, program, train(text, tmp_path, samples))
    w.told_once(r"beside torch_npu 1\.11\.0; expected the same minor version of both\. Run: pip install \"torch_npu==\d+\.\d+\.\*\"")


@pytest.fixture
def taken():
    "A port on which another program listens, and never answers."
    with socket.socket() as s:
        s.bind(("0.0.0.0", 0))
        s.listen()
        yield s.getsockname()[1]


def test_a_port_in_use(taken, text, tmp_path, samples):
    "Without torchrun rank 0 opens the port; the others reach whoever listens there, and name rank 0."
    args = [str(a) for a in ["train", *train(text, tmp_path, samples), "--distributed-timeout-minutes", "0.02"]]
    outs = world(f"import sys; from ascend_nb.cli import main; sys.exit(main({args}))", 2, each=lambda rank: dict(MASTER_PORT=str(taken), ASCEND_NB_LANG="en"))
    assert [code for code, *_ in outs] == [2, 2]
    assert re.fullmatch(rf"ascend_nb: Port {taken} of 127.0.0.1 is in use by another program; .*--master-port to torchrun\.\n", outs[0][2])
    assert re.fullmatch(rf"ascend_nb: \[rank 1\] Rank 0 \(nobody answers at 127.0.0.1:{taken}\) of 2 did not come within 1 s\. .*\n", outs[1][2])


def test_torch_gives_up_before_we_do(monkeypatch):
    "Its own time-out is the same sentence. Whoever listens here ends every talk at once."
    with socket.create_server(("127.0.0.1", 0)) as s:
        def refuse():
            with contextlib.suppress(OSError):
                while True: s.accept()[0].close()
        threading.Thread(target=refuse, daemon=True).start()
        for k, v in dict(RANK=1, WORLD_SIZE=2, MASTER_ADDR="127.0.0.1", MASTER_PORT=s.getsockname()[1]).items(): monkeypatch.setenv(k, str(v))
        with pytest.raises(UserError, match=r"Rank 0 \(nobody answers at 127.0.0.1:\d+\) of 2 did not come"): reach(rank_info(), timedelta(seconds=.2))


def test_a_port_in_use_under_torchrun(taken, text, tmp_path, samples):
    "torchrun opens the port itself: it ends before any rank begins, and names the port."
    w = World(tmp_path, ["-m", "ascend_nb.cli", "train"], train(text, tmp_path, samples), torchrun=["--master-addr", "127.0.0.1", "--master-port", str(taken)])
    assert w.code == 1 and not w.said and not w.orphans and f"port: {taken}" in w.torchrun and "EADDRINUSE" in w.torchrun
