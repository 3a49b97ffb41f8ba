"""Data sets are built from examples: what is stored, what is rejected, and what a failed build leaves."""

import dataclasses
import os
import subprocess
import sys

import numpy as np
import pytest

from conclugen_jax.data import builders, digits, manifest as manifest_lib, shards
from conclugen_jax.data.records import Moments
from conclugen_jax.data.sources import Example, LabelSpec, name_hash
from conclugen_jax.errors import ConclugenError
from tests.helpers import Faces


@pytest.mark.parametrize("kind", ["single", "multi", "none"])
def test_round_trip_of_values_presence_labels_ids_and_groups(tmp_path, kind):
    source = Faces((40, 6, 5), kind=kind, missing=0.5)
    dataset = shards.open_dataset(builders.build(source, tmp_path))
    for split in source.spec.splits:
        examples = list(source.examples(split))
        stream = shards.ShardStream(dataset, split, ("text", "video"))
        rows = stream.rows(np.arange(len(examples)))
        ids, groups = stream.names(np.arange(len(examples)))
        assert list(rows["features"]) == ["text", "video"]
        assert ids.tolist() == [e.id for e in examples]
        assert groups.tolist() == [e.group for e in examples]
        for i, example in enumerate(examples):
            for m in ("text", "video"):
                assert rows["present"][m][i] == (m in example.features)
                expected = example.features.get(m, np.zeros(12, np.float32))
                np.testing.assert_array_equal(rows["features"][m][i], expected)
        if kind == "none":
            assert rows["label"].shape == (len(examples), 0)
        else:
            np.testing.assert_array_equal(rows["label"], [e.label for e in examples])
    assert not rows["present"]["text"].all()


def test_statistics_merge_blocks_exactly():
    rng = np.random.default_rng(0)
    x = rng.normal(1e4, 1, size=(1000, 3))
    running = Moments.zero(3)
    for start in range(0, 1000, 7):
        running.merge(Moments.of(x[start : start + 7]))
    running.merge(Moments.zero(3))
    result = running.result()
    np.testing.assert_allclose(result["mean"], x.mean(0), rtol=1e-12)
    np.testing.assert_allclose(result["std"], x.std(0), rtol=1e-9)
    assert Moments.zero(2).result() == {"mean": [0, 0], "std": [1, 1]}


def test_standardisation_is_safe_for_constant_columns(tmp_path):
    class Constant(Faces):
        def examples(self, split):
            for e in super().examples(split):
                e.features["text"][3] = 0.1  # not exact in binary: its computed deviation may differ from 0
                e.features["text"][4] = 0.0
                yield e

    manifest = manifest_lib.read(builders.build(Constant(), tmp_path))
    mean, scale = manifest.standardization("text")
    assert scale[3] == scale[4] == 1
    assert mean[3] == np.float32(0.1)
    assert (scale[:3] > 0.5).all()
    assert mean.dtype == scale.dtype == np.float32


def test_digits_are_the_documented_ones(tmp_path):
    dataset = shards.open_dataset(builders.build(digits.Digits(), tmp_path))
    manifest = dataset.manifest
    assert {s: f["num_examples"] for s, f in manifest.splits.items()} == {
        "train": 1400,
        "validation": 200,
        "test": 400,
    }
    assert manifest.splits["test"]["label_counts"] == [40] * 10
    ids = []
    for split in manifest.splits:
        stream = shards.ShardStream(dataset, split, ("pixels",))
        every = np.arange(stream.num_examples)
        rows, (names, _) = stream.rows(every), stream.names(every)
        assert rows["features"]["pixels"].shape == (len(every), 240)
        assert set(np.unique(rows["features"]["pixels"])) == set(range(7))
        ids += names.tolist()
    assert len(set(ids)) == 2000


def test_building_again_writes_nothing_and_other_examples_are_refused(tmp_path):
    folder = builders.build(Faces(), tmp_path)
    before = {p: p.stat().st_mtime_ns for p in folder.iterdir()}
    assert builders.build(Faces(), tmp_path) == folder
    assert {p: p.stat().st_mtime_ns for p in folder.iterdir()} == before
    with pytest.raises(ConclugenError, match=r"other examples.*--overwrite"):
        builders.build(Faces(seed=1), tmp_path)
    fingerprint = manifest_lib.read(folder).fingerprint()
    builders.build(Faces(seed=1), tmp_path, overwrite=True)
    assert manifest_lib.read(folder).fingerprint() != fingerprint
    assert [p.name for p in tmp_path.iterdir()] == ["faces"]


BAD = {
    "nan": (
        lambda e: e.features["audio"].__setitem__(2, np.nan),
        r"row 3, id 'train3', modality 'audio'.*NaN.*column 2",
    ),
    "infinite": (lambda e: e.features["video"].__setitem__(0, -np.inf), r"row 3.*'video'.*infinite"),
    "too large": (lambda e: {"features": {"video": np.full(24, 1e300)}}, r"row 3.*infinite in float32"),
    "label high": (lambda e: {"label": 4}, r"row 3.*label 4.*0 to 3"),
    "label negative": (lambda e: {"label": -1}, r"row 3.*label -1"),
    "label missing": (lambda e: {"label": None}, r"row 3.*label None"),
    "label fraction": (lambda e: {"label": 1.5}, r"row 3.*label 1.5"),
    "duplicate": (lambda e: {"id": "train1"}, r"row 3, id 'train1': the same id as row 1"),
    "id with newline": (lambda e: {"id": "a\nb"}, r"row 3.*printable"),
    "id of bytes": (lambda e: {"id": b"x"}, r"row 3.*printable str"),
    "group": (lambda e: {"group": 7}, r"row 3.*group must be a printable str"),
    "no id": (lambda e: {"id": ""}, r"row 3.*id must be a printable str of 1 to 1000"),
    "size": (lambda e: {"features": {"video": np.zeros(23)}}, r"row 3.*'video'.*\(23,\).*\(24,\)"),
    "objects": (lambda e: {"features": {"video": np.array([None] * 24)}}, r"row 3.*object"),
    "text": (lambda e: {"features": {"video": np.array(["x"] * 24)}}, r"row 3.*real numbers"),
    "unknown modality": (lambda e: {"features": {"smell": np.zeros(2)}}, r"row 3.*'smell'"),
    "nothing": (lambda e: {"features": {}}, r"row 3.*no modality"),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_examples_are_refused_by_row_and_leave_nothing(tmp_path, name):
    spoil, message = BAD[name]

    class Bad(Faces):
        def examples(self, split):
            for i, e in enumerate(super().examples(split)):
                changes = spoil(e) if i == 3 else None
                yield dataclasses.replace(e, **changes) if isinstance(changes, dict) else e

    with pytest.raises(ConclugenError, match=message):
        builders.build(Bad(), tmp_path)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("label", [np.nan, np.inf, -np.inf, 1e300, None, "high", [1.0]])
def test_labels_that_are_numbers_are_finite(tmp_path, label):
    class Valued(Faces):
        def examples(self, split):
            for i, e in enumerate(super().examples(split)):
                yield dataclasses.replace(e, label=label if (split, i) == ("test", 3) else i / 7)

    source = Valued()
    source.spec = dataclasses.replace(source.spec, label=LabelSpec("value"))
    with np.errstate(over="ignore"), pytest.raises(ConclugenError, match=r"'test', row 3.*expected a finite number"):
        builders.build(source, tmp_path)


def test_multi_labels_are_zero_or_one(tmp_path):
    class Bad(Faces):
        def examples(self, split):
            yield Example("a", {"video": np.zeros(24)}, label=[0, 1, 2, 0])

    with pytest.raises(ConclugenError, match=r"'a'.*4 values 0 or 1 \(calm, happy, sad, angry\)"):
        builders.build(Bad(kind="multi"), tmp_path)


def test_an_empty_split_is_refused(tmp_path):
    with pytest.raises(ConclugenError, match=r"split 'validation'.*no examples"):
        builders.build(Faces((10, 0, 5)), tmp_path)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"name": "My Data"}, "lower case"),
        ({"version": "one"}, "three numbers"),
        ({"modalities": {"a/b": 3}}, "letters, digits"),
        ({"modalities": {}}, "no modality"),
        ({"splits": ()}, "no split"),
    ],
)
def test_impossible_descriptions_are_refused(tmp_path, changes, message):
    source = Faces()
    source.spec = dataclasses.replace(source.spec, **changes)
    with pytest.raises(ConclugenError, match=message):
        builders.build(source, tmp_path)
    assert not list(tmp_path.iterdir())


def test_a_failed_replacement_keeps_the_old_data_set(tmp_path, monkeypatch):
    folder = builders.build(Faces(), tmp_path)
    replace = os.replace

    def fail(source, target):
        if ".building" in str(source):
            raise OSError(28, "No space left on device", str(target))
        replace(source, target)

    with monkeypatch.context() as patch:
        patch.setattr(os, "replace", fail)
        with pytest.raises(ConclugenError, match="No space left"):
            builders.build(Faces(seed=1), tmp_path, overwrite=True)
    shards.open_dataset(folder)
    assert builders.build(Faces(), tmp_path) == folder
    # Killed between the two moves: the next build puts the old one back, also if it fails itself.
    old = folder.stat().st_ino
    folder.rename(folder.with_name(".replaced-1.0.0"))
    with pytest.raises(ConclugenError, match="other examples"):
        builders.build(Faces(seed=1), tmp_path)
    assert folder.stat().st_ino == old
    folder.rename(folder.with_name(".replaced-1.0.0"))
    with monkeypatch.context() as patch:
        patch.setattr(os, "replace", fail)
        with pytest.raises(ConclugenError, match="No space left"):
            builders.build(Faces(seed=1), tmp_path, overwrite=True)
    assert folder.stat().st_ino == old
    assert [p.name for p in folder.parent.iterdir()] == ["1.0.0"]


def test_a_warning_names_the_groups_of_the_least_hashes(tmp_path):
    """It counts in the fingerprint of the manifest, so that the choice must not depend on how it is made."""

    class Shared(Faces):
        def examples(self, split):
            for i, example in enumerate(super().examples(split)):
                yield dataclasses.replace(example, group=f"g{i}")

    manifest = manifest_lib.read(builders.build(Shared((9, 9, 9)), tmp_path))
    least = sorted((f"g{i}" for i in range(9)), key=name_hash)[:5]
    assert manifest.warnings[0].endswith(f"have 9 groups in common, such as {', '.join(map(repr, sorted(least)))}")


def test_a_killed_build_leaves_only_what_the_next_one_removes(tmp_path):
    code = (
        "import os, sys; from tests.helpers import Faces; from conclugen_jax.data import builders\n"
        "class Killed(Faces):\n"
        "    def examples(self, split):\n"
        "        for i, e in enumerate(super().examples(split)):\n"
        "            if i == 20: os._exit(9)\n"
        "            yield e\n"
        "builders.build(Killed(), sys.argv[1])"
    )
    assert subprocess.run([sys.executable, "-c", code, str(tmp_path)], check=False).returncode == 9
    scratch, lock = sorted((p.name for p in tmp_path.iterdir()), key=len, reverse=True)
    assert scratch.startswith(".building-faces-1.0.0-")
    assert lock == ".building-faces-1.0.0.lock"
    builders.build(Faces(), tmp_path)
    assert [p.name for p in tmp_path.iterdir()] == ["faces"]


def test_a_folder_that_cannot_be_made_is_named(tmp_path):
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(ConclugenError, match=r"file: cannot write the data set.*choose another folder"):
        builders.build(Faces(), tmp_path / "file")


@pytest.mark.parametrize(
    "change",
    [
        {"name": "Digits"},
        {"version": "01.0.0"},
        {"modalities": {}},
        {"modalities": {"x": 0}},
        {"modalities": {"1x": 1}},
        {"label": LabelSpec("none", ("a",))},
        {"label": LabelSpec("single")},
        {"label": LabelSpec("multi", ("a", "a"))},
        {"label": LabelSpec("pairs", ("a",))},
        {"targets": {"t": LabelSpec("none")}},
        {"targets": {"t t": LabelSpec("value")}},
        {"variants": {"y": 2}},
        {"variants": {"x": 0}},
        {"splits": ()},
        {"splits": ("a b",)},
    ],
)
def test_descriptions_that_cannot_be_are_refused(change):
    spec = dataclasses.replace(
        digits.Digits.spec, modalities={"x": 2}, targets={"age": LabelSpec("value")}, label=LabelSpec("none")
    )
    builders.check_spec(spec)
    with pytest.raises(ConclugenError, match="data set"):
        builders.check_spec(dataclasses.replace(spec, **change))
