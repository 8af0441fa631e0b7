"""One way in for every kind of model folder."""

from pathlib import Path

import jax

from elastic_lm import hf
from elastic_lm.config.checks import require
from elastic_lm.config.model import DTYPES, ModelConfig
from elastic_lm.files.atomic import moved_away
from elastic_lm.files.gguf import is_gguf
from elastic_lm.files.hub import OR_NAME, local_model
from elastic_lm.files.remote import addresses_in_errors, named
from elastic_lm.models.decoder import Decoder, Params
from elastic_lm.models.registry import Config, Model, kind_of, make_model
from elastic_lm.nn.int8 import quantised

CHECKPOINT = "elastic_config.json"


def load(
    path: str | Path,
    *,
    dtype: str | None = None,
    mesh: jax.sharding.Mesh | None = None,
    revision: str | None = None,
    weights: str | None = None,
) -> tuple[Model, Params]:
    """Loads a model of the Hugging Face Hub, a folder of one, a checkpoint of this package or a GGUF file.

    Args:
      path: folder with config.json and safetensors, or with elastic_config.json; a .gguf file; or, where
        nothing of that name is here, ORG/NAME of a model on the Hub, which is downloaded into its cache.
        Folders and files may be remote, like gs://bucket/model.
      dtype: "float32", "bfloat16" or "float16" of parameters and activations; None = as saved for a
        checkpoint, in which what was trained over frozen half-precision weights is float32, and see
        `hf.load` for a Hugging Face folder.
      mesh: devices to spread the parameters over; None = the default device.
      revision: branch, tag or commit on the Hub, which ORG/NAME@REVISION names too; None = the main branch.
      weights: "int8" = a decoder's kernels and tables in 8 bits, with a scale per output, for decoding on
        devices that read them so; None = in `dtype`.

    Returns:
      (model, canonical parameters); `model.config` describes it.

    Raises:
      FileNotFoundError: there is nothing at `path`, or nothing that holds a model.
      OSError: the Hub cannot be reached or does not give the model to this user; says what to do.
      ValueError: remote paths of this kind are not supported; or see `hf.load`.

    Example:
      ```python
      import elastic_lm as el

      model, params = el.load(el.embedded_model(), dtype="bfloat16")
      assert params["embed"]["table"].shape == (model.config.vocab_size, model.config.d_model)
      ```
    """
    require(weights in (None, "int8"), "weights", weights, "must be 'int8', or None")
    with addresses_in_errors():
        config, params = _load(local_model(path, revision=revision), dtype, mesh, weights)
    return make_model(config), params


def load_decoder(
    path: str | Path,
    *,
    dtype: str | None = None,
    mesh: jax.sharding.Mesh | None = None,
    weights: str | None = None,
) -> tuple[Decoder, Params]:
    """`load` where only a decoder will do.

    Args:
      path: see `load`.
      dtype: see `load`.
      mesh: see `load`.
      weights: see `load`.

    Returns:
      (model, canonical parameters).

    Raises:
      FileNotFoundError: see `load`.
      ValueError: see `load`; or the folder holds another kind of model.
    """
    model, params = load(path, dtype=dtype, mesh=mesh, weights=weights)
    if not isinstance(model, Decoder):
        raise ValueError(
            f"{path}: holds an {kind_of(model.config).name} (family={model.config.family!r}), where a "
            "decoder is needed; name the folder of a decoder-only language model"
        )
    return model, params


def check_model_folder(path: str | Path) -> None:
    """Refuses a folder that cannot hold a model, before anything of it is read.

    Raises:
      FileNotFoundError: there is nothing at `path`, or it has no config.
    """
    folder = local_model(path, weights=False)
    if is_gguf(folder):
        return
    if not (folder / CHECKPOINT).is_file() and not (folder / "config.json").is_file():
        if folder.name.isdigit() and (folder / "state").is_dir():
            raise FileNotFoundError(
                f"{folder}: is a checkpoint of a training run; make a model of it with elastic-lm convert "
                f"--from {folder} --to DIR"
            )
        found = sorted(p.name for p in folder.iterdir())[:8] if folder.is_dir() else "no such folder"
        raise FileNotFoundError(
            f"{named(folder)}: expected a Hugging Face folder (with config.json) or a checkpoint of this "
            f"package (with {CHECKPOINT}); found {found}. {OR_NAME}{moved_away(folder)}"
        )


def _load(
    folder: Path, dtype: str | None, mesh: jax.sharding.Mesh | None, weights: str | None
) -> tuple[Config, Params]:
    check_model_folder(folder)
    if not (folder / CHECKPOINT).is_file():
        config, params = hf.load(folder, dtype=dtype, mesh=mesh, weights=weights)
    else:
        config, params = _load_checkpoint(folder, dtype, mesh)
        params = params if weights is None else quantised(params, lambda leaf: leaf.delete())
    decodes = isinstance(config, ModelConfig)
    require(weights is None or decodes, "weights", weights, f"{folder} holds no decoder; leave it out")
    return config, params


def _load_checkpoint(
    folder: Path, dtype: str | None, mesh: jax.sharding.Mesh | None
) -> tuple[Config, Params]:
    from elastic_lm.checkpoints.native import load_model

    if dtype is not None and dtype not in DTYPES:
        raise ValueError(f"dtype={dtype!r}: must be one of {', '.join(DTYPES)}")
    return load_model(folder, mesh=mesh, dtype=dtype)
