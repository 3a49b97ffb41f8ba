"""The groups of faults. Each takes a place and a number of seconds, and yields the tallies of its attempts."""

import json
import os
import random
import shutil
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from conclugen_jax.errors import ConclugenError
from conclugen_jax.runs import checkpoint
from faults import bad_numbers, disks, fuzz
from faults.harness import (
    SIGNALS,
    STUDY,
    Place,
    Tally,
    damages,
    differences,
    files_of,
    refusal,
    state_of,
    stopped,
    until,
    within,
)
from faults.soak import soak

Group = Callable[[Place, float], Iterator[Tally]]

LONG = 60.0
"""Seconds from which on a group tries what takes a minute an attempt."""

AT_ONCE = 1.5
"""Factor by which a run takes longer beside another one."""


def kills(place: Place, seconds: float) -> Iterator[Tally]:
    """Kill commands at moments spread over their whole duration."""
    tally = Tally("kill -9 in pretraining: start, compilation, steps, probes, saves")

    def pretraining(rng: random.Random) -> None:
        name = place.fresh(rng)
        for _ in range(rng.choice((1, 1, 2))):  # sometimes the resumed run is killed as well
            process = place.start(place.pretrain(name))
            if until(process, rng.uniform(0, AT_ONCE * place.seconds)):
                process.kill()
            process.communicate()
        place.count_resumed(tally, name)

    within(place, tally, seconds * 0.55, pretraining, most=40)
    yield tally
    tally = Tally("kill -9 in a data build")
    expected = files_of(place.data)

    def building(rng: random.Random) -> None:
        name = place.fresh(rng)
        process = place.start(place.build(name))
        if until(process, rng.uniform(0, 4)):
            process.kill()
        process.communicate()
        code, out = place.run(place.build(name))
        found = files_of(place.folder / name / "digits" / "1.0.0")
        debris = [p.name for p in (place.folder / name).rglob(".*") if p.is_dir()]
        tally.count(
            "survived" if code == 0 and found == expected and not debris else f"{name}: {code} {debris} {out[-300:]}"
        )

    within(place, tally, seconds * 0.1, building, most=10)
    yield tally
    tally = Tally("kill -9 in a downstream run")
    name = place.fresh()
    place.ok(_downstream(place, name))
    result = (place.folder / name / "result.json").read_bytes()

    def predicting(rng: random.Random) -> None:
        name = place.fresh(rng)
        process = place.start(_downstream(place, name))
        if until(process, rng.uniform(0, AT_ONCE * place.seconds)):
            process.kill()
        process.communicate()
        code, out = place.run(_downstream(place, name))
        same = code == 0 and (place.folder / name / "result.json").read_bytes() == result
        tally.count("survived" if same else f"{name}: {code} {out[-300:]}")

    within(place, tally, seconds * 0.15, predicting, most=10)
    yield tally
    if seconds > LONG:
        yield _study_kills(place, seconds * 0.2)


def _study_kills(place: Place, seconds: float) -> Tally:
    """Kill a study of two pretraining runs and two linear evaluations several times in a row."""
    tally = Tally("kill -9 in a study, three times, and its runs with it")
    config = place.folder / "study.py"
    config.write_text(STUDY.format(path=str(place.data)))
    command = ["launch.study", f"--config={config}"]

    def cells(name: str) -> list:
        return json.loads((place.folder / name / "results.json").read_text())["cells"]

    first, start = place.fresh(), time.monotonic()
    place.ok([*command, f"--study={place.folder / first}"])
    expected, whole = without_place(cells(first), first), time.monotonic() - start

    def study(rng: random.Random) -> None:
        name = place.fresh(rng)
        own = [*command, f"--study={place.folder / name}"]
        for _ in range(3):
            process = place.start(own)
            if until(process, rng.uniform(0.2, 1) * whole * 0.7):
                process.kill()
            process.communicate()
        code, out = place.run(own)
        failed = list((place.folder / name).rglob("failed.json"))
        same = not code and not failed and without_place(cells(name), name) == expected
        tally.count("survived" if same else f"{name}: {code} {failed} {out[-300:]}")

    within(place, tally, seconds - whole, study, most=6, at_once=1)
    return tally


def without_place(tree: Any, name: str) -> str:
    """Return content as text, without the name of its folder."""
    return json.dumps(tree, sort_keys=True).replace(name, "")


def _downstream(place: Place, name: str) -> list[str]:
    return [
        "launch.downstream",
        "--config=configs/linear_evaluation.py",
        f"--config.data.path={place.data}",
        f"--config.downstream.checkpoint={place.folder / 'whole'}",
        "--config.train.batch_size=200",
        "--config.train.num_epochs=5",
        f"--workdir={place.folder / name}",
    ]


def signals(place: Place, seconds: float) -> Iterator[Tally]:
    """Send SIGTERM, SIGINT and SIGUSR1 at any moment, once and twice."""
    once, twice = Tally("SIGTERM, SIGINT or SIGUSR1 at any moment"), Tally("the same twice in a row")

    def signalled(rng: random.Random) -> None:
        name, number = place.fresh(rng), rng.choice(list(SIGNALS))
        process = place.start(place.pretrain(name))
        again = rng.random() < 0.3
        tally = twice if again else once
        if not until(process, rng.uniform(0.3, AT_ONCE * place.seconds)):
            process.communicate()
            return
        if again:
            process.send_signal(number)
            until(process, rng.uniform(0, 1))
        code, out, took = stopped(process, number)
        # Before a launcher has installed its handlers the system ends the process by the signal itself.
        if code not in (SIGNALS[number], -number, 0) or "Traceback" in out:
            tally.count(f"{name}: signal {number} gave exit code {code} after {took:.1f} s: {out[-400:]}")
            return
        place.count_resumed(tally, name)

    within(place, once, seconds * 0.75, signalled, most=60)
    yield once
    yield twice
    if seconds > LONG:
        yield _one_of_two(place, seconds * 0.25)


def _one_of_two(place: Place, seconds: float) -> Tally:
    """Send a signal to one of two processes that train together: both end, and resume together exactly."""
    tally = Tally("SIGTERM, SIGINT or SIGKILL to one of two processes")
    expected: dict[str, Any] = {}

    def run(name: str, moment: float | None, number: int, which: int) -> list[tuple[int, str]]:
        started = place.start_two(place.pretrain(name, "--distributed=auto"))
        if moment is not None and until(started[which], moment):
            started[which].send_signal(number)
        return [(p.returncode, out) for p, out in ((p, p.communicate()[0]) for p in started)]

    def signalled(rng: random.Random) -> None:
        name, number, which = place.fresh(rng), rng.choice((15, 2, 9)), rng.choice((0, 1))
        run(name, rng.uniform(0.5, 2 * place.seconds), number, which)
        steps = place.steps(name)
        ends = run(name, None, 0, 0)
        state = state_of(place.folder / name) if not any(code for code, _ in ends) else {}
        if state and not expected:
            whole = place.fresh(rng)
            run(whole, None, 0, 0)
            expected.update(state_of(place.folder / whole))
        different = differences(state, expected) if state else [out[-300:] for _, out in ends]
        tally.went_on += not different and 0 < max(steps, default=0) < place.last_step
        tally.count("survived" if not different else f"{name}: signal {number} to {which}: {different}")

    within(place, tally, seconds, signalled, most=8, at_once=1)
    return tally


def checkpoints(place: Place, seconds: float) -> Iterator[Tally]:
    """Damage every file of the newest checkpoint in each way, in seeded order."""
    tally = Tally("a file of the newest checkpoint flipped, truncated, zeroed or deleted")
    base = place.folder / "whole"
    newest = max(int(p.name) for p in (base / checkpoint.FOLDER).iterdir() if p.name.isdecimal())
    folder = base / checkpoint.FOLDER / str(newest)
    todo = [(p.relative_to(folder), way) for p in sorted(folder.rglob("*")) if p.is_file() for way in range(4)]
    place.random.shuffle(todo)

    def damaged(rng: random.Random) -> None:
        (file, way), name = todo.pop(), place.fresh(rng)
        path = shutil.copytree(base, place.folder / name) / checkpoint.FOLDER / str(newest) / file
        _damage(path, list(damages(path.read_bytes(), rng).values())[way])
        outcome = place.resumes_exactly(name, says="it was moved to")  # from the one before, which is intact
        tally.went_on += outcome == "survived"
        tally.count(f"{name}: {file} {way}: refused" if outcome == "refused" else outcome)

    within(place, tally, seconds * 0.8, damaged, most=len(todo))
    yield tally
    tally = Tally("a file of every checkpoint damaged")

    def all_damaged(rng: random.Random) -> None:
        name = place.fresh(rng)
        workdir = shutil.copytree(base, place.folder / name)
        for step in (workdir / checkpoint.FOLDER).iterdir():
            files = [p for p in sorted(step.rglob("*")) if p.is_file() and p.stat().st_size and p.name != "SHA256SUMS"]
            path = rng.choice(files)
            _damage(path, damages(path.read_bytes(), rng)["one bit flipped"])
        outcome = place.resumes_exactly(name)
        tally.count("a run without an intact checkpoint continued" if outcome == "survived" else outcome)

    within(place, tally, seconds * 0.2, all_damaged, most=5)
    yield tally


def _damage(path: Path, content: bytes | None) -> None:
    path.unlink() if content is None else path.write_bytes(content)


def data(place: Place, seconds: float) -> Iterator[Tally]:
    """Damage every file of a data set in each way, and swap two valid shards."""
    tally = Tally("a file of the data set flipped, truncated, zeroed or deleted")
    todo = [(p.name, way) for p in sorted(place.data.iterdir()) if p.is_file() for way in range(4)]
    place.random.shuffle(todo)

    def damaged(rng: random.Random) -> None:
        (file, way), name = todo.pop(), place.fresh(rng)
        copy = shutil.copytree(place.data, place.folder / f"{name}data")
        content = list(damages((copy / file).read_bytes(), rng).values())[way]
        _damage(copy / file, content)
        tally.count(place.resumes_exactly(name, data=copy))

    within(place, tally, seconds * 0.9, damaged, most=len(todo))
    yield tally
    tally, name = Tally("two valid shards swapped"), place.fresh()
    copy = shutil.copytree(place.data, place.folder / f"{name}data")
    first, second = (next(copy.glob(f"*-{split}.array_record*")) for split in ("train", "test"))
    content = first.read_bytes(), second.read_bytes()
    first.write_bytes(content[1])
    second.write_bytes(content[0])
    tally.count(place.resumes_exactly(name, data=copy))
    yield tally


def together(place: Place, seconds: float) -> Iterator[Tally]:
    """Start two commands at once, and leave stale locks."""
    tally = Tally("two runs in one workdir: the second refused, the first unharmed")
    name = place.fresh()
    first = place.start(place.pretrain(name))
    until(first, place.seconds * 0.5)
    code, out = place.run(place.pretrain(name))
    first.communicate()
    refused = refusal(code, out) and "in use by process" in out
    tally.count(place.resumes_exactly(name) if refused or code == 0 else f"{name}: {code} {out[-300:]}")
    yield tally
    tally = Tally("a run during a build of its data")
    name = place.fresh()
    building = place.start(place.build(f"{name}data", "--overwrite"))
    until(building, place.random.uniform(1.5, 3))
    path = place.folder / f"{name}data" / "digits" / "1.0.0"
    outcome = place.resumes_exactly(name, data=path)
    building.communicate()
    tally.count(outcome if outcome == "survived" else place.resumes_exactly(name, data=path))
    yield tally
    tally = Tally("lock file left by a process that is gone, or that lives and holds no lock")
    for pid in (2**22 - 1, os.getpid()):
        name = place.fresh()
        (place.folder / name).mkdir()
        (place.folder / name / ".lock").write_text(f"process {pid} on here since 2020-01-01T00:00:00+00:00\n")
        tally.count(place.resumes_exactly(name))
    yield tally


def readers(place: Place, seconds: float) -> Iterator[Tally]:
    """Read mutations of every kind of outside file in this process."""
    for kind in fuzz.KINDS:
        tally = Tally(f"fuzzed {kind}")
        end = time.monotonic() + seconds / len(fuzz.KINDS)
        folder = place.folder / f"fuzz_{kind.replace(' ', '_').replace('/', '_')}"
        folder.mkdir()
        for content, read in fuzz.inputs(kind, folder, place):
            try:
                read()
                tally.survived += 1
            except ConclugenError as e:
                tally.count("refused" if "\n" not in str(e) else f"several lines: {e}")
            except Exception as e:  # anything else is what is looked for
                kept = folder / f"lost{len(tally.lost)}"
                kept.write_bytes(content)
                tally.lost.append(f"{kept}: {type(e).__name__}: {str(e)[:200]}")
            if time.monotonic() > end or len(tally.lost) >= 5:
                break
        yield tally


GROUPS: dict[str, tuple[Group, float]] = {
    "kills": (kills, 5),
    "signals": (signals, 5),
    "checkpoints": (checkpoints, 2),
    "data": (data, 1.2),
    "disk": (disks.disk, 2),
    "together": (together, 0.8),
    "numbers": (bad_numbers.numbers, 0.8),
    "readers": (readers, 0.8),
}
"""Groups by name, each with its share of the time."""

EXTRA: dict[str, tuple[Group, float]] = {"soak": (soak, 1)}
"""Groups that run only when they are named."""
