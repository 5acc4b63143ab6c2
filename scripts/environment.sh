# Sourced by the other scripts.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

python=${PYTHON:-python3}
"$python" -c 'import sys; sys.exit(sys.version_info < (3, 11))' || {
    echo "ditcli needs Python 3.11 or newer; $python is $("$python" --version). Set PYTHON to another one." >&2
    exit 1
}

# The package with extras in a virtual environment, at the versions the tests ran with: EXTRAS [FOLDER [PINS]]
make_environment() {
    local extras=$1 folder=${2:-.venv} pins=${3:-scripts/constraints.txt}
    local stamp=$folder/.installed wanted
    wanted="$extras $(cat pyproject.toml "$pins" | cksum)"
    [ -f "$stamp" ] && [ "$(cat "$stamp")" = "$wanted" ] && return
    [ -x "$folder/bin/python" ] || "$python" -m venv "$folder"
    # torch first and by its exact version, before a range of another package can bring in a newer one.
    "$folder/bin/python" -m pip install --quiet --disable-pip-version-check "$(grep '^torch==' "$pins")"
    "$folder/bin/python" -m pip install --quiet --disable-pip-version-check -c "$pins" -e ".$extras"
    echo "$wanted" >"$stamp"
}
