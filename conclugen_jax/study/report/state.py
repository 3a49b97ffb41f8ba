"""Compare the health figures of each pretraining with chance, with the best possible values, and with other data sets."""

from collections.abc import Iterator, Mapping, Sequence

from conclugen_jax.errors import ConclugenError
from conclugen_jax.evaluate import health, levels
from conclugen_jax.study.report.reading import Study
from conclugen_jax.study.report.tables import Part, words

FIGURES = {
    "effective_rank": "effective rank",
    "uniformity": "uniformity",
    "alignment": "alignment of modalities",
    "recall_at_1": "recall at 1 between modalities",
    "cluster_balance": "balance of clusters",
    "clusters_nmi_group": "clusters and persons, information",
}
"""Figure -> its name in the page."""
MEANING = (
    "Measured without labels on the validation split, or on the training split where that is small. Effective rank: "
    "dimensions that the vectors use (RankMe). Uniformity: 0 where all vectors are the same, -4 where they are orthogonal. "
    "Alignment: squared distance of the true pair. Recall at 1: how often the nearest row of the other modality is the "
    "true one. Balance: 1 where clusters are equally large. Information (adjusted): 1 where clusters are persons. Losses: "
    "the share of the way from chance to the best is in brackets. The last columns are of healthy runs, on 200 digits and 256 "
    "rows of RAVDESS; effective rank and recall depend on the number of rows."
)


def parts(study: Study) -> Iterator[Part]:
    """Yield the warnings and a table of health figures for the first run of each pretraining."""
    for name, (first, *_) in study.runs.items():
        title = study.methods[study.user(name)].title
        try:
            figures = health.of_run(first.workdir)
        except ConclugenError as e:
            yield Part(title, notes=[f"Not measured: {e}."])
            continue
        said = health.warnings(figures) or ["No figure is out of its usual range."]
        rows = [*_of_vectors(figures), *_of_losses(figures)]
        columns = ("figure", "this run", "chance", "best", *levels.USUAL)
        yield words(title, columns, rows)._replace(notes=[*said, MEANING])


def _of_vectors(figures: Mapping[str, float]) -> Iterator[Sequence[str]]:
    known = {f"health/{name}": figures.get(f"health/{name}") for name in FIGURES}
    limits = {
        "effective_rank": (1, figures.get("health/rows")),
        "uniformity": (0, -4),
        "alignment": (figures.get("health/alignment_chance"), 0),
        "recall_at_1": (figures.get("health/recall_at_1_chance"), 1),
        "cluster_balance": (0, 1),
        "clusters_nmi_group": ("", 0),
    }
    for name, title in FIGURES.items():
        if (value := known[f"health/{name}"]) is not None:
            usual = [found.get(name, "") for found in levels.USUAL.values()]
            yield title, *map(_shown, (value, *limits[name], *usual))


def _of_losses(figures: Mapping[str, float]) -> Iterator[Sequence[str]]:
    for name in (name for name in figures if name.startswith("chance/")):
        term = name.partition("/")[2]
        level, loss = levels.Level(figures[name], figures[f"best/{term}"]), figures.get(f"loss/{term}")
        if loss is not None:
            usual = [f"{found[term]:.0%}" if term in found else "" for found in levels.USUAL.values()]
            share = f"{_shown(loss)} ({level.share(loss):.0%})"
            yield f"{term} loss", share, _shown(level.chance), _shown(level.best), *usual


def _shown(value: float | str) -> str:
    return value if isinstance(value, str) else f"{value:.3g}"
