"""Tables of features as other programs write them: each is read, by its content, to exact vectors."""

import re

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from conclugen_jax.data import formats, wide
from conclugen_jax.data.inspection_view import describe
from conclugen_jax.data.requests import Layout, Request
from conclugen_jax.errors import ConclugenError
from tests.layouts import build, refused

LABELS = "id,label\na,joy\nb,fear\nc,joy\n"
SPLITS = "id,split\na,train\nc,test\n"

FUNCTIONALS = """name;frameTime;F0semitone_amean;loudness_sma3_amean;jitter
'a.wav';0.000000;2.750000e+01;1;3
'clips/b.wav';0.000000;-1.5;2;0
'c';0.000000;0;4;-8
"""
LLD = """name;frameTime;pcm_RMSenergy_sma;F0final_sma
'unknown';0.000000;1;10
'unknown';0.010000;3;30
"""
ARFF = """@relation openSMILE_features

@attribute name string
@attribute frameTime numeric
@attribute pcm_loudness_sma_max numeric
@attribute 'jitter sma' numeric
@attribute class {joy,fear}

@data

% appended by SMILExtract
'a',0.000000,1.000000e+00,5.0,?
'b, too.wav',0.000000,2.0,6.0,?
'c',0.000000,3.0,7.0,joy
"""
LLD_ARFF = """@relation smile

@attribute name string
@attribute frameIndex numeric
@attribute frameTime numeric
@attribute energy numeric
@attribute class numeric

@data

'unknown',0,0.0,1.0,?
'unknown',1,0.01,5.0,?
"""
PYTHON = """file,start,end,F0,loudness
/data/wav/a.wav,0 days 00:00:00,0 days 00:00:03.250000,1.5,2
/data/wav/b.wav,0 days 00:00:00,0 days 00:00:01,2.5,4
"""
PYTHON_LLD = """file,start,end,F0,loudness
wav/a.wav,0 days 00:00:00,0 days 00:00:00.020000,1,2
wav/a.wav,0 days 00:00:00.010000,0 days 00:00:00.030000,3,6
wav/b.wav,0 days 00:00:00,0 days 00:00:00.020000,9,9
"""
OPENFACE = """frame, face_id, timestamp, confidence, success, gaze_0_x, eye_lmk_x_0, eye_lmk_X_0, AU01_r, AU45_c
1, 0, 0.000, 0.98, 1, 0.5, 100.0, -3, 1.00, 0
2, 0, 0.040, 0.03, 0, 9, 9, 9, 9, 9
3, 0, 0.080, 0.98, 1, -nan(ind), 100.0, -3, 1.00, 0
4, 0, 0.120, 0.98, 1, 1.5, 300.0, -1, 2.00, 1
"""
OLD_OPENFACE = """frame, timestamp, confidence, success, AU01_r
1, 0.000, 0.98, 1, 1.0
2, 0.040, 0.98, 1, 2.0
"""
TWO_FACES = """frame, face_id, timestamp, confidence, success, AU01_r
1, 0, 0.000, 0.90, 1, 1.0
1, 1, 0.000, 0.95, 1, 5.0
2, 0, 0.040, 0.90, 1, 3.0
2, 1, 0.040, 0.95, 1, 7.0
3, 2, 0.080, 0.99, 1, 9.0
"""
NO_FACE = """frame, face_id, timestamp, confidence, success, AU01_r
1, 0, 0.000, 0, 0, 0
2, 0, 0.040, 0, 0, 0
"""
IMAGE = "face, confidence, AU01_r\n0, 0.7, 1.0\n1, 0.9, 2.0\n"
PANDAS = "id,f0,f1\na,1,2\nb,3,4.5\nc,,\n"
PANDAS_INDEX = ",f0,f1\na,1,2\nb,3,4.5\n"
NUMBERED_INDEX = "Unnamed: 0,id,0,1\n0,a,1,2\n1,b,3,4.5\n"
EXCEL = "sep=;\nid;f0;f1\na;1,5;2\nb;3;4,5\n"
MANY = "clip," + ",".join(f"v{chr(97 + i)}" for i in range(9)) + "\na," + ",".join("123456789") + "\n"

MEMBERS = {  # file (in a folder, one clip) -> content, and the vector of each clip
    "opensmile functionals": ({"m.csv": FUNCTIONALS}, {"a": [27.5, 1, 3], "b": [-1.5, 2, 0], "c": [0, 4, -8]}),
    "opensmile arff": ({"m.arff": ARFF.replace("b, too", "b")}, {"a": [1, 5], "b": [2, 6], "c": [3, 7]}),
    "opensmile lld": ({"m/a.csv": LLD, "m/b.csv": LLD.replace("30", "50")}, {"a": [2, 20], "b": [2, 30]}),
    "opensmile lld arff": ({"m/a.arff": LLD_ARFF}, {"a": [3]}),
    "opensmile lld in splits": (
        {"m/train/a.csv": LLD, "m/test/c.csv": LLD, "labels.csv": SPLITS},
        {"a": [2, 20], "c": [2, 20]},
    ),
    "opensmile in python": ({"m.csv": PYTHON}, {"a": [1.5, 2], "b": [2.5, 4]}),
    "opensmile lld in python": ({"m.csv": PYTHON_LLD}, {"a": [2, 4], "b": [9, 9]}),
    "openface": ({"m/a.csv": OPENFACE, "m/a_of_details.txt": "Input:a.mp4"}, {"a": [1, 200, -2, 1.5, 0.5]}),
    "openface 1": ({"m/a.csv": OLD_OPENFACE}, {"a": [1.5]}),
    "openface, two faces": ({"m/a.csv": TWO_FACES}, {"a": [6]}),
    "openface, image": ({"m/a.csv": IMAGE}, {"a": [2]}),
    "openface, faces without number": (
        {"m/a.csv": re.sub(r"(?m)^\d", "", OLD_OPENFACE.replace("frame,", "face_id,"))},
        {"a": [1.5]},
    ),
    "openface, no rows": ({"m/a.csv": NO_FACE.partition("\n")[0] + "\n", "m/b.csv": TWO_FACES}, {"b": [6]}),
    "openface, no face": ({"m/a.csv": TWO_FACES, "m/b.csv": NO_FACE}, {"a": [6]}),
    "pandas": ({"m.csv": PANDAS}, {"a": [1, 2], "b": [3, 4.5]}),
    "pandas, index": ({"m.csv": PANDAS_INDEX}, {"a": [1, 2], "b": [3, 4.5]}),
    "pandas, numbered index": ({"m.csv": NUMBERED_INDEX}, {"a": [1, 2], "b": [3, 4.5]}),
    "tabs": ({"m.tsv": PANDAS.replace(",", "\t")}, {"a": [1, 2], "b": [3, 4.5]}),
    "excel": ({"m.csv": EXCEL}, {"a": [1.5, 2], "b": [3, 4.5]}),
    "windows": ({"m.csv": "\ufeff" + PANDAS.replace("\n", "\r\n")}, {"a": [1, 2], "b": [3, 4.5]}),
    "many columns with names": ({"m.csv": MANY}, {"a": [1, 2, 3, 4, 5, 6, 7, 8, 9]}),
    "savetxt": ({"m/a.csv": "1.0e0,2\n3,4\n", "m/b.csv": "5,6\n"}, {"a": [2, 3], "b": [5, 6]}),
}


def write(folder, files):
    for name, content in files.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(content, newline="")
    return folder


def vectors(dataset_and_rows):
    """Clip -> modality -> vector of what was built."""
    return {clip: dict(row[0]) for rows in dataset_and_rows[1].values() for clip, row in rows.items()}


@pytest.mark.parametrize("name", MEMBERS)
def test_tables_of_other_programs_are_read_to_exact_vectors(tmp_path, name):
    files, expected = MEMBERS[name]
    source = write(tmp_path / "t", {"labels.csv": LABELS} | files)
    built = vectors(build(Request("features", source, name="t"), tmp_path / "data", drop_bad=True))
    assert {clip: row["m"].tolist() for clip, row in built.items()} == expected
    where = source / next(iter(files)).partition("/")[0]
    labels = (source / "labels.csv",)
    named = Request("features", None, name="u", modalities={"x": str(where)}, labels=labels)  # the same, if it is named
    assert {
        c: row["x"].tolist() for c, row in vectors(build(named, tmp_path / "data", drop_bad=True)).items()
    } == expected


@pytest.mark.parametrize("index", [None, "__index_level_0__", "id"])
def test_parquet_with_a_column_per_feature(tmp_path, index):
    columns = {"f0": [1.0, 3.0], "f1": [2, None], "note": ["x", "y"]}
    pq.write_table(pa.table({index or "name": ["a", "b"], **columns}), tmp_path / "m.parquet")
    source = Request("features", tmp_path / "m.parquet", name="t")
    dataset, rows = build(source, tmp_path / "data", drop_bad=True)
    assert rows["train"]["a"][0]["features"].tolist() == [1, 2]
    assert list(rows["train"]) == ["a"]  # NaN in a vector is bad, as in a matrix
    assert f"features: 2 columns (f0 to f1), clips named by column '{index or 'name'}'; not features: note" in describe(
        dataset.path
    )


@pytest.mark.parametrize("ending", ["csv", "parquet"])
def test_one_table_of_features_and_labels(tmp_path, ending):
    columns = {"id": list("abc"), "split": ["train", "train", "test"], "label": ["1", "0", "1"]}
    columns |= {"f0": [1, 2, 3], "f1": [4, 5, 6], "arousal": [0.5, 0.25, 1]}
    path = tmp_path / f"m.{ending}"
    if ending == "csv":
        rows = [",".join(map(str, row)) for row in zip(*columns.values(), strict=True)]
        path.write_text("\n".join([",".join(columns), *rows]))
    else:
        pq.write_table(pa.table(columns), path)
    dataset, rows = build(Request("features", path, name="t", layout=Layout(targets=("arousal",))), tmp_path / "data")
    assert dataset.manifest.label.names == ("0", "1")
    assert list(dataset.manifest.targets) == ["arousal"]
    assert {clip: (f["features"].tolist(), label) for clip, (f, label, _) in rows["train"].items()} == {
        "a": ([1, 4], 1),
        "b": ([2, 5], 0),
    }


@pytest.mark.parametrize("ending", ["csv", "parquet"])
@pytest.mark.parametrize("column", ["split", "group", "label", "arousal"])
def test_rows_of_a_clip_that_differ_in_a_label_are_refused(tmp_path, ending, column):
    cells = {"id": list("abab"), "split": ["train"] * 4, "group": ["p"] * 4, "label": ["x"] * 4, "arousal": ["1.5"] * 4}
    cells[column] = [*cells[column][:3], "2.5"]
    cells |= {"f0": [1, 2, 3, 4], "f1": [4, 5, 6, 7]}
    path = tmp_path / f"m.{ending}"
    if ending == "csv":
        path.write_text(
            "\n".join([",".join(cells), *(",".join(map(str, r)) for r in zip(*cells.values(), strict=True))])
        )
    else:
        pq.write_table(pa.table(cells), path)
    fault = (
        rf"row 3: {column} of clip 'b' is '2.5', but '{cells[column][1]}' in row 1; correct it, or give each row an id"
    )
    refused(fault, path, layout=Layout(targets=("arousal",)))


def test_rows_of_empty_cells_are_skipped_and_counted(tmp_path):
    header, *rows = PANDAS.splitlines()
    odd = "\r\n".join([header, rows[0], ",,", *rows[1:], "", ", ,"])
    source = write(tmp_path / "t", {"m.csv": PANDAS, "n.csv": odd, "labels.csv": "id\na\nb\n"})
    dataset, rows = build(Request("features", source, name="t"), tmp_path / "data")
    assert all(vectors["m"].tolist() == vectors["n"].tolist() for vectors, *_ in rows["train"].values())
    assert "clips named by column 'id'; rows of empty cells that are skipped: 2" in " ".join(describe(dataset.path))


def test_what_was_understood_and_left_out_is_said(tmp_path):
    source = write(tmp_path / "t", {"face/a.csv": OPENFACE, "face/b.csv": OPENFACE.replace(" 1, ", " 0, ")})
    write(source, {"voice.csv": FUNCTIONALS, "labels.csv": LABELS})
    dataset, _ = build(Request("features", source, name="t"), tmp_path / "data", num_workers=2)
    said = describe(dataset.path)
    for line in (
        "frames of face that were dropped (success=0): 5",
        "frames of face that were dropped (NaN): 1",
        "face: 5 columns (gaze_0_x to AU45_c), one .csv file for each clip; not features: frame, timestamp",
        "voice: 3 columns (F0semitone_amean to jitter), clips named by column 'name'; not features: frameTime",
        "face is missing in train 2",
    ):
        assert line in said
    source = write(tmp_path / "two", {"m/a.csv": TWO_FACES, "labels.csv": LABELS})
    dataset, _ = build(Request("features", source, name="two"), tmp_path / "data", drop_bad=True)
    assert "frames of m that were dropped (another_face): 3" in describe(dataset.path)
    source = write(tmp_path / "f", {f"m/{clip}.csv": OPENFACE for clip in "abc"})
    write(source, {"labels.csv": "id,group\na,1\nb,2\nc,3\n"})
    dataset, _ = build(Request("features", source, name="f", folds=(3, 0)), tmp_path / "data")
    assert "frames of m that were dropped (success=0): 3" in describe(dataset.path)


@pytest.mark.parametrize(
    ("paths", "expected"),
    [
        (["/x/a.wav", "/x/b.WAV"], ["a", "b"]),
        (["anna/001.wav", "ben/001.wav"], ["anna/001", "ben/001"]),
        (["/x/anna/001.wav", "/x/ben/001.wav", "/x/ben/002.wav"], ["anna/001", "ben/001", "ben/002"]),
        (["d/train/a.mp4", "d/test/a.mp4", "d/dev/b.mp4"], ["train/a", "test/a", "dev/b"]),
        (["/data/train/a.wav", "/data/train/b.wav"], ["a", "b"]),
        (["S1.E2", "S1.E3"], ["S1.E2", "S1.E3"]),
        (["a.m2ts", "b.Jpeg", "c.mp4.txt", "d"], ["a", "b", "c.mp4.txt", "d"]),
        (["C:\\x\\a.wav", "C:\\x\\b.wav", "C:\\x\\a.wav"], ["a", "b", "a"]),
        ([], []),
    ],
)
def test_names_of_clips_in_columns_of_files(paths, expected):
    assert wide.clip_names(paths) == expected


def test_tables_that_are_no_features_are_not_taken_for_such(tmp_path):
    words = "start,end,text\n0,1,hello there\n"
    ratings = "id,arousal,valence\na,1,2\n"
    meld = "Utterance,Emotion,Dialogue_ID,Utterance_ID\nhi,joy,0,0\n"
    sentiment = (
        "video,start_time,end_time,sentiment,happy,sad,anger,surprise,disgust,fear,a1,a2\nv,0,1,2,0,0,0,0,0,0,1,1\n"
    )
    tables = {"words/a.csv": words, "ratings.csv": ratings, "meld.csv": meld, "mosei.csv": sentiment, "empty.csv": ""}
    source = write(tmp_path / "t", tables | {"m.csv": PANDAS, "labels.csv": LABELS})
    opened = formats.open_source(Request("features", source, name="t"))
    assert opened.spec.modalities == {"m": 2}
    assert opened.provenance()["passed_over"] == ["empty.csv", "meld.csv", "mosei.csv", "ratings.csv", "words"]
    named = Request("features", source, name="t", modalities={"r": str(source / "ratings.csv")})
    assert formats.open_source(named).spec.modalities == {"m": 2, "r": 2}  # named, it is one


@pytest.mark.parametrize(
    ("files", "message"),
    [
        (
            {"m/a.csv": LLD, "m/b.csv": LLD.replace("F0final_sma", "F1")},
            r"b.csv: no column 'F0final_sma'; it has name,",
        ),
        ({"m/a.csv": LLD, "m/b.csv": LLD.replace("3;30", "3;x")}, r"b.csv: cannot be read.*'F0final_sma'.*Row #2.*'x'"),
        (
            {"m/a.csv": FUNCTIONALS},
            r"a.csv: rows of 3 clips, such as 'a' and 'b'; name the file itself with --modality",
        ),
        (
            {"m.csv": LLD},
            r"m.csv: all clips are called 'unknown'; name them with SMILExtract -instname NAME, or, if each file",
        ),
        ({"m.csv": PANDAS.replace("f1", "f0")}, r"m.csv: column 'f0' appears twice"),
        ({"m.arff": ARFF.partition("@data")[0]}, r"m.arff: no @data below lines @attribute NAME TYPE"),
        ({"m.arff": ARFF + "'d',1\n"}, r"m.arff: cannot be read as a table \(.*Expected 5 columns, got 2"),
        ({"m.csv": PANDAS, "m/a.csv": LLD}, r"m.csv: is next to other features called m; rename one of them"),
        (
            {"m.csv": "f0,f1\n1,2\n"},
            r"m.csv: no column names the clips of its rows; call that column id, or, .*NAME=\S*/t instead of --source$",
        ),
        ({"m.csv": PANDAS.replace("3,4.5", "3")}, r"m.csv: cannot be read as a table \(.*Expected 3 columns, got 2"),
    ],
)
def test_tables_that_cannot_be_read_are_refused_in_a_sentence(tmp_path, files, message):
    source = write(tmp_path / "t", files | {"labels.csv": LABELS})
    request = Request(
        "features", source, name="t", modalities={"m": str(source / "m.arff")} if "m.arff" in files else {}
    )
    with pytest.raises(ConclugenError, match=message) as e:
        build(request, tmp_path / "data", drop_bad=True)
    assert "\n" not in str(e.value)


def test_a_table_without_its_header_is_refused(tmp_path):
    source = write(
        tmp_path / "t", {"m/a.csv": LLD.partition("\n")[2].replace("0.000000", "0.010000"), "labels.csv": LABELS}
    )
    message = r"a.csv: its first line holds numbers such as '0.010000', not names; write the table with its header"
    refused(message, source, modalities={"m": f"{source}/m"})


def test_features_named_but_of_no_kind(tmp_path):
    source = write(tmp_path / "t", {"words.csv": "id,word\na,x\n", "notes.doc": "x", "labels.csv": LABELS})
    refused(
        r"words.csv: no column of numbers beside those of names and times; it has id, word",
        source,
        modalities={"m": f"{source}/words.csv"},
    )
    refused(
        "expected a folder, FILE.npy, FILE.csv, FILE.arff, FILE.npz:ARRAY",
        source,
        modalities={"m": f"{source}/notes.doc"},
    )


def test_rows_that_are_taken_for_frames_are_said(tmp_path):
    source = write(tmp_path / "t", {"m.csv": PANDAS + "a,3,6\n", "labels.csv": LABELS})
    dataset, rows = build(Request("features", source, name="t"), tmp_path / "data", drop_bad=True)
    assert rows["train"]["a"][0]["m"].tolist() == [2, 4]
    assert "m: 2 columns (f0 to f1), clips named by column 'id', 4 rows are frames of 3 clips" in describe(dataset.path)


@pytest.mark.parametrize(
    ("table", "said"),
    [(",id,f0\n0,a,1\n1,b,2\n", "m: 1 column (f0), clips"), (PANDAS_INDEX, "m: 2 columns (f0 to f1), clips")],
)
def test_an_index_without_name_is_not_listed(tmp_path, table, said):
    source = write(tmp_path / "t", {"m.csv": table, "labels.csv": LABELS})
    dataset, _ = build(Request("features", source, name="t"), tmp_path / "data", drop_bad=True)
    (line,) = [line for line in describe(dataset.path) if line.startswith("m: ")]
    assert line.startswith(said)
    assert "not features" not in line


def test_parquet_of_the_python_package_of_opensmile(tmp_path):
    times = pa.array([0, 1, 0], pa.duration("ns"))
    columns = {
        "file": ["x/a.wav", "x/a.wav", "x/b.wav"],
        "start": times,
        "end": times,
        "F0": [1.0, 3, 5],
        "HNR": [2.0, 4, 6],
    }
    pq.write_table(pa.table(columns), tmp_path / "m.parquet")
    labels = write(tmp_path, {"labels.csv": LABELS}) / "labels.csv"
    request = Request("features", None, name="t", modalities={"m": str(tmp_path / "m.parquet")}, labels=(labels,))
    rows = vectors(build(request, tmp_path / "data", drop_bad=True))
    assert {clip: row["m"].tolist() for clip, row in rows.items()} == {"a": [2, 3], "b": [5, 6]}


def test_names_that_are_no_text_are_refused(tmp_path):
    ends = pa.py_buffer(np.array([0, 1, 2], np.int32).tobytes())
    names = pa.StringArray.from_buffers(2, ends, pa.py_buffer(b"\xe4b"))
    pq.write_table(pa.table({"id": names, "f0": [1.0, 2]}), tmp_path / "m.parquet")
    refused(r"m.parquet: column 'id' is no text in UTF-8|m.parquet, id, row 0: no Unicode text", tmp_path / "m.parquet")


def test_means_are_those_of_numpy(tmp_path):
    x = np.random.default_rng(0).normal(size=(40, 30)).astype(np.float32)
    lines = ["frameTime," + ",".join(f"f{i}" for i in range(30))]
    lines += [",".join(map(repr, [i / 100, *row])) for i, row in enumerate(x.tolist())]
    source = write(tmp_path / "t", {"m/a.csv": "\n".join(lines), "labels.csv": LABELS})
    for how, expected in (("mean", x.mean(0, dtype=np.float64).astype(np.float32)), ("max", x.max(0)), ("last", x[-1])):
        request = Request("features", source, name=f"t_{how}", pool=how)
        found = vectors(build(request, tmp_path / "data", drop_bad=True))["a"]["m"]
        np.testing.assert_array_equal(found, expected)


@pytest.mark.parametrize("number", [wide.FEW, wide.FEW + 1])
def test_how_many_columns_could_be_ratings(tmp_path, number):
    names = [f"rating_{chr(97 + i)}" for i in range(number)]
    path = write(tmp_path, {"m.csv": f"id,{','.join(names)}\na,{','.join('1' * number)}\n"}) / "m.csv"
    assert wide.holds_features(path) == (number > wide.FEW)


def test_what_counts_of_rows_that_are_frames_and_of_others(tmp_path):
    frames = "clip,frame,success,confidence,f0,f1\na,1,0,0.1,5,6\nb,1,1,0.9,3,4\n"  # one row a clip
    source = write(tmp_path / "t", {"m.csv": frames, "n.csv": PANDAS.replace("c,,", "c,7,"), "labels.csv": LABELS})
    request = Request("features", source, name="t", only=("m", "n"))
    clips = {e.id: (e.features, e.left_out) for e in formats.open_source(request).examples("train")}
    assert {clip: dict(gone) for clip, (_, gone) in clips.items()} == {"a": {"m success=0": 1}, "b": {}, "c": {}}
    assert {clip: "m" in features for clip, (features, _) in clips.items()} == {"a": False, "b": True, "c": False}
    np.testing.assert_array_equal(clips["c"][0]["n"], [7, np.nan])  # a row that is no frame is kept, and refused later
