"""Open a folder or file in any of the known layouts as a source.

The stages: check the request, recognise the format, open the features, read the annotations, cut folds, join.
"""

import dataclasses
import os
import time
from collections.abc import Mapping
from typing import Any

from conclugen_jax.data import annotations as annotations_lib
from conclugen_jax.data import labels, listed, tables
from conclugen_jax.data.annotations import Layout
from conclugen_jax.data.combined import VariantFeatures, all_from
from conclugen_jax.data.corpora import CORPORA
from conclugen_jax.data.files import entries
from conclugen_jax.data.folders import holds_npy
from conclugen_jax.data.importers import authors, corpus_csd
from conclugen_jax.data.index import canonical
from conclugen_jax.data.joined import JoinedSource
from conclugen_jax.data.pooling import POOLS
from conclugen_jax.data.requests import Found, Request, open_features
from conclugen_jax.data.sources import SPLIT_NAMES, Annotations, DatasetSpec, Features
from conclugen_jax.errors import ConclugenError

FORMATS = {
    "authors": authors.open_authors,
    "csd": corpus_csd.open_csd,
    "table": tables.open_table,
    "npz": tables.open_npz,
    "parquet": tables.open_parquet_table,
    "metadata": listed.open_metadata,
}
"""Name of each format -> what opens it."""

GENERIC = "features"
"""Name of the data set that its files alone describe."""

DEFAULT_FOLDS = (6, 5)
"""Of a corpus without splits of its own: RAVDESS with actors 1-16, 17-20 and 21-24."""

CLOCKS = 60.0
"""Seconds by which the clocks of this machine and of the disk may differ."""


def open_source(request: Request) -> JoinedSource:
    """Open the files that a user named.

    Raises:
      ConclugenError: an unknown data set or format, or files that are not what the format asks for.
    """
    now = time.time()
    source = _open(request)
    source.opened, changed = source.stamp()
    if changed > now - CLOCKS:  # perhaps during the opening: what is opened after the stamp cannot be older than it
        opened, source = source.opened, _open(request)
        source.opened = opened
    return source


def _open(request: Request) -> JoinedSource:
    _check(request)
    kind = recognise(request) if request.format == "auto" else request.format
    _check_format(request, kind)
    return assemble(request, FORMATS[kind](request), kind)


def _check(request: Request) -> None:
    """Refuse what is impossible whatever the files hold."""
    if request.dataset not in (*CORPORA, GENERIC):
        raise ConclugenError(f"data set {request.dataset!r} is unknown; there are {', '.join((*CORPORA, GENERIC))}")
    if request.pool not in POOLS:
        raise ConclugenError(f"pooling {request.pool!r} is unknown; there are {', '.join(POOLS)}")
    if request.source is None and not request.modalities:
        raise ConclugenError("no source; name a folder or file with --source, or modalities with --modality NAME=PATH")
    if request.source is not None and not os.path.exists(request.source):
        raise ConclugenError(f"{request.source}: no such file or folder; name the features with --source")
    if request.corpus is None and not request.name:
        raise ConclugenError("the data set needs a name of its own; give it with --name")
    if request.corpus is not None and request.layout != Layout():
        raise ConclugenError(
            f"--label, --classes and --targets are for --dataset=features; {request.dataset} has its own"
        )


def _check_format(request: Request, kind: str) -> None:
    """Refuse options that a format does not have."""
    if kind not in FORMATS:
        raise ConclugenError(f"format {kind!r} is unknown; there are auto, {', '.join(FORMATS)}")
    if request.labels and kind in ("authors", "metadata"):
        raise ConclugenError(
            f"format {kind!r} has its labels in files of its own; leave --labels out, or name --format=table"
        )
    if request.source is None and kind not in ("table", "csd"):
        raise ConclugenError(f"format {kind!r} is read from a source; name its file or folder with --source")
    if request.modalities and kind == "metadata":
        raise ConclugenError("format 'metadata' lists all files; add a column NAME_file_name instead of --modality")


def recognise(request: Request) -> str:
    """Return the name of a source's format.

    Raises:
      ConclugenError: none of the known ones, or a pickle.
    """
    source = request.source
    if source is None:
        return "csd" if any(".csd" in path for path in request.modalities.values()) else "table"
    if source.suffix in (".pkl", ".pickle"):
        raise ConclugenError(
            f"{source}: a pickle can execute code when it is read; convert it first: conclugen convert_mmsa --help"
        )
    if source.is_file():
        kind = {".npz": "npz", ".parquet": "parquet", ".csd": "csd"}.get(source.suffix)
        if kind is None:
            raise ConclugenError(f"{source}: not a format that is read (.npz, .parquet, .csd, or a folder)")
        return kind
    inside = {p.name: p for p in entries(source)}
    if "features" in inside and inside["features"].is_dir():
        return "authors"
    if any(name.endswith(".csd") for name in inside):
        return "csd"
    splits = [p for name, p in inside.items() if name.lower() in SPLIT_NAMES]
    if any((folder / "metadata.csv").is_file() for folder in (source, *splits)):
        return "metadata"
    if any(name.endswith(".parquet") for name in inside):
        return "parquet"
    if any(name.endswith(".npy") or holds_npy(p) for name, p in inside.items()) or request.modalities:
        return "table"
    if any(name.endswith((".pkl", ".pickle")) for name in inside):
        raise ConclugenError(f"{source}: holds pickles, which are not read; see conclugen convert_mmsa --help")
    raise ConclugenError(
        f"{source}: no known layout (it holds {', '.join(sorted(inside)[:5]) or 'nothing'}); docs/datasets/features.md shows "
        "the one to use, --format names one"
    )


def assemble(request: Request, found: Found, kind: str) -> JoinedSource:
    """Join features and annotations: those of the format, of the files that the user named, or of the names.

    Args:
      request: of the user.
      found: features, and what the format knows of labels.
      kind: name of the format.

    Raises:
      ConclugenError: labels that cannot be read or do not fit.
    """
    features = _chosen(request, found, kind)
    found = labels.annotate(request, dataclasses.replace(found, features=features))
    if not found.columns:
        raise ConclugenError(
            f"{request.source or request.dataset}: no examples; the labels name none, or all are left out"
        )
    if not features:
        raise ConclugenError(
            f"{request.source}: no features found in format {kind!r}; name them with --modality NAME=PATH"
        )
    if request.corpus is not None and request.corpus.names_repeat:
        for modality, each in features.items():
            _refuse_shared_names(modality, each, found.columns)
    columns, folds = _folds(request, found)
    facts = _facts(request, found, kind, folds)
    if folds:
        (stored,) = found.columns
        features = {m: all_from(f, stored) for m, f in features.items()}
    spec = _spec(request, found, features, tuple(columns), folds)  # by_split() puts train first
    return JoinedSource(spec, columns, features, label_files=found.label_files, facts=facts, identity=found.identity)


def _chosen(request: Request, found: Found, kind: str) -> dict[str, Features]:
    """Return the features to build: those of the format and those that the user named, in the order asked for."""
    features = dict(found.features)
    if kind != "csd":  # which opens those that are named itself
        features |= {m: open_features(path, request.pool) for m, path in request.modalities.items()}
    for modality in request.only:
        if modality not in features:
            raise ConclugenError(f"no modality {modality!r}; there are {', '.join(features) or 'none'}")
    return {m: features[m] for m in request.only or features}


def _facts(request: Request, found: Found, kind: str, folds: tuple[int, int] | None) -> dict[str, Any]:
    """Return where the examples come from, for the manifest."""
    return {
        "dataset": request.dataset,
        "format": kind,
        "path": os.fspath(request.source.absolute()) if request.source else "",
        "modalities": dict(request.modalities),
        "pool": request.pool,
        "folds": list(folds) if folds else None,
        "unused": {m: n for m, f in found.features.items() if (n := _unused(f, found.columns))},
        "layout": dataclasses.asdict(request.layout),
        "label_files": [path.name for path in found.label_files],
        "passed_over": _passed_over(request, found),
        **found.facts,
    }


def _refuse_shared_names(modality: str, features: Features, columns: Mapping[str, Annotations]) -> None:
    """Refuse a vector without split that would be taken for several utterances, where names repeat across splits."""
    names = set(features.names().get("", ()))
    seen: dict[str, str] = {}
    for split, annotations in columns.items():
        for key in map(canonical, annotations.keys if names else ()):
            if key in names and f"{split}/{key}" not in names:
                if key in seen:
                    raise ConclugenError(
                        f"modality {modality!r}: {key!r} is an utterance of {seen[key]!r} and another one of {split!r}; put "
                        f"the split in front of the id, {split}/{key}, or the files into folders train, validation, test"
                    )
                seen[key] = split


def _unused(features: Features, columns: Mapping[str, Annotations]) -> int:
    """Return the number of vectors that no row of the annotations asks for."""
    found = features.names()
    if not found:
        return 0
    keys = {split: set(map(canonical, a.keys)) for split, a in columns.items()}
    every = set().union(*keys.values())
    count = 0
    for split, names in found.items():
        asked = keys.get(split, set()) if split else every | {f"{s}/{key}" for s, some in keys.items() for key in some}
        count += sum(name not in asked for name in names)
    return count


def _passed_over(request: Request, found: Found) -> list[str]:
    """Return what is next to the features and is neither a label file nor named as a modality."""
    used = {path.name for path in found.label_files}
    for path in request.modalities.values():
        used |= {os.path.basename(path), os.path.basename(path.rpartition(":")[0])}
    return sorted(name.encode(errors="backslashreplace").decode() for name in set(found.passed_over) - used)


def _folds(request: Request, found: Found) -> tuple[Mapping[str, Annotations], tuple[int, int] | None]:
    """Return the annotations in their final splits, and the folds that made these."""
    corpus, folds = request.corpus, request.folds
    if folds is None and corpus is not None and not corpus.splits:
        folds = DEFAULT_FOLDS
    if folds is None:
        return found.columns, None
    if len(found.columns) > 1:
        raise ConclugenError(
            f"the data have splits ({', '.join(found.columns)}) already; leave --num_folds and --fold out"
        )
    (annotations,) = found.columns.values()
    return annotations_lib.by_group(annotations, *folds, where=request.name or request.dataset), folds


def _spec(request: Request, found: Found, features, splits, folds) -> DatasetSpec:
    corpus, name = request.corpus, request.name or request.dataset
    if folds and request.folds:
        name += f"_fold{folds[1]}of{folds[0]}"
    return DatasetSpec(
        name=name,
        version=request.version,
        description=corpus.description if corpus else f"Features of {request.name}.",
        licence=corpus.licence if corpus else "not stated",
        modalities={m: f.dim for m, f in features.items()},
        label=corpus.label if corpus else found.label,
        splits=splits,
        targets=corpus.targets if corpus else found.targets,
        variants={m: len(f.variants) for m, f in features.items() if isinstance(f, VariantFeatures)},
        shared_groups=corpus is not None and corpus.shared_groups,
    )
