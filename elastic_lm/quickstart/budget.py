"""The wall-clock time of a run, and how much of what is left each step may take.

Nothing is planned ahead but shares of the time that is left when a step begins: a step that took longer than
thought leaves less to those after it, and timing, which takes what is there, comes last. What cannot be cut,
above all compiling, may still exceed a very short time.
"""

import itertools
import math
import time
from collections.abc import Iterable, Iterator
from typing import TypeVar

Item = TypeVar("Item")


class Budget:
    """A deadline, from now on."""

    def __init__(self, minutes: float = math.inf) -> None:
        """Begins.

        Args:
          minutes: how long the run may take; infinite = as long as it takes.
        """
        self._began = time.monotonic()
        self.seconds = 60 * minutes

    def spent(self) -> float:
        """Seconds since the beginning."""
        return time.monotonic() - self._began

    def left(self) -> float:
        """Seconds until the deadline, at least 0."""
        return max(self.seconds - self.spent(), 0.0)

    def within(self, items: Iterable[Item], share: float, least: int) -> Iterator[Item]:
        """The first items, as far as a share of the time that is left when the first is asked for goes.

        Args:
          items: any, each of which is worked on until the next is asked for.
          share: of the time that is left.
          least: items that come in any case.
        """
        end = time.monotonic() + share * self.left()
        items = iter(items)
        yield from itertools.islice(items, least)
        for item in items:
            if time.monotonic() > end:
                return
            yield item
