"""Frozen networks give what torchvision, transformers, librosa and torch modules of the published layouts give."""

import json

import jax
import numpy as np
import pytest
from safetensors import numpy as safetensors

from conclugen_jax.errors import ConclugenError
from conclugen_jax.extract import backbones, davenet, mel, resnet, text_encoder, weights
from tests.parity import seeded
from tests.test_torch_files import FILES

REFERENCES = np.load(FILES.parent / "references.npz")
WIDTHS = davenet.WIDTHS


def close(found, expected, tolerance=1e-5):
    found, expected = np.asarray(found), np.asarray(expected)
    assert found.shape == expected.shape
    assert np.abs(found - expected).max() < tolerance * np.abs(expected).max()


def converted(folder, network, shapes, change=None, **options):
    """Weights written as published, read by the converter."""
    tensors = seeded.weights(shapes)
    if change is not None:
        change(tensors)
    safetensors.save_file(tensors, folder / "published.safetensors")
    weights.convert(network, folder / "published.safetensors", folder / network, **options)
    return weights.load(folder / network)


@pytest.mark.parametrize("depth", [18, 50])
def test_resnet(tmp_path, depth):
    loaded = converted(tmp_path, f"resnet{depth}", seeded.resnet(depth, 2, 10))
    backbone = backbones.create(loaded, backbones.Options(size=64, batch_items=2))
    assert (backbone.dim, backbone.modality) == (resnet.output_dim(depth), "video")
    close(backbone.vectors(seeded.images(2, 64, 64, 3)), REFERENCES[f"resnet{depth}"])


@pytest.mark.parametrize("depth", [18, 50])
def test_resnet3d(tmp_path, depth):
    loaded = converted(tmp_path, f"resnet3d{depth}", seeded.resnet(depth, 3, 10))
    backbone = backbones.create(loaded, backbones.Options(size=48, batch_items=16))
    close(backbone.vectors(seeded.images(1, 16, 48, 48, 3)), REFERENCES[f"resnet3d{depth}"])


@pytest.mark.parametrize("name", WIDTHS)
def test_resdavenet_hears_each_sound_as_if_it_were_alone(tmp_path, name):
    loaded = converted(tmp_path, "resdavenet", seeded.davenet(WIDTHS[name]))
    assert tuple(loaded.options["widths"]) == WIDTHS[name]
    module = davenet.ResDAVEnet(loaded.options["widths"], loaded.options["kernel_mels"])
    lengths = [100, 37, 1]
    filled = np.full((3, 128, 40), 7, np.float32)  # what lies beyond the end must not matter
    for i, frames in enumerate(lengths):
        filled[i, :frames] = seeded.spectrogram(frames, 40)
    found = jax.jit(module.apply)({"params": loaded.params}, filled, np.array(lengths))
    for i, frames in enumerate(lengths):
        close(found[i], REFERENCES[f"davenet {name} {frames} 40"])
    taller = module.apply({"params": loaded.params}, seeded.spectrogram(60, 128)[None], np.array([60]))
    close(taller[0], REFERENCES[f"davenet {name} 60 128"])


def write_text(folder, family, **changes):
    """A folder as Hugging Face lays it out."""
    folder.mkdir()
    config = seeded.TEXT[family] | changes
    (folder / "config.json").write_text(json.dumps(config))
    sizes = ("dim", "hidden_dim") if family == "distilbert" else ("hidden_size", "intermediate_size")
    width, hidden = (config[size] for size in sizes)
    layers = config["n_layers" if family == "distilbert" else "num_hidden_layers"]
    shapes = {
        "embeddings.word_embeddings.weight": (config["vocab_size"], width),
        "embeddings.position_embeddings.weight": (config["max_position_embeddings"], width),
    }
    if family != "distilbert":
        shapes["embeddings.token_type_embeddings.weight"] = (config["type_vocab_size"], width)
    dense = {
        "bert": ("attention.self.query", "attention.self.key", "attention.self.value", "attention.output.dense"),
        "distilbert": ("attention.q_lin", "attention.k_lin", "attention.v_lin", "attention.out_lin"),
    }["distilbert" if family == "distilbert" else "bert"]
    up, down = ("ffn.lin1", "ffn.lin2") if family == "distilbert" else ("intermediate.dense", "output.dense")
    norms = ("sa_layer_norm", "output_layer_norm")
    if family != "distilbert":
        norms = ("attention.output.LayerNorm", "output.LayerNorm")
    pairs = {"embeddings.LayerNorm": None}
    for i in range(layers):
        start = f"{'transformer' if family == 'distilbert' else 'encoder'}.layer.{i}."
        pairs |= {start + name: (width, width) for name in dense}
        pairs |= {start + up: (hidden, width), start + down: (width, hidden)}
        pairs |= {start + name: None for name in norms}
    for name, shape in pairs.items():
        shapes |= {f"{name}.weight": shape or (width,), f"{name}.bias": ((shape or (width,))[0],)}
    safetensors.save_file(seeded.weights(shapes), folder / "model.safetensors")
    (folder / "tokenizer.json").write_text(TOKENIZER)
    return folder


WORDS = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "i", "am", "very", "happy", "sad", "today"]
TOKENIZER = json.dumps(
    {
        "version": "1.0",
        "added_tokens": [],
        "normalizer": {"type": "Lowercase"},
        "pre_tokenizer": {"type": "Whitespace"},
        "post_processor": {
            "type": "BertProcessing",
            "sep": ["[SEP]", 3],
            "cls": ["[CLS]", 2],
        },
        "decoder": None,
        "model": {"type": "WordLevel", "vocab": {w: i for i, w in enumerate(WORDS)}, "unk_token": "[UNK]"},
    }
)


@pytest.mark.parametrize("family", seeded.TEXT)
def test_text_encoders(tmp_path, family):
    weights.convert("text", write_text(tmp_path / "published", family), tmp_path / "text")
    loaded = weights.load(tmp_path / "text")
    module = text_encoder.TextEncoder(**loaded.options)
    for length in (5, 20):
        ids, mask = seeded.tokens(length, family == "roberta")
        close(jax.jit(module.apply)({"params": loaded.params}, ids, mask), REFERENCES[f"text {family} {length}"])
        ids[1, 3:] = 9  # what is not real does not matter
        close(jax.jit(module.apply)({"params": loaded.params}, ids, mask), REFERENCES[f"text {family} {length}"])


def test_texts_of_any_length_are_tokenized_and_cut_off(tmp_path):
    weights.convert("text", write_text(tmp_path / "published", "roberta"), tmp_path / "text")
    backbone = backbones.create(weights.load(tmp_path / "text"), backbones.Options())
    assert backbone.prepare.max_tokens == 32  # two of 34 positions are not used
    clip = backbones.Clip([], np.zeros(0), 0.0, None, text="I am VERY happy today, am I")
    tokens, mask = backbone.prepare(clip, None)
    assert tokens[0, : mask.sum()].tolist() == [2, 4, 5, 6, 7, 9, 1, 5, 4, 3]
    assert tokens.shape == (1, 16)
    long = backbone.prepare(backbones.Clip([], np.zeros(0), 0.0, None, text="happy " * 500), None)
    assert long[0].shape == (1, 32)
    assert long[0][0, -1] == 3  # cut off before its end mark, not through it
    assert backbone.prepare(backbones.Clip([], np.zeros(0), 0.0, None, text=None), None) is None


@pytest.mark.parametrize("name", seeded.sounds())
def test_mel_front_ends(name):
    sound = seeded.sounds()[name]
    for front_end, (function, mels) in mel.FRONT_ENDS.items():
        expected = REFERENCES[f"mel {front_end} {name}"]
        assert expected.shape[1] == mels
        close(function(sound), expected, 2e-5)


def test_bfloat16_is_near(tmp_path):
    loaded = converted(tmp_path, "resnet18", seeded.resnet(18, 2, 10))
    backbone = backbones.create(loaded, backbones.Options(size=64, batch_items=2, precision="bfloat16"))
    vectors = np.asarray(backbone.vectors(seeded.images(2, 64, 64, 3)))
    assert vectors.dtype == np.float32
    error = np.abs(vectors - REFERENCES["resnet18"]).max() / np.abs(REFERENCES["resnet18"]).max()
    assert 1e-5 < error < 0.05


def test_every_tensor_is_accounted_for(tmp_path):
    def refusal(change):
        with pytest.raises(ConclugenError) as e:
            converted(tmp_path, "resnet18", seeded.resnet(18, 2, 10), change)
        assert not (tmp_path / "resnet18").exists()
        return str(e.value)

    assert "no tensor 'layer2.1.bn2.running_var'" in refusal(lambda t: t.pop("layer2.1.bn2.running_var"))
    assert "'layer9.weight' is not part of the network" in refusal(lambda t: t.update({"layer9.weight": np.zeros(3)}))

    def misshapen(t):
        t["layer1.0.conv1.weight"] = t["layer1.0.conv1.weight"][:, :5]

    assert "'layer1.0.conv1.weight' has the shape (64, 5, 3, 3), expected (64, 64, 3, 3)" in refusal(misshapen)
    assert "not finite" in refusal(lambda t: t.update({"conv1.weight": t["conv1.weight"] * np.inf}))
    assert "negative" in refusal(lambda t: t.update({"bn1.running_var": -t["bn1.running_var"]}))
    loaded = converted(tmp_path, "resnet18", seeded.resnet(18, 2, 10))
    facts = json.loads((loaded.folder / weights.FACTS).read_text())
    assert facts["left_out"] == ["fc.bias", "fc.weight"]
    assert facts["source"].keys() == {"published.safetensors"}
    with pytest.raises(ConclugenError, match="not an empty folder"):
        converted(tmp_path, "resnet18", seeded.resnet(18, 2, 10))


def test_names_in_front_and_entries(tmp_path):
    def wrapped(t):
        for name in list(t):
            t[f"module.{name}"] = t.pop(name)

    loaded = converted(tmp_path, "resnet18", seeded.resnet(18, 2, 10), wrapped)
    assert loaded.network == "resnet18"
    with pytest.raises(ConclugenError, match="no entry 'audio_model'"):
        weights.convert("resnet18", tmp_path / "published.safetensors", tmp_path / "b", entry="audio_model")


def test_weights_are_of_the_network_that_is_named(tmp_path):
    with pytest.raises(ConclugenError, match=r"no tensor 'layer1\.0\.conv3\.weight'|expected"):
        converted(tmp_path, "resnet50", seeded.resnet(18, 2, 10))
    with pytest.raises(ConclugenError, match="network 'vgg' is unknown; there are resnet18"):
        weights.convert("vgg", tmp_path / "published.safetensors", tmp_path / "out")
    with pytest.raises(ConclugenError, match="model_type is 'gpt2'"):
        weights.convert("text", write_text(tmp_path / "gpt", "bert", model_type="gpt2"), tmp_path / "out")


def test_changed_weights_are_noticed(tmp_path):
    loaded = converted(tmp_path, "resnet18", seeded.resnet(18, 2, 10))
    path = loaded.folder / weights.WEIGHTS
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)
    with pytest.raises(ConclugenError, match="not the file whose SHA-256"):
        weights.load(loaded.folder)
    (loaded.folder / weights.FACTS).write_text("{}")
    with pytest.raises(ConclugenError, match="not weights of format"):
        weights.load(loaded.folder)
    with pytest.raises(ConclugenError, match="no such file"):
        weights.load(tmp_path / "nowhere")
