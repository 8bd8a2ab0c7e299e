#!/usr/bin/env bash
# Lint, types and tests, in .venv, which is made first where there is none.
#     bash launch/test.sh                            all but what is marked exhaustive
#     bash launch/test.sh --exhaustive               everything, before a release: four times as long
#     bash launch/test.sh --coverage                 and whether it runs 90% of the lines, for twice the time
#     bash launch/test.sh tests/config -k typo       arguments go to pytest
#     bash launch/test.sh -m "not slow"              what takes over five seconds is left out
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
mypy ds_lvx
# Two at a time where no file is named: many tests wait for processes to start. A file stays on one
# worker, whose rank processes serve all of it; the longest ones come early, in the order of names.
pairs=(-n 2 --dist loadfile --no-loadscope-reorder)
for word in "$@"; do
  [ ! -e "${word%%::*}" ] || pairs=()
done
exec python -m pytest "${pairs[@]}" "${coverage[@]}" "$@"
