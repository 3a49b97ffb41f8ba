"""Search over pretraining hyper-parameters: TPE proposes, successive halving stops early, one sqlite file remembers.

The way down: :func:`search` takes trials until there are enough, :class:`Trials` hands each to one process and keeps
what came of it, a trial is a run of :func:`conclugen_jax.pretrain.training.pretrain` in a workdir of its own.
"""

import contextlib
import json
import shlex
import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np
from ml_collections import ConfigDict

from conclugen_jax import pretrain
from conclugen_jax.data import batches, shards
from conclugen_jax.errors import ConclugenError
from conclugen_jax.evaluate import probe
from conclugen_jax.evaluate import task as task_lib
from conclugen_jax.method import model as model_lib
from conclugen_jax.method.train_state import TrainState
from conclugen_jax.run import checkpoint
from conclugen_jax.run import config as config_lib
from conclugen_jax.study import search_space
from conclugen_jax.system import files, locks, progress, signals

DATABASE, DEFINITION, RESULT, TRIALS = "search.sqlite", "search.json", "result.json", "trials"
NAME = "pretraining"  # of the one study in the database

OBJECTIVES = {
    "pretraining_loss": "sum of the loss terms without their weights, each at the scale of the base configuration, mean "
    "over the last epoch; the least is best; no label is read",
    "validation_probe": "accuracy of logistic regression (L2, C = 1) on the standardised representations of the training "
    "split, scored on the validation split after the last epoch; the greatest is best",
}

FIRST_RUNG_SHARE, REDUCTION, NUM_RUNGS = 8, 2, 3
"""Trials are compared after an eighth, a quarter and a half of the epochs; the better half goes on."""

STARTS = 3
"""A trial that a kill ended so often without one more checkpoint is given up."""

Measure = Callable[[ConfigDict, Mapping[str, float], TrainState], float]


class Pruned(Exception):
    """A trial is not among the better half."""


class Trial(NamedTuple):
    """A trial that is this process's to run: number, from 0, and the configuration keys that it sets."""

    number: int
    overrides: dict[str, Any]


def search(
    config: ConfigDict,
    folder: str | Path,
    *,
    num_trials: int,
    objective: str = "pretraining_loss",
    space: Any = None,
    source: str = "space",
    devices: Sequence[jax.Device] | None = None,
    arguments: Sequence[str] = (),
) -> dict[str, Any]:
    """Run trials until a folder has enough of them; several processes may do so at once on one folder.

    Args:
      config: of every trial, less the keys searched; its seed is also the sampler's.
      folder: takes ``search.json``, ``search.sqlite``, ``result.json`` and ``trials/NNNN``, the trials' workdirs. Repeating
        the call goes on: a trial that was interrupted or killed first, in its own workdir, from its own checkpoint.
      num_trials: finished, pruned and failed ones together; may be raised later.
      objective: one of ``OBJECTIVES``.
      space: see :mod:`conclugen_jax.study.search_space`; ``None``: its default around ``config``.
      source: where the space comes from, for messages.
      devices: to train on; ``None``: all.
      arguments: those of ``conclugen pretrain`` that give ``config``, for the command in the result.

    Returns:
      What ``result.json`` holds.

    Raises:
      ConclugenError: an impossible configuration or space, a folder of another search, a fault of disk or files, or no
        trial that finished.
      Interrupted: SIGINT or SIGTERM came; the trial under way has a checkpoint.
    """
    devices = list(devices or jax.devices())
    if objective not in OBJECTIVES:
        raise ConclugenError(f"the objective {objective!r} is unknown; there are {', '.join(OBJECTIVES)}")
    config, dataset, steps_per_epoch = _check(config, devices)
    if space is None:
        space, source = search_space.default(config, steps_per_epoch=steps_per_epoch), "the default space"
    space = search_space.check(space, config, objective=objective, source=source)
    measure = _loss(config) if objective == "pretraining_loss" else _validation_probe(config, dataset)
    manifest = dataset.manifest
    definition = {
        "objective": objective,
        "space": space,
        "data": {"name": manifest.name, "version": manifest.version, "sha256": manifest.fingerprint()},
        "config": config.to_dict(),
    }
    with signals.caught() as stop, _opened(Path(folder), definition, arguments) as trials:
        try:
            while not stop.signal:
                with trials.taken(num_trials) as trial:
                    if trial is None:
                        break
                    _run(trial, trials, config, measure, devices)
        except signals.Interrupted:
            trials.result()
            progress.say("the search was stopped; repeat the command to go on")
            raise
        if stop.signal:
            raise signals.Interrupted(stop.signal)
        result = trials.result()
    if result["best"] is None and result["num_trials"]["running"] == 0:
        failed = [t for t in result["trials"] if t["error"]]
        first = f"; trial {failed[0]['number']}: {failed[0]['error']}" if failed else ""
        raise ConclugenError(f"{folder}: none of the {len(result['trials'])} trials finished{first}")
    return result


def _check(config: ConfigDict, devices: Sequence[jax.Device]) -> tuple[ConfigDict, shards.Dataset, int]:
    """Refuse what every trial would fail of; return configuration with its modalities, data set, steps of an epoch."""
    config_lib.check(config)
    dataset = shards.open_dataset(config.data.path, verify=config.data.verify)
    config = config_lib.with_modalities(config, dataset.manifest.modalities)
    stream = shards.ShardStream(dataset, config.data.train_split, config.data.modalities)
    config_lib.check_objective(config)
    config_lib.check_batches(config, num_examples=len(stream.usable), num_devices=len(devices))
    steps_per_epoch = len(stream.usable) // config.train.batch_size
    config_lib.check_clustering(config, steps_per_epoch=steps_per_epoch)
    return config, dataset, steps_per_epoch


def _loss(base: ConfigDict) -> Measure:
    return lambda config, means, _: search_space.comparable_loss(means, config, base)


def _validation_probe(base: ConfigDict, dataset: shards.Dataset) -> Measure:
    """Accuracy on the validation split; see ``OBJECTIVES``."""
    label = dataset.manifest.label
    if label.kind != "single":
        raise ConclugenError(
            f"{dataset.path}: labels of kind {label.kind!r}; the objective validation_probe needs one class per example, "
            "pretraining_loss none"
        )
    splits = [
        batches.open_split(dataset, split, base.data.modalities, tier="host").table
        for split in (base.data.train_split, base.data.validation_split)
    ]
    rows = [np.flatnonzero(task_lib.known(label, split["label"])) for split in splits]
    train_labels, labels = (split["label"][known] for split, known in zip(splits, rows, strict=True))
    if not len(train_labels) or not len(labels):
        raise ConclugenError(
            f"{dataset.path}: the splits {base.data.train_split!r} and {base.data.validation_split!r} have "
            f"{len(train_labels)} and {len(labels)} labelled examples; the objective validation_probe needs both"
        )
    dims = {m: dataset.manifest.modalities[m] for m in base.data.modalities}

    def measure(config: ConfigDict, _: Mapping[str, float], state: TrainState) -> float:
        model, variables = model_lib.from_config(config, dims), jax.device_get(state.variables())
        vectors = tuple(
            probe.concatenated(probe.represent(model, variables, split["features"]), split["present"])[known]
            for split, known in zip(splits, rows, strict=True)
        )
        found = probe.label_efficiency(
            {"pretrained": vectors}, train_labels, labels, labels_per_class=(0,), num_draws=1
        )
        return found[0].accuracy[0]

    return measure


def _run(trial: Trial, trials: "Trials", base: ConfigDict, measure: Measure, devices: Sequence[jax.Device]) -> None:
    """Pretrain with the values of a trial and note what came of it."""
    config = search_space.with_overrides(base, trial.overrides)
    num_epochs = config.train.num_epochs

    def on_epoch(epoch: int, means: Mapping[str, float], state: TrainState) -> None:
        done = epoch + 1
        if done == num_epochs:
            trials.report(trial, done, measure(config, means, state))
        elif done in rungs(num_epochs):
            trials.report(trial, done, measure(config, means, state))
            if trials.prunes(trial):
                raise Pruned

    shown = ", ".join(f"{key} {short(value)}" for key, value in trial.overrides.items())
    progress.say(f"trial {trial.number}: {shown}")
    try:
        pretrain.pretrain(config, trials.workdir(trial.number), devices=devices, on_epoch=on_epoch)
        trials.end(trial, "COMPLETE")
    except Pruned:
        trials.end(trial, "PRUNED")
    except ConclugenError as e:
        # What a lower layer could not do (disk, files) is no fault of the values, and would befall every trial.
        if e.__cause__ is not None:
            raise
        trials.end(trial, "FAIL", str(e))
    except (MemoryError, jax.errors.JaxRuntimeError) as e:
        if isinstance(e, jax.errors.JaxRuntimeError) and "RESOURCE_EXHAUSTED" not in str(e):
            raise
        trials.end(trial, "FAIL", f"out of memory ({(str(e).strip() or 'MemoryError').splitlines()[0]})")
    finally:
        jax.clear_caches()  # the programs of other sizes are of no use to the next trial


def rungs(num_epochs: int) -> list[int]:
    """Numbers of epochs after which a trial is compared with the others."""
    steps = [_first_rung(num_epochs) * REDUCTION**i for i in range(NUM_RUNGS)]
    return [step for step in steps if step < num_epochs]


def _first_rung(num_epochs: int) -> int:
    return max(1, num_epochs // FIRST_RUNG_SHARE)


@contextlib.contextmanager
def _opened(folder: Path, definition: Mapping[str, Any], arguments: Sequence[str]) -> Iterator["Trials"]:
    """The trials of a folder, which is made if needed.

    Raises:
      ConclugenError: the folder cannot be written, belongs to another search, or Optuna is not installed.
    """
    try:
        import optuna
    except ImportError as e:
        raise ConclugenError("the search needs Optuna; pip install 'conclugen_jax[search]'") from e
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    if set(str(folder.absolute())) & set("?%{}"):
        raise ConclugenError(
            f"{folder.absolute()}: the database cannot lie in a folder whose name has ?, %, {{ or }}; choose another --search"
        )
    try:
        (folder / TRIALS).mkdir(parents=True, exist_ok=True)
    except OSError as e:
        raise ConclugenError(f"{folder}: cannot be written ({e.strerror}); choose another --search") from e
    with _exclusive(folder):
        _settle(folder, definition)
        storage = optuna.storages.RDBStorage(
            f"sqlite:///{folder.absolute() / DATABASE}", engine_kwargs={"connect_args": {"timeout": 60}}
        )
        first_rung = _first_rung(definition["config"]["train"]["num_epochs"])
        pruner = optuna.pruners.SuccessiveHalvingPruner(min_resource=first_rung, reduction_factor=REDUCTION)
        direction = "minimize" if definition["objective"] == "pretraining_loss" else "maximize"
        study = optuna.create_study(
            storage=storage, study_name=NAME, direction=direction, pruner=pruner, load_if_exists=True
        )
    try:
        yield Trials(folder, definition, arguments, study, storage)
    finally:
        storage.remove_session()
        storage.engine.dispose()


def _settle(folder: Path, definition: Mapping[str, Any]) -> None:
    """Write what a new search is, or compare it with what an old one was."""
    path = folder / DEFINITION
    if not path.exists():
        if (folder / DATABASE).exists():
            raise ConclugenError(f"{path}: missing, but there are trials; restore it or choose another --search")
        files.write_json(path, definition)
        return
    try:
        old = dict(config_lib.flatten(json.loads(path.read_text(encoding="utf-8"))))
    except (OSError, ValueError, AttributeError) as e:
        raise ConclugenError(f"{path}: cannot be read ({e}); restore it or choose another --search") from e
    new = dict(config_lib.flatten(json.loads(json.dumps(definition))))
    missing = "(absent)"
    changed = [
        f"{key}: {old.get(key, missing)} -> {new.get(key, missing)}"
        for key in sorted({*old, *new})
        if old.get(key, missing) != new.get(key, missing)
    ]
    if changed:
        raise ConclugenError(
            f"{folder}: the search here was started otherwise ({'; '.join(changed)}); repeat that command to go on or "
            "choose another --search"
        )


@contextlib.contextmanager
def _exclusive(folder: Path) -> Iterator[None]:
    """One process at a time asks, tells and tidies up; others wait. The lock vanishes with its process.

    Raises:
      ConclugenError: the database cannot be read or written.
    """
    from optuna.exceptions import StorageInternalError
    from sqlalchemy.exc import SQLAlchemyError

    with locks.hold(folder / ".lock", wait=lambda _: None):
        try:
            yield
        except (StorageInternalError, SQLAlchemyError) as e:
            reason = str(e.__cause__ or e).strip().splitlines()[0]
            raise ConclugenError(
                f"{folder / DATABASE}: cannot be read or written ({reason}); free space or restore the file and repeat the "
                "command to go on, or choose another --search"
            ) from e


class Trials:
    """The trials of a search.

    A trial belongs to the process that holds the lock on its file in ``trials``; one that runs by the database but whose
    lock is free was left by a process that is no more.
    """

    def __init__(self, folder: Path, definition: Mapping[str, Any], arguments: Sequence[str], study: Any, storage: Any):
        self._folder, self._definition, self._arguments = folder, definition, arguments
        self._study, self._storage = study, storage

    def workdir(self, number: int) -> Path:
        """Of a trial's run."""
        return self._folder / TRIALS / f"{number:04d}"

    @contextlib.contextmanager
    def taken(self, num_trials: int) -> Iterator[Trial | None]:
        """A trial to run, owned while the context lasts: one left behind, else a new one; ``None`` if there are enough."""
        with contextlib.ExitStack() as owned:
            with _exclusive(self._folder):
                trial = self._left_behind(owned) or self._new(num_trials, owned)
            try:
                yield trial
            except BaseException:
                if trial is not None:  # ended in order: this start does not count against the trial
                    with _exclusive(self._folder):
                        self._set(trial, "starts", [])
                raise
            if trial is not None:
                self.result()

    def report(self, trial: Trial, epochs: int, value: float) -> None:
        """Note the objective after so many epochs; the same again where a run resumed before them."""
        with _exclusive(self._folder):
            self._storage.set_trial_intermediate_value(self._id(trial.number), epochs, value)

    def prunes(self, trial: Trial) -> bool:
        """Whether a trial is not among the better ones after as many epochs."""
        with _exclusive(self._folder):
            return self._study.pruner.prune(self._study, self._storage.get_trial(self._id(trial.number)))

    def end(self, trial: Trial, state: str, error: str | None = None) -> None:
        """Note how a trial ended: ``COMPLETE``, ``PRUNED`` or ``FAIL`` with the reason."""
        from optuna.trial import TrialState

        with _exclusive(self._folder):
            number = self._id(trial.number)
            if error is not None:
                self._storage.set_trial_user_attr(number, "error", error)
            values = self._storage.get_trial(number).intermediate_values
            value = values[self._definition["config"]["train"]["num_epochs"]] if state == "COMPLETE" else None
            self._study.tell(trial.number, value, TrialState[state])
        reached = f" with {value:.6g}" if value is not None else f" after {max(values, default=0)} epochs"
        outcome = {"COMPLETE": f"finished{reached}", "PRUNED": f"pruned{reached}", "FAIL": f"failed: {error}"}[state]
        progress.say(f"trial {trial.number} {outcome}")

    def result(self) -> dict[str, Any]:
        """Write ``result.json`` and delete the checkpoints of trials that ended without being the best."""
        with _exclusive(self._folder):
            trials = [_facts(t) for t in self._drawn()]
            finished = [t for t in trials if t["state"] == "finished"]
            sign = 1 if self._definition["objective"] == "pretraining_loss" else -1
            best = min(finished, key=lambda t: sign * t["value"], default=None)
            for t in trials:
                if t["state"] != "running" and t is not best:
                    shutil.rmtree(self.workdir(t["number"]) / checkpoint.FOLDER, ignore_errors=True)
            result = {
                "objective": {
                    "name": self._definition["objective"],
                    "direction": self._study.direction.name.lower(),
                    "meaning": OBJECTIVES[self._definition["objective"]],
                },
                "best": best and {**best, "workdir": str(self.workdir(best["number"]))},
                "command": best and self._command(best["overrides"]),
                "num_trials": {
                    state: sum(t["state"] == state for t in trials)
                    for state in ("finished", "pruned", "failed", "running")
                },
                "trials": trials,
            }
            files.write_json(self._folder / RESULT, result)
        return result

    def _left_behind(self, owned: contextlib.ExitStack) -> Trial | None:
        from optuna.trial import TrialState

        for found in self._study.get_trials(deepcopy=False, states=(TrialState.RUNNING,)):
            trial = Trial(found.number, dict(found.params))
            if not self._own(trial, owned):
                continue
            if len(found.params) < len(self._definition["space"]):
                self._study.tell(trial.number, state=TrialState.FAIL)  # killed while it was drawn: it does not count
                continue
            steps = [
                int(p.name) for p in self.workdir(trial.number).glob(f"{checkpoint.FOLDER}/*") if p.name.isdecimal()
            ]
            starts = [*found.user_attrs.get("starts", []), max(steps, default=0)]
            if len(starts) > STARTS and len(set(starts[-STARTS:])) == 1:
                error = f"killed {STARTS} times after step {starts[-1]} without a message; out of the host's memory?"
                self._storage.set_trial_user_attr(self._id(trial.number), "error", error)
                self._study.tell(trial.number, state=TrialState.FAIL)
                continue
            self._set(trial, "starts", starts)
            return trial
        return None

    def _new(self, num_trials: int, owned: contextlib.ExitStack) -> Trial | None:
        import optuna

        if len(self._drawn()) >= num_trials:
            return None
        # A seed for each trial: a search that goes on neither repeats its first draws nor depends on having stopped.
        number = len(self._study.get_trials(deepcopy=False))
        seed = np.random.SeedSequence([self._definition["config"]["seed"], number]).generate_state(1)[0]
        self._study.sampler = optuna.samplers.TPESampler(seed=int(seed))
        asked = self._study.ask(
            {key: _distribution(optuna, dimension) for key, dimension in self._definition["space"].items()}
        )
        trial = Trial(asked.number, dict(asked.params))
        self._own(trial, owned)
        self._set(trial, "starts", [0])
        return trial

    def _own(self, trial: Trial, owned: contextlib.ExitStack) -> bool:
        try:
            owned.enter_context(locks.hold(self.workdir(trial.number).with_suffix(".lock")))
        except locks.Busy:
            return False
        return True

    def _drawn(self) -> list[Any]:
        """All trials whose values were drawn to the last."""
        trials = self._study.get_trials(deepcopy=False)
        return [t for t in trials if len(t.params) == len(self._definition["space"])]

    def _id(self, number: int) -> int:
        study = self._storage.get_study_id_from_name(NAME)
        return self._storage.get_trial_id_from_study_id_trial_number(study, number)

    def _set(self, trial: Trial, name: str, value: Any) -> None:
        self._storage.set_trial_user_attr(self._id(trial.number), name, value)

    def _command(self, overrides: Mapping[str, Any]) -> str:
        kept = [a for a in self._arguments if a.partition("=")[0].lstrip("-").removeprefix("config.") not in overrides]
        chosen = [f"--config.{key}={value}" for key, value in overrides.items()]
        return shlex.join(["conclugen", "pretrain", *kept, *chosen, f"--workdir={self._folder / 'best'}"])


def _distribution(optuna: Any, dimension: Mapping[str, Any]) -> Any:
    if "choices" in dimension:
        return optuna.distributions.CategoricalDistribution(dimension["choices"])
    kind = "IntDistribution" if isinstance(dimension["low"], int) else "FloatDistribution"
    return getattr(optuna.distributions, kind)(dimension["low"], dimension["high"], log=dimension["log"])


def _facts(trial: Any) -> dict[str, Any]:
    """A trial of Optuna as JSON."""
    states = {"COMPLETE": "finished", "PRUNED": "pruned", "FAIL": "failed"}
    return {
        "number": trial.number,
        "state": states.get(trial.state.name, "running"),
        "value": trial.value if trial.state.name == "COMPLETE" else None,
        "overrides": dict(trial.params),
        "values_by_epochs": {str(epochs): value for epochs, value in sorted(trial.intermediate_values.items())},
        "error": trial.user_attrs.get("error"),
    }


def short(value: Any) -> str:
    """A value searched, for the screen."""
    return f"{value:.4g}" if isinstance(value, float) else str(value)
