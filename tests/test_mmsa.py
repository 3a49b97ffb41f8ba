"""Feature dictionaries of MMSA: values by hand, every layout, files that attack, the command."""

import builtins
import csv
import json
import os
import pickle
import re
import shutil
import struct
import subprocess
import tracemalloc
from collections import OrderedDict
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from conclugen_jax.data import pickles
from conclugen_jax.data.importers import mmsa
from conclugen_jax.errors import ConclugenError
from tests.helpers import ROOT
from tests.helpers import run as run_module

PROTOCOLS = (2, 3, 4, 5)


def split(ids, **changes):
    """One split of an aligned file: two clips of known means, further ones without content."""
    n = len(ids)
    text = np.zeros((n, 4, 3), np.float32)
    text[0] = [[1, 2, 3], [3, 4, 5], [7, 7, 7], [7, 7, 7]]  # two tokens, then what BERT makes of padding
    text[1] = [[0, 0, 0], [6, 0, 3], [3, 0, 3], [9, 9, 9]]  # three tokens, one of them zero
    mask = np.zeros((n, 4), np.float32)
    mask[0, :2] = mask[1, :3] = 1
    audio = np.zeros((n, 4, 2), np.float32)
    audio[0] = [[0, 0], [1, 2], [-np.inf, 6], [0, 0]]
    audio[1] = [[0, 0], [0, 0], [0, 5], [0, -np.inf]]
    vision = np.zeros((n, 4, 1), np.float32)
    vision[0, :, 0] = [2, 4, 6, 0]
    return {
        "raw_text": ["Words, \u201cwords\u201d."] * n,
        "audio": audio,
        "vision": vision,
        "id": list(ids),
        "text": text,
        "text_bert": np.stack([np.full((n, 4), 101), mask, np.zeros((n, 4))], axis=1).astype(np.float32),
        "annotations": ["Positive"] * n,
        "classification_labels": np.arange(n, dtype=np.float32),
        "regression_labels": np.linspace(-0.4, 2.4, n, dtype=np.float32),
        **changes,
    }


def aligned(**changes):
    """A file like aligned_50.pkl: two splits with the two known clips first and an empty one last."""
    return {
        "train": split(["v_1$_$10", "v_1$_$2", "-x$_$0"], **changes),
        "valid": split(["v_2$_$10", "v_2$_$2"]),
        "test": split(["v_3$_$1", "v_3$_$2"]),
    }


TEXT = [[2, 3, 4], [3, 0, 2]]  # means of the first two clips above: over two and over three tokens
AUDIO = [[0.5, 4], [0, 5]]  # -inf counts as 0; a step of nothing but -inf and 0 does not count
VIDEO = [[4]]


def save(path, tree, protocol=4):
    path.write_bytes(pickle.dumps(tree, protocol))
    return path


def tables(folder):
    """What a reader of the tables sees: vectors by modality and id, rows of labels by id."""
    vectors = {}
    for file in sorted(folder.glob("*.npy")):
        rows = np.load(file, allow_pickle=False)
        ids = file.with_suffix(".txt").read_text(encoding="utf-8").splitlines()
        assert rows.dtype == np.float32
        assert len(rows) == len(ids)
        vectors[file.stem] = dict(zip(ids, rows.tolist(), strict=True))
    with (folder / "labels.csv").open(encoding="utf-8", newline="") as file:
        return vectors, {row["id"]: row for row in csv.DictReader(file)}


@pytest.mark.parametrize("protocol", PROTOCOLS)
@pytest.mark.parametrize("core", ["numpy._core", "numpy.core"])
def test_aligned_file_by_hand(tmp_path, protocol, core):
    path = save(tmp_path / "aligned_50.pkl", aligned(), protocol)
    if core == "numpy.core":  # as NumPy 1 wrote it
        if protocol > 3:
            path = save(tmp_path / "aligned_50.pkl", aligned(), 3)
        path.write_bytes(path.read_bytes().replace(b"cnumpy._core.", b"cnumpy.core."))
    facts = mmsa.convert(path, tmp_path / "new" / "out")
    vectors, labels = tables(tmp_path / "new" / "out")
    first, second = ("v_1$_$10", "v_2$_$10", "v_3$_$1"), ("v_1$_$2", "v_2$_$2", "v_3$_$2")
    assert vectors == {
        "text": {**dict.fromkeys(first, TEXT[0]), **dict.fromkeys(second, TEXT[1])},
        "audio": {**dict.fromkeys(first, AUDIO[0]), **dict.fromkeys(second, AUDIO[1])},
        "video": dict.fromkeys(first, VIDEO[0]),
    }
    assert list(labels) == ["v_1$_$10", "v_1$_$2", "-x$_$0", "v_2$_$10", "v_2$_$2", "v_3$_$1", "v_3$_$2"]
    assert labels["v_1$_$2"] == {"id": "v_1$_$2", "split": "train", "sentiment": "1.0", "group": "v_1"}
    assert [row["sentiment"] for row in labels.values()] == ["-0.4", "1.0", "2.4", "-0.4", "2.4", "-0.4", "2.4"]
    assert [row["split"] for row in labels.values()] == ["train"] * 3 + ["validation"] * 2 + ["test"] * 2
    assert labels["-x$_$0"]["group"] == "-x"
    assert facts == json.loads((tmp_path / "new" / "out" / "source.json").read_text())
    assert facts["splits"] == {"train": 3, "validation": 2, "test": 2}
    assert facts["modalities"]["audio"]["minus_infinity_set_to_0"] == 6
    assert facts["modalities"]["audio"]["clips_without"] == 1
    assert facts["modalities"]["text"]["valid_steps"] == "mask in text_bert"
    assert facts["modalities"]["video"] == {
        "dim": 1,
        "type_in_file": "float32",
        "valid_steps": "not all zero",
        "clips": 3,
        "clips_without": 4,
        "clips_with_content_outside_their_length": 0,
        "minus_infinity_set_to_0": 0,
    }
    assert facts["file"] == "aligned_50.pkl"
    assert facts["bytes"] == path.stat().st_size
    sha = subprocess.run(["sha256sum", path], capture_output=True, text=True, check=True).stdout.split()[0]
    assert facts["sha256"] == sha
    assert [p.name for p in (tmp_path / "new").iterdir()] == ["out"]
    assert (tmp_path / "new" / "out").stat().st_mode & 0o777 == 0o777 & ~_umask()


def _umask():
    mask = os.umask(0)
    os.umask(mask)
    return mask


def test_lengths_name_the_steps_unless_content_lies_outside(tmp_path):
    audio = np.zeros((5, 4, 1))
    audio[0, :, 0] = [1, 0, 5, 0]  # three steps, the zero among them counts
    audio[1, :, 0] = [0, 0, 2, 4]  # padded in front: the length counts up to the first zero and is at least 1
    audio[2, :, 0] = [1, 2, 3, 4]  # longer than what was stored
    audio[3, :, 0] = [0, 0, 0, 0]
    audio[4, :, 0] = [3, 0, 0, 0]  # no steps, yet one is there
    ids = [f"a$_${i}" for i in range(5)]
    whole = {k: v for k, v in split(ids).items() if k in ("id", "regression_labels")}
    tree = {"train": {**whole, "audio": audio, "audio_lengths": [3, 1, 1e300, 1, 0]}}
    facts = mmsa.convert(save(tmp_path / "a.pkl", tree), tmp_path / "out")
    vectors, _ = tables(tmp_path / "out")
    assert vectors["audio"] == {"a$_$0": [2], "a$_$1": [3], "a$_$2": [2.5], "a$_$4": [3]}
    known = facts["modalities"]["audio"]
    assert known["clips_with_content_outside_their_length"] == 2
    assert known["clips_without"] == 1
    assert known["valid_steps"] == "lengths"


@pytest.mark.parametrize("protocol", PROTOCOLS)
def test_unaligned_file_with_lists_of_numpy_numbers(tmp_path, protocol):
    tree = aligned()
    for values in tree.values():
        n = len(values["id"])
        values["audio_lengths"] = [np.int64(2)] * n
        values["vision_lengths"] = np.full(n, 3)
        values["regression_labels"] = [np.float32(0.5)] * n
        values["id"] = [np.str_(i) for i in values["id"]]
        values["audio"] = np.abs(np.nan_to_num(values["audio"], neginf=0))[:, ::-1]
        values["audio"][:, 2:] = 0
        values["audio"][:, 0] = 4
    mmsa.convert(save(tmp_path / "unaligned_50.pkl", tree, protocol), tmp_path / "out")
    vectors, labels = tables(tmp_path / "out")
    assert vectors["audio"]["v_1$_$10"] == [2, 5]
    assert vectors["video"] == {"v_1$_$10": [4], "v_2$_$10": [4], "v_3$_$1": [4]}
    assert {row["sentiment"] for row in labels.values()} == {"0.5"}


@pytest.mark.parametrize("protocol", PROTOCOLS)
def test_mmsa_fet_file_in_float64_with_settings_and_an_empty_split(tmp_path, protocol):
    tree = aligned()
    for values in tree.values():
        for key in ("text", "audio", "vision", "text_bert", "regression_labels"):
            if key in values:
                values[key] = values[key].astype(np.float64) * (1 / 3 if key == "text" else 1)
        for key in ("id", "raw_text", "annotations"):
            if key in values:
                values[key] = np.array(values[key])
    tree["config"] = {"audio": {"tool": "librosa", "args": {"n": 20, "on": True, "x": None, "y": 0.5, "z": [1, 2]}}}
    empty = {k: np.array([]) for k in ("id", "raw_text", "regression_labels", "annotations")}
    tree["valid"] = {**empty, "audio": np.zeros((0, 4, 2)), "text": np.zeros((0, 4, 3))}
    facts = mmsa.convert(save(tmp_path / "feature.pkl", tree, protocol), tmp_path / "out")
    vectors, labels = tables(tmp_path / "out")
    assert facts["splits"] == {"train": 3, "test": 2}
    assert facts["modalities"]["text"]["type_in_file"] == "float64"
    np.testing.assert_allclose(vectors["text"]["v_1$_$10"], np.array(TEXT[0]) / 3, rtol=1e-7)
    assert vectors["audio"]["v_3$_$1"] == AUDIO[0]
    assert len(labels) == 5


def test_sims_labels_of_each_modality(tmp_path):
    tree = aligned()
    for values in tree.values():
        n = len(values["id"])
        values["regression_labels_T"] = np.full((n, 1), 0.2, np.float32)
        values["regression_labels_A"] = [np.nan, *[0.4] * (n - 1)]
        values["regression_labels_V"] = np.full(n, np.nan)
        values["regression_labels"] = np.arange(n) - 1
    del tree["test"]["regression_labels_T"]
    facts = mmsa.convert(save(tmp_path / "unaligned_39.pkl", tree), tmp_path / "out")
    _, labels = tables(tmp_path / "out")
    assert facts["labels"] == ["sentiment", "sentiment_text", "sentiment_audio"]
    header = (tmp_path / "out" / "labels.csv").read_text().splitlines()[0]
    assert header == "id,split,sentiment,group,sentiment_text,sentiment_audio"
    assert [row["sentiment"] for row in labels.values()] == ["-1.0", "0.0", "1.0", "-1.0", "0.0", "-1.0", "0.0"]
    assert [labels["v_1$_$10"][k] for k in ("sentiment_text", "sentiment_audio")] == ["0.2", ""]
    assert [labels["v_3$_$2"][k] for k in ("sentiment_text", "sentiment_audio")] == ["", "0.4"]


def test_modalities_and_splits_can_be_few_and_ids_without_separator_have_no_group(tmp_path):
    tree = {"test": split(["film 1", "\u7535\u5f71,2"]), "dev": split(["c", "d"])}
    del tree["dev"]["vision"], tree["dev"]["text_bert"]
    path = save(tmp_path / "a.pkl", tree)
    facts = mmsa.convert(path, tmp_path / "out", modalities=("video", "text", "video"))
    vectors, labels = tables(tmp_path / "out")
    assert list(facts["splits"]) == ["validation", "test"]
    assert set(vectors) == {"text", "video"}
    assert vectors["video"] == {"film 1": [4]}
    assert vectors["text"]["c"] == [4.5, 5, 5.5]  # without a mask all steps that are not zero
    assert labels["\u7535\u5f71,2"]["group"] == ""
    assert labels["\u7535\u5f71,2"]["split"] == "test"


@pytest.mark.parametrize("protocol", PROTOCOLS)
def test_reader_returns_what_was_pickled(tmp_path, protocol):
    tree = {
        "numbers": [0, 1, 255, 256, 65536, -1, 2**31, -(2**63), 2**200, 1.5, -np.inf, True, False, None],
        "text": ["", "x" * 300, "\u00e4\u4e2d\U0001f600", "y" * 70000],
        "nested": ({"a": ()}, (1,), (1, 2), (1, 2, 3), (1, 2, 3, 4), []),
        "ordered": OrderedDict(),
        "arrays": [
            np.arange(6, dtype=">i2").reshape(2, 3),
            np.asfortranarray(np.arange(6.0).reshape(2, 3)),
            np.arange(24.0).reshape(2, 3, 4).transpose(1, 0, 2),
            np.arange(16.0).reshape(4, 4)[::2, ::2],
            np.array([[True], [False]]),
            np.array(["a", "bcd\u00e9"]),
            np.zeros((0, 3), np.float16),
            np.array(7, np.uint8),
        ],
        "objects": np.array(["a", None], object),
        "scalars": [np.float32(0.1), np.int64(-3), np.bool_(True), np.str_("abc"), np.float64(0.1)],
    }
    tree["again"] = tree["numbers"]
    read, content = pickles.read(save(tmp_path / "a.pkl", tree, protocol))
    assert bytes(content) == (tmp_path / "a.pkl").read_bytes()
    assert read["again"] is read["numbers"]
    for key in ("numbers", "text", "nested"):
        assert read[key] == tree[key]
        assert [type(x) for x in read[key]] == [type(x) for x in tree[key]]
    assert read["ordered"] == {}
    assert read["objects"] == ["a", None]
    assert read["scalars"] == [float(np.float32(0.1)), -3, True, "abc", 0.1]
    for expected, actual in zip(tree["arrays"], read["arrays"], strict=True):
        assert actual.dtype == expected.dtype
        np.testing.assert_array_equal(actual, expected)
        assert not actual.flags.writeable or not actual.size


def test_large_arrays_stay_in_the_file(tmp_path):
    path = save(tmp_path / "a.pkl", {"train": {"x": np.ones(4_000_000)}})
    tracemalloc.start()
    tree, _ = pickles.read(path)
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert tree["train"]["x"].sum() == 4_000_000
    assert peak < 1_000_000


def without(key):
    tree = aligned()
    del tree["valid"][key]
    return tree


def with_nan():
    audio = split(["a", "b", "c"])["audio"]
    audio[1, 2, 0] = np.nan
    return aligned(audio=audio)


@pytest.mark.parametrize(
    ("tree", "message"),
    [
        ([1], "a list, expected a dictionary"),
        ({}, "no clips under 'train'"),
        ({"train": {"id": []}}, "no clips under 'train'"),
        ({"train": [1]}, "'train' is a list"),
        ({"valid": split(["a", "b"]), "dev": split(["c", "d"])}, "'valid' and 'dev' are the same split"),
        (without("id"), "valid lacks 'id'"),
        (without("regression_labels"), "valid lacks 'regression_labels'"),
        (aligned(id=["a", "b", "a"]), "id 'a' occurs 2 times"),
        (aligned(id=["v_2$_$10", "b", "c"]), r"id 'v_2\$_\$10' occurs 2 times"),
        (aligned(id=["a", "b\nc", "d"]), r"train\['id'\]\[1\] is 'b\\nc', expected a text of one line"),
        (aligned(id=["a", " b", "d"]), r"\[1\] is ' b'"),
        (aligned(id=["a", "", "d"]), r"\[1\] is ''"),
        (aligned(id=["a", "b", 3]), r"\[2\] is int"),
        (aligned(id=np.arange(3)), r"\[0\] is int"),
        (aligned(id=["a", "b", "c\ud800"]), r"\[2\] is 'c"),
        (aligned(id={"a": 1}), "is a dict, expected a list of texts"),
        (aligned(id=["a", "b"]), r"expected \(2,\)"),
        (aligned(regression_labels=[1, 2]), r"shape \(2,\), expected \(3,\)"),
        (aligned(regression_labels=[1, 2, "3"]), "expected 3 numbers"),
        (aligned(regression_labels=[1, 2, 10**400]), "out of range"),
        (aligned(regression_labels=[1, np.nan, 2]), "of 'v_1.*' is nan, expected a finite number"),
        (aligned(regression_labels_T=[1, np.inf, 2]), "is inf, expected a finite number"),
        (aligned(regression_labels=[1, -1e39, 2]), r"is -1e\+39, expected a finite number of float32"),
        (aligned(audio=np.zeros((3, 4))), r"shape \(3, 4\), expected \(3, steps, features\)"),
        (aligned(audio=np.zeros((2, 4, 2))), r"shape \(2, 4, 2\), expected \(3,"),
        (aligned(audio=np.zeros((3, 4, 0))), r"shape \(3, 4, 0\)"),
        (aligned(audio=[[1.0]]), "is not an array of numbers"),
        (aligned(audio=np.array([["x"]] * 3)), "is not an array of numbers"),
        (aligned(audio=np.zeros((3, 4, 5))), "has 2 features a step, the split before has 5"),
        (aligned(audio_lengths=[1, 2]), r"\(2,\), expected \(3,\)"),
        (aligned(audio_lengths=[1, 2, -1]), "expected numbers of steps"),
        (aligned(audio_lengths=[1, 2, 0.5]), "expected numbers of steps"),
        (aligned(text_bert=np.ones((3, 3, 5))), r"is \(3, 3, 5\), expected \(3, 3, 4\)"),
        (aligned(text_bert=["x"]), r"is list, expected \(3, 3, 4\)"),
        (aligned(text_bert=np.full((3, 3, 4), 2)), "not a mask of 0 and 1"),
        (with_nan(), r"train\['audio'\] of 'v_1\$_\$2': feature 0 is not a finite float32 number"),
        (aligned(audio=np.full((3, 4, 2), 1e300)), "feature 0 is not a finite float32 number"),
        (aligned(audio=np.full((3, 4, 2), np.inf)), "feature 0 is not a finite float32 number"),
        ({"train": {k: v for k, v in split(["a", "b"]).items() if k in ("id", "regression_labels")}}, "none of 'text'"),
        ({"train": {**split(["a", "b"]), "vision": np.zeros((2, 4, 1))}}, "no clip has video; leave it out"),
    ],
)
def test_refused_with_one_sentence_and_nothing_is_left(tmp_path, tree, message):
    path = save(tmp_path / "a.pkl", tree)
    with pytest.raises(ConclugenError, match=message) as e:
        mmsa.convert(path, tmp_path / "out")
    assert "\n" not in str(e.value)
    assert list(tmp_path.iterdir()) == [path]


def test_values_outside_the_valid_steps_do_not_matter(tmp_path):
    text = split(["a", "b", "c"])["text"]
    text[0, 3] = np.array([0x7F800001], np.uint32).view(np.float32)  # padding; a number whose conversion warns
    mmsa.convert(save(tmp_path / "a.pkl", aligned(text=text)), tmp_path / "out")
    assert tables(tmp_path / "out")[0]["text"]["v_1$_$10"] == TEXT[0]


def test_unknown_modality_and_output_in_the_way(tmp_path):
    path = save(tmp_path / "a.pkl", {"train": {k: v for k, v in split(["a", "b"]).items() if k != "vision"}})
    with pytest.raises(ConclugenError, match="holds no 'video'; there are text, audio"):
        mmsa.convert(path, tmp_path / "out", modalities=["video"])
    for name in ("folder", "file", "link"):
        target = tmp_path / name
        {"folder": Path.mkdir, "file": Path.touch, "link": lambda p: p.symlink_to("nowhere")}[name](target)
        with pytest.raises(ConclugenError, match="exists already"):
            mmsa.convert(path, target)
        with pytest.raises(ConclugenError, match="exists already"):  # before the source is looked at
            mmsa.convert(tmp_path / "missing", target)
    with pytest.raises(ConclugenError, match="cannot write the tables"):
        mmsa.convert(path, tmp_path / "file" / "out")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["a.pkl", "file", "folder", "link"]


def test_a_failure_while_writing_leaves_nothing(tmp_path, monkeypatch):
    path = save(tmp_path / "a.pkl", aligned())

    def full(*arguments, **options):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(mmsa.csv, "writer", full)
    with pytest.raises(ConclugenError, match=r"cannot write the tables \(No space left"):
        mmsa.convert(path, tmp_path / "out")
    assert list(tmp_path.iterdir()) == [path]


def test_a_folder_that_appears_meanwhile_is_left_alone(tmp_path, monkeypatch):
    path = save(tmp_path / "a.pkl", aligned())
    monkeypatch.setattr(mmsa.json, "dumps", lambda *_, **__: (tmp_path / "out").mkdir() or "")
    with pytest.raises(ConclugenError, match="exists already"):
        mmsa.convert(path, tmp_path / "out")
    assert sorted(tmp_path.iterdir()) == [path, tmp_path / "out"]
    assert not list((tmp_path / "out").iterdir())


def test_a_file_that_changes_meanwhile_is_refused(tmp_path, monkeypatch):
    path = save(tmp_path / "a.pkl", aligned())
    read = mmsa.pickles.read

    def slowly(source):
        result = read(source)
        os.utime(source, ns=(1, 1))
        return result

    monkeypatch.setattr(mmsa.pickles, "read", slowly)
    with pytest.raises(ConclugenError, match="changed while it was read"):
        mmsa.convert(path, tmp_path / "out")
    assert list(tmp_path.iterdir()) == [path]


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
    ("protocol 6", "(ValueError); nothing", b"\x80\x06N."),
    ("no stop", "cut off: 1 bytes are announced and 0 are left", b"\x80\x04}"),
    ("zip", "not a pickle of protocol 2 to 5, which begins with the byte 0x80", b"PK\x03\x04" + b"\0" * 50),
    ("name without end", "(ValueError); nothing", b"\x80\x02cnumpy"),
    ("long name", "(ValueError); nothing", b"\x80\x02c" + b"n" * 5000 + b"\nx\n."),
    ("next buffer", "holds the operation NEXT_BUFFER", b"\x80\x05\x97."),
    ("python 2 text", "written by Python 2", b"\x80\x02U\x03abc."),
    ("order unknown", "an array of unknown order", BUFFER + text("Z") + b"tR."),
    ("axes unknown", "(AxisError); nothing", BUFFER + text("K") + b"K\x07\x85tR."),
    ("array of 8 bytes beyond", "bytes are announced and 2 are left", b"\x80\x05\x96" + b"\xff" * 7 + b"\x7f" + b"x."),
    ("axes are deep", "(TypeError); nothing", BUFFER + text("K") + b")" + b"\x85" * DEEP + b"tR."),
]  # fmt: skip
"""Whole files: name, part of what is said, content."""

OPERATIONS = [
    ("empty stack", "(IndexError); nothing", b""),
    ("unknown operation", "0xff is not an operation of the pickle format", b"\xff"),
    ("system", "asks for 'posix.system'", SYSTEM),
    ("system in inst", "holds the operation INST", b"(" + text(f"touch {MARKER}") + b"iposix\nsystem\n"),
    ("system in obj", "asks for 'posix.system'", b"(cposix\nsystem\n" + text(f"touch {MARKER}") + b"o"),
    ("system in newobj", "asks for 'posix.system'", b"cposix\nsystem\n" + text(f"touch {MARKER}") + b"\x85\x81"),
    ("system in newobj_ex", "asks for 'posix.system'", b"cposix\nsystem\n" + text(f"touch {MARKER}") + b"\x85}\x92"),
    ("dotted name", "asks for 'numpy.ndarray.tofile'", text("numpy") + text("ndarray.tofile") + b"\x93"),
    ("dotted way round", "asks for 'numpy._core.multiarray.scalar.__class__'",
     text("numpy._core") + text("multiarray.scalar.__class__") + b"\x93"),
    ("split otherwise", "asks for '_codecs.encode.__self__'", text("_codecs") + text("encode.__self__") + b"\x93"),
    ("name of numbers", "(UnpicklingError); nothing", b"K\x01K\x02\x93"),
    ("extension 1", "holds the operation EXT1", b"\x82\x01"),
    ("extension 2", "holds the operation EXT2", b"\x83\x01\x00"),
    ("extension 4", "holds the operation EXT4", b"\x84\x01\x00\x00\x00"),
    ("persistent id", "holds the operation PERSID", b"Pabc\n"),
    ("persistent id on the stack", "holds the operation BINPERSID", text("abc") + b"Q"),
    ("call of text", "a call of something that is not a function", text("os.system") + text("x") + b"\x85R"),
    ("call of ndarray", "a call of a class", b"cnumpy\nndarray\n" + long(10**13) + b"\x85R"),
    ("call without tuple", "a call of something that is not a function", b"cnumpy\ndtype\n]R"),
    ("call with too much", "(TypeError); nothing", b"cnumpy\ndtype\n(NNNNNNtR"),
    ("state of a dictionary", "sets the state of a", b"}}b"),
    ("state of a name", "sets the state of a", b"cnumpy\ndtype\n}b"),
    ("state is short", "(ValueError); nothing", array(b"", b")", b"")),
    ("huge shape", "an array of impossible shape", array(dtype("f8"), long(10**13) + b"\x85", data(b"x" * 16))),
    ("huger shape", "bytes has ", array(dtype("f8"), (long(2**39) * 3 + b"\x87"), data(b""))),
    ("shape beyond", "an array of impossible shape", array(dtype("f8"), long(2**200) + b"\x85", data(b""))),
    ("shape of nothing", "(ValueError); nothing", array(dtype("f8"), b"K\x00" + long(2**39) * 2 + b"\x87", data(b""))),
    ("negative shape", "an array of impossible shape", array(dtype("f8"), long(-1) + b"\x85", data(b"x" * 8))),
    ("shape of text", "an array of impossible shape", array(dtype("f8"), text("1") + b"\x85", data(b"x" * 8))),
    ("content is a list", "bytes has ", array(dtype("f8"), b"K\x01\x85", b"]")),
    ("objects are bytes", "objects that are not there", array(dtype("O8", "|"), b"K\x01\x85", data(b"\x01" * 8))),
    ("objects are few", "objects that are not there", array(dtype("O8", "|"), b"K\x05\x85", b"]")),
    ("type without state", "an array of unknown type or shape",
     array(b"cnumpy\ndtype\n" + text("f8") + b"\x85R", b")", data(b"x" * 8))),
    ("type of a list", "an array of type unknown;", b"cnumpy\ndtype\n" + b"]" * DEEP + b"a" * (DEEP - 1) + b"\x85R"),
    ("type of much text", "an array of type 'U99999999';", dtype("U99999999")),
    ("type of nothing", "an array of type 'U0';", array(dtype("U0"), long(10**11) + b"\x85", data(b""))),
    ("type with fields", "an array of type 'f4,O';", dtype("f4,O")),
    ("type with fields in its state", "an array of a composed type", dtype("f4").replace(b"NNN", b"N)}")),
    ("type void", "an array of type 'V8';", dtype("V8")),
    ("type order", "an array of a composed type", dtype("f4", "<f4,O")),
    ("class of its own", "an array of a class of its own", CORE + b"_reconstruct\ncnumpy\ndtype\nK\x00\x85C\x01b\x87R"),
    ("scalar object", "a number that is an object", CORE + b"scalar\n" + dtype("O8", "|") + b"]Na\x86R"),
    ("scalar too long", "bytes has ", CORE + b"scalar\n" + dtype("f8") + data(b"x" * 9) + b"\x86R"),
    ("scalar no character", "text that is not Unicode",
     CORE + b"scalar\n" + dtype("U1") + data(b"\xff" * 4) + b"\x86R"),
    ("encode otherwise", "an encoding other than that of bytes",
     b"c_codecs\nencode\n" + text("x") + text("rot13") + b"\x86R"),
    ("encode wide", "(UnicodeEncodeError); nothing",
     b"c_codecs\nencode\n" + text("\u4e2d") + text("latin1") + b"\x86R"),
    ("length beyond the end", "bytes are announced and 2 are left", b"B\xff\xff\xff\xffx"),
    ("length of 8 bytes beyond", "(UnpicklingError); nothing", b"\x8e" + b"\xff" * 8 + b"x"),
    ("text not utf-8", "(UnicodeDecodeError); nothing", b"X\x02\x00\x00\x00\xff\xff"),
    ("memo unknown", "(KeyError); nothing", b"j\xff\xff\xff\xff"),
    ("key is a list", "a dictionary whose keys are not text", b"}]Ns"),
    ("key is deep", "a dictionary whose keys are not text", b"})" + b"\x85" * DEEP + b"Ns"),
    ("odd number of items", "a dictionary whose keys are not text", b"}(" + text("a") + b"u"),
    ("items of a list", "where a dict must be", b"](" + text("a") + b"Nu"),
    ("append to a dictionary", "(AttributeError); nothing", b"}Na"),
    ("no mark", "(IndexError); nothing", b"]e"),
    ("below the mark", "(IndexError); nothing", b"]]((\x86"),
    ("deep tuple", "expected a dictionary with 'train'", b")" + b"\x85" * DEEP),
    ("deep list", "expected a dictionary with 'train'", b"]" * DEEP + b"a" * (DEEP - 1)),
    ("name is deep", "(UnpicklingError); nothing", b")" + b"\x85" * DEEP + text("x") + b"\x93"),
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
        with pytest.raises(ConclugenError, match="no such file"):
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
