# Sourced by the other scripts: `.venv` beside them with the package and the extras named in $1, at the versions the tests ran with.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

python=${PYTHON:-python3}
"$python" -c 'import sys; sys.exit(sys.version_info < (3, 11))' || {
    echo "ditcli needs Python 3.11 or newer; $python is $("$python" --version). Set PYTHON to another one." >&2
    exit 1
}

make_environment() {
    local extras=$1 stamp=.venv/.installed
    local wanted
    wanted="$extras $(cat pyproject.toml scripts/constraints.txt | cksum)"
    [ -f "$stamp" ] && [ "$(cat "$stamp")" = "$wanted" ] && return
    [ -x .venv/bin/python ] || "$python" -m venv .venv
    # torch first and by its exact version, before a range of another package can bring in a newer one.
    .venv/bin/python -m pip install --quiet --disable-pip-version-check "$(grep '^torch==' scripts/constraints.txt)"
    .venv/bin/python -m pip install --quiet --disable-pip-version-check -c scripts/constraints.txt -e ".$extras"
    echo "$wanted" >"$stamp"
}
