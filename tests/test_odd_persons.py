"""Data sets on which standardisation by person, or neighbours, cannot do what is asked: what is said, what is done instead."""

import dataclasses

import numpy as np
import pytest

from conclugen_jax.data import batches, builders, inspection, persons, shards
from conclugen_jax.data.sources import LabelSpec
from conclugen_jax.evaluate import bank
from conclugen_jax.pretrain import setup
from conclugen_jax.train import neighbours
from tests.helpers import Faces, tiny_config
from tests.test_inspection import text
from tests.test_persons import by_hand, raw


class Grouped(Faces):
    """Faces of any persons: ``groups``: split -> group of row i and label y."""

    def __init__(self, num=(32, 8, 8), **groups):
        super().__init__(num)
        self.groups = groups

    def examples(self, split):
        group = self.groups.get(split, lambda i, y: f"{split}{i % 2}")
        for i, e in enumerate(super().examples(split)):
            yield dataclasses.replace(e, group=group(i, e.label))


def opened(tmp_path, **changes):
    """Return configuration, stream and statistics of a pretraining run as it starts."""
    config, stream = setup.open_data(tiny_config(next(tmp_path.glob("faces/*")), **changes), 1)
    return config, stream, setup.standardise(config, tmp_path, stream)


NOBODY, ANNA = (lambda i, y: ""), (lambda i, y: "anna")
BY_SPLIT = "features are standardised by the split, not by person"
CASES = {
    "no groups": ({"train": NOBODY}, {}, "train", f"split 'train': no groups; {BY_SPLIT}"),
    "one group": ({"train": ANNA}, {}, "train", f"split 'train': one group for all, 'anna'; {BY_SPLIT}"),
    "no groups in test": ({"test": NOBODY}, {}, "test", f"split 'test': no groups; its {BY_SPLIT}"),
    "a single clip": (
        {"train": lambda i, y: "once" if i == 5 else f"{i % 3}"},
        {},
        "train",
        "split 'train': 1 of 4 persons have a single clip (such as 'once'); their statistics are 33% those of the clip and "
        "67% those of the split",
    ),
    "single clips in test": (
        {"test": lambda i, y: f"new{i}"},
        {"data__person_shrinkage": 4.0},
        "test",
        "split 'test': 8 of 8 persons have a single clip (such as 'new0'); their statistics are 20% those of the clip and "
        "80% those of the split",
    ),
    "single clips without shrinkage": (
        {"validation": lambda i, y: f"new{i // 2 * (i != 5)}"},
        {"data__person_shrinkage": 0.0},
        "validation",
        "split 'validation': 1 of 4 persons have a single clip (such as 'new2'); all of its features become 0; set "
        "config.data.person_shrinkage above 0",
    ),
    "confounded": (
        {"train": lambda i, y: f"{y}{i % 2}"},
        {},
        "train",
        "split 'train': the groups explain 100% of the label's variance; standardisation by person takes part of the label "
        "away; config.data.standardize=split keeps it",
    ),
}


@pytest.mark.parametrize(("groups", "changes", "split", "said"), CASES.values(), ids=CASES)
def test_odd_persons_are_named_and_standardised_all_the_same(tmp_path, caplog, groups, changes, split, said):
    builders.build(Grouped(**groups), tmp_path)
    config, train, fitted = opened(tmp_path, data__standardize="person", **changes)
    stream = shards.ShardStream(train.dataset, split, train.modalities)
    before, names = raw(stream)
    fitted.attach(stream)
    assert [r.getMessage() for r in caplog.records] == [f"data set {config.data.path}, {said}"]
    names = np.full_like(names, "") if BY_SPLIT in said else names
    stats, floor, shrinkage = fitted.stats["video"], config.data.person_floor, config.data.person_shrinkage
    how = stats["split_mean"], stats["split_scale"], floor, shrinkage
    expected, _ = by_hand(before["features"]["video"], np.ones(len(names), bool), names, *how)
    np.testing.assert_allclose(raw(stream)[0]["features"]["video"], expected, atol=2e-5)


@pytest.mark.parametrize("group", ["", "anna"])
def test_nobody_is_a_person_where_training_knows_none(tmp_path, group):
    builders.build(Grouped(train=lambda i, y: group), tmp_path)
    _, train, fitted = opened(tmp_path, data__standardize="person")
    test = shards.ShardStream(train.dataset, "test", train.modalities)
    before, stats = raw(test)[0]["features"]["video"], fitted.stats["video"]
    for known in (fitted, persons.read(tmp_path / persons.FILE)):
        known.attach(test)
        z = (raw(test)[0]["features"]["video"] - stats["mean"]) / stats["scale"]
        mean, scale = train.dataset.manifest.standardization("video")
        np.testing.assert_allclose(z, (before - mean) / scale, atol=1e-4)
        test.affine = None


def test_ordinary_persons_are_not_remarked_on(tmp_path, caplog):
    builders.build(Grouped(), tmp_path)
    _, train, fitted = opened(tmp_path, data__standardize="person")
    for split in ("train", "validation", "test"):
        fitted.attach(shards.ShardStream(train.dataset, split, train.modalities))
    assert not caplog.records


def test_inspection_names_groups_that_belong_to_labels(tmp_path):
    said = "standardisation by person (data.standardize) would take away"
    for name, groups in (("plain", {}), ("confounded", {"test": lambda i, y: f"{y}"})):
        report = inspection.inspect(builders.build(Grouped((64, 64, 64), **groups), tmp_path / name))
        assert (said in " ".join(text(report).split())) == (name == "confounded")


ALL = "there are 32 training rows: vectors are averaged with all of them"
FEW = {
    "more than rows": (
        {},
        {"loss__neighbours": 32},
        "32 of 32 rows have fewer than 32 neighbours; those there are count",
    ),
    "all of one person": (
        {"train": ANNA},
        {"loss__neighbours": 3},
        "no row has a neighbour of other persons; config.loss.neighbours_of_others=False admits those of the same; every row "
        "stays as it is",
    ),
    "more than rows to smooth by": (
        {},
        {"evaluation__smoothing_neighbours": 33},
        f"config.evaluation.smoothing_neighbours is 33, but {ALL}",
    ),
}


@pytest.mark.parametrize(("groups", "changes", "said"), FEW.values(), ids=FEW)
def test_neighbours_that_there_are_not_are_named(tmp_path, capsys, groups, changes, said):
    builders.build(Grouped(**groups), tmp_path)
    config, stream, _ = opened(tmp_path, loss__neighbours_of_others=bool(groups), **changes)
    neighbours.table(neighbours.Search(config, stream, batches.load(stream, tier="host")), None)
    if config.evaluation.smoothing_neighbours:
        x = raw(stream)[0]["features"]["video"]
        z = (x - x.mean(axis=0)) / x.std(axis=0)
        for _ in range(2):  # said once
            np.testing.assert_allclose(bank.pair(x, x, config.evaluation)[1], z / 2 + z.mean(axis=0) / 2, atol=1e-5)
    assert capsys.readouterr().err.strip().removeprefix(f"{stream.where}: ") == said


def share(values, groups, kind="value", num_classes=0):
    return persons.explained(values, LabelSpec(kind, tuple(map(str, range(num_classes)))), groups)


def test_the_share_that_groups_explain():
    groups = np.repeat(np.arange(1, 9), 6).astype(np.uint64)
    generator = np.random.default_rng(0)
    assert share(groups.astype(float), groups) == 1
    assert share(groups.astype(int) - 1, groups.astype(str), "single", 8) == 1
    nothing = [share(generator.normal(size=48), groups) for _ in range(200)]
    assert np.mean(nothing) < 0.04  # of small groups, the share itself would be 0.15
    of_persons = generator.normal(size=(99, 8))
    half = [share(generator.normal(size=48) + x[groups - 1], groups) for x in of_persons]
    assert abs(np.median(half) - 0.5) < 0.1
    assert share(np.ones(48), groups) is None
    assert share(generator.normal(size=8), np.arange(1, 9)) is None
    values, unknown = generator.normal(size=(48, 2)), np.arange(48) % 5 == 0
    there, nameless = share(values[~unknown], groups[~unknown], "multi", 2), np.where(unknown, "", groups.astype(str))
    assert (
        share(np.where(unknown[:, None], np.nan, values), groups, "multi", 2)
        == share(values, nameless, "multi", 2)
        == there
    )
    classes = generator.integers(3, size=48)
    assert share(np.where(unknown, -1, classes), groups, "single", 3) == share(classes, nameless, "single", 3)
