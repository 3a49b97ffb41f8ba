"""What a downstream run says of clips.

python -m launch.predict --checkpoint=runs/linear --weights=weights/resnet152 --weights=weights/text CLIP.mp4 ...

The features are made as those that the run was trained on were: its data set knows how, and which weights. Words come from
subtitles beside a clip (.srt, .vtt, .csv, .txt), else from the recogniser of speech of the data set.
"""

import json
import sys
from pathlib import Path

from absl import flags
from rich.console import Console
from rich.table import Table

from conclugen_jax.errors import ConclugenError
from conclugen_jax.extract import mtcnn, prediction, timeline
from launch import app

CHECKPOINT = flags.DEFINE_string("checkpoint", None, "Folder of a downstream run")
WEIGHTS = flags.DEFINE_multi_string(
    "weights", [], "Folder of converted weights, those of the data set in its order; repeated"
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
    if not CLIPS:
        raise ConclugenError("no clips; name them after the flags")
    if len(set(CLIPS)) < len(CLIPS):
        raise ConclugenError(f"{max(CLIPS, key=CLIPS.count)}: named twice; name each clip once")
    found = prediction.predict(
        app.required("checkpoint"),
        [Path(clip) for clip in CLIPS],
        WEIGHTS.value,
        BACKBONE.value,
        cut=CUT.value,
        recogniser=SPEECH.value,
        mtcnn_folder=MTCNN.value,
        num_workers=NUM_WORKERS.value,
    )
    if PICTURE.value:
        timeline.draw(found, Path(PICTURE.value))
    if JSON.value:
        print(json.dumps([p.to_json() for p in found], indent=1, allow_nan=False))
    else:
        _show(found)
    for p in found:
        if p.failure:
            print(f"failed: {p.failure}", file=sys.stderr)
    if any(p.failure for p in found):
        sys.exit(1)


def _show(found: list[prediction.Prediction]) -> None:
    shown = [p for p in found if not p.failure]
    if not shown:
        return
    table = Table(title=f"{CHECKPOINT.value}: probabilities in %" if shown[0].classes else CHECKPOINT.value)
    for column in ("clip", "seconds", "words", "prediction"):
        table.add_column(column, overflow="fold")
    for name in shown[0].classes:
        table.add_column(name, justify="right")
    for p in shown:
        predicted = f"{p.predicted:.2f}" if isinstance(p.predicted, float) else ", ".join(p.predicted) or "none"
        missing = f" (no {', '.join(p.missing)})" if p.missing else ""
        cells = [Path(p.clip).name, f"{p.start:.1f}-{p.end:.1f}", p.text or "", predicted + missing]
        table.add_row(*cells, *(f"{100 * x:.1f}" for x in p.probability))
    Console().print(table)


if __name__ == "__main__":
    app.run(main)
