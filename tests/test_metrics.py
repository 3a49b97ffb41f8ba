"""Scores: worked by hand, and the corner cases of whole splits."""

import numpy as np
import pytest

from conclugen_jax.evaluate import metrics


def test_single_label_by_hand():
    labels, predictions = np.array([0, 0, 0, 1, 1, 2]), np.array([0, 0, 1, 1, 0, 0])
    scores = metrics.class_scores(labels, predictions, ["a", "b", "c"])
    # a: tp 2 of 3, predicted 4; b: tp 1 of 2, predicted 2; c: never predicted.
    assert scores["recall"] == scores["accuracy"] == pytest.approx(3 / 6)
    assert scores["precision"] == pytest.approx((3 * 2 / 4 + 2 * 1 / 2 + 0) / 6)
    f1 = [2 * 2 / (3 + 4), 2 * 1 / (2 + 2), 0]
    assert scores["f1"] == pytest.approx((3 * f1[0] + 2 * f1[1]) / 6)
    assert scores["confusion_matrix"] == [[2, 1, 0], [1, 1, 0], [1, 0, 0]]
    assert scores["per_class"]["c"] == {"precision": 0.0, "recall": 0.0, "f1": 0.0, "support": 1}


def test_multi_label_by_hand():
    labels = np.array([[1, 0, 1], [1, 0, 0], [0, 1, 0], [0, 0, 0]])
    predictions = np.array([[1, 0, 0], [0, 0, 0], [1, 1, 0], [0, 1, 0]])
    scores = metrics.class_scores(labels, predictions, ["x", "y", "z"])
    # Positives 2, 1, 1. (tp + tn) / n: x 2/4, y 3/4, z 3/4.
    assert scores["accuracy"] == pytest.approx((2 * 2 / 4 + 3 / 4 + 3 / 4) / 4)
    # x: tp 1, predicted 2; y: tp 1, predicted 2; z: never predicted, precision 0.
    assert scores["precision"] == pytest.approx((2 * 1 / 2 + 1 / 2 + 0) / 4)
    assert scores["recall"] == pytest.approx((2 * 1 / 2 + 1 + 0) / 4)
    assert scores["f1"] == pytest.approx((2 * 1 / 2 + 2 / 3 + 0) / 4)
    assert scores["confusion_matrix"][0] == [[1, 1], [1, 1]]
    assert scores["per_class"]["z"]["accuracy"] == pytest.approx(3 / 4)


def test_values_by_hand():
    labels, predictions = np.array([-3, -0.4, 0, 0, 1.6, 3]), np.array([-3.4, 0.2, -0.1, 0.4, 1.4, 9])
    scores = metrics.value_scores(labels, predictions)
    assert scores["mae"] == pytest.approx((0.4 + 0.6 + 0.1 + 0.4 + 0.2 + 6) / 6)
    assert scores["correlation"] == pytest.approx(np.corrcoef(labels, predictions)[0, 1])
    # Rounded: -3 0 0 0 2 3 against -3 0 0 0 1 3 (9 is clipped).
    assert scores["accuracy_7"] == pytest.approx(5 / 6)
    # Not negative: 0 0 1 1 1 1 against 0 1 0 1 1 1; both classes: F1 of the negative 1/2, of the other 3/4.
    assert scores["accuracy_2"] == pytest.approx(4 / 6)
    assert scores["f1_2"] == pytest.approx((2 * 1 / 2 + 4 * 3 / 4) / 6)
    # Without the zeros: - - + + against - + + +.
    assert scores["accuracy_2_nonzero"] == pytest.approx(3 / 4)
    assert scores["f1_2_nonzero"] == pytest.approx((2 * 2 / 3 + 2 * 4 / 5) / 4)
    constant = metrics.value_scores(np.zeros(3), np.ones(3))
    assert constant["correlation"] == constant["accuracy_2_nonzero"] == constant["f1_2_nonzero"] == 0


def test_corner_cases():
    # A class absent from the split has no weight, one row is a split, and no positive at all gives zeros, no warning.
    scores = metrics.class_scores(np.array([1]), np.array([1]), ["a", "b"])
    assert scores["accuracy"] == scores["f1"] == 1
    none = metrics.class_scores(np.zeros((2, 2)), np.ones((2, 2)), ["a", "b"])
    assert none["accuracy"] == none["f1"] == none["precision"] == none["recall"] == 0


def test_zero_counts_as_not_negative():
    scores = metrics.value_scores(np.array([0.0, -1.0, 2.0, 0.0]), np.array([0.0, -1.0, -1.0, 0.5]))
    assert scores["accuracy_2"] == 0.75
    assert metrics.value_scores(np.array([0.0, -1.0]), np.array([0.5, -1.0]))["accuracy_2"] == 1


CALM, NEVER, ABSENT = [3, 0, 0], [2, 0, 0], [0, 0, 0]


@pytest.mark.parametrize(
    ("matrices", "lines"),
    [
        ([[[3, 1], [0, 2]]], []),
        ([[CALM, NEVER, [0, 0, 1]]], ["warning: never predicted on the test split: 'sad'; weighted means hide"]),
        # A class without test examples is never called unpredicted.
        ([[CALM, ABSENT, [1, 0, 1]]], ["note: no example of the test split is 'sad'; the scores say nothing"]),
        (
            [[CALM, NEVER, ABSENT], [CALM, [0, 2, 0], ABSENT]],
            [
                "warning: never predicted on the test split: 'sad' (1 of 2 evaluations); weighted",
                "note: no example of the test split is 'joy'; the scores",
            ],
        ),
        # Any number of labels: [label][present][predicted].
        (
            [[[[1, 1], [1, 1]], [[2, 0], [2, 0]], [[4, 0], [0, 0]]]],
            [
                "warning: never predicted on the test split: 'sad'; weighted",
                "note: no example of the test split is 'joy'",
            ],
        ),
        ([], []),
    ],
)
def test_what_weighted_means_hide_is_said_by_name(matrices, lines):
    names = ("calm", "sad", "joy")[: len(matrices[0]) if matrices else 0]
    found = metrics.remarks(matrices, names)
    assert len(found) == len(lines)
    for one, begin in zip(found, lines, strict=True):
        assert one.startswith(begin)


def test_never_predicted_is_the_zero_that_f1_has():
    labels, predictions = np.array([0, 0, 1, 2]), np.array([0, 2, 0, 2])
    scores = metrics.class_scores(labels, predictions, ["a", "b", "c", "d"])
    assert metrics.never_predicted([scores["confusion_matrix"]], ["a", "b", "c", "d"]) == {"b": 1}
    assert scores["per_class"]["b"]["f1"] == 0 < scores["f1"]
