"""Rows to search for oddities, and the reports on them."""

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from conclugen_jax.data import batches, shards
from conclugen_jax.evaluate import mislabelled, similar


class Rows(NamedTuple):
    """Rows of some splits."""

    ids: np.ndarray  # strings [n], as are the next two
    splits: np.ndarray
    groups: np.ndarray
    features: dict[str, np.ndarray]  # modality -> float32 [n, dim]
    present: dict[str, np.ndarray]  # modality -> boolean [n]
    label: np.ndarray
    names: tuple[str, ...]  # of the classes; empty where there is not one class for each row
    total: int  # rows that there are; of more than can be looked at n are drawn

    def facts(self, i: int) -> dict[str, Any]:
        """Return ``id``, ``split``, ``group`` and ``label`` of a row."""
        label = self.names[self.label[i]] if self.names else None
        return {"id": str(self.ids[i]), "split": str(self.splits[i]), "group": str(self.groups[i]), "label": label}


def read(dataset: shards.Dataset, modalities: Sequence[str], splits: Sequence[str], most: int) -> Rows:
    """Read the rows of some or all splits that have a modality, or so many of them at random, always the same."""
    chosen = splits or list(dataset.manifest.splits)
    streams = [shards.ShardStream(dataset, split, modalities) for split in chosen]
    ends = np.cumsum([len(stream.usable) for stream in streams])
    order = np.sort(batches.epoch_order(0, 0, int(ends[-1]))[:most])
    parts, names = [], []
    for stream, end, part in zip(streams, ends, np.split(order, np.searchsorted(order, ends[:-1])), strict=True):
        at = stream.usable[part - (end - len(stream.usable))]
        for chunk in np.split(at, range(batches.CHUNK_ROWS, len(at), batches.CHUNK_ROWS)) if len(at) else ():
            parts.append(stream.rows(chunk))
            names.append([*stream.names(chunk), np.full(len(chunk), stream.split)])
    ids, groups, of_split = (np.concatenate(x) for x in zip(*names, strict=True))
    of = {key: {m: np.concatenate([x[key][m] for x in parts]) for m in modalities} for key in ("features", "present")}
    spec, label = dataset.manifest.label, np.concatenate([x["label"] for x in parts])
    return Rows(
        ids, of_split, groups, **of, label=label, names=spec.names if spec.kind == "single" else (), total=int(ends[-1])
    )


def labels(rows: Rows, guesses: np.ndarray, found: mislabelled.Confident) -> dict[str, Any]:
    """Report on labels: ``rows`` judged, ``accuracy`` of the guesses [n], estimated ``errors``, and the ``likely`` wrong."""
    known, likely = np.isfinite(found.self_confidence), []
    for i in ranked(found):
        if likely_wrong(found, rows.label)[i]:
            numbers = {"probability": float(found.self_confidence[i]), "margin": float(found.margin[i])}
            likely.append(rows.facts(i) | {"suggested": rows.names[found.suggested[i]]} | numbers)
    accuracy = float((guesses == rows.label)[known].mean())
    return {"rows": int(known.sum()), "accuracy": accuracy, "errors": found.errors, "likely": likely}


def ranked(found: mislabelled.Confident) -> np.ndarray:
    """Return the rows, those with the likeliest wrong labels first: lowest self-confidence; rows without one last."""
    return np.argsort(found.self_confidence, kind="stable")


def likely_wrong(found: mislabelled.Confident, label: np.ndarray) -> np.ndarray:
    """Return which rows [n] are confidently counted in another class than their label."""
    return (found.suggested >= 0) & (found.suggested != label)


def all_wrong(rows: Rows, guesses: Mapping[str, np.ndarray], found: mislabelled.Confident) -> np.ndarray:
    """Return which rows [n] every method guesses wrong, of those that were judged; none where there is one method."""
    known = np.isfinite(found.self_confidence)
    wrong = np.all([guess != rows.label for guess in guesses.values()], axis=0)
    return known & wrong & (len(guesses) > 1)


def wrong(rows: Rows, guesses: Mapping[str, np.ndarray], found: mislabelled.Confident) -> dict[str, Any] | None:
    """Report on clips that every method gets wrong: ``rows`` judged, ``accuracy`` of each method, and ``all`` of them."""
    if len(guesses) < 2:
        return None
    known, every = np.isfinite(found.self_confidence), all_wrong(rows, guesses, found)
    every = [i for i in ranked(found) if every[i]]
    shown = [rows.facts(i) | {"guesses": {name: rows.names[x[i]] for name, x in guesses.items()}} for i in every]
    accuracy = {name: float((x == rows.label)[known].mean()) for name, x in guesses.items()}
    return {"rows": int(known.sum()), "accuracy": accuracy, "all": shown}


class Copies(NamedTuple):
    """Pairs of rows that are alike."""

    first: np.ndarray  # int [n], see :func:`similar.copies`
    near: similar.Pairs

    def listed(self) -> list[tuple[int, int, float, bool]]:
        """Return pairs of rows with their cosine and whether one is an exact copy; copies first, then the most similar."""
        exact = [(int(i), j, 1.0, True) for j, i in enumerate(self.first) if i != j]
        near = zip(*(x.tolist() for x in self.near[:3]), strict=True)
        return exact + [(i, j, min(cosine, 1.0), False) for i, j, cosine in near]


def alike(first: np.ndarray, compared: np.ndarray, threshold: float, progress: Any = None) -> Copies:
    """Find near duplicates among rows that are no copies of others, by vectors that are compared [n, dim]."""
    new = np.flatnonzero(first == np.arange(len(first)))
    near = similar.near_duplicates(compared[new], threshold, progress=progress)
    return Copies(first, near._replace(first=new[near.first], second=new[near.second]))


def duplicates(rows: Rows, found: Copies, threshold: float) -> dict[str, Any]:
    """Report on rows that are alike, at most ``similar.MOST_PAIRS`` pairs of each kind."""
    exact, pairs, left = int((found.first != np.arange(len(found.first))).sum()), [], similar.MOST_PAIRS
    for i, j, cosine, same in found.listed():
        if same and (left := left - 1) < 0:
            continue
        other = {f"other_{key}": value for key, value in rows.facts(j).items()}
        pairs.append(rows.facts(i) | other | {"cosine": cosine, "exact": same})
    return {"threshold": threshold, "exact": exact, "near": found.near.total, "pairs": pairs}


def persons(vectors: str, found: list[similar.Person]) -> dict[str, Any] | None:
    """Report on the neighbours of each person's rows; ``None`` without persons."""
    if not found:
        return None
    rows = np.array([one.rows for one in found])
    shares = ("own", "own_chance", "same_class", "class_chance")
    values = {key: [getattr(one, key) for one in found] for key in shares}
    means = {key: _known(float(np.average(x, weights=rows))) for key, x in values.items()}
    every = [
        {key: _known(value) for key, value in one._asdict().items()}
        | {"above_chance": one.above_chance, "is_cluster": one.is_cluster}
        for one in found
    ]
    return {"vectors": vectors, "rows": int(rows.sum()), "neighbours": means, "all": every}


def _known(value: Any) -> Any:
    return None if isinstance(value, float) and np.isnan(value) else value


def modalities(found: list[mislabelled.Worth]) -> list[dict[str, Any]] | None:
    """Report the gain of each modality; ``None`` with fewer than two."""
    return [one._asdict() | {"difference": one.difference} for one in found] or None


def table(
    rows: Rows, found: Copies, judged: mislabelled.Confident | None, every: np.ndarray | None
) -> list[dict[str, Any]]:
    """Return a line for each row, those with the likeliest wrong labels first; what is unknown is empty."""
    partner: dict[int, tuple[int, float, bool]] = {}
    for i, j, cosine, same in found.listed():
        for one, other in ((i, j), (j, i)):
            partner.setdefault(one, (other, cosine, same))
    lines, likely = [], None if judged is None else likely_wrong(judged, rows.label)
    for rank, i in enumerate(range(len(rows.ids)) if judged is None else ranked(judged), 1):
        line = rows.facts(i)
        if judged is not None and np.isfinite(judged.self_confidence[i]):
            suggested = rows.names[judged.suggested[i]] if judged.suggested[i] >= 0 else ""
            line |= {
                "rank": rank,
                "probability": f"{judged.self_confidence[i]:.6f}",
                "margin": f"{judged.margin[i]:.6f}",
            }
            line |= {"suggested": suggested, "likely_wrong": int(likely[i]), "wrong_by_all": int(every[i])}
        if i in partner:
            other, cosine, same = partner[i]
            line |= {
                "copy_of": rows.ids[other],
                "copy_split": rows.splits[other],
                "cosine": f"{cosine:.6f}",
                "exact": int(same),
            }
        lines.append(dict.fromkeys(COLUMNS, "") | line)
    return lines


COLUMNS = (
    *("rank", "id", "split", "group", "label", "suggested", "likely_wrong", "probability", "margin", "wrong_by_all"),
    *("copy_of", "copy_split", "cosine", "exact"),
)
"""Of the table."""
