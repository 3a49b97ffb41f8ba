"""Downstream training: a classifier on representations, frozen (linear evaluation) or trained with it.

Linear evaluation, fine-tuning, the supervised baseline and raw features are one code path, told apart by where the
encoder's weights come from and which parameters are trained. A frozen encoder is run once per split; training then reads
its representations.
"""

import functools
import math
import shutil
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np
from ml_collections import ConfigDict

from conclugen_jax.data import shards
from conclugen_jax.data.sources import LabelSpec
from conclugen_jax.errors import ConclugenError
from conclugen_jax.evaluate import classifier, weights
from conclugen_jax.evaluate import encoder as encoder_lib
from conclugen_jax.evaluate import splits as splits_lib
from conclugen_jax.evaluate import task as task_lib
from conclugen_jax.evaluate.encoder import Encoder
from conclugen_jax.run import allowed, checkpoint
from conclugen_jax.run import config as config_lib
from conclugen_jax.run import workdir as workdir_lib
from conclugen_jax.system import files, progress, signals
from conclugen_jax.train import feed, parallel

RESULT = weights.RESULT


class Opened(NamedTuple):
    """What a run is made of, before any row is read."""

    config: ConfigDict
    label: LabelSpec
    encoder: Encoder
    streams: dict[str, shards.ShardStream]


def downstream(
    config: ConfigDict, workdir: str | Path, *, devices: Sequence[jax.Device] | None = None
) -> dict[str, Any]:
    """Train a classifier by the protocol of ``config.downstream``, choose its best epoch, score it.

    Args:
      config: see ``configs/base.py``; its batch is lowered to the examples there are.
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
    return once(config, workdir, functools.partial(_fit, devices=devices), len(devices))


def once(
    config: ConfigDict, workdir: str | Path, work: Callable[..., dict[str, Any]], num_devices: int = 1
) -> dict[str, Any]:
    """Return the result of a run that is finished already, else what its ``work(opened, folder, stop)`` finds, written.

    Nothing is left in the workdir of a run that is refused.
    """
    dataset = shards.open_dataset(config.data.path, verify=config.data.verify)
    manifest = dataset.manifest
    config = config_lib.with_modalities(config, manifest.modalities)
    label = splits_lib.label_of(config, dataset)
    encoder = encoder_lib.from_config(config, manifest)
    opened = Opened(config, label, encoder, splits_lib.open_streams(config, dataset, encoder.modalities))
    if not config.downstream.labels_per_class:  # with few labels the batch is what there is
        classifier.with_fitting_batch(config, len(opened.streams["train"].usable), num_devices)
    with (
        workdir_lib.claim(workdir) as folder,
        signals.caught() as stop,
        jax.default_matmul_precision(parallel.MATMUL_PRECISION[config.precision]),
    ):
        workdir_lib.settle(folder, config, manifest)
        path = folder / RESULT
        if path.exists():
            return _finished(path, encoder)
        result = {
            "protocol": config.downstream.protocol,
            "encoder": encoder.origin,
            "data": {"name": manifest.name, "version": manifest.version, "sha256": manifest.fingerprint()},
            "modalities": encoder.modalities,
            "target": config.downstream.target,
            "kind": label.kind,
            "classes": list(label.names),
        } | work(opened, folder, stop)
        files.write_json(path, result)
    return result


def _finished(path: Path, encoder: Encoder) -> dict[str, Any]:
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


def _fit(opened: Opened, folder: Path, stop: signals.Stop, *, devices: Sequence[jax.Device]) -> dict[str, Any]:
    """Read the rows, encode them if the encoder is frozen, train, save and score the best epoch."""
    with stop.at_once():  # such a run is repeated from its start
        config, label, encoder, streams = opened
        rows = splits_lib.load(config, label, streams)
        frozen = config.downstream.protocol in allowed.FROZEN
        if frozen:
            rows = {name: encoder_lib.represented(encoder, x, config, devices) for name, x in rows.items()}
        labels = task_lib.labels_of(rows["train"])[rows["train"].usable]
        for warning in task_lib.warnings(label, labels):
            progress.say(warning)
        network = None if frozen else encoder.model
        task = task_lib.create(config, label, labels, encoder=network, axis_name=parallel.AXIS)
        forward = parallel.map_forward(lambda w, batch: task.logits(w["params"], w["feature_stats"], batch), devices)
        at_a_time = math.ceil(config.train.batch_size / len(devices)) * len(devices)

        def scores(split: str, state: Mapping[str, Any], *, brief: bool = False) -> dict[str, Any]:
            state, sizes = parallel.replicate(state, devices), {"batch_size": at_a_time, "num_devices": len(devices)}
            logits, facts = feed.evaluate(forward, state, rows[split], **sizes)
            return task.scores(logits, facts["label"], f"{config.data.path}: the {split} split", brief=brief)

        config = classifier.with_fitting_batch(config, len(labels), len(devices))
        validate = functools.partial(scores, "validation", brief=True)
        epoch, best = classifier.fit(config, task, encoder, rows["train"], devices, validate, folder, stop)
        shutil.rmtree(
            folder / checkpoint.FOLDER, ignore_errors=True
        )  # of a run that was killed before it left a result
        with checkpoint.Checkpoints(folder) as saved:
            saved.save((epoch + 1) * (len(labels) // config.train.batch_size), best, {"best_epoch": epoch})
        return {
            "num_train_examples": len(labels),
            "labels_per_class": config.downstream.labels_per_class,
            "best_epoch": epoch,
            "validation": scores("validation", best),
            "test": scores("test", best),
        }


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
