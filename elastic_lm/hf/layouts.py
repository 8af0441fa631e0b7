"""How one parameter of ours is laid out as one or several tensors of a Hugging Face checkpoint.

A `Layout` works in both directions, so a family's table is written once. All functions are plain
numpy and treat kernels [out..., in] and biases [out...] alike.
"""

import dataclasses
import math
from collections.abc import Callable, Sequence

import numpy as np

from elastic_lm.models.registry import Config

Shape = tuple[int, ...]


@dataclasses.dataclass(frozen=True)
class Layout:
    """A reversible arrangement of tensors.

    Attributes:
      shapes: (config, shape of the parameter) -> shapes of the checkpoint's tensors.
      join: (checkpoint's tensors, shape of the parameter) -> parameter.
      split: (config, parameter) -> checkpoint's tensors.
    """

    shapes: Callable[[Config, Shape], list[Shape]]
    join: Callable[[Sequence[np.ndarray], Shape], np.ndarray]
    split: Callable[[Config, np.ndarray], list[np.ndarray]]


def _qkv_rows(config: Config) -> list[int]:
    """Output features of the query, key and value projections."""
    c = config
    return [c.n_heads * c.head_dim, c.n_kv_heads * c.head_dim, c.n_kv_heads * c.head_dim]


def _qkv_shapes(config: Config, shape: Shape) -> list[Shape]:
    return [(rows, *shape[3:]) for rows in _qkv_rows(config)]


def _join_qkv(tensors: Sequence[np.ndarray], shape: Shape) -> np.ndarray:
    kv_heads, _, width, *tail = shape
    per_head = [t.reshape(kv_heads, -1, width, *tail) for t in tensors]
    return np.concatenate(per_head, axis=1)


def _split_qkv(config: Config, leaf: np.ndarray) -> list[np.ndarray]:
    parts = leaf[:, :-2], leaf[:, -2:-1], leaf[:, -1:]
    return [part.reshape(-1, *leaf.shape[3:]) for part in parts]


def _conv_qkv_shapes(config: Config, shape: Shape) -> list[Shape]:
    return [(*shape[3:], sum(_qkv_rows(config)))]


def _join_conv_qkv(tensors: Sequence[np.ndarray], shape: Shape) -> np.ndarray:
    return _join_qkv(_split_rows(tensors[0].T, shape), shape)


def _split_rows(rows: np.ndarray, shape: Shape) -> list[np.ndarray]:
    """Rows of queries, keys and values from all of them behind each other."""
    kv_heads, slots, width, *_ = shape
    each = kv_heads * width
    return np.split(rows, [(slots - 2) * each, (slots - 1) * each])


def _split_conv_qkv(config: Config, leaf: np.ndarray) -> list[np.ndarray]:
    return [np.concatenate(_split_qkv(config, leaf)).T]


# One tensor of the same shape.
SAME = Layout(
    shapes=lambda config, shape: [shape],
    join=lambda tensors, shape: tensors[0],
    split=lambda config, leaf: [leaf],
)

# One kernel stored [in, out] (GPT-2's Conv1D).
TRANSPOSED = Layout(
    shapes=lambda config, shape: [shape[::-1]],
    join=lambda tensors, shape: tensors[0].T,
    split=lambda config, leaf: [leaf.T],
)

# [K, G + 2, H, ...] stored as query [N * H, ...], key [K * H, ...] and value [K * H, ...].
QKV = Layout(_qkv_shapes, _join_qkv, _split_qkv)

# The same three behind each other in one Conv1D: [..., (N + 2K) * H].
CONV_QKV = Layout(_conv_qkv_shapes, _join_conv_qkv, _split_conv_qkv)

# The same three behind each other in one kernel: [(N + 2K) * H, ...] (Phi-3).
FUSED_QKV = Layout(
    shapes=lambda config, shape: [(sum(_qkv_rows(config)), *shape[3:])],
    join=lambda tensors, shape: _join_qkv(_split_rows(tensors[0], shape), shape),
    split=lambda config, leaf: [np.concatenate(_split_qkv(config, leaf))],
)

# The same in our own order, rows flattened: per head its query, key and value (GPT-NeoX, BLOOM, Falcon ...).
HEADWISE_QKV = Layout(
    shapes=lambda config, shape: [(math.prod(shape[:3]), *shape[3:])],
    join=lambda tensors, shape: tensors[0].reshape(shape),
    split=lambda config, leaf: [leaf.reshape(-1, *leaf.shape[3:])],
)

# [N, 2, H, D] stored as key and value [N * H, D] each.
KEY_VALUE = Layout(
    shapes=lambda config, shape: [(shape[0] * shape[2], *shape[3:])] * 2,
    join=lambda tensors, shape: np.stack([t.reshape(shape[0], *shape[2:]) for t in tensors], axis=1),
    split=lambda config, leaf: [leaf[:, i].reshape(-1, *leaf.shape[3:]) for i in range(2)],
)

# [N, H, D] stored as one kernel [N * H, D].
HEADS = Layout(
    shapes=lambda config, shape: [(shape[0] * shape[1], *shape[2:])],
    join=lambda tensors, shape: tensors[0].reshape(shape),
    split=lambda config, leaf: [leaf.reshape(-1, *leaf.shape[2:])],
)

# [2, F, ...] stored as gate [F, ...] and up [F, ...].
GATE_UP = Layout(
    shapes=lambda config, shape: [shape[1:], shape[1:]],
    join=lambda tensors, shape: np.stack(tensors),
    split=lambda config, leaf: [leaf[0], leaf[1]],
)

# The same behind each other in one kernel: [2 F, ...] (Phi-3).
FUSED_GATE_UP = Layout(
    shapes=lambda config, shape: [(shape[0] * shape[1], *shape[2:])],
    join=lambda tensors, shape: tensors[0].reshape(shape),
    split=lambda config, leaf: [leaf.reshape(-1, *leaf.shape[2:])],
)


def interleaved_qkv(rotary_dim: int) -> Layout:
    """`QKV` of a family that rotates neighbouring dimensions of a head, where we rotate its halves.

    Args:
      rotary_dim: leading dimensions of queries and keys that are rotated, even.
    """
    halves = np.arange(rotary_dim).reshape(-1, 2).T.reshape(-1)  # 0 2 4 ... 1 3 5 ...

    def join(tensors: Sequence[np.ndarray], shape: Shape) -> np.ndarray:
        leaf = _join_qkv(tensors, shape)  # a copy
        leaf[:, :-1, :rotary_dim] = leaf[:, :-1, halves]
        return leaf

    def split(config: Config, leaf: np.ndarray) -> list[np.ndarray]:
        theirs = leaf.copy()
        theirs[:, :-1, halves] = leaf[:, :-1, :rotary_dim]
        return _split_qkv(config, theirs)

    return Layout(_qkv_shapes, join, split)
