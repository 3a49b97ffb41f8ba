"""Building shards from .npy tables at the paper's sizes: examples per second, and memory against the number of examples.

    python -m benchmarks.build --examples=50000,200000 --num-workers=2 --folder=/tmp/build

Needs psutil, and on the disk about 50 kB for each example. The tables hold random numbers, so that compression gains
nothing. Memory is the largest sum of resident sets of the build and its worker processes, sampled four times a second,
without memory-mapped pages of the tables.
"""

import argparse
import csv
import json
import shutil
import subprocess
import sys
import threading
import time
from pathlib import Path

import numpy as np

DIMS = {"video": 4096, "audio": 1024, "text": 768}


def write_tables(folder: Path, num_examples: int) -> None:
    """A table for each modality, ids and labels."""
    folder.mkdir(parents=True)
    ids = [f"id{i % 5000:05d}_{i:011d}_{i % 97:05d}" for i in range(num_examples)]
    rng = np.random.default_rng(0)
    for modality, dim in DIMS.items():
        block = rng.normal(size=(4096, dim)).astype(np.float32)
        table = np.lib.format.open_memmap(folder / f"{modality}.npy", "w+", np.float32, (num_examples, dim))
        for start in range(0, num_examples, len(block)):
            stop = min(start + len(block), num_examples)
            table[start:stop] = np.roll(block, start // 4096, axis=0)[: stop - start]
        table.flush()
        del table
        (folder / f"{modality}.txt").write_text("\n".join(ids), encoding="utf-8")
    with (folder / "labels.csv").open("w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file)
        writer.writerow(["id", "split", "label", "group"])
        writer.writerows((name, "train", str(i % 7), name[:7]) for i, name in enumerate(ids))


def build_command(name: str, source: Path, data_dir: Path, num_workers: int = 0) -> list[str]:
    """The command that builds a table's shards; 0 processes stand for as many as there are cores."""
    command = [sys.executable, "-m", "launch.build_dataset", "--dataset=features", f"--name={name}"]
    return [*command, f"--source={source}", f"--data_dir={data_dir}", f"--num_workers={num_workers}"]


def build(source: Path, data_dir: Path, num_workers: int) -> dict[str, float]:
    """Seconds and peak memory of the command that builds."""
    import psutil

    command = build_command("benchmark", source, data_dir, num_workers)
    start = time.perf_counter()
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL)
    peak, stop = [0.0], threading.Event()

    def watch() -> None:
        main = psutil.Process(process.pid)
        while not stop.wait(0.25):
            total = 0
            for each in [main, *_children(main)]:
                try:
                    memory = each.memory_info()
                    total += memory.rss - memory.shared
                except psutil.Error:
                    continue
            peak[0] = max(peak[0], total / 2**30)

    watcher = threading.Thread(target=watch, daemon=True)
    watcher.start()
    code = process.wait()
    stop.set()
    watcher.join()
    if code:
        raise SystemExit(f"the build ended with exit code {code}")
    return {"seconds": time.perf_counter() - start, "peak_gib": peak[0]}


def _children(process):
    import psutil

    try:
        return process.children(recursive=True)
    except psutil.Error:
        return []


def main() -> None:
    """Build at each size and fit memory against the number of examples."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--examples", default="50000,200000")
    parser.add_argument("--num-workers", type=int, default=2)
    parser.add_argument("--folder", type=Path, required=True, help="scratch; must not exist, is removed in the end")
    args = parser.parse_args()
    results = []
    args.folder.mkdir(parents=True)
    try:
        for n in map(int, args.examples.split(",")):
            write_tables(args.folder / "source", n)
            result = {"examples": n, **build(args.folder / "source", args.folder / "data", args.num_workers)}
            result["examples_per_second"] = n / result["seconds"]
            results.append(result)
            print(json.dumps(result), flush=True)
            shutil.rmtree(args.folder / "source")
            shutil.rmtree(args.folder / "data")
    finally:
        shutil.rmtree(args.folder, ignore_errors=True)
    if len(results) > 1:
        slope, base = np.polyfit([r["examples"] for r in results], [r["peak_gib"] for r in results], 1)
        million = slope * 1e6
        print(
            f"peak memory: {base:.3f} GiB + {million:.3f} GiB per million examples; at a million {base + million:.2f}"
        )


if __name__ == "__main__":
    main()
