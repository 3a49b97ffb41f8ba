"""Row and column sums over tiles: equal to NumPy's over the whole matrix, gradients too, in memory that grows with n."""

import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from conclugen_jax.method import losses, similarity
from conclugen_jax.train import parallel
from tests.helpers import close

DIM = 16


def unit(rng, n):
    x = rng.normal(size=(n, DIM))
    return (x / np.linalg.norm(x, axis=1, keepdims=True)).astype(np.float32)


@pytest.fixture
def small_tiles(monkeypatch):
    for name in ("KEPT_TILE", "CPU_TILE"):
        monkeypatch.setattr(similarity, name, (8, 12))


def problem(n, m, share=0.7):
    """a, b, rows, columns, and cotangents of the two sums."""
    rng = np.random.default_rng([n, m])
    rows, columns = rng.random(n) < share, rng.random(m) < share
    rows[0] = columns[0] = True
    a, b = unit(rng, n) * rows[:, None], unit(rng, m) * columns[:, None]
    return a, b, rows, columns, rng.normal(size=n).astype(np.float32), rng.normal(size=m).astype(np.float32)


@pytest.mark.parametrize("keep", [True, False])
@pytest.mark.parametrize(("n", "m"), [(1, 1), (8, 12), (9, 13), (31, 50), (40, 7)])
def test_sums_and_gradients_are_those_of_the_whole_matrix(small_tiles, keep, n, m):
    a, b, rows, columns, g, h = problem(n, m)

    def scalar(a, b):
        row_sums, column_sums = similarity.exp_sums(a, b, rows, columns, keep=keep)
        return jnp.sum(jnp.where(rows, g * row_sums, 0)) + jnp.sum(jnp.where(columns, h * column_sums, 0))

    e = np.exp(a.astype(np.float64) @ b.T.astype(np.float64)) * (rows[:, None] & columns[None, :])
    row_sums, column_sums = similarity.exp_sums(a, b, rows, columns, keep=keep)
    np.testing.assert_allclose(np.asarray(row_sums)[rows], e.sum(1)[rows], rtol=1e-6)
    np.testing.assert_allclose(np.asarray(column_sums)[columns], e.sum(0)[columns], rtol=1e-6)
    p = e * (np.where(rows, g, 0)[:, None] + np.where(columns, h, 0)[None, :])
    da, db = jax.jit(jax.grad(scalar, argnums=(0, 1)))(a, b)
    assert close(np.asarray(da)[rows], (p @ b)[rows], 1e-5)
    assert close(np.asarray(db)[columns], (p.T @ a)[columns], 1e-5)


def test_accelerators_sum_columns_in_parts(monkeypatch):
    monkeypatch.setattr(similarity, "ACCELERATOR_TILE", (8, 12))
    monkeypatch.setattr(similarity, "ROWS_PER_SUM", 2)
    monkeypatch.setattr(jax, "default_backend", lambda: "gpu")
    a, b, rows, columns, *_ = problem(30, 50)
    row_sums, column_sums = jax.jit(similarity.exp_sums)(a, b, rows, columns)
    e = np.exp(a.astype(np.float64) @ b.T.astype(np.float64)) * (rows[:, None] & columns[None, :])
    np.testing.assert_allclose(np.asarray(row_sums)[rows], e.sum(1)[rows], rtol=1e-6)
    np.testing.assert_allclose(np.asarray(column_sums)[columns], e.sum(0)[columns], rtol=1e-6)
    assert "optimization_barrier" in str(jax.make_jaxpr(similarity.exp_sums)(a, b, rows, columns))


@pytest.mark.parametrize("keep", [True, False])
def test_bfloat16_rounds_factors_of_products_and_nothing_else(small_tiles, keep):
    a, b, rows, columns, g, h = problem(31, 50)

    def scalar(a, b, dtype):
        row_sums, column_sums = similarity.exp_sums(a, b, rows, columns, keep=keep, dtype=dtype)
        return jnp.sum(jnp.where(rows, g * row_sums, 0)) + jnp.sum(jnp.where(columns, h * column_sums, 0))

    rounded = [np.asarray(jnp.asarray(x, jnp.bfloat16), np.float64) for x in (a, b)]
    e = np.exp(rounded[0] @ rounded[1].T) * (rows[:, None] & columns[None, :])
    sums = similarity.exp_sums(a, b, rows, columns, keep=keep, dtype=jnp.bfloat16)
    # Rounded factors, but products, exponentials and sums in float32: a hundred times closer than a bfloat16 step.
    np.testing.assert_allclose(np.asarray(sums[0])[rows], e.sum(1)[rows], rtol=1e-6)
    np.testing.assert_allclose(np.asarray(sums[1])[columns], e.sum(0)[columns], rtol=1e-6)
    of_rounded, of_full = (jax.grad(scalar, argnums=(0, 1))(a, b, dtype) for dtype in (jnp.bfloat16, jnp.float32))
    for got, expected in zip(of_rounded, of_full, strict=True):
        assert got.dtype == jnp.float32
        assert close(got, expected, 0.02)
        assert not close(got, expected, 1e-5)


def test_the_matrix_is_kept_only_where_it_is_small(monkeypatch):
    monkeypatch.setattr(similarity, "CPU_KEEPS_UP_TO", 64)
    a, b, rows, columns, g, h = problem(8, 8)

    def backward(n):
        x = jax.ShapeDtypeStruct((n, DIM), jnp.float32)
        counts = jnp.ones(n, bool)
        fn = jax.grad(lambda a, b: similarity.exp_sums(a, b, counts, counts)[0].sum())
        return str(jax.make_jaxpr(fn)(x, x)).count("exp")

    # Computed again in the backward pass, or not.
    assert backward(9) == 2 * backward(8)


def test_loss_on_several_devices_is_that_of_one(small_tiles):
    n, devices = 48, jax.devices()[:8]
    rng = np.random.default_rng(5)
    a, b, valid = unit(rng, n), unit(rng, n), rng.random(n) < 0.8
    one, of_one = jax.value_and_grad(losses.masked_margin_softmax, argnums=(0, 1))(a, b, valid=jnp.asarray(valid))

    def local(a, b, valid):
        loss = functools.partial(losses.masked_margin_softmax, valid=valid, axis_name=parallel.AXIS)
        return jax.value_and_grad(loss, argnums=(0, 1))(a, b)

    parts = parallel.split_rows((a, b, valid), 8)
    for keep_up_to in (0, similarity.CPU_KEEPS_UP_TO):
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(similarity, "CPU_KEEPS_UP_TO", keep_up_to)
            loss, grads = jax.pmap(local, axis_name=parallel.AXIS, devices=devices)(*parts)
        np.testing.assert_allclose(loss, one, rtol=1e-6)
        # The scalar is on every device, so its gradient arrives once from each.
        for got, expected in zip(grads, of_one, strict=True):
            assert close(np.asarray(got).reshape(n, DIM) / 8, expected, 1e-5)


def test_memory_grows_with_the_batch_not_with_its_square():
    def temporary(n):
        x = jax.ShapeDtypeStruct((n, 64), jnp.float32)
        compiled = jax.jit(jax.value_and_grad(losses.masked_margin_softmax, argnums=(0, 1))).lower(x, x).compile()
        return compiled.memory_analysis().temp_size_in_bytes

    small, large = temporary(2**15), temporary(2**19)
    assert math.log(large / small, 16) < 1.05
    assert temporary(4096) < 0.1 * 2**30  # the exponentials are kept here
