"""Convert published weights to variables of our networks. Tensors that are neither used nor known to be useless raise."""

import itertools
import json
import math
import re
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import flax.linen as nn
import jax
import msgspec
import numpy as np
from flax import traverse_util

from conclugen_jax.errors import ConclugenError
from conclugen_jax.extract.networks import davenet, efficientnet, face_api, mtcnn, resnet, text_encoder, whisper
from conclugen_jax.system import files

EPSILON = 1e-5  # of BatchNorm in networks that say no other
UNUSED = ("fc.", "_fc.", "last_linear.", "classifier.", "lm_head.", "cls.", "pre_classifier.", "vocab_", "pooler.")
UNUSED += ("qa_outputs.", "embeddings.position_ids", "batchnorm1.")
"""Prefixes of tensors that are dropped: of layers behind the features, and of what published code declares and does not use."""


class Tensors:
    """Tensors of a published file that are taken one by one; a ConclugenError names the file and what is wrong with one.

    ``tree`` holds tensors by name, perhaps in an entry ``state_dict``. ``entry`` is the one to use; dots separate nested
    entries. Names may begin with ``prefix``, as they may with ``module.``.
    """

    def __init__(self, tree: Mapping[Any, Any], source: str, *, entry: str = "", prefix: str = ""):
        self.source = source
        for name in filter(None, entry.split(".")):
            if not isinstance(tree.get(name), Mapping):
                there = ", ".join(map(str, tree))[:200]
                raise ConclugenError(f"{source}: no entry {name!r} with tensors; it has {there}")
            tree = tree[name]
        while not entry and isinstance(tree.get("state_dict"), Mapping):
            tree = tree["state_dict"]
        tree = {str(name): x for name, x in tree.items()}
        for start in ("module.", prefix):
            tree = {name if (short := name.removeprefix(start)) in tree else short: x for name, x in tree.items()}
        self._tensors = tree

    def find(self, name: str) -> np.ndarray:
        """Return a tensor that is left."""
        x = self._tensors.get(name)
        if not isinstance(x, np.ndarray) or not x.size:
            near = ", ".join(sorted(self._tensors)[:3])
            raise ConclugenError(f"{self.source}: no tensor {name!r}, but {near or 'none'}: is it of this network?")
        return x

    def take(self, name: str, *shape: int) -> np.ndarray:
        """Remove a tensor of a shape and return it as float32."""
        x = self.find(name)
        if x.shape != shape:
            raise ConclugenError(f"{self.source}: {name!r} has the shape {x.shape}, expected {shape}")
        del self._tensors[name]
        x = x.astype(np.float32)
        if not np.isfinite(x).all() or (name.endswith(".running_var") and (x < 0).any()):
            raise ConclugenError(f"{self.source}: {name!r} has values that are not finite, or negative; fetch it again")
        return x

    def finish(self) -> list[str]:
        """Return the names of the tensors that are left and known to be of no use, except counters; refuse any other."""
        left = sorted(name for name in self._tensors if not name.endswith("num_batches_tracked"))
        for name in left:
            if not name.startswith(UNUSED):
                raise ConclugenError(f"{self.source}: {name!r} is not part of the network; name the one that it is of")
        return left


def convert(
    module: nn.Module,
    example: tuple[Any, ...],
    tensors: Tensors,
    published: Callable[[str], tuple[str, str]],
    epsilon: float = EPSILON,
) -> dict[str, Any]:
    """Return the variables of a module of ours, for inputs of the shapes of ``example``, from the tensors of a published one.

    ``published``: path of a layer in the module, such as ``layer1_0/conv1``, -> names of the published layer and of the
    BatchNorm behind it, with ``epsilon``, that is folded into it; empty for none.
    """
    shapes = jax.eval_shape(module.init, jax.random.key(0), *example)["params"]
    layers = traverse_util.flatten_dict(shapes, sep="/", is_leaf=lambda _, x: x.keys() & {"bias", "embedding", "slope"})
    found = {path: _layer(tensors, leaves, *published(path), epsilon) for path, leaves in layers.items()}
    return traverse_util.unflatten_dict(found, sep="/")


def _layer(tensors: Tensors, leaves: Mapping[str, Any], name: str, norm: str, epsilon: float) -> dict[str, np.ndarray]:
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
        scale /= np.sqrt(variance + epsilon)
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


def convert_efficientnet(tensors: Tensors) -> dict[str, Any]:
    """Return variables of :class:`~conclugen_jax.extract.networks.efficientnet.EfficientNetLite0` from the published names."""

    def published(path: str) -> tuple[str, str]:
        block, _, part = path.rpartition("/")
        if not block:
            return {"stem": ("_conv_stem", "_bn0"), "head": ("_conv_head", "_bn1")}[part]
        start, norm = f"_blocks.{block.removeprefix('block')}.", ("expand", "depthwise", "project").index(part)
        return f"{start}_{part}_conv", f"{start}_bn{norm}"

    example = (np.zeros((1, 32, 32, 3), np.uint8),)
    return convert(efficientnet.EfficientNetLite0(), example, tensors, published, efficientnet.EPSILON)


WHISPER = {
    "attention_norm": "self_attention/layer_norm",
    "qkv": "self_attention/linear_0",
    "out": "self_attention/linear_1",
    "feed_forward_norm": "ffn/layer_norm",
    "up": "ffn/linear_0",
    "down": "ffn/linear_1",
}
"""Our layers -> names of CTranslate2."""


def convert_whisper(tensors: Mapping[str, np.ndarray], module: whisper.WhisperEncoder) -> dict[str, Any]:
    """Return variables of an encoder from a model of CTranslate2, whose kernels are [out, in] or [out, in, time]."""
    shapes = jax.eval_shape(module.init, jax.random.key(0), np.zeros((1, 4, whisper.MELS)), np.ones(1, np.int32))
    found = {}
    for path, leaf in traverse_util.flatten_dict(shapes["params"], sep="/").items():
        *layer, kind = path.split("/")
        if len(layer) == 2:
            layer = [layer[0].replace("layer", "layer_"), WHISPER[layer[1]]]
        name = {"norm": "layer_norm"}.get("/".join(layer), "/".join(layer))
        kinds = {"kernel": "weight", "scale": "gamma", "positions": "position_encodings/encodings"}
        kinds["bias"] = "beta" if name.endswith("norm") else "bias"
        x = tensors["/".join(filter(None, ("encoder", name, kinds[kind])))]
        found[path] = np.ascontiguousarray(x.T if kind == "kernel" else x, np.float32)
        if found[path].shape != leaf.shape:
            raise ConclugenError(f"{path} has the shape {found[path].shape}, expected {leaf.shape}")
    return traverse_util.unflatten_dict(found, sep="/")


FAMILIES = ("bert", "roberta", "distilbert")

OPTIONS = {
    "vocabulary": ("vocab_size", "vocab_size"),
    "width": ("hidden_size", "dim"),
    "num_layers": ("num_hidden_layers", "n_layers"),
    "num_heads": ("num_attention_heads", "n_heads"),
    "hidden_dim": ("intermediate_size", "hidden_dim"),
    "max_positions": ("max_position_embeddings", "max_position_embeddings"),
    "activation": ("hidden_act", "activation"),
    "epsilon": ("layer_norm_eps", ""),
    "num_types": ("type_vocab_size", ""),
}
"""Our names -> those in a published ``config.json`` of BERT or RoBERTa, and of DistilBERT."""

LAYERS = {
    "q": ("attention.self.query", "attention.q_lin"),
    "k": ("attention.self.key", "attention.k_lin"),
    "v": ("attention.self.value", "attention.v_lin"),
    "out": ("attention.output.dense", "attention.out_lin"),
    "up": ("intermediate.dense", "ffn.lin1"),
    "down": ("output.dense", "ffn.lin2"),
    "attention_norm": ("attention.output.LayerNorm", "sa_layer_norm"),
    "output_norm": ("output.LayerNorm", "output_layer_norm"),
}
EMBEDDINGS = {"tokens": "word_embeddings", "positions": "position_embeddings", "types": "token_type_embeddings"}


def read_config(path: Path) -> tuple[str, text_encoder.Options]:
    """Return family and options of a text encoder by a published ``config.json``; a ConclugenError names the fault."""
    config = files.read_json(path, dict[str, Any], way_out="name a folder that has a whole one")
    family = str(config.get("model_type"))
    learned = config.get("position_embedding_type", "absolute") == "absolute" and not config.get("sinusoidal_pos_embds")
    if family not in FAMILIES or not learned:
        found = f"{family!r} with{'' if learned else 'out'} learned positions"
        raise ConclugenError(f"{path}: model_type is {found}, expected one of {', '.join(FAMILIES)} with them")
    names = {ours: of_two[family == "distilbert"] for ours, of_two in OPTIONS.items()}
    names |= {"first_position": "pad_token_id"} if family == "roberta" else {}
    given = {"num_types": 0 if family == "distilbert" else 2, "activation": "gelu", "epsilon": 1e-12}
    given["first_position"] = behind = int(family == "roberta")  # the first token comes behind the padding's position
    given |= {ours: config[name] for ours, name in names.items() if name in config}
    try:
        options = msgspec.convert(given, text_encoder.Options)
        return family, msgspec.structs.replace(options, first_position=options.first_position + behind)
    except (msgspec.ValidationError, ValueError) as e:
        fault = re.sub(r"\w+", lambda word: names.get(word[0], word[0]), str(e))
        raise ConclugenError(f"{path}: not as expected ({fault}); name a folder that has a whole one") from e


def convert_text(tensors: Tensors, family: str, options: text_encoder.Options) -> dict[str, Any]:
    """Return variables of :class:`conclugen_jax.extract.networks.text_encoder.TextEncoder` from the names of Hugging Face."""
    distil = family == "distilbert"

    def published(path: str) -> tuple[str, str]:
        layer, _, part = path.partition("/")
        if not part:
            return f"embeddings.{EMBEDDINGS.get(layer, 'LayerNorm')}", ""
        stack = f"{'transformer' if distil else 'encoder'}.layer.{layer.removeprefix('layer')}"
        return f"{stack}.{LAYERS[part][distil]}", ""

    example = (np.zeros((1, 1), np.int32), np.ones((1, 1), bool))
    return convert(text_encoder.TextEncoder(options), example, tensors, published)


def convert_mtcnn(networks: Sequence[Tensors]) -> dict[str, Any]:
    """Return variables of ``pnet``, ``rnet`` and ``onet`` from the names of facenet-pytorch."""
    params: dict[str, Any] = {}
    for tensors, (network, (module, size)) in zip(networks, mtcnn.NETWORKS.items(), strict=True):
        layers = convert(module, (np.zeros((1, size, size, 3), np.float32),), tensors, lambda path: (path, ""))
        for name in layers.keys() & {"dense4", "dense5"}:
            # The inputs are [width, height, channels] there, [height, width, channels] here.
            kernel = layers[name]["kernel"]
            turned = kernel.reshape(3, 3, -1, kernel.shape[1]).swapaxes(0, 1)
            layers[name]["kernel"] = np.ascontiguousarray(turned).reshape(kernel.shape)
        params[network] = layers
    return params


def convert_face_api(path: Path, manifest: Path, module: nn.Module) -> dict[str, Any]:
    """Return variables of a module in :mod:`~conclugen_jax.extract.networks.face_api` from files of face-api, in 32 or 8 bits.

    The manifest says which tensors are in the file at ``path``, one after the other, and the scale of those in 8 bits.
    """
    content, start, published = path.read_bytes(), 0, {}
    for entry in itertools.chain.from_iterable(group["weights"] for group in json.loads(manifest.read_text())):
        scale = entry.get("quantization")
        dtype = np.dtype((scale or entry)["dtype"]).newbyteorder("<")
        x = np.frombuffer(content, dtype, math.prod(entry["shape"]), start).reshape(entry["shape"])
        published[entry["name"]] = x * scale["scale"] + scale["min"] if scale else x
        start += x.nbytes
    tensors, found = Tensors(published, str(path)), {}
    shapes = jax.eval_shape(module.init, jax.random.key(0), np.zeros((1, face_api.SIZE, face_api.SIZE, 3)))["params"]
    for name, leaf in traverse_util.flatten_dict(shapes, sep="/").items():
        theirs = name.replace("pointwise/bias", "bias").replace("wise/kernel", "wise_filter")
        theirs = theirs.replace("fc/kernel", "fc/weights").replace("kernel", "filters")
        axes = (0, 1, 3, 2) if "depthwise" in name else tuple(range(len(leaf.shape)))  # [..., channels, 1] there
        found[name] = tensors.take(theirs, *(leaf.shape[axis] for axis in axes)).transpose(axes)
    tensors.finish()
    return traverse_util.unflatten_dict(found, sep="/")
