#!/usr/bin/env bash
# Build the wheels of a checkout: wheels.sh CHECKOUT OUT
# OUT/tokenweave/ gets ours, OUT/cpu/ the stand-ins that SGLang needs on a CPU.
set -euo pipefail

checkout=$1 out=$2
tools=$(mktemp -d)
python3 -m venv "$tools"
"$tools/bin/python" -m pip install -q --no-cache-dir --disable-pip-version-check \
    -c "$checkout/launch/cpu/requirements.lock" build hatchling
build() { "$tools/bin/python" -m build --no-isolation --wheel --outdir "$2" "$1"; }
build "$checkout" "$out/tokenweave"
build "$checkout/launch/cpu/standins" "$out/cpu"
rm -r "$tools"
