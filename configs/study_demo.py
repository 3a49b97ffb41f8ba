"""The study at a size for two CPU cores: all methods on the embedded digits, five seeds.

Command:  make study
Hardware: two CPU cores. Time: see README.
Score:    see README.

The digits have three modalities: pixels, fourier (audio's place), profiles (text's place). A method is a whole
configuration for pretraining; a data set has a whole configuration for each protocol.
"""

from ml_collections import ConfigDict

from configs import demo

TERMS = {
    "conclugen": ("contrastive", "clustering", "reconstruction"),
    "conclu": ("contrastive", "clustering"),
    "congen": ("contrastive", "reconstruction"),
    "multi_cont": ("contrastive",),
    "multi_cont_without_text": ("contrastive",),
    "multi_cont_without_audio": ("contrastive",),
    "instance_cont": ("instance",),
    "generative": ("reconstruction",),
}
TITLES = {
    "conclugen": "ConCluGen",
    "conclu": "ConClu",
    "congen": "ConGen",
    "multi_cont": "Multi-Cont",
    "multi_cont_without_text": "Multi-Cont w/o profiles",
    "multi_cont_without_audio": "Multi-Cont w/o fourier",
    "instance_cont": "Instance-Cont",
    "generative": "Generative",
}
MODALITIES = {
    "multi_cont_without_text": ("pixels", "fourier"),
    "multi_cont_without_audio": ("pixels", "profiles"),
    "instance_cont": ("pixels",),
}
LABELS = (2, 5, 20, 0)


def get_config() -> ConfigDict:
    study = ConfigDict()
    study.name = "demo"
    study.pretraining_path = "runs/study/data/digits/1.0.0"  # data that all methods are pretrained on
    study.seeds = (0, 1, 2, 3, 4)
    study.label_draws = 5  # random draws of few labels for each seed, in linear evaluation
    study.training_draws = 1  # how many of them fine-tuning and the supervised baseline see
    study.labels = ConfigDict(  # labels per class; 0: all
        {"linear_evaluation": LABELS, "raw_features": LABELS, "supervised": LABELS, "fine_tuning": (0,)}
    )
    study.jobs = 0  # runs side by side; 0: as many as there are processors and as memory allows
    study.job_gib = 2.0  # memory that a run takes at most, GiB
    study.reference = "conclugen"  # the method that the others are compared with
    study.methods = ConfigDict({name: _method(name) for name in TERMS})
    study.methods.conclugen_vision = ConfigDict(
        {"title": "ConCluGen/(pixels)", "uses": "conclugen", "modalities": ("pixels",)}
    )
    study.order = (*TERMS, "conclugen_vision")  # of the methods in tables
    study.datasets = ConfigDict({"digits": {"path": study.pretraining_path, "protocols": _protocols()}})
    return study.lock()


def _method(name: str) -> dict:
    config = demo.get_config()
    for term in ("contrastive", "clustering", "reconstruction", "instance"):
        config.loss[f"{term}_weight"] = float(term in TERMS[name])
    config.loss.instance_modality = "pixels"
    config.online_probe.every_epochs = 20
    config.online_probe.num_epochs = 10
    config.checkpoint.every_epochs = config.train.num_epochs
    config.checkpoint.keep_newest = 1
    config.checkpoint.keep_best = 0
    config.data.modalities = MODALITIES.get(name, config.data.modalities)
    return {"title": TITLES[name], "modalities": (), "pretraining": config}


def _protocols() -> dict:
    linear = demo.get_config()
    linear.train.batch_size = 200
    linear.train.num_epochs = 60
    linear.optimizer.learning_rate = 1e-2
    linear.optimizer.weight_decay = 1e-2
    linear.sweep.learning_rates = (1e-3, 3e-3, 1e-2)
    linear.sweep.weight_decays = (1e-2, 1.0)
    tuned = linear.copy_and_resolve_references()
    tuned.optimizer.learning_rate = 1e-3
    tuned.train.num_epochs = 30
    return {"linear_evaluation": linear, "raw_features": linear, "fine_tuning": tuned, "supervised": tuned}
