"""Figures of health against NumPy and scikit-learn by hand, and what is said of encoders that have collapsed."""

import itertools
import math
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from sklearn import cluster, metrics

from conclugen_jax import pretrain
from conclugen_jax.data import builders, digits
from conclugen_jax.evaluate import geometry, health, levels, probe
from conclugen_jax.method import losses
from tests.helpers import SHARED_DATA, Faces, needs_shared_data, tiny_config

RNG = np.random.default_rng(0)


def unit(x):
    return x / np.linalg.norm(x, axis=1, keepdims=True)


@pytest.mark.parametrize("shape", [(30, 8), (8, 30)])
def test_the_effective_rank_is_that_of_the_singular_values(shape):
    x = RNG.normal(size=shape) @ np.diag(np.geomspace(1, 1e-3, shape[1]))
    values = np.linalg.svd(x, compute_uv=False)
    p = values / values.sum()
    assert geometry.effective_rank(x) == pytest.approx(np.exp(-(p * np.log(p)).sum()), rel=1e-6)
    assert geometry.effective_rank(np.eye(7)) == pytest.approx(7)


def test_the_effective_rank_of_constant_vectors_of_one_dimension_and_of_zeros_is_1():
    direction = RNG.normal(size=(1, 12)).astype(np.float32)
    for x in (np.ones((20, 1)), RNG.normal(size=(20, 1)), np.zeros((20, 1))):
        assert geometry.effective_rank((x @ direction).astype(np.float32)) == pytest.approx(1, abs=1e-3)


def test_alignment_uniformity_and_recall_are_those_of_loops():
    a = unit(RNG.normal(size=(12, 5)))
    b = unit(a + RNG.normal(size=(12, 5)))
    squared = np.array([[((x - y) ** 2).sum() for y in b] for x in a])
    different = [squared[i, j] for i, j in itertools.permutations(range(12), 2)]
    assert geometry.alignment(a, b) == pytest.approx((np.diag(squared).mean(), np.mean(different)))
    terms = [math.exp(-2 * ((a[i] - a[j]) ** 2).sum()) for i, j in itertools.combinations(range(12), 2)]
    assert geometry.uniformity(a) == pytest.approx(math.log(np.mean(terms)))
    hits = [squared[i].argmin() == i for i in range(12)] + [squared[:, i].argmin() == i for i in range(12)]
    assert 0 < np.mean(hits) < 1
    assert geometry.recall_at_1(a, b) == pytest.approx(np.mean(hits))


def test_balance_and_information_are_those_of_scikit_learn():
    a, b = RNG.integers(0, 5, 200), RNG.integers(0, 9, 200)
    b = np.where(RNG.random(200) < 0.4, a, b)
    for x, y in ((a, b), (a, a), (a, np.arange(200) // 2)):
        expected = metrics.adjusted_mutual_info_score(x, y)
        assert geometry.adjusted_information(x, y) == pytest.approx(expected, abs=1e-9)
    shares = np.bincount(a) / 200
    assert geometry.balance(a, 8) == pytest.approx(-(shares * np.log(shares)).sum() / math.log(8))
    assert geometry.balance(np.zeros(9, int), 4) == 0


def test_rows_that_lack_a_modality_are_left_out_of_its_figures():
    vectors = {m: RNG.normal(size=(40, 6)) for m in ("face", "voice")}
    projections = {m: unit(x + 3 * RNG.normal(size=(40, 1))) for m, x in vectors.items()}
    present = {"face": RNG.random(40) < 0.7, "voice": np.ones(40, bool)}
    hidden = {m: np.where(present[m][:, None], x, 1e6) for m, x in vectors.items()}
    groups = np.where(np.arange(40) < 4, "", np.arange(40) % 3)
    clusters = RNG.integers(0, 4, 40)
    found = health.measure(hidden, present, projections=projections, clusters=clusters, num_clusters=5, groups=groups)
    joined = np.concatenate([np.where(present[m][:, None], vectors[m], 0) for m in vectors], axis=1)
    assert found["health/effective_rank"] == pytest.approx(geometry.effective_rank(joined))
    here = present["face"]
    assert found["health/effective_rank/face"] == pytest.approx(geometry.effective_rank(vectors["face"][here]))
    assert found["health/uniformity/face"] == pytest.approx(geometry.uniformity(projections["face"][here]))
    pair = [projections[m][here] for m in ("face", "voice")]
    assert found["health/recall_at_1"] == geometry.recall_at_1(*pair)
    assert found["health/recall_at_1_chance"] == pytest.approx(1 / here.sum())
    assert [found["health/alignment"], found["health/alignment_chance"]] == pytest.approx(geometry.alignment(*pair))
    assert found["health/cluster_balance"] == geometry.balance(clusters, 5)
    assert found["health/clusters_nmi_group"] == geometry.adjusted_information(clusters[4:], groups[4:])
    assert found["health/rows"] == 40


def test_what_cannot_be_measured_is_left_out():
    one = {"face": RNG.normal(size=(9, 4))}, {"face": np.ones(9, bool)}
    assert set(health.measure(*one, groups=["anna"] * 9)) == {
        "health/rows",
        "health/effective_rank",
        "health/effective_rank/face",
        "health/uniformity",
        "health/uniformity/face",
    }
    clusters = {"clusters": np.arange(9) % 3, "num_clusters": 3}
    assert "health/clusters_nmi_group" not in health.measure(*one, **clusters, groups=list("abcdefghi"))
    few = health.measure(*one, **clusters, groups=list("ababababa"))
    assert few["health/clusters_nmi_group"] == geometry.adjusted_information(np.arange(9) % 3, np.arange(9) % 2)
    rare = {"face": one[0]["face"], "voice": RNG.normal(size=(9, 4))}, {**one[1], "voice": np.arange(9) < 2}
    assert not [name for name in health.measure(*rare) if "voice" in name]
    assert health.warnings(health.measure(*rare)) == []  # two vectors have two dimensions at most
    one[0]["face"][3, 2] = np.nan
    assert health.measure(*one) == {}
    assert health.warnings({}) == []


def test_losses_at_chance_and_at_best_are_those_of_the_losses_themselves():
    n, names = 16, ("video", "audio", "text")
    weights = {"loss__instance_weight": 1.0, "loss__fusion_weight": 1.0, "augmentation__feature_dropout": 0.1}
    config = tiny_config(train__batch_size=n, loss__contrastive_margin=0.1, loss__clustering_margin=0.2, **weights)
    everywhere = dict.fromkeys(names, np.ones(50, bool))
    found = levels.of_losses(config, everywhere, {"video": 1.0, "audio": 0.5, "text": 0.25})
    alike, apart = jnp.ones((n, n)) / 4, jnp.eye(n)
    pair = [3 * float(losses.masked_margin_softmax(x, x, margin=0.1)) for x in (alike, apart)]
    assert found["contrastive"] == pytest.approx(pair, rel=1e-4)
    options = {"centroids": jnp.zeros((4, 4)), "assignments": jnp.arange(n) % 4, "margin": 0.2}
    for inside in (False, True):
        config.loss.margin_in_denominator = inside
        far = {**options, "centroids": 100 * jnp.eye(4)}
        rows = [
            float(losses.clustering_loss(jnp.eye(4)[jnp.arange(n) % 4], **o, margin_in_denominator=inside))
            for o in (options, far)
        ]
        assert levels.of_losses(config, everywhere, dict.fromkeys(names, 1))["clustering"] == pytest.approx(
            rows, abs=1e-5
        )
    views = [float(losses.info_nce(x, x, temperature=0.07)) for x in (alike, apart)]
    assert found["instance"] == pytest.approx(views, rel=1e-3, abs=1e-5)
    assert found["fusion"] == pytest.approx([4 * x for x in views], rel=1e-3, abs=1e-5)
    assert found["reconstruction"] == (1.75, 0)
    half = {**everywhere, "text": np.arange(50) % 2 == 0}
    fewer = levels.of_losses(config, half, dict.fromkeys(names, 1))["contrastive"].chance
    pairs = [losses.masked_margin_softmax(x, x, margin=0.1) for x in (alike, alike[:8], alike[:8])]
    assert fewer == pytest.approx(float(sum(pairs)), rel=1e-4)
    assert levels.Level(3.0, 1.0).share(2.5) == 0.25


def of_digits():
    rows = [e for e, _ in zip(digits.Digits().examples("train"), range(240), strict=False)]
    features = {m: np.array([e.features[m] for e in rows]) for m in ("pixels", "profiles")}
    return features, np.arange(240) % 8  # eight writers


def of_ravdess():
    with np.load(SHARED_DATA / "ravdess/ravdess_au_mfcc.npz") as stored:
        rows = stored["actor"] <= 8
        return {m: stored[m][rows].astype(np.float64) for m in ("video", "audio")}, stored["actor"][rows]


def by_person(x, persons):
    """Features less the mean of their person, over a deviation of at least a third of all."""
    means, scales = (
        np.array([f(x[persons == p]) for p in persons]) for f in (lambda y: y.mean(axis=0), lambda y: y.std(axis=0))
    )
    return (x - means) / (scales + x.std(axis=0) / 3 + 1e-6)


ENCODERS = {
    "healthy": (lambda x, _: x, []),
    "constant output": (lambda x, _: np.ones_like(x), ["have collapsed .*uniformity 0.00"]),
    "nearly constant": (lambda x, _: 20 + 0.1 * x, ["have collapsed .*uniformity -0.0"]),
    "one dimension": (lambda x, _: x[:, :1] @ np.ones((1, x.shape[1])), ["have collapsed .*effective rank 1.0"]),
    "persons only": (
        lambda x, who: np.random.default_rng(1).normal(size=(100, x.shape[1]))[who],
        [r"clusters follow the persons .*groups (0.9|1.0).*data.standardize=person"],
    ),
}


@pytest.mark.parametrize("encoder", ENCODERS)
@pytest.mark.parametrize("data", [of_digits, pytest.param(of_ravdess, marks=needs_shared_data)])
def test_an_encoder_that_has_collapsed_is_said_so_and_a_healthy_one_is_not(data, encoder):
    features, persons = data()
    encode, expected = ENCODERS[encoder]
    vectors = {m: encode(by_person(x, persons)[:, :30], persons) for m, x in features.items()}
    joined = np.concatenate(list(vectors.values()), axis=1)
    clusters = cluster.KMeans(8, n_init=4, random_state=0).fit_predict(joined + 1e-9 * RNG.normal(size=joined.shape))
    present = {m: np.ones(len(x), bool) for m, x in vectors.items()}
    found = health.measure(vectors, present, clusters=clusters, num_clusters=8, groups=persons.astype(str))
    said = health.warnings(found)
    assert len(said) == len(expected), said
    for sentence, pattern in zip(said, expected, strict=True):
        assert re.search(pattern, sentence)


LOSSES = {"loss/contrastive": 9.0, "chance/contrastive": 11.0, "best/contrastive": 9.0, "schedule/done": 1.0}
RECALL = {"health/recall_at_1": 0.01, "health/recall_at_1_chance": 0.01}
SCHEDULE = {"schedule/falling": 0.08, "schedule/rate": 0.93, "schedule/period_ends": 145.0}


@pytest.mark.parametrize(
    ("figures", "expected"),
    [
        (LOSSES | RECALL, ""),
        (
            LOSSES | RECALL | {"loss/contrastive": 10.95},
            "loss has not left chance .*10.95, chance is 11.*learning_rate",
        ),
        (LOSSES | RECALL | {"loss/contrastive": 10.95, "schedule/done": 0.1}, ""),  # it may still
        (LOSSES | RECALL | {"loss/contrastive": 10.95, "health/recall_at_1": 0.2}, ""),
        (LOSSES | SCHEDULE, "too early .*8.0% of its fall.* 93% of its peak.*num_epochs=145"),
        (LOSSES | SCHEDULE | {"schedule/done": 0.9}, ""),
        (LOSSES | SCHEDULE | {"schedule/falling": 0.01}, ""),
        ({"health/cluster_balance": 0.1}, "in one cluster .*balance 0.10.*clustering_weight"),
    ],
)
def test_what_is_said_of_losses_and_schedules(figures, expected):
    said = health.warnings(figures)
    assert len(said) == bool(expected)
    assert not expected or re.search(expected, said[0])


def test_a_log_says_how_a_run_ended():
    config = tiny_config(train__num_epochs=50, schedule__warmup_epochs=5, schedule__period_epochs=20)
    decay = np.exp(-np.arange(200) / 100)
    records = [
        {"step": i + 1, "epoch": i // 4, "loss": x, "loss/contrastive": x, "learning_rate": 0.5 + (i < 5)}
        for i, x in enumerate(decay.tolist())
    ]
    records.insert(7, {"step": 8, "epoch": 1, "left_out": True})
    found = levels.of_records(records, config)
    first, before, last = (decay[at].mean() for at in (slice(20), slice(160, 180), slice(180, 200)))
    assert found["schedule/falling"] == pytest.approx((before - last) / (first - last))
    assert found["loss/contrastive"] == pytest.approx(decay[-4:].mean())
    assert (found["schedule/done"], found["schedule/rate"], found["schedule/period_ends"]) == (1, 0.5 / 1.5, 65)
    assert levels.falling(decay[::-1]) == levels.falling(RNG.normal(size=200)) == levels.falling(decay[:19]) == 0
    assert levels.of_records([], config) == {}


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    data = builders.build(Faces((96, 72, 8), missing=0.3), tmp_path_factory.mktemp("data"))
    folder = tmp_path_factory.mktemp("run")
    changes = {"data__standardize": "person", "checkpoint__every_epochs": 1, "checkpoint__keep_newest": 9}
    pretrain.pretrain(tiny_config(data, **changes), folder, devices=jax.devices()[:1])
    return folder


def test_the_figures_of_a_run_are_those_of_its_validation_split(run):
    found = health.of_run(run)
    split = probe.represent_split(run, "validation")
    expected = health.measure(split.representations, split.present, clusters=split.clusters, num_clusters=4)
    for name in ("health/rows", "health/effective_rank", "health/effective_rank/text", "health/cluster_balance"):
        assert found[name] == pytest.approx(expected[name], rel=1e-3)
    assert found["health/rows"] == 72
    assert 0 < found["health/recall_at_1_chance"] < 1 / 40
    assert -1 < found["health/clusters_nmi_group"] < 0.3
    assert found["best/contrastive"] < found["loss/contrastive"] < found["chance/contrastive"] * 1.01
    assert all(isinstance(x, float) and math.isfinite(x) for x in found.values())
    assert found["chance/reconstruction"] == pytest.approx(3, rel=0.01)  # the variance of three standardised modalities


def test_an_early_checkpoint_is_judged_by_what_was_known_then(run):
    found = health.of_run(run, 6)  # the first of four epochs, before there are clusters
    assert found["schedule/done"] == 1 / 4
    assert "health/cluster_balance" not in found
    assert found["loss/contrastive"] > health.of_run(run)["loss/contrastive"]
