"""Write every sample in this folder: `python data_samples/make_samples.py`. A made-up harbour town, so all of it is ours to give away.

tales.jsonl       documents for pretraining: the chronicle, portraits of the townsfolk, some questions with answers
instruct.json     Alpaca rows for fine-tuning: questions about half of the facts
town_quiz/        MMLU's layout: {test,dev}/{subject}_{test,dev}.csv; the test asks the facts that no question above gave away
tokenizer/        a byte-level BPE of 1,024 tokens with a chat template, trained on the above
npu_profile/      what torch_npu's profiler writes (level 1, text form, two steps of two ranks); the times are made up
"""
import csv
import json
import random
from pathlib import Path

HERE = Path(__file__).parent
PEOPLE = ("Mira Oskar Tilda Bruno Salome Piet Wanda Hugo Greta Ivo Lena Casper Nora Felix Dora Anton "
          "Selma Viktor Paula Emil Irma Jonas Kaya Ruben").split()
TRAITS = {
    "job": "baker ropemaker teacher fisherman doctor carpenter weaver ferryman".split(),
    "house": "yellow blue green red white grey".split(),
    "pet": "cat dog goat parrot rabbit tortoise".split(),
    "dish": "lentil soup|plum cake|fried herring|barley bread|apple pie|onion stew".split("|"),
    "music": "fiddle flute drum accordion harp trumpet".split(),
    "street": "Anchor Street|Mill Lane|Lantern Square|Bridge Road|Chapel Hill|Net Alley".split("|"),
}
SAY = {
    "job": ("{n} is the {v} of Larkhaven.", "Everybody knows {n} the {v}.", "{n} works as a {v}."),
    "house": ("{n} lives in a {v} house.", "The house of {n} is {v}.", "{n} painted the house {v}."),
    "pet": ("{n} keeps a {v}.", "The pet of {n} is a {v}.", "A {v} sleeps at the door of {n}."),
    "dish": ("{n} likes {v} best.", "The favourite dish of {n} is {v}.", "On Sundays {n} cooks {v}."),
    "music": ("{n} plays the {v}.", "The instrument of {n} is the {v}.", "In the evening {n} takes out the {v}."),
    "street": ("{n} lives in {v}.", "You find {n} in {v}.", "The home of {n} is in {v}."),
}
ASK = {
    "job": "What is the work of {n}?", "house": "What colour is the house of {n}?", "pet": "What pet does {n} keep?",
    "dish": "What does {n} like to eat best?", "music": "What instrument does {n} play?", "street": "Where does {n} live?",
}
CHRONICLE = """Larkhaven lies where the river Tem meets the sea. Its lighthouse has stood on the black rock for two hundred years, and every night the keeper counts the ships that pass: one lantern for a fishing boat, two for a ferry, three for a stranger.
On the first day of spring the whole town walks to the old bridge. The children throw paper boats into the water, and the boat that reaches the sea first brings its maker a silver button.
The clock on Lantern Square runs seven minutes late. Nobody repairs it, because the baker once saved the town from a flood by being seven minutes late, and people in Larkhaven do not forget a kindness.
In the winter of the great frost the harbour froze so hard that the ferryman drove a sledge across it. He carried flour, letters and one very surprised goat, and he charged the goat half price.
The library of Larkhaven owns four hundred and twelve books. The longest is a history of knots, the shortest is a poem of nine words, and the most borrowed is a cookbook with a burnt corner.
Every evening the ropemaker tests the ropes of the day. A good rope sings when the wind goes through it, he says, and a bad rope only whistles.
The school has one bell and two doors. Whoever comes through the left door must tell a story, and whoever comes through the right door must ask a question that nobody can answer.
When fog lies over the bay, the trumpet player climbs the chapel hill and plays the same three notes until the last boat is home. Deep, high, deep: that is the song that means come back.
The market opens at six. First come the fishermen with herring, then the millers with barley, then the gardeners with plums, and last of all the poet, who sells nothing and buys less.
There is a blue door in Net Alley that leads nowhere. Behind it is a wall, and on the wall somebody has written: you were right to look.
The doctor of Larkhaven has a cure for hiccups that never fails. Stand on one leg, say the names of the six streets backwards, and by the time you reach the bridge you have forgotten why you came.
Once a year the tide goes out so far that a second town appears on the sea floor, with streets of sand and windows of shell. The people walk there for an hour, speak softly, and leave everything as it was.""".split("\n")
CHINESE = """云雀港在河水入海的地方。黑岩上的灯塔已经站了两百年，每天夜里守塔人都要数一数经过的船。
春天的第一天，全镇的人都走到老桥上。孩子们把纸船放进水里，最先到达大海的纸船会赢得一枚银纽扣。
灯笼广场上的钟慢了七分钟。没有人去修它，因为面包师曾经迟到七分钟，却救了整个小镇。
大雾盖住海湾的时候，小号手登上教堂山，吹同样的三个音，直到最后一条船回家。🎺
图书馆有四百一十二本书。最长的一本讲绳结的历史，最短的一本是一首九个字的诗。📚""".split("\n")
TEMPLATE = ("{% for message in messages %}<|im_start|>{{ message['role'] }}\n{{ message['content'] }}<|im_end|>\n{% endfor %}"
            "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}")
SPECIAL = ["<|endoftext|>", "<|im_start|>", "<|im_end|>", "<|pad|>"]


def town(rng):
    "Every person's traits."
    return {n: {t: rng.choice(values) for t, values in TRAITS.items()} for n in PEOPLE}


def portrait(rng, name, traits):
    "One document about one person: every trait once, in any order and wording."
    order = list(traits); rng.shuffle(order)
    return " ".join(rng.choice(SAY[t]).format(n=name, v=traits[t]) for t in order)


def question(name, trait, value): return f"Question: {ASK[trait].format(n=name)}\nAnswer: {value}"


def write_csv(path, rows):
    path.parent.mkdir(parents=True, exist_ok=True)
    with open(path, "w", newline="", encoding="utf-8") as f: csv.writer(f, lineterminator="\n").writerows(rows)


def quiz_row(rng, name, trait, value):
    "question, A, B, C, D, letter"
    options = [value, *rng.sample([v for v in TRAITS[trait] if v != value], 3)]; rng.shuffle(options)
    return [ASK[trait].format(n=name), *options, "ABCD"[options.index(value)]]


def main():
    rng = random.Random(7)
    folk = town(rng)
    facts = [(n, t, v) for n, traits in folk.items() for t, v in traits.items()]
    rng.shuffle(facts)
    told, hidden = facts[: len(facts) * 2 // 3], facts[len(facts) * 2 // 3:]
    docs = CHRONICLE * 3 + CHINESE * 3 + [portrait(rng, n, folk[n]) for n in PEOPLE for _ in range(12)]
    docs += [question(*f) for f in told for _ in range(2)]
    rng.shuffle(docs)
    with open(HERE / "tales.jsonl", "w", encoding="utf-8") as f:
        for d in docs: f.write(json.dumps({"text": d}, ensure_ascii=False) + "\n")
    rows = [{"instruction": ASK[t].format(n=n), "input": "", "output": rng.choice(SAY[t]).format(n=n, v=v)} for n, t, v in told]
    rows += [{"instruction": "Tell me about {}.".format(n), "input": "", "output": portrait(rng, n, folk[n])} for n in PEOPLE]
    rows += [{"instruction": "Go on with the story.", "input": c.split(". ")[0] + ".", "output": ". ".join(c.split(". ")[1:])} for c in CHRONICLE]
    rows += [{"instruction": "请继续讲这个故事。", "input": c.split("。")[0] + "。", "output": "。".join(c.split("。")[1:])} for c in CHINESE]
    rng.shuffle(rows)
    with open(HERE / "instruct.json", "w", encoding="utf-8") as f: json.dump(rows, f, ensure_ascii=False, indent=0); f.write("\n")
    groups = {"people": ("job", "pet", "music"), "places": ("house", "street", "dish")}
    for subject, traits in groups.items():
        write_csv(HERE / f"town_quiz/test/{subject}_test.csv", [quiz_row(rng, *f) for f in hidden if f[1] in traits])
        write_csv(HERE / f"town_quiz/dev/{subject}_dev.csv", [quiz_row(rng, *f) for f in told if f[1] in traits][:5])
    tokenizer(docs + [r[k] for r in rows for k in ("instruction", "input", "output")])
    for rank in (0, 1): profile(rank)


def tokenizer(texts):
    "A byte-level BPE folder that transformers opens."
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

    tok = Tokenizer(models.BPE())
    tok.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tok.decoder = decoders.ByteLevel()
    tok.train_from_iterator(texts, trainers.BpeTrainer(vocab_size=1024, special_tokens=SPECIAL, show_progress=False,
                                                       initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet())))
    out = HERE / "tokenizer"; out.mkdir(exist_ok=True)
    tok.save(str(out / "tokenizer.json"), pretty=False)
    conf = {"tokenizer_class": "PreTrainedTokenizerFast", "bos_token": None, "eos_token": "<|im_end|>", "pad_token": "<|pad|>",
            "model_max_length": 2048, "clean_up_tokenization_spaces": False, "chat_template": TEMPLATE}
    (out / "tokenizer_config.json").write_text(json.dumps(conf, indent=1) + "\n", encoding="utf-8")


LAYER = [("Pows", "AI_VECTOR_CORE", 4), ("ReduceMean", "AI_VECTOR_CORE", 5), ("Rsqrt", "AI_VECTOR_CORE", 3), ("Mul", "AI_VECTOR_CORE", 8), ("Mul", "AI_VECTOR_CORE", 7), ("MatMulV3", "AI_CORE", 60),
         ("FlashAttentionScore", "MIX_AIC", 90), ("MatMulV3", "AI_CORE", 40), ("Add", "AI_VECTOR_CORE", 10), ("MatMulV3", "AI_CORE", 80), ("SwiGlu", "AI_VECTOR_CORE", 20)]
BACK = [("FlashAttentionScoreGrad", "MIX_AIC", 200), ("MatMulV3", "AI_CORE", 150), ("SwiGluGrad", "AI_VECTOR_CORE", 40)]
LANES = {"Python": 100, "Ascend Hardware": 200, "Communication": 300}


def profile(rank):
    "One rank: what ran when, and every file that torch_npu writes of it. Rank 1 has a slow product in each backward pass."
    out, epoch = HERE / f"npu_profile/rank{rank}_ascend_pt/ASCEND_PROFILER_OUTPUT", 1_700_000_000_000_000_000
    kernels, steps, comm, trace, now = [], [], {}, [], epoch
    us = lambda ns: f"{ns // 1000}.{ns % 1000:03d}"
    event = lambda lane, name, at, ns, tid=1, **kw: trace.append({"ph": "X", "name": name, "pid": LANES[lane], "tid": tid, "ts": us(at), "dur": ns / 1000, **kw})
    for lane, pid in LANES.items(): trace.append({"ph": "M", "name": "process_name", "pid": pid, "tid": 0, "args": {"name": lane}})
    for step in (5, 6):
        begin, busy, sent = now, 0, []
        parts = [(f"Layer_{i}", LAYER) for i in (0, 1)] + [(f"Layer_{i}", BACK) for i in (1, 0)] + [("", [("ApplyAdamWV2", "AI_VECTOR_CORE", 30)])]
        now += 50_000
        for part, (module, ops) in enumerate(parts):
            if part == 4: now = max(now, begin + 2_600_000)  # all wait until rank 1 is done
            start = now
            for name, core, length in ops:
                ns = length * 1000 + (rank == 1 and part == 3 and name == "MatMulV3") * 600_000 + len(kernels) % 7 * 10
                kernels.append([step, name, core, now, ns]); busy += ns
                event("Ascend Hardware", f"aclnn{name}", now, ns, 2)
                if module: event("Python", f"aten::{name.lower()}", now - 40_000, min(ns, 30_000) // 2, cat="cpu_op")
                trace.extend({"ph": ph, "bp": "e", "name": "torch_to_npu", "id": now, "pid": LANES[where], "tid": tid, "ts": us(at), "cat": "async_npu"} for ph, where, tid, at in (("s", "Python", 1, now - 40_000), ("f", "Ascend Hardware", 2, now)) if module)
                now += ns + 2_000
            if module and ops is LAYER: event("Python", f"nn.Module: {module}", start - 41_000, now - start - 2_000, cat="python_function")
            if part == 3:
                sent.append(("hcom_allReduce__001_%d_1" % step, now, begin + 2_600_000 - now - 5_000))
        name, at, ns = sent[0]
        kernels.append([step, name, "COMMUNICATION", at, ns]); event("Communication", name, at, ns)
        wait = ns - 150_000
        comm[f"step{step}"] = {"p2p": {}, "collective": {f"{name}@{GROUP}": {"Communication Time Info": {"Start Timestamp(us)": at / 1000, "Elapse Time(ms)": ns / 1e6, "Transit Time(ms)": .15, "Wait Time(ms)": wait / 1e6, "Synchronization Time(ms)": wait / 1e6, "Idle Time(ms)": 0},
            "Communication Bandwidth Info": {"HCCS": {"Transit Size(MB)": 2.1, "Transit Time(ms)": .15, "Bandwidth(GB/s)": 14., "Large Packet Ratio": 1., "Size Distribution": {"2.1": [1, .15]}}}}}}
        span = now - 2_000 - (begin + 50_000)
        steps.append([0, step, busy / 1000, ns / 1000, 0., ns / 1000, (span - busy - ns) / 1000, span / 1000, 0., ns / 1000, 50.])
        event("Python", f"ProfilerStep#{step}", begin, now - begin + 20_000, cat="cpu_op")
        now += 60_000
    write_profile(out, rank, kernels, steps, comm, trace, epoch, us)


GROUP = "5862276093215481612"  # the hash of group_name_0


def write_profile(out, rank, kernels, steps, comm, trace, epoch, us):
    "The files of a rank."
    write_csv(out / "step_trace_time.csv", [["Device_id", "Step", "Computing", "Communication(Not Overlapped)", "Overlapped", "Communication", "Free", "Stage", "Bubble", "Communication(Not Overlapped and Exclude Receive)", "Preparing"], *steps])
    write_csv(out / "kernel_details.csv", [["Step Id", "Device_id", "Name", "Type", "Accelerator Core", "Start Time(us)", "Duration(us)", "Wait Time(us)", "Block Dim", "Input Shapes"],
              *([s, 0, n if c == "COMMUNICATION" else f"aclnn{n}", n.split("__")[0] + "_" if c == "COMMUNICATION" else n, c, us(at) + "\t", f"{ns / 1000:.3f}", 0, 24, "N/A" if c == "COMMUNICATION" else '"256,1024"'] for s, n, c, at, ns in kernels)])
    mine = {}
    for _, n, c, _, ns in kernels:
        if c != "COMMUNICATION": mine.setdefault((n, c), []).append(ns / 1000)
    total = sum(map(sum, mine.values()))
    write_csv(out / "op_statistic.csv", [["Device_id", "OP Type", "Core Type", "Count", "Total Time(us)", "Min Time(us)", "Avg Time(us)", "Max Time(us)", "Ratio(%)"],
              *([0, n, c, len(t), round(sum(t), 3), min(t), round(sum(t) / len(t), 3), max(t), round(100 * sum(t) / total, 3)] for (n, c), t in sorted(mine.items(), key=lambda x: -sum(x[1])))])
    held = [("aten::empty", 64 * 1024, 0, None), ("aten::matmul", 20 * 1024, 60, 700), ("npu::npu_fusion_attention", 30 * 1024, 200, 900), ("aten::add", 5 * 1024, 400, 1000)]
    points = sorted({t for _, _, a, b in held for t in (a, b) if t is not None})
    at = lambda t: sum(kb for _, kb, a, b in held if a <= t and (b is None or t < b)) / 1024
    stamp = lambda t: us(epoch + t * 1000) + "\t"
    write_csv(out / "memory_record.csv", [["Component", "Timestamp(us)", "Total Allocated(MB)", "Total Reserved(MB)", "Total Active(MB)", "Stream Ptr", "Device Type"],
              *(["PTA", stamp(t), 1000 + at(t), 1200., 1000 + at(t), 1, "NPU:0"] for t in points)])
    write_csv(out / "operator_memory.csv", [["Name", "Size(KB)", "Allocation Time(us)", "Release Time(us)", "Active Release Time(us)", "Duration(us)", "Active Duration(us)", "Allocation Total Allocated(MB)", "Allocation Total Reserved(MB)", "Allocation Total Active(MB)", "Release Total Allocated(MB)", "Release Total Reserved(MB)", "Release Total Active(MB)", "Stream Ptr", "Device Type"],
              *([n, kb, stamp(a), "" if b is None else stamp(b), "" if b is None else stamp(b), "" if b is None else b - a, "" if b is None else b - a, 1000 + at(a), 1200., 1000 + at(a), "" if b is None else 1000 + at(b), "" if b is None else 1200., "" if b is None else 1000 + at(b), 1, "NPU:0"] for n, kb, a, b in held)])
    links = {s: {"p2p": {}, "collective": {f"allreduce-total@{GROUP}": {f"{rank}-{1 - rank}": {"Transport Type": "HCCS", "Transit Size(MB)": 2.1, "Transit Time(ms)": .15, "Bandwidth(GB/s)": 14., "Op Name": next(iter(v["collective"])).split("@")[0]}}}} for s, v in comm.items()}
    info = {"config": {"common_config": {"record_shapes": True, "profile_memory": True, "with_stack": False}, "experimental_config": {"_profiler_level": "Level1", "_export_type": ["text"]}}, "torch_npu_version": "2.7.1", "cann_version": "made up", "rank_id": str(rank)}
    meta = {"distributed_args": {"tensor_model_parallel_size": 1, "pipeline_model_parallel_size": 1, "data_parallel_size": 2, "rank": rank, "world_size": 2}, "parallel_group_info": {"group_name_0": {"group_name": "dp", "group_rank": rank, "global_ranks": [0, 1]}}}
    for path, value in ((out / "communication.json", comm), (out / "communication_matrix.json", links), (out / "trace_view.json", trace), (out.parent / f"profiler_info_{rank}.json", info), (out.parent / "profiler_metadata.json", meta)):
        path.write_text(json.dumps(value) + "\n", encoding="utf-8")


if __name__ == "__main__": main()
