"""The step of pretraining: terms of the objective, absent rows, the idle head, chunks of the encoder, dispatches."""

import dataclasses
import functools
import itertools
import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from conclugen_jax import pretrain
from conclugen_jax.method import layers, losses, model as model_lib, objective, train_state
from conclugen_jax.train import feed, optimizer
from tests.helpers import assert_same_bits, close, flat, plan, tiny_config


def one_step(config, state, batch, model, optimizer, cluster=True):
    step = functools.partial(
        pretrain.pretrain_step,
        model=model,
        optimizer=optimizer,
        schedule=lambda _: jnp.float32(0),
        config=config,
        steps_per_epoch=100,
        cluster=cluster,
    )
    return jax.jit(step)(state, batch)


@pytest.fixture(scope="module")
def one():
    """Return configuration, model, state with a full queue, a batch in which many rows lack text or audio, and optimizer."""
    config = tiny_config(clustering__start_epoch=0)
    dims, rng = {"video": 24, "audio": 16, "text": 12}, np.random.default_rng(0)
    model = model_lib.from_config(config, dims)
    make, _ = optimizer.from_config(config, 100)
    variables = model_lib.initial_variables(model, jax.random.key(0), None)
    state = train_state.create(variables, make, jax.random.key(1), queue_length=16, num_clusters=4)
    queue = jnp.asarray(rng.normal(size=(16, 4)), jnp.float32)
    state = state.replace(step=jnp.int32(1), queue=queue, queue_batches=jnp.int32(1))
    present = {"video": np.ones(16, bool), "audio": np.arange(16) % 3 > 0, "text": np.arange(16) < 9}
    features = {m: rng.normal(size=(16, d)).astype(np.float32) for m, d in dims.items()}
    return config, model, state, {"features": features, "present": present}, make


@pytest.fixture
def small(one):
    """Return the same with a configuration and a batch that a test may change."""
    config, model, state, batch, make = one
    return config.copy_and_resolve_references(), model, state, jax.tree.map(np.copy, batch), make


def gradients(small, config):
    """Return ((loss, auxiliary outputs), gradients) of a state and a batch."""
    _, model, state, batch, _ = small
    loss_fn = functools.partial(objective.pretrain_loss, model=model, config=config, steps_per_epoch=100, cluster=True)
    return jax.jit(jax.value_and_grad(loss_fn, has_aux=True))(state.params, state, batch, jax.random.key(2))


@pytest.fixture(scope="module")
def whole(one):
    """Return loss and gradients of the batch without chunks."""
    return gradients(one, one[0])


@pytest.mark.parametrize("target", ["joint", "individual"])
def test_what_stands_in_absent_rows_changes_nothing(small, target):
    config, model, state, batch, _ = small
    config.loss.clustering_target = target

    def everything(features):
        rows = {"features": features, "present": batch["present"]}
        (loss, (terms, stats, clustered)), grads = gradients((config, model, state, rows, None), config)
        return {"loss": loss, "terms": terms, "stats": stats, "queue": clustered.queue, "grads": grads}

    zeros, garbage = (
        {m: np.where(batch["present"][m][:, None], x, fill) for m, x in batch["features"].items()}
        for fill in (np.float32(0), np.float32(1e3))
    )
    assert_same_bits(everything(zeros), everything(garbage))


def test_terms_are_those_of_the_rows_that_are_there(small):
    config, model, state, batch, _ = small
    present = batch["present"]
    outputs, _ = model.apply(state.variables(), batch["features"], present=present, train=True, mutable=["batch_stats"])
    (_, (terms, *_)), _ = gradients(small, config)
    expected = 0
    for a, b in (("video", "audio"), ("video", "text"), ("audio", "text")):
        both = present[a] & present[b]
        expected += losses.masked_margin_softmax(outputs.projections[a][both], outputs.projections[b][both])
    np.testing.assert_allclose(terms["loss/contrastive"], expected, rtol=1e-5)
    by_hand = [
        np.square(np.asarray(outputs.reconstructions[m]) - batch["features"][m])[present[m]].mean() for m in present
    ]
    np.testing.assert_allclose(terms["loss/reconstruction"], sum(by_hand), rtol=1e-5)


def test_loss_and_gradients_are_those_without_the_absent_rows(small):
    """The reference never sees an absent row: each modality has only its own rows, of different number."""
    config, model, state, batch, _ = small
    features, present = batch["features"], batch["present"]
    rows = {m: np.flatnonzero(present[m]) for m in features}

    def masked(params):
        return objective.pretrain_loss(
            params, state, batch, jax.random.key(2), model=model, config=config, steps_per_epoch=100, cluster=False
        )[0]

    def without(params):
        outputs = [
            model.apply({**state.variables(), "params": params}, {m: x[rows[m]]}, train=True, mutable=["batch_stats"])[
                0
            ]
            for m, x in features.items()
        ]
        projections = {m: o.projections[m] for m, o in zip(features, outputs, strict=True)}
        loss = 0.0
        for a, b in itertools.combinations(features, 2):
            _, of_a, of_b = np.intersect1d(rows[a], rows[b], return_indices=True)
            loss += losses.masked_margin_softmax(projections[a][of_a], projections[b][of_b])
        for m, o in zip(features, outputs, strict=True):
            loss += losses.reconstruction_loss(o.reconstructions[m], jnp.asarray(features[m][rows[m]]))
        return loss

    (loss, grads), (expected, expected_grads) = (
        jax.jit(jax.value_and_grad(f))(state.params) for f in (masked, without)
    )
    np.testing.assert_allclose(loss, expected, rtol=1e-5)
    assert not present["text"].all()
    for path, gradient in flat(grads).items():
        if path != "projection/fc1/bias":  # no gradient but rounding: BatchNorm subtracts it
            assert close(gradient, flat(expected_grads)[path], 1e-4), path


def test_a_modality_absent_from_the_whole_batch_gives_no_nan(small):
    config, model, state, batch, make = small
    batch["present"]["text"][:] = False
    after, metrics = one_step(config, state, batch, model, make)
    assert all(np.isfinite(x).all() for x in jax.tree.leaves((metrics, after.params, after.batch_stats)))


def test_k_means_starts_elsewhere_at_every_step(small):
    config, model, state, batch, make = small
    config.clustering.max_iterations = 1
    first, _ = one_step(config, state, batch, model, make)
    again, _ = one_step(config, state, batch, model, make)
    later, _ = one_step(config, state.replace(step=jnp.int32(2)), batch, model, make)
    np.testing.assert_array_equal(first.centroids, again.centroids)
    assert not np.array_equal(first.centroids, later.centroids)


def test_clustering_head_waits_for_its_first_gradient_as_in_pytorch(small):
    config, model, state, batch, _ = small
    config.optimizer.weight_decay = 0.5
    make, _ = optimizer.from_config(config, 100)
    state = state.replace(opt_state=make.init(state.params))
    waiting = state
    for cluster, filled in ((False, 1), (True, 0)):  # before the start epoch; with the queue not full
        waiting = waiting.replace(queue_batches=jnp.int32(filled))
        waiting, _ = one_step(config, waiting, batch, model, make, cluster=cluster)
    assert_same_bits(waiting.params["clustering"], state.params["clustering"])
    assert not np.array_equal(
        waiting.params["projection"]["fc2"]["kernel"], state.params["projection"]["fc2"]["kernel"]
    )
    moved, _ = one_step(config, waiting.replace(queue_batches=jnp.int32(1)), batch, model, make)
    rate = 1e-4  # of the first epoch: a tenth of the peak
    kernel = np.asarray(state.params["clustering"]["kernel"])
    step = (np.asarray(moved.params["clustering"]["kernel"]) - kernel) / rate + 0.5 * kernel
    # Adam's very first step has size 1 wherever the gradient is not negligible.
    assert np.quantile(np.abs(step), 0.2) == pytest.approx(1, abs=0.02)
    assert np.abs(step).max() < 1.02


def test_modality_pairs():
    assert objective.modality_pairs(["a", "b", "c"], "circle") == objective.modality_pairs(["a", "b", "c"], "all")
    assert objective.modality_pairs(list("abcd"), "circle") == [("a", "b"), ("b", "c"), ("c", "d"), ("d", "a")]
    assert len(objective.modality_pairs(list("abcd"), "all")) == 6


def test_fused_is_the_mean_over_present_modalities():
    logits = {"a": jnp.array([[2.0], [2.0], [5.0]]), "b": jnp.array([[4.0], [jnp.nan], [7.0]])}
    present = {"a": jnp.array([True, True, False]), "b": jnp.array([True, False, False])}
    np.testing.assert_array_equal(layers.fuse(logits, present, "mean"), [[3.0], [2.0], [0.0]])


def test_individual_clustering_is_the_sum_over_modalities(monkeypatch):
    config = tiny_config(loss__clustering_target="individual", clustering__queue_batches=1)
    rng = np.random.default_rng(0)
    logits = {m: jnp.asarray(rng.normal(size=(16, 4)), jnp.float32) for m in ("a", "b")}
    present = {m: jnp.ones(16, bool) for m in logits}
    state = dataclasses.make_dataclass("S", ["queue", "queue_batches", "centroids", "step"])(
        jnp.asarray(rng.normal(size=(16, 4)), jnp.float32), jnp.int32(1), jnp.zeros((4, 4)), jnp.int32(1)
    )
    got = objective.clustering_term(
        logits, present, state, jax.random.key(0), config=config, steps_per_epoch=9, axis_name=None
    )
    own = got.kmeans.assignments[16:]
    expected = sum(losses.clustering_loss(g, got.kmeans.centroids, own) for g in logits.values())
    assert float(got.loss) == pytest.approx(float(expected), rel=1e-6)
    np.testing.assert_allclose(got.queue, (logits["a"] + logits["b"]) / 2, rtol=1e-6)


@pytest.mark.parametrize(
    ("steps", "most", "expected"),
    [
        (4, 50, [4]),
        (100, 50, [50, 50]),
        (130, 50, [44, 43, 43]),
        (35, 50, [35]),
        (7, 3, [3, 2, 2]),
        (51, 50, [26, 25]),
        (5, 2, [2, 2, 1]),
        (5, 1, [1] * 5),
    ],
)
def test_dispatches_cover_the_epoch(steps, most, expected):
    rows = types.SimpleNamespace(tier="device", usable=np.arange(steps * 4))
    config = tiny_config(train__batch_size=4, train__steps_per_dispatch=most)
    lengths = feed.Feed(rows, config, jax.devices()[:1]).lengths
    assert lengths == expected
    assert sum(lengths) == steps
    assert max(lengths) <= most


def test_plan_resumes_at_any_dispatch():
    everything = plan(0, [2, 2, 1], 3)
    assert [d.num_steps for d in everything[:3]] == [2, 2, 1]
    assert [d.end_step for d in everything] == [2, 4, 5, 7, 9, 10, 12, 14, 15]
    assert [d.end_step for d in everything if d.ends_epoch] == [5, 10, 15]
    for i, dispatch in enumerate(everything):
        assert plan(dispatch.end_step, [2, 2, 1], 3) == everything[i + 1 :]
    # From the middle of a dispatch: no step is done twice.
    for first in (1, 3, 6, 8, 13):
        steps = [d.end_step - d.num_steps + i + 1 for d in plan(first, [2, 2, 1], 3) for i in range(d.num_steps)]
        assert steps == list(range(first + 1, 16))
        assert all((d.end_step - d.num_steps) % 5 == d.first_step_in_epoch for d in plan(first, [2, 2, 1], 3))


@pytest.mark.parametrize("size", [4, 7, 15, 16, 100])
def test_encoder_in_chunks_gives_the_same_loss_and_gradients(small, whole, size):
    config = small[0]
    config.encoder_chunk_size = size
    ((loss, (terms, stats, clustered)), grads), expected = gradients(small, config), whole
    assert_close = functools.partial(np.testing.assert_allclose, rtol=1e-5, atol=1e-6)
    assert_close(loss, expected[0][0])
    jax.tree.map(assert_close, (terms, stats, clustered.queue), (*expected[0][1][:2], expected[0][1][2].queue))
    assert flat(grads).keys() == flat(expected[1]).keys()
    for path, x in flat(expected[1]).items():  # that of a bias before BatchNorm is nothing but rounding
        assert path == "projection/fc1/bias" or close(flat(grads)[path], x, 1e-4), path


def test_encoder_in_chunks_needs_less_memory():
    def temporary(size):
        def loss(w, x):
            return objective.in_chunks(lambda rows: jnp.tanh(jnp.tanh(rows @ w) @ w).sum(1), x, size).sum()

        w, x = (jax.ShapeDtypeStruct(shape, jnp.float32) for shape in ((64, 64), (8192, 64)))
        return jax.jit(jax.grad(loss)).lower(w, x).compile().memory_analysis().temp_size_in_bytes

    assert temporary(256) < 0.25 * temporary(0)
