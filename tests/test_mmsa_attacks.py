"""Pickles that attack or are broken are rejected in one sentence; the command."""

import builtins
import os
import pickle
import re
import shutil
import struct
import tracemalloc
from collections import OrderedDict
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings, strategies as st

from conclugen_jax.data import pickles
from conclugen_jax.data.importers import mmsa
from conclugen_jax.errors import ConclugenError
from tests.helpers import ROOT, run as run_module
from tests.test_mmsa import AUDIO, PROTOCOLS, aligned, save, split, tables

# Files that attack. Each would act on loading by pickle.load, or is broken in its own way.


class Reduced:
    """Pickled as a call."""

    def __init__(self, *reduction):
        self.reduction = reduction

    def __reduce__(self):
        return self.reduction


MARKER = "marker"


def calls():
    """Values that create the marker or load code when they are unpickled by pickle.load."""
    return {
        "system": Reduced(os.system, (f"touch {MARKER}",)),
        "open": Reduced(open, (MARKER, "w")),
        "eval": Reduced(eval, (f"open({MARKER!r}, 'w')",)),
        "exec": Reduced(exec, (f"open({MARKER!r}, 'w')",)),
        "getattr": Reduced(getattr, (Path, "cwd")),
        "import": Reduced(__import__, ("os",)),
        "numpy_load": Reduced(np.load, ("x.npy", None, True)),
        "numpy_memmap": Reduced(np.memmap, (MARKER, "u1", "w+", 0, (3,))),
        "numpy_save": Reduced(np.save, (MARKER, np.ones(1))),
        "numpy_tofile": Reduced(np.ndarray.tofile, (np.ones(1), MARKER)),
        "numpy_array": Reduced(np.ndarray, ((10**13,),)),
        "numpy_zeros": Reduced(np.zeros, ((10**13,),)),
        "record": np.zeros(2, [("a", "O"), ("b", "f4")]),
        "complex": np.zeros(2, complex),
        "time": np.zeros(2, "M8[s]"),
        "matrix": np.zeros((2, 2)).view(np.recarray),
        "masked": np.ma.zeros(2),
        "path": Path("x"),
        "set": {1, 2},
        "class": OSError,
        "exception": OSError(1),
        "instance": Reduced(builtins.object, ()),
        "key": {(1, 2): 3},
        "state": Reduced(OrderedDict, (), {"a": 1}),
        "filled": Reduced(OrderedDict, ([("a", 1)],)),
        "rot13": Reduced(__import__("codecs").encode, ("x", "rot13")),
    }


@pytest.mark.parametrize("protocol", PROTOCOLS)
@pytest.mark.parametrize("name", calls())
def test_nothing_is_called(tmp_path, monkeypatch, name, protocol):
    monkeypatch.chdir(tmp_path)
    path = save(tmp_path / "a.pkl", {**aligned(), "config": calls()[name]}, protocol)
    with pytest.raises(ConclugenError, match="nothing in the file was executed") as e:
        mmsa.convert(path, tmp_path / "out")
    assert "\n" not in str(e.value)
    assert list(tmp_path.iterdir()) == [path]


def test_the_name_is_said(tmp_path):
    path = save(tmp_path / "a.pkl", {"train": Reduced(os.system, ("true",))})
    with pytest.raises(
        ConclugenError, match=r"asks for 'posix\.system', which a table of numbers and text does not need"
    ):
        pickles.read(path)


def text(s):
    s = s.encode()
    return b"X" + struct.pack("<I", len(s)) + s


def data(b):
    return b"B" + struct.pack("<I", len(b)) + b


def dtype(code, order="<"):
    state = b"(K\x03" + text(order) + b"NNNJ\xff\xff\xff\xffJ\xff\xff\xff\xffK\x00t"
    return b"cnumpy\ndtype\n" + text(code) + b"\x89\x88\x87R" + state + b"b"


def array(kind, shape, content, fortran=b"\x89"):
    """An array of a type with a shape and a content, each given as operations."""
    made = b"cnumpy.core.multiarray\n_reconstruct\ncnumpy\nndarray\nK\x00\x85C\x01b\x87R"
    return made + b"(K\x01" + shape + kind + fortran + content + b"tb"


def long(n):
    b = n.to_bytes((n.bit_length() + 8) // 8, "little", signed=True)
    return b"\x8a" + bytes([len(b)]) + b


CORE = b"cnumpy._core.multiarray\n"
SYSTEM = b"cposix\nsystem\n" + text(f"touch {MARKER}") + b"\x85R"
BUFFER = b"\x80\x05cnumpy.core.numeric\n_frombuffer\n(" + data(b"12") + dtype("u1") + b"K\x02\x85"
DEEP = 200_000
FILES = [
    ("nothing", "an empty file", b""),
    ("stop only", "not a pickle of protocol 2 to 5, which begins with the byte 0x80", b"."),
    ("protocol 0", "not a pickle of protocol 2 to 5, which begins with the byte 0x80", b"(dp0\n."),
    ("protocol 6", "(ValueError), fetch", b"\x80\x06N."),
    ("no stop", "cut off: 1 bytes are announced and 0 are left", b"\x80\x04}"),
    ("zip", "is a zip archive; unpack it and name what is in it", b"PK\x03\x04" + b"\0" * 50),
    ("name without end", "(ValueError), fetch", b"\x80\x02cnumpy"),
    ("long name", "(ValueError), fetch", b"\x80\x02c" + b"n" * 5000 + b"\nx\n."),
    ("next buffer", "holds the operation NEXT_BUFFER", b"\x80\x05\x97."),
    ("python 2 text", "written by Python 2", b"\x80\x02U\x03abc."),
    ("order unknown", "an array of unknown order", BUFFER + text("Z") + b"tR."),
    ("axes unknown", "(AxisError), fetch", BUFFER + text("K") + b"K\x07\x85tR."),
    ("array of 8 bytes beyond", "bytes are announced and 2 are left", b"\x80\x05\x96" + b"\xff" * 7 + b"\x7f" + b"x."),
    ("axes are deep", "(TypeError), fetch", BUFFER + text("K") + b")" + b"\x85" * DEEP + b"tR."),
]  # fmt: skip
"""Whole files: name, part of what is said, content."""

OPERATIONS = [
    ("empty stack", "(IndexError), fetch", b""),
    ("unknown operation", "holds the operation 0xff", b"\xff"),
    ("system", "asks for 'posix.system'", SYSTEM),
    ("system in inst", "holds the operation INST", b"(" + text(f"touch {MARKER}") + b"iposix\nsystem\n"),
    ("system in obj", "asks for 'posix.system'", b"(cposix\nsystem\n" + text(f"touch {MARKER}") + b"o"),
    ("system in newobj", "asks for 'posix.system'", b"cposix\nsystem\n" + text(f"touch {MARKER}") + b"\x85\x81"),
    ("system in newobj_ex", "asks for 'posix.system'", b"cposix\nsystem\n" + text(f"touch {MARKER}") + b"\x85}\x92"),
    ("dotted name", "asks for 'numpy.ndarray.tofile'", text("numpy") + text("ndarray.tofile") + b"\x93"),
    ("dotted way round", "asks for 'numpy._core.multiarray.scalar.__class__'",
     text("numpy._core") + text("multiarray.scalar.__class__") + b"\x93"),
    ("split otherwise", "asks for '_codecs.encode.__self__'", text("_codecs") + text("encode.__self__") + b"\x93"),
    ("name of numbers", "(UnpicklingError), fetch", b"K\x01K\x02\x93"),
    ("extension 1", "holds the operation EXT1", b"\x82\x01"),
    ("extension 2", "holds the operation EXT2", b"\x83\x01\x00"),
    ("extension 4", "holds the operation EXT4", b"\x84\x01\x00\x00\x00"),
    ("persistent id", "holds the operation PERSID", b"Pabc\n"),
    ("persistent id on the stack", "holds the operation BINPERSID", text("abc") + b"Q"),
    ("call of text", "a call of something that is not a function", text("os.system") + text("x") + b"\x85R"),
    ("call of ndarray", "a call of something that is not a function", b"cnumpy\nndarray\n" + long(10**13) + b"\x85R"),
    ("call without tuple", "a call of something that is not a function", b"cnumpy\ndtype\n]R"),
    ("call with too much", "(TypeError), fetch", b"cnumpy\ndtype\n(NNNNNNtR"),
    ("state of a dictionary", "sets the state of a", b"}}b"),
    ("state of a name", "sets the state of a", b"cnumpy\ndtype\n}b"),
    ("state is short", "(ValueError), fetch", array(b"", b")", b"")),
    ("huge shape", "an array of unknown type or impossible shape", array(dtype("f8"), long(10**13) + b"\x85", data(b"x" * 16))),
    ("huger shape", "that is not there", array(dtype("f8"), (long(2**39) * 3 + b"\x87"), data(b""))),
    ("shape beyond", "an array of unknown type or impossible shape", array(dtype("f8"), long(2**200) + b"\x85", data(b""))),
    ("shape of nothing", "(ValueError), fetch", array(dtype("f8"), b"K\x00" + long(2**39) * 2 + b"\x87", data(b""))),
    ("negative shape", "an array of unknown type or impossible shape", array(dtype("f8"), long(-1) + b"\x85", data(b"x" * 8))),
    ("shape of text", "an array of unknown type or impossible shape", array(dtype("f8"), text("1") + b"\x85", data(b"x" * 8))),
    ("content is a list", "that is not there", array(dtype("f8"), b"K\x01\x85", b"]")),
    ("objects are bytes", "that is not there", array(dtype("O8", "|"), b"K\x01\x85", data(b"\x01" * 8))),
    ("objects are few", "that is not there", array(dtype("O8", "|"), b"K\x05\x85", b"]")),
    ("type without state", "an array of unknown type or impossible shape",
     array(b"cnumpy\ndtype\n" + text("f8") + b"\x85R", b")", data(b"x" * 8))),
    ("type of a list", "an array of type <class 'list'>;", b"cnumpy\ndtype\n" + b"]" * DEEP + b"a" * (DEEP - 1) + b"\x85R"),
    ("type of much text", "an array of type 'U99999999';", dtype("U99999999")),
    ("type of nothing", "an array of type 'U0';", array(dtype("U0"), long(10**11) + b"\x85", data(b""))),
    ("type with fields", "an array of type 'f4,O';", dtype("f4,O")),
    ("type with fields in its state", "an array of a composed type", dtype("f4").replace(b"NNN", b"N)}")),
    ("type void", "an array of type 'V8';", dtype("V8")),
    ("type order", "an array of a composed type", dtype("f4", "<f4,O")),
    ("class of its own", "an array of a class of its own", CORE + b"_reconstruct\ncnumpy\ndtype\nK\x00\x85C\x01b\x87R"),
    ("scalar object", "a number that is an object", CORE + b"scalar\n" + dtype("O8", "|") + b"]Na\x86R"),
    ("scalar too long", "that is not there", CORE + b"scalar\n" + dtype("f8") + data(b"x" * 9) + b"\x86R"),
    ("scalar no character", "text that is not Unicode",
     CORE + b"scalar\n" + dtype("U1") + data(b"\xff" * 4) + b"\x86R"),
    ("encode otherwise", "an encoding other than that of bytes",
     b"c_codecs\nencode\n" + text("x") + text("rot13") + b"\x86R"),
    ("encode wide", "(UnicodeEncodeError), fetch",
     b"c_codecs\nencode\n" + text("\u4e2d") + text("latin1") + b"\x86R"),
    ("length beyond the end", "bytes are announced and 2 are left", b"B\xff\xff\xff\xffx"),
    ("length of 8 bytes beyond", "(UnpicklingError), fetch", b"\x8e" + b"\xff" * 8 + b"x"),
    ("text not utf-8", "(UnicodeDecodeError), fetch", b"X\x02\x00\x00\x00\xff\xff"),
    ("memo unknown", "(UnpicklingError), fetch", b"j\xff\xff\xff\xff"),
    ("key is a list", "a dictionary whose keys are not text", b"}]Ns"),
    ("key is deep", "a dictionary whose keys are not text", b"})" + b"\x85" * DEEP + b"Ns"),
    ("odd number of items", "a dictionary whose keys are not text", b"}(" + text("a") + b"u"),
    ("items of a list", "a dictionary whose keys are not text", b"](" + text("a") + b"Nu"),
    ("append to a dictionary", "(AttributeError), fetch", b"}Na"),
    ("no mark", "(IndexError), fetch", b"]e"),
    ("below the mark", "(IndexError), fetch", b"]]((\x86"),
    ("deep tuple", "expected a dictionary with 'train'", b")" + b"\x85" * DEEP),
    ("deep list", "expected a dictionary with 'train'", b"]" * DEEP + b"a" * (DEEP - 1)),
    ("name is deep", "(UnpicklingError), fetch", b")" + b"\x85" * DEEP + text("x") + b"\x93"),
]  # fmt: skip
"""The same of protocol 4, less its first two bytes and the last."""

BROKEN = {name: (says, content) for name, says, content in FILES}
BROKEN |= {name: (says, b"\x80\x04" + content + b".") for name, says, content in OPERATIONS}


@pytest.mark.parametrize("name", BROKEN)
def test_broken_files_are_refused_without_memory_or_effect(tmp_path, monkeypatch, name):
    monkeypatch.chdir(tmp_path)
    (says, content), path = BROKEN[name], tmp_path / "a.pkl"
    path.write_bytes(content)
    tracemalloc.start()
    try:
        with pytest.raises(ConclugenError, match=str(path)) as e:
            mmsa.convert(path, tmp_path / "out")
    finally:
        _, peak = tracemalloc.get_traced_memory()
        tracemalloc.stop()
    assert peak < 2**20 + 100 * len(content)
    assert "\n" not in str(e.value)
    assert len(str(e.value)) < 500 + len(str(path))
    assert {other for other, _ in BROKEN.values() if other in str(e.value)} == {says}
    assert list(tmp_path.iterdir()) == [path]


def test_one_piece_copied_often_is_refused(tmp_path):
    path = tmp_path / "a.pkl"
    encoded = b"c_codecs\nencode\nq\x00" + text("x" * 5000) + b"q\x01" + text("latin1") + b"\x86q\x02R"
    path.write_bytes(b"\x80\x02(" + encoded + b"h\x00h\x02R" * 1000 + b"t.")
    with pytest.raises(ConclugenError, match="more data than the file holds"):
        pickles.read(path)
    scalar = CORE + b"scalar\nq\x00" + dtype("U1000") + data(b"x\0\0\0" * 1000) + b"\x86q\x01R"
    path.write_bytes(b"\x80\x02(" + scalar + b"h\x00h\x01R" * 1000 + b"t.")
    with pytest.raises(ConclugenError, match="more data than the file holds"):
        pickles.read(path)


def test_too_many_operations_are_refused(tmp_path, monkeypatch):
    monkeypatch.setattr(pickles, "MAX_READS", 1000)
    path = tmp_path / "a.pkl"
    path.write_bytes(b"\x80\x04(" + b"}" * 1000 + b"t.")
    with pytest.raises(ConclugenError, match="more than 1000 pieces"):
        pickles.read(path)


def test_files_that_are_none(tmp_path):
    os.mkfifo(tmp_path / "pipe")
    for name in ("missing", "pipe", "."):
        with pytest.raises(ConclugenError, match="No such file" if name == "missing" else "not a regular file"):
            mmsa.convert(tmp_path / name, tmp_path / "out")
    (tmp_path / "closed").write_bytes(b"\x80\x04N.")
    (tmp_path / "closed").chmod(0)
    if os.geteuid():
        with pytest.raises(ConclugenError, match="cannot be read"):
            mmsa.convert(tmp_path / "closed", tmp_path / "out")


def test_every_truncation_is_refused(tmp_path):
    path = tmp_path / "a.pkl"
    for protocol in (2, 4, 5):
        whole = pickle.dumps({"train": split(["a", "b"])}, protocol)
        for end in range(0, len(whole), 7):
            path.write_bytes(whole[:end])
            with pytest.raises(ConclugenError):
                mmsa.convert(path, tmp_path / "out")
    assert list(tmp_path.iterdir()) == [path]


WHOLE = [pickle.dumps({"train": split(["a$_$1", "b$_$2"])}, p) for p in PROTOCOLS]
PIECES = [
    *[
        bytes([code])
        for code in b"\x80\x95(N\x88\x89KMJ\x8aG\x8cX\x8dCB\x8e\x96]ae}su)\x85\x86\x87tqr\x94hjc\x93Rb.\0\1\2\3\xff"
    ],
    SYSTEM,
    dtype("f4"),
    dtype("U2"),
    dtype("O8", "|"),
    text("train"),
    text("id"),
    text("audio"),
    data(b"x" * 16),
    array(dtype("f4"), b"K\x02K\x02K\x01\x87", data(b"x" * 16)),
    CORE + b"scalar\n",
    b"c_codecs\nencode\n",
    b"\x80\x05cnumpy.core.numeric\n_frombuffer\n",
]


@st.composite
def damaged(draw):
    """A valid file with bytes changed, cut, doubled or replaced by operations."""
    content = bytearray(draw(st.sampled_from(WHOLE)))
    for _ in range(draw(st.integers(1, 4))):
        at = draw(st.integers(0, len(content)))
        end = at + draw(st.integers(0, 12))
        new = draw(st.one_of(st.binary(max_size=4), st.sampled_from(PIECES)))
        content[at:end] = new
    return bytes(content)


@settings(max_examples=400, deadline=None)
@given(
    content=st.one_of(
        damaged(), st.lists(st.sampled_from(PIECES), max_size=40).map(lambda x: b"\x80\x04" + b"".join(x))
    )
)
def test_damaged_files_only_ever_end_in_one_sentence(tmp_path_factory, content):
    folder = tmp_path_factory.getbasetemp() / "fuzz"
    folder.mkdir(exist_ok=True)
    path = folder / "a.pkl"
    path.write_bytes(content)
    message, before = None, os.getcwd()
    os.chdir(folder)
    try:
        mmsa.convert(path, folder / "out")
    except ConclugenError as e:
        message = str(e)
    finally:
        os.chdir(before)
    if message is None:  # a change that does not matter
        shutil.rmtree(folder / "out")
    else:
        assert str(path) in message
        assert "\n" not in message
    assert list(folder.iterdir()) == [path]


# The command.


def run(*arguments, code=0):
    return run_module("launch.convert_mmsa", *arguments, code=code)


def test_command_converts(tmp_path):
    tree = aligned(audio_lengths=[1, 1, 1])
    tree["train"]["vision"] = tree["train"]["vision"].astype(np.float64)
    path = save(tmp_path / "aligned_50.pkl", tree)
    done = run("--trust-pickle", f"--source={path}", f"--output={tmp_path / 'out'}")
    assert done.stdout.splitlines() == [
        f"{tmp_path / 'out'}: train 3, validation 2, test 2 clips",
        "  text: 6 vectors of 3 numbers; 1 clips without",
        "  audio: 6 vectors of 2 numbers; 1 clips without; 6 values of -inf set to 0; 2 clips with content outside "
        "their length, averaged over their steps that are not all zero",
        "  video: 3 vectors of 1 numbers; 4 clips without; float32/float64 in the file, float32 now",
    ]
    assert tables(tmp_path / "out")[0]["audio"]["v_1$_$10"] == AUDIO[0]
    run("--trust_pickle", f"--source={path}", f"--output={tmp_path / 'few'}", "--modalities=video")
    assert {p.name for p in (tmp_path / "few").iterdir()} == {"video.npy", "video.txt", "labels.csv", "source.json"}


def test_command_refuses_without_trust_and_does_not_open(tmp_path):
    os.mkfifo(tmp_path / "a.pkl")  # opening it would wait for ever
    for flag in ((), ("--notrust-pickle",), ("--trust-pickle=false",)):
        result = run(*flag, f"--source={tmp_path / 'a.pkl'}", f"--output={tmp_path / 'out'}", code=2)
        assert result.stderr.startswith(f"error: {tmp_path / 'a.pkl'} is a pickle, a format that can carry programs")
        assert result.stderr.count("\n") == 1
    assert [p.name for p in tmp_path.iterdir()] == ["a.pkl"]


def test_command_ends_in_one_sentence(tmp_path):
    path = save(tmp_path / "a.pkl", {"train": calls()["system"]})
    for arguments, message in (
        (
            ("--trust-pickle", f"--source={path}", f"--output={tmp_path / 'out'}"),
            "error: .*nothing in the file was executed",
        ),
        (("--trust-pickle", f"--source={path}"), "error: --output is missing"),
        (("--trust-pickle", f"--output={tmp_path / 'out'}"), "error: --source is missing"),
    ):
        result = run(*arguments, code=2)
        assert result.stderr.count("\n") == 1
        assert re.match(message, result.stderr), result.stderr
    assert list(tmp_path.iterdir()) == [path]
    assert not (ROOT / MARKER).exists()
