"""The figures of a report, section by section: label efficiency, confusion matrices, pretraining, maps."""

import itertools
import math
from collections.abc import Collection, Mapping, Sequence
from typing import Any

import numpy as np

from conclugen_jax.study.report import charts, tables as report_tables
from conclugen_jax.study.report.charts import Series
from conclugen_jax.study.report.reading import PRETRAINING, Run, Study
from conclugen_jax.study.report.tables import Part

BINS = 120

TERMS = {
    "loss": "Loss, all terms",
    "loss/contrastive": "Contrastive term (L_MMS)",
    "loss/clustering": "Clustering term (L_Clu)",
    "loss/reconstruction": "Reconstruction term (L_Rec)",
    "loss/instance": "Instance term (L_NCE)",
}
KMEANS = {
    "kmeans/iterations": "k-means iterations per step",
    "kmeans/largest_cluster": "Share of the points in the largest cluster",
    "kmeans/empty_clusters": "Empty clusters",
}
PROBES = {
    "clustering/nmi": "NMI of clusters and labels",
    "knn/accuracy": "Accuracy of nearest neighbours",
    "linear/accuracy": "Accuracy of a linear probe",
    "knn/mae": "Mean absolute error of nearest neighbours",
    "linear/mae": "Mean absolute error of a linear probe",
}


def label_efficiency(study: Study) -> list[Part]:
    """Draw accuracy against labels per class, a figure beside the table of each data set with two numbers of labels."""
    own = {method: i for i, method in enumerate(study.methods)}
    styles, spare = {}, itertools.count(len(own))
    for method, protocol in dict.fromkeys((s.method, s.protocol) for s in study.summary):
        styles[method, protocol] = next(spare) if own[method] in styles.values() else own[method]
    parts, used = [], {}
    for key, facts in study.datasets.items():
        title, table = report_tables.dataset_title(study, key), report_tables.label_efficiency(study, key)
        places = positions({s.labels for s in study.summary if s.dataset == key})
        measure = report_tables.measures_of(facts)[0]
        series = _efficiencies(study, key, measure, styles, places)
        if table and series:
            svg = charts.line_chart(
                f"Accuracy against labels per class, {title}",
                series,
                x_label="labels per class",
                y_label=f"{report_tables.NAMES[measure]} in %",
                x_ticks=[(x, str(number or "all")) for number, x in places.items()],
                y_bounds=(0, 100),
                height=290,
            )
            parts.append(Part(title, figures=[("", svg)], table=table))
            used |= {one.name: one.style for one in series}
        elif table:
            parts.append(Part(title, table=table))
    note = "Bars are 95 % intervals over seeds; one that reaches the edge goes beyond it. The axis is logarithmic up to “all”."
    return [Part(legend=list(used.items()), notes=[note]), *parts]


def _efficiencies(
    study: Study, key: str, measure: str, styles: Mapping[tuple[str, str], int], places: Mapping[int, float]
) -> list[Series]:
    """Return the line of each method and protocol on a data set; one point is no line, the table has it."""
    points: dict[tuple[str, str], list] = {line: [] for line in styles}
    for s in (s for s in study.summary if s.dataset == key):
        score = s.scores.get(measure)
        if score is not None and score.mean is not None:
            heights = 100 * np.array([score.mean, *(score.interval or (math.nan, math.nan))])
            points[s.method, s.protocol].append((places[s.labels], *heights.tolist()))
    return [Series(study.label(*line), styles[line], found) for line, found in points.items() if len(found) > 1]


def positions(labels: Collection[int]) -> dict[int, float]:
    """Return the place of each number of labels on the axis: logarithmic, all labels (0) a step after the last."""
    places = {k: math.log2(k) for k in sorted(labels) if k}
    known = list(places.values()) or [0.0]
    step = max((known[-1] - known[0]) / max(len(known) - 1, 1), 1.0)
    return places | ({0: known[-1] + step} if 0 in labels else {})


def confusion(study: Study) -> list[Part]:
    """Show the confusion matrices of every method, with all labels or as many as the study went up to."""
    parts = []
    for key, facts in study.datasets.items():
        title, labels = report_tables.dataset_title(study, key), report_tables.most_labels(study, key)
        if facts.kind == "value":
            parts.append(Part(notes=[f"{title}: numbers for labels, so no confusion matrix."]))
            continue
        cells: dict[tuple[str, str], list[Any]] = {}
        for c in study.cells:
            if facts.kind != "unknown" and (c.dataset, c.labels) == (key, labels) and c.confusion_matrix is not None:
                cells.setdefault((c.method, c.protocol), []).append(c.confusion_matrix)
        shown = []
        for line in sorted(cells, key=lambda line: study.rank(*line)):
            counts, matrices = np.sum(cells[line], axis=0).tolist(), []
            if facts.kind == "multi":
                matrices = [(name, ("no", "yes"), one) for name, one in zip(facts.classes, counts, strict=True)]
            shown.append((study.label(*line), matrices or [("", facts.classes, counts)]))
        note = (
            f"Test split, {report_tables.words_of_labels(labels)}; rows: true class (its examples), columns: predicted class; "
            "in % of each row, summed over seeds and draws of labels; counts on hover."
        )
        parts += [Part(title, notes=[note], figures=shown)] if shown else []
    return parts or [Part(text="No run has left a confusion matrix.")]


def pretraining(study: Study) -> list[Part]:
    """Draw losses, k-means and online probes against steps, a line per pretraining."""
    if not study.runs:
        return [Part(text=f"There is no pretraining run in {study.path / PRETRAINING}.")]
    note = "Mean over seeds, the band from the least to the greatest; long runs are averaged over stretches of steps."
    styles = {name: list(study.methods).index(study.user(name)) for name in study.runs}
    parts = [Part(legend=[(study.pretraining_title(name), style) for name, style in styles.items()], notes=[note])]
    groups = (
        ("Losses", TERMS, "metrics", "No losses are logged."),
        ("k-means", KMEANS, "metrics", "No k-means is logged: no method clusters, or clustering has not begun."),
        ("Probes during pretraining", PROBES, "probes", "No probes ran during pretraining."),
    )
    for heading, keys, log, nothing in groups:
        bounds = (-math.inf if keys is TERMS else 0.0, math.inf)  # counts and shares
        drawn = []
        for key, title in keys.items():
            series = [
                Series(study.pretraining_title(name), styles[name], points, band=True)
                for name, runs in study.runs.items()
                if (points := curve([getattr(run, log) for run in runs.values()], key))
            ]
            if series:
                drawn.append((title, charts.line_chart(title, series, x_label="step", y_bounds=bounds)))
        parts.append(Part(heading, figures=drawn, text="" if drawn else nothing))
    records = [r for runs in study.runs.values() for run in runs.values() for r in run.probes]
    protocols = dict.fromkeys(str(r["protocol"]) for r in records if "protocol" in r)
    parts.append(Part(notes=[f"Protocol: {protocol}" for protocol in protocols]))
    titles = {study.pretraining_title(name): runs[min(runs)] for name, runs in study.runs.items()}
    sizes = [(title, chart) for title, run in titles.items() if (chart := _sizes(run, f"Cluster sizes of {title}"))]
    return [*parts, Part("Cluster sizes, first seed, largest at the bottom", figures=sizes)] if sizes else parts


def curve(logs: Sequence[Sequence[Mapping[str, Any]]], key: str) -> list[tuple[float, float, float, float]]:
    """Return (step, mean over logs, least, greatest) of a logged value, long logs averaged over stretches of steps.

    There is a log, records with ``step``, for each seed; those whose value is no finite number are left out.
    """
    values = [
        (r["step"], r[key], seed) for seed, log in enumerate(logs) for r in log if math.isfinite(r.get(key, math.nan))
    ]
    if not values:
        return []
    steps, heights, seeds = np.array(values, float).T
    stretches = (steps - steps.min()) // max(1.0, (np.ptp(steps) + 1) / BINS)
    points = []
    for stretch in np.unique(stretches):
        here = stretches == stretch
        means = [float(heights[here & (seeds == seed)].mean()) for seed in np.unique(seeds[here])]
        ends = (min(means), max(means)) if len(means) > 1 else (math.nan, math.nan)
        points.append((float(steps[here].mean()), float(np.mean(means)), *ends))
    return points


def _sizes(run: Run, title: str) -> str:
    """Draw cluster sizes over time as layers; nothing before there are two probes with them."""
    steps, shares = [], []
    for r in run.probes:
        sizes = r.get("cluster_sizes", ())
        if sum(sizes):
            steps.append(r["step"])
            shares.append([size / sum(sizes) for size in sorted(sizes, reverse=True)])
    return charts.stacked(title, steps, shares, x_label="step") if len(steps) > 1 else ""
