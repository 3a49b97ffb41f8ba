"""Choose settings from the data by written rules, each with its reason; they change ``configs/conclu_neighbours.py``."""

import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from conclugen_jax.data import persons, shards
from conclugen_jax.errors import ConclugenError

FEWEST = 4
"""Minimum number of training rows; folds by person of ten clips may leave so few."""
MOST_BATCH, CLUSTERS, QUEUE = 512, 10, 2
STEPS, MOST_STEPS, EPOCHS = 240, 5000, 20
"""The recommended method was judged at 240 steps of some 330 rows; larger data are seen 20 times, within 5,000 steps."""
QUICK_STEPS, QUICK_MOST, QUICK_EPOCHS = 80, 400, 5
MANY = 30_000
"""Rows from which the nearest neighbours of all rows take minutes on a processor."""
LABELS = 2, 5, 20
MOST_NUMBERS = 3e8
"""Rows times features up to which a logistic regression on all of them takes minutes at most."""
FOLDS, FEWER_FOLDS, FEW_ROWS = 5, 3, 2000


class Facts(NamedTuple):
    """The facts about the training rows that the rules use."""

    rows: int
    present: Mapping[str, int]  # modality -> rows that have it
    dims: Mapping[str, int]  # modality -> size of its vectors
    splits: tuple[str, ...] = ("train",)  # of the data set, that of these rows first
    kind: str = "none"  # of the label
    counts: Mapping[str, int] = {}  # class -> rows
    with_person: int = 0  # rows that have a group
    persons: int = 0
    clips: float = 0.0  # median over the persons
    explained: float | None = None  # share of the label's variance that the persons explain


class Setting(NamedTuple):
    """A value that a rule has chosen."""

    key: str  # of a configuration
    value: Any
    reason: str


class Scheme(NamedTuple):
    """The rows on which a method is trained and scored."""

    num_folds: int  # 0: the splits of the data set
    fold_by: str  # ``group`` or ``example``
    seeds: tuple[int, ...]  # one a fold, or of one split
    labels: tuple[int, ...]  # per class; 0: all
    reason: str


def facts(dataset: shards.Dataset) -> Facts:
    """Read the facts about the training split of a data set."""
    manifest = dataset.manifest
    split = training_split(manifest.splits)
    about, spec = manifest.splits[split], manifest.label
    stream = shards.ShardStream(dataset, split, list(manifest.modalities))
    everyone = np.arange(stream.num_examples)
    groups = stream.names(everyone)[1]
    _, clips = np.unique(groups[groups != ""], return_counts=True)
    found = Facts(
        rows=about["num_examples"],
        present=about["present"],
        dims=manifest.modalities,
        splits=(split, *(name for name in manifest.splits if name != split)),
        kind=spec.kind,
        counts={name: n for name, n in zip(spec.names, about["label_counts"], strict=True) if n},
        with_person=int(clips.sum()),
        persons=len(clips),
        clips=float(np.median(clips)) if len(clips) else 0.0,
    )
    if spec.kind == "none" or len(clips) < 2:
        return found
    return found._replace(explained=persons.explained(stream.labels(everyone), spec, groups))


def training_split(splits: Iterable[str]) -> str:
    """Return the split that is trained on: ``train``, else the first, whose statistics standardise all of them."""
    return "train" if "train" in splits else next(iter(splits))


def scored_split(known: Facts) -> str:
    """Return the split that is scored, never that of the training rows; ``test`` where folds are still to be cut."""
    _, *others = known.splits
    return next((name for name in ("test", "validation") if name in others or not others), (others or ("",))[0])


def is_labelled(known: Facts) -> bool:
    """Return whether the data have a usable label: a number, two classes, or a label that only some rows have."""
    if known.kind == "multi":
        return any(n < known.rows for n in known.counts.values())
    return known.kind == "value" or (known.kind == "single" and len(known.counts) > 1)


def modalities(known: Facts) -> tuple[list[str], list[str]]:
    """Return the modalities that are trained on, and a sentence on each that too few rows have."""
    least = max(3, known.rows // 20)
    kept = [m for m, n in known.present.items() if n >= least] or [max(known.present, key=known.present.__getitem__)]
    rare = [m for m in known.present if m not in kept]
    return kept, [f"{m} is dropped: {known.present[m]} of {known.rows} rows have it" for m in rare]


def scheme(known: Facts, *, quick: bool = False) -> Scheme:
    """Choose the rows that are scored, and numbers of labels, for data with labels.

    If the data set has splits, the scheme keeps them. Otherwise it cuts folds, by person if every row has one, else over
    examples.
    """
    few = [n for n in LABELS if known.kind == "single" and _enough(known.counts, 2 * n)]
    everyone = known.rows * sum(known.dims.values()) <= MOST_NUMBERS or not few
    labels = (*(few[:1] if quick else few), *((0,) if everyone else ()))
    if len(known.splits) > 1:
        seeds = (0,) if quick else (0, 1, 2)
        reason = f"trained on {known.splits[0]!r} and scored on {scored_split(known)!r}, as the data are split"
        return Scheme(0, "group", seeds, labels, f"{reason}; seeds: {len(seeds)}")
    most = FOLDS if known.rows <= FEW_ROWS else FEWER_FOLDS
    if known.with_person == known.rows and known.persons >= 3:
        number, by = min(most, known.persons), "group"
        reason = f"{number} folds by person: no person is in both training and test"
    else:
        number, by = most, "example"
        without = known.rows - known.with_person
        why = f"{without} of {known.rows} rows have no person" if without else f"{known.persons} persons are too few"
        reason = f"{number} folds over examples, since {why}: a person may be in training and test"
    return Scheme(number, by, (0,) if quick else tuple(range(number)), labels, reason + "; the first alone" * quick)


def _enough(counts: Mapping[str, int], number: int) -> bool:
    """Return whether most classes have so many rows."""
    return 2 * sum(n >= number for n in counts.values()) > len(counts)


def settings(known: Facts, *, quick: bool = False, num_devices: int = 1, slow: bool = True) -> list[Setting]:
    """Choose settings for training data.

    Args:
      known: of the smallest training split, with the modalities that are trained on alone.
      quick: for a first look.
      num_devices: that share a batch.
      slow: whether they are processors rather than accelerators.

    Raises:
      ConclugenError: fewer than four rows.
    """
    if known.rows < max(FEWEST, 2 * num_devices):
        fact = f"{known.rows} training rows, which are too few to learn from; pretraining needs {FEWEST}"
        raise ConclugenError(f"{fact}; add more, and repeat the command with another --workdir")
    return [
        *_batches(known, quick, num_devices),
        *_objective(known, slow),
        *_standardisation(known),
        *_vectors(known, slow),
    ]


def _batches(known: Facts, quick: bool, num_devices: int) -> Sequence[Setting]:
    n = known.rows
    most = min(max(n // 3, 2), MOST_BATCH)
    batch = max(most // num_devices, 1) * num_devices
    steps = n // batch
    least, limit, passes = (QUICK_STEPS, QUICK_MOST, QUICK_EPOCHS) if quick else (STEPS, MOST_STEPS, EPOCHS)
    epochs = max(math.ceil(least / steps), min(passes, limit // steps), 2)
    warmup, period = max(1, round(epochs / 12)), max(1, round(epochs / 3))
    points = (QUEUE + 1) * batch
    clusters = max(2, min(max(CLUSTERS, len(known.counts)), points // 4))
    of_clusters = f"{CLUSTERS}, or as many as there are classes, and at most a quarter of the {points:,} points"
    return [
        Setting("train.batch_size", batch, f"a third of the {n:,} training rows, at least 2, at most {MOST_BATCH}"),
        Setting("train.num_epochs", epochs, f"{epochs * steps:,} steps of {steps} an epoch"),
        Setting("schedule.warmup_epochs", warmup, "a twelfth of the epochs"),
        Setting("schedule.period_epochs", period, "a third of the epochs, and then two thirds"),
        Setting("schedule.granularity", "epoch" if epochs >= 20 else "step", "by epoch where there are 20 or more"),
        Setting("clustering.start_epoch", epochs // 5, "after a fifth of the epochs"),
        Setting("clustering.queue_batches", QUEUE, "as the method was judged"),
        Setting("clustering.num_clusters", clusters, of_clusters),
        Setting("checkpoint.every_epochs", epochs, "one checkpoint, at the end: the run takes minutes"),
        Setting("checkpoint.keep_newest", 1, "the same"),
        Setting("checkpoint.keep_best", 0, "the same"),
    ]


def _objective(known: Facts, slow: bool) -> Sequence[Setting]:
    names = tuple(known.present)
    chosen = [
        Setting("data.modalities", names, f"the modalities of the data that enough of the {known.rows:,} rows have")
    ]
    if len(names) == 1:
        one = "there is one modality, so two views of it are contrasted"
        return [
            *chosen,
            Setting("loss.contrastive_weight", 0.0, one),
            Setting("loss.instance_weight", 1.0, one),
            Setting("loss.instance_modality", names[0], one),
            Setting("loss.neighbours", 0, one),
        ]
    if known.rows > MANY and slow:
        why = f"neighbours of more than {MANY:,} rows take long on a processor; features are hidden instead"
        return [
            *chosen,
            Setting("loss.neighbours", 0, why),
            Setting("augmentation.feature_dropout", 0.3, why),
        ]
    number = min(5, known.rows // 10)
    chosen.append(Setting("loss.neighbours", number, "5, and at most a tenth of the rows"))
    if known.persons == 1:
        chosen.append(Setting("loss.neighbours_of_others", False, "there is one person"))
    return chosen


def _standardisation(known: Facts) -> Sequence[Setting]:
    key, share = "data.standardize", known.explained
    if 2 * known.with_person < known.rows:
        return [Setting(key, "split", f"{known.with_person:,} of {known.rows:,} rows say which person they are of")]
    if known.persons < 2:
        return [Setting(key, "split", "there is one person")]
    about = f"{known.persons} persons with {known.clips:g} clips each (median)"
    if share is None:
        why = "no labels say how much of them is the person"
        return [Setting(key, "person" if known.clips >= 10 else "split", f"{about}; {why}; by person from 10 clips on")]
    explain = f"they explain {share:.0%} of the label’s variance"
    if known.clips < 2:
        return [Setting(key, "split", f"{about}, which are too few")]
    if share > persons.CONFOUNDED:
        return [Setting(key, "split", f"{about}; {explain}, and the person’s mean may be part of the answer")]
    return [Setting(key, "person", f"{about}; {explain}, so what a person always looks like says nothing")]


def _vectors(known: Facts, slow: bool) -> Sequence[Setting]:
    key = "evaluation.smoothing_neighbours"
    if known.rows > MANY and slow:
        return [Setting(key, 0, f"neighbours of more than {MANY:,} rows take long on a processor")]
    return [Setting(key, min(20, known.rows // 10), "20, and at most a tenth of the training rows")]
