"""Read labels, splits and groups from tables and from the names of utterances."""

import dataclasses
import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np

from conclugen_jax.data.annotations import Layout, array, by_split, split_name
from conclugen_jax.data.cells import Table, as_number, number, short
from conclugen_jax.data.corpora import Corpus, dropped
from conclugen_jax.data.sources import Annotations, LabelSpec
from conclugen_jax.errors import ConclugenError

# Tables of users


def from_table(table: Table, layout: Layout) -> tuple[dict[str, Annotations], LabelSpec, dict[str, LabelSpec]]:
    """Read a table with columns ``id``, perhaps ``split`` (all is ``train`` without it) and ``group``, and labels.

    Returns:
      split -> annotations; kind and names of the label; those of each further target.

    Raises:
      ConclugenError: no rows, a missing column, or a cell that is no label or no name of a split.
    """
    if not len(table):
        raise ConclugenError(f"{table.path}: no rows below the header")
    for column in ("id", *layout.label, *layout.targets):
        if column not in table.columns:
            raise ConclugenError(f"{table.path}: no column {column!r}; it has {', '.join(table.names)}")
    label, values = _labels(table, layout)
    targets, found = {}, {}
    for name in layout.targets:
        known = [i for i, cell in enumerate(_cells(table, name)) if cell]
        targets[name], values_of_known = _labels(table.take(known), Layout(label=(name,)))
        found[name] = _with_unknown(targets[name], values_of_known, known, len(table))
    for name in [n for spec in (label, *targets.values()) for n in spec.names]:
        if not name.isprintable():
            raise ConclugenError(f"{table.path}: class or label {name[:100]!r} cannot be printed; correct its name")
    ids = table.stripped("id")
    rows = Annotations(ids, table.stripped("group"), array(label, values), found, table.keys or ids)
    splits = table.columns.get("split", ["train"] * len(table))
    return by_split(rows, list(map(split_name, splits, table.where))), label, targets


def _labels(table: Table, layout: Layout) -> tuple[LabelSpec, list[Any]]:
    """Return kind and names of the label, and its value in each row."""
    if not layout.label:
        return LabelSpec("none"), []
    if len(layout.label) > 1 or layout.kind == "multi":
        columns = [_zeros_and_ones(table, column) for column in layout.label]
        return LabelSpec("multi", layout.label), list(zip(*columns, strict=True))
    (column,) = layout.label
    cells = _cells(table, column)
    values, guess = set(cells), not layout.kind and not layout.classes
    if not values:
        raise ConclugenError(f"{table.path}: column {column!r} is empty in every row; leave it out")
    if layout.kind == "value" or (guess and _are_numbers(values) and not _are_indices(values)):
        return LabelSpec("value"), _numbers(table, column)
    if "" in values:
        raise ConclugenError(
            f"{table.where[cells.index('')]}: column {column!r} is empty or nan; give every row a label, or build "
            "without labels"
        )
    if guess:
        _refuse_mixed(values, column, table)
    names = layout.classes or _class_names(values, column, table)
    return LabelSpec("single", names), _indices(table, column, cells, {name: i for i, name in enumerate(names)})


def _class_names(values: set[str], column: str, table: Table) -> tuple[str, ...]:
    if not _are_indices(values):
        return tuple(sorted(values))
    largest = max(values, key=lambda v: (len(v), v))
    if len(largest) > 4:
        raise ConclugenError(
            f"{table.path}: column {column!r} has class numbers up to {largest[:30]}; name the classes"
        )
    return tuple(map(str, range(int(largest) + 1)))


def _refuse_mixed(values: Iterable[str], column: str, table: Table) -> None:
    """Refuse numbers among which one cell is none: a mistake, not classes."""
    rest = sorted(v for v in values if not _are_numbers([v]))
    broken = sorted(v for v in values if _are_numbers([v]) and not _are_indices([v]))
    if rest and broken:
        raise ConclugenError(
            f"{table.path}: column {column!r} has numbers such as {broken[0]!r} and {rest[0][:100]!r}, which is none; correct "
            "it, or say what it is with --label_kind"
        )


def _with_unknown(spec: LabelSpec, values: Sequence[Any], rows: Sequence[int], num_rows: int) -> np.ndarray | None:
    """Return a column of which only some rows are known."""
    known = dict(zip(rows, values, strict=True))
    return array(spec, [known.get(i) for i in range(num_rows)])


def _cells(table: Table, column: str) -> list[str]:
    """Return a column without spaces; what other programs write for an empty cell, nan, is empty."""
    return ["" if cell.lower() == "nan" else cell for cell in table.stripped(column)]


def _indices(table: Table, column: str, cells: Sequence[str], index: Mapping[str, int]) -> list[int]:
    """Return the class of each cell: by its name or, unless the classes' own names are numbers, by its number."""
    count = 0 if any(name.isdecimal() for name in index) else 1 + max(index.values())
    result = []
    for where, cell in zip(table.where, cells, strict=True):
        found = index.get(cell)
        if found is None and cell.isdecimal() and len(cell) < 6 and int(cell) < count:
            found = int(cell)
        if found is None:
            raise ConclugenError(f"{where}: {column} {cell[:100]!r} is none of the classes {', '.join(index)}")
        result.append(found)
    return result


def _are_indices(values: Iterable[str]) -> bool:
    return all(v.isdecimal() and v.isascii() for v in values)


def _are_numbers(values: Iterable[str]) -> bool:
    return not any(math.isnan(as_number(v)) for v in values)


def _numbers(table: Table, column: str, span: tuple[float, float] | None = None) -> list[float]:
    pairs = zip(table.where, table.columns[column], strict=True)
    return [number(cell, f"{where}: {column}", span) for where, cell in pairs]


def _zeros_and_ones(table: Table, column: str) -> list[float]:
    for where, cell in zip(table.where, table.columns[column], strict=True):
        if as_number(cell) not in (0, 1):
            raise ConclugenError(f"{where}: {column} {short(cell)}, expected 0 or 1")
    return list(map(as_number, table.columns[column]))


# Published corpora


def corpus_table(corpus: Corpus, table: Table) -> dict[str, Annotations]:
    """Read a table of a corpus, with its classes by name (or index), one column per label, or a number.

    Columns: ``id``; ``split``; ``group`` or ``speaker``; ``label`` or ``emotion`` (single), the labels' names (multi),
    ``label`` or ``sentiment`` (value); further targets by name, unknown where a cell is empty. MELD's own csv files are
    understood as they are.

    Raises:
      ConclugenError: a missing column, or a cell that is no label of the corpus or outside its range.
    """
    if not len(table):
        return {}
    columns = {name.lower(): cells for name, cells in table.columns.items()}
    if "id" not in columns and {"dialogue_id", "utterance_id"} <= columns.keys():
        pairs = zip(columns["dialogue_id"], columns["utterance_id"], strict=True)
        columns["id"] = [f"dia{dialogue.strip()}_utt{utterance.strip()}" for dialogue, utterance in pairs]
    for needed, words in (("id", "'id', nor 'dialogue_id' and 'utterance_id'"), ("split", "'split'")):
        if needed not in columns:
            raise ConclugenError(f"{table.where[0]}: no column {words}; the table has {', '.join(columns)}")
    table = dataclasses.replace(table, columns=columns)
    splits = list(map(split_name, columns["split"], table.where))
    kept = [i for i, key in enumerate(table.stripped("id")) if key not in dropped(corpus, splits[i])]
    table, splits = table.take(kept), [splits[i] for i in kept]
    keys = table.stripped("id")
    rows = Annotations(
        [f"{split}_{key}" for split, key in zip(splits, keys, strict=True)] if corpus.names_repeat else keys,
        table.stripped("group" if "group" in columns else "speaker"),
        array(corpus.label, _corpus_label(table, corpus)),
        {name: _corpus_target(table, corpus, name) for name in corpus.targets},
        table.keys or keys,
    )
    return by_split(rows, splits)


def _corpus_label(table: Table, corpus: Corpus) -> list[Any]:
    spec, span = corpus.label, corpus.ranges.get("label")
    if spec.kind == "none":
        return []
    if spec.kind == "multi":
        missing = next((n for n in spec.names if n not in table.columns), None)
        if missing:
            raise ConclugenError(f"{table.path}: no column {missing!r}; expected one each for {', '.join(spec.names)}")
        columns = [_numbers(table, name, span) for name in spec.names]
        return [[float(x > 0) for x in row] for row in zip(*columns, strict=True)]
    column = next((n for n in ("label", "emotion", "sentiment") if n in table.columns), None)
    if column is None:
        raise ConclugenError(f"{table.path}: no column 'label' for the label; the table has {', '.join(table.names)}")
    return _corpus_values(table, column, spec, span, corpus.label_names)


def _corpus_target(table: Table, corpus: Corpus, name: str) -> np.ndarray | None:
    known = [i for i, cell in enumerate(_cells(table, name)) if cell] if name in table.columns else []
    spec = corpus.targets[name]
    values = _corpus_values(table.take(known), name, spec, corpus.ranges.get(name), {}) if known else []
    return _with_unknown(spec, values, known, len(table))


def _corpus_values(
    table: Table, column: str, spec: LabelSpec, span: tuple[float, float] | None, others: Mapping[str, int]
) -> list[Any]:
    """Return the numbers of a column or, of a ``single`` label, the classes; ``others`` are further names of classes."""
    if spec.kind == "value":
        return _numbers(table, column, span)
    index = {name: i for i, name in enumerate(spec.names)} | others
    return _indices(table, column, [cell.lower() for cell in table.stripped(column)], index)


def from_names(corpus: Corpus, names: Mapping[str, Iterable[str]]) -> dict[str, Annotations]:
    """Read the utterances' names, by split, of a corpus whose names say enough.

    Raises:
      ConclugenError: a name that is not of the corpus' form.
    """
    rows = [(split, key, corpus.named(key)) for split, keys in names.items() for key in keys]
    ids = [key for _, key, _ in rows]
    label = array(corpus.label, [known.label for _, _, known in rows])
    annotations = Annotations(ids, [known.group for _, _, known in rows], label, {}, ids)
    return by_split(annotations, [split for split, _, _ in rows])
