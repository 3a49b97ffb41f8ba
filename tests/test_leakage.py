"""What reaches which number: no label any vector, no row of a test split anything of another person or of training rows."""

import dataclasses

import numpy as np
import pytest

from conclugen_jax import pretrain
from conclugen_jax.data import builders, persons
from conclugen_jax.evaluate import bank, probe
from tests.helpers import assert_same_bits, tiny_config
from tests.test_persons import Talk, raw, streams

SPLITS = ("train", "validation", "test")


class Altered(Talk):
    """The same rows with all labels permuted, or with another row in the test split."""

    def __init__(self, *, permuted=False, row=None):
        super().__init__(missing=0.3)
        self.permuted, self.row = permuted, row

    def fingerprint(self):
        return f"{super().fingerprint()} {self.permuted} {self.row}"

    def examples(self, split):
        rows = list(super().examples(split))
        order = np.random.default_rng(7).permutation(len(rows)) if self.permuted else range(len(rows))
        labels = [rows[i].label for i in order]
        for i, (e, label) in enumerate(zip(rows, labels, strict=True)):
            change = np.float32(3 * (split == "test" and i == self.row))
            yield dataclasses.replace(e, label=label, features={m: x + change for m, x in e.features.items()})


def config_of(data):
    smoothing = {"evaluation__vectors": "pre_activation", "evaluation__smoothing_neighbours": 5}
    short = {"clustering__start_epoch": 0, "train__num_epochs": 2}
    return tiny_config(data, data__standardize="person", loss__neighbours=3, **smoothing, **short)


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return builders.build(Altered(), tmp_path_factory.mktemp("data"))


@pytest.fixture(scope="module")
def run(data, tmp_path_factory):
    workdir = tmp_path_factory.mktemp("run")
    return workdir, pretrain.pretrain(config_of(data), workdir)


def numbers(workdir, data, *, transductive=False):
    """Return the bank of a data set's training rows as a run sees them, and split -> what the run makes of its rows."""
    section, found = config_of(data).evaluation, {}
    section.transductive = transductive
    seen = dict(zip(SPLITS, probe.represent_splits(workdir, SPLITS, data=data), strict=True))
    among = bank.create(seen["train"].fused(), section)
    for name, x in seen.items():
        own = np.arange(len(x.label)) if name == "train" else None
        made = {"clusters": x.clusters, "smoothed": among.smoothed(x.fused(), own)}
        found[name] = made | {
            f"{kind}/{m}": v for kind in ("features", "representations") for m, v in vars(x)[kind].items()
        }
    return among[:4], found


def test_permuted_labels_change_no_number_of_pretraining(data, run, tmp_path):
    other, found = builders.build(Altered(permuted=True), tmp_path / "data"), []
    for folder, (workdir, state) in ((data, run), (other, (tmp_path, pretrain.pretrain(config_of(other), tmp_path)))):
        (table,) = (folder / "cache" / "train").glob("neighbours.*.npy")
        found.append((dict(np.load(workdir / persons.FILE)), np.load(table), state, *numbers(workdir, folder)))
    assert {*found[0][0]} >= {"names", "shift/video", "scale_of/audio", "mean/video", "scale/audio"}
    assert_same_bits(*found)
    for split in SPLITS:
        a, b = (raw_labels(folder, split) for folder in (data, other))
        assert (a != b).any()
        assert sorted(a) == sorted(b)


def raw_labels(folder, split):
    return raw(streams(folder)[split])[0]["label"]


@pytest.mark.parametrize("row", [0, 7], ids=["of a new person", "of a known person"])
def test_a_test_row_changes_nothing_of_others_unless_asked(data, run, tmp_path, row):
    other = builders.build(Altered(row=row), tmp_path)
    fitted = [vars(persons.fit(streams(folder)["train"], config_of(folder))) for folder in (data, other)]
    assert_same_bits(*({key: x[key] for key in ("stats", "shift", "scale_of")} for x in fitted))
    groups = raw(streams(data)["test"])[1]
    assert (groups[row] == "speaker1") == (row == 7)
    # Known persons keep their statistics: not even other rows of the same one change.
    others = np.flatnonzero(np.arange(len(groups)) != row if row == 7 else groups != groups[row])

    def kept(found):
        return {**found, "test": {key: x[others] for key, x in found["test"].items()}}

    (among, before), (among_then, after) = (numbers(run[0], folder) for folder in (data, other))
    assert_same_bits((among, kept(before)), (among_then, kept(after)))
    for key in ("smoothed", "features/video", "representations/audio"):
        assert not np.allclose(before["test"][key][row], after["test"][key][row])
    before, after = (numbers(run[0], folder, transductive=True)[1] for folder in (data, other))
    assert not np.allclose(*(kept(x)["test"].pop("smoothed") for x in (before, after)))
    assert_same_bits(*({name: x[name] for name in SPLITS[:2]} for x in (before, after)))
