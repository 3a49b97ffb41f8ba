"""Devices: the mapped step, replication, and the rows that each device gets. The only file that knows pmap."""

import ctypes
import functools
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

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


def _put(tree: Any, devices: Sequence[jax.Device], spec: PartitionSpec, split: Callable[[Any, int], list]) -> Any:
    sharding = NamedSharding(Mesh(np.array(devices), (AXIS,)), spec)
    own = list(own_devices(devices).values())
    if len(own) == len(devices):
        return jax.device_put(tree, sharding)

    def put(x: Any) -> jax.Array:
        parts = jax.device_put(split(x, len(own)), own)
        shape = parts[0].shape if spec == PartitionSpec() else (len(devices), *parts[0].shape[1:])
        return jax.make_array_from_single_device_arrays(shape, sharding, parts)

    return jax.tree.map(put, tree)


def replicate_by_rows(tree: Any, devices: Sequence[jax.Device], *, chunk_bytes: int = 2**26, dtype: Any = None) -> Any:
    """Like :func:`replicate` for tables [n, ...] on the host, a chunk of rows at a time, by choice rounded to a type.

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
