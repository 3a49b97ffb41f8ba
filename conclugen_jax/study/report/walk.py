"""Data of the interactive map in a page: utterances as points in several spaces, with neighbours, predictions, pictures.

``map.js`` draws it. Numbers of points are base64 of uint16, little-endian, row by row.
"""

import base64
import json
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from sklearn.preprocessing import StandardScaler

from conclugen_jax.data import manifest as manifest_lib, shards, utterances
from conclugen_jax.data.shards import Dataset
from conclugen_jax.data.sources import LabelSpec
from conclugen_jax.errors import ConclugenError
from conclugen_jax.evaluate import mislabelled, similar
from conclugen_jax.method import neighbours

POINTS = 2000
NEIGHBOURS = 10
SIDE = 10_000  # places are whole numbers from 0 to this; one more stands for none
COLOURS = 40  # values of a colouring, the rest are one value
LETTERS = 300  # of the words of an utterance
NONE = 65_535


class Rows(NamedTuple):
    """Utterances of a data set that are shown, split after split."""

    dataset: Dataset
    indices: dict[str, np.ndarray]  # split -> rows
    total: int  # that could be
    ids: np.ndarray  # strings [n]
    groups: np.ndarray  # strings [n]
    splits: np.ndarray  # strings [n]


def draw(dataset: Dataset, modalities: Sequence[str], most: int = POINTS) -> Rows:
    """Draw utterances of all splits that have one of the modalities; the same at every call."""
    manifest, places = dataset.manifest, []
    columns = [i for i, m in enumerate(manifest.modalities) if m in modalities]
    for number, split in enumerate(manifest.splits):
        there = np.flatnonzero(manifest_lib.read_presence(dataset.path, manifest, split)[:, columns].any(axis=1))
        places.append(np.stack([np.full(len(there), number), there], axis=1))
    every = np.concatenate(places)
    chosen = every[np.sort(np.random.default_rng(0).permutation(len(every))[:most])]
    indices = {split: chosen[chosen[:, 0] == i, 1] for i, split in enumerate(manifest.splits)}
    indices = {split: rows for split, rows in indices.items() if len(rows)}
    names = {s: shards.ShardStream(dataset, s, list(manifest.modalities)).names(rows) for s, rows in indices.items()}
    ids, groups = (np.concatenate([found[i] for found in names.values()]) for i in (0, 1))
    return Rows(dataset, indices, len(every), ids, groups, np.repeat(list(indices), list(map(len, indices.values()))))


class Space(NamedTuple):
    """Vectors that a map shows."""

    name: str
    raw: bool
    places: np.ndarray  # float [n, 2]
    vectors: np.ndarray  # [n, dim]
    there: np.ndarray  # boolean [n], rows that have a vector
    clusters: np.ndarray  # int [n], or empty


def data(
    title: str,
    rows: Rows,
    label: np.ndarray,
    classes: tuple[np.ndarray, Sequence[str]],
    spaces: Sequence[Space],
    folder: Path,
) -> dict[str, Any]:
    """Return the data of a map.

    ``label`` [n] or [n, labels] are the rows' labels, ``classes`` those to colour them by: numbers [n], and names. ``folder``
    is that of the page, from which clips are found, too.
    """
    spec, n = rows.dataset.manifest.label, len(rows.ids)
    names = {split: rows.ids[rows.splits == split].tolist() for split in rows.indices}
    found = utterances.read(rows.dataset.path, rows.dataset.manifest, names)
    seen = [found[key] for key in zip(rows.splits.tolist(), rows.ids.tolist(), strict=True)]
    shown = f"{n:,} utterances are shown."
    if n < rows.total:
        shown = f"{n:,} of {rows.total:,} utterances are shown, drawn at random with the seed 0; so are neighbours."
    there = np.concatenate([_presence(rows.dataset, split, at) for split, at in rows.indices.items()])
    modalities = list(rows.dataset.manifest.modalities)
    present = [" + ".join(m for m, yes in zip(modalities, row, strict=True) if yes) for row in there.tolist()]
    texts = label_texts(label, spec)
    colours = {"class": _coloured(*classes)} if spec.kind != "none" else {}
    colours |= {"person": _colouring(rows.groups), "split": _colouring(rows.splits), "modalities": _colouring(present)}
    return {
        "title": title,
        "shown": shown,
        "ids": rows.ids.tolist(),
        "words": [one.words[:LETTERS] for one in seen],
        "labels": texts,
        "kind": spec.kind,
        "classes": list(spec.names),
        "colours": {name: c for name, c in colours.items() if name == "class" or len(c["names"]) > 1},
        "persons": rows.groups.tolist(),
        "spaces": [_space(space, label, rows.groups, spec) for space in spaces],
        "faces": [base64.b64encode(one.thumbnail).decode() for one in seen] if any(s.thumbnail for s in seen) else [],
        "clips": _clips(seen, folder),
    }


def markup(found: Mapping[str, Any]) -> str:
    """Return data as JSON that stands in an element ``script``."""
    text = json.dumps(found, ensure_ascii=False, separators=(",", ":"))
    return text.replace("<", "\\u003c")


def label_texts(label: np.ndarray, spec: LabelSpec) -> list[str]:
    """Return the label of each row as text, empty where there is none."""
    if spec.kind == "single":
        return [spec.names[k] for k in label.astype(int)]
    if spec.kind == "multi":
        return [
            ", ".join(name for name, yes in zip(spec.names, row > 0, strict=True) if yes) or "none" for row in label
        ]
    return [f"{x:.4g}" for x in label] if spec.kind == "value" else [""] * len(label)


def _presence(dataset: Dataset, split: str, rows: np.ndarray) -> np.ndarray:
    return manifest_lib.read_presence(dataset.path, dataset.manifest, split)[rows]


def _colouring(values: Sequence[str]) -> dict[str, Any]:
    """Return what :func:`_coloured` does of values as text, the most frequent first."""
    names, numbers, counts = np.unique(np.asarray(values, str), return_inverse=True, return_counts=True)
    order = np.lexsort((names, -counts))
    return _coloured(np.argsort(order)[numbers], [name or "unknown" for name in names[order].tolist()])


def _coloured(numbers: np.ndarray, names: Sequence[str]) -> dict[str, Any]:
    """Return names, and the number of each row's name; names beyond :data:`COLOURS` become one."""
    if len(names) > COLOURS:
        names = [*names[: COLOURS - 1], f"{len(names) - COLOURS + 1} others"]
    return {"names": list(names), "of": _packed(np.minimum(numbers, len(names) - 1))}


def _packed(x: np.ndarray) -> str:
    return base64.b64encode(np.ascontiguousarray(x, "<u2").tobytes()).decode()


def _space(space: Space, label: np.ndarray, persons: np.ndarray, spec: LabelSpec) -> dict[str, Any]:
    """Return places, neighbours by cosine of standardised vectors, clusters, and predictions of one space."""
    at, n = np.flatnonzero(space.there), len(space.there)
    low, high = space.places[at].min(axis=0), space.places[at].max(axis=0)
    places = np.full((n, 2), SIDE + 1)
    scale = SIDE / max((high - low).max(), 1e-12)
    places[at] = np.round((space.places[at] - (low + high) / 2) * scale + SIDE / 2)
    vectors = StandardScaler().fit_transform(np.asarray(space.vectors[at], np.float64)).astype(np.float32)
    near = np.full((n, NEIGHBOURS), NONE)
    if len(at) > 1:
        found, _ = neighbours.nearest(vectors, vectors, min(NEIGHBOURS, len(at) - 1), own=np.arange(len(at)))
        near[at, : found.shape[1]] = at[found]
    result = {"name": space.name, "raw": space.raw, "places": _packed(places), "near": _packed(near)}
    if len(space.clusters):
        result["clusters"] = _colouring([f"cluster {k:02d}" for k in space.clusters])
    if spec.kind == "single":
        result |= _predictions(space.vectors[at], label[at].astype(int), persons[at], at, n, len(spec.names))
    return result


def _predictions(
    vectors: np.ndarray, labels: np.ndarray, persons: np.ndarray, at: np.ndarray, n: int, num_classes: int
) -> dict[str, Any]:
    """Return class and probability in % from classifiers fitted without the row; empty if none can be fitted."""
    copies = similar.copies({"": vectors}, {"": np.ones(len(vectors), bool)})
    try:
        folds = mislabelled.folds(labels, persons, copies)
    except ConclugenError:  # one class, or too few rows
        return {}
    found = mislabelled.out_of_fold(vectors, labels, folds, num_classes)
    known = np.isfinite(found).all(axis=1)
    predicted, probability = np.full((2, n), NONE)
    predicted[at[known]] = found[known].argmax(axis=1)
    probability[at[known]] = np.round(100 * found[known].max(axis=1))
    return {"predicted": _packed(predicted), "probability": _packed(probability)}


def _clips(seen: Sequence[utterances.Seen], folder: Path) -> dict[str, Any]:
    """Return where clips are that exist: a URL and a path from the page to their common folder, and the rest of each."""
    paths = [Path(one.clip) if one.clip and Path(one.clip).is_file() else None for one in seen]
    there = [path for path in paths if path]
    if not there:
        return {}
    common = Path(os.path.commonpath([path.parent for path in there]))
    names = ["" if path is None else path.relative_to(common).as_posix() for path in paths]
    times = [f"{one.start:g},{one.end:g}" if one.end else "" for one in seen]
    relative = Path(os.path.relpath(common, folder.absolute())).as_posix()
    return {"url": common.as_uri(), "relative": relative, "names": names, "times": times}
