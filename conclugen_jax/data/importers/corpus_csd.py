"""CMU-MOSEI and CMU-MOSI from the files of the CMU-MultimodalSDK: label sequence, feature sequences, standard folds."""

import re
from pathlib import Path

from conclugen_jax.data.cells import read_csv
from conclugen_jax.data.corpora import dropped
from conclugen_jax.data.importers import csd
from conclugen_jax.data.importers.csd_features import CsdFeatures
from conclugen_jax.data.requests import Found, Request
from conclugen_jax.data.sources import Annotations
from conclugen_jax.errors import ConclugenError

KINDS = {"text": r"wordvectors|glove|bert", "audio": r"covarep|opensmile", "video": r"openface|facet"}
"""modality -> what the names of its published files contain."""


def open_csd(request: Request) -> Found:
    """Open a folder of ``.csd`` files, or those named as modalities (``A.csd+B.csd`` are concatenated).

    Raises:
      ConclugenError: no labels, or several files for one modality.
    """
    if request.dataset not in csd.LABEL_COLUMNS:
        raise ConclugenError(f"format 'csd' is for {' and '.join(csd.LABEL_COLUMNS)}, not for {request.dataset!r}")
    files = _files(request)
    features = {m: CsdFeatures(paths, pool=request.pool) for m, paths in _modalities(request, files).items()}
    labels = list(request.labels) or [p for p in files if "label" in p.name.lower()]
    columns, outside = _read_labels(request, labels)
    facts = {"rows_outside_folds": outside, "minus_infinity": "read as 0"}
    return Found(features, columns=columns, label_files=labels, facts=facts)


def _read_labels(request: Request, labels: list[Path]) -> tuple[dict[str, Annotations], int]:
    """Return annotations by split, and the number of rows whose video is in no fold."""
    drop = dropped(request.corpus, "")
    if not labels:
        raise ConclugenError(f"{request.source}: no file with Label in its name; name it with --labels=FILE.csd")
    if labels[0].suffix != ".csd":
        return csd.read_label_tables([read_csv(path) for path in labels], request.dataset, drop=drop)
    if len(labels) > 1:
        raise ConclugenError(f"{len(labels)} label files ({labels[0]}, {labels[1]}); name one with --labels=FILE.csd")
    return csd.read_labels(labels[0], request.dataset, drop=drop)


def _files(request: Request) -> list[Path]:
    if request.source is None:
        return []
    return sorted(request.source.glob("*.csd")) if request.source.is_dir() else [request.source]


def _modalities(request: Request, files: list[Path]) -> dict[str, list[Path]]:
    """Return modality -> its files: as named, and for the others by what the published files are called."""
    result = {m: [Path(p) for p in paths.split("+")] for m, paths in request.modalities.items()}
    for modality, pattern in KINDS.items():
        matches = [p for p in files if re.search(pattern, p.name.lower())]
        if modality in result or (request.only and modality not in request.only) or not matches:
            continue
        if len(matches) > 1:
            raise ConclugenError(
                f"{request.source}: {', '.join(p.name for p in matches)} could all be {modality!r}; name one, or several to be "
                f"concatenated, with --modality {modality}=FILE.csd+FILE.csd"
            )
        result[modality] = matches
    if not result:
        raise ConclugenError(f"{request.source}: no file of features known by its name; use --modality NAME=FILE.csd")
    return result
