"""A decoder as a model of the lm-evaluation-harness.

`HarnessModel` has what the harness asks of a model: log-likelihoods of continuations and of whole texts,
continuations, and chat templates. `harness_model` makes one that is also an `lm_eval.api.model.LM`. Tokens
are joined and cut as the harness's own model of `transformers` does, so that figures of both compare.

Which distribution a token is scored by is a `Reading`: the last layer's, that of one exit, or with thresholds
that of the first exit that is sure enough at that token, which is the one that the sampler would draw from.
"""

import contextlib
import dataclasses
import functools
import importlib
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import jax
import numpy as np

from elastic_lm.cascade.rule import CascadeRule
from elastic_lm.config.checks import require, require_at_least_1
from elastic_lm.config.exit_policy import DEFAULT_METRIC
from elastic_lm.config.subnet import Subnet
from elastic_lm.data.tokenizer import Tokenizer
from elastic_lm.decode.sampler import Sampler
from elastic_lm.depth.policies import ConfidenceExit, StaticExit, on_subnet
from elastic_lm.depth.subnet_policies import exits_below_the_end
from elastic_lm.depth.threshold_search import emitting_exit
from elastic_lm.harness.cascaded import passed_on
from elastic_lm.harness.library import harness
from elastic_lm.harness.scoring import Continuation, DepthScores, Scorer
from elastic_lm.models.decoder import Decoder, Params
from elastic_lm.width.slicing import slice_params

MAX_NEW_TOKENS = 256  # of a task that does not say how many, as for the harness's own models
BATCH_SIZE = 8


@dataclasses.dataclass(frozen=True)
class Reading:
    """Which depth scores a token; without thresholds, the same one for all of them.

    Attributes:
      column: an exit of the model that runs, counted from 0, or their number for the last layer.
      thresholds: per exit, with which the first exit whose confidence reaches its own scores the token.
      gates: per exit, the least that its gate must give; () = always open.
    """

    column: int
    thresholds: tuple[float, ...] | None = None
    gates: tuple[float, ...] = ()

    def columns(self, scores: DepthScores) -> np.ndarray:
        """[M] column of `DepthScores` that scores each token."""
        if self.thresholds is None:
            return np.full(len(scores.nats), self.column)
        confidence = scores.confidence
        if self.gates:
            # A confidence below 0 reaches no threshold, not even one of 0.
            confidence = np.where(scores.gate < np.asarray(self.gates, np.float32), -1.0, confidence)
        return emitting_exit(confidence.astype(np.float32), self.thresholds)


class HarnessModel:
    """A decoder, or a part of one, that answers the requests of the lm-evaluation-harness.

    Attributes:
      config: of the model that runs, without exits that nothing reads.
      layers: depths that can be scored by: those of the exits, then all layers.

    Example:
      ```python
      from types import SimpleNamespace

      import elastic_lm as el
      from elastic_lm.harness.model import HarnessModel

      model, params = el.load(el.embedded_model())
      tokenizer = el.Tokenizer.load(el.embedded_model())
      scored = HarnessModel(model, params, tokenizer)
      ((log_likelihood, greedy),) = scored.score([scored.continuation("import numpy", " as np")])
      assert log_likelihood < 0
      ```
    """

    backend = "causal"  # read by the harness: contexts and continuations are tokenised together
    tokenizer = None  # the harness takes this for one of `transformers`

    def __init__(
        self,
        model: Decoder,
        params: Params,
        tokenizer: Tokenizer,
        *,
        exit: int | None = None,
        thresholds: ConfidenceExit | None = None,
        subnet: Subnet | None = None,
        cascade: CascadeRule | None = None,
        batch_size: int = BATCH_SIZE,
        max_length: int | None = None,
        max_new_tokens: int = MAX_NEW_TOKENS,
        remember: bool = False,
        name: str = "",
    ) -> None:
        """Prepares a model; nothing is compiled yet.

        Args:
          model: the decoder; its config is static under jit.
          params: its canonical parameters.
          tokenizer: of the model.
          exit: layer, of the whole model, whose exit scores and continues; None = the last layer.
          thresholds: an exit policy; every token is scored by the first exit that is sure enough.
          subnet: the part of the model that runs.
          cascade: for tasks of multiple choice: what is described so far is the Swift, the whole model at
            full depth is the Super, and this rule decides between them (`cascaded.passed_on`).
          batch_size: rows per program; static.
          max_length: tokens of a row at most; None = what the model reads.
          max_new_tokens: of a continuation, where a task does not say.
          remember: keep all scores, so that another reading of the same texts reads nothing again.
          name: of the model, for caches of the harness.

        Raises:
          ValueError: an argument is out of range, or the model has no such exit or sub-network.
        """
        super().__init__()
        require_at_least_1("max_new_tokens", max_new_tokens)
        both = exit is not None and thresholds is not None
        require(not both, "exit", exit, "goes without thresholds; give one of them")
        if thresholds is not None:
            thresholds.check(model.config)
        self.config, held = model.config, params
        if subnet is not None:
            config, held = slice_params(model.config, params, subnet)
            self.config = exits_below_the_end(config)

        metric = thresholds.metric if thresholds is not None else DEFAULT_METRIC
        self._scorer = Scorer(
            self.config,
            held,
            metric=metric,
            batch_size=batch_size,
            max_length=max_length,
            remember=remember or cascade is not None,  # a Super of the same layers has been computed already
        )
        self._whole, self._params, self._subnet = model, params, subnet
        self._tokenizer, self._policy = tokenizer, thresholds
        self._max_new_tokens, self._batch_size, self.name = max_new_tokens, batch_size, name
        self._reading = self._reading_of(exit, thresholds)
        self._exit: int | None = None if self._reading.column == len(self.layers) - 1 else exit
        fix = "needs a Swift; name an exit, thresholds, a subnet or a budget"
        swift = subnet is not None or thresholds is not None or self._exit is not None
        require(cascade is None or swift, "cascade", cascade, fix)
        self._cascade, self.passed, self.answered = cascade, 0, 0  # requests that the Super answered, of all
        self.seen: list[tuple[DepthScores, np.ndarray]] = []  # what was asked, and which columns answered

    @property
    def layers(self) -> tuple[int, ...]:
        """Depths that the model that runs can be read at, in its own layers."""
        return (*(e.layer for e in self.config.exits), self.config.n_layers)

    @property
    def depth(self) -> int | None:
        """Layers that answer; None = the thresholds say for each token."""
        return self.layers[self._reading.column] if self._reading.thresholds is None else None

    def at(self, column: int) -> "HarnessModel":
        """The same model, with the same memory of scores, read at one of `layers`.

        Args:
          column: position in `layers`.
        """
        other = self._like()
        other._reading, other._policy = Reading(column), None
        of_whole = [old.layer for old, _ in self._exits()]
        other._exit = of_whole[column] if column < len(of_whole) else None
        return other

    def with_thresholds(self, policy: ConfidenceExit) -> "HarnessModel":
        """The same model read with an exit policy, whose metric is the one that it was made with."""
        other = self._like()
        other._reading, other._policy, other._exit = self._reading_of(None, policy), policy, None
        return other

    def forget(self) -> None:
        """Drops the scores that are kept, of all readings of this model."""
        self._scorer.forget()

    @property
    def parameters(self) -> int:
        """Parameters of the model that runs, its exits included."""
        return sum(int(np.prod(leaf.shape)) for leaf in jax.tree.leaves(self._scorer.params))

    def _like(self) -> "HarnessModel":
        other = object.__new__(type(self))
        other.__dict__.update(self.__dict__)
        other.seen = []
        return other

    def _exits(self) -> list[tuple[Any, Any]]:
        """(exit of the whole model, exit of the model that runs) for each of the latter."""
        if self._subnet is None:
            return [(e, e) for e in self.config.exits]
        kept = {e.layer for e in self.config.exits}
        return [(old, new) for old, new in self._subnet.exits(self._whole.config) if new.layer in kept]

    def _reading_of(self, exit: int | None, policy: ConfidenceExit | None) -> Reading:
        last = len(self.config.exits)
        if policy is not None:
            here: Any = policy
            if self._subnet is not None:
                here = on_subnet(policy, self._whole.config, self._subnet)
            return Reading(last, tuple(here.thresholds), tuple(getattr(here, "gates", ())))
        if exit is None or exit == self._whole.config.n_layers:
            return Reading(last)
        by_layer = {old.layer: i for i, (old, _) in enumerate(self._exits())}
        fix = f"the model that runs has exits after layers {tuple(by_layer) or 'none'}"
        require(exit in by_layer, "exit", exit, fix)
        return Reading(by_layer[exit])

    # What the harness asks about the model.

    @property
    def max_length(self) -> int:
        """Tokens of a row at most."""
        return self._scorer.max_length

    @property
    def eot_token_id(self) -> int:
        """The token that ends a text."""
        ends = self._tokenizer.eos_ids
        fix = "the tokenizer names no token that ends a text; put a tokenizer_config.json beside it"
        require(bool(ends), "eos_token", None, fix)
        return ends[0]

    @property
    def prefix_token_id(self) -> int:
        """What stands before a text where nothing else does: the token that begins texts, or ends them."""
        first = self._tokenizer.named_token("bos_token")
        if first is None:
            first = self._tokenizer.bos_id
        return self.eot_token_id if first is None else first

    @property
    def tokenizer_name(self) -> str:
        """Tells caches of requests apart."""
        return self._tokenizer.fingerprint

    @property
    def max_gen_toks(self) -> int:
        """Tokens of a continuation, where a task does not say."""
        return self._max_new_tokens

    def get_model_info(self) -> dict[str, Any]:
        """What the harness writes beside its results."""
        info: dict[str, Any] = {"model_num_parameters": self.parameters, "model_dtype": self.config.dtype}
        if self._cascade is not None and self.answered:
            info["share_of_the_super"] = self.passed / self.answered
        return {**info, "model_name": self.name}

    # Texts and tokens.

    def tok_encode(self, string: str, add_special_tokens: bool | None = None, **_: Any) -> list[int]:
        """Token ids; the first token of all texts is put before one that does not begin with it.

        Args:
          string: the text.
          add_special_tokens: True and False say whether that token is put there, whatever the text.
        """
        bos = True if add_special_tokens is None else add_special_tokens
        if add_special_tokens is None and (first := self._tokenizer.bos_id) is not None:
            begins = self._tokenizer.decode([first], special=True)
            bos = not (begins and string.startswith(begins))
        return self._tokenizer.encode(string, bos=bos)

    def tok_decode(self, tokens: Sequence[int], **_: Any) -> str:
        """Text of token ids, without special tokens."""
        return self._tokenizer.decode(tokens)

    def continuation(self, context: str, text: str) -> Continuation:
        """A text after its context, as tokens.

        Spaces at the end of the context go to the continuation. Both are tokenised as one text, of which the
        continuation has what follows as many tokens as the context alone has.

        Args:
          context: may be empty; the text then follows `prefix_token_id`.
          text: what is scored.
        """
        if context == "":
            ids = self.tok_encode(text, add_special_tokens=False)
            first = self.prefix_token_id
            before, after = ([first], ids) if ids[:1] != [first] else (ids[:1], ids[1:])
            return Continuation(tuple(before), tuple(after))
        stripped = context.rstrip()
        before = self.tok_encode(stripped)
        whole = self.tok_encode(context + text)
        return Continuation(tuple(before or [self.prefix_token_id]), tuple(whole[len(before) :]))

    def chat_template(self, chat_template: bool | str = False) -> str | None:
        """The chat template that is applied; None = none is asked for.

        Raises:
          ValueError: the tokenizer has none, or none of this name.
        """
        if chat_template is False or chat_template is None:
            return None
        own = self._tokenizer.chat_template
        fix = "the tokenizer has no chat template; put a chat_template.jinja beside it"
        require(own is not None, "apply_chat_template", chat_template, fix)
        assert own is not None
        return own.text(chat_template if isinstance(chat_template, str) else None)

    def apply_chat_template(
        self, chat_history: Sequence[Mapping[str, Any]], add_generation_prompt: bool = True
    ) -> str:
        """A conversation as text; without the prompt, the model goes on with the last message."""
        return self._tokenizer.apply_chat_template(
            chat_history,
            tokenize=False,
            add_generation_prompt=add_generation_prompt,
            continue_final_message=not add_generation_prompt,
        )

    # What the harness asks the model.

    def score(
        self, continuations: Sequence[Continuation], disable_tqdm: bool = True
    ) -> list[tuple[float, bool]]:
        """(Log-likelihood in nats, whether greedy decoding would write it) of each continuation."""
        with _bar(len(continuations), disable_tqdm, "log-likelihoods") as advance:
            all_scores = self._scorer.score(continuations, advance)
        return [self._read(scores) for scores in all_scores]

    def _read(self, scores: DepthScores) -> tuple[float, bool]:
        columns = self._reading.columns(scores)
        self.seen.append((scores, columns))
        own = np.arange(len(columns)), columns
        return -float(scores.nats[own].sum(dtype=np.float64)), bool(scores.greedy[own].all())

    def loglikelihood(self, requests: Sequence[Any], disable_tqdm: bool = False) -> list[tuple[float, bool]]:
        """Answers requests with (context, continuation) in `args`."""
        asked = [self.continuation(*request.args) for request in requests]
        answers = self.score(asked, disable_tqdm)
        if self._cascade is not None:
            places = passed_on(self._cascade, requests, asked, answers)
            for i, answer in zip(places, self._super.score([asked[i] for i in places]), strict=True):
                answers[i] = answer
            self.passed, self.answered = self.passed + len(places), self.answered + len(asked)
        for request, answer in zip(requests, answers, strict=True):
            self._keep("loglikelihood", request.args, answer)
        return answers

    @functools.cached_property
    def _super(self) -> "HarnessModel":
        if self._subnet is None:
            return self.at(len(self.layers) - 1)
        how: Any = {"batch_size": self._batch_size, "max_length": self.max_length}
        return HarnessModel(self._whole, self._params, self._tokenizer, **how)

    def _no_cascade(self) -> None:
        fix = "decides between choices, and this task has none; leave it out"
        require(self._cascade is None, "cascade", "a rule", fix)

    def _loglikelihood_tokens(
        self, requests: Sequence[Any], disable_tqdm: bool = False, **_: Any
    ) -> list[tuple[float, bool]]:
        """The same for requests that are tokens already."""
        asked = [Continuation(tuple(before), tuple(after)) for _, before, after in requests]
        return self.score(asked, disable_tqdm)

    def loglikelihood_rolling(self, requests: Sequence[Any], disable_tqdm: bool = False) -> list[float]:
        """Log-likelihood in nats of whole texts, in windows of `max_length` tokens that follow each other."""
        self._no_cascade()
        windows, counts = [], []
        for request in requests:
            (text,) = request.args
            own = self.windows(self.tok_encode(text))
            windows += own
            counts.append(len(own))
        answers = [value for value, _ in self.score(windows, disable_tqdm)]

        totals, end = [], 0
        for request, count in zip(requests, counts, strict=True):
            totals.append(sum(answers[end : end + count]))
            end += count
            self._keep("loglikelihood_rolling", request.args, totals[-1])
        return totals

    def windows(self, ids: Sequence[int]) -> list[Continuation]:
        """A text in parts that are each scored once; the last one has as much before it as fits."""
        longest, before = self.max_length, [self.prefix_token_id]
        whole = [*before, *ids]
        found, start = [], 1
        while start < len(whole):
            stop = min(start + longest, len(whole))
            # The row that predicts up to `stop` has the `longest` tokens before the last one of them.
            first = max(stop - 1 - longest, 0)
            found.append(Continuation(tuple(whole[first:start]), tuple(whole[start:stop])))
            start = stop
        return found

    def generate_until(self, requests: Sequence[Any], disable_tqdm: bool = False) -> list[str]:
        """Continues contexts until one of the texts that end them; requests alike run as batches."""
        self._no_cascade()
        groups: dict[str, list[int]] = {}
        for i, request in enumerate(requests):
            groups.setdefault(repr(sorted(request.args[1].items())), []).append(i)

        answers = [""] * len(requests)
        with _bar(len(requests), disable_tqdm, "continuations") as advance:
            for places in groups.values():
                how = generation(requests[places[0]].args[1], self._max_new_tokens)
                ids = {i: self._shortened(requests[i].args[0], how.max_new_tokens) for i in places}
                places = sorted(places, key=lambda i, ids=ids: -len(ids[i]))
                for first in range(0, len(places), self._batch_size):
                    batch = places[first : first + self._batch_size]
                    texts = self._continue([ids[i] for i in batch], how)
                    for i, text in zip(batch, texts, strict=True):
                        answers[i] = text
                        self._keep("generate_until", requests[i].args, text)
                    advance(len(batch))
        return answers

    def _shortened(self, context: str, new_tokens: int) -> list[int]:
        """A context as tokens, without its beginning where it leaves no room."""
        room = self.max_length - new_tokens
        fix = f"max_length={self.max_length} leaves no room for a context; ask for fewer"
        require(room > 0, "max_gen_toks", new_tokens, fix)
        return self.tok_encode(context)[-room:] or [self.prefix_token_id]

    def _continue(self, prompts: list[list[int]], how: "Generation") -> list[str]:
        samples = self._sampler.sample(
            prompts,
            how.max_new_tokens,
            exit=self._exit_policy(),
            stop=how.until,
            stop_tokens=(self.eot_token_id,),
            **how.settings,
        )
        ends = [*how.until, self._tokenizer.decode([self.eot_token_id], special=True)]
        return [functools.reduce(_before, ends, sample.text) for sample in samples]

    @functools.cached_property
    def _sampler(self) -> Sampler:
        # Drafts and windows change how fast text comes, and not which.
        return Sampler(self._whole, self._params, self._tokenizer, subnet=self._subnet)

    def _exit_policy(self) -> Any:
        if self._policy is not None:
            return self._policy.for_any_weights()
        if self._exit is None:
            return None
        return StaticExit(self._exit, tuple(e.layer for e in self._whole.config.exits))

    def _keep(self, kind: str, args: Any, answer: Any) -> None:
        """Gives an answer to the harness's cache, where it has one."""
        hook = getattr(self, "cache_hook", None)
        if hook is not None:
            hook.add_partial(kind, args, answer)


def harness_model(*args: Any, **options: Any) -> HarnessModel:
    """A `HarnessModel` that is also an `lm_eval.api.model.LM`, for `lm_eval.simple_evaluate(model=...)`.

    Args:
      *args: of `HarnessModel`.
      **options: of `HarnessModel`.

    Raises:
      ValueError: lm-eval is not installed; names the extra.
    """
    return lm_class()(*args, **options)


@functools.cache
def lm_class(base: type = HarnessModel) -> type:
    """A class of ours that is one of the harness's models as well."""
    template = harness("api.model").TemplateLM
    return type("ElasticLM", (base, template), {"__module__": __name__, "__doc__": base.__doc__})


@dataclasses.dataclass(frozen=True)
class Generation:
    """How a task wants continuations."""

    until: tuple[str, ...]
    max_new_tokens: int
    settings: dict[str, Any]


# Names under which tasks say how many tokens may be written, the first one first.
LENGTHS = ("max_gen_toks", "max_new_tokens", "max_tokens", "max_completion_tokens")
SETTINGS = ("top_k", "top_p", "min_p", "repetition_penalty", "seed")


def generation(given: Mapping[str, Any], max_new_tokens: int) -> Generation:
    """What the `generation_kwargs` of a task say.

    Args:
      given: from the task.
      max_new_tokens: where the task does not say.

    Raises:
      ValueError: one of them is not known here, and would change what is written.
    """
    rest = dict(given)
    until = rest.pop("until", ())
    until = (until,) if isinstance(until, str) else tuple(until or ())
    lengths = [value for name in LENGTHS if (value := rest.pop(name, None)) is not None]
    temperature = float(rest.pop("temperature", 0.0) or 0.0)
    sampled = rest.pop("do_sample", None)
    if sampled is False:
        temperature = 0.0
    elif sampled and not temperature:
        temperature = 1.0
    settings = {name: rest.pop(name) for name in SETTINGS if rest.get(name) is not None}
    if rest:
        name, value = next(iter(rest.items()))
        known = ", ".join(("until", "do_sample", "temperature", LENGTHS[0], *SETTINGS))
        raise ValueError(f"generation_kwargs.{name}={value!r}: is not known here; known are {known}")
    length = int(lengths[0]) if lengths else max_new_tokens
    return Generation(tuple(u for u in until if u), length, {"temperature": temperature, **settings})


def _before(text: str, end: str) -> str:
    """What stands before an end; all of it where the end is not in it, or empty."""
    return text.split(end)[0] if end else text


@contextlib.contextmanager
def _bar(total: int, disabled: bool, what: str) -> Iterator[Callable[[int], object]]:
    """A bar in the terminal, which is told how much more is done."""
    if disabled or not sys.stderr.isatty():
        yield lambda count: None
        return
    with importlib.import_module("tqdm").tqdm(total=total, desc=what) as shown:
        yield shown.update
