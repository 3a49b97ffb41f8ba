"""Inspection of a data set: every number against plain NumPy, every kind of damage found and named, text and JSON."""

import dataclasses
import hashlib
import io
import itertools
import json
import os
import shutil
import subprocess
import sys
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
from array_record.python import array_record_data_source, array_record_module
from rich.console import Console
from tensorflow_datasets.proto import tf_example_pb2

from conclugen_jax.data import builders, digits, inspection, inspection_view, records, scan
from conclugen_jax.data import manifest as manifest_lib
from conclugen_jax.data.sources import DatasetSpec, Example, LabelSpec
from conclugen_jax.errors import ConclugenError
from tests.helpers import Faces

ROOT = Path(__file__).parent.parent


class Odd:
    """A small source with one of everything that is suspicious."""

    def __init__(self, kind: str = "multi"):
        names = {"multi": ("glad", "[bold]sad[/bold]"), "single": ("a", "b", "c"), "value": (), "none": ()}[kind]
        self.spec = DatasetSpec(
            name="odd",
            version="1.0.0",
            description="Vectors [/bold] with :smile: twice, zero and constant.",
            licence="none",
            modalities={"video": 5, "audio": 7, "text": 12},
            label=LabelSpec(kind, names),
            splits=("train", "validation", "test"),
            targets={
                "age": LabelSpec("value"),
                "mood": LabelSpec("single", ("low", "high")),
                "tags": LabelSpec("multi", ("x", "y")),
            },
            variants={"video": 3},
        )

    def fingerprint(self) -> str:
        return "odd"

    def provenance(self) -> dict:
        return {"dataset": "meld", "format": "own", "path": "/somewhere", "pool": "mean", "folds": None}

    def examples(self, split):
        rng = np.random.default_rng([5, self.spec.splits.index(split)])
        for i in range({"train": 30, "validation": 11, "test": 8}[split]):
            video = rng.normal(size=(3, 5) if split == "train" else 5)
            features = {"video": video.astype(np.float32), "audio": rng.normal(size=7).astype(np.float32)}
            text = np.where(rng.random(12) < 0.2, 0, rng.normal(size=12)).astype(np.float32)
            text[2:12] = 0.25 if split == "train" else text[2:12]
            features["text"] = text
            self._repeat(split, i, features)
            label = {"multi": rng.integers(0, 2, 2).tolist(), "single": int(rng.integers(3)), "none": None}
            label["value"] = float(rng.normal() * 3)
            targets = {"age": i / 8} if i % 3 else {"mood": i % 2, "tags": [1, i % 2]}
            yield Example(
                # train 3 and validation 4 have the same id, train 7 and test 0 another
                id={("validation", 4): "train3", ("test", 0): "train[7]"}.get((split, i), self.name(split, i)),
                features=features,
                label=label[self.spec.label.kind],
                group={"train": f"[p{i % 6}]", "validation": f"[p{5 + i % 3}]", "test": "" if i % 2 else "q"}[split],
                targets=targets,
            )

    def name(self, split, i):
        return "train[7]" if (split, i) == ("train", 7) else f"{split}{i}"

    def _repeat(self, split, i, features):
        """Vectors that are there more than once, all zero, or not there."""
        same = np.arange(7, dtype=np.float32)
        if (split, i) in (("train", 2), ("train", 9), ("train", 11), ("test", 5)):
            features["audio"] = same
        if (split, i) in (("train", 20), ("train", 21), ("validation", 1), ("validation", 2)):
            features["audio"] = -same
        if (split, i) == ("train", 4):  # variants of one example that are equal are no two examples
            features["video"] = np.ones((3, 5), np.float32)
        if split == "train" and i in (13, 14):
            features["video"][i - 13] = np.float32([1, 2, 3, 4, i % 2 + 4] if i == 13 else [1, 2, 3, 4, 5])
        if (split, i) in (("validation", 7), ("validation", 8)):
            features["audio"] = np.zeros(7, np.float32)
        if i % 4 == 1:
            del features["text"]
        if split == "test" and i == 3:
            del features["video"]
        if split == "train" and i == 25:
            del features["audio"]


def launch(*arguments, code=0):
    """The command as a user types it."""
    result = subprocess.run(
        [sys.executable, "-m", "launch.inspect_dataset", *map(str, arguments)],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
        timeout=120,
    )
    assert result.returncode == code, (result.returncode, result.stdout, result.stderr)
    assert "Traceback" not in result.stderr
    if code:
        assert len(result.stderr.strip().splitlines()) == 1
        assert result.stderr.startswith("error: ")
    return result


def text(report, width=80):
    """The report as it is printed to a file."""
    console = Console(width=width, highlight=False, file=io.StringIO())
    for part in inspection_view.render(report):
        console.print(part)
    return console.file.getvalue()


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return builders.build(Odd(), tmp_path_factory.mktemp("data"))


@pytest.fixture
def copy(folder, tmp_path):
    """A private copy of the data set, to be damaged."""
    return shutil.copytree(folder, tmp_path / "copy")


def edit_manifest(folder, edit):
    path = folder / manifest_lib.FILE
    tree = json.loads(path.read_text())
    edit(tree)
    path.write_text(json.dumps(tree))


def list_anew(folder, name):
    """Make the manifest say of a file what is true of it now."""
    data = (folder / name).read_bytes()
    facts = {"bytes": len(data), "sha256": hashlib.sha256(data).hexdigest()}
    edit_manifest(folder, lambda tree: tree["files"][name].update(facts))


def rewrite(folder, split, edit):
    """Edit the records of a split, as {row: parsed features}, and make the manifest agree with the file."""
    name = next(p.name for p in folder.iterdir() if p.name.startswith(f"odd-{split}."))
    source = array_record_data_source.ArrayRecordDataSource([str(folder / name)])
    examples = [tf_example_pb2.Example.FromString(source[i]) for i in range(len(source))]
    edit([e.features.feature for e in examples])
    writer = array_record_module.ArrayRecordWriter(str(folder / name), records.WRITER_OPTIONS)
    for example in examples:
        writer.write(example.SerializeToString(deterministic=True))
    writer.close()
    list_anew(folder, name)
    return name


def expected_label(spec, values, lack):
    values = [v for v in values if not lack(v)]
    if spec.kind == "none":
        return {"known": 0}
    if spec.kind == "value":
        x = np.float64(np.float32(values))
        spread = {"mean": x.mean(), "std": x.std(), "min": x.min(), "max": x.max()} if len(x) else {}
        return {"known": len(x), **(spread or dict.fromkeys(("mean", "std", "min", "max")))}
    if spec.kind == "single":
        counts = [sum(v == i for v in values) for i in range(len(spec.names))]
    else:
        counts = np.sum(np.array(values).reshape(-1, len(spec.names)), axis=0).tolist()
    return {"known": len(values), "counts": counts}


def expected_features(x):
    x = np.float64(x)
    norms = np.linalg.norm(x, axis=1)
    constant = [c for c in range(x.shape[1]) if len(x) > 1 and len(set(x[:, c])) == 1]
    return {
        "vectors": len(x),
        "norm_mean": norms.mean(),
        "norm_std": norms.std(),
        "min": x.min(),
        "max": x.max(),
        "zero_share": np.mean(x == 0),
        "zero_vectors": sum(not v.any() for v in x),
        "constant_columns": len(constant),
        "first_constant_columns": constant[:8],
        "non_finite": 0,
    }


def same(found, expected):
    """Equal, numbers up to rounding."""
    assert type(found) is type(expected) or isinstance(expected, (int, float, np.generic)), (found, expected)
    if isinstance(expected, dict):
        assert list(found) == list(expected)
        return all(same(found[k], expected[k]) for k in expected)
    if isinstance(expected, (float, np.floating)):
        return abs(found - expected) <= 1e-12 * max(1, abs(expected))
    return found == expected


SOURCES = {
    "missing": Faces(missing=0.3),
    "multi": Faces((20, 5, 5), kind="multi"),
    "one example": Faces((6, 1, 1)),
    "no labels": Faces((20, 5, 5), kind="none", missing=0.5),
    **{f"odd {kind}": Odd(kind) for kind in ("single", "multi", "value", "none")},
}


@pytest.mark.parametrize("source", SOURCES.values(), ids=SOURCES)
def test_every_number_is_that_of_plain_numpy(tmp_path, source):
    report = inspection.inspect(builders.build(source, tmp_path), verify=True)
    assert report["faults"] == []
    spec = source.spec
    assert list(report["splits"]) == list(spec.splits)
    for split, facts in report["splits"].items():
        examples = list(source.examples(split))
        assert facts["num_examples"] == len(examples)
        assert facts["groups"] == len({e.group for e in examples} - {""})
        assert facts["dropped"] == 0
        assert same(facts["label"], expected_label(spec.label, [e.label for e in examples], lambda v: v is None))
        for name, target in spec.targets.items():
            values = [e.targets.get(name) for e in examples]
            assert same(facts["targets"][name], expected_label(target, values, lambda v: v is None))
        kinds = Counter("+".join(m for m in spec.modalities if m in e.features) for e in examples)
        assert facts["combinations"] == kinds
        assert list(facts["combinations"].values()) == sorted(kinds.values(), reverse=True)
        for m in spec.modalities:
            x = [e.features[m].reshape(-1, spec.modalities[m]) for e in examples if m in e.features]
            assert facts["missing"][m] == len(examples) - len(x)
            assert same(facts["features"][m], expected_features(np.concatenate(x)))


def test_what_is_there_twice(folder):
    report = inspection.inspect(folder)
    assert report["duplicates"]["video"] == {
        "within": {"train": {"vectors": 1, "rows": 2, "pairs": [["train13", "train14"]]}},
        "across": [],
    }
    assert report["duplicates"]["audio"] == {
        "within": {
            "train": {"vectors": 2, "rows": 5, "pairs": [["train2", "train9"], ["train20", "train21"]]},
            "validation": {"vectors": 1, "rows": 2, "pairs": [["validation1", "validation2"]]},
        },
        "across": [
            {
                "splits": ["train", "validation"],
                "vectors": 1,
                "rows": {"train": 2, "validation": 2},
                "pairs": [["train20", "validation1"]],
            },
            {
                "splits": ["train", "test"],
                "vectors": 1,
                "rows": {"train": 3, "test": 1},
                "pairs": [["train2", "test5"]],
            },
        ],
    }
    assert report["duplicates"]["text"] == {"within": {}, "across": []}
    assert report["shared_ids"] == [
        {"splits": ["train", "validation"], "count": 1, "rows": {"train": 1, "validation": 1}, "names": ["train3"]},
        {"splits": ["train", "test"], "count": 1, "rows": {"train": 1, "test": 1}, "names": ["train[7]"]},
    ]
    assert report["shared_groups"] == [
        {"splits": ["train", "validation"], "count": 1, "rows": {"train": 5, "validation": 4}, "names": ["[p5]"]}
    ]
    assert report["shared_groups_by_design"]  # of MELD, which the source says it is


def test_many_repeated_vectors_against_brute_force(tmp_path):
    class Repeating(Faces):
        def examples(self, split):
            rng = np.random.default_rng(len(split))
            for e in super().examples(split):
                e.features["audio"] = np.full(16, rng.integers(20), np.float32)
                yield e

    source = Repeating((40, 12, 13))
    report = inspection.inspect(builders.build(source, tmp_path), top=3)["duplicates"]["audio"]
    held = {}
    for split in source.spec.splits:
        held[split] = {}
        for e in source.examples(split):
            if e.features["audio"].any():
                held[split].setdefault(e.features["audio"][0], []).append(e.id)
    for split, by_value in held.items():
        several = sorted((ids for ids in by_value.values() if len(ids) > 1), key=lambda ids: -len(ids))
        found = report["within"][split]
        assert (found["vectors"], found["rows"]) == (len(several), sum(map(len, several)))
        assert len(found["pairs"]) == min(3, len(several))
        assert found["pairs"] == [ids[:2] for ids in several[:3]]  # the most frequent ones first
    for (a, b), found in zip(itertools.combinations(held, 2), report["across"], strict=True):
        common = [v for v in held[a] if v in held[b]]
        assert found["splits"] == [a, b]
        assert found["vectors"] == len(common)
        assert found["rows"] == {s: sum(len(held[s][v]) for v in common) for s in (a, b)}
        assert found["pairs"] == [[held[a][v][0], held[b][v][0]] for v in common[:3]]


def test_the_same_report_from_many_shards_and_small_chunks(folder, tmp_path, monkeypatch):
    whole = inspection.inspect(folder, verify=True)
    monkeypatch.setattr(builders, "SHARD_BYTES", 7 * 4 * 34)
    monkeypatch.setattr(scan, "MOST_ROWS", 3)
    other = builders.build(Odd(), tmp_path)
    done = []
    cut = inspection.inspect(other, verify=True, progress=lambda *now: done.append(now))
    assert cut["num_shards"] == 5 + 2 + 2
    assert cut["faults"] == []
    for key in ("duplicates", "shared_ids", "shared_groups", "warnings"):
        assert cut[key] == whole[key]
    assert same(cut["splits"], whole["splits"])
    assert done == sorted(done)
    assert (3, 49) in done
    assert done[-1] == (49, 49)
    assert "odd-train.array_record-*             5        30" in text(cut)


def test_origin_and_files(folder, copy):
    report = inspection.inspect(folder)
    manifest = manifest_lib.read(folder)
    assert report["source"] == {**Odd().provenance(), "converted": {}, "replaced": {}, "fingerprint": "odd"}
    assert report["fingerprint"] == manifest.fingerprint()
    assert report["expected"] == {"all": {"expected": 13_302, "found": 49}}
    num = {TRAIN: 30, VALIDATION: 11, TEST: 8}
    assert report["files"] == {
        p.name: {"bytes": p.stat().st_size, **({"records": num[p.name]} if p.name in num else {})}
        for p in folder.iterdir()
        if p.name != manifest_lib.FILE
    }
    assert report["total_bytes"] == sum(p.stat().st_size for p in folder.iterdir() if p.name != manifest_lib.FILE)
    assert report["num_shards"] == 3
    assert report["warnings"] == manifest.warnings
    assert len(report["warnings"]) == 3
    assert report["unlisted_files"] == []
    (copy / "notes.txt").write_text("")
    assert inspection.inspect(copy)["unlisted_files"] == ["notes.txt"]


def test_number_of_names_is_limited(tmp_path):
    folder = builders.build(Faces(), tmp_path)
    for top in (0, 2):
        report = inspection.inspect(folder, top=top)
        assert [len(entry["names"]) for entry in report["shared_groups"]] == [top] * 3
        assert [entry["count"] for entry in report["shared_groups"]] == [5] * 3


def test_examples_left_out_are_counted(tmp_path):
    class Bad(Faces):
        def examples(self, split):
            for i, e in enumerate(super().examples(split)):
                if i in (3, 5):
                    e.features["audio"][0] = np.nan
                yield e

    report = inspection.inspect(builders.build(Bad(), tmp_path, drop_bad=True), verify=True)
    assert [facts["dropped"] for facts in report["splits"].values()] == [2, 2, 2]
    assert [facts["num_examples"] for facts in report["splits"].values()] == [62, 22, 22]
    assert report["faults"] == []
    assert "train              62        5          2" in text(report)


def flip(path, byte):
    data = bytearray(path.read_bytes())
    data[byte] ^= 1
    path.write_bytes(data)


def swap(folder, a, b):
    os.rename(folder / a, folder / "aside")
    os.rename(folder / b, folder / a)
    os.rename(folder / "aside", folder / b)


def flag(folder, listed):
    path = folder / "presence-train.npy"
    flags = np.load(path)
    flags[[5, 6, 7, 9], 2] ^= True
    np.save(path, flags)
    if listed:
        list_anew(folder, path.name)


def other_json(folder, name, old, new):
    path = folder / name
    content = path.read_text()
    assert old in content
    path.write_text(content.replace(old, new, 1))
    list_anew(folder, name)


def cut(folder, name, size, listed=False):
    os.truncate(folder / name, size)
    if listed:
        list_anew(folder, name)


def set_manifest(*keys, value):
    def edit(tree):
        for key in keys[:-1]:
            tree = tree[key]
        tree[keys[-1]] = value(tree[keys[-1]])

    return lambda folder: edit_manifest(folder, edit)


TRAIN, VALIDATION, TEST = (f"odd-{split}.array_record-00000-of-00001" for split in ("train", "validation", "test"))
HASH = "content differs from the manifest (SHA-256)"
OTHER_FLAG = "text is said otherwise than in the record"
RECORDS, SHARDS = "fields of the records are said", "shards of split 'test' are said otherwise"
FILES = {
    "bit of a record": (lambda f: flip(f / TRAIN, 2500), [(TRAIN, HASH, []), (TRAIN, "cannot be read", "any")]),
    "bit of the padding": (lambda f: flip(f / TEST, 60_000), [(TEST, HASH, [])]),
    "truncated": (
        lambda f: cut(f, VALIDATION, 131071),
        [(VALIDATION, "131071 bytes, the manifest says 131072", []), (VALIDATION, "cannot be opened", [])],
    ),
    "truncated, and listed": (
        lambda f: cut(f, VALIDATION, 65536, listed=True),
        [(VALIDATION, "cannot be opened", [])],
    ),
    "empty": (lambda f: cut(f, TEST, 0), [(TEST, "0 bytes", []), (TEST, "cannot be opened", [])]),
    "deleted": (
        lambda f: (f / TEST).unlink(),
        [(TEST, "the file is missing", []), (TEST, "cannot be opened", [])],
    ),
    "a folder instead": (
        lambda f: [(f / TEST).unlink(), (f / TEST).mkdir()],
        [(TEST, "the file is missing", []), (TEST, "cannot be opened", [])],
    ),
    "shards swapped": (
        lambda f: swap(f, VALIDATION, TEST),
        [
            (VALIDATION, HASH, []),
            (VALIDATION, "holds 8 records, the manifest says 11", []),
            ("presence-validation.npy", "video is said otherwise", [[3, 3]]),
            (TEST, HASH, []),
            (TEST, "holds 11 records, the manifest says 8", []),
            ("presence-test.npy", "video is said otherwise", [[3, 3]]),
        ],
    ),
    "presence": (
        lambda f: flag(f, False),
        [("presence-train.npy", HASH, []), ("presence-train.npy", OTHER_FLAG, [[5, 7], [9, 9]])],
    ),
    "presence, and listed": (lambda f: flag(f, True), [("presence-train.npy", OTHER_FLAG, [[5, 7], [9, 9]])]),
    "presence truncated": (
        lambda f: cut(f, "presence-test.npy", 140, listed=True),
        [("presence-test.npy", "cannot be read", [])],
    ),
    "presence empty": (
        lambda f: cut(f, "presence-test.npy", 0, listed=True),
        [("presence-test.npy", "cannot be read", [])],
    ),
    "presence of another split": (
        lambda f: [shutil.copy(f / "presence-train.npy", f / "presence-test.npy"), list_anew(f, "presence-test.npy")],
        [("presence-test.npy", "not bool of shape (8, 3)", [])],
    ),
    "dataset_info.json truncated": (
        lambda f: cut(f, "dataset_info.json", 300),
        [("dataset_info.json", "300 bytes", []), ("dataset_info.json", "cannot be read as JSON", [])],
    ),
    "features.json truncated": (
        lambda f: cut(f, "features.json", 300, listed=True),
        [("features.json", "cannot be read as JSON", [])],
    ),
    "features.json deleted": (
        lambda f: (f / "features.json").unlink(),
        [("features.json", "the file is missing", []), ("features.json", "cannot be read as JSON", [])],
    ),
    "another shard length": (
        lambda f: other_json(f, "dataset_info.json", '"8"', '"9"'),
        [("dataset_info.json", SHARDS, [])],
    ),
    "another split": (
        lambda f: other_json(f, "dataset_info.json", '"test"', '"best"'),
        [("dataset_info.json", SHARDS, []), ("dataset_info.json", "shards of split 'best'", [])],
    ),
    "another name": (
        lambda f: other_json(f, "dataset_info.json", '"odd"', '"even"'),
        [("dataset_info.json", f"shards of split '{s}'", []) for s in ("train", "validation", "test")],
    ),
    "no TFDS data set": (
        lambda f: other_json(f, "dataset_info.json", '"array_record"', '"parchment"'),
        [("dataset_info.json", "TFDS cannot open the data set", [])],
    ),
    "another size of a feature": (
        lambda f: other_json(f, "features.json", '"7"', '"6"'),
        [("features.json", RECORDS, [])],
    ),
    "another type of a feature": (
        lambda f: other_json(f, "features.json", '"float32"', '"float64"'),
        [("features.json", RECORDS, [])],
    ),
    "a type that there is not": (
        lambda f: other_json(f, "features.json", '"float32"', '"float31"'),
        [("dataset_info.json", "TFDS cannot open the data set with it and features.json", [])],
    ),
    "label counts": (
        set_manifest("splits", "test", "label_counts", value=lambda x: [x[0] + 1, x[1]]),
        [("manifest.json", "split 'test': label_counts 4, 4, the records have 3, 4", [])],
    ),
    "presence counts": (
        set_manifest("splits", "test", "present", "text", value=lambda x: x + 1),
        [("manifest.json", "split 'test': present of text 7, the records have 6", [])],
    ),
    "target counts": (
        set_manifest("splits", "train", "target_counts", "mood", value=lambda x: x[::-1] if x[0] != x[1] else [0, 10]),
        [("manifest.json", "split 'train': target_counts of mood 0, 10, the records have 5, 5", [])],
    ),
    "number of examples": (
        lambda f: [
            set_manifest("splits", "train", "num_examples", value=lambda x: 29)(f),
            set_manifest("files", TRAIN, "records", value=lambda x: 29)(f),
        ],
        [
            ("dataset_info.json", "shards of split 'train'", []),
            ("presence-train.npy", "not bool of shape (29, 3)", []),
            (TRAIN, "holds 30 records, the manifest says 29", []),
        ],
    ),
    "mean": (
        set_manifest("statistics", "audio", "mean", value=lambda x: [x[0], *(v * (1 + 1e-8) for v in x[1:])]),
        [("manifest.json", "mean of audio: 6 columns differ from the records' (column 1: ", [])],
    ),
    "deviation": (
        set_manifest("statistics", "video", "std", value=lambda x: [*x[:4], x[4] * (1 + 2e-9)]),
        [("manifest.json", "std of video: 1 columns differ from the records' (column 4: ", [])],
    ),
    "file not listed": (
        lambda f: edit_manifest(f, lambda tree: tree["files"].pop("features.json")),
        [("manifest.json", "features.json, which TFDS needs, is not listed", [])],
    ),
}


def check_faults(report, expected):
    """Exactly these, in this order: file, beginning or part of what is said, ranges of rows."""
    found = report["faults"]
    assert [fault["file"] for fault in found] == [file for file, _, _ in expected], found
    for fault, (_, what, rows) in zip(found, expected, strict=True):
        assert what in fault["what"], fault
        assert fault["rows"] if rows == "any" else fault["rows"] == rows, fault
        printed = " ".join(text(report, width=1000).split())
        assert f"- {fault['file']}: " in printed
        assert fault["what"] in printed


@pytest.mark.parametrize("kind", FILES)
def test_damaged_files_are_named(copy, kind, capsys):
    damage, expected = FILES[kind]
    damage(copy)
    check_faults(inspection.inspect(copy, verify=True), expected)
    assert capsys.readouterr().out == ""  # which belongs to --json


def test_shards_of_the_same_split_swapped(tmp_path, monkeypatch):
    monkeypatch.setattr(builders, "SHARD_BYTES", 7 * 4 * 34)
    folder = builders.build(Odd(), tmp_path)
    names = manifest_lib.shard_names(manifest_lib.read(folder), "train")[:2]
    assert len({(folder / name).stat().st_size for name in names}) == 1
    swap(folder, *names)
    faults = inspection.inspect(folder, verify=True)["faults"]
    assert [fault["file"] for fault in faults if fault["what"] == HASH] == names
    # and were their hashes right, the file of presence would tell
    assert {fault["file"] for fault in faults} == {*names, "presence-train.npy"}


def set_bytes(features, name, value):
    features[name].bytes_list.value[0] = value


def vector(features, name, column, value):
    x = np.frombuffer(features[name].bytes_list.value[0], "<f4").copy()
    x[column] = value
    set_bytes(features, name, x.tobytes())


RECORD_FAULTS = {
    "nan": (lambda r: vector(r[3], "features/audio", 2, np.nan), ["audio has values that are not finite"]),
    "nan in a variant": (
        lambda r: vector(r[3], "features/video", 14, np.inf),
        ["video has values that are not finite"],
    ),
    "nan where absent": (lambda r: vector(r[5], "features/text", 1, np.nan), ["text has values that are not finite"]),
    "absent, not zero": (lambda r: vector(r[5], "features/text", 1, 3), ["text is absent but not zero"]),
    "label": (lambda r: vector(r[3], "label", 0, 0.5), ["label is out of range"]),
    "label unknown": (lambda r: vector(r[3], "label", slice(None), np.nan), ["label is out of range"]),
    "target": (lambda r: r[3]["targets/mood"].int64_list.value.__setitem__(0, 2), ["target 'mood' is out of range"]),
    "target below": (lambda r: r[3]["targets/mood"].int64_list.value.__setitem__(0, -2), ["target 'mood'"]),
    "infinite": (lambda r: r[3]["targets/age"].float_list.value.__setitem__(0, np.inf), ["target 'age'"]),
    "half unknown": (lambda r: vector(r[3], "targets/tags", 0, np.nan), ["target 'tags'"]),
    "unprintable id": (lambda r: set_bytes(r[3], "id", b"a\nb"), ["id is not of 1 to 1000 printable characters"]),
    "no id": (lambda r: set_bytes(r[3], "id", b""), ["id is not of 1 to 1000"]),
    "long group": (lambda r: set_bytes(r[3], "group", b"g" * 1001), ["group is not of 0 to 1000 printable"]),
    "not UTF-8": (lambda r: set_bytes(r[3], "group", b"\xff"), ["id or group is not UTF-8"]),
    "id twice": (lambda r: set_bytes(r[3], "id", b"train1"), ["the id of a row before it in the split"]),
    "size": (
        lambda r: set_bytes(r[3], "features/audio", bytes(24)),
        ["field 'features/audio' holds 24 bytes, expected 28"],
    ),
    "one variant": (
        lambda r: set_bytes(r[3], "features/video", bytes(20)),
        ["field 'features/video' holds 20 bytes, expected 60"],
    ),
    "no field": (lambda r: r[3].__delitem__("present/audio"), ["field 'present/audio' holds 0 values"]),
    "another kind": (lambda r: r[3]["label"].int64_list.value.append(1), ["field 'label' holds 0 values"]),
    "two values": (lambda r: r[3]["id"].bytes_list.value.append(b"x"), ["field 'id' holds 2 values"]),
    "another field": (lambda r: r[3]["smell"].int64_list.value.append(1), ["unknown field 'smell'"]),
}


@pytest.mark.parametrize("kind", RECORD_FAULTS)
def test_faults_of_records_are_named_with_their_row(copy, kind):
    edit, messages = RECORD_FAULTS[kind]
    name = rewrite(copy, "train", edit)
    row = 5 if "absent" in kind else 3
    check_faults(inspection.inspect(copy, verify=True), [(name, message, [[row, row]]) for message in messages])


def test_presence_in_a_record(copy):
    def edit(rows):
        for row in (3, 4):
            for m in ("video", "audio", "text"):
                rows[row][f"present/{m}"].int64_list.value[0] = 0

    name = rewrite(copy, "test", edit)
    check_faults(
        inspection.inspect(copy, verify=True),
        [
            (name, "video is absent but not zero", [[4, 4]]),
            (name, "audio is absent but not zero", [[3, 4]]),
            (name, "text is absent but not zero", [[3, 4]]),
            (name, "no modality is present", [[3, 4]]),
            ("presence-test.npy", "video is said otherwise", [[4, 4]]),
            ("presence-test.npy", "audio is said otherwise", [[3, 4]]),
            ("presence-test.npy", OTHER_FLAG, [[3, 4]]),
            ("manifest.json", "present of video 7, the records have 6", []),
            ("manifest.json", "present of audio 8, the records have 6", []),
            ("manifest.json", "present of text 6, the records have 4", []),
        ],
    )


def test_a_record_that_is_none(copy):
    writer = array_record_module.ArrayRecordWriter(str(copy / TEST), records.WRITER_OPTIONS)
    for i in range(8):
        writer.write(bytes([255, i]) * 10)
    writer.close()
    list_anew(copy, TEST)
    report = inspection.inspect(copy, verify=True)
    check_faults(report, [(TEST, "the record cannot be parsed", [[0, 7]])])
    facts = report["splits"]["test"]
    assert facts["num_examples"] == 0
    assert facts["features"]["audio"]["norm_mean"] is None
    assert facts["label"] == {"known": 0, "counts": [0, 0]}
    json.dumps(report, allow_nan=False)


def test_all_damage_at_once_is_listed(copy):
    flip(copy / TRAIN, 2500)
    (copy / VALIDATION).unlink()
    cut(copy, "dataset_info.json", 100)
    flag(copy, listed=False)
    rewrite(copy, "test", lambda r: vector(r[3], "features/audio", 2, np.nan))
    report = inspection.inspect(copy, verify=True)
    files = {fault["file"] for fault in report["faults"]}
    assert files == {TRAIN, VALIDATION, TEST, "dataset_info.json", "presence-train.npy"}
    (row,) = next(f["rows"] for f in report["faults"] if f["what"] == "the record cannot be read")
    assert report["splits"]["train"]["num_examples"] == 29
    lost = row[0]
    values = [e.label for i, e in enumerate(Odd().examples("train")) if i != lost]
    assert report["splits"]["train"]["label"]["counts"] == np.sum(values, axis=0).tolist()


def test_many_rows_are_listed_in_full_but_printed_in_part(copy):
    def edit(rows):
        for row in rows[::2]:
            set_bytes(row, "group", b"\t")

    rewrite(copy, "train", edit)
    report = inspection.inspect(copy, verify=True)
    (fault,) = report["faults"]
    assert fault["rows"] == [[i, i] for i in range(0, 30, 2)]
    assert "rows 0, 2, 4, 6, 8, 10, 12, 14, 16, 18, 20, 22, 24, 26, 28: group" in text(report, width=200)
    fault["rows"] = [[i, i + 1] for i in range(0, 90, 3)]
    assert "57-58, ... (60 in all, --json lists them): group" in text(report, width=300)


def test_without_verification_sizes_are_compared_and_unusable_records_refused(copy):
    flip(copy / TEST, 60_000)
    report = inspection.inspect(copy)
    assert report["faults"] == []
    assert report["verified"] == "size"
    assert "sizes of the files only" in text(report)
    rewrite(copy, "validation", lambda r: vector(r[3], "features/audio", 2, np.nan))
    report = inspection.inspect(copy)
    assert report["splits"]["validation"]["features"]["audio"]["non_finite"] == 1
    assert report["splits"]["validation"]["features"]["audio"]["vectors"] == 10
    assert "audio, validation: 1 value not finite (must be 0" in text(report)
    rewrite(copy, "validation", lambda r: set_bytes(r[3], "features/audio", bytes(24)))
    with pytest.raises(ConclugenError, match=r"odd-validation.*row 3: .*24 bytes, expected 28; --verify lists all"):
        inspection.inspect(copy)
    cut(copy, TEST, 131071)
    with pytest.raises(ConclugenError, match="131071 bytes"):
        inspection.inspect(copy)


ODD_MANIFESTS = {
    "truncated": lambda path, tree: path.write_text(path.read_text()[:500]),
    "deleted": lambda path, tree: path.unlink(),
    "no text": lambda path, tree: path.write_text(json.dumps(tree | {"licence": 3})),
    "no name": lambda path, tree: path.write_text(
        json.dumps(tree | {"label": {"kind": "multi", "names": ["glad", 3]}})
    ),
    "source": lambda path, tree: path.write_text(json.dumps(tree | {"source": "here"})),
    "source of NaN": lambda path, tree: path.write_text(json.dumps(tree | {"source": {"x": float("nan")}})),
    "warnings": lambda path, tree: path.write_text(json.dumps(tree | {"warnings": [1]})),
    "no splits": lambda path, tree: path.write_text(json.dumps(tree | {"splits": {}})),
    "no modalities": lambda path, tree: path.write_text(
        json.dumps(
            tree
            | {"modalities": {}, "variants": {}, "splits": {s: f | {"present": {}} for s, f in tree["splits"].items()}}
        )
    ),
}


@pytest.mark.parametrize("kind", ODD_MANIFESTS)
@pytest.mark.parametrize("verify", [False, True])
def test_a_manifest_that_cannot_be_used_is_named(copy, kind, verify):
    path = copy / manifest_lib.FILE
    ODD_MANIFESTS[kind](path, json.loads(path.read_text()))
    with pytest.raises(ConclugenError, match=r"manifest\.json"):
        inspection.inspect(copy, verify=verify)


PRINTED = {"digits": digits.Digits(), **{kind: Odd(kind) for kind in ("multi", "single", "value", "none")}}


@pytest.mark.parametrize("source", PRINTED.values(), ids=PRINTED)
def test_text_fits_80_columns_and_takes_nothing_for_markup(tmp_path, source):
    report = inspection.inspect(builders.build(source, tmp_path))
    printed = text(report)
    assert max(map(len, printed.splitlines())) <= 80
    assert not [line for line in printed.splitlines() if "…" in line]
    assert printed.startswith(f"{source.spec.name} 1.0.0\n  ")
    if source.spec.name == "odd":
        assert "[/bold] with :smile: twice" in printed
        assert "train[7]" in printed
        assert ("[bold]sad[/bold]" in printed) == (source.spec.label.kind == "multi")
        assert "train2=train9, train20=train21" in printed
        assert "  video+audio+text   22  73.3%     8  72.7%   5  62.5%\n" in printed
        assert "- text, train: 10 columns constant (2, 3, 4, 5, 6, 7, 8, 9, ...)" in printed
        assert "all splits: 49 examples, not the 13,302 expected of the corpus" in printed
        assert "by design" in printed
        assert "  video         5          3          -            -   1  12.5%\n" in printed
        assert "have 1 group in common, such as '[p5]'" in printed
    else:
        assert "- every value is finite; no vector is zero throughout, no column constant" in printed
        assert "- no group is in two splits" in printed


def test_text_of_many_splits_and_long_names(tmp_path):
    class Many(Faces):
        def __init__(self):
            super().__init__((4, 4, 4))
            splits = tuple(f"a_split_with_a_long_name_{i}" for i in range(7))
            label = LabelSpec("single", tuple(f"class {c} of a name that goes on and on and on" for c in range(4)))
            self.spec = dataclasses.replace(self.spec, splits=splits, label=label, licence="w" * 200)
            self._num = dict.fromkeys(splits, 4)

    printed = text(inspection.inspect(builders.build(Many(), tmp_path)))
    assert max(map(len, printed.splitlines())) <= 80
    assert "…" not in printed


def test_command(folder, copy):
    report = inspection.inspect(folder, verify=True, top=1)
    result = launch(f"--data={folder}", "--verify", "--json", "--top=1")
    assert json.loads(result.stdout) == report
    assert result.stderr == ""
    printed = launch(f"--data={folder}").stdout
    assert printed == text(inspection.inspect(folder))
    assert "faults" not in printed
    flip(copy / TRAIN, 2500)
    (copy / TEST).unlink()
    result = launch(f"--data={copy}", "--verify", "--json", code=2)
    assert json.loads(result.stdout) == inspection.inspect(copy, verify=True)
    assert "4 faults in 2 files; restore the data set from a copy" in result.stderr
    result = launch(f"--data={copy}", "--verify", code=2)
    assert f"- {TEST}: the file is missing" in result.stdout
    assert "3 records" not in launch(f"--data={copy}", code=2).stdout


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "--data is missing"),
        (["--data=/nowhere"], "/nowhere/manifest.json: no such file"),
        (["--data=/nowhere", "--top=-1"], "top"),
    ],
)
def test_mistakes_on_the_command_line(arguments, message):
    assert message in launch(*arguments, code=2).stderr


def test_help():
    assert "conclugen inspect --data=" in launch("--help").stdout


def test_names_that_the_terminal_lacks(tmp_path):
    class Accents(Faces):
        def examples(self, split):
            yield from (dataclasses.replace(e, group="Zoë") for e in super().examples(split))

    folder = builders.build(Accents(), tmp_path)
    environment = {**os.environ, "PYTHONIOENCODING": "ascii"}
    command = [sys.executable, "-m", "launch.inspect_dataset", f"--data={folder}"]
    result = subprocess.run(command, cwd=ROOT, capture_output=True, env=environment, check=False)
    assert result.returncode == 0, result.stderr
    assert rb"Zo\xeb" in result.stdout


def test_what_an_extraction_says_of_itself_is_set_in(folder):
    report = inspection.inspect(folder)
    backbones = {"resnet18": {"modality": "video", "sha256": "ab" * 32, "source": {"a.pth": "cd" * 32}, "options": {}}}
    report["source"] = {
        "dataset": "mine",
        "extraction": {"backbones": backbones, "failed": 2, "speech": {}, "notes": ""},
    }
    shown = text(report).partition("Origin\n")[2]
    assert shown.startswith(
        "  dataset: mine\n  extraction:\n    backbones:\n      resnet18:\n        modality: video\n"
        "        sha256: abababababab...\n        source: a.pth cdcdcdcdcdcd...\n    failed: 2\n"
    )
