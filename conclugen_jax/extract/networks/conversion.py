"""Convert published weights to variables of our networks. Every tensor is taken, known to be of no use, or refused by name."""

import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import flax.linen as nn
import jax
import msgspec
import numpy as np
from flax import traverse_util

from conclugen_jax.errors import ConclugenError
from conclugen_jax.extract.networks import davenet, mtcnn, resnet, text_encoder
from conclugen_jax.system import files

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
    "embeddings.position_ids",
    "batchnorm1.",  # ResDAVEnet's published code declares it and does not use it
)
"""Prefixes of tensors that the features do not depend on, mostly of layers behind them."""

COUNTERS = "num_batches_tracked"


class Tensors:
    """Tensors of a published file that are taken one by one.

    Attributes:
      source: name of the file, for messages.
    """

    def __init__(self, tree: Mapping[Any, Any], source: str, *, entry: str = "", prefix: str = ""):
        """Find the tensors in what a file holds.

        Args:
          tree: tensors by name, perhaps in an entry ``state_dict``.
          source: name of the file, for messages.
          entry: the one to use; dots separate nested entries.
          prefix: some names may have it, as they may have ``module.``.

        Raises:
          ConclugenError: there is no such entry.
        """
        self.source = source
        for name in filter(None, entry.split(".")):
            if not isinstance(tree.get(name), Mapping):
                raise ConclugenError(
                    f"{source}: no entry {name!r} with tensors; it has {', '.join(map(str, tree))[:200]}"
                )
            tree = tree[name]
        while not entry and isinstance(tree.get("state_dict"), Mapping):
            tree = tree["state_dict"]
        tree = {str(name): x for name, x in tree.items()}
        for start in ("module.", prefix):
            tree = {name if (short := name.removeprefix(start)) in tree else short: x for name, x in tree.items()}
        self._tensors = tree

    def find(self, name: str) -> np.ndarray:
        """Return a tensor that is left.

        Raises:
          ConclugenError: there is none of this name.
        """
        x = self._tensors.get(name)
        if not isinstance(x, np.ndarray) or not x.size:
            near = ", ".join(sorted(self._tensors)[:3])
            raise ConclugenError(
                f"{self.source}: no tensor {name!r}; it has {near or 'none that is left'}: is it of this network?"
            )
        return x

    def take(self, name: str, *shape: int) -> np.ndarray:
        """Remove a tensor and return it as float32.

        Raises:
          ConclugenError: it is missing, of another shape, or holds values that are not finite.
        """
        x = self.find(name)
        if x.shape != shape:
            raise ConclugenError(f"{self.source}: {name!r} has the shape {x.shape}, expected {shape}")
        del self._tensors[name]
        x = x.astype(np.float32)
        if not np.isfinite(x).all() or (name.endswith(".running_var") and (x < 0).any()):
            raise ConclugenError(f"{self.source}: {name!r} has values that are not finite, or negative; fetch it again")
        return x

    def finish(self) -> list[str]:
        """Return the names of the tensors that are left and known to be of no use, but for counters; refuse any other."""
        left = sorted(name for name in self._tensors if not name.endswith(COUNTERS))
        unknown = [name for name in left if not name.startswith(HEADS)]
        if unknown:
            raise ConclugenError(
                f"{self.source}: {unknown[0]!r} is not part of the network ({len(unknown)} such tensors); name the network "
                "that the weights are of"
            )
        return left


def convert(
    module: nn.Module, example: tuple[Any, ...], tensors: Tensors, published: Callable[[str], tuple[str, str]]
) -> dict[str, Any]:
    """Return the variables of a module.

    Args:
      module: one of ours.
      example: its inputs; only their shapes matter.
      tensors: of the published network.
      published: path of a layer in the module, such as ``layer1_0/conv1``, -> names of the published layer and of the
        BatchNorm behind it that is folded into it; empty for none.

    Raises:
      ConclugenError: a tensor is missing, of another shape, or has impossible values.
    """
    shapes = jax.eval_shape(module.init, jax.random.key(0), *example)["params"]
    layers = traverse_util.flatten_dict(
        shapes, sep="/", is_leaf=lambda _, node: bool({"bias", "embedding", "slope"} & node.keys())
    )
    return traverse_util.unflatten_dict(
        {path: _layer(tensors, leaves, *published(path)) for path, leaves in layers.items()}, sep="/"
    )


def _layer(tensors: Tensors, leaves: Mapping[str, Any], name: str, norm: str) -> dict[str, np.ndarray]:
    """Return the variables of a layer; kernels are [out, in, ...] in PyTorch and [..., in, out] here."""
    found = {}
    for kind, leaf in leaves.items():
        if kind == "kernel":
            *size, inputs, outputs = leaf.shape
            x = tensors.take(f"{name}.weight", outputs, inputs, *size)
            found[kind] = np.ascontiguousarray(np.moveaxis(x, (0, 1), (-1, -2)))
        elif not norm:
            found[kind] = tensors.take(f"{name}.bias" if kind == "bias" else f"{name}.weight", *leaf.shape)
    if norm:
        scale, shift, mean, variance = (
            tensors.take(f"{norm}.{part}", *leaves["bias"].shape).astype(np.float64)
            for part in ("weight", "bias", "running_mean", "running_var")
        )
        scale /= np.sqrt(variance + EPSILON)
        kernel = found["kernel"].astype(np.float64) * scale
        found = {"kernel": kernel.astype(np.float32), "bias": (shift - mean * scale).astype(np.float32)}
    return found


def _residual(path: str) -> tuple[str, str]:
    """Name layers as torchvision, pretorched-x and the published ResDAVEnet do."""
    name = path.replace("_", ".").replace("/", ".")
    if name.endswith("downsample"):
        return f"{name}.0", f"{name}.1"
    return name, name.replace("conv", "bn")


def convert_resnet(tensors: Tensors, depth: int, num_axes: int) -> dict[str, Any]:
    """Return variables of :class:`~conclugen_jax.extract.networks.resnet.ResNet` named as by torchvision or pretorched-x."""
    return convert(resnet.ResNet(depth, (0,) * 3, (1,) * 3), (np.zeros((1, *(8,) * num_axes, 3)),), tensors, _residual)


def convert_davenet(tensors: Tensors) -> tuple[dict[str, Any], dict[str, Any]]:
    """Return variables of :class:`conclugen_jax.extract.networks.davenet.ResDAVEnet`, and its attributes from the shapes."""
    kernels = [tensors.find(f"{layer}conv1.weight").shape for layer in ("", *(f"layer{i}.0." for i in range(1, 5)))]
    kernels = [((1,) * 4 + shape)[-4:] for shape in kernels]  # [out, in, mels, time]
    options = {"widths": [outputs for outputs, *_ in kernels], "kernel_mels": kernels[0][2]}
    example = (np.zeros((1, 64, options["kernel_mels"])), np.array([64]))
    return convert(davenet.ResDAVEnet(**options), example, tensors, _residual), options


_OPTIONS = {
    "vocabulary": "vocab_size",
    "width": "hidden_size",
    "num_layers": "num_hidden_layers",
    "num_heads": "num_attention_heads",
    "hidden_dim": "intermediate_size",
    "max_positions": "max_position_embeddings",
    "num_types": "type_vocab_size",
    "activation": "hidden_act",
    "epsilon": "layer_norm_eps",
}
FAMILIES = {
    "bert": _OPTIONS,
    "roberta": _OPTIONS | {"first_position": "pad_token_id"},
    "distilbert": {
        "vocabulary": "vocab_size",
        "width": "dim",
        "num_layers": "n_layers",
        "num_heads": "n_heads",
        "hidden_dim": "hidden_dim",
        "max_positions": "max_position_embeddings",
        "activation": "activation",
    },
}
"""Family of encoders -> our names of options -> those in a published ``config.json``."""

_TEXT = {
    "tokens": "embeddings.word_embeddings",
    "positions": "embeddings.position_embeddings",
    "types": "embeddings.token_type_embeddings",
    "norm": "embeddings.LayerNorm",
}
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


def read_config(path: Path) -> tuple[str, text_encoder.Options]:
    """Return the family and the options of a text encoder that a published ``config.json`` describes.

    Raises:
      ConclugenError: a family or an activation that is not known, or a size that is missing.
    """
    config = files.read_json(path, dict[str, Any], way_out="name a folder that has a whole one")
    family = str(config.get("model_type"))
    learned = config.get("position_embedding_type", "absolute") == "absolute" and not config.get("sinusoidal_pos_embds")
    if family not in FAMILIES or not learned:
        raise ConclugenError(
            f"{path}: model_type is {family!r}{'' if learned else ' without learned positions'}, expected one of "
            f"{', '.join(FAMILIES)} with learned positions"
        )
    names, roberta = FAMILIES[family], family == "roberta"
    given = {"num_types": 0 if family == "distilbert" else 2, "activation": "gelu", "epsilon": 1e-12}
    given |= {"first_position": int(roberta)} | {ours: config[name] for ours, name in names.items() if name in config}
    try:
        options = msgspec.convert(given, text_encoder.Options)
        # The first token comes behind the position of the padding.
        return family, msgspec.structs.replace(options, first_position=options.first_position + roberta)
    except (msgspec.ValidationError, ValueError) as e:
        fault = re.sub(r"\w+", lambda word: names.get(word[0], word[0]), str(e))
        raise ConclugenError(f"{path}: not as expected ({fault}); name a folder that has a whole one") from e


def convert_text(tensors: Tensors, family: str, options: text_encoder.Options) -> dict[str, Any]:
    """Return variables of :class:`conclugen_jax.extract.networks.text_encoder.TextEncoder` from the names of Hugging Face."""
    layers, parts = ("transformer", _DISTILBERT) if family == "distilbert" else ("encoder", _BERT)

    def published(path: str) -> tuple[str, str]:
        layer, _, part = path.partition("/")
        return f"{layers}.layer.{layer.removeprefix('layer')}.{parts[part]}" if part else _TEXT[layer], ""

    example = (np.zeros((1, 1), np.int32), np.ones((1, 1), bool))
    return convert(text_encoder.TextEncoder(options), example, tensors, published)


def convert_mtcnn(networks: Mapping[str, Tensors]) -> dict[str, Any]:
    """Return variables of ``pnet``, ``rnet`` and ``onet`` from the names of facenet-pytorch."""
    params: dict[str, Any] = {}
    for network, (module, size) in mtcnn.NETWORKS.items():
        example = (np.zeros((1, size, size, 3), np.float32),)
        params[network] = layers = convert(module, example, networks[network], lambda path: (path, ""))
        for name in layers.keys() & {"dense4", "dense5"}:
            # The inputs are [width, height, channels] there, [height, width, channels] here.
            kernel = layers[name]["kernel"]
            turned = kernel.reshape(3, 3, -1, kernel.shape[1]).swapaxes(0, 1)
            layers[name]["kernel"] = np.ascontiguousarray(turned).reshape(kernel.shape)
    return params
