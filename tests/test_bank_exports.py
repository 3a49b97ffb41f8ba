"""Vectors of exports and of hard data: the same bits elsewhere, zeros where a modality is absent, few rows."""

import dataclasses
import json

import jax
import numpy as np
import pytest
from safetensors import numpy as safetensors

from conclugen_jax import pretrain
from conclugen_jax.data import builders, shards
from conclugen_jax.errors import ConclugenError
from conclugen_jax.evaluate import bank, downstream, embedding, exchange, probe
from conclugen_jax.system import files
from tests.helpers import assert_same_bits, run as command, tiny_config
from tests.test_persons import Talk

ONE = jax.devices()[:1]
SMOOTHED = {"evaluation__vectors": "pre_activation", "evaluation__smoothing_neighbours": 5}


class Two(Talk):
    """Two rows a split; in training only the second has words."""

    def examples(self, split):
        for i, e in enumerate(super().examples(split)):
            features = {m: x for m, x in e.features.items() if (split, i, m) != ("train", 0, "text")}
            yield dataclasses.replace(e, label=i % 2, features=features)


def trained(data, workdir, **changes):
    options = {"clustering__start_epoch": 0, "clustering__queue_reset": "never", "train__num_epochs": 1, **changes}
    pretrain.pretrain(tiny_config(data, **options), workdir, devices=ONE)
    return workdir


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return builders.build(Talk(missing=0.3), tmp_path_factory.mktemp("data"))


@pytest.fixture(scope="module")
def run(data, tmp_path_factory):
    return trained(data, tmp_path_factory.mktemp("run"), data__standardize="person", **SMOOTHED)


def embedded(workdir, data, split, **options):
    rows = list(embedding.embed(embedding.load(workdir), shards.open_dataset(data), split, **options))
    return {name: np.concatenate([x[name] for x in rows]) for name in rows[0]}


def test_an_export_gives_the_same_vectors(run, data, tmp_path):
    for name, options in {"plain": {}, "banked": {"bank": True}}.items():
        exchange.export_weights(run, tmp_path / name, **options)
        exchange.import_weights(tmp_path / name, tmp_path / f"{name}_with_data", data)
        exchange.import_weights(tmp_path / name, tmp_path / f"{name}_alone")
    for split in ("train", "test"):
        for fusion in ("none", "concat", "mean"):
            expected = embedded(run, data, split, fusion=fusion)
            for name in ("plain_with_data", "banked_with_data"):
                assert_same_bits(embedded(tmp_path / name, data, split, fusion=fusion), expected)
            others = expected["group"] != "speaker1" if split == "test" else slice(None)  # whom only the data set knows
            alone = embedded(tmp_path / "banked_alone", data, split, fusion=fusion)
            assert_same_bits(*({key: x[others] for key, x in found.items()} for found in (alone, expected)))
    with pytest.raises(ConclugenError, match=r"training rows, which are not here; .*--data, .*--bank"):
        embedded(tmp_path / "plain_alone", data, "test")
    exchange.export_weights(tmp_path / "banked_alone", tmp_path / "again", bank=True)
    for path in (tmp_path / "banked").iterdir():
        assert path.read_bytes() == (tmp_path / "again" / path.name).read_bytes()


def test_the_bank_of_an_export_is_said_and_checked(run, tmp_path):
    flags = f"--workdir={run}", "--bank", f"--output={tmp_path / 'export'}"
    assert f"SHA-256 of {bank.FILE}: " in command("checkpoint", "export", *flags).stdout
    plain = command("checkpoint", "export", f"--workdir={run}", f"--output={tmp_path / 'plain'}").stdout
    assert "others need the data set, or --bank here" in plain
    path, facts = tmp_path / "export" / bank.FILE, json.loads((tmp_path / "export/export.json").read_text())
    good = dict(safetensors.load_file(path))
    cases = {
        "rows is missing": {"rows": None},
        r"vectors/text is float32\[64, 31\], expected float32\[64, 32\]": {
            "vectors/text": good["vectors/text"][:, :31]
        },
        r"present/text is float32\[64\], expected bool\[64\]": {"present/text": np.ones(64, np.float32)},
        "smell is .*, expected none": {"smell": good["rows"]},
        "vectors/text has values that are not finite": {"vectors/text": good["vectors/text"] * np.nan},
        "rows are not rows of split 'train', which has 64": {"rows": good["rows"] + 1},
    }
    for message, changes in cases.items():
        changed = {name: np.ascontiguousarray(x) for name, x in {**good, **changes}.items() if x is not None}
        path.write_bytes(safetensors.save(changed))
        with pytest.raises(ConclugenError, match=f"{bank.FILE}: not the file whose SHA-256"):
            exchange.import_weights(tmp_path / "export", tmp_path / "imported")
        files.write_json(tmp_path / "export/export.json", facts | {"bank_sha256": files.sha256(path)})
        with pytest.raises(ConclugenError, match=f"{bank.FILE}: {message}"):
            exchange.import_weights(tmp_path / "export", tmp_path / "imported")
        files.write_json(tmp_path / "export/export.json", facts)
    path.unlink()
    with pytest.raises(ConclugenError, match=f"{bank.FILE}: cannot be read"):
        exchange.import_weights(tmp_path / "export", tmp_path / "imported")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["export", "plain"]


def test_a_bank_that_nothing_needs_is_refused(data, tmp_path):
    trained(data, tmp_path / "run")
    with pytest.raises(ConclugenError, match=r"smoothing_neighbours is 0, .*; leave --bank out"):
        exchange.export_weights(tmp_path / "run", tmp_path / "export", bank=True)
    assert not (tmp_path / "export").exists()


@pytest.mark.parametrize("transductive", [False, True])
def test_a_modality_alone_is_smoothed_among_the_rows_that_have_it(run, data, tmp_path, transductive):
    network = embedding.load(run)
    section = network.evaluation.copy_and_resolve_references()
    section.transductive = transductive
    network, dataset = network._replace(evaluation=section), shards.open_dataset(data)
    train, test = probe.represent_splits(run, ("train", "test"))
    for fusion in ("none", "concat"):
        for split, at in (("train", 0), ("test", 1)):
            rows = list(embedding.embed(network, dataset, split, fusion=fusion, batch_size=10))
            for m in ("text",) if fusion == "none" else ("fused",):
                there = [x.present["text"] if m == "text" else np.ones(len(x.label), bool) for x in (train, test)]
                vectors = [x.representations[m] if m == "text" else x.fused() for x in (train, test)]
                expected = bank.pair(*(x[rows] for x, rows in zip(vectors, there, strict=True)), section)[at]
                found = np.concatenate([x[m] for x in rows])
                np.testing.assert_allclose(found[there[at]], expected, atol=2e-5)
                assert not found[~there[at]].any()


@pytest.fixture(scope="module")
def few(tmp_path_factory):
    folder = tmp_path_factory.mktemp("two")
    data = builders.build(Two((2, 2, 2)), folder / "data")
    return data, trained(data, folder / "run", train__batch_size=2, data__standardize="person")


@pytest.mark.parametrize(
    ("vectors", "neighbours"),
    [
        ("representation", 500),
        ("pre_activation", 1),
        ("both", 500),
        ("projection", 500),
        ("with_raw", 0),
        ("with_raw", 1),
    ],
)
def test_two_rows_a_split_and_a_missing_modality(few, tmp_path, vectors, neighbours):
    data, run = few
    facts = json.loads((run / "config.json").read_text())
    facts["evaluation"] |= {"vectors": vectors, "smoothing_neighbours": neighbours, "transductive": neighbours == 1}
    files.write_json(run / "config.json", facts)
    report = probe.label_efficiency_of_run(run, num_draws=2)
    assert all(np.isfinite(r.accuracy).all() for r in report.results)
    found = embedded(run, data, "train")
    assert all(np.isfinite(x).all() for x in found.values() if x.dtype == np.float32)
    assert not found["text"][0].any()
    config = tiny_config(data, downstream__checkpoint=str(run), train__num_epochs=1, train__batch_size=2)
    result = downstream.downstream(config, tmp_path / "linear", devices=ONE)
    found = embedded(tmp_path / "linear", data, "test", fusion="concat")
    matrix = np.zeros((4, 4), int)
    np.add.at(matrix, (found["label"], found["prediction"]), 1)
    np.testing.assert_array_equal(matrix, result["test"]["confusion_matrix"])
    if vectors == "with_raw":
        config.downstream.fusion = "mean"
        with pytest.raises(
            ConclugenError, match=r"different sizes \(audio 48, text 44, video 56\); join them by 'concat'"
        ):
            downstream.downstream(config, tmp_path / "mean", devices=ONE)
        with pytest.raises(ConclugenError, match=r"fusion is 'mean', but .* different sizes"):
            embedded(run, data, "test", fusion="mean")
    if vectors == "projection":
        config.downstream.protocol = "fine_tuning"
        with pytest.raises(ConclugenError, match=r"'fine_tuning', but config.evaluation.vectors is 'projection'"):
            downstream.downstream(config, tmp_path / "tuned", devices=ONE)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["linear"]
