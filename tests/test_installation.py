"""The wheel, installed into an environment of its own, from an empty folder: nothing comes from the checkout."""

import os
import subprocess
import sys
import sysconfig

import pytest

from tests.helpers import ROOT


@pytest.mark.slow
def test_the_wheel_works_without_the_checkout(tmp_path):
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    environment["XLA_FLAGS"] = "--xla_backend_optimization_level=0"  # on one device

    def run(*command, code=0, cwd=tmp_path):
        result = subprocess.run(command, cwd=cwd, env=environment, capture_output=True, text=True, check=False)
        assert result.returncode == code, (command, result.stdout, result.stderr)
        return result

    run(sys.executable, "-m", "hatchling", "build", "-t", "wheel", "-d", tmp_path / "dist", cwd=ROOT)
    (wheel,) = (tmp_path / "dist").glob("*.whl")
    run(sys.executable, "-m", "venv", "--without-pip", tmp_path / "venv")
    python = tmp_path / "venv/bin/python"
    run(sys.executable, "-m", "pip", "--python", python, "install", "--no-deps", "--no-index", wheel)
    (packages,) = (tmp_path / "venv/lib").glob("python*/site-packages")
    assert not {"configs", "launch", "tests"} & set(os.listdir(packages))
    # What the package depends on comes from the environment of the tests.
    (packages / "dependencies.pth").write_text(sysconfig.get_paths()["purelib"])

    (tmp_path / "empty").mkdir()
    here, conclugen = tmp_path / "empty", tmp_path / "venv/bin/conclugen"
    place = run(python, "-c", "import conclugen_jax; print(conclugen_jax.__file__)", cwd=here).stdout
    assert place.startswith(str(packages))
    assert "\n  pretrain " in run(conclugen, "--help", cwd=here).stdout
    assert "\nsmall " in run(conclugen, "configs", cwd=here).stdout
    run(conclugen, "configs", "small", "--output=mine.py", cwd=here)
    refused = run(conclugen, "pretrain", "--config=mine.py", "--data=nowhere", cwd=here, code=2)
    assert refused.stderr.startswith("error: nowhere/manifest.json: no such file")
    assert "conclugen, pretrained" in run(conclugen, "demo", "--tiny", cwd=here).stdout
    assert sorted(os.listdir(here)) == ["conclugen_demo", "mine.py"]
