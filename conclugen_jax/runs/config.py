"""Configurations as data: to and from JSON, differences between two, and refusal of impossible values.

A configuration is an ``ml_collections.ConfigDict``; which keys exist is declared by the configuration files, not here.
"""

import json
import re
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from ml_collections import ConfigDict

from conclugen_jax.errors import ConclugenError
from conclugen_jax.method import clustering, layers
from conclugen_jax.method.model import PROJECTING, VECTORS
from conclugen_jax.runs.configuration_files import LISTS, check_types, defaults, flatten

PROTOCOLS = ("linear_evaluation", "fine_tuning", "supervised", "raw_features", "untrained")  # as tables list them
FROZEN = (
    "linear_evaluation",
    "raw_features",
    "untrained",
)  # these train the classifier alone; others the encoder too
PRETRAINED = ("linear_evaluation", "fine_tuning")  # protocols that start from a pretraining run; the others need none

CHOICES = {
    "precision": ("float32", "tensorfloat32", "bfloat16"),
    "data.standardize": ("none", "split", "person"),
    "data.tier": ("auto", "device", "host", "shards"),
    "data.variants": ("random", "first"),
    "data.storage_dtype": ("float32", "bfloat16"),
    "data.verify": ("hash", "size"),
    "train.tracker": ("", "wandb", "mlflow"),
    "model.representation_head": layers.REPRESENTATION_HEADS,
    "model.projection_sharing": ("shared", "separate"),
    "loss.reduction": ("sum", "mean"),
    "loss.contrastive_pairs": ("all", "circle"),
    "loss.clustering_target": ("joint", "individual"),
    "loss.neighbour_space": ("raw", "representation"),
    "clustering.queue_reset": ("epoch", "never"),
    "clustering.initialisation": clustering.INITIALISATIONS,
    "clustering.metric": clustering.METRICS,
    "evaluation.vectors": VECTORS,
    "checkpoint.best_by": ("loss", "probe"),
    "optimizer.name": ("adamw", "sgd"),
    "schedule.granularity": ("epoch", "step"),
    "downstream.protocol": PROTOCOLS,
    "downstream.evaluation": ("checkpoint", "own"),
    "downstream.fusion": ("concat", "mean"),
    "downstream.fold_by": ("group", "example"),
    "downstream.class_weights": ("inverse_frequency", "none"),
}
"""Key -> values that it may have."""

NOT_NEGATIVE = (0, None)  # least and most value of a number; ``None``: no bound
RANGES = {
    "seed": (0, 2**31 - 1),
    "encoder_chunk_size": (0, 2**24),
    "model.representation_dim": (8, 2**20),
    "model.projection_dim": (1, 2**20),
    "model.reconstruction_dim": (1, 2**20),
    "model.norm_momentum": (0, 1),
    "model.norm_epsilon": (1e-12, 1),
    "loss.instance_temperature": (1e-6, 1e6),
    "loss.fusion_temperature": (1e-6, 1e6),
    "data.person_floor": (1e-6, 1e6),
    "data.person_shrinkage": (0, 1e6),
    "loss.neighbours": (0, 1000),
    "loss.neighbour_probability": (0, 1),
    "loss.neighbour_refresh_epochs": (1, 10**6),
    "loss.soft_targets": (0, 100),
    "loss.target_neighbours": (0, 10**4),
    "views.mask_rate": (0, 1),
    "views.noise": (0, 1e6),
    "augmentation.feature_dropout": (0, 0.99),
    "augmentation.modality_dropout": (0, 0.99),
    "augmentation.mixup": (0, 100),
    "loss.contrastive_margin": (0, 10),
    "loss.clustering_margin": (0, 10),
    "clustering.num_clusters": (2, 2**20),
    "clustering.start_epoch": (0, 10**6),
    "clustering.queue_batches": (0, 10**4),
    "clustering.max_iterations": (1, 10**6),
    "clustering.refit_every_steps": (1, 10**9),
    "optimizer.learning_rate": (0, 1e3),
    "optimizer.b1": (0, 0.999999),
    "optimizer.b2": (0, 0.9999999),
    "optimizer.eps": (1e-16, None),
    "schedule.warmup_epochs": (0, 10**6),
    "schedule.warmup_start": (0, 1),
    "schedule.period_epochs": (1, 10**6),
    "schedule.period_multiplier": (1, 1000),
    "train.batch_size": (2, 2**24),
    "train.num_epochs": (1, 10**6),
    "train.steps_per_dispatch": (1, 10**5),
    "train.log_every_steps": (1, 10**9),
    "train.max_bad_steps": (0, 10**6),
    "checkpoint.every_epochs": (1, 10**6),
    "checkpoint.max_failures": (1, 10**6),
    "checkpoint.keep_newest": (1, 10**6),
    "checkpoint.keep_best": (0, 10**6),
    "online_probe.every_epochs": (0, 10**6),
    "online_probe.neighbours": (1, 10**6),
    "online_probe.num_epochs": (1, 10**6),
    "evaluation.smoothing_neighbours": (0, 10**6),
    "evaluation.smoothing_share": (0, 1),
    "evaluation.c_times_dim": (0, 1e9),
    "downstream.dropout_rate": (0, 0.999),
    "downstream.threshold": (0, 1),
    "downstream.encoder_rate": (0, 1e6),
    "downstream.early_stopping_epochs": (0, 10**6),
    "downstream.labels_per_class": (0, 10**9),
    "downstream.label_draw": (0, 2**31 - 1),
    "downstream.num_folds": (0, 10**4),
    "downstream.fold": (-1, 10**4),
}
"""Key -> least and most value, both included; other numbers must not be negative."""

READ_LATER = (  # keys of a run that whatever uses it reads
    r"seed|precision|data\.(path|modalities|(train|test)_split|standardize)|model\..*|loss\..*_weight|"
    r"clustering\.(num_clusters|metric)|"
    r"downstream\.(protocol|checkpoint.*|modalities|fusion|dropout_rate|class_weights|threshold)"
)
ADDED = (
    r"evaluation\..*|augmentation\..*|data\.(person_.*|test_paths)|model\.representation_head|downstream\.evaluation|"
    r"online_probe\.health|"
    r"loss\.(neighbour.*|soft_targets|target_neighbours|fusion_.*)"
)
"""Keys that runs of version 0.1 may lack."""
OTHER_WEIGHTS = ("contrastive_weight", "reconstruction_weight", "instance_weight", "fusion_weight")


def _refuse(config: ConfigDict, keys: str, impossible: Any, why: str) -> None:
    """Raise an error that names some keys with their values, why they are impossible together, and the way out."""
    if impossible:
        flat = dict(flatten(config))
        shown = ", ".join(f"config.{key} is {flat[key]!r}" for key in keys.split(", "))
        raise ConclugenError(f"{shown}: {why}")


def check(config: ConfigDict) -> None:
    """Refuse values that are impossible whatever the data; each message names key, value and what is allowed."""
    check_types(config)
    flat = dict(flatten(config))
    if config.data.modalities:
        check_modalities(config.data.modalities)
    for key, value in flat.items():
        check_value(key, value)
    for key, one in LISTS.items():
        if not all(_in_range(one, x) for x in flat[key]) or len(set(flat[key])) != len(flat[key]):
            raise ConclugenError(f"config.{key} is {flat[key]}; list values that config.{one} may have, each once")
    probe, example = config.online_probe, "--config.data.path=DATA_DIR/NAME/VERSION (conclugen build makes one)"
    without_rates = probe.every_epochs and not probe.learning_rates
    _refuse(config, "online_probe.learning_rates", without_rates, "name at least one, as in (1e-2,)")
    _refuse(config, "data.path", not config.data.path, f"name the folder of a built data set, {example}")
    headless = config.evaluation.vectors == "projection" and not any(
        config.loss[f"{name}_weight"] for name in PROJECTING
    )
    _refuse(config, "evaluation.vectors", headless, "no loss of this run trains a projection; choose others")
    _refuse(config, "model.representation_dim", config.model.representation_dim % 8, "it must be a multiple of 8")


def check_value(key: str, value: Any, where: str = "") -> None:
    """Refuse a value that is not among the choices of its key, or outside of its range; ``where`` begins the sentence."""
    choices = CHOICES.get(key, (value,))
    if value not in choices:
        raise ConclugenError(f"{where}config.{key} is {value!r}; it must be one of {', '.join(map(repr, choices))}")
    if isinstance(value, (int, float)) and not _in_range(key, value):
        least, most = RANGES.get(key, NOT_NEGATIVE)
        bounds = f"at least {least}" if most is None else f"between {least} and {most}"
        raise ConclugenError(f"{where}config.{key} is {value}; it must be {bounds}")


def _in_range(key: str, value: float) -> bool:
    least, most = RANGES.get(key, NOT_NEGATIVE)
    return least <= value and (most is None or value <= most)  # NaN is in none


def check_modalities(names: Sequence[str]) -> None:
    """Refuse a list of modalities that is empty, has a name twice, or came as one word from the command line."""
    if not names or len(set(names)) != len(names) or not all(isinstance(m, str) and m.isidentifier() for m in names):
        raise ConclugenError(
            f"config.data.modalities is {tuple(names)}; name at least one modality, each once, as in "
            "--config.data.modalities=video,text"
        )


def with_modalities(config: ConfigDict, available: Iterable[str]) -> ConfigDict:
    """Return the configuration with all modalities of a data set as ``data.modalities`` where it names none."""
    if config.data.modalities:
        return config
    config = config.copy_and_resolve_references()
    config.data.modalities = tuple(available)
    return config


def check_objective(config: ConfigDict) -> None:
    """Refuse an objective that cannot be trained: no term, or a term without its modalities."""
    loss, names, probes = config.loss, config.data.modalities, config.online_probe.every_epochs
    others = any(loss[name] for name in OTHER_WEIGHTS)
    weights = ", ".join(f"loss.{name}" for name in ("clustering_weight", *OTHER_WEIGHTS))
    _refuse(config, weights, not loss.clustering_weight and not others, "there is nothing to train; raise one of them")
    late = loss.neighbour_refresh_epochs >= config.train.num_epochs
    late = late and loss.neighbours and loss.neighbour_space == "representation"
    why = "no epoch would search neighbours; refresh earlier, train longer, or set neighbour_space to 'raw'"
    _refuse(config, "loss.neighbour_refresh_epochs, train.num_epochs, loss.neighbour_space", late, why)
    without_probe = config.checkpoint.best_by == "probe" and not probes
    why = "no probe would run; set config.online_probe.every_epochs, or best_by to 'loss'"
    _refuse(config, "checkpoint.best_by, online_probe.every_epochs", without_probe, why)
    why = "both add positives to an example; set one of them to 0"
    _refuse(config, "loss.soft_targets, loss.target_neighbours", loss.soft_targets and loss.target_neighbours, why)
    hidden = config.augmentation.feature_dropout or config.augmentation.modality_dropout
    why = "both passes would get the same input; set config.augmentation.feature_dropout or modality_dropout"
    _refuse(config, "loss.fusion_weight", loss.fusion_weight and not hidden, why)
    twice = loss.fusion_weight and loss.instance_weight
    _refuse(
        config, "loss.fusion_weight, loss.instance_weight", twice, "each passes the batch twice; set one of them to 0"
    )
    if not names:  # all of a data set that is not open yet
        return
    unknown = loss.instance_weight and loss.instance_modality not in names
    _refuse(config, "loss.instance_modality, data.modalities", unknown, "it must be one of the modalities")
    why = "the contrastive loss needs two modalities; name another or set config.loss.contrastive_weight=0"
    _refuse(config, "data.modalities", loss.contrastive_weight and len(names) < 2, why)
    # The base configuration names audio; it does not apply to data without.
    unknown = set(config.model.bottleneck) - {*names, "audio"}
    _refuse(config, "model.bottleneck, data.modalities", unknown, "it may name modalities only; remove the others")


def check_downstream(config: ConfigDict) -> None:
    """Refuse incompatible values of a downstream run."""
    section, folds = config.downstream, config.downstream.num_folds
    impossible = folds in (1, 2) or not -1 <= section.fold < max(folds, 1) or (section.fold > 0 and not folds)
    why = "there must be at least 3 folds (0: the data set's own splits), counted from 0 (-1 runs all folds)"
    _refuse(config, "downstream.num_folds, downstream.fold", impossible, why)
    impossible = section.protocol == "raw_features" and section.fusion == "mean"
    why = "raw features of different modalities have different sizes; set fusion to 'concat'"
    _refuse(config, "downstream.protocol, downstream.fusion", impossible, why)
    others = config.data.test_paths
    why = "other data sets can be scored only with stored splits; build the data set with --num_folds and --fold"
    _refuse(config, "data.test_paths, downstream.num_folds", others and folds, why)
    why = "name the split to score in all data sets, such as 'test'"
    _refuse(config, "data.test_paths, data.test_split", others and not config.data.test_split, why)


def check_batches(config: ConfigDict, *, num_examples: int, num_devices: int) -> None:
    """Refuse a batch that the devices cannot share or that the split cannot fill."""
    batch_size, most, key = config.train.batch_size, num_examples // num_devices * num_devices, "train.batch_size"
    why = f"its {num_examples} usable examples cannot be shared by {num_devices} devices; use fewer devices"
    _refuse(config, "data.train_split", not most, why)
    best, steps = _largest_batch(config, num_examples, num_devices), config.clustering.queue_batches + 1
    way_out = f"at most {best or most}"
    if best < most:  # a larger batch would be refused for the queue
        way_out += f", so that an epoch has {steps} steps" if best else " and config.clustering.queue_reset to 'never'"
    why = f"there are only {num_examples} usable examples in that split; set the batch to {way_out}"
    _refuse(config, f"{key}, data.train_split", batch_size > num_examples, why)
    lower = batch_size // num_devices * num_devices
    near = " or ".join(str(size) for size in (lower, lower + num_devices) if 0 < size <= most)
    why = f"{num_devices} devices cannot share equally; set it to {near}"
    _refuse(config, key, batch_size % num_devices, why)


def _largest_batch(config: ConfigDict, num_examples: int, num_devices: int) -> int:
    """Return the largest batch with which clustering can start; 0 if no batch allows it with this queue."""
    steps = 1
    if config.loss.clustering_weight and config.clustering.queue_reset == "epoch":
        steps += config.clustering.queue_batches
    most = num_examples // steps // num_devices * num_devices
    return most if most > 1 and (steps == 1 or steps * most >= config.clustering.num_clusters) else 0


def check_clustering(config: ConfigDict, *, num_examples: int, num_devices: int = 1) -> None:
    """Refuse clustering that could never start, or that has fewer points than clusters."""
    if not config.loss.clustering_weight:
        return
    section, steps_per_epoch = config.clustering, num_examples // config.train.batch_size
    why = "clustering would never start; start it earlier, train longer, or set config.loss.clustering_weight=0"
    late = section.start_epoch >= config.train.num_epochs
    _refuse(config, "clustering.start_epoch, train.num_epochs", late, why)
    alone = not any(config.loss[name] for name in OTHER_WEIGHTS)
    why = "clustering is the only loss, so nothing would train before it starts; set start_epoch to 0"
    _refuse(config, "clustering.start_epoch", alone and section.start_epoch, why)
    if section.queue_reset == "epoch" and section.queue_batches >= steps_per_epoch:
        most = _largest_batch(config, num_examples, num_devices)
        smaller = f"config.train.batch_size to {most} or less, " if most else ""
        why = (
            f"an epoch has only {steps_per_epoch} step{'s' * (steps_per_epoch > 1)}, so the queue, emptied at each epoch, "
            f"would never count; set {smaller}the queue lower or config.clustering.queue_reset='never'"
        )
        _refuse(config, "clustering.queue_batches", True, why)
    points = (section.queue_batches + 1) * config.train.batch_size
    why = f"k-means sees only {points} points (queue and batch); set fewer clusters or a larger batch"
    _refuse(config, "clustering.num_clusters", points < section.num_clusters, why)


def to_json(config: ConfigDict) -> str:
    """Return the whole configuration as indented JSON with sorted keys."""
    return json.dumps(config.to_dict(), indent=2, sort_keys=True) + "\n"


def from_tree(tree: Any, source: str) -> ConfigDict:
    """Return the configuration of a run as :func:`to_json` writes it, or refuse it; ``source`` names its file."""
    try:
        if not all(isinstance(tree[name], dict) for name in ("data", "model")):
            raise TypeError("one is no object")
        config = ConfigDict(_lists_to_tuples(_of_today(tree))).lock()
    # The types of errors of other values, of keys that ConfigDict does not allow, and of sections nested by the hundred.
    except (KeyError, ValueError, TypeError, AttributeError, RecursionError) as e:
        fact = f"not the configuration of a run, with sections such as 'data' and 'model' ({e})"
        raise ConclugenError(f"{source}: {fact}; restore it or use a new workdir") from e
    check_types(config, f"{source}: ")
    flat = dict(flatten(config))
    for key in defaults():
        if key in flat:
            check_value(key, flat[key], f"{source}: ")
        elif re.fullmatch(READ_LATER, key):
            raise ConclugenError(f"{source}: lacks config.{key}; restore it or use a new workdir")
    return config


def _of_today(tree: Mapping[str, Any]) -> dict[str, Any]:
    """Return a tree of version 0.1 in the present format: with added keys, and with renamed values."""
    tree = {key: dict(value) if isinstance(value, dict) else value for key, value in tree.items()}
    for section, _, name in (key.partition(".") for key in defaults() if re.fullmatch(ADDED, key)):
        if isinstance(there := tree.setdefault(section, {}), dict):
            there.setdefault(name, defaults()[f"{section}.{name}"])
    if isinstance(before := tree["data"].get("standardize"), bool):
        tree["data"]["standardize"] = "split" if before else "none"
    return tree


def differences(old: ConfigDict, new: ConfigDict) -> list[str]:
    """Return one line ``config.key: old -> new`` for every key whose value differs or that only one side has."""
    return [f"config.{line}" for line in changes(old.to_dict(), new.to_dict())]


def changes(old: Mapping[str, Any], new: Mapping[str, Any]) -> list[str]:
    """Return one line ``key: old -> new`` for every leaf of two trees that differs or that only one side has."""
    lists = [{k: list(v) if isinstance(v, tuple) else v for k, v in flatten(tree)} for tree in (old, new)]
    before, after = ({key: x.get(key, "(absent)") for key in sorted(set().union(*lists))} for x in lists)
    return [f"{key}: {before[key]} -> {after[key]}" for key in before if before[key] != after[key]]


def _lists_to_tuples(value: Any) -> Any:
    if isinstance(value, dict):
        return {k: _lists_to_tuples(v) for k, v in value.items()}
    if isinstance(value, (list, tuple)):
        return tuple(_lists_to_tuples(v) for v in value)
    return value
