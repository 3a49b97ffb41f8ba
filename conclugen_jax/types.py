"""Names that several modules share. Typing only: nothing here computes."""

from collections.abc import Mapping
from typing import Any, TypedDict

import numpy as np

Array = Any
"""A jax.Array on the device, an np.ndarray on the host."""

Features = Mapping[str, Array]
"""Modality -> frozen feature vectors [n, dim]."""

Presence = Mapping[str, Array]
"""Modality -> boolean [n]: the row has this modality."""

Metrics = dict[str, Array]
"""Name -> scalar, averaged over the global batch."""


class Rows(TypedDict):
    """Rows of a split, in the order they were asked for.

    Attributes:
      features: modality -> float32 [n, dim]; zeros where the modality is absent.
      present: modality -> bool [n].
      label: int64 [n] (one class), float32 [n, num_labels] (multi-label), or an empty [n, 0] array without labels.
    """

    features: dict[str, np.ndarray]
    present: dict[str, np.ndarray]
    label: np.ndarray
