"""Which ticks the decode loop will run over a text that is known, counted without running the model.

For a text x of which is known where an exit would be confident (leaves) and where its token is the full
model's (agrees), the rules of `loop` say what every iteration does: how many positions the lowest segment
runs over, whether the exit's vocabulary head is looked at, how many positions a deep tick takes, and whether
the model's own head is read. With the measured time of each of these parts,

    seconds of a text = sum over its iterations of (shallow + look + deep + head)

Only one exit is foreseen. A lossless text is the full model's, so that everything up to a wrong draft is
foreseen exactly; of drafts behind a wrong one it is assumed that the exit is as confident as it is on the
text itself. Without verification the exits change the text, which then takes another course: the counts are
those of a text like it.
"""

import collections
import dataclasses
from collections.abc import Callable, Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from elastic_lm.config.checks import require
from elastic_lm.config.model import ModelConfig
from elastic_lm.decode import lookup as prompt_lookup
from elastic_lm.decode.loop import tick_widths
from elastic_lm.decode.sampler import FIRST_DRAFT
from elastic_lm.decode.settings import Settings, bucket, make_controls
from elastic_lm.decode.state import FREE, Controls, DecodeState
from elastic_lm.decode.tick_costs import TickCosts

UNKNOWN = -3  # stands for a draft that is not the text's token, whatever it is


class Iteration(NamedTuple):
    """What one iteration of the loop runs.

    Attributes:
      shallow: width of the lowest segment's tick, 0 where none runs; of a model without exits, all layers.
      looked: whether the exit's vocabulary head is read.
      deep: width of the deep tick, 0 where none runs.
      final: whether the model's own vocabulary head is read for a new token.
    """

    shallow: int
    looked: bool
    deep: int
    final: bool


@dataclasses.dataclass(frozen=True)
class KnownText:
    """One row: a prompt, its continuation, and what an exit says about each token of the latter.

    Attributes:
      prompt: token ids.
      new: token ids of the continuation, T of them.
      leaves: [T] bool, the exit is confident before the token; empty for a model without exits.
      agrees: [T] bool, the exit's token is the full model's; likewise.
    """

    prompt: Sequence[int]
    new: Sequence[int]
    leaves: np.ndarray = dataclasses.field(default_factory=lambda: np.zeros(0, bool))
    agrees: np.ndarray = dataclasses.field(default_factory=lambda: np.zeros(0, bool))


@dataclasses.dataclass(frozen=True)
class Schedule:
    """What the loop runs over a batch.

    Attributes:
      iterations: how often each kind of iteration runs.
      tokens: emitted tokens of all rows.
      drafted: tokens that were drafted and verified.
      accepted: those of them that were right.
      verifications: how often positions of a row were verified.
    """

    iterations: collections.Counter[Iteration]
    tokens: int
    drafted: int = 0
    accepted: int = 0
    verifications: int = 0

    def __add__(self, other: "Schedule") -> "Schedule":
        """One batch after the other."""
        return Schedule(
            self.iterations + other.iterations,
            self.tokens + other.tokens,
            self.drafted + other.drafted,
            self.accepted + other.accepted,
            self.verifications + other.verifications,
        )


@dataclasses.dataclass
class _Rows:
    """The state of the loop as far as it decides what runs; every array is [B] or [B, S]."""

    tokens: np.ndarray  # int32, the whole text
    wrong: np.ndarray  # bool, the token is a draft that is not the text's
    copied: np.ndarray  # bool
    length: np.ndarray
    limit: np.ndarray
    first: np.ndarray  # position before the first new token
    done: np.ndarray  # [2, B]; the same twice without exits
    draft: np.ndarray
    waits: np.ndarray
    ended: np.ndarray
    alive: np.ndarray

    @property
    def pending(self) -> np.ndarray:
        """Positions that only the lowest segment has processed."""
        return self.done[0] - self.done[1]


Drafts = Callable[[_Rows, np.ndarray], np.ndarray]  # appends drafts to the rows that ask; [B] how many


def foresee(
    texts: Sequence[KnownText],
    *,
    window: int,
    exits: bool,
    lossless: bool = False,
    lookup: TickCosts | None = None,
    config: ModelConfig | None = None,
) -> Schedule:
    """Counts the iterations of a batch by the rules of `loop.run`.

    Args:
      texts: the rows of the batch.
      window: W.
      exits: the model has one exit, and its threshold can be reached.
      lossless: the rows are verified.
      lookup: rows draft from their own text, as much as these measured times justify; None = they do not.
        Needs `lossless`.
      config: of the model; only read where rows look up.

    Returns:
      The schedule. Where rows look up and the model has an exit, the exit is looked at throughout: that exits
      rest while they cost more than they bring (`exit_balance`) is not foreseen.

    Raises:
      ValueError: rows look up without being verified, or without a config.
    """
    require(lossless or lookup is None, "lookup", "given", "drafts for lossless rows only; set lossless=True")
    rows = _begin(texts, window)
    drafts = None if lookup is None else _drafts(texts, window, lookup, config)
    leaves, agrees = (
        _padded([getattr(t, n) for t in texts], rows.tokens.shape) for n in ("leaves", "agrees")
    )
    iterations: collections.Counter[Iteration] = collections.Counter()
    drafted = accepted = verifications = 0
    b = np.arange(len(texts))

    while rows.alive.any():
        room = np.minimum(rows.draft + 1, window) if lossless else np.full(len(texts), window)
        asking = rows.alive & ~rows.ended & ~rows.waits & (rows.done[0] == rows.length - 1)
        if exits:
            asking &= rows.pending < room
        copies = np.zeros(len(texts), int)
        if drafts is not None and asking.any():
            copies = drafts(rows, asking)

        shallow = 0
        if asking.any():
            # Without exits, an iteration without copies is one of full depth.
            copying = drafts is not None and (exits or copies.any())
            widths = prompt_lookup.tick_widths(window)[0 if exits else 1 :] if copying else (1,)
            shallow = _width(widths, int(np.max((rows.length - rows.done[0])[asking])))
        rows.done[0, asking] = rows.length[asking]

        # The exit: rows that have copied, or drafted all they may, wait for the full model.
        emits = np.zeros(len(texts), bool)
        looked = False
        if exits:
            last_draft = lossless & (rows.pending >= np.where(copies > 0, 0, room))
            eager = asking & ~last_draft
            looked = bool(eager.any())
            emits = eager & leaves[b, rows.length - 1 - rows.first]
            rows.waits[asking] = ~emits[asking]
            waiting = rows.alive & (rows.waits | (rows.ended & (rows.pending > 0)))
            full = rows.alive & (rows.pending >= np.maximum(room, 1))
            fires = bool(waiting.any() | full.any())
            final = rows.alive & rows.waits if fires else np.zeros_like(emits)
        else:
            fires, final = bool(asking.any()), asking

        begin = rows.done[1].copy()
        deep = 0
        if fires:
            if exits:
                deep = _width(tick_widths(window), int(rows.pending.max()))
            rows.done[1] = rows.done[0]
        if lossless and fires:
            # A row whose exit is confident in the iteration that verifies it takes the full model's token.
            final = final | (emits & (rows.done[1] == rows.length))
            verifications += int((rows.done[1] > begin).sum())
            rejected, checked, right = _verify(rows, begin, window)
            drafted, accepted = drafted + int(checked.sum()), accepted + int(right.sum())
            final, emits = final & ~rejected, emits & ~rejected

        iterations[Iteration(shallow, looked, deep, bool(final.any()))] += 1
        by_exit = emits & ~final
        wrong = lossless & by_exit & ~agrees[b, rows.length - 1 - rows.first]
        _emit(rows, emits | final, wrong)
        verified = (rows.done[1] >= rows.length - 1) | (not lossless)
        rows.alive &= ~(rows.ended & verified)

    tokens = sum(len(text.new) for text in texts)
    return Schedule(iterations, tokens, drafted, accepted, verifications)


def _begin(texts: Sequence[KnownText], window: int) -> _Rows:
    """The rows after prefill; `tokens` hold all of the text, though only `length` of them are known yet."""
    length = np.array([len(text.prompt) for text in texts])
    limit = np.array([len(text.prompt) + len(text.new) for text in texts])
    capacity = bucket(int(limit.max()) + window)
    tokens = _padded([np.array([*t.prompt, *t.new], np.int32) for t in texts], (len(texts), capacity))

    def none() -> np.ndarray:
        return np.zeros((len(texts), capacity), bool)

    nobody = np.zeros(len(texts), bool)
    return _Rows(
        tokens, none(), none(), length.copy(), limit, length - 1, np.stack([length - 1] * 2),
        np.full(len(texts), min(FIRST_DRAFT, max(window - 1, 1))), nobody.copy(), nobody.copy(),
        length < limit,
    )  # fmt: skip


def _padded(rows: Sequence[np.ndarray], shape: tuple[int, ...]) -> np.ndarray:
    padded = np.zeros(shape, rows[0].dtype)
    for row, values in zip(padded, rows, strict=True):
        row[: len(values)] = values
    return padded


def _width(widths: Sequence[int], pending: int) -> int:
    """The narrowest compiled tick that takes all pending positions."""
    return min(width for width in widths if width >= pending)


def _verify(rows: _Rows, begin: np.ndarray, window: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """`lossless.verify` on known texts: (rejected, checked drafts, accepted drafts), [B] each."""
    rejected = np.zeros(len(begin), bool)
    checked, right = np.zeros(len(begin), int), np.zeros(len(begin), int)
    for b, (start, stop) in enumerate(zip(begin, rows.done[1], strict=True)):
        span = np.arange(start + 1, min(stop, rows.length[b] - 1) + 1)
        if not len(span):
            continue
        wrong = rows.wrong[b, span]
        checked[b], rejected[b] = len(span), wrong.any()
        right[b] = int(wrong.argmax()) if rejected[b] else len(span)

        copied = rows.copied[b, span].any()
        if rejected[b]:
            position = span[right[b]]
            rows.wrong[b, position:] = rows.copied[b, position:] = False
            rows.length[b], rows.waits[b] = position + 1, False
            rows.done[:, b] = np.minimum(rows.done[:, b], position)
            rows.ended[b] = rows.length[b] >= rows.limit[b]
        if not copied:
            rows.draft[b] = max(right[b], 1) if rejected[b] else min(rows.draft[b] + 1, window - 1)
    return rejected, checked, right


def _emit(rows: _Rows, emitting: np.ndarray, wrong: np.ndarray) -> None:
    """`state.emit`: known tokens, or drafts that are not the text's."""
    for b in np.flatnonzero(emitting):
        position = rows.length[b]
        rows.wrong[b, position] = wrong[b]
        rows.length[b], rows.waits[b] = position + 1, False
        rows.ended[b] = rows.length[b] >= rows.limit[b]


def _drafts(
    texts: Sequence[KnownText],
    window: int,
    costs: TickCosts,
    config: ModelConfig | None,
) -> Drafts:
    """`lookup.draft` on known texts; what rows remember of their proposals stays on the device."""
    if config is None:
        raise ValueError("config=None: rows that look up need it; give the model's config")
    prompts = [text.prompt for text in texts]
    most = max(len(text.new) for text in texts)
    controls = make_controls(
        config.with_exits(()), prompts, most, 1 + max(map(len, prompts)) + most, Settings(ignore_eos=True),
        [None] * len(texts), lossless=np.ones(len(texts), bool), adapt=True, fire_share=0.0, together=False,
        tick_costs=costs.by_width,
    )  # fmt: skip
    controls = costs.put(controls)
    remembered = [prompt_lookup.no_proposals(len(texts), window)]

    def draft(rows: _Rows, asking: np.ndarray) -> np.ndarray:
        known = np.arange(rows.tokens.shape[1]) < rows.length[:, None]
        tokens = np.where(rows.wrong, UNKNOWN, rows.tokens) * known
        before = rows.length.copy()
        state = _draft(_device_state(rows, tokens, remembered[0]), controls, jnp.asarray(asking))
        remembered[0] = state.lookup
        found, length = jax.device_get((state.tokens, state.length))
        for b in np.flatnonzero(length > before):
            span = slice(before[b], length[b])
            rows.copied[b, span] = True
            rows.wrong[b, span] = found[b, span] != rows.tokens[b, span]
        rows.length = np.array(length)
        return rows.length - before

    return draft


@jax.jit
def _draft(state: DecodeState, controls: Controls, asking_B: jax.Array) -> DecodeState:
    """`lookup.draft`; everything is traced."""
    return prompt_lookup.draft(state, controls, asking_B)


def _device_state(rows: _Rows, tokens: np.ndarray, lookup: prompt_lookup.Lookup) -> DecodeState:
    """What `lookup.draft` reads of a decode state; nothing of it belongs to a model."""
    nothing = jnp.zeros(len(tokens), jnp.int32)
    return DecodeState(
        tokens=jnp.asarray(tokens, jnp.int32),
        exit_layers=jnp.zeros(tokens.shape, jnp.int32),
        length=jnp.asarray(rows.length, jnp.int32),
        limit=jnp.asarray(rows.limit, jnp.int32),
        alive=jnp.asarray(rows.alive),
        ended=jnp.asarray(rows.ended),
        wait=jnp.where(jnp.asarray(rows.waits), 0, FREE),
        done=jnp.asarray(rows.done, jnp.int32),
        hidden=(),
        cache=(),
        exit_cache=(),
        draft=jnp.asarray(rows.draft, jnp.int32),
        drafted=nothing,
        accepted=nothing,
        copied=nothing,
        verifications=nothing,
        lookup=lookup,
        ticks=jnp.zeros(2, jnp.int32),
    )
