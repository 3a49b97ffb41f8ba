"""Nearest neighbours by cosine similarity, exact and in blocks of rows, and vectors smoothed over them.

Neighbours may be asked for among other persons only: with ids of persons, rows of the query's own person do not count.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np

from conclugen_jax.method import losses

BLOCK = 1024  # queries whose similarities with the whole bank are in memory at once
NONE = -1  # index in place of a neighbour that there is not; id of a row whose person is unknown


def nearest(
    queries: np.ndarray,
    bank: np.ndarray,
    k: int,
    *,
    own: np.ndarray | None = None,
    persons: tuple[np.ndarray, np.ndarray] | None = None,
    unit_bank: jax.Array | None = None,
    block: int = BLOCK,
) -> tuple[np.ndarray, np.ndarray]:
    """Find the k rows of a bank that are most similar to each query.

    Args:
      queries: [n, dim]; zeros are as similar to all rows as to none: 0.
      bank: [m, dim].
      k: number of neighbours.
      own: the row of the bank that each query is itself, integers [n], below 0 for none: it is no neighbour.
      persons: integer ids of the queries' persons [n] and of the bank's [m]; rows of the same person are no neighbours of
        a query. An id below 0 is unknown and equals no other.
      unit_bank: :func:`unit_rows` of the bank, for many calls with the same one.
      block: queries that are compared at once; the result does not depend on it.

    Returns:
      Rows of the bank, int32 [n, k], the most similar first and of equals the first, and their cosine similarities, float32
      [n, k]. Where fewer than k rows count, -1 and -infinity follow.
    """
    if queries.ndim != 2 or bank.ndim != 2 or queries.shape[1] != bank.shape[1] or not len(bank) or k < 1:
        raise ValueError(f"nearest: {k} neighbours of queries {queries.shape} in a bank {bank.shape}")
    n, unknown = len(queries), (np.full(len(queries), NONE), np.full(len(bank), NONE - 1))
    asking, known = (np.asarray(x, np.int32) for x in (persons or unknown))
    itself = np.full(n, NONE, np.int32) if own is None else np.asarray(own, np.int32)
    known_rows = unit_rows(bank) if unit_bank is None else unit_bank
    found = []
    for start in range(0, n, block):
        part = [x[start : start + block] for x in (queries, asking, itself)]
        missing = min(block, n) - len(part[0])  # all blocks have one size, so that one program serves all
        part = [np.concatenate([x, np.repeat(x[:1], missing, axis=0)]) for x in part]
        similarity, rows = _nearest_of_block(known_rows, known, *part, k=min(k, len(bank)))
        found.append([np.asarray(x)[: block - missing] for x in (rows, similarity)])
    rows, similarity = (np.concatenate(parts)[:n] for parts in zip(*found, strict=True))
    empty = ((0, 0), (0, k - rows.shape[1]))
    return np.pad(rows, empty, constant_values=NONE), np.pad(similarity, empty, constant_values=-np.inf)


@jax.jit
def unit_rows(bank: jax.Array) -> jax.Array:
    """Return the rows of a bank at length 1, float32 on the device."""
    return losses.unit_rows(bank.astype(jnp.float32))


@functools.partial(jax.jit, static_argnames="k")
def _nearest_of_block(
    bank: jax.Array, known: jax.Array, queries: jax.Array, asking: jax.Array, itself: jax.Array, *, k: int
) -> tuple[jax.Array, jax.Array]:
    rows = losses.unit_rows(queries.astype(jnp.float32))
    similarity = jnp.matmul(rows, bank.T, precision="highest")
    excluded = (asking[:, None] == known[None, :]) & (asking[:, None] >= 0)
    excluded |= itself[:, None] == jnp.arange(len(bank))[None, :]
    similarity, rows = jax.lax.top_k(jnp.where(excluded, -jnp.inf, similarity), k)
    return similarity, jnp.where(jnp.isneginf(similarity), NONE, rows)


def smooth_with_neighbours(
    queries: np.ndarray,
    bank: np.ndarray,
    k: int = 20,
    weight: float = 0.5,
    *,
    own: np.ndarray | None = None,
    persons: tuple[np.ndarray, np.ndarray] | None = None,
    unit_bank: jax.Array | None = None,
) -> np.ndarray:
    """Return ``(1 - weight) z + weight mean(N(z))`` of each query z, with N(z) its k nearest rows of the bank, by cosine.

    The bank holds vectors of training rows alone, so that the result of a query depends on no other query (inductive).

    Args:
      queries: [n, dim].
      bank: [m, dim], in the same space.
      k: number of neighbours; all there are where they are fewer. A query without any stays as it is.
      weight: share of the neighbours' mean, from 0 to 1.
      own: see :func:`nearest`.
      persons: see :func:`nearest`.
      unit_bank: see :func:`nearest`.

    Returns float32 [n, dim].
    """
    if not 0 <= weight <= 1:
        raise ValueError(f"smooth_with_neighbours: weight is {weight}, expected a share from 0 to 1")
    rows, _ = nearest(queries, bank, k, own=own, persons=persons, unit_bank=unit_bank)
    queries, counted = np.asarray(queries, np.float32), (rows != NONE).astype(np.float32)
    sums, number = np.zeros_like(queries), counted.sum(axis=1, keepdims=True)
    for each, counts in zip(rows.T, counted.T, strict=True):  # the neighbours of all queries would be k times as large
        sums += counts[:, None] * bank[each]
    share = np.where(number > 0, weight, 0).astype(np.float32)
    return (1 - share) * queries + share * (sums / np.maximum(number, 1))
