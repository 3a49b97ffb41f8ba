"""Small studies for tests."""

from ml_collections import ConfigDict

from conclugen_jax.evaluate.baselines import BASELINES
from tests.helpers import tiny_config


def definition(path, protocols=("linear_evaluation", "raw_features", "supervised"), **changes):
    """A method, also with video alone, on one data set by some protocols, two seeds."""

    pretraining = tiny_config(train__num_epochs=2, clustering__start_epoch=1, data__standardize="split")
    downstream = tiny_config(train__num_epochs=3, data__standardize="split", optimizer__learning_rate=1e-2)
    study = ConfigDict(
        {
            "name": "tiny",
            "pretraining_path": str(path),
            "seeds": (0, 1),
            "label_draws": 2,
            "training_draws": 1,
            "labels": {
                "linear_evaluation": (3, 0),
                "raw_features": (3,),
                "supervised": (3,),
                "fine_tuning": (0,),
                "probe": (3, 0),
            },
            "num_folds": 0,
            "test_data": (),
            "baselines": tuple(BASELINES),
            "jobs": 2,
            "job_gib": 1.0,
            "reference": "conclugen",
            "order": ("conclugen", "vision"),
            "methods": {
                "conclugen": {"title": "ConCluGen", "modalities": (), "pretraining": pretraining},
                "vision": {"title": "ConCluGen/(vision)", "uses": "conclugen", "modalities": ("video",)},
            },
            "datasets": {
                "faces": {
                    "path": str(path),
                    "protocols": {name: downstream.copy_and_resolve_references() for name in protocols},
                }
            },
        }
    )
    for key, value in changes.items():
        study[key] = value
    return study


def small(path):
    """Of the same study the second seed, with two protocols and one number of labels."""
    labels = ConfigDict({"linear_evaluation": (0,), "raw_features": (3,)})
    return definition(path, ("linear_evaluation", "raw_features"), seeds=(1,), labels=labels)
