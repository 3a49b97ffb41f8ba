"""Reduce a sequence of frame-level or token-level features to one vector."""

from typing import Any

import numpy as np

from conclugen_jax.errors import ConclugenError

POOLS = ("mean", "max", "last")


def pool(x: Any, how: str, where: str, *, length: int | None = None) -> np.ndarray:
    """Reduce a sequence over time.

    Args:
      x: real numbers [dim], returned as they are, or [time, dim].
      how: ``mean``, ``max`` or ``last``, over the valid steps.
      where: names the features in messages, such as the file.
      length: number of valid steps, from the first; all where None.

    Returns:
      [dim] of the type of ``x``; a mean is taken in float64, and float64 it stays unless ``x`` is float32.

    Raises:
      ConclugenError: not numbers, another number of axes, no valid step, or a length outside 1..time.
    """
    if how not in POOLS:
        raise ConclugenError(f"pooling {how!r} is unknown; there are {', '.join(POOLS)}")
    x = np.asarray(x)
    if x.dtype.kind not in "fiub" or x.ndim not in (1, 2):
        raise ConclugenError(
            f"{where}: {x.dtype} of shape {x.shape}, expected real numbers of shape (dim,) or (time, dim)"
        )
    if x.ndim == 1:
        return x
    if length is not None:
        if not 1 <= length <= len(x):
            raise ConclugenError(f"{where}: length {length} of a sequence of {len(x)} steps; correct the lengths")
        x = x[:length]
    if not len(x):
        raise ConclugenError(f"{where}: a sequence of no steps; leave the file out if the modality is absent")
    if how == "last":
        return x[-1]
    if how == "max":
        return x.max(axis=0)
    mean = x.mean(axis=0, dtype=np.float64)
    return mean.astype(np.float32) if x.dtype == np.float32 else mean
