"""CMU-MOSEI and CMU-MOSI from the files of the CMU-MultimodalSDK: label sequence, feature sequences, standard folds."""

import importlib.resources
import re
from collections import Counter
from collections.abc import Collection, Sequence
from pathlib import Path

import numpy as np

from conclugen_jax.data.cells import Table, number, read_csv
from conclugen_jax.data.corpora import CORPORA, dropped
from conclugen_jax.data.importers.csd_features import CsdFeatures, CsdFile, Key
from conclugen_jax.data.requests import Found, Request
from conclugen_jax.data.sources import Annotations, by_split
from conclugen_jax.errors import ConclugenError

KINDS = {"text": r"wordvectors|glove|bert", "audio": r"covarep|opensmile", "video": r"openface|facet"}
"""modality -> what the names of its published files contain."""

EMOTIONS = ("happy", "sad", "anger", "surprise", "disgust", "fear")
"""Columns of the label of CMU-MOSEI, in the order of the published rows."""

LABEL_COLUMNS = {"cmu_mosei": ("sentiment", *EMOTIONS), "cmu_mosi": ("sentiment",)}
"""corpus -> meaning of the columns of a label row."""


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
    facts = {"rows_outside_folds": outside, "minus_infinity": "read as 0"}
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
    ids are the same only if they hold all rows in the order of the label sequence. Ids in ``drop`` are left out.

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
            video = cells["video"].strip()
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
