"""The search: spaces, comparable losses, trials that are pruned, failed, killed and shared, and what it leaves behind."""

import contextlib
import json
import math
import os
import signal

import jax
import numpy as np
import pytest

from conclugen_jax import pretrain
from conclugen_jax.data import batches, builders, shards
from conclugen_jax.errors import ConclugenError
from conclugen_jax.evaluate import probe
from conclugen_jax.runs import checkpoint
from conclugen_jax.study import trials as trials_lib
from conclugen_jax.system import signals
from tests.helpers import Faces, log_without_times
from tests.searching import RATES, changed, imagine, make_config, opened, run


@pytest.fixture(scope="module")
def config(tmp_path_factory):
    return make_config(tmp_path_factory.mktemp("data"))


@pytest.fixture
def imagined(monkeypatch):
    return imagine(monkeypatch)


def test_the_probe_is_that_of_the_last_state_on_the_validation_split(config, tmp_path):
    config = changed(config, train__num_epochs=2)
    result = run(config, tmp_path, 1, objective="validation_probe")
    assert result["objective"]["name"] == "validation_probe"
    assert result["objective"]["direction"] == "maximize"
    model, variables, _ = probe.load(result["best"]["workdir"])
    tables = [
        batches.load(shards.ShardStream(shards.open_dataset(config.data.path), s, ["text"]), tier="host").table
        for s in ("train", "validation")
    ]
    vectors = tuple(probe.represent(model, variables, table["features"])["text"] for table in tables)
    found = probe.label_efficiency(
        {"x": vectors}, tables[0]["label"], tables[1]["label"], labels_per_class=(0,), num_draws=1
    )
    assert result["best"]["value"] == found[0].accuracy[0]
    assert 0.25 < result["best"]["value"] <= 1


def test_the_probe_needs_one_class_per_example_and_the_loss_none(config, tmp_path, imagined):
    unlabelled = changed(config, data__path=str(builders.build(Faces(kind="none"), tmp_path)))
    with pytest.raises(ConclugenError, match=r"labels of kind 'none'.*needs one class per example"):
        run(unlabelled, tmp_path / "search", 1, objective="validation_probe")
    assert not (tmp_path / "search").exists()
    assert run(unlabelled, tmp_path / "search", 1)["num_trials"]["finished"] == 1


def test_bad_values_are_stopped_early_and_only_the_best_keeps_its_checkpoints(config, tmp_path):
    space = {"optimizer.learning_rate": {"choices": [1e-2, 1e-9, 1e-8]}}
    result = run(changed(config, seed=3), tmp_path, 6, space)  # whose first draw is the good rate
    assert result == json.loads((tmp_path / "result.json").read_text())
    assert result["objective"]["name"] == "pretraining_loss"
    assert result["best"]["overrides"] == {"optimizer.learning_rate": 1e-2}
    pruned = [t for t in result["trials"] if t["state"] == "pruned"]
    assert len(pruned) == result["num_trials"]["pruned"] >= 2
    for t in result["trials"]:
        workdir = tmp_path / "trials" / f"{t['number']:04d}"
        epochs = log_without_times(workdir)[-1]["epoch"] + 1
        if t["state"] == "pruned":
            assert t["overrides"]["optimizer.learning_rate"] < 1e-2
            assert t["value"] is None
            assert epochs == max(map(int, t["values_by_epochs"])) < 8
        else:
            assert epochs == 8
            last = [r["loss/reconstruction"] for r in log_without_times(workdir) if r["epoch"] == 7]
            assert t["value"] == pytest.approx(np.mean(last))
        assert (workdir / checkpoint.FOLDER).exists() == (t["number"] == result["best"]["number"])
    probe.load(result["best"]["workdir"])


def test_trials_that_fail_are_recorded_with_their_sentence_and_the_search_goes_on(config, tmp_path):
    config = changed(config, train__num_epochs=2)
    space = {
        "optimizer.learning_rate": {"choices": [1e-3, 1e3]},
        "train.batch_size": {"choices": [16, 1000]},
    }
    result = run(config, tmp_path, 10, space)
    assert len(result["trials"]) == 10
    errors = {tuple(t["overrides"].values()): t["error"] for t in result["trials"] if t["state"] == "failed"}
    assert result["num_trials"]["failed"] >= 2
    for (rate, batch_size), error in errors.items():
        assert "only 64 usable examples" in error if batch_size == 1000 else "is not finite" in error
        assert (rate, batch_size) != (1e-3, 16)
    assert {batch_size for _, batch_size in errors} == {16, 1000}
    assert result["best"]["overrides"] == {"optimizer.learning_rate": 1e-3, "train.batch_size": 16}


@pytest.mark.parametrize(
    ("error", "state"),
    [
        (MemoryError(), "failed"),
        (jax.errors.JaxRuntimeError("RESOURCE_EXHAUSTED: Out of memory allocating 9 bytes"), "failed"),
        (jax.errors.JaxRuntimeError("INTERNAL: no"), "running"),
    ],
)
def test_out_of_memory_fails_the_trial_and_nothing_else_is_swallowed(
    config, tmp_path, monkeypatch, imagined, error, state
):
    imagined_run = pretrain.pretrain

    def first_fails(config, workdir, **more):
        if workdir.name == "0000":
            raise error
        imagined_run(config, workdir, **more)

    monkeypatch.setattr(pretrain, "pretrain", first_fails)
    with contextlib.nullcontext() if state == "failed" else pytest.raises(jax.errors.JaxRuntimeError):
        run(config, tmp_path, 2)
        first = json.loads((tmp_path / "result.json").read_text())["trials"][0]
        assert first["state"] == "failed"
        assert first["error"].startswith("out of memory (")


def test_a_full_disk_ends_the_search_not_the_trial(config, tmp_path, monkeypatch, imagined):
    imagined_run = pretrain.pretrain

    def disk_full(*_, **__):
        raise ConclugenError("metrics.jsonl: cannot be written; free space") from OSError(28, "No space left on device")

    monkeypatch.setattr(pretrain, "pretrain", disk_full)
    for _ in range(2 * trials_lib.STARTS):
        with pytest.raises(ConclugenError, match="free space"):
            run(config, tmp_path, 2)
    monkeypatch.setattr(pretrain, "pretrain", imagined_run)
    result = run(config, tmp_path, 2)
    assert result["num_trials"]["failed"] == 0
    assert [t["number"] for t in result["trials"]] == [0, 1]


def test_a_search_without_any_result_says_why(config, tmp_path):
    config = changed(config, train__num_epochs=1)
    with pytest.raises(ConclugenError, match=r"none of the 2 trials finished; trial 0: .*only 64 usable examples"):
        run(config, tmp_path, 2, {"train.batch_size": {"choices": [1000, 2000]}})
    assert json.loads((tmp_path / "result.json").read_text())["best"] is None


def test_going_on_gives_the_trials_of_an_uninterrupted_search(config, tmp_path, imagined):
    whole = run(config, tmp_path / "whole", 14)
    for num_trials in (1, 5, 14, 14, 3):
        parts = run(config, tmp_path / "parts", num_trials)
    assert len(parts["trials"]) == 14
    assert parts["trials"] == whole["trials"]
    rates = [t["overrides"]["optimizer.learning_rate"] for t in whole["trials"]]
    assert len(set(rates)) == 14
    assert whole["best"]["value"] == min(t["value"] for t in whole["trials"] if t["state"] == "finished")
    another = run(changed(config, seed=1), tmp_path / "seed", 1)
    assert another["trials"][0]["overrides"]["optimizer.learning_rate"] != rates[0]
    assert len([w for w, epoch in imagined if epoch == 7]) < 2 * 14  # not all were trained to the end


def test_the_sampler_learns(config, tmp_path, imagined):
    result = run(config, tmp_path, 30, {"optimizer.learning_rate": {"low": 1e-6, "high": 1.0, "log": True}})
    distance = [abs(math.log10(t["overrides"]["optimizer.learning_rate"]) + 3) for t in result["trials"]]
    assert np.mean(distance[-15:]) < 1.0  # 1.5 without learning


def left_running(folder, times=1):
    """A trial that its process took and left: killed."""
    for _ in range(times):
        with opened(folder) as trials:
            trial = trials._ask(10**6)
    return trial


def test_a_killed_trial_is_taken_up_first_and_given_up_after_several_kills(config, tmp_path, imagined):
    run(config, tmp_path, 1)
    assert left_running(tmp_path).number == 1
    assert not list((tmp_path / "trials").glob("*.lock"))
    result = run(config, tmp_path, 1)  # enough trials, but one is to be ended
    assert [t["state"] for t in result["trials"]][1] in ("finished", "pruned")
    assert left_running(tmp_path, times=trials_lib.STARTS).number == 2
    result = run(config, tmp_path, 4)
    assert [t["number"] for t in result["trials"]] == [0, 1, 2, 3]
    assert result["trials"][2]["state"] == "failed"
    assert "killed 3 times after step 0" in result["trials"][2]["error"]


def test_a_trial_killed_while_it_was_drawn_is_drawn_again(config, tmp_path, imagined):
    whole = run(config, tmp_path / "whole", 3)
    run(config, tmp_path / "killed", 1)
    with opened(tmp_path / "killed") as trials:
        trials.study.ask()
    assert run(config, tmp_path / "killed", 3)["trials"] == whole["trials"]


def test_a_trial_of_a_running_process_is_left_to_it(config, tmp_path, imagined):
    run(config, tmp_path, 1)
    with opened(tmp_path) as trials, trials.taken(10**6):
        result = run(config, tmp_path, 3)
    assert [t["state"] == "running" for t in result["trials"]] == [False, True, False]


def test_a_changed_search_is_refused_with_the_differences(config, tmp_path, imagined):
    run(config, tmp_path, 1)
    with pytest.raises(ConclugenError, match=r"config\.optimizer\.weight_decay: 0\.00032 -> 0\.5"):
        run(changed(config, optimizer__weight_decay=0.5), tmp_path, 1)
    with pytest.raises(ConclugenError, match="objective: pretraining_loss -> validation_probe"):
        run(config, tmp_path, 1, objective="validation_probe")
    space = {"optimizer.learning_rate": {"low": 1e-4, "high": 0.1, "log": True}}
    with pytest.raises(ConclugenError, match=r"space\.optimizer\.learning_rate\.high: 0\.01 -> 0\.1"):
        run(config, tmp_path, 1, space)
    with pytest.raises(ConclugenError, match=r"space\.optimizer\.b1\.high: \(absent\) -> 0\.9"):
        run(config, tmp_path, 1, RATES | {"optimizer.b1": {"low": 0.5, "high": 0.9}})
    assert len(run(config, tmp_path, 1)["trials"]) == 1


def test_changed_data_is_refused(config, tmp_path, imagined):
    config = changed(config, data__path=str(builders.build(Faces(), tmp_path)))
    run(config, tmp_path / "search", 1)
    builders.build(Faces(seed=5), tmp_path, overwrite=True)
    with pytest.raises(ConclugenError, match=r"data\.sha256: "):
        run(config, tmp_path / "search", 1)


def test_a_database_that_is_none_is_named(config, tmp_path, imagined):
    run(config, tmp_path, 1)
    (tmp_path / trials_lib.DATABASE).write_bytes(b"no database at all" * 100)
    with pytest.raises(ConclugenError, match=r"search\.sqlite: cannot be read or written"):
        run(config, tmp_path, 2)


def test_a_base_configuration_that_is_impossible_leaves_nothing(config, tmp_path):
    with pytest.raises(ConclugenError, match="only 64 usable examples"):
        run(changed(config, train__batch_size=1000), tmp_path / "search", 1)
    with pytest.raises(ConclugenError, match="the objective 'loss' is unknown"):
        run(config, tmp_path / "search", 1, objective="loss")
    assert not (tmp_path / "search").exists()


def test_a_signal_ends_the_search_between_two_runs_too(config, tmp_path, monkeypatch, imagined):
    imagined_run = pretrain.pretrain

    def signalled(*arguments, **more):
        imagined_run(*arguments, **more)
        os.kill(os.getpid(), signal.SIGTERM)

    monkeypatch.setattr(pretrain, "pretrain", signalled)
    with pytest.raises(signals.Interrupted) as stopped:
        run(config, tmp_path, 5)
    assert stopped.value.code == 143
    assert len(json.loads((tmp_path / "result.json").read_text())["trials"]) == 1


@pytest.mark.parametrize("name", ["a?b", "a%20b", "{a}"])
def test_a_folder_whose_name_no_database_can_have_is_refused(config, tmp_path, name):
    with pytest.raises(ConclugenError, match=r"name has \?, %, \{ or \}"):
        run(config, tmp_path / name, 1)
    assert not list(tmp_path.iterdir())


def test_rungs():
    assert trials_lib.rungs(60) == [7, 14, 28]
    assert trials_lib.rungs(8) == [1, 2, 4]
    assert trials_lib.rungs(1) == []
