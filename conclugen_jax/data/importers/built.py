"""Read a data set that was built before: to cut it into folds, or to take some of its modalities."""

import functools
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from conclugen_jax.data import manifest as manifest_lib, shards, utterances
from conclugen_jax.data.requests import Found, Layout, Request
from conclugen_jax.data.sources import Annotations
from conclugen_jax.errors import ConclugenError

BLOCK = 256
"""Rows that are read together: array_record takes about as long for one."""


def open_built(request: Request) -> Found:
    """Open the shards of a data set as features with their labels, ids and groups."""
    folder = request.source.absolute()
    dataset = shards.open_dataset(folder)
    manifest, layout = dataset.manifest, request.layout
    if request.corpus is not None:
        raise ConclugenError(f"{folder}: is built already; name it with --data, or cut it with --dataset=features")
    if request.labels or layout != Layout():
        fault = "is built already, with its labels"
        raise ConclugenError(f"{folder}: {fault}; leave --labels, --label and --targets out, or build its files again")
    if manifest.variants:
        fault = f"has several vectors of {', '.join(manifest.variants)} for each clip, of which one would be kept"
        raise ConclugenError(f"{folder}: {fault}; build its files again")
    columns = {split: _annotations(dataset, split) for split in manifest.splits}
    features = {m: BuiltFeatures(folder, m, dim) for m, dim in manifest.modalities.items()}
    kept = {key: manifest.source[key] for key in ("extraction",) if key in manifest.source}
    facts = {**kept, "notes": manifest.source.get("notes", [])}
    return Found(
        features,
        columns=columns,
        label=manifest.label,
        targets=manifest.targets,
        label_files=[folder / manifest_lib.FILE],  # whose content covers all files by their hashes
        facts=facts,
        beside=[folder / utterances.FILE] if utterances.FILE in manifest.files else [],
    )


def _annotations(dataset: shards.Dataset, split: str) -> Annotations:
    modalities, values = list(dataset.manifest.modalities), {}
    for name, spec in dataset.manifest.labels().items():
        stream = shards.ShardStream(dataset, split, modalities[:1] if name else modalities, target=name)
        everyone = np.arange(stream.num_examples)
        values[name] = None if spec.kind == "none" else stream.labels(everyone)
        if not name:
            ids, groups = (column.tolist() for column in stream.names(everyone))
    return Annotations(ids, groups, values.pop(""), values, [(split, row) for row in everyone.tolist()])


class BuiltFeatures:
    """The vectors of one modality of a built data set, found by split and row."""

    def __init__(self, folder: Path, modality: str, dim: int):
        self.dim, self._folder, self._modality = dim, folder, modality

    def names(self) -> dict[str, list[str]]:
        """Return no names: rows are found by their places."""
        return {}

    def files(self) -> tuple:
        """Return no files: the shards are those of the data set."""
        return ()

    def locate(self, split: str, keys: Sequence[tuple[str, int]]) -> list[tuple[str, int]]:
        """Return the keys, which are places."""
        return list(keys)

    def read(self, place: tuple[str, int]) -> np.ndarray | None:
        """Return the vector [dim] of a row; None if the modality is absent."""
        split, row = place
        (number, i), m = divmod(row, BLOCK), self._modality
        block = _block(self._folder, split, number)
        return block["features"][m][i] if block["present"][m][i] else None


@functools.lru_cache(maxsize=1)
def _block(folder: Path, split: str, number: int) -> shards.Rows:
    """Return all vectors of neighbouring rows, which are read one after the other."""
    stream = _stream(folder, split)
    return stream.rows(np.arange(number * BLOCK, min((number + 1) * BLOCK, stream.num_examples)))


@functools.lru_cache(maxsize=8)
def _stream(folder: Path, split: str) -> shards.ShardStream:
    dataset = shards.Dataset(folder, manifest_lib.read(folder), "size")
    return shards.ShardStream(dataset, split, list(dataset.manifest.modalities))
