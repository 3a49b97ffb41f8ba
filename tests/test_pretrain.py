"""Pretraining runs: resume bit for bit, the log, refusal of other configurations and data, every choice."""

import json
import os
import shutil
import signal

import jax
import numpy as np
import pytest

from conclugen_jax import pretrain
from conclugen_jax.data import builders
from conclugen_jax.errors import ConclugenError
from conclugen_jax.pretrain import recorder
from conclugen_jax.runs import checkpoint, log as log_lib, workdir as workdir_lib
from conclugen_jax.system import signals
from tests.helpers import Faces, assert_same_bits, log_without_times, tiny_config

DEVICES = jax.devices()[:2]


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return builders.build(Faces(missing=0.3), tmp_path_factory.mktemp("data"))


@pytest.fixture(scope="module")
def config(data):
    return tiny_config(data, checkpoint__keep_newest=100, data__standardize="split", data__tier="device")


@pytest.fixture(scope="module")
def uninterrupted(config, tmp_path_factory):
    """Return uninterrupted runs by tier: four epochs of four steps, clustering from the third epoch on."""
    runs = {}

    def run(tier):
        if tier not in runs:
            workdir = tmp_path_factory.mktemp(tier)
            runs[tier] = pretrain.pretrain(with_tier(config, tier), workdir, devices=DEVICES), workdir
        return runs[tier]

    return run


@pytest.fixture(scope="module")
def whole(uninterrupted):
    return uninterrupted("device")


def with_tier(config, tier):
    config = config.copy_and_resolve_references()
    config.data.tier = tier
    return config


def test_the_log_has_every_step_once_and_the_right_terms(whole):
    state, workdir = whole
    records = log_without_times(workdir)
    assert [r["step"] for r in records] == list(range(1, 17))
    assert [r["epoch"] for r in records] == [e for e in range(4) for _ in range(4)]
    assert int(state.step) == 16
    for r in records:
        # Clustering: from epoch 2 on, and never in the first step of an epoch, when the queue has just been emptied.
        clustered = r["epoch"] >= 2 and (r["step"] - 1) % 4 >= 1
        assert ("loss/clustering" in r) == ("kmeans/iterations" in r) == clustered, r
        terms = r["loss/contrastive"] + r["loss/reconstruction"] + r.get("loss/clustering", 0)
        assert r["loss"] == pytest.approx(terms, rel=1e-6)
        assert r["gradient_norm"] > 0
    assert records[0]["learning_rate"] == pytest.approx(1e-4)
    assert records[4]["learning_rate"] == pytest.approx(2.8e-4)
    assert all("examples_per_second" in json.loads(x) for x in (workdir / "metrics.jsonl").read_text().splitlines())


def test_standardisation_comes_from_the_manifest(whole, data):
    state, workdir = whole
    mean, scale = workdir_lib.read_data(workdir).standardization("audio")
    np.testing.assert_array_equal(state.feature_stats["audio"]["mean"], mean)
    np.testing.assert_array_equal(state.feature_stats["audio"]["scale"], scale)


@pytest.mark.parametrize(
    ("tier", "stop_after"),
    [
        ("device", 10),
        pytest.param("device", 6, marks=pytest.mark.slow),
        pytest.param("host", 10, marks=pytest.mark.slow),
        pytest.param("shards", 10, marks=pytest.mark.slow),
    ],
)
def test_interrupted_and_resumed_equals_uninterrupted(uninterrupted, config, tmp_path, monkeypatch, tier, stop_after):
    expected, expected_dir = uninterrupted(tier)
    config = with_tier(config, tier)
    take = recorder.Recorder.take

    def take_then_kill(self, dispatch, metrics):
        take(self, dispatch, metrics)
        if dispatch.end_step == stop_after:
            os.kill(os.getpid(), signal.SIGTERM)

    with monkeypatch.context() as patch:
        patch.setattr(recorder.Recorder, "take", take_then_kill)
        with pytest.raises(signals.Interrupted) as stopped:
            pretrain.pretrain(config, tmp_path, devices=DEVICES)
    assert stopped.value.code == 128 + signal.SIGTERM
    assert [r["step"] for r in log_without_times(tmp_path)] == list(range(1, stop_after + 1))
    state = pretrain.pretrain(config, tmp_path, devices=DEVICES)
    assert_same_bits(state, expected)
    assert log_without_times(tmp_path) == log_without_times(expected_dir)
    ours, theirs = (checkpoint.Checkpoints(d, read_only=True) for d in (tmp_path, expected_dir))
    assert ours.find("best") == theirs.find("best")
    for step in theirs.steps():  # the sum of the epoch's losses goes on where it stood
        assert ours.restore_tree(step)[1] == theirs.restore_tree(step)[1]


def test_tiers_train_alike(uninterrupted):
    losses_of = {t: [r["loss"] for r in log_without_times(uninterrupted(t)[1])] for t in ("device", "host", "shards")}
    np.testing.assert_allclose(losses_of["host"], losses_of["device"], rtol=1e-4)
    assert losses_of["host"] == losses_of["shards"]


def test_killed_run_drops_what_it_logged_beyond_its_checkpoint(whole, config, tmp_path):
    expected, expected_dir = whole
    workdir = shutil.copytree(expected_dir, tmp_path / "run")
    # As after kill -9 in epoch 3: the newest checkpoint is that of step 8, the log has gone on, its last line is cut.
    for step in (12, 16):
        shutil.rmtree(workdir / checkpoint.FOLDER / str(step))
    log = workdir / "metrics.jsonl"
    log.write_text("\n".join(log.read_text().splitlines()[:11])[:-20])
    state = pretrain.pretrain(config, workdir, devices=DEVICES)
    assert_same_bits(state, expected)
    assert log_without_times(workdir) == log_without_times(expected_dir)


def test_a_checkpoint_never_knows_more_than_the_log(whole, config, tmp_path, monkeypatch):
    sync, asked = log_lib.MetricsLog.sync, []

    def full_disk_at_the_first_save(self):
        done = sync(self)
        if self._path.name != log_lib.METRICS:
            return done
        asked.append(done)
        return done and len(asked) > 1

    monkeypatch.setattr(log_lib.MetricsLog, "sync", full_disk_at_the_first_save)
    assert_same_bits(pretrain.pretrain(config, tmp_path, devices=DEVICES), whole[0])
    with checkpoint.Checkpoints(tmp_path, read_only=True) as saved:
        assert saved.steps() == [8, 12, 16]  # not 4
    assert log_without_times(tmp_path) == log_without_times(whole[1])


def test_finished_run_is_returned_as_it_is(whole, config, tmp_path):
    expected, expected_dir = whole
    workdir = shutil.copytree(expected_dir, tmp_path / "run")
    assert_same_bits(pretrain.pretrain(config, workdir, devices=DEVICES), expected)
    assert log_without_times(workdir) == log_without_times(expected_dir)


def test_resume_on_another_number_of_devices_goes_on_with_the_same_batches(whole, config, tmp_path):
    expected, expected_dir = whole
    workdir = shutil.copytree(expected_dir, tmp_path / "run")
    for step in (12, 16):
        shutil.rmtree(workdir / checkpoint.FOLDER / str(step))
    pretrain.pretrain(config, workdir, devices=jax.devices()[:8])
    for ours, theirs in zip(log_without_times(workdir), log_without_times(expected_dir), strict=True):
        assert ours["loss"] == pytest.approx(theirs["loss"], rel=1e-4)


def test_best_checkpoint_is_of_an_epoch_with_the_whole_objective(whole):
    _, workdir = whole
    saved = checkpoint.Checkpoints(workdir, read_only=True)
    assert saved.steps() == [4, 8, 12, 16]
    means = {e: np.mean([r["loss"] for r in log_without_times(workdir) if r["epoch"] == e]) for e in (2, 3)}
    assert saved.find("best") == (min(means, key=means.get) + 1) * 4


def test_changed_configuration_is_refused_with_the_differences(whole, config, tmp_path):
    workdir = shutil.copytree(whole[1], tmp_path / "run")
    changed = config.copy_and_resolve_references()
    changed.optimizer.learning_rate, changed.train.num_epochs = 0.5, 9
    with pytest.raises(ConclugenError, match=r"learning_rate: 0\.001 -> 0\.5; config\.train\.num_epochs: 4 -> 9"):
        pretrain.pretrain(changed, workdir, devices=DEVICES)


def test_changed_data_is_refused(config, tmp_path):
    data = builders.build(Faces(), tmp_path / "data")
    config = config.copy_and_resolve_references()
    config.data.path, config.train.num_epochs, config.clustering.start_epoch = str(data), 1, 0
    pretrain.pretrain(config, tmp_path / "run", devices=DEVICES)
    builders.build(Faces(seed=5), tmp_path / "data", overwrite=True)
    with pytest.raises(ConclugenError, match=r"faces 1\.0\.0 has changed"):
        pretrain.pretrain(config, tmp_path / "run", devices=DEVICES)


def test_workdir_in_use_is_refused_with_its_owner(config, tmp_path):
    with (
        workdir_lib.claim(tmp_path),
        pytest.raises(ConclugenError, match=rf"in use by process {os.getpid()} on .* since 20"),
    ):
        pretrain.pretrain(config, tmp_path, devices=DEVICES)
    with workdir_lib.claim(tmp_path):
        pass  # free again


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"data.modalities": ("video", "smell")}, "no modality 'smell'"),
        ({"data.train_split": "dev"}, "no split 'dev'"),
        ({"train.batch_size": 17}, "2 devices cannot share"),
        ({"train.batch_size": 1000}, "only 64 usable examples"),
        (
            {"model.bottleneck": ("landmarks",)},
            r"model.bottleneck is \('landmarks',\), config.data.modalities is .*remove",
        ),
        ({"clustering.queue_batches": 4}, "queue_reset"),
        ({"data.path": "/nowhere"}, "nowhere"),
    ],
)
def test_impossible_runs_are_refused_before_the_workdir_exists(config, tmp_path, changes, message):
    config = config.copy_and_resolve_references()
    config.update_from_flattened_dict(changes)
    with pytest.raises(ConclugenError, match=message):
        pretrain.pretrain(config, tmp_path / "run", devices=DEVICES)
    assert not (tmp_path / "run").exists()


def test_a_data_set_that_was_moved_is_taken_when_told_so_and_the_same(whole, config, data, tmp_path):
    expected, expected_dir = whole
    workdir = shutil.copytree(expected_dir, tmp_path / "run")
    shutil.rmtree(workdir / checkpoint.FOLDER / "16")
    here = config.copy_and_resolve_references()
    here.data.path = str(shutil.copytree(data, tmp_path / "data"))
    with pytest.raises(ConclugenError, match=r"was started with config.data.path: .* -> .*--moved"):
        pretrain.pretrain(here, workdir, devices=DEVICES)
    other = config.copy_and_resolve_references()
    other.data.path = str(builders.build(Faces(missing=0.3, seed=1), tmp_path / "other"))
    with pytest.raises(ConclugenError, match="was started with other data"):
        pretrain.pretrain(other, workdir, devices=DEVICES, moved=True)
    changed = here.copy_and_resolve_references()
    changed.seed = 1
    with pytest.raises(ConclugenError, match=r"config.seed: 0 -> 1"):
        pretrain.pretrain(changed, workdir, devices=DEVICES, moved=True)
    assert_same_bits(pretrain.pretrain(here, workdir, devices=DEVICES, moved=True), expected)
    assert_same_bits(pretrain.pretrain(here, workdir, devices=DEVICES), expected)  # known by now


def test_a_loss_that_is_not_finite_ends_the_run_and_is_never_saved(config, tmp_path):
    config = config.copy_and_resolve_references()
    config.optimizer.learning_rate, config.schedule.warmup_start = 1e3, 1.0
    config.optimizer.name, config.optimizer.weight_decay = "sgd", 0.0
    with pytest.raises(ConclugenError, match=r"step \d+: the loss or its gradient is not finite.*learning_rate"):
        pretrain.pretrain(config, tmp_path, devices=DEVICES)
    for step in checkpoint.Checkpoints(tmp_path, read_only=True).steps():
        with checkpoint.Checkpoints(tmp_path, read_only=True) as saved:
            tree, _ = saved.restore_tree(step)
        assert all(np.isfinite(x).all() for x in jax.tree.leaves(tree))


VARIANTS = {
    "mean": {"loss.reduction": "mean", "loss.contrastive_weight": 2.0},
    "individual": {"loss.clustering_target": "individual", "loss.margin_in_denominator": True},
    "separate": {"model.projection_sharing": "separate", "model.decoder_relu": True, "precision": "bfloat16"},
    "never": {"clustering.queue_reset": "never", "clustering.initialisation": "kmeans++"},
    "warm": {
        "clustering.initialisation": "warm",
        "clustering.metric": "euclidean",
        "train.log_every_steps": 3,
        "schedule.granularity": "step",
    },
    "no queue": {"clustering.queue_batches": 0, "data.modalities": ("audio", "text")},
    "contrastive": {"loss.clustering_weight": 0.0, "loss.reconstruction_weight": 0.0},
    "generative": {
        "loss.clustering_weight": 0.0,
        "loss.contrastive_weight": 0.0,
        "data.modalities": ("text",),
    },
}


@pytest.mark.parametrize("name", VARIANTS)
def test_every_choice_trains(config, tmp_path, name):
    config = config.copy_and_resolve_references()
    short = {"train.num_epochs": 2, "clustering.start_epoch": 0, "schedule.warmup_epochs": 0}
    config.update_from_flattened_dict({**short, "optimizer.learning_rate": 3e-3, **VARIANTS[name]})
    state = pretrain.pretrain(config, tmp_path, devices=DEVICES[:1])
    records = log_without_times(tmp_path)
    first, last = records[0], records[-1]
    assert all(np.isfinite(v) for r in records for v in r.values())
    assert [r["step"] for r in records] == ([3, 6] if name == "warm" else list(range(1, int(state.step) + 1)))
    term = "loss/reconstruction" if "loss/reconstruction" in first else "loss/contrastive"
    means = [np.mean([r[term] for r in records if r["epoch"] == e]) for e in (0, 1)]  # each of all 64 examples
    assert means[1] < means[0]
    if config.loss.clustering_weight:
        clustered = [r["step"] for r in records if "loss/clustering" in r]
        expected = {"never": [2, 3, 4, 5, 6, 7, 8], "no queue": list(range(1, 9)), "warm": [3, 6]}
        assert clustered == expected.get(name, [2, 3, 4, 6, 7, 8])
    if name == "mean":
        terms = 2 * last["loss/contrastive"] + last["loss/clustering"] + last["loss/reconstruction"]
        assert last["loss"] == pytest.approx(terms / 3, rel=1e-6)
        # Two terms only while the queue is not full.
        assert first["loss"] == pytest.approx(first["loss/contrastive"] + first["loss/reconstruction"] / 2, rel=1e-6)
    if name == "contrastive":
        assert set(state.params) == {"representation", "projection"}
