"""Studies and searches on Ray: whatever is killed, they end as on one machine; mistakes are one sentence."""

import contextlib
import json
import random
import re
import socket
import subprocess
import sys
import time
from pathlib import Path

import jax
import psutil
import pytest

from conclugen_jax.commands import app
from conclugen_jax.data import builders
from conclugen_jax.errors import ConclugenError
from conclugen_jax.study import study as study_lib, trials
from conclugen_jax.system import on_ray, tasks
from tests.helpers import ROOT, Faces, log_without_times
from tests.searching import RATES, make_config, run
from tests.studies import small
from tests.test_search_command import begin as start, flat, wait_for

GIB = 2**30


def processes(name, *parents):
    """Processes below some others that have a name in their command."""
    found = []
    for process in (child for parent in parents for child in psutil.Process(parent).children(recursive=True)):
        with contextlib.suppress(psutil.Error):  # it has ended
            found += [process] * (name in " ".join(process.cmdline()))
    return found


def kill(name, *parents):
    random.choice(processes(name, *parents)).kill()


def few(path):
    """A pretraining and an evaluation, one after the other."""
    study = small(path)
    del study.methods.vision, study.datasets.faces.protocols.raw_features
    study.order, study.baselines = ("conclugen",), ()
    return study


def kill_node(raylet):
    """Kill all processes of a node at once, as where a machine has no more power."""
    for process in (node := psutil.Process(raylet), *node.children(recursive=True)):
        with contextlib.suppress(psutil.Error):
            process.kill()


def ended(process):
    output, errors = process.communicate(timeout=240)
    assert "Traceback" not in errors
    assert "ray" not in output.lower()  # it says nothing itself
    return process.returncode, errors


@pytest.fixture(scope="module")
def cluster():
    """The process of a head and two nodes; its output has their address and processes."""
    script = [sys.executable, "-m", "tests.run_cluster"]
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "stderr": subprocess.DEVNULL}
    with subprocess.Popen(script, cwd=ROOT, text=True, **pipes) as process:
        process.address = process.stdout.readline().strip()
        yield process
        process.stdin.close()


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return builders.build(Faces((64, 24, 23), missing=0.3), tmp_path_factory.mktemp("data"))


@pytest.mark.slow
def test_a_study_whose_worker_and_node_are_killed_ends_as_on_one_machine(cluster, data, tmp_path, monkeypatch):
    one = jax.devices()[:1]
    monkeypatch.setattr(jax, "devices", lambda *_: one)
    monkeypatch.setattr(study_lib, "work", lambda root, waiting, *_: [study_lib.work_through(root, c) for c in waiting])
    whole = study_lib.run(few(data), tmp_path / "whole")
    (tmp_path / "few.py").write_text(
        f"from tests.test_ray import few\n\ndef get_config():\n    return few({str(data)!r})\n"
    )
    broken, nodes = tmp_path / "broken", [int(cluster.stdout.readline()) for _ in range(2)]
    flags = f"--config={tmp_path / 'few.py'}", "--engine=ray", f"--ray_address={cluster.address}"
    process = start("study", broken, *flags)
    wait_for(broken, "pretraining/*/*/metrics.jsonl", process)
    kill("ray::Remote", *nodes)
    while not (again := [node for node in nodes if processes("spawn_main", node)]) and process.poll() is None:
        time.sleep(0.05)
    time.sleep(random.uniform(0, 6))
    kill_node(again[0])
    code, errors = ended(process)
    assert code == 0, errors
    found = json.loads((broken / "results.json").read_text())
    assert found["cells"] == json.loads(json.dumps(whole["cells"]))
    assert {cell["status"] for cell in found["cells"]} == {"done"}
    pretraining = "pretraining/conclugen/seed_1"
    assert log_without_times(broken / pretraining) == log_without_times(tmp_path / "whole" / pretraining)


@pytest.mark.slow
def test_a_search_whose_head_and_driver_are_killed_ends_as_on_one_machine(tmp_path):
    config = make_config(tmp_path / "data")
    whole = run(config, tmp_path / "whole", 2)
    (tmp_path / "space.json").write_text(json.dumps(RATES))
    (tmp_path / "made.py").write_text(
        "from conclugen_jax.study import search_space\nfrom configs import base\n\ndef get_config():\n"
        f"    return search_space.with_overrides(base.get_config(), {dict(flat(config))!r})\n"
    )
    flags = f"--config={tmp_path / 'made.py'}", f"--space={tmp_path / 'space.json'}", "--trials=2"
    broken = tmp_path / "broken"
    process = start("search", broken, *flags, "--engine=ray")
    wait_for(broken, "trials", process)
    trials = processes("spawn_main", process.pid)
    for trial in trials:
        trial.suspend()  # else it might end before the loss of the head is noticed
    kill("gcs_server", process.pid)
    code, errors = ended(process)
    for trial in trials:
        with contextlib.suppress(psutil.NoSuchProcess):
            trial.resume()
    assert code == 2
    assert errors.splitlines()[-1] == (
        f"error: {broken}: the head of the Ray cluster (local) is gone; what was done is saved: start the cluster again and "
        "repeat the command to resume"
    )
    process = start("search", broken, *flags, "--engine=ray")
    wait_for(broken, "trials/0001/metrics.jsonl", process)
    others = [*processes("spawn_main", process.pid), *processes("ray::Remote", process.pid)]
    process.kill()
    process.communicate()
    _, left = psutil.wait_procs(others, timeout=30)
    assert not left
    code, errors = ended(start("search", broken, *flags))
    assert code == 0, errors
    result = json.loads((broken / "result.json").read_text())
    assert result["trials"] == whole["trials"]
    for t in whole["trials"]:
        name = f"trials/{t['number']:04d}"
        assert log_without_times(broken / name) == log_without_times(tmp_path / "whole" / name)


@pytest.mark.parametrize(
    ("address", "message"),
    [
        (
            "127.0.0.1:1",
            "no Ray cluster answers \\(.*[Cc]onnection refused\\); start it by `ray start`, correct the address",
        ),
        (
            "ray://127.0.0.1:10001",
            "a client cannot start tasks; name HOST:PORT of the head, on a machine of the cluster",
        ),
    ],
)
def test_an_address_without_a_cluster_is_refused(address, message):
    with pytest.raises(ConclugenError, match=f"^--ray_address={address}: .*{message}"), on_ray.connected(address):
        pass


def test_a_cluster_of_other_versions_is_refused(monkeypatch):
    from ray._private import utils

    def init(*_, **__):
        utils.check_version_info({"ray_version": "2.9.3", "python_version": "3.9.18"}, "this process")

    message = r"other versions \(.*2\.9\.3.*3\.9\.18.*\); install the same on all machines$"
    monkeypatch.setattr(on_ray.ray, "init", init)
    with pytest.raises(ConclugenError, match=message), on_ray.connected("auto"):
        pass


def test_without_ray_one_sentence_says_what_to_install(data, monkeypatch, capfd, tmp_path):
    monkeypatch.delitem(sys.modules, "conclugen_jax.system.on_ray")
    monkeypatch.delattr("conclugen_jax.system.on_ray")
    monkeypatch.setitem(sys.modules, "ray", None)
    config = tmp_path / "few.py"
    config.write_text(f"from tests.test_ray import few\n\ndef get_config():\n    return few({str(data)!r})\n")
    flags = [f"--config={config}", f"--study={tmp_path / 'study'}"]
    assert app.call("study", [*flags, "--engine=ray"]) == 2
    assert re.search("study needs ray, which is not installed; pip install .*ray", capfd.readouterr().err)
    assert app.call("study", [*flags, "--ray_address=auto"]) == 2
    assert "--ray_address=auto is for --engine=ray; add that, or leave" in capfd.readouterr().err
    assert not (tmp_path / "study").exists()


def engine_of(monkeypatch, *nodes):
    """An engine of a cluster that is none."""
    found = [{"Resources": {"CPU": cpus, "memory": gib * GIB, "GPU": gpus}} for cpus, gib, gpus in nodes]
    monkeypatch.setattr(on_ray, "_nodes", lambda: found)
    engine = on_ray.Ray.__new__(on_ray.Ray)
    engine._address, engine._shown, engine._misses, engine._next = "auto", {}, 0, 0.0
    return engine


def test_tasks_ask_for_what_nodes_have(monkeypatch, tmp_path):
    engine = engine_of(monkeypatch, (8, 30, 0), (4, 60, 0))
    assert engine.plan(tmp_path, 5, 0, 2.0) == 5
    assert engine._needs == {"num_cpus": 1, "num_gpus": 0, "memory": 2 * GIB}
    assert engine.plan(tmp_path, 5, 3, 2.0) == 3
    assert engine._needs["num_cpus"] == 4
    assert engine.plan(tmp_path, 5, 1, 2.0) == 1
    assert engine._needs["num_cpus"] == 8
    message = (
        r"^a task asks for 1 processors, 64\.0 GiB and 0 GPUs, and no node .*at most 8 processors, 60\.0 GiB.*job_gib"
    )
    with pytest.raises(ConclugenError, match=message):
        engine.plan(tmp_path / "none", 5, 0, 64.0)
    assert not (tmp_path / "none").exists()
    engine = engine_of(monkeypatch, (2, 30, 0), (32, 200, 8))
    engine.plan(tmp_path, 5, 0, 2.0)
    assert engine._needs == {"num_cpus": 1, "num_gpus": 1, "memory": 2 * GIB}


def test_a_node_that_does_not_see_the_folder_says_so(monkeypatch, tmp_path):
    monkeypatch.setattr(tasks.environment, "carry", lambda _: None)
    monkeypatch.chdir(tmp_path)
    (tmp_path / tasks.SEEN).write_text("another")
    setting = tasks.Setting({}, str(tmp_path), str(tmp_path), "token", tasks.__version__)
    way_out = "name a folder that all nodes of the cluster share, at the same path$"
    for folder in (tmp_path, tmp_path / "none"):
        with pytest.raises(ConclugenError, match=f"^{folder}: .* does not see this folder; {way_out}"):
            tasks._work(setting._replace(folder=str(folder)), b"")
    with pytest.raises(ConclugenError, match=f"^/nowhere: .* has no such folder to work in; {way_out}"):
        tasks._work(setting._replace(directory="/nowhere"), b"")
    with pytest.raises(ConclugenError, match=r" has conclugen_jax .*, expected 0\.0; install that on all nodes$"):
        tasks._work(setting._replace(version="0.0"), b"")


def test_a_bucket_is_no_folder_for_runs(monkeypatch, tmp_path, data):
    monkeypatch.chdir(tmp_path)
    message = "^(gs|s3):/.*: runs cannot be kept in a bucket; name a folder on a disk"
    with pytest.raises(ConclugenError, match=message):
        engine_of(monkeypatch, (8, 30, 0)).plan(Path("gs://bucket/study"), 1, 0, 1.0)
    with pytest.raises(ConclugenError, match=message):
        study_lib.run(few(data), "s3://bucket/study")
    with pytest.raises(ConclugenError, match=message), trials.opened(Path("s3://bucket/search"), {}, ()):
        pass
    assert not list(tmp_path.iterdir())


def test_a_head_that_is_gone_is_noticed(monkeypatch, tmp_path):
    """Two looks may find nothing, as where the network fails for a moment."""
    engine = engine_of(monkeypatch, (8, 30, 0))
    engine.plan(tmp_path, 1, 0, 1.0)
    monkeypatch.setattr(on_ray, "EVERY", 0.0)
    with socket.create_server(("127.0.0.1", 0)) as there:
        engine._vital = {there.getsockname()}
        engine.check()
    engine.check()
    engine.check()
    with pytest.raises(
        ConclugenError, match=r"^.*: the head of the Ray cluster \(auto\) is gone; what was done is saved"
    ):
        engine.check()
    assert engine.lost
