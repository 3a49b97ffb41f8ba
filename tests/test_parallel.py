"""One device equals eight: losses, gradients, running averages, k-means, parameters after twenty steps, batches."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from conclugen_jax import pretrain
from conclugen_jax.data.batches import HostTable, epoch_order
from conclugen_jax.method import collectives, model as model_lib, objective, train_state
from conclugen_jax.train import feed, optimizer, parallel
from tests.helpers import assert_same_bits, close, fed, flat, tiny_config

DIMS = {"video": 24, "audio": 16, "text": 12}
N, STEPS = 64, 20


@pytest.fixture(scope="module", params=["complete", "missing"])
def runs(request):
    """Train twenty SGD steps on one and on eight devices, with all modalities and with many missing."""
    config = tiny_config(
        train__batch_size=N, clustering__queue_batches=2, optimizer__name="sgd", optimizer__learning_rate=0.05
    )
    rng = np.random.default_rng(0)
    rows = 3 * N
    present = {m: np.ones(rows, bool) for m in DIMS}
    if request.param == "missing":
        present["text"] = rng.random(rows) < 0.4
        present["audio"] = (rng.random(rows) < 0.7) | ~present["text"]
    features = {m: rng.normal(size=(rows, d)).astype(np.float32) * present[m][:, None] for m, d in DIMS.items()}
    table = {"features": features, "present": present}
    indices = np.stack([rng.permutation(rows)[:N] for _ in range(STEPS)]).astype(np.int32)
    return {count: train(config, table, indices, count) for count in (1, 8)}


def train(config, table, indices, num_devices):
    devices = jax.devices()[:num_devices]
    make, schedule = optimizer.from_config(config, steps_per_epoch=1000)
    model = model_lib.from_config(config, DIMS, parallel.AXIS)
    variables = model_lib.initial_variables(model, jax.random.key(1), None)
    state = train_state.create(
        variables, make, jax.random.key(2), queue_length=2 * N, num_clusters=config.clustering.num_clusters
    )
    keywords = {
        "model": model,
        "config": config,
        "steps_per_epoch": 1000,
        "cluster": True,
        "axis_name": parallel.AXIS,
    }
    step = functools.partial(pretrain.pretrain_step, optimizer=make, schedule=schedule, **keywords)

    def dispatch(state, table, position, indices):
        batch_of = rows_of_table(table, position, indices)
        return feed.repeat(step, batch_of, state, position["num_steps"], most_steps=STEPS // 5)

    program = parallel.map_step(dispatch, devices)
    placed = parallel.replicate(table, devices)

    # One step taken apart, from a state with a full queue in the middle of an epoch.
    def gradient(state, table, batch):
        loss_fn = functools.partial(objective.pretrain_loss, **keywords)
        rows = feed.take_rows(table, batch, {})
        (loss, (_, stats, clustered)), grads = jax.value_and_grad(loss_fn, has_aux=True)(
            state.params, state, rows, jax.random.key(3)
        )
        return collectives.mean(grads, parallel.AXIS), stats, clustered.kmeans, loss

    mapped = jax.pmap(
        gradient,
        axis_name=parallel.AXIS,
        devices=devices,
        in_axes=(None, None, 0),
        out_axes=(None, None, None, 0),
    )
    queue = jax.random.normal(jax.random.key(4), state.queue.shape)
    full = parallel.replicate(state.replace(step=jnp.int32(5), queue=queue, queue_batches=jnp.int32(2)), devices)
    grads, stats, kmeans, loss = mapped(full, placed, parallel.split_rows(indices[0], num_devices))

    state, history = parallel.replicate(state, devices), []
    for part in np.split(indices, 5):
        batch = parallel.split_rows(part, num_devices, axis=1)
        position = {"num_steps": np.full(num_devices, len(part), np.int32)}
        state, metrics = program(state, placed, position, batch)
        history.append(jax.tree.map(np.asarray, metrics))
    metrics = {k: np.concatenate([h[k] for h in history]) for k in history[0]}
    return state, metrics, flat(grads), flat(stats), kmeans, np.asarray(loss)


def rows_of_table(table, position, indices):
    """Return what gathers the rows of a step, by indices [steps, n] of the table."""
    return lambda i: feed.take_rows(table, indices[i], {})


def test_metrics_of_all_steps(runs):
    one, eight = runs[1][1], runs[8][1]
    assert one.keys() == eight.keys()
    for name, values in one.items():
        assert close(eight[name], values, 1e-5), name
    assert (one["kmeans/iterations"][:2] == 0).all()  # the queue is not full yet
    assert (one["kmeans/iterations"][2:] > 0).all()
    assert one["loss"][-1] < one["loss"][2]


def test_every_gradient(runs):
    for path, grad in runs[1][2].items():
        if path == "projection/fc1/bias":  # zero in exact arithmetic: BatchNorm follows
            assert np.abs(runs[8][2][path]).max() < 1e-6
            continue
        # The part of this gradient that comes through BatchNorm cancels to zero, less rounding.
        tolerance = 1e-4 if path == "representation/audio/expand/bias" else 1e-5
        assert np.abs(grad).max() > 0, path
        assert close(runs[8][2][path], grad, tolerance), path


def test_running_averages(runs):
    for path, value in runs[1][3].items():
        assert close(runs[8][3][path], value, 1e-5), path


def test_k_means(runs):
    np.testing.assert_array_equal(runs[1][4].assignments, runs[8][4].assignments)
    assert close(runs[8][4].centroids, runs[1][4].centroids, 1e-5)
    assert int(runs[1][4].iterations) == int(runs[8][4].iterations)


def test_loss_is_the_same_scalar_on_every_device(runs):
    assert np.unique(runs[8][5]).size == 1


def test_parameters_and_queue_after_twenty_steps(runs):
    one, eight = runs[1][0], runs[8][0]
    for path, value in flat(one.params).items():
        assert close(flat(eight.params)[path], value, 1e-5), path
    assert close(eight.queue, one.queue, 1e-5)
    assert int(one.step) == int(eight.step) == STEPS


def test_state_stays_equal_on_all_devices(runs):
    for path, leaf in jax.tree_util.tree_leaves_with_path(runs[8][0]):
        x = jax.random.key_data(leaf) if jax.dtypes.issubdtype(leaf.dtype, jax.dtypes.prng_key) else leaf
        copies = [np.asarray(s.data).tobytes() for s in x.addressable_shards]
        assert len(copies) == 8, path
        assert len(set(copies)) == 1, path


@pytest.mark.parametrize("table", [True, False])
def test_batches_and_their_order_do_not_depend_on_the_number_of_devices(table):
    config = tiny_config(train__batch_size=16, train__num_epochs=4, train__steps_per_dispatch=2)
    rng = np.random.default_rng(0)
    rows = {
        "features": {"video": rng.normal(size=(50, 2)).astype(np.float32)},
        "present": {"video": np.ones(50, bool)},
        "label": np.arange(50),
    }
    source = HostTable(rows, np.arange(50), tier="device" if table else "host")
    seen = {}
    for count in (1, 2, 8):
        devices = jax.devices()[:count]
        batches = feed.Feed(source, config, devices, keys=("label",))
        taken = [got["label"] for _, got in fed(batches)]
        assert [len(x) for x in taken] == [2, 1] * 4
        seen[count] = np.concatenate(taken)
        # Device d holds rows d * n .. (d + 1) * n of every step's batch, whatever the tier.
        order = np.concatenate([epoch_order(0, e, 50)[:48] for e in range(4)])
        np.testing.assert_array_equal(seen[count], order.reshape(12, 16))
    assert seen[1].shape == (12, 16)
    np.testing.assert_array_equal(seen[1], seen[2])
    np.testing.assert_array_equal(seen[1], seen[8])


def test_donated_state_is_updated_in_place():
    program = parallel.map_step(lambda s, t, p, b: (s + b.sum(), {}), jax.devices()[:2])
    state = parallel.replicate(jnp.zeros(3), jax.devices()[:2])
    before = state
    after, _ = program(state, None, None, np.ones((2, 1), np.float32))
    np.testing.assert_array_equal(after, np.ones(3))
    assert before.is_deleted()


def test_split_and_merge_are_inverse():
    x = {"a": np.arange(24).reshape(8, 3)}
    merged = parallel.merge_rows(parallel.split_rows(x, 4))
    assert_same_bits(jax.tree.map(jnp.asarray, merged), jax.tree.map(jnp.asarray, x))
