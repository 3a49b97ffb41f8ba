"""Convert published weights to variables of our networks. Every tensor is taken, known to be of no use, or refused by name."""

import re
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import numpy as np

from conclugen_jax.errors import ConclugenError
from conclugen_jax.extract.networks import davenet, mtcnn, resnet, text_encoder

EPSILON = 1e-5
"""Of BatchNorm in all networks with one."""

HEADS = (
    "fc.",
    "last_linear.",
    "classifier.",
    "lm_head.",
    "cls.",
    "pre_classifier.",
    "vocab_",
    "pooler.",
    "qa_outputs.",
)
"""Prefixes of layers behind the features, which are dropped."""

COUNTERS = "num_batches_tracked"


class Tensors:
    """Tensors of a published file that are taken one by one.

    Attributes:
      source: name of the file, for messages.
      left_out: names of tensors that were dropped.
    """

    def __init__(self, tensors: Mapping[str, Any], source: str):
        self._tensors, self.source = dict(tensors), source
        self.left_out: list[str] = []

    def take(self, name: str, *shape: int) -> np.ndarray:
        """Remove a tensor and return it as float32.

        Raises:
          ConclugenError: it is missing, of another shape, or holds values that are not finite.
        """
        x = self._tensors.pop(name, None)
        if not isinstance(x, np.ndarray):
            near = ", ".join(sorted(self._tensors)[:3])
            raise ConclugenError(
                f"{self.source}: no tensor {name!r}; it has {near or 'none that is left'}: is it of this network?"
            )
        if x.shape != shape:
            raise ConclugenError(f"{self.source}: {name!r} has the shape {x.shape}, expected {shape}")
        x = x.astype(np.float32)
        if not np.isfinite(x).all():
            raise ConclugenError(f"{self.source}: {name!r} has values that are not finite in float32; fetch it again")
        return x

    def has(self, prefix: str) -> bool:
        """Return whether the name of a tensor that is left begins so."""
        return any(name.startswith(prefix) for name in self._tensors)

    def shape(self, name: str) -> tuple[int, ...]:
        """Return the shape of a tensor that is left; () if there is none."""
        return getattr(self._tensors.get(name), "shape", ())

    def count(self, pattern: str) -> int:
        """1 + the greatest number that a regular expression's group finds among the names that are left, 0 for none."""
        found = [re.match(pattern, name) for name in self._tensors]
        return max((int(match[1]) + 1 for match in found if match), default=0)

    def leave_out(self, *prefixes: str) -> None:
        """Drop tensors that are known and not needed."""
        for name in [name for name in self._tensors if name.startswith(prefixes) or name.endswith(COUNTERS)]:
            del self._tensors[name]
            if not name.endswith(COUNTERS):
                self.left_out.append(name)

    def finish(self) -> None:
        """Refuse a file with any tensor that was not taken or dropped."""
        if self._tensors:
            name = min(self._tensors)
            raise ConclugenError(
                f"{self.source}: {name!r} is not part of the network ({len(self._tensors)} such tensors); name the network "
                "that the weights are of"
            )


def tensors_of(tree: Mapping[str, Any], source: str, entry: str = "") -> Tensors:
    """Return the tensors in what a file holds.

    Args:
      tree: tensors by name, perhaps in an entry ``state_dict``, perhaps each with the prefix ``module.``.
      source: name of the file, for messages.
      entry: the one to use; dots separate nested entries.

    Raises:
      ConclugenError: there is no such entry.
    """
    for name in filter(None, entry.split(".")):
        if not isinstance(tree.get(name), Mapping):
            raise ConclugenError(f"{source}: no entry {name!r} with tensors; it has {', '.join(map(str, tree))[:200]}")
        tree = tree[name]
    while not entry and isinstance(tree.get("state_dict"), Mapping):
        tree = tree["state_dict"]
    if tree and all(name.startswith("module.") for name in tree):
        tree = {name.removeprefix("module."): x for name, x in tree.items()}
    return Tensors(tree, source)


def folded(tensors: Tensors, convolution: str, norm: str, shape: Sequence[int]) -> dict[str, np.ndarray]:
    """Fold a convolution without bias [out, in, ...] and its BatchNorm into a kernel [..., in, out] and a bias [out]."""
    kernel = tensors.take(f"{convolution}.weight", *shape).astype(np.float64)
    scale, shift, mean, variance = (
        tensors.take(f"{norm}.{name}", shape[0]).astype(np.float64)
        for name in ("weight", "bias", "running_mean", "running_var")
    )
    if (variance < 0).any():
        raise ConclugenError(f"{tensors.source}: '{norm}.running_var' has negative values; fetch it again")
    scale /= np.sqrt(variance + EPSILON)
    kernel = np.moveaxis(kernel, (0, 1), (-1, -2)) * scale
    return {"kernel": kernel.astype(np.float32), "bias": (shift - mean * scale).astype(np.float32)}


def convert_resnet(tensors: Tensors, depth: int, num_axes: int) -> dict[str, Any]:
    """Return variables of a :class:`~conclugen_jax.extract.networks.resnet.ResNet` named as by torchvision or pretorched-x."""

    def cube(size: int) -> tuple[int, ...]:
        return (size,) * num_axes

    params = {"conv1": folded(tensors, "conv1", "bn1", (resnet.STEM, 3, *cube(7)))}
    channels = resnet.STEM
    for name, width, _, projects in resnet.blocks(depth):
        old = name.replace("_", ".")
        outputs = width * (4 if resnet.is_bottleneck(depth) else 1)
        if resnet.is_bottleneck(depth):
            shapes = [(width, channels, *cube(1)), (width, width, *cube(3)), (outputs, width, *cube(1))]
        else:
            shapes = [(width, channels, *cube(3)), (width, width, *cube(3))]
        block = {
            f"conv{i}": folded(tensors, f"{old}.conv{i}", f"{old}.bn{i}", shape) for i, shape in enumerate(shapes, 1)
        }
        if projects:
            shape = (outputs, channels, *cube(1))
            block["downsample"] = folded(tensors, f"{old}.downsample.0", f"{old}.downsample.1", shape)
        params[name], channels = block, outputs
    tensors.leave_out(*HEADS)
    tensors.finish()
    return params


def convert_davenet(tensors: Tensors) -> tuple[dict[str, Any], dict[str, Any]]:
    """Return variables of :class:`conclugen_jax.extract.networks.davenet.ResDAVEnet`, and its attributes from the shapes."""
    shape = tensors.shape("conv1.weight")
    mels = shape[2] if len(shape) == 4 else 40
    widths = [shape[0] if shape else 128] + [
        (tensors.shape(f"layer{stage}.0.conv1.weight") or (0,))[0] for stage in (1, 2, 3, 4)
    ]
    params = {"conv1": folded(tensors, "conv1", "bn1", (widths[0], 1, mels, 1))}
    channels = widths[0]
    for name, width, stride in davenet.blocks(widths):
        old = name.replace("_", ".")
        params[name] = {
            "conv1": folded(tensors, f"{old}.conv1", f"{old}.bn1", (width, channels, 1, davenet.KERNEL)),
            "conv2": folded(tensors, f"{old}.conv2", f"{old}.bn2", (width, width, 1, davenet.KERNEL)),
        }
        if stride > 1:
            old = f"{old}.downsample"
            params[name]["downsample"] = folded(tensors, f"{old}.0", f"{old}.1", (width, channels, 1, 1))
        channels = width
    tensors.leave_out("batchnorm1.")  # declared by the published code and not used by it
    tensors.finish()
    return params, {"widths": widths, "kernel_mels": mels}


FAMILIES = ("bert", "roberta", "distilbert")


def text_options(config: Mapping[str, Any], source: str) -> tuple[str, dict[str, Any]]:
    """Return the family and the attributes of a text encoder that a published ``config.json`` describes.

    Raises:
      ConclugenError: a family or an activation that is not known, or a size that is missing.
    """
    family = config.get("model_type")
    if family not in FAMILIES:
        raise ConclugenError(f"{source}: model_type is {family!r}, expected one of {', '.join(FAMILIES)}")
    if config.get("position_embedding_type", "absolute") != "absolute" or config.get("sinusoidal_pos_embds"):
        raise ConclugenError(f"{source}: positions that are not learned ones; such encoders are not known here")
    names = {
        "vocabulary": "vocab_size",
        "width": "hidden_size",
        "num_layers": "num_hidden_layers",
        "num_heads": "num_attention_heads",
        "hidden_dim": "intermediate_size",
        "max_positions": "max_position_embeddings",
    }
    if family == "distilbert":
        names |= {"width": "dim", "num_layers": "n_layers", "num_heads": "n_heads", "hidden_dim": "hidden_dim"}
    for name in names.values():
        if type(config.get(name)) is not int or not 0 < config[name] < 2**24:
            raise ConclugenError(f"{source}: {name} is {config.get(name)!r}, expected a number of the encoder's size")
    options: dict[str, Any] = {name: config[old] for name, old in names.items()}
    if options["width"] % options["num_heads"]:
        raise ConclugenError(f"{source}: a width of {options['width']} for {options['num_heads']} heads")
    activation = config.get("activation" if family == "distilbert" else "hidden_act", "gelu")
    if activation not in text_encoder.ACTIVATIONS:
        raise ConclugenError(f"{source}: activation {activation!r}, expected {', '.join(text_encoder.ACTIVATIONS)}")
    options["activation"] = activation
    epsilon = 1e-12 if family == "distilbert" else config.get("layer_norm_eps", 1e-12)
    if type(epsilon) is not float or not 0 < epsilon < 1:
        raise ConclugenError(f"{source}: layer_norm_eps is {epsilon!r}, expected a small number")
    options["epsilon"] = epsilon
    padding, types = config.get("pad_token_id", 1), config.get("type_vocab_size", 2)
    if family == "roberta" and (type(padding) is not int or not 0 <= padding < options["max_positions"] - 1):
        raise ConclugenError(f"{source}: pad_token_id is {padding!r}, expected the number of a token, usually 1")
    if family != "distilbert" and (type(types) is not int or types < 0):
        raise ConclugenError(f"{source}: type_vocab_size is {types!r}, expected a number of token types, usually 2")
    options["first_position"] = padding + 1 if family == "roberta" else 0
    options["num_types"] = 0 if family == "distilbert" else types
    return family, options


_BERT = {
    "q": "attention.self.query",
    "k": "attention.self.key",
    "v": "attention.self.value",
    "out": "attention.output.dense",
    "up": "intermediate.dense",
    "down": "output.dense",
    "attention_norm": "attention.output.LayerNorm",
    "output_norm": "output.LayerNorm",
}
_DISTILBERT = {
    "q": "attention.q_lin",
    "k": "attention.k_lin",
    "v": "attention.v_lin",
    "out": "attention.out_lin",
    "up": "ffn.lin1",
    "down": "ffn.lin2",
    "attention_norm": "sa_layer_norm",
    "output_norm": "output_layer_norm",
}


def convert_text(tensors: Tensors, family: str, options: Mapping[str, Any]) -> dict[str, Any]:
    """Return variables of :class:`conclugen_jax.extract.networks.text_encoder.TextEncoder` from the names of Hugging Face."""
    prefix = f"{family}." if tensors.has(f"{family}.") else ""
    width, hidden = options["width"], options["hidden_dim"]
    names, layers = (_BERT, "encoder.layer") if family != "distilbert" else (_DISTILBERT, "transformer.layer")

    def norm(name: str) -> dict[str, np.ndarray]:
        return {"scale": tensors.take(f"{name}.weight", width), "bias": tensors.take(f"{name}.bias", width)}

    def dense(name: str, outputs: int, inputs: int) -> dict[str, np.ndarray]:
        kernel = tensors.take(f"{name}.weight", outputs, inputs)
        return {"kernel": np.ascontiguousarray(kernel.T), "bias": tensors.take(f"{name}.bias", outputs)}

    tables = {"tokens": ("word", "vocabulary"), "positions": ("position", "max_positions")}
    if options["num_types"]:
        tables["types"] = ("token_type", "num_types")
    params: dict[str, Any] = {
        name: {"embedding": tensors.take(f"{prefix}embeddings.{old}_embeddings.weight", options[size], width)}
        for name, (old, size) in tables.items()
    }
    params["norm"] = norm(f"{prefix}embeddings.LayerNorm")
    shapes = {"up": (hidden, width), "down": (width, hidden)}
    for number in range(options["num_layers"]):
        layer = {}
        for name, old in names.items():
            full = f"{prefix}{layers}.{number}.{old}"
            layer[name] = norm(full) if name.endswith("norm") else dense(full, *shapes.get(name, (width, width)))
        params[f"layer{number}"] = layer
    tensors.leave_out(*HEADS, f"{prefix}pooler.", f"{prefix}embeddings.position_ids")
    tensors.finish()
    return params


def convert_mtcnn(networks: Mapping[str, Tensors]) -> dict[str, Any]:
    """Return variables of ``pnet``, ``rnet`` and ``onet`` from the names of facenet-pytorch."""
    params: dict[str, Any] = {}
    for network, (module, size) in mtcnn.NETWORKS.items():
        tensors, channels = networks[network], 0
        image = np.zeros((1, size, size, 3), np.float32)
        params[network] = jax.eval_shape(module.init, jax.random.key(0), image)["params"]
        for name, layer in sorted(params[network].items()):  # convolutions before dense layers
            for kind, leaf in layer.items():
                old = f"{name}.bias" if kind == "bias" else f"{name}.weight"
                x = tensors.take(old, *leaf.shape[::-1][:2], *leaf.shape[:-2])
                if x.ndim == 4:
                    x, channels = x.transpose(2, 3, 1, 0), len(x)
                elif x.ndim == 2:
                    x = x.T
                    if channels:  # the inputs are [width, height, channels] there, [height, width, channels] here
                        side = round((len(x) / channels) ** 0.5)
                        x = x.reshape(side, side, channels, -1).transpose(1, 0, 2, 3).reshape(x.shape)
                        channels = 0
                layer[kind] = np.ascontiguousarray(x)
        tensors.finish()
    return params
