"""Configurations as data: to and from JSON, differences between two, and refusal of impossible values.

A configuration is an ``ml_collections.ConfigDict``; which keys exist is declared by the configuration files, not here.
"""

import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

from ml_collections import ConfigDict

from conclugen_jax.errors import ConclugenError
from conclugen_jax.run.allowed import CHOICES, LISTS, RANGES


def check(config: ConfigDict) -> None:
    """Refuse values that are impossible whatever the data: each message names key, value and what is allowed.

    Raises:
      ConclugenError: the first such value.
    """
    flat = dict(flatten(config.to_dict()))
    if config.data.modalities:
        check_modalities(config.data.modalities)
    for key in (*CHOICES, *RANGES):
        check_value(key, flat[key])
    for key, one in LISTS.items():
        (least, most), values, kinds = RANGES[one], flat[key], (int,) if isinstance(flat[one], int) else (int, float)
        possible = all(isinstance(x, kinds) and least <= x and (most is None or x <= most) for x in values)
        if not possible or len(set(values)) != len(values):
            raise ConclugenError(f"config.{key} is {tuple(values)}; list values that config.{one} may have, each once")
    if config.online_probe.every_epochs and not config.online_probe.learning_rates:
        raise ConclugenError("config.online_probe.learning_rates is empty; name at least one, as in (1e-2,)")
    if not config.data.path:
        raise ConclugenError(
            "config.data.path is empty; name the folder of a built data set, --config.data.path=DATA_DIR/NAME/VERSION "
            "(conclugen build makes one)"
        )
    if config.model.representation_dim % 8:
        raise ConclugenError(
            f"config.model.representation_dim is {config.model.representation_dim}; it must be a multiple of 8"
        )


def check_value(key: str, value: Any) -> None:
    """Refuse a value that is not among the choices of its key, or outside of its range.

    Raises:
      ConclugenError: names key, value and what is allowed.
    """
    allowed = CHOICES.get(key, (value,))
    if value not in allowed:
        raise ConclugenError(f"config.{key} is {value!r}; it must be one of {', '.join(map(repr, allowed))}")
    least, most = RANGES.get(key, (None, None))
    # "not (a <= b)" also refuses NaN.
    if least is not None and not (least <= value and (most is None or value <= most)):
        bounds = f"at least {least}" if most is None else f"between {least} and {most}"
        raise ConclugenError(f"config.{key} is {value}; it must be {bounds}")


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
    names = "contrastive_weight", "clustering_weight", "reconstruction_weight", "instance_weight"
    if not any(config.loss[name] for name in names):
        raise ConclugenError(
            f"config.loss: all weights are 0, so there is nothing to train; raise one of {', '.join(names)}"
        )
    if config.checkpoint.best_by == "probe" and not config.online_probe.every_epochs:
        raise ConclugenError(
            "config.checkpoint.best_by is 'probe', but config.online_probe.every_epochs is 0: no probe would run; set it, or "
            "best_by to 'loss'"
        )
    if not config.data.modalities:  # all of a data set that is not open yet
        return
    if config.loss.instance_weight and config.loss.instance_modality not in config.data.modalities:
        raise ConclugenError(
            f"config.loss.instance_modality is {config.loss.instance_modality!r}, which is not among "
            f"config.data.modalities {tuple(config.data.modalities)}; name one of them"
        )
    if config.loss.contrastive_weight and len(config.data.modalities) < 2:
        raise ConclugenError(
            f"config.data.modalities is {tuple(config.data.modalities)}: the contrastive loss needs two modalities; "
            "name another or set config.loss.contrastive_weight=0"
        )
    # The base configuration names audio; it simply does not apply to data without.
    unknown = set(config.model.bottleneck) - set(config.data.modalities) - {"audio"}
    if unknown:
        raise ConclugenError(
            f"config.model.bottleneck names {min(unknown)!r}, which is not among config.data.modalities "
            f"{tuple(config.data.modalities)}; remove it"
        )


def check_downstream(config: ConfigDict) -> None:
    """Refuse choices of a downstream run that do not go together."""
    section = config.downstream
    if (
        section.num_folds in (1, 2)
        or not -1 <= section.fold < max(section.num_folds, 1)
        or (section.fold > 0 and not section.num_folds)
    ):
        raise ConclugenError(
            f"config.downstream.num_folds is {section.num_folds} and fold {section.fold}; there must be 3 folds at least "
            "(or 0: the data set's own splits), counted from 0 (-1: all of them)"
        )
    if section.protocol == "raw_features" and section.fusion == "mean":
        raise ConclugenError(
            "config.downstream.fusion is 'mean', but raw features of different modalities have different sizes; set it to "
            "'concat'"
        )


def check_batches(config: ConfigDict, *, num_examples: int, num_devices: int) -> None:
    """Refuse a batch that the devices cannot share or that the split cannot fill."""
    batch_size = config.train.batch_size
    if batch_size % num_devices:
        lower = batch_size // num_devices * num_devices
        near = f"{lower} or {lower + num_devices}" if lower else f"{num_devices}"
        raise ConclugenError(
            f"config.train.batch_size is {batch_size}, which {num_devices} devices cannot share equally; set it to {near}"
        )
    if batch_size > num_examples:
        raise ConclugenError(
            f"config.train.batch_size is {batch_size} but the split {config.data.train_split!r} has only {num_examples} "
            f"usable examples; set it to at most {num_examples // num_devices * num_devices}"
        )


def check_clustering(config: ConfigDict, *, num_examples: int) -> None:
    """Refuse clustering that could never take part, or that has fewer points than clusters.

    Args:
      config: of the run.
      num_examples: usable ones of the training split.
    """
    if not config.loss.clustering_weight:
        return
    section = config.clustering
    if section.start_epoch >= config.train.num_epochs:
        raise ConclugenError(
            f"config.clustering.start_epoch is {section.start_epoch} but config.train.num_epochs is "
            f"{config.train.num_epochs}, so clustering would never join; start it earlier, train longer, or set "
            "config.loss.clustering_weight=0"
        )
    others = config.loss.contrastive_weight, config.loss.reconstruction_weight, config.loss.instance_weight
    if not any(others) and section.start_epoch:
        raise ConclugenError(
            f"config.clustering.start_epoch is {section.start_epoch}, but clustering is the only term: nothing would be "
            "trained before; set it to 0"
        )
    steps_per_epoch = num_examples // config.train.batch_size
    if section.queue_reset == "epoch" and section.queue_batches >= steps_per_epoch:
        most = num_examples // (section.queue_batches + 1)
        enough = most > 1 and most * (section.queue_batches + 1) >= section.num_clusters
        smaller = f"config.train.batch_size to {most} or less, " if enough else ""
        raise ConclugenError(
            f"config.clustering.queue_batches is {section.queue_batches} but an epoch has only {steps_per_epoch} "
            f"step{'s' * (steps_per_epoch > 1)}, so the queue, emptied at each epoch, would never count; set {smaller}the "
            "queue lower or config.clustering.queue_reset='never'"
        )
    points = (section.queue_batches + 1) * config.train.batch_size
    if points < section.num_clusters:
        raise ConclugenError(
            f"config.clustering.num_clusters is {section.num_clusters} but k-means sees only {points} points (queue and "
            "batch); set fewer clusters or a larger batch"
        )


def flatten(tree: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Yield dotted key and value of every leaf, tuples as lists."""
    for key, value in tree.items():
        if isinstance(value, Mapping):
            yield from flatten(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", list(value) if isinstance(value, tuple) else value


def to_json(config: ConfigDict) -> str:
    """Return the whole configuration as indented JSON with sorted keys."""
    return json.dumps(config.to_dict(), indent=2, sort_keys=True) + "\n"


def from_tree(tree: Any, source: str) -> ConfigDict:
    """Return the configuration of a run that was read from JSON, as :func:`to_json` writes it.

    Args:
      tree: the value of the JSON.
      source: its file, for messages.

    Raises:
      ConclugenError: it is no object of sections.
    """
    if not isinstance(tree, dict) or not isinstance(tree.get("model"), dict) or not isinstance(tree.get("data"), dict):
        raise ConclugenError(f"{source}: not the configuration of a run; it needs the sections 'data' and 'model'")
    try:
        return ConfigDict(_lists_to_tuples(tree)).lock()
    # The types of errors of keys that ConfigDict does not allow, and of sections nested by the hundred.
    except (ValueError, TypeError, AttributeError, RecursionError) as e:
        raise ConclugenError(f"{source}: not the configuration of a run ({e}); restore it or use a new workdir") from e


def differences(old: ConfigDict, new: ConfigDict) -> list[str]:
    """Return one line ``config.key: old -> new`` for every key whose value differs or that only one side has."""
    return [f"config.{line}" for line in changes(old.to_dict(), new.to_dict())]


def changes(old: Mapping[str, Any], new: Mapping[str, Any]) -> list[str]:
    """Return one line ``key: old -> new`` for every leaf of two trees that differs or that only one side has."""
    before, after = dict(flatten(old)), dict(flatten(new))
    missing = "(absent)"
    return [
        f"{key}: {before.get(key, missing)} -> {after.get(key, missing)}"
        for key in sorted({*before, *after})
        if before.get(key, missing) != after.get(key, missing)
    ]


def _lists_to_tuples(value: Any) -> Any:
    if isinstance(value, dict):
        return {k: _lists_to_tuples(v) for k, v in value.items()}
    if isinstance(value, Sequence) and not isinstance(value, str):
        return tuple(_lists_to_tuples(v) for v in value)
    return value
