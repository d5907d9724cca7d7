#!/usr/bin/env bash
# Set up and run every check and test: bash launch/test.sh [PYTEST ARGUMENTS]
set -euo pipefail

here=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd -P)
source "$here/python.sh"
unset PYTHONPATH PYTHONHOME

# The oldest release we support, one between, and the newest: that one is in the environment itself.
bash "$here/setup.sh" --overlay 0.5.17 --overlay 0.5.21

cd "$(dirname "$here")"
bin=.venv/bin
say "lint"
$bin/ruff check
$bin/ruff format --check
$bin/mypy
shopt -s nullglob
sources=(cuda/*.cu cuda/*.cuh tests/host/*.h tests/host/*.cuh tests/host/*.cpp)
if ((${#sources[@]})); then $bin/clang-format --dry-run --Werror "${sources[@]}"; fi
say "tests"
exec $bin/python -m pytest "$@"
