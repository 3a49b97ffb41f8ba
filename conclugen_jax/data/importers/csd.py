"""CMU-MultimodalSDK files: labels and feature sequences of CMU-MOSEI and CMU-MOSI, one entry per video.

Such a ``.csd`` file is HDF5: ``/ROOT/data/VIDEO/features`` [steps, dim] and ``/ROOT/data/VIDEO/intervals`` [steps, 2]
in seconds. The SDK's ``align`` names entries ``VIDEO[ROW]`` instead, after the rows of the sequence aligned to.
"""

import contextlib
import importlib.resources
from collections import Counter
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from conclugen_jax.data.cells import CsvTable, number
from conclugen_jax.data.corpora import CORPORA
from conclugen_jax.data.files import MOST_UNPACKED
from conclugen_jax.data.pooling import POOLS, pool
from conclugen_jax.data.sources import Annotations
from conclugen_jax.errors import ConclugenError

EMOTIONS = ("happy", "sad", "anger", "surprise", "disgust", "fear")
"""Columns of the label of CMU-MOSEI, in the order of the published rows."""

LABEL_COLUMNS = {"cmu_mosei": ("sentiment", *EMOTIONS), "cmu_mosi": ("sentiment",)}
"""corpus -> meaning of the columns of a label row."""

EPSILON = 1e-5
"""Seconds by which a step and an example must overlap, as in the SDK: what merely touches does not count."""

ROUNDING = 0.01
"""Seconds by which a step of an aligned entry may stick out of its example: times in tables are rounded."""

Key = tuple[str, float, float, int]
"""video, start and end in seconds, row of the video's labels."""


class _Row(NamedTuple):
    key: Key
    values: np.ndarray  # float32 [columns]


def read_folds(corpus: str) -> dict[str, str]:
    """The standard split of each video.

    Args:
      corpus: ``cmu_mosei`` or ``cmu_mosi``.

    Returns:
      video id -> ``train``, ``validation`` or ``test``.

    Raises:
      ConclugenError: another corpus.
    """
    _label_columns(corpus)
    file = importlib.resources.files("conclugen_jax.data") / "folds" / f"{corpus}.txt"
    lines = file.read_text(encoding="utf-8").splitlines()
    pairs = (line.split() for line in lines if line and not line.startswith("#"))
    return {video: split for split, video in pairs}


def read_labels(path: str | Path, corpus: str, *, drop: Collection[str] = ()) -> tuple[dict[str, Annotations], int]:
    """Labels from a label ``.csd`` file as published, not aligned.

    Every row of every video in the standard folds is an example with id ``VIDEO_ROW``, the video as group and
    (video, start, end, row) as key. Examples are sorted by video, then row.

    Args:
      path: of the file; its rows are [sentiment, happy, sad, anger, surprise, disgust, fear] for ``cmu_mosei`` and
        [sentiment] for ``cmu_mosi``.
      corpus: ``cmu_mosei`` or ``cmu_mosi``.
      drop: ids to be left out; the others keep their row numbers.

    Returns:
      split -> annotations, in the order train, validation, test and without empty splits; and the number of rows left
      out because their video is in no fold. The label is float32 [n, 6] (1 where an emotion is > 0, order as in
      ``EMOTIONS``) with target ``sentiment`` float32 [n] for ``cmu_mosei``, the sentiment float32 [n] for ``cmu_mosi``.

    Raises:
      ConclugenError: an unknown corpus, no such file, one whose rows are not labels of this corpus, or a label outside
        its range.
    """
    columns, folds = _label_columns(corpus), read_folds(corpus)
    sequence = _Sequence(path)
    rows, outside = [], 0
    for name in sorted(sequence.names()):
        steps, features = sequence.steps(name)
        if features.shape[1] != len(columns):
            raise ConclugenError(
                f"{sequence.where(name)}: label rows of width {features.shape[1]}, those of {corpus} have {len(columns)} "
                f"({', '.join(columns)}); name the file of labels"
            )
        if name not in folds:
            outside += len(steps)
            continue
        values = sequence.values(name, slice(None)).tolist()
        for i, ((start, end), row) in enumerate(zip(steps.tolist(), values, strict=True)):
            where = f"{sequence.where(name)}, label row {i}"
            rows.append(_Row((name, start, end, i), _checked(row, columns, where)))
    return _annotations(rows, corpus, folds, drop, outside, str(path)), outside


def read_label_csv(
    paths: str | Path | Sequence[str | Path], corpus: str, *, drop: Collection[str] = ()
) -> tuple[dict[str, Annotations], int]:
    """Labels from tables of segments.

    Like :func:`read_labels`, but rows of a video are counted in the order of the files, so that ids are the same as
    there only if the tables hold all rows in the order of the label sequence.

    Args:
      paths: of csv files with the columns ``video``, ``start_time``, ``end_time`` (seconds), ``sentiment`` and, for
        ``cmu_mosei``, those of ``EMOTIONS``, in any order and among others.
      corpus: ``cmu_mosei`` or ``cmu_mosi``.
      drop: ids to be left out.

    Returns:
      As :func:`read_labels`.

    Raises:
      ConclugenError: an unknown corpus, no such file, a missing column, or a cell that is not a number in its range.
    """
    columns, folds = _label_columns(corpus), read_folds(corpus)
    rows, outside, counts = [], 0, Counter()
    for path in _paths(paths):
        for line, cells in CsvTable(path):
            missing = [name for name in ("video", "start_time", "end_time", *columns) if name not in cells]
            if missing:
                raise ConclugenError(f"{path}: no column {missing[0]!r}; it has {', '.join(cells)}")
            start, end = (number(cells[name], f"{line}: {name}") for name in ("start_time", "end_time"))
            if end < start:
                raise ConclugenError(f"{line}: ends at {end} s, before its start at {start} s; mend the row")
            video = cells["video"].strip()
            key = (video, start, end, counts[video])
            counts[video] += 1
            if video in folds:
                rows.append(_Row(key, _checked([cells[name] for name in columns], columns, line)))
            else:
                outside += 1
    where = ", ".join(map(str, _paths(paths)))
    return _annotations(rows, corpus, folds, drop, outside, where), outside


def _label_columns(corpus: str) -> dict[str, tuple[float, float]]:
    """column of a label row -> least and greatest number there."""
    if corpus not in LABEL_COLUMNS:
        raise ConclugenError(f"corpus {corpus!r} has no standard folds here; there are {', '.join(LABEL_COLUMNS)}")
    ranges = CORPORA[corpus].ranges
    return {name: ranges.get(name, ranges["label"]) for name in LABEL_COLUMNS[corpus]}


def _checked(cells: Iterable[Any], columns: Mapping[str, tuple[float, float]], where: str) -> np.ndarray:
    """A label row as float32 [columns]."""
    pairs = zip(cells, columns.items(), strict=True)
    return np.array([number(cell, f"{where}: {name}", span) for cell, (name, span) in pairs], np.float32)


def _annotations(
    rows: list[_Row], corpus: str, folds: dict[str, str], drop: Collection[str], outside: int, where: str
) -> dict[str, Annotations]:
    if not rows:
        raise ConclugenError(
            f"{where}: no rows of videos in the standard folds of {corpus}, {outside} of others; name "
            "the labels of this corpus, not aligned ones"
        )
    by_split: dict[str, list[_Row]] = {"train": [], "validation": [], "test": []}
    for row in sorted(rows, key=lambda r: (r.key[0], r.key[3])):
        if _id(row.key) not in drop:
            by_split[folds[row.key[0]]].append(row)
    result = {}
    for split, members in by_split.items():
        if not members:
            continue
        values = np.stack([row.values for row in members])
        multi = corpus == "cmu_mosei"
        result[split] = Annotations(
            ids=[_id(row.key) for row in members],
            groups=[row.key[0] for row in members],
            label=(values[:, 1:] > 0).astype(np.float32) if multi else values[:, 0],
            targets={"sentiment": values[:, 0]} if multi else {},
            keys=[row.key for row in members],
        )
    return result


def _id(key: Key) -> str:
    return f"{key[0]}_{key[3]}"


def _paths(paths: str | Path | Sequence[str | Path]) -> list[Path]:
    return [Path(p) for p in ([paths] if isinstance(paths, str | Path) else paths)]


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

    def __init__(self, paths: str | Path | Sequence[str | Path], *, pool: str = "mean"):
        """Open the files and look at the first entry of each.

        Args:
          paths: of one file or several.
          pool: over time: ``mean``, ``max`` or ``last``.

        Raises:
          ConclugenError: no file, an unknown pooling, or a file that holds no sequences of vectors.
        """
        if pool not in POOLS:
            raise ConclugenError(f"pooling {pool!r} is unknown; there are {', '.join(POOLS)}")
        self._sequences = [_Sequence(path) for path in _paths(paths)]
        if not self._sequences:
            raise ConclugenError("no .csd file is named for the modality; name one or more")
        self._pool = pool
        self._dims = [s.steps(min(s.names()))[1].shape[1] for s in self._sequences]
        self.dim = sum(self._dims)
        self.replaced = 0

    def files(self) -> Iterable[Path]:
        """Paths of the files."""
        return [s.path for s in self._sequences]

    def names(self) -> dict[str, list[str]]:
        """None: entries are videos, of which labels cut utterances."""
        return {}

    def locate(self, split: str, keys: Sequence[Key]) -> Sequence[Key | None]:
        """The keys (video, start, end, row) themselves, None where a file has no entry of the video."""
        return [key if all(_entry_name(s, key) is not None for s in self._sequences) else None for key in keys]

    def read(self, place: Key) -> np.ndarray | None:
        """The vector [dim] of an example, None if in any file the video is missing or no step overlaps the example.

        Raises:
          ConclugenError: an entry that is damaged, of another width, or aligned to something else.
        """
        vectors = []
        for sequence, dim in zip(self._sequences, self._dims, strict=True):
            name = _entry_name(sequence, place)
            vector = None if name is None else self._vector(sequence, dim, name, place)
            if vector is None:
                return None
            vectors.append(vector)
        return np.concatenate(vectors)

    def _vector(self, sequence: "_Sequence", dim: int, name: str, key: Key) -> np.ndarray | None:
        video, start, end, row = key
        steps, features = sequence.steps(name)
        if features.shape[1] != dim:
            raise ConclugenError(
                f"{sequence.where(name)}: vectors of size {features.shape[1]}, those of the file's first video have {dim}; "
                "mend or remove the entry"
            )
        if name == video:
            chosen = np.minimum(steps[:, 1], end) - np.maximum(steps[:, 0], start) > EPSILON
        elif steps.size and (steps.min() < start - ROUNDING or steps.max() > end + ROUNDING):
            raise ConclugenError(
                f"{sequence.where(name)}: from {steps.min():.3f} to {steps.max():.3f} s, but row {row} of the labels is from "
                f"{start:.3f} to {end:.3f} s; align the sequence to these labels, or name the file that is not aligned"
            )
        else:
            chosen = np.ones(len(steps), bool)
        index = np.flatnonzero(chosen)
        if not index.size:
            return None
        x = sequence.values(name, slice(int(index[0]), int(index[-1]) + 1))
        order = index[np.argsort(steps[index, 0], kind="stable")]
        x = x[order - index[0]]
        if x.dtype.kind == "f":
            low = np.isneginf(x)
            self.replaced += int(low.sum())
            x[low] = 0
        return pool(x, self._pool, sequence.where(name))


def _entry_name(sequence: "_Sequence", key: Key) -> str | None:
    """Name of the entry that holds an example's steps, None if there is none."""
    names = sequence.names()
    return next((name for name in (key[0], f"{key[0]}[{key[3]}]") if name in names), None)


class _Sequence:
    """A ``.csd`` file, opened when first used in a process; it keeps the intervals of the latest entry only."""

    def __init__(self, path: str | Path):
        self.path = Path(path)
        self._data: Any = None
        self._names: frozenset[str] = frozenset()
        self._latest: tuple[str, np.ndarray, Any] | None = None

    def __getstate__(self) -> dict[str, Any]:
        """For another process: only the path, since an open file cannot be sent."""
        return {"path": self.path}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__init__(state["path"])

    def where(self, name: str) -> str:
        """How messages call an entry."""
        return f"{self.path}, video {name[:100]!r}"

    def names(self) -> frozenset[str]:
        """Names of the entries, at least one."""
        if self._data is None:
            with _reading(self.path):
                self._open()
        return self._names

    def steps(self, name: str) -> tuple[np.ndarray, Any]:
        """Intervals float64 [steps, 2] of an entry, checked, and its features [steps, dim], not yet read."""
        self.names()
        if self._latest is None or self._latest[0] != name:
            with _reading(self.path):
                self._latest = name, *self._entry(name)
        return self._latest[1:]

    def values(self, name: str, which: slice) -> np.ndarray:
        """Consecutive feature vectors [n, dim] of an entry."""
        features = self.steps(name)[1]
        with _reading(self.path):
            return features[which]

    def _open(self) -> None:
        try:
            import h5py
        except ImportError as e:
            raise ConclugenError(f"{self.path}: .csd files are HDF5, which needs h5py; pip install h5py") from e
        file = h5py.File(self.path, "r")
        root = next((node for node in file.values() if isinstance(node, h5py.Group)), None)
        data = None if root is None else root.get("data")
        if not isinstance(data, h5py.Group) or not len(data):
            inside = "no group" if root is None else f"{root.name!r} with {', '.join(map(repr, root)) or 'nothing'}"
            raise ConclugenError(
                f"{self.path}: expected an HDF5 group /NAME/data with an entry per video, found {inside}; name a .csd file"
            )
        odd = [name for name in data if not isinstance(name, str)]
        if odd:  # h5py hands out as bytes what is not UTF-8
            raise ConclugenError(
                f"{self.path}: the name {odd[0][:100]!r} of an entry is not UTF-8; fetch the file anew"
            )
        self._names = frozenset(data)
        self._data = data

    def _entry(self, name: str) -> tuple[np.ndarray, Any]:
        entry, where = self._data[name], self.where(name)
        if not {"features", "intervals"} <= set(entry):
            raise ConclugenError(f"{where}: no features and intervals; write the entry anew")
        features, intervals = entry["features"], entry["intervals"]
        if features.dtype.kind not in "fiu":
            raise ConclugenError(
                f"{where}: features are of type {features.dtype}, expected numbers; words or phones need word vectors, such "
                "as those of a TimestampedWordVectors file"
            )
        steps = features.shape[0] if features.ndim == 2 else -1
        if intervals.dtype.kind not in "fiu" or intervals.shape != (steps, 2) or not features.shape[1]:
            raise ConclugenError(
                f"{where}: features {features.shape} and intervals {intervals.shape} of type {intervals.dtype}, expected "
                "(steps, dim) and (steps, 2) with as many steps; write the entry anew"
            )
        for array in (features, intervals):  # HDF5 declares sizes without storing anything
            if array.nbytes > MOST_UNPACKED * max(array.id.get_storage_size(), 2**20):
                raise ConclugenError(
                    f"{where}: {array.shape} numbers declared, {array.id.get_storage_size()} bytes stored; fetch the file anew"
                )
        times = intervals[:].astype(np.float64)
        wrong = np.flatnonzero(~(np.isfinite(times).all(axis=1) & (times[:, 1] >= times[:, 0])))
        if wrong.size:
            start, end = times[wrong[0]]
            raise ConclugenError(
                f"{where}, step {wrong[0]}: interval from {start} to {end} s, expected an end not before its start; mend it"
            )
        return times, features


@contextlib.contextmanager
def _reading(path: Path) -> Iterator[None]:
    """Everything that h5py raises on files that are missing, truncated or something else -> one sentence."""
    try:
        yield
    except FileNotFoundError:
        raise ConclugenError(f"{path}: no such file; name a .csd file") from None
    except (OSError, RuntimeError, LookupError, ValueError, TypeError, AttributeError, MemoryError) as e:
        reason = (str(e).strip() or type(e).__name__).splitlines()[0]
        raise ConclugenError(f"{path}: cannot be read as a .csd file ({reason}); fetch the file anew") from e
