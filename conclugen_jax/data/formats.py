"""Open a folder or file in any of the known layouts as a source.

The stages: check the request, recognise the format, open the features, read the annotations, cut folds, join.
"""

import dataclasses
import functools
import os
import time
from pathlib import Path
from typing import Any

from conclugen_jax.data import labels, manifest as manifest_lib, matching, tables, wide
from conclugen_jax.data.column_features import ColumnFeatures
from conclugen_jax.data.corpora import CORPORA, Corpus
from conclugen_jax.data.features import POOLS, Combined, FolderFeatures, MatrixFeatures, holds_npy, holds_tables
from conclugen_jax.data.files import entries
from conclugen_jax.data.importers import authors, built, csd
from conclugen_jax.data.joined import JoinedSource
from conclugen_jax.data.parquet import ParquetFeatures, parquet_kinds, read_columns
from conclugen_jax.data.requests import Found, Layout, Request
from conclugen_jax.data.sources import SPLIT_NAMES, DatasetSpec, Features, LabelSpec, by_example, by_group
from conclugen_jax.errors import ConclugenError

FORMATS = {  # name -> what opens it
    "authors": authors.open_authors,
    "csd": csd.open_csd,
    "table": tables.open_table,
    "npz": tables.open_npz,
    "parquet": tables.open_parquet_table,
    "columns": tables.open_columns,
    "metadata": tables.open_metadata,
    "built": built.open_built,
}
GENERIC = "features"  # name of the data set that its files alone describe
DEFAULT_FOLDS = (6, 5)  # of a corpus without splits of its own: RAVDESS with actors 1-16, 17-20 and 21-24
CLOCKS = 60.0  # seconds by which the clocks of this machine and of the disk may differ


def open_source(request: Request) -> JoinedSource:
    """Open the files that a user named; ConclugenError says how they differ from the format."""
    now = time.time()
    source = _open(request)
    source.opened, changed = source.stamp()
    if changed > now - CLOCKS:  # perhaps during the opening: what is opened after the stamp cannot be older than it
        opened, source = source.opened, _open(request)
        source.opened = opened
    return source


def _open(request: Request) -> JoinedSource:
    source, kind = request.source, request.format
    for what, name, known in (
        ("data set", request.dataset, (*CORPORA, GENERIC)),
        ("pooling", request.pool, POOLS),
        ("format", kind, ("auto", *FORMATS)),
    ):
        if name not in known:
            raise ConclugenError(f"{what} {name!r} is unknown; there are {', '.join(known)}")
    if source is None and not request.modalities:
        raise ConclugenError("no source; name a folder or file with --source, or modalities with --modality NAME=PATH")
    if source is not None and not os.path.exists(source):
        raise ConclugenError(f"{source}: no such file or folder; name the features with --source")
    if request.corpus is None and not request.name:
        raise ConclugenError("the data set needs a name of its own; give it with --name")
    if request.corpus is not None and request.layout != Layout():
        raise ConclugenError(f"--label, --classes and --targets are for --dataset={GENERIC} alone; leave them out")
    kind = recognise(request) if kind == "auto" else kind
    if request.labels and kind in ("authors", "metadata"):
        raise ConclugenError(f"format {kind!r} has its labels in files of its own; leave --labels out")
    if source is None and kind not in ("table", "csd"):
        raise ConclugenError(f"format {kind!r} is read from a source; name its file or folder with --source")
    if request.modalities and kind == "metadata":
        raise ConclugenError("format 'metadata' lists all files; add a column NAME_file_name instead of --modality")
    return assemble(request, FORMATS[kind](request), kind)


def recognise(request: Request) -> str:
    """Return the name of a source's format."""
    source = request.source
    if source is None:
        return "csd" if any(".csd" in path for path in request.modalities.values()) else "table"
    if source.suffix in (".pkl", ".pickle"):
        raise ConclugenError(f"{source}: a pickle can execute code; convert it first: conclugen convert_mmsa --help")
    if source.is_file():
        if source.suffix not in (".npz", ".parquet", ".csd", *wide.ENDINGS):
            raise ConclugenError(
                f"{source}: not a format that is read (.npz, .parquet, .csv, .arff, .csd, or a folder)"
            )
        return "columns" if source.suffix in wide.ENDINGS else source.suffix.removeprefix(".")
    inside = {p.name: p for p in entries(source)}
    if manifest_lib.FILE in inside:
        return "built"
    splits = [p for name, p in inside.items() if name.lower() in SPLIT_NAMES]
    endings = {p.suffix for p in inside.values()}
    if "features" in inside and inside["features"].is_dir():
        return "table" if tables.is_merbench(source) else "authors"
    if ".csd" in endings:
        return "csd"
    if any((folder / "metadata.csv").is_file() for folder in (source, *splits)):
        return "metadata"
    if ".parquet" in endings:
        return "parquet"
    paths = inside.values()
    if (
        ".npy" in endings
        or request.modalities
        or any(holds_npy(p) or tables.is_table(p) or holds_tables(p) for p in paths)
    ):
        return "table"
    if endings & {".pkl", ".pickle"}:
        raise ConclugenError(f"{source}: holds pickles, which are not read; see conclugen convert_mmsa --help")
    held = ", ".join(sorted(inside)[:5]) or "nothing"
    way_out = "docs/reference/datasets/features.md shows the one to use, --format names one"
    raise ConclugenError(f"{source}: no known layout (it holds {held}); {way_out}")


def open_features(path: str, pool: str) -> Features:
    """Open the features of one modality from a path as users write it.

    It is a folder of npy files or tables; ``FILE.npy`` with ``FILE.txt``; ``FILE.npz:ARRAY``; ``FILE.parquet:COLUMN``; or a
    table with a column per feature, ``FILE.csv``, ``FILE.arff`` or ``FILE.parquet``.
    """
    place, _, key = (path, "", "") if os.path.exists(path) else path.rpartition(":")  # names, too, may hold colons
    if not os.path.exists(place):
        raise ConclugenError(f"{path}: no such file or folder; give --modality NAME=PATH once for each modality")
    if key and (os.path.isdir(place) or place.endswith(".npy")):
        raise ConclugenError(f"{path}: {place} has no part {key!r}; name it alone")
    place, key = Path(place), key or "features"
    if place.is_dir():
        return FolderFeatures(place, how=pool)
    if place.suffix == ".npy":
        return MatrixFeatures(place, how=pool)
    if place.suffix == ".npz":
        return MatrixFeatures(place, how=pool, key=key)
    if place.suffix == ".parquet":
        if key == "features" and "vectors" not in parquet_kinds(place).values():
            return ColumnFeatures(place, how=pool, load=read_columns)
        return ParquetFeatures(place, how=pool, column=key)
    if place.suffix in wide.ENDINGS:
        return ColumnFeatures(place, how=pool)
    expected = "a folder, FILE.npy, FILE.csv, FILE.arff, FILE.npz:ARRAY or FILE.parquet:COLUMN"
    raise ConclugenError(f"{path}: expected {expected}")


def assemble(request: Request, found: Found, kind: str) -> JoinedSource:
    """Join features and annotations: those of the format ``kind``, of files that the user named, or of the names."""
    named = request.modalities if kind != "csd" else {}  # csd opens those that are named itself
    openers = {m: f for m, f in found.features.items() if m not in named}
    openers |= {m: functools.partial(open_features, path, request.pool) for m, path in named.items()}
    for modality in request.only:
        if modality not in openers:
            raise ConclugenError(f"no modality {modality!r}; there are {', '.join(openers) or 'none'}")
    features = {m: openers[m]() if callable(openers[m]) else openers[m] for m in request.only or openers}
    found = labels.annotate(request, dataclasses.replace(found, features=features))
    where, corpus, columns, folds = request.source or request.dataset, request.corpus, found.columns, request.folds
    if not columns:
        raise ConclugenError(f"{where}: no examples; the labels name none, or all are dropped")
    if not features:
        raise ConclugenError(f"{where}: no features found in format {kind!r}; name them with --modality NAME=PATH")
    if corpus is not None and corpus.names_repeat:
        for modality, each in features.items():
            matching.refuse_shared_names(modality, each, columns)
    if corpus is not None and not corpus.splits:
        folds = folds or DEFAULT_FOLDS
    facts = _facts(request, found, kind, folds)
    if folds and len(columns) > 1:
        raise ConclugenError(f"the data have splits ({', '.join(columns)}) already; leave --num_folds and --fold out")
    if folds:
        ((stored, annotations),) = columns.items()
        cut = by_example if request.fold_by == "example" else by_group
        how = {"seed": request.fold_seed, "validation": request.fold_validation}
        columns = cut(annotations, *folds, where=request.name or request.dataset, **how)
        pieces = {m: f.variants if isinstance(f, Combined) else [[f]] for m, f in features.items()}
        features = {m: Combined(variants, stored=stored) for m, variants in pieces.items()}
    name = request.name or request.dataset
    if request.folds:
        name += f"_fold{request.folds[1]}of{request.folds[0]}" + f"_seed{request.fold_seed}" * bool(request.fold_seed)
    label = found.label or LabelSpec("none")
    corpus = corpus or Corpus(f"Features of {request.name}.", "not stated", label, found.targets)
    spec = DatasetSpec(
        name=name,
        version=request.version,
        description=corpus.description,
        licence=corpus.licence,
        modalities={m: f.dim for m, f in features.items()},
        label=corpus.label,
        splits=tuple(columns),  # by_split() puts train first
        targets=corpus.targets,
        variants={m: len(f.variants) for m, f in features.items() if isinstance(f, Combined) and len(f.variants) > 1},
        shared_groups=corpus.shared_groups,
    )
    return JoinedSource(spec, columns, features, sorted(found.label_files), facts, found.identity, found.beside)


def _facts(request: Request, found: Found, kind: str, folds: tuple[int, int] | None) -> dict[str, Any]:
    """Return where the examples come from, for the manifest."""
    used = {path.name for path in found.label_files}
    for path in request.modalities.values():
        used |= {os.path.basename(path), os.path.basename(path.rpartition(":")[0])}
    compared = {m: matching.compare(features, found.columns) for m, features in found.features.items()}
    remarks = {
        m: remark for m, (_, remark) in compared.items() if remark and kind != "clips"
    }  # extraction says it itself
    notes = [f"{m}: {note}" for m, features in found.features.items() for note in getattr(features, "notes", ())]
    return {
        "dataset": request.dataset,
        "format": kind,
        "path": os.fspath(request.source.absolute()) if request.source else "",
        "modalities": dict(request.modalities),
        "pool": request.pool,
        "folds": list(folds) if folds else None,
        **({"fold_by": request.fold_by} if folds and request.fold_by != "group" else {}),
        **({"fold_seed": request.fold_seed} if folds and request.fold_seed else {}),
        **({"fold_validation": False} if folds and not request.fold_validation else {}),
        "unused": {m: n for m, (n, _) in compared.items() if n},
        "alike": remarks,
        "layout": dataclasses.asdict(request.layout),
        "label_files": [path.name for path in found.label_files],
        "passed_over": sorted(n.encode(errors="backslashreplace").decode() for n in {*found.passed_over} - used),
        **found.facts,
        "notes": [*notes, *found.facts.get("notes", [])],
    }
