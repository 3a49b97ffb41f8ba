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
    more = probe.label_efficiency({"good": vectors["good"]}, labels, labels, labels_per_class=(31,), num_draws=2)
    assert more[0].accuracy == results["good", 0][:2]  # all that there are


def test_drawn_labels_are_as_many_of_each_class():
    labels = np.array([0, 1, 2] * 10)
    rows = probe.draw_labels(labels, 4, seed=0)
    assert np.bincount(labels[rows]).tolist() == [4, 4, 4]
    assert len(set(rows.tolist())) == 12
    assert not np.array_equal(rows, probe.draw_labels(labels, 4, seed=1))
    np.testing.assert_array_equal(probe.draw_labels(labels, 0, seed=0), np.arange(30))


def test_a_class_with_fewer_labels_gives_all_of_them():
    labels = np.array([0] * 9 + [1] + [2] * 3)
    rows = probe.draw_labels(labels, 5, seed=0)
    assert np.bincount(labels[rows]).tolist() == [5, 1, 3]
    # The draws of other classes are those that they were.
    rng = np.random.default_rng(0)
    np.testing.assert_array_equal(rows[:5], np.sort(rng.choice(9, 5, replace=False)))


def test_classes_never_predicted_are_counted_by_name():
    x = np.array([[0.0], [0.1], [5.0], [5.1], [0.05]])
    test = np.array([[0.0], [5.0], [0.02]])
    names = ("calm", "happy", "sad", "angry")
    # 'sad' has one training example amid those of 'calm'; no test example is 'angry', no training example either.
    options = {"labels_per_class": (2, 0), "num_draws": 3, "names": names}
    found = probe.label_efficiency({"x": (x, test)}, np.array([0, 0, 1, 1, 2]), np.array([0, 1, 2]), **options)
    assert [one.never_predicted for one in found] == [{"sad": 3}, {"sad": 1}]
    assert found[0].accuracy == [2 / 3] * 3


@pytest.mark.parametrize(
    ("train", "test", "message"),
    [
        (
            [1, 1],
            [0, 1],
            "2 training rows with labels of 'happy', 2 test rows; a classifier needs training rows of two",
        ),
        ([0, 1], [], "2 training rows with labels of 'calm' and 'happy', 0 test rows; a classifier needs"),
        ([], [0], "0 training rows with labels of no class, 1 test rows; a classifier needs"),
    ],
)
def test_labels_that_no_classifier_can_use_are_refused_by_name(train, test, message):
    vectors = {"x": (np.ones((len(train), 2)), np.ones((len(test), 2)))}
    with pytest.raises(ConclugenError, match=message):
        probe.label_efficiency(vectors, np.array(train, int), np.array(test, int), names=("calm", "happy"))
