#!/usr/bin/env bash
# A slice of a TPU pod: the same command on all of its machines at once.
#   PROJECT=my-project ZONE=us-west4-a docs/launch/tpu_slice.sh --config ee_tuning --workdir gs://my-bucket/exits
set -euo pipefail

: "${PROJECT:?name the project of Google Cloud}" "${ZONE:?name a zone that has such TPUs}"
TPU=${TPU:-elastic-lm-slice}
TYPE=${TYPE:-v5litepod-32}              # 32 chips of v5e on 8 machines
RUNTIME=${RUNTIME:-v2-alpha-tpuv5-lite} # of v5p: v2-alpha-tpuv5, of v6e: v2-alpha-tpuv6e

tpu() { gcloud compute tpus tpu-vm "$1" "$TPU" --project="$PROJECT" --zone="$ZONE" "${@:2}"; }

tpu describe > /dev/null 2>&1 || tpu create --accelerator-type="$TYPE" --version="$RUNTIME"

# The machines' own Python is older than the package needs.
tpu ssh --worker=all --command='
  command -v ~/.local/bin/uv > /dev/null || curl -LsSf https://astral.sh/uv/install.sh | sh
  test -x elastic/bin/python || ~/.local/bin/uv venv --python 3.12 elastic
  ~/.local/bin/uv pip install --quiet --python elastic/bin/python "elastic-lm[tpu,gcs]"'

printf -v arguments ' %q' "$@"
tpu ssh --worker=all --command="elastic/bin/elastic-lm train$arguments"
