"""Vectors of the utterances that are done, so that an interrupted extraction resumes at the clip.

``vectors/[SPLIT/]KEY.npy`` holds one row, an array [views, dim] for each modality; ``done/[SPLIT/]KEY.json``, written last,
says what became of an utterance.
"""

import functools
import json
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import msgspec
import numpy as np

from conclugen_jax.data.features import canonical
from conclugen_jax.errors import ConclugenError, reason
from conclugen_jax.extract.utterance import Utterance
from conclugen_jax.system import files

RECIPE, KEPT = "recipe.json", "kept"  # how the vectors are made; a mark that they stay after the data set is built


class State(msgspec.Struct):
    """What became of an utterance."""

    stamp: list[Any] = []  # of the utterance before its files were read
    views: int = 1  # number of its views
    present: list[str] = []  # modalities that it has vectors of, sorted
    notes: list[str] = []  # remarks for the user
    failure: str = ""  # why there are no vectors; empty if there are
    text: str | None = None  # what is said
    thumbnail: bytes = b""  # JPEG; empty for none


class Vectors:
    """A view of a modality in a store, as a data set is built from it; without them, names and size of what will be there."""

    def __init__(self, utterances: Sequence[Utterance], dim: int, folder=Path(), modality: str = "", view: int = 0):
        self.dim, self._folder, self._modality, self._view = dim, folder, modality, view
        self._places: dict[str, dict[str, str]] = {}  # split -> name of a clip -> its place
        for u in utterances:
            self._places.setdefault(u.split, {})[canonical(u.key)] = u.place

    def names(self) -> dict[str, list[str]]:
        """Return the names of the clips of each split."""
        return {split: sorted(places) for split, places in self._places.items()}

    def files(self) -> tuple:
        """Return no files, since the vectors are in the store."""
        return ()

    def locate(self, split: str, keys: Sequence[str]) -> list[str | None]:
        """Return the place of each key, ``None`` where there is none."""
        places = self._places.get("", {}) | self._places.get(split, {})
        return [places.get(canonical(key)) for key in keys]

    def read(self, place: str) -> np.ndarray:
        """Return the vector [dim] of a place."""
        path, _ = _paths(self._folder, place)
        return _rows(path, path.stat().st_mtime_ns)[self._modality][0, self._view]


@functools.lru_cache(maxsize=1)
def _rows(path: Path, _changed: int) -> np.ndarray:
    """Return the vectors of an utterance, of which the next views and modalities are wanted next."""
    try:
        return np.load(path)
    except Exception as e:  # NumPy parses the header as Python: damage ends in many kinds
        raise ConclugenError(f"{path}: cannot be read ({reason(e)}); delete it and repeat the command") from e


class Store:
    """A ``folder`` of vectors made by one recipe; several processes may open it, one of them begins it."""

    def __init__(self, folder: Path):
        self.folder = folder

    def begin(self, recipe: Mapping[str, Any], *, overwrite: bool = False, keep: bool = False) -> None:
        """Create the folder. The vectors of an earlier try are used if its recipe (JSON) was the same, see :meth:`state`.

        Those of another recipe are refused, with ``overwrite`` deleted; with ``keep`` the vectors stay after the data set is
        built. Raises OSError where it cannot be written.
        """
        text, path = json.dumps(recipe, sort_keys=True), self.folder / RECIPE
        if self.folder.exists() and (not path.is_file() or path.read_bytes() != text.encode()):
            count = sum(1 for _ in (self.folder / "done").rglob("*.json"))
            if count and not overwrite:
                try:
                    stored = files.read_json(path, dict[str, Any], way_out="")
                    names = [k for k in sorted(stored.keys() | recipe.keys()) if stored.get(k) != recipe.get(k)]
                    differs = f" ({', '.join(names)})"
                except ConclugenError:  # missing or damaged
                    differs = ""
                way_out = f"with other options{differs}; repeat that command, or pass --overwrite to delete them"
                raise ConclugenError(
                    f"{self.folder}: holds {count:,} utterances that an earlier command extracted {way_out}"
                )
            shutil.rmtree(self.folder)
        self.folder.mkdir(parents=True, exist_ok=True)
        with files.replaced(path) as scratch:
            scratch.write_text(text)
        if keep:
            (self.folder / KEPT).touch()

    def state(self, utterance: Utterance, num_views: int) -> State | None:
        """Return what became of an utterance; ``None`` if it is not done, or its file, interval or words have changed."""
        vectors, state = _paths(self.folder, utterance.place)
        try:
            found = files.read_json(state, State, way_out="")
        except ConclugenError:
            return None
        same = found.stamp == utterance.stamp() and found.views == num_views
        return found if same and (not found.present or vectors.is_file()) else None

    def put(self, place: str, vectors: Mapping[str, np.ndarray], state: State) -> None:
        """Write the vectors of an utterance, modality -> float32 [views, dim], and what became of it."""
        paths = _paths(self.folder, place)
        for path in paths:
            path.parent.mkdir(parents=True, exist_ok=True)
        if vectors:
            kinds = [(modality, np.float32, x.shape) for modality, x in vectors.items()]
            with files.replaced(paths[0], shared=True) as scratch:
                np.save(scratch, np.array([tuple(vectors.values())], kinds), allow_pickle=False)
        with files.replaced(paths[1], shared=True) as scratch:
            scratch.write_bytes(msgspec.json.encode(state))


def _paths(folder: Path, place: str) -> tuple[Path, Path]:
    """Return the files of an utterance's vectors and of its state."""
    return folder / "vectors" / f"{place}.npy", folder / "done" / f"{place}.json"
