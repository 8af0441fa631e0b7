"""Answers records into a journal: those that it does not hold yet, and those that failed before."""

import dataclasses
import itertools
import sys
import threading
import time
from collections.abc import Callable, Iterable
from typing import Any

from elastic_lm.cascade.answerer import Record
from elastic_lm.cascade.cascade import Cascade
from elastic_lm.cascade.results import CascadeResult, CascadeStatistics
from elastic_lm.cli import signals
from elastic_lm.cli.cascade.lines import result_line
from elastic_lm.files.journal import Journal
from elastic_lm.report.writers import ProgressWriter

PROGRESS_SECONDS = 5.0  # between lines of progress
Line = Callable[[CascadeResult], dict[str, Any]]


def answer_missing(
    cascade: Cascade, records: Iterable[Record], journal: Journal, total: int, line: Line = result_line
) -> CascadeStatistics:
    """Answers the records that a journal does not hold yet.

    Args:
      cascade: answers them.
      records: all records, from the first.
      journal: where results go, one batch after the other.
      total: number of records, for the time left.
      line: what is written of a result.

    Returns:
      What this pass cost.
    """
    done = journal.records
    if done:
        print(f"{done} of {total} records are there already", file=sys.stderr)

    results = cascade.run(itertools.islice(records, done, None), start=done)
    progress, shown = ProgressWriter(total, done), time.monotonic()
    waiting: list[dict[str, Any]] = []
    writing = threading.Lock()

    def write() -> None:
        nonlocal waiting
        with writing:
            # The list is emptied first: a batch whose write is interrupted is not written again below.
            batch, waiting = waiting, []
            journal.append(batch)

    try:
        with signals.saving(write):
            for result in results:
                with writing:
                    waiting.append(line(result))
                if len(waiting) < cascade.batch_size:
                    continue
                write()
                if time.monotonic() - shown > PROGRESS_SECONDS:
                    shown = time.monotonic()
                    show_progress(progress, journal.records, results.statistics())
    finally:
        write()
        progress.close()
    return results.statistics()


def show_progress(progress: ProgressWriter, records: int, statistics: CascadeStatistics) -> None:
    """Shows how many records are answered, and by whom."""
    progress.write(records, {"to Super": statistics.share_super, "failed": statistics.failed})


def answer_failed(
    cascade: Cascade, records: Iterable[Record], journal: Journal, line: Line = result_line
) -> None:
    """Answers the records again whose lines have an error, and puts the new lines in place of the old ones.

    Args:
      cascade: answers them.
      records: all records, from the first.
      journal: with lines of the records.
      line: what is written of a result.
    """
    failed = [one["index"] for one in journal.lines() if "error" in one]
    if not failed:
        return
    wanted, again = set(failed), {}
    given = ((i, record) for i, record in enumerate(records) if i in wanted)

    # A random score depends on its record's number, so these records run one by one, each with its own.
    apart = any(stage.score == "random" for stage in cascade.stages)
    groups: Iterable[list[tuple[int, Record]]] = ([pair] for pair in given) if apart else [list(given)]
    writing = threading.Lock()

    def write() -> None:
        with writing:
            journal.replace(again)

    try:
        with signals.saving(write):
            for group in groups:
                results = cascade.run((record for _, record in group), start=group[0][0])
                for (index, _), result in zip(group, results, strict=True):
                    again[index] = line(dataclasses.replace(result, index=index))
    finally:
        write()
        left = len(failed) - sum("error" not in one for one in again.values())
        message = f"{len(failed)} records had failed, {left} of them are without an answer still"
        print(message, file=sys.stderr)
