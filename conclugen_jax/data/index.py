"""Find rows by name; how names are compared."""

import unicodedata
from collections.abc import Sequence

import numpy as np

from conclugen_jax.data.sources import SPLIT_NAMES, name_hash
from conclugen_jax.errors import ConclugenError


def canonical(name: str) -> str:
    """Return a name as names are compared: accents composed with their letters, a split in front by its own name."""
    name = unicodedata.normalize("NFC", name)
    split, slash, rest = name.partition("/")
    return f"{SPLIT_NAMES[split.lower()]}/{rest}" if slash and split.lower() in SPLIT_NAMES else name


class Index:
    """Rows by name, in 16 bytes a name: names are compared by 64 bits of their hash."""

    def __init__(self, names: Sequence[str], where: str):
        """Index the name of each row; ``where`` names the file in messages.

        Raises:
          ConclugenError: a name that is empty or there twice.
        """
        hashes = _hashes(names)
        self._order = np.argsort(hashes, kind="stable")
        self._hashes = hashes[self._order]
        if not hashes.all():
            raise ConclugenError(f"{where}: the id of row {int(np.argmin(hashes != 0))} is empty; each row needs one")
        twice = np.flatnonzero(self._hashes[1:] == self._hashes[:-1])
        if twice.size:
            name = names[self._order[twice[0]]]
            raise ConclugenError(f"{where}: id {name!r} appears twice; each row needs an id of its own")

    def rows(self, split: str, keys: Sequence[str]) -> list[int | None]:
        """Return the row of the name ``SPLIT/KEY`` of each key if there is one, else of ``KEY``, else None."""
        plain, within = self._find(keys), self._find([f"{split}/{key}" for key in keys])
        return [None if row < 0 else int(row) for row in np.where(within >= 0, within, plain)]

    def _find(self, names: Sequence[str]) -> np.ndarray:
        hashes = _hashes(names)
        at = np.minimum(np.searchsorted(self._hashes, hashes), len(self._hashes) - 1)
        return np.where(self._hashes[at] == hashes, self._order[at], -1)


def _hashes(names: Sequence[str]) -> np.ndarray:
    return np.array([name_hash(canonical(name)) for name in names], np.uint64)
