"""Train without end under random kills: memory and open files stay flat, the log stays complete."""

import json
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np

from faults.harness import SIGNALS, Place, Tally

WARM_UP = 20.0  # seconds after which a process should have all the memory it needs
MOST_MIB_PER_MINUTE, MOST_FILES_PER_MINUTE = 4.0, 1.0


def soak(place: Place, seconds: float) -> Iterator[Tally]:
    """Train undisturbed for half of the time, then under random kills and signals."""
    name, end = place.fresh(), time.monotonic() + seconds
    # TensorStore keeps a tenth of a MiB of every save (docs/understand/reliability.md): fifty epochs a second.
    options = ["num_epochs=1000000", "online_probe.every_epochs=100", "checkpoint.every_epochs=500"]
    options = [f"--config.{o}" if "." in o else f"--config.train.{o}" for o in options]
    command = place.pretrain(name, *options)
    log = place.folder / name / "metrics.jsonl"
    lost, lives, samples = [], 0, []
    while time.monotonic() < end:
        first = not lives
        span = seconds / 2 if first else min(place.random.uniform(5, 60), max(5.0, end - time.monotonic()))
        process, start = place.start(command), time.monotonic()
        while time.monotonic() - start < span and process.poll() is None:
            time.sleep(0.5)
            if first and time.monotonic() - start > WARM_UP:
                samples.append((time.monotonic() - start, *_usage(process.pid)))
        if process.poll() is not None:
            lost.append(f"{name}: ended by itself with {process.returncode}: {process.communicate()[0][-300:]}")
            break
        process.send_signal(9 if place.random.random() < 0.5 else place.random.choice(list(SIGNALS)))
        process.communicate()
        lives += 1
    steps = [json.loads(line)["step"] for line in log.read_text().splitlines() if line.endswith("}")]
    if steps != list(range(1, len(steps) + 1)):
        lost.append(f"{name}: the log is not complete")
    memory, files = _slopes(samples)
    if memory > MOST_MIB_PER_MINUTE or files > MOST_FILES_PER_MINUTE:
        lost.append(f"{name}: resident set {memory:+.2f} MiB, open files {files:+.2f} a minute")
    tally = Tally(
        f"soak of {seconds:.0f} s: {len(steps):,} steps in {lives} lives, resident set {memory:+.2f} MiB a minute, open files "
        f"{files:+.2f} a minute"
    )
    tally.survived, tally.lost = lives - len(lost), lost
    yield tally


def _usage(process: int) -> tuple[float, int]:
    """Return the resident set in MiB and the number of open files."""
    lines = dict(line.split(":", 1) for line in Path(f"/proc/{process}/status").read_text().splitlines())
    return int(lines["VmRSS"].split()[0]) / 1024, len(list(Path(f"/proc/{process}/fd").iterdir()))


def _slopes(samples: list[tuple[float, float, int]]) -> tuple[float, float]:
    """Return the growth of both per minute, by least squares."""
    if len(samples) < 3:
        return float("nan"), float("nan")
    t, memory, files = np.array(samples).T
    return float(np.polyfit(t / 60, memory, 1)[0]), float(np.polyfit(t / 60, files, 1)[0])
