"""`Sampler`: text in, text out, with the depth of every token."""

import dataclasses
import functools
import time
from collections.abc import Iterator, Sequence
from typing import Any, Literal, overload

import jax
import jax.numpy as jnp
import numpy as np

from elastic_lm.config.checks import require
from elastic_lm.config.subnet import Budget, Subnet
from elastic_lm.decode.lossless import final_length
from elastic_lm.decode.prefill import PromptState
from elastic_lm.decode.results import Detokenizer, Sample, TextTokenizer, collect, held_back
from elastic_lm.decode.served import Served, ServedModels, compilations, jit_prefill_from_state
from elastic_lm.decode.settings import Settings, bucket, make_controls, make_settings, pad_prompts, per_row
from elastic_lm.decode.state import Controls, DecodeState, Mode
from elastic_lm.depth.policies import ExitPolicy, on_subnet
from elastic_lm.models.decoder import Decoder, Params
from elastic_lm.width.chooser import SubnetChooser

ENDLESS = 2**30  # iterations, where nothing has to be looked at between

Prompt = str | Sequence[int]
SAME: Any = object()  # the sampler's own policy
FIRST_DRAFT = 2  # tokens drafted before the first verification, where lengths adapt
BUDGETS = 64  # whose sub-networks are remembered


@dataclasses.dataclass(frozen=True)
class Call:
    """What one call asks for.

    Attributes:
      prompts: token ids per row.
      how: sampling settings.
      served: the model that runs.
      policies: of that model, one per row.
      lossless: [B] bool rows that are verified.
      mode: of the loop.
      reader: reads what is emitted.
    """

    prompts: list[list[int]]
    how: Settings
    served: Served
    policies: list[ExitPolicy | None]
    lossless: np.ndarray
    mode: Mode
    reader: Detokenizer


def choose(elastic: SubnetChooser, budget: Budget) -> Subnet | Budget:
    """The sub-network for a budget; the budget itself where routers choose while text is made."""
    return budget if elastic.is_routed(budget) else elastic.subnet(budget)


class Sampler:
    """Generates text with per-token early exits, at any batch size, by the whole model or a sub-network.

    One prefill and one loop are compiled per bucket (batch size, prompt length, capacity) and sub-network.
    Thresholds, the metric, the firing rule, active exits and sampling settings are traced: changing them
    compiles nothing.
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
        elastic: SubnetChooser | None = None,
        budget: Budget | None = None,
        subnet: Subnet | None = None,
        keep_subnets: int = 4,
        slice_inside: bool = False,
    ):
        """Creates a sampler.

        Args:
          model: the decoder; its config is static.
          params: canonical parameters.
          tokenizer: needed for text; token-id prompts work without and give empty text.
          exit: metric and thresholds, for the exits of the whole model; None = always full depth. A
            sub-network keeps the thresholds of the exits that it has.
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
          elastic: chooses sub-networks for budgets.
          budget: what the model that runs may cost; needs `elastic`. None = the whole model runs.
          subnet: the sub-network that runs, instead of a budget. Its slice is an ordinary smaller model,
            which depths, drafts and verification are then about.
          keep_subnets: sub-networks whose slices and compiled programs stay in memory; the one that was
            served longest ago goes first. The whole model stays.
          slice_inside: sub-networks are sliced inside their programs, whenever these run, and hold no memory
            between calls; while a batch is decoded its slice lies beside the whole model.

        Raises:
          ValueError: the policy does not fit the model's exits, a setting is out of range, or the budget or
            the sub-network is not one of the model's.
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
        if elastic is not None:
            elastic.check(model.config)
        self.lossless, self.draft, self.together = lossless, draft, together
        self.missing: Mode = missing
        self.config, self.params, self.tokenizer, self.exit = model.config, params, tokenizer, exit
        self.window, self.fire_share, self.stream_every = window, fire_share, stream_every
        self.elastic = elastic
        self._chosen = functools.lru_cache(BUDGETS)(functools.partial(choose, elastic)) if elastic else None
        self.runs: Subnet | Budget | None = None  # where a call says nothing; None = the whole model
        self.runs = self._choose(budget, subnet)
        self._subnets = ServedModels(model.config, params, keep_subnets, slice_inside)

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
        budget: Budget | None = None,
        subnet: Subnet | None = None,
        prompt_state: PromptState | None = None,
        **settings: Any,
    ) -> Sample | list[Sample]:
        """Generates a continuation of one prompt, or of every prompt of a list as one batch.

        Args:
          prompt: text or token ids; or a list of either.
          max_new_tokens: tokens to emit per row at most.
          exit: another policy than the sampler's for this call, or one per row; None = full depth. The
            policies of one batch share a metric.
          lossless: another choice than the sampler's for this call, or one per row.
          budget: another budget than the sampler's for this call.
          subnet: another sub-network for this call, instead of a budget; `Subnet.full` = the whole model.
          prompt_state: what the first layers of the model that runs, which has no exits, have computed for
            the padded prompts.
          **settings: fields of `requests.Settings`: temperature, top_k, top_p, min_p, repetition_penalty,
            seed, stop, stop_tokens, ignore_eos.

        Returns:
          One `Sample`, or a list in the order of the prompts.

        Raises:
          ValueError: an empty or too long prompt, an unknown setting, a value out of range, or a budget or
            sub-network that is not one of the model's.
        """
        prompts, single = self._encode(prompt)
        began = time.perf_counter()
        call = self._call(prompts, exit, lossless, budget, subnet, settings)
        call, state, controls = self._start(call, max_new_tokens, prompt_state)
        if call.reader.stops:
            *_, final = self._advance(call, state, controls)
        else:
            model = call.served
            final = model.run(model.config, model.params, state, controls, ENDLESS, call.mode)
        samples = collect(final, prompts, call.reader, began, call.served.subnet, call.served.budget)
        return samples[0] if single else samples

    def stream(
        self,
        prompt: Prompt,
        max_new_tokens: int = 64,
        *,
        exit: Any = SAME,
        lossless: bool | None = None,
        budget: Budget | None = None,
        subnet: Subnet | None = None,
        **settings: Any,
    ) -> Iterator[str]:
        """Yields the continuation of one prompt piece by piece; arguments as in `sample`."""
        prompts, _ = self._encode(prompt)
        call = self._call(prompts, exit, lossless, budget, subnet, settings)
        call, state, controls = self._start(call, max_new_tokens)
        shown = ""
        for reached in self._advance(call, state, controls):
            text = collect(reached, prompts, call.reader, 0.0)[0].text
            safe = text if not np.any(reached.alive) else held_back(text, call.reader.stops)
            if len(safe) > len(shown):
                yield safe[len(shown) :]
                shown = safe

    @staticmethod
    def compilations() -> int:
        """Programs compiled so far in this process for prefill and decoding, those of evicted slices too."""
        return compilations()

    def _choose(self, budget: Budget | None, subnet: Subnet | None) -> Subnet | Budget | None:
        """What a call asks for, or the sampler's own: a sub-network, a budget for routers, or all (None)."""
        if budget is None:
            chosen = self.runs if subnet is None else subnet
        elif subnet is not None:
            raise ValueError(f"budget={budget}, subnet={subnet}: each says what runs; give one of them")
        elif self._chosen is None:
            fix = "sub-networks for budgets are chosen by Sampler(..., elastic=el.Elastic.load(folder))"
            raise ValueError(f"budget={budget}: {fix}")
        else:
            chosen = self._chosen(budget)
        if isinstance(chosen, Subnet):
            chosen.check(self.config)
        elif chosen is not None and self.missing == "propagate":
            raise ValueError("missing='propagate': layers that are routed cannot do that; use 'exact'")
        return chosen

    def _serve(self, budget: Budget | None, subnet: Subnet | None) -> Served:
        """The model that runs; arguments as in `sample`."""
        chosen = self._choose(budget, subnet)
        if isinstance(chosen, Budget):
            assert self.elastic is not None
            return self._subnets.route(self.elastic, chosen)
        return self._subnets.serve(chosen)

    def _call(
        self,
        prompts: list[list[int]],
        exit: Any = SAME,
        lossless: bool | Sequence[bool] | None = None,
        budget: Budget | None = None,
        subnet: Subnet | None = None,
        settings: dict[str, Any] | None = None,
    ) -> Call:
        """Everything but the prompts checked, the sub-network sliced; arguments as in `sample`."""
        how, rows = make_settings(settings or {}), len(prompts)
        policies, verified = self._policies(exit, rows), self._lossless(lossless, rows)
        reader = Detokenizer(self.tokenizer, (*self.config.eos_ids, *how.stop_tokens), how.stop_strings())
        if reader.stops and self.tokenizer is None:
            raise ValueError(f"stop={how.stop!r}: stop strings need a tokenizer; use stop_tokens without one")
        served = self._serve(budget, subnet)
        if served.subnet is not None:
            policies = [on_subnet(policy, self.config, served.subnet) for policy in policies]
        mode = "verify" if verified.any() else self.missing
        return Call(prompts, how, served, policies, verified, mode, reader)

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
        self, call: Call, max_new_tokens: int, prompt_state: PromptState | None = None
    ) -> tuple[Call, DecodeState, Controls]:
        """Prefills the prompts; the call is about the model for them, where they have a say in it."""
        prompts = call.prompts
        tokens, lengths = pad_prompts(self.config, prompts, max_new_tokens)
        model = call.served.for_prompts(tokens, lengths)
        longest = max(map(len, prompts)) + max_new_tokens
        capacity = bucket(max(longest + self.window, tokens.shape[1]))
        controls = make_controls(
            model.config, prompts, max_new_tokens, capacity, call.how, call.policies,
            lossless=call.lossless, adapt=self.draft is None, fire_share=self.fire_share,
            together=self.together,
        )  # fmt: skip
        draft = min(self.draft or FIRST_DRAFT, max(self.window - 1, 1))
        shapes = {"capacity": capacity, "window": self.window}
        rest = tokens, lengths, lengths + max_new_tokens, jnp.int32(draft)
        if prompt_state is None:
            state = model.prefill(model.config, model.params, *rest, **shapes)
        else:
            require(not model.config.exits, "exit", model.config.exits, "prompt states go on without exits")
            state = jit_prefill_from_state(model.config, model.params, prompt_state, *rest, **shapes)
        return dataclasses.replace(call, served=model), state, controls

    def _advance(self, call: Call, state: DecodeState, controls: Controls) -> Iterator[DecodeState]:
        """Runs `stream_every` iterations at a time; rows end at the first stop string."""
        model, prompts, reader = call.served, call.prompts, call.reader
        while True:
            state = model.run(model.config, model.params, state, controls, self.stream_every, call.mode)
            if reader.stops:
                tokens, lengths = jax.device_get((state.tokens, final_length(state, controls)))
                rows = [t[len(p) : n].tolist() for t, p, n in zip(tokens, prompts, lengths, strict=True)]
                ended = [reader.stops_after(*row) is not None for row in zip(prompts, rows, strict=True)]
                state = dataclasses.replace(state, alive=state.alive & ~jnp.asarray(ended))
            alive = bool(np.any(state.alive))
            yield dataclasses.replace(state, length=final_length(state, controls))
            if not alive:
                return
