"""One pretraining step, term by term, against numbers from an independent PyTorch program in float64."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from conclugen_jax import pretrain
from conclugen_jax.method import clustering, losses, objective, train_state
from conclugen_jax.method.model import ConCluGen
from conclugen_jax.train import optimizer
from tests.helpers import close, flat, tiny_config, tree_of

MODALITIES = ("video", "audio", "text")


@pytest.fixture(scope="module")
def setup(golden):
    name, numbers = golden
    authors = name == "authors_code"
    model = ConCluGen(
        feature_dims={"video": 48, "audio": 24, "text": 16},
        bottleneck=("audio",),
        representation_dim=64,
        projection_dim=32,
        num_clusters=4,
        reconstruction_dim=24,
        decoder_relu=authors,
    )
    config = tiny_config(loss__margin_in_denominator=authors, clustering__queue_batches=4, clustering__start_epoch=0)
    params = tree_of(numbers, "params")
    features = tree_of(numbers, "features")
    fresh = model.init(jax.random.key(0), features, train=True)
    assert jax.tree.map(jnp.shape, fresh["params"]) == jax.tree.map(jnp.shape, params)
    make = optimizer.make_optimizer(lambda _: 1e-3, weight_decay=1e-2, eps=1e-8)
    state = train_state.create({**fresh, "params": params}, make, jax.random.key(0), queue_length=128, num_clusters=4)
    # Step 1 of an epoch, so that the full queue is not emptied; warm centroids, so that Lloyd starts where it should.
    state = state.replace(
        step=jnp.int32(1),
        queue=jnp.asarray(numbers["queue"], jnp.float32),
        queue_batches=jnp.int32(4),
        centroids=jnp.asarray(numbers["init_centroids"], jnp.float32),
    )
    config.clustering.initialisation = "warm"
    present = {m: jnp.ones(32, bool) for m in MODALITIES}
    return numbers, model, config, state, {"features": features, "present": present}, make


def test_forward(setup):
    numbers, model, _, state, batch, _ = setup
    outputs, _ = model.apply(state.variables(), batch["features"], train=True, mutable=["batch_stats"])
    for kind in ("representations", "projections", "cluster_logits", "reconstructions"):
        for m in MODALITIES:
            assert close(getattr(outputs, kind)[m], numbers[f"{kind}/{m}"]), (kind, m)


def test_losses_and_every_gradient(setup):
    numbers, model, config, state, batch, _ = setup
    loss_fn = functools.partial(objective.pretrain_loss, model=model, config=config, steps_per_epoch=100, cluster=True)
    (total, (terms, _, clustered)), grads = jax.jit(jax.value_and_grad(loss_fn, has_aux=True))(
        state.params, state, batch, jax.random.key(0)
    )
    assert close(total, numbers["loss/total"])
    for term in ("contrastive", "clustering", "reconstruction"):
        assert close(terms[f"loss/{term}"], numbers[f"loss/{term}"]), term
    np.testing.assert_array_equal(clustered.kmeans.assignments, numbers["kmeans/assignments"])
    assert close(clustered.kmeans.centroids, numbers["kmeans/centroids"])
    assert int(clustered.kmeans.iterations) == numbers["kmeans/iterations"]
    for path, grad in flat(grads).items():
        if path == "projection/fc1/bias":  # zero in exact arithmetic: BatchNorm follows
            assert np.abs(grad).max() < 1e-5
        else:
            assert close(grad, numbers[f"grads/{path}"]), path


def test_lloyd(golden):
    _, numbers = golden
    result = jax.jit(clustering.lloyd)(jnp.asarray(numbers["kmeans/points"]), jnp.asarray(numbers["init_centroids"]))
    np.testing.assert_array_equal(result.assignments, numbers["kmeans/assignments"])
    assert close(result.centroids, numbers["kmeans/centroids"])
    assert int(result.iterations) == numbers["kmeans/iterations"]


def test_three_adamw_steps(setup):
    numbers, model, config, state, batch, make = setup
    step = jax.jit(
        functools.partial(
            pretrain.pretrain_step,
            model=model,
            optimizer=make,
            schedule=lambda _: jnp.float32(1e-3),
            config=config,
            steps_per_epoch=100,
            cluster=True,
        )
    )
    for i in range(3):
        state, metrics = step(state, batch)
        assert close(metrics["loss"], numbers[f"adamw_loss/{i}"]), i
        state = state.replace(centroids=jnp.asarray(numbers["init_centroids"], jnp.float32))
    for path, param in flat(state.params).items():
        if path == "projection/fc1/bias":  # Adam magnifies the rounding of its zero gradient
            continue
        # Likewise the few entries whose gradient is below the rounding of the sum it is: Adam divides by its size.
        grad = np.abs(numbers[f"grads/{path}"])
        certain = (grad == 0) | (grad >= 1e-6 * grad.max())
        assert certain.mean() > 0.99, path
        expected = numbers[f"params_after_3_adamw_steps/{path}"]
        assert close(np.where(certain, param, expected), expected), path
        assert np.abs(param - expected).max() < 1e-4, path
    assert int(state.opt_state[0].count) == 3
    assert optax.tree.norm(state.opt_state[0].mu) > 0


def test_info_nce(golden):
    _, numbers = golden
    loss = losses.info_nce(
        jnp.asarray(numbers["info_nce/view_a"]), jnp.asarray(numbers["info_nce/view_b"]), temperature=0.07
    )
    assert close(loss, numbers["loss/info_nce"])


def test_schedule(golden):
    _, numbers = golden
    schedule = optimizer.learning_rate_schedule(1.0, steps_per_epoch=3)
    rates = jax.vmap(schedule)(jnp.arange(600))
    np.testing.assert_allclose(rates, np.repeat(numbers["schedule/lr_of_epoch_for_peak_1"], 3), rtol=0, atol=1e-6)
