"""Outside files, mutated: bytes flipped, cut, doubled, spliced with what readers trip over, and random ones."""

import dataclasses
import itertools
import random
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np

from conclugen_jax import config as config_lib
from conclugen_jax import workdir as workdir_lib
from conclugen_jax.data import formats
from conclugen_jax.data import manifest as manifest_lib
from conclugen_jax.data.requests import Request
from conclugen_jax.extract import subtitles, torch_files

TOKENS = (
    b"null", b"NaN", b"-Infinity", b"1e999", b"-1", b"99999999999999999999", b"true", b"[]", b"{}", b'""', b"\x00", b"\xff\xfe",
    b"\n", b",", b'"', b"\\u0000", b"../../etc/passwd", b"[" * 200, b"0x7f", b"id", b"split", b"label",
    b"'|O'", b"(1000000000000, 8)",
)  # fmt: skip


def mutated(data: bytes, rng: random.Random) -> bytes:
    """A content with one to four changes, or none of it."""
    if rng.random() < 0.02:
        return rng.randbytes(rng.randrange(200))
    content = bytearray(data)
    for _ in range(rng.choice((1, 1, 2, 4))):
        at = rng.randrange(len(content) + 1)
        kind = rng.randrange(5)
        if kind == 0 and content:
            content[at % len(content)] ^= 1 << rng.randrange(8)
        elif kind == 1:
            del content[at:]
        elif kind == 2:
            content[at:at] = rng.choice(TOKENS)
        elif kind == 3:
            content[at : at + rng.randrange(1, 12)] = rng.choice(TOKENS)
        else:
            content[at:at] = content[at : at + rng.randrange(1, 200)]
    return bytes(content)


def _table(path: Path) -> Callable[[], Any]:
    """Reader of a small source of features, one of whose files is mutated: everything in it is read."""

    def read() -> None:
        source = formats.open_source(Request("features", path, name="mine"))
        for split in source.spec.splits:
            for _ in itertools.islice(source.examples(split), 20):
                pass

    return read


def _source(folder: Path, layout: str) -> Path:
    """A valid source; the file that is to be mutated."""
    folder.mkdir(parents=True)
    ids = [f"clip{i}" for i in range(8)]
    x = np.random.default_rng(0).normal(size=(8, 3)).astype(np.float32)
    (folder / "labels.csv").write_text(
        "id,split,label,group\n"
        + "".join(f"{k},{'train' if i < 6 else 'test'},{i % 2},g{i}\n" for i, k in enumerate(ids))
    )
    if layout == "npz":
        columns = {"split": ["train"] * 6 + ["test"] * 2, "label": np.arange(8) % 2, "group": ids}
        np.savez(folder.with_suffix(".npz"), ids=ids, video=x, **columns)
        return folder.with_suffix(".npz")
    np.save(folder / "video.npy", x)
    (folder / "video.txt").write_text("\n".join(ids))
    return {"npy": folder / "video.npy", "labels": folder / "labels.csv", "ids": folder / "video.txt"}[layout]


FILES = Path(__file__).parents[1] / "tests" / "parity" / "files"
SUBTITLES = b"1\n00:00:01,000 --> 00:00:02,000\nhello <i>you</i>\n\n2\n00:00:03,500 --> 00:00:04,000\nand you\n"
ALONE: dict[str, tuple[str, bytes, Callable[[Path], Any]]] = {
    "weights": ("weights.pth", (FILES / "archive.pth").read_bytes(), torch_files.read),
    "old weights": ("weights.pth", (FILES / "old.pth").read_bytes(), torch_files.read),
    "subtitles": ("words.srt", SUBTITLES, subtitles.read),
    "intervals": ("words.csv", b"start,end,text\n0,1.5,hello\n2,3,you\n", subtitles.read),
}
"""Kinds that are read alone: file, content, reader."""

KINDS = ("manifest", "configuration", "metrics log", "bad steps", "labels", "ids", "npy", "npz", *ALONE)


@dataclasses.dataclass(frozen=True)
class Target:
    """A file that a reader reads.

    Attributes:
      path: of the file.
      valid: its content.
      read: reads it.
      renew: makes the files beside it anew; a reader may have left something there.
    """

    path: Path
    valid: bytes
    read: Callable[[], Any]
    renew: Callable[[], Any] = lambda: None


def target(kind: str, folder: Path, run: Path) -> Target:
    """The file of a kind, in a folder of its own; ``run``: a whole run, whose files are taken as valid ones."""
    files = {"manifest": "data.json", "configuration": "config.json", "metrics log": "metrics.jsonl"}
    if kind in files or kind == "bad steps":
        valid = (run / files[kind]).read_bytes() if kind in files else b'{"step": 3, "ids": []}\n{"step": 4}\n'
        name = files.get(kind, workdir_lib.BAD_STEPS)
        readers: dict[str, Callable[[], Any]] = {
            "manifest": lambda: manifest_lib.read_file(folder / name, missing="name another"),
            "configuration": lambda: config_lib.differences(
                workdir_lib.read_config(folder), workdir_lib.read_config(run)
            ),
            "metrics log": lambda: workdir_lib.MetricsLog(folder, 10**9).__exit__(None),
            "bad steps": lambda: workdir_lib.left_out_steps(folder),
        }
        return Target(folder / name, valid, readers[kind])
    if kind in ALONE:
        name, valid, read_alone = ALONE[kind]
        return Target(folder / name, valid, lambda: read_alone(folder / name))

    def renew() -> Path:
        shutil.rmtree(folder / "source", ignore_errors=True)
        (folder / "source.npz").unlink(missing_ok=True)
        return _source(folder / "source", kind)

    path = renew()
    return Target(path, path.read_bytes(), _table(path if kind == "npz" else folder / "source"), renew)


def inputs(kind: str, folder: Path, place: Any) -> Iterator[tuple[bytes, Callable[[], Any]]]:
    """Endless mutations of a kind of file: the content, and the reading of it."""
    file = target(kind, folder, place.folder / "whole")
    for i in itertools.count(1):
        content = mutated(file.valid, place.random)
        file.path.write_bytes(content)
        yield content, file.read
        if i % 500 == 0:
            file.renew()
