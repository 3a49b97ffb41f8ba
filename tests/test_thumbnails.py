"""What people look at of clips is kept beside the shards: words, where the clip is, a small picture; and left out if asked."""

import io
import shutil

import numpy as np
import pytest
from PIL import Image

from conclugen_jax.data import builders, formats, manifest as manifest_lib, utterances
from conclugen_jax.data.requests import Request
from conclugen_jax.errors import ConclugenError
from conclugen_jax.extract import faces
from tests import clips
from tests.test_extract import extract


@pytest.fixture(scope="module")
def videos(tmp_path_factory):
    return clips.videos(tmp_path_factory.mktemp("videos"))


def picture(data):
    image = Image.open(io.BytesIO(data))
    assert (image.format, image.size) == ("JPEG", (64, 64))
    return np.asarray(image)


def test_extraction_keeps_them_beside_the_shards(videos, tmp_path):
    folder, _ = extract(videos, tmp_path, thumbnails=True)
    manifest = manifest_lib.read(folder)
    assert manifest.files[utterances.FILE]["bytes"] == (folder / utterances.FILE).stat().st_size
    ids = [f"train{i}" for i in range(4)]
    found = utterances.read(folder, manifest, {"train": [*ids, "unknown"], "test": []})
    assert found["train", "unknown"] == utterances.Seen()
    for i, name in enumerate(ids):
        seen = found["train", name]
        assert seen.clip == str(next(videos.glob(f"train/{name}.m*")))
        left = picture(seen.thumbnail)[:, :16].mean()  # grey, the lighter the later the clip
        assert left == pytest.approx([20, 60, 100, 140][i], abs=25)
    assert [bool(found["train", name].words) for name in ids] == [True, True, False, True]
    with pytest.raises(ConclugenError, match="holds thumbnails of the clips; pass --overwrite"):
        extract(videos, tmp_path, thumbnails=False)
    without, _ = extract(videos, tmp_path, thumbnails=False, overwrite=True)
    found = utterances.read(without, manifest_lib.read(without), {"train": ids})
    assert {seen.thumbnail for seen in found.values()} == {b""}
    assert found["train", "train0"].words


def test_folds_take_them_along_and_older_data_sets_have_none(videos, tmp_path):
    source = shutil.copytree(videos / "train", tmp_path / "videos")
    folder, _ = extract(source, tmp_path, thumbnails=True)
    cut = Request("features", folder, name="mine", folds=(3, 0), fold_by="example", fold_validation=False)
    fold = builders.build(formats.open_source(cut), tmp_path / "folds", drop_bad=True)
    manifest = manifest_lib.read(fold)
    found = utterances.read(fold, manifest, {"train": ["train0"], "test": ["train1", "train2", "train3"]})
    assert all(seen.thumbnail for seen in found.values())
    del manifest.files[utterances.FILE]
    assert utterances.read(fold, manifest, {"train": ["train0"]}) == {("train", "train0"): utterances.Seen()}


def test_thumbnail_is_a_square_around_the_face():
    frame = np.zeros((100, 200, 3), np.uint8)
    frame[40:60, 150:170] = 255
    seen = picture(faces.thumbnail(frame, np.array([0.75, 0.4, 0.85, 0.6])))
    assert seen[12:52, 12:52].mean() > 240  # the face, with a margin on all sides
    assert seen[:3].mean() < 60
    assert seen[:, :3].mean() < 60
    at_the_edge = picture(faces.thumbnail(frame, np.array([-0.1, -0.1, 0.2, 1.1])))
    assert at_the_edge.max() < 10
    assert picture(faces.thumbnail(frame, None)).max() < 255
