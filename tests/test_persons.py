"""Standardisation by person: the formula by hand, who counts where, the same on every tier, in runs and what follows them."""

import dataclasses
import shutil

import jax
import numpy as np
import pytest

from conclugen_jax import pretrain
from conclugen_jax.data import batches, builders, persons, shards
from conclugen_jax.errors import ConclugenError
from conclugen_jax.evaluate import downstream, embedding, exchange, probe, weights
from conclugen_jax.train import feed
from tests.helpers import Faces, assert_same_bits, fed, tiny_config

DIMS = {"video": 24, "audio": 16, "text": 12}


class Talk(Faces):
    """Faces of persons: five in train, others in validation and test but for one, some rows of nobody, one of a single clip."""

    def __init__(self, *args, change=0.0, relabel=0, **kwargs):
        super().__init__(*args, **kwargs)
        self.change, self.relabel = change, relabel

    def fingerprint(self):
        return f"{super().fingerprint()} {self.change} {self.relabel}"

    def person(self, split, i):
        if split == "train":
            return "" if i % 13 == 12 else "single" if i == 3 else f"speaker{i % 5}"
        return "speaker1" if i % 8 == 7 else f"{split}{i % 3}"

    def examples(self, split):
        for i, e in enumerate(super().examples(split)):
            offset = np.float32(sum(map(ord, self.person(split, i))) % 7)  # how they look and sound
            features = {m: x * (1 + offset / 5) + offset for m, x in e.features.items()}
            features["audio"] = np.where(np.arange(16) == 3, np.float32(2), features["audio"])  # a constant
            if split == "test":
                features = {m: x + np.float32(self.change) * (i % 4) for m, x in features.items()}
            yield dataclasses.replace(
                e, features=features, group=self.person(split, i), label=(e.label + self.relabel * i) % 4
            )


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return builders.build(Talk(missing=0.3), tmp_path_factory.mktemp("data"))


def by_person(**changes):
    return tiny_config(data__standardize="person", **{f"data__{k}": v for k, v in changes.items()})


def streams(data, modalities=("video", "audio", "text"), **options):
    dataset = shards.open_dataset(data)
    return {
        split: shards.ShardStream(dataset, split, modalities, **options) for split in ("train", "validation", "test")
    }


def raw(stream):
    everything = np.arange(stream.num_examples)
    return stream.rows(everything), stream.names(everything)[1]


def by_hand(x, present, groups, mean, scale, floor, shrinkage, known=None):
    """Return y of rows and person -> (shift, scale), in float64; ``known`` persons keep theirs."""
    z, found, y = (x - mean) / scale, dict(known or {}), np.empty(x.shape)
    for name in {*groups}:
        rows = (groups == name) & present
        n = rows.sum() if name else 0
        if name not in found:
            m, v = (z[rows].mean(axis=0), z[rows].var(axis=0)) if n else (0, 1)
            w = n / (n + shrinkage) if n else 0
            found[name] = w * m, np.sqrt(w * v + (1 - w) + floor)
        of = groups == name
        y[of] = (z[of] - found[name][0]) / found[name][1]
    return y, found


@pytest.mark.parametrize(
    ("floor", "shrinkage", "modalities"), [(0.1, 2.0, ()), (0.5, 0.0, ("video", "text")), (0.1, 7.5, ("text",))]
)
def test_numbers_are_those_of_the_formula(data, floor, shrinkage, modalities):
    opened = streams(data)
    rows, groups = raw(opened["train"])
    assert not rows["present"]["text"].all()
    config = by_person(person_floor=floor, person_shrinkage=shrinkage, person_modalities=modalities)
    fitted = persons.fit(opened["train"], config)
    assert fitted.names == tuple(sorted({*groups} - {""}))
    assert set(fitted.stats) == set(modalities or ("video", "audio"))  # words are left alone unless named
    known = {}
    for split, stream in opened.items():
        before, names = raw(stream)
        fitted.attach(stream)
        after, _ = raw(stream)
        for m in DIMS.keys() - fitted.stats.keys():
            np.testing.assert_array_equal(after["features"][m], before["features"][m])
        for m in fitted.stats:
            stats = {key: np.asarray(x, np.float64) for key, x in fitted.stats[m].items()}
            how = {"floor": floor, "shrinkage": shrinkage, "known": known.get(m)}
            x, present = before["features"][m].astype(np.float64), before["present"][m]
            y, found = by_hand(x, present, names, stats["split_mean"], stats["split_scale"], **how)
            np.testing.assert_allclose(after["features"][m], y, atol=2e-5)
            if split == "train":
                known[m] = found
                np.testing.assert_allclose(stats["mean"], y[present].mean(axis=0), atol=2e-5)
                deviation = y[present].std(axis=0)
                np.testing.assert_allclose(stats["scale"], np.where(deviation > 1e-6, deviation, 1), rtol=2e-5)
        assert all(np.isfinite(x).all() for x in after["features"].values())


def test_a_single_clip_keeps_most_of_what_it_is(data):
    opened = streams(data)["train"]
    before, groups = raw(opened)
    fitted = persons.fit(opened, by_person())
    fitted.attach(opened)
    after, (row,) = raw(opened)[0], np.flatnonzero(groups == "single")
    stats = fitted.stats["video"]
    z = (before["features"]["video"][row] - stats["split_mean"]) / stats["split_scale"]
    # w = 1 / 3, the clip's own variance is 0.
    np.testing.assert_allclose(after["features"]["video"][row], z * (2 / 3) / np.sqrt(2 / 3 + 0.1), atol=1e-5)


def test_nobody_is_standardised_as_the_split(data):
    opened = streams(data)["train"]
    before, groups = raw(opened)
    fitted = persons.fit(opened, by_person())
    fitted.attach(opened)
    rows, stats = groups == "", fitted.stats["video"]
    z = (before["features"]["video"][rows] - stats["split_mean"]) / stats["split_scale"]
    np.testing.assert_allclose(raw(opened)[0]["features"]["video"][rows], z / np.sqrt(1.1), atol=1e-5)


def test_rows_of_other_splits_change_nothing_elsewhere_and_no_label_counts(tmp_path, data):
    other = builders.build(Talk(missing=0.3, change=3.0, relabel=1), tmp_path)
    features = []
    for folder in (data, other):
        opened = streams(folder)
        fitted = persons.fit(opened["train"], by_person())
        for stream in opened.values():
            fitted.attach(stream)
        groups = raw(opened["test"])[1]
        rows = {split: raw(stream)[0]["features"] for split, stream in opened.items()}
        features.append((rows["train"], rows["validation"], rows["test"]["video"][groups == "speaker1"]))
    assert_same_bits(*(x[:2] for x in features))
    assert not np.allclose(features[0][2], features[1][2])  # they are other clips now


def test_persons_of_another_data_set_are_not_taken_for_known(data):
    opened = streams(data)
    fitted = persons.fit(opened["train"], by_person())
    rows, groups = raw(opened["test"])
    known = fitted.applied(rows["features"], rows["present"], groups, data="faces")
    unknown = fitted.applied(rows["features"], rows["present"], groups, data="others")
    shared = groups == "speaker1"
    assert not np.allclose(known["video"][shared], unknown["video"][shared])
    np.testing.assert_array_equal(known["video"][~shared], unknown["video"][~shared])
    fitted.attach(opened["test"])
    np.testing.assert_array_equal(raw(opened["test"])[0]["features"]["video"], known["video"])


@pytest.mark.parametrize("tier", ["device", "host", "mapped", "shards"])
def test_every_tier_has_the_same_bits(data, tmp_path, tier):
    folder = tmp_path / "data"
    shutil.copytree(data, folder)
    plain, changed = streams(folder)["train"], streams(folder)["train"]
    persons.fit(changed, by_person()).attach(changed)
    expected = changed.rows(np.arange(64))
    how = {"tier": "host", "host_cache_gib": 0.0} if tier == "mapped" else {"tier": tier}
    for stream in (plain, changed, changed):  # the files of one are not taken for those of the other
        rows = batches.load(stream, **how).rows(np.arange(64))
        assert_same_bits(rows["features"], (expected if stream is changed else plain.rows(np.arange(64)))["features"])


@pytest.mark.parametrize(("tier", "devices"), [("device", 8), ("host", 1), ("host", 8), ("shards", 8)])
def test_every_tier_and_number_of_devices_is_fed_the_same(data, tier, devices):
    def steps(tier, devices):
        stream, config = streams(data)["train"], by_person()
        persons.fit(stream, config).attach(stream)
        return [x for _, x in fed(feed.Feed(batches.load(stream, tier=tier), config, jax.devices()[:devices]))]

    assert_same_bits(steps(tier, devices), steps("device", 1))


def test_what_is_written_is_what_is_read(data, tmp_path):
    opened = streams(data)
    fitted = persons.fit(opened["train"], by_person())
    fitted.write(tmp_path / "persons.npz")
    again = persons.read(tmp_path / "persons.npz")
    assert dataclasses.replace(again, stats={}, shift={}, scale_of={}) == dataclasses.replace(
        fitted, stats={}, shift={}, scale_of={}
    )
    assert_same_bits((again.stats, again.shift, again.scale_of), (fitted.stats, fitted.shift, fitted.scale_of))
    (tmp_path / "persons.npz").write_bytes(b"PK")
    with pytest.raises(ConclugenError, match=r"persons.npz: cannot be read .*; restore it"):
        persons.read(tmp_path / "persons.npz")


def test_modalities_are_chosen_or_refused(data):
    opened = streams(data)["train"]
    assert set(persons.fit(opened, by_person(person_modalities=("text",))).stats) == {"text"}
    with pytest.raises(
        ConclugenError, match=r"config.data.person_modalities names 'face', which is none of video, audio, text"
    ):
        persons.fit(opened, by_person(person_modalities=("face",)))


# Runs.


def config_of(data, **changes):
    return tiny_config(data, data__standardize="person", clustering__start_epoch=0, train__num_epochs=2, **changes)


@pytest.fixture(scope="module")
def run(data, tmp_path_factory):
    workdir = tmp_path_factory.mktemp("run")
    pretrain.pretrain(config_of(data), workdir)
    return workdir


def test_a_checkpoint_carries_what_raw_features_need(data, run):
    model, variables, config = probe.load(run)
    train, test = probe.represent_splits(run, ("train", "test"))
    rows, groups = raw(streams(data)["test"])
    seen = weights.persons_of(run, variables, config).applied(rows["features"], rows["present"], groups, data="faces")
    found = probe.represent(model, variables, seen)
    assert_same_bits(found, test.representations)
    present, video = train.present["video"], train.representations["video"]
    assert np.isfinite(video[present]).all()
    fresh = probe.untrained(config, run)[1]
    assert_same_bits(fresh["feature_stats"], variables["feature_stats"])


def test_a_run_resumes_bit_for_bit(data, run, tmp_path):
    def stop(epoch, *_):
        if epoch == 1:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        pretrain.pretrain(config_of(data), tmp_path, on_epoch=stop)
    assert_same_bits(pretrain.pretrain(config_of(data), tmp_path), pretrain.pretrain(config_of(data), run))


@pytest.mark.parametrize("protocol", ["linear_evaluation", "fine_tuning", "supervised", "raw_features"])
def test_downstream_runs_and_their_embeddings(data, run, tmp_path, protocol):
    sources = {"downstream__checkpoint": str(run)} if protocol in ("linear_evaluation", "fine_tuning") else {}
    config = config_of(data, downstream__protocol=protocol, **sources)
    result = downstream.downstream(config, tmp_path)
    network = embedding.load(tmp_path)
    rows = list(embedding.embed(network, shards.open_dataset(data), "test"))
    labels, found = (np.concatenate([x[key] for x in rows]) for key in ("label", "prediction"))
    recalls = [(found[labels == c] == c).mean() for c in range(4) if (labels == c).any()]
    scores = {"accuracy": (found == labels).mean(), "balanced": np.mean(recalls)}
    assert any(np.isclose(result["test"]["accuracy"], x, atol=1e-6) for x in scores.values())


def test_exported_weights_know_the_statistics_and_no_person(run, data, tmp_path):
    exchange.export_weights(run, tmp_path / "export")
    exchange.import_weights(tmp_path / "export", tmp_path / "imported")
    exchange.import_weights(tmp_path / "export", tmp_path / "with_data", data)
    _, variables, config = probe.load(tmp_path / "imported")
    theirs = weights.persons_of(tmp_path / "imported", variables, config)
    own = weights.persons_of(run, probe.load(run)[1], config)
    assert theirs.names == ()
    assert_same_bits(theirs.stats, own.stats)
    assert not any(b"speaker0" in path.read_bytes() for path in (tmp_path / "export").iterdir())
    workdirs = (run, tmp_path / "imported", tmp_path / "with_data")
    own, theirs, again = (probe.represent_split(w, "test", data=data).representations for w in workdirs)
    strangers = raw(streams(data)["test"])[1] != "speaker1"
    for m in DIMS:
        assert_same_bits(own[m][strangers], theirs[m][strangers])
        assert m == "text" or (own[m] != theirs[m]).any()
    assert_same_bits(own, again)  # the data set knows the persons
    assert_same_bits(dict(np.load(run / persons.FILE)), dict(np.load(tmp_path / "with_data" / persons.FILE)))
