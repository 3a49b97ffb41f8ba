"""Face detection with MTCNN (Zhang et al., 2016), with the weights and the rules of facenet-pytorch.

Three small networks: P-Net proposes over an image pyramid, R-Net and O-Net refine. The networks run in JAX; boxes, at most
some thousands, are sorted out on the host.
"""

import functools
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

WEIGHTS = Path(__file__).parent / "mtcnn_weights"  # converted; they come with the package (MIT licence, see the folder)
THRESHOLDS = {"pnet": 0.6, "rnet": 0.7, "onet": 0.7}
FACTOR = 0.709
MIN_SIZE = 20
IMAGES = 8  # images in a batch of P-Net, at most
CHUNK = 64  # crops in a batch of R-Net and O-Net; the last one is padded, so that one program serves all
MOST_SIZES = 8  # image sizes whose programs are kept

_sizes: set[tuple[int, int, int]] = set()


class PReLU(nn.Module):
    """max(x, 0) + slope * min(x, 0), a slope for each channel."""

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        slope = self.param("slope", nn.initializers.constant(0.25), (x.shape[-1],))
        return jnp.maximum(x, 0) + slope.reshape((1,) * (x.ndim - 1) + (-1,)) * jnp.minimum(x, 0)


def _pool(x: jax.Array, size: int) -> jax.Array:
    """Take maxima of windows 2 apart; the last may reach over the edge."""
    edges = [(0, (size - n) % 2 if n >= size else size - n) for n in x.shape[1:3]]
    return nn.max_pool(x, (size, size), (2, 2), edges)


class Network(nn.Module):
    """[n, height, width, 3] -> face probability [n, ...], box regression [n, ..., 4] and, of a third head, landmarks."""

    convolutions: Sequence[tuple[int, int, int]]  # channels, side of the windows, that of the maxima after it (0: none)
    dense: int  # width of a layer behind them; 0: none, and the heads give outputs for every window of the image
    heads: Sequence[int] = (2, 4)  # outputs of each

    @nn.compact
    def __call__(self, x: jax.Array) -> tuple[jax.Array, ...]:
        """Of every crop, or of every window."""
        layers = len(self.convolutions)
        for number, (features, size, pool) in enumerate(self.convolutions, 1):
            x = nn.Conv(features, (size, size), padding="VALID", name=f"conv{number}")(x)
            x = PReLU(name=f"prelu{number}")(x)
            x = _pool(x, pool) if pool else x
        head = functools.partial(nn.Conv, kernel_size=(1, 1))
        if self.dense:
            layers, head = layers + 1, nn.Dense
            x = PReLU(name=f"prelu{layers}")(nn.Dense(self.dense, name=f"dense{layers}")(x.reshape(len(x), -1)))
        name = f"{'dense' if self.dense else 'conv'}{layers + 1}"
        first, *others = (head(n, name=f"{name}_{i}")(x) for i, n in enumerate(self.heads, 1))
        return nn.softmax(first)[..., 1], *others


NETWORKS = {  # name -> (network, least side of its input)
    "pnet": (Network(((10, 3, 2), (16, 3, 0), (32, 3, 0)), 0), 12),
    "rnet": (Network(((28, 3, 3), (48, 3, 3), (64, 2, 0)), 128), 24),
    "onet": (Network(((32, 3, 3), (64, 3, 3), (64, 3, 2), (128, 2, 0)), 256, (2, 4, 10)), 48),
}


def detect(params: Mapping[str, Any], images: np.ndarray) -> list[np.ndarray]:
    """Find faces in images of one size, uint8 RGB [n, height, width, 3]; ``params``: of ``pnet``, ``rnet`` and ``onet``.

    Returns:
      Of each image float32 [faces, 5], the most probable first: x, y of the upper left and the lower right corner, in
      pixels, and the probability that it is a face.
    """
    (height, width), faces = images.shape[1:3], []
    if min(height, width) < MIN_SIZE:
        return [np.zeros((0, 5), np.float32) for _ in images]
    for start in range(0, len(images), IMAGES):
        batch = images[start : start + IMAGES]
        n, filled = len(batch), 1 << (len(batch) - 1).bit_length()  # few sizes, since a program is compiled for each
        _sizes.add((filled, height, width))
        if len(_sizes) > MOST_SIZES:  # their programs take tens of MiB
            _pyramid.clear_cache()
            _sizes.clear()
        batch = np.concatenate([batch, np.broadcast_to(batch[-1:], (filled - n, *batch.shape[1:]))])
        boxes, owners = _propose(params, batch)
        boxes, owners = _refine("rnet", params, batch, boxes[owners < n], owners[owners < n])
        boxes, owners = _refine("onet", params, batch, boxes, owners)
        faces += [boxes[owners == i] for i in range(n)]
    return faces


def _propose(params: Mapping[str, Any], images: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Return square boxes with their probabilities [m, 5], and the image of each [m]."""
    height, width = images.shape[1:3]
    device_images, scale = jnp.asarray(images), 12 / MIN_SIZE
    least, boxes, owners = min(height, width) * scale, [], []
    while least >= 12:
        size = (int(height * scale + 1), int(width * scale + 1))
        probability, regression = jax.device_get(_pyramid(params["pnet"], device_images, size))
        owner, y, x = np.nonzero(probability >= THRESHOLDS["pnet"])
        corners = np.stack([x, y, x, y], axis=1).astype(np.float32) * 2
        corners = np.floor((corners + np.array([1, 1, 12, 12], np.float32)) / np.float32(scale))
        found = np.concatenate([corners, probability[owner, y, x, None], regression[owner, y, x]], axis=1)
        kept = suppress(found, owner, 0.5)
        boxes.append(found[kept])
        owners.append(owner[kept])
        scale, least = scale * FACTOR, least * FACTOR
    found, owner = np.concatenate(boxes), np.concatenate(owners)
    kept = suppress(found, owner, 0.7)
    found, owner = found[kept], owner[kept]
    return _square(_shifted(found, found[:, 5:], 0)), owner


@functools.partial(jax.jit, static_argnums=2)
def _pyramid(params: Any, images: jax.Array, size: tuple[int, int]) -> tuple[jax.Array, jax.Array]:
    """Return what P-Net gives for images that are resized by averaging."""
    x = jnp.asarray(images, jnp.float32)
    with jax.default_matmul_precision("highest"):
        for axis, length in enumerate(size, 1):
            x = jnp.moveaxis(jnp.tensordot(_averages(x.shape[axis], length), x, (1, axis)), 0, axis)
    return _apply("pnet", params, x)


@functools.partial(jax.jit, static_argnums=0)
def _apply(network: str, params: Any, images: jax.Array) -> tuple[jax.Array, jax.Array]:
    with jax.default_matmul_precision("highest"):
        return NETWORKS[network][0].apply({"params": params}, (images - 127.5) * 0.0078125)[:2]


def _averages(length: int, target: int) -> np.ndarray:
    """[target, length]: each row averages the inputs that its output covers (area interpolation)."""
    starts = np.arange(target) * length // target
    ends = -(-(np.arange(1, target + 1) * length) // target)
    i = np.arange(length)
    inside = (i >= starts[:, None]) & (i < ends[:, None])
    return (inside / inside.sum(axis=1, keepdims=True)).astype(np.float32)


def _refine(
    network: str, params: Mapping[str, Any], images: np.ndarray, boxes: np.ndarray, owners: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """Return the boxes that a network takes for faces, moved as it says, and their images."""
    size, (height, width) = NETWORKS[network][1], images.shape[1:3]
    corners = boxes[:, :4].astype(np.int64)  # towards zero
    corners = np.concatenate([np.maximum(corners[:, :2], 1), np.minimum(corners[:, 2:], (width, height))], axis=1)
    real = (corners[:, 2] > corners[:, 0] - 1) & (corners[:, 3] > corners[:, 1] - 1)
    boxes, owners, corners = boxes[real], owners[real], corners[real]
    crops = np.zeros((-(-len(boxes) // CHUNK) * CHUNK, size, size, 3), np.float32)
    for i, (x, y, end_x, end_y) in enumerate(corners):
        crops[i] = _area(images[owners[i], y - 1 : end_y, x - 1 : end_x], size)
    chunks = crops.reshape(-1, CHUNK, size, size, 3)
    found = [jax.device_get(_apply(network, params[network], chunk)) for chunk in chunks]
    if not found:
        return np.zeros((0, 5), np.float32), np.zeros(0, np.int64)
    probability, regression = (np.concatenate(parts)[: len(boxes)] for parts in zip(*found, strict=True))
    kept = probability > THRESHOLDS[network]
    boxes = np.concatenate([boxes[kept, :4], probability[kept, None]], axis=1)
    owners, regression = owners[kept], regression[kept]
    if network == "rnet":
        kept = suppress(boxes, owners, 0.7)
        return _square(_shifted(boxes[kept], regression[kept], 1)), owners[kept]
    boxes = _shifted(boxes, regression, 1)
    kept = suppress(boxes, owners, 0.7, of_smaller=True)
    return boxes[kept], owners[kept]


def _area(image: np.ndarray, size: int) -> np.ndarray:
    rows, columns = (_averages(n, size) for n in image.shape[:2])
    flat = rows @ image.reshape(len(image), -1).astype(np.float32)
    return np.einsum("xw,hwc->hxc", columns, flat.reshape(size, image.shape[1], 3), optimize=True)


def _square(boxes: np.ndarray) -> np.ndarray:
    """Return boxes about the same centres, as wide as high."""
    sides = boxes[:, 2:4] - boxes[:, :2]
    longest = sides.max(axis=1, keepdims=True)
    corner = boxes[:, :2] + sides * 0.5 - longest * 0.5
    return np.concatenate([corner, corner + longest, boxes[:, 4:]], axis=1)


def _shifted(boxes: np.ndarray, regression: np.ndarray, edge: int) -> np.ndarray:
    """Move corners by parts of the sides, which are ``edge`` longer than the corners are apart."""
    sides = np.tile(boxes[:, 2:4] - boxes[:, :2] + edge, 2)
    return np.concatenate([boxes[:, :4] + regression * sides, boxes[:, 4:5]], axis=1)


def suppress(boxes: np.ndarray, owners: np.ndarray, threshold: float, *, of_smaller: bool = False) -> np.ndarray:
    """Return the rows to keep, the most probable first: none overlaps a better one of its image by more than a threshold.

    ``boxes`` are [m, 5 or more], corners and probability; ``owners`` [m] the image of each. The threshold is of the
    intersection over the union or, with ``of_smaller``, over the smaller of both, whose sides are counted in whole pixels.
    """
    edge = 1 if of_smaller else 0
    corners, area = boxes[:, :4], np.prod(boxes[:, 2:4] - boxes[:, :2] + edge, axis=1)
    order, kept = np.argsort(-boxes[:, 4], kind="stable"), []
    while order.size:
        first, order = order[0], order[1:]
        kept.append(first)
        low = np.maximum(corners[first, :2], corners[order, :2])
        high = np.minimum(corners[first, 2:], corners[order, 2:])
        shared = np.prod(np.maximum(high - low + edge, 0), axis=1)
        whole = np.minimum(area[first], area[order]) if of_smaller else area[first] + area[order] - shared
        order = order[(owners[order] != owners[first]) | (shared <= threshold * whole)]
    return np.array(kept, np.int64)
