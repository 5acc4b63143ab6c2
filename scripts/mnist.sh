#!/usr/bin/env bash
# Digits in 15 minutes on two CPU cores: train the preset `mnist`, draw 500 digits at guidance 3, and count how many a classifier
# that is trained on the real ones reads as what was asked for. scripts/mnist.sh FOLDER_OF_IDX_FILES [RUN]
data=$(realpath -m "${1:-"$(dirname "${BASH_SOURCE[0]}")/../../shared/data/mnist"}")
run=$(realpath -m "${2:-runs/mnist}")
[ -d "$data" ] || {
    echo "$data is no folder: scripts/mnist.sh FOLDER, with the idx files of MNIST in it." >&2
    exit 1
}
source "$(dirname "${BASH_SOURCE[0]}")/environment.sh"
[ -f .venv/.installed ] || make_environment ""
SECONDS=0
.venv/bin/ditcli train --data "$data" --preset mnist --out "$run"
echo "Trained in $((SECONDS / 60)) min $((SECONDS % 60)) s." >&2
.venv/bin/ditcli sample --model "$run" --num 50 --cfg 3 --steps 20 --grid --out "$run/digits" >/dev/null
.venv/bin/python scripts/read_digits.py "$data" "$run/digits" --at-least 0.95
echo "$run/digits/grid.png"
