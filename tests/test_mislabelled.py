"""Likely wrong labels and idle modalities, against loops, SciPy and scikit-learn."""

import numpy as np
import pytest
from scipy import stats
from sklearn.linear_model import LogisticRegression
from sklearn.preprocessing import StandardScaler

from conclugen_jax.data import digits
from conclugen_jax.errors import ConclugenError
from conclugen_jax.evaluate import mislabelled


def blobs(n=90, classes=3, dim=6, seed=0):
    rng = np.random.default_rng(seed)
    labels = np.arange(n) % classes
    return rng.normal(size=(classes, dim))[labels] * 2 + rng.normal(size=(n, dim)), labels


def nobody(n):
    return np.full(n, ""), np.arange(n)


def test_confident_disagreement_by_hand():
    rng = np.random.default_rng(0)
    p, labels = rng.dirichlet(np.ones(4), size=60), rng.integers(3, size=60)  # the last class has no row
    p[7] = np.nan
    found = mislabelled.confident(p, labels)
    known = [i for i in range(60) if i != 7]
    thresholds = [np.mean([p[i, j] for i in known if labels[i] == j]) for j in range(3)]
    np.testing.assert_allclose(found.thresholds, [*thresholds, np.nan])
    joint = np.zeros((4, 4), int)
    for i in known:
        reached = [j for j in range(3) if p[i, j] >= thresholds[j]]
        counted = max(reached, key=lambda j, i=i: p[i, j]) if reached else -1
        assert found.suggested[i] == counted
        if reached:
            joint[labels[i], counted] += 1
        others = [p[i, j] for j in range(4) if j != labels[i]]
        assert found.margin[i] == pytest.approx((1 + p[i, labels[i]] - max(others)) / 2)
        assert found.self_confidence[i] == p[i, labels[i]]
    np.testing.assert_array_equal(found.joint, joint)
    sizes = [sum(labels[i] == j for i in known) for j in range(3)]
    errors = sum(sizes[j] * (1 - joint[j, j] / joint[j].sum()) for j in range(3))
    assert found.errors == pytest.approx(errors)
    assert found.suggested[7] == -1
    assert np.isnan(found.self_confidence[7])


def test_equal_probabilities_reach_their_threshold():
    found = mislabelled.confident(np.full((3, 3), 1 / 3), np.arange(3))
    np.testing.assert_array_equal(found.suggested, 0)


@pytest.mark.parametrize("seed", range(3))
def test_swapped_labels_of_digits_come_first(seed):
    """Of 5 % swapped at random at least 80 % are among the first 7 %."""
    rows = [row for split in digits.SPLITS for row in digits.Digits().examples(split)]
    vectors = np.array([np.concatenate(list(row.features.values())) for row in rows])
    labels = np.array([row.label for row in rows])
    rng = np.random.default_rng(seed)
    swapped = rng.choice(len(rows), len(rows) // 20, replace=False)
    labels[swapped] = (labels[swapped] + rng.integers(1, 10, len(swapped))) % 10
    folds = mislabelled.folds(labels, *nobody(len(rows)))
    found = mislabelled.confident(mislabelled.out_of_fold(vectors, labels, folds, 10), labels)
    first = np.argsort(found.self_confidence, kind="stable")[: round(0.07 * len(rows))]
    assert np.isin(swapped, first).mean() >= 0.8
    assert 0.5 * len(swapped) < found.errors < 1.5 * len(swapped)


def test_probabilities_are_of_the_other_folds():
    x, labels = blobs()
    folds = mislabelled.folds(labels, *nobody(90))
    found = mislabelled.out_of_fold(x, labels, folds, 4)
    seen = np.concatenate([others for _, others in folds])
    np.testing.assert_array_equal(np.sort(seen), np.arange(90))
    z = StandardScaler().fit_transform(x)
    for train, others in folds:
        probe = LogisticRegression(C=mislabelled.C_TIMES_DIM / 6, max_iter=2000).fit(z[train], labels[train])
        np.testing.assert_allclose(found[others, :3], probe.predict_proba(z[others]), atol=1e-6)
    assert (found[:, 3] == 0).all()


@pytest.mark.parametrize("dim", [40, 200])
def test_wide_vectors_are_reduced_to_what_matters(monkeypatch, dim):
    """Without noise beyond the components that are kept, nothing changes."""
    x, labels = blobs()
    wide, folds = x @ np.random.default_rng(2).normal(size=(6, dim)), mislabelled.folds(labels, *nobody(90))
    found = mislabelled.out_of_fold(wide, labels, folds, 3)
    monkeypatch.setattr(mislabelled, "MOST_DIM", 8)
    np.testing.assert_allclose(mislabelled.out_of_fold(wide, labels, folds, 3), found, atol=2e-3)


def test_persons_and_copies_stay_together():
    _, labels = blobs()
    groups = np.array([f"p{i // 9}" for i in range(90)])
    groups[80:] = ""  # rows that nobody is known of may be anywhere
    for train, others in mislabelled.folds(labels, groups, np.arange(90)):
        assert not set(groups[train]) & set(groups[others]) - {""}
    copies = np.arange(90) // 3 * 3
    for train, others in mislabelled.folds(labels, np.full(90, "one"), copies):
        assert not set(copies[train]) & set(copies[others])


def test_a_class_of_one_fold_is_not_judged():
    x, labels = blobs()
    labels[4] = 3
    found = mislabelled.out_of_fold(x, labels, mislabelled.folds(labels, *nobody(90)), 4)
    np.testing.assert_array_equal(np.flatnonzero(np.isnan(found).any(axis=1)), [4])
    assert mislabelled.confident(found, labels).judged.tolist() == [30, 29, 30, 0]


@pytest.mark.parametrize(
    ("labels", "copies", "said"),
    [
        ([2] * 5, range(5), "5 rows of 1 class; cross-validation needs two classes, and two different rows of one"),
        ([0, 1], range(2), "2 rows of 2 classes;"),
        ([0, 0, 0], [0, 0, 0], "3 rows of 1 class;"),
        ([], [], "0 rows of 0 classes;"),
    ],
)
def test_what_cannot_be_cut_is_refused(labels, copies, said):
    with pytest.raises(ConclugenError, match=said):
        mislabelled.folds(np.array(labels, int), np.full(len(labels), ""), np.array(copies, int))


def test_interval_of_rows_and_of_persons():
    rng = np.random.default_rng(0)
    d = rng.integers(-1, 2, 40).astype(float)
    by_rows = stats.ttest_1samp(d, 0).confidence_interval(0.95)
    assert mislabelled.interval(d, np.full(40, "")) == pytest.approx(tuple(by_rows))
    groups = np.array([f"p{i % 7}" for i in range(40)])
    sums = [sum(d[i] - d.mean() for i in range(40) if groups[i] == g) for g in sorted(set(groups))]
    half = stats.t.ppf(0.975, 6) * np.sqrt(7 / 6 * sum(s**2 for s in sums)) / 40
    assert mislabelled.interval(d, groups) == pytest.approx((d.mean() - half, d.mean() + half))
    assert mislabelled.interval(np.zeros(9), np.full(9, "")) is None


def test_a_modality_of_noise_adds_nothing():
    x, labels = blobs(240)
    noise = np.random.default_rng(1).normal(size=(240, 5))
    vectors, present = {"face": x, "noise": noise}, {"face": np.ones(240, bool), "noise": np.arange(240) % 4 > 0}

    def fused(names):
        return np.concatenate([np.where(present[m][:, None], vectors[m], 0) for m in names], axis=1)

    folds = mislabelled.folds(labels, *nobody(240))
    face, noise = mislabelled.worth(fused, present, labels, np.full(240, ""), folds, 3)
    assert (face.modality, face.rows, noise.rows) == ("face", 180, 180)
    assert face.interval[0] > 0.2
    assert noise.interval is None or noise.interval[0] <= 0
    rows = present["noise"]
    alone = mislabelled.out_of_fold(fused(["face"]), labels, folds, 3).argmax(axis=1) == labels
    assert noise.without == face.alone == alone[rows].mean()
    assert face.difference == face.together - face.without
