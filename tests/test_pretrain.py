"""Pretraining runs: resume bit for bit, the log, refusal of other configurations and data, terms of the objective."""

import dataclasses
import functools
import itertools
import json
import os
import shutil
import signal

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from conclugen_jax.data import builders
from conclugen_jax.errors import ConclugenError
from conclugen_jax.method import fusion, losses, objective, train_state
from conclugen_jax.method import model as model_lib
from conclugen_jax.pretrain import recorder
from conclugen_jax.pretrain import training as pretrain
from conclugen_jax.run import checkpoint
from conclugen_jax.run import workdir as workdir_lib
from conclugen_jax.system import signals
from conclugen_jax.train import feed, loop, optimizer
from tests.helpers import Faces, assert_same_bits, close, flat, log_without_times, tiny_config

DEVICES = jax.devices()[:2]


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return builders.build(Faces(missing=0.3), tmp_path_factory.mktemp("data"))


@pytest.fixture(scope="module")
def config(data):
    return tiny_config(data, checkpoint__keep_newest=100, data__standardize=True, data__tier="device")


@pytest.fixture(scope="module")
def uninterrupted(config, tmp_path_factory):
    """Runs that nothing interrupted, by tier: four epochs of four steps, clustering from the third epoch on."""
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


@pytest.mark.parametrize(("tier", "stop_after"), [("device", 6), ("device", 10), ("host", 10), ("shards", 10)])
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
        ({"model.bottleneck": ("landmarks",)}, "bottleneck names 'landmarks'"),
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
    for step in (8, 12, 16):
        shutil.rmtree(workdir / checkpoint.FOLDER / str(step))
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
    "individual": {"loss.clustering_target": "individual"},
    "denominator": {"loss.margin_in_denominator": True},
    "separate": {"model.projection_sharing": "separate", "model.decoder_relu": True},
    "never": {"clustering.queue_reset": "never", "clustering.initialisation": "kmeans++"},
    "warm": {"clustering.initialisation": "warm", "clustering.metric": "euclidean"},
    "no queue": {"clustering.queue_batches": 0},
    "two": {"data.modalities": ("audio", "text")},
    "contrastive": {"loss.clustering_weight": 0.0, "loss.reconstruction_weight": 0.0},
    "generative": {
        "loss.clustering_weight": 0.0,
        "loss.contrastive_weight": 0.0,
        "data.modalities": ("text",),
    },
    "bfloat16": {"precision": "bfloat16"},
    "log": {"train.log_every_steps": 3, "schedule.granularity": "step"},
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
    term = "loss/reconstruction" if "loss/reconstruction" in first else "loss/contrastive"
    means = [np.mean([r[term] for r in records if r["epoch"] == e]) for e in (0, 1)]  # each of all 64 examples
    assert means[1] < means[0] or name == "log"
    clustered = [r["step"] for r in records if "loss/clustering" in r]
    if config.loss.clustering_weight:
        assert clustered == {
            "never": [2, 3, 4, 5, 6, 7, 8],
            "no queue": list(range(1, 9)),
            "log": [3, 6],
        }.get(name, [2, 3, 4, 6, 7, 8])
    if name == "mean":
        terms = 2 * last["loss/contrastive"] + last["loss/clustering"] + last["loss/reconstruction"]
        assert last["loss"] == pytest.approx(terms / 3, rel=1e-6)
        # Two terms only while the queue is not full.
        assert first["loss"] == pytest.approx(first["loss/contrastive"] + first["loss/reconstruction"] / 2, rel=1e-6)
    if name == "log":
        assert [r["step"] for r in records] == [3, 6]
    if name == "contrastive":
        assert set(state.params) == {"representation", "projection"}


def one_step(config, state, batch, model, optimizer, cluster=True):
    step = functools.partial(
        pretrain.pretrain_step,
        model=model,
        optimizer=optimizer,
        schedule=lambda _: jnp.float32(0),
        config=config,
        steps_per_epoch=100,
        cluster=cluster,
    )
    return jax.jit(step)(state, batch)


@pytest.fixture
def small():
    """Configuration, model, state with a full queue, and a batch in which many rows lack text or audio."""
    config = tiny_config(clustering__start_epoch=0)
    dims, rng = {"video": 24, "audio": 16, "text": 12}, np.random.default_rng(0)
    model = model_lib.from_config(config, dims)
    make, _ = optimizer.from_config(config, 100)
    variables = model_lib.initial_variables(model, jax.random.key(0), None)
    state = train_state.create(variables, make, jax.random.key(1), queue_length=16, num_clusters=4)
    queue = jnp.asarray(rng.normal(size=(16, 4)), jnp.float32)
    state = state.replace(step=jnp.int32(1), queue=queue, queue_batches=jnp.int32(1))
    present = {"video": np.ones(16, bool), "audio": np.arange(16) % 3 > 0, "text": np.arange(16) < 9}
    features = {m: rng.normal(size=(16, d)).astype(np.float32) for m, d in dims.items()}
    return config, model, state, {"features": features, "present": present}, make


@pytest.mark.parametrize("target", ["joint", "individual"])
def test_what_stands_in_absent_rows_changes_nothing(small, target):
    config, model, state, batch, _ = small
    config.loss.clustering_target = target

    def everything(features):
        loss_fn = functools.partial(
            objective.pretrain_loss, model=model, config=config, steps_per_epoch=100, cluster=True
        )
        rows = {"features": features, "present": batch["present"]}
        (loss, (terms, stats, clustered)), grads = jax.jit(jax.value_and_grad(loss_fn, has_aux=True))(
            state.params, state, rows, jax.random.key(2)
        )
        return {"loss": loss, "terms": terms, "stats": stats, "queue": clustered.queue, "grads": grads}

    zeros, garbage = (
        {m: np.where(batch["present"][m][:, None], x, fill) for m, x in batch["features"].items()}
        for fill in (np.float32(0), np.float32(1e3))
    )
    assert_same_bits(everything(zeros), everything(garbage))


def test_terms_are_those_of_the_rows_that_are_there(small):
    config, model, state, batch, _ = small
    present = batch["present"]
    outputs, _ = model.apply(state.variables(), batch["features"], present=present, train=True, mutable=["batch_stats"])
    contrastive = objective.contrastive_term(outputs.projections, present, config=config, axis_name=None)
    expected = 0
    for a, b in (("video", "audio"), ("video", "text"), ("audio", "text")):
        both = present[a] & present[b]
        expected += losses.masked_margin_softmax(outputs.projections[a][both], outputs.projections[b][both])
    np.testing.assert_allclose(contrastive, expected, rtol=1e-5)
    errors = model.apply(state.variables(), batch["features"], method="encode").squared_errors
    reconstruction = objective.reconstruction_term(errors, present, axis_name=None)
    by_hand = [
        np.square(np.asarray(outputs.reconstructions[m]) - batch["features"][m])[present[m]].mean() for m in present
    ]
    np.testing.assert_allclose(reconstruction, sum(by_hand), rtol=1e-5)


def test_loss_and_gradients_are_those_without_the_absent_rows(small):
    """The reference never sees an absent row: each modality has only its own rows, of different number."""
    config, model, state, batch, _ = small
    features, present = batch["features"], batch["present"]
    rows = {m: np.flatnonzero(present[m]) for m in features}

    def masked(params):
        return objective.pretrain_loss(
            params, state, batch, jax.random.key(2), model=model, config=config, steps_per_epoch=100, cluster=False
        )[0]

    def without(params):
        outputs = [
            model.apply({**state.variables(), "params": params}, {m: x[rows[m]]}, train=True, mutable=["batch_stats"])[
                0
            ]
            for m, x in features.items()
        ]
        projections = {m: o.projections[m] for m, o in zip(features, outputs, strict=True)}
        loss = 0.0
        for a, b in itertools.combinations(features, 2):
            _, of_a, of_b = np.intersect1d(rows[a], rows[b], return_indices=True)
            loss += losses.masked_margin_softmax(projections[a][of_a], projections[b][of_b])
        for m, o in zip(features, outputs, strict=True):
            loss += losses.reconstruction_loss(o.reconstructions[m], jnp.asarray(features[m][rows[m]]))
        return loss

    (loss, grads), (expected, expected_grads) = (
        jax.jit(jax.value_and_grad(f))(state.params) for f in (masked, without)
    )
    np.testing.assert_allclose(loss, expected, rtol=1e-5)
    assert not present["text"].all()
    for path, gradient in flat(grads).items():
        if path != "projection/fc1/bias":  # no gradient but rounding: BatchNorm subtracts it
            assert close(gradient, flat(expected_grads)[path], 1e-4), path


def test_a_modality_absent_from_the_whole_batch_gives_no_nan(small):
    config, model, state, batch, make = small
    batch["present"]["text"][:] = False
    after, metrics = one_step(config, state, batch, model, make)
    assert all(np.isfinite(x).all() for x in jax.tree.leaves((metrics, after.params, after.batch_stats)))


def test_k_means_starts_elsewhere_at_every_step(small):
    config, model, state, batch, make = small
    config.clustering.max_iterations = 1
    first, _ = one_step(config, state, batch, model, make)
    again, _ = one_step(config, state, batch, model, make)
    later, _ = one_step(config, state.replace(step=jnp.int32(2)), batch, model, make)
    np.testing.assert_array_equal(first.centroids, again.centroids)
    assert not np.array_equal(first.centroids, later.centroids)


def test_clustering_head_waits_for_its_first_gradient_as_in_pytorch(small):
    config, model, state, batch, _ = small
    config.optimizer.weight_decay = 0.5
    make, _ = optimizer.from_config(config, 100)
    state = state.replace(opt_state=make.init(state.params))
    waiting = state
    for cluster, filled in ((False, 1), (True, 0)):  # before the start epoch; with the queue not full
        waiting = waiting.replace(queue_batches=jnp.int32(filled))
        waiting, _ = one_step(config, waiting, batch, model, make, cluster=cluster)
    assert_same_bits(waiting.params["clustering"], state.params["clustering"])
    assert not np.array_equal(
        waiting.params["projection"]["fc2"]["kernel"], state.params["projection"]["fc2"]["kernel"]
    )
    moved, _ = one_step(config, waiting.replace(queue_batches=jnp.int32(1)), batch, model, make)
    rate = 1e-4  # of the first epoch: a tenth of the peak
    kernel = np.asarray(state.params["clustering"]["kernel"])
    step = (np.asarray(moved.params["clustering"]["kernel"]) - kernel) / rate + 0.5 * kernel
    # Adam's very first step has size 1 wherever the gradient is not negligible.
    assert np.quantile(np.abs(step), 0.2) == pytest.approx(1, abs=0.02)
    assert np.abs(step).max() < 1.02


def test_modality_pairs():
    assert objective.modality_pairs(["a", "b", "c"], "circle") == objective.modality_pairs(["a", "b", "c"], "all")
    assert objective.modality_pairs(list("abcd"), "circle") == [("a", "b"), ("b", "c"), ("c", "d"), ("d", "a")]
    assert len(objective.modality_pairs(list("abcd"), "all")) == 6


def test_fused_is_the_mean_over_present_modalities():
    logits = {"a": jnp.array([[2.0], [2.0], [5.0]]), "b": jnp.array([[4.0], [jnp.nan], [7.0]])}
    present = {"a": jnp.array([True, True, False]), "b": jnp.array([True, False, False])}
    np.testing.assert_array_equal(fusion.fuse(logits, present, "mean"), [[3.0], [2.0], [0.0]])


def test_individual_clustering_is_the_sum_over_modalities(monkeypatch):
    config = tiny_config(loss__clustering_target="individual", clustering__queue_batches=1)
    rng = np.random.default_rng(0)
    logits = {m: jnp.asarray(rng.normal(size=(16, 4)), jnp.float32) for m in ("a", "b")}
    present = {m: jnp.ones(16, bool) for m in logits}
    state = dataclasses.make_dataclass("S", ["queue", "queue_batches", "centroids", "step"])(
        jnp.asarray(rng.normal(size=(16, 4)), jnp.float32), jnp.int32(1), jnp.zeros((4, 4)), jnp.int32(1)
    )
    got = objective.clustering_term(
        logits, present, state, jax.random.key(0), config=config, steps_per_epoch=9, axis_name=None
    )
    own = got.kmeans.assignments[16:]
    expected = sum(losses.clustering_loss(g, got.kmeans.centroids, own) for g in logits.values())
    assert float(got.loss) == pytest.approx(float(expected), rel=1e-6)
    np.testing.assert_allclose(got.queue, (logits["a"] + logits["b"]) / 2, rtol=1e-6)


@pytest.mark.parametrize(
    ("steps", "most", "expected"),
    [
        (4, 50, [4]),
        (100, 50, [50, 50]),
        (130, 50, [44, 43, 43]),
        (35, 50, [35]),
        (7, 3, [3, 2, 2]),
        (51, 50, [26, 25]),
        (5, 2, [2, 2, 1]),
        (5, 1, [1] * 5),
    ],
)
def test_dispatches_cover_the_epoch(steps, most, expected):
    lengths = feed.dispatch_lengths(steps, most)
    assert lengths == expected
    assert sum(lengths) == steps
    assert max(lengths) <= most


def test_plan_resumes_at_any_dispatch():
    everything = list(loop.plan(0, [2, 2, 1], 3))
    assert [d.num_steps for d in everything[:3]] == [2, 2, 1]
    assert [d.end_step for d in everything] == [2, 4, 5, 7, 9, 10, 12, 14, 15]
    assert [d.end_step for d in everything if d.ends_epoch] == [5, 10, 15]
    for i, dispatch in enumerate(everything):
        assert list(loop.plan(dispatch.end_step, [2, 2, 1], 3)) == everything[i + 1 :]
    # From the middle of a dispatch: no step is done twice.
    for first in (1, 3, 6, 8, 13):
        steps = [d.end_step - d.num_steps + i + 1 for d in loop.plan(first, [2, 2, 1], 3) for i in range(d.num_steps)]
        assert steps == list(range(first + 1, 16))
        assert all((d.end_step - d.num_steps) % 5 == d.first_step_in_epoch for d in loop.plan(first, [2, 2, 1], 3))


@pytest.mark.parametrize("size", [4, 7, 15, 16, 100])
def test_encoder_in_chunks_gives_the_same_loss_and_gradients(small, size):
    config, model, state, batch, _ = small
    chunked = config.copy_and_resolve_references()
    chunked.encoder_chunk_size = size

    def gradients(config):
        loss_fn = functools.partial(
            objective.pretrain_loss, model=model, config=config, steps_per_epoch=100, cluster=True
        )
        return jax.jit(jax.value_and_grad(loss_fn, has_aux=True))(state.params, state, batch, jax.random.key(2))

    ((loss, (terms, stats, clustered)), grads), expected = gradients(chunked), gradients(config)
    assert_close = functools.partial(np.testing.assert_allclose, rtol=1e-5, atol=1e-6)
    assert_close(loss, expected[0][0])
    jax.tree.map(assert_close, (terms, stats, clustered.queue), (*expected[0][1][:2], expected[0][1][2].queue))
    assert flat(grads).keys() == flat(expected[1]).keys()
    for path, x in flat(expected[1]).items():  # that of a bias before BatchNorm is nothing but rounding
        assert path == "projection/fc1/bias" or close(flat(grads)[path], x, 1e-4), path


def test_encoder_in_chunks_needs_less_memory():
    def temporary(size):
        def loss(w, x):
            return objective.in_chunks(lambda rows: jnp.tanh(jnp.tanh(rows @ w) @ w).sum(1), x, size).sum()

        w, x = (jax.ShapeDtypeStruct(shape, jnp.float32) for shape in ((64, 64), (8192, 64)))
        return jax.jit(jax.grad(loss)).lower(w, x).compile().memory_analysis().temp_size_in_bytes

    assert temporary(256) < 0.25 * temporary(0)
