"""Downstream training: a classifier on representations, frozen (linear evaluation) or trained with it (supervised).

The two protocols are one code path, told apart by where the encoder's weights come from and which parameters are
trained. A frozen encoder is run once per split; training then reads its representations.
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

from conclugen_jax import checkpoint, loop, losses, parallel, probe, progress, signals, train_state
from conclugen_jax import config as config_lib
from conclugen_jax import metrics as metrics_lib
from conclugen_jax import model as model_lib
from conclugen_jax import optimizer as optimizer_lib
from conclugen_jax import workdir as workdir_lib
from conclugen_jax.data import batches, host_table, shards
from conclugen_jax.data import manifest as manifest_lib
from conclugen_jax.data.manifest import Manifest
from conclugen_jax.errors import ConclugenError
from conclugen_jax.train_state import TrainState
from conclugen_jax.types import Metrics

RESULT = "result.json"
TRAINABLE = {"linear_evaluation": ("classifier/.*",), "supervised": ("classifier/.*", "representation/.*")}
"""Protocol -> parameters that are trained; all others stay as they are, bit for bit."""


class Task(NamedTuple):
    """What is predicted, and from what.

    Attributes:
      encoder: the representation network.
      classifier: what is trained on its representations.
      encode: whether features still have to be encoded; ``False``: they are representations already.
      kind: ``single`` or ``multi``.
      weights: [num_outputs], of the classes, or of the positive side of each label.
    """

    encoder: model_lib.ConCluGen
    classifier: model_lib.Classifier
    encode: bool
    kind: str
    weights: np.ndarray

    def logits(
        self, params: Any, feature_stats: Any, batch: Mapping[str, Any], dropout_key: jax.Array | None = None
    ) -> jax.Array:
        """float32 [n, num_outputs] from ``features`` and ``present`` of a batch."""
        inputs = batch["features"]
        if self.encode:
            variables = {
                "params": {"representation": params["representation"]},
                "feature_stats": feature_stats,
            }
            inputs = self.encoder.apply(variables, inputs, method="represent")
        return self.classifier.apply(
            {"params": params["classifier"]}, inputs, present=batch["present"], dropout_key=dropout_key
        )

    def loss(self, logits: jax.Array, labels: jax.Array) -> jax.Array:
        """Scalar, over the global batch."""
        weights, axis_name = jnp.asarray(self.weights), self.classifier.axis_name
        if self.kind == "single":
            return losses.cross_entropy(logits, labels, class_weights=weights, axis_name=axis_name)
        return losses.multi_label_cross_entropy(logits, labels, positive_weights=weights, axis_name=axis_name)


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
    if manifest.label.kind not in ("single", "multi"):
        raise ConclugenError(
            f"{config.data.path}: labels of kind {manifest.label.kind!r}; a downstream run needs classes ('single') or labels "
            "of 0 and 1 ('multi')"
        )
    where = f"data set {config.data.path}"
    for split in (config.data.train_split, config.data.validation_split, config.data.test_split):
        manifest_lib.choose(manifest.splits, [split], what="split", where=where)
    encoder = _encoder(config, manifest)
    splits = ("train", "validation", "test")
    streams = {
        name: shards.ShardStream(dataset, getattr(config.data, f"{name}_split"), encoder.modalities) for name in splits
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
        return _run(config, folder, manifest, encoder, rows, devices, stop)


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
      names: of the classes or labels.
      task: what is predicted, and from what.
      splits: ``train``, ``validation`` and ``test`` rows.
      devices: that share a batch.
      forward: compiled logits, for evaluation.
    """

    config: ConfigDict
    names: Sequence[str]
    task: Task
    splits: Mapping[str, shards.RowSource]
    devices: Sequence[jax.Device]
    forward: Callable

    @property
    def steps_per_epoch(self) -> int:
        return len(self.splits["train"].usable) // self.config.train.batch_size

    def scores(self, weights: Mapping[str, Any], split: str) -> dict[str, Any]:
        """All scores of a split, from the predictions of all its examples."""
        logits, facts = loop.evaluate(
            self.forward,
            parallel.replicate(weights, self.devices),
            self.splits[split],
            batch_size=self.config.train.batch_size,
            num_devices=len(self.devices),
        )
        if self.task.kind == "single":
            return metrics_lib.single_label_scores(facts["label"], logits.argmax(axis=1), self.names)
        probabilities = 1 / (1 + np.exp(-logits.astype(np.float64)))
        predictions = probabilities > self.config.downstream.threshold
        return metrics_lib.multi_label_scores(facts["label"], predictions, self.names)


class Best(NamedTuple):
    """The epoch of best validation accuracy, the earliest of equals, and its weights on the host."""

    epoch: int
    accuracy: float
    weights: dict[str, Any]


def _run(
    config: ConfigDict,
    workdir: Path,
    manifest: Manifest,
    encoder: "_Encoder",
    splits: Mapping[str, shards.RowSource],
    devices: Sequence[jax.Device],
    stop: signals.Stop,
) -> dict[str, Any]:
    trainable = TRAINABLE[config.downstream.protocol]
    encode = "representation/.*" in trainable
    if not encode:
        splits = {name: _represented(encoder, rows, config, devices) for name, rows in splits.items()}
    task = _task(config, manifest, encoder.model, encode)
    forward = parallel.map_forward(lambda w, batch: task.logits(w["params"], w["feature_stats"], batch), devices)
    run = _Run(config, manifest.label.names, task, splits, devices, forward)
    optimizer, schedule = optimizer_lib.from_config(config, run.steps_per_epoch, trainable)
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
        "classes": list(manifest.label.names),
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
    best = None
    for dispatch, table, stacked in loop.feed(run.splits["train"], run.config, run.devices, dispatches, keys):
        state, metrics = program(state, table, stacked)
        records = loop.records(dispatch, metrics)
        if dispatch.ends_epoch:
            weights = {"params": state.params, "feature_stats": state.feature_stats}
            accuracy = run.scores(weights, "validation")["accuracy"]
            records[-1]["validation/accuracy"] = accuracy
            if best is None or accuracy > best.accuracy:
                # A copy on the host: the next dispatch takes the state's memory.
                best = Best(dispatch.epoch, accuracy, jax.tree.map(lambda x: np.array(x, copy=True), weights))
            display.update(dispatch.end_step, {"loss": records[-1]["loss"], "validation accuracy": accuracy})
        every = run.config.train.log_every_steps
        log.write([r for r in records if r["step"] % every == 0 or "validation/accuracy" in r])
        if stop.signal:
            raise signals.Interrupted(stop.signal)
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
    if config.downstream.protocol == "linear_evaluation":
        source = config.downstream.checkpoint
        if not source:
            raise ConclugenError(
                "config.downstream.checkpoint is empty; linear evaluation needs the workdir of a pretraining run "
                "(the supervised baseline is --config.downstream.protocol=supervised)"
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


def _task(config: ConfigDict, manifest: Manifest, encoder: model_lib.ConCluGen, encode: bool) -> Task:
    classifier = model_lib.Classifier(
        num_outputs=len(manifest.label.names),
        dropout_rate=config.downstream.dropout_rate,
        dtype=encoder.dtype,
        axis_name=parallel.AXIS,
    )
    return Task(encoder, classifier, encode, manifest.label.kind, class_weights(config, manifest))


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


def class_weights(config: ConfigDict, manifest: Manifest) -> np.ndarray:
    """Weights by the training split's label counts, float32 [num_outputs].

    ``inverse_frequency``: n / (num_classes * n_c) for single labels, so that classes weigh alike and the mean over
    examples is 1; negatives / positives for the positive side of each label of a multi-label task. A class without
    examples has weight 0, a label without positives weight 1.
    """
    facts = manifest.splits[config.data.train_split]
    counts, n = np.asarray(facts["label_counts"], np.float64), facts["num_examples"]
    if config.downstream.class_weights == "none":
        return np.ones(len(counts), np.float32)
    safe = np.maximum(counts, 1)
    if manifest.label.kind == "single":
        return np.where(counts > 0, n / (len(counts) * safe), 0).astype(np.float32)
    return np.where(counts > 0, (n - counts) / safe, 1).astype(np.float32)
