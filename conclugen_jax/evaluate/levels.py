"""Compute the terms of the objective at chance and at best, and find runs that ended while their loss still fell."""

import math
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
from ml_collections import ConfigDict

from conclugen_jax.method import objective

USUAL = {
    "digits": {
        "effective_rank": 94.0,
        "uniformity": -2.2,
        "alignment": 0.36,
        "recall_at_1": 0.087,
        "cluster_balance": 0.95,
        "contrastive": 0.81,
        "clustering": 0.96,
    },
    "RAVDESS": {
        "effective_rank": 115.0,
        "uniformity": -1.9,
        "alignment": 0.19,
        "recall_at_1": 0.049,
        "cluster_balance": 0.88,
        "clusters_nmi_group": 0.031,
        "contrastive": 0.57,
        "clustering": 0.92,
    },
}
"""Data set -> figures at the end of a run with the settings of ``conclugen run``; of losses, see ``Level.share``.

Measured on 2026-11-29 by ``conclugen pretrain --config=RUN/config.py``, seed 0, on one device: 1,400 digits of three
modalities and two thirds of the actors of RAVDESS with two; both have 256 rows at most (200 of the digits).
"""


class Level(NamedTuple):
    """Values of a term of the objective, without its weight."""

    chance: float  # of a network that makes no difference between examples
    best: float  # of one that has solved the task

    def share(self, loss: float) -> float:
        """Return how far a loss has come from chance (0) to the best (1); 1 where the two are the same."""
        way = self.chance - self.best
        return (self.chance - loss) / way if way > 1e-6 else 1.0


def of_losses(
    config: ConfigDict, present: Mapping[str, np.ndarray], variances: Mapping[str, float]
) -> dict[str, Level]:
    """Return term -> its levels, by batch size, modalities, clusters, margins and temperatures of a run.

    A contrast of n rows by similarities that are all equal has the loss log n; at its best, true pairs are identical and all
    others orthogonal. Where modalities are missing, n is the number of rows of an average batch that have what is contrasted.

    Args:
      config: of the run, with the names of its modalities.
      present: modality -> boolean [rows of the training split].
      variances: modality -> mean over features of their variance as the networks see them: the loss of a decoder that always
        gives the mean.
    """
    loss, names = config.loss, list(config.data.modalities)
    stays = 1 - config.augmentation.modality_dropout

    def rows(*modalities: str) -> float:
        share = np.mean(np.logical_and.reduce([present[m] for m in modalities]))
        return max(config.train.batch_size * float(share) * stays ** len(modalities), 1.0)

    def of_views(*numbers: tuple[float, float], temperature: float) -> Level:
        chance = sum(weight * math.log(max(2 * n - 1, 1)) for weight, n in numbers)
        others = [(weight, max(2 * n - 2, 0) * math.exp(-1 / temperature)) for weight, n in numbers]
        return Level(chance, sum(weight * math.log1p(x) for weight, x in others))

    found = {}
    if loss.contrastive_weight:
        pairs = [rows(*pair) for pair in objective.modality_pairs(names, loss.contrastive_pairs)]
        terms = [_margin_softmax(n, loss.contrastive_margin) for n in pairs]
        found["contrastive"] = Level(*(2 * sum(each) for each in zip(*terms, strict=True)))
    if loss.clustering_weight:
        each = len(names) if loss.clustering_target == "individual" else 1
        k, margin = config.clustering.num_clusters, loss.clustering_margin
        at_chance = math.log(k - 1 + math.exp(-margin)) if loss.margin_in_denominator else math.log(k)
        found["clustering"] = Level(each * (at_chance + margin), 0.0 if loss.margin_in_denominator else each * margin)
    if loss.reconstruction_weight:
        found["reconstruction"] = Level(sum(variances[m] for m in names), 0.0)
    if loss.instance_weight:
        found["instance"] = of_views((1, rows(loss.instance_modality)), temperature=loss.instance_temperature)
    if loss.fusion_weight:
        of_modalities = [(1, rows(m)) for m in names]
        found["fusion"] = of_views((1, rows()), *of_modalities, temperature=loss.fusion_temperature)
    return found


def _margin_softmax(n: float, margin: float) -> tuple[float, float]:
    """Chance and best of one direction of ``losses.masked_margin_softmax``: n rows, similarities 0 or 1."""
    return tuple(math.log(math.exp(own - margin) + n - 1) - own + margin for own in (0, 1))


def of_records(records: Sequence[Mapping[str, Any]], config: ConfigDict) -> dict[str, float]:
    """Return figures of a run's log: its terms, and what they say of its schedule.

    Returns:
      ``loss/TERM``: mean over the last epoch. ``schedule/done``: share of the epochs that have begun.
      ``schedule/falling``: see :func:`falling`, the greatest of the terms. ``schedule/rate``: the last learning rate over the
      greatest. ``schedule/period_ends``: the next number of epochs at which a cosine period ends.
    """
    records = [r for r in records if "loss" in r]
    if not records:
        return {}
    last, num_epochs, section = records[-1], config.train.num_epochs, config.schedule
    terms = {name: [r[name] for r in records if name in r] for name in last if name.startswith("loss/")}
    epoch = [r for r in records if r["epoch"] == last["epoch"]]
    figures = {name: float(np.mean([r[name] for r in epoch if name in r])) for name in terms}
    end, length = section.warmup_epochs, section.period_epochs
    while end <= num_epochs:
        end, length = end + length, length * section.period_multiplier
    rates = [r["learning_rate"] for r in records]
    return figures | {
        "schedule/done": (last["epoch"] + 1) / num_epochs,
        "schedule/falling": max([falling(np.array(values)) for values in terms.values()], default=0.0),
        "schedule/rate": rates[-1] / max(*rates, 1e-30),
        "schedule/period_ends": float(end),
    }


def falling(losses: np.ndarray) -> float:
    """Return the share of a term's fall [steps] that occurs between the last but one and the last tenth of the steps.

    The whole fall is from the first tenth to the last. 0: it rises, or the difference is below three standard errors, or a
    tenth has fewer than two steps.
    """
    tenth = len(losses) // 10
    if tenth < 2:
        return 0.0
    first, before, newest = losses[:tenth], losses[-2 * tenth : -tenth], losses[-tenth:]
    fall, whole = before.mean() - newest.mean(), first.mean() - newest.mean()
    noise = 3 * math.sqrt((before.var(ddof=1) + newest.var(ddof=1)) / tenth)
    return float(fall / whole) if fall > noise and whole > 0 else 0.0
