"""Tables as pandas, Excel and others write them are read; what is not plain csv is said."""

import numpy as np
import pytest

from conclugen_jax.data import cells, formats, sources
from conclugen_jax.data.cells import as_number, decimal_mark
from conclugen_jax.data.requests import Request
from conclugen_jax.errors import ConclugenError
from conclugen_jax.extract import clips
from conclugen_jax.extract.media import subtitles
from tests.layouts import save
from tests.test_label_faults import open_table, refusal

PLAIN = "id,split,label\na,train,x\nb,test,y\n"
SEMICOLONS = "labels.csv: cells are separated by semicolons"
INDEX = "labels.csv: a first column without name is not used (call it id if it holds the ids)"
EXCEL = "labels.csv: not in UTF-8, so read as Windows-1252: save it in UTF-8 if letters are wrong"
DIALECTS = {  # content -> remarks
    "plain": (PLAIN, []),
    "byte order mark": ("\ufeff" + PLAIN, []),
    "CRLF": (PLAIN.replace("\n", "\r\n"), []),
    "CR": (PLAIN.replace("\n", "\r"), []),
    "quoted": ('"id","split","label"\n"a","train","x"\n"b","test","y"\n', []),
    "blank lines": ("\n" + PLAIN.replace("\n", "\n\n"), []),
    "blanks in the header": (PLAIN.replace(",", ", "), []),
    "semicolons": (PLAIN.replace(",", ";"), [SEMICOLONS]),
    "tabs": (PLAIN.replace(",", "\t"), ["labels.csv: cells are separated by tabs"]),
    "Unicode text of Excel": (
        PLAIN.replace(",", "\t").replace("\n", "\r\n").encode("utf-16"),
        ["labels.csv: cells are separated by tabs"],
    ),
    "UTF-16, the other order": (b"\xfe\xff" + PLAIN.encode("utf-16-be"), []),
    "Windows-1252": (PLAIN.replace("y", "gên").encode("cp1252"), [EXCEL]),
    "Windows-1252 with semicolons": (PLAIN.replace("y", "gên").replace(",", ";").encode("cp1252"), [EXCEL, SEMICOLONS]),
    "sep=;": ("sep=;\r\n" + PLAIN.replace(",", ";"), [SEMICOLONS]),
    "sep=,": ("sep=,\n" + PLAIN, []),
    "quoted sep=": ('"sep=;"\n' + PLAIN.replace(",", ";"), [SEMICOLONS]),
    "SEP=|": ("SEP=|\n" + PLAIN.replace(",", "|"), ["labels.csv: cells are separated by '|'"]),
    "index of pandas": (",id,split,label\n0,a,train,x\n1,b,test,y\n", [INDEX]),
    "index of R": ('"","id","split","label"\n"1","a","train","x"\n"2","b","test","y"\n', [INDEX]),
    "index read and written again": ("Unnamed: 0,id,split,label\n0,a,train,x\n1,b,test,y\n", [INDEX]),
    "index twice": (",Unnamed: 0.1,Unnamed: 0,id,split,label\n0,0,0,a,train,x\n1,1,1,b,test,y\n", [INDEX]),
    "trailing rows": (PLAIN + ",,\n , ,\n", ["labels.csv: 2 rows of empty cells are skipped"]),
    "trailing columns": (
        "id,split,label,,\na,train,x,,\nb,test,y,,\n",
        ["labels.csv: 2 empty columns are skipped"],
    ),
    "trailing cells": ("id,split,label\na,train,x,\nb,test,y,,\n", []),
    "trailing columns, some cut off": (
        "id,split,label,\na,train,x\nb,test,y,\n,,,\n",
        ["labels.csv: 1 row of empty cells is skipped", "labels.csv: 1 empty column is skipped"],
    ),
}


@pytest.mark.parametrize("name", DIALECTS)
def test_tables_as_programs_write_them(tmp_path, name):
    content, remarks = DIALECTS[name]
    source = open_table(tmp_path, content, ids="ab")
    assert source.spec.label.names in (("x", "y"), ("gên", "x"))
    assert {split: list(a.ids) for split, a in source.annotations.items()} == {"train": ["a"], "test": ["b"]}
    assert [note for note in source.facts["notes"] if note.startswith("labels.csv")] == remarks


BAD = {
    "no id but an index": (
        ",label\na,x\n",
        ": no column 'id'; it has label; its first .* \\(labels.csv: a first column without name",
    ),
    "no name within": ("id,,label\na,1,x\n", "must name the columns, each once; it is \\['id', '', 'label'\\]"),
    "cells beyond the header": ("id,label\na,x,1\n", "line 2: 3 cells, the header has 2; quote cells with commas"),
    "cells beyond, with semicolons": ("id;label\na;x;1\n", "line 2: 3 cells, the .* quote cells with semicolons"),
    "cells below no name": (
        "id,label,,\na,x,,\nb,y,1,\n",
        "line 3: cell '1' is in a column without name; quote .*, or correct the first line",
    ),
    "a line after sep=": ("sep=;\nid;label\na\n", ", line 3: 1 cells, the header has 2"),
    "an open quote after sep=": ('sep=;\nid;label\na;"x', ", line 3: not csv"),
    "GBK": ("id,label\na,快乐快乐\n".encode("gbk"), "its encoding is unknown; save it in UTF-8"),
}


@pytest.mark.parametrize("name", BAD)
def test_tables_that_cannot_be_used(tmp_path, name):
    content, message = BAD[name]
    with pytest.raises(ConclugenError, match=f"labels.csv.*{message}"):
        open_table(tmp_path, content)


NUMBERS = {
    "1": 1, "-2.5": -2.5, "+.5": 0.5, "1e3": 1000, "1.234": 1.234, "1,5": 1.5, "0,5": 0.5, "-0,25": -0.25, "0,125": 0.125,
    "12,3456": 12.3456, "1,5e3": 1500, "1,234.5": 1234.5, "1.234,5": 1234.5, "1,234,567": 1234567, "1.234.567": 1234567,
    "1 234": 1234, "1\xa0234,5": 1234.5, "1\u202f234.5": 1234.5, "1'234.5": 1234.5, "1\u2019234": 1234,
    "50%": 0.5, "50 %": 0.5, "12,5%": 0.125, "-10\xa0%": -0.1, "1.234%": 0.01234, "\N{MINUS SIGN}3": -3,
}  # fmt: skip
WORDS = [
    "",
    "x",
    "1_0",
    "1,234",
    "12,345",
    "1,23,4",
    "1.2.3",
    "1,2.3",
    "0,123,456",
    "%",
    "5%%",
    "5 5",
    "inf",
    "nan",
    "1e999",
]


def test_numbers_as_people_write_them():
    assert {text: as_number(text) for text in NUMBERS} == pytest.approx(NUMBERS)
    assert [text for text in WORDS if not np.isnan(as_number(text))] == []


@pytest.mark.parametrize(
    ("column", "mark", "numbers"),
    [
        (["0,5", "1,234"], ",", [0.5, 1.234]),
        (["0.5", "1,234"], ".", [0.5, 1234]),
        (["1.234,5", "1.234"], ",", [1234.5, 1234]),
        (["1,234.5", "1,234", "1.234"], ".", [1234.5, 1234, 1.234]),
        (["0,5", "0.5"], "", [0.5, 0.5]),
        (["0,5", "0.5", "1,234"], "", [0.5, 0.5, np.nan]),
        (["1.234", "2.345"], "", [1.234, 2.345]),
        (["1,234", "2,345"], "", [np.nan, np.nan]),
    ],
)
def test_a_column_has_one_decimal_mark(column, mark, numbers):
    assert decimal_mark(column) == mark
    np.testing.assert_array_equal([as_number(text, mark) for text in column], numbers)


def test_times_with_decimal_commas():
    assert cells.number("12,5", "t.csv, line 2: start", (0, 100)) == 12.5
    message = refusal(cells.number, "12,345", "t.csv, line 2: start", (0, 100))
    assert message == (
        "t.csv, line 2: start '12,345', expected a number from 0 to 100, and this may be 12345 or 12.345; correct it"
    )


@pytest.mark.parametrize("mark", [".", ","])
def test_times_of_a_table_have_one_decimal_mark(tmp_path, mark):
    (tmp_path / "talk.mp4").touch()
    table = "video;start;end;text\ntalk;0,5;1,234;hello\ntalk;1,234;12;you\n".replace(",", mark)
    (tmp_path / "labels.csv").write_text(table)
    found = clips.find("clips", tmp_path, labels=(tmp_path / "labels.csv",))
    assert [(u.start, u.end, u.text) for u in found] == [(0.5, 1.234, "hello"), (1.234, 12, "you")]
    (tmp_path / "words.csv").write_text(table.partition("\n")[2].replace("talk;", "").join(["Start;End;Text\n", ""]))
    assert [(u.start, u.end, u.text) for u in subtitles.read(tmp_path / "words.csv")] == [
        (0.5, 1.234, "hello"),
        (1.234, 12, "you"),
    ]


# Names of splits


@pytest.mark.parametrize("ending", ["", "set", "_set", "-set", " set", "_split"])
@pytest.mark.parametrize(
    ("split", "word"), [(split, word) for split, words in sources.SPLIT_WORDS.items() for word in words]
)
def test_known_names_of_splits(tmp_path, split, word, ending):
    other = "train" if split != "train" else "test"
    for name in (f"{word}{ending}", f" {word.capitalize()}{ending} "):
        source = open_table(tmp_path, f"id,split,label\na,{name},x\nb,{other},y\n", ids="ab")
        assert {each: list(a.ids) for each, a in source.annotations.items()} == {split: ["a"], other: ["b"]}
    remarks = [f"split {word + ending!r} is taken for test"] * word.startswith("eval")
    assert [note for note in source.facts["notes"] if note.startswith("split")] == remarks
    for folder, key in ((f"{word}{ending}".upper(), "a"), (other, "b")):
        save(tmp_path / "folders" / folder / f"{key}.npy", np.ones(2))
    source = formats.open_source(Request("features", name="t", modalities={"x": str(tmp_path / "folders")}))
    assert {each: list(a.ids) for each, a in source.annotations.items()} == {split: ["a"], other: ["b"]}


@pytest.mark.parametrize("pair", [("val", "dev"), ("test", "eval"), ("Train", "training"), ("Extra", "extra")])
def test_two_names_for_one_split_are_refused(tmp_path, pair):
    table = f"id,split,label\na,{pair[0]},x\nb,{pair[0]},x\nc,{pair[1]},y\n"
    message = refusal(open_table, tmp_path, table)
    first = pair[0] if pair[0] == "Extra" else pair[0].lower()
    assert f"labels.csv, line 4: split {pair[1]!r}, but {first!r} in a row above means " in message


def test_a_split_of_its_own_is_said_and_a_missing_one_refused(tmp_path):
    source = open_table(tmp_path, "id,split,label\na,train,x\nb,holdout,x\n", ids="ab")
    assert list(source.annotations) == ["train", "holdout"]
    assert "split 'holdout' keeps its name; it is none of train, validation, test" in source.facts["notes"]
    for word in ("", "nan", "NA", "<NA>"):
        message = refusal(open_table, tmp_path, f"id,split,label\na,train,x\nb,{word},x\n", ids="ab")
        assert "labels.csv, line 3: split ''; fill it in, or leave the row out" in message


def test_the_name_of_a_file_says_the_split_and_is_told(tmp_path):
    labels = tmp_path / "labels_dev.csv"
    labels.write_text("id,label\na,x\nb,y\n")
    source = open_table(tmp_path / "t", "", ids="ab", file="other.csv", labels=(labels,))
    assert list(source.annotations) == ["validation"]
    assert "labels_dev.csv: all rows are of the split validation, as the file's name says" in source.facts["notes"]
