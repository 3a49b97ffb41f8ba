"""What pretraining and downstream training share: dispatches of many steps, and the feed of batches to them."""

import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any, NamedTuple

import jax
import numpy as np
from ml_collections import ConfigDict

from conclugen_jax import parallel, progress
from conclugen_jax.data import batches, host_table, shards
from conclugen_jax.train_state import TrainState
from conclugen_jax.types import Metrics


class Dispatch(NamedTuple):
    """Consecutive steps of one epoch that the device does without the host.

    Attributes:
      epoch: counted from 0.
      first_step_in_epoch: first step, counted from the epoch's start.
      num_steps: how many.
      end_step: steps done in the run once this dispatch is.
      ends_epoch: it holds the epoch's last step.
    """

    epoch: int
    first_step_in_epoch: int
    num_steps: int
    end_step: int
    ends_epoch: bool


def take_rows(table: Any, batch: Any) -> Any:
    """The rows of a batch: out of the table on the device if there is one, else the batch itself."""
    if table is None:
        return batch
    indices, variants = batch["indices"], batch["variants"]

    def take(x: jax.Array, *where: jax.Array) -> jax.Array:
        return x.at[where].get(mode="promise_in_bounds")

    rows = {
        key: jax.tree.map(lambda x: take(x, indices), columns) for key, columns in table.items() if key != "features"
    }
    if "features" in table:
        rows["features"] = {
            m: take(x, host_table.per_variant(indices, variants[m]), variants[m]) if m in variants else take(x, indices)
            for m, x in table["features"].items()
        }
    return rows


def make_dispatch(step: Callable[..., tuple[TrainState, Metrics]]) -> Callable:
    """Many steps in one program: ``(state, table, batches [steps, ...]) -> (state, metrics [steps])``."""

    def dispatch(state: TrainState, table: Any, stacked: Any) -> tuple[TrainState, Metrics]:
        return jax.lax.scan(lambda carry, batch: step(carry, take_rows(table, batch)), state, stacked)

    return dispatch


def dispatch_lengths(steps_per_epoch: int, most: int) -> list[int]:
    """How an epoch's steps are cut into dispatches of at most ``most`` steps.

    Equal lengths need one compiled program; where a divisor greater than half of ``most`` gives them, it is taken.
    Else the lengths differ by one.
    """
    least = math.ceil(steps_per_epoch / most)
    for count in range(least, steps_per_epoch + 1):
        length, rest = divmod(steps_per_epoch, count)
        if 2 * length <= most:
            break
        if rest == 0:
            return [length] * count
    length, longer = divmod(steps_per_epoch, least)
    return [length + 1] * longer + [length] * (least - longer)


def plan(first_step: int, steps_per_epoch: int, train: ConfigDict) -> Iterator[Dispatch]:
    """All dispatches from a step to the end of the run, one by one.

    Args:
      first_step: steps done already; where a run resumes, an end of one of its dispatches.
      steps_per_epoch: whole batches in an epoch.
      train: ``num_epochs`` and ``steps_per_dispatch``.
    """
    for epoch in range(first_step // steps_per_epoch, train.num_epochs):
        start = 0
        for length in dispatch_lengths(steps_per_epoch, train.steps_per_dispatch):
            end = epoch * steps_per_epoch + start + length
            if end > first_step:
                yield Dispatch(epoch, start, length, end, start + length == steps_per_epoch)
            start += length


def is_due(dispatch: Dispatch, config: ConfigDict) -> bool:
    """Whether a checkpoint follows: every so many epochs and at the run's end."""
    done = dispatch.epoch + 1
    return dispatch.ends_epoch and (done % config.checkpoint.every_epochs == 0 or done == config.train.num_epochs)


def load_rows(config: ConfigDict, stream: shards.ShardStream) -> shards.RowSource:
    """The rows of a split, kept where the configuration says."""
    with progress.Counter(f"reading {stream.split}") as counter:
        return batches.load(
            stream,
            tier=config.data.tier,
            device_table_gib=config.data.device_table_gib,
            host_table_gib=config.data.host_table_gib,
            host_cache_gib=config.data.host_cache_gib,
            progress=counter,
        )


def feed(
    rows: shards.RowSource,
    config: ConfigDict,
    devices: Sequence[jax.Device],
    dispatches: Iterable[Dispatch],
    keys: Sequence[str] = ("features", "present"),
    pairs: Sequence[str] = (),
) -> Iterator[tuple[Dispatch, Any, Any]]:
    """Dispatches with what their program takes: (dispatch, table on the device or ``None``, batches).

    A thread prepares batches and their transfer while the device works. Batches are indices and variants
    [devices, steps, n] with a device table, rows [devices, steps, n, ...] without one. Where several variants of an
    example are stored, each visit gets one of them, or two different ones of the modalities in ``pairs``.
    """
    table = None
    if rows.tier == "device":
        table = parallel.replicate_by_rows({key: rows.table[key] for key in keys}, devices)

    def batch_of(dispatch: Dispatch) -> Any:
        indices = batches.batch_indices(
            rows.usable,
            seed=config.seed,
            epoch=dispatch.epoch,
            first_step=dispatch.first_step_in_epoch,
            num_steps=dispatch.num_steps,
            batch_size=config.train.batch_size,
        )
        seed, epoch = config.seed, dispatch.epoch
        variants = batches.variant_choices(indices, rows.variants, seed=seed, epoch=epoch, pairs=pairs)
        if table is not None:
            batch = {"indices": indices, "variants": variants}
            return parallel.shard(parallel.split_rows(batch, len(devices), axis=1), devices)
        flat = rows.rows(indices.reshape(-1), {m: v.reshape(indices.size, *v.shape[2:]) for m, v in variants.items()})
        stacked = host_table.map_arrays(lambda x: x.reshape(*indices.shape, *x.shape[1:]), {k: flat[k] for k in keys})
        return parallel.shard(parallel.split_rows(stacked, len(devices), axis=1), devices)

    # Rows take memory on the device, indices hardly any.
    depth = 1 if table is None else 2
    for dispatch, stacked in batches.prefetch(lambda d: (d, batch_of(d)), dispatches, depth):
        yield dispatch, table, stacked


def evaluate(
    forward: Callable, variables: Any, rows: shards.RowSource, *, batch_size: int, num_devices: int
) -> tuple[Any, dict[str, Any]]:
    """Outputs of a mapped forward function for all rows of a split, each row once, in order.

    Args:
      forward: from :func:`conclugen_jax.parallel.map_forward`; takes (variables, {features, present}).
      variables: on the devices.
      rows: of the split.
      batch_size: rows per call; a multiple of ``num_devices``.
      num_devices: how many share a batch.

    Returns:
      (tree of arrays [num_examples, ...], {``present``, ``label``} of the same rows).
    """
    parts = []
    for indices, count in batches.evaluation_batches(np.arange(rows.num_examples), batch_size):
        batch = rows.rows(indices)
        inputs = {"features": batch["features"], "present": batch["present"]}
        outputs = parallel.merge_rows(forward(variables, parallel.split_rows(inputs, num_devices)))
        facts = {"present": batch["present"], "label": batch["label"]}
        parts.append(jax.tree.map(lambda x, n=count: x[:n], (outputs, facts)))
    return jax.tree.map(lambda *xs: np.concatenate(xs), *parts)


def records(dispatch: Dispatch, metrics: Metrics) -> list[dict[str, Any]]:
    """One record per step of a dispatch for ``metrics.jsonl``; waits for the device.

    Args:
      dispatch: what was sent off.
      metrics: name -> [num_steps].
    """
    values = {name: np.asarray(x).tolist() for name, x in metrics.items()}
    first = dispatch.end_step - dispatch.num_steps + 1
    return [
        {"step": first + i, "epoch": dispatch.epoch, **{name: x[i] for name, x in values.items()}}
        for i in range(dispatch.num_steps)
    ]
