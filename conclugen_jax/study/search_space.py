"""Define which hyper-parameters of pretraining a search varies and within which bounds, and make losses comparable."""

import json
import math
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from ml_collections import ConfigDict

from conclugen_jax.errors import ConclugenError, did_you_mean
from conclugen_jax.method import objective as objective_lib
from conclugen_jax.runs import config as config_lib
from conclugen_jax.system import files

Space = dict[str, dict[str, Any]]
"""key -> {"low", "high"} with optional "log", both ends included, or {"choices"}."""


OBJECTIVES = {
    "pretraining_loss": {
        "direction": "minimize",
        "meaning": "sum of the loss terms without their weights, each at the scale of the base configuration, mean over the "
        "last epoch; the least is best; no label is read",
    },
    "validation_probe": {
        "direction": "maximize",
        "meaning": "accuracy of logistic regression (L2, C = 1) on the standardised representations of the training split, "
        "scored on the validation split after the last epoch; the greatest is best",
    },
}
"""Measures that compare trials."""

TERMS = {
    "contrastive": ("soft_targets", "target_neighbours"),
    "instance": ("views",),
    "fusion": (),
    "clustering": ("clustering", "margin_in_denominator"),
    "reconstruction": ("decoder_relu",),
}
"""Term of the loss -> section and names of keys that serve it alone, beside those whose name begins with it."""

_FORM = '{"low": 1e-5, "high": 1e-3, "log": true} or {"choices": [256, 512]}'
# Not of the method: other data, what is kept and shown, or how long every trial trains.
_FIXED = ("seed", "data.", "downstream.", "sweep.", "checkpoint.", "online_probe.", "train.")
_SEARCHED_ALL_THE_SAME = ("train.batch_size", "data.standardize")


def default(config: ConfigDict, *, steps_per_epoch: int) -> Space:
    """Return what the authors searched (sizes, loss weights, clusters, queue, start epoch, rates), around a configuration.

    Their ranges are not published; these are ours. Keys of terms without weight are dropped, and so is the weight of
    the first term: AdamW follows the ratio of the weights alone. The queue has fewer batches than an epoch has steps.
    """
    values, num_epochs = dict(config_lib.flatten(config.to_dict())), config.train.num_epochs

    def sizes(key: str, *shares: float, multiple: int = 1) -> dict[str, Any]:
        return {"choices": sorted({max(1, round(values[key] * share / multiple)) * multiple for share in shares})}

    def around(key: str) -> dict[str, Any]:
        return {"low": values[key] / 10, "high": values[key] * 10, "log": True}

    num_clusters = values["clustering.num_clusters"]
    longest = 8 if values["clustering.queue_reset"] == "never" else min(8, steps_per_epoch - 1)
    joins = num_epochs // 2 if len(_weights(config)) > 1 and num_epochs >= 4 else 0
    space = {
        "model.representation_dim": sizes("model.representation_dim", 1 / 4, 1 / 2, 1, 2, multiple=8),
        "model.projection_dim": sizes("model.projection_dim", 1 / 2, 1, 2),
        "model.reconstruction_dim": sizes("model.reconstruction_dim", 1 / 2, 1, 3 / 2),
        **{key: around(key) for key in _weights(config)[1:]},
        "clustering.num_clusters": {"low": max(2, num_clusters // 2), "high": 4 * num_clusters, "log": True},
        "clustering.queue_batches": {"low": 1, "high": longest},
        "clustering.start_epoch": {"low": 0, "high": joins},
        "optimizer.learning_rate": around("optimizer.learning_rate"),
        "optimizer.weight_decay": {"low": 1e-6, "high": 1e-1, "log": True},
    }
    return {
        key: one for key, one in space.items() if not _unused(key, config) and one.get("low", 0) < one.get("high", 1)
    }


def read(path: str | Path) -> dict[str, Any]:
    """Read the object of JSON in a file; :func:`check` says whether it is a space."""
    return files.read_json(Path(path), dict[str, Any], way_out=f"expected keys with {_FORM}")


def check(space: Any, config: ConfigDict, *, objective: str, source: str) -> Space:
    """Check a space and return it as it is searched: keys without ``config.``, numbers of the type that their key has.

    ``config`` is every trial's, less the keys searched; ``source`` is the file of the space, for messages.

    Raises:
      ConclugenError: no space, a key that does not exist, has no effect or is not for searching, values that are
        impossible, or losses that could not be compared.
    """
    if not isinstance(space, dict) or not space:
        raise ConclugenError(f"{source}: expected an object of configuration keys, each with {_FORM}")
    known, checked = dict(config_lib.flatten(config.to_dict())), {}
    for written, spec in space.items():
        key = written.removeprefix("config.")
        for fault in _faults(key, spec, known, config, objective):
            raise ConclugenError(f"{source}: {written} {fault}")
        if key in checked:
            raise ConclugenError(f"{source}: {written} appears twice; keep one")
        kind = type(known[key])
        values = [kind(value) for value in spec.get("choices") or (spec["low"], spec["high"])]
        log = spec.get("log", False)
        checked[key] = {"choices": values} if "choices" in spec else {"low": values[0], "high": values[1], "log": log}
        for value in values:
            try:
                config_lib.check(with_overrides(config, {key: value}))
            except ConclugenError as e:
                raise ConclugenError(f"{source}: {e}") from None
    return checked


def with_overrides(config: ConfigDict, overrides: Mapping[str, Any]) -> ConfigDict:
    """Return a copy of a configuration with some keys set."""
    config = config.copy_and_resolve_references()
    config.update_from_flattened_dict(dict(overrides))
    return config


def comparable_loss(means: Mapping[str, float], config: ConfigDict, base: ConfigDict) -> float:
    """Return the unweighted sum of the terms (Eq. 11-13), on one scale whatever the trial's hyper-parameters.

    A cross-entropy against more rows or clusters is larger without being worse, so each mean ``loss/...`` of an epoch is
    multiplied by its chance level under the search's base configuration over that under the trial's own. Clustering that has
    not joined yet counts as its chance level. Where the keys searched touch neither, this is exactly the sum of Eq. 11-13.
    """
    own, common = _chance(config), _chance(base)
    terms = {name: value for name, value in means.items() if name.startswith("loss/")}
    if config.loss.clustering_weight:
        terms.setdefault("loss/clustering", own["loss/clustering"])
    return sum(value * (common[name] / own[name] if name in own else 1.0) for name, value in terms.items())


def _chance(config: ConfigDict) -> dict[str, float]:
    """Return the chance level of each term that is a cross-entropy."""
    modalities, rows = config.data.modalities, config.train.batch_size
    pairs = objective_lib.modality_pairs(modalities, config.loss.contrastive_pairs)
    assigned = 1 if config.loss.clustering_target == "joint" else len(modalities)
    return {
        "loss/contrastive": 2 * len(pairs) * math.log(rows),
        "loss/clustering": assigned * math.log(config.clustering.num_clusters),
        "loss/instance": math.log(2 * rows - 1),
        "loss/fusion": (1 + len(modalities)) * math.log(2 * rows - 1),
    }


def _weights(config: ConfigDict) -> list[str]:
    return [f"loss.{term}_weight" for term in TERMS if config.loss[f"{term}_weight"]]


def _unused(key: str, config: ConfigDict) -> str:
    """Return why a key changes nothing; empty if it changes something."""
    section, name = key.split(".")[0], key.split(".")[-1]
    for term, own in TERMS.items():
        if (name.startswith(f"{term}_") or {section, name} & set(own)) and not config.loss[f"{term}_weight"]:
            return f"loss.{term}_weight is 0"
    alone = name.startswith(("projection_", "norm_")) and _weights(config) == ["loss.reconstruction_weight"]
    return "loss has the reconstruction term alone" if alone else ""


def _faults(key: str, spec: Any, known: Mapping[str, Any], config: ConfigDict, objective: str) -> Iterator[str]:
    """Yield the faults of an entry of a space. After a fault, do not take the next one."""
    if key not in known:
        yield f"is not a configuration key{did_you_mean(key, known)}"
    if isinstance(known[key], (list, tuple)):
        yield "is a list; only numbers, words and switches can be searched, so remove it"
    if key.startswith(_FIXED) and key not in _SEARCHED_ALL_THE_SAME:
        yield f"is no hyper-parameter to search, it is the same in all trials; remove it and set --config.{key} instead"
    if unused := _unused(key, config):
        yield f"has no effect, since config.{unused}; remove it or set that"
    if not _fits(spec, known[key]):
        yield (
            f"is {json.dumps(spec)}; expected {_FORM}: values like {json.dumps(known[key])}, each once; low less than high, "
            "and above 0 where log is true; choices alone for words and switches"
        )
    if key == "model.representation_dim" and "low" in spec:
        yield "must be a multiple of 8; list its values as choices"
    section, name, fault = key.split(".")[0], key.split(".")[-1], ""
    if name.endswith("_weight"):
        if not min(spec.get("choices") or [spec["low"]]):
            fault = "may be 0, and a term without weight is not measured"
    elif (
        key == "data.standardize" or section in ("views", "augmentation") or (section == "loss" and name != "reduction")
    ):
        fault = "changes what the loss measures"
    if fault and objective == "pretraining_loss":
        yield f"{fault}, so losses could not be compared; change it or search with --objective=validation_probe"


def _fits(spec: Any, example: Any) -> bool:
    """Return whether an entry of a space has one of the two forms, with values of the type of the configuration's own."""
    kind, rest = type(example), dict(spec) if isinstance(spec, dict) else {}
    choices, log = rest.pop("choices", None), rest.pop("log", False)
    values = [rest.pop("low", None), rest.pop("high", None)] if choices is None else choices
    alike = isinstance(values, list) and all(type(x) is kind or (type(x) is int and kind is float) for x in values)
    if rest or not alike or (kind is float and not all(map(math.isfinite, values))):
        return False
    if choices is not None:
        return 0 < len(values) == len(set(values)) and "log" not in spec
    return kind in (int, float) and isinstance(log, bool) and values[0] < values[1] and (values[0] > 0 or not log)
