"""Search over pretraining hyper-parameters: TPE proposes, successive halving stops early.

The way down: :func:`search` takes trials until there are enough, :mod:`conclugen_jax.study.trials` hands each to one process
and keeps its outcome, a trial is a run of :func:`conclugen_jax.pretrain.training.pretrain` in a workdir of its own.
"""

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np
from ml_collections import ConfigDict
from optuna import TrialPruned
from optuna.trial import Trial, TrialState

from conclugen_jax import pretrain
from conclugen_jax.data import batches, persons, shards
from conclugen_jax.errors import ConclugenError, reason
from conclugen_jax.evaluate import probe, weights
from conclugen_jax.method import model as model_lib
from conclugen_jax.method.train_state import TrainState
from conclugen_jax.pretrain import setup
from conclugen_jax.study import search_space, trials as trials_lib
from conclugen_jax.study.trials import Trials
from conclugen_jax.system import progress, signals

Measure = Callable[[ConfigDict, Mapping[str, float], TrainState], float]


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
    """Run trials until a folder has enough of them; several processes may do so at once. Return what ``result.json`` holds.

    Args:
      config: of every trial, less the keys searched; its seed is also the sampler's.
      folder: takes ``search.json``, ``search.sqlite``, ``result.json`` and ``trials/NNNN``, the trials' workdirs. Repeating
        the call resumes: first a trial that was interrupted or killed, in its own workdir, from its own checkpoint.
      num_trials: finished, pruned and failed ones together; may be raised later.
      objective: one of ``search_space.OBJECTIVES``.
      space: see :mod:`conclugen_jax.study.search_space`; ``None``: its default around ``config``.
      source: where the space comes from, for messages.
      devices: to train on; ``None``: all.
      arguments: those of ``conclugen pretrain`` that give ``config``, for the command in the result.

    Raises:
      ConclugenError: an impossible configuration or space, a folder of another search, a fault of disk or files, or no
        trial that finished.
      Interrupted: SIGINT or SIGTERM came; the trial under way has a checkpoint.
    """
    devices = list(devices or jax.devices())
    config, measure, definition = _planned(config, devices, objective, space, source)
    with signals.caught() as stop, trials_lib.opened(Path(folder), definition, arguments) as trials:
        try:
            while not stop.signal:
                with trials.taken(num_trials) as trial:
                    if trial is None:
                        break
                    _run(trial, trials, config, measure, devices)
        except signals.Interrupted:
            trials.result()
            progress.say("the search was stopped; repeat the command to resume")
            raise
        if stop.signal:
            raise signals.Interrupted(stop.signal)
        result = trials.result()
    if result["best"] is None and result["num_trials"]["running"] == 0:
        first = next((f"; trial {t['number']}: {t['error']}" for t in result["trials"] if t["error"]), "")
        raise ConclugenError(f"{folder}: none of the {len(result['trials'])} trials finished{first}")
    return result


def _planned(
    config: ConfigDict, devices: Sequence[jax.Device], objective: str, space: Any, source: str
) -> tuple[ConfigDict, Measure, dict[str, Any]]:
    """Check the arguments; return the trials' configuration, their measure, and the definition of the search."""
    if objective not in search_space.OBJECTIVES:
        raise ConclugenError(f"the objective {objective!r} is unknown; there are {', '.join(search_space.OBJECTIVES)}")
    base, stream = setup.open_data(config, len(devices))
    manifest = stream.dataset.manifest
    if space is None:
        space = search_space.default(base, steps_per_epoch=len(stream.usable) // base.train.batch_size)
        source = "the default space"
    space = search_space.check(space, base, objective=objective, source=source)

    def loss(config: ConfigDict, means: Mapping[str, float], _: TrainState) -> float:
        return search_space.comparable_loss(means, config, base)

    measure = loss if objective == "pretraining_loss" else _validation_probe(base, stream.dataset)
    data = {"name": manifest.name, "version": manifest.version, "sha256": manifest.fingerprint()}
    return base, measure, {"objective": objective, "space": space, "data": data, "config": base.to_dict()}


def _validation_probe(base: ConfigDict, dataset: shards.Dataset) -> Measure:
    """Return the measure of accuracy on the validation split; see ``search_space.OBJECTIVES``."""
    section, label = base.data, dataset.manifest.label
    names = section.train_split, section.validation_split

    def tables(by_person: persons.Persons | None = None) -> list[Any]:
        streams = [shards.ShardStream(dataset, name, section.modalities) for name in names]
        for stream in streams if by_person else ():
            by_person.attach(stream)
        return [batches.load(stream, tier="host").table for stream in streams]

    splits = tables()
    rows = [np.flatnonzero((split["label"] >= 0) & (label.kind == "single")) for split in splits]
    labels = [split["label"][known] for split, known in zip(splits, rows, strict=True)]
    if 0 in map(len, labels):
        raise ConclugenError(
            f"{dataset.path}: labels of kind {label.kind!r}, {len(labels[0])} and {len(labels[1])} in the splits {names}; the "
            "objective validation_probe needs one class per example in both, pretraining_loss none"
        )
    dims = {m: dataset.manifest.modalities[m] for m in section.modalities}

    def measure(config: ConfigDict, _: Mapping[str, float], state: TrainState) -> float:
        model, variables = model_lib.from_config(config, dims), jax.device_get(state.variables())
        by_person = weights.by_persons(config)
        seen = tables(persons.of_checkpoint(variables["feature_stats"], config)) if by_person else splits
        vectors = tuple(
            probe.concatenated(probe.represent(model, variables, split["features"]), split["present"])[known]
            for split, known in zip(seen, rows, strict=True)
        )
        found = probe.label_efficiency(
            {"pretrained": vectors}, *labels, labels_per_class=(0,), num_draws=1, names=label.names
        )
        return found[0].accuracy[0]

    return measure


def _run(trial: Trial, trials: Trials, base: ConfigDict, measure: Measure, devices: Sequence[jax.Device]) -> None:
    """Pretrain with the values of a trial and record the outcome."""
    config = search_space.with_overrides(base, trial.params)
    num_epochs = config.train.num_epochs

    def on_epoch(epoch: int, means: Mapping[str, float], state: TrainState) -> None:
        compared = epoch + 1 in (*trials_lib.rungs(num_epochs), num_epochs)
        if compared and trials.report(trial, epoch + 1, measure(config, means, state)):
            raise TrialPruned

    shown = ", ".join(f"{key} {short(value)}" for key, value in trial.params.items())
    progress.say(f"trial {trial.number}: {shown}")
    try:
        pretrain.pretrain(config, trials.workdir(trial.number), devices=devices, on_epoch=on_epoch)
        trials.end(trial, TrialState.COMPLETE)
    except TrialPruned:
        trials.end(trial, TrialState.PRUNED)
    except ConclugenError as e:
        # What a lower layer could not do (disk, files) is no fault of the values: every trial would fail of it.
        if e.__cause__ is not None:
            raise
        trials.end(trial, TrialState.FAIL, str(e))
    except (MemoryError, jax.errors.JaxRuntimeError) as e:
        if not isinstance(e, MemoryError) and "RESOURCE_EXHAUSTED" not in str(e):
            raise
        trials.end(trial, TrialState.FAIL, f"out of memory ({reason(e)})")
    finally:
        jax.clear_caches()  # the programs of other sizes are of no use to the next trial


def short(value: Any) -> str:
    """Return a value searched as text for the screen."""
    return f"{value:.4g}" if isinstance(value, float) else str(value)
