"""Every layout that users hold: written here, recognised, built, read back and compared value by value."""

import zlib

import numpy as np
import pytest

from conclugen_jax.data import formats, shards
from conclugen_jax.data.corpora import CORPORA
from conclugen_jax.data.requests import Request
from conclugen_jax.errors import ConclugenError
from tests.layouts import DIMS, LAYOUT, assert_features, build, refused, save, table_rows, target, vector, write_csv

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
                    x = vector(dim, zlib.crc32(f"{split}/{name}/{kind}/{v}".encode()))
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
    expected = write_authors(root, ids, suffix="_cropped", variants=11, missing={("train", "dia0_utt1", "text")})
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
    assert dataset.manifest.variants == {"video": 11, "audio": 11, "text": 11}  # aug10 comes after aug2
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
    stream = shards.ShardStream(dataset, "train", ["video", "text"], all_variants=True)
    assert stream.variants == {"video": 11, "text": 11}
    np.testing.assert_array_equal(
        stream.rows(np.array([1, 0]), {"video": np.tile(np.arange(11), (2, 1))})["features"]["video"],
        np.stack([expected["train", "dia0_utt1"]["video"], expected["train", "dia0_utt0"]["video"]]),
    )
    assert shards.ShardStream(dataset, "test", ["video"], all_variants=True).variants == {}
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
    dataset, found = build(Request("caer", tmp_path / "caer"), tmp_path / "data", strict=True)
    assert not dataset.manifest.warnings  # no groups are not one group
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


def check_table(dataset, found, rows, stored):
    names = dataset.manifest.label.names
    split_of = {"train": "train", "dev": "validation", "test": "test"}
    assert sum(map(len, found.values())) == len(rows)
    for row in rows:
        vectors, label, group = found[split_of[row["split"]]][row["id"]]
        assert names[label] == row["emotion"]
        assert group == row["group"]
        assert_features(vectors, {m: x[row["id"]] for m, x in stored.items() if row["id"] in x})


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


def test_columns_of_an_npz_file(tmp_path):
    def npz(**arrays):
        np.savez(tmp_path / "all.npz", x=np.arange(6.0).reshape(3, 2), **arrays)
        return Request("features", tmp_path / "all.npz", name="npz")

    request = npz(id=np.array([b"a", b"b", b"c"]), label=np.array([b"no", b"yes", b"no"]))
    dataset, found = build(request, tmp_path / "data")
    assert dataset.manifest.label.names == ("no", "yes")
    assert {i: row[1] for i, row in found["train"].items()} == {"a": 0, "b": 1, "c": 0}
    for arrays, message in (
        ({}, "no column 'id', or no rows"),
        ({"ids": np.array(["a", "b"])}, "3 rows but 2 ids"),
        ({"ids": np.array(["a", "b", "c"]), "label": np.arange(2)}, "2 values of 'label' for 3 ids"),
    ):
        with pytest.raises(ConclugenError, match=message):
            formats.open_source(npz(**arrays))


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
    assert dataset.manifest.source["unused"] == {}


def test_paths_in_metadata_stay_inside(tmp_path):
    np.save(tmp_path / "secret.npy", np.ones(3))
    (tmp_path / "hub").mkdir()
    for path in ("../secret.npy", str(tmp_path / "secret.npy"), "a/../../secret.npy"):
        write_csv(tmp_path / "hub" / "metadata.csv", [{"file_name": path, "label": "1"}])
        with pytest.raises(ConclugenError, match=r"metadata.csv, line 2: file name .* leads out of the folder"):
            formats.open_source(Request("features", tmp_path / "hub", name="x"))


def test_corpora_have_the_published_classes():
    assert {name: len(c.label.names) for name, c in CORPORA.items()} == {
        "voxceleb2": 0,
        "caer": 7,
        "meld": 7,
        "cmu_mosei": 6,
        "cmu_mosi": 0,
        "ravdess": 8,
    }


def test_meld_tables_and_ids_with_their_split_in_front(tmp_path):
    """The published columns; a name without split in front is only taken where there is none with it."""
    header = "Sr No.,Utterance,Speaker,Emotion,Sentiment,Dialogue_ID,Utterance_ID"
    lines = {
        "train": ['1,"Oh, no",Ross,anger,negative,110,7', "2,Hi,Joey,joy,positive,0,0", "3,Hm,Joey,fear,neutral,1,0"],
        "dev": ["1,Hi,Joey,sadness,negative,0,0", "2,Hi,Ross,joy,positive,110,7"],
        "test": ["1,Hi,Ross ,surprise,positive,0,0", "2,Hi,Ross,neutral,positive,110,7"],
    }
    for split, rows in lines.items():
        (tmp_path / f"{split}_sent_emo.csv").write_text("\n".join([header, *rows]))
    names = ["dia0_utt0", "train/dia0_utt0", "validation/dia0_utt0", "dia1_utt0", "dia110_utt7"]
    np.save(tmp_path / "text.npy", np.arange(5, dtype=np.float32)[:, None])
    (tmp_path / "text.txt").write_text("\n".join(names))
    dataset, found = build(Request("meld", tmp_path), tmp_path / "data")
    label = dataset.manifest.label.names.index
    assert {s: {i: (float(x["text"][0]), y, g) for i, (x, y, g) in rows.items()} for s, rows in found.items()} == {
        "train": {"train_dia0_utt0": (1, label("joy"), "Joey"), "train_dia1_utt0": (3, label("fear"), "Joey")},
        "validation": {"validation_dia0_utt0": (2, label("sadness"), "Joey")},
        "test": {"test_dia0_utt0": (0, label("surprise"), "Ross"), "test_dia110_utt7": (4, label("neutral"), "Ross")},
    }


def test_a_vector_is_not_taken_for_several_meld_utterances(tmp_path):
    header = "Speaker,Emotion,Sentiment,Dialogue_ID,Utterance_ID"
    for split in ("train", "dev", "test"):
        (tmp_path / f"{split}_sent_emo.csv").write_text(f"{header}\nRoss,joy,positive,0,0\n")
    save(tmp_path / "video" / "dia0_utt0.npy", np.ones(3))
    with pytest.raises(ConclugenError, match=r"'dia0_utt0' is an utterance of 'train' and another one of 'validation'"):
        formats.open_source(Request("meld", tmp_path))


def test_yaml_with_a_key_twice_is_refused(tmp_path):
    root = tmp_path / "meld"
    write_authors(root, {"train": ["dia0_utt0"], "val": [], "test": []})
    (root / "annotations.yaml").write_text("train:\n  dia0_utt0: {emotions: 1}\n  dia0_utt0: {emotions: 2}\n")
    with pytest.raises(ConclugenError, match="'dia0_utt0' appears twice"):
        formats.open_source(Request("meld", root))


@pytest.mark.parametrize(
    ("dataset", "name"), [("voxceleb2", "x"), ("caer", "Joy_1"), ("ravdess", "01-01-09-01-01-01-01")]
)
def test_names_of_another_form_than_the_corpus_has_are_refused(tmp_path, dataset, name):
    save(tmp_path / "x" / "train" / f"{name}.npy", np.ones(2))
    refused(rf"{dataset}: '{name}' is no name like {CORPORA[dataset].example}", tmp_path, dataset=dataset)
