"""Text and instructions for the study, cut into train and held-out files.

    python experiments/sorted_llama/prepare.py --source FOLDER --out data/english

`FOLDER` holds English text (`*.txt`, `*.txt.gz`) and an Alpaca-style `*.jsonl.gz` with the fields
`instruction`, `input` and `output`. Every 25th block of text and every 10th instruction is held out.
"""

import argparse
import gzip
import json
from pathlib import Path

TEXTS = (
    "tinystories_cased_0.9MB.txt",
    "tinystories_lower_4MB.txt.gz",
    "wiki_demo_1MB.txt.gz",
    "wikitext2_raw_valid.txt",
)
INSTRUCTIONS = "alpaca_5000.jsonl.gz"
BLOCK = 8192  # bytes of text that stay together
LONGEST = 600  # characters of a response; longer ones do not fit the rows of a small model


def read(path: Path) -> str:
    """Contents of a text file, unpacked."""
    data = path.read_bytes()
    return (gzip.decompress(data) if path.suffix == ".gz" else data).decode("utf-8", errors="replace")


def blocks(text: str) -> list[str]:
    """Pieces of about BLOCK characters, cut at a line's end where one is near, else at a space."""
    pieces, start = [], 0
    while start < len(text):
        near = start + BLOCK
        cut = text.find("\n", near, near + BLOCK)
        cut = cut if cut >= 0 else text.find(" ", near)
        end = len(text) if cut < 0 else cut + 1
        pieces.append(text[start:end])
        start = end
    return pieces


def prompt(record: dict) -> str:
    """What is read before the response."""
    given = f"\n### Input:\n{record['input']}" if record.get("input") else ""
    return f"### Instruction:\n{record['instruction']}{given}\n### Response:\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--source", required=True, type=Path)
    parser.add_argument("--out", required=True, type=Path)
    args = parser.parse_args()
    for split in ("train", "held_out"):
        (args.out / split).mkdir(parents=True, exist_ok=True)
    for name in TEXTS:
        pieces = blocks(read(args.source / name))
        parts = {"train": [], "held_out": []}
        for i, piece in enumerate(pieces):
            parts["held_out" if i % 25 == 24 else "train"].append(piece)
        for split, kept in parts.items():
            target = args.out / split / name.removesuffix(".gz")
            target.write_text("".join(kept), encoding="utf-8")
            print(f"{target}: {target.stat().st_size:,} bytes")
    records = [json.loads(line) for line in read(args.source / INSTRUCTIONS).splitlines()]
    records = [r for r in records if 0 < len(r["output"]) <= LONGEST and len(prompt(r)) <= LONGEST]
    rows = [json.dumps({"prompt": prompt(r), "response": r["output"]}) for r in records]
    for split, kept in (("train", [r for i, r in enumerate(rows) if i % 10 != 9]), ("held_out", rows[9::10])):
        target = args.out / f"instructions_{split}.jsonl"
        target.write_text("\n".join(kept) + "\n", encoding="utf-8")
        print(f"{target}: {len(kept)} records")


if __name__ == "__main__":
    main()
