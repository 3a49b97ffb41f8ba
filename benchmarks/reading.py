"""Batches from the host table and from the shards against a PyTorch DataLoader over one .npy file per clip and modality.

    python -m benchmarks.reading --torch-python=PATH_TO_A_PYTHON_WITH_TORCH --examples=20000 --repeats=5 --folder=/tmp/reading

The paper's sizes, batches of 512 in random order, everything in the page cache. The DataLoader has two worker processes
that load three files for each clip and stack them; ours runs in one process, with the threads that array_record
starts by itself. Both deliver float32 arrays in main memory. Sides take turns; medians of examples per second.
"""

import argparse
import json
import shutil
import statistics
import subprocess
import time
from pathlib import Path

import numpy as np

from benchmarks.build import DIMS, build_command

BATCH = 512

PEER = """
import json, sys, time
import numpy as np, torch

class Clips(torch.utils.data.Dataset):
    def __init__(self, folder, num_examples, modalities):
        self.folder, self.num_examples, self.modalities = folder, num_examples, modalities
    def __len__(self):
        return self.num_examples
    def __getitem__(self, i):
        return {m: torch.from_numpy(np.load(f"{self.folder}/{m}/train/clip{i}.npy")) for m in self.modalities}

if __name__ == "__main__":
    folder, n, batch, modalities = sys.argv[1], int(sys.argv[2]), int(sys.argv[3]), sys.argv[4].split(",")
    loader = torch.utils.data.DataLoader(
        Clips(folder, n, modalities), batch_size=batch, shuffle=True, drop_last=True, num_workers=2, persistent_workers=True
    )
    sum(1 for _ in loader)  # the workers are started, the files are in the cache
    start = time.perf_counter()
    examples = sum(len(next(iter(b.values()))) for b in loader)
    print(json.dumps({"examples_per_second": examples / (time.perf_counter() - start)}))
"""


def write_clips(folder: Path, num_examples: int) -> None:
    """One npy file per clip and modality."""
    rng = np.random.default_rng(0)
    for modality, dim in DIMS.items():
        (folder / modality / "train").mkdir(parents=True)
        block = rng.normal(size=(1000, dim)).astype(np.float32)
        for i in range(num_examples):
            np.save(folder / modality / "train" / f"clip{i}.npy", block[i % 1000])


def peer(python: str, script: Path, folder: Path, num_examples: int) -> float:
    """Examples per second of the DataLoader."""
    command = [python, script, folder, str(num_examples), str(BATCH), ",".join(DIMS)]
    result = subprocess.run(list(map(str, command)), capture_output=True, text=True, check=True)
    return json.loads(result.stdout.splitlines()[-1])["examples_per_second"]


def ours(dataset, tier: str, epoch: int) -> float:
    """Examples per second of one epoch from a tier that has been opened before."""
    from conclugen_jax.data import batches

    stream = batches.ShardStream(dataset, "train", list(DIMS))
    rows = batches.load(stream, tier=tier, host_cache_gib=0.0)
    steps = len(rows.usable) // BATCH
    order = batches.batch_indices(rows.usable, seed=0, epoch=epoch, first_step=0, num_steps=steps, batch_size=BATCH)
    rows.rows(order[0])
    start = time.perf_counter()
    for batch in batches.prefetch(rows.rows, order):
        if len(batch["features"]["video"]) != BATCH:
            raise SystemExit("a batch of the wrong size")
    return steps * BATCH / (time.perf_counter() - start)


def main() -> None:
    """Write clips, build, take turns, print medians and ratios."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--examples", type=int, default=20_000)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--torch-python", help="a Python with torch; without it only our side is timed")
    parser.add_argument("--folder", type=Path, required=True, help="scratch; must not exist, is removed in the end")
    args = parser.parse_args()
    args.folder.mkdir(parents=True)
    try:
        write_clips(args.folder / "clips", args.examples)
        command = build_command("reading", args.folder / "clips", args.folder / "data")
        subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
        compare(args)
    finally:
        shutil.rmtree(args.folder, ignore_errors=True)


def compare(args: argparse.Namespace) -> None:
    """Take turns and print."""
    from conclugen_jax.data import shards

    dataset = shards.open_dataset(args.folder / "data/reading/1.0.0", verify="size")
    script = args.folder / "peer.py"
    script.write_text(PEER)
    rates: dict[str, list[float]] = {"host table": [], "shard stream": [], "DataLoader": []}
    for repeat in range(args.repeats):
        rates["host table"].append(ours(dataset, "host", repeat))
        rates["shard stream"].append(ours(dataset, "shards", repeat))
        if args.torch_python:
            rates["DataLoader"].append(peer(args.torch_python, script, args.folder / "clips", args.examples))
        print({name: round(values[-1]) for name, values in rates.items() if values}, flush=True)
    medians = {name: statistics.median(values) for name, values in rates.items() if values}
    print(json.dumps({"examples_per_second": medians}))
    for name in ("host table", "shard stream"):
        ratios = sorted(a / b for a, b in zip(rates[name], rates["DataLoader"], strict=False))
        if ratios:
            print(f"{name}: {statistics.median(ratios):.1f} times the DataLoader ({ratios[0]:.1f} to {ratios[-1]:.1f})")


if __name__ == "__main__":
    main()
