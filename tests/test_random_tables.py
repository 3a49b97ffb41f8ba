"""Random tables of any size, type and content come back as they were."""

import csv
import functools
import tempfile
import unicodedata
from pathlib import Path

import numpy as np
from hypothesis import HealthCheck, given, settings, strategies as st

from conclugen_jax.data import builders, formats, shards
from conclugen_jax.data.requests import Layout, Request

names = st.text(st.characters(codec="utf-8", categories=("L", "N", "P", "S")), min_size=1, max_size=12).map(
    functools.partial(unicodedata.normalize, "NFC")  # as names are stored
).filter(
    lambda s: "/" not in s and "\\" not in s and s not in (".", "..") and not s.startswith(".") and s.isprintable()
    and len(s.encode()) < 200 and len(s.splitlines()) == 1
)  # fmt: skip


@settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(data=st.data())
def test_random_tables_come_back_as_they_were(data):
    ids = data.draw(st.lists(names, min_size=1, max_size=12, unique=True))
    dims = data.draw(st.dictionaries(st.sampled_from("abc"), st.integers(1, 6), min_size=1))
    dtype = data.draw(st.sampled_from(["float16", "float32", "float64", "int8", "uint16", "bool", ">f4"]))
    seed = data.draw(st.integers(0, 2**32 - 1))
    rng = np.random.default_rng(seed)
    x = {m: (rng.normal(size=(len(ids), d)) * 100).astype(dtype) for m, d in dims.items()}
    there = {m: rng.random(len(ids)) < 0.7 for m in dims}
    first = next(iter(dims))
    for m in dims:
        there[m][0] = True  # no modality is empty
    there[first] |= ~np.any(list(there.values()), axis=0)  # no row is
    splits = [("train", "val", "test")[k] for k in rng.integers(3, size=len(ids))]
    splits[0] = "train"
    labels = [("no", "yes", 'mé, "x"')[k] for k in rng.integers(3, size=len(ids))]
    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder)
        as_folder = {m: bool(rng.integers(2)) for m in dims}
        for m, table in x.items():
            rows = np.flatnonzero(there[m])
            if as_folder[m]:
                (root / "t" / m).mkdir(parents=True)
                for i in rows:
                    np.save(root / "t" / m / f"{ids[i]}.npy", table[i])
            else:
                (root / "t").mkdir(exist_ok=True)
                np.save(root / "t" / f"{m}.npy", table[rows])
                (root / "t" / f"{m}.txt").write_text("\n".join(ids[i] for i in rows), encoding="utf-8")
        with (root / "t" / "labels.csv").open("w", encoding="utf-8", newline="") as file:
            csv.writer(file).writerows([("id", "split", "mood"), *zip(ids, splits, labels, strict=True)])
        request = Request("features", root / "t", name="random", layout=Layout(label=("mood",)))
        dataset = shards.open_dataset(builders.build(formats.open_source(request), root / "data"))
        assert set(dataset.manifest.modalities.items()) == set(dims.items())
        found = {}
        for split in dataset.manifest.splits:
            stream = shards.ShardStream(dataset, split, list(dims))
            rows = stream.rows(np.arange(stream.num_examples))
            for k, name in enumerate(stream.names(np.arange(stream.num_examples))[0]):
                found[str(name)] = split, k, rows
        assert found.keys() == set(ids)
        for i, name in enumerate(ids):
            split, k, rows = found[name]
            assert split == {"val": "validation"}.get(splits[i], splits[i])
            assert dataset.manifest.label.names[rows["label"][k]] == labels[i]
            for m in dims:
                assert rows["present"][m][k] == there[m][i]
                expected = x[m][i].astype(np.float32) if there[m][i] else np.zeros(dims[m])
                np.testing.assert_array_equal(rows["features"][m][k], expected)
