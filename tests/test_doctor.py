"""The doctor: every check says what it found, fails where something is wrong, and does not stop the others."""

import json
from pathlib import Path

import jax
import numpy as np
import pytest

from conclugen_jax.data import builders
from conclugen_jax.pretrain import checks as doctor
from configs import base
from tests.helpers import Faces, run


def test_a_sound_installation(tmp_path):
    path = builders.build(Faces(), tmp_path / "data")
    result = run("doctor", f"--data={path}", f"--workdir={tmp_path}/w", "--json")
    found = json.loads(result.stdout)
    checks = {f["check"]: f for f in found["checks"]}
    assert list(checks) == [
        "packages", "environment", "devices", "collective", "product", "disk", "compile cache", "data", "training",
    ]  # fmt: skip
    assert found["ok"]
    assert {f["status"] for name, f in checks.items() if name not in ("disk", "packages")} == {"ok"}
    assert checks["packages"]["status"] in ("ok", "warning")  # a warning where it runs from its folder
    assert f"jax {jax.__version__}" in checks["packages"]["found"]
    assert "train 64, validation 24, test 24" in checks["data"]["found"]
    assert checks["training"]["found"].startswith("4 steps, resumed from a checkpoint bit for bit")
    assert not list((tmp_path / "w").iterdir())


def test_what_is_wrong_is_said_with_the_way_out_and_the_other_checks_are_made(tmp_path, monkeypatch):
    path = builders.build(Faces(), tmp_path / "data")
    shard = next(path.glob("*train.array_record*"))
    shard.write_bytes(shard.read_bytes()[:-1])
    monkeypatch.setattr(doctor, "training", lambda config: doctor.Finding("training", "ok", "left out here"))
    monkeypatch.setattr(doctor.metadata, "requires", lambda _: ["jax>=99", "no-such-package>=1", "x; extra == 'test'"])
    monkeypatch.setattr(np.random, "default_rng", None)
    found = {f.check: f for f in doctor.examine(base.get_config(), data=str(path), workdir=tmp_path)}
    assert found["packages"].status == "failed"
    assert f"jax is {jax.__version__}, >=99 is needed; no-such-package is missing" in found["packages"].found
    assert "pip install" in found["packages"].fix
    assert found["product"] == doctor.Finding(
        "product", "failed", "TypeError: 'NoneType' object is not callable", "correct what this says and repeat"
    )
    assert found["data"].status == "failed"
    assert shard.name in found["data"].found
    assert found["collective"].status == found["training"].status == "ok"


def test_a_wrong_sum_and_a_wrong_product_are_noticed(monkeypatch):
    with monkeypatch.context() as patch:
        patch.setattr(doctor.collectives, "total", lambda x, _: x)
        assert doctor.collective().status == "failed"
    with monkeypatch.context() as patch:
        matmul = doctor.jnp.matmul
        patch.setattr(doctor.jnp, "matmul", lambda a, b, **options: matmul(a, b, **options) * 1.01)
        found = doctor.product()
        assert found.status == "failed"
        assert "off by 1.0e-02" in found.found


def test_a_gpu_that_jax_does_not_see(monkeypatch):
    monkeypatch.setattr(Path, "exists", lambda self: str(self) == "/dev/nvidia0")
    monkeypatch.delenv("JAX_PLATFORMS")
    found = doctor.devices()
    assert (found.status, found.fix) == ("warning", "pip install '.[cuda]'")


@pytest.mark.parametrize("cache", ["", "/proc/none"])
def test_programs_that_cannot_be_kept(monkeypatch, cache):
    monkeypatch.setenv("JAX_COMPILATION_CACHE_DIR", cache)
    if cache:
        with pytest.raises(OSError, match="none"):
            doctor.compile_cache()
    else:
        assert doctor.compile_cache().status == "warning"
