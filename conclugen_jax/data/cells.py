"""Tables of text by column, the csv files that they are read from, and the numbers in their cells."""

import csv
import dataclasses
import io
import math
import re
import unicodedata
from collections.abc import Collection, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from conclugen_jax.data.files import MOST_TEXT, read_whole
from conclugen_jax.data.text import decoded
from conclugen_jax.errors import ConclugenError

MOST = float(np.finfo(np.float32).max)  # labels are stored in float32
SEPARATORS = {",": "commas", ";": "semicolons", "\t": "tabs"}
SWAPPED = str.maketrans(".,", ",.")
GROUPED = re.compile(r"[+-]?[1-9]\d{0,2}([,'\N{RIGHT SINGLE QUOTATION MARK}\s])\d{3}(\1\d{3})*(\.\d+)?")  # 1,234,567.8
PLAIN = re.compile(r"[+-]?(\d+\.?\d*|\.\d+)([eE][+-]?\d+)?")
MISSING = frozenset(
    (
        *("", "#N/A", "#N/A N/A", "#NA", "<NA>", "N/A", "NA", "n/a", "NULL", "null", "None"),
        *("NaN", "nan", "NAN", "Nan", "-NaN", "-nan", "-nan(ind)", "1.#IND", "1.#QNAN", "-1.#IND", "-1.#QNAN"),
        *("#DIV/0!", "#NAME?", "#NULL!", "#NUM!", "#REF!", "#VALUE!"),
    )
)
"""Cells that count as missing: those of pandas, NaN as C prints it, and the errors of spreadsheets."""
NO_NAME = re.compile(r"(Unnamed: \d+(\.\d+)?)?")  # header of a column without name, also as pandas writes it


@dataclasses.dataclass(frozen=True, eq=False)
class Table:
    """Rows of text."""

    path: Path  # file to name in messages about the whole table
    columns: Mapping[str, Sequence[str]]  # name -> n cells
    where: Sequence[str]  # n places for messages, such as "labels.csv, line 2"
    keys: Sequence[Any] | None = None  # keys of the rows' features; None if they are the ids
    classes: Mapping[str, Sequence[str]] = dataclasses.field(default_factory=dict)
    """Column -> names of its classes in their order, where the file itself says them."""
    notes: Sequence[str] = ()  # on what was understood, or dropped, when the table was read

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
        return dataclasses.replace(self, columns=columns, where=[self.where[i] for i in chosen], keys=keys)

    def require(self, *names: str, why: str = "") -> None:
        """Refuse a table without one of these columns."""
        missing = next((name for name in names if name not in self.columns), None)
        if missing is not None:
            header = "; its first line must hold the names of columns, such as id,split,label" * (missing == "id")
            notes = f" ({'; '.join(self.notes)})" if self.notes and header else ""
            found = f"{self.path}: no column {missing!r}{why}; it has {', '.join(self.columns)}"
            raise ConclugenError(f"{found}{header}{notes}")

    def mark(self, *columns: str) -> str:
        """Return the decimal mark that the numbers in columns have in common, as :func:`decimal_mark` does."""
        return decimal_mark([cell for column in columns for cell in self.columns[column]])

    def refuse(self, wrong: np.ndarray, column: str, expected: str, way_out: str = "correct it") -> None:
        """Raise an error about the first wrong row (bool [n]) and its cell, if any row is wrong."""
        for row in np.flatnonzero(wrong)[:1]:
            cell = short(self.columns[column][row])
            raise ConclugenError(f"{self.where[row]}: {column} {cell}, expected {expected}; {way_out}")


def column_name(text: str) -> str:
    """Return a column's name without spaces around it, with composed accents; names with a fixed meaning in lower case."""
    name = unicodedata.normalize("NFC", text.strip())
    return name.lower() if name.lower() in ("id", "split", "group", "label") else name


def read_csv(path: Path) -> Table:
    """Read a csv file as programs and spreadsheets write it; its ``notes`` report what is not plain csv in UTF-8.

    The function skips blank lines, rows of empty cells, empty cells beyond the last name, and leading columns without a
    name, where pandas writes its index.
    """
    text, remark = decoded(read_whole(path, MOST_TEXT), path)
    separator, begin = _separator(text)
    reader = csv.reader(io.StringIO(text[begin:], newline=""), delimiter=separator, strict=True)
    rows, where, before, empty = [], [], 1 if begin else 0, 0
    try:
        header = list(map(column_name, next(filter(None, reader), [])))
        stop = max((i + 1 for i, name in enumerate(header) if name), default=0)
        start = next((i for i, name in enumerate(header[:stop]) if not NO_NAME.fullmatch(name)), 0)
        names = header[start:stop]
        if not names or "" in names or len(set(names)) < len(names):
            raise ConclugenError(f"{path}: its first line must name the columns, each once; it is {header}")
        for cells in filter(None, reader):
            if not "".join(cells).strip():
                empty += 1
                continue
            where.append(f"{path}, line {before + reader.line_num}")
            if len(cells) < stop or "".join(cells[stop:]).strip():
                extra = next(filter(None, map(str.strip, cells[stop:])), "")
                found = f"{len(cells)} cells, the header has {len(header)}"
                found = f"cell {extra[:100]!r} is in a column without name" if len(cells) == len(header) else found
                way_out = f"quote cells with {SEPARATORS.get(separator, separator)}"
                raise ConclugenError(f"{where[-1]}: {found}; {way_out}, or correct the first line")
            rows.append(cells[start:stop])
    except csv.Error as e:
        raise ConclugenError(f"{path}, line {before + reader.line_num}: not csv ({e}); correct the file") from e
    columns = zip(*rows, strict=True) if rows else [()] * len(names)
    remarks = (
        remark,
        separator != "," and f"cells are separated by {SEPARATORS.get(separator, repr(separator))}",
        start and "a first column without name is not used (call it id if it holds the ids)",
        empty and _skipped(empty, "row of empty cells", "rows of empty cells"),
        stop < len(header) and _skipped(len(header) - stop, "empty column", "empty columns"),
    )
    notes = [f"{path.name}: {each}" for each in remarks if each]
    return Table(path, dict(zip(names, columns, strict=True)), where, notes=notes)


def _skipped(n: int, one: str, several: str) -> str:
    return f"1 {one} is skipped" if n == 1 else f"{n:,} {several} are skipped"


def _separator(text: str) -> tuple[str, int]:
    """Return the separator that cuts the first line into most cells, and where that line starts.

    A preceding line ``sep=;``, which Excel understands, names the separator.
    """
    if said := re.match(r'"?sep=([^\w\s"]|\t)"?(?:\r\n?|\n)', text, re.IGNORECASE):
        return said[1], said.end()
    header = next(filter(str.strip, io.StringIO(text, newline="")), "")
    return max(SEPARATORS, key=header.count), 0


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
        classes=first.classes,
        notes=[note for table in tables for note in table.notes],
    )


def as_number(value: Any, mark: str = "") -> float:
    """Return the finite number that a text spells, else NaN; 1_0 is a name, although Python reads 10.

    Besides what Python reads these are understood: decimal commas, ``50%`` as 0.5, and groups of three digits (1,234.5;
    1.234,5; 1 234). ``mark``: the decimal mark, where it is known; else 1.234 has a decimal point, and 1,234 is NaN, as it
    may be two numbers.
    """
    try:
        number = math.nan if isinstance(value, str) and (mark == "," or "_" in value) else float(value)
    except (TypeError, ValueError):
        number = math.nan
    if isinstance(value, str) and math.isnan(number):
        readings = [_spelled(value, each) for each in mark or ".,"]
        number = next((x for x in readings if not math.isnan(x)), math.nan)
        number = math.nan if two_numbers(value) and not mark else number
    return number if math.isfinite(number) else math.nan


def _spelled(text: str, mark: str) -> float:
    """Return the number that a text spells with a decimal mark, NaN if it spells none."""
    text = text.strip().replace("\N{MINUS SIGN}", "-")
    per, text = (100, text[:-1].rstrip()) if text.endswith("%") else (1, text)
    text = text.translate(SWAPPED) if mark == "," else text
    text = re.sub(r"[^\d.+-]", "", text) if GROUPED.fullmatch(text) else text
    return float(text) / per if PLAIN.fullmatch(text) else math.nan


def two_numbers(text: str) -> bool:
    """Return whether a text spells one number with a decimal point and another one with a decimal comma."""
    dot, comma = (_spelled(text, mark) for mark in ".,")
    return "," in text and not math.isnan(dot) and not math.isnan(comma)


def decimal_mark(cells: Collection[str]) -> str:
    """Return the decimal mark, "." or ",", of all numbers that can be read with one of them only; "" if they differ."""
    if not any("," in cell or cell.count(".") > 1 for cell in cells):
        return ""
    spelled = ((math.isnan(_spelled(cell, ".")), math.isnan(_spelled(cell, ","))) for cell in set(cells))
    marks = {"," if no_dot else "." for no_dot, no_comma in spelled if no_dot != no_comma}
    return marks.pop() if len(marks) == 1 else ""


def number(value: Any, where: str, span: tuple[float, float] | None = None, mark: str = "") -> float:
    """Return the number that a text spells; it must be finite in float32 and, with ``span``, from one to another."""
    found = as_number(value, mark)
    low, high = span or (-MOST, MOST)
    if not low <= found <= high:  # also where it is NaN
        two = isinstance(value, str) and not mark and two_numbers(value)
        either = f", and this may be {_spelled(value, '.'):g} or {_spelled(value, ','):g}" if two else ""
        raise ConclugenError(f"{where} {short(value)}, expected {expected_number(span)}{either}; correct it")
    return found


def expected_number(span: tuple[float, float] | None) -> str:
    """Return what :func:`number` expects, in words."""
    return f"a number from {span[0]:g} to {span[1]:g}" if span else "a finite number of float32"


def short(value: Any) -> str:
    """Return a value for a message; only the type of an integer or a container (by YAML aliases) that may be huge."""
    if isinstance(value, str):
        return repr(value[:100])
    plain = value is None or isinstance(value, float) or (isinstance(value, int) and abs(value) < 2**63)
    return repr(value) if plain else f"a {type(value).__name__}"
