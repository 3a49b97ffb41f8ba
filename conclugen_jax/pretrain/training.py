"""Pretraining: step -> dispatch -> run.

The way down: :func:`pretrain` runs dispatches, a dispatch scans :func:`pretrain_step` over batches, the step takes
the gradient of ``objective.pretrain_loss``, which sums the terms of ``losses.py``.
"""

import collections
import contextlib
import functools
import itertools
import json
import time
import traceback
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from ml_collections import ConfigDict

from conclugen_jax.data import batches as batches_lib
from conclugen_jax.data import shards
from conclugen_jax.data.manifest import Manifest
from conclugen_jax.errors import ConclugenError
from conclugen_jax.evaluate import online_probe
from conclugen_jax.method import model as model_lib
from conclugen_jax.method import objective, train_state, views
from conclugen_jax.method.train_state import Metrics, TrainState
from conclugen_jax.pretrain import recorder as recorder_lib
from conclugen_jax.run import checkpoint
from conclugen_jax.run import config as config_lib
from conclugen_jax.run import workdir as workdir_lib
from conclugen_jax.system import processes, progress, signals
from conclugen_jax.train import feed, loop, memory, parallel, sharded_update
from conclugen_jax.train import optimizer as optimizer_lib


def pretrain_step(
    state: TrainState,
    batch: Mapping[str, Mapping[str, jax.Array]],
    *,
    model: model_lib.ConCluGen,
    optimizer: optax.GradientTransformation,
    schedule: Callable[[jax.Array], jax.Array],
    config: ConfigDict,
    steps_per_epoch: int,
    cluster: bool,
    statistics: views.Statistics | None = None,
    axis_name: str | None = None,
) -> tuple[TrainState, Metrics]:
    """One optimizer step; the metrics are those of the state before it."""
    key = jax.random.fold_in(state.rng, state.step)
    loss_fn = functools.partial(
        objective.pretrain_loss,
        model=model,
        config=config,
        steps_per_epoch=steps_per_epoch,
        cluster=cluster,
        statistics=statistics,
        axis_name=axis_name,
    )
    (_, (metrics, batch_stats, clustered)), grads = jax.value_and_grad(loss_fn, has_aux=True)(
        state.params, state, batch, key
    )
    params, opt_state, metrics["gradient_norm"] = sharded_update.apply(
        optimizer,
        grads,
        state.opt_state,
        state.params,
        split=config.optimizer.shard,
        axis_name=axis_name,
        active=clustered.active if clustered is not None else False,
    )
    metrics["learning_rate"] = schedule(state.step)
    new_state = state.replace(
        step=state.step + 1,
        params=params,
        batch_stats=batch_stats,
        opt_state=opt_state,
    )
    if clustered is not None:
        sizes = jnp.bincount(clustered.kmeans.assignments, length=config.clustering.num_clusters)
        metrics["kmeans/iterations"] = jnp.where(clustered.active, clustered.kmeans.iterations, 0)
        metrics["kmeans/largest_cluster"] = jnp.where(clustered.active, sizes.max() / sizes.sum(), 0)
        metrics["kmeans/empty_clusters"] = (sizes == 0).sum()
        new_state = new_state.replace(
            queue=clustered.queue,
            queue_batches=clustered.queue_batches,
            centroids=jnp.where(clustered.active, clustered.kmeans.centroids, state.centroids),
        )
    return new_state, metrics


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
    config_lib.check(config)
    dataset = shards.open_dataset(config.data.path, verify=config.data.verify)
    config = config_lib.with_modalities(config, dataset.manifest.modalities)
    all_variants = config.data.variants == "random"
    stream = shards.ShardStream(dataset, config.data.train_split, config.data.modalities, all_variants=all_variants)
    config_lib.check_objective(config)
    config_lib.check_batches(config, num_examples=len(stream.usable), num_devices=len(devices))
    steps_per_epoch = len(stream.usable) // config.train.batch_size
    config_lib.check_clustering(config, steps_per_epoch=steps_per_epoch)
    if processes.several():
        _check_alike(config, dataset.manifest)
    with (
        workdir_lib.claim(workdir) as folder,
        signals.caught() as stop,
        jax.default_matmul_precision(parallel.MATMUL_PRECISION[config.precision]),
    ):
        workdir_lib.settle(folder, config, dataset.manifest, moved=moved)
        with _ending_at_once(stop):
            rows = loop.load_rows(config, stream)
        return _until_done(_create(config, folder, rows, stream, dataset.manifest, devices, stop, on_epoch), debug_nans)


class _Run(NamedTuple):
    """Everything that does not change during a run."""

    config: ConfigDict
    workdir: Path
    manifest: Manifest
    stream: shards.ShardStream
    batches: feed.Feed
    model: model_lib.ConCluGen
    optimizer: optax.GradientTransformationExtraArgs
    step: Callable
    probe: online_probe.OnlineProbe | None
    devices: Sequence[jax.Device]
    stop: signals.Stop
    on_epoch: OnEpoch | None
    compiled: dict[bool, Callable]

    @property
    def title(self) -> str:
        return f"pretrain {self.workdir.name}"


def _create(config, workdir, rows, stream, manifest, devices, stop, on_epoch) -> _Run:
    model = model_lib.from_config(config, {m: manifest.modalities[m] for m in config.data.modalities}, parallel.AXIS)
    pairs = (config.loss.instance_modality,) if config.loss.instance_weight else ()
    batches = feed.Feed(rows, config, devices, pairs=pairs)
    optimizer, schedule = optimizer_lib.from_config(config, batches.steps_per_epoch)
    step = functools.partial(
        pretrain_step,
        model=model,
        optimizer=optimizer,
        schedule=schedule,
        config=config,
        steps_per_epoch=batches.steps_per_epoch,
        statistics=_view_statistics(config, manifest),
        axis_name=parallel.AXIS,
    )
    probe = online_probe.create(config, model)
    return _Run(config, workdir, manifest, stream, batches, model, optimizer, step, probe, devices, stop, on_epoch, {})


def _until_done(run: _Run, debug_nans: bool) -> TrainState:
    """Train to the end; a step that goes wrong is left out by going back to the checkpoint before it."""
    config = run.config
    with checkpoint.Checkpoints(
        run.workdir,
        keep_newest=config.checkpoint.keep_newest,
        keep_best=config.checkpoint.keep_best,
        max_failures=config.checkpoint.max_failures,
    ) as saved:
        if processes.is_main():
            kept = config.checkpoint.keep_newest + config.checkpoint.keep_best
            checkpoint.check_space(run.workdir, jax.eval_shape(_fresh_of(run)), count=kept + 1)
        while True:
            with _ending_at_once(run.stop):
                state, info = checkpoint.of_main(*_start(run, saved))
            try:
                return _train(run, state, info, saved)
            except recorder_lib.BadStep as bad:
                if debug_nans:
                    progress.say(f"step {bad.record['step']}: {_first_nan(run, saved, bad.record['step'])}")
                _leave_out(run, bad)


def _train(run: _Run, state: TrainState, info: Mapping[str, Any], saved: checkpoint.Checkpoints) -> TrainState:
    """Train from a state to the last epoch.

    Raises:
      BadStep: a step went wrong; no state from after it was saved.
    """
    config, devices, stop, title = run.config, run.devices, run.stop, run.title
    first_step, steps_per_epoch = int(state.step), run.batches.steps_per_epoch
    total_steps = config.train.num_epochs * steps_per_epoch
    parts = _memory(run, state)
    shown = {"total_steps": total_steps, "steps_per_epoch": steps_per_epoch, "first_step": first_step}
    mirrors = {"tensorboard": config.train.tensorboard, "tracker": config.train.tracker}
    with (
        workdir_lib.MetricsLog(run.workdir, first_step, **mirrors) as log,
        workdir_lib.MetricsLog(run.workdir, first_step, name=workdir_lib.PROBES) as probes,
        progress.Display(title, **shown) as display,
        memory.explained(parts, config),
    ):
        _announce(run, display, first_step, total_steps)
        left_out = _left_out(run)
        recorder = recorder_lib.Recorder(config, log, display, info)
        axes = sharded_update.axes(state, config, devices)
        state = sharded_update.place(state, config, devices)
        asked_to_stop = parallel.Largest(devices)
        for dispatch, inputs in run.batches(run.batches.plan(first_step, left_out)):
            cluster = dispatch.epoch >= config.clustering.start_epoch
            if cluster not in run.compiled and not dispatch.left_out:
                recorder.flush()
                with _ending_at_once(stop):
                    run.compiled[cluster] = _compile(run, cluster, axes, (state, *inputs), parts, display)
                recorder.restart_clock()
            state, metrics = _advance(run, dispatch, cluster, state, inputs)
            recorder.take(dispatch, metrics)
            if run.probe is not None and run.probe.is_due(dispatch):
                recorder.flush()
                # A signal that has come by now waits for the checkpoint that follows.
                with contextlib.nullcontext() if stop.signal else _ending_at_once(stop):
                    probes.write([run.probe(state, dispatch.end_step, dispatch.epoch)])
                recorder.restart_clock()
            if run.on_epoch is not None and dispatch.ends_epoch:
                recorder.flush()
                run.on_epoch(dispatch.epoch, recorder.means(), state)
                recorder.restart_clock()
            stopping = asked_to_stop(stop.signal)
            if loop.is_due(dispatch, config) or stopping:
                recorder.flush()
                goodness = recorder.mean_loss(dispatch)
                if config.checkpoint.best_by == "probe":
                    goodness = run.probe.cost(dispatch)
                if log.sync():  # a checkpoint never knows more than the log
                    whole = sharded_update.whole(state, run.optimizer)
                    saved.save(dispatch.end_step, whole, recorder.info(), loss=goodness)
                recorder.restart_clock()
            if stopping:
                saved.wait()
                newest = max(saved.steps(), default=0)
                display.say(f"stopped after step {newest}; repeat the command to resume")
                raise signals.Interrupted(stopping)
        recorder.flush()
        saved.wait()
        if processes.is_main() and total_steps not in saved.steps():
            raise ConclugenError(f"{run.workdir}: the last checkpoint was not saved; free space and repeat the command")
        display.say(f"done: {total_steps} steps; checkpoints in {run.workdir / checkpoint.FOLDER}")
        return sharded_update.whole(state, run.optimizer)


def _ending_at_once(stop: signals.Stop) -> contextlib.AbstractContextManager[None]:
    """See ``Stop.at_once``; one process out of several ends together with the others, after a dispatch."""
    return contextlib.nullcontext() if processes.several() else stop.at_once()


def _advance(run: _Run, dispatch: loop.Dispatch, cluster: bool, state: TrainState, inputs: Any) -> Any:
    """State after a dispatch, and its metrics."""
    if dispatch.left_out:
        return state.replace(step=parallel.replicate(np.int32(dispatch.end_step), run.devices)), {}
    return run.compiled[cluster](state, *inputs)


def _announce(run: _Run, display: progress.Display, first_step: int, total_steps: int) -> None:
    rows, devices = run.batches.rows, run.devices
    display.say(
        f"{run.title}: {len(rows.usable)} examples, {run.batches.steps_per_epoch} steps per epoch, {len(devices)} "
        f"{devices[0].platform} device(s){_shared_by(devices)}, {rows.tier} table, "
        + _beginning(first_step, total_steps)
    )
    if run.config.data.storage_dtype != "float32":
        display.say(
            f"{run.title}: rows are rounded to {run.config.data.storage_dtype}, targets of the reconstruction too"
        )


def _compile(run: _Run, cluster: bool, axes: Any, arguments: Sequence[Any], parts: Any, display: Any) -> Callable:
    """The program of a dispatch before (``False``) or after (``True``) clustering joins the objective."""
    start = time.monotonic()
    program = run.batches.make_dispatch(functools.partial(run.step, cluster=cluster), axes)
    compiled = parallel.compiled(program, *arguments)
    memory.check(compiled, jax.local_devices()[0], parts, run.config)
    kind = "with" if cluster else "without"
    display.say(f"{run.title}: compiled {kind} clustering in {time.monotonic() - start:.1f} s")
    return compiled


def _leave_out(run: _Run, bad: recorder_lib.BadStep) -> None:
    """Note a step that went wrong, so that it is left out when the run goes on from the checkpoint before it.

    Raises:
      ConclugenError: more than ``config.train.max_bad_steps`` in a row went wrong.
    """
    step, config = bad.record["step"], run.config
    what = recorder_lib.describe(bad.record)
    before = _left_out(run)
    in_a_row = next(i for i in itertools.count() if step - 1 - i not in before) + 1
    if in_a_row > config.train.max_bad_steps:
        raise ConclugenError(
            f"{what}"
            + (f", and so were the {in_a_row - 1} before, which were left out" if in_a_row > 1 else "")
            + "; lower config.optimizer.learning_rate or set config.data.standardize=True, in a new workdir: the checkpoints "
            "here may already be on the way to it"
        )
    indices = _batch(run, step)
    rows = run.stream.rows(indices)["features"].values()
    wrong = indices[~np.all([np.isfinite(x).all(axis=1) for x in rows], axis=0)]
    ids = run.stream.names(wrong)[0].tolist() if wrong.size else []
    named = ", ".join(ids[:5]) + (" ..." if len(ids) > 5 else "")
    cause = f"the features of {named} are not finite" if ids else "all features of its batch are finite"
    if processes.is_main():
        progress.say(f"warning: {what}; {cause}; the step is left out")
        workdir_lib.leave_out(run.workdir, {"step": step, "reason": what, "ids": ids, "rows": indices.tolist()})


def _first_nan(run: _Run, saved: checkpoint.Checkpoints, step: int) -> str:
    """The first operation of a step whose result is not a number, found by computing it again, one operation at a time."""
    state, _ = checkpoint.of_main(*_start(run, saved))
    state, left_out = sharded_update.place(state, run.config, run.devices), _left_out(run)
    # As if it were left out: the dispatch before it then ends where it begins.
    for dispatch, inputs in run.batches(run.batches.plan(int(state.step), {*left_out, step})):
        if dispatch.end_step >= step:
            break
        state, _ = _advance(run, dispatch, dispatch.epoch >= run.config.clustering.start_epoch, state, inputs)
    state = jax.device_get(sharded_update.whole(state, run.optimizer))
    rows = run.stream.rows(_batch(run, step))
    cluster = (step - 1) // run.batches.steps_per_epoch >= run.config.clustering.start_epoch
    one_device = functools.partial(run.step, cluster=cluster, model=run.model.clone(axis_name=None), axis_name=None)
    try:
        with jax.disable_jit(), jax.debug_nans(True):
            one_device(state, {key: rows[key] for key in ("features", "present")})
    except FloatingPointError as e:
        ours = [
            f for f in traceback.extract_tb(e.__traceback__) if Path(__file__).parents[1] in Path(f.filename).parents
        ]
        where = f", in {Path(ours[-1].filename).name}, line {ours[-1].lineno}: {ours[-1].line}" if ours else ""
        return f"{str(e).splitlines()[0]}{where}"
    return "no operation gave a result that is not a number; some may be infinite"


def _batch(run: _Run, step: int) -> np.ndarray:
    """Indices of the rows of a step, counted from 1."""
    epoch, first_step = divmod(step - 1, run.batches.steps_per_epoch)
    return batches_lib.batch_indices(
        run.stream.usable,
        first_step=first_step,
        num_steps=1,
        batch_size=run.config.train.batch_size,
        seed=run.config.seed,
        epoch=epoch,
    )[0]


def _left_out(run: _Run) -> list[int]:
    """Steps whose update is left out, the same on all processes."""
    own = workdir_lib.left_out_steps(run.workdir) if processes.is_main() else []
    return json.loads(processes.text_of_main(json.dumps(own)))


def _beginning(first_step: int, total_steps: int) -> str:
    if first_step == total_steps:
        return "finished already"
    return f"resuming after step {first_step}" if first_step else "from random weights"


def _memory(run: _Run, state: TrainState) -> dict[str, float]:
    rows = run.batches.rows
    return memory.estimate(
        run.config,
        dict(run.model.feature_dims),
        sum(x.size for x in jax.tree.leaves(state.params)),
        table_rows=rows.num_examples if rows.tier == "device" else 0,
        num_devices=len(run.devices),
    )


def _shared_by(devices: Sequence[jax.Device]) -> str:
    count = len({device.process_index for device in devices})
    return f" of {count} processes" if count > 1 else ""


def _check_alike(config: ConfigDict, manifest: Manifest) -> None:
    """Refuse processes that would not train the same thing on the same data with as many devices each."""
    counts = collections.Counter(device.process_index for device in jax.devices())
    if len(set(counts.values())) > 1:
        raise ConclugenError(
            f"the processes have {', '.join(str(counts[i]) for i in sorted(counts))} devices; give each as many"
        )
    own = {"config": config_lib.to_json(config), "data": f"{manifest.name} {manifest.version} {manifest.fingerprint()}"}
    main = json.loads(processes.text_of_main(json.dumps(own)))
    different = config_lib.differences(config_lib.from_json(main["config"], "process 0"), config)
    # Each machine may have the data elsewhere: it is compared by content.
    different = [line for line in different if not line.startswith("config.data.path:")]
    if different:
        raise ConclugenError(
            f"the configuration differs from that of process 0 ({'; '.join(different)}); start all with the same command"
        )
    if main["data"] != own["data"]:
        raise ConclugenError(
            f"{config.data.path}: {manifest.name} {manifest.version} here is not the data set that process 0 has; copy that one"
        )
    processes.wait()  # nothing is written before all agree


def _view_statistics(config: ConfigDict, manifest: Manifest) -> views.Statistics | None:
    if not config.loss.instance_weight:
        return None
    return views.Statistics(*manifest.standardization(config.loss.instance_modality))


def _start(run: _Run, saved: checkpoint.Checkpoints) -> tuple[TrainState, dict[str, Any]]:
    """Where the weights come from: 1. the run's newest intact checkpoint; 2. else random, by the seed."""
    fresh = _fresh_of(run)
    return saved.restore_newest(jax.eval_shape(fresh)) or (fresh(), {"epoch_sums": {}, "epoch_steps": {}})


def _fresh_of(run: _Run) -> Callable[[], TrainState]:
    """What makes the state before the first step."""
    init_key, run_key = jax.random.split(jax.random.key(run.config.seed))
    return functools.partial(_fresh, run.config, run.model, run.optimizer, run.manifest, init_key, run_key)


def _fresh(config, model, optimizer, manifest, init_key, run_key) -> TrainState:
    uses_queue = config.loss.clustering_weight > 0
    return train_state.create(
        model_lib.initial_variables(model, init_key, manifest.standardization),
        optimizer,
        run_key,
        queue_length=config.clustering.queue_batches * config.train.batch_size if uses_queue else 0,
        num_clusters=config.clustering.num_clusters,
    )
