"""Steps that went wrong: noted, named, and left out when the run goes on from the checkpoint before them."""

import functools
import itertools
import json
import traceback
from pathlib import Path

import jax
import numpy as np

import conclugen_jax
from conclugen_jax.data.batches import batch_indices
from conclugen_jax.errors import ConclugenError, reason
from conclugen_jax.pretrain import recorder
from conclugen_jax.pretrain.setup import Programs, Setup
from conclugen_jax.run import checkpoint
from conclugen_jax.run import log as log_lib
from conclugen_jax.system import processes, progress
from conclugen_jax.train import sharded_update

PACKAGE = Path(conclugen_jax.__file__).parent


def left_out(run: Setup) -> list[int]:
    """Steps whose update is left out, counted from 1, the same on all processes."""
    own = log_lib.left_out_steps(run.workdir) if processes.is_main() else []
    return json.loads(processes.text_of_main(json.dumps(own)))


def leave_out(run: Setup, bad: recorder.BadStep) -> None:
    """Note a step that went wrong, so that it is left out when the run goes on from the checkpoint before it.

    Raises:
      ConclugenError: more than ``config.train.max_bad_steps`` in a row went wrong.
    """
    before = left_out(run)
    others = next(i for i in itertools.count() if bad.step - 1 - i not in before)
    if others >= run.config.train.max_bad_steps:
        raise ConclugenError(
            f"{bad}{f', and so were the {others} before, which were left out' if others else ''}; lower "
            "config.optimizer.learning_rate or set config.data.standardize=True, in a new workdir: the checkpoints here may "
            "already be on the way to it"
        )
    indices = _rows_of(run, bad.step)
    features = run.stream.rows(indices)["features"].values()
    wrong = indices[~np.all([np.isfinite(x).all(axis=1) for x in features], axis=0)]
    ids = run.stream.names(wrong)[0].tolist() if wrong.size else []
    named = ", ".join(ids[:5]) + (" ..." if len(ids) > 5 else "")
    cause = f"the features of {named} are not finite" if ids else "all features of its batch are finite"
    if processes.is_main():
        progress.say(f"warning: {bad}; {cause}; the step is left out")
        log_lib.leave_out(run.workdir, {"step": bad.step, "reason": str(bad), "ids": ids, "rows": indices.tolist()})


def say_first_nan(run: Setup, programs: Programs, saved: checkpoint.Checkpoints, step: int) -> None:
    """Say which operation of a step was the first whose result is not a number.

    The run is computed again from its newest checkpoint up to the step, and the step one operation at a time.
    """
    state, _ = run.start(saved)
    state = sharded_update.place(state, run.config, run.devices)
    # As if the step were left out: the dispatch before it then ends where it begins.
    for dispatch, inputs in run.batches(run.batches.plan(int(state.step), {*left_out(run), step})):
        if dispatch.end_step >= step:
            break
        state, _ = programs(dispatch, state, inputs)
    state = jax.device_get(sharded_update.whole(state, run.optimizer))
    rows = run.stream.rows(_rows_of(run, step))
    cluster = run.clusters((step - 1) // run.batches.steps_per_epoch)
    one_device = functools.partial(run.step, cluster=cluster, model=run.model.clone(axis_name=None), axis_name=None)
    found = "no operation gave a result that is not a number; some may be infinite"
    try:
        with jax.disable_jit(), jax.debug_nans(True):
            one_device(state, {key: rows[key] for key in ("features", "present")})
    except FloatingPointError as e:
        ours = [f for f in traceback.extract_tb(e.__traceback__) if PACKAGE in Path(f.filename).parents]
        where = f", in {Path(ours[-1].filename).name}, line {ours[-1].lineno}: {ours[-1].line}" if ours else ""
        found = f"{reason(e)}{where}"
    progress.say(f"step {step}: {found}")


def _rows_of(run: Setup, step: int) -> np.ndarray:
    """Indices of the rows of a step, counted from 1."""
    epoch, first = divmod(step - 1, run.batches.steps_per_epoch)
    sizes = {"num_steps": 1, "batch_size": run.config.train.batch_size}
    return batch_indices(run.stream.usable, first_step=first, **sizes, seed=run.config.seed, epoch=epoch)[0]
