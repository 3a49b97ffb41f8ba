"""The report of a study: its numbers in HTML and Markdown, its figures, what is missing or damaged, and how it looks."""

import copy
import html.parser
import json
import re
import shutil
import sys

import jax
import numpy as np
import pytest

from conclugen_jax import pretrain
from conclugen_jax.data import builders, manifest, shards
from conclugen_jax.data.sources import LabelSpec
from conclugen_jax.errors import ConclugenError
from conclugen_jax.evaluate import probe
from conclugen_jax.run import checkpoint
from conclugen_jax.study.report import charts, report
from conclugen_jax.study.report import embedding_map as report_map
from conclugen_jax.study.report import figures as report_figures
from conclugen_jax.study.report import published as report_published
from conclugen_jax.study.report import reading as report_study
from conclugen_jax.study.report import tables as report_tables
from conclugen_jax.study.report.charts import Series
from tests.browser import CHROMIUM, Browser
from tests.helpers import Faces, run, tiny_config

NASTY = "</td><script>alert(1)</script> | & \"quoted\" 'x' `*_[a](http://b.c)_*` \u202e\x00\ud800 \\"
VOID = {"meta", "br", "hr", "img", "input", "link"}


class Page(html.parser.HTMLParser):
    """Tags, tables (rows of cells, the lines of a cell in a list) and text of each section; tags must be balanced."""

    def __init__(self, text):
        super().__init__(convert_charrefs=True)
        self.tags, self.tables, self.sections, self.figures, self._open, self._section = [], [], {}, {}, [], ""
        self.feed(text)
        self.close()
        assert not self._open, self._open

    def handle_starttag(self, tag, attributes):
        attributes = dict(attributes)
        self.tags.append((tag, attributes))
        if tag not in VOID:
            self._open.append(tag)
        if tag == "section":
            self._section = attributes["id"]
        if tag == "table":
            self.tables.append([])
        if tag == "tr":
            self.tables[-1].append([])
        if tag in ("td", "th"):
            self.tables[-1][-1].append([""])
        if tag == "span":
            self.tables[-1][-1][-1].append("")
        if tag == "svg" and "aria-label" in attributes:
            self.figures[attributes["aria-label"]] = []

    def handle_endtag(self, tag):
        assert self._open.pop() == tag, (tag, self.getpos())

    def handle_data(self, data):
        self.sections[self._section] = self.sections.get(self._section, "") + data
        if {"td", "th"} & set(self._open):
            self.tables[-1][-1][-1][-1] += data
        if "svg" in self._open and self.figures:
            self.figures[list(self.figures)[-1]].append(data)

    def row(self, name):
        """The first row whose first cell is that."""
        return next(r for t in self.tables for r in t if r[0][0] == name)


def score(mean, std=None, low=None, high=None):
    return {"mean": mean, "std": std, "interval": None if low is None else [low, high]}


def cell(dataset, method, protocol, labels, seed, matrix, **changes):
    scores = {"accuracy": 0.5, "f1": 0.5, "precision": 0.5, "recall": 0.5}
    return {
        "dataset": dataset,
        "method": method,
        "protocol": protocol,
        "labels_per_class": labels,
        "seed": seed,
        "draws": 1,
        "status": "done",
        "error": None,
        "path": f"{protocol}/{dataset}/{method}/seed_{seed}/labels_{labels}",
        "scores": scores,
        "validation": {},
        "confusion_matrix": matrix,
        **changes,
    }


def summary(dataset, method, protocol, labels, n, **scores):
    return {
        "dataset": dataset,
        "method": method,
        "protocol": protocol,
        "labels_per_class": labels,
        "n": n,
        "scores": scores,
    }


def results(data):
    """A study of five data sets by hand: real faces, MELD and MOSEI with published numbers, and numbers to predict."""
    meld = ["neutral", "surprise", "fear", "sadness", "joy", "disgust", "anger"]
    mosei = ["Happiness", "Sadness", "Anger", "Fear", "Disgust", NASTY]
    nowhere = {"path": "/nowhere", "version": "1.0.0", "sha256": "0" * 64, "num_examples": {"train": 10, "test": 1234}}
    faces = {**nowhere, "path": str(data), "sha256": manifest.read(data).fingerprint()}
    seven = np.diag(np.arange(1, 8)) + np.eye(7, k=1, dtype=int)
    pair = [[[90, 10], [25, 75]]] * 6
    square = [[5, 1, 0, 0], [0, 6, 0, 0], [0, 0, 6, 0], [0, 0, 2, 4]]
    efficiency = [(2, 0.50), (20, 0.75), (0, 0.90)]
    return {
        "name": "faces & friends",
        "versions": {"python": "3.11.9", "jax": "0.10.2"},
        "definition": {"seeds": [0, 1], "comment": NASTY},
        "datasets": {
            "faces": {**faces, "name": "faces", "kind": "single", "classes": ["calm", "happy", "sad", "angry"]},
            "meld": {**nowhere, "name": "meld", "kind": "single", "classes": meld},
            "mosei": {**nowhere, "name": "cmu_mosei", "kind": "multi", "classes": mosei},
            "sentiment": {**nowhere, "name": "cmu_mosei", "kind": "value", "classes": []},
        },
        "methods": {
            "conclugen": {"title": "ConCluGen", "pretraining": "conclugen"},
            "generative": {"title": "Generative", "pretraining": "generative"},
            "vision": {"title": "ConCluGen/(vision)", "pretraining": "conclugen"},
            "raw_features": {"title": "raw features", "pretraining": None},
            "supervised": {"title": "supervised baseline", "pretraining": None},
        },
        "cells": [
            *(cell("faces", m, "linear_evaluation", k, 0, square) for m in ("conclugen", "generative") for k, _ in efficiency),
            cell("meld", "conclugen", "linear_evaluation", 0, 0, seven.tolist()),
            cell("meld", "conclugen", "linear_evaluation", 0, 1, seven.tolist()),
            cell("mosei", "conclugen", "linear_evaluation", 0, 0, pair),
            cell("sentiment", "conclugen", "linear_evaluation", 0, 0, None),
            cell("meld", "generative", "fine_tuning", 0, 0, None, status="failed", error=f"step 3: {NASTY}", scores=None),
            cell("meld", "generative", "fine_tuning", 0, 1, None, status="missing", scores=None),
        ],
        "summary": [
            *(
                summary("faces", "conclugen", "linear_evaluation", k, 2, accuracy=score(x, 0.01, x - 0.09, x + 0.09))
                for k, x in efficiency
            ),
            *(summary("faces", "generative", "linear_evaluation", k, 1, accuracy=score(x - 0.1)) for k, x in efficiency),
            summary("faces", "conclugen", "fine_tuning", 2, 2, accuracy=score(0.6, 0.01, 0.51, 0.69)),
            summary("meld", "supervised", "supervised", 0, 1, accuracy=score(0.55), f1=score(0.5)),
            summary("meld", "vision", "linear_evaluation", 0, 1, accuracy=score(0.3)),
            summary(
                "meld", "conclugen", "linear_evaluation", 0, 3,
                accuracy=score(0.5712, 0.0034, 0.5628, 0.5796), f1=score(0.531), precision=score(float("nan")),
            ),
            summary("meld", "conclugen", "fine_tuning", 0, 3, accuracy=score(0.6)),
            summary("mosei", "conclugen", "linear_evaluation", 0, 1, accuracy=score(0.61), recall=score(0.7)),
            summary(
                "sentiment", "conclugen", "linear_evaluation", 0, 1,
                accuracy_2=score(0.8), mae=score(0.654321), correlation=score(0.7),
            ),
        ],
        "comparisons": [
            comparison("generative", 0.0312, [0.01, 0.0524]),
            comparison("raw_features", -0.0204, [-0.0491, 0.0083]),
            comparison("supervised", 0.01, None),
            comparison("vision", -0.03, [-0.05, -0.01]),
        ],
    }  # fmt: skip


def comparison(baseline, difference, interval):
    place = {"dataset": "faces", "protocol": "linear_evaluation", "labels_per_class": 2, "measure": "accuracy"}
    return {
        **place,
        "method": "conclugen",
        "baseline": baseline,
        "difference": difference,
        "interval": interval,
        "n": 2,
    }


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return builders.build(Faces((64, 24, 24), missing=0.3), tmp_path_factory.mktemp("report") / "data")


@pytest.fixture(scope="module")
def study(tmp_path_factory, data):
    """A study's folder with two pretraining runs; only the first one clusters."""
    folder = tmp_path_factory.mktemp("report") / "study"
    for name, changes in {
        "conclugen": {"clustering__start_epoch": 1},
        "generative": {"loss__contrastive_weight": 0.0, "loss__clustering_weight": 0.0},
    }.items():
        config = tiny_config(data, train__num_epochs=3, data__standardize=True, **changes)
        pretrain.pretrain(config, folder / "pretraining" / name / "seed_0", devices=jax.devices()[:1])
    probes = [
        {
            "step": 4 * k,
            "epoch": k,
            "knn/accuracy": 0.5 + k / 10,
            "clustering/nmi": k / 10,
            "cluster_sizes": [40 - k, 20 + k, 4],
        }
        for k in range(3)
    ]
    text = "".join(json.dumps({**p, "protocol": "k = 5, cosine"}) + "\n" for p in probes)
    (folder / "pretraining/conclugen/seed_0/probes.jsonl").write_text(text + '{"step": 12, "kn')
    (folder / "results.json").write_text(json.dumps(results(data)))
    return folder


@pytest.fixture(scope="module")
def written(study, tmp_path_factory):
    folder = tmp_path_factory.mktemp("report") / "out"
    return report.write(study, folder, maps=["conclugen", "generative"]), folder


@pytest.fixture(scope="module")
def page(written):
    return Page((written[1] / "report.html").read_text())


@pytest.fixture(scope="module")
def markdown(written):
    return (written[1] / "report.md").read_text()


def changed(study, tmp_path, change):
    """A copy of the study whose results are changed."""
    folder = shutil.copytree(study, tmp_path / "changed")
    tree = json.loads((folder / "results.json").read_text())
    change(tree)
    (folder / "results.json").write_text(json.dumps(tree))
    return folder


def test_scores_stand_beside_the_published_ones(page, markdown):
    ours = ["57.1 ± 0.3", "[56.3, 58.0]", "paper 56.6 (+0.5)"]
    table = next(t for t in page.tables if t[0][1] == ["Acc"] and t != ["56.6"] and any(ours in r for r in t))
    row = next(r for r in table if r[0] == ["ConCluGen"])
    assert row[1:] == [ours, ["53.1", "paper 53.1 (±0.0)"], ["–"], ["–"], ["3"]]
    vision = next(r for r in table if r[0] == ["ConCluGen/(vision)"])
    assert vision[1] == ["30.0", "paper 31.0 (−1.0)"]
    assert (
        "| ConCluGen | 57.1 ± 0.3 · \\[56.3, 58.0\\] · paper 56.6 (+0.5) | 53.1 · paper 53.1 (±0.0) | – | – | 3 |"
        in markdown
    )
    # the sentiment of the same corpus has no published numbers
    assert "| ConCluGen | 80.0 | – | – | 0.700 | 0.654 | 1 |" in markdown


def test_protocols_stand_beside_the_published_ones(page):
    table = next(t for t in page.tables if t[0][0] == [""])
    assert table[0][1:] == [
        ["faces 1.0.0"],
        ["meld 1.0.0"],
        ["mosei (cmu_mosei 1.0.0)"],
        ["sentiment (cmu_mosei 1.0.0)"],
    ]
    by_name = {row[0][0]: row[1:] for row in table[1:]}
    assert by_name["supervised baseline"] == [["–"], ["55.0", "paper 55.97 (−1.0)"], ["–"], ["–"]]
    assert by_name["ConCluGen, linear evaluation"][1][-1] == "paper 56.6 (+0.5)"
    assert by_name["ConCluGen, linear evaluation"][2][-1] == "paper 60.0 (+1.0)"
    assert by_name["ConCluGen, fine-tuned"][1] == ["60.0", "paper 60.03 (−0.0)"]


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


def test_comparisons_are_marked_where_zero_is_excluded(page):
    table = next(t for t in page.tables if t[0][0] == ["difference"])
    assert [row[0] for row in table[1:]] == [
        ["ConCluGen", f"minus {b}"] for b in ("Generative", "raw features", "supervised baseline", "ConCluGen/(vision)")
    ]
    assert [row[1] for row in table[1:]] == [
        ["+3.1 ✱", "[+1.0, +5.2]"],
        ["−2.0", "[−4.9, +0.8]"],
        ["+1.0", "n = 2"],
        ["−3.0 ✱", "[−5.0, −1.0]"],
    ]


def test_signs():
    assert [report_tables.signed(x) for x in (-0.0004, 0.3 - 0.1 * 3, 0.0001, 0.001)] == [
        "−0.0",
        "±0.0",
        "+0.0",
        "+0.1",
    ]


def test_label_efficiency(page):
    table = next(t for t in page.tables if t[0][1] == ["2 labels"] and t[0][0] == ["method"])
    assert table[0] == [["method"], ["2 labels"], ["20 labels"], ["all labels"]]
    assert table[1][1] == ["50.0 ± 1.0", "[41.0, 59.0]"]
    assert table[3] == [["ConCluGen, fine-tuned"], ["60.0 ± 1.0", "[51.0, 69.0]"], ["–"], ["–"]]
    hints = page.figures["Accuracy against labels per class, faces 1.0.0"]
    assert "ConCluGen: 75 [66, 84]" in hints
    assert "Generative: 80" in hints
    assert [h for h in hints if h.strip() in ("2", "20", "all")] == ["2", "20", "all"]
    assert report_figures.positions({0, 20, 2, 5}) == pytest.approx(
        {2: 1, 5: np.log2(5), 20: np.log2(20), 0: np.log2(20) + np.log2(10) / 2}
    )
    assert report_figures.positions({0}) == {0: 1.0}


def test_lines_of_one_point_stand_in_the_table_alone(study, tmp_path):
    def thin(tree):
        tree["summary"] = [
            summary("faces", "conclugen", "linear_evaluation", 2, 1, accuracy=score(0.5)),
            summary("faces", "generative", "linear_evaluation", 0, 1, accuracy=score(0.6)),
        ]

    folder = changed(study, tmp_path, thin)
    report.write(folder, maps=[])
    page = Page((folder / "report.html").read_text())
    assert not [figure for figure in page.figures if figure.startswith("Accuracy against labels")]
    assert [["method"], ["2 labels"], ["all labels"]] in [table[0] for table in page.tables]


def test_confusion_matrices_are_summed_and_normalised(page):
    hints = page.figures["Confusion matrix of ConCluGen on meld 1.0.0"]
    assert "true neutral, predicted surprise: 2 of 4 (50.0 %)" in hints
    assert "true anger, predicted anger: 14 of 14 (100.0 %)" in hints
    pairs = page.figures["Confusion matrix of ConCluGen on mosei (cmu_mosei 1.0.0)"]
    assert "Fear: present, predicted: 75 of 100 (75.0 %)" in pairs
    assert "Fear: absent, predicted: 10 of 100 (10.0 %)" in pairs
    assert (
        "sentiment (cmu_mosei 1.0.0): numbers for labels, so no confusion matrix."
        in page.sections["confusion-matrices"]
    )
    empty = Page(charts.confusion("t", [[0, 0], [1, 3]], ["a", "b"]))
    assert "true a, predicted a: 0 of 0 (0.0 %)" in empty.figures["t"]


def test_curves_average_over_seeds_and_stretches():
    logs = [
        [{"step": 1, "loss": 2.0}, {"step": 2, "loss": 4.0}, {"step": 3}],
        [{"step": 1, "loss": 4.0}, {"step": 3, "loss": float("nan")}],
    ]
    assert report_figures.curve(logs, "loss") == [(1, 3.0, 2.0, 4.0), (2, 4.0, None, None)]
    assert report_figures.curve(logs, "other") == []
    long = [[{"step": s, "loss": float(s)} for s in range(1, 1201)]]
    points = report_figures.curve(long, "loss")
    assert len(points) == 120
    assert points[0][:2] == (5.5, 5.5)


def test_pretraining_and_probes(page):
    text = page.sections["pretraining"]
    for heading in (
        "Clustering term (L_Clu)",
        "Reconstruction term (L_Rec)",
        "k-means iterations per step",
        "NMI of clusters",
    ):
        assert heading in text
    assert "Instance term" not in text
    assert "Protocol: k = 5, cosine" in text
    assert "number 1 by size: 59.4 % at the end" in page.figures["Cluster sizes of ConCluGen"]
    hints = page.figures["NMI of clusters and labels"]
    assert any("step 8: 0.2" in h for h in hints)
    assert not any("Generative" in h for h in hints)


def test_map_shows_the_clusters_of_the_run(study, data, tmp_path, page):
    found = report_study.read(study)
    run_, dataset = found.runs["conclugen"][0], shards.open_dataset(data)
    rows = report_map.sample(run_, dataset)
    learned = report_map.learned(run_, rows, tmp_path)
    model, variables, _ = probe.load(run_.workdir)
    logits = model.clone(axis_name=None).apply(variables, rows.features).cluster_logits
    fused = np.stack(
        [np.mean([logits[m][i] for m in rows.modalities if rows.present[m][i]], axis=0) for i in range(24)]
    )
    with checkpoint.Checkpoints(run_.workdir, read_only=True) as saved:
        centroids = saved.restore_tree(12)[0]["centroids"]
    lengths = np.maximum(np.linalg.norm(centroids, axis=1), 1e-12)
    np.testing.assert_array_equal(learned.clusters, (fused @ (centroids / lengths[:, None]).T).argmax(axis=1))
    assert learned.positions.shape == (24, 2)
    captions = page.sections["maps-of-the-test-split"]
    assert "ConCluGen, by cluster" in captions
    assert "Generative has no clusters" in captions
    assert "meld 1.0.0: no map, there is no data set in /nowhere any more." in captions
    points = [h for h in page.figures["Map of ConCluGen"] if h.endswith("points")]
    assert sum(int(re.search(r"(\d+) points", h)[1]) for h in points) == 24


def test_maps_are_kept_and_made_anew_when_damaged(study, data, tmp_path, monkeypatch):
    found, dataset = report_study.read(study), shards.open_dataset(data)
    run_ = found.runs["generative"][0]
    rows = report_map.sample(run_, dataset)
    first = report_map.learned(run_, rows, tmp_path)
    (kept,) = tmp_path.glob("*.npz")
    kept.write_bytes(kept.read_bytes()[:100])
    np.testing.assert_array_equal(report_map.learned(run_, rows, tmp_path).positions, first.positions)
    monkeypatch.setattr(report_map, "_compute", None)
    np.testing.assert_array_equal(report_map.learned(run_, rows, tmp_path).positions, first.positions)


def test_map_of_equal_rows_is_one_point():
    assert not report_map.flattened(np.ones((12, 3))).any()
    assert report_map.flattened(np.arange(12.0)[:, None]).shape == (12, 2)


def test_groups():
    single = report_map.groups_of(np.array([1, 0]), LabelSpec("single", ("a", "b")))
    assert (single[0].tolist(), single[1]) == ([1, 0], ("a", "b"))
    several = report_map.groups_of(np.array([[0, 1], [0, 0], [1, 1]]), LabelSpec("multi", ("a", "b")))
    assert (several[0].tolist(), several[1]) == ([1, 2, 3], ("a", "b", "none", "several"))
    assert report_map.groups_of(np.array([-0.5, 0, 2]), LabelSpec("value", ()))[0].tolist() == [0, 1, 2]


def test_failed_and_missing_are_named(page, markdown, written):
    assert written[0].progress == "10 of 12 runs done, 1 failed, 1 missing."
    row = page.row("fine_tuning/meld/generative/seed_0/labels_0")
    assert row[1] == ["failed"]
    assert row[2][0].startswith("step 3: </td><script>")
    assert page.row("fine_tuning/meld/generative/seed_1/labels_0")[1:] == [["missing"], ["not run yet"]]
    assert "| failed | step 3: \\<" in markdown


def test_what_files_say_is_no_markup(page, written, markdown):
    assert {tag for tag, _ in page.tags}.isdisjoint({"script", "img", "a b"})
    assert page.sections["configuration-and-versions"].count("<script>alert(1)") == 1
    text = (written[1] / "report.html").read_text()
    assert not re.search("[\x00-\x08\x0b-\x1f\x7f-\x9f]", text)
    row = next(line for line in markdown.splitlines() if "step 3" in line)
    assert len(re.findall(r"(?<!\\)\|", row)) == 4
    assert not re.search(r"(?<!\\)[<`*_\[]", row.split("step 3")[1])


def test_nothing_is_loaded_from_elsewhere(page, written):
    text = (written[1] / "report.html").read_text()
    style = text.split("<style>")[1].split("</style>")[0]
    assert "url(" not in style
    assert "@import" not in style
    for tag, attributes in page.tags:
        assert tag not in ("link", "script", "iframe", "img", "object", "base", "image", "metadata")
        assert not {"src", "srcset", "xlink:href"} & set(attributes)
        assert "(" not in attributes.get("style", "").replace("var(--", "")
        assert attributes.get("clip-path", "url(#").startswith("url(#")
        assert attributes.get("href", "#").startswith("#")
        assert not any(name.startswith("on") for name in attributes)
    assert (
        "meta",
        {"http-equiv": "Content-Security-Policy", "content": "default-src 'none'; style-src 'unsafe-inline'"},
    ) in page.tags
    assert [tag for tag, _ in page.tags].count("style") == 1  # none of a figure, which would be the page's
    assert {a["href"][1:] for tag, a in page.tags if tag == "a"} == set(page.sections) - {""}
    targets = {a["id"] for _, a in page.tags if "id" in a}
    used = {a["href"][1:] for _, a in page.tags if "href" in a}
    assert used | {a["clip-path"][5:-1] for _, a in page.tags if "clip-path" in a} == targets


def test_results_alone_make_a_report(study, tmp_path):
    (tmp_path / "results.json").write_text((study / "results.json").read_text())
    report.write(tmp_path)
    page = Page((tmp_path / "report.html").read_text())
    assert "There is no pretraining run" in page.sections["pretraining"]
    assert "No pretraining run has a checkpoint" in page.sections["maps-of-the-test-split"]
    assert sorted(p.name for p in tmp_path.iterdir()) == ["report.html", "report.md", "results.json"]


def test_a_study_without_any_score_makes_a_report(study, tmp_path):
    def forget(tree):
        tree.update(summary=[], comparisons=[])
        for each in tree["cells"]:
            each.update(status="missing", scores=None, confusion_matrix=None)

    folder = changed(study, tmp_path, forget)
    shutil.rmtree(folder / "pretraining/conclugen/seed_0/checkpoints")
    (folder / "pretraining/conclugen/seed_0/probes.jsonl").unlink()
    (folder / "pretraining/generative/seed_0/metrics.jsonl").unlink()
    (folder / "pretraining/generative/seed_1").mkdir()
    written = report.write(folder)
    page = Page((folder / "report.html").read_text())
    assert written.progress == "0 of 12 runs done, 12 missing."
    for section, sentence in {
        "results": "No run of this study has scores yet.",
        "paired-comparisons": "There is nothing to compare",
        "label-efficiency": "one number of labels",
        "confusion-matrices": "numbers for labels",
        "pretraining": "No probes ran",
        "maps-of-the-test-split": "Generative, by class",
    }.items():
        assert sentence in page.sections[section], section


def test_data_sets_that_could_not_be_read_are_named(study, tmp_path):
    gone = {"path": "/gone", "error": "/gone: no such file"}
    folder = changed(study, tmp_path, lambda tree: tree["datasets"].update(meld=gone))
    assert report.write(folder, maps=[]).warnings == [
        "Data set meld could not be read when the results were collected: /gone: no such file."
    ]
    page = Page((folder / "report.html").read_text())
    assert "meld" in page.sections["results"]
    assert "on meld" not in " ".join(page.figures)


def test_other_data_are_named(study, tmp_path):
    folder = changed(study, tmp_path, lambda tree: tree["datasets"]["faces"].update(sha256="f" * 64))
    warnings = report.write(folder, maps=[]).warnings
    assert [w.split(" was ")[0] for w in warnings[1:]] == [
        f"pretraining/{m}/seed_0" for m in ("conclugen", "generative")
    ]
    assert all("ffffffffffff" in w for w in warnings)
    assert warnings[0].startswith("Data set faces in ")
    assert (folder / "report.html").read_text().count("Beware.") == 3
    assert (folder / "report.md").read_text().count("Beware.") == 3


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


def test_damaged_files_are_named(study, tmp_path):
    folder = shutil.copytree(study, tmp_path / "study")
    log = folder / "pretraining/conclugen/seed_0/metrics.jsonl"
    lines = log.read_text().splitlines(keepends=True)
    log.write_text("".join([lines[0], '{"loss": 3}\n', *lines[2:]]))
    with pytest.raises(ConclugenError, match=r"metrics\.jsonl, line 2: not a JSON object with a step"):
        report.write(folder)
    log.write_bytes(b"\xff\xfe\n")
    with pytest.raises(ConclugenError, match=r"metrics\.jsonl, line 1: not a JSON object"):
        report.write(folder)
    log.write_text("".join(lines))
    (folder / "pretraining/conclugen/seed_0/data.json").write_text("{}")
    with pytest.raises(ConclugenError, match=r"data\.json: damaged manifest"):
        report.write(folder)
    (folder / "results.json").write_text("[" * 100_000)
    with pytest.raises(ConclugenError, match=r"results\.json: not valid JSON"):
        report.write(folder)
    with pytest.raises(ConclugenError, match="no method 'conclu'"):
        report.write(study, tmp_path / "new", maps=["conclu"])
    assert not (tmp_path / "new").exists()


def test_damaged_checkpoint_is_named(study, tmp_path):
    folder = shutil.copytree(study, tmp_path / "study")
    for file in (folder / "pretraining/conclugen/seed_0/checkpoints/12").rglob("*"):
        if file.is_file() and file.stat().st_size > 1000:
            file.write_bytes(b"x" * file.stat().st_size)
    with pytest.raises(ConclugenError, match=r"conclugen/seed_0/checkpoints/12: the checkpoint is damaged"):
        report.write(folder)
    assert not (folder / "report.html").exists()


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
    series = [Series("a", 0, [(1, values[0], None, None), (2, values[1], None, None)], band=True)]
    assert ticks(charts.line_chart("t", series, x_label="step", y_label="")) == expected


def test_lines_stay_inside_their_figure():
    """One point, equal values, intervals far wider than the means."""
    for points in (
        [(3, 5.0, None, None)],
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
    svg = charts.line_chart("t", [Series(name, 0, [(1, 1.0, None, None)])], x_label=name, y_label=name)
    assert ticks(svg).count(name) == 2
    page = Page(svg)
    assert page.figures["t"].count(name) == 3


def test_maps_of_a_whole_study_fit_in_a_page():
    """Three data sets, raw features and three methods by class and by cluster: 21 maps, in less than half of 5 MB."""
    points = [(float(x), float(y)) for x, y in np.random.default_rng(0).normal(size=(report_map.POINTS, 2))]
    svg = charts.scatter("t", points, [i % 7 for i in range(len(points))], "abcdefg")
    assert svg.count("<use") == len(points)
    assert 21 * len(svg) < 2_500_000


def test_the_same_results_make_the_same_page(written, study):
    pages = [report.write(study, written[1], maps=["conclugen", "generative"]).files[0].read_bytes() for _ in range(2)]
    assert pages[0] == pages[1]
    assert len(pages[0]) < 1_000_000


@pytest.mark.parametrize("package", ["jinja2", "matplotlib"])
def test_without_an_optional_package_one_sentence_says_what_to_install(study, tmp_path, monkeypatch, package):
    for name in ("figures", "page", "charts", "drawing"):
        monkeypatch.delitem(sys.modules, f"conclugen_jax.study.report.{name}", raising=False)
        monkeypatch.delattr(f"conclugen_jax.study.report.{name}", raising=False)
    monkeypatch.setitem(sys.modules, package, None)
    with pytest.raises(ConclugenError, match=rf"needs {package}; pip install 'conclugen_jax\[report\]'"):
        report.write(study, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_command(study, tmp_path):
    result = run("launch.report", f"--study={study}", f"--output={tmp_path}/out", "--maps=")
    assert "10 of 12 runs done" in result.stdout
    assert (tmp_path / "out/report.html").exists()
    assert "results.json: cannot be read (No such file" in run("launch.report", f"--study={tmp_path}", code=2).stderr


@pytest.mark.skipif(CHROMIUM is None, reason="no chromium here to look at the page with")
def test_in_a_browser(written, tmp_path):
    with Browser(tmp_path / "profile") as browser:
        for width in (1280, 390, 320):
            for dark in (False, True):
                browser.open(written[1] / "report.html", width=width, dark=dark)
                wide = "[document.documentElement.scrollWidth, innerWidth]"
                assert browser.run(wide) == [width, width]
                sizes = browser.run("[...document.querySelectorAll('svg')].map(s => [s.clientWidth, s.clientHeight])")
                assert len(sizes) > 12
                assert all(w >= 20 and h >= 10 for w, h in sizes)
                # text of figures does not shrink on a phone, and stays within its figure
                scale = "Math.min(...[...document.querySelectorAll('svg.figure')].map(s => s.clientWidth / 360))"
                assert browser.run(scale) > (0.75 if width == 320 else 0.95)
                outside = (
                    "[...document.querySelectorAll('svg.figure text')].filter(t => {"
                    "const b = t.getBoundingClientRect(), s = t.ownerSVGElement.getBoundingClientRect();"
                    "return b.left < s.left - 1 || b.right > s.right + 1 || b.top < s.top - 1 || b.bottom > s.bottom + 1"
                    "}).map(t => t.textContent)"
                )
                assert browser.run(outside) == []
                assert browser.run("getComputedStyle(document.body).backgroundColor") == (
                    "rgb(18, 22, 27)" if dark else "rgb(255, 255, 255)"
                )
        browser.paper(tmp_path / "report.pdf")
        assert (tmp_path / "report.pdf").read_bytes().startswith(b"%PDF")
        assert browser.problems == []
