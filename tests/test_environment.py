"""The environment as an input: each variable that people set has no effect, or is named in one sentence."""

import os
import pwd
import subprocess
import sys
from pathlib import Path

import jax
import numpy as np
import pytest

from conclugen_jax import pretrain
from conclugen_jax.commands import app, names
from conclugen_jax.data import builders
from conclugen_jax.errors import ConclugenError
from conclugen_jax.pretrain import checks
from conclugen_jax.system import environment
from tests.helpers import QUICK_COMPILATION, ROOT, Faces, log_without_times, run, start, tiny_config

ODD = "odd"  # a value that no variable takes


def other(name):
    """A value that an option of JAX takes, and is not its default; where it takes any text, an odd one."""
    (kind, _, facts), value = jax.config.meta[name], jax.config.values[name]
    if kind is bool:
        return str(int(not value))
    if kind in (int, float):
        return str((value or 0) + kind(1))
    values = [getattr(x, "value", x) for x in facts.get("enum_values", facts.get("enum_class", [ODD]))]
    values = [x for x in values if x not in (value, getattr(value, "value", value))]
    return str(next((x for x in values if isinstance(x, str)), ODD))


IGNORED = [name.upper() for name in jax.config.meta if not environment.USED.fullmatch(name.upper())]
IGNORED = sorted(name for name in IGNORED if environment.OPTIONS.fullmatch(name))
MESSAGES = {
    "JAX_TRACEBACK_FILTERING": "off",
    "JAX_INCLUDE_FULL_TRACEBACKS_IN_LOCATIONS": "0",
    "JAX_PPRINT_USE_COLOR": "0",
}


def test_the_numbers_of_a_run_depend_on_no_option_of_jax(tmp_path):
    assert {"JAX_ENABLE_X64", "JAX_DEBUG_NANS", "JAX_DISABLE_JIT", "JAX_DEFAULT_PRNG_IMPL", "CHECK_VMA"} <= {*IGNORED}
    path = builders.build(Faces(), tmp_path / "data")
    config = tmp_path / "faces.py"
    text = "from tests import helpers\n\ndef get_config():\n    return helpers.tiny_config({!r}, train__num_epochs=3)\n"
    config.write_text(text.format(str(path)))
    odd = {name: other(name.lower()) for name in IGNORED} | {"FLAX_FIX_RNG_SEPARATOR": "1", "NVIDIA_TF32_OVERRIDE": "1"}
    odd |= {"JAX_NUMPY_RANK_PROMOTION": "raise", "JAX_DEFAULT_MATMUL_PRECISION": "bfloat16"}  # tests have others
    said = start("pretrain", f"--config={config}", f"--workdir={tmp_path}/run", env=odd | MESSAGES).stderr
    for name, value in odd.items():
        assert f"warning: {name}={value} is ignored: results of commands do not depend on it" in said
    assert said.count("warning: ") == len(odd)
    pretrain.pretrain(
        app.configuration_files.load(str(config), of_run=True), tmp_path / "here", devices=jax.devices()[:1]
    )
    assert log_without_times(tmp_path / "run") == log_without_times(tmp_path / "here")


@pytest.mark.parametrize("value", ["0", "False", "no", "off", "1"])
def test_an_option_with_its_default_is_no_change(monkeypatch, value):
    monkeypatch.setattr(environment, "_ignored", {"JAX_ENABLE_X64": value})
    monkeypatch.setattr(environment, "notes", [])
    said = "JAX_ENABLE_X64=1 is ignored: results of commands do not depend on it"
    assert environment.changes() == [said] * (value == "1")


UNREAD = {"JAX_CHECK_PROXY_ENVS", "JAX_CPU_ENABLE_ASYNC_DISPATCH"}  # options that have no variable
UNREAD |= {"JAX_CROSS_HOST_TRANSFER_TIMEOUT_SECONDS", "JAX_CROSS_HOST_TRANSFER_TRANSFER_SIZE"}
READ = {name.upper() for name, (kind, _, _) in jax.config.meta.items() if kind is not str}
READ = sorted(name for name in READ - UNREAD - environment.FORMS.keys() if environment.USED.fullmatch(name))
"""Variables that are left to JAX and of which it does not take every text."""
FORKS = """
import os, sys, numpy, jaxlib.xla_client
from conclugen_jax.system import environment
for name in sys.argv[1:]:
    if not os.fork():
        os.environ[name] = "odd"
        try:
            environment.prepare(with_jax=True)
            import jax
        except ValueError as e:
            print(environment.fault(e), flush=True)
        os._exit(0)
    os.wait()
"""


def test_values_that_jax_does_not_take_are_named():
    code = [sys.executable, "-c", FORKS, *READ]
    lines = subprocess.run(code, cwd=ROOT, capture_output=True, text=True, check=True).stdout.splitlines()
    assert len(READ) > 25
    expected = [f"{name}=odd: JAX takes no such value; correct or unset it" for name in READ]
    assert lines == expected


@pytest.mark.parametrize("name", environment.FORMS)
def test_values_that_other_libraries_do_not_take_are_named(monkeypatch, name):
    meaning = environment.FORMS[name][1]
    monkeypatch.setenv(name, ODD)
    assert run("configs", code=2).stderr == f"error: {name}={ODD}: expected {meaning}; correct or unset it\n"
    monkeypatch.setenv(name, {"XLA_PYTHON_CLIENT_ALLOCATOR": "BFC", "JOBLIB_START_METHOD": "spawn"}.get(name, "1"))
    run("configs")
    monkeypatch.setenv(name, "")
    run("configs")
    assert name not in os.environ  # libraries take an empty text for a value
    assert name not in os.environ


def test_two_shares_of_the_memory(monkeypatch):
    monkeypatch.setenv("XLA_CLIENT_MEM_FRACTION", "0.5")
    monkeypatch.setenv("XLA_PYTHON_CLIENT_MEM_FRACTION", ".5")
    assert "are both set; unset one of them" in run("configs", code=2).stderr
    monkeypatch.delenv("XLA_PYTHON_CLIENT_MEM_FRACTION")
    environment.share_memory(0.3)
    assert "XLA_PYTHON_CLIENT_MEM_FRACTION" not in os.environ
    monkeypatch.setenv("XLA_CLIENT_MEM_FRACTION", "")
    environment.share_memory(0.3)
    assert os.environ.pop("XLA_PYTHON_CLIENT_MEM_FRACTION") == "0.300"


@pytest.mark.parametrize("flag", ["--xla_nothing=1", "--xla_force_host_platform_device_count=odd"])
def test_flags_that_xla_does_not_know(monkeypatch, flag):
    monkeypatch.setenv("XLA_FLAGS", flag)
    monkeypatch.setenv("TF_CPP_MIN_LOG_LEVEL", "3")
    with pytest.raises(
        ConclugenError, match=rf"^XLA_FLAGS={flag}: .*{flag.strip('-').split('=')[0]}.*; correct or unset it$"
    ):
        environment._check_flags()
    environment.notes.clear()
    monkeypatch.setenv("XLA_FLAGS", QUICK_COMPILATION)
    environment._check_flags()
    assert environment.notes == []
    monkeypatch.setenv("XLA_FLAGS", "--xla_cpu_enable_fast_math=true")
    environment._check_flags()
    assert environment.notes == [
        "XLA_FLAGS=--xla_cpu_enable_fast_math=true may change the numbers of a run; resume it with the same flags"
    ]


NO_BACKEND = (
    "Unable to initialize backend '{0}': Backend '{0}' is not in the list of known backends: ['cpu']. (set JAX_P"
)


@pytest.mark.parametrize(
    ("variable", "value", "way_out"),
    [
        ("JAX_PLATFORMS", "gpu", "unset it, or install JAX for it: pip install 'conclugen_jax[cuda]'"),
        ("JAX_PLATFORMS", "cuda,cpu", "unset it, or install JAX for it: pip install 'conclugen_jax[cuda]'"),
        ("JAX_PLATFORMS", "tpu", "unset it, or install JAX for it: pip install 'conclugen_jax[tpu]'"),
        ("JAX_PLATFORMS", "cpuu", "correct or unset it; did you mean cpu?"),
        ("JAX_PLATFORMS", "CPU", "correct or unset it; did you mean cpu?"),
        ("JAX_PLATFORM_NAME", "gpu", "unset it, or install JAX for it: pip install 'conclugen_jax[cuda]'"),
    ],
)
def test_devices_that_are_not_there(monkeypatch, tmp_path, variable, value, way_out):
    monkeypatch.delenv("JAX_PLATFORMS", raising=False)
    monkeypatch.setenv(variable, value)
    why = f"Unable to initialize backend '{value}': Backend '{value}' is not in the list of known backends: ['cpu']"

    def refuse():
        raise RuntimeError(NO_BACKEND.format(value))

    monkeypatch.setattr(jax, "devices", refuse)
    (tmp_path / "checkpoints").mkdir()
    for command in (
        ["pretrain", "--config=demo", "--data=d"],
        ["downstream", "--config=supervised", "--data=d"],
        ["demo", f"--folder={tmp_path}/d"],
        ["checkpoint", "list", f"--workdir={tmp_path}"],
        ["extract", "--dataset=clips", "--name=n", f"--source={tmp_path}", f"--data_dir={tmp_path}/d"],
        ["predict", f"--checkpoint={tmp_path}", "clip.mp4"],
    ):
        said = run(*command, code=2).stderr
        assert said == f"error: {variable}={value}: JAX finds no such device here ({why}); {way_out}\n"
    assert not (tmp_path / "d").exists()
    monkeypatch.delenv(variable)
    assert environment.fault(
        RuntimeError("Unable to initialize backend 'cuda': driver too old (you may need to u")
    ) == (
        "JAX finds no such device here (Unable to initialize backend 'cuda': driver too old); correct its driver, or set "
        "JAX_PLATFORMS=cpu"
    )
    assert not environment.fault(AssertionError())


def test_devices_that_are_not_there_for_several_workers(monkeypatch, tmp_path):
    monkeypatch.setenv("JAX_PLATFORMS", "cpuu")
    for command in (
        ["study", f"--study={tmp_path}/s"],
        ["search", "--workers=2", "--data=d", f"--search={tmp_path}/s"],
    ):
        config = "study_demo" if command[0] == "study" else "demo"
        said = run(*command, f"--config={config}", code=2).stderr
        assert said.startswith("error: JAX_PLATFORMS=cpuu: JAX finds no such device here (Unable to initialize backend")
        assert said.endswith("; correct or unset it; did you mean cpu?\n")
        assert not list(tmp_path.iterdir())


def test_the_doctor_names_the_variable_once(tmp_path):
    env = {"JAX_PLATFORMS": "cuda", "JAX_ENABLE_X64": "1"}
    lines = start("doctor", f"--workdir={tmp_path}", env=env, code=1).stdout.splitlines()
    ignored = "JAX_ENABLE_X64=1 is ignored: results of commands do not depend on it"
    way_out = "unset it, or install JAX for it: pip install 'conclugen_jax[cuda]'"
    assert f"warning  environment    {ignored}" in lines
    assert f"failed   devices        JAX_PLATFORMS=cuda: JAX finds no such device here; {way_out}" in lines
    assert "Error" not in "".join(lines)
    assert [line.split()[1] for line in lines if line[0] != " "][2:] == ["devices", "disk", "compile"]


def test_the_doctor_and_a_gpu_that_a_variable_hides(monkeypatch):
    monkeypatch.setattr(Path, "exists", lambda self: str(self) == "/dev/nvidia0")
    monkeypatch.delenv("JAX_PLATFORMS")
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    assert checks.devices().fix == "unset CUDA_VISIBLE_DEVICES="


CACHES = {
    "its own": ({"JAX_COMPILATION_CACHE_DIR": "/proc/none"}, "JAX_COMPILATION_CACHE_DIR=/proc/none cannot be written"),
    "the user's": ({"XDG_CACHE_HOME": "/proc"}, "the cache of compiled programs cannot be written (No such file"),
    "home": ({"HOME": "/proc/none"}, "the cache of compiled programs cannot be written (No such file"),
    "a file": ({"HOME": "/dev/null"}, "the cache of compiled programs cannot be written (Not a directory"),
    "no home": ({}, "the cache of compiled programs cannot be written (Could not determine home directory"),
    "none": ({"JAX_COMPILATION_CACHE_DIR": ""}, ""),
    "cloud": ({"JAX_COMPILATION_CACHE_DIR": "gs://bucket/x"}, ""),
}


@pytest.mark.parametrize(("given", "kept_from"), [(None, "0"), ("2.5", "2.5")])
def test_small_programs_are_kept_unless_the_user_says_otherwise(monkeypatch, tmp_path, given, kept_from):
    monkeypatch.setenv("JAX_COMPILATION_CACHE_DIR", str(tmp_path / "programs"))
    monkeypatch.setenv("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", given or "")
    if given is None:
        monkeypatch.delenv("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS")
    environment.prepare(with_jax=True)
    assert os.environ["JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS"] == kept_from


@pytest.mark.parametrize("case", CACHES)
def test_places_of_compiled_programs(monkeypatch, case):
    variables, said = CACHES[case]
    for name in ("HOME", "XDG_CACHE_HOME", "JAX_COMPILATION_CACHE_DIR"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(pwd, "getpwuid", lambda _: {}[0])  # a user whom the system does not know, as in containers
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    environment.prepare(with_jax=True)
    found = environment.changes()
    assert len(found) == bool(said)
    assert "".join(found).startswith(said)
    way_out = "so programs are compiled each time; set JAX_COMPILATION_CACHE_DIR to a folder"
    assert all(line.endswith(way_out) for line in found)
    assert os.environ["JAX_COMPILATION_CACHE_DIR"] == variables.get("JAX_COMPILATION_CACHE_DIR", "") * (not said)


@pytest.mark.parametrize("mask", [0o777, 0o100, 0o200, 0o400])
def test_a_umask_that_locks_out_its_own_user(mask):
    before = os.umask(mask)
    try:
        said = run("configs", code=2).stderr
        os.umask(0o077)
        run("configs")
        kept = os.umask(before)
    finally:
        os.umask(before)
    assert said == f"error: umask {mask:04o}: this user could not use the files of the command; set umask 0022\n"
    assert kept == 0o077


def test_closed_files_and_texts_without_unicode(tmp_path):
    """A run with closed standard files, and one in a locale without Unicode: nothing gets into files of the run."""
    (tmp_path / "f").mkdir()
    (tmp_path / "f" / "labels.csv").write_text("id,label\na,fröhlich\nb,трист\n", encoding="utf-8")
    for name in "ab":
        (tmp_path / "f" / f"{name}.csv").write_text("1,2\n")
    ascii_only = {"LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0", "PYTHONIOENCODING": "ascii"}
    folder = tmp_path / "größe"
    build = ["build", "--dataset=digits", f"--data_dir={folder}"]
    assert "digits/1.0.0: train 1,400" in start(*build, env=ascii_only | {"PYTHONWARNINGS": "error"}).stdout
    closed = ["bash", "-c", 'exec <&- >&- 2>&-; "$@"', "closed"]
    start("inspect", f"--data={folder}/digits/1.0.0", prefix=closed)


def test_files_that_a_shell_has_closed_are_opened_on_nothing():
    code = "import os, sys\nfrom conclugen_jax.commands import main\nmain._open_standard_files()\n"
    code += "print('x'); print('y', file=sys.stderr); os.write(2, b'z'); assert sys.stdin.read() == ''\n"
    code += "assert os.open('/', os.O_RDONLY) > 2"
    shell = ["bash", "-c", 'exec <&- >&- 2>&-; "$@"', "closed", sys.executable, "-c", code]
    assert subprocess.run(shell, cwd=ROOT, check=False).returncode == 0


@pytest.mark.parametrize("columns", ["5", "0", "odd"])
def test_tables_are_whole_on_a_narrow_terminal(monkeypatch, columns, capsys):
    monkeypatch.setenv("COLUMNS", columns)
    monkeypatch.setenv("TERM", "dumb")
    app.show(("labels", "accuracy in %"), [["20", "12.34 ± 56.78"]], title="a title")
    out = capsys.readouterr().out
    assert "12.34 ± 56.78" in out
    assert "accuracy in %" in out


def test_help_without_docstrings():
    result = subprocess.run(
        [sys.executable, "-OO", "-m", "conclugen_jax", "pretrain", "--help"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=True,
    )
    assert result.stdout.startswith(f"conclugen pretrain: {names.COMMANDS['pretrain']}\n")
    assert "config.train.batch_size = 4096" in result.stdout


def test_a_backend_that_matplotlib_does_not_know(monkeypatch):
    monkeypatch.setenv("MPLBACKEND", ODD)
    said = environment.fault(ValueError("Key backend: 'odd' is not a valid value for backend; supported values are"))
    assert said == "MPLBACKEND=odd: matplotlib has no such backend; unset it"


@pytest.fixture(scope="module")
def embedded(tmp_path_factory):
    """A run, and what ``conclugen embed`` prints and writes of it without a variable."""
    folder = tmp_path_factory.mktemp("environment")
    config = tiny_config(builders.build(Faces(), folder / "data"), train__num_epochs=1, clustering__start_epoch=0)
    pretrain.pretrain(config, folder / "run", devices=jax.devices()[:1])
    return folder / "run", *embed(folder / "run", folder / "plain.npz", {})


def embed(workdir, output, variables):
    result = start("embed", f"--workdir={workdir}", f"--output={output}", env=variables)
    with np.load(output) as file:
        return (
            result.stdout.replace(str(output), ""),
            result.stderr,
            {name: file[name].tobytes() for name in file.files},
        )


HARMLESS = {
    "python": {"PYTHONWARNINGS": "error", "PYTHONOPTIMIZE": "2", "PYTHONHASHSEED": "0", "PYTHONSAFEPATH": "1"},
    "development": {"PYTHONDEVMODE": "1", "PYTHONFAULTHANDLER": "1", "PYTHONUNBUFFERED": "1"},
    "threads": {"OMP_NUM_THREADS": "0", "MKL_NUM_THREADS": ODD, "OPENBLAS_NUM_THREADS": ODD, "NPROC": ODD},
    "folders": {"TMPDIR": "/nonexistent", "HOME": "", "MPLCONFIGDIR": "/proc/none", "TFDS_DATA_DIR": "/proc/none"},
    "terminal": {"TERM": "dumb", "COLUMNS": "0", "NO_COLOR": "1", "LINES": ODD},
    "locale": {"LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0", "PYTHONIOENCODING": "ascii"},
    "no locale": {"LC_ALL": "xx_XX", "LANG": "tr_TR.ISO-8859-9"},
    "others": {
        "MPLBACKEND": ODD,
        "TF_CPP_MIN_LOG_LEVEL": ODD,
        "CUDA_VISIBLE_DEVICES": ODD,
        "JAX_COORDINATOR_ADDRESS": ODD,
    },
}


@pytest.mark.slow
@pytest.mark.parametrize("case", HARMLESS)
def test_variables_without_effect(embedded, tmp_path, case):
    workdir, printed, _, written = embedded
    out, err, found = embed(workdir, tmp_path / "vectors.npz", HARMLESS[case])
    assert (out, found) == (printed, written)
    assert "Traceback" not in err
    assert case in ("threads", "others") or err == ""  # these let libraries say something
