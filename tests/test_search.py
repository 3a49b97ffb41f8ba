"""The search: spaces, comparable losses, trials that are pruned, failed, killed and shared, and what it leaves behind."""

import contextlib
import json
import math
import os
import shlex
import signal
import subprocess
import sys
import time
from pathlib import Path

import jax
import numpy as np
import pytest

from conclugen_jax import pretrain
from conclugen_jax.data import batches, builders, shards
from conclugen_jax.errors import ConclugenError
from conclugen_jax.evaluate import probe
from conclugen_jax.pretrain import recorder
from conclugen_jax.run import checkpoint
from conclugen_jax.run import workdir as workdir_lib
from conclugen_jax.study import search, search_space
from conclugen_jax.study import trials as trials_lib
from conclugen_jax.system import signals
from tests.helpers import QUICK_COMPILATION, Faces, log_without_times, tiny_config

ROOT = Path(__file__).parent.parent
DEVICES = jax.devices()[:1]
RATES = {"optimizer.learning_rate": {"low": 1e-4, "high": 1e-2, "log": True}}


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return builders.build(Faces((64, 32, 8)), tmp_path_factory.mktemp("data"))


@pytest.fixture(scope="module")
def config(data):
    """Reconstruction of one modality: compiled in no time."""
    return tiny_config(
        data,
        data__modalities=("text",),
        loss__contrastive_weight=0.0,
        loss__clustering_weight=0.0,
        schedule__warmup_epochs=0,
        train__num_epochs=8,
    )


def changed(config, **changes):
    return search_space.with_overrides(config, {k.replace("__", "."): v for k, v in changes.items()})


def run(config, folder, num_trials, space=RATES, **more):
    return search.search(config, folder, num_trials=num_trials, space=space, devices=DEVICES, **more)


@pytest.fixture
def imagined(monkeypatch):
    """Pretraining that takes no time: its loss is the distance of the rate from 1e-3; notes (workdir, epochs) it ran."""
    ran = []

    def pretrained(config, workdir, *, devices, on_epoch):
        rate = config.optimizer.learning_rate
        (workdir / checkpoint.FOLDER / "7").mkdir(parents=True)
        for epoch in range(config.train.num_epochs):
            ran.append((workdir.name, epoch))
            on_epoch(epoch, {"loss": -1.0, "loss/reconstruction": abs(math.log10(rate) + 3) + 1 / (epoch + 1)}, None)

    monkeypatch.setattr(pretrain, "pretrain", pretrained)
    return ran


# The hook of pretraining.


def test_the_hook_has_every_epoch_once_with_its_means_also_where_a_run_was_stopped_in_an_epoch(
    data, tmp_path, monkeypatch
):
    config = tiny_config(data, clustering__start_epoch=1, train__num_epochs=3)
    seen, take = {}, recorder.Recorder.take

    def note(epoch, means, state):
        assert int(state.step) == 4 * (epoch + 1)
        records = log_without_times(tmp_path)
        assert [r["step"] for r in records if r["epoch"] == epoch] == [4 * epoch + i for i in range(1, 5)]
        assert not (tmp_path / checkpoint.FOLDER / str(4 * (epoch + 1))).exists()
        assert epoch not in seen
        seen[epoch] = means

    def take_then_stop(self, dispatch, metrics):
        take(self, dispatch, metrics)
        if dispatch.end_step == 6:
            os.kill(os.getpid(), signal.SIGTERM)

    with monkeypatch.context() as patch:
        patch.setattr(recorder.Recorder, "take", take_then_stop)
        with pytest.raises(signals.Interrupted):
            pretrain.pretrain(config, tmp_path, devices=DEVICES, on_epoch=note)
    assert sorted(seen) == [0]
    pretrain.pretrain(config, tmp_path, devices=DEVICES, on_epoch=note)
    assert sorted(seen) == [0, 1, 2]
    records = log_without_times(tmp_path)
    for epoch, means in seen.items():
        for name in ("loss", "loss/contrastive", "loss/reconstruction", "loss/clustering"):
            values = [r[name] for r in records if r["epoch"] == epoch and name in r]
            # Clustering: not before epoch 1, and not in an epoch's first step.
            assert len(values) == (4 if name != "loss/clustering" else 3 * (epoch >= 1))
            assert (name in means) == bool(values)
            if values:
                assert means[name] == pytest.approx(np.mean(values), rel=1e-6)


def test_what_the_hook_raises_ends_the_run_in_order(config, tmp_path):
    def refuse(epoch, means, state):
        if epoch == 1:
            raise KeyError("enough")

    with pytest.raises(KeyError, match="enough"):
        pretrain.pretrain(config, tmp_path, devices=DEVICES, on_epoch=refuse)
    with workdir_lib.claim(tmp_path), checkpoint.Checkpoints(tmp_path, read_only=True) as saved:
        assert saved.steps() == [4]
    assert [r["step"] for r in log_without_times(tmp_path)] == list(range(1, 9))


def test_a_signal_is_noted_by_the_outermost_context():
    with signals.caught() as outer:
        with signals.caught() as inner:
            os.kill(os.getpid(), signal.SIGTERM)
        assert inner is outer
        assert outer.signal == signal.SIGTERM
    with signals.caught() as later:
        assert later.signal == 0


# The space.


def test_the_default_space_has_what_the_authors_searched_where_it_is_used():
    config = tiny_config("x", train__num_epochs=60, clustering__num_clusters=8)
    space = search_space.default(config, steps_per_epoch=5)
    assert set(space) == {
        "model.representation_dim",
        "model.projection_dim",
        "model.reconstruction_dim",
        "loss.clustering_weight",
        "loss.reconstruction_weight",
        "clustering.num_clusters",
        "clustering.queue_batches",
        "clustering.start_epoch",
        "optimizer.learning_rate",
        "optimizer.weight_decay",
    }
    assert space["model.representation_dim"] == {"choices": [8, 16, 32, 64]}
    assert space["clustering.num_clusters"] == {"low": 4, "high": 32, "log": True}
    assert space["clustering.queue_batches"]["high"] == 4  # fewer than an epoch has steps
    for objective in search_space.OBJECTIVES:
        assert search_space.check(space, config, objective=objective, source="x").keys() == space.keys()
    generative = changed(config, loss__contrastive_weight=0.0, loss__clustering_weight=0.0)
    assert set(search_space.default(generative, steps_per_epoch=5)) == {
        "model.representation_dim",
        "model.reconstruction_dim",
        "optimizer.learning_rate",
        "optimizer.weight_decay",
    }


@pytest.mark.parametrize(
    ("space", "message"),
    [
        ([], "expected an object of configuration keys"),
        ({}, "expected an object of configuration keys"),
        ({"optimizer.rate": {"low": 1, "high": 2}}, r"optimizer\.rate is not a configuration key"),
        ({"optimizer.learning_rates": {"low": 1, "high": 2}}, r"did you mean optimizer\.learning_rate\?"),
        ({"optimizer.b1": {"choices": [0.9]}, "config.optimizer.b1": {"choices": [0.8]}}, "stands there twice"),
        ({"train.num_epochs": {"low": 1, "high": 2}}, r"the same in all trials; .* set --config\.train\.num_epochs"),
        ({"data.path": {"choices": ["a", "b"]}}, "the same in all trials"),
        ({"model.bottleneck": {"choices": [["audio"]]}}, "is a list"),
        ({"optimizer.b1": 0.9}, r'is 0\.9; expected \{"low"'),
        ({"optimizer.b1": {"low": 0.1}}, "expected"),
        ({"optimizer.b1": {"choices": []}}, "at least one value"),
        ({"optimizer.b1": {"choices": ["much"]}}, r'"much" is not a value like 0\.9 \(float\)'),
        ({"optimizer.b1": {"choices": [0.5, 0.5]}}, "twice"),
        ({"optimizer.b1": {"low": 0.9, "high": 0.1}}, "span nothing"),
        ({"optimizer.b1": {"low": 0, "high": 0.1, "log": True}}, "above 0 where log is true"),
        ({"optimizer.b1": {"low": 0.1, "high": 0.2, "log": "yes"}}, "true or false"),
        ({"optimizer.b1": {"low": 0.1, "high": 2}}, r"config\.optimizer\.b1 is 2\.0; it must be between"),
        ({"optimizer.b1": {"low": 0.1, "high": math.inf}}, "Infinity is not a value"),
        ({"clustering.num_clusters": {"low": 2.5, "high": 8}}, r"2\.5 is not a value like 4 \(int\)"),
        ({"model.representation_dim": {"low": 16, "high": 32}}, "as choices"),
        ({"model.projection_relu": {"low": 0, "high": 1}}, "0 is not a value|has no order"),
        ({"precision": {"choices": ["float8"]}}, "must be one of 'float32'"),
        (
            {"loss.instance_temperature": {"low": 0.01, "high": 1}},
            r"no effect, since config\.loss\.instance_weight is 0",
        ),
        ({"views.noise": {"low": 0.01, "high": 1}}, r"loss\.instance_weight is 0"),
        ({"loss.clustering_weight": {"choices": [0, 1]}}, "may be 0.*--objective=validation_probe"),
        ({"loss.contrastive_margin": {"low": 0.001, "high": 1}}, "changes what the loss measures"),
        ({"data.standardize": {"choices": [True, False]}}, "changes what the loss measures"),
    ],
)
def test_spaces_that_make_no_sense_are_refused(space, message):
    with pytest.raises(ConclugenError, match=message) as refused:
        search_space.check(space, tiny_config("x"), objective="pretraining_loss", source="my.json")
    assert str(refused.value).startswith("my.json")


def test_numbers_take_the_type_of_their_key_and_probes_may_search_more():
    space = {"config.optimizer.b1": {"low": 0, "high": 0.5}, "data.standardize": {"choices": [True, False]}}
    checked = search_space.check(space, tiny_config("x"), objective="validation_probe", source="x")
    assert checked["optimizer.b1"] == {"low": 0.0, "high": 0.5, "log": False}
    assert isinstance(checked["optimizer.b1"]["low"], float)
    assert checked["data.standardize"] == {"choices": [True, False]}


def test_a_file_that_is_no_json_is_named(tmp_path):
    (tmp_path / "space.json").write_text("{'a'}")
    with pytest.raises(ConclugenError, match=r"space\.json: not a file of JSON"):
        search_space.read(tmp_path / "space.json")


# The objective.


def test_losses_are_compared_without_weights_and_at_one_scale():
    base = tiny_config("x")  # three modalities, batches of 16, 4 clusters
    means = {"loss": 99.0, "loss/contrastive": 12.0, "loss/clustering": 1.0, "loss/reconstruction": 3.0}
    assert search_space.comparable_loss(means, base, base) == 16.0  # Eq. 11
    weighted = changed(base, loss__contrastive_weight=7.0)
    assert search_space.comparable_loss(means, weighted, base) == 16.0
    other = changed(base, clustering__num_clusters=16, train__batch_size=256)
    # log 256 / log 16 = log 16 / log 4 = 2
    assert search_space.comparable_loss(means, other, base) == pytest.approx(12 / 2 + 1 / 2 + 3)
    del means["loss/clustering"]  # it has not joined yet
    assert search_space.comparable_loss(means, other, base) == pytest.approx(12 / 2 + math.log(4) + 3)


def test_the_probe_is_that_of_the_last_state_on_the_validation_split(config, data, tmp_path):
    config = changed(config, train__num_epochs=2)
    result = run(config, tmp_path, 1, objective="validation_probe")
    assert result["objective"]["name"] == "validation_probe"
    assert result["objective"]["direction"] == "maximize"
    model, variables, _ = probe.load(result["best"]["workdir"])
    tables = [
        batches.open_split(shards.open_dataset(data), s, ["text"], tier="host").table for s in ("train", "validation")
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


# Trials.


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
    imagine = pretrain.pretrain

    def first_fails(config, workdir, **more):
        if workdir.name == "0000":
            raise error
        imagine(config, workdir, **more)

    monkeypatch.setattr(pretrain, "pretrain", first_fails)
    with contextlib.nullcontext() if state == "failed" else pytest.raises(jax.errors.JaxRuntimeError):
        run(config, tmp_path, 2)
        first = json.loads((tmp_path / "result.json").read_text())["trials"][0]
        assert first["state"] == "failed"
        assert first["error"].startswith("out of memory (")


def test_a_full_disk_ends_the_search_not_the_trial(config, tmp_path, monkeypatch, imagined):
    imagine = pretrain.pretrain

    def disk_full(*_, **__):
        raise ConclugenError("metrics.jsonl: cannot be written; free space") from OSError(28, "No space left on device")

    monkeypatch.setattr(pretrain, "pretrain", disk_full)
    for _ in range(2 * trials_lib.STARTS):
        with pytest.raises(ConclugenError, match="free space"):
            run(config, tmp_path, 2)
    monkeypatch.setattr(pretrain, "pretrain", imagine)
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


@contextlib.contextmanager
def opened(folder):
    """The trials of a search that has begun."""
    definition = json.loads((folder / trials_lib.DEFINITION).read_text())
    with trials_lib.opened(folder, definition, ()) as trials:
        yield trials


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
        trials._study.ask()
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
    imagine = pretrain.pretrain

    def signalled(*arguments, **more):
        imagine(*arguments, **more)
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


def test_without_optuna_one_sentence_says_what_to_install(config, tmp_path, monkeypatch):
    monkeypatch.delitem(sys.modules, "conclugen_jax.study.trials")
    monkeypatch.delattr("conclugen_jax.study.trials")
    monkeypatch.setitem(sys.modules, "optuna", None)
    with pytest.raises(ConclugenError, match=r"pip install 'conclugen_jax\[search\]'"):
        run(config, tmp_path / "search", 1)
    assert not (tmp_path / "search").exists()


def test_rungs():
    assert trials_lib.rungs(60) == [7, 14, 28]
    assert trials_lib.rungs(8) == [1, 2, 4]
    assert trials_lib.rungs(1) == []


# The command.


@pytest.fixture(scope="module")
def place(config, tmp_path_factory):
    folder = tmp_path_factory.mktemp("command")
    (folder / "config.py").write_text(
        "from conclugen_jax.study import search_space\nfrom configs import base\n\ndef get_config():\n"
        f"    return search_space.with_overrides(base.get_config(), {dict(flat(config))!r})\n"
    )
    (folder / "space.json").write_text(json.dumps(RATES))
    return folder


def flat(config):
    for section, keys in config.items():
        if hasattr(keys, "items"):
            yield from ((f"{section}.{key}", value) for key, value in keys.items())
        else:
            yield section, keys


def start(place, folder, *more):
    return subprocess.Popen(
        [
            *(sys.executable, "-m", "launch.search", f"--config={place}/config.py", f"--space={place}/space.json"),
            *(f"--search={folder}", *more),
        ],
        cwd=ROOT,
        env={**os.environ, "XLA_FLAGS": QUICK_COMPILATION, "PYTHONPATH": str(ROOT)},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def wait_for(path, pattern, process):
    deadline = time.monotonic() + 120
    while not list(path.glob(pattern)) and process.poll() is None and time.monotonic() < deadline:
        time.sleep(0.01)


@pytest.mark.slow
def test_killed_stopped_and_shared_searches_end_as_one_that_nothing_disturbed(place, config, tmp_path):
    whole = run(config, tmp_path / "whole", 2)
    broken = tmp_path / "broken"
    killed = start(place, broken, "--trials=2")
    wait_for(broken, "trials/0000/checkpoints/[0-9]*", killed)
    killed.kill()
    killed.communicate()
    stopped = start(place, broken, "--trials=2")
    wait_for(broken, "trials/0001", stopped)
    stopped.send_signal(signal.SIGINT)
    _, errors = stopped.communicate(timeout=120)
    assert stopped.returncode in (0, 130), errors
    assert "Traceback" not in errors
    last = start(place, broken, "--trials=2")
    output, errors = last.communicate(timeout=120)
    assert last.returncode == 0, errors
    result = json.loads((broken / "result.json").read_text())
    assert result["trials"] == whole["trials"]
    for t in whole["trials"]:
        name = f"trials/{t['number']:04d}"
        assert log_without_times(broken / name) == log_without_times(tmp_path / "whole" / name)
    # The command in the result gives the best trial again.
    assert result["command"] in output
    program, *arguments = shlex.split(result["command"])
    assert program == "conclugen"
    environment = {**os.environ, "XLA_FLAGS": QUICK_COMPILATION, "PYTHONPATH": str(ROOT)}
    again = [sys.executable, "-m", "conclugen_jax", *arguments]
    subprocess.run(again, cwd=ROOT, env=environment, check=True, capture_output=True)
    assert log_without_times(broken / "best") == log_without_times(Path(result["best"]["workdir"]))


@pytest.mark.slow
def test_two_workers_do_as_many_trials_as_wanted(place, tmp_path):
    process = start(place, tmp_path, "--trials=5", "--workers=2")
    output, errors = process.communicate(timeout=240)
    assert process.returncode == 0, errors
    result = json.loads((tmp_path / "result.json").read_text())
    assert [t["number"] for t in result["trials"]] == list(range(5))
    assert result["num_trials"]["finished"] + result["num_trials"]["pruned"] == 5
    assert errors.count("from random weights") == 5  # none was run twice
    assert "[0] trial" in errors
    assert "[1] trial" in errors
    assert "pretraining_loss, minimize" in output


@pytest.mark.slow
def test_ctrl_c_ends_workers_with_130_and_the_search_goes_on(place, tmp_path):
    process = start(place, tmp_path, "--trials=50", "--workers=2", "--config.train.num_epochs=400")
    wait_for(tmp_path, "trials/*/metrics.jsonl", process)
    process.send_signal(signal.SIGINT)
    _, errors = process.communicate(timeout=120)
    assert process.returncode == 130, errors
    assert "Traceback" not in errors
    with opened(tmp_path) as trials, trials.taken(0) as trial:
        assert trial is not None  # nobody is at work on it any more


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--trials=0"], "flag --trials=0"),
        (["--objective=accuracy"], "flag --objective=accuracy"),
        (["--space=/nowhere.json"], "/nowhere.json: not a file of JSON"),
        (["--workers=2", "--config.train.batch_size=1000"], "only 64 usable examples"),
    ],
)
def test_mistakes_end_in_one_sentence(place, tmp_path, arguments, message):
    process = start(place, tmp_path / "search", *arguments)
    _, errors = process.communicate(timeout=120)
    assert process.returncode == 2, errors
    assert "Traceback" not in errors
    assert errors.strip().splitlines()[-1].startswith("error: ")
    assert errors.count(message) == 1
    assert not (tmp_path / "search").exists()
