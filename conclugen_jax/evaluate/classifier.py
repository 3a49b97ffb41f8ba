"""Train a classifier, alone or with the representation network, and keep its best epoch."""

import dataclasses
import functools
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from ml_collections import ConfigDict

from conclugen_jax.data import shards
from conclugen_jax.data.sources import LabelSpec
from conclugen_jax.errors import ConclugenError
from conclugen_jax.evaluate import task as task_lib
from conclugen_jax.evaluate.encoder import Encoder
from conclugen_jax.evaluate.task import Task
from conclugen_jax.method import train_state
from conclugen_jax.method.train_state import Metrics, TrainState
from conclugen_jax.run import allowed
from conclugen_jax.run import config as config_lib
from conclugen_jax.run import log as log_lib
from conclugen_jax.system import progress, signals
from conclugen_jax.train import feed, loop, parallel, sharded_update
from conclugen_jax.train import optimizer as optimizer_lib


class Best(NamedTuple):
    """The epoch of best validation measure, the earliest of equals, and its weights on the host."""

    epoch: int
    weights: dict[str, Any]


class BestEpochs:
    """The best epoch of each classifier so far, and which still train; of arrays of classifiers, or of one."""

    def __init__(self, measure: str, patience: int, shape: tuple[int, ...] = ()):
        """Start before the first epoch.

        Args:
          measure: ``mae``, lower is better, or ``accuracy``.
          patience: epochs without a lower validation loss after which a classifier stops; 0: never.
          shape: of the array of classifiers.
        """
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


@dataclasses.dataclass(frozen=True)
class Training:
    """What does not change while a classifier is trained.

    Attributes:
      config: of the run; its batch fits the training rows.
      task: what is predicted, and from what.
      encoder: where a network that is trained too starts.
      splits: rows of ``train``, ``validation`` and ``test``; of a frozen encoder with representations for features.
      labels: of the rows that are trained on.
      devices: that share a batch.
      evaluation_batch: rows per call of ``forward``.
      forward: compiled outputs, for evaluation.
    """

    config: ConfigDict
    task: Task
    encoder: Encoder
    splits: Mapping[str, shards.RowSource]
    labels: np.ndarray
    devices: Sequence[jax.Device]
    evaluation_batch: int
    forward: Callable

    @property
    def steps_per_epoch(self) -> int:
        """Whole batches of training rows."""
        return len(self.labels) // self.config.train.batch_size

    def scores(self, weights: Mapping[str, Any], split: str, *, brief: bool = False) -> dict[str, Any]:
        """Return all scores of a split (or, ``brief``, loss and measure), over all its rows with a label."""
        logits, facts = loop.evaluate(
            self.forward,
            parallel.replicate(weights, self.devices),
            self.splits[split],
            batch_size=self.evaluation_batch,
            num_devices=len(self.devices),
        )
        known = task_lib.known(self.task.label, facts["label"])
        if not known.any():
            raise ConclugenError(
                f"{self.config.data.path}: no example of the {split} split has the label; name another"
            )
        of_known = self.task.brief_scores if brief else self.task.scores
        return of_known(logits[known], facts["label"][known])

    def start(self) -> tuple[Callable, TrainState]:
        """Return the training step and the first state."""
        frozen = self.task.encoder is None
        trainable = (task_lib.CLASSIFIER,) if frozen else (task_lib.CLASSIFIER, task_lib.ENCODER)
        rates = {task_lib.ENCODER: self.config.downstream.encoder_rate}
        optimizer, schedule = optimizer_lib.from_config(self.config, self.steps_per_epoch, trainable, rates)
        step = functools.partial(
            downstream_step, task=self.task, optimizer=optimizer, schedule=schedule, split=self.config.optimizer.shard
        )
        return step, fresh_state(self.config, self.task, self.encoder.dims, optimizer, self.encoder.variables)


def prepare(
    config: ConfigDict,
    label: LabelSpec,
    encoder: Encoder,
    splits: Mapping[str, shards.RowSource],
    devices: Sequence[jax.Device],
) -> Training:
    """Put together what a training needs; arguments as in :class:`Training`.

    Raises:
      ConclugenError: a batch that the rows cannot fill or the devices cannot share.
    """
    num_devices, usable = len(devices), splits["train"].usable
    evaluation_batch = math.ceil(config.train.batch_size / num_devices) * num_devices
    config = with_fitting_batch(config, len(usable), num_devices)
    labels = task_lib.labels_of(splits["train"])[usable]
    weights = task_lib.class_weights(config.downstream.class_weights, label, labels)
    network = None if config.downstream.protocol in allowed.FROZEN else encoder.model
    task = task_lib.create(config, label, weights=weights, encoder=network, axis_name=parallel.AXIS)
    forward = parallel.map_forward(lambda w, batch: task.logits(w["params"], w["feature_stats"], batch), devices)
    return Training(config, task, encoder, splits, labels, devices, evaluation_batch, forward)


def fit(training: Training, log: log_lib.MetricsLog, display: progress.Display, stop: signals.Stop) -> Best:
    """Train to the last epoch, or until the validation loss has not fallen for some, and keep the best epoch.

    Raises:
      ConclugenError: the validation loss is not finite in any epoch.
      Interrupted: SIGINT or SIGTERM came.
    """
    config, devices, task = training.config, training.devices, training.task
    step, state = training.start()
    batches = feed.Feed(training.splits["train"], config, devices, keys=("features", "present", "label"))
    program = batches.program(step, sharded_update.axes(state, config, devices))
    state = sharded_update.place(state, config, devices)
    patience = config.downstream.early_stopping_epochs
    best, kept = BestEpochs(task.measure, patience), None
    for dispatch, inputs in batches(batches.plan(0)):
        state, metrics = program(state, *inputs)
        records = loop.records(dispatch, metrics)
        if dispatch.ends_epoch:
            weights = {"params": state.params, "feature_stats": state.feature_stats}
            scores = training.scores(weights, "validation", brief=True)
            records[-1] |= {"validation/loss": scores["loss"], f"validation/{task.measure}": scores[task.measure]}
            if best.improved(dispatch.epoch, scores[task.measure], scores["loss"]):
                # A copy on the host: the next dispatch takes the state's memory.
                kept = Best(dispatch.epoch, jax.tree.map(lambda x: np.array(x, copy=True), weights))
            shown = {"loss": records[-1]["loss"], f"validation {task.measure}": scores[task.measure]}
            display.update(dispatch.end_step, shown)
        every = config.train.log_every_steps
        log.write([r for r in records if r["step"] % every == 0 or "validation/loss" in r])
        if stop.signal:
            raise signals.Interrupted(stop.signal)
        if not best.running:
            display.say(f"stopped after epoch {dispatch.epoch + 1}: no lower validation loss for {patience} epochs")
            break
    if kept is None:
        raise ConclugenError(f"{config.data.path}: {task_lib.not_finite(config)}")
    return kept


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
    encoder_variables: Mapping[str, Any] | None = None,
) -> TrainState:
    """Return a random classifier, on top of the encoder's parameters where those are trained too.

    Args:
      config: its seed is used.
      task: of the run.
      dims: modality -> size of its representation.
      optimizer: makes its first state.
      encoder_variables: needed where the task encodes.
    """
    _, run_key = jax.random.split(jax.random.key(config.seed))
    init_key, run_key = jax.random.split(run_key)
    zeros = {m: jnp.zeros((1, dim)) for m, dim in dims.items()}
    present = {m: jnp.ones(1, bool) for m in dims}
    classifier = task.classifier.clone(axis_name=None)
    params = {"classifier": classifier.init(init_key, zeros, present=present)["params"]}
    feature_stats = {}
    if task.encoder is not None:
        params["representation"] = encoder_variables["params"]["representation"]
        feature_stats = encoder_variables.get("feature_stats", {})
    return train_state.create({"params": params, "feature_stats": feature_stats}, optimizer, run_key)


def with_fitting_batch(config: ConfigDict, num_examples: int, num_devices: int) -> ConfigDict:
    """Return the configuration with, for few labels per class, a batch of at most as many examples as there are.

    Raises:
      ConclugenError: a batch that the examples cannot fill or the devices cannot share.
    """
    most = num_examples // num_devices * num_devices
    config = config.copy_and_resolve_references()
    if config.downstream.labels_per_class and config.train.batch_size > most:
        if not most:
            raise ConclugenError(
                f"{num_examples} labelled examples cannot be shared by {num_devices} devices; use fewer devices or raise "
                "config.downstream.labels_per_class"
            )
        config.train.batch_size = most
    config_lib.check_batches(config, num_examples=num_examples, num_devices=num_devices)
    return config
