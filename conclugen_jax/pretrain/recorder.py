"""Turn the metrics of dispatches into lines of a log; find, report and skip bad steps."""

import collections
import contextlib
import itertools
import math
import time
from collections.abc import Callable, Iterator, Mapping
from typing import Any, NamedTuple

import numpy as np
from ml_collections import ConfigDict

from conclugen_jax.evaluate.levels import Level
from conclugen_jax.pretrain import setup
from conclugen_jax.runs import log as log_lib
from conclugen_jax.system import processes, progress
from conclugen_jax.train import feed

USUAL_STEPS = 50  # number of previous steps whose mean loss a step is compared with


class BadStep(Exception):
    """A step whose loss or gradient is not finite, or whose loss stands out; the text has the values of all terms."""

    def __init__(self, record: Mapping[str, Any]):
        terms = [f"{k} {v:.4g}" for k, v in record.items() if k.startswith("loss") or k == "gradient_norm"]
        what = "the loss stands out" if _is_finite(record) else "the loss or its gradient is not finite"
        super().__init__(f"step {record['step']}: {what} ({', '.join(terms)})")
        self.step = record["step"]


class Last(NamedTuple):
    """The step at which the run ends, and a sentence with the reason."""

    step: int
    sentence: str


class Recorder:
    """Turns the metrics of dispatches into log lines, one dispatch late, so that the device never waits for the host."""

    def __init__(
        self,
        config: ConfigDict,
        log: log_lib.MetricsLog,
        display: progress.Display | None,
        info: Mapping[str, Any],
        levels: Mapping[str, Level] | None = None,
    ):
        """Continue recording; ``info`` is from :meth:`info`, as of the step that the run resumes from.

        ``levels``: of terms of the loss, whose chance is shown beside them.
        """
        self._config, self._log, self._display = config, log, display
        # name -> sum over the epoch's steps so far, and number of steps that had it: clustering is idle in some.
        self._sums, self._steps = (collections.Counter(info[name]) for name in ("epoch_sums", "epoch_steps"))
        # Losses of the last steps, against which one may stand out.
        self._usual: collections.deque[float] = collections.deque(info.get("usual_losses", []), maxlen=USUAL_STEPS)
        self._pending: tuple[feed.Dispatch, Any] | None = None
        # (steps, seconds) of the last dispatches; one alone may be seen late, since the host looks when it can.
        self._speed: collections.deque[tuple[int, float]] = collections.deque(maxlen=20)
        self._time = time.monotonic()
        self._levels = dict(levels or {})
        self._health: dict[str, float] = {}  # the newest figures

    @contextlib.contextmanager
    def paused(self) -> Iterator[None]:
        """Write pending lines, and exclude the time of the context (compilation, a checkpoint) from the speed."""
        self.flush()
        yield
        self._time = time.monotonic()

    def take(self, dispatch: feed.Dispatch, metrics: Any) -> None:
        """Store the metrics of a new dispatch, and write those of the previous one."""
        self.flush()
        self._pending = dispatch, metrics

    def measure(self, figures: Callable[[], Mapping[str, float]]) -> dict[str, float]:
        """Write what is pending, with figures of health beside the losses of its last step; leave them out of the speed.

        Returns the figures, with ``loss/TERM``, means over the epoch so far; empty without figures.
        """
        found: dict[str, float] = {}

        def measured() -> Mapping[str, float]:
            found.update(figures())
            return found

        self.flush(measured)
        self._time = time.monotonic()
        return found and {**found, **self.means()}

    def flush(self, figures: Callable[[], Mapping[str, float]] = dict) -> None:
        """Write pending lines; raise :class:`BadStep` after logging the steps before it."""
        if self._pending is None:
            return
        (dispatch, metrics), self._pending = self._pending, None
        records = [_without_idle_clustering(r) for r in feed.records(dispatch, metrics)]
        now = time.monotonic()
        self._speed.append((dispatch.num_steps, now - self._time))
        self._time = now
        steps_per_second = sum(steps for steps, _ in self._speed) / sum(seconds for _, seconds in self._speed)
        rate = steps_per_second * self._config.train.batch_size
        good = list(itertools.takewhile(self._is_good, records))
        found = figures() if len(good) == len(records) else {}
        every, last = self._config.train.log_every_steps, len(good) - 1
        records[-1] |= found
        logged = [r for i, r in enumerate(good) if r["step"] % every == 0 or (found and i == last)]
        self._log.write([{**r, "examples_per_second": round(rate, 1)} for r in logged])
        if len(good) < len(records):
            raise BadStep(records[len(good)])
        self._health = dict(found or self._health)
        if dispatch.first_step_in_epoch == 0:
            self._sums, self._steps = collections.Counter(), collections.Counter()
        losses = [{k: v for k, v in r.items() if k.startswith("loss")} for r in records]
        for loss in losses:
            self._sums.update(loss)
            self._steps.update(loss.keys())
        if self._display is not None:
            shown = {**self._beside_chance(losses[-1]), "examples/s": rate, **self._shown_health()}
            self._display.update(dispatch.end_step, shown, steps_per_second=steps_per_second)

    def _beside_chance(self, losses: Mapping[str, float]) -> dict[str, float | str]:
        chance = {f"loss/{term}": level.chance for term, level in self._levels.items()}
        return {k: f"{x:.4g} (chance {chance[k]:.4g})" if k in chance else x for k, x in losses.items()}

    def _shown_health(self) -> dict[str, float | str]:
        shown, health = {}, self._health
        if rank := health.get("health/effective_rank"):
            shown["rank"] = f"{rank:.3g}"
        if chance := health.get("health/recall_at_1_chance"):
            shown["recall@1"] = f"{health['health/recall_at_1']:.2g} (chance {chance:.2g})"
        return shown

    def _is_good(self, record: Mapping[str, Any]) -> bool:
        if "left_out" in record:
            return True
        if not _is_finite(record):
            return False
        limit, usual = self._config.train.max_loss_ratio, self._usual
        if limit and len(usual) == usual.maxlen and record["loss"] > limit * sum(usual) / len(usual):
            return False
        usual.append(record["loss"])
        return True

    def info(self) -> dict[str, Any]:
        """Return the facts that a checkpoint stores besides the state."""
        return {"epoch_sums": dict(self._sums), "epoch_steps": dict(self._steps), "usual_losses": list(self._usual)}

    def means(self) -> dict[str, float]:
        """Mean of the loss and of each term over the steps of the epoch so far that had it."""
        return {name: total / self._steps[name] for name, total in self._sums.items()}

    def mean_loss(self, dispatch: feed.Dispatch) -> float | None:
        """Mean loss of a whole epoch, once the objective has all its terms; else ``None``."""
        first = 0
        if self._config.loss.clustering_weight:  # a queue that is never emptied is not full in its first epoch alone
            first = self._config.clustering.start_epoch + (self._config.clustering.queue_reset == "never")
        complete = dispatch.ends_epoch and dispatch.epoch >= first
        return self.means()["loss"] if complete else None


def _without_idle_clustering(record: dict[str, Any]) -> dict[str, Any]:
    """Drop cluster metrics while the queue is not full, since nothing is assigned yet."""
    if record.get("kmeans/largest_cluster") != 0:
        return record
    return {k: v for k, v in record.items() if not k.startswith("kmeans/") and k != "loss/clustering"}


def _is_finite(record: Mapping[str, Any]) -> bool:
    return math.isfinite(record["loss"]) and math.isfinite(record["gradient_norm"])


def left_out(run: setup.Setup) -> list[int]:
    """Return the steps whose update is skipped, counted from 1, the same on all processes."""
    return processes.json_of_main(log_lib.left_out_steps(run.workdir) if processes.is_main() else [])


def leave_out(run: setup.Setup, bad: BadStep) -> Last | None:
    """Record a bad step, so that the run continues without it.

    Where as many as ``max_bad_steps`` before it in a row were skipped, it is not noted but returned: the run ends with it.
    """
    before = left_out(run)
    others = next(i for i in itertools.count() if bad.step - 1 - i not in before)
    if others >= run.config.train.max_bad_steps:
        return Last(
            bad.step,
            f"{bad}{f', and so were the {others} before, which were skipped' if others else ''}; lower "
            "config.optimizer.learning_rate or set config.data.standardize=split, in a new workdir: the checkpoints here may "
            "already be on the way to it",
        )
    indices = run.batches.indices(bad.step)
    features = run.stream.rows(indices)["features"].values()
    wrong = indices[~np.all([np.isfinite(x).all(axis=1) for x in features], axis=0)]
    ids = run.stream.names(wrong)[0].tolist() if wrong.size else []
    named = ", ".join(ids[:5]) + (" ..." if len(ids) > 5 else "")
    cause = f"the features of {named} are not finite" if ids else "all features of its batch are finite"
    if processes.is_main():
        progress.say(f"warning: {bad}; {cause}; the step is skipped")
        log_lib.leave_out(run.workdir, {"step": bad.step, "reason": str(bad), "ids": ids, "rows": indices.tolist()})
    return None
