"""A study as a page and as tables: study folder -> report.html, one file with all figures, and report.md."""

import collections
import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import conclugen_jax
from conclugen_jax.data import manifest as manifest_lib
from conclugen_jax.errors import ConclugenError
from conclugen_jax.study.report import embedding_map as report_map
from conclugen_jax.study.report import figures as report_figures
from conclugen_jax.study.report import page as report_page
from conclugen_jax.study.report import reading as report_study
from conclugen_jax.study.report import charts as report_svg
from conclugen_jax.study.report import tables as report_tables
from conclugen_jax.study.report.page import Section
from conclugen_jax.study.report.published import SOURCE
from conclugen_jax.study.report.reading import Study
from conclugen_jax.study.report.tables import Table
from conclugen_jax.system import files

HTML = "report.html"
MARKDOWN = "report.md"

EMPTY = {
    "Results": "No run of this study has scores yet.",
    "Protocols": "No supervised baseline and no fine-tuned run has scores yet.",
    "Paired comparisons": "There is nothing to compare: no two methods have scores on the same seeds.",
    "Label efficiency": "The study has one number of labels per class only, so there is no curve.",
    "Failed and missing": "Every run of the study is done.",
}


class Written(NamedTuple):
    """What :func:`write` made: the files, how far the study is, and sentences that deserve to be seen on the screen."""

    files: list[Path]
    progress: str
    warnings: list[str]


def write(study: str | Path, output: str | Path | None = None, *, maps: Sequence[str] | None = None) -> Written:
    """Make the report of a study.

    Args:
      study: its folder, with ``results.json`` and, for curves and maps, ``pretraining/METHOD/seed_N``.
      output: folder for ``report.html`` and ``report.md``; by default the study's. Maps are kept there in ``.maps``.
      maps: methods whose representations are drawn; the first three with a checkpoint by default.

    Raises:
      ConclugenError: no results, a damaged file, a method that the study does not have, or a folder that cannot be
        written.
    """
    found, folder = report_study.read(study), Path(output or study)
    if maps:
        manifest_lib.choose(found.pretraining, maps, what="method", where=f"study {found.path}")
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as e:
        raise ConclugenError(f"--output={folder}: {e.strerror}; choose another folder") from e
    warnings = [*_changed_datasets(found), *found.different_data()]
    tables = _tables(found)
    body = {title: _shown(title, those) for title, those in tables.items()}
    if tables["Label efficiency"]:
        those = {t.caption: report_tables.to_html(t) for t in tables["Label efficiency"]}
        body["Label efficiency"] = report_figures.label_efficiency(found, those)
    sections = {title: body[title] for title in ("Results", "Protocols", "Paired comparisons", "Label efficiency")}
    sections["Confusion matrices"] = report_figures.confusion(found)
    sections["Pretraining"] = report_figures.pretraining(found)
    sections["Maps of the test split"] = report_figures.maps(found, folder / report_map.FOLDER, maps)
    sections["Failed and missing"] = body["Failed and missing"]
    sections["Configuration and versions"] = _configuration(found)
    parts = [Section(title.lower().replace(" ", "-"), title, text) for title, text in sections.items()]
    page = report_page.page(f"Study {found.name}", _lead(found), warnings, parts)
    files.write_atomically(folder / MARKDOWN, _markdown(found, tables, warnings))
    files.write_atomically(folder / HTML, page)
    return Written([folder / HTML, folder / MARKDOWN], progress(found), warnings)


def progress(study: Study) -> str:
    """How many runs are done, in a sentence."""
    count = collections.Counter(cell.status for cell in study.cells)
    others = "".join(f", {count[status]} {status}" for status in ("failed", "missing") if count[status])
    return f"{count['done']} of {len(study.cells)} runs done{others}."


def _tables(study: Study) -> dict[str, list[Table]]:
    """Heading -> its tables."""
    keys = [k for k in study.datasets if any(s.dataset == k for s in study.summary)]
    protocols, unfinished = report_tables.protocols(study), report_tables.unfinished(study)
    return {
        "Results": [report_tables.scores(study, k) for k in keys],
        "Protocols": [protocols] if protocols else [],
        "Paired comparisons": [t for k in keys if (t := report_tables.comparisons(study, k))],
        "Label efficiency": [t for k in keys if (t := report_tables.label_efficiency(study, k))],
        "Failed and missing": [unfinished] if unfinished else [],
        "Data sets": [report_tables.datasets(study)],
        "Versions": [report_tables.versions(study, conclugen_jax.__version__)],
    }


def _markdown(study: Study, tables: Mapping[str, list[Table]], warnings: Iterable[str]) -> str:
    escaped = report_tables.escaped
    parts = [f"# Study {escaped(study.name)}", progress(study), *(f"**Beware.** {escaped(w)}" for w in warnings)]
    for title, those in tables.items():
        parts += [f"## {title}"] + ([] if those else [EMPTY[title]])
        for table in those:
            parts += [] if table.caption == title else [f"### {escaped(table.caption)}"]
            parts.append(report_tables.to_markdown(table))
    return "\n\n".join([*parts, f"Published numbers: {escaped(SOURCE)}."]) + "\n"


def _shown(title: str, tables: Sequence[Table]) -> str:
    if not tables:
        return report_page.paragraph(EMPTY[title])
    each = [("" if t.caption == title else report_page.subtitle(t.caption)) + report_tables.to_html(t) for t in tables]
    return report_page.side_by_side(each) if len(each) > 1 else each[0]


def _lead(study: Study) -> str:
    lines = [progress(study)]
    for key, facts in study.datasets.items():
        splits = ", ".join(f"{count:,} {split}" for split, count in facts.num_examples.items())
        kinds = {
            "single": f", {len(facts.classes)} classes",
            "multi": f", {len(facts.classes)} labels",
            "value": "",
            "unknown": "",
        }
        lines.append(f"{report_tables.dataset_title(study, key)}: {splits}{kinds[facts.kind]}.")
    return "".join(f'<p class="lead">{report_svg.text(line)}</p>' for line in lines)


def _changed_datasets(study: Study) -> Iterator[str]:
    """Data sets that could not be read, or are other than when they were scored."""
    for key, facts in study.datasets.items():
        if facts.error:
            yield f"Data set {key} could not be read when the results were collected: {facts.error}."
        elif (Path(facts.path) / manifest_lib.FILE).is_file():
            now = manifest_lib.read(facts.path).fingerprint()
            if now != facts.sha256:
                yield (
                    f"Data set {key} in {facts.path} has the hash {now[:12]} now, the results were made with "
                    f"{facts.sha256[:12]}; its maps show other data than the tables."
                )


def _configuration(study: Study) -> str:
    body = report_page.folded("Definition of the study", _json(study.definition))
    for name, runs in study.runs.items():
        run = runs[min(runs)]
        place = f"{study.pretraining_title(name)} ({run.workdir.relative_to(study.path)})"
        body += report_page.folded(f"Configuration of {place}", _json(run.config))
    body += report_tables.to_html(report_tables.datasets(study))
    body += report_tables.to_html(report_tables.versions(study, conclugen_jax.__version__))
    return body + report_page.paragraph(f"Published numbers: {SOURCE}.", note=True)


def _json(tree: Any) -> str:
    return json.dumps(tree, indent=1, ensure_ascii=False)
