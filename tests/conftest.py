"""Strict settings for every test: eight virtual CPU devices, no silent rank promotion, warnings are errors.

Programs are compiled without LLVM's optimisations, which takes less than half of the time; the commands that tests start, and
with them the faults, are compiled as users' are. XLA_FLAGS=--xla_backend_optimization_level=3 tests all of them so.
"""

import os
import tempfile

_flags = "--xla_force_host_platform_device_count=8 --xla_backend_optimization_level=0"
os.environ["XLA_FLAGS"] = f"{_flags} {os.environ.get('XLA_FLAGS', '')}"  # the last one counts
os.environ["JAX_PLATFORMS"] = "cpu"
# Tests, and the commands they run, compile the same programs again and again: once is enough.
_cache = tempfile.TemporaryDirectory(prefix="conclugen_jax-tests-", ignore_cleanup_errors=True)
os.environ["JAX_COMPILATION_CACHE_DIR"] = _cache.name
os.environ["JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS"] = "0.1"

from pathlib import Path

import jax
import numpy as np
import pytest

jax.config.update("jax_numpy_rank_promotion", "raise")
jax.config.update("jax_default_matmul_precision", "highest")

LONG = (
    "pretrain",
    "faults",
    "study",
    "commands",
    "bad_steps",
    "processes",
    "online_probe",
    "search",
    "extract",
    "exchange",
)
"""Files that take longest."""


def pytest_collection_modifyitems(items):
    """Long files first: of several processes none is left with one of them at the end."""
    places = {f"test_{name}": i for i, name in enumerate(LONG)}
    items.sort(key=lambda item: places.get(item.path.stem, len(LONG)))


GOLDEN = Path(__file__).parent / "golden"


@pytest.fixture(scope="module", autouse=True)
def few_programs():
    """Compiled programs are let go after each file: thousands in one process exhaust its memory maps."""
    yield
    jax.clear_caches()


@pytest.fixture(scope="session", params=["default", "authors_code"])
def golden(request):
    """Golden numbers of one pretraining step, made in float64 by an independent PyTorch program."""
    with np.load(GOLDEN / f"{request.param}.npz", allow_pickle=False) as file:
        return request.param, {k: file[k] for k in file.files}
