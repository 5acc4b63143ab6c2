#!/usr/bin/env bash
# On a machine with nothing but Python 3.11: install into .venv, train a small DiT on the embedded pictures, draw a grid.
source "$(dirname "${BASH_SOURCE[0]}")/environment.sh"
echo "Installing into .venv (some minutes the first time) ..." >&2
[ -f .venv/.installed ] || make_environment ""
.venv/bin/ditcli demo "$@"
