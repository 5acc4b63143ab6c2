#!/usr/bin/env bash
# Tests of what optional packages bring: --log, and pages in a browser (needs Chromium). Arguments go to pytest.
# They have an environment of their own, .venv-extras, since gradio wants older packages than the other tests' pins.
source "$(dirname "${BASH_SOURCE[0]}")/environment.sh"
pins=$(mktemp)
trap 'rm -f "$pins"' EXIT
# Of a package that both files name, the version of the first.
awk -F '==' 'NR == FNR { known[$1]; print; next } !($1 in known)' scripts/constraints-extras.txt scripts/constraints.txt >"$pins"
make_environment "[dev,tensorboard,trackio,ui,wandb]" .venv-extras "$pins"
.venv-extras/bin/python -m pip install --quiet --disable-pip-version-check -c "$pins" playwright
.venv-extras/bin/python -m pytest -rs -m "slow or not slow" tests/test_loggers.py tests/test_page.py tests/test_browser.py "$@"
