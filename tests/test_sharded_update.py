"""The update split over devices: the same numbers, moments that lie on one device each, checkpoints for any number."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from conclugen_jax import checkpoint, loop, optimizer, parallel, pretrain, sharded_update, train_state
from conclugen_jax.data import builders
from tests.helpers import Faces, close, flat, log_without_times, tiny_config

SHAPES = {
    "a": {"kernel": (5, 3), "bias": (3,)},
    "b": {"kernel": (7,)},
    "frozen": {"kernel": (4,)},
    "head": {"kernel": (2, 2)},
}


def parameters(seed):
    rng = np.random.default_rng(seed)
    return jax.tree.map(lambda s: rng.normal(size=s).astype(np.float32), SHAPES, is_leaf=lambda x: isinstance(x, tuple))


def steps(name, split, num_devices, number=4):
    """Parameters, moments and norms after some steps from gradients that differ by step and device."""
    make = optimizer.make_optimizer(
        lambda step: 0.1 / (1 + step),
        name=name,
        weight_decay=0.05,
        trainable=("a/.*", "b/.*", "head/.*"),
        idle=("head/.*",),
        rates={"b/.*": 0.5},
    )
    devices = jax.devices()[:num_devices]
    variables = {"params": parameters(0)}
    state = train_state.create(variables, make, jax.random.key(0))
    like = jax.eval_shape(lambda: state)

    def step(state, batch):
        grads = jax.tree.map(lambda g: g * batch["scale"], batch["grads"])
        params, opt_state, norm = sharded_update.apply(
            make, grads, state.opt_state, state.params, split=split, axis_name=parallel.AXIS, active=state.step != 1
        )
        return state.replace(step=state.step + 1, params=params, opt_state=opt_state), {"norm": norm}

    def of_step(table, position, rows):
        return lambda i: jax.tree.map(lambda x: x[i], rows)

    # The mean over devices of their gradients is the same for any number of devices: factors of mean 1.
    scale = np.stack([np.tile([0.5, 1.5], num_devices // 2) if num_devices > 1 else np.ones(1)] * number, axis=1)
    grads = jax.tree.map(lambda *x: np.stack(x), *(parameters(seed) for seed in range(1, number + 1)))
    rows = {"scale": scale.astype(np.float32), "grads": jax.tree.map(lambda x: np.stack([x] * num_devices), grads)}
    axes = sharded_update.axes(like) if split else None
    program = parallel.map_step(loop.make_dispatch(step, of_step, number), devices, axes)
    placed = (sharded_update.place if split else parallel.replicate)(state, devices)
    before = placed
    position = {"num_steps": np.full(num_devices, number, np.int32)}
    placed, metrics = program(placed, None, position, rows)
    return (sharded_update.collect(placed, like) if split else placed), np.asarray(metrics["norm"]), placed, before


@pytest.mark.parametrize("name", ["sgd", "adamw"])
def test_split_update_is_the_whole_one(name):
    expected, norms, *_ = steps(name, False, 1)
    for num_devices in (2, 8):
        state, found, placed, before = steps(name, True, num_devices)
        np.testing.assert_allclose(found, norms, rtol=1e-6)
        for path, x in flat(expected).items():
            assert close(flat(state)[path], x, 1e-5), path
        np.testing.assert_array_equal(state.params["frozen"]["kernel"], parameters(0)["frozen"]["kernel"])
        assert all(x.is_deleted() for x in jax.tree.leaves(before.params))
        if name == "adamw":
            moments = [x for x in jax.tree.leaves(placed.opt_state) if x.ndim]
            assert len(moments) == 2 * 4  # of the trained parameters
            for x in moments:
                assert x.shape[0] == num_devices
                assert {part.data.shape[0] for part in x.addressable_shards} == {1}
            assert all(x.is_deleted() for x in jax.tree.leaves(before.opt_state) if x.ndim)


def test_place_and_collect_are_inverse():
    make = optax.adam(1e-3)
    state = train_state.create({"params": parameters(0)}, make, jax.random.key(0))
    state = state.replace(
        opt_state=jax.tree.map(lambda x: x + jnp.arange(x.size, dtype=x.dtype).reshape(x.shape), state.opt_state)
    )
    for count in (1, 2, 8):
        placed = sharded_update.place(state, jax.devices()[:count])
        back = sharded_update.collect(placed, jax.eval_shape(lambda: state))
        for path, x in flat(state.opt_state).items():
            np.testing.assert_array_equal(flat(back.opt_state)[path], x)


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """The same run whole and split, and one that goes on alone from a checkpoint of the split one."""
    data = builders.build(Faces(), tmp_path_factory.mktemp("data"))
    folder = tmp_path_factory.mktemp("runs")

    def run(name, devices, epochs=4, **changes):
        settings = {"optimizer__name": "sgd", "clustering__start_epoch": 1, "checkpoint__keep_newest": 100, **changes}
        config = tiny_config(data, train__num_epochs=epochs, **settings)
        return pretrain.pretrain(config, folder / name, devices=jax.devices()[:devices])

    return folder, {"whole": run("whole", 4), "split": run("split", 4, optimizer__shard=True)}, run


def test_a_split_run_is_the_whole_one(runs):
    folder, states, _ = runs
    for path, x in flat(states["whole"]).items():
        assert close(flat(states["split"])[path], x, 1e-4), path
    ours, theirs = (log_without_times(folder / name) for name in ("split", "whole"))
    for a, b in zip(ours, theirs, strict=True):
        assert a["loss"] == pytest.approx(b["loss"], rel=1e-5)
        assert a["gradient_norm"] == pytest.approx(b["gradient_norm"], rel=1e-5)


def test_checkpoints_of_a_split_run_fit_any_run(runs, tmp_path):
    folder, states, run = runs
    run("adam", 4, epochs=2, optimizer__name="adamw", optimizer__shard=True)
    saved = checkpoint.Checkpoints(folder / "adam", read_only=True)
    tree, _ = saved.restore_tree(saved.find("newest"))
    shapes = {p: x.shape for p, x in flat(tree["params"]).items()}
    moments = {p.split("/mu/")[1]: x.shape for p, x in flat(tree["opt_state"]).items() if "/mu/" in p}
    assert moments.items() <= shapes.items()
    assert moments
    run("alone", 1, epochs=2, optimizer__name="adamw")
    other = checkpoint.Checkpoints(folder / "alone", read_only=True)
    expected, _ = other.restore_tree(other.find("newest"))
    assert flat(expected).keys() == flat(tree).keys()


def test_a_split_run_goes_on_with_another_number_of_devices(runs):
    folder, states, run = runs
    short = run("resumed", 4, optimizer__shard=True, checkpoint__every_epochs=1, epochs=4)
    for step in (12, 16):  # as if killed after eight steps
        (folder / "resumed" / "checkpoints" / str(step)).rename(folder / f"gone{step}")
    again = run("resumed", 2, optimizer__shard=True, epochs=4)
    for path, x in flat(short).items():
        assert close(flat(again)[path], x, 1e-4), path
    assert int(again.step) == 16
