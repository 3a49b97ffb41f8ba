"""What a CPU can tell of our speed and memory, beside PyTorch where a Python with it is named: make bench

    python -m benchmarks.cpu --torch-python=PYTHON_WITH_TORCH [--only=step,kmeans]

Both sides stay in processes of their own and take turns, so that a slow minute of the machine meets both; medians are
compared. The rate of a plain matrix product is measured in the same turns: a faster product library is no faster step.
"""

import argparse
import json
import os
import platform
import re
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks import page, step, whole
from benchmarks.sides import Side

Rows = list[dict[str, Any]]
BATCHES = (64, 256, 512, 2048, 4096)
PEER = Path(__file__).parent / "torch_peer.py"
OURS = [sys.executable, "-m", "benchmarks.step"]


def step_time(torch: Sequence[str] | None, repeats: int) -> Rows:
    """A step of 512 examples at the paper's sizes and at sizes of 512, and how much of it is not matrix products."""
    rows = []
    with Side("ours", OURS) as ours, _peer(torch) as eager, _peer(torch) as compiled:
        for name, sizes, steps in (("paper sizes", step.PAPER, 2), ("all sizes 512", step.SMALL, 20)):
            took = [_step_turn(ours, eager, compiled, batch=512, steps=steps, **sizes) for _ in range(repeats + 1)][1:]
            row = {"measure": f"step, {name}, batch 512", "ours": _median(took, "ours"), "unit": "s"}
            rates = [statistics.median(t[f"{side} gflops"] for t in took) for side in ("ours", "eager") if eager]
            for side in ("eager", "compiled") if eager else ():
                ratio = statistics.median(t[side] / t["ours"] for t in took)
                row |= {f"torch {side}": _median(took, side), f"torch {side} / ours": ratio}
            if eager:
                faster = statistics.median(t["ours gflops"] / t["eager gflops"] for t in took)
                row |= {page.DIVIDED: row["torch eager / ours"] / faster}
                row |= {"products": f"{rates[0]:.0f} and {rates[1]:.0f} GFLOP/s"}
            rows.append(row)
    return rows


def _step_turn(ours: Side, eager: Side | None, compiled: Side | None, **request: Any) -> dict[str, float]:
    found = {
        "ours": ours.ask(what="step", **request)["seconds"],
        "ours gflops": ours.ask(what="matmul", repeats=1)["gflops"],
    }
    if eager:
        found["eager"] = eager.ask(what="step", **request)["seconds"]
        found["eager gflops"] = eager.ask(what="matmul", repeats=1)["gflops"]
        found["compiled"] = compiled.ask(what="step", compiled=True, **request)["seconds"]
    return found


def growth(_: Sequence[str] | None, _repeats: int) -> Rows:
    """The time of a step by its batch, fitted as a + b n + c n^2, against the operations over the product's rate.

    Each batch counts alike (relative errors), and each time is divided by that of a plain product in the same turn.
    """
    n, operations, seconds, rates, shares = np.array(BATCHES, float), [], [], [], []
    with Side("ours", OURS) as ours:
        for batch in BATCHES:
            request = {"what": "step", "batch": batch, "steps": max(1, 1024 // batch), **step.PAPER}
            turns = []
            for _ in range(2 if batch >= 2048 else 3):  # the first one allocates, and is not the least
                rate = ours.ask(what="matmul", repeats=1)["gflops"] * 1e9
                turns.append((ours.ask(**request)["seconds"], rate))
            seconds.append(min(took for took, _ in turns))
            operations.append(min(took * rate for took, rate in turns))  # as many as a plain product would do
            rates.append(statistics.median(rate for _, rate in turns))
            shares.append(step.flops(batch) / operations[-1])
    y = np.array(operations)
    a, b, c = np.linalg.lstsq(np.stack([n**0, n, n**2], 1) / y[:, None], np.ones(len(n)), rcond=None)[0]
    rate, pairs = statistics.median(rates), 2 * 3 * 1536
    row = {"measure": "step time a + b n + c n^2, paper sizes, batch n = " + ", ".join(map(str, BATCHES))}
    row |= {"seconds": [float(f"{x:.3g}") for x in seconds], "a": f"{a / rate:.3g} s"}
    row |= {"b / operations over rate": b / (step.flops(1) - pairs), "c / operations over rate": c / pairs}
    return [row, {"measure": "share of the plain product's rate, batch 2,048", "ours": shares[BATCHES.index(2048)]}]


def similarities(_: Sequence[str] | None, repeats: int) -> Rows:
    """L_MMS with gradients against the plain form, and its temporary memory."""
    with Side("ours", [sys.executable, "-m", "benchmarks.similarities"]) as ours:
        rows = []
        for n, times in ((4096, repeats + 2), (16384, 3)):
            ours.ask(n=n, what="time")
            turns = [ours.ask(n=n, what="time") for _ in range(times)]
            ratio = statistics.median(t["plain"] / t["ours"] for t in turns)
            rows.append(
                {
                    "measure": f"L_MMS and gradients, {n} rows of 512",
                    "ours": _median(turns, "ours"),
                    "plain form": _median(turns, "plain"),
                    "plain form / ours": ratio,
                    "unit": "s",
                }
            )
        for n in (4096, 16384, 65536):
            gib = ours.ask(n=n, what="memory")["gib"]
            rows.append({"measure": f"L_MMS and gradients, temporary memory, {n} rows", "ours": gib, "unit": "GiB"})
    return rows


def kmeans(torch: Sequence[str] | None, repeats: int) -> Rows:
    """Lloyd at the size of a step, 30 iterations."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "kmeans.json")
        command = [sys.executable, "-m", "benchmarks.kmeans", f"--repeats={repeats}", f"--json={path}"]
        subprocess.run([*command, *([f"--torch-python={torch[0]}"] if torch else [])], check=True, stdout=sys.stderr)
        runs = json.loads(path.read_text())["runs"]
    seconds = {side: statistics.median(line["seconds_median"] for line in lines) for side, lines in runs.items()}
    row = {"measure": "k-means, 20,480 x 8, K 8, 30 iterations", "ours": seconds.pop("ours"), "unit": "s"}
    for side, value in seconds.items():
        pairs = zip(runs[side], runs["ours"], strict=True)
        ratio = statistics.median(a["seconds_median"] / b["seconds_median"] for a, b in pairs)
        name = "fast_pytorch_kmeans" if side == "torch" else side
        row |= {name: value, f"{name} / ours": ratio}
    return [row]


def neighbours(_: Sequence[str] | None, repeats: int) -> Rows:
    """The table of neighbours of 10,000 rows by features, and by representations as a run makes it again."""
    rows = []
    for space, sizes in (("raw", step.PAPER), ("representation", step.SMALL), ("representation", step.PAPER)):
        width = sum(sizes["dims"].values()) if space == "raw" else len(sizes["dims"]) * sizes["representation_dim"]
        with Side("ours", OURS) as ours:
            turns = [
                ours.ask(what="neighbours", rows=10_000, space=space, **sizes) for _ in range(max(1, repeats // 2))
            ]
        row = {"measure": f"neighbours, {space}, 10,000 rows of {width:,}", "ours": _median(turns, "seconds")}
        rows.append({**row, "unit": "s", "with compilation": turns[0]["first_seconds"]})
    return rows


def memory(torch: Sequence[str] | None, _: int) -> Rows:
    """Highest resident set during steps of 4,096 examples at the paper's sizes, without set-up on both sides."""
    rows = []
    with _peer(torch) as peer:
        theirs = peer and _peak(peer)
    for chunk in (512,):
        with Side("ours", OURS) as ours:
            found = _peak(ours, encoder_chunk_size=chunk)
        row = {"measure": f"resident set, batch 4,096, encoder_chunk_size {chunk}", "ours": found["gib"], "unit": "GiB"}
        row["seconds per step"] = found["seconds"]
        if theirs:
            row |= {"torch eager": theirs["gib"], "torch seconds per step": theirs["seconds"]}
            row["ours / torch eager"] = found["gib"] / theirs["gib"]
        rows.append(row)
    return rows


def _peak(side: Side, **options: Any) -> dict[str, float]:
    request = {"what": "step", "batch": 4096, "steps": 1, **step.PAPER, **options}
    side.ask(**request)
    side.ask(what="forget_peak")
    seconds = side.ask(**request)["seconds"]
    return {"gib": side.ask(what="peak")["gib"], "seconds": seconds}


def loop(_: Sequence[str] | None, repeats: int) -> Rows:
    """Epochs of 5 steps of 200 rows in a run, against the same program called without a run around it."""
    with Side("ours", [sys.executable, "-m", "benchmarks.epoch"]) as ours:
        turns = [ours.ask(what="loop", number=100) for _ in range(max(1, repeats // 2))]
    ratio = statistics.median(turn["plain"] / turn["ours"] for turn in turns)
    row = {
        "measure": "an epoch of 5 steps of 200 rows, logs and checkpoints",
        "ours": _median(turns, "ours"),
        "unit": "s",
    }
    return [{**row, "plain loop": _median(turns, "plain"), "plain loop / ours": ratio}]


def epoch(_: Sequence[str] | None, repeats: int) -> Rows:
    """How much of an epoch passes outside the compiled steps, batch 512 at the paper's sizes."""
    with Side("ours", [sys.executable, "-m", "benchmarks.epoch"]) as ours:
        shares = ours.ask(what="epochs", number=max(3, repeats))["shares"]
    return [
        {"measure": "share of an epoch outside the steps, batch 512", "ours": statistics.median(shares), "unit": ""}
    ]


MEASURES: dict[str, Callable[[Sequence[str] | None, int], Rows]] = {
    "start": whole.start,
    "demo": whole.demo,
    "step": step_time,
    "kmeans": kmeans,
    "similarities": similarities,
    "loop": loop,
    "memory": memory,
    "growth": growth,
    "study": whole.study,
    "neighbours": neighbours,
    "epoch": epoch,
}
LONGER = "neighbours", "epoch"  # only where they are asked for: the others take 15 minutes


def _peer(torch: Sequence[str] | None) -> Any:
    return Side("torch", torch) if torch else _Nobody()


class _Nobody:
    """The peer where no Python with PyTorch is named."""

    def __enter__(self) -> None:
        return None

    def __exit__(self, *_: Any) -> None:
        return None


def _median(turns: Sequence[dict[str, float]], key: str) -> float:
    return statistics.median(turn[key] for turn in turns)


def _default_name() -> str:
    """Return the processor and its number of cores."""
    lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines() if Path("/proc/cpuinfo").exists() else []
    models = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    wide = " AVX-512" if any("avx512f" in line for line in lines) else ""
    return f"{models[0] if models else platform.machine()}, {os.cpu_count()} cores{wide}"


def main() -> None:
    """Measure, print a line each, and write everything: a file of the machine, and the page of all machines."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--torch-python", default="", help="Python that has torch and fast-pytorch-kmeans")
    parser.add_argument("--machine", default=_default_name(), help="name of this machine")
    parser.add_argument("--json", type=Path, help="file for all figures; default: benchmarks/results/MACHINE.json")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--only", default="", help=f"comma-separated: {','.join(MEASURES)}")
    a = parser.parse_args()
    file = a.json or page.RESULTS / f"{re.sub('[^a-z0-9]+', '_', a.machine.lower())}.json"
    torch, start = [a.torch_python, str(PEER)] if a.torch_python else None, time.monotonic()
    found: dict[str, Any] = {"machine": a.machine, "versions": {}, "date": time.strftime("%Y-%m-%d")}
    found |= {"command": "make bench" + (" TORCH_PYTHON=PYTHON_WITH_TORCH" if torch else ""), "rows": []}
    with Side("ours", OURS) as ours, _peer(torch) as peer:
        for side in filter(None, (ours, peer)):
            found["versions"][side.name] = side.ask(what="versions")
    print(json.dumps(found["versions"]), flush=True)
    before = json.loads(file.read_text(encoding="utf-8")) if file.exists() else {"rows": []}
    for name in a.only.split(",") if a.only else [name for name in MEASURES if name not in LONGER]:
        try:
            rows = MEASURES[name](torch, a.repeats)
        except (RuntimeError, subprocess.CalledProcessError) as e:  # one that fails must not cost the others
            print(f"{name}: {e}", file=sys.stderr, flush=True)
            continue
        found["rows"] += rows
        for row in rows:
            print(f"{time.monotonic() - start:4.0f} s  {json.dumps(row)}", flush=True)
        page.keep(found, before, file)
    if file.parent.resolve() == page.RESULTS:
        page.write()
    print(f"{time.monotonic() - start:.0f} s in all; figures in {file}")


if __name__ == "__main__":
    main()
