"""Label efficiency: drawn labels, and the same ones for all vectors."""

import numpy as np
import pytest

from conclugen_jax.errors import ConclugenError
from conclugen_jax.evaluate import probe


def test_label_efficiency_uses_the_same_labels_for_all_and_fits_all_labels_once():
    rng = np.random.default_rng(0)
    labels = np.repeat(np.arange(3), 30)
    centers = rng.normal(size=(3, 5)) * 3
    train, test = (centers[labels] + rng.normal(size=(90, 5)) for _ in range(2))
    vectors = {"good": (train, test), "same": (train, test), "noise": (rng.normal(size=(90, 5)),) * 2}
    results = {
        (r.name, r.num_labels): r.accuracy
        for r in probe.label_efficiency(vectors, labels, labels, labels_per_class=(2, 10, 0), num_draws=4)
    }
    assert results["good", 2] == results["same", 2]
    assert len(set(results["good", 2])) > 1
    assert len(results["good", 0]) == 4
    assert len(set(results["good", 0])) == 1
    assert np.mean(results["good", 10]) > np.mean(results["good", 2]) - 0.05
    assert np.mean(results["noise", 2]) < 0.6 < np.mean(results["good", 2])
    with pytest.raises(ConclugenError, match="class 0 has 30 labelled examples, 31"):
        probe.label_efficiency(vectors, labels, labels, labels_per_class=(31,))


def test_drawn_labels_are_as_many_of_each_class():
    labels = np.array([0, 1, 2] * 10)
    rows = probe.draw_labels(labels, 4, seed=0)
    assert np.bincount(labels[rows]).tolist() == [4, 4, 4]
    assert len(set(rows.tolist())) == 12
    assert not np.array_equal(rows, probe.draw_labels(labels, 4, seed=1))
    np.testing.assert_array_equal(probe.draw_labels(labels, 0, seed=0), np.arange(30))
