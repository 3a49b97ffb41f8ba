"""Choose the epoch of a classifier to keep, and when to stop its training."""

from typing import Any

import numpy as np


class BestEpochs:
    """The best epoch by ``mae`` or ``accuracy`` of each classifier of an array, the earliest of equals, and which still train.

    ``cost``: its measure, negated for accuracy. ``patience``: epochs without a lower validation loss after which a classifier
    stops; 0: never. ``by_loss``: of equals the one with the lowest loss instead.
    """

    def __init__(self, measure: str, patience: int, shape: tuple[int, ...] = (), *, by_loss: bool = False):
        self._sign, self._patience, self._by_loss = 1 if measure == "mae" else -1, patience, by_loss
        self._loss = np.full(shape, np.inf)
        self.cost, self._lowest = np.full(shape, np.inf), np.full(shape, np.inf)
        self.epoch, self._since = np.zeros(shape, int), np.zeros(shape, int)

    @property
    def running(self) -> np.ndarray:
        """Classifiers that have not stopped early."""
        return (self._since < self._patience) | (self._patience == 0)

    @property
    def measure(self) -> np.ndarray:
        """Validation measure of the best epochs; infinite, the worst, where the loss was never finite."""
        return self.cost * self._sign

    def improved(self, epoch: int, measure: Any, losses: Any) -> np.ndarray:
        """Take in the validation of an epoch; return which running classifiers were never better."""
        running = self.running
        # Never select an epoch whose outputs are NaN: as classes they would count as the first one.
        cost = np.where(np.isfinite(losses), np.asarray(measure) * self._sign, np.inf)
        equal = (cost == self.cost) & (losses < self._loss) & self._by_loss & np.isfinite(losses)
        improved = running & ((cost < self.cost) | equal)
        self._loss = np.where(improved, losses, self._loss)
        self.cost, self.epoch = np.where(improved, cost, self.cost), np.where(improved, epoch, self.epoch)
        self._since = np.where(running & (losses < self._lowest), 0, self._since + running)
        self._lowest = np.where(running, np.fmin(self._lowest, losses), self._lowest)
        return improved
