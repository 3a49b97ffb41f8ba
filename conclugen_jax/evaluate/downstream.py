"""Downstream training: a classifier on representations, frozen (linear evaluation) or trained with it.

Linear evaluation, fine-tuning, the supervised baseline and raw features are one code path, which differ in where the
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
import jax.numpy as jnp
import numpy as np
from ml_collections import ConfigDict

from conclugen_jax.data import batches, persons, shards
from conclugen_jax.errors import ConclugenError
from conclugen_jax.evaluate import across, bank, best_epochs, metrics, splits as splits_lib, task as task_lib, weights
from conclugen_jax.evaluate.task import Task, with_fitting_batch
from conclugen_jax.method import train_state
from conclugen_jax.method.train_state import Metrics, TrainState
from conclugen_jax.runs import checkpoint, config as config_lib, log as log_lib, workdir as workdir_lib
from conclugen_jax.system import files, processes, progress, signals
from conclugen_jax.train import feed, optimizer as optimizer_lib, parallel


class Run(NamedTuple):
    """A downstream run that owns its workdir."""

    config: ConfigDict
    encoder: weights.Encoder
    streams: Mapping[str, shards.ShardStream]
    folder: Path
    others: Sequence[across.Other] = ()  # what is scored besides


def downstream(
    config: ConfigDict, workdir: str | Path, *, devices: Sequence[jax.Device] | None = None
) -> dict[str, Any]:
    """Train a classifier by the protocol of ``config.downstream``, choose its best epoch, score it.

    Args:
      config: see ``configs/base.py``. A batch larger than the split is lowered to its number of examples.
      workdir: takes ``config.json``, ``data.json``, ``metrics.jsonl``, ``result.json`` and ``checkpoints/`` (the weights of the
        best epoch). If the same run is finished there already, its result is returned.
      devices: to train on; ``None``: all, those of other processes too.

    Returns:
      Content of ``result.json``: scores of the validation and test split (if there is one) at the epoch of best validation
      accuracy (see ``metrics.py``), and where everything came from. Of several processes process 0 writes, and all return
      its result.

    Raises:
      ConclugenError: an impossible configuration, bad data, a checkpoint that does not fit the data, or no finite loss.
      Interrupted: SIGINT or SIGTERM came; repeating the command starts this run again.
    """
    devices = list(devices or jax.devices())
    result = over_folds(config, workdir, functools.partial(_run, devices=devices), _averaged, len(devices))
    matrix = result.get("test", {}).get("confusion_matrix")
    for line in result.get("warnings", []) + metrics.remarks([] if matrix is None else [matrix], result["classes"]):
        progress.say(line)
    return result


def over_folds(
    config: ConfigDict,
    workdir: str | Path,
    work: Callable[[Run], dict[str, Any]],
    joined: Callable[[Sequence[dict[str, Any]]], dict[str, Any]],
    num_devices: int = 1,
) -> dict[str, Any]:
    """Return the result of :func:`once`; of several folds, what they share and what is ``joined`` of their results.

    Args:
      config: of the run.
      workdir: folder of the run; each fold has a folder in it.
      work: trains and scores one run.
      joined: results of all folds -> what the whole result has of them.
      num_devices: of the run, all processes together.
    """
    section, folder = config.downstream, Path(workdir)
    if not section.num_folds or section.fold != -1:
        return once(config, folder, work, num_devices)
    results = []
    for fold in range(section.num_folds):
        one = config.copy_and_resolve_references()
        one.downstream.fold = fold
        results.append(once(one, folder / f"fold_{fold}", work, num_devices))
    shared = {k: results[0][k] for k in ("protocol", "encoder", "data", "modalities", "target", "kind", "classes")}
    folds: dict[str, list[str]] = {}
    for fold, one in enumerate(results):
        for line in one.get("warnings", []):
            folds.setdefault(line, []).append(str(fold))
    lines = [line + f" (fold {', '.join(of)})" * (len(of) < len(results)) for line, of in folds.items()]
    result = {**shared, "num_folds": len(results), "fold_by": section.fold_by, "warnings": lines, **joined(results)}
    if processes.is_main():
        files.write_atomically(folder / workdir_lib.CONFIG, config_lib.to_json(config))
        files.write_json(folder / weights.RESULT, result)
    return result


def once(config: ConfigDict, workdir: str | Path, work: Callable[[Run], dict[str, Any]], num_devices: int = 1):
    """Return the result of a run that is finished already, else what its ``work`` finds, written.

    Nothing is left in the workdir of a run that is refused.
    """
    config_lib.check(config)
    config_lib.check_downstream(config)
    dataset = shards.open_dataset(config.data.path, verify=config.data.verify)
    manifest = dataset.manifest
    config = config_lib.with_modalities(config, manifest.modalities)
    encoder = weights.encoder(config, manifest, functools.partial(splits_lib.fit_persons, config, dataset))
    streams = splits_lib.open_streams(config, dataset, encoder.modalities)
    splits_lib.check(config, streams)
    others = across.opened(config, dataset, encoder.modalities)
    if not config.downstream.labels_per_class:  # with few labels the batch is what there is
        with_fitting_batch(config, len(streams["train"].usable), num_devices)
    facts = {"weights": encoder.origin["sha256"], "test_data": [other.facts()["data"] for other in others]}
    parallel.check_alike(config, manifest, **facts)
    with (
        workdir_lib.claim(workdir) as folder,
        signals.caught() as stop,
        jax.default_matmul_precision(parallel.MATMUL_PRECISION[config.precision]),
    ):
        workdir_lib.settle(folder, config, manifest)
        path, label = folder / weights.RESULT, streams["train"].label
        before = _finished(path, encoder, others) if processes.is_main() and path.exists() else None
        if (before := processes.json_of_main(before)) is not None:
            return before
        if encoder.persons:
            if processes.is_main():
                encoder.persons.write(folder / persons.FILE)
            for stream in {id(stream): stream for stream in streams.values()}.values():
                encoder.persons.attach(stream)
            for other in others:
                across.strangers(encoder.persons).attach(other.stream)
        streams |= {other.key: other.stream for other in others}
        result = {
            "protocol": config.downstream.protocol,
            "encoder": encoder.origin,
            "data": {"name": manifest.name, "version": manifest.version, "sha256": manifest.fingerprint()},
            "modalities": encoder.modalities,
            "target": config.downstream.target,
            "kind": label.kind,
            "classes": list(label.names),
        }
        result |= {"test_data": [other.facts() for other in others]} if others else {}
        with stop.at_once():  # such a run is repeated from its start
            result = processes.json_of_main(result | work(Run(config, encoder, streams, folder, others)))
        if processes.is_main():
            files.write_json(path, result)
    return result


def _finished(path: Path, encoder: weights.Encoder, others: Sequence[across.Other]) -> dict[str, Any]:
    result = files.read_json(path, dict[str, Any], way_out="delete it to run again")
    before = result.get("encoder")
    if before != encoder.origin:
        step = before.get("step") if isinstance(before, dict) else None
        fact = f"made with other weights (step {step} of the pretraining run, now step {encoder.origin['step']})"
        way_out = "choose another --workdir, or name that step as config.downstream.checkpoint_step"
        raise ConclugenError(f"{path}: {fact}; {way_out}")
    if result.get("test_data", []) != [other.facts() for other in others]:
        raise ConclugenError(
            f"{path}: a data set of config.data.test_paths has changed since; choose another --workdir"
        )
    progress.say(f"{path}: finished already, nothing was trained")
    return result


def _run(run: Run, devices: Sequence[jax.Device]) -> dict[str, Any]:
    """Read the rows, encode them if the encoder is frozen, train, save and score the best epoch."""
    config, encoder, streams, folder, others = run
    label, frozen = streams["train"].label, config.downstream.protocol in config_lib.FROZEN
    rows, everyone = splits_lib.load(config, streams)
    if frozen:
        rows = {name: represented(encoder, x, config, devices) for name, x in rows.items()}
    if frozen and encoder.evaluation.smoothing_neighbours:
        rows = bank.joined(rows, everyone, encoder.evaluation, config.downstream.fusion)
        encoder = encoder._replace(dims={bank.JOINED: rows["train"].table["features"][bank.JOINED].shape[1]})
        run = run._replace(encoder=encoder)
    everyone = task_lib.labels_of(rows["train"])
    labels, per_class = everyone[rows["train"].usable], config.downstream.labels_per_class
    network = None if frozen else encoder.model
    task = task_lib.create(config, label, labels, encoder=network, axis_name=parallel.AXIS)
    own = list(parallel.own_devices(devices).values())
    forward = parallel.map_forward(lambda w, batch: task.logits(w["params"], w["feature_stats"], batch), own)
    at_a_time = math.ceil(config.train.batch_size / len(devices)) * len(devices)

    def outputs(split: str, state: Mapping[str, Any]) -> tuple[np.ndarray, np.ndarray]:
        state, sizes = parallel.replicate(state, own), {"batch_size": at_a_time, "num_devices": len(own)}
        logits, facts = feed.evaluate(forward, state, rows[split], **sizes)
        return logits, facts["label"]

    def scores(split: str, state: Mapping[str, Any], *, brief: bool = False) -> dict[str, Any]:
        return task.scores(*outputs(split, state), streams[split].where, brief=brief)

    config = with_fitting_batch(config, len(labels), len(devices))
    validate = functools.partial(scores, "validation", brief=True)
    epoch, best = _fit(run._replace(config=config), task, rows["train"], devices, validate)
    if processes.is_main():  # those of a run that was killed before it left a result
        shutil.rmtree(folder / checkpoint.FOLDER, ignore_errors=True)
    with checkpoint.Checkpoints(folder) as saved:
        saved.save((epoch + 1) * (len(labels) // config.train.batch_size), best, {"best_epoch": epoch})
    return {
        "num_train_examples": len(labels),
        "labels_per_class": config.downstream.labels_per_class,
        "warnings": splits_lib.warnings(config, label, everyone) + task_lib.warnings(label, labels, per_class),
        "best_epoch": epoch,
        **{split: scores(split, best) for split in splits_lib.NAMES[1:] if split in rows},
        **across.scored(others, task, lambda split: outputs(split, best)),
    }


def represented(
    encoder: weights.Encoder, rows: shards.RowSource, config: ConfigDict, devices: Sequence[jax.Device]
) -> batches.HostTable:
    """Return the split with representations in place of features."""
    represent = functools.partial(encoder.model.apply, method="represent")
    size, own = len(devices), list(parallel.own_devices(devices).values())
    forward = parallel.map_forward(lambda v, batch: represent(v, batch["features"]), own)
    variables = parallel.replicate(encoder.variables, own)
    at_a_time = max(config.train.batch_size // size * size, size)
    found, facts = feed.evaluate(forward, variables, rows, batch_size=at_a_time, num_devices=len(own))
    gib, limit = sum(x.nbytes for x in found.values()) / 2**30, config.data.device_table_gib
    tier = batches.choose_tier("auto", gib, device_table_gib=limit, host_table_gib=float("inf"))
    return batches.HostTable({"features": found, **facts}, rows.usable, tier=tier)


def _averaged(results: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Return what the results of all folds have in common: means of the scores, beside those of each."""
    return {"best_epochs": [r["best_epoch"] for r in results], **averaged(results)}


def averaged(results: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Return for each split the means of its scores over folds, the sum of confusion matrices, and the scores of each fold."""
    found = {}
    for split in ("validation", "test"):
        values = {k: [r[split][k] for r in results] for k, v in results[0][split].items() if isinstance(v, float)}
        found[split] = {k: float(np.mean(v)) for k, v in values.items()}
        if "confusion_matrix" in results[0][split]:
            found[split]["confusion_matrix"] = np.sum([r[split]["confusion_matrix"] for r in results], axis=0).tolist()
        found[f"{split}_folds"] = values
    return found


def _fit(run: Run, task: Task, rows: shards.RowSource, devices: Sequence[jax.Device], validate: Callable):
    """Train to the last epoch or until the validation loss has not fallen for some; return the best epoch and its weights.

    ``validate``: weights -> loss and measure of the validation split.
    """
    config, encoder, _, folder, _ = run
    batches, program, state = _start(run, task, rows, devices)
    patience, title = config.downstream.early_stopping_epochs, f"{config.downstream.protocol} {folder.name}"
    # Training rows that choose their own epoch are all right soon: what is still learned shows in the loss.
    of_training = config.data.validation_split == config.data.train_split
    best, kept = best_epochs.BestEpochs(task.measure, patience, by_loss=of_training), None
    step = None  # compiled ahead: on several processes a call that compiles takes no split update
    steps, every = batches.steps_per_epoch, config.train.log_every_steps
    mirrors = {"tensorboard": config.train.tensorboard, "tracker": config.train.tracker}
    with (
        log_lib.MetricsLog(folder, step=0, **mirrors) as log,
        progress.Display(title, total_steps=config.train.num_epochs * steps, steps_per_epoch=steps) as display,
    ):
        size, modalities = config.train.batch_size, ", ".join(encoder.modalities)
        display.say(f"{title}: {len(rows.usable)} examples, batches of {size}, modalities {modalities}")
        for dispatch, inputs in batches(batches.plan(0)):
            step = step or parallel.compiled(program, state, *inputs)
            state, metrics = step(state, *inputs)
            records = feed.records(dispatch, metrics)
            if dispatch.ends_epoch:
                now = {"params": state.params, "feature_stats": state.feature_stats}
                scores = processes.json_of_main(validate(now))  # by which all stop after the same epoch
                records[-1] |= {f"validation/{name}": score for name, score in scores.items()}
                if best.improved(dispatch.epoch, scores[task.measure], scores["loss"]):
                    # A copy on the host: the next dispatch takes the state's memory.
                    kept = dispatch.epoch, jax.tree.map(lambda x: np.array(x, copy=True), now)
                shown = {"loss": records[-1]["loss"], f"validation {task.measure}": scores[task.measure]}
                display.update(dispatch.end_step, shown)
            log.write([r for r in records if r["step"] % every == 0 or "validation/loss" in r])
            if not best.running:
                display.say(f"stopped after epoch {dispatch.epoch + 1}: no lower validation loss for {patience} epochs")
                break
    if kept is None:
        raise task_lib.not_finite(config)
    return kept


def _start(run: Run, task: Task, rows: shards.RowSource, devices: Sequence[jax.Device]):
    """Return the feed, the program of its dispatches and the first state, placed on the devices."""
    config, encoder = run.config, run.encoder
    batches = feed.Feed(rows, config, devices, keys=("features", "present", "label"))
    trainable = (task_lib.CLASSIFIER,) if task.encoder is None else (task_lib.CLASSIFIER, task_lib.ENCODER)
    rates = {task_lib.ENCODER: config.downstream.encoder_rate}
    optimizer, schedule = optimizer_lib.from_config(config, batches.steps_per_epoch, trainable=trainable, rates=rates)
    state = fresh_state(config.seed, task, encoder.dims, optimizer, encoder.variables)
    pieces = {"task": task, "optimizer": optimizer, "schedule": schedule, "split": config.optimizer.shard}
    step = functools.partial(downstream_step, **pieces)
    program = batches.program(step, parallel.axes(state, config, devices))
    return batches, program, parallel.place(state, config, devices)


def downstream_step(
    state: TrainState, batch: Mapping[str, Any], *, task: Task, optimizer: Any, schedule: Callable, split: bool = False
) -> tuple[TrainState, Metrics]:
    """Take one optimizer step, optionally ``split`` over the devices; the metrics are those of the state before it."""
    key = jax.random.fold_in(state.rng, state.step)

    def loss_fn(params: Any) -> jax.Array:
        return task.loss(task.logits(params, state.feature_stats, batch, key), batch["label"])

    loss, grads = jax.value_and_grad(loss_fn)(state.params)
    how = {"split": split, "axis_name": task.classifier.axis_name}
    params, opt_state, _ = parallel.update(optimizer, grads, state.opt_state, state.params, **how)
    metrics = {"loss": loss, "learning_rate": schedule(state.step)}
    return state.replace(step=state.step + 1, params=params, opt_state=opt_state), metrics


def fresh_state(seed: int, task: Task, dims: Mapping[str, int], optimizer: Any, variables: Any = None) -> TrainState:
    """Return a random classifier by the seed of a run, on top of the encoder's ``variables`` where it is trained.

    ``dims``: modality -> size of its representation.
    """
    _, run_key = jax.random.split(jax.random.key(seed))
    init_key, run_key = jax.random.split(run_key)
    zeros = {m: jnp.zeros((1, dim)) for m, dim in dims.items()}
    present = {m: jnp.ones(1, bool) for m in dims}
    classifier = task.classifier.clone(axis_name=None)
    params, stats = {"classifier": classifier.init(init_key, zeros, present=present)["params"]}, {}
    if task.encoder is not None:
        params["representation"] = variables["params"]["representation"]
        stats = variables.get("feature_stats", {})
    return train_state.create({"params": params, "feature_stats": stats}, optimizer, run_key)
