"""`Sampler`: text in, text out, with the depth of every token."""

import dataclasses
import functools
import numbers
import time
import warnings
from collections.abc import Generator, Iterator, Sequence
from typing import TYPE_CHECKING, Any, Unpack, cast, overload

import jax
import jax.numpy as jnp
import numpy as np

from elastic_lm.config.checks import is_whole, require, require_at_least_1, require_type
from elastic_lm.config.decoding import MAX_NEW_TOKENS
from elastic_lm.config.drafter import Drafter
from elastic_lm.config.subnet import Budget, Subnet
from elastic_lm.decode.cache import cache_bytes
from elastic_lm.decode.drafter_costs import drafter_costs
from elastic_lm.decode.drafting import with_drafting
from elastic_lm.decode.logprobs import with_room
from elastic_lm.decode.lossless import final_length
from elastic_lm.decode.options import DecodeKeywords, DecodeOptions, check_choice, make_options
from elastic_lm.decode.prefill import PromptState
from elastic_lm.decode.prefix import PrefixCache
from elastic_lm.decode.results import (
    Detokenizer,
    Sample,
    TextTokenizer,
    check_drawn,
    collect,
    make_detokenizer,
)
from elastic_lm.decode.segment import PREVIEW
from elastic_lm.decode.served import Served, ServedModels, compilations, jit_prefill_from_state
from elastic_lm.decode.settings import (
    Settings,
    bucket,
    for_copies,
    is_several,
    make_controls,
    make_settings,
    pad_prompts,
    per_row,
    repeated,
    token_ids,
)
from elastic_lm.decode.state import Controls, DecodeState, Mode
from elastic_lm.decode.tick_costs import tick_costs
from elastic_lm.depth.policies import ConfidenceExit, ExitPolicy, on_subnet, require_policy
from elastic_lm.depth.preview_files import check_head
from elastic_lm.files.fingerprints import weights_fingerprint
from elastic_lm.models.decoder import Decoder, Params
from elastic_lm.models.placement import placed_for_decoding
from elastic_lm.models.registry import Model, check_params, unboxed
from elastic_lm.report.machine import require_memory
from elastic_lm.width.chooser import SubnetChooser
from elastic_lm.width.nested_decoder import NestedConfig

ENDLESS = 2**30  # iterations of the loop, where nothing has to be looked at before all rows have ended
FIRST_DRAFT = 2  # tokens drafted before the first verification, where the length of drafts adapts
REMEMBERED_BUDGETS = 64  # budgets whose sub-networks are not searched for again

# Fields of the options that were attributes of a sampler in 0.1.
OLD_ATTRIBUTES = {"draft", "elastic", "exit", "fire_share", "lossless", "missing"}
OLD_ATTRIBUTES |= {"stream_every", "together", "window"}

GREEDY = Settings()
SAME: Any = object()  # the default of `exit` in a call, where None means full depth

Prompt = str | Sequence[int]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Call:
    """What one call asks for, checked.

    Attributes:
      prompts: token ids per row.
      settings: how tokens are drawn and where text ends.
      served: the model that runs.
      policies: when tokens leave that model early, one per row.
      lossless: [B] bool rows that are verified.
      mode: of the loop.
      detokenizer: turns the emitted tokens into text.
      copies: rows of each prompt, one after the other.
      prefix: what the call goes on from, and leaves to the next one; None = nothing.
      top: likeliest tokens per place whose log-probabilities are kept, beside those of the emitted ones; None
        = none are kept.
      measuring: seconds in which the costs of ticks were measured, which no later call needs.
    """

    prompts: list[list[int]]
    settings: Settings
    served: Served
    policies: list[ExitPolicy | None]
    lossless: np.ndarray
    mode: Mode
    detokenizer: Detokenizer
    copies: int = 1
    prefix: PrefixCache | None = None
    top: int | None = None
    measuring: float = 0.0


class Sampler:
    """Generates text with per-token early exits, at any batch size, by the whole model or a sub-network.

    One prefill and one loop are compiled for every sub-network, every number of rows and every bucket of
    lengths. The lengths of prompts and of whole sequences are rounded up to powers of two. Thresholds, the
    metric, the firing rule, the length of drafts and the settings of a call are traced: changing them
    compiles nothing. Every row gets the tokens that it would get alone, unless the option `together` couples
    the rows. The depths of lossless rows are not those that they would have alone: a row's tokens are
    verified whenever the deep layers run, which they also do for other rows, and its drafts end elsewhere.

    Attributes:
      config: of the whole model; static.
      params: its canonical parameters.
      tokenizer: None = prompts and results are token ids, without a text.
      options: how the sampler decodes.
      runs: the model of calls that name no other: a sub-network, a budget that routers keep while the model
        decodes, or None for the whole model.

    Example:
      ```python
      import elastic_lm as el

      model, params = el.load(el.embedded_model())
      tokenizer = el.Tokenizer.load(el.embedded_model())
      sampler = el.Sampler(model, params, tokenizer)

      sample = sampler.sample("import os\\n", max_new_tokens=16)
      print(sample.text, sample.exit_layers)
      ```
    """

    def __init__(
        self,
        model: Model,
        params: Params,
        tokenizer: TextTokenizer | None = None,
        *,
        options: DecodeOptions | None = None,
        **fields: Unpack[DecodeKeywords],
    ):
        """Creates a sampler; nothing is compiled yet.

        Args:
          model: a decoder, as `el.load` gives it; its config is static.
          params: canonical parameters.
          tokenizer: needed for text; token-id prompts work without one and give empty text.
          options: how the sampler decodes; None = full depth, whole model.
          **fields: fields of `DecodeOptions`, instead of `options`: `Sampler(model, params, window=8)`.

        Raises:
          TypeError: a keyword is not a field of `DecodeOptions`.
          ValueError: the model is no decoder, an option is out of range or does not fit it, or both `options`
            and one of its fields are given.
        """
        # `el.load` gives models of any kind, so that the type is wide and the check is here.
        if not isinstance(model, Decoder):
            raise ValueError(
                f"model={type(model).__name__}: a sampler needs a decoder; use el.TextToText for an "
                "encoder-decoder, el.cascade.Classifier for an encoder"
            )
        options = make_options(options, fields)
        options.check(model.config)
        check_params(model.config, params)
        params = placed_for_decoding(unboxed(params), model.config.dtype)

        self.config = model.config
        self.params = params
        self.tokenizer = tokenizer
        self.options = options
        self._warn_other_models([options.exit])

        self._chosen = None
        if options.elastic is not None:
            choose = functools.partial(_choose, options.elastic)
            self._chosen = functools.lru_cache(REMEMBERED_BUDGETS)(choose)
        self.runs = self._what_runs(options.budget, options.subnet, otherwise=None)
        served = params
        if options.preview is not None:
            check_head(options.preview, model.config, params)
            # The fingerprint is static: without it, previews of one shape share their programs.
            served = {**params, PREVIEW: dataclasses.replace(options.preview, head="")}
        self._models = ServedModels(model.config, served, options.keep_subnets, options.slice_inside)

    if not TYPE_CHECKING:  # type checkers know today's names alone

        def __getattr__(self, name: str) -> Any:
            """Options were attributes of the sampler in 0.1."""
            if name not in OLD_ATTRIBUTES:
                raise AttributeError(f"'Sampler' object has no attribute {name!r}")
            now = f"Sampler.options.{name}"
            warnings.warn(f"Sampler.{name} is now {now}; the old name goes in 0.3", DeprecationWarning, 2)
            return getattr(self.options, name)

    @overload
    def sample(
        self, prompt: Prompt, max_new_tokens: int = ..., *, n: int, **settings: Any
    ) -> list[Sample]: ...

    @overload
    def sample(
        self, prompt: list[str], max_new_tokens: int = ..., *, n: int, **settings: Any
    ) -> list[list[Sample]]: ...

    @overload
    def sample(
        self, prompt: list[list[int]], max_new_tokens: int = ..., *, n: int, **settings: Any
    ) -> list[list[Sample]]: ...

    @overload
    def sample(self, prompt: Prompt, max_new_tokens: int = ..., **settings: Any) -> Sample: ...

    @overload
    def sample(self, prompt: list[str], max_new_tokens: int = ..., **settings: Any) -> list[Sample]: ...

    @overload
    def sample(self, prompt: list[list[int]], max_new_tokens: int = ..., **settings: Any) -> list[Sample]: ...

    def sample(
        self,
        prompt: Any,
        max_new_tokens: int = MAX_NEW_TOKENS,
        *,
        n: int | None = None,
        logprobs: bool = False,
        top_logprobs: int = 0,
        exit: Any = SAME,
        lossless: bool | Sequence[bool] | None = None,
        budget: Budget | None = None,
        subnet: Subnet | Sequence[Subnet | None] | None = None,
        prompt_state: PromptState | None = None,
        prefix: PrefixCache | None = None,
        **settings: Any,
    ) -> Sample | list[Sample] | list[list[Sample]]:
        """Generates a continuation of one prompt, or of every prompt of a list as one batch.

        Args:
          prompt: text or token ids; or a list of either.
          max_new_tokens: tokens to emit per row at most.
          n: continuations of every prompt, which is processed once for all of them; needs a temperature.
            Sample k of prompt i draws with seed + i n + k, or with k more than the i-th of several seeds, and
            is what that seed gives alone. None = one, which is returned by itself.
          logprobs: `Sample.logprobs` of every emitted token are computed, too. Whether they are, and the
            number of the likeliest tokens, is static.
          top_logprobs: and `Sample.top_logprobs` of so many likeliest tokens at each place.
          exit: another policy than the sampler's for this call, or one per prompt; None = full depth. All
            policies of one batch share a metric.
          lossless: another choice than the sampler's for this call, or one per prompt.
          budget: another budget than the sampler's for this call.
          subnet: another sub-network for this call, instead of a budget; `Subnet.full` = the whole model. Or
            one per prompt (None = the whole model), which differ in neurons and heads alone: the rows of one
            batch then have sizes of their own, at the speed of the widest (`width.row_widths`).
          prompt_state: what the first layers of the model that runs, which has no exits, have computed for
            the padded prompts.
          prefix: keys and values that are kept from call to call; those of the longest beginning that the
            prompt shares with the last call's text are not computed again. For calls of one row.
          **settings: how tokens are drawn and where text ends, one value or one per row: `temperature`
            (0 = greedy), `top_k`, `top_p`, `min_p`, `repetition_penalty`, `seed`; for all rows `stop`
            (strings), `stop_tokens` (ids), `ignore_eos`. See `decode.settings.Settings`.

        Returns:
          One `Sample`, or a list of them in the order of the prompts; with `n`, a list of n in place of each.

        Raises:
          ValueError: an empty or too long prompt, an unknown setting, a value out of range, a budget or
            sub-network that is not one of the model's, or logits that are not finite; the message then names
            the first weight that is not, or the dtype that was exceeded.

        Example:
          ```python
          import elastic_lm as el
          from elastic_lm.testing import random_params, tiny_config

          config = tiny_config(n_layers=2, exits=(1,))
          sampler = el.Sampler(el.Decoder(config), random_params(config), window=2)

          early = el.ConfidenceExit("max_prob", thresholds=(0.03,), layers=(1,))
          samples = sampler.sample(
              [[1, 2, 3], [4, 5]],
              max_new_tokens=8,
              exit=[early, None],  # the first row may leave early, the second runs at full depth
              temperature=[0.0, 0.8],
              seed=1,
          )
          print([sample.exit_layers for sample in samples])
          ```
        """
        prompts, single = self._encode(prompt)
        started = time.perf_counter()
        copies = 1 if n is None else n
        require_type("n", copies, int)
        require_at_least_1("n", copies)
        call = self._call(
            prompts,
            exit=exit,
            lossless=lossless,
            budget=budget,
            subnet=subnet,
            settings=make_settings(settings),
            copies=copies,
            prefix=prefix,
            top=self._likeliest(logprobs, top_logprobs),
        )
        call, state, controls = self._prefill(call, max_new_tokens, prompt_state)

        if call.detokenizer.stops:
            *_, final = self._advance(call, state, controls)
        else:
            model = call.served
            final = model.run(model.config, model.params, state, controls, ENDLESS, call.mode)

        samples = collect(final, call.prompts, call.detokenizer, started + call.measuring, call.served)
        if prefix is not None:  # behind what refuses logits that are not finite
            prefix.keep(call.served, final, len(prompts[0]), call.mode)
        if n is not None:
            grouped = [samples[i : i + n] for i in range(0, len(samples), n)]
            return grouped[0] if single else grouped
        return samples[0] if single else samples

    def stream(
        self,
        prompt: Prompt,
        max_new_tokens: int = MAX_NEW_TOKENS,
        *,
        exit: Any = SAME,
        lossless: bool | None = None,
        budget: Budget | None = None,
        subnet: Subnet | None = None,
        prefix: PrefixCache | None = None,
        **settings: Any,
    ) -> Iterator[str]:
        """Generates a continuation of one prompt and yields its text piece by piece.

        A piece appears when no later token can change it: drafts once they are verified, and text that may
        be the start of a stop string once it is clear that it is not.

        Args:
          prompt: text or token ids.
          max_new_tokens: tokens to emit at most.
          exit: another policy than the sampler's; None = full depth.
          lossless: another choice than the sampler's.
          budget: another budget than the sampler's.
          subnet: another sub-network, instead of a budget; `Subnet.full` = the whole model.
          prefix: as in `sample`; what there is by then is kept even if the iterator is closed early.
          **settings: as in `sample`.

        Yields:
          Pieces that together are the text that `sample` returns.

        Raises:
          ValueError: as in `sample`.

        Example:
          ```python
          import elastic_lm as el

          model, params = el.load(el.embedded_model())
          tokenizer = el.Tokenizer.load(el.embedded_model())
          sampler = el.Sampler(model, params, tokenizer, options=el.DecodeOptions(stream_every=4))

          for piece in sampler.stream("import os\\n", max_new_tokens=16):
              print(piece, end="", flush=True)
          ```
        """
        reached = self.stream_samples(
            prompt,
            max_new_tokens,
            exit=exit,
            lossless=lossless,
            budget=budget,
            subnet=subnet,
            prefix=prefix,
            **settings,
        )
        shown = ""
        for sample in reached:
            if len(sample.text) > len(shown):
                yield sample.text[len(shown) :]
                shown = sample.text

    def stream_samples(
        self,
        prompt: Prompt,
        max_new_tokens: int = MAX_NEW_TOKENS,
        *,
        exit: Any = SAME,
        lossless: bool | None = None,
        budget: Budget | None = None,
        subnet: Subnet | None = None,
        prefix: PrefixCache | None = None,
        **settings: Any,
    ) -> Generator[Sample, None, None]:
        """`stream` with depths: yields again and again all that there is so far.

        Args:
          prompt: as in `stream`, like the other arguments.
          max_new_tokens: see `stream`.
          exit: see `stream`.
          lossless: see `stream`.
          budget: see `stream`.
          subnet: see `stream`.
          prefix: see `stream`.
          **settings: see `sample`.

        Yields:
          Samples whose text no later token can change; the last one is what `sample` returns.

        Raises:
          ValueError: as in `sample`.

        Example:
          ```python
          import elastic_lm as el

          model, params = el.load(el.embedded_model())
          sampler = el.Sampler(model, params, el.Tokenizer.load(el.embedded_model()))

          for sample in sampler.stream_samples("import os\\n", max_new_tokens=16):
              print(len(sample.text), sample.exit_layers)
          ```
        """
        prompts, _ = self._encode(prompt)
        started = time.perf_counter()
        call = self._call(
            prompts,
            exit=exit,
            lossless=lossless,
            budget=budget,
            subnet=subnet,
            settings=make_settings(settings),
            prefix=prefix,
        )
        call, state, controls = self._prefill(call, max_new_tokens)

        for reached in self._advance(call, state, controls):
            sample = collect(reached, prompts, call.detokenizer, started + call.measuring, call.served)[0]
            running = bool(np.any(reached.alive))
            if running:
                settled = call.detokenizer.settled(prompts[0], sample.tokens, sample.text)
                sample = dataclasses.replace(sample, text=settled)
            try:
                yield sample
            except GeneratorExit:
                running = False  # nobody wants the rest
                raise
            finally:
                # Until the next iterations are asked for, nothing else holds the caches.
                if prefix is not None and not running:
                    prefix.keep(call.served, reached, len(prompts[0]), call.mode)

    @staticmethod
    def compilations() -> int:
        """Programs compiled so far in this process for prefill and decoding, evicted ones included."""
        return compilations()

    def _encode(self, prompt: Any) -> tuple[list[list[int]], bool]:
        """Token ids per row, and whether there was one prompt and no list of them."""
        if isinstance(prompt, np.ndarray | jax.Array):
            prompt = np.asarray(prompt).tolist()
        right = isinstance(prompt, str) or is_several(prompt)
        require(right, "prompt", prompt, "must be text, token ids, or a list of either")
        single = isinstance(prompt, str) or (len(prompt) > 0 and isinstance(prompt[0], numbers.Integral))

        encoded = []
        for i, item in enumerate([prompt] if single else prompt):
            if isinstance(item, str):
                if self.tokenizer is None:
                    raise ValueError("tokenizer=None: text prompts need one; give token ids or a tokenizer")
                if not item:
                    raise ValueError(f"prompt {i} is empty: give at least one character of text")
                item = self.tokenizer.encode(item, bos=True)
            encoded.append(token_ids(f"prompt {i}", item))
        return encoded, single

    def _call(
        self,
        prompts: list[list[int]],
        *,
        exit: Any = SAME,
        lossless: bool | Sequence[bool] | None = None,
        budget: Budget | None = None,
        subnet: Subnet | Sequence[Subnet | None] | None = None,
        settings: Settings = GREEDY,
        copies: int = 1,
        prefix: PrefixCache | None = None,
        top: int | None = None,
    ) -> Call:
        """Checks everything but the prompts, and slices the sub-network; arguments as in `sample`."""
        settings = for_copies(settings, len(prompts), copies)
        exit, lossless = (
            repeated(name, value, len(prompts), copies)
            for name, value in (("exit", exit), ("lossless", lossless))
        )
        prompts = [ids for ids in prompts for _ in range(copies)]
        batch = len(prompts)
        one = prefix is None or batch == 1
        require(one, "prefix", prefix, f"holds one text, and this call has {batch} rows; leave it out")
        policies = self._policies(exit, batch)
        verified_B = self._verified(lossless, batch)
        detokenizer = make_detokenizer(self.tokenizer, self.config.eos_ids, settings)

        if is_several(subnet):
            served, rows = self._serve_rows(
                budget, repeated("subnet", subnet, batch // copies, copies), batch
            )
            policies = [
                policy if row == Subnet.full(self.config) else on_subnet(policy, self.config, row)
                for policy, row in zip(policies, rows, strict=True)
            ]
            require(prefix is None, "prefix", prefix, "is of one model; leave subnets per prompt out")
        else:
            served = self._serve(budget, cast("Subnet | None", subnet))
        if served.subnet is not None:
            policies = [on_subnet(policy, self.config, served.subnet) for policy in policies]

        return Call(
            prompts=prompts,
            settings=settings,
            served=served,
            policies=policies,
            lossless=verified_B,
            mode="verify" if verified_B.any() else self.options.missing,
            detokenizer=detokenizer,
            copies=copies,
            prefix=prefix,
            top=top,
        )

    def _likeliest(self, logprobs: bool, top_logprobs: int) -> int | None:
        """The number of the likeliest tokens whose log-probabilities are kept; None = none are."""
        require_type("logprobs", logprobs, bool)
        right = is_whole(top_logprobs, 0, self.config.vocab_size)
        require(right, "top_logprobs", top_logprobs, f"must be from 0 to {self.config.vocab_size}")
        if not logprobs and not top_logprobs:
            return None
        whole = self.options.preview is None
        require(whole, "logprobs", True, "need the whole vocabulary head; use a sampler without a preview")
        return int(top_logprobs)

    def _policies(self, exit: Any, batch: int) -> list[ExitPolicy | None]:
        """One checked policy per row."""
        asked = self.options.exit if exit is SAME else exit
        policies = list(asked) if is_several(asked) else [asked] * batch
        for policy in policies if exit is not SAME else ():
            require_policy("exit", policy)
        if len(policies) != batch:
            raise ValueError(f"exit has {len(policies)} policies: give one, or one per prompt ({batch})")

        metrics = {policy.metric for policy in policies if policy is not None and policy.metric}
        if len(metrics) > 1:
            raise ValueError(f"exit: one batch cannot mix the metrics {', '.join(sorted(metrics))}")

        # The policy of the options was checked when the sampler was created.
        for policy in policies if exit is not SAME else ():
            if policy is not None:
                fix = "a drafter takes the place of exits; use a sampler without one"
                require(self.options.drafter is None, "exit", policy, fix)
                policy.check(self.config)
        if exit is not SAME:
            self._warn_other_models(policies)
        return policies

    def _warn_other_models(self, policies: Sequence[ExitPolicy | None]) -> None:
        """Warns of policies that were calibrated on other weights or another tokenizer."""
        for policy in policies:
            while (base := getattr(policy, "base", None)) is not None:
                policy = base
            if isinstance(policy, ConfidenceExit) and policy.calibrated_on.get("weights"):
                policy.warn_other_model(*self._fingerprints)

    @functools.cached_property
    def _fingerprints(self) -> tuple[str, str]:
        """Of the weights and of the tokenizer, which are read once."""
        return weights_fingerprint(self.params), getattr(self.tokenizer, "fingerprint", "")

    def _verified(self, lossless: bool | Sequence[bool] | None, batch: int) -> np.ndarray:
        """[B] bool: the rows that are verified."""
        asked = self.options.lossless if lossless is None else lossless
        verified_B = per_row("lossless", asked, batch)
        require(
            verified_B.dtype == bool, "lossless", asked, "must be True or False, or one of them per prompt"
        )
        if verified_B.any() and self.options.missing == "propagate":
            raise ValueError("missing='propagate': approximate keys and values verify nothing; use 'exact'")
        if verified_B.any() and self.options.window < 2:
            raise ValueError(f"window={self.options.window}: lossless decoding needs at least 2")
        drafts = not self.options.lookup or bool(verified_B.any())
        fix = "drafts for lossless rows only; give lossless=True, for one row or more"
        require(drafts, "lookup", True, fix)
        drafter = self.options.drafter
        require(drafter is None or bool(verified_B.any()), "drafter", drafter, fix)
        return verified_B

    def _serve(self, budget: Budget | None, subnet: Subnet | None) -> Served:
        """The model that runs in a call."""
        chosen = self._what_runs(budget, subnet, otherwise=self.runs)
        drafter = self.options.drafter
        if drafter is not None:
            whole = chosen is None or chosen == Subnet.full(self.config)
            fix = "the drafter drafts for the whole model; use a sampler without one"
            require(whole, "subnet", chosen, fix)
            return self._models.with_drafter(Drafter.of(drafter))
        if isinstance(chosen, Budget):
            assert self.options.elastic is not None
            return self._models.with_routers(self.options.elastic, chosen)
        return self._models.serve(chosen)

    def _serve_rows(
        self, budget: Budget | None, subnets: Sequence[Subnet | None], batch: int
    ) -> tuple[Served, list[Subnet]]:
        """The model in which every row has a size of its own, and these sizes."""
        require(
            budget is None, "budget", budget, "each says what runs; leave it or the subnets per prompt out"
        )
        fix = f"has {len(subnets)} entries: give one, or one per prompt ({batch})"
        require(len(subnets) == batch, "subnet", subnets, fix)
        for subnet in subnets:
            require_type("subnet", subnet, Subnet | None)
        fits = self.options.missing == "exact"
        require(fits, "missing", self.options.missing, "rows with sizes of their own need 'exact'")
        for name in ("preview", "drafter"):
            fix = "is of the whole model; use a sampler without one for subnets per prompt"
            require(getattr(self.options, name) is None, name, "given", fix)
        rows = [subnet or Subnet.full(self.config) for subnet in subnets]
        return self._models.with_rows(rows), rows

    def _what_runs(
        self, budget: Budget | None, subnet: Subnet | None, *, otherwise: Subnet | Budget | None
    ) -> Subnet | Budget | None:
        """A sub-network, a budget that routers keep while they decode, or None for the whole model."""
        check_choice(budget, subnet, self.options.elastic)
        if budget is not None:
            assert self._chosen is not None
            chosen = self._chosen(budget)
        else:
            chosen = otherwise if subnet is None else subnet

        if isinstance(chosen, Subnet):
            chosen.check(self.config)
            whole = self.options.preview is None or chosen == Subnet.full(self.config)
            require(whole, "subnet", chosen, "the preview is of the whole model; use a sampler without one")
        elif chosen is not None and self.options.missing == "propagate":
            raise ValueError(
                "missing='propagate': layers whose widths routers choose cannot do that; use 'exact'"
            )
        return chosen

    def _prefill(
        self, call: Call, max_new_tokens: int, prompt_state: PromptState | None = None
    ) -> tuple[Call, DecodeState, Controls]:
        """Prefills the prompts of a call.

        Returns:
          (the call, state, controls); where routers choose widths per prompt, the call is bound to the model
          that they chose for these prompts.
        """
        options, prompts = self.options, call.prompts
        # Rows may have other widths each, so that prefill sees all of them.
        copies = 1 if isinstance(call.served.config, NestedConfig) else call.copies
        tokens, lengths = pad_prompts(self.config, prompts[::copies], max_new_tokens)
        model = call.served.for_prompts(tokens, lengths)

        # Ticks write whole windows, so the caches have room for one behind the last token.
        longest = max(map(len, prompts)) + max_new_tokens
        capacity = bucket(max(longest + options.window, tokens.shape[1]))
        if call.prefix is not None:
            capacity = max(capacity, call.prefix.capacity(model))
        needed = cache_bytes(model.config, len(prompts), capacity)
        require_memory("max_new_tokens", max_new_tokens, needed, "the caches")
        controls = make_controls(
            model.config,
            prompts,
            max_new_tokens,
            capacity,
            call.settings,
            policies=call.policies,
            lossless=call.lossless,
            adapt=options.draft is None,
            fire_share=options.fire_share,
            together=options.together,
            tick_costs=(1.0,) * options.window,
        )

        draft = min(options.draft or FIRST_DRAFT, max(options.window - 1, 1))
        arrays = (tokens, lengths, lengths + max_new_tokens, jnp.int32(draft))
        shapes = {"capacity": capacity, "window": options.window}
        measuring = 0.0
        if prompt_state is None:
            prefill = functools.partial(
                model.prefill, model.config, model.params, **shapes, lookup=options.lookup
            )
            if options.lookup and options.draft is None:
                # Before the call has a state of its own, so that no more caches are alive than need be.
                started = time.perf_counter()
                shape = len(prompts), tokens.shape[1]
                controls = tick_costs(model, prefill, controls, shape).put(controls)
                measuring = time.perf_counter() - started
            if model.drafter is not None and options.draft is None:
                started = time.perf_counter()
                costs = drafter_costs(model, prefill, controls, (len(prompts), tokens.shape[1]))
                controls = dataclasses.replace(controls, tick_costs=jnp.asarray(costs, jnp.float32))
                measuring = time.perf_counter() - started
            begun = None
            if call.prefix is not None:
                begun = call.prefix.begin(
                    model, prompts[0], tokens, arrays[2], arrays[3], **shapes, lookup=options.lookup
                )
            if begun is None:
                # Without copies the keyword is left out, because it would be another program to JAX.
                begun = prefill(*arrays, copies=copies) if copies > 1 else prefill(*arrays)
            state = begun
        else:
            require(not model.config.exits, "exit", model.config.exits, "prompt states go on without exits")
            require(
                not options.lookup, "lookup", True, "prompt states go on without it; leave one of them out"
            )
            require(call.prefix is None, "prefix", call.prefix, "goes without prompt states; leave it out")
            fix = "prompt states go on without it; leave one of them out"
            require(model.drafter is None, "drafter", model.drafter, fix)
            state = jit_prefill_from_state(model.config, model.params, prompt_state, *arrays, **shapes)
        if call.top is not None:
            state = with_room(state, call.top)
        if model.drafter is not None:
            state = with_drafting(state, options.window)
        return dataclasses.replace(call, served=model, measuring=measuring), state, controls

    def _advance(self, call: Call, state: DecodeState, controls: Controls) -> Iterator[DecodeState]:
        """Runs `stream_every` iterations at a time; a row ends at its first stop string.

        Yields:
          The states reached, each cut to the tokens that no verification can take back.
        """
        model, detokenizer = call.served, call.detokenizer
        while True:
            state = model.run(
                model.config, model.params, state, controls, self.options.stream_every, call.mode
            )
            if detokenizer.stops:
                ended_B = _stopped(call, state, controls)
                state = dataclasses.replace(state, alive=state.alive & ~jnp.asarray(ended_B))

            yield dataclasses.replace(state, length=final_length(state, controls))
            if not np.any(state.alive):
                return


def _stopped(call: Call, state: DecodeState, controls: Controls) -> list[bool]:
    """Per row, whether its text contains a stop string."""
    tokens, lengths = jax.device_get((state.tokens, final_length(state, controls)))
    check_drawn(call.prompts, tokens, lengths, call.served)
    stopped = []
    for prompt, row, length in zip(call.prompts, tokens, lengths, strict=True):
        emitted = row[len(prompt) : length].tolist()
        stopped.append(call.detokenizer.stops_after(prompt, emitted) is not None)
    return stopped


def _choose(chooser: SubnetChooser, budget: Budget) -> Subnet | Budget:
    """The sub-network for a budget, or the budget itself if routers choose widths while text is made."""
    return budget if chooser.chooses_while_decoding(budget) else chooser.subnet(budget)
