"""Tables of text by column, the csv files that they are read from, and the numbers in their cells."""

import csv
import dataclasses
import io
import math
import unicodedata
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from conclugen_jax.data.files import MOST_TEXT, read_whole
from conclugen_jax.errors import ConclugenError

MOST = float(np.finfo(np.float32).max)  # labels are stored in float32


@dataclasses.dataclass(frozen=True, eq=False)
class Table:
    """Rows of text."""

    path: Path  # file that messages about the whole table name
    columns: Mapping[str, Sequence[str]]  # name -> n cells
    where: Sequence[str]  # n places for messages, such as "labels.csv, line 2"
    keys: Sequence[Any] | None = None  # of the rows' features; None where the column id holds them

    def __len__(self) -> int:
        return len(self.where)

    def __iter__(self) -> Iterator[tuple[str, dict[str, str]]]:
        """Yield the place and the cells of each row."""
        for i, where in enumerate(self.where):
            yield where, {name: cells[i] for name, cells in self.columns.items()}

    def stripped(self, name: str) -> list[str]:
        """Return the cells of a column without spaces around them; empty ones where there is no such column."""
        return [cell.strip() for cell in self.columns[name]] if name in self.columns else [""] * len(self)

    def having(self, **columns: Sequence[str]) -> "Table":
        """Return the table with these columns added or replaced."""
        return dataclasses.replace(self, columns={**self.columns, **columns})

    def rows(self, chosen: Sequence[int]) -> "Table":
        """Return some rows of the table."""
        columns = {name: [cells[i] for i in chosen] for name, cells in self.columns.items()}
        keys = None if self.keys is None else [self.keys[i] for i in chosen]
        return Table(self.path, columns, [self.where[i] for i in chosen], keys)

    def require(self, *names: str, why: str = "") -> None:
        """Refuse a table without one of these columns."""
        missing = next((name for name in names if name not in self.columns), None)
        if missing is not None:
            header = "; its first line must hold the names of columns, such as id,split,label" * (missing == "id")
            raise ConclugenError(f"{self.path}: no column {missing!r}{why}; it has {', '.join(self.columns)}{header}")

    def refuse(self, wrong: np.ndarray, column: str, expected: str) -> None:
        """Refuse the first of the rows that are wrong (bool [n]) by its cell."""
        for row in np.flatnonzero(wrong)[:1]:
            cell = short(self.columns[column][row])
            raise ConclugenError(f"{self.where[row]}: {column} {cell}, expected {expected}; correct it")


def column_name(text: str) -> str:
    """Return a column's name without spaces around it and with composed accents; names with a fixed meaning in lower case."""
    name = unicodedata.normalize("NFC", text.strip())
    return name.lower() if name.lower() in ("id", "split", "group", "label") else name


def read_csv(path: Path) -> Table:
    """Read a csv file in UTF-8 or, if it is not UTF-8, in Windows-1252. Blank lines are skipped, bad ones refused.

    Accents that stand apart from their letters, as macOS writes them, are composed with them.
    """
    content = read_whole(path, MOST_TEXT)
    if b"\0" in content:
        raise ConclugenError(f"{path}: holds zero bytes, as UTF-16 does; save it as csv in UTF-8")
    try:
        text = content.decode("utf-8-sig")
    except UnicodeDecodeError:
        text = content.decode("cp1252", errors="replace")
    reader = csv.reader(io.StringIO(unicodedata.normalize("NFC", text), newline=""), strict=True)
    rows, where = [], []
    try:
        names = list(map(column_name, next(filter(None, reader), [])))
        if len(names) == 1 and {";", "\t"} & set(names[0]):
            raise ConclugenError(f"{path}: its first line is {names[0][:100]!r}; separate cells by commas")
        if not names or "" in names or len(set(names)) < len(names):
            raise ConclugenError(f"{path}: its first line must name the columns, each once; it is {names}")
        for cells in filter(None, reader):
            where.append(f"{path}, line {reader.line_num}")
            if len(cells) != len(names):
                found = f"{len(cells)} cells, the header has {len(names)}"
                raise ConclugenError(f"{where[-1]}: {found}; quote cells with commas")
            rows.append(cells)
    except csv.Error as e:
        raise ConclugenError(f"{path}, line {reader.line_num}: not csv ({e}); correct the file") from e
    return Table(path, dict(zip(names, zip(*rows, strict=True) if rows else [()] * len(names), strict=True)), where)


def stack(tables: Sequence[Table]) -> Table:
    """Put the rows of several tables below each other; each must have the columns of the first one, which are kept."""
    first = tables[0]
    for table in tables:
        table.require(*first.columns, why=f", which {first.path} has")
    return Table(
        first.path,
        {name: [cell for table in tables for cell in table.columns[name]] for name in first.columns},
        [place for table in tables for place in table.where],
        None if first.keys is None else [key for table in tables for key in table.keys],
    )


def as_number(value: Any) -> float:
    """Return the finite number that a text spells, else NaN; 1_0 is a name, although Python reads 10."""
    try:
        number = math.nan if isinstance(value, str) and "_" in value else float(value)
    except (TypeError, ValueError):
        return math.nan
    return number if math.isfinite(number) else math.nan


def number(value: Any, where: str, span: tuple[float, float] | None = None) -> float:
    """Return the number that a text spells; it must be finite in float32 and, with ``span``, from one to another."""
    found = as_number(value)
    low, high = span or (-MOST, MOST)
    if not low <= found <= high:  # also where it is NaN
        expected = f"a number from {low:g} to {high:g}" if span else "a finite number of float32"
        raise ConclugenError(f"{where} {short(value)}, expected {expected}; correct it")
    return found


def short(value: Any) -> str:
    """Return a value for a message; only the type of an integer or a container (by YAML aliases) that may be huge."""
    if isinstance(value, str):
        return repr(value[:100])
    plain = value is None or isinstance(value, float) or (isinstance(value, int) and abs(value) < 2**63)
    return repr(value) if plain else f"a {type(value).__name__}"
