"""The update split over devices: the numbers of the replicated one, a part of the moments on each, whole checkpoints."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from conclugen_jax import pretrain
from conclugen_jax.data import builders
from conclugen_jax.evaluate import downstream
from conclugen_jax.method import train_state
from conclugen_jax.runs import checkpoint
from conclugen_jax.train import feed, optimizer, parallel
from tests.helpers import Faces, assert_same_bits, close, flat, log_without_times, tiny_config

N, STEPS, IDLE = 16, 6, 2
PARAMETERS = {
    "hidden": {"kernel": (13, 8), "bias": (8,)},  # the kernel's chunks need no filling up, the others' do
    "head": {"kernel": (8, 3), "bias": (3,)},
    "frozen": {"kernel": (3, 3)},
}


class Run:
    """A small network, the rates and parts of whose parameters differ; the head is idle in the first steps."""

    def __init__(self, name, shard, num_devices):
        self.config, self.devices = tiny_config(optimizer__shard=shard), jax.devices()[:num_devices]
        self.optimizer = optimizer.make_optimizer(
            lambda step: 0.01 / (step + 1),
            name=name,
            weight_decay=0.1,
            trainable=("hidden/.*", "head/.*"),
            idle=("head/.*",),
            rates={"hidden/kernel": 0.25},
        )
        axes = parallel.axes(self.start(), self.config, self.devices)

        def dispatch(state, _, position, rows):
            return feed.repeat(self._step, lambda i: rows[i], state, position["num_steps"], most_steps=STEPS)

        self.program = parallel.map_step(dispatch, self.devices, axes)

    def _step(self, state, x):
        def loss(p):
            hidden = jnp.tanh(x @ p["hidden"]["kernel"] + p["hidden"]["bias"][None])
            out = (hidden @ p["head"]["kernel"] + p["head"]["bias"][None]) @ p["frozen"]["kernel"]
            return jnp.square(out - x[:, :3]).mean()

        params, opt_state, norm = parallel.update(
            self.optimizer,
            jax.grad(loss)(state.params),
            state.opt_state,
            state.params,
            axis_name=parallel.AXIS,
            split=self.config.optimizer.shard,
            active=state.step >= IDLE,
        )
        return state.replace(step=state.step + 1, params=params, opt_state=opt_state), {"gradient_norm": norm}

    def start(self):
        """Return the whole state at step 0."""
        rng = np.random.default_rng(1)
        params = {a: {b: normal(rng, shape) for b, shape in part.items()} for a, part in PARAMETERS.items()}
        return train_state.create({"params": params}, self.optimizer, jax.random.key(2))

    def place(self, state):
        return parallel.place(state, self.config, self.devices)

    def inputs(self, first, count):
        rows = np.resize(normal(np.random.default_rng(0), (STEPS, N, 13))[first:], (STEPS, N, 13))
        position = {"num_steps": np.full(len(self.devices), count, np.int32)}
        return None, position, parallel.split_rows(rows, len(self.devices), axis=1)

    def __call__(self, state, count):
        """Return the state on the devices and the gradient norms after some steps."""
        state, metrics = self.program(state, *self.inputs(int(state.step), count))
        return state, np.asarray(metrics["gradient_norm"])[:count]

    def whole(self, state):
        return parallel.whole(state, self.optimizer)


def normal(rng, shape):
    return rng.normal(size=shape).astype(np.float32)


@pytest.fixture(scope="module")
def runs():
    """Return programs by (optimizer, split, devices), each built once."""
    return functools.cache(Run)


@pytest.mark.parametrize("name", ["sgd", "adamw"])
def test_same_numbers_as_the_replicated_update(runs, name):
    replicated, split = (runs(name, shard, 8) for shard in (False, True))
    start = split.start()
    expected, norms = replicated(replicated.place(replicated.start()), STEPS)
    state, split_norms = split(split.place(split.start()), STEPS)
    state = split.whole(state)
    assert jax.tree.structure(state) == jax.tree.structure(expected)
    for path, value in flat(expected).items():
        assert close(flat(state)[path], value, 1e-5), path
    assert close(split_norms, norms, 1e-5)
    assert norms.min() > 0.1
    # Frozen parameters never move; the head has waited while it was idle, decay included; all others have moved.
    assert_same_bits(state.params["frozen"], start.params["frozen"])
    early, _ = split(split.place(split.start()), IDLE)
    assert_same_bits(early.params["head"], start.params["head"])
    moved = jax.tree.map(lambda a, b: bool((np.asarray(a) != b).all()), state.params, start.params)
    assert all(jax.tree.leaves((moved["hidden"], moved["head"])))


def test_one_device_has_the_program_of_the_replicated_update(runs):
    replicated, split = (runs("adamw", shard, 1) for shard in (False, True))
    texts = [run.program.lower(run.place(run.start()), *run.inputs(0, 1)).as_text() for run in (replicated, split)]
    assert texts[0] == texts[1]


def test_each_device_holds_its_part_of_the_moments(runs):
    run = runs("adamw", True, 8)
    whole = run.start().opt_state
    before = run.place(run.start())
    after, _ = run(before, 1)
    assert all(x.is_deleted() for x in jax.tree.leaves((before.params, before.opt_state)))
    for state in (run.place(run.start()), after):
        for like, x in zip(jax.tree.leaves(whole), jax.tree.leaves(state.opt_state), strict=True):
            parts = x.addressable_shards
            assert len({part.device for part in parts}) == 8
            assert {part.data.size for part in parts} == {-(-like.size // 8)}  # 1 of a counter
    for path, leaf in jax.tree_util.tree_leaves_with_path(after.params):
        assert len({np.asarray(part.data).tobytes() for part in leaf.addressable_shards}) == 1, path


@pytest.mark.parametrize("count", [1, 2, 8])
def test_whole_is_the_inverse_of_place(runs, count):
    run = runs("adamw", True, count)
    state = run.start()
    numbers = jax.tree.map(
        lambda x: jnp.arange(1, x.size + 1).reshape(x.shape).astype(x.dtype), state.opt_state
    )  # else all are zeros
    state = state.replace(opt_state=numbers)
    assert_same_bits(run.whole(run.place(state)), state)


def test_checkpoints_fit_any_number_of_devices_and_either_setting(runs, tmp_path):
    run = runs("adamw", True, 8)
    state, _ = run(run.place(run.start()), 3)
    with checkpoint.Checkpoints(tmp_path) as saved:
        saved.save(3, run.whole(state), {})
        saved.wait()
        expected, norms = run(state, 3)
        expected = run.whole(expected)
        for shard, count in ((True, 8), (True, 2), (False, 1)):
            other = runs("adamw", shard, count)
            restored = checkpoint.from_tree(saved.restore_tree(3)[0], jax.eval_shape(other.start), source="run")
            after, other_norms = other(other.place(restored), 3)
            after = other.whole(after)
            if count == 8:
                assert_same_bits(after, expected)
            for path, value in flat(expected).items():
                assert close(flat(after)[path], value, 1e-5), (count, path)
            assert close(other_norms, norms, 1e-5)


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return builders.build(Faces(missing=0.3), tmp_path_factory.mktemp("data"))


def test_pretraining_split_trains_as_replicated_and_resumes_bit_for_bit(data, tmp_path):
    config = tiny_config(data, train__num_epochs=2, clustering__start_epoch=0, optimizer__shard=True)
    devices, axes = jax.devices()[:2], []

    def on_epoch(epoch, means, state):
        axes.extend(x.shape[0] for x in jax.tree.leaves(state.opt_state) if x.ndim)

    def stop(epoch, means, state):
        if epoch == 1:
            raise InterruptedError

    expected = pretrain.pretrain(config, tmp_path / "split", devices=devices, on_epoch=on_epoch)
    assert set(axes) == {2}
    with pytest.raises(InterruptedError):
        pretrain.pretrain(config, tmp_path / "resumed", devices=devices, on_epoch=stop)
    state = pretrain.pretrain(config, tmp_path / "resumed", devices=devices)
    assert_same_bits(state, expected)
    assert log_without_times(tmp_path / "resumed") == log_without_times(tmp_path / "split")
    config.optimizer.shard = False
    replicated = pretrain.pretrain(config, tmp_path / "replicated", devices=devices)
    assert jax.tree.map(jnp.shape, state) == jax.tree.map(jnp.shape, replicated)
    ours, theirs = (log_without_times(tmp_path / name) for name in ("split", "replicated"))
    for ours_of_step, theirs_of_step in zip(ours, theirs, strict=True):
        assert ours_of_step == pytest.approx(theirs_of_step, rel=1e-4)


def test_downstream_training_splits_its_update(data, tmp_path, monkeypatch):
    config = tiny_config(data, downstream__protocol="supervised", train__num_epochs=1, downstream__dropout_rate=0.0)
    sizes = []
    place = parallel.place

    def noted(*arguments):
        state = place(*arguments)
        sizes.append(sum(x.addressable_shards[0].data.size for x in jax.tree.leaves(state.opt_state)))
        return state

    monkeypatch.setattr(parallel, "place", noted)
    results = []
    for shard in (False, True):
        config.optimizer.shard = shard
        results.append(downstream.downstream(config, tmp_path / str(shard), devices=jax.devices()[:2]))
    assert sizes[1] == pytest.approx(sizes[0] / 2, rel=0.01)
    assert results[0]["test"]["loss"] == pytest.approx(results[1]["test"]["loss"], rel=1e-4)
