#!/usr/bin/env bash
# Check our NPU calls against torch_npu's own schemas on a machine without a card: an environment of its own, because
# torch_npu without CANN breaks a plain `import torch`. Needs gcc and nm.
set -euo pipefail
cd "$(dirname "$0")/.."
VENV=.venv-npu
if [ ! -f $VENV/.ready ]; then
  test -x $VENV/bin/python || "${PYTHON:-python3}" -m venv $VENV
  $VENV/bin/python -m pip install -q -c constraints.txt torch==2.13.0 numpy PyYAML pytest fastcore safetensors
  $VENV/bin/python -m pip install -q --no-deps torch_npu==2.13.0
  touch $VENV/.ready
fi
STUBS=$PWD/$VENV/cann_stand_ins
test -f "$STUBS/libhccl.so" || $VENV/bin/python tests/npu/stand_ins.py "$STUBS"
export LD_LIBRARY_PATH="$STUBS${LD_LIBRARY_PATH:+:$LD_LIBRARY_PATH}" TASK_QUEUE_ENABLE=0 TORCH_DEVICE_BACKEND_AUTOLOAD=0 PYTHONPATH=$PWD
exec $VENV/bin/python -m pytest -q -p no:cacheprovider --rootdir tests/npu -c /dev/null tests/npu "$@"
