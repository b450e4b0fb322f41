#!/usr/bin/env bash
# Check our NPU calls against torch_npu's own schemas on a machine without a card: an environment of its own, because
# torch_npu without CANN breaks a plain `import torch`. Needs gcc and nm. With --where-it-installs a machine that cannot have torch_npu (another
# architecture, no compiler, no index) says so and passes. Three levels: schemas and autograd on fake tensors (test_fake), torch_npu's own checks of
# arguments and numbers under its own autograd (test_calls, test_steps), and calls that are broken on purpose (in each).
set -euo pipefail
cd "$(dirname "$0")/.."
VENV=.venv-npu
LENIENT=; if [ "${1:-}" = --where-it-installs ]; then LENIENT=1; shift; fi
missing() { echo "npu schema checks left out: $1" >&2; [ -n "$LENIENT" ] && exit 0; exit 1; }
command -v gcc >/dev/null && command -v nm >/dev/null || missing "gcc and nm (binutils) are needed"
if [ ! -f $VENV/.ready ]; then
  test -x $VENV/bin/python || "${PYTHON:-python3}" -m venv $VENV
  $VENV/bin/python -m pip install -q -c constraints.txt torch==2.13.0 numpy PyYAML pytest fastcore safetensors
  $VENV/bin/python -m pip install -q --no-deps torch_npu==2.13.0 || missing "torch_npu 2.13.0 cannot be installed here"
  touch $VENV/.ready
fi
STUBS=$PWD/$VENV/cann_stand_ins
[ "$STUBS/libhccl.so" -nt tests/npu/pretend_card.c ] || $VENV/bin/python tests/npu/stand_ins.py "$STUBS"
export OMP_NUM_THREADS=${OMP_NUM_THREADS:-1}
export LD_LIBRARY_PATH="$STUBS${LD_LIBRARY_PATH:+:$LD_LIBRARY_PATH}" TASK_QUEUE_ENABLE=0 TORCH_DEVICE_BACKEND_AUTOLOAD=0 PYTHONPATH=$PWD
exec $VENV/bin/python -m pytest -q -p no:cacheprovider --rootdir tests/npu -c /dev/null tests/npu "$@"
