"""Pretraining as a whole.

The way down: :func:`pretrain` sends off dispatches, a dispatch repeats ``setup.pretrain_step`` over batches, the step takes the
gradient of ``objective.pretrain_loss``, which sums the terms of ``losses.py``.
"""

import contextlib
import functools
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import jax
from ml_collections import ConfigDict

from conclugen_jax.errors import ConclugenError
from conclugen_jax.evaluate import health, levels
from conclugen_jax.method.train_state import TrainState
from conclugen_jax.pretrain import recorder as recorder_lib, replay, setup
from conclugen_jax.pretrain.recorder import Recorder
from conclugen_jax.runs import checkpoint, log as log_lib, workdir as workdir_lib
from conclugen_jax.system import processes, progress, signals
from conclugen_jax.train import feed, memory, parallel

OnEpoch = Callable[[int, Mapping[str, float], TrainState], None]


def pretrain(
    config: ConfigDict,
    workdir: str | Path,
    *,
    devices: Sequence[jax.Device] | None = None,
    on_epoch: OnEpoch | None = None,
    moved: bool = False,
    debug_nans: bool = False,
) -> TrainState:
    """Train, or resume, the run in a workdir until its last epoch; return its final state.

    Args:
      config: see ``configs/base.py``.
      workdir: takes ``config.json``, ``data.json``, ``metrics.jsonl`` and ``checkpoints/``. Repeating the call with the
        same configuration resumes an interrupted run from exactly where its newest checkpoint stands.
      devices: to train on; ``None``: all, those of other processes too (:func:`conclugen_jax.system.processes.start`).
      on_epoch: called after each epoch, once its records are written and before its checkpoint is, with the epoch
        (from 0), its means of ``loss`` and of each term, and the state on the devices (moments as
        ``parallel.place`` has them), valid during the call. What it raises ends the run, closed in order. No epoch
        is skipped; a resumed run repeats those since its checkpoint.
      moved: accept that the data set has moved since the run was started; it must be the same by its hashes.
      debug_nans: of a step that goes wrong, say which operation was the first whose result is not a number.

    Raises:
      ConclugenError: an impossible configuration, bad data, a workdir that cannot be used, or a loss that is not finite
        for more than ``train.max_bad_steps`` steps.
      Interrupted: a signal came; what is not saved yet a repeated call computes again.
    """
    devices = list(devices or jax.devices())
    config, stream = setup.open_data(config, len(devices))
    with (
        workdir_lib.claim(workdir) as folder,
        signals.caught() as stop,
        jax.default_matmul_precision(parallel.MATMUL_PRECISION[config.precision]),
    ):
        settle = functools.partial(workdir_lib.settle, folder, config, stream.dataset.manifest, moved=moved)
        settle(only_compare=True)
        with _ending_at_once(stop):
            persons = setup.standardise(config, folder, stream)
            rows = feed.load_rows(config, stream)
        run = setup.create(config, folder, stream, rows, devices, persons)
        keep = {name: config.checkpoint[name] for name in ("keep_newest", "keep_best", "max_failures")}
        with checkpoint.Checkpoints(folder, **keep) as saved:
            saved.check_space(jax.eval_shape(run.fresh_state))
            settle()  # not before: a run that is refused leaves no configuration behind
            last = None
            while True:
                try:
                    return _train(run, saved, on_epoch, stop, last, debug_nans)
                except recorder_lib.BadStep as bad:
                    last = recorder_lib.leave_out(run, bad)


def _train(
    run: setup.Setup,
    saved: checkpoint.Checkpoints,
    on_epoch: OnEpoch | None,
    stop: signals.Stop,
    last: recorder_lib.Last | None,
    debug_nans: bool,
) -> TrainState:
    """Train to the last epoch; ``BadStep`` ends it, before a state from after the step is saved."""
    with _ending_at_once(stop):
        state, info = run.start(saved)
    config, first_step = run.config, int(state.step)
    mirrors = {"tensorboard": config.train.tensorboard, "tracker": config.train.tracker}
    shown = {"total_steps": run.total_steps, "steps_per_epoch": run.batches.steps_per_epoch, "first_step": first_step}
    with (
        log_lib.MetricsLog(run.workdir, first_step, **mirrors) as log,
        log_lib.MetricsLog(run.workdir, first_step, name=log_lib.PROBES) as probes,
        progress.Display(run.title, **shown) as display,
        memory.explained(functools.partial(memory.too_large, run.memory(state), config)),
    ):
        _announce(run, display, first_step)
        recorder = Recorder(config, log, display, info, run.health.levels if run.health else None)
        signal_of_any, warn = parallel.Largest(run.devices), _Warnings(run, display)
        state = parallel.place(state, config, run.devices)
        noted, ending = recorder_lib.left_out(run), [last.step] if last else []
        kept = {*noted[-replay.KEPT :], *ending}  # the files of older ones have been deleted
        for dispatch, inputs in run.batches(run.batches.plan(first_step, {*noted, *ending})):
            if dispatch.end_step in kept:
                with recorder.paused():
                    _leave_out(run, state, dispatch.end_step, last, debug_nans)
            if run.lacks_program(dispatch):
                with recorder.paused(), _ending_at_once(stop):
                    run.compile(dispatch, state, inputs, display)
            state, metrics = run.train(dispatch, state, inputs)
            recorder.take(dispatch, metrics)
            if run.measures_after(dispatch):
                with _ending_at_once(stop, saves_next=True):
                    warn(dispatch, recorder.measure(functools.partial(run.measure, state)))
            if run.probe is not None and run.probe.is_due(dispatch):
                with recorder.paused(), _ending_at_once(stop, saves_next=True):
                    probes.write([run.probe(state, dispatch.end_step, dispatch.epoch)])
            if on_epoch is not None and dispatch.ends_epoch:
                with recorder.paused():
                    on_epoch(dispatch.epoch, recorder.means(), state)
            if run.refreshes_after(dispatch):
                with recorder.paused(), _ending_at_once(stop, saves_next=True):
                    state = run.refresh(state)
            stopping = signal_of_any(stop.signal)  # after every dispatch: all processes must agree on a signal
            if stopping or run.saves_after(dispatch):
                by_probe = config.checkpoint.best_by == "probe"
                with recorder.paused():
                    cost = run.probe.cost(dispatch) if by_probe else recorder.mean_loss(dispatch)
                    whole = parallel.whole(state, run.optimizer)  # with all processes, whatever the log says
                    if log.sync():  # a checkpoint never knows more than the log
                        saved.save(dispatch.end_step, whole, recorder.info(), loss=cost)
            if stopping:
                saved.wait()
                display.say(f"stopped after step {max(saved.steps(), default=0)}; repeat the command to resume")
                raise signals.Interrupted(stopping)
        recorder.flush()
        saved.wait()
        if processes.is_main() and run.total_steps not in saved.steps():
            raise ConclugenError(f"{run.workdir}: the last checkpoint was not saved; free space and repeat the command")
        display.say(f"done: {run.total_steps} steps; checkpoints in {run.workdir / checkpoint.FOLDER}")
        return parallel.whole(state, run.optimizer)


def _leave_out(
    run: setup.Setup, state: TrainState, step: int, last: recorder_lib.Last | None, debug_nans: bool
) -> None:
    """Keep what a skipped step takes; optionally say what is wrong with it; end the run with the last one."""
    path = replay.keep(run, state, step)
    if debug_nans and path.exists() and processes.is_main():
        for line in replay.lines(replay.replay(path)):
            progress.say(line)
    if last and last.step == step:
        again = f"; conclugen replay {path} computes the step again" if path.exists() else ""
        raise ConclugenError(f"{last.sentence}{again}")


class _Warnings:
    """Says what is wrong by the figures of health, each kind of it once."""

    def __init__(self, run: setup.Setup, display: progress.Display):
        self._run, self._display, self._said = run, display, set()

    def __call__(self, dispatch: feed.Dispatch, figures: Mapping[str, float]) -> None:
        """Take the figures of a dispatch, after which its records are in the log; none of processes that measure nothing."""
        if not figures:
            return
        done = {"schedule/done": dispatch.end_step / self._run.total_steps}
        if dispatch.end_step == self._run.total_steps:
            done = levels.of_records(log_lib.records(self._run.workdir / log_lib.METRICS), self._run.config)
        for sentence in health.warnings({**figures, **done}):
            if (kind := sentence.partition("(")[0]) not in self._said:
                self._said.add(kind)
                self._display.say(f"warning: {sentence}")


def _ending_at_once(stop: signals.Stop, *, saves_next: bool = False) -> contextlib.AbstractContextManager[None]:
    """See ``Stop.at_once``; one process out of several ends together with the others, after a dispatch.

    ``saves_next``: a signal that has come by now waits for the checkpoint that follows.
    """
    waits = processes.several() or (saves_next and stop.signal)
    return contextlib.nullcontext() if waits else stop.at_once()


def _announce(run: setup.Setup, display: progress.Display, first_step: int) -> None:
    """Say what is trained, on what, and from where."""
    rows, devices, storage = run.batches.rows, run.devices, run.config.data.storage_dtype
    count = len({device.process_index for device in devices})
    beginning = f"resuming after step {first_step}" if first_step else "from random weights"
    beginning = "finished already" if first_step == run.total_steps else beginning
    display.say(
        f"{run.title}: {len(rows.usable)} examples, {run.batches.steps_per_epoch} steps per epoch, {len(devices)} "
        f"{devices[0].platform} device(s){f' of {count} processes' if count > 1 else ''}, {rows.tier} table, {beginning}"
    )
    if storage != "float32":
        display.say(f"{run.title}: rows are rounded to {storage}, targets of the reconstruction too")
