#!/usr/bin/env bash
# Slurm: sbatch docs/launch/slurm.sh --config ee_tuning --workdir /shared/runs/exits
#SBATCH --job-name=elastic-lm
#SBATCH --nodes=2
#SBATCH --ntasks-per-node=1
#SBATCH --gpus-per-node=8
#SBATCH --time=24:00:00
#SBATCH --signal=TERM@300
#SBATCH --requeue
#SBATCH --open-mode=append
#SBATCH --output=%x-%j.log
set -euo pipefail

# One task per machine has all of its GPUs. One that fails ends the others, which would wait for it.
srun --kill-on-bad-exit=1 --label "${RUN:-elastic-lm}" train "$@"
