"""Predict the classes of clips by a downstream run, or show the expressions of the faces in them before any training.

conclugen predict CLIP.mp4 ...
conclugen predict --checkpoint=runs/linear --weights=weights/resnet152 --weights=weights/text CLIP.mp4 ...

Without --checkpoint one small network that comes with this package shows seven expressions of the face over time: neutral,
happy, sad, angry, fearful, disgusted, surprised. It sees faces alone and was not trained on your data. Words come from
subtitles beside a clip (.srt, .vtt, .csv, .txt), else whisper_tiny recognises them, where the extra 'ready' is installed.

With --checkpoint the command extracts features with the settings and weights of the run's data set, and predicts the label
of the run. Words come from subtitles beside a clip, else from the data set's speech recogniser.
"""

import json
import os
import sys
from pathlib import Path

from conclugen_jax.commands import app
from conclugen_jax.errors import ConclugenError
from conclugen_jax.system import progress

command = app.Command(words="clips")
FLAGS = command.flags
command.string(
    "checkpoint", None, "Folder of a downstream run; without it: show the expressions of the faces and the words"
)
command.multi_string("weights", [], "Folder of the converted weights that made the data set; may be repeated")
command.multi_string("backbone", [], "Name of a ready backbone, or MODULE:FUNCTION that creates one; may be repeated")
command.bool("cut", False, "Predict each line of the subtitles beside a clip, instead of the whole clip")
command.string("speech", "", "Another speech recogniser: pocketsphinx, whisper_tiny or faster-whisper:MODEL_FOLDER")
command.string("mtcnn", "", "Folder of converted weights of MTCNN; default: those of this package")
command.integer("num_workers", 0, "Processes that decode; 0: this one", lower_bound=0)
PERSON = (
    "NAME or NAME=FOLDER: the person in the clips, and a folder of further clips, for runs that standardise by person"
)
command.string("person", "", PERSON)
command.bool("json", False, "Print one JSON list on standard output, nothing else")
command.string("picture", "", "PNG file to draw the predictions into, with frames and words")
OF_A_RUN = "weights", "backbone", "cut", "person"  # flags without effect unless there is a checkpoint


def main() -> int:
    """Predict, show; exit with 1 if a clip failed."""
    if not command.words or "" in command.words:
        raise ConclugenError("no clips, or one without a name; name them after the flags")
    files = [Path(clip) for clip in command.words]
    paths = [os.path.realpath(file) for file in files]  # which a loop of links does not trouble
    for file, path in zip(files, paths, strict=True):
        if file.is_dir():
            raise ConclugenError(f"{file}: a folder; name the clips in it, such as {file}/*.mp4")
        if paths.count(path) > 1:
            raise ConclugenError(f"{file}: named twice; name each clip once")
    import jax

    from conclugen_jax.extract import curves, timeline, vectors

    jax.devices()  # where there are none, the error is not one of a clip or a backbone
    vectors.keep_freed_memory()
    if FLAGS.picture:
        timeline.check(Path(FLAGS.picture))
        most = curves.MOST if FLAGS.checkpoint is None else timeline.MOST
        timeline.check_number(Path(FLAGS.picture), len(files), most, "clips")
    found = _expressions(files) if FLAGS.checkpoint is None else _predictions(files)
    for p in found:
        if p.failure:
            print(f"failed: {p.failure}", file=sys.stderr)
    return int(any(p.failure for p in found))


def _predictions(files: list[Path]) -> list:
    """Show what a run predicts."""
    from conclugen_jax.extract import clips, prediction, timeline
    from conclugen_jax.extract.networks import mtcnn

    how = {"recogniser": FLAGS.speech, "mtcnn_folder": FLAGS.mtcnn or mtcnn.WEIGHTS}
    how |= command.values("cut", "num_workers")
    how["person"], _, folder = FLAGS.person.partition("=")
    if (FLAGS.person and not how["person"]) or (folder and not Path(folder).is_dir()):
        raise ConclugenError(f"--person={FLAGS.person}: expected NAME, or NAME=FOLDER with a folder of clips")
    how["reference"] = tuple(clips.media_files(Path(folder))) if folder else ()
    if folder and not how["reference"]:
        raise ConclugenError(f"--person={FLAGS.person}: no clips in {folder}; leave the folder out, or name another")
    found = prediction.predict(command.required("checkpoint"), files, FLAGS.weights, FLAGS.backbone, **how)
    _print_json(found)
    if not FLAGS.json and (shown := [p for p in found if not p.failure]):
        app.draw(prediction.table(shown, FLAGS.checkpoint))
    if FLAGS.picture:
        timeline.draw(found, Path(FLAGS.picture))
    return found


def _expressions(files: list[Path]) -> list:
    """Show the expressions of the faces over time."""
    for name in OF_A_RUN:
        if FLAGS[name].value:
            raise ConclugenError(f"--{name} is for predictions of a run; name one with --checkpoint, or leave it out")
    from conclugen_jax.extract import curves, expressions
    from conclugen_jax.extract.networks import mtcnn

    listen, remark = expressions.recogniser(FLAGS.speech)
    how = {"mtcnn_folder": FLAGS.mtcnn or mtcnn.WEIGHTS, "num_workers": FLAGS.num_workers}
    with progress.Counter("looking for faces", unit="pieces") as counter:
        found = expressions.look(files, listen, progress=counter, **how)
    _print_json(found)
    if not FLAGS.json and (table := expressions.table(found)):
        app.draw(table)
    progress.say(expressions.ABOUT)
    if remark and not all(p.words for p in found):
        progress.say(remark)
    if FLAGS.picture:
        curves.draw(found, Path(FLAGS.picture))
    return found


def _print_json(found: list) -> None:
    if FLAGS.json:
        print(json.dumps([p.to_json() for p in found], indent=1, allow_nan=False))
