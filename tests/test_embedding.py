"""Vectors and predictions for other tools: the same as the run's own, row by row."""

import shutil

import jax
import numpy as np
import pytest

from conclugen_jax import pretrain
from conclugen_jax.data import batches, builders, shards
from conclugen_jax.errors import ConclugenError
from conclugen_jax.evaluate import downstream, embedding, probe
from tests.helpers import Faces, run, tiny_config

DEVICES = jax.devices()[:1]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("embedding")


@pytest.fixture(scope="module")
def data(folder):
    return builders.build(Faces((64, 24, 23), missing=0.3), folder / "data")


@pytest.fixture(scope="module")
def pretrained(folder, data):
    pretrain.pretrain(
        tiny_config(data, train__num_epochs=1, data__standardize="split", clustering__start_epoch=0),
        folder / "run",
        devices=DEVICES,
    )
    return folder / "run"


def finished(folder, data, name, **changes):
    config = tiny_config(
        data, data__standardize="split", train__num_epochs=3, **{f"downstream__{k}": v for k, v in changes.items()}
    )
    return downstream.downstream(config, folder / name, devices=DEVICES), folder / name


def whole(network, data, split="test", **kwargs):
    chunks = list(embedding.embed(network, shards.open_dataset(data), split, **kwargs))
    return {name: np.concatenate([chunk[name] for chunk in chunks]) for name in chunks[0]}


def test_representations_are_those_of_the_probe(pretrained, data):
    network = embedding.load(pretrained)
    found = whole(network, data, batch_size=10)
    model, variables, config = probe.load(pretrained)
    table = batches.load(
        shards.ShardStream(shards.open_dataset(data), "test", config.data.modalities), tier="host"
    ).table
    expected = probe.represent(model, variables, table["features"])
    assert found["id"].tolist() == [f"test{i}" for i in range(23)]
    assert found["group"][7] == "speaker2"
    np.testing.assert_array_equal(found["label"], table["label"])
    for m, x in expected.items():
        there = table["present"][m]
        np.testing.assert_array_equal(found[f"present/{m}"], there)
        np.testing.assert_allclose(found[m], np.where(there[:, None], x, 0), rtol=1e-5, atol=1e-6)
    assert not table["present"]["text"].all()
    fused = whole(network, data, fusion="concat", modalities=["video", "text"])["fused"]
    np.testing.assert_allclose(fused, np.concatenate([found["text"], found["video"]], axis=1), rtol=1e-5, atol=1e-6)
    mean = whole(network, data, fusion="mean")["fused"]
    row = int(np.flatnonzero(~found["present/text"])[0])
    np.testing.assert_allclose(mean[row], (found["video"][row] + found["audio"][row]) / 2, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("protocol", ["linear_evaluation", "fine_tuning", "supervised", "raw_features"])
def test_predictions_give_the_scores_of_the_run(folder, data, pretrained, protocol):
    checkpoint = "" if protocol == "supervised" else str(pretrained)
    result, workdir = finished(folder, data, protocol, protocol=protocol, checkpoint=checkpoint)
    found = whole(embedding.load(workdir), data)
    assert (found["prediction"] == found["label"]).mean() == pytest.approx(result["test"]["accuracy"])
    np.testing.assert_allclose(found["probability"].sum(axis=1), 1, rtol=1e-5)
    np.testing.assert_array_equal(found["probability"].argmax(axis=1), found["prediction"])


def test_an_encoder_that_was_trained_on_is_not_passed_off(folder, data, pretrained, tmp_path):
    mine = shutil.copytree(pretrained, tmp_path / "mine")
    _, workdir = finished(tmp_path, data, "linear", checkpoint=str(mine))
    config = tiny_config(data, train__num_epochs=1, data__standardize="split", clustering__start_epoch=0, seed=1)
    shutil.rmtree(mine)
    pretrain.pretrain(config, mine, devices=DEVICES)
    with pytest.raises(ConclugenError, match=r"its encoder, step 4 of .*mine, has other weights now"):
        embedding.load(workdir)


def test_command(pretrained, data, tmp_path):
    pq = pytest.importorskip("pyarrow.parquet")
    arguments = ["launch.embed", f"--workdir={pretrained}", "--split=validation"]
    shown = run(*arguments, f"--output={tmp_path}/a/v.npz").stdout
    assert "24 rows" in shown
    assert "label: 0 calm, 1 happy, 2 sad, 3 angry" in shown
    run(*arguments, f"--output={tmp_path}/a/v.parquet", "--batch_size=7")
    with np.load(tmp_path / "a/v.npz", allow_pickle=False) as file:
        arrays = dict(file)
    table = pq.read_table(tmp_path / "a/v.parquet").to_pydict()
    assert set(table) == set(arrays)
    for name, column in table.items():
        if arrays[name].dtype.kind == "f":
            np.testing.assert_allclose(np.array(column, np.float32), arrays[name], rtol=1e-5, atol=1e-6)
        else:
            assert column == arrays[name].tolist()
    for wrong, message in {
        "--output=v.csv": "ends with .npz or .parquet",
        "--split=exam": "no split 'exam'",
        "--fusion=sum": "fusion 'sum' is unknown",
        "--batch_size=99999999999999999999": "batch_size",
        f"--output={tmp_path}/a/v.npz/b.npz": "b.npz: cannot be written (",
        "--modalities=smell": "no modality 'smell'",
        f"--workdir={tmp_path}": "",
    }.items():
        result = run(*arguments, f"--output={tmp_path}/b.npz", wrong, code=2)
        assert message in result.stderr
    assert sorted(p.name for p in tmp_path.rglob("*") if p.is_file()) == ["v.npz", "v.parquet"]
    before = sorted(pretrained.iterdir())
    assert "no split '../x'" in run("embed", f"--workdir={pretrained}", "--split=../x", code=2).stderr
    assert sorted(pretrained.iterdir()) == before
