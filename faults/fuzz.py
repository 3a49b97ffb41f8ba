"""Mutate outside files: flip, cut, double and splice bytes, and insert what readers trip over."""

import dataclasses
import itertools
import json
import pickle  # writes what is then mutated; nothing here reads any
import random
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np

from conclugen_jax.data import formats, manifest as manifest_lib
from conclugen_jax.data.importers import mmsa
from conclugen_jax.data.requests import Request
from conclugen_jax.evaluate import exchange
from conclugen_jax.extract import clips
from conclugen_jax.extract.media import subtitles
from conclugen_jax.extract.networks import torch_files
from conclugen_jax.runs import checkpoint, config as config_lib, log as log_lib, workdir as workdir_lib
from conclugen_jax.system.files import sha256

TOKENS = (
    b"null", b"NaN", b"-Infinity", b"1e999", b"-1", b"99999999999999999999", b"true", b"[]", b"{}", b'""', b"\x00", b"\xff\xfe",
    b"\n", b",", b'"', b"\\u0000", b"../../etc/passwd", b"[" * 200, b"0x7f", b"id", b"split", b"label",
    b"'|O'", b"(1000000000000, 8)",
)  # fmt: skip


def mutated(data: bytes, rng: random.Random) -> bytes:
    """Return a content with one to four changes, or rarely random bytes instead."""
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


def _everything(request: Request) -> Callable[[], Any]:
    """Return a reader of everything in a small source, one of whose files is mutated."""

    def read() -> None:
        source = formats.open_source(request)
        for split in source.spec.splits:
            for _ in itertools.islice(source.examples(split), 20):
                pass

    return read


def _tables(folder: Path, kind: str) -> tuple[Path, Request]:
    """Write features with ids and labels; return the file to mutate and the request that opens the source."""
    ids, splits = [f"clip{i}" for i in range(8)], ["train"] * 6 + ["test"] * 2
    x = np.random.default_rng(0).normal(size=(8, 3)).astype(np.float32)
    columns = {"split": splits, "label": [i % 2 for i in range(8)], "group": ids}
    if kind in ("npz", "parquet"):
        path = folder / f"mine.{kind}"
        if kind == "npz":
            np.savez(path, ids=ids, video=x, **columns)
        else:
            import pyarrow.parquet

            features = {"label": {"names": ["no", "yes"], "_type": "ClassLabel"}}
            described = {"huggingface": json.dumps({"info": {"features": features}})}
            table = pyarrow.table({"id": ids, "video": list(x), **columns})
            pyarrow.parquet.write_table(table.replace_schema_metadata(described), path)
        return path, Request("features", path, name="mine")
    rows = [",".join(map(str, row)) for row in zip(ids, *columns.values(), strict=True)]
    (folder / "labels.csv").write_text("\n".join(["id,split,label,group", *rows]) + "\n")
    np.save(folder / "video.npy", x)
    (folder / "video.txt").write_text("\n".join(ids))
    mutated_file = {"npy": "video.npy", "labels": "labels.csv", "ids": "video.txt"}[kind]
    return folder / mutated_file, Request("features", folder, name="mine")


def _csd(folder: Path, kind: str) -> tuple[Path, Request]:
    """Write sequences and labels of three videos of CMU-MOSI, one of each fold."""
    import h5py

    videos, intervals = ("03bSnISJMiM", "c5xsKMxpXnc", "tmZoasNr4rU"), np.array([[0.0, 1.0], [1.0, 2.0], [2.0, 3.0]])
    for name, dim in (("audio", 2), ("Labels", 1)):
        with h5py.File(folder / f"{name}.csd", "w") as file:
            for video in videos:
                group = file.create_group(f"{name}/data/{video}")
                group["features"], group["intervals"] = np.ones((3, dim), np.float32), intervals
    mutated_file = {"csd": "audio.csd", "csd labels": "Labels.csd"}[kind]
    return folder / mutated_file, Request("cmu_mosi", folder, modalities={"audio": str(folder / "audio.csd")})


def _authors(folder: Path, _kind: str) -> tuple[Path, Request]:
    """Write a tree of the authors' code with its annotations in YAML."""
    tree = {"train": ["dia0_utt0", "dia0_utt1"], "val": ["dia0_utt0"], "test": ["dia7_utt3"]}
    lines = []
    for split, names in tree.items():
        (folder / "features" / "texts_cropped" / split).mkdir(parents=True)
        lines.append(f"{split}:")
        for name in names:
            np.save(folder / "features" / "texts_cropped" / split / f"{name}.npy", np.ones(3, np.float32))
            lines += [f"  {name}:", "    emotions: 3", "    sentiment: -1", "    person_id: Ross"]
    path = folder / "annotations_cropped.yaml"
    path.write_text("\n".join(lines) + "\n")
    return path, Request("meld", folder)


def _listed(folder: Path, _kind: str) -> tuple[Path, Request]:
    """Write a ``metadata.csv`` and the features that it lists."""
    for name in ("train/a.npy", "test/b.npy"):
        (folder / name).parent.mkdir()
        np.save(folder / name, np.ones(3, np.float32))
    (folder / "metadata.csv").write_text("file_name,id,label,group\ntrain/a.npy,a,joy,x\ntest/b.npy,b,joy,y\n")
    return folder / "metadata.csv", Request("features", folder, name="mine")


WIDE = {
    "openface": ("m/a.csv", "frame, face_id, confidence, success, x_0\n1, 0, 0.9, 1, 2.0\n2, 1, 0.1, 0, -nan(ind)\n"),
    "opensmile csv": ("m.csv", "name;frameTime;energy;pitch\n'a.wav';0.000000;1.5e+00;2\n'x/b.wav';0.010000;3;4\n"),
    "arff": (
        "m.arff",
        "@relation r\n@attribute name string\n@attribute x numeric\n@attribute class {0,1}\n@data\n'a',1,?\n'b',2.5,1\n",
    ),
    "feature csv": ("m.csv", ",f0,f1\na,1,2\nb,-3e5,inf\nc,,NA\n"),
}
"""Kinds of tables with a column per feature: name of the file, content."""


def _wide(folder: Path, kind: str) -> tuple[Path, Request]:
    """Write a table with a column per feature, beside labels."""
    name, content = WIDE[kind]
    (folder / name).parent.mkdir(exist_ok=True)
    (folder / name).write_text(content)
    (folder / "labels.csv").write_text("id,label\na,1\nb,0\n")
    modality = {"m": str(folder / name.partition("/")[0])}  # named, so that it is read whatever its header is
    return folder / name, Request("features", folder, name="mine", modalities=modality)


def _merbench(folder: Path, _kind: str) -> tuple[Path, Request]:
    """Write features of MERBench and their labels in pickled dictionaries, not compressed, so that mutations get there."""
    (folder / "features" / "f-UTT").mkdir(parents=True)
    for clip in "abc":
        np.save(folder / "features" / "f-UTT" / f"{clip}.npy", np.ones(3, np.float32))
    labels = {clip: {"emo": emo, "val": np.float64(0.5)} for clip, emo in (("a", "joy"), ("b", "sad"))}
    np.savez(folder / "label.npz", train_corpus=labels, test_corpus={"c": {"emo": "joy", "val": -10}})
    return folder / "label.npz", Request("features", folder, name="mine", labels=(folder / "label.npz",))


SOURCES: dict[str, Callable[[Path, str], tuple[Path, Request]]] = {
    **dict.fromkeys(("labels", "ids", "npy", "npz", "parquet"), _tables),
    **dict.fromkeys(("csd", "csd labels"), _csd),
    "annotations": _authors,
    "listing": _listed,
    **dict.fromkeys(WIDE, _wide),
    "merbench labels": _merbench,
}
"""Kinds that are read as part of a source, each with what writes a valid one."""


def _mmsa(folder: Path) -> tuple[bytes, Callable[[], Any]]:
    """Return the content of a pickle of MMSA, and what converts it."""
    values = {"id": ["a$_$0", "b$_$1"], "text": np.ones((2, 2, 3), np.float32), "audio": np.ones((2, 2, 1), np.float32)}
    content = pickle.dumps({"train": {**values, "regression_labels": np.zeros(2, np.float32)}}, 4)

    def read() -> None:
        shutil.rmtree(folder / "tables", ignore_errors=True)
        mmsa.convert(folder / "mmsa.pkl", folder / "tables")

    return content, read


def _export(folder: Path, run: Path, kind: str) -> tuple[Path, Callable[[], Any]]:
    """Export weights; return the file to mutate and the import of both, which first makes the hash of the weights fit."""
    if not (folder / "export").exists():
        exchange.export_weights(run, folder / "export")
    facts = folder / "export" / exchange.EXPORT
    path = facts if kind == "export" else folder / "export" / exchange.WEIGHTS

    def read() -> None:
        if path is not facts:
            told = json.loads(facts.read_text()) | {"weights_sha256": sha256(path)}
            facts.write_text(json.dumps(told))
        shutil.rmtree(folder / "imported", ignore_errors=True)
        exchange.import_weights(folder / "export", folder / "imported")

    return path, read


CHECKPOINT_FILES = (
    "record/metadata",
    "metrics/metrics",
    "_CHECKPOINT_METADATA",
    "state/_METADATA",
    "state/manifest.ocdbt",
)


def _checkpoint(folder: Path, run: Path, name: str) -> tuple[Path, Callable[[], Any]]:
    """Return a file of a checkpoint and what restores it, after making the hashes fit as an attacker would."""
    step = max(int(p.name) for p in (run / checkpoint.FOLDER).iterdir() if p.name.isdecimal())
    copy = folder / checkpoint.FOLDER / str(step)
    if not copy.exists():
        shutil.copytree(run / checkpoint.FOLDER / str(step), copy)

    def read() -> None:
        checkpoint.seal(copy)
        with checkpoint.Checkpoints(folder, read_only=True) as saved:
            saved.restore_tree(saved.find("newest"))

    return copy / name, read


def _rows_of_clips(path: Path) -> None:
    """Find what the rows of a table name among two clips."""
    for name in ("talk.mp4", "anna/001.mp4"):
        (path.parent / "videos" / name).parent.mkdir(parents=True, exist_ok=True)
        (path.parent / "videos" / name).touch()
    clips.find("clips", path.parent / "videos", labels=(path,))


FILES = Path(__file__).parents[1] / "tests" / "parity" / "files"
SUBTITLES = b"1\n00:00:01,000 --> 00:00:02,000\nhello <i>you</i>\n\n2\n00:00:03,500 --> 00:00:04,000\nand you\n"
CAPTIONS = b"""WEBVTT

00:00:00.000 --> 00:00:01.500 align:start
hello<00:00:00.400><c> my</c> friend

00:00:01.500 --> 00:00:01.510
hello my friend

00:00:01.510 --> 00:00:03.000
hello my friend
how<00:00:01.900><c> are</c> &amp; you
"""
ALONE: dict[str, tuple[str, bytes, Callable[[Path], Any]]] = {
    "weights": ("weights.pth", (FILES / "archive.pth").read_bytes(), torch_files.read),
    "old weights": ("weights.pth", (FILES / "old.pth").read_bytes(), torch_files.read),
    "subtitles": ("words.srt", SUBTITLES, subtitles.read),
    "rolling captions": ("words.vtt", CAPTIONS, subtitles.read),
    "intervals": ("words.csv", b"start,end,text\n0,1.5,hello\n2,3,you\n", subtitles.read),
    "rows of clips": ("rows.csv", b"id,video,start,end\na,talk,0,1\nb,anna/001.mp4,0,2\n", _rows_of_clips),
    "milliseconds": ("words.tsv", b"start\tend\ttext\n0\t1500\thello\n2000\t3000\tyou\n", subtitles.read),
    "transcript": (
        "words.json",
        b'{"segments": [{"start": 0, "end": 1.5, "text": "hello", "score": NaN}]}',
        subtitles.read,
    ),
    "plain text": (
        "words.txt",
        b"Text:  HI YOU\nConf:  5\n\nWORD START END ASDSCORE\nHELLO 0.10 0.50 4.3\n",
        subtitles.read,
    ),
}
"""Kinds that are read alone: name of the file, content, reader."""

KINDS = (
    *("manifest", "configuration", "metrics log", "bad steps"),
    *SOURCES,
    "mmsa",
    *("export", "exported weights"),
    *(f"checkpoint {name}" for name in CHECKPOINT_FILES),
    *ALONE,
)


@dataclasses.dataclass(frozen=True)
class Target:
    """A file to mutate and its reader.

    Attributes:
      path: path of the file.
      valid: its valid content.
      read: function that reads it.
      renew: function that writes the files beside it again, since a reader may leave some.
    """

    path: Path
    valid: bytes
    read: Callable[[], Any]
    renew: Callable[[], Any] = lambda: None


def target(kind: str, folder: Path, run: Path) -> Target:
    """Return the file of a kind in a folder of its own; the finished run ``run`` provides valid files."""
    files = {"manifest": "data.json", "configuration": "config.json", "metrics log": "metrics.jsonl"}
    if kind in files or kind == "bad steps":
        valid = (run / files[kind]).read_bytes() if kind in files else b'{"step": 3, "ids": []}\n{"step": 4}\n'
        name = files.get(kind, log_lib.BAD_STEPS)
        readers: dict[str, Callable[[], Any]] = {
            "manifest": lambda: manifest_lib.read_file(folder / name, missing="name another"),
            "configuration": lambda: config_lib.differences(
                workdir_lib.read_config(folder), workdir_lib.read_config(run)
            ),
            "metrics log": lambda: log_lib.MetricsLog(folder, 10**9).__exit__(None),
            "bad steps": lambda: log_lib.left_out_steps(folder),
        }
        return Target(folder / name, valid, readers[kind])
    if kind in ALONE:
        name, valid, read_alone = ALONE[kind]
        return Target(folder / name, valid, lambda: read_alone(folder / name))

    if kind in SOURCES:

        def renew() -> tuple[Path, Request]:
            shutil.rmtree(folder / "source", ignore_errors=True)
            (folder / "source").mkdir()
            return SOURCES[kind](folder / "source", kind)

        path, request = renew()
        return Target(path, path.read_bytes(), _everything(request), renew)
    if kind == "mmsa":
        return Target(folder / "mmsa.pkl", *_mmsa(folder))
    place = _checkpoint if kind.startswith("checkpoint ") else _export
    path, reader = place(folder, run, kind.removeprefix("checkpoint "))
    return Target(path, path.read_bytes(), reader)


def inputs(kind: str, folder: Path, place: Any) -> Iterator[tuple[bytes, Callable[[], Any]]]:
    """Yield mutations of a kind of file without end: the content and the reader."""
    file = target(kind, folder, place.folder / "whole")
    for i in itertools.count(1):
        content = mutated(file.valid, place.random)
        file.path.write_bytes(content)
        yield content, file.read
        if i % 500 == 0:
            file.renew()
