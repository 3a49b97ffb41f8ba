"""Read columns of labels: missing values, numbers, or classes whose names may be spelled in several ways."""

import dataclasses
import math
import re
import unicodedata
from collections import Counter
from collections.abc import Collection, Iterable, Mapping, Sequence

import numpy as np

from conclugen_jax.data.cells import (
    MISSING,
    PLAIN,
    Table,
    as_number,
    decimal_mark,
    expected_number,
    number,
    two_numbers,
)
from conclugen_jax.data.sources import LabelSpec
from conclugen_jax.errors import ConclugenError

FEW = 10  # different whole numbers, some of them negative, that are classes; more of them are a number to predict
WHOLE = re.compile(r"[+\N{MINUS SIGN}-]?\d+([.,]\d+)*", re.ASCII)
SHOWN = 8  # classes or words that a remark lists
BITS = {"true": 1.0, "false": 0.0}  # as Python, R and JSON write them, in any case


@dataclasses.dataclass(frozen=True)
class Column:
    """A column of labels that was read."""

    spec: LabelSpec
    values: np.ndarray  # int64 [n] (single), float32 [n] (value), float32 [n, labels] (multi)
    notes: Sequence[str] = ()  # what was decided


def read_bits(table: Table, columns: Sequence[str]) -> Column:
    """Read columns of 0 and 1, or True and False, one for each label."""
    values = [[BITS.get(cell.lower(), as_number(cell)) for cell in table.stripped(column)] for column in columns]
    for column, bits in zip(columns, values, strict=True):
        table.refuse(np.isin(bits, (0, 1), invert=True), column, "0 or 1")
    return Column(LabelSpec("multi", tuple(columns)), np.array(values, np.float32).T)


def read_guessed(
    table: Table, column: str, kind: str, classes: tuple[str, ...], *, way_out: str, optional: bool = False
) -> Column:
    """Read a column of numbers or classes; guess which from its cells if ``kind`` and ``classes`` are empty.

    ``way_out`` names the flags that override the guess. In an ``optional`` column a missing value is unknown.
    """
    where = f"{table.path}: column {column!r}"
    named = () if kind == "value" else tuple(composed(name) for name in table.classes.get(column, ()))
    stored, classes = bool(named and not classes), classes or named
    cells = known(table, column, classes)
    found = Counter(filter(None, cells))
    if not found:
        raise ConclugenError(f"{where} is empty in every row; leave it out")
    spec, why = (LabelSpec("single", classes), "") if classes else _guessed(found, kind, where, way_out)
    why = f"as {table.path.name} names them" if stored else f"since its cells are {why}" if why and not kind else ""
    n = len(spec.names)
    what = f"{n} class{'es' * (n > 1)} ({_listed(spec.names)})" if n else "a number to predict"
    notes = [f"{column}: {what}, {why}; {way_out} to change that"] if why else []
    notes += missing_words(table, column, cells)
    if spec.kind == "single":
        notes += [f"{column}: {joined}" for joined in _joined(found, spec.names)]
    return Column(spec, read(table, column, spec, optional=optional), notes)


def _guessed(found: Counter[str], kind: str, where: str, way_out: str) -> tuple[LabelSpec, str]:
    """Return the kind and classes of cells, from the number of times that each was found, and the reason in words."""
    mark = decimal_mark(found)
    if kind == "value":
        return LabelSpec("value"), ""
    if None not in (numbers := {cell: whole(cell, mark) for cell in found}).values():
        return _of_whole(found, numbers, kind, where)
    others = {cell for cell in found if not (cell.isdecimal() and cell.isascii())}
    if not others:
        raise ConclugenError(f"{where} has class numbers up to {max(found, key=len)[:30]}; name the classes")
    real = {cell for cell in others if not math.isnan(as_number(cell, mark))}
    if not kind and real == others:
        example = min(real, key=lambda cell: (bool(PLAIN.fullmatch(cell)), numbers[cell] is not None, cell))
        read_as = "" if PLAIN.fullmatch(example) else f" (read as {as_number(example, mark):g})"
        return LabelSpec("value"), f"numbers such as {example!r}{read_as}"
    if not kind and (either := [cell for cell in others - real if two_numbers(cell)]):
        fault = f"{min(either)!r}, which may be one of two numbers"
        raise ConclugenError(f"{where} has {fault}; write it without comma, or {way_out}")
    if not kind and real:  # a mistake, not classes
        mixed = f"numbers such as {min(real)!r} and {min(others - real)[:100]!r}, which is none"
        raise ConclugenError(f"{where} has {mixed}; correct it, or {way_out} to say what it is")
    groups: dict[str, list[str]] = {}
    for cell in found:
        groups.setdefault(folded(cell), []).append(cell)
    names = sorted(max(cells, key=found.__getitem__) for cells in groups.values())  # the first of the most frequent
    if real == others:
        names.sort(key=lambda cell: as_number(cell, mark))
    return LabelSpec("single", tuple(names)), "words"


def _of_whole(found: Counter[str], numbers: Mapping[str, int], kind: str, where: str) -> tuple[LabelSpec, str]:
    """Return the kind of cells that are all whole numbers: class numbers, codes such as 01, or numbers to predict."""
    values, why = sorted(set(numbers.values())), f"whole numbers such as {max(found, key=len)[:30]!r}"
    if values[0] < 0:
        if len(values) > FEW and not kind:
            return LabelSpec("value"), f"{why}, {len(values)} different ones and some below 0"
        return LabelSpec("single", tuple(map(str, values))), why
    codes = [cell for cell in found if len(cell) > 1 and cell.startswith("0") and cell.isdecimal()]
    if codes:
        names = (max((cell for cell in found if numbers[cell] == n), key=found.__getitem__) for n in values)
        return LabelSpec("single", tuple(names)), f"codes such as {codes[0]!r}"
    if values[-1] >= 10**4:
        raise ConclugenError(f"{where} has class numbers up to {str(values[-1])[:30]}; name the classes")
    return LabelSpec("single", tuple(map(str, range(values[-1] + 1)))), why


def _joined(found: Counter[str], names: Sequence[str]) -> list[str]:
    """Return a sentence on cells that spell the name of their class differently, if there are any."""
    classes = _index(found, names)
    spelled = [(cell, names[i]) for cell, i in classes.items() if i >= 0 and cell != names[i]]
    alike = [
        f"{cell!r} ({_rows(found[cell])}) as {name!r}"
        for cell, name in spelled
        if folded(cell) == folded(name) or (cell.isdecimal() and name.isdecimal())
    ]
    return [f"{_listed(alike)}, as names that differ in case or blanks only are one class"] if alike else []


def _listed(items: Collection[str]) -> str:
    """Return a list in words, cut off where it is long."""
    shown = list(items)[:SHOWN]
    return ", ".join(shown) + (f" and {len(items) - SHOWN:,} more" if len(items) > SHOWN else "")


def _rows(n: int) -> str:
    return f"{n:,} row{'s' * (n > 1)}"


def known(table: Table, column: str, classes: Iterable[str] = ()) -> list[str]:
    """Return the cells of a column without blanks around them; a word for a missing value that is no class is empty."""
    names = set(map(folded, classes))
    return ["" if cell in MISSING and folded(cell) not in names else cell for cell in table.stripped(column)]


def missing_words(table: Table, column: str, cells: Sequence[str]) -> list[str]:
    """Return a sentence on words that :func:`known` takes for missing values, if any; ``cells`` is what it returned."""
    words = Counter(raw for raw, cell in zip(table.stripped(column), cells, strict=True) if raw and not cell)
    each = [f"{word!r} ({_rows(n)})" for word, n in words.items()]
    return [f"{column}: {_listed(each)} read as missing"] if each else []


def alike_groups(groups: Collection[str]) -> list[str]:
    """Return a sentence on groups whose names differ in case or blanks only, if there are any; they stay as they are."""
    spelled: dict[str, list[str]] = {}
    for group in dict.fromkeys(groups):
        spelled.setdefault(folded(group), []).append(group)
    alike = [" and ".join(map(repr, names)) for names in spelled.values() if len(names) > 1]
    return [f"group: {_listed(alike)} count as different groups; write a group in one way"] if alike else []


def read(
    table: Table,
    column: str,
    spec: LabelSpec,
    span: tuple[float, float] | None = None,
    others: Mapping[str, int] | None = None,
    *,
    optional: bool = False,
) -> np.ndarray:
    """Return the numbers (float32 [n], NaN if unknown) or classes (int64 [n], -1 if unknown) of a column.

    Numbers must be within ``span``. ``others`` are further names of classes. In an ``optional`` column a missing value is
    unknown.
    """
    cells, others = known(table, column, spec.names), others or {}
    missing = np.array([cell == "" for cell in cells], bool)
    single, mark = spec.kind == "single", decimal_mark(cells)
    expected = f"one of the classes {', '.join([*spec.names, *others])}" if single else expected_number(span)
    if not optional:
        lacking = f"{expected}, and it is missing in {_rows(int(missing.sum()))}"
        way_out = "fill it in or leave the row out" + (
            "; a class of this name must stand in --classes" if single else ""
        )
        table.refuse(missing, column, lacking, way_out)
    if not single:
        rows = zip(cells, table.columns.get(column, cells), table.where, strict=True)
        values = [number(raw, f"{where}: {column}", span, mark) if cell else math.nan for cell, raw, where in rows]
        return np.array(values, np.float32)
    index = _index(set(cells), spec.names, others, mark)
    classes = np.array([index[cell] for cell in cells], np.int64)
    table.refuse((classes < 0) & ~missing, column, expected)
    return classes


def _index(
    cells: Collection[str], names: Sequence[str], others: Mapping[str, int] | None = None, mark: str = ""
) -> dict[str, int]:
    """Return the class of each cell, -1 for none: by name, by a name that differs in case or blanks, or by number.

    Numbers are those in the names of the classes or, if there are none, count the classes from 0.
    """
    exact = {name: i for i, name in enumerate(names)} | dict(others or {})
    alike = {folded(name): i for name, i in reversed(exact.items())}
    numbered = {n: i for i, name in enumerate(names) if (n := whole(name)) is not None} or {
        i: i for i in range(len(names))
    }
    return {cell: exact.get(cell, alike.get(folded(cell), numbered.get(whole(cell, mark), -1))) for cell in cells}


def folded(name: str) -> str:
    """Return a name without differences of case, blanks and composition of accents, for comparison."""
    return " ".join(composed(name).casefold().split())


def composed(name: str) -> str:
    """Return a name whose accents are composed with their letters, as all names are compared and stored."""
    return unicodedata.normalize("NFC", name)


def whole(cell: str, mark: str = "") -> int | None:
    """Return the whole number that a cell spells, such as 1 for 1, 01 and 1.0; ``mark`` as of :func:`as_number`."""
    found = as_number(cell, mark) if WHOLE.fullmatch(cell) else math.nan
    return int(found) if found.is_integer() else None
