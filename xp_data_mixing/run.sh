#!/usr/bin/env bash
# bash xp_data_mixing/run.sh [quick|paper]: recovery, intervals, training, ablation, solvers.
set -euo pipefail
preset=${1:-quick}
cd "$(dirname "${BASH_SOURCE[0]}")/.."
# Called on its own, this goes through the root's run.sh, which sets up .venv.
if [[ "$(command -v python)" != "$PWD/.venv/bin/python" ]]; then
  exec bash run.sh xp_data_mixing "$preset"
fi
python xp_data_mixing/study/experiments.py --preset "$preset" --results "${RESULTS:-results}"
