"""Every layout that users hold: written here, recognised, built, read back and compared value by value."""

import csv
from pathlib import Path

import numpy as np
import pytest

from conclugen_jax.data import builders, formats, joined, shards
from conclugen_jax.data.annotations import Layout
from conclugen_jax.data.corpora import CORPORA
from conclugen_jax.data.requests import Request
from conclugen_jax.errors import ConclugenError
from tests.helpers import SHARED_DATA, needs_shared_data

DIMS = {"video": 5, "audio": 3, "text": 4}
rng = np.random.default_rng(0)


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


# The authors' tree


def write_authors(root, ids, *, suffix="", variants=1, missing=()):
    """Four kinds of folders as the authors' code names them; returns split -> id -> modality -> [variants, dim]."""
    kinds = {
        "frames_2d": (f"frames_2d_180{suffix}", 3),
        "frames_3d": (f"frames_3d_180{suffix}", 2),
        "audio": (f"audio_spectrograms{suffix}_128", 3),
        "text": (f"texts{suffix}", 4),
    }
    expected = {}
    for split, names in ids.items():
        for name in names:
            pieces = {}
            for kind, (folder, dim) in kinds.items():
                stored = []
                for v in range(variants if split == "train" else 1):
                    x = vector(dim, abs(hash((split, name, kind, v))) % 2**32)
                    where = root / "features" / (f"{folder}_aug/aug{v + 1}" if variants > 1 else folder)
                    if (split, name, kind) not in missing:
                        save(where / split / f"{name}.npy", x)
                    stored.append(x)
                pieces[kind] = np.stack(stored)
            video = np.concatenate([pieces["frames_2d"], pieces["frames_3d"]], axis=1)
            expected[split, name] = {"video": video, "audio": pieces["audio"], "text": pieces["text"]}
    return expected


def test_authors_meld_with_variants_repeating_ids_and_dropped_utterances(tmp_path):
    root = tmp_path / "processed" / "meld"
    ids = {
        "train": ["dia0_utt0", "dia0_utt1", "dia110_utt7", "dia125_utt3"],
        "val": ["dia0_utt0", "dia110_utt7"],
        "test": ["dia0_utt0"],
    }
    expected = write_authors(root, ids, suffix="_cropped", variants=3, missing={("train", "dia0_utt1", "text")})
    # what is not augmented beside the augmented features is raw material of another shape
    save(root / "features" / "audio_spectrograms_cropped_128" / "train" / "dia0_utt0.npy", np.ones((128, 9)))
    (root / "annotations_cropped.yaml").write_text(
        "train:\n"
        "  dia0_utt0: {emotions: 4, sentiment: 1, person_id: Joey}\n"
        "  dia0_utt1: {emotions: 0, sentiment: 0, person_id: Ross}\n"
        "  dia110_utt7: {emotions: 1, sentiment: -1, person_id: Ross}\n"
        "  dia125_utt3: {emotions: 1, sentiment: -1, person_id: Ross}\n"
        "val:\n"
        "  dia0_utt0: {emotions: 6, sentiment: -1, person_id: Joey}\n"
        "  dia110_utt7: {emotions: 6, sentiment: -1, person_id: Joey}\n"
        "test:\n"
        "  dia0_utt0: {emotions: 2, sentiment: -1, person_id: Phoebe}\n"
    )
    dataset, found = build(Request("meld", root), tmp_path / "data")
    assert {split: list(rows) for split, rows in found.items()} == {
        "train": ["train_dia0_utt0", "train_dia0_utt1"],
        "validation": ["validation_dia0_utt0"],
        "test": ["test_dia0_utt0"],
    }
    assert dataset.manifest.modalities == DIMS
    assert dataset.manifest.variants == {"video": 3, "audio": 3, "text": 3}
    names = dataset.manifest.label.names
    assert [names[found[s][i][1]] for s in found for i in found[s]] == ["joy", "neutral", "anger", "fear"]
    assert [row[2] for split in found.values() for row in split.values()] == ["Joey", "Ross", "Joey", "Phoebe"]
    assert dataset.manifest.targets["sentiment"].names == ("negative", "neutral", "positive")
    assert [target(dataset, s, "sentiment") for s in found] == [[2, 1], [0], [0]]
    short = {"train": "train", "validation": "val", "test": "test"}
    for split, rows in found.items():
        for name, (vectors, _, _) in rows.items():
            stored = expected[short[split], name.removeprefix(f"{split}_")]
            if name == "train_dia0_utt1":
                stored = {m: x for m, x in stored.items() if m != "text"}
            assert_features(vectors, {m: x[0] for m, x in stored.items()})
    stream = shards.ShardStream(dataset, "train", ["video", "text"])
    np.testing.assert_array_equal(
        stream.variants("video", np.array([1, 0])),
        np.stack([expected["train", "dia0_utt1"]["video"], expected["train", "dia0_utt0"]["video"]]),
    )
    assert shards.ShardStream(dataset, "test", ["video"]).variants("video", np.array([0])).shape == (1, 1, 5)
    assert not dataset.manifest.warnings  # the speakers of MELD are in all splits, as published


def test_authors_mosei_keeps_numeric_ids_and_the_order_of_emotions(tmp_path):
    root = tmp_path / "cmu-mosei"
    ids = {"train": ["100178_1", "9cxlcpbmrH0_6", "-3g5yACwYnA_0"], "val": ["188343_0"], "test": ["24196_2"]}
    expected = write_authors(root, ids, suffix="_cropped")
    emotions = {
        "100178_1": [0, 0, 0.33, 0, 0, 2],
        "9cxlcpbmrH0_6": [0, 0, 0, 0, 0, 0],
        "-3g5yACwYnA_0": [1, 0, 0, 0.66, 0, 0],
        "188343_0": [0] * 6,
        "24196_2": [0, 3, 0, 0, 1, 0],
    }
    text = ""
    for split, names in ids.items():
        text += f"{split}:\n"
        for name in names:
            video = name.rsplit("_", 1)[0]
            text += f"  {name}:\n    emotions: {emotions[name]}\n    sentiment: -0.5\n    video: {video}\n"
    (root / "annotations_cropped.yaml").write_text(text)
    dataset, found = build(Request("cmu_mosei", root), tmp_path / "data")
    assert {s: set(rows) for s, rows in found.items()} == {
        "train": {"100178_1", "-3g5yACwYnA_0"},
        "validation": {"188343_0"},
        "test": {"24196_2"},
    }
    names = dataset.manifest.label.names
    labels = {i: {names[k] for k in np.flatnonzero(row[1])} for s in found.values() for i, row in s.items()}
    assert labels == {
        "100178_1": {"anger", "fear"},
        "-3g5yACwYnA_0": {"happiness", "surprise"},
        "188343_0": set(),
        "24196_2": {"sadness", "disgust"},
    }
    assert found["train"]["100178_1"][2] == "100178"
    assert_features(found["test"]["24196_2"][0], {m: x[0] for m, x in expected["test", "24196_2"].items()})
    assert target(dataset, "test", "sentiment") == [-0.5]


def test_authors_voxceleb2_without_reading_its_annotations(tmp_path):
    root = tmp_path / "voxceleb2"
    names = ["id00012_21Uxsk56VDQ_00001", "id00012_a_b_c_00002", "id00015_x-y_00001"]
    expected = write_authors(root, {"train": names})
    (root / "annotations.yaml").write_text("train: [not, read")
    dataset, found = build(Request("voxceleb2", root), tmp_path / "data")
    assert dataset.manifest.label.kind == "none"
    assert {name: row[2] for name, row in found["train"].items()} == dict(
        zip(names, ["id00012", "id00012", "id00015"], strict=True)
    )
    for name in names:
        assert_features(found["train"][name][0], {m: x[0] for m, x in expected["train", name].items()})


def test_authors_caer_and_ravdess_say_all_in_their_names(tmp_path):
    caer = {"train": ["Anger_0001", "Surprise_0002"], "val": ["Neutral_0001"], "test": ["Sad_0001", "Fear_0009"]}
    write_authors(tmp_path / "caer", caer, suffix="_cropped")
    dataset, found = build(Request("caer", tmp_path / "caer"), tmp_path / "data")
    names = dataset.manifest.label.names
    assert [names[row[1]] for split in found.values() for row in split.values()] == [
        "anger",
        "surprise",
        "neutral",
        "fear",
        "sad",
    ]

    ids = [f"01-01-{1 + i % 8:02d}-01-01-01-{actor:02d}" for i, actor in enumerate(range(1, 25))]
    write_authors(tmp_path / "ravdess", {"train": ids, "val": ids})
    dataset, found = build(Request("ravdess", tmp_path / "ravdess"), tmp_path / "data")
    actors = {split: {row[2] for row in rows.values()} for split, rows in found.items()}
    assert actors["validation"] == {f"actor{a}" for a in range(17, 21)}
    assert actors["test"] == {f"actor{a}" for a in range(21, 25)}
    assert len(actors["train"]) == 16
    assert found["test"]["01-01-08-01-01-01-24"][1] == 7
    assert dataset.manifest.label.names[7] == "surprised"

    folds = []
    for fold in range(6):
        request = Request("ravdess", tmp_path / "ravdess", folds=(6, fold))
        dataset, found = build(request, tmp_path / "data")
        assert dataset.manifest.name == f"ravdess_fold{fold}of6"
        folds.append({row[2] for row in found["test"].values()})
    assert sorted(set().union(*folds)) == [f"actor{a:02d}" for a in range(1, 25)]
    assert sum(map(len, folds)) == 24


# Tables


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


def check_table(dataset, found, rows, stored):
    names = dataset.manifest.label.names
    split_of = {"train": "train", "dev": "validation", "test": "test"}
    assert sum(map(len, found.values())) == len(rows)
    for row in rows:
        vectors, label, group = found[split_of[row["split"]]][row["id"]]
        assert names[label] == row["emotion"]
        assert group == row["group"]
        assert_features(vectors, {m: x[row["id"]] for m, x in stored.items() if row["id"] in x})


NO_LAYOUT = Layout()
LAYOUT = Layout(label=("emotion",), targets=("arousal",))


def test_table_of_matrices_and_folders(tmp_path):
    rows, stored = table_rows()
    source = tmp_path / "mine"
    source.mkdir()
    write_csv(source / "labels.csv", rows)
    order = sorted(stored["video"], reverse=True)  # rows stand in an order of their own
    np.save(source / "video.npy", np.stack([stored["video"][i] for i in order]))
    (source / "video.txt").write_text("\n".join(order) + "\n")
    for name, x in stored["audio"].items():
        save(source / "audio" / f"{name}.npy", x)
    for name, x in stored["text"].items():
        split = next(r["split"] for r in rows if r["id"] == name)
        save(source / "text" / split / f"{name}.npy", x)
    dataset, found = build(Request("features", source, name="mine", layout=LAYOUT), tmp_path / "data")
    check_table(dataset, found, rows, stored)
    assert dataset.manifest.label.names == ("angry", "happy", "sad")
    np.testing.assert_allclose(target(dataset, "test", "arousal"), [2 / 7, 5 / 7, 8 / 7, 11 / 7], atol=1e-3)
    assert dataset.manifest.source["format"] == "table"


def test_named_modalities_and_another_one(tmp_path):
    """Any further modality by naming it, from any kind of file."""
    rows, stored = table_rows()
    write_csv(tmp_path / "labels.csv", rows)
    ids = [r["id"] for r in rows]
    save(tmp_path / "a" / "video.npy", np.stack([stored["video"][i] for i in ids]))
    (tmp_path / "a" / "ids.txt").write_text("\n".join(ids))
    landmarks = {i: vector(6, k) for k, i in enumerate(ids)}
    np.savez(tmp_path / "faces.npz", ids=np.array(ids), landmarks=np.stack(list(landmarks.values())))
    request = Request(
        "features",
        name="mine",
        modalities={"video": str(tmp_path / "a" / "video.npy"), "landmarks": str(tmp_path / "faces.npz:landmarks")},
        labels=(tmp_path / "labels.csv",),
        layout=LAYOUT,
    )
    dataset, found = build(request, tmp_path / "data")
    check_table(dataset, found, rows, {"video": stored["video"], "landmarks": landmarks})


def test_npz_and_parquet_hold_everything_in_one_file(tmp_path):
    pa = pytest.importorskip("pyarrow")
    pq = pytest.importorskip("pyarrow.parquet")
    rows, stored = table_rows()
    columns = {key: [row[key] for row in rows] for key in rows[0]}
    table = pa.table(
        columns
        | {
            m: pa.array([x[r["id"]].tolist() if r["id"] in x else None for r in rows], pa.list_(pa.float32()))
            for m, x in stored.items()
        }
    )
    pq.write_table(table, tmp_path / "all.parquet", row_group_size=5)
    dataset, found = build(
        Request("features", tmp_path / "all.parquet", name="mine", layout=LAYOUT), tmp_path / "data", num_workers=2
    )
    check_table(dataset, found, rows, stored)
    whole = {"video": stored["video"]}
    np.savez(tmp_path / "all.npz", ids=columns.pop("id"), **columns, video=np.stack(list(stored["video"].values())))
    dataset, found = build(Request("features", tmp_path / "all.npz", name="npz", layout=LAYOUT), tmp_path / "data")
    check_table(dataset, found, rows, whole)


@pytest.mark.parametrize("per_split", [True, False])
def test_metadata_csv_beside_the_files_it_lists(tmp_path, per_split):
    rows, stored = table_rows()
    source = tmp_path / "hub"
    listed = {"train": [], "dev": [], "test": []}
    for row in rows:
        folder = row["split"] if per_split else "files"
        entry = {k: v for k, v in row.items() if k != ("split" if per_split else "")}
        for m, x in stored.items():
            path = f"{m}/{row['id']}.npy"
            entry[f"{m}_file_name"] = ""
            if row["id"] in x:
                save(source / folder / path, x[row["id"]])
                entry[f"{m}_file_name"] = path if per_split else f"files/{path}"
        listed[row["split"]].append(entry)
    if per_split:
        for split, entries in listed.items():
            write_csv(source / split / "metadata.csv", entries)
    else:
        write_csv(source / "metadata.csv", [entry for entries in listed.values() for entry in entries])
    dataset, found = build(Request("features", source, name="hub", layout=LAYOUT), tmp_path / "data")
    check_table(dataset, found, rows, stored)
    assert dataset.manifest.source["format"] == "metadata"


def test_paths_in_metadata_stay_inside(tmp_path):
    np.save(tmp_path / "secret.npy", np.ones(3))
    (tmp_path / "hub").mkdir()
    for path in ("../secret.npy", str(tmp_path / "secret.npy"), "a/../../secret.npy"):
        write_csv(tmp_path / "hub" / "metadata.csv", [{"file_name": path, "label": "1"}])
        with pytest.raises(ConclugenError, match=r"metadata.csv, line 2: file name .* leads out of the folder"):
            formats.open_source(Request("features", tmp_path / "hub", name="x"))


# Labels


def test_labels_of_every_kind(tmp_path):
    ids = [f"c{i}" for i in range(6)]
    save(tmp_path / "t" / "x.npy", np.arange(12.0).reshape(6, 2))
    (tmp_path / "t" / "x.txt").write_text("\n".join(ids))
    base = [{"id": i, "split": "train"} for i in ids]

    def labels(name, layout=NO_LAYOUT, **columns):
        rows = [r | {k: v[i] for k, v in columns.items()} for i, r in enumerate(base)]
        write_csv(tmp_path / "t" / "labels.csv", rows)
        dataset, found = build(Request("features", tmp_path / "t", name=name, layout=layout), tmp_path / "data")
        return dataset.manifest.label, [row[1] for row in found["train"].values()]

    spec, values = labels("numbers", label=[0, 2, 1, 0, 0, 2])
    assert (spec.kind, spec.names, values) == ("single", ("0", "1", "2"), [0, 2, 1, 0, 0, 2])
    spec, values = labels("reals", label=[-3, 2.5, 1, 0, 0, 2])
    assert (spec.kind, spec.names, values) == ("value", (), [-3, 2.5, 1, 0, 0, 2])
    spec, values = labels("ordered", Layout(classes=("low", "high")), label=["high", "low"] * 3)
    assert (spec.names, values) == (("low", "high"), [1, 0] * 3)
    spec, values = labels("many", Layout(label=("a", "b")), a=[1, 0, 1, 0, 0, 0], b=[0, 0, 1, 1, 1, 0])
    assert (spec.kind, spec.names) == ("multi", ("a", "b"))
    assert values == [[1, 0], [0, 0], [1, 1], [0, 1], [0, 1], [0, 0]]
    spec, values = labels("nothing", other=["x"] * 6)
    assert (spec.kind, values) == ("none", [[]] * 6)


BAD_TABLES = {
    "no id": ("split,label\ntrain,1\n", r"no column 'id'; it has split, label"),
    "ragged": ("id,split,label\nc0,train,1\nc1,train\n", r"labels.csv, line 3: 2 cells, the header has 3"),
    "twice": ("id,id\na,b\n", r"must name the columns, each once"),
    "empty": ("", r"must name the columns"),
    "no rows": ("id,split,label\n", r"no rows below the header"),
    "label outside": (
        "id,split,label\nc0,train,joy\nc1,train,fun\n",
        r"line 3: label 'fun' is none of the classes joy, sad",
    ),
    "label empty": ("id,split,label\nc0,train,joy\nc1,train,\n", r"line 3: column 'label' is empty"),
    "split": ("id,split,label\nc0,../x,joy\n", r"line 2: split '../x'"),
    "quote": ('id,split,label\nc0,train,"joy\n', r"not csv"),
    "duplicate": ("id,split,label\nc0,train,joy\nc0,train,joy\n", r"id 'c0': the same id as row 0"),
    "path as id": ("id,split,label\n../c0,train,joy\n", r"'../c0' is no name of a file"),
    "unknown": (
        "id,split,label\nc0,train,joy\nnone,train,joy\n",
        r"row 1, id 'none', no modality is present.*--drop_bad",
    ),
}


@pytest.mark.parametrize("name", BAD_TABLES)
def test_bad_label_files_are_refused_by_line(tmp_path, name):
    text, message = BAD_TABLES[name]
    save(tmp_path / "t" / "x" / "c0.npy", np.ones(2))
    save(tmp_path / "t" / "x" / "c1.npy", np.ones(2))
    (tmp_path / "t" / "labels.csv").write_text(text)
    classes = ("joy", "sad") if "label" in name else ()
    with pytest.raises(ConclugenError, match=message):
        build(Request("features", tmp_path / "t", name="bad", layout=Layout(classes=classes)), tmp_path / "data")
    assert not (tmp_path / "data").exists() or not list((tmp_path / "data").iterdir())


# Feature files


def test_sequences_are_pooled_over_their_valid_steps(tmp_path):
    x = np.random.default_rng(0).normal(size=(3, 4, 2)).astype(np.float32)
    lengths = np.array([4, 1, 2])
    save(tmp_path / "t" / "padded.npy", x)
    np.save(tmp_path / "t" / "padded_lengths.npy", lengths)
    (tmp_path / "t" / "padded.txt").write_text("a\nb\nc\n")
    for i, name in enumerate("abc"):
        save(tmp_path / "t" / "clips" / f"{name}.npy", x[i, : lengths[i]])
    reduce = {"mean": lambda s: s.mean(axis=0), "max": lambda s: s.max(axis=0), "last": lambda s: s[-1]}
    for how, fn in reduce.items():
        _, found = build(Request("features", tmp_path / "t", name=how, pool=how), tmp_path / "data")
        for i, name in enumerate("abc"):
            expected = fn(x[i, : lengths[i]])
            for m in ("padded", "clips"):
                np.testing.assert_allclose(found["train"][name][0][m], expected, rtol=1e-6)


def test_float16_and_float64_are_converted_and_said(tmp_path):
    save(tmp_path / "t" / "x" / "a.npy", np.array([0.5, 1.5], np.float16))
    save(tmp_path / "t" / "x" / "b.npy", np.array([0.1, 1e-3]))
    save(tmp_path / "t" / "x" / "c.npy", np.array([1, 2], np.float32))
    dataset, found = build(Request("features", tmp_path / "t", name="mixed"), tmp_path / "data")
    assert dataset.manifest.source["converted"] == {"x float16": 1, "x float64": 1}
    assert_features(found["train"]["b"][0], {"x": np.array([0.1, 1e-3], np.float32)})


class Marker:
    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return Path.touch, (self.path,)


def test_objects_and_pickles_are_refused_and_not_executed(tmp_path):
    marker = tmp_path / "executed"
    evil = np.array([Marker(marker)], dtype=object)
    source = tmp_path / "t"
    source.mkdir()

    def refused(message, path=source):
        with pytest.raises(ConclugenError, match=message):
            build(Request("features", path, name="evil"), tmp_path / "data")
        assert not marker.exists()

    save(source / "x" / "a.npy", evil)
    refused("a.npy: holds Python objects")
    (source / "x" / "a.npy").unlink()
    np.save(source / "m.npy", evil)
    (source / "m.txt").write_text("a\n")
    refused("m.npy: cannot be read as an npy file of numbers")
    np.savez(tmp_path / "all.npz", ids=np.array(["a"]), x=evil)
    refused("all.npz: cannot be read as an npz file of plain arrays", tmp_path / "all.npz")
    (tmp_path / "x.pkl").write_bytes(b"cos\nsystem\n(S'true'\ntR.")
    refused("a pickle can execute code.*convert_mmsa", tmp_path / "x.pkl")


def test_damaged_files_are_refused_by_name(tmp_path):
    def one(data, message):
        (tmp_path / "t" / "x").mkdir(parents=True, exist_ok=True)
        (tmp_path / "t" / "x" / "a.npy").write_bytes(data)
        with pytest.raises(ConclugenError, match=message):
            build(Request("features", tmp_path / "t", name="damaged"), tmp_path / "data")

    save(tmp_path / "good.npy", np.ones(7, np.float32))
    good = (tmp_path / "good.npy").read_bytes()
    one(good[:-1], "a.npy: holds fewer or more bytes than its header declares")
    one(good + b"\0", "a.npy: holds fewer or more bytes than its header declares")
    one(good[:40], "a.npy: not an npy file")
    one(b"", "a.npy: not an npy file")
    one(good.replace(b"(7,)", b"(7000000000000000000,)".ljust(4))[:200], "a.npy: (not an npy file|holds fewer)")
    save(tmp_path / "t" / "x" / "a.npy", np.ones(7))
    save(tmp_path / "t" / "x" / "b.npy", np.ones(6))
    with pytest.raises(ConclugenError, match=r"id 'b', modality 'x': float64 of shape \(6,\).*\(7,\)"):
        build(Request("features", tmp_path / "t", name="damaged"), tmp_path / "data")


def test_bad_rows_are_refused_with_their_ids_or_dropped_and_listed(tmp_path):
    x = np.ones((9, 3))
    x[2, 1], x[5, 0], x[7, 2] = np.nan, np.inf, -np.inf
    save(tmp_path / "t" / "x.npy", x)
    (tmp_path / "t" / "x.txt").write_text("\n".join(f"c{i}" for i in range(9)))
    request = Request("features", tmp_path / "t", name="bad")
    with pytest.raises(ConclugenError, match=r"3 bad examples: .*'c2'.*'c5'.*'c7'.*--drop_bad"):
        build(request, tmp_path / "data")
    dataset, found = build(request, tmp_path / "data", drop_bad=True)
    assert list(found["train"]) == ["c0", "c1", "c3", "c4", "c6", "c8"]
    assert dataset.manifest.splits["train"]["dropped"] == 3
    listed = list(csv.reader((dataset.path / builders.DROPPED).read_text().splitlines()))
    assert [row[:3] for row in listed] == [["split", "row", "id"], *(["train", str(i), f"c{i}"] for i in (2, 5, 7))]
    assert builders.DROPPED in dataset.manifest.files
    with pytest.raises(ConclugenError, match="other examples"):
        build(request, tmp_path / "data")


def test_leaks_between_splits_are_warned_of_and_refused_if_strict(tmp_path):
    rows, stored = table_rows()
    rows[1]["group"] = "speaker0"  # of dev; speaker0 is one of train's
    rows[3]["id"] = rows[1]["id"]  # in train and dev
    source = tmp_path / "t"
    for name, x in stored["video"].items():
        save(source / "video" / f"{name}.npy", x)
    write_csv(source / "labels.csv", rows)
    request = Request("features", source, name="leaky", layout=LAYOUT)
    with pytest.raises(ConclugenError, match=r"have 1 id in common, such as 'clip1'.*without --strict"):
        build(request, tmp_path / "data", strict=True)
    assert not list((tmp_path / "data").iterdir())
    dataset, _ = build(request, tmp_path / "data")
    assert dataset.manifest.warnings == [
        "splits 'train' and 'validation' have 1 id in common, such as 'clip1'",
        "splits 'train' and 'validation' have 1 group in common, such as 'speaker0'",
    ]


# Rebuilding


def test_unchanged_files_are_not_built_again_and_changed_ones_are_noticed(tmp_path):
    rows, stored = table_rows()
    source = tmp_path / "t"
    for name, x in stored["video"].items():
        save(source / "video" / f"{name}.npy", x)
    write_csv(source / "labels.csv", rows)
    request = Request("features", source, name="mine", layout=LAYOUT)
    dataset, _ = build(request, tmp_path / "data")
    before = {p: p.stat().st_mtime_ns for p in dataset.path.iterdir()}
    build(request, tmp_path / "data")
    assert {p: p.stat().st_mtime_ns for p in dataset.path.iterdir()} == before
    save(source / "video" / "clip3.npy", np.zeros(5, np.float32))
    with pytest.raises(ConclugenError, match=r"other examples.*--overwrite"):
        build(request, tmp_path / "data")
    _, found = build(request, tmp_path / "data", overwrite=True)
    assert not found["train"]["clip3"][0]["video"].any()


def test_a_source_that_changes_while_it_is_read_is_refused(tmp_path):
    save(tmp_path / "t" / "x" / "a.npy", np.ones(2))

    class Changing(joined.JoinedSource):
        def part(self, split, start, stop):
            save(tmp_path / "t" / "x" / "a.npy", np.zeros(3))
            save(tmp_path / "t" / "x" / "a.npy", np.zeros(2))
            return super().part(split, start, stop)

    source = formats.open_source(Request("features", tmp_path / "t", name="x"))
    source.__class__ = Changing
    with pytest.raises(ConclugenError, match="changed while it was read"):
        builders.build(source, tmp_path / "data")
    assert not list((tmp_path / "data").iterdir())


# What is asked for


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"dataset": "mosi"}, r"'mosi' is unknown; there are voxceleb2, caer"),
        ({"format": "zip"}, r"format 'zip' is unknown; there are auto, authors"),
        ({"pool": "sum"}, r"pooling 'sum' is unknown; there are mean, max, last"),
        ({"name": ""}, r"needs a name of its own; give it with --name"),
        ({"source": Path("nowhere")}, r"nowhere: no such file or folder"),
        ({"source": None}, r"no source"),
        ({"only": ("smell",)}, r"no modality 'smell'; there are x"),
        ({"modalities": {"y": "gone.npy"}}, r"gone.npy: no such file"),
        ({"dataset": "meld"}, r"no labels; add a labels.csv"),
        ({"dataset": "caer"}, r"nothing says which split"),
        ({"format": "csd"}, r"format 'csd' is for cmu_mosei and cmu_mosi"),
        ({"folds": (3, 0)}, r"fold 0 of 3 over 1 groups"),
        ({"layout": Layout(label=("emotion",))}, r"no column 'emotion'; it has id, label"),
    ],
)
def test_impossible_requests_say_the_way_out(tmp_path, changes, message):
    save(tmp_path / "t" / "x" / "a.npy", np.ones(2))
    if "layout" in changes:
        (tmp_path / "t" / "labels.csv").write_text("id,label\na,1\n")
    request = {"dataset": "features", "source": tmp_path / "t", "name": "mine"} | changes
    with pytest.raises(ConclugenError, match=message):
        formats.open_source(Request(**request))


def test_corpora_have_the_published_classes():
    assert {name: len(c.label.names) for name, c in CORPORA.items()} == {
        "voxceleb2": 0,
        "caer": 7,
        "meld": 7,
        "cmu_mosei": 6,
        "cmu_mosi": 0,
        "ravdess": 8,
    }


@needs_shared_data
def test_real_meld_tables(tmp_path):
    """The published csv files with a feature for each utterance."""
    tables = sorted((SHARED_DATA / "meld_csv").glob("*.csv"))
    keys = {}
    for path in tables:
        split = {"dev": "validation"}.get(path.stem.split("_")[0], path.stem.split("_")[0])
        with path.open(encoding="utf-8-sig", newline="") as file:
            keys[split] = [(f"dia{r['Dialogue_ID']}_utt{r['Utterance_ID']}", r) for r in csv.DictReader(file)]
    ids = [f"{split}/{key}" for split, rows in keys.items() for key, _ in rows]
    np.save(tmp_path / "text.npy", np.arange(len(ids), dtype=np.float32)[:, None])
    (tmp_path / "text.txt").write_text("\n".join(ids))
    request = Request("meld", modalities={"text": str(tmp_path / "text.npy")}, labels=tuple(tables))
    dataset, found = build(request, tmp_path / "data")
    assert {s: len(rows) for s, rows in found.items()} == {"train": 9989 - 1, "validation": 1109 - 1, "test": 2610}
    position = {name: i for i, name in enumerate(ids)}
    names, sentiments = dataset.manifest.label.names, dataset.manifest.targets["sentiment"].names
    for split, rows in keys.items():
        kept = [(k, r) for k, r in rows if f"{split}_{k}" in found[split]]
        for (key, row), sentiment in zip(kept, target(dataset, split, "sentiment"), strict=True):
            vectors, label, group = found[split][f"{split}_{key}"]
            assert vectors["text"] == position[f"{split}/{key}"]
            assert (names[label], group) == (row["Emotion"], row["Speaker"].strip())
            assert sentiments[sentiment] == row["Sentiment"]


@needs_shared_data
def test_real_mosei_segments(tmp_path):
    tables = sorted((SHARED_DATA / "cmu_mosei_labels").glob("*.csv"))
    seen, ids, expected = {}, [], []
    for path in tables:
        with path.open(encoding="utf-8-sig", newline="") as file:
            for row in csv.DictReader(file):
                i = seen[row["video"]] = seen.get(row["video"], -1) + 1
                ids.append(f"{row['video']}_{i}")
                names = ("happy", "sad", "anger", "surprise", "disgust", "fear")
                expected.append([float(float(row[n]) > 0) for n in names])
    np.save(tmp_path / "text.npy", np.arange(len(ids), dtype=np.float32)[:, None])
    (tmp_path / "text.txt").write_text("\n".join(ids))
    request = Request("cmu_mosei", modalities={"text": str(tmp_path / "text.npy")}, labels=tuple(tables))
    _, found = build(request, tmp_path / "data")
    assert {s: len(rows) for s, rows in found.items()} == {"validation": 1861, "test": 4653}
    for rows in found.values():
        for name, (vectors, label, group) in rows.items():
            row = int(vectors["text"][0])
            assert ids[row] == name
            assert label == expected[row]
            assert group == name.rsplit("_", 1)[0]


@needs_shared_data
def test_real_ravdess_features(tmp_path):
    path = SHARED_DATA / "ravdess" / "ravdess_au_mfcc.npz"
    with np.load(path, allow_pickle=False) as file:
        arrays = dict(file)
    dataset, found = build(Request("ravdess", path), tmp_path)
    assert {s: len(rows) for s, rows in found.items()} == {"train": 960, "validation": 240, "test": 240}
    rows = {name: row for split in found.values() for name, row in split.items()}
    for i, name in enumerate(arrays["id"]):
        vectors, label, group = rows[str(name)]
        assert_features(vectors, {"video": arrays["video"][i], "audio": arrays["audio"][i]})
        assert (label, group) == (arrays["emotion"][i], f"actor{arrays['actor'][i]:02d}")
