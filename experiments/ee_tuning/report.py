"""Tables (Markdown) and pictures from results.json of run.py.

COMMAND   python experiments/ee_tuning/report.py runs/ee_tuning/results.json
"""

import json
import statistics
import sys
from pathlib import Path
from typing import Any

import elastic_lm as el

HERE = Path(__file__).parent


def main() -> None:
    """Prints the tables and draws the pictures beside this file."""
    result = json.loads(Path(sys.argv[1]).read_text())
    runs = result["runs"]
    print(f"\n{result['hardware']}\n{result['versions']}\n")
    print(depth_table(result["before"], runs), calibration_table(runs), sep="\n\n", end="\n\n")
    print(generation_table(runs), metric_table(runs), sep="\n\n")
    draw(runs)


def spread(values: list[float], form: str = "{:.2f}") -> str:
    """Mean and, where there are several seeds, their standard deviation."""
    mean = form.format(statistics.mean(values))
    return f"{mean} ± {form.format(statistics.stdev(values))}" if len(values) > 1 else mean


def percent(values: list[float]) -> str:
    """`spread` in per cent."""
    return spread([100 * v for v in values])


def markdown(header: list[str], rows: list[list[str]]) -> str:
    """A Markdown table with right-aligned numbers."""
    lines = [header, ["---:"] * len(header), *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def depth_table(before: list[dict[str, Any]], runs: list[dict[str, Any]]) -> str:
    """Every depth on the test stories, before and after tuning."""
    rows = []
    for i, old in enumerate(before):
        new = [run["depths"][i] for run in runs]
        rows.append(
            [
                str(old["layers"]),
                f"{old['nats_per_token']:.3f}",
                spread([d["nats_per_token"] for d in new], "{:.3f}"),
                f"{100 * old['agreement']:.1f}",
                percent([d["agreement"] for d in new]),
            ]
        )
    header = ["layers", "nats/token copied", "nats/token tuned", "agreement % copied", "agreement % tuned"]
    return markdown(header, rows)


def calibration_table(runs: list[dict[str, Any]]) -> str:
    """Target, agreement on the calibration stories' scoring half and on the test stories, depth."""
    rows = []
    for i, point in enumerate(runs[0]["teacher_forced"]["max_prob"]):
        points = [run["teacher_forced"]["max_prob"][i] for run in runs]
        rows.append(
            [
                f"{100 * point['target']:g}",
                percent([p["calibration"] for p in points]),
                percent([p["agreement"] for p in points]),
                spread([p["mean_layers"] for p in points]),
            ]
        )
    return markdown(["target %", "scoring half %", "test %", "mean layers, test"], rows)


def generation_table(runs: list[dict[str, Any]]) -> str:
    """Free-running greedy decoding against full depth in the same run."""
    rows = []
    for i, point in enumerate(runs[0]["generation"]):
        points = [run["generation"][i] for run in runs]
        rows.append(
            [
                f"{100 * point['target']:g}",
                percent([p["agreement"] for p in points]),
                percent([p["same_as_full_run"] for p in points]),
                spread([p["mean_layers"] for p in points]),
                spread([p["tokens_per_s"] for p in points], "{:.0f}"),
                spread([p["full_tokens_per_s"] for p in points], "{:.0f}"),
                spread([p["speedup"] for p in points]),
            ]
        )
    header = [
        "target %",
        "agreement %",
        "same text %",
        "mean layers",
        "tokens/s",
        "full depth tokens/s",
        "speed-up",
    ]
    return markdown(header, rows)


def metric_table(runs: list[dict[str, Any]]) -> str:
    """Mean layers on the test stories for every confidence metric."""
    metrics = list(runs[0]["teacher_forced"])
    rows = []
    for i, point in enumerate(runs[0]["teacher_forced"][metrics[0]]):
        layers = [[run["teacher_forced"][m][i]["mean_layers"] for run in runs] for m in metrics]
        rows.append([f"{100 * point['target']:g}", *map(spread, layers)])
    return markdown(["target %", *(f"{m}: layers" for m in metrics)], rows)


def draw(runs: list[dict[str, Any]]) -> None:
    """curve.png: depth saved over agreement; depths.png: where tokens leave at the 95 % target."""
    n_layers = runs[0]["depths"][-1]["layers"]
    calibrated, shared = [], []
    for i, point in enumerate(runs[0]["teacher_forced"]["max_prob"]):
        points = [run["teacher_forced"]["max_prob"][i] for run in runs]
        calibrated.append(
            el.evaluate.SpeedPoint(
                statistics.mean(p["agreement"] for p in points),
                n_layers / statistics.mean(p["mean_layers"] for p in points),
                f"{100 * point['target']:g} %",
            )
        )
    for i in range(len(runs[0]["one_threshold"])):
        points = [run["one_threshold"][i] for run in runs]
        agreement = statistics.mean(p["agreement"] for p in points)
        if agreement >= 0.85:
            shared.append(
                el.evaluate.SpeedPoint(
                    agreement, n_layers / statistics.mean(p["mean_layers"] for p in points)
                )
            )
    el.evaluate.quality_speed(
        {"calibrated, one threshold per exit": calibrated, "one threshold for all exits": shared},
        HERE / "curve.png",
        title="stories260K with exits after layers 2 and 3, test stories",
        y_label="layers of the full model / mean layers",
    )
    depths = [row["layers"] for row in runs[0]["depths"]]
    point = next(p for p in runs[0]["teacher_forced"]["max_prob"] if p["target"] == 0.95)
    tokens = runs[0]["test_tokens"]
    counts = {d: round(share * tokens) for d, share in zip(depths, point["shares"], strict=True)}
    el.evaluate.exit_depths(
        counts, n_layers, HERE / "depths.png", title="Where test tokens leave at the 95 % target"
    )


if __name__ == "__main__":
    main()
