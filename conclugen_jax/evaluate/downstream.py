"""Downstream training: a classifier on representations, frozen (linear evaluation) or trained with it.

Linear evaluation, fine-tuning, the supervised baseline and raw features are one code path, told apart by where the
encoder's weights come from and which parameters are trained. A frozen encoder is run once per split; training then reads
its representations.
"""

import dataclasses
import functools
import json
import math
import shutil
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np
from ml_collections import ConfigDict

from conclugen_jax.data import shards
from conclugen_jax.data.manifest import Manifest
from conclugen_jax.data.sources import LabelSpec
from conclugen_jax.errors import ConclugenError
from conclugen_jax.evaluate import classifier
from conclugen_jax.evaluate import encoder as encoder_lib
from conclugen_jax.evaluate import splits as splits_lib
from conclugen_jax.evaluate import task as task_lib
from conclugen_jax.evaluate.encoder import Encoder
from conclugen_jax.evaluate.task import Task
from conclugen_jax.method.train_state import TrainState
from conclugen_jax.run import checkpoint
from conclugen_jax.run import config as config_lib
from conclugen_jax.run import workdir as workdir_lib
from conclugen_jax.system import files, progress, signals
from conclugen_jax.train import feed, loop, parallel, sharded_update
from conclugen_jax.train import optimizer as optimizer_lib

RESULT = "result.json"


def downstream(
    config: ConfigDict, workdir: str | Path, *, devices: Sequence[jax.Device] | None = None
) -> dict[str, Any]:
    """Train a classifier by the protocol of ``config.downstream``, choose its best epoch, score it.

    Args:
      config: see ``configs/base.py``.
      workdir: takes ``config.json``, ``data.json``, ``metrics.jsonl``, ``result.json`` and ``checkpoints/`` (the best
        epoch's weights). If the same run is finished there already, its result is returned.
      devices: to train on; ``None``: all.

    Returns:
      Content of ``result.json``: scores of the validation and test split at the epoch of best validation accuracy
      (see ``metrics.py``), and where everything came from.

    Raises:
      ConclugenError: an impossible configuration, bad data, a checkpoint that does not fit the data, or a loss that is
        not finite in any epoch.
      Interrupted: SIGINT or SIGTERM came; repeating the command starts this run anew.
    """
    devices = list(devices or jax.devices())
    config_lib.check(config)
    config_lib.check_downstream(config)
    if config.downstream.num_folds and config.downstream.fold == -1:
        return _all_folds(config, Path(workdir), devices)
    dataset = shards.open_dataset(config.data.path, verify=config.data.verify)
    config = config_lib.with_modalities(config, dataset.manifest.modalities)
    label = splits_lib.label_of(config, dataset)
    encoder = encoder_lib.from_config(config, dataset.manifest)
    encodes = config.downstream.protocol not in config_lib.FROZEN
    streams = splits_lib.open_streams(config, dataset, encoder.modalities, all_variants=encodes)
    _check_batches(config, len(streams["train"].usable), devices)
    with (
        workdir_lib.claim(workdir) as folder,
        signals.caught() as stop,
        jax.default_matmul_precision(parallel.MATMUL_PRECISION[config.precision]),
    ):
        workdir_lib.settle(folder, config, dataset.manifest)
        if (folder / RESULT).exists():
            return finished(folder / RESULT, encoder)
        with stop.at_once():  # such a run is repeated from its start
            rows = splits_lib.load(config, label, streams)
            return _run(config, folder, dataset.manifest, label, encoder, rows, devices, stop)


def _check_batches(config: ConfigDict, num_examples: int, devices: Sequence[jax.Device]) -> None:
    """With few labels the batch is what there is; else it must fit the data."""
    if not config.downstream.labels_per_class:
        config_lib.check_batches(config, num_examples=num_examples, num_devices=len(devices))


def _all_folds(config: ConfigDict, workdir: Path, devices: Sequence[jax.Device]) -> dict[str, Any]:
    """Every fold once, each a run in a folder of its own; the scores are means over folds, beside those of each."""
    results = []
    for fold in range(config.downstream.num_folds):
        one = config.copy_and_resolve_references()
        one.downstream.fold = fold
        results.append(downstream(one, workdir / f"fold_{fold}", devices=devices))
    shared = {k: results[0][k] for k in ("protocol", "encoder", "data", "modalities", "target", "kind", "classes")}
    measures = [k for k, v in results[0]["test"].items() if isinstance(v, float)]
    result = {**shared, "num_folds": len(results), "best_epochs": [r["best_epoch"] for r in results]}
    for split in ("validation", "test"):
        values = {k: [r[split][k] for r in results] for k in measures}
        result[split] = {k: float(np.mean(v)) for k, v in values.items()}
        result[f"{split}_folds"] = values
    files.write_json(workdir / RESULT, result)
    return result


def finished(path: Path, encoder: Encoder) -> dict[str, Any]:
    """The result of a run that is finished already, if it is of the same weights."""
    try:
        result = json.loads(path.read_text(encoding="utf-8"))
        same, step = result["encoder"] == encoder.origin, result["encoder"]["step"]
    except (OSError, ValueError, TypeError, KeyError) as e:
        raise ConclugenError(f"{path}: damaged ({type(e).__name__}); delete it to run again") from e
    if not same:
        raise ConclugenError(
            f"{path}: made with other weights (step {step} of the pretraining run, now step "
            f"{encoder.origin['step']}); choose another --workdir, or name that step as config.downstream.checkpoint_step"
        )
    progress.say(f"{path}: finished already, nothing was trained")
    return result


@dataclasses.dataclass(frozen=True)
class _Run:
    """Everything that does not change during a run.

    Attributes:
      config: of the run.
      task: what is predicted, and from what.
      splits: ``train``, ``validation`` and ``test`` rows.
      devices: that share a batch.
      evaluation_batch: examples per call of ``forward``.
      forward: compiled outputs, for evaluation.
    """

    config: ConfigDict
    task: Task
    splits: Mapping[str, shards.RowSource]
    devices: Sequence[jax.Device]
    evaluation_batch: int
    forward: Callable

    @property
    def steps_per_epoch(self) -> int:
        return len(self.splits["train"].usable) // self.config.train.batch_size

    def scores(self, weights: Mapping[str, Any], split: str, *, brief: bool = False) -> dict[str, Any]:
        """All scores of a split (or, ``brief``, loss and measure), from the predictions for all examples with a label."""
        logits, facts = loop.evaluate(
            self.forward,
            parallel.replicate(weights, self.devices),
            self.splits[split],
            batch_size=self.evaluation_batch,
            num_devices=len(self.devices),
        )
        known = task_lib.known(self.task.label, facts["label"])
        if not known.any():
            raise ConclugenError(
                f"{self.config.data.path}: no example of the {split} split has the label; name another"
            )
        of_known = self.task.brief_scores if brief else self.task.scores
        return of_known(logits[known], facts["label"][known])


class Best(NamedTuple):
    """The epoch of best validation measure, the earliest of equals, and its weights on the host."""

    epoch: int
    scores: dict[str, Any]
    weights: dict[str, Any]


def _run(
    config: ConfigDict,
    workdir: Path,
    manifest: Manifest,
    label: LabelSpec,
    encoder: Encoder,
    splits: Mapping[str, shards.RowSource],
    devices: Sequence[jax.Device],
    stop: signals.Stop,
) -> dict[str, Any]:
    encode = config.downstream.protocol not in config_lib.FROZEN
    trainable = (task_lib.CLASSIFIER, task_lib.ENCODER) if encode else (task_lib.CLASSIFIER,)
    if not encode:
        splits = {name: encoder_lib.represented(encoder, rows, config, devices) for name, rows in splits.items()}
    usable = splits["train"].usable
    _check_batches(config, len(usable), devices)
    evaluation_batch = math.ceil(config.train.batch_size / len(devices)) * len(devices)
    config = config.copy_and_resolve_references()
    config.train.batch_size = classifier.fitting_batch(config, len(usable), len(devices))
    labels = task_lib.labels_of(splits["train"])[usable]
    task = task_lib.create(config, label, encoder.model, encode, labels, parallel.AXIS)
    forward = parallel.map_forward(lambda w, batch: task.logits(w["params"], w["feature_stats"], batch), devices)
    run = _Run(config, task, splits, devices, evaluation_batch, forward)
    rates = {task_lib.ENCODER: config.downstream.encoder_rate}
    optimizer, schedule = optimizer_lib.from_config(config, run.steps_per_epoch, trainable, rates)
    step = functools.partial(
        classifier.downstream_step, task=task, optimizer=optimizer, schedule=schedule, split=config.optimizer.shard
    )
    state = classifier.fresh_state(config, task, encoder.dims, optimizer, encoder.variables)
    title = f"{config.downstream.protocol} {workdir.name}"
    total_steps = config.train.num_epochs * run.steps_per_epoch
    mirrors = {"tensorboard": config.train.tensorboard, "tracker": config.train.tracker}
    with (
        workdir_lib.MetricsLog(workdir, step=0, **mirrors) as log,
        progress.Display(title, total_steps=total_steps, steps_per_epoch=run.steps_per_epoch) as display,
    ):
        display.say(f"{title}: {len(usable)} examples, modalities {', '.join(encoder.modalities)}")
        for warning in task_lib.warnings(label, labels):
            display.say(warning)
        best = _fit(run, step, state, log, display, stop)
    shutil.rmtree(workdir / checkpoint.FOLDER, ignore_errors=True)  # of a run that was killed before it left a result
    with checkpoint.Checkpoints(workdir) as saved:
        saved.save((best.epoch + 1) * run.steps_per_epoch, best.weights, {"best_epoch": best.epoch})
    result = facts(config, manifest, label, encoder) | {
        "num_train_examples": len(usable),
        "labels_per_class": config.downstream.labels_per_class,
        "best_epoch": best.epoch,
        "validation": run.scores(best.weights, "validation"),
        "test": run.scores(best.weights, "test"),
    }
    files.write_json(workdir / RESULT, result)
    return result


def _fit(
    run: _Run,
    step: Callable,
    state: TrainState,
    log: workdir_lib.MetricsLog,
    display: progress.Display,
    stop: signals.Stop,
) -> Best:
    """Train to the last epoch and keep the best one."""
    batches = feed.Feed(run.splits["train"], run.config, run.devices, keys=("features", "present", "label"))
    program = batches.make_dispatch(step, sharded_update.axes(state, run.config, run.devices))
    state = sharded_update.place(state, run.config, run.devices)
    task, best, lowest, since = run.task, None, float("inf"), 0
    for dispatch, inputs in batches(batches.plan(0)):
        state, metrics = program(state, *inputs)
        records = loop.records(dispatch, metrics)
        if dispatch.ends_epoch:
            weights = {"params": state.params, "feature_stats": state.feature_stats}
            scores = run.scores(weights, "validation", brief=True)
            records[-1] |= {"validation/loss": scores["loss"], f"validation/{task.measure}": scores[task.measure]}
            # Outputs that are no numbers predict nothing, whatever class they would count as.
            if math.isfinite(scores["loss"]) and (best is None or task.is_better(scores, best.scores)):
                # A copy on the host: the next dispatch takes the state's memory.
                best = Best(dispatch.epoch, scores, jax.tree.map(lambda x: np.array(x, copy=True), weights))
            since = 0 if scores["loss"] < lowest else since + 1
            lowest = min(lowest, scores["loss"])
            shown = {"loss": records[-1]["loss"], f"validation {task.measure}": scores[task.measure]}
            display.update(dispatch.end_step, shown)
        every = run.config.train.log_every_steps
        log.write([r for r in records if r["step"] % every == 0 or "validation/loss" in r])
        if stop.signal:
            raise signals.Interrupted(stop.signal)
        if dispatch.ends_epoch and since == run.config.downstream.early_stopping_epochs > 0:
            display.say(f"stopped after epoch {dispatch.epoch + 1}: no lower validation loss for {since} epochs")
            break
    if best is None:
        raise ConclugenError(f"{run.config.data.path}: {task_lib.not_finite(run.config)}")
    return best


def facts(config: ConfigDict, manifest: Manifest, label: LabelSpec, encoder: Encoder) -> dict[str, Any]:
    """What a result says of where it comes from."""
    return {
        "protocol": config.downstream.protocol,
        "encoder": encoder.origin,
        "data": {"name": manifest.name, "version": manifest.version, "sha256": manifest.fingerprint()},
        "modalities": encoder.modalities,
        "target": config.downstream.target,
        "kind": label.kind,
        "classes": list(label.names),
    }
