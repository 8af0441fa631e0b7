#!/usr/bin/env bash
# One TPU VM: makes it where it is missing, installs the package there, and trains.
#   PROJECT=my-project ZONE=us-west4-a docs/launch/tpu_vm.sh --config ee_tuning --workdir runs/exits
set -euo pipefail

: "${PROJECT:?name the project of Google Cloud}" "${ZONE:?name a zone that has such TPUs}"
TPU=${TPU:-elastic-lm}
TYPE=${TYPE:-v5litepod-8}               # 8 chips of v5e, which are one machine
RUNTIME=${RUNTIME:-v2-alpha-tpuv5-lite} # of v5p: v2-alpha-tpuv5, of v6e: v2-alpha-tpuv6e

tpu() { gcloud compute tpus tpu-vm "$1" "$TPU" --project="$PROJECT" --zone="$ZONE" "${@:2}"; }

tpu describe > /dev/null 2>&1 || tpu create --accelerator-type="$TYPE" --version="$RUNTIME"

# The machine's own Python is older than the package needs.
tpu ssh --command='
  command -v ~/.local/bin/uv > /dev/null || curl -LsSf https://astral.sh/uv/install.sh | sh
  test -x elastic/bin/python || ~/.local/bin/uv venv --python 3.12 elastic
  ~/.local/bin/uv pip install --quiet --python elastic/bin/python "elastic-lm[tpu]"'

printf -v arguments ' %q' "$@"
tpu ssh --command="elastic/bin/elastic-lm train$arguments"
