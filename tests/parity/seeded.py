"""Published layouts of weights with numbers that follow from their names: two frameworks have the same without a file."""

import zlib

import numpy as np

RESNET = {18: (2, 2, 2, 2), 50: (3, 4, 6, 3), 101: (3, 4, 23, 3), 152: (3, 8, 36, 3)}


def tensor(name, shape):
    """Numbers of a size at which activations neither vanish nor grow."""
    rng = np.random.default_rng(zlib.crc32(f"{name} {shape}".encode()))
    if name.endswith(("running_var", "scale")) or (name.endswith("weight") and len(shape) == 1):
        return rng.uniform(0.5, 1.0, shape).astype(np.float32)
    if len(shape) == 1:
        return rng.normal(0, 0.1, shape).astype(np.float32)
    inputs = int(np.prod(shape[1:])) if len(shape) > 2 else shape[1]
    return rng.normal(0, (2 / inputs) ** 0.5 if len(shape) > 2 else 0.05, shape).astype(np.float32)


def weights(shapes):
    """name -> numbers, for name -> shape."""
    return {name: tensor(name, tuple(shape)) for name, shape in shapes.items()}


def norm(name, width):
    return {f"{name}.{part}": (width,) for part in ("weight", "bias", "running_mean", "running_var")}


def resnet(depth, axes, classes):
    """Shapes of torchvision's ResNet, or of pretorched-x' in three dimensions."""
    shapes = {"conv1.weight": (64, 3, *(7,) * axes)} | norm("bn1", 64)
    channels = 64
    for stage, (width, count) in enumerate(zip((64, 128, 256, 512), RESNET[depth], strict=True), 1):
        for number in range(count):
            name, outputs = f"layer{stage}.{number}", width * (4 if depth >= 50 else 1)
            sizes = [(channels, width, 1), (width, width, 3), (width, outputs, 1)]
            if depth < 50:
                sizes = [(channels, width, 3), (width, width, 3)]
            for i, (before, after, side) in enumerate(sizes, 1):
                shapes |= {f"{name}.conv{i}.weight": (after, before, *(side,) * axes)} | norm(f"{name}.bn{i}", after)
            if number == 0 and (stage > 1 or channels != outputs):
                shapes |= {f"{name}.downsample.0.weight": (outputs, channels, *(1,) * axes)}
                shapes |= norm(f"{name}.downsample.1", outputs)
            channels = outputs
    head = "fc" if axes == 2 else "last_linear"
    return shapes | {f"{head}.weight": (classes, channels), f"{head}.bias": (classes,)}


def davenet(widths, mels=40):
    """Shapes of the published ResDAVEnet."""
    shapes = norm("batchnorm1", 1) | {"conv1.weight": (widths[0], 1, mels, 1)} | norm("bn1", widths[0])
    channels = widths[0]
    for stage, width in enumerate(widths[1:], 1):
        for number in range(2):
            name = f"layer{stage}.{number}"
            for i, before in ((1, channels), (2, width)):
                shapes |= {f"{name}.conv{i}.weight": (width, before, 1, 9)} | norm(f"{name}.bn{i}", width)
            if number == 0:
                shapes |= {f"{name}.downsample.0.weight": (width, channels, 1, 1)}
                shapes |= norm(f"{name}.downsample.1", width)
            channels = width
    return shapes


EFFICIENTNET = ((1, 16, 3, 1, 1), (2, 24, 3, 2, 6), (2, 40, 5, 2, 6), (3, 80, 3, 2, 6), (3, 112, 5, 1, 6))
EFFICIENTNET += ((4, 192, 5, 2, 6), (1, 320, 3, 1, 6))  # blocks, channels, kernel, stride, expansion


def efficientnet():
    """Shapes of EfficientNet-Lite0 as published for PyTorch."""
    shapes = {"_conv_stem.weight": (32, 3, 3, 3)} | norm("_bn0", 32)
    channels, number = 32, 0
    for count, outputs, size, _, expansion in EFFICIENTNET:
        for _ in range(count):
            name, width = f"_blocks.{number}.", channels * expansion
            if expansion > 1:
                shapes |= {f"{name}_expand_conv.weight": (width, channels, 1, 1)} | norm(f"{name}_bn0", width)
            shapes |= {f"{name}_depthwise_conv.weight": (width, 1, size, size)} | norm(f"{name}_bn1", width)
            shapes |= {f"{name}_project_conv.weight": (outputs, width, 1, 1)} | norm(f"{name}_bn2", outputs)
            channels, number = outputs, number + 1
    shapes |= {"_conv_head.weight": (1280, channels, 1, 1)} | norm("_bn1", 1280)
    return shapes | {"_fc.weight": (1000, 1280), "_fc.bias": (1000,)}


WHISPER = {"width": 48, "num_layers": 2, "num_heads": 4, "states": 40}  # a small encoder


def whisper():
    """Shapes of the encoder of Whisper in CTranslate2."""
    width, shapes = WHISPER["width"], {}
    for name, inputs in (("conv1", 80), ("conv2", width)):
        shapes |= {f"{name}/weight": (width, inputs, 3), f"{name}/bias": (width,)}
    for number in range(WHISPER["num_layers"]):
        layer = f"layer_{number}"
        for part, inputs, outputs in (
            ("self_attention/linear_0", width, 3 * width),
            ("self_attention/linear_1", width, width),
            ("ffn/linear_0", width, 4 * width),
            ("ffn/linear_1", 4 * width, width),
        ):
            shapes |= {f"{layer}/{part}/weight": (outputs, inputs), f"{layer}/{part}/bias": (outputs,)}
        for part in ("self_attention", "ffn"):
            shapes |= {f"{layer}/{part}/layer_norm/{kind}": (width,) for kind in ("gamma", "beta")}
    shapes |= {"layer_norm/gamma": (width,), "layer_norm/beta": (width,)}
    shapes["position_encodings/encodings"] = (WHISPER["states"], width)
    return {f"encoder/{name}": shape for name, shape in shapes.items()}


TEXT = {
    "bert": {
        "model_type": "bert",
        "vocab_size": 60,
        "hidden_size": 48,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "intermediate_size": 96,
        "max_position_embeddings": 32,
        "type_vocab_size": 2,
        "layer_norm_eps": 1e-12,
        "hidden_act": "gelu",
    },
    "roberta": {
        "model_type": "roberta",
        "vocab_size": 60,
        "hidden_size": 48,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "intermediate_size": 96,
        "max_position_embeddings": 34,
        "type_vocab_size": 1,
        "pad_token_id": 1,
        "layer_norm_eps": 1e-5,
        "hidden_act": "gelu",
    },
    "distilbert": {
        "model_type": "distilbert",
        "vocab_size": 60,
        "dim": 48,
        "n_layers": 2,
        "n_heads": 4,
        "hidden_dim": 96,
        "max_position_embeddings": 32,
        "activation": "gelu",
    },
}
"""Configurations as they are published, of small encoders."""


def images(*shape):
    return np.random.default_rng(5).integers(0, 256, shape, dtype=np.uint8)


def faces():
    """Three pictures of 112 x 112: drawn faces that smile and wonder, and noise."""
    y, x = np.mgrid[:112, :112].astype(np.float64)
    rng = np.random.default_rng(7)

    def face(smile, opening):
        picture = np.full((112, 112, 3), (90.0, 110.0, 130.0)) + (x[..., None] - 56) / 4
        bend = smile * ((x - 56) / 16) ** 2
        ellipses = [((56, 58), (38, 50), (225, 180, 150)), ((56, 84 + bend), (17, opening), (150, 60, 70))]
        for eye in (38, 74):
            ellipses += [((eye, 36 - opening / 3), (11, 2.5), (80, 50, 40)), ((eye, 46), (9, 5), (250, 250, 250))]
            ellipses += [((eye, 46), (4, 4), (60, 40, 30)), ((56, 62), (5, 8), (200, 150, 125))]
        for (at_x, at_y), (wide, high), colour in ellipses:
            picture[((x - at_x) / wide) ** 2 + ((y - at_y) / high) ** 2 <= 1] = colour
        return np.clip(picture + rng.normal(0, 4, picture.shape), 0, 255).astype(np.uint8)

    return np.stack([face(-8, 4), face(2, 11), images(112, 112, 3)])


def spectrogram(frames, mels):
    return np.random.default_rng(frames + mels).normal(size=(frames, mels)).astype(np.float32)


def tokens(length, padding):
    """Two texts, the second of three tokens."""
    ids = np.random.default_rng(length).integers(5, 60, (2, length)).astype(np.int32)
    mask = np.ones((2, length), bool)
    mask[1, 3:], ids[1, 3:] = False, padding
    return ids, mask


def sounds():
    rng = np.random.default_rng(3)
    return {
        "noise": (0.1 * rng.normal(size=16_123)).astype(np.float32),
        "tone": np.sin(np.arange(8000) * 0.05).astype(np.float32),
        "short": rng.normal(size=150).astype(np.float32),
    }


def chirp():
    """Sound of 2 s that rises from 200 Hz."""
    times = np.arange(32_000) / 16_000
    return (0.3 * np.sin(2 * np.pi * 200 * times * (1 + times))).astype(np.float32)
