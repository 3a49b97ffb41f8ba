"""Turn clips into features and these into shards, in one pass over each clip.

conclugen extract --dataset=clips --name=mine --source=videos/ --data_dir=data \\
    --weights=weights/resnet152 --weights=weights/resnet3d101 --weights=weights/resdavenet --weights=weights/text
conclugen extract --dataset=meld --source=MELD.Raw --data_dir=data --weights=...

The command writes to DATA_DIR/NAME/VERSION. Repeat it to resume after an interruption; it skips finished clips.
docs/how-to/extract_clips.md describes the folders, labels and subtitles that it reads.
"""

from pathlib import Path

from conclugen_jax.commands import app, build
from conclugen_jax.data.corpora import CORPORA
from conclugen_jax.extract.folders import GENERIC
from conclugen_jax.extract.media import augmentation, mel
from conclugen_jax.system import progress, signals

OF_FILES = "format", "modality", "modalities", "pool", "drop_bad", "strict"
command = app.Command(refuse=dict.fromkeys(OF_FILES, "is for features in files; leave it out"))
FLAGS = command.flags
command.borrow(
    build.command,
    source="Folder of the clips",
    labels="Tables, instead of labels.csv in the source; with columns video, start and end, each row is an utterance",
    num_workers="Processes that decode; 0 for as many as there are cores",
    **dict.fromkeys(("data_dir", "name", "version", "overwrite", "beam", "beam_options"), ""),
    **dict.fromkeys(("label", "label_kind", "classes", "targets", "num_folds", "fold", "fold_by"), ""),
    **dict.fromkeys(("fold_seed", "fold_validation"), ""),
)
command.enum("dataset", None, [GENERIC, *CORPORA], "Which data set; clips: any folder")
PATTERN = "Names of clips without ending, such as {actor}_{emotion}_{take}: columns in braces, instead of labels.csv"
command.string("label_pattern", "", PATTERN)
command.multi_string("weights", [], "Folder of converted weights; may be repeated; vectors of one modality are joined")
command.multi_string("backbone", [], "Name of a ready backbone, or MODULE:FUNCTION that creates one; may be repeated")
READY = "ready: all installed ready backbones; the default without --weights and --backbone"
command.enum("backbones", "", ["", "ready"], READY)
command.bool("cut", False, "Make an utterance of each line of the subtitles beside a clip")
command.bool("crop_faces", True, "Crop the face of each clip; otherwise use whole frames")
NO_FACE = ["drop", "whole", "missing"]
command.enum("no_face", "drop", NO_FACE, "Clips without a face: drop them, use whole frames, or treat video as missing")
command.string("mtcnn", "", "Folder of converted weights of MTCNN; default: those of this package")
command.string(
    "speech", "", "Recogniser for clips without words: pocketsphinx, whisper_tiny or faster-whisper:MODEL_FOLDER"
)
command.integer("num_views", 1, "Views of each training clip; the first is the clip as it is", lower_bound=1)
command.enum("strength", "strong", list(augmentation.STRENGTHS), "Strength of the augmentation of the other views")
command.integer("seed", 0, "Seed of the other views")
command.enum("precision", "float32", ["float32", "bfloat16"], "Precision of the networks")
command.enum("front_end", "published", list(mel.FRONT_ENDS), "Spectrogram for the audio network")
command.integer("size", 180, "Side of the frames, in pixels", lower_bound=32, upper_bound=1280)
command.bool("authors_normalisation", False, "2D: swap mean and deviation, as the authors' configuration does")
FRAMES = "Frames in a batch of a network; use more on a GPU"
command.integer("batch_items", 16, FRAMES, lower_bound=1, upper_bound=2**16)
command.bool(
    "no_thumbnails",
    False,
    "Do not save thumbnails of the clips for reports, for example if the data must not be copied",
)
command.bool("keep_vectors", False, "Keep the vector of each clip, so that a later build extracts only new clips")


@signals.ending_at_once()
def main() -> None:
    """Extract, build, and say what became of the clips; a signal ends it at once, a repeated command resumes."""
    try:
        _extract()
    except signals.Interrupted:
        progress.say("stopped; finished utterances are kept, repeat the command to resume")
        raise


def _extract() -> None:
    how = command.values("no_face", "num_views", "seed", "strength") | build.builder_options(command)
    how |= {"data_dir": command.required("data_dir"), "keep": FLAGS.keep_vectors, "recogniser": FLAGS.speech}
    how["thumbnails"] = not FLAGS.no_thumbnails
    dataset, described = command.required("dataset"), build.request_options(command)
    import jax

    from conclugen_jax.data import inspection_view
    from conclugen_jax.extract import extraction, folders, outcome, vectors
    from conclugen_jax.extract.backbones import Networks, Options
    from conclugen_jax.extract.networks import mtcnn

    jax.devices()  # where there are none, the error is not one of a clip or a backbone
    vectors.keep_freed_memory()
    how["faces"] = FLAGS.mtcnn or str(mtcnn.WEIGHTS) if FLAGS.crop_faces else ""
    options = command.values("size", "precision", "front_end", "authors_normalisation", "batch_items")
    networks = Networks(tuple(FLAGS.weights), _backbones(), Options(**options))
    own = {
        "name": command.required("name") if dataset == GENERIC else FLAGS.name,
        "labels": tuple(map(Path, FLAGS.labels)),
    }
    own |= {"pattern": FLAGS.label_pattern, "cut": FLAGS.cut}
    request, found, known = folders.read(Path(command.required("source")), dataset, **own, **described)
    progress.say(f"{request.source}: {outcome.counted(len(found))}; opening the backbones, compiling their programs")
    with progress.Counter(f"extracting {request.name or dataset}", unit="utterances") as counter:
        folder, tally = extraction.extract(request, found, networks, known=known, progress=counter, **how)
    for line in (*inspection_view.describe(folder, with_dropped=False), *outcome.lines(tally, folder, len(found))):
        print(line)


def _backbones() -> tuple[str, ...]:
    """Return the backbones that are named or, where none is or all are wanted, the ready ones; say which these are."""
    named = tuple(FLAGS.backbone)
    if not FLAGS.backbones and (named or FLAGS.weights):
        return named
    from conclugen_jax.extract import ready

    for line in ready.lines():
        progress.say(line)
    there, _ = ready.chosen()
    return tuple(dict.fromkeys((*named, *there)))
