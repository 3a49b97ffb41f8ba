"""One pretraining step at the paper's sizes against the same step in eager PyTorch, taking turns on the same machine.

    python -m benchmarks.step --torch-python=PATH_TO_A_PYTHON_WITH_TORCH --batch=512 --repeats=5

PyTorch is optional and best lives in an environment of its own (torch, fast-pytorch-kmeans); without --torch-python only
our side is timed. Each repeat starts a fresh process per side, ours and theirs in turn; medians are compared. Ours runs
as training runs it, all timed steps in one dispatch, twice after the one that compiles. Both sides print the rate of a
plain matrix product, so that a faster product library does not pass for a faster step.
"""

import argparse
import functools
import json
import statistics
import subprocess
import sys
import time
from pathlib import Path

DIMS = {"video": 4096, "audio": 1024, "text": 768}
PEER = Path(__file__).parent / "torch_peer.py"


def time_step(batch: int, representation_dim: int, steps: int) -> dict[str, object]:
    """Seconds per step of our program: k-means queue full, clustering in the objective, AdamW, one device."""
    import jax
    import jax.numpy as jnp
    import numpy as np

    from conclugen_jax import loop, optimizer, parallel, pretrain, train_state
    from conclugen_jax import model as model_lib
    from configs import base

    config = base.get_config()
    config.train.batch_size, config.model.representation_dim = batch, representation_dim
    devices = jax.devices()[:1]
    model = model_lib.from_config(config, DIMS, parallel.AXIS)
    make, schedule = optimizer.from_config(config, steps_per_epoch=10**6)
    state = train_state.create(
        model_lib.initial_variables(model, jax.random.key(0), None),
        make,
        jax.random.key(1),
        queue_length=4 * batch,
        num_clusters=config.clustering.num_clusters,
    )
    queue = jax.random.normal(jax.random.key(2), state.queue.shape)
    state = parallel.replicate(state.replace(step=jnp.int32(1), queue=queue, queue_batches=jnp.int32(4)), devices)
    rng = np.random.default_rng(0)
    rows = 2 * batch
    table = parallel.replicate(
        {
            "features": {m: np.maximum(rng.normal(size=(rows, d)), 0).astype(np.float32) for m, d in DIMS.items()},
            "present": {m: np.ones(rows, bool) for m in DIMS},
        },
        devices,
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
    program = parallel.map_step(loop.make_dispatch(step), devices)
    indices = np.stack([np.arange(batch, dtype=np.int32) + i % 2 * batch for i in range(steps)])[None]
    batches = {"indices": indices, "variants": {}}
    times = []
    for _ in range(3):
        start = time.perf_counter()
        state, metrics = program(state, table, batches)
        jax.block_until_ready((state, metrics))
        times.append(time.perf_counter() - start)
    a, b = (jax.random.normal(jax.random.key(i), (4096, 4096)) for i in (3, 4))
    product = jax.jit(jnp.matmul)
    product(a, b).block_until_ready()
    start = time.perf_counter()
    for _ in range(3):
        product(a, b).block_until_ready()
    gflops = 3 * 2 * 4096**3 / (time.perf_counter() - start) / 1e9
    return {
        "framework": f"jax {jax.__version__} {devices[0].platform}",
        "compilation_seconds": times[0] - min(times[1:]),
        "seconds_per_step_median": statistics.median(times[1:]) / steps,
        "matmul_gflops": gflops,
        "kmeans_iterations": int(metrics["kmeans/iterations"][0]),
    }


def main() -> None:
    """Time both sides in turn and print the ratio of the medians."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--batch", type=int, default=512)
    parser.add_argument("--representation-dim", type=int, default=4096)
    parser.add_argument("--steps", type=int, default=5, help="timed steps per process and dispatch")
    parser.add_argument("--repeats", type=int, default=5, help="processes per side, in turn")
    parser.add_argument("--torch-python", help="Python that has torch and fast-pytorch-kmeans")
    parser.add_argument("--peer", default=str(PEER), help="PyTorch script to time")
    parser.add_argument("--compile", action="store_true", help="torch.compile the peer's network")
    parser.add_argument("--own", action="store_true", help="time our side once, in this process, and print JSON")
    a = parser.parse_args()
    if a.own:
        print(json.dumps(time_step(a.batch, a.representation_dim, a.steps)))
        return
    common = [f"--batch={a.batch}", f"--representation-dim={a.representation_dim}", f"--steps={a.steps}"]
    sides = {"ours": [sys.executable, "-m", "benchmarks.step", "--own", *common]}
    if a.torch_python:
        sides["torch"] = [a.torch_python, a.peer, *common, *(["--compile"] if a.compile else [])]
    results: dict[str, list[dict]] = {side: [] for side in sides}
    for repeat in range(a.repeats):
        for side, command in sides.items():
            output = subprocess.run(command, capture_output=True, text=True, check=True).stdout
            results[side].append(json.loads(output.strip().splitlines()[-1]))
            print(f"repeat {repeat + 1} {side}: {json.dumps(results[side][-1])}", flush=True)
    for side, runs in results.items():
        seconds = statistics.median(r["seconds_per_step_median"] for r in runs)
        gflops = statistics.median(r["matmul_gflops"] for r in runs)
        print(
            f"{side}: median {seconds:.3f} s per step, {a.batch / seconds:.1f} samples/s, matmul {gflops:.0f} GFLOP/s"
        )
    if a.torch_python:
        ratios = [
            t["seconds_per_step_median"] / o["seconds_per_step_median"]
            for o, t in zip(results["ours"], results["torch"], strict=True)
        ]
        median, least, most = statistics.median(ratios), min(ratios), max(ratios)
        print(f"torch / ours: median of {len(ratios)} pairs {median:.2f}, from {least:.2f} to {most:.2f}")


if __name__ == "__main__":
    main()
