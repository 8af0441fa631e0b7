"""The settings of one call, and the arrays that the decode loop makes of them.

What stays the same over the calls of a sampler are its options (`options.DecodeOptions`).
"""

import dataclasses
import numbers
from collections.abc import Sequence
from typing import Any, TypeGuard

import jax
import jax.numpy as jnp
import numpy as np

from elastic_lm.config.checks import (
    LARGEST_INT,
    is_truth,
    is_whole,
    require,
    require_at_least_1,
    require_ids,
    require_type,
)
from elastic_lm.config.model import ModelConfig
from elastic_lm.data.padding import padded
from elastic_lm.decode.sampling import Sampling
from elastic_lm.decode.state import Controls, segments
from elastic_lm.depth.confidence import NEVER_EXITS, metric_index
from elastic_lm.depth.policies import ExitPolicy, gate_row, threshold_table

# Settings that are numbers, and the kinds of NumPy's types that they may be of.
NUMBERS = {
    **dict.fromkeys(("temperature", "top_p", "min_p", "repetition_penalty"), "iuf"),
    **dict.fromkeys(("top_k", "seed"), "iu"),
}
STOP_SLOTS = 8  # more stop tokens take twice as many slots, which compiles the programs again
SMALLEST_BUCKET = 32


@dataclasses.dataclass(frozen=True)
class Settings:
    """How tokens are drawn and where text ends, in one call; a sequence gives one value per row.

    Attributes:
      temperature: at least 0; 0 = greedy.
      top_k: keep the k likeliest tokens; 0 = all.
      top_p: in [0, 1]; keep the smallest set of tokens whose probability reaches p; 1 = all.
      min_p: in [0, 1]; drop tokens less likely than min_p times the likeliest; 0 = none.
      repetition_penalty: positive; divides positive logits of tokens that are already in the row and
        multiplies negative ones; 1 = off.
      seed: row i of a batch draws with seed + i, or with the i-th seed of a sequence.
      stop: strings that end a row; they are not part of its text.
      stop_tokens: token ids that end a row, in addition to the model's own end tokens.
      ignore_eos: do not stop at the model's own end tokens.
    """

    temperature: float | Sequence[float] = 0.0
    top_k: int | Sequence[int] = 0
    top_p: float | Sequence[float] = 1.0
    min_p: float | Sequence[float] = 0.0
    repetition_penalty: float | Sequence[float] = 1.0
    seed: int | Sequence[int] = 0
    stop: tuple[str, ...] | str = ()
    stop_tokens: tuple[int, ...] = ()
    ignore_eos: bool = False

    def __post_init__(self) -> None:
        for name, kinds in NUMBERS.items():
            value = getattr(self, name)
            words = "whole numbers" if "f" not in kinds else "numbers"
            fix = f"must be finite {words}: one value, or one per prompt"
            try:
                values = np.asarray(value)
            except ValueError as error:  # rows of different lengths
                raise ValueError(f"{name}={value!r}: {fix}") from error
            require(values.dtype.kind in kinds and bool(np.isfinite(values).all()), name, value, fix)

        for name in ("stop", "stop_tokens"):
            object.__setattr__(self, name, _as_tuple(getattr(self, name)))
        texts = (self.stop,) if isinstance(self.stop, str) else self.stop
        right = is_several(texts) and all(isinstance(one, str) for one in texts)
        require(right, "stop", self.stop, "must be a text, or several")
        ids = self.stop_tokens
        right = is_several(ids) and not any(is_truth(one) for one in ids)
        right = right and all(isinstance(one, numbers.Integral) for one in ids)
        require(right, "stop_tokens", ids, "must be token ids, in a tuple")
        require_type("ignore_eos", self.ignore_eos, bool)

    def stop_strings(self) -> tuple[str, ...]:
        """The stop strings as a tuple.

        Raises:
          ValueError: one of them is empty, and every text contains the empty string.
        """
        stops = (self.stop,) if isinstance(self.stop, str) else tuple(self.stop)
        if "" in stops:
            raise ValueError(f"stop={self.stop!r}: a stop string needs at least one character")
        return stops

    def arrays(self, batch: int) -> Sampling:
        """Validated arrays with one entry for each of `batch` rows.

        Raises:
          ValueError: a value is out of range, or a sequence does not have one entry per row.
        """
        require_whole("seed", self.seed, 2**32 - 1)
        require_whole("top_k", self.top_k, LARGEST_INT)
        require_ids("stop_tokens", self.stop_tokens)
        seeds = np.asarray(self.seed, np.int64)
        seeds = (seeds + np.arange(batch)) % 2**32 if seeds.ndim == 0 else seeds

        return Sampling(
            temperature=self._row("temperature", batch, np.float32, 0.0, None),
            top_k=self._row("top_k", batch, np.int32, 0, None),
            top_p=self._row("top_p", batch, np.float32, 0.0, 1.0),
            min_p=self._row("min_p", batch, np.float32, 0.0, 1.0),
            repetition_penalty=self._row("repetition_penalty", batch, np.float32, 1e-6, None),
            seed=jnp.asarray(per_row("seed", seeds, batch).astype(np.uint32)),
        )

    def _row(self, name: str, batch: int, dtype: type, low: float, high: float | None) -> jax.Array:
        values = per_row(name, getattr(self, name), batch)
        bad = (values < low) | (values > high if high is not None else False) | ~np.isfinite(values)
        if bad.any():
            limits = f"at least {low}" if high is None else f"between {low} and {high}"
            raise ValueError(f"{name}={values[bad][0]}: must be {limits}")
        return jnp.asarray(values, dtype)


def _as_tuple(values: Any) -> Any:
    """Several values as a tuple; anything else as it is."""
    if isinstance(values, np.ndarray | jax.Array):
        values = np.asarray(values).tolist()
    return tuple(values) if isinstance(values, list | set | frozenset) else values


def require_whole(name: str, value: Any, high: int) -> None:
    """Refuses numbers that are no integers from 0 to `high`, beyond which they would wrap around.

    Args:
      name: of the setting.
      value: one for all rows, or one per row.
      high: the largest that is let through.
    """
    for one in np.ravel(np.asarray(value, object)).tolist():
        fix = f"must be an integer from 0 to {high}, or one per prompt"
        require(is_whole(one, 0, high), name, one, fix)


def make_settings(settings: dict[str, Any]) -> Settings:
    """Builds `Settings` from the keywords of a call.

    Raises:
      ValueError: a keyword is not a field of `Settings`.
    """
    known = [f.name for f in dataclasses.fields(Settings)]
    for key, value in settings.items():
        if key not in known:
            raise ValueError(f"unknown setting {key}={value!r}: known ones are {', '.join(known)}")
    return Settings(**settings)


def per_row(name: str, value: object, batch: int) -> np.ndarray:
    """[B] array of one value for all rows, or of one value per row.

    Raises:
      ValueError: a sequence does not have one entry per row.
    """
    values = np.asarray(value)
    if values.ndim and values.shape != (batch,):
        raise ValueError(f"{name} has {values.shape[0]} entries: give one value, or one per prompt ({batch})")
    return np.broadcast_to(values, (batch,)).copy()


def for_copies(settings: Settings, prompts: int, copies: int) -> Settings:
    """The settings of rows of which each prompt has several.

    Args:
      settings: one value for all prompts, or one per prompt.
      prompts: how many there are.
      copies: rows of each, one after the other.

    Returns:
      The settings; copy k of a prompt draws with its seed + k where each prompt has a seed, and row i of all
      with seed + i where there is one.

    Raises:
      ValueError: a sequence does not have one entry per prompt, or copies would be the same.
    """
    if copies == 1:
        return settings
    require_whole("seed", settings.seed, 2**32 - 1)
    values = {}
    for name in NUMBERS:
        given = np.asarray(getattr(settings, name))
        if given.ndim:
            values[name] = np.repeat(per_row(name, given, prompts), copies).tolist()
    if "seed" in values:
        values["seed"] = [(seed + i % copies) % 2**32 for i, seed in enumerate(values["seed"])]
    greedy = bool(np.any(np.asarray(settings.temperature) == 0))
    require(not greedy, "n", copies, "greedy samples are all the same; give temperature=1")
    return dataclasses.replace(settings, **values)


def repeated(name: str, value: Any, prompts: int, copies: int) -> Any:
    """One value for all prompts as it is; of one per prompt, each so many times.

    Raises:
      ValueError: a sequence does not have one entry per prompt.
    """
    several = is_several(value) or (isinstance(value, np.ndarray | jax.Array) and value.ndim > 0)
    if copies == 1 or not several:
        return value
    require(len(value) == prompts, name, value, f"give one, or one per prompt ({prompts})")
    return [one for one in value for _ in range(copies)]


def make_controls(
    config: ModelConfig,
    prompts: Sequence[Sequence[int]],
    max_new_tokens: int,
    capacity: int,
    settings: Settings,
    policies: Sequence[ExitPolicy | None],
    *,
    lossless: np.ndarray,
    adapt: bool,
    fire_share: float,
    together: bool,
    tick_costs: Sequence[float],
) -> Controls:
    """The arrays by which a batch of requests steers the decode loop.

    Args:
      config: the model.
      prompts: token ids per row.
      max_new_tokens: tokens to emit per row at most.
      capacity: positions per row.
      settings: of the call.
      policies: one per row, None = full depth; all of one metric.
      lossless: [B] bool rows that are verified.
      adapt: the length of drafts follows how many are accepted.
      fire_share: share of the living rows that must wait before a deep tick fires.
      together: rows leave early only all at once.
      tick_costs: of `decode.tick_costs.tick_costs`; not read where no row looks up.

    Raises:
      ValueError: a setting is out of range, or does not have one entry per row.
    """
    if settings.stop_tokens:
        check_ids("stop_tokens", settings.stop_tokens, config.vocab_size)
    batch, n_exits = len(prompts), len(segments(config)) - 1
    thresholds = np.full((batch, n_exits, capacity), NEVER_EXITS, np.float32)
    for row, (policy, prompt) in enumerate(zip(policies, prompts, strict=True)):
        # The exits at the prompt's last position decide about the first emitted token.
        first = len(prompt) - 1
        thresholds[row, :, first : first + max_new_tokens] = threshold_table(policy, n_exits, max_new_tokens)

    gates = np.stack([gate_row(policy, n_exits) for policy in policies])
    metrics = [p.metric for p in policies if p is not None and p.metric is not None]
    return Controls(
        thresholds=jnp.asarray(thresholds),
        gates=jnp.asarray(gates),
        metric=jnp.int32(metric_index(metrics[0]) if metrics else 0),
        fire_share=jnp.float32(fire_share),
        together=jnp.asarray(together),
        lossless=jnp.asarray(lossless),
        adapt=jnp.asarray(adapt),
        stop_tokens=stop_array(config.eos_ids, settings),
        tick_costs=jnp.asarray(tick_costs, jnp.float32),
        longest_rest=jnp.int32(0),
        measuring=jnp.asarray(False),
        segment_shares=jnp.zeros((n_exits + 1,), jnp.float32),
        look_cost=jnp.float32(0),
        sampling=settings.arrays(batch),
    )


def stop_array(eos_ids: tuple[int, ...], settings: Settings) -> jax.Array:
    """[E] int32 tokens that end a row, with the model's own end tokens, padded with -1."""
    stops = settings.stop_tokens if settings.ignore_eos else (*eos_ids, *settings.stop_tokens)
    # The number of slots is a static shape, so that it grows in large steps.
    slots = STOP_SLOTS
    while slots < len(stops):
        slots *= 2
    return jnp.asarray([*stops, *[-1] * (slots - len(stops))], jnp.int32)


def bucket(size: int) -> int:
    """Smallest power of two that is at least `size` and `SMALLEST_BUCKET`."""
    return max(SMALLEST_BUCKET, 1 << (size - 1).bit_length())


def pad_prompts(
    config: ModelConfig, prompts: Sequence[Sequence[int]], max_new_tokens: int
) -> tuple[jax.Array, jax.Array]:
    """Checks prompts and pads them on the right to their bucket.

    Args:
      config: its vocabulary and its longest sequence are what prompts must fit.
      prompts: token ids per row.
      max_new_tokens: tokens to emit per row at most.

    Returns:
      (tokens [B, P] int32, lengths [B] int32).

    Raises:
      ValueError: no prompt, an empty or too long prompt, an unknown token id, or no number of tokens to emit.
    """
    if not prompts:
        raise ValueError("prompt=[]: give at least one prompt")
    require_type("max_new_tokens", max_new_tokens, int)
    require_at_least_1("max_new_tokens", max_new_tokens)
    for i, ids in enumerate(prompts):
        _check_prompt(config, i, ids, max_new_tokens)
    tokens, lengths = pad_rows(prompts, len(prompts), bucket(max(map(len, prompts))))
    return jnp.asarray(tokens), jnp.asarray(lengths)


def pad_rows(rows: Sequence[Sequence[int]], count: int, width: int) -> tuple[np.ndarray, np.ndarray]:
    """Token ids as one array, padded with zeros and with rows of length 0, and their lengths.

    Args:
      rows: token ids.
      count: rows of the array, at least len(rows).
      width: columns of the array, at least the length of the longest row.

    Returns:
      (tokens [count, width] int32, lengths [count] int32).
    """
    lengths = [len(ids) for ids in rows] + [0] * (count - len(rows))
    return padded(rows, count, width), np.asarray(lengths, np.int32)


def is_several(value: object) -> TypeGuard[Sequence[Any]]:
    """Whether a value is a sequence, and not a text or bytes, which are sequences of other things."""
    return isinstance(value, Sequence) and not isinstance(value, str | bytes | bytearray | memoryview)


def token_ids(what: str, ids: Any) -> list[int]:
    """Token ids as a list.

    Args:
      what: names the sequence in the message.
      ids: a sequence or an array of whole numbers.

    Raises:
      ValueError: it is something else, such as bytes, whose items are numbers, too.
    """
    if isinstance(ids, np.ndarray | jax.Array):
        ids = np.asarray(ids).tolist()
    right = is_several(ids) and all(isinstance(one, numbers.Integral) for one in ids)
    require(right, what, ids, "must be text, or whole numbers that are token ids")
    return [int(one) for one in ids]


def check_ids(what: str, ids: Sequence[int], vocab_size: int) -> None:
    """Refuses token ids outside the vocabulary.

    Args:
      what: names the sequence in the message.
      ids: at least one.
      vocab_size: of the model.

    Raises:
      ValueError: names the id that is furthest outside.
    """
    worst = max(ids) if min(ids) >= 0 else min(ids)
    if not 0 <= worst < vocab_size:
        raise ValueError(
            f"{what} holds token id {worst}, outside the vocabulary of {vocab_size}: "
            "is this the model's own tokenizer?"
        )


def room_behind(config: ModelConfig, length: int) -> int:
    """Tokens that one call can emit behind a prompt of `length` tokens; less than 1 = none."""
    switch = config.recomputed_from
    return min(switch + 1 if length <= switch else config.max_len, config.max_len) - length


def _check_prompt(config: ModelConfig, row: int, ids: Sequence[int], max_new_tokens: int) -> None:
    if not ids:
        raise ValueError(f"prompt {row} is empty: give at least one token of text")

    if len(ids) + max_new_tokens > config.max_len:
        raise ValueError(
            f"prompt {row} has {len(ids)} tokens and max_new_tokens={max_new_tokens}, together more than "
            f"the model's max_len={config.max_len}: shorten the prompt or emit fewer tokens"
        )
    switch = config.recomputed_from
    if len(ids) <= switch < len(ids) + max_new_tokens - 1:
        raise ValueError(
            f"prompt {row} has {len(ids)} tokens and max_new_tokens={max_new_tokens}, which would pass "
            f"rope.original_max_len={switch}, where LongRoPE rotates the whole text anew: emit at most "
            f"{switch - len(ids) + 1} tokens, and go on from the longer text in a call of its own"
        )
    check_ids(f"prompt {row}", ids, config.vocab_size)
