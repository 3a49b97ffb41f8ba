"""The figures of a report, section by section: label efficiency, confusion matrices, pretraining, maps."""

import itertools
import math
from collections.abc import Collection, Mapping, Sequence
from typing import Any

import numpy as np

from conclugen_jax.study.report import charts, tables as report_tables
from conclugen_jax.study.report.charts import Series
from conclugen_jax.study.report.reading import Run, Study
from conclugen_jax.study.report.tables import Part

BINS = 120

TERMS = {
    "loss": "Loss, all terms",
    "loss/contrastive": "Contrastive term (L_MMS)",
    "loss/clustering": "Clustering term (L_Clu)",
    "loss/reconstruction": "Reconstruction term (L_Rec)",
    "loss/instance": "Instance term (L_NCE)",
    "loss/fusion": "Fusion term (L_Fus)",
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
        table, measure = report_tables.label_efficiency(study, key), report_tables.measures_of(facts)[0]
        places = positions({s.labels for s in study.summary_of(key)})
        points: dict[tuple[str, str], list] = {line: [] for line in styles}
        for s in study.summary_of(key):
            score = s.scores.get(measure)
            if score is not None and not math.isnan(score.mean):
                heights = 100 * np.array([score.mean, *(score.interval or (math.nan, math.nan))])
                points[s.method, s.protocol].append((places[s.labels], *heights.tolist()))
        # One point is no line; the table has it.
        series = [Series(study.label(*line), styles[line], found) for line, found in points.items() if len(found) > 1]
        drawn = []
        if series:
            svg = charts.line_chart(
                f"Accuracy against labels per class, {facts.title(key)}",
                series,
                x_label="labels per class",
                y_label=f"{report_tables.NAMES[measure]} in %",
                x_ticks=[(x, str(number or "all")) for number, x in places.items()],
                y_bounds=(0, 100),
                height=290,
            )
            drawn = [("", svg)]
            used |= {one.name: one.style for one in series}
        parts += [Part(facts.title(key), figures=drawn, table=table)] if table else []
    edge = "one that ends at the edge of the figure may go beyond it"
    note = f"Bars are 95 % intervals over seeds; {edge}. The axis is logarithmic up to “all”."
    return [Part(legend=list(used.items())), *parts, Part(notes=[note])] if parts else []


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
        title, labels = facts.title(key), study.most_labels(key)
        if facts.kind == "value":
            parts.append(Part(notes=[f"{title}: numbers for labels, so no confusion matrix."]))
            continue
        cells: dict[tuple[str, str], list[Any]] = {}
        for c in study.cells:
            wanted = facts.kind != "unknown" and (c.dataset, c.labels, c.status) == (key, labels, "done")
            if wanted and c.confusion_matrix is not None:
                cells.setdefault((c.method, c.protocol), []).append(c.confusion_matrix)
        shown = []
        for line in sorted(cells, key=lambda line: study.rank(*line)):
            counts = np.sum(cells[line], axis=0).tolist()
            matrices = [("", facts.classes, counts)]
            if facts.kind == "multi":
                matrices = [(name, ("no", "yes"), one) for name, one in zip(facts.classes, counts, strict=True)]
            shown.append((f"{study.label(*line)}, {report_tables.seeds(len(cells[line]))}", matrices))
        note = (
            f"Test split, {report_tables.words_of_labels(labels)}; rows: true class (its examples), columns: predicted class; "
            "in % of each row, summed over seeds and draws of labels; counts on hover."
        )
        parts += [Part(title, notes=[note], figures=shown)] if shown else []
    return parts


def pretraining(study: Study) -> list[Part]:
    """Draw losses, k-means and online probes against steps, a line per pretraining."""
    if not study.runs:
        return []
    users = [(study.user(name), runs) for name, runs in study.runs.items()]
    lines = [(study.methods[user].title, list(study.methods).index(user), runs) for user, runs in users]
    note = "Mean over seeds, the band from the least to the greatest; long runs are averaged over stretches of steps."
    legend = [(f"{title}, {report_tables.seeds(len(runs))}", style) for title, style, runs in lines]
    parts = [Part(legend=legend, notes=[note])]
    groups = (
        ("Losses", TERMS, "No losses are logged."),
        ("k-means", KMEANS, "No k-means is logged: no method clusters, or clustering has not begun."),
        ("Probes during pretraining", PROBES, "No probes ran during pretraining."),
    )
    for heading, keys, nothing in groups:
        bounds = (-math.inf if keys is TERMS else 0.0, math.inf)  # counts and shares
        drawn = []
        for key, title in keys.items():
            found = [(name, style, curve([run.records for run in runs], key)) for name, style, runs in lines]
            series = [Series(name, style, points, band=True) for name, style, points in found if points]
            if series:
                drawn.append((title, charts.line_chart(title, series, x_label="step", y_bounds=bounds)))
        parts.append(Part(heading, figures=drawn, text="" if drawn else nothing))
    records = (r for _, _, runs in lines for run in runs for r in run.records)
    protocols = dict.fromkeys(str(r["protocol"]) for r in records if "protocol" in r)
    parts.append(Part(notes=[f"Protocol: {protocol}" for protocol in protocols]))
    sizes = [(title, _sizes(runs[0], f"Cluster sizes of {title}")) for title, _, runs in lines]
    sizes = [(title, chart) for title, chart in sizes if chart]
    return [*parts, Part("Cluster sizes, first seed, largest at the bottom", figures=sizes)] if sizes else parts


def curve(logs: Sequence[Sequence[Mapping[str, Any]]], key: str) -> list[tuple[float, float, float, float]]:
    """Return (step, mean over logs, least, greatest) of a logged value, long logs averaged over stretches of steps.

    There is a log, records with ``step``, for each seed; those whose value is not finite are dropped.
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
    logged = {
        r["step"]: sorted(r["cluster_sizes"], reverse=True) for r in run.records if sum(r.get("cluster_sizes", ()))
    }
    shares = [[size / sum(sizes) for size in sizes] for sizes in logged.values()]
    return charts.stacked(title, list(logged), shares, x_label="step") if len(logged) > 1 else ""
