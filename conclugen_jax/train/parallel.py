"""Devices: the mapped step, replication, the rows that each device gets. The only file that knows pmap.

The optimizer's update is done on every device as a whole, or split over the devices (ZeRO, stage 1).
"""

import collections
import ctypes
import functools
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.experimental import multihost_utils
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from ml_collections import ConfigDict

from conclugen_jax.data.manifest import Manifest
from conclugen_jax.errors import ConclugenError
from conclugen_jax.method import collectives
from conclugen_jax.method.train_state import TrainState
from conclugen_jax.runs import config as config_lib
from conclugen_jax.system import processes

AXIS = "devices"

MATMUL_PRECISION = {"float32": "highest", "tensorfloat32": "tensorfloat32", "bfloat16": "tensorfloat32"}
"""config.precision -> precision of float32 matrix products. GPUs would use TensorFloat-32 unasked. The bfloat16 mode
casts the networks' operands itself; what is left in float32 (similarities) takes TensorFloat-32."""


def map_step(step: Callable, devices: Sequence[jax.Device], state_axes: Any = None) -> Callable:
    """Compile ``step(state, table, position, rows) -> (state, metrics)`` for several devices.

    State and table are the same on every device; ``position`` and ``rows`` have a leading axis of devices, and so have
    leaves of the state where ``state_axes`` has a 0. The state is donated. What else comes back must be equal on all devices
    (the test "one device equals eight" checks that), since only the first device's copy is kept.
    """
    axes = {"in_axes": (state_axes, None, 0, 0), "out_axes": None if state_axes is None else (state_axes, None)}
    return jax.pmap(step, axis_name=AXIS, devices=list(devices), **axes, donate_argnums=0)


def compiled(program: Callable, *arguments: Any) -> Any:
    """Compile a mapped program for some arguments, and give back the host's memory that the compiler took."""
    ready = program.lower(*arguments).compile()
    if hasattr(libc := ctypes.CDLL(None), "malloc_trim"):  # of glibc; else the memory stays with this process
        libc.malloc_trim(0)
    return ready


def map_forward(forward: Callable, devices: Sequence[jax.Device]) -> Callable:
    """Compile ``forward(variables, batch) -> outputs``: variables replicated, rows split over devices."""
    return jax.pmap(forward, axis_name=AXIS, devices=list(devices), in_axes=(None, 0))


def own_devices(devices: Sequence[jax.Device]) -> dict[int, jax.Device]:
    """Those of this process by their positions on the axis."""
    return {i: device for i, device in enumerate(devices) if device.process_index == jax.process_index()}


def replicate(tree: Any, devices: Sequence[jax.Device]) -> Any:
    """Put one copy of every leaf on every device; of several processes each has the leaves, and puts its own copies."""
    return _put(tree, devices, PartitionSpec(), lambda x, count: [x] * count)


def shard(tree: Any, devices: Sequence[jax.Device]) -> Any:
    """Put part i of the leading axis of every leaf on device i; of several processes each has the parts of its own."""
    return _put(tree, devices, PartitionSpec(AXIS), np.split)


def by_rows(forward: Callable, rows: Any) -> Any:
    """Return ``forward(rows)``, compiled, of a tree of arrays [n, ...] on the host, shared by the devices of this process."""
    devices, count = jax.local_devices(), len(jax.tree.leaves(rows)[0])
    if len(devices) > 1:
        filled = np.minimum(np.arange(count + -count % len(devices)), count - 1)
        rows = shard(jax.tree.map(lambda x: np.asarray(x)[filled], rows), devices)
    return jax.tree.map(lambda x: np.asarray(x)[:count], forward(rows))


def along(axis: int | None) -> PartitionSpec:
    """Return the layout of arrays of which each device has a part along an axis; ``None``: all have the same."""
    return PartitionSpec() if axis is None else PartitionSpec(*[None] * axis, AXIS)


def in_parts(
    function: Callable, devices: Sequence[jax.Device], in_specs: Any, out_specs: Any, **options: Any
) -> Callable:
    """Compile a function of which each device does a part, with layouts by :func:`along` and options of ``jax.jit``."""
    layouts = {"mesh": Mesh(np.array(devices), (AXIS,)), "in_specs": in_specs, "out_specs": out_specs}
    return jax.jit(jax.shard_map(function, **layouts, check_vma=False), **options)


def spread(tree: Any, devices: Sequence[jax.Device], axis: int) -> Any:
    """Put a part of every leaf along an axis on each device; each process has the leaves as a whole."""
    sharding = NamedSharding(Mesh(np.array(devices), (AXIS,)), along(axis))
    return jax.tree.map(lambda x: jax.make_array_from_callback(x.shape, sharding, lambda at: x[at]), tree)


def on_host(tree: Any) -> Any:
    """Copy arrays from the devices of all processes to the host of each."""

    def copy(x: Any) -> np.ndarray:
        there = getattr(x, "is_fully_addressable", True) or x.is_fully_replicated
        return np.asarray(x if there else multihost_utils.process_allgather(x, tiled=True))

    return jax.tree.map(copy, tree)


def _put(tree: Any, devices: Sequence[jax.Device], spec: PartitionSpec, split: Callable[[Any, int], list]) -> Any:
    sharding = NamedSharding(Mesh(np.array(devices), (AXIS,)), spec)
    own = list(own_devices(devices).values())
    tree = jax.tree.map(lambda x: x if getattr(x, "is_fully_addressable", True) else x.addressable_data(0), tree)
    if len(own) == len(devices):
        return jax.device_put(tree, sharding)

    def put(x: Any) -> jax.Array:
        parts = jax.device_put(split(x, len(own)), own)
        shape = parts[0].shape if spec == PartitionSpec() else (len(devices), *parts[0].shape[1:])
        return jax.make_array_from_single_device_arrays(shape, sharding, parts)

    return jax.tree.map(put, tree)


def replicate_by_rows(tree: Any, devices: Sequence[jax.Device], *, chunk_bytes: int = 2**26, dtype: Any = None) -> Any:
    """Like :func:`replicate` for tables [n, ...] on the host, a chunk of rows at a time, optionally rounded to a type.

    The host needs no more than a chunk beside the tables, which may be memory-mapped files larger than its memory.
    """
    sharding = NamedSharding(Mesh(np.array(devices), (AXIS,)), PartitionSpec())
    update = functools.partial(jax.lax.dynamic_update_slice_in_dim, axis=0)
    fill = jax.jit(update, donate_argnums=0, out_shardings=sharding)

    def put(x: np.ndarray) -> jax.Array:
        rows = max(1, chunk_bytes // max(1, x[:1].nbytes))
        if len(x) <= rows:
            return replicate(np.asarray(x, dtype), devices)
        kind = jax.dtypes.canonicalize_dtype(x.dtype if dtype is None else dtype)
        table = jax.jit(lambda: jnp.zeros(x.shape, kind), out_shardings=sharding)()
        for start in range(0, len(x), rows):
            start = min(start, len(x) - rows)  # chunks of one size need one program; the last two may overlap
            table = fill(table, replicate(np.array(x[start : start + rows], dtype), devices), start)
        return table.block_until_ready()

    return jax.tree.map(put, tree)


class Largest:
    """The largest of a number that each process gives, the same on all of them at the same call."""

    def __init__(self, devices: Sequence[jax.Device]):
        self._devices, self._own, self._sent = devices, len(own_devices(devices)), 0
        self._program = jax.pmap(lambda x: jax.lax.pmax(x, AXIS), axis_name=AXIS, devices=list(devices), out_axes=None)

    def __call__(self, number: int) -> int:
        """Return what this call is for a process alone; of several the result is a call late, so that none waits for it."""
        if self._own == len(self._devices):
            return number
        before, self._sent = self._sent, self._program(shard(np.full(self._own, number), self._devices))
        return int(before)


def check_alike(config: ConfigDict, manifest: Manifest, **facts: Any) -> None:
    """Refuse processes that would not do the same with the same data, on as many devices each.

    ``facts``: JSON values that are compared besides.
    """
    if not processes.several():
        return
    counts = collections.Counter(device.process_index for device in jax.devices())
    if len(set(counts.values())) > 1:
        listed = ", ".join(str(counts[i]) for i in sorted(counts))
        raise ConclugenError(f"the processes have {listed} devices; give each as many")
    own = {"config": config.to_dict(), "data": f"{manifest.name} {manifest.version} {manifest.fingerprint()}"}
    own["facts"] = facts
    main = processes.json_of_main(own)
    different = config_lib.differences(config_lib.from_tree(main["config"], "process 0"), config)
    # Each machine may have the data or a checkpoint elsewhere: they are compared by content.
    places = "config.data.path:", "config.data.test_paths:", "config.downstream.checkpoint:"
    different = [line for line in different if not line.startswith(places)]
    if main["data"] != own["data"]:
        different.append(f"{config.data.path}: not the data set {manifest.name} {manifest.version} of process 0")
    different += [f"{name}: {main['facts'][name]} -> {x}" for name, x in facts.items() if x != main["facts"][name]]
    if different:
        listed = "; ".join(different)
        raise ConclugenError(
            f"this process differs from process 0 ({listed}); start all with the same command and data"
        )
    processes.wait()  # nothing is written before all agree


def split_rows(tree: Any, num_devices: int, axis: int = 0) -> Any:
    """Cut an axis of every leaf into consecutive parts, one per device: [..., n, ...] -> [devices, ..., n / devices, ...]."""

    def split(x: np.ndarray) -> np.ndarray:
        x = np.asarray(x)
        parts = x.reshape(*x.shape[:axis], num_devices, x.shape[axis] // num_devices, *x.shape[axis + 1 :])
        return np.moveaxis(parts, axis, 0)

    return jax.tree.map(split, tree)


def merge_rows(tree: Any) -> Any:
    """[devices, n, ...] on devices -> [devices * n, ...] on the host."""
    return jax.tree.map(lambda x: np.asarray(x).reshape(-1, *x.shape[2:]), tree)


def update(
    optimizer: optax.GradientTransformationExtraArgs,
    grads: Any,
    opt_state: Any,
    params: Any,
    *,
    split: bool,
    axis_name: str | None,
    **extra: Any,
) -> tuple[Any, Any, jax.Array]:
    """Return new parameters from this device's gradients, the optimizer's state, and the norm of the mean gradient.

    Split, each device gets the mean over devices of its part of every gradient, moves its part of the parameters with its
    part of the moments, as :func:`place` puts them, and the parts are gathered: the traffic of one sum over devices,
    1/devices of the moments and of the work. The update of a parameter must not depend on other parameters.

    References:
      Rajbhandari et al., "ZeRO: Memory optimizations toward training trillion parameter models", 2020.
    """
    count = collectives.device_count(axis_name)
    if not split or count == 1:
        grads = collectives.mean(grads, axis_name)
        updates, opt_state = optimizer.update(grads, opt_state, params, **extra)
        return optax.apply_updates(params, updates), opt_state, optax.tree.norm(grads)

    def mean_part(gradient: jax.Array) -> jax.Array:
        return jax.lax.psum_scatter(_parts(gradient, count, jnp), axis_name, scatter_dimension=0) / count

    def own_part(x: jax.Array) -> jax.Array:
        return jax.lax.dynamic_index_in_dim(_parts(x, count, jnp), jax.lax.axis_index(axis_name), keepdims=False)

    def joined(part: jax.Array, like: jax.Array) -> jax.Array:
        return jax.lax.all_gather(part, axis_name, tiled=True)[: like.size].reshape(like.shape)

    grads, own = jax.tree.map(mean_part, grads), jax.tree.map(own_part, params)
    updates, opt_state = optimizer.update(grads, opt_state, own, **extra)
    moved = optax.apply_updates(own, updates)
    squared = sum(jnp.sum(jnp.square(g)) for g in jax.tree.leaves(grads))
    return jax.tree.map(joined, moved, params), opt_state, jnp.sqrt(collectives.total(squared, axis_name))


def _parts(x: Any, count: int, xp: Any) -> Any:
    """Split an array, flat and padded with zeros, into equal parts: [...] -> [count, part]."""
    flat = x.reshape(-1)
    return xp.pad(flat, (0, -flat.size % count)).reshape(count, -1)


def axes(state: TrainState, config: ConfigDict, devices: Sequence[jax.Device]) -> TrainState | None:
    """Say which leaves of a state have parts on the devices (0), the moments, and which are the same on all (``None``)."""
    if not config.optimizer.shard or len(devices) == 1:
        return None
    nowhere = jax.tree.map(lambda _: None, state)
    return nowhere.replace(opt_state=jax.tree.map(lambda x: 0 if x.ndim else None, state.opt_state))


def place(state: TrainState, config: ConfigDict, devices: Sequence[jax.Device]) -> TrainState:
    """Put a state on the devices; each moment [...] of a split update as [devices, part], a part on each."""
    if axes(state, config, devices) is None:
        return replicate(state, devices)
    own = list(own_devices(devices))

    def split(x: Any) -> jax.Array:
        return shard(_parts(np.asarray(x), len(devices), np)[own], devices)

    others = replicate(state.replace(opt_state=None), devices)
    moments = jax.tree.map(lambda x: split(x) if x.ndim else replicate(x, devices), state.opt_state)
    return others.replace(opt_state=moments)


def whole(state: TrainState, optimizer: optax.GradientTransformation) -> TrainState:
    """Join the moments of a split update on the host, so that any number of devices can resume."""

    def join(x: jax.Array, like: jax.Array) -> Any:
        return on_host(x).reshape(-1)[: like.size].reshape(like.shape)

    return state.replace(opt_state=jax.tree.map(join, state.opt_state, jax.eval_shape(optimizer.init, state.params)))
