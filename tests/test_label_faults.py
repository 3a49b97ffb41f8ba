"""Labels that are wrong or hard to read: ranges, cells, several files, splits and folds; each ends in one sentence."""

import numpy as np
import pytest

from conclugen_jax.data import formats, records, sources
from conclugen_jax.data.corpora import CORPORA
from conclugen_jax.data.requests import Layout, Request
from conclugen_jax.data.sources import Annotations, DatasetSpec, Example, LabelSpec
from conclugen_jax.errors import ConclugenError
from tests.layouts import build, save

EMOTIONS = ",".join(CORPORA["cmu_mosei"].label.names)
TABLES = {
    "cmu_mosei": f"id,split,group,sentiment,{EMOTIONS}",
    "cmu_mosi": "id,split,group,sentiment",
    "meld": "id,split,group,sentiment,label",
    "caer": "id,split,group,label",
}
"""Headers of labels.csv."""


def open_table(folder, content, *, ids="abc", file="labels.csv", dataset="features", **more):
    """Open ``labels.csv`` beside a matrix of features; ``content`` is text or bytes."""
    folder.mkdir(exist_ok=True)
    np.save(folder / "x.npy", np.ones((len(ids), 2), np.float32))
    (folder / "x.txt").write_text("\n".join(ids))
    (folder / file).write_bytes(content if isinstance(content, bytes) else content.encode())
    more = {"name": "mine"} | more if dataset == "features" else more
    return formats.open_source(Request(dataset, folder, **more))


def refusal(call, *args, **kwargs):
    """The sentence that a call ends in."""
    with pytest.raises(ConclugenError) as e:
        call(*args, **kwargs)
    assert "\n" not in str(e.value)
    return str(e.value)


# Ranges


@pytest.mark.parametrize("value", ["3.01", "-3.01", "1e39", "inf", "9" * 5000])
@pytest.mark.parametrize("dataset", ["cmu_mosei", "cmu_mosi"])
def test_sentiment_outside_its_range_is_refused_by_line(tmp_path, dataset, value):
    rest = ",0" * 6 if dataset == "cmu_mosei" else ""
    table = f"{TABLES[dataset]}\na,train,g,-3{rest}\nb,train,g,3{rest}\nc,train,g,{{}}{rest}\n"
    assert len(open_table(tmp_path, table.format("-0.5"), dataset=dataset).annotations["train"].ids) == 3
    message = refusal(open_table, tmp_path, table.format(value), dataset=dataset)
    assert message.endswith(
        f"labels.csv, line 4: sentiment {value[:100]!r}, expected a number from -3 to 3; correct it"
    )


@pytest.mark.parametrize("value", ["-0.1", "3.1", "1e39", "", "nan", "yes"])
def test_emotions_outside_their_range_are_refused_by_line(tmp_path, value):
    message = refusal(
        open_table, tmp_path, f"{TABLES['cmu_mosei']}\na,train,g,0,0,{value},3,0,0,0\n", ids="a", dataset="cmu_mosei"
    )
    assert f"line 2: sadness {value!r}, expected a number from 0 to 3" in message


def test_any_emotion_above_zero_is_present(tmp_path):
    table = f"{TABLES['cmu_mosei']}\na,train,g,0,0,0.33,3,1e-9,0,0\n"
    train = open_table(tmp_path, table, ids="a", dataset="cmu_mosei").annotations["train"]
    np.testing.assert_array_equal(train.label, [[0, 1, 1, 1, 0, 0]])


YAML = {
    ("cmu_mosei", "emotions: [0, 0, 3.5, 0, 0, 0], sentiment: 0"): "anger '3.5', expected a number from 0 to 3",
    ("cmu_mosei", "emotions: [0, 0, -1, 0, 0, 0], sentiment: 0"): "anger '-1', expected a number from 0 to 3",
    ("cmu_mosei", "emotions: [0, 0, [], 0, 0, 0], sentiment: 0"): "anger is a list, expected text or a number",
    ("cmu_mosei", "emotions: [0, 0, 3, 0, 0, 0], sentiment: -4"): "sentiment '-4', expected a number from -3 to 3",
    ("cmu_mosei", "emotions: [0, 0, 3, 0, 0, 0], sentiment: 1e39"): "sentiment '1e39', expected a number from -3 to 3",
    ("cmu_mosei", "emotions: [0, 0, 3], sentiment: 0"): "3 emotions, expected 6: happiness, sadness",
    ("cmu_mosi", "sentiment: 3.2"): "sentiment '3.2', expected a number from -3 to 3",
    ("meld", "emotions: 7"): "emotion '7', expected one of the classes neutral",
    ("meld", "emotions: 0.5"): "emotion '0.5', expected one of the classes neutral",
    ("meld", f"emotions: {'1' * 5000}"): f"emotion '{'1' * 100}', expected one of the classes neutral",
    ("meld", "emotions: 1, sentiment: -2"): "sentiment '-2 (not -1, 0 or 1)', expected one of the classes negative",
}


@pytest.mark.parametrize(("dataset", "fields"), YAML)
def test_labels_of_the_authors_annotations_have_the_same_ranges(tmp_path, dataset, fields):
    save(tmp_path / "features" / "texts" / "train" / "a.npy", np.ones(2))
    (tmp_path / "annotations.yaml").write_text(f"train:\n  a: {{{fields}}}\n")
    message = refusal(formats.open_source, Request(dataset, tmp_path))
    assert f"annotations.yaml: train/a: {YAML[dataset, fields]}" in message


def test_numbers_beyond_float32_are_refused(tmp_path):
    for column in ("label", "v"):
        cells = {"label": "0.5", "v": "0.5"} | {column: "-1e39"}
        table = f"id,label,v\na,0.5,1.5\nb,{cells['label']},{cells['v']}\nc,1.5,2.5\n"
        message = refusal(open_table, tmp_path, table, layout=Layout(targets=("v",)))
        assert f"line 3: {column} '-1e39', expected a finite number of float32" in message


# Cells


def test_names_with_underscores_are_no_numbers(tmp_path):
    source = open_table(tmp_path, "id,label\na,1_0\nb,1_1\nc,1_0\n")
    assert source.spec.label == LabelSpec("single", ("1_0", "1_1"))


@pytest.mark.parametrize("cell", ["nan", "NaN", "", " "])
def test_an_empty_label_is_refused_an_empty_target_is_unknown(tmp_path, cell):
    for others in ("x", "0.5", "1"):
        message = refusal(open_table, tmp_path, f"id,label\na,{others}\nb,{cell}\nc,{others}\n")
        expected = "a finite number of float32" if others == "0.5" else "one of the classes"
        assert f"labels.csv, line 3: label {cell!r}, expected {expected}" in message
    layout = Layout(targets=("number", "mood"))
    table = f"id,label,number,mood\na,x,0.5,low\nb,x,{cell},{cell}\nc,y,1.5,high\n"
    train = open_table(tmp_path, table, layout=layout).annotations["train"]
    np.testing.assert_array_equal(train.targets["number"], np.float32([0.5, np.nan, 1.5]))
    np.testing.assert_array_equal(train.targets["mood"], [1, -1, 0])


def test_an_empty_target_of_a_corpus_is_unknown_but_not_its_label(tmp_path):
    table = f"{TABLES['meld']}\na,train,g,negative,joy\nb,train,g,,joy\nc,train,g,nan,fear\n"
    train = open_table(tmp_path, table, dataset="meld").annotations["train"]
    np.testing.assert_array_equal(train.targets["sentiment"], [0, -1, -1])
    np.testing.assert_array_equal(train.label, [4, 4, 2])
    table = f"{TABLES['cmu_mosei']}\na,train,g,{',0' * 6}\nb,train,g,-2{',0' * 6}\n"
    train = open_table(tmp_path, table, ids="ab", dataset="cmu_mosei").annotations["train"]
    np.testing.assert_array_equal(train.targets["sentiment"], [np.nan, -2])
    message = refusal(open_table, tmp_path, f"{TABLES['meld']}\na,train,g,neutral,\n", dataset="meld")
    assert "line 2: label '', expected one of the classes neutral, surprise" in message
    message = refusal(open_table, tmp_path, f"{TABLES['cmu_mosi']}\na,train,g,\n", dataset="cmu_mosi")
    assert "line 2: sentiment '', expected a number from -3 to 3" in message


@pytest.mark.parametrize("name", ["x\x1b[31m", "x\ny", "x\x7f"])
def test_classes_that_cannot_be_printed_are_refused(tmp_path, name):
    message = refusal(open_table, tmp_path, f'id,label\na,x\nb,"{name}"\nc,x\n')
    assert message.endswith(f"labels.csv: class or label {name!r} cannot be printed; correct its name")
    layout = Layout(label=(name, "y"))
    message = refusal(open_table, tmp_path, f'id,"{name}",y\na,1,0\nb,1,1\nc,1,1\n', layout=layout)
    assert f"class or label {name!r} cannot be printed" in message
    table = f'id,label,mood\na,x,{name!r}\nb,y,"{name}"\nc,x,\n'
    message = refusal(open_table, tmp_path, table, layout=Layout(targets=("mood",)))
    assert f"class or label {name!r} cannot be printed" in message


@pytest.mark.parametrize("value", ["2", "0.5", "-1", "", "nan", "yes"])
def test_several_labels_are_each_0_or_1(tmp_path, value):
    layout = Layout(label=("happy", "sad"))
    train = open_table(tmp_path, "id,happy,sad\na,1,0\nb,1.0, 0\nc,0,1\n", layout=layout).annotations["train"]
    np.testing.assert_array_equal(train.label, [[1, 0], [1, 0], [0, 1]])
    message = refusal(open_table, tmp_path, f"id,happy,sad\na,1,0\nb,0,{value}\nc,0,1\n", layout=layout)
    assert f"line 3: sad {value!r}, expected 0 or 1" in message


def test_spaces_around_groups_and_speakers_do_not_matter(tmp_path):
    train = open_table(tmp_path, "id,group\na, p\nb,p \nc,q\n").annotations["train"]
    assert train.groups == ["p", "p", "q"]
    table = "Utterance,Speaker,Emotion,Sentiment,Dialogue_ID,Utterance_ID\nHi, Joey ,joy,positive, 0 ,1\n"
    source = open_table(tmp_path / "m", table, ids="a", dataset="meld", file="train_sent_emo.csv")
    assert source.annotations["train"].groups == ["Joey"]
    assert source.annotations["train"].keys == ["dia0_utt1"]


def test_caer_calls_anger_angry_too(tmp_path):
    table = f"{TABLES['caer']}\na,train,,angry\nb,train,,Anger\nc,train,,Sad\n"
    np.testing.assert_array_equal(open_table(tmp_path, table, dataset="caer").annotations["train"].label, [0, 0, 5])
    save(tmp_path / "names" / "x" / "train" / "Angry_0001.npy", np.ones(2))
    train = formats.open_source(Request("caer", tmp_path / "names")).annotations["train"]
    np.testing.assert_array_equal(train.label, [0])


# Files


def test_windows_1252_is_read_and_utf_16_without_mark_refused(tmp_path):
    text = "id,label,group\na,gênant,Zoë\nb,x,\nc,x,’\n"
    for encoding in ("utf-8", "utf-8-sig", "utf-16", "cp1252"):
        source = open_table(tmp_path, text.encode(encoding))
        assert source.spec.label.names == ("gênant", "x")
        assert source.annotations["train"].groups == ["Zoë", "", "’"]
    for encoding in ("utf-16-le", "utf-16-be", "utf-32"):
        message = refusal(open_table, tmp_path, text.encode(encoding))
        assert message.endswith("labels.csv: holds zero bytes, as UTF-16 without its mark does; save it in UTF-8")


@pytest.mark.parametrize("name", ["Labels.csv", "LABELS.CSV"])
@pytest.mark.parametrize("dataset", ["features", "caer"])
def test_a_label_file_counts_however_its_name_is_written(tmp_path, name, dataset):
    (tmp_path / "zoo.csv").write_text("not,read\n")
    source = open_table(tmp_path, f"{TABLES['caer']}\na,test,,sad\n", ids="a", file=name, dataset=dataset)
    assert "sad" in source.spec.label.names
    assert list(source.annotations) == ["test"]


@pytest.mark.parametrize(
    ("second", "message"),
    [
        ("id,label\nc,x\n", "no column 'split', which .*a.csv has; it has id, label"),
        ("id,split\nc,test\n", "no column 'label', which .*a.csv has; it has id, split"),
        ("name,split,label\nc,test,x\n", "no column 'id', which .*a.csv has; it has name"),
    ],
)
def test_files_of_labels_have_the_columns_of_the_first(tmp_path, second, message):
    (tmp_path / "a.csv").write_text("id,split,label\na,train,x\nb,train,y\n")
    (tmp_path / "b.csv").write_text("id,split,label,more\nc,test,x,1\n")
    both = {"labels": (tmp_path / "a.csv", tmp_path / "b.csv")}
    source = open_table(tmp_path / "t", "", file="c.csv", **both)
    assert {s: a.ids for s, a in source.annotations.items()} == {"train": ["a", "b"], "test": ["c"]}
    (tmp_path / "b.csv").write_text(second)
    with pytest.raises(ConclugenError, match=rf"b\.csv: {message}"):
        open_table(tmp_path / "t", "", file="c.csv", **both)


def test_a_file_of_labels_that_says_no_split_is_train_unless_a_corpus_has_splits(tmp_path):
    labels = tuple(write(tmp_path / f"{name}.csv", f"id,label\n{name[0]},sad\n") for name in ("all", "both_test"))
    source = open_table(tmp_path / "t", "", file="c.csv", labels=labels)
    assert {s: a.ids for s, a in source.annotations.items()} == {"train": ["a"], "test": ["b"]}
    message = refusal(open_table, tmp_path / "t", "", file="c.csv", labels=labels, dataset="caer")
    assert message.endswith("all.csv: no column 'split'; it has id, label")


def test_metadata_of_splits_has_the_columns_of_the_first(tmp_path):
    for split, header in (("train", "file_name,label"), ("test", "file_name,other")):
        save(tmp_path / split / "a.npy", np.ones(2))
        (tmp_path / split / "metadata.csv").write_text(f"{header}\na.npy,x\n")
    message = refusal(formats.open_source, Request("features", tmp_path, name="m"))
    assert "train/metadata.csv: no column 'other', which" in message


def test_a_file_named_after_two_splits_says_nothing_of_them(tmp_path):
    message = refusal(
        open_table, tmp_path / "t", "", labels=(write(tmp_path / "train_and_test.csv", "id,label\na,x\n"),)
    )
    assert message.endswith("train_and_test.csv: its name says test and train; add a column 'split'")
    labels = write(tmp_path / "train_and_test.csv", "id,label,Split\na,x,train\nb,x,dev\n")
    source = open_table(tmp_path / "t", "", labels=(labels,))
    assert list(source.annotations) == ["train", "validation"]
    source = open_table(tmp_path / "t", "", labels=(write(tmp_path / "my_val-labels.csv", "id,label\na,x\n"),))
    assert list(source.annotations) == ["validation"]


def write(path, text):
    path.write_text(text)
    return path


def test_a_meld_table_without_numbers_of_utterances_is_refused(tmp_path):
    table = "Speaker,Emotion,Sentiment,Dialogue_ID\nJoey,joy,positive,0\n"
    message = refusal(open_table, tmp_path, table, dataset="meld", file="dev_sent_emo.csv")
    assert "dev_sent_emo.csv: no column 'id', nor 'dialogue_id' and 'utterance_id'; it has" in message


def test_one_file_holds_the_label_and_all_targets(tmp_path):
    layout = Layout(label=("mood",), targets=("arousal", "valence", "who"))
    table = "id,mood,arousal,valence,who,group\na,low,0.25,-1.5,p,p\nb,high,0.5,-2.5,q,q\nc,low,0.75,-3.5,q,q\n"
    source = open_table(tmp_path, table, layout=layout)
    train = source.annotations["train"]
    assert [path.name for path in source.label_files] == ["labels.csv"]
    assert source.spec.targets == {
        "arousal": LabelSpec("value"),
        "valence": LabelSpec("value"),
        "who": LabelSpec("single", ("p", "q")),
    }
    np.testing.assert_array_equal(train.label, [1, 0, 1])
    np.testing.assert_array_equal(train.targets["arousal"], [0.25, 0.5, 0.75])
    np.testing.assert_array_equal(train.targets["valence"], [-1.5, -2.5, -3.5])
    np.testing.assert_array_equal(train.targets["who"], [0, 1, 1])


# Splits and folds


def ravdess(folder, splits):
    for split in splits:
        for actor in range(1, 25):
            save(folder / "x" / split / f"01-01-{1 + actor % 8:02d}-01-01-01-{actor:02d}.npy", np.ones(3))
    return folder


@pytest.mark.parametrize("splits", [("val",), ("test",), ("val", "test")])
@pytest.mark.parametrize("folds", [None, (6, 0)])
def test_ravdess_in_other_split_folders_than_train_is_refused(tmp_path, splits, folds):
    message = refusal(formats.open_source, Request("ravdess", ravdess(tmp_path, splits), folds=folds))
    assert message.startswith("ravdess: features of ")
    assert message.endswith(" only; put all files in train/, or use no split folders")


@pytest.mark.parametrize("splits", [("train", "val"), ("",)])
def test_ravdess_from_named_modalities_alone(tmp_path, splits):
    modalities = {"face": str(ravdess(tmp_path, splits) / "x")}
    source = formats.open_source(Request("ravdess", modalities=modalities, folds=(3, 2)))
    assert {s: len(a.ids) for s, a in source.annotations.items()} == {"train": 8, "validation": 8, "test": 8}


def test_features_from_named_modalities_alone(tmp_path):
    modalities = {"face": str(ravdess(tmp_path, ("train", "test")) / "x")}
    source = formats.open_source(Request("features", name="mine", modalities=modalities))
    assert {s: len(a.ids) for s, a in source.annotations.items()} == {"train": 24, "test": 24}
    message = refusal(formats.open_source, Request("features", name="mine", modalities=modalities, folds=(3, 0)))
    assert "the data have splits (train, test) already" in message


def test_a_corpus_of_which_all_is_left_out_is_refused(tmp_path):
    message = refusal(
        open_table,
        tmp_path,
        f"{TABLES['meld']}\ndia110_utt7,train,g,neutral,joy\n",
        ids=["dia110_utt7"],
        dataset="meld",
    )
    assert "no examples; the labels name none, or all are dropped" in message


def test_what_a_corpus_leaves_out_needs_no_label(tmp_path):
    table = f"{TABLES['meld']}\ndia110_utt7,train,g,,\ndia0_utt0,train,g,neutral,joy\n"
    train = open_table(tmp_path, table, ids=["dia110_utt7", "dia0_utt0"], dataset="meld").annotations["train"]
    assert (train.ids, train.keys, train.label.tolist()) == (["train_dia0_utt0"], ["dia0_utt0"], [4])


def grouped(groups):
    return Annotations([f"c{i}" for i in range(len(groups))], groups, None, {}, list(range(len(groups))))


def test_folds_go_round():
    rows = grouped(["a", "b", "c", "d", "a", "e"])
    expected = {
        0: {"train": ["c2", "c3"], "validation": ["c5"], "test": ["c0", "c1", "c4"]},
        1: {"train": ["c5"], "validation": ["c0", "c1", "c4"], "test": ["c2", "c3"]},
        2: {"train": ["c0", "c1", "c4"], "validation": ["c2", "c3"], "test": ["c5"]},
    }
    for fold, splits in expected.items():
        cut = sources.by_group(rows, 3, fold, where="x")
        assert {split: a.ids for split, a in cut.items()} == splits


@pytest.mark.parametrize(
    ("groups", "num_folds", "fold"),
    [("abc", 2, 0), ("abc", 3, 3), ("abc", 3, -1), ("ab", 6, 5), ("abcd", 6, 5)],
)
def test_impossible_folds_are_refused(groups, num_folds, fold):
    message = refusal(sources.by_group, grouped(list(groups)), num_folds, fold, where="x")
    assert message.startswith(
        f"x: fold {fold} of {num_folds} over {len(groups)} groups (people); expected at least 3 folds"
    )
    assert (", such as --num_folds=4," in message) == (groups == "abcd")


# Records


@pytest.mark.parametrize("field", ["id", "group"])
def test_names_have_at_most_1000_characters(tmp_path, field):
    spec = DatasetSpec("m", "1.0.0", "", "", {"x": 2}, LabelSpec("none"), ("train",))

    def part(text):
        example = Example(**{"id": "a", "features": {"x": np.ones(2)}, field: text})
        return records.write_part(records.Job(spec, "train", 0, [example], tmp_path / "part"))

    assert len(part("é" * 1000).rows) == 1
    assert f"{field} must be a printable str of" in refusal(part, "é" * 1001)


@pytest.mark.parametrize(
    ("kind", "label", "says"),
    [
        ("value", 1e39, "label 1e+39, expected a finite number of float32"),
        ("value", 10**5000, "label a int, expected a finite number of float32"),
        ("single", 10**5000, "label a int, expected an integer from 0 to 1"),
        ("multi", [0, 1e39], "label a list, expected 2 values 0 or 1 (a, b)"),
        ("multi", [0, 10**5000], "label a list, expected 2 values 0 or 1 (a, b)"),
    ],
    ids=range(5),
)
def test_labels_of_examples_that_are_too_large(tmp_path, kind, label, says):
    names = () if kind == "value" else ("a", "b")
    spec = DatasetSpec("m", "1.0.0", "", "", {"x": 2}, LabelSpec(kind, names), ("train",))
    examples = [Example("c0", {"x": np.ones(2)}, label)]
    message = refusal(records.write_part, records.Job(spec, "train", 0, examples, tmp_path / "part"))
    assert f"split 'train', row 0, id 'c0': {says}" in message


def test_bad_values_are_named_by_their_column(tmp_path):
    x = np.ones((3, 4))
    x[1, 2], x[1, 3] = np.nan, np.inf
    np.savez(tmp_path / "x.npz", ids=np.array(list("abc")), x=x)
    with pytest.raises(ConclugenError, match=r"id 'b', modality 'x': 2 of 4 values are NaN .*\(first at column 2\)"):
        build(Request("features", tmp_path / "x.npz", name="mine"), tmp_path / "data")
