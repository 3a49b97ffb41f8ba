"""Downstream runs, sweeps, embeddings and probes of several devices and processes are those of one."""

import json

import jax
import numpy as np
import pytest

from conclugen_jax import pretrain
from conclugen_jax.data import builders, shards
from conclugen_jax.evaluate import embedding, probe
from conclugen_jax.runs import checkpoint
from conclugen_jax.system import processes
from conclugen_jax.train import parallel
from tests import run_evaluations
from tests.helpers import Faces, assert_same_bits, close, flat, log_without_times, run, tiny_config
from tests.test_processes import ended, start

RUNS = ("linear_evaluation", "fine_tuning", *run_evaluations.GRIDS)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("shared")


@pytest.fixture(scope="module")
def data(folder):
    """Data whose splits no number of devices divides."""
    return builders.build(Faces((61, 23, 25), missing=0.3), folder / "data")


@pytest.fixture(scope="module")
def pretrained(folder, data):
    config = tiny_config(data, train__num_epochs=1, clustering__start_epoch=0)
    pretrain.pretrain(config, folder / "pretrained", devices=jax.devices()[:1])
    return folder / "pretrained"


def test_all_devices_of_a_process_give_the_vectors_of_one(pretrained, data, monkeypatch):
    found = []
    for count in (8, 1):
        monkeypatch.setattr(jax, "local_devices", lambda count=count: jax.devices()[:count])
        network, dataset = embedding.load(pretrained), shards.open_dataset(data)
        rows = list(embedding.embed(network, dataset, "test", batch_size=10))
        split = probe.represent_split(pretrained, "test")
        found.append({"embed": rows, "split": split.representations, "clusters": split.clusters})
    eight, one = (flat(x) for x in found)
    assert eight.keys() == one.keys()
    for name, x in one.items():
        assert x.dtype == eight[name].dtype
        if x.dtype.kind == "f":
            assert close(eight[name], x, 1e-6), name
        else:
            np.testing.assert_array_equal(eight[name], x)


def test_a_share_is_what_all_rows_give_at_those_places(monkeypatch):
    """Three processes, one after the other: what they send is put together as JAX would."""
    from jax.experimental import multihost_utils

    rng, rows = np.random.default_rng(0), np.array([3, 1, 4, 0, 2])
    table = {
        "x": rng.normal(size=(6, 2, 3)).astype(np.float32),
        "label": np.arange(6),
        "present": np.arange(6) % 2 > 0,
        "none": np.zeros((6, 0), np.float32),
        "special": np.array([-0.0, np.nan, 0, 1, 2, 3]),
    }
    sent, asked = [], []

    def send(x):
        sent.append(x)
        return np.stack(sent + [x] * (3 - len(sent)))

    def work(at):
        asked.append(at.tolist())
        return {name: x[at] for name, x in table.items()}

    monkeypatch.setattr(multihost_utils, "process_allgather", send)
    for index in range(3):
        party = type("Party", (), {"place": processes.Place("localhost:1", 3, index)})
        monkeypatch.setattr(processes, "_party", party)
        found = processes.shared(work, rows)
    assert asked == [[3, 1], [4, 0], [2, 2]]
    assert_same_bits(found, {name: x[rows] for name, x in table.items()})


def test_parts_of_an_axis_are_those_of_the_devices():
    x = np.arange(2 * 8 * 3).reshape(2, 8, 3)
    placed = parallel.spread({"x": x}, jax.devices()[:4], 1)["x"]
    assert [part.data.shape for part in placed.addressable_shards] == [(2, 2, 3)] * 4
    np.testing.assert_array_equal(parallel.on_host(placed), x)


@pytest.fixture(scope="module")
def together(folder, pretrained, data):
    """How two processes with two devices each ended: those of which one was killed, and those that took up its work."""
    return [ended(start("-m", "tests.run_evaluations", data, folder, *how)) for how in (["killed"], [])]


@pytest.fixture(scope="module")
def alone(folder, pretrained, data):
    """What one process makes with four devices."""
    (folder / "alone").mkdir()
    run_evaluations.work(data, folder, folder / "alone", jax.devices()[:4])
    return folder / "alone"


def assert_same(ours, theirs, **tolerance):
    """Assert that two JSON values have the same texts at the same places, and about the same numbers."""
    found = [dict(jax.tree_util.tree_leaves_with_path(x, is_leaf=lambda x: x is None)) for x in (ours, theirs)]
    assert found[0].keys() == found[1].keys()
    for path, x in found[1].items():
        assert found[0][path] == (pytest.approx(x, **tolerance) if type(x) is float else x), path


@pytest.mark.slow
def test_a_killed_process_ends_the_other_with_one_sentence(together):
    codes, errors = together[0]
    assert codes == [1, -9], errors
    assert errors[0].strip().splitlines()[-1].startswith("error: process 1 is gone (killed, out of memory")
    assert "Traceback" not in errors[0]


@pytest.mark.slow
@pytest.mark.parametrize("name", RUNS)
def test_two_processes_find_what_one_does(together, alone, folder, name):
    results = [json.loads((x / name / "result.json").read_text()) for x in (folder / "together", alone)]
    assert_same(*results, rel=1e-5)
    if name not in run_evaluations.GRIDS:
        assert_same(*(log_without_times(x / name) for x in (folder / "together", alone)), rel=1e-5)
        trees = []
        for place in (folder / "together" / name, alone / name):
            with checkpoint.Checkpoints(place, read_only=True) as saved:
                trees.append(flat(saved.restore_tree(saved.find("newest"))[0]))
        for path, x in trees[1].items():
            assert close(trees[0][path], x, 1e-5), path


@pytest.mark.slow
def test_two_processes_embed_and_probe_as_one_does(together, alone, folder):
    ours, theirs = (np.load(x / "fine_tuning.npz") for x in (folder / "together", alone))
    assert ours.files == theirs.files
    for name in theirs.files:
        assert ours[name].dtype == theirs[name].dtype
        if ours[name].dtype.kind == "f":
            assert close(ours[name], theirs[name], 1e-5), name
        else:
            np.testing.assert_array_equal(ours[name], theirs[name])
    reports = [json.loads((x / "probe.json").read_text()) for x in (folder / "together", alone)]
    assert_same(*reports, abs=1 / 25 + 1e-9)  # one test row


@pytest.mark.slow
def test_a_run_that_one_process_wants_otherwise_ends_all(together, folder):
    codes, errors = together[1]
    assert codes == [2, 2], errors
    sentence = "this process differs from process 0 (config.seed: 0 -> 1); start all with the same command and data"
    last = [e.strip().splitlines()[-1] for e in errors]
    assert last == [f"error: process 1: {sentence}", f"error: {sentence}"]
    assert "linear_evaluation" not in errors[1]  # process 0 alone shows and writes
    assert not (folder / "different").exists()


@pytest.mark.slow
def test_the_command_embeds_on_several_processes(pretrained, data, tmp_path):
    files = [tmp_path / name for name in ("together.npz", "alone.npz")]
    arguments = f"--workdir={pretrained}", "--batch_size=10"
    codes, errors = ended(start("-m", "launch.embed", *arguments, f"--output={files[0]}", "--distributed=auto"))
    assert codes == [0, 0], errors
    run("embed", *arguments, f"--output={files[1]}")
    ours, theirs = map(np.load, files)
    for name in theirs.files:
        assert ours[name].dtype.kind != "f" or close(ours[name], theirs[name], 1e-6)
    np.testing.assert_array_equal(ours["id"], theirs["id"])
