"""What vectors depend on besides the clips: written into the manifest of a data set, read and compared for a prediction."""

import json
from collections.abc import Mapping, Sequence
from importlib import metadata
from typing import Any, Literal

import msgspec

from conclugen_jax.errors import ConclugenError
from conclugen_jax.extract import preparation
from conclugen_jax.extract.backbones import Backbone, Options
from conclugen_jax.extract.media import speech
from conclugen_jax.extract.networks import weights
from conclugen_jax.extract.preparation import Recipe


class Frames(msgspec.Struct, frozen=True):
    """How pictures are cropped."""

    faces: str  # SHA-256 of MTCNN's weights; empty for whole frames
    no_face: Literal["", *preparation.NO_FACE]  # empty for whole frames
    faces_per_second: float = 0.0  # frames per second in which faces are looked for


class Provenance(msgspec.Struct, frozen=True):
    """What vectors depend on besides the clips: JSON, the same on every machine with the same versions."""

    backbones: dict[str, dict[str, Any]]  # name -> modality, size of the vectors, what else the backbone says of itself
    options: Options  # of the backbones; their batch size does not count
    frames: Frames  # how pictures are cropped
    speech: dict[str, str]  # which recogniser heard the words; empty for none
    views: dict[str, Any] = {}  # their number, seed and strength; empty for one
    versions: dict[str, str] = {}  # of the packages that read clips

    def to_json(self) -> dict[str, Any]:
        """Return it as the manifest stores it."""
        facts = msgspec.to_builtins(self)
        del facts["options"]["batch_items"]
        return facts


def of(backbones: Sequence[Backbone], how: Recipe, options: Options) -> Provenance:
    """Return what the vectors of backbones depend on."""
    faces = Frames(weights.load(how.faces).sha256, how.no_face, preparation.DETECTIONS) if how.faces else Frames("", "")
    heard = speech.provenance(how.recogniser) if how.recogniser else {}
    views = {"number": how.num_views, "seed": how.seed, "strength": how.strength} if how.num_views > 1 else {}
    versions = {name: version for name in ("av", "pillow", "tokenizers") if (version := _version(name))}
    facts = {b.name: {"modality": b.modality, "dim": b.dim, **b.provenance} for b in backbones}
    return Provenance(facts, options, faces, heard, views, versions)


def _version(package: str) -> str:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return ""


class _Backbone(msgspec.Struct):
    modality: str
    dim: int


def read(made: Mapping[str, Any]) -> Provenance:
    """Return the provenance in what a manifest says of an extraction.

    Raises:
      msgspec.ValidationError: a fact is missing or cannot be; the message names it.
    """
    found = msgspec.convert(made, Provenance)
    msgspec.convert(found.backbones, dict[str, _Backbone])
    return found


def compare(found: Mapping[str, Mapping[str, Any]], expected: Mapping[str, Mapping[str, Any]], whose: str) -> None:
    """Compare facts of tools, by their names, with those of the tools that made the data set of a run.

    Where weights came from may differ.

    Raises:
      ConclugenError: one differs; it is named with both values.
    """
    for name, ours in sorted(found.items()):
        keys = (ours.keys() | expected[name].keys()) - {"source"}
        for key in sorted(keys, key=lambda key: (key != "sha256", key)):  # the hash says most
            a, b = (json.dumps(facts.get(key), sort_keys=True) for facts in (ours, expected[name]))
            if a != b:
                theirs = f"that of the features of {whose} is {b[:200]}"
                raise ConclugenError(f"{name}: its {key} is {a[:200]}, {theirs}; use the same or extract again")
