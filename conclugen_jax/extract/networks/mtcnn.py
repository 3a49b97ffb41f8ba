"""Face detection with MTCNN (Zhang et al., 2016), with the weights and the rules of facenet-pytorch.

Three small networks: P-Net proposes over an image pyramid, R-Net and O-Net refine. :class:`Network` describes them; NumPy
computes them in :func:`run`, image by image, since faces are found in the processes that decode, each of which has one core.
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
CHUNK = 256  # crops in a batch of R-Net and O-Net, at most


class PReLU(nn.Module):
    """max(x, 0) + slope * min(x, 0), a slope for each channel."""

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        """Keep what is positive and scale what is negative by the slope of its channel."""
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


def detect(params: Mapping[str, Any], images: np.ndarray, least: float = MIN_SIZE) -> list[np.ndarray]:
    """Find faces in images of one size, uint8 RGB [n, height, width, 3].

    Args:
      params: variables of ``pnet``, ``rnet`` and ``onet``.
      images: to search.
      least: side of the faces that P-Net looks for, at least, in pixels; it also proposes somewhat smaller ones.

    Returns:
      Of each image float32 [faces, 5], the most probable first: x, y of the upper left and the lower right corner, in
      pixels, and the probability that it is a face.
    """
    if min(images.shape[1:3]) < MIN_SIZE:
        return [np.zeros((0, 5), np.float32) for _ in images]
    return [_detect(params, _sums(image), least) for image in images]


def _detect(params: Mapping[str, Any], sums: np.ndarray, least: float) -> np.ndarray:
    boxes = _propose(params["pnet"], sums, least)
    for network in ("rnet", "onet"):
        boxes = _refine(network, params[network], sums, boxes)
    return boxes


def _sums(image: np.ndarray) -> np.ndarray:
    """Return the sums of all pixels above and to the left, int32 [3, height + 1, width + 1]: four make the sum of any box."""
    height, width = image.shape[:2]
    sums = np.zeros((3, height + 1, width + 1), np.int32)
    np.cumsum(np.moveaxis(image, 2, 0), axis=2, dtype=np.int32, out=sums[:, 1:, 1:])
    for row in range(1, height + 1):  # three times as fast as another cumsum
        sums[:, row] += sums[:, row - 1]
    return sums


def _cells(length: Any, target: int) -> tuple[np.ndarray, np.ndarray]:
    """Return start and end of the pixels that each of ``target`` outputs averages (area interpolation); they may overlap."""
    i, length = np.arange(target), np.asarray(length)[..., None]
    return i * length // target, -(-(i + 1) * length // target)


def _scaled(total: np.ndarray, count: np.ndarray) -> np.ndarray:
    """Return averages as the networks take them, float32, of sums and numbers of pixels."""
    return (total.astype(np.float32) * (1 / count).astype(np.float32) - 127.5) * np.float32(0.0078125)


def _resized(sums: np.ndarray, size: Sequence[int]) -> np.ndarray:
    """Return the whole image resized, float32 [3, 1, height, width]."""
    (top, bottom), (left, right) = (_cells(n - 1, target) for n, target in zip(sums.shape[1:], size, strict=True))
    rows = sums[:, bottom] - sums[:, top]
    total = np.take(rows, right, axis=2) - np.take(rows, left, axis=2)
    return _scaled(total, np.multiply.outer(bottom - top, right - left))[:, None]


def _crops(sums: np.ndarray, corners: np.ndarray, size: int) -> np.ndarray:
    """Return crops resized to squares, float32 [3, n, size, size]; ``corners``, int [n, 4]: x, y, from 1 on, both inside."""
    x, y = (np.stack(_cells(corners[:, i + 2] - corners[:, i] + 1, size)) + corners[:, i, None] - 1 for i in (0, 1))
    flat, (left, right), (top, bottom) = sums.reshape(3, -1), x[:, :, None], y[..., None] * sums.shape[2]
    total = np.take(flat, bottom + right, axis=1) - np.take(flat, bottom + left, axis=1)
    total -= np.take(flat, top + right, axis=1) - np.take(flat, top + left, axis=1)
    return _scaled(total, (y[1] - y[0])[..., None] * (right - left))


def run(network: str, params: Mapping[str, Any], x: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Return the first two outputs of a :class:`Network`, computed by NumPy: several times as fast on one core as XLA.

    ``x`` is float32 [3, n, height, width], as scaled there; outputs have their channels first, too: [n, ...] and [4, n, ...].
    """
    module, kind, last = NETWORKS[network][0], "conv", 0

    def layer(kind: str, number: int) -> tuple[np.ndarray, ...]:
        return *(params[f"{kind}{number}"][each] for each in ("kernel", "bias")), params[f"prelu{number}"]["slope"]

    for last, (_, _, pool) in enumerate(module.convolutions, 1):
        if last == 1 and pool == 2:
            x = _by_fours(x, *layer(kind, last))
        else:
            x = _convolved(x, *layer(kind, last))
            x = _maxima(x, pool) if pool else x
    if module.dense:
        kind, last = "dense", last + 1
        kernel, bias, slope = layer(kind, last)
        x = _prelu(kernel.T @ x.transpose(1, 2, 3, 0).reshape(x.shape[1], -1).T, bias, slope)
    heads = [params[f"{kind}{last + 1}_{i}"] for i in (1, 2)]
    flat = x.reshape(len(x), -1)
    found = [head["kernel"].reshape(len(x), -1).T @ flat + head["bias"][:, None] for head in heads]
    logits, regression = (each.reshape(-1, *x.shape[1:]) for each in found)
    return 1 / (1 + np.exp(logits[0] - logits[1])), regression


def _convolved(x: np.ndarray, kernel: np.ndarray, bias: np.ndarray, slope: np.ndarray, stride: int = 1) -> np.ndarray:
    """Return a convolution with bias and PReLU, [channels, n, height, width]: a product with all patches."""
    size, outputs = kernel.shape[:2], kernel.shape[3]
    patches = np.lib.stride_tricks.sliding_window_view(x, size, axis=(2, 3))[:, :, ::stride, ::stride]
    matrix, shape = kernel.transpose(3, 2, 0, 1).reshape(outputs, -1), patches.shape[1:4]
    y = matrix @ patches.transpose(0, 4, 5, 1, 2, 3).reshape(matrix.shape[1], -1)
    return _prelu(y, bias, slope).reshape(outputs, *shape)


def _prelu(x: np.ndarray, bias: np.ndarray, slope: np.ndarray) -> np.ndarray:
    """Add the bias to [channels, m] in place, and apply PReLU."""
    x += bias[:, None]
    below = np.minimum(x, 0)
    below *= slope[:, None] - 1
    x += below
    return x


def _by_fours(x: np.ndarray, kernel: np.ndarray, bias: np.ndarray, slope: np.ndarray) -> np.ndarray:
    """Return maxima of 2 x 2 outputs of a convolution, which one longer kernel computes together: larger products."""
    height, width, inputs, outputs = kernel.shape
    longer = np.zeros((height + 1, width + 1, inputs, 2, 2, outputs), np.float32)
    for i, j in np.ndindex(2, 2):
        longer[i : i + height, j : j + width, :, i, j] = kernel
    odd = [(n - size) % 2 == 0 for n, size in zip(x.shape[2:], kernel.shape, strict=False)]
    x = np.pad(x, ((0, 0), (0, 0), *((0, int(more)) for more in odd)))
    y = _convolved(x, longer.reshape(height + 1, width + 1, inputs, -1), np.tile(bias, 4), np.tile(slope, 4), 2)
    y = y.reshape(2, 2, outputs, *y.shape[1:])
    if odd[0]:
        y[1, ..., -1, :] = y[0, ..., -1, :]
    if odd[1]:
        y[:, 1, ..., -1] = y[:, 0, ..., -1]
    return y.max(axis=(0, 1))


def _maxima(x: np.ndarray, size: int) -> np.ndarray:
    """Return maxima of windows 2 apart over the last two axes; the last may reach over the edge."""
    counts = [max(-(-(n - size) // 2), 0) + 1 for n in x.shape[2:]]
    edges = [(0, 2 * count - 2 + size - n) for n, count in zip(x.shape[2:], counts, strict=True)]
    x = np.pad(x, ((0, 0), (0, 0), *edges), constant_values=-np.inf)
    x = functools.reduce(np.maximum, [x[:, :, i : i + 2 * counts[0] - 1 : 2] for i in range(size)])
    return functools.reduce(np.maximum, [x[..., i : i + 2 * counts[1] - 1 : 2] for i in range(size)])


def _propose(params: Mapping[str, Any], sums: np.ndarray, least: float) -> np.ndarray:
    """Return square boxes with their probabilities [m, 5], of windows of ``least`` pixels a side or more."""
    height, width = (n - 1 for n in sums.shape[1:])
    boxes, side = [np.zeros((0, 9), np.float32)], MIN_SIZE  # of the windows of a level
    while side <= min(height, width):
        if side >= least:
            boxes.append(_level(params, sums, 12 / side))
        side /= FACTOR
    found = np.concatenate(boxes)
    found = found[suppress(found, 0.7)]
    return _square(_shifted(found, found[:, 5:], 0))


def _level(params: Mapping[str, Any], sums: np.ndarray, scale: float) -> np.ndarray:
    """Return what P-Net finds in an image of another scale: corners, probability, regression [m, 9]."""
    size = [int((n - 1) * scale + 1) for n in sums.shape[1:]]
    (probability,), regression = run("pnet", params, _resized(sums, size))
    y, x = np.nonzero(probability >= THRESHOLDS["pnet"])
    corners = np.stack([x, y, x, y], axis=1).astype(np.float32) * 2
    corners = np.floor((corners + np.array([1, 1, 12, 12], np.float32)) / np.float32(scale))
    found = np.concatenate([corners, probability[y, x, None], regression[:, 0, y, x].T], axis=1)
    return found[suppress(found, 0.5)]


def _refine(network: str, params: Mapping[str, Any], sums: np.ndarray, boxes: np.ndarray) -> np.ndarray:
    """Return the boxes that a network takes for faces, moved as it says."""
    corners = boxes[:, :4].astype(np.int64)  # towards zero
    ends = np.minimum(corners[:, 2:], (sums.shape[2] - 1, sums.shape[1] - 1))
    corners = np.concatenate([np.maximum(corners[:, :2], 1), ends], axis=1)
    real = (corners[:, 2:] >= corners[:, :2]).all(axis=1)
    if not real.any():
        return np.zeros((0, 5), np.float32)
    parts = np.array_split(corners[real], -(-np.count_nonzero(real) // CHUNK))
    found = [run(network, params, _crops(sums, part, NETWORKS[network][1])) for part in parts]
    probability, regression = (np.concatenate(outputs, axis=-1) for outputs in zip(*found, strict=True))
    kept = probability > THRESHOLDS[network]
    boxes, regression = np.concatenate([boxes[real, :4], probability[:, None]], axis=1)[kept], regression.T[kept]
    if network == "rnet":
        kept = suppress(boxes, 0.7)
        return _square(_shifted(boxes[kept], regression[kept], 1))
    boxes = _shifted(boxes, regression, 1)
    return boxes[suppress(boxes, 0.7, of_smaller=True)]


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


def suppress(boxes: np.ndarray, threshold: float, *, of_smaller: bool = False) -> np.ndarray:
    """Return the rows to keep, the most probable first: none overlaps a better one by more than a threshold.

    ``boxes`` are [m, 5 or more], corners and probability. The threshold is of the intersection over the union or, with
    ``of_smaller``, over the smaller of both, whose sides are counted in whole pixels.
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
        order = order[shared <= threshold * whole]
    return np.array(kept, np.int64)
