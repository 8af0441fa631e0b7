"""Answers ten thousand records, to be killed meanwhile: cascade_process.py IN OUT SECONDS_PER_BATCH."""

import sys
import time

from elastic_lm.cascade.answerer import Answer
from elastic_lm.cascade.cascade import Cascade
from elastic_lm.cascade.function import Function
from elastic_lm.cli.cascade.answering import answer_missing
from elastic_lm.files.journal import Journal, count_records, read_records


def swift(record: dict) -> Answer:
    return Answer(f"swift {record['n']}", {"energy": float(record["n"] * 7919 % 101)}, cost=1.0)


def super_(record: dict) -> Answer:
    return Answer(f"super {record['n']}", cost=10.0)


def main(data: str, out: str, pause: float) -> None:
    def slow(records: list[dict]) -> list[Answer]:
        time.sleep(pause)
        return [swift(record) for record in records]

    cascade = Cascade(Function(slow, batches=True), Function(super_), 50.0, batch_size=16)
    journal = Journal(out, {"data": data})
    print(answer_missing(cascade, read_records(data), journal, count_records(data)).text())
    journal.close()


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2], float(sys.argv[3]))
