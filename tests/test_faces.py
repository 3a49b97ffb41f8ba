"""Faces are found where facenet-pytorch finds them, followed over time, and cropped; clips without one are named."""

import json
import os
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from conclugen_jax.extract import backbones, faces, preparation
from conclugen_jax.extract.backbones import Networks
from conclugen_jax.extract.media import decoding as media
from conclugen_jax.extract.media.clip import Clip
from conclugen_jax.extract.networks import mtcnn, weights
from conclugen_jax.extract.utterance import Utterance

CLIPS = Path(os.environ.get("CONCLUGEN_SHARED", Path(__file__).parents[2] / "shared")) / "data" / "clips"
BOXES = json.loads((Path(__file__).parent / "parity" / "boxes.json").read_text())
"""By facenet-pytorch 2.6.0, of real clips: clip -> for each frame (one a second) [x, y, x, y, probability] of each face."""

needs_clips = pytest.mark.skipif(not CLIPS.is_dir(), reason="needs the real clips beside the repository")


@pytest.fixture(scope="module")
def params():
    return weights.load(mtcnn.WEIGHTS).params


@needs_clips
@pytest.mark.parametrize("name", BOXES)
def test_boxes_are_those_of_facenet_pytorch(params, name):
    frames = np.stack(media.decode(CLIPS / name, sound=False).at_rate(1.0))
    found = mtcnn.detect(params, frames)
    assert [len(each) for each in found] == [len(each) for each in BOXES[name]]
    for each, expected in zip(found, BOXES[name], strict=True):
        for face, (*box, probability) in zip(each, sorted(expected, key=lambda b: -b[4]), strict=True):
            np.testing.assert_allclose(face[:4], box, atol=0.01)  # pixels
            assert face[4] == pytest.approx(probability, abs=1e-4)


def test_nothing_is_found_where_nothing_is(params):
    noise = np.random.default_rng(0).integers(0, 256, (2, 90, 120, 3), dtype=np.uint8)
    for images in (np.zeros((3, 60, 80, 3), np.uint8), np.zeros((1, 10, 80, 3), np.uint8), noise):
        assert [each.shape for each in mtcnn.detect(params, images)] == [(0, 5)] * len(images)
    assert mtcnn.detect(params, noise[:0]) == []


@pytest.mark.parametrize("network", mtcnn.NETWORKS)
def test_networks_in_numpy_are_those_in_flax(params, network):
    module, side = mtcnn.NETWORKS[network]
    rng, shapes = np.random.default_rng(0), [(side, side)]
    shapes += [(side, side + 1), (side + 1, side), (33, 50)] if network == "pnet" else []  # maxima reach over the edge
    for shape in shapes:
        x = rng.uniform(-1, 1, (3, *shape, 3)).astype(np.float32)
        expected = module.apply({"params": params[network]}, x)[:2]
        probability, regression = mtcnn.run(network, params[network], np.moveaxis(x, -1, 0))
        np.testing.assert_allclose(probability, expected[0], atol=1e-5)
        np.testing.assert_allclose(np.moveaxis(regression, 0, -1), expected[1], atol=1e-5)


def test_images_are_resized_by_averages():
    image = np.random.default_rng(0).integers(0, 256, (7, 10, 3), dtype=np.uint8)
    sums = mtcnn._sums(image)
    (crop,) = np.moveaxis(mtcnn._crops(sums, np.array([[3, 2, 9, 6]]), 3), 0, -1)
    whole = np.moveaxis(mtcnn._resized(sums, (4, 3))[:, 0], 0, -1)
    rows, columns = ((0, 2), (1, 4), (3, 5)), ((0, 3), (2, 5), (4, 7))  # a pixel may count in two
    for i, j in np.ndindex(3, 3):
        cell = image[1:6, 2:9][slice(*rows[i]), slice(*columns[j])]
        np.testing.assert_allclose(crop[i, j], (cell.mean(axis=(0, 1)) - 127.5) / 128, rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(whole[3, 2], (image[5:, 6:].mean(axis=(0, 1)) - 127.5) / 128, rtol=1e-5, atol=1e-6)


@needs_clips
def test_two_faces_give_the_most_probable_one(params):
    one, other = (media.decode(CLIPS / name, sound=False).frames[0] for name in ("bbaf2n.mpg", "swiz3n.mpg"))
    both = np.concatenate([one[:, 20:340], other[:, 20:340]], axis=1)  # as wide as frames are searched
    found = mtcnn.detect(params, both[None])[0]
    assert len(found) == 2
    assert set(found[:, 0] > 320) == {True, False}
    assert found[0, 4] >= found[1, 4]
    (box,) = faces.find(params, [both])
    np.testing.assert_allclose(box * np.tile(both.shape[1::-1], 2), found[0, :4], rtol=1e-6)


@needs_clips
def test_large_frames_are_searched_at_a_smaller_size(params):
    frame = media.decode(CLIPS / "bbaf2n.mpg", sound=False).frames[0]
    (small,) = faces.find(params, [frame])
    (large,) = faces.find(params, [faces.resize(frame, (1440, 1152))])
    np.testing.assert_allclose(large, small, atol=8 / 360)


def box(x, y, side=10.0):
    return np.array([x, y, x + side, y + side])


def times_of(tracks):
    return [[time for time, _ in track] for track in tracks]


def test_boxes_that_overlap_are_one_track():
    tracks = faces.follow([0, 0.5, 1.0, 1.5], [box(0, 0), box(3, 0), box(50, 50), box(52, 50)])
    assert times_of(tracks) == [[0, 0.5], [1.0, 1.5]]


def test_a_face_may_be_missed_for_a_while():
    tracks = faces.follow([0, 1, 2, 6], [box(0, 0), None, box(1, 0), box(2, 0)])
    assert times_of(tracks) == [[0, 2], [6]]
    assert faces.follow([0, 1], [None, None]) == []


def test_overlap_by_hand():
    assert faces.overlap(box(0, 0), box(0, 0)) == 1
    assert faces.overlap(box(0, 0), box(5, 0)) == pytest.approx(50 / 150)
    assert faces.overlap(box(0, 0), box(10, 0)) == 0


def test_frames_are_cropped_to_the_box_of_their_track():
    frames = [np.zeros((100, 100, 3), np.uint8) for _ in range(8)]
    for i, frame in enumerate(frames):
        frame[20:40, 30:50] = 10 * (i + 1)
    clip = Clip(frames, np.arange(8) * 1.0, 1.0, None)
    cropped = faces.crop(clip, [np.array([0.3, 0.2, 0.5, 0.4]), None], [1, 4], size=16)
    assert cropped.times.tolist() == [0, 1, 2]  # the others are more than a second away
    assert [f.shape for f in cropped.frames] == [(16, 16, 3)] * 3
    assert [round(float(f[8, 8, 0])) for f in cropped.frames] == [10, 20, 30]
    over_the_edge = faces.crop(clip, [np.array([-0.2, -0.2, 5, 5])], [1], size=16)
    assert over_the_edge.frames[0].shape == (16, 16, 3)


def test_a_track_is_cropped_to_what_holds_all_of_its_boxes():
    frames = list(np.random.default_rng(0).integers(0, 256, (2, 100, 100, 3), dtype=np.uint8))
    boxes = [box(0, 0) / 100, box(3, 2) / 100]
    cropped = faces.crop(Clip(frames, np.arange(2) / 2, 2.0, None), boxes, [0, 1], size=16)
    for frame, found in zip(frames, cropped.frames, strict=True):
        np.testing.assert_array_equal(found, faces.resize(frame, (16, 16), (0, 0, 13, 12)))


def test_frames_of_another_size_are_cropped_at_the_same_part():
    frames = [np.zeros((100, 200, 3), np.uint8), np.zeros((50, 100, 3), np.uint8)]
    frames[0][20:40, 60:80] = 200
    frames[1][10:20, 30:40] = 200
    clip = Clip(frames, np.arange(2) / 2, 2.0, None)
    cropped = faces.crop(clip, [np.array([0.3, 0.2, 0.4, 0.4])], [0], size=10)
    assert [f[1:-1, 1:-1].min() for f in cropped.frames] == [200, 200]


@needs_clips
def test_boxes_are_parts_of_the_frame(params):
    path = CLIPS / "bbaf2n.mpg"
    found = prepared(path)
    frame = media.decode(path, sound=False).frames[0]
    expected = mtcnn.detect(params, frame[None])[0][0, :4]
    height, width = frame.shape[:2]
    assert height != width
    np.testing.assert_allclose(found.boxes[0], [0.0, *(expected / [width, height, width, height])], rtol=1e-6)


def prepared(path, **options):
    networks = backbones.load(Networks((), ("tests.own_backbones:pictures", "tests.own_backbones:loudness")))
    how = preparation.recipe(networks, faces=str(mtcnn.WEIGHTS), **options)
    return preparation.prepare(Utterance("a", "", str(path)), how, 1)


@needs_clips
def test_a_face_that_leaves_the_picture():
    found = prepared(CLIPS / "face_then_none.mov")
    assert not found.failure
    assert any(note.startswith("no face in ") for note in found.notes)
    items = found.views[0]["pictures"][0]
    assert 4 <= len(items) <= 9  # of 13 at two a second: the face is there for three seconds
    assert found.boxes


def test_a_clip_without_a_face(tmp_path):
    from tests import clips as made

    path = made.write(tmp_path / "a.mkv", made.steady(1.0), sound=made.tone(1.0))
    dropped = prepared(path)
    assert "no face was found; take a clip that shows one, or whole frames by conclugen extract --no" in dropped.failure
    whole = prepared(path, no_face="whole")
    assert whole.views[0].keys() == {"pictures", "loudness"}
    assert "no face was found" in whole.notes
    missing = prepared(path, no_face="missing")
    assert missing.views[0].keys() == {"loudness"}
    assert "no video" in missing.notes
    silent = made.write(tmp_path / "b.mkv", made.steady(1.0))
    assert "lacks audio and video" in prepared(silent, no_face="missing").failure


def test_faces_do_not_depend_on_what_backbones_look_at(tmp_path, monkeypatch):
    from tests import clips as made

    numbers = [i // 5 for i in range(150)]  # five a second, for six seconds
    path = made.write(tmp_path / "a.mkv", made.steady(6.0), images=[made.image(n) for n in numbers])
    looked, seen = [], {}

    def find(params, frames):
        looked.append([made.number_of(frame) for frame in frames])
        return [np.array([n, 4.0, n + 20, 40]) if n < 15 else None for n in looked[-1]]  # three seconds

    monkeypatch.setattr(faces, "find", find)
    for rate in (1.0, 2.0, 10.0, 16.0, 25.0):

        def prepare(clip, view, rate=rate):
            seen[rate] = clip
            return (np.zeros((1, 1), np.float32),)

        backbone = backbones.Backbone("b", "video", 1, prepare, None, rate=rate)
        found = preparation.prepare(
            Utterance("a", "", str(path)), preparation.recipe([backbone], faces=str(mtcnn.WEIGHTS)), 1
        )
        assert looked[-1] == [0, 2, 5, 7, 10, 12, 15, 17, 20, 22, 25, 27]  # twice a second
        assert [b[0] for b in found.boxes] == pytest.approx([0, 0.5, 1.0, 1.5, 2.0, 2.5], abs=0.05)
    first = seen[1.0].at_rate(1.0)
    assert len(first) == 4  # up to a second after the last face
    for clip in seen.values():
        np.testing.assert_array_equal(clip.at_rate(1.0), first)
    assert len(seen[16.0].frames) == 3.5 * 16 + 1
    assert max(seen[16.0].times) == 3.5


@pytest.mark.parametrize(("probability", "expected"), [(0.899, False), (0.901, True)])
def test_faces_that_are_doubtful_are_not_followed(monkeypatch, probability, expected):
    monkeypatch.setattr(mtcnn, "detect", lambda params, images, *least: [np.array([[1.0, 2, 30, 40, probability]])])
    (box,) = faces.find({}, [np.zeros((64, 64, 3), np.uint8)])
    assert (box is not None) is expected


@needs_clips
def test_smaller_faces_are_not_looked_for_while_one_is_followed(params, monkeypatch):
    frames = media.decode(CLIPS / "face_then_none.mov", rates=(2.0,), sound=False).frames[:7]  # the face leaves
    followed = faces.find(params, frames)
    monkeypatch.setattr(faces, "LEAST", 0.0)
    for box, expected in zip(followed, faces.find(params, frames), strict=True):
        assert (box is None) == (expected is None)
        assert box is None or np.abs(box - expected).max() < 1e-5
    sides = [[len(mtcnn.detect(params, frames[0][None], least)[0])] for least in (20, 150, 541)]
    assert sides == [[1], [1], [0]]


def test_where_the_followed_face_is_not_all_are_looked_for(monkeypatch):
    looked, there = [], [[20, 20, 60, 60], [22, 20, 66, 60], [0, 0, 10, 10]]

    def detect(params, images, least=20):
        looked.append((int(images[0, 0, 0, 0]), least))
        return [np.array([[*there[images[0, 0, 0, 0]], 0.99]])]

    monkeypatch.setattr(mtcnn, "detect", detect)
    found = faces.find({}, [np.full((80, 160, 3), i, np.uint8) for i in range(3)])
    np.testing.assert_allclose(np.stack(found) * (160, 80, 160, 80), there)
    assert looked == [(0, 20), (1, pytest.approx(12)), (2, pytest.approx(0.3 * 44)), (2, 20)]


@pytest.mark.parametrize("box", [(10.3, 5.2, 90.7, 65.1), (0.0, 0.0, 11.5, 9.0), (80.2, 50.9, 120.0, 70.0)])
def test_a_part_of_a_frame_is_resized_as_pillow_does(box):
    frame = np.random.default_rng(0).integers(0, 256, (70, 120, 3), dtype=np.uint8)
    expected = np.asarray(Image.fromarray(frame).resize((24, 16), Image.Resampling.BILINEAR, box)).astype(int)
    assert np.abs(faces.resize(frame, (24, 16), box) - expected).max() <= 1


def test_a_face_is_followed_from_its_last_box():
    boxes = [box(0, 0), box(6, 0), box(12, 0), box(0, 0)]  # the last one leaps back into what was covered before
    assert times_of(faces.follow([0, 0.5, 1.0, 1.5], boxes)) == [[0, 0.5, 1.0], [1.5]]
