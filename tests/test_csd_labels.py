"""Labels of the CMU-MultimodalSDK: standard folds, label sequences and tables, every refusal, the published tables."""

import csv
import re
from collections import Counter
from pathlib import Path

import numpy as np
import pytest

from conclugen_jax.data.cells import read_csv
from conclugen_jax.data.importers import csd
from conclugen_jax.data.importers.csd import read_folds, read_labels
from conclugen_jax.errors import ConclugenError
from tests.test_csd import DIGITS, SECONDS, SHARED, TEST, TRAIN, VALIDATION, write_csd, write_labels

MOSEI_TABLES = sorted((SHARED / "cmu_mosei_labels").glob("*.csv"))


def read_label_csv(paths, corpus, **options):
    tables = [read_csv(path) for path in ([paths] if isinstance(paths, Path) else paths)]
    return read_labels(tables, corpus, **options)


def write_table(path, rows, header="video,start_time,end_time,sentiment,happy,sad,anger,surprise,disgust,fear,text"):
    path.write_text("\n".join([header, *rows]) + "\n", encoding="utf-8")
    return path


@pytest.mark.parametrize(
    ("corpus", "counts"),
    [
        ("cmu_mosei", {"train": 2249, "validation": 300, "test": 678}),
        ("cmu_mosi", {"train": 52, "validation": 10, "test": 31}),
    ],
)
def test_folds_are_the_standard_ones(corpus, counts):
    folds = read_folds(corpus)
    assert Counter(folds.values()) == counts
    assert all(type(video) is str and video for video in folds)


def test_folds_keep_ids_of_digits_and_dashes_as_text():
    folds = read_folds("cmu_mosei")
    assert folds[DIGITS] == "train"
    assert folds["-3g5yACwYnA"] == "train"
    assert sum(video.isdigit() for video in folds) > 100
    with pytest.raises(ConclugenError, match=r"corpus 'iemocap' .* cmu_mosei, cmu_mosi"):
        read_folds("iemocap")


def test_labels_of_mosei(tmp_path):
    rows = np.array([[1.5, 0.33, 0, 0, 0, 0, 3], [-3, 0, 1, 0, 2, 0, 0], [0, 0, 0, 0, 0, 0, 0]])
    entries = {
        TEST: (rows[:1], [[-0.4, 3.2]]),
        DIGITS: (rows[1:2], [[0, 5]]),
        TRAIN: (rows, [[8, 14], [0, 5], [20, 21]]),
        "not_in_a_fold": (rows[:2], [[0, 1], [1, 2]]),
    }
    splits, outside = read_labels(write_csd(tmp_path / "labels.csd", entries, root="All Labels"), "cmu_mosei")
    assert outside == 2
    assert list(splits) == ["train", "test"]
    train = splits["train"]
    assert train.ids == [f"{TRAIN}_0", f"{TRAIN}_1", f"{TRAIN}_2", f"{DIGITS}_0"]
    assert train.groups == [TRAIN] * 3 + [DIGITS]
    assert train.keys == [(TRAIN, 8.0, 14.0, 0), (TRAIN, 0.0, 5.0, 1), (TRAIN, 20.0, 21.0, 2), (DIGITS, 0.0, 5.0, 0)]
    none, sad_and_surprised = [0] * 6, [0, 1, 0, 1, 0, 0]
    np.testing.assert_array_equal(train.label, [[1, 0, 0, 0, 0, 1], sad_and_surprised, none, sad_and_surprised])
    np.testing.assert_array_equal(train.targets["sentiment"], np.float32([1.5, -3, 0, -3]))
    assert train.label.dtype == train.targets["sentiment"].dtype == np.float32
    assert csd.EMOTIONS[1::2] == ("sad", "surprise", "fear")
    assert splits["test"].keys == [(TEST, -0.4, 3.2, 0)]


def test_labels_of_mosi(tmp_path):
    path = write_labels(tmp_path / "labels.csd", {"03bSnISJMiM": 3}, width=1)
    splits, outside = read_labels(path, "cmu_mosi")
    assert (list(splits), outside) == (["train"], 0)
    np.testing.assert_array_equal(splits["train"].label, np.float32([0, 0.25, 0.5]))
    assert splits["train"].label.dtype == np.float32
    assert splits["train"].targets == {}


def test_more_than_ten_rows_stay_in_the_order_of_rows(tmp_path):
    path = write_labels(tmp_path / "labels.csd", {TRAIN: 12})
    train = read_labels(path, "cmu_mosei")[0]["train"]
    assert [key[3] for key in train.keys] == list(range(12))
    np.testing.assert_array_equal(train.targets["sentiment"], np.arange(12) / 4)


def test_dropped_ids_leave_the_other_row_numbers_alone(tmp_path):
    path = write_labels(tmp_path / "labels.csd", {TRAIN: 3, VALIDATION: 1})
    splits, outside = read_labels(path, "cmu_mosei", drop={f"{TRAIN}_1", f"{VALIDATION}_0", "absent_4"})
    assert outside == 0
    assert list(splits) == ["train"]
    assert splits["train"].ids == [f"{TRAIN}_0", f"{TRAIN}_2"]
    np.testing.assert_array_equal(splits["train"].targets["sentiment"], [0, 0.5])


def test_label_table_gives_the_same_as_the_label_sequence(tmp_path):
    zeros = ",0" * 5
    tables = [
        write_table(
            tmp_path / "b.csv",
            [f'{TRAIN},8,14,1.5,0.33{zeros},"one, two"', f"else,0,1,0,0{zeros},x", f"{TRAIN},0,5,-3,0{zeros},"],
        ),
        write_table(tmp_path / "a.csv", [f"{DIGITS},0.5,5,0,1{zeros},y", f"{TRAIN},20,21,2,0{zeros},z"]),
    ]
    raw = tables[1].read_bytes()
    tables[1].write_bytes(b"\xef\xbb\xbf" + raw)  # as Excel writes it
    one = [1.5, 0.33, 0, 0, 0, 0, 0], [-3] + [0] * 6, [2] + [0] * 6
    entries = {
        TRAIN: (one, [[8, 14], [0, 5], [20, 21]]),
        DIGITS: ([[0, 1] + [0] * 5], [[0.5, 5]]),
        "else": ([[0] * 7], [[0, 1]]),
    }
    expected, outside = read_labels(write_csd(tmp_path / "labels.csd", entries), "cmu_mosei")
    actual, left_out = read_label_csv(tables, "cmu_mosei")
    assert left_out == outside == 1
    assert actual.keys() == expected.keys() == {"train"}
    a, e = actual["train"], expected["train"]
    assert (a.ids, a.groups, a.keys) == (e.ids, e.groups, e.keys)
    np.testing.assert_array_equal(a.label, e.label)
    np.testing.assert_array_equal(a.targets["sentiment"], e.targets["sentiment"])
    assert read_label_csv(tables[1], "cmu_mosei", drop=[f"{DIGITS}_0"])[0]["train"].ids == [f"{TRAIN}_0"]


def test_label_table_columns_are_found_by_name(tmp_path):
    path = write_table(
        tmp_path / "t.csv", ["2,03bSnISJMiM,x,1,-1.5"], header="end_time,video,text,start_time,sentiment"
    )
    train = read_label_csv(path, "cmu_mosi")[0]["train"]
    assert train.keys == [("03bSnISJMiM", 1.0, 2.0, 0)]
    np.testing.assert_array_equal(train.label, [-1.5])


def test_labels_of_the_wrong_width_are_refused(tmp_path):
    seven = write_labels(tmp_path / "7.csd", {"03bSnISJMiM": 2})
    with pytest.raises(ConclugenError, match=r"video '03bSnISJMiM': label rows of width 7, those of the corpus have 1"):
        read_labels(seven, "cmu_mosi")
    six = write_labels(tmp_path / "6.csd", {TRAIN: 2}, width=6)
    with pytest.raises(ConclugenError, match=r"width 6, those of the corpus have 7 \(sentiment, happy, sad, anger"):
        read_labels(six, "cmu_mosei")


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf, 1e300, 3.01, -0.01])
def test_labels_must_be_in_their_range(tmp_path, value):
    rows = np.zeros((3, 7))
    rows[1, 4] = value
    path = write_csd(tmp_path / "x.csd", {TRAIN: (rows, SECONDS[:3])}, dtype=np.float64)
    expected = re.escape(f"video '{TRAIN}', label row 1: surprise {value!r}, expected a number from 0 to 3")
    with pytest.raises(ConclugenError, match=expected):
        read_labels(path, "cmu_mosei")


@pytest.mark.parametrize("value", [-3.01, 3.01])
def test_sentiment_must_be_in_its_range(tmp_path, value):
    rows = np.array([[-3.0], [3.0], [value]])
    path = write_csd(tmp_path / "x.csd", {"03bSnISJMiM": (rows, SECONDS[:3])}, dtype=np.float64)
    with pytest.raises(ConclugenError, match=f"label row 2: sentiment {value}, expected a number from -3 to 3"):
        read_labels(path, "cmu_mosi")


def test_labels_of_another_corpus_are_refused(tmp_path):
    path = write_labels(tmp_path / "x.csd", {"elsewhere": 3, f"{TRAIN}[0]": 1})
    with pytest.raises(ConclugenError, match=r"standard folds of cmu_mosei, 4 of others; .* not aligned"):
        read_labels(path, "cmu_mosei")
    with pytest.raises(ConclugenError, match="corpus 'pom' has no standard folds"):
        read_labels(path, "pom")


@pytest.mark.parametrize(
    ("row", "message"),
    [
        (f"{TRAIN},0,1,x,0,0,0,0,0,0,", "line 2: sentiment 'x', expected a number from -3 to 3"),
        (f"{TRAIN},0,1,0,0,0,0,0,0,nan,", "line 2: fear 'nan', expected a number from 0 to 3"),
        (f"{TRAIN},,1,0,0,0,0,0,0,0,", "line 2: start_time '', expected a finite number"),
        (f"{TRAIN},0,1,1e39,0,0,0,0,0,0,", "line 2: sentiment '1e39', expected a number from -3 to 3"),
        (f"{TRAIN},0,1,0,0,0,-1,0,0,0,", "line 2: anger '-1', expected a number from 0 to 3"),
        (f"{TRAIN},2,1,0,0,0,0,0,0,0,", "line 2: ends at 1.0 s, before its start at 2.0 s"),
        (f"{TRAIN},0,1,0,0,0,0,0,0,0,one, two", "line 2: 12 cells, the header has 11"),
        ("elsewhere,0,1,0,0,0,0,0,0,0,", "no rows of videos in the standard folds of cmu_mosei, 1 of others"),
    ],
)
def test_faulty_rows_of_tables_are_refused_by_line(tmp_path, row, message):
    with pytest.raises(ConclugenError, match=f"t\\.csv(, |: ){re.escape(message)}"):
        read_label_csv(write_table(tmp_path / "t.csv", [row]), "cmu_mosei")


def test_tables_without_the_columns_are_refused(tmp_path):
    path = write_table(tmp_path / "t.csv", [f"{TRAIN},0,1,0"], header="video,start_time,end_time,sentiment")
    with pytest.raises(ConclugenError, match="no column 'happy'; it has video, start_time, end_time, sentiment"):
        read_label_csv(path, "cmu_mosei")
    with pytest.raises(ConclugenError, match=r"none\.csv"):
        read_label_csv(tmp_path / "none.csv", "cmu_mosei")


@pytest.mark.skipif(len(MOSEI_TABLES) != 2, reason="no label tables of CMU-MOSEI beside the repository")
def test_published_label_tables_of_mosei():
    splits, outside = read_label_csv(MOSEI_TABLES, "cmu_mosei")
    assert outside == 0
    assert {split: len(a.ids) for split, a in splits.items()} == {"validation": 1861, "test": 4653}
    assert splits["validation"].label.sum(axis=0).tolist() == [1003, 517, 337, 200, 280, 174]
    assert splits["test"].label.sum(axis=0).tolist() == [2501, 1129, 1071, 440, 805, 385]
    for annotations in splits.values():
        assert len(set(annotations.ids)) == len(annotations.ids)
        assert np.abs(annotations.targets["sentiment"]).max() == 3
    with MOSEI_TABLES[0].open(encoding="utf-8", newline="") as file:
        row = next(csv.DictReader(file))
    key = (row["video"], float(row["start_time"]), float(row["end_time"]), 0)
    assert key in splits["test"].keys
