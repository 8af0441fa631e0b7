"""What pays on a model and a device, before anything is tuned: measured times, and forecasts of every dial.

One pass over text fits previews of the vocabulary head; a second fits exits in closed form (`depth.fitting`)
and a third, over other text, says how many tokens may leave by them. Times come from the device: an
iteration of the decode loop over 1, 4, 8 and 16 positions (`decode.tick_costs`), with V_h the head's share of
the bytes that a token reads:

    preview(t)    1 / (1 - V_h + V_h beta)                                beta: share of the head that is read
    exits(t)      `depth.forecasting`, with the measured cost of a further position
    lookup        timed against full depth, on the model's own greedy text

Exits are forecast as they are fitted in closed form; tuning adds to that.
"""

import dataclasses
import functools
import itertools
import statistics
from collections.abc import Callable, Iterable, Sequence

import jax
import rich.box
from rich.console import Console
from rich.table import Table

from elastic_lm.bench.timing import interleave
from elastic_lm.config.model import ExitConfig, ModelConfig
from elastic_lm.data.batch import Batch
from elastic_lm.decode.results import SampleStatistics
from elastic_lm.decode.sampler import Sampler
from elastic_lm.decode.settings import bucket
from elastic_lm.decode.tick_costs import measured_costs
from elastic_lm.depth.fitting import fit_exits
from elastic_lm.depth.forecasting import NO_GAIN, forecast, weight_bytes
from elastic_lm.depth.observations import observe
from elastic_lm.depth.previewing import PreviewReport, fit_previews
from elastic_lm.depth.threshold_search import choose_thresholds, exit_outcome
from elastic_lm.models.decoder import Decoder, Params
from elastic_lm.models.exits import attach_exits, without_exits
from elastic_lm.nn.preview import HeadPreview

SHARES = (0.4, 0.55, 0.67, 0.75, 0.83)  # of the depth, where exits are tried


@dataclasses.dataclass(frozen=True)
class Forecasts:
    """What one target agreement is forecast to give.

    Attributes:
      target: agreement with the full model.
      preview: speed-up by a preview of the head alone.
      exit_layer: the layer whose exit is forecast best.
      coverage: share of tokens that may leave there.
      exits: speed-up by that exit.
    """

    target: float
    preview: float
    exit_layer: int
    coverage: float
    exits: float

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
      seconds: of an iteration of the decode loop over 1 .. W positions, batch 1, greedy.
      head: share of a token's bytes that the vocabulary head is.
      targets: forecasts, one per target agreement.
      lookup: measured speed-up of lossless decoding with prompt lookup, on the prompts.
      accepted: drafted tokens accepted per verification there.
      previews: reports of the previews, by target.
    """

    seconds: tuple[float, ...]
    head: float
    targets: tuple[Forecasts, ...]
    lookup: float
    accepted: float
    previews: dict[float, PreviewReport]

    @property
    def exits_pay(self) -> bool:
        """Whether exits are the best of the dials at any target."""
        return any(row.best == "exits" for row in self.targets)

    @property
    def verdict(self) -> str:
        """In words, and why where nothing pays."""
        gains = [row for row in self.targets if row.best != "full depth"]
        if gains:
            return ", ".join(f"{row.best} at {100 * row.target:g} %" for row in gains) + " should pay"
        reach = max(row.coverage for row in self.targets)
        return (
            f"nothing pays on this model and device: the head, {self.head:.0%} of a token's bytes, is all "
            f"that a preview can save of, and no exit is sure of more than {reach:.0%} of the tokens"
        )


def make_plan(
    config: ModelConfig,
    params: Params,
    targets: Sequence[float],
    *,
    fitting: Callable[[], Iterable[Batch]],
    testing: Callable[[], Iterable[Batch]],
    prompts: Sequence[list[int]],
    new_tokens: int,
    window: int,
    say: Callable[[str], None] = print,
) -> tuple[Plan, dict[float, HeadPreview]]:
    """Measures a model and forecasts what each dial would give.

    Args:
      config: the model; exits that it has are not looked at.
      params: its canonical parameters.
      targets: agreements with the full model.
      fitting: batches to fit on.
      testing: batches of other text.
      prompts: token ids, for the lookup.
      new_tokens: per prompt.
      window: W.
      say: told what is going on.

    Returns:
      (the plan, the preview for every target).
    """
    config, params = without_exits(config, params)
    say(f"timing passes, and copying {len(prompts)} texts from themselves")
    seconds, lookup, accepted = _lookup(config, params, prompts, new_tokens, window)

    say("fitting previews of the vocabulary head")
    fitted = fit_previews(config, params, fitting(), targets)
    weights = weight_bytes(config)
    head = weights.final_head / weights.full

    layers = candidate_layers(config.n_layers)
    exits = [ExitConfig(layer, "linear", tied=True, init="fit") for layer in layers]
    say(f"fitting exits after layers {', '.join(map(str, layers))}")
    with_exits, grown = attach_exits(config, params, exits, jax.random.key(0))
    grown = fit_exits(with_exits, grown, fitting())
    say("measuring the exits on other text")
    seen = observe(with_exits, grown, testing())

    # A further position of a pass, relative to the first: measured between one and four.
    further = min(max((seconds[3] / seconds[0] - 1) / 3, 0.0), 1.0)
    rows = []
    for target in targets:
        report = fitted[target][1]
        forecasts = []
        for i, e in enumerate(exits):
            alone = seen.confidence[:, i : i + 1], seen.agrees[:, i : i + 1], (e.layer, config.n_layers)
            thresholds = choose_thresholds(*alone, [target])[target]
            outcome = exit_outcome(*alone, thresholds)
            bytes_read = weight_bytes(config.with_exits((e,)))
            found = forecast(bytes_read, outcome.shares, thresholds, window=window, further=further)
            forecasts.append((found.speedup, e.layer, outcome.shares[0]))
        speedup, layer, coverage = max(forecasts)
        by_preview = 1 / (1 - head + head * report.bytes)
        rows.append(Forecasts(target, by_preview, layer, coverage, speedup))

    reports = {target: report for target, (_, report) in fitted.items()}
    plan = Plan(
        seconds=seconds, head=head, targets=tuple(rows), lookup=lookup, accepted=accepted, previews=reports
    )
    return plan, {target: preview for target, (preview, _) in fitted.items()}


def candidate_layers(n_layers: int) -> tuple[int, ...]:
    """Layers where exits are tried, all below the last one."""
    return tuple(sorted({max(1, min(round(share * n_layers), n_layers - 1)) for share in SHARES}))


def _lookup(
    config: ModelConfig, params: Params, prompts: Sequence[list[int]], new_tokens: int, window: int
) -> tuple[tuple[float, ...], float, float]:
    """Seconds of a pass by its positions, and what prompt lookup gives on the model's own greedy text."""
    full = Sampler(Decoder(config), params)
    copying = Sampler(Decoder(config), params, lossless=True, lookup=True, window=window)
    sides = {"full": full, "lookup": copying}

    def run(name: str, prompt: list[int]) -> SampleStatistics:
        return sides[name].sample(prompt, new_tokens, ignore_eos=True).stats

    ratios, stats = [], []
    for prompt in prompts:
        # Timed, not forecast: tick costs leave out the search of the text, which small models feel.
        timed = interleave({name: functools.partial(run, name, prompt) for name in sides}, rounds=3)
        ratios += [a / b for a, b in zip(timed["full"], timed["lookup"], strict=True)]
        stats.append(run("lookup", prompt))

    capacity = bucket(max(map(len, prompts)) + new_tokens + window)
    seconds = measured_costs(config, params, batch=1, capacity=capacity, greedy=True, window=window)
    accepted = sum(s.accepted for s in stats) / sum(s.verifications for s in stats)
    return seconds, statistics.median(ratios), accepted


def show_plan(plan: Plan, console: Console) -> None:
    """Prints times, forecasts and the verdict.

    Args:
      plan: from `make_plan`.
      console: where it goes.
    """
    widths = [t for t in (1, 2, 4, 8, 16) if t <= len(plan.seconds)]
    times = ", ".join(f"{t}: {1e3 * plan.seconds[t - 1]:.1f}" for t in widths)
    console.print(f"    ms of a pass by its positions: {times}; the head is {plan.head:.0%} of the bytes")
    table = Table(box=rich.box.SIMPLE_HEAD, title="Forecast speed-up over full depth", title_justify="left")
    for heading in ("target", "preview of the head", "exit (closed form)", "best"):
        table.add_column(heading, justify="right")
    for row in plan.targets:
        report = plan.previews[row.target]
        table.add_row(
            f"{100 * row.target:g} %",
            f"{row.preview:.2f}x ({report.bytes:.0%} of its bytes)",
            f"{row.exits:.2f}x (layer {row.exit_layer}, {row.coverage:.0%} leave)",
            row.best,
        )
    console.print(table)
    console.print(
        f"    lossless with prompt lookup: {plan.lookup:.2f}x on these prompts, {plan.accepted:.1f} drafted "
        f"tokens accepted per verification\n    {plan.verdict}"
    )


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
    }


def first_tokens(batches: Iterable[Batch], tokens: int) -> Iterable[Batch]:
    """The first batches, of about so many tokens, but at least 8: previews need some to calibrate on."""
    batches = iter(batches)
    first = next(batches)
    count = max(8, tokens // first.tokens.size)
    return itertools.chain([first], itertools.islice(batches, count - 1))
