"""Model folders that commands read: the model with its tokenizer, or the tokenizer where there is one."""

import contextlib
import sys
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

from elastic_lm.cli import mesh_flag

if TYPE_CHECKING:
    from elastic_lm.config.mesh import MeshConfig
    from elastic_lm.data.tokenizer import Tokenizer
    from elastic_lm.models.decoder import Decoder, Params


def load_with_tokenizer(
    folder: str | None,
    dtype: str | None = None,
    sizes: "MeshConfig | None" = None,
    *,
    weights: str | None = None,
) -> "tuple[Decoder, Params, Tokenizer, str]":
    """A model folder's decoder and tokenizer; None = the embedded model. `dtype` None = as saved.

    `sizes` are those of the mesh that parameters are divided over, as --mesh gives them. `weights` "int8"
    gives kernels in 8 bits, as `el.load` does.

    Returns:
      (model, canonical parameters, tokenizer, the folder).
    """
    from elastic_lm.checkpoints.embedded import embedded_model
    from elastic_lm.checkpoints.loading import check_model_folder, load_decoder
    from elastic_lm.data.tokenizer import Tokenizer

    mesh = mesh_flag.make(sizes)
    path = folder or str(embedded_model())
    check_model_folder(path)
    tokenizer = Tokenizer.load(path)  # first, because the weights may take minutes
    model, params = load_decoder(path, dtype=dtype, mesh=mesh, weights=weights)
    tokenizer.check_vocabulary(model.config.vocab_size)
    return model, params, tokenizer, path


def load_tokenizer(folder: str, vocab_size: int) -> "Tokenizer | None":
    """The tokenizer of a model folder; None, with a note on stderr, where it has no tokenizer.json.

    Raises:
      ValueError: it belongs to another model than one of `vocab_size` rows.
    """
    from elastic_lm.data.tokenizer import Tokenizer

    try:
        tokenizer = Tokenizer.load(folder)
    except FileNotFoundError as error:
        print(f"{folder} has no tokenizer.json: only the model is written ({error})", file=sys.stderr)
        return None
    tokenizer.check_vocabulary(vocab_size)
    if tokenizer.vocab_size > vocab_size:
        count = tokenizer.vocab_size - vocab_size
        note = f"{count} added tokens have no row in the model's vocabulary of {vocab_size}"
        print(f"{folder}: {note}; text that holds them is refused", file=sys.stderr)
    return tokenizer


@contextlib.contextmanager
def writing_target(path: str) -> Iterator[None]:
    """Keeps other processes from a folder while it is written, and removes what a killed one left there.

    Args:
      path: the folder, which need not exist; nothing happens where it is remote.

    Raises:
      OSError: its parent takes no new files, or something above it is a file.
      ValueError: it is the root folder, or another process is writing it; names it.
    """
    from elastic_lm.files.atomic import real_place, remove_leftovers, short_name
    from elastic_lm.files.local import local_path
    from elastic_lm.files.locks import LOCK_FILE, only_process
    from elastic_lm.files.remote import is_remote

    if is_remote(path):  # where nothing can be locked
        yield
        return
    target = real_place(local_path(path))
    if not target.name:
        raise ValueError(f"{path}: is the root of all folders and is not replaced; choose another path")
    lock = target.with_name(f".{short_name(target)}{LOCK_FILE}")
    with only_process(lock, path, "choose another path"):
        remove_leftovers(target)
        yield


def parameter_count(params: Any) -> str:
    """The number of parameters, with commas for people."""
    import jax

    return f"{sum(leaf.size for leaf in jax.tree.leaves(params)):,}"
