#!/usr/bin/env bash
# Lint, types and tests, in .venv, which is made first where there is none.
#     bash launch/test.sh                            all but what is marked exhaustive
#     bash launch/test.sh -m "not slow"              what takes over a second and a half is left out, too
#     bash launch/test.sh tests/config -k typo       arguments go to pytest
#     bash launch/test.sh --coverage                 before a release: are 90% of the lines run? half as long again
#     bash launch/test.sh --exhaustive               before a release: everything
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
coverage=()
if [ "${1:-}" = --coverage ]; then
  coverage=(--cov --cov-report=term --cov-report=xml --cov-fail-under=90)
  shift
fi
source launch/env.sh
# Python's own cache: else each of some hundred processes compiles what it imports.
unset PYTHONDONTWRITEBYTECODE

ruff check .
ruff format --check .
# Beside the tests: without its cache it takes one core for a minute.
typed=$(mktemp)
mypy ds_lvx >"$typed" 2>&1 &
mypy=$!
trap 'kill "$mypy" 2>/dev/null || true; rm -f "$typed"' EXIT
# Two at a time where no file is named: many tests wait for processes to start. A file stays on one
# worker, whose rank processes serve all of it; tests/conftest.py puts the longest ones first.
pairs=(-n 2 --dist loadfile --no-loadscope-reorder)
for word in "$@"; do
  [ ! -e "${word%%::*}" ] || pairs=()
done
failed=0
python -m pytest "${pairs[@]}" "${coverage[@]}" "$@" || failed=$?
if ! wait "$mypy"; then
  cat "$typed" >&2
  failed=1
fi
exit "$failed"
