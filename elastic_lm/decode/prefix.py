"""Keys and values that outlive a call: where a text begins as the last one did, it is not processed again.

With x_0 .. x_{n-1} the tokens whose keys and values are kept and y_0 .. y_{L-1} those of the next text, the
first

    k = max { i <= min(n, L - 1) : x_0 .. x_{i-1} = y_0 .. y_{i-1} }

positions are taken over, and one pass of all layers over the positions k .. L - 2 fills in the others. The
last token is left to the decode loop, as after any prefill. The pass is padded on the right to a power of
two; where that is more than there is room for, it begins earlier, and computes again what is known.

LongRoPE rotates a text's keys otherwise once the text is longer than the original context: nothing is taken
over between two texts of which one is longer than that.
"""

from collections.abc import Sequence
from typing import Any

import flax.struct
import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from elastic_lm.config.model import ModelConfig
from elastic_lm.decode import cache
from elastic_lm.decode.prefill import decode_state
from elastic_lm.decode.served import Served
from elastic_lm.decode.settings import bucket
from elastic_lm.decode.sharded import on_mesh
from elastic_lm.decode.state import DecodeState, Mode, segments
from elastic_lm.models.decoder import Params
from elastic_lm.width.nested_decoder import decoder_of


@flax.struct.dataclass
class Kept:
    """Caches of one row.

    Attributes:
      layers: one per layer, [1, K, S, H] each.
      exits: one per exit of kind `block`, else None.
    """

    layers: tuple[cache.LayerCache, ...]
    exits: tuple[cache.LayerCache | None, ...]


class PrefixCache:
    """Keys and values of a text, kept between calls for a text that begins alike.

    It holds one text: what a call of `Sampler.sample` or `Sampler.stream` has read and written. They stay in
    the memory of the device until another call, `clear`, or the end of this object.

    Attributes:
      tokens: ids of the text, as far as its keys and values are kept; [] = nothing is.
      reused: tokens of the last call's prompt that were not processed again.

    Example:
      ```python
      import elastic_lm as el
      from elastic_lm.testing import random_params, tiny_config

      config = tiny_config()
      sampler = el.Sampler(el.Decoder(config), random_params(config))

      prefix = el.PrefixCache()
      sampler.sample([1, 2, 3, 4], max_new_tokens=4, prefix=prefix)
      sampler.sample([1, 2, 3, 4, 5], max_new_tokens=4, prefix=prefix)
      assert prefix.reused == 4
      ```
    """

    def __init__(self) -> None:
        """Keeps nothing yet."""
        self.reused = 0
        self.clear()

    def clear(self) -> None:
        """Lets go of the text and its keys and values."""
        self.tokens: list[int] = []
        self._kept: Kept | None = None
        self._model: Served | None = None
        self._stretched = False

    def capacity(self, model: Served) -> int:
        """Positions per cache; 0 where nothing of this model is kept. They never shrink."""
        if self._kept is None or self._model is not model:
            return 0
        return self._kept.layers[0][0].shape[2]

    def begin(
        self,
        model: Served,
        prompt: Sequence[int],
        tokens_1P: jax.Array,
        limit_1: jax.Array,
        draft: jax.Array,
        *,
        capacity: int,
        window: int,
        lookup: bool,
    ) -> DecodeState | None:
        """The decode state of a prompt, or None where it begins as nothing that is kept.

        What was kept is in the state from then on, until `keep` takes it back.

        Args:
          model: that will run.
          prompt: token ids.
          tokens_1P: int32, the same, padded to their bucket.
          limit_1: int32 length at which the row ends.
          draft: as in `prefill.prefill`.
          capacity: positions per cache, at least P.
          window: as in `prefill.prefill`.
          lookup: as in `prefill.prefill`.
        """
        kept, known = self._kept, self.tokens if self._model is model else []
        alike = self._stretched == is_stretched(model.config, len(prompt))
        self.clear()
        most = min(len(known), len(prompt) - 1)
        differing = (i for i in range(most) if known[i] != prompt[i])
        self.reused = next(differing, most)
        if kept is None or not alike or not self.reused:
            self.reused = 0
            return None

        width = bucket(max(len(prompt) - 1 - self.reused, 1))
        start = min(self.reused, tokens_1P.shape[1] - width)
        if kept.layers[0][0].shape[2] < capacity:
            kept = _jit_grown(kept, capacity=capacity)
        return _jit_extend(
            model.config, model.params, kept, tokens_1P, jnp.int32(start), jnp.int32(len(prompt)), limit_1,
            draft, window=window, width=width, lookup=lookup, mesh=model.mesh,
        )  # fmt: skip

    def keep(self, model: Served, state: DecodeState, prompt_length: int, mode: Mode) -> None:
        """Keeps what a call has computed.

        Args:
          model: that ran.
          state: of one row, between two iterations; its caches are read later.
          prompt_length: tokens of the prompt.
          mode: of the loop; what it only approximates for early tokens is not kept.
        """
        if model.budget is not None:
            return  # routers have chosen widths for this text alone
        tokens, done = jax.device_get((state.tokens[0], state.done[-1, 0]))
        known = int(done) if mode != "propagate" else min(int(done), prompt_length - 1)
        self.tokens = np.asarray(tokens)[:known].tolist()
        self._kept, self._model = Kept(state.cache, state.exit_cache), model
        self._stretched = is_stretched(model.config, prompt_length)


def is_stretched(config: ModelConfig, prompt_length: int) -> bool:
    """Whether a call with a prompt of so many tokens rotates by the long factors of LongRoPE."""
    return 0 < config.recomputed_from < prompt_length


def extend(
    config: ModelConfig,
    params: Params,
    kept: Kept,
    tokens_1P: jax.Array,
    start: jax.Array,
    length: jax.Array,
    limit_1: jax.Array,
    draft: jax.Array,
    *,
    window: int,
    width: int,
    lookup: bool,
    mesh: Mesh | None = None,
) -> DecodeState:
    """`prefill.prefill` of a prompt whose first positions are in caches.

    Args:
      config: static.
      params: canonical parameters.
      kept: caches of S >= P positions, of which the first `start` are of this prompt.
      tokens_1P: int32 prompt, padded on the right.
      start: int32 scalar, first position that is processed; start + width <= P.
      length: int32 scalar, tokens of the prompt; start + width >= length - 1.
      limit_1: int32 length at which the row ends.
      draft: as in `prefill`.
      window: static, as in `prefill`.
      width: positions that are processed, static.
      lookup: static, as in `prefill`.
      mesh: static, as in `prefill`.

    Returns:
      DecodeState ready for `loop.run`.
    """
    decoder = decoder_of(config).bind({"params": params})
    start_1, length_11 = start[None], length[None, None]
    positions = start_1[:, None] + jnp.arange(width, dtype=jnp.int32)
    hidden = decoder.embed(jax.lax.dynamic_slice_in_dim(tokens_1P, start, width, axis=1), positions)

    layers: list[cache.LayerCache] = []
    exits: list[cache.LayerCache | None] = []
    for j, (first, stop) in enumerate(segments(config)):
        before = kept.layers[first:stop]
        past = [cache.past(layer, start_1) for layer in before]
        tap, new_kv = decoder.run_layers(hidden, positions, first, stop, past=past, lengths_BT=length_11)
        hidden = tap.hidden
        layers += cache.write_all(before, new_kv, hidden, start_1)
        if stop < config.n_layers:
            block = kept.exits[j]
            exit_past = None if block is None else cache.past(block, start_1)
            exit_hidden, exit_kv = decoder.exit_state(j, tap, positions, past=exit_past, lengths_BT=length_11)
            if block is not None and exit_kv is not None:
                block = cache.write(block, exit_kv, cache.after(exit_hidden, start_1))
            exits.append(block)

    capacity = kept.layers[0][0].shape[2]
    state = decode_state(
        config, tokens_1P, length[None], limit_1, draft,
        caches=layers, exit_caches=exits, capacity=capacity, window=window, lookup=lookup,
    )  # fmt: skip
    return on_mesh(state, mesh)


def _grown(kept: Kept, *, capacity: int) -> Kept:
    """The same entries in caches of more positions (static)."""
    return jax.tree.map(lambda x: jnp.pad(x, [(0, 0), (0, 0), (0, capacity - x.shape[2]), (0, 0)]), kept)


_jit_extend: Any = jax.jit(
    extend, static_argnames=("config", "window", "width", "lookup", "mesh"), donate_argnames="kept"
)
_jit_grown: Any = jax.jit(_grown, static_argnames=("capacity",))


def extensions() -> int:
    """Programs compiled so far in this process for prompts whose beginning is kept."""
    return _jit_extend._cache_size() + _jit_grown._cache_size()
