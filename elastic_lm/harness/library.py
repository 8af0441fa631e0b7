"""The package lm-eval, an extra: imported where it is needed, and asked for where it is missing."""

import importlib
import importlib.metadata
import logging
from typing import Any

NEEDED = '0.4; tasks are run by the package lm-eval: pip install "elastic-lm[harness]"'


def harness(module: str = "") -> Any:
    """`lm_eval`, or one of its modules.

    Args:
      module: such as "evaluator"; "" = the package itself.

    Raises:
      ValueError: it is not installed, or in another version than the one that this package knows.
    """
    # Tasks of the Hub ask for packages of their own; what they miss is their own error.
    try:
        version = importlib.metadata.version("lm-eval")
    except importlib.metadata.PackageNotFoundError as error:
        raise ValueError(f"lm-eval=None: must be {NEEDED}") from error
    if not version.startswith("0.4."):
        raise ValueError(f"lm-eval={version!r}: must be {NEEDED}")
    quiet_unless_debugging()
    return importlib.import_module(f"lm_eval.{module}" if module else "lm_eval")


def quiet_unless_debugging() -> None:
    """Leaves the harness's own warnings out, unless somebody has asked for its log."""
    logger = logging.getLogger("lm_eval")
    if logger.level == logging.NOTSET:
        logger.setLevel(logging.ERROR)
