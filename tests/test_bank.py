"""Vectors that are handed on, and their smoothing: probes, classifiers, sweeps and embeddings see the same numbers."""

import jax
import numpy as np
import pytest

from conclugen_jax import pretrain
from conclugen_jax.data import builders, shards
from conclugen_jax.errors import ConclugenError
from conclugen_jax.evaluate import bank, downstream, embedding, probe, splits, sweep
from conclugen_jax.method import layers, neighbours
from tests.helpers import assert_same_bits, tiny_config
from tests.test_persons import Talk


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return builders.build(Talk(missing=0.3), tmp_path_factory.mktemp("data"))


def config_of(data, **changes):
    options = {"clustering__start_epoch": 0, "train__num_epochs": 2, "data__standardize": "person", **changes}
    return tiny_config(data, **options)


@pytest.fixture(scope="module")
def run(data, tmp_path_factory):
    workdir = tmp_path_factory.mktemp("run")
    smoothing = {"evaluation__vectors": "pre_activation", "evaluation__smoothing_neighbours": 5}
    pretrain.pretrain(config_of(data, **smoothing), workdir)
    return workdir


def test_vectors_are_what_their_names_say(data, run):
    model, variables, _ = probe.load(run)
    assert model.vectors == "pre_activation"
    (split,) = probe.represent_splits(run, ["test"], vectors="representation")
    features = {m: np.asarray(x) for m, x in split.features.items()}
    outputs = model.apply(variables, features)
    found = {}
    for vectors in ("representation", "pre_activation", "both", "projection", "with_raw"):
        chosen = model.clone(vectors=vectors)
        found[vectors] = jax.device_get(chosen.apply(variables, features, method="represent"))
        assert {m: x.shape[1] for m, x in found[vectors].items()} == dict(chosen.vector_dims)
    assert_same_bits(found["representation"], jax.device_get(dict(outputs.representations)))
    for m in features:
        np.testing.assert_allclose(found["projection"][m], outputs.projections[m], atol=1e-6)
        np.testing.assert_array_equal(found["with_raw"][m][:, :32], found["representation"][m])
        np.testing.assert_array_equal(found["with_raw"][m][:, 32:], outputs.inputs[m])
        np.testing.assert_array_equal(found["both"][m][:, :32], found["pre_activation"][m])
        np.testing.assert_array_equal(found["both"][m][:, 32:], layers.relu(found["pre_activation"][m]))
        before, after = found["pre_activation"][m], found["representation"][m]
        relued = m not in model.bottleneck
        np.testing.assert_array_equal(after, np.asarray(layers.relu(before)) if relued else before)
        assert (before < 0).any()


def test_a_bank_standardises_and_smooths():
    generator = np.random.default_rng(0)
    train, test = (generator.normal(3, 2, size=(n, 6)).astype(np.float32) for n in (40, 9))
    train[:, 2] = 7  # a constant
    section = tiny_config(evaluation__smoothing_neighbours=4, evaluation__smoothing_share=0.3).evaluation
    scale = np.where(np.arange(6) == 2, 1, train.std(axis=0))
    a, b = ((x - train.mean(axis=0)) / scale for x in (train, test))
    smooth = neighbours.smooth_with_neighbours
    smoothed = bank.pair(train, test, section)
    np.testing.assert_allclose(smoothed[0], smooth(a, a, 4, 0.3, own=np.arange(40)), atol=1e-5)
    np.testing.assert_allclose(smoothed[1], smooth(b, a, 4, 0.3), atol=1e-5)
    section.transductive = True
    both = np.concatenate([a, b])
    own = 40 + np.arange(9)
    np.testing.assert_allclose(bank.pair(train, test, section)[1], smooth(b, both, 4, 0.3, own=own), atol=1e-5)
    section.smoothing_neighbours = 0
    assert bank.pair(train, test, section)[0] is train


def test_probes_smooth_every_kind_of_vectors(run):
    report = probe.label_efficiency_of_run(run, labels_per_class=[2, 0], num_draws=2)
    assert "each averaged with its 5 nearest training rows at a weight of 0.5" in report.protocol
    (train, test), section = probe.represent_splits(run, ("train", "test")), tiny_config().evaluation
    section.smoothing_neighbours = 5
    by_hand = {
        "raw": bank.pair(train.fused(raw=True), test.fused(raw=True), section),
        "pretrained": bank.pair(train.fused(), test.fused(), section),
    }
    options = {"labels_per_class": [2, 0], "num_draws": 2}
    expected = probe.label_efficiency(by_hand, train.label, test.label, **options)
    found = [r for r in report.results if r.name == "raw features" or r.name.endswith("pretrained")]
    assert [r.accuracy for r in found] == [r.accuracy for r in expected]
    plain = probe.label_efficiency_of_run(run, evaluation={"smoothing_neighbours": 0}, **options)
    assert "averaged" not in plain.protocol
    assert [r.accuracy for r in plain.results] != [r.accuracy for r in report.results]
    with pytest.raises(ConclugenError, match=r"config.evaluation.vectors is 'last'"):
        probe.label_efficiency_of_run(run, evaluation={"vectors": "last"}, **options)


@pytest.mark.parametrize("folds", [0, 3])
@pytest.mark.parametrize("protocol", ["linear_evaluation", "raw_features"])
def test_classifiers_and_their_predictions_see_the_same_vectors(data, run, tmp_path, protocol, folds):
    changes = {"downstream__checkpoint": str(run)} if protocol == "linear_evaluation" else {}
    changes |= {"evaluation__smoothing_neighbours": 5, "downstream__num_folds": folds, "downstream__fold_by": "example"}
    changes |= {"downstream__fold": 1 if folds else -1}
    config = config_of(
        data, downstream__protocol=protocol, train__num_epochs=4, optimizer__learning_rate=0.03, **changes
    )
    result = downstream.downstream(config, tmp_path)
    network = embedding.load(tmp_path)
    rows = list(embedding.embed(network, shards.open_dataset(data), "train" if folds else "test", fusion="concat"))
    labels, found = (np.concatenate([x[key] for x in rows]) for key in ("label", "prediction"))
    if folds:
        streams = splits.open_streams(config, shards.open_dataset(data), ["video", "audio", "text"])
        tested = splits.load(config, streams)[0]["test"].members
        labels, found = labels[tested], found[tested]
    matrix = np.zeros((4, 4), int)
    np.add.at(matrix, (labels, found), 1)
    np.testing.assert_array_equal(matrix, result["test"]["confusion_matrix"])
    config.evaluation.smoothing_neighbours = 0
    if protocol == "raw_features":
        plain = downstream.downstream(config, tmp_path / "plain")
        assert plain["test"]["loss"] != result["test"]["loss"]


def test_a_sweep_sees_what_one_run_does(data, run, tmp_path):
    config = config_of(data, downstream__protocol="linear_evaluation", downstream__checkpoint=str(run))
    one = downstream.downstream(config, tmp_path / "one")
    grid = sweep.sweep(config, tmp_path / "grid")
    np.testing.assert_allclose(grid["selected"][0]["test"]["loss"], one["test"]["loss"], rtol=1e-4)


def test_embeddings_are_smoothed_without_the_row_itself(data, run):
    network, dataset = embedding.load(run), shards.open_dataset(data)
    assert network.evaluation.smoothing_neighbours == 5
    train, test = probe.represent_splits(run, ("train", "test"))
    expected = bank.pair(train.fused(), test.fused(), network.evaluation)
    for split, vectors in zip(("train", "test"), expected, strict=True):
        rows = list(embedding.embed(network, dataset, split, fusion="concat", batch_size=10))
        np.testing.assert_allclose(np.concatenate([x["fused"] for x in rows]), vectors, atol=2e-5)
    section = network.evaluation.copy_and_resolve_references()
    section.transductive = True
    rows = list(embedding.embed(network._replace(evaluation=section), dataset, "test", fusion="concat", batch_size=10))
    vectors = bank.pair(train.fused(), test.fused(), section)[1]
    np.testing.assert_allclose(np.concatenate([x["fused"] for x in rows]), vectors, atol=2e-5)
    plain = network._replace(evaluation=tiny_config().evaluation)
    rows = list(embedding.embed(plain, dataset, "test", fusion="concat"))
    np.testing.assert_allclose(np.concatenate([x["fused"] for x in rows]), test.fused(), atol=1e-5)


def test_projections_without_a_head_are_refused(data, tmp_path):
    weights = {f"loss__{name}_weight": 0.0 for name in ("contrastive", "clustering")}
    with pytest.raises(ConclugenError, match="no loss of this run trains a projection; choose others"):
        pretrain.pretrain(config_of(data, evaluation__vectors="projection", **weights), tmp_path / "run")
    assert not (tmp_path / "run").exists()
