"""Checkpoints as things to look at and to hand on: listed, verified, exported without what only training needs, imported."""

import contextlib
import datetime
import json
import os
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
from safetensors import numpy as safetensors

from conclugen_jax.data import manifest as manifest_lib
from conclugen_jax.errors import ConclugenError
from conclugen_jax.evaluate import downstream, export_file, weights
from conclugen_jax.evaluate.export_file import EXPORT, WEIGHTS, Hashes
from conclugen_jax.run import checkpoint, seals, trees
from conclugen_jax.run import config as config_lib
from conclugen_jax.run import workdir as workdir_lib
from conclugen_jax.system import files


def listing(workdir: str | Path) -> list[dict[str, Any]]:
    """List the checkpoints of a run, oldest first.

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
    step = weights.find_step(workdir, which)
    _, variables, config = weights.load(workdir, step)
    manifest, config = workdir_lib.read_data(workdir), export_file.without_places(config)
    with _appearing(output) as folder:
        arrays = {name: np.ascontiguousarray(x) for name, x in export_file.flat(variables).items()}
        (folder / WEIGHTS).write_bytes(safetensors.save(arrays))  # save_file would make it readable by its owner alone
        hashes = Hashes(step, files.sha256(folder / WEIGHTS), trees.fingerprint(variables["params"]))
        export = export_file.Export(
            format="conclugen_jax weights",
            format_version=1,
            step=step,
            weights_sha256=hashes.weights,
            parameters_sha256=hashes.parameters,
            data_set=export_file.DataSet(manifest.name, manifest.version, manifest.fingerprint()),
            config=config.to_dict(),
            data=json.loads(manifest.to_json()),
        )
        files.write_json(folder / EXPORT, msgspec.to_builtins(export))
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
    hashes, config, manifest, variables = export_file.read(Path(source))
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


@contextlib.contextmanager
def _appearing(target: str | Path) -> Iterator[Path]:
    """Yield a folder that gets its name when it is complete; nothing is left if it fails.

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
