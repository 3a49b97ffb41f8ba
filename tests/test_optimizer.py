"""Schedule and optimizer: by hand, and against PyTorch's formulas in NumPy."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from conclugen_jax.train import optimizer
from tests.helpers import assert_same_bits


def numpy_rate(epoch, peak, warmup, start, period, multiplier, minimum):
    """PyTorch's LinearLR, then CosineAnnealingWarmRestarts, restarting for ever."""
    if epoch < warmup:
        return peak * (start + (1 - start) * epoch / warmup)
    since, length = epoch - warmup, period
    while since >= length:
        since -= length
        length *= multiplier
    return minimum + (peak - minimum) * (1 + np.cos(np.pi * since / length)) / 2


@pytest.mark.parametrize(("multiplier", "warmup"), [(1, 0), (1, 3), (2, 5), (3, 1)])
def test_schedule_restarts_for_ever(multiplier, warmup):
    schedule = optimizer.learning_rate_schedule(
        0.3, steps_per_epoch=1, warmup_epochs=warmup, period_epochs=7, period_multiplier=multiplier
    )
    epochs = np.arange(2000)
    expected = [numpy_rate(e, 0.3, warmup, 0.1, 7, multiplier, 1e-6) for e in epochs]
    np.testing.assert_allclose(jax.vmap(schedule)(jnp.asarray(epochs)), expected, rtol=1e-4, atol=1e-6)
    late = optimizer.learning_rate_schedule(0.3, steps_per_epoch=1, period_epochs=20, period_multiplier=2)(2**31 - 1)
    assert 0 < late <= 0.3


def test_schedule_by_hand():
    schedule = optimizer.learning_rate_schedule(1.0, steps_per_epoch=10, warmup_epochs=5)
    assert schedule(0) == schedule(9) == pytest.approx(0.1)
    assert schedule(10) == pytest.approx(0.28)
    assert schedule(50) == pytest.approx(1.0)  # end of warm-up
    assert schedule(150) == pytest.approx(0.5, abs=1e-5)  # half way through the first period
    assert schedule(250) == pytest.approx(1.0)  # first restart


def test_step_granularity_is_continuous_and_meets_the_other_at_epochs():
    by_epoch = optimizer.learning_rate_schedule(1.0, steps_per_epoch=4, granularity="epoch")
    by_step = optimizer.learning_rate_schedule(1.0, steps_per_epoch=4, granularity="step")
    steps = jnp.arange(0, 100 * 4)
    rates = np.asarray(jax.vmap(by_step)(steps))
    np.testing.assert_allclose(rates[::4], jax.vmap(by_epoch)(steps[::4]), rtol=1e-6)
    assert rates[1] == pytest.approx(0.1 + 0.9 / 20)
    inside = np.abs(np.diff(rates[: 25 * 4]))
    assert inside.max() < 0.05
    with pytest.raises(ValueError, match="granularity"):
        optimizer.learning_rate_schedule(1.0, steps_per_epoch=4, granularity="batch")


def test_adamw_equals_pytorchs_formula():
    rng = np.random.default_rng(0)
    p, grads = rng.normal(size=5), rng.normal(size=(4, 5))
    rate, decay, b1, b2, eps = 0.01, 0.1, 0.9, 0.999, 1e-8
    make = optimizer.make_optimizer(lambda _: rate, weight_decay=decay, b1=b1, b2=b2, eps=eps)
    params = jnp.asarray(p, jnp.float32)
    state = make.init(params)
    m = v = np.zeros(5)
    for t, g in enumerate(grads, 1):
        updates, state = make.update(jnp.asarray(g, jnp.float32), state, params)
        params = optax.apply_updates(params, updates)
        p = p * (1 - rate * decay)
        m, v = b1 * m + (1 - b1) * g, b2 * v + (1 - b2) * g * g
        p = p - rate * (m / (1 - b1**t)) / (np.sqrt(v / (1 - b2**t)) + eps)
    np.testing.assert_allclose(params, p, rtol=1e-5)


def test_sgd_is_plain():
    make = optimizer.make_optimizer(lambda _: 0.5, name="sgd", weight_decay=0.1)
    params = {"w": jnp.array([2.0])}
    updates, _ = make.update({"w": jnp.array([1.0])}, make.init(params), params)
    np.testing.assert_allclose(updates["w"], [-0.5 * (1.0 + 0.1 * 2.0)])
    with pytest.raises(KeyError, match="adam"):
        optimizer.make_optimizer(lambda _: 0.5, name="adam")


def test_frozen_parameters_keep_every_bit_and_have_no_moments():
    params = {"encoder": {"kernel": jnp.full(3, 0.1)}, "classifier": {"linear": {"kernel": jnp.full(2, 0.3)}}}
    make = optimizer.make_optimizer(lambda _: 0.1, weight_decay=0.5, trainable=("classifier/.*",))
    state = make.init(params)
    grads = jax.tree.map(jnp.ones_like, params)
    updates, state = jax.jit(make.update)(grads, state, params)
    after = optax.apply_updates(params, updates)
    assert_same_bits(after["encoder"], params["encoder"])
    assert np.all(np.asarray(after["classifier"]["linear"]["kernel"]) < 0.3)
    assert sum(x.size for x in jax.tree.leaves(state) if x.ndim) == 2 * 2
