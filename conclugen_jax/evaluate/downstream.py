"""Downstream training: a classifier on representations, frozen (linear evaluation) or trained with it.

Linear evaluation, fine-tuning, the supervised baseline and raw features are one code path, told apart by where the
encoder's weights come from and which parameters are trained. A frozen encoder is run once per split; training then reads
its representations.
"""

import shutil
from collections.abc import Sequence
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
from conclugen_jax.run import allowed, checkpoint
from conclugen_jax.run import config as config_lib
from conclugen_jax.run import log as log_lib
from conclugen_jax.run import workdir as workdir_lib
from conclugen_jax.system import files, progress, signals
from conclugen_jax.train import parallel

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
      Interrupted: SIGINT or SIGTERM came; repeating the command starts this run again.
    """
    devices = list(devices or jax.devices())
    config_lib.check(config)
    config_lib.check_downstream(config)
    if config.downstream.num_folds and config.downstream.fold == -1:
        return _all_folds(config, Path(workdir), devices)
    opened = _open(config, len(devices))
    with (
        workdir_lib.claim(workdir) as folder,
        signals.caught() as stop,
        jax.default_matmul_precision(parallel.MATMUL_PRECISION[config.precision]),
    ):
        workdir_lib.settle(folder, opened.config, opened.manifest)
        if (folder / RESULT).exists():
            return finished(folder / RESULT, opened.encoder)
        with stop.at_once():  # such a run is repeated from its start
            return _run(opened, folder, devices, stop)


class _Opened(NamedTuple):
    """What a run is made of, before any row is read."""

    config: ConfigDict
    manifest: Manifest
    label: LabelSpec
    encoder: Encoder
    streams: dict[str, shards.ShardStream]


def _open(config: ConfigDict, num_devices: int) -> _Opened:
    dataset = shards.open_dataset(config.data.path, verify=config.data.verify)
    config = config_lib.with_modalities(config, dataset.manifest.modalities)
    label = splits_lib.label_of(config, dataset)
    encoder = encoder_lib.from_config(config, dataset.manifest)
    variants = config.downstream.protocol not in allowed.FROZEN
    streams = splits_lib.open_streams(config, dataset, encoder.modalities, all_variants=variants)
    if not config.downstream.labels_per_class:  # with few labels the batch is what there is
        config_lib.check_batches(config, num_examples=len(streams["train"].usable), num_devices=num_devices)
    return _Opened(config, dataset.manifest, label, encoder, streams)


def _run(opened: _Opened, folder: Path, devices: Sequence[jax.Device], stop: signals.Stop) -> dict[str, Any]:
    """Read the rows, encode them if the encoder is frozen, train, and score the best epoch."""
    config, manifest, label, encoder, streams = opened
    rows = splits_lib.load(config, label, streams)
    if config.downstream.protocol in allowed.FROZEN:
        rows = {name: encoder_lib.represented(encoder, x, config, devices) for name, x in rows.items()}
    training = classifier.prepare(config, label, encoder, rows, devices)
    best = _train(training, folder, stop)
    result = facts(config, manifest, label, encoder) | {
        "num_train_examples": len(training.labels),
        "labels_per_class": config.downstream.labels_per_class,
        "best_epoch": best.epoch,
        "validation": training.scores(best.weights, "validation"),
        "test": training.scores(best.weights, "test"),
    }
    files.write_json(folder / RESULT, result)
    return result


def _train(training: classifier.Training, folder: Path, stop: signals.Stop) -> classifier.Best:
    """Train with a log and a display, and save the weights of the best epoch."""
    config, steps = training.config, training.steps_per_epoch
    title = f"{config.downstream.protocol} {folder.name}"
    mirrors = {"tensorboard": config.train.tensorboard, "tracker": config.train.tracker}
    with (
        log_lib.MetricsLog(folder, step=0, **mirrors) as log,
        progress.Display(title, total_steps=config.train.num_epochs * steps, steps_per_epoch=steps) as display,
    ):
        modalities = ", ".join(training.encoder.modalities)
        display.say(f"{title}: {len(training.labels)} examples, modalities {modalities}")
        for warning in task_lib.warnings(training.task.label, training.labels):
            display.say(warning)
        best = classifier.fit(training, log, display, stop)
    shutil.rmtree(folder / checkpoint.FOLDER, ignore_errors=True)  # of a run that was killed before it left a result
    with checkpoint.Checkpoints(folder) as saved:
        saved.save((best.epoch + 1) * steps, best.weights, {"best_epoch": best.epoch})
    return best


def _all_folds(config: ConfigDict, workdir: Path, devices: Sequence[jax.Device]) -> dict[str, Any]:
    """Run every fold in a folder of its own; return the means of the scores over folds, beside those of each."""
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
    """Return the result of a run that is finished already.

    Raises:
      ConclugenError: the file is damaged, or the result is of other weights.
    """
    result = files.read_json(path, dict[str, Any], way_out="delete it to run again")
    before = result.get("encoder")
    if before != encoder.origin:
        step = before.get("step") if isinstance(before, dict) else None
        raise ConclugenError(
            f"{path}: made with other weights (step {step} of the pretraining run, now step "
            f"{encoder.origin['step']}); choose another --workdir, or name that step as config.downstream.checkpoint_step"
        )
    progress.say(f"{path}: finished already, nothing was trained")
    return result


def facts(config: ConfigDict, manifest: Manifest, label: LabelSpec, encoder: Encoder) -> dict[str, Any]:
    """Return what a result says of where it comes from."""
    return {
        "protocol": config.downstream.protocol,
        "encoder": encoder.origin,
        "data": {"name": manifest.name, "version": manifest.version, "sha256": manifest.fingerprint()},
        "modalities": encoder.modalities,
        "target": config.downstream.target,
        "kind": label.kind,
        "classes": list(label.names),
    }
