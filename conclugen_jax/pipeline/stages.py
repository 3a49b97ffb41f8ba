"""Show stages of work, one line each: redrawn in place on a terminal, plain lines elsewhere."""

import contextlib
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from datetime import timedelta
from typing import TextIO

from rich.console import Console
from rich.live import Live
from rich.table import Table
from rich.text import Text

WAITING, RUNNING, DONE, FAILED = "·", "▸", "✓", "✗"
STYLES = {WAITING: "dim", RUNNING: "bold", DONE: "green", FAILED: "red"}
PLAIN_SECONDS = 30.0
"""Seconds between two plain lines on one stage."""


class Stage:
    """One line: the stage, its progress, and its outcome."""

    def __init__(self, title: str, changed: Callable[["Stage"], None]):
        self.title, self.text, self.mark = title, "", WAITING
        self.begun = self.seconds = 0.0
        self._changed = changed

    def say(self, text: str) -> None:
        """Replace the text of the line."""
        self.text = text
        self._changed(self)

    def counter(self, unit: str) -> Callable[[int, int | None], None]:
        """Return a function (done, total) that shows how many items are done."""

        def show(done: int, total: int | None) -> None:
            self.say(f"{done:,}" + (f" of {total:,}" if total else "") + f" {unit}")

        return show


class Stages(contextlib.AbstractContextManager):
    """All stages by title; ``with stages("title") as stage`` is one of them."""

    def __init__(self, titles: Sequence[str], file: TextIO | None = None):
        self._stages = {title: Stage(title, self._changed) for title in titles}
        self._console = Console(file=file or sys.stderr, highlight=False)
        self._live = Live(console=self._console, get_renderable=self._drawn, refresh_per_second=4)
        self._said = 0.0

    def __enter__(self) -> "Stages":
        if self._console.is_terminal:
            self._live.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._live.stop()

    @contextlib.contextmanager
    def __call__(self, title: str) -> Iterator[Stage]:
        """Show a stage as running, and as done when the context ends without an error."""
        stage = self._stages[title]
        stage.mark, stage.begun = RUNNING, time.monotonic()
        self._changed(stage, now=True)
        try:
            yield stage
            stage.mark = DONE
        except BaseException:
            stage.mark = FAILED
            raise
        finally:
            stage.seconds = time.monotonic() - stage.begun
            self._changed(stage, now=True)

    def _changed(self, stage: Stage, *, now: bool = False) -> None:
        if self._console.is_terminal or not (now or time.monotonic() - self._said >= PLAIN_SECONDS):
            return
        self._said = time.monotonic()
        number = f"{list(self._stages).index(stage.title) + 1}/{len(self._stages)}"
        took = f" ({_took(stage.seconds)})" if stage.seconds else ""
        text = f": {stage.text}" if stage.text else ""
        line = f"{stage.mark} {number} {stage.title}{text}{took}"
        self._console.print(line, markup=False, soft_wrap=True)

    def _drawn(self) -> Table:
        grid = Table.grid(padding=(0, 1))
        grid.add_column(no_wrap=True)
        grid.add_column(no_wrap=True)
        grid.add_column(no_wrap=True, justify="right")
        grid.add_column(overflow="ellipsis", no_wrap=True)
        for stage in self._stages.values():
            running = time.monotonic() - stage.begun if stage.mark == RUNNING else 0.0
            took = _took(stage.seconds or running) if stage.begun else ""
            cells = stage.mark, stage.title, took, stage.text
            grid.add_row(*(Text(cell, style=STYLES[stage.mark] if i < 2 else "") for i, cell in enumerate(cells)))
        return grid


def _took(seconds: float) -> str:
    return f"{seconds:.1f} s" if seconds < 10 else str(timedelta(seconds=round(seconds)))
