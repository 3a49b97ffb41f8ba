"""Labels and standard folds of CMU-MOSEI and CMU-MOSI, as the CMU-MultimodalSDK publishes them."""

import importlib.resources
from collections import Counter
from collections.abc import Collection, Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from conclugen_jax.data.annotations import by_split
from conclugen_jax.data.cells import Table, number
from conclugen_jax.data.corpora import CORPORA
from conclugen_jax.data.importers.csd_features import CsdFile, Key
from conclugen_jax.data.sources import Annotations
from conclugen_jax.errors import ConclugenError

EMOTIONS = ("happy", "sad", "anger", "surprise", "disgust", "fear")
"""Columns of the label of CMU-MOSEI, in the order of the published rows."""

LABEL_COLUMNS = {"cmu_mosei": ("sentiment", *EMOTIONS), "cmu_mosi": ("sentiment",)}
"""corpus -> meaning of the columns of a label row."""

Rows = Iterable[tuple[str, Key, Sequence[Any]]]
"""Where each label row stands, for messages; its key; its cells."""


def read_folds(corpus: str) -> dict[str, str]:
    """Return the standard split (``train``, ``validation`` or ``test``) of each video of a corpus.

    Raises:
      ConclugenError: neither ``cmu_mosei`` nor ``cmu_mosi``.
    """
    _label_columns(corpus)
    file = importlib.resources.files("conclugen_jax.data") / "folds" / f"{corpus}.txt"
    lines = file.read_text(encoding="utf-8").splitlines()
    pairs = (line.split() for line in lines if line and not line.startswith("#"))
    return {video: split for split, video in pairs}


def read_labels(path: Path, corpus: str, *, drop: Collection[str] = ()) -> tuple[dict[str, Annotations], int]:
    """Read a label ``.csd`` file as published, not aligned.

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
    return _annotations(_rows_of_file(path, corpus), corpus, drop, str(path))


def read_label_tables(
    tables: Sequence[Table], corpus: str, *, drop: Collection[str] = ()
) -> tuple[dict[str, Annotations], int]:
    """Read tables of segments.

    Like :func:`read_labels`, but rows of a video are counted in the order of the tables, so that ids are the same as
    there only if the tables hold all rows in the order of the label sequence.

    Args:
      tables: with the columns ``video``, ``start_time``, ``end_time`` (seconds), ``sentiment`` and, for ``cmu_mosei``,
        those of ``EMOTIONS``, in any order and among others.
      corpus: ``cmu_mosei`` or ``cmu_mosi``.
      drop: ids to be left out.

    Returns:
      As :func:`read_labels`.

    Raises:
      ConclugenError: an unknown corpus, a missing column, or a cell that is not a number in its range.
    """
    return _annotations(_rows_of_tables(tables, corpus), corpus, drop, ", ".join(str(t.path) for t in tables))


def _label_columns(corpus: str) -> dict[str, tuple[float, float]]:
    """Return column of a label row -> least and greatest number there."""
    if corpus not in LABEL_COLUMNS:
        raise ConclugenError(f"corpus {corpus!r} has no standard folds here; there are {', '.join(LABEL_COLUMNS)}")
    ranges = CORPORA[corpus].ranges
    return {name: ranges.get(name, ranges["label"]) for name in LABEL_COLUMNS[corpus]}


def _rows_of_file(path: Path, corpus: str) -> Rows:
    columns, file = _label_columns(corpus), CsdFile(path)
    for video in sorted(file.names()):
        steps, features = file.steps(video)
        if features.shape[1] != len(columns):
            raise ConclugenError(
                f"{file.where(video)}: label rows of width {features.shape[1]}, those of {corpus} have {len(columns)} "
                f"({', '.join(columns)}); name the file of labels"
            )
        values = file.values(video, slice(None)).tolist()
        for i, ((start, end), cells) in enumerate(zip(steps.tolist(), values, strict=True)):
            yield f"{file.where(video)}, label row {i}", (video, start, end, i), cells


def _rows_of_tables(tables: Sequence[Table], corpus: str) -> Rows:
    columns, counts = list(_label_columns(corpus)), Counter()
    for table in tables:
        missing = [name for name in ("video", "start_time", "end_time", *columns) if name not in table.columns]
        if missing:
            raise ConclugenError(f"{table.path}: no column {missing[0]!r}; it has {', '.join(table.names)}")
        for where, cells in table:
            start, end = (number(cells[name], f"{where}: {name}") for name in ("start_time", "end_time"))
            if end < start:
                raise ConclugenError(f"{where}: ends at {end} s, before its start at {start} s; correct the row")
            video = cells["video"].strip()
            yield where, (video, start, end, counts[video]), [cells[name] for name in columns]
            counts[video] += 1


def _annotations(rows: Rows, corpus: str, drop: Collection[str], where: str) -> tuple[dict[str, Annotations], int]:
    columns, folds = _label_columns(corpus), read_folds(corpus)
    found: dict[Key, list[float]] = {}
    outside = 0
    for place, key, cells in rows:
        if key[0] in folds:
            pairs = zip(cells, columns.items(), strict=True)
            found[key] = [number(cell, f"{place}: {name}", span) for cell, (name, span) in pairs]
        else:
            outside += 1
    if not found:
        raise ConclugenError(
            f"{where}: no rows of videos in the standard folds of {corpus}, {outside} of others; name "
            "the labels of this corpus, not aligned ones"
        )
    keys = sorted((key for key in found if _id(key) not in drop), key=lambda key: (key[0], key[3]))
    values = np.array([found[key] for key in keys], np.float32).reshape(len(keys), len(columns))
    if corpus == "cmu_mosei":
        label, targets = (values[:, 1:] > 0).astype(np.float32), {"sentiment": values[:, 0]}
    else:
        label, targets = values[:, 0], {}
    examples = Annotations(list(map(_id, keys)), [key[0] for key in keys], label, targets, keys)
    return by_split(examples, [folds[key[0]] for key in keys]), outside


def _id(key: Key) -> str:
    return f"{key[0]}_{key[3]}"
