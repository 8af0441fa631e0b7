"""How a command ends before its time: by Ctrl-C or another signal, or because nobody reads its output.

Python runs a signal's handler in the main thread, between two steps of its own: not while XLA computes there,
and an exception that it raises is lost in a callback. So a thread of its own hears of every signal at once.
The main thread gets a moment to unwind, which removes what is half-written; then the process ends, without
the interpreter's own end, in which threads of XLA and orbax that still work would crash or never return.
"""

import contextlib
import dataclasses
import io
import logging
import os
import select
import signal
import sys
import threading
from collections.abc import Callable
from types import FrameType
from typing import NoReturn

# What ends a process, and the word for it. The exit status is 128 and the signal's number.
WORDS = {
    number: word
    for name, word in (("SIGINT", "interrupted"), ("SIGTERM", "terminated"), ("SIGHUP", "hung up"))
    if (number := getattr(signal, name, None)) is not None
}
CLOSED_PIPE = 128 + 13  # as of programs that SIGPIPE ends
UNWINDING = 1.5  # seconds that the main thread gets
FLUSHING = 0.5  # seconds for output that is still to be written, which nobody may read


@dataclasses.dataclass
class _Process:
    """What signals this process has had; there is one of it."""

    program: str = "elastic-lm"  # for messages
    listens: bool = False  # signals come here
    ending: int | None = None  # the first signal that ends the process
    raised: bool = False  # KeyboardInterrupt, in the main thread
    said: bool = False  # that it ends
    over: bool = False  # the command has come to its end
    stop: threading.Event | None = None  # what the first SIGTERM sets instead
    lock: threading.RLock = dataclasses.field(default_factory=threading.RLock)


_process = _Process()


def listen() -> None:
    """Lets signals end this process, which must be the command's own; called by the main thread."""
    _process.listens = True
    reader, writer = os.pipe()
    os.set_blocking(writer, False)
    signal.set_wakeup_fd(writer, warn_on_full_buffer=False)
    threading.Thread(target=_watch, args=(reader,), daemon=True).start()
    for number in WORDS:
        if signal.getsignal(number) is not signal.SIG_IGN:  # as under nohup
            signal.signal(number, _handle)


def name_program(program: str) -> None:
    """Says what stands before messages from now on."""
    _process.program = program


def stop_on_sigterm() -> Callable[[], bool]:
    """From now on the first SIGTERM asks for a stop and does not end the process; later ones do.

    Returns:
      Whether it has come.
    """
    stop = threading.Event()
    if _process.listens:
        _process.stop = stop
    return stop.is_set


def ended(interrupted: bool = False) -> int:
    """The exit status of the signal that ends this process, which is said once; 0 = there was none.

    Args:
      interrupted: Ctrl-C was noticed, also where signals do not come here.
    """
    number = _process.ending or (signal.SIGINT if interrupted else None)
    if number is None:
        return 0
    _say(number)
    return 128 + number


def is_closed_pipe(error: BaseException) -> bool:
    """Whether an error says that nobody reads stdout or stderr any more; pipes that are files have names."""
    return isinstance(error, BrokenPipeError) and error.filename is None


def accept_any_text() -> None:
    """Lets stdout and stderr replace what their encoding does not have."""
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            utf8 = (stream.encoding or "").lower().replace("-", "") == "utf8"
            with contextlib.suppress(OSError, ValueError):  # closed
                stream.reconfigure(errors="backslashreplace" if utf8 or stream is sys.stderr else "replace")


def leave(status: int) -> NoReturn:
    """Ends the process here and now; other threads and what the interpreter would do at its end are left."""
    flushing = threading.Thread(target=_flush, daemon=True)
    flushing.start()
    flushing.join(FLUSHING)
    os._exit(status)


def finish(status: int) -> int:
    """Takes the exit status that the command came to; returns it where the interpreter can end as usual."""
    _process.over = True
    status = ended() or status
    if status:
        leave(status)
    return status


def _handle(number: int, frame: FrameType | None) -> None:
    """Runs in the main thread, sooner or later."""
    if number == signal.SIGTERM and _process.stop is not None and not _process.ending:
        return  # the other thread sets it, and ends the process where it is set already
    if _process.over:
        _say(number)
        os._exit(128 + number)
    _process.ending = _process.ending or number
    _silence()
    if not _process.raised:  # a second one would break off the unwinding
        _process.raised = True
        raise KeyboardInterrupt


def _watch(reader: int) -> None:
    """Runs in a thread of its own: hears of signals when they come, and ends the process where it goes on."""
    while True:
        number = os.read(reader, 1)[0]
        if number not in WORDS:
            continue
        stop = _process.stop
        if number == signal.SIGTERM and stop is not None and not stop.is_set():
            stop.set()
            continue

        _process.ending = _process.ending or number
        select.select([reader], [], [], UNWINDING)  # a second signal does not wait
        _say(_process.ending)
        from elastic_lm.files.atomic import discard_unfinished

        removing = threading.Thread(target=discard_unfinished, daemon=True)
        removing.start()
        removing.join(UNWINDING)
        leave(128 + _process.ending)


def _silence() -> None:
    """Nothing else is printed by what is broken off now."""
    logging.disable()
    sys.unraisablehook = lambda _: None
    threading.excepthook = lambda _: None


def _say(number: int) -> None:
    with _process.lock:
        if _process.said:
            return
        _process.said = True
    with contextlib.suppress(Exception):
        print(f"{_process.program}: {WORDS[number]}", file=sys.stderr, flush=True)


def _flush() -> None:
    for stream in (sys.stdout, sys.stderr):
        with contextlib.suppress(Exception):
            stream.flush()
