"""Oddities as tables and sentences, for the screen and for reports."""

from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple

from conclugen_jax.evaluate.oddities import Oddities


class Shown(NamedTuple):
    """One kind of oddity."""

    title: str
    said: str  # what was looked for, how, and how much was found
    columns: Sequence[str] = ()  # none where nothing was found
    rows: Sequence[Sequence[str]] = ()


def shown(found: Oddities, top: int) -> Iterator[Shown]:
    """Yield the tables, with at most ``top`` rows of each kind."""
    if found.labels:
        yield _labels(found.labels, found.vectors, top)
    if found.duplicates:
        yield _duplicates(found.duplicates, top)
    if found.persons:
        yield _persons(found.persons, top)
    if found.modalities:
        yield _modalities(found.modalities)
    if found.wrong:
        yield _wrong(found.wrong, top)


def _labels(section: Mapping[str, Any], vectors: str, top: int) -> Shown:
    likely = section["likely"]
    said = (
        f"A cross-validated probe of {vectors} is right on {section['accuracy']:.1%} of {section['rows']:,} rows. "
        f"It confidently disagrees with {len(likely):,} labels; confident learning estimates that {section['errors']:.0f} "
        "are wrong. Clips that are hard are among them, the more so the less often the probe is right."
    )
    rows = [
        [*_names(one), one["label"], one["suggested"], f"{one['probability']:.3f}", f"{one['margin']:.3f}"]
        for one in likely[:top]
    ]
    return Shown(
        "Likely wrong labels",
        said,
        ["id", "split", "person", "label", "suggested", "P(label)", "margin"],
        rows,
    )


def _duplicates(section: Mapping[str, Any], top: int) -> Shown:
    pairs = section["pairs"]
    across = sum(one["split"] != one["other_split"] for one in pairs)
    unlike = sum(one["label"] != one["other_label"] for one in pairs)
    listed = (
        "I" if len(pairs) == section["exact"] + section["near"] else f"Of the {len(pairs):,} pairs that are listed i"
    )
    said = (
        f"Rows that are exact copies of another: {section['exact']:,}; other pairs with a cosine of "
        f"{section['threshold']:g} or more in standardised raw features: {section['near']:,}. "
        f"{listed}n two splits: {across:,}; with two labels: {unlike:,}."
    )
    first = sorted(pairs, key=lambda one: (one["label"] == one["other_label"], one["split"] == one["other_split"]))
    rows = [
        [
            one["id"],
            one["other_id"],
            "copy" if one["exact"] else f"{one['cosine']:.4f}",
            *(
                one[key] if one[key] == one[f"other_{key}"] else f"{one[key]} / {one[f'other_{key}']}"
                for key in ("split", "label")
            ),
        ]
        for one in first[:top]
    ]
    return Shown(
        "Near duplicates", said, ["id", "other", "cosine", "split", "label"], [list(map(_text, x)) for x in rows]
    )


def _persons(section: Mapping[str, Any], top: int) -> Shown:
    every, mean = section["all"], section["neighbours"]
    own = sum(one["is_cluster"] for one in every)
    said = (
        f"Of the nearest neighbours of a row in {section['vectors']}, {mean['own']:.0%} are of its person (chance "
        f"{mean['own_chance']:.0%}){_of_class(mean)}. Persons that are a cluster of their own, since this share is above "
        f"chance by half of what is possible and by more than that of the class: {own} of {len(every)}."
    )
    rows = [
        [
            one["name"],
            f"{one['rows']:,}",
            *(_share(one[key]) for key in ("own", "own_chance", "same_class", "class_chance")),
            "yes" if one["is_cluster"] else "",
        ]
        for one in every[:top]
    ]
    return Shown("Persons as clusters", said, ["person", "rows", "own", "chance", "class", "chance", "cluster"], rows)


def _of_class(mean: Mapping[str, Any]) -> str:
    if mean["same_class"] is None:
        return ""
    return f" and {mean['same_class']:.0%} of its class (chance {mean['class_chance']:.0%})"


def _modalities(section: Sequence[Mapping[str, Any]]) -> Shown:
    idle = [one["modality"] for one in section if not one["interval"] or one["interval"][0] <= 0]
    said = f"Adding nothing to the others that these rows could show: {', '.join(idle) or 'none'}."
    rows = [
        [
            one["modality"],
            f"{one['rows']:,}",
            *(f"{100 * one[key]:.1f}" for key in ("alone", "without", "together")),
            f"{100 * one['difference']:+.1f} {_interval(one['interval'])}",
        ]
        for one in section
    ]
    said += " Accuracy in %, with the 95 % interval of the difference, not corrected for several modalities."
    return Shown("What modalities add", said, ["modality", "rows", "alone", "without", "all", "adds"], rows)


def _interval(interval: Sequence[float] | None) -> str:
    return f"[{100 * interval[0]:.1f}, {100 * interval[1]:.1f}]" if interval else "(no interval)"


def _wrong(section: Mapping[str, Any], top: int) -> Shown:
    every, methods = section["all"], section["accuracy"]
    scores = ", ".join(f"{name} {accuracy:.1%}" for name, accuracy in methods.items())
    said = f"{len(every):,} of {section['rows']:,} rows are guessed wrong by probes of all kinds of vectors ({scores})."
    rows = [[*_names(one), one["label"], *one["guesses"].values()] for one in every[:top]]
    return Shown(
        "Wrong by every method", said, ["id", "split", "person", "label", *(name.split()[0] for name in methods)], rows
    )


def _names(one: Mapping[str, Any]) -> list[str]:
    return [one["id"], one["split"], one["group"] or "–"]


def _share(value: float | None) -> str:
    return "–" if value is None else f"{value:.0%}"


def _text(value: str | None) -> str:
    return "–" if value is None else value
