"""The figures of a report, section by section: label efficiency, confusion matrices, pretraining, maps."""

import itertools
import math
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from conclugen_jax.data import manifest as manifest_lib
from conclugen_jax.data import shards
from conclugen_jax.errors import ConclugenError
from conclugen_jax.run import checkpoint
from conclugen_jax.study.report import charts
from conclugen_jax.study.report import embedding_map as report_map
from conclugen_jax.study.report import tables as report_tables
from conclugen_jax.study.report.charts import Series
from conclugen_jax.study.report.page import Block, Columns, Figures, Heading, Legend, Text
from conclugen_jax.study.report.reading import PRETRAINING, Run, Study
from conclugen_jax.study.report.tables import Table

NUM_MAPS = 3
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


def label_efficiency(study: Study, tables: Sequence[Table]) -> list[Block]:
    """Draw accuracy against labels per class, a figure per data set beside its table.

    Args:
      study: as read.
      tables: of the data sets that have two numbers of labels.
    """
    lines = dict.fromkeys((s.method, s.protocol) for s in report_tables.ordered(study, study.summary))
    own = {method: i for i, method in enumerate(study.methods)}
    styles, spare = {}, itertools.count(len(own))
    for method, protocol in lines:
        styles[method, protocol] = next(spare) if own[method] in styles.values() else own[method]
    by_title = {table.caption: table for table in tables}
    body, used = [], {}
    for key in study.datasets:
        title = report_tables.dataset_title(study, key)
        places = positions({s.labels for s in study.summary if s.dataset == key})
        series = _efficiencies(study, key, styles, places)
        if title not in by_title:
            continue
        if not series:
            body += [Heading(title), by_title[title]]
            continue
        used |= {one.name: one.style for one in series}
        svg = charts.line_chart(
            f"Accuracy against labels per class, {title}",
            series,
            x_label="labels per class",
            y_label=f"{report_tables.NAMES[report_tables.headline(study.datasets[key])]} in %",
            x_ticks=[(x, str(number or "all")) for number, x in places.items()],
            y_bounds=(0, 100),
            height=290,
        )
        body += [Heading(title), Columns([[Figures([("", svg)])], [by_title[title]]])]
    note = "Bars are 95 % intervals over seeds; one that reaches the edge goes beyond it. The axis is logarithmic up to “all”."
    return [Legend(list(used.items())), Text(note, note=True), *body]


def _efficiencies(
    study: Study, key: str, styles: Mapping[tuple[str, str], int], places: Mapping[int, float]
) -> list[Series]:
    """Return the line of each method and protocol on a data set; one point is no line, the table has it."""
    measure = report_tables.headline(study.datasets[key])
    scores = {(s.method, s.protocol, s.labels): s.scores.get(measure) for s in study.summary if s.dataset == key}
    scores = {place: score for place, score in scores.items() if score is not None and score.mean is not None}
    series = []
    for line, style in styles.items():
        found = [(x, scores[*line, labels]) for labels, x in places.items() if (*line, labels) in scores]
        points = [(x, *_percent(score.mean, *(score.interval or (None, None)))) for x, score in found]
        if len(points) > 1:
            series.append(Series(study.label(*line), style, points))
    return series


def positions(labels: Collection[int]) -> dict[int, float]:
    """Return the place of each number of labels on the axis: logarithmic, all labels (0) a step after the last."""
    places = {k: math.log2(k) for k in sorted(labels) if k}
    known = list(places.values()) or [0.0]
    step = max((known[-1] - known[0]) / max(len(known) - 1, 1), 1.0)
    return places | ({0: known[-1] + step} if 0 in labels else {})


def _percent(*shares: float | None) -> tuple[float | None, ...]:
    return tuple(None if x is None else 100 * x for x in shares)


def confusion(study: Study) -> list[Block]:
    """Draw the confusion matrices of every method, with all labels or as many as the study went up to."""
    body: list[Block] = []
    for key, facts in study.datasets.items():
        title, labels = report_tables.dataset_title(study, key), report_tables.most_labels(study, key)
        if facts.kind == "value":
            body.append(Text(f"{title}: numbers for labels, so no confusion matrix.", note=True))
            continue
        cells: dict[tuple[str, str], list[Any]] = {}
        for c in study.cells:
            if facts.kind != "unknown" and (c.dataset, c.labels) == (key, labels) and c.confusion_matrix is not None:
                cells.setdefault((c.method, c.protocol), []).append(c.confusion_matrix)
        draw = charts.confusion_pairs if facts.kind == "multi" else charts.confusion
        shown = []
        for method, protocol in sorted(cells, key=lambda line: study.rank(*line)):
            name, total = study.label(method, protocol), np.sum(cells[method, protocol], axis=0).tolist()
            shown.append((name, draw(f"Confusion matrix of {name} on {title}", total, facts.classes)))
        if shown:
            meaning = "rows: truly absent (no) or present (yes), columns: predicted; " if facts.kind == "multi" else ""
            note = (
                f"Test split, {report_tables.words_of_labels(labels)}; {meaning}in % of each row, summed over seeds and draws "
                "of labels; counts on hover."
            )
            body += [Heading(title), Text(note, note=True), Figures(shown)]
    return body or [Text("No run has left a confusion matrix.")]


def pretraining(study: Study) -> list[Block]:
    """Draw losses, k-means and online probes against steps, a line per pretraining."""
    if not study.runs:
        return [Text(f"There is no pretraining run in {study.path / PRETRAINING}.")]
    note = "Mean over seeds, the band from the least to the greatest; long runs are averaged over stretches of steps."
    body = [
        Legend([(study.pretraining_title(name), _style(study, name)) for name in study.runs]),
        Text(note, note=True),
    ]
    groups = (
        ("Losses", TERMS, "metrics", "No losses are logged."),
        ("k-means", KMEANS, "metrics", "No k-means is logged: no method clusters, or clustering has not begun."),
        ("Probes during pretraining", PROBES, "probes", "No probes ran during pretraining."),
    )
    for heading, keys, log, nothing in groups:
        drawn = [(title, chart) for key, title in keys.items() if (chart := _curves(study, key, title, log))]
        body += [Heading(heading), Figures(drawn) if drawn else Text(nothing)]
    records = [r for runs in study.runs.values() for run in runs.values() for r in run.probes]
    for said in dict.fromkeys(str(r["protocol"]) for r in records if "protocol" in r):
        body.append(Text(f"Protocol: {said}", note=True))
    titles = {study.pretraining_title(name): runs[min(runs)] for name, runs in study.runs.items()}
    sizes = [(title, chart) for title, run in titles.items() if (chart := _sizes(run, f"Cluster sizes of {title}"))]
    return [*body, Heading("Cluster sizes, first seed, largest at the bottom"), Figures(sizes)] if sizes else body


def _style(study: Study, pretraining: str) -> int:
    return list(study.methods).index(study.users(pretraining)[0])


def _curves(study: Study, key: str, title: str, log: str) -> str:
    series = []
    for name, runs in study.runs.items():
        points = curve([getattr(run, log) for run in runs.values()], key)
        if points:
            series.append(Series(study.pretraining_title(name), _style(study, name), points, band=True))
    if not series:
        return ""
    bounds = (-math.inf if key in TERMS else 0.0, math.inf)  # counts and shares
    return charts.line_chart(title, series, x_label="step", y_label="", y_bounds=bounds)


def curve(
    logs: Sequence[Sequence[Mapping[str, Any]]], key: str
) -> list[tuple[float, float, float | None, float | None]]:
    """Return (step, mean over logs, least, greatest) of a logged value, long logs averaged over stretches of steps.

    Args:
      logs: of the seeds; records with ``step``.
      key: what is drawn; records without it, or whose value is no finite number, are left out.
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
        ends = (min(means), max(means)) if len(means) > 1 else (None, None)
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


def maps(study: Study, cache: Path, wanted: Sequence[str] | None) -> list[Block]:
    """Draw maps of the test split of each data set: raw features, then each method's representations, its first seed.

    Args:
      study: as read.
      cache: folder of maps made before.
      wanted: methods; ``None``: the first with a checkpoint.

    Raises:
      ConclugenError: a damaged checkpoint or data set.
    """
    able = [method for method in study.methods if _checkpointed(study, method)]
    chosen = able[:NUM_MAPS] if wanted is None else list(wanted)
    if not chosen:
        return [Text("No pretraining run has a checkpoint to map." if wanted is None else "No maps were asked for.")]
    note = (
        f"At most {report_map.POINTS:,} rows, standardised; the first {report_map.COMPONENTS} principal components, then t-SNE "
        "with a fixed seed. Distances between far groups mean little. Clusters: the nearest centroid of the run’s last k-means."
    )
    body: list[Block] = [Text(note, note=True)]
    for key, facts in study.datasets.items():
        title = report_tables.dataset_title(study, key)
        if (Path(facts.path) / manifest_lib.FILE).is_file():
            drawn, missing = _maps_of(study, shards.open_dataset(facts.path, verify="size"), cache, chosen)
        else:
            drawn, missing = [], [f"no map, there is no data set in {facts.path} any more."]
        body += [Heading(title), Figures(drawn)] if drawn else []
        body += [Text(f"{title}: {sentence}", note=True) for sentence in missing]
    return body


def _maps_of(
    study: Study, dataset: shards.Dataset, cache: Path, chosen: Sequence[str]
) -> tuple[list[tuple[str, str]], list[str]]:
    """Return (caption, map) of a data set's features and of each method, and a sentence for each map that cannot be."""
    drawn, missing, seen = [], [], set()
    for method in chosen:
        name, run = study.methods[method].title, _checkpointed(study, method)
        if run is None:
            missing.append(f"no map of {name}, it has no checkpoint.")
            continue
        try:
            rows = report_map.sample(run, dataset)
        except ConclugenError as e:  # another corpus than the run was trained on may lack what it needs
            missing.append(f"no map of {name}: {e}.")
            continue
        if rows.modalities not in seen:
            seen.add(rows.modalities)
            caption = f"raw features: {', '.join(rows.modalities)}"
            drawn.append((caption, _map(caption, report_map.raw(rows, cache), rows.groups, rows.names)))
        found = report_map.learned(run, rows, cache)
        drawn.append((f"{name}, by class", _map(name, found.positions, rows.groups, rows.names)))
        if len(found.clusters):
            names = [str(k) for k in range(int(found.clusters.max()) + 1)]
            drawn.append((f"{name}, by cluster", _map(f"{name}, clusters", found.positions, found.clusters, names)))
        else:
            missing.append(f"{name} has no clusters to colour its map by.")
    return drawn, missing


def _checkpointed(study: Study, method: str) -> Run | None:
    """Return the first seed's run of a method, if it has saved a checkpoint."""
    runs = study.runs.get(study.methods[method].pretraining or "", {})
    run = runs[min(runs)] if runs else None
    return run if run and any((run.workdir / checkpoint.FOLDER).glob("[0-9]*")) else None


def _map(title: str, positions: np.ndarray, groups: np.ndarray, names: Sequence[str]) -> str:
    return charts.scatter(f"Map of {title}", positions.tolist(), groups.tolist(), names)
