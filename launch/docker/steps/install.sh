#!/usr/bin/env bash
# Install wheels beside the SGLang that the image has: install.sh WHEEL...
# Nothing is downloaded and nothing of the image's own packages changes.
set -euo pipefail

# Ubuntu marks its Python as the distribution's own; in an image it is ours.
PIP_BREAK_SYSTEM_PACKAGES=1 python3 -m pip install -q --no-cache-dir \
    --disable-pip-version-check --root-user-action=ignore --no-deps --no-index "$@"
