"""Folds and parts of a data set that is built already are those of its files."""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest

from conclugen_jax.data import builders, formats, shards
from conclugen_jax.data.importers import built as built_lib
from conclugen_jax.data.requests import Layout, Request
from conclugen_jax.errors import ConclugenError

N, PERSONS = 24, 6


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    folder, draw = tmp_path_factory.mktemp("files"), np.random.default_rng(0)
    ids = [f"clip{i:02d}" for i in range(N)]
    np.save(folder / "video.npy", draw.normal(size=(N, 3)).astype(np.float32))
    np.save(folder / "audio.npy", draw.normal(size=(N - 4, 2)).astype(np.float32))
    (folder / "video.txt").write_text("\n".join(ids))
    (folder / "audio.txt").write_text("\n".join(ids[4:]))  # four clips have no sound
    rows = [f"{name},{'happy' if i % 3 else 'sad'},p{i % PERSONS},{i}" for i, name in enumerate(ids)]
    (folder / "labels.csv").write_text("\n".join(["id,label,group,age", *rows]))
    return folder


@pytest.fixture(scope="module")
def whole(files):
    return built(files, files.parent / "whole", layout=Layout(targets=("age:value",)))


def built(source: Path, data_dir: Path, **options) -> Path:
    return builders.build(formats.open_source(Request("features", source, name="mine", **options)), data_dir)


def rows(folder: Path) -> dict[str, dict]:
    """Everything that is stored of each id, with its split."""
    dataset, found = shards.open_dataset(folder), {}
    for split in dataset.manifest.splits:
        stream = shards.ShardStream(dataset, split, list(dataset.manifest.modalities))
        at = np.arange(stream.num_examples)
        values, (ids, groups) = stream.rows(at), stream.names(at)
        ages = shards.ShardStream(dataset, split, ["video"], target="age") if dataset.manifest.targets else None
        for i, name in enumerate(ids.tolist()):
            present = {m: bool(x[i]) for m, x in values["present"].items()}
            features = {m: x[i].tolist() for m, x in values["features"].items()}
            found[name] = split, groups[i], int(values["label"][i]), present, features
            found[name] += (float(ages.labels(at)[i]),) if ages else ()
    return found


@pytest.mark.parametrize("by", ["group", "example"])
def test_folds_of_a_built_data_set_are_those_of_its_files(files, whole, by, tmp_path):
    how = {"folds": (3, 1), "fold_by": by, "fold_seed": 2}
    ours = built(whole, tmp_path / "ours", **how)
    theirs = built(files, tmp_path / "theirs", **how, layout=Layout(targets=("age:value",)))
    assert ours.parts[-2:] == ("mine_fold1of3_seed2", "1.0.0")
    assert rows(ours) == rows(theirs)
    assert {split for split, *_ in rows(ours).values()} == {"train", "validation", "test"}
    assert len(rows(ours)) == N


@pytest.mark.parametrize(
    "layout",
    [
        Layout(label=("smiles", "frowns")),
        Layout(label=("age",)),
        Layout(kind="none"),
        Layout(label=("label",), targets=("mood:single",)),
    ],
)
def test_labels_of_each_kind_are_kept(tmp_path, layout):
    folder = tmp_path / "files"
    folder.mkdir()
    np.save(folder / "video.npy", np.arange(2 * N, dtype=np.float32).reshape(N, 2))
    (folder / "video.txt").write_text("\n".join(map(str, range(N))))
    cells = [f"{i},{'ab'[i % 2]},{i % 2},{i // 2 % 2},{i / 7},{('good', 'bad', '')[i % 3]}" for i in range(N)]
    (folder / "labels.csv").write_text("\n".join(["id,label,smiles,frowns,age,mood", *cells]))
    whole, how = built(folder, tmp_path / "whole", layout=layout), {"folds": (3, 1), "fold_by": "example"}
    ours = shards.open_dataset(built(whole, tmp_path / "ours", **how))
    theirs = shards.open_dataset(built(folder, tmp_path / "theirs", **how, layout=layout))
    assert ours.manifest.labels() == theirs.manifest.labels()
    for split in ours.manifest.splits:
        for name, spec in ours.manifest.labels().items():
            both = [shards.ShardStream(each, split, ["video"], target=name) for each in (ours, theirs)]
            at = np.arange(both[0].num_examples)
            np.testing.assert_array_equal(*(each.names(at)[0] for each in both))
            if spec.kind != "none":
                np.testing.assert_array_equal(*(each.labels(at) for each in both))


def test_a_built_data_set_is_copied_whole_or_in_part(whole, tmp_path):
    assert rows(built(whole, tmp_path / "copy")) == rows(whole)
    part = rows(built(whole, tmp_path / "part", only=("video",)))
    assert part["clip07"][4] == {"video": rows(whole)["clip07"][4]["video"]}


def test_what_cannot_be_done_with_it_is_refused(whole, tmp_path):
    for options, sentence in (
        ({"layout": Layout(label=("age",))}, "is built already, with its labels; leave --labels"),
        ({"labels": (tmp_path / "x.csv",)}, "is built already, with its labels"),
    ):
        with pytest.raises(ConclugenError, match=sentence):
            built(whole, tmp_path, **options)
    with pytest.raises(ConclugenError, match="is built already; name it with --data"):
        formats.open_source(Request("meld", whole))
    built(whole, tmp_path / "twice")
    with pytest.raises(ConclugenError, match="overwrite"):  # not the same data set
        built(whole, tmp_path / "twice", only=("video",))
    cut = built(whole, tmp_path, folds=(3, 0))
    with pytest.raises(ConclugenError, match=r"the data have splits .* already"):
        built(cut, tmp_path, folds=(3, 0))


def test_neighbouring_rows_are_read_together(files, tmp_path, monkeypatch):
    whole = built(files, tmp_path / "whole")
    read, calls = shards.ShardStream.rows, []
    monkeypatch.setattr(built_lib, "BLOCK", 10)
    monkeypatch.setattr(shards.ShardStream, "rows", lambda *args: calls.append(len(args[1])) or read(*args))
    found = built(whole, tmp_path, only=("video",))
    assert calls == [10, 10, N - 20]
    assert rows(found)["clip03"][4]["video"] == rows(whole)["clip03"][4]["video"]


def edited(folder: Path, **changes) -> Path:
    """Change entries of a manifest."""
    path = folder / "manifest.json"
    content = json.loads(path.read_text())
    path.write_text(json.dumps(content | changes))
    return folder


def test_what_its_manifest_says_counts(files, tmp_path):
    folder = built(files, tmp_path / "whole")
    source = json.loads((folder / "manifest.json").read_text())["source"]
    edited(folder, source=source | {"extraction": {"no_face": "drop"}, "notes": ["three clips were short"]})
    cut = shards.open_dataset(built(folder, tmp_path, folds=(3, 0))).manifest.source
    assert (cut["extraction"], cut["notes"]) == ({"no_face": "drop"}, ["three clips were short"])
    edited(folder, variants={"video": 2})
    with pytest.raises(ConclugenError, match="has several vectors of video for each clip, of which one would be kept"):
        built(folder, tmp_path / "more", folds=(3, 0))


def test_folds_of_a_data_set_that_was_built_again_are_not_those_of_before(files, tmp_path):
    folder = built(files, tmp_path / "whole")
    assert built(folder, tmp_path, folds=(3, 0)) == built(folder, tmp_path, folds=(3, 0))
    shutil.copytree(files, tmp_path / "files")
    np.save(tmp_path / "files" / "video.npy", np.zeros((N, 3), np.float32))
    source = formats.open_source(Request("features", tmp_path / "files", name="mine"))
    builders.build(source, tmp_path / "whole", overwrite=True)
    with pytest.raises(ConclugenError, match="holds a data set made from other examples"):
        built(folder, tmp_path, folds=(3, 0))
