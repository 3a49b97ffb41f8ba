"""A study as a page and as tables: study folder -> report.html, one file with all figures, and report.md."""

import collections
import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

import conclugen_jax
from conclugen_jax.data import manifest as manifest_lib
from conclugen_jax.errors import ConclugenError
from conclugen_jax.study.report import embedding_map, reading
from conclugen_jax.study.report import tables as report_tables
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
    """What :func:`write` made: the files, how far the study is, and warnings for the screen."""

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
    try:
        from conclugen_jax.study.report import figures, page
    except ModuleNotFoundError as e:
        raise ConclugenError(f"the report needs {e.name}; pip install 'conclugen_jax[report]'") from e
    found, folder = reading.read(study), Path(output or study)
    if maps:
        manifest_lib.choose(list(found.methods), maps, what="method", where=f"study {found.path}")
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as e:
        raise ConclugenError(f"--output={folder}: {e.strerror}; choose another folder") from e
    warnings = [*_changed_datasets(found), *found.different_data()]
    tables = _tables(found)

    def shown(title: str) -> list[page.Block]:
        those = tables[title]
        parts = [[*([] if t.caption == title else [page.Heading(t.caption)]), t] for t in those]
        return [page.Columns(parts)] if len(parts) > 1 else parts[0] if parts else [page.Text(EMPTY[title])]

    efficiency = tables["Label efficiency"]
    configurations = [page.Folded(summary, content) for summary, content in _configurations(found).items()]
    sections = {title: shown(title) for title in ("Results", "Protocols", "Paired comparisons")} | {
        "Label efficiency": figures.label_efficiency(found, efficiency) if efficiency else shown("Label efficiency"),
        "Confusion matrices": figures.confusion(found),
        "Pretraining": figures.pretraining(found),
        "Maps of the test split": figures.maps(found, folder / embedding_map.FOLDER, maps),
        "Failed and missing": shown("Failed and missing"),
        "Configuration and versions": [
            *configurations,
            *tables["Data sets"],
            *tables["Versions"],
            page.Text(f"Published numbers: {SOURCE}.", note=True),
        ],
    }
    files.write_atomically(folder / MARKDOWN, _markdown(found, tables, warnings), place="--output")
    html = page.render(f"Study {found.name}", _lead(found), warnings, sections)
    files.write_atomically(folder / HTML, html, place="--output")
    return Written([folder / HTML, folder / MARKDOWN], progress(found), warnings)


def progress(study: Study) -> str:
    """Return how many runs are done, in a sentence."""
    count = collections.Counter(cell.status for cell in study.cells)
    others = "".join(f", {count[status]} {status}" for status in ("failed", "missing") if count[status])
    return f"{count['done']} of {len(study.cells)} runs done{others}."


def _tables(study: Study) -> dict[str, list[Table]]:
    """Return the tables of each heading."""
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


def _lead(study: Study) -> list[str]:
    lines = [progress(study)]
    for key, facts in study.datasets.items():
        splits = ", ".join(f"{count:,} {split}" for split, count in facts.num_examples.items())
        kinds = {"single": f", {len(facts.classes)} classes", "multi": f", {len(facts.classes)} labels"}
        lines.append(f"{report_tables.dataset_title(study, key)}: {splits}{kinds.get(facts.kind, '')}.")
    return lines


def _changed_datasets(study: Study) -> Iterator[str]:
    """Yield a sentence for each data set that could not be read or has changed since it was scored."""
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


def _configurations(study: Study) -> dict[str, str]:
    """Return the study's definition and each pretraining's configuration, as JSON by title."""
    found = {"Definition of the study": study.definition}
    for name, runs in study.runs.items():
        run = runs[min(runs)]
        place = f"{study.pretraining_title(name)} ({run.workdir.relative_to(study.path)})"
        found[f"Configuration of {place}"] = run.config
    return {title: json.dumps(tree, indent=1, ensure_ascii=False) for title, tree in found.items()}
