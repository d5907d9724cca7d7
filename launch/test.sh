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

# The tests of the containers build the images in a clean root. Without this tool they are skipped,
# and in CI they fail.
if ((EUID == 0)) && command -v apt-get >/dev/null && ! command -v mmdebstrap >/dev/null; then
    say "installing Debian's mmdebstrap, log: .cache/apt.log"
    {
        apt-get update -qq
        DEBIAN_FRONTEND=noninteractive apt-get install -qq --no-install-recommends mmdebstrap
    } >.cache/apt.log 2>&1 || say "it did not install: the images' tests will not run"
fi

say "lint"
$bin/ruff check
$bin/ruff format --check
$bin/mypy
shopt -s nullglob
sources=(cuda/*.cu cuda/*.cuh tests/host/*.h tests/host/*.cuh tests/host/*.cpp)
if ((${#sources[@]})); then $bin/clang-format --dry-run --Werror "${sources[@]}"; fi
say "tests"
# Two at a time, but those of a file one after the other: they share servers.
if (($# == 0)); then set -- --numprocesses 2 --dist loadfile --no-loadscope-reorder; fi
exec $bin/python -m pytest "$@"
