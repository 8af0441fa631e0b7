"""What the processes that run one program together share: who writes, who waits, what they gather.

In one process nothing here does anything: no barrier, no gather, no connection. The command line imports this
module for its help, so that what is heavy is imported late.
"""

import contextlib
import re
from collections.abc import Callable, Iterator, Mapping
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import numpy as np

LONGEST = 4096  # bytes of a process's error that the others are told
# In messages of jax, gloo, NCCL and gRPC about a process that does not answer.
LOST = re.compile(
    r"[Gg]loo|NCCL|[Cc]onnection (reset|closed|refused)|Socket closed|UNAVAILABLE|DEADLINE_EXCEEDED|"
    r"[Hh]eartbeat|[Bb]arrier|coordination service|another task"
)


class LostProcess(ConnectionError):
    """Another of the processes that run one program together has ended, or cannot be reached."""


def is_first() -> bool:
    """Whether this process is the one that writes files and prints."""
    import jax

    return jax.process_index() == 0


def settle() -> None:
    """Waits for the programs of this process before it asks the others, where devices are CPUs.

    Accelerators run programs in the order that they are sent off. On a CPU, what asks the other processes
    could take the threads that a step needs which another process waits for.
    """
    import jax

    if jax.process_count() == 1 or jax.default_backend() != "cpu":
        return
    for array in jax.live_arrays():
        if not array.is_deleted():
            array.block_until_ready()


def lost_process(error: BaseException) -> str:
    """How a library says that another process is gone, in one line; "" = it says something else.

    A collective of gloo that breaks off is a `ValueError` of jax, and a barrier a `RuntimeError`.

    Args:
      error: what was raised.
    """
    text = " ".join(str(error).split())
    if not (isinstance(error, ValueError | RuntimeError) and LOST.search(text)):
        return ""
    import jax

    return text[:200] if jax.process_count() > 1 else ""


def wait_for_all(what: str) -> None:
    """Waits until all processes have come to this line.

    Args:
      what: name of the line, the same in all processes.
    """
    import jax

    if jax.process_count() > 1:
        from jax.experimental import multihost_utils

        settle()
        multihost_utils.sync_global_devices(what)


def bytes_of_all(data: bytes) -> list[bytes]:
    """What every process gives, in the order of the processes; all must call this.

    Args:
      data: of this process; lengths may differ.
    """
    import jax

    if jax.process_count() == 1:
        return [data]
    import numpy as np
    from jax.experimental import multihost_utils

    settle()
    lengths = np.asarray(multihost_utils.process_allgather(np.asarray([len(data)], np.int32))).reshape(-1)
    row = np.zeros(max(int(lengths.max()), 1), np.uint8)
    row[: len(data)] = np.frombuffer(data, np.uint8)
    rows = np.asarray(multihost_utils.process_allgather(row))
    return [row[:length].tobytes() for row, length in zip(rows, lengths, strict=True)]


def bytes_of_first(make: Callable[[], bytes]) -> bytes:
    """What process 0 makes, in all processes; only process 0 makes it.

    Args:
      make: gives the bytes; what it raises is raised in all processes.
    """
    made: list[bytes] = []
    with all_or_none():
        if is_first():
            made.append(make())
    return bytes_of_all(made[0] if made else b"")[0]


@contextlib.contextmanager
def all_or_none() -> Iterator[None]:
    """Runs a block that may refuse; where it does so in one process, it ends in all.

    Without this the others would wait for one that has left.

    Raises:
      ValueError: what another process refused.
    """
    import jax

    if jax.process_count() == 1:
        yield
        return
    try:
        yield
    except Exception as error:
        bytes_of_all(f"process {jax.process_index()}: {' '.join(str(error).split())}".encode()[:LONGEST])
        raise
    refused = [text.decode(errors="replace") for text in bytes_of_all(b"") if text]
    if refused:
        raise ValueError(refused[0])


def arrays_of_all(arrays: "Mapping[str, np.ndarray]") -> "list[dict[str, np.ndarray]]":
    """Host arrays of every process, in the order of the processes; all must call this.

    Args:
      arrays: of this process; shapes may differ between processes.
    """
    import numpy as np
    from safetensors.numpy import load, save

    own = {name: np.ascontiguousarray(array) for name, array in arrays.items()}
    return [load(data) if data else {} for data in bytes_of_all(save(own) if own else b"")]


def on_host(tree: Any) -> Any:
    """A tree of arrays as NumPy arrays, also where parts lie with other processes; all must call this.

    Args:
      tree: arrays. One that is spread over processes is put together on every device for the moment, one
        after the other.
    """
    import jax

    if jax.process_count() == 1:
        return jax.device_get(tree)
    settle()
    return jax.tree.map(_leaf_on_host, tree)


def _leaf_on_host(leaf: Any) -> "np.ndarray":
    import jax
    import numpy as np

    if not isinstance(leaf, jax.Array) or leaf.is_fully_addressable or leaf.is_fully_replicated:
        return np.asarray(leaf)
    from jax.experimental import multihost_utils

    return np.asarray(multihost_utils.process_allgather(leaf, tiled=True))


def is_spread(tree: Any) -> bool:
    """Whether arrays of a tree lie partly with other processes."""
    import jax

    arrays = (leaf for leaf in jax.tree.leaves(tree) if isinstance(leaf, jax.Array))
    return any(not array.is_fully_addressable for array in arrays)


def local_rows(sharding: Any, rows: int) -> tuple[int, ...] | None:
    """The rows of a batch that this process's devices hold, in increasing order.

    Args:
      sharding: of [rows, ...] arrays.
      rows: of the whole batch, a multiple of the devices that hold different ones.

    Returns:
      Numbers of rows; None = all of them.
    """
    import jax

    if jax.process_count() == 1:
        return None
    pieces = sharding.addressable_devices_indices_map((rows,)).values()
    held = sorted({row for (piece,) in pieces for row in range(*piece.indices(rows))})
    return None if len(held) == rows else tuple(held)


def whole_batch(sharding: Any, rows: int) -> int:
    """Rows of a whole batch, of which the devices of this process hold so many.

    Args:
      sharding: of [B, ...] arrays.
      rows: of this process.
    """
    import jax

    if jax.process_count() == 1:
        return rows
    count = sharding.num_devices
    own = local_rows(sharding, count)
    return rows if own is None else rows * count // len(own)


def host_rows(array: Any) -> "np.ndarray":
    """The rows of a [B, ...] array that this process's devices hold, in increasing order, on the host."""
    import jax

    if jax.process_count() == 1:
        return jax.device_get(array)
    import numpy as np

    pieces = {shard.index[0].indices(array.shape[0])[0]: shard.data for shard in array.addressable_shards}
    return np.concatenate([np.asarray(pieces[start]) for start in sorted(pieces)])
