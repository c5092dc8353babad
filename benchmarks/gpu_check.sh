#!/usr/bin/env bash
# What only a GPU can show, in calls of five minutes, without a network; results in one folder.
# Usage: benchmarks/gpu_check.sh [OUT]
#   CALL    A (330 s): build, where the time goes, tests of the CUDA ops and graphs, short benchmarks
#           B (300 s): Triton's tests, compute-sanitizer, compiled rivals, the whole job
#           C (1440 s): every test, the other sanitizers, full benchmarks, the methods' efficacy
#           Without it A and B.
#   PARTS   names of parts, as the summary has them, apart by spaces: no others are run
#   BUDGET  seconds for everything; what does not fit is left for the next call
#   DEVICE  cpu to try the script out; default: cuda
#   PYTHON  an interpreter that has torch, triton, pytest and setuptools
#   DATA    of call C, a folder with CIFAR-10 as train.npz and test.npz: end2end and the efficacy of the
#           methods are of a ResNet-18 on it, else of a small network on handwritten digits
#   ARCHIVE the file that holds all results, anew after each part; default: OUT/all.tgz
# A part that has succeeded in OUT is not run again, but for build, which is quick then; REDO=1 runs
# all. Exit status: 0 where every part has succeeded or cannot be run here, else 1. OUT/summary.txt
# says which. The records are in OUT/cuda: what is moved to benchmarks/results, make tables reads.
set -uo pipefail
cd "$(dirname "$0")/.." || exit 1
out=${1:-out}
python=${PYTHON:-python3}
device=${DEVICE:-cuda}
call=${CALL:-A B}
case "$call" in A) budget=330 ;; B) budget=300 ;; C) budget=1440 ;; *) budget=630 ;; esac
budget=${BUDGET:-$budget}
[ "${REDO:-0}" = 1 ] && rm -rf "$out/parts"
mkdir -p "$out/parts" || exit 1
out=$(cd "$out" && pwd)
archive=${ARCHIVE:-$out/all.tgz}
known=()
names=()
failed=0
export PYTHONPATH="$PWD${PYTHONPATH:+:$PYTHONPATH}" PYTHONUNBUFFERED=1
# What the rung "purify (deterministic)" needs; as large as PyTorch's own workspace.
export CUBLAS_WORKSPACE_CONFIG=:4096:8

wanted() { # wanted NAME
  known+=("$1")
  case " ${PARTS:-$1} " in *" $1 "*) ;; *) return 1 ;; esac
}

keep() { # Everything so far, so that a call that is cut off has it.
  for name in "${names[@]}"; do
    echo "$name: $(sed -E 's/^([0-9]+) /exit status \1, /; s/^- 0 /not run, /' "$out/parts/$name")"
  done >"$out/summary.txt"
  tar -czf "$out/all.partial" -C "$out" --exclude=all.tgz --exclude=all.partial \
    --exclude=checkpoints --exclude=suspects . && mv "$out/all.partial" "$archive"
}

part() { # part NAME SECONDS COMMAND...
  local name=$1 limit=$2 status before=$SECONDS
  shift 2
  wanted "$name" || return
  names+=("$name")
  if [ "$name" != build ] && grep -qs '^0 ' "$out/parts/$name"; then
    echo "$name: done before"
    return
  fi
  if [ $((budget - SECONDS)) -le 0 ]; then
    echo "- 0 no time left; run again to go on" >"$out/parts/$name"
    failed=1
    return
  fi
  [ "$limit" -le $((budget - SECONDS)) ] || limit=$((budget - SECONDS))
  timeout -k 5 "$limit" "$@" >"$out/$name.log" 2>&1
  status=$?
  echo "$status $((SECONDS - before)) of $limit s" >"$out/parts/$name"
  echo "$name: exit status $status after $((SECONDS - before)) s, at $SECONDS s"
  [ $status -eq 0 ] || { failed=1; tail -n 15 "$out/$name.log"; }
  keep
}

left_out() { # left_out NAME REASON
  wanted "$1" || return
  names+=("$1")
  echo "left out: $2" >"$out/parts/$1"
  echo "$1: left out, $2"
}

tests() { # tests NAME SECONDS ARGUMENTS-OF-PYTEST...
  local name=$1 limit=$2
  shift 2
  part "$name" "$limit" "$python" -m pytest -q -p no:cacheprovider --durations 10 \
    "${workers[@]}" "$@"
}

sanitizer() { # sanitizer TOOL SECONDS NAME PATHS-AND-SELECTION...
  local tool=$1 limit=$2 name=$3
  shift 3
  if ! command -v compute-sanitizer >/dev/null; then
    left_out "$name" "compute-sanitizer is not installed"
    return
  fi
  part "$name" "$limit" compute-sanitizer --tool "$tool" --error-exitcode 9 \
    "$python" -m pytest -q -p no:cacheprovider -o timeout=0 "$@"
}

bench() { # bench NAME SECONDS SUITE ARGUMENTS...
  local name=$1 limit=$2
  shift 2
  part "$name" "$limit" "$python" -m fst_fast.bench "$@" --device "$device" --record "$out"
}

has() { "$python" -c "import $1" 2>/dev/null; }

head_ops=(tests/ops/test_head_step.py tests/ops/test_head_step_deferred.py
  tests/ops/test_head_deviation_loss.py)
few="(test_found_inf or test_ten_steps or test_parts or (one_setting and plain))"
inject_few="$device and (odd or grey or four-channels)"

call_a() {
  part info 20 "$python" -m fst_fast info --json
  part probe 50 "$python" benchmarks/gpu_probe.py "$out"
  tests tests-cuda 75 tests/ops tests/tuning/test_graphs_gpu.py \
    -k "($device-$device or (test_inject.py and $device) or graphs_gpu) and not contract"
  bench bench-head 80 head --dtype bf16 --seconds 1 --variants cuda,eager_graph,cuda_graph
  bench bench-loop 60 loop --seconds 1 --variants "purify (auto)"
  bench bench-inject 45 inject --dtype bf16 --seconds 0.3 --without pil \
    --families plain,badnets,ycrcb,gather,warp,warp-noise --variants cuda,torch_graph,cuda_graph
  bench bench-evaluate 30 evaluate --seconds 1 --variants "evaluate (auto)"
}

call_b() {
  tests tests-triton 60 tests/ops \
    -k "(triton-$device or (test_inject.py and triton) or zoo_backends) and not contract"
  sanitizer memcheck 50 memcheck "${head_ops[@]}" -k "$device-$device and $few"
  sanitizer racecheck 50 racecheck "${head_ops[@]}" -k "$device-$device and $few"
  sanitizer memcheck 25 memcheck-inject tests/ops/test_inject.py -k "$inject_few"
  sanitizer racecheck 25 racecheck-inject tests/ops/test_inject.py -k "$inject_few"
  bench bench-head-fp32 90 head --dtype fp32,bf16 --seconds 0.5 \
    --shapes 128,512,10 128,512,200 1024,512,1000 4096,768,21841 \
    --variants cuda,eager_graph,cuda_graph,compiled,linear_cross_entropy
  bench bench-end2end 60 end2end --checkpoint digits-resnet18 --seeds 2 \
    --checkpoints "$out/checkpoints"
}

call_c() {
  tests tests 480
  for tool in memcheck racecheck synccheck initcheck; do
    sanitizer $tool 90 "sanitizer-$tool" "${head_ops[@]}" -k "$device-$device and $few"
    sanitizer $tool 60 "sanitizer-$tool-inject" tests/ops/test_inject.py -k "$inject_few"
  done
  for suite in head inject loop evaluate end2end; do
    local arguments=("$suite") limit=240
    # It compiles its rivals.
    [ $suite = head ] && limit=420
    if [ $suite = end2end ] && [ -n "${DATA:-}" ]; then
      arguments+=(--checkpoint cifar10-resnet18 --data "$DATA" --checkpoints "$out/checkpoints")
    elif [ $suite = end2end ] && ! has sklearn; then
      left_out full-end2end "needs scikit-learn, or DATA"
      continue
    fi
    bench "full-$suite" $limit "${arguments[@]}"
  done
  local table=(-m fst_fast lab table --device "$device" --name gpu --models "$out/suspects" --out "$out")
  if [ -n "${DATA:-}" ]; then
    table+=(--preset full --data "$DATA" --arch resnet18 --seeds 1)
    part efficacy 900 "$python" "${table[@]}"
  elif has sklearn; then
    part efficacy 600 "$python" "${table[@]}" --preset small
  else
    left_out efficacy "needs scikit-learn, or DATA"
  fi
}

workers=()
has xdist && workers=(-n "$(($(nproc) < 8 ? $(nproc) : 8))")
part build 110 "$python" benchmarks/gpu_bundle.py use
for one in $call; do
  case $one in
    A) call_a ;;
    B) call_b ;;
    C) call_c ;;
    *) echo "CALL must be A, B or C, got $one" >&2 && failed=1 ;;
  esac
done

for name in ${PARTS:-}; do
  case " ${known[*]} " in *" $name "*) continue ;; esac
  echo "PARTS must name parts among ${known[*]}, got $name" >&2
  failed=1
done
keep
cat "$out/summary.txt"
echo "summary: $out/summary.txt, $SECONDS s; everything: $archive"
exit $failed
