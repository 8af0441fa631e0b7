"""Files of previews of the vocabulary head, and the check that a preview is one of a model's own head."""

import dataclasses
import datetime
import json
from pathlib import Path

import jax.numpy as jnp
import numpy as np

from elastic_lm.config.checks import require
from elastic_lm.config.model import ModelConfig
from elastic_lm.config.parse import parse_json
from elastic_lm.depth.previewing import PreviewReport, vocab_head
from elastic_lm.models.decoder import Params
from elastic_lm.models.finite import check_tensor
from elastic_lm.nn.preview import HeadPreview, head_fingerprint
from elastic_lm.report.machine import recorded_versions

FORMAT = "elastic_lm preview 1"
ARRAYS = ("down", "up", "spread", "margin")
STATIC = ("blocks", "block", "head")  # fields that are no arrays


def save_preview(preview: HeadPreview, report: PreviewReport, path: str | Path) -> None:
    """Writes a preview and its report to a .safetensors file.

    Args:
      preview: arrays, sizes, and the fingerprint of its head.
      report: what it does; stored as metadata, with date and versions.
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
    provenance = {
        "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "versions": recorded_versions(),
    }
    metadata = {
        "format": FORMAT,
        "preview": json.dumps({name: getattr(preview, name) for name in STATIC}),
        "report": json.dumps(dataclasses.asdict(report)),
        "provenance": json.dumps(provenance),
    }
    write_bytes_whole(path, save({name: np.asarray(x) for name, x in arrays.items()}, metadata))


def load_preview(path: str | Path, config: ModelConfig) -> tuple[HeadPreview, PreviewReport]:
    """Reads what `save_preview` wrote.

    Args:
      path: the file.
      config: the model that it must fit; a sampler checks that it is of this model's own head.

    Raises:
      FileNotFoundError: there is no such file.
      ValueError: it is no preview, or of another format, or its head is of another size.

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

    from elastic_lm.files.remote import fetched

    path = fetched(path)
    if not path.is_file():
        raise FileNotFoundError(f"{path}: no preview; write one with `el.depth.fit_preview`")
    try:
        with safe_open(str(path), framework="numpy") as file:
            metadata = file.metadata() or {}
            if metadata.get("format") != FORMAT:
                raise ValueError(f'"format" is not "{FORMAT}"')
            static = {name: parse_json(metadata["preview"])[name] for name in STATIC}
            report = PreviewReport(**parse_json(metadata["report"]))
            arrays = {name: file.get_tensor(name) for name in ARRAYS}
            for name in ARRAYS[:-1]:
                check_tensor(f"tensor {name!r}", arrays[name])
            # A preview that is always sure has a margin of -inf.
            require(not np.isnan(arrays["margin"]).any(), "margin", arrays["margin"], "must be a number")
    except (SafetensorError, KeyError, TypeError, ValueError) as error:
        fix = "write one with `elastic-lm preview`"
        raise ValueError(f"{path}: is no preview of a vocabulary head ({error}); {fix}") from error
    preview = HeadPreview(**{name: jnp.asarray(x) for name, x in arrays.items()}, **static)
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


def check_head(preview: HeadPreview, config: ModelConfig, params: Params, name: str = "preview") -> None:
    """Refuses a preview of another head than a model's own, which would choose other tokens.

    Args:
      preview: fits the sizes of the head.
      config: the model.
      params: its canonical parameters.
      name: of the preview in messages, e.g. its file.

    Raises:
      ValueError: the fingerprints of the heads differ; a preview without one is let through.
    """
    due = head_fingerprint(vocab_head(config, params)) if preview.head else ""
    fix = (
        f"is of another model's vocabulary head, this one's is {due!r}; fit a preview for this model: "
        "elastic-lm preview"
    )
    require(preview.head == due, f"{name}.head" if name == "preview" else f"{name}: head", preview.head, fix)
