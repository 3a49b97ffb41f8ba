"""What a downstream run says of clips.

python -m launch.predict --checkpoint=runs/linear --weights=weights/resnet152 --weights=weights/text CLIP.mp4 ...

The features are made as those that the run was trained on were: its data set knows how, and which weights. Words come from
subtitles beside a clip (.srt, .vtt, .csv, .txt), else from the recogniser of speech of the data set.
"""

import json
import os
import sys
from pathlib import Path

from absl import flags
from rich.console import Console

from conclugen_jax.commands import app
from conclugen_jax.errors import ConclugenError
from conclugen_jax.extract import allocation, prediction, tables, timeline
from conclugen_jax.extract.networks import mtcnn

CHECKPOINT = flags.DEFINE_string("checkpoint", None, "Folder of a downstream run")
WEIGHTS = flags.DEFINE_multi_string(
    "weights",
    [],
    "Folder of converted weights that the data set was made with, those of the run's modalities; repeated",
)
BACKBONE = flags.DEFINE_multi_string(
    "backbone", [], "MODULE:FUNCTION that makes a backbone of your own; may be repeated"
)
CUT = flags.DEFINE_bool("cut", False, "Predict each line of the subtitles beside a clip; else the whole clip")
SPEECH = flags.DEFINE_string("speech", "", "Another recogniser: pocketsphinx, or faster-whisper:MODEL_FOLDER")
MTCNN = flags.DEFINE_string(
    "mtcnn", str(mtcnn.WEIGHTS), "Folder of converted weights of MTCNN, instead of those that come along"
)
NUM_WORKERS = flags.DEFINE_integer("num_workers", 0, "Processes that decode; 0: this one", lower_bound=0)
JSON = flags.DEFINE_bool("json", False, "One JSON list on standard output, nothing else")
PICTURE = flags.DEFINE_string("picture", "", "PNG file to draw the predictions into, with frames and words")
CLIPS = app.define_positional()


def main() -> None:
    """Predict, show; exit with 1 if a clip failed."""
    allocation.keep_freed_memory()
    if not CLIPS:
        raise ConclugenError("no clips; name them after the flags")
    if "" in CLIPS:
        raise ConclugenError("a clip without a name; leave it out")
    files = [Path(clip) for clip in CLIPS]
    folder = next((file for file in files if file.is_dir()), None)
    if folder is not None:
        raise ConclugenError(f"{folder}: a folder; name the clips in it, such as {folder}/*.mp4")
    paths = [os.path.realpath(file) for file in files]  # which a loop of links does not trouble
    twice = next((file for file, path in zip(files, paths, strict=True) if paths.count(path) > 1), None)
    if twice is not None:
        raise ConclugenError(f"{twice}: named twice; name each clip once")
    if PICTURE.value:
        timeline.check(Path(PICTURE.value))
    found = prediction.predict(
        app.required("checkpoint"),
        files,
        WEIGHTS.value,
        BACKBONE.value,
        cut=CUT.value,
        recogniser=SPEECH.value,
        mtcnn_folder=MTCNN.value,
        num_workers=NUM_WORKERS.value,
    )
    if JSON.value:
        print(json.dumps([p.to_json() for p in found], indent=1, allow_nan=False))
    else:
        shown = [p for p in found if not p.failure]
        if shown:
            Console().print(tables.of_predictions(shown, CHECKPOINT.value))
    if PICTURE.value:
        timeline.draw(found, Path(PICTURE.value))
    for p in found:
        if p.failure:
            print(f"failed: {p.failure}", file=sys.stderr)
    if any(p.failure for p in found):
        sys.exit(1)


if __name__ == "__main__":
    app.run(main)
