"""What a CPU can tell of our speed and memory, beside PyTorch where a Python with it is named: make bench

    python -m benchmarks.cpu --torch-python=PYTHON_WITH_TORCH --json=FILE [--only=step,kmeans]

Both sides stay in processes of their own and take turns, so that a slow minute of the machine meets both; medians are
compared. The rate of a plain matrix product is measured in the same turns: a faster product library is no faster step.
"""

import argparse
import json
import os
import platform
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks import step
from benchmarks.sides import Side

Rows = list[dict[str, Any]]
PEER = Path(__file__).parent / "torch_peer.py"
OURS = [sys.executable, "-m", "benchmarks.step"]


def step_time(torch: Sequence[str] | None, repeats: int) -> Rows:
    """A step of 512 examples at the paper's sizes and at sizes of 512, and how much of it is not matrix products."""
    rows = []
    with Side("ours", OURS) as ours, _peer(torch) as eager, _peer(torch) as compiled:
        for name, sizes, steps in (("paper sizes", step.PAPER, 2), ("all sizes 512", step.SMALL, 20)):
            took = [_step_turn(ours, eager, compiled, batch=512, steps=steps, **sizes) for _ in range(repeats + 1)][1:]
            row = {"measure": f"step, {name}, batch 512", "ours": _median(took, "ours"), "unit": "s"}
            rates = {side: statistics.median(t[f"{side} gflops"] for t in took) for side in ("ours", "eager") if eager}
            for side in ("eager", "compiled") if eager else ():
                ratio = statistics.median(t[side] / t["ours"] for t in took)
                row |= {f"torch {side}": _median(took, side), f"torch {side} / ours": ratio}
            if eager:
                faster = statistics.median(t["ours gflops"] / t["eager gflops"] for t in took)
                row |= {"without the products' rate": row["torch eager / ours"] / faster, "gflops": rates}
            rows.append(row)
    return rows


def _step_turn(ours: Side, eager: Side | None, compiled: Side | None, **request: Any) -> dict[str, float]:
    found = {"ours": ours.ask(what="step", **request)["seconds"], "ours gflops": ours.ask(what="matmul")["gflops"]}
    if eager:
        found["eager"] = eager.ask(what="step", **request)["seconds"]
        found["eager gflops"] = eager.ask(what="matmul")["gflops"]
        found["compiled"] = compiled.ask(what="step", compiled=True, **request)["seconds"]
    return found


def share_of_products(_: Sequence[str] | None, repeats: int) -> Rows:
    """Which part of the rate of a plain product of 4,096 cubed a whole step of 2,048 examples reaches."""
    with Side("ours", OURS) as ours:
        shares = []
        for _ in range(repeats + 1):
            before = ours.ask(what="matmul")["gflops"]
            seconds = ours.ask(what="step", batch=2048, steps=2, **step.PAPER)["seconds"]
            rate = (before + ours.ask(what="matmul")["gflops"]) / 2
            shares.append(step.flops(2048) / seconds / 1e9 / rate)
    share = statistics.median(shares[1:])
    return [{"measure": "share of the plain product's rate, batch 2,048", "ours": share, "unit": ""}]


def growth(_: Sequence[str] | None, repeats: int) -> Rows:
    """The time of a step by its batch, fitted as a + b n + c n^2, against the operations over the product's rate."""
    batches = (64, 128, 256, 512, 1024, 2048, 4096)
    taken: dict[int, list[float]] = {n: [] for n in batches}
    rates = []
    for n in batches:
        with Side("ours", OURS) as ours:
            steps = max(2, 1024 // n)
            ours.ask(what="step", batch=n, steps=2, **step.PAPER)
            for _ in range(max(2, repeats // 2)):
                rates.append(ours.ask(what="matmul")["gflops"] * 1e9)
                taken[n].append(ours.ask(what="step", batch=n, steps=steps, **step.PAPER)["seconds"])
    n, seconds = np.array(batches, float), np.array([statistics.median(taken[b]) for b in batches])
    # Relative errors: each batch counts alike.
    a, b, c = np.linalg.lstsq(np.stack([n**0, n, n**2], 1) / seconds[:, None], np.ones(len(n)), rcond=None)[0]
    rate = statistics.median(rates)
    expected = step.flops(1) / rate - 2 * 3 * 1536 / rate, 2 * 3 * 1536 / rate
    found = {"a": a, "b / expected": b / expected[0], "c / expected": c / expected[1]}
    return [
        {"measure": "step time a + b n + c n^2, n 64..4,096", "unit": "s", "seconds": seconds.tolist(), **found},
    ]


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
        row |= {side: value, f"{side} / ours": ratio}
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
    for chunk in (0, 1024, 512):
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


def epoch(_: Sequence[str] | None, repeats: int) -> Rows:
    """How much of an epoch passes outside the compiled steps, batch 512 at the paper's sizes."""
    with Side("ours", [sys.executable, "-m", "benchmarks.epoch"]) as ours:
        shares = ours.ask(what="epochs", number=max(3, repeats))["shares"]
    return [
        {"measure": "share of an epoch outside the steps, batch 512", "ours": statistics.median(shares), "unit": ""}
    ]


MEASURES: dict[str, Callable[[Sequence[str] | None, int], Rows]] = {
    "step": step_time,
    "kmeans": kmeans,
    "neighbours": neighbours,
    "similarities": similarities,
    "share": share_of_products,
    "epoch": epoch,
    "growth": growth,
    "memory": memory,
}


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


def _line(row: dict[str, Any]) -> str:
    shown = [f"{row['measure']}:"]
    for key, value in row.items():
        if isinstance(value, float):
            unit = (
                f" {row['unit']}"
                if ("/" not in key and key in ("ours", "plain form")) or key.startswith("torch ")
                else ""
            )
            shown.append(f"{key} {value:.3g}{unit if '/' not in key else ''};")
    return " ".join(shown).rstrip(";")


def main() -> None:
    """Measure, print a line each, and write everything as JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--torch-python", default="", help="Python that has torch and fast-pytorch-kmeans")
    parser.add_argument("--json", type=Path, help="file for all figures")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--only", default="", help=f"comma-separated: {','.join(MEASURES)}")
    a = parser.parse_args()
    torch = [a.torch_python, str(PEER)] if a.torch_python else None
    versions: dict[str, Any] = {"machine": platform.machine(), "processors": os.cpu_count()}
    with Side("ours", OURS) as ours, _peer(torch) as peer:
        for side in filter(None, (ours, peer)):
            versions[side.name] = side.ask(what="versions") | side.ask(what="matmul")
    print(json.dumps(versions), flush=True)
    start, rows = time.monotonic(), []
    for name in a.only.split(",") if a.only else MEASURES:
        for row in MEASURES[name](torch, a.repeats):
            rows.append(row)
            print(_line(row), flush=True)
        if a.json:
            a.json.parent.mkdir(parents=True, exist_ok=True)
            a.json.write_text(json.dumps({"versions": versions, "rows": rows}, indent=1) + "\n")
    print(f"{time.monotonic() - start:.0f} s in all")


if __name__ == "__main__":
    main()
