#!/usr/bin/env bash
# Everything that only a GPU can show, results in one folder, within 25 minutes; needs no network.
# Usage: benchmarks/gpu_check.sh [OUT]
#   PYTHON  an interpreter that has torch, triton, pytest and setuptools
#   DATA    a folder with CIFAR-10 as train.npz and test.npz: end2end and the efficacy of the methods
#           are of a ResNet-18 on it, else of a small network on handwritten digits
#   BUDGET  seconds for everything; what does not fit is left for the next call
#   PARTS   names of parts, as the summary has them, apart by spaces: no others are run
# A part that has succeeded in OUT is not run again; REDO=1 runs all. Exit status: 0 where every part
# has succeeded or cannot be run here, else 1. OUT/summary.txt says which.
set -uo pipefail
cd "$(dirname "$0")/.." || exit 1
out=${1:-out}
python=${PYTHON:-python3}
budget=${BUDGET:-1440}
[ "${REDO:-0}" = 1 ] && rm -rf "$out/parts"
mkdir -p "$out/parts" || exit 1
known=()
names=()
failed=0
# What the rung "purify (deterministic)" needs; as large as PyTorch's own workspace.
export CUBLAS_WORKSPACE_CONFIG=:4096:8

wanted() { # wanted NAME
  known+=("$1")
  case " ${PARTS:-$1} " in *" $1 "*) ;; *) return 1 ;; esac
}

part() { # part NAME SECONDS COMMAND...
  local name=$1 limit=$2 status before=$SECONDS
  shift 2
  wanted "$name" || return
  names+=("$name")
  if grep -qs '^0 ' "$out/parts/$name"; then
    echo "$name: done before"
    return
  fi
  if [ $((budget - SECONDS)) -le 0 ]; then
    echo "- 0 no time left; run again to go on" >"$out/parts/$name"
    failed=1
    return
  fi
  [ "$limit" -le $((budget - SECONDS)) ] || limit=$((budget - SECONDS))
  timeout -k 10 "$limit" "$@" >"$out/$name.log" 2>&1
  status=$?
  echo "$status $((SECONDS - before)) of $limit s" >"$out/parts/$name"
  echo "$name: exit status $status after $((SECONDS - before)) s"
  [ $status -eq 0 ] || { failed=1; tail -n 15 "$out/$name.log"; }
}

left_out() { # left_out NAME REASON
  wanted "$1" || return
  names+=("$1")
  echo "left out: $2" >"$out/parts/$1"
  echo "$1: left out, $2"
}

part build 300 "$python" -m pip install --disable-pip-version-check --no-build-isolation --no-deps -e .
part info 60 "$python" -m fst_fast info --json
workers=()
"$python" -c "import xdist" 2>/dev/null && workers=(-n "$(($(nproc) < 8 ? $(nproc) : 8))")
part tests 480 "$python" -m pytest -q "${workers[@]}"
for tool in memcheck racecheck synccheck initcheck; do
  if ! command -v compute-sanitizer >/dev/null; then
    left_out "sanitizer-$tool" "compute-sanitizer is not installed"
    continue
  fi
  part "sanitizer-$tool" 90 compute-sanitizer --tool "$tool" --error-exitcode 9 \
    "$python" -m pytest -q tests/test_head_step.py tests/test_head_step_deferred.py \
    tests/test_head_deviation_loss.py \
    -k "cuda-cuda and (test_found_inf or test_ten_steps or test_parts or (one_setting and plain))"
  part "sanitizer-$tool-inject" 60 compute-sanitizer --tool "$tool" --error-exitcode 9 \
    "$python" -m pytest -q tests/test_inject.py -k "cuda and (odd or grey or four-channels)"
done
for suite in head inject loop evaluate end2end; do
  arguments=("$suite" --device cuda --record "$out")
  limit=240
  # It compiles its rivals.
  [ $suite = head ] && limit=420
  if [ $suite = end2end ] && [ -n "${DATA:-}" ]; then
    arguments+=(--checkpoint cifar10-resnet18 --data "$DATA" --checkpoints "$out/checkpoints")
  elif [ $suite = end2end ] && ! "$python" -c "import sklearn" 2>/dev/null; then
    left_out bench-end2end "needs scikit-learn, or DATA"
    continue
  fi
  part "bench-$suite" $limit "$python" -m fst_fast.bench "${arguments[@]}"
done
table=(-m fst_fast lab table --device cuda --name gpu --models "$out/suspects" --out "$out")
if [ -n "${DATA:-}" ]; then
  part efficacy 900 "$python" "${table[@]}" --preset full --data "$DATA" --arch resnet18 --seeds 1
elif "$python" -c "import sklearn" 2>/dev/null; then
  part efficacy 600 "$python" "${table[@]}" --preset small
else
  left_out efficacy "needs scikit-learn, or DATA"
fi

for name in ${PARTS:-}; do
  case " ${known[*]} " in *" $name "*) continue ;; esac
  echo "PARTS must name parts among ${known[*]}, got $name" >&2
  failed=1
done
for name in "${names[@]}"; do
  echo "$name: $(sed -E 's/^([0-9]+) /exit status \1, /; s/^- 0 /not run, /' "$out/parts/$name")"
done >"$out/summary.txt"
echo "summary: $out/summary.txt, $SECONDS s"
exit $failed
