"""Exits trained on the model's own predictions: no labels, the model itself does not change.

COMMAND   elastic-lm train --config self_supervised_exits --workdir runs/self_supervised
          another model than the embedded one: --config.train.init_from=HF_DIR
HARDWARE  one accelerator, or a CPU for models of a few million parameters
DURATION  minutes
EXPECTED  `agreement/exit_<layer>` rises, the full model stays bit-identical:
          experiments/self_supervised_exits

Variants (`--config self_supervised_exits:NAME`):

  kl          divergence from the full model's distribution (default)
  topk        the same over its 64 likeliest tokens
  argmax      its likeliest token as label
  penalised   the same, and unsure where wrong
  balcony     one transformer layer per exit, the model's own head, kl
  cached      kl on 64 batches that pass the frozen layers once, instead of every step
  gates       kl, and per exit a small classifier that tells whether the head need be read
"""

from ml_collections import ConfigDict

import elastic_lm as el


def get_config(arg: str = "kl") -> ConfigDict:
    """The recipe; `arg` = one of the variants above, "" = kl."""
    variants = {
        "kl": {},
        "topk": {"top_k": 64},
        "argmax": {"objective": "argmax"},
        "penalised": {"objective": "penalised"},
        "balcony": {},
        "cached": {"cached_batches": 64},
        "gates": {},
    }
    variant = arg or "kl"
    if variant not in variants:
        raise ValueError(f"--config self_supervised_exits:{arg}: choose from {', '.join(variants)}")
    exits = {"kind": "block", "tied": True} if variant == "balcony" else {"kind": "norm"}
    if variant == "gates":
        exits["gate"] = 64
    config = ConfigDict()
    config.exits = [{"layer": layer, **exits} for layer in (3, 6)]
    config.data = {"source": "stdlib", "seq_len": 256, "batch_size": 8}
    config.method = {"name": "self_supervised_exits", **variants[variant]}
    config.train = {
        "init_from": str(el.embedded_model()),
        "steps": 1000,
        "lr": 5e-4 if variant == "balcony" else 1e-3,
        "warmup": 50,
        "weight_decay": 0.0,
        "log_every": 20,
        "eval_every": 250,
        "save_every": 250,
    }
    return config
