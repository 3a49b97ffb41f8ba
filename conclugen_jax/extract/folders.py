"""A folder of clips: its utterances, and where their labels are."""

import itertools
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

from conclugen_jax.data import formats
from conclugen_jax.data.requests import Found, Request
from conclugen_jax.errors import ConclugenError
from conclugen_jax.extract import clips, companions, listings
from conclugen_jax.extract.utterance import Utterance

GENERIC = "clips"  # name of the data set that its folder and labels alone describe


class Folder(NamedTuple):
    """What :func:`extraction.extract` takes of a folder of clips."""

    request: Request
    utterances: list[Utterance]
    known: Found | None  # labels that the layout of the clips holds; ``None``: the request says where labels are


def read(
    source: Path,
    dataset: str = GENERIC,
    *,
    name: str = "",
    labels: Sequence[Path] = (),
    pattern: str = "",
    cut: bool = False,
    **described: Any,
) -> Folder:
    """Find the clips of a folder and their labels.

    Labels are in tables that are named, in the names of the files (``pattern``, see :func:`listings.by_pattern`), in
    ``metadata.csv``, in ``labels.csv``, or in the names of the folders; the first of these that exists is used.

    Args:
      source: folder.
      dataset: ``clips``, or a corpus.
      name: of the data set that is built.
      labels: tables.
      pattern: such as ``{actor}_{emotion}_{take}``.
      cut: make an utterance of each line of the subtitles.
      **described: further attributes of the :class:`Request`.

    Raises:
      ConclugenError: no clips, or labels that cannot be read.
    """
    own, column = dataset == GENERIC, described["layout"].label if "layout" in described else ()
    if pattern and (labels or not own):
        fact = "--labels says the labels" if own else f"--label_pattern is for --dataset={GENERIC}"
        raise ConclugenError(f"--label_pattern={pattern}: {fact}; leave one of them out")
    known = listings.metadata(source) if own and not labels and not pattern else None
    tables = () if known or pattern else tuple(labels) or _beside(source)
    if own and column and not tables and not known and not pattern:
        raise ConclugenError(f"--label={column[0]}: no labels.csv in {source}; name the table with --labels")
    request = Request(formats.GENERIC if own else dataset, source, name=name, labels=tables, **described)
    found = clips.find(dataset, source, labels=tables, listing=known.table if known else None, cut=cut)
    if known is not None:
        known = listings.unlisted(known, source, found)
    elif pattern:
        request, known = listings.by_pattern(request, found, pattern)
    elif own and not tables:
        request, known = listings.classes(request, found)
        known = listings.unread(known, source)
    return Folder(request, found, known)


def _beside(source: Path) -> tuple[Path, ...]:
    """Label files in the folder of the clips, without the tables of single clips, which begin with their names."""
    single = set(itertools.chain.from_iterable(companions.by_clip(source).values()))
    tables = sorted(p for p in source.glob("*.csv") if p.is_file() and p not in single)
    return tuple([p for p in tables if p.name.lower() == "labels.csv"] or tables)
