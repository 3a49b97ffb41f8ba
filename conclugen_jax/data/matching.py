"""Find ids of the labels that match no vectors, and say how they differ from existing names."""

import re
from collections.abc import Iterable, Mapping

from conclugen_jax.data.features import canonical
from conclugen_jax.data.sources import Annotations, Features
from conclugen_jax.errors import ConclugenError

DIFFERENCES = {
    "an ending": lambda name: re.sub(r"\.(?=\w*[A-Za-z])\w{2,5}$|\.0$", "", name),  # a.mp4, a.npy; 1.0 of a spreadsheet
    "leading zeros": lambda name: re.sub(r"(?<!\d)0+(?=\d)", "", name),
    "'_' or '-' for '/' or a space": lambda name: re.sub(r"[-/\\ ]", "_", name),
    "capitals": str.casefold,
}
"""Maps each typical difference between two spellings of an id to a function that removes it."""


def _bare(name: str, besides: str = "") -> str:
    for what, without in DIFFERENCES.items():
        name = name if what == besides else without(name)
    return name


def likeness(lost: Iterable[str], names: Iterable[str]) -> str:
    """Return how an unknown id differs from a similar name; ``""`` if no name is similar."""
    lost, names, near = sorted(lost), sorted(names), {}
    if not lost or not names:
        return ""
    for name in names:
        near.setdefault(_bare(name), name)
    for key in lost:
        if (name := near.get(_bare(key))) is not None:
            why = [what for what in DIFFERENCES if _bare(key, what) != _bare(name, what)]
            return f"there is {name!r} for {key!r}, which differs by {' and '.join(why)}"
    return ""


def compare(features: Features, columns: Mapping[str, Annotations]) -> tuple[int, str]:
    """Return the number of unused vectors, and how the id of a row without a vector differs from an unused name.

    The second value is empty if no id resembles an unused name, unless no row has a vector at all.
    """
    names = {split: set(some) for split, some in features.names().items()}
    if not names:
        return 0, ""
    keys = {split: set(map(canonical, a.keys)) for split, a in columns.items()}
    anywhere = {f"{split}/{key}" for split, some in keys.items() for key in some}.union(*keys.values())
    spare = [name for split in names for name in names[split] - (keys.get(split, set()) if split else anywhere)]
    loose = names.get("", set())
    lost = [
        key for split in keys for key in keys[split] - names.get(split, set()) - loose if f"{split}/{key}" not in loose
    ]
    remark = likeness(lost, spare)
    if not remark and spare and lost and len(lost) == sum(map(len, keys.values())):
        remark = f"there are such as {min(spare)!r}"
    return len(spare), remark


def refuse_shared_names(modality: str, features: Features, columns: Mapping[str, Annotations]) -> None:
    """Refuse a vector without a split if utterances of several splits have its name."""
    names = set(features.names().get("", ()))
    seen: dict[str, str] = {}
    for split, annotations in columns.items():
        for key in map(canonical, annotations.keys if names else ()):
            if key in names and f"{split}/{key}" not in names and seen.setdefault(key, split) != split:
                fault = f"{key!r} is an utterance of {seen[key]!r} and another one of {split!r}"
                way_out = f"put the split in front of the id, {split}/{key}, or files into folders of splits"
                raise ConclugenError(f"modality {modality!r}: {fault}; {way_out}")
