"""Downstream runs and probes: what is trained and what stays, scores of whole splits, and what does not fit."""

import json
import shutil

import jax
import numpy as np
import pytest

from conclugen_jax import checkpoint, downstream, pretrain, probe
from conclugen_jax import model as model_lib
from conclugen_jax.data import batches, builders, shards
from conclugen_jax.errors import ConclugenError
from tests.helpers import Faces, assert_same_bits, tiny_config

DEVICES = jax.devices()[:2]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("downstream")


@pytest.fixture(scope="module")
def data(folder):
    # 23 test examples: not a multiple of any batch. Some lack text.
    return builders.build(Faces((64, 24, 23), missing=0.3), folder / "data")


@pytest.fixture(scope="module")
def pretrained(folder, data):
    config = tiny_config(data, train__num_epochs=3, data__standardize=True)
    pretrain.pretrain(config, folder / "pretrained", devices=DEVICES)
    return folder / "pretrained"


def settings(data, pretrained, **changes):
    return tiny_config(
        data,
        **{
            "downstream__checkpoint": str(pretrained),
            "train__num_epochs": 12,
            "optimizer__learning_rate": 1e-2,
            "data__standardize": True,
            **changes,
        },
    )


@pytest.fixture(scope="module")
def linear(folder, data, pretrained):
    config = settings(data, pretrained)
    return downstream.downstream(config, folder / "linear", devices=DEVICES), folder / "linear", config


def test_linear_evaluation_learns_and_says_where_it_comes_from(linear, pretrained):
    result, workdir, _ = linear
    assert result["test"]["accuracy"] > 0.5  # four classes
    assert result["encoder"]["workdir"] == str(pretrained)
    assert result["modalities"] == ["video", "audio", "text"]
    assert result["classes"] == ["calm", "happy", "sad", "angry"]
    assert json.loads((workdir / "result.json").read_text()) == result


def test_every_example_of_a_split_is_scored_once(linear):
    result, _, _ = linear
    assert np.sum(result["test"]["confusion_matrix"]) == 23
    assert np.sum(result["validation"]["confusion_matrix"]) == 24
    assert sum(c["support"] for c in result["test"]["per_class"].values()) == 23


def test_best_epoch_is_the_first_of_best_validation_accuracy(linear):
    result, workdir, _ = linear
    records = [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]
    accuracy = [r["validation/accuracy"] for r in records if "validation/accuracy" in r]
    assert len(accuracy) == 12
    assert result["best_epoch"] == int(np.argmax(accuracy))
    assert result["validation"]["accuracy"] == max(accuracy)


def test_scores_are_those_of_the_saved_classifier(linear, data, pretrained):
    result, workdir, config = linear
    model, variables, _ = probe.load(pretrained)
    with checkpoint.Checkpoints(workdir, read_only=True) as saved:
        tree, _ = saved.restore_tree(saved.find("newest"))
    table = batches.open_split(shards.open_dataset(data), "test", config.data.modalities, tier="host").table
    representations = probe.represent(model, variables, table["features"])
    classifier = model_lib.Classifier(num_outputs=4, dropout_rate=0.5)
    logits = classifier.apply({"params": tree["params"]["classifier"]}, representations, present=table["present"])
    predictions = np.asarray(logits).argmax(axis=1)
    assert (predictions == table["label"]).mean() == pytest.approx(result["test"]["accuracy"])
    assert set(tree["params"]) == {"classifier"}


def test_finished_run_is_returned_without_training(linear):
    result, workdir, config = linear
    before = (workdir / "metrics.jsonl").stat().st_mtime_ns
    assert downstream.downstream(config, workdir, devices=DEVICES) == result
    assert (workdir / "metrics.jsonl").stat().st_mtime_ns == before


def test_result_of_other_weights_is_not_passed_off(linear, pretrained, tmp_path):
    result, workdir, config = linear
    assert result["encoder"]["step"] == 12
    run, done = shutil.copytree(pretrained, tmp_path / "run"), shutil.copytree(workdir, tmp_path / "done")
    shutil.rmtree(run / "checkpoints" / "12")  # as if pretraining had not come so far yet
    config = config.copy_and_resolve_references()
    config.downstream.checkpoint = str(run)
    for name in ("config.json", "result.json"):
        (done / name).write_text((done / name).read_text().replace(str(pretrained), str(run)))
    with pytest.raises(ConclugenError, match=r"result\.json: made with other weights \(step 12 .* now step 8\)"):
        downstream.downstream(config, done, devices=DEVICES)


def test_supervised_trains_the_encoder_too(folder, data):
    config = settings(data, "", downstream__protocol="supervised", train__num_epochs=3)
    result = downstream.downstream(config, folder / "supervised", devices=DEVICES)
    assert result["encoder"]["workdir"] is None
    with checkpoint.Checkpoints(folder / "supervised", read_only=True) as saved:
        tree, _ = saved.restore_tree(saved.find("newest"))
    model = model_lib.from_config(config, {"video": 24, "audio": 16, "text": 12}).clone(heads=())
    key, _ = jax.random.split(jax.random.key(config.seed))
    fresh = model_lib.initial_variables(model, key, shards.open_dataset(data).manifest)
    moved = jax.tree.map(
        lambda a, b: bool(np.any(np.asarray(a) != b)),
        fresh["params"]["representation"],
        tree["params"]["representation"],
    )
    assert all(jax.tree.leaves(moved))
    assert_same_bits(jax.tree.map(np.asarray, fresh["feature_stats"]), tree["feature_stats"])


def test_frozen_parameters_stay_bit_for_bit(monkeypatch, folder, data, pretrained):
    # The encoder is put among the parameters of a run that trains the classifier only.
    monkeypatch.setitem(downstream.TRAINABLE, "supervised", ("classifier/.*", "representation/text/.*"))
    config = settings(data, "", downstream__protocol="supervised", train__num_epochs=1)
    trainable = downstream.TRAINABLE["supervised"]
    optimizer, schedule = downstream.optimizer_lib.from_config(config, 4, trainable)
    manifest = shards.open_dataset(data).manifest
    encoder = downstream._encoder(config, manifest)
    task = downstream._task(config, manifest, encoder.model, encode=True)
    state = downstream._fresh_state(config, task, encoder, optimizer)
    rows = batches.open_split(shards.open_dataset(data), "train", config.data.modalities, tier="host").rows(
        np.arange(16)
    )
    task = task._replace(classifier=task.classifier.clone(axis_name=None))
    after, _ = jax.jit(
        lambda s, b: downstream.downstream_step(s, b, task=task, optimizer=optimizer, schedule=schedule)
    )(state, rows)
    for m in ("video", "audio"):
        assert_same_bits(after.params["representation"][m], state.params["representation"][m])
    for part in (after.params["representation"]["text"], after.params["classifier"]):
        before = state.params["classifier"] if "linear" in part else state.params["representation"]["text"]
        assert all(jax.tree.leaves(jax.tree.map(lambda a, b: bool(np.any(np.asarray(a != b))), part, before)))


def test_dropout_differs_from_step_to_step(data, pretrained):
    config = settings(data, pretrained)
    optimizer, schedule = downstream.optimizer_lib.from_config(config, 4, ("nothing",))
    manifest = shards.open_dataset(data).manifest
    encoder = downstream._encoder(config, manifest)
    task = downstream._task(config, manifest, encoder.model, encode=False)
    task = task._replace(classifier=task.classifier.clone(axis_name=None))
    state = downstream._fresh_state(config, task, encoder, optimizer)
    x = {m: np.random.default_rng(0).normal(size=(16, 32)).astype(np.float32) for m in encoder.modalities}
    batch = {"features": x, "present": {m: np.ones(16, bool) for m in x}, "label": np.arange(16) % 4}
    step = jax.jit(lambda s: downstream.downstream_step(s, batch, task=task, optimizer=optimizer, schedule=schedule))
    first, metrics = step(state)
    _, later = step(first)
    assert metrics["loss"] == step(state)[1]["loss"] != later["loss"]


def test_number_of_devices_changes_nothing_but_rounding(folder, linear):
    result, _, config = linear
    alone = downstream.downstream(config, folder / "alone", devices=jax.devices()[:1])
    assert alone["best_epoch"] == result["best_epoch"]
    assert alone["test"]["confusion_matrix"] == result["test"]["confusion_matrix"]


def test_a_subset_of_modalities_by_choice(folder, data, pretrained):
    config = settings(data, pretrained, downstream__modalities=("video",), train__num_epochs=2)
    result = downstream.downstream(config, folder / "vision", devices=DEVICES)
    assert result["modalities"] == ["video"]
    with checkpoint.Checkpoints(folder / "vision", read_only=True) as saved:
        tree, _ = saved.restore_tree(saved.find("newest"))
    assert tree["params"]["classifier"]["linear"]["kernel"].shape == (32, 4)


def test_multi_label(folder, pretrained):
    data = builders.build(Faces((64, 24, 23), kind="multi", name="multi"), folder / "multi_data")
    config = settings(data, pretrained, downstream__class_weights="none", train__num_epochs=40)
    result = downstream.downstream(config, folder / "multi", devices=DEVICES)
    assert np.shape(result["test"]["confusion_matrix"]) == (4, 2, 2)
    assert np.sum(result["test"]["confusion_matrix"]) == 4 * 23
    assert result["test"]["f1"] > 0.5


def test_class_weights_by_hand(data):
    config = tiny_config(data)
    manifest = shards.open_dataset(data).manifest
    counts = np.array([10, 0, 5, 1])
    manifest.splits["train"].update(label_counts=counts.tolist(), num_examples=16)
    np.testing.assert_allclose(downstream.class_weights(config, manifest), [16 / 40, 0, 16 / 20, 16 / 4])
    object.__setattr__(manifest, "label", manifest.label.__class__("multi", manifest.label.names))
    np.testing.assert_allclose(downstream.class_weights(config, manifest), [6 / 10, 1, 11 / 5, 15])
    config.downstream.class_weights = "none"
    np.testing.assert_array_equal(downstream.class_weights(config, manifest), np.ones(4))


def test_what_does_not_fit_is_refused(folder, data, pretrained):
    class Wide(Faces):
        def __init__(self):
            super().__init__((20, 8, 8), name="wide")
            object.__setattr__(self.spec, "modalities", {"video": 24, "audio": 20, "text": 12})

        def examples(self, split):
            for e in super().examples(split):
                e.features["audio"] = np.zeros(20)
                yield e

    wide = builders.build(Wide(), folder / "wide")
    unlabelled = builders.build(Faces(kind="none", name="unlabelled"), folder / "unlabelled")
    cases = [
        (settings(wide, pretrained), r"20 features of modality 'audio'.*trained on 16"),
        (settings(unlabelled, pretrained), "no labels"),
        (settings(data, pretrained, train__batch_size=4096), "only 64 usable examples"),
        (settings(data, ""), r"downstream\.checkpoint is empty"),
        (settings(data, folder / "nothing"), "nothing: no checkpoint here"),
        (settings(data, pretrained, downstream__checkpoint_step="7"), r"no checkpoint '7'"),
        (settings(data, pretrained, downstream__modalities=("smell",)), "no modality 'smell'"),
        (settings(data, pretrained, data__test_split="exam"), "no split 'exam'"),
    ]
    for i, (config, message) in enumerate(cases):
        with pytest.raises(ConclugenError, match=message):
            downstream.downstream(config, folder / f"refused{i}", devices=DEVICES)
        assert not (folder / f"refused{i}").exists(), "a refused run must not occupy its workdir"


def test_load_gives_what_training_left(pretrained):
    model, variables, config = probe.load(pretrained)
    with checkpoint.Checkpoints(pretrained, read_only=True) as saved:
        tree, _ = saved.restore_tree(saved.find("newest"))
    assert_same_bits(variables["params"], tree["params"])
    assert config.model.representation_dim == model.representation_dim == 32
    x = {m: np.random.default_rng(0).normal(size=(5, d)) for m, d in model.feature_dims.items()}
    whole = probe.represent(model, variables, x)
    chunks = probe.represent(model, variables, x, batch_size=2)
    assert {m: r.shape for m, r in whole.items()} == dict.fromkeys(model.feature_dims, (5, 32))
    for m in whole:
        np.testing.assert_allclose(chunks[m], whole[m], rtol=1e-5, atol=1e-6)


def test_load_refuses_a_configuration_of_other_sizes(pretrained, tmp_path):
    run = shutil.copytree(pretrained, tmp_path / "run")
    text = (run / "config.json").read_text()
    (run / "config.json").write_text(text.replace('"representation_dim": 32', '"representation_dim": 64'))
    with pytest.raises(ConclugenError, match=r"does not fit the model: .*float32.*, expected float32"):
        probe.load(run)


def test_untrained_network_is_the_one_before_the_first_step(folder, data):
    config = tiny_config(
        data, train__num_epochs=1, clustering__start_epoch=0, optimizer__learning_rate=0.0, optimizer__weight_decay=0.0
    )
    config.schedule.minimum = 0.0
    state = pretrain.pretrain(config, folder / "still", devices=DEVICES)
    _, variables = probe.untrained(config, folder / "still")
    assert_same_bits(variables["params"], state.params)


def test_label_efficiency_uses_the_same_labels_for_all_and_fits_all_labels_once():
    rng = np.random.default_rng(0)
    labels = np.repeat(np.arange(3), 30)
    centers = rng.normal(size=(3, 5)) * 3
    train, test = (centers[labels] + rng.normal(size=(90, 5)) for _ in range(2))
    vectors = {"good": (train, test), "same": (train, test), "noise": (rng.normal(size=(90, 5)),) * 2}
    results = {
        (r.name, r.num_labels): r.accuracy
        for r in probe.label_efficiency(vectors, labels, labels, labels_per_class=(2, 10, 0), num_draws=4)
    }
    assert results["good", 2] == results["same", 2]
    assert len(set(results["good", 2])) > 1
    assert len(results["good", 0]) == 4
    assert len(set(results["good", 0])) == 1
    assert np.mean(results["good", 10]) > np.mean(results["good", 2]) - 0.05
    assert np.mean(results["noise", 2]) < 0.6 < np.mean(results["good", 2])
    with pytest.raises(ConclugenError, match="class 0 has 30 labelled examples, 31"):
        probe.label_efficiency(vectors, labels, labels, labels_per_class=(31,))


def test_drawn_labels_are_as_many_of_each_class():
    labels = np.array([0, 1, 2] * 10)
    rows = probe.draw_labels(labels, 4, seed=0)
    assert np.bincount(labels[rows]).tolist() == [4, 4, 4]
    assert len(set(rows.tolist())) == 12
    assert not np.array_equal(rows, probe.draw_labels(labels, 4, seed=1))
    np.testing.assert_array_equal(probe.draw_labels(labels, 0, seed=0), np.arange(30))
