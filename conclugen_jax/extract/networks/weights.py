"""Read and write folders of converted weights: safetensors, a JSON file that says what they are, a tokenizer for text."""

import dataclasses
import hashlib
import json
import os
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

import msgspec
from flax import traverse_util
from safetensors import numpy as safetensors

from conclugen_jax.data import pickles
from conclugen_jax.data.files import stand_in
from conclugen_jax.errors import ConclugenError
from conclugen_jax.extract.networks import conversion, davenet, resnet, text_encoder, torch_files
from conclugen_jax.system import files

WEIGHTS, FACTS, TOKENIZER = "weights.safetensors", "network.json", "tokenizer.json"
FORMAT, FORMAT_VERSION = "conclugen_jax backbone", 1

NETWORKS = (*resnet.NETWORKS, "resdavenet", "text", "mtcnn")  # what ``launch/convert_weights.py --network`` takes

PARTS = {"text": ("model.safetensors", "config.json", TOKENIZER), "mtcnn": ("pnet.pt", "rnet.pt", "onet.pt")}
"""Network -> files that the folder of its published weights holds; those of the others are one file."""

AGAIN = "convert the weights again with conclugen convert_weights"


NoOptions = msgspec.defstruct("NoOptions", (), forbid_unknown_fields=True)  # of networks whose name says everything

OPTIONS = dict.fromkeys(
    (*NETWORKS, "efficientnet_lite0", "face_expression", "face_landmarks", "whisper_tiny"), NoOptions
)
OPTIONS |= {"text": text_encoder.Options, "resdavenet": davenet.Options}
"""Network -> type of its options, which folders of converted weights store."""


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
    """Converted weights."""

    network: str  # one of NETWORKS
    options: dict[str, Any]  # attributes of the network's module
    params: dict[str, Any]  # its variables, as they nest in the module
    sha256: str  # of the file of weights
    source: dict[str, str]  # published files that they were made of: name -> SHA-256
    folder: Path  # that holds them

    def provenance(self) -> dict[str, Any]:
        """Return what a data set stores of the weights that it was made with."""
        facts = {"network": self.network, "sha256": self.sha256, "source": self.source, "options": self.options}
        return facts | ({"tokenizer": files.sha256(self.folder / TOKENIZER)} if self.network == "text" else {})


def convert(
    network: str,  # one of NETWORKS
    source: Path,  # file of torch.save or safetensors; for text and mtcnn a folder with the files in PARTS
    output: Path,  # new or empty folder
    *,
    entry: str = "",  # of the file that holds the tensors, if there are several
    attribution: str = "",  # author and licence, stored with the weights
) -> list[str]:
    """Turn published weights into a folder of ours, all or nothing; return the names of tensors that were not needed.

    A ConclugenError names a file that cannot be read, a tensor that is missing, spare or misshapen, or a folder in use.
    """
    if network not in NETWORKS:
        raise ConclugenError(f"network {network!r} is unknown; there are {', '.join(NETWORKS)}")
    paths = [source / name for name in PARTS[network]] if network in PARTS else [source]
    for path in paths:
        if not path.is_file():
            raise ConclugenError(f"{path}: no such file; name the published weights of {network}")
    options, prefix, further = {}, "", []
    if network == "text":
        family, encoder = conversion.read_config(paths[1])
        options, prefix, further = msgspec.to_builtins(encoder), f"{family}.", paths[1:]
    found = [conversion.Tensors(_read(p), str(p), entry=entry, prefix=prefix) for p in paths if p not in further]
    if network == "mtcnn":
        params = conversion.convert_mtcnn(found)
    elif network == "text":
        params = conversion.convert_text(*found, family, encoder)
    elif network == "resdavenet":
        params, options = conversion.convert_davenet(*found)
    else:
        params = conversion.convert_resnet(*found, *resnet.NETWORKS[network])
    left_out = [name for tensors in found for name in tensors.finish()]
    content = safetensors.save(traverse_util.flatten_dict(params, sep="/"))
    digest, hashes = hashlib.sha256(content).hexdigest(), {path.name: files.sha256(path) for path in paths}
    facts = _Facts(FORMAT, FORMAT_VERSION, network, options, digest, hashes, left_out, attribution)
    text = json.dumps(msgspec.to_builtins(facts), indent=1) + "\n"
    _write(output, {WEIGHTS: content, FACTS: text.encode()} | {path.name: path.read_bytes() for path in further[1:]})
    return left_out


def _write(output: Path, contents: Mapping[str, bytes]) -> None:
    """Write a folder of files, all or nothing."""
    scratch = output.parent / f".{output.name}-{os.getpid()}"
    try:
        if output.exists() and not (output.is_dir() and not any(output.iterdir())):
            raise ConclugenError(f"{output}: exists and is not an empty folder; name one that does not exist")
        scratch.mkdir(parents=True)
        for name, content in contents.items():
            (scratch / name).write_bytes(content)
        scratch.replace(output)
    except OSError as e:
        raise ConclugenError(f"{output}: cannot be written ({e.strerror}); free space or name another folder") from e
    finally:
        shutil.rmtree(scratch, ignore_errors=True)


def load(folder: str | Path) -> Weights:
    """Read a folder of weights and check it against its hash; a ConclugenError says what is missing or damaged."""
    folder = Path(folder)
    facts, path = files.read_json(folder / FACTS, _Facts, way_out=AGAIN), folder / WEIGHTS
    if not path.is_file() or files.sha256(path) != facts.weights_sha256:
        why = stand_in(path) or f"missing, or not the file whose SHA-256 {FACTS} has; {AGAIN}"
        raise ConclugenError(f"{path}: {why}")
    params = traverse_util.unflatten_dict(_read(path), sep="/")
    return Weights(facts.network, facts.options, params, facts.weights_sha256, facts.source, folder)


def _read(path: Path) -> Mapping[Any, Any]:
    if path.suffix != ".safetensors":
        return torch_files.read(path)
    pickles.map_file(path)  # refuses what is no regular file
    try:
        return safetensors.load_file(path)
    except Exception as e:  # the library names only one of the kinds that it raises
        why = stand_in(path) or f"not a safetensors file that can be read ({type(e).__name__}: {e})"
        raise ConclugenError(f"{path}: {why}") from e
