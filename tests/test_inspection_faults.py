"""Inspection names every damaged file, record and manifest."""

import json
import os
import shutil

import numpy as np
import pytest
from array_record.python import array_record_module

from conclugen_jax.data import builders, inspection, manifest as manifest_lib, records
from conclugen_jax.errors import ConclugenError
from tests.test_inspection import TEST, TRAIN, VALIDATION, Odd, edit_manifest, list_anew, rewrite, text


def flip(path, byte):
    data = bytearray(path.read_bytes())
    data[byte] ^= 1
    path.write_bytes(data)


def swap(folder, a, b):
    os.rename(folder / a, folder / "aside")
    os.rename(folder / b, folder / a)
    os.rename(folder / "aside", folder / b)


def flag(folder, listed):
    path = folder / "presence-train.npy"
    flags = np.load(path)
    flags[[5, 6, 7, 9], 2] ^= True
    np.save(path, flags)
    if listed:
        list_anew(folder, path.name)


def other_json(folder, name, old, new):
    other_bytes(folder, name, old.encode(), new.encode())


def other_bytes(folder, name, old, new):
    path = folder / name
    content = path.read_bytes()
    assert old in content
    path.write_bytes(content.replace(old, new, 1))
    list_anew(folder, name)


def cut(folder, name, size, listed=False):
    os.truncate(folder / name, size)
    if listed:
        list_anew(folder, name)


def set_manifest(*keys, value):
    def edit(tree):
        for key in keys[:-1]:
            tree = tree[key]
        tree[keys[-1]] = value(tree[keys[-1]])

    return lambda folder: edit_manifest(folder, edit)


HASH = "content differs from the manifest (SHA-256)"
OTHER_FLAG = "text is said otherwise than in the record"
TFDS = "TFDS cannot open the data set with it and features.json"
RECORDS, SHARDS = "fields of the records are said", "shards of split 'test' are said otherwise"
FILES = {
    "bit of a record": (lambda f: flip(f / TRAIN, 2500), [(TRAIN, HASH, []), (TRAIN, "cannot be read", "any")]),
    "bit of the padding": (lambda f: flip(f / TEST, 60_000), [(TEST, HASH, [])]),
    "truncated": (
        lambda f: cut(f, VALIDATION, 131071),
        [(VALIDATION, "131071 bytes, the manifest says 131072", []), (VALIDATION, "cannot be opened", [])],
    ),
    "truncated, and listed": (
        lambda f: cut(f, VALIDATION, 65536, listed=True),
        [(VALIDATION, "cannot be opened", [])],
    ),
    "empty": (lambda f: cut(f, TEST, 0), [(TEST, "0 bytes", []), (TEST, "cannot be opened", [])]),
    "deleted": (
        lambda f: (f / TEST).unlink(),
        [(TEST, "the file is missing", []), (TEST, "cannot be opened", [])],
    ),
    "a folder instead": (
        lambda f: [(f / TEST).unlink(), (f / TEST).mkdir()],
        [(TEST, "the file is missing", []), (TEST, "cannot be opened", [])],
    ),
    "shards swapped": (
        lambda f: swap(f, VALIDATION, TEST),
        [
            (VALIDATION, HASH, []),
            (VALIDATION, "holds 8 records, the manifest says 11", []),
            ("presence-validation.npy", "video is said otherwise", [[3, 3]]),
            (TEST, HASH, []),
            (TEST, "holds 11 records, the manifest says 8", []),
            ("presence-test.npy", "video is said otherwise", [[3, 3]]),
        ],
    ),
    "presence": (
        lambda f: flag(f, False),
        [("presence-train.npy", HASH, []), ("presence-train.npy", OTHER_FLAG, [[5, 7], [9, 9]])],
    ),
    "presence, and listed": (lambda f: flag(f, True), [("presence-train.npy", OTHER_FLAG, [[5, 7], [9, 9]])]),
    "presence truncated": (
        lambda f: cut(f, "presence-test.npy", 140, listed=True),
        [("presence-test.npy", "cannot be read", [])],
    ),
    "presence empty": (
        lambda f: cut(f, "presence-test.npy", 0, listed=True),
        [("presence-test.npy", "cannot be read", [])],
    ),
    "presence with a damaged header": (
        lambda f: other_bytes(f, "presence-train.npy", b" 3), }", b" 3(, }"),
        [("presence-train.npy", "cannot be read", [])],
    ),
    "presence of another split": (
        lambda f: [shutil.copy(f / "presence-train.npy", f / "presence-test.npy"), list_anew(f, "presence-test.npy")],
        [("presence-test.npy", "not bool of shape (8, 3)", [])],
    ),
    "dataset_info.json truncated": (
        lambda f: cut(f, "dataset_info.json", 300),
        [("dataset_info.json", "300 bytes", []), ("dataset_info.json", TFDS, [])],
    ),
    "features.json truncated": (
        lambda f: cut(f, "features.json", 300, listed=True),
        [("dataset_info.json", TFDS, [])],
    ),
    "features.json deleted": (
        lambda f: (f / "features.json").unlink(),
        [("features.json", "the file is missing", []), ("dataset_info.json", TFDS, [])],
    ),
    "another shard length": (
        lambda f: other_json(f, "dataset_info.json", '"8"', '"9"'),
        [("dataset_info.json", SHARDS, [])],
    ),
    "another split": (
        lambda f: other_json(f, "dataset_info.json", '"test"', '"best"'),
        [("dataset_info.json", SHARDS, []), ("dataset_info.json", "shards of split 'best'", [])],
    ),
    "another name": (
        lambda f: other_json(f, "dataset_info.json", '"odd"', '"even"'),
        [("dataset_info.json", f"shards of split '{s}'", []) for s in ("train", "validation", "test")],
    ),
    "no TFDS data set": (
        lambda f: other_json(f, "dataset_info.json", '"array_record"', '"parchment"'),
        [("dataset_info.json", TFDS, [])],
    ),
    "another size of a feature": (
        lambda f: other_json(f, "features.json", '"7"', '"6"'),
        [("features.json", RECORDS, [])],
    ),
    "another type of a feature": (
        lambda f: other_json(f, "features.json", '"float32"', '"float64"'),
        [("features.json", RECORDS, [])],
    ),
    "a type that there is not": (
        lambda f: other_json(f, "features.json", '"float32"', '"float31"'),
        [("dataset_info.json", TFDS, [])],
    ),
    "label counts": (
        set_manifest("splits", "test", "label_counts", value=lambda x: [x[0] + 1, x[1]]),
        [("manifest.json", "split 'test': label_counts 4, 4, the records have 3, 4", [])],
    ),
    "presence counts": (
        set_manifest("splits", "test", "present", "text", value=lambda x: x + 1),
        [("manifest.json", "split 'test': present of text 7, the records have 6", [])],
    ),
    "target counts": (
        set_manifest("splits", "train", "target_counts", "mood", value=lambda x: x[::-1] if x[0] != x[1] else [0, 10]),
        [("manifest.json", "split 'train': target_counts of mood 0, 10, the records have 5, 5", [])],
    ),
    "number of examples": (
        lambda f: [
            set_manifest("splits", "train", "num_examples", value=lambda x: 29)(f),
            set_manifest("files", TRAIN, "records", value=lambda x: 29)(f),
        ],
        [
            ("dataset_info.json", "shards of split 'train'", []),
            ("presence-train.npy", "not bool of shape (29, 3)", []),
            (TRAIN, "holds 30 records, the manifest says 29", []),
        ],
    ),
    "mean": (
        set_manifest("statistics", "audio", "mean", value=lambda x: [x[0], *(v * (1 + 1e-8) for v in x[1:])]),
        [("manifest.json", "mean of audio: 6 columns differ from the records' (column 1: ", [])],
    ),
    "deviation": (
        set_manifest("statistics", "video", "std", value=lambda x: [*x[:4], x[4] * (1 + 2e-9)]),
        [("manifest.json", "std of video: 1 columns differ from the records' (column 4: ", [])],
    ),
    "file not listed": (
        lambda f: edit_manifest(f, lambda tree: tree["files"].pop("features.json")),
        [("manifest.json", "features.json, which TFDS needs, is not listed", [])],
    ),
}


def check_faults(report, expected):
    """Exactly these, in this order: file, beginning or part of what is said, ranges of rows."""
    found = report["faults"]
    assert [fault["file"] for fault in found] == [file for file, _, _ in expected], found
    for fault, (_, what, rows) in zip(found, expected, strict=True):
        assert what in fault["what"], fault
        assert fault["rows"] if rows == "any" else fault["rows"] == rows, fault
        printed = " ".join(text(report, width=1000).split())
        assert f"- {fault['file']}: " in printed
        assert fault["what"] in printed


@pytest.mark.parametrize("kind", FILES)
def test_damaged_files_are_named(odd_copy, kind, capsys):
    damage, expected = FILES[kind]
    damage(odd_copy)
    check_faults(inspection.inspect(odd_copy, verify=True), expected)
    assert capsys.readouterr().out == ""  # which belongs to --json


def test_shards_of_the_same_split_swapped(tmp_path, monkeypatch):
    monkeypatch.setattr(builders, "SHARD_BYTES", 7 * 4 * 34)
    folder = builders.build(Odd(), tmp_path)
    names = manifest_lib.shard_names(manifest_lib.read(folder), "train")[:2]
    assert len({(folder / name).stat().st_size for name in names}) == 1
    swap(folder, *names)
    faults = inspection.inspect(folder, verify=True)["faults"]
    assert [fault["file"] for fault in faults if fault["what"] == HASH] == names
    # and were their hashes right, the file of presence would tell
    assert {fault["file"] for fault in faults} == {*names, "presence-train.npy"}


def set_bytes(features, name, value):
    features[name].bytes_list.value[0] = value


def vector(features, name, column, value):
    x = np.frombuffer(features[name].bytes_list.value[0], "<f4").copy()
    x[column] = value
    set_bytes(features, name, x.tobytes())


RECORD_FAULTS = {
    "nan": (lambda r: vector(r[3], "features/audio", 2, np.nan), ["audio has values that are not finite"]),
    "nan in a variant": (
        lambda r: vector(r[3], "features/video", 14, np.inf),
        ["video has values that are not finite"],
    ),
    "nan where absent": (lambda r: vector(r[5], "features/text", 1, np.nan), ["text has values that are not finite"]),
    "absent, not zero": (lambda r: vector(r[5], "features/text", 1, 3), ["text is absent but not zero"]),
    "label": (lambda r: vector(r[3], "label", 0, 0.5), ["label is out of range"]),
    "label unknown": (lambda r: vector(r[3], "label", slice(None), np.nan), ["label is out of range"]),
    "target": (lambda r: r[3]["targets/mood"].int64_list.value.__setitem__(0, 2), ["target 'mood' is out of range"]),
    "target below": (lambda r: r[3]["targets/mood"].int64_list.value.__setitem__(0, -2), ["target 'mood'"]),
    "infinite": (lambda r: r[3]["targets/age"].float_list.value.__setitem__(0, np.inf), ["target 'age'"]),
    "half unknown": (lambda r: vector(r[3], "targets/tags", 0, np.nan), ["target 'tags'"]),
    "unprintable id": (lambda r: set_bytes(r[3], "id", b"a\nb"), ["id is not of 1 to 1000 printable characters"]),
    "no id": (lambda r: set_bytes(r[3], "id", b""), ["id is not of 1 to 1000"]),
    "long group": (lambda r: set_bytes(r[3], "group", b"g" * 1001), ["group is not of 0 to 1000 printable"]),
    "not UTF-8": (lambda r: set_bytes(r[3], "group", b"\xff"), ["id or group is not UTF-8"]),
    "id twice": (lambda r: set_bytes(r[3], "id", b"train1"), ["the id of a row before it in the split"]),
    "size": (
        lambda r: set_bytes(r[3], "features/audio", bytes(24)),
        ["field 'features/audio' holds 24 bytes, expected 28"],
    ),
    "one variant": (
        lambda r: set_bytes(r[3], "features/video", bytes(20)),
        ["field 'features/video' holds 20 bytes, expected 60"],
    ),
    "no field": (lambda r: r[3].__delitem__("present/audio"), ["field 'present/audio' holds 0 values"]),
    "another kind": (lambda r: r[3]["label"].int64_list.value.append(1), ["field 'label' holds 0 values"]),
    "two values": (lambda r: r[3]["id"].bytes_list.value.append(b"x"), ["field 'id' holds 2 values"]),
    "another field": (lambda r: r[3]["smell"].int64_list.value.append(1), ["unknown field 'smell'"]),
}


@pytest.mark.parametrize("kind", RECORD_FAULTS)
def test_faults_of_records_are_named_with_their_row(odd_copy, kind):
    edit, messages = RECORD_FAULTS[kind]
    name = rewrite(odd_copy, "train", edit)
    row = 5 if "absent" in kind else 3
    check_faults(inspection.inspect(odd_copy, verify=True), [(name, message, [[row, row]]) for message in messages])


def test_presence_in_a_record(odd_copy):
    def edit(rows):
        for row in (3, 4):
            for m in ("video", "audio", "text"):
                rows[row][f"present/{m}"].int64_list.value[0] = 0

    name = rewrite(odd_copy, "test", edit)
    check_faults(
        inspection.inspect(odd_copy, verify=True),
        [
            (name, "video is absent but not zero", [[4, 4]]),
            (name, "audio is absent but not zero", [[3, 4]]),
            (name, "text is absent but not zero", [[3, 4]]),
            (name, "no modality is present", [[3, 4]]),
            ("presence-test.npy", "video is said otherwise", [[4, 4]]),
            ("presence-test.npy", "audio is said otherwise", [[3, 4]]),
            ("presence-test.npy", OTHER_FLAG, [[3, 4]]),
            ("manifest.json", "present of video 7, the records have 6", []),
            ("manifest.json", "present of audio 8, the records have 6", []),
            ("manifest.json", "present of text 6, the records have 4", []),
        ],
    )


def test_a_record_that_is_none(odd_copy):
    writer = array_record_module.ArrayRecordWriter(str(odd_copy / TEST), records.WRITER_OPTIONS)
    for i in range(8):
        writer.write(bytes([255, i]) * 10)
    writer.close()
    list_anew(odd_copy, TEST)
    report = inspection.inspect(odd_copy, verify=True)
    check_faults(report, [(TEST, "the record cannot be parsed", [[0, 7]])])
    facts = report["splits"]["test"]
    assert facts["num_examples"] == 0
    assert facts["features"]["audio"]["norm_mean"] is None
    assert facts["label"] == {"known": 0, "counts": [0, 0], "explained_by_group": None}
    json.dumps(report, allow_nan=False)


def test_all_damage_at_once_is_listed(odd_copy):
    flip(odd_copy / TRAIN, 2500)
    (odd_copy / VALIDATION).unlink()
    cut(odd_copy, "dataset_info.json", 100)
    flag(odd_copy, listed=False)
    rewrite(odd_copy, "test", lambda r: vector(r[3], "features/audio", 2, np.nan))
    report = inspection.inspect(odd_copy, verify=True)
    files = {fault["file"] for fault in report["faults"]}
    assert files == {TRAIN, VALIDATION, TEST, "dataset_info.json", "presence-train.npy"}
    (row,) = next(f["rows"] for f in report["faults"] if f["what"] == "the record cannot be read")
    assert report["splits"]["train"]["num_examples"] == 29
    lost = row[0]
    values = [e.label for i, e in enumerate(Odd().examples("train")) if i != lost]
    assert report["splits"]["train"]["label"]["counts"] == np.sum(values, axis=0).tolist()


def test_many_rows_are_listed_in_full_but_printed_in_part(odd_copy):
    def edit(rows):
        for row in rows[::2]:
            set_bytes(row, "group", b"\t")

    rewrite(odd_copy, "train", edit)
    report = inspection.inspect(odd_copy, verify=True)
    (fault,) = report["faults"]
    assert fault["rows"] == [[i, i] for i in range(0, 30, 2)]
    assert "rows 0, 2, 4, 6, 8, 10, 12, 14, 16, 18, 20, 22, 24, 26, 28: group" in text(report, width=200)
    fault["rows"] = [[i, i + 1] for i in range(0, 90, 3)]
    assert "57-58, ... (60 in all, --json lists them): group" in text(report, width=300)


def test_without_verification_sizes_are_compared_and_unusable_records_refused(odd_copy):
    flip(odd_copy / TEST, 60_000)
    report = inspection.inspect(odd_copy)
    assert report["faults"] == []
    assert report["verified"] == "size"
    assert "sizes of the files only" in text(report)
    rewrite(odd_copy, "validation", lambda r: vector(r[3], "features/audio", 2, np.nan))
    report = inspection.inspect(odd_copy)
    assert report["splits"]["validation"]["features"]["audio"]["non_finite"] == 1
    assert report["splits"]["validation"]["features"]["audio"]["vectors"] == 10
    assert "audio, validation: 1 value not finite (must be 0" in text(report)
    rewrite(odd_copy, "validation", lambda r: set_bytes(r[3], "features/audio", bytes(24)))
    with pytest.raises(ConclugenError, match=r"odd-validation.*row 3: .*24 bytes, expected 28; --verify lists all"):
        inspection.inspect(odd_copy)
    cut(odd_copy, TEST, 131071)
    with pytest.raises(ConclugenError, match="131071 bytes"):
        inspection.inspect(odd_copy)
