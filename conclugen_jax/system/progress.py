"""Progress of a run: a bar on a terminal, plain lines elsewhere."""

import collections
import contextlib
import contextvars
import sys
import time
from collections.abc import Iterator, Mapping
from datetime import timedelta
from typing import Any, TextIO

from rich.console import Console, Group
from rich.live import Live
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn
from rich.text import Text

from conclugen_jax.system import processes

PLAIN_SECONDS = 10.0
"""Seconds between two plain lines, apart from the first and the last."""

_hidden = contextvars.ContextVar("hidden", default=False)


@contextlib.contextmanager
def hidden(yes: bool = True) -> Iterator[None]:
    """Show nothing of this thread while the context lasts."""
    before = _hidden.set(yes)
    try:
        yield
    finally:
        _hidden.reset(before)


def _console(file: TextIO | None) -> Console:
    quiet = _hidden.get() or not processes.is_main()
    return Console(file=file or sys.stderr, highlight=False, quiet=quiet)


def say(line: str) -> None:
    """Print a line on standard error, outside of any display; of several processes the main one does."""
    if not _hidden.get() and processes.is_main():
        print(line, file=sys.stderr)


class Display:
    """Show the newest metrics of a run; use it as a context manager."""

    def __init__(
        self, title: str, *, total_steps: int, steps_per_epoch: int, first_step: int = 0, file: TextIO | None = None
    ):
        self._console = _console(file)
        self._steps_per_epoch, self._total = steps_per_epoch, total_steps
        self._last_line = float("-inf")
        # (step, second) of the last updates: the time of checkpoints, between dispatches, counts too.
        self._seen: collections.deque[tuple[int, float]] = collections.deque(maxlen=200)
        columns = BarColumn(None), MofNCompleteColumn(), TextColumn("{task.fields[when]}")
        self._bar = Progress("{task.description}", *columns, console=self._console, expand=True)
        self._task = self._bar.add_task(title, total=total_steps, completed=first_step, when="compiling")
        self._numbers = Text()
        self._live = Live(Group(self._bar, self._numbers), console=self._console, refresh_per_second=4)

    def __enter__(self) -> "Display":
        if self._console.is_terminal:
            self._live.start()
        return self

    def __exit__(self, *_: Any) -> None:
        self._live.stop()

    def say(self, line: str) -> None:
        """Print a line that stays."""
        self._console.print(line, markup=False, soft_wrap=True)

    def update(self, step: int, numbers: Mapping[str, float | str], *, steps_per_second: float | None = None) -> None:
        """Show the metrics after ``step`` steps; ``steps_per_second`` estimates the time left until two updates are known."""
        epochs = -(-self._total // self._steps_per_epoch)
        epoch = f"epoch {min(-(-step // self._steps_per_epoch), epochs)}/{epochs}"
        shown = "  ".join(f"{name.removeprefix('loss/')} {_short(value)}" for name, value in numbers.items())
        now = time.monotonic()
        self._seen.append((step, now))
        first, start = self._seen[0]
        if step > first:
            steps_per_second = (step - first) / max(now - start, 1e-9)
        eta = f"  ETA {timedelta(seconds=round((self._total - step) / steps_per_second))}" if steps_per_second else ""
        if self._console.is_terminal:
            self._bar.update(self._task, completed=step, when=epoch + eta)
            self._numbers.plain = f"  {shown}"
        elif now - self._last_line >= PLAIN_SECONDS or step >= self._total:
            self._last_line = now
            self.say(f"step {step}/{self._total}  {epoch}  {shown}{eta}")


class Counter(contextlib.AbstractContextManager):
    """Show how much work is done, its rate and the time left; nothing in the first second. Use it as a context manager.

    The rate counts from the first item that was done here: some may have been done before, and the first may wait for
    compilation.
    """

    def __init__(self, title: str, file: TextIO | None = None, unit: str = "examples"):
        self._console = _console(file)
        columns = "{task.description}", BarColumn(None), "{task.fields[numbers]}"
        self._bar = Progress(*columns, console=self._console, expand=True, transient=True)
        self._task = self._bar.add_task(title, total=None, numbers="")
        self._title, self._unit = title, unit
        self._moves, self._first, self._start, self._said = 0, 0, 0.0, 0.0

    def __exit__(self, *_: Any) -> None:
        self._bar.live.stop()

    def __call__(self, done: int, total: int | None) -> None:
        """Show that ``done`` of ``total`` items are done; ``None``: it is unknown how many there are."""
        now = time.monotonic()
        self._said = self._said or now
        if self._moves == 0 or (self._moves == 1 and done > self._first):
            self._first, self._start, self._moves = done, now, self._moves + 1
        if now - self._start < 1.0:
            return
        rate = (done - self._first) / (now - self._start)
        numbers = f"{done:,}" + (f"/{total:,}" if total else "")
        numbers += f", {rate:,.0f} {self._unit}/s" if rate >= 10 else f", {rate:.2g} {self._unit}/s"
        if total and rate:
            numbers += f", ETA {timedelta(seconds=round((total - done) / rate))}"
        if self._console.is_terminal:
            self._bar.start()
            self._bar.update(self._task, completed=done, total=total, numbers=numbers)
        elif now - self._said >= PLAIN_SECONDS or (done == total and self._said > self._start):
            self._said = now
            self._console.print(f"{self._title}: {numbers}", markup=False, soft_wrap=True)


def _short(value: float | str) -> str:
    if isinstance(value, str):
        return value
    return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.4g}"
