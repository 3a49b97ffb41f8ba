"""What tests of the search share: a configuration that is trained in no time, and pretraining that takes none."""

import contextlib
import json
import math

import jax

from conclugen_jax import pretrain
from conclugen_jax.data import builders
from conclugen_jax.runs import checkpoint
from conclugen_jax.study import search, search_space, trials as trials_lib
from tests.helpers import Faces, tiny_config

DEVICES = jax.devices()[:1]
RATES = {"optimizer.learning_rate": {"low": 1e-4, "high": 1e-2, "log": True}}


def make_config(folder):
    """Reconstruction of one modality of data built in a folder: compiled in no time."""
    return tiny_config(
        builders.build(Faces((64, 32, 8)), folder),
        data__modalities=("text",),
        loss__contrastive_weight=0.0,
        loss__clustering_weight=0.0,
        schedule__warmup_epochs=0,
        train__num_epochs=8,
    )


def changed(config, **changes):
    return search_space.with_overrides(config, {k.replace("__", "."): v for k, v in changes.items()})


def run(config, folder, num_trials, space=RATES, **more):
    return search.search(config, folder, num_trials=num_trials, space=space, devices=DEVICES, **more)


def imagine(monkeypatch):
    """Pretraining that takes no time: its loss is the distance of the rate from 1e-3; notes (workdir, epochs) it ran."""
    ran = []

    def pretrained(config, workdir, *, devices, on_epoch):
        rate = config.optimizer.learning_rate
        (workdir / checkpoint.FOLDER / "7").mkdir(parents=True)
        for epoch in range(config.train.num_epochs):
            ran.append((workdir.name, epoch))
            on_epoch(epoch, {"loss": -1.0, "loss/reconstruction": abs(math.log10(rate) + 3) + 1 / (epoch + 1)}, None)

    monkeypatch.setattr(pretrain, "pretrain", pretrained)
    return ran


@contextlib.contextmanager
def opened(folder):
    """The trials of a search that has begun."""
    definition = json.loads((folder / trials_lib.DEFINITION).read_text())
    with trials_lib.opened(folder, definition, ()) as trials:
        yield trials
