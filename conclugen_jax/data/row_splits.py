"""Find the split of each row of a table; its cell, its file's name, its id and the folder of its features must agree."""

import dataclasses
import itertools
import re
from collections.abc import Mapping, Sequence

from conclugen_jax.data.cells import Table
from conclugen_jax.data.features import canonical
from conclugen_jax.data.label_columns import known
from conclugen_jax.data.sources import SPLIT_NAMES, SPLIT_WORDS, Features
from conclugen_jax.errors import ConclugenError


def names_by_split(features: Mapping[str, Features]) -> dict[str, set[str]]:
    """Return split -> names of vectors of any modality; ``""`` for those of which neither folder nor name says the split."""
    found: dict[str, set[str]] = {}
    for each in features.values():
        for split, names in each.names().items():
            for name in names:
                within, _, rest = name.partition("/")
                known = not split and rest and within in SPLIT_NAMES
                found.setdefault(within if known else split, set()).add(rest if known else name)
    return found


def by_file_name(table: Table) -> Table:
    """Add a column ``split`` where the name of a table's file says one; refuse a row that says another, and two in a name."""
    words = re.split(r"[^a-z]+", table.path.stem.lower())
    splits = sorted({SPLIT_NAMES[word] for word in words if word in SPLIT_NAMES})
    if "split" not in table.columns:
        if len(splits) > 1:
            raise ConclugenError(f"{table.path}: its name says {' and '.join(splits)}; add a column 'split'")
        notes = [f"{table.path.name}: all rows are of the split {each}, as the file's name says" for each in splits]
        table = dataclasses.replace(table, notes=[*table.notes, *notes])
        return table.having(split=splits * len(table)) if splits else table
    for where, cell in zip(table.where, table.stripped("split"), strict=True) if len(splits) == 1 else ():
        if named(cell) not in ("", splits[0]):
            fault = f"split {cell!r}, but the name of the file says {splits[0]}"
            raise ConclugenError(f"{where}: {fault}; correct the row, or rename the file")
    return table


def as_written(tables: Sequence[Table]) -> tuple[list[Table], list[str]]:
    """Return tables without the words for missing values in their column ``split``, and remarks on odd names of splits.

    Raises:
      ConclugenError: two names for one split, such as val and dev, since they may mean two splits.
    """
    tables = [table.having(split=known(table, "split")) if "split" in table.columns else table for table in tables]
    words: dict[str, str] = {}
    for table in tables:
        for where, cell in zip(table.where, table.stripped("split"), strict=True):
            split = SPLIT_NAMES.get(cell.lower(), cell.lower())
            word = cell.lower() if split in SPLIT_WORDS else cell
            if cell and words.setdefault(split, word) != word:
                fault = f"split {cell!r}, but {words[split]!r} in a row above means {split}, too"
                raise ConclugenError(f"{where}: {fault}; write one of them, or another name for a split of its own")
    known_ones = ", ".join(SPLIT_WORDS)
    own = [f"split {w!r} keeps its name; it is none of {known_ones}" for s, w in words.items() if s not in SPLIT_WORDS]
    doubtful = [f"split {w!r} is taken for test" for s, w in words.items() if s == "test" and w.startswith("eval")]
    return tables, own + doubtful


def settled(tables: Sequence[Table], features: Mapping[str, Features], default: str) -> list[Table]:
    """Fill the column ``split`` of tables from ids and folders; refuse a row that contradicts them.

    Args:
      tables: with a column ``id``, whose cells are the names of vectors.
      features: of each modality.
      default: split of rows without any other sign of it, in tables without the column; ``""`` for no default.

    Returns:
      The tables. A table without the column stays unchanged if some of its rows have no split.
    """
    names = names_by_split(features)
    pairs = [
        list(zip(map(canonical, table.stripped("id")), map(named, table.stripped("split")), strict=True))
        for table in tables
    ]
    claimed, filled = set(itertools.chain(*pairs)), []
    for table, rows in zip(tables, pairs, strict=True):
        missing = "" if "split" in table.columns else default
        cells = [
            _split_of(name, cell, where, names, claimed) or missing
            for (name, cell), where in zip(rows, table.where, strict=True)
        ]
        filled.append(table.having(split=cells) if "split" in table.columns or all(cells) else table)
    return filled


def _split_of(name: str, cell: str, where: str, names: Mapping[str, set[str]], claimed: set[tuple[str, str]]) -> str:
    """Return the split of a row, ``""`` if it is unknown; ignore files that belong to another row."""
    within, _, rest = name.partition("/")
    by_id = rest and within in SPLIT_NAMES
    said = {within} if by_id else {split for split, known in names.items() if split and name in known}
    if cell:
        other = sorted(split for split in said if (name, split) not in claimed)
        if other and cell not in said:
            why, way_out = ("name", "rename it") if by_id else ("folder", "move the file")
            fault = f"split {cell!r}, but {name!r} is in {other[0]!r} by its {why}"
            raise ConclugenError(f"{where}: {fault}; correct the row, or {way_out}")
        return cell
    if len(said) > 1:
        raise ConclugenError(f"{where}: {name!r} is in {' and '.join(sorted(said))}; add a column 'split'")
    if not said and name in names.get("", ()) and len(names) > 1:
        fault = f"{name!r} is in no folder of a split, as others are in {', '.join(sorted(names.keys() - {''}))}"
        raise ConclugenError(f"{where}: {fault}; move it, or add a column 'split'")
    return "".join(said)


def named(cell: str) -> str:
    """Return the split that a cell names."""
    return SPLIT_NAMES.get(cell.lower(), cell)
