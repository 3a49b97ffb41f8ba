"""Feature dictionaries of MMSA: values by hand, every layout, files that attack, the command."""

import csv
import json
import os
import pickle
import subprocess
import tracemalloc
from collections import OrderedDict
from pathlib import Path

import numpy as np
import pytest

from conclugen_jax.data import pickles
from conclugen_jax.data.importers import mmsa
from conclugen_jax.errors import ConclugenError

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
        ({"train": [1]}, "train is a list"),
        ({"valid": split(["a", "b"]), "dev": split(["c", "d"])}, "dev and .*valid are the same split"),
        (without("id"), "valid lacks 'id'"),
        (without("regression_labels"), "valid lacks 'regression_labels'"),
        (aligned(id=["a", "b", "a"]), "id 'a' occurs 2 times"),
        (aligned(id=["v_2$_$10", "b", "c"]), r"id 'v_2\$_\$10' occurs 2 times"),
        (aligned(id=["a", "b\nc", "d"]), r"train\['id'\]\[1\] is 'b\\nc', expected a list of texts of one line"),
        (aligned(id=["a", " b", "d"]), r"\[1\] is ' b'"),
        (aligned(id=["a", "", "d"]), r"\[1\] is ''"),
        (aligned(id=["a", "b", 3]), r"\[2\] is \d"),
        (aligned(id=np.arange(3)), r"\[0\] is \d"),
        (aligned(id=["a", "b", "c\ud800"]), r"\[2\] is 'c"),
        (aligned(id={"a": 1}), r"\[0\] is a dict, expected a list of texts"),
        (aligned(id=["a", "b"]), r"shape \(3,\), expected .* \(2,\)"),
        (aligned(regression_labels=[1, 2]), r"shape \(2,\), expected .* \(3,\)"),
        (
            aligned(regression_labels=[1, 2, "3"]),
            r"\['regression_labels'\] is list, expected real numbers of shape \(3,\)",
        ),
        (aligned(regression_labels=[1, 2, 10**400]), r"is list, expected real numbers of shape \(3,\)"),
        (aligned(regression_labels=[1, np.nan, 2]), "of 'v_1.*' is nan, expected a finite number"),
        (aligned(regression_labels_T=[1, np.inf, 2]), "is inf, expected a finite number"),
        (aligned(regression_labels=[1, -1e39, 2]), r"is -1e\+39, expected a finite number of float32"),
        (aligned(audio=np.zeros((3, 4))), r"shape \(3, 4\), expected .* \(3, steps, features\)"),
        (aligned(audio=np.zeros((2, 4, 2))), r"shape \(2, 4, 2\), expected .* \(3,"),
        (aligned(audio=np.zeros((3, 4, 0))), r"shape \(3, 4, 0\)"),
        (aligned(audio=[[1.0]]), "is list, expected real numbers"),
        (aligned(audio=np.array([["x"]] * 3)), "is <U1 of shape .*, expected real numbers"),
        (
            aligned(audio=np.zeros((3, 4, 5))),
            r"valid\['audio'\] is .* of shape \(2, 4, 2\), expected .* \(2, steps, 5\)",
        ),
        (aligned(audio_lengths=[1, 2]), r"\(2,\), expected .* \(3,\)"),
        (aligned(audio_lengths=[1, 2, -1]), "of '-x.*' is -1, expected a number of steps"),
        (aligned(audio_lengths=[1, 2, 0.5]), "is 0.5, expected a number of steps"),
        (aligned(text_bert=np.ones((3, 3, 5))), r"shape \(3, 3, 5\), expected .* \(3, 3, 4\)"),
        (aligned(text_bert=["x"]), r"is list, expected .* \(3, 3, 4\)"),
        (aligned(text_bert=np.full((3, 3, 4), 2)), "of 'v_1.*' is .*, expected a mask of 0 and 1"),
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
    with pytest.raises(ConclugenError, match="has no modality 'video'; it has 'text', 'audio'"):
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
