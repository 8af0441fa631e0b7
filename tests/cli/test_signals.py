"""How commands end before their time: one line and a status, whatever the process is busy with."""

import io
import os
import re
import select
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from killing import children_that

from elastic_lm.cli import convert, signals
from elastic_lm.cli import main as cli

pytestmark = pytest.mark.skipif(sys.platform == "win32", reason="signals of POSIX")

# The command `convert`, which does something else here; what it prints first says that it is at it.
COMMAND = """
import ctypes, pathlib, sys, threading, time
from elastic_lm.cli import convert, main, signals

def run(options):
{body}

convert.run = run
sys.argv = ["elastic-lm", "convert", "--from", "a", "--to", "b"]
raise SystemExit(main.main())
"""
SAY = 'print("at it", flush=True)'
SOON = 5.0  # seconds from a signal to the end


def start(*lines: str, do: signal.Handlers = signal.SIG_DFL, **how: object) -> subprocess.Popen:
    script = COMMAND.format(body="".join(f"    {line}\n" for line in lines))
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
    with children_that(do):
        return subprocess.Popen([sys.executable, "-c", script], **{**pipes, **how})


def end(process: subprocess.Popen, number: signal.Signals, *, say: bool = True) -> tuple[int, str, str]:
    """(status, stdout, stderr) of a process that is sent a signal once it is at it."""
    if say:
        assert process.stdout.readline() == b"at it\n"
    process.send_signal(number)
    began = time.monotonic()
    out, err = process.communicate(timeout=60)
    assert time.monotonic() - began < SOON
    return process.returncode, out.decode(), err.decode()


BUSY = {
    "sleeping": ("time.sleep(600)",),
    "in C": (
        "import signal; signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGINT])",  # nor does it wake there
        "ctypes.CDLL(None).sleep(600)",
    ),
    "at its end": ("ctypes.CDLL(None).sleep(600)",),  # wakes, and there is nothing else to do
    "swallowing": ("while True:", "    try: time.sleep(600)", "    except BaseException: pass"),
    "joining": ("threading.Thread(target=time.sleep, args=(600,)).start()",),
}


@pytest.mark.parametrize("busy", BUSY)
def test_ctrl_c_ends_whatever_is_going_on(busy: str) -> None:
    assert end(start(SAY, *BUSY[busy]), signal.SIGINT) == (130, "", "elastic-lm convert: interrupted\n")


@pytest.mark.parametrize(
    ("number", "status", "word"), [(signal.SIGTERM, 143, "terminated"), (signal.SIGHUP, 129, "hung up")]
)
def test_other_signals_end_it_too(number: signal.Signals, status: int, word: str) -> None:
    found = end(start(SAY, "time.sleep(600)"), number)
    assert found == (status, "", f"elastic-lm convert: {word}\n")


def test_what_is_half_written_goes_and_what_is_to_be_saved_is(tmp_path: Path) -> None:
    process = start(
        "from elastic_lm.files.atomic import whole_folder, whole_file",
        "from elastic_lm.files.locks import only_process",
        f"here = pathlib.Path({str(tmp_path)!r})",
        "def save(): (here / 'saved').write_text('all of it')",
        "with signals.saving(save), only_process(here / '.lock', here, 'wait'):",
        "    with whole_folder(here / 'model') as partial, whole_file(here / 'file') as file:",
        "        (partial / 'params').mkdir(); (partial / 'params' / 'a').touch(); file.write(b'half')",
        f"        {SAY}",
        "        time.sleep(600)",
    )
    status, _, error = end(process, signal.SIGINT)
    assert (status, error) == (130, "elastic-lm convert: interrupted\n")
    assert [path.name for path in tmp_path.iterdir()] == ["saved"]


def test_a_save_that_does_not_end_holds_nothing_up() -> None:
    process = start(f"with signals.saving(lambda: time.sleep(600)): {SAY}; time.sleep(600)")
    assert end(process, signal.SIGINT)[0] == 130


def test_output_that_nobody_reads_holds_nothing_up() -> None:
    process = start("while True: print('x' * 1000)")
    assert process.stdout is not None
    select.select([process.stdout], [], [], 60)
    time.sleep(0.2)  # the pipe is full now
    process.send_signal(signal.SIGINT)
    assert process.wait(SOON) == 130


def test_a_stop_is_asked_for_once_there_is_something_to_save() -> None:
    lines = ("stop = signals.stop_on_sigterm()", "assert not stop()", SAY)
    waits = "while not stop(): time.sleep(0.01)"
    found = end(start(*lines, waits, "print('stopped')"), signal.SIGTERM)
    assert found == (0, "stopped\n", "")
    assert end(start(lines[0], SAY, "time.sleep(600)"), signal.SIGTERM)[0] == 143

    process = start(*lines, waits, "print('stopped', flush=True)", "time.sleep(600)")
    assert process.stdout is not None
    assert process.stdout.readline() == b"at it\n"
    process.send_signal(signal.SIGTERM)
    assert process.stdout.readline() == b"stopped\n"
    assert end(process, signal.SIGTERM, say=False)[0] == 143, "the second one ends it"


def test_a_library_that_takes_sigterm_hears_of_it_and_does_not_keep_it() -> None:
    lines = (
        "stop = signals.stop_on_sigterm()",
        "theirs = ctypes.CFUNCTYPE(None, ctypes.c_int)(lambda number: print('theirs', number, flush=True))",
        "ctypes.CDLL(None).signal.argtypes = [ctypes.c_int, ctypes.c_void_p]",
        "ctypes.CDLL(None).signal(15, ctypes.cast(theirs, ctypes.c_void_p))",
        "assert not stop()",
        SAY,
        "while not stop(): time.sleep(0.01)",
        "print('stopped', flush=True)",
        "time.sleep(600)",
    )
    process = start(*lines)
    assert process.stdout is not None
    assert process.stdout.readline() == b"at it\n"
    process.send_signal(signal.SIGTERM)
    assert sorted(process.stdout.readline() for _ in range(2)) == [b"stopped\n", b"theirs 15\n"]
    assert end(process, signal.SIGTERM, say=False)[0] == 143, "the second one ends it"


def test_signals_that_are_ignored_stay_so() -> None:
    process = start(SAY, "input()", do=signal.SIG_IGN)
    assert process.stdout is not None
    assert process.stdout.readline() == b"at it\n"
    for number in (signal.SIGHUP, signal.SIGINT):
        process.send_signal(number)
    time.sleep(0.2)
    out, err = process.communicate(b"go on\n", timeout=60)
    assert (process.returncode, out, err) == (0, b"", b"")


@pytest.mark.parametrize("printed", ["print('x')", "for _ in range(9999): print('x' * 99)", "time.sleep(0)"])
def test_a_closed_pipe_is_no_error(printed: str) -> None:
    reader, writer = os.pipe()
    os.close(reader)
    process = start(printed, stdout=writer)
    os.close(writer)
    _, error = process.communicate(timeout=60)
    assert error == b""
    assert process.returncode == (0 if "sleep" in printed else signals.CLOSED_PIPE)


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="there is no /dev/full here")
def test_output_that_cannot_be_written_is_named() -> None:
    with open("/dev/full", "wb") as full:
        process = start("print('x')", stdout=full)
        _, error = process.communicate(timeout=60)
    assert process.returncode == 2
    assert error == b"elastic-lm convert: error: stdout: No space left on device\n"


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="there is no /dev/full here")
def test_other_errors_of_the_disk_are_not_those_of_stdout() -> None:
    process = start("with open('/dev/full', 'wb', 0) as file: file.write(b'x')")
    _, error = process.communicate(timeout=60)
    assert process.returncode == 2
    assert error == b"elastic-lm convert: error: [Errno 28] No space left on device\n"


def test_closed_streams_are_no_error() -> None:
    process = start(
        "print('x'); print(open('/dev/null').fileno() > 2, file=sys.stderr)", preexec_fn=close_stdout
    )
    _, error = process.communicate(timeout=60)
    assert (process.returncode, error) == (0, b"True\n")


def close_stdout() -> None:
    os.close(1)


def test_errors_of_other_threads_show_no_traceback() -> None:
    process = start("thread = threading.Thread(target=lambda: 1 / 0); thread.start(); thread.join()")
    _, error = process.communicate(timeout=60)
    assert (process.returncode, error) == (0, b"")


def run(monkeypatch: pytest.MonkeyPatch, act: object) -> int:
    """The status of `convert` in this process, with something else to do."""
    monkeypatch.setattr(convert, "run", act)
    return cli.main(["convert", "--from", "a", "--to", "b"])


def test_within_a_process_statuses_are_returned(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def raising(error: BaseException):
        def act(_: object) -> None:
            raise error

        return act

    assert run(monkeypatch, raising(KeyboardInterrupt())) == 130
    assert capsys.readouterr().err == "elastic-lm convert: interrupted\n"
    assert run(monkeypatch, raising(BrokenPipeError(32, "Broken pipe"))) == 141
    assert capsys.readouterr().err == ""
    assert run(monkeypatch, raising(BrokenPipeError(32, "Broken pipe", "a.fifo"))) == 2
    assert capsys.readouterr().err == "elastic-lm convert: error: a.fifo: Broken pipe\n"
    for error in (MemoryError("1 GiB"), RuntimeError("RESOURCE_EXHAUSTED: Out of memory")):
        assert run(monkeypatch, raising(error)) == 2
        assert "error: does not fit into memory: use a smaller batch or model (" in capsys.readouterr().err

    def parsers() -> None:
        raise ImportError("no such library")

    monkeypatch.setattr(cli, "build_parsers", parsers)
    assert run(monkeypatch, raising(ValueError())) == 70
    assert capsys.readouterr().err.startswith("elastic-lm: error: unexpected ImportError: no such library")


@pytest.mark.parametrize(
    ("encoding", "shown"),
    [("ascii", b"Caf? ? x\n"), ("latin-1", b"Caf\xe9 ? x\n"), ("utf-8", "Café 日 x\n".encode())],
)
def test_terminals_show_what_they_can(monkeypatch: pytest.MonkeyPatch, encoding: str, shown: bytes) -> None:
    written = io.BytesIO()
    monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(written, encoding=encoding, errors="strict"))
    assert run(monkeypatch, lambda _: print("Café 日 x")) == 0
    assert written.getvalue() == shown
    assert run(monkeypatch, lambda _: print("\ud800")) == 0
    assert re.search(rb"\n(\?|\\ud800)\n$", written.getvalue())
