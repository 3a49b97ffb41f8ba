"""Pretraining as a whole.

The way down: :func:`pretrain` sends off dispatches, a dispatch repeats ``step.pretrain_step`` over batches, the step takes the
gradient of ``objective.pretrain_loss``, which sums the terms of ``losses.py``.
"""

import contextlib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
from ml_collections import ConfigDict

from conclugen_jax.errors import ConclugenError
from conclugen_jax.evaluate import online_probe
from conclugen_jax.method.train_state import TrainState
from conclugen_jax.pretrain import bad_steps, pauses, setup
from conclugen_jax.pretrain.pauses import OnEpoch
from conclugen_jax.pretrain.programs import Programs
from conclugen_jax.pretrain.recorder import BadStep, Recorder
from conclugen_jax.run import checkpoint
from conclugen_jax.run import log as log_lib
from conclugen_jax.run import workdir as workdir_lib
from conclugen_jax.system import processes, progress, signals
from conclugen_jax.train import feed, memory, parallel, sharded_update


def pretrain(
    config: ConfigDict,
    workdir: str | Path,
    *,
    devices: Sequence[jax.Device] | None = None,
    on_epoch: OnEpoch | None = None,
    moved: bool = False,
    debug_nans: bool = False,
) -> TrainState:
    """Train, or go on training, the run in a workdir until its last epoch.

    Args:
      config: see ``configs/base.py``.
      workdir: takes ``config.json``, ``data.json``, ``metrics.jsonl`` and ``checkpoints/``. Repeating the call with the
        same configuration resumes an interrupted run from exactly where its newest checkpoint stands.
      devices: to train on; ``None``: all, those of other processes too (:func:`conclugen_jax.system.processes.start`).
      on_epoch: called after each epoch, once its records are written and before its checkpoint is, with the epoch
        (from 0), its means of ``loss`` and of each term, and the state on the devices (moments as
        ``sharded_update.place`` has them), valid during the call. What it raises ends the run, closed in order. No epoch
        is left out; a resumed run repeats those since its checkpoint.
      moved: the data set lies elsewhere now than when the run was started; it must be the same by its hashes.
      debug_nans: of a step that goes wrong, say which operation was the first whose result is not a number.

    Returns:
      The final state.

    Raises:
      ConclugenError: an impossible configuration, bad data, a workdir that cannot be used, or a loss that is not finite
        for more than ``train.max_bad_steps`` steps.
      Interrupted: a signal came; what is not saved yet a repeated call computes again.
    """
    devices = list(devices or jax.devices())
    config, manifest, stream = setup.open_data(config, len(devices))
    with (
        workdir_lib.claim(workdir) as folder,
        signals.caught() as stop,
        jax.default_matmul_precision(parallel.MATMUL_PRECISION[config.precision]),
    ):
        workdir_lib.settle(folder, config, manifest, moved=moved)
        with pauses.ending_at_once(stop):
            rows = feed.load_rows(config, stream)
        run = setup.create(config, folder, manifest, stream, rows, devices)
        probe, programs = online_probe.create(config, run.model), Programs(run)
        with _checkpoints(run) as saved:
            while True:
                with pauses.ending_at_once(stop):
                    state, info = run.start(saved)
                try:
                    return _train(run, state, info, programs, saved, probe, on_epoch, stop)
                except BadStep as bad:
                    if debug_nans:
                        bad_steps.say_first_nan(run, programs, saved, bad.record["step"])
                    bad_steps.leave_out(run, bad)


def _train(
    run: setup.Setup,
    state: TrainState,
    info: Mapping[str, Any],
    programs: Programs,
    saved: checkpoint.Checkpoints,
    probe: online_probe.OnlineProbe | None,
    on_epoch: OnEpoch | None,
    stop: signals.Stop,
) -> TrainState:
    """Train from a state to the last epoch.

    Raises:
      BadStep: a step went wrong; no state from after it was saved.
    """
    config, first_step = run.config, int(state.step)
    mirrors = {"tensorboard": config.train.tensorboard, "tracker": config.train.tracker}
    shown = {"total_steps": run.total_steps, "steps_per_epoch": run.batches.steps_per_epoch, "first_step": first_step}
    with (
        log_lib.MetricsLog(run.workdir, first_step, **mirrors) as log,
        log_lib.MetricsLog(run.workdir, first_step, name=log_lib.PROBES) as probes,
        progress.Display(run.title, **shown) as display,
        memory.explained(run.memory(state), config),
    ):
        _announce(run, display, first_step)
        recorder = Recorder(config, log, display, info)
        saving = pauses.Saving(run, saved, log, recorder, probe, stop)
        pieces = [pauses.Probing(probe, probes, stop)] if probe is not None else []
        pieces += [pauses.Reporting(on_epoch, recorder)] if on_epoch is not None else []
        state = sharded_update.place(state, config, run.devices)
        for dispatch, inputs in run.batches(run.batches.plan(first_step, bad_steps.left_out(run))):
            if programs.lacks(dispatch):
                with recorder.paused(), pauses.ending_at_once(stop):
                    programs.compile(dispatch, state, inputs, display)
            state, metrics = programs(dispatch, state, inputs)
            recorder.take(dispatch, metrics)
            for piece in (*pieces, saving):
                if piece.is_due(dispatch):
                    with recorder.paused():
                        piece(dispatch, state)
            if saving.stopping:
                _say_stopped(saved, display)
                raise signals.Interrupted(saving.stopping)
        recorder.flush()
        saved.wait()
        if processes.is_main() and run.total_steps not in saved.steps():
            raise ConclugenError(f"{run.workdir}: the last checkpoint was not saved; free space and repeat the command")
        display.say(f"done: {run.total_steps} steps; checkpoints in {run.workdir / checkpoint.FOLDER}")
        return sharded_update.whole(state, run.optimizer)


@contextlib.contextmanager
def _checkpoints(run: setup.Setup):
    """The checkpoints of a run, on a disk that has room for them."""
    section = run.config.checkpoint
    with checkpoint.Checkpoints(
        run.workdir,
        keep_newest=section.keep_newest,
        keep_best=section.keep_best,
        max_failures=section.max_failures,
    ) as saved:
        if processes.is_main():
            count = section.keep_newest + section.keep_best + 1  # the one being written
            checkpoint.check_space(run.workdir, jax.eval_shape(run.fresh_state), count=count)
        yield saved


def _announce(run: setup.Setup, display: progress.Display, first_step: int) -> None:
    """Say what is trained, on what, and from where."""
    rows, devices, storage = run.batches.rows, run.devices, run.config.data.storage_dtype
    count = len({device.process_index for device in devices})
    beginning = f"resuming after step {first_step}" if first_step else "from random weights"
    display.say(
        f"{run.title}: {len(rows.usable)} examples, {run.batches.steps_per_epoch} steps per epoch, {len(devices)} "
        f"{devices[0].platform} device(s){f' of {count} processes' if count > 1 else ''}, {rows.tier} table, "
        + ("finished already" if first_step == run.total_steps else beginning)
    )
    if storage != "float32":
        display.say(f"{run.title}: rows are rounded to {storage}, targets of the reconstruction too")


def _say_stopped(saved: checkpoint.Checkpoints, display: progress.Display) -> None:
    saved.wait()
    display.say(f"stopped after step {max(saved.steps(), default=0)}; repeat the command to resume")
