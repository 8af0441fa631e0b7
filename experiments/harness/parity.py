"""Tasks of the lm-evaluation-harness by our model and by its own model of `transformers`, side by side.

    python experiments/harness/parity.py --hf-dir SMOLLM2 --tasks-data FOLDER --json parity.json

Both read the same weights in float32 on the same machine, task by task. What is done is in the file at once,
and a run that is started again goes on with what is missing. `--table FILE` writes what there is without the
single answers, and prints it.
"""

import argparse
import datetime
import json
import time
from pathlib import Path
from typing import Any

# Questions per task; MMLU has 57 subjects, of each of which so many are asked.
TASKS = {
    "winogrande": 500,
    "piqa": 500,
    "lambada_openai": 500,
    "arc_easy": 500,
    "boolq": 500,
    "mmlu": 9,
    "hellaswag": 500,
    "arc_challenge": 299,
}


def ours(folder: str, rows: int) -> Any:
    """Our model, whole."""
    import elastic_lm as el
    from elastic_lm.harness.model import harness_model

    model, params = el.load(folder, dtype="float32")
    return harness_model(model, params, el.Tokenizer.load(folder), batch_size=rows)


def theirs(folder: str, rows: int) -> Any:
    """The harness's own model."""
    from lm_eval.models.huggingface import HFLM

    return HFLM(pretrained=folder, device="cpu", dtype="float32", batch_size=rows)


def measure(model: Any, task: str, data: str, limit: int) -> dict[str, Any]:
    """Metrics of a task, the log-likelihood of every request in order, and the seconds that it took."""
    from elastic_lm.harness.tasks import load_tasks, own_results, run_tasks

    tasks = load_tasks([task], data)
    began = time.perf_counter()
    results = run_tasks(model, tasks, limit=limit, log_samples=True)
    seconds = time.perf_counter() - began
    samples = [s for name in sorted(results["samples"]) for s in results["samples"][name]]
    return {
        "metrics": own_results(results)[task],
        "rows": len(samples),
        "seconds": round(seconds, 1),
        "log_likelihoods": [float(answer[0]) for s in samples for answer in s["filtered_resps"]],
    }


def compared(entry: dict[str, Any]) -> dict[str, Any]:
    """The two models' results as one row of the table."""
    own, other = entry["ours"], entry["hf"]
    pairs = list(zip(own["log_likelihoods"], other["log_likelihoods"], strict=True))
    return {
        "rows": own["rows"],
        "requests": len(pairs),
        "seconds": (own["seconds"], other["seconds"]),
        "largest_difference_in_nats": max(abs(a - b) for a, b in pairs),
        "metrics": {name: (value, other["metrics"][name]) for name, value in own["metrics"].items()},
    }


def table(found: dict[str, Any]) -> str:
    """Both columns by task and metric."""
    lines = ["| task | rows | metric | ours | hf | difference | largest difference of a request, nats |"]
    lines.append("|---|---|---|---|---|---|---|")
    for task, entry in found["tasks"].items():
        if not {"ours", "hf"} <= set(entry):
            continue
        row = compared(entry)
        for metric, (a, b) in row["metrics"].items():
            if metric != "rows" and not metric.endswith("_stderr"):
                shown = f"{row['largest_difference_in_nats']:.1e}"
                lines.append(
                    f"| {task} | {row['rows']} | {metric} | {a:.4f} | {b:.4f} | {a - b:+.4f} | {shown} |"
                )
    return "\n".join(lines)


def main() -> None:
    """Runs what is missing."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--hf-dir", required=True)
    parser.add_argument("--tasks-data", required=True)
    parser.add_argument("--json", required=True, type=Path)
    parser.add_argument("--tasks", nargs="+", default=list(TASKS))
    parser.add_argument("--limit", type=int, help="questions per task, instead of the numbers in this file")
    parser.add_argument("--rows", type=int, default=8)
    parser.add_argument("--table", type=Path, metavar="FILE")
    flags = parser.parse_args()

    from elastic_lm.files.atomic import write_text_whole
    from elastic_lm.report.machine import hardware, versions

    found: dict[str, Any] = {"tasks": {}}
    if flags.json.is_file():
        found = json.loads(flags.json.read_text())
    if flags.table:
        both = {task: e for task, e in found["tasks"].items() if {"ours", "hf"} <= set(e)}
        summary = {**found, "tasks": {task: compared(entry) for task, entry in both.items()}}
        write_text_whole(flags.table, json.dumps(summary, indent=1) + "\n")
        print(table(found))
        return

    found["date"] = datetime.date.today().isoformat()
    found["versions"], found["hardware"] = versions(), hardware()
    models: dict[str, Any] = {}
    for task in flags.tasks:
        entry = found["tasks"].setdefault(task, {})
        for name, load in (("ours", ours), ("hf", theirs)):
            if name in entry:
                continue
            models[name] = models.get(name) or load(flags.hf_dir, flags.rows)
            entry[name] = measure(models[name], task, flags.tasks_data, flags.limit or TASKS[task])
            write_text_whole(flags.json, json.dumps(found) + "\n")
            print(task, name, entry[name]["metrics"], f"{entry[name]['seconds']} s", flush=True)
    print(table(found))


if __name__ == "__main__":
    main()
