"""`elastic-lm calibrate`: fits the exits' thresholds on held-out text, with a guarantee or a forecast."""

import argparse
import dataclasses
import sys
from typing import TYPE_CHECKING, Any

from elastic_lm.cli.belonging import parts_of
from elastic_lm.cli.held_out import (
    ContinuedOptions,
    add_continued,
    generated_line,
    generated_text,
    held_out_batches,
    held_out_files,
    with_prompts,
)
from elastic_lm.cli.many_processes import ProcessOptions, add_processes
from elastic_lm.cli.model_folder import load_with_tokenizer
from elastic_lm.cli.parser import metrics, require_flag, require_share, share
from elastic_lm.cli.width_flags import WidthOptions, add_width, chosen_subnet
from elastic_lm.config.checks import require_choice
from elastic_lm.config.decoding import WINDOW
from elastic_lm.config.exit_policy import (
    DEFAULT_METRIC,
    DEFAULT_TARGET,
    GATE_METRIC,
    METRICS,
    STRATEGIES,
)

if TYPE_CHECKING:
    from elastic_lm.config.model import ModelConfig
    from elastic_lm.decode.generated import GeneratedText
    from elastic_lm.depth.guarantee import Guarantee
    from elastic_lm.depth.policies import ConfidenceExit
    from elastic_lm.models.decoder import Params

HELP = """\
Finds the exits' thresholds for a target agreement with the full model, on held-out text.

elastic-lm calibrate --model runs/exits/model --data held_out.txt --target 0.99 --out thresholds.json
elastic-lm calibrate --model runs/exits/model --target 0.9 --epsilon 0.05 --seq-len 64 --tokens 100000
elastic-lm calibrate --model runs/exits/model --forecast
elastic-lm calibrate --model runs/elastic/model --budget parameters=70%
elastic-lm calibrate --model runs/exits/model --data own.jsonl   (from `generate --unprompted`)

The file records the model, the data, the metric, the target and the measured curve. Use text that the model
was not trained on. Without --epsilon the target is met on average: about half of new text agrees a little
less, which --margin makes up for. With --epsilon, half of the held-out rows test that the target holds for
new text, except with this probability; many short rows serve this best. --forecast also predicts speed-ups at
batch size 1, before anything is timed. With --budget or --subnet, thresholds are those of a sub-network, for
`generate` with the same --budget or --subnet.

The report also says where the thresholds agree least: in which files, on which kinds of tokens, and with how
much context. The file holds all of these slices.

A few held-out prompts are continued with the thresholds (--continuations), because text that a model writes
itself may agree less than given text. Thresholds under which it degenerates are not written.
"""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Options(ProcessOptions, ContinuedOptions, WidthOptions):
    """What thresholds are fitted for, and what is said about them."""

    target: float = DEFAULT_TARGET  # share of tokens that equal the full model's
    metric: str = DEFAULT_METRIC  # confidence that thresholds are compared with
    strategy: str = STRATEGIES[0]  # how thresholds are chosen
    margin: float = 0.0  # agreement beyond the target that the text that chooses thresholds must have
    epsilon: float | None = None  # the target is guaranteed except with this probability
    delta: float | None = None  # with epsilon: at most this share of rows is below the target
    forecast: bool = False  # speed-ups are predicted
    window: int = WINDOW  # of the sampler that is forecast
    out: str = "thresholds.json"  # file that is written

    def __post_init__(self) -> None:
        ProcessOptions.__post_init__(self)
        WidthOptions.__post_init__(self)
        for flag, value in (("--target", self.target), ("--epsilon", self.epsilon), ("--delta", self.delta)):
            require_share(flag, value)
        require_flag(0 <= self.margin < 1, "--margin", self.margin, "must be a share from 0 to below 1")
        require_choice("metric", self.metric, METRICS)
        require_choice("strategy", self.strategy, STRATEGIES)
        require_flag(self.window >= 1, "--window", self.window, "must be at least 1")

        guaranteed = self.epsilon is not None
        if self.delta is not None and not guaranteed:
            raise ValueError(f"--delta {self.delta}: is part of a guarantee; give --epsilon too")
        if guaranteed and self.margin:
            raise ValueError(f"--margin {self.margin}: with --epsilon text tests the target; leave it out")
        if guaranteed and self.strategy != "joint":
            raise ValueError(f"--strategy {self.strategy}: with --epsilon thresholds are joint; leave it out")


def add_flags(parser: argparse.ArgumentParser) -> None:
    """Adds the flags of `Options`."""
    add_continued(parser, "held-out text")
    add = parser.add_argument
    target = f"share of tokens equal to the full model's (default: {Options.target})"
    add("--target", type=share, help=target)
    margin = f"agreement beyond the target that thresholds are chosen for (default: {Options.margin:g})"
    add("--margin", type=float, metavar="M", help=margin)
    add("--metric", help=f"confidence: {metrics(gates=True)} (default: {Options.metric})")
    strategy = "how thresholds are chosen: all exits jointly, or each by its own most confident tokens "
    add("--strategy", choices=STRATEGIES, help=f"{strategy}(default: {Options.strategy})")
    add("--epsilon", type=share, metavar="P", help="guarantee the target except with this probability")
    delta = "with --epsilon: also guarantee that at most this share of rows is below the target"
    add("--delta", type=share, metavar="S", help=delta)
    add("--forecast", action="store_true", help="predict speed-ups and what looking at an exit costs")
    window = f"of `generate`, for --forecast (default: {Options.window})"
    add("--window", type=int, metavar="W", help=window)
    add("--out", metavar="FILE", help=f"default: {Options.out}")
    add_width(parser)
    add_processes(parser)


def run(options: Options) -> None:
    """Fits the thresholds, prints the curve, and writes the file."""
    from elastic_lm.data.piece_kinds import token_kinds
    from elastic_lm.depth.calibration import calibrate
    from elastic_lm.depth.guarantee import RiskControl
    from elastic_lm.depth.subnet_policies import exits_below_the_end, of_whole_model
    from elastic_lm.files.atomic import prepare_output
    from elastic_lm.models.decoder import Decoder
    from elastic_lm.processes import all_or_none, is_first
    from elastic_lm.width.slicing import slice_params

    risk = None
    if options.epsilon is not None:
        risk = RiskControl(options.target, options.epsilon, options.delta)
    with all_or_none():
        if is_first():
            prepare_output(options.out)

    model, params, tokenizer, folder = load_with_tokenizer(options.model, options.dtype, options.mesh)
    independent = risk is not None
    batches, text = held_out_batches(options, tokenizer, "calibration", independent, sources=True)
    prompts, batches = with_prompts(batches, options, model.config.max_len, tokenizer.bos_id)

    whole = parts_of(params, tokenizer)["weights"] if options.subnet or options.budget else ""
    subnet = chosen_subnet(options, folder, model.config, params, tokenizer)
    config = model.config
    if subnet is not None:
        config, params = slice_params(config, params, subnet)
        config = exits_below_the_end(config)

    config, params, untuned = with_exits(config, params, options)

    goal: dict[str, Any] = {
        name: getattr(options, name) for name in ("target", "margin", "metric", "strategy")
    }
    goal |= {"model": folder, "data": text, "tokenizer": tokenizer.fingerprint}
    goal |= {"kinds": token_kinds(tokenizer), "files": held_out_files(options, "calibration")}
    policy = calibrate(config, params, batches, risk=risk, **goal)
    found = None if untuned else generated_text(Decoder(config), params, policy, prompts, options)
    if found:
        provenance = {**policy.provenance, "generated": dataclasses.asdict(found)}
        policy = dataclasses.replace(policy, provenance=provenance)

    print_findings(config, policy, found, options)
    if found and (reason := found.degenerate(options.target)):
        raise ValueError(
            f"--target {options.target:g}: {reason}; nothing is written. Raise --target, tune the exits "
            "further, or leave this check out with --continuations 0"
        )
    if not untuned:
        if subnet is not None:
            policy = of_whole_model(policy, model.config, subnet, weights=whole)
        with all_or_none():
            if is_first():
                policy.save(options.out)
    if is_first():
        done = "nothing written: the model has no exits yet" if untuned else f"written to {options.out}"
        print(done, file=sys.stderr)


def print_findings(
    config: "ModelConfig", policy: "ConfidenceExit", found: "GeneratedText | None", options: Options
) -> None:
    """The curve, and what is known of generated text, of the guarantee and of speed."""
    print(curve_table(policy, options.target))
    if policy.slices:
        print(f"\n{policy.slices.text('agreement with the full model')}\n")
    if found:
        print(generated_line(found))
    if policy.guarantee:
        print(guarantee_text(policy.guarantee))
    if options.forecast:
        print(forecast_table(config, policy, options.window))


def with_exits(
    config: "ModelConfig", params: "Params", options: Options
) -> "tuple[ModelConfig, Params, bool]":
    """The model with its exits; to forecast one without exits, the model with exits that nothing tuned.

    Returns:
      (config, parameters, whether nothing tuned the exits).

    Raises:
      ValueError: it has no exits, and more than a forecast is wanted.
    """
    import jax

    from elastic_lm.config.model import ExitConfig
    from elastic_lm.models.exits import attach_exits

    if config.exits:
        return config, params, False
    if not options.forecast:
        part = " in this part" if options.subnet or options.budget else ""
        raise ValueError(
            f"{options.model or 'the embedded model'} has no exits{part}: tune some (`elastic-lm train "
            "--config ee_tuning --config.train.init_from=MODEL`), or forecast their gain with "
            "--forecast"
        )

    layers = sorted({max(1, config.n_layers * i // 4) for i in (1, 2, 3)} - {config.n_layers})
    print(f"exits after layers {layers} that nothing tuned: what tuned ones gain is more", file=sys.stderr)
    exits = [ExitConfig(layer, "norm", tied=True) for layer in layers]
    return *attach_exits(config, params, exits, jax.random.key(0)), True


def curve_table(policy: "ConfidenceExit", target: float) -> str:
    """Agreement, mean layers and thresholds for every target, the chosen one marked."""
    lines = ["target   agreement   mean layers   thresholds"]
    for point in policy.curve:
        chosen = point.target == target
        thresholds = ", ".join("never" if t > 1 else f"{t:.3f}" for t in point.thresholds)
        row = f"{point.target:<7g} {point.agreement:>10.4f} {point.mean_layers:>13.2f}   {thresholds}"
        lines.append(f"{row} {'*' if chosen else ' '}")
        # The note of a guaranteed point is its statement, which is printed below the table.
        if point.note and not (policy.guarantee and chosen):
            lines.append(f"{' ' * 8}{point.note}")
    return "\n".join(lines)


def guarantee_text(guarantee: "Guarantee") -> str:
    """What is guaranteed, or how much text is missing, and the figures behind it."""
    g = guarantee
    lines = ["", f"guaranteed: {g.statement}" if g.achieved else g.statement]
    if not g.achieved and g.more_sequences:
        lines.append("  rows are sequences: raise --tokens, lower --seq-len, or lower --target")
    if g.tested:
        thresholds = "these thresholds" if g.achieved else "the most cautious thresholds"
        lines += [
            f"  tested on {g.sequences} sequences: {g.accepted} of {g.tested} candidates passed; p-value of "
            f"{thresholds} {g.p_value:.3g}",
            f"  agreement {g.agreement:.4f}, alone at least {g.agreement_bound:.4f} with probability "
            f"{1 - g.epsilon:g}",
            f"  sequences below {g.target:g}: share {g.below:.4f}, alone at most {g.below_bound:.4f} with "
            f"probability {1 - g.epsilon:g}",
            f"  by one token of each sequence: agreement alone at least {g.token_bound:.4f} with probability "
            f"{1 - g.epsilon:g}",
            f"  worst tenth of the sequences: mean agreement {g.worst_decile:.4f}",
        ]
    return "\n".join(lines)


def forecast_table(config: "ModelConfig", policy: "ConfidenceExit", window: int) -> str:
    """Predicted speed-up of every point of the curve, and what looking at an exit costs."""
    import jax

    from elastic_lm.depth import forecasting

    # On CPU a deep layer takes longer for every further position; an accelerator reads the weights anyway.
    further = forecasting.CPU_FURTHER_POSITION if jax.default_backend() == "cpu" else 0.0
    lines = ["", f"forecast at batch size 1, window {window}, a further deep position costs {further:g}:"]
    lines.append("target   speed-up   layers    heads   verdict")
    gated = policy.metric == GATE_METRIC or any(policy.gates)
    found = None
    for point in policy.curve:
        found = forecasting.forecast_outcome(
            config,
            point.thresholds,
            point,
            looked=point.looked,
            gated=gated,
            window=window,
            further=further,
        )
        row = f"{point.target:<7g} {found.speedup:>9.2f} {found.segments:>8.3f} {found.heads:>8.3f}"
        lines.append(f"{row}   {found.verdict}")

    lines.append("layers and heads: share of the full model's cost of a token")
    if found:
        layers = [e.layer for e in config.exits if e.layer < config.n_layers]
        checks = zip(layers, found.check, found.gated_check, strict=True)
        lines += [f"exit {n}: its head costs {head:.3f}, a gate {gate:.4f}" for n, head, gate in checks]
    return "\n".join(lines)
