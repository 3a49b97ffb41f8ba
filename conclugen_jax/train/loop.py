"""Dispatches of many steps, the records made of their metrics, and the evaluation of whole splits."""

from collections.abc import Callable, Collection, Iterator, Sequence
from typing import Any, NamedTuple

import jax
import numpy as np

from conclugen_jax.data import batches, shards
from conclugen_jax.method.train_state import Metrics
from conclugen_jax.train import parallel


class Dispatch(NamedTuple):
    """Consecutive steps of one epoch that the device does without the host."""

    epoch: int  # counted from 0
    first_step_in_epoch: int  # counted from 0 at the epoch's start
    num_steps: int
    end_step: int  # steps done in the run once this dispatch is
    ends_epoch: bool  # it holds the epoch's last step
    left_out: bool = False  # it is one step that is passed over: nothing but the number of steps changes


def plan(
    first_step: int, lengths: Sequence[int], num_epochs: int, left_out: Collection[int] = ()
) -> Iterator[Dispatch]:
    """Yield all dispatches from a step to the end of the run.

    Args:
      first_step: steps done already. Mostly the end of a dispatch; else the first one has only what is left of it.
      lengths: steps of each dispatch of an epoch.
      num_epochs: of the run.
      left_out: steps, counted from 1, that are passed over: each is a dispatch of its own.
    """
    steps_per_epoch = sum(lengths)
    for epoch in range(first_step // steps_per_epoch, num_epochs):
        before, start = epoch * steps_per_epoch, 0
        for length in lengths:
            begin, end = max(start, first_step - before), start + length
            passed_over = [i for i in range(begin, end) if before + i + 1 in left_out]
            for i in [*passed_over, end]:
                if i > begin:
                    yield Dispatch(epoch, begin, i - begin, before + i, i == steps_per_epoch)
                if i < end:
                    yield Dispatch(epoch, i, 1, before + i + 1, i + 1 == steps_per_epoch, left_out=True)
                begin = i + 1
            start = end


def evaluate(
    forward: Callable, variables: Any, rows: shards.RowSource, *, batch_size: int, num_devices: int
) -> tuple[Any, dict[str, Any]]:
    """Compute the outputs of a function from ``parallel.map_forward`` for all rows of a split, each row once, in order.

    Args:
      forward: takes (variables, {features, present}).
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
    """Make a record for ``metrics.jsonl`` of each step of a dispatch and its metrics [num_steps or more]; wait for them."""
    first = dispatch.end_step - dispatch.num_steps + 1
    if dispatch.left_out:
        return [{"step": first, "epoch": dispatch.epoch, "left_out": True}]
    values = {name: np.asarray(x)[: dispatch.num_steps].tolist() for name, x in metrics.items()}
    return [
        {"step": first + i, "epoch": dispatch.epoch, **{name: x[i] for name, x in values.items()}}
        for i in range(dispatch.num_steps)
    ]
