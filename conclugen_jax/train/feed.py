"""The loop of a training: dispatches of many steps, and the rows that each step takes, wherever they are kept.

With a device table nothing but the position in the stream leaves the host: order, variants and rows of a step are
computed in the compiled program. Without one a thread reads the rows of the next dispatch and sends them off while the
device works on this one.
"""

import dataclasses
import functools
import itertools
import math
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from ml_collections import ConfigDict

from conclugen_jax.data import batches, shards
from conclugen_jax.method import collectives
from conclugen_jax.method.train_state import Metrics, TrainState
from conclugen_jax.system import processes, progress
from conclugen_jax.train import neighbours as neighbours_lib, parallel


def load_rows(config: ConfigDict, stream: shards.ShardStream) -> shards.RowSource:
    """Read the rows of a split to where the configuration keeps them."""
    sizes = {name: config.data[name] for name in ("tier", "device_table_gib", "host_table_gib", "host_cache_gib")}
    with progress.Counter(f"reading {stream.split}") as counter:
        return batches.load(stream, **sizes, progress=counter)


class Dispatch(NamedTuple):
    """Consecutive steps of one epoch that the device does without the host."""

    epoch: int  # counted from 0
    first_step_in_epoch: int  # counted from 0 at the epoch's start
    num_steps: int
    end_step: int  # steps done in the run once this dispatch is
    ends_epoch: bool  # it holds the epoch's last step
    left_out: bool = False  # it is one step that is passed over: nothing but the number of steps changes


@dataclasses.dataclass
class Feed:
    """Batches of a split for a training run; nothing but the neighbours changes, by :meth:`renew`."""

    rows: shards.RowSource
    config: ConfigDict  # ``seed``, and the sections ``train``, ``data`` and ``loss``
    devices: Sequence[jax.Device]  # that share a batch
    keys: Sequence[str] = ("features", "present")  # columns that a step takes
    pairs: Sequence[str] = ()  # modalities of which each visit gets two different stored variants
    neighbours: np.ndarray | None = None  # int32 [num_examples, k], rows that may give a modality; below 0: none

    @property
    def steps_per_epoch(self) -> int:
        """Whole batches of the usable rows."""
        return len(self.rows.usable) // self.config.train.batch_size

    @functools.cached_property
    def lengths(self) -> list[int]:
        """Steps of each dispatch of an epoch, few and equal; without a device table no more than ``data.feed_gib`` holds."""
        most = self.config.train.steps_per_dispatch
        if self.rows.tier != "device":
            row = {key: x for key, x in self.rows.rows(self.rows.usable[:1]).items() if key in self.keys}
            size = sum(x.nbytes for x in jax.tree.leaves(row)) * self.config.train.batch_size
            most = min(most, max(1, int(self.config.data.feed_gib * 2**30 / size)))
        parts = np.array_split(np.arange(self.steps_per_epoch), math.ceil(self.steps_per_epoch / most))
        return [len(part) for part in parts]

    @functools.cached_property
    def table(self) -> Any:
        """The rows on every device, and which of them are drawn from; ``None`` if they stay on the host."""
        if self.rows.tier != "device":
            return None
        columns = {key: self.rows.table[key] for key in self.keys if key != "features"}
        near = {} if self.neighbours is None else {"neighbours": self.neighbours}
        table = parallel.replicate_by_rows(
            {**columns, **near, "usable": self.rows.usable.astype(np.int32)}, self.devices
        )
        if "features" in self.keys:
            features, stored = self.rows.table["features"], jnp.dtype(self.config.data.storage_dtype)
            table["features"] = parallel.replicate_by_rows(features, self.devices, dtype=stored)
        return table

    def renew(self, near: np.ndarray) -> None:
        """Take modalities from other neighbours [num_examples, k] from here on, between two dispatches."""
        self.neighbours = near
        if self.table is not None:
            self.table["neighbours"] = parallel.replicate_by_rows(near, self.devices)

    def plan(self, first_step: int, left_out: Collection[int] = ()) -> Iterator[Dispatch]:
        """Yield all dispatches, of the same lengths in each epoch, from a step to the end of the run.

        Steps that are ``left_out``, counted from 1, are passed over: each is a dispatch of its own. A ``first_step`` that is
        not the end of a dispatch begins with what is left of it.
        """
        steps_per_epoch = sum(self.lengths)
        for epoch in range(first_step // steps_per_epoch, self.config.train.num_epochs):
            before, start = epoch * steps_per_epoch, 0
            for length in self.lengths:
                begin, end = max(start, first_step - before), start + length
                passed_over = [i for i in range(begin, end) if before + i + 1 in left_out]
                for i in [*passed_over, end]:
                    if i > begin:
                        yield Dispatch(epoch, begin, i - begin, before + i, i == steps_per_epoch)
                    if i < end:
                        yield Dispatch(epoch, i, 1, before + i + 1, i + 1 == steps_per_epoch, left_out=True)
                    begin = i + 1
                start = end

    def indices(self, step: int) -> np.ndarray:
        """Return the rows [batch_size] of a step, counted from 1."""
        epoch, first = divmod(step - 1, self.steps_per_epoch)
        sizes = {"num_steps": 1, "batch_size": self.config.train.batch_size}
        return batches.batch_indices(self.rows.usable, first_step=first, **sizes, seed=self.config.seed, epoch=epoch)[0]

    def batch(self, step: int) -> dict[str, Any]:
        """Return what a step, counted from 1, sees of its rows, on the host: leaves [batch_size, ...]."""
        at = {"seed": self.config.seed, "epoch": (step - 1) // self.steps_per_epoch}
        found, stored = self._host_rows(self.indices(step), at), jnp.dtype(self.config.data.storage_dtype)
        features = {m: x.astype(stored).astype(np.float32) for m, x in found["features"].items()}
        return {**found, "features": features}

    def program(self, step: Callable, state_axes: Any = None) -> Callable:
        """Return the program of all dispatches: ``(state, table, position, rows) -> (state, metrics [most steps])``.

        One program serves dispatches of any length, so that a step ``(state, batch) -> (state, metrics)`` is the same code
        in all of them; ``state_axes`` as of ``parallel.map_step``.
        """

        def dispatch(state: TrainState, table: Any, position: Any, rows: Any) -> tuple[TrainState, Metrics]:
            batch_of = self.batches_of(table, position, rows)
            return repeat(step, batch_of, state, position["num_steps"], most_steps=max(self.lengths))

        return parallel.map_step(dispatch, self.devices, state_axes)

    def __call__(self, dispatches: Iterable[Dispatch]) -> Iterator[tuple[Dispatch, Any]]:
        """Yield each dispatch with what its program takes besides the state: (table, position, rows); ``None``: no program."""
        table = self.table

        def inputs(dispatch: Dispatch) -> tuple[Dispatch, Any]:
            if dispatch.left_out:
                return dispatch, None
            epoch, first_step, num_steps, *_ = dispatch
            position = {"seed": self.config.seed, "epoch": epoch, "first_step": first_step, "num_steps": num_steps}
            own = len(parallel.own_devices(self.devices))
            position = {name: np.full(own, value, np.int32) for name, value in position.items()}
            rows = None if table is not None else self._rows_of(dispatch)
            return dispatch, (table, parallel.shard(position, self.devices), rows)

        # No row is read ahead of the state that its neighbours follow from.
        for _, part in itertools.groupby(dispatches, lambda x: neighbours_lib.refreshes(self.config, x.epoch)):
            yield from batches.prefetch(inputs, part, depth=1)

    def batches_of(self, table: Any, position: Mapping[str, jax.Array], rows: Any) -> Callable[[jax.Array], Any]:
        """Inside the program: the function that gives this device's rows of step i of the dispatch."""
        if table is None:
            return lambda i: _full(jax.tree.map(lambda x: jax.lax.dynamic_index_in_dim(x, i, keepdims=False), rows))
        # The seed is an argument: one program serves runs that differ in it alone.
        batch_size, seed, epoch = self.config.train.batch_size, position["seed"], position["epoch"]
        own = batch_size // len(self.devices)
        order = table["usable"][batches.epoch_order(seed, epoch, table["usable"].shape[0], xp=jnp)]

        def batch_of(i: jax.Array) -> Any:
            start = (position["first_step"] + i) * batch_size + collectives.device_index(parallel.AXIS) * own
            indices = jax.lax.dynamic_slice_in_dim(order, start, own)
            at = {"seed": seed, "epoch": epoch, "xp": jnp}
            of = dict.fromkeys(table.get("features", ()), indices)
            if self.neighbours is not None:
                candidates = self._candidates(indices, table["neighbours"][indices], at)
                both = {m: table["present"][m][indices] & table["present"][m][rows] for m, rows in candidates.items()}
                of = {m: jnp.where(both[m], rows, indices) for m, rows in candidates.items()}
            variants = self._variants(indices, of, at)
            return _full(take_rows({key: table[key] for key in self.keys}, indices, variants, of))

        return batch_of

    def _rows_of(self, dispatch: Dispatch) -> Any:
        """Rows [devices, steps, n, ...] of this process's devices; a short dispatch is filled up with its first step."""
        at = {"seed": self.config.seed, "epoch": dispatch.epoch}
        steps = {"first_step": dispatch.first_step_in_epoch, "num_steps": dispatch.num_steps}
        indices = batches.batch_indices(self.rows.usable, **steps, batch_size=self.config.train.batch_size, **at)
        indices = np.concatenate([indices, np.repeat(indices[:1], max(self.lengths) - len(indices), axis=0)])
        own = list(parallel.own_devices(self.devices))
        indices = np.hstack([np.hsplit(indices, len(self.devices))[i] for i in own])
        indices, shape = indices.reshape(-1), indices.shape
        rows = self._host_rows(indices, at)
        if "features" in rows:
            stored = jnp.dtype(self.config.data.storage_dtype)
            rows["features"] = {m: x.astype(stored, copy=False) for m, x in rows["features"].items()}
        stacked = batches.map_arrays(lambda x: x.reshape(*shape, *x.shape[1:]), rows)
        return parallel.shard(parallel.split_rows(stacked, len(own), axis=1), self.devices)

    def _host_rows(self, indices: np.ndarray, at: Mapping[str, Any]) -> dict[str, Any]:
        found = self.rows.rows(indices, self._variants(indices, {}, at))
        if self.neighbours is not None:
            features = dict(found["features"])
            for m, rows in self._candidates(indices, self.neighbours[indices], at).items():
                others = self.rows.rows(
                    rows, {k: v for k, v in self._variants(indices, {m: rows}, at).items() if k == m}
                )
                both = found["present"][m] & others["present"][m]
                both = both.reshape(-1, *(1,) * (features[m].ndim - 1))
                features[m] = np.where(both, others["features"][m], features[m])
            found = {**found, "features": features}
        return {key: x for key, x in found.items() if key in self.keys}

    def _candidates(self, indices: Any, near: Any, at: Mapping[str, Any]) -> dict[str, Any]:
        """Return modality -> rows that may give it in place of the rows themselves, by the draw of an epoch."""
        probability = self.config.loss.neighbour_probability
        return batches.neighbour_choices(indices, near, self.config.data.modalities, probability=probability, **at)

    def _variants(self, indices: Any, of: Mapping[str, Any], at: Mapping[str, Any]) -> dict[str, Any]:
        """Return modality -> stored variant; rows ``of`` a modality may be others than the indices."""
        found = {}
        for m, number in self.rows.variants.items():
            found |= batches.variant_choices(of.get(m, indices), {m: number}, pairs=self.pairs, **at)
        return found


def repeat(
    step: Callable, batch_of: Callable, state: TrainState, num_steps: jax.Array, *, most_steps: int
) -> tuple[TrainState, Metrics]:
    """Take steps ``(state, batch_of(i))`` inside a compiled program; metrics [most_steps] are 0 beyond ``num_steps``."""
    step = jax.jit(step, inline=True)  # traced once, for the shapes of its metrics and for the loop
    _, like = jax.eval_shape(step, state, jax.eval_shape(batch_of, jnp.int32(0)))

    def body(i: jax.Array, carry: tuple[TrainState, Metrics]) -> tuple[TrainState, Metrics]:
        state, history = carry
        state, metrics = step(state, batch_of(i))
        return state, jax.tree.map(lambda all_steps, x: all_steps.at[i].set(x), history, metrics)

    history = jax.tree.map(lambda x: jnp.zeros((most_steps, *x.shape), x.dtype), like)
    return jax.lax.fori_loop(0, num_steps, body, (state, history))


def _full(batch: Any) -> Any:
    """Return a batch with features in float32, however they were stored."""
    features = {m: x.astype(jnp.float32) for m, x in batch.get("features", {}).items()}
    return {**batch, **({"features": features} if features else {})}


def take_rows(
    table: Any, indices: jax.Array, variants: Mapping[str, jax.Array], of: Mapping[str, jax.Array] | None = None
) -> Any:
    """Rows of a table on the device: indices [n], and the stored variant of modalities that have several.

    ``of``: modality -> rows [n] whose features are taken, where these are others.
    """

    def take(x: jax.Array, *where: jax.Array) -> jax.Array:
        return x.at[where].get(mode="promise_in_bounds")

    rows = jax.tree.map(lambda x: take(x, indices), {key: x for key, x in table.items() if key != "features"})
    if "features" in table:
        of = {m: (of or {}).get(m, indices) for m in table["features"]}
        where = {m: (batches.per_variant(of[m], variants[m]), variants[m]) if m in variants else (of[m],) for m in of}
        rows["features"] = {m: take(x, *where[m]) for m, x in table["features"].items()}
    return rows


def evaluate(
    forward: Callable, variables: Any, rows: shards.RowSource, *, batch_size: int, num_devices: int
) -> tuple[Any, dict[str, Any]]:
    """Compute ``forward(variables, {features, present})`` for all rows of a split, each once, in order, in batches.

    The function is from ``parallel.map_forward`` for the ``num_devices`` of this process, which have the variables; the batch
    is a multiple of the number of all devices. The outputs [num_examples, ...] come with {``present``, ``label``} of the same
    rows. Of several processes each reads and computes its share of a batch.
    """

    def of(indices: np.ndarray) -> tuple[Any, dict[str, Any]]:
        batch = rows.rows(indices)
        inputs = {"features": batch["features"], "present": batch["present"]}
        outputs = parallel.merge_rows(forward(variables, parallel.split_rows(inputs, num_devices)))
        return outputs, {"present": batch["present"], "label": batch["label"]}

    parts = []
    for indices, count in batches.evaluation_batches(np.arange(rows.num_examples), batch_size):
        parts.append(jax.tree.map(lambda x, n=count: x[:n], processes.shared(of, indices)))
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
