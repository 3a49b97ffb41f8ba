"""Describe a written part of a split: what the builder needs of it for the manifest."""

import dataclasses
from pathlib import Path

import msgspec
import numpy as np

from conclugen_jax.data.moments import Moments
from conclugen_jax.data.sources import DatasetSpec


class _Texts(msgspec.Struct):
    """The fields of a part that are no arrays."""

    bad: list[tuple[int, str, str]]
    converted: dict[str, int]
    replaced: dict[str, int]
    targets: list[str]
    sha256: str


@dataclasses.dataclass
class Part:
    """Facts of a written part.

    Attributes:
      rows: int64 [n], the source's row of each record.
      presence: bool [n, modalities].
      ids: uint64 [n], hashes of the ids.
      groups: uint64 [n], hashes of the groups, 0 where empty.
      label_counts: the main label's first, then the further targets'; int64 [names] each.
      statistics: modality -> running statistics, of the first split.
      bad: (row, id, reason) of each example that was dropped.
      converted: number of vectors that were not float32, by "modality dtype".
      replaced: number of values that the source's reader put 0 for, by modality.
      sha256: of the file, "" where there is none.
    """

    rows: np.ndarray
    presence: np.ndarray
    ids: np.ndarray
    groups: np.ndarray
    label_counts: dict[str, np.ndarray]
    statistics: dict[str, Moments]
    bad: list[tuple[int, str, str]]
    converted: dict[str, int]
    replaced: dict[str, int]
    sha256: str = ""

    def save(self, path: Path) -> None:
        """Write an npz file that :meth:`load` reads."""
        texts = _Texts(self.bad, self.converted, self.replaced, list(self.label_counts), self.sha256)
        arrays = {name: getattr(self, name) for name in ("rows", "presence", "ids", "groups")}
        arrays |= {f"counts/{name}": counts for name, counts in self.label_counts.items()}
        for m, s in self.statistics.items():
            arrays |= {f"statistics/{m}/{k}": np.asarray(v) for k, v in vars(s).items()}
        np.savez(path, texts=np.frombuffer(msgspec.json.encode(texts), np.uint8), **arrays)

    @classmethod
    def load(cls, path: Path, spec: DatasetSpec) -> "Part":
        """Read what :meth:`save` wrote."""
        with np.load(path, allow_pickle=False) as file:
            texts, statistics = msgspec.json.decode(file["texts"].tobytes(), type=_Texts), {}
            for m in spec.modalities:
                if f"statistics/{m}/count" in file:
                    count, *others = (file[f"statistics/{m}/{k}"] for k in ("count", "mean", "squares"))
                    statistics[m] = Moments(int(count), *others)
            return cls(
                **{name: file[name] for name in ("rows", "presence", "ids", "groups")},
                label_counts={name: file[f"counts/{name}"] for name in texts.targets},
                statistics=statistics,
                bad=texts.bad,
                converted=texts.converted,
                replaced=texts.replaced,
                sha256=texts.sha256,
            )


Entries = list[tuple[Path, Part]]
"""File and facts of each part of a split, in order."""

Parts = dict[str, Entries]
"""By split."""
