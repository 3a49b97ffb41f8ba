"""Where labels come from: a table in the file of the features, label files, or the names of the utterances."""

import dataclasses
import math
from collections.abc import Mapping, Sequence

import numpy as np

from conclugen_jax.data import row_splits
from conclugen_jax.data.cells import Table, as_number, column_name, number, read_csv, stack
from conclugen_jax.data.corpora import Corpus, dropped
from conclugen_jax.data.importers import csd
from conclugen_jax.data.requests import Found, Layout, Request
from conclugen_jax.data.sources import Annotations, Features, LabelSpec, by_split, split_name
from conclugen_jax.errors import ConclugenError


def annotate(request: Request, found: Found) -> Found:
    """Add the annotations of each split to what a format found, unless the format read them itself.

    The first of these counts: the table that the format found, ``request.labels``, ``labels.csv`` in the source, any csv
    file there (for a corpus only), the utterances' names.
    """
    corpus = request.corpus
    if found.columns is not None:
        return found
    if found.table is None:
        files = list(found.label_files or request.labels)
        if not files and request.source is not None and request.source.is_dir():
            beside = sorted(p for p in request.source.iterdir() if p.suffix.lower() == ".csv")
            files = [p for p in beside if p.name.lower() == "labels.csv"] or (beside if corpus is not None else [])
        if not files:
            return dataclasses.replace(found, columns=from_names(request, found.features), label=LabelSpec("none"))
        tables = [read_csv(path) for path in files]
        if request.dataset in csd.LABEL_COLUMNS and "start_time" in tables[0].columns:
            columns, outside = csd.read_labels(tables, request.dataset, drop=dropped(corpus, ""))
            columns = {split: dataclasses.replace(a, keys=a.ids) for split, a in columns.items()}
            facts = {**found.facts, "rows_outside_folds": outside}
            return dataclasses.replace(found, columns=columns, label_files=files, facts=facts)
        tables, found = list(map(row_splits.by_file_name, tables)), dataclasses.replace(found, label_files=files)
    else:
        tables = [found.table]
    default = "train" if corpus is None and "split" not in tables[0].columns else ""
    if corpus is None or not corpus.names_repeat:
        tables = row_splits.settled(tables, found.features, default)
    found = dataclasses.replace(found, table=stack(tables))
    if corpus is not None:
        return dataclasses.replace(found, columns=_of_corpus(corpus, found.table))
    columns, label, targets = _of_user(request.layout, found.table)
    return dataclasses.replace(found, columns=columns, label=label, targets=targets)


def from_names(request: Request, features: Mapping[str, Features]) -> dict[str, Annotations]:
    """Read annotations from the names of the utterances alone, which some corpora form so that they say enough."""
    corpus, where = request.corpus, request.dataset
    way_out = "add a labels.csv with columns id, split, group and labels"
    if corpus is not None and corpus.named is None:
        raise ConclugenError(f"{where}: no labels; {way_out}")
    names = row_splits.names_by_split(features)
    if "" in names and len(names) > 1:
        some = "some features lie in split folders or have ids such as train/ID, and some do not"
        raise ConclugenError(f"{where}: {some}; {way_out}")
    if corpus is not None and len(corpus.splits) < 2:
        if not names.keys() & {"train", ""}:
            some = f"features of {', '.join(names)} only"
            raise ConclugenError(f"{where}: {some}; put all files in train/, or use no split folders")
        names = {"train": names.get("train", names.get("", set()))}
    elif corpus is not None and "" in names:
        some = "nothing says which split an utterance is in"
        raise ConclugenError(f"{where}: {some}; use folders train, validation and test, or {way_out}")
    rows = [(split or "train", key) for split, keys in names.items() for key in sorted(keys)]
    ids = [key for _, key in rows]
    known = [(None, "") if corpus is None else corpus.named(key) for key in ids]
    if None in known:
        raise ConclugenError(f"{where}: {ids[known.index(None)]!r} is no name like {corpus.example}; rename it")
    labels, groups = zip(*known, strict=True) if known else ((), ())
    label = None if corpus is None or corpus.label.kind == "none" else np.array(labels, np.int64)
    return by_split(Annotations(ids, groups, label, {}, ids), [split for split, _ in rows])


def _of_user(layout: Layout, table: Table) -> tuple[dict[str, Annotations], LabelSpec, dict[str, LabelSpec]]:
    """Return the annotations in a user's table, and kind and names of its label and of each further target."""
    if not len(table):
        raise ConclugenError(f"{table.path}: no rows below the header")
    names = tuple(map(column_name, layout.label)) or (("label",) if "label" in table.columns else ())
    names = () if layout.kind == "none" else names
    further = tuple(map(column_name, layout.targets))
    table.require("id", *names, *further)
    label, values = _guessed(table, names, layout.kind, layout.classes)
    targets = {name: _guessed(table, (name,), optional=True) for name in further}
    specs = {name: spec for name, (spec, _) in targets.items()}
    for name in [n for spec in (label, *specs.values()) for n in spec.names]:
        if not name.isprintable():
            raise ConclugenError(f"{table.path}: class or label {name[:100]!r} cannot be printed; correct its name")
    ids, columns = table.stripped("id"), {name: column for name, (_, column) in targets.items()}
    rows = Annotations(ids, table.stripped("group"), values, columns, table.keys or ids)
    splits = table.columns.get("split", ["train"] * len(table))
    return by_split(rows, list(map(split_name, splits, table.where))), label, specs


def _of_corpus(corpus: Corpus, table: Table) -> dict[str, Annotations]:
    """Return the annotations in a table of a corpus, with classes by name (or index), one column per label, or a number.

    Columns: ``id``; ``split``; ``group`` or ``speaker``; ``label`` or ``emotion`` (single), the labels' names (multi),
    ``label`` or ``sentiment`` (value); further targets by name, unknown where a cell is empty. MELD's own csv files are
    understood as they are.
    """
    table = dataclasses.replace(table, columns={name.lower(): cells for name, cells in table.columns.items()})
    if "id" not in table.columns and {"dialogue_id", "utterance_id"} <= table.columns.keys():
        pairs = zip(table.stripped("dialogue_id"), table.stripped("utterance_id"), strict=True)
        table = table.having(id=[f"dia{dialogue}_utt{utterance}" for dialogue, utterance in pairs])
    table.require("id", why=", nor 'dialogue_id' and 'utterance_id'")
    table.require("split")
    splits = list(map(split_name, table.columns["split"], table.where))
    kept = [i for i, key in enumerate(table.stripped("id")) if key not in dropped(corpus, splits[i])]
    table, splits = table.rows(kept), [splits[i] for i in kept]
    spec, span, keys = corpus.label, corpus.ranges.get("label"), table.stripped("id")
    label = None
    if spec.kind == "multi":
        table.require(*spec.names, why=f", one of {', '.join(spec.names)}")
        values = [_column(table, name, LabelSpec("value"), span) for name in spec.names]
        label = (np.stack(values, axis=1) > 0).astype(np.float32)
    elif spec.kind != "none":
        column = next((name for name in ("label", "emotion", "sentiment") if name in table.columns), "label")
        table.require(column)
        label = _column(table, column, spec, span, corpus.label_names)
    rows = Annotations(
        [f"{split}_{key}" for split, key in zip(splits, keys, strict=True)] if corpus.names_repeat else keys,
        table.stripped("group" if "group" in table.columns else "speaker"),
        label,
        {
            name: _column(table, name, s, corpus.ranges.get(name), {}, optional=True)
            for name, s in corpus.targets.items()
        },
        table.keys or keys,
    )
    return by_split(rows, splits)


def _guessed(
    table: Table, columns: Sequence[str], kind: str = "", classes: tuple[str, ...] = (), *, optional: bool = False
) -> tuple[LabelSpec, np.ndarray | None]:
    """Return what a user's columns hold (none: nothing; several: 0 and 1 per label) and the value of each row.

    ``kind`` and ``classes`` are guessed where they are empty; an ``optional`` cell that is empty is unknown.
    """
    if not columns:
        return LabelSpec("none"), None
    if len(columns) > 1 or kind == "multi":
        values = [[as_number(cell) for cell in table.columns[column]] for column in columns]
        for column, bits in zip(columns, values, strict=True):
            table.refuse(np.isin(bits, (0, 1), invert=True), column, "0 or 1")
        return LabelSpec("multi", tuple(columns)), np.array(values, np.float32).T
    (column,) = columns
    found = set(_cells(table, column)) - {""}
    where = f"{table.path}: column {column!r}"
    if not found:
        raise ConclugenError(f"{where} is empty in every row; leave it out")
    guess = not kind and not classes
    others = {cell for cell in found if not (cell.isdecimal() and cell.isascii())}
    numbers = {cell for cell in others if not math.isnan(as_number(cell))}
    if kind == "value" or (guess and others and numbers == others):
        spec = LabelSpec("value")
    elif guess and numbers:  # a mistake, not classes
        mixed = f"numbers such as {min(numbers)!r} and {min(others - numbers)[:100]!r}, which is none"
        raise ConclugenError(f"{where} has {mixed}; correct it, or say what it is with --label_kind")
    elif classes or others:
        spec = LabelSpec("single", classes or tuple(sorted(found)))
    else:
        largest = max(found, key=lambda cell: (len(cell), cell))
        if len(largest) > 4:
            raise ConclugenError(f"{where} has class numbers up to {largest[:30]}; name the classes")
        spec = LabelSpec("single", tuple(map(str, range(int(largest) + 1))))
    return spec, _column(table, column, spec, optional=optional)


def _cells(table: Table, column: str) -> list[str]:
    """Return a column without spaces; what other programs write for an empty cell, nan, is empty."""
    return ["" if cell.lower() == "nan" else cell for cell in table.stripped(column)]


def _column(
    table: Table,
    column: str,
    spec: LabelSpec,
    span: tuple[float, float] | None = None,
    names: Mapping[str, int] | None = None,
    *,
    optional: bool = False,
) -> np.ndarray:
    """Return the numbers (float32 [n], NaN if unknown) or classes (int64 [n], -1 if unknown) of a column.

    A class goes by its name or, unless the classes' own names are numbers, by its number. Of a corpus, whose names are in
    lower case, ``names`` has further ones. An ``optional`` cell that is empty is unknown.
    """
    cells = _cells(table, column)
    if spec.kind == "value":
        rows = zip(cells, table.columns.get(column, cells), table.where, strict=True)
        numbers = [
            math.nan if optional and not cell else number(raw, f"{where}: {column}", span) for cell, raw, where in rows
        ]
        return np.array(numbers, np.float32)
    if names is not None:
        cells = [cell.lower() for cell in cells]
    index = {name: i for i, name in enumerate(spec.names)} | dict(names or {})
    by_number = not any(name.isdecimal() for name in index)
    found = {c: index.get(c, int(c) if by_number and c.isdecimal() and len(c) < 6 else -1) for c in set(cells)}
    classes = np.array([found[cell] for cell in cells], np.int64)
    wrong = (classes < 0) | (classes >= len(spec.names))
    if optional:
        wrong &= np.array([cell != "" for cell in cells], bool)
    table.refuse(wrong, column, f"one of the classes {', '.join(index)}")
    return classes
