"""The tables of a report as data, and as Markdown: scores, protocols, comparisons, label efficiency, failures."""

import math
import re
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, NamedTuple

from conclugen_jax.evaluate import metrics
from conclugen_jax.study.definition import PROBE
from conclugen_jax.study.report import published as report_published
from conclugen_jax.study.report.reading import DatasetFacts, Score, Study, Summary

OF_CLASSES = {"accuracy": "Acc", "f1": "F1", "precision": "Prec", "recall": "Recall"}
OF_VALUES = {"accuracy_2": "Acc-2", "f1_2": "F1-2", "accuracy_7": "Acc-7", "correlation": "Corr", "mae": "MAE"}
NAMES = OF_CLASSES | OF_VALUES
"""Measure -> its name as a column."""
PLAIN = ("correlation", "mae")
"""Measures that are no shares: shown as they are, not in %."""

NOTHING = ("–",)
REMARKABLE = "✱"
FEWEST_SEEDS = 3
"""Seeds required to mark a difference: two seeds often agree by chance."""


class Table(NamedTuple):
    """A table; a cell is one or more lines, the first the most important; ``words``: its cells hold no numbers."""

    columns: tuple[str, ...]
    rows: list[tuple[tuple[str, ...], ...]]
    note: str = ""
    words: bool = False


class Part(NamedTuple):
    """A stretch of a section of the page; what it has is shown in this order."""

    heading: str = ""
    text: str = ""
    notes: Sequence[str] = ()  # in small print
    legend: Sequence[tuple[str, int]] = ()  # (name, style)
    figures: Sequence[tuple[str, Any]] = ()  # (caption, SVG or confusion matrices: (caption, classes, counts [n, n]))
    table: Table | None = None  # beside the figures
    walk: Mapping[str, Any] | None = (
        None  # a map to walk through, see walk.py; the figures are then its pictures on paper
    )
    folded: str = ""  # shown on demand


def scores(study: Study) -> list[Part]:
    """Tabulate methods against measures on each data set, with all labels or as many as the study went up to."""
    parts = []
    for key in study.scored():
        facts, labels, rows = study.datasets[key], study.most_labels(key), []
        measures = measures_of(facts)
        for s in (s for s in study.summary_of(key) if s.labels == labels):
            known = labels == 0 and s.protocol == "linear_evaluation"
            paper = report_published.linear_evaluation(facts.name, facts.kind, _known(study, s.method)) if known else {}
            cells = [_score(s.scores.get(m), m, paper.get(m)) for m in measures]
            rows.append((_named(study, s), *cells, (str(s.n),)))
        unit = "in %" + (", correlation and mean absolute error plain" if facts.kind == "value" else "")
        over = "mean ± standard deviation over seeds, [95 % interval], n seeds."
        note = f"Test split, {words_of_labels(labels)}, {unit}: {over}{_cited(rows, 'number')}{_missed(study, key)}"
        parts.append(Part(facts.title(key), table=Table(("method", *(NAMES[m] for m in measures), "n"), rows, note)))
    return parts


def _missed(study: Study, key: str) -> str:
    """Return a sentence on the classes of a data set that are never predicted, whatever the number of labels."""
    missed = {
        f"{study.label(s.method, s.protocol)}, {words_of_labels(s.labels)}": (s.never_predicted, s.evaluations)
        for s in study.summary_of(key)
        if s.never_predicted
    }
    sentence = metrics.missed_sentence(missed)
    return f" {sentence[0].upper()}{sentence[1:]}." if missed else ""


def _known(study: Study, method: str) -> str:
    """Return the paper's method of that name or title."""
    by_title = {title: name for name, title in report_published.TITLES.items()}
    return method if method in report_published.TITLES else by_title.get(study.methods[method].title, method)


def _cited(rows: Iterable[Iterable[tuple[str, ...]]], what: str) -> str:
    """Return the source of published numbers, if a row has any."""
    cited = any(line.startswith("paper ") for row in rows for cell in row for line in cell[1:])
    return f" paper: published {what} (ours minus it), from {report_published.CITED}." if cited else ""


def protocols(study: Study) -> list[Part]:
    """Tabulate accuracy of the supervised baseline, linear evaluation and fine-tuning, data sets side by side."""
    tuned = {s.method for s in study.summary if s.protocol == "fine_tuning"} | {"conclugen", "supervised"}
    found: dict[tuple[str, str], dict[str, tuple[str, ...]]] = {}
    for s in study.summary:
        if s.method in tuned and s.labels == study.most_labels(s.dataset):
            facts, known = study.datasets[s.dataset], _known(study, s.method)
            paper = report_published.accuracy(facts.name, facts.kind, known, s.protocol) if s.labels == 0 else None
            found.setdefault((s.method, s.protocol), {})[s.dataset] = first_score(study, s, paper)
    keys, rows = study.scored(), []
    for method, protocol in sorted(found, key=lambda x: (x[1] != "supervised", *reversed(study.rank(*x)))):
        name = study.label(method, protocol) + (", linear evaluation" if protocol == "linear_evaluation" else "")
        rows.append(((name,), *(found[method, protocol].get(key, NOTHING) for key in keys)))
    note = (
        "Accuracy on the test split in % (numbers to predict: accuracy in 2 steps), mean ± standard deviation over n seeds, "
        "[95 % interval]."
    )
    columns = ("method", *(study.datasets[k].title(k) for k in keys))
    return [Part(table=Table(columns, rows, note + _cited(rows, "accuracy")))] if rows else []


def comparisons(study: Study) -> list[Part]:
    """Tabulate paired differences of methods from baselines; those of enough seeds whose interval excludes zero are marked."""
    note = (
        f"{REMARKABLE}: the 95 % interval, over {FEWEST_SEEDS} seeds or more, excludes zero. Differences over the same seeds "
        "and the same drawn labels, in percentage points (MAE as it is, less is better), by labels per class; the intervals "
        "are not corrected for the number of comparisons."
    )
    found: dict[str, dict] = {key: {} for key in study.datasets}
    for c in study.comparisons:
        measure = () if c.measure == "accuracy" else (NAMES[c.measure],)
        row = study.label(c.method, c.protocol), f"minus {study.methods[c.baseline].title}", *measure
        cell = signed(c.difference, c.measure), f"n = {c.n}"
        if c.interval is not None:
            low, high = c.interval
            mark = f" {REMARKABLE}" if c.n >= FEWEST_SEEDS and (low > 0 or high < 0) else ""
            cell = cell[0] + mark, f"[{signed(low, c.measure)}, {signed(high, c.measure)}], {cell[1]}"
        found[c.dataset][row, c.labels] = NOTHING if math.isnan(c.difference) else cell
    titles = {key: study.datasets[key].title(key) for key in found}
    return [Part(titles[key], table=_by_labels("difference", cells, note)) for key, cells in found.items() if cells]


def label_efficiency(study: Study, key: str) -> Table | None:
    """Tabulate accuracy against labels per class; ``None`` where the study has one number of labels alone."""
    own = study.summary_of(key)
    cells = {(_named(study, s), s.labels): first_score(study, s) for s in own}
    measure = NAMES[measures_of(study.datasets[key])[0]]
    note = f"{measure} in %: mean ± standard deviation over n seeds, [95 % interval]; labels per class."
    return _by_labels("method", cells, note) if len({s.labels for s in own}) > 1 else None


def _named(study: Study, s: Summary) -> tuple[str, ...]:
    """Return the first cell of a row: the method, and which baselines it does not beat by its probe."""
    name = study.label(s.method, s.protocol)
    remark = study.not_ahead(s.dataset, s.method) if s.protocol == PROBE else ""
    return (name, remark) if remark else (name,)


def _by_labels(head: str, cells: Mapping[tuple[tuple[str, ...], int], tuple[str, ...]], note: str) -> Table:
    """Return a table of cells by (first cell of the row, number of labels), all labels (0) in the last column."""
    labels = sorted({k for _, k in cells}, key=lambda k: k or math.inf)
    columns = (head, *(f"{k} labels" if k else "all labels" for k in labels))
    return Table(
        columns,
        [(r, *(cells.get((r, k), NOTHING) for k in labels)) for r in dict.fromkeys(row for row, _ in cells)],
        note,
    )


def words(heading: str, columns: tuple[str, ...], rows: Iterable[tuple[str, ...]]) -> Part:
    """Return a table of text, one line in a cell."""
    return Part(heading, table=Table(columns, [tuple((cell,) for cell in row) for row in rows], words=True))


def unfinished(study: Study) -> list[Part]:
    """Tabulate runs that failed, with their error, and runs that are missing."""
    reasons = {"missing": "not run yet", "failed": "no reason was noted"}
    cells = sorted((c for c in study.cells if c.status != "done"), key=lambda c: c.status)
    rows = [(c.path, c.status, c.error or reasons[c.status]) for c in cells]
    return [words("", ("run", "status", "error"), rows)] if rows else []


def measures_of(facts: DatasetFacts) -> tuple[str, ...]:
    """Return the columns of a data set's table; the first is the one measure of figures and small tables."""
    return tuple(OF_VALUES if facts.kind == "value" else OF_CLASSES)


def seeds(n: int) -> str:
    """Return a number of seeds in words."""
    return f"{n} seed{'' if n == 1 else 's'}"


def words_of_labels(labels: int) -> str:
    """Return a number of labels in words."""
    return f"{labels} labels per class" if labels else "all labels"


def _number(x: float, measure: str) -> str:
    return f"{x:.3f}" if measure in PLAIN else f"{100 * x:.1f}"


def signed(x: float, measure: str = "accuracy") -> str:
    """Return a difference as text, with its sign also where it rounds to zero, as the end of an interval may."""
    return ("±" if abs(x) < 1e-9 else "−" if x < 0 else "+") + _number(abs(x), measure)


def first_score(study: Study, s: Summary, published: float | None = None) -> tuple[str, ...]:
    """Return the cell of the one measure of small tables."""
    measure = measures_of(study.datasets[s.dataset])[0]
    return _score(s.scores.get(measure), measure, published, s.n)


def _score(score: Score | None, measure: str, published: float | None, n: int = 0) -> tuple[str, ...]:
    if score is None or math.isnan(score.mean):
        return NOTHING
    deviation = "" if score.std is None else f" ± {_number(score.std, measure)}"
    lines = [_number(score.mean, measure) + deviation]
    between = [] if score.interval is None else ["[{}, {}]".format(*(_number(x, measure) for x in score.interval))]
    if counted := between + [f"n = {n}"] * bool(n):
        lines.append(", ".join(counted))
    if published is not None:
        as_printed = f"{100 * published:.2f}".removesuffix("0")  # the paper's tables have one or two decimals
        lines.append(f"paper {as_printed} ({signed(score.mean - published)})")
    return tuple(lines)


def to_markdown(table: Table) -> str:
    """Return a table in GitHub's Markdown, the lines of a cell side by side."""
    rows = [[escaped(" · ".join(cell)) for cell in row] for row in table.rows]
    lines = [[escaped(c) or " " for c in table.columns], ["---"] * len(table.columns), *rows]
    note = f"\n\n{escaped(table.note)}" if table.note else ""
    return "\n".join("| " + " | ".join(line) + " |" for line in lines) + note


def escaped(value: str) -> str:
    """Escape text so that Markdown shows it as it is: on one line, nothing of it markup."""
    one_line = " ".join("".join(c if c.isprintable() else " " for c in value).split())
    return re.sub(r"([\\`*_\[\]<>|&#~])", r"\\\1", printable(one_line))


def printable(text: str) -> str:
    """Return a text without control characters and lone surrogates, which a page cannot hold."""
    kept = re.sub("[\x00-\x08\x0b-\x1f\x7f-\x9f]", "\ufffd", text)
    return kept.encode("utf-8", "replace").decode("utf-8")
