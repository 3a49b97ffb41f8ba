"""Scores across corpora: classes matched by name, nothing fitted on the other data set, numbers as scikit-learn has them."""

import json
import re

import jax
import numpy as np
import pytest
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import f1_score

from conclugen_jax.data import batches, builders, shards
from conclugen_jax.data.sources import LabelSpec
from conclugen_jax.errors import ConclugenError
from conclugen_jax.evaluate import across, downstream, probe, probe_run, sweep
from tests.corpora import EMOTIONS, Corpus
from tests.helpers import run, tiny_config

OTHER = ("SAD", "disgust", "Happy", "fear")  # calm and angry are missing


@pytest.fixture(autouse=True)
def one_device(monkeypatch):
    one = jax.devices()[:1]
    monkeypatch.setattr(jax, "devices", lambda *_: one)


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    folder = tmp_path_factory.mktemp("corpora")
    made = {
        "one": Corpus(),
        "other": Corpus(OTHER, name="other", seed=1, shift=0.3),
        "again": Corpus([name.upper() for name in reversed(EMOTIONS)], name="again"),  # the same rows
    }
    return {name: str(builders.build(corpus, folder)) for name, corpus in made.items()}


def config_of(path, *others, protocol="raw_features", **changes):
    given = {"data__standardize": "split", "train__num_epochs": 3, "downstream__protocol": protocol}
    return tiny_config(path, data__test_paths=tuple(others), **(given | changes))


def table(path, split):
    opened = shards.open_dataset(path)
    return batches.load(shards.ShardStream(opened, split, list(opened.manifest.modalities)), tier="host").table


def vectors(path, split, stats):
    """Features side by side, standardised by the training split of ``stats``."""
    manifest, rows = shards.open_dataset(stats).manifest, table(path, split)
    parts = []
    for m in sorted(rows["features"]):
        mean, scale = manifest.standardization(m)
        parts.append((rows["features"][m] - mean) / scale)
    return np.concatenate(parts, axis=1), rows["label"]


def test_the_probe_agrees_with_scikit_learn(data, tmp_path):
    config = config_of(data["one"], data["other"])
    config.sweep.labels_per_class, config.sweep.label_draws = (0,), (0,)
    result = probe_run.run(config, tmp_path / "run")
    (facts,), (fit,) = result["test_data"], result["selected"]
    assert facts["classes"] == {"happy": "Happy", "sad": "SAD", "fear": "fear"}
    assert (facts["only_trained"], facts["only_scored"]) == (["calm", "angry"], ["disgust"])
    assert (facts["data"]["name"], facts["split"]) == ("other", "test")
    (train, labels), (x, y) = vectors(data["one"], "train", data["one"]), vectors(data["other"], "test", data["one"])
    mean, scale = train.mean(axis=0), train.std(axis=0)
    model = LogisticRegression(max_iter=2000).fit((train - mean) / scale, labels)
    ours = np.array([2, -1, 1, 4])[y]  # SAD, disgust, Happy, fear in our numbers
    guess, kept = model.predict((x - mean) / scale), ours >= 0
    (found,) = fit["across"]
    assert (found["n"], found["left_out"]) == (kept.sum(), {"disgust": (~kept).sum()})
    assert 0 < found["left_out"]["disgust"] < 40
    assert found["scores"]["accuracy"] == pytest.approx((guess == ours)[kept].mean())
    assert found["scores"]["f1"] == pytest.approx(
        f1_score(ours[kept], guess[kept], average="weighted", zero_division=0)
    )
    x, y = vectors(data["one"], "test", data["one"])
    guess, kept = model.predict((x - mean) / scale), np.isin(y, (1, 2, 4))
    within = found["within"]
    assert (within["n"], within["scores"]["accuracy"]) == (kept.sum(), pytest.approx((guess == y)[kept].mean()))
    assert within["left_out"] == {"calm": (y == 0).sum(), "angry": (y == 3).sum()}
    assert fit["test"]["accuracy"] == pytest.approx((guess == y).mean())


def test_the_same_rows_under_other_names_have_the_same_scores(data, tmp_path):
    for name, work, changes in (
        ("frozen", downstream.downstream, {}),
        ("trained", downstream.downstream, {"protocol": "supervised"}),
        ("swept", sweep.sweep, {"sweep__labels_per_class": (3, 0), "sweep__learning_rates": (1e-2, 1e-3)}),
        ("smoothed", probe_run.run, {"evaluation__smoothing_neighbours": 3, "sweep__labels_per_class": (3, 0)}),
    ):
        changes = {"sweep__label_draws": (0,)} | changes
        result = work(config_of(data["one"], data["again"], data["other"], **changes), tmp_path / name)
        alone = work(config_of(data["one"], **changes), tmp_path / f"{name}_alone")
        assert "test_data" not in alone
        fits = result.get("selected", [result])
        for fit, other in zip(fits, alone.get("selected", [alone]), strict=True):
            assert fit["test"] == other["test"]  # nothing is trained or chosen otherwise
            again, second = fit["across"]
            scores = {key: value for key, value in fit["test"].items() if key != "loss"}
            assert again["scores"] == again["within"]["scores"] == scores
            assert (again["n"], again["left_out"]) == (40, {})
            assert 0 < second["n"] < 40
        assert [facts["data"]["name"] for facts in result["test_data"]] == ["again", "other"]


def test_persons_are_those_of_the_other_data_set(tmp_path):
    """Other persons of the same names, in a data set of the same name, are moved far away as a whole."""
    one = str(builders.build(Corpus(), tmp_path / "a"))
    moved = str(builders.build(Corpus(shift=50.0), tmp_path / "b"))
    changes = {"data__standardize": "person", "data__person_modalities": ("video", "audio", "text")}
    config = config_of(one, moved, data__person_shrinkage=0.0, **changes)
    config.sweep.labels_per_class, config.sweep.label_draws = (0,), (0,)
    (fit,) = probe_run.run(config, tmp_path / "run")["selected"]
    strange, own = fit["across"][0]["scores"], fit["test"]
    # Their own mean is taken away, so that they are no farther than persons whose mean is known from the training split.
    assert strange["accuracy"] > own["accuracy"] - 0.15
    split = config_of(one, moved)
    split.sweep.labels_per_class, split.sweep.label_draws = (0,), (0,)
    (fit,) = probe_run.run(split, tmp_path / "split")["selected"]
    assert fit["across"][0]["scores"]["accuracy"] < own["accuracy"] - 0.25
    stream = shards.ShardStream(shards.open_dataset(moved), "test", ["video"])
    from conclugen_jax.data import persons

    known = persons.read(tmp_path / "run" / persons.FILE)
    across.strangers(known).attach(stream)
    rows = stream.rows(np.arange(40))["features"]["video"]
    groups = stream.names(np.arange(40))[1]
    mean, scale = shards.open_dataset(one).manifest.standardization("video")
    raw = table(moved, "test")["features"]["video"][groups == "speaker1"]
    z = (raw - mean) / scale
    expected = (z - z.mean(axis=0)) / np.sqrt(z.var(axis=0) + config.data.person_floor)
    np.testing.assert_allclose(rows[groups == "speaker1"], expected, atol=2e-4)


def test_labels_and_numbers(tmp_path):
    for kind in ("multi", "value"):
        one = str(builders.build(Corpus(kind=kind), tmp_path / kind))
        other = str(builders.build(Corpus(OTHER, kind=kind, seed=1, name="other"), tmp_path / kind))
        result = downstream.downstream(config_of(one, other), tmp_path / kind / "run")
        (found,) = result["across"]
        assert (found["n"], found["within"]["n"], found["left_out"]) == (40, 40, {})
        if kind == "multi":
            assert set(found["scores"]["per_class"]) == {"happy", "sad", "fear"}
            support = table(other, "test")["label"][:, 2].sum()
            assert found["scores"]["per_class"]["happy"]["support"] == support
        else:
            assert result["test_data"][0]["classes"] == {}
            assert found["within"]["scores"]["mae"] == pytest.approx(result["test"]["mae"])


def matched(ours, theirs, kind="single"):
    return across.match(
        LabelSpec(kind, tuple(ours)), LabelSpec(kind, tuple(theirs)), "data set a", "data set b"
    ).facts()


def test_names_are_matched_once_the_same_case_first():
    assert matched(("a", "B"), ("b", "A"))["classes"] == {"a": "A", "B": "b"}
    assert matched(("Joy", "joy"), ("joy", "x")) == {
        "classes": {"joy": "joy"},
        "only_trained": ["Joy"],
        "only_scored": ["x"],
    }
    assert matched(("joy",), ("JOY", "Joy"))["classes"] == {"joy": "JOY"}
    assert matched((" joy",), ("Joy ",))["classes"] == {" joy": "Joy "}


def test_labels_of_each_side_are_taken_by_its_own_places():
    found = across.match(LabelSpec("multi", ("a", "b", "c")), LabelSpec("multi", ("x", "C", "A")), "one", "other")
    rows = np.array([[1, 0, 0], [0, 1, 1]])
    np.testing.assert_array_equal(found.kept(rows)[1], [[0, 0], [1, 1]])  # A, C there
    np.testing.assert_array_equal(found.kept(rows, own=True)[1], [[1, 0], [0, 1]])  # a, c here


def refused(config, tmp_path, work=downstream.downstream):
    with pytest.raises(ConclugenError) as caught:
        work(config, tmp_path / "refused")
    assert not (tmp_path / "refused").exists()
    return str(caught.value)


def test_what_cannot_be_scored_is_refused(data, tmp_path):
    one, other = data["one"], data["other"]
    assert refused(config_of(one, one), tmp_path).endswith("which is to be scored, is trained on; name another one")
    assert refused(config_of(one, other, other), tmp_path).endswith(
        "which is to be scored, is named already; name another one"
    )
    colours = str(builders.build(Corpus(("red", "blue"), name="colours"), tmp_path))
    assert refused(config_of(one, colours), tmp_path) == (
        f"data set {colours} has no class in common with data set {one} (calm, happy, sad, angry, fear there, red, blue "
        "here); rename them in the labels"
    )
    number = str(builders.build(Corpus(kind="value", name="number"), tmp_path))
    assert refused(config_of(one, number), tmp_path) == (
        f"data set {one} has one class per example, data set {number} has a number; name data sets with labels of one "
        "kind, or another target"
    )
    unlabelled = str(builders.build(Corpus(kind="none", name="unlabelled"), tmp_path))
    assert f"data set {unlabelled} has no labels;" in refused(config_of(one, unlabelled), tmp_path)
    silent = str(builders.build(Corpus(name="silent", dims={"video": 24, "text": 12}), tmp_path))
    assert f"data set {silent} has no modality 'audio'; it has 'video', 'text'" in refused(
        config_of(one, silent), tmp_path
    )
    short = str(builders.build(Corpus(name="short", dims={"video": 20, "audio": 16, "text": 12}), tmp_path))
    message = refused(config_of(one, short), tmp_path)
    assert f"{short} has 20 features of modality 'video'" in message
    assert "use features of the same extractor" in message
    folds = config_of(one, other, downstream__num_folds=3)
    assert "build the data set with --num_folds and --fold" in refused(folds, tmp_path)
    assert "name the split to score" in refused(config_of(one, other, data__test_split=""), tmp_path)
    disgust = str(builders.build(Corpus(("disgust", "Sad"), name="disgust", num=(9, 9, 1), seed=4), tmp_path))
    assert set(table(disgust, "test")["label"]) == {0}
    assert refused(config_of(one, disgust), tmp_path) == (
        f"data set {disgust}: no example of split 'test' has a class that both data sets have; name another data set"
    )


def test_features_of_other_backbones_are_refused(tmp_path):
    def built(name, **facts):
        made = {"face": {"modality": "video", "sha256": "1", "source": name, **facts}}
        source = {"extraction": {"backbones": made}}
        return shards.open_dataset(builders.build(Corpus(name=name, source=source), tmp_path)).manifest

    ours = built("ours")
    across.check_features(built("same"), ours, ["video", "text"], "data set b", "data set a")
    across.check_features(built("elsewhere", modality="other"), ours, ["video"], "data set b", "data set a")
    wanted = (
        "the features of modality 'video' of data set b are of face, with other weights or settings, those of data set a of "
        "face; extract one of them again as the other was"
    )
    with pytest.raises(ConclugenError, match=re.escape(wanted)):
        across.check_features(built("theirs", sha256="2"), ours, ["video"], "data set b", "data set a")


def test_a_finished_run_is_not_repeated_unless_the_other_data_changed(data, tmp_path, capsys):
    other = str(builders.build(Corpus(OTHER, name="other"), tmp_path))
    config, workdir = config_of(data["one"], other), tmp_path / "run"
    result = downstream.downstream(config, workdir)
    assert downstream.downstream(config, workdir) == result
    assert "finished already" in capsys.readouterr().err
    with pytest.raises(ConclugenError, match=r"another configuration|was started with config.data.test_paths"):
        downstream.downstream(config_of(data["one"]), workdir)
    builders.build(Corpus(OTHER, name="other", seed=9), tmp_path, overwrite=True)
    with pytest.raises(ConclugenError, match=r"a data set of config.data.test_paths has changed since"):
        downstream.downstream(config, workdir)


CONFIG = """
from tests import helpers

def get_config():
    return helpers.tiny_config({path!r}, train__num_epochs=3, data__standardize="split")
"""


def test_the_commands(data, tmp_path):
    (tmp_path / "tiny.py").write_text(CONFIG.format(path=data["one"]))
    config, workdir = f"--config={tmp_path}/tiny.py", tmp_path / "run"
    run("pretrain", config, f"--workdir={workdir}")
    shown = run("downstream", config, f"--checkpoint={workdir}", f"--test_data={data['other']}").stdout
    (found,) = json.loads((workdir / "linear_evaluation/result.json").read_text())["across"]
    within = found["within"]
    text = " ".join(shown.split())
    assert "trained on one: accuracy in %, test rows of classes in both" in text
    assert f"one ({within['n']} rows)" in shown
    assert f"other ({found['n']} rows)" in shown
    assert f"{100 * found['scores']['accuracy']:.2f}" in shown
    assert f"{100 * within['scores']['accuracy']:.2f}" in shown
    assert "classes of one and other: happy = Happy, sad = SAD, fear" in text
    assert f"excluded from both scores: disgust ({found['left_out']['disgust']})" in text
    options = [f"--workdir={workdir}", "--labels=3,all", "--draws=2"]
    alone = json.loads(probed(workdir, options))
    report = json.loads(probed(workdir, [*options, f"--test_data={data['other']},{data['again']}"]))
    assert report["results"] == alone["results"]
    other, again = report["across"]
    assert again["results"] == again["within"]["results"] == report["results"]
    assert (other["n"], other["left_out"], other["within"]["n"]) == (found["n"], found["left_out"], within["n"])
    raw = next(x for x in other["results"] if (x["name"], x["num_labels"]) == ("raw features", 0))
    train, labels = vectors(data["one"], "train", data["one"])
    x, y = vectors(data["other"], "test", data["one"])
    mean, scale = train.mean(axis=0), train.std(axis=0)
    fitted = LogisticRegression(max_iter=2000).fit((train - mean) / scale, labels)
    ours = np.array([2, -1, 1, 4])[y]
    right = fitted.predict((x - mean) / scale) == ours
    assert raw["accuracy"][0] == pytest.approx(right[ours >= 0].mean())
    raw = next(x for x in other["within"]["results"] if (x["name"], x["num_labels"]) == ("raw features", 3))
    few, (x, y) = probe.draw_labels(labels, 3, seed=0), vectors(data["one"], "test", data["one"])
    fitted = LogisticRegression(max_iter=2000).fit(((train - mean) / scale)[few], labels[few])
    right = fitted.predict((x - mean) / scale) == y
    assert raw["accuracy"][0] == pytest.approx(right[np.isin(y, [1, 2, 4])].mean()) != right.mean()
    page = (workdir / "label_efficiency.md").read_text()
    assert "| vectors | one: 3 labels | one: all labels | other: 3 labels | other: all labels |" in page
    assert f"scored on {within['n']} test rows of one and {found['n']} of other" in page
    wrong = run("probe", *options, f"--test_data={data['one']}", code=2).stderr
    assert "is trained on; name another one" in wrong


def probed(workdir, options):
    assert "saved as" in run("probe", *options).stdout
    return (workdir / "label_efficiency.json").read_text()
