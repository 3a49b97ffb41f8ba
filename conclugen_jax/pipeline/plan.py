"""The configurations of ``conclugen run``: pretraining, its baselines, and the final classifier."""

import importlib
from collections.abc import Mapping, Sequence
from typing import Any

import jax
from ml_collections import ConfigDict

from conclugen_jax.evaluate.baselines import BASELINES
from conclugen_jax.pipeline import rules
from conclugen_jax.pipeline.rules import MANY, Facts, Scheme, Setting
from conclugen_jax.runs import configuration_files
from conclugen_jax.study.definition import PROBE, Run

METHOD = "pretrained"
START = "conclu_neighbours"
CLASSIFIER, WHOLE = "classifier", "pretraining/whole/seed_0"
"""Folders below that of everything, which is that of the study too: the classifier for use, and pretraining with all rows."""
CLOSED = "principal_components", "canonical_correlations"
"""Baselines that take long on many rows."""
MOST_STEPS, QUICK_MOST = 20_000, 2000
"""Steps of a classifier at most, and in a first look."""


def configured(
    settings: Sequence[Setting], data: Mapping[str, Any], changes: Sequence[tuple[str, str]], start: str | ConfigDict
) -> ConfigDict:
    """Return a configuration of pretraining with settings, values for its data, and the user's changes, which win.

    ``changes``: keys with their values as text; ``start``: name or file of the configuration that is changed, or itself.
    """
    config = (
        configuration_files.load(start, of_run=True) if isinstance(start, str) else start.copy_and_resolve_references()
    )
    config.update_from_flattened_dict({one.key: one.value for one in settings} | dict(data))
    for key, text in changes:
        configuration_files.override(config, key, text)
    if config.clustering.start_epoch >= config.train.num_epochs and "clustering.start_epoch" not in dict(changes):
        config.clustering.start_epoch = config.train.num_epochs // 5
    return config


def fold_name(name: str, scheme: Scheme) -> str:
    """Return the name of the data sets of a scheme's folds, as a study names them."""
    return f"{name}_fold{{fold}}of{scheme.num_folds}_seed{{shuffle}}"


def written(settings: Sequence[Setting], config: ConfigDict, name: str) -> str:
    """Return a configuration file that gives the same configuration, with the reason of each setting."""
    chosen = {one.key: one for one in settings}
    usual = dict(configuration_files.flatten(configuration_files.load(START, of_run=True)))
    lines = []
    for key, value in configuration_files.flatten(config):
        one = chosen.get(key)
        if one and one.value == value:
            lines.append(f"    # {one.reason}")
        if one or value != usual[key]:
            lines.append(f"    config.{key} = {value!r}")
    whose = "chosen from its data; they start from" if settings else "as they were given; what follows differs from"
    head = f'"""Settings of {name}, {whose} those of {START}."""'
    start = f"from configs import {START}\n\n\ndef get_config():\n    config = {START}.get_config()"
    return "\n".join([head, "", start, *lines, "    return config", ""])


def study(config: ConfigDict, scheme: Scheme, known: Facts, name: str, *, quick: bool = False) -> ConfigDict:
    """Return the study that measures the gain of pretraining: raw features, an untrained network and the pretrained one.

    ``config``: of pretraining, on a data set with ``{fold}`` and ``{shuffle}`` for the folds of a scheme in its path.
    """
    path = config.data.path
    found = importlib.import_module("configs.study_base").get_config()
    found.name, found.pretraining_path, found.num_folds = name, path, scheme.num_folds
    found.seeds, found.label_draws, found.reference = scheme.seeds, 5 if len(scheme.seeds) > 1 else 3, METHOD
    gib = known.rows * sum(known.dims.values()) * 4 / 2**30
    found.job_gib = round(1.5 + 6 * gib, 2)
    found.methods[METHOD] = ConfigDict({"title": METHOD, "modalities": (), "pretraining": config})
    found.order = (METHOD,)
    found.labels.update({PROBE: scheme.labels})
    slow = known.rows > MANY
    found.baselines = tuple(name for name in BASELINES if name not in (CLOSED if slow or quick else ()))
    protocols = {"linear_evaluation": classifier(config, scheme, known, quick=quick)}
    if known.kind == "single":
        protocols[PROBE] = importlib.import_module("configs.study_base").probe(config)
        protocols[PROBE].data.validation_split = config.data.train_split  # nothing is chosen by it
        protocols[PROBE].data.test_split = rules.scored_split(known)
    else:
        linear = protocols["linear_evaluation"]
        protocols |= {name: linear.copy_and_resolve_references() for name in ("raw_features", "untrained")}
    found.datasets[name] = ConfigDict({"path": path, "protocols": protocols})
    return found.lock()


def classifier(config: ConfigDict, scheme: Scheme, known: Facts, *, quick: bool = False) -> ConfigDict:
    """Return the configuration of the linear classifier.

    Its epochs are chosen by the validation split, by the training rows where there is none or that is what is scored.
    """
    found = configuration_files.load("linear_evaluation", of_run=True)
    found.data.update(config.data)
    found.model.update(config.model)
    found.data.test_split = rules.scored_split(known)
    if "validation" not in known.splits or found.data.test_split == "validation":
        found.data.validation_split = config.data.train_split
    found.seed = config.seed
    devices = jax.device_count()
    found.train.batch_size = max(min(128, known.rows) // devices, 1) * devices
    most = QUICK_MOST if quick else MOST_STEPS
    found.train.num_epochs = max(5, min(100, most // max(known.rows // found.train.batch_size, 1)))
    return found


def model(config: ConfigDict, scheme: Scheme | None, known: Facts, *, quick: bool = False) -> list[Run]:
    """Return the runs that train the final classifier for new clips, in order.

    Without folds the classifier is on top of the study's first pretraining; otherwise on top of one with all rows.
    """
    runs, checkpoint = [], f"pretraining/{METHOD}/seed_{scheme.seeds[0]}" if scheme else WHOLE
    if scheme is None or scheme.num_folds:
        runs, checkpoint = [Run(WHOLE, config, "pretraining", "", METHOD, config.seed)], WHOLE
    if scheme is None:
        return runs
    one = classifier(config, scheme, known, quick=quick)
    if scheme.num_folds:
        one.data.test_split = ""  # all rows are trained on
    one.downstream.checkpoint = checkpoint
    return [*runs, Run(CLASSIFIER, one, CLASSIFIER, "", METHOD, config.seed)]
