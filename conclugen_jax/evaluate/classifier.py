"""Train a classifier, alone or with the representation network, and keep its best epoch."""

import functools
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from ml_collections import ConfigDict

from conclugen_jax.data.shards import RowSource
from conclugen_jax.errors import ConclugenError
from conclugen_jax.evaluate import task as task_lib
from conclugen_jax.evaluate.encoder import Encoder
from conclugen_jax.evaluate.task import Task
from conclugen_jax.method import train_state
from conclugen_jax.method.train_state import Metrics, TrainState
from conclugen_jax.run import config as config_lib
from conclugen_jax.run import log as log_lib
from conclugen_jax.system import progress, signals
from conclugen_jax.train import feed, sharded_update
from conclugen_jax.train import optimizer as optimizer_lib


class BestEpochs:
    """The best epoch of each classifier so far, the earliest of equals, and which still train.

    Args:
      measure: ``mae``, lower is better, or ``accuracy``.
      patience: epochs without a lower validation loss after which a classifier stops; 0: never.
      shape: of the array of classifiers.
    """

    def __init__(self, measure: str, patience: int, shape: tuple[int, ...] = ()):
        self._sign, self._patience = 1 if measure == "mae" else -1, patience
        self._cost, self._lowest = np.full(shape, np.inf), np.full(shape, np.inf)
        self.epoch, self._since = np.zeros(shape, int), np.zeros(shape, int)

    @property
    def running(self) -> np.ndarray:
        """Classifiers that have not stopped early."""
        return (self._since < self._patience) | (self._patience == 0)

    @property
    def measure(self) -> np.ndarray:
        """Validation measure of the best epochs; infinite, the worst, where the loss was never finite."""
        return self._cost * self._sign

    def improved(self, epoch: int, measure: Any, losses: Any) -> np.ndarray:
        """Take in the validation of an epoch; return which running classifiers were never better."""
        running = self.running
        # Never select an epoch whose outputs are NaN: as classes they would count as the first one.
        cost = np.where(np.isfinite(losses), np.asarray(measure) * self._sign, np.inf)
        improved = running & (cost < self._cost)
        self._cost, self.epoch = np.where(improved, cost, self._cost), np.where(improved, epoch, self.epoch)
        self._since = np.where(running & (losses < self._lowest), 0, self._since + running)
        self._lowest = np.where(running, np.fmin(self._lowest, losses), self._lowest)
        return improved


def fit(
    config: ConfigDict,
    task: Task,
    encoder: Encoder,
    rows: RowSource,
    devices: Sequence[jax.Device],
    validate: Callable[[Mapping[str, Any]], dict[str, float]],
    folder: Path,
    stop: signals.Stop,
) -> tuple[int, dict[str, Any]]:
    """Train to the last epoch, or until the validation loss has not fallen for some, with a log and a display.

    Args:
      config: of the run; its batch fits the rows.
      task: what is predicted, and from what.
      encoder: where a network that is trained too starts.
      rows: of the training split.
      devices: that share a batch.
      validate: weights -> loss and measure of the validation split.
      folder: of the log.
      stop: raises :class:`conclugen_jax.system.signals.Interrupted` when a signal came.

    Returns:
      The epoch of best validation measure and its weights, on the host.

    Raises:
      ConclugenError: the validation loss is not finite in any epoch.
    """
    batches, program, state = _start(config, task, encoder, rows, devices)
    patience, title = config.downstream.early_stopping_epochs, f"{config.downstream.protocol} {folder.name}"
    best, kept = BestEpochs(task.measure, patience), None
    steps, every = batches.steps_per_epoch, config.train.log_every_steps
    mirrors = {"tensorboard": config.train.tensorboard, "tracker": config.train.tracker}
    with (
        log_lib.MetricsLog(folder, step=0, **mirrors) as log,
        progress.Display(title, total_steps=config.train.num_epochs * steps, steps_per_epoch=steps) as display,
    ):
        size, modalities = config.train.batch_size, ", ".join(encoder.modalities)
        display.say(f"{title}: {len(rows.usable)} examples, batches of {size}, modalities {modalities}")
        for dispatch, inputs in batches(batches.plan(0)):
            state, metrics = program(state, *inputs)
            records = feed.records(dispatch, metrics)
            if dispatch.ends_epoch:
                weights = {"params": state.params, "feature_stats": state.feature_stats}
                scores = validate(weights)
                records[-1] |= {f"validation/{name}": score for name, score in scores.items()}
                if best.improved(dispatch.epoch, scores[task.measure], scores["loss"]):
                    # A copy on the host: the next dispatch takes the state's memory.
                    kept = dispatch.epoch, jax.tree.map(lambda x: np.array(x, copy=True), weights)
                shown = {"loss": records[-1]["loss"], f"validation {task.measure}": scores[task.measure]}
                display.update(dispatch.end_step, shown)
            log.write([r for r in records if r["step"] % every == 0 or "validation/loss" in r])
            if stop.signal:
                raise signals.Interrupted(stop.signal)
            if not best.running:
                display.say(f"stopped after epoch {dispatch.epoch + 1}: no lower validation loss for {patience} epochs")
                break
    if kept is None:
        raise task_lib.not_finite(config)
    return kept


def _start(config: ConfigDict, task: Task, encoder: Encoder, rows: RowSource, devices: Sequence[jax.Device]):
    """Return the feed, the program of its dispatches and the first state, placed on the devices."""
    batches = feed.Feed(rows, config, devices, keys=("features", "present", "label"))
    trainable = (task_lib.CLASSIFIER,) if task.encoder is None else (task_lib.CLASSIFIER, task_lib.ENCODER)
    rates = {task_lib.ENCODER: config.downstream.encoder_rate}
    optimizer, schedule = optimizer_lib.from_config(config, batches.steps_per_epoch, trainable, rates)
    state = fresh_state(config, task, encoder.dims, optimizer, encoder.variables)
    step = functools.partial(
        downstream_step, task=task, optimizer=optimizer, schedule=schedule, split=config.optimizer.shard
    )
    program = batches.program(step, sharded_update.axes(state, config, devices))
    return batches, program, sharded_update.place(state, config, devices)


def downstream_step(
    state: TrainState,
    batch: Mapping[str, Any],
    *,
    task: Task,
    optimizer: optax.GradientTransformation,
    schedule: Callable[[jax.Array], jax.Array],
    split: bool = False,
) -> tuple[TrainState, Metrics]:
    """Take one optimizer step, ``split`` over the devices by choice; the metrics are those of the state before it."""
    key = jax.random.fold_in(state.rng, state.step)

    def loss_fn(params: Any) -> jax.Array:
        return task.loss(task.logits(params, state.feature_stats, batch, key), batch["label"])

    loss, grads = jax.value_and_grad(loss_fn)(state.params)
    params, opt_state, _ = sharded_update.apply(
        optimizer, grads, state.opt_state, state.params, split=split, axis_name=task.classifier.axis_name
    )
    metrics = {"loss": loss, "learning_rate": schedule(state.step)}
    return state.replace(step=state.step + 1, params=params, opt_state=opt_state), metrics


def fresh_state(
    config: ConfigDict,
    task: Task,
    dims: Mapping[str, int],
    optimizer: optax.GradientTransformation,
    variables: Mapping[str, Any] | None = None,
) -> TrainState:
    """Return a random classifier by the configuration's seed, on top of the encoder's ``variables`` where it is trained.

    ``dims``: modality -> size of its representation.
    """
    _, run_key = jax.random.split(jax.random.key(config.seed))
    init_key, run_key = jax.random.split(run_key)
    zeros = {m: jnp.zeros((1, dim)) for m, dim in dims.items()}
    present = {m: jnp.ones(1, bool) for m in dims}
    classifier = task.classifier.clone(axis_name=None)
    params, stats = {"classifier": classifier.init(init_key, zeros, present=present)["params"]}, {}
    if task.encoder is not None:
        params["representation"] = variables["params"]["representation"]
        stats = variables.get("feature_stats", {})
    return train_state.create({"params": params, "feature_stats": stats}, optimizer, run_key)


def with_fitting_batch(config: ConfigDict, num_examples: int, num_devices: int) -> ConfigDict:
    """Return the configuration with a batch of at most as many examples as there are, shared equally by the devices.

    Raises:
      ConclugenError: the devices cannot share the batch, or are more than the examples.
    """
    most = num_examples // num_devices * num_devices
    if not most:
        raise ConclugenError(
            f"{num_examples} labelled examples cannot be shared by {num_devices} devices; use fewer devices or raise "
            "config.downstream.labels_per_class"
        )
    config = config.copy_and_resolve_references()
    config.train.batch_size = min(config.train.batch_size, most)
    config_lib.check_batches(config, num_examples=num_examples, num_devices=num_devices)
    return config
