"""Whether a row has its token after a segment: gate, then vocabulary head, then confidence.

The head of an exit costs the reading of a vocabulary-sized matrix. It is read only where what costs next to
nothing says that it may pay: the threshold is not out of reach, the exit's gate (a small classifier of the
hidden state) gives enough, and a confidence that needs no logits (`cosine`, `learned`) is high enough.
"""

import flax.struct
import jax
import jax.numpy as jnp

from elastic_lm.config.model import ModelConfig
from elastic_lm.decode.lossless import deep_logits
from elastic_lm.decode.state import Controls, DecodeState, Emissions, segments
from elastic_lm.depth.confidence import LOGIT_METRICS, METRICS, Evidence, confidence_by_index
from elastic_lm.models.decoder import Decoder, Params
from elastic_lm.width.nested_decoder import decoder_of


@flax.struct.dataclass
class Found:
    """What a tick gives to the newest positions of the rows; one field or two, the others are None.

    Attributes:
      features: [B, 1, D] input of the segment's vocabulary head.
      cosine: [B] float32 similarity of the state to the last layer's input, 0 unless the metric asks;
        after segments with an exit.
      deep: [B, V + W] float32, see `verify.look_deep`; instead, after the last segment of a verifying loop.
    """

    features: jax.Array | None = None
    cosine: jax.Array | None = None
    deep: jax.Array | None = None


def check_exit(
    config: ModelConfig,
    params: Params,
    controls: Controls,
    answers: Emissions,
    j: int,
    asking_B: jax.Array,
    found: Found,
    state: DecodeState,
    room_B: jax.Array,
    window: int,
) -> Emissions:
    """Looks at the head after segment `j` for the rows that asked; confident rows have their answer.

    Args:
      config: static.
      params: canonical parameters.
      controls: traced.
      answers: those of the segments below.
      j: segment, static.
      asking_B: bool, rows whose newest token has just passed the segment.
      found: what the segment's tick gives to their newest positions.
      state: after the tick.
      room_B: int32, see `verify.drafting_room`.
      window: W, static.

    Returns:
      `answers` and those of the rows that asked and were sure; after the last layer every row is.
    """
    depth = segments(config)[j][1]
    decoder = decoder_of(config).bind({"params": params})
    features, cosine = found.features, found.cosine

    def answered(logits: jax.Array, confident_B: jax.Array) -> Emissions:
        return Emissions(
            rows=answers.rows | confident_B,
            logits=jnp.where(confident_B[:, None], logits, answers.logits),
            depth=jnp.where(confident_B, depth, answers.depth),
        )

    if depth == config.n_layers:

        def final() -> Emissions:
            if found.deep is not None:
                return answered(deep_logits(found.deep, window), asking_B)
            assert features is not None
            return answered(decoder.final_logits(features)[:, 0], asking_B)

        return jax.lax.cond(jnp.any(asking_B), final, lambda: answers)

    assert features is not None
    assert cosine is not None
    newest = (state.length - 1)[:, None]
    threshold_B = jnp.take_along_axis(controls.thresholds[:, j], newest, axis=1)[:, 0]
    last_draft = controls.lossless & (state.done[0] - state.done[-1] >= room_B)
    eager_B = asking_B & (threshold_B <= 1.0) & ~last_draft

    def look(eager_B: jax.Array) -> Emissions:
        learned = _gate(config, decoder, controls, j, eager_B, features)
        known = jnp.where(controls.metric == METRICS.index("cosine"), cosine, learned)
        before_head = controls.metric >= len(LOGIT_METRICS)
        passing_B = eager_B & (~before_head | (known >= threshold_B))
        if config.exits[j].gate:
            passing_B &= learned >= controls.gates[:, j]

        def head() -> Emissions:
            logits = decoder.exit_logits(j, features)[:, 0]
            sure = confidence_by_index(controls.metric, logits, Evidence(cosine, learned))
            confident_B = passing_B & (sure >= threshold_B)
            confident_B &= ~controls.together | jnp.all(confident_B == asking_B)
            return answered(logits, confident_B)

        return jax.lax.cond(jnp.any(passing_B), head, lambda: answers)

    return jax.lax.cond(jnp.any(eager_B), look, lambda _: answers, eager_B)


def _gate(
    config: ModelConfig,
    decoder: Decoder,
    controls: Controls,
    j: int,
    eager_B: jax.Array,
    features: jax.Array,
) -> jax.Array:
    """[B] float32 of exit `j`'s gate, 0 where the exit has none or nothing depends on it."""
    nothing = jnp.zeros(eager_B.shape, jnp.float32)
    if not config.exits[j].gate:
        return nothing
    needed = jnp.any(eager_B & (controls.gates[:, j] > 0)) | (controls.metric == METRICS.index("learned"))
    return jax.lax.cond(needed, lambda: decoder.exit_gate(j, features)[:, 0], lambda: nothing)
