"""The small model that ships with the package: Llama architecture, Python's standard library.

COMMAND   elastic-lm train --config embedded --workdir runs/embedded
          elastic-lm export --from runs/embedded/model --to runs/embedded/hf --dtype bfloat16 --without-exits
          elastic-lm train --config embedded:longer --workdir runs/longer
          elastic-lm export --from runs/longer/model --to runs/longer/hf --dtype bfloat16 --without-exits
          elastic-lm train --config embedded:late --workdir runs/late
          elastic-lm export --from runs/late/model --to runs/late/hf --dtype bfloat16 --without-exits
HARDWARE  one CPU core
DURATION  about 95, 30 and 6 minutes (650-1800 tokens/s)
EXPECTED  held-out loss 1.98, 1.85 and 1.86 nats per token; at the end 1.82 over the whole test split (1.19
          bits per byte)
"""

from ml_collections import ConfigDict

# Name: layers of the exits, seed, weights of the exits, what differs in training.
CONTINUED = {
    "longer": (
        (3, 6),
        1,
        (0.6, 0.4),
        {
            "init_from": "runs/embedded/hf",
            "steps": 1200,
            "lr": 3e-3,
            "decay_share": 0.6,
            "warmup": 30,
            "eval_every": 200,
        },
    ),
    "late": (
        (9,),
        2,
        (1.0,),
        {
            "init_from": "runs/longer/hf",
            "steps": 300,
            "lr": 2e-3,
            "decay_share": 0.7,
            "warmup": 20,
        },
    ),
}


def get_config(arg: str = "") -> ConfigDict:
    """The recipe; `arg` = "longer", then "late" continue it, "tiny" is a check that runs in seconds."""
    if arg not in ("", "tiny", *CONTINUED):
        raise ValueError(f"--config embedded:{arg}: choose from tiny, {', '.join(CONTINUED)}")
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
    config.method = {"name": "joint", "weights": (0.4, 0.4)}
    config.train = {
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
    if arg in CONTINUED:
        layers, seed, weights, changed = CONTINUED[arg]
        del config.model
        config.exits = _exits(*layers)
        config.seed = seed
        config.method.weights = weights
        config.train.update(changed)
    if arg == "tiny":
        config.exits = (
            {"layer": 1, "kind": "norm", "tied": True},
            {"layer": 2, "kind": "norm", "tied": True},
        )
        config.model.update(d_model=32, n_layers=4, n_heads=4, n_kv_heads=2, d_mlp=64, vocab_size=512)
        config.data.update(seq_len=64, batch_size=4)
        config.train.update(steps=20, warmup=5, log_every=5, eval_every=10, eval_batches=2, save_every=10)
    return config


def _exits(*layers: int) -> tuple[dict, ...]:
    return tuple({"layer": layer, "kind": "norm", "tied": True} for layer in layers)
