"""From real clips to a prediction for one that was left out, by the commands alone.

Pictures (with faces followed), sound and words heard by pocketsphinx. Weights are random, since no published ones may be stored
here, so nothing is said of whether predictions are right.
"""

import json
import shutil

import numpy as np
import pytest
from safetensors import numpy as safetensors

from conclugen_jax.data import manifest as manifest_lib, shards
from tests.helpers import (
    SHARED_DATA,
    needs_shared_data,
    start as run,  # in processes of their own, as users do
)
from tests.parity import seeded
from tests.test_networks import write_text

pytestmark = pytest.mark.slow

LEFT_OUT = "swiz3n.mpg"
SPLITS = {
    "bbaf2n": "train",
    "brbk7n": "train",
    "lbax4n": "train",
    "face_then_none": "validation",
    "silent_audio": "test",
}


@pytest.fixture
def weights(tmp_path):
    """Flags with the folders of all networks, converted from files in their published layouts."""
    shapes = {
        "resnet18": seeded.resnet(18, 2, 1000),
        "resnet3d18": seeded.resnet(18, 3, 400),
        "resdavenet": seeded.davenet((128, 128, 256, 512, 1024), 40),
    }
    for name, found in shapes.items():
        safetensors.save_file(seeded.weights(found), tmp_path / f"{name}.safetensors")
    sources = {name: tmp_path / f"{name}.safetensors" for name in shapes}
    sources["text"] = write_text(tmp_path / "published", "distilbert")
    for name, source in sources.items():
        run("launch.convert_weights", f"--network={name}", f"--source={source}", f"--output={tmp_path}/weights/{name}")
    return [f"--weights={tmp_path}/weights/{name}" for name in sources]


@needs_shared_data
def test_from_clips_to_a_prediction(tmp_path, weights):
    pytest.importorskip("pocketsphinx")
    source = tmp_path / "videos"
    shutil.copytree(SHARED_DATA / "clips", source, ignore=shutil.ignore_patterns(LEFT_OUT))
    rows = [f"{name},{split},{'ab'[i % 2]}" for i, (name, split) in enumerate(SPLITS.items())]
    (source / "labels.csv").write_text("\n".join(["id,split,kind", *rows]) + "\n")
    common = ["--dataset=clips", "--name=real", f"--source={source}", "--label=kind", f"--data_dir={tmp_path}"]
    told = run("launch.extract", *common, "--size=64", "--speech=pocketsphinx", "--num_workers=1", *weights).stdout
    data = tmp_path / "real" / "1.0.0"
    manifest = manifest_lib.read(data)
    assert manifest.modalities == {"video": 1024, "audio": 1024, "text": 48}
    assert "train 3, validation 1, test 1 examples" in told
    made = manifest.source["extraction"]
    assert (made["failed"], made["speech"]["name"], made["frames"]["no_face"]) == (0, "pocketsphinx", "drop")
    rows = shards.ShardStream(shards.open_dataset(data), "train", list(manifest.modalities)).rows(np.arange(3))
    assert all(present.all() for present in rows["present"].values())
    assert all(np.isfinite(x).all() for x in rows["features"].values())

    options = [f"--config.data.path={data}", "--config.train.num_epochs=2", "--config.train.batch_size=3"]
    clustering = ["start_epoch=1", "queue_batches=0", "num_clusters=2"]
    further = [f"--config.clustering.{o}" for o in clustering] + ["--config.schedule.warmup_epochs=0"]
    further.append("--config.loss.reconstruction_weight=1.0")  # all three losses
    run("launch.pretrain", "--config=configs/small.py", *options, *further, f"--workdir={tmp_path}/pretrained")
    log = [json.loads(line) for line in (tmp_path / "pretrained" / "metrics.jsonl").read_text().splitlines()]
    assert [line["epoch"] for line in log] == [0, 1]
    assert {"loss/contrastive", "loss/clustering", "loss/reconstruction"} <= log[1].keys()
    linear = ["--config=configs/linear_evaluation.py", f"--config.downstream.checkpoint={tmp_path}/pretrained"]
    run("launch.downstream", *linear, *options, f"--workdir={tmp_path}/linear")

    picture = tmp_path / "timeline.png"
    command = ["launch.predict", f"--checkpoint={tmp_path}/linear", "--json", f"--picture={picture}", *weights[::-1]]
    (found,) = json.loads(run(*command, SHARED_DATA / "clips" / LEFT_OUT).stdout)
    assert sum(found["probability"].values()) == pytest.approx(1, abs=1e-5)
    assert found["probability"].keys() == {"a", "b"}
    assert (found["missing"], found["failure"]) == ([], "")
    assert 2 <= len(found["text"].split()) <= 12  # "set white in z three now", or what was heard of it
    assert found["end"] == pytest.approx(3.0, abs=0.1)
    assert picture.stat().st_size > 1000
