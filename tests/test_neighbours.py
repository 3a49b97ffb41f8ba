"""Nearest neighbours and smoothing over them against NumPy: ties, excluded persons, fewer rows than asked for, blocks."""

import numpy as np
import pytest

from conclugen_jax.method import neighbours


def by_hand(queries, bank, k, own=False, persons=None):
    unit = [x / np.maximum(np.linalg.norm(x, axis=1, keepdims=True), 1e-12) for x in (queries, bank)]
    similarity = (unit[0].astype(np.float64) @ unit[1].T.astype(np.float64)).round(6)
    for i in range(len(queries)):
        for j in range(len(bank)):
            same = persons is not None and persons[0][i] >= 0 and persons[0][i] == persons[1][j]
            if (own and i == j) or same:
                similarity[i, j] = -np.inf
    order = np.argsort(-similarity, axis=1, kind="stable")[:, :k]
    found = np.take_along_axis(similarity, order, axis=1)
    return np.where(np.isinf(found), -1, order), found


@pytest.fixture(scope="module")
def vectors():
    return np.random.default_rng(0).normal(size=(23, 6)).astype(np.float32)


@pytest.mark.parametrize("persons", [False, True])
@pytest.mark.parametrize("own", [False, True])
@pytest.mark.parametrize("block", [4, 23, 64])
def test_neighbours_are_those_of_numpy(vectors, own, persons, block):
    ids = np.array([i % 4 if i % 7 else -1 for i in range(23)])
    who = (ids, ids) if persons else None
    rows, similarity = neighbours.nearest(
        vectors, vectors, 5, own=np.arange(23) if own else None, persons=who, block=block
    )
    expected = by_hand(vectors, vectors, 5, own, who)
    np.testing.assert_array_equal(rows, expected[0])
    np.testing.assert_allclose(similarity, expected[1], atol=2e-6)
    assert (rows.dtype, similarity.dtype) == (np.int32, np.float32)


def test_of_equals_the_first_counts():
    bank = np.array([[0, 1], [1, 0], [2, 0], [0, 3], [1, 0]], np.float32)
    rows, _ = neighbours.nearest(np.array([[5, 0], [0, 0]], np.float32), bank, 4)
    np.testing.assert_array_equal(rows, [[1, 2, 4, 0], [0, 1, 2, 3]])


def test_fewer_rows_than_asked_for_leave_gaps():
    bank = np.eye(3, dtype=np.float32)
    rows, similarity = neighbours.nearest(bank, bank, 5, own=np.arange(3), persons=(np.array([0, 0, 1]),) * 2)
    np.testing.assert_array_equal(rows, [[2, -1, -1, -1, -1], [2, -1, -1, -1, -1], [0, 1, -1, -1, -1]])
    assert np.isneginf(similarity[rows < 0]).all()


def test_unknown_persons_are_nobody():
    bank = np.eye(2, dtype=np.float32)
    rows, _ = neighbours.nearest(bank, bank, 1, persons=(np.array([-1, -1]),) * 2)
    np.testing.assert_array_equal(rows, [[0], [1]])


@pytest.mark.parametrize("own", [False, True])
def test_smoothing_is_the_weighted_mean(vectors, own):
    queries = vectors if own else vectors[:7] + 0.5
    rows, _ = by_hand(queries, vectors, 3, own)
    expected = 0.75 * queries + 0.25 * vectors[rows].mean(axis=1)
    np.testing.assert_allclose(
        neighbours.smooth_with_neighbours(queries, vectors, 3, 0.25, own=np.arange(23) if own else None),
        expected,
        atol=1e-6,
    )
    assert_alone = neighbours.smooth_with_neighbours(queries[2:3], vectors, 3, 0.25) if not own else expected[2:3]
    np.testing.assert_allclose(assert_alone, expected[2:3], atol=1e-6)  # no query changes another


def test_smoothing_takes_the_neighbours_that_there_are():
    bank = np.array([[1, 0], [0, 1]], np.float32)
    smoothed = neighbours.smooth_with_neighbours(bank, bank, 20, 0.5, own=np.arange(2))
    np.testing.assert_allclose(smoothed, [[0.5, 0.5], [0.5, 0.5]])
    alone = neighbours.smooth_with_neighbours(bank[:1], bank[:1], 20, 0.5, own=np.zeros(1))
    np.testing.assert_array_equal(alone, bank[:1])  # without neighbours it stays as it is


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda x: neighbours.nearest(x, x[:, :2], 1), r"queries \(23, 6\) in a bank \(23, 2\)"),
        (lambda x: neighbours.nearest(x, x, 0), "0 neighbours"),
        (lambda x: neighbours.smooth_with_neighbours(x, x, 1, 1.5), "weight is 1.5"),
    ],
)
def test_impossible_calls_are_refused(vectors, call, message):
    with pytest.raises(ValueError, match=message):
        call(vectors)
