#!/usr/bin/env bash
# Everything that needs a GPU, in one call of less than 8 minutes: the tests marked gpu, the kernel
# benchmark, the memory benchmark, one rank's training step. Each has a time limit of its own; what
# fails or runs into its limit is noted, and the rest still runs.
#     bash launch/gpu.sh FOLDER                    results go there (default: $OUT, or runs/gpu)
#     bash launch/gpu.sh --wheels WHEELS FOLDER    first takes packages from the folder WHEELS
#     bash launch/gpu.sh --dry-run                 prints the commands
# PYTHON names the interpreter (default: .venv/bin/python, or python3). Nothing is downloaded. A
# machine without a package index gets what its Python lacks from wheels that another one made, with
# the same version of Python:
#     pip wheel --no-deps -w wheels . deepspeed hjson pydantic pydantic_core annotated_types
# They go into a temporary folder; the machine's own packages stay as they are.
set -euo pipefail

say() { printf 'launch/gpu.sh: %s\n' "$*" >&2; }

usage() {
  say "$1"
  say "expected: bash launch/gpu.sh [--wheels FOLDER] [--dry-run] [OUTPUT_FOLDER]"
  exit 2
}

wheels="" dry_run=false output=""
while [ "$#" -gt 0 ]; do
  case "$1" in
    --wheels)
      [ "$#" -ge 2 ] || usage "--wheels: got no folder"
      compgen -G "$2/*.whl" >/dev/null || usage "--wheels: got $2, which holds no *.whl"
      wheels=$(cd "$2" && pwd)
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
mapfile -t gpu_tests < <(grep -rl --include='test_*.py' 'mark\.gpu' tests | sort)
site=""

# Seconds for each. With what `timeout` waits after its signal, and 20 s for the checks before, less
# than 8 minutes.
install() {
  if [ -n "$wheels" ]; then
    step wheels 20 "$PYTHON" -m pip install --quiet --no-index --no-deps --target "$site" \
      "$wheels"/*.whl
  fi
}
steps() {
  step tests 100 "$PYTHON" -m pytest -q -m gpu -o junit_family=xunit2 \
    --junitxml="$output/tests.xml" "${gpu_tests[@]}"
  step kernels 165 "$PYTHON" launch/bench_kernels.py --budget_s 145 --seconds 0.2 \
    --output "$output/kernels.json"
  step memory 65 "$PYTHON" launch/bench_memory.py --parts memory --ranks 1 --steps 1 \
    --features frozen --only "lvx, recompute, checkpointing, chunks" --budget_gib 4 \
    --output_dir "$output"
  step step_time 80 "$PYTHON" launch/bench_memory.py --parts step_time --ranks 1 --rounds 1 \
    --steps 3 --brief --output_dir "$output"
}

failures=0 notes=""
step() {
  local name=$1 limit_s=$2 code=0 begun=$SECONDS
  shift 2
  if $dry_run; then
    printf 'timeout -k 5 %s' "$limit_s"
    printf ' %q' "$@"
    printf '\n'
    return
  fi
  say "$name, at most $limit_s s ..."
  timeout -k 5 "$limit_s" "$@" || code=$?
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
  "$PYTHON" - <<'PY' || exit 1
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
export PYTHONUNBUFFERED=1
install
require_packages
steps
summarise
say "results are in $output"
if [ "$failures" -gt 0 ]; then
  say "$failures failed"
  exit 1
fi
