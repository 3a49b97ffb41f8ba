"""Mixup, dropout of features and of modalities, soft targets: numbers by hand, absent rows, one device as eight."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from conclugen_jax.method import augmentation, losses, model as model_lib, objective, train_state
from conclugen_jax.train import optimizer, parallel
from tests.helpers import assert_same_bits, tiny_config

DIMS = {"video": 24, "text": 12}


@pytest.fixture(scope="module")
def batch():
    generator = np.random.default_rng(0)
    features = {m: generator.normal(size=(16, dim)).astype(np.float32) for m, dim in DIMS.items()}
    return {"features": features, "present": {"video": np.ones(16, bool), "text": np.arange(16) % 3 > 0}}


def mixed(batch, seed=0, alpha=1.0, axis_name=None):
    key = jax.random.key(seed)
    return augmentation.mixup(batch["features"], batch["present"], key, alpha=alpha, axis_name=axis_name)


def test_mixup_has_one_partner_and_one_share_in_all_modalities(batch):
    found, present = mixed(batch), batch["present"]["text"]
    x, y = batch["features"]["video"], np.asarray(found["video"])
    for i in range(16):
        # The partner and the share, from the video alone.
        ways = [np.linalg.lstsq((x[i] - x[j])[:, None], y[i] - x[j], rcond=None) for j in range(16) if j != i]
        others = [j for j in range(16) if j != i]
        residuals = [w[1].sum() if w[1].size else 1 for w in ways]
        if np.allclose(y[i], x[i], atol=1e-6):  # its own partner
            np.testing.assert_allclose(found["text"][i], batch["features"]["text"][i], atol=1e-6)
            continue
        best = int(np.argmin(residuals))
        assert residuals[best] < 1e-9
        j, share = others[best], float(ways[best][0][0])
        share = share if present[i] and present[j] else 1.0
        text = share * batch["features"]["text"][i] + (1 - share) * batch["features"]["text"][j]
        np.testing.assert_allclose(found["text"][i], text, atol=1e-5)


def test_mixup_leaves_no_trace_of_absent_rows(batch):
    absent = ~batch["present"]["text"][:, None]
    other = {**batch, "features": batch["features"] | {"text": np.where(absent, 1e3, batch["features"]["text"])}}
    a, b = (np.asarray(mixed(x)["text"])[~absent[:, 0]] for x in (batch, other))
    assert_same_bits(a, b)


def test_shares_follow_beta_and_variants_keep_their_shape(batch):
    x = np.stack([np.ones((4000, 2, 1)), np.zeros((4000, 2, 1))], axis=1).reshape(8000, 2, 1).astype(np.float32)
    y = np.asarray(augmentation.mixup({"a": x}, {"a": np.ones(8000, bool)}, jax.random.key(1), alpha=0.4)["a"])
    assert y.shape == x.shape
    np.testing.assert_array_equal(y[:, 0], y[:, 1])
    # A share of its own row s: where row and partner differ, |y - x| is 1 - s, whose variance is 1 / (4 (2 alpha + 1)).
    moved = np.abs(y - x)[:, 0, 0]
    shares = moved[moved > 0]
    assert abs(len(shares) / 8000 - 0.5) < 0.03
    assert abs(shares.mean() - 0.5) < 0.02
    assert abs(shares.var() - 1 / (4 * 1.8)) < 0.01


def test_dropout_keeps_the_expectation():
    kept = np.asarray(augmentation.dropout((4000, 50), jax.random.key(0), rate=0.3))
    np.testing.assert_allclose(np.unique(kept), [0, 1 / 0.7], rtol=1e-6)
    np.testing.assert_allclose(kept.mean(axis=0), 1, atol=0.05)
    assert np.abs(np.corrcoef(kept[:, :8].T) - np.eye(8)).max() < 0.06


def shown(batch, seed=0, axis_name=None):
    config = tiny_config(augmentation__modality_dropout=0.5)
    return augmentation.shown(batch["present"], jax.random.key(seed), 5, config, axis_name)


def test_modality_dropout_hides_a_share_and_leaves_one():
    present = {m: np.arange(4000) % 4 != i for i, m in enumerate("abc")}
    found = augmentation.modality_dropout(present, jax.random.key(0), rate=0.5)
    there, left = (np.stack([np.asarray(x[m]) for m in "abc"], axis=1) for x in (present, found))
    assert not (left & ~there).any()
    assert left.any(axis=1).all()
    drawn = np.asarray(jax.random.uniform(jax.random.key(0), (4000, 3)))
    for i, row in enumerate(left):  # by hand: what is drawn below the rate goes, but for the largest number of a row
        best = max((j for j in range(3) if there[i, j]), key=lambda j: drawn[i, j])
        assert row.tolist() == [bool(there[i, j] and (drawn[i, j] >= 0.5 or j == best)) for j in range(3)]
    assert abs(left[there.all(axis=1)].sum(axis=1).mean() - (1.5 + 0.5**3)) < 0.05
    nothing = augmentation.modality_dropout({"a": np.zeros(4, bool)}, jax.random.key(0), rate=0.5)
    assert not nothing["a"].any()


def test_a_hidden_modality_is_absent(batch):
    config = tiny_config(augmentation__modality_dropout=0.5, data__modalities=tuple(DIMS))
    plain = tiny_config(data__modalities=tuple(DIMS))
    present = augmentation.shown(batch["present"], jax.random.key(2), 5, config, None)
    _, _, hidden = terms_of(config, batch)
    _, _, absent = terms_of(plain, {**batch, "present": present})
    assert_same_bits(hidden, absent)
    assert hidden["loss"] != loss_of(plain, batch)


def test_modality_dropout_under_vmap_is_that_of_each_key(batch):
    keys = jax.random.split(jax.random.key(0), 3)
    draw = functools.partial(augmentation.modality_dropout, batch["present"], rate=0.4)
    for i, key in enumerate(keys):
        assert_same_bits(jax.tree.map(lambda x, i=i: x[i], jax.vmap(draw)(keys)), draw(key))


@pytest.mark.parametrize("kind", ["mixup", "dropout", "modality"])
def test_the_number_of_devices_changes_nothing(batch, kind):
    def made(batch, axis_name=None):
        if kind == "mixup":
            return mixed(batch, 3, axis_name=axis_name)
        if kind == "modality":
            return shown(batch, 3, axis_name)
        config = tiny_config(augmentation__feature_dropout=0.5)
        return augmentation.factors(batch["features"], jax.random.key(3), 3, config, axis_name)

    count = len(jax.devices())
    split = jax.pmap(functools.partial(made, axis_name=parallel.AXIS), axis_name=parallel.AXIS)(
        parallel.split_rows(batch, count)
    )
    alone = made(batch)
    for m, x in parallel.merge_rows(split).items():
        np.testing.assert_allclose(x, alone[m], rtol=1e-6, atol=1e-6)


def terms_of(config, batch):
    model = model_lib.from_config(config, DIMS)
    make, _ = optimizer.from_config(config, 100)
    variables = model_lib.initial_variables(model, jax.random.key(0), None)
    state = train_state.create(variables, make, jax.random.key(1), queue_length=16, num_clusters=4)
    how = {"model": model, "config": config, "steps_per_epoch": 100, "cluster": False}
    how["statistics"] = (np.zeros(24, np.float32), np.ones(24, np.float32))
    loss_fn = jax.jit(functools.partial(objective.pretrain_loss, **how))
    return model, state, loss_fn(state.params, state, batch, jax.random.key(2))[1][0]


def loss_of(config, batch):
    return float(terms_of(config, batch)[2]["loss"])


def test_dropout_hides_inputs_from_the_networks_and_not_from_the_target(batch):
    config = tiny_config(augmentation__feature_dropout=0.5, data__modalities=tuple(DIMS))
    model, state, terms = terms_of(config, batch)
    kept = augmentation.factors(batch["features"], jax.random.key(2), 3, config, None)
    seen = {m: x * kept[m] for m, x in batch["features"].items()}
    outputs, _ = model.apply(state.variables(), seen, present=batch["present"], train=True, mutable=["batch_stats"])
    errors = [np.square(outputs.reconstructions[m] - batch["features"][m])[batch["present"][m]].mean() for m in DIMS]
    np.testing.assert_allclose(terms["loss/reconstruction"], sum(errors), rtol=1e-5)
    config.encoder_chunk_size = 5
    np.testing.assert_allclose(loss_of(config, batch), terms["loss"], rtol=1e-5)


@pytest.mark.parametrize("key", ["soft_targets", "target_neighbours"])
def test_soft_targets_are_those_of_raw_features_and_of_projections(batch, key):
    config = tiny_config(data__modalities=tuple(DIMS), **{f"loss__{key}": 3})
    model, state, terms = terms_of(config, batch)
    outputs, _ = model.apply(
        state.variables(), batch["features"], present=batch["present"], train=True, mutable=["batch_stats"]
    )
    there, weigh = (
        batch["present"]["text"],
        {"soft_targets": losses.similarity_weights}.get(key, losses.neighbour_weights),
    )
    vectors = batch["features"] if key == "soft_targets" else outputs.projections
    of_video, of_text = (np.asarray(weigh(vectors[m], 3, valid=batch["present"][m]))[:, there][there] for m in DIMS)
    video, text = (outputs.projections[m][there] for m in DIMS)
    expected = losses.soft_margin_softmax(video, text, (of_text, of_video), margin=1e-3)
    np.testing.assert_allclose(terms["loss/contrastive"], expected, rtol=1e-5)
    assert abs(terms["loss/contrastive"] - losses.masked_margin_softmax(video, text)) > 1e-3


def test_fusion_contrasts_two_passes_fused_and_each_modality(batch):
    hidden = {"augmentation__feature_dropout": 0.5, "augmentation__modality_dropout": 0.3}
    only = {f"loss__{name}_weight": 0.0 for name in ("contrastive", "clustering", "reconstruction")}
    config = tiny_config(
        data__modalities=tuple(DIMS), loss__fusion_weight=2.0, loss__fusion_temperature=0.3, **hidden, **only
    )
    model, state, terms = terms_of(config, batch)
    assert set(model.heads) == {"projection"}
    key, passes = jax.random.key(2), []
    for draw, number in ((5, 3), (7, 6)):
        present = augmentation.shown(batch["present"], key, draw, config, None)
        kept = augmentation.factors(batch["features"], key, number, config, None)
        seen = {m: x * kept[m] for m, x in batch["features"].items()}
        outputs, _ = model.apply(state.variables(), seen, present=present, train=True, mutable=["batch_stats"])
        present, p = jax.device_get((dict(present), dict(outputs.projections)))
        fused = sum(np.where(present[m][:, None], p[m], 0) for m in DIMS) / sum(present.values())[:, None]
        passes.append((p, present, fused))
    (p, of_p, z), (q, of_q, y) = passes
    nce = functools.partial(losses.info_nce, temperature=0.3)
    expected = nce(z, y)
    for m in DIMS:
        expected += (nce(p[m][of_p[m]], y[of_p[m]]) + nce(q[m][of_q[m]], z[of_q[m]])) / 2
    np.testing.assert_allclose(terms["loss/fusion"], expected, rtol=1e-5)
    np.testing.assert_allclose(terms["loss"], 2 * expected, rtol=1e-5)


def test_the_two_views_drop_different_features(batch):
    weights = {f"loss__{name}_weight": 0.0 for name in ("contrastive", "clustering", "reconstruction")}
    common = {"loss__instance_weight": 1.0, "views__mask_rate": 0.0, "views__noise": 0.0, **weights}
    config = tiny_config(data__modalities=tuple(DIMS), augmentation__feature_dropout=0.5, **common)
    dropped = loss_of(config, batch)
    config.augmentation.feature_dropout = 0.0
    same = loss_of(config, batch)  # two equal views
    assert dropped > same + 0.1


def test_mixed_rows_are_what_the_loss_sees(batch):
    config = tiny_config(augmentation__mixup=1.0, data__modalities=tuple(DIMS))
    by_hand = {**batch, "features": mixed_by(batch, jax.random.fold_in(jax.random.key(2), 2))}
    plain = tiny_config(data__modalities=tuple(DIMS))
    np.testing.assert_allclose(loss_of(config, batch), loss_of(plain, by_hand), rtol=1e-6)


def mixed_by(batch, key):
    return augmentation.mixup(batch["features"], batch["present"], key, alpha=jnp.float32(1.0))
