"""Checkpoints in a workdir, by Orbax: written in the background, restored only if they are whole and fit exactly."""

import contextlib
import datetime
import hashlib
import json
import logging
import math
import os
import shutil
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

from conclugen_jax.errors import ConclugenError
from conclugen_jax.run import seals
from conclugen_jax.system import processes, progress

FOLDER = "checkpoints"
DAMAGED = "damaged"
"""Where damaged checkpoints are moved, as STEP-TIME."""
PATIENCE = 1200.0
"""Seconds after which a save counts as hanging."""


class Damaged(ConclugenError):
    """A checkpoint is not what was saved.

    Attributes:
      fact: where, and what was found.
    """

    def __init__(self, fact: str):
        super().__init__(
            f"{fact}; name another step, or repeat the run's command, which goes on from the newest intact checkpoint"
        )
        self.fact = fact


class Checkpoints:
    """The checkpoints of one run.

    A checkpoint is a tree of arrays (the state, without any device layout, so that another number of devices can go
    on with it) and a JSON object. Committed ones survive a kill at any moment. Each holds the hashes of its files in
    ``SHA256SUMS``, which ``sha256sum -c`` reads too. A context manager.

    Of several processes the main one has the checkpoints: the others see none and write none.
    """

    def __init__(
        self,
        workdir: str | Path,
        *,
        keep_newest: int = 1,
        keep_best: int = 0,
        max_failures: int = 1,
        read_only: bool = False,
    ):
        """Open the checkpoints of a run.

        Args:
          workdir: of the run.
          keep_newest: how many of the newest are kept.
          keep_best: how many are kept besides: those of least ``loss``.
          max_failures: saves in a row that may fail before one raises; the last save of a run must not.
          read_only: nothing is created, written, moved or deleted.
        """
        self.workdir, self._folder = Path(workdir), (Path(workdir) / FOLDER).absolute()
        self._keep, self._max_failures, self._read_only = (keep_newest, keep_best), max_failures, read_only
        self._manager: ocp.CheckpointManager | None = None
        self._writing: threading.Thread | None = None
        self._failure: ConclugenError | None = None  # of the newest save
        self._failures = 0
        if not processes.is_main():
            return
        for name in ("absl", "asyncio"):  # Orbax reports every file it touches, and its failures more than once
            logging.getLogger(name).setLevel(logging.CRITICAL)
        if read_only and not self._folder.is_dir():
            raise ConclugenError(f"{self.workdir}: no checkpoint here; name the workdir of a run that has saved one")
        if self._folder.exists() and not self._folder.is_dir():
            raise ConclugenError(
                f"{self._folder}: in the way of the checkpoints; remove it or choose another --workdir"
            )
        try:
            self._open()
        except Exception:  # Orbax reads small files of every checkpoint, whose damage shows in many ways
            if read_only or not self._set_aside_damaged():
                with self._errors("the checkpoints cannot be opened", "mend the folder or choose another --workdir"):
                    raise
            self._open()

    def _open(self) -> None:
        keep_newest, keep_best = self._keep
        policies = [checkpoint_managers.LatestN(keep_newest)]
        if keep_best:
            policies.append(
                checkpoint_managers.BestN(
                    get_metric_fn=_loss, reverse=True, n=keep_best, keep_checkpoints_without_metrics=False
                )
            )
        options = ocp.CheckpointManagerOptions(
            best_fn=_loss,
            best_mode="min",
            preservation_policy=checkpoint_managers.AnyPreservationPolicy(policies),
            create=not self._read_only and not processes.several(),
            read_only=self._read_only,
            cleanup_tmp_directories=not self._read_only,
            enable_async_checkpointing=False,  # a thread of our own writes, and knows what became of it
            # Orbax waits for every process of JAX at each step of a save, unless told that it is used by this one alone.
            multiprocessing_options=ocp.options.MultiprocessingOptions(
                active_processes={0} if processes.several() else None
            ),
        )
        if not options.create and not self._read_only:  # Orbax does not create it for some processes out of several
            self._folder.mkdir(parents=True, exist_ok=True)
        self._manager = ocp.CheckpointManager(self._folder, options=options)

    def steps(self) -> list[int]:
        """Steps of the committed checkpoints, oldest first."""
        return sorted(self._manager.all_steps()) if self._manager else []

    def find(self, which: str | int) -> int:
        """The step of the ``newest`` or ``best`` checkpoint, or the one named, as number or digits.

        Raises:
          ConclugenError: there is no such checkpoint.
        """
        steps = self.steps()
        if not steps:
            raise ConclugenError(f"{self.workdir}: no checkpoint here; name the workdir of a run that has saved one")
        if which == "newest":
            return steps[-1]
        if which == "best":
            best = self._manager.best_step()
            return steps[-1] if best is None else best
        if str(which) in map(str, steps):
            return int(which)
        raise ConclugenError(
            f"{self.workdir}: no checkpoint {which!r}; there are 'newest', 'best' and the steps {', '.join(map(str, steps))}"
        )

    def save(self, step: int, state: Any, info: Mapping[str, Any], *, loss: float | None = None) -> None:
        """Copy the state to the host and write it in the background; a step saved before is left as it is.

        A save that fails is tried once more after older checkpoints that nothing needs are deleted.

        Args:
          step: number of the checkpoint.
          state: tree of arrays.
          info: JSON object that comes back with it.
          loss: what ``best`` goes by; ``None``: never the best.

        Raises:
          ConclugenError: ``max_failures`` saves in a row have failed.
        """
        if not self._manager:
            return
        self._join()
        if self._failures >= self._max_failures:
            raise self._failure
        if step in self.steps():
            return
        tree = to_tree(state)
        record = {"step": step, "sha256": fingerprint(tree), "info": dict(info), "info_sha256": _json_hash(info)}
        metrics = None if loss is None else {"loss": float(loss)}
        # A daemon: a disk that does not answer must not keep the process from ending.
        self._writing = threading.Thread(target=self._write, args=(step, tree, record, metrics), daemon=True)
        self._writing.start()

    def _write(self, step: int, tree: Any, record: Mapping[str, Any], metrics: Mapping[str, float] | None) -> None:
        try:
            try:
                self._commit(step, tree, record, metrics)
            except Exception:
                self._clear()
                self._commit(step, tree, record, metrics)
            self._failure, self._failures = None, 0
        except Exception as e:  # Orbax and TensorStore raise many kinds
            reason = (str(e).strip() or type(e).__name__).splitlines()[0][:120]
            self._failure = ConclugenError(
                f"{self.workdir / FOLDER}: checkpoint of step {step} cannot be written ({type(e).__name__}: {reason}); free "
                "space and repeat the command to resume"
            )
            self._failures += 1
            with contextlib.suppress(Exception):
                self._clear()
            if self._failures < self._max_failures:
                progress.say(f"warning: {self._failure}; the run goes on")

    def _commit(self, step: int, tree: Any, record: Mapping[str, Any], metrics: Mapping[str, float] | None) -> None:
        args = ocp.args.Composite(state=ocp.args.StandardSave(tree), record=ocp.args.JsonSave(dict(record)))
        self._manager.save(step, args=args, metrics=metrics, force=True)
        seals.write(self._folder / str(step))

    def _clear(self) -> None:
        """Delete what a failed save has left, and the checkpoints beside the newest and the best; open anew."""
        with contextlib.suppress(Exception):
            self._manager.close()
        for path in self._folder.iterdir():
            if path.is_dir() and not path.name.isdecimal():
                shutil.rmtree(path, ignore_errors=True)
        self._open()
        steps = self.steps()
        for step in set(steps) - {steps[-1] if steps else None, self._manager.best_step()}:
            self._manager.delete(step)

    def restore_newest(self, template: Any) -> tuple[Any, dict[str, Any]] | None:
        """The newest checkpoint that is intact, as of :meth:`restore`; ``None`` if none was ever saved.

        Damaged ones are moved to ``damaged/`` beside the checkpoints, and said.

        Raises:
          ConclugenError: all are damaged, or the newest intact one does not fit.
        """
        self._join()
        damaged = None
        while steps := self.steps():
            try:
                return self.restore(steps[-1], template)
            except Damaged as e:
                damaged = damaged or e
                moved = self._set_aside(steps[-1])
                progress.say(f"warning: {e.fact}; it was moved to {moved}")
        if damaged or any((self.workdir / DAMAGED).glob("*")):
            raise ConclugenError(
                f"{self.workdir}: no intact checkpoint is left, the damaged ones are in {self.workdir / DAMAGED}; choose "
                "another --workdir to start anew"
            )
        return None

    def restore(self, step: int, template: Any) -> tuple[Any, dict[str, Any]]:
        """The state of a step in the shape of a template, and its JSON object.

        Args:
          step: one of :meth:`steps`.
          template: tree of arrays or of ``jax.ShapeDtypeStruct`` with the structure wanted.

        Raises:
          Damaged: the checkpoint cannot be read or is not what was saved.
          ConclugenError: a path is missing, spare, or of another shape or type.
        """
        tree, info = self.restore_tree(step)
        return from_tree(tree, template, source=f"{self.workdir} step {step}"), info

    def restore_tree(self, step: int) -> tuple[dict[str, Any], dict[str, Any]]:
        """The state of a step as nested dicts of NumPy arrays and its JSON object, compared with all hashes.

        Raises:
          Damaged: the checkpoint cannot be read or is not what was saved.
        """
        folder = self.workdir / FOLDER / str(step)
        wrong = seals.changed(folder)
        if wrong:
            raise Damaged(f"{folder}: the checkpoint is damaged ({wrong})")
        args = ocp.args.Composite(state=ocp.args.StandardRestore(), record=ocp.args.JsonRestore())
        try:
            restored = self._manager.restore(step, args=args)
            record, tree = restored["record"], restored["state"]
            same = record["step"] == step and record["sha256"] == fingerprint(tree)
            same = same and record.get("info_sha256") in (None, _json_hash(record["info"]))
        except Exception as e:  # Orbax and TensorStore raise many kinds
            reason = (str(e).strip() or type(e).__name__).splitlines()[0][:120]
            raise Damaged(f"{folder}: the checkpoint cannot be read ({type(e).__name__}: {reason})") from e
        if not same:
            raise Damaged(f"{folder}: the checkpoint is not what was saved as step {step}")
        return tree, record["info"]

    def _set_aside(self, step: int | str) -> Path:
        """Move a damaged checkpoint out of the way; where it is now."""
        now = datetime.datetime.now(datetime.UTC).strftime("%Y%m%dT%H%M%S")
        target = self.workdir / DAMAGED / f"{step}-{now}"
        try:
            target.parent.mkdir(exist_ok=True)
            os.replace(self._folder / str(step), target)
        except OSError as e:
            raise ConclugenError(
                f"{self._folder / str(step)}: damaged, and cannot be moved away ({e.strerror}); delete it to go on"
            ) from e
        if self._manager:
            self._manager.reload()
        return target

    def _set_aside_damaged(self) -> bool:
        """Move away all checkpoints that are not what was saved; whether there were any."""
        found = [p for p in self._folder.glob("*") if p.is_dir() and p.name.isdecimal() and seals.changed(p)]
        for path in found:
            wrong = seals.changed(path)
            progress.say(
                f"warning: {path}: the checkpoint is damaged ({wrong}); it was moved to {self._set_aside(path.name)}"
            )
        return bool(found)

    def wait(self) -> None:
        """Return once everything saved so far is committed.

        Raises:
          ConclugenError: the newest save has failed.
        """
        self._join()
        if self._failure:
            raise self._failure

    def _join(self) -> None:
        if self._writing:
            self._writing.join(PATIENCE)
            if self._writing.is_alive():
                raise ConclugenError(
                    f"{self.workdir / FOLDER}: a checkpoint is still not written after {PATIENCE:.0f} s; the disk does not "
                    "answer, repeat the command when it does"
                )
            self._writing = None

    def __enter__(self) -> "Checkpoints":
        return self

    def __exit__(self, kind: Any, *_: Any) -> None:
        """Wait, then release what the manager holds; a failed save does not hide what has ended the run."""
        try:
            self._join()
        except ConclugenError as e:
            self._failure = e
        if self._manager and self._writing is None:
            self._manager.close()
        if kind is None and self._failure:
            raise self._failure

    @contextlib.contextmanager
    def _errors(self, what: str, way_out: str):
        try:
            yield
        except ConclugenError:
            raise
        except Exception as e:  # Orbax and TensorStore raise many kinds
            reason = (str(e).strip() or type(e).__name__).splitlines()[0][:120]
            raise ConclugenError(f"{self.workdir / FOLDER}: {what} ({type(e).__name__}: {reason}); {way_out}") from e


def check_space(workdir: Path, state: Any, *, count: int) -> None:
    """Refuse a run whose checkpoints will not find room.

    Args:
      workdir: of the run.
      state: tree of arrays or their shapes.
      count: checkpoints that are kept at a time, and the one being written.

    Raises:
      ConclugenError: the disk has less space left than they take, those that are there already included.
    """
    size = sum(
        math.prod(x.shape) * x.dtype.itemsize for x in jax.tree.leaves(jax.tree.map(_raw_like, state, is_leaf=_is_key))
    )
    there = sum(p.stat().st_size for p in (workdir / FOLDER).rglob("*") if p.is_file())
    free = shutil.disk_usage(workdir).free + there
    if free < size * count:
        one, all_of_them, left = (f"{x / 2**30:.2f} GiB" for x in (size, size * count, free))
        raise ConclugenError(
            f"{workdir}: {count} checkpoints of {one} need {all_of_them}, but {left} are free; free space, lower "
            "config.checkpoint.keep_newest, or choose another --workdir"
        )


def _json_hash(value: Any) -> str:
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()


def of_main(state: Any, info: Mapping[str, Any]) -> tuple[Any, dict[str, Any]]:
    """The state and the JSON object that process 0 has, on every process; as they are where there is one."""
    if not processes.several():
        return state, dict(info)
    tree = processes.of_main(to_tree(state))
    return from_tree(tree, state, source="process 0"), json.loads(processes.text_of_main(json.dumps(info)))


def fingerprint(tree: Any) -> str:
    """SHA-256 over paths, types, shapes and bytes of all arrays of a tree."""
    digest = hashlib.sha256()
    for path, x in jax.tree_util.tree_leaves_with_path(tree):
        array = np.asarray(x)
        digest.update(f"{jax.tree_util.keystr(path)} {array.dtype} {array.shape}".encode())
        digest.update(np.ascontiguousarray(array).tobytes())
    return digest.hexdigest()


def to_tree(state: Any) -> dict[str, Any]:
    """A state as nested dicts of NumPy arrays of its own; random keys as their numbers, nothing empty."""
    tree = flax.serialization.to_state_dict(jax.tree.map(_raw, state, is_leaf=_is_key))
    flat = traverse_util.flatten_dict(tree)
    # A copy: on a CPU np.asarray would look into a buffer that the next step is about to reuse.
    return traverse_util.unflatten_dict({path: np.array(x, copy=True) for path, x in flat.items() if x.size})


def from_tree(tree: Mapping[str, Any], template: Any, *, source: str) -> Any:
    """The inverse of :func:`to_tree`, in the structure of a template.

    Raises:
      ConclugenError: a path is missing, spare, or of another shape or type; all of them are counted, the first is
        named.
    """
    raw_template = jax.tree.map(_raw_like, template, is_leaf=_is_key)
    expected = traverse_util.flatten_dict(
        flax.serialization.to_state_dict(raw_template), sep="/", keep_empty_nodes=True
    )
    found = traverse_util.flatten_dict(dict(tree), sep="/")
    wanted = {path: x for path, x in expected.items() if x is not traverse_util.empty_node and x.size}
    empty = {
        path: np.zeros(x.shape, x.dtype) for path, x in expected.items() if path not in wanted and hasattr(x, "shape")
    }
    wrong = [f"{path} is missing" for path in sorted(wanted.keys() - found.keys())]
    wrong += [f"{path} is not part of this model" for path in sorted(found.keys() - wanted.keys())]
    wrong += [
        f"{path} is {found[path].dtype}{list(found[path].shape)}, expected {x.dtype}{list(x.shape)}"
        for path, x in sorted(wanted.items())
        if path in found and (found[path].shape != x.shape or found[path].dtype != x.dtype)
    ]
    if wrong:
        more = f" and {len(wrong) - 1} more" if len(wrong) > 1 else ""
        raise ConclugenError(
            f"{source}: the checkpoint does not fit the model: {wrong[0]}{more}; use the configuration it was made with"
        )
    filled = traverse_util.unflatten_dict({**expected, **empty, **{path: found[path] for path in wanted}}, sep="/")
    restored = flax.serialization.from_state_dict(raw_template, filled)
    return jax.tree.map(
        lambda like, x: jax.random.wrap_key_data(x) if _is_key(like) else x,
        template,
        restored,
        is_leaf=_is_key,
    )


def _loss(metrics: Mapping[str, float]) -> float:
    return metrics["loss"]


def _is_key(x: Any) -> bool:
    return hasattr(x, "dtype") and jax.dtypes.issubdtype(x.dtype, jax.dtypes.prng_key)


def _raw(x: Any) -> Any:
    return jax.random.key_data(x) if _is_key(x) else x


def _raw_like(x: Any) -> Any:
    shaped = jax.eval_shape(jax.random.key_data, x) if _is_key(x) else x
    return jax.ShapeDtypeStruct(shaped.shape, shaped.dtype)
