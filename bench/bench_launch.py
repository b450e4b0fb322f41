"""From `jobs.launch` to the first step of a job of two processes, against a bare torchrun that only meets.

    python bench/bench_launch.py

Both sides start the same two processes on this machine, by turns. The peer imports torch, joins a gloo group and adds up one number: what no
program of many processes can leave out. Prints seconds of both and their ratio, one JSON object.
"""
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from ascend_nb import jobs
from ascend_nb.config import DataConfig, ModelConfig, PreprocessConfig, RunConfig, TrainConfig
from ascend_nb.preprocess import run as preprocess

SAMPLES, ROUNDS = Path(__file__).resolve().parent.parent / "data_samples", int(os.environ.get("ROUNDS", "3"))
PEER = "import torch, torch.distributed as d\nd.init_process_group('gloo')\nt = torch.ones(1); d.all_reduce(t)\nd.get_rank() or print(float(t), flush=True)\nimport os; os._exit(0)"


def ours(folder, i):
    cfg = RunConfig(ModelConfig(hidden_size=64, num_hidden_layers=2, num_attention_heads=4),
                    DataConfig(data_path=[f"{folder}/tales_text_document"], tokenizer_name_or_path=str(SAMPLES / "tokenizer"), seq_length=64, split="100,0,0"),
                    train=TrainConfig(train_iters=1, micro_batch_size=2, device="cpu", save=f"{folder}/run{i}"))
    t0 = time.time()
    job = jobs.launch(cfg, nproc=2)
    returned = time.time() - t0
    assert job.wait(120) == "finished", job.tail()
    return returned, job.row()["time"] - t0, time.time() - t0


def peer(folder):
    (Path(folder) / "peer.py").write_text(PEER)
    t0 = time.time()
    with subprocess.Popen([*jobs.torchrun(2), f"{folder}/peer.py"], stdout=subprocess.PIPE, text=True) as p:
        assert p.stdout.readline().strip() == "2.0"
        took = time.time() - t0
    return took


if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as folder:
        preprocess(PreprocessConfig(input=str(SAMPLES / "tales.jsonl"), output_prefix=f"{folder}/tales", tokenizer_name_or_path=str(SAMPLES / "tokenizer")), json=True)
        rounds = [(ours(folder, i), peer(folder)) for i in range(ROUNDS)]
    (returned, first, whole), bare = [statistics.median(r[0][k] for r in rounds) for k in range(3)], statistics.median(r[1] for r in rounds)
    print(json.dumps(dict(rounds=ROUNDS, python=sys.version.split()[0], launch_returns_s=round(returned, 2), first_step_s=round(first, 2), finished_s=round(whole, 2),
                          bare_torchrun_s=round(bare, 2), ratio=round(first / bare, 2))))
