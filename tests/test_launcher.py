"""The command ``conclugen``: its overview, names, completion, configurations by name, and short flags."""

import resource
import subprocess
import sys

import pytest

from conclugen_jax import __version__
from conclugen_jax.commands import app, names
from conclugen_jax.errors import ConclugenError
from conclugen_jax.runs import config as config_lib, configuration_files
from tests.helpers import ROOT, run, start

CONCLUGEN = [sys.executable, "-m", "conclugen_jax"]


def typed(*arguments):
    return subprocess.run([*CONCLUGEN, *arguments], cwd=ROOT, capture_output=True, text=True, check=False)


def test_the_overview_names_every_command_and_loads_nothing_slow():
    code = "import sys; from conclugen_jax.commands import main; print(main.names.overview(), *sys.modules, sep='\\n')"
    lines = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True).stdout.splitlines()
    for name in names.COMMANDS:
        assert any(line.startswith(f"  {name} ") for line in lines), name
    assert not {"jax", "numpy", "absl", "ml_collections"} & set(lines)
    code = (
        "import sys; from conclugen_jax.commands import build, embed, extract, predict, pretrain; print(*sys.modules)"
    )
    modules = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True).stdout.split()
    assert "conclugen_jax.commands.predict" in modules
    assert not {"jax", "tensorflow_datasets", "av"} & set(modules)
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    assert typed("--help").returncode == 0
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    assert after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime < 0.5  # seconds of a processor


def test_each_command_has_a_module_and_former_names_still_work():
    for name in names.COMMANDS:
        assert {"command", "main"} <= set(vars(app.load(name))), name
        assert names.COMMANDS[name].endswith(tuple("abcdefghijklmnopqrstuvwxyz")), name
    for path in (ROOT / "launch").glob("[a-z]*.py"):
        assert names.find(path.stem) in names.COMMANDS
    assert names.find("convert-mmsa") == "convert_mmsa"
    assert names.find("build_dataset") == names.find("build-dataset") == "build"


def test_what_is_no_command():
    assert typed("--version").stdout == f"conclugen {__version__}\n"
    wrong = typed("pretrian")
    assert (wrong.returncode, wrong.stdout) == (2, "")
    assert (
        wrong.stderr
        == "error: 'pretrian' is not a command; did you mean 'pretrain'? (all commands: conclugen --help)\n"
    )
    assert typed("build-dataest").stderr.startswith("error: 'build-dataest' is not a command; did you mean 'build'?")
    assert typed().returncode == 2


@pytest.mark.slow
@pytest.mark.parametrize("name", sorted(path.stem for path in (ROOT / "launch").glob("[a-z]*.py")))
def test_every_launcher_starts(name):
    assert f"\nconclugen {names.find(name)}" in start(f"launch.{name}", "--help").stdout


# Configurations.


def test_configurations_are_listed_printed_and_written(tmp_path):
    listed = run("configs").stdout.splitlines()
    known = sorted(path.stem for path in (ROOT / "configs").glob("[a-z]*.py"))
    assert [line.split()[0] for line in listed] == known
    assert all(len(line.split()) > 3 for line in listed)
    assert run("configs", "small").stdout == (ROOT / "configs/small.py").read_text()
    path = tmp_path / "mine.py"
    assert f"--config={path}" in run("configs", "linear-evaluation", f"--output={path}").stdout
    mine = configuration_files.load(str(path), of_run=True)
    assert mine == configuration_files.load("linear_evaluation", of_run=True)
    assert mine.downstream.protocol == "linear_evaluation"
    assert "exists already" in run("configs", "small", f"--output={path}", code=2).stderr
    assert "'smal' is not a name of a configuration; there are base, " in run("configs", "smal", code=2).stderr
    assert "without a name" in run("configs", f"--output={path}", code=2).stderr
    with pytest.raises(
        ConclugenError,
        match="smal: no such file, nor a name of a configuration; did you mean small",
    ):
        configuration_files.find("smal")


def test_a_file_goes_before_a_name(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "demo").write_text("from configs import demo\n\ndef get_config():\n    return demo.get_config()\n")
    assert configuration_files.find("demo")[0].resolve() == tmp_path / "demo"
    assert configuration_files.find("small") == (ROOT / "configs/small.py", ())
    assert configuration_files.find("study_recipe:ravdess") == (ROOT / "configs/study_recipe.py", ("ravdess",))


@pytest.mark.parametrize(
    ("key", "text", "value"),
    [
        ("data.modalities", "video", ("video",)),
        ("data.modalities", "video,text", ("video", "text")),
        ("data.modalities", "(video, text)", ("video", "text")),
        ("data.modalities", "('video','text')", ("video", "text")),
        ("data.modalities", "", ()),
        ("data.modalities", "()", ()),
        ("sweep.learning_rates", "1e-3,1e-2", (1e-3, 1e-2)),
        ("sweep.seeds", "5", (5,)),
        ("online_probe.learning_rates", "(0.5,)", (0.5,)),
        ("data.path", "5", "5"),
        ("train.tensorboard", "true", True),
        ("optimizer.learning_rate", "1", 1.0),
        ("train.batch_size", "512", 512),
    ],
)
def test_values_of_the_command_line(key, text, value):
    config = configuration_files.base()
    configuration_files.override(config, key, text)
    found = dict(config_lib.flatten(config))[key]
    assert (found, type(found)) == (value, type(value))


@pytest.mark.parametrize(
    ("key", "text", "message"),
    [
        ("train.batch_size", "1.5", "config.train.batch_size=1.5: expected a value like 4096 (int)"),
        ("train.tensorboard", "perhaps", "config.train.tensorboard=perhaps: expected a value like False (bool)"),
        ("online_probe.learning_rates", "few", "is ('few',), expected tuple of float (such as (0.001, 0.01))"),
        ("data.modalities", "{'a':1}", "config.data.modalities is ({'a': 1},), expected tuple of str (such as ())"),
        ("data.modalities", "[[1],[2]]", "config.data.modalities is ([1], [2]), expected tuple of str (such as ())"),
        ("sweep.seeds", "1.5", "config.sweep.seeds is (1.5,), expected tuple of int (such as ())"),
        ("train", "1", "config.train is not a configuration key"),
        ("data.pth", "x", "config.data.pth is not a configuration key; did you mean config.data.path?"),
    ],
)
def test_values_that_cannot_be(key, text, message):
    with pytest.raises(ConclugenError) as e:
        configuration_files.override(configuration_files.base(), key, text)
    assert message in str(e.value)


# Command lines.


def parsed(name, *argv):
    command = app.load(name).command
    command.parse(argv)
    return command


def test_short_flags_and_separate_values():
    command = parsed("pretrain", "--config", "demo", "--data=d", "--batch-size", "70", "--config.train.tensorboard")
    assert (command.config.data.path, command.config.train.batch_size, command.config_name) == ("d", 70, "demo")
    assert command.config.train.tensorboard is True
    assert command.config_arguments == [
        *("--config=demo", "--config.data.path=d", "--config.train.batch_size=70", "--config.train.tensorboard=true")
    ]
    command = parsed("downstream", "--config=linear_evaluation", "--checkpoint=runs/a", "--nosweep")
    assert command.config.downstream.checkpoint == "runs/a"
    assert parsed("pretrain", "--config=demo").config.data.path == ""  # nothing is left of the line before


def test_default_folders(monkeypatch, tmp_path, capsys):
    seen = []
    monkeypatch.setattr("conclugen_jax.pretrain.pretrain", lambda config, workdir, **_: seen.append(workdir))
    for name in ("downstream", "sweep"):
        monkeypatch.setattr(f"conclugen_jax.evaluate.{name}.{name}", lambda config, workdir: seen.append(workdir))
    monkeypatch.setattr("conclugen_jax.commands.downstream._show", lambda _: None)
    assert app.call("pretrain", ["--config=demo", "--data=d"]) == 0
    linear = ["--config=linear_evaluation", "--data=d", "--checkpoint=runs/a"]
    assert app.call("downstream", linear) == app.call("downstream", [*linear, "--sweep"]) == 0
    assert app.call("downstream", ["--config=supervised", "--data=d"]) == 0
    assert seen == ["runs/demo", "runs/a/linear_evaluation", "runs/a/linear_evaluation_sweep", "runs/supervised"]
    assert capsys.readouterr().out.startswith("saved in runs/demo\n")


def test_what_downstream_shows(capsys):
    from conclugen_jax.commands import downstream

    scores = dict.fromkeys(("accuracy", "f1", "precision", "recall"), 0.25)
    facts = {"protocol": "raw_features", "target": "", "data": {"name": "faces"}, "kind": "single"}
    member = {"labels_per_class": 0, "label_draw": 1, "seed": 2, "learning_rate": 0.01, "weight_decay": 0.5}
    downstream._show(facts | {"members": [0] * 6, "selected": [member | {"test": scores}]})
    shown = " ".join(capsys.readouterr().out.replace("│", " ").split())
    assert "validation of 6 classifiers" in shown
    assert "all 1 2 0.01 0.5 25.00 25.00 25.00 25.00" in shown
    downstream._show(facts | {"num_folds": 3, "validation": scores, "test": scores})
    assert "mean of 3 folds" in capsys.readouterr().out


def test_a_package_that_is_missing_is_named_with_its_extra(monkeypatch, capsys):
    def missing(name):
        raise ModuleNotFoundError("No module named 'PIL'", name="PIL.Image")

    monkeypatch.setattr(app, "load", missing)
    assert app.call("extract", []) == 2
    expected = "error: extract needs PIL.Image, which is not installed; pip install 'conclugen_jax[extract]'\n"
    assert capsys.readouterr().err == expected


# Completion.


def completed(script, *words):
    """What bash offers for the last word."""
    program = f"{script}\nCOMP_WORDS=({' '.join(map(repr, words))}); COMP_CWORD={len(words) - 1}; _conclugen\n"
    program += 'printf "%s\\n" "${COMPREPLY[@]}"'
    return subprocess.run(["bash", "-c", program], capture_output=True, text=True, check=True).stdout.split("\n")[:-1]


def test_completion_in_bash():
    script = run("completion", "bash").stdout
    assert completed(script, "conclugen", "pret") == ["pretrain "]
    assert completed(script, "conclugen", "con") == ["configs", "convert_mmsa", "convert_weights"]
    assert completed(script, "conclugen", "embed", "--spl") == ["--split="]
    assert completed(script, "conclugen", "pretrain", "--config.optimizer.w") == ["--config.optimizer.weight_decay="]
    assert "--checkpoint=" in completed(script, "conclugen", "downstream", "--")
    assert completed(script, "conclugen", "search", "--config", "=", "study_d") == ["study_demo "]
    assert completed(script, "conclugen", "search", "--config=sma") == ["--config=small "]
    assert completed(script, "conclugen", "pretrain", "--data", "=", "x") == [""]
    assert "name one shell" in run("completion", "tcsh", code=2).stderr


def test_completion_in_zsh_and_fish():
    assert run("completion", "zsh").stdout.startswith("autoload -U +X bashcompinit && bashcompinit\n_conclugen() {")
    lines = run("completion", "fish").stdout.splitlines()
    text = names.COMMANDS["probe"]
    assert f"complete -c conclugen -n __fish_use_subcommand -f -a probe -d '{text}'" in lines
    assert any("from pretrain' -l config.data.path -r -d " in line for line in lines)
    assert """-a build -d 'build a data set'"'"'s shards""" in "\n".join(lines)


@pytest.mark.parametrize("name", ["linear_evaluation", "fine_tuning", "supervised"])
@pytest.mark.parametrize("command", ["pretrain", "search"])
def test_pretraining_with_a_configuration_of_classifiers(command, name):
    said = run(command, f"--config={name}", "--data=d", code=2).stderr
    way_out = "name a method, such as --config=conclugen, or run conclugen downstream"
    assert said == f"error: --config={name} trains classifiers, it has nothing of pretraining; {way_out}\n"


def test_processes_that_were_named_before(monkeypatch, capsys):
    monkeypatch.setenv("JAX_NUM_PROCESSES", "2")
    monkeypatch.setattr("conclugen_jax.pretrain.pretrain", lambda config, workdir, **_: None)
    assert app.call("pretrain", ["--config=demo", "--data=d"]) == 0
    assert capsys.readouterr().err == (
        "warning: JAX_NUM_PROCESSES=2 is ignored: this process works alone, without --distributed=auto\n"
    )


# Studies.

STUDY = """
from configs import study_demo

def get_config():
    study = study_demo.get_config().unlock()
    with study.ignore_type():
        {}
    return study
"""


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("study.jobs = 'two'", "config.jobs is 'two', expected int (such as 0)"),
        ("study.seeds = ('0',)", "config.seeds is ('0',), expected tuple of int (such as (0, 1, 2, 3, 4))"),
        ("study.pretraining_path = 3", "config.pretraining_path is 3, expected str (such as '')"),
        ("study.labels.supervised = (0.5,)", "config.labels.supervised is (0.5,), expected tuple of int (such as ())"),
        ("study.methods = 'all'", "config.methods is 'all', expected a section"),
        ("study.methods.conclu = 'conclugen'", "config.methods.conclu is 'conclugen', expected a section"),
        ("study.methods.conclu.title = 1", "config.methods.conclu.title is 1, expected str (such as '')"),
        ("study.methods.conclu.pretraining = 'conclu'", "config.methods.conclu.pretraining is 'conclu', expected a section"),
        ("study.methods.conclu.modalities = 'video'", "config.methods.conclu.modalities is 'video', expected tuple of str"),
        ("study.datasets.digits.path = None", "config.datasets.digits.path is None, expected str (such as '')"),
        ("study.datasets.digits.protocols = 3", "config.datasets.digits.protocols is 3, expected a section"),
        (
            "study.datasets.digits.protocols.supervised = 'x'",
            "config.datasets.digits.protocols.supervised is 'x', expected a section",
        ),
        (
            "study.methods.conclu.pretraining.train.batch_size = '8'",
            "config.methods.conclu.pretraining.train.batch_size is '8', expected int (such as 4096)",
        ),
        (
            "del study.methods.conclu.pretraining.unlock().train['batch_size']",
            "lacks config.methods.conclu.pretraining.train.batch_size; start from configs/base.py",
        ),
        (
            "study.datasets.digits.protocols.fine_tuning.unlock().speed = 1",
            "has config.datasets.digits.protocols.fine_tuning.speed, unknown to configs/base.py",
        ),
    ],
)  # fmt: skip
def test_values_of_studies_that_cannot_be(tmp_path, line, message):
    path = tmp_path / "study.py"
    path.write_text(STUDY.format(line))
    with pytest.raises(ConclugenError) as e:
        configuration_files.load(str(path), of_run=False)
    assert message in str(e.value)
    assert str(e.value).startswith(f"--config={path}: ")


@pytest.mark.parametrize("name", ["study_demo", "study_paper", "study_ravdess", "study_base"])
def test_studies_that_are_shipped(name):
    configuration_files.load(name, of_run=False)
