"""Labels of MERBench and MERTools: an npz file of pickled dictionaries, one for each split, read without running anything.

``train_corpus``, ``val_corpus``, ``test_corpus``, ``test1_corpus``, ... map each clip to ``{"emo": CLASS, "val": NUMBER}``;
``whole_corpus`` holds all clips of a corpus without splits.
"""

import io
import zipfile
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from conclugen_jax.data import pickles
from conclugen_jax.data.cells import Table, short
from conclugen_jax.data.files import check_unpacked, open_regular, readable, stand_in
from conclugen_jax.errors import ConclugenError

ENDING = "_corpus"
UNKNOWN = -10  # what stands for a valence that is not known
WAY_OUT = "write it again, or write a labels.csv with columns id, split and label"


def label_files(folder: Path) -> list[Path]:
    """Return the files of such labels in a folder, by the names of the arrays in them."""
    return [path for path in sorted(folder.glob("*.npz")) if path.is_file() and any(map(_is_split, _members(path)))]


def _members(path: Path) -> list[str]:
    try:
        with zipfile.ZipFile(path) as archive:
            return archive.namelist()
    except (OSError, ValueError, zipfile.BadZipFile, NotImplementedError):
        return []


def _is_split(member: str) -> bool:
    return member.endswith(f"{ENDING}.npy")


def read_labels(path: Path) -> Table:
    """Return a row for each clip: ``id``, ``split``, ``emo``, ``val`` (empty where unknown) and ``label``.

    The label is ``emo``, or ``val`` where all clips have the same ``emo``, as in corpora of sentiment.
    """
    rows, where = [], []
    for split, clips in _splits(path).items():
        for name, fields in clips.items():
            where.append(f"{path}: {split}{ENDING}/{name}")
            if not isinstance(fields, Mapping) or not {"emo", "val"} & fields.keys():
                found = f"{list(fields)[:5]}" if isinstance(fields, Mapping) else short(fields)
                raise ConclugenError(f"{where[-1]}: {found}, expected a dictionary with 'emo' or 'val'; {WAY_OUT}")
            emo, val = (_text(fields.get(field), f"{where[-1]}: {field}") for field in ("emo", "val"))
            rows.append((name, {"whole": "train"}.get(split, split), emo, "" if val in ("-10", "-10.0") else val))
    if not rows:
        why = stand_in(path) or f"no clips in arrays called train{ENDING} and such; {WAY_OUT}"
        raise ConclugenError(f"{path}: {why}")
    ids, splits, emos, vals = zip(*rows, strict=True)
    columns = {"id": ids, "split": splits, "emo": emos, "val": vals}
    columns["label"] = vals if len(set(emos)) == 1 and any(vals) else emos
    return Table(path, columns, where, notes=list(_unlabelled(path, columns)))


def _unlabelled(path: Path, columns: Mapping[str, Sequence[str]]) -> Iterator[str]:
    """Yield a note on each split whose labels look like those that MERTools writes where they are not public."""
    found: dict[str, set[tuple[str, str]]] = {}
    for split, emo, val in zip(columns["split"], columns["emo"], columns["val"], strict=True):
        found.setdefault(split, set()).add((emo, val))
    for split, pairs in found.items() if len(set(columns["emo"])) > 1 else ():
        if len(pairs) == 1 and columns["split"].count(split) > 1 and pairs <= {(emo, "") for emo, _ in pairs}:
            what = f"all clips of {split!r} are {min(pairs)[0]!r} without val"
            yield f"{path.name}: {what}, as where labels are not public; do not score it"


def _text(value: Any, where: str) -> str:
    if value is None or value != value:  # NaN
        return ""
    if not isinstance(value, str | int | float):
        raise ConclugenError(f"{where} is {short(value)}, expected text or a number; {WAY_OUT}")
    return str(value)


def _splits(path: Path) -> dict[str, Mapping[str, Any]]:
    """Return split -> clip -> what is known of it."""
    with open_regular(path) as raw, readable(path, WAY_OUT, other=Exception), zipfile.ZipFile(raw) as archive:
        check_unpacked(archive, raw)
        contents = {name: archive.read(name) for name in dict.fromkeys(filter(_is_split, archive.namelist()))}
    splits = {}
    for name, content in contents.items():
        file = io.BytesIO(content)
        with readable(path, WAY_OUT, other=Exception):
            version = np.lib.format.read_magic(file)
            read = np.lib.format.read_array_header_1_0 if version == (1, 0) else np.lib.format.read_array_header_2_0
            shape, _, dtype = read(file)
        held = []
        if dtype.hasobject and shape == ():
            held = pickles.interpret(pickles.Unpickler(pickles.Content(memoryview(content), file.tell())), path)
        if not isinstance(held, list) or len(held) != 1 or not isinstance(held[0], Mapping):
            raise ConclugenError(f"{path}: {name} is no dictionary of clips; {WAY_OUT}")
        splits[name.removesuffix(f"{ENDING}.npy")] = held[0]
    return splits
