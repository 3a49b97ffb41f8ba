"""Downstream training: a classifier on representations, frozen (linear evaluation) or trained with it.

Linear evaluation, fine-tuning and the supervised baseline are one code path, told apart by where the encoder's weights
come from and which parameters are trained. A frozen encoder is run once per split; training then reads its representations.
"""

import dataclasses
import functools
import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from ml_collections import ConfigDict

from conclugen_jax import checkpoint, loop, parallel, probe, progress, signals, train_state
from conclugen_jax import config as config_lib
from conclugen_jax import model as model_lib
from conclugen_jax import optimizer as optimizer_lib
from conclugen_jax import task as task_lib
from conclugen_jax import workdir as workdir_lib
from conclugen_jax.data import batches, host_table, shards
from conclugen_jax.data import manifest as manifest_lib
from conclugen_jax.data.manifest import Manifest
from conclugen_jax.data.sources import LabelSpec
from conclugen_jax.errors import ConclugenError
from conclugen_jax.task import TRAINABLE, Task
from conclugen_jax.train_state import TrainState
from conclugen_jax.types import Metrics

RESULT = "result.json"


def downstream_step(
    state: TrainState,
    batch: Mapping[str, Any],
    *,
    task: Task,
    optimizer: optax.GradientTransformation,
    schedule: Callable[[jax.Array], jax.Array],
) -> tuple[TrainState, Metrics]:
    """One optimizer step; the metrics are those of the state before it."""
    key = jax.random.fold_in(state.rng, state.step)

    def loss_fn(params: Any) -> jax.Array:
        return task.loss(task.logits(params, state.feature_stats, batch, key), batch["label"])

    loss, grads = jax.value_and_grad(loss_fn)(state.params)
    grads = parallel.mean(grads, task.classifier.axis_name)
    updates, opt_state = optimizer.update(grads, state.opt_state, state.params)
    params = optax.apply_updates(state.params, updates)
    metrics = {"loss": loss, "learning_rate": schedule(state.step)}
    return state.replace(step=state.step + 1, params=params, opt_state=opt_state), metrics


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
      ConclugenError: an impossible configuration, bad data, or a checkpoint that does not fit the data.
      Interrupted: SIGINT or SIGTERM came; repeating the command starts this run anew.
    """
    devices = list(devices or jax.devices())
    config_lib.check(config)
    dataset = shards.open_dataset(config.data.path, verify=config.data.verify)
    manifest = dataset.manifest
    label = _label(config, manifest)
    where = f"data set {config.data.path}"
    for split in (config.data.train_split, config.data.validation_split, config.data.test_split):
        manifest_lib.choose(manifest.splits, [split], what="split", where=where)
    encoder = _encoder(config, manifest)
    splits = ("train", "validation", "test")
    encodes = "representation/.*" in TRAINABLE[config.downstream.protocol]
    streams = {
        name: shards.ShardStream(
            dataset,
            getattr(config.data, f"{name}_split"),
            encoder.modalities,
            target=config.downstream.target,
            all_variants=name == "train" and encodes and config.data.variants == "random",
        )
        for name in splits
    }
    config_lib.check_batches(config, num_examples=len(streams["train"].usable), num_devices=len(devices))
    with (
        workdir_lib.claim(workdir) as folder,
        signals.caught() as stop,
        jax.default_matmul_precision(parallel.MATMUL_PRECISION[config.precision]),
    ):
        workdir_lib.settle(folder, config, manifest)
        if (folder / RESULT).exists():
            return _finished(folder / RESULT, encoder)
        rows = {name: loop.load_rows(config, stream) for name, stream in streams.items()}
        return _run(config, folder, manifest, label, encoder, rows, devices, stop)


def _label(config: ConfigDict, manifest: Manifest) -> LabelSpec:
    """What is to be predicted."""
    where, target = f"data set {config.data.path}", config.downstream.target
    if target:
        manifest_lib.choose(manifest.targets, [target], what="target", where=where)
    label = manifest.targets[target] if target else manifest.label
    if label.kind == "none":
        raise ConclugenError(f"{config.data.path}: the data set has no labels; a downstream run needs them")
    return label


def _finished(path: Path, encoder: "_Encoder") -> dict[str, Any]:
    """The result of a run that is finished already, if it is of the same weights."""
    try:
        result = json.loads(path.read_text(encoding="utf-8"))
        same = result["encoder"] == encoder.origin
    except (OSError, ValueError, TypeError, KeyError) as e:
        raise ConclugenError(f"{path}: damaged ({type(e).__name__}); delete it to run again") from e
    if not same:
        raise ConclugenError(
            f"{path}: made with other weights (step {result['encoder'].get('step')} of the pretraining run, now step "
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
      forward: compiled outputs, for evaluation.
    """

    config: ConfigDict
    task: Task
    splits: Mapping[str, shards.RowSource]
    devices: Sequence[jax.Device]
    forward: Callable

    @property
    def steps_per_epoch(self) -> int:
        return len(self.splits["train"].usable) // self.config.train.batch_size

    def scores(self, weights: Mapping[str, Any], split: str) -> dict[str, Any]:
        """All scores of a split, from the predictions for all its examples that have a label."""
        logits, facts = loop.evaluate(
            self.forward,
            parallel.replicate(weights, self.devices),
            self.splits[split],
            batch_size=self.config.train.batch_size,
            num_devices=len(self.devices),
        )
        known = task_lib.known(self.task.label, facts["label"])
        if not known.any():
            raise ConclugenError(
                f"{self.config.data.path}: no example of the {split} split has the label; name another"
            )
        return self.task.scores(logits[known], facts["label"][known])


class Best(NamedTuple):
    """The epoch of best validation scores, the earliest of equals, and its weights on the host."""

    epoch: int
    scores: dict[str, Any]
    weights: dict[str, Any]


def _run(
    config: ConfigDict,
    workdir: Path,
    manifest: Manifest,
    label: LabelSpec,
    encoder: "_Encoder",
    splits: Mapping[str, shards.RowSource],
    devices: Sequence[jax.Device],
    stop: signals.Stop,
) -> dict[str, Any]:
    trainable = TRAINABLE[config.downstream.protocol]
    encode = "representation/.*" in trainable
    if not encode:
        splits = {name: _represented(encoder, rows, config, devices) for name, rows in splits.items()}
    labels = task_lib.labels_of(splits["train"])
    splits["train"].usable = np.intersect1d(splits["train"].usable, np.flatnonzero(task_lib.known(label, labels)))
    config_lib.check_batches(config, num_examples=len(splits["train"].usable), num_devices=len(devices))
    task = task_lib.create(config, label, encoder.model, encode, labels[splits["train"].usable], parallel.AXIS)
    forward = parallel.map_forward(lambda w, batch: task.logits(w["params"], w["feature_stats"], batch), devices)
    run = _Run(config, task, splits, devices, forward)
    rates = {"representation/.*": config.downstream.encoder_rate}
    optimizer, schedule = optimizer_lib.from_config(config, run.steps_per_epoch, trainable, rates)
    step = functools.partial(downstream_step, task=task, optimizer=optimizer, schedule=schedule)
    state = _fresh_state(config, task, encoder, optimizer)
    title = f"{config.downstream.protocol} {workdir.name}"
    total_steps = config.train.num_epochs * run.steps_per_epoch
    with (
        workdir_lib.MetricsLog(workdir, step=0, tensorboard=config.train.tensorboard) as log,
        progress.Display(title, total_steps=total_steps, steps_per_epoch=run.steps_per_epoch) as display,
    ):
        display.say(f"{title}: {len(splits['train'].usable)} examples, modalities {', '.join(encoder.modalities)}")
        best = _fit(run, step, state, log, display, stop)
    with checkpoint.Checkpoints(workdir) as saved:
        saved.save((best.epoch + 1) * run.steps_per_epoch, best.weights, {"best_epoch": best.epoch})
    result = {
        "protocol": config.downstream.protocol,
        "encoder": encoder.origin,
        "data": {"name": manifest.name, "version": manifest.version, "sha256": manifest.fingerprint()},
        "modalities": encoder.modalities,
        "target": config.downstream.target,
        "kind": label.kind,
        "classes": list(label.names),
        "num_train_examples": len(splits["train"].usable),
        "best_epoch": best.epoch,
        "validation": run.scores(best.weights, "validation"),
        "test": run.scores(best.weights, "test"),
    }
    workdir_lib.write_atomically(workdir / RESULT, json.dumps(result, indent=1) + "\n")
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
    program = parallel.map_step(loop.make_dispatch(step), run.devices)
    state = parallel.replicate(state, run.devices)
    dispatches = loop.plan(0, run.steps_per_epoch, run.config.train)
    keys = ("features", "present", "label")
    task, best, lowest, since = run.task, None, float("inf"), 0
    for dispatch, table, stacked in loop.feed(run.splits["train"], run.config, run.devices, dispatches, keys):
        state, metrics = program(state, table, stacked)
        records = loop.records(dispatch, metrics)
        if dispatch.ends_epoch:
            weights = {"params": state.params, "feature_stats": state.feature_stats}
            scores = run.scores(weights, "validation")
            records[-1] |= {"validation/loss": scores["loss"], f"validation/{task.measure}": scores[task.measure]}
            if best is None or task.is_better(scores, best.scores):
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
    return best


class _Encoder(NamedTuple):
    """The representation network.

    Attributes:
      model: computes representations.
      variables: its parameters and feature statistics.
      modalities: whose representations are used.
      origin: where the weights come from, for the result: workdir, step, seed, hash of the parameters.
    """

    model: model_lib.ConCluGen
    variables: dict[str, Any]
    modalities: list[str]
    origin: dict[str, Any]


def _encoder(config: ConfigDict, manifest: Manifest) -> _Encoder:
    """Where the weights come from: 1. the named pretraining checkpoint; 2. random, for the supervised baseline."""
    source, step = None, 0
    if config.downstream.protocol != "supervised":
        source = config.downstream.checkpoint
        if not source:
            raise ConclugenError(
                "config.downstream.checkpoint is empty; linear evaluation and fine-tuning need the workdir of a pretraining "
                "run (the supervised baseline is --config.downstream.protocol=supervised)"
            )
        step = probe.find_step(source, config.downstream.checkpoint_step)
        model, variables, trained = probe.load(source, step)
        seed = trained.seed
    else:
        where, wanted = f"data set {config.data.path}", config.downstream.modalities or config.data.modalities
        names = manifest_lib.choose(manifest.modalities, wanted, what="modality", where=where)
        model = model_lib.from_config(config, {m: manifest.modalities[m] for m in names}).clone(heads=())
        key, _ = jax.random.split(jax.random.key(config.seed))
        variables, seed = model_lib.initial_variables(model, key, manifest), config.seed
    model = model.clone(dtype=model_lib.DTYPES[config.precision])
    origin = {"workdir": source, "step": step, "seed": seed, "sha256": checkpoint.fingerprint(variables["params"])}
    return _Encoder(model, variables, _modalities(config, model, manifest), origin)


def _modalities(config: ConfigDict, model: model_lib.ConCluGen, manifest: Manifest) -> list[str]:
    """Modalities whose representations are used: those asked for, or all of the encoder's."""
    known = dict(model.feature_dims)
    where = f"checkpoint {config.downstream.checkpoint}"
    names = manifest_lib.choose(known, config.downstream.modalities or known, what="modality", where=where)
    manifest_lib.choose(manifest.modalities, names, what="modality", where=f"data set {config.data.path}")
    for m in names:
        if known[m] != manifest.modalities[m]:
            raise ConclugenError(
                f"data set {config.data.path} has {manifest.modalities[m]} features of modality {m!r}, {where} was "
                f"trained on {known[m]}; use features of the same extractor"
            )
    return names


def _represented(
    encoder: _Encoder, rows: shards.RowSource, config: ConfigDict, devices: Sequence[jax.Device]
) -> host_table.HostTable:
    """The split with representations in place of features, computed once."""
    forward = parallel.map_forward(
        lambda v, batch: encoder.model.apply(v, batch["features"], method="represent"), devices
    )
    representations, facts = loop.evaluate(
        forward,
        parallel.replicate(encoder.variables, devices),
        rows,
        batch_size=config.train.batch_size,
        num_devices=len(devices),
    )
    gib = sum(x.nbytes for x in representations.values()) / 2**30
    limit = config.data.device_table_gib
    tier = batches.choose_tier("auto", gib, device_table_gib=limit, host_table_gib=float("inf"))
    return batches.TABLES[tier]({"features": representations, **facts}, rows.usable)


def _fresh_state(
    config: ConfigDict, task: Task, encoder: _Encoder, optimizer: optax.GradientTransformation
) -> TrainState:
    """A random classifier, on top of the encoder's parameters where those are trained too."""
    _, run_key = jax.random.split(jax.random.key(config.seed))
    init_key, run_key = jax.random.split(run_key)
    zeros = {m: jnp.zeros((1, encoder.model.representation_dim)) for m in encoder.modalities}
    present = {m: jnp.ones(1, bool) for m in encoder.modalities}
    classifier = task.classifier.clone(axis_name=None)
    params = {"classifier": classifier.init(init_key, zeros, present=present)["params"]}
    feature_stats = {}
    if task.encode:
        params["representation"] = encoder.variables["params"]["representation"]
        feature_stats = encoder.variables.get("feature_stats", {})
    return train_state.create({"params": params, "feature_stats": feature_stats}, optimizer, run_key)
