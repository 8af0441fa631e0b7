#!/usr/bin/env bash
# GKE with xpk (pip install xpk): a workload on the slices of a cluster that `xpk cluster create` has made.
#   PROJECT=my-project ZONE=us-west4-a CLUSTER=my-cluster IMAGE=gcr.io/my-project/elastic-lm:1 \
#     docs/launch/gke_xpk.sh --config ee_tuning --workdir gs://my-bucket/exits
set -euo pipefail

: "${PROJECT:?name the project of Google Cloud}" "${ZONE:?name the zone of the cluster}"
: "${CLUSTER:?name the cluster}" "${IMAGE:?name an image that may be pushed, like gcr.io/PROJECT/elastic-lm:1}"

docker build --tag "$IMAGE" "$(dirname "$0")" # of the Dockerfile beside this script
docker push "$IMAGE"

printf -v arguments ' %q' "$@"
xpk workload create --project="$PROJECT" --zone="$ZONE" --cluster="$CLUSTER" \
  --workload="${WORKLOAD:-elastic-lm}" --tpu-type="${TYPE:-v5litepod-32}" --num-slices="${SLICES:-1}" \
  --docker-image="$IMAGE" --max-restarts="${RESTARTS:-20}" --command="elastic-lm train$arguments"
