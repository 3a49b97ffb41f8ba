"""Checkpoints in a workdir, by Orbax: written in the background, restored only if they fit exactly."""

import contextlib
import hashlib
import json
import logging
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import flax
import jax
import numpy as np
import orbax.checkpoint as ocp
from flax import traverse_util
from orbax.checkpoint import checkpoint_managers

from conclugen_jax import processes
from conclugen_jax.errors import ConclugenError

FOLDER = "checkpoints"


class Checkpoints:
    """The checkpoints of one run.

    A checkpoint is a tree of arrays (the state, without any device layout, so that another number of devices can go
    on with it) and a JSON object. Committed ones survive a kill at any moment. A context manager.

    Of several processes the main one has the checkpoints: the others see none and write none.
    """

    def __init__(self, workdir: str | Path, *, keep_newest: int = 1, keep_best: int = 0, read_only: bool = False):
        """Open the checkpoints of a run.

        Args:
          workdir: of the run.
          keep_newest: how many of the newest are kept.
          keep_best: how many are kept besides: those of least ``loss``.
          read_only: nothing is created, written or deleted.
        """
        self.workdir = Path(workdir)
        self._manager: ocp.CheckpointManager | None = None
        if not processes.is_main():
            return
        for name in ("absl", "asyncio"):  # Orbax reports every file it touches, and its failures more than once
            logging.getLogger(name).setLevel(logging.CRITICAL)
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
            create=not read_only and not processes.several(),
            read_only=read_only,
            cleanup_tmp_directories=not read_only,
            # Orbax waits for every process of JAX at each step of a save, unless told that it is used by this one alone.
            multiprocessing_options=ocp.options.MultiprocessingOptions(
                active_processes={0} if processes.several() else None
            ),
        )
        folder = (self.workdir / FOLDER).absolute()
        if read_only and not folder.is_dir():
            raise ConclugenError(f"{self.workdir}: no checkpoint here; name the workdir of a run that has saved one")
        if folder.exists() and not folder.is_dir():
            raise ConclugenError(f"{folder}: in the way of the checkpoints; remove it or choose another --workdir")
        with self._errors("the checkpoints cannot be opened", "mend the folder or choose another --workdir"):
            if not options.create and not read_only:  # Orbax does not create it for some processes out of several
                folder.mkdir(parents=True, exist_ok=True)
            self._manager = ocp.CheckpointManager(folder, options=options)

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

        Args:
          step: number of the checkpoint.
          state: tree of arrays.
          info: JSON object that comes back with it.
          loss: what ``best`` goes by; ``None``: never the best.
        """
        if not self._manager or step in self._manager.all_steps():
            return
        tree = to_tree(state)
        record = {"step": step, "sha256": fingerprint(tree), "info": dict(info)}
        args = ocp.args.Composite(state=ocp.args.StandardSave(tree), record=ocp.args.JsonSave(record))
        metrics = None if loss is None else {"loss": float(loss)}
        with self._errors(
            f"checkpoint of step {step} cannot be written", "free space and repeat the command to resume"
        ):
            self._manager.save(step, args=args, metrics=metrics, force=True)

    def restore(self, step: int, template: Any) -> tuple[Any, dict[str, Any]]:
        """The state of a step in the shape of a template, and its JSON object.

        Args:
          step: one of :meth:`steps`.
          template: tree of arrays or of ``jax.ShapeDtypeStruct`` with the structure wanted.

        Raises:
          ConclugenError: the checkpoint cannot be read, is not what was saved, or a path is missing, spare, or of
            another shape or type.
        """
        tree, info = self.restore_tree(step)
        return from_tree(tree, template, source=f"{self.workdir} step {step}"), info

    def restore_tree(self, step: int) -> tuple[dict[str, Any], dict[str, Any]]:
        """The state of a step as nested dicts of NumPy arrays, compared with its hash, and its JSON object."""
        older = [s for s in self.steps() if s < step]
        way_out = f"delete {self.workdir / FOLDER / str(step)} " + (
            f"to go on from step {older[-1]}" if older else "to start anew"
        )
        args = ocp.args.Composite(state=ocp.args.StandardRestore(), record=ocp.args.JsonRestore())
        with self._errors(f"checkpoint of step {step} cannot be read", way_out):
            restored = self._manager.restore(step, args=args)
            record, tree = restored["record"], restored["state"]
            if record["step"] != step or record["sha256"] != fingerprint(tree):
                raise ConclugenError(
                    f"{self.workdir / FOLDER}: checkpoint of step {step} is not what was saved; {way_out}"
                )
            return tree, record["info"]

    def wait(self) -> None:
        """Return once everything saved so far is committed."""
        if not self._manager:
            return
        with self._errors("a checkpoint cannot be written", "free space and repeat the command to resume"):
            self._manager.wait_until_finished()
            self._manager.check_for_errors()

    def __enter__(self) -> "Checkpoints":
        return self

    def __exit__(self, *_: Any) -> None:
        """Wait, then release the manager's threads."""
        try:
            self.wait()
        finally:
            if self._manager:
                self._manager.close()

    @contextlib.contextmanager
    def _errors(self, what: str, way_out: str):
        try:
            yield
        except ConclugenError:
            raise
        except Exception as e:  # Orbax and TensorStore raise many kinds
            reason = (str(e).strip() or type(e).__name__).splitlines()[0][:120]
            raise ConclugenError(f"{self.workdir / FOLDER}: {what} ({type(e).__name__}: {reason}); {way_out}") from e


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
