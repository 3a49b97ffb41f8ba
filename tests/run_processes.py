"""One process of several that train together, for test_processes.py: python -m tests.run_processes DATA FOLDER

What is in its environment says which one it is. All runs are made one after the other, since a process starts slowly.
"""

import os
import shutil
import signal
import sys
from pathlib import Path

import pytest

from conclugen_jax import pretrain
from conclugen_jax.commands import app
from conclugen_jax.pretrain import recorder
from conclugen_jax.runs import workdir
from conclugen_jax.system import processes, signals
from tests.helpers import tiny_config

STOP_AFTER = 4


def config_of(data, tier):
    """A run that compiles fast; with SGD, or with Adam split over the devices, whose eps hides the rounding of zeros."""
    adam = {"optimizer__name": "adamw", "optimizer__eps": 1.0, "optimizer__shard": True}
    return tiny_config(
        data,
        data__tier=tier,
        data__modalities=("audio", "text"),
        clustering__start_epoch=0,
        optimizer__learning_rate=0.05,
        **({"optimizer__name": "sgd"} if tier == "device" else adam),
        train__num_epochs=3,
        loss__neighbours=2,
        loss__neighbour_space="representation",
        loss__neighbour_refresh_epochs=1,
        checkpoint__keep_newest=100,
    )


def main():
    data, folder = Path(sys.argv[1]), Path(sys.argv[2])
    processes.start(60)
    for tier in ("device", "host"):
        pretrain.pretrain(config_of(data, tier), folder / tier)

    config, take = config_of(data, "shards"), recorder.Recorder.take

    def take_then_kill(self, dispatch, metrics):
        take(self, dispatch, metrics)
        if processes.is_main():
            shutil.copy(folder / "shards" / workdir.LOCK, folder / "owner")
        if dispatch.end_step == STOP_AFTER and not processes.is_main():
            os.kill(os.getpid(), signal.SIGTERM)

    recorder.Recorder.take = take_then_kill
    with pytest.raises(signals.Interrupted) as stopped:
        pretrain.pretrain(config, folder / "shards")
    assert stopped.value.code == 128 + signal.SIGTERM
    recorder.Recorder.take = take
    if processes.is_main():
        shutil.copytree(folder / "shards", folder / "interrupted")
    pretrain.pretrain(config, folder / "shards")

    config.seed = 0 if processes.is_main() else 1
    pretrain.pretrain(config, folder / "different")


if __name__ == "__main__":
    sys.exit(app.guarded(main))
