"""All methods on RAVDESS features of two modalities, facial action units and sound; split by actor, eight emotions.

Command:  conclugen study --config=study_ravdess --study=runs/ravdess
              --config.pretraining_path=DATA/ravdess/1.0.0 --config.datasets.ravdess.path=DATA/ravdess/1.0.0
Hardware: two CPU cores. Time and score: see docs/understand/ravdess.md.
"""

from ml_collections import ConfigDict

from configs import demo, study_base, study_demo


def get_config() -> ConfigDict:
    study = study_base.get_config()
    study.name = "ravdess"
    study.pretraining_path = "data/ravdess/1.0.0"
    study.labels.update(study_demo.LABELS)
    study.training_draws = 5  # with one alone, draws of labels hide the differences
    study_base.add_methods(study, pretraining, {"video": "video", "audio": "audio"})
    sizes = demo.get_config()
    sizes.model.representation_dim = 512
    study.datasets.ravdess = study_demo.dataset(study.pretraining_path, sizes, batch_size=160)
    return study.lock()


def pretraining(name: str) -> ConfigDict:
    """As the demo: 960 clips in three steps an epoch, and as many steps as there."""
    config = study_demo.pretraining(name)
    config.model.representation_dim = 512
    config.train.batch_size = 320
    config.train.num_epochs = 80
    return config
