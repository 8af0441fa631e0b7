"""Files of drafters, which `elastic-lm drafter` writes and `generate --drafter` reads."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from elastic_lm.config.checks import require
from elastic_lm.config.drafter import Drafter
from elastic_lm.config.parse import from_dict, parse_json, to_dict
from elastic_lm.files.atomic import write_text_whole

FORMAT = "elastic_lm drafter 1"


def save_drafter(drafter: Drafter, path: str | Path, findings: Mapping[str, Any] | None = None) -> None:
    """Writes a drafter to a JSON file, which appears whole or not at all.

    Args:
      drafter: what drafts.
      path: file to write.
      findings: what is known of it, JSON values by name; they are kept beside it, and not read.

    Example:
      ```python
      import tempfile

      import elastic_lm as el

      drafter = el.Drafter(el.Subnet.uniform(el.testing.tiny_config(), layers=(0, 3)))
      with tempfile.TemporaryDirectory() as folder:
          el.width.save_drafter(drafter, f"{folder}/drafter.json", {"acceptance": 0.6})
          assert el.width.load_drafter(f"{folder}/drafter.json") == drafter
      ```
    """
    fields = {"format": FORMAT, "drafter": to_dict(drafter), **(findings or {})}
    write_text_whole(str(path), json.dumps(fields, indent=2) + "\n")


def load_drafter(path: str | Path) -> Drafter:
    """Reads a drafter that `save_drafter` has written.

    Args:
      path: of the file.

    Raises:
      FileNotFoundError: there is no such file.
      ValueError: it holds no drafter; names what is wrong.

    Example:
      ```python
      import tempfile

      import elastic_lm as el

      drafter = el.Drafter(el.Subnet.uniform(el.testing.tiny_config(), mlp=0.5), no_attention=(2,))
      with tempfile.TemporaryDirectory() as folder:
          el.width.save_drafter(drafter, f"{folder}/drafter.json")
          print(el.width.load_drafter(f"{folder}/drafter.json").no_attention)
      ```
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"{path}: no such drafter; write one: elastic-lm drafter --out {path}")
    try:
        found = parse_json(path.read_text(encoding="utf-8"))
        require(isinstance(found, dict), "drafter", type(found).__name__, "must be an object of JSON")
        require(found.get("format") == FORMAT, "format", found.get("format"), f"must be {FORMAT!r}")
        return from_dict(Drafter, found.get("drafter"), "drafter.")
    except (ValueError, TypeError, AttributeError) as error:
        raise ValueError(
            f"{path}: not a usable drafter ({error}); write one: elastic-lm drafter --out {path}"
        ) from error
