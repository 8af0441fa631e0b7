"""What commands say about files that were fitted on one model and are used with another of its shape."""

import argparse
import sys
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from elastic_lm.cost.latency_table import LatencyTable
    from elastic_lm.data.tokenizer import Tokenizer
    from elastic_lm.models.decoder import Params


def add_force(parser: argparse.ArgumentParser, what: str) -> None:
    """Adds --force.

    Args:
      parser: of the command.
      what: file that may belong to another model.
    """
    text = f"take {what} of a model with other weights or another tokenizer without a word"
    parser.add_argument("--force", action="store_true", help=text)


def parts_of(params: "Params", tokenizer: "Tokenizer | None") -> dict[str, str]:
    """Fingerprints of a loaded model by part, as files record them."""
    from elastic_lm.files.fingerprints import weights_fingerprint

    return {
        "weights": weights_fingerprint(params),
        "tokenizer": tokenizer.fingerprint if tokenizer is not None else "",
    }


def check_belongs(
    file: str,
    recorded: object,
    *,
    fitted: str,
    model: str,
    parts: Mapping[str, str],
    fix: str,
    force: bool,
    promise: str = "",
) -> None:
    """Says where a file was fitted on other weights or another tokenizer than those it is used with.

    Args:
      file: its name.
      recorded: what it says about its model: "path", and fingerprints by part.
      fitted: what was done, such as "calibrated".
      model: folder that it is used with.
      parts: fingerprints of that model, from `parts_of`.
      fix: how to make a file for that model.
      force: the user knows; nothing is said.
      promise: what no longer holds, so that it is refused; "" = a warning on stderr will do.

    Raises:
      ValueError: the model is another one, and a promise would be broken.
    """
    from elastic_lm.files.fingerprints import differing_parts

    other = "" if force else differing_parts(recorded, parts)
    if not other:
        return
    source: Any = recorded
    line = (
        f"{file}: was {fitted} on {source.get('path') or 'another model'}, whose {other} differ from those "
        f"of {model}"
    )
    if promise:
        raise ValueError(f"{line}, and {promise}; {fix}, or pass --force")
    print(f"warning: {line}; {fix}, or pass --force", file=sys.stderr)


def check_table(table: "LatencyTable", file: str, folder: str, parts: Mapping[str, str], force: bool) -> None:
    """Warns where a latency table was measured with other weights.

    Args:
      table: from `file`.
      file: its name.
      folder: of the model that it is used with.
      parts: fingerprints of that model.
      force: the user knows.
    """
    check_belongs(
        file,
        {"path": table.path, "weights": table.weights},
        fitted="measured",
        model=folder,
        parts=parts,
        fix=f"measure again: elastic-lm latency build --model {folder} --out {file}",
        force=force,
    )
