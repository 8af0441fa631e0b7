"""LayerSkip: layer dropout and an early-exit loss, for models that draft with their own first layers.

COMMAND   elastic-lm train --config layerskip --workdir runs/layerskip
          another model than the embedded one: --config.train.init_from=HF_DIR
HARDWARE  one accelerator, or a CPU for models of a few million parameters
DURATION  about that of plain fine-tuning: minutes for the embedded model
EXPECTED  lower `loss/depth_<n>` at the price of a slightly higher `loss/final`; not measured at length yet

`:gradual` enables sub-models from the deepest down over the first half of the run, instead of one in
four per step; `:scratch` trains a new model, with layer dropout that rises over the run.
"""

from ml_collections import ConfigDict

import elastic_lm as el


def get_config(arg: str = "rotational") -> ConfigDict:
    """The recipe; `arg` = rotational, gradual or scratch, "" = rotational."""
    variant = arg or "rotational"
    if variant not in ("rotational", "gradual", "scratch"):
        raise ValueError(f"--config layerskip:{arg}: choose from rotational, gradual, scratch")
    config = ConfigDict()
    config.data = {"source": "stdlib", "seq_len": 256, "batch_size": 8}
    config.method = {
        "name": "sorted_finetuning",
        "depth_weights": "layerskip",
        "depth_scale": 0.2,
        "curriculum": "gradual" if variant == "gradual" else "rotational",
        "curriculum_period": 0 if variant == "gradual" else 4,
        "layer_dropout": 0.1,
    }
    config.train = {
        "steps": 1000,
        "lr": 3e-4,
        "warmup": 50,
        "log_every": 20,
        "eval_every": 250,
        "save_every": 250,
    }
    if variant == "scratch":
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
        config.method.dropout_ramp = 2000
        config.train.update({"lr": 3e-3, "steps": 2000})
    else:
        config.train.update({"init_from": str(el.embedded_model())})
    return config
