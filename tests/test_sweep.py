"""The grid: every member is the fit of a run of its own, selection is by validation, few labels are drawn alike."""

import json

import jax
import numpy as np
import pytest

from conclugen_jax import downstream, pretrain, sweep
from conclugen_jax.data import builders
from conclugen_jax.errors import ConclugenError
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
    config = tiny_config(data, train__num_epochs=2, clustering__start_epoch=0, data__standardize=True)
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


def test_raw_features_are_swept_without_a_checkpoint(made, tmp_path):
    config = settings(
        made,
        downstream__protocol="raw_features",
        downstream__checkpoint="",
        data__standardize=True,
        train__num_epochs=20,
    )
    result = sweep.sweep(config, tmp_path / "grid")
    assert result["encoder"]["workdir"] is None
    assert result["selected"][0]["test"]["accuracy"] > 0.5
    own = alone(config, tmp_path / "alone", result["selected"][0])
    assert own["test"]["confusion_matrix"] == result["selected"][0]["test"]["confusion_matrix"]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"downstream__protocol": "supervised"}, "a sweep needs frozen representations"),
        ({"downstream__num_folds": 3, "downstream__fold": 0}, "stored splits"),
        ({"train__batch_size": 100}, "has only 64"),
        (
            {"sweep__labels_per_class": (60,)},
            "labelled examples, 60 per class were asked for|only with one class per example",
        ),
    ],
)
def test_what_cannot_be_swept_is_refused(made, tmp_path, changes, message):
    with pytest.raises(ConclugenError, match=message):
        sweep.sweep(settings(made, **changes), tmp_path / "run")
    assert not (tmp_path / "run" / "result.json").exists()
