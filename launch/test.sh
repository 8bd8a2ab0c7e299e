#!/usr/bin/env bash
# Lint, types and tests, in .venv, which is made first where there is none.
#     bash launch/test.sh                              everything, with coverage of at least 90%
#     bash launch/test.sh tests/test_config.py -k x    arguments go to pytest; coverage is not asked
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
source launch/env.sh

ruff check .
ruff format --check .
mypy ds_lvx
if [ "$#" -gt 0 ]; then
  exec python -m pytest "$@"
fi
# Two at a time: many tests wait for processes to start. A file stays on one worker.
exec python -m pytest -n 2 --dist loadfile --cov --cov-report=term --cov-report=xml --cov-fail-under=90
