"""Convert feature dictionaries of MMSA and MMSA-FET (pickle files) to plain tables of one vector per clip."""

import collections
import csv
import dataclasses
import hashlib
import json
import os
import shutil
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from conclugen_jax.data import pickles
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


@dataclasses.dataclass(frozen=True)
class _Split:
    """One split of a file: its name there and here, its values, the ids of its n clips."""

    key: str
    name: str
    values: Mapping[str, Any]
    ids: list[str]


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
    state = _state(source)
    tree, content = pickles.read(source)
    splits = _splits(source, tree)
    chosen = _chosen(source, splits, modalities)
    labels = _labels(source, splits)
    tables = {m: _table(source, splits, m) for m in chosen}  # rows, ids and facts of each
    facts = {
        "file": source.name,
        "bytes": len(content),
        "sha256": hashlib.sha256(content).hexdigest(),
        "pooling": "mean over the valid steps, in float64",
        "splits": {split.name: len(split.ids) for split in splits},
        "labels": list(labels),
        "modalities": {m: known for m, (_, _, known) in tables.items()},
    }
    if _state(source) != state:
        raise ConclugenError(f"{source}: changed while it was read; convert it again when it is complete")
    _write(output, splits, labels, tables, facts)
    return facts


def _check_free(output: Path) -> None:
    if os.path.lexists(output):
        raise ConclugenError(f"{output}: exists already; remove it or name another folder with --output")


def _state(source: Path) -> tuple[int, int] | None:
    try:
        stat = source.stat()
    except OSError:
        return None  # the reader has the better message
    return stat.st_size, stat.st_mtime_ns


def _splits(source: Path, tree: Any) -> list[_Split]:
    """Return the splits that hold clips, the training split first."""
    if not isinstance(tree, dict):
        raise ConclugenError(f"{source}: a {type(tree).__name__}, expected a dictionary with 'train', 'valid', 'test'")
    found: dict[str, _Split] = {}
    for key, values in tree.items():
        name = SPLIT_NAMES.get(key)
        if name is None:  # such as the settings of MMSA-FET
            continue
        if not isinstance(values, dict):
            raise ConclugenError(f"{source}: {key!r} is a {type(values).__name__}, expected a dictionary of features")
        if name in found:
            raise ConclugenError(f"{source}: {found[name].key!r} and {key!r} are the same split; keep one of them")
        found[name] = _Split(key, name, values, _ids(values, f"{source}: {key}"))
    splits = [found[name] for name in dict.fromkeys(SPLIT_NAMES.values()) if name in found and found[name].ids]
    if not splits:
        raise ConclugenError(f"{source}: no clips under 'train', 'valid' or 'test'; is this a feature file of MMSA?")
    counts = collections.Counter(i for split in splits for i in split.ids)
    repeated = next((i for i, n in counts.items() if n > 1), None)
    if repeated is not None:
        raise ConclugenError(f"{source}: id {repeated!r} occurs {counts[repeated]} times; ids must differ")
    return splits


def _ids(values: Mapping[str, Any], where: str) -> list[str]:
    ids = _get(values, "id", where)
    if isinstance(ids, np.ndarray):
        try:
            ids = ids.reshape(-1).tolist()
        except ValueError as e:
            raise ConclugenError(f"{where}['id']: not text ({e}); fetch the file again") from e
    if not isinstance(ids, list):
        raise ConclugenError(
            f"{where}['id'] is a {type(ids).__name__}, expected a list of texts such as 'video$_$clip'"
        )
    for number, one in enumerate(ids):
        if not isinstance(one, str) or not one.isprintable() or one != one.strip() or not one:
            what = repr(one[:80]) if isinstance(one, str) else type(one).__name__
            raise ConclugenError(
                f"{where}['id'][{number}] is {what}, expected a text of one line such as 'video$_$clip'"
            )
    return ids


def _get(values: Mapping[str, Any], key: str, where: str) -> Any:
    if key not in values:
        raise ConclugenError(f"{where} lacks {key!r}; is this a feature file of MMSA?")
    return values[key]


def _chosen(source: Path, splits: Sequence[_Split], modalities: Sequence[str] | None) -> list[str]:
    there = [m for m, key in MODALITIES.items() if any(key in split.values for split in splits)]
    for m in modalities or ():
        if m not in there:
            raise ConclugenError(f"--modalities: {source} holds no {m!r}; there are {', '.join(there) or 'none'}")
    if not there:
        raise ConclugenError(f"{source}: none of 'text', 'audio', 'vision' is there; is this a feature file of MMSA?")
    return list(dict.fromkeys(modalities or there))


def _labels(source: Path, splits: Sequence[_Split]) -> dict[str, list[str]]:
    """Return column -> a number for each clip of all splits, as text; empty where unknown."""
    columns = {}
    for column, key in LABELS.items():
        cells: list[str] = []
        for split in splits:
            if column != "sentiment" and key not in split.values:
                cells += [""] * len(split.ids)
                continue
            where = f"{source}: {split.key}[{key!r}]"
            numbers = _numbers(_get(split.values, key, f"{source}: {split.key}"), len(split.ids), where)
            too_large = np.abs(numbers) > np.finfo(np.float32).max
            bad = too_large | (np.isnan(numbers) if column == "sentiment" else False)
            if bad.any():
                i = int(bad.argmax())
                raise ConclugenError(
                    f"{where} of {split.ids[i]!r} is {numbers[i]}, expected a finite number of float32"
                )
            if numbers.dtype.kind in "iu":
                numbers = numbers.astype(np.float64)  # 1.0, as 1 could be taken for a class
            cells += ["" if np.isnan(number) else str(number) for number in numbers]
        if any(cells):
            columns[column] = cells
    return columns


def _numbers(values: Any, n: int, where: str) -> np.ndarray:
    """Return the numbers of n clips, of the type in which they are stored."""
    if isinstance(values, list) and all(type(x) in (int, float) for x in values):
        try:
            values = np.asarray(values, np.float64)
        except OverflowError as e:
            raise ConclugenError(f"{where}: a number out of range; fetch the file again") from e
    if not isinstance(values, np.ndarray) or values.dtype.kind not in "fiu":
        raise ConclugenError(f"{where}: expected {n} numbers; fetch the file again")
    if values.shape not in ((n,), (n, 1)):
        raise ConclugenError(f"{where} has the shape {values.shape}, expected ({n},): one number for each id")
    return values.reshape(-1)


def _table(source: Path, splits: Sequence[_Split], modality: str) -> tuple[list[np.ndarray], list[str], dict[str, Any]]:
    """Return vectors of one modality, float32 [dim] each, the ids they belong to, and facts for ``source.json``."""
    key, dim, rows, ids = MODALITIES[modality], 0, [], []
    types: set[str] = set()
    valid_steps: set[str] = set()
    counts: collections.Counter[str] = collections.Counter()
    for split in splits:
        if key not in split.values:
            continue
        where = f"{source}: {split.key}[{key!r}]"
        x = _sequences(split, key, where)
        if dim not in (0, x.shape[2]):
            raise ConclugenError(f"{where} has {x.shape[2]} features a step, the split before has {dim}")
        dim = x.shape[2]
        types.add(x.dtype.name)
        mask, lengths = _mask(source, split, modality, x), _lengths(source, split, key, x)
        valid_steps.add(
            "mask in text_bert" if mask is not None else "lengths" if lengths is not None else "not all zero"
        )
        for i, name in enumerate(split.ids):
            one_mask, length = None if mask is None else mask[i], None if lengths is None else int(lengths[i])
            vector = _pool(x[i], one_mask, length, f"{where} of {name!r}", counts)
            if vector is not None:
                rows.append(vector)
                ids.append(name)
    if not rows:
        raise ConclugenError(f"{source}: no clip has {modality}; leave it out with --modalities")
    facts = {
        "dim": dim,
        "type_in_file": "/".join(sorted(types)),
        "valid_steps": "/".join(sorted(valid_steps)),
        "clips": len(rows),
        "clips_without": sum(len(split.ids) for split in splits) - len(rows),
        "clips_with_content_outside_their_length": counts["outside_length"],
        "minus_infinity_set_to_0": counts["minus_infinity"],
    }
    return rows, ids, facts


def _sequences(split: _Split, key: str, where: str) -> np.ndarray:
    """Return real numbers [n, steps, dim]."""
    x = split.values[key]
    if not isinstance(x, np.ndarray) or x.dtype.kind not in "fiu":
        raise ConclugenError(f"{where} is not an array of numbers; MMSA-FET writes one with return_type='np'")
    if x.ndim != 3 or len(x) != len(split.ids) or not x.shape[2]:
        raise ConclugenError(f"{where} has the shape {x.shape}, expected ({len(split.ids)}, steps, features)")
    return x


def _mask(source: Path, split: _Split, modality: str, x: np.ndarray) -> np.ndarray | None:
    """Return which steps are tokens, bool [n, steps]; None where the file does not say."""
    if modality != "text" or "text_bert" not in split.values:
        return None
    where, tokens = f"{source}: {split.key}['text_bert']", split.values["text_bert"]
    expected = (len(x), 3, x.shape[1])
    if not isinstance(tokens, np.ndarray) or tokens.shape != expected or tokens.dtype.kind not in "fiu":
        shape = tokens.shape if isinstance(tokens, np.ndarray) else type(tokens).__name__
        raise ConclugenError(f"{where} is {shape}, expected {expected} as 'text' has; leave text out with --modalities")
    mask = tokens[:, 1]
    if not ((mask == 0) | (mask == 1)).all():
        raise ConclugenError(f"{where}[:, 1] is not a mask of 0 and 1; leave text out with --modalities")
    return mask != 0


def _lengths(source: Path, split: _Split, key: str, x: np.ndarray) -> np.ndarray | None:
    """Return the number of steps of each clip [n], at most those stored; None where the file does not say."""
    name = f"{key}_lengths"
    if key == "text" or name not in split.values:
        return None
    where = f"{source}: {split.key}[{name!r}]"
    lengths = _numbers(split.values[name], len(x), where)
    if not ((lengths >= 0) & (lengths == np.trunc(lengths))).all():
        raise ConclugenError(f"{where}: expected numbers of steps; fetch the file again")
    return np.minimum(lengths, x.shape[1]).astype(np.int64)


def _pool(
    x: np.ndarray, mask: np.ndarray | None, length: int | None, where: str, counts: collections.Counter[str]
) -> np.ndarray | None:
    """Return the mean over the valid steps of a clip.

    Args:
      x: numbers [steps, dim].
      mask: which steps are valid [steps], if the file says so.
      length: how many steps are valid from the first, if the file says so.
      where: names the clip in messages.
      counts: of values and clips treated specially.

    Returns:
      float32 [dim], or None where no step holds anything.
    """
    x = x.astype(np.float64)
    minus_infinity = x == -np.inf
    counts["minus_infinity"] += int(minus_infinity.sum())
    x[minus_infinity] = 0
    filled = x.any(axis=1)
    if mask is not None:
        valid = mask
    elif length is not None and not filled[length:].any():
        valid = np.arange(len(x)) < length
    else:  # a length that excludes steps with content was counted up to the first zeros
        counts["outside_length"] += length is not None
        valid = filled
    if not (valid & filled).any():
        return None
    vector = x[valid].mean(axis=0).astype(np.float32)
    if not np.isfinite(vector).all():
        column = int((~np.isfinite(vector)).argmax())
        raise ConclugenError(f"{where}: feature {column} is not a finite float32 number in every step; repair the file")
    return vector


def _write(
    output: Path,
    splits: Sequence[_Split],
    labels: Mapping[str, list[str]],
    tables: Mapping[str, tuple[list[np.ndarray], list[str], Any]],
    facts: Mapping[str, Any],
) -> None:
    scratch = None
    try:
        output.parent.mkdir(parents=True, exist_ok=True)
        scratch = Path(tempfile.mkdtemp(prefix=f".converting-{os.getpid()}-", dir=output.parent))
        folder = scratch / "tables"  # a temporary folder is private, this one is not
        folder.mkdir()
        for m, (rows, ids, _) in tables.items():
            np.save(folder / f"{m}.npy", np.stack(rows))
            (folder / f"{m}.txt").write_text("".join(f"{i}\n" for i in ids), encoding="utf-8", newline="\n")
        with (folder / "labels.csv").open("w", encoding="utf-8", newline="") as file:
            writer = csv.writer(file, lineterminator="\n")
            first, *further = labels
            writer.writerow(["id", "split", first, "group", *further])
            clips = [(i, split.name) for split in splits for i in split.ids]
            for (i, split), number, *others in zip(clips, *labels.values(), strict=True):
                video, separator, _ = i.partition(SEPARATOR)
                writer.writerow([i, split, number, video if separator else "", *others])
        (folder / "source.json").write_text(json.dumps(facts, indent=1) + "\n", encoding="utf-8")
        _check_free(output)
        os.replace(folder, output)
    except OSError as e:
        raise ConclugenError(
            f"{e.filename or output}: cannot write the tables ({e.strerror or e}); free space or choose another --output"
        ) from e
    finally:
        if scratch is not None:
            shutil.rmtree(scratch, ignore_errors=True)
