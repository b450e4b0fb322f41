"""Scores against lm-evaluation-harness itself: its own task files over the same rows, its own HFLM over the same weights."""
import json
import logging
import os
from pathlib import Path

import pytest
import torch

from ascend_nb.core import UserError
from ascend_nb.evaluator import evaluate, loglikelihoods, run
from ascend_nb.config import EvalConfig
from ascend_nb.hf_format import load_model
from ascend_nb.tasks import TASKS, load_task, task_files
from ascend_nb.tokenizers import load_tokenizer

pytest.importorskip("lm_eval")
SMOL = Path(os.environ.get("ASCEND_NB_SMOLLM2", "/tmp/smollm2"))
YAML = {"mmlu": "mmlu/default/mmlu_{}.yaml", "mmlu_continuation": "mmlu/continuation/mmlu_{}.yaml", "boolq": "super_glue/boolq/default.yaml"}
