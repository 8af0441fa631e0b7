"""Rows of the tasks beside this file, from a folder of JSON lines.

Fields are called as the task files call them, which are as in the data sets of the Hub, so that prompts and
targets are written as the harness writes them. A folder holds files such as arc_easy_test.jsonl.gz, of which
`FILES` names all; each is one JSON object per line:

    arc_*: query ("Question: ...\\nAnswer:"), choices, gold        hellaswag_*: query, choices, gold
    piqa_*: goal, sol1, sol2, label        winogrande_*: sentence, option1, option2, answer
    lambada_test: text        mmlu_*: subject, question, choices, answer
    superglue_boolq_*: passage, question, label        boolq_train: query, choices, gold

The harness calls these functions with the metadata of a task, in which `tasks_data` is the folder.
"""

import functools
import importlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

from elastic_lm.config.checks import require
from elastic_lm.data.records import Records

Row = dict[str, Any]

# Names of files, without a suffix, by task and split; "test" is what is measured.
FILES = {
    "arc_easy": {"test": "arc_easy_test", "train": "arc_easy_train"},
    "arc_challenge": {"test": "arc_challenge_val", "train": "arc_easy_train"},
    "hellaswag": {"test": "hellaswag_val_1k"},
    "piqa": {"test": "piqa_val", "train": "piqa_train"},
    "winogrande": {"test": "winogrande_val", "train": "winogrande_train_xl"},
    "lambada": {"test": "lambada_test"},
    "boolq": {"test": "superglue_boolq_val_orig", "train": "boolq_train"},
    "mmlu": {"test": "mmlu_test", "dev": "mmlu_dev"},
}
SUFFIXES = (".jsonl.gz", ".jsonl")


def arc_easy(**metadata: Any) -> dict[str, Any]:
    """Splits of ARC-Easy: question, choices, gold."""
    return _splits("arc_easy", metadata, _question)


def arc_challenge(**metadata: Any) -> dict[str, Any]:
    """Splits of ARC-Challenge; examples for prompts are taken from ARC-Easy's training questions."""
    return _splits("arc_challenge", metadata, _question)


def hellaswag(**metadata: Any) -> dict[str, Any]:
    """Splits of HellaSwag: query, choices, gold."""
    return _splits("hellaswag", metadata, _fields("query", "choices", "gold"))


def piqa(**metadata: Any) -> dict[str, Any]:
    """Splits of PIQA: goal, sol1, sol2, label."""
    return _splits("piqa", metadata, _fields("goal", "sol1", "sol2", "label"))


def winogrande(**metadata: Any) -> dict[str, Any]:
    """Splits of WinoGrande: sentence, option1, option2, answer."""
    return _splits("winogrande", metadata, _fields("sentence", "option1", "option2", "answer"))


def lambada(**metadata: Any) -> dict[str, Any]:
    """LAMBADA: text."""
    return _splits("lambada", metadata, _fields("text"))


def boolq(**metadata: Any) -> dict[str, Any]:
    """Splits of BoolQ: passage, question, label (1 = yes)."""
    return _splits("boolq", metadata, _passage)


def mmlu(subject: str = "", **metadata: Any) -> dict[str, Any]:
    """Splits of one subject of MMLU: subject, question, choices, answer."""
    return _splits("mmlu", metadata, _fields("subject", "question", "choices", "answer"), subject)


def blank(doc: Row) -> int:
    """Where the blank of a sentence of WinoGrande stands."""
    place = doc["sentence"].find("_")
    require(place >= 0, "sentence", doc["sentence"], "has no blank, written _")
    return place


def winogrande_contexts(doc: Row) -> list[str]:
    """The sentence up to the blank, with either option in it."""
    return [doc["sentence"][: blank(doc)] + doc[option] for option in ("option1", "option2")]


def winogrande_rest(doc: Row) -> str:
    """The sentence after the blank, which is what is scored."""
    return doc["sentence"][blank(doc) + 1 :].strip()


def winogrande_right(doc: Row) -> int:
    """Which option is right, counted from 0."""
    require(doc["answer"] in ("1", "2"), "answer", doc["answer"], 'must be "1" or "2"')
    return int(doc["answer"]) - 1


def _splits(task: str, metadata: Row, row: Callable[[Row], Row], subject: str = "") -> dict[str, Any]:
    """The splits of a task: what is measured as a data set, examples for prompts as a list."""
    folder = metadata.get("tasks_data")
    fix = "name the folder of the tasks' data: --tasks-data FOLDER, or with lm_eval --metadata "
    require(isinstance(folder, str), "tasks_data", folder, fix + """'{"tasks_data": "FOLDER"}'""")
    dataset = importlib.import_module("datasets").Dataset
    found: dict[str, Any] = {}
    for split, name in FILES[task].items():
        rows = [own for own in _rows(str(folder), name) if subject in ("", own.get("subject"))]
        fix = f"{folder} has no question about it in {name}"
        require(bool(rows), "subject", subject, fix)
        made = [_made(name, row, own) for own in rows]
        found[split] = dataset.from_list(made) if split == "test" else made
    return found


@functools.lru_cache(maxsize=16)
def _rows(folder: str, name: str) -> list[Row]:
    """All rows of a file of the folder."""
    for suffix in SUFFIXES:
        file = Path(folder, name + suffix)
        if file.is_file():
            return [dict(record) for _, record in Records([file])]
    raise FileNotFoundError(f"{Path(folder, name + SUFFIXES[0])}: no such file of the tasks' data")


def _made(name: str, row: Callable[[Row], Row], given: Row) -> Row:
    """A row in the fields of its task."""
    try:
        return row(given)
    except KeyError as error:
        raise ValueError(f"{name}: a row has no field {error}; it has {', '.join(given)}") from error


def _fields(*names: str) -> Callable[[Row], Row]:
    """Rows that have the fields already."""
    return lambda given: {name: given[name] for name in names}


def _question(given: Row) -> Row:
    """A question of ARC without the words around it, which the task file writes."""
    question = given["query"].removeprefix("Question: ").removesuffix("\nAnswer:")
    return {"question": question, "choices": given["choices"], "gold": given["gold"]}


def _passage(given: Row) -> Row:
    """A passage with its question; the training rows hold both as one text."""
    if "passage" in given:
        return {"passage": given["passage"], "question": given["question"], "label": _truth(given["label"])}
    passage, _, question = given["query"].rpartition("\nQuestion: ")
    right = given["choices"][given["gold"]] == "yes"
    return {"passage": passage, "question": question.removesuffix("?\nAnswer:"), "label": int(right)}


def _truth(value: Any) -> int:
    """1 for a label that is true, written as a truth value, a number or a word."""
    words = {"true": 1, "1": 1, "false": 0, "0": 0}
    word = str(value).lower()
    require(word in words, "label", value, "must be true or false")
    return words[word]
