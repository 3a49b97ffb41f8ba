"""Data sets made of CMU-MultimodalSDK files and of tables of their segments."""

import numpy as np
import pytest

from conclugen_jax.data import formats
from conclugen_jax.data.corpora import CORPORA
from conclugen_jax.data.importers import csd
from conclugen_jax.data.requests import Request
from conclugen_jax.errors import ConclugenError
from tests.layouts import assert_features, build, save, target, write_csd, write_csv
from tests.test_label_faults import refusal, write


def write_mosei(folder):
    """Labels of four videos and three sequences, one of which lacks a video; returns the features by video."""
    folder.mkdir()
    steps = [[0, 1], [1, 2], [2, 3], [3, 4]]
    segments = [[0, 2], [2, 4]]
    rows = {  # sentiment, happy, sad, anger, surprise, disgust, fear
        "-3g5yACwYnA": [[1.5, 2, 0, 0, 0, 0, 1 / 3], [-3, 0, 1, 0, 0, 0, 0]],
        "188343": [[0, 0, 0, 0, 3, 0, 0], [0, 0, 0, 0, 0, 0, 0]],
        "24196": [[0, 0, 0, 0, 0, 1, 0], [2, 0, 0, 3, 0, 0, 0]],
        "in_no_fold1": [[0] * 7, [0] * 7],
    }
    write_csd(folder / "CMU_MOSEI_Labels.csd", {video: (np.array(r), segments) for video, r in rows.items()})
    x = {video: np.arange(12.0).reshape(4, 3) + i for i, video in enumerate(rows)}
    write_csd(folder / "CMU_MOSEI_TimestampedWordVectors.csd", {video: (a, steps) for video, a in x.items()})
    covarep = {video: (np.where(a == 0, -np.inf, a), steps) for video, a in x.items() if video != "24196"}
    write_csd(folder / "CMU_MOSEI_COVAREP.csd", covarep)
    write_csd(folder / "CMU_MOSEI_VisualFacet42.csd", {video: (-a, steps) for video, a in x.items()})
    return x


def test_csd_files_of_mosei(tmp_path):
    pytest.importorskip("h5py")
    x = write_mosei(tmp_path / "mosei")
    dataset, found = build(Request("cmu_mosei", tmp_path / "mosei"), tmp_path / "data", num_workers=2)
    assert dataset.manifest.source["format"] == "csd"
    assert dataset.manifest.source["rows_outside_folds"] == 2
    assert dataset.manifest.source["replaced"] == {"audio": 1}
    assert {s: list(rows) for s, rows in found.items()} == {
        "train": ["-3g5yACwYnA_0", "-3g5yACwYnA_1"],
        "validation": ["188343_0", "188343_1"],
        "test": ["24196_0", "24196_1"],
    }
    names = dataset.manifest.label.names
    labels = {i: {names[k] for k in np.flatnonzero(row[1])} for s in found.values() for i, row in s.items()}
    assert labels == {
        "-3g5yACwYnA_0": {"happiness", "fear"},
        "-3g5yACwYnA_1": {"sadness"},
        "188343_0": {"surprise"},
        "188343_1": set(),
        "24196_0": {"disgust"},
        "24196_1": {"anger"},
    }
    assert [target(dataset, s, "sentiment") for s in found] == [[1.5, -3], [0, 0], [0, 2]]
    for rows in found.values():
        for name, (vectors, _, group) in rows.items():
            video, segment = name.rsplit("_", 1)
            mean = x[video][2 * int(segment) :][:2].mean(axis=0).astype(np.float32)
            expected = {"text": mean, "video": -mean, "audio": mean}
            if name == "-3g5yACwYnA_0":
                expected["audio"] = np.array([1.5, 2.5, 3.5], np.float32)  # its 0 was -inf, read as 0
            if video == "24196":
                del expected["audio"]
            assert_features(vectors, expected)
            assert group == video


def test_tables_of_mosei_say_how_many_rows_are_in_no_fold(tmp_path):
    save(tmp_path / "t" / "text" / "188343_0.npy", np.ones(3))
    save(tmp_path / "t" / "text" / "24196_0.npy", np.ones(3))
    rows = [
        {"video": video, "start_time": 0, "end_time": 1, "sentiment": 1, **dict.fromkeys(csd.EMOTIONS, 0)}
        for video in ("188343", "in_no_fold1", "24196", "in_no_fold1")
    ]
    write_csv(tmp_path / "t" / "segments.csv", rows)
    dataset, found = build(Request("cmu_mosei", tmp_path / "t"), tmp_path / "data")
    assert {split: list(names) for split, names in found.items()} == {"validation": ["188343_0"], "test": ["24196_0"]}
    assert dataset.manifest.source["rows_outside_folds"] == 2


def test_csd_files_by_name(tmp_path):
    pytest.importorskip("h5py")
    x = write_mosei(tmp_path / "mosei")
    write_csd(
        tmp_path / "mosei" / "CMU_MOSEI_VisualOpenFace2.csd",
        {v: (a[:, :2], [[0, 1], [1, 2], [2, 3], [3, 4]]) for v, a in x.items()},
    )
    with pytest.raises(
        ConclugenError, match=r"CMU_MOSEI_VisualFacet42.csd, CMU_MOSEI_VisualOpenFace2.csd could all be 'video'"
    ):
        formats.open_source(Request("cmu_mosei", tmp_path / "mosei"))
    folder = tmp_path / "mosei"
    both = f"{folder}/CMU_MOSEI_VisualFacet42.csd+{folder}/CMU_MOSEI_VisualOpenFace2.csd"
    request = Request("cmu_mosei", folder, modalities={"video": both}, only=("video",))
    dataset, found = build(request, tmp_path / "data")
    assert dataset.manifest.modalities == {"video": 5}
    mean = x["188343"][2:].mean(axis=0)
    assert_features(found["validation"]["188343_1"][0], {"video": np.float32([*-mean, *mean[:2]])})
    (folder / "CMU_MOSEI_Labels.csd").unlink()
    with pytest.raises(ConclugenError, match=r"no file with Label in its name; name it with --labels=FILE.csd"):
        formats.open_source(request)


def test_csd_files_of_mosi(tmp_path):
    pytest.importorskip("h5py")
    (tmp_path / "mosi").mkdir()
    write_csd(tmp_path / "mosi" / "CMU_MOSI_Opinion_Labels.csd", {"03bSnISJMiM": ([[2.4], [-1.0]], [[0, 1], [1, 2]])})
    write_csd(tmp_path / "mosi" / "CMU_MOSI_COVAREP.csd", {"03bSnISJMiM": (np.ones((2, 3)), [[0, 1], [1, 2]])})
    dataset, found = build(Request("cmu_mosi", tmp_path / "mosi"), tmp_path / "data")
    assert dataset.manifest.label.kind == "value"
    assert {i: row[1] for i, row in next(iter(found.values())).items()} == {
        "03bSnISJMiM_0": pytest.approx(2.4),
        "03bSnISJMiM_1": -1,
    }


def mosei(folder):
    """Two videos with three segments of two steps each."""
    pytest.importorskip("h5py")
    folder.mkdir()
    segments, steps = [[0, 2], [2, 4], [4, 6]], [[i, i + 1] for i in range(6)]
    labels = np.zeros((3, 7))
    labels[:, 0] = [-1, 0, 1]
    videos = ("9cxlcpbmrH0", "-3g5yACwYnA")
    write_csd(folder / "CMU_MOSEI_Labels.csd", dict.fromkeys(videos, (labels, segments)))
    write_csd(folder / "CMU_MOSEI_COVAREP.csd", dict.fromkeys(videos, (np.array([0, 1, 5, 2, 4, 4.5])[:, None], steps)))
    return folder


def test_csd_pools_as_asked(tmp_path):
    folder = mosei(tmp_path / "mosei")
    for how, expected in (("mean", [0.5, 3.5, 4.25]), ("max", [1, 5, 4.5]), ("last", [1, 2, 4.5])):
        source = formats.open_source(Request("cmu_mosei", folder, pool=how))
        found = [float(e.features["audio"][0]) for e in source.examples("train") if e.group == "-3g5yACwYnA"]
        assert found == expected


def test_csd_leaves_out_the_broken_segments(tmp_path, monkeypatch):
    folder = mosei(tmp_path / "mosei")
    corpus = CORPORA["cmu_mosei"]
    monkeypatch.setitem(corpus.drop, "", corpus.drop[""] | {"9cxlcpbmrH0_1"})
    source = formats.open_source(Request("cmu_mosei", folder))
    ids = [i for a in source.annotations.values() for i in a.ids]
    assert sorted(ids) == ["-3g5yACwYnA_0", "-3g5yACwYnA_1", "-3g5yACwYnA_2", "9cxlcpbmrH0_0", "9cxlcpbmrH0_2"]
    header = "video,start_time,end_time,sentiment,happy,sad,anger,surprise,disgust,fear"
    rows = [f"{v},{s},{s + 2},0,0,0,0,0,0,0" for v in ("9cxlcpbmrH0", "-3g5yACwYnA") for s in (0, 2, 4)]
    table = write(tmp_path / "segments.csv", "\n".join([header, *rows]))
    again = formats.open_source(Request("cmu_mosei", folder, labels=(table,)))
    assert {s: a.ids for s, a in again.annotations.items()} == {s: a.ids for s, a in source.annotations.items()}


def test_two_label_files_of_csd_are_refused_unless_one_is_named(tmp_path):
    folder = mosei(tmp_path / "mosei")
    second = folder / "CMU_MOSEI_Labels_old.csd"
    second.write_bytes((folder / "CMU_MOSEI_Labels.csd").read_bytes())
    message = refusal(formats.open_source, Request("cmu_mosei", folder))
    assert message.startswith("2 label files (")
    assert message.endswith("name one with --labels=FILE.csd")
    source = formats.open_source(Request("cmu_mosei", folder, labels=(second,)))
    assert source.provenance()["label_files"] == ["CMU_MOSEI_Labels_old.csd"]
