"""Small data sets that share emotions under other names, for scores across corpora."""

import numpy as np

from conclugen_jax.data.sources import DatasetSpec, Example, LabelSpec

EMOTIONS = ("calm", "happy", "sad", "angry", "fear")
DIMS = {"video": 24, "audio": 16, "text": 12}


class Corpus:
    """Rows around a centre for each emotion, equal for all corpora, in classes of any names and order.

    ``shift``: added to all features; ``seed``: of the rows; ``persons``: of each split.
    """

    def __init__(
        self, names=EMOTIONS, *, num=(60, 20, 40), name="one", kind="single", seed=0, shift=0.0, dims=DIMS, source=None
    ):
        self.spec = DatasetSpec(
            name=name,
            version="1.0.0",
            description="Random vectors.",
            licence="none",
            modalities=dims,
            label=LabelSpec(kind, tuple(names) if kind not in ("value", "none") else ()),
            splits=("train", "validation", "test"),
        )
        self._num, self._seed, self._shift = dict(zip(self.spec.splits, num, strict=True)), seed, shift
        self._kind, self._source, self._names = kind, source, tuple(names)

    def provenance(self):
        return self._source or {}

    def fingerprint(self):
        return f"{self.spec} {self._num} {self._seed} {self._shift}"

    def examples(self, split):
        rng = np.random.default_rng([self._seed, self.spec.splits.index(split)])
        centers = np.random.default_rng(7).normal(size=(len(EMOTIONS), 52)) * 0.6
        plain = [name.strip().casefold() for name in self._names]
        order = sorted(range(len(plain)), key=plain.__getitem__)
        for i in range(self._num[split]):
            y = order[rng.integers(len(order))]  # the same emotion whatever the order of the names
            emotion = EMOTIONS.index(plain[y]) if plain[y] in EMOTIONS else 0
            x = (centers[emotion] + rng.normal(size=52) + self._shift).astype(np.float32)
            parts = np.split(x, [24, 40])
            features = {m: part[:dim] for (m, dim), part in zip(self.spec.modalities.items(), parts, strict=False)}
            present = [int(y == c or rng.random() < 0.3) for c in range(len(self._names))]
            label = {"single": y, "multi": present, "value": float(emotion), "none": None}[self._kind]
            yield Example(id=f"{split}{i}", features=features, label=label, group=f"speaker{i % 4}")
