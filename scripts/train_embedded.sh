#!/usr/bin/env bash
# Train the model that comes with the package on the embedded pictures, ten minutes on two CPU cores, and write it to
# ditcli/models/demo. Stopped, it goes on with the same command. PYTHON is the interpreter that has ditcli's packages.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
python=${PYTHON:-.venv/bin/python}
run=${1:-runs/embedded}

# As `ditcli demo`, but narrower, so that weights of two bytes fit into 6 MB, and for longer.
PYTHONPATH=. "$python" -m ditcli train --data fashion-mnist --preset paper --pixels --image-size 28 --no-flip --out "$run" \
    --model DiT-S/4 --width 160 --depth 6 --num-heads 5 --schedule flow --prediction x0 \
    --batch-size 32 --steps 6000 --lr 1e-3 --warmup-steps 100 --lr-schedule cosine \
    --sample-every 0 --checkpoint-every 1000 --keep-checkpoints 1
PYTHONPATH=. "$python" scripts/embed_model.py "$run"
