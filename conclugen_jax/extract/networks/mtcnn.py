"""Face detection with MTCNN (Zhang et al., 2016), with the weights and the rules of facenet-pytorch.

Three small networks: P-Net proposes over an image pyramid, R-Net and O-Net refine. The networks run in JAX; boxes, at most
some thousands, are sorted out on the host.
"""

import functools
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

WEIGHTS = Path(__file__).parent / "mtcnn_weights"
"""Converted weights that come with the package (MIT licence, see the folder)."""

THRESHOLDS = (0.6, 0.7, 0.7)
FACTOR = 0.709
MIN_SIZE = 20
IMAGES = 8
"""Images in a batch of P-Net, at most."""

CHUNK = 64
"""Crops in a batch of R-Net and O-Net; the last one is padded, so that one program serves all."""

MOST_SIZES = 8
"""Image sizes whose programs are kept."""

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


def _conv(features: int, size: int, name: str) -> nn.Conv:
    return nn.Conv(features, (size, size), padding="VALID", name=name)


class PNet(nn.Module):
    """[n, height, width, 3] -> (face probability [n, h, w], box regression [n, h, w, 4])."""

    @nn.compact
    def __call__(self, x: jax.Array) -> tuple[jax.Array, jax.Array]:
        """Of every window of 12 x 12, 2 apart."""
        x = PReLU(name="prelu1")(_conv(10, 3, "conv1")(x))
        x = _pool(x, 2)
        x = PReLU(name="prelu2")(_conv(16, 3, "conv2")(x))
        x = PReLU(name="prelu3")(_conv(32, 3, "conv3")(x))
        return nn.softmax(_conv(2, 1, "conv4_1")(x))[..., 1], _conv(4, 1, "conv4_2")(x)


class RNet(nn.Module):
    """[n, 24, 24, 3] -> (face probability [n], box regression [n, 4])."""

    @nn.compact
    def __call__(self, x: jax.Array) -> tuple[jax.Array, jax.Array]:
        """Of every crop."""
        x = _pool(PReLU(name="prelu1")(_conv(28, 3, "conv1")(x)), 3)
        x = _pool(PReLU(name="prelu2")(_conv(48, 3, "conv2")(x)), 3)
        x = PReLU(name="prelu3")(_conv(64, 2, "conv3")(x))
        x = PReLU(name="prelu4")(nn.Dense(128, name="dense4")(x.reshape(len(x), -1)))
        return nn.softmax(nn.Dense(2, name="dense5_1")(x))[:, 1], nn.Dense(4, name="dense5_2")(x)


class ONet(nn.Module):
    """[n, 48, 48, 3] -> (face probability [n], box regression [n, 4], five landmarks [n, 10])."""

    @nn.compact
    def __call__(self, x: jax.Array) -> tuple[jax.Array, jax.Array, jax.Array]:
        """Of every crop; landmarks as parts of the box, x of all five first."""
        x = _pool(PReLU(name="prelu1")(_conv(32, 3, "conv1")(x)), 3)
        x = _pool(PReLU(name="prelu2")(_conv(64, 3, "conv2")(x)), 3)
        x = _pool(PReLU(name="prelu3")(_conv(64, 3, "conv3")(x)), 2)
        x = PReLU(name="prelu4")(_conv(128, 2, "conv4")(x))
        x = PReLU(name="prelu5")(nn.Dense(256, name="dense5")(x.reshape(len(x), -1)))
        return (
            nn.softmax(nn.Dense(2, name="dense6_1")(x))[:, 1],
            nn.Dense(4, name="dense6_2")(x),
            nn.Dense(10, name="dense6_3")(x),
        )


NETWORKS = {"pnet": (PNet(), 12), "rnet": (RNet(), 24), "onet": (ONet(), 48)}
"""Name -> (network, least side of its input)."""


class Face(NamedTuple):
    """A face in an image.

    Attributes:
      box: x and y of the upper left and of the lower right corner, in pixels.
      probability: that it is one.
    """

    box: np.ndarray
    probability: float


def detect(
    params: Mapping[str, Any], images: np.ndarray, *, min_size: int = MIN_SIZE, thresholds: Sequence[float] = THRESHOLDS
) -> list[list[Face]]:
    """Find faces in images of one size.

    Args:
      params: variables of ``pnet``, ``rnet`` and ``onet``.
      images: uint8 [n, height, width, 3], RGB.
      min_size: least side of a face, in pixels.
      thresholds: least probabilities of the three stages.

    Returns:
      The faces of each image, the most probable first.
    """
    n, height, width = images.shape[:3]
    if not n or min(height, width) < min_size:
        return [[] for _ in range(n)]
    if n > IMAGES:
        pieces = [images[i : i + IMAGES] for i in range(0, n, IMAGES)]
        return [faces for piece in pieces for faces in detect(params, piece, min_size=min_size, thresholds=thresholds)]
    filled = 1 << (n - 1).bit_length()  # few sizes, since a program is compiled for each
    _sizes.add((filled, height, width))
    if len(_sizes) > MOST_SIZES:  # their programs take tens of MiB
        _pyramid.clear_cache()
        _sizes.clear()
    images = np.concatenate([images, np.broadcast_to(images[-1:], (filled - n, *images.shape[1:]))])
    boxes, owners = _propose(params["pnet"], images, min_size, thresholds[0])
    boxes, owners = boxes[owners < n], owners[owners < n]
    for network, size, threshold in (("rnet", 24, thresholds[1]), ("onet", 48, thresholds[2])):
        boxes, owners = _refine(network, params[network], images, boxes, owners, size, threshold)
    faces: list[list[Face]] = [[] for _ in range(n)]
    for box, owner in sorted(zip(boxes, owners, strict=True), key=lambda pair: -pair[0][4]):
        faces[owner].append(Face(box[:4], float(box[4])))
    return faces


def _scales(height: int, width: int, min_size: int) -> list[float]:
    scale, least, found = 12 / min_size, min(height, width) * 12 / min_size, []
    while least >= 12:
        found.append(scale)
        scale, least = scale * FACTOR, least * FACTOR
    return found


def _propose(params: Any, images: np.ndarray, min_size: int, threshold: float) -> tuple[np.ndarray, np.ndarray]:
    """Return square boxes with their probabilities [m, 5], and the image of each [m]."""
    height, width = images.shape[1:3]
    device_images = jnp.asarray(images)
    boxes, owners = [], []
    for scale in _scales(height, width, min_size):
        size = (int(height * scale + 1), int(width * scale + 1))
        probability, regression = jax.device_get(_pyramid(params, device_images, size))
        owner, y, x = np.nonzero(probability >= threshold)
        corners = np.stack([x, y, x, y], axis=1).astype(np.float32) * 2
        corners = np.floor((corners + np.array([1, 1, 12, 12], np.float32)) / np.float32(scale))
        found = np.concatenate([corners, probability[owner, y, x, None], regression[owner, y, x]], axis=1)
        kept = suppress(found, owner, 0.5)
        boxes.append(found[kept])
        owners.append(owner[kept])
    found, owner = np.concatenate(boxes), np.concatenate(owners)
    kept = suppress(found, owner, 0.7)
    found, owner = found[kept], owner[kept]
    sides = np.tile(found[:, 2:4] - found[:, :2], 2)
    return _square(np.concatenate([found[:, :4] + found[:, 5:] * sides, found[:, 4:5]], axis=1)), owner


@functools.partial(jax.jit, static_argnums=2)
def _pyramid(params: Any, images: jax.Array, size: tuple[int, int]) -> tuple[jax.Array, jax.Array]:
    x = jnp.asarray(images, jnp.float32)
    with jax.default_matmul_precision("highest"):
        for axis, length in enumerate(size, 1):
            x = jnp.moveaxis(jnp.tensordot(_averages(x.shape[axis], length), x, (1, axis)), 0, axis)
        return PNet().apply({"params": params}, (x - 127.5) * 0.0078125)


def _averages(length: int, target: int) -> np.ndarray:
    """[target, length]: each row averages the inputs that its output covers (area interpolation)."""
    starts = np.arange(target) * length // target
    ends = -(-(np.arange(1, target + 1) * length) // target)
    i = np.arange(length)
    inside = (i >= starts[:, None]) & (i < ends[:, None])
    return (inside / inside.sum(axis=1, keepdims=True)).astype(np.float32)


def _refine(
    network: str, params: Any, images: np.ndarray, boxes: np.ndarray, owners: np.ndarray, size: int, threshold: float
) -> tuple[np.ndarray, np.ndarray]:
    height, width = images.shape[1:3]
    corners = boxes[:, :4].astype(np.int64)  # towards zero
    corners = np.concatenate([np.maximum(corners[:, :2], 1), np.minimum(corners[:, 2:], (width, height))], axis=1)
    real = (corners[:, 2] > corners[:, 0] - 1) & (corners[:, 3] > corners[:, 1] - 1)
    boxes, owners, corners = boxes[real], owners[real], corners[real]
    if not len(boxes):
        return np.zeros((0, 5), np.float32), np.zeros(0, np.int64)
    crops = np.empty((len(boxes), size, size, 3), np.float32)
    for i, (x, y, end_x, end_y) in enumerate(corners):
        crops[i] = _area(images[owners[i], y - 1 : end_y, x - 1 : end_x], size)
    probability, regression = _run(network, params, crops)
    kept = probability > threshold
    boxes = np.concatenate([boxes[kept, :4], probability[kept, None]], axis=1)
    owners, regression = owners[kept], regression[kept]
    if network == "rnet":
        kept = suppress(boxes, owners, 0.7)
        boxes, owners = boxes[kept], owners[kept]
        return _square(_shifted(boxes, regression[kept])), owners
    boxes = _shifted(boxes, regression)
    kept = suppress(boxes, owners, 0.7, of_smaller=True)
    return boxes[kept], owners[kept]


def _area(image: np.ndarray, size: int) -> np.ndarray:
    rows, columns = (_averages(n, size) for n in image.shape[:2])
    flat = rows @ image.reshape(len(image), -1).astype(np.float32)
    return np.einsum("xw,hwc->hxc", columns, flat.reshape(size, image.shape[1], 3), optimize=True)


def _run(network: str, params: Any, crops: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    probabilities, regressions = [], []
    for start in range(0, len(crops), CHUNK):
        chunk = crops[start : start + CHUNK]
        count = len(chunk)
        chunk = np.concatenate([chunk, np.zeros((CHUNK - count, *chunk.shape[1:]), np.float32)])
        probability, regression = jax.device_get(_REFINERS[network](params, chunk))
        probabilities.append(probability[:count])
        regressions.append(regression[:count])
    return np.concatenate(probabilities), np.concatenate(regressions)


def _refiner(network: nn.Module):
    @jax.jit
    def run(params: Any, crops: jax.Array) -> tuple[jax.Array, jax.Array]:
        with jax.default_matmul_precision("highest"):
            return network.apply({"params": params}, (crops - 127.5) * 0.0078125)[:2]

    return run


_REFINERS = {name: _refiner(NETWORKS[name][0]) for name in ("rnet", "onet")}


def _square(boxes: np.ndarray) -> np.ndarray:
    """Return boxes about the same centres, as wide as high."""
    sides = boxes[:, 2:4] - boxes[:, :2]
    longest = sides.max(axis=1, keepdims=True)
    corner = boxes[:, :2] + sides * 0.5 - longest * 0.5
    return np.concatenate([corner, corner + longest, boxes[:, 4:]], axis=1)


def _shifted(boxes: np.ndarray, regression: np.ndarray) -> np.ndarray:
    sides = np.tile(boxes[:, 2:4] - boxes[:, :2] + 1, 2)
    return np.concatenate([boxes[:, :4] + regression * sides, boxes[:, 4:]], axis=1)


def suppress(boxes: np.ndarray, owners: np.ndarray, threshold: float, *, of_smaller: bool = False) -> np.ndarray:
    """Return the rows to keep: none overlaps a more probable box of its image by more than a threshold.

    Args:
      boxes: [m, 5 or more], corners and probability.
      owners: [m], image of each.
      threshold: of the intersection over the union.
      of_smaller: over the smaller of both instead, with sides counted in whole pixels.

    Returns:
      int [k], the most probable first.
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
