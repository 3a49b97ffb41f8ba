"""Checkpoints in a workdir, by Orbax: written in the background, restored only if they are whole and fit exactly."""

import contextlib
import datetime
import hashlib
import json
import logging
import math
import os
import shutil
import sys
import threading
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import flax
import jax
import numpy as np
import orbax.checkpoint as ocp
from flax import traverse_util
from orbax.checkpoint import checkpoint_managers

from conclugen_jax.errors import ConclugenError, reason
from conclugen_jax.runs.layout import CHECKPOINTS as FOLDER
from conclugen_jax.system import files, processes, progress

SUMS = "SHA256SUMS"  # file of the hashes of all files of a checkpoint, which ``sha256sum -c`` reads as well
DAMAGED = "damaged"  # folder of damaged checkpoints, as STEP-TIME
PATIENCE = 1200.0  # seconds after which a save counts as hanging


class Damaged(ConclugenError):
    """A checkpoint differs from what was saved; ``fact`` says where and how."""

    def __init__(self, fact: str):
        way_out = "name another step, or repeat the run's command, which resumes from the newest intact checkpoint"
        super().__init__(f"{fact}; {way_out}")
        self.fact = fact


class Checkpoints(contextlib.AbstractContextManager):
    """The checkpoints of one run; a context manager.

    A checkpoint is a tree of arrays and a JSON object. The arrays have no device layout, so that a run can resume on
    another number of devices. Committed checkpoints survive a kill at any moment. Each holds the hashes of its files in
    ``SHA256SUMS``. Of several processes the main one has the checkpoints: the others see none and write none, but every one
    may read those of an earlier run.
    """

    def __init__(
        self, workdir: Path, *, keep_newest: int = 1, keep_best: int = 0, max_failures: int = 1, read_only: bool = False
    ):
        """Open the checkpoints of the run in a workdir.

        So many of the newest are kept, and of those of least ``loss`` besides. ``max_failures`` saves in a row that fail raise;
        the last save of a run must not fail. With ``read_only`` nothing is created, written, moved or deleted. A folder that
        cannot be used is refused, and one without checkpoints that is only to be read.
        """
        self.workdir, self._place = Path(workdir), Path(workdir) / FOLDER
        self._folder = self._place.absolute()
        self._none_here = f"{workdir}: no checkpoint here; name the workdir of a run that has saved one"
        self._count = keep_newest + keep_best
        self._max_failures, self._failures = max_failures, []  # of the newest saves, in a row
        self._thread: threading.Thread | None = None
        self._manager: ocp.CheckpointManager | None = None
        if not (read_only or processes.is_main()):
            return
        for name in ("absl", "asyncio"):  # Orbax logs every file it touches, and its failures more than once
            logging.getLogger(name).setLevel(logging.CRITICAL)
        if read_only and not self._folder.is_dir():
            raise ConclugenError(self._none_here)
        self._options = _options(keep_newest, keep_best, read_only=read_only)
        jax.devices()  # which Orbax needs: where there are none, the error is not one of the folder
        try:
            self._open()
        except Exception as e:  # Orbax reads small files of every checkpoint, whose damage raises many kinds
            if read_only or not self._set_aside_damaged():
                way_out = "repair the folder or choose another --workdir"
                raise ConclugenError(f"{self._place}: the checkpoints cannot be opened ({_shown(e)}); {way_out}") from e
            self._open()

    def _open(self) -> None:
        if not self._options.read_only:
            self._folder.mkdir(parents=True, exist_ok=True)
        self._manager = ocp.CheckpointManager(self._folder, options=self._options)

    def check_space(self, state: Any) -> None:
        """Raise if the disk has no space for the kept checkpoints and one more; existing checkpoints count as free space."""
        if not processes.is_main():
            return
        count = self._count + 1
        size = sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(jax.eval_shape(_raw, state)))
        there = files.size(self._folder)
        free = shutil.disk_usage(self.workdir).free + there
        if free < size * count:
            one, all_of_them, left = (f"{x / 2**30:.2f} GiB" for x in (size, size * count, free))
            raise ConclugenError(
                f"{self.workdir}: {count} checkpoints of {one} need {all_of_them}, but {left} are free; free space, lower "
                "config.checkpoint.keep_newest, or choose another --workdir"
            )

    def steps(self) -> list[int]:
        """Return the steps of the committed checkpoints, oldest first."""
        return sorted(self._manager.all_steps()) if self._manager else []

    def find(self, which: str | int) -> int:
        """Return the step of the ``newest`` or ``best`` checkpoint, or the named one, a number or digits; refuse others."""
        steps = self.steps()
        if not steps:
            raise ConclugenError(self._none_here)
        best = self._manager.best_step()
        named = {"newest": steps[-1], "best": steps[-1] if best is None else best, **{str(x): x for x in steps}}
        if str(which) in named:
            return named[str(which)]
        listed = ", ".join(map(str, steps))
        raise ConclugenError(
            f"{self.workdir}: no checkpoint {which!r}; there are 'newest', 'best' and the steps {listed}"
        )

    def save(self, step: int, state: Any, info: Mapping[str, Any], *, loss: float | None = None) -> None:
        """Copy the state to the host and write it in the background, with a JSON object; skip a step that is saved already.

        The least ``loss`` makes the best checkpoint; one without is never the best. A save that fails is tried again after
        older checkpoints that nothing needs are deleted; ``ConclugenError`` once ``max_failures`` in a row have failed.
        """
        if not self._manager:
            return
        self.wait(allowed_failures=self._max_failures - 1)
        if step in self.steps():
            return
        tree = to_tree(state)
        record = {"step": step, "sha256": fingerprint(tree), "info": dict(info), "info_sha256": _json_hash(info)}
        # A daemon: a disk that does not answer must not keep the process from ending.
        self._thread = threading.Thread(target=self._save, args=(step, tree, record, loss), daemon=True)
        self._thread.start()

    def _save(self, step: int, *content: Any) -> None:
        try:
            try:
                self._commit(step, *content)
            except Exception:
                self._clear()
                self._commit(step, *content)
            self._failures = []
        except Exception as e:  # Orbax and TensorStore raise many kinds
            fact = f"checkpoint of step {step} cannot be written ({_shown(e)})"
            failure = ConclugenError(f"{self._place}: {fact}; free space and repeat the command to resume")
            self._failures = [*self._failures, failure]
            with contextlib.suppress(Exception):
                self._clear()
            if len(self._failures) < self._max_failures:
                progress.say(f"warning: {failure}; the run continues")

    def _commit(self, step: int, tree: Any, record: Mapping[str, Any], loss: float | None) -> None:
        args = ocp.args.Composite(state=ocp.args.StandardSave(tree), record=ocp.args.JsonSave(dict(record)))
        metrics = None if loss is None else {"loss": float(loss)}
        if step not in self.steps():  # else its hashes alone are still missing
            self._manager.save(step, args=args, metrics=metrics, force=True)
        seal(self._folder / str(step))

    def _clear(self) -> None:
        """Delete the remains of a failed save, and all checkpoints except the newest and the best."""
        with contextlib.suppress(Exception):
            self._manager.close()
        self._open()  # deletes unfinished checkpoints
        for step in set(self.steps()[:-1]) - {self._manager.best_step()}:
            self._manager.delete(step)

    def wait(self, *, allowed_failures: float = 0) -> None:
        """Wait until all is committed; raise if a save hangs, or if more of the newest than allowed have failed in a row."""
        if self._thread is not None:
            self._thread.join(PATIENCE)
            if self._thread.is_alive():
                fact = f"a checkpoint is still not written after {PATIENCE:.0f} s"
                raise ConclugenError(f"{self._place}: {fact}; check the disk, then repeat the command to resume")
            self._thread = None
        if len(self._failures) > allowed_failures:
            raise self._failures[-1]

    def restore_newest(self, template: Any) -> tuple[Any, dict[str, Any]] | None:
        """Return the state of the newest intact checkpoint and its JSON object; ``None`` if none was ever saved.

        The state has the structure of a template of arrays or of their shapes, or is refused. Damaged checkpoints are moved to
        ``damaged/`` beside the others, with a warning; if all are damaged, that is an error.
        """
        self.wait(allowed_failures=float("inf"))
        while steps := self.steps():
            try:
                tree, info = self.restore_tree(steps[-1])
                return from_tree(tree, template, source=f"{self.workdir} step {steps[-1]}"), info
            except Damaged as e:
                self._set_aside(steps[-1], e.fact)
        if any((self.workdir / DAMAGED).glob("*")):
            fact = f"no intact checkpoint is left, the damaged ones are in {self.workdir / DAMAGED}"
            raise ConclugenError(f"{self.workdir}: {fact}; choose another --workdir to start again")
        return None

    def restore_tree(self, step: int) -> tuple[dict[str, Any], dict[str, Any]]:
        """Return a step's NumPy arrays in nested dicts and its JSON object; ``Damaged`` if unreadable or a hash differs."""
        folder = self._place / str(step)
        if wrong := changed(folder):
            raise Damaged(f"{folder}: the checkpoint is damaged ({wrong})")
        args = ocp.args.Composite(state=ocp.args.StandardRestore(), record=ocp.args.JsonRestore())
        _ignore_late_reads()
        try:
            restored = self._manager.restore(step, args=args)
            record, tree = restored["record"], restored["state"]
            same = record["step"] == step and record["sha256"] == fingerprint(tree)
            same = same and record.get("info_sha256") in (None, _json_hash(record["info"]))
        except Exception as e:  # Orbax and TensorStore raise many kinds
            raise Damaged(f"{folder}: the checkpoint cannot be read ({_shown(e)})") from e
        if not same:
            raise Damaged(f"{folder}: the checkpoint is not what was saved as step {step}")
        return tree, record["info"]

    def _set_aside(self, step: int | str, fact: str) -> None:
        """Move a damaged checkpoint out of the way, with a warning that says what was found."""
        now = datetime.datetime.now(datetime.UTC).strftime("%Y%m%dT%H%M%S")
        target = self.workdir / DAMAGED / f"{step}-{now}"
        try:
            target.parent.mkdir(exist_ok=True)
            os.replace(self._folder / str(step), target)
        except OSError as e:
            fact = f"damaged, and cannot be moved away ({e.strerror})"
            raise ConclugenError(f"{self._place / str(step)}: {fact}; delete it to resume") from e
        progress.say(f"warning: {fact}; it was moved to {target}")
        if self._manager:
            self._manager.reload()

    def _set_aside_damaged(self) -> bool:
        """Move away all damaged checkpoints; return whether there were any."""
        found = {path: changed(path) for path in self._folder.glob("*") if path.name.isdecimal() and path.is_dir()}
        for path, wrong in found.items():
            if wrong:
                self._set_aside(path.name, f"{path}: the checkpoint is damaged ({wrong})")
        return any(found.values())

    def __exit__(self, kind: Any, *_: Any) -> None:
        """Wait and close; a failed save does not hide another error that has ended the run."""
        with contextlib.suppress(ConclugenError) if kind else contextlib.nullcontext():
            self.wait(allowed_failures=float("inf"))
            if self._manager:
                self._manager.close()
            self.wait()


def _ignore_late_reads() -> None:
    """Silence reads that end after a damaged file has stopped the restore and Orbax's event loop."""
    before = sys.unraisablehook
    if getattr(before, "__name__", "") == "hook_of_restores":
        return

    def hook_of_restores(unraisable: Any) -> None:
        if str(unraisable.exc_value) != "Event loop is closed":
            before(unraisable)

    sys.unraisablehook = hook_of_restores


def seal(folder: Path) -> None:
    """Write the hashes of all files of a finished folder; raise ``OSError`` where there is no space."""
    with files.replaced(folder / SUMS) as scratch:
        scratch.write_text("".join(f"{line}\n" for line in _sums(folder)), encoding="utf-8")


def changed(folder: Path) -> str:
    """Say which file differs from the hashes of a folder; empty if none does, or if hashes were never written."""
    try:
        if not (folder / SUMS).exists():
            return ""
        wrong = {*(folder / SUMS).read_text(encoding="utf-8").splitlines()} ^ {*_sums(folder)}
    except (OSError, UnicodeDecodeError) as e:
        return f"{SUMS} or a file beside it cannot be read: {reason(e)}"
    names = sorted(line.partition("  ")[2] for line in wrong)
    return f"{names[0] or SUMS} has changed, is missing or was added" if names else ""


def _sums(folder: Path) -> list[str]:
    """Return hash and name of the files of a folder, in order, without the hashes' own and what a killed process left."""
    kept = (p for p in folder.rglob("*") if p.is_file() and p.name != SUMS and not p.name.startswith(files.SCRATCH))
    named = sorted((str(path.relative_to(folder)), path) for path in kept)
    return [f"{files.sha256(path)}  {name}" for name, path in named]


def _loss(metrics: Any) -> float:
    """Return the loss among what was saved as metrics; infinite where a damaged file holds none."""
    loss = metrics.get("loss") if isinstance(metrics, Mapping) else None
    return loss if type(loss) in (int, float) and loss == loss else math.inf


def _options(keep_newest: int, keep_best: int, *, read_only: bool) -> ocp.CheckpointManagerOptions:
    best = checkpoint_managers.BestN(
        get_metric_fn=_loss, reverse=True, n=keep_best, keep_checkpoints_without_metrics=False
    )
    own = jax.process_index() if processes.several() else None
    return ocp.CheckpointManagerOptions(
        best_fn=_loss,
        best_mode="min",
        preservation_policy=checkpoint_managers.AnyPreservationPolicy(
            [checkpoint_managers.LatestN(keep_newest), *([best] if keep_best else [])]
        ),
        create=False,  # Orbax cannot do that for one process out of several
        read_only=read_only,
        cleanup_tmp_directories=not read_only,
        # Orbax's own thread is no daemon, and raises a failure at a later call without cleaning up.
        enable_async_checkpointing=False,
        # Unless told that one process uses it alone, Orbax waits for all of them several times a save.
        multiprocessing_options=ocp.options.MultiprocessingOptions(
            primary_host=own or 0, active_processes=None if own is None else {own}
        ),
    )


def _json_hash(value: Any) -> str:
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()


def _shown(error: Exception) -> str:
    return f"{type(error).__name__}: {reason(error, 120)}"


def to_tree(state: Any) -> dict[str, Any]:
    """Copy a state into nested dicts of NumPy arrays; random keys become their numbers, empty arrays are dropped."""
    flat = traverse_util.flatten_dict(flax.serialization.to_state_dict(_raw(state)))
    # On a CPU np.asarray would be a view of a buffer that the next step reuses.
    return traverse_util.unflatten_dict({path: np.array(x, copy=True) for path, x in flat.items() if x.size})


def from_tree(tree: Mapping[str, Any], template: Any, *, source: str) -> Any:
    """Return the state that :func:`to_tree` was given, with the structure of a template of arrays or of their shapes.

    Raise an error about ``source`` if the tree lacks a path, has an extra one, or one of another shape or type.
    """
    shapes = jax.eval_shape(_raw, template)
    expected = traverse_util.flatten_dict(flax.serialization.to_state_dict(shapes), sep="/", keep_empty_nodes=True)
    arrays = {path: x for path, x in expected.items() if hasattr(x, "shape")}
    wanted = {path: x for path, x in arrays.items() if x.size}
    found = traverse_util.flatten_dict(dict(tree), sep="/")
    ours, theirs = ({path: f"{x.dtype}{list(x.shape)}" for path, x in flat.items()} for flat in (found, wanted))
    wrong = sorted(path for path in {*ours, *theirs} if ours.get(path) != theirs.get(path))
    if wrong:
        fact = f"{wrong[0]} is {ours.get(wrong[0], 'missing')}, expected {theirs.get(wrong[0], 'none')}"
        more = f" and {len(wrong) - 1} more" if len(wrong) > 1 else ""
        raise ConclugenError(
            f"{source}: the checkpoint does not fit the model: {fact}{more}; use the configuration it was made with"
        )
    empty = {path: np.zeros(x.shape, x.dtype) for path, x in arrays.items() if path not in wanted}
    filled = traverse_util.unflatten_dict({**expected, **empty, **found}, sep="/")
    restored = flax.serialization.from_state_dict(shapes, filled)
    return jax.tree.map(lambda like, x: jax.random.wrap_key_data(x) if _is_key(like) else x, template, restored)


def fingerprint(tree: Any) -> str:
    """Return the SHA-256 over paths, types, shapes and bytes of all arrays of a tree."""
    digest = hashlib.sha256()
    for path, x in jax.tree_util.tree_leaves_with_path(tree):
        array = np.asarray(x)
        digest.update(f"{jax.tree_util.keystr(path)} {array.dtype} {array.shape}".encode())
        digest.update(np.ascontiguousarray(array).tobytes())
    return digest.hexdigest()


def _is_key(x: Any) -> bool:
    return hasattr(x, "dtype") and jax.dtypes.issubdtype(x.dtype, jax.dtypes.prng_key)


def _raw(tree: Any) -> Any:
    """Return a tree with the numbers of random keys in place of the keys."""
    return jax.tree.map(lambda x: jax.random.key_data(x) if _is_key(x) else x, tree)
