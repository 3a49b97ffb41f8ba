"""Captions that roll are unrolled, only markup is stripped, and lines of blanks end no cue."""

import pytest

from conclugen_jax.extract.media import cues, subtitles

YOUTUBE = """WEBVTT
Kind: captions
Language: en

00:00:00.000 --> 00:00:01.500 align:start position:0%
 
hello<00:00:00.400><c> my</c><00:00:00.800><c> friend</c>

00:00:01.500 --> 00:00:01.510 align:start position:0%
hello my friend
 

00:00:01.510 --> 00:00:03.000 align:start position:0%
hello my friend
how<00:00:01.900><c> are</c><00:00:02.300><c> you</c>

00:00:03.000 --> 00:00:03.010 align:start position:0%
how are you
 
"""  # noqa: W293
SPOKEN = [(0.0, 1.5, "hello my friend"), (1.5, 3.0, "how are you")]
HIGHLIGHTED = """1
00:00:00,000 --> 00:00:00,400
<u>hello</u> my friend

2
00:00:00,400 --> 00:00:01,000
hello <u>my</u> friend

3
00:00:01,000 --> 00:00:01,100
hello my friend

4
00:00:01,100 --> 00:00:01,500
hello my <u>friend</u>

5
00:00:01,500 --> 00:00:02,500
<u>how</u> are you

6
00:00:02,500 --> 00:00:03,000
how are <u>you</u>
"""
ROLLED_UP = """1
00:00:00,000 --> 00:00:01,500
hello my friend

2
00:00:01,500 --> 00:00:03,000
hello my friend
how are you

3
00:00:03,000 --> 00:00:04,000
hello my friend
how are you
no

4
00:00:04,000 --> 00:00:05,000
how are you
no
no
"""


def read(tmp_path, text, name="a.vtt"):
    path = tmp_path / name
    path.write_text(text)
    return [(u.start, u.end, u.text) for u in subtitles.read(path)]


def without_tags(text):
    """As yt-dlp converts captions to .srt."""
    lines = [cues.plain(line) for line in text.partition("\n\n")[2].split("\n")]
    return "\n".join(lines).replace(".", ",")


@pytest.mark.parametrize(
    ("text", "said"),
    [
        pytest.param(YOUTUBE, SPOKEN, id="YouTube's automatic captions"),
        pytest.param(without_tags(YOUTUBE), SPOKEN, id="the same as .srt"),
        pytest.param("\n".join(map(str.rstrip, YOUTUBE.split("\n"))), SPOKEN, id="blanks stripped by an editor"),
        pytest.param(HIGHLIGHTED, SPOKEN, id="whisper --highlight_words"),
        pytest.param(ROLLED_UP, [*SPOKEN, (3, 4, "no"), (4, 5, "no")], id="captions of television that roll up"),
    ],
)
def test_captions_that_roll(tmp_path, text, said):
    assert read(tmp_path, text) == said


def test_a_line_that_is_said_again_after_a_pause_stays(tmp_path):
    again = "\n00:00:09.000 --> 00:00:10.000\n \nhow<00:00:09.400><c> are</c><00:00:09.800><c> you</c>\n"
    assert read(tmp_path, YOUTUBE + again) == [*SPOKEN, (9, 10, "how are you")]


def test_a_line_that_stays_is_said_once(tmp_path):
    stays = "\n00:00:03.010 --> 00:00:05.000\nhow are you\n \n"
    assert read(tmp_path, YOUTUBE + stays) == [SPOKEN[0], (1.5, 5.0, "how are you")]


@pytest.mark.parametrize(
    "lines", [("no", "no"), ("no", "no", "no"), ("a", "no", "no\nI mean it", "b", "c"), ("-Hi.\n-Hi.", "-Hi.")]
)
def test_what_is_said_twice_stays(tmp_path, lines):
    found = read(tmp_path, "".join(f"00:0{i}.000 --> 00:0{i + 1}.000\n{line}\n\n" for i, line in enumerate(lines)))
    assert [words for _, _, words in found] == [line.replace("\n", " ") for line in lines]


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("5 < 6 and 7 > 2", "5 < 6 and 7 > 2"),
        ("I <3 you > all", "I <3 you > all"),
        ("a<b and c>d", "a<b and c>d"),
        ("x <y> z <unknown>", "x <y> z <unknown>"),
        ("{laughs} yes {1}", "{laughs} yes {1}"),
        ("AT&T &lt;i&gt; &amp; R&copy", "AT&T <i> & R&copy"),
        ("<i>a</i> <b>b</b> <u>c</u> <S>d</S>", "a b c d"),
        ('<font color="#ff0000" face=Arial>red</font>', "red"),
        ("<c.colorE5E5E5>grey</c><c> more</c>", "grey more"),
        ("<v Roger Bingham>hello <v.loud Tom>you</v>", "hello you"),
        ("<lang en-GB>colour</lang>", "colour"),
        ("<ruby>明日<rt>ashita</rt></ruby>", "明日"),
        ("so<00:00:00.400> we<00:01.500> go", "so we go"),
        ("{\\an8}{\\i1}up{\\i0} {\\fad(100,200)}", "up"),
        ("two<br>lines<br/>and\\Nmore", "two lines and more"),
        ("a&nbsp;b&#39;s &#x27;c&#x27;", "a b's 'c'"),
    ],
)
def test_markup_is_stripped_and_nothing_else(tmp_path, text, words):
    assert read(tmp_path, f"00:00.000 --> 00:01.000\n{text}\n") == [(0, 1, words)]


@pytest.mark.parametrize("newline", ["\n", "\r\n", "\r", "\r\r\n", "\n\n"])
def test_ends_of_lines(tmp_path, newline):
    text = "1\n00:00:00,000 --> 00:00:01,500\nhello my friend\n\n2\n00:00:01,500 --> 00:00:03,000\nhow are\u2028\u2028you\n"
    (tmp_path / "a.srt").write_text(text.replace("\n", newline), newline="")
    assert [(u.start, u.end, u.text) for u in subtitles.read(tmp_path / "a.srt")] == SPOKEN


def test_cues_between_lines_of_blanks(tmp_path):
    text = "1\n00:00:00,000 --> 00:00:01,500\nhello my friend\n \n2\n00:00:01,500 --> 00:00:03,000\nhow are you\n\t\n"
    assert read(tmp_path, text) == SPOKEN


def test_captions_that_roll_begin_again_after_a_pause(tmp_path):
    (tmp_path / "a.vtt").write_text(
        "WEBVTT\n\n00:00.000 --> 00:01.000\na\n\n00:01.000 --> 00:02.000\na\nb\n\n00:02.000 --> 00:03.000\nb\nc\n\n"
        "00:05.000 --> 00:06.000\nc\nd\n"
    )
    found = [(u.start, u.end, u.text) for u in subtitles.read(tmp_path / "a.vtt")]
    assert found == [(0.0, 1.0, "a"), (1.0, 2.0, "b"), (2.0, 3.0, "c"), (5.0, 6.0, "c d")]
