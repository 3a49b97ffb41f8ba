"""The folder of a run: one owner at a time, its configuration and its data manifest."""

import contextlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from ml_collections import ConfigDict

from conclugen_jax.data import manifest as manifest_lib
from conclugen_jax.data.manifest import Manifest
from conclugen_jax.errors import ConclugenError
from conclugen_jax.runs import config as config_lib
from conclugen_jax.runs.configuration_files import base
from conclugen_jax.runs.layout import CONFIG, DATA, IMPORTED, LOCK
from conclugen_jax.system import files, locks, processes

PLACES = "data.path", "data.test_paths", "online_probe.path", "downstream.checkpoint"
"""Keys that hold places only."""


@contextlib.contextmanager
def claim(workdir: str | Path) -> Iterator[Path]:
    """Own a workdir, created if needed, during the context; refuse a taken one. Of several processes the main one owns it."""
    files.refuse_bucket(workdir)
    workdir = Path(workdir)
    if not processes.is_main():
        yield workdir
        return
    with contextlib.ExitStack() as owned:
        try:
            workdir.mkdir(parents=True, exist_ok=True)
            owned.enter_context(locks.hold(workdir / LOCK))
            with files.replaced(workdir / ".probe") as probe:  # a full disk shows only when data is written and synced
                probe.write_bytes(bytes(65536))
            (workdir / ".probe").unlink()
        except (locks.Busy, OSError) as e:
            busy = isinstance(e, locks.Busy)
            fact = f"in use by {e}; wait for it, stop it," if busy else f"cannot be written ({e.strerror}); free it"
            raise ConclugenError(f"{workdir}: {fact} or choose another --workdir") from e
        yield workdir


def settle(
    workdir: Path, config: ConfigDict, data: Manifest, *, moved: bool = False, only_compare: bool = False
) -> None:
    """Write configuration and data manifest into a new workdir, or compare them with those of an old one.

    Raise an error that lists the differences if the workdir has another configuration or other data. Keys that a run of an
    earlier version lacks count as their defaults. With ``moved``, paths may differ, but the data set must have the same
    hashes. With ``only_compare``, write nothing.
    """
    if not processes.is_main():
        return
    changed, usual = None, config_lib.differences(ConfigDict(), base())
    if (workdir / CONFIG).exists():
        changed = [line for line in config_lib.differences(read_config(workdir), config) if line not in usual]
    if wrong := _wrong(workdir, changed, data, moved):
        raise ConclugenError(f"{wrong} or choose another --workdir")
    if only_compare:
        return
    if changed is None:
        files.write_atomically(workdir / DATA, data.to_json())
    if changed is None or changed:
        files.write_atomically(workdir / CONFIG, config_lib.to_json(config))


def _wrong(workdir: Path, changed: list[str] | None, data: Manifest, moved: bool) -> str:
    """Return why a run cannot resume in a workdir, and what to do about it; an empty text if it can."""
    if (workdir / IMPORTED).exists():
        return f"{workdir}: holds imported weights, which training cannot resume; delete them"
    if changed is None:
        has_some = any(workdir.glob("checkpoints/[0-9]*"))
        return f"{workdir / CONFIG}: missing, but there are checkpoints; restore it" if has_some else ""
    started, differences = f"{workdir}: the run here was started with", "; ".join(changed)
    elsewhere = [line for line in changed if line.startswith(tuple(f"config.{key}:" for key in PLACES))]
    if len(elsewhere) < len(changed):
        return f"{started} another configuration ({differences}); repeat that one to resume"
    if elsewhere and not moved:
        return f"{started} {differences}; repeat the command with --moved if only the place has changed,"
    if read_data(workdir).fingerprint() != data.fingerprint():
        fact = f"other data (data set {data.name} {data.version} has changed since)"
        return f"{started} {fact}; restore the data set to resume"
    return ""


def read_config(workdir: str | Path) -> ConfigDict:
    """Read the configuration of the run in a workdir."""
    path, inside = Path(workdir) / CONFIG, [p.parent for p in sorted(Path(workdir).glob(f"*/{CONFIG}"))]
    way_out = f"name the workdir of a run{f', such as {inside[0]}' if inside else ''}"
    return config_lib.from_tree(files.read_json(path, Any, way_out=way_out), str(path))


def read_data(workdir: str | Path) -> Manifest:
    """Read the manifest of the data set that the run in a workdir was started with."""
    return manifest_lib.read_file(Path(workdir) / DATA, missing="name the workdir of a run")
