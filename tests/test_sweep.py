"""The grid: every member is the fit of a run of its own, selection is by validation, few labels are drawn alike."""

import dataclasses
import functools
import json

import jax
import numpy as np
import pytest

from conclugen_jax import pretrain
from conclugen_jax.data import builders
from conclugen_jax.data.sources import LabelSpec
from conclugen_jax.errors import ConclugenError
from conclugen_jax.evaluate import best_epochs, downstream, sweep
from conclugen_jax.runs import config as config_lib
from tests.helpers import Faces, tiny_config

ONE = jax.devices()[:1]
RATES, DECAYS, SEEDS, DRAWS = (1e-2, 2e-3), (1e-3, 0.3), (0, 5), (1, 2)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("sweep")


@pytest.fixture(scope="module", params=["single", "multi"])
def made(request, folder):
    kind = request.param
    data = builders.build(Faces((64, 24, 23), missing=0.3, kind=kind, name=kind), folder / "data")
    config = tiny_config(data, train__num_epochs=2, clustering__start_epoch=0, data__standardize="split")
    pretrain.pretrain(config, folder / kind, devices=ONE)
    return kind, data, folder / kind


def settings(made, **changes):
    kind, data, pretrained = made
    return tiny_config(
        data,
        **{
            "downstream__checkpoint": str(pretrained),
            "train__num_epochs": 7,
            "schedule__warmup_epochs": 1,
            "schedule__period_epochs": 2,
            **changes,
        },
    )


def alone(config, folder, member):
    config = config.copy_and_resolve_references()
    config.optimizer.learning_rate = member["learning_rate"]
    config.optimizer.weight_decay = member["weight_decay"]
    config.seed = member["seed"]
    config.downstream.labels_per_class = member["labels_per_class"]
    config.downstream.label_draw = member["label_draw"]
    return downstream.downstream(config, folder, devices=ONE)


@pytest.mark.parametrize("patience", [0, 2])
def test_members_are_the_fits_done_one_by_one(made, tmp_path, patience):
    few = (3, 0) if made[0] == "single" else (0,)
    config = settings(
        made,
        downstream__early_stopping_epochs=patience,
        sweep__learning_rates=RATES,
        sweep__weight_decays=DECAYS,
        sweep__seeds=SEEDS,
        sweep__labels_per_class=few,
        sweep__label_draws=DRAWS,
    )
    result = sweep.sweep(config, tmp_path / "grid")
    draws = {3: DRAWS, 0: DRAWS[:1]}
    assert [(m["labels_per_class"], m["seed"], m["label_draw"]) for m in result["selected"]] == [
        (number, seed, draw) for number in few for seed in SEEDS for draw in draws[number]
    ]
    assert len(result["members"]) == 4 * len(result["selected"])
    for chosen in result["selected"]:
        same = [
            m for m in result["members"] if all(m[k] == chosen[k] for k in ("labels_per_class", "seed", "label_draw"))
        ]
        values = [m["validation/accuracy"] for m in same]
        assert chosen["learning_rate"] == same[int(np.argmax(values))]["learning_rate"]
        assert chosen["validation"]["accuracy"] == max(values)
    # Every member of one group, and the chosen one of the others, against a run of its own.
    compared = [
        m for m in result["members"] if m["seed"] == 5 and m["label_draw"] == 1 and m["labels_per_class"] == few[0]
    ]
    assert len(compared) == 4
    for i, member in enumerate(compared[::3]):
        own = alone(config, tmp_path / f"alone{i}", member)
        assert own["best_epoch"] == member["best_epoch"]
        assert own["validation"]["accuracy"] == pytest.approx(member["validation/accuracy"], abs=1e-12)
    for i, chosen in enumerate(result["selected"][1::2]):
        own = alone(config, tmp_path / f"chosen{i}", chosen)
        for split in ("validation", "test"):
            assert own[split]["confusion_matrix"] == chosen[split]["confusion_matrix"]
            assert own[split]["loss"] == pytest.approx(chosen[split]["loss"], rel=1e-5)
        assert own["num_train_examples"] == chosen["num_train_examples"]


def test_a_finished_sweep_is_returned_and_the_file_holds_it(made, tmp_path):
    config = settings(made, sweep__learning_rates=RATES, train__num_epochs=2)
    result = sweep.sweep(config, tmp_path)
    assert json.loads((tmp_path / "result.json").read_text()) == result
    before = (tmp_path / "result.json").stat().st_mtime_ns
    assert sweep.sweep(config, tmp_path) == result
    assert (tmp_path / "result.json").stat().st_mtime_ns == before
    assert not any("test" in key for member in result["members"] for key in member)


@pytest.fixture(scope="module")
def targets(folder):
    """Faces of which some lack text, with a number to predict that a third of the rows lack."""

    class Targets(Faces):
        def __init__(self):
            super().__init__((64, 40, 40), missing=0.4, seed=3, name="targets")
            object.__setattr__(self.spec, "targets", {"arousal": LabelSpec("value")})

        def examples(self, split):
            for i, e in enumerate(super().examples(split)):
                yield dataclasses.replace(e, targets={"arousal": e.label - 1.5 + 0.1 * (i % 5)} if i % 3 else {})

    return builders.build(Targets(), folder / "targets")


@pytest.mark.parametrize("target", ["", "arousal"])
def test_raw_features_one_modality_that_rows_lack_and_a_number(targets, tmp_path, target):
    """Rates at which members stop early and, if they went on, would find a lower loss again."""
    config = settings(
        ("single", targets, ""),
        downstream__protocol="raw_features",
        downstream__checkpoint="",
        downstream__modalities=("text",),
        downstream__target=target,
        downstream__early_stopping_epochs=1,
        data__standardize="split",
        train__num_epochs=20,
        sweep__learning_rates=(0.3, 0.01),
    )
    result = sweep.sweep(config, tmp_path / "grid")
    assert result["encoder"]["workdir"] is None
    measure = "mae" if target else "accuracy"
    for i, member in enumerate(result["members"]):
        own = alone(config, tmp_path / str(i), {**member})
        assert own["best_epoch"] == member["best_epoch"]
        assert own["validation"][measure] == pytest.approx(member[f"validation/{measure}"], rel=1e-5)
        if member["learning_rate"] == result["selected"][0]["learning_rate"]:
            assert own["test"]["loss"] == pytest.approx(result["selected"][0]["test"]["loss"], rel=1e-5)
    values = [m[f"validation/{measure}"] for m in result["members"]]
    best = (min if target else max)(values)
    assert result["selected"][0]["validation"][measure] == pytest.approx(best, rel=1e-6)
    if not target:  # rows without the modality are scored too
        assert np.sum(result["selected"][0]["test"]["confusion_matrix"]) == 40


def test_stopped_members_stay_stopped_and_those_without_numbers_never_win(monkeypatch):
    """Validation losses by hand: 3 2 4 1 with a patience of 1 stops after the third epoch; NaN counts for nothing."""
    losses = np.array([[3, 2, 4, 1, 1], [np.nan] * 5, [5, 4, 3, 2, 2]], np.float32)
    right = np.array([[1, 2, 2, 4, 4], [4] * 5, [0, 1, 2, 3, 3]])
    seen = []

    def evaluate(*_):
        at = len(seen)
        labels = np.where(np.arange(4)[None, :] < right[:, at, None], 0, 1)
        logits = np.stack([1 - labels, labels], axis=-1).astype(np.float32)
        return logits[None], losses[None, :, at]

    config = tiny_config(train__num_epochs=5, train__batch_size=4, downstream__early_stopping_epochs=1)
    members = sweep.Members([(rate, 0.0) for rate in (0.1, 0.2, 0.3)], [(0, 0)], [np.arange(4)])
    made = sweep.Grid(config, LabelSpec("single", ("a", "b")), members, dim=2)
    monkeypatch.setattr(made, "_epoch", lambda state, *_: state)
    monkeypatch.setattr(made, "_evaluate", evaluate)
    monkeypatch.setattr(made, "_keep", lambda improved, new, old: seen.append(improved[0].tolist()))
    vectors = {
        name: sweep.Vectors(np.zeros((4, 2)), np.zeros(4, int), np.arange(4)) for name in ("train", "validation")
    }
    best, _ = made.fit(vectors)
    np.testing.assert_array_equal(best.measure[0], [0.5, -np.inf, 0.75])
    np.testing.assert_array_equal(best.epoch[0], [1, 0, 3])
    assert seen == [[True, False, True], [True, False, True], [False, False, True], [False, False, True], [False] * 3]


def test_a_loss_that_is_no_number_counts_as_no_lower_one_and_a_later_one_may_be_lower():
    best = best_epochs.BestEpochs("accuracy", patience=2)
    epochs = [(0.5, 2.0), (0.9, np.nan), (0.6, 1.0), (0.6, 3.0)]
    assert [bool(best.improved(i, *x)) for i, x in enumerate(epochs)] == [True, False, True, False]
    assert best.running
    assert (best.epoch, best.measure) == (2, 0.6)
    best.improved(4, 0.5, 1.0)
    assert not best.running
    assert not best.improved(5, 1.0, 0.5)


def test_equals_are_told_apart_by_their_loss_where_that_is_asked_for():
    epochs = [(0.5, 2.0), (1.0, 3.0), (1.0, 2.5), (1.0, 2.7), (0.9, 0.1), (1.0, np.nan)]
    for by_loss, expected in ((False, 1), (True, 2)):
        best = best_epochs.BestEpochs("accuracy", patience=0, by_loss=by_loss)
        for i, scores in enumerate(epochs):
            best.improved(i, *scores)
        assert (best.epoch, best.measure) == (expected, 1.0)


def test_losses_that_are_never_finite_are_an_error(targets, tmp_path):
    changes = {"optimizer__learning_rate": 1e3, "optimizer__weight_decay": 1e30, "downstream__target": "arousal"}
    raw = {"downstream__protocol": "raw_features", "downstream__checkpoint": "", "train__num_epochs": 3}
    config = settings(("", targets, ""), schedule__warmup_epochs=0, **raw, **changes)
    for run in (sweep.sweep, functools.partial(downstream.downstream, devices=ONE)):
        with pytest.raises(ConclugenError, match="the validation loss is not finite in any epoch"):
            run(config, tmp_path)
        assert not (tmp_path / "result.json").exists()


def test_a_class_that_no_training_example_has_is_named(capsys, tmp_path):
    class Faceless(Faces):
        def examples(self, split):
            yield from (e for e in super().examples(split) if split != "train" or e.label != 2)

    data = builders.build(Faceless((30, 12, 12)), tmp_path / "data")
    raw = {"downstream__protocol": "raw_features", "downstream__checkpoint": "", "train__num_epochs": 1}
    sweep.sweep(settings(("", data, ""), **raw), tmp_path / "run")
    assert capsys.readouterr().err.count("no training example is 'sad'; the classifier cannot learn to predict it") == 1


@pytest.mark.parametrize(
    ("key", "values"),
    [
        ("sweep.learning_rates", (-1.0,)),
        ("sweep.weight_decays", (float("nan"),)),
        ("sweep.seeds", (0, 0)),
        ("sweep.labels_per_class", (-2,)),
        ("sweep.label_draws", (-3,)),
    ],
)
def test_lists_of_impossible_values_are_refused(key, values):
    with pytest.raises(ConclugenError, match=f"config.{key} is .*each once"):
        config_lib.check(tiny_config("data", **{key.replace(".", "__"): values}))


@pytest.mark.parametrize(
    ("key", "values", "kind"), [("sweep.learning_rates", ("a",), "float"), ("sweep.seeds", (1.5,), "int")]
)
def test_lists_of_another_type_are_refused(key, values, kind):
    with pytest.raises(ConclugenError, match=rf"config.{key} is .*, expected tuple of {kind} \(such as"):
        config_lib.check(tiny_config("data", **{key.replace(".", "__"): values}))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"downstream__protocol": "supervised"}, "a sweep needs frozen representations"),
        ({"downstream__num_folds": 2}, "there must be at least 3 folds"),
    ],
)
def test_what_cannot_be_swept_is_refused(made, tmp_path, changes, message):
    with pytest.raises(ConclugenError, match=message):
        sweep.sweep(settings(made, **changes), tmp_path / "run")
    assert not (tmp_path / "run" / "result.json").exists()


def test_few_of_several_labels_are_refused_and_few_of_one_are_used(made, tmp_path, capsys):
    config = settings(made, sweep__labels_per_class=(60,), train__num_epochs=1)
    if made[0] == "multi":
        with pytest.raises(ConclugenError, match="only with one class per example"):
            sweep.sweep(config, tmp_path)
        return
    (line,) = sweep.sweep(config, tmp_path)["warnings"]
    assert line.startswith("warning: fewer labelled training examples than the 60 per class asked for: 'calm' ")
    assert capsys.readouterr().err.count(line) == 1
