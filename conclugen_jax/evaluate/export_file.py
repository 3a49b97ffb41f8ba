"""What an export of weights holds, and how it is read.

An export is a folder of two files: the weights as safetensors, and a JSON object with what rebuilds the model around
them. It may come from strangers: everything in it is checked, nothing in it is executed or opened as a path.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, Literal, NamedTuple

import msgspec
import numpy as np
from flax import traverse_util
from ml_collections import ConfigDict
from safetensors import numpy as safetensors

from conclugen_jax.data import manifest as manifest_lib
from conclugen_jax.data.manifest import Manifest
from conclugen_jax.errors import ConclugenError, reason
from conclugen_jax.evaluate import weights
from conclugen_jax.method import model as model_lib
from conclugen_jax.run import config as config_lib
from conclugen_jax.run import trees
from conclugen_jax.run import workdir as workdir_lib
from conclugen_jax.system import files

WEIGHTS = "weights.safetensors"
EXPORT = "export.json"
AGAIN = "ask for the export again"


class DataSet(msgspec.Struct):
    name: str
    version: str
    sha256: str


class Export(msgspec.Struct):
    """Content of ``export.json``."""

    format: Literal["conclugen_jax weights"]
    format_version: Literal[1]
    step: Annotated[int, msgspec.Meta(ge=0, lt=2**31)]
    weights_sha256: str
    parameters_sha256: str
    data_set: DataSet
    config: dict[str, Any]
    data: dict[str, Any]


class _Data(msgspec.Struct):
    modalities: list[str]
    train_split: str
    test_split: str
    standardize: bool


class _Loss(msgspec.Struct):
    contrastive_weight: float
    clustering_weight: float
    reconstruction_weight: float
    instance_weight: float


class _Clustering(msgspec.Struct):
    num_clusters: int
    metric: str


class _Configuration(msgspec.Struct):
    """What is read of the configuration of a run that is not trained further."""

    seed: int
    precision: str
    data: _Data
    model: msgspec.defstruct("_Model", list(model_lib.SETTINGS.items()))
    loss: _Loss
    clustering: _Clustering


class Hashes(NamedTuple):
    """What an export is known by.

    Attributes:
      step: of the checkpoint.
      weights: SHA-256 of the file of weights.
      parameters: :func:`conclugen_jax.run.trees.fingerprint` of the parameters, as downstream results name it.
    """

    step: int
    weights: str
    parameters: str


def read(folder: Path) -> tuple[Hashes, ConfigDict, Manifest, dict[str, Any]]:
    """Read the folder of an export.

    Returns:
      (hashes, config, manifest of the data set, variables).

    Raises:
      ConclugenError: a file cannot be read, or is not what it should be.
    """
    path = folder / EXPORT
    export = files.read_json(path, Export, way_out=f"name the folder of an export of version 1, or {AGAIN}")
    config = _config(path, export.config)
    manifest = manifest_lib.from_tree(export.data, f"{path}, 'data'", way_out=AGAIN)
    if export.data_set.sha256 != manifest.fingerprint():
        raise ConclugenError(f"{path}: 'data' is not the manifest whose hash 'data_set' has; {AGAIN}")
    hashes = Hashes(export.step, export.weights_sha256, export.parameters_sha256)
    _, template = weights.network(config, manifest, where=f"{path}: the data set")
    return hashes, config, manifest, _variables(folder / WEIGHTS, hashes, template)


def _config(path: Path, tree: dict[str, Any]) -> ConfigDict:
    try:
        known = msgspec.convert(tree, _Configuration)
        for key, value in config_lib.flatten(msgspec.to_builtins(known)):
            config_lib.check_value(key, value)
        config_lib.check_modalities(known.data.modalities)
        return without_places(config_lib.from_tree(tree, str(path)))
    # The latter three where a name is none that ConfigDict allows, or sections are nested by the hundred.
    except (ConclugenError, msgspec.ValidationError, TypeError, ValueError, RecursionError) as e:
        raise ConclugenError(f"{path}: the configuration cannot be used ({e}); {AGAIN}") from e


def without_places(config: ConfigDict) -> ConfigDict:
    """Strip local paths: they are useless to others, and may be private."""
    config = config.copy_and_resolve_references()
    present = dict(config_lib.flatten(config.to_dict()))
    config.update_from_flattened_dict({key: "" for key in workdir_lib.PLACES if key in present})
    return config


def _variables(path: Path, hashes: Hashes, template: Mapping[str, Any]) -> dict[str, Any]:
    """Read the variables in a file of weights, in the structure of a template."""
    try:
        digest = files.sha256(path)
    except OSError as e:
        raise ConclugenError(f"{path}: cannot be read ({e.strerror}); {AGAIN}") from e
    if digest != hashes.weights:
        raise ConclugenError(f"{path}: not the file whose SHA-256 {EXPORT} has; {AGAIN}")
    try:
        found = safetensors.load_file(path)
    except Exception as e:  # the library names only one of the kinds that it raises
        raise ConclugenError(f"{path}: not a safetensors file that can be read ({reason(e)}); {AGAIN}") from e
    expected = flat(template)
    if found.keys() != expected.keys():
        wrong = min(found.keys() ^ expected.keys())
        fact = "is missing" if wrong in expected else "is not part of the model"
        raise ConclugenError(f"{path}: {wrong} {fact} of the configuration in {EXPORT}; {AGAIN}")
    variables = trees.from_tree(traverse_util.unflatten_dict(found, sep="/"), template, source=str(path))
    for name, x in found.items():
        if not np.isfinite(x).all():
            raise ConclugenError(f"{path}: {name} has values that are not finite; {AGAIN}")
    if trees.fingerprint(variables["params"]) != hashes.parameters:
        raise ConclugenError(f"{path}: not the parameters whose hash {EXPORT} has; {AGAIN}")
    return variables


def flat(variables: Any) -> dict[str, Any]:
    """Return the leaves that are not empty by names such as ``params/representation/video/fc1/kernel``."""
    return {name: x for name, x in traverse_util.flatten_dict(variables, sep="/").items() if x.size}
