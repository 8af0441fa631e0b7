"""Task data for the study, in the layout that configs/glue.py reads.

    python experiments/elang/prepare.py --source FOLDER --out data/elang

`FOLDER` holds public task files as JSON lines: GLUE's SST-2 and MRPC, SuperGLUE's BoolQ (whose training
records have passage and question in one text) and RTE (whose training records are GLUE's), and Multi30k's
English-German captions. Sentiment, as text to continue, is made of SST-2 for decoder-only models.
"""

import argparse
import gzip
import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

COPIED = tuple(f"glue_{task}_{split}" for task in ("sst2", "mrpc") for split in ("train", "dev"))
ANSWERS = ("negative", "positive")
QUESTION, ANSWER = "\nQuestion: ", "\nAnswer:"


def read(path: Path) -> list[dict[str, Any]]:
    """Records of a packed file of JSON lines."""
    with gzip.open(path, "rt", encoding="utf-8") as file:
        return [json.loads(line) for line in file]


def write(path: Path, rows: Iterable[dict[str, Any]]) -> None:
    """Records as JSON lines."""
    lines = [json.dumps(row, ensure_ascii=False) for row in rows]
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")
    print(f"{path}: {len(lines)} records")


def boolq(row: dict[str, Any]) -> dict[str, Any]:
    """Question, passage and label of a record with both in one text."""
    passage, _, question = row["query"].removesuffix(ANSWER).rpartition(QUESTION)
    return {"question": question, "passage": passage, "label": ("true", "false")[row["gold"]]}


def asked(row: dict[str, Any]) -> dict[str, Any]:
    """A record of BoolQ with the question mark that the training records' questions have."""
    return {**row, "question": row["question"].rstrip("? ") + "?"}


def rte(row: dict[str, Any]) -> dict[str, Any]:
    """A record of GLUE's RTE with SuperGLUE's names of its fields."""
    return {"premise": row["sentence1"], "hypothesis": row["sentence2"], "label": row["label"]}


def sentiment(row: dict[str, Any]) -> dict[str, Any]:
    """A sentence to continue with its sentiment."""
    prompt = f"Review: {row['sentence'].strip()}\nSentiment:"
    return {
        "prompt": prompt,
        "response": f" {ANSWERS[row['label']]}",
        "choices": [f" {a}" for a in ANSWERS],
        "gold": row["label"],
    }


def main() -> None:
    """Writes every file of the study."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--source", required=True, type=Path)
    parser.add_argument("--out", required=True, type=Path)
    args = parser.parse_args()
    args.out.mkdir(parents=True, exist_ok=True)
    tasks, texts = args.source / "eval", args.source / "text"
    for name in COPIED:
        write(args.out / f"{name}.jsonl", read(tasks / f"{name}.jsonl.gz"))
    write(args.out / "superglue_boolq_train.jsonl", map(boolq, read(tasks / "boolq_train.jsonl.gz")))
    held_out = read(tasks / "superglue_boolq_val_orig.jsonl.gz")
    write(args.out / "superglue_boolq_val.jsonl", map(asked, held_out))
    write(args.out / "superglue_rte_train.jsonl", map(rte, read(tasks / "glue_rte_train.jsonl.gz")))
    write(args.out / "superglue_rte_val.jsonl", read(tasks / "superglue_rte_val_orig.jsonl.gz"))
    for split in ("train", "dev"):
        rows = read(tasks / f"glue_sst2_{split}.jsonl.gz")
        write(args.out / f"sentiment_{split}.jsonl", map(sentiment, rows))
    for split in ("train", "val", "test_2016_flickr"):
        write(args.out / f"multi30k_{split}.jsonl", read(texts / f"multi30k_en-de_{split}.jsonl.gz"))


if __name__ == "__main__":
    main()
