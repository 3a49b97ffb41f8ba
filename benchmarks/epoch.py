"""A run of pretraining whose compiled dispatches are timed: answers requests as benchmarks/sides.py describes."""

import itertools
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import jax
import numpy as np

from benchmarks import sides, step
from conclugen_jax import pretrain
from conclugen_jax.data import builders
from conclugen_jax.data.sources import DatasetSpec, Example, LabelSpec
from conclugen_jax.train import parallel
from configs import base

BATCH, STEPS = 512, 8


class _Features:
    """Random features of the paper's sizes."""

    spec = DatasetSpec(
        name="speed",
        version="1.0.0",
        description="Random features.",
        licence="none",
        modalities=step.PAPER["dims"],
        label=LabelSpec("none", ()),
        splits=("train",),
    )

    def fingerprint(self) -> str:
        return "speed"

    def examples(self, split: str):
        rng = np.random.default_rng(0)
        for i in range(BATCH * STEPS):
            features = {m: rng.standard_normal(dim, np.float32) for m, dim in self.spec.modalities.items()}
            yield Example(id=str(i), features=features, label=None)


class _Timed:
    """A compiled program that waits for its results and adds up the time."""

    seconds = 0.0

    def __init__(self, program: Any):
        self._program = program

    def memory_analysis(self) -> Any:
        return self._program.memory_analysis()

    def __call__(self, *arguments: Any) -> Any:
        start = time.perf_counter()
        results = jax.block_until_ready(self._program(*arguments))
        _Timed.seconds += time.perf_counter() - start
        return results


def epochs(number: int) -> dict[str, Any]:
    """For each epoch after the compiled ones: the share of its wall time outside the compiled program.

    The host waits for each dispatch here, so nothing of its own work is hidden behind the device's.
    """
    compile_it = parallel.compiled
    parallel.compiled = lambda *arguments: _Timed(compile_it(*arguments))
    marks = []

    def on_epoch(epoch: int, means: Any, state: Any) -> None:
        marks.append((time.perf_counter(), _Timed.seconds))

    with tempfile.TemporaryDirectory() as folder:
        config = base.get_config()
        config.data.path = str(builders.build(_Features(), Path(folder, "data")))
        config.train.batch_size, config.train.num_epochs = BATCH, number + 2
        config.clustering.start_epoch, config.checkpoint.every_epochs = 0, number + 2
        pretrain.pretrain(config, Path(folder, "run"), devices=jax.devices()[:1], on_epoch=on_epoch)
    shares = [
        1 - (inside - inside_before) / (wall - before)
        for (before, inside_before), (wall, inside) in itertools.pairwise(marks)
    ]
    return {"shares": shares}


if __name__ == "__main__":
    sys.stdout, answers = sys.stderr, sys.stdout  # what a run prints is no answer
    sides.serve({"epochs": epochs}, answers)
