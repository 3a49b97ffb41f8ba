"""Folds over examples: stratified by label, deterministic, and with the warning that persons may be mixed."""

import dataclasses
import json

import jax
import numpy as np
import pytest
from sklearn.model_selection import StratifiedKFold

from conclugen_jax.data import builders, manifest as manifest_lib, sources
from conclugen_jax.data.sources import Annotations
from conclugen_jax.errors import ConclugenError
from conclugen_jax.evaluate import downstream, sweep
from conclugen_jax.study import study as study_lib
from tests.helpers import Faces, run, tiny_config
from tests.studies import definition

ONE = jax.devices()[:1]
MIXED = "warning: the folds are cut over examples, so examples of one person may be in training and test"
BY_EXAMPLE = {"downstream__num_folds": 3, "downstream__fold_by": "example"}


def rows_of(label, group=""):
    n = 47 if label is None else len(label)
    return Annotations(list(range(n)), [group] * n, label, {}, list(range(n)))


RNG = np.random.default_rng(0)
LABELS = {
    "single": np.repeat([0, 1, 2, 3], [20, 13, 12, 2]),
    "single, with unknown ones": RNG.permutation(np.repeat([-1, 0, 1], [7, 20, 20])),
    "multi": (RNG.random((47, 3)) < 0.5).astype(np.float32),
    "value": RNG.normal(size=47).astype(np.float32),
    "value, with unknown ones": np.where(RNG.random(47) < 0.2, np.nan, RNG.normal(size=47)).astype(np.float32),
    "none": None,
}


@pytest.mark.parametrize("num_folds", [3, 5, 10])
@pytest.mark.parametrize("kind", LABELS)
def test_every_example_is_tested_once_and_folds_are_alike(kind, num_folds):
    label, tested, counts = LABELS[kind], [], []
    for fold in range(num_folds):
        cut = sources.by_example(rows_of(label), num_folds, fold, where="x")
        assert list(cut) == ["train", "validation", "test"]
        assert sorted(cut["train"].ids + cut["validation"].ids + cut["test"].ids) == list(range(47))
        own = cut["test"].ids
        before = sources.by_example(rows_of(label), num_folds, (fold or num_folds) - 1, where="x")
        assert before["test"].ids == cut["validation"].ids
        assert sources.by_example(rows_of(label), num_folds, fold, where="x")["test"].ids == own
        assert sources.by_example(rows_of(label), num_folds, fold, where="x", seed=1)["test"].ids != own
        tested.append(own)
        if "single" in kind:
            counts.append(np.bincount(label[own] + 1, minlength=5))
        elif kind == "multi":
            counts.append(np.bincount((label[own] @ [4, 2, 1]).astype(int), minlength=8))
        elif kind == "value":  # of as many ranks together as there are folds, one each
            ranks = label.argsort().argsort()
            assert len(set(ranks[own] // num_folds)) == len(own)
    assert sorted(np.concatenate(tested)) == list(range(47))
    assert np.ptp([len(own) for own in tested]) <= 1
    assert not counts or np.ptp(counts, axis=0).max() <= 1
    if kind == "single, with unknown ones" and num_folds < 10:  # scikit-learn has the same numbers
        theirs = StratifiedKFold(num_folds).split(label, np.sort(label))
        theirs = [np.bincount(np.sort(label)[test] + 1, minlength=5) for _, test in theirs]
        np.testing.assert_array_equal(counts, theirs)


@pytest.mark.parametrize("option", ["--", "--config.downstream."])
@pytest.mark.parametrize(
    ("groups", "found"),
    [(["", "", "", ""], "no example has a group"), (["a", "b", "c", ""], "1 of 4 examples have no group")],
)
def test_without_groups_folds_over_examples_are_offered(groups, found, option):
    rows = dataclasses.replace(rows_of(np.arange(4)), groups=groups)
    message = (
        rf"^x: {found}.*stratify the folds by label with {option}fold_by=example \(a person may then be in two folds\)$"
    )
    with pytest.raises(ConclugenError, match=message):
        sources.by_group(rows, 3, 0, where="x", option=option)


@pytest.mark.parametrize(("num_folds", "fold"), [(2, 0), (3, 3), (3, -1), (5, 0)])
def test_impossible_folds_over_examples_are_refused(num_folds, fold):
    message = f"^x: fold {fold} of {num_folds} over 4 examples; expected at least 3 folds, at most as many as examples"
    with pytest.raises(ConclugenError, match=message):
        sources.by_example(rows_of(np.arange(4)), num_folds, fold, where="x")


class Nobody(Faces):
    """Examples without group, two of them angry."""

    def examples(self, split):
        angry = 0
        for e in super().examples(split):
            angry += e.label == 3
            if e.label != 3 or angry <= 2:
                yield dataclasses.replace(e, group="")


@pytest.fixture(scope="module")
def nobody(tmp_path_factory):
    return builders.build(Nobody((48, 4, 4)), tmp_path_factory.mktemp("nobody"))


def settings(data, **changes):
    raw = {"downstream__protocol": "raw_features", "data__standardize": "split", "train__num_epochs": 2}
    return tiny_config(data, **raw, **changes)


def test_downstream_over_examples_says_once_that_persons_are_mixed(nobody, tmp_path, capsys):
    with pytest.raises(ConclugenError, match=r"no example has a group .* with --config\.downstream\.fold_by=example"):
        downstream.downstream(settings(nobody, downstream__num_folds=3), tmp_path / "run", devices=ONE)
    assert not (tmp_path / "run").exists()  # so that the way out works in the same folder
    result = downstream.downstream(settings(nobody, **BY_EXAMPLE), tmp_path / "run", devices=ONE)
    shown = capsys.readouterr().err
    assert shown.count(MIXED) == 1
    few = "warning: fewer examples than the 3 folds: 'angry' 2; some folds do not test such a class"
    assert shown.count(few) == 1
    kept = json.loads((tmp_path / "run/result.json").read_text())
    assert kept == result
    assert kept["fold_by"] == "example"
    assert (kept["warnings"][0][: len(MIXED)], kept["warnings"][1]) == (MIXED, few)
    (examples,) = (f["num_examples"] for s, f in manifest_lib.read(nobody).splits.items() if s == "train")
    assert np.sum(kept["test"]["confusion_matrix"]) == examples
    one = downstream.downstream(
        settings(nobody, **BY_EXAMPLE, downstream__fold=1), tmp_path / "run/fold_1", devices=ONE
    )
    assert one["test"]["accuracy"] == kept["test_folds"]["accuracy"][1]
    assert capsys.readouterr().err.count(MIXED) == 1


def test_a_sweep_chooses_in_every_fold_what_single_folds_choose(nobody, tmp_path, capsys):
    grid = {"sweep__learning_rates": (1e-2, 1e-3), "sweep__labels_per_class": (2, 0), "sweep__label_draws": (0, 1)}
    config = settings(nobody, **BY_EXAMPLE, **grid)
    result = sweep.sweep(config, tmp_path / "grid")
    assert capsys.readouterr().err.count(MIXED) == 1
    assert [(s["labels_per_class"], s["label_draw"]) for s in result["selected"]] == [(2, 0), (2, 1), (0, 0)]
    each = [json.loads((tmp_path / f"grid/fold_{i}/result.json").read_text()) for i in range(3)]
    for i, chosen in enumerate(result["selected"]):
        own = [one["selected"][i] for one in each]
        assert chosen["test_folds"]["accuracy"] == [one["test"]["accuracy"] for one in own]
        assert chosen["test"]["accuracy"] == pytest.approx(np.mean(chosen["test_folds"]["accuracy"]))
        assert chosen["learning_rate"] == [one["learning_rate"] for one in own]
    assert [m["fold"] for m in result["members"]] == [0] * 6 + [1] * 6 + [2] * 6
    assert json.loads((tmp_path / "grid/result.json").read_text()) == result
    alone = config.copy_and_resolve_references()
    alone.downstream.fold, alone.optimizer.learning_rate = 2, result["selected"][2]["learning_rate"][2]
    own = downstream.downstream(alone, tmp_path / "alone", devices=ONE)
    assert own["test"]["confusion_matrix"] == each[2]["selected"][2]["test"]["confusion_matrix"]


def test_a_study_in_folds(nobody, tmp_path, monkeypatch):
    monkeypatch.setattr(jax, "devices", lambda *_: ONE)
    begun = []

    def work(root, waiting, *_):
        begun.extend(chain for (chain,) in waiting if chain[0].protocol != "pretraining")
        for chain in begun:
            study_lib.work_through(root, [chain])

    monkeypatch.setattr(study_lib, "work", work)
    study = definition(nobody, ("raw_features", "supervised"), seeds=(0,))
    for protocol in study.datasets.faces.protocols.values():
        protocol.downstream.num_folds, protocol.downstream.fold_by, protocol.train.num_epochs = 3, "example", 1
    found = study_lib.run(study, tmp_path)
    cells = [cell for cell in found["cells"] if cell["status"] == "done"]
    assert [cell["method"] for cell in cells] == ["supervised", "raw_features"]
    (examples,) = (f["num_examples"] for s, f in manifest_lib.read(nobody).splits.items() if s == "train")
    for cell in cells:
        assert np.sum(cell["confusion_matrix"]) == examples * cell["draws"]
    assert sum(line.startswith(f"faces: {MIXED.removeprefix('warning: ')}") for line in found["warnings"]) == 1
    few = "fewer labelled training examples than the 3 per class asked for: 'angry' 1; all of these are used (fold "
    assert any(few in line for line in found["warnings"])
    # Repeated it is finished; with other folds it is refused as another configuration.
    del begun[:]
    study_lib.run(study, tmp_path)
    assert not begun
    study.datasets.faces.protocols.raw_features.downstream.num_folds = 4
    (again,) = study_lib.chosen(study_lib.run(study, tmp_path)["cells"], method="raw_features")
    assert "num_folds: 3 -> 4" in again["error"]


def test_a_key_that_a_run_of_an_earlier_version_lacks_counts_as_its_default(nobody, tmp_path):
    config = settings(nobody)
    result = downstream.downstream(config, tmp_path, devices=ONE)
    tree = json.loads((tmp_path / "config.json").read_text())
    del tree["downstream"]["fold_by"]
    (tmp_path / "config.json").write_text(json.dumps(tree))
    config.downstream.fold_by = "example"
    with pytest.raises(
        ConclugenError, match=r"another configuration \(config.downstream.fold_by: \(absent\) -> example\)"
    ):
        downstream.downstream(config, tmp_path, devices=ONE)
    config.downstream.fold_by = "group"
    assert downstream.downstream(config, tmp_path, devices=ONE) == result


def test_build_over_examples(tmp_path):
    (tmp_path / "mine").mkdir()
    np.save(tmp_path / "mine/video.npy", np.random.default_rng(0).normal(size=(12, 3)).astype(np.float32))
    ids = [f"c{i:02d}" for i in range(12)]
    (tmp_path / "mine/video.txt").write_text("\n".join(ids))
    rows = [f"{name},{'joy' if i < 9 else 'fear'}" for i, name in enumerate(ids)]
    (tmp_path / "mine/labels.csv").write_text("\n".join(["id,label", *rows]))
    flags = ["--dataset=features", "--name=mine", f"--source={tmp_path}/mine", f"--data_dir={tmp_path}/data"]
    said = run("build", *flags, "--num_folds=3", code=2).stderr
    assert "no example has a group (person), but folds need one" in said
    assert "with --fold_by=example" in said
    assert "--fold_by=example without --num_folds" in run("build", *flags, "--fold_by=example", code=2).stderr
    shown = run("build", *flags, "--num_folds=3", "--fold=1", "--fold_by=example").stdout
    assert shown.count(MIXED) == 1
    made = manifest_lib.read(tmp_path / "data/mine_fold1of3/1.0.0")
    assert (made.source["folds"], made.source["fold_by"]) == ([3, 1], "example")
    assert {split: facts["num_examples"] for split, facts in made.splits.items()} == dict.fromkeys(made.splits, 4)
    assert made.warnings == [sources.MIXED_PERSONS]
    assert "strict" in run("build", *flags, "--num_folds=3", "--fold=2", "--fold_by=example", "--strict", code=2).stderr
    assert [facts["label_counts"] for facts in made.splits.values()] == [[1, 3]] * 3
