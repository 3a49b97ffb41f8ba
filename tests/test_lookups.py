"""A name finds what all of it says, and nothing else in its place; of one that finds nothing the message says why."""

import time
import types

import numpy as np
import pytest

from conclugen_jax.commands import names
from conclugen_jax.data import formats, manifest, matching
from conclugen_jax.data.formats import open_features
from conclugen_jax.data.inspection_view import describe
from conclugen_jax.data.requests import Request
from conclugen_jax.data.sources import Annotations
from conclugen_jax.errors import ConclugenError
from conclugen_jax.extract import backbones, clips as clips_lib, listings, outcome
from conclugen_jax.extract.media import speech
from conclugen_jax.extract.networks import weights
from conclugen_jax.runs import checkpoint, configuration_files
from tests import clips
from tests.helpers import run
from tests.layouts import build, matrices, save
from tests.test_clips import touch
from tests.test_extract import extract

FILES = (
    "001.mp4",
    "ben/001.mp4",
    "one/anna/002.mp4",
    "two/anna/002.avi",
    "S1.mp4",
    "S2.E1.mp4",
    "b.wav",
    "b.mp4",
    "c.wav",
)
CELLS = {  # what a cell says -> the clips that it may mean
    "001": ["001.mp4"],  # its whole path
    "001.mp4": ["001.mp4"],
    "./001.mp4": ["001.mp4"],
    "ben/001": ["ben/001.mp4"],
    "ben\\001.mp4": ["ben/001.mp4"],  # as Windows writes it
    "videos/ben/001.mp4": ["ben/001.mp4"],
    "anna/001.mp4": [],
    "videos/anna/002": [],
    "anna/002": ["one/anna/002.mp4", "two/anna/002.avi"],
    "anna/002.avi": ["two/anna/002.avi"],
    "one/anna/002.mov": ["one/anna/002.mp4"],  # endings of films and sound may differ
    "S1": ["S1.mp4"],
    "S1.E2": [],
    "S1.E2.mp4": [],
    "S2.E1": ["S2.E1.mp4"],
    "S2": [],
    "b": ["b.mp4"],  # pictures come first
    "b.wav": ["b.wav"],
    "c.mp4": ["c.wav"],
    "../videos/001.mp4": [],
    "s1": [],
}


@pytest.mark.parametrize("cell", CELLS)
def test_cells_find_the_clips_that_they_say(tmp_path, cell):
    source = touch(tmp_path / "videos", *FILES)
    table = tmp_path / "labels.csv"
    table.write_text(f"id,video,start,end\nright,001.mp4,0,1\nasked,{cell},0,1\n")
    if len(CELLS[cell]) > 1:
        with pytest.raises(
            ConclugenError, match=r"labels\.csv, line 3: video .* is .*002\.\w+ or .*002\.\w+; write its path"
        ):
            clips_lib.find("clips", source, labels=(table,))
        return
    asked, _ = clips_lib.find("clips", source, labels=(table,))
    if CELLS[cell]:
        assert (asked.path, asked.problem) == (str(source / CELLS[cell][0]), "")
    else:
        assert asked.problem == f"{table}, line 3: video {cell!r} is not there"


def test_a_path_from_the_root_is_that_clip_alone(tmp_path):
    source = touch(tmp_path / "videos", *FILES)
    table = tmp_path / "labels.csv"
    table.write_text(f"id,video,start,end\na,{source}/ben/001.mp4,0,1\nb,/elsewhere/ben/001.mp4,0,1\n")
    first, second = clips_lib.find("clips", source, labels=(table,))
    assert (first.path, second.problem[-40:]) == (
        f"{source}/ben/001.mp4",
        "video '/elsewhere/ben/001.mp4' is not there"[-40:],
    )


def test_many_clips_of_one_name_are_found_in_linear_time(tmp_path):
    touch(tmp_path, *(f"{i:04d}/front/1.mp4" for i in range(1500)))
    rows = [f"{i},{i % 3000:04d}/front/1,{i},{i + 1}" for i in range(6000)]  # half of them are not there
    (tmp_path / "labels.csv").write_text("\n".join(["id,video,start,end", *rows]))
    begin = time.process_time()
    found = clips_lib.find("clips", tmp_path, labels=(tmp_path / "labels.csv",))
    assert time.process_time() - begin < 5
    paths = {u.key: u.path for u in found if not u.problem}
    assert paths == {str(i): str(tmp_path / f"{i % 3000:04d}/front/1.mp4") for i in range(6000) if i % 3000 < 1500}


def test_listed_files_are_those_alone(tmp_path):
    touch(tmp_path, "ben/001.mp4", "S1.mp4", "a.avi")
    (tmp_path / "metadata.csv").write_text("file_name\nben/001.mp4\nanna/001.mp4\nS1.E2.mp4\na.mp4\n")
    found = clips_lib.find("clips", tmp_path, listing=listings.metadata(tmp_path).table)
    assert {u.key: u.problem.partition(": ")[2] for u in found} == {
        "ben_001": "",
        "anna_001": "file 'anna/001.mp4' is not there",
        "S1.E2": "file 'S1.E2.mp4' is not there",
        "a": "file 'a.mp4' is not there",
    }


def array(folder, name):
    np.savez(folder / "all.npz", ids=["a"], x=np.ones((1, 2)))
    return open_features(f"{folder}/all.npz:{name}", "mean")


def modality(folder, name):
    return formats.open_source(Request("features", matrices(folder, "x"), name="t", only=(name,)))


def convert(folder, network):
    return weights.convert(network, folder / "a.pth", folder / "b")


OTHERS = {  # a name with a part too many, or spelled otherwise than what is there -> what looks for it
    "x:more": lambda folder, name: (
        save(folder / "x" / "a.npy", np.ones(2)),
        open_features(f"{folder}/{name}", "mean"),
    ),
    "x.npy:more": lambda folder, name: (matrices(folder, "x"), open_features(f"{folder}/{name}", "mean")),
    "X": modality,
    "x.npy": modality,
    "x.more": array,
    "demo.yaml": lambda folder, name: configuration_files.find(name),
    "configs/demo": lambda folder, name: configuration_files.find(name),
    "tests.own_backbones:pictures:more": lambda folder, name: backbones.load_own(name),
    "elsewhere.own_backbones:pictures": lambda folder, name: backbones.load_own(name),
    "resnet152.pth": convert,
    "weights/resnet152": lambda folder, name: weights.load(folder / name),
    "pocketsphinx:model": lambda folder, name: speech.create(name),
    "build.py": lambda folder, name: names.find(name),
    "Video": lambda folder, name: manifest.choose(["video"], [name], what="modality", where="mine"),
    "video.x": lambda folder, name: manifest.choose(["video"], [name], what="modality", where="mine"),
}


@pytest.mark.parametrize("name", OTHERS)
def test_names_with_a_part_too_many_find_nothing_else(tmp_path, name):
    with pytest.raises(ConclugenError):
        OTHERS[name](tmp_path, name)


@pytest.mark.parametrize("step", ["04", "4.0", "checkpoints/4", "step 4", "Newest"])
def test_steps_are_found_as_they_are_written(step):
    manager = types.SimpleNamespace(best_step=lambda: None)
    saved = types.SimpleNamespace(steps=lambda: [4], workdir="runs/a", _manager=manager)
    assert checkpoint.Checkpoints.find(saved, "4") == checkpoint.Checkpoints.find(saved, 4) == 4
    with pytest.raises(
        ConclugenError, match=f"runs/a: no checkpoint '{step}'; there are 'newest', 'best' and the steps 4"
    ):
        checkpoint.Checkpoints.find(saved, step)


ALIKE = {
    ("c0.mp4", "c0"): "an ending",
    ("c0", "c0.npy"): "an ending",
    ("1.0", "1"): "an ending",
    ("0", "000"): "leading zeros",
    ("dia1_utt02", "dia01_utt2"): "leading zeros",
    ("7.npy", "007"): "an ending and leading zeros",
    ("Anna_1", "anna_1"): "capitals",
    ("anna/1", "anna_1"): "'_' or '-' for '/' or a space",
    ("S1.E2", "S1"): "an ending",
}


@pytest.mark.parametrize(("written", "stored"), ALIKE)
def test_of_an_id_that_is_not_there_the_difference_is_said(tmp_path, written, stored):
    assert matching.likeness([written], ["other", stored]) == (
        f"there is {stored!r} for {written!r}, which differs by {ALIKE[written, stored]}"
    )
    assert matching.likeness([written], ["other", "100"]) == ""


def test_a_name_is_shown_where_it_comes_near_or_no_id_finds_one(tmp_path):
    features = formats.open_features(str(matrices(tmp_path, "x", ids="abc") / "x.npy"), "mean")

    def compared(*ids):
        return matching.compare(features, {"train": Annotations(ids, [""] * len(ids), None, {}, ids)})

    assert compared("a", "b", "lost") == (1, "")
    assert compared("a", "b", "C") == (1, "there is 'c' for 'C', which differs by capitals")
    assert compared("lost", "gone") == (3, "there are such as 'a'")


def test_a_build_says_how_ids_differ(tmp_path):
    source = matrices(tmp_path / "t", "x", ids=["000", "001", "002"])
    (source / "labels.csv").write_text("id,label\n0,x\n1,y\n002,x\n")
    remark = "there is '000' for '0', which differs by leading zeros"
    request = Request("features", source, name="t")
    with pytest.raises(ConclugenError, match=f"id '0', no modality is present; .*; x: {remark}; repair them"):
        build(request, tmp_path / "data")
    dataset, found = build(request, tmp_path / "data", drop_bad=True)
    assert list(found["train"]) == ["002"]
    assert dataset.manifest.source["alike"] == {"x": remark}
    assert f"x: some ids of the labels are not there; {remark}" in describe(dataset.path)
    shown = run("inspect", f"--data={dataset.path}").stdout
    assert remark in " ".join(shown.split())
    matrices(source, "y", ids=["0", "1", "anna"])
    none = "'x' is in none of the 2 examples; compare its ids with those of the labels"
    for ids, told in ((("0", "1"), remark), (("0", "anna"), remark), (("anna",), "there are such as '000'")):
        (source / "labels.csv").write_text("\n".join(["id", *ids]) + "\n")
        with pytest.raises(ConclugenError, match=rf"{none.replace('2', str(len(ids)))} \({told}\), or leave"):
            build(request, tmp_path / "other")


def test_extraction_says_how_ids_differ(tmp_path):
    source = tmp_path / "videos"
    source.mkdir()
    for i in range(3):
        clips.write(source / f"00{i}.mkv", clips.steady(0.2))
    told = "there is '000' for '0.mp4', which differs by an ending and leading zeros"
    table = tmp_path / "labels.csv"
    table.write_text("id\n0.mp4\n1.mp4\n")
    with pytest.raises(
        ConclugenError, match=f"the labels name '0.mp4' in train, but no clip has this name; {told}; ids"
    ):
        extract(source, tmp_path / "data", labels=(table,))
    table.write_text("id\n0.mp4\nanna\n002\n")
    folder, tally = extract(source, tmp_path / "data", labels=(table,))
    assert f"2 ids of the labels match no clip; {told}" in outcome.lines(tally, folder, 3)
    table.write_text("id\nanna\n")
    with pytest.raises(
        ConclugenError, match="no clip has this name; clips have names such as '000'; ids are paths with _ for /"
    ):
        extract(source, tmp_path / "data", labels=(table,))
