"""Names are the same whether their accents are composed or apart, as macOS writes them, wherever names meet."""

import dataclasses
import unicodedata

import numpy as np
import pytest

from conclugen_jax.data import builders, formats
from conclugen_jax.data.features import FolderFeatures
from conclugen_jax.data.requests import Layout, Request
from conclugen_jax.data.sources import by_group, name_hash
from conclugen_jax.errors import ConclugenError
from conclugen_jax.extract import clips as clips_lib
from tests.helpers import Faces
from tests.layouts import build, matrices, refused, save

COMPOSED = "zoé_ü"
APART = unicodedata.normalize("NFD", COMPOSED)
MIXED = COMPOSED[:3] + APART[4:]  # one letter of each kind
PAIRS = [(a, b) for a in (COMPOSED, APART, MIXED) for b in (COMPOSED, APART, MIXED) if a != b]


def labels(folder, text, name="labels.csv"):
    folder.mkdir(parents=True, exist_ok=True)
    (folder / name).write_text(text, encoding="utf-8")
    return folder / name


def clip_by_id(folder, written, stored):
    (folder / f"{stored}.mp4").write_bytes(b"x")
    (only,) = clips_lib.find("clips", folder)
    return only.key == COMPOSED


def clip_in_a_row(folder, written, stored):
    (folder / f"{stored}.mp4").write_bytes(b"x")
    (only,) = clips_lib.find("clips", folder, labels=(labels(folder, f"id,video,start,end\na,{written},0,1\n"),))
    return not only.problem


def clip_in_a_folder(folder, written, stored):
    (folder / stored).mkdir()
    (folder / stored / "001.mp4").write_bytes(b"x")
    (only,) = clips_lib.find("clips", folder, labels=(labels(folder, f"id,video,start,end\na,{written}/001,0,1\n"),))
    return not only.problem


def ids_in(found):
    return [(name, sorted(row[0])) for name, row in found["train"].items()] == [(COMPOSED, ["x"])]


def file_of_an_id(folder, written, stored):
    save(folder / "x" / f"{stored}.npy", np.ones(2))
    labels(folder, f"id\n{written}\n")
    return ids_in(build(Request("features", folder, name="t"), folder / "data")[1])


def row_of_an_id(folder, written, stored):
    labels(matrices(folder, "x", ids=[stored]), f"id\n{written}\n")
    return ids_in(build(Request("features", folder, name="t"), folder / "data")[1])


def array_of_an_id(folder, written, stored):
    np.savez(folder / "all.npz", ids=[stored], x=np.ones((1, 2)))
    table = labels(folder, f"id\n{written}\n")
    return ids_in(build(Request("features", folder / "all.npz", name="t", labels=(table,)), folder / "data")[1])


def listed_file(folder, written, stored):
    save(folder / stored / f"{stored}.npy", np.ones(2))
    labels(folder, f"file_name\n{written}/{written}.npy\n", "metadata.csv")
    _, found = build(Request("features", folder, name="t"), folder / "data")
    return list(found["train"]) == [COMPOSED]


def column(folder, written, stored):
    table = labels(matrices(folder, "x", ids="a"), f"id,{stored}\na,1.5\n")
    layout = Layout(label=(written,))
    source = formats.open_source(Request("features", folder, name="t", labels=(table,), layout=layout))
    return source.annotations["train"].label.tolist() == [1.5]


def group(folder, written, stored):
    rows = "".join(f"{i},{name},train\n" for i, name in enumerate((written, stored, "b", "c")))
    labels(matrices(folder, "x", ids="0123"), f"id,group,split\n{rows}")
    cut = by_group(formats.open_source(Request("features", folder, name="t")).annotations["train"], 3, 0, where="t")
    return sorted(len(a.ids) for a in cut.values()) == [1, 1, 2]


def group_of_a_source(folder, written, stored):
    class Two(Faces):
        def examples(self, split):
            return (
                dataclasses.replace(e, group=written if split == "train" else stored) for e in super().examples(split)
            )

    with pytest.raises(ConclugenError, match="splits 'train' and 'validation' have 1 group in common"):
        builders.build(Two((2, 1, 1)), folder, strict=True)
    return name_hash(written) == name_hash(stored) != name_hash("zoe_u")


MEETINGS = [clip_by_id, clip_in_a_row, clip_in_a_folder, file_of_an_id, row_of_an_id, array_of_an_id, listed_file]
MEETINGS += [column, group, group_of_a_source]


@pytest.mark.parametrize("meet", MEETINGS, ids=lambda meet: meet.__name__)
@pytest.mark.parametrize(("written", "stored"), PAIRS, ids=lambda name: ascii(name))
def test_names_are_the_same_however_their_accents_are_spelled(tmp_path, meet, written, stored):
    assert meet(tmp_path, written, stored)


def test_two_spellings_of_a_name_are_one_name_twice(tmp_path):
    for spelled in (COMPOSED, APART):
        save(tmp_path / "x" / f"{spelled}.npy", np.ones(2))
        (tmp_path / f"{spelled}.mp4").write_bytes(b"x")
    with pytest.raises(ConclugenError, match=r"its name '.*' is also that of"):
        clips_lib.find("clips", tmp_path)
    with pytest.raises(ConclugenError, match=r"the same name as .*, with accents composed otherwise; remove one"):
        FolderFeatures(tmp_path / "x", how="").locate("train", [COMPOSED])
    matrices(tmp_path / "m", "x", ids=[COMPOSED, APART])
    refused("id .* appears twice", tmp_path / "m")
    table = labels(matrices(tmp_path / "t", "x", ids=["a", COMPOSED]), f"id\n{COMPOSED}\n{APART}\n")
    with pytest.raises(ConclugenError, match="ids must be unique within a split"):
        build(Request("features", tmp_path / "t", name="t", labels=(table,)), tmp_path / "data")
