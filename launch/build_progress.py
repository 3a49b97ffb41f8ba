"""Progress of a build on the screen: a bar on a terminal, a line now and then elsewhere."""

import sys
import time

import rich.console
import rich.progress

EVERY_SECONDS = 10.0


class Progress:
    """Examples done, rate and time left; shows nothing before the first part is written."""

    def __init__(self, file=None):
        self._console = rich.console.Console(file=file or sys.stderr)
        self._start = self._said = time.monotonic()
        self._bar: rich.progress.Progress | None = None
        self._task = None

    def __enter__(self) -> "Progress":
        """Start the clock."""
        return self

    def __exit__(self, *exc) -> None:
        """Leave the bar as it is."""
        if self._bar is not None:
            self._bar.stop()

    def __call__(self, done: int, total: int | None) -> None:
        """Show that ``done`` of ``total`` examples (None: unknown how many) are written."""
        rate = done / max(time.monotonic() - self._start, 1e-9)
        if self._console.is_terminal:
            self._show(done, total, rate)
        elif time.monotonic() - self._said >= EVERY_SECONDS or done == total:
            self._said = time.monotonic()
            left = f"/{total:,}, ETA {_clock((total - done) / rate)}" if total else ""
            print(f"{done:,}{left} examples, {rate:,.0f}/s", file=self._console.file, flush=True)

    def _show(self, done: int, total: int | None, rate: float) -> None:
        if self._bar is None:
            columns = ["{task.description}", rich.progress.BarColumn(), "{task.completed:,.0f}/{task.total:,.0f}"]
            if total is None:
                columns = ["{task.description}", rich.progress.SpinnerColumn(), "{task.completed:,.0f}"]
            columns += ["{task.fields[rate]:,.0f} examples/s", "ETA", rich.progress.TimeRemainingColumn()]
            self._bar = rich.progress.Progress(*columns, console=self._console, transient=True)
            self._task = self._bar.add_task("building", total=total, rate=rate)
            self._bar.start()
        self._bar.update(self._task, completed=done, rate=rate)


def _clock(seconds: float) -> str:
    minutes, seconds = divmod(round(seconds), 60)
    return f"{minutes // 60}:{minutes % 60:02d}:{seconds:02d}"
