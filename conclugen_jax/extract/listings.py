"""Read labels from a folder of clips: from ``metadata.csv``, from folders for each class, or from the names of files."""

import dataclasses
import itertools
import re
from collections.abc import Sequence
from pathlib import Path

from conclugen_jax.data import label_columns, tables
from conclugen_jax.data.cells import Table, column_name
from conclugen_jax.data.files import entries
from conclugen_jax.data.requests import Found, Request
from conclugen_jax.data.sources import SPLIT_NAMES
from conclugen_jax.errors import ConclugenError
from conclugen_jax.extract import companions
from conclugen_jax.extract.clips import media_files, split_and_parts
from conclugen_jax.extract.utterance import Utterance

TABLES = (".xlsx", ".xls", ".ods", ".tsv", ".json", ".jsonl", ".parquet")
"""Endings of tables in which labels may be, and which are read only if ``--labels`` names them, or not at all."""

PERSON = "group", "person", "actor", "speaker", "subject"  # names in a pattern, one of which is the group


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
    note = f"not listed in metadata.csv and skipped: {_such_as(others)}"
    return dataclasses.replace(found, facts={"notes": [note]})


def classes(request: Request, utterances: Sequence[Utterance]) -> tuple[Request, Found]:
    """Use the names of folders as classes if each clip is in one folder, of two or more, below the source or a split.

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


def by_pattern(request: Request, utterances: Sequence[Utterance], pattern: str) -> tuple[Request, Found]:
    """Read columns from the names of clips, such as ``{actor}_{emotion}_{take}`` or ``{emotion}/{person}-{take}``.

    The rest of a pattern is compared as it is, with the name of a clip without ending and, for each ``/``, with a folder
    more. The label is what the request names, else ``label`` or ``emotion``; the group is one of :data:`PERSON`; ``split`` is
    the split. Clips whose names do not match, or match in several ways, are skipped and counted.

    Returns:
      The request with the column of the label, and a table of the clips that fit.

    Raises:
      ConclugenError: a pattern that cannot be read, or one that fits no clip.
    """
    fault = f"--label_pattern={pattern!r}"
    names, short, long = _compiled(pattern, fault)
    persons = [name for name in names if name.lower() in PERSON]
    if len(persons) > 1:
        raise ConclugenError(f"{fault}: {' and '.join(persons)} both name the person; rename one")
    fitting, values, others, doubtful = [], [], {}, {}
    for u in utterances:
        parts = Path(u.path).relative_to(request.source).with_suffix("").parts[-pattern.count("/") - 1 :]
        name = label_columns.composed("/".join(parts))
        found = [expression.fullmatch(name) for expression in (short, long)]
        if None in found or found[0].groups() != found[1].groups():
            (others if None in found else doubtful)[u.path] = name
        else:
            fitting.append(u)
            values.append(found[0].groups())
    left_out = [(others, "do not fit it"), (doubtful, "fit it in several ways")]
    left_out = [f"names that {why}: {_such_as([*those.values()])}" for those, why in left_out if those]
    if not fitting:
        raise ConclugenError(f"{fault} fits no clip; {'; '.join(left_out)}; correct it")
    columns = {"id": [u.key for u in fitting], "split": [u.split or "train" for u in fitting]}
    columns |= {name: list(cells) for name, cells in zip(names, zip(*values, strict=True), strict=True)}
    if persons:
        columns["group"] = columns[persons[0]]
    layout, emotions = request.layout, [name for name in names if name.lower() == "emotion"]
    if emotions and "label" not in names and not layout.label and layout.kind != "none":
        layout = dataclasses.replace(layout, label=(emotions[0],))
    unused = [name for name in ("labels.csv", "metadata.csv") if (request.source / name).exists()]
    notes = [f"labels: names of clips as {pattern}", *(f"skipped, {each}" for each in left_out)]
    notes += [f"{name}: not read, as --label_pattern says the labels" for name in unused]
    found = Found({}, table=Table(request.source, columns, [u.path for u in fitting]))
    found = dataclasses.replace(found, facts={"label_pattern": pattern, "notes": notes})
    return dataclasses.replace(request, layout=layout, labels=()), found


def _compiled(pattern: str, fault: str) -> tuple[list[str], re.Pattern[str], re.Pattern[str]]:
    """Return the names in the braces of a pattern, and expressions that give the first values few or many characters.

    A text that both read in the same way has no third reading.
    """
    texts = re.split(r"\{([^{}]*)\}", label_columns.composed(pattern))
    names, texts = list(map(column_name, texts[1::2])), texts[::2]
    if not names or {"{", "}"} & set("".join(texts)):
        raise ConclugenError(f"{fault}: expected names in pairs of braces, such as {{actor}}_{{emotion}}_{{take}}")
    for i, name in enumerate(names):
        if not name.isidentifier() or name == "id":
            expected = "another name, as the id is the clip's path" if name == "id" else "letters, digits and _"
            raise ConclugenError(f"{fault}: {{{name}}} is in braces, expected {expected}")
        if name in names[:i]:
            raise ConclugenError(f"{fault}: {{{name}}} is there twice; give each part a name of its own")
        if i and not texts[i]:
            raise ConclugenError(f"{fault}: nothing stands between {{{names[i - 1]}}} and {{{name}}}; make them one")
    short, long = (value.join(map(re.escape, texts)) for value in ("([^/]+?)", "([^/]+)"))
    return names, re.compile(short), re.compile(long)


def _such_as(names: Sequence[str]) -> str:
    return f"{len(names):,} clip{'s' * (len(names) > 1)}, such as {names[0]}"


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
