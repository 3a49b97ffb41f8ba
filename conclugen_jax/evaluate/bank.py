"""Vectors smoothed over their nearest neighbours among the training rows of a run, its bank.

Vectors are standardised by the bank, then averaged with their neighbours in it (``method.neighbours``). Rows that are scored
are in no bank unless ``evaluation.transductive`` says so, and no label takes part.
"""

import functools
from collections.abc import Mapping
from typing import NamedTuple

import jax
import numpy as np
from ml_collections import ConfigDict

from conclugen_jax.data import batches
from conclugen_jax.method import layers, neighbours
from conclugen_jax.system import progress

NONE = neighbours.NONE
JOINED = "joined"  # name of the one vector of an example

_say_once = functools.cache(progress.say)  # many banks have the same rows


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
        z, section, among, unit = (vectors - self.mean) / self.scale, self.evaluation, self.vectors, self.unit
        if own is None and section.transductive:
            own, among, unit = len(among) + np.arange(len(z)), np.concatenate([among, z]), None
        how = section.smoothing_neighbours, section.smoothing_share
        return neighbours.smooth_with_neighbours(z, among, *how, own=own, unit_bank=unit)


def create(vectors: np.ndarray, evaluation: ConfigDict) -> Bank:
    """Make a bank of training vectors [m, dim]; a constant column is divided by 1. Say if it has fewer rows than neighbours."""
    if (k := evaluation.smoothing_neighbours) > len(vectors):
        fact = f"there are {len(vectors)} training rows: vectors are averaged with all of them"
        _say_once(f"config.evaluation.smoothing_neighbours is {k}, but {fact}")
    mean, scale = vectors.mean(axis=0, dtype=np.float64), vectors.std(axis=0, dtype=np.float64)
    mean, scale = mean.astype(np.float32), np.where(scale > 1e-6, scale, 1).astype(np.float32)
    standardised = ((vectors - mean) / scale).astype(np.float32)
    return Bank(standardised, neighbours.unit_rows(standardised), mean, scale, evaluation)


def pair(train: np.ndarray, test: np.ndarray, evaluation: ConfigDict) -> tuple[np.ndarray, np.ndarray]:
    """Smooth the vectors of training rows, each without itself, and of other rows; as they are without smoothing."""
    if not evaluation.smoothing_neighbours:
        return train, test
    bank = create(train, evaluation)
    return bank.smoothed(train, own=np.arange(len(train))), bank.smoothed(test)


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
    """Return how vectors are smoothed, for the description of a measurement; empty without."""
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
