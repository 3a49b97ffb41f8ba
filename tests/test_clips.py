"""Folders of published corpora, subtitles in their formats, augmented views."""

import os
from pathlib import Path

import numpy as np
import pytest

from conclugen_jax.errors import ConclugenError
from conclugen_jax.extract import clips
from conclugen_jax.extract.media import augmentation, subtitles


def touch(folder, *names):
    for name in names:
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(b"x")
    return folder


def found(dataset, folder, **options):
    return {u.place: u for u in clips.find(dataset, folder, **options)}


def test_voxceleb2(tmp_path):
    touch(
        tmp_path,
        "dev/mp4/id00012/21Uxsk56VDQ/00001.mp4",
        "dev/aac/id00012/21Uxsk56VDQ/00001.m4a",
        "dev/mp4/id00015/a_b/00002.mp4",
        "test/mp4/id00017/x/00001.mp4",
    )
    utterances = found("voxceleb2", tmp_path)
    assert sorted(utterances) == ["id00012_21Uxsk56VDQ_00001", "id00015_a_b_00002"]
    assert utterances["id00012_21Uxsk56VDQ_00001"].sound.endswith("aac/id00012/21Uxsk56VDQ/00001.m4a")
    assert utterances["id00015_a_b_00002"].sound == ""
    below = touch(tmp_path / "mp4" / "vox", "mp4/id00012/x/00001.mp4", "aac/id00012/x/00001.m4a")
    assert found("voxceleb2", below)["id00012_x_00001"].sound.endswith("mp4/vox/aac/id00012/x/00001.m4a")


def test_caer(tmp_path):
    touch(tmp_path, "train/Anger/0001.avi", "validation/Sad/0001.avi", "test/Anger/0002.avi")
    assert sorted(found("caer", tmp_path)) == ["test/Anger_0002", "train/Anger_0001", "validation/Sad_0001"]
    touch(tmp_path, "elsewhere/0001.avi")
    with pytest.raises(ConclugenError, match=r"expected train\|validation\|test/CLASS/FILE\.avi"):
        clips.find("caer", tmp_path)


def test_meld(tmp_path):
    touch(
        tmp_path,
        "train_splits/dia0_utt0.mp4",
        "dev_splits_complete/dia0_utt0.mp4",
        "output_repeated_splits_test/dia0_utt0.mp4",
        "output_repeated_splits_test/final_videos_testdia0_utt0.mp4",
    )
    head = "Sr No.,Utterance,Speaker,Emotion,Sentiment,Dialogue_ID,Utterance_ID\n"
    (tmp_path / "train_sent_emo.csv").write_text(head + '1,"Oh my God, no!",Ross,surprise,negative,0,0\n')
    utterances = found("meld", tmp_path)
    assert sorted(utterances) == ["test/dia0_utt0", "train/dia0_utt0", "validation/dia0_utt0"]
    assert utterances["train/dia0_utt0"].text == "Oh my God, no!"
    assert utterances["test/dia0_utt0"].text is None


def test_cmu_mosei(tmp_path):
    touch(tmp_path, "Raw/Videos/Segmented/Combined/abc_0.mp4", "Raw/Videos/Full/Combined/abc.mp4")
    words = tmp_path / "Raw/Transcript/Segmented/Combined/abc.txt"
    words.parent.mkdir(parents=True)
    words.write_text("abc___0___0.0___4.2___I  like it___x\nabc___1___4.2___5.0___no___x\n")
    utterances = found("cmu_mosei", tmp_path)
    assert [(k, u.text) for k, u in utterances.items()] == [("abc_0", "I like it")]
    table = tmp_path / "labels.csv"
    table.write_text("video,start_time,end_time,sentiment,text\nabc,1.5,3,1,hello\nabc,3,4.5,0,\ngone,0,1,0,x\n")
    cut = found("cmu_mosei", tmp_path, labels=(table,))
    assert cut.pop("gone_0").problem.endswith("line 4: video 'gone' is not there")
    assert [(k, u.start, u.end, u.text) for k, u in cut.items()] == [
        ("abc_0", 1.5, 3, "hello"),
        ("abc_1", 3, 4.5, None),
    ]
    assert all(u.path.endswith("Full/Combined/abc.mp4") for u in cut.values())


def test_ravdess(tmp_path):
    for kind in ("01-01", "02-01", "01-02"):  # with pictures and sound; pictures alone; a song
        touch(tmp_path, f"Actor_01/{kind}-03-01-02-01-01.mp4")
    utterances = found("ravdess", tmp_path)
    assert list(utterances) == ["01-01-03-01-02-01-01"]
    assert utterances["01-01-03-01-02-01-01"].text == "Dogs are sitting by the door"
    touch(tmp_path, "Actor_01/song.mp4")
    with pytest.raises(ConclugenError, match="no name like"):
        clips.find("ravdess", tmp_path)


def test_any_folder(tmp_path):
    touch(tmp_path, "train/a/b.mp4", "dev/b.wav", "test/c.MOV", ".hidden.mp4", "test/notes.txt")
    assert sorted(found("clips", tmp_path)) == ["test/c", "train/a_b", "validation/b"]
    flat = touch(tmp_path / "flat", "x.mp4", "speaker/y.mp4")
    assert sorted(found("clips", flat)) == ["speaker_y", "x"]
    touch(flat, "x.avi")
    with pytest.raises(ConclugenError, match=r"its name 'x' is also that of .*x\.avi; rename"):
        clips.find("clips", flat)
    with pytest.raises(ConclugenError, match="no clips found"):
        clips.find("clips", touch(tmp_path / "none", "a.txt"))
    with pytest.raises(ConclugenError, match="no such folder"):
        clips.find("clips", tmp_path / "nowhere")


@pytest.mark.parametrize("name", ["new\nline", "x" * 241, "back\\slash", "\udcff"])
def test_names_that_cannot_be_ids_are_refused_before_anything_is_done(tmp_path, name):
    touch(tmp_path, f"{name}.mp4")
    with pytest.raises(ConclugenError, match=r"is not printable text of 1 to 240 bytes without .*; rename it") as e:
        clips.find("clips", tmp_path)
    assert str(e.value).isascii()


def test_sound_beside_pictures_is_theirs(tmp_path):
    touch(tmp_path, "a.mp4", "a.wav", "b.wav")
    utterances = found("clips", tmp_path)
    assert (utterances["a"].path, utterances["a"].sound) == (str(tmp_path / "a.mp4"), str(tmp_path / "a.wav"))
    assert (utterances["b"].path, utterances["b"].sound) == (str(tmp_path / "b.wav"), "")


def test_linked_folders_are_entered_once_and_unreadable_ones_refused(tmp_path, monkeypatch):
    videos = touch(tmp_path / "videos", "train/a.mp4")
    touch(tmp_path / "elsewhere", "b.mp4")
    (videos / "train" / "linked").symlink_to(tmp_path / "elsewhere")
    (videos / "train" / "round").symlink_to(videos)
    assert sorted(found("clips", videos)) == ["train/a", "train/linked_b"]
    scandir = os.scandir

    def refused(path):
        if str(path).endswith("linked"):
            raise PermissionError(13, "Permission denied", str(path))
        return scandir(path)

    monkeypatch.setattr(os, "scandir", refused)
    with pytest.raises(ConclugenError, match=r"linked: this folder cannot be read \(Permission denied\)"):
        clips.find("clips", videos)


def test_a_link_to_nowhere_is_a_failure_of_its_clip(tmp_path):
    (tmp_path / "a.mp4").symlink_to(tmp_path / "gone.mp4")
    (only,) = clips.find("clips", tmp_path)
    assert only.stamp() == [0.0, None, None, "", []]


def test_rows_name_clips_by_name_or_path(tmp_path):
    touch(tmp_path, "one/a.mp4", "two/a.mp4", "two/b.mp4", "two/b.wav")
    table = tmp_path / "labels.csv"
    table.write_text("video,start,end\none/a,0,1\ntwo/a.mp4,0,1\nb,0,1\n")
    paths = [Path(u.path).relative_to(tmp_path).as_posix() for u in clips.find("clips", tmp_path, labels=(table,))]
    assert sorted(paths) == ["one/a.mp4", "two/a.mp4", "two/b.mp4"]
    table.write_text("video,start,end\na,0,1\n")
    with pytest.raises(ConclugenError, match=r"line 2: video 'a' is .*one/a\.mp4 or .*two/a\.mp4; write its path"):
        clips.find("clips", tmp_path, labels=(table,))


def test_intervals_have_the_sound_and_the_words_beside_their_clip(tmp_path):
    touch(tmp_path, "talk.mp4", "talk.wav", "talk.more.wav", "mute.mp4")
    (tmp_path / "talk.srt").write_text(
        "1\n00:00:00,000 --> 00:00:01,000\nhello\n\n2\n00:00:01,000 --> 00:00:02,000\nthere\n"
    )
    (tmp_path / "mute.txt").write_text("all that is said")  # nobody knows when
    table = tmp_path / "labels.csv"
    table.write_text("video,start,end\ntalk,0,1\ntalk,1,2\nmute,0,1\n")
    first, second, mute = sorted(clips.find("clips", tmp_path, labels=(table,)), key=lambda u: (u.sound == "", u.start))
    assert (first.text, second.text, mute.text) == ("hello", "there", None)
    assert (first.sound, second.sound, mute.sound) == (str(tmp_path / "talk.wav"),) * 2 + ("",)
    with pytest.raises(ConclugenError, match=r"labels\.csv: has intervals, and --cut"):
        clips.find("clips", tmp_path, labels=(table,), cut=True)
    table.write_text("video,start,end,text\ntalk,0,1,good day\n")
    assert [u.text for u in clips.find("clips", tmp_path, labels=(table,))] == ["good day"]
    (tmp_path / "talk.srt").write_text("1\n00:00:01,000 --> 00:00:00,000\nback\n")
    table.write_text("video,start,end\ntalk,0,1\n")
    (back,) = clips.find("clips", tmp_path, labels=(table,))
    assert (back.text, back.problem) == (None, "")
    assert f"{tmp_path / 'talk.srt'}: 'back' is from 1 s to 0 s; correct its times" in back.notes[0]


@pytest.mark.parametrize("name", ["", ".", "/", "   "])
def test_rows_that_name_no_clip(tmp_path, name):
    touch(tmp_path, "a.mp4")
    table = tmp_path / "labels.csv"
    table.write_text(f"video,start,end\na,0,1\n{name},0,1\n")
    with pytest.raises(ConclugenError, match=r"line 3: video is .*; write the name of a clip"):
        clips.find("clips", tmp_path, labels=(table,))


def test_intervals_that_cannot_be(tmp_path):
    touch(tmp_path, "a.mp4")
    table = tmp_path / "labels.csv"
    for rows, message in (
        ("a,3,2\n", "ends at 2 s and starts at 3 s"),
        ("a,x,2\n", "start"),
        ("b,1,2\n", "none of its 1 videos exists, such as 'b'"),
    ):
        table.write_text("video,start,end\n" + rows)
        with pytest.raises(ConclugenError, match=message):
            clips.find("clips", tmp_path, labels=(table,))


SRT = "\ufeff1\r\n00:00:01,500 --> 00:00:02,000\r\n<i>Hello</i>\r\nyou\r\n\r\n"
SRT += "2\r\n01:00:00,000 --> 01:00:01,000\r\n{\\an8}late\r\n"
VTT = "WEBVTT\n\nNOTE a remark\n\nfirst\n00:01.500 --> 00:02.000 align:start\nHello <c>you</c>\n\n00:03.000 --> 00:04.000\n\n"


def test_subtitles(tmp_path):
    (tmp_path / "a.srt").write_text(SRT, newline="")
    assert subtitles.read(tmp_path / "a.srt") == [
        subtitles.Utterance(1.5, 2.0, "Hello you"),
        subtitles.Utterance(3600.0, 3601.0, "late"),
    ]
    (tmp_path / "a.vtt").write_text(VTT)
    assert subtitles.read(tmp_path / "a.vtt") == [subtitles.Utterance(1.5, 2.0, "Hello you")]
    (tmp_path / "a.csv").write_text("Start,End,Text\n2,3,b\n0,1.5,a  c\n3,4,\n")
    assert subtitles.read(tmp_path / "a.csv") == [subtitles.Utterance(0, 1.5, "a c"), subtitles.Utterance(2, 3, "b")]
    (tmp_path / "a.txt").write_text("all\nof it\n")
    assert subtitles.read(tmp_path / "a.txt") == [subtitles.Utterance(0, None, "all of it")]
    (tmp_path / "b.srt").write_bytes("1\n00:00:01,000 --> 00:00:02,000\ncaf\u00e9\n".encode("cp1252"))
    assert subtitles.read(tmp_path / "b.srt")[0].text == "café"
    (tmp_path / "c.srt").write_text("1\n00:00:01,000 --> 00:00:02,000\ncafé\n", encoding="utf-16")
    assert subtitles.read(tmp_path / "c.srt")[0].text == "café"
    (tmp_path / "d.vtt").write_text("WEBVTT\n\n00:01.5 --> 00:02.25\nTom &amp; Jerry&nbsp;5 --> 6\n")
    assert subtitles.read(tmp_path / "d.vtt") == [subtitles.Utterance(1.5, 2.25, "Tom & Jerry 5 --> 6")]
    cues = "1\n00:00:01,000 --> 00:00:02,000\nhello\n2\n00:00:03,000 --> 00:00:04,000\nworld\n42\n"
    (tmp_path / "e.srt").write_text(cues + "3\n00:00:05,000 --> 00:00:05,000\nflash\n")
    assert [u.text for u in subtitles.read(tmp_path / "e.srt")] == ["hello", "world 42"]
    (tmp_path / "g.srt").write_text("9" * 5000 + ":00:00,000 --> 00:00:01,000\nx\n")
    with pytest.raises(ConclugenError, match="is no interval"):
        subtitles.read(tmp_path / "g.srt")
    (tmp_path / "H.SRT").write_text(cues)
    assert subtitles.read(tmp_path / "H.SRT")[0].text == "hello"
    (tmp_path / "f.srt").write_text(" \n")
    assert subtitles.read(tmp_path / "f.srt") == []


def test_numbers_and_identifiers_are_told_from_words(tmp_path):
    (tmp_path / "a.srt").write_text("1\n100:00:01,000 --> 100:00:02,000\nI am\n42\n")
    assert subtitles.read(tmp_path / "a.srt") == [subtitles.Utterance(360_001.0, 360_002.0, "I am 42")]
    (tmp_path / "a.vtt").write_text(
        "WEBVTT\n\nfirst\n00:01.000 --> 00:02.000\nHello\n\nsecond\n00:03.000 --> 00:04.000\nyou\n\nNOTE a remark\n"
    )
    assert [u.text for u in subtitles.read(tmp_path / "a.vtt")] == ["Hello", "you"]


def test_subtitles_that_cannot_be(tmp_path):
    for name, text, message in (
        ("a.srt", "1\n00:00:xx,000 --> 00:00:02,000\nhello\n", "is no interval"),
        ("a.srt", "1\n00:00:03,000 --> 00:00:02,000\nhello\n", "'hello' is from 3 s to 2 s"),
        ("a.srt", "nothing", "no utterances"),
        ("a.csv", "start,text\n1,a\n", "0 columns 'end'"),
        ("a.csv", "start,end,text\n1,b,a\n", "line 2: end 'b', expected a number from 0 to 1e"),
        ("a.csv", "start,end,text\n0,1,hello, you\n", "line 2: 4 cells, the header has 3; quote cells with commas"),
    ):
        (tmp_path / name).write_text(text)
        with pytest.raises(ConclugenError, match=message):
            subtitles.read(tmp_path / name)


def test_tables_of_words(tmp_path):
    path = tmp_path / "a.csv"
    path.write_text("start,end,text\n")
    assert subtitles.read(path) == []
    path.write_text("start,end,text,Text\n0,1,a,b\n")
    with pytest.raises(ConclugenError, match="2 columns 'text'"):
        subtitles.read(path)


def test_what_is_said_in_an_interval():
    lines = [subtitles.Utterance(0, 2, "a"), subtitles.Utterance(2, 4, "b"), subtitles.Utterance(5, 6, "c")]
    assert subtitles.said(lines) == "a b c"
    assert subtitles.said(lines, 0.5, 2.5) == "a"
    assert subtitles.said(lines, 4.1, 5) is None
    assert subtitles.said(lines, 0.9, 2.8) == "a"  # 1.1 of 2 s, 0.8 of 2 s
    assert subtitles.said(lines, 1.0, 3.0) is None  # half is not more than half


STRONG, MILD = augmentation.STRENGTHS["strong"], augmentation.STRENGTHS["mild"]


def test_pictures_change_the_same_way_within_a_clip():
    change = augmentation.draw_pictures(augmentation.View(0, "a", 1).generator("video"), STRONG)
    assert change == augmentation.draw_pictures(augmentation.View(0, "a", 1).generator("video"), STRONG)
    views = [augmentation.View(*key) for key in ((1, "a", 1), (0, "b", 1), (0, "a", 2))]
    others = [augmentation.draw_pictures(view.generator("video"), STRONG) for view in views]
    assert all(change != other for other in others)
    audio, text = (augmentation.View(0, "a", 1).generator(modality).random() for modality in ("audio", "text"))
    assert audio != text


def test_colours_are_drawn_as_simclr_does():
    rng = np.random.default_rng(1)
    draws = [augmentation.draw_pictures(rng, STRONG) for _ in range(600)]
    jittered = [d.colours[:4] for d in draws if len(d.colours) >= 4]
    assert len({tuple(name for name, _ in colours) for colours in jittered}) == 24  # every order
    amounts = {name: [dict(c)[name] for c in jittered] for name in ("brightness", "contrast", "saturation", "hue")}
    for name, (low, high) in {"brightness": (0.2, 1.8), "saturation": (0.2, 1.8), "hue": (-0.2, 0.2)}.items():
        assert low <= min(amounts[name]) < low + 0.1 * (high - low), name
        assert high - 0.1 * (high - low) < max(amounts[name]) <= high, name
    assert 0.15 < np.mean([("grey", 1.0) in d.colours for d in draws]) < 0.25
    blurs = [224 * d.blur for d in draws if d.blur]
    assert 0.1 <= min(blurs) < 0.2 < 1.9 < max(blurs) <= 2.0
    sides = np.array([d.box for d in draws])
    aspects = np.log2((sides[:, 2] - sides[:, 0]) / (sides[:, 3] - sides[:, 1]))
    assert abs(np.median(aspects)) < 0.12  # as often wide as high


def test_blur_is_of_the_published_width():
    frame = np.zeros((224, 224, 3), np.uint8)
    frame[:, 112:] = 255
    change = augmentation.PictureChange((0, 0, 1, 1), False, (), 2.0 / 224)
    edge = change.apply(frame)[112, :, 0].astype(float)
    assert (np.abs(np.diff(edge)) > 1).sum() in range(6, 16)  # some standard deviations of 2 pixels on either side


@pytest.mark.parametrize(("strength", "areas", "aspects"), [(STRONG, (0.3, 1), (0.5, 2)), (MILD, (0.8, 1), (0.8, 1.2))])
def test_draws_are_within_their_ranges(strength, areas, aspects):
    rng = np.random.default_rng(0)
    draws = [augmentation.draw_pictures(rng, strength) for _ in range(400)]
    boxes = np.array([d.box for d in draws])
    sides = boxes[:, 2:] - boxes[:, :2]
    assert (boxes >= 0).all()
    assert (boxes <= 1 + 1e-9).all()
    area, aspect = sides.prod(axis=1), sides[:, 0] / sides[:, 1]
    assert areas[0] - 1e-9 <= area.min() < areas[0] + 0.1
    assert area.max() <= 1 + 1e-9
    assert aspects[0] - 1e-9 <= aspect.min()
    assert aspect.max() <= aspects[1] + 1e-9
    assert 0.4 < np.mean([d.flip for d in draws]) < 0.6
    jittered = np.mean([any(n == "hue" for n, _ in d.colours) for d in draws])
    assert 0.75 < jittered < 0.85 if strength is STRONG else jittered == 0
    blurred = np.mean([d.blur > 0 for d in draws])
    assert 0.4 < blurred < 0.6 if strength is STRONG else blurred == 0


def test_a_change_by_hand():
    frame = np.zeros((40, 40, 3), np.uint8)
    frame[:, :20] = 200
    same = augmentation.PictureChange((0, 0, 1, 1), False, (), 0.0)
    np.testing.assert_array_equal(same.apply(frame), frame)
    flipped = augmentation.PictureChange((0, 0, 1, 1), True, (), 0.0).apply(frame)
    np.testing.assert_array_equal(flipped, frame[:, ::-1])
    left = augmentation.PictureChange((0, 0, 0.5, 1), False, (("brightness", 0.5),), 0.0).apply(frame)
    assert left[20, 10].tolist() == [100, 100, 100]
    red = np.zeros((8, 8, 3), np.uint8)
    red[..., 0] = 200
    green = augmentation.PictureChange((0, 0, 1, 1), False, (("hue", 1 / 3),), 0.0).apply(red)
    assert green[4, 4, 1] > 195
    assert green[4, 4, 0] < 5
    grey = augmentation.PictureChange((0, 0, 1, 1), False, (("grey", 1.0),), 0.0).apply(red)
    assert len(set(grey[4, 4].tolist())) == 1
    blurred = augmentation.PictureChange((0, 0, 1, 1), False, (), 0.05).apply(frame)
    assert 20 < blurred[20, 20].mean() < 180


def test_sound_is_masked_in_bands():
    x = np.random.default_rng(0).uniform(1, 2, (100, 40)).astype(np.float32)
    y = augmentation.change_sound(x, np.random.default_rng(1))
    masked = y == x.min()
    rows, columns = masked.all(axis=1).sum(), masked.all(axis=0).sum()
    assert 15 <= rows <= 35
    assert 6 <= columns <= 14
    np.testing.assert_array_equal(y[~masked], x[~masked])
    assert augmentation.change_sound(x[:1], np.random.default_rng(1)).shape == (1, 40)


def test_words_are_changed_and_some_left():
    text = " ".join(f"w{i}" for i in range(20))
    changed = [augmentation.change_text(text, np.random.default_rng(i)) for i in range(50)]
    assert len(set(changed)) > 40
    for each in changed:
        assert set(each.split()) <= set(text.split())
        assert 18 <= len(each.split()) <= 22
    assert augmentation.change_text("alone", np.random.default_rng(0)) == "alone"
    assert all(augmentation.change_text("two words", np.random.default_rng(i)) for i in range(20))


def test_a_cell_that_is_too_long_is_no_csv(tmp_path):
    (tmp_path / "a.csv").write_text('start,end,text\n0,1,"' + "a" * 200_000)
    with pytest.raises(ConclugenError, match="not csv"):
        subtitles.read(tmp_path / "a.csv")
