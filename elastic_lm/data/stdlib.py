"""The Python standard library's own sources: text that every user of this package already has."""

import hashlib
import sysconfig
from pathlib import Path
from typing import Literal

Split = Literal["train", "calibration", "test"]
SHARES: dict[Split, range] = {
    "train": range(90),
    "calibration": range(90, 95),
    "test": range(95, 100),
}
# Tests, third-party packages, and tables written by programs.
LEFT_OUT = {"test", "tests", "idle_test", "site-packages", "dist-packages", "encodings", "pydoc_data"}


def stdlib_files(split: Split) -> list[Path]:
    """Files of one split of the running interpreter's standard library.

    A file's split depends on its path inside the library alone, so it is the same on every machine
    and for every Python version: what was trained on here is never tested on there.

    Args:
      split: "train" (90 %), "calibration" (5 %) or "test" (5 %).

    Returns:
      Paths in a fixed order.

    Raises:
      ValueError: no such split.
      FileNotFoundError: this interpreter ships no library sources.

    Example:
      ```python
      import elastic_lm as el

      held_out = el.data.stdlib_files("test")
      assert not set(held_out) & set(el.data.stdlib_files("train"))
      ```
    """
    if split not in SHARES:
        raise ValueError(f"split={split!r}: must be one of {', '.join(SHARES)}")
    root = Path(sysconfig.get_path("stdlib"))
    names = sorted(p.relative_to(root).as_posix() for p in root.rglob("*.py"))
    files = [root / name for name in names if _counts(name) and _bucket(name) in SHARES[split]]
    if not files:
        raise FileNotFoundError(f"no standard library sources under {root}; pass text of your own")
    return files


def _counts(name: str) -> bool:
    *folders, file = name.split("/")
    written = file.startswith("_sysconfigdata") or any(f.startswith("config-") for f in folders)
    return not (written or LEFT_OUT & set(folders))


def _bucket(name: str) -> int:
    return int.from_bytes(hashlib.sha256(name.encode()).digest()[:8], "big") % 100
