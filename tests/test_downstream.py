"""Downstream runs and probes: what is trained and what stays, scores of whole splits, and what does not fit."""

import dataclasses
import json
import shutil

import jax
import numpy as np
import pytest

from conclugen_jax import pretrain
from conclugen_jax.data import batches, builders, persons, shards
from conclugen_jax.data.sources import LabelSpec
from conclugen_jax.errors import ConclugenError
from conclugen_jax.evaluate import downstream, probe, task, weights
from conclugen_jax.method import model as model_lib
from conclugen_jax.runs import checkpoint
from conclugen_jax.train import optimizer
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
    config = tiny_config(data, train__num_epochs=3, data__standardize="split")
    pretrain.pretrain(config, folder / "pretrained", devices=DEVICES)
    return folder / "pretrained"


def settings(data, pretrained, **changes):
    return tiny_config(
        data,
        **{
            "downstream__checkpoint": str(pretrained),
            "train__num_epochs": 12,
            "optimizer__learning_rate": 1e-2,
            "data__standardize": "split",
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
    table = batches.load(
        shards.ShardStream(shards.open_dataset(data), "test", config.data.modalities), tier="host"
    ).table
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
    fresh = model_lib.initial_variables(model, key, persons.feature_stats(shards.open_dataset(data).manifest, None))
    moved = jax.tree.map(
        lambda a, b: bool(np.any(np.asarray(a) != b)),
        fresh["params"]["representation"],
        tree["params"]["representation"],
    )
    assert all(jax.tree.leaves(moved))
    assert_same_bits(jax.tree.map(np.asarray, fresh["feature_stats"]), tree["feature_stats"])


def test_frozen_parameters_stay_bit_for_bit(data):
    # The encoder is put among the parameters of a run that trains the classifier only.
    config = settings(data, "", downstream__protocol="supervised", train__num_epochs=1)
    trainable = ("classifier/.*", "representation/text/.*")
    adamw, schedule = optimizer.from_config(config, 4, trainable=trainable)
    manifest = shards.open_dataset(data).manifest
    encoder = weights.encoder(config, manifest)
    made = task.create(config, manifest.label, encoder=encoder.model)
    state = downstream.fresh_state(config.seed, made, encoder.dims, adamw, encoder.variables)
    rows = batches.load(
        shards.ShardStream(shards.open_dataset(data), "train", config.data.modalities), tier="host"
    ).rows(np.arange(16))
    after, _ = jax.jit(lambda s, b: downstream.downstream_step(s, b, task=made, optimizer=adamw, schedule=schedule))(
        state, rows
    )
    for m in ("video", "audio"):
        assert_same_bits(after.params["representation"][m], state.params["representation"][m])
    for part in (after.params["representation"]["text"], after.params["classifier"]):
        before = state.params["classifier"] if "linear" in part else state.params["representation"]["text"]
        assert all(jax.tree.leaves(jax.tree.map(lambda a, b: bool(np.any(np.asarray(a != b))), part, before)))


def test_dropout_differs_from_step_to_step(data, pretrained):
    config = settings(data, pretrained)
    adamw, schedule = optimizer.from_config(config, 4, trainable=("nothing",))
    manifest = shards.open_dataset(data).manifest
    encoder = weights.encoder(config, manifest)
    made = task.create(config, manifest.label)
    state = downstream.fresh_state(config.seed, made, encoder.dims, adamw, encoder.variables)
    x = {m: np.random.default_rng(0).normal(size=(16, 32)).astype(np.float32) for m in encoder.modalities}
    batch = {"features": x, "present": {m: np.ones(16, bool) for m in x}, "label": np.arange(16) % 4}
    step = jax.jit(lambda s: downstream.downstream_step(s, batch, task=made, optimizer=adamw, schedule=schedule))
    first, metrics = step(state)
    _, later = step(first)
    assert metrics["loss"] == step(state)[1]["loss"] != later["loss"]


def test_number_of_devices_changes_nothing_but_rounding(folder, linear):
    result, _, config = linear
    alone = downstream.downstream(config, folder / "alone", devices=jax.devices()[:1])
    assert alone["best_epoch"] == result["best_epoch"]
    assert alone["test"]["confusion_matrix"] == result["test"]["confusion_matrix"]


def test_a_subset_of_modalities_by_choice(folder, data, pretrained):
    changes = {"train__num_epochs": 2, "train__batch_size": 4096}  # more than there are: lowered
    config = settings(data, pretrained, downstream__modalities=("video",), **changes)
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


def test_class_weights_by_hand():
    single, multi = (LabelSpec(kind, tuple("abcd")) for kind in ("single", "multi"))
    labels = np.repeat([0, 2, 3], [10, 5, 1])
    np.testing.assert_allclose(task.class_weights(single, labels), [16 / 40, 0, 16 / 20, 16 / 4])
    several = np.zeros((16, 4))
    for column, positives in enumerate((10, 0, 5, 1)):
        several[:positives, column] = 1
    np.testing.assert_allclose(task.class_weights(multi, several), [6 / 10, 1, 11 / 5, 15])
    several[:, 1] = 1  # that every row has says as little as that none has
    assert task.class_weights(multi, several)[1] == 1
    equal = task.create(tiny_config(downstream__class_weights="none"), single, labels)
    np.testing.assert_array_equal(equal.weights, np.ones(4))
    np.testing.assert_array_equal(task.create(tiny_config(), LabelSpec("value"), labels).weights, np.ones(1))


def test_fine_tuning_starts_from_the_checkpoint_and_moves_it_at_its_own_rate(folder, data, pretrained):
    _, before, _ = probe.load(pretrained)

    def encoder_after(name, rate, epochs=1):
        config = settings(
            data,
            pretrained,
            downstream__protocol="fine_tuning",
            downstream__encoder_rate=rate,
            train__num_epochs=epochs,
            optimizer__weight_decay=0.0,
        )
        result = downstream.downstream(config, folder / name, devices=DEVICES)
        with checkpoint.Checkpoints(folder / name, read_only=True) as saved:
            tree, _ = saved.restore_tree(saved.find("newest"))
        return result, tree["params"]["representation"]

    result, moved = encoder_after("tuned", 1.0)
    assert result["encoder"]["workdir"] == str(pretrained)
    assert result["protocol"] == "fine_tuning"
    start = before["params"]["representation"]
    assert all(jax.tree.leaves(jax.tree.map(lambda a, b: bool(np.any(np.asarray(a) != b)), start, moved)))
    _, still = encoder_after("tuned_still", 0.0)
    assert_same_bits(jax.tree.map(np.asarray, start), still)
    _, slow = encoder_after("tuned_slow", 0.01)
    distance = [
        sum(float(np.square(np.asarray(a) - b).sum()) for a, b in zip(*map(jax.tree.leaves, (start, x)), strict=True))
        for x in (slow, moved)
    ]
    assert 0 < distance[0] < 1e-3 * distance[1]


@pytest.fixture(scope="module")
def with_targets(folder):
    """Faces whose further targets follow from the label; the value is unknown in a third of the rows."""

    class Targets(Faces):
        def __init__(self):
            super().__init__((96, 40, 40), name="targets", seed=3)
            more = {"arousal": LabelSpec("value"), "calmness": LabelSpec("single", ("no", "yes"))}
            object.__setattr__(self.spec, "targets", more)

        def examples(self, split):
            for i, e in enumerate(super().examples(split)):
                known = {"arousal": e.label - 1.5} if i % 3 else {}
                yield dataclasses.replace(e, targets={**known, "calmness": int(e.label == 0)})

    return builders.build(Targets(), folder / "targets")


def test_a_number_is_predicted_and_rows_without_it_are_left_out(folder, with_targets):
    config = settings(
        with_targets, "", downstream__protocol="supervised", downstream__target="arousal", train__num_epochs=30
    )
    result = downstream.downstream(config, folder / "arousal", devices=DEVICES)
    assert result["kind"] == "value"
    assert result["num_train_examples"] == 64
    assert result["test"]["mae"] < 0.7  # always the median: 1
    assert result["test"]["correlation"] > 0.6
    records = [json.loads(line) for line in (folder / "arousal" / "metrics.jsonl").read_text().splitlines()]
    errors = [r["validation/mae"] for r in records if "validation/mae" in r]
    assert result["best_epoch"] == int(np.argmin(errors))


def test_another_target_and_another_fusion(folder, with_targets):
    config = settings(
        with_targets,
        "",
        downstream__protocol="supervised",
        downstream__target="calmness",
        downstream__fusion="mean",
        train__num_epochs=15,
    )
    result = downstream.downstream(config, folder / "calmness", devices=DEVICES)
    assert result["classes"] == ["no", "yes"]
    assert result["test"]["accuracy"] > 0.8
    with checkpoint.Checkpoints(folder / "calmness", read_only=True) as saved:
        tree, _ = saved.restore_tree(saved.find("newest"))
    assert tree["params"]["classifier"]["linear"]["kernel"].shape == (32, 2)


def test_early_stopping_counts_epochs_without_a_lower_validation_loss(folder, data, pretrained):
    config = settings(
        data, pretrained, downstream__early_stopping_epochs=3, train__num_epochs=60, optimizer__learning_rate=0.3
    )
    downstream.downstream(config, folder / "early", devices=DEVICES)
    records = [json.loads(line) for line in (folder / "early" / "metrics.jsonl").read_text().splitlines()]
    validation = [r["validation/loss"] for r in records if "validation/loss" in r]
    assert len(validation) < 60
    assert len(validation) == int(np.argmin(validation)) + 1 + 3
    # and it was the first time that three in a row were no lower
    for end in range(4, len(validation)):
        assert end - int(np.argmin(validation[:end])) - 1 < 3


def test_the_joined_representations_by_hand():
    x = {"a": np.full((3, 2), 2.0, np.float32), "b": np.full((3, 2), 4.0, np.float32)}
    present = {"a": np.array([True, True, False]), "b": np.array([True, False, False])}
    params = {"params": {"linear": {"kernel": np.eye(2, dtype=np.float32), "bias": np.zeros(2, np.float32)}}}
    mean = model_lib.Classifier(num_outputs=2, dropout_rate=0.0, fusion="mean")
    np.testing.assert_array_equal(mean.apply(params, x, present=present), [[3, 3], [2, 2], [0, 0]])


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
        (settings(unlabelled, pretrained), "the data set has no labels; a downstream run needs them"),
        (settings(data, pretrained, train__batch_size=15), "2 devices cannot share equally; set it to 14 or 16"),
        (settings(data, pretrained, data__modalities=("video",)), "config.data.modalities omits 'audio', which"),
        (settings(data, ""), r"downstream\.checkpoint is empty"),
        (settings(data, folder / "nothing"), "nothing: no checkpoint here"),
        (settings(data, pretrained, downstream__checkpoint_step="7"), r"no checkpoint '7'"),
        (settings(data, pretrained, downstream__modalities=("smell",)), "no modality 'smell'"),
        (settings(data, pretrained, data__test_split="exam"), "no split 'exam'"),
        (settings(data, pretrained, downstream__target="age"), "no target 'age'; it has none"),
        (settings(data, "", downstream__protocol="fine_tuning"), r"downstream\.checkpoint is empty"),
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
