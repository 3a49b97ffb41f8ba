"""Training of a classifier, alone or with the representation network: first state, one step."""

from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import optax
from ml_collections import ConfigDict

from conclugen_jax.errors import ConclugenError
from conclugen_jax.evaluate.task import Task
from conclugen_jax.method import train_state
from conclugen_jax.method.train_state import Metrics, TrainState
from conclugen_jax.train import sharded_update


def downstream_step(
    state: TrainState,
    batch: Mapping[str, Any],
    *,
    task: Task,
    optimizer: optax.GradientTransformation,
    schedule: Callable[[jax.Array], jax.Array],
    split: bool = False,
) -> tuple[TrainState, Metrics]:
    """One optimizer step, ``split`` over the devices by choice; the metrics are those of the state before it."""
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
    """A random classifier, on top of the encoder's parameters where those are trained too.

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
    if task.encode:
        params["representation"] = encoder_variables["params"]["representation"]
        feature_stats = encoder_variables.get("feature_stats", {})
    return train_state.create({"params": params, "feature_stats": feature_stats}, optimizer, run_key)


def fitting_batch(config: ConfigDict, num_examples: int, num_devices: int) -> int:
    """Examples per step: those configured or, with few labels per class, at most as many as there are."""
    most = num_examples // num_devices * num_devices
    if not config.downstream.labels_per_class or config.train.batch_size <= most:
        return config.train.batch_size
    if not most:
        raise ConclugenError(
            f"{num_examples} labelled examples cannot be shared by {num_devices} devices; use fewer devices or raise "
            "config.downstream.labels_per_class"
        )
    return most
