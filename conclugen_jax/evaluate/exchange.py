"""List, verify, export and import checkpoints; an export has no data that only training needs.

An export is a folder of two files: the weights as safetensors, and a JSON object with what rebuilds the model around
them. Exports may come from untrusted sources. Imports check all content, execute nothing, and open no path from it.
"""

import contextlib
import datetime
import json
import os
import tempfile
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Annotated, Any, Literal, NamedTuple

import msgspec
import numpy as np
from flax import traverse_util
from ml_collections import ConfigDict
from safetensors import numpy as safetensors

from conclugen_jax.data import manifest as manifest_lib, persons as persons_lib, shards
from conclugen_jax.data.files import stand_in
from conclugen_jax.errors import ConclugenError
from conclugen_jax.evaluate import bank as bank_lib, embedding, splits, weights
from conclugen_jax.method import model as model_lib
from conclugen_jax.runs import checkpoint, config as config_lib, workdir as workdir_lib
from conclugen_jax.system import files

WEIGHTS = "weights.safetensors"
EXPORT = "export.json"
AGAIN = "ask for the export again"


class Export(msgspec.Struct):
    """Content of ``export.json``."""

    format: Literal["conclugen_jax weights"]
    format_version: Literal[1]
    step: Annotated[int, msgspec.Meta(ge=0, lt=2**31)]
    weights_sha256: str
    parameters_sha256: str
    data_set: dict[str, str]  # name, version, sha256
    config: dict[str, Any]
    data: dict[str, Any]
    bank_sha256: str = ""  # of the file of training rows that vectors are smoothed by; empty: there is none


class Hashes(NamedTuple):
    """The identity of an export, as in downstream results: step, SHA-256 of the file, fingerprint of the parameters."""

    step: int
    weights: str
    parameters: str
    bank: str = ""  # SHA-256 of the file of training rows; empty without one


def listing(workdir: str | Path) -> list[dict[str, Any]]:
    """List the checkpoints of a run, oldest first.

    Of each: ``step``, ``bytes`` on disk, ``saved`` (ISO 8601, UTC; None if unknown), ``loss`` (None if not recorded),
    ``newest`` and ``best`` (of least loss).
    """
    with checkpoint.Checkpoints(workdir, read_only=True) as saved:
        newest, best, steps = saved.find("newest"), saved.find("best"), saved.steps()
    rows = []
    for step in steps:
        folder = Path(workdir) / checkpoint.FOLDER / str(step)
        size = files.size(folder)
        # These two are files of Orbax, which has no call that reads them alone.
        when = _facts(folder / "_CHECKPOINT_METADATA").commit_timestamp_nsecs
        when = when and datetime.datetime.fromtimestamp(when / 1e9, datetime.UTC).isoformat("T", "seconds")
        loss = _facts(folder / "metrics" / "metrics").loss
        marks = {"newest": step == newest, "best": step == best and loss is not None}
        rows.append({"step": step, "bytes": size, "saved": when, "loss": loss, **marks})
    return rows


class _Facts(msgspec.Struct):
    commit_timestamp_nsecs: Annotated[int, msgspec.Meta(ge=0, le=2**63 - 1)] | None = None
    loss: float | None = None


def _facts(path: Path) -> _Facts:
    """Read a small JSON file of a checkpoint; empty if it is missing or damaged."""
    with contextlib.suppress(ConclugenError):
        return files.read_json(path, _Facts, way_out="")
    return _Facts()


def verify(workdir: str | Path, which: str | int = "all") -> list[dict[str, Any]]:
    """Read checkpoints again, ``newest``, ``best``, a step, or ``all``, and compare them with their hashes.

    Of each: ``step`` and ``wrong``, what is wrong with it, empty if nothing is.
    """
    folder = Path(workdir).absolute() / checkpoint.FOLDER
    steps = sorted(int(p.name) for p in folder.glob("*") if p.is_dir() and p.name.isdecimal())
    if which != "all" or not steps:
        with checkpoint.Checkpoints(workdir, read_only=True) as saved:
            steps = [saved.find("newest" if which == "all" else which)]
    wrong = {step: _wrong(folder / str(step)) for step in steps}
    # A run that is still training may have deleted some by now.
    return [{"step": step, "wrong": text} for step, text in wrong.items() if (folder / str(step)).is_dir()]


def _wrong(folder: Path) -> str:
    """Read one checkpoint alone, since a damaged one beside it can keep Orbax from opening any."""
    with tempfile.TemporaryDirectory() as alone:
        (Path(alone) / checkpoint.FOLDER).mkdir()
        (Path(alone) / checkpoint.FOLDER / folder.name).symlink_to(folder)
        try:
            with checkpoint.Checkpoints(alone, read_only=True) as saved:
                saved.restore_tree(int(folder.name))
        except checkpoint.Damaged as e:
            return e.fact.partition(": ")[2]
        except ConclugenError as e:
            return f"the checkpoint is damaged ({checkpoint.changed(folder) or str(e).partition(': ')[2]})"
    return ""


def export_weights(
    workdir: str | Path, output: str | Path, which: str | int = "newest", *, bank: bool = False
) -> Hashes:
    """Write the weights of a pretraining run, and what rebuilds its model, into a new or empty folder to hand on.

    Parameters, running averages and feature statistics of the checkpoint ``newest``, ``best`` or a step are exported; the
    optimizer's moments, the queue and the random key are not, nor are the paths in the configuration, nor the persons of a
    run that standardises by person. With ``bank`` the vectors of the training rows are, by which such a run smooths vectors;
    without it the same bank is made of the data set (``embedding.training_rows``).
    """
    step = weights.find_step(workdir, which)
    _, variables, config = weights.load(workdir, step)
    if bank and not config.evaluation.smoothing_neighbours:
        fact = "config.evaluation.smoothing_neighbours is 0, so that its vectors need no training rows"
        raise ConclugenError(f"{workdir}: {fact}; leave --bank out")
    manifest = workdir_lib.read_data(workdir)
    with _appearing(output) as folder:
        flat = traverse_util.flatten_dict(variables, sep="/")  # such as params/representation/video/fc1/kernel
        arrays = {name: np.ascontiguousarray(x) for name, x in flat.items() if x.size}
        (folder / WEIGHTS).write_bytes(safetensors.save(arrays))  # save_file would make it readable by its owner alone
        if bank:
            bank_lib.write(embedding.training_rows(embedding.load(workdir, step)), folder / bank_lib.FILE)
        of_bank = files.sha256(folder / bank_lib.FILE) if bank else ""
        hashes = Hashes(step, files.sha256(folder / WEIGHTS), checkpoint.fingerprint(variables["params"]), of_bank)
        data_set = {"name": manifest.name, "version": manifest.version, "sha256": manifest.fingerprint()}
        described = data_set, _without_places(config).to_dict(), json.loads(manifest.to_json())
        export = Export("conclugen_jax weights", 1, *hashes[:3], *described, of_bank)
        files.write_json(folder / EXPORT, msgspec.to_builtins(export))
    return hashes


def import_weights(source: str | Path, workdir: str | Path, data: str | Path | None = None) -> Hashes:
    """Import an export into a new or empty workdir. Its weights can be used, but not trained further.

    ``data``: folder of the data set that the run was trained on, of which statistics by person are made again; ``None``: it is
    not here, and commands that use the weights need one named. Damaged exports, folders in use and other data sets are refused.
    """
    path = Path(source) / EXPORT
    export = files.read_json(path, Export, way_out=f"name the folder of an export of version 1, or {AGAIN}")
    config = _config(path, export.config)
    manifest = manifest_lib.from_tree(export.data, f"{path}, 'data'", way_out=AGAIN)
    if export.data_set.get("sha256") != manifest.fingerprint():
        raise ConclugenError(f"{path}: 'data' is not the manifest whose hash 'data_set' has; {AGAIN}")
    hashes = Hashes(export.step, export.weights_sha256, export.parameters_sha256, export.bank_sha256)
    model, template = weights.network(config, manifest, where=f"{path}: the data set")
    variables = _variables(path.with_name(WEIGHTS), hashes, template)
    rows = (
        _bank(path.with_name(bank_lib.FILE), hashes, model, manifest, config.data.train_split) if hashes.bank else None
    )
    if data is not None and manifest_lib.read(data).fingerprint() != manifest.fingerprint():
        wanted = f"{manifest.name} {manifest.version} with the hash {manifest.fingerprint()[:12]}"
        raise ConclugenError(
            f"{data}: not the data set that the run was trained on, {wanted}; name that, or leave --data out"
        )
    config.data.path = "" if data is None else str(data)
    with _appearing(workdir) as folder:
        files.write_atomically(folder / workdir_lib.DATA, manifest.to_json())
        files.write_atomically(folder / workdir_lib.CONFIG, config_lib.to_json(config))
        files.write_json(folder / workdir_lib.IMPORTED, hashes._asdict())
        with checkpoint.Checkpoints(folder) as saved:
            saved.save(hashes.step, variables, {})
        if rows is not None:
            bank_lib.write(rows, folder / bank_lib.FILE)
        if data is not None and weights.by_persons(config):
            persons = splits.fit_persons(config, shards.open_dataset(data), list(config.data.modalities))
            persons.write(folder / persons_lib.FILE)
    return hashes


def _config(path: Path, tree: dict[str, Any]) -> ConfigDict:
    try:
        config = config_lib.from_tree(tree, "'config'")
        config_lib.check_modalities(config.data.modalities)
        return _without_places(config)
    except (ConclugenError, RecursionError) as e:  # the latter of sections nested by the hundred
        raise ConclugenError(f"{path}: the configuration cannot be used ({e}); {AGAIN}") from e


def _without_places(config: ConfigDict) -> ConfigDict:
    """Strip local paths: they are useless to others, and may be private."""
    config = config.copy_and_resolve_references()
    present = dict(config_lib.flatten(config.to_dict()))
    config.update_from_flattened_dict({key: type(present[key])() for key in workdir_lib.PLACES if key in present})
    return config


def _variables(path: Path, hashes: Hashes, template: Mapping[str, Any]) -> dict[str, Any]:
    """Read the variables in a file of weights, in the structure of a template."""

    def check(right: Any, fact: str) -> None:
        if not right:
            raise ConclugenError(f"{path}: {fact}; {AGAIN}")

    _check_hash(path, hashes.weights)
    found = bank_lib.tensors(path, AGAIN)
    variables = checkpoint.from_tree(found, template, source=str(path))
    for name, x in found.items():
        check(np.isfinite(x).all(), f"{name} has values that are not finite")
    check(
        checkpoint.fingerprint(variables["params"]) == hashes.parameters, f"not the parameters whose hash {EXPORT} has"
    )
    return variables


def _bank(
    path: Path, hashes: Hashes, model: model_lib.ConCluGen, manifest: manifest_lib.Manifest, split: str
) -> bank_lib.TrainingRows:
    _check_hash(path, hashes.bank)
    return bank_lib.read(path, model.vector_dims, manifest, split, way_out=AGAIN)


def _check_hash(path: Path, expected: str) -> None:
    try:
        digest = files.sha256(path)
    except OSError as e:
        raise ConclugenError(f"{path}: cannot be read ({e.strerror}); {AGAIN}") from e
    if digest != expected:
        raise ConclugenError(f"{path}: {stand_in(path) or f'not the file whose SHA-256 {EXPORT} has; {AGAIN}'}")


@contextlib.contextmanager
def _appearing(target: str | Path) -> Iterator[Path]:
    """Yield a folder that gets its name when it is complete; nothing is left if it fails."""
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
