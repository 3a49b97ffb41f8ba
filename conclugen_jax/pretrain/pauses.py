"""What a run does between two dispatches: probes, the caller's own look, checkpoints.

Each piece says whether it is due after a dispatch, and is then called with the dispatch and the state on the devices.
"""

import contextlib
from collections.abc import Callable, Mapping

from conclugen_jax.evaluate import online_probe
from conclugen_jax.method.train_state import TrainState
from conclugen_jax.pretrain.recorder import Recorder
from conclugen_jax.pretrain.setup import Setup
from conclugen_jax.run import checkpoint
from conclugen_jax.run import log as log_lib
from conclugen_jax.system import processes, signals
from conclugen_jax.train import parallel, sharded_update
from conclugen_jax.train.loop import Dispatch

OnEpoch = Callable[[int, Mapping[str, float], TrainState], None]


def ending_at_once(stop: signals.Stop) -> contextlib.AbstractContextManager[None]:
    """See ``Stop.at_once``; one process out of several ends together with the others, after a dispatch."""
    return contextlib.nullcontext() if processes.several() else stop.at_once()


class Probing:
    """Writes what the online probe finds to ``probes.jsonl``."""

    def __init__(self, probe: online_probe.OnlineProbe, log: log_lib.MetricsLog, stop: signals.Stop):
        self._probe, self._log, self._stop = probe, log, stop
        self.is_due = probe.is_due

    def __call__(self, dispatch: Dispatch, state: TrainState) -> None:
        """Probe the state after a dispatch."""
        # A signal that has come by now waits for the checkpoint that follows.
        with contextlib.nullcontext() if self._stop.signal else ending_at_once(self._stop):
            self._log.write([self._probe(state, dispatch.end_step, dispatch.epoch)])


class Reporting:
    """Calls ``on_epoch`` after each epoch."""

    def __init__(self, on_epoch: OnEpoch, recorder: Recorder):
        self._on_epoch, self._recorder = on_epoch, recorder

    def is_due(self, dispatch: Dispatch) -> bool:
        """Whether the dispatch ends an epoch."""
        return dispatch.ends_epoch

    def __call__(self, dispatch: Dispatch, state: TrainState) -> None:
        """Hand over the epoch, its means and the state."""
        self._on_epoch(dispatch.epoch, self._recorder.means(), state)


class Saving:
    """Saves a checkpoint every so many epochs, at the run's end, and when a signal asks any process to stop.

    Attributes:
      stopping: the signal's number; 0 as long as none has come.
    """

    def __init__(
        self,
        run: Setup,
        saved: checkpoint.Checkpoints,
        log: log_lib.MetricsLog,
        recorder: Recorder,
        probe: online_probe.OnlineProbe | None,
        stop: signals.Stop,
    ):
        self._run, self._saved, self._log, self._recorder, self._probe = run, saved, log, recorder, probe
        self._stop, self._largest, self.stopping = stop, parallel.Largest(run.devices), 0

    def is_due(self, dispatch: Dispatch) -> bool:
        """Whether a checkpoint follows; called after every dispatch, since all processes must agree on a signal."""
        config, done = self._run.config, dispatch.epoch + 1
        self.stopping = self._largest(self._stop.signal)
        regular = done % config.checkpoint.every_epochs == 0 or done == config.train.num_epochs
        return bool(self.stopping) or (dispatch.ends_epoch and regular)

    def __call__(self, dispatch: Dispatch, state: TrainState) -> None:
        """Save the state, unless the disk has not taken the log: a checkpoint never knows more than the log."""
        goodness = self._recorder.mean_loss(dispatch)
        if self._run.config.checkpoint.best_by == "probe":
            goodness = self._probe.cost(dispatch)
        # All processes take part in this, whatever the disk of process 0 says below.
        whole = sharded_update.whole(state, self._run.optimizer)
        if self._log.sync():
            self._saved.save(dispatch.end_step, whole, self._recorder.info(), loss=goodness)
