"""Records and parts: what TFDS itself reads, parts by several processes, and tables of random shapes."""

import dataclasses
import os
import pickle
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import tensorflow_datasets as tfds
from flax import traverse_util

from conclugen_jax.data import builders, manifest as manifest_lib, records, shards
from conclugen_jax.data.joined import JoinedSource
from conclugen_jax.data.sources import Annotations, Example, LabelSpec, PartedSource
from conclugen_jax.errors import ConclugenError
from conclugen_jax.system import files
from tests.helpers import Faces


class Parted(Faces):
    """Random faces that can be read in parts, with a further target, stored variants and missing modalities."""

    def __init__(self, *args, variants=1, **kwargs):
        super().__init__(*args, **kwargs)
        self.spec = dataclasses.replace(
            self.spec,
            targets={"age": LabelSpec("value"), "mood": LabelSpec("single", ("low", "high"))},
            variants={"video": variants},
        )

    def num_examples(self, split):
        return self._num[split]

    def part(self, split, start, stop):
        return list(self.examples(split))[start:stop]

    def examples(self, split):
        for i, e in enumerate(super().examples(split)):
            if split == "train" and self.spec.variants["video"] > 1:
                e.features["video"] = np.stack([e.features["video"] + v for v in range(self.spec.variants["video"])])
            yield dataclasses.replace(e, targets={"age": i / 4} if i % 3 else {"mood": i % 2})


@pytest.fixture
def small_shards(monkeypatch):
    """Shards of nine examples."""
    monkeypatch.setattr(builders, "SHARD_BYTES", 9 * 4 * 52)


@pytest.mark.parametrize("kind", ["single", "multi", "none"])
@pytest.mark.parametrize("variants", [1, 3])
def test_tfds_reads_every_field(tmp_path, kind, variants):
    source = Parted((20, 5, 5), kind=kind, missing=0.4, variants=variants)
    folder = builders.build(source, tmp_path)
    reader = tfds.builder_from_directory(folder)
    for split in source.spec.splits:
        data = reader.as_data_source(split)
        examples = list(source.examples(split))
        assert len(data) == len(examples)
        for found, expected in zip(data, examples, strict=True):
            assert found["id"].decode() == expected.id
            assert found["group"].decode() == expected.group
            for m in source.spec.modalities:
                assert found["present"][m] == (m in expected.features)
                x = expected.features.get(m, np.zeros(found["features"][m].shape))
                if variants > 1 and m == "video" and split != "train":
                    x = x.reshape(1, -1)
                np.testing.assert_array_equal(found["features"][m], x)
                assert found["features"][m].dtype == np.float32
            assert found["targets"]["mood"] == expected.targets.get("mood", -1)
            np.testing.assert_array_equal(found["targets"]["age"], np.float32(expected.targets.get("age", np.nan)))
            assert ("label" in found) == (kind != "none")
            if kind != "none":
                np.testing.assert_array_equal(found["label"], expected.label)


def test_serialised_as_tfds_would(tmp_path):
    from tensorflow_datasets.core import example_serializer
    from tensorflow_datasets.proto import tf_example_pb2

    source = Parted((6, 1, 1), kind="multi", missing=0.5, variants=2)
    features = records.record_features(source.spec)
    theirs = example_serializer.ExampleSerializer(features.get_serialized_info())
    checker = records.Checker(source.spec, "train")
    for row, example in enumerate(source.examples("train")):
        record = checker.record(row, example)
        nested = traverse_util.unflatten_dict(record, sep="/")
        parse = tf_example_pb2.Example.FromString
        assert parse(records.serialize(record)) == parse(theirs.serialize_example(features.encode_example(nested)))


def test_parts_by_several_processes_are_the_same_data_set(tmp_path, small_shards, monkeypatch):
    source = Parted((60, 24, 24), missing=0.3)
    assert isinstance(source, PartedSource)
    assert not isinstance(Faces(), PartedSource)
    seen = []
    one = builders.build(source, tmp_path / "one", progress=lambda done, total: seen.append((done, total)))
    two = builders.build(source, tmp_path / "two", num_workers=2)

    def sent(jobs, action, options):
        for job in jobs:
            there, received = pickle.loads(pickle.dumps((action, job)))
            there(received)

    monkeypatch.setattr(builders, "run_beam", sent)
    three = builders.build(source, tmp_path / "three", beam=[])
    for other in (two, three):
        assert manifest_lib.read(one) == manifest_lib.read(other)
        assert {p.name: p.read_bytes() for p in one.iterdir()} == {p.name: p.read_bytes() for p in other.iterdir()}
    assert len(manifest_lib.shard_names(manifest_lib.read(one), "train")) == 7
    assert seen[0] == (9, 108)
    assert seen[-1] == (108, 108)
    rows = shards.ShardStream(shards.open_dataset(two), "train", ["audio"]).rows(np.arange(60))
    for i, example in enumerate(source.examples("train")):
        np.testing.assert_array_equal(rows["features"]["audio"][i], example.features["audio"])


def test_a_source_that_is_only_an_iterator_is_cut_into_the_same_shards(tmp_path, small_shards):
    class Plain(Faces):
        pass

    class Cut(Faces):
        num_examples, part = Parted.num_examples, Parted.part

    plain, cut = (builders.build(kind((40, 3, 9)), tmp_path / kind.__name__, num_workers=2) for kind in (Plain, Cut))
    assert manifest_lib.read(plain) == manifest_lib.read(cut)
    assert len(manifest_lib.shard_names(manifest_lib.read(plain), "train")) == 5


class Killer:
    """Examples that kill the process that reads them."""

    def __iter__(self):
        os.kill(os.getpid(), signal.SIGKILL)


class Refused:
    """Examples that cannot be read."""

    def __iter__(self):
        raise ConclugenError("clip7.npy: it is damaged")


@pytest.mark.parametrize(
    ("examples", "message"),
    [(Killer, "worker process was killed.*--num_workers"), (Refused, "^clip7.npy: it is damaged$")],
)
def test_what_happens_in_a_worker_ends_in_a_sentence(tmp_path, small_shards, examples, message):
    class Bad(Parted):
        def part(self, split, start, stop):
            return examples() if start == 27 else super().part(split, start, stop)

    with pytest.raises(ConclugenError, match=message):
        builders.build(Bad(), tmp_path, num_workers=2)
    assert not list(tmp_path.iterdir())


def test_facts_of_a_part_survive_the_disk(tmp_path):
    source = Parted((30, 1, 1), kind="multi", missing=0.4)
    examples = list(source.examples("train"))
    examples[4].features["audio"][2] = np.nan
    examples[6].features["audio"] = examples[6].features["audio"].astype(np.float64)
    examples[7] = dataclasses.replace(examples[7], replaced={"text": 3})
    part = records.write_part(records.Job(source.spec, "train", 5, examples, tmp_path / "part"))
    part.save()
    again = records.Part.load(tmp_path / "part")
    assert (again.split, again.path) == ("train", str(tmp_path / "part"))
    assert part.bad == again.bad
    assert part.bad[0][:2] == (9, "train4")
    assert part.converted == again.converted == {"audio float64": 1}
    assert part.replaced == again.replaced == {"text": 3}
    assert part.sha256 == again.sha256 == files.sha256(tmp_path / "part")
    for name in ("rows", "presence", "ids", "groups"):
        np.testing.assert_array_equal(getattr(part, name), getattr(again, name))
        assert getattr(part, name).dtype == getattr(again, name).dtype
    for name, counts in part.label_counts.items():
        np.testing.assert_array_equal(counts, again.label_counts[name])
    for m, s in part.statistics.items():
        assert s.result() == again.statistics[m].result()


@pytest.mark.parametrize(("split", "expected"), [("train", (3, 24)), ("test", (1, 24))])
def test_an_absent_modality_has_as_many_variants_as_one_that_is_there(split, expected):
    checker = records.Checker(Parted(variants=3).spec, split)
    for there in (np.ones(expected, np.float32), None):
        features = {"audio": np.zeros(16)} | ({} if there is None else {"video": there})
        vector = checker.record(0, Example("a", features, label=0))["features/video"]
        np.testing.assert_array_equal(vector, np.zeros(expected) if there is None else there)


def test_statistics_are_of_all_variants(tmp_path):
    source = Parted((20, 5, 5), missing=0.4, variants=3)
    manifest = manifest_lib.read(builders.build(source, tmp_path))
    for m in manifest.modalities:
        x = np.concatenate([np.atleast_2d(e.features[m]) for e in source.examples("train") if m in e.features])
        assert len(x) == {"video": 60, "audio": 20}.get(m, len(x))
        np.testing.assert_allclose(manifest.statistics[m]["mean"], x.mean(axis=0, dtype=np.float64), rtol=1e-6)
        np.testing.assert_allclose(manifest.statistics[m]["std"], x.std(axis=0, dtype=np.float64), rtol=1e-6)


def test_what_is_counted_is_what_is_written(tmp_path, small_shards):
    """Rows that are left out are done, but nothing of them was converted or replaced."""

    class Spoilt(Parted):
        def examples(self, split):
            for i, e in enumerate(super().examples(split)):
                if split == "train" and i in (2, 3, 30):
                    e.features["video"] = e.features["video"].astype(np.float64)
                    e = dataclasses.replace(e, replaced={"audio": i, "text": 0})
                    e.features["audio"][:1] = np.nan if i == 3 else 0.0
                yield e

    seen = []
    for n in (1, 2):
        folder = builders.build(
            Spoilt(),
            tmp_path / str(n),
            drop_bad=True,
            num_workers=n,
            progress=lambda done, total: seen.append((done, total)),
        )
        assert seen[-1] == (112, 112)
        source = manifest_lib.read(folder).source
        assert source["converted"] == {"video float64": 2}
        assert source["replaced"] == {"audio": 32}
        assert manifest_lib.read(folder).splits["train"]["dropped"] == 1


def joined_source(**facts):
    rows = Annotations(
        ids=list("abcd"),
        groups=list("wxyz"),
        label=np.arange(4),
        targets={"age": np.array([0, np.nan, 2, 3], np.float32), "mood": np.array([1, 0, -1, 1])},
        keys=list("abcd"),
    )
    spec = dataclasses.replace(Parted().spec, modalities={}, splits=("train",))
    return JoinedSource(spec, {"train": rows}, {}, facts=facts)


def test_a_part_of_annotations_has_its_own_columns():
    whole, part = (list(joined_source().part("train", *rows)) for rows in ((0, 4), (1, 3)))
    assert [(e.id, e.group, e.label, e.targets) for e in part] == [
        ("b", "x", 1, {"mood": 0}),
        ("c", "y", 2, {"age": 2.0}),
    ]
    assert part == whole[1:3]


def test_a_fingerprint_counts_options_but_not_places():
    prints = {
        name: joined_source(**({"path": "p", "modalities": {"a": "a.npy"}, "folds": [5, 0]} | changes)).fingerprint()
        for name, changes in {
            "same": {},
            "moved": {"path": "q"},
            "modality moved": {"modalities": {"a": "elsewhere/a.npy"}},
            "fold": {"folds": [5, 1]},
            "pool": {"pool": "max"},
        }.items()
    }
    assert prints["same"] == prints["moved"] == prints["modality moved"]
    assert len(set(prints.values())) == 3


BEAM = """
import sys
from conclugen_jax.data import builders
from tests.test_records import Parted
builders.SHARD_BYTES = 9 * 4 * 52
print(builders.build(Parted((60, 24, 24), missing=0.3), sys.argv[1], beam=["--runner=DirectRunner"]))
"""


@pytest.mark.slow
def test_beam_builds_the_same_data_set(tmp_path, small_shards):
    """In an environment with Apache Beam, which asks for an older protobuf; elsewhere its absence is said."""
    python = os.environ.get("CONCLUGEN_BEAM_PYTHON", sys.executable)
    command = [python, "-c", BEAM, str(tmp_path / "beam")]
    root = Path(__file__).parents[1]
    result = subprocess.run(command, capture_output=True, text=True, check=False, cwd=root)
    if "No module named 'apache_beam'" in result.stderr:
        assert "pip install 'conclugen_jax[beam]'" in result.stderr
        pytest.skip("Apache Beam is not installed here; CONCLUGEN_BEAM_PYTHON names a Python that has it")
    assert result.returncode == 0, result.stderr
    one = builders.build(Parted((60, 24, 24), missing=0.3), tmp_path / "one")
    assert manifest_lib.read(one) == manifest_lib.read(result.stdout.split()[-1])


SLOW = """
import sys, time
from conclugen_jax.data import builders
from tests.helpers import Faces
class Slow(Faces):
    def examples(self, split):
        for e in super().examples(split):
            print("row", flush=True)
            time.sleep(0.2)
            yield e
builders.build(Slow(), sys.argv[1])
"""


@pytest.mark.slow
def test_a_killed_build_is_begun_anew_and_leaves_nothing(tmp_path):
    build = subprocess.Popen(
        [sys.executable, "-c", SLOW, str(tmp_path)], stdout=subprocess.PIPE, cwd=Path(__file__).parents[1]
    )
    build.stdout.readline()
    assert {p.name.split("-")[0] for p in tmp_path.iterdir()} == {".building"}
    build.kill()
    build.wait()
    build.stdout.close()
    folder = builders.build(Faces(), tmp_path)
    assert [p.name for p in tmp_path.iterdir()] == ["faces"]
    assert manifest_lib.read(folder).splits["train"]["num_examples"] == 64


def goes_on(pid):
    """Whether a process is there and no zombie."""
    stat = Path(f"/proc/{pid}/stat")
    try:
        os.kill(pid, 0)
        return not stat.exists() or stat.read_text().split()[2] != "Z"
    except (ProcessLookupError, FileNotFoundError):
        return False


@pytest.mark.slow
def test_workers_end_with_their_parent(tmp_path):
    """A build whose main process is killed leaves no process behind."""
    code = (
        "import os, time\n"
        "from conclugen_jax.system import pool\n"
        "if __name__ == '__main__':\n"
        "    workers = pool.Pool(1)\n"
        "    print(workers.submit(os.getpid).result(), flush=True)\n"
        "    time.sleep(60)\n"
    )
    script = tmp_path / "parent.py"
    script.write_text(code)
    root = os.fspath(Path(__file__).parents[1])
    parent = subprocess.Popen([sys.executable, script], stdout=subprocess.PIPE, env={**os.environ, "PYTHONPATH": root})
    with parent.stdout:
        line = parent.stdout.readline()
    parent.kill()
    parent.wait()
    worker = int(line)
    deadline = time.monotonic() + 10
    while goes_on(worker) and time.monotonic() < deadline:
        time.sleep(0.1)
    assert not goes_on(worker), f"process {worker} goes on without its parent"
