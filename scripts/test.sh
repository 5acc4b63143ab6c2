#!/usr/bin/env bash
# Lint, formatting, types and tests, as CI runs them. Arguments go to pytest: scripts/test.sh -m slow
source "$(dirname "${BASH_SOURCE[0]}")/environment.sh"
make_environment "[dev,jax]"
.venv/bin/ruff check .
.venv/bin/ruff format --check .
.venv/bin/mypy
.venv/bin/python -m pytest "$@"
