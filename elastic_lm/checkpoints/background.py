"""Work that goes on in a thread of its own, while a run trains, and keeps its error for who waits for it."""

import threading
from collections.abc import Callable


class Background:
    """One piece of work, begun at once."""

    def __init__(self, work: Callable[[], None]) -> None:
        """Starts the thread.

        Args:
          work: what is done; what it raises is kept.
        """
        self.error: BaseException | None = None
        self._work = work
        # A process that ends in another way does not wait for it.
        self._thread = threading.Thread(target=self._run, name="checkpoint", daemon=True)
        self._thread.start()

    def done(self) -> bool:
        """Whether the work is over, well or not."""
        return not self._thread.is_alive()

    def wait(self, seconds: float | None = None) -> None:
        """Waits for the end, without raising anything.

        Args:
          seconds: at most; None = as long as it takes.
        """
        self._thread.join(seconds)

    def _run(self) -> None:
        try:
            self._work()
        except BaseException as error:
            self.error = error
