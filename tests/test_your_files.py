"""docs/how-to/your_files.md: its files are written, its commands run, and what they print is compared with the page."""

import ast
import doctest
import re
import shlex
import shutil

import numpy as np
import pytest

from conclugen_jax.data import manifest as manifest_lib
from tests import clips
from tests.helpers import ROOT, run
from tests.layouts import save
from tests.test_clip_metadata import matrix, write as write_film
from tests.test_extract import FLAGS, rows_of

PAGE = (ROOT / "docs/how-to/your_files.md").read_text(encoding="utf-8")
SECTIONS = dict(re.findall(r"^## (.*?)\n(.*?)(?=^## |\Z)", PAGE, re.MULTILINE | re.DOTALL))
BLOCK = re.compile(r"(?:^`([\w/.-]+\.\w+)`([^\n]*):\n)?^```(\w*)\n(.*?)^```$", re.MULTILINE | re.DOTALL)
"""A block of the page, and where the line before it begins with a name of a file: that name, and the rest of the line."""

BACKBONES = " ".join([*FLAGS, "--nocrop_faces", "--num_workers=1"])
"""In the place of ``"${W[@]}"``, which the page leaves to its readers: networks without weights, for clips without faces."""

VECTORS = {  # section -> modality, and vectors by id in the data set that the section makes
    "Excel and pandas: clips": ("text", {"talk_0": [2, 12], "talk_1": [3, 10]}),  # words, letters
    "yt-dlp": ("text", {"talk_0000": [3, 15], "talk_0001": [3, 11]}),
    "whisper, WhisperX and LRS": (
        "text",
        {"a": [6, 27], "b": [6, 27], "c": [6, 27], "d": [2, 9], "e": [3, 15], "f": [3, 15]},
    ),
    "Phones, cameras and ffmpeg": ("video", {"IMG_0001": [158, 122, 0]}),  # green and white are on the left
}
KINDS = {  # what a list says of a film -> how it is written
    "mirrored": {"change": matrix(-1, 0, 0, 1)},
    "HDR": {"change": lambda s: setattr(s.codec_context, "color_trc", 16), "pix_fmt": "yuv420p10le"},
    "interlaced": {"change": lambda s: setattr(s, "options", {"x264-params": "interlaced=1"})},
}


def write_media(path, remark):
    """Write a film or sound of a second, of the kind that the remark says."""
    if "damaged" in remark:
        path.write_bytes(b"RIFF")
    elif path.suffix == ".wav":
        clips.write(path, [], sound=clips.tone(1.0))
    elif kind := next((kind for word, kind in KINDS.items() if word in remark), None):
        write_film(path, **kind)
    else:
        sound = None if "without sound" in remark else clips.tone(1.0)
        clips.write(path, clips.steady(1.0), codec="libx264", sound=sound)


def listed(line):
    """Yield each path of a line ``PATH  what it is``, in which braces stand for several, and what it is."""
    path, _, remark = line.partition(" ")
    before, several, after = re.fullmatch(r"([^{]*)(?:{(.*)})?(.*)", path).groups(default="")
    for each in several.split(","):
        yield before + each + after, remark.strip()


def write_listed(path, remark):
    """Write a file of a list: with lines in quotes, an array, a clip, or what is not read."""
    path.parent.mkdir(parents=True, exist_ok=True)
    if lines := re.findall('"(.*?)"', remark):
        path.write_text("\n".join(lines) + "\n", encoding="utf-8")
    elif remark == "another such table":
        shutil.copy(next(path.parent.glob("*.csv")), path)
    elif dims := re.fullmatch(r"float32 \[([\d, ]+)\]", remark):
        shape = tuple(map(int, dims[1].split(",")))
        save(path, np.arange(np.prod(shape), dtype=np.float32).reshape(shape))
    elif path.suffix in (".mp4", ".mov", ".mkv", ".wav"):
        write_media(path, remark)
    elif "not read" in remark:
        path.write_bytes(b"\0") if path.suffix else path.mkdir()
    else:
        raise AssertionError(f"{path.name}: {remark}")


def write_file(path, language, content, remark):
    """Write a file that the page shows: text, or the arrays that a block of Python names."""
    path.parent.mkdir(parents=True, exist_ok=True)
    if language == "python":
        arrays = {n.targets[0].id: ast.literal_eval(n.value) for n in ast.parse(content).body}
        np.savez(path, **{name: np.array(x, object) for name, x in arrays.items()})
        return
    path.write_text(content, encoding="utf-16" if "UTF-16" in remark else "utf-8", newline="")


def assert_printed(folder, line, said):
    """Run a command of the page and compare what it prints, or its error, without the name of the temporary folder."""
    first, command, *arguments = shlex.split(line.replace('"${W[@]}"', BACKBONES))
    assert first == "conclugen", line
    workers = ["--num_workers=1"] if command == "build" else []
    code = 2 if said.startswith("error: ") else 0
    done = run(command, *arguments, *workers, code=code)
    printed = (done.stdout if not code else done.stderr).replace(f"{folder}/", "")
    assert doctest.OutputChecker().check_output(said, printed, doctest.ELLIPSIS), f"{line}\n{printed}"


def follow(folder, content):
    """Write the files that a block lists, and run its commands."""
    files, *commands = re.split(r"^\$ ", content, flags=re.MULTILINE)
    for line in files.splitlines():
        for name, remark in listed(line):
            write_listed(folder / name, remark)
    for command in commands:
        line, _, said = command.partition("\n")
        assert_printed(folder, line, said)


def vectors(folder, modality):
    """Return the vectors of a data set by id."""
    found = {}
    for split in manifest_lib.read(folder).splits:
        ids, rows = rows_of(folder, split)
        found |= {i: x.tolist() for i, x in zip(ids, rows["features"][modality], strict=True)}
    return found


@pytest.mark.parametrize("name", SECTIONS)
def test_files_of_the_page_come_out_as_it_says(tmp_path, monkeypatch, name):
    monkeypatch.chdir(tmp_path)
    for path, remark, language, content in BLOCK.findall(SECTIONS[name]):
        if path:
            write_file(tmp_path / path, language, content, remark)
        elif language == "console":
            follow(tmp_path, content)
        else:
            examples = doctest.DocTestParser().get_doctest(content, {}, name, None, 0)
            results = doctest.DocTestRunner().run(examples)
            assert (results.failed, results.attempted > 0) == (0, True), content
    if name in VECTORS:
        modality, expected = VECTORS[name]
        (made,) = tmp_path.glob("data/*/1.0.0")
        found = vectors(made, modality)
        assert {i: found[i] for i in expected} == {i: pytest.approx(x, abs=0.9) for i, x in expected.items()}


def test_every_section_shows_files_and_a_command():
    assert len(SECTIONS) > 7
    for name, text in SECTIONS.items():
        languages = {language for _, _, language, _ in BLOCK.findall(text)}
        assert "console" in languages, name
        assert text.count("```") == 2 * len(BLOCK.findall(text)), name  # no block is passed over
