"""Lloyd's iterations at the size of a training step against fast_pytorch_kmeans and scikit-learn, taking turns.

    python -m benchmarks.kmeans --torch-python=PATH_TO_A_PYTHON_WITH_TORCH --json=FILE

All sides get the same points and the same start and do the same number of iterations. fast_pytorch_kmeans compares by
cosine, as we do; scikit-learn has only Euclidean distance and gets the points normalised. PyTorch is optional and best
lives in an environment of its own (torch, fast-pytorch-kmeans). Each repeat starts a fresh process per side, in turn,
which makes one call to warm up and times further ones. Medians of their medians are compared, and the least times: on
a machine that others use too, a thread that waits for another makes a median many times too long, the least hardly.
Both frameworks print the rate of a plain matrix product, so that a faster product library does not pass for a faster
k-means.
"""

import argparse
import json
import statistics
import subprocess
import sys
import time
import warnings
from collections.abc import Callable
from pathlib import Path

import numpy as np

CALLS = 9
PRODUCT = 4096  # rows and columns of the plain matrix product


def time_ours(n: int = 20480, dim: int = 8, num_clusters: int = 8, iterations: int = 30) -> dict[str, object]:
    """Seconds of a call of our compiled k-means on JAX's default device, as :func:`_line` has them."""
    import jax
    import jax.numpy as jnp

    from conclugen_jax.method import clustering

    points, start = (jax.device_put(x) for x in _problem(n, dim, num_clusters))
    # No shift is below 0: all iterations are done.
    fit = jax.jit(lambda p, c: clustering.lloyd(p, c, max_iterations=iterations, tolerance=-1.0))
    a, b = (jax.random.normal(jax.random.key(i), (PRODUCT, PRODUCT)) for i in range(2))
    product = jax.jit(jnp.matmul)
    return _line(
        f"jax {jax.__version__} {jax.default_backend()}",
        lambda: int(jax.block_until_ready(fit(points, start)).iterations),
        lambda: product(a, b).block_until_ready(),
    )


def time_sklearn(n: int, dim: int, num_clusters: int, iterations: int) -> dict[str, object]:
    """Seconds of a call of scikit-learn's Lloyd on the normalised points."""
    import sklearn
    from sklearn.cluster import KMeans

    warnings.simplefilter("ignore")  # the iterations end before convergence
    points = _problem(n, dim, num_clusters)[0]
    points /= np.linalg.norm(points, axis=1, keepdims=True)
    fit = KMeans(num_clusters, init=points[:num_clusters], n_init=1, algorithm="lloyd", max_iter=iterations, tol=0).fit
    return _line(f"scikit-learn {sklearn.__version__}", lambda: fit(points).n_iter_)


def time_torch(n: int, dim: int, num_clusters: int, iterations: int) -> dict[str, object]:
    """Seconds of a call of fast_pytorch_kmeans."""
    import torch
    from fast_pytorch_kmeans import KMeans

    points, start = (torch.from_numpy(x) for x in _problem(n, dim, num_clusters))

    def fit() -> int:
        KMeans(num_clusters, max_iter=iterations, tol=-1, mode="cosine").fit_predict(points, start.clone())
        return iterations

    a, b = torch.randn(PRODUCT, PRODUCT), torch.randn(PRODUCT, PRODUCT)
    return _line(f"torch {torch.__version__}", fit, lambda: a @ b)


SIDES = {"ours": time_ours, "scikit-learn": time_sklearn, "torch": time_torch}


def _problem(n: int, dim: int, num_clusters: int) -> tuple[np.ndarray, np.ndarray]:
    """Points that do not fall into clusters, so that Lloyd is busy for long, and its start: the first of them."""
    points = np.random.default_rng(0).normal(size=(n, dim)).astype(np.float32)
    return points, points[:num_clusters].copy()


def _line(framework: str, fit: Callable[[], int], product: Callable | None = None) -> dict[str, object]:
    """What a side prints: seconds of ``fit``, the iterations it says it did, the rate of ``product``."""
    iterations, seconds = fit(), _seconds(fit, CALLS)
    line = {
        "framework": framework,
        "iterations": iterations,
        "seconds_median": statistics.median(seconds),
        "seconds_least": min(seconds),
    }
    if product:
        product()
        line["matmul_gflops"] = 2 * PRODUCT**3 / statistics.median(_seconds(product, 3)) / 1e9
    return line


def _seconds(call: Callable, repeats: int) -> list[float]:
    times = []
    for _ in range(repeats):
        start = time.perf_counter()
        call()
        times.append(time.perf_counter() - start)
    return times


def _of(lines: list[dict]) -> tuple[float, float]:
    """Median and least seconds over the processes of a side."""
    return statistics.median(x["seconds_median"] for x in lines), min(x["seconds_least"] for x in lines)


def main() -> None:
    """Time all sides in turn and print a table of medians and ratios."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--points", type=int, default=20480)
    parser.add_argument("--dim", type=int, default=8)
    parser.add_argument("--clusters", type=int, default=8)
    parser.add_argument("--iterations", type=int, default=30)
    parser.add_argument("--repeats", type=int, default=5, help="processes per side, in turn")
    parser.add_argument("--torch-python", help="Python that has torch and fast-pytorch-kmeans")
    parser.add_argument("--json", type=Path, help="file for what every process measured")
    parser.add_argument("--side", choices=SIDES, help="time one side once, in this process, and print JSON")
    a = parser.parse_args()
    sizes = {"points": a.points, "dim": a.dim, "clusters": a.clusters, "iterations": a.iterations}
    if a.side:
        print(json.dumps(SIDES[a.side](*sizes.values())))
        return
    common = [f"--{name}={value}" for name, value in sizes.items()]
    own = [sys.executable, "-m", "benchmarks.kmeans", *common]
    commands = {side: [*own, f"--side={side}"] for side in ("ours", "scikit-learn")}
    if a.torch_python:
        commands["torch"] = [a.torch_python, __file__, *common, "--side=torch"]
    runs: dict[str, list[dict]] = {side: [] for side in commands}
    for _ in range(a.repeats):
        for side, command in commands.items():
            output = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True).stdout
            runs[side].append(json.loads(output.strip().splitlines()[-1]))
    print(f"{a.points} points x {a.dim}, {a.clusters} clusters, float32, {a.repeats} processes per side; ms per call")
    print(
        f"{'side':<14}{'framework':<22}{'iterations':>10}{'median':>9}{'/ ours':>8}{'least':>9}{'/ ours':>8}{'GFLOP/s':>9}"
    )
    ours = _of(runs["ours"])
    for side, lines in runs.items():
        times = "".join(f"{x * 1e3:>9.2f}{x / y:>8.2f}" for x, y in zip(_of(lines), ours, strict=True))
        rates = [line["matmul_gflops"] for line in lines if "matmul_gflops" in line]
        rate = f"{statistics.median(rates):.0f}" if rates else ""
        print(f"{side:<14}{lines[0]['framework']:<22}{lines[0]['iterations']:>10}{times}{rate:>9}")
    if a.json:
        a.json.write_text(json.dumps({"sizes": sizes, "runs": runs}, indent=1) + "\n")


if __name__ == "__main__":
    main()
