"""Provide the embedded demo data: 2,000 handwritten digits in three modalities (UCI Multiple Features, CC BY 4.0).

``digits.npz`` holds the tables ``mfeat-pix`` (uint8), ``mfeat-fou`` (float32) and ``mfeat-fac`` (uint16) in their original
order, the class of each row, and its split. The rows of each class were permuted, class by class, with
``numpy.random.default_rng(0)``; the first 140 are for training, the next 20 for validation, the last 40 for testing.
"""

import hashlib
import importlib.resources
import io
from collections.abc import Iterator

import numpy as np

from conclugen_jax.data.sources import DatasetSpec, Example, LabelSpec

FILE = "digits.npz"
SPLITS = ("train", "validation", "test")


class Digits:
    """Source of the embedded digits, for :func:`conclugen_jax.data.builders.build`."""

    spec = DatasetSpec(
        name="digits",
        version="1.0.0",
        description="2,000 handwritten numerals 0-9 from Dutch utility maps: pixel averages, Fourier coefficients, profiles.",
        licence="CC BY 4.0; Robert Duin, Multiple Features, UCI Machine Learning Repository, doi:10.24432/C5HC70",
        modalities={"pixels": 240, "fourier": 76, "profiles": 216},
        label=LabelSpec("single", tuple(str(digit) for digit in range(10))),
        splits=SPLITS,
    )

    def fingerprint(self) -> str:
        """Return the hash of the embedded file."""
        return hashlib.sha256(_embedded()).hexdigest()

    def examples(self, split: str) -> Iterator[Example]:
        """Yield the examples of a split in the order of the original file."""
        with np.load(io.BytesIO(_embedded()), allow_pickle=False) as file:
            arrays = dict(file)
        for row in np.flatnonzero(arrays["split"] == SPLITS.index(split)):
            yield Example(
                id=f"digit{row:04d}",
                features={m: arrays[m][row].astype(np.float32) for m in self.spec.modalities},
                label=int(arrays["label"][row]),
            )


def _embedded() -> bytes:
    return importlib.resources.files("conclugen_jax.data").joinpath(FILE).read_bytes()
