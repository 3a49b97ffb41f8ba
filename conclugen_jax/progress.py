"""What a person sees of a run: a progress bar on a terminal, plain lines anywhere else."""

import sys
import time
from collections.abc import Mapping
from typing import Any, TextIO

from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)

PLAIN_SECONDS = 10.0
"""At most one plain line in so many seconds, besides the first and the last."""


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
        self._console = Console(file=file or sys.stderr, highlight=False)
        self._steps_per_epoch, self._total = steps_per_epoch, total_steps
        self._measured_from: tuple[float, int] | None = None  # time and step of the first update: compilation is over
        self._last_line = float("-inf")
        self._bar = None
        if self._console.is_terminal:
            self._bar = Progress(
                TextColumn("[bold]{task.description}"),
                BarColumn(),
                MofNCompleteColumn(),
                TextColumn("{task.fields[numbers]}"),
                TimeElapsedColumn(),
                TextColumn("ETA"),
                TimeRemainingColumn(),
                console=self._console,
            )
            self._task = self._bar.add_task(title, total=total_steps, completed=first_step, numbers="")

    def __enter__(self) -> "Display":
        if self._bar is not None:
            self._bar.start()
        return self

    def __exit__(self, *_: Any) -> None:
        if self._bar is not None:
            self._bar.stop()

    def say(self, line: str) -> None:
        """A line that stays."""
        self._console.print(line, markup=False, soft_wrap=True)

    def update(self, step: int, numbers: Mapping[str, float]) -> None:
        """The newest metrics, after ``step`` steps."""
        epochs = -(-self._total // self._steps_per_epoch)
        shown = [f"epoch {min(-(-step // self._steps_per_epoch), epochs)}/{epochs}"]
        shown += [f"{name.removeprefix('loss/')} {_short(value)}" for name, value in numbers.items()]
        if self._bar is not None:
            self._bar.update(self._task, completed=step, numbers="  ".join(shown))
            return
        now = time.monotonic()
        if self._measured_from is None:
            self._measured_from = now, step
        if now - self._last_line >= PLAIN_SECONDS or step >= self._total:
            self._last_line = now
            since, first = self._measured_from
            left = [f"ETA {_clock((now - since) * (self._total - step) / (step - first))}"] if step > first else []
            self.say("  ".join([f"step {step}/{self._total}", *shown, *left]))


def _short(value: float) -> str:
    return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.4g}"


def _clock(seconds: float) -> str:
    minutes, seconds = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{seconds:02d}"
