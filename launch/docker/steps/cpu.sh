#!/usr/bin/env bash
# Put SGLang for a CPU into a new virtual environment: cpu.sh VENV CHECKOUT
# Its packages are the extra `cpu` of pyproject.toml, its versions those of launch/cpu/requirements.lock.
set -euo pipefail

venv=$1 checkout=$2
lock=$checkout/launch/cpu/requirements.lock
python3 -m venv "$venv"
pip_install() {
    "$venv/bin/python" -m pip install -q --no-cache-dir --disable-pip-version-check "$@"
}
direct=$("$venv/bin/python" - "$checkout/pyproject.toml" <<'PYTHON'
import sys
import tomllib

with open(sys.argv[1], "rb") as file:
    print(*tomllib.load(file)["project"]["optional-dependencies"]["cpu"], sep="\n")
PYTHON
)
mapfile -t packages <<<"$direct"
pip_install -c "$lock" "${packages[@]}"
# SGLang's own requirements are CUDA packages.
pip_install --no-deps "$(grep '^sglang==' "$lock")"
