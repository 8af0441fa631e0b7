"""What a run has found so far, on disk after every change, and the time that is left to it."""

import json
import subprocess
import time
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

from elastic_lm.files.atomic import write_text_whole

TRACE_LINES = 12


class Record:
    """Results of sections in OUT/results.json; a section that fails leaves its traceback and no more."""

    def __init__(self, path: Path, seconds: float, **head: Any):
        """Starts the clock.

        Args:
          path: of the JSON.
          seconds: after these no section begins.
          **head: what the run is, put before the sections.
        """
        self.path, self.limit, self.began = path, seconds, time.perf_counter()
        self.result: dict[str, Any] = {**head, "sections": {}}
        self.section = ""

    def elapsed(self) -> float:
        """Seconds since the start."""
        return time.perf_counter() - self.began

    def left(self) -> float:
        """Seconds until no section begins any more."""
        return self.limit - self.elapsed()

    def say(self, text: str) -> None:
        """Prints a line of progress."""
        print(f"[{self.elapsed():6.1f} s] {self.section}: {text}", flush=True)

    def put(self, **values: Any) -> None:
        """Adds to the section that runs, and writes and prints what was added."""
        self.result["sections"][self.section].update(values)
        self.save()
        self.say(json.dumps(values)[:300])

    def found(self, section: str) -> dict[str, Any]:
        """What a section found; empty where it did not run."""
        return self.result["sections"].get(section, {})

    def run(self, name: str, needs: float, function: Callable[["Record"], None]) -> None:
        """Runs one section; nothing that happens in it ends the others.

        Args:
          name: of the section.
          needs: seconds that it will take, about; it is skipped where fewer are left.
          function: puts what it finds into this record.
        """
        self.section = name
        self.result["sections"][name] = {}
        if self.left() < needs:
            self.put(skipped=f"{self.left():.0f} s of {self.limit:.0f} s left, about {needs:.0f} s needed")
            return
        self.say("begins")
        began = time.perf_counter()
        try:
            function(self)
        except Exception:
            lines = traceback.format_exc().splitlines()
            self.put(error=lines[-TRACE_LINES:])
            self.say(f"failed: {lines[-1][:300]}")
        self.put(seconds=round(time.perf_counter() - began, 1))

    def summary(self) -> str:
        """A line per section: what became of it and its seconds."""
        lines = []
        for name, found in self.result["sections"].items():
            state = next((key for key in ("skipped", "error", "rc", "timeout") if key in found), "done")
            lines.append(f"{name:20} {state:8} {found.get('seconds', 0):6.1f} s")
        return "\n".join(lines)

    def save(self) -> None:
        """Writes the JSON; a crash never leaves half a file."""
        self.result["elapsed"] = round(self.elapsed(), 1)
        write_text_whole(self.path, json.dumps(self.result, indent=1) + "\n")


def gpu_state() -> list[str]:
    """The card, its driver, clocks and memory, as nvidia-smi tells them; empty where there is none."""
    fields = "name,driver_version,memory.total,memory.used,clocks.sm,clocks.mem,power.draw,temperature.gpu"
    command = ["nvidia-smi", f"--query-gpu={fields}", "--format=csv"]
    try:
        return subprocess.run(command, capture_output=True, text=True, timeout=20).stdout.splitlines()
    except (OSError, subprocess.TimeoutExpired):
        return []
