#!/usr/bin/env bash
# Put the demo's model in place: model.sh MODEL OUT
set -euo pipefail

mkdir -p "$(dirname "$2")"
cp -r "$1" "$2"
chmod -R a+rX "$2" # whatever the checkout's umask was
