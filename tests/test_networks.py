"""Frozen networks give what torchvision, transformers, librosa and torch modules of the published layouts give."""

import json
import math

import jax
import numpy as np
import pytest
from safetensors import numpy as safetensors

from conclugen_jax.errors import ConclugenError
from conclugen_jax.extract import backbones
from conclugen_jax.extract.media import mel
from conclugen_jax.extract.media.clip import Clip
from conclugen_jax.extract.networks import conversion, convolution, davenet, mtcnn, resnet, text_encoder, weights
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
    assert (backbone.dim, backbone.modality) == (512 if depth == 18 else 2048, "video")
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


@pytest.mark.parametrize("channels", [3, 24, 512])
@pytest.mark.parametrize(
    ("time", "taps", "stride"),
    [(1, 3, 1), (2, 3, 1), (5, 3, 1), (6, 3, 1), (2, 3, 2), (5, 3, 2), (6, 7, 1), (7, 7, 1), (8, 7, 2), (4, 1, 1)],
)
def test_every_form_of_a_convolution_is_the_convolution(time, taps, stride, channels):
    generator = np.random.default_rng(0)
    x = generator.normal(size=(2, time, 9, 8, channels)).astype(np.float32)
    kernel = generator.normal(size=(taps, 3, 3, channels, 4)).astype(np.float32)
    edges = ((taps - 1) // 2, 1, 1)
    found = jax.jit(convolution.convolve, static_argnums=(2, 3))(x, kernel, (stride, stride, stride), edges)
    padded = np.pad(x.astype(np.float64), ((0, 0), *((p, p) for p in edges), (0, 0)))
    windows = np.lib.stride_tricks.sliding_window_view(padded, kernel.shape[:3], axis=(1, 2, 3))
    windows = windows[:, ::stride, ::stride, ::stride]
    close(found, np.einsum("nthwcijk,ijkcf->nthwf", windows, kernel.astype(np.float64), optimize=True))


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
    module = text_encoder.TextEncoder(text_encoder.Options(**loaded.options))
    for length in (5, 20):
        ids, mask = seeded.tokens(length, family == "roberta")
        close(jax.jit(module.apply)({"params": loaded.params}, ids, mask), REFERENCES[f"text {family} {length}"])
        ids[1, 3:] = 9  # what is not real does not matter
        close(jax.jit(module.apply)({"params": loaded.params}, ids, mask), REFERENCES[f"text {family} {length}"])


def test_texts_of_any_length_are_tokenized_and_cut_off(tmp_path):
    weights.convert("text", write_text(tmp_path / "published", "roberta"), tmp_path / "text")
    backbone = backbones.create(weights.load(tmp_path / "text"), backbones.Options())
    assert backbone.provenance["max_tokens"] == 32  # two of 34 positions are not used
    clip = Clip([], np.zeros(0), 0.0, None, text="I am VERY happy today, am I")
    tokens, mask = backbone.prepare(clip, None)
    assert tokens[0, : mask.sum()].tolist() == [2, 4, 5, 6, 7, 9, 1, 5, 4, 3]
    assert tokens.shape == (1, 16)
    long = backbone.prepare(Clip([], np.zeros(0), 0.0, None, text="happy " * 500), None)
    assert long[0].shape == (1, 32)
    assert long[0][0, -1] == 3  # cut off before its end mark, not through it
    assert backbone.prepare(Clip([], np.zeros(0), 0.0, None, text=None), None) is None


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
    with pytest.raises(ConclugenError, match="model_type is 'gpt2' with learned positions, expected one of bert,"):
        weights.convert("text", write_text(tmp_path / "gpt", "bert", model_type="gpt2"), tmp_path / "out")


def test_weights_of_mtcnn_in_the_layout_of_facenet_pytorch():
    ours = weights.load(mtcnn.WEIGHTS).params
    published = []
    for network in mtcnn.NETWORKS:
        layers = ours[network]
        tensors = {f"{name}.weight": layer["slope"] for name, layer in layers.items() if "slope" in layer}
        for name, layer in layers.items():
            if "kernel" not in layer:
                continue
            kernel, (inputs, outputs) = layer["kernel"], layer["kernel"].shape[-2:]
            if kernel.ndim == 4:
                kernel = np.einsum("hwio->oihw", kernel)
            elif name in ("dense4", "dense5") and inputs > 256:  # PyTorch: permute(0, 3, 2, 1), then flattened
                kernel = np.einsum("hwco->owhc", kernel.reshape(3, 3, -1, outputs)).reshape(outputs, inputs)
            else:
                kernel = kernel.T
            tensors |= {f"{name}.weight": kernel, f"{name}.bias": layer["bias"]}
        published.append(conversion.Tensors(tensors, network))
    again = conversion.convert_mtcnn(published)
    jax.tree.map(np.testing.assert_array_equal, again, ours)


@pytest.mark.parametrize(("key", "value"), [("pad_token_id", None), ("type_vocab_size", "2")])
def test_configurations_of_encoders_are_checked(tmp_path, key, value):
    folder = write_text(tmp_path / "published", "roberta")
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {key: value}))
    with pytest.raises(ConclugenError, match=rf"config\.json: not as expected .*\$\.{key}"):
        weights.convert("text", folder, tmp_path / "text")


def test_activations_by_name():
    x = np.linspace(-3, 3, 7, dtype=np.float32)
    tanh = 0.5 * x * (1 + np.tanh(np.sqrt(2 / np.pi) * (x + 0.044715 * x**3)))
    exact = 0.5 * x * (1 + np.vectorize(math.erf)(x / math.sqrt(2)))
    for name, expected in (
        ("gelu", exact),
        ("gelu_new", tanh),
        ("gelu_pytorch_tanh", tanh),
        ("silu", x / (1 + np.exp(-x))),
    ):
        np.testing.assert_allclose(text_encoder.ACTIVATIONS[name](x), expected, atol=2e-6)
    assert np.abs(tanh - exact).max() > 1e-4


@pytest.mark.parametrize(
    ("count", "lengths"), [(1, [1]), (7, [7]), (16, [16]), (23, [16]), (24, [16, 8]), (25, [16, 9])]
)
def test_windows_of_sixteen_frames(count, lengths):
    frames = [np.full((4, 4, 3), i, np.uint8) for i in range(count)]
    clip = Clip(frames, np.arange(count) / 16, 16.0, None)
    (found,) = backbones.frames(clip, None, rate=16.0, size=4, window=16)
    at = 0
    for window, length in zip(found, lengths, strict=True):
        shown = [*range(at, at + length), *[at + length - 1] * (16 - length)]
        assert window[:, 0, 0, 0].tolist() == shown
        at += length


def test_the_authors_normalisation_exchanges_mean_and_deviation(tmp_path):
    loaded = converted(tmp_path, "resnet18", seeded.resnet(18, 2, 10))
    usual, authors = (
        backbones.create(loaded, backbones.Options(size=32, authors_normalisation=a)) for a in (False, True)
    )
    assert authors.provenance["mean"] == usual.provenance["std"] == list(backbones.IMAGENET[1])
    images = seeded.images(16, 32, 32, 3)
    assert not np.allclose(usual.vectors(images), authors.vectors(images))


@pytest.mark.parametrize(("depth", "count"), [(18, 8), (34, 16), (50, 16), (101, 33), (152, 50)])
def test_networks_are_as_deep_as_their_names_say(depth, count):
    assert sum(resnet.STAGES[depth]) == count


@pytest.mark.parametrize(
    ("network", "name", "value"),
    [
        *(("resdavenet", "widths", x) for x in (None, "", [], {}, [1] * 1000, [128, 128, 256, 512, -1])),
        *(("resdavenet", "kernel_mels", x) for x in (None, "40", [], 10**20)),
        ("resdavenet", "more", 1),
        *(("text", "activation", x) for x in ("x", 0, None, [])),
        *(("text", "num_layers", x) for x in (2**31, 0, 1.5)),
        *(("text", "max_positions", x) for x in (10**9, 10**20, True)),
        ("text", "first_position", -(10**20)),
        ("text", "num_heads", 7),
        ("text", "epsilon", 0.0),
        ("resnet18", "depth", 9),
    ],
)
def test_options_that_make_no_network_are_refused_at_once(tmp_path, network, name, value):
    options = {
        "text": dict.fromkeys(("vocabulary", "hidden_dim", "max_positions"), 16) | {"width": 8, "num_heads": 2},
        "resdavenet": {"widths": [128, 128, 256, 512, 1024], "kernel_mels": 40},
        "resnet18": {},
    }[network]
    if network == "text":
        options |= {"num_layers": 1, "first_position": 0, "num_types": 0, "activation": "gelu", "epsilon": 1e-12}
    loaded = weights.Weights(network, options | {name: value}, {"layer0": {}}, "", {}, tmp_path)
    with pytest.raises(ConclugenError, match=rf"its options make no network \(.*{name}.*\); convert"):
        backbones.create(loaded, backbones.Options())


def test_options_and_tokenizer_are_part_of_what_is_compared(tmp_path):
    weights.convert("text", write_text(tmp_path / "published", "bert"), tmp_path / "text")
    known = weights.load(tmp_path / "text").provenance()
    facts = json.loads((tmp_path / "text" / weights.FACTS).read_text())
    facts["options"]["num_heads"] //= 2
    (tmp_path / "text" / weights.FACTS).write_text(json.dumps(facts))
    assert weights.load(tmp_path / "text").provenance()["options"] != known["options"]
    (tmp_path / "text" / weights.TOKENIZER).write_text(TOKENIZER.replace("happy", "merry"))
    assert weights.load(tmp_path / "text").provenance()["tokenizer"] != known["tokenizer"]
    (tmp_path / "text" / weights.TOKENIZER).write_text("{}")
    with pytest.raises(ConclugenError, match="not a tokenizer that can be read"):
        backbones.create(weights.load(tmp_path / "text"), backbones.Options())
    facts["options"] |= {"max_positions": -1}
    (tmp_path / "text" / weights.FACTS).write_text(json.dumps(facts))
    (tmp_path / "text" / weights.TOKENIZER).write_text(TOKENIZER)
    with pytest.raises(
        ConclugenError, match=r"its options make no network \(.*max_positions.*\); convert the weights again"
    ):
        backbones.create(weights.load(tmp_path / "text"), backbones.Options())


def test_a_full_disk_leaves_no_half_of_the_weights(tmp_path, monkeypatch):
    def full(*_, **__):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(weights.Path, "write_bytes", full)
    with pytest.raises(ConclugenError, match=r"cannot be written \(No space left on device\)"):
        converted(tmp_path, "resnet18", seeded.resnet(18, 2, 10))
    assert [p.name for p in tmp_path.iterdir()] == ["published.safetensors"]


def test_changed_weights_are_noticed(tmp_path):
    loaded = converted(tmp_path, "resnet18", seeded.resnet(18, 2, 10))
    path = loaded.folder / weights.WEIGHTS
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)
    with pytest.raises(ConclugenError, match="not the file whose SHA-256"):
        weights.load(loaded.folder)
    (loaded.folder / weights.FACTS).write_text("{}")
    with pytest.raises(ConclugenError, match=r"network\.json: not as expected .*; convert the weights again"):
        weights.load(loaded.folder)
    with pytest.raises(
        ConclugenError, match=r"cannot be read \(No such file or directory\); convert the weights again"
    ):
        weights.load(tmp_path / "nowhere")
