"""Runs trained together: each as it would be alone but for rounding; what cannot be trained so is trained alone."""

import json

import jax
import numpy as np
import pytest
from ml_collections import ConfigDict

from conclugen_jax import pretrain
from conclugen_jax.data import builders
from conclugen_jax.evaluate import weights
from conclugen_jax.pretrain import together
from conclugen_jax.runs import checkpoint
from conclugen_jax.study import definition as study_runs, study as study_lib
from tests.helpers import Faces, close, log_without_times, tiny_config
from tests.studies import definition

ONE = jax.devices()[:1]
LAST_ONLY = {"train__num_epochs": 3, "clustering__start_epoch": 1, "checkpoint__every_epochs": 3}


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    sources = [Faces((size, 8, 16), missing=0.3, seed=seed) for size, seed in ((64, 0), (96, 0), (64, 1))]
    return [str(builders.build(source, tmp_path_factory.mktemp("data"))) for source in sources]


@pytest.fixture(autouse=True)
def one_device(monkeypatch):
    monkeypatch.setattr(jax, "devices", lambda *_: ONE)


def config(path, seed, **changes):
    return tiny_config(path, seed=seed, **LAST_ONLY, **changes)


@pytest.mark.parametrize(
    ("changes", "by_turns"),
    [
        ({"loss__clustering_weight": 0.0, "online_probe__health": True}, True),
        ({"data__standardize": "person", "augmentation__feature_dropout": 0.3, "loss__neighbours": 2}, False),
    ],
    ids=["without clustering, by turns", "recommended, one axis more"],
)
def test_members_are_what_they_would_be_alone(data, tmp_path, monkeypatch, changes, by_turns):
    program = together._program
    monkeypatch.setattr(together, "_program", lambda *a, **_: program(*a, by_turns=by_turns))
    # AdamW would make steps of full length out of gradients that are rounding alone.
    sgd = {"optimizer__name": "sgd", "optimizer__learning_rate": 0.05}
    configs = [config(data[i], seed, **sgd, **changes) for i, seed in ((0, 0), (2, 5))]  # of one size, as folds are
    assert together.pretrain_together(configs, [tmp_path / "0", tmp_path / "5"]) == [True, True]
    states = {}
    for one in configs:
        alone = tmp_path / f"alone_{one.seed}"
        states[one.seed] = pretrain.pretrain(one, alone, devices=ONE)
        mine = tmp_path / str(one.seed)
        assert (mine / "config.json").read_text() == (alone / "config.json").read_text()
        for a, b in zip(log_without_times(mine), log_without_times(alone), strict=True):
            assert a.keys() == b.keys()
            assert all(close(a[key], b[key], 1e-4) for key in a)
        found, expected = (weights.load(folder)[1] for folder in (mine, alone))
        jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-4), found, expected)
    different = jax.tree.map(lambda a, b: np.abs(a - b).max(), states[0].params, states[5].params)
    assert max(jax.tree.leaves(different)) > 0.05  # seeds matter by more than rounding
    # A finished member is a finished run, whole with what resuming needs.
    before = checkpoint.fingerprint(checkpoint.to_tree(pretrain.pretrain(configs[1], tmp_path / "5", devices=ONE)))
    assert (
        checkpoint.fingerprint(checkpoint.to_tree(pretrain.pretrain(configs[1], tmp_path / "5", devices=ONE))) == before
    )
    assert int(states[5].step) == max(int(p.name) for p in (tmp_path / "5/checkpoints").iterdir() if p.name.isdecimal())


def test_only_runs_that_differ_in_seed_and_data_are_of_a_kind(data):
    one = config(data[0], 0)
    assert together.kind(one) == together.kind(config(data[1], 3))
    assert together.kind(one) != together.kind(config(data[0], 0, optimizer__learning_rate=0.5))
    alone = {
        "checkpoint__every_epochs": 1,
        "checkpoint__best_by": "probe",
        "online_probe__every_epochs": 1,
        "train__tensorboard": True,
        "train__tracker": "wandb",
        "loss__instance_weight": 1.0,
        "data__tier": "shards",
    }
    for key, value in alone.items():
        assert together.kind(tiny_config(data[0], **(LAST_ONLY | {key: value}))) is None


def test_other_sizes_and_bad_steps_are_left_to_runs_of_their_own(data, tmp_path, monkeypatch):
    configs = [config(path, seed) for path, seed in ((data[0], 0), (data[1], 1), (data[0], 2))]
    recorded = together._recorded
    monkeypatch.setattr(
        together, "_recorded", lambda member, *rest: recorded(member, *rest) and member.run.config.seed != 2
    )
    assert together.pretrain_together(configs, [tmp_path / str(i) for i in range(3)]) == [True, False, False]
    assert [any((tmp_path / f"{i}/checkpoints").glob("*")) for i in range(3)] == [True, False, False]


def test_rows_too_large_for_the_device_are_left_to_runs_of_their_own(data, tmp_path):
    configs = [config(data[0], seed, data__device_table_gib=0.0) for seed in (0, 1)]
    assert together.pretrain_together(configs, [tmp_path / "0", tmp_path / "1"]) == [False, False]


def test_a_bad_step_is_seen(data, tmp_path):
    configs = [config(data[0], seed, optimizer__learning_rate=1e3, schedule__warmup_epochs=0) for seed in (0, 1)]
    for one in configs:
        one.train.max_loss_ratio = 0.0
    finished = together.pretrain_together(configs, [tmp_path / "0", tmp_path / "1"])
    for i, good in enumerate(finished):
        losses = [json.loads(line)["loss"] for line in (tmp_path / f"{i}/metrics.jsonl").read_text().splitlines()]
        assert np.isfinite(losses).all()
        assert good == (len(losses) == 3 * (64 // configs[0].train.batch_size))


def study_of(path, **changes):
    study = definition(path, ("probe",), **changes)
    study.methods.conclugen.pretraining.checkpoint.every_epochs = study.methods.conclugen.pretraining.train.num_epochs
    return study


def test_a_study_trains_seeds_together_and_goes_on_where_it_was(data, tmp_path, monkeypatch):
    study = study_of(data[0])
    monkeypatch.setattr(study_lib, "work", lambda root, waiting, *_: [study_lib.work_through(root, c) for c in waiting])
    (first,) = (c for c in study_runs.cohorts(study_runs.chains(study)) if c[0][0].protocol == "pretraining")
    assert [chain[0].seed for chain in first] == [0, 1]
    found = study_lib.run(study, tmp_path)
    assert {cell["status"] for cell in found["cells"]} == {"done"}
    for seed in (0, 1):
        assert json.loads((tmp_path / f"pretraining/conclugen/seed_{seed}/done.json").read_text()) == {"together": 2}
    assert not list(tmp_path.rglob("failed.json"))
    study.seeds = (0, 1, 2)
    again = study_lib.run(study, tmp_path)  # the third seed is trained by itself
    assert json.loads((tmp_path / "pretraining/conclugen/seed_2/done.json").read_text())["steps"] > 0
    kept = [cell for cell in again["cells"] if cell["seed"] < 2]
    assert kept == found["cells"]


def test_a_lost_process_leaves_the_other_chains_of_its_cohort(data, tmp_path):
    cohort = next(iter(study_runs.cohorts(study_runs.chains(study_of(data[0])))))
    chains = [chain for chain in cohort if chain[0].protocol == "pretraining"]
    study_lib._mark(tmp_path, chains[0][0], study_lib.BEGUN)
    left = study_lib._left(tmp_path, chains, -9)
    assert left == [chains[1]]  # all of the first depends on its pretraining
    assert study_lib.results.failure(tmp_path / chains[0][1].path).startswith("its pretraining failed")


def test_runs_whose_process_was_lost_are_tried_alone(data, tmp_path, monkeypatch):
    cohort = next(iter(study_runs.cohorts(study_runs.chains(study_of(data[0], seeds=(0, 1, 2))))))
    asked = []

    def none_finished(configs, _):
        asked.extend(one.seed for one in configs)
        return [False] * len(configs)

    monkeypatch.setattr(together, "pretrain_together", none_finished)
    study_lib._mark(tmp_path, cohort[0][0], study_lib.BEGUN)
    study_lib.mark_lost(tmp_path, cohort[0], -9)
    assert study_lib._pretrained_together(tmp_path, [chain[0] for chain in cohort]) == set()
    assert asked == [1, 2]


def test_folds_are_paths_of_seeds():
    study = ConfigDict({"num_folds": 3})
    path = "data/x_fold{fold}of3_seed{shuffle}/1.0.0"
    found = [study_runs.path_of(study, path, seed) for seed in (0, 2, 3, 7)]
    assert found == [f"data/x_fold{f}of3_seed{s}/1.0.0" for f, s in ((0, 1), (2, 1), (0, 2), (1, 3))]
    study.num_folds = 0
    assert study_runs.path_of(study, "data/x", 3) == "data/x"
