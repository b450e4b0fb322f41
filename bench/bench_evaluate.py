"""Answering MMLU and writing answers against lm-evaluation-harness's HFLM: one JSON line for each, in the shape of SmolLM2-135M (fp32).

    python bench/bench_evaluate.py [--rounds 3] [--cases all] [--limit 16] [--written 3]

Both get the same questions, the same weights and the same batch size, and take turns, round after round, after a short turn to warm up; tokenisation is part of the time, loading is not.
The claim is 5-shot MMLU, two subjects; `--cases all` puts other cases beside it. Every log-likelihood is compared: a fast wrong score is no score. The more questions a subject has, the less
its worked examples cost ours, which reads them once: a real subject has 100 and more, this bench asks fewer so that three rounds end in a few minutes.
Written answers (GSM8K, 1-shot, prompts and answers of unequal length): side by side, one after the other, and HFLM.generate_until; every text is compared.
ASCEND_NB_SMOLLM2 names a folder with the real weights; without it they are random, and the tokenizer is trained on the questions.
"""
import argparse
import json
import logging
import os
import statistics
import tempfile
import time
from pathlib import Path

os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
os.environ.setdefault("HF_HUB_OFFLINE", "1")
import torch
from lm_eval.api.instance import Instance
from lm_eval.models.huggingface import HFLM
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import AutoTokenizer, LlamaForCausalLM

from ascend_nb.config import ModelConfig
from ascend_nb.evaluator import score_items
from ascend_nb.hf_format import load_model, save_model
from ascend_nb.model import Decoder
from ascend_nb.tasks import load_task
from ascend_nb.tokenizers import load_tokenizer
from ascend_nb.writing import batch_for, write_answers

logging.disable(logging.WARNING)
ROOT = Path(__file__).resolve().parent.parent
DATA = Path(os.environ.get("ASCEND_NB_DATA", ROOT.parent / "shared" / "data")) / "eval/mmlu/test"
SMOLLM2 = ModelConfig(vocab_size=49152, hidden_size=576, intermediate_size=1536, num_hidden_layers=30, num_attention_heads=9,
                      num_key_value_heads=3, max_position_embeddings=8192, rope_theta=100000., tie_word_embeddings=True)
REAL = os.environ.get("ASCEND_NB_SMOLLM2")
CASES = {"mmlu 5-shot": ("mmlu", 5), "mmlu 0-shot": ("mmlu", 0), "mmlu_continuation 5-shot": ("mmlu_continuation", 5), "mmlu_continuation 0-shot": ("mmlu_continuation", 0)}
LIMIT = {"mmlu 5-shot": 16}  # questions of each subject; 10 of the other cases


def questions(task, shots, limit):
    "Two subjects of the real MMLU where it is, else the quiz that ships with the project (it has fewer worked examples)."
    if not DATA.is_dir(): return load_task(task, ROOT / "data_samples/town_quiz/test", min(shots, 2), limit)
    return [i for s in ("anatomy", "marketing") for i in load_task(task, DATA / f"{s}_test.csv", shots, limit)]


def folder_with(room, text):
    "A model folder: the real one, or random weights and a tokenizer trained on the questions."
    if REAL: return Path(REAL)
    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer, bpe.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    bpe.train_from_iterator(text, trainers.BpeTrainer(vocab_size=8000, special_tokens=["<s>"], show_progress=False, initial_alphabet=pre_tokenizers.ByteLevel.alphabet()))
    bpe.save(str(room / "tokenizer.json"))
    (room / "tokenizer_config.json").write_text(json.dumps(dict(tokenizer_class="PreTrainedTokenizerFast", eos_token="<s>")))
    save_model(Decoder(SMOLLM2).init_weights(seed=1), room / "model", load_tokenizer(room))
    return room / "model"


def sums(n):
    "Real questions of GSM8K where they are, else the quiz."
    file = DATA.parent.parent / "gsm8k/test.jsonl"
    return load_task("gsm8k", file, 1, n) if file.is_file() else load_task("mmlu", ROOT / "data_samples/town_quiz/test", 2, 6)


def written(folder, rounds, batch_size, answers, most=48, until=("Question:", "\n\n")):
    "Seconds per answer: side by side, one by one, lm-eval's; how many texts are the same."
    model, tok, lm = load_model(folder), load_tokenizer(folder), HFLM(pretrained=LlamaForCausalLM.from_pretrained(folder, dtype=torch.float32), tokenizer=AutoTokenizer.from_pretrained(folder), batch_size=batch_size, device="cpu")
    items, took, same = sums(answers), [], 0
    ids = [tok.encode(i.prompt, special=True) for i in items]
    sides = (lambda: write_answers(model, tok, ids, most, until, batch=batch_for(model, batch_size)), lambda: write_answers(model, tok, ids, most, until, batch=batch_for(model, 1)),
             lambda: lm.generate_until([Instance("generate_until", {}, (i.prompt, dict(until=list(until), max_gen_toks=most, do_sample=False)), 0) for i in items], disable_tqdm=True))
    write_answers(model, tok, ids[:1], 4, until)
    for _ in range(rounds):
        seconds, texts = [], []
        for side in sides:
            began = time.perf_counter()
            texts.append(side())
            seconds.append((time.perf_counter() - began) / len(items))
        took.append(seconds)
        same += sum(a == b == c for a, b, c in zip(*texts, strict=True))
    side, one, peer = (statistics.median(x) for x in zip(*took, strict=True))
    print(json.dumps(dict(name="evaluate_written", ratio=round(statistics.median(t[2] / t[0] for t in took), 2), ours=round(side, 3), peer=round(peer, 3), unit="s per answer, gsm8k 1-shot", peer_name="lm_eval HFLM.generate_until",
                          gain_over_one_by_one=round(statistics.median(t[1] / t[0] for t in took), 2), one_by_one=round(one, 3), same_texts=f"{same} of {rounds * len(items)}", weights="real" if REAL else "random",
                          batch_size=batch_size, rounds=rounds)))


def best(logprobs): return logprobs.index(max(logprobs))


def main():
    cli = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    cli.add_argument("--rounds", type=int, default=3, help="how often each is timed; 0: written answers alone")
    cli.add_argument("--limit", type=int, default=0, help="questions of each subject; 0: 16 of the claim, 10 of the other cases")
    cli.add_argument("--cases", nargs="*", default=list(CASES)[:1], choices=[*CASES, "all"], help="which of them; the claim is the first")
    cli.add_argument("--batch-size", type=int, default=8)
    cli.add_argument("--written", type=int, default=3, help="rounds of written answers; 0: none")
    cli.add_argument("--answers", type=int, default=8, help="how many are written in a round")
    args = cli.parse_args()
    if "all" in args.cases: args.cases = list(CASES)
    took, worst, asked, same = {}, 0.0, 0, 0
    with tempfile.TemporaryDirectory() as d:
        folder = folder_with(Path(d), [i.prompt for i in questions("mmlu", 5, 0)])
        if args.rounds:
            model, tok = load_model(folder), load_tokenizer(folder)
            lm = HFLM(pretrained=LlamaForCausalLM.from_pretrained(folder, dtype=torch.float32), tokenizer=AutoTokenizer.from_pretrained(folder), batch_size=args.batch_size, device="cpu")
            both = lambda items: ([lp for s in score_items(model, tok, items, batch_size=args.batch_size, quiet=True) for lp in s["logprobs"]], lambda: lm.loglikelihood([Instance("loglikelihood", {}, p, 0) for i in items for p in i.pairs()], disable_tqdm=True))
            both(questions("mmlu", 0, 1))[1]()
        for _ in range(args.rounds):
            for case in args.cases:
                task, shots = CASES[case]
                items = questions(task, shots, args.limit or LIMIT.get(case, 10))
                began = time.perf_counter()
                ours, their_turn = both(items)
                middle = time.perf_counter()
                theirs = their_turn()
                end = time.perf_counter()
                worst = max(worst, *(abs(a - b[0]) for a, b in zip(ours, theirs, strict=True)))
                for n in range(0, len(ours), 4): asked, same = asked + 1, same + (best(ours[n:n + 4]) == best([x for x, _ in theirs[n:n + 4]]))
                took.setdefault(case, []).append(((middle - began) / len(items), (end - middle) / len(items)))
        model = lm = None
        if args.written: written(folder, args.written, args.batch_size, args.answers)
    if not took: return
    median = {case: [statistics.median(x) for x in zip(*rounds, strict=True)] for case, rounds in took.items()}
    ratio = {case: statistics.median(theirs / ours for ours, theirs in rounds) for case, rounds in took.items()}
    claim = args.cases[0]
    print(json.dumps(dict(
        name="evaluate", ratio=round(ratio[claim], 2), ours=round(median[claim][0], 3), peer=round(median[claim][1], 3), unit=f"s per question, {claim}",
        peer_name="lm_eval HFLM.loglikelihood", largest_difference=worst, same_answers=f"{same} of {asked}", batch_size=args.batch_size, rounds=args.rounds, data="mmlu" if DATA.is_dir() else "town_quiz",
        questions=asked // args.rounds, threads=torch.get_num_threads(), weights="real" if REAL else "random", cases={c: dict(ratio=round(ratio[c], 2), ours=round(median[c][0], 3), peer=round(median[c][1], 3)) for c in args.cases})))


if __name__ == "__main__": main()
