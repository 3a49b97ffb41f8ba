"""Vectors of the utterances that are done, one file each, so that an interrupted extraction resumes at the clip.

``VIEW/MODALITY/[SPLIT/]KEY.npy`` holds a vector, which is the layout that data sets are built from (docs/datasets/features.md),
and ``done/[SPLIT/]KEY.json`` what became of an utterance; it is written last.
"""

import json
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import msgspec
import numpy as np

from conclugen_jax.data.combined import VariantFeatures
from conclugen_jax.data.folders import FolderFeatures
from conclugen_jax.data.sources import Features
from conclugen_jax.errors import ConclugenError
from conclugen_jax.extract.clips import Utterance
from conclugen_jax.system import files

RECIPE, KEPT = "recipe.json", "kept"


class State(msgspec.Struct):
    """What became of an utterance.

    Attributes:
      stamp: of the utterance before its files were read.
      views: number of its views.
      present: modalities that it has vectors of, sorted.
      notes: remarks for the user.
      failure: why there are no vectors; empty if there are.
      text: what is said.
    """

    stamp: list[Any] = []
    views: int = 1
    present: list[str] = []
    notes: list[str] = []
    failure: str = ""
    text: str | None = None


class Planned:
    """Features that do not exist yet: only their names and sizes."""

    def __init__(self, utterances: Sequence[Utterance], dim: int):
        self.dim, self._names = dim, {}
        for u in utterances:
            self._names.setdefault(u.split, []).append(u.key)

    def names(self) -> dict[str, list[str]]:
        return self._names

    def files(self) -> tuple:
        return ()

    def locate(self, split: str, keys: Sequence[str]) -> Sequence[str | None]:
        """Return the name within the data set of each key, ``None`` where there is none."""
        in_split, anywhere = set(self._names.get(split, ())), set(self._names.get("", ()))
        return [f"{split}/{k}" if k in in_split else k if k in anywhere else None for k in keys]

    def read(self, place: str) -> None:
        """Return nothing."""


class Store:
    """A folder of vectors made by one recipe; several processes may open it, one of them begins it.

    Attributes:
      folder: of the vectors.
    """

    def __init__(self, folder: Path):
        self.folder = folder

    def is_kept(self) -> bool:
        """Return whether the vectors stay after the data set is built."""
        return (self.folder / KEPT).exists()

    def begin(self, recipe: Mapping[str, Any], *, overwrite: bool = False, keep: bool = False) -> None:
        """Create the folder.

        Args:
          recipe: JSON; the vectors of an earlier try are used if its recipe was the same.
          overwrite: delete the vectors of another recipe.
          keep: the vectors stay after the data set is built.

        Raises:
          ConclugenError: another recipe has left vectors.
          OSError: it cannot be written.
        """
        text, path = json.dumps(recipe, sort_keys=True), self.folder / RECIPE
        if self.folder.exists() and (not path.is_file() or path.read_bytes() != text.encode()):
            count = sum(1 for _ in (self.folder / "done").rglob("*.json"))
            if count and not overwrite:
                raise ConclugenError(
                    f"{self.folder}: {count:,} utterances that an earlier try made in another way{_changed(path, recipe)}; "
                    "repeat that command, or pass --overwrite to delete them"
                )
            shutil.rmtree(self.folder)
        self.folder.mkdir(parents=True, exist_ok=True)
        with files.replaced(path) as scratch:
            scratch.write_text(text)
        if keep:
            (self.folder / KEPT).touch()

    def state(self, utterance: Utterance, num_views: int) -> State | None:
        """Return what became of an utterance; ``None`` if it is not done, or its file, interval or words have changed."""
        try:
            found = files.read_json(self._path("done", utterance, ".json"), State, way_out="")
        except ConclugenError:
            return None
        vectors = [self._path(f"{v}/{m}", utterance, ".npy") for v in range(num_views) for m in found.present]
        same = found.stamp == utterance.stamp() and found.views == num_views
        return found if same and all(path.is_file() for path in vectors) else None

    def put(self, utterance: Utterance, vectors: Mapping[str, np.ndarray], state: State) -> None:
        """Write the vectors of an utterance, modality -> float32 [views, dim], and what became of it.

        Raises:
          OSError: they cannot be written.
        """
        for modality, views in vectors.items():
            for number, vector in enumerate(views):
                with self._replaced(f"{number}/{modality}", utterance, ".npy") as scratch:
                    np.save(scratch, vector, allow_pickle=False)
        with self._replaced("done", utterance, ".json") as scratch:
            scratch.write_bytes(msgspec.json.encode(state))

    def features(self, modality: str, num_views: int, first_split: str) -> Features | None:
        """Return the vectors of a modality as a data set is built from them; ``None`` if no utterance has it.

        Args:
          modality: their name.
          num_views: of each utterance of the first split.
          first_split: its name.
        """
        folders = [self.folder / str(v) / modality for v in range(num_views)]
        there = [next(folder.rglob("*.npy"), None) is not None for folder in folders]
        if not there[0]:
            return None
        first = FolderFeatures(folders[0], how="mean")
        if num_views == 1:
            return first
        others = zip(folders[1:], there[1:], strict=True)
        others = [FolderFeatures(f, how="mean") if has_some else Planned((), first.dim) for f, has_some in others]
        return VariantFeatures([first, *others], first_split=first_split)

    def keep_only(self, present: Mapping[str, Sequence[str]]) -> None:
        """Delete the vectors that do not count any more; ``present``: place -> its modalities."""
        for folder in self.folder.glob("[0-9]*/*"):
            for path in folder.rglob("*.npy"):
                place = path.relative_to(folder).as_posix().removesuffix(".npy")
                if folder.name not in present.get(place, ()):
                    path.unlink()

    def _path(self, folder: str, utterance: Utterance, ending: str) -> Path:
        return self.folder / folder / f"{utterance.place}{ending}"  # no key has a slash, see clips.find

    def _replaced(self, folder: str, utterance: Utterance, ending: str):
        path = self._path(folder, utterance, ending)
        path.parent.mkdir(parents=True, exist_ok=True)
        return files.replaced(path)


def _changed(path: Path, recipe: Mapping[str, Any]) -> str:
    """Return which parts of a recipe differ from the stored one, in brackets."""
    try:
        stored = files.read_json(path, dict[str, Any], way_out="")
    except ConclugenError:
        return ""
    names = sorted(k for k in stored.keys() | recipe.keys() if stored.get(k) != recipe.get(k))
    return f" ({', '.join(names)})" if names else ""
