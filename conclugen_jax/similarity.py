"""Sums of exponentials over rows and columns of a similarity matrix, which is never held as a whole."""

import jax
import jax.numpy as jnp

TILE_ROWS, TILE_COLUMNS = 1024, 1024
WHOLE_UP_TO = 2048 * 2048
"""Similarities up to this number are computed at once: there the matrix costs less than the loop over tiles does."""


def exp_sums(
    a: jax.Array, b: jax.Array, rows: jax.Array, columns: jax.Array, *, tiled: bool | None = None
) -> tuple[jax.Array, jax.Array]:
    """Row and column sums of exp(a b^T) over the entries whose row and column count.

    Unit rows: |S| <= 1, so that exp cannot overflow and both sums come from one pass over tiles; no running maximum is
    needed. The backward pass computes each tile again. Memory grows with n + m, not with n m.

    Args:
      a: float32 [n, dim], rows of length at most 1; zero where ``rows`` is false.
      b: float32 [m, dim], likewise; zero where ``columns`` is false.
      rows: boolean [n], rows that count.
      columns: boolean [m], columns that count.
      tiled: go through tiles; ``None``: where the matrix is large.

    Returns:
      (sums over columns [n], sums over rows [m]); that of a row or column that does not count has no meaning.

    References:
      Ilharco et al., 2019, for the two directions; Rabe and Staats, "Self-attention does not need O(n^2) memory", 2021,
      for sums that are computed again in the backward pass.
    """
    if tiled is None:
        tiled = a.shape[0] * b.shape[0] > WHOLE_UP_TO
    if not tiled:
        weights = jnp.where(rows[:, None] & columns[None, :], jnp.exp(products(a, b)), 0)
        return weights.sum(axis=1), weights.sum(axis=0)
    n, m = a.shape[0], b.shape[0]
    (a, rows), (b, columns) = _tiles((a, rows), TILE_ROWS), _tiles((b, columns), TILE_COLUMNS)
    row_sums, column_sums = _tiled_sums(a, b, rows.astype(jnp.float32), columns.astype(jnp.float32))
    return row_sums.reshape(-1)[:n], column_sums.reshape(-1)[:m]


def products(a: jax.Array, b: jax.Array) -> jax.Array:
    """a b^T, summed in float32.

    The margin of the losses is smaller than a bfloat16 step near 1. Where no precision was chosen (by
    ``jax.default_matmul_precision``), full float32.
    """
    return matmul(a, b.T)


def matmul(a: jax.Array, b: jax.Array) -> jax.Array:
    """a b in the precision of the run; see :func:`products`."""
    precision = "highest" if jax.config.jax_default_matmul_precision is None else None
    return jnp.matmul(a, b, precision=precision)


def _tiles(arrays: tuple[jax.Array, ...], most: int) -> tuple[jax.Array, ...]:
    """[n, ...] -> [tiles, rows, ...], filled up with zeros: as few tiles of at most ``most`` rows, as equal as can be."""
    n = arrays[0].shape[0]
    count = -(-n // most)
    size = -(-n // count)
    return tuple(
        jnp.pad(x, [(0, count * size - n)] + [(0, 0)] * (x.ndim - 1)).reshape(count, size, *x.shape[1:]) for x in arrays
    )


@jax.custom_vjp
def _tiled_sums(a, b, rows, columns):
    """[I, t, dim], [J, u, dim], weights 0 or 1 [I, t], [J, u] -> sums [I, t], [J, u]."""

    def row_tile(column_sums, tile):
        a_i, rows_i = tile

        def column_tile(row_sums, tile):
            b_j, columns_j = tile
            e = jnp.exp(products(a_i, b_j))
            return row_sums + e @ columns_j, rows_i @ e

        row_sums, sums = jax.lax.scan(column_tile, jnp.zeros_like(rows_i), (b, columns))
        return column_sums + sums, row_sums

    column_sums, row_sums = jax.lax.scan(row_tile, jnp.zeros_like(columns), (a, rows))
    return row_sums, column_sums


def _forward(a, b, rows, columns):
    return _tiled_sums(a, b, rows, columns), (a, b)


def _backward(arrays, gradients):
    """d a_i = sum_j exp(S_ij) (g_i + h_j) b_j; rows that do not count are zero and their own gradient is dropped later."""
    a, b = arrays
    row_gradients, column_gradients = gradients

    def row_tile(b_gradients, tile):
        a_i, g_i = tile

        def column_tile(a_gradient, tile):
            b_j, h_j = tile
            p = jnp.exp(products(a_i, b_j)) * (g_i[:, None] + h_j[None, :])
            return a_gradient + matmul(p, b_j), matmul(p.T, a_i)

        a_gradient, of_columns = jax.lax.scan(column_tile, jnp.zeros_like(a_i), (b, column_gradients))
        return b_gradients + of_columns, a_gradient

    b_gradients, a_gradients = jax.lax.scan(row_tile, jnp.zeros_like(b), (a, row_gradients))
    return a_gradients, b_gradients, None, None


_tiled_sums.defvjp(_forward, _backward)
