"""Early exits for a pretrained model: copied heads with their own MLP, the backbone frozen.

COMMAND   elastic-lm train --config ee_tuning --workdir runs/exits
          another model than the embedded one: --config.train.init_from=HF_DIR
HARDWARE  one accelerator, or a CPU for models of a few million parameters
DURATION  minutes
"""

from ml_collections import ConfigDict

import elastic_lm as el


def get_config(arg: str = "") -> ConfigDict:
    """The recipe; `arg` = layers that get an exit, "6,12,18"; "" = 3,6, for the embedded model."""
    layers = [int(layer) for layer in arg.split(",")] if arg else [3, 6]
    config = ConfigDict()
    config.exits = [{"layer": layer, "kind": "mlp", "init": "copy"} for layer in layers]
    config.data = {"source": "stdlib", "seq_len": 256, "batch_size": 8}
    config.method = {"name": "ee_tuning"}
    config.train = {
        "init_from": str(el.embedded_model()),
        "steps": 1000,
        "lr": 1e-3,
        "warmup": 50,
        "weight_decay": 0.0,
        "log_every": 20,
        "eval_every": 250,
        "save_every": 250,
    }
    return config
