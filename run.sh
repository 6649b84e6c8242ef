#!/usr/bin/env bash
# One command for everything: sets up .venv, then runs experiments or tests. `bash run.sh --help`.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")"

# Large pages for large arrays (Linux, glibc 2.35 or newer; ignored elsewhere): programs that
# allocate tens of MiB at every call spend a fifth of their time on page faults without.
export GLIBC_TUNABLES=${GLIBC_TUNABLES:-glibc.malloc.hugetlb=1}

RESULTS=${RESULTS:-results}
# PyTorch's own wheels without CUDA, which PyPI does not have for Linux on x86-64.
TORCH_INDEX=${TORCH_INDEX:-https://download.pytorch.org/whl/cpu}
# The quick presets in their order, the first picture first, with seconds on two quiet cores.
QUICK="xp_transfer_learning:97 xp_drmmd:60 xp_dataset_distillation:40 xp_gmm_source:95 xp_data_mixing:30"

experiments() { for script in xp_*/run.sh; do dirname "$script"; done; }

help() {
  cat <<EOF
bash run.sh                    set up, then run the quick preset of every experiment (no download)
bash run.sh NAME [PRESET]      one experiment; PRESET is quick (default) or paper
                               both end in one page of all that lies in the results: index.html
bash run.sh sweep ARGS...      a grid of commands, here or on Slurm; see bash run.sh sweep --help
bash run.sh test [ARGS...]     set up, then run the tests; ARGS go to pytest (-m slow: the slow ones)
                               --cov, as the last: coverage too
bash run.sh docs               set up, then build the documentation site: docs/_build/html
bash run.sh setup              set up only
bash run.sh --help             this text

experiments:
$(experiments | sed 's/^/  /')
presets:
  quick   one to three minutes on two CPU cores, with data that are embedded
  paper   the published setting, with real data from \$DATA_ROOT (default ./data)

environment:
  DATA_ROOT    a torchvision root with the data sets; what is missing is downloaded into it
  RESULTS      where runs, figures and numbers go (default ./results)
  PYTHON       the Python to make .venv with (default: the first of python3, python3.13 ... python
               that is 3.11 or newer)
  ACCELERATOR  cpu, cuda12 or cuda13: what .venv is made for (default: what it was made for before;
               else what this machine has)
  LATEST       1: the newest packages that the requirements allow, not those of constraints/
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

# cpu, or the CUDA family that this machine's driver takes: 13 from 580 on.
accelerator() {
  local driver
  if ! command -v nvidia-smi >/dev/null || ! nvidia-smi -L >/dev/null 2>&1; then
    echo cpu
    return
  fi
  driver=$(nvidia-smi --query-gpu=driver_version --format=csv,noheader | head -n 1)
  if ((${driver%%.*} >= 580)); then echo cuda13; else echo cuda12; fi
}

pip_install() {
  if ! .venv/bin/python -m pip install --quiet --disable-pip-version-check "$@"; then
    echo "run.sh: pip failed; what was installed before is kept, the same command goes on" >&2
    exit 1
  fi
}

# JAX and torch share one CUDA family, 13; beside CUDA 12, and without a GPU, torch goes without.
install_torch() {
  local wanted installed
  wanted=$(grep -E '^torch(vision)?==' requirements.txt || true)
  installed=$(.venv/bin/python -m pip freeze | grep -oE '^torch(vision)?==[0-9.]+' || true)
  if [[ $1 == cuda13 || $(uname -sm) != "Linux x86_64" || $installed == "$wanted" ]]; then return; fi
  if .venv/bin/python -c 'import sys, urllib.request as u; u.urlopen(sys.argv[1], timeout=5)' \
    "$TORCH_INDEX/torch/" 2>/dev/null; then
    # shellcheck disable=SC2086
    pip_install --index-url "$TORCH_INDEX" $wanted
  else
    echo "run.sh: $TORCH_INDEX cannot be reached: torch comes with CUDA libraries, 3.4 GB more"
  fi
}

# setup FILE: installs FILE into .venv unless that very installation is there already.
setup() {
  local requirements=$1 stamp=".venv/installed-$1" kind constraints wanted
  kind=${ACCELERATOR:-$(cat .venv/accelerator 2>/dev/null || accelerator)}
  if [[ ! $kind =~ ^(cpu|cuda12|cuda13)$ ]]; then
    echo "run.sh: ACCELERATOR is cpu, cuda12 or cuda13, not $kind" >&2
    exit 2
  fi
  # A .venv without pip was interrupted while it was made.
  if ! .venv/bin/python -m pip --version >/dev/null 2>&1; then
    local python
    python=$(find_python)
    echo "run.sh: making .venv with $("$python" --version)"
    "$python" -m venv --clear .venv
  fi
  constraints=constraints/python$(.venv/bin/python -c 'import sys; print("%d.%d" % sys.version_info[:2])').txt
  if [[ -n ${LATEST:-} || ! -f $constraints ]]; then constraints=/dev/null; fi
  wanted=$(cat requirements*.txt pyproject.toml "$constraints"; echo "$kind"; pwd; experiments)
  if [[ "$(cat "$stamp" 2>/dev/null)" != "$wanted" ]]; then
    echo "run.sh: installing $requirements for $kind (the first time takes some minutes)"
    install_torch "$kind"
    if [[ $kind == cpu ]]; then
      pip_install -c "$constraints" -r "$requirements"
    else
      pip_install -c "$constraints" -r "$requirements" -r "requirements-$kind.txt"
    fi
    pip_install --no-deps --editable .
    echo "$kind" >.venv/accelerator
    printf '%s\n' "$wanted" >"$stamp"
  fi
  export PATH="$PWD/.venv/bin:$PATH"
}

# What the site is built with, beside all else, unless it is there already.
setup_docs() {
  setup requirements.txt
  if ! cmp -s docs/requirements.txt .venv/installed-docs-requirements.txt; then
    echo "run.sh: installing docs/requirements.txt"
    pip_install -r docs/requirements.txt
    cp docs/requirements.txt .venv/installed-docs-requirements.txt
  fi
}

# How long a part took here the last time, or takes on two quiet cores; nothing where not known.
seconds_of() {
  local last
  last=$(grep -s "^$1 $2 " "$RESULTS/.seconds" | tail -n 1 | cut -d ' ' -f 3) || true
  if [[ -z $last && $2 == quick ]]; then
    last=$(tr ' ' '\n' <<<"$QUICK" | grep "^$1:" | cut -d : -f 2) || true
  fi
  echo "$last"
}

run_experiment() {
  if [[ ! -f $1/run.sh ]]; then
    echo "run.sh: no experiment $1; there are: $(experiments | tr '\n' ' ')" >&2
    exit 2
  fi
  # Also where an experiment fails or is interrupted: the page says how to go on.
  trap 'status=$?; python -m lib.report.page "$RESULTS" --cards docs/cards.json; exit $status' EXIT
  local about began=$SECONDS
  about=$(seconds_of "$1" "$2")
  echo "=== $1, $2${about:+: about $about s}"
  RESULTS=$RESULTS bash "$1/run.sh" "$2"
  mkdir -p "$RESULTS"
  echo "$1 $2 $((SECONDS - began))" >>"$RESULTS/.seconds"
}

run_all() {
  local names name about total=0 parts=()
  # Those of the table in its order, then any others.
  names=$( (tr ' ' '\n' <<<"$QUICK" | cut -d : -f 1 && experiments) | awk '!seen[$0]++')
  for name in $names; do
    if [[ ! -f $name/run.sh ]]; then continue; fi
    about=$(seconds_of "$name" quick)
    parts+=("$name${about:+ $about s}")
    total=$((total + ${about:-60}))
  done
  echo "run.sh: quick presets, about $((total / 60)) min $((total % 60)) s: $(IFS=, && echo "${parts[*]}")"
  for name in $names; do
    if [[ -f $name/run.sh ]]; then run_experiment "$name" quick; fi
  done
  echo "=== done: figures and numbers lie in $RESULTS/, and all on one page"
}

case "${1:-all}" in
  -h | --help | help) help ;;
  setup)
    setup requirements.txt
    echo "run.sh: ready; in each shell: source .venv/bin/activate"
    ;;
  test)
    shift
    setup requirements-dev.txt
    exec python -m pytest --numprocesses auto --dist loadfile "$@"
    ;;
  docs)
    setup_docs
    python -m sphinx --quiet -W --keep-going -b html docs docs/_build/html
    echo "run.sh: the site lies in $PWD/docs/_build/html/index.html"
    ;;
  sweep)
    shift
    setup requirements.txt
    exec python -m lib.runs.sweeps --results "$RESULTS" "$@"
    ;;
  all)
    setup requirements.txt
    run_all
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
