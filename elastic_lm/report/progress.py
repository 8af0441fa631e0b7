"""How far a step is and how long it still takes: a live line in a terminal, else plain lines now and then."""

import threading
import time
from collections.abc import Iterable, Iterator
from typing import Self, TypeVar

import rich.progress
from rich.console import Console

EVERY = 10.0  # seconds between plain lines

Item = TypeVar("Item")


class Progress:
    """Shows one part of a step after the other, from `with` to its end.

    Plain lines come from a thread of their own, so that work that says nothing for long is seen to go on.

    Example:
      ```python
      from rich.console import Console
      from elastic_lm.report.progress import Progress

      with Progress(Console()) as progress:
          for number in progress.over(range(3), 3, "counting"):
              pass
      ```
    """

    def __init__(self, console: Console, live: bool = True) -> None:
        """Prepares a line; nothing is shown before `with`.

        Args:
          console: where it goes.
          live: one line is redrawn where the console is a terminal; off where something else draws.
        """
        self._console = console
        self._what, self._done, self._total = "", 0.0, None
        self._began = self._step_began = time.monotonic()
        self._over = threading.Event()
        self._thread: threading.Thread | None = None
        self._bar: rich.progress.Progress | None = None
        self._task: rich.progress.TaskID | None = None
        if live and console.is_terminal:
            self._bar = rich.progress.Progress(
                rich.progress.TextColumn("    {task.description}"),
                rich.progress.BarColumn(),
                rich.progress.TimeElapsedColumn(),
                rich.progress.TimeRemainingColumn(elapsed_when_finished=False),
                console=console,
                transient=True,
                refresh_per_second=1,  # drawing takes time from what is measured
            )

    def __enter__(self) -> Self:
        self._step_began = time.monotonic()
        if self._bar is not None:
            self._bar.start()
        else:
            self._thread = threading.Thread(target=self._lines, daemon=True)
            self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._over.set()
        if self._bar is not None:
            self._bar.stop()
        if self._thread is not None:
            self._thread.join()

    def update(self, what: str, done: float = 0.0, total: float | None = None) -> None:
        """Says what is going on.

        Args:
          what: a few words; a new text begins a new part.
          done: of `total`.
          total: None = how much there is to do is not known.
        """
        new = what != self._what
        if new:
            self._began = time.monotonic()
        self._what, self._done, self._total = what, done, total
        if self._bar is None:
            return
        if new:
            if self._task is not None:
                self._bar.remove_task(self._task)
            self._task = self._bar.add_task(what, total=total)
        assert self._task is not None
        self._bar.update(self._task, completed=done, total=total)

    def over(self, items: Iterable[Item], total: int, what: str) -> Iterator[Item]:
        """The items, each of which is done when the next is asked for; afterwards, that there are no more.

        Args:
          items: any.
          total: most of them.
          what: as in `update`.
        """
        self.update(what, 0, total)
        for done, item in enumerate(items, 1):
            yield item
            self.update(what, done, total)
        self.update(f"{what}, all read")

    def line(self) -> str:
        """What is going on, how far it is and about how long it still takes."""
        now = time.monotonic()
        if not self._what:
            return f"{now - self._step_began:.0f} s so far"
        if not self._total:
            return f"{self._what}: {now - self._began:.0f} s so far"
        counted = f"{self._what}: {self._done:g} of {self._total:g}"
        if not self._done:
            return f"{counted}, {now - self._began:.0f} s so far"
        left = (now - self._began) / self._done * (self._total - self._done)
        return f"{counted}, about {max(left, 0):.0f} s left"

    def _lines(self) -> None:
        while not self._over.wait(EVERY):
            self._console.print(f"    [dim]{self.line()}[/]", highlight=False)
