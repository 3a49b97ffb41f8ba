"""Where labels come from: a table in the file of the features, label files, or the names of the utterances."""

import dataclasses
import re
from collections.abc import Mapping, Sequence
from pathlib import Path

from conclugen_jax.data import label_columns
from conclugen_jax.data.annotations import by_split
from conclugen_jax.data.cells import Table, check_columns, column_name, read_csv, stack
from conclugen_jax.data.corpora import dropped
from conclugen_jax.data.importers import csd
from conclugen_jax.data.requests import Found, Request
from conclugen_jax.data.sources import SPLIT_NAMES, Annotations, Features, LabelSpec
from conclugen_jax.errors import ConclugenError


def annotate(request: Request, found: Found) -> Found:
    """Add the annotations of each split to what a format found, unless the format read them itself.

    The first of these counts: the table that the format found, ``request.labels``, ``labels.csv`` in the source, any csv
    file there (for a corpus only), the utterances' names.

    Raises:
      ConclugenError: a faulty table, or names that do not say enough.
    """
    if found.columns is not None:
        return found
    if found.table is not None:
        return _from_table(request, found, found.table)
    files = list(found.label_files) or _label_files(request)
    if files:
        found = dataclasses.replace(found, label_files=files)
        tables = [read_csv(path) for path in files]
        if request.dataset in csd.LABEL_COLUMNS and "start_time" in tables[0].columns:
            columns, outside = csd.read_label_tables(tables, request.dataset, drop=dropped(request.corpus, ""))
            by_id = {split: dataclasses.replace(a, keys=a.ids) for split, a in columns.items()}
            return dataclasses.replace(found, columns=by_id, facts={**found.facts, "rows_outside_folds": outside})
        check_columns(tables)
        default = "train" if request.corpus is None else ""
        return _from_table(request, found, stack([_with_split(table, default) for table in tables]))
    if request.corpus is not None:
        return dataclasses.replace(found, columns=from_names(request, found.features))
    rows = [(split or "train", name) for split, names in union(found.features).items() for name in names]
    ids = [name for _, name in rows]
    unlabelled = Annotations(ids, [""] * len(ids), None, {}, ids)
    columns = by_split(unlabelled, [split for split, _ in rows])
    return dataclasses.replace(found, columns=columns, label=LabelSpec("none"))


def _label_files(request: Request) -> list[Path]:
    if request.labels or request.source is None or not request.source.is_dir():
        return list(request.labels)
    beside = sorted(p for p in request.source.iterdir() if p.suffix.lower() == ".csv" and p.is_file())
    return [p for p in beside if p.name.lower() == "labels.csv"] or (beside if request.corpus is not None else [])


def _with_split(table: Table, default: str) -> Table:
    """Add a column ``split`` to a table without one: what the file's name says, else the default, if there is one."""
    words = re.split(r"[^a-z]+", table.path.stem.lower())
    splits = sorted({SPLIT_NAMES[word] for word in words if word in SPLIT_NAMES})
    if "split" in table.columns or not (splits or default):
        return table
    if len(splits) > 1:
        raise ConclugenError(
            f"{table.path}: its name says {' and '.join(splits)}; add a column 'split' that says it of each row"
        )
    return dataclasses.replace(table, columns={**table.columns, "split": (splits or [default]) * len(table)})


def _from_table(request: Request, found: Found, table: Table) -> Found:
    if request.corpus is not None:
        return dataclasses.replace(found, columns=label_columns.corpus_table(request.corpus, table))
    asked = request.layout
    label = tuple(map(column_name, asked.label)) or (("label",) if "label" in table.columns else ())
    layout = dataclasses.replace(asked, label=label, targets=tuple(map(column_name, asked.targets)))
    columns, spec, targets = label_columns.from_table(table, layout)
    return dataclasses.replace(found, columns=columns, label=spec, targets=targets)


def from_names(request: Request, features: Mapping[str, Features]) -> dict[str, Annotations]:
    """Read annotations from the names of the utterances alone.

    Raises:
      ConclugenError: the corpus' names say nothing, or nothing says which split they are in.
    """
    corpus = request.corpus
    if corpus.named is None:
        raise ConclugenError(
            f"{request.dataset}: no labels; add a labels.csv with columns id, split, group and the labels"
        )
    names = union(features)
    if len(corpus.splits) < 2:
        if not names.keys() & {"train", ""}:
            raise ConclugenError(
                f"{request.dataset}: features of {', '.join(names)} only; put all files in train/, or use no split folders"
            )
        names = {"train": names.get("train", names.get("", []))}
    elif "" in names:
        raise ConclugenError(
            f"{request.dataset}: nothing says which split an utterance is in; use folders train, validation and test, or a "
            "labels.csv with columns id, split and label"
        )
    return label_columns.from_names(corpus, names)


def union(features: Mapping[str, Features]) -> dict[str, Sequence[str]]:
    """Return split -> names that at least one modality has, sorted; ``SPLIT/KEY`` is the name ``KEY`` of that split.

    Raises:
      ConclugenError: some names say which split they are of, and some do not.
    """
    names: dict[str, set[str]] = {}
    for each in features.values():
        for split, keys in each.names().items():
            for key in keys:
                within, slash, rest = key.partition("/")
                known = not split and slash and within in SPLIT_NAMES
                names.setdefault(within if known else split, set()).add(rest if known else key)
    if "" in names and len(names) > 1:
        raise ConclugenError(
            "some features lie in split folders or have ids such as train/ID, and some do not; add a labels.csv that says "
            "who is where"
        )
    return {split: sorted(keys) for split, keys in names.items()}
