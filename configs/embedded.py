"""The small model that ships with the package: Llama architecture, Python's standard library.

COMMAND   elastic-lm train --config configs/embedded.py --workdir runs/embedded
          elastic-lm export --from runs/embedded/model --to runs/embedded/hf --dtype bfloat16 --without-exits
          elastic-lm train --config configs/embedded.py:longer --workdir runs/longer
          elastic-lm export --from runs/longer/model --to runs/longer/hf --dtype bfloat16 --without-exits
          elastic-lm train --config configs/embedded.py:late --workdir runs/late
          elastic-lm export --from runs/late/model --to runs/late/hf --dtype bfloat16 --without-exits
HARDWARE  one CPU core
DURATION  about 95, 30 and 6 minutes (650-1800 tokens/s)
EXPECTED  held-out loss 1.98, 1.85 and 1.86 nats per token; at the end 1.82 over the whole test split (1.19
          bits per byte)
"""

from ml_collections import ConfigDict


def get_config(arg: str = "") -> ConfigDict:
    """The recipe; `arg` = "longer", then "late" continue it, "tiny" is a check that runs in seconds."""
    if arg == "longer":
        return _continued("runs/embedded/hf", {3: 0.6, 6: 0.4}, 1200, seed=1)
    if arg == "late":
        return _continued("runs/longer/hf", {9: 1.0}, 300, seed=2)
    config = ConfigDict()
    config.model = {
        "vocab_size": 512,
        "d_model": 192,
        "n_layers": 12,
        "n_heads": 6,
        "n_kv_heads": 2,
        "d_mlp": 512,
        "max_len": 1024,
        "tied": True,
    }
    config.exits = _exits(3, 6)
    config.data = {"source": "stdlib", "seq_len": 256, "batch_size": 8}
    config.train = {
        "method": "joint",
        "exit_weights": (0.4, 0.4),
        "optimizer": "muon",
        "steps": 2000,
        "lr": 5e-3,
        "schedule": "wsd",
        "decay_share": 0.4,
        "min_lr": 0.02,
        "warmup": 50,
        "weight_decay": 0.1,
        "log_every": 20,
        "eval_every": 300,
        "save_every": 100,
    }
    if arg == "tiny":
        config.exits = (
            {"layer": 1, "kind": "norm", "tied": True},
            {"layer": 2, "kind": "norm", "tied": True},
        )
        config.model.update(d_model=32, n_layers=4, n_heads=4, n_kv_heads=2, d_mlp=64, vocab_size=512)
        config.data.update(seq_len=64, batch_size=4)
        config.train.update(steps=20, warmup=5, log_every=5, eval_every=10, eval_batches=2, save_every=10)
    return config


def _continued(source: str, exit_weights: dict[int, float], steps: int, seed: int) -> ConfigDict:
    """More steps for the model in `source`, the last ones with an exit where quickstart puts its own."""
    last = 9 in exit_weights
    config = ConfigDict()
    config.exits = _exits(*exit_weights)
    config.data = {"source": "stdlib", "seq_len": 256, "batch_size": 8, "seed": seed}
    config.train = {
        "method": "joint",
        "init_from": source,
        "exit_weights": tuple(exit_weights.values()),
        "optimizer": "muon",
        "steps": steps,
        "lr": 2e-3 if last else 3e-3,
        "schedule": "wsd",
        "decay_share": 0.7 if last else 0.6,
        "min_lr": 0.02,
        "warmup": 20 if last else 30,
        "weight_decay": 0.1,
        "log_every": 20,
        "eval_every": 0 if last else 200,
        "save_every": 100,
        "seed": seed,
    }
    return config


def _exits(*layers: int) -> tuple[dict, ...]:
    return tuple({"layer": layer, "kind": "norm", "tied": True} for layer in layers)
