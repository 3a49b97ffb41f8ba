"""Closed forms against scikit-learn, and with modalities that are missing."""

import numpy as np
import pytest

from conclugen_jax.evaluate import baselines


@pytest.fixture(scope="module")
def views():
    generator = np.random.default_rng(0)
    common = generator.normal(size=(200, 3))
    sizes = {"video": 7, "audio": 5, "text": 4}
    return {m: common @ generator.normal(size=(3, d)) + generator.normal(size=(200, d)) + 2 for m, d in sizes.items()}


def everywhere(features):
    return {m: np.ones(len(x), bool) for m, x in features.items()}


def test_two_modalities_give_the_variates_of_cca(views):
    from sklearn.cross_decomposition import CCA

    two = {m: views[m] for m in ("video", "audio")}
    found = baselines.canonical(two, everywhere(two), k=3, ridge=0)
    theirs = CCA(3, max_iter=5000, tol=1e-12).fit(two["video"], two["audio"])
    a, b = theirs.transform(two["video"], two["audio"])
    own = {m: ((x - found.mean[m]) / found.scale[m]) @ found.weights[m] for m, x in two.items()}
    for i in range(3):
        assert abs(np.corrcoef(own["video"][:, i], a[:, i])[0, 1]) > 0.9999
        assert abs(np.corrcoef(own["audio"][:, i], b[:, i])[0, 1]) > 0.9999
        expected = np.corrcoef(a[:, i], b[:, i])[0, 1]
        np.testing.assert_allclose(np.corrcoef(own["video"][:, i], own["audio"][:, i])[0, 1], expected, atol=1e-5)


def test_directions_solve_the_eigenproblem_with_ridge_and_missing_rows(views):
    present = everywhere(views) | {"text": np.arange(200) % 3 > 0}
    found = baselines.canonical(views, present, k=4, ridge=0.2)
    total, z = np.zeros((200, 200)), {}
    for m, x in views.items():
        there = x[present[m]]
        z[m] = np.where(present[m][:, None], (x - there.mean(axis=0)) / there.std(axis=0), 0)
        total += z[m] @ np.linalg.inv(z[m].T @ z[m] + 0.2 * present[m].sum() * np.eye(x.shape[1])) @ z[m].T
    values, vectors = np.linalg.eigh(total)
    g = vectors[:, ::-1][:, :4] * np.sqrt(200)
    for m in views:
        weights = np.linalg.solve(z[m].T @ z[m] + 0.2 * present[m].sum() * np.eye(z[m].shape[1]), z[m].T @ g)
        signs = np.sign((weights * found.weights[m]).sum(axis=0))
        np.testing.assert_allclose(found.weights[m], weights * signs, atol=1e-8)
    assert values[-1] > values[-5]


def test_what_stands_in_absent_rows_changes_nothing(views):
    present = everywhere(views) | {"text": np.arange(200) % 3 > 0}
    other = views | {"text": np.where(present["text"][:, None], views["text"], 1e3)}
    for form in (baselines.canonical, baselines.principal):
        a, b = (form(x, present, k=3).of(x, present) for x in (views, other))
        np.testing.assert_array_equal(a, b)
        nothing = {m: np.zeros(200, bool) for m in views}
        assert not form(views, present, k=3).of(views, nothing).any()


def test_principal_components_are_those_of_scikit_learn(views):
    from sklearn.decomposition import PCA
    from sklearn.preprocessing import StandardScaler

    found = baselines.principal(views, everywhere(views), k=5).of(views, everywhere(views))
    expected = PCA(5).fit_transform(StandardScaler().fit_transform(np.concatenate(list(views.values()), axis=1)))
    signs = np.sign((found * expected).sum(axis=0))
    np.testing.assert_allclose(found * 3, expected * signs, atol=1e-4)  # a mean over three modalities, not their sum


def test_there_are_no_more_directions_than_features(views):
    one = {"text": views["text"]}
    assert baselines.canonical(one, everywhere(one)).of(one, everywhere(one)).shape == (200, 4)


@pytest.mark.parametrize("form", [baselines.principal, baselines.canonical])
def test_a_modality_that_no_training_row_has_adds_nothing(views, form):
    nowhere, there = {"text": np.zeros(200, bool)}, everywhere(views)
    found = form(views, there | nowhere, k=3)
    np.testing.assert_allclose(found.weights["text"], 0, atol=1e-6)
    assert np.isfinite(found.of(views, there)).all()
