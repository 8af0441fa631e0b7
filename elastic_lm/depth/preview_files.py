"""Files of previews of the vocabulary head, and the check that a preview is one of a model's own head."""

import dataclasses
import json
from pathlib import Path

import jax.numpy as jnp
import numpy as np

from elastic_lm.config.model import ModelConfig
from elastic_lm.depth.previewing import PreviewReport
from elastic_lm.nn.preview import HeadPreview

ARRAYS = ("down", "up", "spread", "margin")


def save_preview(preview: HeadPreview, report: PreviewReport, path: str | Path) -> None:
    """Writes a preview and its report to a .safetensors file.

    Args:
      preview: arrays and sizes.
      report: what it does; stored as metadata.
      path: file to write; it appears whole or not at all.

    Example:
      ```python
      import tempfile

      import jax.numpy as jnp
      import elastic_lm as el
      from elastic_lm.testing import random_params, random_tokens, tiny_config

      config = tiny_config()
      tokens = random_tokens(config, batch=32, length=17)
      ones = jnp.ones((32, 16), jnp.int32)
      batch = el.data.Batch(tokens[:, :-1], tokens[:, 1:], 1.0 * ones, jnp.cumsum(ones, 1) - 1, ones)
      preview, report = el.depth.fit_preview(config, random_params(config), [batch] * 4, ranks=(8,))

      with tempfile.TemporaryDirectory() as folder:
          el.depth.save_preview(preview, report, f"{folder}/preview.safetensors")
      ```
    """
    from safetensors.numpy import save

    from elastic_lm.files.atomic import write_bytes_whole

    arrays = {name: getattr(preview, name) for name in ARRAYS}
    sizes = {"blocks": preview.blocks, "block": preview.block}
    metadata = {"preview": json.dumps(sizes), "report": json.dumps(dataclasses.asdict(report))}
    write_bytes_whole(Path(path), save({name: np.asarray(x) for name, x in arrays.items()}, metadata))


def load_preview(path: str | Path, config: ModelConfig) -> tuple[HeadPreview, PreviewReport]:
    """Reads what `save_preview` wrote.

    Args:
      path: the file.
      config: the model that it must fit.

    Raises:
      FileNotFoundError: there is no such file.
      ValueError: it is no preview, or one of another model.

    Example:
      ```python
      import tempfile

      import jax.numpy as jnp
      import elastic_lm as el
      from elastic_lm.testing import random_params, random_tokens, tiny_config

      config = tiny_config()
      tokens = random_tokens(config, batch=32, length=17)
      ones = jnp.ones((32, 16), jnp.int32)
      batch = el.data.Batch(tokens[:, :-1], tokens[:, 1:], 1.0 * ones, jnp.cumsum(ones, 1) - 1, ones)
      preview, report = el.depth.fit_preview(config, random_params(config), [batch] * 4, ranks=(8,))

      with tempfile.TemporaryDirectory() as folder:
          el.depth.save_preview(preview, report, f"{folder}/preview.safetensors")
          again, _ = el.depth.load_preview(f"{folder}/preview.safetensors", config)
      assert again.rank == preview.rank
      ```
    """
    from safetensors import SafetensorError, safe_open

    if not Path(path).is_file():
        raise FileNotFoundError(f"{path}: no preview; write one with `el.depth.fit_preview`")
    try:
        with safe_open(str(path), framework="numpy") as file:
            metadata = file.metadata() or {}
            sizes = json.loads(metadata["preview"])
            report = PreviewReport(**json.loads(metadata["report"]))
            arrays = {name: file.get_tensor(name) for name in ARRAYS}
    except (SafetensorError, KeyError, TypeError, ValueError) as error:
        raise ValueError(f"{path}: is no preview of a vocabulary head ({error})") from error
    preview = HeadPreview(**{name: jnp.asarray(x) for name, x in arrays.items()}, **sizes)
    check_preview(preview, config, str(path))
    return preview, report


def check_preview(preview: HeadPreview, config: ModelConfig, name: str = "preview") -> None:
    """Refuses a preview that does not fit a model's head.

    Raises:
      ValueError: its vocabulary or its width is another one.
    """
    found = (preview.up.shape[0], preview.down.shape[1])
    due = (config.vocab_size, config.d_model)
    if found != due:
        raise ValueError(
            f"{name}: is of a head of {found} rows and columns, not {due}; fit one for this model"
        )
