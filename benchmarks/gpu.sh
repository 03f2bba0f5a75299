#!/usr/bin/env bash
# On a machine with an NVIDIA GPU, in the repository's root, in less than eight minutes:
#   bash benchmarks/gpu.sh
# It runs the tests that need a GPU, then ours and sentence-transformers in turns (benchmarks/gpu.py).
# PYTHON is the interpreter that has the requirements, OUT the folder for gpu.json and the log.
# On any machine, in a minute, with tiny sizes and no result: bash benchmarks/gpu.sh --tiny
set -u -o pipefail
cd "$(dirname "$0")/.."
PYTHON=${PYTHON:-python3}
OUT=${OUT:-benchmarks/results}
export PYTHONPATH="$PWD${PYTHONPATH:+:$PYTHONPATH}" PYTHONUNBUFFERED=1 HF_HUB_OFFLINE=1
mkdir -p "$OUT"

# 1. what is here
command -v nvidia-smi >/dev/null && nvidia-smi --query-gpu=name,driver_version --format=csv,noheader
"$PYTHON" -c "import torch, transformers, sentence_transformers as st
print('torch', torch.__version__, 'transformers', transformers.__version__, 'sentence-transformers', st.__version__)
print('GPU', torch.cuda.is_available())" || exit 1

# 2. the kernels give the padded numbers; a failure is shown, and measuring goes on
timeout 120 "$PYTHON" -m pytest -q -n 0 -p no:cacheprovider tests/test_packed.py -k "gpu or kernels" 2>&1 |
  tee "$OUT/gpu_tests.log"
tests=$?

# 3. the speed; it begins no family after 240 seconds, and is stopped after 330
timeout 330 "$PYTHON" benchmarks/gpu.py --seconds 240 --out "$OUT" "$@" 2>&1 | tee "$OUT/gpu.log" || exit 1
exit $tests
