#!/usr/bin/env bash
# Make the user that serves, and its home: user.sh NAME ID HOME
# HOME is the volume: every cache that a library keeps in its user's home outlives the container.
set -euo pipefail

name=$1 id=$2 home=$3
groupadd --gid "$id" "$name"
# -l: no entry in lastlog, a sparse file as long as the id is high.
useradd -l --uid "$id" --gid "$id" --home-dir "$home" --no-create-home \
    --shell /usr/sbin/nologin "$name"
install -d -o "$id" -g "$id" -m 0750 "$home"
