"""Strict settings for every test: eight virtual CPU devices, no silent rank promotion, warnings are errors."""

import os
import tempfile

os.environ["XLA_FLAGS"] = os.environ.get("XLA_FLAGS", "") + " --xla_force_host_platform_device_count=8"
os.environ["JAX_PLATFORMS"] = "cpu"

from pathlib import Path

import jax
import numpy as np
import pytest

jax.config.update("jax_numpy_rank_promotion", "raise")
jax.config.update("jax_default_matmul_precision", "highest")

# Tests compile the same programs again and again: once is enough. The cache lives as long as the session.
_cache = tempfile.TemporaryDirectory(prefix="conclugen_jax-tests-", ignore_cleanup_errors=True)
jax.config.update("jax_compilation_cache_dir", _cache.name)
jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.1)

GOLDEN = Path(__file__).parent / "golden"


@pytest.fixture(scope="session", params=["default", "authors_code"])
def golden(request):
    """Golden numbers of one pretraining step, made in float64 by an independent PyTorch program."""
    with np.load(GOLDEN / f"{request.param}.npz", allow_pickle=False) as file:
        return request.param, {k: file[k] for k in file.files}
