"""How the vectors of an example's modalities become one."""

from collections.abc import Mapping
from typing import Any

import jax.numpy as jnp


def fuse(vectors: Mapping[str, Any], present: Mapping[str, Any], how: str, *, xp: Any = jnp) -> Any:
    """Join the vectors of the modalities of each row; an absent modality counts as zeros.

    Args:
      vectors: modality -> [n, dim]; what stands in absent rows does not matter.
      present: modality -> boolean [n].
      how: ``concat``: side by side in the order of the modalities' names; ``mean``: over those that a row has (Eq. 8), zeros
        if it has none.
      xp: library of the arrays, ``jax.numpy`` or ``numpy``.

    Returns:
      [n, sum of dims] or, for ``mean``, [n, dim].
    """
    # Sorted: the order must not depend on whether the dict has passed through a compiled function.
    names = sorted(vectors)
    parts = [xp.where(present[m][:, None], vectors[m], 0) for m in names]
    if how == "concat":
        return xp.concatenate(parts, axis=1)
    count = sum(present[m].astype(xp.float32) for m in names)
    return sum(parts) / xp.maximum(count, 1)[:, None]
