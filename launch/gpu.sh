#!/usr/bin/env bash
# Everything that needs a GPU, in one call. On one, in less than 8 minutes: the tests marked gpu, the
# kernels beside PyTorch's and flash-attn's, the memory benchmark, one rank's training step. On
# several, in less than 10: the tests marked gpus, a family of each kind that trains over NCCL as one
# process does, whether attention is exact over NCCL, then lvx beside Ulysses, ring attention and the
# visual tokens gathered on every rank, on MOSS-VL's shape and on mllama's, and the training step.
# Each has a time limit of its own; what fails or runs into its limit is noted, what it had written
# by then is kept, and the rest still runs. All that is printed is in gpu.log, too.
#     bash launch/gpu.sh FOLDER                    results go there (default: $OUT, or runs/gpu)
#     bash launch/gpu.sh --gpus 2 FOLDER           over NCCL, on two
#     bash launch/gpu.sh --wheels WHEELS FOLDER    first takes packages from the folder WHEELS
#     bash launch/gpu.sh --dry-run                 prints the commands
# PYTHON names the interpreter (default: .venv/bin/python, or python3). Nothing is downloaded. A
# machine without a package index gets what its Python lacks from wheels that another one made:
#     pip wheel --no-deps -w wheels deepspeed
#     pip download --no-deps --only-binary=:all: --python-version 3.12 -d wheels \
#       hjson pydantic pydantic_core annotated_types typing_inspection
# Besides these it needs PyTorch, Triton, transformers, pytest, and what DeepSpeed asks for (einops,
# filelock, msgpack, ninja, numpy, psutil, py-cpuinfo, rich, tqdm). flash-attn, flash-attn-3 and
# flash-attn-4 are measured where they are there. Wheels go into a temporary folder; the machine's
# own packages stay as they are.
set -euo pipefail

say() { printf 'launch/gpu.sh: %s\n' "$*" >&2; }

usage() {
  say "$1"
  say "expected: bash launch/gpu.sh [--gpus N] [--wheels FOLDER] [--dry-run] [OUTPUT_FOLDER]"
  exit 2
}

wheels="" dry_run=false output="" gpus=1
while [ "$#" -gt 0 ]; do
  case "$1" in
    --wheels)
      [ "$#" -ge 2 ] || usage "--wheels: got no folder"
      compgen -G "$2/*.whl" >/dev/null || usage "--wheels: got $2, which holds no *.whl"
      wheels=$(cd "$2" && pwd)
      shift
      ;;
    --gpus)
      [[ "${2:-}" =~ ^[1-9][0-9]*$ ]] || usage "--gpus: got '${2:-}', expected 1 or more"
      gpus=$2
      shift
      ;;
    --dry-run) dry_run=true ;;
    -*) usage "got the unknown option $1" ;;
    *)
      [ -z "$output" ] || usage "got two output folders, $output and $1"
      output=$1
      ;;
  esac
  shift
done
output=${output:-${OUT:-runs/gpu}}
if ! $dry_run; then
  mkdir -p "$output"
  output=$(cd "$output" && pwd)
fi
cd "$(dirname "${BASH_SOURCE[0]}")/.."

if [ -z "${PYTHON:-}" ]; then
  PYTHON=python3
  if [ -x .venv/bin/python ]; then PYTHON=$PWD/.venv/bin/python; fi
fi
# Our own kernels first: if the time is up, others are left out.
mapfile -t gpu_tests < <(
  grep -rl --include='test_*.py' 'mark\.gpu' tests | sort | sort -s -t/ -k2,2 \
    | awk '{ print ($0 ~ /kernels\/test_gpu/) ? 0 : ($0 ~ /^tests\/kernels/) ? 1 : 2, $0 }' \
    | sort -s -n -k1,1 | cut -d' ' -f2
)
site="" side_by_side=()

# Seconds for each. With what `timeout` waits after its signal, and 20 s for the checks before, less
# than 8 minutes on one GPU and than 10 on several.
install() {
  if [ -n "$wheels" ]; then
    step wheels 20 "$PYTHON" -m pip install --quiet --no-index --no-deps --target "$site" \
      "$wheels"/*.whl
  fi
}
tests() {
  local limit_s=$1 mark=$2
  shift 2
  step tests "$limit_s" "$PYTHON" -m pytest -v -m "$mark" --durations=10 -o junit_family=xunit2 \
    --junitxml="$output/tests.xml" "${side_by_side[@]}" "$@"
}
on_one() {
  tests 100 gpu "${gpu_tests[@]}"
  step kernels 155 "$PYTHON" launch/bench_kernels.py --budget_s 135 --seconds 0.1 \
    --output "$output/kernels.json"
  step memory 100 "$PYTHON" launch/bench_memory.py --parts memory --ranks 1 --steps 1 \
    --features frozen --only "lvx, recompute, checkpointing, chunks" --budget_gib 2 \
    --output_dir "$output"
  step step_time 55 "$PYTHON" launch/bench_memory.py --parts step_time --ranks 1 --rounds 1 \
    --steps 3 --brief --output_dir "$output"
}
compare() {
  local name=$1
  shift
  step "$name" 55 "$PYTHON" -m ds_lvx.cli compare --ranks "$gpus" --device accelerator \
    --heads 32 --kv-heads 8 --head-dim 128 --methods lvx ulysses ring gathered --output "$output" \
    "$@"
}
on_several() {
  tests 100 gpus tests/attention
  step models 100 env DS_ACCELERATOR=cuda "$PYTHON" -m pytest -v -m 'not gpu and not gpus' \
    "${side_by_side[@]}" --dist loadfile tests/models/test_{moss_vl,qwen2_5_vl}.py
  step doctor 60 "$PYTHON" -m ds_lvx.cli doctor --timeout 60
  compare moss_vl --seqlen-q 2304 --seqlen-kv 184576
  compare mllama --seqlen-q 384 --seqlen-kv 512K
  compare features --seqlen-q 2304 --seqlen-kv 184576 --features-dim 4096 --recompute
  step step_time 70 "$PYTHON" launch/bench_memory.py --parts step_time --ranks "$gpus" --rounds 1 \
    --steps 3 --brief --output_dir "$output"
}
steps() {
  # Most of the tests' time compilers take, which run side by side where pytest-xdist is.
  if "$PYTHON" -c 'import xdist' 2>/dev/null; then side_by_side=(-n $((gpus == 1 ? 8 : 3))); fi
  if [ "$gpus" -eq 1 ]; then on_one; else on_several; fi
}

failures=0 notes=""
step() {
  local name=$1 limit_s=$2 code=0 begun=$SECONDS
  shift 2
  if $dry_run; then
    printf 'timeout -s INT -k 5 %s' "$limit_s"
    printf ' %q' "$@"
    printf '\n'
    return
  fi
  say "$name, at most $limit_s s ..."
  # Interrupted rather than killed: pytest then writes its report, and runs end their processes.
  timeout -s INT -k 5 "$limit_s" "$@" 2>&1 | tee -a "$output/gpu.log" || code=$?
  notes+="$name"$'\t'"$code"$'\t'"$((SECONDS - begun))"$'\t'"$limit_s"$'\t'"$*"$'\n'
  if [ "$code" -ne 0 ]; then
    failures=$((failures + 1))
    say "$name FAILED: $(meaning "$code" "$limit_s")"
  fi
}

meaning() {
  case "$1" in
    124 | 137) echo "stopped at its limit of $2 s; what it had measured by then is kept" ;;
    *) echo "exit code $1" ;;
  esac
}

require_gpu() {
  GPUS=$gpus "$PYTHON" - <<'PY' || exit 1
import os
import sys

try:
    import torch
except ImportError as error:
    sys.exit(f"launch/gpu.sh: {sys.executable}: {error}; name a Python with PyTorch: PYTHON=...")
if not torch.cuda.is_available():
    built = f"built for CUDA {torch.version.cuda}" if torch.version.cuda else "built without CUDA"
    sys.exit(
        "launch/gpu.sh: no GPU: torch.cuda.is_available() is False for PyTorch "
        f"{torch.__version__}, {built}. This script only does what needs one; everything else: "
        "bash launch/test.sh"
    )
if int(os.environ["GPUS"]) > torch.cuda.device_count():
    sys.exit(
        f"launch/gpu.sh: --gpus: got {os.environ['GPUS']}; this machine has "
        f"{torch.cuda.device_count()}"
    )
PY
}

require_packages() {
  "$PYTHON" -c 'import pytest; from ds_lvx import initialize' || {
    say "ds_lvx or pytest cannot be imported (above); install what is missing, or use --wheels"
    exit 1
  }
}

summarise() {
  NOTES=$notes "$PYTHON" - "$output/gpu.json" <<'PY'
import json
import os
import sys

rows = [line.split("\t") for line in os.environ["NOTES"].splitlines()]
steps = [
    {"step": name, "exit_code": int(code), "seconds": int(s), "limit_s": int(limit), "command": run}
    for name, code, s, limit, run in rows
]
with open(sys.argv[1], "w") as file:
    file.write(json.dumps({"kind": "measured", "steps": steps}, indent=1) + "\n")
for row in steps:
    print(f"{row['step']:10} exit code {row['exit_code']:3}, {row['seconds']} s")
PY
}

if $dry_run; then
  site=SITE
  install
  steps
  exit 0
fi
require_gpu
site=$(mktemp -d)
trap 'rm -rf "$site"' EXIT
# The checkout first: it is what is tried, even where a wheel holds ds_lvx too.
export PYTHONPATH="$PWD:$site${PYTHONPATH:+:$PYTHONPATH}" PATH="$site/bin:$PATH"
# Bytecode of packages in a folder that cannot be written: a process of ours takes 6 s to import all
# instead of 18.
export PYTHONUNBUFFERED=1 PYTHONPYCACHEPREFIX="$site/bytecode"
unset PYTHONDONTWRITEBYTECODE
install
require_packages
steps
summarise
say "results are in $output"
if [ "$failures" -gt 0 ]; then
  say "$failures failed"
  exit 1
fi
