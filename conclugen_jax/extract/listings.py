"""Labels that a folder of clips holds as on Hugging Face: in ``metadata.csv``, or as a folder for each class."""

import dataclasses
import itertools
from collections.abc import Sequence
from pathlib import Path

from conclugen_jax.data import label_columns, tables
from conclugen_jax.data.cells import Table
from conclugen_jax.data.files import entries
from conclugen_jax.data.requests import Found, Request
from conclugen_jax.data.sources import SPLIT_NAMES
from conclugen_jax.errors import ConclugenError
from conclugen_jax.extract import companions
from conclugen_jax.extract.clips import media_files, split_and_parts
from conclugen_jax.extract.utterance import Utterance

TABLES = (".xlsx", ".xls", ".ods", ".tsv", ".json", ".jsonl", ".parquet")
"""Endings of tables in which labels may be, and which are read only if ``--labels`` names them, or not at all."""


def metadata(source: Path) -> Found | None:
    """Read ``metadata.csv`` in a folder of clips, or in its folders of splits; ``None`` where there is none.

    Its column ``file_name`` lists clips; an ``id`` is their path within the split without ending, with '_' for '/', unless a
    column says it. The keys of the table are paths relative to ``source``.
    """
    splits = [p for p in entries(source) if p.name.lower() in SPLIT_NAMES] if source.is_dir() else []
    if not (folders := tables.metadata_folders(source, splits)):
        others = (folder / f"metadata.{ending}" for folder in (source, *splits) for ending in ("jsonl", "parquet"))
        if (other := next((path for path in others if path.is_file()), None)) and not (source / "labels.csv").exists():
            raise ConclugenError(f"{other}: only metadata.csv is read; write it so, or name other labels with --labels")
        return None
    table, modalities, files = tables.read_metadata(source, folders, name="_".join)
    if len(modalities) > 1:
        raise ConclugenError(
            f"{table.path}: lists {len(modalities)} files a row; clips take one, in a column file_name"
        )
    return Found({}, table=table, label_files=files)


def unlisted(found: Found, source: Path, utterances: Sequence[Utterance]) -> Found:
    """Add a note on the clips that ``metadata.csv`` does not list."""
    used = {path for u in utterances for path in (u.path, u.sound)}
    others = [str(path.relative_to(source)) for path in media_files(source) if str(path) not in used]
    if not others:
        return found
    number = f"{len(others):,} clip{'s' * (len(others) > 1)}, such as {others[0]}"
    return dataclasses.replace(found, facts={"notes": [f"not listed in metadata.csv and left out: {number}"]})


def classes(request: Request, utterances: Sequence[Utterance]) -> tuple[Request, Found]:
    """Take the names of folders for classes where each clip lies in one, two or more of them, below the source or a split.

    Return what was found, with a request that has these classes; else both without labels.
    """
    where = [split_and_parts(request.source, Path(u.path).with_suffix("")) for u in utterances]
    names = {label_columns.folded(name): name for name in sorted({parts[0] for _, parts in where}, reverse=True)}
    names = sorted(names.values())  # joy in one split may be Joy in another
    if any(len(parts) != 2 for _, parts in where) or len(names) < 2 or request.layout.kind == "none":
        return request, Found({})
    columns = {
        "id": [u.key for u in utterances],
        "split": [u.split or "train" for u in utterances],
        "label": [parts[0] for _, parts in where],
    }
    layout = request.layout
    layout = dataclasses.replace(layout, kind=layout.kind or "single", classes=layout.classes or tuple(names))
    note = f"labels: the names of the folders ({', '.join(names)}); --label_kind=none leaves them out"
    found = Found({}, table=Table(request.source, columns, [u.path for u in utterances]), facts={"notes": [note]})
    return dataclasses.replace(request, layout=layout), found


def unread(found: Found, source: Path) -> Found:
    """Add a note on tables in a folder of clips that are not read, without those of single clips."""
    single = {*itertools.chain.from_iterable(companions.by_clip(source).values())}
    names = [p.name for p in entries(source) if p.suffix.lower() in TABLES and p.is_file() and p not in single]
    if not names:
        return found
    note = (
        f"found beside the clips and not used: {', '.join(names)}; labels are read from labels.csv or --labels=FILE.csv"
    )
    return dataclasses.replace(found, facts={"notes": [*found.facts.get("notes", []), note]})
