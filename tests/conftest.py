"""Strict settings for every test: eight virtual CPU devices, no silent rank promotion, warnings are errors.

Programs are compiled without LLVM's optimisations, which takes less than half of the time, and kept between runs for every
process. XLA_FLAGS=--xla_backend_optimization_level=3 compiles them as users do; JAX_COMPILATION_CACHE_DIR moves the cache.
"""

import contextlib
import os
import platform
import shutil
import time
from pathlib import Path

_flags = "--xla_force_host_platform_device_count=8 --xla_backend_optimization_level=0"
os.environ["XLA_FLAGS"] = f"{_flags} {os.environ.get('XLA_FLAGS', '')}"  # the last one counts
os.environ["JAX_PLATFORMS"] = "cpu"
_caches = Path(os.environ.get("XDG_CACHE_HOME") or Path("~/.cache").expanduser(), "conclugen_jax", "tests")
CACHE = _caches / (platform.node() or "host")  # compiled programs hold the code of one machine
CACHE_DAYS, CACHE_BYTES = 14, 1 << 30
os.environ.setdefault("JAX_COMPILATION_CACHE_DIR", str(CACHE))
os.environ["JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS"] = "0.02"

import jax
import numpy as np
import pytest

jax.config.update("jax_numpy_rank_promotion", "raise")
jax.config.update("jax_default_matmul_precision", "highest")

LONG = (
    "faults",
    "processes",
    "shared_evaluations",
    "search",
    "pretrain",
    "study",
    "bad_steps",
    "extract",
    "online_probe",
    "exchange",
    "clustering_term",
)
"""Files that take longest."""


def pytest_sessionstart(session):
    """Delete old compiled programs, once for all workers."""
    if not hasattr(session.config, "workerinput") and CACHE.is_dir():
        with contextlib.suppress(FileNotFoundError):  # another run of the tests shrinks it as well
            shrink(CACHE)


def shrink(folder: Path) -> None:
    """Delete what was written long ago and, oldest first, what is beyond the size of the cache."""
    files = sorted(((p, p.stat()) for p in folder.iterdir()), key=lambda file: -file[1].st_mtime)
    kept = 0
    for path, stat in files:
        kept += stat.st_size
        if kept > CACHE_BYTES or time.time() - stat.st_mtime > CACHE_DAYS * 86400:
            path.unlink(missing_ok=True)


def pytest_collection_modifyitems(items):
    """Sort long files first, so that no worker is left with one of them at the end."""
    places = {f"test_{name}": i for i, name in enumerate(LONG)}
    items.sort(key=lambda item: places.get(item.path.stem, len(LONG)))


GOLDEN = Path(__file__).parent / "golden"


@pytest.fixture(scope="module", autouse=True)
def few_programs():
    """Drop compiled programs after each file: thousands in one process exhaust its memory maps."""
    yield
    jax.clear_caches()


@pytest.fixture(scope="session", params=["default", "authors_code"])
def golden(request):
    """Return golden numbers of one pretraining step, made in float64 by an independent PyTorch program."""
    with np.load(GOLDEN / f"{request.param}.npz", allow_pickle=False) as file:
        return request.param, {k: file[k] for k in file.files}


@pytest.fixture(scope="session")
def odd_folder(tmp_path_factory):
    """Return a built data set with one of everything that is suspicious."""
    from conclugen_jax.data import builders
    from tests.test_inspection import Odd

    return builders.build(Odd(), tmp_path_factory.mktemp("odd"))


@pytest.fixture
def odd_copy(odd_folder, tmp_path):
    """Return a private copy of that data set, to damage."""
    return shutil.copytree(odd_folder, tmp_path / "copy")
