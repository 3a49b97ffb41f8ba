"""Sources, folders and scripts that ``conclugen run`` must refuse or cope with."""

import os
import subprocess
import sys

import pyarrow as pa
import pytest

import conclugen_jax
from conclugen_jax.errors import ConclugenError
from conclugen_jax.pipeline import run as pipeline
from conclugen_jax.pipeline.source import Source, stamp
from tests.helpers import run
from tests.test_run import write


def touch(path, text=""):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)
    return path


def test_an_empty_name_is_not_the_folder_of_the_shell(tmp_path):
    assert "name one folder or file" in run("run", "", f"--workdir={tmp_path / 'run'}", code=2).stderr
    assert not (tmp_path / "run").exists()


def test_one_clip_and_folders_of_data_sets_are_named(tmp_path):
    clip = touch(tmp_path / "clips/a.mp4")
    with pytest.raises(ConclugenError, match=r"a\.mp4: one clip, expected a folder of them; name the folder"):
        _ = Source(clip).kind
    touch(tmp_path / "old/data/mine/1.0.0/manifest.json")
    for folder in ("old", "old/data", "old/data/mine"):
        with pytest.raises(ConclugenError, match=r"holds a built data set; name .*/mine/1\.0\.0 instead$"):
            _ = Source(tmp_path / folder).kind


def test_the_folder_of_a_run_is_apart_from_what_is_read(tmp_path):
    clips, features = touch(tmp_path / "clips/a.mp4").parent, touch(tmp_path / "features/a.npy").parent
    for source in (clips, features):
        with pytest.raises(ConclugenError, match=r"is in the folder of the run, .*; choose another --workdir"):
            Source(source).check(source)
        with pytest.raises(ConclugenError, match="is in the folder of the run"):
            Source(source).check(tmp_path)
        Source(source).check(tmp_path / "run")
    with pytest.raises(
        ConclugenError, match=r"run: is in .*features, all of which is read; choose a --workdir beside it"
    ):
        Source(features).check(features / "run")
    Source(clips).check(clips / "run")
    before = stamp(Source(clips), clips / "run")
    touch(clips / "run/data/x.mp4")
    assert stamp(Source(clips), clips / "run") == before


def test_a_data_frame_never_takes_the_place_of_labels_of_the_source(tmp_path):
    labels = touch(tmp_path / "clips/labels.csv", "id,label\n")
    with pytest.raises(ConclugenError, match="is in the folder of the run"):
        conclugen_jax.run(labels.parent, labels.parent, labels=pa.table({"id": ["a"], "label": ["sad"]}))
    assert os.listdir(labels.parent) == ["labels.csv"]


def test_flags_that_say_nothing_of_a_source_are_refused(tmp_path):
    built = touch(tmp_path / "mine/1.0.0/manifest.json").parent
    for more in ({"pattern": "{actor}_{emotion}"}, {"drop_bad": True}, {"labels": (tmp_path / "labels.csv",)}):
        with pytest.raises(ConclugenError, match="is built already, with its labels; leave the flags of labels out"):
            Source(built, **more).check(tmp_path / "run")
    features = touch(tmp_path / "features/a.npy").parent
    with pytest.raises(ConclugenError, match=r"--label_pattern=\{a\}: .* holds no clips; leave it out"):
        Source(features, pattern="{a}").check(tmp_path / "run")


def test_clips_in_linked_folders_are_clips(tmp_path):
    touch(tmp_path / "disk/a.mp4")
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine/linked").symlink_to(tmp_path / "disk")
    (tmp_path / "disk/loop").symlink_to(tmp_path / "disk")
    source = Source(tmp_path / "mine")
    assert source.kind == "clips"
    before = stamp(source, tmp_path / "run")
    touch(tmp_path / "disk/b.mp4")
    assert stamp(Source(tmp_path / "mine"), tmp_path / "run") != before


SCRIPT = """
import sys, conclugen_jax
from conclugen_jax.errors import ConclugenError
from conclugen_jax.pipeline import run
run._trained = lambda *_: sys.exit("built in worker processes")
conclugen_jax.run(sys.argv[1], sys.argv[2], quick=True)
"""


def test_a_script_needs_no_guard_of_its_main_part(tmp_path):
    script, features = touch(tmp_path / "script.py", SCRIPT), write(tmp_path / "mine", labels=False)
    command = [sys.executable, script, features, tmp_path / "run"]
    done = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path)
    assert done.stderr.endswith("built in worker processes\n"), done.stderr


def test_settings_that_the_data_do_not_allow_are_corrected_in_the_same_folder(tmp_path, monkeypatch):
    features, folder = write(tmp_path / "mine", labels=False), tmp_path / "run"
    monkeypatch.setattr(pipeline, "_trained", lambda *_: 1 / 0)

    def refused(**changes):
        with pytest.raises(ConclugenError) as e:
            conclugen_jax.run(
                features, folder, quick=True, changes={k.replace("__", "."): v for k, v in changes.items()}
            )
        assert not (folder / "config.py").exists()
        return str(e.value)

    assert "train.batch_size is 1000" in refused(train__batch_size=1000)
    assert "config.train.num_epochs is 0; it must be between 1 and" in refused(train__num_epochs=0)
    assert "'smell'" in refused(data__modalities="smell,")
    assert refused(data__path="x") == "--config.data.path: SOURCE says the data; leave it out"
    with pytest.raises(ZeroDivisionError):
        conclugen_jax.run(features, folder, quick=True, changes={"train.batch_size": 8})
    assert "config.train.batch_size = 8" in (folder / "config.py").read_text()
    with pytest.raises(ConclugenError, match="was started with other arguments"):
        conclugen_jax.run(features, folder, quick=True, changes={"train.batch_size": 9})
