"""The examples for clusters: they can be parsed, and every module, flag and key named there exists."""

import re
import shlex
import subprocess
from pathlib import Path

import pytest
import yaml

from conclugen_jax.commands import app
from conclugen_jax.system import processes

ROOT = Path(__file__).parent.parent
FOLDER = ROOT / "launch" / "cluster"


def slurm():
    return (FOLDER / "pretrain.sbatch").read_text()


def jobset():
    return yaml.safe_load((FOLDER / "pretrain-jobset.yaml").read_text())


def sky():
    return yaml.safe_load((FOLDER / "pretrain.sky.yaml").read_text())


def container():
    [job] = jobset()["spec"]["replicatedJobs"]
    return job, job["template"]["spec"]["template"]["spec"]["containers"][0]


def launched(script):
    """The arguments of ``conclugen`` in a shell script."""
    [line] = [x for x in script.replace("\\\n", " ").splitlines() if "/conclugen pretrain " in x]
    words = shlex.split(line)
    return words[words.index(".venv/bin/conclugen") + 1 :]


COMMANDS = {
    "slurm": lambda: launched(slurm()),
    "jobset": lambda: container()[1]["command"][1:],
    "sky": lambda: launched(sky()["run"]),
}


@pytest.mark.parametrize("script", [slurm, lambda: sky()["run"], lambda: sky()["setup"]])
def test_shell_scripts_can_be_parsed(script):
    result = subprocess.run(["bash", "-n"], input=script(), capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr
    assert not result.stderr


def test_the_launcher_takes_every_argument():
    for name, words in COMMANDS.items():
        program, *arguments = words()
        command = app.load(program).command
        command.parse(arguments)
        assert command.flags.distributed == "auto"
        assert command.config.train.batch_size % 16 == 0  # devices
        assert command.flags.workdir.endswith("runs/conclugen" if name != "slurm" else "$RUNS/conclugen")


def test_the_processes_of_a_jobset_find_each_other():
    job, one = container()
    assert [x["name"] for x in one["env"]] == [processes.ADDRESS, processes.COUNT, processes.INDEX]
    name, count = jobset()["metadata"]["name"], job["template"]["spec"]["completions"]
    assert one["env"][0]["value"].rpartition(":")[0] == f"{name}-{job['name']}-0-0.{name}"
    assert one["env"][1]["value"] == str(count) == str(job["template"]["spec"]["parallelism"])
    assert job["template"]["spec"]["completionMode"] == "Indexed"


def test_sky_sets_the_variables_that_are_read():
    exported = re.findall(r"export (\w+)=", sky()["run"])
    assert exported == [processes.ADDRESS, processes.COUNT, processes.INDEX]


def test_the_guide_names_what_there_is():
    guide = (FOLDER / "README.md").read_text()
    for name in (processes.ADDRESS, processes.COUNT, processes.INDEX):
        assert name in guide
    for name in re.findall(r"\]\(([^)]+)\)", guide):
        assert (FOLDER / name).is_file(), name


def studies():
    """File -> the command line of its study."""
    job = yaml.safe_load((FOLDER / "study-rayjob.yaml").read_text())
    task = yaml.safe_load((FOLDER / "study.sky.yaml").read_text())
    scripts = {
        "study.sbatch": (FOLDER / "study.sbatch").read_text(),
        "study-rayjob.yaml": job["spec"]["entrypoint"],
        "study.sky.yaml": task["run"],
    }
    for name, script in scripts.items():
        assert not subprocess.run(["bash", "-n"], input=script, capture_output=True, text=True, check=True).stderr
        [words] = re.findall(r"conclugen study (.*)", script.replace("\\\n", " "))
        yield name, shlex.split(words.replace('$(echo "$SKYPILOT_NODE_IPS" | head -n1)', "HEAD"))


def test_studies_on_ray_are_what_the_command_takes():
    for name, arguments in studies():
        command = app.load("study").command
        command.parse(arguments)
        assert command.flags.engine == "ray", name
        assert command.flags.ray_address == ("HEAD:6379" if "sky" in name else "auto"), name
        assert name in (FOLDER / "README.md").read_text()


def test_a_ray_job_asks_for_one_kind_of_machine_that_sees_the_folder():
    spec = yaml.safe_load((FOLDER / "study-rayjob.yaml").read_text())["spec"]["rayClusterSpec"]
    pods = [
        spec["headGroupSpec"]["template"]["spec"],
        *(group["template"]["spec"] for group in spec["workerGroupSpecs"]),
    ]
    for pod in pods:
        [one] = pod["containers"]
        assert one["volumeMounts"] == [{"name": "shared", "mountPath": "/shared"}]
        assert one["workingDir"] == "/opt/conclugen_jax"
        assert pod["volumes"][0]["persistentVolumeClaim"] == {"claimName": "conclugen"}
