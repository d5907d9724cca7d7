#!/usr/bin/env bash
# Make the demo's model, with the package of a checkout: model.sh CHECKOUT OUT
set -euo pipefail

scratch=$(mktemp -d) # torch leaves a folder wherever temporary files go
TMPDIR=$scratch PYTHONPATH=$1 python3 -m sglang_tokenweave.tiny_model llama "$2"
rm -r "$scratch"
chmod -R a+rX "$2" # safetensors are written for their owner alone
