#!/usr/bin/env bash
# Build dist/ditcli, one file that needs nothing on the target but a Python like the one that built it.
#   scripts/build_executable.sh                  all of ditcli
#   scripts/build_executable.sh --runtime onnx   dist/ditcli-onnx, which samples exported models: no torch
# PYTHON is the interpreter to build with, of the version that the target has.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
python=${PYTHON:-python3}
case "$*" in
"") runtime=torch out=dist/ditcli ;;
"--runtime onnx") runtime=onnx out=dist/ditcli-onnx ;;
*) sed -n '2,5s/^# *//p' "$0" >&2 && exit 2 ;;
esac

# pex resolves from a folder alone, since it does not read pip's configuration, and pip fills it.
wheels=build/wheels-$runtime
export PIP_CONSTRAINT=$PWD/scripts/constraints.txt PIP_DISABLE_PIP_VERSION_CHECK=1
rm -rf "$wheels"
[ -x build/pex/bin/pex ] || { "$python" -m venv build/pex && build/pex/bin/pip install --quiet pex; }
build/pex/bin/pip wheel --quiet --no-deps --wheel-dir "$wheels" .
if [ "$runtime" = torch ]; then
    requirements=(ditcli)
    build/pex/bin/pip download --quiet --dest "$wheels" "$(grep '^torch==' scripts/constraints.txt)"
    build/pex/bin/pip download --quiet --dest "$wheels" --find-links "$wheels" "$wheels"/ditcli-*.whl
else
    packages=(array-api-compat click numpy onnxruntime pillow psutil rich safetensors)
    requirements=(ditcli "${packages[@]}" --exclude torch --exclude onnx --exclude onnxscript
        --exclude onnxruntime-gpu --exclude huggingface-hub --exclude matplotlib)
    build/pex/bin/pip download --quiet --dest "$wheels" "${packages[@]}"
fi

# In venv mode the first start unpacks into ~/.cache/pex (PEX_ROOT), and later ones go there at once.
mkdir -p dist
build/pex/bin/pex --no-pypi --find-links "$wheels" --venv prepend --sh-boot --no-pre-install-wheels --no-compress \
    "${requirements[@]}" --console-script ditcli --output-file "$out" --pex-root build/pex-root
du --apparent-size --block-size=MB "$out"
