"""Where the wall time of a run goes: productive steps, compilation, data, checkpoints, evaluation, the rest.

    productive  the devices compute a training step whose result stays
    lost        they computed one that was computed again after a restart
    compile     programs are traced, compiled, or read from the cache of compiled programs
    start       the model, the data and the newest checkpoint are read, until the first step can begin
    data        the devices wait for the next batch
    checkpoint  they wait for a checkpoint
    evaluation  held-out data is evaluated
    idle        everything else

The seconds add up to the wall time. The host reads a batch while the devices compute, so that its own times
alone would blame the data for what costs nothing. A thread therefore waits for the result of every step and
notes when it was there; the loop never waits for it. What the host does meanwhile counts only where no step
was running.

A run that goes on adds to the seconds of its earlier starts, which lie in goodput.json of its workdir. The
time between two starts is in none of them.
"""

import collections
import contextlib
import dataclasses
import functools
import json
import logging
import queue
import threading
import time
import weakref
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np

from elastic_lm.files.atomic import read_json, write_text_whole
from elastic_lm.report.writers import Writer

FILE = "goodput.json"
SPENT = ("productive", "lost", "compile", "start", "data", "checkpoint", "evaluation", "idle")
COMPILING = "/jax/core/compile/"  # events of jax.monitoring with the seconds of traces and compilations
MARKS = 100  # most steps of which the file says how much was productive until then
MOST_SPANS = 1000  # kept until they are added up

Interval = tuple[float, float]


def attribute(
    spans: Iterable[tuple[str, float, float]],
    busy: Iterable[Interval],
    compiles: Iterable[Interval],
    began: float,
    ended: float,
) -> dict[str, float]:
    """Divides the time from `began` to `ended`.

    Args:
      spans: (what, from, to): what the host did. They do not overlap.
      busy: when the devices computed steps; comes before everything else.
      compiles: when programs were compiled; comes before what the host did.
      began: seconds.
      ended: seconds.

    Returns:
      {what: seconds}, which add up to ended - began; "idle" is what nothing covers.
    """
    stepping = _union(busy, began, ended)
    taken = _union([*stepping, *_union(compiles, began, ended)], began, ended)
    found = {"productive": _length(stepping), "compile": _length(taken) - _length(stepping)}

    by_what = collections.defaultdict[str, list[Interval]](list)
    for what, start, end in spans:
        by_what[what].append((start, end))
    for what, times in by_what.items():
        covered = _union([*taken, *times], began, ended)
        found[what] = _length(covered) - _length(taken)
        taken = covered
    return {**found, "idle": ended - began - _length(taken)}


class Goodput:
    """Divides the wall time of a run, from when it is made.

    Methods are called by the thread that makes it.
    """

    def __init__(
        self, clock: Callable[[], float] = time.monotonic, wait: Callable[[Any], Any] = jax.block_until_ready
    ) -> None:
        """Begins.

        Args:
          clock: seconds.
          wait: returns when arrays are computed.
        """
        self._clock = clock
        self._since = clock()
        self._seconds: dict[str, float] = {what: 0.0 for what in SPENT}  # noqa: C420 - of any key
        self._marks: list[tuple[int, float]] = []
        self._starts, self._between, self._step = 1, 0.0, 0
        self._file: Path | None = None
        self._spans: list[tuple[str, float, float]] = []
        self._compiles: list[Interval] = []
        self._running = _Running(clock, wait)
        self._thread = threading.get_ident()
        _listen()
        _listening.add(self)

    def ready(self, workdir: Path | None, step: int) -> None:
        """Ends the preparation of the first step, and adds what earlier starts have taken.

        Args:
          workdir: goodput.json is read and written here; None = nowhere, as in all processes but the first.
          step: steps that are done, of which nothing is lost.
        """
        self._spans.append(("start", self._since, self._clock()))
        self._step = step
        self._file = None if workdir is None else workdir / FILE
        earlier = None if self._file is None else _earlier(self._file)
        if earlier is None:
            return

        steps, until = zip((0, 0.0), *earlier.marks, strict=True)
        kept = float(np.interp(step, steps, until))
        self._marks = [mark for mark in earlier.marks if mark[0] <= step]
        self._starts, self._between = earlier.starts + 1, earlier.between
        self._between += max(time.time() - earlier.written - (self._clock() - self._since), 0.0)
        for what, seconds in earlier.seconds.items():
            self._seconds[what] += seconds
        self._seconds["lost"] += self._seconds["productive"] - kept
        self._seconds["productive"] = kept

    @contextlib.contextmanager
    def doing(self, what: str) -> Iterator[None]:
        """The block is `what`, one of `SPENT`, wherever no step runs meanwhile."""
        began = self._clock()
        try:
            yield
        finally:
            self._spans.append((what, began, self._clock()))
            if len(self._spans) >= MOST_SPANS:
                self._add_up()

    def step(self, function: Callable[..., tuple[Any, Any]], *args: Any) -> tuple[Any, Any]:
        """Sends a step off.

        Args:
          function: (*args) -> (state, metrics); the step is done when the metrics are there.
          args: of the function.
        """
        began = self._clock()
        found = function(*args)
        compiled = [end for _, end in self._compiles if end > began]
        self._running.add(max([began, *compiled]), found[1])
        return found

    def note(self, step: int) -> None:
        """Adds up what was until now, and writes it down: `step` steps are done."""
        self._add_up()
        self._step = step
        before = [mark for mark in self._marks if mark[0] < step]
        self._marks = [*_thinned(before), (step, self._seconds["productive"])]
        self._save()

    def values(self) -> dict[str, float]:
        """Seconds until the last `note`, their sum, and the share that was productive."""
        total = sum(self._seconds.values())
        seconds = {f"{what}_seconds": seconds for what, seconds in self._seconds.items()}
        return {"goodput": self._share(total), "wall_seconds": total, **seconds}

    def line(self) -> str:
        """The same in words."""
        total = sum(self._seconds.values())
        parts = ", ".join(f"{what} {s:.1f}" for what, s in self._seconds.items() if s >= 0.05)
        starts = f"; {self._starts} starts, {self._between:.0f} s between them" if self._starts > 1 else ""
        return f"goodput {100 * self._share(total):.1f} % of {total:.1f} s: {parts}{starts}"

    @contextlib.contextmanager
    def until_end(self, writer: Writer) -> Iterator[None]:
        """The loop runs in the block; at its end, the numbers are written, however it ends.

        Args:
          writer: of the run; the first process's writes.
        """
        try:
            yield
        except BaseException:
            # What ended the loop is what the user has to know.
            with contextlib.suppress(OSError, ValueError):
                self._report(writer)
            raise
        else:
            self._report(writer)
        finally:
            self.close()

    def close(self) -> None:
        """Ends the thread that waits for steps."""
        self._running.close()
        _listening.discard(self)

    def heard_compilation(self, seconds: float) -> None:
        """A trace or compilation has ended, in any thread."""
        if threading.get_ident() == self._thread:
            now = self._clock()
            self._compiles.append((now - seconds, now))

    def _report(self, writer: Writer) -> None:
        self._add_up()
        self._save()
        writer.write(self._step, self.values())
        if self._file is not None:
            print(self.line(), flush=True)

    def _save(self) -> None:
        if self._file is None:
            return
        written = _Written(self._seconds, self._marks, self._starts, self._between, time.time())
        write_text_whole(self._file, json.dumps(dataclasses.asdict(written), indent=2) + "\n")

    def _add_up(self) -> None:
        now = self._clock()
        found = attribute(self._spans, self._running.busy(now), self._compiles, self._since, now)
        for what, seconds in found.items():
            self._seconds[what] += seconds
        self._spans.clear()
        self._compiles.clear()
        self._since = now

    def _share(self, total: float) -> float:
        return self._seconds["productive"] / total if total else 0.0


class _Running:
    """Notes when steps that were sent off are done, in a thread of its own."""

    def __init__(self, clock: Callable[[], float], wait: Callable[[Any], Any]) -> None:
        self._clock = clock
        self._wait = wait
        self._lock = threading.Lock()
        self._sent = queue.SimpleQueue[Any]()
        self._began = collections.deque[float]()  # of the steps that run or are to run
        self._done: list[Interval] = []
        self._last = float("-inf")  # when the last one was done
        self._thread: threading.Thread | None = None

    def add(self, began: float, results: Any) -> None:
        """A step was sent off at `began`."""
        if self._thread is None:
            self._thread = threading.Thread(target=self._watch, daemon=True)
            self._thread.start()
        with self._lock:
            self._began.append(began)
        self._sent.put(results)

    def busy(self, now: float) -> list[Interval]:
        """When steps ran, since this was asked last; a step that still runs has run until now."""
        with self._lock:
            found, self._done = self._done, []
            if self._began:
                found.append((max(self._began[0], self._last), now))
        return found

    def close(self) -> None:
        if self._thread is not None:
            self._sent.put(None)

    def _watch(self) -> None:
        while (results := self._sent.get()) is not None:
            # A step that failed is the loop's to report.
            with contextlib.suppress(Exception):
                self._wait(results)
            del results
            with self._lock:
                now = self._clock()
                # A device runs one step after the other.
                self._done.append((max(self._began.popleft(), self._last), now))
                self._last = now


@dataclasses.dataclass(frozen=True)
class _Written:
    """goodput.json.

    Attributes:
      seconds: by what took them, of all starts.
      marks: (step, productive seconds until then), in ascending order.
      starts: of the run.
      between: seconds between them.
      written: seconds since 1970.
    """

    seconds: dict[str, float]
    marks: Sequence[tuple[int, float]]
    starts: int
    between: float
    written: float


def _earlier(file: Path) -> _Written | None:
    """What earlier starts have written; None where nothing can be read."""
    if not file.is_file():
        return None
    try:
        values = read_json(file)
        seconds = {what: float(values["seconds"].get(what, 0.0)) for what in SPENT}
        marks = [(int(step), float(until)) for step, until in values["marks"]]
        counts = int(values["starts"]), float(values["between"]), float(values["written"])
        return _Written(seconds, marks, *counts)
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        logging.warning("%s: is damaged (%s); seconds are counted from this start on", file, error)
        return None


def _thinned(marks: Sequence[tuple[int, float]]) -> list[tuple[int, float]]:
    """At most `MARKS`, of which the last are all there: a run goes on from one of its last checkpoints."""
    if len(marks) < MARKS:
        return list(marks)
    return [*marks[: -MARKS // 2 : 2], *marks[-MARKS // 2 :]]


def _union(intervals: Iterable[Interval], began: float, ended: float) -> list[Interval]:
    """The same without overlaps, in ascending order, inside [began, ended]."""
    clipped = sorted((max(a, began), min(b, ended)) for a, b in intervals)
    found: list[Interval] = []
    for a, b in clipped:
        if a >= b:
            continue
        if found and a <= found[-1][1]:
            found[-1] = (found[-1][0], max(found[-1][1], b))
        else:
            found.append((a, b))
    return found


def _length(intervals: Iterable[Interval]) -> float:
    return sum(b - a for a, b in intervals)


_listening = weakref.WeakSet[Goodput]()


@functools.cache
def _listen() -> None:
    """Hears of compilations, once per process: JAX forgets no listener."""

    def heard(event: str, duration_secs: float, **_: Any) -> None:
        if event.startswith(COMPILING):
            for goodput in list(_listening):
                goodput.heard_compilation(duration_secs)

    jax.monitoring.register_event_duration_secs_listener(heard)
