"""The picture of expressions shows each probability at its height and time, and where no face was found."""

import dataclasses

import numpy as np
import pytest
from PIL import Image, ImageColor

from conclugen_jax.errors import ConclugenError
from conclugen_jax.extract import curves, expressions, prediction, timeline
from conclugen_jax.extract.media.subtitles import Utterance
from tests.helpers import run
from tests.test_expressions import seen

TOP = curves.HEADING + curves.SIDE + 8  # of the curves, in pixels


def drawn(folder, *found):
    """Pixels of the picture [height, width, 3]."""
    curves.draw(found, folder / "picture.png")
    with Image.open(folder / "picture.png") as image:
        return np.asarray(image.convert("RGB"))


def column(image, seconds, length=4.0):
    """Pixels of the curves at a time, from top to bottom."""
    x = curves.LEFT + (timeline.WIDTH - curves.LEFT - curves.RIGHT) * seconds / length
    return image[TOP : TOP + curves.CURVES + timeline.LINE, round(x)]


def rows_of(pixels, colour, within=40):
    """Rows that are nearly of a colour."""
    return np.flatnonzero(np.abs(pixels.astype(int) - ImageColor.getrgb(colour)).max(axis=-1) < within)


def test_curves_run_where_the_probabilities_are(tmp_path):
    image = drawn(tmp_path, seen())
    happy, sad = (curves.COLOURS[name][0] for name in ("happy", "sad"))
    early, late = column(image, 1.1), column(image, 3.6)
    assert rows_of(early, happy).max() < rows_of(late, happy).min()
    assert rows_of(late, sad).max() < rows_of(late, happy).min()


def test_curves_break_where_no_face_was_found(tmp_path):
    image = drawn(tmp_path, seen())
    assert len(rows_of(column(image, 2.5), timeline.PALE, 2)) > 0.9 * curves.CURVES
    assert len(rows_of(column(image, 1.1), timeline.PALE, 2)) < 10
    for colour, _ in curves.COLOURS.values():
        assert len(rows_of(column(image, 2.5), colour)) == 0
    times, values = curves._points(seen())
    assert np.flatnonzero(np.isnan(times)).tolist() == [8]
    assert np.isnan(values).all(axis=1).tolist() == np.isnan(times).tolist()


def test_curves_of_long_clips_are_means():
    moments = tuple((i / 4, (float(i % 2), *[0.0] * 6)) for i in range(4800))
    times, values = curves._points(dataclasses.replace(seen(), moments=moments, end=1200.0))
    assert len(times) == curves.POINTS
    np.testing.assert_allclose(times[:2], [2.375, 7.375])
    np.testing.assert_allclose(values[:, 0], 0.5)


def test_the_colours_are_far_apart():
    names = seen().classes
    assert set(curves.COLOURS) == set(names)
    assert len(set(curves.COLOURS.values())) == len(names)


def test_words_are_in_their_interval_or_listed_below_where_they_do_not_fit():
    short, long, untimed = Utterance(0, 2, "hello"), Utterance(2, 3, "word " * 20), Utterance(0, None, "all")
    assert curves._listed(seen(words=(short,))) == []
    assert curves._listed(seen(words=(short, long))) == ["1 (0 s) hello", f"2 (2 s) {'word ' * 20}"]
    assert curves._listed(seen(words=(untimed,))) == ["all"]
    many = curves._listed(seen(words=(long,) * 30))
    assert (len(many), many[-1]) == (curves.LISTED + 1, "... and 10 lines more")
    assert curves._listed(seen(words=(long,), end=400.0))[0].startswith("1 (0:02) word")


def test_words_are_drawn_at_their_time(tmp_path):
    image = drawn(tmp_path, seen(words=(Utterance(1, 2, "hello"), Utterance(3, 9, "on and on"))))
    top = TOP + curves.CURVES + 2 * timeline.LINE
    row = image[top + 2]
    scale = (timeline.WIDTH - curves.LEFT - curves.RIGHT) / 4.0
    said = [len(rows_of(row[round(curves.LEFT + t * scale)][None], curves.SPOKEN, 2)) for t in (0.5, 1.5, 2.5, 3.9)]
    assert said == [0, 1, 0, 1]


def test_the_face_is_in_the_middle_of_its_square():
    frame = np.zeros((100, 200, 3), np.uint8)
    frame[30:50, 110:130] = 255
    square = curves._around(frame, (0.55, 0.3, 0.65, 0.5))
    assert square.shape == (30, 30, 3)
    assert (square[5:25, 5:25] == 255).all()
    assert square.sum() == frame.sum()
    assert curves._around(frame, (0.0, 0.0, 1.0, 1.0)).shape == (100, 100, 3)
    assert curves._around(frame, ()) is frame


def test_clips_without_a_face_have_a_heading_alone(tmp_path):
    failed = seen(moments=(), failure="no face was found")
    assert len(drawn(tmp_path, failed)) == curves.HEADING + 2 * timeline.LINE
    assert len(drawn(tmp_path, failed, dataclasses.replace(failed, words=(Utterance(0, 3, "hello"),)))) == 2 * (
        curves.HEADING + 2 * timeline.LINE
    )


def test_names_that_are_no_text_are_drawn_with_escapes(tmp_path):
    drawn(tmp_path, dataclasses.replace(seen(), clip="folder/caf\udce9.mp4"))
    assert timeline.short("caf\udce9.mp4", 90) == r"caf\udce9.mp4"


def test_more_clips_than_a_picture_holds_are_refused(tmp_path):
    with pytest.raises(ConclugenError, match=r"picture\.png: 101 clips, a picture shows 100 at most; name fewer"):
        curves.draw([seen()] * 101, tmp_path / "picture.png")


@pytest.mark.parametrize("flags", [(), ("--checkpoint=run",)])
def test_they_are_refused_before_anything_is_computed(tmp_path, monkeypatch, flags):
    for module, name in ((expressions, "look"), (prediction, "predict")):
        monkeypatch.setattr(module, name, lambda *_, **__: pytest.fail("computed"))
    most = timeline.MOST if flags else curves.MOST
    clips = [tmp_path / f"{i}.mp4" for i in range(most + 1)]
    refused = run("predict", *flags, f"--picture={tmp_path}/picture.png", *clips, code=2)
    assert f"{most + 1} clips, a picture shows {most} at most; name fewer clips" in refused.stderr
