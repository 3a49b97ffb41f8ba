"""Combine features: side by side, in several variants, or looked for in one split."""

import itertools
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from conclugen_jax.data.sources import Features
from conclugen_jax.errors import ConclugenError


class ConcatFeatures:
    """Several vectors of one clip as one, such as 2D and 3D frame features; absent where one of them is."""

    def __init__(self, pieces: Sequence[Features]):
        self.pieces, self.dim = pieces, sum(piece.dim for piece in pieces)

    def names(self) -> dict[str, list[str]]:
        return self.pieces[0].names()

    def files(self) -> Iterable[Path]:
        return (path for piece in self.pieces for path in piece.files())

    def locate(self, split: str, keys: Sequence[Any]) -> Sequence[tuple | None]:
        """Return a place in each piece."""
        places = zip(*(piece.locate(split, keys) for piece in self.pieces), strict=True)
        return [None if None in place else place for place in places]

    def read(self, place: tuple) -> np.ndarray | None:
        vectors = [piece.read(part) for piece, part in zip(self.pieces, place, strict=True)]
        return None if any(x is None for x in vectors) else np.concatenate(vectors)


class VariantFeatures:
    """Several stored variants of each clip of the first split; of the other splits, variant 0."""

    def __init__(self, variants: Sequence[Features], *, first_split: str):
        self.variants, self.first_split, self.dim = variants, first_split, variants[0].dim

    def names(self) -> dict[str, list[str]]:
        """Return the names that any variant has."""
        names: dict[str, set[str]] = {}
        for variant in self.variants:
            for split, some in variant.names().items():
                names.setdefault(split, set()).update(some)
        return {split: sorted(some) for split, some in names.items()}

    def files(self) -> Iterable[Path]:
        return (path for variant in self.variants for path in variant.files())

    def locate(self, split: str, keys: Sequence[Any]) -> Sequence[tuple[int, tuple] | None]:
        """Return how many of the variants the split uses, and the place in each of all variants."""
        count = len(self.variants) if split == self.first_split else 1
        places = zip(*(variant.locate(split, keys) for variant in self.variants), strict=True)
        return [None if all(p is None for p in place) else (count, place) for place in places]

    def read(self, place: tuple[int, tuple]) -> np.ndarray | None:
        """Return [variants, dim], None if no variant exists.

        Raises:
          ConclugenError: only some exist, or they differ in size.
        """
        count, parts = place
        stored = (None if part is None else v.read(part) for v, part in zip(self.variants, parts, strict=True))
        vectors = list(itertools.islice(stored, count))
        if all(x is None for x in vectors) and all(x is None for x in stored):
            return None
        for part, x in zip(parts, vectors, strict=False):
            if x is None or len(x) != self.dim:
                fault = "is missing" if x is None else f"has {len(x)} values"
                raise ConclugenError(f"{part}: this variant {fault}, another has {self.dim}; complete the variants")
        return np.stack(vectors)


class OfSplit:
    """Features whose files all lie in one split, whatever split their rows are put in."""

    def __init__(self, features: Features, split: str):
        self.features, self.split, self.dim = features, split, features.dim

    def names(self) -> dict[str, list[str]]:
        return self.features.names()

    def files(self) -> Iterable[Path]:
        return self.features.files()

    def locate(self, split: str, keys: Sequence[Any]) -> Sequence[Any]:
        """Return places in the split where the files lie."""
        return self.features.locate(self.split, keys)

    def read(self, place: Any) -> np.ndarray | None:
        return self.features.read(place)


def all_from(features: Features, split: str) -> Features:
    """Return features that are looked for in one split, also for rows of other splits."""
    if isinstance(features, VariantFeatures):
        return VariantFeatures([OfSplit(v, split) for v in features.variants], first_split=features.first_split)
    return OfSplit(features, split)
