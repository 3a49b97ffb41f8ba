"""Data layer: build and read back, every refusal, statistics, order of batches, one interface over three tiers."""

import json
import os
import shutil
import threading
from pathlib import Path

import numpy as np
import pytest

from conclugen_jax.data import batches, builders, manifest as manifest_lib, shards
from conclugen_jax.errors import ConclugenError
from conclugen_jax.system import files
from tests.helpers import Faces


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return builders.build(Faces(missing=0.3), tmp_path_factory.mktemp("data"))


@pytest.fixture
def copy(folder, tmp_path):
    """A private copy of the data set, to be damaged."""
    return shutil.copytree(folder, tmp_path / "copy")


def test_manifest_describes_files_splits_and_statistics(folder):
    source = Faces(missing=0.3)
    manifest = manifest_lib.read(folder)
    train = list(source.examples("train"))
    assert manifest.modalities == {"video": 24, "audio": 16, "text": 12}
    assert manifest.label.names == ("calm", "happy", "sad", "angry")
    assert manifest.splits["train"]["num_examples"] == 64
    assert manifest.splits["train"]["label_counts"] == np.bincount([e.label for e in train]).tolist()
    for m in manifest.modalities:
        x = np.stack([e.features[m] for e in train if m in e.features]).astype(np.float64)
        assert manifest.splits["train"]["present"][m] == len(x)
        np.testing.assert_allclose(manifest.statistics[m]["mean"], x.mean(0), rtol=1e-12, atol=1e-12)
        np.testing.assert_allclose(manifest.statistics[m]["std"], x.std(0), rtol=1e-10)
    on_disk = {p.name for p in folder.iterdir()} - {manifest_lib.FILE}
    assert set(manifest.files) == on_disk
    assert sum(f.get("records", 0) for f in manifest.files.values()) == 64 + 24 + 24
    assert manifest_lib.read(folder).fingerprint() == manifest.fingerprint()


def damage_flip(path):
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)


def damage_swap(path):
    other = next(p for p in path.parent.glob("*array_record*") if p != path)
    content, other_content = path.read_bytes(), other.read_bytes()
    path.write_bytes(other_content)
    other.write_bytes(content)


DAMAGE = {
    "flipped bit": damage_flip,
    "truncated": lambda p: os.truncate(p, p.stat().st_size // 2),
    "missing": lambda p: p.unlink(),
    "swapped": damage_swap,
    "empty": lambda p: p.write_bytes(b""),
}


@pytest.mark.parametrize("kind", DAMAGE)
def test_damaged_shards_are_found_and_named(copy, kind):
    path = next(copy.glob("*train*array_record*"))
    DAMAGE[kind](path)
    with pytest.raises(ConclugenError, match=r"array_record.*--overwrite"):
        shards.open_dataset(copy)


def test_every_file_is_covered(folder, tmp_path):
    for name in manifest_lib.read(folder).files:
        copy = shutil.copytree(folder, tmp_path / name)
        damage_flip(copy / name)
        with pytest.raises(ConclugenError, match=name):
            shards.open_dataset(copy)


def test_size_check_finds_truncation_but_trusts_content(copy):
    path = next(copy.glob("*train*array_record*"))
    damage_flip(path)
    shards.open_dataset(copy, verify="size")
    os.truncate(path, 100)
    with pytest.raises(ConclugenError, match="100 bytes"):
        shards.open_dataset(copy, verify="size")


class Bomb:
    """Unpickling this ends the tests."""

    def __reduce__(self):
        return os._exit, (13,)


def spoil_manifest(copy, change):
    path = copy / manifest_lib.FILE
    tree = json.loads(path.read_text())
    change(tree)
    path.write_text(json.dumps(tree))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda t: t.update(format_version=99), "version 99"),
        (lambda t: t.pop("splits"), "damaged"),
        (lambda t: t.update(statistics={}), "damaged"),
        (lambda t: t["statistics"]["text"].update(mean=[float("nan")] * 12), "damaged"),
        (lambda t: t["statistics"]["text"].update(std=[1.0]), "damaged"),
        (lambda t: t.update(modalities=3), "damaged"),
        (lambda t: t["label"].update(kind="pairs"), "damaged"),
        (lambda t: t["files"].update({"../../etc/passwd": {"sha256": "0" * 64, "bytes": 1}}), "damaged"),
        (lambda t: t["splits"]["train"].update(num_examples=-1), "damaged"),
        (lambda t: t["splits"]["train"].update(num_examples=64.0), "damaged"),
        (lambda t: t["splits"]["train"].update(label_counts=[1]), "damaged"),
        (lambda t: t.update(files={}), "damaged"),
        (lambda t: t["modalities"].update(text=12.0), "damaged"),
        (lambda t: t["statistics"]["text"].update(mean=[1e300] * 12), "damaged"),
        (lambda t: t["statistics"]["text"].update(mean=[10**400] * 12), "damaged"),
        (lambda t: t["modalities"].update(text=10**400), "damaged"),
        (lambda t: t["splits"]["train"].update(num_examples=10**400), "damaged"),
        (lambda t: [f.update(bytes=10**400) for f in t["files"].values()], "damaged"),
        (lambda t: [f.update(bytes=True) for f in t["files"].values()], "damaged"),
        (lambda t: [f.update(sha256=[0] * 64) for f in t["files"].values()], "damaged"),
        (lambda t: t.update(variants={"video": 10**400}), "damaged"),
        (lambda t: t["source"].update(number=float("nan")), "damaged"),
        (lambda t: t["source"].update(converted={"video": 1}), "damaged"),
        (lambda t: t["source"].update(converted=[]), "damaged"),
        (lambda t: t["source"].update(replaced={"video": "many"}), "damaged"),
        (lambda t: t["source"].update(rows_outside_folds=-1), "damaged"),
        (lambda t: t.update(licence=3), "damaged"),
        (lambda t: t["label"]["names"].append(3), "damaged"),
        (lambda t: t.update(source="here"), "damaged"),
        (lambda t: t.update(warnings=[1]), "damaged"),
        (lambda t: t.update(splits={}), "damaged"),
        (
            lambda t: [t.update(modalities={}, variants={}), *(f["present"].clear() for f in t["splits"].values())],
            "damaged",
        ),
    ],
)
def test_damaged_manifests_are_refused(copy, change, message):
    spoil_manifest(copy, change)
    with pytest.raises(ConclugenError, match=message):
        shards.open_dataset(copy)


def test_manifest_that_is_no_json_or_absent(copy):
    (copy / manifest_lib.FILE).write_text('{"format": "concl')
    with pytest.raises(ConclugenError, match=r"manifest\.json: not valid JSON .*build the data set again"):
        shards.open_dataset(copy)
    with pytest.raises(ConclugenError, match="conclugen build"):
        shards.open_dataset(copy / "nowhere")


def test_a_manifest_in_a_folder_that_may_not_be_read(copy, monkeypatch):
    def denied(*args, **kwargs):
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(Path, "read_text", denied)
    with pytest.raises(ConclugenError, match=r"manifest\.json: cannot be read \(Permission denied\)"):
        manifest_lib.read(copy)


@pytest.mark.parametrize("depth", [600, 100_000])
def test_a_manifest_that_is_nested_without_end(copy, depth):
    """Also such that it can be read but not copied."""
    path = copy / manifest_lib.FILE
    text = path.read_text()
    path.write_text(text.replace('"source": {', '"source": {"deep": ' + "[" * depth + "]" * depth + ",", 1))
    with pytest.raises(
        ConclugenError, match=r"manifest\.json: (damaged manifest|not valid JSON) .*build the data set again"
    ):
        shards.open_dataset(copy)


def test_wrong_record_count_is_found(copy):
    def spoil(tree):
        tree["splits"]["train"].update(num_examples=63)
        next(f for name, f in tree["files"].items() if "-train." in name).update(records=63)

    spoil_manifest(copy, spoil)
    with pytest.raises(ConclugenError, match="64 records, the manifest says 63"):
        batches.load(shards.ShardStream(shards.open_dataset(copy), "train", ("video",)))


@pytest.mark.parametrize(
    "array",
    [np.ones((64, 2), bool), np.ones((63, 3), bool), np.ones((64, 3)), np.array([[Bomb()] * 3] * 64, object)],
    ids=["narrow", "short", "floats", "objects"],
)
def test_presence_flags_of_another_shape_or_kind_are_refused_unexecuted(copy, array):
    path = copy / "presence-train.npy"
    np.save(path, array, allow_pickle=True)
    facts = {"sha256": files.sha256(path), "bytes": path.stat().st_size}
    spoil_manifest(copy, lambda t: t["files"].update({path.name: facts}))
    with pytest.raises(ConclugenError, match="presence-train"):
        batches.load(shards.ShardStream(shards.open_dataset(copy), "train", ("video",)))


def test_three_tiers_give_the_same_rows(folder):
    dataset = shards.open_dataset(folder)
    indices = np.random.default_rng(0).integers(64, size=40)
    stream = shards.ShardStream(dataset, "train", ("text", "audio"))
    sources = {tier: batches.load(stream, tier=tier) for tier in ("device", "host", "shards")}
    assert [s.tier for s in sources.values()] == ["device", "host", "shards"]
    reference = sources["shards"].rows(indices)
    for source in sources.values():
        rows = source.rows(indices)
        np.testing.assert_array_equal(source.usable, sources["shards"].usable)
        for key in ("features", "present"):
            for m in ("text", "audio"):
                assert rows[key][m].dtype == reference[key][m].dtype
                np.testing.assert_array_equal(rows[key][m], reference[key][m])
        np.testing.assert_array_equal(rows["label"], reference["label"])


def test_tier_is_chosen_by_size(folder):
    dataset = shards.open_dataset(folder)
    gib = 64 * 24 * 4 / 2**30

    def tier(device, host):
        return batches.load(
            shards.ShardStream(dataset, "train", ("video",)), device_table_gib=device, host_table_gib=host
        ).tier

    assert tier(gib, 0) == "device"
    assert tier(gib * 0.9, gib) == "host"
    assert tier(gib * 0.9, gib * 0.9) == "shards"


def test_rows_without_any_chosen_modality_are_not_trained_on(folder):
    dataset = shards.open_dataset(folder)
    only_text = batches.load(shards.ShardStream(dataset, "train", ("text",)), tier="host")
    np.testing.assert_array_equal(only_text.usable, np.flatnonzero(only_text.table["present"]["text"]))
    assert 0 < len(only_text.usable) < 64
    assert len(batches.load(shards.ShardStream(dataset, "train", ("text", "video")), tier="host").usable) == 64


@pytest.mark.parametrize(
    ("split", "modalities", "message"),
    [
        ("dev", ("video",), r"no split 'dev'; it has 'train'.*; add a column 'split' or .*--num_folds and --fold"),
        ("train", ("smell",), "no modality 'smell'; it has 'video', 'audio', 'text'"),
    ],
)
def test_unknown_split_or_modality(folder, split, modalities, message):
    with pytest.raises(ConclugenError, match=message):
        batches.load(shards.ShardStream(shards.open_dataset(folder), split, modalities))


def test_epoch_order_is_a_permutation_fixed_for_ever():
    assert batches.epoch_order(0, 0, 8).tolist() == batches.epoch_order(0, 0, 8).tolist()
    orders = [batches.epoch_order(seed, epoch, 500) for seed in (0, 1, 2**31 - 1) for epoch in (0, 1, 2)]
    assert all(sorted(order.tolist()) == list(range(500)) for order in orders)
    assert len({tuple(order) for order in orders}) == 9
    # Pinned, computed by this function when it was written: a change would break resuming older runs.
    assert batches.epoch_order(7, 3, 10).tolist() == PINNED


PINNED = [8, 1, 5, 7, 3, 6, 9, 2, 0, 4]


def test_epoch_order_is_uniform_and_epochs_are_independent():
    n, epochs = 50, 4000
    orders = np.stack([batches.epoch_order(11, e, n) for e in range(epochs)])
    # Where example 0 and 49 land: chi-square with 49 degrees of freedom, 99.99 % below 96.
    for example in (0, 49):
        counts = np.bincount(np.argwhere(orders == example)[:, 1], minlength=n)
        assert np.square(counts - epochs / n).sum() / (epochs / n) < 96
    # First elements of consecutive epochs: correlation within 4 standard errors.
    assert abs(np.corrcoef(orders[:-1, 0], orders[1:, 0])[0, 1]) < 4 / np.sqrt(epochs)


def test_batches_of_an_epoch_use_each_example_once():
    usable = np.array([3, 5, 8, 13, 21, 34, 55, 89, 144, 233])
    whole = batches.batch_indices(usable, seed=0, epoch=2, first_step=0, num_steps=3, batch_size=3)
    assert whole.shape == (3, 3)
    assert len(set(whole.reshape(-1).tolist())) == 9
    assert set(whole.reshape(-1).tolist()) < set(usable.tolist())
    later = batches.batch_indices(usable, seed=0, epoch=2, first_step=1, num_steps=2, batch_size=3)
    np.testing.assert_array_equal(later, whole[1:])


def test_evaluation_batches_cover_each_row_once():
    got = [(i.tolist(), n) for i, n in batches.evaluation_batches(np.arange(7), 3)]
    assert got == [([0, 1, 2], 3), ([3, 4, 5], 3), ([6, 6, 6], 1)]


def test_prefetch_keeps_order_passes_errors_on_and_ends_its_thread():
    assert list(batches.prefetch(lambda x: x * x, range(20))) == [x * x for x in range(20)]

    def fail(x):
        if x == 3:
            raise RuntimeError("row 3")
        return x

    seen = []
    with pytest.raises(RuntimeError, match="row 3"):
        seen.extend(batches.prefetch(fail, range(10)))
    assert seen == [0, 1, 2]
    half = batches.prefetch(lambda x: x, range(1000))
    assert next(half) == 0
    half.close()
    assert not [t.name for t in threading.enumerate() if t.name.startswith("prefetch")]
