"""Parquet files as records, read by pyarrow, which comes with the extra `parquet`."""

import functools
import importlib
from pathlib import Path
from typing import Any

from elastic_lm.config.data import PARQUET_SUFFIX


def is_parquet(path: Path) -> bool:
    """Whether a file's name says that it is Parquet."""
    return path.name.lower().endswith(PARQUET_SUFFIX)


def row_count(path: Path) -> int:
    """Rows of a file.

    Raises:
      ValueError: pyarrow is missing, or the file is no Parquet, or has no rows.
    """
    count = _table(path, path.stat().st_mtime_ns).num_rows
    if not count:
        raise ValueError(f"{path}: has no rows; remove it from the data paths")
    return count


def row(path: Path, index: int) -> dict[str, Any]:
    """One row of a file as Python values."""
    return _table(path, path.stat().st_mtime_ns).slice(index, 1).to_pylist()[0]


@functools.lru_cache(maxsize=64)
def _table(path: Path, modified: int) -> Any:
    """A file as it was at this time; its columns are held in memory."""
    try:
        pyarrow: Any = importlib.import_module("pyarrow")
        parquet: Any = importlib.import_module("pyarrow.parquet")
    except ImportError as error:
        raise ValueError(
            f'{path}: Parquet is read with pyarrow; install it: pip install "elastic-lm[parquet]"'
        ) from error
    try:
        return parquet.read_table(path, memory_map=True)
    except (pyarrow.ArrowException, OSError) as error:
        raise ValueError(f"{path} is not a complete Parquet file: {error}") from error
