#!/usr/bin/env bash
# Lint, types and tests, in .venv, which is made first where there is none.
#     bash launch/test.sh                              everything, with coverage of at least 90%
#     bash launch/test.sh tests/config -k typo       arguments go to pytest; coverage is not asked
#     bash launch/test.sh -m "not slow"                what takes over five seconds is left out
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
source launch/env.sh

ruff check .
ruff format --check .
mypy ds_lvx
# Two at a time where no file is named: many tests wait for processes to start. A file stays on one
# worker, whose rank processes serve all of it; the longest ones come early, in the order of names.
pairs=(-n 2 --dist loadfile --no-loadscope-reorder)
for word in "$@"; do
  [ ! -e "${word%%::*}" ] || pairs=()
done
if [ "$#" -gt 0 ]; then
  exec python -m pytest "${pairs[@]}" "$@"
fi
exec python -m pytest "${pairs[@]}" --cov --cov-report=term --cov-report=xml --cov-fail-under=90
