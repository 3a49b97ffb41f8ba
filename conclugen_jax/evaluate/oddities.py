"""Find oddities of a data set: likely wrong labels, copies, persons as clusters, useless modalities, clips all methods miss.

The search covers all splits together, since it scores nothing: a wrong label or a copy may be in any of them. It uses raw
features or the vectors of pretraining runs.
"""

import csv
import dataclasses
import io
import os
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from ml_collections import ConfigDict

from conclugen_jax.data import batches, persons as persons_lib, shards
from conclugen_jax.data.manifest import Manifest
from conclugen_jax.errors import ConclugenError
from conclugen_jax.evaluate import bank, mislabelled, odd_rows, similar, weights
from conclugen_jax.evaluate.odd_rows import Rows
from conclugen_jax.runs import configuration_files, workdir as workdir_lib
from conclugen_jax.system import progress
from conclugen_jax.train import neighbours

MOST_ROWS = 100_000
SIMILAR = 0.98
OF_LABELS = "likely wrong labels, what modalities add and clips that every method gets wrong"
RAW, UNTRAINED = "raw features", "untrained network"
LEAST_CLIPS = 10  # median of the persons', from which raw features are standardised by person
Fused = Callable[[Sequence[str]], np.ndarray]
"""Some modalities (none named: all) -> the joined vectors of all rows, [n, dim]."""


@dataclasses.dataclass(frozen=True)
class Oddities:
    """What was found, in a form that JSON can hold, and a table with every row; lists have the oddest first.

    ``data``: ``name``, ``version``, ``sha256``, ``splits``, ``rows``, ``total``. ``vectors``: whose they are, in words.
    ``notes``: what was not looked for, and why. Sections are ``None`` where that is so:

    * ``labels``: ``rows`` that were judged, ``accuracy`` out of fold, estimated number of ``errors``, and the ``likely`` wrong.
    * ``duplicates``: ``threshold``, numbers of ``exact`` copies and of ``near`` duplicates, and ``pairs``, at most 1,000 each.
    * ``persons``: ``neighbours``, means of the shares, and each person of ``all``.
    * ``modalities``: what each adds.
    * ``wrong``: ``rows`` that all methods judged, the ``accuracy`` of each, and the rows that ``all`` get wrong.
    """

    data: dict[str, Any]
    vectors: str
    notes: list[str]
    labels: dict[str, Any] | None
    duplicates: dict[str, Any] | None
    persons: dict[str, Any] | None
    modalities: list[dict[str, Any]] | None
    wrong: dict[str, Any] | None
    table: list[dict[str, Any]]

    def as_json(self) -> dict[str, Any]:
        """Return all but the table."""
        return {key: value for key, value in dataclasses.asdict(self).items() if key != "table"}

    def as_csv(self) -> str:
        """Return the table, a line for each row, those with the likeliest wrong labels first."""
        text = io.StringIO()
        writer = csv.DictWriter(text, list(self.table[0]), lineterminator="\n")
        writer.writeheader()
        writer.writerows(self.table)
        return text.getvalue()


def find(
    data: str | Path = "",
    workdirs: Sequence[str | Path] = (),
    *,
    which: str | int = "newest",
    splits: Sequence[str] = (),
    threshold: float = SIMILAR,
    most_rows: int = MOST_ROWS,
) -> Oddities:
    """Search a data set for oddities.

    Args:
      data: folder of a data set; that of the first run where it is empty.
      workdirs: pretraining runs; the vectors of the first are looked at, those of the others only for what all get wrong.
      which: checkpoint, see :func:`weights.load`.
      splits: of the data set; all where empty.
      threshold: cosine similarity from which two rows are near duplicates.
      most_rows: of a larger data set so many rows are drawn at random.

    Raises:
      ConclugenError: neither data nor a run, or one that cannot be used.
    """
    configs = {str(path): workdir_lib.read_config(path) for path in workdirs}
    if not (data or configs):
        raise ConclugenError("neither a data set nor a run is named; give --data or --workdir")
    dataset = shards.open_dataset(data or next(iter(configs.values())).data.path)
    manifest, wanted = dataset.manifest, {m: None for config in configs.values() for m in config.data.modalities}
    for path, config in configs.items():
        sizes, where = workdir_lib.read_data(path).modalities, f"data set {dataset.path}"
        weights.check_features(manifest, {m: sizes[m] for m in config.data.modalities}, where, f"run {path}")
    rows = odd_rows.read(dataset, list(wanted) or list(manifest.modalities), splits, most_rows)
    notes = []
    if rows.total > len(rows.ids):
        notes.append(f"{len(rows.ids):,} of {rows.total:,} rows are looked at, drawn at random")
    compared = _compared(rows, manifest)
    methods, said = vectors_of(rows, manifest, configs, which)
    first = next(iter(configs.values())).data.modalities if configs else tuple(rows.present)
    copies = similar.copies(rows.features, rows.present)
    judged = _judge(rows, copies, manifest.label.kind, methods, first, notes)
    with progress.Counter("looking for near duplicates", unit="rows") as counter:
        pairs = odd_rows.alike(copies, compared, threshold, counter)
    vectors = _standard(next(iter(methods.values()))(())) if configs else compared
    persons = odd_rows.persons(
        said if configs else RAW, similar.persons(vectors, rows.groups, rows.label if rows.names else None)
    )
    if persons is None:
        notes.append(
            "the data set says of fewer than two persons which rows are theirs: their clusters are not looked for"
        )
    facts = {"name": manifest.name, "version": manifest.version, "sha256": manifest.fingerprint()}
    facts |= {"splits": list(dict.fromkeys(rows.splits.tolist())), "rows": len(rows.ids), "total": rows.total}
    return Oddities(
        facts,
        said,
        notes,
        judged.labels,
        odd_rows.duplicates(rows, pairs, threshold),
        persons,
        judged.modalities,
        judged.wrong,
        odd_rows.table(rows, pairs, judged.confident, judged.all_wrong),
    )


def _compared(rows: Rows, manifest: Manifest) -> np.ndarray:
    """Return raw features as they are compared: each modality standardised, at length 1, zeros where absent, side by side."""
    of, found = persons_lib.feature_stats(manifest, None), []
    for start in range(0, len(rows.ids), batches.CHUNK_ROWS):
        at = slice(start, start + batches.CHUNK_ROWS)
        part = {key: {m: x[at] for m, x in getattr(rows, key).items()} for key in ("features", "present")}
        found.append(neighbours.fused(part, of))
    return np.concatenate(found)


def vectors_of(
    rows: Rows, manifest: Manifest, configs: Mapping[str, ConfigDict], which: str | int = "newest"
) -> tuple[dict[str, Fused], str]:
    """Return vectors of rows by method, those that are looked at first, and what these are in words.

    ``configs``: folder of a pretraining run -> its configuration. Without runs the vectors are raw features.
    """
    return _of_runs(rows, manifest, configs, which) if configs else _of_features(rows, manifest)


def _of_features(rows: Rows, manifest: Manifest) -> tuple[dict[str, Fused], str]:
    """Return raw features as the only method, standardised by person where persons say little of the label."""
    features, said = rows.features, RAW
    _, clips = np.unique(rows.groups[rows.groups != ""], return_counts=True)
    share = persons_lib.explained(rows.label, manifest.label, rows.groups)
    if share is not None and share <= persons_lib.CONFOUNDED and np.median(clips) >= LEAST_CLIPS:
        by_person = persons_lib.unfitted(manifest, configuration_files.base(), list(features))
        features = by_person.applied(features, rows.present, rows.groups)
        said = f"{RAW}, standardised by person (persons explain {share:.0%} of the label's variance)"
    return {RAW: lambda names: _joined(features, rows.present, names)}, said


def _of_runs(
    rows: Rows, manifest: Manifest, configs: Mapping[str, ConfigDict], which: str | int
) -> tuple[dict[str, Fused], str]:
    """Return the vectors of runs, and those of raw features and the untrained network as the first run has them."""
    methods: dict[str, Fused] = {}
    common = os.path.commonpath([os.path.abspath(path) for path in configs])
    names = {path: os.path.relpath(path, common) if len(configs) > 1 else "pretrained" for path in configs}
    for workdir, config in configs.items():
        features, present = ({m: x[m] for m in config.data.modalities} for x in (rows.features, rows.present))
        of = {"features": features, "present": present, "label": rows.label, "group": rows.groups}
        split = weights.represent_rows(workdir, of | {"data": manifest.name}, manifest.label.names, which=which)
        methods[names[workdir]] = _smoothed(split.representations, present, config.evaluation)
        if len(methods) == 1:
            fresh = weights.represent(*weights.untrained(config, workdir), split.features)
            of_first = {RAW: split.features, UNTRAINED: fresh}
            others = {name: _smoothed(x, present, config.evaluation) for name, x in of_first.items()}
            first, section = workdir, config.evaluation
    return methods | others, f"{section.vectors} of {first}{bank.said(section)}"


def _smoothed(vectors: Mapping[str, np.ndarray], present: Mapping[str, np.ndarray], section: ConfigDict) -> Fused:
    def fused(names: Sequence[str]) -> np.ndarray:
        joined = _joined(vectors, present, names)
        if not section.smoothing_neighbours:
            return joined
        return bank.create(joined, section).smoothed(joined, np.arange(len(joined)))

    return fused


def _joined(vectors: Mapping[str, np.ndarray], present: Mapping[str, np.ndarray], names: Sequence[str]) -> np.ndarray:
    return weights.concatenated({m: vectors[m] for m in names or vectors}, present)


def _standard(vectors: np.ndarray) -> np.ndarray:
    return (vectors - vectors.mean(axis=0)) / np.maximum(vectors.std(axis=0), 1e-6)


class _Judged(NamedTuple):
    """Results of the probes: the sections of the report, and the columns of the table of rows."""

    labels: dict[str, Any] | None = None
    modalities: list[dict[str, Any]] | None = None
    wrong: dict[str, Any] | None = None
    confident: mislabelled.Confident | None = None
    all_wrong: np.ndarray | None = None  # boolean [n]


def _judge(
    rows: Rows,
    copies: np.ndarray,
    kind: str,
    methods: Mapping[str, Fused],
    modalities: Sequence[str],
    notes: list[str],
) -> _Judged:
    """Judge labels, modalities and methods by probes of one class per row."""
    first = next(iter(methods))
    if kind != "single":
        found = "has no labels" if kind == "none" else f"has labels of kind {kind!r}"
        notes.append(f"the data set {found}: {OF_LABELS} need one class for each row")
        return _Judged()
    try:
        folds = mislabelled.folds(rows.label, rows.groups, copies)
    except ConclugenError as e:
        notes.append(f"{OF_LABELS} are not looked for: {e}")
        return _Judged()
    num_classes = len(rows.names)
    probabilities = {
        name: mislabelled.out_of_fold(fused(()), rows.label, folds, num_classes) for name, fused in methods.items()
    }
    found = mislabelled.confident(probabilities[first], rows.label)
    if unknown := int(np.isnan(found.self_confidence).sum()):
        notes.append(f"{unknown:,} of {len(rows.ids):,} rows are not judged: the rows of other folds lack their class")
    if unknown == len(rows.ids):
        return _Judged()
    guesses = {name: x.argmax(axis=1) for name, x in probabilities.items()}
    judged = np.isfinite(found.self_confidence)
    accuracy, guessing = (guesses[first] == rows.label)[judged].mean(), found.judged.max() / max(judged.sum(), 1)
    if accuracy <= guessing:
        fact = f"a probe is right on {accuracy:.1%} of {judged.sum():,} rows"
        notes.append(f"{OF_LABELS} are not looked for: {fact}, the largest class alone would be on {guessing:.1%}")
        return _Judged()
    present = {m: rows.present[m] for m in modalities}
    added = mislabelled.worth(methods[first], present, rows.label, rows.groups, folds, num_classes)
    if not added:
        notes.append("what a modality adds needs rows with two modalities")
    if len(guesses) < 2:
        notes.append("clips that every method gets wrong need several methods; name a pretraining run by --workdir")
    return _Judged(
        odd_rows.labels(rows, guesses[first], found),
        odd_rows.modalities(added),
        odd_rows.wrong(rows, guesses, found),
        found,
        odd_rows.all_wrong(rows, guesses, found),
    )
