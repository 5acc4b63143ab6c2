#!/usr/bin/env bash
# Hours of fuzzing: draws N new examples (default 100,000) for each law of tests/test_fuzz.py; more words go to pytest,
# such as -k checkpoint. Stops at the first file, config or command line that is neither read nor refused in a sentence.
source "$(dirname "${BASH_SOURCE[0]}")/environment.sh"
make_environment "[dev]"
DITCLI_FUZZ_EXAMPLES=${1:-100000} .venv/bin/python -m pytest tests/test_fuzz.py -x --timeout 0 -k test_seconds "${@:2}"
