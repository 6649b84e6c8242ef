#!/usr/bin/env bash
# bash xp_gmm_source/run.sh [quick|paper]: mixtures of images, and sources of flow matching compared.
set -euo pipefail
preset=${1:-quick}
cd "$(dirname "${BASH_SOURCE[0]}")/.."
# Called on its own, this goes through the root's run.sh, which sets up .venv.
if [[ "$(command -v python)" != "$PWD/.venv/bin/python" ]]; then
  exec bash run.sh xp_gmm_source "$preset"
fi
seeds=0
if [[ $preset == paper ]]; then seeds="0 1 2"; fi
# shellcheck disable=SC2086
python xp_gmm_source/experiments.py --preset "$preset" --seeds $seeds --results "${RESULTS:-results}"
