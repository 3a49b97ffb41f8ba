"""Vectors of one modality from a table with one column per feature."""

import functools
from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from conclugen_jax.data import wide
from conclugen_jax.data.cells import short
from conclugen_jax.data.features import RowFeatures, pool
from conclugen_jax.data.wide import Frames
from conclugen_jax.errors import ConclugenError


class ColumnFeatures(RowFeatures):
    """A table with one column per feature, one of which names the clips; several rows of a clip are its frames.

    Attributes:
      left_out: maps each reason to the number of frames that this process skipped.
      notes: sentences on how the table was read.
    """

    def __init__(self, path: Path, *, how: str, apart: Sequence[str] = (), load: Callable[..., Frames] = wide.read):
        """Read the table with ``load``; ``how`` is the pooling over time, ``apart`` names columns that are no features."""
        self.path, self.left_out, self._apart, self._load, self._opened = path, Counter[str](), apart, load, None
        frames, index, _, _ = self._table()
        way_out = f"or, if each file is a clip, give --modality NAME={path.parent} instead of --source"
        if frames.keys is None:
            raise ConclugenError(f"{path}: no column names the clips of its rows; call that column id, {way_out}")
        if len(frames.x) > 1 and list(index) == ["unknown"]:
            fault = "all clips are called 'unknown'; name them with SMILExtract -instname NAME"
            raise ConclugenError(f"{path}: {fault}, {way_out}")
        super().__init__(path, how, path)
        self.dim = len(frames.names)
        key = f"clips named by column {frames.key!r}" if frames.key else "clips named by the column without name"
        key += f", {len(frames.x)} rows are frames of {len(index)} clips" * (len(index) < len(frames.x))
        self.notes = [wide.describe(frames, key)]

    def ids(self) -> list[str]:
        """Return the ids of the clips, each once."""
        return list(self._table()[1])

    def labels(self) -> dict[str, Callable[[], list[str]]]:
        """Return what reads the ids, as column ``id``, and the columns of labels, in which the rows of a clip agree."""
        columns = {name: functools.partial(self._of_clips, name) for name in self._table()[0].labels}
        return {"id": self.ids, **columns}

    def _of_clips(self, name: str) -> list[str]:
        """Return the cell of each clip in a column of labels; refuse rows of a clip that differ in it."""
        frames, _, order, starts = self._table()
        column, first = frames.labels[name], order[starts[:-1]]
        for row, other in zip(order.tolist(), np.repeat(first, np.diff(starts)).tolist(), strict=True):
            if column[row] != column[other]:
                clip, fault = frames.keys[row], f"{short(column[row])}, but {short(column[other])} in row {other}"
                way_out = "correct it, or give each row an id of its own"
                raise ConclugenError(f"{self.path}, row {row}: {name} of clip {clip!r} is {fault}; {way_out}")
        return [column[row] for row in first.tolist()]

    def locate(self, split: str, keys: Sequence[str]) -> Sequence[int | None]:
        """Return the position of each clip; None for one that the table lacks."""
        return [None if row < 0 else row for row in self.rows(split, keys)]

    def read(self, place: int) -> np.ndarray | None:
        """Return the vector [dim] of a clip, None if none of its rows counts."""
        frames, _, order, starts = self._table()
        framewise = frames.timed or len(starts) - 1 < len(frames.x)
        x, reasons = wide.usable(frames, order[starts[place] : starts[place + 1]], framewise=framewise)
        self.left_out += reasons
        return pool(x, self.how, f"{self.path}, clip {place}") if len(x) else None

    def __getstate__(self) -> dict[str, Any]:
        return {**super().__getstate__(), "_opened": None}

    def _table(self) -> tuple[Frames, dict[str, int], np.ndarray, np.ndarray]:
        """Return the rows, name -> number of the clip, the rows in the order of the clips, and where each begins there."""
        if self._opened is None:
            frames, index = self._load(self.path, self._apart), dict[str, int]()
            of_row = [index.setdefault(key, len(index)) for key in frames.keys or ()]
            order = np.argsort(of_row, kind="stable")
            self._opened = frames, index, order, np.searchsorted(np.sort(of_row), np.arange(len(index) + 1))
        return self._opened
