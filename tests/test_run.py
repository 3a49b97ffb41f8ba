"""The command run: features in; a trained model, its scores and a page out, every stage once."""

import json

import numpy as np
import pyarrow as pa
import pytest

import conclugen_jax
from conclugen_jax.pipeline import source
from conclugen_jax.runs import configuration_files
from tests.helpers import run
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
    assert "nobody is in training and test; the first alone" in first.stdout
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

    kept = {path: path.stat().st_mtime_ns for path in folder.rglob("result.json")}
    again = run("run", features, f"--workdir={folder}", "--quick", *TINY)
    assert again.stdout == first.stdout
    assert {path: path.stat().st_mtime_ns for path in folder.rglob("result.json")} == kept
    other = run("run", features, f"--workdir={folder}", *TINY, code=2)
    assert "was begun otherwise (quick: True then, False now); repeat the command as it was" in other.stderr
    (features / "labels.csv").touch()
    changed = run("run", features, f"--workdir={folder}", "--quick", *TINY, code=2)
    assert f"the files of {features} have changed since it was begun; choose another --workdir" in changed.stderr


@pytest.mark.slow
def test_without_labels_there_is_a_model_and_a_page(tmp_path):
    features, folder = write(tmp_path / "mine", labels=False), tmp_path / "run"
    done = run("run", features, f"--workdir={folder}", "--quick", *TINY)
    assert "no labels, so no scores" in done.stdout
    page = Page((folder / "report.html").read_text())
    assert {"pretraining", "maps", "health", "settings"} <= page.sections.keys()
    assert float(page.row("effective_rank")[1][0]) > 1
    assert "results" not in page.sections
    assert any((folder / "pretraining/whole/seed_0/checkpoints").glob("[0-9]*"))


def test_from_python_labels_may_be_a_data_frame(tmp_path, monkeypatch):
    asked = {}
    monkeypatch.setattr(
        "conclugen_jax.pipeline.run.run", lambda source, workdir, **how: asked.update(source=source, how=how)
    )
    frame = pa.table({"id": ["a", "b"], "label": ["sad", "happy"]})
    conclugen_jax.run("clips", tmp_path, labels=frame, label="label", quick=True, changes={"seed": 3})
    (table,) = asked["source"].labels
    assert table.read_text().split() == ["id,label", "a,sad", "b,happy"]
    assert asked["source"].layout.label == ("label",)
    assert asked["how"] == {"quick": True, "config": "", "changes": [("seed", "3")]}


def test_mistakes_are_one_sentence(tmp_path):
    (tmp_path / "empty").mkdir()
    run_in = f"--workdir={tmp_path / 'run'}"
    assert "no such file or folder; name clips, features or a built data set" in run("run", "x", run_in, code=2).stderr
    assert "no known layout (it holds nothing)" in run("run", tmp_path / "empty", run_in, code=2).stderr
    assert "name one folder or file: conclugen run SOURCE --workdir=RUN" in run("run", run_in, code=2).stderr


@pytest.mark.parametrize(
    ("path", "name"), [("My Clips", "my_clips"), ("2024.npz", "data_2024"), ("h\u00f6ren", "h_ren"), ("\u58f0", "data")]
)
def test_names_of_data_sets_come_from_their_files(tmp_path, path, name):
    assert source._name(tmp_path / path) == name
