"""Vectors of the utterances that are done, one file each, so that an interrupted extraction goes on where it was.

``VIEW/MODALITY/[SPLIT/]KEY.npy`` holds a vector, which is the layout that data sets are built from (docs/datasets/features.md),
and ``done/[SPLIT/]KEY.json`` what became of an utterance; it is written last.
"""

import json
import os
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from conclugen_jax.data.combined import VariantFeatures
from conclugen_jax.data.folders import FolderFeatures
from conclugen_jax.data.sources import Features
from conclugen_jax.errors import ConclugenError
from conclugen_jax.extract.clips import Utterance

RECIPE = "recipe.json"


class Store:
    """A folder of vectors made by one recipe."""

    def __init__(self, folder: Path, recipe: Mapping[str, Any]):
        """Open the folder, or make it; what another recipe left there is deleted.

        Raises:
          OSError: it cannot be written.
        """
        self.folder, text = folder, json.dumps(recipe, sort_keys=True)
        path = folder / RECIPE
        if folder.exists() and (not path.is_file() or path.read_text(encoding="utf-8") != text):
            shutil.rmtree(folder)
        folder.mkdir(parents=True, exist_ok=True)
        _write(path, text.encode())

    def state(self, utterance: Utterance, num_views: int) -> dict[str, Any] | None:
        """What became of an utterance: ``failure`` (empty if none), ``present`` modalities, ``notes``; ``None``: not done.

        An utterance whose file, interval or words have changed is not done.
        """
        path = self._place("done", utterance, ".json")
        try:
            found = json.loads(path.read_text(encoding="utf-8"))
            same = found["stamp"] == json.loads(json.dumps(utterance.stamp())) and found["views"] == num_views
            vectors = [self._place(f"{v}/{m}", utterance, ".npy") for v in range(num_views) for m in found["present"]]
            return found if same and all(p.is_file() for p in vectors) else None
        except (OSError, ValueError, KeyError, TypeError):
            return None

    def put(
        self,
        utterance: Utterance,
        num_views: int,
        vectors: Mapping[str, np.ndarray],
        *,
        notes: tuple[str, ...] = (),
        failure: str = "",
    ) -> None:
        """Note what became of an utterance; ``vectors``: modality -> float32 [views, dim].

        Raises:
          OSError: it cannot be written.
        """
        for modality, views in vectors.items():
            for number, vector in enumerate(views):
                path = self._place(f"{number}/{modality}", utterance, ".npy")
                path.parent.mkdir(parents=True, exist_ok=True)
                scratch = path.with_name(f".{path.name}")
                with scratch.open("wb") as file:
                    np.save(file, vector, allow_pickle=False)
                os.replace(scratch, path)
        try:
            stamp = utterance.stamp()
        except OSError:
            stamp = []
        done = {
            "stamp": stamp,
            "views": num_views,
            "present": sorted(vectors),
            "notes": list(notes),
            "failure": failure,
        }
        _write(self._place("done", utterance, ".json"), json.dumps(done).encode())

    def features(self, modality: str, num_views: int) -> Features | None:
        """The vectors of a modality as a data set is built from them; ``None`` if no utterance has it."""
        first = self.folder / "0" / modality
        if not first.is_dir():
            return None
        if num_views == 1:
            return FolderFeatures(first, how="mean")
        views = [FolderFeatures(self.folder / str(v) / modality, how="mean") for v in range(num_views)]
        return VariantFeatures(views, first_split="train")

    def _place(self, folder: str, utterance: Utterance, ending: str) -> Path:
        path = self.folder / folder / f"{utterance.place}{ending}"
        if not path.resolve().is_relative_to(self.folder.resolve()):
            raise ConclugenError(f"{utterance.path}: the name {utterance.place!r} leads elsewhere; rename the clip")
        return path


def _write(path: Path, content: bytes) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    scratch = path.with_name(f".{path.name}")
    scratch.write_bytes(content)
    os.replace(scratch, path)
