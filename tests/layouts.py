"""Files in the layouts that users hold, written for tests, and what a data set built from them holds."""

import csv

import numpy as np

from conclugen_jax.data import builders, formats, shards
from conclugen_jax.data.annotations import Layout

DIMS = {"video": 5, "audio": 3, "text": 4}


def vector(dim, seed):
    return np.random.default_rng(seed).normal(size=dim).astype(np.float32)


def save(path, array):
    path.parent.mkdir(parents=True, exist_ok=True)
    np.save(path, array)


def write_csv(path, rows):
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, list(rows[0]))
        writer.writeheader()
        writer.writerows(rows)


def build(request, data_dir, **options):
    """Build, and read all rows back: split -> id -> (features of the present modalities, label, group)."""
    folder = builders.build(formats.open_source(request), data_dir, **options)
    dataset = shards.open_dataset(folder)
    result = {}
    for split in dataset.manifest.splits:
        stream = shards.ShardStream(dataset, split, list(dataset.manifest.modalities))
        every = np.arange(stream.num_examples)
        rows, (ids, groups) = stream.rows(every), stream.names(every)
        result[split] = {
            str(ids[i]): (
                {m: rows["features"][m][i] for m in stream.modalities if rows["present"][m][i]},
                rows["label"][i].tolist(),
                str(groups[i]),
            )
            for i in every
        }
    return dataset, result


def target(dataset, split, name):
    stream = shards.ShardStream(dataset, split, list(dataset.manifest.modalities), target=name)
    return stream.rows(np.arange(stream.num_examples))["label"].tolist()


def assert_features(found, expected):
    assert found.keys() == expected.keys()
    for modality, x in expected.items():
        np.testing.assert_array_equal(found[modality], x)


NO_LAYOUT = Layout()
LAYOUT = Layout(label=("emotion",), targets=("arousal",))


def table_rows(n=12, seed=0):
    """Ids, splits, labels, groups; and features of each modality by id, some missing."""
    rows = [
        {
            "id": f"clip{i}",
            "split": ("train", "dev", "test")[i % 3],
            "emotion": ("happy", "sad", "angry")[i // 3 % 3],
            "arousal": f"{i / 7:.3f}",
            "group": f"speaker{i % 3}",
        }
        for i in range(n)
    ]
    stored = {m: {f"clip{i}": vector(d, [seed, k, i]) for i in range(n)} for k, (m, d) in enumerate(DIMS.items())}
    del stored["text"]["clip4"], stored["audio"]["clip0"]
    return rows, stored


def write_csd(path, entries, *, root="a sequence"):
    """A CMU-MultimodalSDK file: video -> (features [steps, dim], intervals [steps, 2] in seconds)."""
    import h5py

    with h5py.File(path, "w") as file:
        for video, (x, intervals) in entries.items():
            group = file.create_group(f"{root}/data/{video}")
            group["features"], group["intervals"] = x, np.asarray(intervals, np.float64)
        file.create_group(f"{root}/metadata")["root name"] = np.array([root.encode()], dtype=h5py.string_dtype())
