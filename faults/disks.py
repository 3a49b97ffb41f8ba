"""Disks that are full, read-only or gone, in the middle of a build or a run."""

import os
import random
import shutil
import subprocess
from collections.abc import Callable, Iterator

from faults.harness import Place, Tally, files_of, refusal, until, within


def disk(place: Place, seconds: float) -> Iterator[Tally]:
    """Fill the disk, make it read-only, or remove the workdir."""
    tally = Tally("disk full during build (no file beyond a size), then repeated")

    def full_build(rng: random.Random) -> None:
        name, size = place.fresh(rng), rng.randrange(1 << 10, 1 << 21)
        code, out = place.run(place.build(name), largest_file=size)
        if code and not refusal(code, out):
            tally.count(f"{name}: limit {size}: {code} {out[-400:]}")
            return
        code, out = place.run(place.build(name))
        same = code == 0 and files_of(place.folder / name / "digits" / "1.0.0") == files_of(place.data)
        tally.count("survived" if same else f"{name}: {code} {out[-300:]}")

    within(place, tally, seconds * 0.2, full_build, most=8)
    yield tally
    tally = Tally("disk full during training (saves and log), then space and repeated")

    def full_run(rng: random.Random) -> None:
        name = place.fresh(rng)
        with _small_disk(place, name, rng.randrange(1 << 18, 1 << 24)) as grow:
            code, out = place.run(place.pretrain(name))
            if code and not refusal(code, out):
                tally.count(f"{name}: {code} {out[-400:]}")
                return
            grow()
            place.count_resumed(tally, name)

    within(place, tally, seconds * 0.6, full_run, most=20)
    yield tally
    tally, name = Tally("workdir removed during the run"), place.fresh()
    process = place.start(place.pretrain(name))
    if until(process, place.seconds * 0.7):
        shutil.rmtree(place.folder / name, ignore_errors=True)
    out, _ = process.communicate()
    clear = process.returncode == 0 or refusal(process.returncode, out)
    tally.count(place.resumes_exactly(name) if clear else f"{name}: {process.returncode} {out[-400:]}")
    yield tally
    tally, name = Tally("workdir on a read-only disk"), place.fresh()
    with _small_disk(place, name, 1 << 26):
        if os.path.ismount(place.folder / name):
            subprocess.run(["mount", "-o", "remount,ro", place.folder / name], check=True)
            tally.count(place.resumes_exactly(name))
    yield tally


class _small_disk:
    """Mount a small tmpfs at a workdir, where that is allowed; entering returns a function that makes room."""

    def __init__(self, place: Place, name: str, size: int):
        self._path, self._size = place.folder / name, size

    def __enter__(self) -> Callable[[], None]:
        self._path.mkdir()
        options = ["-t", "tmpfs", "-o", f"size={self._size}", "tmpfs", str(self._path)]
        self._mounted = subprocess.run(["mount", *options], capture_output=True, check=False).returncode == 0
        return self._grow

    def _grow(self) -> None:
        if self._mounted:
            subprocess.run(["mount", "-o", f"remount,size={1 << 28}", str(self._path)], check=True)

    def __exit__(self, *_: object) -> None:
        if self._mounted:
            subprocess.run(["umount", "-l", str(self._path)], check=False)
