"""What a person sees of a run: a progress bar on a terminal, plain lines anywhere else."""

import collections
import sys
import time
from collections.abc import Mapping
from typing import Any, TextIO

from rich.console import Console, Group
from rich.live import Live
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn
from rich.text import Text

from conclugen_jax.system import processes

PLAIN_SECONDS = 10.0
"""At most one plain line in so many seconds, besides the first and the last."""


def say(line: str) -> None:
    """A line on standard error, outside any display."""
    print(line, file=sys.stderr)


class Display:
    """Shows the newest metrics of a run; use it as a context manager."""

    def __init__(
        self,
        title: str,
        *,
        total_steps: int,
        steps_per_epoch: int,
        first_step: int = 0,
        file: TextIO | None = None,
    ):
        self._console = Console(file=file or sys.stderr, highlight=False, quiet=not processes.is_main())
        self._steps_per_epoch, self._total = steps_per_epoch, total_steps
        self._last_line = float("-inf")
        # (step, second) of the last updates: what lies between dispatches, such as checkpoints, takes time as well.
        self._seen: collections.deque[tuple[int, float]] = collections.deque(maxlen=200)
        self._live = None
        if self._console.is_terminal:
            columns = [TextColumn("{task.description}"), BarColumn(None), MofNCompleteColumn()]
            self._bar = Progress(*columns, TextColumn("{task.fields[when]}"), console=self._console, expand=True)
            self._task = self._bar.add_task(title, total=total_steps, completed=first_step, when="compiling")
            self._numbers = Text(no_wrap=True, overflow="ellipsis")
            self._live = Live(Group(self._bar, self._numbers), console=self._console, refresh_per_second=4)

    def __enter__(self) -> "Display":
        if self._live is not None:
            self._live.start()
        return self

    def __exit__(self, *_: Any) -> None:
        if self._live is not None:
            self._live.stop()

    def say(self, line: str) -> None:
        """A line that stays."""
        self._console.print(line, markup=False, soft_wrap=True)

    def update(self, step: int, numbers: Mapping[str, float], *, steps_per_second: float | None = None) -> None:
        """The newest metrics, after ``step`` steps; with the speed at first, the time that is left."""
        epochs = -(-self._total // self._steps_per_epoch)
        epoch = f"epoch {min(-(-step // self._steps_per_epoch), epochs)}/{epochs}"
        shown = "  ".join(f"{name.removeprefix('loss/')} {_short(value)}" for name, value in numbers.items())
        now = time.monotonic()
        self._seen.append((step, now))
        first, start = self._seen[0]
        if step > first:
            steps_per_second = (step - first) / max(now - start, 1e-9)
        eta = f"  ETA {_clock((self._total - step) / steps_per_second)}" if steps_per_second else ""
        if self._live is not None:
            self._bar.update(self._task, completed=step, when=epoch + eta)
            self._numbers.plain = f"  {shown}"
            return
        if now - self._last_line >= PLAIN_SECONDS or step >= self._total:
            self._last_line = now
            self.say(f"step {step}/{self._total}  {epoch}  {shown}{eta}")


class Counter:
    """What is done, rate and time left of work that may be over in a moment; use it as a context manager.

    The rate is that since the first of it was done: some may have been done before, and the first may wait for compilation.
    """

    def __init__(self, title: str, file: TextIO | None = None, unit: str = "examples"):
        self._console = Console(file=file or sys.stderr, highlight=False, quiet=not processes.is_main())
        self._title, self._unit, self._start = title, unit, time.monotonic()
        self._said, self._bar, self._task = self._start, None, None
        self._first: int | None = None
        self._moved = False

    def __enter__(self) -> "Counter":
        return self

    def __exit__(self, *_: Any) -> None:
        if self._bar is not None:
            self._bar.stop()

    def __call__(self, done: int, total: int | None) -> None:
        """Show that ``done`` of ``total`` (None: unknown how many) are done; nothing in the first second."""
        now = time.monotonic()
        if self._first is None:
            self._first, self._start, self._said = done, now, now
        elif done > self._first and not self._moved:
            self._first, self._start, self._moved = done, now, True
        if now - self._start < 1.0:
            return
        rate = (done - self._first) / (now - self._start)
        if self._console.is_terminal:
            self._show(done, total, rate)
        elif now - self._said >= PLAIN_SECONDS or (done == total and self._said > self._start):
            self._said = now
            shown = ", ".join([f"{done:,}" + (f"/{total:,}" if total else ""), *self._speed(done, total, rate)])
            self._console.print(f"{self._title}: {shown}", markup=False, soft_wrap=True)

    def _speed(self, done: int, total: int | None, rate: float) -> list[str]:
        speed = f"{rate:,.0f}" if rate >= 10 else f"{rate:.2g}"
        left = [f"ETA {_clock((total - done) / rate)}"] if total and rate else []
        return [f"{speed} {self._unit}/s", *left]

    def _show(self, done: int, total: int | None, rate: float) -> None:
        if self._bar is None:
            pieces = [TextColumn("{task.description}"), BarColumn(None), TextColumn("{task.fields[numbers]}")]
            self._bar = Progress(*pieces, console=self._console, expand=True, transient=True)
            self._task = self._bar.add_task(self._title, total=total, numbers="")
            self._bar.start()
        numbers = "  ".join([f"{done:,}" + (f"/{total:,}" if total else ""), *self._speed(done, total, rate)])
        self._bar.update(self._task, completed=done, numbers=numbers)


def _short(value: float) -> str:
    return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.4g}"


def _clock(seconds: float) -> str:
    minutes, seconds = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{seconds:02d}"
