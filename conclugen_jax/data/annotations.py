"""Labels, splits and groups as files and names hold them -> columns of each split."""

import dataclasses
import itertools
import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np

from conclugen_jax.data.cells import as_number, number, short
from conclugen_jax.data.corpora import Corpus, dropped
from conclugen_jax.data.sources import SPLIT_NAMES, Annotations, LabelSpec
from conclugen_jax.errors import ConclugenError

KEY = "\0key"
"""Entry of a row that holds the key of its features, where that is not its id; no column of a file is called so."""


class Columns:
    """Annotations of all splits while they are collected, row by row."""

    def __init__(self, label: LabelSpec, targets: Mapping[str, LabelSpec]):
        self.label, self.targets = label, targets
        self._rows: dict[str, tuple[list, list, list, list, dict[str, list]]] = {}

    def add(
        self,
        split: str,
        id: str,
        *,
        key: Any = None,
        group: str = "",
        label: Any = None,
        targets: Mapping[str, Any] | None = None,
    ) -> None:
        """One row; ``key`` is the id unless given."""
        ids, groups, labels, keys, others = self._rows.setdefault(
            split, ([], [], [], [], {t: [] for t in self.targets})
        )
        ids.append(id)
        groups.append(group)
        labels.append(label)
        keys.append(id if key is None else key)
        for name, column in others.items():
            column.append((targets or {}).get(name))

    def result(self) -> dict[str, Annotations]:
        """Columns of each split; train, validation and test come first, in that order."""
        known = list(dict.fromkeys(SPLIT_NAMES.values()))
        order = sorted(self._rows, key=lambda s: (known.index(s) if s in known else len(known), s))
        result = {}
        for split in order:
            ids, groups, labels, keys, others = self._rows[split]
            columns = {name: _array(self.targets[name], values) for name, values in others.items()}
            result[split] = Annotations(ids, groups, _array(self.label, labels), columns, keys)
        return result


def _array(spec: LabelSpec, values: Sequence[Any]) -> np.ndarray | None:
    """A column; unknown is -1 (single) or NaN (value)."""
    if spec.kind == "none":
        return None
    if spec.kind == "single":
        return np.array([-1 if v is None else v for v in values], np.int64)
    if spec.kind == "value":
        return np.array([np.nan if v is None else v for v in values], np.float32)
    return np.array(values, np.float32).reshape(len(values), len(spec.names))


@dataclasses.dataclass(frozen=True)
class Layout:
    """Which columns of a table mean what.

    Attributes:
      label: columns: none; one; or one of 0 and 1 per label.
      kind: of the label; guessed from the values if empty.
      classes: names in order; those found, sorted, if empty.
      targets: columns of further targets.
    """

    label: tuple[str, ...] = ()
    kind: str = ""
    classes: tuple[str, ...] = ()
    targets: tuple[str, ...] = ()


Rows = Iterable[tuple[str, Mapping[str, str]]]
"""Where each row stands, for messages, and its columns as text; iterated over more than once."""


def from_table(rows: Rows, layout: Layout, *, where: str) -> Columns:
    """Annotations from a table with columns ``id``, perhaps ``split`` (else all is ``train``) and ``group``, and labels.

    Args:
      rows: of the table, all with the columns of the first.
      layout: meaning of the columns.
      where: the table's file, for messages.

    Raises:
      ConclugenError: no rows, a column that is not there, or a cell that is no label or no name of a split.
    """
    names = [name for name in next(iter(rows), ("", {}))[1] if name != KEY]
    if not names:
        raise ConclugenError(f"{where}: no rows below the header")
    for column in ("id", *layout.label, *layout.targets):
        if column not in names:
            raise ConclugenError(f"{where}: no column {column!r}; it has {', '.join(names)}")
    label, read = _label_reader(rows, layout.label, layout.kind, layout.classes, where)
    targets = {name: _target_reader(rows, name, where) for name in layout.targets}
    for name in itertools.chain(label.names, *(spec.names for spec, _ in targets.values())):
        if not name.isprintable():
            raise ConclugenError(f"{where}: class or label {name[:100]!r} cannot be printed; mend its name")
    columns = Columns(label, {name: spec for name, (spec, _) in targets.items()})
    for line, row in rows:
        columns.add(
            split_name(row.get("split", "train"), line),
            row["id"].strip(),
            key=row.get(KEY),
            group=row.get("group", "").strip(),
            label=read(line, row),
            targets={name: reader(line, row) for name, (_, reader) in targets.items()},
        )
    return columns


def split_name(text: str, where: str) -> str:
    """The name that a split gets: train, validation, test, or its own.

    Raises:
      ConclugenError: a name that is not of letters, digits and underscores.
    """
    name = SPLIT_NAMES.get(text.strip().lower(), text.strip())
    if not name.replace("_", "a").isalnum() or not name.isascii() or name.lower() == "all":
        raise ConclugenError(
            f"{where}: split {text!r}; names are of letters, digits and '_', and 'all' means all of them"
        )
    return name


def _label_reader(rows: Rows, columns: Sequence[str], kind: str, classes: Sequence[str], where: str):
    """Kind and names of a label, and a function (line, row) -> label."""
    if not columns:
        return LabelSpec("none"), lambda line, row: None
    if len(columns) > 1 or kind == "multi":
        return LabelSpec("multi", tuple(columns)), lambda line, row: [_zero_or_one(line, row, c) for c in columns]
    (column,) = columns
    values = {_cell(row, column) for _, row in rows}
    if not values:
        raise ConclugenError(f"{where}: column {column!r} is empty in every row; leave it out")
    if kind == "value" or (not kind and not classes and _are_numbers(values) and not _are_indices(values)):
        return LabelSpec("value"), lambda line, row: number(row[column], f"{line}: {column}")
    if "" in values:
        line = next(line for line, row in rows if not _cell(row, column))
        raise ConclugenError(
            f"{line}: column {column!r} is empty or nan; give every row a label, or build without labels"
        )
    if not classes and not kind:
        _refuse_mixed(values, column, where)
    if not classes and _are_indices(values):
        largest = max(values, key=lambda v: (len(v), v))
        if len(largest) > 4:
            raise ConclugenError(f"{where}: column {column!r} has class numbers up to {largest[:30]}; name the classes")
        classes = [str(i) for i in range(int(largest) + 1)]
    names = tuple(classes) if classes else tuple(sorted(values))
    index = {name: i for i, name in enumerate(names)}

    def read(line: str, row: Mapping[str, str]) -> int:
        value = _cell(row, column)
        found = index.get(value, _by_number(value, names))
        if found is not None:
            return found
        raise ConclugenError(f"{line}: {column} {value[:100]!r} is none of the classes {', '.join(names)}")

    return LabelSpec("single", names), read


def _by_number(value: str, names: Sequence[str]) -> int | None:
    """The class that a number counts, unless the classes' own names are numbers."""
    counts = value.isdecimal() and len(value) < 6 and not any(name.isdecimal() for name in names)
    return int(value) if counts and int(value) < len(names) else None


def _refuse_mixed(values: Iterable[str], column: str, where: str) -> None:
    """Numbers among which one cell is none are a mistake, not classes."""
    rest = sorted(v for v in values if not _are_numbers([v]))
    broken = sorted(v for v in values if _are_numbers([v]) and not _are_indices([v]))
    if rest and broken:
        raise ConclugenError(
            f"{where}: column {column!r} has numbers such as {broken[0]!r} and {rest[0][:100]!r}, which is none; mend it, or "
            "say what it is with --label_kind"
        )


def _target_reader(rows: Rows, column: str, where: str):
    """Like :func:`_label_reader` for a further target, of which an empty cell is unknown."""

    class Known:
        def __iter__(self):
            return ((line, row) for line, row in rows if _cell(row, column))

    spec, read = _label_reader(Known(), (column,), "", (), where)
    return spec, lambda line, row: read(line, row) if _cell(row, column) else None


def _cell(row: Mapping[str, str], column: str) -> str:
    """A cell without spaces around it; what other programs write for an empty one, nan, is empty."""
    text = row[column].strip()
    return "" if text.lower() == "nan" else text


def _are_indices(values: Iterable[str]) -> bool:
    return all(v.isdecimal() and v.isascii() for v in values)


def _are_numbers(values: Iterable[str]) -> bool:
    return not any(math.isnan(as_number(v)) for v in values)


def _zero_or_one(line: str, row: Mapping[str, str], column: str) -> float:
    if as_number(row[column]) not in (0, 1):
        raise ConclugenError(f"{line}: {column} {short(row[column])}, expected 0 or 1")
    return as_number(row[column])


def corpus_table(corpus: Corpus, rows: Rows, *, where: str) -> Columns:
    """Annotations of a corpus from a table with its classes by name (or index), one column per label, or a number.

    Columns: ``id``; ``split``; ``group`` or ``speaker``; ``label`` or ``emotion`` (single), the labels' names (multi),
    ``label`` or ``sentiment`` (value); further targets by name, unknown where a cell is empty. MELD's own csv files are
    understood as they are.

    Raises:
      ConclugenError: a column that is not there, or a cell that is no label of the corpus or outside its range.
    """
    columns = Columns(corpus.label, corpus.targets)
    for line, row in rows:
        row = {key.lower(): value for key, value in row.items()}
        key, split = row.get("id"), row.get("split")
        if key is None and {"dialogue_id", "utterance_id"} <= row.keys():
            key = f"dia{row['dialogue_id'].strip()}_utt{row['utterance_id'].strip()}"
        if key is None or split is None:
            lacks = "'split'" if key is not None else "'id', nor 'dialogue_id' and 'utterance_id'"
            raise ConclugenError(f"{line}: no column {lacks}; the table has {', '.join(row)}")
        key = key.strip()
        split = split_name(split, line)
        if key in dropped(corpus, split):
            continue
        columns.add(
            split,
            f"{split}_{key}" if corpus.names_repeat else key,
            key=row.get(KEY, key),
            group=row.get("group", row.get("speaker", "")).strip(),
            label=_corpus_label(line, row, corpus, "label", ("label", "emotion", "sentiment")),
            targets={
                t: _corpus_label(line, row, corpus, t, (t,)) for t in corpus.targets if t in row and _cell(row, t)
            },
        )
    return columns


def _corpus_label(line: str, row: Mapping[str, str], corpus: Corpus, what: str, names: Sequence[str]) -> Any:
    """The label or a further target, from the first of the columns that is there."""
    spec, span = corpus.targets.get(what, corpus.label), corpus.ranges.get(what)
    if spec.kind == "none":
        return None
    if spec.kind == "multi":
        missing = next((n for n in spec.names if n not in row), None)
        if missing:
            raise ConclugenError(f"{line}: no column {missing!r}; expected one each for {', '.join(spec.names)}")
        return [float(number(row[n], f"{line}: {n}", span) > 0) for n in spec.names]
    column = next((n for n in names if n in row), None)
    if column is None:
        raise ConclugenError(f"{line}: no column {names[0]!r} for the label; the table has {', '.join(row)}")
    if spec.kind == "value":
        return number(row[column], f"{line}: {column}", span)
    value = row[column].strip()
    index = {n: i for i, n in enumerate(spec.names)} | (corpus.label_names if what == "label" else {})
    found = index.get(value.lower(), _by_number(value, spec.names))
    if found is not None:
        return found
    raise ConclugenError(f"{line}: {column} {value[:100]!r} is none of {', '.join(spec.names)}")


def from_names(corpus: Corpus, names: Mapping[str, Iterable[str]]) -> Columns:
    """Annotations from the utterances' names alone, by split, for a corpus whose names say enough.

    Raises:
      ConclugenError: a name that is not of the corpus' form.
    """
    columns = Columns(corpus.label, corpus.targets)
    for split, keys in names.items():
        for key in keys:
            known = corpus.named(key)
            columns.add(split, key, group=known.group, label=known.label)
    return columns


def by_group(annotations: Annotations, num_folds: int, fold: int, *, where: str) -> dict[str, Annotations]:
    """Cut one split into train, validation and test such that no group is in two of them.

    Groups are sorted and cut into ``num_folds`` runs of nearly equal length. Run ``fold`` is the test split, the one
    before (the last before the first) the validation split, the others the training split.

    Raises:
      ConclugenError: fewer than three folds, fewer groups than folds, or rows without group.
    """
    groups = sorted(set(annotations.groups))
    if 0 < len(groups) < num_folds and "" not in groups:
        way_out = f", or pass --num_folds={len(groups)} and --fold" if len(groups) >= 3 else ""
        raise ConclugenError(
            f"{where}: rows of {len(groups)} groups (people), too few for {num_folds} folds; take all of the corpus{way_out}"
        )
    if num_folds < 3 or not 0 <= fold < num_folds or len(groups) < num_folds or "" in groups:
        raise ConclugenError(
            f"{where}: fold {fold} of {num_folds} over {len(groups)} groups; there must be 3 folds at least, as many groups "
            "as folds, a group for every row, and folds count from 0"
        )
    runs = np.array_split(np.array(groups, dtype=object), num_folds)
    split_of = dict.fromkeys(groups, "train")
    split_of |= dict.fromkeys(runs[fold - 1], "validation")
    split_of |= dict.fromkeys(runs[fold], "test")
    splits = np.array([split_of[group] for group in annotations.groups], dtype=object)
    return {split: take(annotations, np.flatnonzero(splits == split)) for split in ("train", "validation", "test")}


def take(annotations: Annotations, rows: np.ndarray) -> Annotations:
    """Some rows of a split."""
    return Annotations(
        ids=[annotations.ids[i] for i in rows],
        groups=[annotations.groups[i] for i in rows],
        label=None if annotations.label is None else annotations.label[rows],
        targets={name: column[rows] for name, column in annotations.targets.items()},
        keys=[annotations.keys[i] for i in rows],
    )
