"""ModelLink's guide: each of its commands and flags has a counterpart, and the recipe that follows it runs them all."""
import json
import re

import pytest
from conftest import DATA, ROOT

from ascend_nb.flag_table import CONFIGS, find_row, program_command

RECIPE = json.loads((ROOT / "nbs/85_from_modellink.ipynb").read_text(encoding="utf-8"))
GUIDE = DATA.parent / "reference" / "modellink_guide_zh.md"

# What the guide of 2024 tells a reader to type: programs of ModelLink's with their flags, and everything else by its first word
PROGRAMS = {
    "preprocess_data.py": "input tokenizer-name-or-path tokenizer-type handler-name output-prefix json-keys workers log-interval",
    "convert_ckpt.py": "model-type loader saver target-tensor-parallel-size target-pipeline-parallel-size num-layer-list num-layers-per-virtual-pipeline-stage load-dir save-dir tokenizer-model "
                       "params-dtype save-model-type lora-load lora-r lora-alpha lora-target-modules",
    "pretrain_gpt.py": "tokenizer-type data-path no-shared-storage",
    "inference.py": "load tokenizer-name-or-path",
    "evaluation.py": "load tokenizer-name-or-path task-data-path task lora-load",
}
OTHERS = {"source": "source /usr/local/Ascend", "mkdir": "mkdir", "cd": "cd,", "wget": "wget", "pip": "pip install modelscope", "modelscope": "modelscope download", "bash": None} # word -> what the recipe shows; bash: scripts are read
ELSEWHERE = {"model", "local_dir"} # flags of modelscope's


def printed():
    "All texts that the recipe's cells put out."
    outs = [o for c in RECIPE["cells"] for o in c.get("outputs", [])]
    return "\n".join("".join(o.get("text", "") or o.get("data", {}).get("text/plain", "")) for o in outs)


@pytest.mark.parametrize("program", PROGRAMS)
def test_every_flag_of_the_guide_is_known(program):
    command = program_command(program)
    for flag in PROGRAMS[program].split():
        row = find_row(flag, command)
        assert row and row.kind not in ("absent",), f"{program} --{flag}"


@pytest.mark.parametrize("program", PROGRAMS)
def test_the_recipe_ran_it(program):
    "The table of flags that the recipe's last cell printed, and the table of commands before it."
    text, command = printed(), program_command(program)
    shown = set(re.findall(rf"^[=→·] {command} +--(\S+)", text, re.M))
    assert set(PROGRAMS[program].split()) <= shown, f"the recipe does not run --{set(PROGRAMS[program].split()) - shown}"
    assert re.search(rf"{program}, \d+ flags +ascend_nb {command}, the same words.* 0 ", text)


def test_the_recipe_shows_what_is_no_program():
    for word, shown in OTHERS.items(): assert shown is None or shown in printed(), word
    assert set(CONFIGS) == {program_command(p) for p in PROGRAMS} | {"chat"}, "a command that the guide's programs do not reach"


def blocks(text):
    "The commands of the guide's blocks of shell, continued lines joined, comments left out."
    for block in re.findall(r"^ *```(?:bash|shell) *\n(.*?)^ *```", text, re.M | re.S):
        for line in re.sub(r"\\\s*\n", " ", block).splitlines():
            line = re.sub(r"(^|\s)#.*", "", line).strip()
            if line and line != "..." and not re.match(r"[\w_]+=|[\[{\]}]|--", line): yield line.split()


@pytest.mark.skipif(not GUIDE.is_file(), reason=f"no copy of the guide at {GUIDE}; the lists above are checked all the same")
def test_the_guide_itself_has_nothing_else():
    "The guide, where there is a copy: no word at the beginning of a command and no flag anywhere that the lists above lack, and none of the lists that the guide lacks."
    text = GUIDE.read_text(encoding="utf-8")
    seen, flags = set(), set(re.findall(r"(?<![\w-])--([a-z][\w-]+)", text))
    for words in blocks(text):
        program = next((w.split("/")[-1] for w in words if w.endswith(".py")), None)
        assert program in PROGRAMS if program else words[0] in OTHERS, " ".join(words)
        seen.add(program or words[0])
        if program: assert {w[2:] for w in words if w.startswith("--")} <= set(PROGRAMS[program].split()), program
    assert flags - ELSEWHERE <= {f for p in PROGRAMS.values() for f in p.split()}
    assert seen >= OTHERS.keys() | {"preprocess_data.py", "convert_ckpt.py"}
    assert {"no-shared-storage", "lora-load", "params-dtype"} <= flags
