"""Model folders that commands read: the model with its tokenizer, or the tokenizer where there is one."""

import sys
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from elastic_lm.data.tokenizer import Tokenizer
    from elastic_lm.models.decoder import Decoder, Params


def load_with_tokenizer(
    folder: str | None, dtype: str | None = None
) -> "tuple[Decoder, Params, Tokenizer, str]":
    """A model folder's decoder and tokenizer; None = the embedded model. `dtype` None = as saved.

    Returns:
      (model, canonical parameters, tokenizer, the folder).
    """
    from elastic_lm.checkpoints.embedded import embedded_model
    from elastic_lm.checkpoints.loading import check_model_folder, load_decoder
    from elastic_lm.data.tokenizer import Tokenizer

    path = folder or str(embedded_model())
    check_model_folder(path)
    tokenizer = Tokenizer.load(path)  # first, because the weights may take minutes
    model, params = load_decoder(path, dtype=dtype)
    return model, params, tokenizer, path


def load_tokenizer(folder: str) -> "Tokenizer | None":
    """The tokenizer of a model folder; None, with a note on stderr, where it has no tokenizer.json."""
    from elastic_lm.data.tokenizer import Tokenizer

    try:
        return Tokenizer.load(folder)
    except FileNotFoundError as error:
        print(f"{folder} has no tokenizer.json: only the model is written ({error})", file=sys.stderr)
        return None


def parameter_count(params: Any) -> str:
    """The number of parameters, with commas for people."""
    import jax

    return f"{sum(leaf.size for leaf in jax.tree.leaves(params)):,}"
