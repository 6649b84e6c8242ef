#!/usr/bin/env bash
# One command for everything: sets up .venv, then runs experiments or tests. `bash run.sh --help`.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")"

# Large pages for large arrays (Linux, glibc 2.35 or newer; ignored elsewhere): programs that
# allocate tens of MiB at every call spend a fifth of their time on page faults without.
export GLIBC_TUNABLES=${GLIBC_TUNABLES:-glibc.malloc.hugetlb=1}

experiments() { for script in xp_*/run.sh; do dirname "$script"; done; }

help() {
  cat <<EOF
bash run.sh                    set up, then run the quick preset of every experiment (no download)
bash run.sh NAME [PRESET]      one experiment; PRESET is quick (default) or paper
                               both end in one page of all that lies in the results: index.html
bash run.sh sweep ARGS...      a grid of commands, here or on Slurm; see bash run.sh sweep --help
bash run.sh test [ARGS...]     set up, then run the tests; ARGS go to pytest (-m slow: the slow ones)
                               --cov, as the last: coverage too
bash run.sh setup              set up only
bash run.sh --help             this text

experiments:
$(experiments | sed 's/^/  /')
presets:
  quick   one to three minutes on two CPU cores, with data that are embedded
  paper   the published setting, with real data from \$DATA_ROOT (default ./data)

environment:
  DATA_ROOT   a torchvision root with the data sets; what is missing is downloaded into it
  RESULTS     where runs, figures and numbers go (default ./results)
  PYTHON      the Python to make .venv with (default: the first of python3.13 ... python3 that is 3.11+)
EOF
}

find_python() {
  local candidate
  for candidate in ${PYTHON:-python3 python3.13 python3.12 python3.11 python}; do
    if command -v "$candidate" >/dev/null &&
      "$candidate" -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null; then
      echo "$candidate"
      return
    fi
  done
  echo "run.sh: no Python 3.11 or newer found; install one, or name it: PYTHON=... bash run.sh" >&2
  exit 1
}

# setup FILE: installs FILE into .venv unless that very installation is there already.
setup() {
  local requirements=$1 stamp=".venv/installed-$1" wanted
  if [[ $requirements == requirements.txt ]] && command -v nvidia-smi >/dev/null && nvidia-smi -L >/dev/null 2>&1; then
    requirements=requirements-cuda.txt
  fi
  # A .venv without pip was interrupted while it was made.
  if ! .venv/bin/python -m pip --version >/dev/null 2>&1; then
    local python
    python=$(find_python)
    echo "run.sh: making .venv with $("$python" --version)"
    "$python" -m venv --clear .venv
  fi
  wanted=$(cat requirements*.txt pyproject.toml; echo "$requirements"; pwd; experiments)
  if [[ "$(cat "$stamp" 2>/dev/null)" != "$wanted" ]]; then
    echo "run.sh: installing $requirements (the first time takes a few minutes)"
    .venv/bin/python -m pip install --quiet --disable-pip-version-check -r "$requirements"
    .venv/bin/python -m pip install --quiet --disable-pip-version-check --no-deps --editable .
    printf '%s\n' "$wanted" >"$stamp"
  fi
  export PATH="$PWD/.venv/bin:$PATH"
}

run_experiment() {
  if [[ ! -f $1/run.sh ]]; then
    echo "run.sh: no experiment $1; there are: $(experiments | tr '\n' ' ')" >&2
    exit 2
  fi
  # Also where an experiment fails or is interrupted: the page says how to go on.
  trap 'status=$?; python -m lib.report.page "${RESULTS:-results}"; exit $status' EXIT
  echo "=== $1, $2"
  bash "$1/run.sh" "$2"
}

case "${1:-all}" in
  -h | --help | help) help ;;
  setup) setup requirements.txt ;;
  test)
    shift
    setup requirements-dev.txt
    exec python -m pytest --numprocesses auto --dist loadfile "$@"
    ;;
  sweep)
    shift
    setup requirements.txt
    exec python -m lib.runs.sweeps --results "${RESULTS:-results}" "$@"
    ;;
  all)
    setup requirements.txt
    for name in $(experiments); do run_experiment "$name" quick; done
    echo "=== done: figures and numbers lie in ${RESULTS:-results}/, and all on one page"
    ;;
  *)
    preset=${2:-quick}
    if [[ $preset != quick && $preset != paper ]]; then
      echo "run.sh: the preset is quick or paper, not $preset" >&2
      exit 2
    fi
    setup requirements.txt
    run_experiment "${1%/}" "$preset"
    ;;
esac
