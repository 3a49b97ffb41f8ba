"""Pieces that several tests use."""

import contextlib
import io
import json
import os
import subprocess
import sys
import types
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import traverse_util

from conclugen_jax.commands import app
from conclugen_jax.data import shards
from conclugen_jax.data.sources import DatasetSpec, Example, LabelSpec
from conclugen_jax.train import feed, parallel
from configs import base

ROOT = Path(__file__).parent.parent
SHARED_DATA = Path(os.environ.get("CONCLUGEN_SHARED", Path(__file__).parents[2] / "shared")) / "data"
"""Folder of real files that may not be copied into the project; without it the tests that read them are skipped."""

needs_shared_data = pytest.mark.skipif(not SHARED_DATA.is_dir(), reason="no folder of real data (CONCLUGEN_SHARED)")

QUICK_COMPILATION = "--xla_backend_optimization_level=0"
"""XLA_FLAGS of processes that tests start: they compute the same bits as this process."""


def close(actual: Any, expected: Any, relative: float = 1e-4) -> bool:
    """Return whether the largest difference is small relative to the largest expected value."""
    actual, expected = np.asarray(actual, np.float64), np.asarray(expected, np.float64)
    assert actual.shape == expected.shape, (actual.shape, expected.shape)
    scale = max(np.abs(expected).max(initial=0), 1e-6)
    return bool(np.abs(actual - expected).max(initial=0) <= relative * scale)


def tree_of(arrays: dict[str, np.ndarray], prefix: str) -> dict[str, Any]:
    """Return the arrays whose key begins with ``prefix/`` as nested dicts of float32."""
    flat = {
        k.removeprefix(f"{prefix}/"): jnp.asarray(v, jnp.float32)
        for k, v in arrays.items()
        if k.startswith(f"{prefix}/")
    }
    return traverse_util.unflatten_dict(flat, sep="/")


def flat(tree: Any) -> dict[str, np.ndarray]:
    """Return the leaves of a tree by path; random keys as their data."""
    return {
        jax.tree_util.keystr(path, simple=True, separator="/"): np.asarray(
            jax.random.key_data(x) if jax.dtypes.issubdtype(x.dtype, jax.dtypes.prng_key) else x
        )
        for path, x in jax.tree_util.tree_leaves_with_path(tree)
    }


def assert_same_bits(a: Any, b: Any) -> None:
    """Assert that two trees are equal bit for bit."""
    a, b = flat(a), flat(b)
    assert a.keys() == b.keys()
    different = [k for k in a if a[k].dtype != b[k].dtype or a[k].tobytes() != b[k].tobytes()]
    assert not different, different


def fed(batches: feed.Feed, first_step: int = 0) -> Iterator[tuple[feed.Dispatch, Any]]:
    """Yield each dispatch with the rows of its steps: leaves [num_steps, batch_size, ...], in the order of the batch."""

    def all_steps(table, position, rows):
        return jax.vmap(batches.batches_of(table, position, rows))(jnp.arange(max(batches.lengths)))

    program = jax.pmap(all_steps, axis_name=parallel.AXIS, devices=batches.devices, in_axes=(None, 0, 0))
    for dispatch, inputs in batches(batches.plan(first_step)):

        def joined(x, n=dispatch.num_steps):
            x = np.moveaxis(np.asarray(x), 0, 1)[:n]
            return x.reshape(n, -1, *x.shape[3:])

        yield dispatch, jax.tree.map(joined, program(*inputs))


def plan(first_step: int, lengths: list[int], num_epochs: int, left_out: Sequence[int] = ()) -> list[feed.Dispatch]:
    """Return the dispatches, of such lengths in each epoch, from a step to the end of a run."""
    batches = types.SimpleNamespace(lengths=lengths, config=tiny_config(train__num_epochs=num_epochs))
    return list(feed.Feed.plan(batches, first_step, left_out))


@contextlib.contextmanager
def bad_row(index: int) -> Iterator[None]:
    """Give a row of the training split a NaN among its audio, which the builder would reject, inside the context."""
    read = shards.ShardStream.rows

    def rows(self, indices, variants=None):
        found = read(self, indices, variants)
        if self.split == "train":
            found["features"]["audio"][np.asarray(indices) == index, 3] = np.nan
        return found

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(shards.ShardStream, "rows", rows)
        yield


def log_without_times(workdir) -> list[dict[str, Any]]:
    """Return the records of metrics.jsonl without what depends on the clock."""
    records = [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]
    return [{k: v for k, v in r.items() if k != "examples_per_second"} for r in records]


def run(command: str, *arguments: Any, code: int = 0) -> subprocess.CompletedProcess:
    """Run a command in this process, as ``conclugen COMMAND ARGUMENTS`` does, and check its exit code.

    A mistake (code 2) must end in one sentence. Numbers are those of the devices and compiler options of this process.
    """
    argv, out, err = list(map(str, arguments)), io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        returned = app.call(command.removeprefix("launch."), argv)
    return _checked(subprocess.CompletedProcess([command, *argv], returned, out.getvalue(), err.getvalue()), code)


def start(
    command: str, *arguments: Any, code: int = 0, env: dict[str, str] | None = None, prefix: Sequence[str] = ()
) -> subprocess.CompletedProcess:
    """Run a command, or ``python -m launch.NAME``, in a process of its own, on one device, and check its exit code."""
    module = [command] if command.startswith("launch.") else ["conclugen_jax", command]
    result = subprocess.run(
        [*prefix, sys.executable, "-m", *module, *map(str, arguments)],
        cwd=ROOT,
        env={
            **os.environ,
            "JAX_PLATFORMS": "cpu",
            "XLA_FLAGS": QUICK_COMPILATION,
            "PYTHONPATH": str(ROOT),
            **(env or {}),
        },
        capture_output=True,
        text=True,
        check=False,
        timeout=300,
    )
    return _checked(result, code)


def _checked(result: subprocess.CompletedProcess, code: int) -> subprocess.CompletedProcess:
    assert result.returncode == code, (result.returncode, result.stdout, result.stderr)
    if code == 2:
        assert "Traceback" not in result.stderr
        assert result.stderr.strip().splitlines()[-1].startswith("error: "), result.stderr
    return result


class Faces:
    """A small source of random examples: three modalities, four classes, some modalities missing by choice."""

    def __init__(
        self,
        num: Sequence[int] = (64, 24, 24),
        *,
        kind: str = "single",
        missing: float = 0.0,
        seed: int = 0,
        name: str = "faces",
    ):
        names = ("calm", "happy", "sad", "angry") if kind != "none" else ()
        self.spec = DatasetSpec(
            name=name,
            version="1.0.0",
            description="Random vectors.",
            licence="none",
            modalities={"video": 24, "audio": 16, "text": 12},
            label=LabelSpec(kind, names),
            splits=("train", "validation", "test"),
        )
        self._num, self._kind, self._missing, self._seed = (
            dict(zip(self.spec.splits, num, strict=True)),
            kind,
            missing,
            seed,
        )

    def fingerprint(self) -> str:
        return f"{self._num} {self._kind} {self._missing} {self._seed}"

    def examples(self, split: str) -> Iterator[Example]:
        rng = np.random.default_rng([self._seed, self.spec.splits.index(split)])
        centers = np.random.default_rng(self._seed).normal(size=(4, 52)) * 2
        for i in range(self._num[split]):
            y = int(rng.integers(4))
            parts = np.split((centers[y] + rng.normal(size=52)).astype(np.float32), [24, 40])
            features = dict(zip(self.spec.modalities, parts, strict=True))
            if rng.random() < self._missing:
                del features["text"]
            label = {
                "single": y,
                "multi": [int(y == c or rng.random() < 0.3) for c in range(4)],
                "none": None,
            }[self._kind]
            yield Example(id=f"{split}{i}", features=features, label=label, group=f"speaker{i % 5}")


def tiny_config(path: str = "", **changes: Any):
    """Return the base configuration at a size that compiles and runs in seconds, for the data of :class:`Faces`."""
    config = base.get_config()
    config.update_from_flattened_dict(
        {
            "data.path": str(path),
            "data.modalities": ("video", "audio", "text"),
            "model.representation_dim": 32,
            "model.projection_dim": 16,
            "model.reconstruction_dim": 12,
            "clustering.num_clusters": 4,
            "clustering.start_epoch": 2,
            "clustering.queue_batches": 1,
            "optimizer.learning_rate": 1e-3,
            "train.batch_size": 16,
            "train.num_epochs": 4,
            "train.steps_per_dispatch": 2,
            "online_probe.health": False,
            **{k.replace("__", "."): v for k, v in changes.items()},
        }
    )
    return config
