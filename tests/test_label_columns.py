"""What a column of labels is taken for: kind, classes, values, and the line that says so and how to change it."""

import io

import numpy as np
import pytest
from rich.console import Console

from conclugen_jax.data import builders, formats, inspection, inspection_view
from conclugen_jax.data.requests import Layout, Request
from conclugen_jax.data.sources import LabelSpec
from conclugen_jax.errors import ConclugenError
from tests.layouts import save, write_csv
from tests.test_label_faults import open_table, refusal

CHANGE = "; use --label_kind or --classes to change that"
SAME = ", as names that differ in case or blanks only are one class"
NAN = float("nan")


def read(folder, cells, **layout):
    """Open a table with this column of labels."""
    folder.mkdir(exist_ok=True)
    save(folder / "x.npy", np.ones((len(cells), 2)))
    (folder / "x.txt").write_text("\n".join(f"c{i}" for i in range(len(cells))))
    write_csv(folder / "labels.csv", [{"id": f"c{i}", "label": cell} for i, cell in enumerate(cells)])
    return formats.open_source(Request("features", folder, name="t", layout=Layout(**layout)))


def numbered(*names):
    return LabelSpec("single", names)


VALUE = LabelSpec("value")
COLUMNS = {  # cells, flags -> label, values, notes
    "class numbers": (
        ["0", "2", "1"],
        {},
        (numbered("0", "1", "2"), [0, 2, 1], ["3 classes (0, 1, 2), since its cells are whole numbers such as '0'"]),
    ),
    "pandas with a gap": (
        ["0.0", "2.0", "1.0"],
        {},
        (numbered("0", "1", "2"), [0, 2, 1], ["3 classes (0, 1, 2), since its cells are whole numbers such as '0.0'"]),
    ),
    "numpy.savetxt": (
        ["1.000", "0.000", "1"],
        {},
        (numbered("0", "1"), [1, 0, 1], ["2 classes (0, 1), since its cells are whole numbers such as '1.000'"]),
    ),
    "German pandas with a gap": (
        ["0,0", "1,0", "0,0"],
        {},
        (numbered("0", "1"), [0, 1, 0], ["2 classes (0, 1), since its cells are whole numbers such as '0,0'"]),
    ),
    "polarity": (
        ["-1", "0", "1", "-1"],
        {},
        (
            numbered("-1", "0", "1"),
            [0, 1, 2, 0],
            ["3 classes (-1, 0, 1), since its cells are whole numbers such as '-1'"],
        ),
    ),
    "polarity after pandas": (
        ["-1.0", "1.0", "0.0"],
        {},
        (
            numbered("-1", "0", "1"),
            [0, 2, 1],
            ["3 classes (-1, 0, 1), since its cells are whole numbers such as '-1.0'"],
        ),
    ),
    "polarity with signs": (
        ["\N{MINUS SIGN}1", "+1", "0"],
        {},
        (
            numbered("-1", "0", "1"),
            [0, 2, 1],
            ["3 classes (-1, 0, 1), since its cells are whole numbers such as '\N{MINUS SIGN}1'"],
        ),
    ),
    "minus sign of a text program": (
        ["\N{MINUS SIGN}0.5", "0.5"],
        {},
        (
            VALUE,
            [-0.5, 0.5],
            ["a number to predict, since its cells are numbers such as '\N{MINUS SIGN}0.5' (read as -0.5)"],
        ),
    ),
    "many whole numbers": (
        list(map(str, range(-5, 6))),
        {},
        (
            VALUE,
            list(range(-5, 6)),
            ["a number to predict, since its cells are whole numbers such as '-5', 11 different ones and some below 0"],
        ),
    ),
    "polarity as a number": (["-1", "0", "1"], {"kind": "value"}, (VALUE, [-1, 0, 1], [])),
    "whole numbers as numbers": (["1.0", "3.0"], {"kind": "value"}, (VALUE, [1, 3], [])),
    "polarity with names": (
        ["-1", "1", "0"],
        {"classes": ("-1", "0", "1")},
        (numbered("-1", "0", "1"), [0, 2, 1], []),
    ),
    "numbers of named classes": (
        ["0.0", "1.0", "0"],
        {"classes": ("low", "high")},
        (numbered("low", "high"), [0, 1, 0], []),
    ),
    "codes of RAVDESS": (
        ["03", "01", "08", "03"],
        {},
        (numbered("01", "03", "08"), [1, 0, 2, 1], ["3 classes (01, 03, 08), since its cells are codes such as '03'"]),
    ),
    "codes, said to be classes": (["02", "01", "02"], {"kind": "single"}, (numbered("01", "02"), [1, 0, 1], [])),
    "codes, some after Excel": (
        ["01", "02", "1", "01"],
        {},
        (
            numbered("01", "02"),
            [0, 1, 0, 0],
            ["2 classes (01, 02), since its cells are codes such as '01'", f"'1' (1 row) as '01'{SAME}"],
        ),
    ),
    "decimals": (
        ["0.5", "-2", "1"],
        {},
        (VALUE, [0.5, -2, 1], ["a number to predict, since its cells are numbers such as '0.5'"]),
    ),
    "decimal commas": (
        ["0,5", "1,234", "-2"],
        {},
        (VALUE, [0.5, 1.234, -2], ["a number to predict, since its cells are numbers such as '0,5' (read as 0.5)"]),
    ),
    "percent": (
        ["50%", "12.5 %", "0"],
        {},
        (VALUE, [0.5, 0.125, 0], ["a number to predict, since its cells are numbers such as '12.5 %' (read as 0.125)"]),
    ),
    "thousands": (
        ["1,234.5", "2,000", "7.25"],
        {},
        (
            VALUE,
            [1234.5, 2000, 7.25],
            ["a number to predict, since its cells are numbers such as '1,234.5' (read as 1234.5)"],
        ),
    ),
    "thousands of Europe": (
        ["1.234,5", "2.000", "7"],
        {},
        (
            VALUE,
            [1234.5, 2000, 7],
            ["a number to predict, since its cells are numbers such as '1.234,5' (read as 1234.5)"],
        ),
    ),
    "thousands with blanks": (
        ["1\u202f234,5", "0,25"],
        {},
        (VALUE, [1234.5, 0.25], ["a number to predict, since its cells are numbers such as '0,25' (read as 0.25)"]),
    ),
    "words": (
        ["sad", "happy", "sad"],
        {},
        (numbered("happy", "sad"), [1, 0, 1], ["2 classes (happy, sad), since its cells are words"]),
    ),
    "words with a number": (
        ["sad", "1", "sad"],
        {},
        (numbered("1", "sad"), [1, 0, 1], ["2 classes (1, sad), since its cells are words"]),
    ),
    "case and blanks": (
        ["happy", "Happy", " Happy ", "very  sad", "Very sad"],
        {},
        (
            numbered("Happy", "very  sad"),
            [0, 0, 0, 1, 1],
            [
                "2 classes (Happy, very  sad), since its cells are words",
                f"'happy' (1 row) as 'Happy', 'Very sad' (1 row) as 'very  sad'{SAME}",
            ],
        ),
    ),
    "case of named classes": (
        ["JOY", "sad", "joy"],
        {"classes": ("sad", "Joy")},
        (numbered("sad", "Joy"), [1, 0, 1], [f"'JOY' (1 row) as 'Joy', 'joy' (1 row) as 'Joy'{SAME}"]),
    ),
    "classes that differ in case": (["a", "A", "a"], {"classes": ("a", "A")}, (numbered("a", "A"), [0, 1, 0], [])),
    "accents": (
        ["gene\u0302", "gen\u00ea"],
        {},
        (numbered("gen\u00ea"), [0, 0], ["1 class (gen\u00ea), since its cells are words"]),
    ),
    "accents of the flag": (["gen\u00ea"], {"classes": ("gene\u0302",)}, (numbered("gen\u00ea"), [0], [])),
    "truth": (
        ["True", "False", "True"],
        {},
        (numbered("False", "True"), [1, 0, 1], ["2 classes (False, True), since its cells are words"]),
    ),
    "a class called none": (
        ["none", "joy"],
        {},
        (numbered("joy", "none"), [1, 0], ["2 classes (joy, none), since its cells are words"]),
    ),
    "a named class called None": (["None", "joy"], {"classes": ("joy", "None")}, (numbered("joy", "None"), [1, 0], [])),
    "a named class called null": (["null", "joy"], {"classes": ("joy", "null")}, (numbered("joy", "null"), [1, 0], [])),
}


@pytest.mark.parametrize("name", COLUMNS)
def test_what_a_column_of_labels_is_taken_for(tmp_path, name):
    cells, flags, (label, values, notes) = COLUMNS[name]
    source = read(tmp_path / "t", cells, **flags)
    assert source.spec.label == label
    np.testing.assert_array_equal(source.annotations["train"].label, np.array(values, np.float32))
    assert source.facts["notes"] == [f"label: {note}{CHANGE if 'since' in note else ''}" for note in notes]


MISSING = ["", "#N/A", "#N/A N/A", "#NA", "-1.#IND", "-1.#QNAN", "-NaN", "-nan", "1.#IND", "1.#QNAN", "<NA>", "N/A"]
MISSING += ["NA", "NULL", "NaN", "None", "n/a", "nan", "null", "NAN", "Nan", "-nan(ind)"]
MISSING += ["#DIV/0!", "#NAME?", "#NULL!", "#NUM!", "#REF!", "#VALUE!"]
"""The words of pandas (``na_values`` of ``read_csv``), those of C, and the errors of spreadsheets."""


@pytest.mark.parametrize("word", MISSING)
@pytest.mark.parametrize("others", ["xy", ("0.5", "1.5"), "01"])
def test_words_for_missing_values(tmp_path, word, others):
    first, second = others
    table = f"id,label,more\na,{first},{first}\nb,{second},{word}\nc,{second},{word}\n"
    source = open_table(tmp_path, table, layout=Layout(targets=("more",)))
    assert source.spec.targets["more"].kind == source.spec.label.kind
    assert word not in source.spec.targets["more"].names
    expected = NAN if others[0] == "0.5" else -1
    np.testing.assert_array_equal(source.annotations["train"].targets["more"][1:], np.float32([expected] * 2))
    said = [f"more: {word!r} (2 rows) read as missing"] if word else []
    assert [note for note in source.facts["notes"] if "missing" in note] == said
    message = refusal(open_table, tmp_path, f"id,label\na,{first}\nb,{second}\nc,{word}\n")
    assert f"labels.csv, line 4: label {word!r}, expected " in message
    assert "and it is missing in 1 row; fill it in or leave the row out" in message
    assert message.endswith("; a class of this name must stand in --classes") == (first != "0.5")


def test_targets_say_what_they_are(tmp_path):
    table = "id,label,valence,age,mood\na,x,-1,25,low\nb,y,1,31,\nc,x,0,25,high\n"
    source = open_table(tmp_path, table, layout=Layout(targets=("valence", "age:value", "mood")))
    assert source.spec.targets == {"valence": numbered("-1", "0", "1"), "age": VALUE, "mood": numbered("high", "low")}
    what = "3 classes (-1, 0, 1), since its cells are whole numbers such as '-1'"
    change = "; use --targets=valence:value or valence:single to change that"
    assert f"valence: {what}{change}" in source.facts["notes"]
    assert not [note for note in source.facts["notes"] if note.startswith("age")]
    source = open_table(tmp_path, table, layout=Layout(targets=("valence:value", "age:single")))
    assert source.spec.targets["valence"] == VALUE
    assert len(source.spec.targets["age"].names) == 32


@pytest.mark.parametrize(
    "pair", [("True", "False"), ("TRUE", "FALSE"), ("true", "false"), ("1.0", "0.0"), ("1,0", "0")]
)
def test_several_labels_are_true_or_false(tmp_path, pair):
    yes, no = (f'"{cell}"' for cell in pair)
    table = f"id,happy,sad\na,{yes},{no}\nb,{no},{yes}\nc,{yes},{yes}\n"
    source = open_table(tmp_path, table, layout=Layout(label=("happy", "sad")))
    np.testing.assert_array_equal(source.annotations["train"].label, [[1, 0], [0, 1], [1, 1]])


def test_long_lists_are_cut_off(tmp_path):
    cells = [f"Class {i}" for i in range(12)] + [f"class {i}" for i in range(12)]
    first, second = read(tmp_path / "t", cells).facts["notes"]
    assert first.startswith(
        "label: 12 classes (Class 0, Class 1, Class 10, Class 11, Class 2, Class 3, Class 4, Class 5 and"
    )
    assert "Class 5 and 4 more), since its cells are words" in first
    assert second.endswith(f"'class 7' (1 row) as 'Class 7' and 4 more{SAME}")


def test_a_comma_that_may_be_either_is_refused(tmp_path):
    message = refusal(open_table, tmp_path, 'id,label\na,"1,234"\nb,1\nc,2\n', layout=Layout(kind="value"))
    expected = "expected a finite number of float32, and this may be 1234 or 1.234; correct it"
    assert message.endswith(f"labels.csv, line 2: label '1,234', {expected}")
    message = refusal(open_table, tmp_path, 'id,label\na,"1,234"\nb,1\nc,2\n')
    assert message.endswith(
        "column 'label' has '1,234', which may be one of two numbers; write it without comma, or use --label_kind or --classes"
    )
    source = open_table(tmp_path, 'id,label\na,"1,234"\nb,x\nc,x\n', layout=Layout(kind="single"))
    assert source.spec.label == numbered("1,234", "x")


BOUNDS = {  # cells, flags -> kind and names
    "ten whole numbers": (range(-5, 5), {}, numbered(*map(str, range(-5, 5)))),
    "eleven whole numbers": (range(-5, 6), {}, VALUE),
    "the highest class": ([9999, 0], {}, numbered(*map(str, range(10**4)))),
    "real numbers as classes": (["10.5", "9.5", "-1.5"], {"kind": "single"}, numbered("-1.5", "9.5", "10.5")),
}


@pytest.mark.parametrize("name", BOUNDS)
def test_where_one_kind_ends_and_another_begins(tmp_path, name):
    cells, layout, label = BOUNDS[name]
    assert read(tmp_path, list(map(str, cells)), **layout).spec.label == label


def test_limits_of_class_numbers_and_alike_names(tmp_path):
    with pytest.raises(ConclugenError, match=r"column 'label' has class numbers up to 10000; name the classes"):
        read(tmp_path / "a", ["10000", "0"])
    source = read(tmp_path / "b", ["Joy", "JOY", "joy"], classes=("joy", "Joy"))
    assert source.annotations["train"].label.tolist() == [1, 0, 0]  # as it is written, else the first of those alike


@pytest.mark.parametrize("kind", ["", "single"])
def test_whole_numbers_beyond_any_class_are_refused(tmp_path, kind):
    message = refusal(open_table, tmp_path, f"id,label\na,{'1' * 400}\nb,2\nc,2\n", layout=Layout(kind=kind))
    assert message.endswith(f"labels.csv: column 'label' has class numbers up to {'1' * 30}; name the classes")


def test_groups_that_are_missing(tmp_path):
    source = open_table(tmp_path, "id,label,group\na,x,anna\nb,x,nan\nc,x,nan\n")
    assert source.annotations["train"].groups == ["anna", "", ""]
    assert "group: 'nan' (2 rows) read as missing" in source.facts["notes"]
    source = open_table(tmp_path, "id,label,group\na,x,anna\nb,x,Anna\nc,x,ben\n")
    assert source.annotations["train"].groups == ["anna", "Anna", "ben"]
    assert "group: 'anna' and 'Anna' count as different groups; write a group in one way" in source.facts["notes"]


def test_what_was_decided_is_told_once_and_kept(tmp_path):
    source = read(tmp_path / "t", ["Joy", "joy", "sad", "sad"])
    folder = builders.build(source, tmp_path / "data")
    notes = [
        f"label: 2 classes (Joy, sad), since its cells are words{CHANGE}",
        f"label: 'joy' (1 row) as 'Joy'{SAME}",
    ]
    assert [line for line in inspection_view.describe(folder) if line.startswith("label")] == notes
    report = inspection.inspect(folder)
    assert report["source"]["notes"] == notes
    console = Console(width=80, record=True, file=io.StringIO())
    for part in inspection_view.render(report):
        console.print(part)
    shown = " ".join(console.export_text().split())
    assert shown.count("'joy' (1 row) as 'Joy'") == 1
    assert "Decided when it was built - label: 2 classes (Joy, sad)" in shown
