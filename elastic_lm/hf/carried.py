"""Keys of a source's config.json and generation_config.json beyond the model, carried to an export.

What a model computes is in its own config. A Hugging Face folder says more, such as how `generate` draws, how
the weights were initialised, or which token pads. An export says it again.
"""

import dataclasses
import json
import warnings
from pathlib import Path
from typing import Any, Self

from elastic_lm.files.atomic import read_json
from elastic_lm.files.gguf import is_gguf
from elastic_lm.files.hub import local_model
from elastic_lm.hf.config_json import config_from_hf
from elastic_lm.hf.generation import LIMITS
from elastic_lm.hf.gguf import config_entries
from elastic_lm.models.registry import Config

CONFIG_FILE = "config.json"
KEPT_FILE = "source_config.json"  # the source's config.json, in a checkpoint of this package
GENERATION_FILE = "generation_config.json"
GENERATION_IDS = ("bos_token_id", "eos_token_id", "decoder_start_token_id", "pad_token_id", *LIMITS)

# Exits of an earlier export, and code that is not carried.
DROPPED = ("elastic", "auto_map", "quantization_config")
LAYER_COUNTS = ("num_hidden_layers", "n_layer", "num_layers", "n_layers")


@dataclasses.dataclass(frozen=True)
class Carried:
    """What the folder of a model says beside what its config holds.

    Attributes:
      config: the source's config.json; {} = there is none.
      generation: its generation_config.json; None = there is none.
    """

    config: dict[str, Any]
    generation: dict[str, Any] | None

    @classmethod
    def of_folder(cls, folder: str | Path) -> Self:
        """Reads a Hugging Face folder or name, or what a checkpoint of this package keeps of one.

        Raises:
          ValueError: a file is damaged; names it.
        """
        folder = local_model(folder, weights=False)
        if is_gguf(folder):
            return cls(config_entries(folder), None)
        kept = [folder / KEPT_FILE, folder / CONFIG_FILE]
        config = next((read_json(file) for file in kept if file.is_file()), {})
        generation = folder / GENERATION_FILE
        return cls(config, read_json(generation) if generation.is_file() else None)

    def save(self, folder: Path) -> None:
        """Keeps it in a checkpoint."""
        if self.config:
            write_json(folder / KEPT_FILE, self.config)
        if self.generation is not None:
            write_json(folder / GENERATION_FILE, self.generation)

    def with_entries(self, config: Config, entries: dict[str, Any]) -> dict[str, Any]:
        """The config.json of an export: what describes the model, and the source's further keys.

        Args:
          config: the model.
          entries: from `config_to_hf`; they win.

        Returns:
          `entries` with the source's keys that do not change the model. Keys that would are left out with a
          warning, like lists with an item for each of other layers.
        """
        if self.config.get("model_type") != entries["model_type"]:
            return entries
        if "dtype" in self.config and "torch_dtype" in entries:  # the newer name of one key
            entries = {"dtype" if key == "torch_dtype" else key: value for key, value in entries.items()}
        right = config_from_hf(entries)
        layers = next((self.config[key] for key in LAYER_COUNTS if key in self.config), None)
        further = {k: v for k, v in self.config.items() if k not in entries and k not in DROPPED}
        further.pop("torch_dtype", None)

        left_out = []
        for key, value in list(further.items()):
            per_layer = isinstance(value, list) and len(value) == layers != config.n_layers
            if per_layer or not _same_model(entries | {key: value}, right):
                left_out.append(key)
                del further[key]
        if left_out:
            warnings.warn(
                f"{CONFIG_FILE}: {', '.join(left_out)} of the source would change the exported model, and "
                "is left out",
                stacklevel=3,
            )
        return further | entries

    def with_ids(self, entries: dict[str, Any]) -> dict[str, Any]:
        """The generation_config.json of an export: the source's, with the model's ids where they differ.

        Args:
          entries: the model's config.json.
        """
        ids = {key: entries[key] for key in GENERATION_IDS if key in entries}
        if self.generation is None:
            return ids
        found = self.generation
        stated = {k: v for k, v in ids.items() if k in found or (k in LIMITS and v is not None)}
        return found | {k: v for k, v in stated.items() if _listed(found.get(k)) != _listed(v)}


def _same_model(entries: dict[str, Any], right: Config) -> bool:
    try:
        return config_from_hf(entries) == right
    except (ValueError, TypeError):
        return False


def _listed(ids: Any) -> list[Any]:
    """One id, a list of them or null as a list."""
    return [] if ids is None else list(ids) if isinstance(ids, list) else [ids]


def write_json(path: Path, value: Any) -> None:
    """Writes a file of JSON for people to read."""
    path.write_text(json.dumps(value, indent=2) + "\n", encoding="utf-8")
