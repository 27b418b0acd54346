#!/usr/bin/env bash
# On a machine with a GPU: builds, tests and measures. Needs torch, triton, pybind11, ninja, pytest,
# hypothesis and nvcc, no network.
#
#   bench/gpu.sh [STAGE ...]
#
# Stages run in the order given, by default all but the last. Minutes are estimates for 16 cores and
# an H200. After SECONDS_AT_MOST, 570 by default, what runs is ended and later stages are left out;
# figures measured until then are kept. Where the machine is there for a quarter of an hour in all:
# `SECONDS_AT_MOST=480 bench/gpu.sh build test cuda`, then `SECONDS_AT_MOST=240 bench/gpu.sh build
# sanitize bench`.
#
#   build     3    the extension, for this GPU alone
#   test      4    the tests of Triton's and the CUDA kernels but the slow
#   sanitize  3    compute-sanitizer's memcheck, synccheck and racecheck over a few tests of the CUDA kernels
#   cuda      3    bench.gpu cuda: what the CUDA kernels are for
#   bench     4    bench.gpu layers: every operator as it is dispatched
#   ncu       2    Nsight Compute's counters of the CUDA kernels
#
# Figures go to the folder RESULTS, bench/results by default. A failure does not keep later stages
# from running, but for one of the build, and makes the script fail at its end.
set -euo pipefail
cd "$(dirname "$0")/.."
python=${PYTHON:-python3}
results=${RESULTS:-bench/results}
# Unbuffered, so that a script cut short has printed what it did.
export PYTHONPATH=.:python PYTHONUNBUFFERED=1
seconds_at_most=${SECONDS_AT_MOST:-570}

SANITIZED='test_not_finite or test_misaligned or test_hot_rows or test_nan_reaches
    or test_deterministic_gradients_do_not_depend_on_the_order'
METRICS=(
    sm__inst_executed.avg.per_cycle_active
    smsp__issue_active.avg.pct_of_peak_sustained_active
    sm__warps_active.avg.pct_of_peak_sustained_active
    sm__inst_executed_pipe_alu.avg.pct_of_peak_sustained_active
    sm__inst_executed_pipe_fma.avg.pct_of_peak_sustained_active
    sm__inst_executed_pipe_lsu.avg.pct_of_peak_sustained_active
    sm__pipe_tensor_cycles_active.avg.pct_of_peak_sustained_active
    l1tex__data_pipe_lsu_wavefronts_mem_shared.avg.pct_of_peak_sustained_elapsed
    l1tex__data_bank_conflicts_pipe_lsu_mem_shared.sum
    l1tex__throughput.avg.pct_of_peak_sustained_active
    lts__throughput.avg.pct_of_peak_sustained_elapsed
    dram__throughput.avg.pct_of_peak_sustained_elapsed
)

usage() {
    sed -n '2,/^set /s/^# \{0,1\}//p' "$0"
    exit 2
}

# A command that is ended after so many seconds, or when the script's are over.
within() {
    local left=$((seconds_at_most - SECONDS)) most=$1
    shift
    [ "$left" -gt 0 ] || return 124
    timeout --kill-after 5 "$((left < most ? left : most))" "$@"
}

# Of the first GPU, as HFH_CUDA_ARCHS has it: "90a".
architecture() {
    local capability
    capability=$(nvidia-smi --query-gpu=compute_cap --format=csv,noheader | head -n 1 | tr -d '. ')
    # Hopper's own instructions are in none but its own machine code.
    [ "$capability" = 90 ] && capability=90a
    echo "$capability"
}

stage_build() {
    HFH_CUDA_ARCHS=${HFH_CUDA_ARCHS:-$(architecture)}
    export HFH_CUDA_ARCHS
    local start=$SECONDS
    HFH_BUILD=cuda within 600 "$python" setup.py build_ext --inplace
    echo "built for $HFH_CUDA_ARCHS in $((SECONDS - start)) s"
}

stage_test() {
    local parallel=()
    if "$python" -c 'import xdist' 2>/dev/null; then
        parallel=(-n "$(nproc)")
    fi
    # A core for each process: the references run on the CPU.
    export OMP_NUM_THREADS=1
    # File by file: a kernel that hangs takes no more with it.
    local failed=0 file status
    for file in tests/test_cuda_*.py; do
        echo "-- $file"
        status=0
        within 90 "$python" -m pytest -q -m "cuda and not slow" "${parallel[@]}" "$file" || status=$?
        # 5: none of the file's is for a GPU.
        [ "$status" = 0 ] || [ "$status" = 5 ] || failed=$status
    done
    echo "-- Triton"
    within 240 "$python" -m pytest -q -m "gpu and not slow" --continue-on-collection-errors \
        --durations 5 "${parallel[@]}" tests || failed=$?
    return "$failed"
}

# A tool, with its options, over the few tests, in the kernels of this project alone.
sanitize() {
    # Where each tensor has memory of its own, writing past its end is seen.
    PYTORCH_NO_CUDA_MEMORY_CACHING=1 within 100 compute-sanitizer --tool "$@" \
        --target-processes all --kernel-name kernel_substring=hfh --error-exitcode 3 \
        "$python" -m pytest -q -x -m "cuda and not slow" -k "${SANITIZED//$'\n'/ }" \
        tests/test_cuda_linear.py tests/test_cuda_slot_products.py tests/test_cuda_lookup.py \
        tests/test_cuda_weight_backward.py
}

stage_sanitize() {
    if ! command -v compute-sanitizer >/dev/null; then
        echo "sanitize: compute-sanitizer is not on the PATH: left out"
        return
    fi
    local failed=0
    # PyTorch asks the driver for functions that it may not have, which is no error.
    sanitize memcheck --report-api-errors no || failed=$?
    sanitize synccheck || failed=$?
    # Hazards in a window's gradient, all within its shared memory, may be none: plain loads there
    # race with compare-and-swap by design.
    sanitize racecheck || failed=$?
    return "$failed"
}

stage_cuda() { within 600 "$python" -m bench.gpu --results "$results" cuda; }
stage_bench() { within 600 "$python" -m bench.gpu --results "$results" layers; }

stage_ncu() {
    if ! command -v ncu >/dev/null; then
        echo "ncu: it is not on the PATH: left out"
        return
    fi
    # A name that ncu does not know for this chip would end it.
    local known metrics=() metric name
    known=$(ncu --query-metrics 2>/dev/null || true)
    for metric in "${METRICS[@]}"; do
        if [ -z "$known" ] || grep -q "^${metric%%.*} " <<<"$known"; then
            metrics+=("$metric")
        else
            echo "ncu: left out $metric, which it does not list"
        fi
    done
    name=$(nvidia-smi --query-gpu=name --format=csv,noheader | head -n 1 | tr 'A-Z ' 'a-z-')
    mkdir -p "$results"
    within 240 ncu --clock-control none --profile-from-start off --kernel-name-base mangled \
        --kernel-name regex:hfh --section SpeedOfLight --section LaunchStats --section Occupancy \
        --metrics "$(IFS=, && echo "${metrics[*]}")" "$python" -m bench.gpu_profile \
        >"$results/ncu-$name.txt"
    echo "wrote $results/ncu-$name.txt"
}

stages=("$@")
[ $# -gt 0 ] || stages=(build test sanitize cuda bench)
for stage in "${stages[@]}"; do
    case $stage in
    build | test | sanitize | cuda | bench | ncu) ;;
    *) usage ;;
    esac
done
status=0
for stage in "${stages[@]}"; do
    start=$SECONDS
    if [ "$start" -ge "$seconds_at_most" ]; then
        echo "== $stage: left out, $start of $seconds_at_most seconds are over"
        status=124
        continue
    fi
    echo "== $stage"
    # In a shell of its own, which its first failure ends: errexit is off in what || follows.
    set +e
    (
        set -e
        "stage_$stage"
    )
    failed=$?
    set -e
    echo "== $stage: exit status $failed after $((SECONDS - start)) s"
    if [ "$failed" != 0 ]; then
        status=$failed
        [ "$stage" != build ] || break
    fi
done
exit "$status"
