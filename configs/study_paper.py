"""The paper's full study: nine methods pretrained on VoxCeleb2, evaluated on CMU-MOSEI, MELD and CAER.

Command:  conclugen study --config=study_paper --study=runs/paper
          Data sets are expected in data/; elsewhere: --config.pretraining_path=DATA/voxceleb2/1.0.0
          --config.datasets.meld.path=DATA/meld/1.0.0 and so on (docs/reference/datasets says how they are built).
Hardware: one GPU of 24 GiB or more, or a TPU host. Time: not measured.
Score:    published tables: conclugen report shows them beside ours; ours: not measured.
"""

import importlib

from ml_collections import ConfigDict

from configs import fine_tuning, linear_evaluation, study_base, supervised

RATES = {"cmu_mosei": (9.96e-3, 7e-5), "meld": (9.67e-3, 4e-5), "caer": (6.1e-3, 8.216e-2)}
"""Data set -> learning rate and weight decay of the classifier (paper, section 4)."""


def get_config() -> ConfigDict:
    study = study_base.get_config()
    study.name = "paper"
    study.pretraining_path = "data/voxceleb2/1.0.0"
    study.jobs = 1
    study_base.add_methods(study, pretraining, {"video": "video", "audio": "audio", "text": "text"})
    for name, (rate, decay) in RATES.items():
        protocols = {
            "linear_evaluation": linear_evaluation.get_config(),
            "raw_features": linear_evaluation.get_config(),
            "fine_tuning": fine_tuning.get_config(),
            "supervised": supervised.get_config(),
        }
        for config in protocols.values():
            config.optimizer.learning_rate, config.optimizer.weight_decay = rate, decay
        protocols["raw_features"].data.standardize = "split"
        if name != "cmu_mosei":  # it has several labels a clip
            protocols["probe"] = study_base.probe(protocols["raw_features"])
        study.datasets[name] = ConfigDict({"path": f"data/{name}/1.0.0", "protocols": protocols})
    return study.lock()


def pretraining(name: str) -> ConfigDict:
    """The method's own file."""
    return importlib.import_module(f"configs.{name}").get_config()
