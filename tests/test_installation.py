"""The wheel, installed into an environment of its own, from an empty folder: nothing comes from the checkout."""

import json
import os
import subprocess
import sys
import sysconfig

import pytest

from tests.helpers import QUICK_COMPILATION, ROOT


@pytest.mark.slow
def test_the_wheel_works_without_the_checkout(tmp_path):
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    environment["XLA_FLAGS"] = QUICK_COMPILATION  # on one device

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
    assert refused.stderr.startswith(
        "error: nowhere/manifest.json: cannot be read (No such file or directory); name the folder"
    )
    shown = run(conclugen, "demo", "--tiny", cwd=here)
    assert "conclugen, pretrained" in shown.stdout
    assert "conclugen probe --workdir=conclugen_demo_tiny/conclugen" in shown.stderr
    table = json.loads((here / "conclugen_demo_tiny/label_efficiency.json").read_text())
    assert len(table["results"]) == 10

    # Results of a run go beside it unless another place is named; names of modalities are written out.
    pretrained = "conclugen_demo_tiny/conclugen"
    assert "400 rows" in run(conclugen, "embed", f"--workdir={pretrained}", cwd=here).stdout
    assert (here / pretrained / "embeddings_test.npz").is_file()
    linear = [
        "--config=linear_evaluation",
        "--data=conclugen_demo_tiny/data/digits/1.0.0",
        f"--checkpoint={pretrained}",
    ]
    few = ["--batch-size=200", "--config.train.num_epochs=1"]
    said = run(conclugen, "downstream", *linear, *few, cwd=here).stdout
    assert f"saved as {pretrained}/linear_evaluation/result.json" in said
    run(conclugen, "probe", f"--workdir={pretrained}", "--labels=all", "--draws=2", cwd=here)
    assert (here / pretrained / "label_efficiency.md").is_file()
    for folder in (pretrained, f"{pretrained}/linear_evaluation"):
        kept = json.loads((here / folder / "config.json").read_text())
        assert kept["data"]["modalities"] == ["pixels", "fourier", "profiles"]
    assert sorted(os.listdir(here)) == ["conclugen_demo_tiny", "mine.py"]
