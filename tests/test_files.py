"""Files of our own: whole or not at all, and read back as what they should be."""

import hashlib
import os
import subprocess
import sys

import msgspec
import pytest

from conclugen_jax.errors import ConclugenError
from conclugen_jax.system import files


class Shape(msgspec.Struct):
    """What the file of these tests holds."""

    name: str
    sizes: list[int]


def test_a_file_is_replaced_as_a_whole_or_not_at_all(tmp_path):
    path = tmp_path / "a.json"
    files.write_atomically(path, "old")

    def fail():
        with files.replaced(path) as scratch:
            scratch.write_text("half")
            assert path.read_text() == "old"
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        fail()
    assert path.read_text() == "old"
    files.write_atomically(path, b"new")
    assert path.read_text() == "new"
    assert list(tmp_path.iterdir()) == [path]


def test_two_that_write_one_file_do_not_disturb_each_other(tmp_path):
    path = tmp_path / "a.npy"
    with files.replaced(path, shared=True) as first, files.replaced(path, shared=True) as second:
        first.write_text("first")
        second.write_text("second")
        assert first.suffix == second.suffix == ".npy"
    assert path.read_text() == "first"
    assert list(tmp_path.iterdir()) == [path]


def test_what_a_killed_process_left_is_overwritten(tmp_path):
    code = """if True:
        import os, pathlib
        from conclugen_jax.system import files
        with files.replaced(pathlib.Path("a.json")) as scratch:
            scratch.write_text("half")
            os.kill(os.getpid(), 9)"""
    for _ in range(2):
        assert subprocess.run([sys.executable, "-c", code], cwd=tmp_path, check=False).returncode == -9
    assert len(list(tmp_path.iterdir())) == 1
    files.write_json(tmp_path / "a.json", 1)
    assert [p.name for p in tmp_path.iterdir()] == ["a.json"]


def test_a_full_disk_leaves_the_old_file_and_is_one_sentence(tmp_path, monkeypatch):
    path = tmp_path / "a.json"
    path.write_text("old")

    def full(_):
        raise OSError(28, os.strerror(28))

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(ConclugenError, match=r"a\.json: cannot be written \(No space left.*choose another --study"):
        files.write_json(path, {}, place="--study")
    assert path.read_text() == "old"
    assert list(tmp_path.iterdir()) == [path]


def test_json_comes_back_as_its_type(tmp_path):
    files.write_json(tmp_path / "a.json", {"name": "é", "sizes": [1, 2]})
    assert files.read_json(tmp_path / "a.json", Shape, way_out="restore it") == Shape("é", [1, 2])


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (None, r"cannot be read \(No such file"),
        (b"{", "not valid JSON"),
        (b"\xff", "not valid JSON"),
        (b"[" * 10**5, "not valid JSON"),
        (b"[]", "not as expected"),
        (b'{"name": "x"}', r"not as expected \(.*`sizes`"),
        (b'{"name": "x", "sizes": [1, "2"]}', r"not as expected \(.*sizes\[1\]|\$\.sizes\[\.\.\.\]"),
    ],
)
def test_what_is_missing_or_damaged_is_one_sentence(tmp_path, content, message):
    path = tmp_path / "a.json"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(ConclugenError) as refused:
        files.read_json(path, Shape, way_out="restore it")
    assert str(refused.value).startswith(f"{path}: ")
    assert str(refused.value).endswith("; restore it")
    assert refused.match(message)


def test_a_pipe_is_refused_and_not_waited_for(tmp_path):
    os.mkfifo(tmp_path / "a.json")
    with pytest.raises(ConclugenError, match=r"a\.json: not a regular file but .*; restore it"):
        files.read_json(tmp_path / "a.json", Shape, way_out="restore it")


def test_hashes(tmp_path):
    (tmp_path / "a").write_bytes(b"abc" * 10**5)
    assert files.sha256(tmp_path / "a") == hashlib.sha256(b"abc" * 10**5).hexdigest()


def test_the_size_of_a_folder_whose_files_are_deleted_meanwhile(tmp_path, monkeypatch):
    for name in ("a/x", "b/c/y", "z"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_bytes(bytes(10))
    assert files.size(tmp_path) == 30
    listed, scandir = [], os.scandir

    def deleting(path):
        """List a folder, and delete what another process would by then."""
        found = scandir(path)
        if not listed:
            subprocess.run(["rm", "-r", tmp_path / "b", tmp_path / "z"], check=True)
        listed.append(path)
        return found

    monkeypatch.setattr(os, "scandir", deleting)
    assert files.size(tmp_path) == 10
    assert files.size(tmp_path / "none") == 0
