"""The scikit-learn estimator: its conventions, and the numbers of the commands."""

import functools
import pickle
from pathlib import Path

import jax
import numpy as np
import pytest
import sklearn
from ml_collections import ConfigDict
from sklearn.base import clone
from sklearn.linear_model import LogisticRegression
from sklearn.model_selection import GridSearchCV, GroupKFold, cross_val_score
from sklearn.pipeline import make_pipeline
from sklearn.utils.estimator_checks import parametrize_with_checks

import conclugen_jax
from conclugen_jax import ConCluGen, pretrain
from conclugen_jax.data import builders, shards
from conclugen_jax.errors import ConclugenError
from conclugen_jax.pipeline import estimator as estimator_lib, rows as rows_lib, rules
from conclugen_jax.pretrain import setup
from conclugen_jax.runs import workdir as workdir_lib
from tests.helpers import Faces, run

TINY = {"num_epochs": 2, "representation_dim": 16, "overrides": {"model.projection_dim": 8}}
FLAGS = ["--config.train.num_epochs=2", "--config.model.representation_dim=16", "--config.model.projection_dim=8"]
FLAGS += ["--config.clustering.start_epoch=0"]


def rows_of(folder, split):
    """Rows of a data set as a dict, NaN where a modality is absent; and their groups."""
    dataset = shards.open_dataset(folder)
    stream = shards.ShardStream(dataset, split, list(dataset.manifest.modalities))
    everyone = np.arange(stream.num_examples)
    read = stream.rows(everyone)
    features = {m: np.where(read["present"][m][:, None], x, np.nan) for m, x in read["features"].items()}
    return features, stream.names(everyone)[1].tolist()


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return builders.build(Faces((64, 24, 24), kind="none", missing=0.3), tmp_path_factory.mktemp("data"))


@pytest.fixture(scope="module")
def fitted(folder):
    features, groups = rows_of(folder, "train")
    return ConCluGen("small", batch_size=16, smoothing_neighbours=5, **TINY).fit(features, groups=groups)


def embedded(workdir, split, output, *flags):
    run("embed", f"--workdir={workdir}", f"--split={split}", "--fusion=concat", f"--output={output}", *flags)
    with np.load(output) as file:
        return file["fused"]


def labelled(n=60):
    """Rows [n, 12] of two modalities, classes and groups."""
    rng = np.random.default_rng(0)
    y = np.arange(n) % 3
    return rng.normal(size=(n, 12)) + 2 * rng.normal(size=(3, 12))[y], y, np.arange(n) // 3 % 5


@pytest.mark.parametrize("standardize", ["split", "person"])
def test_numbers_are_those_of_the_commands(folder, tmp_path, standardize, monkeypatch):
    on_one = functools.partial(pretrain.pretrain, devices=jax.devices()[:1])  # as the estimator
    monkeypatch.setattr("conclugen_jax.pretrain.pretrain", on_one)
    own = ["--config.evaluation.smoothing_neighbours=5", f"--config.data.standardize={standardize}", *FLAGS]
    run("pretrain", "--config=small", "--batch_size=16", f"--data={folder}", f"--workdir={tmp_path / 'run'}", *own)
    train, groups = rows_of(folder, "train")
    made = ConCluGen("small", batch_size=16, smoothing_neighbours=5, standardize=standardize, **TINY)
    found = made.fit_transform(train, groups=groups)
    assert (found.dtype, found.shape) == (np.float32, (64, 48))
    np.testing.assert_allclose(found, embedded(tmp_path / "run", "train", tmp_path / "a.npz"), rtol=1e-4, atol=1e-5)
    np.testing.assert_array_equal(found, embedded(made.run_, "train", tmp_path / "b.npz"))
    test, groups = rows_of(folder, "test")
    expected = embedded(tmp_path / "run", "test", tmp_path / "c.npz")
    loaded = ConCluGen.load(tmp_path / "run")  # of the command
    for each, tolerance in ((made, 1e-4), (loaded, 0)):
        if standardize == "person":  # names of another data set are other persons
            each = loaded
        np.testing.assert_allclose(each.transform(test, groups=groups), expected, rtol=tolerance, atol=tolerance / 10)
    if standardize == "person":
        with pytest.warns(UserWarning, match="no groups: transform standardises rows by the split, not by person"):
            assert not np.allclose(made.transform(test), expected)


def test_saved_loaded_pickled(fitted, folder, tmp_path):
    test, _ = rows_of(folder, "test")
    expected = fitted.transform(test)
    fitted.save(tmp_path / "saved")
    again = embedded(tmp_path / "saved", "test", tmp_path / "a.npz", f"--data={folder}")
    np.testing.assert_array_equal(again, expected)
    assert str(tmp_path / "saved") in workdir_lib.read_config(tmp_path / "saved").data.path
    (tmp_path / "saved").rename(tmp_path / "moved")
    np.testing.assert_array_equal(ConCluGen.load(tmp_path / "moved").transform(test), expected)
    copy = pickle.loads(pickle.dumps(fitted))
    assert copy.run_ != fitted.run_
    np.testing.assert_array_equal(copy.transform(test), expected)
    place = Path(copy.run_)
    del copy
    assert not place.exists()
    with pytest.raises(ConclugenError, match="already exists; name a new folder"):
        fitted.save(tmp_path / "moved")
    assert not hasattr(clone(fitted), "run_")
    assert clone(ConCluGen.load(tmp_path / "moved")).get_params()["workdir"] == str(tmp_path / "moved")


def test_training_rows_are_no_neighbours_of_their_own_with_or_without_groups(fitted, folder):
    train, groups = rows_of(folder, "train")
    expected = fitted.transform(train, groups=groups)
    np.testing.assert_array_equal(fitted.transform(train), expected)
    new = {m: x + np.float32(1e-5) for m, x in train.items()}
    assert np.abs(fitted.transform(new) - expected).max() > 1e-3  # their training rows are neighbours


def test_rows_of_other_forms(fitted, folder):
    test, _ = rows_of(folder, "test")
    expected, matrix = fitted.transform(test), np.concatenate(list(test.values()), axis=1)
    np.testing.assert_array_equal(fitted.transform(matrix), expected)
    without = {m: x for m, x in test.items() if m != "text"}
    absent = fitted.transform(test | {"text": np.full_like(test["text"], np.nan)})
    np.testing.assert_array_equal(fitted.transform(without), absent)
    assert fitted.get_feature_names_out().tolist()[:17] == [*(f"audio_{i}" for i in range(16)), "text_0"]
    for wrong, message in (
        ({"video": test["video"][:, 1:]}, "video has 23 features, but ConCluGen is expecting 24"),
        ({"smell": test["video"]}, "smell has 24 features, but ConCluGen is expecting 0"),
        (test | {"text": test["text"][1:]}, "X has video 24, audio 24, text 23 rows; pass equally many"),
        (
            {m: np.full_like(x, np.nan) for m, x in test.items()},
            "X, row 0: all values are NaN, expected at least one modality",
        ),
        (
            test | {"video": np.where(np.arange(24) < 2, np.nan, test["video"])},
            "row 0: 2 of 24 values of video are NaN",
        ),
    ):
        with pytest.raises(ValueError, match=message):
            fitted.transform(wrong)
    with pytest.raises(ValueError, match="groups has 3 entries, but X has 24 rows; pass one group"):
        fitted.transform(test, groups=[1, 2, 3])


def test_scores_over_groups_and_a_grid():
    X, y, groups = labelled()
    columns = {"video": range(8), "audio": range(8, 12)}
    pipe = make_pipeline(ConCluGen(columns=columns, **TINY), LogisticRegression())
    how = {"cv": GroupKFold(3), "groups": groups}
    scores = cross_val_score(pipe, X, y, params={"conclugen__groups": groups}, error_score="raise", **how)
    assert scores.shape == (3,)
    assert scores.min() > 0.5
    grid = GridSearchCV(pipe, {"conclugen__representation_dim": [8, 16]}, cv=GroupKFold(2), error_score="raise")
    grid.fit(X, y, groups=groups)
    best = grid.best_estimator_[0]
    assert best.get_feature_names_out().size == 2 * grid.best_params_["conclugen__representation_dim"]
    assert workdir_lib.read_config(best.run_).model.representation_dim == best.representation_dim


def test_groups_are_routed_to_every_step():
    X, y, groups = labelled()
    with sklearn.config_context(enable_metadata_routing=True):
        own = ConCluGen(columns={"video": range(8), "audio": range(8, 12)}, standardize="person", **TINY)
        own = own.set_fit_request(groups=True).set_transform_request(groups=True)
        pipe = make_pipeline(own, LogisticRegression()).fit(X, y, groups=groups)
        pipe.predict(X, groups=groups)  # without a warning
        alone = own.fit(X, groups=groups)
        np.testing.assert_array_equal(pipe[0].transform(X, groups=groups), alone.transform(X, groups=groups))


def test_a_run_in_a_folder_goes_on(tmp_path):
    X, *_ = labelled(30)
    made = ConCluGen(workdir=tmp_path / "run", **TINY)
    first = made.fit_transform(X)
    log = (tmp_path / "run" / "metrics.jsonl").read_bytes()
    np.testing.assert_array_equal(clone(made).fit(X).transform(X), first)
    assert (tmp_path / "run" / "metrics.jsonl").read_bytes() == log  # nothing was trained again
    with pytest.raises(
        ConclugenError, match="run: holds a run on other rows; name another workdir, or pass None for cross"
    ):
        made.fit(X[1:])


@pytest.mark.parametrize("config", ["auto", "small", "conclugen", "conclu", "generative"])
def test_settings_are_never_refused(tmp_path, config):
    rng = np.random.default_rng(0)
    for n, columns in ((10, {"a": 2}), (11, {"a": 2, "b": 1}), (37, {"a": 3}), (300, {"a": 2, "b": 2, "c": 2})):
        features = {m: rng.normal(size=(n, dim)).astype(np.float32) for m, dim in columns.items()}
        source = rows_lib.Rows(features, {m: np.ones(n, bool) for m in columns}, [""] * n)
        data = builders.build(source, tmp_path / str(n))
        for epochs in (None, 1, 3):
            made, _ = setup.open_data(ConCluGen(config, num_epochs=epochs)._configured(data), 1)
            assert made.train.batch_size <= n


def test_parameters_of_the_configuration(tmp_path):
    source = rows_lib.Rows({"a": np.eye(12, dtype=np.float32)}, {"a": np.ones(12, bool)}, [""] * 12)
    data = builders.build(source, tmp_path)
    made = ConCluGen(batch_size=5, overrides={"seed": 7, "model.bottleneck": ("a",)}, random_state=3)._configured(data)
    assert (made.train.batch_size, made.seed, made.model.bottleneck) == (5, 7, ("a",))
    assert ConCluGen(made, random_state=None)._configured(data).seed != 7
    with pytest.raises(ConclugenError, match=r"config\.model\.size is not a configuration key"):
        ConCluGen(overrides={"model.size": 3})._configured(data)
    with pytest.raises(ConclugenError, match=r"config\.evaluation\.transductive is True"):
        ConCluGen(overrides={"evaluation.transductive": True})._configured(data)
    with pytest.raises(ValueError, match=f"{rules.FEWEST - 1} sample"):
        ConCluGen().fit(np.eye(rules.FEWEST - 1))
    assert isinstance(made, ConfigDict)
    assert conclugen_jax.ConCluGen is estimator_lib.ConCluGen


def test_which_columns_are_of_which_modality():
    def of(names, asked=None):
        return {m: at.tolist() for m, at in rows_lib.columns_of(names, asked).items()}

    assert of(["video_0", "audio_0", "video_1"]) == {"video": [0, 2], "audio": [1]}
    assert of([("video", 0), ("video", 1), ("audio", "x")]) == {"video": [0, 1], "audio": [2]}
    assert of(["AU01_r", "gaze"]) == of(range(2)) == {"features": [0, 1]}
    assert of(["AU01_r", "gaze", "x"], {"face": ["x", "AU01_r"], "eyes": [1]}) == {"face": [2, 0], "eyes": [1]}
    with pytest.raises(ValueError, match=r"columns\['face'\] has 'y', which is no column of X; correct it"):
        of(["x"], {"face": ["y"]})
    with pytest.raises(ValueError, match="column 'x' names no modality, but 'video_0' does; rename it to MODALITY_0"):
        of(["x", "video_0"])


@pytest.mark.parametrize("library", ["pandas", "polars"])
def test_data_frames(library):
    frames = pytest.importorskip(library)
    X, *_ = labelled(30)
    names = [f"video_{i}" for i in range(8)] + [f"audio_{i}" for i in range(4)]
    frame = frames.DataFrame(dict(zip(names, X.T, strict=True)))
    made = ConCluGen(**TINY).fit(frame)
    assert made.feature_names_in_.tolist() == names
    parts = {"video": X[:, :8], "audio": X[:, 8:]}
    np.testing.assert_array_equal(made.transform(parts), made.set_output(transform=library).transform(frame))
    if library == "pandas":
        frame.columns = frames.MultiIndex.from_tuples([name.split("_") for name in names])
        np.testing.assert_array_equal(ConCluGen(**TINY).fit_transform(frame), ConCluGen(**TINY).fit_transform(parts))


@pytest.mark.slow
@parametrize_with_checks([ConCluGen(num_epochs=2, representation_dim=8)])
def test_conventions_of_scikit_learn(estimator, check):
    check(estimator)
