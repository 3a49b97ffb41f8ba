"""CMU-MOSEI and CMU-MOSI from the files of the CMU-MultimodalSDK: label sequence, feature sequences, standard folds.

A ``.csd`` file (HDF5) holds ``/ROOT/data/VIDEO/features`` [steps, dim] and ``/ROOT/data/VIDEO/intervals`` [steps, 2] in
seconds. The SDK's ``align`` names entries ``VIDEO[ROW]`` instead, after the rows of the sequence aligned to.
"""

import functools
import importlib.resources
import re
from collections import Counter
from collections.abc import Collection, Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from conclugen_jax.data.cells import Table, number, read_csv
from conclugen_jax.data.corpora import CORPORA, dropped
from conclugen_jax.data.features import pool
from conclugen_jax.data.files import MOST_UNPACKED, readable
from conclugen_jax.data.requests import Found, Request
from conclugen_jax.data.sources import SPLIT_NAMES, Annotations, by_split
from conclugen_jax.errors import ConclugenError

KINDS = {"text": r"wordvectors|glove|bert", "audio": r"covarep|opensmile", "video": r"openface|facet"}
"""modality -> what the names of its published files contain."""

EMOTIONS = ("happy", "sad", "anger", "surprise", "disgust", "fear")
"""Columns of the label of CMU-MOSEI, in the order of the published rows."""

AGAIN = "name a .csd file, or download it again"

LABEL_COLUMNS = {"cmu_mosei": ("sentiment", *EMOTIONS), "cmu_mosi": ("sentiment",)}
"""corpus -> meaning of the columns of a label row."""

EPSILON = 1e-5
"""Seconds by which a step and an example must overlap, as in the SDK: what merely touches does not count."""

ROUNDING = 0.01
"""Seconds by which a step of an aligned entry may stick out of its example: times in tables are rounded."""

Key = tuple[str, float, float, int]
"""video, start and end in seconds, row of the video's labels."""


def open_csd(request: Request) -> Found:
    """Open a folder of ``.csd`` files, or those named as modalities (``A.csd+B.csd`` are concatenated)."""
    _label_columns(request.dataset)
    files = [] if request.source is None else [request.source]
    if files and request.source.is_dir():
        files = sorted(request.source.glob("*.csd"))
    features = {m: CsdFeatures(paths, pool=request.pool) for m, paths in _modalities(request, files).items()}
    labels = list(request.labels) or [p for p in files if "label" in p.name.lower()]
    if not labels:
        raise ConclugenError(f"{request.source}: no file with Label in its name; name it with --labels=FILE.csd")
    if labels[0].suffix == ".csd" and len(labels) > 1:
        raise ConclugenError(f"{len(labels)} label files ({labels[0]}, {labels[1]}); name one with --labels=FILE.csd")
    source = labels[0] if labels[0].suffix == ".csd" else [read_csv(path) for path in labels]
    columns, outside = read_labels(source, request.dataset, drop=dropped(request.corpus, ""))
    notes = [] if isinstance(source, Path) else [note for table in source for note in table.notes]
    facts = {"rows_outside_folds": outside, "minus_infinity": "read as 0", "notes": notes}
    return Found(features, columns=columns, label_files=labels, facts=facts)


def _modalities(request: Request, files: list[Path]) -> dict[str, list[Path]]:
    """Return modality -> its files: as named, and for the others by what the published files are called."""
    result = {m: [Path(p) for p in paths.split("+")] for m, paths in request.modalities.items()}
    for modality, pattern in KINDS.items():
        matches = [p for p in files if re.search(pattern, p.name.lower())]
        if modality in result or (request.only and modality not in request.only) or not matches:
            continue
        if len(matches) > 1:
            fault = f"{', '.join(p.name for p in matches)} could all be {modality!r}"
            way_out = f"name one, or several to be concatenated, with --modality {modality}=FILE.csd+FILE.csd"
            raise ConclugenError(f"{request.source}: {fault}; {way_out}")
        result[modality] = matches
    if not result:
        raise ConclugenError(f"{request.source}: no file of features known by its name; use --modality NAME=FILE.csd")
    return result


def _label_columns(corpus: str) -> dict[str, tuple[float, float]]:
    """Return column of a label row -> least and greatest number there."""
    if corpus not in LABEL_COLUMNS:
        raise ConclugenError(f"corpus {corpus!r} has no standard folds here; there are {', '.join(LABEL_COLUMNS)}")
    ranges = CORPORA[corpus].ranges
    return {name: ranges.get(name, ranges["label"]) for name in LABEL_COLUMNS[corpus]}


def read_folds(corpus: str) -> dict[str, str]:
    """Return the standard split (``train``, ``validation`` or ``test``) of each video of a corpus."""
    _label_columns(corpus)
    file = importlib.resources.files("conclugen_jax.data") / "folds" / f"{corpus}.txt"
    lines = file.read_text(encoding="utf-8").splitlines()
    pairs = (line.split() for line in lines if line and not line.startswith("#"))
    return {video: split for split, video in pairs}


def read_labels(
    source: Path | Sequence[Table], corpus: str, *, drop: Collection[str] = ()
) -> tuple[dict[str, Annotations], int]:
    """Read a label ``.csd`` file as published, not aligned, or tables of segments.

    Every row of every video in the standard folds is an example with id ``VIDEO_ROW``, the video as group and
    (video, start, end, row) as key, sorted by video, then row. Rows of a file are [sentiment, happy, sad, anger, surprise,
    disgust, fear] for ``cmu_mosei`` and [sentiment] for ``cmu_mosi``. Tables have these columns, ``video``, ``start_time``
    and ``end_time`` (seconds), in any order and among others; their rows are counted in the order of the tables, so that
    ids are the same only if they hold all rows in the order of the label sequence. Ids in ``drop`` are dropped.

    Returns:
      split -> annotations, in the order train, validation, test and without empty splits; and the number of rows left
      out because their video is in no fold. The label is float32 [n, 6] (1 where an emotion is > 0, order as in
      ``EMOTIONS``) with target ``sentiment`` float32 [n] for ``cmu_mosei``, the sentiment float32 [n] for ``cmu_mosi``.
    """
    columns, folds = _label_columns(corpus), read_folds(corpus)
    tables = [_table(source, columns)] if isinstance(source, Path) else source
    found: dict[Key, list[float]] = {}
    counts, outside = Counter[str](), 0
    for table in tables:
        table.require("video", "start_time", "end_time", *columns)
        for where, cells in table:
            start, end = (number(cells[name], f"{where}: {name}") for name in ("start_time", "end_time"))
            if end < start:
                raise ConclugenError(f"{where}: ends at {end} s, before its start at {start} s; correct the row")
            video, said = cells["video"].strip(), SPLIT_NAMES.get(cells.get("split", "").strip().lower())
            if said not in (None, folds.get(video, said)):
                fault = f"split {cells['split']!r}, but its video {video!r} is of {folds[video]} in the standard folds"
                raise ConclugenError(f"{where}: {fault}; correct the row, or drop the column")
            if video in folds:
                numbers = [number(cells[name], f"{where}: {name}", span) for name, span in columns.items()]
                found[video, start, end, counts[video]] = numbers
            else:
                outside += 1
            counts[video] += 1
    if not found:
        where = ", ".join(str(table.path) for table in tables)
        fault = f"no rows of videos in the standard folds of {corpus}, {outside} of others"
        raise ConclugenError(f"{where}: {fault}; name the labels of this corpus, not aligned ones")
    keys = sorted((key for key in found if _id(key) not in drop), key=lambda key: (key[0], key[3]))
    values = np.array([found[key] for key in keys], np.float32).reshape(len(keys), len(columns))
    label, targets = values[:, 0], {}
    if corpus == "cmu_mosei":
        label, targets = (values[:, 1:] > 0).astype(np.float32), {"sentiment": label}
    examples = Annotations(list(map(_id, keys)), [key[0] for key in keys], label, targets, keys)
    return by_split(examples, [folds[key[0]] for key in keys]), outside


def _id(key: Key) -> str:
    return f"{key[0]}_{key[3]}"


def _table(path: Path, columns: Collection[str]) -> Table:
    """Return the rows of a label sequence as a table of segments."""
    file, rows, where = CsdFile(path), [], []
    for video in sorted(file.names):
        steps, features = file.steps(video)
        if features.shape[1] != len(columns):
            expected = f"those of the corpus have {len(columns)} ({', '.join(columns)})"
            fault = f"label rows of width {features.shape[1]}, {expected}"
            raise ConclugenError(f"{file.where(video)}: {fault}; name the file of labels")
        rows += [(video, *row) for row in np.hstack([steps, file.values(video, slice(None))]).tolist()]
        where += [f"{file.where(video)}, label row {i}" for i in range(len(steps))]
    names = ("video", "start_time", "end_time", *columns)
    return Table(path, dict(zip(names, zip(*rows, strict=True) if rows else [()] * len(names), strict=True)), where)


class CsdFeatures:
    """One modality from ``.csd`` files of numbers; the vectors of several files are concatenated in their order.

    The steps of an example are those whose interval, clipped to [start, end], is longer than ``EPSILON``: a step that
    only touches the example, or has no length, does not count, and neither does anything for an example without
    length. Steps are put in the order of their start and pooled, each with the same weight however little of it is
    inside, which is what the SDK's ``align`` does with a function that averages. An aligned entry ``VIDEO[ROW]``,
    looked for where there is no entry ``VIDEO``, is pooled whole.

    Attributes:
      dim: size of the concatenated vectors.
      replaced: number of values -inf, which COVAREP holds, that were read as 0 by this process. NaN and +inf stay.
    """

    def __init__(self, paths: Path | Iterable[Path], *, pool: str = "mean"):
        """Open the files, one or several; pool by ``mean``, ``max`` or ``last``."""
        self._sequences = [CsdFile(path) for path in ([paths] if isinstance(paths, Path) else paths)]
        if not self._sequences:
            raise ConclugenError("no .csd file is named for the modality; name one or more")
        self._pool, self.replaced = pool, 0
        self._dims = [s.steps(min(s.names))[1].shape[1] for s in self._sequences]
        self.dim = sum(self._dims)

    def files(self) -> Iterable[Path]:
        """Return the paths of the files."""
        return [s.path for s in self._sequences]

    def names(self) -> dict[str, list[str]]:
        """Return nothing: entries are videos, of which labels cut utterances."""
        return {}

    def locate(self, split: str, keys: Sequence[Key]) -> Sequence[Key | None]:
        """Return the keys (video, start, end, row) themselves, None where a file has no entry of the video."""
        return [key if all(s.entry_name(key) is not None for s in self._sequences) else None for key in keys]

    def read(self, place: Key) -> np.ndarray | None:
        """Return the vector [dim] of an example, None if a file lacks the video or has no step that overlaps the example.

        Raises:
          ConclugenError: an entry that is damaged, of another width, or aligned to something else.
        """
        vectors = [self._vector(s, dim, place) for s, dim in zip(self._sequences, self._dims, strict=True)]
        return None if any(vector is None for vector in vectors) else np.concatenate(vectors)

    def _vector(self, sequence: "CsdFile", dim: int, key: Key) -> np.ndarray | None:
        (video, start, end, row), name = key, sequence.entry_name(key)
        if name is None:
            return None
        steps, features = sequence.steps(name)
        if features.shape[1] != dim:
            fault = f"vectors of size {features.shape[1]}, those of the file's first video have {dim}"
            raise ConclugenError(f"{sequence.where(name)}: {fault}; correct or remove the entry")
        if name == video:
            index = np.flatnonzero(np.minimum(steps[:, 1], end) - np.maximum(steps[:, 0], start) > EPSILON)
        elif steps.size and (steps.min() < start - ROUNDING or steps.max() > end + ROUNDING):
            fault = f"from {steps.min():.3f} to {steps.max():.3f} s, row {row} of the labels {start:.3f} to {end:.3f} s"
            way_out = "align the sequence to these labels, or name the file that is not aligned"
            raise ConclugenError(f"{sequence.where(name)}: {fault}; {way_out}")
        else:
            index = np.arange(len(steps))
        if not index.size:
            return None
        x = sequence.values(name, slice(int(index[0]), int(index[-1]) + 1))
        x = x[index[np.argsort(steps[index, 0], kind="stable")] - index[0]]
        if x.dtype.kind == "f":
            low = np.isneginf(x)
            self.replaced += int(low.sum())
            x[low] = 0
        return pool(x, self._pool, sequence.where(name))


class CsdFile:
    """A ``.csd`` file, opened when first used in a process; it keeps the intervals of the latest entry only.

    Attributes:
      names: of the entries, at least one.
    """

    def __init__(self, path: Path):
        self.path = path
        self._latest: tuple[str, np.ndarray, Any] | None = None

    def __reduce__(self) -> tuple[Any, ...]:
        """Keep only the path for another process, since an open file cannot be sent."""
        return CsdFile, (self.path,)

    def where(self, name: str) -> str:
        """Return what messages call an entry."""
        return f"{self.path}, video {name[:100]!r}"

    def entry_name(self, key: Key) -> str | None:
        """Return the name of the entry that holds an example's steps, None if there is none."""
        return next((name for name in (key[0], f"{key[0]}[{key[3]}]") if name in self.names), None)

    @functools.cached_property
    def names(self) -> frozenset[str]:
        """Return the names of the entries."""
        with readable(self.path, AGAIN, other=Exception):  # h5py raises many kinds
            return frozenset(self._data)

    def steps(self, name: str) -> tuple[np.ndarray, Any]:
        """Return the checked intervals float64 [steps, 2] of an entry, and its features [steps, dim], not yet read."""
        if self._latest is None or self._latest[0] != name:
            with readable(self.path, AGAIN, other=Exception):
                self._latest = name, *_checked(self._data[name], self.where(name))
        return self._latest[1:]

    def values(self, name: str, which: slice) -> np.ndarray:
        """Return consecutive feature vectors [n, dim] of an entry."""
        features = self.steps(name)[1]
        with readable(self.path, AGAIN, other=Exception):
            return features[which]

    @functools.cached_property
    def _data(self) -> Any:
        """The HDF5 group of the entries."""
        try:
            import h5py
        except ImportError as e:
            raise ConclugenError(f"{self.path}: .csd files are HDF5, which needs h5py; pip install h5py") from e
        with readable(self.path, AGAIN, other=Exception):
            file = h5py.File(self.path, "r")
            root = next((node for node in file.values() if isinstance(node, h5py.Group)), None)
            data = None if root is None else root.get("data")
            if not isinstance(data, h5py.Group) or not len(data):
                found = "no group" if root is None else f"{root.name!r} with {', '.join(map(repr, root)) or 'nothing'}"
            # h5py hands out as bytes what is not UTF-8.
            elif odd := [name for name in data if not isinstance(name, str)]:
                found = f"the name {odd[0][:100]!r}, which is not UTF-8"
            else:
                return data
        expected = "expected an HDF5 group /NAME/data with an entry per video"
        raise ConclugenError(f"{self.path}: {expected}, found {found}; {AGAIN}")


def _checked(entry: Any, where: str) -> tuple[np.ndarray, Any]:
    """Return the intervals of an entry, read, and its features, not yet read."""
    found = {key: (entry[key].shape, str(entry[key].dtype)) for key in ("features", "intervals") if key in entry}
    features, intervals = entry.get("features"), entry.get("intervals")
    numbers = len(found) == 2 and {features.dtype.kind, intervals.dtype.kind} <= set("fiu")
    if not numbers or features.ndim != 2 or intervals.shape != (len(features), 2) or not features.shape[1]:
        expected = "expected numbers (steps, dim) as features and (steps, 2) as intervals"
        way_out = "write the entry again, words or phones as word vectors (a TimestampedWordVectors file)"
        raise ConclugenError(f"{where}: {found}, {expected}; {way_out}")
    for array in (features, intervals):  # HDF5 declares sizes without storing anything
        if array.nbytes > MOST_UNPACKED * max(array.id.get_storage_size(), 2**20):
            fault = f"{array.shape} numbers declared, {array.id.get_storage_size()} bytes stored"
            raise ConclugenError(f"{where}: {fault}; download it again")
    times = intervals[:].astype(np.float64)
    wrong = np.flatnonzero(~(np.isfinite(times).all(axis=1) & (times[:, 1] >= times[:, 0])))
    if wrong.size:
        start, end = times[wrong[0]]
        fault = f"interval from {start} to {end} s, expected an end not before its start"
        raise ConclugenError(f"{where}, step {wrong[0]}: {fault}; correct it")
    return times, features
