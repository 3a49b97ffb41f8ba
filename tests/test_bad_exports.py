"""Exports that are damaged, hostile or of another kind are rejected in one sentence."""

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
from conclugen_jax.evaluate import exchange
from tests.helpers import Faces, tiny_config
from tests.test_exchange import edited, put


@pytest.fixture(scope="module")
def export(tmp_path_factory):
    folder = tmp_path_factory.mktemp("exports")
    data = builders.build(Faces(), folder / "data")
    config = tiny_config(data, train__num_epochs=1, clustering__start_epoch=0, data__standardize="split")
    pretrain.pretrain(config, folder / "run", devices=jax.devices()[:1])
    exchange.export_weights(folder / "run", folder / "export")
    return folder / "export"


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
    "no section": (put("config.model", ...), f"{CONFIGURATION} .*with sections such as .*'model'"),
    "section is a list": (put("config.loss", [1]), f"{CONFIGURATION} .*lacks config.loss.clustering_weight"),
    "size as text": (
        put("config.model.representation_dim", "32"),
        "config.model.representation_dim is '32', expected int",
    ),
    "size as fraction": (put("config.model.projection_dim", 16.0), "config.model.projection_dim is 16.0, expected int"),
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
        "config.model.norm_epsilon is 10{30}; it must be between",
    ),
    "unknown choice": (put("config.precision", "int4"), "config.precision is 'int4'; it must be one of"),
    "modality that is no name": (put("config.data.modalities", ["../video"]), "config.data.modalities is"),
    "modality as number": (put("config.data.modalities", [3]), "config.data.modalities is .3,., expected tuple of str"),
    "modality not of the data": (put("config.data.modalities", ["smell"]), "has no modality 'smell'"),
    "key with a dot": (put("config.train", {"a.b": 1}), CONFIGURATION),
    "fewer modalities": (
        put("config.data.modalities", ["video", "audio"]),
        "feature_stats/text/mean is .*expected none",
    ),
    "spare term": (put("config.loss.reconstruction_weight", 0), "params/decoder/.* is .*expected none"),
    "no manifest": (put("data", {}), "'data': damaged manifest .KeyError: 'format'"),
    "other manifest": (put("data.version", "2.0.0"), "'data' is not the manifest whose hash"),
    "size not of the manifest": (put("data.modalities.video", 25), "damaged manifest"),
    "hash of the data is no text": (put("data_set.sha256", [1]), "got `array` - at `[$].data_set"),
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
    refused(source, tmp_path, rf"{name}: (cannot be read|not a regular file)")


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
    "missing": (tensors(lambda a: a.pop(KERNEL)), f"{KERNEL} is missing"),
    "spare": (tensors(lambda a: a.update({"opt_state/x": a[KERNEL]})), "opt_state/x is .*expected none"),
    "name below another": (
        tensors(lambda a: a.update({f"{KERNEL}/x": a[KERNEL]})),
        f"{KERNEL}/x is .*expected none",
    ),
    "name that is a path": (tensors(lambda a: a.update({"../../x": a[KERNEL]})), "../../x is .*expected none"),
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
    refused(source, tmp_path, message if rehashed else "not the file whose SHA-256|is empty|is a pickle")
