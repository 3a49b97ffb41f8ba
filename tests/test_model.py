"""The networks: parameter paths, BatchNorm, heads by choice, and refusal of unknown features."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn

from conclugen_jax.method import layers, model as model_lib
from conclugen_jax.method.layers import BatchNorm
from conclugen_jax.method.model import Classifier, ConCluGen
from conclugen_jax.train import parallel
from tests.helpers import flat, tiny_config

DIMS = {"video": 6, "audio": 5, "text": 4}


def small(**changes):
    arguments = {"representation_dim": 16, "projection_dim": 8, "num_clusters": 3, "reconstruction_dim": 7}
    return ConCluGen(**{"feature_dims": DIMS, "bottleneck": ("audio",), **arguments, **changes})


def features(n=10, seed=0):
    rng = np.random.default_rng(seed)
    return {m: rng.normal(size=(n, d)).astype(np.float32) for m, d in DIMS.items()}


def shapes(model):
    variables = jax.eval_shape(lambda: model.init(jax.random.key(0), features(), train=True))
    return {p: x.shape for p, x in flat_shapes(variables["params"]).items()}


def flat_shapes(tree):
    return {
        jax.tree_util.keystr(k, simple=True, separator="/"): x for k, x in jax.tree_util.tree_leaves_with_path(tree)
    }


def test_parameter_paths_are_the_documented_ones():
    found = shapes(small())
    expected = {
        f"representation/{m}/{layer}/{kind}"
        for m in DIMS
        for layer in ("fc1", "gate", "fc2", *(["expand"] if m == "audio" else []))
        for kind in ("kernel", "bias")
    }
    expected |= {f"projection/{layer}/{kind}" for layer in ("fc1", "fc2") for kind in ("kernel", "bias")}
    expected |= {"projection/norm/scale", "projection/norm/bias", "clustering/kernel"}
    expected |= {f"decoder/{m}/{layer}/{kind}" for m in DIMS for layer in ("fc1", "fc2") for kind in ("kernel", "bias")}
    assert set(found) == expected
    assert found["representation/audio/gate/kernel"] == (5, 5)
    assert found["representation/audio/expand/kernel"] == (5, 16)
    assert found["projection/fc1/kernel"] == (16, 2)


def test_separate_projections_have_paths_by_modality():
    found = {p for p in shapes(small(projection_sharing="separate")) if p.startswith("projection/")}
    assert {p.split("/")[1] for p in found} == set(DIMS)
    assert "projection/text/norm/scale" in found


def test_separate_projections_are_applied_to_their_own_modality():
    model = small(projection_sharing="separate")
    x = features()
    variables = model.init(jax.random.key(0), x, train=True)
    before, _ = model.apply(variables, x, train=True, mutable=["batch_stats"])
    variables["params"]["projection"]["text"]["fc2"]["bias"] += 1.0
    after, _ = model.apply(variables, x, train=True, mutable=["batch_stats"])
    for m in DIMS:
        assert np.array_equal(before.projections[m], after.projections[m]) == (m != "text")


def test_a_linear_representation_head_is_one_product():
    model, x = small(representation_head="linear"), features()
    variables = model.init(jax.random.key(0), x, train=True)
    found = {path: v.shape for path, v in flat_shapes(variables["params"]["representation"]).items()}
    assert found == {f"{m}/fc1/{k}": s for m, d in DIMS.items() for k, s in (("kernel", (d, 16)), ("bias", (16,)))}
    for m, layer in variables["params"]["representation"].items():
        by_hand = x[m] @ np.asarray(layer["fc1"]["kernel"]) + np.asarray(layer["fc1"]["bias"])
        for vectors in ("representation", "pre_activation"):
            chosen = model.clone(vectors=vectors)
            found = chosen.apply(variables, {m: x[m]}, method="represent")[m]
            np.testing.assert_allclose(found, by_hand, rtol=1e-5, atol=1e-6)
    config = tiny_config(model__representation_head="linear")
    assert model_lib.from_config(config, DIMS).representation_head == "linear"


def test_last_relus_are_by_choice():
    x = features()
    for projection_relu, decoder_relu in [(True, False), (False, True)]:
        model = small(projection_relu=projection_relu, decoder_relu=decoder_relu)
        outputs, _ = model.init_with_output(jax.random.key(0), x, train=True)
        assert (min(p.min() for p in outputs.projections.values()) >= 0) == projection_relu
        assert (min(r.min() for r in outputs.reconstructions.values()) >= 0) == decoder_relu


def test_projections_are_unit_rows_and_logits_use_the_unnormalised_ones():
    model = small(projection_relu=False)
    x = features()
    variables = model.init(jax.random.key(0), x, train=True)
    outputs, _ = model.apply(variables, x, train=True, mutable=["batch_stats"])
    for m, p in outputs.projections.items():
        np.testing.assert_allclose(jnp.linalg.norm(p, axis=1), 1, rtol=1e-5)
        from_units = p @ variables["params"]["clustering"]["kernel"]
        ratio = outputs.cluster_logits[m] / from_units
        np.testing.assert_allclose(ratio, jnp.broadcast_to(ratio[:, :1], ratio.shape), rtol=1e-3)
        assert np.ptp(np.asarray(ratio[:, 0])) > 1e-3


def test_heads_without_loss_do_not_exist():
    config = tiny_config(loss__clustering_weight=0.0, loss__reconstruction_weight=0.0)
    found = shapes(model_lib.from_config(config, DIMS))
    assert {p.split("/")[0] for p in found} == {"representation", "projection"}
    config = tiny_config(loss__clustering_weight=0.0, loss__contrastive_weight=0.0)
    found = shapes(model_lib.from_config(config, DIMS))
    assert {p.split("/")[0] for p in found} == {"representation", "decoder"}


def test_initial_weights_are_uniform_within_one_over_root_of_inputs():
    model = small(representation_dim=512, feature_dims={"video": 400}, bottleneck=())
    variables = model.init(jax.random.key(0), {"video": jnp.zeros((2, 400))}, train=True)
    layer = variables["params"]["representation"]["video"]["fc1"]
    for x in (layer["kernel"], layer["bias"]):
        assert 0.95 / 20 < np.abs(x).max() <= 1 / 20
        assert np.std(x) == pytest.approx(1 / 20 / np.sqrt(3), rel=0.1)


def test_batch_norm_equals_the_one_of_flax_when_all_rows_are_valid():
    x = np.random.default_rng(0).normal(2, 3, size=(12, 5)).astype(np.float32)
    ours, theirs = (
        BatchNorm(0.9, 1e-5, None),
        nn.BatchNorm(use_running_average=False, momentum=0.9, epsilon=1e-5),
    )
    variables = ours.init(jax.random.key(0), x, None, True)
    variables["params"]["scale"] += 0.5
    y, updates = ours.apply(variables, x, None, True, mutable=["batch_stats"])
    expected, expected_updates = theirs.apply(variables, x, mutable=["batch_stats"])
    np.testing.assert_allclose(y, expected, rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(updates["batch_stats"]["mean"], expected_updates["batch_stats"]["mean"], rtol=1e-5)
    # PyTorch's running variance is the unbiased one: n / (n - 1) times the batch's.
    np.testing.assert_allclose(updates["batch_stats"]["var"], 0.9 + 0.1 * x.var(axis=0, ddof=1), rtol=1e-5)
    still = ours.apply({**variables, **updates}, x, None, False)
    stats = jax.tree.map(np.asarray, updates["batch_stats"])
    np.testing.assert_allclose(still, (x - stats["mean"]) / np.sqrt(stats["var"] + 1e-5) * 1.5, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("num_devices", [1, 4])
def test_batch_norm_ignores_absent_rows_wherever_they_lie(num_devices):
    rng = np.random.default_rng(1)
    x = rng.normal(size=(16, 3)).astype(np.float32)
    valid = np.ones(16, bool)
    valid[:6] = False  # the first of four devices has no valid row
    norm = BatchNorm(0.9, 1e-5, parallel.AXIS)
    alone = BatchNorm(0.9, 1e-5, None)
    variables = alone.init(jax.random.key(0), x, None, True)
    expected, expected_updates = alone.apply(variables, x[valid], None, True, mutable=["batch_stats"])
    y, updates = jax.pmap(
        lambda x, v: norm.apply(variables, x, v, True, mutable=["batch_stats"]),
        axis_name=parallel.AXIS,
        devices=jax.devices()[:num_devices],
    )(*parallel.split_rows((x, valid), num_devices))
    np.testing.assert_allclose(np.asarray(y).reshape(16, 3)[valid], expected, rtol=1e-5, atol=1e-6)
    for name, value in expected_updates["batch_stats"].items():
        np.testing.assert_allclose(updates["batch_stats"][name], np.tile(value, (num_devices, 1)), rtol=1e-5, atol=1e-7)


def test_batch_norm_without_any_valid_row_keeps_its_averages():
    norm = BatchNorm(0.9, 1e-5, None)
    x = jnp.ones((4, 3))
    variables = norm.init(jax.random.key(0), x, None, True)
    y, updates = norm.apply(variables, x, jnp.zeros(4, bool), True, mutable=["batch_stats"])
    assert np.isfinite(y).all()
    np.testing.assert_array_equal(updates["batch_stats"]["mean"], variables["batch_stats"]["mean"])
    np.testing.assert_array_equal(updates["batch_stats"]["var"], variables["batch_stats"]["var"])


def test_standardisation_is_part_of_the_model():
    model = small(standardize=True)
    x = features()
    variables = model.init(jax.random.key(0), x, train=True)
    variables["feature_stats"] = {m: {"mean": v.mean(0), "scale": v.std(0)} for m, v in x.items()}
    by_hand = {m: (v - v.mean(0)) / v.std(0) for m, v in x.items()}
    plain = small()
    rest = {k: v for k, v in variables.items() if k != "feature_stats"}
    for m, r in model.apply(variables, x, method="represent").items():
        np.testing.assert_allclose(r, plain.apply(rest, by_hand, method="represent")[m], rtol=1e-4, atol=1e-5)
    outputs, _ = model.apply(variables, x, train=True, mutable=["batch_stats"])
    np.testing.assert_allclose(outputs.inputs["text"], by_hand["text"], rtol=1e-5, atol=1e-5)


def test_represent_takes_any_of_the_modalities():
    model = small()
    x = features()
    variables = model.init(jax.random.key(0), x, train=True)
    everything = model.apply(variables, x, method="represent")
    text = model.apply(variables, {"text": x["text"]}, method="represent")
    assert list(text) == ["text"]
    np.testing.assert_allclose(text["text"], everything["text"], rtol=1e-6)


@pytest.mark.parametrize("bad", [{"smell": np.zeros((3, 4))}, {"text": np.zeros((3, 5))}, {"text": np.zeros(4)}])
def test_unknown_or_misshapen_features_are_refused(bad):
    model = small()
    variables = model.init(jax.random.key(0), features(), train=True)
    with pytest.raises(ValueError, match=next(iter(bad))):
        model.apply(variables, bad, method="represent")


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_relu_is_that_of_jax_and_keeps_its_result_only(dtype):
    x = jnp.asarray([-2.0, -0.0, 0.0, 1e-30, 3.0, jnp.inf, -jnp.inf, jnp.nan], dtype)
    gradient = jnp.arange(1, 9, dtype=dtype)
    (ours, back), (theirs, their_back) = jax.vjp(layers.relu, x), jax.vjp(jax.nn.relu, x)
    np.testing.assert_array_equal(ours.astype(jnp.float32), theirs.astype(jnp.float32))
    np.testing.assert_array_equal(*(b(gradient)[0].astype(jnp.float32) for b in (back, their_back)))
    kept = jax.tree.leaves(back)
    assert [k.shape for k in kept] == [(8,)]
    np.testing.assert_array_equal(kept[0].astype(jnp.float32), ours.astype(jnp.float32))


def test_bfloat16_keeps_parameters_statistics_and_outputs_of_losses_in_float32():
    model = small(dtype=jnp.bfloat16)
    x = features()
    variables = model.init(jax.random.key(0), x, train=True)
    assert {str(v.dtype) for v in flat(variables).values()} == {"float32"}
    outputs, updates = model.apply(variables, x, train=True, mutable=["batch_stats"])
    assert outputs.representations["video"].dtype == jnp.bfloat16
    assert outputs.projections["video"].dtype == outputs.cluster_logits["video"].dtype == jnp.float32
    assert {str(v.dtype) for v in flat(updates).values()} == {"float32"}
    full, _ = small().apply(variables, x, train=True, mutable=["batch_stats"])
    np.testing.assert_allclose(
        outputs.representations["video"].astype(jnp.float32), full.representations["video"], atol=0.05
    )


def test_classifier_concatenates_present_representations_and_drops_units():
    x = {"b": jnp.ones((4, 3)), "a": 2 * jnp.ones((4, 2))}
    present = {"a": jnp.array([True, True, False, True]), "b": jnp.ones(4, bool)}
    classifier = Classifier(num_outputs=2, dropout_rate=0.5)
    variables = classifier.init(jax.random.key(0), x, present=present)
    kernel, bias = variables["params"]["linear"]["kernel"], variables["params"]["linear"]["bias"]
    joined = np.array([[2, 2, 1, 1, 1]] * 4, np.float32)
    joined[2, :2] = 0
    np.testing.assert_allclose(
        classifier.apply(variables, x, present=present), joined @ kernel + bias[None, :], rtol=1e-5
    )
    dropped = classifier.apply(variables, x, present=present, dropout_key=jax.random.key(1))
    kept = np.asarray(jax.random.bernoulli(jax.random.key(1), 0.5, (4, 5)))
    np.testing.assert_allclose(dropped, (2 * joined * kept) @ kernel + bias[None, :], rtol=1e-5, atol=1e-6)


def test_dropout_does_not_depend_on_the_number_of_devices():
    x = {"a": np.random.default_rng(0).normal(size=(8, 5)).astype(np.float32)}
    present = {"a": np.ones(8, bool)}
    alone = Classifier(num_outputs=2, dropout_rate=0.5)
    variables = alone.init(jax.random.key(0), x, present=present)
    expected = alone.apply(variables, x, present=present, dropout_key=jax.random.key(1))
    shared = Classifier(num_outputs=2, dropout_rate=0.5, axis_name=parallel.AXIS)
    y = jax.pmap(
        lambda x, p: shared.apply(variables, x, present=p, dropout_key=jax.random.key(1)),
        axis_name=parallel.AXIS,
    )(*parallel.split_rows((x, present), 8))
    np.testing.assert_allclose(np.asarray(y).reshape(8, 2), expected, rtol=1e-5, atol=1e-6)
