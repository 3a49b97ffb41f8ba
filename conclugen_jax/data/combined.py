"""Combine features: side by side, in several variants, or looked for in one split."""

import itertools
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from conclugen_jax.data.sources import Features
from conclugen_jax.errors import ConclugenError


class _Combined:
    """Features of which others are made."""

    def __init__(self, pieces: Sequence[Features]):
        self.pieces, self.dim = pieces, pieces[0].dim

    def names(self) -> dict[str, list[str]]:
        """Return the names that any piece has."""
        names: dict[str, set[str]] = {}
        for piece in self.pieces:
            for split, some in piece.names().items():
                names.setdefault(split, set()).update(some)
        return {split: sorted(some) for split, some in names.items()}

    def files(self) -> Iterable[Path]:
        return (path for piece in self.pieces for path in piece.files())

    def locate(self, split: str, keys: Sequence[Any]) -> Sequence[tuple]:
        """Return the place in each piece."""
        return list(zip(*(piece.locate(split, keys) for piece in self.pieces), strict=True))


class ConcatFeatures(_Combined):
    """Several vectors of one clip as one, such as 2D and 3D frame features; absent where one of them is."""

    def __init__(self, pieces: Sequence[Features]):
        super().__init__(pieces)
        self.dim = sum(piece.dim for piece in pieces)

    def names(self) -> dict[str, list[str]]:
        return self.pieces[0].names()

    def locate(self, split: str, keys: Sequence[Any]) -> Sequence[tuple | None]:
        return [None if None in place else place for place in super().locate(split, keys)]

    def read(self, place: tuple) -> np.ndarray | None:
        vectors = [piece.read(part) for piece, part in zip(self.pieces, place, strict=True)]
        return None if any(x is None for x in vectors) else np.concatenate(vectors)


class VariantFeatures(_Combined):
    """Several stored variants of each clip of the first split; of the other splits, variant 0."""

    def __init__(self, pieces: Sequence[Features], *, first_split: str):
        super().__init__(pieces)
        self.first_split = first_split

    def locate(self, split: str, keys: Sequence[Any]) -> Sequence[tuple[int, tuple] | None]:
        """Return how many of the variants the split uses, and the place in each of all variants."""
        count = len(self.pieces) if split == self.first_split else 1
        return [None if all(p is None for p in place) else (count, place) for place in super().locate(split, keys)]

    def read(self, place: tuple[int, tuple]) -> np.ndarray | None:
        """Return [variants, dim], None if no variant exists."""
        count, parts = place
        stored = (None if part is None else v.read(part) for v, part in zip(self.pieces, parts, strict=True))
        vectors = list(itertools.islice(stored, count))
        if all(x is None for x in vectors) and all(x is None for x in stored):
            return None
        for part, x in zip(parts, vectors, strict=False):
            if x is None or len(x) != self.dim:
                fault = "is missing" if x is None else f"has {len(x)} values"
                raise ConclugenError(f"{part}: this variant {fault}, another has {self.dim}; complete the variants")
        return np.stack(vectors)


class _OfSplit(_Combined):
    """Features whose files all lie in one split, whatever split their rows are put in."""

    def __init__(self, features: Features, split: str):
        super().__init__([features])
        self.split = split

    def locate(self, split: str, keys: Sequence[Any]) -> Sequence[Any]:
        return self.pieces[0].locate(self.split, keys)

    def read(self, place: Any) -> np.ndarray | None:
        return self.pieces[0].read(place)


def all_from(features: Features, split: str) -> Features:
    """Return features that are looked for in one split, also for rows of other splits."""
    if isinstance(features, VariantFeatures):
        return VariantFeatures([_OfSplit(v, split) for v in features.pieces], first_split=features.first_split)
    return _OfSplit(features, split)
