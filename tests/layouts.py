"""Files in the layouts that users hold, written for tests, and what a data set built from them holds."""

import contextlib
import csv
import os
import resource
from pathlib import Path

import numpy as np
import pytest

from conclugen_jax.data import builders, formats, shards
from conclugen_jax.data.requests import Layout, Request
from conclugen_jax.errors import ConclugenError

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


def refused(message, source, **options):
    """The request ends in one sentence that says so."""
    request = Request(**{"dataset": "features", "name": "mine", "source": source} | options)
    with pytest.raises(ConclugenError, match=message) as e:
        formats.open_source(request)
    assert "\n" not in str(e.value)


def matrices(folder, *modalities, ids="ab"):
    """A matrix for each modality."""
    for name in modalities:
        save(folder / f"{name}.npy", np.ones((len(ids), 2)))
        (folder / f"{name}.txt").write_text("\n".join(ids))
    return folder


@contextlib.contextmanager
def little_memory():
    """A gigabyte beyond what is in use: what takes more ends in MemoryError, not in the death of the machine."""
    if not Path("/proc/self/statm").exists():
        pytest.skip("no /proc to say how much memory is in use")
    used = int(Path("/proc/self/statm").read_text().split()[0]) * os.sysconf("SC_PAGE_SIZE")
    before = resource.getrlimit(resource.RLIMIT_AS)
    resource.setrlimit(resource.RLIMIT_AS, (used + 2**30, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_AS, before)
