"""What tests of maps share: data sets with words, clips and made pictures, and the map of one as a page."""

import io
from pathlib import Path

import numpy as np
from PIL import Image

from conclugen_jax.data import builders, shards, utterances
from conclugen_jax.data.utterances import Seen
from conclugen_jax.study.report import embedding_map, report, walk
from conclugen_jax.study.report.tables import Part
from tests.helpers import Faces
from tests.reports import unpacked

WORDS = "شكرا جزيلا على كل شيء", "Thank you for everything.", "<b>no markup</b> & “quotes”"


def picture(seed: int) -> bytes:
    """A picture of 64 x 64 as JPEG, about as large as one of a face."""
    rough = np.random.default_rng(seed).integers(0, 255, (6, 6, 3), np.uint8)
    file = io.BytesIO()
    Image.fromarray(rough).resize((64, 64), Image.Resampling.BICUBIC).save(file, "JPEG", quality=75, optimize=True)
    return file.getvalue()


class Seeable(Faces):
    """Examples of which words, clip and picture are known."""

    def __init__(self, num, folder: Path, clip: str = "", pictures: bool = True, **options):
        super().__init__(num, **options)
        self.beside = [folder / utterances.FILE]
        rows = [(split, f"{split}{i}") for split, n in zip(self.spec.splits, num, strict=True) for i in range(n)]
        seen = (Seen(WORDS[i % 3], clip, 0.0, 0.0, picture(i) if pictures else b"") for i in range(len(rows)))
        utterances.write(self.beside[0], ((*row, one) for row, one in zip(rows, seen, strict=True)))


def data_set(folder: Path, num, **options) -> shards.Dataset:
    folder.mkdir(parents=True, exist_ok=True)
    return shards.open_dataset(builders.build(Seeable(num, folder, **options), folder / "data"))


def map_of(dataset: shards.Dataset, folder: Path, *, clusters: bool = True, methods: int = 1) -> dict:
    """The data of a map of a data set whose representations and places are its features, less noise."""
    modalities = list(dataset.manifest.modalities)
    rows = walk.draw(dataset, modalities)
    parts = [shards.ShardStream(dataset, split, modalities).rows(at) for split, at in rows.indices.items()]
    x = np.concatenate([np.concatenate(list(part["features"].values()), axis=1) for part in parts])
    label, there = np.concatenate([part["label"] for part in parts]), np.ones(len(x), bool)
    classes = embedding_map.groups_of(label, dataset.manifest.label)
    of_run = classes[0] if clusters else np.zeros(0, int)
    noise = np.random.default_rng(0).normal(size=x.shape)
    spaces = [walk.Space(f"method {k}", False, x[:, k : k + 2], x + 0.1 * noise, there, of_run) for k in range(methods)]
    spaces.append(walk.Space("raw features", True, x[:, -2:], x, there, np.zeros(0, int)))
    return walk.data("faces", rows, label, classes, spaces, folder)


def page_of(path: Path, *maps: dict) -> Path:
    """Write a page of maps."""
    sections = {"Maps": [Part(f"map {i}", walk=one) for i, one in enumerate(maps)]}
    path.write_text(report.page("Maps", ["What was found."], [], sections), encoding="utf-8")
    return path


def unpacked_places(found: dict, space: int) -> np.ndarray:
    """Places [n, 2] of the points in a space."""
    return unpacked(found["spaces"][space]["places"]).reshape(-1, 2)
