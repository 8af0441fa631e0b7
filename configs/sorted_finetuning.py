"""Sorted fine-tuning (SoFT): one fine-tuned model whose first n layers are a model too, for several n.

COMMAND   elastic-lm train --config sorted_finetuning --workdir runs/sorted
          on instructions: --config.data.source=instruction --config.data.paths="('train.jsonl',)"
          another model: --config.train.init_from=HF_DIR --config.method.depths="(8,16,24)"
HARDWARE  one accelerator, or a CPU for models of a few million parameters
DURATION  that of plain fine-tuning plus one vocabulary head per sub-model: minutes for the embedded model
EXPECTED  every `loss/depth_<n>` falls below what that depth gives before:
          experiments/sorted_llama

Variants and baselines (`--config sorted_finetuning:NAME`):

  soft        the mean of the sub-models' losses (default)
  lite        the same, for exits in the lower and middle part
  calm        every layer, weighted by its depth
  sortednet   one sub-model drawn per step
  sft         plain fine-tuning of the full model
  extracted-3 plain fine-tuning of the first 3 layers alone
  ict         separate heads on the frozen model: --config.train.init_from=runs/sft/model
"""

from ml_collections import ConfigDict

import elastic_lm as el


def get_config(arg: str = "soft") -> ConfigDict:
    """The recipe; `arg` = one of the variants above, "" = soft."""
    name, dash, layers = (arg or "soft").partition("-")
    config = ConfigDict()
    config.data = {"source": "stdlib", "seq_len": 256, "batch_size": 8}
    config.train = {
        "init_from": str(el.embedded_model()),
        "steps": 1000,
        "lr": 3e-4,
        "warmup": 50,
        "log_every": 20,
        "eval_every": 250,
        "save_every": 250,
    }
    variants = {
        "soft": {"depths": (3, 6, 9, 12)},
        "lite": {"depths": (2, 4, 6, 8, 10, 12)},
        "calm": {"depth_weights": "linear"},
        "sortednet": {"depths": (3, 6, 9, 12), "curriculum": "sampled"},
        "sft": {"name": "pretraining"},
        "extracted": {"name": "pretraining"},
        "ict": {"name": "ee_tuning"},
    }
    if name not in variants:
        raise ValueError(f"--config sorted_finetuning:{arg}: choose from {', '.join(variants)}")
    if dash and name != "extracted":
        raise ValueError(f"--config sorted_finetuning:{arg}: {name} takes no number; write {name}")
    config.method = {"name": "sorted_finetuning", **variants[name]}
    if name == "extracted":
        if dash and not (layers.isdecimal() and int(layers)):
            raise ValueError(
                f"--config sorted_finetuning:{arg}: {layers!r} is no number of layers; write extracted-3"
            )
        config.train.update(init_layers=int(layers or 3))
    if name == "ict":
        config.train.weight_decay = 0.0
        config.exits = [{"layer": layer, "kind": "norm", "init": "copy"} for layer in (3, 6, 9)]
    return config
