"""Tasks of the lm-evaluation-harness: those of the Hub, or those in `task_files` on data in a folder."""

import contextlib
import os
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from elastic_lm.config.checks import require
from elastic_lm.files.local import local_path
from elastic_lm.harness.library import harness

TASK_FILES = Path(__file__).parent / "task_files"
SEED = 1234  # of the examples that a prompt begins with, as in the harness


def load_tasks(names: Sequence[str], data: str | Path | None = None) -> Any:
    """Reads tasks with their data.

    Args:
      names: of tasks, groups or tags, or patterns of them.
      data: folder with the data of the tasks in `task_files`; None = the harness's own tasks, whose data are
        downloaded from the Hub.

    Returns:
      What `lm_eval.evaluate` takes as its tasks.

    Raises:
      ValueError: there is no such task, a row is not written as its task needs it, or lm-eval is missing.
      FileNotFoundError: there is no such folder, or a file of a task is not in it.
    """
    require(bool(names), "tasks", tuple(names), "name at least one")
    manager_class = harness("tasks").TaskManager
    if data is None:
        manager = manager_class()
    else:
        folder = local_path(str(data))
        if not folder.is_dir():
            raise FileNotFoundError(f"{data}: no such folder of the tasks' data")
        manager = manager_class(
            include_path=str(TASK_FILES), include_defaults=False, metadata={"tasks_data": str(folder)}
        )

    found = {name: manager.match_tasks([name]) for name in names}
    for name, matching in found.items():
        if not matching:
            known = [task for task in manager.all_tasks if "::" not in task]
            fix = f"there is no such task on data in a folder; there are {', '.join(known)}"
            if data is None:
                fix = "the harness has no such task; `lm-eval ls tasks` lists all"
            raise ValueError(f"tasks={name!r}: {fix}")
    return manager.load(list(dict.fromkeys(one for matching in found.values() for one in matching)))


def with_examples(tasks: Any, count: int | None) -> Any:
    """Sets how many examples stand before every question, and draws the same ones every time.

    Args:
      tasks: from `load_tasks`.
      count: None = as each task says; tasks that fix it at 0 keep that, as in the harness.
    """
    for task in tasks["tasks"].values():
        own = vars(task).setdefault("own_examples", task.get_config("num_fewshot"))  # before any other count
        task.set_config(key="num_fewshot", value=own or 0 if own == 0 or count is None else count)
        task.set_fewshot_seed(seed=SEED)
    return tasks


def run_tasks(
    model: Any,
    tasks: Any,
    *,
    limit: int | None = None,
    num_fewshot: int | None = None,
    chat: bool = False,
    log_samples: bool = False,
    bootstrap: int = 1000,
) -> dict[str, Any]:
    """Measures a model on tasks.

    Args:
      model: an `lm_eval` model, such as `harness_model` makes.
      tasks: from `load_tasks`; may be measured again with another model.
      limit: documents per task at most, the first ones; None = all.
      num_fewshot: as in `with_examples`.
      chat: prompts are written with the model's chat template.
      log_samples: also return every answer.
      bootstrap: draws for the standard errors of metrics that are no means.

    Returns:
      What `lm_eval.evaluate` returns: "results" by task, and "samples" where asked for.
    """
    evaluate = harness("evaluator").evaluate
    with _in_this_process():
        return evaluate(
            lm=model,
            task_dict=with_examples(tasks, num_fewshot),
            limit=limit,
            bootstrap_iters=bootstrap,
            log_samples=log_samples,
            apply_chat_template=chat,
            fewshot_as_multiturn=chat,
        )


@contextlib.contextmanager
def _in_this_process() -> Iterator[None]:
    """Draws standard errors here, as copies of a process that runs JAX may hang, and keeps stdout free."""
    name, before = "DISABLE_MULTIPROC", os.environ.get("DISABLE_MULTIPROC")
    os.environ[name] = "1"
    try:
        with contextlib.redirect_stdout(sys.stderr):
            yield
    finally:
        os.environ.pop(name)
        if before is not None:
            os.environ[name] = before


def own_results(results: dict[str, Any]) -> dict[str, dict[str, float]]:
    """Numbers by task and metric, without the names of filters where there is one only.

    Args:
      results: from `run_tasks`.

    Returns:
      {task: {"acc": ..., "acc_stderr": ..., "rows": ...}}; what is no number is left out.
    """
    found: dict[str, dict[str, float]] = {}
    counts = results.get("n-samples", {})
    for task, values in results["results"].items():
        own: dict[str, float] = {}
        filters = {key.partition(",")[2] for key in values if "," in key}
        for key, value in values.items():
            metric, _, filtered = key.partition(",")
            if isinstance(value, int | float) and not isinstance(value, bool) and filtered:
                own[metric if len(filters) == 1 else f"{metric}/{filtered}"] = float(value)
        if own:
            rows = counts.get(task, {}).get("effective")
            found[task] = own | ({} if rows is None else {"rows": rows})
    return found
