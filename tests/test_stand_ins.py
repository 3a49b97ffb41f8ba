"""What is in the place of a file that was not fetched, not unpacked, or is another kind: named by every reader."""

import gzip
import io
import os
import zipfile

import numpy as np
import pytest

from conclugen_jax.data import formats, pickles, wide
from conclugen_jax.data.cells import read_csv
from conclugen_jax.data.files import npz_arrays, read_ids, read_npy, stand_in
from conclugen_jax.data.importers import authors, merbench
from conclugen_jax.data.importers.csd import CsdFile
from conclugen_jax.data.parquet import parquet_kinds
from conclugen_jax.data.requests import Request
from conclugen_jax.errors import ConclugenError
from conclugen_jax.extract.media import subtitles
from conclugen_jax.extract.media.decoding import decode
from conclugen_jax.extract.networks import torch_files, weights

POINTER = b"version https://git-lfs.github.com/spec/v1\noid sha256:4d7a214614ab2935c943f9e0ff69d22eadbb\nsize 12345\n"
TEXTS = {
    "clip.csv": read_csv,
    "clip.txt": read_ids,
    "clip.srt": subtitles.read,
    "clip.vtt": subtitles.read,
    "clip.arff": wide.read,
    "clip.tsv": wide.read,
    "clip.yaml": authors._load_yaml,
}
READERS = TEXTS | {
    "clip.npy": read_npy,
    "clip.npz": npz_arrays,
    "clip.parquet": parquet_kinds,
    "label.npz": merbench.read_labels,
    "clip.csd": lambda path: CsdFile(path).names,
    "clip.pkl": pickles.read,
    "clip.pth": torch_files.read,
    "clip.safetensors": weights._read,
    "clip.mp4": decode,
    "clip.wav": decode,
}


def _zip(name):
    with zipfile.ZipFile(file := io.BytesIO(), "w") as archive:
        archive.writestr(name, "some content")
    return file.getvalue()


def _npy():
    np.save(file := io.BytesIO(), np.ones(2))
    return file.getvalue()


STAND_INS = {
    "lfs": (POINTER, "is a git-lfs pointer, not the file itself; run git lfs pull"),
    "annex": (b"/annex/objects/MD5E-s9--0a1b.mp4\n", "is a git-annex pointer, not the file itself; run git annex get"),
    "html": (b"\n<!DOCTYPE html>\n<html><head>", "is an HTML page, not the file itself; download or copy it again"),
    "html without type": (b"<html lang='en'>", "is an HTML page"),
    "xml": (b"<?xml version='1.0'?><Error><Code>AccessDenied</Code>", "is an XML document"),
    "url": (b"https://example.org/clip?id=7\n", "is a link, not the file itself; download what it leads to"),
    "shortcut": (b"[InternetShortcut]\r\nURL=https://example.org\r\n", "is a link"),
    "gzip": (gzip.compress(b"id,label\na,1\n"), "is a packed file; unpack it and name what is in it"),
    "bzip2": (b"BZh91AY&SY", "is a packed file"),
    "7z": (b"7z\xbc\xaf\x27\x1c", "is a packed file"),
    "tar": (b"name".ljust(257, b"\0") + b"ustar\x0000", "is a packed file"),
    "workbook": (_zip("[Content_Types].xml"), "is a workbook; save it as csv"),
    "old workbook": (b"\xd0\xcf\x11\xe0\xa1\xb1\x1a\xe1", "is a workbook"),
    "matlab": (b"MATLAB 5.0 MAT-file, Platform: PCWIN64", "is a MATLAB file"),
}


@pytest.mark.parametrize("name", READERS)
@pytest.mark.parametrize("kind", STAND_INS)
def test_every_reader_names_what_is_in_the_place_of_its_file(tmp_path, name, kind):
    content, message = STAND_INS[kind]
    if (name, kind) == ("clip.pth", "workbook"):
        message = "a zip file that torch.save did not write"
    (tmp_path / name).write_bytes(content)
    with pytest.raises(ConclugenError) as refused:
        READERS[name](tmp_path / name)
    assert str(refused.value).startswith(f"{tmp_path / name}: {message}")


@pytest.mark.parametrize("name", [name for name in READERS if name not in TEXTS and name != "clip.pkl"])
def test_a_line_of_text_in_the_place_of_a_file(tmp_path, name):
    (tmp_path / name).write_bytes(b"Invalid username or password.\n")
    with pytest.raises(ConclugenError, match=r"is text \('Invalid username or password.'\), not the file itself; down"):
        READERS[name](tmp_path / name)
    (tmp_path / name).write_bytes(b"")
    with pytest.raises(ConclugenError, match=r"empty.*; (download or copy|fetch) it again"):
        READERS[name](tmp_path / name)


@pytest.mark.parametrize(
    ("content", "name", "message"),
    [
        (_npy(), "clip.npz", "is an npy file; give it the ending .npy"),
        (_npy(), "clip.npy", ""),
        (_zip("x.npy"), "clip.csv", "is a zip archive; unpack it and name what is in it"),
        (_zip("x.npy"), "clip.npz", ""),
        (b"PAR1....PAR1", "clip.npy", "is a Parquet file; give it the ending .parquet"),
        (b"PAR1", "clip.parquet", ""),
        (b"\x89HDF\r\n\x1a\n", "clip.npy", "is an HDF5 file; write plain arrays with numpy.save"),
        (b"\x89HDF\r\n\x1a\n", "clip.csd", ""),
        (b"\x80\x04\x95", "clip.npy", "is a pickle; write plain arrays with numpy.save"),
        (b"\x80\x02", "clip.pth", ""),
        (b"id,label\na,1\n", "labels.csv", ""),
        (b"\0\1\2", "clip.npy", ""),
        (b"https://a.org/1\nhttps://a.org/2\n", "ids.txt", ""),
    ],
)
def test_a_file_is_named_only_where_it_is_out_of_place(tmp_path, content, name, message):
    (tmp_path / name).write_bytes(content)
    assert stand_in(tmp_path / name) == message


def test_what_cannot_be_opened_is_named_by_its_reader(tmp_path):
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "kept.npy").symlink_to("../.git/annex/objects/x/MD5E-s9.npy")
    assert [stand_in(tmp_path / name) for name in ("none", ".", "pipe")] == ["", "", ""]
    with pytest.raises(ConclugenError, match=r"kept.npy: is a git-annex pointer, .*; run git annex get$"):
        read_npy(tmp_path / "kept.npy")


def test_a_build_names_a_pointer(tmp_path):
    (tmp_path / "t" / "video").mkdir(parents=True)
    (tmp_path / "t" / "video" / "a.npy").write_bytes(POINTER)
    with pytest.raises(ConclugenError, match=r"a.npy: is a git-lfs pointer, not the file itself; run git lfs pull$"):
        formats.open_source(Request("features", tmp_path / "t", name="t"))
