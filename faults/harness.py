"""Start commands, do them harm, and count what they survived exactly, refused clearly, or LOST."""

import concurrent.futures
import dataclasses
import json
import os
import random
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from conclugen_jax.runs import checkpoint
from conclugen_jax.system import processes

ROOT = Path(__file__).parent.parent
CONFIG = """
from configs import demo

def get_config():
    config = demo.get_config()
    config.train.num_epochs, config.train.steps_per_dispatch, config.clustering.start_epoch = 6, 4, 2
    config.schedule.warmup_epochs, config.online_probe.every_epochs, config.online_probe.num_epochs = 1, 2, 2
    config.model.representation_dim, config.model.projection_dim, config.model.reconstruction_dim = 64, 32, 32
    config.checkpoint.every_epochs, config.checkpoint.keep_newest, config.checkpoint.keep_best = 1, 2, 1
    return config
"""
STUDY = """
from configs import demo, study_base, study_demo

def get_config():
    study = study_base.get_config()
    study.name, study.seeds, study.label_draws = "faults", (0, 1), 1
    study.pretraining_path = {path!r}
    study.labels.linear_evaluation = (0,)

    def pretraining(_name):
        config = study_demo.pretraining(_name)
        config.train.num_epochs, config.clustering.start_epoch, config.schedule.warmup_epochs = 4, 2, 1
        config.online_probe.every_epochs, config.checkpoint.every_epochs = 2, 1
        return config

    study_base.add_methods(study, pretraining, {{"video": "pixels", "audio": "fourier", "text": "profiles"}})
    for name in [name for name in study.methods if name != "conclugen"]:
        del study.methods[name]
    study.order = ("conclugen",)
    whole = study_demo.dataset(study.pretraining_path, demo.get_config(), batch_size=200)
    whole.protocols = {{"linear_evaluation": whole.protocols.linear_evaluation}}
    whole.protocols.linear_evaluation.train.num_epochs = 5
    study.datasets.digits = whole
    return study.lock()
"""


@dataclasses.dataclass
class Tally:
    """Count the outcomes of the attempts at one fault.

    Attributes:
      fault: what was done to the command.
      survived: times the repeated command left what an undisturbed one leaves.
      refused: times the command ended with one sentence that says why.
      lost: a description of every other outcome; must be empty.
      went_on: how many of the survivors resumed from a checkpoint in the middle.
    """

    fault: str
    survived: int = 0
    refused: int = 0
    lost: list[str] = dataclasses.field(default_factory=list)
    went_on: int = 0

    @property
    def tried(self) -> int:
        return self.survived + self.refused + len(self.lost)

    def count(self, outcome: str) -> None:
        """Count ``survived`` or ``refused``; note any other text as lost."""
        if outcome in ("survived", "refused"):
            setattr(self, outcome, getattr(self, outcome) + 1)
        else:
            self.lost.append(outcome)


class Place:
    """Build a data set and train an undisturbed run on it, to compare others with.

    Args:
      folder: where the commands read and write.
      seed: the seed of the random numbers.
      xla_flags: how the commands compile; as users' do by default.
    """

    def __init__(self, folder: Path, seed: int, xla_flags: str = ""):
        self.folder, self.seed, self.random = folder, seed, random.Random(seed)
        self.env = {
            **os.environ,
            "JAX_PLATFORMS": "cpu",
            "XLA_FLAGS": xla_flags,
            "PYTHONPATH": str(ROOT),
            "JAX_COMPILATION_CACHE_DIR": os.environ.get("JAX_COMPILATION_CACHE_DIR", str(folder / "cache")),
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
        self.last_step = max(self.steps("whole"))
        if len(self.steps("whole")) < 2:
            raise RuntimeError("the undisturbed run left one checkpoint: nothing to fall back to")

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
        """Start ``python -m COMMAND`` and keep its output; a ``largest_file`` limits the bytes of any file it writes."""
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

    def start_two(self, command: Sequence[str]) -> list[subprocess.Popen]:
        """Start a command as two processes that find each other."""
        with socket.create_server(("", 0)) as server:
            port = server.getsockname()[1]
        shared = {**self.env, processes.COUNT: "2", processes.ADDRESS: f"127.0.0.1:{port}"}
        return [
            subprocess.Popen(
                [sys.executable, "-m", *command],
                cwd=ROOT,
                env={**shared, processes.INDEX: str(i)},
                stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT,
                text=True,
            )
            for i in range(2)
        ]

    def run(self, command: Sequence[str], *, largest_file: int = 0) -> tuple[int, str]:
        """Run a command; return its exit code and output. The code is -99 if it does not end in five minutes."""
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

    def fresh(self, rng: random.Random | None = None) -> str:
        """Return the name of a workdir that does not exist yet."""
        return f"run{(rng or self.random).getrandbits(40):010x}"

    def steps(self, name: str) -> list[int]:
        """Return the steps of the checkpoints in a workdir."""
        folder = self.folder / name / checkpoint.FOLDER
        return [int(p.name) for p in folder.iterdir() if p.name.isdecimal()] if folder.is_dir() else []

    def count_resumed(self, tally: Tally, name: str, *options: str) -> None:
        """Repeat a command that was stopped and count the outcome."""
        steps = self.steps(name)
        outcome = self.resumes_exactly(name, *options)
        tally.went_on += outcome == "survived" and 0 < max(steps, default=0) < self.last_step
        tally.count(outcome)

    def resumes_exactly(self, name: str, *options: str, data: Path | None = None, says: str = "") -> str:
        """Repeat the command. Return ``survived`` if it ends like the undisturbed run, ``refused`` if it says why it cannot."""
        code, out = self.run(self.pretrain(name, *options, data=data))
        if code == 0:
            different = differences(state_of(self.folder / name), self.expected)
            if not different and says in out:
                shutil.rmtree(self.folder / name, ignore_errors=True)
                return "survived"
            return f"{name}: differs in {different}" if different else f"{name}: does not say {says!r}"
        return refusal(code, out) or f"{name}: exit code {code}: {out[-600:]}"


def refusal(code: int, out: str) -> str:
    """Return ``refused`` if a command ended with code 2, one sentence and no traceback; else an empty string."""
    clear = code == 2 and "Traceback" not in out and out.strip().splitlines()[-1].startswith("error: ")
    return "refused" if clear else ""


def state_of(workdir: Path) -> dict[str, Any]:
    """Return everything that a run leaves: the arrays of the newest checkpoint by path, and the logs without times."""
    with checkpoint.Checkpoints(workdir, read_only=True) as saved:
        tree, info = saved.restore_tree(saved.find("newest"))
    found = {"info": info, **{f"state{path}": x for path, x in _leaves(tree)}}
    for name in ("metrics.jsonl", "probes.jsonl"):
        lines = [json.loads(line) for line in (workdir / name).read_text().splitlines()]
        found[name] = [{k: v for k, v in line.items() if k != "examples_per_second"} for line in lines]
    return found


def files_of(folder: Path) -> dict[str, bytes]:
    """Contents of a data set's files; the manifest without where it was built from."""
    return {p.name: p.read_bytes() for p in sorted(folder.glob("*")) if p.is_file()}


def _leaves(tree: Any, path: str = "") -> Iterator[tuple[str, np.ndarray]]:
    if isinstance(tree, dict):
        for key, value in tree.items():
            yield from _leaves(value, f"{path}/{key}")
    else:
        yield path, np.asarray(tree)


def differences(a: dict[str, Any], b: dict[str, Any]) -> list[str]:
    """Return the keys of what differs between two runs, bit for bit."""

    def same(x: Any, y: Any) -> bool:
        if isinstance(x, np.ndarray):
            return x.dtype == y.dtype and x.shape == y.shape and x.tobytes() == y.tobytes()
        return x == y

    return sorted(k for k in a.keys() | b.keys() if k not in a or k not in b or not same(a[k], b[k]))


def until(process: subprocess.Popen, seconds: float) -> bool:
    """Wait some seconds, or until the process ends; return whether it still runs."""
    try:
        process.wait(timeout=seconds)
    except subprocess.TimeoutExpired:
        return True
    return False


def stopped(process: subprocess.Popen, number: int, limit: float = 30.0) -> tuple[int, str, float]:
    """Send a signal; return exit code (-99 beyond the limit), output, and the seconds until the process ended."""
    start = time.monotonic()
    process.send_signal(number)
    try:
        out, _ = process.communicate(timeout=limit)
    except subprocess.TimeoutExpired:
        process.kill()
        return -99, process.communicate()[0], limit
    return process.returncode, out, time.monotonic() - start


def damages(data: bytes, rng: random.Random) -> dict[str, bytes | None]:
    """Return a file's content damaged in each way; ``None`` means that the file is deleted."""
    flipped = bytearray(data)
    if data:
        flipped[rng.randrange(len(data))] ^= 1 << rng.randrange(8)
    return {
        "one bit flipped": bytes(flipped),
        "truncated": data[: rng.randrange(len(data))] if data else None,
        "zeroed": bytes(len(data)),
        "deleted": None,
    }


def within(
    place: Place, tally: Tally, seconds: float, action: Callable[[random.Random], None], most: int, at_once: int = 2
) -> None:
    """Repeat an action, ``at_once`` at a time, at least once and at most ``most`` times, until the time is over.

    Each attempt draws from its own random numbers, seeded by the seed, the fault and the attempt's number.
    """
    end, numbers, lock = time.monotonic() + seconds, iter(range(most)), threading.Lock()

    def attempts() -> None:
        while True:
            with lock:
                number = next(numbers, None)
            if number is None or (number and time.monotonic() > end):
                return
            action(random.Random(f"{place.seed} {tally.fault} {number}"))

    with concurrent.futures.ThreadPoolExecutor(at_once) as pool:
        for future in [pool.submit(attempts) for _ in range(at_once)]:
            future.result()


def table(tallies: Sequence[Tally]) -> str:
    """Return the result as a Markdown table."""
    lines = ["| fault | tried | survived exactly | refused clearly | LOST |", "|---|---|---|---|---|"]
    for t in tallies:
        survived = f"{t.survived} ({t.went_on} from a checkpoint in the middle)" if t.went_on else str(t.survived)
        lines.append(f"| {t.fault} | {t.tried} | {survived} | {t.refused} | {len(t.lost)} |")
    return "\n".join(lines)


SIGNALS = {signal.SIGTERM: 143, signal.SIGINT: 130, signal.SIGUSR1: 138}
