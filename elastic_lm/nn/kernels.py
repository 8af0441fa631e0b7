"""Attention kernels of TPUs and GPUs, for training steps: no logits of T x T numbers in memory.

    splash    TPU: jax's Pallas kernel; causal, windows, packed rows, softcap
    cudnn     NVIDIA: cuDNN's through jax, in half precision; packed rows as a [T, T] mask, which is small
              beside the logits of all heads
    xla       everywhere: `nn.attention.attend`, in chunks where rows are long

A step names its kernel while it is traced (`attention_by`); without a name, as in decoding, it is `xla`. A
kernel counts positions by columns, as those of a batch (`data.batch.Batch`) do within a document.
"""

import contextlib
import dataclasses
import functools
from collections.abc import Callable, Iterator, Sequence
from contextvars import ContextVar
from typing import Any, Literal

import jax
import jax.numpy as jnp
from jax.sharding import Mesh, PartitionSpec

from elastic_lm.config.checks import require
from elastic_lm.nn import sequence
from elastic_lm.nn.placement import ROWS

AttentionKernel = Literal["auto", "xla", "cudnn", "splash"]
PLATFORMS = {"splash": ("tpu", "TPUs"), "cudnn": ("gpu", "NVIDIA GPUs")}
LANES = 128  # of a TPU; rows and keys come in blocks of a multiple
BLOCKS = (512, 256, 128)  # the largest that divides a row


@dataclasses.dataclass(frozen=True)
class Kernel:
    """A kernel that a step was told to use.

    Attributes:
      name: "splash" or "cudnn".
      mesh: of the arrays; None = one device.
      required: a layer that it does not serve is an error; else such a layer uses `attend`.
      interpret: run anywhere, slowly, for tests: Pallas' interpreter, or jax's own attention for cuDNN's.
    """

    name: str
    mesh: Mesh | None = None
    required: bool = False
    interpret: bool = False


_KERNEL: ContextVar[Kernel | None] = ContextVar("attention kernel", default=None)


@contextlib.contextmanager
def attention_by(kernel: Kernel | None) -> Iterator[None]:
    """What is traced inside computes attention by a kernel; None = by XLA."""
    token = _KERNEL.set(kernel)
    try:
        yield
    finally:
        _KERNEL.reset(token)


def choose(name: AttentionKernel, mesh: Mesh | None) -> Kernel | None:
    """The kernel of a step, by the platform of its devices.

    Args:
      name: "auto" takes splash on TPUs, where the layer can use it. cuDNN's is taken by name alone: nobody
        has run it here yet.
      mesh: of the step; None = the default device.

    Returns:
      The kernel; None = XLA.

    Raises:
      ValueError: the devices do not have this kernel.
    """
    device = jax.devices()[0] if mesh is None else mesh.devices.flat[0]
    platform = {"cuda": "gpu"}.get(device.platform, device.platform)
    if name == "auto":
        return Kernel("splash", mesh) if platform == "tpu" else None
    if name == "xla":
        return None
    wanted, words = PLATFORMS[name]
    fix = f"runs on {words}, and the devices are {platform}: set 'auto'"
    require(platform == wanted, "train.attention", name, fix)
    return Kernel(name, mesh, required=True)


def current() -> Kernel | None:
    """The kernel of what is traced now."""
    return _KERNEL.get()


def unserved(kernel: Kernel, q_BTNH: jax.Array, kv_heads: int, *, softcap: float) -> str:
    """Why a kernel does not serve a layer, by the shapes and options of attention; "" = it does.

    Args:
      kernel: which.
      q_BTNH: queries.
      kv_heads: key/value heads.
      softcap: of the logits.
    """
    _, t, _, h = q_BTNH.shape
    if sequence.parts() > 1:
        return "a mesh with a sequence axis divides the queries"
    if kernel.mesh is not None and kv_heads % kernel.mesh.shape["tensor"]:
        return f"{kv_heads} key/value heads are not divided by mesh.tensor={kernel.mesh.shape['tensor']}"
    if kernel.name == "splash":
        if t % LANES:
            return f"rows of {t} tokens are no multiple of {LANES}"
        return f"head_dim={h} is above {LANES} and no multiple of it" if h > LANES and h % LANES else ""
    if not kernel.interpret and q_BTNH.dtype not in (jnp.bfloat16, jnp.float16):
        return f"activations are {q_BTNH.dtype}, not bfloat16 or float16"
    if softcap:
        return f"softcap={softcap} of the logits"
    return f"head_dim={h} is above 128 or no multiple of 8" if h % 8 or h > 128 else ""


def splash(
    kernel: Kernel,
    q_BTNH: jax.Array,
    k_BKSH: jax.Array,
    v_BKSH: jax.Array,
    segments_BT: jax.Array | None,
    window: int | jax.Array,
    windows: Sequence[int],
    *,
    scale: float,
    softcap: float,
) -> jax.Array:
    """Causal attention [B, T, N, H] of TPUs, which reads each block of keys that a query block can see.

    Args:
      kernel: with the mesh, over which rows and heads are divided.
      q_BTNH: queries, already rotated.
      k_BKSH: keys of the same tokens.
      v_BKSH: values.
      segments_BT: document ids; None = one document per row.
      window: of the layer; 0 = all. Traced if a scan runs layers of several windows.
      windows: the values that a traced window can have; static.
      scale: multiplies q.k; static.
      softcap: of the logits, 0 = off; static.
    """
    # Of a model without windows, `jax.checkpoint` traces the 0 that every layer is given.
    window = window if windows else 0
    q_BNTH = jnp.moveaxis(q_BTNH, 1, 2) * jnp.asarray(scale, q_BTNH.dtype)
    b, _, t, _ = q_BNTH.shape
    segments_BT = jnp.ones((b, t), jnp.int32) if segments_BT is None else segments_BT

    def run(q: jax.Array, k: jax.Array, v: jax.Array, segments: jax.Array, size: int) -> jax.Array:
        make = functools.partial(_splash_kernel, q.shape[1], t, size, softcap, kernel.interpret)
        return jax.vmap(make())(q, k, v, segments)

    def by_window(
        q: jax.Array, k: jax.Array, v: jax.Array, segments: jax.Array, index: jax.Array
    ) -> jax.Array:
        if isinstance(window, int):
            return run(q, k, v, segments, window)
        sizes = sorted(set(windows))
        branches = [functools.partial(run, size=size) for size in sizes]
        return jax.lax.switch(index, branches, q, k, v, segments)

    found = jnp.asarray(window) == jnp.asarray(sorted(set(windows)) or [0])
    given = q_BNTH, k_BKSH, v_BKSH, segments_BT, jnp.argmax(found)

    # Pallas' calls are divided by hand: every device has its rows and its heads.
    if kernel.mesh is not None and kernel.mesh.size > 1:
        heads = PartitionSpec(ROWS, "tensor")
        by_window = jax.shard_map(
            by_window,
            mesh=kernel.mesh,
            in_specs=(heads, heads, heads, PartitionSpec(ROWS), PartitionSpec()),
            out_specs=heads,
            check_vma=False,
        )
    return jnp.moveaxis(by_window(*given), 2, 1).astype(q_BTNH.dtype)


def _splash_kernel(heads: int, t: int, window: int, softcap: float, interpret: bool) -> Callable[..., Any]:
    """(q [N, T, H], k, v [K, T, H], segments [T]) -> [N, T, H] for one row."""
    from jax.experimental.pallas.ops.tpu import splash_attention as library  # late: it takes a second

    one = library.LocalMask((t, t), (window - 1, 0), 0) if window else library.CausalMask((t, t))
    block = next(size for size in BLOCKS if t % size == 0)
    sizes = library.BlockSizes(
        block_q=block,
        block_kv=block,
        block_q_dkv=block,
        block_kv_dkv=block,
        block_q_dq=block,
        block_kv_dq=block,
    )
    run = library.make_splash_mha(
        library.MultiHeadMask([one] * heads),
        block_sizes=sizes,
        attn_logits_soft_cap=softcap or None,
        head_shards=1,
        q_seq_shards=1,
        interpret=interpret,
    )
    return lambda q, k, v, segments: run(q, k, v, library.SegmentIds(segments, segments))


def cudnn(
    kernel: Kernel,
    q_BTNH: jax.Array,
    k_BKSH: jax.Array,
    v_BKSH: jax.Array,
    seen_BTS: jax.Array,
    *,
    scale: float,
) -> jax.Array:
    """Attention [B, T, N, H] by cuDNN.

    Args:
      kernel: whether jax's own attention stands in for it.
      q_BTNH: queries, already rotated.
      k_BKSH: keys.
      v_BKSH: values.
      seen_BTS: the keys that each query sees.
      scale: multiplies q.k; static.
    """
    return jax.nn.dot_product_attention(
        q_BTNH,
        jnp.moveaxis(k_BKSH, 1, 2),
        jnp.moveaxis(v_BKSH, 1, 2),
        mask=seen_BTS[:, None],
        scale=scale,
        implementation="xla" if kernel.interpret else "cudnn",
    )
