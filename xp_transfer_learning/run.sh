#!/usr/bin/env bash
# bash xp_transfer_learning/run.sh [quick|paper]: rings, image flows, transfer, adaptation.
set -euo pipefail
preset=${1:-quick}
cd "$(dirname "${BASH_SOURCE[0]}")/.."
# Called on its own, this goes through the root's run.sh, which sets up .venv.
if [[ "$(command -v python)" != "$PWD/.venv/bin/python" ]]; then
  exec bash run.sh xp_transfer_learning "$preset"
fi
python xp_transfer_learning/rings.py --preset "$preset" --results "${RESULTS:-results}"
python xp_transfer_learning/image_flow.py --preset "$preset" --results "${RESULTS:-results}"
python xp_transfer_learning/transfer.py --preset "$preset" --results "${RESULTS:-results}"
python xp_transfer_learning/domain_adaptation.py --preset "$preset" --results "${RESULTS:-results}"
