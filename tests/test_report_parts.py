"""Parts of the report on their own: published numbers, charts, maps, and results that are damaged."""

import copy
import json
import re

import msgspec
import numpy as np
import pytest

from conclugen_jax.data import builders
from conclugen_jax.data.sources import LabelSpec
from conclugen_jax.errors import ConclugenError
from conclugen_jax.study.report import (
    charts,
    embedding_map as report_map,
    figures as report_figures,
    published as report_published,
    reading,
    report,
    tables as report_tables,
)
from conclugen_jax.study.report.charts import Series
from tests.helpers import Faces
from tests.reports import Page, results


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return builders.build(Faces((64, 24, 24), missing=0.3), tmp_path_factory.mktemp("report") / "data")


def test_published_numbers():
    names = report_published.KINDS
    for method in report_published.TITLES:
        for dataset in ("meld", "caer"):  # weighted recall is accuracy where there is one class per example
            scores = report_published.linear_evaluation(dataset, "single", method)
            assert scores["accuracy"] == scores["recall"]
        assert all(report_published.linear_evaluation(d, kind, method) for d, kind in names.items())
    assert report_published.linear_evaluation("cmu_mosei", "multi", "generative")["recall"] == 0.878
    assert report_published.linear_evaluation("cmu_mosei", "value", "generative") == {}
    assert report_published.linear_evaluation("digits", "single", "conclugen") == {}
    assert report_published.accuracy("caer", "single", "conclugen", "fine_tuning") == 0.5075
    assert report_published.accuracy("meld", "single", "any", "supervised") == 0.5597
    assert report_published.accuracy("meld", "single", "conclu", "fine_tuning") is None


def test_signs():
    assert [report_tables.signed(x) for x in (-0.0004, 0.3 - 0.1 * 3, 0.0001, 0.001)] == [
        "−0.0",
        "±0.0",
        "+0.0",
        "+0.1",
    ]


def test_curves_average_over_seeds_and_stretches():
    logs = [
        [{"step": 1, "loss": 2.0}, {"step": 2, "loss": 4.0}, {"step": 3}],
        [{"step": 1, "loss": 4.0}, {"step": 3, "loss": float("nan")}],
    ]
    np.testing.assert_array_equal(report_figures.curve(logs, "loss"), [(1, 3.0, 2.0, 4.0), (2, 4.0, np.nan, np.nan)])
    assert report_figures.curve(logs, "other") == []
    long = [[{"step": s, "loss": float(s)} for s in range(1, 1201)]]
    points = report_figures.curve(long, "loss")
    assert len(points) == 120
    assert points[0][:2] == (5.5, 5.5)


def test_maps_are_kept_and_made_again_when_damaged(tmp_path, monkeypatch):
    vectors = np.random.default_rng(0).normal(size=(12, 3))
    first = report_map.flattened(vectors, tmp_path)
    (kept,) = tmp_path.glob("*.npy")
    for damage in (kept.read_bytes()[:-9], b"", b"\x93NUMPY"):
        kept.write_bytes(damage)
        np.testing.assert_array_equal(report_map.flattened(vectors, tmp_path), first)
    monkeypatch.setattr(report_map, "_flattened", None)
    np.testing.assert_array_equal(report_map.flattened(vectors, tmp_path), first)


def test_map_of_equal_rows_is_one_point(tmp_path):
    assert not report_map.flattened(np.ones((12, 3)), tmp_path).any()
    assert report_map.flattened(np.arange(12.0)[:, None], tmp_path).shape == (12, 2)


def test_groups():
    single = report_map.groups_of(np.array([1, 0]), LabelSpec("single", ("a", "b")))
    assert (single[0].tolist(), single[1]) == ([1, 0], ("a", "b"))
    several = report_map.groups_of(np.array([[0, 1], [0, 0], [1, 1]]), LabelSpec("multi", ("a", "b")))
    assert (several[0].tolist(), several[1]) == ([1, 2, 3], ("a", "b", "none", "several"))
    assert report_map.groups_of(np.array([-0.5, 0, 2]), LabelSpec("value", ()))[0].tolist() == [0, 1, 2]


def test_confusion_matrices_are_of_cells_that_are_done(data):
    tree = copy.deepcopy(results(data))
    tree["cells"][-5]["status"] = "missing"
    study = msgspec.convert(tree, reading.Study)
    (part,) = [part for part in report_figures.confusion(study) if "meld" in part.heading]
    ((_, [(_, _, counts)]),) = part.figures
    assert np.sum(counts) == 34  # of the first seed alone


DAMAGES = {
    "no list": lambda t: t.update(cells=3),
    "no key": lambda t: t.pop("summary"),
    "text for a number": lambda t: t["summary"][0]["scores"]["accuracy"].update(mean="high"),
    "one end": lambda t: t["summary"][0]["scores"]["accuracy"].update(interval=[1]),
    "unknown data set": lambda t: t["cells"][0].update(dataset="fac"),
    "unknown kind": lambda t: t["datasets"]["meld"].update(kind="none"),
    "matrix of another size": lambda t: t["datasets"]["meld"]["classes"].pop(),
    "matrix of shares": lambda t: t["cells"][0]["confusion_matrix"][0].__setitem__(0, 0.5),
    "status": lambda t: t["cells"][0].update(status="fine"),
    "way out": lambda t: t["methods"]["conclugen"].update(pretraining="../other"),
    "negative": lambda t: t["cells"][0].update(seed=-1),
}


@pytest.mark.parametrize("name", DAMAGES)
def test_damaged_results_are_named(name, data, tmp_path):
    tree = copy.deepcopy(results(data))
    DAMAGES[name](tree)
    (tmp_path / "results.json").write_text(json.dumps(tree))
    with pytest.raises(ConclugenError, match=r"results\.json: not as expected \(.*\); .*collect its results again"):
        report.write(tmp_path)
    assert [p.name for p in tmp_path.iterdir()] == ["results.json"]


def ticks(svg):
    return re.findall("<text[^>]*>([^<]*)</text>", svg)


@pytest.mark.parametrize(
    ("values", "expected"),
    [
        ((0.5, 1.0), ["1", "2", "step", "0.5", "0.6", "0.7", "0.8", "0.9", "1"]),
        ((0.0, 100.0), ["1", "2", "step", "0", "20", "40", "60", "80", "100"]),
        ((3.0, 3.0), ["1", "2", "step", "2.85", "2.9", "2.95", "3", "3.05", "3.1", "3.15"]),
    ],
)
def test_ticks_are_round(values, expected):
    series = [Series("a", 0, [(1, values[0], np.nan, np.nan), (2, values[1], np.nan, np.nan)], band=True)]
    assert ticks(charts.line_chart("t", series, x_label="step")) == expected


def test_lines_stay_inside_their_figure():
    """One point, equal values, intervals far wider than the means."""
    for points in (
        [(3, 5.0, np.nan, np.nan)],
        [(0, 1.0, -50.0, 50.0), (9, 1.1, -50.0, 50.0)],
        [(0, 0.0, 0.0, 0.0), (1, 0.0, 0.0, 0.0)],
    ):
        for band in (True, False):
            svg = charts.line_chart("t", [Series("a", 3, points, band)], x_label="x", y_label="y")
            path = re.search(r'<title>a</title>\s*<path d="M ([^"]*)"', svg)
            numbers = [tuple(map(float, p.split())) for p in path[1].split("L")] if path else []
            markers = re.findall(r"<title>a[:,] .*\n.*(?:\n.*){0,12}?<use [^>]*x=\"([\d.]+)\" y=\"([\d.]+)\"", svg)
            assert len(markers) == len(points)
            numbers += [tuple(map(float, place)) for place in markers]
            assert all(40 <= x <= 350 and 10 <= y <= 200 for x, y in numbers), numbers


def test_every_style_has_its_own_marker_and_dash():
    drawn = {re.sub(r"k\d|m[0-9a-f]{10}", "", charts.swatch(k)) for k in range(20)}
    assert len(drawn) == 20


def test_names_are_drawn_as_they_are():
    """What looks like an id, a colour, a number or a formula in a name is not taken for the figure's own."""
    name = '$x$ #c0de00 0.12345 id="m"'
    svg = charts.line_chart("t", [Series(name, 0, [(1, 1.0, np.nan, np.nan)])], x_label=name, y_label=name)
    assert ticks(svg).count(name) == 2
    page = Page(svg)
    assert page.figures["t"].count(name) == 3
