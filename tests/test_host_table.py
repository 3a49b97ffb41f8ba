"""Tables: the same rows wherever they are kept, files made once, remade when damaged or of other data."""

import concurrent.futures
import dataclasses
import json
import os
import threading
import time

import jax
import numpy as np
import pytest
from flax import traverse_util
from tensorflow_datasets.core import example_serializer
from tensorflow_datasets.proto import tf_example_pb2

from conclugen_jax.data import batches, builders, records, shards
from conclugen_jax.data.sources import Example
from conclugen_jax.errors import ConclugenError
from conclugen_jax.train import parallel
from tests.helpers import Faces, assert_same_bits
from tests.test_records import Parted

MODALITIES = ("text", "audio")


@pytest.fixture
def dataset(tmp_path):
    return shards.open_dataset(builders.build(Parted((64, 10, 10), missing=0.4, variants=2), tmp_path / "data"))


def stream(dataset, modalities=MODALITIES, **kwargs):
    return shards.ShardStream(dataset, "train", modalities, **kwargs)


def cache(dataset):
    return dataset.path / batches.FOLDER / "train"


def test_every_tier_gives_the_same_rows_bit_for_bit(dataset, monkeypatch):
    monkeypatch.setattr(batches, "CHUNK_ROWS", 7)
    modalities = ("text", "video")
    sources = [
        batches.load(stream(dataset, modalities), tier=tier, host_cache_gib=limit)
        for tier in ("device", "host", "shards")
        for limit in (0.0, 1.0)
    ]
    for epoch in range(2):
        for step in range(3):
            (indices,) = batches.batch_indices(
                sources[0].usable, seed=3, epoch=epoch, first_step=step, num_steps=1, batch_size=16
            )
            expected = sources[-1].rows(indices)
            for source in sources[:-1]:
                assert_same_bits(source.rows(indices), expected)
            table = parallel.replicate_by_rows(
                {k: sources[0].table[k] for k in ("features", "present")}, jax.devices()[:2], chunk_bytes=500
            )
            on_device = jax.tree.map(lambda x, i=indices: np.asarray(x)[i], table)
            assert_same_bits(on_device, {k: expected[k] for k in ("features", "present")})


def test_a_table_is_written_once_and_mapped_after(dataset):
    first = batches.load(stream(dataset), tier="host", host_cache_gib=0.0)
    assert all(isinstance(x, np.memmap) for x in first.table["features"].values())
    before = {p.name: p.stat().st_mtime_ns for p in cache(dataset).iterdir()}
    assert set(before) == {f"{name}.{end}" for name in (*MODALITIES, "label.") for end in ("npy", "json")}
    calls = []
    batches.load(stream(dataset), tier="host", host_cache_gib=0.0, progress=lambda *done: calls.append(done))
    assert {p.name: p.stat().st_mtime_ns for p in cache(dataset).iterdir()} == before
    assert not calls
    # another modality and another target are added
    other = stream(dataset, ("video",), target="age")
    added = batches.load(other, tier="host", host_cache_gib=0.0, progress=lambda *done: calls.append(done))
    np.testing.assert_array_equal(added.table["label"], other.rows(np.arange(64))["label"])
    assert calls == [(64, 64)]


def damage_flip(path):
    path.write_bytes(path.read_bytes()[:-1] + bytes([path.read_bytes()[-1] ^ 1]))


DAMAGE = {
    "flipped bit": damage_flip,
    "truncated": lambda p: p.write_bytes(p.read_bytes()[:-8]),
    "deleted": lambda p: p.unlink(),
    "facts": lambda p: p.with_suffix(".json").write_text("{"),
    "nested facts": lambda p: p.with_suffix(".json").write_text("[" * 100_000),
    "header": lambda p: p.write_bytes(p.read_bytes().replace(b"'<f4'", b"'<f4 ")),
    "of other data": lambda p: p.with_suffix(".json").write_text(
        json.dumps(json.loads(p.with_suffix(".json").read_text()) | {"manifest": "0" * 64})
    ),
}


@pytest.mark.parametrize("kind", DAMAGE)
def test_a_table_that_does_not_fit_is_made_anew(dataset, kind, caplog):
    expected = stream(dataset).rows(np.arange(64))
    batches.load(stream(dataset), tier="host", host_cache_gib=0.0)
    DAMAGE[kind](cache(dataset) / "audio.npy")
    again = batches.load(stream(dataset), tier="host", host_cache_gib=0.0)
    assert_same_bits(again.rows(np.arange(64)), expected)
    assert kind == "deleted" or "audio.npy: damaged, or of other data" in caplog.text
    assert not [p for p in cache(dataset).iterdir() if p.name.startswith(".")]


def test_of_files_whose_size_alone_is_compared_headers_are_looked_at(dataset):
    batches.load(stream(dataset), tier="host", host_cache_gib=0.0)
    trusting = shards.open_dataset(dataset.path, verify="size")
    expected, path = stream(dataset).rows(np.arange(64)), cache(dataset) / "audio.npy"
    audio = expected["features"]["audio"]
    columns = {"audio": (audio.shape, audio.dtype)}
    sound = path.read_bytes()
    harmless = 0
    for i in range(128):
        path.write_bytes(sound[:i] + bytes([sound[i] ^ 1]) + sound[i + 1 :])
        found = batches._stored(stream(trusting), cache(dataset), columns)
        harmless += found is not None
        assert found is None or found["audio"].tobytes() == audio.tobytes()
    assert harmless < 8
    for damaged in (sound + b"0", sound[:-1]):
        path.write_bytes(damaged)
        assert batches._stored(stream(trusting), cache(dataset), columns) is None
    path.write_bytes(sound)
    assert batches._stored(stream(trusting), cache(dataset), columns) is not None


def test_facts_are_never_beside_another_file(dataset, monkeypatch):
    """Whoever opens a file and then reads its facts has those of this file."""
    batches.load(stream(dataset), tier="host", host_cache_gib=0.0)
    damage_flip(cache(dataset) / "text.npy")
    replace, seen = os.replace, []

    def watched(source, target):
        seen.append(target.name)
        assert not target.with_suffix(".json").exists()
        assert target.suffix == ".npy" or target.with_suffix(".npy").exists()
        replace(source, target)

    monkeypatch.setattr(os, "replace", watched)
    batches.load(stream(dataset), tier="host", host_cache_gib=0.0)
    assert seen == [f"{n}.npy" for n in ("label.", "audio", "text")] + [
        f"{n}.json" for n in ("text", "audio", "label.")
    ]


def test_one_process_makes_a_table_and_others_wait_for_it(dataset, monkeypatch, caplog):
    fill, calls, begun, go_on = batches._fill, [], threading.Event(), threading.Event()

    def slow(*args):
        calls.append(1)
        begun.set()
        assert go_on.wait(30)
        fill(*args)

    monkeypatch.setattr(batches, "_fill", slow)
    cache(dataset).mkdir(parents=True)
    (cache(dataset) / ".tmp-killed.npy").touch()
    with concurrent.futures.ThreadPoolExecutor() as pool:

        def load():
            return batches.load(stream(dataset), tier="host", host_cache_gib=0.0).table

        first = pool.submit(load)
        assert begun.wait(30)
        second = pool.submit(load)
        while "waiting for it" not in caplog.text and not second.done():
            time.sleep(0.01)
        assert not second.done()
        go_on.set()
        assert_same_bits(first.result(), second.result())
    assert f"being made by process {os.getpid()} on" in caplog.text
    assert len(calls) == 1
    assert not [p.name for p in cache(dataset).iterdir() if p.name.startswith(".")]


@pytest.mark.parametrize("kind", ["none", "multi"])
def test_labels_of_every_kind_are_mapped(tmp_path, kind):
    dataset = shards.open_dataset(builders.build(Faces((20, 5, 5), kind=kind), tmp_path))
    for _ in range(2):
        table = batches.load(stream(dataset), tier="host", host_cache_gib=0.0)
        assert_same_bits(table.rows(np.arange(20)), stream(dataset).rows(np.arange(20)))


def test_a_rebuilt_data_set_has_no_old_table(tmp_path):
    source = Faces((20, 5, 5))
    dataset = shards.open_dataset(builders.build(source, tmp_path))
    batches.load(stream(dataset), tier="host", host_cache_gib=0.0)
    dataset = shards.open_dataset(builders.build(Faces((20, 5, 5), seed=1), tmp_path, overwrite=True))
    table = batches.load(stream(dataset), tier="host", host_cache_gib=0.0)
    assert_same_bits(table.rows(np.arange(20)), stream(dataset).rows(np.arange(20)))


def test_where_nothing_can_be_written_the_table_is_in_memory(dataset, monkeypatch, caplog):
    def full(*args):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(batches, "_reserve", full)
    table = batches.load(stream(dataset), tier="host", host_cache_gib=0.0)
    assert not isinstance(table.table["features"]["audio"], np.memmap)
    assert_same_bits(table.rows(np.arange(64)), stream(dataset).rows(np.arange(64)))
    assert "cannot be kept there (No space left on device)" in caplog.text
    assert not list(cache(dataset).iterdir())


def test_targets_are_labels_on_request(dataset):
    np.testing.assert_array_equal(stream(dataset, target="age").rows(np.arange(3))["label"], [np.nan, 0.25, 0.5])
    assert stream(dataset, target="mood").rows(np.arange(4))["label"].tolist() == [0, -1, -1, 1]
    with pytest.raises(ConclugenError, match="no target 'height'; it has 'age', 'mood'"):
        stream(dataset, target="height")


def test_a_device_table_is_filled_by_chunks(monkeypatch):
    """The host hands over no more than a chunk at a time, so that the table is never there twice."""
    sizes, put = [], jax.device_put
    monkeypatch.setattr(jax, "device_put", lambda x, *args: sizes.append(x.nbytes) or put(x, *args))
    table = {"wide": np.arange(1000.0 * 7, dtype=np.float32).reshape(1000, 7), "flag": np.arange(1000) % 3 == 0}
    filled = parallel.replicate_by_rows(table, jax.devices()[:2], chunk_bytes=2800)
    assert len(sizes) == 10 + 1
    assert max(sizes) == 2800
    assert_same_bits(filled, table)
    assert {d for x in filled.values() for d in x.devices()} == set(jax.devices()[:2])


def test_tables_of_integers_are_of_the_device_s_own(monkeypatch):
    """JAX has no int64 unless it is told to, and says so with a warning, which is an error here."""
    table = {"label": np.arange(1000) * 3}
    filled = parallel.replicate_by_rows(table, jax.devices()[:2], chunk_bytes=800)
    assert filled["label"].dtype == np.int32
    np.testing.assert_array_equal(filled["label"], table["label"])


@pytest.mark.parametrize("dims", [{"a": 3, "ab": 5, "a_b": 4, "B": 2}, {"wide": 4096, "wider": 5000, "w": 40}])
def test_both_ways_to_read_a_record_agree_whatever_names_and_lengths(tmp_path, dims):
    """Names of which one begins another; vectors from 16 KiB on, whose lengths take three bytes."""

    class Named(Faces):
        def examples(self, split):
            for i in range(5):
                rng = np.random.default_rng(i)
                yield Example(f"{split}{i}", {m: rng.normal(size=d).astype("f4") for m, d in dims.items()}, label=i % 4)

    source = Named()
    source.spec = dataclasses.replace(source.spec, modalities=dims)
    fast = shards.ShardStream(shards.open_dataset(builders.build(source, tmp_path)), "train", tuple(dims))
    assert all(fast._wire.locate(record) is not None for record in fast._read(range(5)))
    rows = fast.rows(np.arange(5))
    fast._wire.locate = lambda record: None
    assert_same_bits(fast.rows(np.arange(5)), rows)
    for i, example in enumerate(source.examples("train")):
        for m in dims:
            np.testing.assert_array_equal(rows["features"][m][i], example.features[m])


def test_vectors_are_taken_from_the_bytes_of_records_laid_out_as_usual_and_parsed_from_others(tmp_path, monkeypatch):
    source = Parted((20, 5, 5), missing=0.4, variants=2)
    usual = stream(shards.open_dataset(builders.build(source, tmp_path / "usual")), ("text", "video"))
    raw = usual.source.__getitems__(list(range(20)))
    assert all(usual._wire.locate(record) is not None for record in raw)
    assert usual._wire.locate(b"\x12" + raw[0][1:]) is None
    assert usual._wire.locate(raw[0][:300]) is None
    features = records.record_features(source.spec)
    theirs = example_serializer.ExampleSerializer(features.get_serialized_info())
    monkeypatch.setattr(
        records,
        "serialize",
        # TFDS' own way, with a field in front that sorts before ours
        lambda record: (
            tf_example_pb2.Example(
                features={"feature": {"another": {"int64_list": {"value": [1]}}}}
            ).SerializeToString()
            + theirs.serialize_example(features.encode_example(traverse_util.unflatten_dict(record, sep="/")))
        ),
    )
    other = stream(shards.open_dataset(builders.build(source, tmp_path / "other")), ("text", "video"))
    raw = other.source.__getitems__(list(range(20)))
    assert all(other._wire.locate(record) is None for record in raw)
    assert_same_bits(other.rows(np.arange(20)), usual.rows(np.arange(20)))
    both = {"video": np.tile([0, 1], (20, 1))}
    assert_same_bits(other.rows(np.arange(20), both), usual.rows(np.arange(20), both))
