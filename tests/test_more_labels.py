"""The power law of the labels: known curves are found again, and the sentence says what follows from them."""

import math
import re

import numpy as np
import pytest
from scipy import optimize, stats

from conclugen_jax.study.report import more_labels
from conclugen_jax.study.report.more_labels import FARTHEST, PowerLaw
from conclugen_jax.study.report.reading import Cell, DatasetFacts, Method, Study

K = np.array([1, 5, 20, 50, 100], float)
LAW = PowerLaw(0.7, 0.5, 0.2)


def test_a_power_law_is_found_again():
    assert more_labels.fit(K, LAW.error(K)) == pytest.approx(LAW, rel=1e-6)
    assert more_labels.fit(K[:3], 0.5 * K[:3] ** -0.25) == pytest.approx((0.5, 0.25, 0), rel=1e-6)
    assert more_labels.fit(K[:3], LAW.error(K[:3])).level == 0 < more_labels.fit(K[:4], LAW.error(K[:4])).level
    assert LAW.labels(float(LAW.error(33.0))) == pytest.approx(33)
    assert LAW.labels(0.19) == PowerLaw(0, 1, 0.3).labels(0.2) == math.inf


def test_scale_and_level_are_those_of_least_squares_that_are_not_negative():
    rng, laws = np.random.default_rng(3), []
    for _ in range(20):
        errors = np.abs(rng.normal(size=5) + rng.normal() * K**-0.4)
        found = more_labels.fit(K, errors)
        design = [np.stack([K**-b, np.ones(5)], axis=1) for b in more_labels.EXPONENTS]
        least = min(optimize.nnls(x, errors)[1] for x in design)
        assert np.linalg.norm(found.error(K) - errors) == pytest.approx(least)
        laws.append(found)
    assert any(law.level == 0 for law in laws)
    assert any(law.scale == 0 for law in laws)


def curve(law, k=K, seeds=(0, 1, 2, 3, 4), noise=0.0, rng=None):
    wobble = noise * (rng or np.random.default_rng(0)).normal(size=(len(k), len(seeds)))
    return {
        float(n): {s: float(law.error(n)) + wobble[i, j] for j, s in enumerate(seeds)} for i, n in enumerate(k.tolist())
    }


def test_what_is_needed_is_where_the_curve_is_two_points_lower():
    found = more_labels.needed(curve(LAW))
    by_hand = (0.7 / (0.7 * 100**-0.5 - 0.02)) ** 2 - 100
    assert found.more == pytest.approx(by_hand, rel=1e-4)
    assert found.interval == pytest.approx((by_hand, by_hand), rel=1e-4)
    text = more_labels.sentence(found, "ConClu")
    assert text == (
        "ConClu reaches 73.0 % with 100 labels a class. About 96 [96, 96] more labelled clips a class would give 2 points."
    )


def test_the_interval_covers_the_truth():
    rng, truth = np.random.default_rng(1), more_labels._more(LAW, 100)
    found = [more_labels.needed(curve(LAW, seeds=range(8), noise=0.004, rng=rng)).interval for _ in range(20)]
    assert sum(low <= truth <= high for low, high in found) >= 15
    assert all(low < high for low, high in found)


def test_the_interval_and_the_band_are_of_the_curves_that_are_drawn(monkeypatch):
    found = more_labels.needed(curve(LAW, seeds=range(3), noise=0.01))
    more = np.sort([more_labels._more(law, 100) for law in found.drawn])
    assert found.interval == (more[10], more[389])  # 2.5 and 97.5 % of 399 steps, the nearest
    shown = []
    monkeypatch.setattr(more_labels.charts, "line_chart", lambda _, series, **__: shown.extend(series))
    more_labels._drawn(found, "ConClu")
    ends = np.quantile([law.error(np.array([1.0, 400.0])) for law in found.drawn], (0.975, 0.025), axis=0)
    band = [shown[0].points[i][2:] for i in (0, -1)]
    np.testing.assert_allclose(band, 100 * (1 - ends.T))


def test_curves_have_the_intervals_of_student():
    table = np.random.default_rng(0).normal(0.5, 0.01, size=(3, 4))
    drawn = more_labels.curves(table, 40000, np.random.default_rng(1))
    for of in (np.eye(4)[0], np.array([0, 1, 0, -1])):  # a mean, and a difference of two
        low, high = stats.ttest_1samp(table @ of, 0).confidence_interval(0.95)
        found = np.quantile(drawn @ of, (0.025, 0.975))
        np.testing.assert_allclose(found, (low, high), atol=0.03 * (high - low))
    assert (more_labels.curves(table - 0.5, 100, np.random.default_rng(1)) >= 0).all()


@pytest.mark.parametrize(
    ("law", "expected"),
    [
        (PowerLaw(0.3, 0.3, 0.1), r"About 180 \[180, 180\] more labelled clips a class would give 2 points"),
        (PowerLaw(0.3, 1.0, 0.29), r"levels off at 71\.0 %: 10 times as many labels would give less than 2 points"),
        (PowerLaw(0.0, 1.0, 0.4), "levels off at 60.0 %"),
    ],
)
def test_what_more_labels_give_is_said(law, expected):
    found = more_labels.needed(curve(law))
    assert (found.more > FARTHEST * 100) == ("levels off" in expected)
    assert re.search(expected, more_labels.sentence(found, "ConClu"))


def test_too_little_gives_no_curve_or_no_interval():
    assert more_labels.needed({}) is None
    assert more_labels.needed(curve(LAW, K[:2])) is None
    apart = curve(LAW)
    apart[5.0] = {9: 0.3}  # no seed has all
    assert more_labels.needed(apart) is None
    two = more_labels.needed(curve(LAW, seeds=(0, 1)))
    assert two.interval is None
    assert "no interval: fewer than 3 seeds" in more_labels._note(two)


def test_a_report_has_the_curve_of_its_reference():
    cells = [
        Cell(
            "mine", method, "probe", k, seed, "done", "x", None, None, {"accuracy": 1 - float(LAW.error(k or 400 / 4))}
        )
        for method in ("ours", "raw")
        for k in (1, 5, 20, 50, 0)
        for seed in range(3)
    ]
    facts = DatasetFacts("/mine", "mine", "1.0.0", "0", "single", tuple("abcd"), {"train": 400})
    methods = {"ours": Method("Ours", None), "raw": Method("Raw", None)}
    study = Study("s", {}, {"reference": "ours"}, {"mine": facts}, methods, cells, [], [])
    (part,) = more_labels.parts(study)
    assert part.text.startswith("Ours, probe reaches 73.0 % with 100 labels a class. About 96 [")
    assert (
        "Fitted to 5 numbers of labels: error = 0.7 k^-0.5 + 0.2 for k labels a class; interval over 3 seeds"
        in part.notes[0]
    )
    ((_, svg),) = part.figures
    assert ">400</text>" in svg
    study.datasets["mine"].kind = "value"
    assert list(more_labels.parts(study)) == []
