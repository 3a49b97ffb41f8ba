"""Tables of text: csv files by row, and the numbers in their cells."""

import csv
import itertools
import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from conclugen_jax.data.files import MOST_TEXT, read_whole
from conclugen_jax.errors import ConclugenError

MOST = float(np.finfo(np.float32).max)
"""Labels are stored in float32."""


def column_name(text: str) -> str:
    """A column's name without spaces around it; the ones with a fixed meaning in lower case."""
    name = text.strip()
    return name.lower() if name.lower() in ("id", "split", "group", "label") else name


class CsvTable:
    """Rows of a csv file, read anew each time they are iterated over: (where, columns)."""

    def __init__(self, path: Path):
        """Read the header.

        The file is UTF-8 or, where it is not, Windows-1252.

        Raises:
          ConclugenError: no regular file, a huge one, one in UTF-16 or with other separators than commas, or no header.
        """
        self.path = path
        content = read_whole(path, MOST_TEXT)
        if b"\0" in content:
            raise ConclugenError(f"{path}: holds zero bytes, as UTF-16 does; save it as csv in UTF-8")
        try:
            content.decode("utf-8-sig")
            self._encoding = "utf-8-sig"
        except UnicodeDecodeError:
            self._encoding = "cp1252"
        self.names = [column_name(name) for name in next(self._cells(), (0, []))[1]]
        if len(self.names) == 1 and {";", "\t"} & set(self.names[0]):
            raise ConclugenError(f"{path}: its first line is {self.names[0][:100]!r}; separate cells by commas")
        if not self.names or "" in self.names or len(set(self.names)) < len(self.names):
            raise ConclugenError(f"{path}: its first line must name the columns, each once; it is {self.names}")

    def __iter__(self) -> Iterator[tuple[str, dict[str, str]]]:
        """Rows below the header; blank lines are passed over.

        Raises:
          ConclugenError: a row with more or fewer cells than the header, or one that is not csv.
        """
        for line, cells in itertools.islice(self._cells(), 1, None):
            if len(cells) != len(self.names):
                raise ConclugenError(
                    f"{self.path}, line {line}: {len(cells)} cells, the header has {len(self.names)}; quote cells with commas"
                )
            yield f"{self.path}, line {line}", dict(zip(self.names, cells, strict=True))

    def _cells(self) -> Iterator[tuple[int, list[str]]]:
        with self.path.open(encoding=self._encoding, errors="replace", newline="") as file:
            reader = csv.reader(file, strict=True)
            try:
                for cells in reader:
                    if cells:
                        yield reader.line_num, cells
            except csv.Error as e:
                raise ConclugenError(f"{self.path}, line {reader.line_num}: not csv ({e}); mend the file") from e


def as_number(value: Any) -> float:
    """The finite number that a text says; NaN where it says none (1_0 is a name, though Python reads 10)."""
    if isinstance(value, str) and "_" in value:
        return math.nan
    try:
        number = float(value)
    except (TypeError, ValueError):
        return math.nan
    return number if math.isfinite(number) else math.nan


def number(value: Any, where: str, span: tuple[float, float] | None = None) -> float:
    """The number that a text says.

    Args:
      value: the text.
      where: names the cell in messages.
      span: least and greatest number that it may be.

    Raises:
      ConclugenError: no finite number of float32, or one outside the span.
    """
    found = as_number(value)
    low, high = span or (-MOST, MOST)
    if not low <= found <= high:  # nor is NaN
        expected = f"a number from {low:g} to {high:g}" if span else "a finite number of float32"
        raise ConclugenError(f"{where} {short(value)}, expected {expected}; mend it")
    return found


def short(value: Any) -> str:
    """A value for a message; of containers, which aliases can make huge, only their kind."""
    if isinstance(value, int | float):
        return repr(value)
    return repr(value[:100]) if isinstance(value, str) else f"a {type(value).__name__}"
