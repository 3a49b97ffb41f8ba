"""Copies, near duplicates and persons as clusters, against loops over all pairs."""

import numpy as np
import pytest

from conclugen_jax.evaluate import similar


def test_copies_are_rows_with_the_same_numbers_and_modalities():
    x = np.arange(12, dtype=np.float32).reshape(6, 2)
    y = np.ones((6, 3), np.float32)
    x[4], x[5] = x[1], x[1]
    there = {"x": np.ones(6, bool), "y": np.array([1, 1, 1, 1, 1, 0], bool)}
    y[5] = 0
    assert similar.copies({"x": x, "y": y}, there).tolist() == [0, 1, 2, 3, 1, 5]
    there["y"][:] = False  # what stands in absent rows does not count
    assert similar.copies({"x": x, "y": y}, there).tolist() == [0, 1, 2, 3, 1, 1]


@pytest.mark.parametrize("block", [(7, 5), (5, 7), (64, 64)])
def test_all_pairs_above_the_threshold_are_found(block):
    rng = np.random.default_rng(0)
    x = rng.normal(size=(50, 6))
    x[31] = 3 * x[4] + 0.01 * rng.normal(size=6)
    x[40] = 0
    unit = x / np.maximum(np.linalg.norm(x, axis=1, keepdims=True), 1e-9)
    cosine = {(i, j): unit[i] @ unit[j] for i in range(50) for j in range(i + 1, 50)}
    expected = sorted((pair for pair, c in cosine.items() if c >= 0.6), key=lambda pair: -cosine[pair])
    done = []
    found = similar.near_duplicates(x, 0.6, block=block, progress=lambda *now: done.append(now))
    assert list(zip(found.first.tolist(), found.second.tolist(), strict=True)) == expected
    assert expected[0] == (4, 31)
    np.testing.assert_allclose(found.cosine, [cosine[pair] for pair in expected], atol=1e-6)
    assert found.total == len(expected) > 20
    assert done[-1] == (50, 50)
    few = similar.near_duplicates(x, 0.6, most=5, block=block)
    assert list(zip(few.first.tolist(), few.second.tolist(), strict=True)) == expected[:5]
    assert few.total == len(expected)


def test_neighbours_of_persons_by_hand():
    rng = np.random.default_rng(0)
    groups = np.array(["anna"] * 8 + ["ben"] * 3 + [""] * 6 + ["carl"])
    x = rng.normal(size=(18, 4)) + 3 * (groups == "anna")[:, None]
    labels = rng.integers(2, size=18)
    found = similar.persons(x, groups, labels, k=5)
    unit = x / np.linalg.norm(x, axis=1, keepdims=True)
    assert sorted(one.name for one in found) == ["anna", "ben"]  # carl has no other row
    for one in found:
        rows = np.flatnonzero(groups == one.name)
        number, own, same = min(5, len(rows) - 1), [], []
        for i in rows:
            near = [j for j in np.argsort(-(unit @ unit[i])) if j != i][:number]
            own.append(np.mean(groups[near] == one.name))
            same.append(np.mean(labels[near] == labels[i]))
        assert (one.rows, one.own_chance) == (len(rows), pytest.approx((len(rows) - 1) / 17))
        assert (one.own, one.same_class) == (pytest.approx(np.mean(own)), pytest.approx(np.mean(same)))
        assert one.class_chance == pytest.approx(np.mean([(np.sum(labels == labels[i]) - 1) / 17 for i in rows]))
    assert found[0].name == "anna"
    assert found[0].is_cluster
    assert found[0].above_chance == pytest.approx((found[0].own - 7 / 17) / (10 / 17))


def test_persons_who_only_show_one_class_are_no_clusters_of_their_own():
    rng = np.random.default_rng(0)
    groups, labels = np.repeat(["a", "b"], 20), np.repeat([0, 1], 20)
    x = rng.normal(size=(40, 3)) + 4 * np.eye(2, 3)[labels]
    assert not any(one.is_cluster for one in similar.persons(x, groups, labels))
    assert all(one.is_cluster for one in similar.persons(x, groups))  # without labels nothing else explains it


def test_one_person_is_nothing_to_tell():
    x = np.eye(4)
    assert similar.persons(x, np.array(["a"] * 4)) == []
    assert similar.persons(x, np.array(["a", "b", "c", ""])) == []
