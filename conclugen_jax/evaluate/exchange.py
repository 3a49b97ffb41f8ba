"""Checkpoints as things to look at and to hand on: listed, verified, exported without what only training needs, imported.

An export is a folder of two files: the weights as safetensors, and a JSON object with what rebuilds the model around
them. It may come from strangers: everything in it is checked, nothing in it is executed or opened as a path.
"""

import contextlib
import datetime
import functools
import json
import os
import tempfile
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np
from flax import traverse_util
from ml_collections import ConfigDict
from safetensors import numpy as safetensors

from conclugen_jax.data import manifest as manifest_lib
from conclugen_jax.data.manifest import Manifest
from conclugen_jax.errors import ConclugenError
from conclugen_jax.evaluate import downstream, probe
from conclugen_jax.method import model as model_lib
from conclugen_jax.run import checkpoint, seals
from conclugen_jax.run import config as config_lib
from conclugen_jax.run import workdir as workdir_lib
from conclugen_jax.system import files

WEIGHTS = "weights.safetensors"
EXPORT = "export.json"
FORMAT = "conclugen_jax weights"
FORMAT_VERSION = 1

FIELDS = {
    "format": str,
    "format_version": int,
    "step": int,
    "weights_sha256": str,
    "parameters_sha256": str,
    "data_set": dict,
    "config": dict,
    "data": dict,
}
"""Of ``export.json``, with their types."""

KEYS = {
    "seed": int,
    "precision": str,
    "data.modalities": list,
    "data.train_split": str,
    "data.test_split": str,
    "data.standardize": bool,
    "model.bottleneck": list,
    "model.representation_dim": int,
    "model.projection_dim": int,
    "model.reconstruction_dim": int,
    "model.projection_sharing": str,
    "model.projection_relu": bool,
    "model.decoder_relu": bool,
    "model.norm_momentum": float,
    "model.norm_epsilon": float,
    "loss.contrastive_weight": float,
    "loss.clustering_weight": float,
    "loss.reconstruction_weight": float,
    "loss.instance_weight": float,
    "clustering.num_clusters": int,
    "clustering.metric": str,
}
"""What is read of the configuration of a run that is not trained further, with its types."""

AGAIN = "ask for the export anew"


class Hashes(NamedTuple):
    """What an export is known by.

    Attributes:
      step: of the checkpoint.
      weights: SHA-256 of the file of weights.
      parameters: :func:`conclugen_jax.run.checkpoint.fingerprint` of the parameters, as downstream results name it.
    """

    step: int
    weights: str
    parameters: str


def listing(workdir: str | Path) -> list[dict[str, Any]]:
    """The checkpoints of a run, oldest first.

    Returns:
      Of each ``step``, ``bytes`` on disk, ``saved`` (ISO 8601, UTC; None if unknown), ``loss`` (None if not recorded),
      ``newest`` and ``best`` (of least loss).

    Raises:
      ConclugenError: there are none, or they cannot be opened.
    """
    with checkpoint.Checkpoints(workdir, read_only=True) as saved:
        newest, best, steps = saved.find("newest"), saved.find("best"), saved.steps()
    rows = []
    for step in steps:
        folder = Path(workdir) / checkpoint.FOLDER / str(step)
        size = sum(p.stat().st_size for p in folder.rglob("*") if p.is_file())
        # These two are files of Orbax, which has no call that reads them alone.
        nanoseconds = _json(folder / "_CHECKPOINT_METADATA").get("commit_timestamp_nsecs")
        loss = _json(folder / "metrics" / "metrics").get("loss")
        when = nanoseconds and datetime.datetime.fromtimestamp(nanoseconds / 1e9, datetime.UTC).isoformat(
            "T", "seconds"
        )
        marks = {"newest": step == newest, "best": step == best and loss is not None}
        rows.append({"step": step, "bytes": size, "saved": when, "loss": loss, **marks})
    return rows


def _json(path: Path) -> dict[str, Any]:
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return found if isinstance(found, dict) else {}


def verify(workdir: str | Path, which: str | int = "all") -> list[dict[str, Any]]:
    """Read checkpoints again and compare them with their hashes.

    Args:
      workdir: of the run.
      which: ``newest``, ``best``, a step, or ``all``.

    Returns:
      Of each ``step`` and ``wrong``: what is wrong with it, empty if nothing is.

    Raises:
      ConclugenError: there is no such checkpoint.
    """
    folder = Path(workdir).absolute() / checkpoint.FOLDER
    steps = sorted(int(p.name) for p in folder.glob("*") if p.is_dir() and p.name.isdecimal())
    if which != "all" or not steps:
        with checkpoint.Checkpoints(workdir, read_only=True) as saved:
            steps = [saved.find("newest" if which == "all" else which)]
    wrong = {step: _wrong(folder / str(step)) for step in steps}
    # What is gone by now a run that goes on has deleted.
    return [{"step": step, "wrong": text} for step, text in wrong.items() if (folder / str(step)).is_dir()]


def _wrong(folder: Path) -> str:
    """Reads one checkpoint alone, since a damaged one beside it can keep Orbax from opening any."""
    with tempfile.TemporaryDirectory() as alone:
        (Path(alone) / checkpoint.FOLDER).mkdir()
        (Path(alone) / checkpoint.FOLDER / folder.name).symlink_to(folder)
        try:
            with checkpoint.Checkpoints(alone, read_only=True) as saved:
                saved.restore_tree(int(folder.name))
        except checkpoint.Damaged as e:
            return e.fact.partition(": ")[2]
        except ConclugenError as e:
            return f"the checkpoint is damaged ({seals.changed(folder) or str(e).partition(': ')[2]})"
    return ""


def export_weights(workdir: str | Path, output: str | Path, which: str | int = "newest") -> Hashes:
    """Write the weights of a pretraining run, and what rebuilds its model, into a folder to hand on.

    Parameters, running averages and feature statistics are exported; the optimizer's moments, the queue and the random key
    are not, nor are the paths in the configuration.

    Args:
      workdir: of the run.
      output: folder, new or empty.
      which: ``newest``, ``best`` or a step.

    Raises:
      ConclugenError: no such checkpoint, a damaged one, one of a downstream run, or a folder in use.
    """
    if (Path(workdir) / downstream.RESULT).exists():
        raise ConclugenError(f"{workdir}: a downstream run; name the pretraining run whose weights are to be exported")
    step = probe.find_step(workdir, which)
    _, variables, config = probe.load(workdir, step)
    manifest, config = workdir_lib.read_data(workdir), _without_places(config)
    with _appearing(output) as folder:
        arrays = {name: np.ascontiguousarray(x) for name, x in _flat(variables).items()}
        (folder / WEIGHTS).write_bytes(safetensors.save(arrays))  # save_file would make it readable by its owner alone
        hashes = Hashes(step, manifest_lib.sha256(folder / WEIGHTS), checkpoint.fingerprint(variables["params"]))
        facts = {
            "format": FORMAT,
            "format_version": FORMAT_VERSION,
            "step": step,
            "weights_sha256": hashes.weights,
            "parameters_sha256": hashes.parameters,
            "data_set": {"name": manifest.name, "version": manifest.version, "sha256": manifest.fingerprint()},
            "config": config.to_dict(),
            "data": json.loads(manifest.to_json()),
        }
        files.write_json(folder / EXPORT, facts)
    return hashes


def import_weights(source: str | Path, workdir: str | Path, data: str | Path | None = None) -> Hashes:
    """Make a workdir of an export, to be used, not trained further.

    Args:
      source: folder of an export.
      workdir: new or empty.
      data: folder of the data set that the run was trained on, where it is here; ``None``: it is not, and commands need
        to be told which data to use.

    Raises:
      ConclugenError: the export is damaged or not one, the folder is in use, or the data set is another one.
    """
    source = Path(source)
    try:
        hashes, config, manifest = _read(source / EXPORT)
    except RecursionError as e:
        raise ConclugenError(f"{source / EXPORT}: nested too deeply to be an export; {AGAIN}") from e
    variables = _weights(source / WEIGHTS, hashes, _template(source / EXPORT, config, manifest))
    if data is not None and manifest_lib.read(data).fingerprint() != manifest.fingerprint():
        raise ConclugenError(
            f"{data}: not the data set that the run was trained on, {manifest.name} {manifest.version} with the hash "
            f"{manifest.fingerprint()[:12]}; leave --data out, and name this one to the commands that use the weights"
        )
    config.data.path = "" if data is None else str(data)
    with _appearing(workdir) as folder:
        files.write_atomically(folder / workdir_lib.DATA, manifest.to_json())
        files.write_atomically(folder / workdir_lib.CONFIG, config_lib.to_json(config))
        files.write_json(folder / workdir_lib.IMPORTED, hashes._asdict())
        with checkpoint.Checkpoints(folder) as saved:
            saved.save(hashes.step, variables, {})
    return hashes


def _read(path: Path) -> tuple[Hashes, ConfigDict, Manifest]:
    try:
        tree = json.loads(path.read_text(encoding="utf-8"))
    except OSError as e:
        raise ConclugenError(f"{path}: cannot be read ({e.strerror}); name the folder of an export") from e
    except ValueError as e:
        raise ConclugenError(f"{path}: not valid JSON ({type(e).__name__}: {e}); {AGAIN}") from e
    found = tree if isinstance(tree, dict) else {}
    if found.get("format") != FORMAT or found.get("format_version") != FORMAT_VERSION:
        raise ConclugenError(f"{path}: not an export of format {FORMAT!r} version {FORMAT_VERSION}; {AGAIN}")
    for name, kind in FIELDS.items():
        if type(found.get(name)) is not kind:
            raise ConclugenError(f"{path}: {name!r} is missing or of another type than {kind.__name__}; {AGAIN}")
    if not 0 <= found["step"] < 2**31:
        raise ConclugenError(f"{path}: 'step' is {found['step']}; it must be between 0 and 2147483647; {AGAIN}")
    config = _config(path, found["config"])
    manifest = manifest_lib.from_tree(found["data"], f"{path}, 'data'", way_out=AGAIN)
    if found["data_set"].get("sha256") != manifest.fingerprint():
        raise ConclugenError(f"{path}: 'data' is not the manifest whose hash 'data_set' has; {AGAIN}")
    return Hashes(found["step"], found["weights_sha256"], found["parameters_sha256"]), config, manifest


def _config(path: Path, tree: dict[str, Any]) -> ConfigDict:
    flat = dict(config_lib.flatten(tree))
    try:
        for key, kind in KEYS.items():
            value = flat.get(key)
            if type(value) is not kind and not (kind is float and type(value) is int):
                raise ConclugenError(f"config.{key} is missing or of another type than {kind.__name__}")
            if kind is float and not value < 2**63:  # infinite, or an integer that JAX does not take
                raise ConclugenError(f"config.{key} is {value}; it must be less than 2**63")
            config_lib.check_value(key, value)
        config_lib.check_modalities(flat["data.modalities"])
        return _without_places(config_lib.from_json(json.dumps(tree), str(path)))
    except (ConclugenError, TypeError, ValueError) as e:  # the latter two where a name is none that ConfigDict allows
        raise ConclugenError(f"{path}: the configuration cannot be used ({e}); {AGAIN}") from e


def _without_places(config: ConfigDict) -> ConfigDict:
    """Where things lay for whoever trained the run is of no use to others, and theirs to know."""
    config = config.copy_and_resolve_references()
    present = dict(config_lib.flatten(config.to_dict()))
    config.update_from_flattened_dict({key: "" for key in workdir_lib.PLACES if key in present})
    return config


def _template(path: Path, config: ConfigDict, manifest: Manifest) -> dict[str, Any]:
    """Shapes and types of the variables of the model of a configuration."""
    names = manifest_lib.choose(
        manifest.modalities, config.data.modalities, what="modality", where=f"{path}: the data set"
    )
    model = model_lib.from_config(config, {m: manifest.modalities[m] for m in names})
    return jax.eval_shape(
        functools.partial(model_lib.initial_variables, model, jax.random.key(0), manifest.standardization)
    )


def _weights(path: Path, hashes: Hashes, template: Mapping[str, Any]) -> dict[str, Any]:
    """The variables in a file of weights, in the structure of a template."""
    if not path.is_file():
        raise ConclugenError(f"{path}: no such file; {AGAIN}")
    if manifest_lib.sha256(path) != hashes.weights:
        raise ConclugenError(f"{path}: not the file whose SHA-256 {EXPORT} has; {AGAIN}")
    try:
        found = safetensors.load_file(path)
    except Exception as e:  # the library names only one of the kinds that it raises
        raise ConclugenError(
            f"{path}: not a safetensors file that can be read ({type(e).__name__}: {e}); {AGAIN}"
        ) from e
    expected = _flat(template)
    if found.keys() != expected.keys():
        wrong = min(found.keys() ^ expected.keys())
        fact = "is missing" if wrong in expected else "is not part of the model"
        raise ConclugenError(f"{path}: {wrong} {fact} of the configuration in {EXPORT}; {AGAIN}")
    variables = checkpoint.from_tree(traverse_util.unflatten_dict(found, sep="/"), template, source=str(path))
    for name, x in found.items():
        if not np.isfinite(x).all():
            raise ConclugenError(f"{path}: {name} has values that are not finite; {AGAIN}")
    if checkpoint.fingerprint(variables["params"]) != hashes.parameters:
        raise ConclugenError(f"{path}: not the parameters whose hash {EXPORT} has; {AGAIN}")
    return variables


def _flat(variables: Any) -> dict[str, Any]:
    """Leaves that are not empty by names such as ``params/representation/video/fc1/kernel``."""
    return {name: x for name, x in traverse_util.flatten_dict(variables, sep="/").items() if x.size}


@contextlib.contextmanager
def _appearing(target: str | Path) -> Iterator[Path]:
    """A folder that gets its name when it is complete; nothing is left if it does not get there.

    Raises:
      ConclugenError: the name is in use, or the folder cannot be written.
    """
    target = Path(target).absolute()
    try:
        if target.exists() and not (target.is_dir() and not any(target.iterdir())):
            raise ConclugenError(f"{target}: exists and is not an empty folder; name one that does not exist")
        target.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(prefix=f".{target.name}-", dir=target.parent) as scratch:
            folder = Path(scratch) / target.name
            folder.mkdir()  # with the usual permissions, other than the scratch folder
            yield folder
            os.replace(folder, target)
    except OSError as e:
        raise ConclugenError(f"{target}: cannot be written ({e.strerror}); free space or name another folder") from e
