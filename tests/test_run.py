"""The command run: features in; a trained model, its scores and a page out, every stage once."""

import contextlib
import json

import numpy as np
import pyarrow as pa
import pytest

import conclugen_jax
from conclugen_jax.data import builders, shards
from conclugen_jax.data.requests import Layout
from conclugen_jax.errors import ConclugenError
from conclugen_jax.pipeline import rules, run as run_lib, source
from conclugen_jax.runs import configuration_files
from conclugen_jax.study import definition
from tests.helpers import Faces, run
from tests.reports import Page

N, PERSONS = 90, 6
TINY = (
    *("--config.model.representation_dim=32", "--config.model.projection_dim=16"),
    *("--config.train.num_epochs=6", "--config.checkpoint.every_epochs=6"),
)


def write(folder, *, labels=True):
    folder.mkdir()
    draw = np.random.default_rng(0)
    classes = draw.integers(3, size=N)
    for name, dim in (("video", 12), ("audio", 8)):
        centres = 2 * draw.normal(size=(3, dim))
        np.save(folder / f"{name}.npy", (centres[classes] + draw.normal(size=(N, dim))).astype(np.float32))
        (folder / f"{name}.txt").write_text("\n".join(f"clip{i:02d}" for i in range(N)))
    names = ["angry", "happy", "sad"]
    rows = [f"clip{i:02d},p{i % PERSONS}" + f",{names[c]}" * labels for i, c in enumerate(classes)]
    (folder / "labels.csv").write_text("\n".join(["id,group" + ",label" * labels, *rows]))
    return folder


@pytest.mark.slow
def test_features_become_a_model_scores_and_a_page(tmp_path):
    features, folder = write(tmp_path / "mine"), tmp_path / "run"
    first = run("run", features, f"--workdir={folder}", "--quick", *TINY)
    assert "probe on mine: accuracy in %" in first.stdout
    assert "no person is in both training and test; the first alone" in first.stdout
    assert "a third of the 60 training rows" in first.stderr
    page = Page((folder / "report.html").read_text())
    assert {"label-efficiency", "maps", "settings"} <= page.sections.keys()
    assert "mine (mine 1.0.0)" not in page.sections[""]
    assert "with 2 labels a class pretrained reaches" in page.sections[""]
    results = json.loads((folder / "results.json").read_text())
    assert {cell["method"] for cell in results["cells"]} == {"pretrained", "raw", "raw_smoothed", "untrained"}
    assert {cell["status"] for cell in results["cells"]} == {"done"}
    classifier = json.loads((folder / "classifier/result.json").read_text())
    assert "test" not in classifier  # it has seen all rows
    assert classifier["num_train_examples"] == N
    settings = configuration_files.load(str(folder / "config.py"), of_run=True)
    assert (settings.train.batch_size, settings.train.num_epochs, settings.data.standardize) == (16, 6, "person")

    assert "in full:    the same command without --quick, with another --workdir" in first.stdout
    (vectors,) = (line.split()[2:] for line in first.stdout.splitlines() if line.startswith("vectors:"))
    run(*vectors[:-1], f"--output={tmp_path}/vectors.npz")
    with np.load(tmp_path / "vectors.npz") as written:
        assert len(written["id"]) == N
    assert (
        f"name the workdir of a run, such as {folder}/classifier" in run("embed", f"--workdir={folder}", code=2).stderr
    )

    kept = {path: path.stat().st_mtime_ns for path in folder.rglob("result.json")}
    again = run("run", features, f"--workdir={folder}", "--quick", *TINY)
    assert again.stdout == first.stdout
    assert {path: path.stat().st_mtime_ns for path in folder.rglob("result.json")} == kept
    other = run("run", features, f"--workdir={folder}", *TINY, code=2)
    assert (
        "was started with other arguments (quick: True then, False now); repeat the command with the same"
        in other.stderr
    )
    (features / "labels.csv").touch()
    changed = run("run", features, f"--workdir={folder}", "--quick", *TINY, code=2)
    assert f"the files of {features} have changed since the run started; choose another --workdir" in changed.stderr


@pytest.mark.slow
def test_without_labels_there_is_a_model_and_a_page(tmp_path):
    features, folder = write(tmp_path / "mine", labels=False), tmp_path / "run"
    done = run("run", features, f"--workdir={folder}", "--quick", *TINY)
    assert "no labels, so no scores" in done.stdout
    page = Page((folder / "report.html").read_text())
    assert {"pretraining", "maps", "health", "settings"} <= page.sections.keys()
    assert float(page.row("effective rank")[1][0]) > 1
    assert "results" not in page.sections
    assert any((folder / "pretraining/whole/seed_0/checkpoints").glob("[0-9]*"))


def test_from_python_labels_may_be_a_data_frame(tmp_path, monkeypatch):
    asked, clips, folder = {}, tmp_path / "clips", tmp_path / "run"
    clips.mkdir()
    monkeypatch.setattr(
        "conclugen_jax.pipeline.run.run", lambda source, workdir, **how: asked.update(source=source, how=how)
    )
    frame = pa.table({"id": ["a", "b"], "label": ["sad", "happy"]})
    conclugen_jax.run(clips, folder, labels=frame, label="label", quick=True, changes={"seed": 3})
    (table,) = asked["source"].labels
    assert table.read_text().split() == ["id,label", "a,sad", "b,happy"]
    assert asked["source"].layout.label == ("label",)
    assert asked["how"] == {"quick": True, "config": "", "changes": [("seed", "3")]}
    written = table.stat().st_mtime_ns
    conclugen_jax.run(clips, folder, labels=pa.table({"id": ["a", "b"], "label": ["happy", "sad"]}))
    assert asked["source"].labels != (table,)  # other labels are another request
    conclugen_jax.run(clips, folder, labels=frame)
    assert (asked["source"].labels, table.stat().st_mtime_ns) == ((table,), written)
    assert asked["source"].layout == Layout()
    order = pa.DictionaryArray.from_arrays([1, 0], ["weak", "strong"], ordered=True)
    graded = pa.table({"id": ["a", "b"], "label": order})
    for how, classes in (({}, ("weak", "strong")), ({"classes": ["strong", "weak"]}, ("strong", "weak"))):
        conclugen_jax.run(clips, folder, labels=graded, **how)
        assert asked["source"].layout.classes == classes


def test_other_files_are_noticed_and_the_cache_of_a_built_data_set_is_not(tmp_path):
    clips, root, table = tmp_path / "clips", tmp_path / "run", tmp_path / "run" / "labels.csv"
    for folder in (clips / "happy", clips / "sad", root):
        folder.mkdir(parents=True)
    (clips / "happy" / "a.mp4").write_bytes(b"clip")
    table.write_text("id,label")
    stamps = [source.stamp(source.Source(clips, (table,)), root)]
    (clips / "happy" / "a.mp4").rename(clips / "sad" / "a.mp4")  # another class
    stamps.append(source.stamp(source.Source(clips, (table,)), root))
    table.write_text("id,label\na,sad")
    stamps.append(source.stamp(source.Source(clips, (table,)), root))
    assert len(set(stamps)) == 3
    mine = source.Source(builders.build(Faces(), tmp_path))
    before = source.stamp(mine, root)
    (mine.path / "cache" / "train").mkdir(parents=True)
    (mine.path / "cache" / "train" / "neighbours.npy").touch()
    assert source.stamp(mine, root) == before
    (mine.path / "manifest.json").touch()
    assert source.stamp(mine, root) != before


def test_a_command_may_be_corrected_until_there_is_a_data_set(tmp_path):
    features, folder = write(tmp_path / "mine"), tmp_path / "run"
    labels, good = features / "labels.csv", (features / "labels.csv").read_text()
    labels.write_text(good.replace("clip00", "clip01"))
    assert "the same id" in run("run", features, f"--workdir={folder}", code=2).stderr
    labels.write_text(good)
    run_lib._settle(folder, source.Source(features), {"quick": True})
    (folder / run_lib.INSPECTION).touch()
    run_lib._settle(folder, source.Source(features), {"quick": True})
    with pytest.raises(ConclugenError, match="quick: True then, False now"):
        run_lib._settle(folder, source.Source(features), {"quick": False})


def begun(monkeypatch, features, folder, **how):
    """Do all before training; return the study and the further runs that would be done."""
    seen = []
    monkeypatch.setattr(
        run_lib.study_lib, "within", lambda root, study, stop, further, _: seen.append((study, further))
    )
    with contextlib.suppress(TypeError):  # there are no results
        run_lib.run(source.Source(features), folder, **how)
    return seen[-1]


def test_settings_are_those_of_the_smallest_training_rows(tmp_path, monkeypatch):
    features, folder = write(tmp_path / "mine", labels=False), tmp_path / "run"
    rows = [f"clip{i:02d},{'happy' if i % 3 else 'sad'},p{i % 7},whole" for i in range(N)]  # of 12 or 13 clips each
    (features / "labels.csv").write_text("\n".join(["id,label,group,split", *rows]))
    study, (whole, classifier) = begun(monkeypatch, features, folder)
    assert study.methods.pretrained.pretraining.data.train_split == "train"
    protocols = study.datasets.mine.protocols.values()
    assert {(c.data.train_split, c.data.validation_split, c.data.test_split) for c in protocols} == {
        ("train", "train", "test")
    }
    assert study.pretraining_path.endswith("data/mine_fold{fold}of5_seed{shuffle}/1.0.0")
    assert (whole.config.data.train_split, classifier.config.data.train_split) == ("whole", "whole")
    assert classifier.config.data.test_split == ""
    folds = [shards.open_dataset(path) for path in (folder / "data").glob("mine_fold*/1.0.0")]
    smallest = min((rules.facts(fold) for fold in folds), key=lambda known: known.rows)
    settings = (folder / "config.py").read_text()
    assert len(folds) == len(study.seeds) == 5
    assert f"# a third of the {smallest.rows} training rows" in settings
    assert f"# {smallest.persons} persons with {smallest.clips:g} clips each (median); they explain" in settings
    assert smallest.persons < 7


def test_the_file_of_settings_is_not_what_changes_them(tmp_path, monkeypatch):
    features, folder = write(tmp_path / "mine"), tmp_path / "run"
    begun(monkeypatch, features, folder, quick=True)
    begun(monkeypatch, features, folder, quick=True)
    path = folder / "config.py"
    path.write_text(path.read_text().replace("config.train.num_epochs = ", "config.train.num_epochs = 9"))
    expected = (
        r"config\.py: differs from what this command chooses \(config\.train\.num_epochs: 9\d+ -> \d+\); restore it"
    )
    with pytest.raises(ConclugenError, match=expected):
        run_lib.run(source.Source(features), folder, quick=True)


def test_mistakes_are_one_sentence(tmp_path):
    (tmp_path / "empty").mkdir()
    run_in = f"--workdir={tmp_path / 'run'}"
    assert "no such file or folder; name clips, features or a built data set" in run("run", "x", run_in, code=2).stderr
    assert "no known layout (it holds nothing)" in run("run", tmp_path / "empty", run_in, code=2).stderr
    (tmp_path / "set/1.0.0").mkdir(parents=True)
    (tmp_path / "set/1.0.0/manifest.json").touch()  # the folder was begun with another source, of which nothing came
    assert (
        f"set: holds a built data set; name {tmp_path}/set/1.0.0" in run("run", tmp_path / "set", run_in, code=2).stderr
    )
    assert "name one folder or file: conclugen run SOURCE --workdir=RUN" in run("run", run_in, code=2).stderr


@pytest.mark.parametrize(
    ("path", "name"), [("My Clips", "my_clips"), ("2024.npz", "data_2024"), ("h\u00f6ren", "h_ren"), ("\u58f0", "data")]
)
def test_names_of_data_sets_come_from_their_files(tmp_path, path, name):
    assert source._name(tmp_path / path) == name


def test_numbers_are_scored_beside_raw_features_and_an_untrained_network(tmp_path, monkeypatch):
    features = write(tmp_path / "mine", labels=False)
    rows = [f"clip{i:02d},p{i % PERSONS},{i % 7 / 2}" for i in range(N)]
    (features / "labels.csv").write_text("\n".join(["id,group,label", *rows]))
    study, _ = begun(monkeypatch, features, tmp_path / "run", quick=True)
    protocols = study.datasets.mine.protocols
    assert set(protocols) == {"linear_evaluation", "raw_features", "untrained"}
    assert len({c.train.num_epochs for c in protocols.values()}) == 1
    runs = {run.method: run for chain in definition.chains(study) for run in chain if run.protocol != "pretraining"}
    assert {name: run.config.downstream.protocol for name, run in runs.items()} == {
        "pretrained": "linear_evaluation",
        "raw_features": "raw_features",
        "untrained": "untrained",
    }
