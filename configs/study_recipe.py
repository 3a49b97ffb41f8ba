"""Study of the recommended method: every part removed once, what else was tried, all baselines.

docs/understand/protocol.md says how it was run.

Command:  make evidence, or conclugen study --config=study_recipe:digits (or :ravdess, :digits_choice, :ravdess_choice)
Hardware: two CPU cores. Time and score: see docs/understand/evidence.md.

The data sets are those of ``make evidence`` in data/: the digits, and RAVDESS in three folds by actor for each shuffle.
"""

from collections.abc import Mapping
from typing import Any

from ml_collections import ConfigDict

from conclugen_jax.errors import ConclugenError
from configs import conclu_neighbours, demo, study_base, study_demo

DATA = {
    "digits": ("data/digits/1.0.0", {"train.batch_size": 350}),
    "ravdess": (
        "data/ravdess_fold{fold}of3_seed{shuffle}/1.0.0",
        {"train.batch_size": 320, "train.num_epochs": 80, "data.standardize": "person"},
    ),
}
"""Data set -> folder, and what its size and its persons ask for."""
SMALL = {"model.representation_dim": 256, "model.projection_dim": 128, "model.reconstruction_dim": 128}
PAPER = {
    "conclugen": ("ConCluGen", {}),
    "conclu": ("ConClu", {"loss.reconstruction_weight": 0.0}),
    "multi_cont": ("Multi-Cont", {"loss.reconstruction_weight": 0.0, "loss.clustering_weight": 0.0}),
}
"""The paper's methods: name -> title, changes of ConCluGen."""
LENGTH = "length"  # factor of the number of epochs
CHOICE = {
    "dropout_50": ("0.5 of the features hidden", {"augmentation.feature_dropout": 0.5}),
    "dropout_15": ("0.15 of the features hidden", {"augmentation.feature_dropout": 0.15}),
    "neighbours": ("neighbours, no dropout", {"augmentation.feature_dropout": 0.0, "loss.neighbours": 5}),
    "neighbours_dropout": ("neighbours and dropout", {"loss.neighbours": 5}),
    "mixup": ("mixup", {"augmentation.mixup": 1.0}),
    "longer": ("twice as long", {LENGTH: 2}),
    "shorter": ("half as long", {LENGTH: 0.5}),
    "wide": ("512 units", {"model.representation_dim": 512}),
    "clusters": ("20 clusters", {"clustering.num_clusters": 20}),
    "modality_dropout": ("0.2 of the modalities hidden", {"augmentation.modality_dropout": 0.2}),
    "soft_targets": ("soft targets", {"loss.soft_targets": 0.1}),
    "linear": ("linear encoders", {"model.representation_head": "linear"}),
    "target_neighbours": ("smoothed targets", {"loss.target_neighbours": 5}),
    "fusion": ("contrast of fused projections", {"loss.fusion_weight": 1.0}),
}
"""Other pretrainings that were tried: name -> title, changes of the recommended one."""
BY_NEIGHBOURS = CHOICE["neighbours"][1]
CHOICE |= {
    "neighbours_dropout_15": ("neighbours, 0.15 hidden", {**BY_NEIGHBOURS, "augmentation.feature_dropout": 0.15}),
    "neighbours_80": ("neighbours with probability 0.8", {**BY_NEIGHBOURS, "loss.neighbour_probability": 0.8}),
    "neighbours_10": ("one of 10 neighbours", {**BY_NEIGHBOURS, "loss.neighbours": 10}),
    "neighbours_wide": ("neighbours, 512 units", {**BY_NEIGHBOURS, "model.representation_dim": 512}),
    "neighbours_longer": ("neighbours, twice as long", {**BY_NEIGHBOURS, LENGTH: 2}),
    "neighbours_mixup": ("neighbours and mixup", {**BY_NEIGHBOURS, "augmentation.mixup": 1.0}),
    "neighbours_hidden": ("neighbours, 0.2 of the modalities", {**BY_NEIGHBOURS, "augmentation.modality_dropout": 0.2}),
}
HANDED_ON = {
    "after_relu": ("vectors after the relu", {"vectors": "representation"}),
    "both": ("before and after the relu", {"vectors": "both"}),
    "projection": ("projections", {"vectors": "projection"}),
    "with_raw": ("beside raw features", {"vectors": "with_raw"}),
    "share_70": ("0.7 of the neighbours", {"smoothing_share": 0.7}),
    "share_30": ("0.3 of the neighbours", {"smoothing_share": 0.3}),
    "ten": ("10 neighbours", {"smoothing_neighbours": 10}),
    "self_training": ("self-training", {"self_training": (0.3, 0.6, 0.9)}),
    "forty": ("40 neighbours", {"smoothing_neighbours": 40}),
}
"""Other vectors that were tried, of the same networks: name -> title, changes of ``evaluation``."""
LEFT_OUT = {
    "no_neighbours": ("without neighbours", {"loss.neighbours": 0}),
    "dropout": ("dropout instead of neighbours", {"loss.neighbours": 0, "augmentation.feature_dropout": 0.3}),
    "no_clustering": ("without clustering", {"loss.clustering_weight": 0.0}),
    "reconstruction": ("with reconstruction", {"loss.reconstruction_weight": 1.0}),
    "queue_per_epoch": ("queue emptied at each epoch", {"clustering.queue_reset": "epoch"}),
}
"""Parts of the recommended pretraining, removed one at a time."""
RAW = {
    "no_smoothing": ("without smoothing", {"smoothing_neighbours": 0}),
    "self_training": HANDED_ON["self_training"],
    "after_relu": HANDED_ON["after_relu"],
}
"""Parts of what is done with its vectors, removed one at a time."""


def get_config(which: str = "digits") -> ConfigDict:
    name, _, choice = which.partition("_")
    if which not in (known := (*DATA, *(f"{name}_choice" for name in DATA))):
        raise ConclugenError(f"there is no {which!r}; name one of {', '.join(known)}")
    path, of_data = DATA[name]
    study = study_base.get_config()
    study.name, study.pretraining_path = f"recipe_{which}", path
    study.num_folds = 3 if "{fold}" in path else 0
    study.seeds = tuple(range(6) if choice else range(6, 18))
    study.labels.update(dict.fromkeys((*study_demo.LABELS, "probe"), (2, 5, 20, 0)) | {"supervised": (0,)})
    study.reference, study.job_gib = "recommended", 1.5
    first, pretrained, handed_on = (start, CHOICE, HANDED_ON) if choice else (recommended, LEFT_OUT, RAW)
    for method, (title, changes) in {"recommended": ("recommended", {}), **pretrained}.items():
        add(study, method, title, pretraining=with_changes(first(), of_data, changes))
    for method, (title, changes) in handed_on.items():
        own = {key: start().evaluation[key] for key in ("vectors", "smoothing_neighbours", "smoothing_share")}
        add(study, method, title, uses="recommended", evaluation=ConfigDict(own | changes))
    for method, (title, changes) in PAPER.items():
        add(study, method, title, pretraining=with_changes(paper(), of_data, changes))
    if not choice and name == "ravdess":
        split = {**of_data, "data.standardize": "split"}
        add(study, "by_split", "not by person", pretraining=with_changes(recommended(), split, {}))
        add(study, "published", "ConCluGen, as published", pretraining=with_changes(paper(), split, {}))
    study.datasets[name] = ConfigDict({"path": path, "protocols": protocols(of_data, supervised=not choice)})
    study.order = tuple(study.methods.keys())
    return study.lock()


def start() -> ConfigDict:
    """What the choice started from."""
    config = demo.get_config()
    config.loss.reconstruction_weight = 0.0
    config.augmentation.feature_dropout = 0.3
    config.clustering.queue_reset = "never"
    config.evaluation.vectors = "pre_activation"
    config.evaluation.smoothing_neighbours = 20
    return config


def recommended() -> ConfigDict:
    """What was chosen."""
    return conclu_neighbours.get_config()


def paper() -> ConfigDict:
    """ConCluGen at the demo's rates and schedule; its vectors are those of the paper."""
    config = demo.get_config()
    config.clustering.queue_batches = 1
    return config


def add(study: ConfigDict, name: str, title: str, **what: Any) -> None:
    """Add a method with all its modalities."""
    study.methods[name] = ConfigDict({"title": title, "modalities": (), **what})


def with_changes(config: ConfigDict, of_data: Mapping[str, Any], changes: Mapping[str, Any]) -> ConfigDict:
    """Set sizes, what the data ask for, and changes; one checkpoint, at the end."""
    config.update_from_flattened_dict({**SMALL, **of_data})
    config.train.num_epochs = round(config.train.num_epochs * changes.get(LENGTH, 1))
    config.update_from_flattened_dict({key: value for key, value in changes.items() if key != LENGTH})
    config.checkpoint.every_epochs, config.checkpoint.keep_newest = config.train.num_epochs, 1
    config.checkpoint.keep_best = 0
    return config


def protocols(of_data: Mapping[str, Any], *, supervised: bool) -> dict[str, ConfigDict]:
    """Probe all vectors by one rule; train the supervised network with all labels."""
    probe = study_base.probe(start())
    probe.update_from_flattened_dict({**SMALL, **of_data})
    probe.data.validation_split = probe.data.train_split  # nothing is chosen by it
    trained = probe.copy_and_resolve_references()
    trained.optimizer.weight_decay, trained.train.num_epochs = 1e-2, 30
    return {"probe": probe} | ({"supervised": trained} if supervised else {})
