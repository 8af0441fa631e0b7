#!/usr/bin/env bash
# Colab with a TPU: Runtime > Change runtime type > a TPU, then this in a cell that begins with %%bash.
set -euo pipefail

pip install --quiet elastic-lm # leaves Colab's JAX, which knows the TPU, as it is
python -c 'import jax; print(jax.devices())'
elastic-lm quickstart --out /content/quickstart
