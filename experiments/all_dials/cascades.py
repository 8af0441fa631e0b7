"""Cascades on ARC, PIQA, HellaSwag and BoolQ: the whole model as Super, parts of it or a tiny one as Swift.

COMMAND   python experiments/all_dials/cascades.py --model SMOLLM2 --data data/english --eval DATA/eval \\
              --small DATA/weights/tinystories_656k --out runs/all_dials
HARDWARE  two CPU cores
DURATION  README.md; records are answered a few of every task at a time, and `--resume` goes on
EXPECTED  README.md beside this file

Swifts: an exit of the model, fitted in closed form, from whose states the Super goes on; half of the neurons
of every layer (a slice, not trained; with `--elastic FOLDER` that of an elastically trained model, whose
whole is not the Super: two models); and a model for children's stories of a two-hundredth of the size. A
record is right where the likeliest choice, per byte (BoolQ: as it is), is the right one.

Thresholds are fitted on half of the records and measured on the other half, for 20 random divisions, so
that what is reported is of records that chose nothing: the cheapest threshold that is as accurate as the
Super on the fitting half (E-LANG's choice). Costs are FLOPs, the Super's alone being 1. "oracle" passes on
exactly those records that the Swift gets wrong and the Super right. Spread is over the divisions.
"""

import argparse
import collections
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
from study import Cells, Model, Record, base, begin, markdown, parser, records

import elastic_lm as el
from elastic_lm.cascade import Answer, Measurements, MultipleChoice, fit_rule, shared_multiple_choice
from elastic_lm.checkpoints.loading import load_decoder
from elastic_lm.cost.sequences import head_flops
from elastic_lm.models.decoder import Decoder

matplotlib.use("Agg")
TASKS = {"arc_easy_val": 200, "piqa_val": 200, "hellaswag_val_1k": 100, "superglue_boolq_val_orig": 100}
SCORES = ("energy", "max_prob", "margin", "entropy", "random")
DIVISIONS = 20
HALF = "half of the neurons"


def main() -> None:
    """Answers, in turns over the tasks; rewrites cascades.json after each few, then prints and draws."""
    args = parse()
    out = begin(args)
    cells = Cells(out / "cascades.json", args)
    if args.tiny:
        args.rows, args.at_a_time, args.half_rows = 8, 4, 4
    args.rows_of = lambda task: min(args.rows, TASKS[task])
    model, tokenizer = base(args, out)
    swifts, super_, halves = answerers(args, model, tokenizer)

    for start in range(0, max(map(args.rows_of, args.tasks)), args.at_a_time):
        for task in args.tasks:
            rows = records(args, task, args.rows_of(task))[start : start + args.at_a_time]
            how = task_normalise(task)
            if rows:
                pair = swifts[how], super_[how]
                cells.get(f"{task}/{start}", lambda p=pair, r=rows: answered(*p, model, tokenizer, r))
            if rows and start < args.half_rows:
                half = halves[how]
                cells.get(f"{task}/{start}/half", lambda h=half, r=rows: alone(h, r))

    found = joined(cells.found)
    report = summary(found)
    cells.content["summary"] = report
    cells.save()
    print(tables(report))
    plot(found, out / "cascades.png")


def parse() -> argparse.Namespace:
    """Command line."""
    found = parser(__doc__, "runs/all_dials")
    found.add_argument("--tasks", nargs="+", default=list(TASKS), choices=list(TASKS))
    found.add_argument("--rows", type=int, default=200, help="of each task at most")
    found.add_argument("--half-rows", type=int, default=60, help="that half of the model answers, too")
    found.add_argument("--at-a-time", type=int, default=20)
    found.add_argument("--exit", type=int, default=0, help="layer of the exit; 0 = the middle one of three")
    found.add_argument("--small", default="", help="folder of a tiny model with a tokenizer of its own")
    found.add_argument("--elastic", default="", help="folder of an elastically trained model, to be halved")
    return found.parse_args()


def task_normalise(task: str) -> str:
    """What a log-likelihood is divided by: yes and no are one token each."""
    return "none" if "boolq" in task else "bytes"


def answerers(
    args: argparse.Namespace, model: Model, tokenizer: el.Tokenizer
) -> tuple[dict[str, dict[str, MultipleChoice]], dict[str, MultipleChoice], dict[str, MultipleChoice]]:
    """Swifts by what a log-likelihood is divided by and by name; Supers; halves of the model."""
    config, params = model
    exits = [e.layer for e in config.exits]
    layer = args.exit or exits[len(exits) // 2]
    wide, wide_params = model
    if args.elastic:
        decoder, wide_params = load_decoder(args.elastic)
        wide = decoder.config
    half = el.Subnet.uniform(wide, mlp=0.5)
    swifts: dict[str, dict[str, MultipleChoice]] = {}
    supers: dict[str, MultipleChoice] = {}
    halves: dict[str, MultipleChoice] = {}
    for normalise in ("bytes", "none"):
        how: dict[str, Any] = {"normalise": normalise, "batch_size": 8}
        exit_, supers[normalise] = shared_multiple_choice(
            Decoder(config), params, tokenizer, exit=layer, **how
        )
        swifts[normalise] = {f"exit after layer {layer}": exit_}
        halves[normalise] = MultipleChoice(Decoder(wide), wide_params, tokenizer, subnet=half, **how)
        if args.small:
            small, small_params = load_decoder(args.small)
            tiny = MultipleChoice(small, small_params, el.Tokenizer.load(args.small), **how)
            swifts[normalise]["tiny model"] = tiny
    return swifts, supers, halves


def answered(
    swifts: dict[str, MultipleChoice],
    super_: MultipleChoice,
    model: Model,
    tokenizer: el.Tokenizer,
    rows: list[Record],
) -> list[Record]:
    """What every Swift and the Super say; the Super goes on from the exit, and its whole cost is known."""
    found: list[Record] = [{"swift": {}} for _ in rows]
    for name, swift in swifts.items():
        answers = swift.answer(rows)
        if name.startswith("exit"):
            rest, exits = super_.resume(rows, answers), answers
        for one, row, answer in zip(found, rows, answers, strict=True):
            one["swift"][name] = {**told(answer, row), "scores": answer.scores}
    for one, row, above, below in zip(found, rows, rest, exits, strict=True):
        read = head_flops(model[0], choice_tokens(tokenizer, row))
        whole = above.cost + below.cost - read
        one["super"] = {**told(above, row), "cost": whole, "rest": above.cost}
    return found


def alone(swift: MultipleChoice, rows: list[Record]) -> list[Record]:
    """What one Swift says."""
    pairs = zip(swift.answer(rows), rows, strict=True)
    return [{**told(answer, row), "scores": answer.scores} for answer, row in pairs]


def told(answer: Answer, row: Record) -> Record:
    """Whether an answer is right, and what it took."""
    return {"right": answer.output == row["gold"], "cost": answer.cost, "seconds": answer.seconds}


def choice_tokens(tokenizer: el.Tokenizer, row: Record) -> int:
    """Tokens of all choices of a record, at which an exit has read the vocabulary head."""
    before = len(tokenizer.encode(row["prompt"], bos=True))
    texts = [f"{row['prompt']} {choice}" for choice in row["choices"]]
    return sum(len(tokenizer.encode(text, bos=True)) - before for text in texts)


def joined(cells: dict[str, Any]) -> dict[str, list[Record]]:
    """Answers by task, in order."""
    found: dict[str, list[Record]] = collections.defaultdict(list)
    for name, cell in cells.items():
        if name.endswith("/half"):
            continue
        rows = [{**row, "swift": dict(row["swift"])} for row in cell["value"]]
        for row, half in zip(rows, cells.get(f"{name}/half", {"value": []})["value"], strict=False):
            row["swift"][HALF] = half
        found[name.partition("/")[0]] += rows
    return dict(found)


def measurements(rows: list[Record], swift: str, score: str) -> Measurements:
    """Of one pair and score; costs in those of the Super alone, on average."""
    whole = np.mean([row["super"]["cost"] for row in rows])
    own = [row["swift"][swift] for row in rows]
    random = np.random.default_rng(0).random(len(rows))
    scores = random if score == "random" else [one["scores"][score] for one in own]
    rest = "rest" if swift.startswith("exit") else "cost"
    return Measurements.of(
        scores=scores,
        swift=[one["right"] for one in own],
        super_=[row["super"]["right"] for row in rows],
        cost_swift=[one["cost"] / whole for one in own],
        cost_super=[row["super"][rest] / whole for row in rows],
    )


def summary(found: dict[str, list[Record]]) -> list[Record]:
    """Every task, Swift and score, fitted on halves and measured on the others."""
    report = []
    for task, every in found.items():
        for swift in every[0]["swift"]:
            rows = [row for row in every if swift in row["swift"]]
            own = np.asarray([row["swift"][swift]["right"] for row in rows])
            best = np.asarray([row["super"]["right"] for row in rows])
            shared: Record = {
                "task": task,
                "rows": len(rows),
                "swift": swift,
                "swift_accuracy": float(own.mean()),
                "super_accuracy": float(best.mean()),
                "oracle": float((own | best).mean()),
                "oracle_share": float((~own & best).mean()),
                "swift_cost": float(measurements(rows, swift, "random").cost_swift.mean()),
            }
            report += [{**shared, "score": score, **divided(rows, swift, score)} for score in SCORES]
    return report


def divided(rows: list[Record], swift: str, score: str) -> Record:
    """Fitted on one half, measured on the other, for every division."""
    found: dict[str, list[float]] = collections.defaultdict(list)
    for division in range(DIVISIONS):
        mixed = np.random.default_rng(division).permutation(len(rows))
        fitting, testing = ([rows[i] for i in part] for part in np.array_split(mixed, 2))
        rule = fit_rule(measurements(fitting, swift, score), super_accuracy=True, score=score)
        other = measurements(testing, swift, score)
        point = other.at(rule.threshold)
        found["accuracy minus the Super's"].append(point.accuracy - float(other.super_.mean()))
        found["cost"].append(point.cost)
        found["share to the Super"].append(point.share_super)
    curve = measurements(rows, swift, score).curve()
    mean_over_shares = float(np.interp(np.linspace(0, 1, 101), curve.share_super, curve.accuracy).mean())
    return {**found, "mean accuracy over shares": mean_over_shares}


def tables(report: list[Record]) -> str:
    """One row per task, Swift and score."""
    rows = []
    for one in report:
        lost, cost, share = (
            np.asarray(one[k]) for k in ("accuracy minus the Super's", "cost", "share to the Super")
        )
        rows.append(
            [
                f"{one['task']} ({one['rows']})",
                one["swift"],
                one["score"],
                f"{one['swift_accuracy']:.3f}",
                f"{one['super_accuracy']:.3f}",
                f"{one['swift_cost']:.2f}",
                f"{one['mean accuracy over shares']:.3f}",
                f"{share.mean():.2f}",
                f"{cost.mean():.2f} ± {cost.std():.2f}",
                f"{lost.mean():+.3f} ± {lost.std():.3f}",
            ]
        )
    header = ["task (records)", "Swift", "score", "Swift alone", "Super alone", "cost of Swift"]
    header += ["mean over shares", "to the Super", "cost", "accuracy minus the Super's"]
    return markdown(header, rows)


def plot(found: dict[str, list[Record]], file: Path) -> None:
    """Accuracy over cost of every threshold, a panel per task."""
    from matplotlib import pyplot

    figure, panels = pyplot.subplots(1, len(found), figsize=(5 * len(found), 4.2), squeeze=False)
    for axes, (task, every) in zip(panels[0], found.items(), strict=True):
        for i, swift in enumerate(every[0]["swift"]):
            rows = [row for row in every if swift in row["swift"]]
            for score, style in (("energy", "-"), ("max_prob", "--"), ("random", ":")):
                curve = measurements(rows, swift, score).curve()
                axes.plot(curve.cost, curve.accuracy, style, color=f"C{i}", label=f"{swift}, {score}")
        axes.axhline(np.mean([row["super"]["right"] for row in every]), color="#888888", linewidth=0.8)
        axes.axvline(1.0, color="#888888", linewidth=0.8)
        axes.set_title(f"{task}, {len(every)} records")
        axes.set_xlabel("cost, the Super alone = 1")
        axes.set_ylabel("accuracy")
    panels[0][0].legend(fontsize=7)
    figure.tight_layout()
    figure.savefig(file, dpi=100)
    pyplot.close(figure)


if __name__ == "__main__":
    main()
