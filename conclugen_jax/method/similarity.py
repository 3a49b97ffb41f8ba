"""Sums of exponentials over rows and columns of a similarity matrix that is taken tile by tile."""

import functools
from typing import Any

import jax
import jax.numpy as jnp

KEPT_TILE, CPU_TILE, ACCELERATOR_TILE = (1024, 4096), (1024, 1024), (8192, 16384)
"""Rows and columns at once, at most: on a CPU, where its cache counts, of a matrix that is kept and of one that is not, and
on accelerators, where few large tiles are fastest."""
ROWS_PER_SUM = 128  # rows added up by one thread of an accelerator
KEEP_UP_TO, CPU_KEEPS_UP_TO = 4096**2, 16384**2
"""Most entries of a matrix kept for the backward pass, on accelerators and on a CPU, where a product takes longer than to write
and read its result; larger ones are computed again there."""


def exp_sums(
    a: jax.Array, b: jax.Array, rows: jax.Array, columns: jax.Array, keep: bool | None = None, dtype: Any = jnp.float32
) -> tuple[jax.Array, jax.Array]:
    """Return the row and column sums of exp(a b^T) over the entries whose row and column count.

    The similarities of unit rows lie in [-1, 1], so exp cannot overflow and both sums come from one pass over tiles, without
    a running maximum. The backward pass goes over the tiles again.

    Args:
      a: float32 [n, dim], rows of length at most 1; zero where ``rows`` is false.
      b: float32 [m, dim], likewise; zero where ``columns`` is false.
      rows: boolean [n], rows of ``a`` that count.
      columns: boolean [m], rows of ``b`` that count.
      keep: hold the exponentials for the backward pass, n m numbers, instead of computing each tile again, where memory
        then grows with n + m; ``None``: as :func:`keeps` says.
      dtype: type of the factors of all products; these, and all sums, are in float32.

    Returns:
      (sums over columns [n], sums over rows [m]); that of a row or column that does not count has no meaning.

    References:
      Rabe and Staats, "Self-attention does not need O(n^2) memory", 2021, for tiles that are computed again.
    """
    n, m = a.shape[0], b.shape[0]
    keep = keeps(n * m) if keep is None else keep
    tile = ACCELERATOR_TILE if jax.default_backend() != "cpu" else KEPT_TILE if keep else CPU_TILE
    (a, rows), (b, columns) = _tiles((a, rows), tile[0]), _tiles((b, columns), tile[1])
    row_sums, column_sums = _sums(keep, dtype, a, b, rows.astype(jnp.float32), columns.astype(jnp.float32))
    return row_sums.reshape(-1)[:n], column_sums.reshape(-1)[:m]


def keeps(entries: int) -> bool:
    """Return whether a matrix of so many entries is kept for the backward pass."""
    return entries <= (CPU_KEEPS_UP_TO if jax.default_backend() == "cpu" else KEEP_UP_TO)


def products(a: jax.Array, b: jax.Array) -> jax.Array:
    """Return a b^T, summed in float32, see :func:`matmul`: the margin of the losses is below a bfloat16 step near 1."""
    return matmul(a, b.T)


def matmul(a: jax.Array, b: jax.Array) -> jax.Array:
    """Return a b in the precision of the run; full float32 where none was chosen by ``jax.default_matmul_precision``."""
    precision = "highest" if jax.config.jax_default_matmul_precision is None else None
    return jnp.matmul(a, b, precision=precision, preferred_element_type=jnp.float32)


def _tiles(arrays: tuple[jax.Array, ...], most: int) -> tuple[jax.Array, ...]:
    """[n, ...] -> [tiles, rows, ...], filled up with zeros: as few tiles of at most ``most`` rows, as equal as can be."""
    n = arrays[0].shape[0]
    count = -(-n // most)
    size = -(-n // count)
    return tuple(
        jnp.pad(x, [(0, count * size - n)] + [(0, 0)] * (x.ndim - 1)).reshape(count, size, *x.shape[1:]) for x in arrays
    )


_full = functools.partial(jnp.matmul, precision="highest")  # sums of a softmax are in float32 in every mode


def _column_sums(weights: jax.Array, e: jax.Array) -> jax.Array:
    """Return weights e, [t], [t, u] -> [u]; on accelerators in parts, which then are summed at once."""
    if jax.default_backend() == "cpu" or len(weights) % (2 * ROWS_PER_SUM):
        return _full(weights, e)
    parts = e.reshape(-1, ROWS_PER_SUM, e.shape[1]) * weights.reshape(-1, ROWS_PER_SUM, 1)
    return jax.lax.optimization_barrier(parts.sum(axis=1)).sum(axis=0)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def _sums(
    keep: bool, dtype: Any, a: jax.Array, b: jax.Array, rows: jax.Array, columns: jax.Array
) -> tuple[jax.Array, jax.Array]:
    """[I, t, dim], [J, u, dim], weights 0 or 1 [I, t], [J, u] -> sums [I, t], [J, u]."""
    return _sweep(False, a.astype(dtype), b.astype(dtype), rows, columns)[0]


def _forward(keep, dtype, a, b, rows, columns):
    a, b = a.astype(dtype), b.astype(dtype)
    sums, exponentials = _sweep(keep, a, b, rows, columns)
    return sums, (a, b, exponentials)


def _sweep(keep, a, b, rows, columns) -> tuple[tuple[jax.Array, jax.Array], Any]:
    """Return the two sums, and the exponentials [I, J, t, u] or ``None``."""

    def row_tile(column_sums, tile):
        a_i, rows_i = tile

        def column_tile(row_sums, tile):
            b_j, columns_j = tile
            e = jnp.exp(products(a_i, b_j))
            return row_sums + _full(e, columns_j), (_column_sums(rows_i, e), e if keep else None)

        row_sums, (sums, e) = jax.lax.scan(column_tile, jnp.zeros_like(rows_i), (b, columns))
        return column_sums + sums, (row_sums, e)

    column_sums, (row_sums, exponentials) = jax.lax.scan(row_tile, jnp.zeros_like(columns), (a, rows))
    return (row_sums, column_sums), exponentials


def _backward(keep, dtype, residuals, gradients):
    """With g and h the gradients of row and column sums: d a_i = sum_j exp(S_ij) (g_i + h_j) b_j, likewise d b_j.

    Nothing needs a mask: a row or column that does not count is a zero vector, and who made it zero drops its gradient.
    """
    (a, b, exponentials), (of_rows, of_columns) = residuals, gradients

    def row_tile(b_gradients, tile):
        a_i, g_i, e_i = tile

        def column_tile(a_gradient, tile):
            b_j, h_j, e = tile
            e = e if keep else jnp.exp(products(a_i, b_j))
            p = (e * (g_i[:, None] + h_j[None, :])).astype(dtype)
            return a_gradient + matmul(p, b_j), matmul(p.T, a_i)

        nothing = jnp.zeros(a_i.shape, jnp.float32)
        a_gradient, parts = jax.lax.scan(column_tile, nothing, (b, of_columns, e_i))
        return b_gradients + parts, a_gradient

    nothing = jnp.zeros(b.shape, jnp.float32)
    b_gradients, a_gradients = jax.lax.scan(row_tile, nothing, (a, of_rows, exponentials))
    return a_gradients, b_gradients, None, None


_sums.defvjp(_forward, _backward)
