"""One of many processes of tests/test_async_save.py: the same training with steps written at once and in the background."""
import json
import os
import sys
import threading
from pathlib import Path

import numpy as np
import torch
from safetensors import safe_open

from ascend_nb import checkpoint
from ascend_nb.callbacks import Checkpointer
from ascend_nb.checkpoint import RunDir
from ascend_nb.config import ModelConfig, ParallelConfig, TrainConfig
from ascend_nb.core import UserError, seed_all
from ascend_nb.datasets import Loader, Sample, collate_gpt
from ascend_nb.engine import Engine, build_stages
from ascend_nb.losses import causal_lm_loss
from ascend_nb.mesh import Mesh, check, join, leave
from ascend_nb.parallel_trainer import ParallelTrainer
from ascend_nb.trainer import Callback

CFG = ModelConfig(vocab_size=96, hidden_size=64, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2, tie_word_embeddings=False)


class Disk(Callback):
    "A disk that is not done before the run is two steps further, or over; `fails` at the second step that it is given."
    order = 99
    def __init__(self, fails=False): self.fails, self.steps, self.log, self.now, self.turn, self.real = fails, 0, [], 0, threading.Condition(), checkpoint.write_tensors
    def before_fit(self, t): checkpoint.write_tensors = self.write
    def after_step(self, t):
        with self.turn: self.now = t.step; self.turn.notify_all()
    def after_fit(self, t): checkpoint.write_tensors = self.real
    def on_error(self, t, error): checkpoint.write_tensors = self.real

    def write(self, folder, tensors, group=None):
        step, self.steps = int(folder.name.split("_")[1].split(".")[0]), self.steps + 1
        self.log.append(("begin", step))
        with self.turn: self.turn.wait_for(lambda: self.now >= min(step + 2, 8), 60)
        writer = checkpoint.dcp.HuggingFaceStorageWriter
        plain = writer.write_data
        def full(*args): raise OSError(28, "No space left on device", str(folder))
        if self.fails and self.steps == 2: writer.write_data = full
        try: self.real(folder, tensors, group)
        finally: writer.write_data = plain
        self.log.append(("end", step, self.now))


def train(folder, mesh, p, callbacks=(), **kw):
    rng = np.random.RandomState(0)
    data = [Sample(x[:-1], x[1:]) for x in (rng.randint(0, 96, 17) for _ in range(200))]
    t = TrainConfig(**{**dict(train_iters=8, lr=2e-3, micro_batch_size=2, global_batch_size=8, device="cpu", save_interval=3, keep_last=9), **kw})
    seed_all(1)
    engine = Engine(build_stages(CFG, lambda m: m.init_weights(), mesh, p, "cpu"), mesh, p)
    tr = ParallelTrainer(engine, t, Loader(data, 2, collate_gpt, rank=mesh.data, world=mesh.sizes.data), causal_lm_loss, [Checkpointer(RunDir(folder)), *callbacks])
    return tr.fit()


def contents(folder):
    "Every tensor of every file, and the state."
    out = {}
    for f in sorted(Path(folder).glob("*.safetensors")):
        with safe_open(f, "pt") as g: out |= {(f.name, k): g.get_tensor(k) for k in g.keys()}  # noqa: SIM118
    return out, (Path(folder) / "state.json").read_text()


def same(a, b):
    (x, sx), (y, sy) = contents(a), contents(b)
    assert x.keys() == y.keys() and sx == sy
    assert [k for k in x if not torch.equal(x[k], y[k])] == []
    return len(x)


if __name__ == "__main__":
    r, _ = join(), torch.set_num_threads(1)
    home, grid = Path(sys.argv[1]), json.loads(sys.argv[2])
    p = ParallelConfig(**grid)
    mesh, disk, out = Mesh(check(p, r.world_size, model=CFG)), Disk(), {}
    train(home / "sync", mesh, p)
    train(home / "async", mesh, p, [disk], async_save=True)
    torch.distributed.barrier()
    out["log"] = disk.log
    out["same"] = [same(home / "sync" / s, home / "async" / s) for s in ("step_0000003", "step_0000006", "step_0000008")]
    try: train(home / "fails", mesh, p, [Disk(fails=r.rank == 1)], async_save=True)
    except UserError as e: out["error"] = e.key, str(e)
    torch.distributed.barrier()
    out["left"] = sorted(x.name for x in (home / "fails").iterdir() if x.name.startswith(("step_", ".step_")))
    print(json.dumps(out), flush=True)
    leave()
    os._exit(0)  # gloo's threads sometimes abort an interpreter that is done
