"""Filling a device table: seconds, and the host's memory beside the table itself.

    python -m benchmarks.device_table --examples=500000 --folder=/tmp/table

Rows of the paper's sizes, built into shards, then read into the memory-mapped table and copied to the device by chunks.
On a CPU the device's memory is the host's, so the table itself is counted apart: what is left is the price of filling.
Needs psutil, about 75 kB of disk for each example, and memory for the table (24 kB for each).
"""

import argparse
import json
import shutil
import subprocess
import threading
import time
from pathlib import Path

from benchmarks.build import DIMS, build_command, write_tables


def main() -> None:
    """Build, fill, print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--examples", type=int, default=100_000)
    parser.add_argument("--folder", type=Path, required=True, help="scratch; must not exist, is removed in the end")
    args = parser.parse_args()
    args.folder.mkdir(parents=True)
    try:
        write_tables(args.folder / "source", args.examples)
        command = build_command("table", args.folder / "source", args.folder / "data")
        subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
        shutil.rmtree(args.folder / "source")
        print(json.dumps(measure(args.folder / "data/table/1.0.0")))
    finally:
        shutil.rmtree(args.folder, ignore_errors=True)


def measure(folder: Path) -> dict[str, float]:
    """Seconds and GiB of each stage."""
    import jax
    import psutil

    from conclugen_jax.data import batches, shards
    from conclugen_jax.system import progress
    from conclugen_jax.train import parallel

    process, peak, stop = psutil.Process(), [0], threading.Event()

    def own() -> int:
        memory = process.memory_info()
        return memory.rss - memory.shared

    def watch() -> None:
        while not stop.wait(0.05):
            peak[0] = max(peak[0], own())

    before = own()
    threading.Thread(target=watch, daemon=True).start()
    stream = batches.ShardStream(shards.open_dataset(folder, verify="size"), "train", list(DIMS))
    start = time.perf_counter()
    with progress.Counter("reading train") as counter:
        rows = batches.load(stream, tier="device", host_cache_gib=0.25, progress=counter)
    mapped = time.perf_counter()
    table = parallel.replicate_by_rows(rows.table["features"], jax.devices()[:1])
    jax.block_until_ready(table)
    filled = time.perf_counter()
    stop.set()
    size = sum(x.nbytes for x in table.values())
    return {
        "examples": rows.num_examples,
        "table_gib": size / 2**30,
        "seconds_to_map_the_shards": mapped - start,
        "seconds_to_fill_the_device": filled - mapped,
        "peak_gib_beside_the_table": (peak[0] - before - size) / 2**30,
    }


if __name__ == "__main__":
    main()
