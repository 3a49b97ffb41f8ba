"""The networks of face-api give what face-api gives, come with the package, and are backbones like any other."""

import dataclasses

import numpy as np
import pytest

from conclugen_jax.data import manifest
from conclugen_jax.errors import ConclugenError
from conclugen_jax.extract import backbones, preparation, ready
from conclugen_jax.extract.backbones import Networks, Options
from conclugen_jax.extract.networks import face_api, mtcnn
from conclugen_jax.extract.utterance import Utterance
from conclugen_jax.extract.vectors import vectors
from tests import clips
from tests.parity import seeded
from tests.test_extract import extract
from tests.test_faces import CLIPS, needs_clips
from tests.test_networks import close
from tests.test_torch_files import FILES

REFERENCES = np.load(FILES.parent / "face_api.npz")
"""By @vladmandic/face-api 1.7.15 under node, of the pictures of seeded.faces()."""
BOTH = ("face_expression", "face_landmarks")


def loaded(*names, **options):
    return backbones.load(Networks((), names, Options(**options)))


def normalized(points):
    """Points [n, 136] without place and size, by NumPy."""
    points = np.asarray(points, np.float64).reshape(-1, 68, 2)
    points = points - points.mean(axis=1, keepdims=True)
    return (points / np.linalg.norm(points[:, 45] - points[:, 36], axis=1)[:, None, None]).reshape(-1, 136)


def test_vectors_are_those_of_face_api():
    expression, landmarks = loaded(*BOTH, batch_items=3)
    assert (expression.modality, expression.dim, landmarks.modality, landmarks.dim) == ("video", 263, "landmarks", 136)
    found = np.asarray(expression.vectors(seeded.faces()))
    close(found[:, :256], REFERENCES["face_expression features"])
    close(found[:, 256:], REFERENCES["face_expression outputs"])
    close(landmarks.vectors(seeded.faces()), normalized(REFERENCES["face_landmarks outputs"]))


@pytest.mark.parametrize("name", BOTH)
def test_bfloat16_is_near(name):
    exact, near = (
        np.asarray(loaded(name, precision=p, batch_items=3)[0].vectors(seeded.faces())) for p in ("float32", "bfloat16")
    )
    assert near.dtype == np.float32
    assert 1e-5 < np.abs(near - exact).max() / np.abs(exact).max() < 0.05


def test_points_have_neither_place_nor_size():
    points = np.random.default_rng(0).normal(size=(4, 136)).astype(np.float32)
    close(face_api.normalized(points), normalized(points))
    close(face_api.normalized(5 * points + np.tile([3.0, -2.0], 68)), normalized(points))


def test_faces_are_seen_four_times_a_second(tmp_path):
    path = clips.write(tmp_path / "a.mkv", clips.steady(2.0))
    backbone = loaded("face_expression")[0]
    found = preparation.prepare(Utterance("a", "", str(path)), preparation.recipe([backbone]), 1)
    (faces,) = found.views[0]["face_expression"]
    assert (faces.shape, faces.dtype) == ((8, 112, 112, 3), np.uint8)
    assert backbone.rate == backbone.provenance["frames_per_second"] == 4


@pytest.mark.parametrize("names", [BOTH, BOTH[1:]])
def test_faces_need_neither_sound_nor_words(tmp_path, monkeypatch, names):
    monkeypatch.setattr(preparation, "recogniser", lambda name: lambda sound: pytest.fail("listened"))
    path = clips.write(tmp_path / "a.mkv", clips.steady(1.0), sound=clips.tone(1.0))
    how = preparation.recipe(loaded(*names), recogniser="some")
    assert preparation.prepare(Utterance("a", "", str(path)), how, 1).views[0].keys() == set(names)


@needs_clips
@pytest.mark.parametrize("name", ["bbaf2n.mpg", "brbk7n.mpg", "lbax4n.mpg", "swiz3n.mpg"])
def test_neutral_faces_are_neutral_and_have_their_eyes_above_the_mouth(name):
    networks = loaded(*BOTH)
    how = preparation.recipe(networks, faces=str(mtcnn.WEIGHTS))
    ((_, found),) = vectors(preparation.prepared([(Utterance("a", "", str(CLIPS / name)), 1)], how, 0), networks)
    logits = found["video"][0, 256:].astype(np.float64)
    probability = dict(zip(face_api.EXPRESSIONS, np.exp(logits) / np.exp(logits).sum(), strict=True))
    assert probability["neutral"] > 0.9
    points = found["landmarks"].reshape(68, 2)
    right, left, nose, mouth, chin = (
        points[part].mean(axis=0) for part in (slice(36, 42), slice(42, 48), slice(31, 36), slice(48, 68), slice(7, 10))
    )
    assert right[1] < nose[1] < mouth[1] < chin[1]
    assert left[1] < nose[1]
    assert abs(right[1] - left[1]) < 0.1
    assert right[0] < nose[0] < left[0]
    assert np.linalg.norm(points[45] - points[36]) == pytest.approx(1, abs=0.01)  # heads hardly turn


def test_landmarks_are_a_modality_of_a_data_set(tmp_path):
    (tmp_path / "videos").mkdir()
    for name in "ab":
        clips.write(tmp_path / "videos" / f"{name}.mkv", clips.steady(1.0))
    folder, tally = extract(tmp_path / "videos", tmp_path, own=BOTH)
    made = manifest.read(folder)
    assert (tally.done, made.modalities) == (2, {"landmarks": 136, "video": 263})
    facts = made.source["extraction"]["backbones"]
    assert facts["face_expression"]["expressions"] == list(face_api.EXPRESSIONS)
    for name in BOTH:
        assert facts[name]["sha256"] == next(iter(ready.READY[name].files.values()))
        assert facts[name]["source"]["licence"] == "MIT"


def test_an_altered_file_of_the_package_is_refused(monkeypatch):
    entry = dataclasses.replace(
        ready.READY["face_expression"], files=dict.fromkeys(ready.READY["face_expression"].files, "0")
    )
    monkeypatch.setitem(ready.READY, "face_expression", entry)
    with pytest.raises(
        ConclugenError, match=r"face_expression_model\.bin: not the weights of .*reinstall conclugen_jax$"
    ):
        ready.load("face_expression")


def test_the_licence_comes_with_the_weights():
    (path, _) = ready.paths("face_landmarks")
    text = (path.parent / "LICENSE.md").read_text(encoding="utf-8")
    assert "Copyright (c) 2018 Vincent Mühler" in text
    assert "Permission is hereby granted" in text
