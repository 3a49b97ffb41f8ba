"""The trials of a search in one sqlite database, shared by processes of which any may be killed.

Optuna proposes, prunes and remembers. What it lacks is here: a trial belongs to the process that holds its lock, and one whose
process is gone is asked for again, under its number and with its values, so that it resumes in its own workdir.
"""

import contextlib
import dataclasses
import json
import shlex
import shutil
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import optuna
from optuna.distributions import BaseDistribution, CategoricalDistribution, FloatDistribution, IntDistribution
from optuna.trial import FrozenTrial, Trial, TrialState
from sqlalchemy.exc import SQLAlchemyError

from conclugen_jax.errors import ConclugenError, reason
from conclugen_jax.runs import checkpoint, config as config_lib
from conclugen_jax.runs.layout import RESULT, SEARCH as DEFINITION, TRIALS as FOLDER
from conclugen_jax.study.search_space import OBJECTIVES
from conclugen_jax.system import files, locks, progress

DATABASE = "search.sqlite"
NAME = "pretraining"  # of the one study in the database

FIRST_RUNG_SHARE, REDUCTION, NUM_RUNGS = 8, 2, 3
"""Trials are compared after an eighth, a quarter and a half of the epochs; the better half continues."""

STARTS = 3
"""A trial that was killed so often without one more checkpoint has failed."""

STATES = {TrialState.COMPLETE: "finished", TrialState.PRUNED: "pruned", TrialState.FAIL: "failed"}


def rungs(num_epochs: int) -> list[int]:
    """Return the numbers of epochs after which a trial is compared with the others."""
    steps = [max(1, num_epochs // FIRST_RUNG_SHARE) * REDUCTION**i for i in range(NUM_RUNGS)]
    return [step for step in steps if step < num_epochs]


@contextlib.contextmanager
def opened(folder: Path, definition: Mapping[str, Any], arguments: Sequence[str]) -> Iterator["Trials"]:
    """Open the trials of a folder, which is created if needed.

    ``definition`` has ``objective``, ``space``, ``data`` and ``config``, the same for all processes and times; ``arguments`` of
    ``conclugen pretrain`` give the configuration in the command of the result.

    Raises:
      ConclugenError: the folder cannot be written or belongs to another search.
    """
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    files.refuse_bucket(folder)
    path = folder.absolute() / DATABASE
    if set(str(path)) & set("?%{}"):
        raise ConclugenError(f"{path}: its name has ?, %, {{ or }}, which no database may; choose another --search")
    with _exclusive(folder):
        _settle(folder, definition)
        patient = {"connect_args": {"timeout": 60}}
        storage = optuna.storages.RDBStorage(f"sqlite:///{path}", engine_kwargs=patient)
        first_rung, *_ = rungs(definition["config"]["train"]["num_epochs"]) or [1]
        study = optuna.create_study(
            storage=storage,
            study_name=NAME,
            direction=OBJECTIVES[definition["objective"]]["direction"],
            pruner=optuna.pruners.SuccessiveHalvingPruner(min_resource=first_rung, reduction_factor=REDUCTION),
            load_if_exists=True,
        )
    try:
        yield Trials(folder, definition, arguments, study, storage)
    finally:
        storage.remove_session()
        storage.engine.dispose()


def _settle(folder: Path, definition: Mapping[str, Any]) -> None:
    """Write what a new search is, or compare it with what an old one was."""
    path = folder / DEFINITION
    if not path.exists() and not (folder / DATABASE).exists():
        files.write_json(path, definition, place="--search")
    old = files.read_json(path, dict[str, Any], way_out="restore it or choose another --search")
    changed = config_lib.changes(old, json.loads(json.dumps(definition)))
    if changed:
        way_out = "repeat that command to resume it or choose another --search"
        raise ConclugenError(
            f"{folder}: the search here was started with other arguments ({'; '.join(changed)}); {way_out}"
        )


@contextlib.contextmanager
def _exclusive(folder: Path) -> Iterator[None]:
    """Let only one process at a time ask for, report and clean up trials."""
    try:
        (folder / FOLDER).mkdir(parents=True, exist_ok=True)
        with locks.hold(folder / ".lock", wait=lambda _: None):
            yield
    except (OSError, optuna.exceptions.StorageInternalError, SQLAlchemyError) as e:
        raise ConclugenError(
            f"{folder / DATABASE}: cannot be read or written ({reason(e.__cause__ or e)}); free space or restore the file "
            "and repeat the command to resume, or choose another --search"
        ) from e


@dataclasses.dataclass
class Trials:
    """The trials of a search, see :func:`opened`."""

    folder: Path
    definition: Mapping[str, Any]
    arguments: Sequence[str]
    study: optuna.Study
    storage: optuna.storages.BaseStorage

    def workdir(self, number: int) -> Path:
        """Return the workdir of a trial's run."""
        return self.folder / FOLDER / f"{number:04d}"

    @contextlib.contextmanager
    def taken(self, num_trials: int) -> Iterator[Trial | None]:
        """Own a trial while the context lasts: one whose process is gone, else a new one; ``None`` if there are enough."""
        with contextlib.ExitStack() as owned:
            with _exclusive(self.folder):
                trial = self._ask(num_trials)
                if trial is not None:
                    owned.enter_context(locks.hold(self.workdir(trial.number).with_suffix(".lock")))
            try:
                yield trial
            except BaseException:  # ended in order: this start does not count against the trial
                if trial is not None:
                    with _exclusive(self.folder):
                        trial.set_user_attr("starts", [])
                raise
            if trial is not None:
                self.result()

    def report(self, trial: Trial, epochs: int, value: float) -> bool:
        """Note the objective after so many epochs; return whether the trial is not among the better ones."""
        with _exclusive(self.folder):
            if epochs not in self._values(trial):  # a run that resumed before them has the same again
                trial.report(value, epochs)
            return epochs < self.definition["config"]["train"]["num_epochs"] and trial.should_prune()

    def end(self, trial: Trial, state: TrialState, error: str | None = None) -> None:
        """Note how a trial ended: ``COMPLETE``, ``PRUNED``, or ``FAIL`` with the reason."""
        with _exclusive(self.folder):
            values = self._values(trial)
            value = values[max(values)] if state == TrialState.COMPLETE else None
            if error is not None:
                trial.set_user_attr("error", error)
            self.study.tell(trial, value, state)
        reached = f" with {value:.6g}" if value is not None else f" after {max(values, default=0)} epochs"
        progress.say(f"trial {trial.number} {STATES[state]}" + (f": {error}" if error else reached))

    def result(self) -> dict[str, Any]:
        """Write ``result.json`` and delete the checkpoints of trials that ended without being the best."""
        with _exclusive(self.folder):
            trials = [_facts(t) for t in self.study.get_trials(deepcopy=False)]
            states, finished = [t["state"] for t in trials], [t for t in trials if t["state"] == "finished"]
            objective = {"name": self.definition["objective"], **OBJECTIVES[self.definition["objective"]]}
            best_of = min if objective["direction"] == "minimize" else max
            best = best_of(finished, key=lambda t: t["value"], default=None)
            for t in trials:
                if t["state"] != "running" and t is not best:
                    shutil.rmtree(self.workdir(t["number"]) / checkpoint.FOLDER, ignore_errors=True)
            result = {
                "objective": objective,
                "best": best and {**best, "workdir": str(self.workdir(best["number"]))},
                "command": best and self._command(best["overrides"]),
                "num_trials": {state: states.count(state) for state in (*STATES.values(), "running")},
                "trials": trials,
            }
            files.write_json(self.folder / RESULT, result, place="--search")
        return result

    def _ask(self, num_trials: int) -> Trial | None:
        for found in self.study.get_trials(deepcopy=False, states=(TrialState.RUNNING,)):
            with contextlib.suppress(locks.Busy), locks.hold(self.workdir(found.number).with_suffix(".lock")):
                self._leave_behind(found)
        trials = self.study.get_trials(deepcopy=False)
        waiting = [t.number for t in trials if t.state == TrialState.WAITING]
        if not waiting and len(trials) >= num_trials:
            return None
        # A seed for each trial: a resumed search neither repeats its first draws nor depends on having stopped.
        entropy = [self.definition["config"]["seed"], min(waiting, default=len(trials))]
        self.study.sampler = optuna.samplers.TPESampler(seed=int(np.random.SeedSequence(entropy).generate_state(1)[0]))
        return self.study.ask({key: _distribution(d) for key, d in self.definition["space"].items()})

    def _leave_behind(self, found: FrozenTrial) -> None:
        """Let a trial whose process is gone wait to be asked for again; one that was killed too often has failed."""
        saved = self.workdir(found.number).glob(f"{checkpoint.FOLDER}/*")
        step = max((int(p.name) for p in saved if p.name.isdecimal()), default=0)
        starts, trial = [*found.user_attrs.get("starts", []), step], found._trial_id
        if starts[-STARTS:] == [step] * STARTS:
            error = f"killed {STARTS} times after step {step} without a message; out of the host's memory?"
            self.storage.set_trial_user_attr(trial, "error", error)
            self.storage.set_trial_state_values(trial, TrialState.FAIL)
        else:
            self.storage.set_trial_user_attr(trial, "starts", starts)
            self.storage.set_trial_state_values(trial, TrialState.WAITING)

    def _values(self, trial: Trial) -> dict[int, float]:
        return self.storage.get_trial(trial._trial_id).intermediate_values

    def _command(self, overrides: Mapping[str, Any]) -> str:
        kept = [a for a in self.arguments if a.partition("=")[0].lstrip("-").removeprefix("config.") not in overrides]
        chosen = [f"--config.{key}={value}" for key, value in overrides.items()]
        return shlex.join(["conclugen", "pretrain", *kept, *chosen, f"--workdir={self.folder / 'best'}"])


def _distribution(dimension: Mapping[str, Any]) -> BaseDistribution:
    if "choices" in dimension:
        return CategoricalDistribution(**dimension)
    return (IntDistribution if isinstance(dimension["low"], int) else FloatDistribution)(**dimension)


def _facts(trial: FrozenTrial) -> dict[str, Any]:
    return {
        "number": trial.number,
        "state": STATES.get(trial.state, "running"),
        "value": trial.value if trial.state == TrialState.COMPLETE else None,
        "overrides": dict(trial.params),
        "values_by_epochs": {str(epochs): value for epochs, value in sorted(trial.intermediate_values.items())},
        "error": trial.user_attrs.get("error"),
    }
