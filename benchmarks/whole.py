"""Whole commands, timed from start to end in fresh processes: their start, the demo, a study."""

import os
import re
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

Rows = list[dict[str, Any]]
CONCLUGEN = (sys.executable, "-u", "-m", "conclugen_jax")


def command(*arguments: str, until: str = "", cache: str = "") -> float:
    """Run ``conclugen`` with arguments; return the seconds to its end, or to the first line that a pattern is in.

    Raises:
      RuntimeError: it failed, or ended without such a line.
    """
    env = {**os.environ, **({"JAX_COMPILATION_CACHE_DIR": cache} if cache else {})}
    start, lines = time.perf_counter(), []
    with subprocess.Popen(
        [*CONCLUGEN, *arguments], stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, env=env
    ) as process:
        for line in process.stdout:
            lines.append(line)
            if until and re.search(until, line):
                seconds = time.perf_counter() - start
                process.kill()
                return seconds
    if process.returncode or until:
        raise RuntimeError(f"conclugen {' '.join(arguments)} ended with {process.returncode}: {''.join(lines[-20:])}")
    return time.perf_counter() - start


def start(_: Sequence[str] | None, repeats: int) -> Rows:
    """From the command to the page of help, and to the line that says how the first steps went."""
    with tempfile.TemporaryDirectory() as folder:
        data = _digits(folder)
        pretrain = ("pretrain", "--config=demo", f"--data={data}")
        first = [
            command(*pretrain, f"--workdir={folder}/{i}", until=r"^step \d+/", cache=f"{folder}/cache")
            for i in range(min(repeats, 3) + 1)
        ]
    found = {"conclugen --help": [command("--help") for _ in range(repeats)]}
    found["conclugen pretrain until its first step, compiled before"] = first[1:]
    return [{"measure": name, "ours": statistics.median(times), "unit": "s"} for name, times in found.items()]


def demo(_: Sequence[str] | None, repeats: int) -> Rows:
    """From ``conclugen demo`` to its tables, compiled before."""
    with tempfile.TemporaryDirectory() as folder:
        cache = f"{folder}/cache"
        command("demo", "--folder", f"{folder}/cold", cache=cache)
        times = [command("demo", "--folder", f"{folder}/{i}", cache=cache) for i in range(max(1, repeats // 4))]
    return [{"measure": "conclugen demo, compiled before", "ours": statistics.median(times), "unit": "s"}]


def study(_: Sequence[str] | None, repeats: int) -> Rows:
    """The study of ``configs/study_demo.py``, with its own compilation, once."""
    with tempfile.TemporaryDirectory() as folder:
        data = f"--config.datasets.digits.path={(path := _digits(folder))}", f"--config.pretraining_path={path}"
        seconds = command("study", "--config=study_demo", f"--study={folder}/study", *data, cache=f"{folder}/cache")
        runs = len(list(Path(folder, "study").rglob("config.json")))
    return [
        {
            "measure": f"a study of {runs} small runs",
            "ours": seconds,
            "unit": "s",
            "runs a minute": f"{60 * runs / seconds:.0f}",
        }
    ]


def _digits(folder: str) -> str:
    command("build", "--dataset=digits", f"--data_dir={folder}/data")
    return f"{folder}/data/digits/1.0.0"
