"""Routers: which width every layer of an elastic model takes for a budget (Flextron's second stage).

COMMAND   elastic-lm train --config routers:runs/elastic/model --workdir runs/routers
          then el.Sampler(..., budget=...), or elastic-lm generate --model runs/routers/model --budget ...
HARDWARE  one accelerator, or a CPU for models of a few million parameters
DURATION  see experiments/flextron; a step of the surrogate is two forward passes
EXPECTED  `eval_spent/budget_<b>` within 5 % of 1 at the budgets that were trained for

The model is one that the recipe flextron made; its folder holds the menu. Variants
(`--config routers:FOLDER,NAME`):

  static      one sub-network per budget, trained through the model (default)
  surrogate   the same, trained on a small network that predicts the loss
  by_token    every token's state decides as well
  joint       static, and the model trains along

Budgets are shares of the whole model's cost: parameters, or `--config.method.priced=flops`, `memory_bytes`
(with `--config.method.context=N`) or `latency_ms` (with `--config.method.latency_table=FILE`).
"""

from ml_collections import ConfigDict


def get_config(arg: str = "runs/elastic/model") -> ConfigDict:
    """The recipe; `arg` = the elastic model's folder, then a comma and one of the variants above."""
    folder, _, variant = arg.partition(",")
    variants = {
        "static": {},
        "surrogate": {"scheme": "surrogate"},
        "by_token": {"reads": "hidden", "router_width": 32},
        "joint": {"train_model": True, "router_lr": 100.0, "distil": 0.5},
    }
    if (variant or "static") not in variants:
        raise ValueError(f"--config routers:{arg}: choose from {', '.join(variants)} after the comma")
    config = ConfigDict()
    config.data = {"source": "stdlib", "seq_len": 256, "batch_size": 8}
    config.method = {"name": "routers", **variants[variant or "static"]}
    config.train = {
        "init_from": folder or "runs/elastic/model",
        "steps": 300,
        "lr": 1e-2,
        "warmup": 10,
        "weight_decay": 0.0,
        "log_every": 20,
        "eval_every": 0,
        "eval_batches": 10,
        "save_every": 100,
    }
    if variant == "joint":
        config.train.lr = 1e-4
    return config
