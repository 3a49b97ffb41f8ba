"""What a GPU makes of pretraining at the paper's sizes, in about 12 minutes with compilation, first lines first:

    python -m benchmarks.gpu --torch-python=PYTHON_WITH_TORCH --json=FILE

A line of JSON for each figure, as soon as it is known. Each measure runs in a process of its own, so that memory is that
of this measure alone, as --only=neighbour_table asks for. --batch and --epochs make a short trial on any device.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from benchmarks import page, step
from benchmarks.sides import Side

PEER = Path(__file__).parent / "torch_peer.py"
CHUNK = 8192  # rows that pass the encoder at once where the batch is larger
ENVIRONMENT = {**os.environ, "XLA_PYTHON_CLIENT_PREALLOCATE": "false"}


def ours(cache: str) -> Side:
    """Our side, with a folder of compiled programs that measures share."""
    env = ENVIRONMENT | {"JAX_COMPILATION_CACHE_DIR": cache}
    return Side("ours", [sys.executable, "-m", "benchmarks.step"], env=env)


def step_rate(a: argparse.Namespace) -> Iterator[dict[str, Any]]:
    """Compilation cold and from the cache, samples per second, share of the product's rate, k-means' share."""
    with ours(a.cache) as side:
        yield {"measure": "compilation, cold", **_timed(side, a.batch, "bfloat16", number=1)}
    with ours(a.cache) as side:
        yield {"measure": "compilation, cached", **_timed(side, a.batch, "bfloat16", number=1)}
        rate = yield from _rate(side, a.batch, "bfloat16")
        yield _kmeans_share(side, a.batch, rate)
    with ours(a.cache) as side:
        yield from _rate(side, 4 * a.batch, "bfloat16")


def other_precisions(a: argparse.Namespace) -> Iterator[dict[str, Any]]:
    """The same step in TensorFloat-32 and in float32."""
    for precision in ("tensorfloat32", "float32"):
        with ours(a.cache) as side:
            yield {"measure": f"compilation, {precision}, cold", **_timed(side, a.batch, precision, number=1)}
            yield from _rate(side, a.batch, precision)


def _rate(side: Side, batch: int, precision: str) -> Iterator[dict[str, Any]]:
    gflops = side.ask(what="matmul", rows=4096, repeats=100, precision=precision)["gflops"]
    found = _timed(side, batch, precision)
    share = step.flops(batch) / found["seconds"] / 1e9 / gflops
    yield {
        "measure": f"step, batch {batch}, {precision}",
        "samples_per_second": batch / found["seconds"],
        "share_of_products": share,
        "product_gflops": gflops,
        **found,
    }
    return found


def _timed(side: Side, batch: int, precision: str, number: int = 20, **options: Any) -> dict[str, Any]:
    """Median of five turns of consecutive steps."""
    rows = (8 if batch <= 2 * CHUNK else 1) * batch  # a dispatch is an epoch of so many rows
    request = {"what": "step", "batch": batch, "precision": precision, "rows": rows, **step.PAPER, **options}
    side.ask(steps=min(number, 2), **request)
    turns = [side.ask(steps=number, **request) for _ in range(5 if number > 2 else 1)]
    return turns[-1] | {"seconds": statistics.median(t["seconds"] for t in turns)}


def _kmeans_share(side: Side, batch: int, found: dict[str, Any]) -> dict[str, Any]:
    """K-means over a full queue and a batch, as many iterations as in the step, beside the step."""
    request = {"what": "kmeans", "points": 5 * batch, "iterations": found["kmeans_iterations"]}
    seconds = statistics.median(side.ask(**request)["seconds"] for _ in range(5))
    share = seconds / found["seconds"]
    return {"measure": f"k-means, share of a step of {batch}", "share": share, **request, "seconds": seconds}


def whole_run(a: argparse.Namespace) -> Iterator[dict[str, Any]]:
    """145,000 samples, all epochs, an epoch a dispatch, without compilation."""
    with ours(a.cache) as side:
        request = {"batch": a.batch, "precision": "bfloat16", "rows": a.samples, **step.PAPER}
        side.ask(what="epochs", number=1, **request)
        found = side.ask(what="epochs", number=a.epochs, **request)
    yield {"measure": f"{a.samples} samples x {a.epochs} epochs, without compilation", **found}


def neighbour_table(a: argparse.Namespace) -> Iterator[dict[str, Any]]:
    """The table of neighbours of all samples by features, and by representations as a run makes it again."""
    for space in ("raw", "representation"):
        with ours(a.cache) as side:
            found = side.ask(what="neighbours", rows=a.samples, space=space, **step.PAPER)
        yield {"measure": f"neighbours of {a.samples} samples, {space}", **found}


def peak_memory(a: argparse.Namespace) -> Iterator[dict[str, Any]]:
    """Highest memory of the device during steps, without the table of rows."""
    for batch in (a.batch, 4 * a.batch, 16 * a.batch):
        chunk = 0 if batch == a.batch else CHUNK
        with ours(a.cache) as side:
            found = _timed(side, batch, "bfloat16", number=2, encoder_chunk_size=chunk)
        if "device_gib" in found:
            found["device_gib_less_data"] = found["device_gib"] - found["table_gib"]
        rate = {"samples_per_second": batch / found["seconds"]}
        yield {"measure": f"memory, batch {batch}, encoder_chunk_size {chunk}", **rate, **found}


def peers(a: argparse.Namespace) -> Iterator[dict[str, Any]]:
    """PyTorch on the same GPU."""
    if not a.torch_python:
        return
    for precision, compiled in (("float32", False), ("bfloat16", False), ("bfloat16", True)):
        with Side("torch", [a.torch_python, str(PEER)]) as side:
            found = _timed(side, a.batch, precision, compiled=compiled)
        kind = "compiled" if compiled else "eager"
        yield {
            "measure": f"torch {kind}, batch {a.batch}, {precision}",
            "samples_per_second": a.batch / found["seconds"],
            **found,
        }


def largest_batch(a: argparse.Namespace) -> Iterator[dict[str, Any]]:
    """Doubled until a step does not run any more."""
    batch = 32 * a.batch
    while batch <= a.largest:
        try:
            with ours(a.cache) as side:
                found = _timed(side, batch, "bfloat16", number=1, encoder_chunk_size=CHUNK)
        except RuntimeError as e:
            yield {"measure": f"batch {batch} does not run", "error": str(e)[:200]}
            return
        yield {"measure": f"batch {batch} runs", **found}
        batch *= 2


def fp8_products(a: argparse.Namespace) -> Iterator[dict[str, Any]]:
    """Rates of plain products in fp8 and bfloat16, and what rounding to them costs."""
    with ours(a.cache) as side:
        for precision in ("float8", "bfloat16"):
            gflops = side.ask(what="matmul", rows=4096, repeats=100 if a.batch >= 4096 else 1, precision=precision)
            yield {"measure": f"plain product, {precision}", **gflops}
        yield {"measure": "relative error of a product by the type of its factors", **side.ask(what="fp8_error")}


def small_runs(a: argparse.Namespace) -> Iterator[dict[str, Any]]:
    """Runs per minute of a study of small runs that are trained in one vmapped program, and of one alone."""
    env = ENVIRONMENT | {"JAX_COMPILATION_CACHE_DIR": a.cache}
    with Side("ours", [sys.executable, "-m", "benchmarks.epoch"], env=env) as side:
        found = side.ask(what="together", number=a.runs, num_epochs=min(60, a.epochs))
    yield {"measure": f"{a.runs} small runs trained together", **found}


def extraction(a: argparse.Namespace) -> Iterator[dict[str, Any]]:
    """Clips per second of the heavy backbones, where a folder of clips is named; decoded by one process."""
    if a.clips is None:
        return
    options = ["--precision=bfloat16", f"--batch-items={a.batch_items}", "--repeats=40", "--alone"]
    command = [sys.executable, "-m", "benchmarks.extraction", f"--clips={a.clips}", *options]
    done = subprocess.run(command, capture_output=True, text=True, check=False, env=ENVIRONMENT)
    if done.returncode:
        raise RuntimeError(done.stderr[-300:])
    found = json.loads(done.stdout.strip().splitlines()[-1])
    bound = "decoding" if found["host_seconds"] > found["device_seconds"] else "the device"
    yield {"measure": "extraction", "bound_by": bound, **found}


MEASURES: tuple[Callable[[argparse.Namespace], Iterator[dict[str, Any]]], ...] = (
    step_rate,
    whole_run,
    small_runs,
    fp8_products,
    extraction,
    peers,
    other_precisions,
    peak_memory,
    neighbour_table,
    largest_batch,
)


def main() -> None:
    """Measure, print a line each, and write everything as JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--torch-python", default="", help="Python that has torch and fast-pytorch-kmeans")
    parser.add_argument("--json", type=Path, help="file for all figures")
    parser.add_argument("--batch", type=int, default=4096)
    parser.add_argument("--samples", type=int, default=145_000)
    parser.add_argument("--epochs", type=int, default=100)
    parser.add_argument("--runs", type=int, default=64, help="small runs that are trained together")
    parser.add_argument("--clips", type=Path, help="folder of clips; without one extraction is skipped")
    parser.add_argument("--batch-items", type=int, default=256, help="frames or windows of clips at once")
    parser.add_argument("--only", default="", help="comma-separated names of measures; empty: all")
    parser.add_argument("--largest", type=int, default=524_288, help="no larger batch is tried")
    a = parser.parse_args()
    with tempfile.TemporaryDirectory() as a.cache:
        _measure(a)


def _measure(a: argparse.Namespace) -> None:
    start, found = time.monotonic(), {"machine": "", "versions": {}, "date": time.strftime("%Y-%m-%d"), "rows": []}
    found["command"] = "python -m benchmarks.gpu" + " --torch-python=PYTHON_WITH_TORCH" * bool(a.torch_python)
    if a.json:
        a.json.parent.mkdir(parents=True, exist_ok=True)

    def take(row: dict[str, Any]) -> None:
        found["rows"].append({**row, "after_seconds": round(time.monotonic() - start)})
        print(json.dumps(found["rows"][-1]), flush=True)
        if a.json:
            a.json.write_text(json.dumps(found, indent=1) + "\n")

    with ours(a.cache) as side:
        found["versions"]["ours"] = side.ask(what="versions")
        found["machine"] = found["versions"]["ours"]["device"]
    for measure in MEASURES:
        if a.only and measure.__name__ not in a.only.split(","):
            continue
        try:
            for row in measure(a):
                take(row)
        except RuntimeError as e:  # one measure that fails must not cost the others
            take({"measure": measure.__name__, "error": str(e)[:300]})
    if a.json and a.json.parent.resolve() == page.RESULTS:
        page.write()


if __name__ == "__main__":
    main()
