#!/usr/bin/env bash
# Look the pins of scripts/constraints*.txt up in a database of known vulnerabilities; exit code 1 where one is known.
# pip-audit comes into an environment of its own. Words go to it: scripts/audit.sh --vulnerability-service osv
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
environment=$(mktemp -d)
trap 'rm -rf "$environment"' EXIT
"${PYTHON:-python3}" -m venv "$environment"
"$environment/bin/python" -m pip install --quiet --disable-pip-version-check pip-audit
# --no-deps and --disable-pip: the pins are all there is, and nothing of them is installed.
for pins in scripts/constraints.txt scripts/constraints-extras.txt; do
    "$environment/bin/python" -m pip_audit --requirement "$pins" --no-deps --disable-pip --strict "$@"
done
