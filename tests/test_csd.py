"""CMU-MultimodalSDK files: which steps make up a vector, labels and folds, every refusal, the published samples."""

import builtins
import os
import pickle
from pathlib import Path

import numpy as np
import pytest

from conclugen_jax.data.importers.csd import CsdFeatures, CsdFile, read_folds, read_labels
from conclugen_jax.data.sources import Features
from conclugen_jax.errors import ConclugenError

h5py = pytest.importorskip("h5py")

SHARED = Path(os.environ.get("CONCLUGEN_SHARED", Path(__file__).parents[2] / "shared")) / "data"
MOSI_WORDS = SHARED / "cmu_mosi_csd" / "CMU_MOSI_ModifiedTimestampedWords.csd"

TRAIN, VALIDATION, TEST, DIGITS = "-3g5yACwYnA", "-571d8cVauQ", "-6rXp3zJ3kc", "81406"
"""Videos of CMU-MOSEI."""


def write_csd(path, entries, *, root="some sequence", dtype=np.float32):
    """A file as the SDK deploys it; ``entries``: name -> (features, intervals)."""
    with h5py.File(path, "w") as file:
        data = file.create_group(f"{root}/data")
        for name, (features, intervals) in entries.items():
            group = data.create_group(name)
            group["features"] = np.asarray(features, dtype) if dtype is not None else features
            group["intervals"] = np.asarray(intervals, np.float64)
        file.create_dataset(f"{root}/metadata/root name", (1,), dtype=h5py.string_dtype())[0] = root
    return path


def write_labels(path, videos, width=7):
    """Label rows whose first value goes up from 0 by 1/4 in each video."""
    entries = {}
    for video, n in videos.items():
        rows = np.zeros((n, width))
        rows[:, 0] = np.arange(n) / 4
        entries[video] = rows, [(10 * i, 10 * i + 5) for i in range(n)]
    return write_csd(path, entries, root="All Labels")


STEPS = [[1.0, 10.0], [2.0, 20.0], [4.0, 40.0], [8.0, 80.0]]
SECONDS = [[0.0, 1.0], [1.0, 2.0], [2.0, 3.0], [3.0, 4.0]]


@pytest.fixture
def features(tmp_path):
    path = write_csd(
        tmp_path / "audio.csd", {"a": (STEPS, SECONDS), "7": (STEPS[::-1], SECONDS), "gap": (STEPS[:2], SECONDS[:2])}
    )
    return CsdFeatures(path)


# Features


def test_features_have_the_protocol_of_features(features):
    reader: Features = features
    assert reader.dim == 2
    assert [p.name for p in reader.files()] == ["audio.csd"]
    key = ("a", 0.0, 2.0, 0)
    assert reader.locate("train", [key, ("b", 0.0, 1.0, 0)]) == [key, None]


@pytest.mark.parametrize(
    ("start", "end", "expected"),
    [
        (0.0, 4.0, [15 / 4, 150 / 4]),
        (1.0, 3.0, [3, 30]),  # touches the first and the last step
        (0.5, 1.5, [1.5, 15]),  # half of each: the same weight as a whole
        (0.9, 2.0, [1.5, 15]),  # a tenth of the first step counts like the whole second
        (1.25, 1.5, [2, 20]),  # inside one step
        (1.0 - 5e-6, 2.0 + 5e-6, [2, 20]),  # an overlap of rounding only
        (1.0 - 5e-5, 2.0, [1.5, 15]),
        (-3.0, 0.5, [1, 10]),  # published labels have negative starts
        (3.5, 100.0, [8, 80]),
        (4.0, 5.0, None),
        (2.5, 2.5, None),
    ],
)
def test_vector_is_the_mean_of_the_steps_that_overlap(features, start, end, expected):
    x = features.read(("a", start, end, 0))
    if expected is None:
        assert x is None
    else:
        assert x.dtype == np.float32
        np.testing.assert_allclose(x, expected, rtol=1e-6)


def test_zero_length_steps_never_count(tmp_path):
    path = write_csd(tmp_path / "x.csd", {"a": ([[1], [50], [3]], [[0, 1], [0.5, 0.5], [1, 2]])})
    np.testing.assert_array_equal(CsdFeatures(path).read(("a", 0.0, 2.0, 0)), [2])
    assert CsdFeatures(path).read(("a", 0.5, 0.5, 0)) is None


@pytest.mark.parametrize(("how", "expected"), [("mean", [14 / 3]), ("max", [8]), ("last", [4])])
def test_unsorted_and_overlapping_steps_are_put_in_order_of_start(tmp_path, how, expected):
    entry = ([[4], [100], [8], [2], [100]], [[2, 3], [9, 10], [0.5, 1.5], [0, 2.5], [5, 6]])
    path = write_csd(tmp_path / "x.csd", {"a": entry})
    np.testing.assert_allclose(CsdFeatures(path, pool=how).read(("a", 0.0, 4.0, 0)), expected, rtol=1e-6)


def test_only_the_steps_of_the_example_are_read(tmp_path, monkeypatch):
    n = 1000
    intervals = np.stack([np.arange(n), np.arange(n) + 1], axis=1)
    path = write_csd(tmp_path / "x.csd", {"a": (np.arange(n)[:, None], intervals)})
    asked = []
    values = CsdFile.values
    monkeypatch.setattr(CsdFile, "values", lambda s, name, which: asked.append(which) or values(s, name, which))
    assert CsdFeatures(path).read(("a", 500.0, 503.0, 0)) == [501]
    assert asked == [slice(500, 503)]


def test_files_of_one_modality_are_concatenated_in_the_order_given(tmp_path, features):
    other = write_csd(tmp_path / "pitch.csd", {"a": ([[5.0], [7.0]], [[0, 2], [2, 4]]), "gap": ([[1.0]], [[2, 9]])})
    first = next(iter(features.files()))
    both, swapped = CsdFeatures([first, other]), CsdFeatures([other, first])
    assert both.dim == swapped.dim == 3
    assert list(both.files()) == [first, other]
    np.testing.assert_array_equal(both.read(("a", 0.0, 2.0, 0)), [1.5, 15, 5])
    np.testing.assert_array_equal(swapped.read(("a", 0.0, 2.0, 0)), [5, 1.5, 15])
    assert both.locate("test", [("7", 0.0, 1.0, 0)]) == [None]  # not in the second file
    assert both.read(("7", 0.0, 1.0, 0)) is None
    assert both.read(("gap", 0.0, 2.0, 0)) is None  # no step of the second file overlaps


def test_ids_of_digits_are_names_not_numbers(features):
    assert features.locate("train", [("7", 0.0, 1.0, 0)]) == [("7", 0.0, 1.0, 0)]
    np.testing.assert_array_equal(features.read(("7", 0.0, 1.0, 0)), [8, 80])


def test_minus_infinity_is_read_as_zero_and_counted_but_nothing_else(tmp_path):
    x = [[-np.inf, 2, np.nan, np.inf], [4, -np.inf, 1, 1], [-np.inf, 0, 0, 0]]
    reader = CsdFeatures(write_csd(tmp_path / "x.csd", {"a": (x, [[0, 1], [1, 2], [2, 3]])}))
    np.testing.assert_array_equal(reader.read(("a", 0.0, 2.0, 0)), [2, 1, np.nan, np.inf])
    assert reader.replaced == 2
    np.testing.assert_array_equal(reader.read(("a", 2.0, 3.0, 1)), [0, 0, 0, 0])
    assert reader.replaced == 3


def test_integer_features_are_averaged(tmp_path):
    path = write_csd(tmp_path / "x.csd", {"a": ([[1], [2]], [[0, 1], [1, 2]])}, dtype=np.int64)
    np.testing.assert_array_equal(CsdFeatures(path).read(("a", 0.0, 2.0, 0)), [1.5])


def test_aligned_entries_are_found_by_row_and_pooled_whole(tmp_path):
    entries = {
        "a[0]": ([[1], [3]], [[0, 2], [2, 5]]),
        "a[2]": ([[9]], [[19.996, 25.004]]),
        "b": ([[5], [7]], [[0, 2], [2, 5]]),
    }
    reader = CsdFeatures(write_csd(tmp_path / "x.csd", entries))
    keys = [("a", 0.0, 5.0, 0), ("a", 10.0, 15.0, 1), ("a", 20.0, 25.0, 2), ("b", 0.0, 2.0, 0)]
    assert reader.locate("train", keys) == [keys[0], None, keys[2], keys[3]]
    assert [reader.read(k).tolist() for k in (keys[0], keys[2], keys[3])] == [[2], [9], [5]]
    assert reader.read(keys[1]) is None


@pytest.mark.parametrize(("start", "end"), [(0.3, 0.6), (14.0, 15.1), (9.9, 12.0)])
def test_entries_aligned_to_something_else_are_refused(tmp_path, start, end):
    path = write_csd(tmp_path / "x.csd", {"a[1]": ([[1]], [[start, end]])})  # such as the second word
    where = rf"video 'a\[1\]': from {start:.3f} to {end:.3f} s, row 1 .* 10.000 to 15.000 s"
    with pytest.raises(ConclugenError, match=where):
        CsdFeatures(path).read(("a", 10.0, 15.0, 1))


def test_a_reader_can_be_sent_to_another_process(features):
    key = ("a", 1.0, 3.0, 0)
    before = features.read(key)  # opens the file and fills what is kept
    sent = pickle.dumps(features)
    assert b"h5py" not in sent
    assert len(sent) < 1000
    copy = pickle.loads(sent)
    np.testing.assert_array_equal(copy.read(key), before)
    assert copy.locate("train", [key, ("z", 0.0, 1.0, 0)]) == [key, None]


# Refusals


@pytest.mark.parametrize("content", [b"", b"not HDF5 at all", b"\x89HDF\r\n\x1a\n" + b"\0" * 50])
@pytest.mark.parametrize("read", [CsdFeatures, lambda p: read_labels(p, "cmu_mosei")], ids=["features", "labels"])
def test_files_that_are_not_hdf5_are_refused(tmp_path, content, read):
    path = tmp_path / "x.csd"
    path.write_bytes(content)
    with pytest.raises(ConclugenError, match=r"x\.csd: (cannot be read \(|is empty|is text)"):
        read(path)


def test_a_missing_file_a_folder_and_no_file_are_refused(tmp_path):
    with pytest.raises(ConclugenError, match=r"none\.csd: cannot be read .*No such file"):
        CsdFeatures(tmp_path / "none.csd")
    with pytest.raises(ConclugenError, match="cannot be read"):
        CsdFeatures(tmp_path)
    with pytest.raises(ConclugenError, match=r"no \.csd file is named"):
        CsdFeatures([])


def test_a_truncated_file_is_refused_at_whatever_moment_it_shows(tmp_path):
    whole = write_csd(tmp_path / "x.csd", {"a": (np.ones((500, 4)), np.stack([np.arange(500)] * 2, 1))}).read_bytes()
    for size in range(0, len(whole), 97):
        path = tmp_path / f"{size}.csd"
        path.write_bytes(whole[:size])
        with pytest.raises(ConclugenError, match=r"cannot be read|is empty"):
            CsdFeatures(path).read(("a", 0.0, 1.0, 0))


def outcome(path):
    """The sentence that reading a file ends in, None if it can be read."""
    try:
        CsdFeatures(path).read((TRAIN, 0.0, 2.0, 0))
        read_labels(path, "cmu_mosei")
    except ConclugenError as e:
        return str(e)
    return None


def test_damaged_bytes_end_in_a_sentence_or_in_values(tmp_path):
    """In files as small as this nearly all bytes are structure."""
    whole = write_csd(tmp_path / "x.csd", {TRAIN: (np.ones((3, 7)), SECONDS[:3])}).read_bytes()
    rng = np.random.default_rng(0)
    refused = 0
    for i in range(300):
        damaged = bytearray(whole)
        for place in rng.integers(len(whole), size=4):
            damaged[place] = rng.integers(256)
        path = tmp_path / f"{i}.csd"
        path.write_bytes(damaged)
        message = outcome(path)
        refused += message is not None
        assert message is None or str(path) in message
    assert 0 < refused < 300


def test_files_of_another_layout_are_refused(tmp_path):
    path = tmp_path / "x.csd"
    with h5py.File(path, "w") as file:
        file["table"] = np.zeros(3)
    with pytest.raises(ConclugenError, match="group /NAME/data with an entry per video, found no group"):
        CsdFeatures(path)
    with h5py.File(path, "w") as file:
        file["root/metadata/x"] = 1
    with pytest.raises(ConclugenError, match="found '/root' with 'metadata'"):
        CsdFeatures(path)
    write_csd(path, {})
    with pytest.raises(ConclugenError, match="found '/some sequence' with 'data', 'metadata'"):
        CsdFeatures(path)
    with h5py.File(path, "w") as file:
        file["root/data/a/features"] = np.zeros((2, 3))
    with pytest.raises(
        ConclugenError, match=r"video 'a': .'features': .*, expected numbers .steps, dim. as features and"
    ):
        CsdFeatures(path)
    write_csd(path, {"a": (STEPS, SECONDS), b"\xff": (STEPS, SECONDS)})
    with pytest.raises(ConclugenError, match=r"found the name b'\\xff', which is not UTF-8"):
        CsdFeatures(path)


@pytest.mark.parametrize(
    ("features", "intervals", "message"),
    [
        (np.zeros((3, 2)), np.zeros((2, 2)), r"'features': \(\(3, 2\), .* 'intervals': \(\(2, 2\)"),
        (np.zeros((3, 0)), np.zeros((3, 2)), r"'features': \(\(3, 0\)"),
        (np.zeros(3), np.zeros((3, 2)), r"'features': \(\(3,\)"),
        (np.zeros((3, 2, 2)), np.zeros((3, 2)), r"'features': \(\(3, 2, 2\)"),
        (np.zeros((3, 2)), np.zeros((3, 3)), r"'intervals': \(\(3, 3\)"),
        (np.zeros((2, 2)), [[0, 1], [2, 1.5]], r"video 'a', step 1: interval from 2.0 to 1.5 s"),
        (np.zeros((2, 2)), [[np.nan, 1], [1, 2]], r"video 'a', step 0: interval from nan to 1.0 s"),
        (np.zeros((2, 2)), [[0, np.inf], [1, 2]], r"video 'a', step 0: interval from 0.0 to inf s"),
        (np.array([[b"so"], [b"sp"]]), SECONDS[:2], r"'\|S2'.*, expected numbers .* words or phones as word vectors"),
        (np.array([["so"], ["sp"]], object), SECONDS[:2], "words or phones as word vectors"),
    ],
)
def test_faulty_entries_are_refused_by_name(tmp_path, features, intervals, message):
    path = write_csd(tmp_path / "x.csd", {"a": (features, intervals)}, dtype=None)
    with pytest.raises(ConclugenError, match=message):
        CsdFeatures(path)
    with pytest.raises(ConclugenError, match=message):
        read_labels(path, "cmu_mosei")


def test_every_video_must_have_the_width_of_the_first(tmp_path):
    path = write_csd(tmp_path / "x.csd", {"a": ([[1, 2]], [[0, 1]]), "b": ([[1, 2, 3]], [[0, 1]])})
    reader = CsdFeatures(path)
    assert reader.read(("a", 0.0, 1.0, 0)).tolist() == [1, 2]
    with pytest.raises(ConclugenError, match="video 'b': vectors of size 3, those of the file's first video have 2"):
        reader.read(("b", 0.0, 1.0, 0))


def test_sizes_that_are_only_declared_are_refused(tmp_path):
    """HDF5 arrays that store nothing: a few bytes on disk, terabytes in memory."""
    huge = {"long": ((10**10, 7), (10**10, 2)), "wide": ((3, 10**10), (3, 2)), "intervals": ((10**8, 1), (10**8, 2))}
    for name, shapes in huge.items():
        path = tmp_path / f"{name}.csd"
        with h5py.File(path, "w") as file:
            for key, shape in zip(("features", "intervals"), shapes, strict=True):
                dtype = np.uint8 if name == "intervals" and key == "features" else np.float32
                file.create_dataset(f"root/data/{TRAIN}/{key}", shape, dtype, chunks=(1, 1))
        assert path.stat().st_size < 100_000
        with pytest.raises(ConclugenError, match=r"numbers declared, 0 bytes stored"):
            CsdFeatures(path)


def test_compressed_files_of_zeros_are_read(tmp_path):
    with h5py.File(tmp_path / "x.csd", "w") as file:
        group = file.create_group("root/data/a")
        group.create_dataset("features", data=np.zeros((20_000, 60)), compression="gzip")
        group["intervals"] = np.stack([np.arange(20_000.0), np.arange(20_000.0) + 1], 1)
        assert group["features"].nbytes > 200 * group["features"].id.get_storage_size()
    np.testing.assert_array_equal(CsdFeatures(tmp_path / "x.csd").read(("a", 5.0, 9.0, 0)), np.zeros(60))


def test_without_h5py_the_message_says_what_to_install(features, monkeypatch):
    real = builtins.__import__

    def fake(name, *args, **kwargs):
        if name == "h5py":
            raise ImportError(name)
        return real(name, *args, **kwargs)

    monkeypatch.setattr(builtins, "__import__", fake)
    with pytest.raises(ConclugenError, match="pip install h5py"):
        CsdFeatures(features.files())


# Published samples


@pytest.mark.skipif(not MOSI_WORDS.is_file(), reason="no sample of CMU-MOSI beside the repository")
def test_published_words_of_mosi_open_and_are_refused_as_features():
    sequence, folds = CsdFile(MOSI_WORDS), read_folds("cmu_mosi")
    assert sequence.names == frozenset(folds)
    assert len(folds) == 93
    with pytest.raises(ConclugenError, match=r"'\|S12'.*, expected numbers .* words or phones as word vectors"):
        CsdFeatures(MOSI_WORDS)


@pytest.mark.skipif(not MOSI_WORDS.is_file(), reason="no sample of CMU-MOSI beside the repository")
def test_published_intervals_of_mosi_give_the_mean_length_of_words(tmp_path):
    """Real times with the length of each word as its only feature, against plain loops."""
    entries = {}
    with h5py.File(MOSI_WORDS) as file:
        for video, entry in next(iter(file.values()))["data"].items():
            words = entry["features"][:, 0]
            entries[video] = [[len(w)] for w in words], entry["intervals"][:]
    reader = CsdFeatures(write_csd(tmp_path / "lengths.csd", entries))
    rng = np.random.default_rng(0)
    for video, (lengths, times) in list(entries.items())[::10]:
        start = float(rng.uniform(0, times[-1, 1]))
        end = start + 3.3
        inside = [x for (x,), (a, b) in zip(lengths, times, strict=True) if a < end and b > start]
        x = reader.read((video, start, end, 0))
        assert (x is None) == (not inside)
        if inside:
            np.testing.assert_allclose(x, [np.mean(inside)], rtol=1e-6)
