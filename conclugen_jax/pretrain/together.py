"""Train several small runs in one compiled program. The runs differ only in seed and data.

Each run has a workdir of its own, with its log and its last checkpoint. Its results equal those of a run trained alone,
except for rounding. After an interruption all runs start again.
"""

import contextlib
import functools
import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from ml_collections import ConfigDict

from conclugen_jax.data import persons as persons_lib
from conclugen_jax.method.train_state import Metrics, TrainState
from conclugen_jax.pretrain import recorder as recorder_lib, setup
from conclugen_jax.pretrain.recorder import Recorder
from conclugen_jax.runs import checkpoint, log as log_lib, workdir as workdir_lib
from conclugen_jax.system import progress, signals
from conclugen_jax.train import feed, neighbours, parallel


class Member(NamedTuple):
    """A run of a cohort."""

    run: setup.Setup
    log: log_lib.MetricsLog
    recorder: Recorder


def kind(config: ConfigDict) -> str | None:
    """Return a key that is equal for runs that can train together; ``None`` for a run that must train alone.

    A run must train alone if it saves more than its last checkpoint, runs online probes, mirrors its log, keeps its rows off
    the device, has statistics of its data in the program (views of L_NCE), or searches neighbours among representations.
    """
    train, saving = config.train, config.checkpoint
    more = saving.every_epochs < train.num_epochs or saving.best_by != "loss" or config.online_probe.every_epochs
    if (
        more
        or train.tensorboard
        or train.tracker
        or config.loss.instance_weight
        or neighbours.refreshes(config, train.num_epochs)
        or config.data.tier in ("host", "shards")
    ):
        return None
    shared = config.copy_and_resolve_references()
    with shared.unlocked():
        shared.seed, shared.data.path = 0, ""
    return json.dumps(shared.to_dict(), sort_keys=True, default=str)


def pretrain_together(configs: Sequence[ConfigDict], workdirs: Sequence[str | Path]) -> list[bool]:
    """Pretrain runs of one :func:`kind`, in workdirs without a checkpoint, on one device.

    Returns for each whether it is finished. One whose rows are too large for a table on the device, whose data have another
    number of rows than the first's, or that meets a bad step, is not, and leaves no checkpoint: ``pretrain`` trains it alone.

    Raises:
      ConclugenError: what ``pretrain`` refuses.
      Interrupted: a signal came; the same call starts again.
    """
    precision = parallel.MATMUL_PRECISION[configs[0].precision]
    with contextlib.ExitStack() as stack, signals.caught() as stop, jax.default_matmul_precision(precision):
        with stop.at_once():
            members = _members(configs, workdirs, stack)
            tables = [member.run.batches.table for member in members]
            like = [jax.tree.map(lambda x: (x.shape, x.dtype), table) for table in tables]
            if tables[0] is None:
                return [False] * len(members)
            own = [i for i, shapes in enumerate(like) if shapes == like[0]]
        good = _train([members[i] for i in own], [tables[i] for i in own], stop)
        return [i in own and good[own.index(i)] for i in range(len(members))]


def _members(
    configs: Sequence[ConfigDict], workdirs: Sequence[str | Path], stack: contextlib.ExitStack
) -> list[Member]:
    """Open runs, those of one data set on the same rows."""
    opened: dict[str, Any] = {}
    members = []
    for config, workdir in zip(configs, workdirs, strict=True):
        folder, path = stack.enter_context(workdir_lib.claim(workdir)), config.data.path
        if path not in opened:
            full, stream = setup.open_data(config, 1)
            opened[path] = full, stream, setup.standardise(full, folder, stream), feed.load_rows(full, stream)
        full, stream, persons, rows = opened[path]
        if persons is not None:
            persons.write(folder / persons_lib.FILE)
        full = full.copy_and_resolve_references()
        with full.unlocked():
            full.seed = config.seed
        run = setup.create(full, folder, stream, rows, jax.devices()[:1], persons)
        if members and rows is members[0].run.batches.rows:  # the table is on the device already
            run.batches.table = members[0].run.batches.table
        workdir_lib.settle(folder, full, stream.dataset.manifest)
        log = stack.enter_context(log_lib.MetricsLog(folder, 0))
        members.append(Member(run, log, Recorder(full, log, None, {"epoch_sums": {}, "epoch_steps": {}})))
    return members


def _train(members: Sequence[Member], tables: Sequence[Any], stop: signals.Stop) -> list[bool]:
    """Train to the last epoch and save; return which members are finished."""
    first, device = members[0].run, members[0].run.devices
    distinct = list({id(table): table for table in tables}.values())
    which = np.array([next(i for i, x in enumerate(distinct) if x is table) for table in tables], np.int32)
    stacked = jax.tree.map(lambda *xs: jnp.stack(xs), *distinct)
    states = jax.tree.map(lambda *xs: jnp.stack(xs), *[member.run.fresh_state() for member in members])
    states, seeds = parallel.replicate(states, device), np.array([m.run.config.seed for m in members], np.int32)
    good, programs = [True] * len(members), {}
    with progress.Counter(f"pretrain {len(members)} runs together", unit="epochs") as counter:
        for dispatch in first.batches.plan(0):
            cluster = first.clusters(dispatch.epoch)
            if cluster not in programs:
                # A processor is slower at products of many small matrices together than of one after another.
                programs[cluster] = _program(first, cluster, by_turns=device[0].platform == "cpu")
            position = {"epoch": dispatch.epoch, "first_step": dispatch.first_step_in_epoch}
            position = {name: np.int32(x) for name, x in {**position, "num_steps": dispatch.num_steps}.items()}
            sent = parallel.shard(jax.tree.map(lambda x: np.asarray(x)[None], (seeds, which, position)), device)
            states, metrics = programs[cluster](states, stacked, sent, None)
            metrics = jax.tree.map(np.asarray, metrics)
            for i, member in enumerate(members):
                own = functools.partial(jax.tree.map, lambda x, i=i: x[i])
                good[i] = good[i] and _recorded(member, dispatch, own(metrics), functools.partial(own, states))
            if stop.signal:
                raise signals.Interrupted(stop.signal)
            counter(dispatch.epoch + dispatch.ends_epoch, first.config.train.num_epochs)
    for i, member in enumerate(members):
        if good[i]:
            _save(member, dispatch, jax.tree.map(lambda x, i=i: x[i], states))
    return good


def _program(run: setup.Setup, cluster: bool, *, by_turns: bool) -> Any:
    """Return the program of all dispatches with or without clustering: every member's steps.

    ``by_turns``: members follow each other, else they are one axis more (``vmap``).
    """
    step, most_steps = functools.partial(run.step, cluster=cluster), max(run.batches.lengths)

    def one(member: Any, tables: Any, position: Any) -> tuple[TrainState, Metrics]:
        state, seed, which = member
        table = jax.tree.map(lambda x: x[which], tables)
        batch_of = run.batches.batches_of(table, {**position, "seed": seed}, None)
        return feed.repeat(step, batch_of, state, position["num_steps"], most_steps=most_steps)

    def every(states: TrainState, tables: Any, sent: Any, _: None) -> tuple[TrainState, Metrics]:
        seeds, which, position = sent
        of_member, members = functools.partial(one, tables=tables, position=position), (states, seeds, which)
        return jax.lax.map(of_member, members) if by_turns else jax.vmap(of_member)(members)

    return parallel.map_step(every, run.devices)


def _recorded(member: Member, dispatch: feed.Dispatch, metrics: Metrics, state: Callable[[], TrainState]) -> bool:
    """Log a dispatch of a member, which has led to a state; return whether all its steps are good."""
    run = member.run
    try:
        member.recorder.take(dispatch, metrics)
        member.recorder.flush((lambda: run.measure(state())) if run.measures_after(dispatch) else dict)
    except recorder_lib.BadStep:
        return False
    return True


def _save(member: Member, dispatch: feed.Dispatch, state: TrainState) -> None:
    keep = {name: member.run.config.checkpoint[name] for name in ("keep_newest", "keep_best", "max_failures")}
    with checkpoint.Checkpoints(member.run.workdir, **keep) as saved:
        member.log.sync()
        saved.save(dispatch.end_step, state, member.recorder.info(), loss=member.recorder.mean_loss(dispatch))
        saved.wait()
