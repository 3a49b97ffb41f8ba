"""L_MMS beside its plain form, for the benchmarks: answers requests as benchmarks/sides.py describes."""

import functools
import time
from typing import Any

import jax
import jax.numpy as jnp

from benchmarks import sides
from conclugen_jax.method import losses

DIM = 512


def plain(a: jax.Array, b: jax.Array, *, margin: float = 1e-3) -> jax.Array:
    """The loss as it is usually written: the whole matrix, two log-softmaxes of it."""
    similarity = jnp.matmul(a, b.T, precision="highest") - margin * jnp.eye(a.shape[0])
    both = jax.nn.logsumexp(similarity, axis=1) + jax.nn.logsumexp(similarity, axis=0)
    return jnp.mean(both - 2 * jnp.diagonal(similarity))


@functools.cache
def _programs(n: int) -> tuple[Any, dict[str, Any]]:
    rows = tuple(losses.unit_rows(jax.random.normal(jax.random.key(i), (n, DIM))) for i in range(2))
    programs = {"plain": plain, "ours": losses.masked_margin_softmax}
    return rows, {k: jax.jit(jax.value_and_grad(f, argnums=(0, 1))).lower(*rows).compile() for k, f in programs.items()}


def seconds(n: int) -> dict[str, float]:
    """Loss and gradients once each way."""
    rows, programs = _programs(n)
    found = {}
    for name, program in programs.items():
        start = time.perf_counter()
        jax.block_until_ready(program(*rows))
        found[name] = time.perf_counter() - start
    return found


def memory(n: int) -> dict[str, float]:
    """Temporary memory of ours by the compiler's account."""
    rows = (jax.ShapeDtypeStruct((n, DIM), jnp.float32),) * 2
    loss = jax.jit(jax.value_and_grad(losses.masked_margin_softmax, argnums=(0, 1)))
    return {"gib": loss.lower(*rows).compile().memory_analysis().temp_size_in_bytes / 2**30}


if __name__ == "__main__":
    sides.serve({"time": seconds, "memory": memory})
