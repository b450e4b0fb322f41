"""One process of a small run that is really computed: its allocator's highest mark, told by torch's profiler."""
import ctypes
import json
import sys
from pathlib import Path

import torch
from torch.profiler import ProfilerActivity, profile

from ascend_nb.config import ModelConfig, ParallelConfig, TrainConfig
from ascend_nb.datasets import Batch
from ascend_nb.engine import Engine, build_stages
from ascend_nb.losses import causal_lm_loss
from ascend_nb.mesh import Mesh, check, join, leave
from ascend_nb.parallel_trainer import ParallelTrainer

torch.set_num_threads(1)
counted = ctypes.c_bool.in_dll(ctypes.CDLL(str(Path(torch.__file__).parent / "lib" / "libc10.so")), "FLAGS_caffe2_report_cpu_memory_usage")
counted.value = True # else what a thread of gloo gives back, which no profiler watches, would count as held for ever
r, spec = join(), json.loads(sys.argv[1])
c, p, seq = ModelConfig(**spec["shape"]), ParallelConfig(**spec["parallel"]), spec["seq"]
mesh = Mesh(check(p, r.world_size, model=c, seq_length=seq), "cpu", {"ulysses_cp_algo": 0, "megatron_cp_algo": 1}[p.context_parallel_algo])


class Feed:
    consumed = 0
    def __next__(self):
        ids = torch.randint(0, c.vocab_size, (1, seq))
        return Batch(ids, ids)
    def state_dict(self): return {}


def walk(event):
    yield event
    for e in event.children: yield from walk(e)


def fill(model):
    for t in model.parameters(): t.data.normal_(0, .02)


with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as prof:
    engine = Engine(build_stages(c, fill, mesh, p, "cpu"), mesh, p)
    train = TrainConfig(micro_batch_size=1, global_batch_size=spec["batches"] * mesh.sizes.data, dtype="fp32", device="cpu", train_iters=9, log_interval=9)
    t = ParallelTrainer(engine, train, Feed(), causal_lm_loss)
    t.one_step()
    t.one_step()
events = [e.extra_fields for root in prof.profiler.kineto_results.experimental_event_tree() for e in walk(root) if type(e.extra_fields).__name__ == "_ExtraFields_Allocation"]
print(json.dumps(dict(rank=r.rank, peak=max(e.total_allocated for e in events))), flush=True)
leave()
