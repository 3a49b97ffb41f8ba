"""Checkpoints handed on: the same network comes back, damage and made-up exports are refused, nothing is left half made."""

import hashlib
import json
import shutil
import struct

import jax
import numpy as np
import pytest
from safetensors import numpy as safetensors

from conclugen_jax import pretrain
from conclugen_jax.data import builders
from conclugen_jax.errors import ConclugenError
from conclugen_jax.evaluate import downstream, exchange, probe
from conclugen_jax.run import checkpoint, trees
from conclugen_jax.run import config as config_lib
from conclugen_jax.run import workdir as workdir_lib
from tests.helpers import Faces, assert_same_bits, tiny_config
from tests.helpers import run as command

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
        data__standardize=True,
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
    assert again.parameters == trees.fingerprint(variables["params"])
    assert facts["data_set"]["name"] == "faces"


def test_an_export_names_no_place(run, export, data, tmp_path):
    text = (export / "export.json").read_text()
    assert PRIVATE not in text
    assert str(data) not in text
    other = edited(
        export, tmp_path / "made", lambda facts: [put(f"config.{key}", "/etc")(facts) for key in workdir_lib.PLACES]
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


def nested(depth):
    tree = {}
    for _ in range(depth):
        tree = {"x": tree}
    return tree


CONFIGURATION = "the configuration cannot be used"
BAD_FACTS = {
    "other format": (
        put("format", "zip"),
        "not as expected .Invalid enum value 'zip' - at `[$].format`.*an export of version 1",
    ),
    "later version": (put("format_version", 2), "not as expected .* at `[$].format_version`"),
    "version by name": (put("format_version", "1"), "not as expected .* at `[$].format_version`"),
    "no step": (put("step", ...), "missing required field `step`"),
    "step that is true": (put("step", True), "Expected `int`, got `bool` - at `[$].step`"),
    "step that is text": (put("step", "8"), "Expected `int`, got `str` - at `[$].step`"),
    "negative step": (put("step", -1), "Expected `int` >= 0 - at `[$].step`"),
    "step too large": (put("step", 2**31), "Expected `int` <= 2147483647 - at `[$].step`"),
    "no configuration": (put("config", []), "Expected `object`, got `array` - at `[$].config`"),
    "no section": (put("config.model", ...), f"{CONFIGURATION} .*missing required field `model`"),
    "section is a list": (put("config.loss", [1]), f"{CONFIGURATION} .*got `array` - at `[$].loss`"),
    "size as text": (put("config.model.representation_dim", "32"), "got `str` - at `[$].model.representation_dim`"),
    "size as fraction": (put("config.model.projection_dim", 16.0), "got `float` - at `[$].model.projection_dim`"),
    "size out of range": (
        put("config.model.representation_dim", 2**40),
        "representation_dim is 1099511627776; it must",
    ),
    "size not the file's": (put("config.model.representation_dim", 64), "does not fit the model"),
    "weight that is no number": (put("config.loss.contrastive_weight", float("nan")), "contrastive_weight is nan"),
    "negative weight": (
        put("config.loss.contrastive_weight", -1.0),
        "contrastive_weight is -1.0; it must be at least 0",
    ),
    "number too large": (
        put("config.model.norm_epsilon", 10**30),
        "config.model.norm_epsilon is 1e.30; it must be between",
    ),
    "unknown choice": (put("config.precision", "int4"), "config.precision is 'int4'; it must be one of"),
    "modality that is no name": (put("config.data.modalities", ["../video"]), "config.data.modalities is"),
    "modality as number": (put("config.data.modalities", [3]), "got `int` - at `[$].data.modalities.0.`"),
    "modality not of the data": (put("config.data.modalities", ["smell"]), "has no modality 'smell'"),
    "key with a dot": (put("config.train", {"a.b": 1}), CONFIGURATION),
    "fewer modalities": (put("config.data.modalities", ["video", "audio"]), "is not part of the model"),
    "spare term": (put("config.loss.reconstruction_weight", 0), "params/decoder/.* is not part of the model"),
    "no manifest": (put("data", {}), "'data': damaged manifest .KeyError: 'format'"),
    "other manifest": (put("data.version", "2.0.0"), "'data' is not the manifest whose hash"),
    "size not of the manifest": (put("data.modalities.video", 25), "damaged manifest"),
    "hash of the data is no text": (put("data_set.sha256", [1]), "got `array` - at `[$].data_set.sha256`"),
    "hash of the weights": (put("weights_sha256", "0" * 64), "not the file whose SHA-256"),
    "hash of the parameters": (put("parameters_sha256", "0" * 64), "not the parameters whose hash"),
    "deep configuration": (put("config.train", nested(600)), "nested too deeply|cannot be used"),
    "deep manifest": (put("data.source", nested(600)), "nested too deeply|damaged manifest|not the manifest"),
}


@pytest.mark.parametrize("case", BAD_FACTS)
def test_bad_facts(export, tmp_path, case):
    edit, message = BAD_FACTS[case]
    source = edited(export, tmp_path / "made", edit)
    refused(source, tmp_path, message)


def refused(source, tmp_path, message):
    """The import ends in one sentence that names a file of the export, and leaves nothing."""
    with pytest.raises(ConclugenError, match=message) as caught:
        exchange.import_weights(source, tmp_path / "new" / "run")
    assert "\n" not in str(caught.value)
    assert str(caught.value).startswith(str(source))
    assert not (tmp_path / "new").exists()


@pytest.mark.parametrize(
    "text",
    ["", "[]", "{", "7", '{"format": "conclugen_jax weights"}', "[" * 200_000, "\ud800", '{"step": ' + "9" * 5000],
)
def test_not_json(export, tmp_path, text):
    source = shutil.copytree(export, tmp_path / "made")
    (source / "export.json").write_bytes(text.encode("utf-8", "surrogatepass"))
    refused(source, tmp_path, "not valid JSON|not as expected")


@pytest.mark.parametrize("name", ["export.json", "weights.safetensors"])
def test_a_file_is_missing(export, tmp_path, name):
    source = shutil.copytree(export, tmp_path / "made")
    (source / name).unlink()
    refused(source, tmp_path, rf"{name}: cannot be read")
    (source / name).mkdir()
    refused(source, tmp_path, rf"{name}: cannot be read")


def header(content, change):
    """The bytes of a safetensors file whose header is changed."""
    (size,) = struct.unpack("<Q", content[:8])
    tree = json.loads(content[8 : 8 + size])
    change(tree)
    text = json.dumps(tree).encode()
    return struct.pack("<Q", len(text)) + text + content[8 + size :]


KERNEL = "params/representation/video/fc1/kernel"


def tensors(change):
    def make(content):
        arrays = dict(safetensors.load(content))
        change(arrays)
        return safetensors.save(arrays)

    return make


UNREADABLE = "not a safetensors file that can be read"
BAD_WEIGHTS = {
    "empty": (lambda x: b"", UNREADABLE),
    "truncated": (lambda x: x[:-1], UNREADABLE),
    "truncated in the header": (lambda x: x[:100], UNREADABLE),
    "one byte more": (lambda x: x + b"\0", UNREADABLE),
    "header longer than the file": (lambda x: struct.pack("<Q", 2**40) + x[8:], UNREADABLE),
    "pickle": (lambda x: b"\x80\x04}.", UNREADABLE),
    "more claimed than there is": (
        lambda x: header(x, lambda h: h[KERNEL].update(shape=[2**20, 2**20], data_offsets=[0, 2**42])),
        UNREADABLE,
    ),
    "shape that does not fit its bytes": (lambda x: header(x, lambda h: h[KERNEL].update(shape=[7])), UNREADABLE),
    "negative shape": (lambda x: header(x, lambda h: h[KERNEL].update(shape=[-1, 2])), UNREADABLE),
    "unknown type": (lambda x: header(x, lambda h: h[KERNEL].update(dtype="O")), UNREADABLE),
    "integers": (lambda x: header(x, lambda h: h[KERNEL].update(dtype="I32")), f"{KERNEL} is int32.*expected float32"),
    "half the bits": (
        tensors(lambda a: a.update({KERNEL: a[KERNEL].astype(np.float16)})),
        f"{KERNEL} is float16.*expected float32",
    ),
    "other shape": (tensors(lambda a: a.update({KERNEL: a[KERNEL].T.copy()})), rf"{KERNEL} is float32\[32, 24\]"),
    "missing": (tensors(lambda a: a.pop(KERNEL)), f"{KERNEL} is missing of the configuration"),
    "spare": (tensors(lambda a: a.update({"opt_state/x": a[KERNEL]})), "opt_state/x is not part of the model"),
    "name below another": (
        tensors(lambda a: a.update({f"{KERNEL}/x": a[KERNEL]})),
        f"{KERNEL}/x is not part of the model",
    ),
    "name that is a path": (tensors(lambda a: a.update({"../../x": a[KERNEL]})), "x is not part of the model"),
    "not finite": (tensors(lambda a: a.update({KERNEL: a[KERNEL] * np.nan})), f"{KERNEL} has values that are not"),
    "other values": (tensors(lambda a: a.update({KERNEL: a[KERNEL] + 1})), "not the parameters whose hash"),
}


@pytest.mark.parametrize("case", BAD_WEIGHTS)
@pytest.mark.parametrize("rehashed", [True, False])
def test_bad_weights(export, tmp_path, case, rehashed):
    change, message = BAD_WEIGHTS[case]
    content = change((export / "weights.safetensors").read_bytes())
    digest = hashlib.sha256(content).hexdigest()
    source = edited(export, tmp_path / "made", put("weights_sha256", digest) if rehashed else lambda facts: None)
    (source / "weights.safetensors").write_bytes(content)
    refused(source, tmp_path, message if rehashed else "not the file whose SHA-256")


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
    assert damaged.stdout == "step 4: the checkpoint is damaged (record/metadata has changed)\nstep 8: ok\n"
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
