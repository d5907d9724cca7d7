#!/usr/bin/env bash
# Set up and serve: bash launch/serve.sh [MODEL] [--port P] [--tp N] [-- SGLANG FLAGS]
set -euo pipefail

here=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd -P)
source "$here/python.sh"
# serve.py needs nothing but the standard library, so it can check the machine before the set-up.
python=$(find_python)
exec "$python" "$here/serve.py" "$@"
