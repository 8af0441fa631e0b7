"""Where a run stands in its data, as a part of a training checkpoint, for any number of processes."""

import json
import re
from collections.abc import Awaitable, Sequence
from pathlib import Path
from typing import Any

import grain
import jax
import numpy as np

from elastic_lm.config.parse import parse_json
from elastic_lm.data.sharded import KEY
from elastic_lm.processes import settle

NAME = re.compile(r"process_(\d+)_of_(\d+)\.json")


class Position:
    """The position of a data iterator, as orbax saves and loads it.

    grain's own way writes JSON too, but then reads an empty remainder of a packed document, a tuple,
    as a list, which it takes for a remainder that is there; the resumed run would skip one document.
    """

    def __init__(self, batches: grain.DatasetIterator) -> None:
        self._batches = batches
        self._text = ""  # what was taken by the last save, which may go on while the iterator moves

    async def save(self, directory: Any) -> Awaitable[None]:
        """Takes the position now and writes it once `directory` exists."""
        self._text = json.dumps(self._batches.get_state())
        return self._write(directory)

    async def load(self, directory: Any) -> Awaitable[None]:
        """Moves the iterator."""
        return self._read(directory)

    def check(self, directory: Path) -> None:
        """Checks that `directory` holds the position that was taken.

        Raises:
          ValueError: it does not.
        """
        file = directory / _name(jax.process_index(), jax.process_count())
        if file.read_text() != self._text:
            raise ValueError(f"{file} differs from the position of the data")

    async def _write(self, directory: Any) -> None:
        name = _name(jax.process_index(), jax.process_count())
        ((await directory.await_creation()) / name).write_text(self._text)

    async def _read(self, directory: Any) -> None:
        self._batches.set_state(read_position(directory))


def read_position(directory: Any) -> Any:
    """The position that this process goes on from, whatever number of processes wrote it.

    Args:
      directory: with a file from each of them.

    Raises:
      ValueError: a file is missing or damaged, or other processes cannot go on from there; says why.
    """
    found = [match for file in directory.iterdir() if (match := NAME.fullmatch(file.name))]
    counts = {int(match[2]) for match in found}
    if not counts:
        raise ValueError(f"{directory} holds no position in the data")

    count = max(counts)
    names = [_name(i, count) for i in range(count)]
    missing = sorted({*names} - {match[0] for match in found})
    if missing:
        raise ValueError(f"{directory / missing[0]} is missing")
    positions = [_tuples(parse_json((directory / name).read_text())) for name in names]
    try:
        # Also where their number is the same: a process may have other rows than before.
        return joined(positions)
    except ValueError:
        if count != jax.process_count():
            raise
        return positions[jax.process_index()]


def joined(positions: Sequence[Any]) -> Any:
    """One position from those of all processes that wrote a checkpoint.

    Processes that all read the same data stand at the same place. Where each reads some shards of it, their
    positions together are that of all shards, of which a process takes what it reads.

    Args:
      positions: of every process.

    Raises:
      ValueError: the processes stood at places of their own, which say nothing to other processes.
    """
    first = positions[0]
    if all(position == first for position in positions):
        return first

    count = len(positions)
    if all(isinstance(position, dict) and KEY in position for position in positions):
        whole = {**first, KEY: {number: at for one in positions for number, at in one[KEY].items()}}
        # Every part of it must be what each process says.
        if all({**whole, **one, KEY: {**whole[KEY], **one[KEY]}} == whole for one in positions):
            return whole
    raise ValueError(
        f"the position in the data was saved by {count} processes that each had one of their own, and this "
        f"run has {jax.process_count()}: start {count} processes"
    )


def anywhere(error: Exception | None) -> Exception | None:
    """The error of this process, or one that says that another process had one; all of them call this."""
    if jax.process_count() == 1:
        return error
    from jax.experimental import multihost_utils

    settle()
    failed = np.flatnonzero(multihost_utils.process_allgather(np.asarray(error is not None)))
    if error is None and failed.size:
        return ValueError(f"process {failed[0]} cannot read it; see what it printed")
    return error


def _name(index: int, count: int) -> str:
    return f"process_{index}_of_{count}.json"


def _tuples(state: Any) -> Any:
    """JSON's lists as the tuples they were."""
    if isinstance(state, dict):
        return {key: _tuples(value) for key, value in state.items()}
    return tuple(map(_tuples, state)) if isinstance(state, list) else state
