"""Checkpoints handed on: the same network comes back, damage and made-up exports are refused, nothing is left half made."""

import hashlib
import json
import shutil
import sys
import types

import jax
import numpy as np
import pytest
from safetensors import numpy as safetensors

from conclugen_jax import pretrain
from conclugen_jax.data import builders
from conclugen_jax.errors import ConclugenError
from conclugen_jax.evaluate import downstream, exchange, probe
from conclugen_jax.runs import checkpoint, config as config_lib, workdir as workdir_lib
from tests.helpers import Faces, assert_same_bits, run as command, tiny_config

DEVICES = jax.devices()[:1]
PRIVATE = "/home/someone"


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("exchange")


@pytest.fixture(scope="module")
def data(folder):
    return builders.build(Faces((64, 24, 23), missing=0.3), folder / "data")


@pytest.fixture(scope="module")
def config(data):
    return tiny_config(
        data,
        train__num_epochs=2,
        data__standardize="split",
        clustering__start_epoch=0,
        checkpoint__keep_newest=2,
        online_probe__path=PRIVATE,
        downstream__checkpoint=PRIVATE,
    )


@pytest.fixture(scope="module")
def run(folder, config):
    pretrain.pretrain(config, folder / "run", devices=DEVICES)
    return folder / "run"


@pytest.fixture(scope="module")
def export(folder, run):
    exchange.export_weights(run, folder / "export")
    return folder / "export"


@pytest.fixture(scope="module")
def imported(folder, export, data):
    exchange.import_weights(export, folder / "imported", data)
    return folder / "imported"


def edited(export, target, edit):
    """A copy of an export whose ``export.json`` is changed."""
    shutil.copytree(export, target)
    facts = json.loads((target / "export.json").read_text())
    edit(facts)
    (target / "export.json").write_text(json.dumps(facts))
    return target


def put(path, value):
    """An edit: the value at a dotted path; ``...``: it is removed."""
    *sections, last = path.split(".")

    def edit(facts):
        for section in sections:
            facts = facts[section]
        if value is ...:
            del facts[last]
        else:
            facts[last] = value

    return edit


def test_round_trip_bit_for_bit(run, export, imported, config, tmp_path):
    _, variables, _ = probe.load(run)
    _, found, read = probe.load(imported)
    assert_same_bits(found, variables)
    assert config_lib.differences(config, read) == [
        f"config.downstream.checkpoint: {PRIVATE} -> ",
        f"config.online_probe.path: {PRIVATE} -> ",
    ]
    assert workdir_lib.read_data(imported).fingerprint() == workdir_lib.read_data(run).fingerprint()
    exported = safetensors.load_file(export / "weights.safetensors")
    kernel = exported["params/representation/video/fc1/kernel"]
    np.testing.assert_array_equal(kernel, variables["params"]["representation"]["video"]["fc1"]["kernel"])
    assert {name.split("/")[0] for name in exported} == {"params", "batch_stats", "feature_stats"}
    with checkpoint.Checkpoints(imported, read_only=True) as saved:
        assert set(saved.restore_tree(8)[0]) == {"params", "batch_stats", "feature_stats"}
    again = exchange.export_weights(imported, tmp_path / "again")
    for path in export.iterdir():
        assert path.read_bytes() == (tmp_path / "again" / path.name).read_bytes()
    facts = json.loads((export / "export.json").read_text())
    assert again.step == facts["step"] == 8
    assert again.weights == hashlib.sha256((export / "weights.safetensors").read_bytes()).hexdigest()
    assert again.parameters == checkpoint.fingerprint(variables["params"])
    assert facts["data_set"]["name"] == "faces"


def test_an_export_names_no_place(run, export, data, tmp_path):
    text = (export / "export.json").read_text()
    assert PRIVATE not in text
    assert str(data) not in text
    places = {key: ["/etc"] if key == "data.test_paths" else "/etc" for key in workdir_lib.PLACES}
    other = edited(
        export, tmp_path / "made", lambda facts: [put(f"config.{key}", place)(facts) for key, place in places.items()]
    )
    exchange.import_weights(other, tmp_path / "run")
    assert "/etc" not in (tmp_path / "run" / "config.json").read_text()
    assert workdir_lib.read_config(tmp_path / "run").data.path == ""
    with pytest.raises(ConclugenError, match="no data set is named"):
        probe.represent_split(tmp_path / "run", "test")


def test_an_older_step(run, tmp_path):
    with checkpoint.Checkpoints(run, read_only=True) as saved:
        tree, _ = saved.restore_tree(4)
    assert exchange.export_weights(run, tmp_path / "old", "4").step == 4
    exchange.import_weights(tmp_path / "old", tmp_path / "run")
    assert_same_bits(probe.load(tmp_path / "run")[1]["params"], tree["params"])
    assert [row["step"] for row in exchange.listing(tmp_path / "run")] == [4]


def test_same_scores(run, imported, data, tmp_path):
    def scores(workdir):
        report = probe.label_efficiency_of_run(workdir, labels_per_class=(2, 0), num_draws=2)
        return [(r.num_labels, r.accuracy) for r in report.results]

    def linear(workdir):
        config = tiny_config(data, train__num_epochs=2, downstream__checkpoint=str(workdir))
        result = downstream.downstream(config, tmp_path / workdir.name, devices=DEVICES)
        return result["test"], result["encoder"] | {"workdir": ""}

    assert scores(imported) == scores(run)
    assert linear(imported) == linear(run)
    agreement = probe.cluster_agreement(probe.represent_split(imported, "test"))
    expected = probe.cluster_agreement(probe.represent_split(run, "test"))
    assert agreement == {name: x for name, x in expected.items() if name != "clusters of the run"}


def test_imported_weights_are_not_trained_further(imported, config):
    before = sorted(imported.rglob("*"))
    for moved in (False, True):
        with pytest.raises(ConclugenError, match=r"imported: holds imported weights.*choose another --workdir"):
            pretrain.pretrain(config, imported, devices=DEVICES, moved=moved)
    assert {p.name for p in set(imported.rglob("*")) - set(before)} <= {".lock"}


def test_listing(run, tmp_path):
    rows = exchange.listing(run)
    assert [(row["step"], row["newest"]) for row in rows] == [(4, False), (8, True)]
    losses = [row["loss"] for row in rows]
    with checkpoint.Checkpoints(run, read_only=True) as saved:
        assert [row["step"] for row in rows if row["best"]] == [saved.find("best")] == [4 + 4 * int(np.argmin(losses))]
    folder = run / "checkpoints" / "8"
    assert rows[1]["bytes"] == sum(p.stat().st_size for p in folder.rglob("*") if p.is_file())
    assert rows[0]["saved"] <= rows[1]["saved"]
    assert rows[1]["saved"].startswith("20")
    with checkpoint.Checkpoints(tmp_path) as saved:
        saved.save(1, {"x": np.ones(3)}, {})
    [row] = exchange.listing(tmp_path)
    assert (row["loss"], row["newest"], row["best"]) == (None, True, False)


def flip(path, place):
    content = path.read_bytes()
    path.write_bytes(content[:place] + bytes([content[place] ^ 0x80]) + content[place + 1 :])


def test_verify_finds_a_flipped_byte_in_any_file(run, tmp_path):
    copy = shutil.copytree(run, tmp_path / "run")
    assert exchange.verify(copy) == [{"step": 4, "wrong": ""}, {"step": 8, "wrong": ""}]
    paths = sorted(p for p in (copy / "checkpoints" / "8").rglob("*") if p.is_file())
    assert len(paths) > 10
    for path in paths:
        size = path.stat().st_size
        for place in (0, size // 2, size - 1):
            flip(path, place)
            other, found = exchange.verify(copy)
            assert other == {"step": 4, "wrong": ""}
            assert path.name in found["wrong"]
            assert str(tmp_path) not in found["wrong"]
            flip(path, place)
    assert exchange.verify(copy, "newest") == [{"step": 8, "wrong": ""}]
    paths[3].unlink()
    assert exchange.verify(copy, "newest")[0]["wrong"]
    assert exchange.verify(copy, 4) == [{"step": 4, "wrong": ""}]
    with pytest.raises(ConclugenError, match="no checkpoint '5'; there are"):
        exchange.verify(copy, "5")


def test_verify_says_nothing_of_reads_that_end_late(run, tmp_path, monkeypatch):
    copy, late = shutil.copytree(run, tmp_path / "copy"), []
    monkeypatch.setattr(sys, "unraisablehook", lambda unraisable: late.append(str(unraisable.exc_value)))
    biggest = max((copy / "checkpoints/8/state").rglob("d/*"), key=lambda p: p.stat().st_size)
    biggest.write_bytes(bytes(biggest.stat().st_size))
    checkpoint.seal(copy / "checkpoints/8")
    assert exchange.verify(copy, 8)[0]["wrong"].startswith("the checkpoint cannot be read (ValueError: ")
    assert late == []
    sys.unraisablehook(types.SimpleNamespace(exc_value=RuntimeError("Event loop is closed")))
    sys.unraisablehook(types.SimpleNamespace(exc_value=RuntimeError("another")))
    assert late == ["another"]


def test_verify_reads_what_has_no_hashes_of_files(run, tmp_path):
    copy = shutil.copytree(run, tmp_path / "run")
    folder = copy / "checkpoints" / "8"
    (folder / "SHA256SUMS").unlink()
    assert exchange.verify(copy, 8) == [{"step": 8, "wrong": ""}]
    record = folder / "record" / "metadata"
    record.write_text(record.read_text().replace('"step": 8', '"step": 9'))
    assert exchange.verify(copy, 8) == [{"step": 8, "wrong": "the checkpoint is not what was saved as step 8"}]


def test_a_damaged_checkpoint_is_not_exported(run, tmp_path):
    copy = shutil.copytree(run, tmp_path / "run")
    path = max((copy / "checkpoints" / "8").rglob("*"), key=lambda p: p.stat().st_size)
    path.write_bytes(path.read_bytes()[:-1])
    with pytest.raises(ConclugenError, match="is damaged"):
        exchange.export_weights(copy, tmp_path / "export")
    exchange.export_weights(copy, tmp_path / "export", 4)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["export", "run"]


def test_a_downstream_run_is_not_exported(tmp_path):
    (tmp_path / "result.json").touch()
    with pytest.raises(ConclugenError, match="a downstream run; name the pretraining run"):
        exchange.export_weights(tmp_path, tmp_path / "export")


def test_other_data(export, data, tmp_path):
    other = builders.build(Faces((64, 24, 23), missing=0.3, seed=1), tmp_path / "data")
    with pytest.raises(ConclugenError, match=r"not the data set that the run was trained on, faces 1\.0\.0"):
        exchange.import_weights(export, tmp_path / "run", other)
    assert not (tmp_path / "run").exists()


def test_nothing_half_made_is_left(run, export, tmp_path, monkeypatch):
    taken = tmp_path / "taken"
    taken.mkdir()
    exchange.import_weights(export, taken)  # empty folders may be filled
    before = sorted(tmp_path.rglob("*"))
    for makes in (lambda x: exchange.import_weights(export, x), lambda x: exchange.export_weights(run, x)):
        for place, message in ((taken, "is not an empty folder"), (taken / "config.json", "is not an empty folder")):
            with pytest.raises(ConclugenError, match=message):
                makes(place)
        with pytest.raises(ConclugenError, match="cannot be written"):
            makes(taken / "config.json" / "x")
        with monkeypatch.context() as patched:
            patched.setattr(exchange.os, "replace", lambda *_: (_ for _ in ()).throw(OSError(28, "No space left")))
            with pytest.raises(ConclugenError, match="No space left"):
                makes(tmp_path / "new")
        with monkeypatch.context() as patched:
            patched.setattr(
                checkpoint.Checkpoints, "_commit", lambda *_: (_ for _ in ()).throw(OSError(28, "No space"))
            )
            patched.setattr(
                exchange.Path, "write_bytes", lambda *_: (_ for _ in ()).throw(OSError(28, "No space left"))
            )
            with pytest.raises(ConclugenError, match=r"No space left|cannot be written"):
                makes(tmp_path / "new")
    assert sorted(tmp_path.rglob("*")) == before


def test_commands(run, data, tmp_path):
    copy = shutil.copytree(run, tmp_path / "run")
    first = command("launch.checkpoint", "export", f"--workdir={copy}", f"--output={tmp_path}/export", "--step=best")
    second = command("launch.checkpoint", "import", f"--source={tmp_path}/export", f"--workdir={tmp_path}/new")
    assert first.stdout.splitlines()[1:] == second.stdout.splitlines()[1:]
    assert len(first.stdout.split()[-1]) == 64
    shown = command("launch.checkpoint", "list", f"--workdir={copy}").stdout
    assert "newest" in shown
    assert "best" in shown
    listed = json.loads(command("launch.checkpoint", "list", f"--workdir={copy}", "--json").stdout)
    assert listed == exchange.listing(copy)
    (copy / "checkpoints" / "4" / "record" / "metadata").write_text("{}")
    damaged = command("launch.checkpoint", "verify", f"--workdir={copy}", code=2)
    assert (
        damaged.stdout
        == "step 4: the checkpoint is damaged (record/metadata has changed, is missing or was added)\nstep 8: ok\n"
    )
    assert "1 of 2 checkpoints damaged (step 4)" in damaged.stderr
    found = json.loads(command("launch.checkpoint", "verify", f"--workdir={copy}", "--json", code=2).stdout)
    assert [bool(row["wrong"]) for row in found] == [True, False]
    command("launch.checkpoint", "verify", f"--workdir={copy}", "--step=newest")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "'' is not a command; write list, verify, export, import"),
        (["list", "--workdir=/nowhere"], "no checkpoint here"),
        (["list", "--workdir=x", "--output=y"], "--output is no flag of 'list'"),
    ],
)
def test_mistakes_of_the_command_line(arguments, message):
    assert message in command("launch.checkpoint", *arguments, code=2).stderr
