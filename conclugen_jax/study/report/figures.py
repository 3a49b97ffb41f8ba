"""The figures of a report as HTML, section by section: label efficiency, confusion matrices, pretraining, maps."""

import itertools
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from conclugen_jax.data import manifest as manifest_lib
from conclugen_jax.data import shards
from conclugen_jax.errors import ConclugenError
from conclugen_jax.run import checkpoint
from conclugen_jax.study.report import embedding_map as report_map
from conclugen_jax.study.report import charts as report_svg
from conclugen_jax.study.report import tables as report_tables
from conclugen_jax.study.report.page import figures, legend, paragraph, side_by_side, subtitle
from conclugen_jax.study.report.reading import PRETRAINING, PROTOCOLS, Cell, Run, Score, Study
from conclugen_jax.study.report.charts import Series

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


def label_efficiency(study: Study, tables: Mapping[str, str]) -> str:
    """Accuracy against labels per class, a figure per data set beside its table.

    Args:
      study: as read.
      tables: title of a data set -> its table as HTML; only data sets with two numbers of labels have one.
    """
    lines = dict.fromkeys((s.method, s.protocol) for s in report_tables.ordered(study, study.summary))
    own = {method: i for i, method in enumerate(dict.fromkeys([*study.titles, *(method for method, _ in lines)]))}
    styles, spare = {}, itertools.count(len(own))
    for method, protocol in lines:
        styles[method, protocol] = next(spare) if own[method] in styles.values() else own[method]
    drawn, used = [], {}
    for key, facts in study.datasets.items():
        title, measure = report_tables.dataset_title(study, key), report_tables.headline(facts)
        scores = {(s.method, s.protocol, s.labels): s.scores.get(measure) for s in study.summary if s.dataset == key}
        scores = {place: score for place, score in scores.items() if score is not None and score.mean is not None}
        places = positions({labels for _, _, labels in scores})
        if title not in tables or not scores:
            continue
        series = []
        for line, style in styles.items():
            points = [(x, scores[*line, labels]) for labels, x in places.items() if (*line, labels) in scores]
            if len(points) > 1:  # one point is no curve; the table has it
                used[study.label(*line)] = style
                series.append(Series(study.label(*line), style, [(x, *_percent(s)) for x, s in points]))
        svg = report_svg.line_chart(
            f"Accuracy against labels per class, {title}",
            series,
            x_label="labels per class",
            y_label=f"{report_tables.NAMES[measure]} in %",
            x_ticks=[(x, str(labels or "all")) for labels, x in places.items()],
            y_format="{:.4g}".format,
            y_bounds=(0, 100),
            height=290,
        )
        drawn.append(subtitle(title) + side_by_side([figures([("", svg)]), tables[title]]))
    note = "Bars are 95 % intervals over seeds; one that reaches the edge goes beyond it. The axis is logarithmic up to “all”."
    return legend(used.items()) + paragraph(note, note=True) + "".join(drawn)


def positions(labels: Sequence[int]) -> dict[int, float]:
    """Labels per class -> position on the axis, ascending: logarithmic, all labels (0) a step after the last."""
    places = {k: math.log2(k) for k in sorted(labels) if k}
    known = list(places.values()) or [0.0]
    step = max((known[-1] - known[0]) / max(len(known) - 1, 1), 1.0)
    return places | ({0: known[-1] + step} if 0 in labels else {})


def _percent(score: Score) -> tuple[float | None, ...]:
    return tuple(None if x is None else 100 * x for x in (score.mean, score.low, score.high))


def confusion(study: Study) -> str:
    """Confusion matrices of every method, with all labels or as many as the study went up to."""
    protocols, methods = list(PROTOCOLS), list(study.titles)
    parts = []
    for key, facts in study.datasets.items():
        title, labels = report_tables.dataset_title(study, key), report_tables.most_labels(study, key)
        cells: dict[tuple[str, str], list[Cell]] = {}
        for c in study.cells:
            if c.dataset == key and c.labels == labels and c.confusion_matrix is not None:
                cells.setdefault((c.method, c.protocol), []).append(c)
        if facts.kind == "value":
            parts.append(paragraph(f"{title}: numbers for labels, so no confusion matrix.", note=True))
            continue
        draw = report_svg.confusion_pairs if facts.kind == "multi" else report_svg.confusion
        shown = []
        for method, protocol in sorted(cells, key=lambda x: (_rank(protocols, x[1]), _rank(methods, x[0]))):
            name = study.label(method, protocol)
            total = _sum([c.confusion_matrix for c in cells[method, protocol]])
            shown.append((name, draw(f"Confusion matrix of {name} on {title}", total, facts.classes)))
        if shown:
            meaning = "rows: truly absent (no) or present (yes), columns: predicted; " if facts.kind == "multi" else ""
            note = (
                f"Test split, {report_tables.words_of_labels(labels)}; {meaning}in % of each row, summed over seeds and draws "
                "of labels; counts on hover."
            )
            parts += [subtitle(title), paragraph(note, note=True), figures(shown)]
    return "".join(parts) or paragraph("No run has left a confusion matrix.")


def _rank(order: Sequence[str], name: str) -> int:
    return order.index(name) if name in order else len(order)


def _sum(matrices: Sequence[Any]) -> Any:
    if isinstance(matrices[0], list):
        return [_sum(rows) for rows in zip(*matrices, strict=True)]
    return sum(matrices)


def pretraining(study: Study) -> str:
    """Losses, k-means and online probes against steps, a line per pretraining."""
    if not study.runs:
        return paragraph(f"There is no pretraining run in {study.path / PRETRAINING}.")
    body = legend((study.pretraining_title(name), _style(study, name)) for name in study.runs)
    note = "Mean over seeds, the band from the least to the greatest; long runs are averaged over stretches of steps."
    body += paragraph(note, note=True)
    groups = (
        ("Losses", TERMS, "metrics", "No losses are logged."),
        ("k-means", KMEANS, "metrics", "No k-means is logged: no method clusters, or clustering has not begun."),
        ("Probes during pretraining", PROBES, "probes", "No probes ran during pretraining."),
    )
    for heading, keys, log, nothing in groups:
        charts = [(title, chart) for key, title in keys.items() if (chart := _curves(study, key, title, log))]
        body += subtitle(heading) + (figures(charts) if charts else paragraph(nothing))
    records = [r for runs in study.runs.values() for run in runs.values() for r in run.probes]
    for said in dict.fromkeys(str(r["protocol"]) for r in records if "protocol" in r):
        body += paragraph(f"Protocol: {said}", note=True)
    titles = {study.pretraining_title(name): runs[min(runs)] for name, runs in study.runs.items()}
    sizes = [(title, chart) for title, run in titles.items() if (chart := _sizes(run, f"Cluster sizes of {title}"))]
    return body + (subtitle("Cluster sizes, first seed, largest at the bottom") + figures(sizes) if sizes else "")


def _style(study: Study, pretraining: str) -> int:
    """That of the method of the pretraining's name, or of the first method that uses it."""
    users = [method for method, name in study.pretraining.items() if name == pretraining]
    return list(study.titles).index(pretraining if pretraining in users else users[0])


def _curves(study: Study, key: str, title: str, log: str) -> str:
    series = []
    for name, runs in study.runs.items():
        points = curve([getattr(run, log) for run in runs.values()], key)
        if points:
            series.append(Series(study.pretraining_title(name), _style(study, name), points, band=True))
    if not series:
        return ""
    bounds = (-math.inf if key in TERMS else 0.0, math.inf)  # counts and shares
    return report_svg.line_chart(title, series, x_label="step", y_label="", y_format="{:.4g}".format, y_bounds=bounds)


def curve(
    logs: Sequence[Sequence[Mapping[str, Any]]], key: str
) -> list[tuple[float, float, float | None, float | None]]:
    """(step, mean over logs, least, greatest) of a logged value, long logs averaged over stretches of steps.

    Args:
      logs: of the seeds; records with ``step``.
      key: what is drawn; records without it, or whose value is no finite number, are left out.
    """
    values = [[(r["step"], r[key]) for r in log if _is_number(r.get(key))] for log in logs]
    steps = [step for one in values for step, _ in one]
    if not steps:
        return []
    width = max(1.0, (max(steps) - min(steps) + 1) / BINS)
    stretches: dict[int, list[list[float]]] = {}
    places: dict[int, list[int]] = {}
    for i, one in enumerate(values):
        for step, value in one:
            b = int((step - min(steps)) / width)
            stretches.setdefault(b, [[] for _ in values])[i].append(value)
            places.setdefault(b, []).append(step)
    points = []
    for b in sorted(stretches):
        means = [sum(x) / len(x) for x in stretches[b] if x]
        ends = (min(means), max(means)) if len(means) > 1 else (None, None)
        points.append((sum(places[b]) / len(places[b]), sum(means) / len(means), *ends))
    return points


def _is_number(x: Any) -> bool:
    return isinstance(x, int | float) and not isinstance(x, bool) and math.isfinite(x)


def _sizes(run: Run, title: str) -> str:
    """Cluster sizes over time as layers; nothing before there are two probes with them."""
    steps, shares = [], []
    for r in run.probes:
        sizes = r.get("cluster_sizes")
        if isinstance(sizes, list) and all(_is_number(x) and x >= 0 for x in sizes) and sum(sizes) > 0:
            steps.append(r["step"])
            shares.append([size / sum(sizes) for size in sorted(sizes, reverse=True)])
    return report_svg.stacked(title, steps, shares, x_label="step") if len(steps) > 1 else ""


def maps(study: Study, cache: Path, wanted: Sequence[str] | None) -> str:
    """Maps of the test split of each data set: raw features, then each method's representations, its first seed.

    Args:
      study: as read.
      cache: folder of maps made before.
      wanted: methods; ``None``: the first with a checkpoint.

    Raises:
      ConclugenError: a damaged checkpoint or data set.
    """
    able = [method for method in study.pretraining if _checkpointed(study, method)]
    chosen = able[:NUM_MAPS] if wanted is None else list(wanted)
    if not chosen:
        return paragraph("No pretraining run has a checkpoint to map." if wanted is None else "No maps were asked for.")
    note = (
        f"At most {report_map.POINTS:,} rows, standardised; the first {report_map.COMPONENTS} principal components, then t-SNE "
        "with a fixed seed. Distances between far groups mean little. Clusters: the nearest centroid of the run’s last k-means."
    )
    body = paragraph(note, note=True)
    for key, facts in study.datasets.items():
        title = report_tables.dataset_title(study, key)
        if not (Path(facts.path) / manifest_lib.FILE).is_file():
            body += paragraph(f"{title}: no map, there is no data set in {facts.path} any more.", note=True)
            continue
        dataset = shards.open_dataset(facts.path, verify="size")
        drawn, missing, seen = [], [], set()
        for method in chosen:
            name, run = study.title(method), _checkpointed(study, method)
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
        body += subtitle(title) + figures(drawn) if drawn else ""
        body += "".join(paragraph(f"{title}: {sentence}", note=True) for sentence in missing)
    return body


def _checkpointed(study: Study, method: str) -> Run | None:
    """The first seed's run of a method, if it has saved a checkpoint."""
    runs = study.runs.get(study.pretraining.get(method) or "", {})
    run = runs[min(runs)] if runs else None
    return run if run and any((run.workdir / checkpoint.FOLDER).glob("[0-9]*")) else None


def _map(title: str, positions: np.ndarray, groups: np.ndarray, names: Sequence[str]) -> str:
    return report_svg.scatter(f"Map of {title}", positions.tolist(), groups.tolist(), names)
