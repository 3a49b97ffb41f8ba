"""Neighbours in place of an example's modalities: which rows may come, how often, the same on every tier and device, kept."""

import json

import jax
import numpy as np
import pytest

from conclugen_jax import pretrain
from conclugen_jax.data import batches, builders, persons, shards
from conclugen_jax.method import neighbours as method
from conclugen_jax.train import feed, neighbours
from tests.helpers import assert_same_bits, fed, log_without_times, tiny_config
from tests.test_persons import Talk
from tests.test_records import Parted

MODALITIES = ("video", "audio", "text")


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return builders.build(Talk(missing=0.3), tmp_path_factory.mktemp("data"))


def config_of(data, **changes):
    options = {"loss__neighbours": 3, "clustering__start_epoch": 0, "train__num_epochs": 2, **changes}
    return tiny_config(data, data__standardize="split", **options)


def opened(data, config, tier="device"):
    """Return the stream of the training split, its rows in a tier, and the table of neighbours."""
    stream = shards.ShardStream(shards.open_dataset(data), "train", MODALITIES, all_variants=True)
    rows = batches.load(stream, tier=tier)
    return stream, rows, neighbours.table(neighbours.Search(config, stream, rows), None)


def test_the_table_is_that_of_numpy_without_the_same_person(data):
    config = config_of(data)
    stream, rows, near = opened(data, config)
    everything = rows.rows(np.arange(64))
    parts = []
    for m in MODALITIES:
        mean, scale = (x.astype(np.float64) for x in stream.dataset.manifest.standardization(m))
        z = np.where(everything["present"][m][:, None], (everything["features"][m] - mean) / scale, 0)
        parts.append(z / np.maximum(np.linalg.norm(z, axis=1, keepdims=True), 1e-12))
    vectors, groups = np.concatenate(parts, axis=1), stream.names(np.arange(64))[1]
    unit = vectors / np.linalg.norm(vectors, axis=1, keepdims=True)
    similarity = unit @ unit.T
    similarity[(groups[:, None] == groups[None]) & (groups != "")[:, None]] = -np.inf
    np.fill_diagonal(similarity, -np.inf)
    np.testing.assert_array_equal(near, np.argsort(-similarity, axis=1, kind="stable")[:, :3])
    config.loss.neighbours_of_others = False
    assert (opened(data, config)[2] != near).any()
    config.loss.neighbours = 0
    assert opened(data, config)[2] is None


def test_the_table_is_kept_and_made_again_where_it_is_damaged(data, monkeypatch):
    config = config_of(data, loss__neighbours=2)
    expected = opened(data, config)[2]
    (path,) = [p for p in (data / "cache" / "train").glob("neighbours.*.npy") if np.load(p).shape[1] == 2]
    calls, nearest = [], method.nearest
    monkeypatch.setattr(method, "nearest", lambda *args, **options: calls.append(1) or nearest(*args, **options))
    assert_same_bits(opened(data, config)[2], expected)
    assert not calls
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)
    assert_same_bits(opened(data, config)[2], expected)
    assert len(calls) == 1
    assert_same_bits(np.load(path), expected)


def test_labels_take_no_part(data, tmp_path):
    config = config_of(data)
    other = builders.build(Talk(missing=0.3, relabel=1), tmp_path)
    assert_same_bits(opened(data, config)[2], opened(other, config)[2])


def batches_of(data, config, tier, devices=1):
    stream, rows, near = opened(data, config, tier)
    made = feed.Feed(rows, config, jax.devices()[:devices], neighbours=near)
    return rows, near, list(fed(made))


def test_modalities_come_from_neighbours_as_often_as_asked(data):
    config = config_of(data, train__num_epochs=40, loss__neighbour_probability=0.3)
    rows, near, steps = batches_of(data, config, "device")
    everything, taken = rows.rows(np.arange(64)), []
    for dispatch, batch in steps:
        position = {"first_step": dispatch.first_step_in_epoch, "num_steps": dispatch.num_steps}
        indices = batches.batch_indices(
            rows.usable, seed=0, epoch=dispatch.epoch, **position, batch_size=config.train.batch_size
        )
        for m in MODALITIES:
            for own, present, x in zip(
                indices.ravel(),
                batch["present"][m].reshape(-1),
                batch["features"][m].reshape(indices.size, -1),
                strict=True,
            ):
                assert present == everything["present"][m][own]
                same = np.array_equal(x, everything["features"][m][own])
                others = [j for j in near[own] if np.array_equal(x, everything["features"][m][j])]
                assert same or (len(others) == 1 and present and everything["present"][m][others[0]])
                taken.append((own, m, not same, everything["present"][m][near[own]].all() and present))
    share = np.mean([moved for *_, moved, possible in taken if possible])
    assert abs(share - 0.3) < 0.02  # of some 6,000
    by_row = (
        np.array([moved for _, m, moved, _ in taken if m == "video"]),
        np.array([moved for _, m, moved, _ in taken if m == "audio"]),
    )
    assert abs(np.corrcoef(*by_row)[0, 1]) < 0.06  # each modality by itself


@pytest.mark.parametrize(("tier", "devices"), [("host", 1), ("shards", 1), ("device", 8), ("host", 8)])
def test_every_tier_and_number_of_devices_feeds_the_same(data, tier, devices):
    config = config_of(data, train__batch_size=16)
    expected, found = (batches_of(data, config, *how)[2] for how in (("device", 1), (tier, devices)))
    assert_same_bits([x for _, x in expected], [x for _, x in found])


@pytest.mark.parametrize("tier", ["host", "device"])
def test_variants_are_those_of_the_neighbour(tmp_path, tier):
    folder = builders.build(Parted(missing=0.3, variants=3), tmp_path)
    config = config_of(folder, loss__neighbour_probability=1.0)
    rows, near, steps = batches_of(folder, config, tier)
    stored = np.asarray(rows.table["features"]["video"])
    for dispatch, batch in steps:
        position = {"first_step": dispatch.first_step_in_epoch, "num_steps": dispatch.num_steps}
        own = batches.batch_indices(rows.usable, seed=0, epoch=dispatch.epoch, **position, batch_size=16).ravel()
        for i, x in zip(own, np.asarray(batch["features"]["video"]).reshape(len(own), -1), strict=True):
            assert any(np.array_equal(x, v) for j in near[i] for v in stored[j])


def test_runs_resume_bit_for_bit_and_learn_from_neighbours(data, tmp_path):
    def stop(epoch, *_):
        if epoch == 1:
            raise KeyboardInterrupt

    config = config_of(data)
    whole = pretrain.pretrain(config, tmp_path / "whole")
    with pytest.raises(KeyboardInterrupt):
        pretrain.pretrain(config, tmp_path / "cut", on_epoch=stop)
    assert_same_bits(pretrain.pretrain(config, tmp_path / "cut"), whole)
    plain = pretrain.pretrain(config_of(data, loss__neighbours=0), tmp_path / "plain")
    assert not np.allclose(*(x.params["representation"]["video"]["fc1"]["kernel"] for x in (whole, plain)))
    config = json.loads((tmp_path / "whole" / "config.json").read_text())
    assert config["loss"]["neighbours"] == 3
    assert len(log_without_times(tmp_path / "whole")) == len(log_without_times(tmp_path / "cut"))


def test_neighbours_are_found_among_rows_standardised_by_person(data):
    config = config_of(data)
    config.data.standardize = "person"
    stream = shards.ShardStream(shards.open_dataset(data), "train", MODALITIES)
    fitted = persons.fit(stream, config)
    fitted.attach(stream)
    near = neighbours.table(neighbours.Search(config, stream, batches.load(stream, tier="host")), fitted)
    assert (near != opened(data, config_of(data))[2]).any()


def test_fewer_neighbours_than_asked_for_are_said(tmp_path, capsys):
    folder = builders.build(Talk((12, 4, 4)), tmp_path)
    _, rows, near = opened(folder, config_of(folder, loss__neighbours=20))
    assert near.shape == (12, 20)
    assert "12 of 12 rows have fewer than 20 neighbours; those there are count" in capsys.readouterr().err
    assert ((near >= 0).sum(axis=1) >= 8).all()
