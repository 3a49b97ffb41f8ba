"""A study as a page and as tables: study folder -> report.html, one file with all figures, and report.md.

The page needs nothing else, on screens of any width, light or dark, and on paper. A section is a list of parts;
``page.html.j2`` says how each looks.
"""

import base64
import collections
import hashlib
import json
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

import jinja2

import conclugen_jax
from conclugen_jax.data import manifest as manifest_lib
from conclugen_jax.errors import ConclugenError
from conclugen_jax.study.definition import BEST, PROBE
from conclugen_jax.study.report import (
    charts,
    corpora,
    embedding_map,
    figures,
    more_labels,
    oddities,
    reading,
    state,
    tables as report_tables,
    walk,
)
from conclugen_jax.study.report.published import SOURCE
from conclugen_jax.study.report.reading import Study
from conclugen_jax.study.report.tables import Part, escaped
from conclugen_jax.system import files

HTML = "report.html"
MARKDOWN = "report.md"

SCRIPT = (Path(__file__).parent / "map.js").read_text(encoding="utf-8")
POLICY = (
    "default-src 'none'; style-src 'unsafe-inline'; img-src data:; media-src file:; "
    f"script-src 'sha256-{base64.b64encode(hashlib.sha256(SCRIPT.encode()).digest()).decode()}'"
)

TEMPLATE = jinja2.Environment(
    loader=jinja2.FileSystemLoader(Path(__file__).parent),
    autoescape=True,
    trim_blocks=True,
    lstrip_blocks=True,
    undefined=jinja2.StrictUndefined,
).get_template("page.html.j2")


class Written(NamedTuple):
    """The files that :func:`write` made."""

    files: list[Path]
    progress: str  # how far the study is
    warnings: list[str]


def write(
    study: str | Path | Study,
    output: str | Path | None = None,
    *,
    maps: Sequence[str] | None = None,
    title: str = "",
    lead: Sequence[str] = (),
    first: Mapping[str, Sequence[Part]] | None = None,
    last: Mapping[str, Sequence[Part]] | None = None,
) -> Written:
    """Make the report of a study.

    Args:
      study: its folder, with ``results.json`` and, for curves and maps, ``pretraining/METHOD/seed_N``; or what was read of it.
      output: folder for ``report.html`` and ``report.md``; by default the study's. Maps are kept there in ``.maps``.
      maps: methods whose representations are drawn; the first three with a checkpoint by default.
      title: of the page; the study's name by default.
      lead: first sentences, before those on the study.
      first: title -> parts of further sections, before all others.
      last: likewise, before the configuration.

    Raises:
      ConclugenError: no results, a damaged file, a method that the study does not have, or a folder that cannot be
        written.
    """
    found = study if isinstance(study, Study) else reading.read(study)
    folder = Path(output or found.path)
    if maps:
        manifest_lib.choose(list(found.methods), maps, what="method", where=f"study {found.path}")
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as e:
        raise ConclugenError(f"--output={folder}: {e.strerror}; choose another folder") from e
    warnings = list(_warnings(found))
    pairs = "There is nothing to compare: no two methods have scores on the same seeds."
    curves = "The study has one number of labels per class only, so there is no curve."
    runs = f"There is no pretraining run in {found.path / reading.PRETRAINING}."
    made = {
        **{title: (parts, "") for title, parts in (first or {}).items()},
        "Label efficiency": ([*figures.label_efficiency(found), *more_labels.parts(found)], curves),
        "Confusion matrices": (figures.confusion(found), "No run has left a confusion matrix."),
        "Pretraining": (figures.pretraining(found), runs),
        "Health": (list(state.parts(found)), runs),
        "Maps": (embedding_map.maps(found, folder / embedding_map.FOLDER, maps), ""),
        "Oddities": (list(oddities.parts(found)), ""),
        "Results": (report_tables.scores(found), "No run of this study has scores yet."),
        **({"Across corpora": (list(corpora.parts(found)), "")} if found.across else {}),
        "Protocols": (report_tables.protocols(found), "No supervised baseline and no fine-tuned run has scores yet."),
        "Paired comparisons": (report_tables.comparisons(found), pairs),
        "Failed and missing": (report_tables.unfinished(found), "Every run of the study is done."),
        **{title: (parts, "") for title, parts in (last or {}).items()},
        "Configuration and versions": ([*_facts(found), Part(notes=[SOURCE])], ""),
    }
    absent = () if found.cells else ("Confusion matrices", "Protocols", "Failed and missing")
    if not found.summary and not found.cells:  # nothing was to be scored
        absent = (*absent, "Label efficiency", "Results", "Paired comparisons")
    made = {title: each for title, each in made.items() if title not in absent}
    sections = {title: parts or [Part(text=nothing)] for title, (parts, nothing) in made.items()}
    shown = {
        "title": title or f"Study {found.name}",
        "lead": [*lead, *_lead(found)],
        "warnings": warnings,
        "sections": sections,
    }
    files.write_atomically(folder / MARKDOWN, _markdown(**shown), place="--output")
    files.write_atomically(folder / HTML, page(**shown), place="--output")
    return Written([folder / HTML, folder / MARKDOWN], progress(found), warnings)


def page(title: str, lead: Sequence[str], warnings: Sequence[str], sections: Mapping[str, Sequence[Part]]) -> str:
    """Return a page of sections, each a list of parts, with a heading and first lines."""
    shown = {"title": title, "lead": lead, "warnings": warnings, "sections": sections}
    scripted = any(part.walk for parts in sections.values() for part in parts)
    helpers = {"swatch": charts.swatch, "as_json": walk.markup, "policy": POLICY, "script": SCRIPT}
    return report_tables.printable(TEMPLATE.render(shown, scripted=scripted, **helpers))


def progress(study: Study) -> str:
    """Return how many runs are done, in a sentence."""
    count = collections.Counter(cell.status for cell in study.cells)
    others = "".join(f", {count[status]} {status}" for status in ("failed", "missing") if count[status])
    return f"{count['done']} of {len(study.cells)} runs done{others}." if study.cells else ""


def _facts(study: Study) -> Iterator[Part]:
    """Yield what the study was made with and of."""
    configurations = {"Definition of the study": study.definition}
    for name, (first, *_) in study.runs.items():
        place = first.workdir.relative_to(study.path)
        configurations[f"Configuration of {study.methods[study.user(name)].title} ({place})"] = first.config
    for title, tree in configurations.items():
        yield Part(title, folded=json.dumps(tree, indent=1, ensure_ascii=False))
    data = [(facts.title(key), facts.sha256, facts.path) for key, facts in study.datasets.items()]
    yield report_tables.words("Data sets", ("data set", "SHA-256 of its manifest", "folder"), data)
    versions = {**study.versions, "this report": conclugen_jax.__version__}
    yield report_tables.words("Versions", ("package", "version"), versions.items())


def _markdown(title: str, lead: Sequence[str], warnings: Sequence[str], sections: Mapping[str, Sequence[Part]]) -> str:
    """Return the tables of the sections, and those sections that are one sentence."""
    lines = [f"# {escaped(title)}", *map(escaped, lead[:1]), *(f"**Beware.** {escaped(w)}" for w in warnings)]
    for heading, parts in sections.items():
        tables = [part for part in parts if part.table]
        if tables or parts[0].text:
            lines += [f"## {heading}", *(escaped(part.text) for part in parts[:1] if part.text)]
        for part in tables:
            lines += [f"### {escaped(part.heading)}"] * bool(part.heading) + [report_tables.to_markdown(part.table)]
    return "\n\n".join([*lines, escaped(SOURCE)]) + "\n"


def _found(study: Study) -> Iterator[str]:
    """Yield for each data set the score of the reference method with few labels, and its difference from the best baseline."""
    reference = study.definition.get("reference")
    for key, facts in study.datasets.items():
        ours = [s for s in study.summary_of(key) if s.method == reference and "accuracy" in s.scores]
        against = {
            c.labels: c for c in study.comparisons if (c.dataset, c.method, c.baseline) == (key, reference, BEST)
        }
        few = [s for s in ours if s.protocol == PROBE and s.labels in against]
        if not few:
            continue
        s = min(few, key=lambda s: (s.labels == 0, abs(s.labels - 5)))
        c, labels = against[s.labels], f"{s.labels} labels a class" if s.labels else "all labels"
        apart = f"{abs(100 * c.difference):.1f} points {'above' if c.difference > 0 else 'below'}"
        apart = "as much as" if abs(c.difference) < 5e-4 else apart
        ends = sorted(100 * x * (-1 if c.difference < 0 else 1) for x in c.interval or ())  # of what the sentence says
        between = " [{:.1f}, {:.1f}]".format(*ends) if ends else ""
        score = s.scores["accuracy"]
        own = "" if score.interval is None else f" [{100 * score.interval[0]:.1f}, {100 * score.interval[1]:.1f}]"
        reached = f"{study.methods[s.method].title} reaches {100 * score.mean:.1f} %{own}"
        yield (
            f"{facts.title(key)}: with {labels} {reached}, "
            f"{apart} {study.methods[c.best].title}{between}, {report_tables.seeds(c.n)}."
        )


def _lead(study: Study) -> list[str]:
    lines = [*_found(study), *([progress(study)] if study.cells else [])]
    for key, facts in study.datasets.items():
        splits = ", ".join(f"{count:,} {split}" for split, count in facts.num_examples.items())
        kinds = {"single": f", {len(facts.classes)} classes", "multi": f", {len(facts.classes)} labels"}
        lines.append(f"{facts.title(key)}: {splits}{kinds.get(facts.kind, '')}.")
    return lines


def _warnings(study: Study) -> Iterator[str]:
    """Yield the warnings of runs, and a sentence for each data set that could not be read or has changed."""
    yield from (f"{line}." for line in study.warnings)
    runs = [run for runs in study.runs.values() for run in runs]
    for key, facts in study.datasets.items():
        scored, there = facts.sha256[:12], (Path(facts.path) / manifest_lib.FILE).is_file()
        if facts.error:
            yield f"Data set {key} could not be read when the results were collected: {facts.error}."
        elif there and (now := manifest_lib.read(facts.path).fingerprint()) != facts.sha256:
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
