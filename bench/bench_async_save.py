"""What a checkpoint costs the steps beside it (a Llama of 14M parameters, sequence 128, batch 4, fp32): one JSON line.

Three kinds of rounds of `every` steps take turns on one trainer, so that whatever else the machine does meets all of them:
  plain   no checkpoint
  async   one checkpoint at the beginning of the round, copied at once and written while the steps go on; the round ends when its steps are done
  sync    the same, written before the first step
A cost is the round's time over that of the plain round before it, less one; the median of all rounds. What is not written when an async round is over is waited for outside the clock, and
told as async_wait_s: a save_interval shorter than the time a disk needs would wait for it.
"""
import argparse
import json
import shutil
import statistics
import tempfile
import time

import numpy as np
import torch

from ascend_nb.async_save import Writer
from ascend_nb.callbacks import Guards, MetricsLog
from ascend_nb.checkpoint import RunDir, save_step
from ascend_nb.config import ModelConfig, TrainConfig
from ascend_nb.datasets import Loader, Sample, collate_gpt
from ascend_nb.last_breath import LastBreath
from ascend_nb.losses import causal_lm_loss
from ascend_nb.model import Decoder
from ascend_nb.trainer import Trainer

SHAPE = ModelConfig(vocab_size=16384, hidden_size=320, intermediate_size=864, num_hidden_layers=7, num_attention_heads=5, num_key_value_heads=5, tie_word_embeddings=True)


def main():
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--every", type=int, default=10, help="steps of a round: a checkpoint each so many")
    p.add_argument("--rounds", type=int, default=5, help="rounds of each kind")
    p.add_argument("--threads", type=int, default=torch.get_num_threads(), help="of torch; what writes has a thread of its own")
    a = p.parse_args()
    torch.set_num_threads(a.threads)
    data = [Sample(x[:-1], x[1:]) for x in np.random.RandomState(0).randint(0, SHAPE.vocab_size, (64, 129))]
    with tempfile.TemporaryDirectory() as d:
        run, writer = RunDir(d), Writer()
        cfg = TrainConfig(train_iters=10**6, micro_batch_size=4, lr=1e-4, lr_warmup_iters=100, device="cpu", save=d)
        t = Trainer(Decoder(SHAPE).init_weights(), cfg, Loader(data, 4, collate_gpt), causal_lm_loss, [Guards(), MetricsLog(run), LastBreath(run)])
        t.call("before_fit")
        for _ in range(3): t.one_step()
        times, copies, writes, waits = {k: [] for k in ("plain", "async", "sync")}, [], [], []
        for _ in range(a.rounds):
            for kind in times:
                t0 = time.perf_counter()
                if kind == "async": writer.begin(run.step_path(t.step), *t.snapshot())
                if kind == "sync": save_step(run.step_path(t.step), *t.snapshot())
                if kind == "async": copies.append(time.perf_counter() - t0)
                if kind == "sync": writes.append(time.perf_counter() - t0)
                for _ in range(a.every): t.one_step()
                times[kind].append(time.perf_counter() - t0)
                t0 = time.perf_counter()
                writer.finish()
                if kind == "async": waits.append(time.perf_counter() - t0)
                for s in run.folders().values(): shutil.rmtree(s)
        cost = {k: statistics.median(x / y for x, y in zip(times[k], times["plain"], strict=True)) - 1 for k in ("async", "sync")}
        size = sum(x.nbytes for x in t.snapshot()[0].values())
    print(json.dumps(dict(every=a.every, rounds=a.rounds, threads=a.threads, step_s=round(statistics.median(times["plain"]) / a.every, 3), checkpoint_mb=round(size / 2**20), copy_s=round(statistics.median(copies), 3),
                          sync_write_s=round(statistics.median(writes), 2), async_wait_s=round(statistics.median(waits), 2), async_cost=round(cost["async"], 4), sync_cost=round(cost["sync"], 4))))


if __name__ == "__main__": main()
