"""Vectors of the utterances that are done, one file each, so that an interrupted extraction goes on where it was.

``VIEW/MODALITY/[SPLIT/]KEY.npy`` holds a vector, which is the layout that data sets are built from (docs/datasets/features.md),
and ``done/[SPLIT/]KEY.json`` what became of an utterance; it is written last.
"""

import io
import json
import os
import shutil
import threading
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from conclugen_jax.data.combined import VariantFeatures
from conclugen_jax.data.folders import FolderFeatures
from conclugen_jax.data.sources import Features
from conclugen_jax.errors import ConclugenError
from conclugen_jax.extract.clips import Utterance

RECIPE, KEPT = "recipe.json", "kept"


class Planned:
    """Features that are not there yet: only their names and sizes."""

    def __init__(self, utterances: Sequence[Utterance], dim: int):
        self.dim, self._names = dim, {}
        for u in utterances:
            self._names.setdefault(u.split, []).append(u.key)

    def names(self) -> dict[str, list[str]]:
        """Of all utterances."""
        return self._names

    def files(self) -> tuple:
        """None yet."""
        return ()

    def locate(self, split: str, keys: Sequence[str]) -> Sequence[str | None]:
        """The name within the data set of each key that there is."""
        known = {s: set(names) for s, names in self._names.items()}
        in_split, anywhere = known.get(split, set()), known.get("", set())
        return [f"{split}/{k}" if k in in_split else k if k in anywhere else None for k in keys]

    def read(self, place: str) -> np.ndarray | None:
        """Nothing yet."""


class Store:
    """A folder of vectors made by one recipe; several processes may open it, one of them begins it.

    Attributes:
      folder: of the vectors.
    """

    def __init__(self, folder: Path):
        self.folder = folder

    def is_kept(self) -> bool:
        """Whether the vectors are to stay after the data set is built."""
        return (self.folder / KEPT).exists()

    def begin(self, recipe: Mapping[str, Any], *, overwrite: bool = False, keep: bool = False) -> None:
        """Make the folder.

        Args:
          recipe: JSON; that of an earlier try must be the same for its vectors to be kept.
          overwrite: delete what another recipe has left.
          keep: the vectors are to stay after the data set is built.

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
        _write(path, text.encode())
        if keep:
            _write(self.folder / KEPT, b"")

    def state(self, utterance: Utterance, num_views: int) -> dict[str, Any] | None:
        """What became of an utterance: ``failure`` (empty if none), ``present`` modalities, ``notes``, ``text``.

        ``None``: it is not done.

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
        stamp: list,
        notes: tuple[str, ...] = (),
        failure: str = "",
        text: str | None = None,
    ) -> None:
        """Note what became of an utterance.

        Args:
          utterance: which.
          num_views: of it.
          vectors: modality -> float32 [views, dim].
          stamp: of the utterance before its files were read.
          notes: what was odd.
          failure: why there are no vectors.
          text: what was said.

        Raises:
          OSError: it cannot be written.
        """
        for modality, views in vectors.items():
            for number, vector in enumerate(views):
                content = io.BytesIO()
                np.save(content, vector, allow_pickle=False)
                _write(self._place(f"{number}/{modality}", utterance, ".npy"), content.getvalue())
        done = {
            "stamp": stamp,
            "views": num_views,
            "present": sorted(vectors),
            "notes": list(notes),
            "failure": failure,
            "text": text,
        }
        _write(self._place("done", utterance, ".json"), json.dumps(done).encode())

    def features(self, modality: str, num_views: int, first_split: str) -> Features | None:
        """The vectors of a modality as a data set is built from them; ``None`` if no utterance has it.

        Args:
          modality: their name.
          num_views: of each utterance of the first split.
          first_split: its name.
        """
        folders = [self.folder / str(v) / modality for v in range(num_views)]
        if not _has_vectors(folders[0]):
            return None
        first = FolderFeatures(folders[0], how="mean")
        others = [FolderFeatures(f, how="mean") if _has_vectors(f) else Planned((), first.dim) for f in folders[1:]]
        return VariantFeatures([first, *others], first_split=first_split) if others else first

    def keep_only(self, present: Mapping[str, Sequence[str]]) -> None:
        """Delete the vectors of earlier tries that no longer count; ``present``: place -> its modalities."""
        for folder in self.folder.glob("[0-9]*/*"):
            for path in folder.rglob("*.npy"):
                place = path.relative_to(folder).as_posix().removesuffix(".npy")
                if folder.name not in present.get(place, ()):
                    path.unlink()

    def _place(self, folder: str, utterance: Utterance, ending: str) -> Path:
        path = self.folder / folder / f"{utterance.place}{ending}"
        if not path.resolve().is_relative_to(self.folder.resolve()):
            raise ConclugenError(f"{utterance.path}: the name {utterance.place!r} leads elsewhere; rename the clip")
        return path


def _changed(path: Path, recipe: Mapping[str, Any]) -> str:
    """Which parts of a recipe differ from the stored one, in brackets."""
    try:
        stored = json.loads(path.read_text(encoding="utf-8"))
        names = sorted(k for k in stored.keys() | recipe.keys() if stored.get(k) != recipe.get(k))
    except (OSError, ValueError, AttributeError):
        return ""
    return f" ({', '.join(names)})" if names else ""


def _has_vectors(folder: Path) -> bool:
    return next(folder.rglob("*.npy"), None) is not None


def _write(path: Path, content: bytes) -> None:
    """Whole or not at all, also where two processes do the same work."""
    path.parent.mkdir(parents=True, exist_ok=True)
    scratch = path.with_name(f".{os.getpid()}-{threading.get_ident()}")
    try:
        scratch.write_bytes(content)
        os.replace(scratch, path)
    finally:
        scratch.unlink(missing_ok=True)
