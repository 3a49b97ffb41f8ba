"""Estimate how many labels are enough: fit a power law to the error, and predict the gain of more labels per class."""

import collections
import math
from collections.abc import Iterator, Sequence
from typing import NamedTuple

import numpy as np

from conclugen_jax.study.definition import PROBE
from conclugen_jax.study.report import charts
from conclugen_jax.study.report.charts import Series
from conclugen_jax.study.report.reading import DatasetFacts, Study
from conclugen_jax.study.report.tables import FEWEST_SEEDS, Part

FEWEST_NUMBERS = 3  # of labels per class, for a curve of two parameters; one more for the level that it ends at
DRAWS = 400
POINTS = 0.02  # of accuracy: what more labels are asked to give
FARTHEST = 10  # times the labels that there are: beyond, the curve says nothing
EXPONENTS = np.linspace(0.05, 2, 79)


class PowerLaw(NamedTuple):
    """error(k) = scale k^-exponent + level of k labels per class."""

    scale: float
    exponent: float
    level: float

    def error(self, labels: np.ndarray | float) -> np.ndarray | float:
        """Return the error at numbers of labels per class."""
        return self.scale * labels**-self.exponent + self.level

    def labels(self, error: float) -> float:
        """Return the labels per class at which the error is reached; infinite below the level."""
        if self.scale <= 0 or error <= self.level:
            return math.inf
        return ((error - self.level) / self.scale) ** (-1 / self.exponent)


def fit(labels: Sequence[float], errors: Sequence[float]) -> PowerLaw:
    """Fit a power law to errors [n] at numbers of labels per class [n] by least squares; below 4 numbers its level is 0.

    Scale and level are not negative; the exponent is the best of ``EXPONENTS``.

    References:
      Viering and Loog, "The shape of learning curves: a review", 2021 (arXiv 2103.10948), POW3.
    """
    errors = np.asarray(errors, np.float64)[:, None]
    powers = np.asarray(labels, np.float64)[:, None] ** -EXPONENTS
    squares, products, total = (powers**2).sum(axis=0), (powers * errors).sum(axis=0), powers.sum(axis=0)
    candidates = [(products / squares, 0 * squares)]
    if len(np.unique(labels)) > FEWEST_NUMBERS:
        determinant = len(errors) * squares - total**2
        scale = (len(errors) * products - total * errors.sum()) / determinant
        candidates += [(scale, errors.mean() - scale * powers.mean(axis=0)), (0 * squares, errors.mean() + 0 * squares)]
    scales, levels = np.array(candidates).swapaxes(0, 1)  # each [candidates, exponents]
    residuals = np.square(scales[:, None] * powers + levels[:, None] - errors).sum(axis=1)
    residuals[(scales < 0) | (levels < 0)] = np.inf
    best = np.unravel_index(residuals.argmin(), residuals.shape)
    return PowerLaw(float(scales[best]), float(EXPONENTS[best[1]]), float(levels[best]))


class Needed(NamedTuple):
    """Conclusions from the curve of a method."""

    law: PowerLaw
    numbers: np.ndarray  # of labels per class, ascending
    means: np.ndarray  # error at each
    more: float  # labels per class beyond the greatest number, for ``POINTS`` of accuracy; infinite: never
    interval: tuple[float, float] | None  # 95 %, over seeds; ``None`` below ``FEWEST_SEEDS``
    seeds: int
    drawn: Sequence[PowerLaw]  # fitted to curves of means that may be the true ones


def needed(errors: dict[float, dict[int, float]]) -> Needed | None:
    """Return conclusions from errors, labels per class -> seed -> error; ``None`` for too few numbers of labels.

    Only seeds with all numbers of labels count. The interval holds the middle 95 % of the conclusions from :func:`curves`.
    """
    numbers = np.array(sorted(errors))
    seeds = sorted(set.intersection(*(set(own) for own in errors.values()))) if errors else []
    if len(numbers) < FEWEST_NUMBERS or not seeds:
        return None
    table = np.array([[errors[k][seed] for k in numbers] for seed in seeds])
    law, rng = fit(numbers, table.mean(axis=0)), np.random.default_rng(0)
    laws, interval = [], None
    if len(seeds) >= FEWEST_SEEDS:
        laws = [fit(numbers, means) for means in curves(table, DRAWS, rng)]
        low, high = np.quantile([_more(one, numbers[-1]) for one in laws], (0.025, 0.975), method="nearest")
        interval = float(low), float(high)
    return Needed(law, numbers, table.mean(axis=0), _more(law, numbers[-1]), interval, len(seeds), laws)


def curves(table: np.ndarray, number: int, rng: np.random.Generator) -> np.ndarray:
    """Draw curves of true means [number, k] by the errors of seeds [n, k], between 0 and 1: Student's t around their means.

    Each mean has the interval of Student's t, and differences of them have theirs. Seeds drawn with replacement would give
    intervals that are too narrow: three of them covered the truth in 77 to 83 % of 60 trials, these in 90 to 95 %.
    """
    n, mean = len(table), table.mean(axis=0)
    spread = rng.normal(size=(number, n)) @ (table - mean) / math.sqrt(n * (n - 1))
    return np.clip(mean + spread * np.sqrt((n - 1) / rng.chisquare(n - 1, (number, 1))), 0, 1)


def _more(law: PowerLaw, labels: float) -> float:
    return law.labels(float(law.error(labels)) - POINTS) - labels


def parts(study: Study) -> Iterator[Part]:
    """Yield for each data set the curve of the reference method and the sentence that follows from it."""
    reference = study.definition.get("reference")
    for key, facts in study.datasets.items():
        by_protocol = _errors(study, key, facts, reference)
        protocol = max(by_protocol, key=lambda p: (len(by_protocol[p]), p == PROBE), default="")
        found = needed(by_protocol[protocol]) if protocol else None
        if found is not None:
            title = study.label(reference, protocol)
            heading = f"{facts.title(key)}: are more labels worth it?"
            legend = [("fitted power law, 95 % band", 0), ("measured", 1)]
            yield Part(heading, sentence(found, title), [_note(found)], legend, [("", _drawn(found, title))])


def _errors(
    study: Study, key: str, facts: DatasetFacts, method: str | None
) -> dict[str, dict[float, dict[int, float]]]:
    """Return protocol -> labels per class -> seed -> error of classes, of a method on a data set."""
    found: dict[str, dict] = collections.defaultdict(lambda: collections.defaultdict(dict))
    every = facts.num_examples.get("train", 0) / max(len(facts.classes), 1)
    for c in study.cells if facts.kind == "single" else ():
        wanted = (c.dataset, c.method, c.status) == (key, method, "done") and "accuracy" in (c.scores or ())
        if wanted and (number := c.labels or every):
            found[c.protocol][float(number)][c.seed] = 1 - c.scores["accuracy"]
    return found


def sentence(found: Needed, title: str) -> str:
    """Return a sentence on the gain of more labels."""
    most, points = found.numbers[-1], f"{100 * POINTS:.0f} points"
    reached = f"{title} reaches {100 * (1 - found.means[-1]):.1f} % with {most:.0f} labels a class"
    shown = "" if found.interval is None else f" [{_count(found.interval[0])}, {_count(found.interval[1])}]"
    if found.more <= FARTHEST * most:
        return f"{reached}. About {_count(found.more)}{shown} more labelled clips a class would give {points}."
    level = f"levels off at {100 * (1 - found.law.level):.1f} %" if found.law.level else "is nearly flat"
    return f"{reached}. The curve {level}: {FARTHEST} times as many labels would give less than {points}."


def _count(x: float) -> str:
    if not math.isfinite(x):
        return "never"
    return f"{float(f'{x:.2g}'):,.0f}"


def _note(found: Needed) -> str:
    law = found.law
    fitted = f"error = {law.scale:.3g} k^-{law.exponent:.2g} + {law.level:.3g} for k labels a class"
    interval = (
        f"interval over {found.seeds} seeds" if found.interval else f"no interval: fewer than {FEWEST_SEEDS} seeds"
    )
    return f"Fitted to {len(found.numbers)} numbers of labels: {fitted}; {interval}. Beyond the points it is a guess."


def _drawn(found: Needed, title: str) -> str:
    xs = np.geomspace(found.numbers[0], 4 * found.numbers[-1], 40)
    ends = np.full((2, len(xs)), np.nan)
    if found.drawn:
        ends = np.quantile([one.error(xs) for one in found.drawn], (0.975, 0.025), axis=0)
    rows = zip(np.log2(xs), *(100 * (1 - e) for e in (found.law.error(xs), *ends)), strict=True)
    curve = Series(f"{title}, fitted", 0, list(rows), band=True)
    measured = [
        (math.log2(k), 100 * (1 - e), math.nan, math.nan) for k, e in zip(found.numbers, found.means, strict=True)
    ]
    ticks = [(math.log2(k), f"{k:.0f}") for k in (*found.numbers, 4 * found.numbers[-1])]
    return charts.line_chart(
        f"Accuracy of {title} against labels per class, with a fitted power law",
        [curve, Series(title, 1, measured)],
        x_label="labels per class",
        y_label="accuracy in %",
        x_ticks=ticks,
        y_bounds=(0, 100),
    )
