"""Launch scripts of ModelLink's shape: read as bash reads them, and turned into the model that the flags describe."""
import argparse
import json
import os
import re
import shlex
import shutil
import subprocess
import sys

import pytest
import yaml
from conftest import ROOT
from here import ascend

from ascend_nb import config
from ascend_nb.core import UserError
from ascend_nb.flag_table import CONFIGS, KINDS, Flags, find_row, flag_file, flag_table, words_to_flags
from ascend_nb.launch_scripts import launches, read_script, whole_sum
from ascend_nb.schema import from_dict, knobs, parse_args, to_dict
from ascend_nb.scripts import command_words, config_of, draft_of, grid_notes, import_text, train_words, yaml_text

SAMPLE = ROOT / "data_samples" / "pretrain_tales_ptd.sh"




# Each piece of bash is also run by bash itself, with programs that print their arguments.
STUB = "torchrun() { printf '%s\\n' \"$@\"; }; python() { printf '%s\\n' \"$@\"; }\n"
PIECES = {
    "arithmetic": 'N=8; M=2\nW=$(($N*$M - 3 % 2))\ntorchrun --nproc_per_node $((W / 4 * 2)) a.py --x $((-7 / 2)) --y $(( (1 + 2) * -3 ))',
    "continued string": 'TP=2\nARGS="\n    --tp ${TP} \\\n    --pp $TP \\\n    --list 1,2,3\n"\ntorchrun a.py $ARGS --end',
    "open end of a string": 'A="\n --one 1 \\\n --two 2 \\\n"\ntorchrun a.py $A --three',
    "array": 'A=(\n  --one 1   # first\n  "--two" "b c"\n)\nA+=(--three)\ntorchrun a.py "${A[@]}"',
    "array without brackets": "A=(--one 1 --two)\ntorchrun a.py $A",
    "array's length and elements": "IPS=('h1' 'h2' 'h3')\ntorchrun --nnodes ${#IPS[@]} a.py ${IPS[0]} ${IPS[2]}",
    "defaults": "X=4\nE=\ntorchrun a.py ${X:-5} ${Y:-6} ${E:-7} ${E-8} ${Z:=9} $Z${X}",
    "quotes": "A='$HOME \"x\"'\nB=\"it's $((1+1))\"\ntorchrun a.py \"$A\" \"$B\" --k='{\"a\": \"b c\"}' \"\" x\\ y",
    "string as an array": 'A="--one 1   --two"\nB=("c d" e)\ntorchrun ${A[@]} a.py ${B[@]} "${A[@]}" ${A[*]}',
    "defaults in a sum": 'N=5000\nE=\ntorchrun a.py $(( ${N:-0} / 100 )) $((${M:-8} * N)) $((${E:-3} + ${N} - 1))',
    "growing value": 'D=""\nD=" --a ${D}"\nD=" --b=$D"\nD+=" --c"\ntorchrun a.py $D',
    "here-document": 'cat <<EOT > /dev/null\n{ "x": "$Y" }\ntorchrun never.py\nEOT\ntorchrun a.py --one',
    "glued quotes": 'A="\n --path "configs/a.yaml" \\\n --b "\ntorchrun a.py $A',
    "two commands": "export A=1 B=2; N=3 && torchrun a.py --a $A --n $N 2>&1 | cat",
    "unset": "torchrun a.py $MORE_ARGS --a",
    "tab": "ARGS='\n\t--one 1\n\t--two\n'\ntorchrun a.py $ARGS",
}


@pytest.mark.parametrize("name", PIECES)
@pytest.mark.skipif(not shutil.which("bash"), reason="no bash to compare with")
def test_words_are_those_of_bash(name):
    said = subprocess.run(["bash", "-c", STUB + PIECES[name]], capture_output=True, text=True, check=True).stdout.split("\n")[:-1]
    command, = [c for c in read_script(PIECES[name]).commands if c[0] == "torchrun"]
    assert command[1:] == said


@pytest.mark.skipif(not shutil.which("bash"), reason="no bash to compare with")
def test_the_sample_is_read_as_bash_reads_it(tmp_path):
    text = "source() { :; }\n" + STUB + SAMPLE.read_text(encoding="utf-8").replace("| tee logs/pretrain_tales.log", "")
    said = subprocess.run(["bash", "-c", text], capture_output=True, text=True, check=True, cwd=tmp_path).stdout.split("\n")[:-1]
    one, = launches(read_script(SAMPLE.read_text(encoding="utf-8")))
    assert said[said.index("pretrain_gpt.py") + 1:] == one.args
    assert said[:said.index("pretrain_gpt.py")] == [w for k, v in one.options.items() for w in (f"--{k}", v)]


@pytest.mark.parametrize("text", ["2+3*4", "(2+3)*4", "17 / 5 - 17 % 5", "-17 / 5", "-17 % 5", "100/7/3", "2 - -2", "+3"])
@pytest.mark.skipif(not shutil.which("bash"), reason="no bash to compare with")
def test_sums_are_those_of_bash(text):
    assert whole_sum(text, {}.get) == subprocess.run(["bash", "-c", f"echo $(({text}))"], capture_output=True, text=True, check=True).stdout.strip()


def test_nothing_is_run(tmp_path):
    "A script that would leave traces leaves none when it is read."
    trace = tmp_path / "trace"
    text = f"touch {trace}\nA=$(touch {trace})\nB=`touch {trace}`\neval 'touch {trace}'\ntorchrun pretrain_gpt.py --save $A --load ${{B}} $(touch {trace})\n"
    found = read_script(text)
    assert not trace.exists() and sum("is not run" in n for n in found.notes) == 3
    assert launches(found)[0].args[1].startswith("<touch"), "what cannot be known stays as a placeholder"


def test_what_is_odd_is_told():
    text = 'TUNE_ARGS="--lr 1"\nA=(--a --b)\nif [ "$1" ]; then N=3; fi\nsource other.sh\ntorchrun a.py $TUNE_ARG $A --n $N --host $HOST \\\n   # --off 1 \\\n   --on\n'
    found = read_script(text)
    notes = "\n".join(found.notes)
    for words in ("$TUNE_ARG is never set in this script, so bash passes nothing. Did you mean TUNE_ARGS?", "--b is not passed", "N is set inside if", "other.sh is another file", "# --off 1", "$HOST is never set"):
        assert words in notes, words
    assert found.commands[-1] == ["torchrun", "a.py", "--a", "--n", "3", "--host", "<HOST>", "--on"]


@pytest.mark.parametrize("text,line", [('A=1\nB="--lr\n', 2), ("torchrun 'a.py\n", 1), ("A=(1 2\n", 1), ("\n\nX=${A\n", 3)])
def test_what_is_never_closed(text, line):
    with pytest.raises(UserError, match=f"line {line}"): read_script(text)


def test_flags_are_those_of_argparse():
    words = shlex.split("--lr 1e-5 --data-path 0.3 a 0.7 b --moe-layer-freq -1 --zero_stage=2 --bf16 --lr 2e-5 --reward-tokens + -")
    p = argparse.ArgumentParser(allow_abbrev=False)
    for flag, kw in dict(lr={}, data_path=dict(nargs="*"), moe_layer_freq={}, zero_stage={}, bf16=dict(action="store_true"), reward_tokens=dict(nargs="+")).items():
        p.add_argument(f"--{flag}", f"--{flag.replace('_', '-')}", **kw)
    theirs, ours = vars(p.parse_args(words)), dict(words_to_flags(words)[0])
    assert {k.replace("-", "_"): (v or [True]) for k, v in ours.items()} == {k: v if isinstance(v, list) else [v] for k, v in theirs.items()}


@pytest.mark.parametrize("end", ["'", '"', "$(", "${", "((", "<<X\n", "(", "$((", "\\", "|", "A=( ("])
def test_broken_scripts_are_told_and_never_hang(end):
    "The sample, cut anywhere and ended with an odd character: read, or one sentence."
    text = SAMPLE.read_text(encoding="utf-8")
    for cut in range(0, len(text), 61):
        try: import_text(text[:cut] + end)
        except UserError: pass


# ---- the table

def test_every_row_is_sound():
    data, names = flag_file(), {".".join((*k.path, k.name)) for k in knobs(config.RunConfig)}
    listed = [*data["same"].split(), *data["becomes"], *(f for kind in KINDS[2:] for g in data[kind] for f in g["flags"].split())]
    listed += [a[2:].partition("=")[0] for k in knobs(config.RunConfig) for a in k.flags if a[2:].partition("=")[0] not in ("use-distributed-optimizer", "enable-high-availability")] # aliases need no line, but for two that a rule looks at
    twice = {f for f in listed if listed.count(f) > 1}
    assert not twice, f"in two places: {twice}"
    for row in flag_table().values():
        assert all(knob in names for knob, _ in row.to), row
        assert row.to or re.search(r"[a-z]", row.say[0]) and re.search(r"[\u4e00-\u9fff]", row.say[1]), f"{row.flag} says nothing in one language"
    for command, rows in data["commands"].items():
        own = {k.name for k in knobs(getattr(config, CONFIGS[command]))}
        for flag in rows: assert all(k in own for k, _ in find_row(flag, command).to), (command, flag)


def test_each_rule_is_in_use():
    "A flag of the section `rules` is one that the rules look at: changing the flag's name in the room makes this fail."
    source = (ROOT / "ascend_nb" / "script_rules.py").read_text(encoding="utf-8")
    idle = {"finetune", "square-alibi-mask", "fill-neg-inf", "no-position-embedding", "tokenizer-type", "merge-file", "rope-factor", "embed-layernorm"} # told by another flag
    missing = [f for g in flag_file()["rules"] for f in g["flags"].split() if f not in idle and not re.search(rf"(?<![\w-]){f}(?![\w-])", source)]
    assert not missing, missing


# ---- models whose size is published

PLAIN = "--normalization RMSNorm --swiglu --position-embedding-type rope --disable-bias-linear --untie-embeddings-and-output-weights --make-vocab-size-divisible-by 1"
MLA = "--multi-head-latent-attention --qk-rope-head-dim 64 --qk-nope-head-dim 128 --kv-lora-rank 512 --v-head-dim 128 --qk-layernorm"
MODELS = { # flags of the shape -> (family, parameters as the model's card or its safetensors index has them)
    "llama-2-7b": (f"--num-layers 32 --hidden-size 4096 --ffn-hidden-size 11008 --num-attention-heads 32 --vocab-size 32000 {PLAIN}", "llama", 6_738_415_616),
    "mistral-7b": (f"--num-layers 32 --hidden-size 4096 --ffn-hidden-size 14336 --num-attention-heads 32 --group-query-attention --num-query-groups 8 --sliding-window 4096 --vocab-size 32000 {PLAIN}", "mistral", 7_241_732_096),
    "qwen2-7b": (f"--num-layers 28 --hidden-size 3584 --ffn-hidden-size 18944 --num-attention-heads 28 --group-query-attention --num-query-groups 4 --padded-vocab-size 152064 --add-qkv-bias {PLAIN}", "qwen2", 7_615_616_512),
    "chatglm3-6b": (f"--num-layers 28 --hidden-size 4096 --ffn-hidden-size 13696 --num-attention-heads 32 --group-query-attention --num-query-groups 2 --padded-vocab-size 65024 --add-qkv-bias --use-glm-rope --rotary-percent 0.5 --kv-channels 128 {PLAIN}", "chatglm", 6_243_584_000),
    "mixtral-8x7b": (f"--num-layers 32 --hidden-size 4096 --ffn-hidden-size 14336 --num-attention-heads 32 --group-query-attention --num-query-groups 8 --vocab-size 32000 --num-experts 8 --moe-router-topk 2 --moe-router-load-balancing-type aux_loss {PLAIN}", "mixtral", 46_702_792_704),
    "qwen3-30b-a3b": (f"--num-layers 48 --hidden-size 2048 --ffn-hidden-size 6144 --num-attention-heads 32 --group-query-attention --num-query-groups 4 --kv-channels 128 --qk-layernorm --padded-vocab-size 151936 --num-experts 128 --moe-router-topk 8 --moe-ffn-hidden-size 768 --norm-topk-prob {PLAIN}", "qwen3_moe", 30_532_122_624),
    "deepseek-v2-lite": (f"--num-layers 27 --hidden-size 2048 --ffn-hidden-size 10944 --num-attention-heads 16 --padded-vocab-size 102400 {MLA} --num-experts 64 --moe-router-topk 6 --n-shared-experts 2 --first-k-dense-replace 1 --moe-intermediate-size 1408 --moe-router-load-balancing-type softmax_topk --topk-group 1 {PLAIN}", "deepseek_v2", 15_706_484_224),
    "gpt2": ("--num-layers 12 --hidden-size 768 --num-attention-heads 12 --padded-vocab-size 50257 --max-position-embeddings 1024", "gpt2", 124_439_808),
    "bloom-7b1": ("--num-layers 30 --hidden-size 4096 --num-attention-heads 32 --padded-vocab-size 250880 --position-embedding-type alibi --normalization LayerNorm --embed-layernorm", "bloom", 7_069_016_064),
    "gemma2-9b": ("--num-layers 42 --hidden-size 3584 --ffn-hidden-size 14336 --num-attention-heads 16 --group-query-attention --num-query-groups 8 --kv-channels 256 --vocab-size 256000 --make-vocab-size-divisible-by 1 --normalization RMSNorm --add-rmsnorm-offset --disable-bias-linear --position-embedding-type rope --gelu-tanh --post-norm --input-embeds-norm --query-pre-attn-scalar 256 --output-logit-softcapping 30.0 --interleave-sliding-window 4096", "gemma2", 9_241_705_984),
}


@pytest.mark.parametrize("name", MODELS)
def test_shapes_have_the_published_size(name):
    flags, family, size = MODELS[name]
    one = import_text(f"torchrun --nproc_per_node 8 pretrain_gpt.py {flags} --train-iters 1 --data-path x\n")
    assert (one.cfg.model.model_type, one.cfg.model.num_params(), [t.flag for t in one.unknown]) == (family, size, [])


@pytest.mark.parametrize("pattern,layers", [("([0]*3+[1]*24)", [0] * 3 + [1] * 24), ("[1]*27", [1] * 27), ("[0,1]*13+[1]", [0, 1] * 13 + [1])])
def test_megatron_s_pattern_of_layers(pattern, layers):
    "--moe-layer-freq as an expression of Python's, which Megatron evaluates; here it is read."
    d = draft_of(Flags(words_to_flags(f"--num-layers 27 --hidden-size 64 --num-attention-heads 4 --num-experts 4 --moe-router-topk 2 --moe-layer-freq {pattern}".split())[0]))
    m = config_of(d).model
    assert [m.is_moe(i) for i in range(27)] == [bool(x) for x in layers]


def test_yarn_is_what_transformers_reads():
    from transformers import DeepseekV2Config

    from ascend_nb.families import config_to_hf
    flags = MODELS["deepseek-v2-lite"][0] + " --rope-scaling-type yarn --rope-scaling-factor 40 --rope-scaling-beta-fast 32 --rope-scaling-beta-slow 1 --rope-scaling-mscale 0.707 --rope-scaling-mscale-all-dim 0.707 --rope-scaling-original-max-position-embeddings 4096 --max-position-embeddings 163840"
    hf = DeepseekV2Config(**config_to_hf(import_text(f"torchrun pretrain_gpt.py {flags} --train-iters 1 --data-path x\n").cfg.model))
    r = hf.rope_scaling
    assert (r["factor"], r["mscale"], r["original_max_position_embeddings"], hf.n_routed_experts, hf.first_k_dense_replace) == (40, 0.707, 4096, 64, 1)


def test_megatron_s_own_defaults():
    "What Megatron-LM does where a flag is absent: linear decay, weight decay 0.01, betas 0.9 and 0.999, fp32, validation each 1000 steps of 100 batches."
    one = import_text("torchrun pretrain_gpt.py --num-layers 2 --hidden-size 64 --num-attention-heads 4 --micro-batch-size 2 --global-batch-size 8 --train-iters 9 --data-path x\n")
    t, p = one.cfg.train, one.cfg.parallel
    assert (t.lr_decay_style, t.weight_decay, t.adam_beta1, t.adam_beta2, t.dtype, t.eval_interval, t.eval_iters, p.zero_stage) == ("linear", .01, .9, .999, "fp32", 1000, 400, 0)
    assert one.cfg.model.intermediate_size == 256 and one.cfg.model.mlp_bias


# ---- the commands

def test_what_is_printed_is_what_train_reads(tmp_path):
    out = ascend("import-script", SAMPLE)
    assert out.returncode == 0 and "--swiglu" in out.stderr
    (tmp_path / "run.yaml").write_text(out.stdout, encoding="utf-8")
    back = yaml.safe_load(ascend("train", "--config", tmp_path / "run.yaml", "--print-config").stdout)
    assert back == to_dict(import_text(SAMPLE.read_text(encoding="utf-8")).cfg)
    told = json.loads(ascend("import-script", SAMPLE, "--json").stdout)
    assert told["unknown"] == [] and told["command"] == "train" and "--nproc-per-node 2" in told["start"]


def test_flags_on_the_command_line_are_the_script():
    "`ascend_nb train` with the words of the script's command line is the same run as the imported YAML, but for what only a whole script means by silence."
    one, = launches(read_script(SAMPLE.read_text(encoding="utf-8")))
    out = ascend("train", *one.args, "--print-config")
    want = to_dict(import_text(SAMPLE.read_text(encoding="utf-8")).cfg)
    want["train"]["dtype"] = "auto"
    assert out.returncode == 0, out.stderr
    assert yaml.safe_load(out.stdout) == want


def test_our_own_flags_stay_as_they_are():
    argv = ["--num-hidden-layers", "4", "--lr", "1e-3", "--tensor-model-parallel-size", "2", "--use-distributed-optimizer", "--bf16", "--typo"]
    assert train_words(argv) == argv


@pytest.mark.parametrize(("flags", "twice", "retries"), [
    ("--enable-high-availability", True, 0), ("--distributed-optimizer-no-replica --enable-high-availability", False, 0), ("--distributed-optimizer-no-replica", False, 0),
    ("--enable-high-availability --enable-optimizer-state-local-copy --enable-hbmfault-repair --enable-worker-reboot --enable-elastic-training", True, 3)])
def test_high_availability(flags, twice, retries, capfd):
    "MindSpeed-LLM's switches: what lives twice, what is done again; what torchrun does is told."
    for more in ("", " --use-distributed-optimizer"):
        guard = parse_args(config.RunConfig, train_words(f"--data-path x {flags}{more}".split())).guard
        assert (guard.replicate_optimizer, guard.step_retries, guard.step_copy) == (twice, retries, True)
    assert ("--enable-worker-reboot --enable-elastic-training" in capfd.readouterr().err) == ("reboot" in flags)
    assert "--max-restarts" in find_row("enable-worker-reboot").note and "--nnodes MIN:MAX" in find_row("enable-elastic-training").note


@pytest.mark.parametrize("text,words", [
    ("echo nothing\n", "no command"),
    ("torchrun other.py --lr 1\n", "other.py"),
    ("torchrun pretrain_gpt.py --num-layers four\n", "four"),
    ("torchrun pretrain_gpt.py --num-layers 2 --hidden-size 64 --num-attention-heads 4 --micro-batch-size 0\n", "micro_batch_size"),
    ("torchrun posttrain_gpt.py --stage ray_grpo --num-layers 2 --hidden-size 64 --num-attention-heads 4\n", "PPO, GRPO"),
    ("torchrun posttrain_gpt.py --stage gspo --is-pairwise-dataset --num-layers 2 --hidden-size 64 --num-attention-heads 4\n", "Found --stage gspo"),
    ("torchrun pretrain_gpt.py --num-layers 2 --hidden-size 64 --num-attention-heads 4 --position-embedding-type rope\n", "no family"),
    ("torchrun train_fsdp2.py a.yaml\n", "no counterpart"),
    ("torchrun inference.py --task beam_serch --load m\n", "beam_search"),
    ('torchrun pretrain_gpt.py "--lr 1\n', "never closed"),
])
def test_a_mistake_is_one_sentence(tmp_path, text, words):
    (tmp_path / "a.sh").write_text(text, encoding="utf-8")
    out = ascend("import-script", tmp_path / "a.sh", cwd=tmp_path, env={**os.environ, "PYTHONPATH": str(ROOT)})
    assert (out.returncode, out.stdout) == (2, "") and words in out.stderr and "Traceback" not in out.stderr


# A script of the shape of MindSpeed-LLM's examples/mcore/*/dpo_*.sh and simpo_*.sh: arrays of arguments, and a block for the preference.
DPO = """
TP=1
PP={pp}
DISTRIBUTED_ARGS="--nproc_per_node 2 --nnodes 1 --node_rank 0 --master_addr localhost --master_port 6000"
GPT_ARGS="
    --use-mcore-models --tensor-model-parallel-size ${TP} --pipeline-model-parallel-size ${PP} --num-layers 4 --hidden-size 64 --ffn-hidden-size 128
    --num-attention-heads 4 --group-query-attention --num-query-groups 2 --tokenizer-type PretrainedFromHF --tokenizer-name-or-path TOKENIZER
    --seq-length 128 --max-position-embeddings 128 --micro-batch-size 1 --global-batch-size 4 --make-vocab-size-divisible-by 1 --lr 5e-4 --train-iters 3
    --lr-decay-style cosine --untie-embeddings-and-output-weights --disable-bias-linear --attention-dropout 0.0 --hidden-dropout 0.0 --position-embedding-type rope
    --normalization RMSNorm --norm-epsilon 1e-6 --swiglu --use-flash-attn --no-masked-softmax-fusion --attention-softmax-in-fp32 --min-lr 5e-8 --weight-decay 1e-1
    --lr-warmup-fraction 0.0 --clip-grad 1.0 --adam-beta1 0.9 --adam-beta2 0.95 --initial-loss-scale 1 --no-gradient-accumulation-fusion --no-load-optim --no-load-rng --seed 42
    --use-distributed-optimizer --overlap-grad-reduce
"
DATA_ARGS="--data-path DATA --split 100,0,0 --prompt-type qwen --variable-seq-lengths"
RL_ARGS="--finetune {rl} --is-instruction-dataset --is-pairwise-dataset"
OUTPUT_ARGS="--log-interval 1 --save-interval 3 --eval-interval 3 --eval-iters 0"
torchrun $DISTRIBUTED_ARGS posttrain_gpt.py $GPT_ARGS $DATA_ARGS $OUTPUT_ARGS $RL_ARGS --distributed-backend nccl --save SAVE | tee logs/dpo.log
"""


@pytest.mark.parametrize(("rl", "want"), [
    ("--stage dpo --dpo-loss-type hinge --dpo-beta 0.2 --pref-ftx 0.1 --ref-model REF", dict(stage="dpo", dpo_loss_type="hinge", dpo_beta=.2, pref_ftx=.1, ref_model="REF")),
    ("--stage simpo --simpo-beta 2.0 --gamma-beta-ratio 1.2 --simpo-loss-type sigmoid --simpo-label-smoothing 0.1", dict(stage="simpo", simpo_beta=2., gamma_beta_ratio=1.2, simpo_label_smoothing=.1)),
    ("--stage simpo", dict(stage="simpo", simpo_beta=2.5, gamma_beta_ratio=1.4)), ("--stage orm", dict(stage="rm")), ("", dict(stage="dpo")),
], ids=["dpo", "simpo", "defaults", "orm", "no stage"])
def test_preference_scripts_become_a_config(rl, want):
    one = import_text(DPO.replace("{rl}", rl).replace("{pp}", "2"))
    have = {**to_dict(one.cfg)["tune"], **to_dict(one.cfg)["train"]}
    assert {k: have[k] for k in want} == want and one.cfg.data.variable_seq_lengths and one.unknown == [] and not one.heavy
    assert one.cfg.parallel.pipeline_model_parallel_size == 2 and "ascend_nb.cli train" in yaml_text(one)


def test_a_script_of_strings_used_as_arrays_is_the_same_script():
    "MindSpeed-LLM's own tests write ${GPT_ARGS[@]} for a string."
    plain = DPO.replace("{rl}", "--stage orm").replace("{pp}", "1")
    loose = re.sub(r"\$((DISTRIBUTED|GPT|DATA|RL|OUTPUT)_ARGS)", r"${\1[@]}", plain)
    one = import_text(loose)
    assert loose.count("[@]") == 5 and to_dict(one.cfg) == to_dict(import_text(plain).cfg) and (one.cfg.train.stage, one.launch.world) == ("rm", 2)


@pytest.mark.parametrize(("rl", "pp", "more", "why"), [
    ("--stage orm", "2", "", "pipeline_model_parallel_size=2 with stage=rm"), ("--stage dpo", "1", "--context-parallel-size 2", "context_parallel_size=2 with stage=dpo"),
    ("--stage dpo --dpo-loss-type ipo --dpo-label-smoothing 0.1", "1", "", "label_smoothing=0.1 with loss=ipo"), ("--stage dpo --ref-model REF --dpo-ftx 0.5", "2", "", ""),
], ids=["orm pp", "dpo cp", "ipo", "fits"])
def test_what_train_refuses_of_a_stage_is_told_with_the_yaml(rl, pp, more, why):
    one = import_text(DPO.replace("{rl}", f"{rl} {more}").replace("{pp}", pp))
    told = [x for x in grid_notes(one) if "will refuse this" in x]
    assert len(told) == bool(why) and all(why in x for x in told) and all(x in yaml_text(one) for x in told)
    assert why or one.cfg.tune.pref_ftx == .5 and any("ref_model must be a Hugging Face folder" in x and "convert REF " in x for x in one.notes)


def test_an_adapter_in_the_folder_of_the_run_is_the_run_itself():
    "ModelLink's LoRA-DPO scripts name one folder for --save and --lora-load."
    one, apart = (import_text(DPO.replace("{rl}", f"--stage dpo --lora-r 8 --lora-target-modules linear_qkv --lora-load {x}").replace("{pp}", "1")) for x in ("SAVE", "OTHER"))
    assert one.cfg.tune.lora_load == "" and one.cfg.tune.lora_target_modules == ["linear_qkv"] and any("lora_load is left out" in x for x in one.notes)
    assert apart.cfg.tune.lora_load == "OTHER" and not any("lora_load" in x for x in apart.notes)


def test_a_dpo_script_trains(tmp_path):
    "The YAML of a script is what `train` accepts; the same words on the command line too."
    rows = [dict(instruction=f"Where does Jonas live ({i})?", chosen="In Net Alley.", rejected="Nobody knows where.") for i in range(8)]
    (tmp_path / "pairs.json").write_text(json.dumps(rows))
    text = DPO.replace("{rl}", "--stage dpo --dpo-beta 0.2").replace("{pp}", "1").replace("--nproc_per_node 2", "--nproc_per_node 1").replace("TOKENIZER", str(ROOT / "data_samples" / "tokenizer"))
    (tmp_path / "dpo.sh").write_text(text.replace("DATA --split", f"{tmp_path}/pairs.json --split").replace("--save SAVE", f"--save {tmp_path}/run"))
    out = ascend("import-script", tmp_path / "dpo.sh")
    assert out.returncode == 0 and "dpo_beta: 0.2 # --dpo-beta" in out.stdout, out.stderr
    (tmp_path / "run.yaml").write_text(out.stdout)
    run = ascend("train", "--config", tmp_path / "run.yaml", "--device", "cpu", "--data-cache-path", tmp_path / "cache", "--json", env={**os.environ, "OMP_NUM_THREADS": "1"})
    assert run.returncode == 0 and json.loads(run.stdout)["steps"] == 3 and abs(json.loads(run.stdout)["first_loss"] - .6931) < 1e-3, run.stderr


def test_unknown_flags_are_listed_with_the_nearest():
    one = import_text("torchrun pretrain_gpt.py --num-layers 2 --hidden-size 64 --num-attention-heads 4 --num-layrs 2 --zzz 1 --train-iters 1 --data-path x\n")
    assert {t.flag: "--num-layers" in t.note for t in one.unknown} == {"num-layrs": True, "zzz": False}


def test_strict(tmp_path):
    (tmp_path / "a.sh").write_text("torchrun pretrain_gpt.py --num-layers 2 --hidden-size 64 --num-attention-heads 4 --zzz 1\n", encoding="utf-8")
    assert ascend("import-script", tmp_path / "a.sh").returncode == 0
    out = ascend("import-script", tmp_path / "a.sh", "--strict")
    assert out.returncode == 2 and "--zzz" in out.stderr and not out.stdout


OTHERS = {
    "generate": "torchrun inference.py --task do_sample --load m --num-layers 32 --tensor-model-parallel-size 8 --top-k 7 --fp16\n",
    "chat": "torchrun inference.py --task chat --load m --hidden-size 64 --max-new-tokens 9\n",
    "evaluate": "torchrun evaluation.py --task boolq --task-data-path d --load m --max-new-tokens 1\n",
    "preprocess": "python ./preprocess_data.py --input a.json --output-prefix o --tokenizer-name-or-path t --handler-name AlpacaStyleInstructionHandler --map-keys '{\"prompt\": \"question\"}' --workers 4\n",
    "convert": "python convert_ckpt.py --model-type GPT --load-model-type hf --save-model-type mg --target-tensor-parallel-size 2 --load-dir a --save-dir b --use-mcore-models --params-dtype bf16\n",
}


@pytest.mark.parametrize("command", OTHERS)
def test_other_scripts_become_other_commands(command):
    one = import_text(OTHERS[command])
    assert one.command == command and not one.unknown
    cls = getattr(config, CONFIGS[command])
    assert to_dict(from_dict(cls, yaml.safe_load(yaml_text(one)))) == to_dict(one.cfg)


@pytest.mark.parametrize("command", OTHERS)
def test_the_words_of_a_script_are_the_command(command, capfd):
    "Typed behind `ascend_nb COMMAND`, a script's words give the config that its YAML gives; what the command has itself stays as it is."
    one, cls = import_text(OTHERS[command]), getattr(config, CONFIGS[command])
    assert to_dict(parse_args(cls, command_words(command, one.launch.args), command)) == to_dict(one.cfg)
    ours = ["--typo", "3"]
    assert command_words(command, ours) is ours
    with pytest.raises(UserError, match="--num-layrs"): parse_args(cls, command_words(command, [*one.launch.args, "--num-layrs", "3"]), command)


@pytest.mark.slow
def test_the_imported_run_is_the_run_of_the_flags(tmp_path):
    "The sample script, by YAML and by flags on the command line, on one process and on two: the same losses."
    out = ascend("import-script", SAMPLE)
    (tmp_path / "run.yaml").write_text(out.stdout, encoding="utf-8")
    env = {**os.environ, "PYTHONPATH": str(ROOT)}
    one, = launches(read_script(SAMPLE.read_text(encoding="utf-8")))
    single = ["--tensor-model-parallel-size", "1", "--sequence-parallel", "false", "--device", "cpu", "--json", "--data-cache-path", str(tmp_path / "cache")]
    def loss(cmd, save):
        r = subprocess.run([*cmd, "--save", str(tmp_path / save)], capture_output=True, text=True, cwd=ROOT, env=env)
        assert r.returncode == 0, r.stderr
        return json.loads(r.stdout.splitlines()[-1])["loss"]
    here = [sys.executable, "-m", "ascend_nb.cli", "train"]
    by_yaml = loss([*here, "--config", str(tmp_path / "run.yaml"), *single], "a")
    by_flags = loss([*here, *one.args, "--dtype", "fp32", *single], "b")
    by_two = loss(["torchrun", "--standalone", "--nproc-per-node", "2", "-m", "ascend_nb.cli", "train", "--config", str(tmp_path / "run.yaml"), "--device", "cpu", "--json", "--data-cache-path", str(tmp_path / "cache")], "c")
    assert by_yaml == by_flags and by_two == pytest.approx(by_yaml, abs=1e-4)


def test_a_lora_script_becomes_knobs(capfd):
    "ModelLink's flags of adapters, in a script and on our own command line; what needs nothing here is told."
    text = ("torchrun --nproc_per_node 2 pretrain_gpt.py --tensor-model-parallel-size 2 --num-layers 2 --hidden-size 64 --num-attention-heads 4 --micro-batch-size 1 --train-iters 5 --normalization RMSNorm "
            "--swiglu --disable-bias-linear --position-embedding-type rope --data-path d --load ckpt/base --lora-r 8 --lora-alpha 24 --lora-dropout 0.05 --lora-fusion --lora-register-forward-hook word_embeddings "
            "input_layernorm --lora-target-modules query_key_value dense dense_h_to_4h dense_4h_to_h --qlora-nf4\n")
    made = import_text(text, "tune.sh")
    t = made.cfg.tune
    assert (t.lora_r, t.lora_alpha, t.lora_dropout, t.qlora_nf4) == (8, 24.0, 0.05, True) and t.lora_target_modules == "query_key_value dense dense_h_to_4h dense_4h_to_h".split()
    assert not made.unknown and not made.heavy and {f.kind for f in made.fates if "lora" in f.flag} == {"same", "unneeded"}
    words = train_words("--load base --lora-r 4 --lora-target-modules linear_qkv linear_proj --lora-fusion --lora-ckpt-filter".split())
    assert parse_args(config.RunConfig, words, "train").tune.lora_target_modules == ["linear_qkv", "linear_proj"] and "nothing to do for --lora-fusion --lora-ckpt-filter" in capfd.readouterr().err
    with pytest.raises(UserError, match="name the layers among the targets"): train_words("--lora-layers-to-train 3 --lora-target-modules linear_qkv".split())
