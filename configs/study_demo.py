"""The study at a size for two CPU cores: all methods on the embedded digits, five seeds.

Command:  make study
Hardware: two CPU cores. Time and score: see README.

The digits have three modalities: pixels in the place of video, fourier in that of audio, profiles in that of text.
"""

from ml_collections import ConfigDict

from configs import demo, study_base

LABELS = dict.fromkeys(("linear_evaluation", "raw_features", "supervised", "probe"), (2, 5, 20, 0))
"""Protocol -> labels per class; fine-tuning sees all."""


def get_config() -> ConfigDict:
    study = study_base.get_config()
    study.name = "demo"
    study.pretraining_path = "runs/study/data/digits/1.0.0"
    study.labels.update(LABELS)
    study_base.add_methods(study, pretraining, {"video": "pixels", "audio": "fourier", "text": "profiles"})
    study.datasets.digits = dataset(study.pretraining_path, demo.get_config(), batch_size=200)
    return study.lock()


def pretraining(_name: str) -> ConfigDict:
    """Sizes and schedule of the demo, one checkpoint and no probes between, so that seeds are trained together."""
    config = demo.get_config()
    config.checkpoint.every_epochs = config.train.num_epochs
    config.checkpoint.keep_newest = 1
    config.checkpoint.keep_best = 0
    return config


def dataset(path: str, config: ConfigDict, *, batch_size: int) -> ConfigDict:
    """All protocols: classifiers on frozen vectors, rate and decay chosen by the validation split, and trained networks."""
    linear = config.copy_and_resolve_references()
    linear.train.batch_size = batch_size
    linear.train.num_epochs = 60
    linear.sweep.learning_rates = (1e-3, 3e-3, 1e-2)
    linear.sweep.weight_decays = (1e-2, 1.0)
    tuned = linear.copy_and_resolve_references()
    tuned.optimizer.learning_rate = 1e-3
    tuned.optimizer.weight_decay = 1e-2
    tuned.train.num_epochs = 30
    return ConfigDict(
        {
            "path": path,
            "protocols": {
                "linear_evaluation": linear,
                "raw_features": linear,
                "fine_tuning": tuned,
                "supervised": tuned,
                "probe": study_base.probe(linear),
            },
        }
    )
