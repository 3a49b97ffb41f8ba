"""Read and write folders of converted weights: safetensors, a JSON file that says what they are, a tokenizer for text."""

import dataclasses
import hashlib
import json
import os
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import msgspec
import numpy as np
from flax import traverse_util
from safetensors import numpy as safetensors

from conclugen_jax.data import pickles
from conclugen_jax.errors import ConclugenError
from conclugen_jax.extract.networks import conversion, mtcnn, resnet, torch_files
from conclugen_jax.system import files

WEIGHTS = "weights.safetensors"
FACTS = "network.json"
TOKENIZER = "tokenizer.json"
FORMAT = "conclugen_jax backbone"
FORMAT_VERSION = 1

NETWORKS = (
    *(f"resnet{d}" for d in resnet.STAGES),
    *(f"resnet3d{d}" for d in resnet.STAGES),
    "resdavenet",
    "text",
    "mtcnn",
)
"""What ``launch/convert_weights.py --network`` takes."""

AGAIN = "convert the weights anew with conclugen convert_weights"


class _Facts(msgspec.Struct):
    """What the JSON file beside the weights says."""

    format: Literal[FORMAT]
    format_version: Literal[FORMAT_VERSION]
    network: Literal[NETWORKS]
    options: dict[str, Any]
    weights_sha256: str
    source: dict[str, str]
    left_out: list[str] = []
    attribution: str = ""


@dataclasses.dataclass(frozen=True)
class Weights:
    """Converted weights.

    Attributes:
      network: one of :data:`NETWORKS`.
      options: attributes of the network's module.
      params: its variables, as they nest in the module.
      sha256: of the file of weights.
      source: published files that they were made of: name -> SHA-256.
      folder: that holds them.
      tokenizer: SHA-256 of the tokenizer beside an encoder of text; empty for others.
    """

    network: str
    options: dict[str, Any]
    params: dict[str, Any]
    sha256: str
    source: dict[str, str]
    folder: Path
    tokenizer: str = ""

    def provenance(self) -> dict[str, Any]:
        """Return what a data set stores of the weights that it was made with."""
        facts = {"network": self.network, "sha256": self.sha256, "source": self.source, "options": self.options}
        return facts | ({"tokenizer": self.tokenizer} if self.tokenizer else {})


def convert(network: str, source: Path, output: Path, *, entry: str = "", attribution: str = "") -> list[str]:
    """Turn published weights into a folder of ours.

    Args:
      network: one of :data:`NETWORKS`.
      source: file of ``torch.save`` or safetensors; for ``text`` a folder with ``config.json``, ``model.safetensors`` and
        ``tokenizer.json``; for ``mtcnn`` one with ``pnet.pt``, ``rnet.pt`` and ``onet.pt``.
      output: new or empty folder.
      entry: of the file that holds the tensors, if there are several.
      attribution: author and licence, stored with the weights.

    Returns:
      Names of the tensors that are not needed and were dropped.

    Raises:
      ConclugenError: a file that cannot be read, a tensor that is missing, spare or misshapen, or a folder in use.
    """
    if network not in NETWORKS:
        raise ConclugenError(f"network {network!r} is unknown; there are {', '.join(NETWORKS)}")
    if not source.exists():
        raise ConclugenError(f"{source}: no such file or folder; name the published weights")
    options: dict[str, Any] = {}
    sources, further, left_out = [source], [], []
    if network == "mtcnn":
        sources = [source / f"{name}.pt" for name in mtcnn.NETWORKS]
        params = conversion.convert_mtcnn({p.stem: conversion.tensors_of(_read(p), str(p)) for p in sources})
    else:
        if network == "text":
            sources = [source / name for name in ("model.safetensors", "config.json", TOKENIZER)]
            further = sources[2:]
            config = files.read_json(sources[1], dict[str, Any], way_out="name a folder that has a whole one")
            family, options = conversion.text_options(config, str(sources[1]))
            if not sources[2].is_file():
                raise ConclugenError(f"{sources[2]}: no such file; put the encoder's {TOKENIZER} there")
        tensors = conversion.tensors_of(_read(sources[0]), str(sources[0]), entry)
        if network == "text":
            params = conversion.convert_text(tensors, family, options)
        elif network == "resdavenet":
            params, options = conversion.convert_davenet(tensors)
        else:
            num_axes, depth = (3, network[8:]) if network.startswith("resnet3d") else (2, network[6:])
            params = conversion.convert_resnet(tensors, int(depth), num_axes)
        left_out = sorted(tensors.left_out)
    hashes = {path.name: files.sha256(path) for path in sources}
    save(output, network, options, params, source=hashes, left_out=left_out, attribution=attribution, further=further)
    return left_out


def save(
    output: Path,
    network: str,
    options: Mapping[str, Any],
    params: Mapping[str, Any],
    *,
    source: Mapping[str, str],
    left_out: Sequence[str] = (),
    attribution: str = "",
    further: Sequence[Path] = (),
) -> None:
    """Write a folder of weights, all or nothing; files in ``further`` are copied into it.

    Raises:
      ConclugenError: the folder is in use or cannot be written.
    """
    flat = traverse_util.flatten_dict(dict(params), sep="/")
    content = safetensors.save({name: np.ascontiguousarray(x) for name, x in flat.items()})
    digest = hashlib.sha256(content).hexdigest()
    facts = _Facts(FORMAT, FORMAT_VERSION, network, dict(options), digest, dict(source), list(left_out), attribution)
    scratch = output.parent / f".{output.name}-{os.getpid()}"
    try:
        if output.exists() and not (output.is_dir() and not any(output.iterdir())):
            raise ConclugenError(f"{output}: exists and is not an empty folder; name one that does not exist")
        scratch.mkdir(parents=True)
        (scratch / WEIGHTS).write_bytes(content)
        for path in further:
            (scratch / path.name).write_bytes(path.read_bytes())
        text = json.dumps(msgspec.to_builtins(facts), indent=1) + "\n"
        (scratch / FACTS).write_text(text, encoding="utf-8")
        scratch.replace(output)
    except OSError as e:
        raise ConclugenError(f"{output}: cannot be written ({e.strerror}); free space or name another folder") from e
    finally:
        shutil.rmtree(scratch, ignore_errors=True)


def load(folder: str | Path) -> Weights:
    """Read a folder of weights and check it against its hash.

    Raises:
      ConclugenError: it is not such a folder, or is damaged.
    """
    folder = Path(folder)
    if folder.is_file():
        raise ConclugenError(
            f"{folder}: a file, expected a folder of converted weights; convert it first with conclugen convert_weights"
        )
    facts = files.read_json(folder / FACTS, _Facts, way_out=AGAIN)
    path = folder / WEIGHTS
    if not path.is_file() or files.sha256(path) != facts.weights_sha256:
        raise ConclugenError(f"{path}: missing, or not the file whose SHA-256 {FACTS} has; {AGAIN}")
    params = traverse_util.unflatten_dict(_safetensors(path), sep="/")
    tokenizer = ""
    if facts.network == "text":
        if not (folder / TOKENIZER).is_file():
            raise ConclugenError(f"{folder / TOKENIZER}: no such file; {AGAIN}")
        tokenizer = files.sha256(folder / TOKENIZER)
    return Weights(facts.network, facts.options, params, facts.weights_sha256, facts.source, folder, tokenizer)


def _read(path: Path) -> Mapping[str, Any]:
    if not path.is_file():
        raise ConclugenError(f"{path}: no such file; name the published weights")
    return _safetensors(path) if path.suffix == ".safetensors" else torch_files.read(path)


def _safetensors(path: Path) -> dict[str, np.ndarray]:
    pickles.map_file(path)
    try:
        return safetensors.load_file(path)
    except Exception as e:  # the library names only one of the kinds that it raises
        raise ConclugenError(f"{path}: not a safetensors file that can be read ({type(e).__name__}: {e})") from e
