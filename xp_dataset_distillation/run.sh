#!/usr/bin/env bash
# bash xp_dataset_distillation/run.sh [quick|paper]: condensed sets beside baselines, and checks.
set -euo pipefail
preset=${1:-quick}
cd "$(dirname "${BASH_SOURCE[0]}")/.."
# Called on its own, this goes through the root's run.sh, which sets up .venv.
if [[ "$(command -v python)" != "$PWD/.venv/bin/python" ]]; then
  exec bash run.sh xp_dataset_distillation "$preset"
fi
seeds=0
if [[ $preset == paper ]]; then seeds="0 1 2"; fi
results=${RESULTS:-results}
python xp_dataset_distillation/checks.py mmd --results "$results"
# shellcheck disable=SC2086
python xp_dataset_distillation/experiments.py --preset "$preset" --seeds $seeds --results "$results"
if [[ $preset == paper ]]; then
  python xp_dataset_distillation/checks.py moments --dataset fashion_mnist --results "$results"
fi
