"""Neighbours among the representations: which rows they are, when, the same on every tier and device, resumed bit for bit."""

import os
import shutil
import signal

import jax
import numpy as np
import pytest

from conclugen_jax import pretrain
from conclugen_jax.data import batches, builders, shards
from conclugen_jax.errors import ConclugenError
from conclugen_jax.evaluate import weights
from conclugen_jax.method import neighbours as method
from conclugen_jax.pretrain import recorder, together
from conclugen_jax.runs import checkpoint, config as config_lib
from conclugen_jax.system import signals
from conclugen_jax.train import feed, neighbours
from tests.helpers import assert_same_bits, close, fed, flat, log_without_times, tiny_config
from tests.test_persons import Talk

MODALITIES = ("video", "audio", "text")
DEVICES = jax.devices()[:1]


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return builders.build(Talk(missing=0.3), tmp_path_factory.mktemp("data"))


def config_of(data, **changes):
    """Six epochs of four steps; neighbours are looked for before the third and the fifth."""
    options = {"loss__neighbours": 3, "loss__neighbour_space": "representation", "loss__neighbour_refresh_epochs": 2}
    options |= {"loss__neighbour_probability": 0.8, "evaluation__vectors": "pre_activation"}
    options |= {
        "loss__clustering_weight": 0,
        "loss__reconstruction_weight": 0,
        "clustering__start_epoch": 0,
    }  # one program
    options |= {"optimizer__name": "sgd", "optimizer__learning_rate": 0.05}  # Adam amplifies rounding
    options |= {"data__standardize": "split", "train__num_epochs": 6, "checkpoint__keep_newest": 100}
    return tiny_config(data, **{**options, **changes})


def train(config, workdir, devices=DEVICES, **options):
    """Train a run; return its last state, and epoch -> the state after it, before neighbours are looked for."""
    states = {}

    def note(epoch, _, state):
        states[epoch] = jax.tree.map(lambda x: np.array(x, copy=True), state.replace(opt_state=None, rng=None))

    return pretrain.pretrain(config, workdir, devices=devices, on_epoch=note, **options), states


@pytest.fixture(scope="module")
def whole(data, tmp_path_factory):
    folder = tmp_path_factory.mktemp("whole")
    return folder, *train(config_of(data), folder)


def tables(folder):
    """Step -> the neighbours in its checkpoint."""
    with checkpoint.Checkpoints(folder, read_only=True) as saved:
        return {step: saved.restore_tree(step)[0]["neighbours"] for step in saved.steps()}


def by_numpy(folder, step, groups, number=3):
    """The rows nearest to each by the representations of a checkpoint, without those of the same person."""
    split, parts = weights.represent_split(folder, "train", which=step, vectors="representation"), []
    for m in MODALITIES:
        there, x = split.present[m][:, None], split.representations[m].astype(np.float64)
        x = np.where(there, x - x[there[:, 0]].mean(axis=0), 0)
        parts.append(x / np.maximum(np.linalg.norm(x, axis=1, keepdims=True), 1e-12))
    unit = np.concatenate(parts, axis=1)
    unit /= np.linalg.norm(unit, axis=1, keepdims=True)
    similarity = unit @ unit.T
    similarity[(groups[:, None] == groups[None]) & (groups != "")[:, None]] = -np.inf
    np.fill_diagonal(similarity, -np.inf)
    return np.argsort(-similarity, axis=1, kind="stable")[:, :number]


def test_neighbours_are_those_of_numpy_by_the_state_before_the_epoch(data, whole):
    found, stream = tables(whole[0]), shards.ShardStream(shards.open_dataset(data), "train", MODALITIES)
    rows = batches.load(stream, tier="host")
    raw = neighbours.table(neighbours.Search(config_of(data), stream, rows), None)
    groups = stream.names(np.arange(64))[1]
    assert sorted(found) == [4, 8, 12, 16, 20, 24]
    np.testing.assert_array_equal(found[4], raw)
    for refreshed, kept in ((8, 12), (16, 20)):
        expected = by_numpy(whole[0], refreshed, groups)
        np.testing.assert_array_equal(found[refreshed], expected)
        np.testing.assert_array_equal(found[kept], expected)
        assert (by_numpy(whole[0], kept, groups) != expected).any()  # the network has moved on meanwhile
    assert (found[8] != found[16]).any()
    assert (found[8] != raw).any()
    np.testing.assert_array_equal(found[24], found[20])  # after the last epoch nobody looks again


def test_training_takes_rows_from_the_new_neighbours(data, whole, tmp_path):
    """Until the first refresh nothing differs from a run with neighbours by features; then it does."""
    _, raw = train(config_of(data, loss__neighbour_space="raw"), tmp_path)
    kernels = [{e: s.params["representation"]["video"]["fc1"]["kernel"] for e, s in x.items()} for x in (whole[2], raw)]
    assert_same_bits(kernels[0][1], kernels[1][1])
    assert not np.array_equal(kernels[0][2], kernels[1][2])
    assert raw[5].neighbours.size == 0


@pytest.mark.parametrize("tier", ["device", "host", "shards"])
def test_a_feed_gives_rows_of_the_neighbours_of_each_part(data, tier):
    config = config_of(data, train__num_epochs=4)
    stream = shards.ShardStream(shards.open_dataset(data), "train", MODALITIES, all_variants=True)
    rows = batches.load(stream, tier=tier)
    near = [np.random.default_rng(i).integers(0, 64, (64, 3)).astype(np.int32) for i in (0, 1)]
    feeds = [feed.Feed(rows, config, DEVICES, neighbours=x) for x in near]
    expected = [dict(fed(x)) for x in feeds]
    renewed = feed.Feed(rows, config, DEVICES, neighbours=near[0])
    for dispatch, batch in fed(renewed):
        assert_same_bits(batch, expected[dispatch.epoch // 2][dispatch])
        if dispatch.epoch == 1 and dispatch.ends_epoch:
            assert (batch["features"]["audio"] != expected[1][dispatch]["features"]["audio"]).any()
            renewed.renew(near[1])


@pytest.mark.parametrize(("tier", "step"), [("device", 4), ("device", 12), ("host", 8), ("shards", 20)])
def test_runs_resume_bit_for_bit_from_every_checkpoint(data, whole, tmp_path, tier, step):
    """Between two refreshes, and right after one; the other tiers go on as if the run had been theirs."""
    run = shutil.copytree(whole[0], tmp_path / "run")
    for later in (run / checkpoint.FOLDER).iterdir():
        if int(later.name) > step:
            shutil.rmtree(later)
    config = config_of(data, data__tier=tier)
    (run / "config.json").write_text(config_lib.to_json(config))
    assert_same_bits(train(config, run)[0], whole[1])
    assert_same_bits(tables(run), tables(whole[0]))
    assert log_without_times(run) == log_without_times(whole[0])


def test_a_signal_in_the_middle_of_an_epoch_leaves_what_is_needed(data, whole, tmp_path, monkeypatch):
    take = recorder.Recorder.take

    def take_then_stop(self, dispatch, metrics):
        take(self, dispatch, metrics)
        if dispatch.end_step == 10:
            os.kill(os.getpid(), signal.SIGTERM)

    monkeypatch.setattr(recorder.Recorder, "take", take_then_stop)
    with pytest.raises(signals.Interrupted):
        train(config_of(data), tmp_path)
    monkeypatch.undo()
    assert max(tables(tmp_path)) == 10
    assert_same_bits(train(config_of(data), tmp_path)[0], whole[1])


def test_a_run_that_is_killed_while_it_looks_looks_again(data, whole, tmp_path, monkeypatch):
    def fail(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(neighbours, "represented", fail)
    with pytest.raises(KeyboardInterrupt):
        train(config_of(data), tmp_path)
    monkeypatch.undo()
    assert sorted(tables(tmp_path)) == [4]
    assert_same_bits(train(config_of(data), tmp_path)[0], whole[1])


def test_eight_devices_train_as_one_does(data, whole, tmp_path):
    """Up to the order of sums; neighbours may differ where two rows are as near as rounding is."""
    state, _ = train(config_of(data), tmp_path, jax.devices())
    same = np.asarray(state.neighbours) == np.asarray(whole[1].neighbours)
    assert same.mean() > 0.98
    ours, theirs = flat(state.params), flat(whole[1].params)
    assert all(close(ours[path], x, 2e-5) for path, x in theirs.items())


def test_labels_take_no_part(data, whole, tmp_path):
    other = builders.build(Talk(missing=0.3, relabel=1), tmp_path / "data")
    assert_same_bits(train(config_of(other), tmp_path / "run")[0], whole[1])


def test_a_checkpoint_without_neighbours_is_as_it_was(data, tmp_path):
    train(config_of(data, loss__neighbours=0, train__num_epochs=1), tmp_path)
    with checkpoint.Checkpoints(tmp_path, read_only=True) as saved:
        assert "neighbours" not in saved.restore_tree(4)[0]


def test_such_a_run_is_trained_alone(data):
    once = {"checkpoint__every_epochs": 6}
    assert together.kind(config_of(data, loss__neighbour_space="raw", **once)) is not None
    assert together.kind(config_of(data, **once)) is None


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"loss__neighbour_refresh_epochs": 6}, "loss.neighbour_refresh_epochs is 6.*refresh earlier, train longer"),
        ({"loss__neighbour_refresh_epochs": 0}, "loss.neighbour_refresh_epochs is 0; it must be between 1 and"),
        ({"loss__neighbour_space": "fused"}, "it must be one of 'raw', 'representation'"),
    ],
)
def test_what_cannot_be_is_refused(data, tmp_path, changes, message):
    with pytest.raises(ConclugenError, match=message):
        pretrain.pretrain(config_of(data, **changes), tmp_path / "run")
    assert not (tmp_path / "run" / "config.json").exists()


def test_vectors_that_do_not_fit_are_refused_with_the_way_out(data, tmp_path, monkeypatch):
    def full(*_, **__):
        raise jax.errors.JaxRuntimeError("RESOURCE_EXHAUSTED: Out of memory allocating 7 bytes.")

    monkeypatch.setattr(method, "nearest", full)
    with pytest.raises(ConclugenError, match=r"64 vectors of 96 numbers.*7 bytes.*neighbour_space='raw'"):
        train(config_of(data), tmp_path)
