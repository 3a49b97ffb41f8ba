"""Pretraining: step -> dispatch -> run.

The way down: :func:`pretrain` runs dispatches, a dispatch scans :func:`pretrain_step` over batches, the step takes
the gradient of ``objective.pretrain_loss``, which sums the terms of ``losses.py``.
"""

import collections
import functools
import itertools
import json
import math
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import optax
from ml_collections import ConfigDict

from conclugen_jax import (
    checkpoint,
    feed,
    loop,
    memory,
    objective,
    online_probe,
    parallel,
    processes,
    progress,
    sharded_update,
    signals,
    train_state,
    views,
)
from conclugen_jax import config as config_lib
from conclugen_jax import model as model_lib
from conclugen_jax import optimizer as optimizer_lib
from conclugen_jax import workdir as workdir_lib
from conclugen_jax.data import shards
from conclugen_jax.data.manifest import Manifest
from conclugen_jax.errors import ConclugenError
from conclugen_jax.train_state import TrainState
from conclugen_jax.types import Metrics


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
) -> TrainState:
    """Train, or go on training, the run in a workdir until its last epoch.

    Args:
      config: see ``configs/base.py``.
      workdir: takes ``config.json``, ``data.json``, ``metrics.jsonl`` and ``checkpoints/``. Repeating the call with the
        same configuration resumes an interrupted run from exactly where its newest checkpoint stands.
      devices: to train on; ``None``: all, those of other processes too (:func:`conclugen_jax.processes.start`).
      on_epoch: called after each epoch, once its records are written and before its checkpoint is, with the epoch
        (from 0), its means of ``loss`` and of each term, and the state on the devices (moments as
        ``sharded_update.place`` has them), valid during the call. What it raises ends the run, closed in order. No epoch
        is left out; a resumed run repeats those since its checkpoint.

    Returns:
      The final state.

    Raises:
      ConclugenError: an impossible configuration, bad data, or a workdir that cannot be used.
      Interrupted: SIGINT or SIGTERM came; a checkpoint was saved.
    """
    devices = list(devices or jax.devices())
    config_lib.check(config)
    dataset = shards.open_dataset(config.data.path, verify=config.data.verify)
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
        workdir_lib.settle(folder, config, dataset.manifest)
        rows = loop.load_rows(config, stream)
        return _run(config, folder, rows, dataset.manifest, steps_per_epoch, devices, stop, on_epoch)


def _run(
    config: ConfigDict,
    workdir: Path,
    rows: shards.RowSource,
    manifest: Manifest,
    steps_per_epoch: int,
    devices: Sequence[jax.Device],
    stop: signals.Stop,
    on_epoch: OnEpoch | None,
) -> TrainState:
    model = model_lib.from_config(config, {m: manifest.modalities[m] for m in config.data.modalities}, parallel.AXIS)
    optimizer, schedule = optimizer_lib.from_config(config, steps_per_epoch)
    statistics = _view_statistics(config, manifest)
    pairs = (config.loss.instance_modality,) if config.loss.instance_weight else ()
    batches = feed.Feed(rows, config, devices, pairs=pairs)
    title = f"pretrain {workdir.name}"
    keep = {"keep_newest": config.checkpoint.keep_newest, "keep_best": config.checkpoint.keep_best}
    probe = online_probe.create(config, model)
    with checkpoint.Checkpoints(workdir, **keep) as saved:
        state, info = checkpoint.of_main(*_start(config, model, optimizer, manifest, saved))
        first_step, total_steps = int(state.step), config.train.num_epochs * steps_per_epoch
        parts = _memory(config, manifest, state, rows, len(devices))
        shown = {"total_steps": total_steps, "steps_per_epoch": steps_per_epoch, "first_step": first_step}
        with (
            workdir_lib.MetricsLog(workdir, first_step, tensorboard=config.train.tensorboard) as log,
            workdir_lib.MetricsLog(workdir, first_step, name=workdir_lib.PROBES) as probes,
            progress.Display(title, **shown) as display,
            memory.explained(parts, config),
        ):
            display.say(
                f"{title}: {len(rows.usable)} examples, {steps_per_epoch} steps per epoch, {len(devices)} "
                f"{devices[0].platform} device(s){_shared_by(devices)}, {rows.tier} table, "
                + _beginning(first_step, total_steps)
            )
            if config.data.storage_dtype != "float32":
                display.say(
                    f"{title}: rows are rounded to {config.data.storage_dtype}, targets of the reconstruction too"
                )
            recorder = _Recorder(config, log, display, info)
            axes = sharded_update.axes(state, config, devices)
            programs = _programs(config, model, optimizer, schedule, statistics, batches, axes)
            state, compiled = sharded_update.place(state, config, devices), {}
            asked_to_stop = parallel.Largest(devices)
            for dispatch, inputs in batches(batches.plan(first_step)):
                cluster = dispatch.epoch >= config.clustering.start_epoch
                if cluster not in compiled:
                    recorder.flush()
                    start = time.monotonic()
                    compiled[cluster] = parallel.compiled(programs[cluster], state, *inputs)
                    memory.check(compiled[cluster], jax.local_devices()[0], parts, config)
                    kind = "with" if cluster else "without"
                    display.say(f"{title}: compiled {kind} clustering in {time.monotonic() - start:.1f} s")
                    recorder.restart_clock()
                state, metrics = compiled[cluster](state, *inputs)
                recorder.take(dispatch, metrics)
                if probe is not None and probe.is_due(dispatch):
                    probes.write([probe(state, dispatch.end_step, dispatch.epoch)])
                    recorder.restart_clock()
                if on_epoch is not None and dispatch.ends_epoch:
                    recorder.flush()
                    on_epoch(dispatch.epoch, recorder.means(), state)
                    recorder.restart_clock()
                stopping = asked_to_stop(stop.signal)
                if loop.is_due(dispatch, config) or stopping:
                    recorder.flush()
                    goodness = recorder.mean_loss(dispatch)
                    if config.checkpoint.best_by == "probe":
                        goodness = probe.cost(dispatch)
                    saved.save(
                        dispatch.end_step, sharded_update.whole(state, optimizer), recorder.info(), loss=goodness
                    )
                    recorder.restart_clock()
                if stopping:
                    saved.wait()
                    display.say(f"stopped after step {dispatch.end_step}; repeat the command to resume")
                    raise signals.Interrupted(stopping)
            recorder.flush()
            saved.wait()
            display.say(f"done: {total_steps} steps; checkpoints in {workdir / checkpoint.FOLDER}")
            return sharded_update.whole(state, optimizer)


def _beginning(first_step: int, total_steps: int) -> str:
    if first_step == total_steps:
        return "finished already"
    return f"resuming after step {first_step}" if first_step else "from random weights"


def _memory(config, manifest, state, rows, num_devices) -> dict[str, float]:
    return memory.estimate(
        config,
        {m: manifest.modalities[m] for m in config.data.modalities},
        sum(x.size for x in jax.tree.leaves(state.params)),
        table_rows=rows.num_examples if rows.tier == "device" else 0,
        num_devices=num_devices,
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


def _programs(config, model, optimizer, schedule, statistics, batches, axes) -> dict[bool, Callable]:
    """The program of a dispatch before (``False``) and after (``True``) clustering joins the objective."""
    step = functools.partial(
        pretrain_step,
        model=model,
        optimizer=optimizer,
        schedule=schedule,
        config=config,
        steps_per_epoch=batches.steps_per_epoch,
        statistics=statistics,
        axis_name=parallel.AXIS,
    )
    return {cluster: batches.make_dispatch(functools.partial(step, cluster=cluster), axes) for cluster in (False, True)}


def _start(
    config: ConfigDict,
    model: model_lib.ConCluGen,
    optimizer: optax.GradientTransformation,
    manifest: Manifest,
    saved: checkpoint.Checkpoints,
) -> tuple[TrainState, dict[str, Any]]:
    """Where the weights come from: 1. the run's newest checkpoint; 2. else random, by the seed."""
    init_key, run_key = jax.random.split(jax.random.key(config.seed))
    fresh = functools.partial(_fresh, config, model, optimizer, manifest, init_key, run_key)
    if saved.steps():
        return saved.restore(saved.find("newest"), jax.eval_shape(fresh))
    return fresh(), {"epoch_sums": {}, "epoch_steps": {}}


def _fresh(config, model, optimizer, manifest, init_key, run_key) -> TrainState:
    uses_queue = config.loss.clustering_weight > 0
    return train_state.create(
        model_lib.initial_variables(model, init_key, manifest),
        optimizer,
        run_key,
        queue_length=config.clustering.queue_batches * config.train.batch_size if uses_queue else 0,
        num_clusters=config.clustering.num_clusters,
    )


class _Recorder:
    """Turns the metrics of dispatches into log lines, one dispatch late, so that the device never waits for the host."""

    def __init__(self, config, log, display, info):
        self._config, self._log, self._display = config, log, display
        # name -> sum over the epoch's steps so far, and how many steps had it: clustering is idle in some.
        self._sums, self._steps = dict(info["epoch_sums"]), dict(info["epoch_steps"])
        self._pending: tuple[loop.Dispatch, Any] | None = None
        # (steps, seconds) of the last dispatches; one alone may be seen late, since the host looks when it can.
        self._speed: collections.deque[tuple[int, float]] = collections.deque(maxlen=20)
        self._time = time.monotonic()

    def restart_clock(self) -> None:
        """Leave what has just passed (compilation, a checkpoint) out of the examples per second."""
        self._time = time.monotonic()

    def take(self, dispatch: loop.Dispatch, metrics: Any) -> None:
        """Note the metrics of a dispatch that has been sent off; those of the one before are written."""
        self.flush()
        self._pending = dispatch, metrics

    def flush(self) -> None:
        """Write what is pending.

        Raises:
          ConclugenError: a loss that is not finite; the steps before it are logged, the state after it is never saved.
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
        finite = list(itertools.takewhile(_is_finite, records))
        logged = [r for r in finite if r["step"] % self._config.train.log_every_steps == 0]
        self._log.write([{**r, "examples_per_second": round(rate, 1)} for r in logged])
        if len(finite) < len(records):
            raise ConclugenError(_not_finite(records[len(finite)]))
        if dispatch.first_step_in_epoch == 0:
            self._sums, self._steps = {}, {}
        for name, value in ((k, v) for r in records for k, v in r.items() if k.startswith("loss")):
            self._sums[name] = self._sums.get(name, 0.0) + value
            self._steps[name] = self._steps.get(name, 0) + 1
        shown = {k: v for k, v in records[-1].items() if k.startswith("loss")}
        self._display.update(dispatch.end_step, {**shown, "examples/s": rate}, steps_per_second=steps_per_second)

    def info(self) -> dict[str, Any]:
        """What a checkpoint needs to know besides the state."""
        return {"epoch_sums": dict(self._sums), "epoch_steps": dict(self._steps)}

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


def _is_finite(record: dict[str, Any]) -> bool:
    return math.isfinite(record["loss"]) and math.isfinite(record["gradient_norm"])


def _not_finite(record: dict[str, Any]) -> str:
    terms = [f"{k} {v:.4g}" for k, v in record.items() if k.startswith("loss") or k == "gradient_norm"]
    return (
        f"step {record['step']}: the loss or its gradient is not finite ({', '.join(terms)}); lower "
        "config.optimizer.learning_rate or set config.data.standardize=True, in a new workdir: the checkpoints here may "
        "already be on the way to it"
    )
