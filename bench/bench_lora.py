"""LoRA SFT of SmolLM2-135M on real instructions (alpaca_en_demo), fp32 on CPUs: one JSON line.

Three sides, each in a process of its own that holds nothing else, take turns for a few steps, round after round:
  ours    ascend_nb's Trainer with the callbacks of every run, one row of text in each row of a batch, padded to the longest; a step leaves the padding out
  peer    peft and transformers' Trainer on the very same batches: the same ids, labels, padding and attention mask
  packed  ours, several rows of text in one of seq_length tokens, which do not see each other
Rank 16 on all linear layers, AdamW, gradients clipped, the loss on answers alone. tokens/s count text, not padding. A ratio is the median of the
rounds' ratios. peak_rss is that of the whole process, from start to end (VmHWM).
ASCEND_NB_SMOLLM2 names the model's folder (`ascend_nb fetch smollm2-135m --to DIR`), ASCEND_NB_DATA the folder with instruct/alpaca_en_demo.json.
"""
import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
B, PACKED, S, R = 4, 2, 512, 16  # rows of text in a batch, rows of packed texts in a batch, tokens in a row at most, rank


def configs(model, data, run, packed, iters=10_000):
    from ascend_nb.config import DataConfig, RunConfig, TrainConfig, TuneConfig
    return RunConfig(data=DataConfig(data_path=[str(data / "alpaca")], tokenizer_name_or_path=str(model), split="100,0,0", seq_length=S, variable_seq_lengths=True, packing=packed),
                     train=TrainConfig(stage="sft", load=str(model), save=str(run), train_iters=iters, micro_batch_size=PACKED if packed else B, lr=1e-4, device="cpu", dtype="fp32"),
                     tune=TuneConfig(lora_target_modules=["all-linear"], lora_r=R, lora_alpha=2 * R))


def lengths(batch):
    "Tokens of each row: up to the last that is trained."
    n = batch.input_ids.shape[1]
    return n - (batch.labels != -100).flip(1).int().argmax(1)


def ours(model, data, run, packed):
    from ascend_nb import training
    job = training.build(configs(model, data, run, packed))
    t, seen = job.trainer, []
    t.callbacks.append(type("Count", (), dict(before_step=lambda self, t: seen.append(sum(int(lengths(b).sum()) for b in t.now.batches))))())
    t.call("before_fit")
    t.model.train()
    def step():
        t.one_step()
        return seen.pop()
    return step


def peer(model, data, run):
    import torch
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM, TrainerCallback, TrainingArguments
    from transformers import Trainer as HFTrainer

    from ascend_nb import training
    cfg, tokenizer = training.resolve(configs(model, data, run, False))
    loader = training.loaders(cfg, tokenizer)["train"]
    net = get_peft_model(AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32), LoraConfig(r=R, lora_alpha=2 * R, target_modules="all-linear"))
    count = []

    class Batches(torch.utils.data.IterableDataset):
        def __iter__(self):
            while True:
                b = next(loader)
                n = lengths(b)
                count.append(int(n.sum()))
                yield dict(input_ids=b.input_ids, labels=torch.cat((torch.full((len(n), 1), -100), b.labels[:, :-1]), 1), attention_mask=(torch.arange(b.input_ids.shape[1]) < n[:, None]).long())

    class Pause(TrainerCallback):
        "Between two steps: tell, and wait to be asked for the next ones."
        def __init__(self): self.left, self.done = 0, 0
        def on_step_begin(self, *a, **kw):
            if not self.left: self.left, self.done, self.t0 = wait(), 0, time.perf_counter()
        def on_step_end(self, *a, **kw):
            self.left, self.done = self.left - 1, self.done + count.pop(0)
            if not self.left: tell(self.done, time.perf_counter() - self.t0)

    args = TrainingArguments(output_dir=str(run), max_steps=10_000, per_device_train_batch_size=1, learning_rate=1e-4, max_grad_norm=1., report_to="none", save_strategy="no", disable_tqdm=True,
                             use_cpu=True, optim="adamw_torch_fused", weight_decay=.1, logging_steps=1)
    HFTrainer(net, args, train_dataset=Batches(), data_collator=lambda rows: rows[0], callbacks=[Pause()]).train()


def wait():
    line = sys.stdin.readline()
    if line.strip() in ("", "end"):
        print(json.dumps(dict(rss=int(next(x for x in open("/proc/self/status") if x.startswith("VmHWM")).split()[1]) * 1024)), file=REAL, flush=True)
        os._exit(0)
    return int(line)


def tell(tokens, seconds): print(json.dumps(dict(tokens=tokens, seconds=seconds)), file=REAL, flush=True)


def worker(side, model, data, run):
    if side == "peer": peer(model, data, run)
    step = ours(model, data, run, side == "packed")
    while True:
        n, t0 = wait(), time.perf_counter()
        tokens = sum(step() for _ in range(n))
        tell(tokens, time.perf_counter() - t0)


def main():
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--rounds", type=int, default=5, help="times that all take a turn, after one to warm up")
    p.add_argument("--steps", type=int, default=2, help="steps in a turn")
    a = p.parse_args()
    from ascend_nb import preprocess
    from ascend_nb.config import PreprocessConfig
    model, rows = Path(os.environ["ASCEND_NB_SMOLLM2"]), Path(os.environ["ASCEND_NB_DATA"]) / "instruct/alpaca_en_demo.json"
    with tempfile.TemporaryDirectory() as d:
        preprocess.run(PreprocessConfig(input=str(rows), output_prefix=f"{d}/alpaca", tokenizer_name_or_path=str(model), handler_name="AlpacaStyleInstructionHandler", seq_length=S), json=True)
        jobs = {s: subprocess.Popen([sys.executable, __file__, s, model, d, f"{d}/run_{s}"], stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=open(f"{d}/{s}.log", "w"), text=True) for s in ("ours", "peer", "packed")}
        def ask(side, word):
            print(word, file=jobs[side].stdin, flush=True)
            return json.loads(jobs[side].stdout.readline())
        rounds = [{s: ask(s, a.steps) for s in jobs} for _ in range(a.rounds + 1)][1:]
        rss = {s: ask(s, "end")["rss"] for s in jobs}
        for j in jobs.values(): j.wait(30)
    speed = {s: [r[s]["tokens"] / r[s]["seconds"] for r in rounds] for s in jobs}
    mid, ratio = ({s: round(statistics.median(v), 1) for s, v in speed.items()}, lambda s: round(statistics.median(x / y for x, y in zip(speed[s], speed["peer"], strict=True)), 3))
    print(json.dumps(dict(name="lora", ratio=ratio("ours"), ours=mid["ours"], peer=mid["peer"], unit="text tokens/s", claim="ratio >= 1.3 of peft and transformers' Trainer on the same batches",
                          packed=dict(ratio=ratio("packed"), ours=mid["packed"], claim="ratio >= 2"),
                          peak_rss=dict(ratio=round(rss["ours"] / rss["peer"], 3), **{s: f"{n / 2**20:.0f} MiB" for s, n in rss.items()}, claim="ratio <= 0.8"),
                          batch=B, packed_batch=PACKED, longest=S, rank=R, rounds=a.rounds, steps=a.steps, threads=int(os.environ.get("OMP_NUM_THREADS", 0)))))


if __name__ == "__main__":
    side = len(sys.argv) == 5 and sys.argv[1] in ("ours", "peer", "packed")
    REAL, sys.stdout = sys.stdout, sys.stderr if side else sys.stdout  # whatever a library prints
    if side: worker(sys.argv[1], *map(Path, sys.argv[2:5]))
    else: main()
