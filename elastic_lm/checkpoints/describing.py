"""What a model is like, from its config alone: no weights are read."""

import dataclasses
from pathlib import Path

from elastic_lm.checkpoints.loading import CHECKPOINT, check_model_folder
from elastic_lm.checkpoints.native import load_config
from elastic_lm.config.checks import require
from elastic_lm.files.gguf import is_gguf
from elastic_lm.files.hub import local_model
from elastic_lm.hf.config_json import config_from_hf
from elastic_lm.hf.files import read_json
from elastic_lm.hf.gguf import config_entries
from elastic_lm.hf.published import PUBLISHED
from elastic_lm.models.registry import Config


def describe_model(name: str | Path, dtype: str | None = None) -> Config:
    """The config of a model.

    Args:
      name: of a published shape ("llama-2-7b"), a config.json, or whatever `el.load` takes.
      dtype: of parameters and activations; None = that of the file.

    Returns:
      The config; ids that begin and end a text are those of config.json.

    Raises:
      FileNotFoundError: there is no such model.
      ValueError: it is not supported; names file, field and fix.

    Example:
      ```python
      from elastic_lm.checkpoints.describing import describe_model

      config = describe_model("llama-2-70b")
      assert (config.d_model, config.n_layers) == (8192, 80)
      ```
    """
    config = _described(name)
    return config if dtype is None else dataclasses.replace(config, dtype=dtype, param_dtype=dtype)


def _described(name: str | Path) -> Config:
    if str(name).lower() in PUBLISHED:
        return config_from_hf(PUBLISHED[str(name).lower()])

    path = local_model(name, weights=False)
    if path.is_file() and not is_gguf(path):
        require(path.suffix == ".json", "model", str(name), "is no config.json, folder or .gguf file")
    elif not path.exists():
        shapes = f"{name}: no such model here; known shapes are {', '.join(PUBLISHED)}"
        raise FileNotFoundError(shapes)
    else:
        check_model_folder(path)
        if (path / CHECKPOINT).is_file():
            return load_config(path)

    file = path if path.is_file() else path / "config.json"
    entries = config_entries(file) if is_gguf(file) else read_json(file)
    try:
        return config_from_hf(entries)
    except (ValueError, TypeError) as error:
        raise ValueError(f"{file}: {error}") from error
