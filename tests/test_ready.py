"""Ready backbones: found without being imported, refused if altered, named if absent; the networks against stored outputs."""

import dataclasses
import hashlib
import json
import re
import types
from pathlib import Path

import jax
import numpy as np
import pytest

from conclugen_jax.errors import ConclugenError
from conclugen_jax.extract import backbones, prediction, preparation, ready
from conclugen_jax.extract.backbones import Networks, Options
from conclugen_jax.extract.networks import conversion, convolution, efficientnet
from tests.parity import seeded
from tests.test_backbones import numbered
from tests.test_networks import REFERENCES, close

PACKAGE = "conclugen_weights_for_tests"


def efficientnet_params():
    """Variables of the published layout with seeded numbers."""
    return conversion.convert_efficientnet(conversion.Tensors(seeded.weights(seeded.efficientnet()), "seeded"))


@pytest.fixture
def package(tmp_path, monkeypatch):
    """A package whose weights a backbone `tiny` reads, and which cannot be imported."""
    folder = tmp_path / PACKAGE / "models"
    folder.mkdir(parents=True)
    (folder.parent / "__init__.py").write_text("raise RuntimeError('imported')")
    (folder / "a.pth").write_bytes(b"some numbers")
    entry = dataclasses.replace(
        ready.READY["efficientnet_lite0"],
        package="conclugen-weights-for-tests==1.0",
        files={f"{PACKAGE}/models/a.pth": hashlib.sha256(b"some numbers").hexdigest()},
        read=lambda path: ({}, efficientnet_params()),
    )
    monkeypatch.setitem(ready.READY, "tiny", entry)
    monkeypatch.syspath_prepend(str(tmp_path))
    backbones.load.cache_clear()
    yield folder
    backbones.load.cache_clear()


def test_weights_are_found_without_importing_their_package(package):
    (made,) = backbones.load(Networks(own=("tiny",), options=Options(batch_items=2)))
    assert (made.name, made.modality, made.dim, made.rate, made.batch_size) == ("tiny", "video", 1280, 1.0, 2)
    assert made.provenance["network"] == "efficientnet_lite0"
    assert made.provenance["sha256"] == hashlib.sha256(b"some numbers").hexdigest()
    assert made.provenance["source"]["licence"] == "Apache-2.0"
    (items,) = made.prepare(numbered(3.0), None)
    assert items.shape == (3, 224, 224, 3)
    assert items[:, 0, 0, 0].tolist() == [0, 16, 32]


def test_altered_and_absent_weights_are_refused(package):
    (package / "a.pth").write_bytes(b"others")
    found = hashlib.sha256(b"others").hexdigest()
    message = f"{package / 'a.pth'}: not the weights of tiny: SHA-256 is {found}, expected .*; "
    with pytest.raises(
        ConclugenError, match=message + "pip install --force-reinstall conclugen-weights-for-tests==1.0"
    ):
        ready.load("tiny")
    (package / "a.pth").unlink()
    with pytest.raises(ConclugenError, match="not the weights of tiny: SHA-256 is no file"):
        ready.load("tiny")


def test_an_absent_package_is_named(package):
    package.parent.rename(package.parent.with_name("elsewhere"))
    message = (
        "--backbone=tiny: the package conclugen-weights-for-tests is not installed; pip install 'conclugen_jax[ready]'"
    )
    with pytest.raises(ConclugenError, match=re.escape(message)):
        backbones.load(Networks(own=("tiny",)))


def test_unknown_names_are_answered_with_those_that_there_are():
    with pytest.raises(
        ConclugenError, match=r"--backbone=efficientnet: no backbone of this name; there are .*_lite0, .*of your own"
    ):
        backbones.load(Networks(own=("efficientnet",)))


def test_a_prediction_opens_ready_backbones_by_itself(package):
    networks = Networks(own=("tiny",), options=Options(batch_items=2))
    found = backbones.load(networks)
    facts = preparation.provenance(found, preparation.recipe(found), networks.options).to_json()
    manifest = types.SimpleNamespace(name="mine", source={"extraction": json.loads(json.dumps(facts))})
    opened, _ = prediction._same_way(manifest, "runs/linear", ["video"], Networks(), "", Path())
    assert [b.name for b in opened] == ["tiny"]


def test_every_entry_says_what_the_documentation_needs():
    page = (Path(__file__).parents[1] / "docs" / "extraction.md").read_text()
    project = (Path(__file__).parents[1] / "pyproject.toml").read_text()
    for name, entry in ready.READY.items():
        assert f"`{name}`" in page
        assert entry.licence in page
        assert not entry.package or (entry.package in project and entry.package.partition("==")[0] in page)
        for digest in entry.files.values():
            assert re.fullmatch("[0-9a-f]{64}", digest)
            assert digest in page


@pytest.mark.parametrize(("size", "stride"), [(3, 1), (3, 2), (5, 1), (5, 2)])
@pytest.mark.parametrize("form", ["_by_taps", "_grouped"])
def test_every_form_of_a_depthwise_convolution_is_the_convolution(size, stride, form):
    generator = np.random.default_rng(0)
    x, kernel = generator.normal(size=(2, 8, 7, 4)), generator.normal(size=(size, size, 1, 4))
    expected = jax.lax.conv_general_dilated(
        x, kernel, (stride,) * 2, "SAME", dimension_numbers=("NHWC", "HWIO", "NHWC"), feature_group_count=4
    )
    found = getattr(convolution, form)(convolution.pad_same(x, size, stride), kernel, stride)
    np.testing.assert_allclose(found, expected, rtol=1e-5, atol=1e-5)


def test_efficientnet():
    found = efficientnet.EfficientNetLite0().apply({"params": efficientnet_params()}, seeded.images(2, 70, 70, 3))
    close(found, REFERENCES["efficientnet_lite0"])
