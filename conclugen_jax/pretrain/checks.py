"""Whether an installation can train: each check says what was found and, if it is wrong, what to do."""

import os
import shutil
import tempfile
import time
from collections.abc import Callable, Iterator
from importlib import metadata
from pathlib import Path
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from ml_collections import ConfigDict
from packaging.requirements import Requirement

from conclugen_jax import pretrain
from conclugen_jax.data import builders, digits, shards
from conclugen_jax.errors import reason
from conclugen_jax.method import collectives
from conclugen_jax.runs import checkpoint
from conclugen_jax.system import environment, files, locks
from conclugen_jax.train import parallel

ON_DEVICES = {"collective", "product", "training"}
"""Checks that are skipped where JAX finds no device."""


class Finding(NamedTuple):
    """What a check found."""

    check: str  # its name
    status: str  # ``ok``, ``warning`` or ``failed``
    found: str  # a sentence
    fix: str = ""  # what to do about it; empty if nothing is wrong


def examine(config: ConfigDict, *, data: str | None, workdir: Path) -> Iterator[Finding]:
    """Make all checks, one after another, whatever one of them raises.

    The trial run has this configuration, at tiny sizes and on other data. ``data`` is the folder of a data set to verify, and
    the disk of ``workdir`` is tried.
    """
    checks: dict[str, Callable[[], Finding]] = {"packages": packages, "environment": variables, "devices": devices}
    checks |= {"collective": collective, "product": product, "disk": lambda: disk(workdir)}
    checks["compile cache"] = compile_cache
    if data is not None:
        checks["data"] = lambda: dataset(data)
    checks["training"] = lambda: training(config)
    without: set[str] = set()  # checks that cannot be made
    for name, check in checks.items():
        if name in without:
            continue
        try:
            yield check()
        except Exception as e:  # whatever is wrong is what is to be said
            found = environment.fault(e) or f"{type(e).__name__}: {reason(e)}"
            yield Finding(name, "failed", found, "correct what this says and repeat")
            without |= ON_DEVICES if name == "devices" else set()


def packages() -> Finding:
    """Versions against what this package asks for."""
    wrong, found, way_out = [], {}, "pip install -c constraints.txt -e ."
    try:
        required = [Requirement(line) for line in metadata.requires("conclugen_jax") or []]
    except metadata.PackageNotFoundError:
        text = f"jax {jax.__version__}; conclugen_jax runs from its folder, so that versions were not compared"
        return Finding("packages", "warning", text, way_out)
    for one in required:
        if one.marker is not None and not one.marker.evaluate({"extra": ""}):
            continue
        try:
            found[one.name] = metadata.version(one.name)
        except metadata.PackageNotFoundError:
            wrong.append(f"{one.name} is missing")
            continue
        if not one.specifier.contains(found[one.name], prereleases=True):
            wrong.append(f"{one.name} is {found[one.name]}, {one.specifier} is needed")
    if wrong:
        return Finding("packages", "failed", "; ".join(wrong), way_out)
    shown = [f"{name} {version}" for name, version in found.items() if name in ("jax", "flax", "optax", "numpy")]
    return Finding("packages", "ok", ", ".join(shown))


def variables() -> Finding:
    """Variables of the environment that have no effect on commands, or a bad one."""
    if environment.notes:
        return Finding("environment", "warning", "; ".join(environment.notes), "unset or correct these variables")
    return Finding("environment", "ok", "no variable is ignored")


def devices() -> Finding:
    """Devices that JAX sees, and GPUs that it does not."""
    first, kinds = jax.devices()[0], {f"{d.platform} {d.device_kind}" for d in jax.devices()}
    memory = (first.memory_stats() or {}).get("bytes_limit")
    room = f", {memory / 2**30:.0f} GiB each" if memory else ""
    found = f"{len(jax.devices())} x {', '.join(sorted(kinds))}{room}"
    if first.platform == "cpu" and (Path("/dev/nvidia0").exists() or Path("/proc/driver/nvidia").exists()):
        hidden = [f"{n}={os.environ[n]}" for n in ("CUDA_VISIBLE_DEVICES", *environment.PLATFORMS) if n in os.environ]
        way_out = f"unset {' and '.join(hidden)}" if hidden else "pip install '.[cuda]'"
        return Finding("devices", "warning", f"{found}; there is a GPU that JAX does not see", way_out)
    return Finding("devices", "ok", found)


def collective() -> Finding:
    """Check a sum over all devices."""
    count = len(jax.devices())
    ranks = parallel.map_forward(
        lambda _, x: collectives.total(x, parallel.AXIS) + 0 * collectives.device_index(parallel.AXIS), jax.devices()
    )(None, np.arange(1, jax.local_device_count() + 1, dtype=np.float32))
    expected = count * (count + 1) / 2
    if not np.array_equal(np.asarray(ranks), np.full(count, expected)):
        found = f"a sum over devices is {ranks}, not {expected}"
        return Finding("collective", "failed", found, "check driver and NCCL")
    return Finding("collective", "ok", f"a sum over {count} device(s) is right")


def product() -> Finding:
    """Check a matrix product against NumPy, and its rate."""
    a, b = (np.random.default_rng(i).normal(size=(512, 512)).astype(np.float32) for i in (0, 1))
    got = np.asarray(jnp.matmul(a, b, precision="highest"), np.float64)
    expected = a.astype(np.float64) @ b
    error = float(np.abs(got - expected).max() / np.abs(expected).max())
    if not error < 1e-5:
        return Finding("product", "failed", f"a float32 product is off by {error:.1e}", "update driver and jaxlib")
    x, repeats = jnp.ones((2048, 2048)), 5
    program = jax.jit(lambda x: jax.lax.fori_loop(0, repeats, lambda _, y: jnp.matmul(y, x) / 2048, x))
    program(x).block_until_ready()
    start = time.perf_counter()
    program(x).block_until_ready()
    rate = repeats * 2 * 2048**3 / (time.perf_counter() - start) / 1e9
    return Finding("product", "ok", f"right to {error:.0e}; {rate:,.0f} GFLOP/s on one device")


def disk(folder: Path) -> Finding:
    """Free space, speed of writing, and locks."""
    folder.mkdir(parents=True, exist_ok=True)
    free = shutil.disk_usage(folder).free / 2**30
    with tempfile.TemporaryDirectory(dir=folder) as scratch:
        path, start = Path(scratch, "probe"), time.perf_counter()
        files.write_atomically(path, bytes(2**26))
        rate = 64 / (time.perf_counter() - start)
        with locks.hold(path):
            pass
    found = f"{folder}: {free:.0f} GiB free, {rate:,.0f} MiB/s written and synced, locks work"
    if free < 5:
        return Finding("disk", "warning", found, "a checkpoint of the paper's sizes takes 1.3 GiB; free some space")
    return Finding("disk", "ok", found)


def compile_cache() -> Finding:
    """Whether compiled programs can be kept."""
    folder = os.environ.get("JAX_COMPILATION_CACHE_DIR", "")
    if not folder:
        return Finding("compile cache", "warning", "compiled programs are not kept", "set JAX_COMPILATION_CACHE_DIR")
    Path(folder).mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder):
        return Finding("compile cache", "ok", f"{folder} can be written")


def dataset(path: str) -> Finding:
    """Every file of a data set against its manifest, and its first rows."""
    opened = shards.open_dataset(path, verify="hash")
    manifest, counts = opened.manifest, []
    for split, facts in manifest.splits.items():
        stream = shards.ShardStream(opened, split, list(manifest.modalities))
        features = stream.rows(stream.usable[:8])["features"]
        if not all(np.isfinite(x).all() for x in features.values()):
            return Finding("data", "failed", f"{path}: {split} has features that are not finite", "build it again")
        counts.append(f"{split} {facts['num_examples']}")
    return Finding("data", "ok", f"{manifest.name} {manifest.version}: all files as built; {', '.join(counts)}")


def training(config: ConfigDict) -> Finding:
    """Two epochs of two steps on the embedded digits, and the second once more from a checkpoint."""
    with tempfile.TemporaryDirectory() as scratch:
        start, count, source = time.perf_counter(), len(jax.devices()), digits.Digits()
        config = config.copy_and_resolve_references()
        sizes = {"representation_dim": 32, "projection_dim": 16, "reconstruction_dim": 16, "bottleneck": ()}
        config.model.update(sizes)
        config.data.path = str(builders.build(source, Path(scratch, "data")))
        config.data.modalities = tuple(source.spec.modalities)
        config.train.batch_size = max(2, 600 // count) * count
        config.clustering.start_epoch, config.clustering.queue_batches = 0, 1
        config.train.num_epochs, workdir = 2, Path(scratch, "run")
        state = pretrain.pretrain(config, workdir)
        shutil.rmtree(workdir / checkpoint.FOLDER / str(int(state.step)))
        again = pretrain.pretrain(config, workdir)
        same = checkpoint.fingerprint(checkpoint.to_tree(state)) == checkpoint.fingerprint(checkpoint.to_tree(again))
        if not same or not all(np.isfinite(x).all() for x in jax.tree.leaves(state.params)):
            found = "a resumed run is not the same bit for bit" if not same else "parameters are not finite"
            return Finding("training", "failed", found, "update jaxlib and driver; report it with the output of --json")
        found = f"{int(state.step)} steps, resumed from a checkpoint bit for bit, {time.perf_counter() - start:.0f} s"
        return Finding("training", "ok", found)
