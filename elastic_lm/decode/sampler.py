"""`Sampler`: text in, text out, with the depth of every token."""

import dataclasses
import time
from collections.abc import Iterator, Sequence
from typing import Any, Literal, overload

import jax
import jax.numpy as jnp
import numpy as np

from elastic_lm.decode.loop import run
from elastic_lm.decode.policies import ExitPolicy
from elastic_lm.decode.prefill import prefill
from elastic_lm.decode.requests import Settings, bucket, make_controls, make_settings, pad_prompts, per_row
from elastic_lm.decode.results import Reader, Sample, TextTokenizer, collect, held_back
from elastic_lm.decode.state import Controls, DecodeState, Mode
from elastic_lm.decode.verify import known
from elastic_lm.models.decoder import Decoder, Params

ENDLESS = 2**30  # iterations, where nothing has to be looked at between

# Static: the config, the capacity, the window, the mode. Traced: everything else.
jit_prefill = jax.jit(prefill, static_argnames=("config", "capacity", "window"))
jit_run = jax.jit(run, static_argnames=("config", "mode"), donate_argnames="state")

Prompt = str | Sequence[int]
SAME: Any = object()  # the sampler's own policy
FIRST_DRAFT = 2  # tokens drafted before the first verification, where lengths adapt


class Sampler:
    """Generates text with per-token early exits, at any batch size.

    One prefill and one loop are compiled per bucket (batch size, prompt length, capacity). Thresholds,
    the metric, the firing rule, active exits and sampling settings are traced: changing them compiles
    nothing.
    """

    def __init__(
        self,
        model: Decoder,
        params: Params,
        tokenizer: TextTokenizer | None = None,
        *,
        exit: ExitPolicy | None = None,
        window: int = 16,
        fire_share: float = 0.0,
        stream_every: int = 16,
        lossless: bool = False,
        draft: int | None = None,
        missing: Literal["exact", "propagate"] = "exact",
        together: bool = False,
    ):
        """Creates a sampler.

        Args:
          model: the decoder; its config is static.
          params: canonical parameters.
          tokenizer: needed for text; token-id prompts work without and give empty text.
          exit: metric and thresholds; None = always full depth.
          window: positions per row whose deeper layers may be pending; static.
          fire_share: share of the rows that must wait before a deep tick fires; 0 = latency, 1 = throughput.
          stream_every: loop iterations between looks at the device when streaming or watching stop strings.
          lossless: early tokens are drafts that the full model verifies (`decode.verify`): what is emitted is
            what full depth emits with the same seed, but for near-ties that bfloat16 rounds differently.
          draft: tokens that a lossless row drafts before it is verified, at most window - 1; None = as many
            as acceptance justifies. Thresholds end a draft earlier.
          missing: what deeper layers see of early tokens: "exact" = what they compute of them, later, in
            windows; "propagate" = keys and values of the state that the token left with (CALM), an
            approximation without deep work.
          together: rows leave early only if all rows that run are confident, as in CALM; for comparison.

        Raises:
          ValueError: the policy does not fit the model's exits, or a setting is out of range.
        """
        if window < 1:
            raise ValueError(f"window={window}: must be at least 1")
        if not 0 <= fire_share <= 1:
            raise ValueError(f"fire_share={fire_share}: must be a share between 0 and 1")
        if stream_every < 1:
            raise ValueError(f"stream_every={stream_every}: must be at least 1")
        if missing not in ("exact", "propagate"):
            raise ValueError(f"missing={missing!r}: must be exact or propagate")
        if draft is not None and not 1 <= draft < max(window, 2):
            raise ValueError(f"draft={draft}: must be at least 1 and below window={window}")
        if exit is not None:
            exit.check(model.config)
        self.lossless, self.draft, self.together = lossless, draft, together
        self.missing: Mode = missing
        self.config, self.params, self.tokenizer, self.exit = model.config, params, tokenizer, exit
        self.window, self.fire_share, self.stream_every = window, fire_share, stream_every

    @overload
    def sample(self, prompt: Prompt, max_new_tokens: int = 64, **settings: Any) -> Sample: ...

    @overload
    def sample(self, prompt: list[str], max_new_tokens: int = 64, **settings: Any) -> list[Sample]: ...

    @overload
    def sample(self, prompt: list[list[int]], max_new_tokens: int = 64, **settings: Any) -> list[Sample]: ...

    def sample(
        self,
        prompt: Any,
        max_new_tokens: int = 64,
        *,
        exit: Any = SAME,
        lossless: bool | Sequence[bool] | None = None,
        **settings: Any,
    ) -> Sample | list[Sample]:
        """Generates a continuation of one prompt, or of every prompt of a list as one batch.

        Args:
          prompt: text or token ids; or a list of either.
          max_new_tokens: tokens to emit per row at most.
          exit: another policy than the sampler's for this call, or one per row; None = full depth. The
            policies of one batch share a metric.
          lossless: another choice than the sampler's for this call, or one per row.
          **settings: fields of `requests.Settings`: temperature, top_k, top_p, min_p, repetition_penalty,
            seed, stop, stop_tokens, ignore_eos.

        Returns:
          One `Sample`, or a list in the order of the prompts.

        Raises:
          ValueError: an empty or too long prompt, an unknown setting, a value out of range.
        """
        prompts, single = self._encode(prompt)
        how = make_settings(settings)
        policies = self._policies(exit, len(prompts))
        verified = self._lossless(lossless, len(prompts))
        began = time.perf_counter()
        state, controls = self._start(prompts, max_new_tokens, how, policies, verified)
        if how.stop_strings():
            *_, final = self._advance(state, controls, prompts, how, self._mode(verified))
        else:
            final = jit_run(self.config, self.params, state, controls, ENDLESS, self._mode(verified))
        samples = collect(final, prompts, self._reader(how), began)
        return samples[0] if single else samples

    def stream(
        self, prompt: Prompt, max_new_tokens: int = 64, *, exit: Any = SAME, lossless: bool | None = None,
        **settings: Any,
    ) -> Iterator[str]:  # fmt: skip
        """Yields the continuation of one prompt piece by piece; arguments as in `sample`."""
        prompts, _ = self._encode(prompt)
        how, verified = make_settings(settings), self._lossless(lossless, 1)
        state, controls = self._start(prompts, max_new_tokens, how, self._policies(exit, 1), verified)
        mode, reader = self._mode(verified), self._reader(how)
        shown = ""
        for reached in self._advance(state, controls, prompts, how, mode):
            text = collect(reached, prompts, reader, 0.0)[0].text
            safe = text if not np.any(reached.alive) else held_back(text, reader.stops)
            if len(safe) > len(shown):
                yield safe[len(shown) :]
                shown = safe

    @staticmethod
    def compilations() -> int:
        """Programs compiled so far in this process for prefill and decoding."""
        programs: tuple[Any, ...] = (jit_prefill, jit_run)
        return sum(program._cache_size() for program in programs)

    def _policies(self, exit: Any, batch: int) -> list[ExitPolicy | None]:
        """One checked policy per row."""
        given = self.exit if exit is SAME else exit
        rows = list(given) if isinstance(given, Sequence) else [given] * batch
        if len(rows) != batch:
            raise ValueError(f"exit has {len(rows)} policies: give one, or one per prompt ({batch})")
        metrics = {policy.metric for policy in rows if policy is not None and policy.metric}
        if len(metrics) > 1:
            raise ValueError(f"exit: one batch cannot mix the metrics {', '.join(sorted(metrics))}")
        for policy in rows if exit is not SAME else ():
            if policy is not None:
                policy.check(self.config)
        return rows

    def _lossless(self, lossless: bool | Sequence[bool] | None, batch: int) -> np.ndarray:
        """[B] bool: the rows that are verified."""
        rows = per_row("lossless", self.lossless if lossless is None else lossless, batch).astype(bool)
        if rows.any() and self.missing == "propagate":
            raise ValueError("missing='propagate': approximate keys and values verify nothing; use 'exact'")
        if rows.any() and self.window < 2:
            raise ValueError(f"window={self.window}: lossless decoding needs at least 2")
        return rows

    def _mode(self, lossless_B: np.ndarray) -> Mode:
        return "verify" if lossless_B.any() else self.missing

    def _encode(self, prompt: Any) -> tuple[list[list[int]], bool]:
        if isinstance(prompt, np.ndarray | jax.Array):
            prompt = np.asarray(prompt).tolist()
        single = isinstance(prompt, str) or (len(prompt) > 0 and isinstance(prompt[0], int | np.integer))
        encoded = []
        for i, item in enumerate([prompt] if single else prompt):
            if isinstance(item, str):
                if self.tokenizer is None:
                    raise ValueError("tokenizer=None: text prompts need one; give token ids or a tokenizer")
                if not item:
                    raise ValueError(f"prompt {i} is empty: give at least one character of text")
                item = self.tokenizer.encode(item, bos=True)
            encoded.append([int(token) for token in item])
        return encoded, single

    def _start(
        self,
        prompts: list[list[int]],
        max_new_tokens: int,
        how: Settings,
        policies: Sequence[ExitPolicy | None] | None = None,
        lossless_B: np.ndarray | None = None,
    ) -> tuple[DecodeState, Controls]:
        if how.stop_strings() and self.tokenizer is None:
            raise ValueError(f"stop={how.stop!r}: stop strings need a tokenizer; use stop_tokens without one")
        policies = self._policies(SAME, len(prompts)) if policies is None else policies
        lossless_B = self._lossless(None, len(prompts)) if lossless_B is None else lossless_B
        tokens, lengths = pad_prompts(self.config, prompts, max_new_tokens)
        longest = max(map(len, prompts)) + max_new_tokens
        capacity = bucket(max(longest + self.window, tokens.shape[1]))
        controls = make_controls(
            self.config, prompts, max_new_tokens, capacity, how, policies,
            lossless=lossless_B, adapt=self.draft is None, fire_share=self.fire_share, together=self.together,
        )  # fmt: skip
        draft = min(self.draft or FIRST_DRAFT, max(self.window - 1, 1))
        state = jit_prefill(
            self.config, self.params, tokens, lengths, lengths + max_new_tokens, jnp.int32(draft),
            capacity=capacity, window=self.window,
        )  # fmt: skip
        return state, controls

    def _advance(
        self,
        state: DecodeState,
        controls: Controls,
        prompts: list[list[int]],
        how: Settings,
        mode: Mode,
    ) -> Iterator[DecodeState]:
        """Runs `stream_every` iterations at a time; rows end at the first stop string."""
        reader = self._reader(how)
        while True:
            state = jit_run(self.config, self.params, state, controls, self.stream_every, mode)
            if reader.stops:
                tokens, lengths = jax.device_get((state.tokens, known(state, controls)))
                rows = [t[len(p) : n].tolist() for t, p, n in zip(tokens, prompts, lengths, strict=True)]
                ended = [reader.stops_after(*row) is not None for row in zip(prompts, rows, strict=True)]
                state = dataclasses.replace(state, alive=state.alive & ~jnp.asarray(ended))
            alive = bool(np.any(state.alive))
            yield dataclasses.replace(state, length=known(state, controls))
            if not alive:
                return

    def _reader(self, how: Settings) -> Reader:
        return Reader(self.tokenizer, (*self.config.eos_ids, *how.stop_tokens), how.stop_strings())
