"""Files beside a clip: names that count, content that is checked, and what is reported of the others."""

import unicodedata

import pytest

from conclugen_jax.data import manifest as manifest_lib
from conclugen_jax.extract import clips as clips_lib, folders, outcome, preparation
from conclugen_jax.extract.companions import Companions
from conclugen_jax.extract.utterance import Utterance
from tests import clips, own_backbones
from tests.test_extract import extract

SRT = "1\n00:00:00,000 --> 00:00:01,500\nhello my friend\n\n2\n00:00:01,500 --> 00:00:03,000\nhow are you\n"
CSV = "start,end,text\n0,1.5,hello my friend\n1.5,3,how are you\n"
TSV = "start\tend\ttext\n0\t1500\thello my friend\n1500\t3000\thow are you\n"
JSON = """{"text": " hello my friend how are you", "language": "en", "segments": [
{"id": 0, "start": 0.0, "end": 1.5, "text": " hello my friend", "avg_logprob": NaN, "words": [{"word": "hello"}]},
{"id": 1, "start": 1.5, "end": 3, "text": " how are you", "speaker": "SPEAKER_00"}]}"""
TXT = "hello my friend\nhow are you\n"
CONTENT = {".srt": SRT, ".vtt": SRT, ".csv": CSV, ".tsv": TSV, ".json": JSON, ".txt": TXT}
SAID = "hello my friend how are you"
LRS = "Text:  HELLO MY FRIEND\nConf:  5\n\nWORD START END ASDSCORE\nHELLO 0.10 0.50 4.3\nMY 0.50 0.70 5.1\n"
POINTER = "version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 12\n"


def beside(tmp_path, files, clip="talk.mp4", *, cut=False):
    """Utterances of a clip with files beside it, and of each the notes without the folder."""
    for name, content in {clip: "", **files}.items():
        (tmp_path / name).write_bytes(content if isinstance(content, bytes) else content.encode())
    found = Companions().with_words(Utterance("talk", "", str(tmp_path / clip)), cut=cut)
    return found, [note.replace(f"{tmp_path}/", "") for note in found[0].notes]


@pytest.mark.parametrize("ending", CONTENT)
@pytest.mark.parametrize(
    "between", ["", ".mp4", ".en", ".en-US", ".en-orig", ".pt_BR", ".zh-Hans", ".ger", ".mp4.en", ".wav"]
)
def test_names_that_count(tmp_path, between, ending):
    (u,), notes = beside(tmp_path, {f"talk{between}{ending}": CONTENT[ending]})
    assert (u.text, notes) == (SAID, [])
    found = Companions().with_words(Utterance("talk", "", u.path), cut=True)
    times = [(0.0, 1.5), (1.5, 3.0)] if ending != ".txt" else [(0.0, None)]
    assert [(u.start, u.end) for u in found] == times


@pytest.mark.parametrize("clip", ["S1.E2.mp4", "a (1) [x].mp4", "cafe\u0301.mp4", "A.MP4", "talk.wav"])
def test_names_of_clips(tmp_path, clip):
    stem = unicodedata.normalize("NFC", clip[:-4])
    (u,), notes = beside(tmp_path, {f"{stem}.en.SRT": SRT, f"{stem}2.srt": "", f"x{stem}.srt": ""}, clip)
    assert (u.text, notes) == (SAID, [])


@pytest.mark.parametrize(
    ("name", "why"),
    [
        ("talk.info.json", "'info' is no language; if it holds the words, call it talk.json"),
        ("talk.live_chat.json", "'live_chat' is no language; if it holds the words, call it talk.json"),
        ("talk.en.forced.srt", "'en.forced' is no language; if it holds the words, call it talk.srt"),
        ("talk.2024-01-01.txt", "'2024-01-01' is no language; if it holds the words, call it talk.txt"),
        *(
            (f"talk{ending}", "words are read from .srt, .vtt, .csv, .tsv, .json, .txt")
            for ending in (
                ".ass",
                ".TextGrid",
                ".lab",
                ".json3",
                ".srv3",
                ".ttml",
                ".lrc",
                ".srt~",
                ".srt.bak",
                ".npy",
                ".webp",
            )
        ),
    ],
)
def test_names_that_do_not_count_are_reported(tmp_path, name, why):
    (u,), notes = beside(tmp_path, {name: SRT})
    assert (u.text, u.problem) == (None, "")
    assert notes == [f"a file beside the clip gives no words ({name}: {why})"]


@pytest.mark.parametrize("name", ["talk.png", "talk.mp4.jpg", "talk.en.JPEG"])
def test_stills_are_passed_over(tmp_path, name):
    (u,), notes = beside(tmp_path, {name: b"\x89PNG", "talk.srt": SRT})
    assert (u.text, notes) == (SAID, [])


def test_the_order_of_preference(tmp_path):
    """Files with times before text; no language, English, the rest; the clip's name, the full name; then the ending."""
    order = [
        "talk.srt",
        "talk.vtt",
        "talk.csv",
        "talk.tsv",
        "talk.json",
        "talk.mp4.srt",
        "talk.en.vtt",
        "talk.en-US.srt",
    ]
    order += ["talk.eng.srt", "talk.de.srt", "talk.fr.srt", "talk.txt", "talk.mp4.txt", "talk.en.txt", "talk.de.txt"]
    files = {name: CONTENT[name[-4:] if name[-5:] != ".json" else ".json"] for name in order}
    for first, second, *rest in (order[i:] for i in range(len(order) - 1)):
        (u,), (note,) = beside(tmp_path, files)
        assert u.text == SAID
        more = [second, *rest]
        shown = "; ".join(more[:3]) + (f" and {len(more) - 3} more" if len(more) > 3 else "")
        chosen = f"{first}, not {shown}; move {first} away to use the next"
        assert note == f"words are those of the first of several files ({chosen})"
        (tmp_path / first).unlink()
        del files[first]


@pytest.mark.parametrize(
    ("name", "content", "words", "why"),
    [
        ("talk.txt", LRS, "HELLO MY FRIEND", ""),
        ("talk.txt", "Text:  NO\n\nWORD START END ASDSCORE\n", "NO", ""),
        ("talk.txt", "Text: is what I write\nevery day", "Text: is what I write every day", ""),
        ("talk.txt", SRT, SAID, ""),
        ("talk.txt", "12:30 is the time.", "12:30 is the time.", ""),
        ("talk.txt", "[laughs] 1, 2, 3,\n1.5 or 2.5\nand go", "[laughs] 1, 2, 3, 1.5 or 2.5 and go", ""),
        ("talk.json", '[{"start": 0, "end": 1, "text": "no"}]', "no", ""),
        ("talk.srt", TXT.encode("utf-16"), None, "talk.srt: no utterances; expected 00:00:01,000 -->"),
        ("talk.srt", SRT.encode("utf-16"), SAID, ""),
        ("talk.srt", b"", None, ""),
        ("talk.csv", "sep=;\nstart;end;text\n0,5;1,5;hello, you\n;;\n", "hello, you", ""),
        ("talk.csv", ',start,end,text\n0,0.5,1.5,"hello, you"\n', "hello, you", ""),
        ("talk.csv", CSV.replace(",", "\t").encode("utf-16"), SAID, ""),
        ("talk.csv", "frame, face_id, timestamp, confidence, AU01_r\n1, 0, 0.0, 0.98, 0.1\n", None, "0 columns 'start'"),
        ("talk.txt", "frame, time, confidence\n1, 0.000, 0.98\n2, 0.033, 0.97\n", None, "a table of numbers"),
        ("talk.txt", "0.0\t1.5\thello\n1.5\t3.0\tyou\n", None, "holds a table of numbers, expected words alone; save"),
        ("talk.txt", "0 0.51 0.48 0.2 0.3\n", None, "holds a table of numbers"),
        ("talk.txt", "42", "42", ""),
        ("talk.txt", "0:00\nhello my\n0:05\nfriend\n", None, "holds lines with times, expected words alone; save words with"),
        ("talk.txt", "[00:00.000 --> 00:01.500]  hello", None, "holds lines with times"),
        ("talk.txt", "2024-01-01 12:00:00,1 INFO x\n2024-01-01 12:00:01,1 INFO y\n", None, "holds lines with times"),
        ("talk.txt", "INFO:root:start\nWARNING:root:slow\n", None, "holds a log"),
        ("talk.txt", JSON, None, "holds JSON"),
        ("talk.txt", b"\x00\x01\x02", None, "holds zero bytes"),
        ("talk.txt", "你好,我的朋友".encode("gbk"), None, "not UTF-8 (byte 1), and its encoding is unknown; save it in UTF-8"),
        ("talk.json", '{"version": 1.3, "people": []}', None, "no transcript (Object missing required field `segments`)"),
        ("talk.json", '{"segments": [{"start": 0, "end": "1"}]}', None, "at `$.segments[0].end`); expected segments with"),
        ("talk.json", '{"segments": [{"start": NaN, "end": 1, "text": "a"}]}', None, "'a' is from nan s to 1 s; correct"),
        ("talk.json", '{"segments": [{"start": 0, "end": 1, "text": "\\ud800"}]}', None, "no transcript ("),
        ("talk.json", "[" * 100_000, None, "no transcript ("),
        ("talk.tsv", CSV, None, "its first line is 'start,end,text', expected start, end (milliseconds) and text between tabs"),
        ("talk.tsv", "start\tend\ttext\n0\t1.5\thi\n", None, "line 2: '0\\t1.5\\thi', expected milliseconds, mil"),
        ("talk.vtt", TXT, None, "talk.vtt: no utterances; expected 00:00:01,000 --> 00:00:02,500 and such, with text below"),
    ],
)  # fmt: skip
def test_content_is_checked_before_it_is_used(tmp_path, name, content, words, why):
    (u,), notes = beside(tmp_path, {name: content})
    assert (u.text, u.problem, len(notes)) == (words, "", bool(why))
    assert why in "".join(notes)
    assert all(note.startswith(f"a file beside the clip gives no words ({name}") for note in notes)


def test_a_file_that_cannot_be_used_leaves_its_place_to_the_next(tmp_path):
    (u,), notes = beside(tmp_path, {"talk.csv": "frame,success\n1,1\n", "talk.vtt": "", "talk.txt": LRS})
    assert u.text == "HELLO MY FRIEND"
    (note,) = notes
    assert note.startswith(
        "a file beside the clip gives no words (talk.csv: 0 columns 'start'; expected one each of start"
    )


def test_an_encoding_that_is_a_guess_is_reported(tmp_path):
    (u,), notes = beside(tmp_path, {"talk.srt": SRT.replace("friend", "café").encode("cp1252")})
    assert u.text == "hello my café how are you"
    why = "talk.srt: not in UTF-8, so read as Windows-1252: save it in UTF-8 if letters are wrong"
    assert notes == [f"words may have wrong letters ({why})"]
    words = tmp_path / "Transcript" / "Segmented" / "Combined"
    words.mkdir(parents=True)
    (words / "talk.txt").write_bytes("talk___0___0.0___4.2___café".encode("cp1252"))
    (words / "other.txt").write_bytes("other___0___0.0___4.2___привет".encode("cp1251"))
    for name in ("talk_0.mp4", "other_0.mp4"):
        (tmp_path / name).touch()
    other, _, talk = clips_lib.find("cmu_mosei", tmp_path)
    assert (talk.text, other.text) == ("café", None)
    assert "talk.txt: not in UTF-8, so read as Windows-1252" in talk.notes[0]
    assert "other.txt: not UTF-8 (byte 25), and its encoding is unknown; save it in UTF-8" in other.notes[0]


@pytest.mark.parametrize("ending", CONTENT)
@pytest.mark.parametrize(
    ("content", "what"),
    [
        (POINTER, "is a git-lfs pointer, not the file itself; run git lfs pull"),
        (
            "<!DOCTYPE html>\n<html><body>Sign in</body></html>\n",
            "is an HTML page, not the file itself; download or copy it",
        ),
        ("https://example.org/talk.srt\n", "is a link, not the file itself; download what it leads to"),
        (
            "../.git/annex/objects/x/SHA256E-s12--00.srt",
            "is a git-annex pointer, not the file itself; run git annex get",
        ),
        ("<?xml version='1.0'?><tt><p>hello</p></tt>", "is an XML document, not the file itself; download or copy it"),
        (b"PK\3\4" + bytes(26) + b"a.srt", "is a zip archive; unpack it and name what is in it"),
    ],
)
def test_what_is_in_the_place_of_words_is_named(tmp_path, ending, content, what):
    (u,), (note,) = beside(tmp_path, {f"talk{ending}": content})
    assert u.text is None
    assert note.startswith(f"a file beside the clip gives no words (talk{ending}: {what}")


def test_a_clip_without_words_says_why(tmp_path):
    (u,), _ = beside(tmp_path, {"talk.srt": POINTER})
    failed = preparation.prepare(u, preparation.recipe([own_backbones.words()]), 1)
    why = f"a file beside the clip gives no words ({tmp_path}/talk.srt: is a git-lfs pointer"
    assert failed.failure.startswith(f"{tmp_path}/talk.mp4: lacks text; {why}")


def test_words_without_times_are_reported_where_times_are_asked_for(tmp_path):
    (whole,), _ = beside(tmp_path, {"talk.txt": TXT})
    (cut,) = Companions().with_words(Utterance("talk", "", whole.path), cut=True)
    assert (cut.text, cut.end, cut.notes) == (
        SAID,
        None,
        ("the clip is not cut, as no words with times are beside it",),
    )
    (part,) = Companions().with_words(Utterance("talk", "", whole.path, start=0, end=1))
    assert (part.text, part.notes) == (None, ("the interval has no words, as those beside the clip have no times",))


def test_files_that_cannot_be_opened(tmp_path):
    (tmp_path / "talk.srt").symlink_to(tmp_path / "gone")
    (tmp_path / "talk.vtt").mkdir()
    (u,), notes = beside(tmp_path, {})
    assert (u.text, len(notes)) == (None, 1)
    assert notes[0].startswith(
        "a file beside the clip gives no words (talk.srt: cannot be read (No such file or directory)"
    )


def test_sound_of_the_full_name_and_several_files_of_sound(tmp_path):
    for name in ("a.mp4", "a.mp4.wav", "b.mp4", "b.en.wav", "c.wav", "c.wav.mp3", "d.mp4.wav"):
        (tmp_path / name).touch()
    found = clips_lib.find("clips", tmp_path)
    sounds = {u.key: u.sound.removeprefix(f"{tmp_path}/") for u in found}
    assert sounds == {"a": "a.mp4.wav", "b": "", "b.en": "", "c": "", "c.wav": "", "d.mp4": ""}
    labels = tmp_path / "rows.csv"
    labels.write_text("video,start,end\na.mp4,0,1\na,1,2\n")
    assert {(u.path, u.sound) for u in clips_lib.find("clips", tmp_path, labels=(labels,))} == {
        (str(tmp_path / "a.mp4"), str(tmp_path / "a.mp4.wav"))
    }
    (tmp_path / "a.mp3").touch()
    beside = Companions()
    assert beside.sound(tmp_path / "a.mp4") == ""
    (u,) = beside.with_words(Utterance("a", "", str(tmp_path / "a.mp4")))
    assert u.notes == ("the clip's own sound is used, as several files of sound have its name (a.mp3; a.mp4.wav)",)


def test_tables_of_single_clips_hold_no_labels(tmp_path):
    for name in ("a.mp4", "a.csv", "a.mp4.csv", "a.en.csv", "ab.csv", "labels_1.csv"):
        (tmp_path / name).touch()
    assert [path.name for path in folders._beside(tmp_path)] == ["ab.csv", "labels_1.csv"]


def test_subtitles_that_are_damaged_cost_the_words_of_their_clip_alone(tmp_path):
    (tmp_path / "videos").mkdir()
    source = clips.videos(tmp_path / "videos")
    for name, text in (("train0", "1\n00:00:xx --> 00:00:02,000\nhello\n"), ("train1", ""), ("train3", "1\n")):
        (source / "train" / f"{name}.txt").unlink(missing_ok=True)
        (source / "train" / f"{name}.srt").write_text(text)
    folder, tally = extract(source, tmp_path / "data")
    assert not tally.failures
    assert tally.missing["text"] == 4
    assert tally.notes["a file beside the clip gives no words"] == 2
    (told,) = [line for line in outcome.lines(tally, folder, 9) if "gives no words" in line]
    assert told.startswith(f"2 utterances: a file beside the clip gives no words (such as {source}/train/train0.srt: ")
    assert "'00:00:xx --> 00:00:02,000' is no interval" in told
    assert manifest_lib.read(folder).source["extraction"]["notes"]["a file beside the clip gives no words"] == 2


def test_files_belong_to_the_longest_name_and_folders_to_none(tmp_path):
    (tmp_path / "talk.frames").mkdir()
    (tmp_path / "talk.part.mp4").touch()
    (found,), notes = beside(tmp_path, {"talk.part.srt": SRT, "talk.part.en.srt": SRT})
    assert (found.text, notes) == (None, [])
    (found,) = Companions().with_words(Utterance("talk.part", "", str(tmp_path / "talk.part.mp4")))
    assert found.text == SAID


def test_names_that_are_not_in_utf8_cost_nothing(tmp_path):
    clip = clips.write(tmp_path / "a.mkv", clips.steady(0.4), sound=clips.tone(0.4))
    source = tmp_path / "videos\udcff"
    source.mkdir()
    clip.rename(source / "talk.mkv")
    (source / "damaged.mkv").write_bytes(b"\1" * 1000)
    (source / "talk.\udcff.srt").write_text(SRT)
    folder, tally = extract(source, tmp_path / "data")
    assert tally.failures["damaged"].startswith(rf"{tmp_path}/videos\udcff/damaged.mkv: ")
    (told,) = [line for line in outcome.lines(tally, folder, 2) if "gives no words" in line]
    assert rf"{tmp_path}/videos\udcff/talk.\udcff.srt: '\udcff' is no language" in told
