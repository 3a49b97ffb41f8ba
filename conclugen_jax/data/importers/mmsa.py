"""Convert feature dictionaries of MMSA and MMSA-FET (pickle files) to plain tables of one vector per clip."""

import collections
import contextlib
import csv
import dataclasses
import functools
import hashlib
import json
import os
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from conclugen_jax.data import manifest as manifest_lib, pickles
from conclugen_jax.data.cells import short
from conclugen_jax.data.sources import SPLIT_NAMES
from conclugen_jax.errors import ConclugenError

MODALITIES = {"text": "text", "audio": "audio", "video": "vision"}
"""Modality -> its key in the dictionary of a split."""

LABELS = {
    "sentiment": "regression_labels",
    "sentiment_text": "regression_labels_T",
    "sentiment_audio": "regression_labels_A",
    "sentiment_video": "regression_labels_V",
}
"""Column of the table of labels -> its key in the dictionary of a split."""

SEPARATOR = "$_$"
"""Between video and clip in an id."""

MASK = "mask in text_bert"
"""The source of valid steps that counts even if other steps are not zero."""


@dataclasses.dataclass(frozen=True)
class _Split:
    """One split of a file: where it is there, for messages, its name here, its values."""

    where: str
    name: str
    values: Mapping[str, Any]

    @functools.cached_property
    def ids(self) -> list[str]:
        """The ids of its n clips."""
        ids = self.get("id")
        ids = ids.reshape(-1).tolist() if isinstance(ids, np.ndarray) else ids
        for i, one in enumerate(ids if isinstance(ids, list) else [ids]):
            if not isinstance(one, str) or not one.isprintable() or one != one.strip() or not one:
                found = f"{self.where}['id'][{i}] is {short(one)}"
                raise ConclugenError(f"{found}, expected a list of texts of one line such as 'video$_$clip'")
        return ids

    def get(self, key: str) -> Any:
        """Return a value that must be there."""
        if key not in self.values:
            raise ConclugenError(f"{self.where} lacks {key!r}; is this a feature file of MMSA?")
        return self.values[key]

    def numbers(self, key: str, *shape: int | str) -> np.ndarray:
        """Return real numbers [n, *shape], of the type in which they are stored; [n, 1] may stand for [n].

        Sizes given as text are for messages: any but 0 will do.
        """
        x, expected = self.get(key), (len(self.ids), *shape)
        if isinstance(x, list) and all(type(number) in (int, float) for number in x):
            with contextlib.suppress(OverflowError):
                x = np.asarray(x, np.float64)
        found = type(x).__name__
        if isinstance(x, np.ndarray):
            x, found = x.reshape(-1) if x.shape == (*expected, 1) else x, f"{x.dtype} of shape {x.shape}"
            if x.ndim == len(expected) and x.dtype.kind in "fiu":
                sizes = zip(x.shape, expected, strict=True)
                if all(n > 0 if isinstance(size, str) else n == size for n, size in sizes):
                    return x
        shape = str(expected).replace("'", "")
        way_out = "repair the file, or leave the modality out with --modalities"
        raise ConclugenError(f"{self.where}[{key!r}] is {found}, expected real numbers of shape {shape}; {way_out}")

    def check(self, key: str, fits: np.ndarray, expected: str) -> None:
        """Refuse a value unless all of its clips fit, bool [n, ...]."""
        bad = np.flatnonzero(~fits.reshape(len(fits), -1).all(axis=1))
        if bad.size:
            found = " ".join(str(self.values[key][bad[0]])[:80].split())
            where = f"{self.where}[{key!r}] of {self.ids[bad[0]]!r}"
            raise ConclugenError(f"{where} is {found}, expected {expected}; repair the file")


@np.errstate(all="ignore")  # values that are not finite are refused where they matter
def convert(source: str | Path, output: str | Path, *, modalities: Sequence[str] | None = None) -> dict[str, Any]:
    """Write the tables of a feature dictionary.

    The folder holds ``<modality>.npy`` (float32 [k, dim], the mean over the valid steps of each clip),
    ``<modality>.txt`` (the k ids, one a line; clips without the modality are in neither), ``labels.csv`` and
    ``source.json``. It is written whole or not at all.

    Args:
      source: pickle file of MMSA or MMSA-FET; nothing in it is executed.
      output: folder to make; there must be none yet.
      modalities: which of ``text``, ``audio``, ``video``; None for all that the file holds.

    Returns:
      The content of ``source.json``: file, hash, number of clips by split, facts of each modality.

    Raises:
      ConclugenError: the file is not such a dictionary, a value cannot be used, or the folder cannot be written.
    """
    source, output = Path(source), Path(output).absolute()
    _check_free(output)
    state = source.stat() if source.is_file() else None
    tree, content = pickles.read(source)
    splits = _splits(source, tree)
    there = [m for m, key in MODALITIES.items() if any(key in split.values for split in splits)]
    if not there:
        raise ConclugenError(f"{source}: none of 'text', 'audio', 'vision' is there; is this a feature file of MMSA?")
    chosen = manifest_lib.choose(there, dict.fromkeys(modalities or there), what="modality", where=str(source))
    columns = _columns(splits)
    tables = {m: _table(source, splits, m) for m in chosen}  # rows, ids and facts of each
    facts = {
        "file": source.name,
        "bytes": len(content),
        "sha256": hashlib.sha256(content).hexdigest(),
        "pooling": "mean over the valid steps, in float64",
        "splits": {split.name: len(split.ids) for split in splits},
        "labels": [name for name in columns if name in LABELS],
        "modalities": {m: known for m, (_, _, known) in tables.items()},
    }
    now = source.stat() if source.is_file() else state
    if (now.st_size, now.st_mtime_ns) != (state.st_size, state.st_mtime_ns):
        raise ConclugenError(f"{source}: changed while it was read; convert it again when it is complete")
    try:
        _write(output, columns, tables, facts)
    except OSError as e:
        fault = f"cannot write the tables ({e.strerror or e})"
        raise ConclugenError(f"{e.filename or output}: {fault}; free space or choose another --output") from e
    return facts


def _check_free(output: Path) -> None:
    if os.path.lexists(output):
        raise ConclugenError(f"{output}: exists already; remove it or name another folder with --output")


def _splits(source: Path, tree: Any) -> list[_Split]:
    """Return the splits that hold clips, the training split first."""
    found: dict[str, _Split] = {}
    if not isinstance(tree, dict):
        raise ConclugenError(f"{source}: a {type(tree).__name__}, expected a dictionary with 'train', 'valid', 'test'")
    for key, values in tree.items():
        name, split = SPLIT_NAMES.get(key), _Split(f"{source}: {key}", SPLIT_NAMES.get(key, ""), values)
        if name is None:  # such as the settings of MMSA-FET
            continue
        if not isinstance(values, dict):
            raise ConclugenError(f"{split.where} is a {type(values).__name__}, expected a dictionary of features")
        if name in found:
            raise ConclugenError(f"{split.where} and {found[name].where} are the same split; keep one of them")
        found[name] = split
    splits = [found[name] for name in dict.fromkeys(SPLIT_NAMES.values()) if name in found and found[name].ids]
    if not splits:
        raise ConclugenError(f"{source}: no clips under 'train', 'valid' or 'test'; is this a feature file of MMSA?")
    counts = collections.Counter(i for split in splits for i in split.ids)
    for i, count in counts.most_common(1):
        if count > 1:
            raise ConclugenError(f"{source}: id {i!r} occurs {count} times; ids must differ")
    return splits


def _columns(splits: Sequence[_Split]) -> dict[str, list[str]]:
    """Return the columns of the table of labels, a cell for each clip of all splits; labels are empty where unknown."""
    clips = [(i, split.name) for split in splits for i in split.ids]
    columns = {"id": [i for i, _ in clips], "split": [name for _, name in clips]}
    for column, key in LABELS.items():
        cells: list[str] = []
        for split in splits:
            if column != "sentiment" and key not in split.values:
                cells += [""] * len(split.ids)
                continue
            numbers = split.numbers(key)
            unknown = np.isnan(numbers) & (column != "sentiment")
            split.check(key, (np.abs(numbers) <= np.finfo(np.float32).max) | unknown, "a finite number of float32")
            if numbers.dtype.kind in "iu":
                numbers = numbers.astype(np.float64)  # 1.0, as it is where some have decimals
            cells += ["" if np.isnan(number) else str(number) for number in numbers]
        if any(cells):
            columns[column] = cells
        if column == "sentiment":
            columns["group"] = [i.partition(SEPARATOR)[0] if SEPARATOR in i else "" for i, _ in clips]
    return columns


def _table(source: Path, splits: Sequence[_Split], modality: str) -> tuple[list[np.ndarray], list[str], dict[str, Any]]:
    """Return vectors of one modality, float32 [dim] each, the ids they belong to, and facts for ``source.json``."""
    key, dim, rows, ids = MODALITIES[modality], 0, [], []
    types, named, counts = set[str](), set[str](), collections.Counter[str]()
    for split in (split for split in splits if key in split.values):
        x = split.numbers(key, "steps", dim or "features")
        dim = x.shape[2]
        how, valid = _valid_steps(split, modality, x)
        types.add(x.dtype.name)
        named.add(how)
        for i, name in enumerate(split.ids):
            vector = _pool(x[i], None if valid is None else valid[i], counts, certain=how == MASK)
            if vector is None:
                continue
            if not np.isfinite(vector).all():
                found = f"feature {int((~np.isfinite(vector)).argmax())} is not a finite float32 number in every step"
                raise ConclugenError(f"{split.where}[{key!r}] of {name!r}: {found}; repair the file")
            rows.append(vector)
            ids.append(name)
    if not rows:
        raise ConclugenError(f"{source}: no clip has {modality}; leave it out with --modalities")
    facts = {
        "dim": dim,
        "type_in_file": "/".join(sorted(types)),
        "valid_steps": "/".join(sorted(named)),
        "clips": len(rows),
        "clips_without": sum(len(split.ids) for split in splits) - len(rows),
        "clips_with_content_outside_their_length": counts["outside_length"],
        "minus_infinity_set_to_0": counts["minus_infinity"],
    }
    return rows, ids, facts


def _valid_steps(split: _Split, modality: str, x: np.ndarray) -> tuple[str, np.ndarray | None]:
    """Return how the file marks the valid steps of sequences [n, steps, dim], and its marks, bool [n, steps]."""
    steps, lengths = x.shape[1], f"{MODALITIES[modality]}_lengths"
    if modality == "text" and "text_bert" in split.values:
        mask = split.numbers("text_bert", 3, steps)[:, 1]
        split.check("text_bert", (mask == 0) | (mask == 1), "a mask of 0 and 1 in its second row")
        return MASK, mask != 0
    if modality != "text" and lengths in split.values:
        n = split.numbers(lengths)
        split.check(lengths, (n >= 0) & (n == np.trunc(n)), "a number of steps")
        return "lengths", np.arange(steps) < n[:, None]
    return "not all zero", None


def _pool(
    x: np.ndarray, valid: np.ndarray | None, counts: collections.Counter[str], *, certain: bool
) -> np.ndarray | None:
    """Return the mean over the valid steps of a clip [steps, dim], float32 [dim]; None where no step holds anything.

    ``valid`` are the steps that the file names, if it does; ``certain``: even if others have content.
    """
    x = x.astype(np.float64)
    minus_infinity = x == -np.inf
    counts["minus_infinity"] += int(minus_infinity.sum())
    x[minus_infinity] = 0
    filled = x.any(axis=1)
    if valid is None:
        valid = filled
    # A length that excludes steps with content was counted to the first zeros.
    elif not certain and (filled & ~valid).any():
        counts["outside_length"] += 1
        valid = filled
    return x[valid].mean(axis=0).astype(np.float32) if (valid & filled).any() else None


def _write(output: Path, columns: Mapping[str, list[str]], tables: Mapping[str, Any], facts: Mapping[str, Any]) -> None:
    output.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=f".converting-{os.getpid()}-", dir=output.parent) as scratch:
        folder = Path(scratch) / "tables"  # a temporary folder is private, this one is not
        folder.mkdir()
        for m, (rows, ids, _) in tables.items():
            np.save(folder / f"{m}.npy", np.stack(rows))
            (folder / f"{m}.txt").write_text("".join(f"{i}\n" for i in ids), encoding="utf-8", newline="\n")
        with (folder / "labels.csv").open("w", encoding="utf-8", newline="") as file:
            csv.writer(file, lineterminator="\n").writerows([columns, *zip(*columns.values(), strict=True)])
        (folder / "source.json").write_text(json.dumps(facts, indent=1) + "\n", encoding="utf-8")
        _check_free(output)
        os.replace(folder, output)
