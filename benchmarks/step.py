"""Our pretraining step as training runs it, for the benchmarks: answers requests as benchmarks/sides.py describes.

All timed steps are one dispatch over a table on the device: k-means over a full queue, all three losses, AdamW.
"""

import functools
import json
import sys
import time
import types
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from benchmarks import sides
from conclugen_jax import pretrain
from conclugen_jax.data.batches import HostTable
from conclugen_jax.method import clustering, model as model_lib, train_state
from conclugen_jax.train import feed, neighbours, optimizer, parallel
from configs import base

PAPER = {
    "dims": {"video": 4096, "audio": 1024, "text": 768},
    "representation_dim": 4096,
    "reconstruction_dim": 1024,
}
SMALL = {"dims": {"video": 512, "audio": 512, "text": 512}, "representation_dim": 512, "reconstruction_dim": 512}


PRODUCTS = {"bfloat16": jnp.bfloat16, "float8": jnp.float8_e4m3fn}
"""Name -> type of the factors of a plain product; others: float32."""


def flops(batch: int) -> float:
    """Floating-point operations of a step at the paper's sizes, forward and backward, nothing counted twice.

    2 n (3 (120.08e6 + 1536 n) - 20.97e6): a product costs 2 per weight and row, and twice that in the backward pass,
    save for the gradients of the inputs, which are not needed; 1,536 per pair of rows are the similarities.
    """
    return 2 * batch * (3 * (120.08e6 + 1536 * batch) - 20.97e6)


class Trainer:
    """The program of a dispatch and its state."""

    def __init__(self, *, batch: int, dims: dict, representation_dim: int, reconstruction_dim: int, **options: Any):
        config = base.get_config()
        config.train.batch_size, config.model.representation_dim = batch, representation_dim
        config.model.reconstruction_dim, config.precision = reconstruction_dim, options.get("precision", "float32")
        config.encoder_chunk_size = options.get("encoder_chunk_size", 0)
        config.clustering.num_clusters = options.get("num_clusters", config.clustering.num_clusters)
        config.train.steps_per_dispatch = 10**4
        devices = jax.devices()[:1]
        rng, rows = np.random.default_rng(0), options.get("rows") or 2 * batch
        table = {
            "features": {m: _random(rng, rows, d) for m, d in dims.items()},
            "present": {m: np.ones(rows, bool) for m in dims},
            "label": np.zeros(rows, np.int32),
        }
        self.feed = feed.Feed(HostTable(table, np.arange(rows), tier="device"), config, devices)
        model = model_lib.from_config(config, dims, parallel.AXIS)
        make, schedule = optimizer.from_config(config, steps_per_epoch=10**6)
        state = train_state.create(
            model_lib.initial_variables(model, jax.random.key(0), None),
            make,
            jax.random.key(1),
            queue_length=4 * batch,
            num_clusters=config.clustering.num_clusters,
        )
        queue = jax.random.normal(jax.random.key(2), state.queue.shape)
        # Step 1 of an epoch of a million: the queue is full and is not emptied.
        self.state = parallel.replicate(
            state.replace(step=jnp.int32(1), queue=queue, queue_batches=jnp.int32(4)), devices
        )
        step = functools.partial(
            pretrain.pretrain_step,
            model=model,
            optimizer=make,
            schedule=schedule,
            config=config,
            steps_per_epoch=10**6,
            cluster=True,
            axis_name=parallel.AXIS,
        )
        self.precision = parallel.MATMUL_PRECISION[config.precision]
        self.table_gib = sum(x.nbytes for x in jax.tree.leaves(self.feed.table)) / 2**30
        position = {
            k: np.asarray([v], np.int32) for k, v in {"seed": 0, "epoch": 0, "first_step": 0, "num_steps": 1}.items()
        }
        self.inputs = self.feed.table, position, None
        start = time.perf_counter()
        with jax.default_matmul_precision(self.precision):
            self.program = parallel.compiled(self.feed.program(step), self.state, *self.inputs)
        self.compilation_seconds = time.perf_counter() - start

    def steps(self, number: int) -> dict[str, Any]:
        """Run some steps, an epoch a dispatch; the metrics of the last one."""
        table, position, rows = self.inputs
        metrics, most = None, self.feed.steps_per_epoch
        for first in range(0, number, most):
            count = np.full(1, min(most, number - first), np.int32)
            self.state, metrics = self.program(self.state, table, {**position, "num_steps": count}, rows)
        return jax.block_until_ready((self.state, metrics))[1]


_trainer: tuple[str, Trainer] | None = None


def trainer(**options: Any) -> Trainer:
    """The trainer of these options, kept until others are asked for."""
    global _trainer
    key = json.dumps(options)
    if _trainer is None or _trainer[0] != key:
        _trainer = None
        _trainer = key, Trainer(**options)
    return _trainer[1]


def _random(rng: np.random.Generator, rows: int, dim: int) -> np.ndarray:
    """Features [rows, dim]; from so many rows on that drawing them all would take long, the same ones again."""
    return np.resize(np.maximum(rng.standard_normal((min(rows, 8192), dim), np.float32), 0), (rows, dim))


def time_steps(steps: int, **options: Any) -> dict[str, Any]:
    """Seconds of a step, mean over consecutive ones, without compilation."""
    options.pop("compiled", None)
    ready = trainer(**options)
    start = time.perf_counter()
    metrics = ready.steps(steps)
    seconds = (time.perf_counter() - start) / steps
    temporary = ready.program.memory_analysis().temp_size_in_bytes / 2**30
    found = {"compilation_seconds": ready.compilation_seconds, "temporary_gib": temporary, "table_gib": ready.table_gib}
    return {"seconds": seconds, "kmeans_iterations": int(metrics["kmeans/iterations"][0]), **found, **memory()}


def time_epochs(number: int, **options: Any) -> dict[str, Any]:
    """Seconds of whole epochs, a dispatch each, without compilation."""
    ready = trainer(**options)
    table, position, rows = ready.inputs
    steps = np.full(1, ready.feed.steps_per_epoch, np.int32)
    start = time.perf_counter()
    for epoch in range(number):
        now = {**position, "epoch": np.full(1, epoch, np.int32), "num_steps": steps}
        ready.state, metrics = ready.program(ready.state, table, now, rows)
    jax.block_until_ready((ready.state, metrics))
    seconds = time.perf_counter() - start
    samples = number * ready.feed.steps_per_epoch * options["batch"]
    return {"seconds": seconds, "samples_per_second": samples / seconds, **memory()}


def time_kmeans(points: int, iterations: int, dim: int = 8) -> dict[str, Any]:
    """Seconds of Lloyd with a set number of iterations, mean over fits one after another in one program."""
    x, number = jax.random.normal(jax.random.key(0), (points, dim)), 10
    fits = _kmeans(iterations, number)
    fits(x).block_until_ready()
    start = time.perf_counter()
    fits(x).block_until_ready()
    return {"seconds": (time.perf_counter() - start) / number}


@functools.cache
def _kmeans(iterations: int, number: int) -> Any:
    def fit(i: jax.Array, centroids: jax.Array, x: jax.Array) -> jax.Array:
        start = jax.lax.dynamic_slice_in_dim(x, i, len(centroids)) + 0 * centroids
        return clustering.lloyd(x, start, max_iterations=iterations, tolerance=-1.0).centroids

    return jax.jit(lambda x: jax.lax.fori_loop(0, number, functools.partial(fit, x=x), x[: x.shape[1]]))


def time_neighbours(rows: int, space: str, *, dims: dict, representation_dim: int, **_: Any) -> dict[str, Any]:
    """Seconds of the table of the five nearest rows of other persons, of a hundred, as a run makes it; compiled and first."""
    config, rng = base.get_config(), np.random.default_rng(0)
    config.loss.neighbours, config.model.representation_dim = 5, representation_dim
    features, present = {m: _random(rng, rows, d) for m, d in dims.items()}, {m: np.ones(rows, bool) for m in dims}
    table = HostTable({"features": features, "present": present, "label": np.zeros(rows, np.int32)}, np.arange(rows))
    model = model_lib.from_config(config, dims)
    variables = model_lib.initial_variables(model, jax.random.key(0), None) if space == "representation" else None
    stream = types.SimpleNamespace(names=lambda at: (at.astype(str), (at % 100).astype(str)))
    search, taken = neighbours.Search(config, stream, table), []
    for _ in range(2):
        start = time.perf_counter()
        if space == "representation":
            vectors = neighbours.represented(model, variables, table)
            search(vectors, unit_bank=jnp.asarray(vectors))
        else:
            search(neighbours.fused(table.table, lambda m: {"mean": np.float32(0), "scale": np.float32(1)}))
        taken.append(time.perf_counter() - start)
    return {"seconds": taken[1], "first_seconds": taken[0], **memory()}


def time_matmul(rows: int = 4096, repeats: int = 3, precision: str = "float32") -> dict[str, Any]:
    """Rate of a plain product [rows, 4096] x [4096, 4096], one after another in one program."""
    dtype = PRODUCTS.get(precision, jnp.float32)
    a, b = (jax.random.normal(jax.random.key(i), (n, 4096), dtype) / 64 for i, n in ((3, rows), (4, 4096)))
    products = _products(repeats, precision)
    products(a, b).block_until_ready()
    start = time.perf_counter()
    products(a, b).block_until_ready()
    return {"gflops": repeats * 2 * rows * 4096**2 / (time.perf_counter() - start) / 1e9}


@functools.cache
def _products(number: int, precision: str) -> Any:
    options = {"precision": parallel.MATMUL_PRECISION.get(precision)}
    if precision == "float8":
        options = {"preferred_element_type": jnp.bfloat16}
    product = functools.partial(jnp.matmul, **options)
    return jax.jit(lambda a, b: jax.lax.fori_loop(0, number, lambda _, x: product(x, b).astype(x.dtype), a))


def fp8_error() -> dict[str, float]:
    """Relative error of a product of 4,096 terms whose factors are rounded to fp8, and to bfloat16."""
    a, b = (jax.random.normal(jax.random.key(i), (1024, 4096)) for i in (3, 4))
    exact = jnp.matmul(a, b.T, precision="highest")

    def error(dtype: Any) -> float:
        rounded = (x.astype(dtype).astype(jnp.float32) for x in (a, b.T))
        return float(jnp.linalg.norm(jnp.matmul(*rounded, precision="highest") - exact) / jnp.linalg.norm(exact))

    return {name: error(dtype) for name, dtype in PRODUCTS.items()}


def memory() -> dict[str, Any]:
    """Highest memory of the device so far, GiB, where it tells."""
    stats = jax.local_devices()[0].memory_stats() or {}
    return {"device_gib": stats["peak_bytes_in_use"] / 2**30} if "peak_bytes_in_use" in stats else {}


def versions() -> dict[str, Any]:
    """What ran where."""
    device = jax.devices()[0]
    return {"framework": f"jax {jax.__version__}", "device": device.device_kind, "python": sys.version.split()[0]}


if __name__ == "__main__":
    answers = {
        "step": time_steps,
        "epochs": time_epochs,
        "kmeans": time_kmeans,
        "neighbours": time_neighbours,
        "matmul": time_matmul,
        "fp8_error": fp8_error,
        "versions": versions,
    }
    sides.serve(answers | {"peak": sides.peak, "forget_peak": sides.forget_peak})
