"""Find labels: in a table of the features' file, in label files, or in the names of the utterances."""

import dataclasses
from collections.abc import Mapping
from pathlib import Path

import numpy as np

from conclugen_jax.data import label_columns, row_splits
from conclugen_jax.data.cells import Table, column_name, read_csv, stack
from conclugen_jax.data.corpora import Corpus, dropped
from conclugen_jax.data.importers import csd, merbench
from conclugen_jax.data.requests import Found, Layout, Request
from conclugen_jax.data.sources import Annotations, Features, LabelSpec, by_split, split_name
from conclugen_jax.errors import ConclugenError


def annotate(request: Request, found: Found) -> Found:
    """Add the annotations of each split to what a format found, unless the format read them itself.

    The function uses the first of these that exists: the table that the format found, ``request.labels``, ``labels.csv`` in
    the source, any csv file there (for a corpus only), the utterances' names.
    """
    corpus = request.corpus
    if found.columns is not None:
        return found
    if found.table is None:
        files = list(found.label_files or request.labels)
        if not files and request.source is not None and request.source.is_dir():
            beside = sorted(p for p in request.source.iterdir() if p.suffix.lower() == ".csv")
            beside = [p for p in beside if p.stem not in found.features]
            files = [p for p in beside if p.name.lower() == "labels.csv"] or (beside if corpus is not None else [])
        if not files:
            return dataclasses.replace(found, columns=from_names(request, found.features), label=LabelSpec("none"))
        tables = [_read(path, corpus) for path in files]
        if request.dataset in csd.LABEL_COLUMNS and "start_time" in tables[0].columns:
            columns, outside = csd.read_labels(tables, request.dataset, drop=dropped(corpus, ""))
            columns = {split: dataclasses.replace(a, keys=a.ids) for split, a in columns.items()}
            notes = [note for table in tables for note in table.notes]
            facts = {**found.facts, "rows_outside_folds": outside, "notes": notes}
            return dataclasses.replace(found, columns=columns, label_files=files, facts=facts)
        tables, found = list(map(row_splits.by_file_name, tables)), dataclasses.replace(found, label_files=files)
    else:
        tables = [found.table]
    default = "train" if corpus is None and "split" not in tables[0].columns else ""
    tables, split_notes = row_splits.as_written(tables)
    if corpus is None:
        tables[0].require("id")
    if corpus is None or not corpus.names_repeat:
        tables = row_splits.settled(tables, found.features, default)
    found = dataclasses.replace(found, table=stack(tables))
    if corpus is not None:
        columns, label, targets, notes = _of_corpus(corpus, found.table), None, {}, []
    else:
        columns, label, targets, notes = _of_user(request.layout, found.table)
    facts = {**found.facts, "notes": [*found.facts.get("notes", []), *found.table.notes, *split_notes, *notes]}
    return dataclasses.replace(found, columns=columns, label=label, targets=targets, facts=facts)


def _read(path: Path, corpus: Corpus | None) -> Table:
    """Read a file of labels."""
    if path.suffix != ".npz":
        return read_csv(path)
    if corpus is not None:  # MERBench counts the classes in an order of its own
        raise ConclugenError(f"{path}: numbers of classes may differ from those of the corpus; use --dataset=features")
    return merbench.read_labels(path)


def from_names(request: Request, features: Mapping[str, Features]) -> dict[str, Annotations]:
    """Read annotations from the names of the utterances, for corpora whose names contain all labels."""
    corpus, where = request.corpus, request.dataset
    way_out = "add a labels.csv with columns id, split, group and labels"
    if corpus is not None and corpus.named is None:
        raise ConclugenError(f"{where}: no labels; {way_out}")
    names = row_splits.names_by_split(features)
    if "" in names and len(names) > 1:
        some = "some features are in split folders or have ids such as train/ID, and some do not"
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


def _of_user(layout: Layout, table: Table) -> tuple[dict[str, Annotations], LabelSpec, dict[str, LabelSpec], list[str]]:
    """Return the annotations in a user's table, kind and names of its label and of each further target, and remarks."""
    if not len(table):
        raise ConclugenError(f"{table.path}: no rows below the header")
    names = tuple(map(column_name, layout.label)) or (("label",) if "label" in table.columns else ())
    names = () if layout.kind == "none" else names
    further = dict(_target(text, table) for text in layout.targets)
    table.require("id", *names, *further)
    classes = tuple(map(label_columns.composed, layout.classes))
    if len(names) > 1 or (names and layout.kind == "multi"):
        label = label_columns.read_bits(table, names)
    elif names:
        way_out = "use --label_kind or --classes"
        label = label_columns.read_guessed(table, names[0], layout.kind, classes, way_out=way_out)
    else:
        label = label_columns.Column(LabelSpec("none"), None)
    targets = {
        name: label_columns.read_guessed(
            table, name, kind, (), way_out=f"use --targets={name}:value or {name}:single", optional=True
        )
        for name, kind in further.items()
    }
    for name in [n for each in (label, *targets.values()) for n in each.spec.names]:
        if not name.isprintable():
            raise ConclugenError(f"{table.path}: class or label {name[:100]!r} cannot be printed; correct its name")
    ids, groups = table.stripped("id"), label_columns.known(table, "group")
    values = {name: each.values for name, each in targets.items()}
    rows = Annotations(ids, groups, label.values, values, table.keys or ids)
    splits = table.columns.get("split", ["train"] * len(table))
    notes = label_columns.missing_words(table, "group", groups) + label_columns.alike_groups(groups)
    notes += [note for each in (label, *targets.values()) for note in each.notes]
    specs = {name: each.spec for name, each in targets.items()}
    return by_split(rows, list(map(split_name, splits, table.where))), label.spec, specs, notes


def _target(text: str, table: Table) -> tuple[str, str]:
    """Return column and kind of a further target, such as ``age:value``; the kind is empty where none is named."""
    name, _, kind = text.rpartition(":")
    named = kind in ("value", "single") and column_name(text) not in table.columns
    return (column_name(name), kind) if named else (column_name(text), "")


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
        values = [label_columns.read(table, name, LabelSpec("value"), span) for name in spec.names]
        label = (np.stack(values, axis=1) > 0).astype(np.float32)
    elif spec.kind != "none":
        column = next((name for name in ("label", "emotion", "sentiment") if name in table.columns), "label")
        table.require(column)
        label = label_columns.read(table, column, spec, span, corpus.label_names)
    rows = Annotations(
        [f"{split}_{key}" for split, key in zip(splits, keys, strict=True)] if corpus.names_repeat else keys,
        table.stripped("group" if "group" in table.columns else "speaker"),
        label,
        {
            name: label_columns.read(table, name, s, corpus.ranges.get(name), {}, optional=True)
            for name, s in corpus.targets.items()
        },
        table.keys or keys,
    )
    return by_split(rows, splits)
