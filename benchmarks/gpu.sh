#!/usr/bin/env bash
# bash benchmarks/gpu.sh [DATA] [OPTIONS OF gpu.py]: what to run first on a GPU, in at most 8 minutes.
#
# DATA is a folder or zip of images in classes, with splits train and test, which is condensed;
# without it that part is left out. Needs Python with JAX, flax and optax, and installs nothing:
# PYTHON names it, or an active or our own environment is taken, else python3. --help tells more.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
if [[ -z ${PYTHON:-} ]]; then
  PYTHON=python3
  if [[ -z ${VIRTUAL_ENV:-} && -x .venv/bin/python ]]; then PYTHON=.venv/bin/python; fi
fi
# The CPU is what the GPU's results are held against.
if [[ ${JAX_PLATFORMS:-cpu} != *cpu* ]]; then export JAX_PLATFORMS=$JAX_PLATFORMS,cpu; fi
PYTHONPATH=$PWD${PYTHONPATH:+:$PYTHONPATH} exec "$PYTHON" benchmarks/gpu.py "$@"
