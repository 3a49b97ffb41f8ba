"""Notebooks run from top to bottom, show what they say, and are stored without outputs."""

import json
import re
import shutil
import subprocess
import sys
from pathlib import Path

import jax
import numpy as np
import pytest
from sklearn.metrics import normalized_mutual_info_score

from conclugen_jax import pretrain
from conclugen_jax.data import builders
from conclugen_jax.errors import ConclugenError
from conclugen_jax.evaluate import bank, notebook, probe
from tests import clips
from tests.helpers import QUICK_COMPILATION, Faces, tiny_config

pytest.importorskip("IPython", reason="needs the extra 'notebooks'")
ROOT = Path(__file__).parents[1]
FOLDER = ROOT / "notebooks"
NAMES = ("load_checkpoint", "probe_representations", "compare_methods")  # of runs
FIRST = "first_hour"  # of clips


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    folder = tmp_path_factory.mktemp("notebooks")
    data = builders.build(Faces((64, 24, 40), missing=0.3), folder / "data")
    smoothed = {"evaluation__vectors": "pre_activation", "evaluation__smoothing_neighbours": 3}
    for name, weights in {"conclugen": smoothed, "multi_cont": {"loss__clustering_weight": 0.0}}.items():
        config = tiny_config(data, train__num_epochs=3, clustering__start_epoch=1, data__standardize="split", **weights)
        pretrain.pretrain(config, folder / name / "seed_0", devices=jax.devices()[:1])
    return folder


def outputs_of(name, seconds=300):
    """Run a notebook in a process of its own, without a network where the system allows that; return its outputs.

    An output is mime type -> content.
    """
    offline = ["unshare", "--map-root-user", "--net"]
    possible = shutil.which("unshare") and not subprocess.run([*offline, "true"], check=False).returncode
    command = [*offline * bool(possible), sys.executable, str(ROOT / "tests" / "run_notebook.py"), f"{name}.ipynb"]
    done = subprocess.run(command, cwd=FOLDER, capture_output=True, text=True, check=False, timeout=seconds)
    assert done.returncode == 0, done.stdout + done.stderr
    return [output for cell in json.loads(done.stdout.splitlines()[-1]) for output in cell]


@pytest.mark.slow
@pytest.mark.parametrize("name", NAMES)
def test_it_runs_and_shows(name, runs, monkeypatch):
    workdirs = [str(runs / method / "seed_0") for method in ("conclugen", "multi_cont")]
    monkeypatch.setenv("CONCLUGEN_WORKDIR", workdirs[0])
    monkeypatch.setenv("CONCLUGEN_WORKDIRS", ",".join(workdirs))
    monkeypatch.setenv("CONCLUGEN_LABELS", "2,5")
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    monkeypatch.setenv("XLA_FLAGS", QUICK_COMPILATION)
    outputs = outputs_of(name)
    assert not [o for o in outputs if o.get("stderr")]
    pictures = [o for o in outputs if "image/png" in o]
    assert len(pictures) == {"load_checkpoint": 1, "probe_representations": 2, "compare_methods": 4}[name]
    tables = [o["text/markdown"] for o in outputs if "text/markdown" in o]
    wanted = {
        "load_checkpoint": ["representation/audio/expand/kernel | 16 x 32 | 512", "| text | 12 | 32 |"],
        "probe_representations": ["| raw features |", "clusters of the run"],
        "compare_methods": ["contrastive + clustering + reconstruction", "| multi_cont seed_0 |"],
    }[name]
    for text in wanted:
        assert any(text in table for table in tables), (text, tables)
    if name == "probe_representations":
        train, test = (probe.represent_split(workdirs[0], split) for split in ("train", "test"))
        section = probe.load(workdirs[0])[2].evaluation
        scores = probe.accuracies(*bank.pair(train.fused(), test.fused(), section), train.label, test.label)
        assert f"| representations | {' | '.join(f'{x:.3f}' for x in scores.values())} |" in tables[0]
    shown = [*tables, *(o["text/plain"] for o in outputs if "text/plain" in o)]
    assert any("pre_activation, each averaged with its 3 nearest training rows" in text for text in shown)
    if name != "load_checkpoint":
        assert any("| vectors | 2 labels | 5 labels |" in table for table in tables)


@pytest.mark.slow
def test_the_first_hour_ends_with_a_prediction(tmp_path, monkeypatch):
    clips.write_smiles(tmp_path)
    places = {"CLIPS": tmp_path, "NEW": tmp_path / "clip10.mkv", "OUT": tmp_path / "out"}
    for name, path in places.items():
        monkeypatch.setenv(f"CONCLUGEN_{name}", str(path))
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    monkeypatch.setenv("XLA_FLAGS", QUICK_COMPILATION)
    outputs = outputs_of(FIRST, 600)
    assert len([o for o in outputs if "image/png" in o]) == 3
    tables = [o["text/markdown"] for o in outputs if "text/markdown" in o]
    assert "| pretrained | all |" in tables[0]
    said = "\n".join(o["text/plain"] for o in outputs if "text/plain" in o)
    assert "5 folds by person" in said
    assert "report.html" in said
    assert re.search(r"what the run predicts.*clip10\.mkv.*(bright|dark)", said, re.DOTALL)
    assert (tmp_path / "out/prediction.png").is_file()


@pytest.mark.parametrize("name", [*NAMES, FIRST])
def test_it_is_stored_without_outputs(name):
    book = json.loads((FOLDER / f"{name}.ipynb").read_text())
    code = [cell for cell in book["cells"] if cell["cell_type"] == "code"]
    assert code
    assert name != FIRST or len(book["cells"]) <= 10
    assert not any(cell["outputs"] or cell["execution_count"] for cell in code)
    assert book["cells"][0]["source"][0].startswith("# ")


def test_every_notebook_is_tested():
    assert {p.stem for p in FOLDER.glob("*.ipynb")} == {*NAMES, FIRST}


def test_what_the_notebooks_compute(runs):
    split = probe.represent_split(runs / "conclugen/seed_0", "test")
    assert split.fused(["video"]).shape == (40, 32)
    assert split.fused(raw=True).shape == (40, 52)
    assert not split.fused(["text"])[~split.present["text"]].any()
    assert split.clusters.shape == (40,)
    agreement = probe.cluster_agreement(split)
    assert agreement["clusters of the run"] == normalized_mutual_info_score(split.label, split.clusters)
    assert probe.represent_split(runs / "multi_cont/seed_0", "test").clusters.size == 0
    train = probe.represent_split(runs / "conclugen/seed_0", "train")
    values = probe.per_modality(train, split)
    assert set(values) == {"video", "audio", "text", "all"}
    # The nearest of one neighbour of a set in itself is the row itself.
    own = probe.accuracies(train.fused(), train.fused(), train.label, train.label, neighbours=1)
    assert own["nearest neighbours"] == 1
    there = train.present["text"]
    alone = probe.accuracies(
        train.fused(["text"])[there],
        split.fused(["text"])[split.present["text"]],
        train.label[there],
        split.label[split.present["text"]],
    )
    assert values["text"] == alone
    section = probe.load(runs / "conclugen/seed_0")[2].evaluation
    a, b = (x.fused(["text"])[x.present["text"]] for x in (train, split))
    smoothed = probe.accuracies(*bank.pair(a, b, section), train.label[there], split.label[split.present["text"]])
    assert probe.per_modality(train, split, evaluation=section)["text"] == smoothed
    with pytest.raises(ConclugenError, match="split 'dev'"):
        probe.represent_split(runs / "conclugen/seed_0", "dev")


def test_runs_are_compared_on_the_same_data_alone(runs, tmp_path):
    names = {name: runs / name / "seed_0" for name in ("conclugen", "multi_cont")}
    found = probe.label_efficiency_of_runs(names, labels_per_class=[2, 0], num_draws=2)
    raw = "raw features, each averaged with its 3 nearest training rows at a weight of 0.5"
    assert [r.name for r in found[::2]] == ["conclugen", "multi_cont", raw, "raw features"]
    alone = {}
    for name, workdir in names.items():  # each as its own configuration says
        (train, test), section = probe.represent_splits(workdir, ("train", "test")), probe.load(workdir)[2].evaluation
        alone[name] = bank.pair(train.fused(), test.fused(), section)
        both = train.fused(raw=True), test.fused(raw=True)
        alone[f"raw features{bank.said(section)}"] = bank.pair(*both, section)
    expected = probe.label_efficiency(alone, train.label, test.label, labels_per_class=[2, 0], num_draws=2)
    assert sorted(map(str, found)) == sorted(map(str, expected))
    # As many rows, other labels: without the check its scores would be of the first run's labels.
    data = builders.build(Faces((64, 24, 40), seed=7), tmp_path / "data")
    config = tiny_config(data, train__num_epochs=1, clustering__start_epoch=0)
    pretrain.pretrain(config, tmp_path / "other", devices=jax.devices()[:1])
    with pytest.raises(ConclugenError, match=r"run 'other' is of data faces .*, run 'conclugen' of other"):
        probe.label_efficiency_of_runs({"conclugen": names["conclugen"], "other": tmp_path / "other"})


ONE_CLASS = r"^labels are .* of shape \(8,.*; this needs one class per example"


@pytest.mark.parametrize(
    ("labels", "message"),
    [
        (np.zeros((8, 4), np.int8), ONE_CLASS),
        (np.zeros(8, np.float32), ONE_CLASS),
        (np.zeros((8, 0)), "^the data set has no labels; probing needs them"),
    ],
)
def test_classifiers_need_one_class_per_example(labels, message):
    x = np.random.default_rng(0).normal(size=(8, 3))
    split = probe.Split({"m": x}, {"m": np.ones(8, bool)}, labels, ("a", "b"), {"m": x}, np.zeros(0, np.int32))
    for call in (
        lambda: probe.accuracies(x, x, labels, labels),
        lambda: probe.per_modality(split, split),
        lambda: probe.cluster_agreement(split),
        lambda: probe.label_efficiency({"x": (x, x)}, labels, labels),
    ):
        with pytest.raises(ConclugenError, match=message):
            call()


def test_tables_and_pictures():
    table = notebook.Table(["a|b", "n"], [("x|y", 0.12345), ("z", 3)])
    assert table._repr_markdown_() == "| a\\|b | n |\n| --- | --- |\n| x\\|y | 0.123 |\n| z | 3 |"
    assert repr(table).splitlines()[1] == "x|y\t0.123"
    figure = notebook.curves({"one": ([1, 2], [3, 4])}, x="step", y="loss", spread={"one": [0.1, 0.2]})
    (axes,) = figure.axes
    assert axes.get_xlabel() == "step"
    # A name without values keeps its place, so that the next one looks as in every other figure.
    figure = notebook.curves({"one": ([], []), "two": ([2, 5], [3, 4])}, x="n", y="loss", ticks=[2, 5])
    (axes,) = figure.axes
    assert [text.get_text() for text in axes.get_legend().get_texts()] == ["two"]
    assert axes.lines[0].get_color() == "C1"
    assert [t.get_text() for t in axes.get_xticklabels()] == ["2", "5"]
    panels = {"a": (np.zeros((3, 2)), np.array([0, 1, 1])), "b": (np.ones((1, 2)), np.array([1]))}
    figure = notebook.maps(panels, ("calm", "sad"))
    assert [[len(c.get_offsets()) for c in axes.collections] for axes in figure.axes] == [[1, 2], [0, 1]]
    results = [probe.LabelEfficiency("x", 2, [0.5, 0.7]), probe.LabelEfficiency("x", 0, [0.8, 0.8])]
    table = notebook.efficiency_table(results)
    assert (table.columns, table.rows) == (["vectors", "2 labels", "all labels"], [["x", "0.600 ± 0.100", "0.800"]])
    (axes,) = notebook.efficiency_curves(results).axes
    np.testing.assert_allclose(axes.lines[0].get_xydata(), [[2, 0.6]])
    figure = notebook.bars({"video": {"lr": 0.5, "knn": 0.25}}, y="accuracy")
    assert [p.get_height() for p in figure.axes[0].patches] == [0.5, 0.25]
