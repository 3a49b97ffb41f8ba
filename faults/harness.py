"""Commands with faults, and what became of them: survived exactly, refused clearly, or LOST."""

import dataclasses
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from conclugen_jax import checkpoint

ROOT = Path(__file__).parent.parent
CONFIG = """
from configs import demo

def get_config():
    config = demo.get_config()
    config.train.num_epochs, config.train.steps_per_dispatch, config.clustering.start_epoch = 6, 4, 2
    config.schedule.warmup_epochs, config.online_probe.every_epochs, config.online_probe.num_epochs = 1, 2, 2
    config.model.representation_dim, config.model.projection_dim, config.model.reconstruction_dim = 64, 32, 32
    config.checkpoint.keep_newest = 2
    return config
"""


@dataclasses.dataclass
class Tally:
    """What became of the attempts at one fault.

    Attributes:
      fault: what was done.
      survived: times a repeated command ended as if nothing had happened.
      refused: times the command ended with one sentence that says why not.
      lost: what happened in all other cases; must be empty.
    """

    fault: str
    survived: int = 0
    refused: int = 0
    lost: list[str] = dataclasses.field(default_factory=list)

    @property
    def tried(self) -> int:
        return self.survived + self.refused + len(self.lost)

    def count(self, outcome: str) -> None:
        """Take ``survived``, ``refused``, or any other word as what was lost."""
        if outcome in ("survived", "refused"):
            setattr(self, outcome, getattr(self, outcome) + 1)
        else:
            self.lost.append(outcome)


class Place:
    """A folder with a built data set, a configuration and an undisturbed run of it."""

    def __init__(self, folder: Path, seed: int):
        self.folder, self.random = folder, random.Random(seed)
        self.env = {
            **os.environ,
            "JAX_PLATFORMS": "cpu",
            "XLA_FLAGS": "",
            "PYTHONPATH": str(ROOT),
            "JAX_COMPILATION_CACHE_DIR": str(folder / "cache"),
            "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
            "OMP_NUM_THREADS": "1",
        }
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "config.py").write_text(CONFIG)
        self.ok(self.build("data"))
        self.data = folder / "data" / "digits" / "1.0.0"
        self.ok(self.pretrain("first"))  # compiles
        start = time.monotonic()
        self.ok(self.pretrain("whole"))
        self.seconds = time.monotonic() - start
        self.expected = state_of(folder / "whole")

    def build(self, name: str, *options: str) -> list[str]:
        return ["launch.build_dataset", "--dataset=digits", f"--data_dir={self.folder / name}", *options]

    def pretrain(self, name: str, *options: str, data: Path | None = None) -> list[str]:
        return [
            "launch.pretrain",
            f"--config={self.folder / 'config.py'}",
            f"--config.data.path={data or self.data}",
            f"--workdir={self.folder / name}",
            *options,
        ]

    def start(self, command: Sequence[str], *, largest_file: int = 0) -> subprocess.Popen:
        """Start ``python -m COMMAND``; its output is kept. Writing beyond ``largest_file`` bytes fails, if that is not 0."""
        limited = (
            ["bash", "-c", f'ulimit -f {largest_file // 1024}; trap "" XFSZ; exec "$@"', "bash"] if largest_file else []
        )
        return subprocess.Popen(
            [*limited, sys.executable, "-m", *command],
            cwd=ROOT,
            env=self.env,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )

    def run(self, command: Sequence[str], *, largest_file: int = 0) -> tuple[int, str]:
        """Exit code and output of a command; -99 if it does not end in five minutes."""
        process = self.start(command, largest_file=largest_file)
        try:
            out, _ = process.communicate(timeout=300)
        except subprocess.TimeoutExpired:
            process.kill()
            return -99, "does not end: " + process.communicate()[0]
        return process.returncode, out

    def ok(self, command: Sequence[str]) -> None:
        code, out = self.run(command)
        if code:
            raise RuntimeError(f"{' '.join(command)} ended with {code}:\n{out}")

    def fresh(self) -> str:
        """Name of a workdir that is not there yet."""
        return f"run{self.random.getrandbits(40):010x}"

    def resumes_exactly(self, name: str, *options: str, data: Path | None = None) -> str:
        """Repeat the command: ``survived`` if it ends like the undisturbed run, ``refused`` if it says why not."""
        code, out = self.run(self.pretrain(name, *options, data=data))
        if code == 0:
            different = differences(state_of(self.folder / name), self.expected)
            if not different:
                shutil.rmtree(self.folder / name, ignore_errors=True)
                return "survived"
            return f"{name}: differs in {different}"
        return refusal(code, out) or f"{name}: exit code {code}: {out[-600:]}"


def refusal(code: int, out: str) -> str:
    """``refused`` if a command ended as a mistake should: code 2, one sentence, no traceback; else empty."""
    clear = code == 2 and "Traceback" not in out and out.strip().splitlines()[-1].startswith("error: ")
    return "refused" if clear else ""


def state_of(workdir: Path) -> dict[str, Any]:
    """Everything that a run leaves: arrays of the newest checkpoint by path, and the log without its times."""
    with checkpoint.Checkpoints(workdir, read_only=True) as saved:
        tree, info = saved.restore_tree(saved.find("newest"))
    found = {"info": info, **{f"state{path}": x for path, x in _leaves(tree)}}
    for name in ("metrics.jsonl", "probes.jsonl"):
        lines = [json.loads(line) for line in (workdir / name).read_text().splitlines()]
        found[name] = [{k: v for k, v in line.items() if k != "examples_per_second"} for line in lines]
    return found


def _leaves(tree: Any, path: str = "") -> Iterator[tuple[str, np.ndarray]]:
    if isinstance(tree, dict):
        for key, value in tree.items():
            yield from _leaves(value, f"{path}/{key}")
    else:
        yield path, np.asarray(tree)


def differences(a: dict[str, Any], b: dict[str, Any]) -> list[str]:
    """What differs between two runs, bit for bit."""

    def same(x: Any, y: Any) -> bool:
        if isinstance(x, np.ndarray):
            return x.dtype == y.dtype and x.shape == y.shape and x.tobytes() == y.tobytes()
        return x == y

    return sorted(k for k in a.keys() | b.keys() if k not in a or k not in b or not same(a[k], b[k]))


def until(process: subprocess.Popen, seconds: float) -> bool:
    """Wait so long, or until the process has ended; whether it still runs."""
    try:
        process.wait(timeout=seconds)
    except subprocess.TimeoutExpired:
        return True
    return False


def stopped(process: subprocess.Popen, number: int, limit: float = 30.0) -> tuple[int, str, float]:
    """Send a signal; exit code, output, and seconds until the end (-99 beyond the limit)."""
    start = time.monotonic()
    process.send_signal(number)
    try:
        out, _ = process.communicate(timeout=limit)
    except subprocess.TimeoutExpired:
        process.kill()
        return -99, process.communicate()[0], limit
    return process.returncode, out, time.monotonic() - start


def damages(data: bytes, rng: random.Random) -> dict[str, bytes | None]:
    """A file's content damaged in each way; ``None``: the file is deleted."""
    flipped = bytearray(data)
    if data:
        flipped[rng.randrange(len(data))] ^= 1 << rng.randrange(8)
    return {
        "one bit flipped": bytes(flipped),
        "truncated": data[: rng.randrange(len(data))] if data else None,
        "zeroed": bytes(len(data)),
        "deleted": None,
    }


def within(seconds: float, action: Callable[[], None], most: int) -> None:
    """Repeat an action until the time is over, at least once and at most so many times."""
    end = time.monotonic() + seconds
    for _ in range(most):
        action()
        if time.monotonic() > end:
            return


def table(tallies: Sequence[Tally]) -> str:
    """The result as Markdown."""
    lines = ["| fault | tried | survived exactly | refused clearly | LOST |", "|---|---|---|---|---|"]
    lines += [f"| {t.fault} | {t.tried} | {t.survived} | {t.refused} | {len(t.lost)} |" for t in tallies]
    return "\n".join(lines)


SIGNALS = {signal.SIGTERM: 143, signal.SIGINT: 130, signal.SIGUSR1: 138}
