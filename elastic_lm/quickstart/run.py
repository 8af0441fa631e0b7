"""The story, read top-down: load -> exits -> tune -> calibrate -> generate -> compare."""

import contextlib
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import jax
from rich.console import Console

from elastic_lm import render
from elastic_lm.calibrate.thresholds import ConfidenceExit
from elastic_lm.config import DataConfig
from elastic_lm.data.tokenizer import Tokenizer
from elastic_lm.decode.sampler import Sampler
from elastic_lm.embedded import embedded_model
from elastic_lm.loading import load
from elastic_lm.models.decoder import Decoder, Params
from elastic_lm.quickstart import measure, report, text, train
from elastic_lm.quickstart.options import Options


class Steps:
    """Prints what is going on and remembers how long each step took."""

    def __init__(self, console: Console, count: int) -> None:
        self.console, self.count, self.seconds = console, count, dict[str, float]()

    @contextlib.contextmanager
    def step(self, name: str, what: str) -> Iterator[None]:
        """Announces step `name`, runs the block, reports its time."""
        self.console.print(f"[bold]{len(self.seconds) + 1}/{self.count}[/] {what}")
        began = time.monotonic()
        yield
        self.seconds[name] = time.monotonic() - began
        self.console.print(f"    [dim]{self.seconds[name]:.1f} s[/]")
