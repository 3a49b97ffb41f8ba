"""The public commands, as a user types them: the whole way at tiny size, and mistakes that end in one sentence."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time

import pytest

from conclugen_jax.commands import names
from conclugen_jax.data import builders
from tests.helpers import QUICK_COMPILATION, ROOT, Faces, log_without_times, run, start

TINY = """
from tests import helpers

def get_config():
    return helpers.tiny_config()
"""


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """A folder with the digits, a tiny configuration for them, and one for the random faces."""
    folder = tmp_path_factory.mktemp("commands")
    run("build", "--dataset=digits", f"--data_dir={folder}/data")
    digits = TINY.replace(
        "tiny_config()",
        f"tiny_config({str(folder / 'data/digits/1.0.0')!r}, data__modalities=('pixels', 'fourier', 'profiles'), "
        "data__standardize='split', train__batch_size=200, train__num_epochs=3, train__steps_per_dispatch=3, "
        "clustering__start_epoch=1, checkpoint__keep_newest=100, model__bottleneck=())",
    )
    (folder / "digits.py").write_text(digits)
    faces = builders.build(Faces(), folder / "data")
    (folder / "faces.py").write_text(TINY.replace("tiny_config()", f"tiny_config({str(faces)!r})"))
    return folder


@pytest.mark.slow
def test_build_pretrain_interrupt_resume_evaluate(place):
    config = f"--config={place}/digits.py"
    whole, broken = place / "whole", place / "broken"
    done = start("launch.pretrain", config, f"--workdir={whole}")
    assert "done: 21 steps" in done.stderr
    # Interrupt a second run as soon as it has logged something; wherever that is, it must go on from there.
    process = subprocess.Popen(
        [sys.executable, "-m", "launch.pretrain", config, f"--workdir={broken}"],
        cwd=ROOT,
        env={**os.environ, "JAX_PLATFORMS": "cpu", "XLA_FLAGS": QUICK_COMPILATION, "PYTHONPATH": str(ROOT)},
        stderr=subprocess.PIPE,
        text=True,
    )
    log = broken / "metrics.jsonl"
    deadline = time.monotonic() + 120
    while not (log.exists() and log.stat().st_size) and process.poll() is None and time.monotonic() < deadline:
        time.sleep(0.02)
    # Meanwhile nobody else gets the workdir.
    if process.poll() is None:
        process.send_signal(signal.SIGSTOP)  # else it may be done before the other has started
        refused = start("launch.pretrain", config, f"--workdir={broken}", code=2)
        assert f"in use by process {process.pid}" in refused.stderr
        process.send_signal(signal.SIGTERM)
        process.send_signal(signal.SIGCONT)
    stderr = process.communicate(timeout=120)[1]
    assert process.returncode in (0, 128 + signal.SIGTERM), stderr
    start("launch.pretrain", config, f"--workdir={broken}")
    assert log_without_times(broken) == log_without_times(whole)

    linear = [
        f"--config.downstream.checkpoint={broken}",
        "--config.train.num_epochs=5",
        "--config.optimizer.learning_rate=0.01",
    ]
    result = start("launch.downstream", config, *linear, f"--workdir={place}/linear")
    assert "linear_evaluation on digits" in result.stdout
    scores = json.loads((place / "linear" / "result.json").read_text())
    assert f"{100 * scores['test']['accuracy']:.2f}" in result.stdout
    assert scores["test"]["accuracy"] > 0.5
    probed = start("launch.probe", f"--workdir={broken}", f"--output={place}/table", "--labels=2,all", "--draws=2")
    table = json.loads((place / "table.json").read_text())
    assert [r["num_labels"] for r in table["results"]] == [2, 0] * 5
    assert "broken, pretrained" in probed.stdout
    assert (place / "table.md").read_text().startswith("| vectors | 2 labels | all labels |")


@pytest.mark.slow
def test_kill_9_loses_nothing_but_time(place):
    config, workdir = f"--config={place}/digits.py", place / "killed"
    process = subprocess.Popen(
        [sys.executable, "-m", "launch.pretrain", config, f"--workdir={workdir}"],
        cwd=ROOT,
        env={**os.environ, "JAX_PLATFORMS": "cpu", "XLA_FLAGS": QUICK_COMPILATION, "PYTHONPATH": str(ROOT)},
        stderr=subprocess.DEVNULL,
    )
    deadline = time.monotonic() + 120
    while not list((workdir / "checkpoints").glob("[0-9]*")) and process.poll() is None and time.monotonic() < deadline:
        time.sleep(0.01)
    process.kill()
    process.wait()
    start("launch.pretrain", config, f"--workdir={workdir}")
    assert log_without_times(workdir) == log_without_times(place / "whole")


@pytest.mark.parametrize("name", names.COMMANDS)
def test_help_explains_and_exits_cleanly(name):
    result = run(name, "--help")
    assert f"\nconclugen {name}" in result.stdout
    if name in ("pretrain", "downstream"):
        assert "config.train.batch_size = 4096  # examples per step" in result.stdout
        assert "--config.SECTION.KEY=VALUE" in result.stdout
        own = run(name, "--config=small", "--help").stdout
        assert "config.model.representation_dim = 256  # R, units" in own


def test_help_and_mistakes_in_flags_load_no_jax():
    for name in ("pretrain", "downstream", "search", "probe", "embed", "report"):
        code = f"import sys; from conclugen_jax.commands import app; app.call({name!r}, ['--help'])\n"
        code += f"app.call({name!r}, ['--nothing']); sys.exit('jax' in sys.modules)"
        assert subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, check=False).returncode == 0


MISTAKES = {
    "unknown key": (
        ["--config.train.batchsize=16"],
        "config.train.batchsize is not a configuration key; did you mean config.train.batch_size?",
    ),
    "unknown section": (["--config.training.batch_size=16"], "did you mean config.train.batch_size?"),
    "wrong type": (["--config.train.batch_size=many"], "config.train.batch_size=many"),
    "negative weight": (
        ["--config.loss.contrastive_weight=-1"],
        "config.loss.contrastive_weight is -1.0; it must be at least 0",
    ),
    "unknown modality": (["--config.data.modalities=('video','smell')"], "no modality 'smell'"),
    "unknown choice": (["--config.precision=float8"], "'float32', 'tensorfloat32', 'bfloat16'"),
    "batch over devices": (
        ["--config.train.batch_size=18"],
        "8 devices cannot share equally; set it to 16 or 24",
    ),
    "no data": (["--config.data.path=/nowhere"], "/nowhere"),
    "unknown flag": (["--steps=3"], "Unknown command line flag 'steps'; see --help"),
    "misspelt flag": (["--batchsize=3"], "Unknown command line flag 'batchsize'; did you mean --batch_size?"),
    "stray word": (["train"], "'train' is not a flag"),
}


@pytest.mark.parametrize("name", MISTAKES)
def test_mistakes_end_in_one_sentence_before_anything_is_written(place, tmp_path, name):
    extra, message = MISTAKES[name]
    began = time.monotonic()
    result = run("pretrain", f"--config={place}/faces.py", f"--workdir={tmp_path}/run", *extra, code=2)
    assert message in result.stderr
    assert len(result.stderr.strip().splitlines()) == 1
    assert not (tmp_path / "run").exists()
    assert time.monotonic() - began < 30


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["pretrain", "--workdir=x"], "--config is missing"),
        (["pretrain", "--config=configs/nothing.py", "--workdir=x"], "configs/nothing.py"),
        (["report"], "name one folder: conclugen report FOLDER"),
        (
            ["build", "--dataset=mnist", "--data_dir=x"],
            "--dataset=mnist: value should be one of <digits|voxceleb2",
        ),
        (["build", "--dataset=digits"], "--data_dir is missing"),
        (["probe", "--workdir=/nowhere", "--output=x"], "/nowhere/config.json"),
        (["probe", "--workdir=x", "--output=x", "--labels=2,few"], "'few' is neither"),
        (["probe", "--workdir=x", "--output=x", "--draws=one"], "draws"),
    ],
)
def test_missing_or_impossible_arguments(arguments, message):
    assert message in run(*arguments, code=2).stderr


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("def get_config(:", "SyntaxError"),
        ("x = 1", "it must define get_config()"),
        ("raise RuntimeError('no')", "RuntimeError: no"),
        ("import sys; sys.exit(3)", "SystemExit"),
        ("def get_config():\n    return 3", "cannot be loaded"),
        ("from conclugen_jax.errors import ConclugenError\nraise ConclugenError('name it')", "bad.py: name it"),
        (
            "from configs import base\ndef get_config():\n    c = base.get_config().unlock()\n    del c.seed\n    return c",
            "lacks config.seed",
        ),
        (
            "from configs import base\ndef get_config():\n    c = base.get_config()\n    c.clustering.n_clusters = 3",
            "bad.py: n_clusters is not a configuration key; did you mean num_clusters? (",
        ),
        (
            "from configs import base\ndef get_config():\n    c = base.get_config()\n    c.clustering.zzz",
            "bad.py, line 4)",
        ),
        (
            "from configs import base\ndef get_config():\n    (c := base.get_config()).model.bottleneck = None\n    return c",
            "bad.py: config.model.bottleneck is None, expected tuple of str (such as ('audio',))",
        ),
    ],
)
def test_bad_configuration_files(tmp_path, text, message):
    (tmp_path / "bad.py").write_text(text)
    result = run("pretrain", f"--config={tmp_path}/bad.py", f"--workdir={tmp_path}/run", code=2)
    assert message in result.stderr
    assert not (tmp_path / "run").exists()


def test_damaged_shard_is_named(place, tmp_path):
    data = shutil.copytree(place / "data/faces/1.0.0", tmp_path / "data")
    shard = next(data.glob("*train*array_record*"))
    os.truncate(shard, shard.stat().st_size - 1)
    result = run(
        "pretrain",
        f"--config={place}/faces.py",
        f"--config.data.path={data}",
        f"--workdir={tmp_path}/run",
        code=2,
    )
    assert shard.name in result.stderr
    assert not (tmp_path / "run").exists()


def test_workdir_that_cannot_be_written(place, tmp_path):
    (tmp_path / "file").write_text("")
    result = run("pretrain", f"--config={place}/faces.py", f"--workdir={tmp_path}/file/run", code=2)
    assert "cannot be written" in result.stderr
    assert "--workdir" in result.stderr


@pytest.mark.slow
def test_full_disk_ends_build_and_run_in_one_sentence(place, tmp_path):
    # No file may grow beyond 30 KiB: as on a full disk, writes fail in the middle.
    full = ["bash", "-c", 'trap "" XFSZ; ulimit -f 30; exec "$@"', "full"]
    build = ["launch.build_dataset", "--dataset=digits", f"--data_dir={tmp_path}/data"]
    assert "cannot write the data set" in start(*build, code=2, prefix=full).stderr
    assert not list((tmp_path / "data").iterdir())
    train = ["launch.pretrain", f"--config={place}/faces.py", f"--workdir={tmp_path}/run"]
    result = start(*train, code=2, prefix=full)
    assert f"{tmp_path}/run" in result.stderr
    start(*train)  # space again: it goes on


def test_compiled_programs_are_kept_for_this_machine(tmp_path):
    code = "import os; from conclugen_jax.system import environment; environment.prepare(with_jax=True)\n"
    code += "print(os.environ['JAX_COMPILATION_CACHE_DIR'])"
    environment = {k: v for k, v in os.environ.items() if k != "JAX_COMPILATION_CACHE_DIR"}

    def said(**more):
        command = [sys.executable, "-c", code]
        return subprocess.run(command, env={**environment, **more}, capture_output=True, text=True, check=True).stdout

    assert said(XDG_CACHE_HOME=str(tmp_path)).startswith(str(tmp_path / "conclugen_jax") + os.sep)
    assert said(JAX_COMPILATION_CACHE_DIR=f"{tmp_path}/elsewhere").strip() == f"{tmp_path}/elsewhere"
