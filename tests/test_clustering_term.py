"""k-means within a training step: its work split over devices, and steps at which the centroids stay."""

import shutil

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from conclugen_jax import pretrain
from conclugen_jax.data import builders
from conclugen_jax.method import clustering, layers, objective, train_state
from conclugen_jax.runs import checkpoint
from conclugen_jax.train import parallel
from tests.helpers import Faces, assert_same_bits, close, log_without_times, tiny_config

QUEUE, BATCH, K, STEPS_PER_EPOCH = 128, 64, 4, 4
RNG = np.random.default_rng(0)
QUEUED = RNG.normal(size=(QUEUE, K)).astype(np.float32)
LOGITS = {m: RNG.normal(size=(BATCH, K)).astype(np.float32) for m in ("audio", "text")}
NONE_YET = np.zeros((K, K), np.float32)
PRESENT = {"audio": np.ones(BATCH, bool), "text": np.arange(BATCH) % 3 > 0}


def state_at(step, centroids):
    state = train_state.TrainState(*[None] * 9)
    return state.replace(
        step=jnp.int32(step), queue=jnp.asarray(QUEUED), queue_batches=jnp.int32(2), centroids=jnp.asarray(centroids)
    )


def clustered(num_devices, step=2, centroids=NONE_YET, **changes):
    """The clustering of one step, as every device sees it: leaves [devices, ...]."""
    config = tiny_config(clustering__queue_batches=2, **changes)

    def term(state, logits, present):
        return objective.clustering_term(
            logits,
            present,
            state,
            jax.random.key(0),
            config=config,
            steps_per_epoch=STEPS_PER_EPOCH,
            axis_name=parallel.AXIS,
        )

    mapped = jax.pmap(term, axis_name=parallel.AXIS, devices=jax.devices()[:num_devices], in_axes=(None, 0, 0))
    split = parallel.split_rows((LOGITS, PRESENT), num_devices)
    return jax.tree.map(np.asarray, mapped(state_at(step, centroids), *split))


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"clustering__metric": "euclidean", "clustering__initialisation": "kmeans++"},
        {"clustering__refit_every_steps": 3},
    ],
)
def test_work_split_over_eight_devices_equals_one_device(changes, monkeypatch):
    one = clustered(1, **changes)
    seen, lloyd = [], clustering.lloyd
    monkeypatch.setattr(
        clustering, "lloyd", lambda p, c, **k: seen.append((len(p), k["axis_name"])) or lloyd(p, c, **k)
    )
    eight = clustered(8, clustering__gather_limit_mib=0, **changes)
    assert set(seen) == {((QUEUE + BATCH) // 8, parallel.AXIS)}
    assert one.kmeans.iterations[0] > 2
    for device in range(8):
        np.testing.assert_array_equal(eight.kmeans.assignments[device], one.kmeans.assignments[0])
        assert close(eight.kmeans.centroids[device], one.kmeans.centroids[0], 1e-5)
        assert eight.kmeans.iterations[device] == one.kmeans.iterations[0]
        assert eight.loss[device] == pytest.approx(one.loss[0], rel=1e-5)


def test_few_points_are_gathered(monkeypatch):
    seen, lloyd = [], clustering.lloyd
    monkeypatch.setattr(
        clustering, "lloyd", lambda p, c, **k: seen.append((len(p), k["axis_name"])) or lloyd(p, c, **k)
    )
    clustered(8)
    assert set(seen) == {(QUEUE + BATCH, None)}


@pytest.mark.parametrize("limit", [0, 64])
def test_between_refits_centroids_stay_and_points_join_the_nearest(limit):
    changes = {"clustering__refit_every_steps": 2, "clustering__gather_limit_mib": limit}
    first = clustered(8, step=2, **changes)
    assert first.kmeans.iterations[0] > 0
    centroids = RNG.normal(size=(K, K)).astype(np.float32)
    kept = clustered(8, step=3, centroids=centroids, **changes)
    fused = layers.fuse(LOGITS, PRESENT, "mean")
    nearest = clustering.nearest(jnp.concatenate([QUEUED, fused]), jnp.asarray(centroids), metric="cosine")
    for device in range(8):
        assert kept.kmeans.iterations[device] == 0
        np.testing.assert_array_equal(kept.kmeans.centroids[device], centroids)
        np.testing.assert_array_equal(kept.kmeans.assignments[device], nearest)
    assert clustered(8, step=2, centroids=centroids, **changes).kmeans.iterations[0] > 0


@pytest.mark.parametrize(
    ("changes", "refits"),
    [
        # The queue of two batches is full at steps 2 and 3 of each epoch of four.
        ({"clustering__queue_reset": "epoch", "clustering__refit_every_steps": 2}, [2, 6, 10]),
        ({"clustering__queue_reset": "epoch", "clustering__refit_every_steps": 1000}, [2, 6, 10]),
        ({"clustering__queue_reset": "never", "clustering__refit_every_steps": 3}, [3, 6, 9]),
        ({"clustering__queue_reset": "never", "clustering__refit_every_steps": 5}, [5, 10]),
    ],
)
def test_steps_that_refit(changes, refits):
    config = tiny_config(clustering__queue_batches=2, **changes)
    full = [s for s in range(2, 12) if config.clustering.queue_reset == "never" or s % STEPS_PER_EPOCH >= 2]

    def refits_at(step, centroids):
        return bool(objective._refits(state_at(step, centroids), config, STEPS_PER_EPOCH))

    assert [s for s in full if refits_at(s, np.ones((K, K)))] == refits
    assert all(refits_at(s, NONE_YET) for s in full)  # there are no centroids yet


def test_a_run_that_refits_now_and_then_resumes_exactly_and_logs_every_step(tmp_path):
    config = tiny_config(
        builders.build(Faces(), tmp_path / "data"),
        train__num_epochs=2,
        clustering__start_epoch=0,
        clustering__queue_reset="never",
        clustering__refit_every_steps=3,
        loss__reconstruction_weight=0.0,
        checkpoint__keep_newest=9,
    )
    devices, workdir = jax.devices()[:1], tmp_path / "run"
    expected = pretrain.pretrain(config, workdir, devices=devices)
    records = log_without_times(workdir)
    # The queue is full from the second step on; there are no centroids before; then the steps 3 and 6, from 0, refit.
    assert [r["step"] for r in records if r.get("kmeans/iterations", 0) > 0] == [2, 4, 7]
    assert [r["step"] for r in records if "loss/clustering" in r] == [2, 3, 4, 5, 6, 7, 8]
    again = shutil.copytree(workdir, tmp_path / "again")
    shutil.rmtree(again / checkpoint.FOLDER / "8")  # the step after the newest checkpoint keeps its centroids
    assert_same_bits(pretrain.pretrain(config, again, devices=devices), expected)
    assert log_without_times(again) == records
