#!/usr/bin/env bash
# On a machine with a GPU: builds the extension, runs the GPU tests but the slow, measures, writes
# bench/results/gpu-*.json. Needs torch, triton, pybind11, ninja, pytest and hypothesis, no network.
set -euo pipefail
cd "$(dirname "$0")/.."
python=${PYTHON:-python3}
# Unbuffered, so that a script cut short has printed what it did.
export PYTHONPATH=.:python PYTHONUNBUFFERED=1

HFH_BUILD=cpu "$python" setup.py build_ext --inplace
parallel=()
if "$python" -c 'import xdist' 2>/dev/null; then
    parallel=(-n "$(nproc)")
fi
# A failed test does not keep the figures from being taken, but the script fails.
status=0
"$python" -m pytest -q -m "gpu and not slow" --continue-on-collection-errors --durations 10 \
    "${parallel[@]}" tests || status=$?
"$python" -m bench.gpu || status=$?
exit "$status"
