"""What pays on a model and a device, before anything is tuned: measured times, and forecasts of every dial.

One pass over text fits previews of the vocabulary head; a second fits exits in closed form (`depth.fitting`)
and a third, over other text, chooses their thresholds. The model then continues some prompts at full depth,
the parts of an iteration of the decode loop are timed (`bench.parts`), and `bench.forecasts` puts both
together.

Thresholds and previews keep an agreement with the full model on the given text. Lossless configurations emit
the full model's text itself, so that their forecasts are of that very text. Exits are forecast as they are
fitted in closed form; tuning adds to that.
"""

import dataclasses
import itertools
from collections.abc import Callable, Iterable, Sequence

import jax
import numpy as np
import rich.box
from rich.console import Console
from rich.table import Table

from elastic_lm.bench.forecasts import (
    Configuration,
    Forecaster,
    continued,
    gather_evidence,
    head_inputs,
    one_exit,
)
from elastic_lm.bench.parts import PROMPT, ROUNDS, Shape, measure_parts
from elastic_lm.bench.timing import interleave
from elastic_lm.config.exit_policy import DEFAULT_METRIC
from elastic_lm.config.model import ExitConfig, ModelConfig
from elastic_lm.data.batch import Batch
from elastic_lm.data.text_parts import whole_rows
from elastic_lm.decode.sampler import Sampler
from elastic_lm.decode.settings import bucket
from elastic_lm.depth.confidence import NEVER_EXITS
from elastic_lm.depth.fitting import fit_exits
from elastic_lm.depth.forecasting import CPU_FURTHER_POSITION, NO_GAIN, forecast, weight_bytes
from elastic_lm.depth.observations import Observations, observe
from elastic_lm.depth.policies import ConfidenceExit
from elastic_lm.depth.previewing import PreviewReport, fit_previews
from elastic_lm.depth.threshold_search import choose_thresholds, exit_outcome
from elastic_lm.models.decoder import Decoder, Params
from elastic_lm.models.exits import attach_exits, without_exits
from elastic_lm.nn.preview import HeadPreview

SHARES = (0.4, 0.55, 0.67, 0.75, 0.83)  # of the depth, where exits are tried
RANKS, BLOCKS = (64, 128), (256, 1024)  # of previews, fewer than `fit_preview` tries
AGAIN = 8  # tokens of the beginning of a prompt's third reading


@dataclasses.dataclass(frozen=True)
class Forecasts:
    """What one target agreement is forecast to give.

    Attributes:
      target: agreement with the full model.
      preview: speed-up by a preview of the head alone.
      exit_layer: the layer whose exit is forecast best.
      coverage: share of tokens of the model's own text that leave there.
      exits: speed-up by that exit.
      both: speed-up by that exit and the preview.
    """

    target: float
    preview: float
    exit_layer: int
    coverage: float
    exits: float
    both: float = 0.0

    @property
    def best(self) -> str:
        """Which dial to use: "preview", "exits", or "full depth" where neither pays."""
        if max(self.preview, self.exits) <= NO_GAIN:
            return "full depth"
        return "preview" if self.preview >= self.exits else "exits"


@dataclasses.dataclass(frozen=True)
class Plan:
    """What was measured and what it promises.

    Attributes:
      seconds: of a pass over 1 .. W positions per row, greedy.
      head: share of a token's bytes that the vocabulary head is.
      targets: forecasts, one per target agreement.
      lookup: forecast speed-up of lossless decoding with prompt lookup, on the prompts.
      accepted: drafted tokens accepted per verification there.
      previews: reports of the previews, by target.
      configurations: everything that was forecast, at each exit layer.
      full: seconds of an iteration at full depth.
      dtype: of the parameters.
      batch_size: rows.
      repeated: `lookup` where the text has just been read twice.
    """

    seconds: tuple[float, ...]
    head: float
    targets: tuple[Forecasts, ...]
    lookup: float
    accepted: float
    previews: dict[float, PreviewReport]
    configurations: tuple[Configuration, ...] = ()
    full: float = 0.0
    dtype: str = ""
    batch_size: int = 1
    repeated: float = 0.0

    @property
    def paying_exits(self) -> tuple[int, ...]:
        """The layers whose exits are worth tuning, ascending.

        Exits are the better dial at a target there, and gain at least half of what lossless lookup does: of
        two dials of which one gives full depth's very tokens, the other one is worth minutes where it may
        win. Half, because a forecast of lookup varies with the few texts that it is made from.
        """
        least = 1 + (self.lookup - 1) / 2
        rows = [row for row in self.targets if row.best == "exits" and row.exits >= least]
        return tuple(sorted({row.exit_layer for row in rows}))

    @property
    def chosen(self) -> tuple[Configuration, ...]:
        """The fastest configuration of each target, and of the lossless ones, where it pays."""
        groups = [[c for c in self.configurations if c.lossless]]
        groups += [
            [c for c in self.configurations if not c.lossless and c.target == row.target]
            for row in self.targets
        ]
        best = [max(group, key=lambda c: c.speedup) for group in groups if group]
        return tuple(c for c in best if c.speedup > NO_GAIN)

    @property
    def verdict(self) -> str:
        """In words, and why where nothing pays."""
        if self.chosen:
            return "; ".join(map(str, self.chosen))
        best = max(self.configurations, key=lambda c: c.speedup, default=None)
        nearest = f"; the best of all is {best}" if best else ""
        reach = max((c.share for c in self.configurations if c.name == "exits"), default=0.0)
        return (
            f"nothing pays on this model and device, because the head is {self.head:.0%} of a token's bytes "
            f"and all that a preview can save of, no exit is sure of more than {reach:.0%} of the tokens, "
            f"and a verification accepts {self.accepted:.1f} copied tokens{nearest}"
        )


@dataclasses.dataclass(frozen=True)
class Explored:
    """A plan, and what it was made of.

    Attributes:
      plan: the forecasts.
      previews: by target.
      config: the model with exits at every candidate layer.
      params: its parameters, with the exits in closed form.
      thresholds: by layer and target.
      ahead: forecasts further configurations.
    """

    plan: Plan
    previews: dict[float, HeadPreview]
    config: ModelConfig
    params: Params
    thresholds: dict[tuple[int, float], float]
    ahead: Forecaster

    def with_exit(self, layer: int, target: float) -> tuple[Decoder, Params, ConfidenceExit]:
        """The model with the exit after one layer alone, and its policy for a target."""
        config, params = one_exit(self.config, self.params, layer)
        policy = ConfidenceExit(DEFAULT_METRIC, (self.thresholds[layer, target],), (layer,))
        return Decoder(config), params, policy


def explore(
    config: ModelConfig,
    params: Params,
    targets: Sequence[float],
    *,
    fitting: Callable[[], Iterable[Batch]],
    testing: Callable[[], Iterable[Batch]],
    prompts: Sequence[list[int]],
    new_tokens: int,
    window: int,
    batch_size: int = 1,
    rounds: int = ROUNDS,
    say: Callable[[str], None] = print,
) -> Explored:
    """Measures a model and forecasts what each dial would give.

    Args:
      config: the model, in the dtype that it will run in; exits that it has are not looked at.
      params: its canonical parameters.
      targets: agreements with the full model.
      fitting: batches to fit on.
      testing: batches of other text; the first is the largest.
      prompts: token ids, all equally long; continued greedily.
      new_tokens: per prompt.
      window: W; 1 is planned for as 2.
      batch_size: rows that are decoded together.
      rounds: in which the parts of an iteration are timed.
      say: told what is going on.

    Returns:
      The plan, with everything that was fitted for it.
    """
    config, params = without_exits(config, params)
    window = max(window, 2)  # lossless decoding needs so much
    say("fitting previews of the vocabulary head")
    fitted = fit_previews(config, params, fitting(), targets, ranks=RANKS, blocks=BLOCKS)
    previews = {target: preview for target, (preview, _) in fitted.items()}

    layers = candidate_layers(config.n_layers)
    exits = [ExitConfig(layer, "linear", tied=True, init="fit") for layer in layers]
    say(f"fitting exits after layers {', '.join(map(str, layers))}")
    with_exits, grown = attach_exits(config, params, exits, jax.random.key(0))
    grown = fit_exits(with_exits, grown, fitting())
    say("choosing their thresholds on other text")
    tested = iter(testing())
    first = next(tested)
    seen = observe(with_exits, grown, itertools.chain([first], tested))
    thresholds = _thresholds(seen, targets)

    say(f"continuing {len(prompts)} texts, and {len(prompts)} that repeat themselves")
    full = Sampler(Decoder(config), params, window=window)
    rows = [prompts[i % len(prompts)] for i in range(-(-len(prompts) // batch_size) * batch_size)]
    again = [repeated(prompt)[-(config.max_len - new_tokens) :] for prompt in rows]
    own = [continued(full, some, new_tokens, batch_size) for some in (rows, again)]
    evidence = gather_evidence(with_exits, grown, own[0], first.tokens.shape, previews)

    layer = _promising(with_exits, seen, thresholds, targets, window)
    say(f"timing the decode loop, with an exit after layer {layer}")
    longest = max(len(again[0]) + new_tokens, PROMPT + max(2 * window, 4) + 1)
    shape = Shape(batch_size, bucket(longest + window), window)
    distinct = {str(target): preview for target, preview in previews.items()}
    parts = measure_parts(
        config, params, shape, with_exit=one_exit(with_exits, grown, layer), previews=distinct, rounds=rounds
    )

    say("forecasting")
    ahead = Forecaster(config, parts, shape, own, evidence, thresholds)
    plan = _plan(ahead, targets, layers, {target: report for target, (_, report) in fitted.items()})
    return Explored(plan, previews, with_exits, grown, thresholds, ahead)


def for_batch(found: Explored, prompts: Sequence[list[int]], new_tokens: int, layer: int) -> Forecaster:
    """Forecasts of exits for one batch of prompts, measured for so many rows.

    Args:
      found: of the same model at another batch size.
      prompts: token ids of the rows, all equally long.
      new_tokens: per prompt.
      layer: the exit's.
    """
    config, params = without_exits(found.config, found.params)
    window = found.ahead.shape.window
    full = Sampler(Decoder(config), params, window=window)
    texts = continued(full, prompts, new_tokens, len(prompts))
    evidence = gather_evidence(found.config, found.params, texts, (len(prompts), 0), {})
    shape = Shape(len(prompts), bucket(len(prompts[0]) + new_tokens + window), window)
    exit = one_exit(found.config, found.params, layer)
    parts = measure_parts(config, params, shape, with_exit=exit, lookup=False)
    return Forecaster(config, parts, shape, [texts], evidence, found.thresholds)


def candidate_layers(n_layers: int) -> tuple[int, ...]:
    """Layers where exits are tried, all below the last one."""
    return tuple(sorted({max(1, min(round(share * n_layers), n_layers - 1)) for share in SHARES}))


def repeated(prompt: list[int]) -> list[int]:
    """A prompt that has just been read twice and begins a third time."""
    return [*prompt, *prompt, *prompt[:AGAIN]]


def _plan(
    ahead: Forecaster, targets: Sequence[float], layers: Sequence[int], reports: dict[float, PreviewReport]
) -> Plan:
    """Forecasts everything."""
    found: list[Configuration] = []
    rows = []
    for target in targets:
        by_preview = ahead.preview(target)
        usable = [layer for layer in layers if ahead.thresholds[layer, target] < NEVER_EXITS]
        alone = [ahead.exits(layer, target) for layer in usable]
        both = [ahead.exits(layer, target, preview=True) for layer in usable]
        found += [by_preview, *alone, *both]
        # Without an exit that can be used, the deepest is as good as none.
        best = max(alone, key=lambda c: c.speedup, default=Configuration("exits", target, 1.0, layers[-1]))
        together = max((c.speedup for c in both), default=by_preview.speedup)
        assert best.layer is not None
        rows.append(Forecasts(target, by_preview.speedup, best.layer, best.share, best.speedup, together))

    pairs = [key for key, threshold in ahead.thresholds.items() if threshold < NEVER_EXITS]
    drafting = [ahead.drafts(*pair) for pair in pairs]
    lookup = ahead.lookup()
    found += [lookup, *drafting]
    if drafting:
        best = max(drafting, key=lambda c: c.speedup)
        assert best.layer is not None
        assert best.target is not None
        found.append(ahead.drafts(best.layer, best.target, lookup=True))

    weights = weight_bytes(ahead.config)
    return Plan(
        seconds=ahead.parts.passes,
        head=weights.final_head / weights.full,
        targets=tuple(rows),
        lookup=lookup.speedup,
        accepted=lookup.accepted,
        previews=reports,
        configurations=tuple(found),
        full=ahead.parts.full,
        dtype=ahead.config.param_dtype,
        batch_size=ahead.shape.batch,
        repeated=ahead.lookup(repeats=True).speedup,
    )


def _thresholds(seen: Observations, targets: Sequence[float]) -> dict[tuple[int, float], float]:
    """The threshold of every exit alone, for every target."""
    found = {}
    for i, layer in enumerate(seen.layers):
        alone = seen.confidence[:, i : i + 1], seen.agrees[:, i : i + 1], (layer, seen.n_layers)
        for target, (threshold,) in choose_thresholds(*alone, targets).items():
            found[layer, target] = threshold
    return found


def _promising(
    config: ModelConfig,
    seen: Observations,
    thresholds: dict[tuple[int, float], float],
    targets: Sequence[float],
    window: int,
) -> int:
    """The layer whose exit the bytes say most for, over all targets: the loop is timed with it."""
    further = CPU_FURTHER_POSITION if jax.default_backend() == "cpu" else 0.0

    def promise(i: int) -> float:
        layer = seen.layers[i]
        weights = weight_bytes(config.with_exits((config.exits[i],)))
        alone = seen.confidence[:, i : i + 1], seen.agrees[:, i : i + 1], (layer, seen.n_layers)
        found = 0.0
        for target in targets:
            own = (thresholds[layer, target],)
            shares = exit_outcome(*alone, own).shares
            found += forecast(weights, shares, own, window=window, further=further).speedup
        return found

    return seen.layers[max(range(len(seen.layers)), key=promise)]


def show_plan(plan: Plan, console: Console) -> None:
    """Prints times, forecasts and the verdict.

    Args:
      plan: from `explore`.
      console: where it goes.
    """
    widths = [t for t in (1, 2, 4, 8, 16) if t <= len(plan.seconds)]
    times = ", ".join(f"{t}: {1e3 * plan.seconds[t - 1]:.1f}" for t in widths)
    console.print(
        f"    a token at full depth takes {1e3 * plan.full:.1f} ms ({plan.dtype}, batch {plan.batch_size}); "
        f"ms of a verified pass by its positions: {times}; the head is {plan.head:.0%} of the bytes",
        soft_wrap=True,
    )
    table = Table(box=rich.box.SIMPLE_HEAD, title="Forecast speed-up over full depth", title_justify="left")
    layers = sorted({c.layer for c in plan.configurations if c.layer is not None})
    for heading in ("target", "preview of the head", *(f"exit {layer}" for layer in layers), "both", "best"):
        table.add_column(heading, justify="right")
    for row in plan.targets:
        report = plan.previews[row.target]
        table.add_row(
            f"{100 * row.target:g} %",
            f"{row.preview:.2f}x ({report.bytes:.0%} of its bytes)",
            *(_cell(plan, "exits", layer, row.target) for layer in layers),
            f"{row.both:.2f}x",
            row.best,
        )
    console.print(table)
    lossless = max((c for c in plan.configurations if c.name == "lossless exits"), key=_speed, default=None)
    both = max(
        (c for c in plan.configurations if c.name == "lossless lookup + exits"), key=_speed, default=None
    )
    drafts = [
        f"prompt lookup {plan.lookup:.2f}x ({plan.accepted:.1f} copied tokens accepted per verification)"
    ]
    drafts.append(f"{plan.repeated:.2f}x where a text repeats itself")
    drafts += [f"exit {c.layer} {c.speedup:.2f}x" for c in (lossless,) if c]
    drafts += [f"both {c.speedup:.2f}x" for c in (both,) if c]
    console.print(f"    lossless: {', '.join(drafts)}\n    {plan.verdict}", soft_wrap=True)


def _speed(configuration: Configuration) -> float:
    return configuration.speedup


def _cell(plan: Plan, name: str, layer: int, target: float) -> str:
    """A forecast with the share of tokens that leave; "never" where the exit cannot keep the target."""
    found = [c for c in plan.configurations if (c.name, c.layer, c.target) == (name, layer, target)]
    return f"{found[0].speedup:.2f}x ({found[0].share:.0%})" if found else "never"


def to_json(plan: Plan) -> dict[str, object]:
    """The plan as JSON values."""
    rows = [{**dataclasses.asdict(row), "best": row.best} for row in plan.targets]
    previews = {str(target): dataclasses.asdict(report) for target, report in plan.previews.items()}
    return {
        "seconds": list(plan.seconds),
        "head": plan.head,
        "targets": rows,
        "lookup": plan.lookup,
        "accepted_per_verification": plan.accepted,
        "previews": previews,
        "verdict": plan.verdict,
        "full": plan.full,
        "dtype": plan.dtype,
        "batch_size": plan.batch_size,
        "lookup_repeated": plan.repeated,
        "configurations": [dataclasses.asdict(c) for c in plan.configurations],
        "chosen": [dataclasses.asdict(c) for c in plan.chosen],
    }


def affordable_tokens(config: ModelConfig, params: Params, minutes: float, *, fewest: int, most: int) -> int:
    """Tokens to fit on, so that the passes over text take about a third of the minutes.

    Args:
      config: the model.
      params: its parameters.
      minutes: for the whole plan.
      fewest: lower bound.
      most: upper bound.
    """
    config, params = without_exits(config, params)
    row = whole_rows(np.ones((1, min(256, config.max_len) + 1), np.int32))

    def forward() -> None:
        jax.block_until_ready(head_inputs(config, params, row))

    per_token = min(interleave({"row": forward}, rounds=2)["row"]) / row.tokens.size
    # Two passes fit, and another half tests; exits and previews read the head of every token, too.
    return int(min(most, max(fewest, 60 * minutes / 3 / (3 * per_token))))
