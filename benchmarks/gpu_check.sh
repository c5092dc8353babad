#!/usr/bin/env bash
# Everything that only a GPU can show, each part with its own time limit, results in one folder.
# Usage: benchmarks/gpu_check.sh [OUT]; PYTHON names an interpreter that has torch, triton, pytest.
set -uo pipefail
cd "$(dirname "$0")/.."
out=${1:-out}
python=${PYTHON:-python3}
mkdir -p "$out"
failed=0

part() { # part NAME SECONDS COMMAND...
  local name=$1 limit=$2 status
  shift 2
  timeout "$limit" "$@" >"$out/$name.log" 2>&1
  status=$?
  echo "$name: exit status $status"
  [ $status -eq 0 ] || { failed=1; tail -n 15 "$out/$name.log"; }
}

part build 300 "$python" -m pip install --no-build-isolation --no-deps -e .
part info 60 "$python" -m fst_fast info --json
part tests 600 "$python" -m pytest -q
if command -v compute-sanitizer >/dev/null; then
  for tool in memcheck racecheck synccheck initcheck; do
    part "sanitizer-$tool" 120 compute-sanitizer --tool "$tool" --error-exitcode 9 \
      "$python" -m pytest -q tests/test_head_step.py tests/test_head_step_deferred.py \
      tests/test_head_deviation_loss.py \
      -k "cuda-cuda and (test_found_inf or test_ten_steps or test_parts or (one_setting and plain))"
    part "sanitizer-$tool-inject" 120 compute-sanitizer --tool "$tool" --error-exitcode 9 \
      "$python" -m pytest -q tests/test_inject.py -k "cuda and (odd or grey or four-channels)"
  done
else
  echo "compute-sanitizer: not installed, left out"
fi
for suite in head inject loop evaluate; do
  part "bench-$suite" 420 "$python" -m fst_fast.bench "$suite" --device cuda --record "$out"
done
# DATA: a folder with CIFAR-10 as train.npz and test.npz.
if [ -n "${DATA:-}" ]; then
  part efficacy 900 "$python" benchmarks/efficacy.py --data "$DATA" --suspects "$out/suspects" \
    --width 64 --out "$out"
fi
exit $failed
