"""A run of pretraining whose compiled dispatches are timed: answers requests as benchmarks/sides.py describes."""

import itertools
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from benchmarks import sides, step
from conclugen_jax import pretrain
from conclugen_jax.data import builders
from conclugen_jax.data.sources import DatasetSpec, Example, LabelSpec
from conclugen_jax.pretrain import together as together_lib
from conclugen_jax.train import parallel
from configs import base, demo

BATCH, STEPS = 512, 8
FEW = {"dims": {"video": 240, "audio": 76, "text": 216}, "batch": 200, "steps": 5}  # 1,000 rows


class _Features:
    """Random features."""

    def __init__(self, dims: dict[str, int], rows: int):
        about = {"name": "speed", "version": "1.0.0", "description": "Random features.", "licence": "none"}
        self.spec = DatasetSpec(**about, modalities=dims, label=LabelSpec("none", ()), splits=("train",))
        self._rows = rows

    def fingerprint(self) -> str:
        return "speed"

    def examples(self, split: str):
        rng = np.random.default_rng(0)
        for i in range(self._rows):
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
        config.data.path = str(builders.build(_Features(step.PAPER["dims"], BATCH * STEPS), Path(folder, "data")))
        config.train.batch_size, config.train.num_epochs = BATCH, number + 2
        config.clustering.start_epoch, config.checkpoint.every_epochs = 0, number + 2
        pretrain.pretrain(config, Path(folder, "run"), devices=jax.devices()[:1], on_epoch=on_epoch)
    shares = [
        1 - (inside - inside_before) / (wall - before)
        for (before, inside_before), (wall, inside) in itertools.pairwise(marks)
    ]
    return {"shares": shares}


class _Marked(_Timed):
    """A compiled program that notes when it is called, and keeps a copy of what it was called with first."""

    last: "_Marked"

    def __init__(self, program: Any):
        super().__init__(program)
        self.times: list[float] = []
        _Marked.last = self

    def __call__(self, state: Any, *inputs: Any) -> Any:
        if not self.times:
            self.first = jax.tree.map(jnp.copy, state), inputs
        self.times.append(time.perf_counter())
        return self._program(state, *inputs)

    def plain(self, number: int) -> float:
        """Call the program so many times, with nothing between; return the seconds of a call."""
        state, inputs = self.first
        state = jax.block_until_ready(self._program(state, *inputs)[0])
        start = time.perf_counter()
        for _ in range(number):
            state, _ = self._program(state, *inputs)
        jax.block_until_ready(state)
        return (time.perf_counter() - start) / number


def loop(number: int) -> dict[str, Any]:
    """Return the seconds of an epoch of 5 steps of 200 rows in a run of so many, and of the same program called without a run.

    A run logs every step and saves a checkpoint every 20 epochs.
    """
    compile_it, skipped = parallel.compiled, 10
    parallel.compiled = lambda *arguments: _Marked(compile_it(*arguments))
    try:
        with tempfile.TemporaryDirectory() as folder:
            config = demo.get_config()
            data = _Features(FEW["dims"], FEW["batch"] * FEW["steps"])
            config.data.path = str(builders.build(data, Path(folder, "data")))
            config.train.batch_size, config.train.num_epochs = FEW["batch"], number
            config.clustering.start_epoch = 0
            pretrain.pretrain(config, Path(folder, "run"), devices=jax.devices()[:1])
    finally:
        parallel.compiled = compile_it
    times = _Marked.last.times
    return {"ours": (times[-1] - times[skipped]) / (len(times) - 1 - skipped), "plain": _Marked.last.plain(number)}


def together(number: int, num_epochs: int) -> dict[str, float]:
    """Return runs per minute of small runs that differ in their seed, trained together, compiled before, and of one alone."""
    with tempfile.TemporaryDirectory() as folder:
        config = demo.get_config()
        config.data.path = str(builders.build(_Features(FEW["dims"], 1400), Path(folder, "data")))
        config.checkpoint.every_epochs = config.train.num_epochs = num_epochs
        config.clustering.start_epoch = 0
        seconds = {}
        for seeds in (range(number), range(1), range(number), range(1)):
            configs = [config.copy_and_resolve_references() for _ in seeds]
            for one, seed in zip(configs, seeds, strict=True):
                one.seed = seed
            start = time.perf_counter()
            workdirs = [Path(folder, "runs", str(start), str(seed)) for seed in seeds]
            assert all(together_lib.pretrain_together(configs, workdirs))
            seconds[len(seeds)] = time.perf_counter() - start
    return {"runs_per_minute": 60 * number / seconds[number], "alone_per_minute": 60 / seconds[1]}


if __name__ == "__main__":
    sys.stdout, answers = sys.stderr, sys.stdout  # what a run prints is no answer
    sides.serve({"epochs": epochs, "loop": loop, "together": together}, answers)
