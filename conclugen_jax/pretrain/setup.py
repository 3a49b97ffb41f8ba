"""The optimizer step, and the parts of a run that are built once: data, network, optimizer, compiled programs."""

import dataclasses
import functools
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from ml_collections import ConfigDict

from conclugen_jax.data import persons as persons_lib, shards
from conclugen_jax.data.persons import Persons
from conclugen_jax.evaluate import health as health_lib, online_probe, weights
from conclugen_jax.method import model as model_lib, objective, train_state
from conclugen_jax.method.train_state import Metrics, TrainState
from conclugen_jax.runs import checkpoint, config as config_lib
from conclugen_jax.system import processes, progress
from conclugen_jax.train import feed, memory, neighbours, optimizer as optimizer_lib, parallel
from conclugen_jax.train.feed import Dispatch


def pretrain_step(
    state: TrainState,
    batch: objective.Batch,
    optimizer: optax.GradientTransformation,
    schedule: Callable,
    **of_loss: Any,
) -> tuple[TrainState, Metrics]:
    """Take one optimizer step on ``objective.pretrain_loss``.

    Args:
      state: training state before the step.
      batch: features and presence of each modality.
      optimizer: optimizer of the parameters.
      schedule: maps the step to the learning rate, for the metrics.
      of_loss: further arguments of ``objective.pretrain_loss``, ``config`` among them.

    Returns:
      The state after the step, and the metrics of the state before it: loss, its terms, gradient norm, k-means.
    """
    loss_fn, config = functools.partial(objective.pretrain_loss, **of_loss), of_loss["config"]
    key = jax.random.fold_in(state.rng, state.step)
    (_, (metrics, batch_stats, clustered)), grads = jax.value_and_grad(loss_fn, has_aux=True)(
        state.params, state, batch, key
    )
    active = clustered.active if clustered is not None else False
    options = {"split": config.optimizer.shard, "axis_name": of_loss.get("axis_name"), "active": active}
    params, opt_state, metrics["gradient_norm"] = parallel.update(
        optimizer, grads, state.opt_state, state.params, **options
    )
    metrics["learning_rate"] = schedule(state.step)
    state = state.replace(step=state.step + 1, params=params, batch_stats=batch_stats, opt_state=opt_state)
    if clustered is not None:
        kmeans = clustered.kmeans
        sizes = jnp.bincount(kmeans.assignments, length=config.clustering.num_clusters)
        metrics["kmeans/iterations"] = jnp.where(active, kmeans.iterations, 0)
        metrics["kmeans/largest_cluster"] = jnp.where(active, sizes.max() / sizes.sum(), 0)
        metrics["kmeans/empty_clusters"] = (sizes == 0).sum()
        centroids = jnp.where(active, kmeans.centroids, state.centroids)
        state = state.replace(centroids=centroids, queue=clustered.queue, queue_batches=clustered.queue_batches)
    return state, metrics


@dataclasses.dataclass(frozen=True)
class Setup:
    """The parts of a run that do not change."""

    config: ConfigDict
    workdir: Path
    stream: shards.ShardStream  # rows of the training split by index
    batches: feed.Feed
    model: model_lib.ConCluGen
    optimizer: optax.GradientTransformationExtraArgs
    step: Callable  # ``pretrain_step``, all but ``state``, ``batch`` and ``cluster`` given
    devices: Sequence[jax.Device]  # that share a batch
    probe: online_probe.OnlineProbe | None
    search: neighbours.Search  # for neighbours among the rows of the training split
    persons: Persons | None = None  # by which the features of the stream are standardised
    near: np.ndarray | None = None  # neighbours by raw features, int32 [num_examples, k]
    _compiled: dict[bool, Callable] = dataclasses.field(default_factory=dict, init=False)

    @property
    def title(self) -> str:
        """Name of the run for progress and trackers."""
        return f"pretrain {self.workdir.name}"

    @property
    def total_steps(self) -> int:
        """Steps of the whole run."""
        return self.config.train.num_epochs * self.batches.steps_per_epoch

    def clusters(self, epoch: int) -> bool:
        """Whether L_Clu is part of the objective in an epoch, counted from 0."""
        return epoch >= self.config.clustering.start_epoch

    def saves_after(self, dispatch: Dispatch) -> bool:
        """Return whether to save a checkpoint after a dispatch: at the configured interval of epochs and at the end."""
        done, every = dispatch.epoch + 1, self.config.checkpoint.every_epochs
        return dispatch.ends_epoch and (done % every == 0 or done == self.config.train.num_epochs)

    @functools.cached_property
    def health(self) -> health_lib.Monitor | None:
        """What measures the run's health, on the main process alone; ``None``: nothing does."""
        if not self.config.online_probe.health or not processes.is_main():
            return None
        return health_lib.Monitor(self.config, self.model, self.stream, self.persons)

    def measures_after(self, dispatch: Dispatch) -> bool:
        """Return whether to measure health after a dispatch: at checkpoints, with enough steps between them, and at the end."""
        if not self.config.online_probe.health or not self.saves_after(dispatch):
            return False
        since = dispatch.end_step - self.config.checkpoint.every_epochs * self.batches.steps_per_epoch
        trained = [step * self.config.train.batch_size for step in (since, dispatch.end_step)]
        between = health_lib.TRAINED_BETWEEN * (1 if self.devices[0].platform == "cpu" else health_lib.ACCELERATION)
        before, after = (examples // between for examples in trained)
        return after > before or dispatch.end_step == self.total_steps

    def measure(self, state: TrainState) -> dict[str, float]:
        """Return the figures of health of a state on the devices; empty where this process measures nothing."""
        if self.health is None:
            return {}
        on_one = functools.partial(jax.tree.map, lambda x: x.addressable_data(0))
        return self.health(on_one(state.variables()), on_one(state.centroids))

    def refreshes_after(self, dispatch: Dispatch) -> bool:
        """Whether neighbours are looked for among the representations after a dispatch, for the epochs that follow."""
        before, after = (neighbours.refreshes(self.config, epoch) for epoch in (dispatch.epoch, dispatch.epoch + 1))
        return dispatch.ends_epoch and after > before and dispatch.epoch + 1 < self.config.train.num_epochs

    def fresh_state(self) -> TrainState:
        """Create the state before the first step, by the seed of the run."""
        statistics = persons_lib.feature_stats(self.stream.dataset.manifest, self.persons)
        near = self.near if neighbours.refreshes(self.config, self.config.train.num_epochs) else None
        return fresh_state(self.config, self.model, self.optimizer, statistics, near)

    def start(self, saved: checkpoint.Checkpoints) -> tuple[TrainState, dict[str, Any]]:
        """Return the state to resume from and its record of the log, the same on all processes.

        Where the weights come from: 1. the run's newest intact checkpoint; 2. else random, by the seed.
        """
        found = saved.restore_newest(jax.eval_shape(self.fresh_state))
        state, info = found or (self.fresh_state(), {"epoch_sums": {}, "epoch_steps": {}})
        if processes.several():
            state = checkpoint.from_tree(processes.of_main(checkpoint.to_tree(state)), state, source="process 0")
            info = processes.json_of_main(info)
        if state.neighbours.size:
            self.batches.renew(np.asarray(state.neighbours))
        return state, dict(info)

    def refresh(self, state: TrainState) -> TrainState:
        """Search neighbours among the representations of a state, and use them in the state and the feed from now on."""
        vectors = neighbours.represented(self.model, jax.tree.map(np.asarray, state.variables()), self.batches.rows)
        with memory.explained(functools.partial(neighbours.too_large, vectors)):
            near = self.search(vectors, unit_bank=jnp.asarray(vectors))
        near = processes.of_main(near)  # the same for all, bit for bit
        self.batches.renew(near)
        return state.replace(neighbours=parallel.replicate(near, self.devices))

    def memory(self, state: TrainState) -> dict[str, float]:
        """Estimate the memory of the run on each device in GiB, by purpose."""
        rows, parameters = self.batches.rows, sum(x.size for x in jax.tree.leaves(state.params))
        sizes = {"table_rows": rows.num_examples if rows.tier == "device" else 0, "num_devices": len(self.devices)}
        return memory.estimate(self.config, dict(self.model.feature_dims), parameters, **sizes)

    def lacks_program(self, dispatch: Dispatch) -> bool:
        """Whether a dispatch must be compiled first: there are two programs, without and with clustering."""
        return not dispatch.left_out and self.clusters(dispatch.epoch) not in self._compiled

    def compile(self, dispatch: Dispatch, state: TrainState, inputs: Any, display: progress.Display) -> None:
        """Compile the program of a dispatch; raise if it needs more memory than the device has."""
        start, cluster = time.monotonic(), self.clusters(dispatch.epoch)
        axes = parallel.axes(state, self.config, self.devices)
        program = self.batches.program(functools.partial(self.step, cluster=cluster), axes)
        compiled = parallel.compiled(program, state, *inputs)
        memory.check(compiled, jax.local_devices()[0], self.memory(state), self.config)
        kind = "with" if cluster else "without"
        display.say(f"{self.title}: compiled {kind} clustering in {time.monotonic() - start:.1f} s")
        self._compiled[cluster] = compiled

    def train(self, dispatch: Dispatch, state: TrainState, inputs: Any) -> tuple[TrainState, Metrics]:
        """Return the state after a dispatch, and its metrics; a skipped one changes the count of steps alone."""
        if dispatch.left_out:
            return state.replace(step=parallel.replicate(np.int32(dispatch.end_step), self.devices)), {}
        return self._compiled[self.clusters(dispatch.epoch)](state, *inputs)


def fresh_state(
    config: ConfigDict,
    model: model_lib.ConCluGen,
    optimizer: optax.GradientTransformation,
    statistics: Callable[[str], dict[str, np.ndarray]] | None,
    near: np.ndarray | None,
) -> TrainState:
    """Create the state before the first step by the seed, with the statistics of the features and their neighbours."""
    section, (init_key, run_key) = config.clustering, jax.random.split(jax.random.key(config.seed))
    variables = model_lib.initial_variables(model, init_key, statistics)
    length = section.queue_batches * config.train.batch_size if config.loss.clustering_weight else 0
    queue = {"queue_length": length, "num_clusters": section.num_clusters}
    return train_state.create(variables, optimizer, run_key, neighbours=near, **queue)


def open_data(config: ConfigDict, num_devices: int) -> tuple[ConfigDict, shards.ShardStream]:
    """Return the configuration, with the names of its modalities, and the rows of the training split, if all of it fits."""
    config_lib.check(config)
    dataset = shards.open_dataset(config.data.path, verify=config.data.verify)
    config = config_lib.with_modalities(config, dataset.manifest.modalities)
    all_variants = config.data.variants == "random"
    stream = shards.ShardStream(dataset, config.data.train_split, config.data.modalities, all_variants=all_variants)
    config_lib.check_objective(config)
    config_lib.check_batches(config, num_examples=len(stream.usable), num_devices=num_devices)
    config_lib.check_clustering(config, num_examples=len(stream.usable), num_devices=num_devices)
    parallel.check_alike(config, dataset.manifest)
    return config, stream


def standardise(config: ConfigDict, workdir: Path, stream: shards.ShardStream) -> Persons | None:
    """Make the stream return features standardised by person, if configured; save the statistics in the workdir."""
    if not weights.by_persons(config):
        return None
    path = workdir / persons_lib.FILE
    persons = persons_lib.read(path) if path.exists() else persons_lib.fit(stream, config)
    if processes.is_main() and not path.exists():
        persons.write(path)
    persons.attach(stream)
    return persons


def create(
    config: ConfigDict,
    workdir: Path,
    stream: shards.ShardStream,
    rows: shards.RowSource,
    devices: Sequence[jax.Device],
    persons: Persons | None = None,
) -> Setup:
    """Make network, optimizer, feed, step and probe of a run."""
    manifest = stream.dataset.manifest
    model = model_lib.from_config(config, {m: manifest.modalities[m] for m in config.data.modalities}, parallel.AXIS)
    of_two_views = [config.loss.instance_modality] if config.loss.instance_weight else []
    search = neighbours.Search(config, stream, rows)
    near = processes.of_main(neighbours.table(search, persons))
    batches = feed.Feed(rows, config, devices, pairs=tuple(of_two_views), neighbours=near)
    optimizer, schedule = optimizer_lib.from_config(config, batches.steps_per_epoch)
    statistics = None
    if of_two_views:
        found = persons_lib.feature_stats(manifest, persons)(*of_two_views)
        statistics = found["mean"], found["scale"]
    of_loss = {"model": model, "steps_per_epoch": batches.steps_per_epoch, "statistics": statistics}
    options = {"optimizer": optimizer, "schedule": schedule, "config": config, "axis_name": parallel.AXIS}
    step = functools.partial(pretrain_step, **options, **of_loss)
    probe = online_probe.OnlineProbe(config, model, persons) if config.online_probe.every_epochs else None
    return Setup(config, workdir, stream, batches, model, optimizer, step, devices, probe, search, persons, near)
