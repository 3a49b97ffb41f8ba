"""Probes while pretraining: what they find, what they say, and that they change nothing."""

import json
import os
import signal

import jax
import numpy as np
import pytest
from sklearn.neighbors import KNeighborsClassifier

from conclugen_jax import pretrain
from conclugen_jax.data import batches, builders, shards
from conclugen_jax.data.sources import LabelSpec
from conclugen_jax.errors import ConclugenError
from conclugen_jax.evaluate import online_probe, probe
from conclugen_jax.pretrain import recorder, setup
from conclugen_jax.runs import checkpoint
from conclugen_jax.system import signals
from tests.helpers import Faces, assert_same_bits, log_without_times, tiny_config

ONE = jax.devices()[:1]
PROBED = {"online_probe__every_epochs": 2, "online_probe__neighbours": 5, "online_probe__num_epochs": 4}


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return builders.build(Faces(missing=0.3), tmp_path_factory.mktemp("data"))


@pytest.fixture(scope="module")
def probed(data, tmp_path_factory):
    config = tiny_config(data, checkpoint__keep_newest=100, **PROBED)
    folder = tmp_path_factory.mktemp("probed")
    return config, pretrain.pretrain(config, folder, devices=ONE), folder


def lines(folder):
    return [json.loads(line) for line in (folder / "probes.jsonl").read_text().splitlines()]


def test_the_run_is_the_same_with_and_without(data, probed, tmp_path):
    _, state, folder = probed
    plain = pretrain.pretrain(tiny_config(data, checkpoint__keep_newest=100), tmp_path / "plain", devices=ONE)
    assert_same_bits(state, plain)
    assert log_without_times(folder) == log_without_times(tmp_path / "plain")
    assert lines(tmp_path / "plain") == []
    # Other labels change what the probe finds and nothing else.
    other = builders.build(Shuffled(missing=0.3, name="shuffled"), tmp_path / "data")
    config = tiny_config(data, checkpoint__keep_newest=100, online_probe__path=str(other), **PROBED)
    assert_same_bits(pretrain.pretrain(config, tmp_path / "other", devices=ONE), state)
    assert [r["linear/accuracy"] for r in lines(tmp_path / "other")] != [r["linear/accuracy"] for r in lines(folder)]


class Shuffled(Faces):
    def examples(self, split):
        for i, e in enumerate(super().examples(split)):
            yield type(e)(**{**vars(e), "label": i % 4})


def test_a_line_per_probe_with_its_protocol(probed):
    records = lines(probed[2])
    assert [(r["step"], r["epoch"]) for r in records] == [(8, 1), (16, 3)]
    for r in records:
        assert "5 nearest neighbours by cosine" in r["protocol"]
        assert "faces 1.0.0: 64 labelled training examples, scored on 24 of the validation split" in r["protocol"]
        assert 0 <= r["knn/accuracy"] <= 1
        assert 0 <= r["linear/accuracy"] <= 1
    assert "clustering/nmi" not in records[0]  # clustering joins in the third epoch
    assert 0 <= records[1]["clustering/nmi"] <= 1
    assert sum(records[1]["cluster_sizes"]) == 24
    assert records[1]["linear/accuracy"] > 0.5  # four classes, well apart


def by_scikit_learn(data, config, model, variables):
    vectors, labels = {}, {}
    for split in ("train", "validation"):
        table = batches.load(
            shards.ShardStream(shards.open_dataset(data), split, config.data.modalities), tier="host"
        ).table
        vectors[split] = probe.concatenated(probe.represent(model, variables, table["features"]), table["present"])
        labels[split] = table["label"]
    theirs = KNeighborsClassifier(5, metric="cosine").fit(vectors["train"], labels["train"])
    return theirs.score(vectors["validation"], labels["validation"])


def test_nearest_neighbours_are_those_of_scikit_learn(data, probed):
    config, state, folder = probed
    model, variables, _ = probe.load(folder)
    assert lines(folder)[-1]["knn/accuracy"] == pytest.approx(by_scikit_learn(data, config, model, variables))
    noisy = jax.tree.map(lambda x: x + np.random.default_rng(0).normal(size=x.shape), state.params)
    state, chosen = state.replace(params=noisy), model.clone(vectors="projection")
    record = online_probe.OnlineProbe(config, chosen)(state, 16, 3)
    assert "cosine of the concatenated vectors (projection)" in record["protocol"]
    expected, other = (by_scikit_learn(data, config, x, state.variables()) for x in (chosen, model))
    assert record["knn/accuracy"] == pytest.approx(expected)
    assert expected != other


def test_votes_of_several_labels_and_numbers():
    bank = np.array([[1.0, 0.0], [0.9, 0.1], [0.8, 0.2], [0.0, 1.0]], np.float32)
    query = np.array([[2.0, 0.1]], np.float32)
    several = np.array([[1, 0], [1, 1], [0, 0], [0, 1]], np.float32)
    found = online_probe.knn(bank, several, query, LabelSpec("multi", ("a", "b")), k=3)
    np.testing.assert_array_equal(found, [[True, False]])
    found = online_probe.knn(bank, several, query, LabelSpec("multi", ("a", "b")), k=2)
    np.testing.assert_array_equal(found, [[True, False]])  # half is not more than half
    found = online_probe.knn(bank, np.array([1.0, 2.0, 6.0, 50.0], np.float32), query, LabelSpec("value"), k=3)
    np.testing.assert_allclose(found, [3.0])


@pytest.mark.parametrize("kind", ["multi"])
def test_several_labels(tmp_path, kind):
    path = builders.build(Faces(kind=kind), tmp_path / "data")
    pretrain.pretrain(
        tiny_config(path, train__num_epochs=2, clustering__start_epoch=0, **PROBED), tmp_path / "run", devices=ONE
    )
    (record,) = lines(tmp_path / "run")
    assert record["linear/accuracy"] > 0.4
    assert "clustering/nmi" not in record


@pytest.mark.slow
def test_interrupted_and_resumed_it_logs_every_probe_once(data, probed, tmp_path, monkeypatch):
    config, whole, folder = probed
    seen = []
    usual = setup.Setup.saves_after

    def stop_after_two_epochs(self, dispatch):
        seen.append(dispatch.end_step)
        if dispatch.end_step == 10:
            raise signals.Interrupted(15)
        return usual(self, dispatch)

    with monkeypatch.context() as patch:
        patch.setattr(setup.Setup, "saves_after", stop_after_two_epochs)
        with pytest.raises(signals.Interrupted):
            pretrain.pretrain(config, tmp_path, devices=ONE)
    assert [r["step"] for r in lines(tmp_path)] == [8]
    assert_same_bits(pretrain.pretrain(config, tmp_path, devices=ONE), whole)
    assert lines(tmp_path) == lines(folder)


@pytest.mark.slow
@pytest.mark.parametrize("when", ["in the steps before", "in the probe"])
def test_a_signal_before_a_probe_waits_for_the_checkpoint_and_one_in_it_does_not(
    data, probed, tmp_path, monkeypatch, when
):
    config, whole, folder = probed
    take, probe = recorder.Recorder.take, online_probe.OnlineProbe.__call__

    def take_then_stop(self, dispatch, metrics):
        take(self, dispatch, metrics)
        if dispatch.end_step == 16 and when == "in the steps before":
            os.kill(os.getpid(), signal.SIGTERM)

    def stop_in_probe(self, state, step, epoch):
        if step == 16 and when == "in the probe":
            os.kill(os.getpid(), signal.SIGTERM)
        return probe(self, state, step, epoch)

    with monkeypatch.context() as patch:
        patch.setattr(recorder.Recorder, "take", take_then_stop)
        patch.setattr(online_probe.OnlineProbe, "__call__", stop_in_probe)
        with pytest.raises(signals.Interrupted):
            pretrain.pretrain(config, tmp_path, devices=ONE)
    saved = checkpoint.Checkpoints(tmp_path, read_only=True).steps()[-1]
    assert (saved, [r["step"] for r in lines(tmp_path)]) == {
        "in the steps before": (16, [8, 16]),
        "in the probe": (12, [8]),
    }[when]
    assert_same_bits(pretrain.pretrain(config, tmp_path, devices=ONE), whole)
    assert lines(tmp_path) == lines(folder)


def test_the_best_checkpoint_by_the_probe(data, tmp_path, monkeypatch):
    config = tiny_config(data, checkpoint__best_by="probe", train__num_epochs=8, **PROBED)
    usual, costs = online_probe.OnlineProbe.cost, {}

    def cost(self, dispatch):
        """The probe's own figure, made best at the second of four probes: the digits are too easy to tell them apart."""
        found = usual(self, dispatch)
        if found is not None:
            costs[dispatch.end_step] = found = found - (len(costs) == 1)
        return found

    monkeypatch.setattr(online_probe.OnlineProbe, "cost", cost)
    pretrain.pretrain(config, tmp_path, devices=ONE)
    steps = [r["step"] for r in lines(tmp_path)]
    assert list(costs) == steps
    with checkpoint.Checkpoints(tmp_path, read_only=True) as saved:
        assert saved.find("best") == steps[1] == min(costs, key=costs.get) != saved.find("newest")


@pytest.mark.parametrize(
    ("changes", "source", "message"),
    [
        ({}, {"kind": "none"}, "the data set has no labels; name one that has as config.online_probe.path"),
        (
            {
                "data__modalities": ("video", "audio"),
                "train__num_epochs": 1,
                "loss__clustering_weight": 0.0,
                "loss__reconstruction_weight": 0.0,
            },
            {},
            None,
        ),
        ({"online_probe__every_epochs": 0, "checkpoint__best_by": "probe"}, {}, "no probe would run"),
        ({"online_probe__learning_rates": ()}, {}, "online_probe.learning_rates is .*name at least one"),
    ],
)
def test_data_that_cannot_be_probed(data, tmp_path, changes, source, message):
    path = builders.build(Faces(**source), tmp_path / "data")
    changes = {
        "train__num_epochs": 2,
        "clustering__start_epoch": 0,
        "online_probe__path": str(path),
        **PROBED,
        **changes,
    }
    config = tiny_config(data, **changes)
    if message is None:
        pretrain.pretrain(config, tmp_path / "run", devices=ONE)
        (record,) = lines(tmp_path / "run")
        assert record["epoch"] == 0  # one at the run's end, whatever its period
        return
    with pytest.raises(ConclugenError, match=message):
        pretrain.pretrain(config, tmp_path / "run", devices=ONE)
