"""The picture of predictions shows each probability as the part of a bar, and each utterance at its time."""

import numpy as np
import pytest
from PIL import Image, ImageColor

from conclugen_jax.errors import ConclugenError
from conclugen_jax.extract import timeline
from conclugen_jax.extract.prediction import Prediction

CLIP = "nowhere/a.mkv"
PALE, MARK, GREY = (ImageColor.getrgb(colour) for colour in (timeline.PALE, timeline.MARK, timeline.GREY))


def drawn(folder, *predictions):
    """Pixels of the picture [height, width, 3]."""
    timeline.draw(predictions, folder / "picture.png")
    with Image.open(folder / "picture.png") as image:
        return np.asarray(image.convert("RGB"))


def is_of(pixels, *colours):
    return np.any([(pixels == colour).all(axis=-1) for colour in colours], axis=0)


def pale_rows(image):
    """Bars and axes from top to bottom: the rows of each, which are those with something pale."""
    rows = np.flatnonzero(is_of(image, PALE).any(axis=1))
    return np.split(rows, np.flatnonzero(np.diff(rows) > 1) + 1)


def bars(image):
    """Pixels of the middle row of each bar, from its left end to its right end."""
    found = []
    for rows in pale_rows(image):
        line = image[rows[len(rows) // 2]]
        right = np.flatnonzero(is_of(line, PALE))[-1]
        outside = np.flatnonzero(~is_of(line, PALE, MARK, GREY)[:right])
        found.append(line[outside[-1] + 1 : right + 1])
    return found


def axis(image, length, seconds):
    """Colour of the time axis, a row of it above all words, at some seconds of a clip."""
    left, right = timeline.MARGIN, timeline.WIDTH - timeline.MARGIN
    line = image[pale_rows(image)[0][0]]
    return [tuple(line[round(left + (right - left) * at / length)].tolist()) for at in seconds]


def test_the_half_of_a_bar_is_reached_by_likely_classes_alone(tmp_path):
    first, second = bars(drawn(tmp_path, Prediction(CLIP, 0, 0, None, ("joy", "fear"), (0.9, 0.1), ("joy",))))
    assert tuple(first[len(first) // 2]) == MARK
    assert tuple(second[len(second) // 2]) == PALE


def test_bars_are_as_long_as_the_probabilities_in_the_order_of_the_classes(tmp_path):
    probability = (0.15, 0.6, 0.25)
    found = bars(drawn(tmp_path, Prediction(CLIP, 0, 0, "words", ("joy", "fear", "anger"), probability, ("fear",))))
    filled = [1 - is_of(bar, PALE).mean() for bar in found]
    np.testing.assert_allclose(filled, probability, atol=2 / min(map(len, found)))
    assert len({len(bar) for bar in found}) == 1
    assert [tuple(bar[0]) for bar in found] == [GREY, MARK, GREY]


def test_every_label_that_is_predicted_is_marked(tmp_path):
    found = bars(drawn(tmp_path, Prediction(CLIP, 0, 0, None, ("a", "b", "c"), (0.7, 0.2, 0.8), ("a", "c"))))
    assert [tuple(bar[0]) for bar in found] == [MARK, GREY, MARK]


@pytest.mark.parametrize(("start", "end"), [(2.0, 4.0), (1.0, 4.0), (0.0, 4.0)])
def test_an_utterance_begins_on_the_axis_when_it_begins_in_the_clip(tmp_path, start, end):
    image = drawn(tmp_path, Prediction(CLIP, start, end, None, ("joy", "fear"), (0.9, 0.1), ("joy",)))
    seconds = [0.1, 0.9, 1.1, 1.9, 2.1, 3.9]
    assert axis(image, end, seconds) == [MARK if at > start else PALE for at in seconds]


def test_utterances_that_failed_are_grey_on_the_axis_and_pauses_pale(tmp_path):
    heard = Prediction(CLIP, 1.0, 2.0, None, ("joy", "fear"), (0.9, 0.1), ("joy",))
    image = drawn(tmp_path, heard, Prediction(CLIP, 3.0, 4.0, failure="too dark"))
    expected = [PALE, MARK, PALE, GREY]
    assert axis(image, 4.0, [0.5, 1.5, 2.5, 3.5]) == expected


def test_a_clip_of_unknown_length_has_no_axis(tmp_path):
    for end, axes in ((0.0, 0), (2.0, 1)):
        image = drawn(tmp_path, Prediction(CLIP, 0.0, end, None, ("joy", "fear"), (0.9, 0.1), ("joy",)))
        assert len(pale_rows(image)) == 2 + axes


def test_names_of_several_lines_are_drawn_in_one(tmp_path):
    image = drawn(tmp_path, Prediction("new\nline.mkv", 0, 2, "a\nb", ("jo\ny",), (0.5,), ("jo\ny",)))
    assert len(bars(image)) == 2  # the axis, and the class


def test_more_utterances_than_a_picture_holds_are_refused(tmp_path):
    many = [Prediction(CLIP, i, i + 1) for i in range(timeline.MOST + 1)]
    with pytest.raises(ConclugenError, match=r"picture\.png: 301 utterances, a picture shows 300 at most"):
        timeline.draw(many, tmp_path / "picture.png")


def test_a_picture_that_cannot_be_written_leaves_the_one_before(tmp_path, monkeypatch):
    (tmp_path / "a.png").write_bytes(b"before")

    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("os.fsync", full)
    with pytest.raises(ConclugenError, match=r"No space left on device.*another --picture"):
        timeline.draw([Prediction(CLIP, 0, 1)], tmp_path / "a.png")
    assert [p.name for p in tmp_path.iterdir()] == ["a.png"]
    assert (tmp_path / "a.png").read_bytes() == b"before"
