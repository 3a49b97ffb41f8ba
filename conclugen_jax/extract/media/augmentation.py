"""Augmented views of a clip for the contrastive loss: one draw per clip and modality, applied to all of it.

Pictures: the published SimCLR settings (random resized crop, flip, colour jitter, grey, blur). Sound: masked bands of
frequency and time. Text: words swapped, deleted and repeated.
"""

import dataclasses
import hashlib
import math

import numpy as np
from PIL import Image, ImageEnhance, ImageFilter


@dataclasses.dataclass(frozen=True)
class View:
    """An augmented view of a clip; the draw follows from these alone, not from what else is computed."""

    seed: int
    clip: str
    number: int
    strength: str = "strong"  # a key of STRENGTHS

    def generator(self, modality: str) -> np.random.Generator:
        """Return the random numbers of this view of a modality."""
        text = f"{self.seed}\0{self.clip}\0{modality}\0{self.number}".encode()
        return np.random.default_rng(int.from_bytes(hashlib.blake2b(text, digest_size=16).digest(), "little"))


@dataclasses.dataclass(frozen=True)
class Strength:
    """How much pictures are changed."""

    area: tuple[float, float]  # of the crop, least and greatest part
    aspect: tuple[float, float]  # of the crop, least and greatest ratio of its sides
    jitter: float = 0.0  # probability of a change of colours
    grey: float = 0.0  # probability
    blur: float = 0.0  # probability


STRENGTHS = {  # for pretraining (paper, section 4) and, milder, for labelled sets
    "strong": Strength(area=(0.3, 1.0), aspect=(0.5, 2.0), jitter=0.8, grey=0.2, blur=0.5),
    "mild": Strength(area=(0.8, 1.0), aspect=(0.8, 1.2)),
}

COLOURS = dict.fromkeys(("brightness", "contrast", "saturation"), (1 - 0.8, 1 + 0.8)) | {"hue": (-0.2, 0.2)}
"""Least and greatest factor of a change of colours; of the hue, parts of the circle."""

MASK = (0.15, 0.35)  # least and greatest part of the bands, and of the time, of sound that is set to the least value
WORDS = 0.1  # parts of the words that are swapped, deleted and repeated, each at most


@dataclasses.dataclass(frozen=True)
class PictureChange:
    """One draw for all frames of a clip."""

    box: tuple[float, float, float, float]  # x, y of two corners of the crop, as parts of width and height
    flip: bool  # left and right
    colours: tuple[tuple[str, float], ...]  # operations in their order: name and amount
    blur: float  # standard deviation, as a part of the side; 0 for none

    def apply(self, frame: np.ndarray) -> np.ndarray:
        """uint8 [height, width, 3] -> the same size."""
        height, width = frame.shape[:2]
        box = tuple(part * side for part, side in zip(self.box, (width, height) * 2, strict=True))
        image = Image.fromarray(frame).resize((width, height), Image.Resampling.BILINEAR, box)
        if self.flip:
            image = image.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
        for name, amount in self.colours:
            image = _CHANGES[name](image, amount)
        if self.blur:
            image = image.filter(ImageFilter.GaussianBlur(self.blur * max(height, width)))
        return np.asarray(image)


def _hue(image: Image.Image, amount: float) -> Image.Image:
    hue, saturation, value = image.convert("HSV").split()
    turned = (np.asarray(hue, np.int32) + round(amount * 256)) % 256
    return Image.merge("HSV", (Image.fromarray(turned.astype(np.uint8)), saturation, value)).convert("RGB")


_CHANGES = {
    "brightness": lambda image, amount: ImageEnhance.Brightness(image).enhance(amount),
    "contrast": lambda image, amount: ImageEnhance.Contrast(image).enhance(amount),
    "saturation": lambda image, amount: ImageEnhance.Color(image).enhance(amount),
    "hue": _hue,
    "grey": lambda image, amount: image.convert("L").convert("RGB"),
}


def draw_pictures(rng: np.random.Generator, strength: Strength) -> PictureChange:
    """Draw a change for all frames of a clip."""
    colours: list[tuple[str, float]] = []
    box = _crop(rng, strength)
    flip = rng.random() < 0.5
    if rng.random() < strength.jitter:
        drawn = [(name, rng.uniform(*limits)) for name, limits in COLOURS.items()]
        colours = [drawn[i] for i in rng.permutation(len(drawn))]
    if rng.random() < strength.grey:
        colours.append(("grey", 1.0))
    # A kernel a tenth of the side, whose standard deviation is between 0.1 and 2 pixels of 224 (SimCLR).
    blur = rng.uniform(0.1, 2.0) / 224 if rng.random() < strength.blur else 0.0
    return PictureChange(box, flip, tuple(colours), blur)


def _crop(rng: np.random.Generator, strength: Strength) -> tuple[float, float, float, float]:
    """Draw a random resized crop: ten tries, then the whole frame."""
    low, high = map(math.log, strength.aspect)
    for _ in range(10):
        area, aspect = rng.uniform(*strength.area), math.exp(rng.uniform(low, high))
        width, height = math.sqrt(area * aspect), math.sqrt(area / aspect)
        if width <= 1 and height <= 1:
            x, y = rng.uniform(0, 1 - width), rng.uniform(0, 1 - height)
            return x, y, x + width, y + height
    return 0.0, 0.0, 1.0, 1.0


def change_sound(spectrogram: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """Mask a band of frequencies and a stretch of time with the least value; [frames, mels] -> the same shape."""
    changed = spectrogram.copy()
    for axis in (0, 1):
        length = changed.shape[axis]
        size = round(rng.uniform(*MASK) * length)
        start = int(rng.integers(0, length - size + 1))
        changed[(slice(None),) * axis + (slice(start, start + size),)] = spectrogram.min()
    return changed


def change_text(text: str, rng: np.random.Generator) -> str:
    """Swap, delete and repeat some words; one at least is left."""
    words = text.split()
    if len(words) < 2:
        return text
    most = max(1, round(WORDS * len(words)))
    for _ in range(int(rng.integers(0, most + 1))):
        i, j = rng.integers(0, len(words), 2)
        words[i], words[j] = words[j], words[i]
    for _ in range(min(int(rng.integers(0, most + 1)), len(words) - 1)):
        words.pop(int(rng.integers(0, len(words))))
    for _ in range(int(rng.integers(0, most + 1))):
        words.insert(int(rng.integers(0, len(words) + 1)), words[int(rng.integers(0, len(words)))])
    return " ".join(words)
