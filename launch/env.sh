# Makes or reuses .venv, with the versions of constraints.txt, and puts it first in PATH.
# Sourced by the scripts of this folder, with the repository's root as working directory:
#     source launch/env.sh
# PYTHON chooses the interpreter for a new .venv. A second run installs nothing and needs no
# network, until pyproject.toml or constraints.txt changes.

lvx_fail() {
  printf 'launch/env.sh: %s\n' "$@" >&2
  exit 1
}

# The first Python that is new enough and can make an environment.
lvx_find_python() {
  local candidate
  for candidate in ${PYTHON:-python3.11 python3 python3.12 python3.13}; do
    if "$candidate" -c 'import ensurepip, sys, venv; sys.exit(sys.version_info < (3, 11))' \
      >/dev/null 2>&1; then
      printf '%s\n' "$candidate"
      return
    fi
  done
  return 1
}

# What the environment depends on. The folder counts too: scripts in .venv/bin hold its path.
lvx_stamp() {
  { pwd; cat pyproject.toml constraints.txt; } | sha256sum | cut -d ' ' -f 1
}

# Waits for a process, and says every 20 seconds how far its log is.
lvx_watch() {
  local second=0
  while kill -0 "$1" 2>/dev/null; do
    sleep 1
    second=$((second + 1))
    if [ $((second % 20)) -eq 0 ]; then
      printf '  %4d s: %s\n' "$second" "$(tail -n 1 "$2" | cut -c 1-90)"
    fi
  done
  wait "$1"
}

lvx_install() {
  local python log=.venv/install.log
  if [ ! -x .venv/bin/python ] || [ "$(cat .venv/made-in 2>/dev/null || pwd)" != "$PWD" ]; then
    python=$(lvx_find_python) || lvx_fail \
      "no usable Python found (tried: ${PYTHON:-python3.11 python3 python3.12 python3.13})." \
      "Install Python 3.11 or newer with its venv module (Debian, Ubuntu: python3-venv)," \
      "or name one: PYTHON=/path/to/python3.11"
    "$python" -m venv --clear .venv
    pwd >.venv/made-in
  fi
  echo "Installing the versions of constraints.txt into .venv (some minutes, the first time) ..."
  .venv/bin/python -m pip install --disable-pip-version-check \
    -c constraints.txt -e ".[video,lora,quantization,data,plots,dev]" >"$log" 2>&1 &
  if ! lvx_watch "$!" "$log"; then
    tail -n 20 "$log" >&2
    lvx_fail "pip failed; the whole output is in $log. Does this machine reach a package index?"
  fi
  lvx_stamp >.venv/stamp
}

lvx_check_compiler() {
  if ! command -v "${CXX:-c++}" >/dev/null; then
    command -v g++ >/dev/null || lvx_fail \
      "no C++ compiler found (looked for ${CXX:-c++} and g++): DeepSpeed builds an operator with it." \
      "Install one (Debian, Ubuntu: g++), or name one: CXX=/path/to/compiler"
    export CXX=g++
  fi
}

lvx_check_compiler
if [ ! -x .venv/bin/python ] || [ "$(cat .venv/stamp 2>/dev/null)" != "$(lvx_stamp)" ]; then
  lvx_install
fi
export VIRTUAL_ENV="$PWD/.venv"
export PATH="$VIRTUAL_ENV/bin:$PATH" # DeepSpeed looks for ninja there
# Ranks share the cores: more threads a rank are slower, unless you have cores to spare.
export OMP_NUM_THREADS="${OMP_NUM_THREADS:-1}"
