"""Labels of clips in the names of their files, and in data frames."""

import dataclasses

import numpy as np
import pyarrow as pa
import pytest

from conclugen_jax.data import data_frames, manifest as manifest_lib
from conclugen_jax.data.requests import Layout, Request
from conclugen_jax.errors import ConclugenError
from conclugen_jax.extract import clips as clips_lib, extraction, listings
from conclugen_jax.extract.backbones import Networks
from tests import clips
from tests.test_clips import touch
from tests.test_extract import OWN, rows_of
from tests.test_listings import extracted, labels_of, placed

RAVDESS = "{modality}-{channel}-{emotion}-{intensity}-{statement}-{repetition}-{actor}"


@pytest.fixture(scope="module")
def clip(tmp_path_factory):
    return clips.write(tmp_path_factory.mktemp("clip") / "a.mkv", clips.steady(1.0), sound=clips.tone(1.0))


def read(source, pattern, **layout):
    request = Request("features", source, name="t", layout=Layout(**layout))
    request, found = listings.by_pattern(request, clips_lib.find("clips", source), pattern)
    return request.layout, found.table, found.facts["notes"]


def test_names_of_ravdess(tmp_path):
    touch(tmp_path, "Actor_12/03-01-05-01-02-01-12.mp4", "Actor_11/03-01-03-02-01-02-11.mp4")
    layout, table, notes = read(tmp_path, RAVDESS)
    assert dict(table.columns) == {
        "id": ["Actor_11_03-01-03-02-01-02-11", "Actor_12_03-01-05-01-02-01-12"],
        "split": ["train", "train"],
        "modality": ["03", "03"],
        "channel": ["01", "01"],
        "emotion": ["03", "05"],
        "intensity": ["02", "01"],
        "statement": ["01", "02"],
        "repetition": ["02", "01"],
        "actor": ["11", "12"],
        "group": ["11", "12"],
    }
    assert (layout.label, notes) == (("emotion",), [f"labels: names of clips as {RAVDESS}"])


def test_folders_and_splits_in_a_pattern(tmp_path):
    touch(tmp_path, "train/joy/anna-1.mp4", "test/sad/b-n.2.mp4")
    layout, table, _ = read(tmp_path, "{label}/{person}-{take}")
    assert [table.columns[name] for name in ("split", "label", "group", "take")] == [
        ["test", "train"],
        ["sad", "joy"],
        ["b", "anna"],
        ["n.2", "1"],
    ]
    assert layout.label == ()  # a column of this name is the label of every table
    assert read(tmp_path, "{split}/{emotion}/{person}-{take}")[1].columns["split"] == ["test", "train"]
    assert read(tmp_path, "{split}/{emotion}/{person}-{take}", kind="none")[0].label == ()
    assert read(tmp_path, "{emotion}/{person}-{take}", label=("take",))[0].label == ("take",)


def test_clips_that_do_not_fit_are_left_out_and_named(tmp_path):
    touch(tmp_path, "anna_joy_1.mp4", "ben_sad_2.mp4", "anna_maria_joy_3.mp4", "intro.mp4", "b/outro.mp4", "labels.csv")
    _, table, notes = read(tmp_path, "{actor}_{emotion}_{take}")
    assert table.columns["id"] == ["anna_joy_1", "ben_sad_2"]
    assert notes[1:] == [
        "skipped, names that do not fit it: 2 clips, such as outro",
        "skipped, names that fit it in several ways: 1 clip, such as anna_maria_joy_3",
        "labels.csv: not read, as --label_pattern says the labels",
    ]
    with pytest.raises(
        ConclugenError,
        match=r"^--label_pattern='\{actor\}-\{take\}' fits no clip; names that do not fit it: 5 clips, such as anna_joy_1; "
        "correct it$",
    ):
        read(tmp_path, "{actor}-{take}")
    with pytest.raises(ConclugenError, match=r"fits no clip; .* fit it in several ways: 3 clips, such as anna_joy_1"):
        read(tmp_path, "{actor}_{emotion}")


def test_text_beside_braces_is_taken_literally(tmp_path):
    touch(tmp_path, "a.b(1)+joy.mp4", "aXb(1)+joy.mp4")
    assert read(tmp_path, "a.b({take})+{emotion}")[1].columns["emotion"] == ["joy"]


@pytest.mark.parametrize(
    ("pattern", "message"),
    {
        "actor": r"expected names in pairs of braces, such as \{actor\}_\{emotion\}_\{take\}$",
        "{actor_{emotion}": "expected names in pairs of braces",
        "{actor}_emotion}": "expected names in pairs of braces",
        "{}_{emotion}": r"\{\} is in braces, expected letters, digits and _$",
        "{a b}_{emotion}": r"\{a b\} is in braces, expected letters",
        "{id}_{emotion}": r"\{id\} is in braces, expected another name, as the id is the clip's path",
        "{actor}_{take}_{actor}": r"\{actor\} is there twice; give each part a name of its own",
        "{actor}{emotion}": r"nothing stands between \{actor\} and \{emotion\}; make them one",
        "{actor}_{Speaker}": "actor and Speaker both name the person; rename one",
    }.items(),
)
def test_patterns_that_cannot_be_read(tmp_path, pattern, message):
    with pytest.raises(ConclugenError, match=f"^--label_pattern='.*': {message}"):
        listings.by_pattern(Request("features", tmp_path), [], pattern)


def test_the_command_takes_a_pattern(clip, tmp_path):
    source = placed(clip, tmp_path / "hub", "anna_joy_1.mkv", "ben_sad_1.mkv", "carl_Joy_1.mkv", "other.mkv")
    pattern = "--label_pattern={actor}_{emotion}_{take}"
    made = extracted(source, tmp_path / "data", pattern, "--targets=take:single")
    assert labels_of(tmp_path / "data") == {
        "train": {"anna_joy_1": "joy", "ben_sad_1": "sad", "carl_Joy_1": "joy"},
    }
    assert "skipped, names that do not fit it: 1 clip, such as other\n" in made.stdout
    assert "emotion: 2 classes (joy, sad)" in made.stdout
    folds = ("--num_folds=3", "--fold=0", "--name=folds")
    extracted(source, tmp_path / "data", pattern, *folds)  # cut over the actors
    assert rows_of(tmp_path / "data" / "folds_fold0of3" / "1.0.0", "test")[0] == ["anna_joy_1"]
    assert "utterances extracted" not in extracted(source, tmp_path / "data", pattern, "--targets=take:single").stdout
    for flags, message in (
        (["--label_pattern={name}_{emotion}_{take}", "--targets=take:single"], "made of other clips or in another way"),
        ([pattern, f"--labels={source}/x.csv"], "--labels says the labels; leave one of them out"),
        ([pattern, "--dataset=caer"], "--label_pattern is for --dataset=clips; leave one of them out"),
        ([pattern, "--label=mood"], "no column 'mood'; it has id, split, actor, emotion, take, group"),
    ):
        assert message in extracted(source, tmp_path / "data", *flags, code=2).stderr


def frame(**columns):
    return pa.table({"id": ["a", "b", "c"], **columns})


def test_a_data_frame_of_labels(clip, tmp_path):
    source = placed(clip, tmp_path / "clips", "a.mkv", "b.mkv", "c.mkv")
    labels = frame(split=["train", "train", "test"], mood=["x", "y", None], group=["1", "2", "3"])
    request = Request("features", source, name="mine", layout=Layout(targets=("mood:single",)))
    found = clips_lib.find("clips", source)
    folder, _ = extraction.extract(request, found, Networks((), OWN), tmp_path, known=labels.slice(0, 2))
    assert rows_of(folder, "train")[0] == ["a", "b"]
    assert manifest_lib.read(folder).targets["mood"].names == ("x", "y")
    with pytest.raises(ConclugenError, match="holds a data set made of other clips or in another way"):
        extraction.extract(
            request, found, Networks((), OWN), tmp_path, known=labels.slice(0, 2).append_column("x", [[1, 2]])
        )
    other = dataclasses.replace(request, name="other")
    folder, _ = extraction.extract(other, found, Networks((), OWN), tmp_path, known=labels)
    assert rows_of(folder, "test")[0] == ["c"]


def test_cells_of_data_frames():
    table = data_frames.labels(frame(Label=[1, 2, None], x=np.array([1.5, np.nan, 2]))).table
    assert table.columns == {"id": ["a", "b", "c"], "label": ["1", "2", ""], "x": ["1.5", "nan", "2.0"]}
    assert table.where[2] == "data frame, row 2"
    kinds = pa.DictionaryArray.from_arrays([1, 0, 1], ["sad", "joy"], ordered=True)
    assert data_frames.labels(frame(label=kinds)).table.classes == {"label": ["sad", "joy"]}
    unordered = pa.DictionaryArray.from_arrays([1, 0, 1], ["sad", "joy"])
    assert data_frames.labels(frame(label=unordered)).table.classes == {}
    with pytest.raises(ConclugenError, match="a dict, expected a data frame of pandas, Polars or Arrow"):
        data_frames.labels({"id": ["a"]})
    with pytest.raises(ConclugenError, match="columns id, label, label; give each a name of its own"):
        data_frames.labels(frame(label=[1, 2, 3], Label=[1, 2, 3]))


def test_data_frames_of_pandas():
    pandas = pytest.importorskip("pandas")
    labels = pandas.DataFrame(
        {"label": pandas.Categorical(["b", "a"], ["b", "a"])}, pandas.Index(["1", "2"], name="id")
    )
    table = data_frames.labels(labels).table
    assert (table.columns, table.classes) == ({"label": ["b", "a"], "id": ["1", "2"]}, {"label": ["b", "a"]})
    with pytest.raises(ConclugenError, match=r"data frame: Arrow cannot take its columns .*; make each of one type"):
        data_frames.labels(pandas.DataFrame({"id": ["a", 1]}))


def test_data_frames_of_polars():
    polars = pytest.importorskip("polars")
    table = data_frames.labels(polars.DataFrame({"id": ["a", "b"], "label": [0.5, None]})).table
    assert table.columns == {"id": ["a", "b"], "label": ["0.5", ""]}
