"""Views of examples: stored variants chosen anew at each visit, or made in feature space; L_NCE between two of them."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from conclugen_jax import pretrain
from conclugen_jax.data import batches, builders, shards
from conclugen_jax.evaluate import downstream
from conclugen_jax.method import augmentation, losses, model as model_lib, objective, train_state
from conclugen_jax.train import feed, optimizer, parallel
from tests.helpers import assert_same_bits, fed, log_without_times, tiny_config
from tests.test_records import Parted

STATISTICS = MEAN, SCALE = np.linspace(-5, 5, 24, dtype=np.float32), np.linspace(1, 3, 24, dtype=np.float32)


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return builders.build(Parted(missing=0.3, variants=3), tmp_path_factory.mktemp("data"))


def stored():
    """Return all variants of the training split: float32 [64, 3, 24]."""
    source = Parted(missing=0.3, variants=3)
    return np.stack([e.features["video"] for e in source.examples("train")])


def visits(path, tier, pairs=(), first_step=0, **changes):
    """Return the video of every visit of a run from a step on, as the feed of training gives it."""
    config = tiny_config(path, data__tier=tier, train__num_epochs=2, **changes)
    stream = shards.ShardStream(shards.open_dataset(path), "train", ("video", "text"), all_variants=True)
    rows = feed.load_rows(config, stream)
    devices = jax.devices()[:2]
    batches = feed.Feed(rows, config, devices, pairs=pairs)
    seen = [rows["features"]["video"] for _, rows in fed(batches, first_step)]
    return np.concatenate([x.reshape(-1, *x.shape[2:]) for x in seen])


@pytest.mark.parametrize("pairs", [(), ("video",)])
def test_every_tier_visits_the_same_variants(data, pairs):
    expected = visits(data, "shards", pairs)
    assert expected.shape == (128, 2, 24) if pairs else (128, 24)
    for tier in ("host", "device"):
        assert_same_bits(visits(data, tier, pairs), expected)
    assert_same_bits(visits(data, "host", pairs, data__host_cache_gib=0.0), expected)
    assert_same_bits(visits(data, "host", pairs, first_step=6), expected[6 * 16 :])  # resumed
    # Each vector is one of the row's own variants, and none of the three is left out.
    known = {x.tobytes(): (row, v) for row, example in enumerate(stored()) for v, x in enumerate(example)}
    found = [known[x.tobytes()] for x in expected.reshape(-1, 24)]
    assert {v for _, v in found} == {0, 1, 2}
    if pairs:
        assert all(a[0] == b[0] and a[1] != b[1] for a, b in zip(found[::2], found[1::2], strict=True))


def test_choices_are_uniform_anew_at_each_epoch_and_never_the_same_twice_in_a_pair():
    rows = np.arange(20_000).reshape(2, 10_000)
    single = batches.variant_choices(rows, {"video": 10}, seed=3, epoch=0)["video"]
    assert single.shape == rows.shape
    np.testing.assert_allclose(np.bincount(single.ravel(), minlength=10), 2000, atol=200)  # 4.7 deviations
    other = batches.variant_choices(rows, {"video": 10, "text": 10}, seed=3, epoch=1)
    assert 0.08 < np.mean(single == other["video"]) < 0.12
    assert 0.08 < np.mean(other["text"] == other["video"]) < 0.12
    pair = batches.variant_choices(rows, {"video": 10}, seed=3, epoch=0, pairs=("video",))["video"]
    np.testing.assert_array_equal(pair[..., 0], single)
    assert np.all(pair[..., 0] != pair[..., 1])
    table = np.zeros((10, 10))
    np.add.at(table, (pair[..., 0].ravel(), pair[..., 1].ravel()), 1)
    np.testing.assert_allclose(table[~np.eye(10, dtype=bool)], 20_000 / 90, atol=75)  # 5 deviations
    # A row's choice does not depend on which batch it is in.
    np.testing.assert_array_equal(
        batches.variant_choices(rows[0, 5:9], {"video": 10}, seed=3, epoch=0)["video"], single[0, 5:9]
    )


def test_views_made_of_features_have_the_rates_of_the_configuration():
    config = tiny_config(views__mask_rate=0.3, views__noise=0.5)
    x = np.full((4000, 24), 100, np.float32)
    first, second = augmentation.two_views(x, jax.random.key(0), config=config, statistics=STATISTICS)
    for view in (np.asarray(first), np.asarray(second)):
        masked = np.abs(view - MEAN) < 30
        assert abs(masked.mean() - 0.3) < 0.01
        noise = np.where(masked, view - MEAN, view - 100) / SCALE
        np.testing.assert_allclose(noise.mean(axis=0), 0, atol=0.04)
        np.testing.assert_allclose(noise.std(axis=0), 0.5, atol=0.03)
    assert np.mean(np.asarray(first) == np.asarray(second)) < 0.01
    config.views.mask_rate = config.views.noise = 0.0
    assert_same_bits(augmentation.two_views(x, jax.random.key(0), config=config, statistics=STATISTICS), (x, x))


def test_views_do_not_depend_on_the_number_of_devices():
    config, x = tiny_config(), np.random.default_rng(0).normal(size=(16, 24)).astype(np.float32)

    def both(x, axis_name):
        key = jax.random.key(5)
        return jnp.stack(
            augmentation.two_views(x, key, config=config, statistics=STATISTICS, axis_name=axis_name), axis=1
        )

    split = jax.pmap(functools.partial(both, axis_name=parallel.AXIS), axis_name=parallel.AXIS)(
        parallel.split_rows(x, len(jax.devices()))
    )
    np.testing.assert_allclose(np.concatenate(split), both(x, None), rtol=1e-6, atol=1e-6)


def instance_config(path="", **changes):
    weights = {f"loss__{name}_weight": 0.0 for name in ("contrastive", "clustering", "reconstruction")}
    return tiny_config(path, loss__instance_weight=1.0, data__modalities=("video",), **weights, **changes)


def test_the_term_is_that_of_the_projections_of_two_stored_variants():
    config = instance_config()
    model = model_lib.from_config(config, {"video": 24})
    make, _ = optimizer.from_config(config, 10)
    state = train_state.create(model_lib.initial_variables(model, jax.random.key(0), None), make, jax.random.key(1))
    pair = np.random.default_rng(0).normal(size=(12, 2, 24)).astype(np.float32)
    present = {"video": np.arange(12) % 4 > 0}
    loss, (terms, stats, _) = objective.pretrain_loss(
        state.params,
        state,
        {"features": {"video": pair}, "present": present},
        jax.random.key(2),
        model=model,
        config=config,
        steps_per_epoch=10,
        cluster=False,
    )
    variables, projections = state.variables(), []
    for view in (pair[:, 0], pair[:, 1]):
        outputs, updates = model.apply(
            variables, {"video": view[present["video"]]}, train=True, mutable=["batch_stats"]
        )
        variables = {**variables, **updates}
        projections.append(outputs.projections["video"])
    expected = losses.info_nce(*projections, temperature=config.loss.instance_temperature)
    np.testing.assert_allclose(loss, expected, rtol=1e-5)
    assert set(terms) == {"loss", "loss/instance"}
    # Running averages have seen both views, one after the other.
    for a, b in zip(jax.tree.leaves(stats), jax.tree.leaves(variables["batch_stats"]), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("variants", ["random", "first"])
def test_instance_cont_learns_to_tell_examples_apart(data, tmp_path, variants):
    config = instance_config(data, data__variants=variants, train__num_epochs=6, optimizer__learning_rate=3e-3)
    pretrain.pretrain(config, tmp_path, devices=jax.devices()[:1])
    records = log_without_times(tmp_path)
    assert all(set(r) >= {"loss/instance"} and not {"loss/contrastive", "loss/clustering"} & set(r) for r in records)
    means = [np.mean([r["loss/instance"] for r in records if r["epoch"] == e]) for e in (0, 5)]
    assert means[1] < means[0] - 0.3


def test_stored_variants_are_drawn_while_any_method_is_pretrained(data, tmp_path):
    records = {}
    for variants in ("random", "first"):
        weights = {"loss__clustering_weight": 0.0, "loss__reconstruction_weight": 0.0}
        config = tiny_config(data, data__variants=variants, train__num_epochs=1, **weights)
        pretrain.pretrain(config, tmp_path / variants, devices=jax.devices()[:1])
        records[variants] = log_without_times(tmp_path / variants)
    assert records["random"][0]["loss"] != records["first"][0]["loss"]


def test_stored_variants_are_drawn_to_train_a_classifier_and_never_to_score_it(data, tmp_path):
    """The same weights see what they are trained on by chance, and what they are scored on, here the same split, as it is."""
    last = {}
    for variants in ("random", "first"):
        config = tiny_config(
            data,
            data__variants=variants,
            data__validation_split="train",
            data__test_split="train",
            downstream__protocol="supervised",
            train__num_epochs=1,
            optimizer__learning_rate=0.0,
            schedule__minimum=0.0,
        )
        result = downstream.downstream(config, tmp_path / variants, devices=jax.devices()[:1])
        last[variants] = log_without_times(tmp_path / variants)[-1]
        assert result["test"]["loss"] == pytest.approx(last[variants]["validation/loss"], rel=1e-6)
    assert last["random"]["loss"] != last["first"]["loss"]
    assert last["random"]["validation/loss"] == pytest.approx(last["first"]["validation/loss"], rel=1e-6)
