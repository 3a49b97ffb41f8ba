"""Inspection of a data set: every number against plain NumPy, every kind of damage found and named, text and JSON."""

import hashlib
import io
import itertools
import json
import re
from collections import Counter

import numpy as np
import pytest
from array_record.python import array_record_data_source, array_record_module
from rich.console import Console
from tensorflow_datasets.proto import tf_example_pb2

from conclugen_jax.data import builders, inspection, inspection_view, manifest as manifest_lib, records, scan
from conclugen_jax.data.sources import DatasetSpec, Example, LabelSpec
from tests.helpers import Faces


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


def text(report, width=80):
    """The report as it is printed to a file."""
    console = Console(width=width, highlight=False, file=io.StringIO())
    for part in inspection_view.render(report):
        console.print(part)
    return console.file.getvalue()


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


def expected_label(spec, values, lack, groups):
    groups = [g for g, v in zip(groups, values, strict=True) if not lack(v)]
    values = [v for v in values if not lack(v)]
    if spec.kind == "none":
        return {"known": 0}
    share = {"explained_by_group": explained_by_hand(spec, values, groups)}
    if spec.kind == "value":
        x = np.float64(np.float32(values))
        spread = {"mean": x.mean(), "std": x.std(), "min": x.min(), "max": x.max()} if len(x) else {}
        return {"known": len(x), **(spread or dict.fromkeys(("mean", "std", "min", "max"))), **share}
    if spec.kind == "single":
        counts = [sum(v == i for v in values) for i in range(len(spec.names))]
    else:
        counts = np.sum(np.array(values).reshape(-1, len(spec.names)), axis=0).tolist()
    return {"known": len(values), "counts": counts, **share}


def explained_by_hand(spec, values, groups):
    """Return the share of variance within groups against that of all, each by its unbiased estimate."""
    if spec.kind == "single":
        values = np.eye(len(spec.names))[np.array(values, int)]
    x = np.array(values, np.float32).astype(np.float64).reshape(len(values), len(spec.names) or 1)
    parts = [x[[g == name for g in groups]] for name in {*groups} - {""}]
    n = sum(map(len, parts))
    if len(parts) < 2 or n == len(parts):
        return None
    within = sum(np.square(part - part.mean(axis=0)).sum() for part in parts) / (n - len(parts))
    x = np.concatenate(parts)
    total = np.square(x - x.mean(axis=0)).sum() / (n - 1)
    return max(0.0, 1 - within / total) if total else None


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
        groups = [e.group for e in examples]
        assert same(
            facts["label"], expected_label(spec.label, [e.label for e in examples], lambda v: v is None, groups)
        )
        for name, target in spec.targets.items():
            values = [e.targets.get(name) for e in examples]
            assert same(facts["targets"][name], expected_label(target, values, lambda v: v is None, groups))
        kinds = Counter("+".join(m for m in spec.modalities if m in e.features) for e in examples)
        assert facts["combinations"] == kinds
        assert list(facts["combinations"].values()) == sorted(kinds.values(), reverse=True)
        for m in spec.modalities:
            x = [e.features[m].reshape(-1, spec.modalities[m]) for e in examples if m in e.features]
            assert facts["missing"][m] == len(examples) - len(x)
            assert same(facts["features"][m], expected_features(np.concatenate(x)))


def test_what_is_there_twice(odd_folder):
    report = inspection.inspect(odd_folder)
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


def test_the_same_report_from_many_shards_and_small_chunks(odd_folder, tmp_path, monkeypatch):
    whole = inspection.inspect(odd_folder, verify=True)
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


def test_origin_and_files(odd_folder, odd_copy):
    report = inspection.inspect(odd_folder)
    manifest = manifest_lib.read(odd_folder)
    assert report["source"] == {
        **Odd().provenance(),
        "converted": {},
        "replaced": {},
        "left_out": {},
        "fingerprint": "odd",
    }
    assert report["fingerprint"] == manifest.fingerprint()
    assert report["expected"] == {"all": {"expected": 13_302, "found": 49}}
    num = {TRAIN: 30, VALIDATION: 11, TEST: 8}
    assert report["files"] == {
        p.name: {"bytes": p.stat().st_size, **({"records": num[p.name]} if p.name in num else {})}
        for p in odd_folder.iterdir()
        if p.name != manifest_lib.FILE
    }
    assert report["total_bytes"] == sum(p.stat().st_size for p in odd_folder.iterdir() if p.name != manifest_lib.FILE)
    assert report["num_shards"] == 3
    assert report["warnings"] == manifest.warnings
    assert len(report["warnings"]) == 3
    assert report["unlisted_files"] == []
    (odd_copy / "notes.txt").write_text("")
    assert inspection.inspect(odd_copy)["unlisted_files"] == ["notes.txt"]


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
    assert re.search(r"train +62 +5 +2\n", text(report))


TRAIN, VALIDATION, TEST = (f"odd-{split}.array_record-00000-of-00001" for split in ("train", "validation", "test"))
