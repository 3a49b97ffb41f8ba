"""Clips are prepared for a prediction as those of the run's data set were; what differs is refused by name."""

import json
import types
from importlib import metadata

import numpy as np
import pytest
from rich.console import Console

from conclugen_jax.data.sources import LabelSpec
from conclugen_jax.errors import ConclugenError
from conclugen_jax.extract import backbones, faces, prediction, preparation, timeline
from conclugen_jax.extract.backbones import Backbone, Networks
from conclugen_jax.extract.companions import Companions
from conclugen_jax.extract.networks import mtcnn, weights
from conclugen_jax.extract.prediction import Prediction
from conclugen_jax.extract.utterance import Utterance
from conclugen_jax.extract.vectors import vectors
from tests import clips

OWN = tuple(f"tests.own_backbones:{name}" for name in ("pictures", "loudness", "words"))


def made(**changes):
    """What the manifest of a data set says of its extraction."""
    networks = Networks((), OWN)
    how = preparation.recipe(backbones.load(networks), faces=str(mtcnn.WEIGHTS), no_face="missing")
    facts = preparation.provenance(backbones.load(networks), how, networks.options).to_json()
    facts["speech"] = {"name": "pocketsphinx", "version": metadata.version("pocketsphinx")}
    return types.SimpleNamespace(name="mine", source={"extraction": json.loads(json.dumps(facts | changes))})


def same_way(manifest, own=OWN, recogniser="", faces=mtcnn.WEIGHTS, modalities=("video", "audio", "text")):
    found, how = prediction._same_way(manifest, "runs/linear", modalities, Networks((), own), recogniser, faces)
    return [b.name for b in found], how


def test_the_recipe_is_that_of_the_data_set():
    pytest.importorskip("pocketsphinx")
    names, how = same_way(made())
    assert names == list(how.prepare) == ["pictures", "loudness", "words"]
    assert (how.faces, how.no_face, how.recogniser) == (str(mtcnn.WEIGHTS), "missing", "pocketsphinx")
    assert same_way(made(frames={"faces": "", "no_face": "", "faces_per_second": 0.0}, speech={}))[1].faces == ""


def test_what_differs_is_refused():
    pytest.importorskip("pocketsphinx")
    other = f"{OWN[2]}_of_another_version"
    with pytest.raises(ConclugenError, match="words: its version is 2, that of the features of runs/linear is null"):
        same_way(made(), own=(*OWN[:2], other))
    with pytest.raises(ConclugenError, match="its features need loudness, words; name the weights with"):
        same_way(made(), own=OWN[:1])
    with pytest.raises(ConclugenError, match="its features need pictures, loudness, words; name the weights with"):
        same_way(made(), own=())
    with pytest.raises(ConclugenError, match="its features were made without other; leave that out"):
        same_way(made(), own=(*OWN, "tests.own_backbones:other_size"))
    with pytest.raises(
        ConclugenError, match=r'mtcnn: its faces is "\w+", that of the features of runs/linear is "0+"; use the same'
    ):
        same_way(made(frames={"faces": "0" * 64, "no_face": "drop", "faces_per_second": 2.0}))
    with pytest.raises(
        ConclugenError, match=r"mtcnn: its faces_per_second is 2\.0, that of .* is 1\.0; .*extract again"
    ):
        same_way(made(frames={"faces": weights.load(mtcnn.WEIGHTS).sha256, "no_face": "drop", "faces_per_second": 1.0}))
    earlier = {"faces": weights.load(mtcnn.WEIGHTS).sha256, "no_face": "drop", "faces_per_second": 2.0}  # no least_face
    for facts, least in ((earlier, 0.0), (earlier | {"least_face": 0.5}, 0.5)):
        message = (
            rf"^mtcnn: its least_face is {faces.LEAST}, that of the features of runs/linear is {least}; .*extract again"
        )
        with pytest.raises(ConclugenError, match=message):
            same_way(made(frames=facts))
    with pytest.raises(
        ConclugenError, match=r'pocketsphinx: its version is ".+", that of the features of runs/linear is "0\.1"'
    ):
        same_way(made(speech={"name": "pocketsphinx", "version": "0.1"}))
    with pytest.raises(ConclugenError, match="'siri' is unknown"):
        same_way(made(), recogniser="siri")
    with pytest.raises(ConclugenError, match="damaged facts of its data set"):
        same_way(made(frames=None))


@pytest.mark.parametrize(
    "facts",
    [
        {"speech": {"name": 5}},
        {"frames": {"faces": 1, "no_face": "", "faces_per_second": 2.0}},
        *({"options": {"size": size, "precision": "float32"}} for size in (10**9, "x", 0)),
        {"options": {"precision": "nope"}},
        {"backbones": {"words": {"dim": 2}}},
    ],
)
def test_damaged_facts_are_refused_with_the_way_out(facts):
    with pytest.raises(
        ConclugenError, match=r"damaged facts of its data set .*; restore its data\.json, or train again"
    ):
        same_way(made(**facts))


def test_any_order_will_do_and_only_the_modalities_of_the_run_count():
    assert same_way(made(), own=OWN[::-1])[0] == ["pictures", "loudness", "words"]
    names, how = same_way(made(), own=OWN[::-1], modalities=("audio", "text"))
    assert (names, list(how.prepare), how.rates) == (["loudness", "words"], ["loudness", "words"], ())
    assert same_way(made(), own=OWN[2:], modalities=("text",))[0] == ["words"]
    with pytest.raises(ConclugenError, match="words: its version is 2, that of the features"):
        same_way(made(), own=(f"{OWN[2]}_of_another_version", OWN[0]), modalities=("video",))


def test_other_weights_are_refused_by_their_hash(tmp_path):
    def facts(digit):
        return {"modality": "video", "dim": 512, "sha256": digit * 64, "source": {digit: digit}}

    found, expected = {"resnet18": facts("1")}, {"resnet18": facts("2")}
    with pytest.raises(ConclugenError, match=r'resnet18: its sha256 is "1+", that of the features of runs/a is "2+"'):
        prediction.compare(found, expected, "runs/a")
    prediction.compare(found, {"resnet18": facts("1") | {"source": {"another": "file"}}}, "runs/a")
    many = {f"option{i}": i for i in range(100)}
    found, expected = ({"text": facts("1") | {"options": many | {"z": z}}} for z in (1, 2))
    with pytest.raises(ConclugenError, match="text: its options is"):
        prediction.compare(found, expected, "runs/a")


def prepared(utterance, own=OWN, **options):
    how = preparation.recipe(backbones.load(Networks((), own)), **options)
    return preparation.prepare(utterance, how, 1)


def test_words_are_recognised_where_none_are_known(tmp_path, monkeypatch):
    heard = []
    monkeypatch.setattr(
        preparation, "recogniser", lambda name: lambda sound: heard.append((name, len(sound))) or "one two"
    )
    path = clips.write(tmp_path / "a.mkv", clips.steady(1.0), sound=clips.tone(1.0))
    unknown = prepared(Utterance("a", "", str(path)), recogniser="some")
    assert (unknown.text, unknown.views[0]["words"][0].tolist()) == ("one two", [[2, 7]])
    assert heard == [("some", 16_000)]
    known = prepared(Utterance("a", "", str(path), text="known"), recogniser="some")
    assert (known.text, len(heard)) == ("known", 1)
    assert prepared(Utterance("a", "", str(path))).text is None
    alone = prepared(Utterance("a", "", str(path)), own=OWN[2:], recogniser="some")
    assert alone.text == "one two"


def test_subtitles_cut_a_clip_where_that_is_asked_for(tmp_path):
    path = clips.write(tmp_path / "a.mkv", clips.steady(3.0))
    path.with_suffix(".srt").write_text(
        "1\n00:00:00,500 --> 00:00:01,000\none\n\n2\n00:00:01,000 --> 00:00:02,500\ntwo\n"
    )
    cut = prediction._utterances(path, True, Companions())
    assert [(u.start, u.end, u.text) for u in cut] == [(0.5, 1.0, "one"), (1.0, 2.5, "two")]
    assert len({u.place for u in cut}) == 2
    (whole,) = prediction._utterances(path, False, Companions())
    assert (whole.start, whole.end, whole.text) == (0.0, None, "one two")


def test_a_missing_modality_is_told_to_the_network():
    task = types.SimpleNamespace(label=LabelSpec("single", ("x", "y")))
    network = types.SimpleNamespace(modalities=["video", "text"], task=task)
    asked = []

    def run(features, present):
        asked.append((features, present))
        return {"prediction": np.array([1]), "probability": np.array([[0.25, 0.75]])}

    u = Utterance("a", "", "a.mkv")
    each = preparation.Prepared("a", times=(0.0, 2.0), text=None)
    found = prediction._prediction(
        u, each, {"video": np.ones((1, 3))}, network, run, {"video": 3, "text": 2, "audio": 9}
    )
    assert (found.predicted, found.missing, found.probability) == (("y",), ("text",), (0.25, 0.75))
    ((features, present),) = asked
    assert {m: p.tolist() for m, p in present.items()} == {"video": [True], "text": [False]}
    assert features["text"].tolist() == [[0, 0]]
    assert found.end == 2.0
    none = prediction._prediction(u, each, {}, network, run, {"video": 3, "text": 2})
    assert none.failure == "a.mkv: lacks video, text, all that the run uses"
    assert len(asked) == 1


def test_an_interval_without_end_and_sound_of_another_file(tmp_path):
    path = clips.write(tmp_path / "a.mkv", clips.steady(3.0), sound=clips.tone(3.0))
    sound = clips.write(tmp_path / "a.wav", [], sound=2 * clips.tone(3.0))
    found = prepared(Utterance("a", "", str(path), start=1.0, sound=str(sound)))
    assert found.times == (1.0, 3.0)
    (peak, seconds), *_ = found.views[0]["loudness"][0].tolist()
    assert (peak, seconds) == (pytest.approx(0.6, abs=1e-3), 2.0)


@pytest.mark.parametrize(("boxes", "number"), [((), 50), (((0.2, 0.1, 0.2, 0.3, 0.4), (0.4, 0.5, 0.5, 0.6, 0.6)), 35)])
def test_the_picture_shows_the_frame_of_the_box_or_the_middle(tmp_path, boxes, number):
    path = clips.write(tmp_path / "a.mkv", clips.steady(4.0))
    frame, box = timeline._frame(Prediction(str(path), 1.0, 3.0, boxes=boxes))
    assert clips.number_of(frame) == number
    assert box == (boxes[-1][1:] if boxes else None)


def test_brackets_in_words_are_shown(capsys):
    found = Prediction(
        "a [red] b.mkv", 0, 1, "[/music] hello", ("[b]x",), (1.0,), ("[b]x",), ("[i]audio",), ("[u]odd",)
    )
    Console(width=200).print(prediction.table([found], "runs/[blue]"))
    shown = capsys.readouterr().out
    for text in ("[/music] hello", "a [red] b.mkv", "[b]x", "runs/[blue]: probabilities", "no [i]audio; [u]odd"):
        assert text in shown


def test_words_and_remarks_have_a_column_only_where_there_are_some():
    silent = Prediction("a.mkv", 0, 1, None, ("x",), (1.0,), ("x",))
    assert [c.header for c in prediction.table([silent], "r").columns] == ["clip", "seconds", "prediction", "x"]
    plain = Prediction("a.mkv", 0, 1, "a", ("x",), (1.0,), ("x",))
    odd = Prediction("b.mkv", 0, 1, None, ("x",), (1.0,), ("x",), ("audio",), ("silence", "no audio"))
    assert [c.header for c in prediction.table([plain], "r").columns][-1] == "x"
    last = prediction.table([plain, odd], "r").columns[-1]
    assert (last.header, list(last.cells)) == ("remarks", ["", "no audio; silence"])


def test_sound_beside_a_clip_is_its_own(tmp_path):
    for name in ("a.mp4", "a.wav", "b.mp4"):
        (tmp_path / name).touch()
    (tmp_path / "a.srt").write_text("1\n00:00:00,000 --> 00:00:01,000\nhello\n")
    for cut in (False, True):
        (found,) = prediction._utterances(tmp_path / "a.mp4", cut, Companions())
        assert (found.sound, found.text, found.end) == (str(tmp_path / "a.wav"), "hello", 1.0 if cut else None)
    assert prediction._utterances(tmp_path / "b.mp4", False, Companions())[0].sound == ""


def test_vectors_of_one_modality_are_joined_in_the_order_of_their_backbones():
    order = [Backbone(name, "video", dim, None, lambda x: x) for name, dim in (("b", 2), ("a", 3))]
    items = {"a": (np.full((1, 3), 3, np.float32),), "b": (np.full((1, 2), 2, np.float32),)}
    ((_, rows),) = vectors(iter([preparation.Prepared("clip", (items,))]), order)
    assert rows["video"].tolist() == [[2, 2, 3, 3, 3]]
