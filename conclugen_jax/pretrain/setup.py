"""What does not change during a pretraining run, made once: data, network, optimizer, step."""

import collections
import dataclasses
import functools
import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import optax
from ml_collections import ConfigDict

from conclugen_jax.data import shards
from conclugen_jax.data.manifest import Manifest
from conclugen_jax.errors import ConclugenError
from conclugen_jax.method import model as model_lib
from conclugen_jax.method import train_state, views
from conclugen_jax.method.train_state import TrainState
from conclugen_jax.pretrain.step import pretrain_step
from conclugen_jax.run import checkpoint, trees
from conclugen_jax.run import config as config_lib
from conclugen_jax.system import processes
from conclugen_jax.train import feed, memory, parallel
from conclugen_jax.train import optimizer as optimizer_lib


@dataclasses.dataclass(frozen=True)
class Setup:
    """A run, apart from what changes in it.

    Attributes:
      config: of the run.
      workdir: its folder.
      manifest: of its data set.
      stream: rows of the training split by index.
      batches: the feed of the training loop.
      model: the network.
      optimizer: for its parameters.
      step: ``pretrain_step``, all but ``state``, ``batch`` and ``cluster`` given.
      devices: that share a batch.
    """

    config: ConfigDict
    workdir: Path
    manifest: Manifest
    stream: shards.ShardStream
    batches: feed.Feed
    model: model_lib.ConCluGen
    optimizer: optax.GradientTransformationExtraArgs
    step: Callable
    devices: Sequence[jax.Device]

    @property
    def title(self) -> str:
        """What the screen calls the run."""
        return f"pretrain {self.workdir.name}"

    @property
    def total_steps(self) -> int:
        """Steps of the whole run."""
        return self.config.train.num_epochs * self.batches.steps_per_epoch

    def clusters(self, epoch: int) -> bool:
        """Whether L_Clu is part of the objective in an epoch, counted from 0."""
        return epoch >= self.config.clustering.start_epoch

    def fresh_state(self) -> TrainState:
        """The state before the first step, by the seed of the run."""
        config, (init_key, run_key) = self.config, jax.random.split(jax.random.key(self.config.seed))
        uses_queue = config.loss.clustering_weight > 0
        return train_state.create(
            model_lib.initial_variables(self.model, init_key, self.manifest.standardization),
            self.optimizer,
            run_key,
            queue_length=config.clustering.queue_batches * config.train.batch_size if uses_queue else 0,
            num_clusters=config.clustering.num_clusters,
        )

    def start(self, saved: checkpoint.Checkpoints) -> tuple[TrainState, dict[str, Any]]:
        """The state to go on from, and the record of the log that belongs to it, the same on all processes.

        Where the weights come from: 1. the run's newest intact checkpoint; 2. else random, by the seed.
        """
        found = saved.restore_newest(jax.eval_shape(self.fresh_state))
        state, info = found or (self.fresh_state(), {"epoch_sums": {}, "epoch_steps": {}})
        return trees.of_main(state, info)

    def memory(self, state: TrainState) -> dict[str, float]:
        """GiB that the run takes on each device, by what takes it."""
        rows = self.batches.rows
        return memory.estimate(
            self.config,
            dict(self.model.feature_dims),
            sum(x.size for x in jax.tree.leaves(state.params)),
            table_rows=rows.num_examples if rows.tier == "device" else 0,
            num_devices=len(self.devices),
        )


def open_data(config: ConfigDict, num_devices: int) -> tuple[ConfigDict, Manifest, shards.ShardStream]:
    """Open the data set of a run and refuse a configuration that does not fit it.

    Returns:
      (configuration with the names of its modalities, manifest, rows of the training split).

    Raises:
      ConclugenError: an impossible configuration, bad data, or processes that do not agree.
    """
    config_lib.check(config)
    dataset = shards.open_dataset(config.data.path, verify=config.data.verify)
    config = config_lib.with_modalities(config, dataset.manifest.modalities)
    all_variants = config.data.variants == "random"
    stream = shards.ShardStream(dataset, config.data.train_split, config.data.modalities, all_variants=all_variants)
    config_lib.check_objective(config)
    config_lib.check_batches(config, num_examples=len(stream.usable), num_devices=num_devices)
    config_lib.check_clustering(config, num_examples=len(stream.usable))
    if processes.several():
        check_alike(config, dataset.manifest)
    return config, dataset.manifest, stream


def create(
    config: ConfigDict,
    workdir: Path,
    manifest: Manifest,
    stream: shards.ShardStream,
    rows: shards.RowSource,
    devices: Sequence[jax.Device],
) -> Setup:
    """Make network, optimizer, feed and step of a run."""
    model = model_lib.from_config(config, {m: manifest.modalities[m] for m in config.data.modalities}, parallel.AXIS)
    told_apart = config.loss.instance_modality if config.loss.instance_weight else None
    batches = feed.Feed(rows, config, devices, pairs=(told_apart,) if told_apart else ())
    optimizer, schedule = optimizer_lib.from_config(config, batches.steps_per_epoch)
    step = functools.partial(
        pretrain_step,
        model=model,
        optimizer=optimizer,
        schedule=schedule,
        config=config,
        steps_per_epoch=batches.steps_per_epoch,
        statistics=views.Statistics(*manifest.standardization(told_apart)) if told_apart else None,
        axis_name=parallel.AXIS,
    )
    return Setup(config, workdir, manifest, stream, batches, model, optimizer, step, devices)


def check_alike(config: ConfigDict, manifest: Manifest) -> None:
    """Refuse processes that would not train the same thing on the same data with as many devices each."""
    counts = collections.Counter(device.process_index for device in jax.devices())
    if len(set(counts.values())) > 1:
        raise ConclugenError(
            f"the processes have {', '.join(str(counts[i]) for i in sorted(counts))} devices; give each as many"
        )
    own = {"config": config.to_dict(), "data": f"{manifest.name} {manifest.version} {manifest.fingerprint()}"}
    main: Mapping[str, Any] = json.loads(processes.text_of_main(json.dumps(own)))
    different = config_lib.differences(config_lib.from_tree(main["config"], "process 0"), config)
    # Each machine may have the data elsewhere: it is compared by content.
    different = [line for line in different if not line.startswith("config.data.path:")]
    if different:
        raise ConclugenError(
            f"the configuration differs from that of process 0 ({'; '.join(different)}); start all with the same command"
        )
    if main["data"] != own["data"]:
        raise ConclugenError(
            f"{config.data.path}: {manifest.name} {manifest.version} here is not the data set that process 0 has; copy that one"
        )
    processes.wait()  # nothing is written before all agree
