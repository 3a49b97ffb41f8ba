"""Figures of health that a run logs beside its losses: what they are, when, and that training is the same without them."""

import jax
import numpy as np
import pytest

from conclugen_jax import pretrain
from conclugen_jax.data import builders
from conclugen_jax.evaluate import health, weights
from conclugen_jax.pretrain.recorder import Recorder
from conclugen_jax.runs import log as log_lib
from conclugen_jax.train import feed
from tests.helpers import Faces, assert_same_bits, log_without_times, tiny_config

STEPS = [6, 12, 18, 24]


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return builders.build(Faces((96, 72, 8), missing=0.3), tmp_path_factory.mktemp("data"))


def trained(data, folder, devices=1, on_epoch=None, **changes):
    config = tiny_config(data, **{"online_probe__health": True, "checkpoint__every_epochs": 1, **changes})
    return pretrain.pretrain(config, folder, devices=jax.devices()[:devices], on_epoch=on_epoch)


def measured(folder):
    return {r["step"]: r for r in log_lib.records(folder / log_lib.METRICS) if "health/rows" in r}


def test_a_run_logs_at_its_end_what_is_computed_of_its_last_checkpoint(data, tmp_path, monkeypatch):
    trained(data, tmp_path, train__log_every_steps=5)
    assert list(measured(tmp_path)) == [24]  # too few examples were trained on for one before
    logged = health.of_run(tmp_path)
    monkeypatch.setattr(weights, "restore", None)
    assert health.of_run(tmp_path) == logged
    monkeypatch.undo()
    log = tmp_path / log_lib.METRICS
    log.write_text("\n".join(log.read_text().splitlines()[:-1]) + "\n")
    computed = health.of_run(tmp_path)
    names = {name for name in logged if name.startswith(("health/", "chance/", "best/"))}
    assert {"health/recall_at_1", "chance/contrastive", "best/clustering"} < names <= computed.keys()
    assert {name: computed[name] for name in names} == pytest.approx({name: logged[name] for name in names}, rel=1e-5)


def test_it_is_measured_at_checkpoints_and_changes_nothing(data, tmp_path, monkeypatch):
    monkeypatch.setattr(health, "TRAINED_BETWEEN", 1)
    for name, devices, changes in (
        ("one", 1, {}),
        ("split", 8, {"optimizer__shard": True}),
        ("without", 1, {"online_probe__health": False}),
        ("fewer", 1, {"checkpoint__every_epochs": 3}),
    ):
        state = trained(data, tmp_path / name, devices, **changes)
        if name == "one":
            expected = state
        elif name == "without":
            assert_same_bits(state.params, expected.params)
    assert {name: list(measured(tmp_path / name)) for name in ("one", "split", "without", "fewer")} == {
        "one": STEPS,
        "split": STEPS,
        "without": [],
        "fewer": [18, 24],
    }
    one, split = (measured(tmp_path / name) for name in ("one", "split"))
    ranks = [[found[step]["health/effective_rank"] for step in STEPS] for found in (one, split)]
    assert ranks[1] == pytest.approx(ranks[0], rel=1e-2)
    assert len(set(ranks[0])) == len(STEPS)


def test_a_resumed_run_logs_the_same(data, tmp_path, monkeypatch):
    monkeypatch.setattr(health, "TRAINED_BETWEEN", 1)
    trained(data, tmp_path / "whole")

    def cut(epoch, means, state):
        if epoch == 2:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        trained(data, tmp_path / "cut", on_epoch=cut)
    trained(data, tmp_path / "cut")
    assert log_without_times(tmp_path / "cut") == log_without_times(tmp_path / "whole")


def test_what_is_wrong_is_said_once_while_it_trains(data, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(health, "TRAINED_BETWEEN", 1)
    trained(data, tmp_path, optimizer__learning_rate=1e-12, clustering__start_epoch=3)
    said = [line for line in capsys.readouterr().err.splitlines() if "warning: " in line]
    kinds = [line.partition("(")[0] for line in said]
    assert "warning: the contrastive loss has not left chance " in kinds
    assert len(set(kinds)) == len(kinds)


def test_figures_that_cannot_be_measured_are_not_those_before(data, tmp_path):
    metrics, dispatch = {"loss": np.ones(1), "gradient_norm": np.ones(1)}, feed.Dispatch(0, 0, 1, 1, False)
    with log_lib.MetricsLog(tmp_path, 0) as log:
        recorder = Recorder(tiny_config(data), log, None, {"epoch_sums": {}, "epoch_steps": {}})
        recorder.take(dispatch, metrics)
        assert recorder.measure(lambda: {"health/rows": 3.0}) == {"health/rows": 3.0, "loss": 1.0}
        recorder.take(dispatch._replace(first_step_in_epoch=1, end_step=2), metrics)
        assert recorder.measure(dict) == {}
