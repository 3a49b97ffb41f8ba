"""From the metrics of dispatches to the lines of a log; steps that went wrong are found here."""

import collections
import contextlib
import itertools
import math
import time
from collections.abc import Iterator, Mapping
from typing import Any

from ml_collections import ConfigDict

from conclugen_jax.run import log as log_lib
from conclugen_jax.system import progress
from conclugen_jax.train import loop

USUAL_STEPS = 50
"""A loss stands out against the mean of so many steps before it."""


class BadStep(Exception):
    """A step whose loss or gradient is not finite, or whose loss stands out.

    Attributes:
      dispatch: that holds it.
      record: of the step.
    """

    def __init__(self, dispatch: loop.Dispatch, record: Mapping[str, Any]):
        super().__init__(record["step"])
        self.dispatch, self.record = dispatch, dict(record)


class Recorder:
    """Turns the metrics of dispatches into log lines, one dispatch late, so that the device never waits for the host."""

    def __init__(
        self,
        config: ConfigDict,
        log: log_lib.MetricsLog,
        display: progress.Display,
        info: Mapping[str, Any],
    ):
        """Go on recording.

        Args:
          config: of the run.
          log: takes the lines.
          display: shows the newest.
          info: from :meth:`info`, as of the step that the run goes on from.
        """
        self._config, self._log, self._display = config, log, display
        # name -> sum over the epoch's steps so far, and how many steps had it: clustering is idle in some.
        self._sums, self._steps = dict(info["epoch_sums"]), dict(info["epoch_steps"])
        # Losses of the last steps, against which one may stand out.
        self._usual: collections.deque[float] = collections.deque(info.get("usual_losses", []), maxlen=USUAL_STEPS)
        self._pending: tuple[loop.Dispatch, Any] | None = None
        # (steps, seconds) of the last dispatches; one alone may be seen late, since the host looks when it can.
        self._speed: collections.deque[tuple[int, float]] = collections.deque(maxlen=20)
        self._time = time.monotonic()

    @contextlib.contextmanager
    def paused(self) -> Iterator[None]:
        """Write what is pending, then leave what happens in the context (compilation, a checkpoint) out of the speed."""
        self.flush()
        yield
        self._time = time.monotonic()

    def take(self, dispatch: loop.Dispatch, metrics: Any) -> None:
        """Note the metrics of a dispatch that has been sent off; those of the one before are written."""
        self.flush()
        self._pending = dispatch, metrics

    def flush(self) -> None:
        """Write what is pending.

        Raises:
          BadStep: a loss or gradient that is not finite, or a loss that stands out; the steps before it are logged.
        """
        if self._pending is None:
            return
        (dispatch, metrics), self._pending = self._pending, None
        records = [_without_idle_clustering(r) for r in loop.records(dispatch, metrics)]
        now = time.monotonic()
        self._speed.append((dispatch.num_steps, now - self._time))
        self._time = now
        steps_per_second = sum(steps for steps, _ in self._speed) / sum(seconds for _, seconds in self._speed)
        rate = steps_per_second * self._config.train.batch_size
        good = list(itertools.takewhile(self._is_good, records))
        logged = [r for r in good if r["step"] % self._config.train.log_every_steps == 0]
        self._log.write([{**r, "examples_per_second": round(rate, 1)} for r in logged])
        if len(good) < len(records):
            raise BadStep(dispatch, records[len(good)])
        if dispatch.first_step_in_epoch == 0:
            self._sums, self._steps = {}, {}
        for name, value in ((k, v) for r in records for k, v in r.items() if k.startswith("loss")):
            self._sums[name] = self._sums.get(name, 0.0) + value
            self._steps[name] = self._steps.get(name, 0) + 1
        shown = {k: v for k, v in records[-1].items() if k.startswith("loss")}
        self._display.update(dispatch.end_step, {**shown, "examples/s": rate}, steps_per_second=steps_per_second)

    def _is_good(self, record: Mapping[str, Any]) -> bool:
        if "left_out" in record:
            return True
        if not (math.isfinite(record["loss"]) and math.isfinite(record["gradient_norm"])):
            return False
        limit, usual = self._config.train.max_loss_ratio, self._usual
        if limit and len(usual) == usual.maxlen and record["loss"] > limit * sum(usual) / len(usual):
            return False
        usual.append(record["loss"])
        return True

    def info(self) -> dict[str, Any]:
        """What a checkpoint needs to know besides the state."""
        return {"epoch_sums": dict(self._sums), "epoch_steps": dict(self._steps), "usual_losses": list(self._usual)}

    def means(self) -> dict[str, float]:
        """Mean of the loss and of each term over the steps of the epoch so far that had it."""
        return {name: total / self._steps[name] for name, total in self._sums.items()}

    def mean_loss(self, dispatch: loop.Dispatch) -> float | None:
        """Mean loss of a whole epoch, once the objective has all its terms; else ``None``.

        With a queue that is never emptied the first clustered epoch alone has steps without the term: left out too.
        """
        first = 0
        if self._config.loss.clustering_weight:
            first = self._config.clustering.start_epoch + (self._config.clustering.queue_reset == "never")
        complete = dispatch.ends_epoch and dispatch.epoch >= first
        return self.means()["loss"] if complete else None


def _without_idle_clustering(record: dict[str, Any]) -> dict[str, Any]:
    """Leave out what says nothing while the queue is not full: a largest cluster of no points, nothing was assigned."""
    if record.get("kmeans/largest_cluster") != 0:
        return record
    return {k: v for k, v in record.items() if not k.startswith("kmeans/") and k != "loss/clustering"}


def describe(record: Mapping[str, Any]) -> str:
    """What was wrong with a step, with the values of all terms."""
    terms = [f"{k} {v:.4g}" for k, v in record.items() if k.startswith("loss") or k == "gradient_norm"]
    finite = math.isfinite(record["loss"]) and math.isfinite(record["gradient_norm"])
    what = "the loss stands out" if finite else "the loss or its gradient is not finite"
    return f"step {record['step']}: {what} ({', '.join(terms)})"
