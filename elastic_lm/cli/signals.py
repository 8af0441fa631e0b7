"""How a command ends before its time: by Ctrl-C or another signal, or because nobody reads its output.

Python runs a signal's handler in the main thread, between two steps of its own: long after, where XLA
computes there, and what it raises crashes libraries that are just being imported, or is lost in a callback.
So nothing is raised. A thread of its own hears of every signal at once, saves what a command has to save,
removes what is half-written, and ends the process without the interpreter's own end, in which threads of XLA
and orbax that still work would crash or never return.
"""

import atexit
import contextlib
import io
import os
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator
from typing import NoReturn

# What ends a process, and the word for it. The exit status is 128 and the signal's number.
WORDS = {
    number: word
    for name, word in (("SIGINT", "interrupted"), ("SIGTERM", "terminated"), ("SIGHUP", "hung up"))
    if (number := getattr(signal, name, None)) is not None
}
CLOSED_PIPE = 128 + 13  # as of programs that SIGPIPE ends
SAVING = 2.0  # seconds for what a command has to save
REMOVING = 1.0  # seconds for what is half-written
FLUSHING = 0.5  # seconds for output that is still to be written, which nobody may read
UNFINISHED = "elastic_lm.files.unfinished"
AS_BEFORE = "\x1b[0m\x1b[?25h\n"  # no colour, and the cursor that progress bars hide


class _Process:
    """What signals mean to this process; there is one of it."""

    program = "elastic-lm"  # for messages
    listens = False  # signals come here
    ending = False  # one that ends the process has come
    stop: threading.Event | None = None  # what the first SIGTERM sets instead
    own_handler = 0  # of SIGTERM, as the system knows it
    theirs: Callable[[int], object] | None = None  # that of a library, which hears of that SIGTERM as well
    pause: threading.Event | None = None  # what the first Ctrl-C sets instead, while something can be ended
    pauses = False  # there are such times in this command
    saves: list[Callable[[], None]] = []  # noqa: RUF012 - there is one of it


def listen() -> None:
    """Lets signals end this process, which must be the command's own; called by the main thread."""
    _Process.listens = True
    if not os.environ.get("ELASTIC_LM_DEBUG"):
        # What no code can act on is not for users.
        sys.unraisablehook = lambda _: None
        threading.excepthook = lambda _: None
    reader, writer = os.pipe()
    os.set_blocking(writer, False)
    signal.set_wakeup_fd(writer, warn_on_full_buffer=False)
    threading.Thread(target=_watch, args=(reader,), daemon=True).start()
    for number in WORDS:
        if signal.getsignal(number) is not signal.SIG_IGN:  # as under nohup
            signal.signal(number, _note)
    _Process.own_handler = _system_handler()


def name_program(program: str) -> None:
    """Says what stands before messages from now on."""
    _Process.program = program


def stop_on_sigterm() -> Callable[[], bool]:
    """Lets the first SIGTERM ask for a stop where it would end the process; later ones do.

    Returns:
      Whether it has come. It ends the process until this is called first, by the main thread: there is
      nothing to save before.
    """
    stop = threading.Event()

    def asked() -> bool:
        if _Process.listens and _Process.stop is not stop:
            _Process.stop = stop
            share_sigterm()
        return stop.is_set()

    return asked


def share_sigterm() -> None:
    """Lets SIGTERM come here again where a library has taken it, by the main thread.

    `jax.distributed` does so, for its agreement on the step at which all processes stop. It hears of the
    SIGTERM that asks for a stop; any other one ends this process.
    """
    handler = _system_handler()
    if not _Process.listens or handler in (0, 1, _Process.own_handler):  # 0 and 1: by default, and ignored
        return
    import ctypes

    _Process.theirs = ctypes.CFUNCTYPE(None, ctypes.c_int)(handler)
    signal.signal(signal.SIGTERM, _note)


@contextlib.contextmanager
def interruptible() -> Iterator[Callable[[], bool]]:
    """Lets the first Ctrl-C in the block ask for its end, where it would end the process; a second one does.

    Yields:
      Whether it has come.
    """
    pause = threading.Event()
    _Process.pauses = _Process.listens
    _Process.pause = pause
    try:
        yield pause.is_set
    finally:
        _Process.pause = None


@contextlib.contextmanager
def saving(save: Callable[[], None]) -> Iterator[None]:
    """Saves something where a signal ends the process during the block.

    Args:
      save: called by another thread, while the block goes on.
    """
    _Process.saves.append(save)
    try:
        yield
    finally:
        _Process.saves.remove(save)


def interrupted() -> int:
    """The exit status of a Ctrl-C that was raised, where signals do not come here; says it."""
    print(f"{_Process.program}: {WORDS[signal.SIGINT]}", file=sys.stderr)
    return 128 + signal.SIGINT


def wait_for_end() -> None:
    """Returns at once, unless a signal ends this process: then nothing else is said or done here."""
    while _Process.ending:
        time.sleep(1)


def is_closed_pipe(error: BaseException) -> bool:
    """Whether an error says that nobody reads stdout or stderr any more; pipes that are files have names."""
    return isinstance(error, BrokenPipeError) and error.filename is None


def open_streams() -> None:
    """Lets what is printed go nowhere, where stdout or stderr was closed before the process began."""
    for name in ("stdout", "stderr"):
        if getattr(sys, name) is None:
            setattr(sys, name, open(os.devnull, "w", encoding="utf-8"))  # noqa: SIM115 - as long as the process


def accept_any_text() -> None:
    """Lets stdout and stderr replace what their encoding does not have."""
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            utf8 = stream.encoding.lower().replace("-", "") == "utf8"
            with contextlib.suppress(OSError, ValueError):  # closed
                stream.reconfigure(errors="backslashreplace" if utf8 or stream is sys.stderr else "replace")


def finish(status: int) -> NoReturn:
    """Ends the process with the exit status that the command came to."""
    wait_for_end()
    if not status:
        # What the interpreter would do at its end, but while signals still come here: it forgets them early.
        atexit._run_exitfuncs()
    _leave(status)


def _system_handler() -> int:
    """The address of the function that the system calls at SIGTERM, which a library may have set in C."""
    if sys.platform == "win32":
        return 0
    import ctypes

    # The structure begins with the address, on Linux and macOS, and is shorter than this.
    action = (ctypes.c_void_p * 64)()
    failed = ctypes.CDLL(None).sigaction(int(signal.SIGTERM), None, action)
    return 0 if failed else action[0] or 0


def _note(number: int, _: object) -> None:
    """Runs in the main thread, sooner or later: a command that has come to its end meanwhile waits for it."""
    if number == signal.SIGINT and _Process.pauses:
        return  # whether it ends the process is for the thread below to say
    _Process.ending = _Process.ending or number != signal.SIGTERM or _Process.stop is None


def _watch(reader: int) -> None:
    """Runs in a thread of its own: hears of signals when they come."""
    while True:
        number = os.read(reader, 1)[0]
        if number not in WORDS:
            continue
        stop = _Process.stop
        if number == signal.SIGTERM and stop is not None and not stop.is_set():
            stop.set()
            if _Process.theirs is not None:
                _Process.theirs(number)
            continue
        pause = _Process.pause
        if number == signal.SIGINT and pause is not None and not pause.is_set():
            pause.set()
            continue
        _end(number)


def _end(number: int) -> NoReturn:
    """Ends the process as a signal asks for; nothing that it does can hold it up."""
    _Process.ending = True
    # Nothing is imported here: the main thread may be importing it.
    if "logging" in sys.modules:
        sys.modules["logging"].disable()  # what is broken off is not worth a word
    for save in list(_Process.saves):
        _within(SAVING, save)
    if UNFINISHED in sys.modules:
        _within(REMOVING, sys.modules[UNFINISHED].discard_unfinished)
    line = f"{_Process.program}: {WORDS[number]}\n"
    with contextlib.suppress(OSError):
        if os.isatty(1):
            os.write(1, AS_BEFORE.encode())
    _leave(128 + number, line)


def _leave(status: int, line: str = "") -> NoReturn:
    """Ends the process here and now; other threads and what the interpreter would do at its end are left."""

    def flush() -> None:
        for stream in (sys.stdout, sys.stderr):
            with contextlib.suppress(Exception):
                stream.flush()

    _within(FLUSHING, flush)
    with contextlib.suppress(OSError):
        os.write(2, line.encode())
    os._exit(status)


def _within(seconds: float, act: Callable[[], None]) -> None:
    """Acts, and goes on after so many seconds where that is not over."""

    def quietly() -> None:
        with contextlib.suppress(Exception):
            act()

    thread = threading.Thread(target=quietly, daemon=True)
    thread.start()
    thread.join(seconds)
