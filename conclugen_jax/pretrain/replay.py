"""Save a skipped step in one file with all that it needs, and repeat it operation by operation."""

import functools
import io
import json
import math
import traceback
import zipfile
from pathlib import Path
from typing import Any, NamedTuple

import jax
import msgspec
import numpy as np
from flax import traverse_util

import conclugen_jax
from conclugen_jax.errors import ConclugenError, reason
from conclugen_jax.method import model as model_lib
from conclugen_jax.method.train_state import TrainState
from conclugen_jax.pretrain import setup
from conclugen_jax.runs import checkpoint, config as config_lib
from conclugen_jax.system import files, processes, progress
from conclugen_jax.train import optimizer as optimizer_lib, parallel

FOLDER = "bad_steps"
KEPT = 3
"""Files of a run, the newest; each has the size of a checkpoint."""
PACKAGE = Path(conclugen_jax.__file__).parent
FACTS = "facts"
"""Array of the file with JSON: ``version``, ``step``, ``ids`` of its rows, ``config``, ``dims``, and how it was trained."""
VERSION = 1


class Facts(msgspec.Struct):
    """The required content of :data:`FACTS`."""

    step: int
    ids: list[str]
    config: dict[str, Any]
    dims: dict[str, int]
    steps_per_epoch: int
    cluster: bool


class Replay(NamedTuple):
    """The results of repeating a step."""

    step: int
    metrics: dict[str, float]  # of the compiled step, as in ``metrics.jsonl``
    not_finite: dict[str, list[str]]  # modality -> ids of rows whose features are not finite
    first: str  # the first operation whose result is not a number, and the line that it stands in; empty: none


def keep(run: setup.Setup, state: TrainState, step: int) -> Path:
    """Write the state before a step (counted from 1) and its batch. All processes must call this; only one writes.

    A full disk causes only a warning, since the run itself does not need the file.
    """
    state, folder = parallel.whole(state, run.optimizer), run.workdir / FOLDER
    path = folder / f"{step}.npz"
    if not processes.is_main() or path.exists():
        return path
    indices = run.batches.indices(step)
    batch = run.batches.batch(step)
    statistics = run.step.keywords["statistics"]
    facts = {
        "version": VERSION,
        "step": step,
        "ids": run.stream.names(indices)[0].tolist(),
        "config": run.config.to_dict(),
        "dims": dict(run.model.feature_dims),
        "steps_per_epoch": run.batches.steps_per_epoch,
        "cluster": run.clusters((step - 1) // run.batches.steps_per_epoch),
    }
    tree = {"state": checkpoint.to_tree(state), "batch": batch}
    tree |= {"statistics": dict(zip(("mean", "scale"), statistics, strict=True))} if statistics else {}
    arrays = {name: np.asarray(x) for name, x in traverse_util.flatten_dict(tree, sep="/").items()}
    content = io.BytesIO()
    np.savez(content, **arrays, **{FACTS: np.array(json.dumps(facts))})
    try:
        folder.mkdir(exist_ok=True)
        files.write_atomically(path, content.getvalue())
        for old in sorted(folder.glob("*.npz"), key=lambda p: p.stat().st_mtime)[:-KEPT]:
            old.unlink()
    except (ConclugenError, OSError) as e:
        progress.say(f"warning: step {step} cannot be kept for conclugen replay ({reason(e)})")
    return path


def replay(path: str | Path) -> Replay:
    """Repeat a step that :func:`keep` wrote, on one device, once compiled and once operation by operation.

    Raises:
      ConclugenError: the file does not exist, is damaged, or is of another version.
    """
    state, batch, facts, statistics = _read(Path(path))
    config = config_lib.from_tree(facts["config"], str(path))
    model = model_lib.from_config(config, facts["dims"])
    optimizer, schedule = optimizer_lib.from_config(config, facts["steps_per_epoch"])
    of_features = state.get("feature_stats", {}).get
    fresh = functools.partial(setup.fresh_state, config, model, optimizer, of_features, state.get("neighbours"))
    of_loss = {"model": model, "config": config, "cluster": facts["cluster"], "statistics": statistics}
    options = {"optimizer": optimizer, "schedule": schedule, "steps_per_epoch": facts["steps_per_epoch"]}
    step = functools.partial(setup.pretrain_step, **options, **of_loss)
    before = checkpoint.from_tree(state, jax.eval_shape(fresh), source=str(path))
    with jax.default_matmul_precision(parallel.MATMUL_PRECISION[config.precision]):
        _, metrics = jax.device_get(jax.jit(step)(before, batch))
        first = first_nan(functools.partial(step, before, batch))
    finite = {m: np.isfinite(x).all(axis=1) for m, x in batch["features"].items()}
    wrong = {m: [facts["ids"][i] for i in np.flatnonzero(~rows)] for m, rows in finite.items() if not rows.all()}
    return Replay(facts["step"], {name: float(x) for name, x in metrics.items()}, wrong, first)


def first_nan(step: Any) -> str:
    """Run a function operation by operation; return the first operation whose result is NaN, with its line, or ''."""
    try:
        with jax.disable_jit(), jax.debug_nans(True):
            step()
    except FloatingPointError as e:
        ours = [f for f in traceback.extract_tb(e.__traceback__) if PACKAGE in Path(f.filename).parents]
        where = f", in {Path(ours[-1].filename).name}, line {ours[-1].lineno}: {ours[-1].line}" if ours else ""
        return f"{reason(e)}{where}"
    return ""


def lines(found: Replay) -> list[str]:
    """Return the lines that report a replay."""
    terms = [f"{k} {v:.6g}" for k, v in found.metrics.items() if k.startswith("loss") or k == "gradient_norm"]
    finite = all(math.isfinite(found.metrics[name]) for name in ("loss", "gradient_norm"))
    nothing = "no operation gave a result that is not a number" + ("" if finite else "; some gave infinite ones")
    inputs = [
        f"the features {m} of {', '.join(ids[:5])}{' ...' if len(ids) > 5 else ''} are not finite"
        for m, ids in found.not_finite.items()
    ]
    return [
        f"step {found.step}: {', '.join(terms)}",
        *(f"step {found.step}: {line}" for line in inputs or ["all features of its batch are finite"]),
        f"step {found.step}: {found.first or nothing}",
    ]


def _read(path: Path) -> tuple[dict[str, Any], dict[str, Any], dict[str, Any], tuple[np.ndarray, np.ndarray] | None]:
    """Return state and batch, as nested dicts, the facts, and the statistics of the modality of two views."""
    way_out = f"name a file of RUN/{FOLDER}"
    try:
        with path.open("rb") as file:
            if not zipfile.is_zipfile(file):  # of which NumPy says that it may be a pickle to be trusted
                raise ValueError("no .npz file, or a part of one")
            file.seek(0)
            with np.load(file) as stored:
                arrays = {name: stored[name] for name in stored.files}
        facts = json.loads(str(arrays.pop(FACTS)))
        tree = traverse_util.unflatten_dict(arrays, sep="/")
        if facts["version"] != VERSION:
            raise ConclugenError(f"{path}: of version {facts['version']}, expected {VERSION}; use the version it is of")
        msgspec.convert(facts, Facts)
        statistics = tree.get("statistics")
        found = tree["state"], tree["batch"], facts, statistics and (statistics["mean"], statistics["scale"])
    except FileNotFoundError as e:
        raise ConclugenError(f"{path}: no such file; {way_out}") from e
    except (OSError, ValueError, LookupError, TypeError, EOFError, zipfile.BadZipFile) as e:
        raise ConclugenError(f"{path}: not a step that was kept, or damaged ({reason(e)}); {way_out}") from e
    return found
