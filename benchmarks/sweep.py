"""What a grid of classifiers costs beside one: python -m benchmarks.sweep [--examples=4000] [--turns=3]

Random representations of paper size (three modalities of 4,096 units joined, 7 classes). One fit, a grid of 64 that differs
in rate and decay, and one of 64 of which four seeds have batches and dropout of their own, in turn; time per epoch without
compilation, median, and ratios to the one fit.
"""

import argparse
import itertools
import json
import statistics
import time

import jax
import jax.numpy as jnp
import numpy as np

from conclugen_jax.data.sources import LabelSpec
from conclugen_jax.evaluate import sweep
from configs import linear_evaluation

DIM, CLASSES = 3 * 4096, 7
EPOCHS = 12
GRIDS = {"one fit": (1, 1, 1), "64: 8 rates x 8 decays": (8, 8, 1), "64: 4 rates x 4 decays x 4 seeds": (4, 4, 4)}


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--examples", type=int, default=4000)
    parser.add_argument("--turns", type=int, default=3)
    arguments = parser.parse_args()
    rng = np.random.default_rng(0)
    label = LabelSpec("single", tuple(map(str, range(CLASSES))))
    vectors = {
        name: sweep.Vectors(
            jnp.asarray(rng.normal(size=(n, DIM)), jnp.float32), rng.integers(CLASSES, size=n), np.arange(n)
        )
        for name, n in (("train", arguments.examples), ("validation", arguments.examples // 8))
    }
    seconds = {name: [] for name in GRIDS}
    for sizes in GRIDS.values():
        _per_epoch(vectors, label, *sizes)  # the first turn compiles and allocates
    for _ in range(arguments.turns):
        for name, sizes in GRIDS.items():
            seconds[name].append(_per_epoch(vectors, label, *sizes))
    one = statistics.median(seconds["one fit"])
    for name, times in seconds.items():
        median = statistics.median(times)
        ratios = [a / b for a, b in zip(times, seconds["one fit"], strict=True)]
        found = {
            "grid": name,
            "seconds_per_epoch": round(median, 3),
            "ratio": round(median / one, 2),
            "ratios": [round(r, 2) for r in ratios],
        }
        print(json.dumps(found | {"device": jax.devices()[0].platform}), flush=True)


def _per_epoch(vectors, label, rates: int, decays: int, seeds: int) -> float:
    """Seconds that an epoch takes more when there are more of them: without compilation and start."""
    times = {}
    for epochs in (1, 1 + EPOCHS):
        config = linear_evaluation.get_config()
        config.train.batch_size, config.train.num_epochs = 500, epochs
        start = time.perf_counter()
        members = sweep.Members(
            list(itertools.product(np.geomspace(1e-4, 1e-2, rates), np.geomspace(1e-5, 1e-2, decays))),
            [(seed, 0) for seed in range(seeds)],
            [vectors["train"].usable] * seeds,
        )
        sweep.Grid(config, label, members, vectors["train"].x.shape[1]).fit(vectors)
        times[epochs] = time.perf_counter() - start
    return (times[1 + EPOCHS] - times[1]) / EPOCHS


if __name__ == "__main__":
    main()
