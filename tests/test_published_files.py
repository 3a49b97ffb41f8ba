"""Published files, where they lie beside the repository: tables of MELD and CMU-MOSEI, features of RAVDESS, csd files."""

import csv

import numpy as np
import pytest

from conclugen_jax.data import formats
from conclugen_jax.data.requests import Request
from conclugen_jax.errors import ConclugenError
from tests.helpers import SHARED_DATA, needs_shared_data
from tests.layouts import assert_features, build, target, write_csd


@needs_shared_data
def test_real_meld_tables(tmp_path):
    """The published csv files with a feature for each utterance."""
    tables = sorted((SHARED_DATA / "meld_csv").glob("*.csv"))
    keys = {}
    for path in tables:
        split = {"dev": "validation"}.get(path.stem.split("_")[0], path.stem.split("_")[0])
        with path.open(encoding="utf-8-sig", newline="") as file:
            keys[split] = [(f"dia{r['Dialogue_ID']}_utt{r['Utterance_ID']}", r) for r in csv.DictReader(file)]
    ids = [f"{split}/{key}" for split, rows in keys.items() for key, _ in rows]
    np.save(tmp_path / "text.npy", np.arange(len(ids), dtype=np.float32)[:, None])
    (tmp_path / "text.txt").write_text("\n".join(ids))
    request = Request("meld", modalities={"text": str(tmp_path / "text.npy")}, labels=tuple(tables))
    dataset, found = build(request, tmp_path / "data")
    assert {s: len(rows) for s, rows in found.items()} == {"train": 9989 - 1, "validation": 1109 - 1, "test": 2610}
    position = {name: i for i, name in enumerate(ids)}
    names, sentiments = dataset.manifest.label.names, dataset.manifest.targets["sentiment"].names
    for split, rows in keys.items():
        kept = [(k, r) for k, r in rows if f"{split}_{k}" in found[split]]
        for (key, row), sentiment in zip(kept, target(dataset, split, "sentiment"), strict=True):
            vectors, label, group = found[split][f"{split}_{key}"]
            assert vectors["text"] == position[f"{split}/{key}"]
            assert (names[label], group) == (row["Emotion"], row["Speaker"].strip())
            assert sentiments[sentiment] == row["Sentiment"]


@needs_shared_data
def test_real_mosei_segments(tmp_path):
    tables = sorted((SHARED_DATA / "cmu_mosei_labels").glob("*.csv"))
    seen, ids, expected = {}, [], []
    for path in tables:
        with path.open(encoding="utf-8-sig", newline="") as file:
            for row in csv.DictReader(file):
                i = seen[row["video"]] = seen.get(row["video"], -1) + 1
                ids.append(f"{row['video']}_{i}")
                names = ("happy", "sad", "anger", "surprise", "disgust", "fear")
                expected.append([float(float(row[n]) > 0) for n in names])
    np.save(tmp_path / "text.npy", np.arange(len(ids), dtype=np.float32)[:, None])
    (tmp_path / "text.txt").write_text("\n".join(ids))
    request = Request("cmu_mosei", modalities={"text": str(tmp_path / "text.npy")}, labels=tuple(tables))
    _, found = build(request, tmp_path / "data")
    assert {s: len(rows) for s, rows in found.items()} == {"validation": 1861, "test": 4653}
    for rows in found.values():
        for name, (vectors, label, group) in rows.items():
            row = int(vectors["text"][0])
            assert ids[row] == name
            assert label == expected[row]
            assert group == name.rsplit("_", 1)[0]


@needs_shared_data
def test_real_ravdess_features(tmp_path):
    path = SHARED_DATA / "ravdess" / "ravdess_au_mfcc.npz"
    with np.load(path, allow_pickle=False) as file:
        arrays = dict(file)
    dataset, found = build(Request("ravdess", path), tmp_path)
    assert {s: len(rows) for s, rows in found.items()} == {"train": 960, "validation": 240, "test": 240}
    rows = {name: row for split in found.values() for name, row in split.items()}
    for i, name in enumerate(arrays["id"]):
        vectors, label, group = rows[str(name)]
        assert_features(vectors, {"video": arrays["video"][i], "audio": arrays["audio"][i]})
        assert (label, group) == (arrays["emotion"][i], f"actor{arrays['actor'][i]:02d}")


@needs_shared_data
def test_real_csd_file_of_words_is_no_feature_file(tmp_path):
    pytest.importorskip("h5py")
    words = SHARED_DATA / "cmu_mosi_csd" / "CMU_MOSI_ModifiedTimestampedWords.csd"
    write_csd(tmp_path / "Labels.csd", {"03bSnISJMiM": ([[2.4]], [[0, 1]])})
    with pytest.raises(ConclugenError, match=r"ModifiedTimestampedWords.csd.*word vectors"):
        formats.open_source(Request("cmu_mosi", modalities={"text": str(words)}, labels=(tmp_path / "Labels.csd",)))
