"""AdamW, the learning rate schedule, and freezing by parameter path."""

import functools
import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import optax
from ml_collections import ConfigDict

from conclugen_jax.method.model import PROJECTING


def learning_rate_schedule(
    peak: float,
    *,
    steps_per_epoch: int,
    warmup_epochs: int = 5,
    warmup_start: float = 0.1,
    period_epochs: int = 20,
    period_multiplier: int = 2,
    minimum: float = 1e-6,
    granularity: str = "epoch",
) -> Callable[[jax.Array | int], jax.Array]:
    """Return step, from 0, -> rate, float32 scalar: linear warm-up, then cosine annealing with warm restarts forever.

    ``peak`` is reached at the end of the warm-up and at every restart. The other arguments, by epochs of
    ``steps_per_epoch``, are those of the section ``schedule`` of ``configs/base.py``.

    References:
      Loshchilov and Hutter, "SGDR: stochastic gradient descent with warm restarts", 2017, Eq. 5.
    """
    if granularity not in ("epoch", "step"):
        raise ValueError(f"granularity must be 'epoch' or 'step', got {granularity!r}")
    starts, length = [0], period_epochs  # first epoch of every period as far as int32 reaches, warm-up not counted
    while period_multiplier > 1 and starts[-1] + length < 2**31 // period_multiplier:
        starts.append(starts[-1] + length)
        length *= period_multiplier
    starts = jnp.asarray(starts, jnp.int32)

    def rate(step: jax.Array | int) -> jax.Array:
        step = jnp.asarray(step, jnp.int32)
        epoch = step // steps_per_epoch
        since = epoch - warmup_epochs  # whole epochs after the warm-up: exact in integers
        fraction = 0.0 if granularity == "epoch" else (step % steps_per_epoch) / steps_per_epoch
        warm = warmup_start + (1 - warmup_start) * (epoch + fraction) / max(warmup_epochs, 1)
        if period_multiplier == 1:
            start, length = since // period_epochs * period_epochs, period_epochs
        else:
            start = starts[jnp.searchsorted(starts, jnp.maximum(since, 0), side="right") - 1]
            length = start * (period_multiplier - 1) + period_epochs
        progress = (since - start + fraction) / length
        annealed = minimum + (peak - minimum) * 0.5 * (1 + jnp.cos(jnp.pi * progress))
        return jnp.where(since < 0, peak * warm, annealed).astype(jnp.float32)

    return rate


def make_optimizer(
    schedule: Callable[[jax.Array | int], jax.Array],
    *,
    name: str = "adamw",
    weight_decay: float = 0.0,
    b1: float = 0.9,
    b2: float = 0.999,
    eps: float = 1e-8,
    trainable: Sequence[str] = (".*",),
    idle: Sequence[str] = (),
    rates: Mapping[str, float] | None = None,
) -> optax.GradientTransformationExtraArgs:
    """Make AdamW (or SGD: no momentum, the same decoupled decay) for parameters whose path matches, none for the others.

    Args:
      schedule: step -> learning rate.
      name: ``adamw`` or ``sgd``.
      weight_decay: on every trained parameter, biases included (as PyTorch's AdamW).
      b1: decay of the first moment.
      b2: decay of the second moment.
      eps: added to the root of the second moment.
      trainable: regular expressions, matched against the whole path ``a/b/c``; a parameter that matches none keeps
        its value bit for bit and has no moments.
      idle: expressions likewise, for parameters of a term that does not always take part: ``update(..., active=False)``
        passes them over, as PyTorch passes over a parameter without a gradient. The learning rate still changes.
      rates: expression -> factor of the learning rate of the parameters that match it; 1 for the others.
    """
    parts = {"adamw": [optax.scale_by_adam(b1=b1, b2=b2, eps=eps)], "sgd": []}[name]
    parts.append(optax.add_decayed_weights(weight_decay))
    rate = optax.scale_by_learning_rate(schedule)
    if rates and set(rates.values()) != {1.0}:
        rate = optax.chain(rate, _scaled(rates))
    if tuple(trainable) == (".*",) and not idle:
        return optax.chain(*parts, rate)
    kinds = {"train": optax.chain(*parts), "idle": _while_active(optax.chain(*parts)), "freeze": optax.set_to_zero()}

    def label(path: str) -> str:
        if not any(re.fullmatch(p, path) for p in trainable):
            return "freeze"
        return "idle" if any(re.fullmatch(p, path) for p in idle) else "train"

    return optax.chain(optax.multi_transform(kinds, functools.partial(_by_path, label)), rate)


def _scaled(rates: Mapping[str, float]) -> optax.GradientTransformation:
    """Multiply the updates of the parameters that match an expression."""

    def factor(path: str) -> float:
        return next((rate for p, rate in rates.items() if re.fullmatch(p, path)), 1.0)

    return optax.stateless(lambda updates, _: jax.tree.map(jnp.multiply, updates, _by_path(factor, updates)))


def _while_active(inner: optax.GradientTransformation) -> optax.GradientTransformationExtraArgs:
    """Leave parameters, moments and counters alone at steps where ``active`` is false, as if there were no such step."""

    def update(grads, state, params=None, *, active=True, **_):
        updates, moved = inner.update(grads, state, params)
        updates = jax.tree.map(lambda x: jnp.where(active, x, 0), updates)
        return updates, jax.tree.map(lambda new, old: jnp.where(active, new, old), moved, state)

    return optax.GradientTransformationExtraArgs(inner.init, update)


def _by_path(fn: Callable[[str], Any], tree: Any) -> Any:
    """Replace every leaf by ``fn(path)``, the path written ``a/b/c``."""
    keystr = functools.partial(jax.tree_util.keystr, simple=True, separator="/")
    return jax.tree_util.tree_map_with_path(lambda path, _: fn(keystr(path)), tree)


def from_config(
    config: ConfigDict, steps_per_epoch: int, *, learning_rate: Any = None, **others: Any
) -> tuple[optax.GradientTransformationExtraArgs, Callable[[jax.Array], jax.Array]]:
    """Make optimizer and schedule of a configuration, except the peak rate and ``others`` given, which may be traced."""
    section = config.optimizer
    peak = section.learning_rate if learning_rate is None else learning_rate
    schedule = learning_rate_schedule(peak, steps_per_epoch=steps_per_epoch, **config.schedule)
    own = {name: config.optimizer[name] for name in ("name", "weight_decay", "b1", "b2", "eps")}
    return make_optimizer(schedule, **{**own, "idle": _idle_parameters(config), **others}), schedule


def _idle_parameters(config: ConfigDict) -> tuple[str, ...]:
    """Parameters that only the clustering term trains."""
    if not config.loss.clustering_weight:
        return ()
    projection_is_trained = any(config.loss[f"{name}_weight"] for name in PROJECTING if name != "clustering")
    return ("clustering/.*",) if projection_is_trained else ("clustering/.*", "projection/.*")
