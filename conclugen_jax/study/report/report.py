"""A study as a page and as tables: study folder -> report.html, one file with all figures, and report.md.

The page needs nothing else, on screens of any width, light or dark, and on paper. A section is a list of parts;
``page.html.j2`` says how each looks.
"""

import collections
import json
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

import jinja2

import conclugen_jax
from conclugen_jax.data import manifest as manifest_lib
from conclugen_jax.errors import ConclugenError
from conclugen_jax.study.report import charts, embedding_map, figures, reading, tables as report_tables
from conclugen_jax.study.report.published import SOURCE
from conclugen_jax.study.report.reading import Study
from conclugen_jax.study.report.tables import Part, Table, escaped
from conclugen_jax.system import files

HTML = "report.html"
MARKDOWN = "report.md"

TEMPLATE = jinja2.Environment(
    loader=jinja2.FileSystemLoader(Path(__file__).parent),
    autoescape=True,
    trim_blocks=True,
    lstrip_blocks=True,
    undefined=jinja2.StrictUndefined,
).get_template("page.html.j2")
EMPTY = {
    "Results": "No run of this study has scores yet.",
    "Protocols": "No supervised baseline and no fine-tuned run has scores yet.",
    "Paired comparisons": "There is nothing to compare: no two methods have scores on the same seeds.",
    "Label efficiency": "The study has one number of labels per class only, so there is no curve.",
    "Failed and missing": "Every run of the study is done.",
}


class Written(NamedTuple):
    """What :func:`write` made."""

    files: list[Path]
    progress: str  # how far the study is
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
    found, folder = reading.read(study), Path(output or study)
    if maps:
        manifest_lib.choose(list(found.methods), maps, what="method", where=f"study {found.path}")
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as e:
        raise ConclugenError(f"--output={folder}: {e.strerror}; choose another folder") from e
    warnings, tables = list(_warnings(found)), _tables(found)
    shown = {
        title: [Part("" if t.caption == title else t.caption, table=t) for t in those] or [Part(text=EMPTY[title])]
        for title, those in tables.items()
    }
    if tables["Label efficiency"]:
        shown["Label efficiency"] = figures.label_efficiency(found)
    configurations = {"Definition of the study": found.definition}
    for name, runs in found.runs.items():
        first = runs[min(runs)]
        place = first.workdir.relative_to(found.path)
        configurations[f"Configuration of {found.pretraining_title(name)} ({place})"] = first.config
    sections = {
        **{title: shown[title] for title in ("Results", "Protocols", "Paired comparisons", "Label efficiency")},
        "Confusion matrices": figures.confusion(found),
        "Pretraining": figures.pretraining(found),
        "Maps of the test split": embedding_map.maps(found, folder / embedding_map.FOLDER, maps),
        "Failed and missing": shown["Failed and missing"],
        "Configuration and versions": [
            *(
                Part(title, folded=json.dumps(tree, indent=1, ensure_ascii=False))
                for title, tree in configurations.items()
            ),
            *shown["Data sets"],
            *shown["Versions"],
            Part(notes=[f"Published numbers: {SOURCE}."]),
        ],
    }
    page = TEMPLATE.render(
        title=f"Study {found.name}", lead=_lead(found), warnings=warnings, sections=sections, swatch=charts.swatch
    )
    files.write_atomically(folder / MARKDOWN, _markdown(found, tables, warnings), place="--output")
    files.write_atomically(folder / HTML, report_tables.printable(page), place="--output")
    return Written([folder / HTML, folder / MARKDOWN], progress(found), warnings)


def progress(study: Study) -> str:
    """Return how many runs are done, in a sentence."""
    count = collections.Counter(cell.status for cell in study.cells)
    others = "".join(f", {count[status]} {status}" for status in ("failed", "missing") if count[status])
    return f"{count['done']} of {len(study.cells)} runs done{others}."


def _tables(study: Study) -> dict[str, list[Table]]:
    """Return the tables of each heading."""
    keys = [k for k in study.datasets if any(s.dataset == k for s in study.summary)]
    versions = {**study.versions, "this report": conclugen_jax.__version__}
    found = {
        "Results": [report_tables.scores(study, k) for k in keys],
        "Protocols": [report_tables.protocols(study)],
        "Paired comparisons": [report_tables.comparisons(study, k) for k in keys],
        "Label efficiency": [report_tables.label_efficiency(study, k) for k in keys],
        "Failed and missing": [report_tables.unfinished(study)],
        "Data sets": [
            report_tables.words(
                "Data sets",
                ("data set", "SHA-256 of its manifest", "folder"),
                [(report_tables.dataset_title(study, k), d.sha256, d.path) for k, d in study.datasets.items()],
            )
        ],
        "Versions": [report_tables.words("Versions", ("package", "version"), versions.items())],
    }
    return {title: [table for table in tables if table] for title, tables in found.items()}


def _markdown(study: Study, tables: Mapping[str, list[Table]], warnings: Sequence[str]) -> str:
    parts = [f"# Study {escaped(study.name)}", progress(study), *(f"**Beware.** {escaped(w)}" for w in warnings)]
    for title, those in tables.items():
        parts += [f"## {title}"] + ([] if those else [EMPTY[title]])
        for table in those:
            parts += [] if table.caption == title else [f"### {escaped(table.caption)}"]
            parts.append(report_tables.to_markdown(table))
    return "\n\n".join([*parts, f"Published numbers: {escaped(SOURCE)}."]) + "\n"


def _lead(study: Study) -> list[str]:
    lines = [progress(study)]
    for key, facts in study.datasets.items():
        splits = ", ".join(f"{count:,} {split}" for split, count in facts.num_examples.items())
        kinds = {"single": f", {len(facts.classes)} classes", "multi": f", {len(facts.classes)} labels"}
        lines.append(f"{report_tables.dataset_title(study, key)}: {splits}{kinds.get(facts.kind, '')}.")
    return lines


def _warnings(study: Study) -> Iterator[str]:
    """Yield a sentence for each data set that could not be read, has changed, or differed when runs saw it."""
    runs = [run for runs in study.runs.values() for run in runs.values()]
    for key, facts in study.datasets.items():
        scored = facts.sha256[:12]
        if facts.error:
            yield f"Data set {key} could not be read when the results were collected: {facts.error}."
        elif (Path(facts.path) / manifest_lib.FILE).is_file():
            now = manifest_lib.read(facts.path).fingerprint()
            if now != facts.sha256:
                yield (
                    f"Data set {key} in {facts.path} has the hash {now[:12]} now, the results were made with {scored}; its "
                    "maps show other data than the tables."
                )
        for run in runs:
            then = run.data.fingerprint()
            if (run.data.name, run.data.version) == (facts.name, facts.version) and then != facts.sha256:
                yield (
                    f"{run.workdir.relative_to(study.path)} was pretrained on other data than was scored: {facts.name} "
                    f"{facts.version} had the hash {then[:12]} then and {scored} in the results; their numbers do not "
                    "belong together."
                )
