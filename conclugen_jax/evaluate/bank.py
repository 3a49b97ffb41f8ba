"""Vectors smoothed over their nearest neighbours among the training rows of a run, its bank.

Vectors are standardised by the bank, then averaged with their neighbours in it (``method.neighbours``). Rows that are scored
are in no bank unless ``evaluation.transductive`` says so, and no label takes part.
"""

import functools
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

import jax
import numpy as np
from ml_collections import ConfigDict
from safetensors import numpy as safetensors

from conclugen_jax.data import batches
from conclugen_jax.data.manifest import Manifest
from conclugen_jax.errors import ConclugenError, reason
from conclugen_jax.method import layers, neighbours
from conclugen_jax.system import progress

NONE = neighbours.NONE
FILE = "bank.safetensors"  # of exports that are made so, and of workdirs made of them
JOINED = "joined"  # name of the one vector of an example

_say_once = functools.cache(progress.say)  # many banks have the same rows


class TrainingRows(NamedTuple):
    """Vectors of a run's training rows, of which its banks are made."""

    vectors: Mapping[str, np.ndarray]  # modality -> float32 [m, dim]; what stands in absent rows does not matter
    present: Mapping[str, np.ndarray]  # modality -> boolean [m]
    members: np.ndarray  # int64 [m], the rows of the split that they are
    source: tuple[str, str]  # fingerprint of the data set, name of the split


class Bank(NamedTuple):
    """Training rows, standardised."""

    vectors: np.ndarray  # float32 [m, dim]
    unit: jax.Array  # the same at length 1, on the device
    mean: np.ndarray  # float32 [dim]
    scale: np.ndarray  # float32 [dim]
    evaluation: ConfigDict  # section of a configuration that has the number of neighbours and their weight

    def smoothed(self, vectors: np.ndarray, own: np.ndarray | None = None) -> np.ndarray:
        """Return vectors [n, dim] standardised and smoothed, float32 [n, dim].

        ``own``: the row of the bank that each is itself, below 0 for none. Others are neighbours of each other where the
        section says so.
        """
        if own is None and self.evaluation.transductive:
            return self.widened(vectors).smoothed(vectors, len(self.vectors) + np.arange(len(vectors)))
        how = self.evaluation.smoothing_neighbours, self.evaluation.smoothing_share
        z = (vectors - self.mean) / self.scale
        return neighbours.smooth_with_neighbours(z, self.vectors, *how, own=own, unit_bank=self.unit)

    def widened(self, vectors: np.ndarray) -> "Bank":
        """Return the bank with further rows [n, dim] behind its own, which alone standardise."""
        among = np.concatenate([self.vectors, (vectors - self.mean) / self.scale])
        return self._replace(vectors=among, unit=neighbours.unit_rows(among))


def create(vectors: np.ndarray, evaluation: ConfigDict) -> Bank:
    """Make a bank of training vectors [m, dim]; a constant column is divided by 1. Say if it has fewer rows than neighbours."""
    if (k := evaluation.smoothing_neighbours) > len(vectors):
        fact = f"there are {len(vectors)} training rows: vectors are averaged with all of them"
        _say_once(f"config.evaluation.smoothing_neighbours is {k}, but {fact}")
    mean, scale = vectors.mean(axis=0, dtype=np.float64), vectors.std(axis=0, dtype=np.float64)
    mean, scale = mean.astype(np.float32), np.where(scale > 1e-6, scale, 1).astype(np.float32)
    standardised = ((vectors - mean) / scale).astype(np.float32)
    return Bank(standardised, neighbours.unit_rows(standardised), mean, scale, evaluation)


def pair(train: np.ndarray, test: np.ndarray, evaluation: ConfigDict | None) -> tuple[np.ndarray, np.ndarray]:
    """Smooth the vectors of training rows, each without itself, and of other rows; as they are without smoothing."""
    return (train, test) if evaluation is None else tuple(several(train, [test], evaluation))


def several(train: np.ndarray, others: Sequence[np.ndarray], evaluation: ConfigDict) -> list[np.ndarray]:
    """Smooth the vectors of training rows and of several groups of other rows, as :func:`pair` does with one."""
    if not evaluation.smoothing_neighbours:
        return [train, *others]
    bank = create(train, evaluation)
    return [bank.smoothed(train, own=np.arange(len(train))), *map(bank.smoothed, others)]


def joined(
    tables: Mapping[str, batches.HostTable], among: np.ndarray, evaluation: ConfigDict, fusion: str
) -> dict[str, batches.HostTable]:
    """Return tables of representations with one smoothed vector an example in their place.

    The bank has the rows ``among`` those of the table ``train``; ``fusion`` is how modalities are joined.
    """
    fused = {name: fuse(x.table["features"], x.table["present"], fusion) for name, x in tables.items()}
    bank, found = create(fused["train"][among], evaluation), {}
    for name, x in fused.items():
        own = None
        if name == "train":
            own = np.full(len(x), NONE)
            own[among] = np.arange(len(among))
        smooth = bank.smoothed(x, own)
        present = np.any(list(tables[name].table["present"].values()), axis=0)
        table = {"features": {JOINED: smooth}, "present": {JOINED: present}, "label": tables[name].table["label"]}
        found[name] = batches.HostTable(table, tables[name].usable, tier=tables[name].tier)
    return found


def said(evaluation: ConfigDict) -> str:
    """Return how vectors are smoothed, for the description of a measurement; empty without smoothing."""
    if not evaluation.smoothing_neighbours:
        return ""
    also = " (and rows of the same split)" if evaluation.transductive else ""
    return (
        f", each averaged with its {evaluation.smoothing_neighbours} nearest training rows{also} at a weight of "
        f"{evaluation.smoothing_share:g}"
    )


def fuse(vectors: Mapping[str, np.ndarray], present: Mapping[str, np.ndarray], how: str) -> np.ndarray:
    """Join the vectors of the modalities as ``layers.fuse`` does, float32 [n, dim]."""
    return layers.fuse(vectors, present, how, xp=np).astype(np.float32)


def write(rows: TrainingRows, path: Path) -> None:
    """Write training rows to a file: tensors ``vectors/MODALITY``, ``present/MODALITY`` and ``rows``, their places."""
    arrays = {f"{kind}/{m}": x for kind in ("vectors", "present") for m, x in getattr(rows, kind).items()}
    path.write_bytes(
        safetensors.save({name: np.ascontiguousarray(x) for name, x in {**arrays, "rows": rows.members}.items()})
    )


def read(path: Path, dims: Mapping[str, int], manifest: Manifest, split: str, *, way_out: str) -> TrainingRows:
    """Read a file of :func:`write`; ``dims``: modality -> size of its vectors; ``manifest``, ``split``: whose rows they are.

    Raises:
      ConclugenError: another kind of file, tensors of other names, types or sizes, or rows that the split does not have.
    """

    def check(right: bool, fact: str) -> None:
        if not right:
            raise ConclugenError(f"{path}: {fact}; {way_out}")

    found = tensors(path, way_out)
    check("rows" in found, "rows is missing")
    rows = found["rows"]
    expected = {"rows": f"int64[{rows.size}]"}
    expected |= {f"vectors/{m}": f"float32[{rows.size}, {dim}]" for m, dim in dims.items()}
    expected |= {f"present/{m}": f"bool[{rows.size}]" for m in dims}
    theirs = {name: f"{x.dtype}{list(x.shape)}" for name, x in found.items()}
    for name in sorted({*expected, *theirs}):
        fact = f"{name} is {theirs.get(name, 'missing')}, expected {expected.get(name, 'none')}"
        check(expected.get(name) == theirs.get(name), fact)
    known = manifest.splits.get(split, {}).get("num_examples", 0)
    ascending = rows.size and rows[0] >= 0 and rows[-1] < known and (np.diff(rows) > 0).all()
    check(ascending, f"rows are not rows of split {split!r}, which has {known}")
    vectors, present = ({m: found[f"{kind}/{m}"] for m in dims} for kind in ("vectors", "present"))
    for m, x in vectors.items():
        check(np.isfinite(x).all(), f"vectors/{m} has values that are not finite")
    return TrainingRows(vectors, present, rows, (manifest.fingerprint(), split))


def tensors(path: Path, way_out: str) -> dict[str, np.ndarray]:
    """Read a file of safetensors."""
    try:
        return safetensors.load_file(path)
    except Exception as e:  # the library names only one of the kinds that it raises
        raise ConclugenError(f"{path}: not a safetensors file that can be read ({reason(e)}); {way_out}") from e
