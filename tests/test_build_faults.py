"""Builds that are interrupted, meet each other, or are asked for something that cannot be."""

import contextlib
import dataclasses
import errno
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest

from conclugen_jax.data import assembly, builders, formats, manifest as manifest_lib, records
from conclugen_jax.data.requests import Request
from conclugen_jax.errors import ConclugenError
from conclugen_jax.system import locks, pool
from tests.helpers import Faces
from tests.test_records import Parted, goes_on

ROOT = Path(__file__).parents[1]


class Sleepy:
    """Examples whose reader tells its process id, then takes a minute for the next one."""

    def __init__(self, examples, folder):
        self.examples, self.folder = examples, folder

    def __iter__(self):
        for example in self.examples:
            (self.folder / str(os.getpid())).touch()
            yield example
            time.sleep(60)


class SlowParts(Parted):
    """Parts of nine examples that take for ever."""

    def part(self, split, start, stop):
        return Sleepy(super().part(split, start, stop), Path(os.environ["SLOW"]))


COMMAND = """
import sys
from conclugen_jax.commands import app
from conclugen_jax.data import builders, digits
from tests import test_build_faults
if __name__ == "__main__":
    builders.SHARD_BYTES = 9 * 4 * 52
    digits.Digits = test_build_faults.SlowParts
    app.run("build", sys.argv[1:])
"""


@pytest.fixture
def slow(tmp_path):
    """A build in two worker processes, both of which have begun; and their ids."""
    (tmp_path / "main.py").write_text(COMMAND)
    (tmp_path / "pids").mkdir()
    build = subprocess.Popen(
        [sys.executable, tmp_path / "main.py", "--dataset=digits", f"--data_dir={tmp_path}/data", "--num_workers=2"],
        env={**os.environ, "PYTHONPATH": str(ROOT), "SLOW": str(tmp_path / "pids")},
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )
    deadline = time.monotonic() + 60
    while len(list((tmp_path / "pids").iterdir())) < 2 and time.monotonic() < deadline:
        time.sleep(0.05)
    pids = [int(p.name) for p in (tmp_path / "pids").iterdir()]
    try:
        yield build, pids
    finally:
        build.kill()
        build.wait()
        build.stderr.close()


def gone(pids, seconds):
    deadline = time.monotonic() + seconds
    while any(map(goes_on, pids)) and time.monotonic() < deadline:
        time.sleep(0.05)
    return not any(map(goes_on, pids))


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_one_signal_ends_a_build_in_processes_at_once_and_leaves_nothing(slow, tmp_path, number):
    build, pids = slow
    os.killpg(build.pid, number)  # as a terminal does: to the workers as well
    assert build.wait(10) == 128 + number
    assert gone(pids, 1)
    assert not list((tmp_path / "data").iterdir())
    assert "Traceback" not in build.stderr.read()


@pytest.mark.slow
def test_a_signal_to_a_worker_is_not_its_business(slow):
    build, pids = slow
    for pid in pids:
        os.kill(pid, signal.SIGINT)
    time.sleep(0.5)
    assert build.poll() is None
    assert all(map(goes_on, pids))


def test_a_second_signal_does_not_wait_for_the_first(tmp_path):
    code = (
        "import time\n"
        "from conclugen_jax.system import signals\n"
        "with signals.ending_at_once():\n"
        "    try:\n"
        "        print('ready', flush=True); time.sleep(60)\n"
        "    finally:\n"
        "        print('leaving', flush=True); time.sleep(60)\n"
    )
    build = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, cwd=ROOT, text=True)
    for said, number in (("ready\n", signal.SIGTERM), ("leaving\n", signal.SIGINT)):
        assert build.stdout.readline() == said
        build.send_signal(number)
    assert build.wait(10) == 128 + signal.SIGINT
    build.stdout.close()


def test_workers_are_gone_before_the_scratch_folder_is(tmp_path, monkeypatch):
    """Whatever stops the loop over the parts, also what shows their progress."""
    monkeypatch.setattr(builders, "SHARD_BYTES", 9 * 4 * 52)
    started, alive, contexts, claimed = [], [], pool._Spawning, assembly.claimed

    class Noted(contexts):
        def __init__(self):
            super().__init__()
            self.started = started

    @contextlib.contextmanager
    def watched(target):
        with claimed(target) as scratch:
            try:
                yield scratch
            finally:
                alive.extend(process.is_alive() for process in started)

    def stop(done, total):
        raise KeyboardInterrupt

    monkeypatch.setattr(assembly, "claimed", watched)
    monkeypatch.setattr(pool, "_Spawning", Noted)
    with pytest.raises(KeyboardInterrupt):
        builders.build(Parted(), tmp_path, num_workers=2, progress=stop)
    assert alive == [False, False]
    assert not list(tmp_path.iterdir())


# Two builds of one data set


def test_a_data_set_is_built_by_one_process_at_a_time(tmp_path):
    class Meets(Faces):
        def examples(self, split):
            with pytest.raises(
                ConclugenError, match=rf"faces/1\.0\.0: being built by process {os.getpid()} on .*; wait"
            ):
                builders.build(Faces(seed=1), tmp_path)
            other = builders.build(Faces(name="other"), tmp_path)
            assert manifest_lib.read(other).name == "other"
            yield from super().examples(split)

    builders.build(Meets(), tmp_path)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["faces", "other"]
    with pytest.raises(ConclugenError, match="other examples"):
        builders.build(Faces(seed=1), tmp_path)


def test_what_another_process_built_meanwhile_is_not_replaced(tmp_path, monkeypatch):
    """The place is looked at again once it is owned."""
    claimed = assembly.claimed

    def late(target):
        with monkeypatch.context() as patch:
            patch.setattr(assembly, "claimed", claimed)
            builders.build(Faces(seed=1), tmp_path)
        return claimed(target)

    monkeypatch.setattr(assembly, "claimed", late)
    with pytest.raises(ConclugenError, match="other examples"):
        builders.build(Faces(), tmp_path)
    assert Faces(seed=1).fingerprint() == manifest_lib.read(tmp_path / "faces/1.0.0").source["fingerprint"]


def test_only_the_debris_of_the_same_data_set_is_removed(tmp_path):
    for name in (".building-²-x", ".building-other-1.0.0-x", ".building-faces-1.0.0-x", ".building-faces-1.0.01-x"):
        (tmp_path / name).mkdir()
    builders.build(Faces(), tmp_path)
    assert not (tmp_path / ".building-faces-1.0.0-x").exists()
    assert len(list(tmp_path.iterdir())) == 4


def test_a_lock_is_for_one_and_leaves_no_file(tmp_path):
    path, waited = tmp_path / "lock", []
    with locks.hold(path):
        with pytest.raises(locks.Busy, match=rf"process {os.getpid()} on"), locks.hold(path):
            pass
        code = (
            "import sys; from pathlib import Path; from conclugen_jax.system import locks\n"
            "with locks.hold(Path(sys.argv[1]), wait=lambda who: print(who, flush=True)): print(Path(sys.argv[1]).exists())\n"
        )
        other = subprocess.Popen([sys.executable, "-c", code, path], stdout=subprocess.PIPE, cwd=ROOT, text=True)
        waited.append(other.stdout.readline())
        assert other.poll() is None
    waited.append(other.communicate(timeout=30)[0])
    assert waited[0].startswith(f"process {os.getpid()} on ")
    assert waited[1] == "True\n"  # a lock on a file that is gone would be nobody's
    assert not list(tmp_path.iterdir())


# What is in the place of a data set


def test_what_is_no_data_set_is_never_replaced(tmp_path):
    target = tmp_path / "data/faces/1.0.0"
    target.parent.mkdir(parents=True)
    elsewhere = builders.build(Faces(seed=1), tmp_path / "elsewhere")
    for make, message in (
        (lambda: target.write_text("notes"), "exists, but is not"),
        (lambda: target.symlink_to(tmp_path / "nowhere"), "exists, but is not"),
        (lambda: target.symlink_to(elsewhere), f"a link to {elsewhere}, which --overwrite does not replace"),
    ):
        make()
        with pytest.raises(ConclugenError, match=message):
            builders.build(Faces(), tmp_path / "data", overwrite=True)
        assert [p.name for p in target.parent.iterdir()] == ["1.0.0"]
        assert [p.name for p in target.parents[1].iterdir()] == ["faces"]
        if target.is_symlink() and target.exists():
            assert builders.build(Faces(seed=1), tmp_path / "data") == target
        target.unlink()
    target.mkdir()
    (target / "a.npy").write_text("mine")
    with pytest.raises(ConclugenError, match="exists, but is not a data set"):
        builders.build(Faces(), tmp_path / "data", overwrite=True)
    assert (target / "a.npy").read_text() == "mine"


def table(folder, seed=0, ids=("a", "b", "c")):
    folder.mkdir(parents=True, exist_ok=True)
    np.save(folder / "video.npy", np.random.default_rng(seed).normal(size=(len(ids), 4)).astype(np.float32))
    (folder / "video.txt").write_text("\n".join(ids))
    (folder / "labels.csv").write_text("id,label\n" + "".join(f"{name},{i % 2}\n" for i, name in enumerate(ids)))
    return folder


def request(folder, **changes):
    return dataclasses.replace(Request("features", folder, name="mine"), **changes)


def test_a_source_inside_what_would_be_replaced_is_refused(tmp_path):
    folder = builders.build(formats.open_source(request(table(tmp_path / "first"))), tmp_path / "data")
    (tmp_path / "link").symlink_to(table(folder / "inside", seed=1))
    other = request(tmp_path / "link")
    with pytest.raises(ConclugenError, match=r"a source inside .*mine/1\.0\.0, which --overwrite would delete"):
        builders.build(formats.open_source(other), tmp_path / "data", overwrite=True)
    assert (folder / "inside/video.npy").is_file()
    manifest_lib.verify(folder, manifest_lib.read(folder))


# The disk


@pytest.mark.parametrize(
    ("number", "way"),
    [(errno.ENOSPC, "free space or"), (errno.EDQUOT, "free space or"), (errno.EROFS, "repair that or")],
)
def test_only_a_full_disk_asks_for_space(tmp_path, monkeypatch, number, way):
    def fail(*args):
        raise OSError(number, os.strerror(number), "there")

    monkeypatch.setattr(assembly, "_place", fail)
    expected = rf"^there: cannot write the data set \({re.escape(os.strerror(number))}\); {way} choose another folder$"
    with pytest.raises(ConclugenError, match=expected):
        builders.build(Faces(), tmp_path)
    assert not list(tmp_path.iterdir())


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="no /dev/full")
def test_the_writer_of_records_says_that_the_disk_is_full():
    job = records.Job(Faces().spec, "train", 0, list(Faces().examples("train")), Path("/dev/full"))
    with pytest.raises(OSError, match="No space left on device") as error:
        records.write_part(job)
    assert error.value.errno == errno.ENOSPC


def test_a_source_that_cannot_be_read_is_not_the_disk_that_is_written(tmp_path):
    class Unreadable(Faces):
        def examples(self, split):
            yield from list(super().examples(split))[:3]
            raise PermissionError(13, "Permission denied", "clip3.npy")

    with pytest.raises(ConclugenError, match=r"^clip3.npy: cannot be read \(Permission denied\); repair the source$"):
        builders.build(Unreadable(), tmp_path)


def test_a_folder_whose_name_is_not_utf8(tmp_path):
    with pytest.raises(ConclugenError, match=r"bad\\udcff': the folder's name is not UTF-8; choose another --data_dir"):
        builders.build(Faces(), tmp_path / os.fsdecode(b"bad\xff"))
    source = table(tmp_path / os.fsdecode(b"source\xff"))
    folder = builders.build(formats.open_source(request(source)), tmp_path)
    assert manifest_lib.read(folder).source["path"] == os.fspath(source)


# A source that changes


def test_labels_replaced_before_the_build_begins_are_noticed(tmp_path):
    folder = table(tmp_path / "t")
    source = formats.open_source(request(folder))
    (folder / "labels.csv").write_text("id,label\na,1\nb,0\nc,1\n")
    with pytest.raises(ConclugenError, match="the source changed while it was read; build again"):
        builders.build(source, tmp_path / "data")
    builders.build(formats.open_source(request(folder)), tmp_path / "data")


@pytest.mark.parametrize("what", ["labels.csv", "video.npy", "video.txt"])
def test_files_replaced_while_they_are_opened_are_noticed(tmp_path, monkeypatch, what):
    """What is read and what the fingerprint describes are one content, or there is no data set."""
    folder = table(tmp_path / "t")
    builders.build(formats.open_source(request(folder)), tmp_path / "first")
    newer = table(tmp_path / "newer", seed=1, ids=("c", "b", "a"))
    read, seen = formats.FORMATS["table"], []

    def replaced_after(asked):
        found = read(asked)
        found = dataclasses.replace(found, features={m: opened() for m, opened in found.features.items()})
        seen.append([(f.names(), f.read(0)) for f in found.features.values()])
        if len(seen) == 1 and what != "labels.csv":
            os.replace(newer / what, folder / what)
        return found

    annotate = formats.labels.annotate

    def labels_replaced_after(asked, found):
        result = annotate(asked, found)
        if what == "labels.csv" and (newer / what).exists():
            os.replace(newer / what, folder / what)
        return result

    monkeypatch.setitem(formats.FORMATS, "table", replaced_after)
    monkeypatch.setattr(formats.labels, "annotate", labels_replaced_after)
    source = formats.open_source(request(folder))
    found = builders.build(source, tmp_path / "data")
    monkeypatch.undo()
    assert builders.build(formats.open_source(request(folder)), tmp_path / "data") == found
    fresh = builders.build(formats.open_source(request(folder)), tmp_path / "fresh")
    assert manifest_lib.read(found) == manifest_lib.read(fresh)


def test_old_files_are_opened_once(tmp_path, monkeypatch):
    folder, calls = table(tmp_path / "t"), []
    read = formats.FORMATS["table"]
    monkeypatch.setitem(formats.FORMATS, "table", lambda asked: calls.append(1) or read(asked))
    formats.open_source(request(folder))
    assert len(calls) == 2
    monkeypatch.setattr(formats, "CLOCKS", -3600.0)
    formats.open_source(request(folder))
    assert len(calls) == 3
