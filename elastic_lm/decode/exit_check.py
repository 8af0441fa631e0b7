"""Decides after each segment which rows emit: cheap gate first, then vocabulary head, then confidence.

The vocabulary head of an exit reads a matrix as large as the vocabulary, which costs more than the rest of
the decision. It is therefore read only for rows that pass three checks, which cost almost nothing: the
threshold can be reached, the exit's gate (a small classifier of the hidden state) gives a probability that is
high enough, and so is a confidence that needs no logits.
"""

import dataclasses
from collections.abc import Callable

import jax
import jax.numpy as jnp

from elastic_lm.decode.lossless import newest_token
from elastic_lm.decode.sampling import BROKEN
from elastic_lm.decode.segment import Segment, TickOutput
from elastic_lm.decode.state import DecodeState, Emissions
from elastic_lm.depth.confidence import (
    Evidence,
    confidence_by_index,
    confidence_without_logits,
    reads_gate,
    reads_logits,
)
from elastic_lm.models.decoder import softcapped
from elastic_lm.nn.preview import HeadPreview, preview_logits


def check_exit(
    segment: Segment,
    state: DecodeState,
    emissions: Emissions,
    output: TickOutput,
    *,
    asking_B: jax.Array,
    room_B: jax.Array,
) -> Emissions:
    """Reads the vocabulary head after a segment for the rows that ask, and lets the confident ones emit.

    Args:
      segment: the segment that ran.
      state: after its tick.
      emissions: of the segments below.
      output: what the tick computed at each row's newest position.
      asking_B: bool, rows whose newest token has just passed the segment.
      room_B: int32 positions that each row may have pending, from `lossless.drafting_room`.

    Returns:
      `emissions`, and those of the asking rows that are confident; after the last layer all of them are.
    """
    if segment.is_last:
        return _check_last(segment, emissions, output, asking_B)

    controls, j = segment.controls, segment.index
    features, state_confidence_B = output.features, output.state_confidence
    assert features is not None
    assert state_confidence_B is not None

    threshold_B = _threshold(segment, state)
    eager_B = looks(segment, state, asking_B=asking_B, room_B=room_B)

    def look() -> Emissions:
        # What is known without the logits may already rule a row out.
        evidence = Evidence(state=state_confidence_B, gate=_gate(segment, eager_B, features))
        known_B = confidence_without_logits(controls.metric, evidence)
        # NaN reaches no threshold: unless it passes here, an exit that is damaged would only seem unsure.
        unknown_B = jnp.isnan(evidence.gate) | (~reads_logits(controls.metric) & jnp.isnan(known_B))
        passing_B = eager_B & (reads_logits(controls.metric) | (known_B >= threshold_B) | unknown_B)
        if segment.config.exits[j].gate:
            passing_B &= (evidence.gate >= controls.gates[:, j]) | unknown_B

        def head() -> Emissions:
            # A row that leaves whatever its confidence takes its token from the whole head where need be.
            logits, sure_B = exit_logits(segment, features, passing_B & (threshold_B <= 0))

            # The metrics are branches of one `switch`: the metric is traced, changing it compiles nothing,
            # and only the one in use is computed.
            confidence_B = confidence_by_index(controls.metric, logits, evidence)
            confident_B = passing_B & sure_B & (confidence_B >= threshold_B)

            # CALM's rule for batches: either all rows leave here, or none.
            confident_B &= ~controls.together | jnp.all(confident_B == asking_B)

            broken_B = passing_B & (unknown_B | (sure_B & jnp.isnan(confidence_B)))
            found = _with_rows(emissions, confident_B | broken_B, logits, segment.stop)
            return dataclasses.replace(found, tokens=jnp.where(broken_B, BROKEN, found.tokens))

        return jax.lax.cond(jnp.any(passing_B), head, lambda: emissions)

    return jax.lax.cond(jnp.any(eager_B), look, lambda: emissions)


def looks(segment: Segment, state: DecodeState, *, asking_B: jax.Array, room_B: jax.Array) -> jax.Array:
    """[B] bool: rows that look at the exit after a segment; arguments as in `check_exit`."""
    # A lossless row that has drafted all it may waits for the full model, whose token needs no verification.
    last_draft_B = segment.controls.lossless & (state.done[0] - state.done[-1] >= room_B)
    # No confidence is above 1, so a larger threshold is never reached.
    return asking_B & (_threshold(segment, state) <= 1.0) & ~last_draft_B


def _threshold(segment: Segment, state: DecodeState) -> jax.Array:
    """[B] float32 of the exit after a segment, at each row's newest position."""
    newest = (state.length - 1)[:, None]
    return jnp.take_along_axis(segment.controls.thresholds[:, segment.index], newest, axis=1)[:, 0]


def _check_last(segment: Segment, emissions: Emissions, output: TickOutput, asking_B: jax.Array) -> Emissions:
    """After the last layer there is nothing to decide: every row that asks emits."""

    if output.deep is not None:
        # The full model has drawn a token at every position that it verified, the newest one included.
        return dataclasses.replace(
            emissions,
            rows=emissions.rows | asking_B,
            tokens=jnp.where(
                asking_B & (emissions.tokens != BROKEN), newest_token(output.deep), emissions.tokens
            ),
            depth=jnp.where(asking_B, segment.stop, emissions.depth),
        )

    features = output.features
    assert features is not None

    def head() -> Emissions:
        logits = final_logits(segment, features, asking_B)
        return _with_rows(emissions, asking_B, logits, segment.stop)

    return jax.lax.cond(jnp.any(asking_B), head, lambda: emissions)


def exit_logits(
    segment: Segment, features_B1D: jax.Array, leaving_B: jax.Array
) -> tuple[jax.Array, jax.Array]:
    """Logits of a segment's exit, previewed where it reads the model's own head.

    Args:
      segment: one with an exit.
      features_B1D: input of the exit's vocabulary head.
      leaving_B: bool, rows that leave here for certain; the whole head is read where their preview is unsure.

    Returns:
      (float32 logits [B, V]; [B] bool, whether they can be relied on. A row without goes deeper.)
    """
    e = segment.config.exits[segment.index]
    if segment.preview is None or not e.tied:
        logits_BV = segment.decoder.exit_logits(segment.index, features_B1D)[:, 0]
        return logits_BV, jnp.ones(logits_BV.shape[:1], bool)

    def whole() -> jax.Array:
        return segment.decoder.exit_logits(segment.index, features_B1D)[:, 0]

    return _previewed(segment, segment.preview, features_B1D, leaving_B, whole, e.temperature)


def final_logits(segment: Segment, features_B1D: jax.Array, asking_B: jax.Array) -> jax.Array:
    """[B, V] float32 logits of the full model, previewed for the rows in which the preview is sure."""

    def whole() -> jax.Array:
        return segment.decoder.final_logits(features_B1D)[:, 0]

    if segment.preview is None:
        return whole()
    return _previewed(segment, segment.preview, features_B1D, asking_B, whole)[0]


def _previewed(
    segment: Segment,
    preview: HeadPreview,
    features_B1D: jax.Array,
    certain_B: jax.Array,
    whole: Callable[[], jax.Array],
    temperature: float = 1.0,
) -> tuple[jax.Array, jax.Array]:
    """Logits by a preview, or for unsure rows of `certain_B` by `whole`; and which can be relied on."""
    found = preview_logits(preview, features_B1D, segment.decoder.final_head())
    previewed_BV = softcapped(segment.config, found.logits, temperature)[:, 0]
    sure_B = found.gap[:, 0] >= preview.margin

    # Which rows read the whole head depends on each row alone, so that rows stay what they are alone.
    unsure_B = certain_B & ~sure_B
    whole_BV = jax.lax.cond(jnp.any(unsure_B), whole, lambda: previewed_BV)
    return jnp.where(unsure_B[:, None], whole_BV, previewed_BV), sure_B | certain_B


def _with_rows(emissions: Emissions, rows_B: jax.Array, logits_BV: jax.Array, depth: int) -> Emissions:
    """The emissions with those of more rows, all at one depth."""
    return dataclasses.replace(
        emissions,
        rows=emissions.rows | rows_B,
        logits=jnp.where(rows_B[:, None], logits_BV, emissions.logits),
        depth=jnp.where(rows_B, depth, emissions.depth),
    )


def _gate(segment: Segment, eager_B: jax.Array, features: jax.Array) -> jax.Array:
    """[B] float32 of the exit's gate, 0 where the exit has none or nothing depends on it."""
    controls, j = segment.controls, segment.index
    nothing = jnp.zeros(eager_B.shape, jnp.float32)
    if not segment.config.exits[j].gate:
        return nothing

    needed = jnp.any(eager_B & (controls.gates[:, j] > 0)) | reads_gate(controls.metric)
    return jax.lax.cond(needed, lambda: segment.decoder.exit_gate(j, features)[:, 0], lambda: nothing)
